//! The verdict, step by step, over tables in memory.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod tables;

use proptest::prelude::*;
use tables::*;
use tidegate_ebpf_common::layout::*;
use tidegate_ebpf_common::packet::{self, Packet, Parsed};
use tidegate_ebpf_common::{Action, Code, Decision};

const OUTSIDE: (&str, &str) = ("198.51.100.1", "2001:db8::1");
const STRANGER: (&str, &str) = ("198.51.100.99", "2001:db8::99");

#[track_caller]
fn is(d: Decision, action: Action, code: Code) {
    assert_eq!((d.action, Code::from_u8(d.code)), (action, Some(code)), "{d:?}");
}

fn pod<const G: bool>(m: &Memory<G>, frame: &[u8]) -> Decision {
    decide(m, frame, ISOLATED.2)
}

fn guarded(m: &Memory<false>, frame: &[u8]) -> Decision {
    decide(m, frame, GUARDED.2)
}

fn audited(m: &Memory<false>, frame: &[u8]) -> Decision {
    decide(m, frame, AUDITED.2)
}

#[test]
fn step_0_untouched_interfaces_are_left_alone() {
    let m = world::<false>();
    is(decide(&m, &tcp("10.9.9.9", STRANGER.0, 25, true), UNTOUCHED), Action::Ignore, Code::Allowed);
    is(decide(&m, &raw("10.9.9.9", STRANGER.0, 47, &[0; 8]), UNTOUCHED), Action::Ignore, Code::Allowed);
    is(decide(&m, &udp("10.9.9.9", "192.0.2.1", 8475), UNTOUCHED), Action::Drop, Code::TunnelPort);
    is(decide(&m, &udp("10.9.9.9", STRANGER.0, 8475), UNTOUCHED), Action::Ignore, Code::Allowed);
    let mut short = udp("10.9.9.9", "192.0.2.1", 8475);
    short.truncate(14 + 20 + 3);
    is(decide(&m, &short, UNTOUCHED), Action::Drop, Code::Malformed);
}

#[test]
fn step_1_only_ip_arp_and_neighbour_discovery() {
    let m = world::<false>();
    let mut arp = vec![0xff; 42];
    arp[12..14].copy_from_slice(&[8, 6]);
    is(pod(&m, &arp), Action::Ignore, Code::Allowed);
    let mut other = arp.clone();
    other[12..14].copy_from_slice(&[0x88, 0xcc]);
    is(pod(&m, &other), Action::Drop, Code::Protocol);
    let nd = |source: &str, destination: &str, kind: u8, hops: u8| {
        let mut f = raw(source, destination, 58, &[kind, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        f[14 + 7] = hops;
        f
    };
    is(pod(&m, &nd("fe80::1", "ff02::1:ff00:1", 135, 255)), Action::Ignore, Code::Allowed);
    is(pod(&m, &nd("fe80::1", "fe80::2", 136, 255)), Action::Ignore, Code::Allowed);
    is(pod(&m, &nd(ISOLATED.1, "fd00:10:244::1", 135, 255)), Action::Ignore, Code::Allowed);
    is(pod(&m, &nd("::", "ff02::16", 143, 1)), Action::Ignore, Code::Allowed);
    // Not a way out, and not a router's messages.
    is(pod(&m, &nd(ISOLATED.1, STRANGER.1, 135, 255)), Action::Drop, Code::Protocol);
    is(pod(&m, &nd("fe80::1", "ff02::1", 135, 64)), Action::Drop, Code::SpoofedSource);
    is(pod(&m, &nd("fe80::1", "ff02::1", 134, 255)), Action::Drop, Code::SpoofedSource);
}

#[test]
fn step_2_malformed_headers() {
    let m = world::<false>();
    let good = tcp(ISOLATED.0, OUTSIDE.0, 443, true);
    let good6 = tcp(ISOLATED.1, OUTSIDE.1, 443, true);
    let broken = |frame: &[u8], change: &dyn Fn(&mut Vec<u8>)| {
        let mut f = frame.to_vec();
        change(&mut f);
        is(pod(&m, &f), Action::Drop, Code::Malformed);
    };
    broken(&good, &|f| f.truncate(14 + 19));
    broken(&good, &|f| f.truncate(14 + 20 + 10));
    broken(&good, &|f| f[14] = 0x65);
    broken(&good, &|f| f[14] = 0x44);
    broken(&good, &|f| f[16..18].copy_from_slice(&[0, 19]));
    broken(&good, &|f| f[16..18].copy_from_slice(&[1, 0]));
    broken(&good, &|f| f[16..18].copy_from_slice(&[0, 30]));
    broken(&good, &|f| f[14 + 20 + 12] = 0x40);
    broken(&good, &|f| f[14 + 20 + 12] = 0xf0);
    broken(&good6, &|f| f[14] = 0x45);
    broken(&good6, &|f| f.truncate(14 + 39));
    broken(&good6, &|f| f[18..20].copy_from_slice(&[4, 0]));
    broken(&udp(ISOLATED.0, OUTSIDE.0, 443), &|f| f[14 + 24..14 + 26].copy_from_slice(&[0, 7]));
    broken(&udp(ISOLATED.0, OUTSIDE.0, 443), &|f| f[14 + 24..14 + 26].copy_from_slice(&[0, 99]));
    // An IPv4-mapped address on the wire.
    broken(&good6, &|f| f[22..38].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 244, 1, 5]));
    // A detour: IPv4 options, an IPv6 routing header.
    let mut options = raw(ISOLATED.0, OUTSIDE.0, 6, &[0x83, 3, 4, 0]);
    options.extend_from_slice(&good[34..]);
    options[14] = 0x46;
    options[16..18].copy_from_slice(&44u16.to_be_bytes());
    is(pod(&m, &options), Action::Drop, Code::Malformed);
    let mut routing = vec![6, 0, 0, 1, 0, 0, 0, 0];
    routing.extend_from_slice(&good6[54..]);
    is(pod(&m, &raw(ISOLATED.1, OUTSIDE.1, 43, &routing)), Action::Drop, Code::Malformed);
    // More extension headers than are followed.
    let many = [[60, 0, 0, 0, 0, 0, 0, 0]; 7].concat();
    is(pod(&m, &raw(ISOLATED.1, OUTSIDE.1, 60, &many)), Action::Drop, Code::Malformed);
}

#[test]
fn step_2_extension_headers_are_followed() {
    let m = world::<false>();
    let inner = tcp(ISOLATED.1, OUTSIDE.1, 443, true);
    let mut chain = vec![60, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0];
    chain.extend_from_slice(&inner[54..]);
    let d = pod(&m, &raw(ISOLATED.1, OUTSIDE.1, 0, &chain));
    is(d, Action::Steer, Code::Allowed);
    assert_eq!(d.via, via::TLS);
}

#[test]
fn step_2_later_fragments_only_towards_the_cluster() {
    let m = world::<false>();
    let later = |s: &str, d: &str| {
        let mut f = udp(s, d, 443);
        f[20..22].copy_from_slice(&[0, 10]);
        f
    };
    is(pod(&m, &later(ISOLATED.0, OUTSIDE.0)), Action::Drop, Code::Fragment);
    is(pod(&m, &later(ISOLATED.0, "10.244.7.7")), Action::Pass, Code::Allowed);
    is(pod(&m, &later("10.244.9.9", "10.244.7.7")), Action::Drop, Code::SpoofedSource);
    is(guarded(&m, &later(GUARDED.0, OUTSIDE.0)), Action::Pass, Code::Allowed);
    let fragment6 = |s: &str, d: &str| raw(s, d, 44, &[17, 0, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    is(pod(&m, &fragment6(ISOLATED.1, OUTSIDE.1)), Action::Drop, Code::Fragment);
    is(pod(&m, &fragment6(ISOLATED.1, "fd00:10:244::77")), Action::Pass, Code::Allowed);
    let d = audited(&m, &later(AUDITED.0, OUTSIDE.0));
    is(d, Action::Pass, Code::Fragment);
    assert!(d.audit && d.report);
}

#[test]
fn step_3_a_pod_has_its_own_address_only() {
    let m = world::<false>();
    for source in [GUARDED.0, "10.244.9.9", "198.51.100.7"] {
        is(pod(&m, &tcp(source, OUTSIDE.0, 443, true)), Action::Drop, Code::SpoofedSource);
    }
    is(pod(&m, &tcp(GUARDED.1, OUTSIDE.1, 443, true)), Action::Drop, Code::SpoofedSource);
    // Audit does not make spoofing pass.
    is(audited(&m, &tcp(ISOLATED.0, OUTSIDE.0, 443, true)), Action::Drop, Code::SpoofedSource);
}

#[test]
fn interfaces_that_nobody_announced() {
    let mut m = world::<false>();
    // A known endpoint on another interface than its own; a stranger.
    is(decide(&m, &tcp(ISOLATED.0, OUTSIDE.0, 443, true), 77), Action::Drop, Code::SpoofedSource);
    is(decide(&m, &tcp("10.244.9.9", OUTSIDE.0, 443, true), 77), Action::Ignore, Code::Allowed);
    m.flags = config::DROP_UNKNOWN;
    is(decide(&m, &tcp("10.244.9.9", OUTSIDE.0, 443, true), 77), Action::Drop, Code::UnknownPod);
}

#[test]
fn step_4_the_tunnel_port() {
    let m = world::<false>();
    is(pod(&m, &udp(ISOLATED.0, "192.0.2.1", 8475)), Action::Drop, Code::TunnelPort);
    is(guarded(&m, &udp(GUARDED.0, "10.244.3.3", 8475)), Action::Drop, Code::TunnelPort);
    is(pod(&m, &tcp(ISOLATED.0, "10.244.3.3", 8475, true)), Action::Pass, Code::Allowed);
}

fn remember(m: &Memory<false>, frame: &[u8], flags: u32) {
    let mut p = Packet::default();
    assert_eq!(packet::parse(&frame, ethertype(frame), &mut p), Parsed::Ip);
    let key = tidegate_ebpf_common::verdict::flow_key(&p, 0);
    m.flows.borrow_mut().insert(key, Flow { seen: NOW, flags });
}

#[test]
fn step_5_replies_of_flows_from_outside_pass() {
    let m = world::<false>();
    let reply = tcp(ISOLATED.0, STRANGER.0, 443, false);
    is(pod(&m, &reply), Action::Drop, Code::NotAllowed);
    remember(&m, &reply, flow::OUTSIDE);
    is(pod(&m, &reply), Action::Pass, Code::Allowed);
    // A SYN from the same port opens something new.
    is(pod(&m, &tcp(ISOLATED.0, STRANGER.0, 443, true)), Action::Drop, Code::NotAllowed);
    let echo = |kind: u8| raw(ISOLATED.0, STRANGER.0, 1, &[kind, 0, 0, 0, 0x12, 0x34, 0, 1]);
    remember(&m, &echo(0), flow::OUTSIDE);
    is(pod(&m, &echo(0)), Action::Pass, Code::Allowed);
    is(pod(&m, &echo(8)), Action::Drop, Code::Protocol);
}

#[test]
fn step_5_flows_of_audit_survive_the_flip_for_the_drain_time() {
    let mut m = world::<false>();
    let more = tcp(ISOLATED.0, STRANGER.0, 443, false);
    remember(&m, &more, flow::AUDIT);
    is(pod(&m, &more), Action::Drop, Code::NotAllowed);
    m.groups.get_mut(&1).unwrap().drain = NOW + 1;
    is(pod(&m, &more), Action::Pass, Code::Allowed);
    m.now_ns.set(u64::from(NOW + 1) * 1_000_000_000);
    m.gateways.insert(1, m.now_ns.get());
    is(pod(&m, &more), Action::Drop, Code::NotAllowed);
}

#[test]
fn step_6_dns_is_steered_whatever_the_server() {
    let m = world::<false>();
    for frame in [
        udp(ISOLATED.0, "10.96.0.10", 53),
        tcp(ISOLATED.0, STRANGER.0, 53, true),
        udp(ISOLATED.1, STRANGER.1, 53),
        udp(ISOLATED.0, "10.244.1.53", 5353),
        udp(ISOLATED.0, "169.254.20.10", 53),
    ] {
        let d = pod(&m, &frame);
        is(d, Action::Steer, Code::Allowed);
        assert_eq!((d.via, d.owner), (via::DNS, 1));
    }
    assert_eq!(guarded(&m, &udp(GUARDED.0, STRANGER.0, 53)).via, via::DNS);
    assert_eq!(audited(&m, &udp(AUDITED.0, STRANGER.0, 53)).via, via::DNS);
}

#[test]
fn without_a_gateway_isolated_pods_are_denied_and_others_pass() {
    let mut m = world::<false>();
    m.gateways.clear();
    is(pod(&m, &udp(ISOLATED.0, STRANGER.0, 53)), Action::Drop, Code::NoGateway);
    is(pod(&m, &tcp(ISOLATED.0, OUTSIDE.0, 443, true)), Action::Drop, Code::NoGateway);
    is(pod(&m, &tcp(ISOLATED.0, STRANGER.0, 443, true)), Action::Drop, Code::NotAllowed);
    is(pod(&m, &tcp(ISOLATED.0, "10.244.3.3", 443, true)), Action::Pass, Code::Allowed);
    is(guarded(&m, &udp(GUARDED.0, STRANGER.0, 53)), Action::Pass, Code::Allowed);
    is(audited(&m, &udp(AUDITED.0, STRANGER.0, 53)), Action::Pass, Code::Allowed);
    is(guarded(&m, &tcp(GUARDED.0, OUTSIDE.0, 443, true)), Action::Pass, Code::Allowed);
}

#[test]
fn step_7_the_cluster_set_without_node_ports() {
    let m = world::<false>();
    is(pod(&m, &tcp(ISOLATED.0, "10.244.9.9", 853, true)), Action::Pass, Code::Allowed);
    is(pod(&m, &raw(ISOLATED.0, "10.244.9.9", 132, &[0; 12])), Action::Pass, Code::Allowed);
    is(pod(&m, &tcp(ISOLATED.1, "fd00:10:244::99", 80, true)), Action::Pass, Code::Allowed);
    is(pod(&m, &tcp(ISOLATED.0, "192.0.2.1", 10250, true)), Action::Pass, Code::Allowed);
    is(pod(&m, &tcp(ISOLATED.0, "192.0.2.1", 30_000, true)), Action::Drop, Code::NotAllowed);
    is(pod(&m, &tcp(ISOLATED.0, "192.0.2.1", 32_768, true)), Action::Pass, Code::Allowed);
}

#[test]
fn step_6_a_stand_in_answers_dns_and_takes_nothing_else() {
    let mut m = world::<false>();
    m.gateways.insert(2, m.now_ns.get());
    m.scopes.insert(1, Scope { owner: 1, pair: 0, dns: 2 });
    let d = pod(&m, &udp(ISOLATED.0, STRANGER.0, 53));
    assert_eq!((d.via, d.owner), (via::DNS, 2));
    let d = pod(&m, &tcp(ISOLATED.0, OUTSIDE.0, 443, true));
    assert_eq!((d.action, d.owner), (Action::Steer, 1));
    // One that is not known answers nothing: it goes to the owner.
    m.gateways.remove(&2);
    assert_eq!(pod(&m, &udp(ISOLATED.0, STRANGER.0, 53)).owner, 1);
}

#[test]
fn step_8_metadata_and_encrypted_dns() {
    let mut m = world::<false>();
    for (s, d) in [
        (ISOLATED.0, "169.254.169.254"),
        (ISOLATED.0, "169.254.0.1"),
        (ISOLATED.0, "100.100.100.200"),
        (ISOLATED.0, "168.63.129.16"),
        (ISOLATED.1, "fe80::1"),
        (ISOLATED.1, "fd00:ec2::254"),
        (ISOLATED.1, "fd20:ce::254"),
    ] {
        is(pod(&m, &tcp(s, d, 80, true)), Action::Drop, Code::Metadata);
    }
    is(pod(&m, &tcp(ISOLATED.0, STRANGER.0, 853, true)), Action::Drop, Code::EncryptedDns);
    is(pod(&m, &udp(ISOLATED.1, STRANGER.1, 853)), Action::Drop, Code::EncryptedDns);
    // Guarded pods keep the CNI's path.
    is(guarded(&m, &tcp(GUARDED.0, "169.254.169.254", 80, true)), Action::Pass, Code::Allowed);
    is(guarded(&m, &tcp(GUARDED.0, STRANGER.0, 853, true)), Action::Pass, Code::Allowed);
    // An accepted default route opens neither.
    m.portsets.insert(2, set(&[range(6, 0, 65_535, via::FORWARD)]));
    m.prefixes.push((1, "0.0.0.0".parse().unwrap(), 0, Prefix { ports: 2, len: 0 }));
    is(pod(&m, &tcp(ISOLATED.0, "169.254.169.254", 80, true)), Action::Drop, Code::Metadata);
    is(pod(&m, &tcp(ISOLATED.0, STRANGER.0, 853, true)), Action::Drop, Code::EncryptedDns);
    // The prefix itself does; link-local passes on the node and is not steered.
    m.prefixes.push((1, "169.254.169.254".parse().unwrap(), 32, Prefix { ports: 2, len: 32 }));
    m.prefixes.push((1, STRANGER.0.parse().unwrap(), 32, Prefix { ports: 2, len: 32 }));
    is(pod(&m, &tcp(ISOLATED.0, "169.254.169.254", 80, true)), Action::Pass, Code::Allowed);
    is(pod(&m, &udp(ISOLATED.0, "169.254.169.254", 80)), Action::Drop, Code::Metadata);
    is(pod(&m, &tcp(ISOLATED.0, STRANGER.0, 853, true)), Action::Steer, Code::Allowed);
}

#[test]
fn step_9_protocols_that_are_ways_out() {
    let mut m = world::<false>();
    for proto in [4, 41, 47, 50, 51, 132, 2] {
        is(pod(&m, &raw(ISOLATED.0, OUTSIDE.0, proto, &[0; 24])), Action::Drop, Code::Protocol);
        is(guarded(&m, &raw(GUARDED.0, OUTSIDE.0, proto, &[0; 24])), Action::Pass, Code::Allowed);
    }
    let echo = raw(ISOLATED.0, OUTSIDE.0, 1, &[8, 0, 0, 0, 0, 1, 0, 1]);
    is(pod(&m, &echo), Action::Drop, Code::Protocol);
    m.flags = config::PING;
    is(pod(&m, &echo), Action::Steer, Code::Allowed);
    is(pod(&m, &raw(ISOLATED.1, OUTSIDE.1, 58, &[128, 0, 0, 0, 0, 1, 0, 1])), Action::Steer, Code::Allowed);
    is(pod(&m, &raw(ISOLATED.0, STRANGER.0, 1, &[8, 0, 0, 0, 0, 1, 0, 1])), Action::Drop, Code::NotAllowed);
    // ICMP of the other family is a protocol like any other.
    is(pod(&m, &raw(ISOLATED.0, OUTSIDE.0, 58, &[128, 0, 0, 0, 0, 1, 0, 1])), Action::Drop, Code::Protocol);
    m.flags = 0;
    is(pod(&m, &raw(ISOLATED.0, OUTSIDE.0, 1, &[3, 4, 0, 0, 0, 0, 5, 0])), Action::Steer, Code::Allowed);
    is(pod(&m, &raw(ISOLATED.1, OUTSIDE.1, 58, &[2, 0, 0, 0, 0, 0, 5, 0])), Action::Steer, Code::Allowed);
    is(pod(&m, &raw(ISOLATED.0, OUTSIDE.0, 1, &[3, 1, 0, 0, 0, 0, 0, 0])), Action::Drop, Code::Protocol);
}

#[test]
fn step_10_fact_grant_and_port() {
    let m = world::<false>();
    for (s, d) in [(ISOLATED.0, OUTSIDE.0), (ISOLATED.1, OUTSIDE.1)] {
        let via_of = |frame: &[u8]| {
            let v = pod(&m, frame);
            is(v, Action::Steer, Code::Allowed);
            assert_eq!(v.owner, 1);
            v.via
        };
        assert_eq!(via_of(&tcp(s, d, 443, true)), via::TLS);
        assert_eq!(via_of(&tcp(s, d, 443, false)), via::TLS);
        assert_eq!(via_of(&tcp(s, d, 5432, true)), via::FORWARD);
        assert_eq!(via_of(&tcp(s, d, 5439, true)), via::FORWARD);
        assert_eq!(via_of(&udp(s, d, 443)), via::BLOCK);
        is(pod(&m, &tcp(s, d, 5431, true)), Action::Drop, Code::NotAllowed);
        is(pod(&m, &tcp(s, d, 5440, true)), Action::Drop, Code::NotAllowed);
        is(pod(&m, &udp(s, d, 5432)), Action::Drop, Code::NotAllowed);
        is(pod(&m, &tcp(s, d, 80, true)), Action::Drop, Code::DeniedByPolicy);
    }
    // Another scope's fact is worth nothing, and neither is a class without a grant.
    let mut other = world::<false>();
    other.facts.clear();
    other.facts.insert((2, addr(OUTSIDE.0)), Fact { class: 1, expires: NOW + 60, seen: 0 });
    is(pod(&other, &tcp(ISOLATED.0, OUTSIDE.0, 443, true)), Action::Drop, Code::NotAllowed);
    other.facts.insert((1, addr(OUTSIDE.0)), Fact { class: 9, expires: NOW + 60, seen: 0 });
    is(pod(&other, &tcp(ISOLATED.0, OUTSIDE.0, 443, true)), Action::Drop, Code::NotAllowed);
}

#[test]
fn step_10_expired_facts_carry_old_flows_only() {
    let mut m = world::<false>();
    let opened = udp(ISOLATED.0, OUTSIDE.0, 4500);
    is(pod(&m, &opened), Action::Steer, Code::Allowed);
    m.facts.get_mut(&(1, addr(OUTSIDE.0))).unwrap().expires = NOW;
    is(pod(&m, &tcp(ISOLATED.0, OUTSIDE.0, 443, true)), Action::Drop, Code::BindingExpired);
    is(pod(&m, &tcp(ISOLATED.0, OUTSIDE.0, 443, false)), Action::Steer, Code::Allowed);
    is(pod(&m, &opened), Action::Steer, Code::Allowed);
    m.flows.borrow_mut().clear();
    is(pod(&m, &opened), Action::Drop, Code::BindingExpired);
    // A deny does not expire.
    is(pod(&m, &tcp(ISOLATED.0, OUTSIDE.0, 80, true)), Action::Drop, Code::DeniedByPolicy);
}

#[test]
fn step_10_port_sets_chain() {
    let mut m = world::<false>();
    for i in 0..CHAIN as u32 {
        let ranges: Vec<Range> =
            (0..8).map(|j| 1_000 + i as u16 * 8 + j).map(|p| range(6, p, p, via::FORWARD)).collect();
        let next = if i + 1 < CHAIN as u32 { 100 + i + 1 } else { 0 };
        m.portsets.insert(100 + i, PortSet { next, ..set(&ranges) });
    }
    m.grants.insert((1, 1), 100);
    is(pod(&m, &tcp(ISOLATED.0, OUTSIDE.0, 1_000, true)), Action::Steer, Code::Allowed);
    is(pod(&m, &tcp(ISOLATED.0, OUTSIDE.0, 1_063, true)), Action::Steer, Code::Allowed);
    is(pod(&m, &tcp(ISOLATED.0, OUTSIDE.0, 1_064, true)), Action::Drop, Code::NotAllowed);
    // A loop in the chain ends.
    m.portsets.get_mut(&107).unwrap().next = 100;
    is(pod(&m, &tcp(ISOLATED.0, OUTSIDE.0, 9, true)), Action::Drop, Code::NotAllowed);
}

#[test]
fn step_11_prefixes_admin_first() {
    let mut m = world::<false>();
    m.portsets.insert(2, set(&[range(6, 443, 443, via::DENY)]));
    m.portsets.insert(3, set(&[range(6, 1, 65_535, via::FORWARD)]));
    m.portsets.insert(4, set(&[range(6, 443, 443, via::PASS)]));
    m.prefixes.push((2, "198.51.100.0".parse().unwrap(), 24, Prefix { ports: 3, len: 24 }));
    is(pod(&m, &tcp(ISOLATED.0, STRANGER.0, 443, true)), Action::Steer, Code::Allowed);
    m.prefixes.push((1, "198.51.0.0".parse().unwrap(), 16, Prefix { ports: 2, len: 16 }));
    is(pod(&m, &tcp(ISOLATED.0, STRANGER.0, 443, true)), Action::Drop, Code::DeniedByPolicy);
    is(pod(&m, &tcp(ISOLATED.0, STRANGER.0, 80, true)), Action::Steer, Code::Allowed);
    is(guarded(&m, &tcp(GUARDED.0, STRANGER.0, 443, true)), Action::Drop, Code::DeniedByPolicy);
    m.prefixes.push((1, STRANGER.0.parse().unwrap(), 32, Prefix { ports: 4, len: 32 }));
    is(guarded(&m, &tcp(GUARDED.0, STRANGER.0, 443, true)), Action::Pass, Code::Allowed);
    // A grant that decides the port comes before any prefix; one that does not, falls through.
    is(pod(&m, &tcp(ISOLATED.0, OUTSIDE.0, 443, true)), Action::Steer, Code::Allowed);
    assert_eq!(pod(&m, &tcp(ISOLATED.0, OUTSIDE.0, 8443, true)).via, via::FORWARD);
    // Of a guarded pod, too: an accepted name stands above a prefix that is denied, and a denied one above an accepted.
    let (name, prefix) = (OUTSIDE.0, "198.51.100.1".parse().unwrap());
    let mut named = world::<false>();
    named.facts.insert((1, addr(name)), Fact { class: 7, expires: NOW + 60, seen: 0 });
    named.grants.insert((2, 7), 20);
    for (by_name, by_prefix, action, code) in [
        (via::PASS, via::DENY, Action::Pass, Code::Allowed),
        (via::DENY, via::PASS, Action::Drop, Code::DeniedByPolicy),
    ] {
        named.portsets.insert(20, set(&[range(6, 443, 443, by_name)]));
        named.portsets.insert(21, set(&[range(6, 1, 65_535, by_prefix)]));
        named.prefixes = vec![(1, prefix, 32, Prefix { ports: 21, len: 32 })];
        is(guarded(&named, &tcp(GUARDED.0, name, 443, true)), action, code);
        // Where the name decides nothing the prefix does.
        let other = if by_prefix == via::DENY { Action::Drop } else { Action::Pass };
        assert_eq!(guarded(&named, &tcp(GUARDED.0, name, 80, true)).action, other);
    }
    // ::/0 says nothing about IPv4.
    let mut six = world::<false>();
    six.portsets.insert(3, set(&[range(6, 1, 65_535, via::FORWARD)]));
    six.prefixes.push((2, "::".parse().unwrap(), 0, Prefix { ports: 3, len: 0 }));
    is(pod(&six, &tcp(ISOLATED.0, STRANGER.0, 443, true)), Action::Drop, Code::NotAllowed);
    is(pod(&six, &tcp(ISOLATED.1, STRANGER.1, 443, true)), Action::Steer, Code::Allowed);
}

#[test]
fn step_12_defaults() {
    let m = world::<false>();
    let d = pod(&m, &tcp(ISOLATED.0, STRANGER.0, 443, true));
    is(d, Action::Drop, Code::NotAllowed);
    assert!(d.report);
    is(guarded(&m, &tcp(GUARDED.0, STRANGER.0, 443, true)), Action::Pass, Code::Allowed);
    is(guarded(&m, &tcp(GUARDED.0, OUTSIDE.0, 80, true)), Action::Drop, Code::DeniedByPolicy);
    // A group that is not there yet denies where the endpoint is isolated.
    let mut young = world::<false>();
    young.groups.clear();
    is(pod(&young, &tcp(ISOLATED.0, STRANGER.0, 443, true)), Action::Drop, Code::NotAllowed);
}

#[test]
fn audit_reports_and_passes_and_remembers() {
    let m = world::<false>();
    let denied = tcp(AUDITED.0, STRANGER.0, 443, true);
    let d = audited(&m, &denied);
    is(d, Action::Pass, Code::NotAllowed);
    assert!(d.audit && d.report);
    let more = audited(&m, &tcp(AUDITED.0, STRANGER.0, 443, false));
    is(more, Action::Pass, Code::Allowed);
    assert!(!more.audit && !more.report);
    let allowed = audited(&m, &tcp(AUDITED.0, OUTSIDE.0, 443, true));
    is(allowed, Action::Pass, Code::Allowed);
    assert!(!allowed.audit && allowed.report);
    for (frame, code) in [
        (tcp(AUDITED.0, "169.254.169.254", 80, true), Code::Metadata),
        (tcp(AUDITED.0, STRANGER.0, 853, true), Code::EncryptedDns),
        (raw(AUDITED.0, STRANGER.0, 47, &[0; 8]), Code::Protocol),
        (tcp(AUDITED.0, OUTSIDE.0, 80, true), Code::DeniedByPolicy),
    ] {
        let d = audited(&m, &frame);
        is(d, Action::Pass, code);
        assert!(d.audit);
    }
}

#[test]
fn a_stale_gateway_gets_the_misses_of_isolated_groups() {
    let m = world::<false>();
    let late = m.now_ns.get() + STALE_NS + 1;
    let miss = tcp(ISOLATED.0, STRANGER.0, 443, true);
    m.now_ns.set(late - 1);
    is(pod(&m, &miss), Action::Drop, Code::NotAllowed);
    m.now_ns.set(late);
    let d = pod(&m, &miss);
    is(d, Action::Steer, Code::Allowed);
    assert_eq!(d.owner, 1);
    is(pod(&m, &udp(ISOLATED.0, STRANGER.0, 9)), Action::Steer, Code::Allowed);
    assert!(m.flows.borrow().is_empty());
    // What is denied stays denied, and guarded pods keep their way.
    is(pod(&m, &tcp(ISOLATED.0, OUTSIDE.0, 80, true)), Action::Drop, Code::DeniedByPolicy);
    is(pod(&m, &tcp(ISOLATED.0, "169.254.169.254", 80, true)), Action::Drop, Code::Metadata);
    is(pod(&m, &raw(ISOLATED.0, STRANGER.0, 47, &[0; 8])), Action::Drop, Code::Protocol);
    is(guarded(&m, &tcp(GUARDED.0, STRANGER.0, 443, true)), Action::Pass, Code::Allowed);
}

#[test]
fn a_node_that_is_cut_off_asks_the_gateway_whether_an_expired_deny_holds() {
    let denied = [tcp(ISOLATED.0, OUTSIDE.0, 80, true), tcp(ISOLATED.0, OUTSIDE.0, 80, false)];
    let mut m = world::<false>();
    let fact = *m.facts.get(&(1, addr(OUTSIDE.0))).unwrap();
    let late = m.now_ns.get() + STALE_NS + 1;
    m.now_ns.set(late);
    m.facts.insert((1, addr(OUTSIDE.0)), Fact { expires: (late / 1_000_000_000) as u32 + 1, ..fact });
    for frame in &denied {
        is(pod(&m, frame), Action::Drop, Code::DeniedByPolicy);
    }
    m.facts.insert((1, addr(OUTSIDE.0)), Fact { expires: (late / 1_000_000_000) as u32, ..fact });
    for frame in &denied {
        let d = pod(&m, frame);
        is(d, Action::Steer, Code::Allowed);
        assert_eq!(d.owner, 1);
    }
    // While it hears its gateway, it would know that the deny is gone.
    m.now_ns.set(late - 1);
    for frame in &denied {
        is(pod(&m, frame), Action::Drop, Code::DeniedByPolicy);
    }
    // The gateway denies as long as it has the fact.
    let mut g = world::<true>();
    g.facts.get_mut(&(1, addr(OUTSIDE.0))).unwrap().expires = 0;
    g.now_ns.set(late);
    for frame in &denied {
        is(pod(&g, frame), Action::Drop, Code::DeniedByPolicy);
    }
}

#[test]
fn a_flow_budget_is_kept() {
    let mut m = world::<false>();
    m.budget = 0;
    is(pod(&m, &udp(ISOLATED.0, OUTSIDE.0, 443)), Action::Steer, Code::Allowed);
    is(audited(&m, &tcp(AUDITED.0, STRANGER.0, 443, true)), Action::Pass, Code::NotAllowed);
    assert!(m.flows.borrow().is_empty());
}

#[test]
fn at_the_gateway_nothing_passes_unsteered() {
    let m = world::<true>();
    let d = pod(&m, &tcp(ISOLATED.0, OUTSIDE.0, 443, true));
    is(d, Action::Steer, Code::Allowed);
    assert!(d.report && d.via == via::TLS);
    assert!(m.carried.borrow().contains(&(1, addr(OUTSIDE.0))));
    assert!(!pod(&m, &tcp(ISOLATED.0, OUTSIDE.0, 443, false)).report);
    let first = pod(&m, &udp(ISOLATED.0, OUTSIDE.0, 4500));
    assert!(first.report && !pod(&m, &udp(ISOLATED.0, OUTSIDE.0, 4500)).report);
    assert_eq!(pod(&m, &udp(ISOLATED.0, STRANGER.0, 53)).via, via::DNS);
    is(pod(&m, &tcp(ISOLATED.0, "10.244.9.9", 80, true)), Action::Drop, Code::NotAllowed);
    is(pod(&m, &tcp(GUARDED.0, STRANGER.0, 80, true)), Action::Drop, Code::NotAllowed);
    is(pod(&m, &tcp(AUDITED.0, STRANGER.0, 80, true)), Action::Drop, Code::NotAllowed);
    is(pod(&m, &tcp("10.244.9.9", OUTSIDE.0, 443, true)), Action::Drop, Code::SpoofedSource);
    // Its own heartbeat is nobody's business.
    m.now_ns.set(m.now_ns.get() + 2 * STALE_NS);
    is(pod(&m, &tcp(ISOLATED.0, STRANGER.0, 443, true)), Action::Drop, Code::NotAllowed);
}

proptest! {
    /// Whatever the bytes, there is an answer, and a packet that leaves un-steered comes from its own address.
    #[test]
    fn hostile_bytes(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 0..3u8, ifindex in 4..10u32) {
        if bytes.len() >= 14 && kind > 0 {
            bytes[12..14].copy_from_slice(if kind == 1 { &[0x08, 0] } else { &[0x86, 0xdd] });
            if let Some(b) = bytes.get_mut(14) {
                *b = if kind == 1 { 0x45 } else { 0x60 };
            }
        }
        let m = world::<false>();
        let d = decide(&m, &bytes, ifindex);
        prop_assert!(Code::from_u8(d.code).is_some());
        decide(&world::<true>(), &bytes, ifindex);
    }

    /// A good packet with some octets changed never passes un-steered out of an isolated pod to a stranger.
    #[test]
    fn changed_octets_do_not_open_a_way(
        changes in proptest::collection::vec((22..54usize, any::<u8>()), 0..6),
        syn in any::<bool>(),
    ) {
        let m = world::<false>();
        let mut frame = tcp(ISOLATED.0, STRANGER.0, 443, syn);
        for (at, value) in changes {
            // The destination stays.
            if !(30..34).contains(&at) {
                frame[at] = value;
            }
        }
        let d = decide(&m, &frame, ISOLATED.2);
        prop_assert!(!matches!(d.action, Action::Pass | Action::Ignore), "{d:?}");
    }

    /// Facts only ever add for their own scope: without any, an isolated pod reaches nothing outside but DNS.
    #[test]
    fn without_facts_only_dns(port in any::<u16>(), udp_flow in any::<bool>(), syn in any::<bool>(), host in 1..=255u8) {
        let mut m = world::<false>();
        m.facts.clear();
        let to = format!("203.0.113.{host}");
        let frame = if udp_flow { udp(ISOLATED.0, &to, port) } else { tcp(ISOLATED.0, &to, port, syn) };
        let d = decide(&m, &frame, ISOLATED.2);
        if port == 53 {
            prop_assert_eq!(d.via, via::DNS);
        } else {
            prop_assert_eq!(d.action, Action::Drop);
        }
    }
}
