use std::net::IpAddr;

use tidegate_kubernetes::members::Member;
use tidegate_policy::model::{Namespace, Pod, Policy, PolicyMode, Pool, UnixSeconds};

use super::*;

const GATEWAYS: [&str; 3] = ["gw-a", "gw-b", "gw-c"];
const PAIRS: u8 = 12;

fn desired() -> Desired {
    let text = "{name: gw-a, node: n1, control: '127.0.0.1:1', socket: /nowhere/s, pins: /nowhere/p, \
         kubernetes: {namespace: x}, resolvers: [{servers: ['192.0.2.53:53']}]}";
    let desired = Desired::new(Arc::new(serde_saphyr::from_str(text).unwrap()));
    let member = |name: &str| Member {
        name: name.into(),
        node: format!("n-{name}"),
        addresses: vec!["192.0.2.1:7443".parse().unwrap()],
        terminating: false,
    };
    desired.set_members(Members { listed: GATEWAYS.map(member).into(), lingering: Vec::new() });
    desired
}

/// One namespace that was given the first pair of a pool with many, of which these drain.
fn compiled(draining: &[u8]) -> Compiled {
    let mut o = Objects::default();
    let managed = Namespace { uid: "u".into(), ..Namespace::default() };
    o.namespaces.insert("shop".into(), managed);
    let pair = |n| model::Pair { ipv4: Some([203, 0, 113, n].into()), ipv6: None, draining: draining.contains(&n) };
    let source = AddressSource::Static { interface: None, pairs: (1..=PAIRS).map(pair).collect() };
    o.pools.insert("p".into(), Pool { allowed_namespaces: Some(Selector::default()), source, gateway_nodes: None });
    o.assigned.insert(("shop".into(), "p".into()), model::Pair { draining: false, ..pair(1) });
    let policy = Policy {
        created: UnixSeconds(0),
        pod_selector: Selector::default(),
        mode: PolicyMode::Enforce,
        pool: Some("p".into()),
        egress: Vec::new(),
        deny: Vec::new(),
    };
    o.policies.insert(("shop".into(), "all".into()), policy);
    let pod = Pod {
        node: "n1".into(),
        addresses: vec![IpAddr::from([10, 0, 0, 1])],
        labels: Labels::new(),
        host_network: false,
        ending: false,
        mirror: false,
    };
    o.pods.insert(("shop".into(), "web".into()), pod);
    Compiled::new(Arc::new(World::compile(&o, UnixSeconds(1), None)), &o, 1)
}

fn pair(n: u8) -> Pair {
    Pair { pool: "p".into(), ipv4: Some([203, 0, 113, n].into()), ipv6: None }
}

fn claims(all: &[(u8, &str)]) -> BTreeMap<Pair, Ownership> {
    let claim = |(n, owner): &(u8, &str)| {
        let claim = Ownership { owner: (*owner).into(), epoch: 1, held: *owner == "gw-a", standbys: Vec::new() };
        (pair(*n), claim)
    };
    all.iter().map(claim).collect()
}

fn first(orders: &BTreeMap<Pair, Order>, n: u8) -> &str {
    orders[&pair(n)].candidates[0].as_str()
}

#[test]
fn beside_a_pair_that_drains_all_of_its_pool_have_an_owner_and_fall_to_the_same() {
    let desired = desired();
    let calm = desired.pairs(&compiled(&[]));
    assert_eq!(calm.keys().collect::<Vec<_>>(), [&pair(1)], "nobody uses the others");
    let drains = compiled(&[1, 2]);
    let spread = desired.pairs(&drains);
    assert_eq!(spread.len(), usize::from(PAIRS));
    assert_eq!(spread[&pair(1)], calm[&pair(1)], "its owner is not known yet");
    for owner in GATEWAYS {
        // Who holds one that does not drain draws none of the others.
        desired.set_claims(claims(&[(1, owner), (3, GATEWAYS[0]), (4, GATEWAYS[1]), (5, GATEWAYS[2])]), None);
        let near = desired.pairs(&drains);
        assert!((3..=PAIRS).all(|n| first(&near, n) == owner), "scopes can go to any of them at {owner}");
        assert!((3..=PAIRS).all(|n| near[&pair(n)].candidates.len() == 3), "and others take them over");
        for n in [1, 2] {
            assert_eq!(near[&pair(n)], spread[&pair(n)], "one that drains falls to whom it would without that");
        }
        assert_eq!(desired.pairs(&compiled(&[])), calm, "nothing drains");
    }
}

#[test]
fn what_is_held_beside_a_pair_that_drains_is_in_place_before_a_scope_goes_there() {
    let desired = desired();
    let addresses =
        |c: &Compiled| -> Vec<u8> { desired.held(&c.world).iter().map(|h| h.ipv4.unwrap().octets()[3]).collect() };
    desired.set_claims(claims(&[(1, "gw-a"), (2, "gw-b"), (3, "gw-a")]), None);
    assert_eq!(addresses(&compiled(&[])), [1]);
    let drains = compiled(&[1]);
    let mut held = addresses(&drains);
    held.sort_unstable();
    assert_eq!(held, [1, 3], "not what another one holds");
    let marks = |c: &Compiled| desired.held(&c.world).iter().map(|h| (h.ipv4, h.index)).collect::<BTreeMap<_, _>>();
    assert_eq!(marks(&drains)[&pair(1).ipv4], marks(&compiled(&[]))[&pair(1).ipv4], "its mark stays what it was");
    desired.set_claims(claims(&[(1, "gw-b"), (3, "gw-a")]), None);
    assert_eq!(addresses(&drains), [3]);
}

#[test]
fn agents_are_led_to_gateways_that_are_there_and_not_to_those_that_were() {
    let desired = desired();
    let told = |desired: &Desired| {
        let gateways = desired.frame(&compiled(&[])).gateways;
        gateways.into_iter().map(|(name, g)| (name, g.control.len())).collect::<Vec<_>>()
    };
    assert_eq!(told(&desired), GATEWAYS.map(|g| (g.to_owned(), 1)));
    let mut members = (*desired.members()).clone();
    members.lingering = vec![members.listed.pop().unwrap()];
    members.listed[0].addresses = (0..20).map(|n| ([192, 0, 2, n], 7443).into()).collect();
    desired.set_members(members);
    // No message has room for more.
    let expected = [("gw-a", MAX_GATEWAY_ADDRESSES), ("gw-b", 1), ("gw-c", 0)];
    assert_eq!(told(&desired), expected.map(|(g, n)| (g.to_owned(), n)));
}
