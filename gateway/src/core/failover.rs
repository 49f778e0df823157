//! The core's part in failover: decides who owns what, and lets facts travel.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use tidegate_ledger::{FactRecord, Input, NodeId, OwnerId};
use tidegate_policy::Reason;
use tidegate_policy::denied::Denied;
use tidegate_proto::wire::PeerUpdate;
use tidegate_proto::{Beat, Pair, PeerFact, PeerMessage, ScopeClaim};
use tidegate_sni::Live;
use tokio::sync::{mpsc, oneshot};

use super::{MAX_PENDING, Run};
use crate::admin::Guard;
use crate::desired::{self, Desired, Order};
use crate::generations::HURRY;
use crate::ownership::PLACE;
use crate::report::thread::Origin;

/// How long a gateway that is told to end waits at most until others have its pairs.
const LEAVE: Duration = Duration::from_secs(4);
/// How long a gateway that starts waits at most for the agents of all nodes, and for the owners of all pairs, before it is ready.
/// Other gateways lead agents to it as soon as the API server knows its address. Those that they are no longer connected to find
/// it by a name that they ask for every 5 s, and that the cluster's DNS often remembers for longer: an upgrade does not wait for them.
pub(super) const MEET: Duration = Duration::from_secs(12);
/// So long a gateway that is stale still answers names at most until others have its pairs.
pub(super) const HAND_OVER: Duration = Duration::from_millis(400);
/// Other gateways that are told what this one learns: more than there can be.
const MAX_PEERS: usize = 256;
/// Time between two tries to move over from another layout.
const AGAIN: Duration = Duration::from_secs(1);

/// A gateway that is about to end.
pub(super) struct Leaving {
    /// Told when it may.
    reply: oneshot::Sender<()>,
    /// When it ends all the same.
    until: Duration,
}

/// A gateway that knows less than another one.
pub(super) struct Stale {
    /// It is not ready.
    _unready: Guard,
    since: Duration,
    /// Whether it answers nobody any more.
    pub closed: bool,
}

impl Run {
    /// Ends the start when its time has come, and brings everything to a new ownership.
    pub(super) fn decide(&mut self) {
        let now = self.core.shared.now();
        self.judge_generations(now);
        self.core.ownership.set_able(self.able());
        if !self.settled {
            if !self.core.ownership.settled(now) {
                return;
            }
            let Some(world) = self.next.take() else { return };
            self.settled = true;
            self.world(world);
            self.move_over = (self.attached && self.core.datapath.is_upgrade()).then_some(now);
            tracing::info!(facts = self.core.ledger.counts().facts, "serving");
        }
        if self.move_over.is_some_and(|at| at <= now) {
            self.move_over(now);
            self.core.ownership.set_able(self.able());
        }
        if self.tick(now) {
            self.follow_owners(true);
        }
        self.fall_silent(now);
        // Packets that come before the addresses and rules are there would be refused: nodes are told after that.
        let in_place = **self.core.shared.applied.load() == *self.core.shared.pairs.borrow();
        if self.moved.is_some_and(|since| in_place || now.saturating_sub(since) >= PLACE) {
            self.moved = None;
            self.core.desired.tell_all();
            self.send_states();
            // One that waits for this to end holds the same addresses until it hears of it.
            self.beat_peers();
        }
        if in_place && self.attached && self.is_owned(now) && self.is_met(now) {
            self.core.starting = None;
        }
        self.write();
        let claims = self.core.ownership.claims();
        if claims != self.written {
            for c in claims.iter().filter(|c| !self.written.contains(c)) {
                tracing::info!(pair = %c.pair, owner = c.owner, epoch = c.epoch, held = c.held, "ownership");
            }
            self.before.clone_from(self.core.ownership.before());
            self.written = claims.clone();
            self.publish();
            if let Some(journal) = &self.core.journal {
                journal.append(Vec::new(), Some(claims));
            }
        }
        if let Some(journal) = self.core.journal.as_ref().filter(|j| j.wants_all()) {
            journal.append(self.all_facts(), Some(self.core.ownership.claims()));
        }
        if self.leaving.as_ref().is_some_and(|l| self.core.ownership.left(now) || l.until <= now)
            && let Some(leaving) = self.leaving.take()
        {
            // Nobody waits any more only if the process ends anyway.
            let _ = leaving.reply.send(());
        }
    }

    /// Whether packets that come have a way out: nodes go by the first of the order before anybody has claimed a pair. For one that
    /// nobody takes this does not wait longer than for agents.
    fn is_owned(&self, now: Duration) -> bool {
        now.saturating_sub(self.begun) >= MEET || self.core.ownership.all_owned()
    }

    /// Whether nodes would go on without a gap if the gateways that serve ended now, as they do one by one when a Deployment replaces
    /// them by those that are ready: agents know this one. Where nobody serves, nobody ends.
    fn is_met(&self, now: Duration) -> bool {
        let here = |node: &String| self.nodes.get(node).is_some_and(|n| n.state.is_some() && n.facts.is_some());
        self.core.api.is_none()
            || now.saturating_sub(self.begun) >= MEET
            || !self.core.ownership.others_hold()
            || self.compiled.nodes.keys().all(here)
    }

    /// Lets ownership decide: every change that it makes comes from here. Says whether there may be one; then claims are to be
    /// set, our own kernel and the addresses to follow, and connections to be cut.
    pub(super) fn tick(&mut self, now: Duration) -> bool {
        let changed = self.core.ownership.tick(now);
        if changed {
            self.moved.get_or_insert(now);
        }
        changed
    }

    /// Brings our own kernel and the addresses to what ownership says, and if pairs `moved` ends their connections.
    pub(super) fn follow_owners(&mut self, moved: bool) {
        self.set_claims();
        self.apply_own();
        if moved {
            self.cut_moved();
        }
    }

    /// Connections of pairs that moved away are dead: their packets go elsewhere.
    pub(super) fn cut_moved(&self) {
        let (world, desired) = (&self.compiled.world, &self.core.desired);
        let lost = |live: &Live| world.scope(live.scope).is_none_or(|s| desired.way_out(s).is_none());
        let cut = self.core.registry.revoke(lost, Reason::NoGateway);
        if cut > 0 {
            tracing::info!(connections = cut, "connections of egress pairs that moved away were reset");
        }
    }

    /// One that is stale answers names until others have its pairs, but not for long.
    fn fall_silent(&mut self, now: Duration) {
        let nothing = !self.core.ownership.holds_any();
        if let Some(stale) = self.stale.as_mut().filter(|s| !s.closed)
            && (nothing || now.saturating_sub(stale.since) >= HAND_OVER)
        {
            stale.closed = true;
            self.open_view();
        }
    }

    /// Whether this gateway sees as much of the API server as the others do. One that does not hands its pairs
    /// over, answers nobody after that, and takes no pair until it does.
    fn judge_generations(&mut self, now: Duration) {
        let behind = self.generations.behind(now);
        if let Some(watched) = &self.core.watched
            && now.saturating_sub(self.hurried) >= HURRY
        {
            for (feed, _) in behind.iter().filter(|(_, lag)| **lag >= HURRY) {
                watched.hurry(*feed);
                self.hurried = now;
            }
        }
        let stale = self.generations.is_stale(now);
        if stale == self.stale.is_some() {
            return;
        }
        if stale {
            let lists: Vec<&str> = behind.keys().map(|f| f.name()).collect();
            tracing::warn!(
                ?lists,
                "other gateways have seen more of the API server: this one steps back until it has, too"
            );
        } else {
            tracing::info!("this gateway has caught up with the others");
        }
        self.core.stale.send_replace(stale);
        let was = self.stale.take();
        self.stale =
            stale.then(|| Stale { _unready: self.core.readiness.guard("stale"), since: now, closed: !self.settled });
        if self.settled && was.is_some_and(|s| s.closed) {
            self.open_view();
        }
        self.heartbeat();
    }

    /// Puts our program in the place of another layout's. Until that has worked this gateway is not able: packets are
    /// judged by maps that nobody writes any more.
    fn move_over(&mut self, now: Duration) {
        let result = self.attach();
        self.attached = result.is_ok();
        self.move_over = None;
        if let Err(error) = result {
            tracing::error!(%error, "cannot move over from the kernel maps of another layout; trying again");
            self.move_over = Some(now + AGAIN);
        }
    }

    /// Offers what this gateway holds to the others, which take it over while it carries on.
    pub(super) fn leave(&mut self, reply: oneshot::Sender<()>) {
        self.core.ownership.leave();
        self.leaving = Some(Leaving { reply, until: self.core.shared.now() + LEAVE });
        self.beat_peers();
    }

    /// Whether this gateway could serve: it has policy, its program is in place, and its node's agent is there, without
    /// which it holds no address. One that never came is not missed.
    fn able(&self) -> bool {
        let node = self.core.desired.local().node;
        self.attached
            && (self.settled || self.next.is_some())
            && self.stale.is_none()
            && self.nodes.get(&node).is_none_or(|n| n.facts.is_some())
    }

    /// Tells ownership what one agent sees, or all of them. Whose pair a scope uses only policy says: what came before it counts from then on.
    pub(super) fn heed(&mut self, only: Option<&str>) {
        let world = self.core.shared.world.load();
        let epoch = |c: &ScopeClaim| Some((Desired::pair(world.scope(c.scope)?)?, c.epoch));
        let said = self.nodes.iter().filter_map(|(name, n)| Some((name, n.seen.as_ref()?)));
        for (node, seen) in said.filter(|(name, _)| only.is_none_or(|o| o == *name)) {
            let epochs: Vec<_> = seen.claims.iter().filter_map(epoch).collect();
            self.core.ownership.seen(node, seen.gateways.iter().cloned().collect(), epochs);
        }
    }

    /// Hands what is known of ownership to those who build states and judge connections.
    pub(super) fn set_claims(&mut self) {
        let ownership = &self.core.ownership;
        let mut out = BTreeMap::new();
        let mut nobody = Vec::new();
        for (pair, Order { candidates, others }) in self.core.desired.pairs(&self.compiled) {
            if candidates.is_empty() {
                nobody.push(pair.clone());
            }
            let Some(known) = ownership.owner(&pair) else { continue };
            let claim = desired::Ownership {
                held: ownership.holds(&pair),
                standbys: candidates.into_iter().chain(others).filter(|c| *c != known.owner).collect(),
                owner: known.owner,
                epoch: known.epoch,
            };
            out.insert(pair, claim);
        }
        // An earlier process may have held what is another one's now.
        let (before, me) = (self.core.desired.claims(), &self.core.gateway);
        let mine = |pair: &Pair| before.get(pair).is_none_or(|claim| claim.owner == *me);
        let went = out.iter().filter(|(pair, claim)| claim.owner != *me && mine(pair)).map(|(pair, _)| pair);
        let ips = went.flat_map(|p| [p.ipv4.map(IpAddr::from), p.ipv6.map(IpAddr::from)]).flatten();
        let lost: Vec<IpAddr> = ips.collect();
        // What a new owner needs may not be in place yet: until then nodes follow those whom they were told of.
        let told = self.moved.is_some().then_some(&*self.told);
        self.core.desired.set_claims(out, told);
        // Both in one step: who is told looks at both, and would take what is lost and still held for one that came back.
        let (shared, pairs) = (&self.core.shared, self.core.desired.held(&self.compiled.world));
        shared.pairs.send_if_modified(|held| {
            let changed = *held != pairs || !lost.is_empty();
            shared.lost.lock().extend(lost);
            *held = pairs;
            changed
        });
        self.note_problems(&nobody);
    }

    /// A record with names instead of this process's ids.
    fn named(&self, r: FactRecord) -> Option<PeerFact> {
        let shared = &self.core.shared;
        Some(PeerFact {
            scope: r.scope,
            namespace: shared.namespaces.name(r.owner.0)?.to_string(),
            name: r.name,
            ip: r.ip,
            remaining: r.remaining,
            ttl: r.ttl,
            nodes: r.nodes.iter().filter_map(|n| Some(shared.nodes.name(n.0)?.to_string())).collect(),
        })
    }

    fn all_facts(&self) -> Vec<PeerFact> {
        let mut out = Vec::new();
        self.core.ledger.export(self.core.shared.now(), |r| out.extend(self.named(r)));
        out
    }

    /// What was learnt since the last time goes to the journal and, unless it came from there, to the other gateways.
    pub(super) fn spread(&mut self) {
        let now = self.core.shared.now();
        let mut records = Vec::new();
        self.core.ledger.changes(now, |r, own| records.push((r, own)));
        let mut all = Vec::with_capacity(records.len());
        let mut own = Vec::new();
        for (record, learnt_here) in records {
            let Some(fact) = self.named(record) else { continue };
            if learnt_here && !self.peers.is_empty() {
                own.push(fact.clone());
            }
            all.push(fact);
        }
        if !own.is_empty() {
            self.tell_peers(&PeerMessage { boot_id: self.core.boot_id, facts: own, ..PeerMessage::default() });
        }
        if let Some(journal) = &self.core.journal
            && !all.is_empty()
        {
            journal.append(all, None);
        }
    }

    fn tell_peers(&mut self, message: &PeerMessage) {
        // A peer that does not keep up is cut off and comes back for a snapshot.
        self.peers.retain(|name, out| {
            let told = message.clone().into_messages().into_iter().all(|m| out.try_send(m).is_ok());
            if !told {
                tracing::info!(peer = name, "another gateway's stream ended");
            }
            told
        });
    }

    fn beat(&mut self) -> Beat {
        let watched = self.core.watched.as_ref();
        let versions = self.generations.told(|feed| watched.and_then(|w| w.back_for(feed)));
        let ownership = &self.core.ownership;
        Beat {
            able: self.able(),
            claims: ownership.claims(),
            // One that is stale offers what it holds, as one that is about to end does: others need not wait.
            leaving: ownership.leaving() || self.stale.is_some(),
            placing: self.moved.is_some(),
            versions,
        }
    }

    pub(super) fn beat_peers(&mut self) {
        if self.peers.is_empty() {
            return;
        }
        let beat = Some(self.beat());
        self.tell_peers(&PeerMessage { boot_id: self.core.boot_id, beat, ..PeerMessage::default() });
    }

    /// Tells other gateways what was denied here: any of them may be the one that says it to people.
    pub(super) fn tell_denied(&mut self, denied: Vec<Denied>) {
        if !self.peers.is_empty() {
            self.tell_peers(&PeerMessage { boot_id: self.core.boot_id, denied, ..PeerMessage::default() });
        }
    }

    /// Another gateway asks, by its certificate: it gets all facts, those too that still wait for policy here. It may
    /// know this one before it is listed here.
    pub(super) fn peer_up(&mut self, gateway: String, out: mpsc::Sender<PeerUpdate>) {
        if self.peers.len() >= MAX_PEERS && !self.peers.contains_key(&gateway) {
            tracing::warn!(peer = gateway, "more gateways than there can be ask");
            return;
        }
        let now = self.core.shared.now();
        let mut facts = self.all_facts();
        for (at, waiting) in &self.pending {
            facts.extend(waiting.iter().map(|f| aged(f.clone(), now.saturating_sub(*at))));
        }
        let beat = Some(self.beat());
        let message =
            PeerMessage { boot_id: self.core.boot_id, snapshot: true, more: false, facts, beat, denied: Vec::new() };
        if message.into_messages().into_iter().all(|m| out.try_send(m).is_ok()) {
            self.peers.insert(gateway, out);
        } else {
            tracing::warn!(peer = gateway, "the snapshot for another gateway does not fit its queue");
        }
    }

    /// Another gateway said something.
    pub(super) fn peer(&mut self, gateway: &str, message: PeerMessage) {
        let now = self.core.shared.now();
        if !message.facts.is_empty() {
            if self.settled {
                self.import(Duration::ZERO, message.facts);
            } else {
                self.wait_for_policy(message.facts);
            }
        }
        if let Some(beat) = &message.beat {
            self.core.ownership.beat(gateway, beat, now);
            self.generations.heard(gateway, &beat.versions, now);
        }
        for denied in message.denied {
            self.core.denials.send(Origin::Gateway, denied);
        }
        if message.snapshot && !message.more {
            self.core.ownership.synced(gateway);
        }
    }

    fn wait_for_policy(&mut self, facts: Vec<PeerFact>) {
        let waiting: usize = self.pending.iter().map(|(_, f)| f.len()).sum();
        // At the start all of them count; later they are a few that came ahead of an edit.
        if !self.settled || waiting + facts.len() <= MAX_PENDING {
            self.pending.push((self.core.shared.now(), facts));
        }
    }

    /// Imports what waited for policy.
    pub(super) fn import_pending(&mut self) {
        let now = self.core.shared.now();
        for (at, facts) in std::mem::take(&mut self.pending) {
            self.import(now.saturating_sub(at), facts);
        }
    }

    fn import(&mut self, age: Duration, facts: Vec<PeerFact>) {
        let world = self.compiled.world.clone();
        let mut records = Vec::with_capacity(facts.len());
        let mut unknown = Vec::new();
        for fact in facts {
            let fact = aged(fact, age);
            if world.scope(fact.scope).is_none() {
                if !fact.remaining.is_zero() {
                    unknown.push(fact);
                }
                continue;
            }
            let shared = &self.core.shared;
            let nodes = fact.nodes.iter().filter(|n| self.placement.has(fact.scope, n));
            records.push(FactRecord {
                scope: fact.scope,
                owner: OwnerId(shared.namespaces.id(&fact.namespace)),
                name: fact.name,
                ip: fact.ip,
                remaining: fact.remaining,
                ttl: fact.ttl,
                nodes: nodes.map(|n| NodeId(shared.nodes.id(n))).collect(),
            });
        }
        if !unknown.is_empty() {
            self.wait_for_policy(unknown);
        }
        if !records.is_empty() {
            self.feed(Input::Import(records));
        }
    }
}

/// The candidates of each pair.
pub(super) fn candidates(pairs: BTreeMap<Pair, Order>) -> BTreeMap<Pair, Vec<String>> {
    pairs.into_iter().map(|(pair, order)| (pair, order.candidates)).collect()
}

fn aged(mut fact: PeerFact, by: Duration) -> PeerFact {
    fact.remaining = fact.remaining.saturating_sub(by);
    fact.ttl = fact.ttl.saturating_sub(by);
    fact
}
