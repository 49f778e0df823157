//! What compilation makes of objects: who is selected, scopes, pools, groups, time, sharing.

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;

use common::*;
use tidegate_policy::World;
use tidegate_policy::model::*;
use tidegate_policy::state::Touch;
use tidegate_policy::world::{Answer, IssueReason, Sight};

fn allow(names: &[&str]) -> Policy {
    policy(vec![rule("r", names, &["443"])], vec![])
}

fn touch(o: &Objects, address: &str) -> Touch {
    o.world().endpoint(ip(address)).expect("an endpoint").touch
}

#[test]
fn untouched_guarded_isolated() {
    let mut o = shop();
    assert_eq!(touch(&o, "10.1.0.1"), Touch::Untouched);
    assert!(o.world().group_of(ip("10.1.0.1")).is_none() && o.world().groups().is_empty());
    o = o.clustered("c", cluster(Tier::Baseline, 1, vec![]));
    assert_eq!(touch(&o, "10.1.0.1"), Touch::Guarded);
    let own = o.clone().own("p", policy(vec![], vec![]));
    assert_eq!(touch(&own, "10.1.0.1"), Touch::Isolated, "a policy without egress isolates");
    assert_eq!(touch(&o.clone().with_ns(|n| n.managed = true), "10.1.0.1"), Touch::Isolated);
    assert_eq!(touch(&o.clone().with_ns(|n| n.has_allow = true), "10.1.0.1"), Touch::Isolated);
    let mut exempt = own.clone();
    exempt.settings.exempt_namespaces = vec!["shop".into()];
    assert_eq!(touch(&exempt, "10.1.0.1"), Touch::Untouched);
    let mut host = own;
    host.pods.get_mut(&("shop".into(), "web".into())).unwrap().host_network = true;
    assert!(host.world().endpoint(ip("10.1.0.1")).is_none());
}

#[test]
fn the_cluster_default() {
    let mut o = shop();
    o.settings.cluster_default = ClusterDefault::Isolated;
    assert_eq!(touch(&o, "10.1.0.1"), Touch::Isolated);
    let guarded = o.clone().clustered("c", cluster(Tier::Admin, 1, vec![]));
    assert_eq!(touch(&guarded, "10.1.0.1"), Touch::Isolated, "a cluster policy opens nothing");
    o.settings.cluster_default = ClusterDefault::Audit;
    assert!(o.group().audit() && o.group().touch() == Touch::Isolated);
    assert!(!o.clone().own("p", allow(&["a.com"])).group().audit(), "a policy of its own is enforced");
    let guarded = o.clustered("c", cluster(Tier::Admin, 1, vec![])).group();
    assert!(guarded.touch() == Touch::Guarded && !guarded.audit(), "cluster denies go on to hold");
}

#[test]
fn audit_runs_until_its_end() {
    let o = shop().own("p", allow(&["a.com"])).with_ns(|n| {
        n.audit = true;
        n.audit_until = Some(UnixSeconds(2000));
    });
    let w = o.world();
    let g = w.group_of(ip("10.1.0.1")).unwrap();
    assert!(g.audit());
    assert_eq!(g.a("b.com"), Answer::NxDomain, "decisions say what enforcement does");
    assert_eq!(w.next_change(), Some(UnixSeconds(2000)));
    let later = World::compile(&o, UnixSeconds(2000), Some((&w, Touched::ALL)));
    let h = later.group_of(ip("10.1.0.1")).unwrap();
    assert!(!h.audit() && h.key() == g.key());
    assert_eq!(later.next_change(), None);
}

#[test]
fn rules_end_at_their_time() {
    let mut p = allow(&["a.com", "b.com"]);
    p.egress[0].expires = Some(UnixSeconds(1500));
    p.egress.push(rule("stays", &["b.com"], &["443"]));
    let o = shop().own("p", p);
    let w = o.world();
    assert_eq!(w.next_change(), Some(UnixSeconds(1500)));
    assert_eq!(w.group_of(ip("10.1.0.1")).unwrap().a("a.com"), Answer::Bind);
    let same = World::compile(&o, UnixSeconds(1499), Some((&w, Touched::ALL)));
    assert!(same.groups().values().zip(w.groups().values()).all(|(a, b)| Arc::ptr_eq(a, b)));
    let later = World::compile(&o, UnixSeconds(1500), Some((&w, Touched::ALL)));
    let g = later.group_of(ip("10.1.0.1")).unwrap();
    assert_eq!((g.a("a.com"), g.a("b.com"), g.touch()), (Answer::NxDomain, Answer::Bind, Touch::Isolated));
    assert_eq!(later.changed_scopes(&w), [g.scope().key()]);
    // Time that goes back brings the rule back.
    let back = World::compile(&o, UnixSeconds(1000), Some((&later, Touched::ALL)));
    assert_eq!(back.group_of(ip("10.1.0.1")).unwrap().a("a.com"), Answer::Bind);
}

#[test]
fn staged_policies_have_no_effect() {
    let mut own = allow(&["a.com"]);
    own.mode = PolicyMode::Staged;
    let mut c = ceiling(&[], &[], &[]);
    c.mode = PolicyMode::Staged;
    let o = shop().own("a-staged", own).clustered("a-staged", c);
    assert_eq!(touch(&o, "10.1.0.1"), Touch::Untouched);
    let g = o.own("b", allow(&["b.com"])).group();
    assert_eq!((g.a("a.com"), g.a("b.com")), (Answer::NxDomain, Answer::Bind));
}

#[test]
fn a_cluster_policy_that_does_not_say_for_whom_is_for_whom_policy_concerns() {
    let deny = vec![(Action::Deny, rule("d", &["a.com"], &["any"]))];
    let mut lost = cluster(Tier::Admin, 1, deny);
    lost.subject_lost = true;
    lost.ceiling = Some(Ceiling::default());
    let mut o = shop().clustered("lost", lost);
    assert_eq!(touch(&o, "10.1.0.1"), Touch::Untouched, "nothing else concerns it");
    let own = o.clone().own("p", policy(vec![rule("r", &["a.com", "b.com", "192.0.2.0/24"], &["443"])], vec![]));
    let own = own.own("q", policy(vec![rule("c", &["192.0.2.0/24"], &["443"])], vec![]));
    let g = own.group();
    assert!(!g.to("a.com", 443).allowed() && !g.to("b.com", 443).allowed() && !g.to_ip("192.0.2.1", 443).allowed());
    let managed = o.clone().with_ns(|n| n.managed = true);
    assert_eq!(managed.group().policies().count(), 1);
    o = o.clustered("other", cluster(Tier::Admin, 2, vec![]));
    assert_eq!(touch(&o, "10.1.0.1"), Touch::Guarded);
    assert!(!o.group().to("a.com", 443).allowed() && o.group().to("b.com", 443).allowed());
    let mut audit = o.clone();
    audit.cluster_policies.remove("other");
    audit.settings.cluster_default = ClusterDefault::Audit;
    assert!(audit.group().audit(), "who only watches is denied nothing");
}

#[test]
fn selectors_make_groups() {
    let mut o = shop();
    o.pods.insert(("shop".into(), "web2".into()), pod("10.1.0.2", &[("app", "web"), ("v", "2")]));
    o.pods.insert(("shop".into(), "job".into()), pod("10.1.0.3", &[("app", "job")]));
    let mut p = allow(&["a.com"]);
    p.pod_selector = selector(&[("app", "web")]);
    let mut q = allow(&["b.com"]);
    q.pod_selector.expressions = vec![Expression { key: "v".into(), op: Operator::DoesNotExist }];
    let mut c = cluster(Tier::Admin, 1, vec![]);
    c.pods = selector(&[("app", "job")]);
    let mut foreign = cluster(Tier::Admin, 2, vec![]);
    foreign.namespaces = selector(&[("env", "test")]);
    let w = o.own("p", p).own("q", q).clustered("c", c).clustered("foreign", foreign).world();
    let of = |a: &str| w.group_of(ip(a)).unwrap();
    let keys: BTreeSet<_> = ["10.1.0.1", "10.1.0.2", "10.1.0.3"].map(|a| of(a).key()).into();
    assert_eq!((keys.len(), w.groups().len(), w.scopes().len()), (3, 3, 1));
    assert_eq!((of("10.1.0.1").a("a.com"), of("10.1.0.1").a("b.com")), (Answer::Bind, Answer::Bind));
    assert_eq!((of("10.1.0.2").a("a.com"), of("10.1.0.2").a("b.com")), (Answer::Bind, Answer::NxDomain));
    assert_eq!((of("10.1.0.3").a("a.com"), of("10.1.0.3").a("b.com")), (Answer::NxDomain, Answer::Bind));
    let m = w.endpoint(ip("10.1.0.2")).unwrap().member.unwrap();
    assert_eq!(w.group(m.index).unwrap().key(), m.group);
}

#[test]
fn an_annotation_alone_works_like_a_policy() {
    let o = shop().with_ns(|n| {
        n.has_allow = true;
        n.allow = vec![
            rule("api.stripe.com:443", &["api.stripe.com"], &["443", "443/udp"]),
            rule("192.0.2.0/24:5432/tcp", &["192.0.2.0/24"], &["5432"]),
        ];
    });
    let g = o.group();
    let d = g.to("api.stripe.com", 443);
    let r = d.rule.clone().unwrap();
    assert_eq!((d.allowed(), r.kind, r.rule.as_ref()), (true, "Namespace", "api.stripe.com:443"));
    assert!(g.to_ip("192.0.2.1", 5432).allowed() && !g.to_ip("192.0.2.1", 443).allowed());
    let denied = o.clone().own("d", policy(vec![], vec![rule("no", &["api.stripe.com"], &["any"])])).group();
    assert!(!denied.to("api.stripe.com", 443).allowed());
    let bounded = o.clustered("c", ceiling(&["*.example.com"], &[], &[Permit::Cidrs]));
    let issues: Vec<String> = bounded.world().issues().iter().map(ToString::to_string).collect();
    assert_eq!(issues, ["Namespace shop: tidegate.dev/allow[api.stripe.com:443]: refused, AboveCeiling (by c)"]);
}

fn pool(allowed: Option<Selector>, last: &[u8]) -> Pool {
    let pairs =
        last.iter().map(|b| Pair { ipv4: Some([203, 0, 113, *b].into()), ipv6: None, draining: false }).collect();
    Pool { allowed_namespaces: allowed, source: AddressSource::Static { interface: None, pairs }, gateway_nodes: None }
}

#[test]
fn pools_by_policy_then_annotation_then_default() {
    let asks = |pool: &str, created: i64| Policy {
        pool: Some(pool.into()),
        created: UnixSeconds(created),
        ..allow(&["a.com"])
    };
    let mut o = shop();
    o.pools.insert("a".into(), pool(Some(selector(&[("env", "prod")])), &[1]));
    o.pools.insert("b".into(), pool(Some(Selector::default()), &[2]));
    o.pools.insert("closed".into(), pool(None, &[3]));
    let of = |o: &Objects| o.group().scope().pool().to_string();
    let reasons =
        |o: &Objects| o.world().issues().iter().map(|i| (i.policy.name.to_string(), i.reason)).collect::<Vec<_>>();
    assert_eq!(of(&o.clone().own("p", allow(&["a.com"]))), "default");
    assert_eq!(of(&o.clone().own("p", allow(&["a.com"])).with_ns(|n| n.pool = Some("b".into()))), "b");
    let annotated = o.clone().own("p", asks("a", 5)).with_ns(|n| n.pool = Some("b".into()));
    assert_eq!(of(&annotated), "a");
    let two = annotated.clone().own("older", asks("b", 4));
    assert_eq!((of(&two), reasons(&two)), ("b".into(), vec![("p".into(), IssueReason::PoolConflict)]));
    let by_name = annotated.clone().own("o", asks("b", 5));
    assert_eq!((of(&by_name), reasons(&by_name)), ("b".into(), vec![("p".into(), IssueReason::PoolConflict)]));
    let closed = o.clone().own("p", asks("closed", 1)).own("q", asks("nowhere", 2)).own("r", asks("a", 3));
    assert_eq!(of(&closed), "a");
    assert_eq!(reasons(&closed), [("p".into(), IssueReason::PoolNotAllowed), ("q".into(), IssueReason::PoolUnknown)]);
    let bad = o.own("p", allow(&["a.com"])).with_ns(|n| n.pool = Some("closed".into()));
    assert_eq!((of(&bad), reasons(&bad)), ("default".into(), vec![("shop".into(), IssueReason::PoolNotAllowed)]));
}

#[test]
fn a_pair_is_chosen_by_rendezvous() {
    let mut o = shop().with_ns(|n| {
        n.managed = true;
        n.pool = Some("a".into());
    });
    let chosen = |o: &Objects| {
        let w = o.world();
        let scope = w.group_of(ip("10.1.0.1")).unwrap().scope().clone();
        assert_eq!(w.pair_of(scope.key()), scope.pair());
        (scope.pair(), scope.families())
    };
    o.pools.insert("a".into(), pool(Some(Selector::default()), &[1, 2, 3, 4]));
    let (first, families) = chosen(&o);
    assert_eq!(families, (true, false));
    // Taking another pair away moves nobody; draining the own one does.
    let AddressSource::Static { pairs, .. } = &mut o.pools.get_mut("a").unwrap().source else { unreachable!() };
    let other = pairs.iter().position(|p| Some(*p) != first).unwrap();
    pairs.remove(other);
    assert_eq!(chosen(&o).0, first);
    let AddressSource::Static { pairs, .. } = &mut o.pools.get_mut("a").unwrap().source else { unreachable!() };
    pairs.iter_mut().find(|p| Some(**p) == first).unwrap().draining = true;
    assert!(chosen(&o).0.is_some_and(|p| Some(p.ipv4) != first.map(|f| f.ipv4)));
    let AddressSource::Static { pairs, .. } = &mut o.pools.get_mut("a").unwrap().source else { unreachable!() };
    pairs.iter_mut().for_each(|p| p.draining = true);
    assert_eq!(chosen(&o), (None, (false, false)));
    // Many namespaces spread over the pairs.
    let mut o = Objects::default();
    o.pools.insert("a".into(), pool(Some(Selector::default()), &[1, 2, 3, 4]));
    for i in 0..200u8 {
        let ns = Namespace { uid: format!("u{i}"), managed: true, pool: Some("a".into()), ..Namespace::default() };
        o.namespaces.insert(format!("ns{i}"), ns);
        o.pods.insert((format!("ns{i}"), "p".into()), pod(&format!("10.2.0.{i}"), &[]));
    }
    let mut used = std::collections::BTreeMap::new();
    o.world().scopes().values().for_each(|s| *used.entry(s.pair()).or_insert(0) += 1);
    assert!(used.len() == 4 && used.values().all(|n| *n > 25), "{used:?}");
}

#[test]
fn a_pair_that_was_given_is_kept_while_the_pool_has_it() {
    let mut o = shop().with_ns(|n| {
        n.managed = true;
        n.pool = Some("a".into());
    });
    let v6 = |last: u16| Some(std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last));
    let chosen = |o: &Objects| o.world().group_of(ip("10.1.0.1")).unwrap().scope().pair();
    let set = |o: &mut Objects, new: &[Pair]| {
        let AddressSource::Static { pairs, .. } = &mut o.pools.get_mut("a").unwrap().source else { unreachable!() };
        new.clone_into(pairs);
    };
    o.pools.insert("a".into(), pool(Some(Selector::default()), &[1, 2, 3, 4]));
    let AddressSource::Static { pairs: all, .. } = o.pools["a"].source.clone() else { unreachable!() };
    let by_score = chosen(&o).unwrap();
    let given = *all.iter().find(|p| **p != by_score).unwrap();
    o.assigned.insert(("shop".into(), "a".into()), given);
    assert_eq!(chosen(&o), Some(given));
    // What other namespaces, or the same one in other pools, were given says nothing.
    let mut others = o.clone();
    others.assigned = [("other", "a"), ("shop", "b")].map(|(n, p)| ((n.into(), p.into()), given)).into();
    assert_eq!(chosen(&others), Some(by_score));
    // Also while it drains, alone or with all others.
    let drains = |p: &Pair| Pair { draining: true, ..*p };
    set(&mut o, &all.iter().map(|p| if *p == given { drains(p) } else { *p }).collect::<Vec<_>>());
    assert_eq!(chosen(&o), Some(drains(&given)));
    set(&mut o, &all.iter().map(drains).collect::<Vec<_>>());
    assert_eq!(chosen(&o), Some(drains(&given)));
    // A pair that gains an address is the same one; the IPv4 address decides.
    let wider = Pair { ipv6: v6(1), ..given };
    let decoy = Pair { ipv4: None, ipv6: v6(2), draining: false };
    set(&mut o, &[decoy, by_score, wider]);
    assert_eq!(chosen(&o), Some(wider));
    o.assigned.insert(("shop".into(), "a".into()), Pair { ipv6: v6(2), ..given });
    assert_eq!(chosen(&o), Some(wider));
    // One whose IPv4 address is gone is known by its other one.
    set(&mut o, &[decoy, by_score]);
    assert_eq!(chosen(&o), Some(decoy));
    // Gone: the scores decide again.
    let rest: Vec<Pair> = all.iter().filter(|p| **p != given).copied().collect();
    set(&mut o, &rest);
    assert_eq!(chosen(&o), Some(by_score));
    let net = AddressSource::PodNetwork;
    o.pools.get_mut("a").unwrap().source = net;
    assert_eq!(chosen(&o), None);
}

#[test]
fn keys_are_stable_and_unchanged_parts_are_shared() {
    let mut o = shop()
        .own("p", allow(&["a.com", "*.b.com"]))
        .clustered("c", cluster(Tier::Admin, 1, vec![(Action::Deny, rule("d", &["x.com"], &["any"]))]));
    o.namespaces.insert("other".into(), Namespace { uid: "u-other".into(), managed: true, ..Namespace::default() });
    o.pods.insert(("other".into(), "p".into()), pod("10.3.0.1", &[]));
    let w = o.world();
    let g = w.group_of(ip("10.1.0.1")).unwrap();
    let class = g.scope().class(ip("192.0.2.1"), &[name("a.com"), name("q.b.com")]);
    assert_eq!(
        class,
        g.scope().class(ip("192.0.2.9"), &[name("z.b.com"), name("a.com"), name("y.b.com")]),
        "rules, not names"
    );
    let same = World::compile(&o, UnixSeconds(1001), Some((&w, Touched::ALL)));
    assert!(w.groups().values().zip(same.groups().values()).all(|(a, b)| Arc::ptr_eq(a, b)));
    assert!(same.changed_scopes(&w).is_empty());
    assert!(Arc::ptr_eq(&w.endpoint(ip("10.1.0.1")).unwrap().who, &same.endpoint(ip("10.1.0.1")).unwrap().who));

    // An edit of a rule's ports: same group, same class, another grant; the other namespace is shared.
    let before = g.grant(class).unwrap();
    o.policies.get_mut(&("shop".into(), "p".into())).unwrap().egress[0].ports = vec![port("8443")];
    let edited = World::compile(&o, UnixSeconds(1001), Some((&w, Touched::ALL)));
    let h = edited.group_of(ip("10.1.0.1")).unwrap();
    assert_eq!(h.key(), g.key());
    assert_eq!(h.scope().class(ip("192.0.2.1"), &[name("a.com"), name("q.b.com")]), class);
    assert_ne!(h.grant(class).unwrap(), before);
    assert_eq!(edited.changed_scopes(&w), [h.scope().key()]);
    assert!(Arc::ptr_eq(w.group_of(ip("10.3.0.1")).unwrap(), edited.group_of(ip("10.3.0.1")).unwrap()));

    // A class outlives the rule: it then grants nothing by name.
    o.policies.get_mut(&("shop".into(), "p".into())).unwrap().egress.clear();
    let empty = World::compile(&o, UnixSeconds(1001), Some((&edited, Touched::ALL)));
    assert!(empty.group_of(ip("10.1.0.1")).unwrap().grant(class).unwrap().is_empty());
    // Another selecting policy is another group; the scope stays.
    let more = World::compile(&o.clone().own("q", allow(&["c.com"])), UnixSeconds(1001), Some((&empty, Touched::ALL)));
    let m = more.group_of(ip("10.1.0.1")).unwrap();
    assert!(m.key() != g.key() && m.scope().key() == g.scope().key());
    more.retain_classes(&BTreeSet::new());
    assert_eq!(m.grant(class), None);
}

#[test]
fn what_is_pushed_hangs_together() {
    let o = shop().own(
        "p",
        policy(vec![rule("r", &["a.com", "*.b.com"], &["443"]), rule("c", &["203.0.113.0/24"], &["443"])], vec![]),
    );
    let w = o.world();
    let g = w.group_of(ip("10.1.0.1")).unwrap();
    let scope = g.scope().key();
    let ahead: Vec<_> = g.scope().single_rule_classes().collect();
    let learnt = g.scope().class(ip("192.0.2.1"), &[name("x.b.com")]);
    assert!(ahead.contains(&learnt), "the class of one name is there before anybody asks");
    let parts = w.parts(Sight { everything: false, here: Some("n1") }, |_| ahead.clone());
    assert_eq!(parts, w.parts(Sight { everything: true, here: None }, |_| ahead.clone()));
    assert_eq!(w.parts(Sight { everything: false, here: Some("n2") }, |_| ahead.clone()), Default::default());
    assert!(parts.grants.contains_key(&(g.key(), learnt)));
    let e = &parts.endpoints[&ip("10.1.0.1")];
    assert_eq!(
        (e.node.as_str(), e.pod.as_str(), e.touch, e.member),
        ("n1", "web", Touch::Isolated, Some((scope, g.key())))
    );
    assert_eq!(parts.scopes[&scope].pool.as_ref(), "default");
    let group = &parts.groups[&g.key()];
    assert!(group.isolated && !group.audit && group.admin.is_none());
    assert!(parts.prefixes.contains_key(&group.own.unwrap()));
}

#[test]
fn two_pods_with_one_address_get_the_stricter_treatment() {
    let mut o = shop().own("p", allow(&["a.com"]));
    o.pods.insert(("aaa".into(), "free".into()), pod("10.1.0.1", &[]));
    let w = o.world();
    let e = w.endpoint(ip("10.1.0.1")).unwrap();
    assert_eq!((e.who.namespace.as_ref(), e.touch, e.member), ("shop", Touch::Isolated, None));
    assert_eq!(w.issues()[0].reason, IssueReason::DuplicateAddress);
}

#[test]
fn too_many_globs_widen_a_deny_and_refuse_an_allow() {
    let globs: Vec<String> = (0..70).map(|i| format!("g{i}-*.com")).collect();
    let globs: Vec<&str> = globs.iter().map(String::as_str).collect();
    let own = shop().own("p", policy(vec![rule("r", &globs, &["443"]), rule("s", &["s.com"], &["443"])], vec![]));
    assert_eq!((own.group().a("g3-x.com"), own.group().a("g69-x.com")), (Answer::Bind, Answer::NxDomain));
    assert_eq!(own.world().issues().len(), 6);
    let deny = own.clone().own("d", policy(vec![], vec![rule("d", &globs, &["any"])]));
    assert!(!deny.group().to("g69-x.com", 443).allowed() && !deny.group().to("s.com", 443).allowed(), "fails closed");
}

#[test]
fn more_port_ranges_than_the_kernel_holds_end_in_a_deny() {
    let ports: Vec<String> = (0..100).map(|i| (i * 10 + 1000).to_string()).collect();
    let ports: Vec<&str> = ports.iter().map(String::as_str).collect();
    let o = shop().own("p", policy(vec![rule("n", &["a.com"], &ports), rule("c", &["192.0.2.0/24"], &ports)], vec![]));
    let w = o.world();
    assert_eq!(w.issues()[0].reason, IssueReason::TooManyPortRanges);
    let g = w.group_of(ip("10.1.0.1")).unwrap();
    let set = &g.own_prefixes().unwrap().1[&"192.0.2.0/24".parse().unwrap()];
    assert!(set.ranges().len() <= tidegate_policy::port::MAX_RANGES);
    use tidegate_policy::{Proto, Via};
    assert_eq!(set.get(Proto::Tcp, 1990), Some(Via::Deny));
    assert_eq!(set.get(Proto::Udp, 7), Some(Via::Deny));
}
