//! Random sequences of edits: a world that is compiled from the one before it and from what was touched is the same as
//! one that is compiled from nothing, and says of itself what has changed.
#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use common::same::same;
use common::*;
use proptest::prelude::*;
use tidegate_policy::World;
use tidegate_policy::model::*;
use tidegate_policy::world::IssueReason;

const SPACES: [&str; 4] = ["aaa", "shop", "team", "zoo"];
const NAMES: &[&str] = &["a.x.com", "b.x.com", "y.org"];

/// One edit: what, where, and how.
#[derive(Clone, Debug)]
struct Edit {
    what: u8,
    space: usize,
    which: usize,
    how: u8,
}

fn edits() -> impl Strategy<Value = Edit> {
    // Mostly pods.
    let what = prop_oneof![6 => 0..2u8, 5 => 2..10u8];
    (what, 0..SPACES.len(), 0..4usize, any::<u8>()).prop_map(|(what, space, which, how)| Edit {
        what,
        space,
        which,
        how,
    })
}

fn flag(e: &Edit, n: u8) -> bool {
    e.how & (1 << n) != 0
}

fn own_policy(e: &Edit) -> Policy {
    let mut r = rule("r", &[["a.x.com", "*.x.com", "y.org", "192.0.2.0/24"][e.which]], &["443"]);
    r.expires = flag(e, 0).then_some(UnixSeconds(1000 + 100 * i64::from(e.how >> 6)));
    r.sni = if flag(e, 1) { SniMode::Unchecked } else { SniMode::Required };
    let mut p = policy(vec![r], vec![]);
    p.created = UnixSeconds(i64::from(e.how >> 5));
    if flag(e, 2) {
        p.pod_selector = selector(&[("app", "web")]);
    }
    p.pool = flag(e, 3).then(|| ["one", "two"][usize::from(flag(e, 4))].to_owned());
    p.mode = if e.how > 240 { PolicyMode::Staged } else { PolicyMode::Enforce };
    p
}

fn cluster_policy(e: &Edit) -> ClusterPolicy {
    let tier = if flag(e, 0) { Tier::Admin } else { Tier::Baseline };
    let says = if flag(e, 1) { Action::Deny } else { Action::Accept };
    let mut r = rule("r", &[["b.x.com", "192.0.2.0/24"][usize::from(flag(e, 2))]], &["443"]);
    r.expires = flag(e, 3).then_some(UnixSeconds(1250));
    let mut p = cluster(tier, u16::from(e.how >> 7), vec![(says, r)]);
    if flag(e, 4) {
        p.ceiling = ceiling(&["*.x.com"], &[], &[]).ceiling;
    }
    if flag(e, 5) {
        p.namespaces = selector(&[("env", "test")]);
    }
    if flag(e, 6) {
        p.pods = selector(&[("app", "job")]);
    }
    p
}

/// Carries an edit out, and says what it touches.
fn edit(o: &mut Objects, e: &Edit, touched: &mut Touched) {
    let space = SPACES[e.space].to_owned();
    let key = |n: &str| (space.clone(), n.to_owned());
    match e.what {
        // Few addresses: they go from pod to pod, and several pods have one.
        0 => {
            let key = key(&format!("pod-{}", e.which));
            let mut p = pod(&format!("10.1.0.{}", e.how % 5), &[("app", ["web", "job"][usize::from(flag(e, 5))])]);
            if flag(e, 6) {
                p.addresses.push(ip(&format!("fd00::{}", e.how % 3)));
            }
            if e.how > 230 {
                p.addresses.clear();
            }
            p.host_network = e.how % 16 == 15;
            p.node = ["n1", "n2"][usize::from(flag(e, 7))].into();
            o.pods.insert(key.clone(), p);
            touched.pods.insert(key);
        }
        1 => {
            let key = key(&format!("pod-{}", e.which));
            o.pods.remove(&key);
            touched.pods.insert(key);
        }
        2 => {
            let key = key(["p", "q"][e.which % 2]);
            if e.how.is_multiple_of(5) {
                drop(o.policies.remove(&key))
            } else {
                drop(o.policies.insert(key, own_policy(e)))
            }
            touched.namespaces.insert(space);
        }
        3 | 4 => {
            let mut ns = Namespace { uid: format!("u-{space}-{}", e.how % 2), ..Namespace::default() };
            ns.labels = labels(&[("env", ["test", "prod"][usize::from(flag(e, 1))])]);
            ns.managed = flag(e, 2);
            ns.audit = flag(e, 3);
            ns.audit_until = flag(e, 4).then_some(UnixSeconds(1000 + 50 * i64::from(e.how >> 5)));
            ns.has_allow = flag(e, 5);
            ns.allow = if flag(e, 5) { vec![rule("a.x.com", &["a.x.com"], &["443"])] } else { vec![] };
            ns.pool = flag(e, 6).then(|| "one".to_owned());
            if e.how.is_multiple_of(7) {
                drop(o.namespaces.remove(&space))
            } else {
                drop(o.namespaces.insert(space.clone(), ns))
            }
            touched.namespaces.insert(space);
        }
        5 => {
            let name = ["k", "l"][e.which % 2].to_owned();
            if e.how.is_multiple_of(3) {
                o.cluster_policies.remove(&name);
            } else {
                o.cluster_policies.insert(name, cluster_policy(e));
            }
            touched.all = true;
        }
        6 => {
            let address = |n: u8| Pair { ipv4: Some([203, 0, 113, n].into()), ipv6: None, draining: flag(e, n % 8) };
            let source = AddressSource::Static { interface: None, pairs: vec![address(1), address(2)] };
            let source = if e.how > 200 { AddressSource::PodNetwork } else { source };
            let allowed_namespaces = flag(e, 3).then(Selector::default);
            o.pools
                .insert(["one", "two"][e.which % 2].into(), Pool { allowed_namespaces, source, gateway_nodes: None });
            touched.all = true;
        }
        7 => {
            o.settings.exempt_namespaces = if flag(e, 0) { vec![space] } else { vec![] };
            o.settings.cluster_default =
                [ClusterDefault::Untouched, ClusterDefault::Audit, ClusterDefault::Isolated][e.which % 3];
            touched.all = true;
        }
        8 => {
            let given = Pair { ipv4: Some([203, 0, 113, e.how % 3].into()), ipv6: None, draining: false };
            let key = (space.clone(), ["one", "two"][e.which % 2].to_owned());
            if flag(e, 5) {
                o.assigned.remove(&key);
            } else {
                o.assigned.insert(key, given);
            }
            touched.namespaces.insert(space);
        }
        _ => {
            let node = Node { addresses: vec![ip(&format!("192.0.2.{}", e.how % 4))], ..Node::default() };
            o.nodes.insert(["n1", "n2"][e.which % 2].into(), node);
            touched.all = true;
        }
    }
}

/// What a world says has changed is all that has.
fn check_changes(new: &World, old: &World, ips: &[IpAddr]) -> Result<(), TestCaseError> {
    let c = new.changes(old);
    let endpoints: BTreeSet<IpAddr> = c.endpoints.iter().copied().collect();
    for ip in ips {
        prop_assert_eq!(endpoints.contains(ip), new.endpoint(*ip) != old.endpoint(*ip), "{}", ip);
    }
    for key in new.scopes().keys().chain(old.scopes().keys()) {
        let same = new.scope(*key).zip(old.scope(*key)).is_some_and(|(a, b)| a.same_way(b));
        prop_assert_eq!(c.scopes.contains(key), !same);
    }
    for key in new.scopes().keys() {
        let same = new.scope(*key).zip(old.scope(*key)).is_some_and(|(a, b)| a.same_classes(b));
        prop_assert_eq!(c.classes.contains(key), !same);
    }
    for key in new.groups().keys().chain(old.groups().keys()) {
        let same = new.group_by_key(*key).zip(old.group_by_key(*key)).is_some_and(|(a, b)| a.says_the_same(b));
        prop_assert_eq!(c.groups.contains(key), !same);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn edit_after_edit_comes_to_the_same(
        steps in prop::collection::vec((prop::collection::vec(edits(), 1..5), 0..6i64), 1..24),
    ) {
        let ips: Vec<IpAddr> =
            (0..5).map(|n| ip(&format!("10.1.0.{n}"))).chain((0..3).map(|n| ip(&format!("fd00::{n}")))).collect();
        let asked: Vec<IpAddr> = ips.iter().copied().chain((0..4).map(|n| ip(&format!("192.0.2.{n}")))).collect();
        let mut o = Objects::default();
        let mut world = World::compile(&o, UnixSeconds(900), None);
        for (batch, t) in steps {
            let mut touched = Touched::default();
            batch.iter().for_each(|e| edit(&mut o, e, &mut touched));
            // Clocks go back, too.
            let now = UnixSeconds(950 + 100 * t);
            let next = World::compile(&o, now, Some((&world, &touched)));
            same(&next, &World::compile(&o, now, None), NAMES, &asked)?;
            check_changes(&next, &world, &ips)?;
            world = next;
        }
    }
}

fn touch(pods: &[(&str, &str)]) -> Touched {
    Touched { pods: pods.iter().map(|(n, p)| ((*n).to_owned(), (*p).to_owned())).collect(), ..Touched::default() }
}

#[test]
fn an_address_that_two_namespaces_have_is_the_stricter_ones_until_one_is_gone() {
    let mut o = shop().own("p", policy(vec![rule("r", &["a.com"], &["443"])], vec![]));
    let address = ip("10.1.0.1");
    let owner = |w: &World| w.endpoint(address).map(|e| e.who.namespace.to_string());
    let conflicts = |w: &World| w.issues().iter().filter(|i| i.reason == IssueReason::DuplicateAddress).count();
    let first = o.world();
    for (free, order) in [("aaa", 0), ("zzz", 1)] {
        o.pods.insert((free.into(), "free".into()), pod("10.1.0.1", &[]));
        let both = World::compile(&o, UnixSeconds(1000), Some((&first, &touch(&[(free, "free")]))));
        assert_eq!((owner(&both).as_deref(), conflicts(&both)), (Some("shop"), 1), "{order}");
        // The stricter one goes: what is left is the other.
        let web = o.pods.remove(&("shop".into(), "web".into())).unwrap();
        let one = World::compile(&o, UnixSeconds(1000), Some((&both, &touch(&[("shop", "web")]))));
        assert_eq!((owner(&one).as_deref(), conflicts(&one)), (Some(free), 0));
        o.pods.insert(("shop".into(), "web".into()), web);
        let again = World::compile(&o, UnixSeconds(1000), Some((&one, &touch(&[("shop", "web")]))));
        assert_eq!((owner(&again).as_deref(), conflicts(&again)), (Some("shop"), 1));
        o.pods.remove(&(free.into(), "free".into()));
        let alone = World::compile(&o, UnixSeconds(1000), Some((&again, &touch(&[(free, "free")]))));
        assert_eq!((owner(&alone).as_deref(), conflicts(&alone)), (Some("shop"), 0));
    }
}

#[test]
fn what_was_not_touched_is_not_looked_at() {
    let mut o = shop().own("p", policy(vec![rule("r", &["a.com"], &["443"])], vec![]));
    o.pods.insert(("team".into(), "a".into()), pod("10.1.0.2", &[]));
    let w = o.world();
    o.pods.remove(&("team".into(), "a".into()));
    o.namespaces.get_mut("shop").unwrap().managed = true;
    o.pods.insert(("shop".into(), "new".into()), pod("10.1.0.3", &[]));
    let next = World::compile(&o, UnixSeconds(1000), Some((&w, &touch(&[("shop", "new")]))));
    assert!(next.endpoint(ip("10.1.0.2")).is_some() && next.endpoint(ip("10.1.0.3")).is_some());
    let [a, b] = [&w, &next].map(|w| w.group_of(ip("10.1.0.1")).unwrap().clone());
    assert!(Arc::ptr_eq(&a, &b), "a new pod of a known kind costs no new group");
    assert_eq!(next.changes(&w).endpoints, [ip("10.1.0.3")]);
}

#[test]
fn the_end_of_a_rule_touches_its_namespace_alone() {
    let mut ends = rule("r", &["a.com"], &["443"]);
    ends.expires = Some(UnixSeconds(1100));
    let mut o = shop().own("p", policy(vec![ends], vec![]));
    o.policies.insert(("team".into(), "p".into()), policy(vec![rule("r", &["a.com"], &["443"])], vec![]));
    o.pods.insert(("team".into(), "a".into()), pod("10.1.0.2", &[]));
    let w = o.world();
    assert_eq!(w.next_change(), Some(UnixSeconds(1100)));
    let later = World::compile(&o, UnixSeconds(1100), Some((&w, &Touched::default())));
    assert_eq!(later.next_change(), None);
    let groups: Vec<_> = later.changes(&w).groups.into_iter().collect();
    assert_eq!(groups, [later.group_of(ip("10.1.0.1")).unwrap().key()]);
    let scope = later.scopes().values().find(|s| &**s.namespace() == "team").unwrap();
    assert!(Arc::ptr_eq(scope, w.scope(scope.key()).unwrap()));
}

#[test]
fn a_pool_whose_pairs_all_drained_may_become_the_pods_network() {
    let mut o = shop().with_ns(|n| {
        n.managed = true;
        n.pool = Some("one".into());
    });
    let draining = Pair { ipv4: Some([203, 0, 113, 1].into()), ipv6: None, draining: true };
    let source = AddressSource::Static { interface: None, pairs: vec![draining] };
    let pool = Pool { allowed_namespaces: Some(Selector::default()), source, gateway_nodes: None };
    o.pools.insert("one".into(), pool);
    let w = o.world();
    let families = |w: &World| w.ways().map(|(s, n)| (s.families(), n)).collect::<Vec<_>>();
    assert_eq!(families(&w), [((false, false), 1)]);
    // Neither has a pair.
    o.pools.get_mut("one").unwrap().source = AddressSource::PodNetwork;
    let next = World::compile(&o, UnixSeconds(1000), Some((&w, Touched::ALL)));
    assert_eq!(families(&next), [((true, true), 1)]);
}
