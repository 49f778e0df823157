//! How facts begin: answers and imports.

use std::net::IpAddr;
use std::time::Duration;

use smallvec::SmallVec;
use tidegate_policy::{Name, Reason};

use crate::ledger::Ledger;
use crate::node::Ticket;
use crate::table::{Fact, pack, unpack};
use crate::tick::Tick;
use crate::{Answer, Classify, FactRecord, MAX_BINDING, NodeId, Output};

/// TTLs are whole seconds: an end that is later by less than this is the same RRset, counted down.
const SAME_RRSET: Duration = Duration::from_secs(1);

/// What binding an address changed.
#[derive(Clone, Copy)]
struct Change {
    index: u32,
    /// The fact is new, so the class may be another.
    new: bool,
    /// The fact holds longer than before.
    extended: bool,
}

impl<C: Classify> Ledger<C> {
    pub(crate) fn answer(&mut self, answer: Answer, out: &mut Vec<Output>) {
        let Answer { ticket, scope, owner, node, name, addresses, ttl, min_binding, acked } = answer;
        if addresses.is_empty() {
            out.push(Output::Release { ticket, addresses });
            return;
        }
        let now = self.tick();
        let number = self.number(scope, owner);
        if self.is_outdated(number) {
            self.reclassify(number, out);
        }
        let rrset = now.plus(ttl.min(self.config.ttl_max));
        let life = ttl.clamp(self.config.ttl_min, self.config.ttl_max) + self.config.grace;
        let expires = now.plus(life.max(min_binding.unwrap_or_default()).min(MAX_BINDING));
        let refresh = |f: &Fact| {
            // A cached RRset that is answered again ends when it ended before: it extends nothing.
            if f.expires <= now || rrset > f.rrset.plus(SAME_RRSET) {
                (rrset.max(f.rrset), expires.max(f.expires))
            } else {
                (f.rrset, f.expires)
            }
        };
        let mut bound: SmallVec<[(IpAddr, Change); 8]> = SmallVec::new();
        for ip in addresses {
            let ip = ip.to_canonical();
            if bound.iter().any(|(b, _)| *b == ip) {
                continue;
            }
            if let Some(change) = self.bind(number, &name, pack(ip), (rrset, expires), refresh) {
                bound.push((ip, change));
            }
        }
        if bound.is_empty() {
            self.drop_if_empty(number);
            out.push(Output::Fail { ticket, reason: Reason::Quota });
            return;
        }
        // Up to when a kernel must have confirmed an address so that the reply needs no wait.
        let need = Tick::ceil(self.now + ttl.min(self.config.ttl_max));
        let mut stands = true;
        for (_, c) in &bound {
            self.settle(number, c.index, &[node], c.new, c.extended, out);
            self.arm(number, c.index);
            stands &= self.stands(number, c.index, node, need);
        }
        let addresses = bound.into_iter().map(|(ip, _)| ip).collect();
        if stands {
            out.push(Output::Release { ticket, addresses });
        } else {
            let ticket =
                (ticket, Ticket { node, scope: number, deadline: self.now + self.config.barrier, addresses, acked });
            self.wait(ticket, out);
        }
    }

    /// Whether the node's kernel has confirmed the address for long enough.
    fn stands(&self, number: u32, index: u32, node: NodeId, need: Tick) -> bool {
        let Some(scope) = self.scopes.get(&number) else {
            return false;
        };
        let t = scope.table.read();
        let Some(a) = t.address(index) else { return false };
        let kernel = a.expires().minus(self.config.hello_timeout);
        a.holder(node).is_some_and(|h| h.confirmed != Tick::ZERO && h.confirmed >= need.min(kernel))
    }

    /// Binds a name to an address, or brings the fact up to date; `None` if the namespace's quota is used up.
    fn bind(
        &mut self,
        number: u32,
        name: &Name,
        ip: [u8; 16],
        (rrset, expires): (Tick, Tick),
        refresh: impl Fn(&Fact) -> (Tick, Tick),
    ) -> Option<Change> {
        let scope = self.scopes.get(&number)?;
        let (owner, quotas, hash) = (scope.owner, self.config.quotas, &self.bindings.hash);
        let table = scope.table.clone();
        let mut t = table.write();
        let named = t.find_name(hash, name.as_str());
        let found = t.find_ip(hash, ip);
        if let (Some(n), Some(index)) = (named, found)
            && let Some(f) = t.address_mut(index).and_then(|a| a.fact_mut(n))
        {
            let before = f.expires;
            (f.rrset, f.expires) = refresh(f);
            return Some(Change { index, new: false, extended: f.expires > before });
        }
        let usage = self.owners.get(&owner).copied().unwrap_or_default();
        let of_name = named.and_then(|n| t.name(n)).map_or(0, |n| n.addresses.len());
        if usage.facts >= quotas.facts
            || (named.is_none() && usage.names >= quotas.names)
            || of_name >= quotas.addresses_per_name as usize
        {
            return None;
        }
        let index = found.unwrap_or_else(|| t.insert_ip(hash, ip));
        let n = named.unwrap_or_else(|| t.insert_name(hash, name.clone()));
        t.name_mut(n)?.addresses.push(index);
        t.slot_mut(index)?.facts.push(Fact { name: n, rrset, expires });
        drop(t);
        let usage = self.owners.entry(owner).or_default();
        usage.facts += 1;
        usage.names += u32::from(named.is_none());
        if found.is_none() {
            self.count_address();
        }
        Some(Change { index, new: true, extended: true })
    }

    /// Learns a fact from elsewhere; beyond the quota it is left out.
    pub(crate) fn import(&mut self, record: FactRecord, out: &mut Vec<Output>) {
        let FactRecord { scope, owner, name, ip, remaining, ttl, nodes } = record;
        let now = self.tick();
        let number = self.number(scope, owner);
        if self.is_outdated(number) {
            self.reclassify(number, out);
        }
        let expires = now.plus(remaining.min(MAX_BINDING));
        let rrset = now.plus(ttl.min(self.config.ttl_max)).min(expires);
        let later = |f: &Fact| {
            // What has ended there says nothing about when it ended here.
            let rrset = if rrset > now { rrset.max(f.rrset) } else { f.rrset };
            let expires = if expires > now { expires.max(f.expires) } else { f.expires };
            (rrset, expires)
        };
        match self.bind(number, &name, pack(unpack(pack(ip))), (rrset, expires), later) {
            None => self.drop_if_empty(number),
            Some(c) => {
                self.settle(number, c.index, &nodes, c.new, c.extended, out);
                self.arm(number, c.index);
            }
        }
    }
}
