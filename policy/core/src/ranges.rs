//! A set of addresses that is asked on hot paths: sorted ranges that do not touch.

use std::net::IpAddr;

use ipnet::IpNet;

/// The addresses of some prefixes. Asking costs a binary search, however many there were.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ranges {
    /// First and last address of each, sorted.
    v4: Vec<(u32, u32)>,
    v6: Vec<(u128, u128)>,
}

/// Sorts, and joins what overlaps or touches.
fn join<T: Copy + Ord>(ranges: &mut Vec<(T, T)>, next: impl Fn(T) -> Option<T>) {
    ranges.sort_unstable();
    ranges.dedup_by(|b, a| {
        let joined = next(a.1).is_none_or(|n| b.0 <= n);
        if joined {
            a.1 = a.1.max(b.1);
        }
        joined
    });
    ranges.shrink_to_fit();
}

fn holds<T: Ord>(ranges: &[(T, T)], ip: &T) -> bool {
    ranges.partition_point(|r| r.0 <= *ip).checked_sub(1).is_some_and(|i| *ip <= ranges[i].1)
}

impl Ranges {
    /// Whether one of the prefixes holds the address.
    pub fn contains(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => holds(&self.v4, &u32::from(ip)),
            IpAddr::V6(ip) => holds(&self.v6, &u128::from(ip)),
        }
    }
}

impl FromIterator<IpNet> for Ranges {
    fn from_iter<I: IntoIterator<Item = IpNet>>(nets: I) -> Self {
        let mut all = Self::default();
        for net in nets {
            match net {
                IpNet::V4(n) => all.v4.push((n.network().into(), n.broadcast().into())),
                IpNet::V6(n) => all.v6.push((n.network().into(), n.broadcast().into())),
            }
        }
        join(&mut all.v4, |n| n.checked_add(1));
        join(&mut all.v6, |n| n.checked_add(1));
        all
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn borders_are_inside_and_families_apart() {
        let nets = ["0.0.0.0/8", "255.255.255.255/32", "10.1.2.3/24", "10.1.3.0/24", "fd00::/8", "ffff::/16"];
        let r: Ranges = nets.iter().map(|n| n.parse::<IpNet>().unwrap()).collect();
        assert_eq!((r.v4.len(), r.v6.len()), (3, 2));
        for (ip, inside) in [
            ("0.0.0.0", true),
            ("1.0.0.0", false),
            ("10.1.1.255", false),
            ("10.1.2.0", true),
            ("10.1.3.255", true),
            ("10.1.4.0", false),
            ("255.255.255.255", true),
            ("fcff::", false),
            ("fdff::1", true),
            ("ffff:ffff::", true),
            ("::ffff:10.1.2.3", false),
        ] {
            assert_eq!(r.contains(ip.parse().unwrap()), inside, "{ip}");
        }
        assert!(!Ranges::default().contains("::".parse().unwrap()));
    }

    proptest! {
        #[test]
        fn the_ranges_agree_with_the_prefixes(
            nets in proptest::collection::vec((any::<[u8; 2]>(), 0u8..=16), 0..12),
            ips in proptest::collection::vec(any::<[u8; 2]>(), 1..40),
        ) {
            for v6 in [false, true] {
                let wide = |b: [u8; 2]| {
                    if v6 { IpAddr::from([b[0], b[1], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]) }
                    else { IpAddr::from([b[0], b[1], 0, 0]) }
                };
                let nets: Vec<IpNet> = nets.iter().filter_map(|(b, len)| IpNet::new(wide(*b), *len).ok()).collect();
                let ranges: Ranges = nets.iter().copied().collect();
                for ip in ips.iter().map(|b| wide(*b)) {
                    prop_assert_eq!(ranges.contains(ip), nets.iter().any(|n| n.contains(&ip)), "{}", ip);
                }
            }
        }
    }
}
