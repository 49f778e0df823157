//! What a machine's kernel should hold, apart from facts: the desired state that
//! gateways push to nodes and apply to their own programs.
//!
//! A state is a map from [`EntryKey`] to [`Entry`]: a snapshot is all entries, a
//! delta what [`NodeState::diff`] says.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use crate::shards::Shards;
use crate::{ClassKey, GroupKey, PortSet, PrefixSetKey, ScopeKey};

/// What a pod is to Tidegate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Touch {
    /// No policy selects it.
    Untouched,
    /// Only cluster policies select it: their denies hold, all else takes the CNI's path.
    Guarded,
    /// Default deny.
    Isolated,
}

/// Identity of one entry.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EntryKey {
    /// The cluster-wide values.
    Cluster,
    /// A node by name.
    Node(String),
    /// A gateway by name.
    Gateway(String),
    /// An endpoint by address.
    Endpoint(IpAddr),
    /// A scope.
    Scope(ScopeKey),
    /// A group.
    Group(GroupKey),
    /// A prefix set.
    Prefixes(PrefixSetKey),
    /// A grant.
    Grant(GroupKey, ClassKey),
    /// A namespace by name.
    Namespace(String),
    /// A name of the cluster, without its suffix.
    Name(String),
}

/// The most names of the cluster that gateways tell of, and, with their suffixes, that a node's kernel knows. Of more the
/// rest is answered by gateways alone.
pub const MAX_NAMES: usize = 65_536;

/// Where a name of the cluster leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Named {
    /// To a Service or pod: the cluster's DNS answers it by itself.
    Inside,
    /// Outside (an ExternalName Service): it is resolved under policy.
    Outside,
}

/// Cluster-wide values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cluster {
    /// The cluster set: in-cluster destinations that pass un-steered (datapath.md, step 7).
    pub prefixes: Vec<IpNet>,
    /// Ports on node addresses that are not part of the cluster set (NodePorts), inclusive.
    pub node_ports: Option<(u16, u16)>,
    /// The endpoints of the cluster DNS: traffic to them is DNS whatever the port.
    pub dns: Vec<SocketAddr>,
    /// Whether ICMP echo to destinations that are allowed by a prefix or fact passes.
    pub ping: bool,
    /// Suffixes of the cluster's names, canonical; without reverse zones.
    pub suffixes: Vec<String>,
}

/// A node of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its addresses, outer sources and destinations of the tunnel.
    pub addresses: Vec<IpAddr>,
}

/// A gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gateway {
    /// The node that it runs on.
    pub node: String,
    /// Where it listens for agents, so that those that know one gateway know all; empty where they are told otherwise.
    pub control: Vec<SocketAddr>,
}

/// An endpoint: one address of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The pod's node.
    pub node: String,
    /// Its namespace, for audit records.
    pub namespace: String,
    /// Its name, for audit records.
    pub pod: String,
    /// What it is.
    pub touch: Touch,
    /// Its scope and group; absent for an untouched pod, and where it is in doubt whose address it is.
    pub member: Option<(ScopeKey, GroupKey)>,
}

/// A scope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    /// The gateway that owns it.
    pub owner: String,
    /// The epoch of that ownership; a higher one wins.
    pub epoch: u64,
    /// Index of the egress pair at the owner, for its own mark-to-address map; 0 is PodNetwork.
    pub pair: u8,
    /// Gateways that answer DNS while the owner is silent, in this order.
    pub standbys: Vec<String>,
}

/// A group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Default deny.
    pub isolated: bool,
    /// Would-be denies pass and are reported.
    pub audit: bool,
    /// Prefixes decided by cluster policies of the Admin tier.
    pub admin: Option<PrefixSetKey>,
    /// Prefixes decided by the namespace's own policies, or by the Baseline tier where no own policy selects the pods.
    pub own: Option<PrefixSetKey>,
}

/// Flattened prefixes: each carries the evaluated union of its ancestors, so that the longest match alone decides.
pub type Prefixes = BTreeMap<IpNet, PortSet>;

/// One entry: its identity with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// The cluster-wide values.
    Cluster(Cluster),
    /// A node.
    Node(String, Node),
    /// A gateway.
    Gateway(String, Gateway),
    /// An endpoint.
    Endpoint(IpAddr, Endpoint),
    /// A scope.
    Scope(ScopeKey, Scope),
    /// A group.
    Group(GroupKey, Group),
    /// A prefix set.
    Prefixes(PrefixSetKey, Prefixes),
    /// A grant: what holds for addresses of a class.
    Grant(GroupKey, ClassKey, PortSet),
    /// A namespace: the strictest that a new pod of it may be, whatever its labels. What is audited is denied nothing, and
    /// counts as untouched.
    Namespace(String, Touch),
    /// A name of the cluster without its suffix, such as `db.shop.svc`.
    Name(String, Named),
}

impl Entry {
    /// The entry's identity.
    pub fn key(&self) -> EntryKey {
        match self {
            Entry::Cluster(_) => EntryKey::Cluster,
            Entry::Node(n, _) => EntryKey::Node(n.clone()),
            Entry::Gateway(n, _) => EntryKey::Gateway(n.clone()),
            Entry::Endpoint(ip, _) => EntryKey::Endpoint(*ip),
            Entry::Scope(k, _) => EntryKey::Scope(*k),
            Entry::Group(k, _) => EntryKey::Group(*k),
            Entry::Prefixes(k, _) => EntryKey::Prefixes(*k),
            Entry::Grant(g, c, _) => EntryKey::Grant(*g, *c),
            Entry::Namespace(n, _) => EntryKey::Namespace(n.clone()),
            Entry::Name(n, _) => EntryKey::Name(n.clone()),
        }
    }
}

/// The desired state of one machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeState {
    /// Cluster-wide values.
    pub cluster: Cluster,
    /// Nodes by name.
    pub nodes: BTreeMap<String, Node>,
    /// Gateways by name.
    pub gateways: BTreeMap<String, Gateway>,
    /// Endpoints by address.
    pub endpoints: BTreeMap<IpAddr, Endpoint>,
    /// Scopes.
    pub scopes: BTreeMap<ScopeKey, Scope>,
    /// Groups.
    pub groups: BTreeMap<GroupKey, Group>,
    /// Prefix sets.
    pub prefixes: BTreeMap<PrefixSetKey, Prefixes>,
    /// Grants.
    pub grants: BTreeMap<(GroupKey, ClassKey), PortSet>,
    /// Namespaces with the strictest that a new pod may be. Nodes' states share them with the world.
    pub namespaces: Shards<Arc<str>, Touch>,
    /// Names of the cluster without their suffix. Nodes' states share them with the world.
    pub names: Shards<Arc<str>, Named>,
}

/// What differs between two maps, in the order of their keys.
fn differ<K: Ord, V: PartialEq>(
    old: &BTreeMap<K, V>,
    new: &BTreeMap<K, V>,
    set: &mut Vec<Entry>,
    gone: &mut Vec<EntryKey>,
    entry: impl Fn(&K, &V) -> Entry,
    key: impl Fn(&K) -> EntryKey,
) {
    set.extend(new.iter().filter(|(k, v)| old.get(k) != Some(v)).map(|(k, v)| entry(k, v)));
    gone.extend(old.keys().filter(|k| !new.contains_key(k)).map(key));
}

impl NodeState {
    /// All entries, in the order in which a receiver should apply them: what is referred to comes first.
    pub fn entries(&self) -> Vec<Entry> {
        let mut out = vec![Entry::Cluster(self.cluster.clone())];
        out.extend(self.nodes.iter().map(|(k, v)| Entry::Node(k.clone(), v.clone())));
        out.extend(self.gateways.iter().map(|(k, v)| Entry::Gateway(k.clone(), v.clone())));
        out.extend(self.prefixes.iter().map(|(k, v)| Entry::Prefixes(*k, v.clone())));
        out.extend(self.scopes.iter().map(|(k, v)| Entry::Scope(*k, v.clone())));
        out.extend(self.groups.iter().map(|(k, v)| Entry::Group(*k, v.clone())));
        out.extend(self.grants.iter().map(|((g, c), v)| Entry::Grant(*g, *c, v.clone())));
        out.extend(self.namespaces.iter().map(|(k, v)| Entry::Namespace(k.to_string(), *v)));
        out.extend(self.endpoints.iter().map(|(k, v)| Entry::Endpoint(*k, v.clone())));
        out.extend(self.names.iter().map(|(k, v)| Entry::Name(k.to_string(), *v)));
        out
    }

    /// What turns `self` into `new`: entries to set and identities to delete.
    pub fn diff(&self, new: &NodeState) -> (Vec<Entry>, Vec<EntryKey>) {
        let (mut set, mut gone) = (Vec::new(), Vec::new());
        if self.cluster != new.cluster {
            set.push(Entry::Cluster(new.cluster.clone()));
        }
        let (s, g) = (&mut set, &mut gone);
        differ(&self.nodes, &new.nodes, s, g, |k, v| Entry::Node(k.clone(), v.clone()), |k| EntryKey::Node(k.clone()));
        let gateway = |k: &String, v: &Gateway| Entry::Gateway(k.clone(), v.clone());
        differ(&self.gateways, &new.gateways, s, g, gateway, |k| EntryKey::Gateway(k.clone()));
        let prefixes = |k: &PrefixSetKey, v: &Prefixes| Entry::Prefixes(*k, v.clone());
        differ(&self.prefixes, &new.prefixes, s, g, prefixes, |k| EntryKey::Prefixes(*k));
        differ(&self.scopes, &new.scopes, s, g, |k, v| Entry::Scope(*k, v.clone()), |k| EntryKey::Scope(*k));
        differ(&self.groups, &new.groups, s, g, |k, v| Entry::Group(*k, v.clone()), |k| EntryKey::Group(*k));
        let grant = |k: &(GroupKey, ClassKey), v: &PortSet| Entry::Grant(k.0, k.1, v.clone());
        differ(&self.grants, &new.grants, s, g, grant, |k| EntryKey::Grant(k.0, k.1));
        new.namespaces.compare(&self.namespaces, |name, old, new| match new {
            new if old == new => {}
            Some(touch) => s.push(Entry::Namespace(name.to_string(), *touch)),
            None => g.push(EntryKey::Namespace(name.to_string())),
        });
        new.names.compare(&self.names, |name, old, new| match new {
            new if old == new => {}
            Some(named) => s.push(Entry::Name(name.to_string(), *named)),
            None => g.push(EntryKey::Name(name.to_string())),
        });
        let endpoint = |k: &IpAddr, v: &Endpoint| Entry::Endpoint(*k, v.clone());
        differ(&self.endpoints, &new.endpoints, s, g, endpoint, |k| EntryKey::Endpoint(*k));
        (set, gone)
    }

    /// Sets one entry.
    pub fn set(&mut self, entry: Entry) {
        match entry {
            Entry::Cluster(v) => self.cluster = v,
            Entry::Node(k, v) => drop(self.nodes.insert(k, v)),
            Entry::Gateway(k, v) => drop(self.gateways.insert(k, v)),
            Entry::Endpoint(k, v) => drop(self.endpoints.insert(k, v)),
            Entry::Scope(k, v) => drop(self.scopes.insert(k, v)),
            Entry::Group(k, v) => drop(self.groups.insert(k, v)),
            Entry::Prefixes(k, v) => drop(self.prefixes.insert(k, v)),
            Entry::Grant(g, c, v) => drop(self.grants.insert((g, c), v)),
            Entry::Namespace(k, v) => drop(self.namespaces.insert(k.into(), v)),
            Entry::Name(k, v) => drop(self.names.insert(k.into(), v)),
        }
    }

    /// Deletes one entry, if it is there.
    pub fn delete(&mut self, key: &EntryKey) {
        match key {
            EntryKey::Cluster => self.cluster = Cluster::default(),
            EntryKey::Node(k) => drop(self.nodes.remove(k)),
            EntryKey::Gateway(k) => drop(self.gateways.remove(k)),
            EntryKey::Endpoint(k) => drop(self.endpoints.remove(k)),
            EntryKey::Scope(k) => drop(self.scopes.remove(k)),
            EntryKey::Group(k) => drop(self.groups.remove(k)),
            EntryKey::Prefixes(k) => drop(self.prefixes.remove(k)),
            EntryKey::Grant(g, c) => drop(self.grants.remove(&(*g, *c))),
            EntryKey::Namespace(k) => drop(self.namespaces.remove(k.as_str())),
            EntryKey::Name(k) => drop(self.names.remove(k.as_str())),
        }
    }
}

/// One change of the learnt facts of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FactUpdate {
    /// The scope that learnt it.
    pub scope: ScopeKey,
    /// The address.
    pub ip: IpAddr,
    /// What holds from now on; `None` deletes the fact.
    pub value: Option<FactValue>,
}

/// What a fact says in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FactValue {
    /// The class of the address.
    pub class: ClassKey,
    /// How long new connections may start from now on; zero for an expired fact that still carries live flows.
    pub ttl: Duration,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_diff_applied_gives_the_new_state() {
        let mut a = NodeState::default();
        a.set(Entry::Node("n1".into(), Node { addresses: vec![] }));
        a.set(Entry::Scope(ScopeKey(1), Scope { owner: "g".into(), epoch: 1, pair: 0, standbys: vec![] }));
        let mut b = a.clone();
        b.delete(&EntryKey::Node("n1".into()));
        b.set(Entry::Scope(ScopeKey(1), Scope { owner: "h".into(), epoch: 2, pair: 0, standbys: vec![] }));
        b.set(Entry::Grant(GroupKey(1), ClassKey(2), PortSet::default()));
        let (set, gone) = a.diff(&b);
        assert_eq!((set.len(), gone.len()), (2, 1));
        for e in set {
            a.set(e);
        }
        for k in &gone {
            a.delete(k);
        }
        assert_eq!(a, b);
    }
}
