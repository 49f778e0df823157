//! The objects of an API server, kept up by its events. Pure: no API server is needed to use it.
//!
//! Events of one feed come in order, those of different feeds do not wait for each other. Every object is read by
//! itself: one that is bad is quarantined with its problem, its last good version stays, and the others go on. What
//! holds is always one value, [`Index::objects`], which is changed in place; what of it changed is collected until it is
//! asked for, so that a flood of events is one compile. Two indexes that were given the same objects in any order are
//! equal.

mod cluster;
mod ending;
mod json;
mod names;
mod nodes;
mod started;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use serde_json::Value;
use tidegate_policy::Name;
use tidegate_policy::model::{Node, Objects, Pair, Settings, Touched};
use tidegate_policy::state::Named;

use self::cluster::Cluster;
use self::ending::Endings;
use self::nodes::Claims;
pub use self::started::Started;
use self::started::Starts;
use crate::manifest::{self, Object};
use crate::problem::{Code, FieldPath, FieldProblem, Severity};
use crate::resource::{API_VERSION, GROUP};

/// The name of the one `NamespaceEgress` of a namespace.
pub const NAMESPACE_EGRESS: &str = "tidegate";

/// A list of objects that is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Feed {
    /// Every namespace.
    Namespaces,
    /// Every pod.
    Pods,
    /// Every node.
    Nodes,
    /// `networking.k8s.io/v1` ServiceCIDRs: where Services have their addresses.
    ServiceCidrs,
    /// The EndpointSlices of `default/kubernetes`: the API servers.
    ApiEndpoints,
    /// The Service of the cluster's DNS.
    DnsService,
    /// Its EndpointSlices.
    DnsEndpoints,
    /// Every Service: its name, and where one of the type ExternalName leads.
    Services,
    /// Pools.
    EgressPools,
    /// Cluster policies.
    ClusterEgressPolicies,
    /// Namespaced policies.
    EgressPolicies,
    /// What Tidegate has assigned to namespaces.
    NamespaceEgresses,
}

impl Feed {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Namespaces,
        Self::Pods,
        Self::Nodes,
        Self::ServiceCidrs,
        Self::ApiEndpoints,
        Self::DnsService,
        Self::DnsEndpoints,
        Self::Services,
        Self::EgressPools,
        Self::ClusterEgressPolicies,
        Self::EgressPolicies,
        Self::NamespaceEgresses,
    ];

    /// The API version and kind of its objects. Items of a list do not say them.
    pub const fn kind(self) -> (&'static str, &'static str) {
        match self {
            Self::Namespaces => ("v1", "Namespace"),
            Self::Pods => ("v1", "Pod"),
            Self::Nodes => ("v1", "Node"),
            Self::ServiceCidrs => ("networking.k8s.io/v1", "ServiceCIDR"),
            Self::ApiEndpoints | Self::DnsEndpoints => ("discovery.k8s.io/v1", "EndpointSlice"),
            Self::DnsService | Self::Services => ("v1", "Service"),
            Self::EgressPools => (API_VERSION, "EgressPool"),
            Self::ClusterEgressPolicies => (API_VERSION, "ClusterEgressPolicy"),
            Self::EgressPolicies => (API_VERSION, "EgressPolicy"),
            Self::NamespaceEgresses => (API_VERSION, "NamespaceEgress"),
        }
    }

    /// Its name in lower case, for logs, metrics and other gateways.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Namespaces => "namespaces",
            Self::Pods => "pods",
            Self::Nodes => "nodes",
            Self::ServiceCidrs => "servicecidrs",
            Self::ApiEndpoints => "apiendpoints",
            Self::DnsService => "dnsservice",
            Self::DnsEndpoints => "dnsendpoints",
            Self::Services => "services",
            Self::EgressPools => "egresspools",
            Self::ClusterEgressPolicies => "clusteregresspolicies",
            Self::EgressPolicies => "egresspolicies",
            Self::NamespaceEgresses => "namespaceegresses",
        }
    }

    /// Whether its objects are Tidegate's own: those are read strictly.
    pub fn is_ours(self) -> bool {
        self.kind().0.split_once('/').is_some_and(|(group, _)| group == GROUP)
    }
}

/// An object's namespace, empty for cluster-scoped kinds, and name.
pub type Key = (String, String);

/// Targets of ExternalName Services by the Service's (namespace, name).
pub type ExternalNames = BTreeMap<Key, Name>;

/// What is known of an object beside what it says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Its UID.
    pub uid: String,
    /// Its generation, of kinds that count them; else 0.
    pub generation: i64,
    /// The resourceVersion that was seen last.
    pub resource_version: String,
    /// Whether that version is the one that holds.
    pub good: bool,
    /// Whether some version of it holds: when it is not good, the last good one. Of a policy of which no good version is
    /// known only what is strict: it isolates, it denies what it says, its ceiling holds nothing.
    pub held: bool,
    /// What is wrong with it, or noteworthy.
    pub problems: Vec<FieldProblem>,
}

/// Everything that holds. See the module.
#[derive(Debug)]
pub struct Index {
    /// What the configuration says.
    base: Settings,
    objects: Objects,
    records: BTreeMap<Feed, BTreeMap<Key, Record>>,
    cluster: Cluster,
    external: Arc<ExternalNames>,
    waiting: names::Waiting,
    nodes: Claims,
    contested: BTreeMap<String, Vec<String>>,
    /// The pairs that each namespace was assigned.
    assigned: BTreeMap<String, Vec<(String, Pair)>>,
    endings: Endings,
    starts: Starts,
    touched: Touched,
    /// Counts the changes of what holds.
    changes: u64,
    /// Counts the changes of what [`Index::records`] says, resourceVersions aside.
    noted: u64,
    /// Where those changes were.
    noted_in: Touched,
}

impl Index {
    /// An index without objects. `settings` are what the configuration says; what the API server says is added.
    pub fn new(settings: Settings) -> Self {
        let objects = Objects { settings: settings.clone(), ..Objects::default() };
        Self {
            base: settings,
            objects,
            records: BTreeMap::new(),
            cluster: Cluster::default(),
            external: Arc::default(),
            waiting: names::Waiting::default(),
            nodes: Claims::default(),
            contested: BTreeMap::new(),
            assigned: BTreeMap::new(),
            endings: Endings::default(),
            starts: Starts::default(),
            touched: Touched::default(),
            changes: 0,
            noted: 0,
            noted_in: Touched::default(),
        }
    }

    /// All objects that hold now.
    pub fn objects(&self) -> &Objects {
        &self.objects
    }

    /// What changed since this was last asked for.
    pub fn take_touched(&mut self) -> Touched {
        std::mem::take(&mut self.touched)
    }

    /// Whether something changed since [`Index::take_touched`].
    pub fn is_touched(&self) -> bool {
        self.touched != Touched::default()
    }

    /// A number that changes when anything does that decides something: heartbeats and statuses do not.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// A number that changes when a record does in more than its resourceVersion.
    pub fn noted(&self) -> u64 {
        self.noted
    }

    /// Where records of policies, pools and namespaces changed, resourceVersions aside, since this was last asked for.
    pub fn take_noted(&mut self) -> Touched {
        std::mem::take(&mut self.noted_in)
    }

    fn note(&mut self, feed: Feed, key: &Key) {
        self.noted += 1;
        match feed {
            Feed::Namespaces => drop(self.noted_in.namespaces.insert(key.1.clone())),
            Feed::EgressPolicies => drop(self.noted_in.namespaces.insert(key.0.clone())),
            Feed::EgressPools => self.noted_in.all = true,
            Feed::ClusterEgressPolicies => drop(self.noted_in.cluster_policies.insert(key.1.clone())),
            _ => {}
        }
    }

    /// The objects of a feed in a namespace, by name.
    pub fn records_in<'a>(&'a self, feed: Feed, namespace: &'a str) -> impl Iterator<Item = (&'a str, &'a Record)> {
        let from = (namespace.to_owned(), String::new());
        let all = self.records.get(&feed).into_iter().flat_map(move |r| r.range(from.clone()..));
        all.take_while(move |((ns, _), _)| ns == namespace).map(|((_, name), r)| (name.as_str(), r))
    }

    /// Every object of a feed.
    pub fn records(&self, feed: Feed) -> impl Iterator<Item = (&Key, &Record)> {
        self.records.get(&feed).into_iter().flatten()
    }

    /// One object of a feed.
    pub fn record(&self, feed: Feed, namespace: &str, name: &str) -> Option<&Record> {
        self.records.get(&feed)?.get(&(namespace.to_owned(), name.to_owned()))
    }

    /// Where the cluster's DNS is asked, the best first: what the configuration says, the endpoints that are ready,
    /// else the addresses of its Service.
    pub fn dns_servers(&self) -> Vec<SocketAddr> {
        self.cluster.servers(&self.base.cluster_dns)
    }

    /// Where ExternalName Services lead to. The same value as long as nothing changed.
    pub fn external_names(&self) -> &Arc<ExternalNames> {
        &self.external
    }

    /// Takes an object as it is now, new or changed.
    pub fn apply(&mut self, feed: Feed, object: &Value) {
        let Some(key) = key(object) else { return };
        let meta = &object["metadata"];
        let text = |field: &str| meta[field].as_str().unwrap_or_default().to_owned();
        let (uid, version) = (text("uid"), text("resourceVersion"));
        let generation = meta["generation"].as_i64().unwrap_or_default();
        if feed == Feed::Nodes {
            self.nodes.created(&key.1, text("creationTimestamp"));
        }
        let mut before = self.records.get(&feed).and_then(|r| r.get(&key)).map(|r| r.uid == uid);
        if before == Some(false) {
            // Another object of the same name: nothing of the old one stays.
            before = None;
            self.records.entry(feed).or_default().remove(&key);
            self.hold(feed, &key, None);
        }
        let Found { mut read, closed, mut problems } = read(feed, object);
        let good = read.is_some();
        let held = good || self.record(feed, &key.0, &key.1).is_some_and(|r| r.held);
        if feed == Feed::Namespaces {
            let value = match read {
                Some(Read::Object(Object::Namespace(v))) => Some(v),
                _ => None,
            };
            let (value, problem) = self.namespace_seen(&key.1, object, before.is_none(), value);
            read = value.map(|v| Read::Object(Object::Namespace(v)));
            problems.extend(problem);
        }
        if let (Feed::Pods, Some(Read::Object(Object::Pod(pod)))) = (feed, &mut read) {
            self.starts.seen(&key, &uid, object, pod);
        }
        if feed == Feed::Services
            && !good
            && self.waiting.set(&mut self.objects.names, &names::service(&key), Some(Named::Outside))
        {
            // It may lead anywhere.
            self.changes += 1;
            self.touched.names = true;
        }
        let is_policy = matches!(feed, Feed::EgressPolicies | Feed::ClusterEgressPolicies);
        let value = match read {
            Some(value) => Some(Some(value)),
            None if is_policy && !held => Some(closed.map(Read::Object)),
            None => None,
        };
        if let Some(value) = value {
            let policy = match &value {
                Some(Read::Object(Object::Policy(p))) => Some(p),
                _ => None,
            };
            if feed != Feed::EgressPolicies || self.policy_seen(&key, policy) {
                self.hold(feed, &key, value);
            }
        }
        let records = self.records.entry(feed).or_default();
        let record = Record { uid, generation, resource_version: version, good, held, problems };
        match records.get_mut(&key) {
            Some(old) => {
                old.resource_version.clone_from(&record.resource_version);
                if *old != record {
                    *old = record;
                    self.note(feed, &key);
                }
            }
            None => {
                records.insert(key.clone(), record);
                self.note(feed, &key);
            }
        }
    }

    /// An object is gone.
    pub fn delete(&mut self, feed: Feed, object: &Value) {
        if let Some(key) = key(object) {
            self.remove(feed, &key, ending::version(object));
        }
    }

    /// A list of the feed has come in whole, and these were in it: all others are gone.
    pub fn restarted(&mut self, feed: Feed, seen: &BTreeSet<Key>) {
        let gone: Vec<Key> = self.records(feed).map(|(k, _)| k).filter(|k| !seen.contains(*k)).cloned().collect();
        for key in gone {
            self.remove(feed, &key, None);
        }
    }

    /// An object is gone, at a version if that is known.
    fn remove(&mut self, feed: Feed, key: &Key, version: Option<u64>) {
        if self.records.get_mut(&feed).is_none_or(|r| r.remove(key).is_none()) {
            return;
        }
        self.note(feed, key);
        match feed {
            Feed::EgressPolicies => self.policy_gone(key, version),
            Feed::Namespaces => self.namespace_gone(&key.1),
            Feed::Pods => {
                self.starts.gone(key);
                self.hold(feed, key, None);
                self.pod_gone(&key.0);
            }
            _ => self.hold(feed, key, None),
        }
    }

    /// Puts a value in place, or takes it away, and touches what that changes.
    fn hold(&mut self, feed: Feed, key: &Key, value: Option<Read>) {
        let o = &mut self.objects;
        let name = &key.1;
        let changed = match value {
            Some(Read::Object(Object::Namespace(v))) => set(&mut o.namespaces, name, v),
            Some(Read::Object(Object::Pod(v))) => set(&mut o.pods, key, v),
            Some(Read::Object(Object::Node(v))) => self.node(name, Some(v)),
            Some(Read::Object(Object::Pool(v))) => set(&mut o.pools, name, v),
            Some(Read::Object(Object::ClusterPolicy(v))) => set(&mut o.cluster_policies, name, v),
            Some(Read::Object(Object::Policy(v))) => set(&mut o.policies, key, v),
            Some(Read::Cluster(part)) => self.cluster.set(feed, key, Some(part)),
            Some(Read::Service(target)) => self.service(key, Some(target)),
            Some(Read::Assigned(pairs)) => *name == NAMESPACE_EGRESS && self.assign(&key.0, pairs),
            None => match feed {
                Feed::Namespaces => o.namespaces.remove(name).is_some(),
                Feed::Pods => o.pods.remove(key).is_some(),
                Feed::Nodes => self.node(name, None),
                Feed::EgressPools => o.pools.remove(name).is_some(),
                Feed::ClusterEgressPolicies => o.cluster_policies.remove(name).is_some(),
                Feed::EgressPolicies => o.policies.remove(key).is_some(),
                Feed::Services => self.service(key, None),
                Feed::NamespaceEgresses if *name == NAMESPACE_EGRESS => self.assign(&key.0, Vec::new()),
                Feed::NamespaceEgresses => false,
                Feed::ServiceCidrs | Feed::ApiEndpoints | Feed::DnsService | Feed::DnsEndpoints => {
                    self.cluster.set(feed, key, None)
                }
            },
        };
        if !changed {
            return;
        }
        self.changes += 1;
        let t = &mut self.touched;
        match feed {
            Feed::Namespaces => drop(t.namespaces.insert(name.clone())),
            Feed::Pods => drop(t.pods.insert(key.clone())),
            Feed::EgressPolicies | Feed::NamespaceEgresses => drop(t.namespaces.insert(key.0.clone())),
            Feed::Nodes => t.nodes = true,
            Feed::ClusterEgressPolicies => drop(t.cluster_policies.insert(name.clone())),
            Feed::EgressPools => t.all = true,
            Feed::ServiceCidrs | Feed::ApiEndpoints | Feed::DnsService | Feed::DnsEndpoints => self.settle(),
            // No rule depends on them: the DNS service asks for them, and nodes go by their names.
            Feed::Services => t.names = true,
        }
    }

    /// Takes what a node says of itself, or that it is gone, and settles whose addresses are whose. Says whether that node changed;
    /// others that did are touched.
    fn node(&mut self, name: &str, node: Option<Node>) -> bool {
        if !self.nodes.set(name, node) {
            return false;
        }
        let settled = self.nodes.settled();
        self.noted += u64::from(self.contested != settled.contested);
        self.contested = settled.contested;
        let mut changed = !settled.nodes.contains_key(name) && self.objects.nodes.remove(name).is_some();
        for (other, node) in settled.nodes {
            if set(&mut self.objects.nodes, &other, node) {
                changed |= other == name;
                self.touched.nodes |= other != name;
            }
        }
        changed
    }

    /// What nodes say of themselves and does not count, since others say it, too, by name.
    pub fn contested(&self) -> &BTreeMap<String, Vec<String>> {
        &self.contested
    }

    /// Brings the settings to what the cluster says.
    fn settle(&mut self) {
        let settings = self.cluster.settings(&self.base);
        if self.objects.settings != settings {
            self.objects.settings = settings;
            self.touched.all = true;
        }
    }

    /// Takes a Service with where it leads outside, if it does, or that it is gone. Says whether that decides something.
    fn service(&mut self, key: &Key, service: Option<Option<Name>>) -> bool {
        let named = service.as_ref().map(|target| if target.is_some() { Named::Outside } else { Named::Inside });
        // Of a Service inside nodes are told, and nothing is decided by it: a gateway that has not heard of it yet is not stale.
        self.touched.names |= self.waiting.set(&mut self.objects.names, &names::service(key), named);
        let target = service.flatten();
        if self.external.get(key) == target.as_ref() {
            return false;
        }
        let external = Arc::make_mut(&mut self.external);
        match target {
            Some(target) => drop(external.insert(key.clone(), target)),
            None => drop(external.remove(key)),
        }
        true
    }

    fn assign(&mut self, namespace: &str, pairs: Vec<(String, Pair)>) -> bool {
        let old = self.assigned.get(namespace);
        if old.map_or(pairs.is_empty(), |old| *old == pairs) {
            return false;
        }
        for (pool, _) in old.into_iter().flatten() {
            self.objects.assigned.remove(&(namespace.to_owned(), pool.clone()));
        }
        for (pool, pair) in &pairs {
            self.objects.assigned.insert((namespace.to_owned(), pool.clone()), *pair);
        }
        self.assigned.insert(namespace.to_owned(), pairs);
        self.assigned.retain(|_, pairs| !pairs.is_empty());
        true
    }
}

/// What an object came to.
enum Read {
    Object(Object),
    Cluster(cluster::Part),
    Service(Option<Name>),
    Assigned(Vec<(String, Pair)>),
}

/// What was found in an object.
struct Found {
    /// Absent where it is bad.
    read: Option<Read>,
    /// What holds of a bad one of which no good version is known.
    closed: Option<Object>,
    problems: Vec<FieldProblem>,
}

fn read(feed: Feed, object: &Value) -> Found {
    let part = match feed {
        Feed::ServiceCidrs | Feed::ApiEndpoints | Feed::DnsService | Feed::DnsEndpoints => {
            cluster::read(feed, object).map(Read::Cluster)
        }
        Feed::Services => cluster::external(object).map(Read::Service),
        Feed::NamespaceEgresses => cluster::assigned(object).map(Read::Assigned),
        _ => {
            let item = manifest::one(&json::tree(feed, object));
            let problem = |f: manifest::Found| FieldProblem {
                severity: f.severity,
                code: f.code,
                path: f.path,
                message: f.message,
            };
            let problems = item.found.into_iter().map(problem).collect();
            return Found { read: item.object.map(Read::Object), closed: item.closed, problems };
        }
    };
    match part {
        Ok(read) => Found { read: Some(read), closed: None, problems: Vec::new() },
        Err(message) => {
            let (severity, code, path) = (Severity::Error, Code::Invalid, FieldPath::default());
            Found { read: None, closed: None, problems: vec![FieldProblem { severity, code, path, message }] }
        }
    }
}

fn key(object: &Value) -> Option<Key> {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    let key = (text("namespace"), text("name"));
    (!key.1.is_empty()).then_some(key)
}

/// Sets an entry; says whether that changed anything.
fn set<K: Ord + Clone, V: PartialEq>(map: &mut BTreeMap<K, V>, key: &K, value: V) -> bool {
    let changed = map.get(key) != Some(&value);
    if changed {
        map.insert(key.clone(), value);
    }
    changed
}
