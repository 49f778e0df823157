//! From compiled policy to what machines should hold: which scopes are ours, by
//! which pair they leave, and what each node and our own kernel get. Pure but
//! for the memory of pair indices.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use ipnet::IpNet;
use parking_lot::Mutex;
use tidegate_ebpf::Local;
use tidegate_policy::model::{self, AddressSource, Labels, Node, Objects, Selector, Touched};
use tidegate_policy::state::{self, NodeState};
use tidegate_policy::world::{NodeStateParts, Scope, Sight, World};
use tidegate_policy::{ClassKey, GroupKey, PortSet, ScopeKey};
use tidegate_proto::{MAX_GATEWAY_ADDRESSES, Pair};

use crate::config::Config;
use crate::egress::nft::HeldPair;
use crate::members::{self, Members};

/// One compile with what the kernel needs beside policy.
pub struct Compiled {
    /// Rises with every compile, from 1; 0 before the first.
    pub number: u64,
    /// The policy.
    pub world: Arc<World>,
    /// The cluster's nodes.
    pub nodes: Arc<BTreeMap<String, Node>>,
    /// In-cluster ranges beside those of the nodes.
    pub prefixes: Vec<IpNet>,
    /// Where the cluster's DNS is.
    pub dns: Vec<SocketAddr>,
    /// Every egress address of every pool: never a relay's destination.
    pub egress: Arc<BTreeSet<IpAddr>>,
    /// The nodes whose gateways may hold a pool, of those that choose.
    gateway_nodes: Arc<BTreeMap<String, Selector>>,
}

impl Compiled {
    /// Puts a compile beside the objects that it came from.
    pub fn new(world: Arc<World>, objects: &Objects, number: u64) -> Self {
        let pairs = objects.pools.values().flat_map(|p| match &p.source {
            AddressSource::Static { pairs, .. } => pairs.as_slice(),
            AddressSource::PodNetwork => &[],
        });
        let egress = pairs.flat_map(|p| [p.ipv4.map(IpAddr::from), p.ipv6.map(IpAddr::from)]).flatten().collect();
        // Here, so that the core need not.
        world.scopes().values().for_each(|s| s.prepare());
        let (prefixes, dns) = (objects.settings.cluster_prefixes.clone(), objects.settings.cluster_dns.clone());
        let chosen = |(name, p): (&String, &model::Pool)| Some((name.clone(), p.gateway_nodes.clone()?));
        let gateway_nodes = Arc::new(objects.pools.iter().filter_map(chosen).collect());
        let (nodes, egress) = (Arc::new(objects.nodes.clone()), Arc::new(egress));
        Self { number, world, nodes, prefixes, dns, egress, gateway_nodes }
    }

    /// As [`Compiled::new`], but at the cost of what was touched since this one.
    pub fn next(&self, world: Arc<World>, objects: &Objects, touched: &Touched) -> Self {
        if touched.all {
            return Self::new(world, objects, self.number + 1);
        }
        world.scopes().compare(self.world.scopes(), |_, _, new| new.into_iter().for_each(|s| s.prepare()));
        Self {
            number: self.number + 1,
            world,
            nodes: if touched.nodes { Arc::new(objects.nodes.clone()) } else { self.nodes.clone() },
            prefixes: self.prefixes.clone(),
            dns: self.dns.clone(),
            egress: self.egress.clone(),
            gateway_nodes: self.gateway_nodes.clone(),
        }
    }

    /// Whether gateways of a node may hold the pool.
    pub fn takes(&self, pool: &str, node: &str) -> bool {
        let labels = self.nodes.get(node).map(|n| &n.labels);
        self.gateway_nodes.get(pool).is_none_or(|s| s.matches(labels.unwrap_or(&Labels::default())))
    }

    /// What a class grants to each group of its scope.
    pub fn grants(&self, scope: ScopeKey, class: ClassKey) -> Vec<(GroupKey, PortSet)> {
        self.world.groups_of(scope).filter_map(|g| Some((g.key(), g.grant(class)?))).collect()
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
    pub pair: Option<model::Pair>,
}

type PairKey = (String, Option<std::net::Ipv4Addr>, Option<std::net::Ipv6Addr>);

/// What this gateway knows of a pair's ownership.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ownership {
    /// The owner.
    pub owner: String,
    /// Its epoch.
    pub epoch: u64,
    /// Whether that is this gateway, and it serves the pair.
    pub held: bool,
    /// Who answers DNS while the owner is silent, in this order.
    pub standbys: Vec<String>,
}

/// The gateways in the order in which a pair falls to them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// Those that may hold it.
    pub candidates: Vec<String>,
    /// The others, which can still answer names for it.
    pub others: Vec<String>,
}

/// Builds desired states.
pub struct Desired {
    config: Arc<Config>,
    members: ArcSwap<Members>,
    claims: ArcSwap<BTreeMap<Pair, Ownership>>,
    /// What of it nodes are told.
    said: ArcSwap<BTreeMap<Pair, Ownership>>,
    /// Indices of pairs; an index is never given to another pair while the process lives, so that
    /// a mark that is still on its way never means another address.
    indices: Mutex<BTreeMap<PairKey, u8>>,
}

impl Desired {
    /// For this configuration.
    pub fn new(config: Arc<Config>) -> Self {
        let members = ArcSwap::from_pointee(Members { listed: members::configured(&config), lingering: Vec::new() });
        Self { config, members, claims: ArcSwap::default(), said: ArcSwap::default(), indices: Mutex::default() }
    }

    /// How often the kernel's maps are compared with what should be there.
    pub fn full_pass(&self) -> Duration {
        Duration::from_secs(self.config.full_pass_seconds)
    }

    fn index(&self, pool: &str, pair: &model::Pair) -> Option<u8> {
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

    /// Who the gateways are from now on.
    pub fn set_members(&self, members: Members) {
        self.members.store(Arc::new(members));
    }

    /// Who the gateways are.
    pub fn members(&self) -> Arc<Members> {
        self.members.load_full()
    }

    /// What is known of ownership.
    pub fn claims(&self) -> Arc<BTreeMap<Pair, Ownership>> {
        self.claims.load_full()
    }

    /// What the core decided of ownership. While what this gateway takes is not in place, nodes go on hearing what they were `told` of
    /// it. What it loses they hear at once: its node's agent goes by its word, and would let go what else it holds.
    pub fn set_claims(&self, claims: BTreeMap<Pair, Ownership>, told: Option<&BTreeMap<Pair, Ownership>>) {
        let claims = Arc::new(claims);
        let was = |(pair, now): (&Pair, &Ownership)| {
            let said = told.filter(|_| now.held).and_then(|told| told.get(pair)).unwrap_or(now);
            (pair.clone(), said.clone())
        };
        let said = if told.is_some() { Arc::new(claims.iter().map(was).collect()) } else { claims.clone() };
        self.claims.store(claims);
        self.said.store(said);
    }

    /// Nodes are told all of it from now on.
    pub fn tell_all(&self) {
        self.said.store(self.claims.load_full());
    }

    /// What nodes are told of ownership.
    pub fn said(&self) -> Arc<BTreeMap<Pair, Ownership>> {
        self.said.load_full()
    }

    /// The pair of a scope, as gateways name it; absent where every pair of its pool drains.
    pub fn pair(scope: &Scope) -> Option<Pair> {
        let (ipv4, ipv6) = match (scope.source(), scope.pair()) {
            (AddressSource::PodNetwork, _) => (None, None),
            (_, Some(p)) => (p.ipv4, p.ipv6),
            (_, None) => return None,
        };
        Some(Pair { pool: scope.pool().to_string(), ipv4, ipv6 })
    }

    /// The pairs of pools of which one drains, and whether it is that one. All of them have an owner, also without a scope: with
    /// one that drains flows may live that scopes have left behind, and scopes leave it only for one at the same gateway.
    fn beside_drains(world: &World) -> BTreeMap<Pair, model::Pair> {
        let (mut out, mut seen) = (BTreeMap::new(), BTreeSet::new());
        for (scope, _) in world.ways() {
            let AddressSource::Static { pairs, .. } = scope.source() else { continue };
            // Thousands of scopes may share a pool.
            if pairs.iter().any(|p| p.draining) && seen.insert(scope.pool()) {
                let named = |p: &model::Pair| Pair { pool: scope.pool().to_string(), ipv4: p.ipv4, ipv6: p.ipv6 };
                out.extend(pairs.iter().map(|p| (named(p), *p)));
            }
        }
        out
    }

    /// Every pair that needs an owner now, with those of the gateways that may hold it, in order, and all of them. One that
    /// nobody holds goes where another one of its pool drains: its scopes can follow.
    pub fn pairs(&self, compiled: &Compiled) -> BTreeMap<Pair, Order> {
        let (members, owners, claims) = (self.members.load(), &self.config.owners, self.claims.load());
        let beside = Self::beside_drains(&compiled.world);
        let mut pairs: BTreeSet<Pair> = compiled.world.ways().filter_map(|(s, _)| Self::pair(s)).collect();
        pairs.extend(beside.keys().cloned());
        let drains = beside.iter().filter(|(_, p)| p.draining);
        let from: BTreeSet<(&str, &str)> =
            drains.filter_map(|(p, _)| Some((p.pool.as_str(), claims.get(p)?.owner.as_str()))).collect();
        let order = |pair: Pair| {
            let drains = beside.get(&pair).is_some_and(|p| p.draining);
            let near = |gateway: &str| !drains && from.contains(&(pair.pool.as_str(), gateway));
            let all = members::order(&members.listed, owners, &pair, near);
            let candidates = members::candidates(&all, owners, &pair, |node| compiled.takes(&pair.pool, node));
            let reachable = all.iter().filter(|m| !m.addresses.is_empty());
            let others = reachable.map(|m| m.name.clone()).filter(|n| !candidates.contains(n)).collect();
            (pair, Order { candidates, others })
        };
        pairs.into_iter().map(order).collect()
    }

    /// How a scope leaves, if this gateway owns it.
    pub fn way_out(&self, scope: &Scope) -> Option<WayOut> {
        if !self.claims.load().get(&Self::pair(scope)?)?.held {
            return None;
        }
        match scope.pair() {
            None => Some(WayOut { index: 0, pair: None }),
            Some(pair) => Some(WayOut { index: self.index(scope.pool(), &pair)?, pair: Some(pair) }),
        }
    }

    /// The pairs that this gateway holds, those of scopes and those beside one that drains, sorted by index.
    pub fn held(&self, world: &World) -> Vec<HeldPair> {
        let ways = world.ways().filter_map(|(s, _)| self.way_out(s));
        let used = ways.filter_map(|w| Some((w.index, w.pair?)));
        let (claims, beside) = (self.claims.load(), Self::beside_drains(world));
        let beside = beside.iter().filter(|(p, _)| claims.get(*p).is_some_and(|c| c.held));
        let beside = beside.filter_map(|(named, p)| Some((self.index(&named.pool, p)?, *p)));
        let pairs = used.chain(beside).map(|(index, p)| HeldPair { index, ipv4: p.ipv4, ipv6: p.ipv6 });
        pairs.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// A node needs its own endpoints, untouched ones too; where a gateway runs, and in our own kernel, every endpoint
    /// whose packets it may have to take. Every gateway tells all of them: nodes follow the owner's word where there is
    /// one, and a pod is never without its policy while ownership moves.
    pub fn sight<'t>(&self, target: Target<'t>) -> Sight<'t> {
        match target {
            Target::Own => Sight { everything: true, here: None },
            Target::Node(n) => Sight { everything: self.members.load().all().any(|g| g.node == n), here: Some(n) },
        }
    }

    /// What one machine should hold, at the cost of that. `live` says which classes the facts of a scope have.
    pub fn state<C: IntoIterator<Item = ClassKey>>(
        &self,
        compiled: &Compiled,
        target: Target<'_>,
        live: impl Fn(ScopeKey) -> C,
    ) -> NodeState {
        let NodeStateParts { endpoints, groups, prefixes, grants, .. } = compiled.world.parts(self.sight(target), live);
        let mut out = self.frame(compiled);
        if matches!(target, Target::Node(_)) {
            out.namespaces = compiled.world.strictest().clone();
            out.names = compiled.world.names().clone();
        }
        let claims = if matches!(target, Target::Node(_)) { self.said() } else { self.claims() };
        let scopes: BTreeSet<ScopeKey> = endpoints.values().filter_map(|e| Some(e.member?.0)).collect();
        let members: BTreeSet<(ScopeKey, GroupKey)> = endpoints.values().filter_map(|e| e.member).collect();
        out.endpoints = endpoints;
        // What our own kernel may carry out: of other gateways' scopes it takes only DNS.
        let mut carries = BTreeSet::new();
        for key in scopes {
            let Some(scope) = compiled.world.scope(key) else { continue };
            let way = self.way_out(scope);
            if way.is_some() || matches!(target, Target::Node(_)) {
                carries.insert(key);
            }
            let Some(claim) = Self::pair(scope).and_then(|p| claims.get(&p)) else { continue };
            let value = state::Scope {
                owner: claim.owner.clone(),
                epoch: claim.epoch,
                pair: way.map_or(u8::from(scope.pair().is_some()), |w| w.index),
                standbys: claim.standbys.clone(),
            };
            out.scopes.insert(key, value);
        }
        let mut granted = BTreeSet::new();
        for (scope, key) in members {
            let Some(mut group) = groups.get(&key).cloned() else { continue };
            if carries.contains(&scope) {
                granted.insert(key);
            } else {
                (group.admin, group.own) = (None, None);
            }
            for set in [group.admin, group.own].into_iter().flatten() {
                if let Some(p) = prefixes.get(&set) {
                    out.prefixes.insert(set, p.as_ref().clone());
                }
            }
            out.groups.insert(key, group);
        }
        out.grants = grants.into_iter().filter(|((g, _), _)| granted.contains(g)).collect();
        out
    }

    /// What all machines hold alike.
    pub fn frame(&self, compiled: &Compiled) -> NodeState {
        let config = &self.config;
        let mut out = NodeState::default();
        let mut prefixes: BTreeSet<_> = compiled.prefixes.iter().map(IpNet::trunc).collect();
        prefixes.extend(compiled.nodes.values().flat_map(|n| &n.pod_prefixes).map(IpNet::trunc));
        out.cluster = state::Cluster {
            prefixes: prefixes.into_iter().collect(),
            node_ports: Some((config.cluster.node_ports.first, config.cluster.node_ports.last)),
            dns: compiled.dns.clone(),
            ping: config.ping,
            suffixes: config.cluster.suffixes.iter().filter(|s| !s.ends_with(".arpa")).cloned().collect(),
        };
        for (name, n) in compiled.nodes.iter() {
            out.nodes.insert(name.clone(), state::Node { addresses: n.addresses.clone() });
        }
        let members = self.members.load();
        // To those that were, nobody is led: somebody else may have their addresses.
        let gateways = members.listed.iter().map(|g| (g, g.addresses.as_slice()));
        for (g, control) in gateways.chain(members.lingering.iter().map(|g| (g, [].as_slice()))) {
            let gateway = state::Gateway {
                node: g.node.clone(),
                control: control.iter().copied().take(MAX_GATEWAY_ADDRESSES).collect(),
            };
            out.gateways.insert(g.name.clone(), gateway);
        }
        out
    }

    /// What only this machine knows: a gateway has nothing of a node's.
    pub fn local(&self) -> Local {
        Local { node: self.config.node.clone(), ..Local::default() }
    }
}

#[cfg(test)]
#[path = "desired_tests.rs"]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests;
