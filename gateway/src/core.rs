//! The core thread: owns the ledger, this gateway's kernel maps and what each node was sent.
//!
//! Everything that changes them comes through one bounded channel, so that there is
//! one order of events and no lock. It never blocks on a node: a node whose
//! queue is full is cut off and starts anew with a snapshot.

mod failover;
mod settling;
#[cfg(test)]
mod soak;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ahash::AHashMap;
use arc_swap::ArcSwap;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use parking_lot::RwLock;
use serde::Serialize;
use tidegate_ebpf::{Datapath, Place, Program};
use tidegate_ledger::{Answer, Classify, Input, Ledger, NodeId, Output, OwnerId, Usage};
use tidegate_policy::model::Objects;
use tidegate_policy::state::{Entry, FactUpdate, NodeState};
use tidegate_policy::world::{NodeStateParts, World};
use tidegate_policy::{ClassKey, Name, Reason, ScopeKey};
use tidegate_proto::wire::{FactsUpdate, PeerUpdate, StateUpdate};
use tidegate_proto::{Claim, FactsBatch, GrantEntry, PeerFact, PeerMessage, Seen, StateBatch};
use tidegate_sni::Registry;
use tokio::sync::{mpsc, oneshot};

pub use self::settling::Settling;
use crate::admin::Guard;
use crate::desired::{Compiled, Desired, Target};
use crate::dns_view::DnsView;
use crate::egress::TOWARDS_PODS;
use crate::egress::nft::HeldPair;
use crate::journal::Journal;
use crate::ownership::Ownership;
use crate::push::{Ack, StreamId};
use crate::relay_check::still_allowed;
use crate::telemetry::BARRIER_SECONDS;

/// Nodes and other gateways hear from us so often. A node asks a stand-in for names after 600 ms of silence, a gateway
/// takes two seconds of it for our death.
const HEARTBEAT: Duration = Duration::from_millis(200);
/// Ownership is decided so often.
const DECIDE: Duration = Duration::from_millis(100);
/// What was learnt goes to the other gateways and to the journal at most so often.
const SPREAD: Duration = Duration::from_millis(20);
/// Answers and acks that are heard before what follows from them is carried out.
const BATCH: usize = 128;
/// Counters are published so often.
const COUNT: Duration = Duration::from_secs(1);
/// Facts of scopes that this gateway does not know yet, kept for the next compile.
const MAX_PENDING: usize = 65536;

/// What a DNS answer waits for.
pub struct Bind {
    /// The asking pod's scope.
    pub scope: ScopeKey,
    /// The asking pod's address.
    pub pod: IpAddr,
    /// The asking pod's node.
    pub node: NodeId,
    /// The namespace whose quotas count.
    pub owner: OwnerId,
    /// The name.
    pub name: Name,
    /// The addresses.
    pub addresses: Vec<IpAddr>,
    /// What is left of the RRset's TTL.
    pub ttl: Duration,
    /// The rule's least life of a binding.
    pub min_binding: Option<Duration>,
    /// Told which addresses are bound.
    pub reply: oneshot::Sender<Result<Vec<IpAddr>, Reason>>,
}

/// Messages to the core.
pub enum ToCore {
    /// Policy was compiled anew.
    World(Arc<Compiled>),
    /// An answer waits for its addresses to be bound.
    Bind(Box<Bind>),
    /// A State stream is up.
    StateUp {
        /// The node's name, from its certificate.
        node: String,
        /// The stream.
        id: StreamId,
        /// Towards the node.
        out: mpsc::Sender<StateUpdate>,
    },
    /// A node applied a state.
    StateAck {
        /// The node's name.
        node: String,
        /// The stream.
        id: StreamId,
        /// What it holds.
        ack: Ack,
    },
    /// A State stream ended.
    StateDown {
        /// The node's name.
        node: String,
        /// The stream.
        id: StreamId,
    },
    /// A Facts stream is up.
    FactsUp {
        /// The node's name, from its certificate.
        node: String,
        /// The stream.
        id: StreamId,
        /// The agent's boot id.
        boot_id: u64,
        /// Towards the node.
        out: mpsc::Sender<FactsUpdate>,
    },
    /// A node applied facts.
    FactsAck {
        /// The node's name.
        node: String,
        /// The stream.
        id: StreamId,
        /// What it holds.
        ack: Ack,
    },
    /// A Facts stream ended.
    FactsDown {
        /// The node's name.
        node: String,
        /// The stream.
        id: StreamId,
    },
    /// What an agent sees of the gateways.
    Seen {
        /// The node's name.
        node: String,
        /// The Facts stream that said it.
        id: StreamId,
        /// What it sees.
        seen: Seen,
    },
    /// Another gateway asks for what this one knows.
    PeerUp {
        /// Its name, from its certificate.
        gateway: String,
        /// Towards it.
        out: mpsc::Sender<PeerUpdate>,
    },
    /// Another gateway said something.
    Peer {
        /// Its name.
        gateway: String,
        /// What it said.
        message: PeerMessage,
    },
    /// The pod-facing device is there: attach the program to it.
    Attach {
        /// Told how it went.
        reply: Sender<Result<(), String>>,
    },
    /// The node's agent is gone: nothing is held there any more.
    Unplugged,
    /// This gateway is about to end: others take over what it holds.
    Leave {
        /// Told when they have, or cannot.
        reply: oneshot::Sender<()>,
    },
    /// End the thread.
    Stop,
}

/// Dense ids of nodes and namespaces by name; ids are never used again, also not those of names that were forgotten.
#[derive(Debug, Default)]
pub struct Ids(RwLock<IdTable>);

#[derive(Debug, Default)]
struct IdTable {
    ids: AHashMap<Arc<str>, u32>,
    names: AHashMap<u32, Arc<str>>,
    next: u32,
}

impl Ids {
    /// The id of a name, new if it was not known.
    pub fn id(&self, name: &str) -> u32 {
        if let Some(id) = self.0.read().ids.get(name) {
            return *id;
        }
        let mut guard = self.0.write();
        let IdTable { ids, names, next } = &mut *guard;
        if let Some(id) = ids.get(name) {
            return *id;
        }
        let id = *next;
        // A new node or namespace every second would take a century.
        *next = next.wrapping_add(1);
        let name: Arc<str> = name.into();
        ids.insert(name.clone(), id);
        names.insert(id, name);
        id
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.0.read().names.len()
    }

    /// The name of an id.
    fn name(&self, id: u32) -> Option<Arc<str>> {
        self.0.read().names.get(&id).cloned()
    }

    /// Forgets names that `keep` does not want.
    fn retain(&self, keep: impl Fn(u32, &str) -> bool) {
        let mut guard = self.0.write();
        let IdTable { ids, names, .. } = &mut *guard;
        names.retain(|id, name| keep(*id, name));
        ids.retain(|_, id| names.contains_key(id));
    }
}

/// What other threads share with the core.
pub struct Shared {
    /// The compiled policy.
    pub world: ArcSwap<World>,
    /// The DNS service's view of it.
    pub view: Arc<ArcSwap<DnsView>>,
    /// The pairs that this gateway holds.
    pub pairs: Arc<ArcSwap<Vec<HeldPair>>>,
    /// Those of them whose addresses and rules are in place.
    pub applied: Arc<ArcSwap<Vec<HeldPair>>>,
    /// Every egress address of every pool.
    pub egress: ArcSwap<BTreeSet<IpAddr>>,
    /// Node ids.
    pub nodes: Ids,
    /// Namespace ids.
    pub namespaces: Ids,
    /// Pods whose answers wait for their node.
    pub settling: Settling,
    /// The monotonic clock that the ledger counts on.
    pub clock: Clock,
    /// What `tidegate status` shows.
    pub status: ArcSwap<Status>,
}

impl Shared {
    /// Now, on the ledger's clock.
    pub fn now(&self) -> Duration {
        self.clock.now()
    }
}

/// A monotonic clock that starts with the process.
pub struct Clock {
    zero: Instant,
    /// What a test says that it shows, in milliseconds.
    #[cfg(test)]
    set: std::sync::atomic::AtomicU64,
}

impl Clock {
    /// One that shows zero.
    pub fn start() -> Self {
        Self {
            zero: Instant::now(),
            #[cfg(test)]
            set: Default::default(),
        }
    }

    fn now(&self) -> Duration {
        #[cfg(test)]
        if let ms @ 1.. = self.set.load(std::sync::atomic::Ordering::Relaxed) {
            return Duration::from_millis(ms);
        }
        self.zero.elapsed()
    }
}

/// A node's part of the status.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeStatus {
    /// Whether both streams are up.
    pub connected: bool,
    /// The last state sent.
    pub sent: u64,
    /// The last state that its kernel holds.
    pub applied: u64,
    /// Why the last one could not be applied in whole.
    pub error: Option<String>,
}

/// What `tidegate status` shows of the core.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Nodes by name.
    pub nodes: BTreeMap<String, NodeStatus>,
    /// Learnt facts.
    pub facts: usize,
    /// Live relayed connections.
    pub connections: usize,
    /// Who owns which egress pair.
    pub pairs: Vec<PairStatus>,
}

/// A pair's part of the status.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PairStatus {
    /// Its pool and addresses.
    pub pair: String,
    /// The owning gateway.
    pub owner: String,
    /// The epoch of that.
    pub epoch: u64,
    /// Whether this gateway is the owner and serves it.
    pub held: bool,
}

#[derive(Default)]
struct Node {
    state: Option<(StreamId, mpsc::Sender<StateUpdate>)>,
    facts: Option<(StreamId, mpsc::Sender<FactsUpdate>)>,
    agent: Option<u64>,
    /// What its agent said last on the Facts stream that is up.
    seen: Option<Seen>,
    /// What the State stream was sent, grants of the Facts stream included.
    held: NodeState,
    /// Whether the stream has begun with a snapshot, as each must.
    begun: bool,
    state_seq: u64,
    facts_seq: u64,
    status: NodeStatus,
}

struct Waiting {
    since: Instant,
    reply: oneshot::Sender<Result<Vec<IpAddr>, Reason>>,
}

/// Everything that the thread owns.
pub struct Core {
    /// Messages.
    pub rx: Receiver<ToCore>,
    /// Shared with other threads.
    pub shared: Arc<Shared>,
    /// Builds desired states.
    pub desired: Arc<Desired>,
    /// Whether the pod's own network has a way out for IPv4 and for IPv6.
    pub families: (bool, bool),
    /// Facts and barrier.
    pub ledger: Ledger<Classifier>,
    /// This gateway's kernel maps.
    pub datapath: Datapath,
    /// Live relayed connections.
    pub registry: Arc<Registry>,
    /// Chosen at start.
    pub boot_id: u64,
    /// This gateway's name.
    pub gateway: String,
    /// A flow without packets for so long is dead.
    pub flow_idle: Duration,
    /// Who owns what.
    pub ownership: Ownership,
    /// Where facts outlive a restart.
    pub journal: Option<Journal>,
    /// What an earlier run left in it.
    pub recovered: Vec<PeerFact>,
    /// Dropped when the gateway begins to serve.
    pub starting: Option<Guard>,
}

/// Finds classes in whatever policy holds now.
pub struct Classifier(pub Arc<Shared>);

impl Classify for Classifier {
    fn class(&self, scope: ScopeKey, ip: IpAddr, names: &mut dyn Iterator<Item = &Name>) -> ClassKey {
        match self.0.world.load().scope(scope) {
            Some(s) => s.class(ip, names),
            // No grant has this class: it allows nothing.
            None => ClassKey(0),
        }
    }
}

/// Which classes facts have, so that their grants are pushed and those of others are not.
#[derive(Default)]
struct Classes {
    of: AHashMap<(ScopeKey, IpAddr), ClassKey>,
    count: BTreeMap<(ScopeKey, ClassKey), u32>,
}

impl Classes {
    /// Notes a fact's class; says whether no other fact of the scope had it.
    fn note(&mut self, scope: ScopeKey, ip: IpAddr, class: Option<ClassKey>) -> bool {
        let old = match class {
            Some(c) => self.of.insert((scope, ip), c),
            None => self.of.remove(&(scope, ip)),
        };
        if old == class {
            return false;
        }
        if let Some(old) = old
            && let Some(n) = self.count.get_mut(&(scope, old))
        {
            *n -= 1;
            if *n == 0 {
                self.count.remove(&(scope, old));
            }
        }
        let Some(class) = class else { return false };
        let n = self.count.entry((scope, class)).or_default();
        *n += 1;
        *n == 1
    }

    fn active(&self) -> impl Iterator<Item = (ScopeKey, ClassKey)> {
        self.count.keys().copied()
    }
}

/// Which nodes have a pod of which scope.
fn placed(world: &World) -> BTreeSet<(ScopeKey, Arc<str>)> {
    world.endpoints().filter_map(|(_, e)| Some((e.member?.scope, e.who.node.clone()))).collect()
}

struct Run {
    core: Core,
    due: Due,
    /// Whether the start is over: peers were heard, or had their time.
    settled: bool,
    /// The compile that waits for that.
    next: Option<Arc<Compiled>>,
    /// Facts that wait for that, or for a compile that knows their scope, and when they came.
    pending: Vec<(Duration, Vec<PeerFact>)>,
    /// Other gateways that ask for what this one knows.
    peers: BTreeMap<String, mpsc::Sender<PeerUpdate>>,
    /// Whether the program on the pod-facing device is in place.
    attached: bool,
    /// When to put it in the place of another layout's, if that goes on.
    move_over: Option<Duration>,
    /// Since when nodes wait to be told of new owners, until what those need is in place.
    moved: Option<Duration>,
    /// Whether this gateway is about to end.
    leaving: Option<failover::Leaving>,
    /// What the journal has of claims.
    written: Vec<Claim>,
    placed: BTreeSet<(ScopeKey, Arc<str>)>,
    /// Whether facts of an earlier process were removed from our kernel.
    cleared: bool,
    compiled: Arc<Compiled>,
    classes: Classes,
    nodes: HashMap<String, Node>,
    waiting: AHashMap<u64, Waiting>,
    /// Answers to pods that settle, in the order of their deadlines.
    late: Vec<(Duration, Bind)>,
    own: NodeState,
    next_ticket: u64,
    out: Vec<Output>,
}

impl Core {
    /// Runs until told to stop or until nobody can talk to it any more.
    pub fn run(self) {
        let mut run = Run::new(self);
        loop {
            let wait = run.due().saturating_sub(run.core.shared.now());
            match run.core.rx.recv_timeout(wait) {
                Ok(ToCore::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Ok(message) => {
                    run.take(message);
                    // What waits behind it is heard before anything is carried out: a node is told of all of it in one
                    // message, and acks it with one.
                    for _ in 1..BATCH {
                        match run.core.rx.try_recv() {
                            Ok(ToCore::Stop) => return,
                            Ok(message) => run.take(message),
                            Err(_) => break,
                        }
                    }
                    run.carry_out();
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            run.timers();
        }
    }
}

/// When what comes again and again is due.
struct Due {
    beat: Duration,
    decide: Duration,
    count: Duration,
    spread: Duration,
    full: Duration,
}

impl Run {
    fn new(mut core: Core) -> Self {
        let recovered = std::mem::take(&mut core.recovered);
        let now = core.shared.now();
        let full = now + core.desired.full_pass();
        Self {
            due: Due { beat: now, decide: now, count: now, spread: now, full },
            settled: false,
            next: None,
            pending: vec![(now, recovered)],
            peers: BTreeMap::new(),
            attached: false,
            move_over: None,
            moved: None,
            leaving: None,
            written: Vec::new(),
            compiled: Arc::new(Compiled::new(core.shared.world.load_full(), &Objects::default())),
            classes: Classes::default(),
            placed: BTreeSet::new(),
            cleared: false,
            core,
            nodes: HashMap::new(),
            waiting: AHashMap::new(),
            late: Vec::new(),
            own: NodeState::default(),
            next_ticket: 1,
            out: Vec::new(),
        }
    }

    /// When there is something to do at the latest.
    fn due(&self) -> Duration {
        let d = &self.due;
        let spread = self.core.ledger.has_changes().then_some(d.spread);
        let others = spread.into_iter().chain(self.core.ledger.next_deadline());
        let late = self.late.first().map(|(deadline, _)| *deadline);
        others.chain(late).chain([d.full, d.decide, d.count]).fold(d.beat, Duration::min)
    }

    /// Does what is due.
    fn timers(&mut self) {
        let now = self.core.shared.now();
        if self.core.ledger.next_deadline().is_some_and(|d| d <= now) {
            self.feed(Input::Tick);
        }
        if self.late.first().is_some_and(|(deadline, _)| *deadline <= now) {
            self.hear_late(now);
        }
        if self.due.decide <= now {
            self.decide();
            self.due.decide = now + if self.moved.is_some() { SPREAD } else { DECIDE };
        }
        if self.core.ledger.has_changes() && self.due.spread <= now {
            self.due.spread = now + SPREAD;
            self.spread();
        }
        if self.due.beat <= now {
            self.due.beat = now + HEARTBEAT;
            self.heartbeat();
        }
        if self.due.count <= now {
            self.due.count = now + COUNT;
            self.count();
        }
        if self.due.full <= now {
            self.due.full = now + self.core.desired.full_pass();
            self.full_pass();
        }
    }
}

impl Run {
    /// Takes a message. What follows from an answer or an ack is left for [`Self::carry_out`].
    fn take(&mut self, message: ToCore) {
        if !matches!(message, ToCore::Bind(_) | ToCore::FactsAck { .. }) {
            self.carry_out();
        }
        match message {
            ToCore::World(world) if self.settled => self.world(world),
            ToCore::World(world) => self.next = Some(world),
            ToCore::Bind(bind) => self.bind(*bind),
            ToCore::StateUp { node, id, out } => {
                let n = self.nodes.entry(node.clone()).or_default();
                n.state = Some((id, out));
                (n.held, n.begun) = (NodeState::default(), false);
                // An empty snapshot would take policy away from the node's pods: before there is one, nothing is said.
                if self.settled {
                    let parts = self.parts();
                    self.send_state(&node, &parts);
                }
            }
            ToCore::StateAck { node, id, ack } => {
                let boot_id = self.core.boot_id;
                if let Some(n) = self.nodes.get_mut(&node)
                    && n.state.as_ref().is_some_and(|s| s.0 == id)
                    && ack.boot_id == boot_id
                {
                    if let Some(error) = &ack.error {
                        tracing::warn!(
                            node,
                            sequence = ack.sequence,
                            error,
                            "a node could not apply its state in whole"
                        );
                    }
                    n.status.applied = ack.sequence;
                    n.status.error = ack.error;
                    let id = self.core.shared.nodes.id(&node);
                    self.core.shared.settling.acked(NodeId(id), ack.sequence);
                    self.hear_late(self.core.shared.now());
                }
            }
            ToCore::StateDown { node, id } => {
                if let Some(n) = self.nodes.get_mut(&node)
                    && n.state.as_ref().is_some_and(|s| s.0 == id)
                {
                    n.state = None;
                    self.settled_without(&node);
                }
            }
            ToCore::FactsUp { node, id, boot_id, out } => {
                let n = self.nodes.entry(node.clone()).or_default();
                (n.facts, n.seen) = (Some((id, out)), None);
                let same = n.agent.replace(boot_id) == Some(boot_id);
                let node = NodeId(self.core.shared.nodes.id(&node));
                self.feed(if same { Input::NodeUp { node } } else { Input::NodeReset { node } });
            }
            ToCore::FactsAck { node, id, ack } => {
                let current = self.nodes.get(&node).is_some_and(|n| n.facts.as_ref().is_some_and(|f| f.0 == id));
                if current && ack.boot_id == self.core.boot_id {
                    if let Some(error) = &ack.error {
                        // Not confirmed: the answers that wait for it end with barrier-timeout. The next stream begins
                        // with a snapshot.
                        tracing::warn!(node, sequence = ack.sequence, error, "a node could not apply facts");
                        self.facts_down(&node);
                        return;
                    }
                    let node = NodeId(self.core.shared.nodes.id(&node));
                    self.hear(Input::Ack { node, seq: ack.sequence });
                }
            }
            ToCore::FactsDown { node, id } => {
                if self.nodes.get(&node).is_some_and(|n| n.facts.as_ref().is_some_and(|f| f.0 == id)) {
                    self.facts_down(&node);
                }
            }
            ToCore::Attach { reply } => {
                let result = self.attach();
                self.attached = result.is_ok();
                // Done, or left to the asker, who asks again.
                self.move_over = None;
                // The asker waits with a limit of its own.
                let _ = reply.try_send(result.map_err(|e| e.to_string()));
            }
            ToCore::Seen { node, id, seen } => {
                if let Some(n) = self.nodes.get_mut(&node)
                    && n.facts.as_ref().is_some_and(|f| f.0 == id)
                {
                    n.seen = Some(seen);
                    self.heed(Some(&node));
                }
            }
            ToCore::Unplugged => (self.attached, self.move_over) = (false, None),
            ToCore::Leave { reply } => self.leave(reply),
            ToCore::PeerUp { gateway, out } => self.peer_up(gateway, out),
            ToCore::Peer { gateway, message } => self.peer(&gateway, message),
            ToCore::Stop => {}
        }
    }

    /// Puts our program first on the pod-facing device.
    fn attach(&mut self) -> Result<(), tidegate_ebpf::Error> {
        const OURS: Program = Program::GatewayIngress;
        let datapath = &mut self.core.datapath;
        if datapath.is_upgrade() {
            // The program of another layout goes on until policy is there.
            if !self.settled {
                return Ok(());
            }
            if let Err(error) = datapath.carry_flows() {
                tracing::error!(%error, "flows of another layout cannot be taken over");
            }
        }
        let place = datapath.place(OURS, TOWARDS_PODS)?;
        if self.attached && place != Place::First && !datapath.is_upgrade() {
            tracing::warn!(?place, "another program had changed who sees packets first on {TOWARDS_PODS}: repaired");
            tidegate_agent::events::repaired("program", 1);
        }
        match place {
            Place::Behind(_) => datapath.reclaim(OURS, TOWARDS_PODS)?,
            Place::First | Place::Missing => drop(datapath.attach(OURS, TOWARDS_PODS)?),
        }
        if place == Place::Missing
            && let Err(error) = datapath.detach_gone()
        {
            tracing::warn!(%error, "pins of devices that are gone stay");
        }
        if datapath.is_upgrade() {
            let pins = datapath.retire_others()?;
            tracing::info!(pins, "moved over from the kernel maps of another layout");
        }
        Ok(())
    }

    fn facts_down(&mut self, node: &str) {
        if let Some(n) = self.nodes.get_mut(node) {
            (n.facts, n.seen) = (None, None);
        }
        self.core.ownership.agent_gone(node);
        self.settled_without(node);
        let node = NodeId(self.core.shared.nodes.id(node));
        self.feed(Input::NodeDown { node });
    }

    /// Nothing waits for this node's acks of states any more.
    fn settled_without(&mut self, node: &str) {
        let id = self.core.shared.nodes.id(node);
        self.core.shared.settling.forget(NodeId(id));
        self.hear_late(self.core.shared.now());
    }

    /// An edit: classes first, then grants, facts and cuts.
    fn world(&mut self, compiled: Arc<Compiled>) {
        let world = compiled.world.clone();
        let old = self.core.shared.world.swap(world.clone());
        self.core.shared.egress.store(Arc::new(compiled.egress.clone()));
        self.core.ownership.set_pairs(self.core.desired.pairs(&world));
        self.heed(None);
        self.core.ownership.set_nodes(|n| compiled.nodes.contains_key(n));
        let now = self.core.shared.now();
        if self.core.ownership.tick(now) {
            self.moved.get_or_insert(now);
        }
        self.set_claims(&world);
        self.core.shared.pairs.store(Arc::new(self.core.desired.held(&world)));
        self.compiled = compiled;
        for scope in old.scopes().keys().filter(|k| world.scope(**k).is_none()) {
            self.feed(Input::ScopeGone { scope: *scope });
        }
        // A node without a pod of a scope has no use for its facts.
        let placed = placed(&world);
        let left: Vec<_> = self.placed.difference(&placed).cloned().collect();
        self.placed = placed;
        for (scope, node) in left {
            let node = NodeId(self.core.shared.nodes.id(&node));
            self.feed(Input::ScopeLeft { scope, node });
        }
        for scope in world.changed_scopes(&old) {
            self.feed(Input::Reclassify { scope: Some(scope) });
        }
        self.import_pending();
        self.apply_own();
        if !std::mem::replace(&mut self.cleared, true) {
            // Facts that an earlier process left in our kernel and the ledger does not know could outlive their rule.
            let bindings = self.core.ledger.bindings();
            match self.core.datapath.retain_facts(|scope, ip| bindings.class_of(scope, ip).is_some()) {
                Ok(0) => {}
                Ok(facts) => tracing::info!(facts, "facts of an earlier run that nobody vouches for were removed"),
                Err(error) => tracing::error!(%error, "cannot remove facts of an earlier run"),
            }
        }
        self.send_states();
        // Only now: by what nodes were sent, pods have to settle before they get answers of the new policy.
        let view = DnsView::new(&self.compiled, self.core.families);
        self.core.shared.view.store(Arc::new(view));
        let cut = self.core.registry.revoke(|live| !still_allowed(&world, live), Reason::Revoked);
        if cut > 0 {
            tracing::info!(connections = cut, "connections that policy no longer allows were reset");
        }
    }

    fn apply_own(&mut self) {
        let parts = self.parts();
        self.own = self.core.desired.state(&self.compiled, &parts, Target::Own);
        self.apply_maps(false);
    }

    /// Brings every node to what follows from policy, facts and ownership.
    fn send_states(&mut self) {
        let parts = self.parts();
        let names: Vec<String> = self.nodes.keys().cloned().collect();
        for node in names {
            self.send_state(&node, &parts);
        }
    }

    /// Classes that facts have, and those that the next facts will have.
    fn live_classes(&self) -> impl Iterator<Item = (ScopeKey, ClassKey)> {
        self.classes.active().chain(self.compiled.ahead.iter().copied())
    }

    fn parts(&self) -> NodeStateParts {
        self.core.desired.parts(&self.compiled.world, self.live_classes())
    }

    fn bind(&mut self, b: Bind) {
        if self.core.shared.settling.has(b.node, b.pod) {
            self.late.push((self.core.shared.now() + self.core.ledger.barrier(), b));
        } else {
            self.bind_settled(b);
        }
    }

    /// Goes on with the answers to pods that have settled, and ends those that waited too long.
    fn hear_late(&mut self, now: Duration) {
        if self.late.is_empty() {
            return;
        }
        for (deadline, b) in std::mem::take(&mut self.late) {
            if !self.core.shared.settling.has(b.node, b.pod) {
                self.bind_settled(b);
            } else if deadline <= now {
                metrics::histogram!(BARRIER_SECONDS).record(self.core.ledger.barrier().as_secs_f64());
                // The pod may have gone away meanwhile.
                let _ = b.reply.send(Err(Reason::BarrierTimeout));
            } else {
                self.late.push((deadline, b));
            }
        }
        self.carry_out();
    }

    fn bind_settled(&mut self, b: Bind) {
        if self.compiled.world.scope(b.scope).is_none() {
            // An edit came between: the scope must not come back to life by an answer.
            let _ = b.reply.send(Err(Reason::NoBinding));
            return;
        }
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.waiting.insert(ticket, Waiting { since: Instant::now(), reply: b.reply });
        self.hear(Input::Answer(Answer {
            ticket,
            scope: b.scope,
            owner: b.owner,
            node: b.node,
            name: b.name,
            addresses: b.addresses,
            ttl: b.ttl,
            min_binding: b.min_binding,
        }));
    }

    /// The ledger hears something.
    fn hear(&mut self, input: Input) {
        self.core.ledger.handle(input, self.core.shared.now(), &mut self.out);
    }

    /// The ledger hears something, and what follows is carried out.
    fn feed(&mut self, input: Input) {
        self.hear(input);
        self.carry_out();
    }

    /// Carries out what the ledger asked for: first our own kernel, then the nodes, then the answers.
    fn carry_out(&mut self) {
        let mut out = std::mem::take(&mut self.out);
        let mut updates = Vec::new();
        let mut pushes: BTreeMap<NodeId, (u64, bool, Vec<FactUpdate>)> = BTreeMap::new();
        out.retain_mut(|output| match output {
            Output::Local(update) => {
                updates.push(update.clone());
                false
            }
            Output::Push { node, seq, snapshot, facts } => {
                let facts = std::mem::take(facts);
                match pushes.get_mut(node) {
                    // Acks are cumulative: several pushes are one, under the last sequence.
                    Some(push) if !*snapshot => {
                        push.0 = *seq;
                        push.2.extend(facts);
                    }
                    // A snapshot says all that was said before.
                    _ => drop(pushes.insert(*node, (*seq, *snapshot, facts))),
                }
                false
            }
            _ => true,
        });
        if !updates.is_empty() {
            self.local(&updates);
        }
        for (node, (seq, snapshot, facts)) in pushes {
            self.push(node, seq, snapshot, facts);
        }
        let mut idle = Vec::new();
        for output in out.drain(..) {
            match output {
                Output::Release { ticket, addresses } => self.answer(ticket, Ok(addresses)),
                Output::Fail { ticket, reason } => self.answer(ticket, Err(reason)),
                Output::CheckIdle { scope, ip } => {
                    if self.is_idle(scope, ip) {
                        idle.push((scope, ip));
                    }
                }
                Output::Local(_) | Output::Push { .. } | Output::Unbound { .. } => {}
            }
        }
        self.out = out;
        // Many facts may end at the same time: nodes hear of all of them in one message.
        let any = !idle.is_empty();
        for (scope, ip) in idle {
            self.hear(Input::Idle { scope, ip });
        }
        if any {
            self.carry_out();
        }
    }

    fn answer(&mut self, ticket: u64, result: Result<Vec<IpAddr>, Reason>) {
        let Some(w) = self.waiting.remove(&ticket) else { return };
        metrics::histogram!(BARRIER_SECONDS).record(w.since.elapsed().as_secs_f64());
        // The pod may have gone away meanwhile.
        let _ = w.reply.send(result);
    }

    /// An expired fact goes when neither the relay nor the kernel has a flow to its address.
    fn is_idle(&self, scope: ScopeKey, ip: IpAddr) -> bool {
        if self.core.registry.live(scope, ip) > 0 {
            return false;
        }
        match self.core.datapath.fact_last_seen(scope, ip) {
            Some(ago) => ago > self.core.flow_idle,
            None => true,
        }
    }

    /// Our own kernel must hold facts, with their classes' grants, before any answer says them.
    fn local(&mut self, updates: &[FactUpdate]) {
        let mut new = Vec::new();
        for update in updates {
            let class = update.value.map(|v| v.class);
            let first = self.classes.note(update.scope, update.ip, class);
            let Some(class) = class.filter(|_| first) else { continue };
            // Of scopes that another gateway owns this kernel carries nothing.
            let scope = self.compiled.world.scope(update.scope);
            if scope.is_none_or(|s| self.core.desired.way_out(s).is_none()) {
                continue;
            }
            let missing = |(g, ports): &(_, _)| self.own.grants.get(&(*g, class)) != Some(ports);
            let grants = self.compiled.grants(update.scope, class).into_iter().filter(missing);
            new.extend(grants.map(|(g, ports)| (g, class, ports)));
        }
        if let Err(error) = self.core.datapath.grants(&new) {
            tracing::error!(%error, "cannot write grants into the kernel");
        }
        for (group, class, ports) in new {
            self.own.set(Entry::Grant(group, class, ports));
        }
        if let Err(error) = self.core.datapath.facts(updates) {
            tracing::error!(%error, "cannot write facts into the kernel");
        }
    }

    fn push(&mut self, node: NodeId, seq: u64, snapshot: bool, facts: Vec<FactUpdate>) {
        let Some(name) = self.core.shared.nodes.name(node.0) else { return };
        let Some(n) = self.nodes.get_mut(&*name) else { return };
        // What the State stream was sent but the node has not acked yet, the ack of these facts must not rely on.
        let behind = n.state.is_none() || n.state_seq > n.status.applied;
        let classes: BTreeSet<(ScopeKey, ClassKey)> =
            facts.iter().filter_map(|f| Some((f.scope, f.value.as_ref()?.class))).collect();
        let mut grants = Vec::new();
        for (scope, class) in classes {
            for (group, ports) in self.compiled.grants(scope, class) {
                if behind || n.held.grants.get(&(group, class)) != Some(&ports) {
                    n.held.set(Entry::Grant(group, class, ports.clone()));
                    grants.push(GrantEntry { group, class, ports });
                }
            }
        }
        n.facts_seq = seq;
        let batch = FactsBatch { boot_id: self.core.boot_id, sequence: seq, snapshot, more: false, grants, facts };
        let Some((_, out)) = &n.facts else { return };
        if batch.into_messages().into_iter().any(|m| out.try_send(m).is_err()) {
            tracing::warn!(node = &*name, "a node does not keep up with its facts: it will start anew");
            self.facts_down(&name);
        }
    }

    fn send_state(&mut self, node: &str, parts: &NodeStateParts) {
        let Some(n) = self.nodes.get_mut(node) else { return };
        let Some((_, out)) = &n.state else { return };
        let wanted = self.core.desired.state(&self.compiled, parts, Target::Node(node));
        let snapshot = !std::mem::replace(&mut n.begun, true);
        let (set, delete) = if snapshot { (wanted.entries(), Vec::new()) } else { n.held.diff(&wanted) };
        if !snapshot && set.is_empty() && delete.is_empty() {
            return;
        }
        n.state_seq += 1;
        n.status.sent = n.state_seq;
        // A stream's first state is what the node mostly holds already, and without its facts' acks nothing waits.
        if !snapshot && n.facts.is_some() {
            let pod = |e: &Entry| if let Entry::Endpoint(ip, _) = e { Some(*ip) } else { None };
            let id = NodeId(self.core.shared.nodes.id(node));
            self.core.shared.settling.sent(id, n.state_seq, set.iter().filter_map(pod));
        }
        n.held = wanted;
        let batch = StateBatch {
            gateway: self.core.gateway.clone(),
            boot_id: self.core.boot_id,
            sequence: n.state_seq,
            snapshot,
            more: false,
            set,
            delete,
        };
        if batch.into_messages().into_iter().any(|m| out.try_send(m).is_err()) {
            tracing::warn!(node, "a node does not keep up with its state: it will start anew");
            n.state = None;
            self.settled_without(node);
        }
    }

    /// Forgets nodes that are no part of the cluster any more, and namespaces that are gone with all of their facts.
    fn forget(&mut self) {
        let compiled = self.compiled.clone();
        let placed: BTreeSet<&str> = self.placed.iter().map(|(_, node)| &**node).collect();
        let stays = |name: &str| compiled.nodes.contains_key(name) || placed.contains(name);
        self.nodes.retain(|name, n| stays(name) || n.state.is_some() || n.facts.is_some());
        let names = &self.core.shared.nodes;
        names.retain(|_, name| stays(name) || self.nodes.contains_key(name));
        let gone: Vec<NodeId> = self.core.ledger.nodes().filter(|n| names.name(n.0).is_none()).collect();
        for node in gone {
            self.feed(Input::NodeGone { node });
        }
        let known: BTreeSet<&str> = compiled.world.scopes().values().map(|s| &**s.namespace()).collect();
        let ledger = &self.core.ledger;
        let used = |id| ledger.usage(OwnerId(id)) != Usage::default();
        self.core.shared.namespaces.retain(|id, name| known.contains(name) || used(id));
    }

    /// Repairs what another program changed in our maps, and forgets what nothing names any more.
    fn full_pass(&mut self) {
        if !self.settled {
            return;
        }
        self.forget();
        let parts = self.parts();
        self.own = self.core.desired.state(&self.compiled, &parts, Target::Own);
        self.apply_maps(true);
        let names: Vec<String> = self.nodes.keys().cloned().collect();
        for node in names {
            self.send_state(&node, &parts);
        }
        self.compiled.world.retain_classes(&self.live_classes().map(|(_, c)| c).collect());
        match self.core.datapath.sweep() {
            Ok(swept) => tidegate_agent::events::repaired("map", swept.repaired),
            Err(error) => tracing::warn!(%error, "cannot sweep the kernel's tables"),
        }
    }

    fn apply_maps(&mut self, full: bool) {
        let local = self.core.desired.local();
        match self.core.datapath.apply(&self.own, &local, full) {
            Ok(applied) if applied.repaired + applied.pinned > 0 => {
                let (entries, pins) = (applied.repaired, applied.pinned);
                tracing::warn!(entries, pins, "another program had changed our kernel maps: repaired");
                tidegate_agent::events::repaired("map", entries);
                tidegate_agent::events::repaired("pin", pins);
            }
            Ok(_) => {}
            Err(error) => tracing::error!(%error, "cannot bring the kernel's maps up to date"),
        }
    }

    fn heartbeat(&mut self) {
        let boot_id = self.core.boot_id;
        let gateway = self.core.gateway.clone();
        // Our own program judges by the same rules: to itself this gateway is alive.
        if let Err(error) = self.core.datapath.heartbeat(&gateway) {
            tracing::error!(%error, "cannot write the heartbeat");
        }
        let mut down = Vec::new();
        for (name, n) in &mut self.nodes {
            n.status.connected = n.state.is_some() && n.facts.is_some();
            if let Some((_, out)) = &n.facts {
                let beat = FactsBatch::heartbeat(boot_id, n.facts_seq);
                if beat.into_messages().into_iter().any(|m| out.try_send(m).is_err()) {
                    down.push(name.clone());
                }
            }
        }
        for node in down {
            self.facts_down(&node);
        }
        self.beat_peers();
    }

    /// Publishes counters, and the status.
    fn count(&mut self) {
        match self.core.datapath.counters() {
            Ok(counters) => tidegate_agent::events::publish(&counters),
            Err(error) => tracing::warn!(%error, "cannot read the kernel's counters"),
        }
        self.publish();
    }

    /// Publishes the status.
    fn publish(&self) {
        let pair = |c: Claim| PairStatus { pair: c.pair.to_string(), owner: c.owner, epoch: c.epoch, held: c.held };
        self.core.shared.status.store(Arc::new(Status {
            pairs: self.core.ownership.claims().into_iter().map(pair).collect(),
            nodes: self.nodes.iter().map(|(k, n)| (k.clone(), n.status.clone())).collect(),
            facts: self.core.ledger.counts().facts,
            connections: self.core.registry.len(),
        }));
    }
}

/// The core's channel: messages that may wait. Beyond that, answers fail closed and streams start anew.
pub fn channel() -> (Sender<ToCore>, Receiver<ToCore>) {
    crossbeam_channel::bounded(65536)
}
