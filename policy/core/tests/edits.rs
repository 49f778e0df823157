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
use tidegate_policy::state::Touch;
use tidegate_policy::world::{Endpoint, IssueReason, Sight};

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
    p.subject_lost = e.how.is_multiple_of(11);
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
            p.ending = flag(e, 4);
            p.mirror = e.how.is_multiple_of(13);
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
                o.cluster_policies.insert(name.clone(), cluster_policy(e));
            }
            touched.cluster_policies.insert(name);
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
            o.settings.trust_mirror_pods = flag(e, 1);
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
            let nets: &[&str] =
                [&[][..], &["10.1.0.0/31"], &["10.1.0.2/31", "fd00::/127"]][usize::from(e.how >> 2) % 3];
            let pod_prefixes = nets.iter().map(|n| n.parse().unwrap()).collect();
            let addresses = vec![ip(&format!("192.0.2.{}", e.how % 4))];
            let node = Node { addresses, pod_prefixes, ..Node::default() };
            o.nodes.insert(["n1", "n2"][e.which % 2].into(), node);
            touched.nodes = true;
        }
    }
}

/// What a world says has changed is all that has.
fn check_changes(new: &World, old: &World, ips: &[IpAddr]) -> Result<(), TestCaseError> {
    let c = new.changes(old);
    let endpoints: BTreeSet<IpAddr> = c.endpoints.iter().copied().collect();
    prop_assert_eq!(endpoints.len(), c.endpoints.len());
    for ip in ips {
        let same = new.endpoint(*ip) == old.endpoint(*ip) && new.endpoints_of(*ip) == old.endpoints_of(*ip);
        prop_assert_eq!(endpoints.contains(ip), !same, "{}", ip);
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

/// Addresses that several pods have, looked at one pod at a time, as if no other had them.
fn check_contested(o: &Objects, now: UnixSeconds, w: &World, ips: &[IpAddr]) -> Result<(), TestCaseError> {
    for ip in ips {
        let has = |p: &Pod| !p.host_network && p.addresses.contains(ip);
        let claimants: Vec<_> = o.pods.iter().filter(|(_, p)| has(p)).collect();
        if claimants.len() < 2 {
            continue;
        }
        let alone = |key: &(String, String)| {
            let mut o = o.clone();
            o.pods.retain(|k, p| k == key || !has(p));
            let w = World::compile(&o, now, None);
            let e = w.endpoint(*ip).unwrap().clone();
            (e.touch, e.member.map(|m| m.group), w.group_of(*ip).is_some_and(|g| g.audit()))
        };
        let inside = |node: &str| o.nodes.get(node).is_some_and(|n| n.pod_prefixes.iter().any(|p| p.contains(ip)));
        let worth = |p: &Pod| (inside(&p.node), !p.ending);
        let best = claimants.iter().map(|(_, p)| worth(p)).max().unwrap();
        let all: Vec<_> = claimants.into_iter().map(|(k, p)| (p.node.clone(), worth(p) == best, alone(k))).collect();
        let holders: Vec<_> = all.iter().filter(|(_, holds, _)| *holds).map(|(node, _, what)| (node, what)).collect();
        let certain = holders.iter().all(|one| *one == holders[0]).then_some(holders[0]);
        for node in ["n1", "n2"] {
            let here: Vec<_> = all.iter().filter(|(n, ..)| n == node).map(|(.., what)| what).collect();
            let found = w.seen(Sight { everything: false, here: Some(node) }, *ip);
            prop_assert_eq!(found.is_some(), !here.is_empty());
            let Some(found) = found else { continue };
            if let Some((_, what)) = certain.filter(|(n, _)| *n == node) {
                prop_assert_eq!((found.touch, found.member.map(|m| m.group)), (what.0, what.1));
                continue;
            }
            let enforced = here.iter().any(|(touch, _, audit)| *touch != Touch::Untouched && !audit);
            let expected = if enforced { Touch::Isolated } else { Touch::Untouched };
            prop_assert_eq!((found.touch, found.member), (expected, None));
        }
        let strictest = w.endpoints_of(*ip).iter().map(|e| e.touch).max();
        prop_assert_eq!(w.endpoint(*ip).map(|e| e.touch), certain.map(|(_, what)| what.0).or(strictest));
        for i in w.issues().iter().filter(|i| i.reason == IssueReason::DuplicateAddress) {
            let (namespace, name) = (i.policy.namespace.to_string(), i.policy.name.to_string());
            let pod = &o.pods[&(namespace, name)];
            let closed = |ip: &IpAddr| {
                let e = w.seen(Sight { everything: false, here: Some(&pod.node) }, *ip).unwrap();
                (e.touch, e.member) == (Touch::Isolated, None)
            };
            prop_assert!(pod.addresses.iter().any(closed), "{} is allowed something", i);
        }
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
            check_contested(&o, now, &next, &ips)?;
            world = next;
        }
    }
}

fn touch(pods: &[(&str, &str)]) -> Touched {
    Touched { pods: pods.iter().map(|(n, p)| ((*n).to_owned(), (*p).to_owned())).collect(), ..Touched::default() }
}

#[test]
fn an_address_that_two_pods_have_is_nobodys_until_one_is_gone() {
    let mut o = shop().own("p", policy(vec![rule("r", &["a.com"], &["443"])], vec![]));
    let address = ip("10.1.0.1");
    let at = |w: &World, node: &str| {
        let e = w.seen(Sight { everything: false, here: Some(node) }, address)?;
        Some((e.who.namespace.to_string(), e.touch, e.member.is_some()))
    };
    let gateway = |w: &World| {
        let e = w.seen(Sight { everything: true, here: None }, address);
        e.map(|e: &Endpoint| (e.who.namespace.to_string(), e.member.is_some()))
    };
    let conflicts = |w: &World| w.issues().iter().filter(|i| i.reason == IssueReason::DuplicateAddress).count();
    let shop = |namespace: &str, touch, member| Some((namespace.to_owned(), touch, member));
    let first = o.world();
    assert_eq!(at(&first, "n1"), shop("shop", Touch::Isolated, true));
    // Another pod on the same node: nobody knows whose packets these are.
    for free in ["aaa", "zzz"] {
        let touched = touch(&[(free, "free")]);
        o.pods.insert((free.into(), "free".into()), pod("10.1.0.1", &[]));
        let both = World::compile(&o, UnixSeconds(1000), Some((&first, &touched)));
        assert_eq!((at(&both, "n1"), conflicts(&both)), (shop("shop", Touch::Isolated, false), 2));
        assert_eq!((gateway(&both), both.group_of(address).is_none()), (Some(("shop".into(), false)), true));
        // It moves to another node: each has its own, and the untouched one is left alone.
        o.pods.get_mut(&(free.to_owned(), "free".to_owned())).unwrap().node = "n2".into();
        let apart = World::compile(&o, UnixSeconds(1000), Some((&both, &touched)));
        assert_eq!(at(&apart, "n1"), shop("shop", Touch::Isolated, false));
        assert_eq!(at(&apart, "n2"), shop(free, Touch::Untouched, false));
        assert_eq!(apart.changes(&both).endpoints, [address], "what another node is told has changed");
        // A policy comes to it: the node that was not told of the first pod isolates it, too.
        o.policies.insert((free.into(), "q".into()), policy(vec![rule("r", &["b.com"], &["443"])], vec![]));
        let spaces = Touched { namespaces: [free.to_owned()].into(), ..Touched::default() };
        let strict = World::compile(&o, UnixSeconds(1000), Some((&apart, &spaces)));
        assert_eq!(at(&strict, "n2"), shop(free, Touch::Isolated, false));
        assert_eq!(strict.changes(&apart).endpoints, [address]);
        // Either goes: what is left is the other's.
        let web = o.pods.remove(&("shop".into(), "web".into())).unwrap();
        let one = World::compile(&o, UnixSeconds(1000), Some((&strict, &touch(&[("shop", "web")]))));
        assert_eq!((at(&one, "n1"), at(&one, "n2"), conflicts(&one)), (None, shop(free, Touch::Isolated, true), 0));
        o.pods.insert(("shop".into(), "web".into()), web);
        let again = World::compile(&o, UnixSeconds(1000), Some((&one, &touch(&[("shop", "web")]))));
        assert_eq!((at(&again, "n1"), at(&again, "n2")), (at(&strict, "n1"), at(&strict, "n2")));
        o.pods.remove(&(free.into(), "free".into()));
        let alone = World::compile(&o, UnixSeconds(1000), Some((&again, &touched)));
        assert_eq!((at(&alone, "n1"), at(&alone, "n2")), (at(&first, "n1"), None));
        assert_eq!((gateway(&alone), conflicts(&alone)), (Some(("shop".into(), true)), 0));
        o.policies.remove(&(free.into(), "q".into()));
    }
    // Pods of one group on one node are treated alike whichever it is: nothing is in doubt.
    o.pods.insert(("shop".into(), "twin".into()), pod("10.1.0.1", &[("app", "web")]));
    let twins = World::compile(&o, UnixSeconds(1000), Some((&first, &touch(&[("shop", "twin")]))));
    assert_eq!((at(&twins, "n1"), conflicts(&twins)), (shop("shop", Touch::Isolated, true), 0));
    o.pods.get_mut(&("shop".to_owned(), "twin".to_owned())).unwrap().node = "n2".into();
    let apart = World::compile(&o, UnixSeconds(1000), Some((&twins, &touch(&[("shop", "twin")]))));
    assert_eq!((at(&apart, "n1"), at(&apart, "n2")), {
        let closed = shop("shop", Touch::Isolated, false);
        (closed.clone(), closed)
    });
}

#[test]
fn a_claim_from_outside_its_nodes_range_and_one_of_a_pod_that_ends_lose() {
    let mut o = shop().own("p", policy(vec![rule("r", &["a.com"], &["443"])], vec![]));
    o.policies.insert(("evil".into(), "q".into()), policy(vec![rule("r", &["b.com"], &["443"])], vec![]));
    let address = ip("10.1.0.1");
    let (web, thief) = (("shop".to_owned(), "web".to_owned()), ("evil".to_owned(), "pod".to_owned()));
    o.pods.insert(thief.clone(), Pod { node: "n2".into(), ..pod("10.1.0.1", &[]) });
    let at = |w: &World, node: &str| {
        let e = w.seen(Sight { everything: false, here: Some(node) }, address)?;
        Some((e.who.namespace.to_string(), e.touch, e.member.is_some()))
    };
    let holder = |w: &World| w.endpoint(address).map(|e| (e.who.namespace.to_string(), e.member.is_some())).unwrap();
    let issues = |w: &World| w.issues().iter().map(|i| i.to_string()).collect::<Vec<_>>();
    let is = |namespace: &str, member| Some((namespace.to_owned(), Touch::Isolated, member));
    let doubt = o.world();
    assert_eq!((at(&doubt, "n1"), at(&doubt, "n2")), (is("shop", false), is("evil", false)));
    // The API server gave the address to the first node's range: the other node's claim is nothing.
    let node = |net: &str| Node { pod_prefixes: vec![net.parse().unwrap()], ..Node::default() };
    let nodes = Touched { nodes: true, ..Touched::default() };
    o.nodes.insert("n1".into(), node("10.1.0.0/24"));
    let told = World::compile(&o, UnixSeconds(1000), Some((&doubt, &nodes)));
    assert_eq!(told.changes(&doubt).endpoints, [address]);
    assert_eq!(
        (at(&told, "n1"), at(&told, "n2"), holder(&told)),
        (is("shop", true), is("evil", false), ("shop".into(), true))
    );
    assert_eq!(issues(&told), ["Pod evil/pod: status.podIPs: conflicted, DuplicateAddress (by shop/web)"]);
    // So it stays while the pod that has it ends.
    o.pods.get_mut(&web).unwrap().ending = true;
    let ends = World::compile(&o, UnixSeconds(1000), Some((&told, &touch(&[("shop", "web")]))));
    assert_eq!((at(&ends, "n1"), at(&ends, "n2")), (at(&told, "n1"), at(&told, "n2")));
    // Both outside, or both inside: the pod that stays has it, on its own node or on the same one.
    for range in ["10.1.0.0/24", "10.2.0.0/24"] {
        for (node_of_thief, left) in [("n2", is("shop", false)), ("n1", is("evil", true))] {
            o.nodes = [("n1".into(), node(range)), ("n2".into(), node(range))].into();
            o.pods.get_mut(&thief).unwrap().node = node_of_thief.into();
            let w = o.world();
            assert_eq!((at(&w, node_of_thief), at(&w, "n1")), (is("evil", true), left.clone()), "{range}");
            assert_eq!((holder(&w), w.issues().len()), (("evil".into(), true), usize::from(node_of_thief == "n2")));
        }
    }
    // Nothing is denied to an untouched pod: it is in no conflict.
    o.nodes.clear();
    o.policies.remove(&("evil".into(), "q".into()));
    o.pods.get_mut(&thief).unwrap().node = "n2".into();
    o.pods.get_mut(&web).unwrap().ending = false;
    assert_eq!(issues(&o.world()), ["Pod shop/web: status.podIPs: conflicted, DuplicateAddress (by evil/pod)"]);
}

#[test]
fn a_mirror_pod_has_nothing_of_its_namespace() {
    let mut o = shop().own("p", policy(vec![rule("r", &["a.com"], &["443"])], vec![]));
    o.pods.get_mut(&("shop".to_owned(), "web".to_owned())).unwrap().mirror = true;
    let is = |o: &Objects| {
        let w = o.world();
        let e = w.endpoint(ip("10.1.0.1")).unwrap();
        (e.touch, e.member.is_some(), w.group_of(ip("10.1.0.1")).is_some())
    };
    let closed = (Touch::Isolated, false, false);
    assert_eq!(is(&o), closed);
    // What a cluster policy accepts is not its either, and no pool's address.
    let accept = cluster(Tier::Admin, 1, vec![(Action::Accept, rule("r", &["a.com"], &["443"]))]);
    assert_eq!(is(&shop().clustered("c", accept.clone())), (Touch::Guarded, true, true));
    let mut guarded = shop().clustered("c", accept);
    guarded.pods.get_mut(&("shop".to_owned(), "web".to_owned())).unwrap().mirror = true;
    assert_eq!(is(&guarded), closed);
    // Audits deny nothing, and nobody touches what nothing selects.
    assert_eq!(is(&o.clone().with_ns(|n| n.audit = true)), (Touch::Untouched, false, false));
    let mut free = o.clone();
    free.policies.clear();
    assert_eq!(is(&free), (Touch::Untouched, false, false));
    o.settings.trust_mirror_pods = true;
    assert_eq!(is(&o), (Touch::Isolated, true, true));
}

#[test]
fn an_audited_pod_is_denied_nothing_for_an_address_that_another_has() {
    let mut o = shop().own("p", policy(vec![rule("r", &["a.com"], &["443"])], vec![])).with_ns(|n| n.audit = true);
    o.pods.insert(("other".into(), "free".into()), Pod { node: "n2".into(), ..pod("10.1.0.1", &[]) });
    let w = o.world();
    assert!(w.endpoints_of(ip("10.1.0.1")).iter().all(|e| e.touch == Touch::Untouched));
    assert_eq!(w.endpoints_of(ip("10.1.0.1")).len(), 2);
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
