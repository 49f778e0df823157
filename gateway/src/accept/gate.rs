//! Who of those that want a certificate is listened to. Pure: time is an argument.
//!
//! Pods can reach the port as well as nodes. So that they keep no node out, nodes have places of their own: by the address
//! of the connection, which a pod cannot take, or by the certificate that they still have.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

/// How many may come at once, and the time after which another one may.
#[derive(Clone, Copy, Debug)]
struct Rate {
    burst: u32,
    spacing: Duration,
}

/// Of one address that is no node's. An agent tries again after a second, then after two, four, ...
const STRANGER: Rate = Rate { burst: 6, spacing: Duration::from_secs(4) };
/// Of all of those together.
const STRANGERS: Rate = Rate { burst: 64, spacing: Duration::from_millis(60) };
/// Of one node's address.
const NODE: Rate = Rate { burst: 32, spacing: Duration::from_secs(1) };
/// Addresses are looked through for idle ones when there are so many.
const MANY: usize = 1024;

/// A token bucket, as the time at which it is full again.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket(Duration);

impl Bucket {
    fn has(self, rate: Rate, now: Duration) -> bool {
        self.0.saturating_sub(now) <= rate.spacing * (rate.burst - 1)
    }

    fn take(&mut self, rate: Rate, now: Duration) {
        self.0 = self.0.max(now) + rate.spacing;
    }
}

/// Counts who came lately. Times are local, since any moment.
#[derive(Debug, Default)]
pub struct Gate {
    all: Bucket,
    each: BTreeMap<IpAddr, Bucket>,
}

impl Gate {
    /// Whether a connection from this address may ask now; one that may not costs nothing.
    pub fn admits(&mut self, from: IpAddr, node: bool, now: Duration) -> bool {
        let rate = if node { NODE } else { STRANGER };
        let mut own = self.each.get(&from).copied().unwrap_or_default();
        if !own.has(rate, now) || !(node || self.all.has(STRANGERS, now)) {
            return false;
        }
        own.take(rate, now);
        if !node {
            self.all.take(STRANGERS, now);
        }
        if self.each.len() >= MANY {
            self.each.retain(|_, b| b.0 > now);
        }
        self.each.insert(from, own);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(n: u32) -> IpAddr {
        std::net::Ipv4Addr::from(n).into()
    }

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn one_address_asks_a_few_times() {
        let mut gate = Gate::default();
        let burst = |gate: &mut Gate, at| (0..100).filter(|_| gate.admits(ip(1), false, at)).count();
        assert_eq!((burst(&mut gate, s(0)), burst(&mut gate, s(8)), burst(&mut gate, s(9))), (6, 2, 0));
        // Others feel nothing of it.
        assert!(gate.admits(ip(2), false, s(9)));
        assert_eq!(burst(&mut gate, s(1000)), 6);
    }

    #[test]
    fn many_addresses_leave_nodes_alone() {
        let mut gate = Gate::default();
        let came = (0..5000).filter(|n| gate.admits(ip(*n), false, s(0))).count();
        assert_eq!(came, STRANGERS.burst as usize);
        let nodes = (0..100).filter(|n| gate.admits(ip(10_000 + n), true, s(0))).count();
        assert_eq!(nodes, 100);
        assert_eq!((0..100).filter(|_| gate.admits(ip(9_999), true, s(0))).count(), NODE.burst as usize);
    }

    #[test]
    fn memory_has_an_end() {
        let mut gate = Gate::default();
        for n in 0..100_000 {
            gate.admits(ip(n), false, Duration::from_millis(u64::from(n) * 20));
        }
        assert!(gate.each.len() <= MANY, "{}", gate.each.len());
    }
}
