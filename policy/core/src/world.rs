//! The compiled policy of a whole cluster at one moment: immutable, cheap to read from any thread.
//!
//! ```text
//! let world = World::compile(&objects, now, previous.as_deref());    // parts that did not change are shared
//! world.next_change()                                → when to compile again although nothing was edited
//! world.endpoint(ip)                                 → who, touch, scope and group of a pod's address
//! world.group(index) / world.group_by_key(key)       → &Arc<Group>:
//!     group.name(name, qtype)                        → NameDecision: answer, reason, rule, facts of the name
//!     group.address(name, ip)                        → AddressDecision: privateAddresses, denied prefixes, in-cluster
//!     group.connection(Some(&bound), ip, proto, port)→ Decision: via, reason, rule, ech_allow, explanation
//!     group.connection_unbound(&sni, ip, …)          → the same for a name that is not bound to the address
//!     group.grant(class)                             → PortSet for (group, class)
//!     group.audit(), group.touch(), group.on_revoke()
//! world.scope(key)                                   → &Arc<Scope>:
//!     scope.class(ip, names)                         → ClassKey, registered for every later world
//!     scope.single_rule_classes()                    → classes whose grants are pushed ahead
//!     scope.pool(), scope.pair(), scope.families()
//! world.changed_scopes(&previous)                    → scopes whose facts have to be reclassified
//! world.node_state_parts(active)                     → what is pushed: endpoints, groups, prefixes, grants, scopes
//! world.retain_classes(&live)                        → forgets classes that no fact has
//! world.issues()                                     → refused, clipped, conflicted
//! ```
//!
//! Decisions say what enforcement does. In a group with [`Group::audit`] a deny is reported and passes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

pub use crate::class::Scope;
pub use crate::decide::Group;
pub use crate::decision::{AddressDecision, Answer, BuiltIn, Decision, Explanation, NameDecision, NameFacts};
pub use crate::eval::{Said, Step};
use crate::event::Who;
pub use crate::issue::{Issue, IssueKind, IssueReason, PolicyRef};
use crate::layer::Layer;
use crate::model::{DnsFilter, Objects, Pair, UnixSeconds};
use crate::ranges::Ranges;
use crate::state::{self, Prefixes, Touch};
use crate::{ClassKey, GroupKey, PortSet, PrefixSetKey, ScopeKey};

/// What is known of a pod's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Namespace, pod and node, shared between all events of the pod.
    pub who: Arc<Who>,
    /// What the pod is.
    pub touch: Touch,
    /// Its scope and group; absent for an untouched pod.
    pub member: Option<Member>,
}

/// Where a touched endpoint belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its scope.
    pub scope: ScopeKey,
    /// Its group.
    pub group: GroupKey,
    /// The group's dense index in this world.
    pub index: u32,
}

/// Facts about the cluster that decisions need.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Context {
    pub dns_filter: DnsFilter,
    nets: Ranges,
}

impl Context {
    pub fn new(o: &Objects) -> Self {
        let nodes = o.nodes.values();
        let nodes =
            nodes.flat_map(|n| n.pod_prefixes.iter().copied().chain(n.addresses.iter().map(|a| IpNet::from(*a))));
        let nets = o.settings.cluster_prefixes.iter().copied().chain(nodes).collect();
        Self { dns_filter: o.settings.dns_filter, nets }
    }

    pub fn in_cluster(&self, ip: IpAddr) -> bool {
        self.nets.contains(ip)
    }
}

/// The compiled policy.
#[derive(Debug)]
pub struct World {
    pub(crate) now: UnixSeconds,
    pub(crate) context: Arc<Context>,
    pub(crate) own: BTreeMap<String, Arc<Layer>>,
    pub(crate) cluster: Arc<Layer>,
    pub(crate) scopes: BTreeMap<ScopeKey, Arc<Scope>>,
    pub(crate) groups: Vec<Arc<Group>>,
    pub(crate) by_key: BTreeMap<GroupKey, u32>,
    pub(crate) endpoints: HashMap<IpAddr, Endpoint, ahash::RandomState>,
    pub(crate) issues: Vec<Issue>,
    pub(crate) next_change: Option<UnixSeconds>,
    pub(crate) registry: Arc<crate::class::Registry>,
}

/// A scope as it is pushed; owner and epoch are the pusher's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScopePart {
    /// The namespace's name.
    pub namespace: Arc<str>,
    /// The pool's name.
    pub pool: Arc<str>,
    /// Its pair; `None` for PodNetwork and where every pair drains.
    pub pair: Option<Pair>,
}

/// What follows from policy in the desired state of machines.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeStateParts {
    /// Every known address of a pod.
    pub endpoints: BTreeMap<IpAddr, state::Endpoint>,
    /// Scopes that have endpoints.
    pub scopes: BTreeMap<ScopeKey, ScopePart>,
    /// Groups.
    pub groups: BTreeMap<GroupKey, state::Group>,
    /// The prefix sets of the groups.
    pub prefixes: BTreeMap<PrefixSetKey, Arc<Prefixes>>,
    /// Grants of the classes that were asked for.
    pub grants: BTreeMap<(GroupKey, ClassKey), PortSet>,
}

impl World {
    /// Compiles. `now` decides which rules have ended and which audits run. What did not change since
    /// `previous` is shared with it; the result is the same with or without it.
    pub fn compile(objects: &Objects, now: UnixSeconds, previous: Option<&World>) -> World {
        crate::compile::compile(objects, now, previous)
    }

    /// When it was compiled for.
    pub fn now(&self) -> UnixSeconds {
        self.now
    }

    /// The next `expireTime` or `audit-until` after the compile: then it has to be compiled again.
    pub fn next_change(&self) -> Option<UnixSeconds> {
        self.next_change
    }

    /// What is wrong with the objects, sorted.
    pub fn issues(&self) -> &[Issue] {
        &self.issues
    }

    /// What is known of a pod's address.
    pub fn endpoint(&self, ip: IpAddr) -> Option<&Endpoint> {
        self.endpoints.get(&ip)
    }

    /// All endpoints, in no particular order.
    pub fn endpoints(&self) -> impl Iterator<Item = (IpAddr, &Endpoint)> {
        self.endpoints.iter().map(|(ip, e)| (*ip, e))
    }

    /// All scopes that have endpoints, by key.
    pub fn scopes(&self) -> &BTreeMap<ScopeKey, Arc<Scope>> {
        &self.scopes
    }

    /// A scope.
    pub fn scope(&self, key: ScopeKey) -> Option<&Arc<Scope>> {
        self.scopes.get(&key)
    }

    /// The pair that a scope leaves by.
    pub fn pair_of(&self, scope: ScopeKey) -> Option<Pair> {
        self.scope(scope)?.pair()
    }

    /// All groups; the place is the dense index of [`Member::index`].
    pub fn groups(&self) -> &[Arc<Group>] {
        &self.groups
    }

    /// A group by its dense index.
    pub fn group(&self, index: u32) -> Option<&Arc<Group>> {
        self.groups.get(index as usize)
    }

    /// A group by its key.
    pub fn group_by_key(&self, key: GroupKey) -> Option<&Arc<Group>> {
        self.group(*self.by_key.get(&key)?)
    }

    /// The group of a pod's address; absent for unknown and untouched pods.
    pub fn group_of(&self, ip: IpAddr) -> Option<&Arc<Group>> {
        self.group(self.endpoint(ip)?.member?.index)
    }

    /// Whether the address belongs to the cluster: configured prefixes, nodes and their pod ranges, and every pod.
    pub fn in_cluster(&self, ip: IpAddr) -> bool {
        self.endpoints.contains_key(&ip) || self.context.in_cluster(ip)
    }

    /// The scopes that are new or whose facts may have other classes than in `previous`.
    pub fn changed_scopes(&self, previous: &World) -> Vec<ScopeKey> {
        let same = |s: &Scope| previous.scope(s.key()).is_some_and(|p| p.same_classes(s));
        self.scopes.values().filter(|s| !same(s)).map(|s| s.key()).collect()
    }

    /// Forgets all classes but these. Facts, and whatever else still names a class, must be in `live`.
    pub fn retain_classes(&self, live: &BTreeSet<ClassKey>) {
        self.registry.retain(live);
    }

    /// How many classes are known.
    pub fn class_count(&self) -> usize {
        self.registry.len()
    }

    /// What is pushed to machines. `active` says which classes the facts of a scope have; each
    /// group of the scope gets a grant for each. A class that nobody has registered has no grant: a fact of it allows nothing.
    pub fn node_state_parts(&self, active: impl IntoIterator<Item = (ScopeKey, ClassKey)>) -> NodeStateParts {
        let mut out = NodeStateParts::default();
        for (ip, e) in &self.endpoints {
            out.endpoints.insert(
                *ip,
                state::Endpoint {
                    node: e.who.node.to_string(),
                    namespace: e.who.namespace.to_string(),
                    pod: e.who.pod.to_string(),
                    touch: e.touch,
                    member: e.member.map(|m| (m.scope, m.group)),
                },
            );
        }
        for s in self.scopes.values() {
            let part = ScopePart { namespace: s.namespace().clone(), pool: s.pool().clone(), pair: s.pair() };
            out.scopes.insert(s.key(), part);
        }
        let mut of_scope: BTreeMap<ScopeKey, Vec<&Arc<Group>>> = BTreeMap::new();
        for g in &self.groups {
            of_scope.entry(g.scope().key()).or_default().push(g);
            let sets = [g.admin_prefixes(), g.own_prefixes()];
            for (key, set) in sets.into_iter().flatten() {
                out.prefixes.insert(*key, set.clone());
            }
            let [admin, own] = sets.map(|s| s.map(|(key, _)| *key));
            let isolated = g.touch() == Touch::Isolated;
            out.groups.insert(g.key(), state::Group { isolated, audit: g.audit(), admin, own });
        }
        let active: BTreeSet<(ScopeKey, ClassKey)> = active.into_iter().collect();
        for (scope, class) in active {
            for g in of_scope.get(&scope).into_iter().flatten() {
                if let Some(set) = g.grant(class) {
                    out.grants.insert((g.key(), class), set);
                }
            }
        }
        out
    }
}
