//! Whether two worlds are the same to all who ask.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use proptest::prelude::*;
use tidegate_policy::model::AddressSource;
use tidegate_policy::world::{Endpoint, Scope, Sight};
use tidegate_policy::{Proto, World};

use super::{ip, name};

/// All that can be asked of two worlds.
pub fn same(a: &World, b: &World, names: &[&str], ips: &[IpAddr]) -> Result<(), TestCaseError> {
    let class = |w: &World| {
        let each = w.scopes().values().flat_map(|s| {
            let learnt = s.class(ip("192.0.2.1"), &[name("a.x.com"), name("y.org")]);
            s.single_rule_classes().chain([learnt]).map(|c| (s.key(), c)).collect::<Vec<_>>()
        });
        each.collect::<Vec<_>>()
    };
    let (of_a, of_b) = (class(a), class(b));
    prop_assert_eq!(&of_a, &of_b);
    for (everything, here) in [(true, None), (true, Some("n1")), (false, Some("n1")), (false, Some("n2"))] {
        let sight = Sight { everything, here };
        let live = |s| of_a.iter().filter(move |(of, _)| *of == s).map(|(_, c)| *c);
        let parts = a.parts(sight, live);
        prop_assert_eq!(&parts, &b.parts(sight, live));
        let whole = b.endpoints().flat_map(|(ip, _)| b.seen(sight, ip).map(|e| (ip, e.into()))).collect();
        prop_assert_eq!(parts.endpoints, whole);
    }
    prop_assert_eq!(a.issues(), b.issues());
    prop_assert_eq!((a.now(), a.next_change()), (b.now(), b.next_change()));
    prop_assert_eq!(a.endpoints().count(), b.endpoints().count());
    for (ip, e) in b.endpoints() {
        let mine = a.endpoint(ip).expect("the same endpoints");
        // Where a group lies is each world's own affair.
        let member = |e: &Endpoint| e.member.map(|m| (m.scope, m.group));
        prop_assert_eq!((&mine.who, mine.touch, member(mine)), (&e.who, e.touch, member(e)));
        let [g, h] = [(a, mine), (b, e)].map(|(w, e)| (w.group_of(ip), e.member.and_then(|m| w.group_by_key(m.group))));
        prop_assert!(g.0.zip(g.1).is_none_or(|(x, y)| Arc::ptr_eq(x, y)));
        prop_assert!(h.0.zip(h.1).is_none_or(|(x, y)| Arc::ptr_eq(x, y)));
        prop_assert_eq!((g.0.is_some(), g.1.is_some()), (h.0.is_some(), h.1.is_some()));
    }
    prop_assert_eq!(a.groups().len(), b.groups().len());
    for (g, h) in a.groups().values().zip(b.groups().values()) {
        prop_assert_eq!((g.key(), g.touch(), g.audit()), (h.key(), h.touch(), h.audit()));
        prop_assert!(g.says_the_same(a.group(g.index()).expect("a group has a place")));
        let scopes = (g.scope(), h.scope());
        prop_assert_eq!((scopes.0.key(), scopes.0.uid()), (scopes.1.key(), scopes.1.uid()));
        prop_assert!(Arc::ptr_eq(scopes.0, a.scope(scopes.0.key()).expect("its scope")));
        prop_assert_eq!(a.groups_of(scopes.0.key()).count(), b.groups_of(scopes.0.key()).count());
        for n in names {
            prop_assert_eq!(g.name(n, 1), h.name(n, 1));
        }
        for to in ips {
            let [x, y] = [g, h].map(|g| g.connection(Some(&name("a.x.com")), *to, Proto::Tcp, 443));
            prop_assert_eq!((x.via, x.reason, x.rule), (y.via, y.reason, y.rule));
        }
    }
    for w in [a, b] {
        // One scope stands for all with the same way out.
        let way = |s: &Arc<Scope>| (s.pool().clone(), s.pair(), s.families(), *s.source() == AddressSource::PodNetwork);
        let mut all = BTreeMap::new();
        w.scopes().values().for_each(|s| *all.entry(way(s)).or_insert(0) += 1);
        prop_assert_eq!(w.ways().map(|(s, n)| (way(s), n)).collect::<BTreeMap<_, _>>(), all);
    }
    for to in ips {
        prop_assert_eq!(a.in_cluster(*to), b.in_cluster(*to));
    }
    Ok(())
}
