//! A map that shares with the map it was made from whatever did not change since.
//!
//! Entries lie in sorted shards behind [`Arc`]s. A copy costs a pointer for each shard, an edit copies one
//! shard, a look-up is a binary search in one, and a comparison of two maps skips the shards that they share.

use std::borrow::Borrow;
use std::net::IpAddr;
use std::sync::{Arc, LazyLock};

use crate::{GroupKey, ScopeKey};

/// A map has twice as many shards when they have more entries than this on average.
const FULL: usize = 64;
/// It has half as many when they have fewer.
const SPARSE: usize = 8;

/// Which shard a key lies in: the first bits say it. Equal keys, owned or borrowed, have equal places.
pub trait Place {
    /// Spread over all 64 bits.
    fn place(&self) -> u64;
}

/// Tenants choose names: where those lie they cannot know.
static SPREAD: LazyLock<ahash::RandomState> = LazyLock::new(ahash::RandomState::new);

impl Place for IpAddr {
    fn place(&self) -> u64 {
        SPREAD.hash_one(self)
    }
}

impl Place for str {
    fn place(&self) -> u64 {
        SPREAD.hash_one(self)
    }
}

impl Place for Arc<str> {
    fn place(&self) -> u64 {
        (**self).place()
    }
}

// Keys are hashes: as they are, iteration is in their order.
impl Place for ScopeKey {
    fn place(&self) -> u64 {
        (self.0 >> 64) as u64
    }
}

impl Place for GroupKey {
    fn place(&self) -> u64 {
        (self.0 >> 64) as u64
    }
}

type Shard<K, V> = Arc<Vec<(K, V)>>;

/// The map.
#[derive(Debug)]
pub struct Shards<K, V> {
    /// A power of two of them.
    shards: Vec<Shard<K, V>>,
    len: usize,
}

impl<K, V> Default for Shards<K, V> {
    fn default() -> Self {
        Self { shards: vec![Arc::default()], len: 0 }
    }
}

impl<K, V> Clone for Shards<K, V> {
    fn clone(&self) -> Self {
        Self { shards: self.shards.clone(), len: self.len }
    }
}

fn index(place: u64, shards: usize) -> usize {
    // One shard has no bits.
    place.checked_shr(64 - shards.trailing_zeros()).unwrap_or(0) as usize
}

impl<K, V> Shards<K, V> {
    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All entries; those of scopes and groups in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.shards.iter().flat_map(|s| s.iter()).map(|(k, v)| (k, v))
    }

    /// All keys, in the order of [`Shards::iter`].
    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.iter().map(|(k, _)| k)
    }

    /// All values, in the order of [`Shards::iter`].
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, v)| v)
    }
}

impl<K: Place + Ord, V> Shards<K, V> {
    fn shard<Q: Place + ?Sized>(&self, key: &Q) -> usize {
        index(key.place(), self.shards.len())
    }

    /// The value of a key.
    pub fn get<Q: Place + Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        let shard = &self.shards[self.shard(key)];
        let at = shard.binary_search_by(|(k, _)| k.borrow().cmp(key)).ok()?;
        Some(&shard[at].1)
    }

    /// Whether there is such a key.
    pub fn contains_key<Q: Place + Ord + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.get(key).is_some()
    }

    /// Calls `each` with what may differ from `old`: a key, what it had, and what it has. Whatever both maps share is
    /// skipped; what they do not share may be equal all the same.
    pub fn compare<'a>(&'a self, old: &'a Self, mut each: impl FnMut(&'a K, Option<&'a V>, Option<&'a V>)) {
        if self.shards.len() != old.shards.len() {
            self.iter().for_each(|(k, v)| each(k, old.get(k), Some(v)));
            old.iter().filter(|(k, _)| !self.contains_key(*k)).for_each(|(k, v)| each(k, Some(v), None));
            return;
        }
        for (new, old) in self.shards.iter().zip(&old.shards).filter(|(a, b)| !Arc::ptr_eq(a, b)) {
            let (mut new, mut old) = (new.iter().peekable(), old.iter().peekable());
            loop {
                let order = match (new.peek(), old.peek()) {
                    (Some(n), Some(o)) => n.0.cmp(&o.0),
                    (Some(_), None) => std::cmp::Ordering::Less,
                    (None, Some(_)) => std::cmp::Ordering::Greater,
                    (None, None) => break,
                };
                let n = if order.is_le() { new.next() } else { None };
                let o = if order.is_ge() { old.next() } else { None };
                if let Some((key, _)) = n.or(o) {
                    each(key, o.map(|o| &o.1), n.map(|n| &n.1));
                }
            }
        }
    }
}

/// Costs what differs.
impl<K: Place + Ord, V: PartialEq> PartialEq for Shards<K, V> {
    fn eq(&self, other: &Self) -> bool {
        let mut same = self.len == other.len;
        self.compare(other, |_, old, new| same &= old == new);
        same
    }
}

impl<K: Place + Ord, V: Eq> Eq for Shards<K, V> {}

impl<K: Place + Ord + Clone, V: Clone> Shards<K, V> {
    /// Sets a key; returns what it had.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        let shard = self.shard(&key);
        let shard = Arc::make_mut(&mut self.shards[shard]);
        match shard.binary_search_by(|(k, _)| k.cmp(&key)) {
            Ok(at) => Some(std::mem::replace(&mut shard[at].1, value)),
            Err(at) => {
                shard.insert(at, (key, value));
                self.len += 1;
                if self.len > self.shards.len() * FULL {
                    self.divide(self.shards.len() * 2);
                }
                None
            }
        }
    }

    /// Removes a key; returns what it had.
    pub fn remove<Q: Place + Ord + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let shard = self.shard(key);
        let shard = &mut self.shards[shard];
        let at = shard.binary_search_by(|(k, _)| k.borrow().cmp(key)).ok()?;
        let (_, value) = Arc::make_mut(shard).remove(at);
        self.len -= 1;
        if self.shards.len() > 1 && self.len < self.shards.len() * SPARSE {
            self.divide(self.shards.len() / 2);
        }
        Some(value)
    }

    fn divide(&mut self, shards: usize) {
        let mut all: Vec<Vec<(K, V)>> = (0..shards).map(|_| Vec::with_capacity(FULL)).collect();
        for shard in &mut self.shards {
            for (k, v) in std::mem::take(Arc::make_mut(shard)) {
                all[index(k.place(), shards)].push((k, v));
            }
        }
        // Two shards that become one are each sorted, and their keys need not follow each other.
        let sorted = all.into_iter().map(|mut s| {
            s.sort_unstable_by(|a, b| a.0.cmp(&b.0));
            s.shrink_to_fit();
            Arc::new(s)
        });
        self.shards = sorted.collect();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn key(n: u16) -> ScopeKey {
        ScopeKey(u128::from(n).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835))
    }

    #[test]
    fn an_edit_copies_one_shard() {
        let mut map = Shards::default();
        for n in 0..5000 {
            map.insert(key(n), n);
        }
        let mut edited = map.clone();
        edited.insert(key(7), 0);
        let shared = map.shards.iter().zip(&edited.shards).filter(|(a, b)| Arc::ptr_eq(a, b)).count();
        assert_eq!(shared, map.shards.len() - 1);
        assert!(map.shards.len() >= 5000 / FULL && map.shards.iter().all(|s| s.len() < 3 * FULL));
        let mut looked_at = 0;
        edited.compare(&map, |_, _, _| looked_at += 1);
        assert!((1..3 * FULL).contains(&looked_at));
        assert_eq!((map.get(&key(7)), edited.get(&key(7))), (Some(&7), Some(&0)));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

        #[test]
        fn it_is_a_map_in_order(
            steps in prop::collection::vec((0..600u16, prop::option::weighted(0.7, 0..3u8)), 0..900),
            more in prop::collection::vec((0..600u16, prop::option::weighted(0.3, 0..3u8)), 0..900),
        ) {
            let edit = |map: &mut Shards<ScopeKey, u8>, known: &mut BTreeMap<ScopeKey, u8>, steps: &[(u16, Option<u8>)]| {
                for (k, v) in steps {
                    let (a, b) = match v {
                        Some(v) => (map.insert(key(*k), *v), known.insert(key(*k), *v)),
                        None => (map.remove(&key(*k)), known.remove(&key(*k))),
                    };
                    prop_assert_eq!(a, b);
                }
                prop_assert_eq!(map.len(), known.len());
                prop_assert!(map.iter().eq(known.iter()));
                Ok(())
            };
            let (mut map, mut known) = (Shards::default(), BTreeMap::new());
            edit(&mut map, &mut known, &steps)?;
            let (old, before) = (map.clone(), known.clone());
            edit(&mut map, &mut known, &more)?;
            prop_assert!(old.iter().eq(before.iter()), "an edit of a copy changes nothing");
            let mut rebuilt = before.clone();
            map.compare(&old, |k, o, n| {
                assert_eq!((o, n), (before.get(k), known.get(k)));
                match n {
                    Some(n) => drop(rebuilt.insert(*k, *n)),
                    None => drop(rebuilt.remove(k)),
                }
            });
            prop_assert_eq!(rebuilt, known);
        }
    }
}
