//! The tunnelling budget: how many new unique names, and octets of them, a scope
//! may look up in a minute below its wildcards. Data leaves a network inside
//! names that nobody asked before; ordinary work asks few of those.

use std::collections::{HashMap, HashSet};

use ahash::RandomState;
use tidegate_policy::ScopeKey;

/// What a scope may ask in one minute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BudgetLimits {
    /// New unique names; range 1 to 65,536.
    pub names: u32,
    /// Octets of their names.
    pub bytes: u32,
}

impl Default for BudgetLimits {
    fn default() -> Self {
        Self { names: 600, bytes: 32 * 1024 }
    }
}

/// Length of a window, in milliseconds.
const WINDOW: u64 = 60_000;
/// How many windows' worth of names stay known while they are asked for.
const CARRIED: usize = 4;

#[derive(Debug, Default)]
struct Window {
    started: u64,
    /// New names of this window.
    names: u32,
    bytes: u32,
    seen: HashSet<u64, RandomState>,
    before: HashSet<u64, RandomState>,
}

/// The budgets of all scopes.
#[derive(Debug)]
pub struct Budget {
    limits: BudgetLimits,
    hasher: RandomState,
    scopes: HashMap<ScopeKey, Window, RandomState>,
}

impl Budget {
    /// Empty budgets. The seeds key the hash of hostile names.
    pub fn new(limits: BudgetLimits, seeds: [u64; 4]) -> Self {
        let hasher = RandomState::with_seeds(seeds[0], seeds[1], seeds[2], seeds[3]);
        Self { limits, scopes: HashMap::with_hasher(hasher.clone()), hasher }
    }

    /// Whether a scope may look `name` up; `now` in milliseconds. Names of this minute and the last one are free.
    pub fn take(&mut self, scope: ScopeKey, name: &[u8], now: u64) -> bool {
        let hash = self.hasher.hash_one(name);
        let hasher = &self.hasher;
        let w = self.scopes.entry(scope).or_insert_with(|| Window {
            started: now,
            names: 0,
            bytes: 0,
            seen: HashSet::with_hasher(hasher.clone()),
            before: HashSet::with_hasher(hasher.clone()),
        });
        let age = now.saturating_sub(w.started);
        if age >= WINDOW {
            w.before = std::mem::replace(&mut w.seen, HashSet::with_hasher(hasher.clone()));
            if age >= 2 * WINDOW {
                w.before.clear();
            }
            w.started = now;
            (w.names, w.bytes) = (0, 0);
        }
        if w.seen.contains(&hash) {
            return true;
        }
        let known = w.before.contains(&hash);
        if !known {
            let bytes = w.bytes.saturating_add(u32::try_from(name.len()).unwrap_or(u32::MAX));
            if w.names >= self.limits.names || bytes > self.limits.bytes {
                return false;
            }
            w.names += 1;
            w.bytes = bytes;
        }
        // A known name stays known for another minute, as long as the set stays small.
        if !known || w.seen.len() < CARRIED * self.limits.names as usize {
            w.seen.insert(hash);
        }
        true
    }

    /// Forgets scopes that asked nothing for two minutes.
    pub fn sweep(&mut self, now: u64) {
        self.scopes.retain(|_, w| now.saturating_sub(w.started) < 2 * WINDOW);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_names_are_bounded_per_scope_and_minute() {
        let mut b = Budget::new(BudgetLimits { names: 2, bytes: 1000 }, [1, 2, 3, 4]);
        let (s, t) = (ScopeKey(1), ScopeKey(2));
        assert!(b.take(s, b"a", 0) && b.take(s, b"b", 0) && b.take(s, b"a", 1));
        assert!(!b.take(s, b"c", 2));
        assert!(b.take(t, b"c", 2), "another scope has its own");
        assert!(b.take(s, b"c", WINDOW));
        assert!(b.take(s, b"a", WINDOW) && b.take(s, b"b", WINDOW), "names of the last minute are free");
        b.sweep(10 * WINDOW);
        assert!(b.scopes.is_empty());
    }

    #[test]
    fn octets_are_bounded() {
        let mut b = Budget::new(BudgetLimits { names: 100, bytes: 10 }, [1, 2, 3, 4]);
        assert!(b.take(ScopeKey(1), b"12345", 0));
        assert!(b.take(ScopeKey(1), b"abcde", 0));
        assert!(!b.take(ScopeKey(1), b"f", 0));
    }
}
