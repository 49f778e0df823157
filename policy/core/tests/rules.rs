//! Every rule of the policy language, one by one.

mod common;

use common::*;
use tidegate_policy::World;
use tidegate_policy::model::*;
use tidegate_policy::state::Touch;
use tidegate_policy::world::{Answer, Said};
use tidegate_policy::{Carry, Proto, Reason, Via};

const TLS: Via = Via::Allow(Carry::Tls);
const FORWARD: Via = Via::Allow(Carry::Forward);

fn admin(priority: u16, action: Action, r: Rule) -> ClusterPolicy {
    cluster(Tier::Admin, priority, vec![(action, r)])
}

fn any_name(ports: &[&str]) -> Rule {
    rule("any", &["*"], ports)
}

#[test]
fn an_own_policy_isolates_and_allows_what_it_lists() {
    let stripe = rule("stripe", &["*.stripe.com", "api.pay.example"], &["443", "443/udp", "53/udp"]);
    let g = shop().own("p", policy(vec![stripe], vec![])).group();
    assert_eq!(g.to("api.stripe.com", 443).via, TLS);
    assert_eq!(g.to("api.stripe.com", 443).rule.unwrap().rule.as_ref(), "stripe");
    assert_eq!(g.to("api.stripe.com", 80).reason, Reason::NotAllowed);
    assert_eq!(g.to("a.b.stripe.com", 443).reason, Reason::NotAllowed);
    assert_eq!(g.to_ip("192.0.2.1", 443).reason, Reason::NotAllowed);
    let udp = |p| g.connection(Some(&name("api.pay.example")), ip("192.0.2.1"), Proto::Udp, p);
    assert_eq!((udp(443).via, udp(443).reason), (Via::Allow(Carry::Block), Reason::QuicBlocked));
    assert!(!udp(443).allowed());
    assert_eq!(udp(53).via, FORWARD);
}

#[test]
fn names_in_dns() {
    let mut r = rule("r", &["*.stripe.com", "mail.example"], &["443"]);
    r.dns_types = vec![16];
    r.private_addresses = vec!["10.20.0.0/16".parse().unwrap()];
    r.min_binding = Some(std::time::Duration::from_secs(900));
    let g = shop().own("p", policy(vec![r], vec![])).group();
    assert_eq!(g.a("api.stripe.com"), Answer::Bind);
    assert_eq!((g.a("stripe.com"), g.a("com")), (Answer::NoData, Answer::NoData));
    assert_eq!((g.a("x.api.stripe.com"), g.a("evil.net")), (Answer::NxDomain, Answer::NxDomain));
    assert_eq!(g.name("evil.net", 1).reason, Reason::NameNotAllowed);
    assert_eq!(g.a("."), Answer::NoData);
    assert_eq!(g.a("a\\000.stripe.com"), Answer::NxDomain);
    for t in [1, 5, 28, 64, 65, 16] {
        assert_eq!(g.name("api.stripe.com", t).answer, Answer::Bind, "{t}");
    }
    let mx = g.name("api.stripe.com", 15);
    assert_eq!((mx.answer, mx.reason), (Answer::NoData, Reason::DnsType));
    assert!(g.name("api.stripe.com", 1).wildcard && !g.name("mail.example", 1).wildcard);
    let facts = g.name("mail.example", 1).facts;
    assert_eq!(facts.min_binding, Some(std::time::Duration::from_secs(900)));
    assert_eq!(facts.ports.get(Proto::Tcp, 443), Some(TLS));
    use tidegate_policy::world::AddressDecision::*;
    assert_eq!(g.address("mail.example", ip("10.20.1.1")), Accept);
    assert_eq!(g.address("mail.example", ip("10.21.1.1")), Default);
    assert_eq!(g.address("other.example", ip("10.20.1.1")), Default);
    // A cluster policy's rule says so as well as an own one.
    let mut r = rule("r", &["files.example"], &["443"]);
    r.private_addresses = vec!["10.30.0.0/16".parse().unwrap()];
    let own = policy(vec![rule("o", &["mail.example"], &["443"])], vec![]);
    let g = shop().own("p", own).clustered("c", cluster(Tier::Admin, 1, vec![(Action::Accept, r)])).group();
    assert_eq!(g.address("files.example", ip("10.30.1.1")), Accept);
    assert_eq!(g.address("mail.example", ip("10.30.1.1")), Default);
}

#[test]
fn a_deny_overrides_allows_of_all_own_policies() {
    let o = shop().own("a", policy(vec![rule("all", &["**.stripe.com"], &["443", "80"])], vec![])).own(
        "b",
        policy(
            vec![],
            vec![rule("legacy", &["old.stripe.com"], &["any"]), rule("part", &["half.stripe.com"], &["80"])],
        ),
    );
    let g = o.group();
    assert_eq!(g.to("old.stripe.com", 443).reason, Reason::DeniedByPolicy);
    assert_eq!(g.to("old.stripe.com", 443).rule.unwrap().rule.as_ref(), "legacy");
    assert_eq!((g.to("half.stripe.com", 80).via, g.to("half.stripe.com", 443).via), (Via::Deny, TLS));
    let d = g.name("old.stripe.com", 1);
    assert_eq!((d.answer, d.reason), (Answer::NoData, Reason::DeniedByPolicy), "names below it are allowed");
    assert_eq!(g.a("half.stripe.com"), Answer::Bind);
}

#[test]
fn prefixes_with_exceptions_and_ranges() {
    let r = rule("db", &["203.0.113.0/24-203.0.113.7/32", "2001:db8::/32"], &["5432-5439"]);
    let narrow = rule("narrow", &["203.0.113.128/25"], &["443", "443/udp"]);
    let g = shop().own("p", policy(vec![r, narrow], vec![rule("no", &["203.0.113.200/32"], &["5433"])])).group();
    assert_eq!(g.to_ip("203.0.113.6", 5432).via, FORWARD);
    assert_eq!(g.to_ip("203.0.113.6", 5440).reason, Reason::NotAllowed);
    assert_eq!(g.to_ip("203.0.113.7", 5432).reason, Reason::NotAllowed);
    assert_eq!(g.to_ip("2001:db8:1::1", 5439).via, FORWARD);
    assert_eq!((g.to_ip("203.0.113.200", 443).via, g.to_ip("203.0.113.200", 5432).via), (FORWARD, FORWARD));
    assert_eq!(g.to_ip("203.0.113.200", 5433).reason, Reason::DeniedByPolicy);
    let (_, set) = g.own_prefixes().unwrap();
    let at = |a: &str, p| tidegate_policy::prefix::longest_match(set, ip(a)).and_then(|(_, s)| s.get(Proto::Tcp, p));
    assert_eq!((at("203.0.113.7", 5432), at("203.0.113.200", 5433)), (None, Some(Via::Deny)));
    assert_eq!((at("203.0.113.129", 5435), at("203.0.113.129", 443)), (Some(FORWARD), Some(FORWARD)));
    assert_eq!(g.connection(None, ip("203.0.113.130"), Proto::Udp, 443).via, FORWARD, "no name, nothing to inspect");
}

#[test]
fn tiers_priority_and_pass() {
    let own = policy(vec![any_name(&["443"])], vec![]);
    let x = || rule("x", &["**.x.com"], &["443"]);
    let o = shop().own("p", own.clone()).clustered("deny", admin(20, Action::Deny, x()));
    assert_eq!(o.group().to("a.x.com", 443).reason, Reason::DeniedByPolicy);
    assert_eq!(o.group().a("a.x.com"), Answer::NoData, "own policies open names below");
    let passed = o.clone().clustered("pass", admin(10, Action::Pass, rule("p", &["a.x.com"], &["443"])));
    let d = passed.group().to("a.x.com", 443);
    assert_eq!(d.via, TLS);
    let said: Vec<Said> = d.explanation.steps.iter().map(|s| s.said.clone()).collect();
    assert_eq!(said, [Said::Pass, Said::Allow]);
    assert_eq!(passed.group().to("b.x.com", 443).via, Via::Deny);
    let accepted = o.clone().clustered("accept", admin(10, Action::Accept, rule("a", &["a.x.com"], &["443", "8443"])));
    let d = accepted.group().to("a.x.com", 8443);
    assert_eq!((d.via, d.rule.unwrap().kind), (TLS, "ClusterEgressPolicy"));
    // Lower first: behind the deny it comes too late.
    let late = o.clustered("accept", admin(30, Action::Accept, rule("a", &["a.x.com"], &["443"])));
    assert_eq!(late.group().to("a.x.com", 443).via, Via::Deny);
}

#[test]
fn the_first_match_of_a_policy_decides() {
    let rules = vec![
        (Action::Accept, rule("one", &["a.x.com"], &["443"])),
        (Action::Deny, rule("all", &["**.x.com"], &["any"])),
    ];
    let o = shop().with_ns(|n| n.managed = true).clustered("c", cluster(Tier::Admin, 1, rules));
    let g = o.group();
    assert_eq!((g.to("a.x.com", 443).via, g.to("a.x.com", 80).via), (TLS, Via::Deny));
    assert_eq!((g.a("a.x.com"), g.a("b.x.com")), (Answer::Bind, Answer::NxDomain));
}

#[test]
fn at_equal_priority_deny_comes_before_accept_and_both_are_conflicted() {
    let o = shop()
        .with_ns(|n| n.managed = true)
        .clustered("a-accept", admin(5, Action::Accept, any_name(&["443"])))
        .clustered("b-deny", admin(5, Action::Deny, rule("d", &["a.com"], &["443"])))
        .clustered("c-pass", admin(5, Action::Pass, any_name(&["443"])));
    let w = o.world();
    let g = w.group_of(ip("10.1.0.1")).unwrap();
    assert_eq!((g.to("a.com", 443).via, g.to("b.com", 443).via), (Via::Deny, TLS));
    let conflicted: Vec<&str> = w.issues().iter().map(|i| i.policy.name.as_ref()).collect();
    assert_eq!(conflicted, ["a-accept", "b-deny", "b-deny", "c-pass"]);
    let mut apart = o.clone();
    apart.cluster_policies.get_mut("b-deny").unwrap().namespaces = selector(&[("env", "test")]);
    assert!(apart.world().issues().is_empty(), "no live pod has both");
}

#[test]
fn baseline_holds_where_no_own_policy_selects_the_pod() {
    let base = cluster(
        Tier::Baseline,
        1,
        vec![
            (Action::Accept, rule("b", &["base.com"], &["443"])),
            (Action::Deny, rule("d", &["198.51.100.0/24"], &["any"])),
        ],
    );
    let managed = shop().with_ns(|n| n.managed = true).clustered("b", base.clone());
    let g = managed.group();
    assert_eq!(g.to("base.com", 443).via, TLS);
    assert_eq!(g.to_ip("198.51.100.1", 443).reason, Reason::DeniedByPolicy);
    assert_eq!(g.to("other.com", 443).reason, Reason::NotAllowed);
    let own = shop().clustered("b", base).own("p", policy(vec![rule("r", &["own.com"], &["443"])], vec![]));
    let g = own.group();
    assert_eq!((g.to("base.com", 443).reason, g.to("own.com", 443).via), (Reason::NotAllowed, TLS));
}

#[test]
fn ceilings_bound_grants_per_connection() {
    let own = policy(
        vec![rule("r", &["**.example.com", "evil.net"], &["443", "8080"]), rule("c", &["203.0.113.0/24"], &["443"])],
        vec![],
    );
    let o = shop()
        .own("p", own)
        .clustered("saas", ceiling(&["*.example.com", "203.0.113.0/25"], &["443"], &[]))
        .clustered("base", admin(1, Action::Accept, rule("acc", &["evil.org"], &["8080"])));
    let g = o.group();
    assert_eq!(g.to("a.example.com", 443).via, TLS);
    let d = g.to("a.example.com", 8080);
    assert_eq!((d.via, d.reason, d.rule.unwrap().rule.as_ref()), (Via::Deny, Reason::AboveCeiling, "r"));
    assert!(d.explanation.steps.iter().any(|s| s.said == Said::AboveCeiling("saas".into())));
    assert_eq!(g.to("a.b.example.com", 443).reason, Reason::AboveCeiling);
    assert_eq!(g.to("evil.org", 8080).via, TLS, "a ceiling does not bound cluster policies");
    assert_eq!(
        (g.to_ip("203.0.113.1", 443).via, g.to_ip("203.0.113.200", 443).reason),
        (FORWARD, Reason::AboveCeiling)
    );
    let d = g.name("evil.net", 1);
    assert_eq!((d.reason, d.rule.unwrap().rule.as_ref()), (Reason::AboveCeiling, "r"));
    let issues: Vec<String> = o.world().issues().iter().map(ToString::to_string).collect();
    assert_eq!(
        issues,
        [
            "EgressPolicy shop/p: egress[c].toCIDRs[0]: clipped, AboveCeiling (by saas)",
            "EgressPolicy shop/p: egress[r].toFQDNs[0]: clipped, AboveCeiling (by saas)",
            "EgressPolicy shop/p: egress[r].toFQDNs[1]: refused, AboveCeiling (by saas)",
            "EgressPolicy shop/p: egress[r].toPorts[1]: refused, AboveCeiling (by saas)",
        ]
    );
    // Every ceiling has to hold it.
    let two = o.clustered("narrow", ceiling(&["b.example.com"], &[], &[Permit::Cidrs]));
    let g = two.group();
    assert_eq!((g.to("a.example.com", 443).reason, g.to("b.example.com", 443).via), (Reason::AboveCeiling, TLS));
    assert_eq!(g.to_ip("203.0.113.1", 443).via, FORWARD);
}

#[test]
fn weakenings_need_a_permit_where_a_ceiling_selects_the_pod() {
    let mut r = rule("r", &["a.com"], &["443", "443/udp"]);
    r.sni = SniMode::Unchecked;
    r.ech_allow = true;
    r.dns_types = vec![16];
    r.private_addresses = vec!["10.20.0.0/16".parse().unwrap()];
    let o = shop().own("p", policy(vec![r.clone()], vec![]));
    let free = o.group();
    assert_eq!((free.to("a.com", 443).via, free.to("a.com", 443).ech_allow), (FORWARD, true));
    let udp = free.connection(Some(&name("a.com")), ip("192.0.2.1"), Proto::Udp, 443);
    assert_eq!(udp.via, Via::Allow(Carry::Block), "unchecked is about TCP");
    assert!(free.name("a.com", 16).answer == Answer::Bind && free.name("a.com", 1).facts.ech_allow);
    let bounded = o.clone().clustered("c", ceiling(&["*"], &[], &[]));
    let g = bounded.group();
    assert_eq!((g.to("a.com", 443).via, g.to("a.com", 443).ech_allow), (TLS, false));
    assert_eq!(g.name("a.com", 16).answer, Answer::NoData);
    assert!(g.name("a.com", 1).facts.private.is_empty() && !g.name("a.com", 1).facts.ech_allow);
    let fields: Vec<String> = bounded.world().issues().iter().map(|i| i.path.clone()).collect();
    assert_eq!(fields, ["egress[r].dnsTypes", "egress[r].ech", "egress[r].privateAddresses", "egress[r].sni"]);
    let all = [Permit::SniUnchecked, Permit::EchAllow, Permit::DnsTypes, Permit::PrivateAddresses];
    let g = o.clustered("c", ceiling(&["*"], &[], &all)).group();
    assert_eq!((g.to("a.com", 443).via, g.name("a.com", 16).answer), (FORWARD, Answer::Bind));
    // A cluster policy's own weakening needs none.
    r.name = "cluster".into();
    let g = shop()
        .with_ns(|n| n.managed = true)
        .clustered("acc", admin(1, Action::Accept, r))
        .clustered("c", ceiling(&[], &[], &[]))
        .group();
    assert_eq!(g.to("a.com", 443).via, FORWARD);
}

#[test]
fn inspection_wins_over_prefixes_and_name_denies_hold_for_both() {
    let o = shop().own(
        "p",
        policy(
            vec![rule("n", &["a.com"], &["443"]), rule("c", &["192.0.2.0/24"], &["443", "80"])],
            vec![rule("d", &["bad.com"], &["443"])],
        ),
    );
    let g = o.group();
    assert_eq!((g.to("a.com", 443).via, g.to("a.com", 80).via, g.to_ip("192.0.2.1", 443).via), (TLS, FORWARD, FORWARD));
    assert_eq!(g.to("a.com", 443).rule.unwrap().rule.as_ref(), "n");
    assert_eq!((g.to("bad.com", 443).via, g.to("bad.com", 80).via), (Via::Deny, FORWARD));
    let unbound = |n: &str| g.connection_unbound(&name(n), ip("192.0.2.1"), Proto::Tcp, 443);
    assert_eq!((unbound("bad.com").via, unbound("x.com").via), (Via::Deny, FORWARD));
    assert_eq!(g.connection_unbound(&name("a.com"), ip("198.51.100.1"), Proto::Tcp, 443).reason, Reason::NotAllowed);
    let grant = |names: &[&str]| {
        let names: Vec<_> = names.iter().map(|n| name(n)).collect();
        g.grant(g.scope().class(ip("192.0.2.1"), &names)).unwrap()
    };
    assert_eq!(grant(&["bad.com"]).get(Proto::Tcp, 443), Some(Via::Deny));
    assert_eq!(grant(&["bad.com", "other.com"]).get(Proto::Tcp, 443), Some(TLS), "only the name tells them apart");
    assert_eq!(grant(&["other.com"]).get(Proto::Tcp, 443), Some(FORWARD));
}

#[test]
fn guarded_pods_feel_denies_only() {
    let rules = vec![
        (Action::Accept, rule("ok", &["good.paste.com", "198.51.100.7/32"], &["443"])),
        (Action::Deny, rule("no", &["**.paste.com"], &["any"])),
        (Action::Deny, rule("net", &["198.51.100.0/24"], &["any"])),
    ];
    let g = shop().clustered("c", cluster(Tier::Admin, 1, rules)).group();
    assert_eq!(g.touch(), Touch::Guarded);
    assert_eq!((g.to("a.paste.com", 443).reason, g.to("other.com", 443).via), (Reason::DeniedByPolicy, Via::Pass));
    assert_eq!((g.to_ip("198.51.100.1", 1).via, g.to_ip("198.51.100.7", 443).via), (Via::Deny, Via::Pass));
    assert_eq!(g.to_ip("169.254.169.254", 80).via, Via::Pass);
    assert_eq!((g.a("a.paste.com"), g.a("b.a.paste.com")), (Answer::NxDomain, Answer::NxDomain));
    assert_eq!(g.a("good.paste.com"), Answer::Bind, "denied on a part of its ports only");
    let (_, set) = g.admin_prefixes().unwrap();
    assert_eq!(set[&"198.51.100.7/32".parse().unwrap()].get(Proto::Tcp, 443), Some(Via::Pass));
    // Any protocol: what has no ports is denied, also where a port is accepted ahead of it.
    for net in ["198.51.100.0/24", "198.51.100.7/32"] {
        assert_eq!(set[&net.parse().unwrap()].get(Proto::Other, 0), Some(Via::Deny), "{net}");
    }
    let part = |ports: &[&str]| {
        let g = shop().clustered("c", admin(1, Action::Deny, rule("no", &["198.51.100.0/24"], ports))).group();
        let (_, set) = g.admin_prefixes().unwrap();
        set[&"198.51.100.0/24".parse().unwrap()].get(Proto::Other, 0)
    };
    assert_eq!(part(&["0-65535", "0-65535/udp"]), None, "TCP and UDP are named");
    let total = shop().clustered("c", admin(1, Action::Deny, rule("no", &["paste.com"], &["any"]))).group();
    assert_eq!(total.a("paste.com"), Answer::NoData, "what is below resolves");
    assert_eq!((total.a("other.com"), total.name("other.com", 15).answer), (Answer::Resolve, Answer::Resolve));
    let grant = |g: &tidegate_policy::world::Group, names: &[&str]| {
        let names: Vec<_> = names.iter().map(|n| name(n)).collect();
        g.grant(g.scope().class(ip("192.0.2.1"), &names)).unwrap().get(Proto::Tcp, 80)
    };
    assert_eq!(grant(&g, &["x.paste.com"]), Some(Via::Deny));
    let class = g.scope().class(ip("192.0.2.1"), &[name("x.paste.com")]);
    assert_eq!(g.grant(class).unwrap().get(Proto::Other, 0), Some(Via::Deny));
    assert_eq!(grant(&g, &["x.paste.com", "other.com"]), None, "not only denied names");
}

#[test]
fn an_accepted_name_stands_above_a_denied_prefix_for_guarded_pods() {
    let at = ip("198.51.100.1");
    let named = |says, ports: &[&str]| {
        let rules = vec![
            (says, rule("name", &["good.paste.com"], ports)),
            (Action::Deny, rule("net", &["198.51.100.0/24"], &["0-65535"])),
        ];
        shop().clustered("c", cluster(Tier::Admin, 1, rules)).group()
    };
    let grant = |g: &tidegate_policy::world::Group, names: &[&str], port| {
        let names: Vec<_> = names.iter().map(|n| name(n)).collect();
        g.grant(g.scope().class(at, &names)).unwrap().get(Proto::Tcp, port)
    };
    let g = named(Action::Accept, &["443"]);
    assert_eq!((g.touch(), g.to_ip("198.51.100.1", 443).via), (Touch::Guarded, Via::Deny));
    // What nodes hold and what is said of a connection is the same.
    let says = |n: &str, port| g.connection(Some(&name(n)), at, Proto::Tcp, port).via;
    for (n, port, via) in
        [("good.paste.com", 443, Via::Pass), ("good.paste.com", 80, Via::Deny), ("other.com", 443, Via::Deny)]
    {
        assert_eq!((says(n, port), grant(&g, &[n], port)), (via, Some(via)), "{n} {port}");
    }
    assert_eq!(grant(&g, &["good.paste.com", "other.com"], 443), Some(Via::Pass), "only the name tells them apart");
    assert_eq!(grant(&g, &["good.paste.com", "other.com"], 80), Some(Via::Deny));
    // A name that a policy below is left to stands above it, too; a denied one does not.
    assert_eq!(grant(&named(Action::Pass, &["443"]), &["good.paste.com"], 443), Some(Via::Pass));
    assert_eq!(grant(&named(Action::Deny, &["443"]), &["good.paste.com"], 443), Some(Via::Deny));
}

#[test]
fn metadata_and_encrypted_dns_are_closed_to_isolated_pods() {
    let wide = rule("wide", &["0.0.0.0/0"], &["0-65535", "0-65535/udp"]);
    let o = shop().own("p", policy(vec![wide.clone()], vec![])).clustered("w", admin(9, Action::Accept, wide));
    let g = o.group();
    assert_eq!(g.to_ip("169.254.169.254", 80).reason, Reason::Metadata);
    assert_eq!(g.to_ip("100.100.100.200", 80).reason, Reason::Metadata);
    assert_eq!(g.to_ip("9.9.9.9", 853).reason, Reason::EncryptedDns);
    let exact = o
        .clustered("m", admin(1, Action::Accept, rule("m", &["169.254.169.254/32"], &["80"])))
        .clustered("d", admin(2, Action::Accept, rule("d", &["9.9.9.9/32"], &["853"])));
    let g = exact.group();
    assert_eq!((g.to_ip("169.254.169.254", 80).via, g.to_ip("169.254.169.254", 443).via), (Via::Pass, Via::Deny));
    assert_eq!((g.to_ip("9.9.9.9", 853).via, g.to_ip("9.9.9.10", 853).via), (FORWARD, Via::Deny));
}

#[test]
fn what_belongs_to_the_cluster() {
    let mut o = shop().own("p", policy(vec![rule("r", &["a.com"], &["443"])], vec![]));
    o.settings.cluster_prefixes = vec!["10.96.0.0/16".parse().unwrap()];
    o.nodes.insert(
        "n1".into(),
        Node {
            addresses: vec![ip("192.168.0.1")],
            pod_prefixes: vec!["fd00:1::/64".parse().unwrap()],
            ..Node::default()
        },
    );
    let w = o.world();
    for a in ["10.96.3.4", "192.168.0.1", "fd00:1::9", "10.1.0.1"] {
        assert!(w.in_cluster(ip(a)), "{a}");
    }
    assert!(!w.in_cluster(ip("192.168.0.2")));
    o.nodes.insert("n2".into(), Node { addresses: vec![ip("192.168.0.2")], ..Node::default() });
    let nodes = Touched { nodes: true, ..Touched::default() };
    let joined = World::compile(&o, UnixSeconds(1000), Some((&w, &nodes)));
    assert!(joined.in_cluster(ip("192.168.0.2")) && joined.changes(&w) == Default::default());
}

#[test]
fn a_denied_prefix_is_left_out_of_answers() {
    let o = shop().own(
        "p",
        policy(
            vec![rule("r", &["a.com"], &["443"])],
            vec![rule("d", &["198.51.100.0/24"], &["any"]), rule("e", &["203.0.113.0/24"], &["80"])],
        ),
    );
    use tidegate_policy::world::AddressDecision::*;
    let g = o.group();
    assert_eq!(g.address("a.com", ip("198.51.100.1")), Filter(Reason::DeniedByPolicy));
    assert_eq!(g.address("a.com", ip("203.0.113.1")), Default, "443 is still open");
}

#[test]
fn an_open_filter_resolves_all_and_binds_what_is_allowed() {
    let mut o = shop().own("p", policy(vec![rule("r", &["a.com"], &["443"])], vec![rule("d", &["bad.com"], &["any"])]));
    o.settings.dns_filter = DnsFilter::Open;
    let g = o.group();
    assert_eq!((g.a("a.com"), g.a("b.com"), g.a("bad.com")), (Answer::Bind, Answer::Resolve, Answer::NoData));
    assert_eq!(g.name("b.com", 16).reason, Reason::DnsType);
    assert_eq!(o.clone().clustered("c", ceiling(&["*"], &[], &[])).group().a("b.com"), Answer::NxDomain);
    assert_eq!(o.clustered("c", ceiling(&["*"], &[], &[Permit::DnsOpen])).group().a("b.com"), Answer::Resolve);
}

#[test]
fn a_name_that_passes_its_tier_is_not_decided_by_a_prefix_of_that_tier() {
    let rules = |action| {
        let by_prefix = rule("p", &["192.0.2.0/24"], &["443", "853"]);
        vec![(Action::Pass, rule("n", &["a.com"], &["443", "853"])), (action, by_prefix)]
    };
    let wide = cluster(Tier::Baseline, 1, vec![(Action::Accept, rule("w", &["0.0.0.0/0"], &["853"]))]);
    let grant = |g: &tidegate_policy::world::Group, port| {
        let class = g.scope().class(ip("192.0.2.1"), &[name("a.com")]);
        g.grant(class).unwrap().get(Proto::Tcp, port)
    };
    let accept = shop()
        .with_ns(|n| n.managed = true)
        .clustered("c", cluster(Tier::Admin, 1, rules(Action::Accept)))
        .clustered("w", wide);
    let g = accept.group();
    assert_eq!((g.to("a.com", 443).reason, grant(&g, 443)), (Reason::NotAllowed, Some(Via::Deny)));
    assert_eq!(g.to_ip("192.0.2.1", 443).via, FORWARD);
    // Once a prefix has opened port 853, width no longer counts.
    assert_eq!((g.to("a.com", 853).via, grant(&g, 853)), (FORWARD, Some(FORWARD)));
    let g = shop().clustered("c", cluster(Tier::Admin, 1, rules(Action::Deny))).group();
    assert_eq!((g.to("a.com", 443).via, grant(&g, 443)), (Via::Pass, Some(Via::Pass)));
    assert_eq!(g.to_ip("192.0.2.1", 443).via, Via::Deny);
}
