//! What a hostile tenant tries: forged tunnels, other protocols, spoofed openings, full tables.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod tables;

use tables::*;
use tidegate_ebpf_common::layout::*;
use tidegate_ebpf_common::{Action, Code, Decision};

const NODE: (&str, &str) = ("192.0.2.1", "2001:db8:ffff::1");
const CLUSTER: (&str, &str) = ("10.244.9.9", "fd00:10:244::99");
const STRANGER: (&str, &str) = ("198.51.100.99", "2001:db8::99");
/// IPIP, 6in4, GRE, ESP, AH, UDP-Lite, L2TP, IGMP.
const TUNNELS: [u8; 8] = [4, 41, 47, 50, 51, 136, 115, 2];

#[track_caller]
fn is(d: Decision, action: Action, code: Code) {
    assert_eq!((d.action, Code::from_u8(d.code)), (action, Some(code)), "{d:?}");
}

fn world() -> Memory<false> {
    let mut m = tables::world::<false>();
    m.nodes.insert(addr(NODE.1));
    m
}

/// Both families of a pod, with a place.
fn families(
    pod: (&'static str, &'static str, u32),
    to: (&'static str, &'static str),
) -> [(&'static str, &'static str, u32); 2] {
    [(pod.0, to.0, pod.2), (pod.1, to.1, pod.2)]
}

#[test]
fn what_passes_because_of_the_cluster_set_says_so() {
    let m = world();
    for to in [CLUSTER, NODE] {
        for (pod, to, ifindex) in families(ISOLATED, to) {
            let d = decide(&m, &tcp(pod, to, 443, true), ifindex);
            is(d, Action::Pass, Code::Allowed);
            assert!(d.cluster, "{to}");
        }
        // Nothing is denied to these by default, wherever a service leads.
        for pod in [GUARDED, AUDITED] {
            for (pod, to, ifindex) in families(pod, to) {
                let d = decide(&m, &tcp(pod, to, 443, true), ifindex);
                is(d, Action::Pass, Code::Allowed);
                assert!(!d.cluster, "{pod}");
            }
        }
    }
    // Accepted by a policy, and not by the cluster set.
    let mut m = world();
    m.portsets.insert(2, set(&[range(6, 0, 65_535, via::PASS)]));
    m.prefixes.push((1, STRANGER.0.parse().unwrap(), 32, Prefix { ports: 2, len: 32 }));
    let d = decide(&m, &tcp(ISOLATED.0, STRANGER.0, 443, true), ISOLATED.2);
    is(d, Action::Pass, Code::Allowed);
    assert!(!d.cluster);
}

#[test]
fn touched_pods_send_nodes_no_tunnels_of_the_network_plugin() {
    let m = world();
    for pod in [ISOLATED, GUARDED, AUDITED] {
        for (pod, node, ifindex) in families(pod, NODE) {
            for port in [4789, 8472, 51_820] {
                is(decide(&m, &udp(pod, node, port), ifindex), Action::Drop, Code::TunnelPort);
                is(decide(&m, &tcp(pod, node, port, true), ifindex), Action::Pass, Code::Allowed);
            }
            is(decide(&m, &udp(pod, node, 4790), ifindex), Action::Pass, Code::Allowed);
            for proto in TUNNELS {
                is(decide(&m, &raw(pod, node, proto, &[0; 24]), ifindex), Action::Drop, Code::Protocol);
            }
            is(decide(&m, &raw(pod, node, 132, &[0; 24]), ifindex), Action::Pass, Code::Allowed);
            let echo = if node.contains(':') { (58, 128) } else { (1, 8) };
            is(
                decide(&m, &raw(pod, node, echo.0, &[echo.1, 0, 0, 0, 0, 1, 0, 1]), ifindex),
                Action::Pass,
                Code::Allowed,
            );
        }
    }
}

#[test]
fn a_nodes_addresses_among_the_pods_take_no_tunnels_either() {
    let m = world();
    for (pod, to, ifindex) in families(ISOLATED, CLUSTER) {
        is(decide(&m, &udp(pod, to, 8472), ifindex), Action::Drop, Code::TunnelPort);
        // An answer to a client that took this port by itself.
        is(decide(&m, &udp(pod, to, 51_820), ifindex), Action::Pass, Code::Allowed);
        for proto in TUNNELS {
            is(decide(&m, &raw(pod, to, proto, &[0; 24]), ifindex), Action::Drop, Code::Protocol);
        }
        is(decide(&m, &raw(pod, to, 132, &[0; 24]), ifindex), Action::Pass, Code::Allowed);
    }
    for (pod, to, ifindex) in families(GUARDED, CLUSTER) {
        is(decide(&m, &udp(pod, to, 8472), ifindex), Action::Drop, Code::TunnelPort);
        is(decide(&m, &raw(pod, to, 47, &[0; 24]), ifindex), Action::Pass, Code::Allowed);
    }
    for (pod, to, ifindex) in families(AUDITED, CLUSTER) {
        let d = decide(&m, &raw(pod, to, 47, &[0; 24]), ifindex);
        is(d, Action::Pass, Code::Protocol);
        assert!(d.audit && d.report);
    }
    // Outside, an overlay's port is a port like any other.
    is(decide(&m, &udp(GUARDED.0, STRANGER.0, 8472), GUARDED.2), Action::Pass, Code::Allowed);
}

#[test]
fn untouched_pods_forge_no_tunnel_packets_of_nodes() {
    let m = world();
    let drops = |source: &str, destination: &str| {
        is(decide(&m, &udp(source, destination, 8475), UNTOUCHED), Action::Drop, Code::TunnelPort);
        is(decide(&m, &udp(source, destination, 8476), UNTOUCHED), Action::Ignore, Code::Allowed);
    };
    drops("10.9.9.9", NODE.0);
    // To an address of a node that no list has, as another node.
    drops(NODE.0, "203.0.113.203");
    drops(NODE.1, "2001:db8:fffe::203");
    // To this node by its link-local address.
    drops(NODE.1, "fe80::1");
    drops("fe80::7", "fe80::1");
    drops("10.9.9.9", "169.254.1.1");
    is(decide(&m, &udp("10.9.9.9", STRANGER.0, 8475), UNTOUCHED), Action::Ignore, Code::Allowed);
}

#[test]
fn a_full_table_hides_no_flow_at_the_gateway() {
    let mut m = tables::world::<true>();
    m.budget = 1;
    let flow = |to: &str| decide(&m, &udp(ISOLATED.0, to, 4500), ISOLATED.2);
    assert!(flow("198.51.100.1").report);
    assert!(!flow("198.51.100.1").report);
    m.flows.borrow_mut().clear();
    m.flows.borrow_mut().insert(FlowKey::default(), Flow::default());
    for _ in 0..2 {
        let d = flow("198.51.100.1");
        is(d, Action::Steer, Code::Allowed);
        assert!(d.report);
    }
    // Nor in audit.
    let mut m = world();
    m.budget = 0;
    for _ in 0..2 {
        assert!(decide(&m, &udp(AUDITED.0, "198.51.100.1", 4500), AUDITED.2).report);
    }
}

#[test]
fn a_deny_of_any_protocol_is_one() {
    let own = |m: &mut Memory<false>| {
        m.portsets.insert(3, set(&[range(6, 1, 65_535, via::FORWARD), range(17, 1, 65_535, via::FORWARD)]));
        m.prefixes.push((2, STRANGER.0.parse().unwrap(), 32, Prefix { ports: 3, len: 32 }));
        m.prefixes.push((2, STRANGER.1.parse().unwrap(), 128, Prefix { ports: 3, len: 128 }));
    };
    let admin = |m: &mut Memory<false>, ranges: &[Range]| {
        m.portsets.insert(2, set(ranges));
        m.prefixes.push((1, "198.51.100.0".parse().unwrap(), 24, Prefix { ports: 2, len: 24 }));
        m.prefixes.push((1, "2001:db8::".parse().unwrap(), 64, Prefix { ports: 2, len: 64 }));
    };
    let any = [range(0, 0, 65_535, via::DENY), range(6, 0, 65_535, via::DENY), range(17, 0, 65_535, via::DENY)];
    for (pod, to, echo) in [
        (ISOLATED.0, STRANGER.0, raw(ISOLATED.0, STRANGER.0, 1, &[8, 0, 0, 0, 0, 1, 0, 1])),
        (ISOLATED.1, STRANGER.1, raw(ISOLATED.1, STRANGER.1, 58, &[128, 0, 0, 0, 0, 1, 0, 1])),
    ] {
        let mut m = world();
        m.flags = config::PING;
        own(&mut m);
        is(decide(&m, &echo, ISOLATED.2), Action::Steer, Code::Allowed);
        // All of TCP is not everything.
        admin(&mut m, &any[1..2]);
        is(decide(&m, &echo, ISOLATED.2), Action::Steer, Code::Allowed);
        m.prefixes.retain(|p| p.0 != 1);
        admin(&mut m, &any);
        is(decide(&m, &echo, ISOLATED.2), Action::Drop, Code::DeniedByPolicy);
        is(decide(&m, &tcp(pod, to, 443, true), ISOLATED.2), Action::Drop, Code::DeniedByPolicy);
    }
    // Guarded pods, whom nothing else keeps from other protocols, and a port that is accepted ahead of the deny.
    let mut m = world();
    let accepted = [
        any[0],
        range(6, 0, 442, via::DENY),
        range(6, 443, 443, via::PASS),
        range(6, 444, 65_535, via::DENY),
        range(17, 0, 65_535, via::DENY),
    ];
    for (pod, to, ifindex) in families(GUARDED, STRANGER) {
        is(decide(&m, &raw(pod, to, 47, &[0; 24]), ifindex), Action::Pass, Code::Allowed);
    }
    admin(&mut m, &accepted);
    for (pod, to, ifindex) in families(GUARDED, STRANGER) {
        for proto in [47, 50, 132] {
            is(decide(&m, &raw(pod, to, proto, &[0; 24]), ifindex), Action::Drop, Code::DeniedByPolicy);
        }
        is(decide(&m, &tcp(pod, to, 443, true), ifindex), Action::Pass, Code::Allowed);
        is(decide(&m, &udp(pod, to, 443), ifindex), Action::Drop, Code::DeniedByPolicy);
    }
    let echo = raw(GUARDED.0, STRANGER.0, 1, &[8, 0, 0, 0, 0, 1, 0, 1]);
    is(decide(&m, &echo, GUARDED.2), Action::Drop, Code::DeniedByPolicy);
    // By name.
    m.portsets.insert(1, set(&any));
    is(decide(&m, &raw(GUARDED.0, "198.51.100.1", 47, &[0; 24]), GUARDED.2), Action::Drop, Code::DeniedByPolicy);
}
