//! What one scope has learnt: its names, its addresses, and which belong together.
//!
//! Two slabs with an index each. Facts live in the address, as (name, expiries);
//! the name only lists its addresses. Everything is as small as it can be,
//! because this is what a gateway with a million facts consists of.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use ahash::RandomState;
use hashbrown::HashTable;
use smallvec::SmallVec;
use tidegate_policy::{ClassKey, Name};

use crate::NodeId;
use crate::slab::Slab;
use crate::tick::Tick;

/// One fact, seen from its address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fact {
    /// The name's index.
    pub name: u32,
    /// The latest end of the RRset that was seen, at most `ttl_max` ahead of when it was seen.
    pub rrset: Tick,
    /// From when no new connection starts.
    pub expires: Tick,
}

/// A node whose kernel has the address, or will have it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Holder {
    pub node: NodeId,
    /// Low bits of the last push that had the entry: only its ack confirms.
    pub seq: u32,
    /// The kernel's expiry in that push; zero if the push is outdated.
    pub sent: Tick,
    /// The kernel's expiry that was acked; zero if none, or of another class.
    pub confirmed: Tick,
}

/// An address with its facts and holders. Without facts: a hole in the slab.
#[derive(Debug)]
pub(crate) struct Address {
    ip: [u8; 16],
    class: [u64; 2],
    pub facts: SmallVec<[Fact; 1]>,
    pub holders: SmallVec<[Holder; 1]>,
    /// When its timer fires; never later than its next event.
    pub armed: Tick,
    /// When it was last asked whether flows live.
    pub asked: Tick,
}

impl Default for Address {
    fn default() -> Self {
        Self {
            ip: [0; 16],
            class: [0; 2],
            facts: SmallVec::new(),
            holders: SmallVec::new(),
            armed: Tick::MAX,
            asked: Tick::ZERO,
        }
    }
}

impl Address {
    pub fn ip(&self) -> IpAddr {
        unpack(self.ip)
    }

    pub fn class(&self) -> ClassKey {
        ClassKey(u128::from(self.class[0]) << 64 | u128::from(self.class[1]))
    }

    pub fn set_class(&mut self, class: ClassKey) {
        self.class = [(class.0 >> 64) as u64, class.0 as u64];
    }

    pub fn fact_mut(&mut self, name: u32) -> Option<&mut Fact> {
        self.facts.iter_mut().find(|f| f.name == name)
    }

    pub fn holder(&self, node: NodeId) -> Option<&Holder> {
        self.holders.iter().find(|h| h.node == node)
    }

    pub fn holder_mut(&mut self, node: NodeId) -> Option<&mut Holder> {
        self.holders.iter_mut().find(|h| h.node == node)
    }

    /// Adds a holder that was sent nothing yet.
    pub fn hold(&mut self, node: NodeId) {
        self.holders.push(Holder { node, seq: 0, sent: Tick::ZERO, confirmed: Tick::ZERO });
    }

    /// Whether some fact has expired.
    pub fn has_expired(&self, now: Tick) -> bool {
        self.facts.iter().any(|f| f.expires <= now)
    }

    /// When the gateway's own kernel expires it: with its last fact.
    pub fn expires(&self) -> Tick {
        self.facts.iter().map(|f| f.expires).max().unwrap_or(Tick::ZERO)
    }

    /// When something is to do: a fact expires, is to be asked about, or is to be swept.
    pub fn next_event(&self, now: Tick, recheck: Duration, sweep: Duration) -> Tick {
        let due = |f: &Fact| {
            if f.expires > now {
                f.expires
            } else if self.asked < f.expires || self.asked == Tick::ZERO {
                now
            } else {
                f.expires.plus(sweep).min(self.asked.plus(recheck))
            }
        };
        self.facts.iter().map(due).min().unwrap_or(Tick::MAX)
    }
}

/// A name and the indices of its addresses. Without addresses: a hole in the slab, or just being filled.
#[derive(Debug, Default)]
pub(crate) struct Named {
    name: Option<Name>,
    pub addresses: SmallVec<[u32; 4]>,
}

impl Named {
    pub fn name(&self) -> Option<&Name> {
        self.name.as_ref()
    }
}

/// An address in one form for both families.
pub(crate) fn pack(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(a) => a.to_ipv6_mapped().octets(),
        IpAddr::V6(a) => a.octets(),
    }
}

/// Mapped addresses are IPv4 addresses.
pub(crate) fn unpack(ip: [u8; 16]) -> IpAddr {
    Ipv6Addr::from(ip).to_canonical()
}

/// The tables of a scope.
#[derive(Debug, Default)]
pub(crate) struct Table {
    names: Slab<Named>,
    addresses: Slab<Address>,
    by_name: HashTable<u32>,
    by_ip: HashTable<u32>,
}

impl Table {
    pub fn find_name(&self, hash: &RandomState, name: &str) -> Option<u32> {
        let same = |&i: &u32| self.names.get(i).and_then(Named::name).is_some_and(|n| n.as_str() == name);
        self.by_name.find(hash.hash_one(name), same).copied()
    }

    /// Adds a name that is not there yet.
    pub fn insert_name(&mut self, hash: &RandomState, name: Name) -> u32 {
        let h = hash.hash_one(name.as_str());
        let i = self.names.insert(Named { name: Some(name), addresses: SmallVec::new() });
        let names = &self.names;
        self.by_name
            .insert_unique(h, i, |&j| hash.hash_one(names.get(j).and_then(Named::name).map_or("", Name::as_str)));
        i
    }

    pub fn remove_name(&mut self, hash: &RandomState, i: u32) {
        let Some(name) = self.names.remove(i).name else { return };
        if let Ok(e) = self.by_name.find_entry(hash.hash_one(name.as_str()), |&j| j == i) {
            e.remove();
        }
    }

    pub fn find_ip(&self, hash: &RandomState, ip: [u8; 16]) -> Option<u32> {
        let same = |&i: &u32| self.addresses.get(i).is_some_and(|a| a.ip == ip);
        self.by_ip.find(hash.hash_one(ip), same).copied()
    }

    /// Adds an address that is not there yet.
    pub fn insert_ip(&mut self, hash: &RandomState, ip: [u8; 16]) -> u32 {
        let i = self.addresses.insert(Address { ip, ..Address::default() });
        let addresses = &self.addresses;
        self.by_ip.insert_unique(hash.hash_one(ip), i, |&j| hash.hash_one(addresses.get(j).map_or([0; 16], |a| a.ip)));
        i
    }

    pub fn remove_ip(&mut self, hash: &RandomState, i: u32) -> Address {
        let gone = self.addresses.remove(i);
        if let Ok(e) = self.by_ip.find_entry(hash.hash_one(gone.ip), |&j| j == i) {
            e.remove();
        }
        gone
    }

    pub fn name(&self, i: u32) -> Option<&Named> {
        self.names.get(i)
    }

    pub fn name_mut(&mut self, i: u32) -> Option<&mut Named> {
        self.names.get_mut(i)
    }

    /// The address, unless the index is a hole.
    pub fn address(&self, i: u32) -> Option<&Address> {
        self.addresses.get(i).filter(|a| !a.facts.is_empty())
    }

    /// The address, unless the index is a hole.
    pub fn address_mut(&mut self, i: u32) -> Option<&mut Address> {
        self.addresses.get_mut(i).filter(|a| !a.facts.is_empty())
    }

    /// The address, also while it has no facts.
    pub fn slot_mut(&mut self, i: u32) -> Option<&mut Address> {
        self.addresses.get_mut(i)
    }

    /// One past the highest address index.
    pub fn end(&self) -> u32 {
        self.addresses.end()
    }

    pub fn names(&self) -> usize {
        self.names.len()
    }

    pub fn addresses(&self) -> usize {
        self.addresses.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_are_as_small_as_they_were_planned() {
        assert!(size_of::<Address>() <= 88, "{}", size_of::<Address>());
        assert!(size_of::<Named>() <= 40, "{}", size_of::<Named>());
    }
}
