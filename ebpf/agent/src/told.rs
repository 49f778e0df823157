//! Which gateway has told which fact. A fact is deleted when nobody stands by
//! it any more: another gateway may have told it too, during a failover.
//!
//! The class of a fact is its scope's owner's to say, as the grants are: another gateway may know more or fewer names of
//! the address, or an edit earlier or later, and then its class has no grants here. While the owner is heard and stands by the
//! fact, another one's class waits aside; it holds once that one is the owner.
//!
//! A gateway that restarted does not take back what its former self told: live
//! flows hang on facts, and what is not refreshed expires. Within one boot a
//! snapshot replaces all that the gateway said.

use std::net::IpAddr;
use std::time::Duration;

use ahash::{AHashMap, AHashSet};
use tidegate_policy::state::{FactUpdate, FactValue};
use tidegate_policy::{ClassKey, ScopeKey};
use tidegate_proto::FactsBatch;

type Fact = (ScopeKey, IpAddr);

/// Messages take their time: ends of the same class that lie no further apart are the same.
const SAME: Duration = Duration::from_secs(1);

/// What a gateway says of a fact.
#[derive(Clone, Copy, Debug)]
struct Value {
    class: ClassKey,
    /// On the caller's clock.
    until: Duration,
}

impl Value {
    fn says_as(self, other: Self) -> bool {
        self.class == other.class && self.until.abs_diff(other.until) <= SAME
    }

    fn update(self, (scope, ip): Fact, now: Duration) -> FactUpdate {
        let ttl = self.until.saturating_sub(now);
        FactUpdate { scope, ip, value: Some(FactValue { class: self.class, ttl }) }
    }
}

/// A fact that the kernel holds.
#[derive(Debug)]
struct Held {
    /// Who stands by it: a bit for each gateway.
    by: u64,
    /// Who said what holds.
    said: usize,
    value: Value,
}

/// Facts by who told them.
#[derive(Debug, Default)]
pub struct Told {
    held: AHashMap<Fact, Held>,
    /// What others say that stand by a fact, where it is not what holds.
    aside: AHashMap<(Fact, usize), Value>,
    boots: AHashMap<usize, u64>,
}

impl Told {
    /// What the kernel has to do for a batch of `gateway` (below 64) at `now`. `owner`: who is heard and owns a scope.
    pub fn take(
        &mut self,
        gateway: usize,
        batch: FactsBatch,
        now: Duration,
        owner: impl Fn(ScopeKey) -> Option<usize>,
    ) -> Vec<FactUpdate> {
        let mut out = Vec::with_capacity(batch.facts.len());
        let same_boot = self.boots.insert(gateway, batch.boot_id) == Some(batch.boot_id);
        if batch.snapshot {
            let said: AHashSet<Fact> =
                batch.facts.iter().filter(|f| f.value.is_some()).map(|f| (f.scope, f.ip)).collect();
            let stands = |(f, h): (&Fact, &Held)| (h.by & bit(gateway) != 0 && !said.contains(f)).then_some(*f);
            let gone: Vec<Fact> = self.held.iter().filter_map(stands).collect();
            for fact in gone {
                let update = self.take_back(fact, gateway, now, owner(fact.0));
                // The kernel lets it expire.
                out.extend(update.filter(|u| u.value.is_some() || same_boot));
            }
        }
        for f in batch.facts {
            let fact = (f.scope, f.ip);
            let owner = owner(f.scope);
            match f.value {
                Some(v) => {
                    let value = Value { class: v.class, until: now + v.ttl };
                    out.extend(self.say(fact, gateway, value, owner).then_some(f));
                }
                None if self.held.contains_key(&fact) => out.extend(self.take_back(fact, gateway, now, owner)),
                // One that an earlier agent was told.
                None => out.push(f),
            }
        }
        out
    }

    /// Another gateway will have this number: the former one stands by nothing any more. What nobody else stands by
    /// expires; the rest is what the others say.
    pub fn forget(&mut self, gateway: usize, now: Duration) -> Vec<FactUpdate> {
        self.boots.remove(&gateway);
        let stands = |(f, h): (&Fact, &Held)| (h.by & bit(gateway) != 0).then_some(*f);
        let facts: Vec<Fact> = self.held.iter().filter_map(stands).collect();
        let left = facts.into_iter().filter_map(|f| self.take_back(f, gateway, now, None));
        left.filter(|u| u.value.is_some()).collect()
    }

    /// What the kernel has to do at `now` when owners have changed.
    pub fn follow(&mut self, now: Duration, owner: impl Fn(ScopeKey) -> Option<usize>) -> Vec<FactUpdate> {
        let moved = self.aside.keys().filter(|(fact, g)| owner(fact.0) == Some(*g));
        let moved: Vec<(Fact, usize)> = moved.copied().collect();
        let mut out = Vec::new();
        for (fact, gateway) in moved {
            if let Some(value) = self.aside.get(&(fact, gateway)).copied()
                && self.say(fact, gateway, value, Some(gateway))
            {
                out.push(value.update(fact, now));
            }
        }
        out
    }

    /// Whether one of `gateways`, a bit for each, stands by a fact.
    pub fn stands(&self, fact: Fact, gateways: u64) -> bool {
        self.held.get(&fact).is_some_and(|h| h.by & gateways != 0)
    }

    /// A gateway stands by a fact; says whether its word holds.
    fn say(&mut self, fact: Fact, gateway: usize, value: Value, owner: Option<usize>) -> bool {
        let Some(held) = self.held.get_mut(&fact) else {
            self.held.insert(fact, Held { by: bit(gateway), said: gateway, value });
            return true;
        };
        held.by |= bit(gateway);
        if owner.is_some_and(|o| o != gateway && held.by & bit(o) != 0) {
            if value.says_as(held.value) {
                self.aside.remove(&(fact, gateway));
            } else {
                self.aside.insert((fact, gateway), value);
            }
            return false;
        }
        self.hold(fact, gateway, value);
        true
    }

    /// What one of those that stand by a fact says holds from now on; the others say what they said.
    fn hold(&mut self, fact: Fact, gateway: usize, value: Value) {
        let Some(held) = self.held.get_mut(&fact) else { return };
        let was = std::mem::replace(&mut held.value, value);
        held.said = gateway;
        self.aside.remove(&(fact, gateway));
        if was.says_as(value) {
            return;
        }
        for other in (0..64).filter(|g| *g != gateway && held.by & bit(*g) != 0) {
            let said = self.aside.get(&(fact, other)).copied().unwrap_or(was);
            if said.says_as(value) {
                self.aside.remove(&(fact, other));
            } else {
                self.aside.insert((fact, other), said);
            }
        }
    }

    /// A gateway stands by a fact no more.
    fn take_back(&mut self, fact: Fact, gateway: usize, now: Duration, owner: Option<usize>) -> Option<FactUpdate> {
        self.aside.remove(&(fact, gateway));
        let held = self.held.get_mut(&fact)?;
        held.by &= !bit(gateway);
        if held.by == 0 {
            self.held.remove(&fact);
            return Some(FactUpdate { scope: fact.0, ip: fact.1, value: None });
        }
        if held.said != gateway {
            return None;
        }
        // Who is left says what holds: the owner first, then who says it for longest. Those that have nothing aside say
        // the same.
        let says = |g: usize| self.aside.get(&(fact, g)).copied();
        let left = (0..64).filter(|g| held.by & bit(*g) != 0);
        let next = left.max_by_key(|g| (owner == Some(*g), says(*g).unwrap_or(held.value).until))?;
        let (value, held) = (says(next), held.value);
        self.hold(fact, next, value.unwrap_or(held));
        Some(value?.update(fact, now))
    }
}

fn bit(gateway: usize) -> u64 {
    1 << (gateway % 64)
}

#[cfg(test)]
impl Told {
    /// How many facts somebody stands by.
    pub fn len(&self) -> usize {
        self.held.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(100);

    fn of(last: u8, class: u128) -> FactUpdate {
        let value = FactValue { class: ClassKey(class), ttl: Duration::from_secs(60) };
        FactUpdate { scope: ScopeKey(1), ip: [192, 0, 2, last].into(), value: Some(value) }
    }

    fn set(last: u8) -> FactUpdate {
        of(last, 1)
    }

    fn gone(last: u8) -> FactUpdate {
        FactUpdate { value: None, ..set(last) }
    }

    fn batch(boot_id: u64, snapshot: bool, facts: Vec<FactUpdate>) -> FactsBatch {
        FactsBatch { boot_id, sequence: 1, snapshot, facts, ..FactsBatch::default() }
    }

    fn take(t: &mut Told, gateway: usize, batch: FactsBatch, owner: Option<usize>) -> Vec<FactUpdate> {
        t.take(gateway, batch, NOW, |_| owner)
    }

    #[test]
    fn a_fact_goes_with_the_last_gateway_that_told_it() {
        let mut t = Told::default();
        assert_eq!(take(&mut t, 0, batch(1, true, vec![set(1)]), None), vec![set(1)]);
        assert_eq!(take(&mut t, 1, batch(9, true, vec![set(1)]), None), vec![set(1)]);
        assert_eq!(take(&mut t, 0, batch(1, false, vec![gone(1)]), None), vec![]);
        assert_eq!(take(&mut t, 1, batch(9, false, vec![gone(1)]), None), vec![gone(1)]);
        assert_eq!(t.len(), 0);
        // One that an earlier agent was told.
        assert_eq!(take(&mut t, 1, batch(9, false, vec![gone(2)]), None), vec![gone(2)]);
    }

    #[test]
    fn a_snapshot_replaces_within_a_boot_and_takes_nothing_back_after_a_restart() {
        let mut t = Told::default();
        take(&mut t, 0, batch(1, true, vec![set(1), set(2)]), None);
        assert_eq!(take(&mut t, 0, batch(1, true, vec![set(2)]), None), vec![gone(1), set(2)]);
        assert_eq!(take(&mut t, 0, batch(2, true, vec![]), None), vec![]);
        assert_eq!(t.len(), 0, "nobody stands by it; the kernel lets it expire");
    }

    #[test]
    fn a_class_is_the_owners_to_say() {
        let mut t = Told::default();
        take(&mut t, 0, batch(1, true, vec![of(1, 1)]), Some(0));
        assert_eq!(take(&mut t, 1, batch(9, true, vec![of(1, 2), of(2, 2)]), Some(0)), vec![of(2, 2)]);
        assert_eq!(t.follow(NOW, |_| Some(0)), vec![]);
        assert_eq!(t.follow(NOW, |_| Some(1)), vec![of(1, 2)]);
        // And back, with what it said before.
        assert_eq!(t.follow(NOW, |_| Some(0)), vec![of(1, 1)]);
        // While the owner is not heard, who stands in has the word.
        assert_eq!(take(&mut t, 1, batch(9, false, vec![of(1, 3)]), None), vec![of(1, 3)]);
        assert_eq!(take(&mut t, 0, batch(1, false, vec![of(1, 4)]), Some(0)), vec![of(1, 4)]);
        // Who is left has it, too.
        assert_eq!(take(&mut t, 0, batch(1, false, vec![gone(1)]), Some(0)), vec![of(1, 3)]);
        assert_eq!(take(&mut t, 1, batch(9, false, vec![gone(1), gone(2)]), Some(0)), vec![gone(1), gone(2)]);
        assert!(t.len() == 0 && t.aside.is_empty());
    }

    #[test]
    fn an_owner_that_says_less_leaves_what_the_others_said() {
        let lives = |class, secs| {
            let value = FactValue { class: ClassKey(class), ttl: Duration::from_secs(secs) };
            FactUpdate { value: Some(value), ..set(1) }
        };
        let mut t = Told::default();
        take(&mut t, 0, batch(1, true, vec![lives(1, 300)]), Some(1));
        take(&mut t, 2, batch(7, true, vec![lives(1, 300)]), Some(1));
        // It comes back with what its journal holds: that has expired, then is of another class, and goes.
        let old = vec![lives(1, 0), lives(2, 0)];
        assert_eq!(take(&mut t, 1, batch(9, true, old.clone()), Some(1)), old);
        assert_eq!(take(&mut t, 1, batch(9, false, vec![gone(1)]), Some(1)), vec![lives(1, 300)]);
        assert!(t.aside.is_empty(), "the others say the same");
        // Of those that are left, who says it for longest is believed.
        take(&mut t, 1, batch(9, false, vec![lives(2, 60)]), Some(1));
        assert_eq!(take(&mut t, 2, batch(7, false, vec![lives(1, 200)]), Some(1)), vec![]);
        assert_eq!(take(&mut t, 1, batch(9, false, vec![gone(1)]), Some(1)), vec![lives(1, 300)]);
        assert_eq!(take(&mut t, 0, batch(1, false, vec![gone(1)]), None), vec![lives(1, 200)]);
        assert_eq!(take(&mut t, 2, batch(7, false, vec![gone(1)]), None), vec![gone(1)]);
        assert!(t.len() == 0 && t.aside.is_empty());
    }

    #[test]
    fn a_number_that_is_given_anew_begins_with_nothing() {
        let mut t = Told::default();
        take(&mut t, 0, batch(1, true, vec![set(1), set(2), set(3)]), Some(0));
        take(&mut t, 1, batch(9, true, vec![set(2), of(3, 2)]), Some(0));
        assert_eq!(t.forget(0, NOW), vec![of(3, 2)]);
        assert_eq!(t.len(), 2);
        assert!(
            !t.stands((ScopeKey(1), [192, 0, 2, 1].into()), !0) && t.stands((ScopeKey(1), [192, 0, 2, 2].into()), 2)
        );
        assert!(!t.stands((ScopeKey(1), [192, 0, 2, 2].into()), 1));
        // The next one takes nothing back that it never told, even with the same boot.
        assert_eq!(take(&mut t, 0, batch(1, true, vec![]), None), vec![]);
        assert_eq!(take(&mut t, 1, batch(9, true, vec![set(3)]), None), vec![gone(2), set(3)]);
    }
}
