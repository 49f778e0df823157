//! Who owns which egress pair: the rules of failover without a lease or a wall clock. Pure: time is an argument.
//!
//! - Every pair has candidates in the same order on each gateway: the one it is pinned to, then rendezvous order.
//! - Who serves a pair claims it with an epoch; claims travel with the beats of the gateways. The highest epoch wins,
//!   of equal ones the smaller name (as the nodes follow them); the loser lets go. A returning owner finds a live claim and
//!   takes nothing.
//! - A gateway is dead when nothing came from it for 2 s and most of the connected agents do not see it either. While
//!   only one of the two holds, nothing moves: two gateways that cannot see each other are not two owners. An agent that
//!   does not see this gateway yet, to which it speaks, says of nobody that he is dead. For a gateway that hears no other
//!   one, agents whose streams have ended see whom they saw for 2 s more: when it is being cut off they end one after the
//!   other, and its own node's agent stays. Where the other one was and nothing listens any more, its process has ended: 1 s is enough, in which one that is started again at once takes up what it had.
//! - A pair that no live gateway holds goes to the first candidate that lives and is able, with the highest epoch that
//!   anybody knows plus one.
//! - A gateway that has lost its peers and most of its agents lets go: whoever is with the agents takes over. When some
//!   of them are back it takes nothing until a peer has spoken, or had the time to: the first agent that returns knows
//!   no more than that there is a higher epoch.
//! - One that never heard a gateway which is listed takes nothing for 15 s if the agents see that one, or if no agent has
//!   found this one yet and nobody could say whether the other one lives.
//! - A gateway that cannot serve, as one whose node's agent is dead or that is stale cannot, carries on until another one
//!   has its pairs in place, for 2 s at most if another one can.
//! - One that is told to end says so, takes nothing more, and carries on until another one has its pairs in place.
//! - With Kubernetes a claim is written into the status of its pool before it is made, over what stands there, and what
//!   stands there is a claim like those that peers tell (`crate::records`). While the API server is silent claims go by
//!   the peers alone. It is no witness of death: who lost only the API server keeps serving, and who lost only its peers
//!   and agents does until somebody else is recorded.
//! - Whoever holds a pair and is no candidate any more serves until one has it.
//! - Peers come and go. One that is not listed any more counts until it is silent.
//! - What a new owner has not in place yet only that owner goes by, and says to others: nodes follow the highest epoch,
//!   whoever tells them. Its own word, or a second, ends that.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tidegate_proto::{Beat, Claim, Pair};

use crate::records::{MAX_STEP, Records, Write, credible};

/// Silence that is taken for death.
pub const SILENCE: Duration = Duration::from_secs(2);
/// The same of one whose machine says that nothing listens there any more.
pub const ENDED: Duration = Duration::from_secs(1);
/// How long everybody waits at most until what a new owner needs is in place.
pub const PLACE: Duration = Duration::from_secs(1);
/// How long a candidate that lives may take until it is able, after this gateway is, when nobody ever held the pair: gateways
/// start at different speeds, and the first of the order should be it.
const PATIENCE: Duration = Duration::from_secs(10);

/// The time for which a pair that was lost is left alone doubles so often: 2 s become 4 minutes.
const MAX_DOUBLINGS: u32 = 7;
/// A peer that is listed and was never heard may hold something for so long, unless agents say that it is not there.
const UNHEARD: Duration = Duration::from_secs(15);
/// So long after a claim it still gives way to epochs that nodes report.
const CORRECT: Duration = Duration::from_secs(5);

#[derive(Debug)]
struct Peer {
    /// When it became known.
    since: Duration,
    /// Whether it is one of the gateways. One that is not any more is forgotten when it is silent.
    listed: bool,
    /// Whether its pod is about to end.
    terminating: bool,
    /// When its last beat came; absent if never.
    heard: Option<Duration>,
    /// Whether nothing has listened at its addresses since.
    refused: bool,
    /// Since when it lives without being able.
    unable: Option<Duration>,
    /// Whether it says that it is about to end.
    leaving: bool,
    /// What it serves.
    holds: BTreeMap<Pair, u64>,
    /// Whether its facts' snapshot has come.
    synced: bool,
}

impl Peer {
    fn new(now: Duration) -> Self {
        Self {
            since: now,
            listed: true,
            terminating: false,
            heard: None,
            refused: false,
            unable: None,
            leaving: false,
            holds: BTreeMap::new(),
            synced: false,
        }
    }

    /// Whether others take its pairs over.
    fn leaves(&self) -> bool {
        self.leaving || self.terminating
    }

    /// Whether nothing has come from it for so long that it may be dead. One that was never heard has as long to speak.
    fn silent(&self, now: Duration) -> bool {
        let Some(heard) = self.heard else { return now.saturating_sub(self.since) >= SILENCE };
        now.saturating_sub(heard) >= if self.refused { ENDED } else { SILENCE }
    }
}

/// Another gateway of the cluster, as the API server lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// Whether its pod is about to end.
    pub terminating: bool,
}

#[derive(Debug)]
struct Agent {
    sees: BTreeSet<String>,
    /// The lowest epoch that its node follows, of each pair.
    follows: BTreeMap<Pair, u64>,
    /// When its stream ended, if it did.
    gone: Option<Duration>,
}

/// A pair that was taken from this gateway while it served.
#[derive(Debug)]
struct Lost {
    owner: String,
    at: Duration,
    times: u32,
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
    pub fn beats(&self, other: &Self) -> bool {
        self.epoch > other.epoch || self.epoch == other.epoch && self.owner < other.owner
    }
}

/// The state machine of one gateway.
#[derive(Debug)]
pub struct Ownership {
    me: String,
    started: Duration,
    peers: BTreeMap<String, Peer>,
    /// Whether it is known who the peers are.
    listed: bool,
    /// What stands in the status of pools; absent without Kubernetes.
    records: Option<Records>,
    /// Those that are connected, or were lately.
    agents: BTreeMap<String, Agent>,
    /// Every agent that was ever connected, of nodes that are part of the cluster.
    ever: BTreeSet<String>,
    /// Pairs that policy has, with their candidates.
    pairs: BTreeMap<Pair, Vec<String>>,
    known: BTreeMap<Pair, Known>,
    /// Who owned pairs before those who own them, where that was heard.
    before: BTreeMap<Pair, String>,
    /// Higher claims of others that are not in place yet, and when they were first heard.
    coming: BTreeMap<Pair, (Known, Duration)>,
    /// What was held and known at the last decision.
    decided: (BTreeMap<Pair, Duration>, BTreeMap<Pair, Known>),
    /// The highest epochs that agents follow.
    floors: BTreeMap<Pair, u64>,
    /// What this gateway serves, and since when.
    held: BTreeMap<Pair, Duration>,
    /// What it served until somebody else was recorded.
    lost: BTreeMap<Pair, Lost>,
    able: bool,
    /// Since when this gateway has been able.
    since: Option<Duration>,
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
            peers: peers.into_iter().filter(|p| p != me).map(|p| (p, Peer::new(now))).collect(),
            listed: true,
            records: None,
            agents: BTreeMap::new(),
            ever: BTreeSet::new(),
            pairs: BTreeMap::new(),
            known: BTreeMap::new(),
            before: BTreeMap::new(),
            coming: BTreeMap::new(),
            decided: Default::default(),
            floors: BTreeMap::new(),
            held: BTreeMap::new(),
            lost: BTreeMap::new(),
            able: false,
            since: None,
            unable: None,
            cut_off: None,
            leaving: false,
        }
    }

    /// The same, with an API server that records who owns what, and lists the peers unless it is known who they are.
    pub fn recorded(mut self, known: bool) -> Self {
        self.records = Some(Records::new(&self.me, self.started));
        self.listed = known;
        self
    }

    /// Who the other gateways are.
    pub fn set_peers(&mut self, listed: impl IntoIterator<Item = Listed>, now: Duration) {
        self.listed = true;
        self.peers.values_mut().for_each(|p| p.listed = false);
        for l in listed.into_iter().filter(|l| l.name != self.me) {
            let peer = self.peers.entry(l.name).or_insert_with(|| Peer::new(now));
            (peer.listed, peer.terminating) = (true, l.terminating);
        }
    }

    /// The API server has answered.
    pub fn api_answered(&mut self, now: Duration) {
        if let Some(r) = &mut self.records {
            r.answered(now);
        }
    }

    /// Whether there is an API server and it does not answer.
    pub fn api_silent(&self, now: Duration) -> bool {
        self.records.as_ref().is_some_and(|r| r.is_silent(now))
    }

    /// What stands in the status of a pool; `None` where there is no such object.
    pub fn set_records(&mut self, pool: &str, records: Option<&[(Pair, Known)]>, now: Duration) {
        let Some(r) = &mut self.records else { return };
        let written = r.stands(pool, records);
        for (pair, record) in records.into_iter().flatten() {
            let known = self.known.get(pair).map_or(0, |k| k.epoch);
            if !record.owner.is_empty() && credible(record, known) {
                self.hear(pair.clone(), record.clone(), record.owner != self.me, now);
            }
        }
        for (pair, epoch) in written {
            let mine = Known { owner: self.me.clone(), epoch };
            let wins = |k: &Known| mine.beats(k) || *k == mine;
            // While it was written the world may have changed. Then others take it, as from anybody who lets go.
            if self.able
                && !self.leaving
                && self.pairs.contains_key(&pair)
                && self.known.get(&pair).is_none_or(wins)
                && self.coming.get(&pair).is_none_or(|(k, _)| wins(k))
            {
                self.claim(pair, epoch, now);
            }
        }
    }

    /// What is to be written into the status of pools since the last time.
    pub fn writes(&mut self) -> Vec<Write> {
        self.records.as_mut().map(Records::take).unwrap_or_default()
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
        self.before.retain(|p, _| pairs.contains_key(p));
        self.lost.retain(|p, _| pairs.contains_key(p));
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
        !self.has_heir(now) || self.held.is_empty() && self.connected().all(follows)
    }

    /// A beat of another gateway came.
    pub fn beat(&mut self, peer: &str, beat: &Beat, now: Duration) {
        let Some(p) = self.peers.get_mut(peer) else { return };
        (p.heard, p.refused) = (Some(now), false);
        self.lost.retain(|_, l| l.owner != peer);
        p.unable = if beat.able { None } else { p.unable.or(Some(now)) };
        p.leaving = beat.leaving;
        p.holds = beat.claims.iter().filter(|c| c.held && c.owner == peer).map(|c| (c.pair.clone(), c.epoch)).collect();
        for c in &beat.claims {
            let claim = Known { owner: c.owner.clone(), epoch: c.epoch };
            // Of what others own it says only what is in place.
            self.hear(c.pair.clone(), claim, beat.placing && c.held && c.owner == peer, now);
        }
    }

    /// Nothing listens at any address of another gateway.
    pub fn refused(&mut self, peer: &str) {
        if let Some(p) = self.peers.get_mut(peer) {
            p.refused = true;
        }
    }

    /// Somebody claims a pair. One that serves it, may, can, and does not leave yields at once; others wait until all is in place.
    fn hear(&mut self, pair: Pair, claim: Known, placing: bool, now: Duration) {
        let gives = self.leaving || !self.able || self.pairs.get(&pair).is_some_and(|c| !c.contains(&self.me));
        if !(placing && (gives || !self.held.contains_key(&pair))) {
            self.note(pair, claim);
        } else if self.known.get(&pair).is_none_or(|k| claim.beats(k))
            && self.coming.get(&pair).is_none_or(|(k, _)| claim.beats(k))
        {
            self.coming.insert(pair, (claim, now));
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
            // Nobody has claimed it yet: the node follows the first of the order.
            if epoch == 0 {
                continue;
            }
            // A node may follow an epoch that no gateway knows any more; one that lies must not use the numbers up.
            let most = self.known.get(&pair).map_or(0, |k| k.epoch).saturating_add(MAX_STEP);
            let floor = self.floors.entry(pair).or_default();
            *floor = (*floor).max(epoch.min(most));
        }
        self.agents.insert(node.to_owned(), Agent { sees, follows, gone: None });
    }

    /// An agent's stream ended.
    pub fn agent_gone(&mut self, node: &str, now: Duration) {
        if let Some(agent) = self.agents.get_mut(node) {
            agent.gone = agent.gone.or(Some(now));
        }
    }

    fn connected(&self) -> impl Iterator<Item = &Agent> {
        self.agents.values().filter(|a| a.gone.is_none())
    }

    /// Whether the start is over: every peer's facts have come, or the time for that is over.
    pub fn settled(&self, now: Duration) -> bool {
        now.saturating_sub(self.started) >= SILENCE
            || self.listed && self.peers.values().all(|p| p.synced && p.heard.is_some())
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
        self.agents.retain(|_, a| a.gone.is_none_or(|gone| now.saturating_sub(gone) < SILENCE));
        let gone: Vec<String> = self.peers.iter().filter(|(_, p)| !p.listed).map(|(n, _)| n.clone()).collect();
        for peer in gone.iter().filter(|p| !self.lives(p, now)).collect::<Vec<_>>() {
            self.peers.remove(peer);
        }
        if self.is_cut_off(now) {
            self.cut_off = Some(now);
            // While the API server answers it says who else took over.
            if self.records.as_ref().is_none_or(|r| r.is_silent(now)) {
                self.held.clear();
            }
        }
        self.since = if self.able { self.since.or(Some(now)) } else { None };
        self.unable = if self.able { None } else { self.unable.or(Some(now)) };
        if self.unable.is_some_and(|since| now.saturating_sub(since) >= SILENCE) && self.has_heir(now) {
            self.held.clear();
        }
        self.yield_to_others(now);
        for (pair, since) in &self.held {
            // Nodes spoke after the claim was made: they would not follow it.
            let floor = self.floors.get(pair).copied().unwrap_or(0);
            if let Some(k) = self.known.get_mut(pair).filter(|k| k.epoch < floor)
                && now.saturating_sub(*since) < CORRECT
            {
                k.epoch = floor.saturating_add(1);
            }
        }
        if self.settled(now) && self.able && !self.leaving && self.is_back(now) && !self.is_unmet(now) {
            let free: Vec<Pair> =
                self.pairs.iter().filter(|(p, c)| self.is_mine(p, c, now)).map(|(p, _)| p.clone()).collect();
            for pair in &free {
                let known = self.known.get(pair).map_or(0, |k| k.epoch);
                let coming = self.coming.get(pair).map_or(0, |(k, _)| k.epoch);
                let floor = self.floors.get(pair).copied().unwrap_or(0);
                let epoch = known.max(coming).max(floor).saturating_add(1);
                if self.records.as_mut().is_none_or(|r| r.may_claim(pair, epoch, now)) {
                    self.claim(pair.clone(), epoch, now);
                }
            }
            self.forget_wishes(|p| free.contains(p));
        } else {
            self.forget_wishes(|_| false);
        }
        if let Some(r) = &mut self.records {
            for (pair, known) in self.known.iter().filter(|(p, _)| self.held.contains_key(*p)) {
                r.keep(pair, known.epoch, now);
            }
        }
        // Beats have changed what is known since the last time.
        let changed = self.decided.0 != self.held || self.decided.1 != self.known;
        if changed {
            self.decided = (self.held.clone(), self.known.clone());
        }
        changed
    }

    /// Lets go what others own.
    fn yield_to_others(&mut self, now: Duration) {
        let (known, lost, me, recorded) = (&self.known, &mut self.lost, &self.me, self.records.is_some());
        let peers = &self.peers;
        self.held.retain(|pair, _| {
            let Some(k) = known.get(pair) else { return false };
            if k.owner != *me && recorded && peers.contains_key(&k.owner) {
                let times = lost.get(pair).map_or(1, |l| l.times.saturating_add(1));
                lost.insert(pair.clone(), Lost { owner: k.owner.clone(), at: now, times });
            }
            k.owner == *me
        });
    }

    /// Whether somebody took a pair from this gateway and was not heard since, which ends it: each took the other one for dead. Both
    /// reach the API server, and would take it from each other for ever if they did not wait longer each time.
    fn is_disputed(&self, pair: &Pair, now: Duration) -> bool {
        self.lost
            .get(pair)
            .is_some_and(|l| now.saturating_sub(l.at) < SILENCE * 2u32.saturating_pow(l.times.min(MAX_DOUBLINGS)))
    }

    fn claim(&mut self, pair: Pair, epoch: u64, now: Duration) {
        self.note(pair.clone(), Known { owner: self.me.clone(), epoch });
        self.held.insert(pair, now);
    }

    /// Goes by a claim from now on, if it beats what is known.
    fn follow(&mut self, pair: Pair, claim: Known) {
        let old = self.known.get(&pair);
        if old.is_some_and(|old| !claim.beats(old)) {
            return;
        }
        if let Some(old) = old.filter(|old| old.owner != claim.owner) {
            self.before.insert(pair.clone(), old.owner.clone());
        }
        self.known.insert(pair, claim);
    }

    /// Who owned pairs before those who own them. Not known of those that only one was heard to own.
    pub fn before(&self) -> &BTreeMap<Pair, String> {
        &self.before
    }

    fn forget_wishes(&mut self, wanted: impl Fn(&Pair) -> bool) {
        let held = &self.held;
        if let Some(r) = &mut self.records {
            r.retain(|p| held.contains_key(p) || wanted(p));
        }
    }

    /// Whether this gateway serves the pair.
    pub fn holds(&self, pair: &Pair) -> bool {
        self.held.contains_key(pair)
    }

    /// Whether another gateway serves any.
    pub fn others_hold(&self) -> bool {
        self.peers.values().any(|p| !p.holds.is_empty())
    }

    /// Whether it serves any.
    pub fn holds_any(&self) -> bool {
        !self.held.is_empty()
    }

    /// Who owns a pair: the highest claim known, else the first candidate, if there is one, at epoch 0.
    pub fn owner(&self, pair: &Pair) -> Option<Known> {
        let candidates = self.pairs.get(pair)?;
        let first = || Some(Known { owner: candidates.first()?.clone(), epoch: 0 });
        self.known.get(pair).cloned().or_else(first)
    }

    /// Whether every pair that policy has, and some gateway may hold, is somebody's.
    pub fn all_owned(&self) -> bool {
        self.pairs.iter().all(|(pair, candidates)| candidates.is_empty() || self.known.contains_key(pair))
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

    /// Notes a claim if it beats what is known, and what was to come.
    fn note(&mut self, pair: Pair, claim: Known) {
        if self.coming.get(&pair).is_some_and(|(k, _)| !k.beats(&claim))
            && let Some((coming, _)) = self.coming.remove(&pair)
        {
            self.follow(pair.clone(), coming);
        }
        self.follow(pair, claim);
    }

    /// Whether a peer lives: it was heard lately, or most agents see it.
    fn lives(&self, peer: &str, now: Duration) -> bool {
        let Some(p) = self.peers.get(peer) else { return peer == self.me };
        !p.silent(now) || self.is_seen(peer, now)
    }

    /// Whether a pair falls to this gateway.
    fn is_mine(&self, pair: &Pair, candidates: &[String], now: Duration) -> bool {
        if self.held.contains_key(pair) {
            return false;
        }
        // What it held when it was last heard it still holds, as long as it lives, does not offer it, and may.
        let stays = |name: &String, p: &Peer| !p.leaves() && candidates.contains(name) && self.lives(name, now);
        if self.peers.iter().any(|(name, p)| p.holds.contains_key(pair) && stays(name, p)) {
            return false;
        }
        if self.is_disputed(pair, now) {
            return false;
        }
        // One that is about to hold it, too.
        if self.coming.get(pair).is_some_and(|(k, _)| self.takes(&k.owner, now)) {
            return false;
        }
        let fresh = !self.known.contains_key(pair) && !self.floors.contains_key(pair);
        for candidate in candidates {
            if *candidate == self.me {
                return true;
            }
            let Some(p) = self.peers.get(candidate) else { continue };
            if p.leaves() || !self.lives(candidate, now) {
                continue;
            }
            let Some(unable) = p.unable else { return false };
            // While neither could serve nobody was waited for.
            let both = self.since.unwrap_or(now).max(unable);
            let (since, patience) = if fresh { (both, PATIENCE) } else { (unable, SILENCE) };
            if now.saturating_sub(since) < patience {
                return false;
            }
        }
        false
    }

    /// Whether a peer lives and takes pairs.
    fn takes(&self, peer: &str, now: Duration) -> bool {
        self.peers.get(peer).is_some_and(|p| !p.leaves() && p.unable.is_none()) && self.lives(peer, now)
    }

    /// Whether another gateway could take over now.
    fn has_heir(&self, now: Duration) -> bool {
        let able = |p: &Peer| !p.leaves() && p.unable.is_none();
        self.peers.values().any(|p| able(p) && p.heard.is_some() && !p.silent(now))
    }

    /// Whether this gateway is among others, and has been for long enough to know what they claim.
    fn is_back(&self, now: Duration) -> bool {
        let Some(cut_off) = self.cut_off else { return true };
        now.saturating_sub(cut_off) >= SILENCE || self.peers.values().any(|p| p.heard.is_some_and(|at| at > cut_off))
    }

    /// How many agents see a gateway, or did when their streams ended lately, and how many do not. One that does not see this
    /// gateway either, to which it speaks, has only just begun to look.
    fn witnesses(&self, gateway: &str, now: Duration) -> (usize, usize) {
        // Who hears another gateway is not being cut off.
        let heard = |p: &Peer| p.heard.is_some_and(|at| now.saturating_sub(at) < ENDED);
        let alone = !self.peers.values().any(heard);
        let see =
            self.agents.values().filter(|a| alone || a.gone.is_none()).filter(|a| a.sees.contains(gateway)).count();
        let others = self.connected().filter(|a| a.sees.contains(&self.me) && !a.sees.contains(gateway)).count();
        (see, others)
    }

    /// Whether most of the agents see a gateway.
    fn is_seen(&self, gateway: &str, now: Duration) -> bool {
        let (see, others) = self.witnesses(gateway, now);
        see > others
    }

    /// Whether a gateway that is listed was never heard, and may hold something: the agents see it, or none can say.
    fn is_unmet(&self, now: Duration) -> bool {
        let unheard = |p: &Peer| p.listed && !p.leaves() && p.heard.is_none() && now.saturating_sub(p.since) < UNHEARD;
        let may_hold = |name: &str| self.witnesses(name, now) == (0, 0) || self.is_seen(name, now);
        self.peers.iter().any(|(name, p)| unheard(p) && may_hold(name))
    }

    /// Whether this gateway has lost every peer and most of its agents.
    fn is_cut_off(&self, now: Duration) -> bool {
        !self.peers.is_empty()
            && self.peers.values().all(|p| p.silent(now))
            && self.connected().count() * 2 < self.ever.len()
    }
}

#[cfg(test)]
#[path = "ownership_tests.rs"]
mod tests;
