use tidegate_policy::state::{Gateway, Group, Named, Node, Scope};
use tidegate_policy::{Carry, PortRange, Proto, Via};

use super::*;

fn ports(port: u16) -> PortSet {
    PortSet::from_precedence([PortRange { proto: Proto::Tcp, lo: port, hi: port, via: Via::Allow(Carry::Tls) }])
}

fn ip(last: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, last])
}

/// Control endpoints of a gateway.
fn control(lasts: &[u8]) -> Vec<std::net::SocketAddr> {
    lasts.iter().map(|last| (ip(*last), 7443).into()).collect()
}

fn endpoint(touch: Touch, member: Option<(u128, u128)>) -> Endpoint {
    Endpoint {
        node: "n1".into(),
        namespace: "ns".into(),
        pod: "pod".into(),
        touch,
        member: member.map(|(s, g)| (ScopeKey(s), GroupKey(g))),
    }
}

fn scope(owner: &str, epoch: u64) -> Scope {
    Scope { owner: owner.into(), epoch, pair: 0, standbys: vec![] }
}

/// Scope 1 with group 2, one endpoint, one grant on `port`.
fn view(owner: &str, epoch: u64, port: u16) -> NodeState {
    let mut s = NodeState::default();
    s.scopes.insert(ScopeKey(1), scope(owner, epoch));
    s.groups.insert(GroupKey(2), Group { isolated: true, audit: false, admin: None, own: None });
    s.grants.insert((GroupKey(2), ClassKey(3)), ports(port));
    s.endpoints.insert(ip(1), endpoint(Touch::Isolated, Some((1, 2))));
    s
}

fn src<'a>(name: &'a str, live: bool, state: &'a NodeState) -> Source<'a> {
    Source { name, live, silent: !live, state }
}

fn grant(m: &NodeState) -> Option<&PortSet> {
    m.grants.get(&(GroupKey(2), ClassKey(3)))
}

#[test]
fn a_scope_follows_its_owner_and_not_who_else_speaks_of_it() {
    let (a, b) = (view("a", 5, 443), view("a", 5, 80));
    for order in [[src("a", true, &a), src("b", true, &b)], [src("b", true, &b), src("a", true, &a)]] {
        assert_eq!(grant(&merge(&order)), Some(&ports(443)));
    }
}

#[test]
fn a_higher_epoch_takes_the_scope_and_an_older_one_is_dropped() {
    let (a, b) = (view("a", 5, 443), view("b", 6, 80));
    let m = merge(&[src("a", true, &a), src("b", true, &b)]);
    assert_eq!(m.scopes[&ScopeKey(1)], scope("b", 6));
    assert_eq!(grant(&m), Some(&ports(80)));
    // Also while the new owner is away: its epoch is remembered.
    let m = merge(&[src("a", true, &a), src("b", false, &b)]);
    assert_eq!(m.scopes[&ScopeKey(1)], scope("b", 6));
    assert_eq!(grant(&m), Some(&ports(80)));
}

#[test]
fn a_name_leads_inside_if_nobody_says_otherwise() {
    let view = |names: &[(&str, Named)]| {
        let mut s = NodeState::default();
        for (name, to) in names {
            s.names.insert((*name).into(), *to);
        }
        s
    };
    let a = view(&[("db", Named::Inside), ("old", Named::Inside), ("partner", Named::Outside)]);
    let b = view(&[("db", Named::Inside), ("new", Named::Inside), ("partner", Named::Inside)]);
    let all = |m: NodeState| {
        let mut all: Vec<_> = m.names.iter().map(|(n, to)| (n.to_string(), *to == Named::Inside)).collect();
        all.sort_unstable();
        all.into_iter().map(|(n, inside)| n + if inside { "" } else { "!" }).collect::<Vec<_>>().join(" ")
    };
    for order in [[src("a", true, &a), src("b", true, &b)], [src("b", true, &b), src("a", true, &a)]] {
        assert_eq!(all(merge(&order)), "db new old partner!");
    }
    assert_eq!(all(merge(&[src("a", false, &a), src("b", true, &b)])), "db new partner");
    assert_eq!(all(merge(&[src("a", false, &a)])), "db old partner!");
}

#[test]
fn names_follow_what_gateways_say_one_by_one() {
    let mut random = tidegate_random::Random(7);
    let mut below = |n: u64| random.next() % n;
    let (mut states, mut merger) =
        ([NodeState::default(), NodeState::default(), NodeState::default()], Merger::default());
    for _ in 0..2_000 {
        let state = &mut states[below(3) as usize];
        let name = format!("s{}", below(40));
        match below(3) {
            0 => drop(state.names.remove(name.as_str())),
            to => drop(state.names.insert(name.into(), if to == 1 { Named::Inside } else { Named::Outside })),
        }
        let (space, touch) = (format!("n{}", below(9)), [Touch::Untouched, Touch::Guarded, Touch::Isolated]);
        states[below(3) as usize].namespaces.insert(space.into(), touch[below(3) as usize]);
        let lives = below(8) + 7 * below(2);
        let all: Vec<_> = ["a", "b", "c"].into_iter().zip(&states).enumerate().collect();
        let sources: Vec<_> = all.into_iter().map(|(i, (name, s))| src(name, lives >> i & 1 == 1, s)).collect();
        let (merged, mut names) = (merger.merge(&sources), BTreeMap::new());
        for s in sources.iter().filter(|s| s.live || lives & 7 == 0) {
            for (name, to) in s.state.names.iter() {
                let said = names.entry(name.clone()).or_insert(*to);
                *said = (*said).max(*to);
            }
        }
        assert!(merged.names.len() == names.len() && names.iter().all(|(n, to)| merged.names.get(n) == Some(to)));
        assert_eq!(merged, merge(&sources));
    }
}

#[test]
fn the_last_known_good_stays_while_gateways_are_away() {
    let mut a = view("a", 5, 443);
    a.nodes.insert("n1".into(), Node { addresses: vec![ip(9)] });
    let mut b = NodeState::default();
    b.scopes.insert(ScopeKey(1), scope("a", 5));
    let m = merge(&[src("a", false, &a), src("b", true, &b)]);
    assert_eq!(grant(&m), Some(&ports(443)));
    assert!(m.endpoints.contains_key(&ip(1)));
    let m = merge(&[src("a", false, &a), src("b", false, &b)]);
    assert_eq!(m.nodes["n1"].addresses, vec![ip(9)]);
}

#[test]
fn a_gateway_that_is_away_and_owns_nothing_says_nothing() {
    let mut a = view("a", 5, 443);
    a.endpoints.insert(ip(7), endpoint(Touch::Untouched, None));
    a.endpoints.insert(ip(8), endpoint(Touch::Isolated, Some((1, 2))));
    let b = view("b", 6, 80);
    let m = merge(&[src("a", false, &a), src("b", true, &b)]);
    assert_eq!(m.endpoints.keys().copied().collect::<Vec<_>>(), vec![ip(1)]);
}

#[test]
fn an_owner_that_was_never_heard_is_stood_in_for() {
    let b = view("a", 5, 80);
    let m = merge(&[src("b", true, &b)]);
    assert_eq!(m.scopes[&ScopeKey(1)].owner, "a");
    assert_eq!(grant(&m), Some(&ports(80)));
    assert!(m.groups.contains_key(&GroupKey(2)));
}

#[test]
fn while_the_owner_is_silent_what_only_others_know_holds_too() {
    let (mut a, mut b) = (view("a", 5, 443), view("a", 5, 80));
    let (theirs, new) = ((GroupKey(2), ClassKey(4)), (GroupKey(2), ClassKey(5)));
    a.grants.insert(theirs, ports(25));
    b.grants.insert(new, ports(26));
    b.grants.insert((GroupKey(9), ClassKey(5)), ports(27));
    for live in [true, false] {
        let owner = Source { name: "a", live, silent: true, state: &a };
        let m = merge(&[owner, src("b", true, &b)]);
        assert_eq!((grant(&m), m.grants.get(&theirs)), (Some(&ports(443)), Some(&ports(25))), "the owner's own stays");
        assert_eq!((m.grants.get(&new), m.grants.len()), (Some(&ports(26)), 3));
        // One that is away itself, or that says nothing either, does not answer for it.
        assert_eq!(merge(&[owner, src("b", false, &b)]).grants.len(), 2);
        assert_eq!(merge(&[owner, Source { silent: true, ..src("b", true, &b) }]).grants.len(), 2);
    }
    let m = merge(&[src("a", true, &a), src("b", true, &b)]);
    assert_eq!(m.grants.get(&new), None, "the owner knows what it does not say");
}

#[test]
fn an_endpoint_that_moved_while_the_owner_is_away_follows_the_live_view() {
    let a = view("a", 5, 443);
    let mut b = NodeState::default();
    b.scopes.insert(ScopeKey(1), scope("a", 5));
    b.scopes.insert(ScopeKey(4), scope("b", 1));
    b.groups.insert(GroupKey(5), Group { isolated: true, audit: false, admin: None, own: None });
    b.endpoints.insert(ip(1), endpoint(Touch::Isolated, Some((4, 5))));
    let m = merge(&[src("a", false, &a), src("b", true, &b)]);
    assert_eq!(m.endpoints[&ip(1)].member, Some((ScopeKey(4), GroupKey(5))));
}

#[test]
fn the_owner_says_what_is_untouched_and_others_see_new_pods_first() {
    let mut a = view("a", 5, 443);
    a.endpoints.insert(ip(1), endpoint(Touch::Untouched, None));
    let mut b = view("a", 5, 80);
    b.endpoints.insert(ip(2), endpoint(Touch::Isolated, Some((1, 2))));
    for order in [["a", "b"], ["b", "a"]] {
        let sources = order.map(|n| src(n, true, if n == "a" { &a } else { &b }));
        let m = merge(&sources);
        assert_eq!(m.endpoints[&ip(1)].touch, Touch::Untouched);
        assert_eq!(m.endpoints[&ip(2)].touch, Touch::Isolated);
        assert_eq!(grant(&m), Some(&ports(443)), "the owner's group holds for the new pod too");
    }
    // The same with names in the other order, so that neither view wins by its name.
    let (a2, b2) = (
        NodeState { scopes: [(ScopeKey(1), scope("z", 5))].into(), ..a },
        NodeState { scopes: [(ScopeKey(1), scope("z", 5))].into(), ..b },
    );
    let m = merge(&[src("z", true, &a2), src("b", true, &b2)]);
    assert_eq!(m.endpoints[&ip(1)].touch, Touch::Untouched);
}

#[test]
fn cluster_values_are_a_union_that_only_narrows_what_must_narrow() {
    let net = |s: &str| -> ipnet::IpNet { s.parse().unwrap() };
    let with = |prefixes: &[&str], node_ports, ping| NodeState {
        cluster: Cluster {
            prefixes: prefixes.iter().map(|p| net(p)).collect(),
            node_ports: Some(node_ports),
            dns: vec![],
            ping,
            suffixes: vec!["cluster.local".into()],
        },
        ..NodeState::default()
    };
    let mut a = with(&["10.0.0.0/8"], (30000, 31000), true);
    a.gateways.insert("b".into(), Gateway { node: "wrong".into(), control: control(&[1]) });
    let mut b = with(&["10.0.0.0/8", "fd00::/8"], (30500, 32767), false);
    b.gateways.insert("b".into(), Gateway { node: "right".into(), control: control(&[2, 1]) });
    let m = merge(&[src("a", true, &a), src("b", true, &b)]);
    assert_eq!(m.cluster.prefixes.len(), 2);
    assert_eq!(m.cluster.suffixes, ["cluster.local"]);
    assert_eq!(m.cluster.node_ports, Some((30000, 32767)));
    assert!(!m.cluster.ping);
    assert_eq!(m.gateways["b"], Gateway { node: "right".into(), control: control(&[1, 2]) });
    assert_eq!(merge(&[]), NodeState::default());
}

const T: Duration = Duration::from_secs(100);

fn snapshot(boot: u64, sequence: u64, state: &NodeState) -> Update {
    Update { boot, sequence, snapshot: true, set: state.entries(), delete: vec![] }
}

#[test]
fn a_model_needs_a_snapshot_and_a_growing_sequence() {
    let mut m = Model::default();
    let delta = |boot, sequence| Update { boot, sequence, ..Update::default() };
    assert_eq!(m.update(delta(1, 1), T), Err(UpdateError::NoSnapshot));
    m.update(snapshot(1, 4, &view("a", 1, 443)), T).unwrap();
    m.update(delta(1, 5), T).unwrap();
    assert_eq!(m.update(delta(1, 5), T), Err(UpdateError::Sequence { last: 5, got: 5 }));
    assert_eq!(m.update(delta(2, 6), T), Err(UpdateError::NoSnapshot));
    m.away();
    assert!(!m.live() && m.known());
    assert_eq!(m.update(delta(1, 6), T), Err(UpdateError::NoSnapshot), "a new connection begins with a snapshot");
    assert_eq!(grant(m.state()), Some(&ports(443)));
    // A snapshot replaces everything, with any sequence.
    m.update(snapshot(2, 1, &NodeState::default()), T).unwrap();
    assert_eq!(m.state(), &NodeState::default());
}

#[test]
fn deltas_set_and_delete() {
    let mut m = Model::default();
    m.update(snapshot(1, 1, &view("a", 1, 443)), T).unwrap();
    let delta = Update {
        boot: 1,
        sequence: 2,
        snapshot: false,
        set: vec![Entry::Grant(GroupKey(2), ClassKey(9), ports(25))],
        delete: vec![EntryKey::Grant(GroupKey(2), ClassKey(3))],
    };
    m.update(delta, T).unwrap();
    assert_eq!(m.state().grants.keys().collect::<Vec<_>>(), vec![&(GroupKey(2), ClassKey(9))]);
}

#[test]
fn a_grant_that_came_with_a_fact_survives_a_racing_snapshot_but_no_restart_and_no_delete() {
    let key = (GroupKey(2), ClassKey(7));
    let fresh = || {
        let mut m = Model::default();
        m.update(snapshot(1, 1, &view("a", 1, 443)), T).unwrap();
        assert!(m.grants(1, vec![(key.0, key.1, ports(25))], T));
        assert!(!m.grants(1, vec![(key.0, key.1, ports(25))], T));
        m
    };
    let mut m = fresh();
    m.update(snapshot(1, 2, &view("a", 1, 443)), T + Duration::from_secs(1)).unwrap();
    assert!(m.state().grants.contains_key(&key));
    m.update(snapshot(1, 3, &view("a", 1, 443)), T + Duration::from_secs(3)).unwrap();
    assert!(!m.state().grants.contains_key(&key), "a snapshot long after knows better");

    let mut m = fresh();
    m.update(snapshot(2, 1, &view("a", 1, 443)), T).unwrap();
    assert!(!m.state().grants.contains_key(&key), "another boot");

    // Facts of the next boot may come before its snapshot, and before any.
    for mut m in [Model::default(), fresh()] {
        m.grants(2, vec![(key.0, ClassKey(8), ports(26))], T);
        m.update(snapshot(2, 1, &view("a", 1, 443)), T).unwrap();
        assert!(m.state().grants.contains_key(&(key.0, ClassKey(8))));
        assert!(!m.state().grants.contains_key(&key));
    }

    let mut m = fresh();
    let delete = vec![EntryKey::Grant(key.0, key.1)];
    m.update(Update { boot: 1, sequence: 2, delete, ..Update::default() }, T).unwrap();
    m.update(snapshot(1, 3, &view("a", 1, 443)), T).unwrap();
    assert!(!m.state().grants.contains_key(&key), "a delete holds");
}

#[test]
fn addresses_are_let_go_when_every_claim_was_taken_over() {
    let mut own = NodeState::default();
    own.scopes.insert(ScopeKey(1), Scope { owner: "a".into(), epoch: 1, pair: 1, standbys: vec![] });
    own.scopes.insert(ScopeKey(2), Scope { owner: "a".into(), epoch: 1, pair: 2, standbys: vec![] });
    let mut merged = own.clone();
    assert!(may_hold("a", Some(&own), &merged));
    merged.scopes.insert(ScopeKey(1), Scope { owner: "b".into(), epoch: 2, pair: 1, standbys: vec![] });
    assert!(may_hold("a", Some(&own), &merged));
    merged.scopes.insert(ScopeKey(2), Scope { owner: "b".into(), epoch: 2, pair: 1, standbys: vec![] });
    assert!(!may_hold("a", Some(&own), &merged));
    assert!(may_hold("a", None, &merged), "a gateway that has not spoken yet is believed");
    assert!(may_hold("c", Some(&own), &merged), "no claims, nothing to lose");
    for scope in own.scopes.values_mut() {
        scope.epoch = 0;
    }
    assert!(may_hold("a", Some(&own), &merged), "the first of the order has not claimed it");
}

#[test]
fn before_the_first_pass_grants_hold_as_they_came_with_facts() {
    let a = view("a", 5, 443);
    let merged = merge(&[src("a", true, &a)]);
    let came = || vec![(GroupKey(2), ClassKey(3), ports(80)), (GroupKey(2), ClassKey(7), ports(25))];
    let owners = (GroupKey(2), ClassKey(3), ports(443));
    assert_eq!(with_facts(came(), &merged, true), vec![owners.clone()], "no pod of the other one's group is here");
    assert_eq!(with_facts(came(), &merged, false), [owners, came()[1].clone()]);
    assert_eq!(with_facts(came(), &NodeState::default(), false), came(), "nobody has said more yet");
}
