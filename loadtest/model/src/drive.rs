//! Decoded steps, carried out by the real parts and by the model side by side.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use tidegate_ebpf_common::{Action, layout::via, packet::proto};
use tidegate_ledger::Bound;
use tidegate_policy::model::{Objects, UnixSeconds};
use tidegate_policy::{Carry, Proto, ScopeKey};

use crate::bytes::Bytes;
use crate::gateway::{Asked, Gateway};
use crate::kernel::{frame, ifindex};
use crate::node::Node;
use crate::objects::{INSIDE, NAMES, NODES, OUTSIDE, PORTS, PRIVATE, START, edit, initial, name, parsed};
use crate::reference::{Fate, Port, Said, Subject, Touched, in_cluster};

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
    }
}

type Scope = (String, String);

/// A fact in milliseconds since boot.
#[derive(Clone, Copy, Debug)]
struct Fact {
    rrset: u64,
    expires: u64,
}

/// A reply that waits for its node.
struct Waiting {
    pod: IpAddr,
    scope: Scope,
    node: &'static str,
    name: &'static str,
    until: u64,
}

/// A live connection.
#[derive(Clone, Debug)]
struct Flow {
    pod: IpAddr,
    scope: Scope,
    node: String,
    names: BTreeSet<String>,
    ip: IpAddr,
    to: Port,
    since: u64,
}

/// Which streams of a node are up.
#[derive(Clone, Copy, Default)]
struct Link {
    state: bool,
    facts: bool,
}

/// Flows end when they are older: after a day the ledger sweeps what has expired.
const OLD_FLOW: u64 = 20 * 3600 * 1000;
/// Kernels count in seconds, and round up.
const ROUNDING: u64 = 2_000;

struct Drive {
    objects: Objects,
    /// The policies that any machine may hold: since everything was delivered the last time.
    versions: Vec<(Objects, UnixSeconds)>,
    now: u64,
    gateway: Gateway,
    boot: u64,
    nodes: [Node; 2],
    links: [Link; 2],
    /// Nodes that have no state since they booted.
    blank: [bool; 2],
    facts: BTreeMap<(Scope, String, IpAddr), Fact>,
    /// Facts that some kernel may still know.
    had: BTreeSet<(Scope, String, IpAddr)>,
    /// Facts that ended while an agent or the gateway was new: a node's kernel may keep them, expired, for a day, and
    /// what their class denied then it goes on denying there.
    stale: BTreeSet<(Scope, String, IpAddr)>,
    waiting: BTreeMap<u64, Waiting>,
    /// Until when which name's address was promised to pods of a node.
    promised: BTreeMap<(Scope, &'static str, IpAddr), BTreeMap<String, u64>>,
    flows: Vec<Flow>,
    stats: Stats,
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

fn node_at(name: &str) -> usize {
    usize::from(name == NODES[1])
}

impl Drive {
    fn new() -> Self {
        let objects = initial();
        let now = Duration::from_secs(1_000_000);
        let wall = UnixSeconds(START);
        let gateway = Gateway::start(&objects, wall, now, 1, Vec::new());
        Self {
            versions: vec![(objects.clone(), wall)],
            objects,
            now: now.as_millis() as u64,
            gateway,
            boot: 1,
            nodes: NODES.map(|n| Node::new(n, now)),
            links: [Link::default(); 2],
            blank: [true; 2],
            facts: BTreeMap::new(),
            had: BTreeSet::new(),
            stale: BTreeSet::new(),
            waiting: BTreeMap::new(),
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

    fn time(&self) -> Duration {
        Duration::from_millis(self.now)
    }

    fn wall(&self) -> UnixSeconds {
        UnixSeconds(START + (self.now / 1000 - 1_000_000) as i64)
    }

    fn subject(&self, ip: IpAddr) -> Option<Subject<'_>> {
        Subject::of(&self.objects, ip, self.wall())
    }

    /// Addresses of the pods that are on a node.
    fn local(&self, node: &str) -> BTreeSet<IpAddr> {
        self.objects.pods.values().filter(|p| p.node == node).flat_map(|p| p.addresses.iter().copied()).collect()
    }

    fn pod(&self, b: &mut Bytes<'_>) -> Option<IpAddr> {
        let all: Vec<IpAddr> = self.objects.pods.values().flat_map(|p| p.addresses.iter().copied()).collect();
        (!all.is_empty()).then(|| all[b.below(all.len())])
    }

    fn step(&mut self, b: &mut Bytes<'_>) {
        self.stats.steps += 1;
        let node = usize::from(b.one_in(2));
        match b.below(32) {
            0..=5 => self.ask(b),
            6..=8 => self.edit(b),
            9..=13 => {
                let count = 1 + b.below(4);
                let state = b.one_in(2);
                for _ in 0..count {
                    if state {
                        self.deliver_state(node)
                    } else {
                        self.deliver_facts(node)
                    };
                }
            }
            14..=16 => self.ack(node),
            17..=19 => {
                let waits = [100, 200, 1_000, 2_600, 10_000, 29_900, 61_000, 100_000, 400_000, 3_700_000];
                self.pass(b.pick(&waits));
            }
            20 => self.cut(node, b),
            21 | 22 => self.up(node),
            23 => match b.below(4) {
                0 => self.restart_gateway(),
                1 => self.reboot(node),
                _ => self.restart_agent(node),
            },
            24 => self.gateway.full_pass(),
            25 => {
                if !self.flows.is_empty() {
                    let at = b.below(self.flows.len().min(256));
                    self.flows.swap_remove(at);
                }
            }
            26..=29 => self.packet(b),
            _ => self.settle(),
        }
        self.flows_go_on();
    }

    // --- what happens ---

    fn ask(&mut self, b: &mut Bytes<'_>) {
        let Some(pod) = self.pod(b) else { return };
        let (asked, v6) = (b.pick(&NAMES), b.one_in(3));
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
        let result = self.gateway.ask(pod, asked, v6, &ips, ttl, self.time());
        self.tell(|| format!("{pod} asks for {asked} ({ttl} s, {ips:?}): {result:?}"));
        self.check_answer(pod, asked, &ips, &result);
        if let Asked::Binds(ticket, ips) = result {
            let Some(s) = self.subject(pod) else { panic!("an unknown pod's question binds") };
            let (scope, node) = (s.scope(), NODES[node_at(s.node())]);
            let least = self.least(pod, asked);
            self.learn(&scope, asked, &ips, ttl, least);
            let until = self.now + u64::from(ttl.min(3600)) * 1000;
            self.waiting.insert(ticket, Waiting { pod, scope, node, name: asked, until });
        }
        self.done();
    }

    /// The longest `minBindingSeconds` of what allows a name, as the world says: how long a fact holds is no matter of
    /// this model, as long as it holds for what was promised.
    fn least(&self, pod: IpAddr, asked: &str) -> u64 {
        let world = self.gateway.world();
        let min = world.group_of(pod).and_then(|g| g.name(asked, 1).facts.min_binding);
        min.map_or(0, |m| m.as_millis() as u64)
    }

    /// Whether an answer is right for the pod.
    fn check_answer(&self, pod: IpAddr, asked: &str, ips: &[IpAddr], result: &Asked) {
        let Some(s) = self.subject(pod) else { return };
        if s.touched() == Touched::No || !s.has_way_out() {
            assert!(matches!(result, Asked::Denied(_)), "an answer for a pod that is not served: {result:?}");
            return;
        }
        if s.audited() {
            return;
        }
        let good = |ip: &&IpAddr| {
            let private = **ip == parsed::<IpAddr>(PRIVATE);
            !in_cluster(&self.objects, **ip, (Proto::Tcp, 443))
                && !tidegate_policy::special::is_metadata(**ip)
                && (!private || s.may_be_private(asked, **ip))
        };
        if let Asked::Binds(_, bound) = result {
            assert!(bound.iter().all(|ip| good(&ip)), "{asked} binds {bound:?}");
        }
        let strict = self.objects.settings.dns_filter == tidegate_policy::model::DnsFilter::Strict;
        match s.touched() {
            Touched::Isolated if !s.wants(asked) => {
                let refused = matches!(result, Asked::Denied(_));
                assert!(refused || (!strict && *result == Asked::Open), "{asked} is not allowed: {result:?}");
            }
            Touched::Isolated => {
                let world = self.gateway.world();
                let has_family = |ip: &IpAddr| {
                    let families = world.group_of(pod).map_or((true, true), |g| g.scope().families());
                    if ip.is_ipv4() { families.0 } else { families.1 }
                };
                let sent: &[IpAddr] = if let Asked::Binds(_, bound) = result { bound } else { &[] };
                // Which of the rules that could accept a private address let the name through is not modelled.
                let public = |ip: &&IpAddr| **ip != parsed::<IpAddr>(PRIVATE);
                let good = ips.iter().filter(good).filter(public);
                for ip in good.filter(|ip| has_family(ip) && s.reaches(asked, **ip)) {
                    assert!(sent.contains(ip), "{asked} at {ip} is left out: {result:?}");
                }
            }
            _ if s.denies(asked) => {
                // Only where it is bound a deny of the name holds in the kernel.
                let public = |ip: &&IpAddr| good(ip) && **ip != parsed::<IpAddr>(PRIVATE);
                let bound: &[IpAddr] = if let Asked::Binds(_, bound) = result { bound } else { &[] };
                let held = matches!(result, Asked::Denied(_)) || ips.iter().filter(public).all(|ip| bound.contains(ip));
                assert!(held, "a deny of {asked} cannot hold: {result:?}");
            }
            _ => {}
        }
    }

    /// Learns as the ledger's documentation says.
    fn learn(&mut self, scope: &Scope, asked: &str, ips: &[IpAddr], ttl: u32, least: u64) {
        let ttl = u64::from(ttl);
        let rrset = self.now + ttl.min(3600) * 1000;
        let expires = self.now + ((ttl.clamp(30, 3600) + 60) * 1000).max(least);
        for ip in ips {
            let key = (scope.clone(), asked.to_owned(), *ip);
            self.had.insert(key.clone());
            let now = self.now;
            self.facts
                .entry(key)
                .and_modify(|f| {
                    if f.expires <= now || rrset > f.rrset + 1000 {
                        *f = Fact { rrset: rrset.max(f.rrset), expires: expires.max(f.expires) };
                    }
                })
                .or_insert(Fact { rrset, expires });
        }
    }

    /// Takes note of what the gateway has done.
    fn done(&mut self) {
        loop {
            let done = std::mem::take(&mut self.gateway.done);
            for (ticket, ips) in done.released {
                let Some(w) = self.waiting.remove(&ticket) else { panic!("a reply goes out twice") };
                self.stats.released += u64::from(!ips.is_empty());
                self.tell(|| format!("{} at {ips:?} goes out to {} of {:?}", w.name, w.node, w.scope));
                for ip in &ips {
                    let until = self.promised.entry((w.scope.clone(), w.node, *ip)).or_default();
                    let until = until.entry(w.name.to_owned()).or_default();
                    *until = w.until.max(*until);
                }
                // The first packet comes at once.
                for ip in ips {
                    for to in [(Proto::Tcp, 443), (Proto::Tcp, 80), (Proto::Udp, 443), (Proto::Tcp, 5432)] {
                        self.compare(w.pod, ip, to);
                    }
                }
            }
            for ticket in done.failed {
                assert!(self.waiting.remove(&ticket).is_some(), "a reply fails that does not wait");
            }
            if done.ask.is_empty() {
                return;
            }
            for (key, ip) in done.ask {
                let Some(scope) = self.scope_of(key) else { continue };
                if !self.flows.iter().any(|f| f.scope == scope && f.ip == ip) {
                    let now = self.now;
                    self.tell(|| format!("{ip} is idle in {scope:?}"));
                    self.end_facts(|k, f| k.0 == scope && k.2 == ip && f.expires <= now);
                    self.gateway.idle(key, ip, self.time());
                }
            }
        }
    }

    /// Facts end; until all is delivered, kernels may still know them.
    fn end_facts(&mut self, over: impl Fn(&(Scope, String, IpAddr), &Fact) -> bool) {
        let had = &mut self.had;
        self.facts.retain(|k, f| {
            let over = over(k, f);
            if over {
                had.insert(k.clone());
            }
            !over
        });
    }

    fn scope_of(&self, key: ScopeKey) -> Option<Scope> {
        let world = self.gateway.world();
        let s = world.scope(key)?;
        Some((s.uid().to_string(), s.pool().to_string()))
    }

    fn edit(&mut self, b: &mut Bytes<'_>) {
        let wall = self.wall();
        edit(&mut self.objects, b, wall);
        self.stats.edits += 1;
        self.recompile();
    }

    fn recompile(&mut self) {
        if let Some((old, _)) = self.versions.last() {
            self.tell(|| format!("edit {}", difference(old, &self.objects)));
        }
        self.versions.push((self.objects.clone(), self.wall()));
        self.gateway.edit(&self.objects, self.wall(), self.time());
        for (i, n) in NODES.iter().enumerate() {
            // Pods come and go whatever the agent has heard.
            let local = self.local(n);
            self.nodes[i].moved(&local);
        }
        self.forget();
        self.done();
    }

    /// What scopes that are gone knew is forgotten, and what nodes knew that have no pod of them.
    fn forget(&mut self) {
        let pods: Vec<IpAddr> = self.objects.pods.values().flat_map(|p| p.addresses.iter().copied()).collect();
        let subjects: Vec<Subject<'_>> = pods.iter().filter_map(|ip| self.subject(*ip)).collect();
        let live: BTreeSet<(Scope, usize)> =
            subjects.iter().filter(|s| s.touched() != Touched::No).map(|s| (s.scope(), node_at(s.node()))).collect();
        let scopes: BTreeSet<Scope> = live.iter().map(|(s, _)| s.clone()).collect();
        self.end_facts(|k, _| !scopes.contains(&k.0));
        self.promised.retain(|k, _| live.contains(&(k.0.clone(), node_at(k.1))));
        let objects = std::mem::take(&mut self.objects);
        let wall = self.wall();
        self.flows
            .retain(|f| Subject::of(&objects, f.pod, wall).is_some_and(|s| s.scope() == f.scope && s.node() == f.node));
        self.objects = objects;
    }

    fn deliver_state(&mut self, node: usize) -> bool {
        let Some(m) = self.gateway.next_state(NODES[node]) else { return false };
        self.tell(|| format!("{} takes a state", NODES[node]));
        let local = self.local(NODES[node]);
        self.nodes[node].take_state(&m, &local);
        self.blank[node] = false;
        true
    }

    fn deliver_facts(&mut self, node: usize) -> bool {
        let Some(m) = self.gateway.next_facts(NODES[node]) else { return false };
        self.tell(|| format!("{} takes facts", NODES[node]));
        let local = self.local(NODES[node]);
        self.nodes[node].take_facts(&m, &local);
        true
    }

    fn ack(&mut self, node: usize) {
        if let Some((boot, seq)) = self.nodes[node].state_applied {
            self.gateway.state_ack(NODES[node], boot, seq);
        }
        if let Some((boot, seq)) = self.nodes[node].applied {
            self.tell(|| format!("{} acks {seq}", NODES[node]));
            self.gateway.ack(NODES[node], boot, seq, self.time());
            self.done();
        }
    }

    /// Lets time pass, stopping where anything is due.
    fn pass(&mut self, by: u64) {
        let end = self.now + by;
        self.tell(|| format!("{by} ms pass"));
        while self.now < end {
            let due = self.gateway.deadline().map_or(end, |d| d.as_millis() as u64);
            let change = self.gateway.world().next_change();
            let change = change.map_or(end, |c| ((c.0 - START) as u64 + 1_000_000) * 1000);
            // What is due now is done in the next tenth of a second, so that time goes on.
            self.now = due.min(change).max(self.now + 100).min(end);
            let now = self.time();
            for (i, n) in self.nodes.iter_mut().enumerate() {
                n.kernel.now = now;
                if self.links[i].facts && !self.gateway.has_facts_for(NODES[i]) {
                    n.kernel.heartbeat(crate::gateway::NAME);
                }
            }
            self.gateway.kernel.heartbeat(crate::gateway::NAME);
            self.sweep();
            self.gateway.tick(now);
            self.done();
            let wall = self.wall();
            if self.gateway.world().next_change().is_some_and(|c| c <= wall) {
                self.recompile();
            }
        }
    }

    /// The ledger's sweep of what expired a day ago.
    fn sweep(&mut self) {
        let now = self.now;
        self.end_facts(|_, f| f.expires + 24 * 3600 * 1000 <= now);
        self.flows.retain(|f| f.since + OLD_FLOW > now);
    }

    fn cut(&mut self, node: usize, b: &mut Bytes<'_>) {
        let which = b.below(3);
        if which != 0 {
            self.cut_facts(node);
        }
        if which != 1 {
            self.cut_state(node);
        }
    }

    fn cut_state(&mut self, node: usize) {
        self.tell(|| format!("{} loses its State stream", NODES[node]));
        self.links[node].state = false;
        self.gateway.state_down(NODES[node]);
        self.nodes[node].state_away();
    }

    fn cut_facts(&mut self, node: usize) {
        self.tell(|| format!("{} loses its Facts stream", NODES[node]));
        self.links[node].facts = false;
        self.gateway.facts_down(NODES[node], self.time());
        self.nodes[node].facts_away();
        self.done();
    }

    fn up(&mut self, node: usize) {
        self.tell(|| format!("{} connects", NODES[node]));
        if !self.links[node].state {
            self.links[node].state = true;
            self.gateway.state_up(NODES[node]);
        }
        if !self.links[node].facts {
            self.links[node].facts = true;
            let agent = self.nodes[node].agent;
            self.gateway.facts_up(NODES[node], agent, self.time());
            self.done();
        }
    }

    fn restart_agent(&mut self, node: usize) {
        self.tell(|| format!("the agent of {} restarts", NODES[node]));
        self.cut_state(node);
        self.cut_facts(node);
        self.nodes[node].restart(false);
        self.remember();
    }

    /// From now on a node may keep what is known now.
    fn remember(&mut self) {
        self.stale.extend(self.had.iter().chain(self.facts.keys()).cloned());
    }

    fn reboot(&mut self, node: usize) {
        self.tell(|| format!("{} reboots", NODES[node]));
        self.restart_agent(node);
        self.nodes[node].restart(true);
        self.blank[node] = true;
        self.flows.retain(|f| f.node != NODES[node]);
    }

    fn restart_gateway(&mut self) {
        self.tell(|| "the gateway restarts".into());
        for node in 0..2 {
            self.cut_state(node);
            self.cut_facts(node);
        }
        self.remember();
        self.boot += 1;
        let journal = self.gateway.export(self.time());
        assert_eq!(journal.len(), self.facts.len(), "the journal holds what is known");
        self.gateway = Gateway::start(&self.objects, self.wall(), self.time(), self.boot, journal);
        self.gateway.kernel.heartbeat(crate::gateway::NAME);
        // Nobody hears of questions that waited, and what had ended ends now.
        self.waiting.clear();
        for f in self.facts.values_mut() {
            f.expires = f.expires.max(self.now);
            f.rrset = f.rrset.max(self.now).min(f.expires);
        }
        self.done();
    }

    // --- what must be ---

    /// What the machines do with a packet.
    fn happens(&self, pod: IpAddr, ip: IpAddr, (p, port): Port, syn: bool) -> Fate {
        let number = if p == Proto::Tcp { proto::TCP } else { proto::UDP };
        let frame = frame(pod, ip, number, port, syn);
        let Some(s) = self.subject(pod) else { panic!("packets of no pod") };
        let d = self.nodes[node_at(s.node())].kernel.decide(&frame, ifindex(pod));
        match d.action {
            Action::Drop => return Fate::Denied,
            Action::Pass | Action::Ignore => return Fate::Passes,
            Action::Steer => {}
        }
        let g = self.gateway.kernel.decide(&frame, 1);
        match (g.action, g.via) {
            (Action::Drop, _) => Fate::Denied,
            (Action::Steer, via::DNS) => Fate::Dns,
            (Action::Steer, via::FORWARD) => Fate::Carried(Carry::Forward),
            (Action::Steer, via::TLS) => Fate::Carried(Carry::Tls),
            (Action::Steer, via::BLOCK) => Fate::Carried(Carry::Block),
            other => panic!("a gateway neither carries nor drops: {other:?}"),
        }
    }

    /// The names of an address, and the latest of their expiries.
    fn names(&self, scope: &Scope, ip: IpAddr) -> (BTreeSet<String>, u64) {
        let all = self.facts.iter().filter(|(k, _)| k.0 == *scope && k.2 == ip);
        all.fold((BTreeSet::new(), 0), |(mut names, last), (k, f)| {
            names.insert(k.1.clone());
            (names, last.max(f.expires))
        })
    }

    /// The one fate that policy leaves, given all that machines may know now; `None` if there are several. `least`: names
    /// that the pod's node knows for sure.
    fn must(&self, pod: IpAddr, ip: IpAddr, to: Port, least: &BTreeSet<String>, flow: bool) -> Option<Fate> {
        let now = self.subject(pod)?;
        let (scope, node) = (now.scope(), now.node());
        let (names, last) = self.names(&scope, ip);
        let mut sets: Vec<BTreeSet<String>> = vec![least.clone()];
        let settled = self.versions.len() == 1 && self.had.is_empty();
        if settled {
            sets = if least.is_empty() { vec![BTreeSet::new(), names.clone()] } else { vec![names.clone()] };
        } else {
            let had = self.had.iter().filter(|k| k.0 == scope && k.2 == ip).map(|k| k.1.clone());
            for extra in names.iter().cloned().chain(had).collect::<BTreeSet<_>>().difference(least) {
                let with = sets.iter().map(|s| s.iter().cloned().chain([extra.clone()]).collect());
                let with: Vec<BTreeSet<String>> = with.collect();
                sets.extend(with);
            }
        }
        let of_here = |k: &(Scope, String, IpAddr)| k.0 == scope && k.2 == ip && !names.contains(&k.1);
        let stale = self.stale.iter().any(of_here);
        let ended: &[bool] = match (flow || !least.is_empty(), last + ROUNDING <= self.now) {
            (true, _) => &[false],
            (_, true) => &[true],
            _ => &[false, true],
        };
        let mut fates = Vec::new();
        let mut edited = false;
        for (objects, wall) in &self.versions {
            let s = Subject::of(objects, pod, *wall)?;
            edited |= !s.same(&now);
            if s.scope() != scope || s.node() != node {
                return None;
            }
            for set in &sets {
                fates.extend(ended.iter().map(|e| s.fate(set, *e, ip, to)));
            }
        }
        fates.dedup();
        // While an edit of what concerns the pod is on its way by two streams, the old group may meet the new class or
        // the other way round: then a packet is dropped, and never let through.
        (fates.len() == 1 && (!(edited || stale) || fates[0] == Fate::Denied)).then(|| fates[0])
    }

    /// Names that were promised to a pod for an address and still are.
    fn promises(&self, pod: IpAddr, ip: IpAddr) -> BTreeSet<String> {
        let Some(s) = self.subject(pod) else { return BTreeSet::new() };
        let key = (s.scope(), NODES[node_at(s.node())], ip);
        let promised = self.promised.get(&key).into_iter().flatten();
        promised.filter(|(_, until)| **until > self.now).map(|(n, _)| n.clone()).collect()
    }

    fn compare(&mut self, pod: IpAddr, ip: IpAddr, to: Port) -> Option<Fate> {
        if (pod.is_ipv6() != ip.is_ipv6()) || self.subject(pod).is_none_or(|s| self.blank[node_at(s.node())]) {
            return None;
        }
        let least = self.promises(pod, ip);
        let happens = self.happens(pod, ip, to, to.0 == Proto::Tcp);
        if let Some(must) = self.must(pod, ip, to, &least, false) {
            self.stats.packets += 1;
            self.stats.carried += u64::from(!least.is_empty() && matches!(must, Fate::Carried(_)));
            assert_eq!(happens, must, "{pod} to {ip} {to:?}, promised {least:?}, of {} policies", self.versions.len());
            if must == Fate::Denied && to.1 != 53 {
                // Nodes that hear nothing send on what they do not know: the gateway must not lean on them. Its DNS
                // service answers whoever asks, and denies what has no way out.
                let number = if to.0 == Proto::Tcp { proto::TCP } else { proto::UDP };
                let alone = self.gateway.kernel.decide(&frame(pod, ip, number, to.1, to.0 == Proto::Tcp), 1);
                assert_eq!(alone.action, Action::Drop, "the gateway carries what is denied: {pod} to {ip} {to:?}");
            }
        }
        Some(happens)
    }

    /// A first policy, so that bytes go into what comes of it, and everybody is there.
    fn begin(&mut self, b: &mut Bytes<'_>) {
        for _ in 0..b.below(8) {
            self.edit(b);
        }
        if b.one_in(2) {
            self.settle();
        }
    }

    /// A destination that a pod was promised, if there is one.
    fn promised_to(&self, b: &mut Bytes<'_>) -> Option<(IpAddr, IpAddr)> {
        let live = |(k, names): (&(Scope, &'static str, IpAddr), &BTreeMap<String, u64>)| {
            names.values().any(|until| *until > self.now).then(|| k.clone())
        };
        let all: Vec<_> = self.promised.iter().filter_map(live).collect();
        let (scope, node, ip) = all.get(b.byte() as usize % all.len().max(1))?;
        let pods = self.objects.pods.values().flat_map(|p| &p.addresses);
        let mut fitting = pods.filter(|p| p.is_ipv6() == ip.is_ipv6());
        let pod = fitting.find(|p| self.subject(**p).is_some_and(|s| s.scope() == *scope && s.node() == *node))?;
        Some((*pod, *ip))
    }

    fn packet(&mut self, b: &mut Bytes<'_>) {
        let to = (b.pick(&[Proto::Tcp, Proto::Udp]), b.pick(&PORTS));
        let (pod, ip) = match self.promised_to(b) {
            Some(found) if !b.one_in(4) => found,
            _ => {
                let Some(pod) = self.pod(b) else { return };
                (pod, if b.one_in(8) { parsed(b.pick(&INSIDE)) } else { parsed(b.pick(&OUTSIDE)) })
            }
        };
        let fate = self.compare(pod, ip, to);
        let promised = self.promises(pod, ip);
        if let (Some(Fate::Carried(Carry::Forward | Carry::Tls)), Proto::Tcp, Some(s)) = (fate, to.0, self.subject(pod))
            && self.flows.len() < 8
            && !promised.is_empty()
        {
            let (scope, node) = (s.scope(), s.node().to_owned());
            self.tell(|| format!("a connection from {pod} to {ip} {to:?}"));
            self.flows.push(Flow { pod, scope, node, names: promised, ip, to, since: self.now });
        }
    }

    /// Live flows go on wherever policy did not change for them.
    fn flows_go_on(&mut self) {
        let mut revoked = Vec::new();
        for (i, f) in self.flows.iter().enumerate() {
            let must = self.must(f.pod, f.ip, f.to, &f.names, true);
            match must {
                Some(Fate::Carried(c)) => {
                    let happens = self.happens(f.pod, f.ip, f.to, false);
                    assert_eq!(happens, Fate::Carried(c), "{f:?} is cut");
                    self.stats.flows += 1;
                }
                Some(_) => revoked.push(i),
                None => {}
            }
        }
        for i in revoked.into_iter().rev() {
            self.flows.swap_remove(i);
        }
    }

    /// Delivers and acks everything, then compares everything.
    fn settle(&mut self) {
        self.tell(|| "everything is delivered".into());
        for node in 0..2 {
            self.up(node);
        }
        loop {
            (0..2).for_each(|n| self.ack(n));
            // An ack may bring more.
            if !(0..2).any(|n| self.deliver_facts(n) | self.deliver_state(n)) {
                break;
            }
        }
        assert!(self.waiting.is_empty(), "everything is acked, and {} replies wait", self.waiting.len());
        self.versions = vec![(self.objects.clone(), self.wall())];
        self.had.clear();
        self.check();
    }

    fn check(&mut self) {
        let counts = self.gateway.ledger().counts();
        assert_eq!(counts.facts, self.facts.len(), "facts");
        let addresses: BTreeSet<_> = self.facts.keys().map(|k| (&k.0, k.2)).collect();
        assert_eq!((counts.addresses, self.gateway.kernel.held()), (addresses.len(), addresses.len()), "addresses");
        let pods: Vec<IpAddr> = self.objects.pods.values().flat_map(|p| p.addresses.iter().copied()).collect();
        for pod in pods {
            for ip in OUTSIDE.iter().chain(&INSIDE).map(|t| parsed::<IpAddr>(t)) {
                for to in PORTS.iter().flat_map(|p| [(Proto::Tcp, *p), (Proto::Udp, *p)]) {
                    if self.compare(pod, ip, to) == Some(Fate::Carried(Carry::Tls)) {
                        self.check_relay(pod, ip, to);
                    }
                }
            }
        }
    }

    /// What the relay says of each name that a client may send.
    fn check_relay(&self, pod: IpAddr, ip: IpAddr, to: Port) {
        let world = self.gateway.world();
        let (Some(member), Some(s)) = (world.endpoint(pod).and_then(|e| e.member), self.subject(pod)) else {
            panic!("a pod whose packets are carried is not known");
        };
        let Some(group) = world.group(member.index) else { panic!("a member has no group") };
        let bindings = self.gateway.ledger().bindings();
        let scope = s.scope();
        for said in NAMES {
            let bound = bindings.is_bound(member.scope, said, ip, self.time());
            let fact = self.facts.get(&(scope.clone(), said.to_owned(), ip));
            let expected = match fact {
                None => Bound::No,
                Some(f) if f.expires <= self.now => Bound::Expired,
                Some(_) => Bound::Bound,
            };
            assert_eq!(bound, expected, "{said} at {ip}");
            let n = name(said);
            let (decision, may) = if bound == Bound::Bound {
                (group.connection(Some(&n), ip, to.0, to.1), s.may(Said::Bound(said), ip, to))
            } else {
                (group.connection_unbound(&n, ip, to.0, to.1), s.may(Said::Unbound(said), ip, to))
            };
            assert_eq!(decision.allowed(), may, "{said} ({bound:?}) to {ip} {to:?}: {decision:?}");
        }
        let nameless = group.connection(None, ip, to.0, to.1).allowed();
        assert_eq!(nameless, s.may(Said::Nothing, ip, to), "no name to {ip} {to:?}");
    }

    /// Everything ends, and nothing is left.
    fn end(&mut self) {
        self.settle();
        self.flows.clear();
        self.pass(2 * 3600 * 1000);
        self.settle();
        self.pass(25 * 3600 * 1000);
        self.settle();
        assert!(self.facts.is_empty(), "facts outlive a day without flows");
        let c = self.gateway.ledger().counts();
        assert_eq!((c.scopes, c.names, c.addresses, c.facts, c.held), (0, 0, 0, 0, 0), "{c:?}");
        assert_eq!(self.gateway.kernel.held(), 0);
        self.gateway.full_pass();
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
