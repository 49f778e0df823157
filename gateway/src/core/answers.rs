//! What answers wait for, and what follows from what the ledger hears.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use tidegate_ledger::{Answer, Input, Output};
use tidegate_policy::{Reason, ScopeKey};

use super::{Bind, Run, Waiting, pushes};
use crate::telemetry::BARRIER_SECONDS;

impl Run {
    pub(super) fn bind(&mut self, b: Bind) {
        if self.core.shared.settling.has(b.node, b.pod) {
            self.late.push((self.core.shared.now() + self.core.ledger.barrier(), b));
        } else {
            self.bind_settled(b);
        }
    }

    /// Goes on with the answers to pods that have settled, and ends those that waited too long.
    pub(super) fn hear_late(&mut self, now: Duration) {
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
        let node = self.core.shared.nodes.name(b.node.0);
        if node.is_none_or(|node| !self.placement.has(b.scope, &node)) {
            // An edit came between: neither the scope nor what its last pod's node knew must come back to life by an answer.
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
            acked: b.acked,
        }));
    }

    /// The ledger hears something.
    pub(super) fn hear(&mut self, input: Input) {
        self.core.ledger.handle(input, self.core.shared.now(), &mut self.out);
    }

    /// The ledger hears something, and what follows is carried out.
    pub(super) fn feed(&mut self, input: Input) {
        self.hear(input);
        self.carry_out();
    }

    /// Carries out what the ledger asked for: first our own kernel, then the nodes, then the answers.
    pub(super) fn carry_out(&mut self) {
        let mut out = std::mem::take(&mut self.out);
        let (updates, pushes) = pushes::take(&mut out);
        if !updates.is_empty() {
            self.local(&updates);
        }
        for (node, push) in pushes {
            self.push(node, push);
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
}
