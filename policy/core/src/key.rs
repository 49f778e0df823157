//! Stable 128-bit identities.
//!
//! The same inputs give the same key on every replica and after every restart,
//! so that keys can travel on the wire and be compared between gateways.
//! Machines map them to dense ids of their own for kernel maps.

use std::fmt;

/// FNV-1a with 128 bits (draft-eastlake-fnv): stable, dependency-free, and fed
/// only with values that an administrator wrote, never with hostile bytes.
#[derive(Clone, Copy, Debug)]
pub struct KeyHasher(u128);

const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;

impl KeyHasher {
    /// Starts a hash in a domain of its own, so that equal inputs of different kinds differ.
    pub fn new(domain: &str) -> Self {
        Self(OFFSET).field(domain.as_bytes())
    }

    /// Adds one field; fields are length-prefixed, so that `("ab","c")` differs from `("a","bc")`.
    #[must_use]
    pub fn field(self, bytes: &[u8]) -> Self {
        let mut h = self.0;
        for b in (bytes.len() as u64).to_be_bytes().iter().chain(bytes) {
            h = (h ^ u128::from(*b)).wrapping_mul(PRIME);
        }
        Self(h)
    }

    /// The finished 128 bits, mixed so that truncated prefixes are usable too.
    pub fn finish(self) -> u128 {
        let h = self.0;
        (h ^ (h >> 67)).wrapping_mul(PRIME | (0x9e37_79b9_7f4a_7c15_u128 << 64))
    }
}

macro_rules! key {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u128);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }
    };
}

key!(
    /// A scope: (namespace UID, pool). The unit of learning, quota and ownership.
    ScopeKey
);
key!(
    /// A group: endpoints of one scope that exactly the same policies select.
    GroupKey
);
key!(
    /// A class: the set of rules that an IP and the names bound to it match.
    ClassKey
);
key!(
    /// A flattened prefix set, identified by its content, so that groups share it.
    PrefixSetKey
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_do_not_run_together() {
        let a = KeyHasher::new("x").field(b"ab").field(b"c").finish();
        let b = KeyHasher::new("x").field(b"a").field(b"bc").finish();
        let c = KeyHasher::new("y").field(b"ab").field(b"c").finish();
        assert_ne!(a, b);
        assert_ne!(a, c);
        assert_eq!(a, KeyHasher::new("x").field(b"ab").field(b"c").finish());
    }
}
