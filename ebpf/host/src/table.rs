//! A kernel map beside a shadow of what it holds, so that only differences cost system calls.

use std::borrow::Borrow;
use std::hash::Hash;

use ahash::AHashMap;
use aya::Pod;
use aya::maps::lpm_trie::Key;
use aya::maps::{HashMap, LpmTrie, MapData, MapError};
use tidegate_ebpf_common::layout::PrefixKey;

use crate::Error;

/// A key of an LPM map: bits and data.
pub(crate) type Lpm = (u32, PrefixKey);

/// What a kernel map can do.
pub(crate) trait Store<K, V> {
    fn write(&mut self, key: &K, value: &V) -> Result<(), MapError>;
    fn erase(&mut self, key: &K) -> Result<(), MapError>;
    fn read_all(&self) -> Result<AHashMap<K, V>, MapError>;
}

impl<K: Pod + Eq + Hash, V: Pod> Store<K, V> for HashMap<MapData, K, V> {
    fn write(&mut self, key: &K, value: &V) -> Result<(), MapError> {
        self.insert(key, value.borrow(), 0)
    }
    fn erase(&mut self, key: &K) -> Result<(), MapError> {
        self.remove(key)
    }
    fn read_all(&self) -> Result<AHashMap<K, V>, MapError> {
        self.iter().collect()
    }
}

impl<V: Pod> Store<Lpm, V> for LpmTrie<MapData, PrefixKey, V> {
    fn write(&mut self, key: &Lpm, value: &V) -> Result<(), MapError> {
        self.insert(&Key::new(key.0, key.1), value.borrow(), 0)
    }
    fn erase(&mut self, key: &Lpm) -> Result<(), MapError> {
        self.remove(&Key::new(key.0, key.1))
    }
    fn read_all(&self) -> Result<AHashMap<Lpm, V>, MapError> {
        self.iter().map(|r| r.map(|(k, v)| ((k.prefix_len(), k.data()), v))).collect()
    }
}

/// A map and its shadow.
pub(crate) struct Table<K, V, S> {
    name: &'static str,
    store: S,
    shadow: AHashMap<K, V>,
}

impl<K: Copy + Eq + Hash, V: Copy + PartialEq, S: Store<K, V>> Table<K, V, S> {
    pub fn new(name: &'static str, store: S) -> Result<Self, Error> {
        let mut table = Self { name, store, shadow: AHashMap::new() };
        table.reload()?;
        Ok(table)
    }

    /// Reads the kernel's truth; returns in how many entries the shadow was wrong.
    pub fn reload(&mut self) -> Result<usize, Error> {
        let truth = self.store.read_all().map_err(Error::map(self.name))?;
        let wrong = truth.iter().filter(|(k, v)| self.shadow.get(k) != Some(v)).count()
            + self.shadow.keys().filter(|k| !truth.contains_key(k)).count();
        self.shadow = truth;
        Ok(wrong)
    }

    /// Writes back what others changed or deleted, and deletes what they added; returns in how many entries.
    pub fn restore(&mut self) -> Result<usize, Error> {
        let held = self.shadow.clone();
        self.reload()?;
        let done = self.fill(&held).and_then(|n| Ok(n + self.prune(&held)?));
        // What could not be written now is still wanted, and the next call finds it missing.
        self.shadow = held;
        done
    }

    pub fn get(&self, key: &K) -> Option<&V> {
        self.shadow.get(key)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.shadow.iter()
    }

    /// Writes one entry if it differs.
    pub fn set(&mut self, key: K, value: V) -> Result<bool, Error> {
        if self.shadow.get(&key) == Some(&value) {
            return Ok(false);
        }
        self.store.write(&key, &value).map_err(Error::map(self.name))?;
        self.shadow.insert(key, value);
        Ok(true)
    }

    pub fn delete(&mut self, key: &K) -> Result<bool, Error> {
        if !self.shadow.contains_key(key) {
            return Ok(false);
        }
        match self.store.erase(key) {
            // It may have gone by itself.
            Ok(()) | Err(MapError::KeyNotFound) => {}
            Err(MapError::SyscallError(e)) if e.io_error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(e) => return Err(Error::map(self.name)(e)),
        }
        self.shadow.remove(key);
        Ok(true)
    }

    /// Writes what `want` has and the kernel has not.
    pub fn fill(&mut self, want: &AHashMap<K, V>) -> Result<usize, Error> {
        let mut n = 0;
        for (k, v) in want {
            n += usize::from(self.set(*k, *v)?);
        }
        Ok(n)
    }

    /// Writes or deletes these entries; returns how many differed.
    pub fn follow(&mut self, step: &[(K, Option<V>)]) -> Result<usize, Error> {
        let mut n = 0;
        for (key, value) in step {
            n += usize::from(match value {
                Some(value) => self.set(*key, *value)?,
                None => self.delete(key)?,
            });
        }
        Ok(n)
    }

    /// Deletes what the kernel has and `want` has not.
    pub fn prune(&mut self, want: &AHashMap<K, V>) -> Result<usize, Error> {
        let gone: Vec<K> = self.shadow.keys().filter(|k| !want.contains_key(k)).copied().collect();
        for k in &gone {
            self.delete(k)?;
        }
        Ok(gone.len())
    }
}

/// A hash table with its shadow.
pub(crate) type Hashed<K, V> = Table<K, V, HashMap<MapData, K, V>>;
/// An LPM table with its shadow.
pub(crate) type Trie<V> = Table<Lpm, V, LpmTrie<MapData, PrefixKey, V>>;
