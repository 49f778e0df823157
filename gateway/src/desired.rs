//! From compiled policy to what machines should hold: which scopes are ours, by
//! which pair they leave, and what each node and our own kernel get. Pure but
//! for the memory of pair indices.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use tidegate_ebpf::Local;
use tidegate_policy::model::{AddressSource, Node, Objects, Pair};
use tidegate_policy::state::{self, NodeState};
use tidegate_policy::world::{NodeStateParts, Scope, World};
use tidegate_policy::{ClassKey, GroupKey, PortSet, ScopeKey};

use crate::config::Config;
use crate::egress::nft::HeldPair;

/// One compile with what the kernel needs beside policy.
pub struct Compiled {
    /// The policy.
    pub world: Arc<World>,
    /// The cluster's nodes.
    pub nodes: BTreeMap<String, Node>,
    /// Every egress address of every pool: never a relay's destination.
    pub egress: BTreeSet<IpAddr>,
}

impl Compiled {
    /// Puts a compile beside the objects that it came from.
    pub fn new(world: Arc<World>, objects: &Objects) -> Self {
        let pairs = objects.pools.values().flat_map(|p| match &p.source {
            AddressSource::Static { pairs, .. } => pairs.as_slice(),
            AddressSource::PodNetwork => &[],
        });
        let egress = pairs.flat_map(|p| [p.ipv4.map(IpAddr::from), p.ipv6.map(IpAddr::from)]).flatten().collect();
        Self { world, nodes: objects.nodes.clone(), egress }
    }
}

/// Whose state is asked for.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// This gateway's own kernel.
    Own,
    /// A node's.
    Node(&'a str),
}

/// How a scope leaves, at this gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WayOut {
    /// Index in the mark: 0 is PodNetwork.
    pub index: u8,
    /// The pair, if it is not PodNetwork.
    pub pair: Option<Pair>,
}

type PairKey = (String, Option<std::net::Ipv4Addr>, Option<std::net::Ipv6Addr>);

/// Builds desired states.
pub struct Desired {
    config: Arc<Config>,
    /// Indices of pairs; an index is never given to another pair while the process lives, so that
    /// a mark that is still on its way never means another address.
    indices: Mutex<BTreeMap<PairKey, u8>>,
}

impl Desired {
    /// For this configuration.
    pub fn new(config: Arc<Config>) -> Self {
        Self { config, indices: Mutex::default() }
    }

    fn index(&self, pool: &str, pair: &Pair) -> Option<u8> {
        let key = (pool.to_owned(), pair.ipv4, pair.ipv6);
        let mut indices = self.indices.lock();
        if let Some(i) = indices.get(&key) {
            return Some(*i);
        }
        let next = u8::try_from(indices.len() + 1).ok();
        match next {
            Some(i) => drop(indices.insert(key, i)),
            None => tracing::error!(
                pool,
                "more than 255 egress pairs since the start: restart this gateway to use new ones"
            ),
        }
        next
    }

    /// The gateway that owns a scope; absent where every pair of its pool drains.
    fn owner(&self, scope: &Scope) -> Option<&str> {
        let (v4, v6) = match (scope.source(), scope.pair()) {
            (AddressSource::PodNetwork, _) => (None, None),
            (_, Some(p)) => (p.ipv4, p.ipv6),
            (_, None) => return None,
        };
        self.config.owner(scope.pool(), v4, v6).map(|g| g.name.as_str())
    }

    /// How a scope leaves, if this gateway owns it.
    pub fn way_out(&self, scope: &Scope) -> Option<WayOut> {
        if self.owner(scope)? != self.config.name {
            return None;
        }
        match scope.pair() {
            None => Some(WayOut { index: 0, pair: None }),
            Some(pair) => Some(WayOut { index: self.index(scope.pool(), &pair)?, pair: Some(pair) }),
        }
    }

    /// The pairs that this gateway holds: of every scope that it owns, sorted by index.
    pub fn held(&self, world: &World) -> Vec<HeldPair> {
        let ways = world.scopes().values().filter_map(|s| self.way_out(s));
        let pairs = ways.filter_map(|w| w.pair.map(|p| HeldPair { index: w.index, ipv4: p.ipv4, ipv6: p.ipv6 }));
        pairs.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// The grants of a class for the groups of its scope that `want` names.
    pub fn grants(
        &self,
        world: &World,
        scope: ScopeKey,
        class: ClassKey,
        want: impl Fn(GroupKey) -> bool,
    ) -> Vec<(GroupKey, PortSet)> {
        let groups = world.groups().iter().filter(|g| g.scope().key() == scope && want(g.key()));
        groups.filter_map(|g| Some((g.key(), g.grant(class)?))).collect()
    }

    /// Everything that follows from policy, with the grants of these classes; to be cut by [`Desired::state`].
    pub fn parts(&self, world: &World, active: impl IntoIterator<Item = (ScopeKey, ClassKey)>) -> NodeStateParts {
        world.node_state_parts(active)
    }

    /// What one machine should hold of the scopes that this gateway owns.
    pub fn state(&self, compiled: &Compiled, parts: &NodeStateParts, target: Target<'_>) -> NodeState {
        let config = &self.config;
        let mut out = NodeState::default();
        let mut prefixes: BTreeSet<_> = config.cluster.prefixes.iter().map(ipnet::IpNet::trunc).collect();
        prefixes.extend(compiled.nodes.values().flat_map(|n| &n.pod_prefixes).map(ipnet::IpNet::trunc));
        out.cluster = state::Cluster {
            prefixes: prefixes.into_iter().collect(),
            node_ports: Some((config.cluster.node_ports.first, config.cluster.node_ports.last)),
            dns: config.cluster.dns.clone(),
            ping: config.ping,
        };
        for (name, n) in &compiled.nodes {
            out.nodes.insert(name.clone(), state::Node { addresses: n.addresses.clone() });
        }
        for g in &config.gateways {
            out.gateways.insert(g.name.clone(), state::Gateway { node: g.node.clone() });
        }
        let mut owned = BTreeMap::new();
        for (key, scope) in compiled.world.scopes() {
            if let Some(way) = self.way_out(scope) {
                owned.insert(*key, way);
            }
        }
        // A node needs its own endpoints, untouched ones too; where this gateway runs, and in its own
        // kernel, every endpoint whose packets it takes.
        let (everything, here) = match target {
            Target::Own => (true, None),
            Target::Node(n) => (n == config.node, Some(n)),
        };
        for (ip, e) in &parts.endpoints {
            let ours = e.member.is_some_and(|(s, _)| owned.contains_key(&s));
            let local = here == Some(e.node.as_str());
            // Members of other gateways' scopes come from their owners.
            if local && e.member.is_none() || ours && (local || everything) {
                out.endpoints.insert(*ip, e.clone());
            }
        }
        let scopes: BTreeSet<ScopeKey> = out.endpoints.values().filter_map(|e| Some(e.member?.0)).collect();
        let groups: BTreeSet<GroupKey> = out.endpoints.values().filter_map(|e| Some(e.member?.1)).collect();
        for key in scopes {
            if let Some(way) = owned.get(&key) {
                let scope = state::Scope { owner: config.name.clone(), epoch: 1, pair: way.index, standbys: Vec::new() };
                out.scopes.insert(key, scope);
            }
        }
        for key in groups {
            let Some(group) = parts.groups.get(&key) else { continue };
            for set in [group.admin, group.own].into_iter().flatten() {
                if let Some(p) = parts.prefixes.get(&set) {
                    out.prefixes.insert(set, p.as_ref().clone());
                }
            }
            out.groups.insert(key, group.clone());
        }
        let grants = parts.grants.iter().filter(|((g, _), _)| out.groups.contains_key(g));
        out.grants = grants.map(|(k, v)| (*k, v.clone())).collect();
        out
    }

    /// What only this machine knows: a gateway has nothing of a node's.
    pub fn local(&self) -> Local {
        Local { node: self.config.node.clone(), ..Local::default() }
    }
}
