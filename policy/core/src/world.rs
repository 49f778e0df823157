//! The compiled policy of a whole cluster at one moment: immutable, cheap to read from any thread.
//!
//! ```text
//! let world = World::compile(&objects, now, Some((&previous, &touched)));    // what was not touched is shared
//! world.next_change()                                → when to compile again although nothing was edited
//! world.endpoint(ip)                                 → who, touch, scope and group of a pod's address
//! world.group(index) / world.group_by_key(key)       → &Arc<Group>:
//!     group.name(name, qtype)                        → NameDecision: answer, reason, rule, facts of the name
//!     group.address(name, ip)                        → AddressDecision: privateAddresses, denied prefixes
//!     group.connection(Some(&bound), ip, proto, port)→ Decision: via, reason, rule, ech_allow, explanation
//!     group.connection_unbound(&sni, ip, …)          → the same for a name that is not bound to the address
//!     group.grant(class)                             → PortSet for (group, class)
//!     group.audit(), group.touch()
//! world.scope(key)                                   → &Arc<Scope>:
//!     scope.class(ip, names)                         → ClassKey, registered for every later world
//!     scope.single_rule_classes()                    → classes whose grants are pushed ahead
//!     scope.pool(), scope.pair(), scope.families()
//! world.changes(&previous)                           → endpoints, scopes and groups that may be others, at their cost
//! world.parts(sight, live)                           → what a machine is told: endpoints, groups, prefixes, grants, scopes
//! world.retain_classes(&live)                        → forgets classes that no fact has
//! world.issues()                                     → refused, clipped, conflicted
//! ```
//!
//! Decisions say what enforcement does. In a group with [`Group::audit`] a deny is reported and passes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

use ipnet::IpNet;
use smallvec::SmallVec;

pub use crate::class::Scope;
use crate::compile::{Contested, Slots};
pub use crate::decide::Group;
pub use crate::decision::{AddressDecision, Answer, BuiltIn, Decision, Explanation, NameDecision, NameFacts};
pub use crate::eval::{Said, Step};
use crate::event::Who;
pub use crate::issue::{Issue, IssueKind, IssueReason, PolicyRef};
use crate::layer::Layer;
use crate::model::{Objects, Pair, Touched, UnixSeconds};
use crate::ranges::Ranges;
use crate::shards::Shards;
use crate::space::{Space, Window};
use crate::state::{self, Named, Prefixes, Touch};
use crate::{ClassKey, GroupKey, PortSet, PrefixSetKey, ScopeKey};

/// What is known of a pod's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Namespace, pod and node, shared between all events of the pod.
    pub who: Arc<Who>,
    /// What the pod is.
    pub touch: Touch,
    /// Its scope and group; absent for an untouched pod, and where it is in doubt whose address it is.
    pub member: Option<Member>,
}

/// Where a touched endpoint belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its scope.
    pub scope: ScopeKey,
    /// Its group.
    pub group: GroupKey,
    /// The group's index in this world.
    pub index: u32,
}

/// The configured prefixes, the nodes and their pod ranges.
pub(crate) fn cluster_nets(o: &Objects) -> Ranges {
    let nodes = o.nodes.values();
    let nodes = nodes.flat_map(|n| n.pod_prefixes.iter().copied().chain(n.addresses.iter().map(|a| IpNet::from(*a))));
    o.settings.cluster_prefixes.iter().copied().chain(nodes).collect()
}

/// The addresses of pods.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    /// What gateways know of each.
    pub endpoints: Shards<IpAddr, Endpoint>,
    /// Those that several pods have.
    pub contested: Shards<IpAddr, Arc<Contested>>,
    /// Those of each node's pods.
    pub nodes: Shards<Arc<str>, Arc<Shards<IpAddr, ()>>>,
}

impl Known {
    /// What each node that has a pod with this address makes of it.
    pub fn at(&self, ip: IpAddr) -> &[Endpoint] {
        match self.contested.get(&ip) {
            Some(c) => &c.at,
            None => self.endpoints.get(&ip).map_or(&[], std::slice::from_ref),
        }
    }

    pub fn set(&mut self, ip: IpAddr, endpoint: Option<Endpoint>, contested: Option<Contested>) {
        let nodes = |of: &Self| of.at(ip).iter().map(|e| e.who.node.clone()).collect::<SmallVec<[_; 1]>>();
        let before = nodes(self);
        match endpoint {
            Some(e) => drop(self.endpoints.insert(ip, e)),
            None => drop(self.endpoints.remove(&ip)),
        }
        match contested {
            Some(c) => drop(self.contested.insert(ip, Arc::new(c))),
            None => drop(self.contested.remove(&ip)),
        }
        let after = nodes(self);
        for node in before.iter().filter(|n| !after.contains(n)) {
            let mut all = self.nodes.remove(node).unwrap_or_default();
            Arc::make_mut(&mut all).remove(&ip);
            if !all.is_empty() {
                self.nodes.insert(node.clone(), all);
            }
        }
        for node in after.into_iter().filter(|n| !before.contains(n)) {
            let mut all = self.nodes.remove(&node).unwrap_or_default();
            Arc::make_mut(&mut all).insert(ip, ());
            self.nodes.insert(node, all);
        }
    }
}

/// Which pods a machine is told of.
#[derive(Clone, Copy, Debug)]
pub struct Sight<'a> {
    /// Every touched one: a gateway may have to take its packets.
    pub everything: bool,
    /// All of this node, untouched ones too.
    pub here: Option<&'a str>,
}

/// A pool with one of its pairs.
pub(crate) type Way = (Arc<str>, Option<Pair>);

/// The compiled policy.
#[derive(Debug)]
pub struct World {
    pub(crate) now: UnixSeconds,
    pub(crate) nets: Arc<Ranges>,
    pub(crate) cluster: Arc<Layer>,
    /// How often cluster policies changed since all namespaces had their layer.
    pub(crate) behind: u32,
    pub(crate) spaces: Shards<Arc<str>, Arc<Space>>,
    pub(crate) scopes: Shards<ScopeKey, Arc<Scope>>,
    pub(crate) groups: Shards<GroupKey, Arc<Group>>,
    pub(crate) slots: Slots,
    pub(crate) known: Known,
    /// A scope for each way out, with their number.
    pub(crate) ways: BTreeMap<Way, (Arc<Scope>, u32)>,
    /// Namespaces for which time plays a role.
    pub(crate) timed: Shards<Arc<str>, Window>,
    /// Namespaces with issues.
    pub(crate) flawed: Shards<Arc<str>, ()>,
    /// The strictest that a new pod of each namespace may be.
    pub(crate) strictest: Shards<Arc<str>, Touch>,
    /// Names of the cluster without their suffix.
    pub(crate) names: Shards<Arc<str>, Named>,
    /// Put together when somebody asks.
    pub(crate) issues: OnceLock<Vec<Issue>>,
    pub(crate) next_change: Option<UnixSeconds>,
    pub(crate) registry: Arc<crate::class::Registry>,
}

/// What may be other than in an earlier world.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Addresses that are new, gone, or of another pod, kind, scope or group.
    pub endpoints: Vec<IpAddr>,
    /// Scopes that are new, gone, or leave by another way.
    pub scopes: BTreeSet<ScopeKey>,
    /// Scopes that are new or whose facts may have other classes.
    pub classes: BTreeSet<ScopeKey>,
    /// Groups that are new, gone, or for which other rules decide.
    pub groups: BTreeSet<GroupKey>,
    /// Namespaces that are new, gone, or whose new pods may be treated otherwise.
    pub namespaces: Vec<Arc<str>>,
    /// Names of the cluster that are new, gone, or lead elsewhere.
    pub names: Vec<Arc<str>>,
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

/// What follows from policy in the desired state of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeStateParts {
    /// The addresses that it is told of.
    pub endpoints: BTreeMap<IpAddr, state::Endpoint>,
    /// Their scopes.
    pub scopes: BTreeMap<ScopeKey, ScopePart>,
    /// Their groups.
    pub groups: BTreeMap<GroupKey, state::Group>,
    /// The prefix sets of the groups.
    pub prefixes: BTreeMap<PrefixSetKey, Arc<Prefixes>>,
    /// Grants of the classes that were asked for.
    pub grants: BTreeMap<(GroupKey, ClassKey), PortSet>,
}

impl World {
    /// Compiles. `now` decides which rules have ended and which audits run. `previous` is an earlier world with all that
    /// was touched since: only that, and what time changed, is compiled anew; all else is shared with it. The result is
    /// the same with or without it, but for the indices of groups.
    pub fn compile(objects: &Objects, now: UnixSeconds, previous: Option<(&World, &Touched)>) -> World {
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
        self.issues.get_or_init(|| {
            let spaces = self.flawed.keys().filter_map(|name| self.spaces.get(name));
            let spaces = spaces.flat_map(|s| &s.issues);
            let addresses = self.known.contested.values().flat_map(|c| &c.issues);
            let mut all: Vec<Issue> = self.cluster.issues.iter().chain(spaces).chain(addresses).cloned().collect();
            all.sort_unstable();
            all.dedup();
            all
        })
    }

    /// What is known of a pod's address. One that several pods have is isolated and of no group, unless they are on one
    /// node and of one group.
    pub fn endpoint(&self, ip: IpAddr) -> Option<&Endpoint> {
        self.known.endpoints.get(&ip)
    }

    /// All endpoints, in no particular order.
    pub fn endpoints(&self) -> impl Iterator<Item = (IpAddr, &Endpoint)> {
        self.known.endpoints.iter().map(|(ip, e)| (*ip, e))
    }

    /// What each node that has a pod with this address makes of it: of those that several have each its own.
    pub fn endpoints_of(&self, ip: IpAddr) -> &[Endpoint] {
        self.known.at(ip)
    }

    /// What a machine is told of an address.
    pub fn seen(&self, sight: Sight<'_>, ip: IpAddr) -> Option<&Endpoint> {
        let local = self.known.at(ip).iter().find(|e| sight.here == Some(&*e.who.node));
        local.or_else(|| self.endpoint(ip).filter(|e| sight.everything && e.touch != Touch::Untouched))
    }

    /// The addresses that a machine is told of, at their cost.
    pub fn addresses<'a>(&'a self, sight: Sight<'a>) -> impl Iterator<Item = IpAddr> + 'a {
        let touched = self.known.endpoints.iter().filter(move |_| sight.everything);
        let here = sight.here.and_then(|n| self.known.nodes.get(n)).into_iter().flat_map(|n| n.keys());
        let all = touched.map(|(ip, _)| *ip).chain(here.filter(move |_| !sight.everything).copied());
        all.filter(move |ip| self.seen(sight, *ip).is_some())
    }

    /// The addresses of a namespace's pods; some may be known as another pod's.
    pub fn addresses_of(&self, namespace: &str) -> impl Iterator<Item = IpAddr> {
        self.spaces.get(namespace).into_iter().flat_map(|s| s.pods.values()).flat_map(|r| r.addresses.iter().copied())
    }

    /// The strictest that a new pod of each namespace may be, see [`crate::state::Entry::Namespace`].
    pub fn strictest(&self) -> &Shards<Arc<str>, Touch> {
        &self.strictest
    }

    /// Names of the cluster without their suffix, and where they lead.
    pub fn names(&self) -> &Shards<Arc<str>, Named> {
        &self.names
    }

    /// All scopes that have pods, by key.
    pub fn scopes(&self) -> &Shards<ScopeKey, Arc<Scope>> {
        &self.scopes
    }

    /// A scope.
    pub fn scope(&self, key: ScopeKey) -> Option<&Arc<Scope>> {
        self.scopes.get(&key)
    }

    /// One scope for each pool and pair that scopes leave by, with the number of those that do.
    pub fn ways(&self) -> impl Iterator<Item = (&Arc<Scope>, u32)> {
        self.ways.values().map(|(scope, n)| (scope, *n))
    }

    /// The groups of a scope.
    pub fn groups_of(&self, scope: ScopeKey) -> impl Iterator<Item = &Arc<Group>> {
        let space = self.scope(scope).and_then(|s| self.spaces.get(s.namespace()));
        space.into_iter().flat_map(|s| s.groups()).filter(move |g| g.scope().key() == scope)
    }

    /// The pair that a scope leaves by.
    pub fn pair_of(&self, scope: ScopeKey) -> Option<Pair> {
        self.scope(scope)?.pair()
    }

    /// All groups, by key.
    pub fn groups(&self) -> &Shards<GroupKey, Arc<Group>> {
        &self.groups
    }

    /// A group by its index, [`Member::index`].
    pub fn group(&self, index: u32) -> Option<&Arc<Group>> {
        self.slots.get(index)
    }

    /// A group by its key.
    pub fn group_by_key(&self, key: GroupKey) -> Option<&Arc<Group>> {
        self.groups.get(&key)
    }

    /// The group of a pod's address; absent for unknown and untouched pods.
    pub fn group_of(&self, ip: IpAddr) -> Option<&Arc<Group>> {
        self.group(self.endpoint(ip)?.member?.index)
    }

    /// Whether the address belongs to the cluster: configured prefixes, nodes and their pod ranges, and every pod. What is
    /// inside passes before any rule, and is no answer for a public name: groups are not asked about it.
    pub fn in_cluster(&self, ip: IpAddr) -> bool {
        self.known.endpoints.contains_key(&ip) || self.nets.contains(ip)
    }

    /// What may be other than in an earlier world. Costs what is.
    pub fn changes(&self, previous: &World) -> Changes {
        let mut out = Changes::default();
        self.known.endpoints.compare(&previous.known.endpoints, |ip, old, new| {
            if old != new {
                out.endpoints.push(*ip);
            }
        });
        let whole = out.endpoints.len();
        self.known.contested.compare(&previous.known.contested, |ip, _, _| {
            if self.endpoints_of(*ip) != previous.endpoints_of(*ip) {
                out.endpoints.push(*ip);
            }
        });
        if out.endpoints.len() > whole {
            out.endpoints.sort_unstable();
            out.endpoints.dedup();
        }
        self.scopes.compare(&previous.scopes, |key, old, new| {
            let both = old.zip(new);
            if both.is_none_or(|(a, b)| !Arc::ptr_eq(a, b) && !a.same_way(b)) {
                out.scopes.insert(*key);
            }
            if new.is_some() && both.is_none_or(|(a, b)| !Arc::ptr_eq(a, b) && !a.same_classes(b)) {
                out.classes.insert(*key);
            }
        });
        self.groups.compare(&previous.groups, |key, old, new| {
            if old.zip(new).is_none_or(|(a, b)| !Arc::ptr_eq(a, b) && !a.says_the_same(b)) {
                out.groups.insert(*key);
            }
        });
        self.strictest.compare(&previous.strictest, |name, old, new| {
            if old != new {
                out.namespaces.push(name.clone());
            }
        });
        self.names.compare(&previous.names, |name, old, new| {
            if old != new {
                out.names.push(name.clone());
            }
        });
        out
    }

    /// The scopes that are new or whose facts may have other classes than in `previous`.
    pub fn changed_scopes(&self, previous: &World) -> Vec<ScopeKey> {
        self.changes(previous).classes.into_iter().collect()
    }

    /// Forgets all classes but these. Facts, and whatever else still names a class, must be in `live`.
    pub fn retain_classes(&self, live: &BTreeSet<ClassKey>) {
        self.registry.retain(live);
    }

    /// How many classes are known.
    pub fn class_count(&self) -> usize {
        self.registry.len()
    }

    /// What is pushed to a machine, at the cost of what it is told of. `live` says which classes the facts of a scope
    /// have; each group of the scope gets a grant for each. A class that nobody has registered has no grant: a fact of it allows nothing.
    pub fn parts<C: IntoIterator<Item = ClassKey>>(
        &self,
        sight: Sight<'_>,
        live: impl Fn(ScopeKey) -> C,
    ) -> NodeStateParts {
        let mut out = NodeStateParts::default();
        let mut of_scope: BTreeMap<ScopeKey, BTreeSet<GroupKey>> = BTreeMap::new();
        for ip in self.addresses(sight) {
            let Some(e) = self.seen(sight, ip) else { continue };
            if let Some(m) = e.member {
                of_scope.entry(m.scope).or_default().insert(m.group);
            }
            out.endpoints.insert(ip, e.into());
        }
        for (scope, groups) in of_scope {
            let Some(s) = self.scope(scope) else { continue };
            let part = ScopePart { namespace: s.namespace().clone(), pool: s.pool().clone(), pair: s.pair() };
            out.scopes.insert(scope, part);
            let groups: Vec<&Arc<Group>> = groups.iter().filter_map(|g| self.group_by_key(*g)).collect();
            for g in &groups {
                let sets = [g.admin_prefixes(), g.own_prefixes()];
                for (key, set) in sets.into_iter().flatten() {
                    out.prefixes.insert(*key, set.clone());
                }
                let [admin, own] = sets.map(|s| s.map(|(key, _)| *key));
                let isolated = g.touch() == Touch::Isolated;
                out.groups.insert(g.key(), state::Group { isolated, audit: g.audit(), admin, own });
            }
            for class in live(scope).into_iter().collect::<BTreeSet<_>>() {
                let grants = groups.iter().filter_map(|g| Some(((g.key(), class), g.grant(class)?)));
                out.grants.extend(grants);
            }
        }
        out
    }
}

impl From<&Endpoint> for state::Endpoint {
    fn from(e: &Endpoint) -> Self {
        Self {
            node: e.who.node.to_string(),
            namespace: e.who.namespace.to_string(),
            pod: e.who.pod.to_string(),
            touch: e.touch,
            member: e.member.map(|m| (m.scope, m.group)),
        }
    }
}
