//! Random policies: what is pushed to kernels says the same as the decision about
//! one connection, DNS says the same as connections, and an incremental compile the same as a full one.

mod common;

use std::net::IpAddr;

use common::same::same;
use common::*;
use proptest::prelude::*;
use tidegate_policy::model::*;
use tidegate_policy::state::Touch;
use tidegate_policy::world::{Answer, Group};
use tidegate_policy::{Carry, Name, PortSet, Proto, Reason, Via, World, prefix, special};

const NAMES: &[&str] = &["a.x.com", "b.x.com", "c.b.x.com", "x.com", "y.org"];
const IPS: &[&str] = &["192.0.2.1", "192.0.2.9", "198.51.100.1", "169.254.169.254", "100.100.100.200", "2001:db8::1"];
const PORTS: &[u16] = &[0, 1, 80, 81, 443, 444, 852, 853, 854, 5432, 65535];

fn names() -> impl Strategy<Value = &'static str> {
    prop::sample::select(
        &["a.x.com", "b.x.com", "x.com", "*.x.com", "**.x.com", "*", "a*.x.com", "*.b.x.com", "y.org", "*x.com"][..],
    )
}

fn cidrs() -> impl Strategy<Value = &'static str> {
    prop::sample::select(
        &[
            "192.0.2.0/24",
            "192.0.2.0/24-192.0.2.1/32",
            "192.0.2.0/29-192.0.2.0/30",
            "192.0.2.9/32",
            "0.0.0.0/0",
            "0.0.0.0/0-192.0.0.0/8",
            "198.51.100.0/24",
            "169.254.169.254/32",
            "169.254.0.0/16",
            "100.64.0.0/10",
            "100.100.100.200/32",
            "::/0",
            "2001:db8::/32",
        ][..],
    )
}

fn ports(deny: bool) -> impl Strategy<Value = &'static str> {
    let all = ["443", "443/udp", "80-443", "0-65535", "0-65535/udp", "853", "5432", "1-852/udp", "any"];
    prop::sample::select(all[..if deny { 9 } else { 8 }].to_vec())
}

fn rules(deny: bool) -> impl Strategy<Value = Rule> {
    let to = prop_oneof![prop::collection::vec(names(), 1..3), prop::collection::vec(cidrs(), 1..3),];
    (to, prop::collection::vec(ports(deny), 1..3), any::<bool>(), any::<bool>(), 0..8i64).prop_map(
        |(to, ports, unchecked, ech, end)| {
            let mut r = rule("", &to, &ports);
            if unchecked && ech {
                r.sni = SniMode::Unchecked;
            }
            r.ech_allow = ech;
            r.expires = (end < 2).then_some(UnixSeconds(900 + 200 * end));
            r
        },
    )
}

fn numbered(rules: Vec<Rule>) -> Vec<Rule> {
    rules.into_iter().enumerate().map(|(i, r)| Rule { name: i.to_string().into(), ..r }).collect()
}

fn own() -> impl Strategy<Value = Policy> {
    (prop::collection::vec(rules(false), 0..4), prop::collection::vec(rules(true), 0..2), any::<bool>()).prop_map(
        |(allow, deny, web)| {
            let mut p = policy(numbered(allow), numbered(deny));
            if !web {
                p.pod_selector = selector(&[("app", "job")]);
            }
            p
        },
    )
}

fn clusters() -> impl Strategy<Value = ClusterPolicy> {
    let action = prop::sample::select(vec![Action::Deny, Action::Accept, Action::Pass]);
    let bound = (
        prop::collection::vec(names(), 0..3),
        prop::collection::vec(cidrs(), 0..3),
        prop::collection::vec(ports(false), 0..2),
        any::<bool>(),
    );
    (
        any::<bool>(),
        0..3u16,
        prop::collection::vec((action, rules(true)), 0..4),
        prop::option::weighted(0.3, bound),
        0..5u8,
    )
        .prop_map(|(admin, priority, rules, bound, who)| {
            let tier = if admin { Tier::Admin } else { Tier::Baseline };
            let rules = rules
                .into_iter()
                .enumerate()
                .map(|(i, (a, r))| (a, Rule { name: i.to_string().into(), ..r }))
                .collect();
            let mut p = cluster(tier, priority, rules);
            p.ceiling = bound.map(|(names, cidrs, ports, permit)| {
                let to: Vec<&str> = names.into_iter().chain(cidrs).collect();
                ceiling(&to, &ports, if permit { &[Permit::SniUnchecked, Permit::EchAllow] } else { &[] })
                    .ceiling
                    .expect("a ceiling")
            });
            match who {
                0 => p.pods = selector(&[("app", "job")]),
                1 => p.namespaces = selector(&[("env", "test")]),
                _ => {}
            }
            p
        })
}

fn objects() -> impl Strategy<Value = Objects> {
    let own = prop::collection::btree_map(prop::sample::select(vec!["p", "q"]), own(), 0..3);
    let cluster = prop::collection::btree_map(prop::sample::select(vec!["k", "l", "m", "n"]), clusters(), 0..4);
    (own, cluster, any::<bool>(), 0..4u8, any::<bool>()).prop_map(|(own, cluster, managed, audit, open)| {
        let mut o = shop().with_ns(|n| {
            n.managed = managed;
            n.audit = audit == 0;
        });
        if open {
            o.settings.dns_filter = DnsFilter::Open;
        }
        o.pods.insert(("shop".into(), "job".into()), pod("10.1.0.2", &[("app", "job")]));
        own.into_iter().for_each(|(n, p)| drop(o.policies.insert(("shop".into(), n.into()), p)));
        cluster.into_iter().for_each(|(n, p)| drop(o.cluster_policies.insert(n.into(), p)));
        o
    })
}

/// Steps 8 to 12 of the kernel's verdict, over what is pushed.
fn kernel(g: &Group, grant: Option<&PortSet>, ip: IpAddr, proto: Proto, port: u16) -> Via {
    let isolated = g.touch() == Touch::Isolated;
    let at = |set: Option<&(tidegate_policy::PrefixSetKey, std::sync::Arc<tidegate_policy::state::Prefixes>)>| {
        let (net, ports) = prefix::longest_match(&set?.1, ip)?;
        Some((net.prefix_len(), ports.get(proto, port)?))
    };
    if isolated {
        let range = special::METADATA.iter().find(|m| m.contains(&ip));
        let least = range.map_or(1, |m| m.prefix_len());
        if range.is_some() || port == special::ENCRYPTED_DNS {
            let accepted = at(g.admin_prefixes()).is_some_and(|(len, via)| len >= least && via != Via::Deny);
            if !accepted {
                return Via::Deny;
            }
            if range.is_some() {
                return Via::Pass;
            }
        }
    }
    grant
        .and_then(|s| s.get(proto, port))
        .or_else(|| at(g.admin_prefixes()).map(|(_, v)| v))
        .or_else(|| at(g.own_prefixes()).map(|(_, v)| v))
        .unwrap_or(if isolated { Via::Deny } else { Via::Pass })
}

/// What all names of an address come to, by asking for one connection after the other.
fn expected(g: &Group, names: &[Name], ip: IpAddr, proto: Proto, port: u16) -> Via {
    if names.is_empty() {
        return g.connection(None, ip, proto, port).via;
    }
    let each: Vec<_> = names.iter().map(|n| g.connection(Some(n), ip, proto, port)).collect();
    let any = |v: Via| each.iter().any(|d| d.via == v);
    let refused = each.iter().any(|d| d.reason == Reason::DeniedByPolicy);
    let forward = any(Via::Allow(Carry::Forward));
    match g.touch() {
        Touch::Isolated if any(Via::Allow(Carry::Tls)) => Via::Allow(Carry::Tls),
        Touch::Isolated if any(Via::Allow(Carry::Block)) => Via::Allow(Carry::Block),
        Touch::Isolated if forward && refused && proto == Proto::Tcp => Via::Allow(Carry::Tls),
        Touch::Isolated if forward && refused => Via::Deny,
        Touch::Isolated if forward => Via::Allow(Carry::Forward),
        Touch::Isolated => Via::Deny,
        _ if each.iter().all(|d| d.via == Via::Deny) => Via::Deny,
        _ => Via::Pass,
    }
}

fn check_group(g: &Group) -> Result<(), TestCaseError> {
    let sets: Vec<Vec<Name>> = [&[][..], &[0], &[1], &[2], &[4], &[0, 1], &[1, 4], &[0, 2, 4]]
        .iter()
        .map(|s| s.iter().map(|i| name(NAMES[*i])).collect())
        .collect();
    for address in IPS.iter().map(|a| ip(a)) {
        for names in &sets {
            if special::is_metadata(address) && !names.is_empty() {
                // Nothing ever binds such an address.
                continue;
            }
            let grant = (!names.is_empty()).then(|| g.grant(g.scope().class(address, names)).expect("registered"));
            for (proto, port) in PORTS.iter().flat_map(|p| [(Proto::Tcp, *p), (Proto::Udp, *p)]) {
                prop_assert_eq!(
                    kernel(g, grant.as_ref(), address, proto, port),
                    expected(g, names, address, proto, port),
                    "{} {:?} {:?} {} {:?}",
                    address,
                    names,
                    proto,
                    port,
                    grant
                );
            }
        }
    }
    Ok(())
}

/// Without prefix rules the name alone decides, so DNS has to say exactly what connections get.
fn check_ports(mut o: Objects) -> Result<(), TestCaseError> {
    for p in o.policies.values_mut() {
        p.egress.retain(|r| r.cidrs.is_empty());
        p.deny.retain(|r| r.cidrs.is_empty());
    }
    o.cluster_policies.values_mut().for_each(|p| p.rules.retain(|(_, r)| r.cidrs.is_empty()));
    for g in o.world().groups().values() {
        let isolated = g.touch() == Touch::Isolated;
        for n in NAMES {
            let d = g.name(n, 1);
            let mut refused = true;
            for (proto, port) in PORTS.iter().flat_map(|p| [(Proto::Tcp, *p), (Proto::Udp, *p)]) {
                if isolated && port == special::ENCRYPTED_DNS {
                    continue;
                }
                let via = g.connection(Some(&name(n)), ip("192.0.2.1"), proto, port).via;
                let default = if isolated { Via::Deny } else { Via::Pass };
                prop_assert_eq!(d.facts.ports.get(proto, port).unwrap_or(default), via);
                refused &= via == Via::Deny || port == 0;
            }
            if d.answer != Answer::Resolve || !isolated {
                prop_assert_eq!(!matches!(d.answer, Answer::Bind | Answer::Resolve), refused, "{} {:?}", n, d);
            }
        }
    }
    Ok(())
}

fn check_absence(g: &Group) -> Result<(), TestCaseError> {
    let resolves = |n: &str| matches!(g.a(n), Answer::Bind | Answer::Resolve);
    for n in NAMES.iter().filter(|n| g.a(n) == Answer::NxDomain) {
        for below in NAMES.iter().filter(|b| name(b).is_at_or_below(n)) {
            prop_assert!(!resolves(below), "{below} below {n}");
        }
        prop_assert!(!resolves(&format!("zz.{n}")) && !resolves(&format!("a.zz.{n}")), "below {n}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn kernels_dns_and_connections_agree(o in objects()) {
        for g in o.world().groups().values() {
            check_group(g)?;
            check_absence(g)?;
        }
        check_ports(o)?;
    }

    #[test]
    fn an_incremental_compile_equals_a_full_one(steps in prop::collection::vec((objects(), 0..4i64), 1..4)) {
        let mut world: Option<World> = None;
        for (o, t) in steps {
            let now = UnixSeconds(850 + 100 * t);
            let next = World::compile(&o, now, world.as_ref().map(|w| (w, Touched::ALL)));
            same(&next, &World::compile(&o, now, None), NAMES, &[])?;
            world = Some(next);
        }
    }
}
