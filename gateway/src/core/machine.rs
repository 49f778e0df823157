//! What an edit costs: what a machine has to be told when one world follows the other. Pure.
//!
//! [`Desired::state`] says what a machine should hold; this says what differs, and looks only at what has changed.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ahash::AHashMap;
use tidegate_policy::state::{self, Entry, EntryKey, NodeState};
use tidegate_policy::world::{Changes, Group, Sight, World};
use tidegate_policy::{ClassKey, GroupKey, PortSet, PrefixSetKey, ScopeKey};
use tidegate_proto::{Pair, StateBatch};

use super::classes::Classes;
use super::sent::Sent;
use crate::desired::{Desired, Ownership, Target};

/// What the states of all machines follow from, as of `now` on the ledger's clock.
pub(super) struct Basis<'a> {
    desired: &'a Desired,
    world: &'a World,
    classes: &'a Classes,
    lingering: BTreeSet<(ScopeKey, ClassKey)>,
    claims: Arc<BTreeMap<Pair, Ownership>>,
    /// Grants that were found already: many machines need the same.
    grants: RefCell<AHashMap<(GroupKey, ClassKey), Option<PortSet>>>,
}

impl<'a> Basis<'a> {
    pub fn new(desired: &'a Desired, world: &'a World, classes: &'a Classes, now: Duration) -> Self {
        let (claims, lingering) = (desired.claims(), classes.lingering(now).collect());
        Self { desired, world, classes, lingering, claims, grants: RefCell::default() }
    }

    /// Whether the machine carries what this scope allows: of other gateways' scopes our own kernel takes only DNS.
    fn carries(&self, sight: Sight<'_>, scope: ScopeKey) -> bool {
        let Some(scope) = self.world.scope(scope) else { return false };
        sight.here.is_some() || self.desired.way_out(scope).is_some()
    }

    fn scope(&self, scope: ScopeKey) -> Option<state::Scope> {
        let scope = self.world.scope(scope)?;
        let claim = self.claims.get(&Desired::pair(scope)?)?;
        let way = self.desired.way_out(scope);
        Some(state::Scope {
            owner: claim.owner.clone(),
            epoch: claim.epoch,
            pair: way.map_or(u8::from(scope.pair().is_some()), |w| w.index),
            standbys: claim.standbys.clone(),
        })
    }

    fn group(&self, sight: Sight<'_>, group: &Group) -> state::Group {
        let carries = self.carries(sight, group.scope().key());
        let set = |set: Option<&(PrefixSetKey, _)>| set.filter(|_| carries).map(|(key, _)| *key);
        state::Group {
            isolated: group.touch() == state::Touch::Isolated,
            audit: group.audit(),
            admin: set(group.admin_prefixes()),
            own: set(group.own_prefixes()),
        }
    }

    /// The classes that facts of a scope have, and those that the next facts will have.
    pub fn live(&self, scope: ScopeKey) -> impl Iterator<Item = ClassKey> {
        let ahead = self.world.scope(scope).into_iter().flat_map(|s| s.single_rule_classes());
        let left = self.lingering.range((scope, ClassKey(0))..=(scope, ClassKey(u128::MAX))).map(|(_, class)| *class);
        ahead.chain(self.classes.of_facts(scope)).chain(left)
    }

    fn is_live(&self, scope: ScopeKey, class: ClassKey) -> bool {
        self.classes.has(scope, class)
            || self.lingering.contains(&(scope, class))
            || self.world.scope(scope).is_some_and(|s| s.is_ahead(class))
    }

    /// What a machine is told that a class grants to a group.
    fn grant(&self, sight: Sight<'_>, group: &Group, class: ClassKey) -> Option<PortSet> {
        let scope = group.scope().key();
        if !self.carries(sight, scope) || !self.is_live(scope, class) {
            return None;
        }
        let mut known = self.grants.borrow_mut();
        known.entry((group.key(), class)).or_insert_with(|| group.grant(class)).clone()
    }
}

/// What is other than it was when machines were told last.
#[derive(Debug, Default)]
pub(super) struct Delta {
    changes: Changes,
    /// Classes that the facts of a scope have now, or have no more.
    classes: BTreeSet<(ScopeKey, ClassKey)>,
    /// The changed endpoints, by the nodes where they are or were.
    by_node: AHashMap<Arc<str>, BTreeSet<IpAddr>>,
}

impl Delta {
    pub fn new(old: &World, new: &World, changes: Changes, classes: BTreeSet<(ScopeKey, ClassKey)>) -> Self {
        let mut by_node: AHashMap<Arc<str>, BTreeSet<IpAddr>> = AHashMap::new();
        for ip in &changes.endpoints {
            for e in old.endpoints_of(*ip).iter().chain(new.endpoints_of(*ip)) {
                by_node.entry(e.who.node.clone()).or_default().insert(*ip);
            }
        }
        Self { changes, classes, by_node }
    }

    fn endpoints(&self, sight: Sight<'_>) -> impl Iterator<Item = IpAddr> {
        let all = self.changes.endpoints.iter().filter(move |_| sight.everything);
        let here = sight.here.filter(|_| !sight.everything).and_then(|n| self.by_node.get(n));
        all.chain(here.into_iter().flatten()).copied()
    }
}

/// What of a machine's state refers to what.
#[derive(Debug, Default)]
pub(super) struct Uses {
    /// How many endpoints are of a group, and of a scope.
    groups: AHashMap<GroupKey, u32>,
    scopes: AHashMap<ScopeKey, u32>,
    /// How many groups refer to a prefix set.
    sets: AHashMap<PrefixSetKey, u32>,
    /// Grants that went with facts.
    pushed: BTreeSet<(GroupKey, ClassKey)>,
}

/// What a machine is told.
#[derive(Debug, Default)]
pub(super) struct News {
    /// What is referred to comes first.
    pub set: Vec<Entry>,
    pub delete: Vec<EntryKey>,
}

/// One more; says whether it is the first.
fn add<K: std::hash::Hash + Eq>(counts: &mut AHashMap<K, u32>, key: K) -> bool {
    let n = counts.entry(key).or_default();
    *n += 1;
    *n == 1
}

/// One less; says whether it was the last.
fn take<K: std::hash::Hash + Eq>(counts: &mut AHashMap<K, u32>, key: &K) -> bool {
    let Some(n) = counts.get_mut(key) else { return false };
    *n -= 1;
    if *n > 0 {
        return false;
    }
    counts.remove(key);
    true
}

/// Those of the keys that are counted, found from the shorter side.
fn counted<'a, K: std::hash::Hash + Eq + Ord + Copy>(
    keys: &'a BTreeSet<K>,
    counts: &'a AHashMap<K, u32>,
) -> impl Iterator<Item = K> {
    let fewer = keys.len() <= counts.len();
    let some = keys.iter().filter(move |k| fewer && counts.contains_key(*k));
    some.chain(counts.keys().filter(move |k| !fewer && keys.contains(*k))).copied()
}

impl Uses {
    /// Those of a whole state.
    pub fn of(state: &NodeState) -> Self {
        let mut uses = Self::default();
        for (scope, group) in state.endpoints.values().filter_map(|e| e.member) {
            add(&mut uses.scopes, scope);
            add(&mut uses.groups, group);
        }
        for set in state.groups.values().flat_map(|g| g.admin.iter().chain(&g.own)) {
            add(&mut uses.sets, *set);
        }
        uses
    }

    /// The state has grants that went with facts.
    pub fn pushed(&mut self, grants: impl Iterator<Item = (GroupKey, ClassKey)>) {
        self.pushed.extend(grants);
    }

    /// What brings a state from one world to the next. It must have been whole in the one before, and what all machines
    /// hold alike, and who owns what, must be as it was.
    pub fn follow(&mut self, held: &NodeState, b: &Basis<'_>, target: Target<'_>, d: &Delta) -> News {
        let sight = b.desired.sight(target);
        let mut step = Step { held, b, sight, told: Vec::new(), delete: Vec::new() };
        let (mut scopes, mut groups) = (BTreeSet::new(), BTreeSet::new());
        let endpoints = self.endpoints(&mut step, d, &mut scopes, &mut groups);
        scopes.extend(counted(&d.changes.scopes, &self.scopes));
        groups.extend(counted(&d.changes.groups, &self.groups));
        // Whether our own kernel carries a scope follows from its way out.
        let of_scopes = scopes.iter().flat_map(|s| b.world.groups_of(*s)).map(|g| g.key());
        groups.extend(of_scopes.filter(|g| self.groups.contains_key(g)));

        for key in scopes {
            let new = self.scopes.get(&key).and_then(|_| b.scope(key));
            step.put(held.scopes.get(&key), new, |s| Entry::Scope(key, s), EntryKey::Scope(key));
        }
        let mut grants = std::mem::take(&mut self.pushed);
        let mut sets = BTreeMap::new();
        for key in groups {
            let group = self.groups.get(&key).and_then(|_| b.world.group_by_key(key));
            let known = held.grants.range((key, ClassKey(0))..=(key, ClassKey(u128::MAX)));
            grants.extend(known.map(|(k, _)| *k));
            if let Some(scope) = group.map(|g| g.scope().key()) {
                grants.extend(b.live(scope).map(|class| (key, class)));
            }
            self.group(&mut step, key, group, &mut sets);
        }
        for (scope, class) in d.classes.iter().filter(|(scope, _)| self.scopes.contains_key(scope)) {
            let of_scope = b.world.groups_of(*scope).map(|g| g.key());
            grants.extend(of_scope.filter(|g| self.groups.contains_key(g)).map(|g| (g, *class)));
        }
        for (key, class) in grants {
            let group = self.groups.get(&key).and_then(|_| b.world.group_by_key(key));
            let new = group.and_then(|g| b.grant(sight, g, class));
            let old = held.grants.get(&(key, class));
            step.put(old, new, |ports| Entry::Grant(key, class, ports), EntryKey::Grant(key, class));
        }
        // No gateway has pods of its own.
        for name in d.changes.namespaces.iter().filter(|_| sight.here.is_some()) {
            let (old, new) = (held.namespaces.get(name), b.world.strictest().get(name).copied());
            let named = || name.to_string();
            step.put(old, new, |touch| Entry::Namespace(named(), touch), EntryKey::Namespace(named()));
        }
        for name in d.changes.names.iter().filter(|_| sight.here.is_some()) {
            let (old, new) = (held.names.get(name), b.world.names().get(name).copied());
            let named = || name.to_string();
            step.put(old, new, |to| Entry::Name(named(), to), EntryKey::Name(named()));
        }
        let others = std::mem::take(&mut step.told);
        for (key, prefixes) in sets {
            let new = prefixes.filter(|_| self.sets.contains_key(&key));
            // A set's key says what it holds.
            match (held.prefixes.contains_key(&key), new) {
                (false, Some(new)) => step.told.push(Entry::Prefixes(key, new.as_ref().clone())),
                (true, _) if !self.sets.contains_key(&key) => step.delete.push(EntryKey::Prefixes(key)),
                _ => {}
            }
        }
        let set = step.told.into_iter().chain(others).chain(endpoints).collect();
        News { set, delete: step.delete }
    }

    fn endpoints(
        &mut self,
        step: &mut Step<'_, '_>,
        d: &Delta,
        scopes: &mut BTreeSet<ScopeKey>,
        groups: &mut BTreeSet<GroupKey>,
    ) -> Vec<Entry> {
        for ip in d.endpoints(step.sight) {
            let (old, new) =
                (step.held.endpoints.get(&ip), step.b.world.seen(step.sight, ip).map(state::Endpoint::from));
            if let Some((scope, group)) = new.as_ref().and_then(|e| e.member) {
                scopes.extend(add(&mut self.scopes, scope).then_some(scope));
                groups.extend(add(&mut self.groups, group).then_some(group));
            }
            if let Some((scope, group)) = old.and_then(|e| e.member) {
                scopes.extend(take(&mut self.scopes, &scope).then_some(scope));
                groups.extend(take(&mut self.groups, &group).then_some(group));
            }
            step.put(old, new, |e| Entry::Endpoint(ip, e), EntryKey::Endpoint(ip));
        }
        std::mem::take(&mut step.told)
    }

    fn group(
        &mut self,
        step: &mut Step<'_, '_>,
        key: GroupKey,
        group: Option<&Arc<Group>>,
        sets: &mut BTreeMap<PrefixSetKey, Option<Arc<state::Prefixes>>>,
    ) {
        let new = group.map(|g| step.b.group(step.sight, g));
        let old = step.held.groups.get(&key);
        let refers = |g: &state::Group| g.admin.into_iter().chain(g.own).collect::<Vec<_>>();
        for set in new.iter().flat_map(refers) {
            add(&mut self.sets, set);
            let mut known = group.into_iter().flat_map(|g| [g.admin_prefixes(), g.own_prefixes()]).flatten();
            sets.insert(set, known.find(|(k, _)| *k == set).map(|(_, p)| p.clone()));
        }
        for set in old.into_iter().flat_map(refers) {
            take(&mut self.sets, &set);
            sets.entry(set).or_default();
        }
        step.put(old, new, |g| Entry::Group(key, g), EntryKey::Group(key));
    }
}

/// One step of one machine.
struct Step<'a, 'b> {
    held: &'a NodeState,
    b: &'a Basis<'b>,
    sight: Sight<'a>,
    told: Vec<Entry>,
    delete: Vec<EntryKey>,
}

impl Step<'_, '_> {
    /// Notes what an entry is to be if it is not that yet.
    fn put<V: PartialEq>(&mut self, old: Option<&V>, new: Option<V>, entry: impl FnOnce(V) -> Entry, key: EntryKey) {
        match new {
            new if old == new.as_ref() => {}
            Some(new) => self.told.push(entry(new)),
            None => self.delete.push(key),
        }
    }
}

impl Sent {
    /// What is told of an edit.
    pub fn news(&mut self, gateway: &str, boot_id: u64, news: News) -> Option<StateBatch> {
        let News { set, delete } = news;
        if set.is_empty() && delete.is_empty() {
            return None;
        }
        take_news(&mut self.state, &set, &delete);
        self.sequence += 1;
        let (gateway, sequence) = (gateway.to_owned(), self.sequence);
        Some(StateBatch { gateway, boot_id, sequence, snapshot: false, more: false, set, delete })
    }
}

/// Carries out what was told.
pub(super) fn take_news(state: &mut NodeState, set: &[Entry], delete: &[EntryKey]) {
    delete.iter().for_each(|key| state.delete(key));
    set.iter().for_each(|entry| state.set(entry.clone()));
}

#[cfg(test)]
#[path = "machine/tests.rs"]
mod tests;
