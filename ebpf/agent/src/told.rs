//! Which gateway has told which fact. A fact is deleted when nobody stands by
//! it any more: another gateway may have told it too, during a failover.
//!
//! A gateway that restarted does not take back what its former self told: live
//! flows hang on facts, and what is not refreshed expires. Within one boot a
//! snapshot replaces all that the gateway said.

use std::net::IpAddr;

use ahash::{AHashMap, AHashSet};
use tidegate_policy::ScopeKey;
use tidegate_policy::state::FactUpdate;
use tidegate_proto::FactsBatch;

type Fact = (ScopeKey, IpAddr);

/// Facts by who told them: a bit per gateway.
#[derive(Debug, Default)]
pub struct Told {
    by: AHashMap<Fact, u64>,
    boots: AHashMap<usize, u64>,
}

impl Told {
    /// What the kernel has to do for a batch of `gateway` (below 64).
    pub fn take(&mut self, gateway: usize, batch: FactsBatch) -> Vec<FactUpdate> {
        let bit = 1u64 << (gateway % 64);
        let mut out = Vec::with_capacity(batch.facts.len());
        let same_boot = self.boots.insert(gateway, batch.boot_id) == Some(batch.boot_id);
        if batch.snapshot {
            let said: AHashSet<Fact> =
                batch.facts.iter().filter(|f| f.value.is_some()).map(|f| (f.scope, f.ip)).collect();
            self.by.retain(|fact, by| {
                if *by & bit != 0 && !said.contains(fact) {
                    *by &= !bit;
                    if *by == 0 && same_boot {
                        out.push(FactUpdate { scope: fact.0, ip: fact.1, value: None });
                    }
                }
                *by != 0
            });
        }
        for fact in batch.facts {
            let key = (fact.scope, fact.ip);
            if fact.value.is_some() {
                *self.by.entry(key).or_default() |= bit;
                out.push(fact);
                continue;
            }
            let left = self.by.get(&key).copied().unwrap_or(0) & !bit;
            if left == 0 {
                self.by.remove(&key);
                out.push(fact);
            } else {
                self.by.insert(key, left);
            }
        }
        out
    }

    /// Another gateway will have this number: the former one stands by nothing any more. What nobody else stands by expires.
    pub fn forget(&mut self, gateway: usize) {
        let bit = 1u64 << (gateway % 64);
        self.boots.remove(&gateway);
        self.by.retain(|_, by| {
            *by &= !bit;
            *by != 0
        });
    }
}

#[cfg(test)]
impl Told {
    /// How many facts somebody stands by.
    pub fn len(&self) -> usize {
        self.by.len()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tidegate_policy::ClassKey;
    use tidegate_policy::state::FactValue;

    use super::*;

    fn set(last: u8) -> FactUpdate {
        let value = FactValue { class: ClassKey(1), ttl: Duration::from_secs(60) };
        FactUpdate { scope: ScopeKey(1), ip: [192, 0, 2, last].into(), value: Some(value) }
    }

    fn gone(last: u8) -> FactUpdate {
        FactUpdate { value: None, ..set(last) }
    }

    fn batch(boot_id: u64, snapshot: bool, facts: Vec<FactUpdate>) -> FactsBatch {
        FactsBatch { boot_id, sequence: 1, snapshot, facts, ..FactsBatch::default() }
    }

    #[test]
    fn a_fact_goes_with_the_last_gateway_that_told_it() {
        let mut t = Told::default();
        assert_eq!(t.take(0, batch(1, true, vec![set(1)])), vec![set(1)]);
        assert_eq!(t.take(1, batch(9, true, vec![set(1)])), vec![set(1)]);
        assert_eq!(t.take(0, batch(1, false, vec![gone(1)])), vec![]);
        assert_eq!(t.take(1, batch(9, false, vec![gone(1)])), vec![gone(1)]);
        assert_eq!(t.len(), 0);
        // One that an earlier agent was told.
        assert_eq!(t.take(1, batch(9, false, vec![gone(2)])), vec![gone(2)]);
    }

    #[test]
    fn a_snapshot_replaces_within_a_boot_and_takes_nothing_back_after_a_restart() {
        let mut t = Told::default();
        t.take(0, batch(1, true, vec![set(1), set(2)]));
        assert_eq!(t.take(0, batch(1, true, vec![set(2)])), vec![gone(1), set(2)]);
        assert_eq!(t.take(0, batch(2, true, vec![])), vec![]);
        assert!(t.by.is_empty(), "nobody stands by it; the kernel lets it expire");
    }

    #[test]
    fn a_number_that_is_given_anew_begins_with_nothing() {
        let mut t = Told::default();
        t.take(0, batch(1, true, vec![set(1), set(2)]));
        t.take(1, batch(9, true, vec![set(2)]));
        t.forget(0);
        assert_eq!(t.len(), 1);
        // The next one takes nothing back that it never told, even with the same boot.
        assert_eq!(t.take(0, batch(1, true, vec![])), vec![]);
        assert_eq!(t.take(1, batch(9, true, vec![])), vec![gone(2)]);
    }
}
