//! The core's part in what an API server knows: who the gateways are, and who owns what.

use std::collections::BTreeMap;

use tidegate_kubernetes::members::Member;
use tidegate_kubernetes::pools::{Address, Command, Event, Owner, Record, Used, Write};
use tidegate_policy::world::World;
use tidegate_proto::Pair;

use super::Run;
use super::failover::candidates;
use crate::desired::Desired;
use crate::members::Members;
use crate::ownership::{Known, Listed};

impl Run {
    /// Gateways came or went.
    pub(super) fn members(&mut self, listed: Vec<Member>) {
        let now = self.core.shared.now();
        let (desired, ownership) = (&self.core.desired, &mut self.core.ownership);
        ownership.set_peers(listed.iter().map(|m| Listed { name: m.name.clone(), terminating: m.terminating }), now);
        // What such a one holds nodes still have to find.
        let gone = |m: &&Member| listed.iter().all(|l| l.name != m.name) && ownership.is_peer(&m.name);
        let lingering = desired.members().all().filter(gone).cloned().collect();
        tracing::info!(gateways = ?listed.iter().map(|m| &m.name).collect::<Vec<_>>(), "gateways");
        desired.set_members(Members { listed, lingering });
        ownership.set_pairs(candidates(desired.pairs(&self.compiled)));
        if self.settled {
            let moved = self.tick(now);
            self.follow_owners(moved);
            self.send_states();
        } else {
            self.set_claims();
        }
        self.decide();
    }

    /// The API server said something of owners.
    pub(super) fn api(&mut self, event: Event) {
        let now = self.core.shared.now();
        match event {
            Event::Answered => self.core.ownership.api_answered(now),
            Event::Pool { name, records, deleted } => {
                let known =
                    |r: Record| (pair(&name, r.address), Known { owner: r.owner.gateway, epoch: r.owner.epoch });
                let records: Option<Vec<_>> = records.map(|all| all.into_iter().map(known).collect());
                self.core.ownership.set_records(&name, records.as_deref(), now);
                let changed = if deleted { self.deleted.insert(name) } else { self.deleted.remove(&name) };
                // A claim that was waited for is served at once.
                self.decide();
                if changed {
                    self.set_claims();
                }
            }
        }
    }

    /// Has claims written that are to be.
    pub(super) fn write(&mut self) {
        let writes = self.core.ownership.writes();
        let Some(api) = &self.core.api else { return };
        let owner = |k: Known| Owner { gateway: k.owner, epoch: k.epoch };
        for w in writes {
            let address = Address { ipv4: w.pair.ipv4, ipv6: w.pair.ipv6 };
            let write = Write { pool: w.pair.pool, address, claim: owner(w.claim), over: w.over.map(owner) };
            // What does not fit is not waited for, and asked for again.
            if api.try_send(Command::Write(write)).is_err() {
                tracing::warn!("too much waits for the API server: an owner is not recorded now");
            }
        }
    }

    /// Says which pools are in use, if that has changed.
    pub(super) fn record(&mut self) {
        let Some(api) = &self.core.api else { return };
        let used = Some(used(&self.compiled.world));
        if used != self.used && used.iter().all(|u| api.try_send(Command::Used(u.clone())).is_ok()) {
            self.used = used;
        }
    }

    /// What is wrong with ownership now.
    pub(super) fn problems(&self) -> Vec<String> {
        let silent = self.core.ownership.api_silent(self.core.shared.now());
        let outage =
            "the API server does not answer: egress pairs go by the gateways' own word, and are recorded later";
        self.problems.iter().cloned().chain(silent.then(|| outage.to_owned())).collect()
    }

    /// Notes what people should know: pairs that no gateway may hold, and pools that are deleted and in use.
    pub(super) fn note_problems(&mut self, nobody: &[Pair]) {
        let held = nobody.iter().map(|p| match self.core.ownership.owner(p) {
            Some(k) => format!(
                "EgressPool {}: no gateway can hold {p}: none runs on a node that gatewayNodeSelector takes; {} keeps it \
                 until one does",
                p.pool, k.owner
            ),
            None => {
                format!("EgressPool {}: no gateway can hold {p}: none runs on a node that gatewayNodeSelector takes", p.pool)
            }
        });
        let in_use = |name: &&String| self.compiled.world.ways().any(|(s, _)| **s.pool() == **name);
        let deleted = self.deleted.iter().filter(in_use).map(|name| {
            format!("EgressPool {name}: it is deleted and still used; it serves on, and goes when no namespace uses it")
        });
        let problems: Vec<String> = held.chain(deleted).collect();
        for p in problems.iter().filter(|p| !self.problems.contains(p)) {
            tracing::warn!("{p}");
        }
        self.problems = problems;
    }
}

fn pair(pool: &str, a: Address) -> Pair {
    Pair { pool: pool.to_owned(), ipv4: a.ipv4, ipv6: a.ipv6 }
}

/// The pools in use, with their pairs and how many namespaces leave with each.
fn used(world: &World) -> Used {
    let mut out = Used::new();
    for (scope, namespaces) in world.ways() {
        let pairs: &mut BTreeMap<Address, u32> = out.entry(scope.pool().to_string()).or_default();
        if let Some(p) = Desired::pair(scope) {
            *pairs.entry(Address { ipv4: p.ipv4, ipv6: p.ipv6 }).or_default() += namespaces;
        }
    }
    out
}
