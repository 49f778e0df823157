//! Which classes facts have. Pure.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use ahash::AHashMap;
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
    /// Classes that came, or were dropped from `left`, since [`Classes::news`] was asked.
    news: BTreeSet<(ScopeKey, ClassKey)>,
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
        self.expire(now);
        let Some(class) = class else { return false };
        let n = self.count.entry((scope, class)).or_default();
        *n += 1;
        let first = *n == 1;
        if first {
            self.news.insert((scope, class));
        }
        first
    }

    fn expire(&mut self, now: Duration) {
        while let Some((_, key)) = self.left.pop_front_if(|(at, _)| now.saturating_sub(*at) >= LINGER) {
            self.news.insert(key);
        }
    }

    /// Which classes may have become active, or not active any more, since the last call.
    pub fn news(&mut self, now: Duration) -> BTreeSet<(ScopeKey, ClassKey)> {
        self.expire(now);
        std::mem::take(&mut self.news)
    }

    /// Classes that facts have at `now`, or had just before.
    pub fn active(&self, now: Duration) -> impl Iterator<Item = (ScopeKey, ClassKey)> {
        self.count.keys().copied().chain(self.lingering(now))
    }

    /// Classes that facts had just before `now`.
    pub fn lingering(&self, now: Duration) -> impl Iterator<Item = (ScopeKey, ClassKey)> {
        self.left.iter().filter(move |(at, _)| now.saturating_sub(*at) < LINGER).map(|(_, key)| *key)
    }

    /// Classes that facts of a scope have.
    pub fn of_facts(&self, scope: ScopeKey) -> impl Iterator<Item = ClassKey> {
        self.count.range((scope, ClassKey(0))..=(scope, ClassKey(u128::MAX))).map(|((_, class), _)| *class)
    }

    /// Whether facts of a scope have a class.
    pub fn has(&self, scope: ScopeKey, class: ClassKey) -> bool {
        self.count.contains_key(&(scope, class))
    }

    /// How many addresses have a class, and how many classes they have.
    #[cfg(test)]
    pub fn len(&self) -> (usize, usize) {
        (self.of.len(), self.count.len())
    }
}
