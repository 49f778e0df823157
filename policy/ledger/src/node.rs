//! Nodes: what was pushed to them, what they acked, and which replies wait for them.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use tidegate_policy::state::{FactUpdate, FactValue};
use tidegate_policy::{Reason, ScopeKey};

use crate::ledger::Ledger;
use crate::table::pack;
use crate::tick::Tick;
use crate::{Classify, NodeId, Output};

/// A push without ack: its sequence and the addresses that it confirms.
#[derive(Debug)]
struct Sent {
    seq: u64,
    /// Scope number and packed address.
    entries: Vec<(u32, [u8; 16])>,
    snapshot: bool,
}

/// What is known of a node.
#[derive(Debug, Default)]
pub(crate) struct Node {
    up: bool,
    /// Down for so long that its kernel steers what it does not know.
    pub steered: bool,
    /// It left so much without ack that it gets a snapshot next.
    behind: bool,
    last_seq: u64,
    acked: u64,
    sent: VecDeque<Sent>,
    unacked: usize,
    /// Replies in the order of the sequence that they wait for.
    waiting: VecDeque<(u64, u64)>,
    /// How many addresses of which scopes it holds.
    scopes: BTreeMap<u32, u32>,
    /// What it holds and nobody told this ledger of.
    orphans: Vec<(ScopeKey, [u8; 16])>,
}

impl Node {
    fn writable(&self) -> bool {
        self.up && !self.behind
    }

    /// How many addresses it holds.
    pub fn held(&self) -> usize {
        self.scopes.values().map(|n| *n as usize).sum()
    }

    /// It holds one more address of a scope.
    pub fn hold(&mut self, scope: u32) {
        *self.scopes.entry(scope).or_default() += 1;
    }

    /// It holds one address of a scope less.
    pub fn release(&mut self, scope: u32) {
        if let Some(n) = self.scopes.get_mut(&scope) {
            *n -= 1;
            if *n == 0 {
                self.scopes.remove(&scope);
            }
        }
    }
}

/// A reply that waits.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub node: NodeId,
    pub scope: u32,
    pub deadline: Duration,
    pub addresses: Vec<IpAddr>,
    /// It needs the node's ack in any case.
    pub acked: bool,
}

impl<C: Classify> Ledger<C> {
    /// The node, known from now on. One that never had a stream counts as down since the ledger began.
    pub(crate) fn node(&mut self, id: NodeId) -> &mut Node {
        self.nodes.entry(id).or_insert_with(|| {
            let due = self.started + self.config.steer_after;
            let steered = due <= self.now;
            if steered {
                self.bindings.set_steered(id, true);
            } else {
                self.falls.insert((due, id));
            }
            Node { steered, ..Node::default() }
        })
    }

    /// Adds a fact to what this call pushes to a node; gives the push's sequence, if the node takes pushes now.
    pub(crate) fn queue(&mut self, node: NodeId, update: FactUpdate) -> Option<u64> {
        let n = self.nodes.get(&node).filter(|n| n.writable())?;
        self.queued.entry(node).or_default().push(update);
        Some(n.last_seq + 1)
    }

    /// Emits what was queued, one push per node.
    pub(crate) fn flush(&mut self, out: &mut Vec<Output>) {
        for (node, facts) in std::mem::take(&mut self.queued) {
            let Some(n) = self.nodes.get_mut(&node) else { continue };
            n.last_seq += 1;
            let entry = |u: &FactUpdate| {
                u.value?;
                Some((*self.numbers.get(&u.scope)?, pack(u.ip)))
            };
            let entries: Vec<_> = facts.iter().filter_map(entry).collect();
            n.unacked += entries.len();
            n.behind = n.unacked > self.config.max_unacked;
            n.sent.push_back(Sent { seq: n.last_seq, entries, snapshot: false });
            out.push(Output::Push { node, seq: n.last_seq, snapshot: false, facts });
        }
    }

    pub(crate) fn node_up(&mut self, id: NodeId, keeps: bool, out: &mut Vec<Output>) {
        self.node(id);
        self.forget_orphans(id);
        self.falls.retain(|(_, n)| *n != id);
        self.bindings.set_steered(id, false);
        let Some(n) = self.nodes.get_mut(&id) else { return };
        (n.up, n.steered) = (true, false);
        self.snapshot(id, keeps, out);
    }

    pub(crate) fn node_down(&mut self, id: NodeId) {
        let due = self.now + self.config.steer_after;
        let Some(n) = self.nodes.get_mut(&id).filter(|n| n.up) else {
            return;
        };
        n.up = false;
        self.queued.remove(&id);
        self.falls.insert((due, id));
        self.forget_orphans(id);
    }

    pub(crate) fn node_gone(&mut self, id: NodeId, out: &mut Vec<Output>) {
        self.falls.retain(|(_, n)| *n != id);
        self.bindings.set_steered(id, false);
        self.queued.remove(&id);
        self.forget_orphans(id);
        let Some(gone) = self.nodes.remove(&id) else { return };
        for (_, ticket) in gone.waiting {
            if self.tickets.remove(&ticket).is_some() {
                out.push(Output::Fail { ticket, reason: Reason::BarrierTimeout });
            }
        }
        for &number in gone.scopes.keys() {
            self.strip(number, id);
        }
    }

    /// The node's kernel steers from now on: most replies need no ack any more, and the others will not get it.
    pub(crate) fn node_fell(&mut self, id: NodeId, out: &mut Vec<Output>) {
        let Some(n) = self.nodes.get_mut(&id) else { return };
        n.steered = true;
        self.bindings.set_steered(id, true);
        for (_, ticket) in std::mem::take(&mut n.waiting) {
            if self.tickets.get(&ticket).is_some_and(|t| t.acked) {
                self.tickets.remove(&ticket);
                out.push(Output::Fail { ticket, reason: Reason::BarrierTimeout });
            } else {
                self.release(ticket, out);
            }
        }
    }

    /// The node holds these and nobody told it that this ledger knows of: from now on it is told what becomes of them.
    pub(crate) fn adopt(&mut self, id: NodeId, facts: Vec<(ScopeKey, IpAddr)>, out: &mut Vec<Output>) {
        self.forget_orphans(id);
        let Some(n) = self.nodes.get_mut(&id).filter(|n| n.up) else { return };
        n.orphans = facts.into_iter().map(|(scope, ip)| (scope, pack(ip))).collect();
        let orphans = n.orphans.clone();
        for key in &orphans {
            let nodes = self.orphans.entry(*key).or_default();
            if !nodes.contains(&id) {
                nodes.push(id);
            }
        }
        for (scope, ip) in orphans {
            let Some(&number) = self.numbers.get(&scope) else { continue };
            let hash = &self.bindings.hash;
            let known = self.scopes.get(&number).and_then(|s| s.table.read().find_ip(hash, ip));
            if let Some(index) = known {
                self.settle(number, index, &[], false, false, out);
            }
        }
    }

    fn forget_orphans(&mut self, id: NodeId) {
        let Some(n) = self.nodes.get_mut(&id) else { return };
        for key in std::mem::take(&mut n.orphans) {
            if let Some(nodes) = self.orphans.get_mut(&key) {
                nodes.retain(|n| *n != id);
                if nodes.is_empty() {
                    self.orphans.remove(&key);
                }
            }
        }
    }

    /// Replaces all that the node has. `keeps`: its kernel still has what it acked.
    fn snapshot(&mut self, id: NodeId, keeps: bool, out: &mut Vec<Output>) {
        self.queued.remove(&id);
        let Some(n) = self.nodes.get_mut(&id) else { return };
        n.last_seq += 1;
        n.behind = false;
        n.unacked = 0;
        n.sent.clear();
        let seq = n.last_seq;
        n.waiting.iter_mut().for_each(|(s, _)| *s = seq);
        let mut facts = Vec::new();
        let mut entries = Vec::new();
        for &number in n.scopes.keys() {
            let Some(scope) = self.scopes.get(&number) else {
                continue;
            };
            let mut t = scope.table.write();
            for i in 0..t.end() {
                let Some(a) = t.address_mut(i) else { continue };
                let (ip, class) = (a.ip(), a.class());
                let kernel = a.expires().minus(self.config.hello_timeout);
                let Some(h) = a.holder_mut(id) else { continue };
                (h.sent, h.seq) = (kernel, seq as u32);
                if !keeps {
                    h.confirmed = Tick::ZERO;
                }
                let value = Some(FactValue { class, ttl: kernel.left(self.now) });
                facts.push(FactUpdate { scope: scope.key, ip, value });
                entries.push((number, pack(ip)));
            }
        }
        n.sent.push_back(Sent { seq, entries, snapshot: true });
        out.push(Output::Push { node: id, seq, snapshot: true, facts });
    }

    pub(crate) fn ack(&mut self, id: NodeId, seq: u64, out: &mut Vec<Output>) {
        let Some(n) = self.nodes.get_mut(&id).filter(|n| seq > n.acked && seq <= n.last_seq) else {
            return;
        };
        n.acked = seq;
        while let Some(sent) = n.sent.pop_front_if(|s| s.seq <= seq) {
            if !sent.snapshot {
                n.unacked -= sent.entries.len();
            }
            // Entries of one scope follow each other: one lock for each run of them.
            for run in sent.entries.chunk_by(|a, b| a.0 == b.0) {
                let Some(scope) = run.first().and_then(|(number, _)| self.scopes.get(number)) else {
                    continue;
                };
                let mut t = scope.table.write();
                for (_, ip) in run {
                    let Some(i) = t.find_ip(&self.bindings.hash, *ip) else {
                        continue;
                    };
                    let holder = t.address_mut(i).and_then(|a| a.holder_mut(id));
                    if let Some(h) = holder.filter(|h| h.seq == sent.seq as u32) {
                        h.confirmed = h.sent;
                    }
                }
            }
        }
        let catch_up = n.up && n.behind && n.sent.is_empty();
        let mut ready = Vec::new();
        while let Some((_, ticket)) = n.waiting.pop_front_if(|(s, _)| *s <= seq) {
            ready.push(ticket);
        }
        for ticket in ready {
            self.release(ticket, out);
        }
        if catch_up {
            self.snapshot(id, true, out);
        }
    }

    fn release(&mut self, ticket: u64, out: &mut Vec<Output>) {
        if let Some(t) = self.tickets.remove(&ticket) {
            out.push(Output::Release { ticket, addresses: t.addresses });
        }
        // Deadlines of replies that went out are of no use, at least not in front.
        let waits = |(due, id): &(Duration, u64)| self.tickets.get(id).is_some_and(|t| t.deadline == *due);
        while self.deadlines.pop_front_if(|d| !waits(d)).is_some() {}
    }

    /// Lets a reply wait for the node's next ack, or releases it if there is nothing to wait for.
    pub(crate) fn wait(&mut self, (id, ticket): (u64, Ticket), out: &mut Vec<Output>) {
        let queued = self.queued.contains_key(&ticket.node);
        let full = self.tickets.len() >= self.config.max_waiting;
        let n = self.node(ticket.node);
        // What a node cannot take now is in the snapshot that it gets next.
        let seq = if queued || !n.writable() { n.last_seq + 1 } else { n.last_seq };
        if n.acked >= seq || (n.steered && !ticket.acked) {
            out.push(Output::Release { ticket: id, addresses: ticket.addresses });
        } else if full || n.steered {
            out.push(Output::Fail { ticket: id, reason: Reason::BarrierTimeout });
        } else {
            n.waiting.push_back((seq, id));
            self.deadlines.push_back((ticket.deadline, id));
            self.tickets.insert(id, ticket);
        }
    }

    /// A reply's time is over, unless it went out or the ticket is another by now.
    pub(crate) fn time_out(&mut self, id: u64, due: Duration, out: &mut Vec<Output>) {
        if self.tickets.get(&id).is_none_or(|t| t.deadline != due) {
            return;
        }
        let Some(ticket) = self.tickets.remove(&id) else { return };
        out.push(Output::Fail { ticket: id, reason: Reason::BarrierTimeout });
        // Replies of a node time out in the order in which they wait, so that none is left behind.
        if let Some(n) = self.nodes.get_mut(&ticket.node) {
            while n.waiting.pop_front_if(|(_, t)| !self.tickets.contains_key(t)).is_some() {}
        }
    }

    pub(crate) fn scope_left(&mut self, key: ScopeKey, node: NodeId) {
        let Some(&number) = self.numbers.get(&key) else { return };
        if self.nodes.get_mut(&node).and_then(|n| n.scopes.remove(&number)).is_none() {
            return;
        }
        for ip in self.strip(number, node) {
            self.queue(node, FactUpdate { scope: key, ip, value: None });
        }
    }

    /// Removes the node from the holders of a scope's addresses; gives those that it held.
    fn strip(&mut self, number: u32, node: NodeId) -> Vec<IpAddr> {
        let Some(scope) = self.scopes.get(&number) else {
            return Vec::new();
        };
        let mut t = scope.table.write();
        let mut held = Vec::new();
        for i in 0..t.end() {
            let Some(a) = t.address_mut(i).filter(|a| a.holder(node).is_some()) else {
                continue;
            };
            a.holders.retain(|h| h.node != node);
            held.push(a.ip());
        }
        held
    }
}
