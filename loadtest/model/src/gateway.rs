//! A gateway's core without its threads: the real world, ledger, ownership, desired states, answer planning and contract,
//! put together in the order of `gateway/src/core.rs`, with queues instead of streams.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use prost::Message;
use tidegate_ledger::{Answer, Classify, Config as Limits, Input, Ledger, NodeId, Output};
use tidegate_policy::model::{Objects, Touched, UnixSeconds};
use tidegate_policy::state::NodeState;
use tidegate_policy::world::World;
use tidegate_policy::{ClassKey, Name, ScopeKey};
use tidegate_proto::{Pair, PeerFact, Seen};

use crate::classes::Classes;
use crate::desired::{self, Compiled, Desired, Order};
use crate::egress::nft::HeldPair;
use crate::kernel::Kernel;
use crate::machine::{Delta, Uses};
use crate::objects::{Config, GATEWAYS, NODES};
use crate::ownership::{Known, Ownership, PLACE};
use crate::peers::Journal;
use crate::placement::Placement;
use crate::pushes;
use crate::sent::Sent;
use crate::settling::Settling;

/// The policy that the ledger classifies by, shared with the core.
#[derive(Clone)]
pub struct Shared(Arc<RwLock<Arc<World>>>);

impl Shared {
    /// The policy of now.
    pub fn world(&self) -> Arc<World> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, world: Arc<World>) -> Arc<World> {
        std::mem::replace(&mut *self.0.write().unwrap_or_else(PoisonError::into_inner), world)
    }
}

impl Classify for Shared {
    fn class(&self, scope: ScopeKey, ip: IpAddr, names: &mut dyn Iterator<Item = &Name>) -> ClassKey {
        match self.world().scope(scope) {
            Some(s) => s.class(ip, names),
            None => ClassKey(0),
        }
    }
}

/// What the API server's events would touch that lead from one to the other, as `policy/api/src/index.rs` notes it.
fn touched(old: &Objects, new: &Objects) -> Touched {
    fn differ<K: Ord + Clone, V: PartialEq>(old: &BTreeMap<K, V>, new: &BTreeMap<K, V>) -> BTreeSet<K> {
        old.keys().chain(new.keys()).filter(|k| old.get(*k) != new.get(*k)).cloned().collect()
    }
    let mut namespaces = differ(&old.namespaces, &new.namespaces);
    namespaces.extend(differ(&old.policies, &new.policies).into_iter().map(|(namespace, _)| namespace));
    Touched {
        all: old.settings != new.settings || old.pools != new.pools || old.assigned != new.assigned,
        nodes: old.nodes != new.nodes,
        cluster_policies: differ(&old.cluster_policies, &new.cluster_policies),
        namespaces,
        pods: differ(&old.pods, &new.pods),
        names: old.names != new.names,
    }
}

/// What the core knows of a node.
#[derive(Default)]
pub struct Node {
    pub(crate) state: bool,
    pub(crate) facts: bool,
    agent: Option<u64>,
    pub seen: Option<Seen>,
    pub(crate) sent: Sent,
    /// What of the state that it was sent refers to what.
    pub(crate) uses: Uses,
    pub(crate) state_out: VecDeque<Vec<u8>>,
    pub(crate) facts_out: VecDeque<Vec<u8>>,
}

/// What has happened since it was last taken, in this order.
#[derive(Debug)]
pub enum Event {
    /// Another policy is in force.
    World,
    /// Facts came from elsewhere.
    Imported(Vec<PeerFact>),
    /// The ledger hears the answer with this ticket.
    Heard(u64),
    /// A reply goes out with these addresses.
    Released(u64, Vec<IpAddr>),
    /// A reply fails.
    Failed(u64),
    /// The expired facts of an address that carries no flow end.
    Idle(ScopeKey, IpAddr),
}

/// The gateway.
pub struct Gateway {
    /// Its name.
    pub name: &'static str,
    pub(crate) node: &'static str,
    pub(crate) shared: Shared,
    pub(crate) compiled: Arc<Compiled>,
    pub(crate) desired: Desired,
    pub(crate) ownership: Ownership,
    pub(crate) ledger: Ledger<Shared>,
    pub(crate) classes: Classes,
    pub(crate) placement: Placement,
    pub(crate) nodes: BTreeMap<&'static str, Node>,
    /// What its own kernel holds, and what of that refers to what.
    pub(crate) own: NodeState,
    pub(crate) own_uses: Uses,
    /// What all machines hold alike.
    frame: NodeState,
    pub(crate) boot: u64,
    /// Its own kernel.
    pub kernel: Kernel<true>,
    cleared: bool,
    /// What there is to tell.
    pub events: Vec<Event>,
    /// Addresses that carry flows through this gateway.
    pub live: BTreeSet<(ScopeKey, IpAddr)>,
    /// The policy that is in force.
    pub version: Option<(Objects, UnixSeconds)>,
    /// The one that waits for the end of the start.
    next: Option<(Objects, UnixSeconds)>,
    pub(crate) pending: Vec<(Duration, Vec<PeerFact>)>,
    /// What other gateways that listen are told.
    pub(crate) peers: BTreeMap<&'static str, VecDeque<Vec<u8>>>,
    pub(crate) moved: Option<Duration>,
    /// What nodes were told of owners.
    pub(crate) told: Arc<BTreeMap<Pair, desired::Ownership>>,
    pairs: Vec<HeldPair>,
    applied: Vec<HeldPair>,
    /// How long it takes until addresses and rules are in place, and when what changed last is.
    pub placing: Duration,
    place: Option<Duration>,
    pub(crate) settling: Settling,
    late: Vec<(Duration, IpAddr, Answer)>,
    /// What is on its disk.
    pub journal: Journal,
    pub(crate) next_ticket: u64,
}

pub(crate) fn node_id(name: &str) -> NodeId {
    NodeId(NODES.iter().position(|n| *n == name).unwrap_or(NODES.len()) as u32)
}

pub(crate) fn to_wire<M: Message>(messages: Vec<M>, out: &mut VecDeque<Vec<u8>>) {
    out.extend(messages.iter().map(Message::encode_to_vec));
}

impl Gateway {
    /// The gateway at this place in the list starts: with the kernel that an earlier run has left, and with what its journal holds.
    pub fn start(at: usize, boot: u64, now: Duration, kernel: Kernel<true>, journal: Journal) -> Self {
        let (name, node) = GATEWAYS[at];
        let world = Arc::new(World::compile(&Objects::default(), UnixSeconds(0), None));
        let shared = Shared(Arc::new(RwLock::new(world.clone())));
        let mut ownership = Ownership::new(name, GATEWAYS.iter().map(|(n, _)| (*n).to_owned()), now);
        ownership.recall(journal.claims.clone());
        let recovered = journal.recover(now);
        Self {
            name,
            node,
            ledger: Ledger::new(Limits { track: true, ..Limits::default() }, [boot, 2, 3, 4], shared.clone(), now),
            shared,
            compiled: Arc::new(Compiled::new(world, &Objects::default(), 0)),
            desired: Desired::new(Arc::new(Config::new(node))),
            ownership,
            classes: Classes::default(),
            placement: Placement::default(),
            nodes: BTreeMap::new(),
            own: NodeState::default(),
            own_uses: Uses::default(),
            frame: NodeState::default(),
            boot,
            kernel,
            cleared: false,
            events: Vec::new(),
            live: BTreeSet::new(),
            version: None,
            next: None,
            pending: vec![(now, recovered)],
            peers: BTreeMap::new(),
            moved: None,
            told: Arc::default(),
            pairs: Vec::new(),
            applied: Vec::new(),
            placing: Duration::ZERO,
            place: None,
            settling: Settling::default(),
            late: Vec::new(),
            journal,
            next_ticket: boot << 32 | (at as u64) << 56,
        }
    }

    /// The policy.
    pub fn world(&self) -> Arc<World> {
        self.shared.world()
    }

    /// The ledger, for those who read.
    pub fn ledger(&self) -> &Ledger<Shared> {
        &self.ledger
    }

    /// When the ledger wants to be called.
    pub fn deadline(&self) -> Option<Duration> {
        let late = self.late.first().map(|(due, _, _)| *due);
        self.ledger.next_deadline().into_iter().chain(late).min()
    }

    /// Whether it carries a scope's packets.
    pub fn carries(&self, scope: ScopeKey) -> bool {
        self.world().scope(scope).is_some_and(|s| self.desired.way_out(s).is_some())
    }

    /// The pairs that policy has, with who owns them as far as this gateway knows, and whether it serves them.
    pub fn owners(&self) -> BTreeMap<Pair, (Option<Known>, bool)> {
        let pairs = self.desired.pairs(&self.compiled).into_keys();
        pairs.map(|p| (p.clone(), (self.ownership.owner(&p), self.ownership.holds(&p)))).collect()
    }

    /// Whether nodes were told of all that it decided.
    pub fn in_place(&self) -> bool {
        self.moved.is_none()
    }

    /// An edit.
    pub fn edit(&mut self, objects: &Objects, wall: UnixSeconds, now: Duration) {
        if self.version.is_some() {
            self.put_in_force(objects, wall, now);
        } else {
            self.next = Some((objects.clone(), wall));
        }
    }

    /// As the policy thread compiles it, and as the core takes it: classes first, then grants and facts.
    fn put_in_force(&mut self, objects: &Objects, wall: UnixSeconds, now: Duration) {
        let old = self.world();
        let compiled = match &self.version {
            Some((before, _)) => {
                let touched = touched(before, objects);
                let world = Arc::new(World::compile(objects, wall, Some((&*old, &touched))));
                self.compiled.next(world, objects, &touched)
            }
            None => Compiled::new(Arc::new(World::compile(objects, wall, None)), objects, 1),
        };
        self.version = Some((objects.clone(), wall));
        let world = compiled.world.clone();
        self.shared.set(world.clone());
        let changes = world.changes(&old);
        let pairs = self.desired.pairs(&compiled).into_iter().map(|(p, o)| (p, o.candidates));
        self.ownership.set_pairs(pairs.collect());
        if !changes.scopes.is_empty() {
            NODES.iter().for_each(|n| self.heed(n));
        }
        self.ownership.set_nodes(|n| compiled.nodes.contains_key(n));
        if self.ownership.tick(now) {
            self.moved.get_or_insert(now);
        }
        self.compiled = Arc::new(compiled);
        self.set_claims(now);
        self.events.push(Event::World);
        for scope in changes.scopes.iter().filter(|k| world.scope(**k).is_none()) {
            self.feed(Input::ScopeGone { scope: *scope }, now);
        }
        for (scope, node) in self.placement.follow(&old, &world, &changes.endpoints) {
            self.feed(Input::ScopeLeft { scope, node: node_id(&node) }, now);
        }
        NODES.iter().for_each(|n| self.adopt(n, now));
        for scope in &changes.classes {
            self.feed(Input::Reclassify { scope: Some(*scope) }, now);
        }
        self.import_pending(now);
        let frame = self.desired.frame(&self.compiled);
        let whole = std::mem::replace(&mut self.frame, frame) != self.frame
            || self.moved.is_some()
            || self.owners_changed(&old, &world)
            || !self.cleared;
        let delta = Delta::new(&old, &world, changes, self.classes.news(now));
        if whole {
            self.apply_own();
        }
        if !std::mem::replace(&mut self.cleared, true) {
            let bindings = self.ledger.bindings();
            self.kernel.retain_facts(|scope, ip| bindings.class_of(scope, ip).is_some());
        }
        if whole { self.send_states() } else { self.follow(&delta) }
    }

    /// Decides who owns what, and ends the start when its time has come.
    pub fn decide(&mut self, now: Duration) {
        self.kernel.now = now;
        self.kernel.heartbeat(self.name);
        self.ownership.set_able(self.able());
        if self.version.is_none() {
            if !self.ownership.settled(now) {
                return;
            }
            let Some((objects, wall)) = self.next.take() else { return };
            self.put_in_force(&objects, wall, now);
        }
        if self.ownership.tick(now) {
            self.moved.get_or_insert(now);
            self.set_claims(now);
            self.apply_own();
        }
        if self.place.is_some_and(|at| at <= now) {
            self.place = None;
            self.applied = self.pairs.clone();
        }
        if self.moved.is_some_and(|since| self.applied == self.pairs || now.saturating_sub(since) >= PLACE) {
            self.moved = None;
            self.desired.tell_all();
            self.send_states();
            self.beat_peers();
        }
        self.journal.claims = self.ownership.claims();
    }

    /// Whether this gateway could serve: it has policy, and its node's agent is there unless it never came.
    pub(crate) fn able(&self) -> bool {
        (self.version.is_some() || self.next.is_some()) && self.nodes.get(self.node).is_none_or(|n| n.facts)
    }

    /// It is told to end.
    pub fn leave(&mut self) {
        self.ownership.leave();
        self.beat_peers();
    }

    /// Whether one that is about to end has nothing more to wait for.
    pub fn left(&self, now: Duration) -> bool {
        self.ownership.left(now)
    }

    fn set_claims(&mut self, now: Duration) {
        let world = self.world();
        let mut out = BTreeMap::new();
        for (pair, Order { candidates, others }) in self.desired.pairs(&self.compiled) {
            let Some(known) = self.ownership.owner(&pair) else { continue };
            let claim = desired::Ownership {
                held: self.ownership.holds(&pair),
                standbys: candidates.into_iter().chain(others).filter(|c| *c != known.owner).collect(),
                owner: known.owner,
                epoch: known.epoch,
            };
            out.insert(pair, claim);
        }
        self.desired.set_claims(out, self.moved.is_some().then_some(&*self.told));
        let pairs = self.desired.held(&world);
        if pairs != self.pairs {
            self.pairs = pairs;
            self.place = Some(now + self.placing);
        }
        if self.placing.is_zero() {
            self.applied = self.pairs.clone();
        }
    }

    /// Tells ownership what a node sees.
    fn heed(&mut self, node: &str) {
        let Some(seen) = self.nodes.get(node).and_then(|n| n.seen.clone()) else { return };
        let world = self.world();
        let epochs = seen.claims.iter().filter_map(|c| Some((Desired::pair(world.scope(c.scope)?)?, c.epoch)));
        let epochs: Vec<_> = epochs.collect();
        self.ownership.seen(node, seen.gateways.iter().cloned().collect(), epochs);
    }

    /// A node's `State` stream is up.
    pub fn state_up(&mut self, node: &'static str) {
        let n = self.nodes.entry(node).or_default();
        n.state = true;
        n.sent.anew();
        n.state_out.clear();
        if self.version.is_some() {
            self.send_state(node);
        }
    }

    /// It is down.
    pub fn state_down(&mut self, node: &'static str, now: Duration) {
        let n = self.nodes.entry(node).or_default();
        n.state = false;
        n.state_out.clear();
        self.settling.forget(node_id(node));
        self.hear_late(now);
    }

    /// A node's `Facts` stream is up, of the agent with this boot id.
    pub fn facts_up(&mut self, node: &'static str, agent: u64, now: Duration) {
        let n = self.nodes.entry(node).or_default();
        (n.facts, n.seen) = (true, None);
        n.facts_out.clear();
        let same = n.agent.replace(agent) == Some(agent);
        let node = node_id(node);
        self.feed(if same { Input::NodeUp { node } } else { Input::NodeReset { node } }, now);
    }

    /// It is down.
    pub fn facts_down(&mut self, node: &'static str, now: Duration) {
        let n = self.nodes.entry(node).or_default();
        (n.facts, n.seen) = (false, None);
        n.facts_out.clear();
        self.ownership.agent_gone(node, now);
        self.settling.forget(node_id(node));
        self.hear_late(now);
        self.feed(Input::NodeDown { node: node_id(node) }, now);
    }

    /// The next message for a node.
    pub fn next_state(&mut self, node: &str) -> Option<Vec<u8>> {
        self.nodes.get_mut(node)?.state_out.pop_front()
    }

    /// The next message for a node.
    pub fn next_facts(&mut self, node: &str) -> Option<Vec<u8>> {
        self.nodes.get_mut(node)?.facts_out.pop_front()
    }

    /// Whether messages of the `Facts` stream are on their way to a node; a heartbeat would be behind them.
    pub fn has_facts_for(&self, node: &str) -> bool {
        self.nodes.get(node).is_some_and(|n| !n.facts_out.is_empty())
    }

    /// A node holds its state up to a sequence.
    pub fn state_ack(&mut self, node: &str, boot: u64, seq: u64, now: Duration) {
        if let Some(n) = self.nodes.get_mut(node).filter(|n| n.state && boot == self.boot) {
            n.sent.applied(seq);
            self.settling.acked(node_id(node), seq);
            self.hear_late(now);
        }
    }

    /// A node holds facts up to a sequence.
    pub fn ack(&mut self, node: &str, boot: u64, seq: u64, now: Duration) {
        if boot == self.boot && self.nodes.get(node).is_some_and(|n| n.facts) {
            self.feed(Input::Ack { node: node_id(node), seq }, now);
        }
    }

    /// A node says which gateways it sees, and whom it follows.
    pub fn seen(&mut self, node: &str, seen: Seen, now: Duration) {
        if let Some(n) = self.nodes.get_mut(node).filter(|n| n.facts) {
            let other = n.seen.as_ref().is_none_or(|old| old.orphans != seen.orphans);
            n.seen = Some(seen);
            self.heed(node);
            if other {
                self.adopt(node, now);
            }
        }
    }

    /// A node holds facts that nobody who lives told it of.
    fn adopt(&mut self, node: &str, now: Duration) {
        let Some(seen) = self.nodes.get(node).and_then(|n| n.seen.as_ref()) else { return };
        let placed = |(scope, _): &&(ScopeKey, _)| self.placement.has(*scope, node);
        let facts = seen.orphans.iter().filter(placed).copied().collect();
        self.feed(Input::Orphans { node: node_id(node), facts }, now);
    }

    /// Time passes.
    pub fn tick(&mut self, now: Duration) {
        self.feed(Input::Tick, now);
        self.hear_late(now);
    }

    /// A pod's answer is to be bound.
    pub(crate) fn bind(&mut self, pod: IpAddr, answer: Answer, now: Duration) {
        if self.settling.has(answer.node, pod) {
            self.late.push((now + self.ledger.barrier(), pod, answer));
        } else {
            self.bind_settled(answer, now);
        }
    }

    fn hear_late(&mut self, now: Duration) {
        for (deadline, pod, answer) in std::mem::take(&mut self.late) {
            if !self.settling.has(answer.node, pod) {
                self.bind_settled(answer, now);
            } else if deadline <= now {
                self.events.push(Event::Failed(answer.ticket));
            } else {
                self.late.push((deadline, pod, answer));
            }
        }
    }

    fn bind_settled(&mut self, answer: Answer, now: Duration) {
        let node = NODES[answer.node.0 as usize];
        if !self.placement.has(answer.scope, node) {
            self.events.push(Event::Failed(answer.ticket));
            return;
        }
        self.events.push(Event::Heard(answer.ticket));
        self.feed(Input::Answer(answer), now);
    }

    pub(crate) fn feed(&mut self, input: Input, now: Duration) {
        self.kernel.now = now;
        let mut out = Vec::new();
        self.ledger.handle(input, now, &mut out);
        let (updates, pushes) = pushes::take(&mut out);
        self.local(&updates);
        for (node, push) in pushes {
            self.push(node, push);
        }
        let mut idle = Vec::new();
        for o in out {
            match o {
                Output::Release { ticket, addresses } => self.events.push(Event::Released(ticket, addresses)),
                Output::Fail { ticket, .. } => self.events.push(Event::Failed(ticket)),
                Output::CheckIdle { scope, ip } if !self.live.contains(&(scope, ip)) => idle.push((scope, ip)),
                Output::CheckIdle { .. } | Output::Local(_) | Output::Push { .. } | Output::Unbound { .. } => {}
            }
        }
        for (scope, ip) in idle {
            self.events.push(Event::Idle(scope, ip));
            self.feed(Input::Idle { scope, ip }, now);
        }
    }

    /// Whether a reply could not be told from one that was given before, and the node has confirmed that.
    pub(crate) fn stands(&self, pod: IpAddr, a: &Answer, now: Duration) -> bool {
        let bindings = self.ledger.bindings();
        !self.settling.has(a.node, pod)
            && bindings.answer_stands(a.scope, a.name.as_str(), &a.addresses, a.node, now + a.ttl, a.acked)
    }
}
