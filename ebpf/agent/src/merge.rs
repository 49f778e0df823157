//! What the node's kernel should hold, out of what every gateway says. Pure.
//!
//! Rules:
//! - A scope belongs to the claim with the highest epoch. Its entries (endpoints, groups, grants) come from its
//!   owner; what an older epoch says is dropped. A gateway other than the owner speaks for it only in what the
//!   owner has not told yet: while the owner is silent others answer for it, and the grants of classes that only they
//!   know hold beside its own.
//! - Nodes, gateways, cluster values and names are the union of all live gateways.
//! - A gateway that is away keeps its word for the scopes that it still owns. When no gateway is there, the last
//!   known good of all of them holds.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tidegate_policy::shards::Shards;
use tidegate_policy::state::{Cluster, Endpoint, Entry, EntryKey, Named, NodeState, Touch};
use tidegate_policy::{ClassKey, GroupKey, PortSet, ScopeKey};

/// How long a grant that came with a fact outlives a snapshot that lacks it: the two streams race, and the next
/// delta names it.
const AHEAD: Duration = Duration::from_secs(2);

/// Why an update is refused; the stream must begin anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UpdateError {
    /// A delta came before a snapshot, or for another boot of the gateway.
    #[error("a delta without its snapshot")]
    NoSnapshot,
    /// The sequence did not grow.
    #[error("sequence {got} after {last}")]
    Sequence {
        /// The last sequence seen.
        last: u64,
        /// What came.
        got: u64,
    },
}

/// One update of a gateway's model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Update {
    /// The gateway's boot.
    pub boot: u64,
    /// Position in the gateway's `State` stream.
    pub sequence: u64,
    /// Whether it replaces all before.
    pub snapshot: bool,
    /// Entries to set.
    pub set: Vec<Entry>,
    /// Entries to delete.
    pub delete: Vec<EntryKey>,
}

/// What one gateway has said.
#[derive(Debug, Default)]
pub struct Model {
    state: NodeState,
    boot: u64,
    sequence: u64,
    /// Whether this connection has begun with a snapshot.
    synced: bool,
    /// Whether any snapshot ever came.
    known: bool,
    /// Grants that came with facts and in no update yet, and when; of this boot.
    ahead: BTreeMap<(GroupKey, ClassKey), Duration>,
    ahead_boot: u64,
}

impl Model {
    /// Whether a snapshot has come on the present connection.
    pub fn live(&self) -> bool {
        self.synced
    }

    /// Whether there is a last known good.
    pub fn known(&self) -> bool {
        self.known
    }

    /// What the gateway said last.
    pub fn state(&self) -> &NodeState {
        &self.state
    }

    /// The stream ended: the state stays as last known good.
    pub fn away(&mut self) {
        self.synced = false;
    }

    /// Takes one update; `now` is monotonic.
    ///
    /// # Errors
    /// See [`UpdateError`]; nothing has changed then.
    pub fn update(&mut self, update: Update, now: Duration) -> Result<(), UpdateError> {
        if update.snapshot {
            let mut state = NodeState::default();
            if self.ahead_boot == update.boot {
                self.ahead.retain(|_, at| now.saturating_sub(*at) < AHEAD);
                for key in self.ahead.keys() {
                    if let Some(ports) = self.state.grants.get(key) {
                        state.grants.insert(*key, ports.clone());
                    }
                }
            } else {
                self.ahead.clear();
            }
            self.state = state;
            self.synced = true;
            self.known = true;
        } else if !self.synced || self.boot != update.boot {
            return Err(UpdateError::NoSnapshot);
        } else if update.sequence <= self.sequence {
            return Err(UpdateError::Sequence { last: self.sequence, got: update.sequence });
        }
        (self.boot, self.sequence) = (update.boot, update.sequence);
        for key in &update.delete {
            if let EntryKey::Grant(g, c) = key {
                self.ahead.remove(&(*g, *c));
            }
            self.state.delete(key);
        }
        for entry in update.set {
            if let Entry::Grant(g, c, _) = &entry {
                self.ahead.remove(&(*g, *c));
            }
            self.state.set(entry);
        }
        Ok(())
    }

    /// Takes grants that came with facts of the gateway's boot. Says whether anything changed.
    pub fn grants(&mut self, boot: u64, grants: Vec<Grant>, now: Duration) -> bool {
        let mut changed = false;
        if self.ahead_boot != boot {
            self.ahead.clear();
            self.ahead_boot = boot;
        }
        for (group, class, ports) in grants {
            let key = (group, class);
            if self.state.grants.get(&key) != Some(&ports) {
                self.state.grants.insert(key, ports);
                self.ahead.insert(key, now);
                changed = true;
            }
        }
        changed
    }
}

/// A group's grant of a class.
pub type Grant = (GroupKey, ClassKey, PortSet);

/// What the kernel takes at once of grants that came with facts, since the ack of the facts says that it can use them.
/// `ready`: it holds `merged`. Before that it holds what an earlier run was told, and nobody may have spoken of the groups
/// yet: what came holds beside that until then.
pub fn with_facts(came: Vec<Grant>, merged: &NodeState, ready: bool) -> Vec<Grant> {
    let take = |(group, class, ports)| match merged.grants.get(&(group, class)) {
        Some(merged) => Some((group, class, merged.clone())),
        None => (!ready).then_some((group, class, ports)),
    };
    came.into_iter().filter_map(take).collect()
}

/// One gateway's word in a merge.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// The gateway's name.
    pub name: &'a str,
    /// Whether its stream is up and in sync.
    pub live: bool,
    /// Whether it says nothing at the moment, so that others stand in for it.
    pub silent: bool,
    /// What it says.
    pub state: &'a NodeState,
}

/// How much a view of an endpoint counts: it is current, it is the owner's, it is the stricter.
type Rank = (bool, bool, bool);

/// What gateways say of something by name, put together at the cost of what has changed. Of what several say the greatest holds.
#[derive(Debug)]
struct Union<V> {
    said: Vec<(String, Shards<Arc<str>, V>)>,
    all: Shards<Arc<str>, V>,
}

impl<V> Default for Union<V> {
    fn default() -> Self {
        Self { said: Vec::new(), all: Shards::default() }
    }
}

impl<V: Copy + Ord> Union<V> {
    /// Follows these gateways to what they say now.
    fn follow<'a>(&mut self, now: impl Iterator<Item = (&'a str, &'a Shards<Arc<str>, V>)> + Clone)
    where
        V: 'a,
    {
        if !self.said.iter().map(|(name, _)| name.as_str()).eq(now.clone().map(|(name, _)| name)) {
            self.said = now.clone().map(|(name, _)| (name.to_owned(), Shards::default())).collect();
            self.all = Shards::default();
            // Mostly they say the same.
            if let (Some((_, said)), Some((_, all))) = (self.said.first_mut(), now.clone().next()) {
                *said = all.clone();
                self.all = all.clone();
            }
        }
        let mut changed: Vec<Arc<str>> = Vec::new();
        for ((_, said), (_, now)) in self.said.iter_mut().zip(now) {
            now.compare(said, |name, old, new| changed.extend((old != new).then(|| name.clone())));
            *said = now.clone();
        }
        for name in changed {
            match self.said.iter().filter_map(|(_, s)| s.get(&name).copied()).max() {
                Some(value) if self.all.get(&name) == Some(&value) => {}
                Some(value) => drop(self.all.insert(name, value)),
                None => drop(self.all.remove(&name)),
            }
        }
    }
}

/// Merges again and again: what a cluster has many of costs what has changed since the last time.
#[derive(Debug, Default)]
pub struct Merger {
    /// Of a namespace's new pods the strictest that anybody says.
    namespaces: Union<Touch>,
    /// A name leads inside only if nobody says otherwise.
    names: Union<Named>,
}

impl Merger {
    /// Merges what the gateways say. The order of `sources` does not matter.
    pub fn merge(&mut self, sources: &[Source<'_>]) -> NodeState {
        let mut sources = sources.to_vec();
        sources.sort_by_key(|s| s.name);
        let mut out = merge_policy(&sources);
        let any_live = sources.iter().any(|s| s.live);
        let speaks = sources.iter().filter(|s| s.live || !any_live);
        self.namespaces.follow(speaks.clone().map(|s| (s.name, &s.state.namespaces)));
        self.names.follow(speaks.map(|s| (s.name, &s.state.names)));
        (out.namespaces, out.names) = (self.namespaces.all.clone(), self.names.all.clone());
        out
    }
}

/// Merges what the gateways say. The order of `sources` does not matter.
pub fn merge(sources: &[Source<'_>]) -> NodeState {
    Merger::default().merge(sources)
}

/// All but what is by name, of sources in order.
fn merge_policy(sources: &[Source<'_>]) -> NodeState {
    let any_live = sources.iter().any(|s| s.live);
    let mut out = NodeState::default();

    // Scopes: the highest epoch; among equals the owner's own word, then a live one, then the smaller name.
    let mut claims: BTreeMap<ScopeKey, (u64, bool, bool, usize)> = BTreeMap::new();
    for (i, s) in sources.iter().enumerate().rev() {
        for (key, scope) in &s.state.scopes {
            let claim = (scope.epoch, scope.owner == s.name, s.live, i);
            let best = claims.entry(*key).or_insert(claim);
            if (claim.0, claim.1, claim.2) >= (best.0, best.1, best.2) {
                *best = claim;
            }
        }
    }
    // Who speaks for a scope: its owner where it knows the scope, else who made the claim.
    let mut speaker: BTreeMap<ScopeKey, usize> = BTreeMap::new();
    for (key, (_, _, _, i)) in &claims {
        let scope = &sources[*i].state.scopes[key];
        out.scopes.insert(*key, scope.clone());
        let owner = sources.iter().position(|s| s.name == scope.owner && s.state.scopes.contains_key(key));
        speaker.insert(*key, owner.unwrap_or(*i));
    }

    let speaks: Vec<bool> = sources.iter().map(|s| s.live || !any_live).collect();
    for (s, _) in sources.iter().zip(&speaks).filter(|(_, speaks)| **speaks) {
        for (name, node) in &s.state.nodes {
            let merged = out.nodes.entry(name.clone()).or_insert_with(|| node.clone());
            for a in &node.addresses {
                if !merged.addresses.contains(a) {
                    merged.addresses.push(*a);
                }
            }
        }
        for (name, gateway) in &s.state.gateways {
            let merged = out.gateways.entry(name.clone()).or_insert_with(|| gateway.clone());
            // A gateway's own word about itself is the best.
            if name == s.name {
                merged.node.clone_from(&gateway.node);
            }
            merged.control.extend(gateway.control.iter().copied());
        }
    }
    for node in out.nodes.values_mut() {
        node.addresses.sort_unstable();
    }
    // One may not have heard of all of them yet.
    for gateway in out.gateways.values_mut() {
        gateway.control.sort_unstable();
        gateway.control.dedup();
    }
    out.cluster = cluster(sources.iter().zip(&speaks).filter(|(_, speaks)| **speaks).map(|(s, _)| &s.state.cluster));

    // Endpoints, each with the source it came from. A view that is current beats one of a gateway that is away (the
    // address may have moved since), the scope's owner beats others, and a member beats an untouched pod: the
    // stricter view is safe until the owner has spoken.
    let mut chosen: BTreeMap<IpAddr, (Rank, usize, &Endpoint)> = BTreeMap::new();
    for (i, s) in sources.iter().enumerate() {
        for (ip, endpoint) in &s.state.endpoints {
            let by = endpoint.member.and_then(|(scope, _)| speaker.get(&scope)).copied();
            let owns = by == Some(i);
            if !owns && (!speaks[i] || by.is_some_and(|o| speaks[o] && sources[o].state.endpoints.contains_key(ip))) {
                continue;
            }
            let rank = (speaks[i], owns, endpoint.touch != Touch::Untouched);
            if chosen.get(ip).is_none_or(|(best, _, _)| rank > *best) {
                chosen.insert(*ip, (rank, i, endpoint));
            }
        }
    }

    let mut groups: BTreeSet<GroupKey> = BTreeSet::new();
    for (ip, (_, i, endpoint)) in chosen {
        out.endpoints.insert(ip, endpoint.clone());
        let Some((scope, group)) = endpoint.member else { continue };
        if !groups.insert(group) {
            continue;
        }
        let by = speaker.get(&scope).copied().filter(|b| sources[*b].state.groups.contains_key(&group)).unwrap_or(i);
        let from = sources[by].state;
        let Some(value) = from.groups.get(&group) else { continue };
        out.groups.insert(group, value.clone());
        for set in [value.admin, value.own].into_iter().flatten() {
            if let Some(prefixes) = from.prefixes.get(&set) {
                out.prefixes.entry(set).or_insert_with(|| prefixes.clone());
            }
        }
        let of_group = (group, ClassKey(0))..=(group, ClassKey(u128::MAX));
        out.grants.extend(from.grants.range(of_group.clone()).map(|(k, v)| (*k, v.clone())));
        if sources[by].silent {
            for s in sources.iter().filter(|s| s.live && !s.silent) {
                for (k, ports) in s.state.grants.range(of_group.clone()) {
                    out.grants.entry(*k).or_insert_with(|| ports.clone());
                }
            }
        }
    }
    out
}

/// The union of the cluster values; of what only narrows (NodePorts out, ping in) the narrower.
fn cluster<'a>(all: impl Iterator<Item = &'a Cluster>) -> Cluster {
    let mut out: Option<Cluster> = None;
    for c in all {
        let Some(o) = &mut out else {
            out = Some(c.clone());
            continue;
        };
        o.prefixes.extend(c.prefixes.iter().copied());
        o.dns.extend(c.dns.iter().copied());
        o.suffixes.extend(c.suffixes.iter().cloned());
        o.node_ports = match (o.node_ports, c.node_ports) {
            (Some((a, b)), Some((x, y))) => Some((a.min(x), b.max(y))),
            (a, b) => a.or(b),
        };
        o.ping &= c.ping;
    }
    let mut out = out.unwrap_or_default();
    out.prefixes.sort_unstable();
    out.prefixes.dedup();
    out.dns.sort_unstable();
    out.dns.dedup();
    out.suffixes.sort_unstable();
    out.suffixes.dedup();
    out
}

/// Whether `gateway` may still hold egress addresses by the node's view of ownership: it claims no scope with an
/// egress pair, or it still owns one of those that it claims. What nobody has claimed yet, at epoch 0, it does not lose
/// to who does.
pub fn may_hold(gateway: &str, claims: Option<&NodeState>, merged: &NodeState) -> bool {
    let Some(claims) = claims else { return true };
    let mut claimed = false;
    for (key, scope) in claims.scopes.iter().filter(|(_, s)| s.owner == gateway && s.pair != 0 && s.epoch > 0) {
        claimed = true;
        if merged.scopes.get(key).is_none_or(|m| m.owner == gateway && m.epoch <= scope.epoch) {
            return true;
        }
    }
    !claimed
}

#[cfg(test)]
#[path = "merge_tests.rs"]
mod tests;
