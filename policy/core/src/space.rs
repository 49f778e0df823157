//! One namespace, compiled: its rules, the kinds of its pods, and the pods themselves.
//!
//! A space is kept as it is from world to world until something touches it. When one pod is
//! touched, only this pod is looked at again.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::ScopeKey;
use crate::class::{Scope, score};
use crate::compile::Compiler;
use crate::decide::{Group, GroupParts};
use crate::eval::Selection;
use crate::event::Who;
use crate::issue::{Issue, IssueKind, IssueReason, PolicyRef};
use crate::key::KeyHasher;
use crate::layer::Layer;
use crate::model::{
    AddressSource, ClusterDefault, ClusterPolicy, Labels, Namespace, Pair, Pod, Policy, PolicyMode, Pool, Tier,
    UnixSeconds,
};
use crate::shards::Shards;
use crate::state::Touch;
use crate::world::{Endpoint, Member};

/// The pool that exists without being written.
const DEFAULT_POOL: &str = "default";

/// The pods of a namespace that the same policies select.
#[derive(Debug)]
pub(crate) struct Kind {
    selection: Selection,
    pub touch: Touch,
    /// Absent for untouched pods.
    pub group: Option<Arc<Group>>,
    issues: Vec<Issue>,
}

impl Kind {
    fn untouched(selection: Selection) -> Self {
        Self { selection, touch: Touch::Untouched, group: None, issues: Vec::new() }
    }

    fn is(&self, other: &Kind) -> bool {
        let group = match (&self.group, &other.group) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (a, b) => a.is_none() && b.is_none(),
        };
        group && self.touch == other.touch && self.selection == other.selection && self.issues == other.issues
    }
}

/// A pod with what it is.
#[derive(Clone, Debug)]
pub(crate) struct Resident {
    pub who: Arc<Who>,
    pub addresses: SmallVec<[IpAddr; 2]>,
    pub kind: Arc<Kind>,
    /// It is being deleted.
    pub ending: bool,
    /// It is a mirror pod, and those are not trusted: nothing that its namespace has is its own.
    pub alien: bool,
}

impl Resident {
    fn is(&self, other: &Resident) -> bool {
        self.who == other.who
            && self.addresses == other.addresses
            && Arc::ptr_eq(&self.kind, &other.kind)
            && (self.ending, self.alien) == (other.ending, other.alien)
    }

    pub fn endpoint(&self) -> Endpoint {
        if self.alien {
            return self.closed();
        }
        let member =
            self.kind.group.as_ref().map(|g| Member { scope: g.scope().key(), group: g.key(), index: g.index() });
        Endpoint { who: self.who.clone(), touch: self.kind.touch, member }
    }

    /// Without a group: no rule allows it anything, and no pool's address is its own. What nothing is denied to is left alone.
    pub fn closed(&self) -> Endpoint {
        let touch = match self.strictness() {
            Touch::Untouched => Touch::Untouched,
            Touch::Guarded | Touch::Isolated => Touch::Isolated,
        };
        Endpoint { who: self.who.clone(), touch, member: None }
    }

    /// How strictly it is treated: what is audited is denied nothing.
    pub fn strictness(&self) -> Touch {
        let audited = self.kind.group.as_ref().is_some_and(|g| g.audit());
        if audited { Touch::Untouched } else { self.kind.touch }
    }
}

/// From when on, and until when, time changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    pub from: Option<UnixSeconds>,
    pub until: Option<UnixSeconds>,
}

impl Window {
    pub fn holds(&self, now: UnixSeconds) -> bool {
        self.from.is_none_or(|t| t <= now) && self.until.is_none_or(|t| now < t)
    }
}

/// A compiled namespace.
#[derive(Clone, Debug)]
pub(crate) struct Space {
    own: Arc<Layer>,
    /// All cluster policies, those as they are that select the namespace.
    cluster: Arc<Layer>,
    /// By selection, with the number of pods.
    kinds: Vec<(Arc<Kind>, usize)>,
    pub pods: Shards<Arc<str>, Resident>,
    /// The strictest that a new pod may be, see [`crate::state::Entry::Namespace`].
    pub strictest: Touch,
    /// Sorted.
    pub issues: Vec<Issue>,
    /// Absent where time plays no role.
    pub window: Option<Window>,
}

impl Space {
    /// Its groups by their keys.
    pub fn groups(&self) -> impl Iterator<Item = &Arc<Group>> {
        self.kinds.iter().filter_map(|(k, _)| k.group.as_ref())
    }

    fn find(&self, selection: &Selection) -> Result<usize, usize> {
        self.kinds.binary_search_by(|(k, _)| k.selection.cmp(selection))
    }

    /// One pod more is of this kind.
    fn join(&mut self, kind: &Arc<Kind>) {
        match self.find(&kind.selection) {
            Ok(at) => self.kinds[at].1 += 1,
            Err(at) => self.kinds.insert(at, (kind.clone(), 1)),
        }
    }

    /// One pod less is.
    fn leave(&mut self, kind: &Kind) {
        if let Ok(at) = self.find(&kind.selection) {
            self.kinds[at].1 = self.kinds[at].1.saturating_sub(1);
        }
    }

    /// Sets a pod, or removes it. Says whether that is a change.
    fn set(&mut self, pod: &Arc<str>, resident: Option<Resident>) -> Option<(Option<Resident>, Option<Resident>)> {
        let old = self.pods.get(pod);
        match (old, &resident) {
            (None, None) => return None,
            (Some(a), Some(b)) if a.is(b) => return None,
            _ => {}
        }
        let old = match &resident {
            Some(r) => self.pods.insert(pod.clone(), r.clone()),
            None => self.pods.remove(pod),
        };
        Some((old, resident))
    }

    fn finish(&mut self, window: Option<Window>) {
        self.kinds.retain(|(_, pods)| *pods > 0);
        let kinds = self.kinds.iter().flat_map(|(k, _)| &k.issues);
        let groups = self.groups().flat_map(|g| g.issues.iter());
        let mut issues: Vec<Issue> = self.own.issues.iter().chain(kinds).chain(groups).cloned().collect();
        issues.sort_unstable();
        issues.dedup();
        (self.issues, self.window) = (issues, window);
    }

    /// Whether it is the same as one that had the same pods.
    fn is(&self, other: &Space) -> bool {
        Arc::ptr_eq(&self.own, &other.own)
            && Arc::ptr_eq(&self.cluster, &other.cluster)
            && self.kinds.len() == other.kinds.len()
            && self.kinds.iter().zip(&other.kinds).all(|(a, b)| Arc::ptr_eq(&a.0, &b.0) && a.1 == b.1)
            && self.strictest == other.strictest
            && self.issues == other.issues
            && self.window == other.window
    }
}

/// A namespace while it is compiled.
struct Place<'a, 'p> {
    name: Arc<str>,
    ns: &'p Namespace,
    exempt: bool,
    own: Arc<Layer>,
    cluster: &'p Arc<Layer>,
    /// Policies that have effect, in the order of the layer.
    enforced: Vec<(&'a str, &'a Policy)>,
    /// The cluster policies whose namespace selector takes this namespace.
    relevant: Vec<(u32, &'p ClusterPolicy)>,
    audit: bool,
    old: Option<&'p Space>,
}

impl<'a> Compiler<'a> {
    /// Compiles a namespace: of its pods these, if it is known otherwise, or all.
    pub fn space(&mut self, name: &str, only: Option<&[&str]>) {
        let o = self.o;
        let key = |n: &str| (name.to_owned(), n.to_owned());
        let old = self.previous.and_then(|p| p.spaces.get(name)).cloned();
        let known = o.namespaces.get(name);
        let absent = Namespace { uid: name.to_owned(), ..Namespace::default() };
        let ns = known.unwrap_or(&absent);
        let policies: Vec<(&str, &Policy)> = o
            .policies
            .range(key("")..)
            .take_while(|((n, _), _)| n == name)
            .map(|((_, n), p)| (n.as_str(), p))
            .collect();
        let exempt = o.settings.exempt_namespaces.iter().any(|e| e == name);
        let only = only.filter(|_| old.is_some());
        let own = match &old {
            Some(old) if only.is_some() => old.own.clone(),
            _ if exempt => Layer::empty(),
            old => {
                Layer::own(name, &policies, ns.has_allow.then_some(&ns.allow), self.now, old.as_ref().map(|s| &s.own))
            }
        };
        let cluster = match &old {
            Some(old) if !self.all && (only.is_some() || self.keeps(&old.cluster, &ns.labels)) => old.cluster.clone(),
            _ => self.cluster.clone(),
        };
        let audit = ns.audit && ns.audit_until.is_none_or(|end| self.now < end);
        let name: Arc<str> = match &old {
            Some(old) => old.pods.values().next().map(|r| r.who.namespace.clone()),
            None => None,
        }
        .unwrap_or_else(|| name.into());
        let place = Place {
            ns,
            exempt,
            own: own.clone(),
            relevant: relevant(&cluster, &ns.labels).map(|(id, _, p)| (id, p)).collect(),
            cluster: &cluster,
            enforced: policies.iter().copied().filter(|(_, p)| p.mode == PolicyMode::Enforce).collect(),
            audit,
            old: old.as_deref(),
            name: name.clone(),
        };
        let mut changed = Vec::new();
        let mut space = match (only, &old) {
            (Some(pods), Some(old)) => {
                let mut space = Space::clone(old);
                for pod in pods {
                    let before = space.pods.get(*pod).cloned();
                    if let Some(before) = &before {
                        space.leave(&before.kind);
                    }
                    let found = o.pods.get(&key(pod)).filter(|p| !p.host_network);
                    let new = found.map(|p| {
                        let kind = self.kind(&space, &place, &p.labels);
                        space.join(&kind);
                        self.resident(&place, pod, p, &kind, before.as_ref())
                    });
                    let pod = new.as_ref().or(before.as_ref()).map(|r| r.who.pod.clone());
                    changed.extend(pod.and_then(|pod| space.set(&pod, new)));
                }
                space
            }
            _ => self.all_pods(&place, &mut changed),
        };
        let window = window(&own, ns, audit);
        space.finish(window.filter(|_| !exempt));
        let gone = known.is_none() && policies.is_empty() && space.pods.is_empty();
        let same = changed.is_empty() && !gone && old.as_ref().is_some_and(|old| space.is(old));
        if same || (gone && old.is_none()) {
            return;
        }
        for (before, after) in changed {
            self.claim(before, after);
        }
        self.replaced.push((name, old, (!gone).then(|| Arc::new(space))));
    }

    fn all_pods(&mut self, place: &Place<'a, '_>, changed: &mut Vec<(Option<Resident>, Option<Resident>)>) -> Space {
        let known = place.old.map(|old| old.pods.clone()).unwrap_or_default();
        let mut space = Space {
            own: place.own.clone(),
            cluster: place.cluster.clone(),
            kinds: Vec::new(),
            pods: known,
            strictest: self.strictest(place),
            issues: Vec::new(),
            window: None,
        };
        let first = (place.name.to_string(), String::new());
        let pods = self.o.pods.range(first..).take_while(|((n, _), _)| **n == *place.name);
        // What a pod is follows from its labels.
        let mut by_labels: BTreeMap<&Labels, Arc<Kind>> = BTreeMap::new();
        let mut seen: HashSet<&str, ahash::RandomState> = HashSet::default();
        // Its address is the node's where it is on the host's network: not managed.
        for ((_, pod), p) in pods.filter(|(_, p)| !p.host_network) {
            let kind = match by_labels.get(&p.labels) {
                Some(k) => k.clone(),
                None => by_labels.entry(&p.labels).or_insert(self.kind(&space, place, &p.labels)).clone(),
            };
            space.join(&kind);
            let before = space.pods.get(pod.as_str());
            let resident = self.resident(place, pod, p, &kind, before);
            seen.insert(pod);
            changed.extend(space.set(&resident.who.pod.clone(), Some(resident)));
        }
        if space.pods.len() > seen.len() {
            let gone: Vec<Arc<str>> = space.pods.keys().filter(|p| !seen.contains(&***p)).cloned().collect();
            changed.extend(gone.iter().filter_map(|pod| space.set(pod, None)));
        }
        space
    }

    /// Whether a namespace with these labels may keep a layer: what concerns it is the same in the present one.
    fn keeps(&self, layer: &Arc<Layer>, labels: &Labels) -> bool {
        let concerns = |l| relevant(l, labels).map(|(_, name, p)| (name, p));
        Arc::ptr_eq(layer, &self.cluster) || (layer.in_time(self.now) && concerns(layer).eq(concerns(&self.cluster)))
    }

    fn resident(
        &mut self,
        place: &Place<'a, '_>,
        pod: &str,
        p: &'a Pod,
        kind: &Arc<Kind>,
        before: Option<&Resident>,
    ) -> Resident {
        let who = match before {
            Some(r) if *r.who.node == *p.node => r.who.clone(),
            before => Arc::new(Who {
                namespace: place.name.clone(),
                pod: before.map_or_else(|| pod.into(), |r| r.who.pod.clone()),
                node: self.node(&p.node),
            }),
        };
        Resident {
            who,
            addresses: p.addresses.iter().copied().collect(),
            kind: kind.clone(),
            ending: p.ending,
            alien: p.mirror && !self.o.settings.trust_mirror_pods,
        }
    }

    fn kind(&mut self, space: &Space, place: &Place<'a, '_>, labels: &Labels) -> Arc<Kind> {
        if place.exempt {
            let old = place.old.filter(|old| old.kinds.len() == 1).map(|old| &old.kinds[0].0);
            let untouched = old.filter(|k| k.is(&Kind::untouched(Selection::default())));
            return match space.kinds.first() {
                Some((kind, _)) => kind.clone(),
                None => untouched.cloned().unwrap_or_else(|| Arc::new(Kind::untouched(Selection::default()))),
            };
        }
        let selection = self.select(place, labels);
        if let Ok(at) = space.find(&selection) {
            return space.kinds[at].0.clone();
        }
        let new = self.new_kind(space, place, selection);
        let old = place.old.and_then(|old| old.find(&new.selection).ok().map(|at| &old.kinds[at].0));
        old.filter(|k| k.is(&new)).cloned().unwrap_or_else(|| Arc::new(new))
    }

    fn new_kind(&mut self, space: &Space, place: &Place<'a, '_>, selection: Selection) -> Kind {
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
            (false, false) => return Kind::untouched(selection),
        };
        let audit = place.audit || (!own && by_default && default == ClusterDefault::Audit);
        let mut issues = Vec::new();
        ties(place.cluster, &selection, &mut issues);
        let pool = self.pool(place, &selection, &mut issues);
        let scope = self.scope(space, place, pool);
        let key = group_key(&scope, &selection);
        let parts = GroupParts { key, scope, selection: selection.clone(), touch, audit };
        let old = place.old.and_then(|old| old.groups().find(|g| g.key() == key));
        let group = match old {
            Some(g) if g.same_parts(&parts) => g.clone(),
            Some(g) => Arc::new(Group::new(parts, g.index(), Some(g))),
            None => Arc::new(Group::new(parts, self.slots.take(), None)),
        };
        Kind { selection, touch, group: Some(group), issues }
    }

    /// The strictest that a pod of the namespace may be, whatever its labels.
    fn strictest(&self, place: &Place<'_, '_>) -> Touch {
        if place.exempt || place.audit {
            return Touch::Untouched;
        }
        let isolated = self.o.settings.cluster_default == ClusterDefault::Isolated;
        if isolated || place.ns.managed || place.ns.has_allow || !place.enforced.is_empty() {
            Touch::Isolated
        } else if place.relevant.iter().any(|(_, p)| !p.subject_lost) {
            Touch::Guarded
        } else {
            Touch::Untouched
        }
    }

    fn select(&self, place: &Place<'_, '_>, labels: &Labels) -> Selection {
        let mut own: Vec<u32> = (0..)
            .zip(&place.enforced)
            .filter(|(_, (_, p))| p.pod_selector.matches(labels))
            .map(|(i, _): (u32, _)| i)
            .collect();
        if place.ns.has_allow {
            own.push(place.enforced.len() as u32);
        }
        let isolated =
            !own.is_empty() || place.ns.managed || self.o.settings.cluster_default == ClusterDefault::Isolated;
        let mut s = Selection { own, ..Selection::default() };
        let of = |lost: bool| {
            place.relevant.iter().copied().filter(move |(_, p)| p.subject_lost == lost && p.pods.matches(labels))
        };
        let mut add = |(id, p): (u32, &ClusterPolicy)| {
            match p.tier {
                Tier::Admin => s.admin.push((p.priority, id)),
                Tier::Baseline => s.baseline.push((p.priority, id)),
            }
            if p.ceiling.is_some() {
                s.ceilings.push(id);
            }
        };
        let mut guarded = false;
        of(false).for_each(|p| {
            guarded = true;
            add(p);
        });
        if isolated || guarded {
            of(true).for_each(add);
        }
        s.admin.sort_unstable();
        s.baseline.sort_unstable();
        s.ceilings.sort_unstable();
        s
    }

    /// The pool of a pod: of its policies the oldest, then the first by name; the annotation; the built-in one.
    fn pool(&self, place: &Place<'a, '_>, selection: &Selection, issues: &mut Vec<Issue>) -> &'a str {
        let o = self.o;
        let policies = selection.own.iter().filter_map(|id| place.enforced.get(*id as usize));
        let mut asks: Vec<(UnixSeconds, &str, &str)> =
            policies.filter_map(|(name, p)| Some((p.created, *name, p.pool.as_deref()?))).collect();
        asks.sort_unstable();
        let who = |kind, name: &str| PolicyRef { kind, namespace: place.name.clone(), name: name.into() };
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
            issues.push(Issue { kind, policy: who("EgressPolicy", name), path: "poolRef".into(), reason, by });
        }
        if let Some(w) = winner {
            return w;
        }
        if let Some(pool) = &place.ns.pool {
            match self.admits(place, pool) {
                Ok(found) => return found,
                Err(reason) => issues.push(Issue {
                    kind: IssueKind::Refused,
                    policy: who("Namespace", &place.name),
                    path: "tidegate.dev/pool".into(),
                    reason,
                    by: Some(pool.as_str().into()),
                }),
            }
        }
        o.pools.get_key_value(DEFAULT_POOL).map_or(DEFAULT_POOL, |(k, _)| k.as_str())
    }

    /// The pool's name, if it exists and admits the namespace.
    fn admits(&self, place: &Place<'_, '_>, pool: &str) -> Result<&'a str, IssueReason> {
        match self.o.pools.get_key_value(pool) {
            _ if pool == DEFAULT_POOL => Ok(DEFAULT_POOL),
            None => Err(IssueReason::PoolUnknown),
            Some((name, p)) => {
                let ok = p.allowed_namespaces.as_ref().is_some_and(|s| s.matches(&place.ns.labels));
                if ok { Ok(name) } else { Err(IssueReason::PoolNotAllowed) }
            }
        }
    }

    fn scope(&self, space: &Space, place: &Place<'_, '_>, pool: &str) -> Arc<Scope> {
        let uid = if place.ns.uid.is_empty() { &*place.name } else { &*place.ns.uid };
        let key = ScopeKey(KeyHasher::new("scope").field(uid.as_bytes()).field(pool.as_bytes()).finish());
        if let Some(g) = space.groups().find(|g| g.scope().key() == key) {
            return g.scope().clone();
        }
        let source = self.o.pools.get(pool).map_or(AddressSource::PodNetwork, |p: &Pool| p.source.clone());
        let assigned = self.o.assigned.get(&(place.name.to_string(), pool.to_owned()));
        let pair = pair(key, &source, assigned);
        let mut new = Scope {
            key,
            namespace: place.name.clone(),
            uid: uid.into(),
            pool: pool.into(),
            source,
            pair,
            own: place.own.clone(),
            cluster: place.cluster.clone(),
            relevant: place.relevant.iter().map(|(id, _)| *id).collect(),
            registry: self.registry.clone(),
            dns_filter: self.o.settings.dns_filter,
            ahead: Arc::default(),
        };
        let old = place.old.and_then(|old| old.groups().map(|g| g.scope()).find(|s| s.key() == key));
        let Some(old) = old.filter(|s| s.same_classes(&new)) else { return Arc::new(new) };
        if old.same_way(&new) && old.dns_filter == new.dns_filter {
            return old.clone();
        }
        new.ahead = old.ahead.clone();
        Arc::new(new)
    }
}

/// Policies that select a live pod together, at equal priority.
fn ties(cluster: &Layer, s: &Selection, issues: &mut Vec<Issue>) {
    for tier in [&s.admin, &s.baseline] {
        for run in tier.chunk_by(|a, b| a.0 == b.0) {
            for (i, (_, a)) in run.iter().enumerate() {
                for (_, b) in &run[i + 1..] {
                    let (a, b) = (cluster.policy(*a), cluster.policy(*b));
                    let ((d1, a1), (d2, a2)) = (a.actions, b.actions);
                    if !(d1 && a2 || a1 && d2) {
                        continue;
                    }
                    issues.extend([(a, b), (b, a)].map(|(x, y)| Issue {
                        kind: IssueKind::Conflicted,
                        policy: x.who.clone(),
                        path: "priority".into(),
                        reason: IssueReason::EqualPriority,
                        by: Some(y.who.name.clone()),
                    }));
                }
            }
        }
    }
}

/// The cluster policies whose namespace selector takes a namespace: their place in the layer, their name, and themselves.
fn relevant<'l>(layer: &'l Layer, labels: &Labels) -> impl Iterator<Item = (u32, &'l str, &'l ClusterPolicy)> {
    let all = (0..).zip(layer.subjects()).map(|(id, (name, p))| (id, name, p));
    all.filter(|(_, _, p)| p.namespaces.matches(labels))
}

/// When time changes something.
fn window(own: &Layer, ns: &Namespace, audit: bool) -> Option<Window> {
    let rules = own.window();
    let end = ns.audit_until.filter(|_| ns.audit);
    if rules.is_none() && end.is_none() {
        return None;
    }
    let rules = rules.unwrap_or(Window { from: None, until: None });
    let (from, until) = if audit { (None, end) } else { (end, None) };
    Some(Window { from: rules.from.max(from), until: rules.until.into_iter().chain(until).min() })
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

fn group_key(scope: &Scope, s: &Selection) -> crate::GroupKey {
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
    crate::GroupKey(h.finish())
}
