//! The reconciler: one thread that owns the datapath, and makes the kernel hold
//! what the gateways say for this node's pods. Facts come first in its queue, since a
//! DNS reply waits for each of them.

mod gateways;
mod passes;
mod seen;
mod starts;

use gateways::Gateways;
use starts::Questions;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tidegate_ebpf::{Attacher, Datapath, Program};
use tidegate_policy::ScopeKey;
use tidegate_policy::event::Emit;
use tidegate_policy::state::NodeState;
use tidegate_proto::{FactsBatch, Seen, StartedPod};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::announce::Announcer;
use crate::cni::{self, Pods};
use crate::config::{Config, Interfaces};
use crate::events::{self, People};
use crate::guard::{self, Keeper, Settings};
use crate::held::{LEASE, Leases};
use crate::links::{self, Netlink, Topology};
use crate::merge::{self, Merger, Model, Source};
use crate::open::{Closed, Open};
use crate::orphans::Orphans;
use crate::places::Places;
use crate::plug::{Hello, Plugged, Request};
use crate::stream::{self, Ack, Applied};
use crate::told::Told;
use crate::{
    AgentError, Status, options,
    sysctl::{self, Setting},
};

/// One step of the cheap checks; a tenth of the attachments is verified in each.
const STEP: Duration = Duration::from_millis(100);
const STEPS_PER_SECOND: u64 = 10;
/// Idle flows are forgotten at least every so many seconds, however rare full passes are: until then they fill the
/// budgets of their pods.
const SWEEP_SECONDS: u64 = 60;
/// How long changes of devices and routes are gathered.
const GATHER: Duration = Duration::from_millis(20);
/// After a restart the kernel holds the old state: so long it may wait for the other gateways, so that
/// nothing of a scope whose owner answers last is taken away and put back.
const SETTLE: Duration = Duration::from_secs(1);

/// A gateway that said something within this time is seen.
const SEEN: Duration = Duration::from_secs(1);

/// What the reconciler hears.
pub struct Inputs {
    /// From the `State` streams.
    pub state: mpsc::Receiver<stream::State>,
    /// From the `Facts` streams.
    pub facts: mpsc::Receiver<stream::Facts>,
    /// From the gateway socket.
    pub plugs: mpsc::Receiver<Request>,
    /// From the CNI plugin.
    pub cni: mpsc::Receiver<cni::Request>,
    /// Which of its pods start at once.
    pub open: Arc<Mutex<Open>>,
    /// The end.
    pub stop: oneshot::Receiver<()>,
    /// Where it goes what this node sees of the gateways.
    pub seen: watch::Sender<Seen>,
    /// Where it goes which pods have started, for gateways that know no address of them yet.
    pub started: watch::Sender<Arc<Vec<StartedPod>>>,
    /// Where they go, the control endpoints of the gateways that gateways tell of.
    pub control: watch::Sender<BTreeSet<SocketAddr>>,
    /// What is wrong with the agent's own certificate.
    pub identity: watch::Receiver<Option<String>>,
    /// Why the CNI plugin is not installed.
    pub installed: watch::Receiver<Option<String>>,
}

/// The body of the reconciler's thread. `started` gets what attaches pods' programs beside it, once the programs are loaded and
/// the uplinks guarded.
pub fn run(
    config: Arc<Config>,
    inputs: Inputs,
    emit: Arc<dyn Emit>,
    status: watch::Sender<Status>,
    started: oneshot::Sender<Attacher>,
) -> Result<(), AgentError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(AgentError::io("runtime"))?.block_on(async move {
        let node = Node::start(config, Arc::clone(&inputs.open), emit, status).await?;
        // Nobody waits any more only if the agent is stopping, and then `stop` says so.
        let _ = started.send(node.datapath.attacher(Program::PodEgress)?);
        node.serve(inputs).await;
        Ok(())
    })
}

/// The gateway that is plugged in.
struct Gateway {
    name: String,
    /// The connection that renews its leases, while there is one.
    connection: Option<u64>,
    /// The MTUs of its two pairs, in octets.
    mtu: (u32, u32),
    /// Its network namespace while there is a connection, and what is to hold there.
    inside: Option<(OwnedFd, Vec<Setting>)>,
}

struct Node {
    config: Arc<Config>,
    netlink: Netlink,
    changed: Arc<Notify>,
    datapath: Datapath,
    keeper: Keeper,
    announcer: Announcer,
    people: Arc<People>,
    status: watch::Sender<Status>,

    gateways: Gateways,
    merger: Merger,
    merged: NodeState,
    told: Told,
    orphans: Orphans,
    /// Since when there is a snapshot to apply.
    heard: Option<Instant>,
    /// Whether the kernel held a state of an earlier run.
    adopted: bool,
    /// Whether a snapshot was applied.
    ready: bool,
    /// Gateways whose scopes' DNS goes to a stand-in.
    silent: BTreeSet<String>,
    /// Acks that wait for a pass.
    pending: BTreeMap<usize, (Ack, Applied)>,

    topology: Topology,
    tunnel_mtu: u16,
    /// Interfaces of local pods that were found, by address. They stay while the device exists: a route that flaps or a
    /// neighbour that is forgotten must not open a pod.
    interfaces: BTreeMap<IpAddr, u32>,
    /// The same on bridges, with what is known of whom they are.
    places: Places,
    pod_macs: BTreeMap<u32, [u8; 6]>,
    attached: BTreeMap<(Program, u32), String>,
    gateway: Option<Gateway>,
    /// Pods that the CNI plugin told of.
    pods: Pods,
    open: Arc<Mutex<Open>>,
    /// What the kernel's maps judge: as they were last written.
    held: Closed,
    /// What netfilter judged when that was last published.
    guarded: Option<BTreeSet<IpAddr>>,
    leases: Leases,
    epoch: Instant,
    /// Where the next slice of verifications begins.
    verified: usize,
    /// Attachments that could not be put back at the head of their hook.
    misplaced: BTreeSet<(Program, String)>,
    problems: BTreeMap<&'static str, String>,
}

impl Node {
    async fn start(
        config: Arc<Config>,
        open: Arc<Mutex<Open>>,
        emit: Arc<dyn Emit>,
        status: watch::Sender<Status>,
    ) -> Result<Self, AgentError> {
        let netlink = Netlink::open()?;
        let changed = Arc::new(Notify::new());
        links::watch(config.interfaces == Interfaces::Bridge, Arc::clone(&changed))?;
        netlink.ensure_tunnel(config.tunnel_port).await?;
        let topology = netlink.topology(config.interfaces).await?;
        let uplinks = topology.uplinks(config.uplinks.as_deref());
        let tunnel_mtu = config.tunnel_mtu.unwrap_or_else(|| topology.tunnel_mtu(&uplinks));
        match guard::closed_inputs(config.tunnel_port) {
            Ok(closed) if closed.is_empty() => {}
            Ok(closed) => tracing::warn!(
                chains = closed.join(", "),
                port = config.tunnel_port,
                "an input chain drops by default and does not name the tunnel's UDP port: accept it there"
            ),
            Err(error) => tracing::warn!(%error, "the firewall's rules cannot be read"),
        }

        let adopted = std::fs::read_dir(&config.pins).is_ok_and(|mut d| d.next().is_some());
        let mut datapath = Datapath::load(&options(&config, tunnel_mtu))?;
        let settings = Settings {
            tunnel_port: config.tunnel_port,
            mark: config.mark,
            overlay_ports: config.overlay_ports.clone(),
        };
        let check = Duration::from_secs(config.full_pass_seconds.into());
        let keeper = Keeper::start(settings, check).map_err(AgentError::io("thread"))?;
        let announcer = Announcer::open().map_err(AgentError::io("packet socket"))?;
        let people = Arc::new(People::default());
        if let Some(mut events) = datapath.events() {
            let people = Arc::clone(&people);
            tokio::spawn(async move {
                loop {
                    match events.next().await {
                        Ok(event) => {
                            // A forged source says nothing of who sent it: its owner must not be blamed.
                            let forged = event.reason == tidegate_policy::Reason::SpoofedSource;
                            let who = if forged { None } else { people.get(event.source.ip()) };
                            emit.emit(event.into_event(who));
                        }
                        Err(error) => {
                            tracing::error!(%error, "kernel events cannot be read");
                            return;
                        }
                    }
                }
            });
        }
        let places = Places::adopt(datapath.interfaces());
        let pods = Pods::adopt(config.cni.as_ref());
        let gateways = Gateways::new(config.gateways.iter().map(|g| g.name.as_str()));
        let mut node = Self {
            config,
            netlink,
            changed,
            datapath,
            keeper,
            announcer,
            people,
            status,
            gateways,
            merger: Merger::default(),
            merged: NodeState::default(),
            told: Told::default(),
            orphans: Orphans::default(),
            heard: None,
            silent: BTreeSet::new(),
            adopted,
            ready: false,
            pending: BTreeMap::new(),
            topology,
            tunnel_mtu,
            interfaces: BTreeMap::new(),
            places,
            pod_macs: BTreeMap::new(),
            attached: BTreeMap::new(),
            gateway: None,
            pods,
            open,
            held: Closed::default(),
            guarded: None,
            leases: Leases::default(),
            epoch: Instant::now(),
            verified: 0,
            misplaced: BTreeSet::new(),
            problems: BTreeMap::new(),
        };
        node.own_addresses(false);
        if !node.datapath.is_upgrade() {
            node.attach_missing();
        }
        node.tell();
        Ok(node)
    }

    async fn serve(mut self, mut inputs: Inputs) {
        let mut step = interval(STEP);
        step.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut steps = 0u64;
        let changed = Arc::clone(&self.changed);
        // When to look at what has changed: more follows the first, a pod's device, its address, its route.
        let mut look: Option<Instant> = None;
        inputs.started.send_replace(Arc::new(self.pods.started()));
        loop {
            // Names wait for it: not for the next step.
            let silence = self.gateways.next_silence(&self.silent);
            tokio::select! {
                biased;
                _ = &mut inputs.stop => return self.write_standing(Duration::ZERO),
                Some(facts) = inputs.facts.recv() => self.facts(facts),
                () = sleep_until(silence.unwrap_or_else(Instant::now)), if silence.is_some() => self.stand_in(),
                Some(request) = inputs.plugs.recv() => self.plug(request).await,
                Some(first) = inputs.cni.recv() => {
                    let mut from = Questions { asked: &mut inputs.cni, told: &inputs.started };
                    self.enter(Some(first), &mut from).await;
                    self.reconcile(false).await;
                    self.answer_starts();
                }
                Some(first) = inputs.state.recv() => {
                    let mut all = vec![first];
                    while let Ok(more) = inputs.state.try_recv() {
                        all.push(more);
                    }
                    self.state(all, Questions { asked: &mut inputs.cni, told: &inputs.started }).await;
                    let control = self.merged.gateways.values().flat_map(|g| &g.control).copied().collect();
                    inputs.control.send_if_modified(|known| std::mem::replace(known, control) != *known);
                }
                _ = step.tick() => {
                    steps += 1;
                    self.listen(&inputs.seen);
                    if inputs.identity.has_changed().unwrap_or(false) {
                        let trouble = inputs.identity.borrow_and_update().clone();
                        self.problem("identity", trouble);
                        self.tell();
                    }
                    if inputs.installed.has_changed().unwrap_or(false) {
                        let trouble = inputs.installed.borrow_and_update().clone();
                        self.problem("cni", trouble);
                        self.tell();
                    }
                    self.step(steps).await;
                }
                () = changed.notified(), if look.is_none() => look = Some(Instant::now() + GATHER),
                () = sleep_until(look.unwrap_or_else(Instant::now)), if look.is_some() => {
                    look = None;
                    self.refresh().await;
                    self.reconcile(false).await;
                }
            }
        }
    }

    // --- what comes in ---

    /// The number of a gateway that speaks.
    fn number(&mut self, name: &Arc<str>) -> Option<usize> {
        let owns = |name: &str| self.merged.scopes.values().any(|s| s.owner == name);
        let Some((index, anew)) = self.gateways.enter(name, owns) else {
            tracing::error!(gateway = &**name, "there are more gateways than this node can follow; not heard");
            return None;
        };
        if anew {
            self.clear(index);
        }
        Some(index)
    }

    /// The number is another gateway's now, or nobody's.
    fn clear(&mut self, index: usize) {
        let moved = self.told.forget(index, self.epoch.elapsed());
        if let Err(error) = self.datapath.facts(&moved) {
            tracing::error!(%error, "facts of a gateway that is gone cannot be written");
        }
        self.pending.remove(&index);
        self.orphans.look();
    }

    /// Forgets gateways that were found and are gone.
    fn forget(&mut self) {
        let scopes = &self.merged.scopes;
        let gone = self.gateways.forget(Instant::now(), |name| scopes.values().any(|s| s.owner == name));
        for (index, name) in gone {
            tracing::info!(gateway = &*name, "a gateway that is gone is forgotten");
            metrics::gauge!(events::GATEWAY_UP, "gateway" => name.to_string()).set(0.0);
            self.clear(index);
        }
    }

    fn facts(&mut self, facts: stream::Facts) {
        let Some(index) = self.number(&facts.gateway) else { return };
        let Some(gateway) = self.gateways.get_mut(index) else { return };
        if facts.away {
            self.orphans.look();
            gateway.in_sync = false;
            if let Some((_, ended)) = &mut gateway.sign {
                *ended = true;
            }
            self.stand_in();
            return;
        }
        gateway.sign = Some((facts.at, false));
        let in_sync = gateway.in_sync;
        let turned = std::mem::replace(&mut gateway.steps_back, facts.steps_back) != facts.steps_back;
        if turned || self.silent.contains(&*facts.gateway) {
            self.stand_in();
        }
        if let Some((batch, ack)) = facts.batch {
            let known = batch.snapshot || in_sync;
            let held = self.batch(index, batch, &ack) && known;
            if let Some(gateway) = self.gateways.get_mut(index) {
                gateway.in_sync = held;
            }
        }
        self.beat(index);
    }

    /// Tells the kernel that it knows all that the gateway told. Last, since from then on what is not known here is dropped
    /// and not steered: not before the grants of the facts are there too. Programs of another layout do not see it. What
    /// waited too long in the queue is no sign of life any more.
    fn beat(&mut self, index: usize) {
        let Some(gateway) = self.gateways.get(index) else { return };
        let alive = gateway.sign.is_some_and(|(at, ended)| !ended && at.elapsed() < stream::SILENCE);
        if gateway.in_sync
            && self.ready
            && alive
            && let Err(e) = self.datapath.heartbeat(&gateway.name)
        {
            tracing::error!(gateway = &*gateway.name, error = %e, "heartbeat");
        }
    }

    /// Writes facts with the grants that they need; returns whether the kernel holds all of them.
    fn batch(&mut self, gateway: usize, mut batch: FactsBatch, ack: &Ack) -> bool {
        let applied = Applied { boot: batch.boot_id, sequence: batch.sequence, error: None };
        let grants: Vec<_> =
            std::mem::take(&mut batch.grants).into_iter().map(|g| (g.group, g.class, g.ports)).collect();
        let came = grants.clone();
        let now = self.epoch.elapsed();
        let mut result = Ok(());
        let changed = self.gateways.get_mut(gateway).is_some_and(|g| g.model.grants(batch.boot_id, grants, now));
        if changed {
            self.merge();
        }
        // Before the first pass the kernel lacks what is known already.
        if changed || !self.ready {
            // Only these: an answer waits for the ack, and a whole pass over the maps takes its time.
            result = self.datapath.grants(&merge::with_facts(came, &self.merged, self.ready));
        }
        if batch.snapshot {
            self.orphans.look();
        }
        let owner = owners(&self.gateways, &self.merged, &self.silent);
        let updates = self.told.take(gateway, batch, now, owner);
        let result = result.and_then(|()| self.datapath.facts(&updates));
        let held = result.is_ok();
        acknowledge_facts(ack, applied, result.map_err(|e| e.to_string()));
        held
    }

    /// Steers the DNS of silent gateways' scopes to those that stand in, and back.
    fn stand_in(&mut self) {
        let told = self.merged.gateways.keys().filter(|name| self.gateways.index(name).is_none()).cloned();
        let now: BTreeSet<String> = self.gateways.silent(Instant::now()).into_iter().chain(told).collect();
        if now == self.silent {
            return;
        }
        // While nobody speaks, nobody stands in: the one that comes back first may be any.
        self.silent = now;
        self.merge();
        if self.ready {
            let local = self.local();
            if let Err(error) = self.datapath.apply(&self.merged, &local, false) {
                tracing::error!(%error, "DNS cannot be steered to another gateway");
            }
        }
    }

    async fn state(&mut self, all: Vec<stream::State>, mut questions: Questions<'_>) {
        let now = self.epoch.elapsed();
        for message in all {
            match message {
                stream::State::Away { gateway } => {
                    let index = self.gateways.index(&gateway);
                    if let Some(gateway) = index.and_then(|i| self.gateways.get_mut(i)) {
                        gateway.model.away();
                    }
                }
                stream::State::Update { gateway, update, ack } => {
                    let applied = Applied { boot: update.boot, sequence: update.sequence, error: None };
                    let Some(index) = self.number(&gateway) else { continue };
                    let Some(gateway) = self.gateways.get_mut(index) else { continue };
                    match gateway.model.update(update, now) {
                        Ok(()) => drop(self.pending.insert(index, (ack, applied))),
                        Err(e) => acknowledge(&ack, applied, Err(e.to_string())),
                    }
                }
            }
        }
        for gateway in self.gateways.iter() {
            let up = if gateway.model.live() { 1.0 } else { 0.0 };
            metrics::gauge!(events::GATEWAY_UP, "gateway" => gateway.name.to_string()).set(up);
        }
        if self.heard.is_none() && self.gateways.iter().any(|g| g.model.known()) {
            self.heard = Some(Instant::now());
            // The pass that comes at the latest, if other gateways stay silent.
            let changed = Arc::clone(&self.changed);
            tokio::spawn(async move {
                tokio::time::sleep(SETTLE).await;
                changed.notify_one();
            });
        }
        self.merge();
        self.publish();
        // With those that were answered for by what held before: gateways hear of a pass that has them.
        self.enter(None, &mut questions).await;
        self.reconcile(false).await;
        // A pod that never spoke is in no table of its bridge, and closed until it is found: not a second later.
        self.resolve().await;
    }

    async fn plug(&mut self, request: Request) {
        match request {
            Request::Plug { connection, hello, netns, answer } => {
                let result = self.plug_in(connection, &hello, &netns).await;
                if let Err(error) = &result {
                    tracing::warn!(gateway = hello.gateway, error, "a gateway could not be plugged in");
                }
                // The connection may be gone; its end is told separately.
                let _ = answer.send(result);
            }
            Request::Renew { connection, addresses, held } => {
                // Its connection may be gone.
                let _ = held.send(self.renew(connection, &addresses));
            }
            Request::Gone { connection } => {
                if let Some(gateway) = self.gateway.as_mut().filter(|g| g.connection == Some(connection)) {
                    gateway.connection = None;
                    // Or the namespace of a pod that is gone would stay.
                    gateway.inside = None;
                    tracing::info!(gateway = gateway.name, "the gateway's connection ended; its addresses are let go");
                    let gone = self.leases.end();
                    self.release(&gone);
                }
            }
        }
    }

    async fn plug_in(&mut self, connection: u64, hello: &Hello, netns: &OwnedFd) -> Result<Plugged, String> {
        if let Some(other) = self.gateway.as_ref().filter(|g| g.connection.is_some() && g.name != hello.gateway) {
            return Err(format!("gateway {} is plugged in on this node", other.name));
        }
        if self.config.discover.is_none() && self.gateways.index(&hello.gateway).is_none() {
            return Err(format!("gateway {} is not in the agent's configuration", hello.gateway));
        }
        let mtu = hello.tunnel_mtu.min(self.tunnel_mtu);
        let uplinks = self.topology.uplinks(self.config.uplinks.as_deref());
        let egress_mtu = uplinks.iter().map(|l| l.mtu).min().unwrap_or(1500).clamp(1280, 65_535);
        let plugged = self.netlink.plug(netns.as_fd(), mtu, egress_mtu).await.map_err(|e| e.to_string())?;
        let settings = sysctl::of_gateway(&hello.device, hello.flow_idle_seconds);
        self.netlink.settle(netns.as_fd(), settings.clone()).await.map_err(|e| e.to_string())?;
        let inside = netns.try_clone().map_err(|e| e.to_string())?;
        self.gateway = Some(Gateway {
            name: hello.gateway.clone(),
            connection: Some(connection),
            mtu: (mtu.into(), egress_mtu),
            inside: Some((inside, settings)),
        });
        self.refresh().await;
        self.reconcile(false).await;
        for (program, link) in
            [(Program::GatewayReturn, &plugged.pod_side), (Program::UplinkEgress, &plugged.egress_side)]
        {
            // In an upgrade the programs of the other layout are there.
            if !self.datapath.is_upgrade() && !self.attached.contains_key(&(program, link.index)) {
                return Err(format!("program {} could not be attached to {}", program.name(), link.name));
            }
        }
        let held = self.renew(connection, &hello.r#static);
        tracing::info!(gateway = hello.gateway, mtu, "gateway plugged in");
        Ok(Plugged { mtu, held })
    }

    /// Returns what the kernel holds now for the gateway.
    fn renew(&mut self, connection: u64, addresses: &[IpAddr]) -> Vec<IpAddr> {
        let Some(gateway) = self.gateway.as_ref().filter(|g| g.connection == Some(connection)) else {
            return Vec::new();
        };
        let allowed = self.may_hold(&gateway.name);
        let change = self.leases.renew(addresses, allowed, Instant::now());
        self.release(&change.release);
        let failed = self.datapath.hold(&change.hold, LEASE).err();
        let held = if failed.is_some() { Vec::new() } else { change.hold };
        self.problem("hold", failed.map(|e| format!("egress addresses cannot be held: {e}")));
        self.announce();
        held
    }

    /// The node's own view of ownership, which a gateway that is cut off does not have.
    fn may_hold(&self, gateway: &str) -> bool {
        let heard = self.gateways.iter().find(|g| *g.name == *gateway).map(|g| &g.model);
        let claims = heard.filter(|m| m.known()).map(Model::state);
        merge::may_hold(gateway, claims, &self.merged)
    }

    fn release(&mut self, addresses: &[IpAddr]) {
        // What the kernel does not release now its lease ends.
        if let Err(error) = self.datapath.release(addresses) {
            tracing::warn!(%error, "egress addresses cannot be released before their lease ends");
        }
        metrics::gauge!(events::HELD).set(self.leases.len() as f64);
    }

    fn announce(&mut self) {
        for address in self.leases.due(Instant::now()) {
            for uplink in self.topology.uplinks(self.config.uplinks.as_deref()) {
                if let Err(error) = self.announcer.announce(uplink.index, uplink.mac, address) {
                    tracing::warn!(%address, device = uplink.name, %error, "address not announced");
                }
            }
        }
        metrics::gauge!(events::HELD).set(self.leases.len() as f64);
    }

    /// Out of what every gateway says, what this node's kernel should hold.
    fn merge(&mut self) {
        let sources: Vec<Source<'_>> = self
            .gateways
            .iter()
            .filter(|g| g.model.known())
            .map(|g| {
                let silent = self.silent.contains(&*g.name);
                Source { name: &g.name, live: g.model.live(), silent, state: g.model.state() }
            })
            .collect();
        self.merged = self.merger.merge(&sources);
        self.pods.overlay(&mut self.merged, &self.config.node);
        let owner = owners(&self.gateways, &self.merged, &self.silent);
        let moved = self.told.follow(self.epoch.elapsed(), owner);
        if let Err(error) = self.datapath.facts(&moved) {
            tracing::error!(%error, "facts of scopes with another owner cannot be written");
        }
        if self.gateway.as_ref().is_some_and(|g| !self.may_hold(&g.name)) {
            let gone = self.leases.end();
            if !gone.is_empty() {
                tracing::warn!(addresses = ?gone, "another gateway owns these addresses at a higher epoch; letting go");
                self.release(&gone);
            }
        }
    }

    async fn step(&mut self, steps: u64) {
        self.announce();
        self.answer_starts();
        self.verify();
        if !steps.is_multiple_of(STEPS_PER_SECOND) {
            return;
        }
        self.count();
        self.forget();
        self.keep_standing();
        if self.keeper.isolated() != self.guarded {
            self.publish();
        }
        if steps.is_multiple_of(u64::from(self.config.full_pass_seconds) * STEPS_PER_SECOND) {
            self.full_pass().await;
        } else {
            if !self.problems.is_empty() {
                self.refresh().await;
                self.reconcile(false).await;
            }
            if steps.is_multiple_of(SWEEP_SECONDS * STEPS_PER_SECOND) {
                self.sweep();
            }
        }
        self.resolve().await;
    }

    /// Publishes the kernel's counters.
    fn count(&self) {
        match self.datapath.counters() {
            Ok(counters) => events::publish(&counters),
            Err(error) => tracing::warn!(%error, "kernel counters cannot be read"),
        }
        if let Ok(events) = self.datapath.suppressed_events() {
            metrics::counter!(events::SUPPRESSED).absolute(events);
        }
    }

    /// Notes a condition, or that it is over.
    fn problem(&mut self, key: &'static str, text: Option<String>) {
        match text {
            Some(text) => drop(self.problems.insert(key, text)),
            None => drop(self.problems.remove(key)),
        }
    }

    /// Publishes how the agent is.
    fn tell(&self) {
        let ready = self.ready && self.keeper.holds();
        let status = Status { ready, conditions: self.problems.values().cloned().collect() };
        self.status.send_if_modified(|old| {
            let new = *old != status;
            if new {
                for condition in status.conditions.iter().filter(|c| !old.conditions.contains(c)) {
                    tracing::warn!("{condition}");
                }
                *old = status;
            }
            new
        });
    }
}

/// Who owns a scope, if that gateway is heard.
fn owners<'a>(
    gateways: &'a Gateways,
    merged: &'a NodeState,
    silent: &'a BTreeSet<String>,
) -> impl Fn(ScopeKey) -> Option<usize> + 'a {
    move |scope| {
        let owner = &merged.scopes.get(&scope)?.owner;
        let at = gateways.index(owner)?;
        (gateways.get(at)?.in_sync && !silent.contains(owner)).then_some(at)
    }
}

/// An ack of a Facts stream is cumulative: after an error there is none any more, the gateway ends the stream, and the
/// next one begins with a snapshot.
fn acknowledge_facts(ack: &Ack, applied: Applied, result: Result<(), String>) {
    if ack.borrow().error.is_none() {
        acknowledge(ack, applied, result);
    }
}

fn acknowledge(ack: &Ack, applied: Applied, result: Result<(), String>) {
    let error = result.err();
    if let Some(error) = &error {
        tracing::error!(sequence = applied.sequence, error, "an update could not be applied");
    }
    // A stream that is gone needs no ack: the next one begins with a snapshot.
    let _ = ack.send(Applied { error, ..applied });
}
