//! The ledger beside a naive model: the same random inputs, the promises checked after each.
//!
//! The model keeps facts in one flat map and has no timers. Nodes are simulated
//! with a channel each and the kernel entries that they really applied, so that a
//! released reply is checked against what a packet would meet.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use proptest::prelude::*;
use tidegate_ledger::{Answer, Bound, Classify, Config, Input, Ledger, NodeId, Output, OwnerId, Quotas};
use tidegate_policy::state::FactUpdate;
use tidegate_policy::{ClassKey, Name, Reason, ScopeKey};

const SCOPES: u8 = 3;
const NODES: u32 = 3;
const NAMES: u8 = 6;
const IPS: u8 = 8;
const START: u64 = 1_000_000;
const DAY: u64 = 24 * 3600 * 1000;
const QUOTAS: Quotas = Quotas { facts: 14, names: 5, addresses_per_name: 4 };

#[derive(Clone, Debug)]
enum Op {
    Ask {
        scope: u8,
        node: u32,
        name: u8,
        ips: u8,
        ttl: u64,
        least: Option<u64>,
    },
    Pass(u64),
    /// Applies up to so many pushes and acks them.
    Deliver(u32, usize),
    /// Applies one push; the ack comes with a later one.
    Apply(u32),
    Down(u32),
    Up(u32),
    Reset(u32),
    Gone(u32),
    Edit(Option<u8>),
    Idle(u8, u8),
    Left(u8, u32),
    ScopeGone(u8),
    /// Imports the ledger's own export.
    Echo,
}

fn op() -> impl Strategy<Value = Op> {
    let ttl = prop::sample::select(vec![0u64, 1, 20, 60, 300, 7200]);
    let wait = prop::sample::select(vec![0u64, 1, 50, 150, 900, 2_500, 29_999, 61_000, 95_000, 3_700_000, DAY]);
    prop_oneof![
        10 => (0..SCOPES, 0..NODES, 0..NAMES, 1u8.., ttl, prop::option::weighted(0.2, Just(500u64)))
            .prop_map(|(scope, node, name, ips, ttl, least)| Op::Ask { scope, node, name, ips, ttl, least }),
        6 => wait.prop_map(Op::Pass),
        8 => (0..NODES, 1usize..4).prop_map(|(n, k)| Op::Deliver(n, k)),
        1 => (0..NODES).prop_map(Op::Apply),
        1 => (0..NODES).prop_map(Op::Down),
        2 => (0..NODES).prop_map(Op::Up),
        1 => (0..NODES).prop_map(Op::Reset),
        1 => (0..NODES).prop_map(Op::Gone),
        1 => prop::option::of(0..SCOPES).prop_map(Op::Edit),
        4 => (0..SCOPES, 0..IPS).prop_map(|(s, i)| Op::Idle(s, i)),
        1 => (0..SCOPES, 0..NODES).prop_map(|(s, n)| Op::Left(s, n)),
        1 => (0..SCOPES).prop_map(Op::ScopeGone),
        1 => Just(Op::Echo),
    ]
}

fn name(n: u8) -> Name {
    Name::parse(&format!("n{n}.example")).expect("a name")
}

fn ip(i: u8) -> IpAddr {
    if i < 4 { IpAddr::from([203, 0, 113, i]) } else { IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(i)]) }
}

fn scope(s: u8) -> ScopeKey {
    ScopeKey(u128::from(s) << 120 | 5)
}

/// The class says which names it stands for: their bits, and the scope's revision above.
fn class(revision: u64, names: impl Iterator<Item = u8>) -> ClassKey {
    ClassKey(names.fold(u128::from(revision) << 64, |c, n| c | 1 << n))
}

#[derive(Clone, Default)]
struct Rules(Rc<RefCell<BTreeMap<ScopeKey, u64>>>);

impl Classify for Rules {
    fn class(&self, scope: ScopeKey, _: IpAddr, names: &mut dyn Iterator<Item = &Name>) -> ClassKey {
        let bit = |n: &Name| n.as_str().as_bytes()[1] - b'0';
        class(self.0.borrow().get(&scope).copied().unwrap_or_default(), names.map(bit))
    }
}

#[derive(Clone, Copy)]
struct Fact {
    rrset: u64,
    expires: u64,
}

#[derive(Default)]
struct Node {
    up: bool,
    /// Since when it has no stream, in milliseconds.
    down: u64,
    channel: VecDeque<(u64, bool, u64, Vec<FactUpdate>)>,
    kernel: BTreeMap<(ScopeKey, IpAddr), (ClassKey, u64)>,
    applied: u64,
}

impl Node {
    fn apply(&mut self) -> Option<u64> {
        let (seq, snapshot, at, facts) = self.channel.pop_front()?;
        if snapshot {
            self.kernel.clear();
        }
        facts.iter().for_each(|f| write(&mut self.kernel, f, at));
        self.applied = seq;
        Some(seq)
    }
}

fn write(kernel: &mut BTreeMap<(ScopeKey, IpAddr), (ClassKey, u64)>, f: &FactUpdate, at: u64) {
    match f.value {
        Some(v) => drop(kernel.insert((f.scope, f.ip), (v.class, at + v.ttl.as_millis() as u64))),
        None => drop(kernel.remove(&(f.scope, f.ip))),
    }
}

struct Waiting {
    node: u32,
    scope: u8,
    name: u8,
    asked: u64,
    until: u64,
    expected: Vec<IpAddr>,
}

struct World {
    ledger: Ledger<Rules>,
    rules: Rules,
    now: u64,
    facts: BTreeMap<(u8, u8, u8), Fact>,
    nodes: Vec<Node>,
    local: BTreeMap<(ScopeKey, IpAddr), (ClassKey, u64)>,
    asked: BTreeMap<(ScopeKey, IpAddr), u64>,
    waiting: BTreeMap<u64, Waiting>,
    tickets: u64,
    trace: Vec<Output>,
}

impl World {
    fn new(seed: u64) -> Self {
        let rules = Rules::default();
        let config = Config { quotas: QUOTAS, max_unacked: 12, ..Config::default() };
        Self {
            ledger: Ledger::new(config, [seed, 1, 2, 3], rules.clone(), Duration::from_millis(START)),
            rules,
            now: START,
            facts: BTreeMap::new(),
            nodes: (0..NODES).map(|_| Node { down: START, ..Node::default() }).collect(),
            local: BTreeMap::new(),
            asked: BTreeMap::new(),
            waiting: BTreeMap::new(),
            tickets: 0,
            trace: Vec::new(),
        }
    }

    fn steered(&self, node: u32) -> bool {
        let n = &self.nodes[node as usize];
        !n.up && n.down + 2500 <= self.now
    }

    fn owner(s: u8) -> OwnerId {
        OwnerId(u32::from(s % 2))
    }

    /// Feeds one input and checks each output where it can be checked by itself.
    fn feed(&mut self, input: Input) {
        let mut out = Vec::new();
        self.ledger.handle(input, Duration::from_millis(self.now), &mut out);
        self.trace.extend(out.iter().cloned());
        for o in out {
            match o {
                Output::Local(f) => write(&mut self.local, &f, self.now),
                Output::Push { node, seq, snapshot, facts } => {
                    let n = &mut self.nodes[node.0 as usize];
                    assert!(n.up, "a push to a node without stream");
                    n.channel.push_back((seq, snapshot, self.now, facts));
                }
                Output::Release { ticket, addresses } => {
                    let w = self.waiting.remove(&ticket).expect("a ticket is answered once");
                    assert_eq!(addresses, w.expected);
                    assert!(self.now <= w.asked + 200);
                    if self.steered(w.node) {
                        continue;
                    }
                    for a in addresses {
                        // The first packet works: the node's kernel has what it needs, for as long as the reply says.
                        let k = self.nodes[w.node as usize].kernel.get(&(scope(w.scope), a));
                        let (class, until) = *k.expect("released before the kernel had it");
                        assert!(class.0 & (1 << w.name) != 0, "the kernel has an older class");
                        assert!(until >= w.until, "{until} {}", w.until);
                    }
                }
                Output::Fail { ticket, reason } => {
                    let w = self.waiting.remove(&ticket).expect("a ticket is answered once");
                    assert_eq!(reason == Reason::Quota, w.expected.is_empty());
                }
                Output::CheckIdle { scope, ip } => {
                    self.asked.insert((scope, ip), self.now);
                }
                Output::Unbound { scope, ip } => {
                    assert!(!self.local.contains_key(&(scope, ip)));
                    self.asked.remove(&(scope, ip));
                }
            }
        }
    }

    fn usage(&self, owner: OwnerId) -> (usize, usize) {
        let of: Vec<_> = self.facts.keys().filter(|k| Self::owner(k.0) == owner).collect();
        (of.len(), of.iter().map(|k| (k.0, k.1)).collect::<BTreeSet<_>>().len())
    }

    /// Binds in the model as the documentation says; gives what is bound.
    fn learn(&mut self, s: u8, n: u8, ips: &[u8], ttl: u64, least: Option<u64>) -> Vec<IpAddr> {
        let floor = self.now / 100 * 100;
        let rrset = floor + ttl.min(3600) * 1000;
        let expires = floor + (ttl.clamp(30, 3600) + 60).max(least.unwrap_or(0)) * 1000;
        let mut bound = Vec::new();
        for &i in ips {
            if let Some(f) = self.facts.get_mut(&(s, n, i)) {
                if f.expires <= floor || rrset > f.rrset + 1000 {
                    *f = Fact { rrset: rrset.max(f.rrset), expires: expires.max(f.expires) };
                }
            } else {
                let (facts, names) = self.usage(Self::owner(s));
                let of_name = self.facts.range((s, n, 0)..=(s, n, u8::MAX)).count();
                if facts >= QUOTAS.facts as usize
                    || (of_name == 0 && names >= QUOTAS.names as usize)
                    || of_name >= QUOTAS.addresses_per_name as usize
                {
                    continue;
                }
                self.facts.insert((s, n, i), Fact { rrset, expires });
            }
            bound.push(ip(i));
        }
        bound
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Ask { scope: s, node, name: n, ips, ttl, least } => {
                let ips: Vec<u8> = (0..IPS).filter(|i| ips & (1 << i) != 0).collect();
                let expected = self.learn(s, n, &ips, ttl, least);
                self.tickets += 1;
                let until = self.now + ttl.min(3600) * 1000;
                self.waiting
                    .insert(self.tickets, Waiting { node, scope: s, name: n, asked: self.now, until, expected });
                self.feed(Input::Answer(Answer {
                    ticket: self.tickets,
                    scope: scope(s),
                    owner: Self::owner(s),
                    node: NodeId(node),
                    name: name(n),
                    addresses: ips.iter().map(|i| ip(*i)).collect(),
                    ttl: Duration::from_secs(ttl),
                    min_binding: least.map(Duration::from_secs),
                    acked: false,
                }));
            }
            Op::Pass(d) => self.pass(d),
            Op::Deliver(n, count) => {
                let node = &mut self.nodes[n as usize];
                if let Some(seq) = (0..count).map_while(|_| node.apply()).last() {
                    self.feed(Input::Ack { node: NodeId(n), seq });
                }
            }
            Op::Apply(n) => drop(self.nodes[n as usize].apply()),
            Op::Down(n) => {
                let now = self.now;
                let node = &mut self.nodes[n as usize];
                node.channel.clear();
                if node.up {
                    (node.up, node.down) = (false, now);
                }
                self.feed(Input::NodeDown { node: NodeId(n) });
            }
            Op::Up(n) => {
                self.nodes[n as usize].channel.clear();
                self.nodes[n as usize].up = true;
                self.feed(Input::NodeUp { node: NodeId(n) });
            }
            Op::Reset(n) => {
                self.nodes[n as usize] = Node { up: true, ..Node::default() };
                self.feed(Input::NodeReset { node: NodeId(n) });
            }
            Op::Gone(n) => {
                self.nodes[n as usize] = Node { down: START, ..Node::default() };
                self.feed(Input::NodeGone { node: NodeId(n) });
            }
            Op::Edit(s) => {
                for i in (0..SCOPES).filter(|i| s.is_none_or(|s| s == *i)) {
                    *self.rules.0.borrow_mut().entry(scope(i)).or_default() += 1;
                }
                self.feed(Input::Reclassify { scope: s.map(scope) });
            }
            Op::Idle(s, i) => {
                let floor = self.now / 100 * 100;
                self.facts.retain(|k, f| (k.0, k.2) != (s, i) || f.expires > floor);
                self.feed(Input::Idle { scope: scope(s), ip: ip(i) });
            }
            Op::Left(s, n) => {
                // No pod of the scope is left there that could wait for a reply.
                if !self.waiting.values().any(|w| (w.scope, w.node) == (s, n)) {
                    self.feed(Input::ScopeLeft { scope: scope(s), node: NodeId(n) });
                }
            }
            Op::ScopeGone(s) => {
                self.facts.retain(|k, _| k.0 != s);
                self.feed(Input::ScopeGone { scope: scope(s) });
                assert!(!self.waiting.values().any(|w| w.scope == s));
            }
            Op::Echo => {
                let mut records = Vec::new();
                self.ledger.export(Duration::from_millis(self.now), |r| records.push(r));
                // A node that is gone stays gone, others have the facts already.
                records.iter_mut().for_each(|r| r.nodes.clear());
                assert_eq!(records.len(), self.facts.len());
                let before = self.local.clone();
                self.feed(Input::Import(records));
                assert_eq!(before.len(), self.local.len());
            }
        }
        self.check();
    }

    /// Lets time pass, stopping at every deadline.
    fn pass(&mut self, d: u64) {
        let end = self.now + d;
        loop {
            let due = self.ledger.next_deadline().map(|t| t.as_nanos().div_ceil(1_000_000) as u64);
            self.now = due.filter(|t| *t < end).unwrap_or(end).max(self.now);
            let floor = self.now / 100 * 100;
            self.facts.retain(|_, f| f.expires + DAY > floor);
            self.feed(Input::Tick);
            if self.now == end {
                return;
            }
        }
    }

    fn check(&self) {
        let now = Duration::from_millis(self.now);
        let floor = self.now / 100 * 100;
        let b = self.ledger.bindings();
        // The gateway's own kernel says what the facts say.
        let mut entries: BTreeMap<(ScopeKey, IpAddr), (BTreeSet<u8>, u64)> = BTreeMap::new();
        for ((s, n, i), f) in &self.facts {
            let e = entries.entry((scope(*s), ip(*i))).or_default();
            e.0.insert(*n);
            e.1 = e.1.max(f.expires);
            if f.expires <= floor {
                let asked = self.asked.get(&(scope(*s), ip(*i)));
                assert!(asked.is_some_and(|a| *a >= f.expires), "nobody asked about an expired fact");
            }
        }
        assert_eq!(entries.len(), self.local.len());
        for ((s, i), (names, expires)) in &entries {
            let revision = self.rules.0.borrow().get(s).copied().unwrap_or_default();
            let wanted = class(revision, names.iter().copied());
            let (class, until) = self.local[&(*s, *i)];
            assert_eq!(class, wanted);
            assert!(until == *expires || (*expires <= until && until <= self.now), "{until} {expires} {}", self.now);
            assert_eq!(b.class_of(*s, *i), Some(wanted));
            let seen: BTreeSet<Name> = b.names_of(*s, *i).into_iter().map(|(n, _)| n).collect();
            assert_eq!(seen, names.iter().map(|n| name(*n)).collect());
            for (k, node) in self.nodes.iter().enumerate() {
                let k = NodeId(k as u32);
                // Nothing stands that the node's kernel does not have.
                for ahead in [1, 20_000, 110_000, 3_600_000] {
                    let until = self.now + ahead;
                    if b.standing(*s, *i, k, Duration::from_millis(until)) {
                        let (class, has) = node.kernel.get(&(*s, *i)).expect("stands without entry");
                        assert!(*class == wanted && *has >= until);
                    }
                }
                assert!(!b.is_steered(k) || self.steered(k.0));
            }
        }
        for (s, n, i) in (0..SCOPES).flat_map(|s| (0..NAMES).flat_map(move |n| (0..IPS).map(move |i| (s, n, i)))) {
            let wanted = match self.facts.get(&(s, n, i)) {
                None => Bound::No,
                Some(f) if f.expires <= floor => Bound::Expired,
                Some(_) => Bound::Bound,
            };
            assert_eq!(b.is_bound(scope(s), name(n).as_str(), ip(i), now), wanted);
            assert_eq!(b.addresses_of(scope(s), name(n).as_str(), now).contains(&ip(i)), wanted == Bound::Bound);
        }
        let c = self.ledger.counts();
        assert_eq!((c.facts, c.addresses, c.waiting), (self.facts.len(), entries.len(), self.waiting.len()));
        for o in [OwnerId(0), OwnerId(1)] {
            let u = self.ledger.usage(o);
            assert_eq!((u.facts as usize, u.names as usize), self.usage(o));
        }
    }

    /// Everything is delivered: nodes have nothing that the gateway has not, and nothing for longer.
    fn settle(&mut self) {
        for n in 0..NODES {
            if !self.nodes[n as usize].up {
                self.step(Op::Up(n));
            }
            self.feed(Input::Ack { node: NodeId(n), seq: self.nodes[n as usize].applied });
            while !self.nodes[n as usize].channel.is_empty() {
                self.step(Op::Deliver(n, usize::MAX));
            }
        }
        assert!(self.waiting.is_empty(), "everything is acked");
        assert_eq!(self.ledger.counts().held, self.nodes.iter().map(|n| n.kernel.len()).sum::<usize>());
        for node in &self.nodes {
            for (k, (class, until)) in &node.kernel {
                let (local, expires) = self.local.get(k).expect("a node has what the gateway deleted");
                assert!(class == local && (until + 10_000 <= *expires || *until <= self.now));
            }
        }
    }

    /// Everything expires and is idle: nothing is left anywhere.
    fn end(&mut self) {
        self.settle();
        self.pass(2 * 3600 * 1000);
        for (s, i) in (0..SCOPES).flat_map(|s| (0..IPS).map(move |i| (s, i))) {
            self.step(Op::Idle(s, i));
        }
        self.settle();
        assert!(self.facts.is_empty() && self.local.is_empty());
        assert!(self.nodes.iter().all(|n| n.kernel.is_empty()));
        self.pass(2 * DAY);
        let c = self.ledger.counts();
        assert_eq!((c.scopes, c.names, c.addresses, c.facts), (0, 0, 0, 0));
        assert_eq!((c.waiting, c.timers, c.held), (0, 0, 0));
        assert_eq!(self.ledger.next_deadline(), None);
    }
}

fn run(ops: &[Op], seed: u64) -> Vec<Output> {
    let mut w = World::new(seed);
    ops.iter().for_each(|op| w.step(op.clone()));
    w.end();
    w.trace
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_ledger_keeps_its_promises(ops in prop::collection::vec(op(), 1..80)) {
        // Hash keys change nothing that can be seen.
        assert_eq!(run(&ops, 1), run(&ops, 2));
    }
}
