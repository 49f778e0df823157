//! A gateway's part in failover, as `gateway/src/core/failover.rs` has it: what others and the journal are told.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use tidegate_ledger::{FactRecord, Input, OwnerId};
use tidegate_policy::{Name, ScopeKey};
use tidegate_proto::{Beat, Claim, PeerFact, PeerMessage, decode_peer, encode_peer};

use crate::gateway::{Event, Gateway, node_id};
use crate::objects::NODES;

/// What a gateway has written down: every fact that it learnt or was told, as it was then, and claims.
#[derive(Clone, Default)]
pub struct Journal {
    facts: BTreeMap<(ScopeKey, Name, IpAddr), (Duration, PeerFact)>,
    /// The highest claims.
    pub claims: Vec<Claim>,
}

impl Journal {
    /// The facts with their lives as they are now: what has expired may still carry flows.
    pub fn recover(&self, now: Duration) -> Vec<PeerFact> {
        self.facts.values().map(|(at, f)| aged(f.clone(), now.saturating_sub(*at))).collect()
    }
}

fn aged(mut fact: PeerFact, by: Duration) -> PeerFact {
    fact.remaining = fact.remaining.saturating_sub(by);
    fact.ttl = fact.ttl.saturating_sub(by);
    fact
}

impl Gateway {
    fn named(r: FactRecord) -> PeerFact {
        PeerFact {
            scope: r.scope,
            namespace: "any".into(),
            name: r.name,
            ip: r.ip,
            remaining: r.remaining,
            ttl: r.ttl,
            nodes: r.nodes.iter().filter_map(|n| Some((*NODES.get(n.0 as usize)?).to_owned())).collect(),
        }
    }

    /// Every fact that it knows.
    pub fn all_facts(&self, now: Duration) -> Vec<PeerFact> {
        let mut out = Vec::new();
        self.ledger.export(now, |r| out.push(Self::named(r)));
        out
    }

    /// What was learnt since the last time goes to the journal and, unless it came from there, to the other gateways.
    pub fn spread(&mut self, now: Duration) {
        let (mut all, mut own) = (Vec::new(), Vec::new());
        self.ledger.changes(now, |r, learnt_here| {
            let fact = Self::named(r);
            if learnt_here {
                own.push(fact.clone());
            }
            all.push(fact);
        });
        if !own.is_empty() {
            self.tell_peers(PeerMessage { boot_id: self.boot, facts: own, ..PeerMessage::default() });
        }
        for f in all {
            self.journal.facts.insert((f.scope, f.name.clone(), f.ip), (now, f));
        }
    }

    /// The journal is written anew, with what is known and nothing else.
    pub fn compact(&mut self, now: Duration) {
        let all = self.all_facts(now).into_iter();
        self.journal.facts = all.map(|f| ((f.scope, f.name.clone(), f.ip), (now, f))).collect();
    }

    fn tell_peers(&mut self, message: PeerMessage) {
        for out in self.peers.values_mut() {
            out.extend(encode_peer(message.clone()));
        }
    }

    fn beat(&self) -> Beat {
        let leaving = self.ownership.leaving();
        let placing = self.moved.is_some();
        Beat { able: self.able(), claims: self.ownership.claims(), leaving, placing, ..Beat::default() }
    }

    /// A sign of life for the others.
    pub fn beat_peers(&mut self) {
        let beat = Some(self.beat());
        self.tell_peers(PeerMessage { boot_id: self.boot, beat, ..PeerMessage::default() });
    }

    /// Another gateway listens from now on.
    pub fn peer_up(&mut self, peer: &'static str, now: Duration) {
        let mut facts = self.all_facts(now);
        for (at, waiting) in &self.pending {
            facts.extend(waiting.iter().map(|f| aged(f.clone(), now.saturating_sub(*at))));
        }
        let (boot_id, beat) = (self.boot, Some(self.beat()));
        let message = PeerMessage { boot_id, snapshot: true, facts, beat, ..PeerMessage::default() };
        self.peers.insert(peer, encode_peer(message).into());
    }

    /// It does not any more.
    pub fn peer_down(&mut self, peer: &str) {
        self.peers.remove(peer);
    }

    /// Whether another gateway listens.
    pub fn tells(&self, peer: &str) -> bool {
        self.peers.contains_key(peer)
    }

    /// Whether messages for another gateway are on their way.
    pub fn has_for_peers(&self) -> bool {
        self.peers.values().any(|out| !out.is_empty())
    }

    /// The next message for another gateway.
    pub fn next_for(&mut self, peer: &str) -> Option<Vec<u8>> {
        self.peers.get_mut(peer).and_then(VecDeque::pop_front)
    }

    /// Another gateway said something.
    pub fn peer(&mut self, peer: &str, octets: &[u8], now: Duration) {
        let message = decode_peer(octets).expect("what a gateway sends is accepted");
        if !message.facts.is_empty() {
            if self.version.is_some() {
                self.import(Duration::ZERO, message.facts, now);
            } else {
                self.pending.push((now, message.facts));
            }
        }
        if let Some(beat) = &message.beat {
            self.ownership.beat(peer, beat, now);
        }
        if message.snapshot && !message.more {
            self.ownership.synced(peer);
        }
    }

    /// Imports what waited for policy.
    pub(crate) fn import_pending(&mut self, now: Duration) {
        for (at, facts) in std::mem::take(&mut self.pending) {
            self.import(now.saturating_sub(at), facts, now);
        }
    }

    fn import(&mut self, age: Duration, facts: Vec<PeerFact>, now: Duration) {
        let world = self.world();
        let aged = facts.into_iter().map(|f| aged(f, age));
        let (known, unknown): (Vec<_>, Vec<_>) = aged.partition(|f| world.scope(f.scope).is_some());
        let unknown: Vec<PeerFact> = unknown.into_iter().filter(|f| !f.remaining.is_zero()).collect();
        if !unknown.is_empty() {
            self.pending.push((now, unknown));
        }
        if known.is_empty() {
            return;
        }
        self.events.push(Event::Imported(known.clone()));
        let placement = &self.placement;
        let records = known.into_iter().map(|f| {
            let nodes = f.nodes.iter().filter(|n| placement.has(f.scope, n));
            FactRecord {
                scope: f.scope,
                owner: OwnerId(0),
                name: f.name,
                ip: f.ip,
                remaining: f.remaining,
                ttl: f.ttl,
                nodes: nodes.map(|n| node_id(n)).collect(),
            }
        });
        let records = records.collect();
        self.feed(Input::Import(records), now);
    }
}
