//! A node's agent without its kernel: the real merge and bookkeeping of facts over maps in memory.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use prost::Message;
use tidegate_agent::merge::{Model, Source, Update, merge};
use tidegate_policy::state::NodeState;
use tidegate_proto::{FactsBatch, Joiner, StateBatch, wire};

use crate::gateway;
use crate::kernel::Kernel;
use crate::told::Told;

/// The node.
pub struct Node {
    /// Its name.
    pub name: &'static str,
    /// Identifies the agent's present run.
    pub agent: u64,
    /// Its kernel, which outlives the agent.
    pub kernel: Kernel<false>,
    model: Model,
    told: Told,
    merged: NodeState,
    ready: bool,
    state: Joiner<StateBatch>,
    facts: Joiner<FactsBatch>,
    /// What it has applied of the `Facts` stream: the gateway's boot and the sequence.
    pub applied: Option<(u64, u64)>,
    /// What it has applied of the `State` stream.
    pub state_applied: Option<(u64, u64)>,
}

impl Node {
    /// A node that has just booted.
    pub fn new(name: &'static str, now: Duration) -> Self {
        Self {
            name,
            agent: 1,
            kernel: Kernel::new(now),
            model: Model::default(),
            told: Told::default(),
            merged: NodeState::default(),
            ready: false,
            state: Joiner::default(),
            facts: Joiner::default(),
            applied: None,
            state_applied: None,
        }
    }

    /// The agent ends and another one starts; the kernel keeps what it holds unless the machine `reboots`.
    pub fn restart(&mut self, reboots: bool) {
        let kernel = std::mem::take(&mut self.kernel);
        let now = kernel.now;
        *self = Self { agent: self.agent + 1, kernel, ..Self::new(self.name, now) };
        if reboots {
            self.kernel = Kernel::new(now);
        }
    }

    /// The `State` stream is gone.
    pub fn state_away(&mut self) {
        self.model.away();
        self.state = Joiner::default();
        self.state_applied = None;
    }

    /// The `Facts` stream is gone.
    pub fn facts_away(&mut self) {
        self.facts = Joiner::default();
        self.applied = None;
    }

    /// Pods came or went: the agent sees their interfaces, and pods whose state it has not heard of keep none.
    pub fn moved(&mut self, local: &BTreeSet<IpAddr>) {
        if self.ready {
            self.kernel.apply(&self.merged, self.name, local);
        }
    }

    fn merge(&mut self, local: &BTreeSet<IpAddr>) {
        let sources = [Source { name: gateway::NAME, live: self.model.live(), state: self.model.state() }];
        self.merged = if self.model.known() { merge(&sources) } else { merge(&[]) };
        self.kernel.apply(&self.merged, self.name, local);
    }

    /// Takes a message of the `State` stream. `local`: the addresses of the pods that are here.
    pub fn take_state(&mut self, message: &[u8], local: &BTreeSet<IpAddr>) {
        let message = wire::StateUpdate::decode(message).expect("what a gateway sends can be decoded");
        let part = StateBatch::try_from(message).expect("what a gateway sends is accepted");
        let Some(b) = self.state.push(part).expect("parts come in order") else { return };
        let update =
            Update { boot: b.boot_id, sequence: b.sequence, snapshot: b.snapshot, set: b.set, delete: b.delete };
        self.model.update(update, self.kernel.now).expect("updates come in order");
        self.state_applied = Some((b.boot_id, b.sequence));
        self.ready = true;
        self.merge(local);
    }

    /// Takes a message of the `Facts` stream.
    pub fn take_facts(&mut self, message: &[u8], local: &BTreeSet<IpAddr>) {
        self.kernel.heartbeat(gateway::NAME);
        let message = wire::FactsUpdate::decode(message).expect("what a gateway sends can be decoded");
        let part = FactsBatch::try_from(message).expect("what a gateway sends is accepted");
        let Some(mut b) = self.facts.push(part).expect("parts come in order") else { return };
        let applied = (b.boot_id, b.sequence);
        let grants = std::mem::take(&mut b.grants).into_iter().map(|g| (g.group, g.class, g.ports)).collect();
        if self.model.grants(b.boot_id, grants, self.kernel.now) && self.ready {
            self.merge(local);
        }
        let updates = self.told.take(0, b, self.kernel.now, |_| Some(0));
        self.kernel.facts(&updates);
        self.applied = Some(applied);
    }
}
