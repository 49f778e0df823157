//! Dense ids for 128-bit identities, kept in a pinned map: a restarted process finds the same
//! ids, and no id is used again while something may still refer to it.

use tidegate_ebpf_common::layout::IdKey;
use tidegate_policy::key::KeyHasher;

use crate::Error;
use crate::table::Hashed;

/// What an id names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Kind {
    Node = 1,
    Gateway = 2,
    Scope = 3,
    Group = 4,
    Class = 5,
    Prefixes = 6,
}

/// Marks the entry of a kind that holds its next free id.
const NEXT: u32 = 0x100;

pub(crate) struct Ids {
    table: Hashed<IdKey, u32>,
}

/// Whether the entry counts the ids that were given, and names none.
pub(crate) fn is_counter(key: &IdKey) -> bool {
    key.kind & NEXT != 0
}

/// The entry that says that the set of maps gives ids by itself: whatever was to be taken over has been. No kind's counter
/// has this key.
pub(crate) const OWN: IdKey = IdKey { kind: NEXT, key: [0; 4] };

fn key(kind: u32, key: u128) -> IdKey {
    let b = key.to_ne_bytes();
    let word = |i: usize| u32::from_ne_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
    IdKey { kind, key: [word(0), word(4), word(8), word(12)] }
}

impl Ids {
    pub fn new(table: Hashed<IdKey, u32>) -> Self {
        Self { table }
    }

    /// The id of an identity if it has one.
    pub fn find(&self, kind: Kind, identity: u128) -> Option<u32> {
        self.table.get(&key(kind as u32, identity)).copied()
    }

    /// How many entries it has, the counters among them.
    pub fn len(&self) -> usize {
        self.table.iter().count()
    }

    /// All ids of a kind with their identities.
    pub fn all(&self, kind: Kind) -> impl Iterator<Item = (u32, u128)> {
        self.table.iter().filter(move |(k, _)| k.kind == kind as u32).map(|(k, id)| {
            let mut bytes = [0; 16];
            for (to, word) in bytes.chunks_exact_mut(4).zip(k.key) {
                to.copy_from_slice(&word.to_ne_bytes());
            }
            (*id, u128::from_ne_bytes(bytes))
        })
    }

    /// The id of an identity; a new one if it has none.
    pub fn get(&mut self, kind: Kind, identity: u128) -> Result<u32, Error> {
        if let Some(id) = self.find(kind, identity) {
            return Ok(id);
        }
        let next = key(kind as u32 | NEXT, 0);
        let id = self.table.get(&next).copied().unwrap_or(1);
        // The counter moves first: a crash in between loses an id and never gives one twice.
        let after = id.checked_add(1).ok_or_else(|| Error::Capacity("the dense ids are used up".into()))?;
        self.table.set(next, after)?;
        self.table.set(key(kind as u32, identity), id)?;
        Ok(id)
    }

    /// The id of a name.
    pub fn named(&mut self, kind: Kind, name: &str) -> Result<u32, Error> {
        self.get(kind, named(kind, name))
    }

    /// The id of a name if it has one.
    pub fn find_named(&self, kind: Kind, name: &str) -> Option<u32> {
        self.find(kind, named(kind, name))
    }

    /// Writes back what others changed or deleted; returns in how many entries.
    pub fn restore(&mut self) -> Result<usize, Error> {
        self.table.restore()
    }

    /// Forgets identities whose id `used` does not name. Ids of forgotten identities are not used again.
    pub fn retain(&mut self, used: impl Fn(u32, u32) -> bool) -> Result<usize, Error> {
        let gone: Vec<IdKey> =
            self.table.iter().filter(|(k, id)| !is_counter(k) && !used(k.kind, **id)).map(|(k, _)| *k).collect();
        for k in &gone {
            self.table.delete(k)?;
        }
        Ok(gone.len())
    }
}

fn named(kind: Kind, name: &str) -> u128 {
    let domain = match kind {
        Kind::Node => "node",
        _ => "gateway",
    };
    KeyHasher::new(domain).field(name.as_bytes()).finish()
}
