//! Decoded steps, carried out by the real parts and by the model side by side.

mod faults;
mod packets;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use tidegate_policy::model::{Objects, UnixSeconds};
use tidegate_policy::{Proto, ScopeKey};
use tidegate_proto::PeerFact;

use crate::ask::{Asked, Question};
use crate::bytes::Bytes;
use crate::gateway::{Event, Gateway};
use crate::kernel::Kernel;
use crate::node::Node;
use crate::objects::{GATEWAYS, INSIDE, NAMES, NODES, OUTSIDE, START, edit, initial, parsed};
use crate::peers::Journal;
use crate::reference::{Port, Subject, Touched};

/// What was done, so that a test can see that it did something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Decoded steps.
    pub steps: u64,
    /// Packets whose fate was compared.
    pub packets: u64,
    /// Of these, packets that a gateway carried because of a learnt name.
    pub carried: u64,
    /// Replies that went out with bound addresses.
    pub released: u64,
    /// Edits.
    pub edits: u64,
    /// Live flows that were looked at.
    pub flows: u64,
    /// Pairs that another gateway took.
    pub moves: u64,
    /// Facts that came from other gateways and journals.
    pub imported: u64,
}

impl Stats {
    /// Adds another run's.
    pub fn add(&mut self, other: &Stats) {
        self.steps += other.steps;
        self.packets += other.packets;
        self.carried += other.carried;
        self.released += other.released;
        self.edits += other.edits;
        self.flows += other.flows;
        self.moves += other.moves;
        self.imported += other.imported;
    }
}

/// What learns together: namespace and pool.
pub(crate) type Scope = (String, String);
/// What a fact says.
pub(crate) type Key = (Scope, String, IpAddr);

/// A fact in milliseconds since boot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fact {
    rrset: u64,
    pub expires: u64,
}

/// A question that was not answered yet.
struct Pending {
    gateway: usize,
    pod: IpAddr,
    scope: Scope,
    node: &'static str,
    name: &'static str,
    ips: Vec<IpAddr>,
    ttl: u32,
    least: u64,
    until: u64,
}

/// A live connection.
#[derive(Clone, Debug)]
pub(crate) struct Flow {
    pub pod: IpAddr,
    pub scope: Scope,
    pub key: ScopeKey,
    pub node: String,
    pub gateway: usize,
    pub names: BTreeSet<String>,
    pub ip: IpAddr,
    pub to: Port,
    since: u64,
}

/// Which streams of a node are up.
#[derive(Clone, Copy, Default)]
struct Link {
    state: bool,
    facts: bool,
}

/// The place of a gateway, whether it runs or not.
#[derive(Default)]
pub(crate) struct Seat {
    pub core: Option<Gateway>,
    /// Since when it does nothing.
    hung: Option<u64>,
    /// Since when it is about to end.
    leaving: Option<u64>,
    /// What it knows.
    pub facts: BTreeMap<Key, Fact>,
    /// Edits that it has not heard of yet, and whether it hears of none.
    edits: VecDeque<(Objects, UnixSeconds)>,
    lags: bool,
    boot: u64,
    /// What its last run has left.
    left: Option<(Kernel<true>, Journal)>,
}

impl Seat {
    /// The gateway, if it does something.
    pub fn up(&self) -> Option<&Gateway> {
        self.core.as_ref().filter(|_| self.hung.is_none())
    }

    fn up_mut(&mut self) -> Option<&mut Gateway> {
        self.core.as_mut().filter(|_| self.hung.is_none())
    }
}

/// Flows end when they are older: after a day the ledger sweeps what has expired.
const OLD_FLOW: u64 = 20 * 3600 * 1000;
/// Kernels count in seconds, and round up.
pub(crate) const ROUNDING: u64 = 2_000;
/// So long after a fault time goes on in small steps.
const RESTLESS: u64 = 4_000;

pub(crate) struct Drive {
    pub objects: Objects,
    /// The policies that any machine may hold: since everything was delivered the last time.
    pub versions: Vec<(Objects, UnixSeconds)>,
    pub now: u64,
    pub seats: [Seat; GATEWAYS.len()],
    pub nodes: [Node; NODES.len()],
    links: [[Link; GATEWAYS.len()]; NODES.len()],
    /// Nodes that have no state since they booted.
    pub blank: [bool; NODES.len()],
    /// Gateways of which the second does not hear the first, and when each last heard another.
    apart: BTreeSet<(usize, usize)>,
    heard: [[u64; GATEWAYS.len()]; GATEWAYS.len()],
    restless: u64,
    /// Facts that some kernel may still know, and their expiry.
    pub had: BTreeMap<Key, u64>,
    /// Facts that ended while an agent or a gateway was new: a node's kernel may keep them for a day after they
    /// expired, and what their class denied then it goes on denying there.
    pub stale: BTreeMap<Key, u64>,
    /// Facts that a gateway forgot with their scope: others may know them still, or again.
    pub doubt: BTreeSet<Key>,
    /// Every scope that there ever was.
    pub scopes: BTreeMap<ScopeKey, Scope>,
    asked: BTreeMap<u64, Pending>,
    /// Until when which name's address was promised to pods of a node.
    promised: BTreeMap<(Scope, &'static str, IpAddr), BTreeMap<String, u64>>,
    pub flows: Vec<Flow>,
    pub stats: Stats,
    tell: Option<fn(&str)>,
}

/// Decodes and carries out steps until the bytes end, then lets everything end.
///
/// # Panics
/// When the real code and the model disagree.
pub fn run(bytes: &[u8]) -> Stats {
    run_telling(bytes, None)
}

/// As [`run`], and tells each step.
pub fn run_telling(bytes: &[u8], tell: Option<fn(&str)>) -> Stats {
    let mut b = Bytes::new(bytes);
    let mut d = Drive::new();
    d.tell = tell;
    d.begin(&mut b);
    while !b.is_empty() {
        d.step(&mut b);
    }
    d.end();
    d.stats
}

pub(crate) fn node_at(name: &str) -> usize {
    usize::from(name == NODES[1])
}

pub(crate) fn gateway_at(name: &str) -> Option<usize> {
    GATEWAYS.iter().position(|(n, _)| *n == name)
}

impl Drive {
    fn new() -> Self {
        let objects = initial();
        let now = Duration::from_secs(1_000_000);
        Self {
            versions: vec![(objects.clone(), UnixSeconds(START))],
            objects,
            now: now.as_millis() as u64,
            seats: Default::default(),
            nodes: NODES.map(|n| Node::new(n, now)),
            links: Default::default(),
            blank: [true; NODES.len()],
            apart: BTreeSet::new(),
            heard: Default::default(),
            restless: 0,
            had: BTreeMap::new(),
            stale: BTreeMap::new(),
            doubt: BTreeSet::new(),
            scopes: BTreeMap::new(),
            asked: BTreeMap::new(),
            promised: BTreeMap::new(),
            flows: Vec::new(),
            stats: Stats::default(),
            tell: None,
        }
    }

    fn tell(&self, what: impl FnOnce() -> String) {
        if let Some(tell) = self.tell {
            tell(&format!("{:>9.1} s: {}", (self.now - 1_000_000_000) as f64 / 1000.0, what()));
        }
    }

    pub fn time(&self) -> Duration {
        Duration::from_millis(self.now)
    }

    pub fn wall(&self) -> UnixSeconds {
        UnixSeconds(START + (self.now / 1000 - 1_000_000) as i64)
    }

    pub fn subject(&self, ip: IpAddr) -> Option<Subject<'_>> {
        Subject::of(&self.objects, ip, self.wall())
    }

    /// Addresses of the pods that are on a node.
    fn local(&self, node: usize) -> BTreeSet<IpAddr> {
        let here = self.objects.pods.values().filter(|p| p.node == NODES[node]);
        here.flat_map(|p| p.addresses.iter().copied()).collect()
    }

    pub fn pods(&self) -> Vec<IpAddr> {
        self.objects.pods.values().flat_map(|p| p.addresses.iter().copied()).collect()
    }

    fn pod(&self, b: &mut Bytes<'_>) -> Option<IpAddr> {
        let all = self.pods();
        (!all.is_empty()).then(|| all[b.below(all.len())])
    }

    /// A first policy, so that bytes go into what comes of it, and everybody is there.
    fn begin(&mut self, b: &mut Bytes<'_>) {
        (0..GATEWAYS.len()).for_each(|g| self.start(g, false));
        for _ in 0..b.below(6) {
            self.edit(b);
        }
        if !b.one_in(4) {
            self.settle();
        }
    }

    fn step(&mut self, b: &mut Bytes<'_>) {
        self.stats.steps += 1;
        let (node, g) = (usize::from(b.one_in(2)), b.below(GATEWAYS.len()));
        match b.below(40) {
            0..=7 => self.ask(b),
            8..=10 => self.edit(b),
            11..=16 => {
                let count = 1 + b.below(4);
                // Mostly of whoever has something to say.
                let from = b.below(GATEWAYS.len());
                let state = b.one_in(2);
                for g in (0..GATEWAYS.len()).map(|i| (i + from) % GATEWAYS.len()) {
                    let one = |d: &mut Self| if state { d.deliver_state(node, g) } else { d.deliver_facts(node, g) };
                    if (0..count).map(|_| one(self)).fold(false, |a, b| a | b) {
                        break;
                    }
                }
            }
            17..=20 => (0..GATEWAYS.len()).for_each(|g| self.ack(node, g)),
            21..=24 => {
                let waits = [100, 200, 1_000, 2_600, 10_000, 29_900, 61_000, 100_000, 400_000, 3_700_000];
                self.pass(b.pick(&waits));
            }
            25 => self.cut(node, g, b),
            26 => (0..GATEWAYS.len()).for_each(|g| self.up(node, g)),
            27 | 28 => self.fault(node, g, b),
            29 => self.each_up(|gateway, _| gateway.full_pass()),
            30 => {
                if !self.flows.is_empty() {
                    let at = b.below(self.flows.len().min(256));
                    self.flows.swap_remove(at);
                    self.show_flows();
                }
            }
            31..=34 => self.packet(b),
            35 => self.talk(b),
            36 => self.tidings(g, b),
            _ => self.settle(),
        }
        self.flows_go_on();
    }

    // --- what happens ---

    /// Who answers a pod's DNS, as its node has it.
    fn answers(&self, pod: IpAddr) -> Option<usize> {
        let node = self.subject(pod)?.node();
        let resolver = if pod.is_ipv4() { "198.51.100.1" } else { "2001:db8::1" };
        self.steered(node_at(node), pod, parsed(resolver), (Proto::Udp, 53))
    }

    fn ask(&mut self, b: &mut Bytes<'_>) {
        let Some(pod) = self.pod(b) else { return };
        let (asked, v6, stored) = (b.pick(&NAMES), b.one_in(4), b.one_in(3));
        let mask = b.byte();
        let ips: Vec<IpAddr> = OUTSIDE
            .iter()
            .chain(&INSIDE[..1])
            .enumerate()
            .filter(|(i, _)| mask >> (i % 8) & 1 == 1)
            .map(|(_, t)| parsed(t))
            .filter(|ip: &IpAddr| ip.is_ipv6() == v6)
            .collect();
        let ttl = b.pick(&[60u32, 0, 1, 20, 300, 7200]);
        // Whom its node does not steer may ask any.
        let to = self.answers(pod).unwrap_or(usize::from(b.byte()) % GATEWAYS.len());
        let now = self.time();
        let Some(gateway) = self.seats[to].up_mut().filter(|g| g.version.is_some()) else { return };
        let result = gateway.ask(Question { pod, name: asked, v6, ips: &ips, ttl, stored }, now);
        self.tell(|| format!("{pod} asks {} for {asked} ({ttl} s, {ips:?}): {result:?}", GATEWAYS[to].0));
        self.check_answer(to, pod, asked, &ips, &result);
        let until = self.now + u64::from(ttl.min(3600)) * 1000;
        let Some(s) = self.subject_at(to, pod) else { return self.done(to) };
        let (scope, node) = (s.scope(), NODES[node_at(s.node())]);
        match result {
            Asked::Binds(ticket, ips) => {
                let least = self.least(to, pod, asked);
                let p = Pending { gateway: to, pod, scope, node, name: asked, ips, ttl, least, until };
                self.asked.insert(ticket, p);
            }
            Asked::Stands(ips) => {
                for ip in &ips {
                    let fact = self.seats[to].facts.get(&(scope.clone(), asked.to_owned(), *ip));
                    assert!(fact.is_some_and(|f| f.expires >= until), "{asked} at {ip} stands, and is not known");
                }
                self.promise(pod, &scope, node, asked, &ips, until);
            }
            Asked::Denied(_) | Asked::Open => {}
        }
        self.done(to);
        // Mostly its node takes it at once.
        if !b.one_in(3) {
            let at = node_at(node);
            while self.deliver_facts(at, to) {}
            self.ack(at, to);
        }
    }

    /// The longest `minBindingSeconds` of what allows a name, as the world says: how long a fact holds is no matter of
    /// this model, as long as it holds for what was promised.
    fn least(&self, g: usize, pod: IpAddr, asked: &str) -> u64 {
        let Some(world) = self.seats[g].core.as_ref().map(Gateway::world) else { return 0 };
        let min = world.group_of(pod).and_then(|g| g.name(asked, 1).facts.min_binding);
        min.map_or(0, |m| m.as_millis() as u64)
    }

    /// Learns as the ledger's documentation says.
    fn learn(&mut self, p: &Pending) {
        let ttl = u64::from(p.ttl);
        let now = self.now;
        let rrset = now + ttl.min(3600) * 1000;
        let expires = now + ((ttl.clamp(30, 3600) + 60) * 1000).max(p.least);
        for ip in &p.ips {
            let key = (p.scope.clone(), p.name.to_owned(), *ip);
            self.doubt.remove(&key);
            let f = self.seats[p.gateway].facts.entry(key.clone()).or_insert(Fact { rrset, expires });
            if f.expires <= now || rrset > f.rrset + 1000 {
                *f = Fact { rrset: rrset.max(f.rrset), expires: expires.max(f.expires) };
            }
            let had = self.had.entry(key).or_default();
            *had = (*had).max(f.expires);
        }
    }

    /// Learns from others: the later expiry holds.
    fn import(&mut self, g: usize, facts: &[PeerFact]) {
        let now = self.now;
        for f in facts {
            let Some(scope) = self.scopes.get(&f.scope) else { panic!("a fact of an unknown scope is imported") };
            let key = (scope.clone(), f.name.as_str().to_owned(), f.ip);
            let expires = now + f.remaining.as_millis() as u64;
            let rrset = (now + f.ttl.as_millis() as u64).min(expires);
            let known = self.seats[g].facts.entry(key.clone()).or_insert(Fact { rrset, expires });
            if rrset > now {
                known.rrset = known.rrset.max(rrset);
            }
            if expires > now {
                known.expires = known.expires.max(expires);
            }
            let had = self.had.entry(key).or_default();
            *had = (*had).max(known.expires);
        }
        self.stats.imported += facts.len() as u64;
    }

    /// Takes note of what a gateway has done.
    pub fn done(&mut self, g: usize) {
        let Some(core) = &mut self.seats[g].core else { return };
        // Packets are compared when it is known what else came of the same input.
        let (released, others): (Vec<_>, Vec<_>) =
            std::mem::take(&mut core.events).into_iter().partition(|e| matches!(e, Event::Released(..)));
        for event in others.into_iter().chain(released) {
            match event {
                Event::World => self.forget(g),
                Event::Imported(facts) => self.import(g, &facts),
                Event::Heard(ticket) => {
                    if let Some(p) = self.asked.remove(&ticket) {
                        self.learn(&p);
                        self.asked.insert(ticket, p);
                    }
                }
                Event::Released(ticket, ips) => {
                    let Some(p) = self.asked.remove(&ticket) else { panic!("a reply goes out twice") };
                    self.promise(p.pod, &p.scope, p.node, p.name, &ips, p.until);
                }
                Event::Failed(ticket) => {
                    assert!(self.asked.remove(&ticket).is_some(), "a reply fails that does not wait");
                }
                Event::Idle(key, ip) => {
                    let Some(scope) = self.scopes.get(&key).cloned() else { continue };
                    let now = self.now;
                    self.tell(|| format!("{ip} is idle in {scope:?} at {}", GATEWAYS[g].0));
                    self.end_facts(g, |k, f| k.0 == scope && k.2 == ip && f.expires <= now);
                }
            }
        }
        let Some(core) = &self.seats[g].core else { return };
        assert_eq!(core.ledger().counts().facts, self.seats[g].facts.len(), "facts of {}", GATEWAYS[g].0);
    }

    /// A reply goes out with these addresses.
    fn promise(&mut self, pod: IpAddr, scope: &Scope, node: &'static str, name: &str, ips: &[IpAddr], until: u64) {
        self.stats.released += u64::from(!ips.is_empty());
        self.tell(|| format!("{name} at {ips:?} goes out to {pod} on {node}, of {scope:?}"));
        for ip in ips {
            let known =
                self.promised.entry((scope.clone(), node, *ip)).or_default().entry(name.to_owned()).or_default();
            *known = until.max(*known);
        }
        // The first packet comes at once.
        for ip in ips {
            for to in [(Proto::Tcp, 443), (Proto::Tcp, 80), (Proto::Udp, 443), (Proto::Tcp, 5432), (Proto::Udp, 22)] {
                self.compare(pod, *ip, to);
            }
        }
    }

    /// Facts end at a gateway; until all is delivered, kernels may still know them.
    fn end_facts(&mut self, g: usize, over: impl Fn(&Key, &Fact) -> bool) {
        let had = &mut self.had;
        self.seats[g].facts.retain(|k, f| {
            let over = over(k, f);
            if over {
                let had = had.entry(k.clone()).or_default();
                *had = (*had).max(f.expires);
            }
            !over
        });
    }

    fn edit(&mut self, b: &mut Bytes<'_>) {
        let wall = self.wall();
        let old = self.objects.clone();
        edit(&mut self.objects, b, wall);
        self.stats.edits += 1;
        self.tell(|| format!("edit {}", difference(&old, &self.objects)));
        self.versions.push((self.objects.clone(), wall));
        for seat in &mut self.seats {
            seat.edits.push_back((self.objects.clone(), wall));
        }
        for n in 0..NODES.len() {
            // Pods come and go whatever the agent has heard.
            let local = self.local(n);
            self.nodes[n].moved(&local);
        }
        self.forget_promises();
        for g in 0..GATEWAYS.len() {
            if !self.seats[g].lags {
                while self.hear_edit(g) {}
            }
        }
    }

    /// A gateway hears of the next edit.
    fn hear_edit(&mut self, g: usize) -> bool {
        let (now, wall) = (self.time(), self.wall());
        let seat = &mut self.seats[g];
        let Some(core) = seat.core.as_mut().filter(|_| seat.hung.is_none()) else { return false };
        let Some((objects, _)) = seat.edits.pop_front() else { return false };
        core.edit(&objects, wall, now);
        self.versions.push((objects, wall));
        self.done(g);
        true
    }

    /// What scopes that are gone knew is forgotten at a gateway.
    fn forget(&mut self, g: usize) {
        let Some(core) = &self.seats[g].core else { return };
        let world = core.world();
        let named = |(k, s): (&ScopeKey, &std::sync::Arc<tidegate_policy::world::Scope>)| {
            (*k, (s.uid().to_string(), s.pool().to_string()))
        };
        self.scopes.extend(world.scopes().iter().map(named));
        let Some((objects, wall)) = core.version.clone() else { return };
        let pods = objects.pods.values().flat_map(|p| &p.addresses);
        let subjects = pods.filter_map(|ip| Subject::of(&objects, *ip, wall)).filter(|s| s.touched() != Touched::No);
        let live: BTreeSet<Scope> = subjects.map(|s| s.scope()).collect();
        let gone = self.seats[g].facts.keys().filter(|k| !live.contains(&k.0)).cloned();
        self.doubt.extend(gone);
        self.end_facts(g, |k, _| !live.contains(&k.0));
    }

    /// What was promised to pods that are gone counts no more.
    fn forget_promises(&mut self) {
        let objects = std::mem::take(&mut self.objects);
        let wall = self.wall();
        let pods = objects.pods.values().flat_map(|p| &p.addresses);
        let subjects: Vec<_> = pods.filter_map(|ip| Subject::of(&objects, *ip, wall)).collect();
        let live: BTreeSet<(Scope, usize)> =
            subjects.iter().filter(|s| s.touched() != Touched::No).map(|s| (s.scope(), node_at(s.node()))).collect();
        self.promised.retain(|k, _| live.contains(&(k.0.clone(), node_at(k.1))));
        let stays =
            |f: &Flow| Subject::of(&objects, f.pod, wall).is_some_and(|s| s.scope() == f.scope && s.node() == f.node);
        self.flows.retain(stays);
        self.objects = objects;
        self.show_flows();
    }

    /// Gateways see which addresses carry flows.
    fn show_flows(&mut self) {
        for (g, seat) in self.seats.iter_mut().enumerate() {
            if let Some(core) = &mut seat.core {
                core.live = self.flows.iter().filter(|f| f.gateway == g).map(|f| (f.key, f.ip)).collect();
            }
        }
    }
}

/// The objects that an edit changed.
fn difference(old: &Objects, new: &Objects) -> String {
    let mut out = String::new();
    let mut one = |kind: &str, old: String, new: String| {
        if old != new {
            out += &format!("{kind}: {new} ");
        }
    };
    for (k, v) in &new.policies {
        one(&format!("policy {k:?}"), format!("{:?}", old.policies.get(k)), format!("{:?}", Some(v)));
    }
    for (k, v) in &new.cluster_policies {
        one(&format!("cluster policy {k}"), format!("{:?}", old.cluster_policies.get(k)), format!("{:?}", Some(v)));
    }
    let names = |o: &Objects| format!("{:?} {:?}", o.policies.keys(), o.cluster_policies.keys());
    one("policies", names(old), names(new));
    one("pods", format!("{:?}", old.pods), format!("{:?}", new.pods));
    one("pools", format!("{:?}", old.pools), format!("{:?}", new.pools));
    one("namespaces", format!("{:?}", old.namespaces), format!("{:?}", new.namespaces));
    one("settings", format!("{:?}", old.settings), format!("{:?}", new.settings));
    out
}
