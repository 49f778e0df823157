//! From objects to a world: layers, scopes, groups, endpoints.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use crate::class::{Scope, score};
use crate::decide::{Group, GroupParts};
use crate::eval::Selection;
use crate::event::Who;
use crate::issue::{Issue, IssueKind, IssueReason, PolicyRef};
use crate::key::KeyHasher;
use crate::layer::{Layer, Source};
use crate::model::{
    AddressSource, ClusterDefault, ClusterPolicy, Labels, Namespace, Objects, Pair, Policy, PolicyMode, Pool, Tier,
    UnixSeconds,
};
use crate::state::Touch;
use crate::world::{Context, Endpoint, Member, World};
use crate::{GroupKey, ScopeKey};

/// The pool that exists without being written.
const DEFAULT_POOL: &str = "default";

pub(crate) fn compile(objects: &Objects, now: UnixSeconds, previous: Option<&World>) -> World {
    let mut c = Compiler::new(objects, now, previous);
    let mut names: BTreeSet<&str> = objects.namespaces.keys().map(String::as_str).collect();
    names.extend(objects.pods.keys().chain(objects.policies.keys()).map(|(ns, _)| ns.as_str()));
    for name in names {
        c.namespace(name);
    }
    c.finish()
}

/// What a pod is, by its labels; the same for all pods of a namespace with equal labels.
#[derive(Clone)]
struct Fate {
    touch: Touch,
    member: Option<Member>,
}

struct Compiler<'a> {
    o: &'a Objects,
    now: UnixSeconds,
    previous: Option<&'a World>,
    context: Arc<Context>,
    cluster: Arc<Layer>,
    own: BTreeMap<String, Arc<Layer>>,
    scopes: BTreeMap<ScopeKey, Arc<Scope>>,
    groups: BTreeMap<GroupKey, Arc<Group>>,
    endpoints: HashMap<IpAddr, Endpoint, ahash::RandomState>,
    issues: BTreeSet<Issue>,
    next: Option<UnixSeconds>,
    registry: Arc<crate::class::Registry>,
    /// Policies that select a live pod together, at equal priority.
    ties: BTreeSet<(u32, u32)>,
}

impl<'a> Compiler<'a> {
    fn new(o: &'a Objects, now: UnixSeconds, previous: Option<&'a World>) -> Self {
        let context = Context::new(o);
        let context = match previous {
            Some(p) if *p.context == context => p.context.clone(),
            _ => Arc::new(context),
        };
        let source = Source::Cluster(o.cluster_policies.iter().map(|(n, p)| (n.clone(), p.clone())).collect());
        let cluster = layer(source, now, previous.map(|p| &p.cluster));
        let mut c = Self {
            o,
            now,
            previous,
            context,
            cluster,
            own: BTreeMap::new(),
            scopes: BTreeMap::new(),
            groups: BTreeMap::new(),
            endpoints: HashMap::default(),
            issues: BTreeSet::new(),
            next: None,
            registry: previous.map(|p| p.registry.clone()).unwrap_or_default(),
            ties: BTreeSet::new(),
        };
        let cluster = c.cluster.clone();
        c.layer_done(&cluster);
        c
    }

    fn layer_done(&mut self, layer: &Layer) {
        self.issues.extend(layer.issues.iter().cloned());
        if let Some(end) = layer.valid.1 {
            self.changes_at(end);
        }
    }

    fn changes_at(&mut self, end: UnixSeconds) {
        self.next = Some(self.next.map_or(end, |n| n.min(end)));
    }

    fn namespace(&mut self, name: &'a str) {
        let o = self.o;
        let absent = Namespace { uid: name.to_owned(), ..Namespace::default() };
        let ns = o.namespaces.get(name).unwrap_or(&absent);
        let key = |n: &str| (name.to_owned(), n.to_owned());
        let pods: Vec<_> = o.pods.range(key("")..).take_while(|((n, _), _)| n == name).collect();
        if o.settings.exempt_namespaces.iter().any(|e| e == name) {
            for ((_, pod), p) in pods {
                self.endpoint(name, pod, p, &Fate { touch: Touch::Untouched, member: None });
            }
            return;
        }
        let policies: Vec<(&str, &Policy)> = o
            .policies
            .range(key("")..)
            .take_while(|((n, _), _)| n == name)
            .map(|((_, n), p)| (n.as_str(), p))
            .collect();
        let source = Source::Own {
            namespace: name.to_owned(),
            policies: policies.iter().map(|(n, p)| ((*n).to_owned(), (*p).clone())).collect(),
            allow: ns.has_allow.then(|| ns.allow.clone()),
        };
        let own = layer(source, self.now, self.previous.and_then(|p| p.own.get(name)));
        self.layer_done(&own);
        self.own.insert(name.to_owned(), own.clone());
        let enforced: Vec<(&str, &Policy)> =
            policies.into_iter().filter(|(_, p)| p.mode == PolicyMode::Enforce).collect();
        let cluster: Vec<&ClusterPolicy> =
            o.cluster_policies.values().filter(|p| p.mode == PolicyMode::Enforce).collect();
        let audit = ns.audit && ns.audit_until.is_none_or(|end| self.now < end);
        if let Some(end) = ns.audit_until.filter(|_| audit) {
            self.changes_at(end);
        }
        let relevant: Vec<u32> =
            (0..).zip(&cluster).filter(|(_, p)| p.namespaces.matches(&ns.labels)).map(|(i, _): (u32, _)| i).collect();
        let place = Place { name, ns, own, enforced, cluster, relevant, audit };
        let mut fates: BTreeMap<&Labels, Fate> = BTreeMap::new();
        for ((_, pod), p) in pods {
            if p.host_network {
                // Its address is the node's: not managed.
                continue;
            }
            let fate = match fates.get(&p.labels) {
                Some(f) => f.clone(),
                None => {
                    let f = self.fate(&place, &p.labels);
                    fates.insert(&p.labels, f.clone());
                    f
                }
            };
            self.endpoint(name, pod, p, &fate);
        }
    }

    fn fate(&mut self, place: &Place<'_>, labels: &Labels) -> Fate {
        let selection = self.select(place, labels);
        let ns = place.ns;
        let default = self.o.settings.cluster_default;
        let selected = !(selection.admin.is_empty() && selection.baseline.is_empty() && selection.ceilings.is_empty());
        let own = !selection.own.is_empty() || ns.managed;
        // A pod that cluster policies select keeps their denies: only `Isolated` is stricter than they are.
        let by_default = match default {
            ClusterDefault::Untouched => false,
            ClusterDefault::Audit => !selected,
            ClusterDefault::Isolated => true,
        };
        let touch = match (own || by_default, selected) {
            (true, _) => Touch::Isolated,
            (false, true) => Touch::Guarded,
            (false, false) => {
                return Fate { touch: Touch::Untouched, member: None };
            }
        };
        let audit = place.audit || (!own && by_default && default == ClusterDefault::Audit);
        let pool = self.pool(place, &selection);
        let scope = self.scope(place, pool);
        let key = group_key(&scope, &selection);
        self.tie(&selection);
        let parts = GroupParts { key, scope: scope.clone(), selection, touch, audit };
        if !self.groups.contains_key(&key) {
            let old = self.previous.and_then(|p| p.group_by_key(key)).filter(|g| g.same_parts(&parts));
            let group = old.cloned().unwrap_or_else(|| Arc::new(Group::new(parts)));
            self.issues.extend(group.issues.iter().cloned());
            self.groups.insert(key, group);
        }
        // The dense index is known when all groups are.
        Fate { touch, member: Some(Member { scope: scope.key, group: key, index: u32::MAX }) }
    }

    fn select(&self, place: &Place<'_>, labels: &Labels) -> Selection {
        let mut own: Vec<u32> = (0..)
            .zip(&place.enforced)
            .filter(|(_, (_, p))| p.pod_selector.matches(labels))
            .map(|(i, _): (u32, _)| i)
            .collect();
        if place.ns.has_allow {
            own.push(place.enforced.len() as u32);
        }
        let mut s = Selection { own, admin: Vec::new(), baseline: Vec::new(), ceilings: Vec::new() };
        for id in &place.relevant {
            let p = place.cluster[*id as usize];
            if !p.pods.matches(labels) {
                continue;
            }
            match p.tier {
                Tier::Admin => s.admin.push((p.priority, *id)),
                Tier::Baseline => s.baseline.push((p.priority, *id)),
            }
            if p.ceiling.is_some() {
                s.ceilings.push(*id);
            }
        }
        s.admin.sort_unstable();
        s.baseline.sort_unstable();
        s
    }

    fn tie(&mut self, s: &Selection) {
        for tier in [&s.admin, &s.baseline] {
            for run in tier.chunk_by(|a, b| a.0 == b.0) {
                for (i, (_, a)) in run.iter().enumerate() {
                    for (_, b) in &run[i + 1..] {
                        let acts = |id: u32| self.cluster.policy(id).actions;
                        let ((d1, a1), (d2, a2)) = (acts(*a), acts(*b));
                        if (d1 && a2) || (a1 && d2) {
                            self.ties.insert((*a, *b));
                        }
                    }
                }
            }
        }
    }

    /// The pool of a pod: of its policies the oldest, then the first by name; the annotation; the built-in one.
    fn pool(&mut self, place: &Place<'_>, selection: &Selection) -> &'a str {
        let o = self.o;
        let policies = selection.own.iter().filter_map(|id| place.enforced.get(*id as usize));
        let mut asks: Vec<(UnixSeconds, &str, &str)> =
            policies.filter_map(|(name, p)| Some((p.created, *name, p.pool.as_deref()?))).collect();
        asks.sort_unstable();
        let who = |kind, name: &str| PolicyRef { kind, namespace: place.name.into(), name: name.into() };
        let mut winner: Option<&str> = None;
        for (_, name, pool) in asks {
            let reason = match (self.admits(place, pool), winner) {
                (Err(reason), _) => reason,
                (Ok(_), Some(w)) if w != pool => IssueReason::PoolConflict,
                (Ok(found), _) => {
                    winner = Some(found);
                    continue;
                }
            };
            let kind = if reason == IssueReason::PoolConflict { IssueKind::Conflicted } else { IssueKind::Refused };
            let by = if kind == IssueKind::Conflicted { winner.map(Into::into) } else { Some(pool.into()) };
            let policy = who("EgressPolicy", name);
            self.issues.insert(Issue { kind, policy, path: "poolRef".into(), reason, by });
        }
        if let Some(w) = winner {
            return w;
        }
        if let Some(pool) = &place.ns.pool {
            match self.admits(place, pool) {
                Ok(found) => return found,
                Err(reason) => drop(self.issues.insert(Issue {
                    kind: IssueKind::Refused,
                    policy: who("Namespace", place.name),
                    path: "tidegate.dev/pool".into(),
                    reason,
                    by: Some(pool.as_str().into()),
                })),
            }
        }
        o.pools.get_key_value(DEFAULT_POOL).map_or(DEFAULT_POOL, |(k, _)| k.as_str())
    }

    /// The pool's name, if it exists and admits the namespace.
    fn admits(&self, place: &Place<'_>, pool: &str) -> Result<&'a str, IssueReason> {
        match self.o.pools.get_key_value(pool) {
            _ if pool == DEFAULT_POOL => Ok(DEFAULT_POOL),
            None => Err(IssueReason::PoolUnknown),
            Some((name, p)) => {
                let ok = p.allowed_namespaces.as_ref().is_some_and(|s| s.matches(&place.ns.labels));
                if ok { Ok(name) } else { Err(IssueReason::PoolNotAllowed) }
            }
        }
    }

    fn scope(&mut self, place: &Place<'_>, pool: &str) -> Arc<Scope> {
        let uid = if place.ns.uid.is_empty() { place.name } else { &place.ns.uid };
        let key = ScopeKey(KeyHasher::new("scope").field(uid.as_bytes()).field(pool.as_bytes()).finish());
        if let Some(s) = self.scopes.get(&key) {
            return s.clone();
        }
        let source = self.o.pools.get(pool).map_or(AddressSource::PodNetwork, |p: &Pool| p.source.clone());
        let assigned = self.o.assigned.get(&(place.name.to_owned(), pool.to_owned()));
        let pair = pair(key, &source, assigned);
        let new = Scope {
            key,
            namespace: place.name.into(),
            uid: uid.into(),
            pool: pool.into(),
            source,
            pair,
            own: place.own.clone(),
            cluster: self.cluster.clone(),
            relevant: place.relevant.clone(),
            registry: self.registry.clone(),
            context: self.context.clone(),
        };
        let old = self.previous.and_then(|p| p.scope(key)).filter(|s| {
            s.same_classes(&new)
                && s.namespace == new.namespace
                && s.source == new.source
                && s.pair == new.pair
                && Arc::ptr_eq(&s.context, &new.context)
        });
        let scope = old.cloned().unwrap_or_else(|| Arc::new(new));
        self.scopes.insert(key, scope.clone());
        scope
    }

    fn endpoint(&mut self, namespace: &str, pod: &str, p: &crate::model::Pod, fate: &Fate) {
        if p.host_network {
            return;
        }
        let fresh = |ip: IpAddr| {
            let old = self.previous.and_then(|w| w.endpoint(ip)).map(|e| &e.who);
            let same = |w: &&Arc<Who>| *w.namespace == *namespace && *w.pod == *pod && *w.node == *p.node;
            old.filter(same).cloned().unwrap_or_else(|| {
                Arc::new(Who { namespace: namespace.into(), pod: pod.into(), node: p.node.as_str().into() })
            })
        };
        for ip in &p.addresses {
            let new = Endpoint { who: fresh(*ip), touch: fate.touch, member: fate.member };
            match self.endpoints.entry(*ip) {
                std::collections::hash_map::Entry::Vacant(v) => drop(v.insert(new)),
                std::collections::hash_map::Entry::Occupied(mut e) => {
                    // Two owners of one address: the stricter treatment holds until one is gone.
                    self.issues.insert(Issue {
                        kind: IssueKind::Conflicted,
                        policy: PolicyRef { kind: "Pod", namespace: namespace.into(), name: pod.into() },
                        path: "status.podIPs".into(),
                        reason: IssueReason::DuplicateAddress,
                        by: Some(format!("{}/{}", e.get().who.namespace, e.get().who.pod).into()),
                    });
                    if new.touch > e.get().touch {
                        e.insert(new);
                    }
                }
            }
        }
    }

    fn finish(mut self) -> World {
        for (a, b) in &self.ties {
            for (x, y) in [(a, b), (b, a)] {
                self.issues.insert(Issue {
                    kind: IssueKind::Conflicted,
                    policy: self.cluster.policy(*x).who.clone(),
                    path: "priority".into(),
                    reason: IssueReason::EqualPriority,
                    by: Some(self.cluster.policy(*y).who.name.clone()),
                });
            }
        }
        let by_key: BTreeMap<GroupKey, u32> = self.groups.keys().copied().zip(0..).collect();
        for e in self.endpoints.values_mut() {
            if let Some(m) = &mut e.member {
                m.index = by_key.get(&m.group).copied().unwrap_or(u32::MAX);
            }
        }
        World {
            now: self.now,
            context: self.context,
            own: self.own,
            cluster: self.cluster,
            scopes: self.scopes,
            groups: self.groups.into_values().collect(),
            by_key,
            endpoints: self.endpoints,
            issues: self.issues.into_iter().collect(),
            next_change: self.next,
            registry: self.registry,
        }
    }
}

/// A namespace while it is compiled.
struct Place<'p> {
    name: &'p str,
    ns: &'p Namespace,
    own: Arc<Layer>,
    /// Policies that have effect, in the order of the layer.
    enforced: Vec<(&'p str, &'p Policy)>,
    /// Cluster policies that have effect, in the order of their layer.
    cluster: Vec<&'p ClusterPolicy>,
    /// Those of them whose namespace selector takes this namespace.
    relevant: Vec<u32>,
    audit: bool,
}

fn layer(source: Source, now: UnixSeconds, old: Option<&Arc<Layer>>) -> Arc<Layer> {
    match old {
        Some(l) if l.is_current(&source, now) => l.clone(),
        _ => Arc::new(Layer::compile(source, now)),
    }
}

/// The pair that the scope was given before, as long as the pool has it; else the one with the highest score among those
/// that are not draining.
fn pair(scope: ScopeKey, source: &AddressSource, assigned: Option<&Pair>) -> Option<Pair> {
    match source {
        AddressSource::PodNetwork => None,
        AddressSource::Static { pairs, .. } => {
            let kept = assigned.and_then(|a| same_pair(pairs, a));
            kept.or_else(|| pairs.iter().filter(|p| !p.draining).max_by_key(|p| score(scope, p))).copied()
        }
    }
}

/// The pair of a pool with these addresses. One that has gained or lost an address is the same pair as long as it has
/// one of them: the IPv4 address decides where both are.
fn same_pair<'p>(pairs: &'p [Pair], a: &Pair) -> Option<&'p Pair> {
    let by = |same: &dyn Fn(&Pair) -> bool| pairs.iter().find(|p| same(p));
    by(&|p| (p.ipv4, p.ipv6) == (a.ipv4, a.ipv6))
        .or_else(|| a.ipv4.and_then(|ip| by(&|p| p.ipv4 == Some(ip))))
        .or_else(|| a.ipv6.and_then(|ip| by(&|p| p.ipv6 == Some(ip))))
}

fn group_key(scope: &Scope, s: &Selection) -> GroupKey {
    let mut h = KeyHasher::new("group").field(&scope.key.0.to_be_bytes());
    for id in &s.own {
        let who = &scope.own.policy(*id).who;
        h = h.field(who.kind.as_bytes()).field(who.name.as_bytes());
    }
    let mut cluster: Vec<u32> = s.admin.iter().chain(&s.baseline).map(|(_, id)| *id).collect();
    cluster.sort_unstable();
    for id in cluster {
        h = h.field(b"ClusterEgressPolicy").field(scope.cluster.policy(id).who.name.as_bytes());
    }
    GroupKey(h.finish())
}
