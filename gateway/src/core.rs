//! The core thread: owns the ledger, this gateway's kernel maps and what each node was sent.
//!
//! Everything that changes them comes through one bounded channel, so that there is
//! one order of events and no lock. It never blocks on a node: a node whose
//! queue is full is cut off and starts anew with a snapshot.

mod answers;
mod classes;
mod classifier;
mod clock;
mod failover;
mod held;
mod ids;
mod machine;
mod message;
#[cfg(test)]
mod move_tests;
mod nodes;
mod placement;
mod pushes;
mod recorded;
mod sent;
mod settling;
#[cfg(test)]
mod soak;
mod status;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant};

use ahash::AHashMap;
use arc_swap::ArcSwap;
use tidegate_api::index::Feed;
use tidegate_ebpf::{Datapath, Place, Program};
use tidegate_kubernetes::pools;
use tidegate_kubernetes::watch::Watched;
use tidegate_ledger::{Input, Ledger, NodeId, Output};
use tidegate_policy::Reason;
use tidegate_policy::model::Objects;
use tidegate_policy::state::NodeState;
use tidegate_policy::world::World;
use tidegate_proto::wire::{FactsUpdate, PeerUpdate, StateUpdate};
use tidegate_proto::{Claim, Pair, PeerFact, Seen};
use tidegate_sni::Registry;
use tokio::sync::{mpsc, oneshot, watch};

use self::classes::Classes;
pub use self::classifier::Classifier;
pub use self::clock::Clock;
use self::failover::candidates;
use self::held::Held;
pub use self::ids::Ids;
use self::machine::{Delta, Uses};
pub use self::message::{Bind, ToCore};
use self::placement::Placement;
use self::sent::Sent;
pub use self::settling::Settling;
pub use self::status::{NodeStatus, PairStatus, Status};
use crate::admin::{Guard, Readiness};
use crate::cluster::ClusterNames;
use crate::desired::{self, Compiled, Desired};
use crate::dns_view::DnsView;
use crate::egress::TOWARDS_PODS;
use crate::egress::nft::HeldPair;
use crate::generations::Generations;
use crate::journal::Journal;
use crate::ownership::Ownership;
use crate::push::StreamId;
use crate::relay_check::still_allowed;
use crate::report::thread::Post;

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

/// What other threads share with the core.
pub struct Shared {
    /// The compiled policy.
    pub world: ArcSwap<World>,
    /// The DNS service's view of it.
    pub view: Arc<ArcSwap<DnsView>>,
    /// The pairs that this gateway holds. Who follows them is told of `lost`, too, and of the end.
    pub pairs: watch::Sender<Vec<HeldPair>>,
    /// Those of them whose addresses and rules are in place.
    pub applied: Arc<ArcSwap<Vec<HeldPair>>>,
    /// Egress addresses that went elsewhere: their flows here are dead.
    pub lost: Arc<parking_lot::Mutex<BTreeSet<IpAddr>>>,
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
    /// What the DNS service is told of the cluster.
    pub names: Arc<ClusterNames>,
}

impl Shared {
    /// What there is before policy was compiled, with a world that has none. The clock starts.
    pub fn new(empty: Arc<World>, names: Arc<ClusterNames>) -> Self {
        Self {
            world: ArcSwap::new(empty.clone()),
            view: Arc::new(ArcSwap::from_pointee(DnsView::empty(empty))),
            pairs: watch::Sender::default(),
            applied: Arc::default(),
            lost: Arc::default(),
            egress: ArcSwap::default(),
            nodes: Ids::default(),
            namespaces: Ids::default(),
            settling: Settling::default(),
            clock: Clock::start(),
            status: ArcSwap::from_pointee(Status::default()),
            names,
        }
    }

    /// Now, on the ledger's clock.
    pub fn now(&self) -> Duration {
        self.clock.now()
    }
}

#[derive(Default)]
struct Node {
    state: Option<(StreamId, mpsc::Sender<StateUpdate>)>,
    facts: Option<(StreamId, mpsc::Sender<FactsUpdate>)>,
    agent: Option<u64>,
    /// What its agent said last on the Facts stream that is up.
    seen: Option<Seen>,
    /// What the State stream was sent.
    sent: Sent,
    /// What of that refers to what.
    uses: Uses,
    facts_seq: u64,
    /// Which compile it holds, by the acks of the State stream that is up.
    compiles: Held,
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
    /// Where owners are recorded; absent without Kubernetes.
    pub api: Option<mpsc::Sender<pools::Command>>,
    /// Where facts outlive a restart.
    pub journal: Option<Journal>,
    /// What an earlier run left in it.
    pub recovered: Vec<PeerFact>,
    /// Where denials go of which other gateways tell.
    pub denials: Post,
    /// Dropped when the gateway begins to serve.
    pub starting: Option<Guard>,
    /// Held back while this gateway knows less than another one.
    pub readiness: Readiness,
    /// What follows the API server, if that is the source.
    pub watched: Option<Watched<Feed>>,
    /// Told whether this gateway knows less than another one: then it writes nothing of what it knows.
    pub stale: watch::Sender<bool>,
}

struct Run {
    core: Core,
    /// What this gateway and others have seen of the API server.
    generations: Generations,
    /// This gateway knows less than another one.
    stale: Option<failover::Stale>,
    /// When lists that are behind were last told to hurry.
    hurried: Duration,
    due: Due,
    /// Whether the start is over: peers were heard, or had their time.
    settled: bool,
    /// The compile that waits for that.
    next: Option<Arc<Compiled>>,
    /// Facts that wait for that, or for a compile that knows their scope, and when they came.
    pending: Vec<(Duration, Vec<PeerFact>)>,
    /// Other gateways that ask for what this one knows.
    peers: BTreeMap<String, mpsc::Sender<PeerUpdate>>,
    /// When this gateway began.
    begun: Duration,
    /// Whether the program on the pod-facing device is in place.
    attached: bool,
    /// When to put it in the place of another layout's, if that goes on.
    move_over: Option<Duration>,
    /// Since when nodes wait to be told of new owners, until what those need is in place.
    moved: Option<Duration>,
    /// Whether this gateway is about to end.
    leaving: Option<failover::Leaving>,
    /// Pools that are deleted and held because they are in use.
    deleted: BTreeSet<String>,
    /// What is in use, as it was last told.
    used: Option<pools::Used>,
    /// What is wrong with ownership, for people.
    problems: Vec<String>,
    /// What the journal has of claims.
    written: Vec<Claim>,
    /// Who owned pairs before those who own them by that.
    before: BTreeMap<Pair, String>,
    /// Where the pods of the present world's scopes are.
    placement: Placement,
    /// What all machines hold alike.
    frame: NodeState,
    /// Who owns what, as nodes were told.
    told: Arc<BTreeMap<Pair, desired::Ownership>>,
    /// Whether facts of an earlier process were removed from our kernel.
    cleared: bool,
    compiled: Arc<Compiled>,
    classes: Classes,
    nodes: HashMap<String, Node>,
    waiting: AHashMap<u64, Waiting>,
    /// Answers to pods that settle, in the order of their deadlines.
    late: Vec<(Duration, Bind)>,
    own: NodeState,
    own_uses: Uses,
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
            generations: Generations::default(),
            stale: None,
            hurried: now,
            settled: false,
            next: None,
            pending: vec![(now, recovered)],
            peers: BTreeMap::new(),
            begun: now,
            attached: false,
            move_over: None,
            moved: None,
            leaving: None,
            deleted: BTreeSet::new(),
            used: None,
            problems: Vec::new(),
            written: Vec::new(),
            before: BTreeMap::new(),
            compiled: Arc::new(Compiled::new(core.shared.world.load_full(), &Objects::default(), 0)),
            classes: Classes::default(),
            placement: Placement::default(),
            frame: NodeState::default(),
            told: Arc::default(),
            cleared: false,
            core,
            nodes: HashMap::new(),
            waiting: AHashMap::new(),
            late: Vec::new(),
            own: NodeState::default(),
            own_uses: Uses::default(),
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
                n.sent.anew();
                // Its kernel may be another one: what it holds, its ack of the snapshot says.
                (n.compiles, n.status.held) = (Held::default(), 0);
                // An empty snapshot would take policy away from the node's pods: before there is one, nothing is said.
                if self.settled {
                    self.send_state(&node);
                    self.compile_sent(&node);
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
                    n.sent.applied(ack.sequence);
                    n.status.applied = ack.sequence;
                    n.status.error = ack.error;
                    n.compiles.acked(ack.sequence);
                    n.status.held = n.compiles.compile();
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
                let _ = reply.send(result.map_err(|e| e.to_string()));
            }
            ToCore::Seen { node, id, seen } => {
                if let Some(n) = self.nodes.get_mut(&node)
                    && n.facts.as_ref().is_some_and(|f| f.0 == id)
                {
                    let other = n.seen.as_ref().is_none_or(|old| old.orphans != seen.orphans);
                    n.seen = Some(seen);
                    self.heed(Some(&node));
                    if other {
                        self.adopt(&node);
                    }
                }
            }
            ToCore::Unplugged => (self.attached, self.move_over) = (false, None),
            ToCore::Versions(versions) => self.generations.set_own(versions),
            ToCore::Leave { reply } => self.leave(reply),
            ToCore::Members(members) => self.members(members),
            ToCore::Api(event) => self.api(event),
            ToCore::PeerUp { gateway, out } => self.peer_up(gateway, out),
            ToCore::Denied(denied) => self.tell_denied(denied),
            ToCore::Peer { gateway, message } => self.peer(&gateway, message),
            ToCore::PeerRefused { gateway } => self.core.ownership.refused(&gateway),
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
        self.core.ownership.agent_gone(node, self.core.shared.now());
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
        let changes = world.changes(&old);
        self.core.shared.egress.store(compiled.egress.clone());
        self.core.ownership.set_pairs(candidates(self.core.desired.pairs(&compiled)));
        if !changes.scopes.is_empty() {
            self.heed(None);
        }
        self.core.ownership.set_nodes(|n| compiled.nodes.contains_key(n));
        let now = self.core.shared.now();
        let moved = self.tick(now);
        self.compiled = compiled;
        self.set_claims();
        self.record();
        for scope in changes.scopes.iter().filter(|k| world.scope(**k).is_none()) {
            self.feed(Input::ScopeGone { scope: *scope });
        }
        // A node without a pod of a scope has no use for its facts.
        for (scope, node) in self.placement.follow(&old, &world, &changes.endpoints) {
            let node = NodeId(self.core.shared.nodes.id(&node));
            self.feed(Input::ScopeLeft { scope, node });
        }
        // One that is new where a pod is may know more than it was told.
        let told = self.nodes.iter().filter(|(_, n)| n.seen.as_ref().is_some_and(|s| !s.orphans.is_empty()));
        let told: Vec<String> = told.map(|(name, _)| name.clone()).collect();
        told.iter().for_each(|node| self.adopt(node));
        for scope in &changes.classes {
            self.feed(Input::Reclassify { scope: Some(*scope) });
        }
        self.import_pending();
        let frame = self.frame();
        // While owners change nodes are not told all that our own kernel holds.
        let whole = std::mem::replace(&mut self.frame, frame) != self.frame
            || self.moved.is_some()
            || self.owners_changed(&old, &world)
            || !self.cleared;
        let delta = Delta::new(&old, &world, changes, self.classes.news(now));
        if whole {
            self.apply_own();
        }
        if !std::mem::replace(&mut self.cleared, true) {
            // Facts that an earlier process left in our kernel and the ledger does not know could outlive their rule.
            let bindings = self.core.ledger.bindings();
            match self.core.datapath.retain_facts(|scope, ip| bindings.class_of(scope, ip).is_some()) {
                Ok(0) => {}
                Ok(facts) => tracing::info!(facts, "facts of an earlier run that nobody vouches for were removed"),
                Err(error) => tracing::error!(%error, "cannot remove facts of an earlier run"),
            }
        }
        if whole {
            self.send_states();
        } else {
            self.follow(&delta);
        }
        let nodes: Vec<String> = self.nodes.keys().cloned().collect();
        nodes.iter().for_each(|node| self.compile_sent(node));
        // Only now: by what nodes were sent, pods have to settle before they get answers of the new policy.
        self.open_view();
        let cut = self.core.registry.revoke(|live| !still_allowed(&world, live), Reason::Revoked);
        if cut > 0 {
            tracing::info!(connections = cut, "connections that policy no longer allows were reset");
        }
        if moved {
            self.cut_moved();
        }
    }

    /// Gives the DNS service the policy of now; nothing when this gateway is stale and has handed its pairs over.
    fn open_view(&self) {
        let shared = &self.core.shared;
        let view = shared.view.load().next(&self.compiled, self.core.families, shared.names.clone());
        shared.view.store(Arc::new(view.closed(self.stale.as_ref().is_some_and(|s| s.closed))));
    }

    /// Whether nodes were told of another owner of a pair that scopes had and have.
    fn owners_changed(&self, old: &World, world: &World) -> bool {
        let pairs = |w: &World| w.ways().filter_map(|(s, _)| Desired::pair(s)).collect::<BTreeSet<_>>();
        let claims = self.core.desired.claims();
        pairs(old).intersection(&pairs(world)).any(|p| self.told.get(p) != claims.get(p))
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
        let pair = |c: &Claim| PairStatus {
            pair: c.pair.to_string(),
            from: self.before.get(&c.pair).cloned(),
            owner: c.owner.clone(),
            epoch: c.epoch,
            held: c.held,
        };
        self.core.shared.status.store(Arc::new(Status {
            // With who owned them before, by the same decision: what came since then nobody has looked at.
            pairs: self.written.iter().map(pair).collect(),
            problems: self.problems(),
            nodes: self.nodes.iter().map(|(k, n)| (k.clone(), n.status.clone())).collect(),
            facts: self.core.ledger.counts().facts,
            connections: self.core.registry.len(),
        }));
    }
}

/// The core's channel: messages that may wait. Beyond that, answers fail closed and streams start anew.
pub fn channel() -> (SyncSender<ToCore>, Receiver<ToCore>) {
    // Of the standard library: crossbeam's yields the CPU a dozen times before it waits, and the core hardly does anything else.
    std::sync::mpsc::sync_channel(65536)
}
