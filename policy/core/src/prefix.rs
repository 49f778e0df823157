//! Flattened prefixes: every prefix carries what holds for its addresses, with the
//! rules of all of its ancestors and minus exceptions, so that the longest match alone decides.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::eval::{Hits, Rules};
use crate::key::KeyHasher;
use crate::layer::{CRule, Says};
use crate::port::Proto;
use crate::special::{METADATA, metadata_range};
use crate::state::Prefixes;
use crate::{Carry, PortSet, PrefixSetKey, Via};

/// Which half of the order a prefix set holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Half {
    /// The Admin tier.
    Admin,
    /// Own policies, or the Baseline tier.
    Rest,
}

/// The prefix set of one half for one group.
pub(crate) fn flatten(rules: &Rules<'_>, half: Half) -> Prefixes {
    let mut points: BTreeSet<IpNet> = BTreeSet::new();
    let mut add = |r: &CRule| {
        for c in &r.cidrs {
            points.insert(c.cidr.trunc());
            points.extend(c.except.iter().map(IpNet::trunc));
        }
    };
    let s = rules.selection;
    let mut cluster: Vec<u32> = Vec::new();
    match half {
        Half::Admin => cluster.extend(s.admin.iter().map(|(_, id)| *id)),
        Half::Rest if s.own.is_empty() => cluster.extend(s.baseline.iter().map(|(_, id)| *id)),
        Half::Rest => {
            for id in &s.own {
                rules.own.policy(*id).rules.clone().for_each(|r| add(rules.own.rule(r)));
            }
            for id in &s.ceilings {
                rules.cluster.policy(*id).ceiling.iter().for_each(|c| add(rules.cluster.rule(c.cidrs)));
            }
        }
    }
    for id in cluster {
        for r in rules.cluster.policy(id).rules.clone() {
            let r = rules.cluster.rule(r);
            if !matches!(r.says, Says::CeilingNames | Says::CeilingCidrs) {
                add(r);
            }
        }
    }
    if rules.isolated {
        let inner: Vec<IpNet> = METADATA.iter().filter(|m| points.iter().any(|p| p.contains(*m))).copied().collect();
        points.extend(inner);
    }
    // Ancestors first: a prefix that says the same as the nearest one above it is not needed.
    let mut order: Vec<IpNet> = points.into_iter().collect();
    order.sort_by_key(|n| (n.prefix_len(), *n));
    let mut out = Prefixes::new();
    for net in order {
        let hits = rules.cidr_hits(net, |_| true);
        let set = half_set(rules, half, &hits, rules.isolated && metadata_range(&net).is_some());
        let above = (0..net.prefix_len())
            .rev()
            .find_map(|len| IpNet::new(net.addr(), len).ok().and_then(|n| out.get(&n.trunc())));
        if above.map_or(!set.is_empty(), |a| *a != set) {
            out.insert(net, set);
        }
    }
    out
}

fn half_set(rules: &Rules<'_>, half: Half, hits: &Hits, local: bool) -> PortSet {
    let of = |proto: Proto, port: u16| {
        let o = match half {
            Half::Admin => rules.admin(hits, proto, port, &mut None),
            Half::Rest => rules.rest(hits, proto, port, &mut None),
        };
        rules.via(&o, proto, port, local)
    };
    Rules::port_set(&rules.cuts(&[hits]), of)
}

/// The longest match.
pub fn longest_match(prefixes: &Prefixes, ip: IpAddr) -> Option<(IpNet, &PortSet)> {
    let bits = if ip.is_ipv4() { 32 } else { 128 };
    (0..=bits).rev().find_map(|len| {
        let net = IpNet::new(ip, len).ok()?.trunc();
        prefixes.get(&net).map(|set| (net, set))
    })
}

/// The identity of a set by its content; `None` for an empty one, which nobody needs.
pub fn key_of(prefixes: &Prefixes) -> Option<PrefixSetKey> {
    if prefixes.is_empty() {
        return None;
    }
    let mut h = KeyHasher::new("prefixes");
    for (net, set) in prefixes {
        h = match net.addr() {
            IpAddr::V4(a) => h.field(&a.octets()),
            IpAddr::V6(a) => h.field(&a.octets()),
        };
        h = h.field(&[net.prefix_len()]);
        for r in set.ranges() {
            let via = match r.via {
                Via::Allow(Carry::Forward) => 1u8,
                Via::Allow(Carry::Tls) => 2,
                Via::Allow(Carry::Block) => 3,
                Via::Deny => 4,
                Via::Pass => 5,
            };
            let [a, b] = r.lo.to_be_bytes();
            let [c, d] = r.hi.to_be_bytes();
            h = h.field(&[r.proto as u8, a, b, c, d, via]);
        }
    }
    Some(PrefixSetKey(h.finish()))
}
