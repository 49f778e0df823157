//! Which classes facts have. Pure.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ahash::AHashMap;
use tidegate_policy::world::World;
use tidegate_policy::{ClassKey, ScopeKey};

/// How long the grants of a class outlive its last fact: a node may hear of that later than of its new state. Beyond
/// two seconds without facts it steers what it does not know.
const LINGER: Duration = Duration::from_secs(5);

/// Which classes facts have or had just now, so that their grants are pushed and those of others are not.
#[derive(Default)]
pub struct Classes {
    of: AHashMap<(ScopeKey, IpAddr), ClassKey>,
    count: BTreeMap<(ScopeKey, ClassKey), u32>,
    /// Classes that lost their last fact, and when, in that order.
    left: VecDeque<(Duration, (ScopeKey, ClassKey))>,
}

impl Classes {
    /// Notes at `now` a fact's class, `None` if the fact is gone; says whether no other fact of the scope had it.
    pub fn note(&mut self, scope: ScopeKey, ip: IpAddr, class: Option<ClassKey>, now: Duration) -> bool {
        let old = match class {
            Some(c) => self.of.insert((scope, ip), c),
            None => self.of.remove(&(scope, ip)),
        };
        if old == class {
            return false;
        }
        if let Some(old) = old
            && let Some(n) = self.count.get_mut(&(scope, old))
        {
            *n -= 1;
            if *n == 0 {
                self.count.remove(&(scope, old));
                self.left.push_back((now, (scope, old)));
            }
        }
        while self.left.pop_front_if(|(at, _)| now.saturating_sub(*at) >= LINGER).is_some() {}
        let Some(class) = class else { return false };
        let n = self.count.entry((scope, class)).or_default();
        *n += 1;
        *n == 1
    }

    /// Classes that facts have at `now`, or had just before.
    pub fn active(&self, now: Duration) -> impl Iterator<Item = (ScopeKey, ClassKey)> {
        let left = self.left.iter().filter(move |(at, _)| now.saturating_sub(*at) < LINGER);
        self.count.keys().copied().chain(left.map(|(_, key)| *key))
    }

    /// How many addresses have a class, and how many classes they have.
    #[cfg(test)]
    pub fn len(&self) -> (usize, usize) {
        (self.of.len(), self.count.len())
    }
}

/// Which nodes have a pod of which scope.
pub fn placed(world: &World) -> BTreeSet<(ScopeKey, Arc<str>)> {
    world.endpoints().filter_map(|(_, e)| Some((e.member?.scope, e.who.node.clone()))).collect()
}
