//! Messages keep what they carry, and hostile ones are refused with the field's name.
#![allow(clippy::unwrap_used)] // helpers of tests, not only tests

use std::time::Duration;

use prost::Message;
use tidegate_policy::state::{
    Cluster, Endpoint, Entry, EntryKey, FactUpdate, FactValue, Gateway, Group, Named, Node, NodeState, Scope, Touch,
};
use tidegate_policy::{Carry, ClassKey, GroupKey, PortRange, PortSet, PrefixSetKey, Proto, ScopeKey, Via};
use tidegate_proto::convert::{MAX_ERROR, MAX_ITEMS, MAX_NODE_ADDRESSES, MAX_TTL_MS};
use tidegate_proto::{FactsBatch, GrantEntry, Joiner, Problem, StateBatch, Up, WireError, wire};

fn ports() -> PortSet {
    let range = |proto, lo, hi, via| PortRange { proto, lo, hi, via };
    PortSet::from_precedence([
        range(Proto::Tcp, 443, 443, Via::Allow(Carry::Tls)),
        range(Proto::Udp, 443, 443, Via::Allow(Carry::Block)),
        range(Proto::Tcp, 5432, 5439, Via::Allow(Carry::Forward)),
        range(Proto::Tcp, 0, 21, Via::Deny),
        range(Proto::Udp, 65535, 65535, Via::Pass),
        range(Proto::Other, 0, 65535, Via::Deny),
    ])
}

/// One of everything, with and without what is optional.
fn state() -> NodeState {
    let mut s = NodeState::default();
    let endpoint = |touch, member| Endpoint {
        node: "node-1".into(),
        namespace: "shop".into(),
        pod: "web-0".into(),
        touch,
        member,
    };
    let group = |admin, own| Group { isolated: true, audit: false, admin, own };
    for e in [
        Entry::Cluster(Cluster {
            prefixes: vec!["10.244.0.0/16".parse().unwrap(), "fd00::/56".parse().unwrap()],
            node_ports: Some((30000, 32767)),
            dns: vec!["10.244.1.53:53".parse().unwrap(), "[fd00::53]:5353".parse().unwrap()],
            ping: true,
            suffixes: vec!["cluster.local".into()],
        }),
        Entry::Node(
            "node-1".into(),
            Node { addresses: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()] },
        ),
        Entry::Node("node-2".into(), Node { addresses: vec![] }),
        Entry::Gateway(
            "gw-a".into(),
            Gateway {
                node: "node-2".into(),
                control: vec!["192.0.2.1:7443".parse().unwrap(), "[2001:db8::1]:7443".parse().unwrap()],
            },
        ),
        Entry::Endpoint(
            "10.244.3.4".parse().unwrap(),
            endpoint(Touch::Isolated, Some((ScopeKey(1), GroupKey(u128::MAX)))),
        ),
        Entry::Endpoint("fd00::4".parse().unwrap(), endpoint(Touch::Guarded, Some((ScopeKey(1), GroupKey(2))))),
        Entry::Endpoint("10.244.3.5".parse().unwrap(), endpoint(Touch::Untouched, None)),
        Entry::Scope(
            ScopeKey(1),
            Scope { owner: "gw-a".into(), epoch: u64::MAX, pair: 255, standbys: vec!["gw-b".into()] },
        ),
        Entry::Group(GroupKey(u128::MAX), group(Some(PrefixSetKey(0)), Some(PrefixSetKey(4)))),
        Entry::Group(GroupKey(2), Group { isolated: false, audit: true, admin: None, own: None }),
        Entry::Prefixes(
            PrefixSetKey(0),
            [("0.0.0.0/0".parse().unwrap(), ports()), ("::/0".parse().unwrap(), PortSet::default())].into(),
        ),
        Entry::Prefixes(PrefixSetKey(4), [("203.0.113.7/32".parse().unwrap(), ports())].into()),
        Entry::Grant(GroupKey(2), ClassKey(3), ports()),
        Entry::Grant(GroupKey(2), ClassKey(4), PortSet::default()),
        Entry::Namespace("shop".into(), Touch::Isolated),
        Entry::Name("web.shop.svc".into(), Named::Inside),
        Entry::Name("partner.shop.svc".into(), Named::Outside),
    ] {
        s.set(e);
    }
    s
}

fn batch() -> StateBatch {
    let state = state();
    StateBatch {
        gateway: "gw-a".into(),
        boot_id: 7,
        sequence: 9,
        snapshot: true,
        more: false,
        delete: state.entries().iter().map(Entry::key).collect(),
        set: state.entries(),
    }
}

/// Over the octets, as a receiver sees it.
fn over<M: Message + Default>(m: &M) -> M {
    M::decode(m.encode_to_vec().as_slice()).unwrap()
}

fn refuse<T>(made: Result<T, WireError>) -> (&'static str, Problem) {
    let e = made.err().expect("it is refused");
    assert!(e.to_string().contains(e.field), "{e}");
    (e.field, e.problem)
}

#[test]
fn a_state_survives_the_wire() {
    let batch = batch();
    let messages = batch.clone().into_messages();
    assert_eq!(messages.len(), 1);
    assert_eq!(StateBatch::try_from(over(&messages[0])).unwrap(), batch);
}

fn fact(i: u32) -> FactUpdate {
    let value =
        (!i.is_multiple_of(3)).then(|| FactValue { class: ClassKey(5), ttl: Duration::from_millis(u64::from(i)) });
    FactUpdate { scope: ScopeKey(1 << 127), ip: std::net::Ipv4Addr::from(i).into(), value }
}

#[test]
fn facts_survive_the_wire() {
    let batch = FactsBatch {
        boot_id: 1,
        sequence: 2,
        snapshot: false,
        more: false,
        grants: vec![GrantEntry { group: GroupKey(1), class: ClassKey(5), ports: ports() }],
        facts: (0..10).map(fact).collect(),
        steps_back: true,
    };
    let messages = batch.clone().into_messages();
    assert_eq!(FactsBatch::try_from(over(&messages[0])).unwrap(), batch);
    assert!(!batch.is_heartbeat());
    // Too long a life is cut, parts of a millisecond are dropped.
    let mut long = FactsBatch::default();
    for ttl in [Duration::MAX, Duration::from_micros(1999)] {
        let value = Some(FactValue { class: ClassKey(5), ttl });
        long.facts.push(FactUpdate { value, ..fact(1) });
    }
    let back = FactsBatch::try_from(over(&long.into_messages()[0])).unwrap();
    let lives: Vec<_> = back.facts.iter().map(|f| f.value.unwrap().ttl.as_millis()).collect();
    assert_eq!(lives, [u128::from(MAX_TTL_MS), 1]);
}

#[test]
fn a_heartbeat_is_small_and_known_as_such() {
    let m = FactsBatch::heartbeat(u64::MAX, 3).into_messages();
    assert!(m.len() == 1 && m[0].encoded_len() < 16);
    assert!(FactsBatch::try_from(over(&m[0])).unwrap().is_heartbeat());
    assert!(FactsBatch { steps_back: true, ..FactsBatch::heartbeat(1, 1) }.is_heartbeat());
    // An empty snapshot is none: it deletes everything.
    assert!(!FactsBatch { snapshot: true, ..FactsBatch::heartbeat(1, 1) }.is_heartbeat());
}

#[test]
fn acks_survive_the_wire() {
    let error = |e: &str| Up::Applied { boot_id: 1, sequence: u64::MAX, error: Some(e.into()) };
    let none = Up::Applied { boot_id: 1, sequence: 2, error: None };
    for up in [Up::Hello { node: "node-1".into(), boot_id: 3 }, none, error("map full")] {
        assert_eq!(Up::try_from(over(&wire::StateAck::from(up.clone()))).unwrap(), up);
        assert_eq!(Up::try_from(over(&wire::FactsAck::from(up.clone()))).unwrap(), up);
    }
    // A long text is cut between characters when sent, and refused when received.
    let long = over(&wire::StateAck::from(error(&format!("x{}", "ä".repeat(MAX_ERROR)))));
    let Up::Applied { error: Some(text), .. } = Up::try_from(long).unwrap() else { panic!("an error") };
    assert!(text.len() <= MAX_ERROR && text.len() + 1 >= MAX_ERROR);
    let kind = wire::state_ack::Kind::Applied(wire::Applied { error: "x".repeat(MAX_ERROR + 1), ..Default::default() });
    let made = Up::try_from(wire::StateAck { kind: Some(kind) });
    assert_eq!(refuse(made), ("applied.error", Problem::TooMany(MAX_ERROR + 1)));
    assert_eq!(refuse(Up::try_from(wire::FactsAck { kind: None })), ("ack.kind", Problem::Missing));
}

#[test]
fn a_large_snapshot_comes_in_parts() {
    let whole = FactsBatch {
        boot_id: 1,
        sequence: 5,
        snapshot: true,
        facts: (1..100_000).map(fact).collect(),
        ..FactsBatch::default()
    };
    let parts = whole.clone().into_messages();
    assert!(parts.len() > 3, "{}", parts.len());
    let mut joiner = Joiner::default();
    let mut joined = None;
    for (i, p) in parts.iter().enumerate() {
        assert!(p.encoded_len() <= 2 << 20);
        assert_eq!(p.more, i + 1 < parts.len());
        assert!(joined.is_none());
        joined = joiner.push(FactsBatch::try_from(over(p)).unwrap()).unwrap();
    }
    assert_eq!(joined, Some(whole));
    // The joiner is ready for the next.
    let next = FactsBatch::heartbeat(1, 6);
    assert_eq!(joiner.push(next.clone()).unwrap(), Some(next));
}

#[test]
fn parts_of_different_sequences_do_not_mix() {
    let part =
        |boot_id, sequence, snapshot| FactsBatch { boot_id, sequence, snapshot, more: true, ..Default::default() };
    for other in [part(2, 5, true), part(1, 6, true), part(1, 5, false)] {
        let mut joiner = Joiner::default();
        assert_eq!(joiner.push(part(1, 5, true)).unwrap(), None);
        assert_eq!(refuse(joiner.push(other)), ("sequence", Problem::Parts));
    }
}

fn entry(kind: wire::entry::Kind) -> Result<Entry, WireError> {
    Entry::try_from(wire::Entry { kind: Some(kind) })
}

fn grant(ranges: Vec<wire::PortRange>) -> Result<Entry, WireError> {
    entry(wire::entry::Kind::Grant(grant_of(ranges, 0)))
}

fn grant_of(ports: Vec<wire::PortRange>, other: i32) -> wire::Grant {
    wire::Grant { group: vec![0; 16], class: vec![0; 16], ports, other }
}

fn range(protocol: i32, first: u32, last: u32, via: i32) -> wire::PortRange {
    wire::PortRange { protocol, first, last, via }
}

#[test]
fn bad_ports_are_refused() {
    assert!(grant(vec![range(1, 0, 65535, 1)]).is_ok());
    for (ranges, field, problem) in [
        (vec![range(0, 1, 1, 1)], "port_range.protocol", Problem::Unknown(0)),
        (vec![range(3, 1, 1, 1)], "port_range.protocol", Problem::Unknown(3)),
        (vec![range(1, 1, 1, 0)], "port_range.via", Problem::Unknown(0)),
        (vec![range(1, 1, 1, -1)], "port_range.via", Problem::Unknown(-1)),
        (vec![range(1, 65536, 65536, 1)], "port_range.first", Problem::Range(65536)),
        (vec![range(1, 1, u32::MAX, 1)], "port_range.last", Problem::Range(u32::MAX.into())),
        (vec![range(1, 2, 1, 1)], "port_range.last", Problem::Range(1)),
        (vec![range(1, 1, 5, 1), range(1, 5, 6, 2)], "port_ranges", Problem::NotCanonical),
        (vec![range(1, 7, 8, 1), range(1, 5, 6, 2)], "port_ranges", Problem::NotCanonical),
        (vec![range(1, 1, 2, 1), range(1, 3, 4, 1)], "port_ranges", Problem::NotCanonical),
        (vec![range(1, 1, 1, 1); 65], "port_ranges", Problem::TooMany(65)),
    ] {
        assert_eq!(refuse(grant(ranges)), (field, problem));
    }
    let other = |ranges, via| entry(wire::entry::Kind::Grant(grant_of(ranges, via)));
    assert_eq!(refuse(other(vec![], 6)), ("port_ranges.other", Problem::Unknown(6)));
    let all: Vec<_> = (0..64).map(|i| range(1, 2 * i, 2 * i, 4)).collect();
    assert!(other(all.clone(), 0).is_ok());
    assert_eq!(refuse(other(all, 4)), ("port_ranges", Problem::TooMany(65)), "the kernel has no place for it");
}

#[test]
fn bad_entries_are_refused() {
    use wire::entry::Kind;
    let net = |address: &[u8], length| wire::Prefix { address: address.to_vec(), length };
    let cluster = |prefix| entry(Kind::Cluster(wire::Cluster { prefixes: vec![prefix], ..Default::default() }));
    let endpoint = wire::Endpoint {
        ip: vec![10, 0, 0, 1],
        node: "n".into(),
        namespace: "s".into(),
        pod: "p".into(),
        touch: 1,
        member: None,
    };
    assert!(entry(Kind::Endpoint(endpoint.clone())).is_ok());
    let end = |change: fn(&mut wire::Endpoint)| {
        let mut e = endpoint.clone();
        change(&mut e);
        entry(Kind::Endpoint(e))
    };
    let scope = |pair| wire::Scope { key: vec![0; 16], owner: "g".into(), epoch: 1, pair, standbys: vec![] };
    let set = |prefixes| entry(Kind::Prefixes(wire::PrefixSet { key: vec![0; 16], prefixes }));
    let one = wire::PrefixPorts { prefix: Some(net(&[10, 0, 0, 0], 8)), ports: vec![], other: 0 };
    let gateway =
        |name: &str, control| entry(Kind::Gateway(wire::Gateway { name: name.into(), node: "n".into(), control }));
    let socket = |port| wire::SocketAddress { ip: vec![192, 0, 2, 1], port };
    let node_ports = |first, last| {
        let node_ports = Some(wire::NodePorts { first, last });
        entry(Kind::Cluster(wire::Cluster { node_ports, ..Default::default() }))
    };
    for (made, field, problem) in [
        (Entry::try_from(wire::Entry { kind: None }), "entry.kind", Problem::Missing),
        (cluster(net(&[10, 0, 0], 8)), "cluster.prefixes", Problem::Length(3)),
        (cluster(net(&[10, 0, 0, 0], 33)), "cluster.prefixes", Problem::Range(33)),
        (cluster(net(&[10, 0, 0, 0], 264)), "cluster.prefixes", Problem::Range(264)),
        (cluster(net(&[10, 0, 0, 1], 8)), "cluster.prefixes", Problem::NotCanonical),
        (node_ports(2, 1), "node_ports.last", Problem::Range(1)),
        (node_ports(1, 65536), "node_ports.last", Problem::Range(65536)),
        (end(|e| e.ip.clear()), "endpoint.ip", Problem::Length(0)),
        (end(|e| e.ip = vec![0; 17]), "endpoint.ip", Problem::Length(17)),
        (
            end(|e| e.ip = "::ffff:10.0.0.1".parse::<std::net::Ipv6Addr>().unwrap().octets().to_vec()),
            "endpoint.ip",
            Problem::NotCanonical,
        ),
        (end(|e| e.touch = 0), "endpoint.touch", Problem::Unknown(0)),
        (end(|e| e.touch = 99), "endpoint.touch", Problem::Unknown(99)),
        (end(|e| e.pod = "a\nb".into()), "endpoint.pod", Problem::Name),
        (end(|e| e.namespace.clear()), "endpoint.namespace", Problem::Name),
        (end(|e| e.member = Some(wire::Member::default())), "member.scope", Problem::Length(0)),
        (gateway("../x", vec![]), "gateway.name", Problem::Name),
        (gateway("x.", vec![]), "gateway.name", Problem::Name),
        (gateway(&"x".repeat(254), vec![]), "gateway.name", Problem::TooMany(254)),
        (gateway("x", vec![socket(1); 9]), "gateway.control", Problem::TooMany(9)),
        (gateway("x", vec![socket(65536)]), "gateway.control", Problem::Range(65536)),
        (entry(Kind::Scope(scope(256))), "scope.pair", Problem::Range(256)),
        (
            entry(Kind::Group(wire::Group { key: vec![0; 16], admin: vec![1], ..Default::default() })),
            "group.admin",
            Problem::Length(1),
        ),
        (
            entry(Kind::Node(wire::Node {
                name: "n".into(),
                addresses: vec![vec![1, 2, 3, 4]; MAX_NODE_ADDRESSES + 1],
            })),
            "node.addresses",
            Problem::TooMany(MAX_NODE_ADDRESSES + 1),
        ),
        (set(vec![wire::PrefixPorts::default()]), "prefix_ports.prefix", Problem::Missing),
        (set(vec![one.clone(), one.clone()]), "prefix_ports.prefix", Problem::Duplicate),
    ] {
        assert_eq!(refuse(made), (field, problem));
    }
    let key = EntryKey::try_from(wire::EntryKey { kind: None });
    assert_eq!(refuse(key), ("entry_key.kind", Problem::Missing));
    let key = EntryKey::try_from(wire::EntryKey { kind: Some(wire::entry_key::Kind::Group(vec![0; 15])) });
    assert_eq!(refuse(key), ("entry_key.group", Problem::Length(15)));
}

#[test]
fn bad_batches_are_refused() {
    let whole = || batch().into_messages().remove(0);
    assert_eq!(
        refuse(StateBatch::try_from(wire::StateUpdate { gateway: String::new(), ..whole() })),
        ("state_update.gateway", Problem::Name)
    );
    let many = vec![wire::EntryKey { kind: None }; MAX_ITEMS + 1];
    assert_eq!(
        refuse(StateBatch::try_from(wire::StateUpdate { delete: many, ..whole() })),
        ("state_update.delete", Problem::TooMany(MAX_ITEMS + 1))
    );
    let fact = |ttl_ms, class: usize, scope: usize| {
        let value = Some(wire::FactValue { class: vec![0; class], ttl_ms });
        let facts = vec![wire::Fact { scope: vec![0; scope], ip: vec![1, 2, 3, 4], value }];
        FactsBatch::try_from(wire::FactsUpdate { facts, ..Default::default() })
    };
    assert!(fact(MAX_TTL_MS, 16, 16).is_ok());
    let over = MAX_TTL_MS + 1;
    assert_eq!(refuse(fact(over, 16, 16)), ("fact_value.ttl_ms", Problem::Range(over)));
    assert_eq!(refuse(fact(1, 17, 16)), ("fact_value.class", Problem::Length(17)));
    assert_eq!(refuse(fact(1, 16, 0)), ("fact.scope", Problem::Length(0)));
}

/// A small generator (xorshift): the same octets in every run.
fn noise(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

#[test]
fn hostile_octets_never_panic_and_what_is_taken_is_canonical() {
    let good = batch().into_messages().remove(0).encode_to_vec();
    let mut seed = 0x5eed;
    let mut taken = 0;
    for _ in 0..20_000 {
        let mut bytes = good.clone();
        for _ in 0..1 + noise(&mut seed) % 4 {
            let at = noise(&mut seed) as usize % bytes.len();
            match noise(&mut seed) % 3 {
                0 => bytes[at] = noise(&mut seed) as u8,
                1 => bytes[at] ^= 1 << (noise(&mut seed) % 8),
                _ => bytes.truncate(at.max(1)),
            }
        }
        if let Ok(m) = wire::StateUpdate::decode(bytes.as_slice())
            && let Ok(batch) = StateBatch::try_from(m)
        {
            taken += 1;
            let again = batch.clone().into_messages().remove(0);
            assert_eq!(StateBatch::try_from(again).unwrap(), batch);
        }
        let _ = wire::FactsUpdate::decode(bytes.as_slice()).map(FactsBatch::try_from);
        let _ = wire::StateAck::decode(bytes.as_slice()).map(Up::try_from);
    }
    assert!(taken > 1000, "{taken}");
}
