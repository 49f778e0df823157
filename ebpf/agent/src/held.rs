//! The gateway that is plugged in on this node, and the egress addresses that it
//! holds: leases that its renewals prolong, and announcements when they begin.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;

/// How long an address is held after a renewal.
pub const LEASE: Duration = Duration::from_secs(2);
/// How often a new address is announced: frames get lost.
const ROUNDS: u8 = 3;
/// Time between announcements.
const BETWEEN: Duration = Duration::from_millis(700);

/// What to do after a renewal or a change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Hold these for [`LEASE`].
    pub hold: Vec<IpAddr>,
    /// Let these go.
    pub release: Vec<IpAddr>,
}

/// The leases of one gateway. Pure: it says what to do.
#[derive(Debug, Default)]
pub struct Leases {
    held: BTreeMap<IpAddr, Announcing>,
}

#[derive(Debug)]
struct Announcing {
    left: u8,
    next: Instant,
}

impl Leases {
    /// The gateway wants these; `allowed` is the node's own view of ownership.
    pub fn renew(&mut self, wanted: &[IpAddr], allowed: bool, now: Instant) -> Change {
        let wanted: BTreeSet<IpAddr> = if allowed { wanted.iter().copied().collect() } else { BTreeSet::new() };
        let release: Vec<IpAddr> = self.held.keys().filter(|a| !wanted.contains(a)).copied().collect();
        for a in &release {
            self.held.remove(a);
        }
        for a in &wanted {
            self.held.entry(*a).or_insert(Announcing { left: ROUNDS, next: now });
        }
        Change { hold: wanted.into_iter().collect(), release }
    }

    /// The connection ended, or ownership moved.
    pub fn end(&mut self) -> Vec<IpAddr> {
        std::mem::take(&mut self.held).into_keys().collect()
    }

    /// Addresses to announce now.
    pub fn due(&mut self, now: Instant) -> Vec<IpAddr> {
        let mut out = Vec::new();
        for (address, a) in self.held.iter_mut().filter(|(_, a)| a.left > 0 && a.next <= now) {
            a.left -= 1;
            a.next = now + BETWEEN;
            out.push(*address);
        }
        out
    }

    /// How many are held.
    pub fn len(&self) -> usize {
        self.held.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u8) -> IpAddr {
        [203, 0, 113, last].into()
    }

    #[test]
    fn addresses_come_and_go_with_renewals() {
        let mut l = Leases::default();
        let now = Instant::now();
        assert_eq!(l.renew(&[ip(1), ip(2)], true, now), Change { hold: vec![ip(1), ip(2)], release: vec![] });
        assert_eq!(l.renew(&[ip(2)], true, now), Change { hold: vec![ip(2)], release: vec![ip(1)] });
        assert_eq!(l.renew(&[ip(2)], false, now), Change { hold: vec![], release: vec![ip(2)] });
        l.renew(&[ip(3)], true, now);
        assert_eq!(l.end(), vec![ip(3)]);
        assert_eq!(l.len(), 0);
    }

    #[test]
    fn only_a_new_address_is_announced_and_some_times() {
        let mut l = Leases::default();
        let mut now = Instant::now();
        let mut rounds = 0;
        for _ in 0..20 {
            l.renew(&[ip(1)], true, now);
            rounds += l.due(now).len();
            assert!(l.due(now).is_empty());
            now += Duration::from_millis(500);
        }
        assert_eq!(rounds, usize::from(ROUNDS));
        l.renew(&[], true, now);
        l.renew(&[ip(1)], true, now);
        assert_eq!(l.due(now), vec![ip(1)], "it was let go meanwhile: it begins anew");
    }
}
