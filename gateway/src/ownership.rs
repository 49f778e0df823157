//! Who owns which egress pair: the rules of failover without a lease or a wall clock. Pure: time is an argument.
//!
//! - Every pair has candidates in the same order on each gateway: the one it is pinned to, then rendezvous order.
//! - Who serves a pair claims it with an epoch; claims travel with the beats of the gateways. The highest epoch wins,
//!   of equal ones the smaller name (as the nodes follow them); the loser lets go. A returning owner finds a live claim and
//!   takes nothing.
//! - A gateway is dead when nothing came from it for 2 s and most of the connected agents do not see it either. While
//!   only one of the two holds, nothing moves: two gateways that cannot see each other are not two owners.
//! - A pair that no live gateway holds goes to the first candidate that lives and is able, with the highest epoch that
//!   anybody knows plus one.
//! - A gateway that has lost its peers and most of its agents lets go: whoever is with the agents takes over. When some
//!   of them are back it takes nothing until a peer has spoken, or had the time to: the first agent that returns knows
//!   no more than that there is a higher epoch.
//! - A gateway that cannot serve for 2 s, as one whose node's agent is dead cannot, lets go if another one can.
//! - One that is told to end says so, takes nothing more, and carries on until another one has its pairs in place.
//! - What a new owner has not in place yet only that owner goes by, and says to others: nodes follow the highest epoch,
//!   whoever tells them. Its own word, or a second, ends that.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tidegate_proto::{Beat, Claim, Pair};

/// Silence that is taken for death.
pub const SILENCE: Duration = Duration::from_secs(2);
/// How long everybody waits at most until what a new owner needs is in place.
pub const PLACE: Duration = Duration::from_secs(1);
/// How long a candidate that lives may take until it is able, when nobody ever held the pair: gateways start
/// at different speeds, and the first of the order should be it.
const PATIENCE: Duration = Duration::from_secs(10);

/// So long after a claim it still gives way to epochs that nodes report.
const CORRECT: Duration = Duration::from_secs(5);
/// How far above the known epoch a node's word may be.
const MAX_STEP: u64 = 1 << 20;

#[derive(Debug, Default)]
struct Peer {
    /// When its last beat came; absent if never.
    heard: Option<Duration>,
    /// Since when it lives without being able.
    unable: Option<Duration>,
    /// Whether it is about to end.
    leaving: bool,
    /// What it serves.
    holds: BTreeMap<Pair, u64>,
    /// Whether its facts' snapshot has come.
    synced: bool,
}

#[derive(Debug)]
struct Agent {
    sees: BTreeSet<String>,
    /// The lowest epoch that its node follows, of each pair.
    follows: BTreeMap<Pair, u64>,
}

/// Who owns a pair, as far as this gateway knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// The owner.
    pub owner: String,
    /// Its epoch.
    pub epoch: u64,
}

impl Known {
    /// Whether it wins against another claim.
    fn beats(&self, other: &Self) -> bool {
        self.epoch > other.epoch || self.epoch == other.epoch && self.owner < other.owner
    }
}

/// The state machine of one gateway.
#[derive(Debug)]
pub struct Ownership {
    me: String,
    started: Duration,
    peers: BTreeMap<String, Peer>,
    agents: BTreeMap<String, Agent>,
    /// Every agent that was ever connected, of nodes that are part of the cluster.
    ever: BTreeSet<String>,
    /// Pairs that policy has, with their candidates.
    pairs: BTreeMap<Pair, Vec<String>>,
    known: BTreeMap<Pair, Known>,
    /// Higher claims of others that are not in place yet, and when they were first heard.
    coming: BTreeMap<Pair, (Known, Duration)>,
    /// What was held and known at the last decision.
    decided: (BTreeMap<Pair, Duration>, BTreeMap<Pair, Known>),
    /// The highest epochs that agents follow.
    floors: BTreeMap<Pair, u64>,
    /// What this gateway serves, and since when.
    held: BTreeMap<Pair, Duration>,
    able: bool,
    /// Since when this gateway has not been able.
    unable: Option<Duration>,
    /// When this gateway last saw neither a peer nor most of its agents.
    cut_off: Option<Duration>,
    /// Whether it is about to end.
    leaving: bool,
}

impl Ownership {
    /// A gateway among `peers`, which has started at `now`.
    pub fn new(me: &str, peers: impl IntoIterator<Item = String>, now: Duration) -> Self {
        Self {
            me: me.to_owned(),
            started: now,
            peers: peers.into_iter().filter(|p| p != me).map(|p| (p, Peer::default())).collect(),
            agents: BTreeMap::new(),
            ever: BTreeSet::new(),
            pairs: BTreeMap::new(),
            known: BTreeMap::new(),
            coming: BTreeMap::new(),
            decided: Default::default(),
            floors: BTreeMap::new(),
            held: BTreeMap::new(),
            able: false,
            unable: None,
            cut_off: None,
            leaving: false,
        }
    }

    /// Claims of an earlier run: their epochs are a floor.
    pub fn recall(&mut self, claims: Vec<Claim>) {
        for c in claims {
            self.note(c.pair, Known { owner: c.owner, epoch: c.epoch });
        }
    }

    /// The pairs of policy with their candidates in order. Those that are gone are let go.
    pub fn set_pairs(&mut self, pairs: BTreeMap<Pair, Vec<String>>) {
        self.held.retain(|p, _| pairs.contains_key(p));
        self.floors.retain(|p, _| pairs.contains_key(p));
        self.pairs = pairs;
    }

    /// The nodes of the cluster: an agent of a node that is gone is not lost.
    pub fn set_nodes(&mut self, is_node: impl Fn(&str) -> bool) {
        self.ever.retain(|n| is_node(n));
    }

    /// Whether this is another gateway of the cluster.
    pub fn is_peer(&self, name: &str) -> bool {
        self.peers.contains_key(name)
    }

    /// Whether this gateway could serve a pair.
    pub fn set_able(&mut self, able: bool) {
        self.able = able;
    }

    /// This gateway is about to end: it takes nothing any more, and others may take what it holds.
    pub fn leave(&mut self) {
        self.leaving = true;
    }

    /// Whether it is about to end.
    pub fn leaving(&self) -> bool {
        self.leaving
    }

    /// Whether a gateway that is about to end has nothing more to wait for: no other one could take over, or all is
    /// taken and every connected node follows.
    pub fn left(&self, now: Duration) -> bool {
        let follows =
            |a: &Agent| a.follows.iter().all(|(p, epoch)| self.known.get(p).is_none_or(|k| *epoch >= k.epoch));
        !self.has_heir(now) || self.held.is_empty() && self.agents.values().all(follows)
    }

    /// A beat of another gateway came.
    pub fn beat(&mut self, peer: &str, beat: &Beat, now: Duration) {
        let Some(p) = self.peers.get_mut(peer) else { return };
        p.heard = Some(now);
        p.unable = if beat.able { None } else { p.unable.or(Some(now)) };
        p.leaving = beat.leaving;
        p.holds = beat.claims.iter().filter(|c| c.held && c.owner == peer).map(|c| (c.pair.clone(), c.epoch)).collect();
        for c in &beat.claims {
            let claim = Known { owner: c.owner.clone(), epoch: c.epoch };
            // Of what others own it says only what is in place. One that serves the pair and does not leave yields at once.
            let waits = beat.placing && c.held && c.owner == peer && (self.leaving || !self.held.contains_key(&c.pair));
            if !waits {
                self.note(c.pair.clone(), claim);
            } else if self.known.get(&c.pair).is_none_or(|k| claim.beats(k))
                && self.coming.get(&c.pair).is_none_or(|(k, _)| claim.beats(k))
            {
                self.coming.insert(c.pair.clone(), (claim, now));
            }
        }
    }

    /// Another gateway's facts have come in whole.
    pub fn synced(&mut self, peer: &str) {
        if let Some(p) = self.peers.get_mut(peer) {
            p.synced = true;
        }
    }

    /// An agent said which gateways it sees, and the highest epochs of the pairs that its node follows.
    pub fn seen(&mut self, node: &str, sees: BTreeSet<String>, epochs: impl IntoIterator<Item = (Pair, u64)>) {
        self.ever.insert(node.to_owned());
        let mut follows = BTreeMap::new();
        for (pair, epoch) in epochs {
            let lowest = follows.entry(pair.clone()).or_insert(epoch);
            *lowest = epoch.min(*lowest);
            // A node may follow an epoch that no gateway knows any more; one that lies must not use the numbers up.
            let most = self.known.get(&pair).map_or(0, |k| k.epoch).saturating_add(MAX_STEP);
            let floor = self.floors.entry(pair).or_default();
            *floor = (*floor).max(epoch.min(most));
        }
        self.agents.insert(node.to_owned(), Agent { sees, follows });
    }

    /// An agent's stream ended.
    pub fn agent_gone(&mut self, node: &str) {
        self.agents.remove(node);
    }

    /// Whether the start is over: every peer's facts have come, or the time for that is over.
    pub fn settled(&self, now: Duration) -> bool {
        now.saturating_sub(self.started) >= SILENCE || self.peers.values().all(|p| p.synced && p.heard.is_some())
    }

    /// Decides at `now`; says whether anything that this gateway holds, or knows of owners, may have changed.
    pub fn tick(&mut self, now: Duration) -> bool {
        let late = |(_, since): &(Known, Duration)| now.saturating_sub(*since) >= PLACE;
        let late: Vec<Pair> = self.coming.iter().filter(|(_, c)| late(c)).map(|(p, _)| p.clone()).collect();
        for pair in late {
            if let Some((claim, _)) = self.coming.remove(&pair) {
                self.note(pair, claim);
            }
        }
        if self.isolated(now) {
            self.held.clear();
            self.cut_off = Some(now);
        }
        self.unable = if self.able { None } else { self.unable.or(Some(now)) };
        if self.unable.is_some_and(|since| now.saturating_sub(since) >= SILENCE) && self.has_heir(now) {
            self.held.clear();
        }
        let (known, me) = (&self.known, &self.me);
        self.held.retain(|pair, _| known.get(pair).is_some_and(|k| k.owner == *me));
        for (pair, since) in &self.held {
            // Nodes spoke after the claim was made: they would not follow it.
            let floor = self.floors.get(pair).copied().unwrap_or(0);
            if let Some(k) = self.known.get_mut(pair).filter(|k| k.epoch < floor)
                && now.saturating_sub(*since) < CORRECT
            {
                k.epoch = floor.saturating_add(1);
            }
        }
        if self.settled(now) && self.able && !self.leaving && self.is_back(now) {
            let free: Vec<Pair> =
                self.pairs.iter().filter(|(p, c)| self.is_mine(p, c, now)).map(|(p, _)| p.clone()).collect();
            for pair in free {
                let known = self.known.get(&pair).map_or(0, |k| k.epoch);
                let coming = self.coming.remove(&pair).map_or(0, |(k, _)| k.epoch);
                let floor = self.floors.get(&pair).copied().unwrap_or(0);
                let epoch = known.max(coming).max(floor).saturating_add(1);
                self.known.insert(pair.clone(), Known { owner: self.me.clone(), epoch });
                self.held.insert(pair, now);
            }
        }
        // Beats have changed what is known since the last time.
        let changed = self.decided.0 != self.held || self.decided.1 != self.known;
        if changed {
            self.decided = (self.held.clone(), self.known.clone());
        }
        changed
    }

    /// Whether this gateway serves the pair.
    pub fn holds(&self, pair: &Pair) -> bool {
        self.held.contains_key(pair)
    }

    /// Who owns a pair: the highest claim known, else the first candidate at epoch 0.
    pub fn owner(&self, pair: &Pair) -> Option<Known> {
        let first = self.pairs.get(pair)?.first()?;
        Some(self.known.get(pair).cloned().unwrap_or_else(|| Known { owner: first.clone(), epoch: 0 }))
    }

    /// Every claim known, for the beat and the journal.
    pub fn claims(&self) -> Vec<Claim> {
        let known = self.known.iter().filter(|(p, _)| self.pairs.contains_key(*p));
        known
            .map(|(p, k)| Claim {
                pair: p.clone(),
                owner: k.owner.clone(),
                epoch: k.epoch,
                held: k.owner == self.me && self.held.contains_key(p),
            })
            .collect()
    }

    /// Notes a claim if it beats what is known.
    fn note(&mut self, pair: Pair, claim: Known) {
        if self.coming.get(&pair).is_some_and(|(k, _)| !k.beats(&claim)) {
            self.coming.remove(&pair);
        }
        if self.known.get(&pair).is_none_or(|k| claim.beats(k)) {
            self.known.insert(pair, claim);
        }
    }

    /// Whether a peer lives: it was heard lately, or most agents see it.
    fn lives(&self, peer: &str, now: Duration) -> bool {
        let Some(p) = self.peers.get(peer) else { return peer == self.me };
        if p.heard.is_some_and(|at| now.saturating_sub(at) < SILENCE) {
            return true;
        }
        // A peer that was never heard has as long to speak.
        if p.heard.is_none() && now.saturating_sub(self.started) < SILENCE {
            return true;
        }
        let see = self.agents.values().filter(|a| a.sees.contains(peer)).count();
        see * 2 > self.agents.len()
    }

    /// Whether a pair falls to this gateway.
    fn is_mine(&self, pair: &Pair, candidates: &[String], now: Duration) -> bool {
        if self.held.contains_key(pair) {
            return false;
        }
        // What it held when it was last heard it still holds, as long as it lives and does not offer it.
        if self.peers.iter().any(|(name, p)| p.holds.contains_key(pair) && !p.leaving && self.lives(name, now)) {
            return false;
        }
        let fresh = !self.known.contains_key(pair) && !self.floors.contains_key(pair);
        for candidate in candidates {
            if *candidate == self.me {
                return true;
            }
            let Some(p) = self.peers.get(candidate) else { continue };
            if p.leaving || !self.lives(candidate, now) {
                continue;
            }
            let patience = if fresh { PATIENCE } else { SILENCE };
            if p.unable.is_none_or(|since| now.saturating_sub(since) < patience) {
                return false;
            }
        }
        false
    }

    /// Whether another gateway could take over now.
    fn has_heir(&self, now: Duration) -> bool {
        let able = |p: &Peer| !p.leaving && p.unable.is_none();
        self.peers.values().any(|p| able(p) && p.heard.is_some_and(|at| now.saturating_sub(at) < SILENCE))
    }

    /// Whether this gateway is among others, and has been for long enough to know what they claim.
    fn is_back(&self, now: Duration) -> bool {
        let Some(cut_off) = self.cut_off else { return true };
        now.saturating_sub(cut_off) >= SILENCE || self.peers.values().any(|p| p.heard.is_some_and(|at| at > cut_off))
    }

    /// Whether this gateway has lost every peer and most of its agents.
    fn isolated(&self, now: Duration) -> bool {
        let silent = |p: &Peer| match p.heard {
            Some(at) => now.saturating_sub(at) >= SILENCE,
            None => now.saturating_sub(self.started) >= SILENCE,
        };
        !self.peers.is_empty() && self.peers.values().all(silent) && self.agents.len() * 2 < self.ever.len()
    }
}

#[cfg(test)]
#[path = "ownership_tests.rs"]
mod tests;
