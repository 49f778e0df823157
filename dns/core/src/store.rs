//! The answer store: unfiltered answers per scope, so that no tenant can time
//! what another asked, nor evict it.

use std::borrow::Borrow;
use std::collections::{HashMap, HashSet};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use ahash::RandomState;
use parking_lot::RwLock;
use tidegate_policy::ScopeKey;

use crate::answer::{self, Stored};

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
        // A half just fills a hash table: one answer more would double it.
        Self { answers: 2 * 7168, bytes: 8 << 20 }
    }
}

/// The entry of a name ([`Stored`]), hashed and compared by the name, which lies inside it.
#[derive(Debug)]
struct ByName(Arc<[u8]>);

impl Borrow<[u8]> for ByName {
    fn borrow(&self) -> &[u8] {
        answer::name_of(&self.0)
    }
}

impl Hash for ByName {
    fn hash<H: Hasher>(&self, state: &mut H) {
        answer::name_of(&self.0).hash(state);
    }
}

impl PartialEq for ByName {
    fn eq(&self, other: &Self) -> bool {
        answer::name_of(&self.0) == answer::name_of(&other.0)
    }
}

impl Eq for ByName {}

/// Octets of memory that an entry takes beside its own: the counts of the `Arc`, malloc's, and its place in the table.
const OVERHEAD: usize = 48;

/// The most answers of one name, the newest: each new one copies the others under the lock. Clients ask a handful of types.
const TYPES: usize = 16;

#[derive(Debug)]
struct Half {
    set: HashSet<ByName, RandomState>,
    answers: usize,
    bytes: usize,
}

impl Half {
    fn new(hasher: &RandomState) -> Self {
        Self { set: HashSet::with_hasher(hasher.clone()), answers: 0, bytes: 0 }
    }

    fn take(&mut self, name: &[u8]) -> Option<Arc<[u8]>> {
        let entry = self.set.take(name)?.0;
        self.answers -= answer::count(&entry);
        self.bytes -= entry.len() + OVERHEAD;
        Some(entry)
    }

    fn put(&mut self, entry: Arc<[u8]>) {
        self.answers += answer::count(&entry);
        self.bytes += entry.len() + OVERHEAD;
        self.set.insert(ByName(entry));
    }
}

/// The answers of one scope in two halves: a full young half becomes the old one,
/// which is dropped whole. Bounded without a list or a mark per answer. A name is in one of them.
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

    /// The answer that a scope has for a key ([`crate::wire::Query::key`]), if it has not expired at `now` (milliseconds).
    pub fn get(&self, scope: ScopeKey, key: &[u8], now: u64) -> Option<Stored> {
        let (qtype, name) = key.split_first_chunk()?;
        let scopes = self.scopes.read();
        let scope = scopes.get(&scope)?.read();
        let found = scope.young.set.get(name).or_else(|| scope.old.set.get(name))?;
        Stored::find(&found.0, u16::from_be_bytes(*qtype)).filter(|s| s.ttl(now).is_some())
    }

    /// Stores an answer; one that has expired already (TTL 0) only replaces what was there.
    pub fn insert(&self, scope: ScopeKey, answer: &Stored, now: u64) {
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
            let old = s.young.take(answer.name()).or_else(|| s.old.take(answer.name()));
            let (answers, bytes) = (self.limits.answers / 2, self.limits.bytes / 2);
            let Some(entry) = answer.beside(old.as_deref(), now, answers.min(TYPES), bytes.saturating_sub(OVERHEAD))
            else {
                return;
            };
            if s.young.answers + answer::count(&entry) > answers || s.young.bytes + entry.len() + OVERHEAD > bytes {
                let young = std::mem::replace(&mut s.young, Half::new(&self.hasher));
                dropped = Some(std::mem::replace(&mut s.old, young));
            }
            s.young.put(entry);
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
                half.set.retain(|e| answer::lives(&e.0, now));
                half.answers = half.set.iter().map(|e| answer::count(&e.0)).sum();
                half.bytes = half.set.iter().map(|e| e.0.len() + OVERHEAD).sum();
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
            s.young.answers + s.old.answers
        })
    }
}
