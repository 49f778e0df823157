//! Who the gateways are, and in which order they may hold a pair.

use std::net::IpAddr;

use tidegate_kubernetes::members::Member;
use tidegate_proto::Pair;

use crate::config::{Config, Owner};

/// Who the gateways are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Members {
    /// Those that there are.
    pub listed: Vec<Member>,
    /// Those that were, and may still hold something.
    pub lingering: Vec<Member>,
}

impl Members {
    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &Member> {
        self.listed.iter().chain(&self.lingering)
    }
}

/// The gateways of the configuration.
pub fn configured(config: &Config) -> Vec<Member> {
    let member = |g: &crate::config::Replica| Member {
        name: g.name.clone(),
        node: g.node.clone(),
        addresses: g.address.into_iter().collect(),
        terminating: false,
    };
    config.gateways.iter().map(member).collect()
}

/// All gateways in the order in which a pair falls to them: the one that it is pinned to, then those that are `near`, else
/// rendezvous order (the highest hash of gateway, pool and pair first).
pub fn order<'m>(members: &'m [Member], owners: &[Owner], pair: &Pair, near: impl Fn(&str) -> bool) -> Vec<&'m Member> {
    let pinned = pinned(owners, pair);
    let text = format!("{:?}/{:?}", pair.ipv4.map(IpAddr::from), pair.ipv6.map(IpAddr::from));
    let rank = |m: &Member| {
        let hash = tidegate_policy::key::KeyHasher::new("owner")
            .field(m.name.as_bytes())
            .field(pair.pool.as_bytes())
            .field(text.as_bytes())
            .finish();
        (pinned == Some(&m.name), near(&m.name), hash)
    };
    let mut all: Vec<&Member> = members.iter().collect();
    all.sort_by_key(|m| std::cmp::Reverse(rank(m)));
    all
}

/// Those of them that may hold the pair: on nodes that its pool takes, or pinned to it. Gateways without an address stand
/// alone: nobody takes over from them or for them.
pub fn candidates(order: &[&Member], owners: &[Owner], pair: &Pair, takes: impl Fn(&str) -> bool) -> Vec<String> {
    let pinned = pinned(owners, pair);
    let able = order.iter().filter(|m| pinned == Some(&m.name) || takes(&m.node));
    let mut out: Vec<&&Member> = able.collect();
    let alone = |m: &Member| m.addresses.is_empty();
    if out.first().is_some_and(|m| alone(m)) {
        out.truncate(1);
    } else {
        out.retain(|m| !alone(m));
    }
    out.into_iter().map(|m| m.name.clone()).collect()
}

fn pinned<'o>(owners: &'o [Owner], pair: &Pair) -> Option<&'o String> {
    let owner = owners.iter().find(|o| {
        o.pool == pair.pool
            && (o.ipv4.is_some() && o.ipv4 == pair.ipv4 || o.ipv4.is_none() && o.ipv6.is_some() && o.ipv6 == pair.ipv6)
    });
    owner.map(|o| &o.gateway)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn pair(last: u8) -> Pair {
        Pair { pool: "p".into(), ipv4: Some([203, 0, 113, last].into()), ipv6: None }
    }

    fn member(name: &str, address: bool) -> Member {
        let addresses = address.then(|| "192.0.2.1:7443".parse().unwrap()).into_iter().collect();
        Member { name: name.into(), node: format!("n-{name}"), addresses, terminating: false }
    }

    fn names(members: &[Member], owners: &[Owner], last: u8, takes: impl Fn(&str) -> bool) -> Vec<String> {
        candidates(&order(members, owners, &pair(last), |_| false), owners, &pair(last), takes)
    }

    #[test]
    fn pairs_are_spread_and_pinned_ones_go_where_they_belong() {
        let members = ["gw-a", "gw-b", "gw-c"].map(|n| member(n, true));
        let pin =
            |gateway: &str| [Owner { pool: "p".into(), ipv4: pair(10).ipv4, ipv6: None, gateway: gateway.to_owned() }];
        for gateway in ["gw-a", "gw-b", "gw-c"] {
            let found = names(&members, &pin(gateway), 10, |_| true);
            assert_eq!((found[0].as_str(), found.len()), (gateway, 3));
            // Also on a node that the pool does not take.
            assert_eq!(names(&members, &pin(gateway), 10, |_| false), [gateway]);
        }
        // Only then to whom the pair is near.
        let near = order(&members, &pin("gw-c"), &pair(10), |g| g == "gw-b");
        assert_eq!(near.iter().map(|m| m.name.as_str()).collect::<Vec<_>>(), ["gw-c", "gw-b", "gw-a"]);
        let firsts: BTreeSet<String> = (0..64).map(|i| names(&members, &[], i, |_| true).remove(0)).collect();
        assert_eq!(firsts.len(), 3);
        // Whoever comes or goes moves only pairs that fall to it, and the list's own order says nothing.
        let without: Vec<Member> = members[..2].iter().rev().cloned().collect();
        for i in 0..64 {
            let mut before = names(&members, &[], i, |_| true);
            before.retain(|n| n != "gw-c");
            assert_eq!(before, names(&without, &[], i, |_| true));
        }
    }

    #[test]
    fn only_nodes_that_the_pool_takes() {
        let members = ["gw-a", "gw-b", "gw-c"].map(|n| member(n, true));
        let all = names(&members, &[], 1, |_| true);
        let some = names(&members, &[], 1, |n| n != "n-gw-b");
        assert_eq!(some, all.into_iter().filter(|n| n != "gw-b").collect::<Vec<_>>());
        assert!(names(&members, &[], 1, |_| false).is_empty());
    }

    #[test]
    fn without_addresses_nobody_takes_over() {
        let alone = ["gw-a", "gw-b"].map(|n| member(n, false));
        let first = order(&alone, &[], &pair(1), |_| false)[0].name.clone();
        assert_eq!(names(&alone, &[], 1, |_| true), std::slice::from_ref(&first));
        let mixed = ["gw-a", "gw-b"].map(|n| member(n, n == first));
        assert_eq!(names(&mixed, &[], 1, |_| true), [first]);
    }
}
