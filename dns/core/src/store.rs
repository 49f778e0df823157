//! The answer store: unfiltered answers per scope, so that no tenant can time
//! what another asked, nor evict it.

use std::borrow::Borrow;
use std::collections::{HashMap, HashSet};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use ahash::RandomState;
use parking_lot::RwLock;
use tidegate_policy::ScopeKey;

use crate::answer::Stored;

/// What one scope may store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreLimits {
    /// Answers; at least 2.
    pub answers: usize,
    /// Octets.
    pub bytes: usize,
}

impl Default for StoreLimits {
    fn default() -> Self {
        Self { answers: 16_384, bytes: 8 << 20 }
    }
}

/// An answer hashed and compared by its key, which lies inside it.
#[derive(Debug)]
struct ByKey(Arc<Stored>);

impl Borrow<[u8]> for ByKey {
    fn borrow(&self) -> &[u8] {
        self.0.key()
    }
}

impl Hash for ByKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.key().hash(state);
    }
}

impl PartialEq for ByKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.key() == other.0.key()
    }
}

impl Eq for ByKey {}

#[derive(Debug)]
struct Half {
    set: HashSet<ByKey, RandomState>,
    bytes: usize,
}

impl Half {
    fn new(hasher: &RandomState) -> Self {
        Self { set: HashSet::with_hasher(hasher.clone()), bytes: 0 }
    }

    fn take(&mut self, key: &[u8]) {
        if let Some(old) = self.set.take(key) {
            self.bytes -= old.0.size();
        }
    }
}

/// The answers of one scope in two halves: a full young half becomes the old one,
/// which is dropped whole. Bounded without a list or a mark per answer.
#[derive(Debug)]
struct Scope {
    young: Half,
    old: Half,
}

/// The answers of all scopes.
#[derive(Debug)]
pub struct Store {
    limits: StoreLimits,
    hasher: RandomState,
    scopes: RwLock<HashMap<ScopeKey, Arc<RwLock<Scope>>, RandomState>>,
}

impl Store {
    /// An empty store. The seeds key the hash of hostile names.
    pub fn new(limits: StoreLimits, seeds: [u64; 4]) -> Self {
        let hasher = RandomState::with_seeds(seeds[0], seeds[1], seeds[2], seeds[3]);
        Self { limits, scopes: RwLock::new(HashMap::with_hasher(hasher.clone())), hasher }
    }

    /// The answer that a scope has for a key, if it has not expired at `now` (milliseconds).
    pub fn get(&self, scope: ScopeKey, key: &[u8], now: u64) -> Option<Arc<Stored>> {
        let scopes = self.scopes.read();
        let scope = scopes.get(&scope)?.read();
        let found = scope.young.set.get(key).or_else(|| scope.old.set.get(key))?;
        found.0.ttl(now).map(|_| Arc::clone(&found.0))
    }

    /// Stores an answer; one that has expired already (TTL 0) only replaces what was there.
    pub fn insert(&self, scope: ScopeKey, answer: Arc<Stored>, now: u64) {
        let cell = {
            let scopes = self.scopes.read();
            scopes.get(&scope).map(Arc::clone)
        };
        let cell = cell.unwrap_or_else(|| {
            let new = || Arc::new(RwLock::new(Scope { young: Half::new(&self.hasher), old: Half::new(&self.hasher) }));
            Arc::clone(self.scopes.write().entry(scope).or_insert_with(new))
        });
        let mut dropped = None;
        {
            let mut s = cell.write();
            s.young.take(answer.key());
            s.old.take(answer.key());
            let size = answer.size();
            if answer.ttl(now).is_none() || size > self.limits.bytes / 2 {
                return;
            }
            if s.young.set.len() >= self.limits.answers / 2 || s.young.bytes + size > self.limits.bytes / 2 {
                let young = std::mem::replace(&mut s.young, Half::new(&self.hasher));
                dropped = Some(std::mem::replace(&mut s.old, young));
            }
            s.young.bytes += size;
            s.young.set.insert(ByKey(answer));
        }
        // Freed without the lock, so that no reader waits for it.
        drop(dropped);
    }

    /// Forgets all answers of a scope.
    pub fn flush(&self, scope: ScopeKey) {
        self.scopes.write().remove(&scope);
    }

    /// Drops what has expired at `now` (milliseconds), and scopes that are empty then.
    pub fn sweep(&self, now: u64) {
        let cells: Vec<_> = self.scopes.read().iter().map(|(k, c)| (*k, Arc::clone(c))).collect();
        let mut empty = Vec::new();
        for (key, cell) in cells {
            let mut s = cell.write();
            let Scope { young, old } = &mut *s;
            for half in [young, old] {
                half.set.retain(|a| a.0.ttl(now).is_some());
                half.bytes = half.set.iter().map(|a| a.0.size()).sum();
            }
            if s.young.set.is_empty() && s.old.set.is_empty() {
                empty.push(key);
            }
        }
        let mut scopes = self.scopes.write();
        for key in empty {
            // Only if nothing came in between; an insert that holds the cell loses its answer, which is only a miss.
            if scopes.get(&key).is_some_and(|c| c.read().young.set.is_empty()) {
                scopes.remove(&key);
            }
        }
    }

    /// How many answers a scope has, expired ones included.
    pub fn len(&self, scope: ScopeKey) -> usize {
        self.scopes.read().get(&scope).map_or(0, |c| {
            let s = c.read();
            s.young.set.len() + s.old.set.len()
        })
    }
}
