//! From objects to a world: which namespaces are compiled anew, and what of the whole changes with them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

use crate::class::{Registry, Scope};
use crate::decide::Group;
use crate::issue::{Issue, IssueKind, IssueReason, PolicyRef};
use crate::layer::Layer;
use crate::model::{Labels, Node, Objects, Selector, Touched, UnixSeconds};
use crate::ranges::Ranges;
use crate::shards::Shards;
use crate::space::{Resident, Space};
use crate::state::Touch;
use crate::world::{Endpoint, Known, Way, World, cluster_nets};
use crate::{GroupKey, ScopeKey};

/// Namespaces that changed cluster policies do not select keep the layer of before, until so many of those are alive.
const MAX_BEHIND: u32 = 16;

pub(crate) fn compile(o: &Objects, now: UnixSeconds, previous: Option<(&World, &Touched)>) -> World {
    let touched = previous.filter(|(w, t)| !t.all && w.cluster.in_time(now));
    let previous = previous.map(|(w, _)| w);
    let mut c = Compiler::new(o, now, previous, touched.map(|(_, t)| t));
    match touched.filter(|_| !c.all) {
        Some((world, touched)) => {
            let due = world.timed.iter().filter(|(_, w)| !w.holds(now)).map(|(name, _)| &**name);
            let selected = c.selected(world, &touched.cluster_policies);
            let whole = touched.namespaces.iter().map(String::as_str).chain(due).chain(selected);
            let whole: BTreeSet<&str> = whole.collect();
            whole.iter().for_each(|name| c.space(name, None));
            let mut pods: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
            for (namespace, pod) in touched.pods.iter().filter(|(namespace, _)| !whole.contains(namespace.as_str())) {
                pods.entry(namespace).or_default().push(pod);
            }
            pods.iter().for_each(|(namespace, pods)| c.space(namespace, Some(pods)));
        }
        None => {
            let mut names: BTreeSet<&str> = o.namespaces.keys().map(String::as_str).collect();
            names.extend(o.pods.keys().chain(o.policies.keys()).map(|(ns, _)| ns.as_str()));
            names.extend(previous.iter().flat_map(|p| p.spaces.keys()).map(|name| &**name));
            names.into_iter().for_each(|name| c.space(name, None));
        }
    }
    c.finish()
}

/// Groups by their index, which a group keeps for as long as there is one with its key.
#[derive(Clone, Debug, Default)]
pub(crate) struct Slots {
    /// Each has room for [`CHUNK`] groups.
    chunks: Vec<Arc<Vec<Option<Arc<Group>>>>>,
    free: Arc<Vec<u32>>,
    /// How many indices were given out.
    given: u32,
}

const CHUNK: usize = 64;

impl Slots {
    pub fn get(&self, index: u32) -> Option<&Arc<Group>> {
        let index = index as usize;
        self.chunks.get(index / CHUNK)?.get(index % CHUNK)?.as_ref()
    }

    /// An index that no group has.
    pub fn take(&mut self) -> u32 {
        if let Some(index) = Arc::make_mut(&mut self.free).pop() {
            return index;
        }
        self.given += 1;
        self.given - 1
    }

    fn set(&mut self, index: u32, group: Option<Arc<Group>>) {
        let (chunk, at) = (index as usize / CHUNK, index as usize % CHUNK);
        while self.chunks.len() <= chunk {
            self.chunks.push(Arc::new(vec![None; CHUNK]));
        }
        if group.is_none() {
            Arc::make_mut(&mut self.free).push(index);
        }
        Arc::make_mut(&mut self.chunks[chunk])[at] = group;
    }
}

/// A pod that has an address, by namespace and name.
type Claimant = (Arc<str>, Arc<str>);

/// An address that several pods have.
#[derive(Debug)]
pub(crate) struct Contested {
    claimants: Vec<Claimant>,
    /// What each of their nodes makes of it, by the nodes' names.
    pub at: Vec<Endpoint>,
    /// Whose it is, where that is certain.
    holder: Option<Endpoint>,
    pub issues: Vec<Issue>,
}

/// How good a pod's claim to an address is, the best last.
///
/// An address inside its node's pod range is worth more than any other: that range is the API server's word, and a kubelet
/// that writes a stranger's address into a status of its own has none for it. Then a pod that stays is worth more than one that
/// is being deleted: an address is given out anew when the network that had it is gone, so that of the old pod nobody sends
/// any more, even if it still has a name. Should it do so, its node judges what leaves by its interface, and the address is
/// another one's; on another node it is isolated.
fn merit(ip: IpAddr, r: &Resident, nodes: &BTreeMap<String, Node>) -> (bool, bool) {
    let inside = nodes.get(&*r.who.node).is_some_and(|n| n.pod_prefixes.iter().any(|net| net.contains(&ip)));
    (inside, !r.ending)
}

impl Contested {
    /// By their claimants, which are sorted by name. It belongs to those with the best claim. If they are pods of one group on
    /// one node, nothing is in doubt. Else nobody can tell whose packets these are: each node isolates the strictest of its own
    /// pods, and no rule allows it anything. So do the nodes of the others. Pods that nothing is denied to stay without a policy.
    fn new(ip: IpAddr, claimants: &[(Claimant, &Resident)], nodes: &BTreeMap<String, Node>) -> Self {
        let best = claimants.iter().map(|(_, r)| merit(ip, r, nodes)).max();
        let mut holders =
            claimants.iter().filter(|(_, r)| Some(merit(ip, r, nodes)) == best).map(|(_, r)| r.endpoint());
        let alike = |a: &Endpoint, b: &Endpoint| (&a.who.node, a.touch, a.member) == (&b.who.node, b.touch, b.member);
        let holder = holders.next().filter(|first| holders.all(|e| alike(&e, first)));
        let mut at: BTreeMap<&str, (Touch, Endpoint)> = BTreeMap::new();
        let doubted = |r: &Resident| holder.as_ref().is_none_or(|h| h.who.node != r.who.node);
        for (_, r) in claimants.iter().filter(|(_, r)| doubted(r)) {
            let strictness = r.strictness();
            if at.get(&*r.who.node).is_none_or(|(known, _)| strictness > *known) {
                at.insert(&r.who.node, (strictness, r.closed()));
            }
        }
        // It is true of those alone to whom nothing is allowed now.
        let closed = |r: &Resident| at.get(&*r.who.node).is_some_and(|(_, e)| e.touch == Touch::Isolated);
        let other = |n: usize| match &holder {
            Some(h) => format!("{}/{}", h.who.namespace, h.who.pod),
            None => {
                let (namespace, name) = &claimants[usize::from(n == 0)].0;
                format!("{namespace}/{name}")
            }
        };
        let issue = |(n, ((namespace, name), _)): (usize, &(Claimant, &Resident))| Issue {
            kind: IssueKind::Conflicted,
            policy: PolicyRef { kind: "Pod", namespace: namespace.clone(), name: name.clone() },
            path: "status.podIPs".into(),
            reason: IssueReason::DuplicateAddress,
            by: Some(other(n).into()),
        };
        let issues = claimants.iter().enumerate().filter(|(_, (_, r))| closed(r)).map(issue).collect();
        if let Some(h) = &holder {
            at.insert(&h.who.node, (h.touch, h.clone()));
        }
        let at = at.into_values().map(|(_, e)| e).collect();
        Self { issues, claimants: claimants.iter().map(|(who, _)| who.clone()).collect(), at, holder }
    }

    /// What gateways know of it: where it is in doubt the strictest of all, of equals the first by name.
    fn holder(&self) -> Option<&Endpoint> {
        let key = |e: &Endpoint| (std::cmp::Reverse(e.touch), e.who.namespace.clone(), e.who.pod.clone());
        self.holder.as_ref().or_else(|| self.at.iter().min_by_key(|e| key(e)))
    }
}

/// A namespace whose space changes.
type Replaced = (Arc<str>, Option<Arc<Space>>, Option<Arc<Space>>);

pub(crate) struct Compiler<'a> {
    pub o: &'a Objects,
    pub now: UnixSeconds,
    pub previous: Option<&'a World>,
    /// Whether every namespace is looked at.
    pub all: bool,
    nets: Arc<Ranges>,
    /// All cluster policies as they are now. A namespace that the changed ones do not select keeps the layer that it has.
    pub cluster: Arc<Layer>,
    behind: u32,
    pub registry: Arc<Registry>,
    pub slots: Slots,
    pub replaced: Vec<Replaced>,
    /// Addresses that a pod has no more, or has now.
    claims: Vec<(IpAddr, Claimant, bool)>,
    /// Whether the nodes may be others: then the claims to an address may have another worth.
    moved: bool,
    nodes: HashMap<&'a str, Arc<str>, ahash::RandomState>,
}

impl<'a> Compiler<'a> {
    fn new(o: &'a Objects, now: UnixSeconds, previous: Option<&'a World>, touched: Option<&Touched>) -> Self {
        let part = previous.zip(touched);
        let nets = match part {
            Some((p, t)) if !t.nodes => p.nets.clone(),
            _ => {
                let nets = cluster_nets(o);
                let same = previous.map(|p| &p.nets).filter(|n| ***n == nets).cloned();
                same.unwrap_or_else(|| Arc::new(nets))
            }
        };
        let cluster = match part {
            Some((p, t)) if t.cluster_policies.is_empty() => p.cluster.clone(),
            _ => Layer::cluster(&o.cluster_policies, now, previous.map(|p| &p.cluster)),
        };
        let (mut all, mut behind) = (part.is_none(), 0);
        if let Some((p, _)) = part {
            let moved = !Arc::ptr_eq(&p.cluster, &cluster);
            behind = p.behind + u32::from(moved);
            // Which of too many patterns count depends on all policies.
            let full = |l: &Layer| !l.issues.is_empty();
            all = moved && (behind >= MAX_BEHIND || full(&cluster) || full(&p.cluster));
        }
        if all {
            behind = 0;
        }
        Self {
            o,
            now,
            previous,
            all,
            nets,
            cluster,
            behind,
            registry: previous.map(|p| p.registry.clone()).unwrap_or_default(),
            slots: previous.map(|p| p.slots.clone()).unwrap_or_default(),
            replaced: Vec::new(),
            claims: Vec::new(),
            moved: part.is_none_or(|(_, t)| t.nodes),
            nodes: HashMap::default(),
        }
    }

    /// The namespaces of a world that changed cluster policies select, or selected.
    fn selected<'w>(&self, world: &'w World, names: &BTreeSet<String>) -> Vec<&'w str> {
        let both = |n: &String| (world.cluster.subject(n).cloned(), self.cluster.subject(n).cloned());
        let changed = names.iter().map(both).filter(|(old, new)| old != new);
        let changed: Vec<Selector> =
            changed.flat_map(|(old, new)| [old, new]).flatten().map(|p| p.namespaces).collect();
        let none = Labels::new();
        let labels = |ns: &str| self.o.namespaces.get(ns).map_or(&none, |ns| &ns.labels);
        let all = world.spaces.keys().map(|ns| &**ns).filter(|_| !changed.is_empty());
        all.filter(|ns| changed.iter().any(|s| s.matches(labels(ns)))).collect()
    }

    /// A node's name, shared by its pods.
    pub fn node(&mut self, name: &'a str) -> Arc<str> {
        self.nodes.entry(name).or_insert_with(|| name.into()).clone()
    }

    /// A pod changes.
    pub fn claim(&mut self, before: Option<Resident>, after: Option<Resident>) {
        for (resident, has) in [(before, false), (after, true)] {
            let Some(r) = resident else { continue };
            let who = (r.who.namespace.clone(), r.who.pod.clone());
            self.claims.extend(r.addresses.iter().map(|ip| (*ip, who.clone(), has)));
        }
    }

    fn finish(mut self) -> World {
        let mut spaces = self.previous.map(|p| p.spaces.clone()).unwrap_or_default();
        let mut timed = self.previous.map(|p| p.timed.clone()).unwrap_or_default();
        let mut flawed = self.previous.map(|p| p.flawed.clone()).unwrap_or_default();
        let mut strictest = self.previous.map(|p| p.strictest.clone()).unwrap_or_default();
        let mut scopes: Shards<ScopeKey, Arc<Scope>> = self.previous.map(|p| p.scopes.clone()).unwrap_or_default();
        let mut ways = self.previous.map(|p| p.ways.clone()).unwrap_or_default();
        let mut groups: Shards<GroupKey, Arc<Group>> = self.previous.map(|p| p.groups.clone()).unwrap_or_default();
        // First what is gone: a namespace that has another name now has the same scopes.
        for (name, old, new) in &self.replaced {
            let Some(old) = old else { continue };
            let stays: BTreeSet<GroupKey> = new.iter().flat_map(|s| s.groups()).map(|g| g.key()).collect();
            let scope_stays: BTreeSet<ScopeKey> =
                new.iter().flat_map(|s| s.groups()).map(|g| g.scope().key()).collect();
            for g in old.groups().filter(|g| !stays.contains(&g.key())) {
                self.slots.set(g.index(), None);
                if groups.get(&g.key()).is_some_and(|known| Arc::ptr_eq(known, g)) {
                    groups.remove(&g.key());
                }
            }
            for scope in old.groups().map(|g| g.scope()).filter(|s| !scope_stays.contains(&s.key())) {
                if scopes.get(&scope.key()).is_some_and(|known| known.namespace() == name)
                    && let Some(gone) = scopes.remove(&scope.key())
                {
                    leave(&mut ways, &gone);
                }
            }
        }
        for (name, _, new) in std::mem::take(&mut self.replaced) {
            let Some(new) = new else {
                spaces.remove(&name);
                timed.remove(&name);
                flawed.remove(&name);
                strictest.remove(&name);
                continue;
            };
            for g in new.groups() {
                if groups.get(&g.key()).is_none_or(|old| !Arc::ptr_eq(old, g)) {
                    groups.insert(g.key(), g.clone());
                    self.slots.set(g.index(), Some(g.clone()));
                }
                let scope = g.scope();
                if scopes.get(&scope.key()).is_none_or(|old| !Arc::ptr_eq(old, scope)) {
                    let old = scopes.insert(scope.key(), scope.clone());
                    // The latest, which knows what its pool is like now.
                    let (any, n) = ways.entry(way(scope)).or_insert((scope.clone(), 0));
                    any.clone_from(scope);
                    *n += 1;
                    if let Some(old) = old {
                        leave(&mut ways, &old);
                    }
                }
            }
            match new.window {
                Some(window) => drop(timed.insert(name.clone(), window)),
                None => drop(timed.remove(&name)),
            }
            match new.issues.is_empty() {
                false => drop(flawed.insert(name.clone(), ())),
                true => drop(flawed.remove(&name)),
            }
            if strictest.get(&name) != Some(&new.strictest) {
                strictest.insert(name.clone(), new.strictest);
            }
            spaces.insert(name, new);
        }
        let mut known = self.previous.map(|p| p.known.clone()).unwrap_or_default();
        self.claims.sort_by_key(|(ip, ..)| *ip);
        let changed = self.claims.chunk_by(|a, b| a.0 == b.0).filter_map(|run| Some((run.first()?.0, run)));
        let contested: Vec<IpAddr> = known.contested.keys().copied().filter(|_| self.moved).collect();
        for (ip, claims) in contested.iter().map(|ip| (*ip, &[][..])).chain(changed) {
            settle(ip, claims, self.o, &spaces, &mut known);
        }
        let ends = timed.values().filter_map(|w| w.until);
        World {
            now: self.now,
            next_change: ends.chain(self.cluster.window().and_then(|w| w.until)).min(),
            nets: self.nets,
            cluster: self.cluster,
            behind: self.behind,
            spaces,
            scopes,
            ways,
            groups,
            slots: self.slots,
            known,
            timed,
            flawed,
            strictest,
            names: self.o.names.clone(),
            issues: OnceLock::new(),
            registry: self.registry,
        }
    }
}

fn way(scope: &Scope) -> Way {
    (scope.pool().clone(), scope.pair())
}

/// One scope less leaves by its way.
fn leave(ways: &mut BTreeMap<Way, (Arc<Scope>, u32)>, scope: &Scope) {
    if let Some((_, n)) = ways.get_mut(&way(scope)) {
        *n -= 1;
        if *n == 0 {
            ways.remove(&way(scope));
        }
    }
}

/// Finds out whose an address is now.
fn settle(
    ip: IpAddr,
    claims: &[(IpAddr, Claimant, bool)],
    o: &Objects,
    spaces: &Shards<Arc<str>, Arc<Space>>,
    known: &mut Known,
) {
    let mut all: BTreeSet<Claimant> = match known.contested.get(&ip) {
        Some(c) => c.claimants.iter().cloned().collect(),
        None => known.endpoints.get(&ip).map(|e| (e.who.namespace.clone(), e.who.pod.clone())).into_iter().collect(),
    };
    for (_, who, has) in claims {
        if *has {
            all.insert(who.clone());
        } else {
            all.remove(who);
        }
    }
    let resident = |(namespace, pod): &Claimant| spaces.get(namespace)?.pods.get(pod);
    let all: Vec<(Claimant, &Resident)> = all.into_iter().filter_map(|c| Some((c.clone(), resident(&c)?))).collect();
    match all.as_slice() {
        [] => known.set(ip, None, None),
        [(_, one)] => known.set(ip, Some(one.endpoint()), None),
        several => {
            let contested = Contested::new(ip, several, &o.nodes);
            known.set(ip, contested.holder().cloned(), Some(contested));
        }
    }
}
