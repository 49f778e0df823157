//! One test per rule of the ledger.

mod barrier;
mod facts;
mod nodes;

use std::cell::Cell;
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use tidegate_policy::key::KeyHasher;
use tidegate_policy::state::FactUpdate;
use tidegate_policy::{ClassKey, Name, ScopeKey};

use crate::{Answer, Bindings, Classify, Config, Input, Ledger, NodeId, Output, OwnerId};

pub(crate) const SCOPE: ScopeKey = ScopeKey(7);
pub(crate) const OWNER: OwnerId = OwnerId(1);
pub(crate) const NODE: NodeId = NodeId(1);
pub(crate) const OTHER: NodeId = NodeId(2);

/// The class is a hash of the names and of a revision that stands for the policy.
#[derive(Clone, Default)]
pub(crate) struct Rules(pub Rc<Cell<u64>>);

impl Rules {
    pub fn of(&self, names: &[&str]) -> ClassKey {
        let mut names = names.to_vec();
        names.sort_unstable();
        let start = KeyHasher::new("class").field(&self.0.get().to_be_bytes());
        ClassKey(names.iter().fold(start, |h, n| h.field(n.as_bytes())).finish())
    }
}

impl Classify for Rules {
    fn class(&self, _: ScopeKey, _: IpAddr, names: &mut dyn Iterator<Item = &Name>) -> ClassKey {
        self.of(&names.map(Name::as_str).collect::<Vec<_>>())
    }
}

pub(crate) struct Sim {
    pub ledger: Ledger<Rules>,
    pub rules: Rules,
    pub now: Duration,
    tickets: u64,
}

pub(crate) fn secs(s: u64) -> Duration {
    Duration::from_secs(s)
}

pub(crate) fn ms(m: u64) -> Duration {
    Duration::from_millis(m)
}

pub(crate) fn name(n: &str) -> Name {
    Name::parse(n).expect("a name")
}

pub(crate) fn ip(n: u8) -> IpAddr {
    IpAddr::from([203, 0, 113, n])
}

impl Sim {
    /// A ledger at 1000 s since boot that knows no node.
    pub fn bare(config: Config) -> Self {
        let rules = Rules::default();
        let now = secs(1000);
        Self { ledger: Ledger::new(config, [1, 2, 3, 4], rules.clone(), now), rules, now, tickets: 0 }
    }

    /// The same with `NODE` and `OTHER` up and their empty snapshots acked.
    pub fn with(config: Config) -> Self {
        let mut s = Self::bare(config);
        for node in [NODE, OTHER] {
            s.input(Input::NodeReset { node });
            s.input(Input::Ack { node, seq: 1 });
        }
        s
    }

    pub fn new() -> Self {
        Self::with(Config::default())
    }

    pub fn input(&mut self, input: Input) -> Vec<Output> {
        let mut out = Vec::new();
        self.ledger.handle(input, self.now, &mut out);
        out
    }

    /// Lets time pass, timer by timer.
    pub fn pass(&mut self, d: Duration) -> Vec<Output> {
        let end = self.now + d;
        let mut out = Vec::new();
        while let Some(due) = self.ledger.next_deadline().filter(|t| *t <= end) {
            self.now = self.now.max(due);
            self.ledger.handle(Input::Tick, self.now, &mut out);
        }
        self.now = end;
        self.ledger.handle(Input::Tick, self.now, &mut out);
        out
    }

    pub fn ask(&mut self, node: NodeId, n: &str, ips: &[u8], ttl: u64) -> (u64, Vec<Output>) {
        self.ask_for(SCOPE, node, n, ips, secs(ttl), None)
    }

    pub fn ask_for(
        &mut self,
        scope: ScopeKey,
        node: NodeId,
        n: &str,
        ips: &[u8],
        ttl: Duration,
        min_binding: Option<Duration>,
    ) -> (u64, Vec<Output>) {
        self.tickets += 1;
        let answer = Answer {
            ticket: self.tickets,
            scope,
            owner: OWNER,
            node,
            name: name(n),
            addresses: ips.iter().map(|i| ip(*i)).collect(),
            ttl,
            min_binding,
            acked: false,
        };
        (self.tickets, self.input(Input::Answer(answer)))
    }

    /// Asks and acks.
    pub fn learn(&mut self, node: NodeId, n: &str, ips: &[u8], ttl: u64) {
        let (_, out) = self.ask(node, n, ips, ttl);
        self.ack(node, &out);
    }

    /// Acks the last push to a node in `out`.
    pub fn ack(&mut self, node: NodeId, out: &[Output]) -> Vec<Output> {
        match pushes(out, node).last() {
            Some((seq, _)) => self.input(Input::Ack { node, seq: *seq }),
            None => Vec::new(),
        }
    }

    pub fn bindings(&self) -> std::sync::Arc<Bindings> {
        self.ledger.bindings()
    }
}

pub(crate) fn pushes(out: &[Output], to: NodeId) -> Vec<(u64, Vec<FactUpdate>)> {
    let push = |o: &Output| match o {
        Output::Push { node, seq, facts, .. } if *node == to => Some((*seq, facts.clone())),
        _ => None,
    };
    out.iter().filter_map(push).collect()
}

pub(crate) fn locals(out: &[Output]) -> Vec<FactUpdate> {
    let local = |o: &Output| match o {
        Output::Local(f) => Some(f.clone()),
        _ => None,
    };
    out.iter().filter_map(local).collect()
}

pub(crate) fn released(out: &[Output], id: u64) -> Option<Vec<IpAddr>> {
    out.iter().find_map(|o| match o {
        Output::Release { ticket, addresses } if *ticket == id => Some(addresses.clone()),
        _ => None,
    })
}

#[test]
fn readers_and_the_ledger_may_be_on_different_threads() {
    fn shared<T: Send + Sync>() {}
    fn moved<T: Send>() {}
    shared::<Bindings>();
    moved::<Ledger<std::sync::Arc<dyn Classify + Send + Sync>>>();
}
