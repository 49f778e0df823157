//! Every step of the verdict through the real kernel programs (`BPF_PROG_TEST_RUN`).
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use aya::maps::{HashMap, Map, MapData};
use common::Fixture;
use common::netns::{Ns, join};
use common::packets::{raw, tcp, udp, udp_with};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use tidegate_ebpf::{Hook, Interface, Local, Outcome, Plugged, Program, Role, TestPacket, TestResult};
use tidegate_policy::state::{
    Cluster, Endpoint, FactUpdate, FactValue, Gateway, Group, Named, Node, NodeState, Prefixes, Scope, Touch,
};
use tidegate_policy::{Carry, ClassKey, GroupKey, PortRange, PortSet, PrefixSetKey, Proto, Reason, ScopeKey, Via};

const NEXT: i32 = -1;
const OK: i32 = 0;
const SHOT: i32 = 2;
const REDIRECT: i32 = 7;
const MARK: u32 = 0x0020_0000;
const BY_CLUSTER: u32 = 0x0030_0000;

const SCOPE: ScopeKey = ScopeKey(1);
const CLASS: ClassKey = ClassKey(1);
const ISOLATED: (&str, &str) = ("10.244.1.5", "fd00:10:244::5");
const GUARDED: (&str, &str) = ("10.244.1.6", "fd00:10:244::6");
const AUDITED: (&str, &str) = ("10.244.1.7", "fd00:10:244::7");
const REMOTE: &str = "10.244.2.5";
const OUTSIDE: (&str, &str) = ("198.51.100.1", "2001:db8::1");
const STRANGER: (&str, &str) = ("198.51.100.99", "2001:db8::99");

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn range(proto: Proto, lo: u16, hi: u16, via: Via) -> PortRange {
    PortRange { proto, lo, hi, via }
}

fn ports(ranges: &[PortRange]) -> PortSet {
    PortSet::from_precedence(ranges.iter().copied())
}

fn state() -> NodeState {
    let mut s = NodeState {
        cluster: Cluster {
            prefixes: vec!["10.244.0.0/16".parse().unwrap(), "fd00:10:244::/56".parse().unwrap()],
            node_ports: Some((30_000, 32_767)),
            dns: vec!["10.244.1.53:5353".parse().unwrap()],
            ..Cluster::default()
        },
        ..NodeState::default()
    };
    s.nodes.insert("n1".into(), Node { addresses: vec![ip("192.0.2.1")] });
    s.nodes.insert("n2".into(), Node { addresses: vec![ip("192.0.2.2"), ip("2001:db8:ffff::2")] });
    s.gateways.insert("gw".into(), Gateway { node: "n2".into(), control: vec![] });
    s.scopes.insert(SCOPE, Scope { owner: "gw".into(), epoch: 1, pair: 3, standbys: vec![] });
    let pods = [
        (ISOLATED, 1, Touch::Isolated, false),
        (GUARDED, 2, Touch::Guarded, false),
        (AUDITED, 3, Touch::Isolated, true),
    ];
    let allowed = ports(&[
        range(Proto::Tcp, 80, 80, Via::Deny),
        range(Proto::Tcp, 443, 443, Via::Allow(Carry::Tls)),
        range(Proto::Tcp, 5432, 5439, Via::Allow(Carry::Forward)),
        range(Proto::Udp, 443, 443, Via::Allow(Carry::Block)),
        range(Proto::Udp, 4500, 4500, Via::Allow(Carry::Forward)),
    ]);
    for ((v4, v6), group, touch, audit) in pods {
        let key = GroupKey(group);
        for address in [v4, v6] {
            s.endpoints.insert(
                ip(address),
                Endpoint {
                    node: "n1".into(),
                    namespace: "shop".into(),
                    pod: format!("web-{group}"),
                    touch,
                    member: Some((SCOPE, key)),
                },
            );
        }
        let (admin, own) = (Some(PrefixSetKey(1)), Some(PrefixSetKey(2)));
        s.groups.insert(key, Group { isolated: touch == Touch::Isolated, audit, admin, own });
        s.grants.insert((key, CLASS), allowed.clone());
    }
    let mut far = s.endpoints[&ip(ISOLATED.0)].clone();
    far.node = "n2".into();
    s.endpoints.insert(ip(REMOTE), far);
    let mut admin = Prefixes::new();
    admin.insert("203.0.113.0/24".parse().unwrap(), ports(&[range(Proto::Tcp, 22, 22, Via::Deny)]));
    s.prefixes.insert(PrefixSetKey(1), admin);
    let mut own = Prefixes::new();
    own.insert("203.0.0.0/16".parse().unwrap(), ports(&[range(Proto::Tcp, 1, 65_535, Via::Allow(Carry::Forward))]));
    s.prefixes.insert(PrefixSetKey(2), own);
    s
}

/// All pods hang on the loopback device, the only one that a test run can name.
fn local() -> Local {
    let interface = Interface { ifindex: 1, mac: [2, 0, 0, 0, 0, 5] };
    let pods = [ISOLATED.0, ISOLATED.1, GUARDED.0, GUARDED.1, AUDITED.0, AUDITED.1];
    Local {
        node: "n1".into(),
        tunnel_ifindex: 1,
        interfaces: pods.iter().map(|a| (ip(a), interface)).collect::<BTreeMap<_, _>>(),
        ..Local::default()
    }
}

fn fact(address: &str, ttl: u64) -> FactUpdate {
    FactUpdate { scope: SCOPE, ip: ip(address), value: Some(FactValue { class: CLASS, ttl: Duration::from_secs(ttl) }) }
}

fn world(role: Role) -> Fixture {
    let mut f = Fixture::new(role);
    f.path_mut().apply(&state(), &local(), false).unwrap();
    f.path_mut().facts(&[fact(OUTSIDE.0, 600), fact(OUTSIDE.1, 600)]).unwrap();
    f.path_mut().heartbeat("gw").unwrap();
    f
}

fn run(f: &Fixture, program: Program, frame: &[u8]) -> TestResult {
    let packet = TestPacket { frame, ifindex: 1, ingress_ifindex: 0, mark: 0, gso_size: 0, repeat: 1 };
    f.path().test_run(program, &packet).unwrap()
}

fn egress(f: &Fixture, frame: &[u8]) -> i32 {
    run(f, Program::PodEgress, frame).code
}

fn counted(f: &Fixture, hook: Hook, outcome: Outcome, reason: Reason) -> u64 {
    let all = f.path().counters().unwrap();
    all.iter().find(|c| (c.hook, c.outcome, c.reason) == (hook, outcome, reason)).map_or(0, |c| c.packets)
}

#[track_caller]
fn drops(f: &Fixture, frame: &[u8], reason: Reason) {
    let before = counted(f, Hook::PodEgress, Outcome::Drop, reason);
    assert_eq!(egress(f, frame), SHOT, "{reason}");
    assert_eq!(counted(f, Hook::PodEgress, Outcome::Drop, reason), before + 1, "{reason}");
}

#[test]
fn every_step_for_both_families() {
    let f = world(Role::Node);
    for (pod, guarded, outside, stranger) in
        [(ISOLATED.0, GUARDED.0, OUTSIDE.0, STRANGER.0), (ISOLATED.1, GUARDED.1, OUTSIDE.1, STRANGER.1)]
    {
        // 2, 3, 4
        let mut short = tcp(pod, outside, 443, true);
        short.truncate(short.len() - 4);
        drops(&f, &short, Reason::Malformed);
        drops(&f, &tcp(stranger, outside, 443, true), Reason::SpoofedSource);
        drops(&f, &udp(pod, stranger, 8475), Reason::TunnelPort);
        // 6
        assert_eq!(egress(&f, &udp(pod, stranger, 53)), REDIRECT);
        assert_eq!(egress(&f, &udp(guarded, stranger, 53)), REDIRECT);
        // 8, 9
        drops(&f, &tcp(pod, stranger, 853, true), Reason::EncryptedDns);
        drops(&f, &raw(pod, stranger, 132, &[0; 16]), Reason::Protocol);
        // 10
        assert_eq!(egress(&f, &tcp(pod, outside, 443, true)), REDIRECT);
        assert_eq!(egress(&f, &tcp(pod, outside, 5435, false)), REDIRECT);
        assert_eq!(egress(&f, &udp(pod, outside, 443)), REDIRECT);
        drops(&f, &tcp(pod, outside, 80, true), Reason::DeniedByPolicy);
        drops(&f, &udp(pod, outside, 5432), Reason::NotAllowed);
        // 12
        drops(&f, &tcp(pod, stranger, 443, true), Reason::NotAllowed);
        assert_eq!(egress(&f, &tcp(guarded, stranger, 443, true)), NEXT);
        drops(&f, &tcp(guarded, outside, 80, true), Reason::DeniedByPolicy);
    }
    // 1
    let mut other = vec![0u8; 60];
    other[12..14].copy_from_slice(&[0x88, 0xcc]);
    drops(&f, &other, Reason::Protocol);
    other[12..14].copy_from_slice(&[8, 6]);
    assert_eq!(egress(&f, &other), NEXT);
    // 6 to 8
    assert_eq!(egress(&f, &udp(ISOLATED.0, "10.244.1.53", 5353)), REDIRECT);
    let passed = run(&f, Program::PodEgress, &tcp(ISOLATED.0, "10.244.9.9", 80, true));
    assert_eq!((passed.code, passed.mark), (NEXT, BY_CLUSTER));
    let passed = run(&f, Program::PodEgress, &tcp(GUARDED.0, "10.244.9.9", 80, true));
    assert_eq!((passed.code, passed.mark), (NEXT, MARK));
    assert_eq!(egress(&f, &tcp(ISOLATED.1, "fd00:10:244::99", 80, true)), NEXT);
    assert_eq!(egress(&f, &tcp(ISOLATED.0, "192.0.2.1", 10250, true)), NEXT);
    drops(&f, &tcp(ISOLATED.0, "192.0.2.1", 30_080, true), Reason::NotAllowed);
    drops(&f, &tcp(ISOLATED.0, "169.254.169.254", 80, true), Reason::Metadata);
    // 11
    assert_eq!(egress(&f, &tcp(ISOLATED.0, "203.0.113.9", 8080, true)), REDIRECT);
    drops(&f, &tcp(ISOLATED.0, "203.0.113.9", 22, true), Reason::DeniedByPolicy);
    assert_eq!(egress(&f, &tcp(ISOLATED.0, "203.0.9.9", 22, true)), REDIRECT);
}

#[test]
fn step_0_untouched_interfaces() {
    let mut f = Fixture::new(Role::Node);
    let mut local = Local { node: "n1".into(), ..Local::default() };
    local.untouched.insert(1);
    f.path_mut().apply(&state(), &local, false).unwrap();
    let passed = run(&f, Program::PodEgress, &tcp("10.9.9.9", STRANGER.0, 25, true));
    assert_eq!((passed.code, passed.mark), (NEXT, 0));
    drops(&f, &udp("10.9.9.9", "192.0.2.1", 8475), Reason::TunnelPort);
}

#[test]
fn a_deny_of_any_protocol_holds_for_all() {
    let mut f = world(Role::Node);
    let mut s = state();
    s.cluster.ping = true;
    let net = "203.0.0.0/16".parse().unwrap();
    let echo = raw(ISOLATED.0, "203.0.9.9", 1, &[8, 0, 0, 0, 0, 1, 0, 1]);
    let gre = raw(GUARDED.0, "203.0.9.9", 47, &[0; 24]);
    f.path_mut().apply(&s, &local(), false).unwrap();
    assert_eq!((egress(&f, &echo), egress(&f, &gre)), (REDIRECT, NEXT));
    let any = [Proto::Other, Proto::Tcp, Proto::Udp].map(|p| range(p, 0, 65_535, Via::Deny));
    s.prefixes.get_mut(&PrefixSetKey(1)).unwrap().insert(net, ports(&any));
    f.path_mut().apply(&s, &local(), false).unwrap();
    drops(&f, &echo, Reason::DeniedByPolicy);
    drops(&f, &gre, Reason::DeniedByPolicy);
    // It outlives the process.
    f.restart();
    f.path_mut().apply(&s, &local(), false).unwrap();
    drops(&f, &echo, Reason::DeniedByPolicy);
}

#[test]
fn malformed_packets() {
    let f = world(Role::Node);
    let good = tcp(ISOLATED.0, OUTSIDE.0, 443, true);
    let change = |at: usize, value: u8| {
        let mut frame = good.clone();
        frame[at] = value;
        frame
    };
    for frame in [change(14, 0x65), change(14, 0x44), change(14, 0x46), change(17, 19), change(16, 9), change(46, 0x10)]
    {
        drops(&f, &frame, Reason::Malformed);
    }
    let mut fragment = good.clone();
    fragment[20..22].copy_from_slice(&[0, 9]);
    drops(&f, &fragment, Reason::Fragment);
    // Headers of seven kinds in a row, and one that says it is longer than the packet.
    drops(&f, &raw(ISOLATED.1, OUTSIDE.1, 60, &[60, 0, 0, 0, 0, 0, 0, 0].repeat(8)), Reason::Malformed);
    drops(&f, &raw(ISOLATED.1, OUTSIDE.1, 0, &[6, 200, 0, 0, 0, 0, 0, 0].repeat(3)), Reason::Malformed);
    drops(&f, &raw(ISOLATED.1, OUTSIDE.1, 44, &[6, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]), Reason::Fragment);
    let mut chain = vec![6, 0, 0, 0, 0, 0, 0, 0];
    chain.extend_from_slice(&tcp(ISOLATED.1, OUTSIDE.1, 443, true)[54..]);
    assert_eq!(egress(&f, &raw(ISOLATED.1, OUTSIDE.1, 0, &chain)), REDIRECT);
}

#[test]
fn flows_from_outside_are_recorded_within_their_budget() {
    let mut f = world(Role::Node);
    let reply = tcp(ISOLATED.0, STRANGER.0, 40_000, false);
    drops(&f, &reply, Reason::NotAllowed);
    // etherparse's packets come from port 40000; the reply's ports are equal on both sides.
    let opening = tcp(STRANGER.0, ISOLATED.0, 40_000, true);
    assert_eq!(run(&f, Program::PodIngress, &opening).code, NEXT);
    let passed = run(&f, Program::PodEgress, &reply);
    assert_eq!((passed.code, passed.mark), (NEXT, MARK));
    drops(&f, &tcp(ISOLATED.0, STRANGER.0, 40_000, true), Reason::NotAllowed);
    // A packet inside a connection opens nothing.
    run(&f, Program::PodIngress, &tcp("198.51.100.98", ISOLATED.0, 40_000, false));
    drops(&f, &tcp(ISOLATED.0, "198.51.100.98", 40_000, false), Reason::NotAllowed);
    // Echo, and the other family.
    run(&f, Program::PodIngress, &raw(STRANGER.1, ISOLATED.1, 58, &[128, 0, 0, 0, 0, 7, 0, 1]));
    assert_eq!(egress(&f, &raw(ISOLATED.1, STRANGER.1, 58, &[129, 0, 0, 0, 0, 7, 0, 1])), NEXT);
    drops(&f, &raw(ISOLATED.1, STRANGER.1, 58, &[129, 0, 0, 0, 0, 8, 0, 1]), Reason::Protocol);
    // Nobody's flood takes a place of another endpoint.
    for host in 1..=20 {
        run(&f, Program::PodIngress, &udp(&format!("198.51.100.{host}"), ISOLATED.0, 40_000));
    }
    assert_eq!(counted(&f, Hook::PodIngress, Outcome::Pass, Reason::Quota), 13);
    assert_eq!(egress(&f, &reply), NEXT);
    run(&f, Program::PodIngress, &udp(STRANGER.0, GUARDED.0, 40_000));
    assert_eq!(egress(&f, &udp(GUARDED.0, STRANGER.0, 40_000)), NEXT);
    let swept = f.path_mut().sweep().unwrap();
    assert_eq!(swept.flows, 0);
    assert_eq!(egress(&f, &reply), NEXT);
}

#[test]
fn openings_that_this_nodes_pods_forge_are_not_remembered() {
    let mut f = world(Role::Node);
    let opens = |f: &Fixture, source: &str, pod: &str, from: u32| {
        let frame = udp(source, pod, 40_000);
        let packet = TestPacket { frame: &frame, ifindex: 1, ingress_ifindex: from, mark: 0, gso_size: 0, repeat: 1 };
        assert_eq!(f.path().test_run(Program::PodIngress, &packet).unwrap().code, NEXT);
        egress(f, &udp(pod, source, 40_000)) == NEXT
    };
    // All pods hang on interface 1: what comes from there with another source than theirs is none from outside.
    assert!(!opens(&f, STRANGER.0, ISOLATED.0, 1));
    assert!(!opens(&f, STRANGER.1, ISOLATED.1, 1));
    assert!(opens(&f, STRANGER.0, ISOLATED.0, 0), "from the node");
    assert!(opens(&f, STRANGER.1, ISOLATED.1, 0), "from the node");
    // A pod outside the cluster's prefixes, with its own address.
    let mut s = state();
    let peer = s.endpoints[&ip(GUARDED.0)].clone();
    s.endpoints.insert(ip("172.31.9.2"), peer);
    let mut places = local();
    places.interfaces.insert(ip("172.31.9.2"), Interface { ifindex: 1, mac: [2, 0, 0, 0, 0, 5] });
    f.path_mut().apply(&s, &places, false).unwrap();
    assert!(opens(&f, "172.31.9.2", ISOLATED.0, 1));
    // A bridge of pods, or a second interface: only what is from a pod of this node.
    for (inside, wanted) in [(true, false), (false, true)] {
        let mut elsewhere = Local { interfaces: BTreeMap::new(), ..local() };
        if inside {
            elsewhere.inside.insert(1);
        }
        f.path_mut().apply(&state(), &elsewhere, false).unwrap();
        run_from_one(&f, &udp("198.51.100.77", ISOLATED.0, 40_000));
        f.path_mut().apply(&state(), &local(), false).unwrap();
        assert_eq!(egress(&f, &udp(ISOLATED.0, "198.51.100.77", 40_000)) == NEXT, wanted);
    }
}

fn run_from_one(f: &Fixture, frame: &[u8]) {
    let packet = TestPacket { frame, ifindex: 1, ingress_ifindex: 1, mark: 0, gso_size: 0, repeat: 1 };
    f.path().test_run(Program::PodIngress, &packet).unwrap();
}

#[test]
fn flows_of_a_pod_are_not_those_of_the_next_one_with_its_address() {
    let mut f = world(Role::Node);
    let reply = udp(ISOLATED.0, STRANGER.0, 40_000);
    let open = |f: &Fixture| {
        run(f, Program::PodIngress, &udp(STRANGER.0, ISOLATED.0, 40_000));
        assert_eq!(egress(f, &reply), NEXT);
    };
    let mut renamed = state();
    renamed.endpoints.get_mut(&ip(ISOLATED.0)).unwrap().pod = "web-2".into();
    let mut other = state();
    other.scopes.insert(ScopeKey(2), other.scopes[&SCOPE].clone());
    other.endpoints.get_mut(&ip(ISOLATED.0)).unwrap().member = Some((ScopeKey(2), GroupKey(1)));
    for next in [renamed, other, state()] {
        open(&f);
        f.path_mut().apply(&next, &local(), false).unwrap();
        drops(&f, &reply, Reason::NotAllowed);
    }
    // Gone and back, with the whole budget.
    for host in 1..=8 {
        run(&f, Program::PodIngress, &udp(&format!("198.51.100.{host}"), ISOLATED.0, 40_000));
    }
    let mut gone = state();
    gone.endpoints.remove(&ip(ISOLATED.0));
    f.path_mut().apply(&gone, &local(), false).unwrap();
    f.path_mut().apply(&state(), &local(), false).unwrap();
    open(&f);
    // An interface that is not found for a moment, and another process, change nothing.
    let mut lost = local();
    lost.interfaces.remove(&ip(ISOLATED.0));
    f.path_mut().apply(&state(), &lost, false).unwrap();
    f.path_mut().apply(&state(), &local(), false).unwrap();
    assert_eq!(egress(&f, &reply), NEXT);
    f.restart();
    f.path_mut().apply(&state(), &local(), false).unwrap();
    assert_eq!(egress(&f, &reply), NEXT);
    assert_eq!(f.path_mut().sweep().unwrap().flows, 8 + 3);
    assert_eq!(egress(&f, &reply), NEXT);
}

#[test]
fn facts_expire_are_replaced_and_deleted() {
    let mut f = world(Role::Node);
    let syn = tcp(ISOLATED.0, OUTSIDE.0, 443, true);
    let more = tcp(ISOLATED.0, OUTSIDE.0, 443, false);
    f.path_mut().facts(&[fact(OUTSIDE.0, 0)]).unwrap();
    drops(&f, &syn, Reason::BindingExpired);
    assert_eq!(egress(&f, &more), REDIRECT);
    f.path_mut().facts(&[fact(OUTSIDE.0, 60)]).unwrap();
    assert_eq!(egress(&f, &syn), REDIRECT);
    let gone = FactUpdate { value: None, ..fact(OUTSIDE.0, 0) };
    f.path_mut().facts(&[gone.clone(), gone]).unwrap();
    drops(&f, &more, Reason::NotAllowed);
    assert_eq!(f.path().fact_last_seen(SCOPE, ip(OUTSIDE.0)), None);
}

#[test]
fn audit_passes_reports_and_drains() {
    let mut f = world(Role::Node);
    let mut events = f.path_mut().events().unwrap();
    assert!(f.path_mut().events().is_none());
    let syn = tcp(AUDITED.0, STRANGER.0, 443, true);
    let more = tcp(AUDITED.0, STRANGER.0, 443, false);
    assert_eq!(egress(&f, &syn), NEXT);
    let event = events.try_next().unwrap();
    assert_eq!((event.hook, event.outcome, event.reason), (Hook::PodEgress, Outcome::Audit, Reason::NotAllowed));
    assert_eq!(event.source, format!("{}:40000", AUDITED.0).parse().unwrap());
    assert_eq!(event.destination, format!("{}:443", STRANGER.0).parse().unwrap());
    assert_eq!((event.protocol, event.ifindex), (6, 1));
    assert_eq!(egress(&f, &more), NEXT);
    assert!(events.try_next().is_none());
    let mut enforced = state();
    enforced.groups.get_mut(&GroupKey(3)).unwrap().audit = false;
    f.path_mut().apply(&enforced, &local(), false).unwrap();
    assert_eq!(egress(&f, &more), NEXT);
    drops(&f, &syn, Reason::NotAllowed);
    // Where nothing may drain, it ends with the audit.
    f.options.drain = Duration::ZERO;
    f.reload().unwrap();
    f.path_mut().apply(&state(), &local(), false).unwrap();
    assert_eq!(egress(&f, &more), NEXT);
    f.path_mut().apply(&enforced, &local(), false).unwrap();
    f.path_mut().heartbeat("gw").unwrap();
    drops(&f, &more, Reason::NotAllowed);
}

#[test]
fn no_owner_and_stale_owner() {
    let mut f = world(Role::Node);
    let mut lone = state();
    lone.gateways.clear();
    f.path_mut().apply(&lone, &local(), false).unwrap();
    drops(&f, &tcp(ISOLATED.0, OUTSIDE.0, 443, true), Reason::NoGateway);
    drops(&f, &udp(ISOLATED.0, STRANGER.0, 53), Reason::NoGateway);
    assert_eq!(egress(&f, &udp(GUARDED.0, STRANGER.0, 53)), NEXT);
    assert_eq!(egress(&f, &udp(AUDITED.0, STRANGER.0, 53)), NEXT);
    f.path_mut().apply(&state(), &local(), false).unwrap();
    drops(&f, &tcp(ISOLATED.0, STRANGER.0, 443, true), Reason::NotAllowed);
    std::thread::sleep(Duration::from_millis(2_100));
    assert_eq!(egress(&f, &tcp(ISOLATED.0, STRANGER.0, 443, true)), REDIRECT);
    // So is what only a deny that has expired denies.
    let denied = tcp(ISOLATED.0, OUTSIDE.0, 80, true);
    drops(&f, &denied, Reason::DeniedByPolicy);
    f.path_mut().facts(&[fact(OUTSIDE.0, 0)]).unwrap();
    assert_eq!(egress(&f, &denied), REDIRECT);
    f.path_mut().heartbeat("gw").unwrap();
    drops(&f, &tcp(ISOLATED.0, STRANGER.0, 443, true), Reason::NotAllowed);
    drops(&f, &denied, Reason::DeniedByPolicy);
}

/// One's complement sum; zero over a part with a right checksum.
fn checksum(parts: &[&[u8]]) -> u16 {
    let bytes: Vec<u8> = parts.concat();
    let mut sum: u32 = bytes.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], *c.get(1).unwrap_or(&0)]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[test]
fn too_large_packets_are_answered() {
    let f = world(Role::Node);
    let mut large = common::packets::tcp_with(ISOLATED.0, OUTSIDE.0, 443, &[7; 1_420]);
    assert_eq!(egress(&f, &large), REDIRECT);
    assert_eq!(counted(&f, Hook::PodEgress, Outcome::Drop, Reason::TooBig), 0);
    large[20] |= 0x40;
    let answer = run(&f, Program::PodEgress, &large);
    assert_eq!(answer.code, REDIRECT);
    assert_eq!(counted(&f, Hook::PodEgress, Outcome::Drop, Reason::TooBig), 1);
    let a = &answer.frame;
    assert_eq!((a.len(), a[34], a[35]), (14 + 56, 3, 4));
    assert_eq!(u16::from_be_bytes([a[40], a[41]]), 1450);
    assert_eq!((&a[26..30], &a[30..34]), (&large[30..34], &large[26..30]));
    assert_eq!((&a[0..6], &a[6..12]), (&large[6..12], &large[0..6]));
    assert_eq!((checksum(&[&a[14..34]]), checksum(&[&a[34..]])), (0, 0));
    assert_eq!(&a[42..], &large[14..42]);

    let large = common::packets::tcp_with(ISOLATED.1, OUTSIDE.1, 443, &[7; 1_400]);
    let answer = run(&f, Program::PodEgress, &large);
    let a = &answer.frame;
    assert_eq!((answer.code, a.len(), a[54], a[55]), (REDIRECT, 14 + 96, 2, 0));
    assert_eq!(u32::from_be_bytes([a[58], a[59], a[60], a[61]]), 1450);
    assert_eq!((&a[22..38], &a[38..54]), (&large[38..54], &large[22..38]));
    assert_eq!(checksum(&[&a[22..54], &[0, 0, 0, 56, 0, 0, 0, 58], &a[54..]]), 0);
    assert_eq!(&a[62..], &large[14..62]);
}

#[test]
fn the_guard_drops_what_did_not_come_through_the_verdict() {
    let mut f = world(Role::Node);
    let guard = |f: &Fixture, frame: &[u8], mark: u32, from: u32| {
        let packet = TestPacket { frame, ifindex: 1, ingress_ifindex: from, mark, gso_size: 0, repeat: 1 };
        f.path().test_run(Program::NodeGuard, &packet).unwrap().code
    };
    let frame = tcp(ISOLATED.0, STRANGER.0, 443, true);
    assert_eq!(guard(&f, &frame, 0, 1), SHOT);
    assert_eq!(guard(&f, &frame, MARK | 0x4000, 1), NEXT);
    assert_eq!(guard(&f, &tcp(ISOLATED.1, STRANGER.1, 443, true), 0x0010_0000, 1), SHOT);
    assert_eq!(guard(&f, &tcp(GUARDED.0, STRANGER.0, 443, true), 0, 1), NEXT);
    assert_eq!(guard(&f, &tcp(AUDITED.0, STRANGER.0, 443, true), 0, 1), NEXT);
    assert_eq!(counted(&f, Hook::NodeGuard, Outcome::Audit, Reason::NotAllowed), 1);
    assert_eq!(guard(&f, &tcp(REMOTE, STRANGER.0, 443, true), 0, 1), NEXT);
    let unknown = tcp("10.244.77.7", STRANGER.0, 443, true);
    assert_eq!(guard(&f, &unknown, 0, 1), NEXT);
    let mut armed = Local { drop_unknown: true, ..local() };
    f.path_mut().apply(&state(), &armed, false).unwrap();
    assert_eq!(guard(&f, &unknown, 0, 1), SHOT);
    assert_eq!(counted(&f, Hook::NodeGuard, Outcome::Drop, Reason::UnknownPod), 1);
    // Whatever its address is.
    assert_eq!(guard(&f, &tcp("198.18.0.1", STRANGER.0, 443, true), 0, 1), SHOT);
    // This node's own packets.
    assert_eq!(guard(&f, &tcp("192.0.2.1", STRANGER.0, 443, true), 0, 1), NEXT);
    // Those of another node's pods and of other nodes do not begin here.
    assert_eq!(guard(&f, &tcp(REMOTE, STRANGER.0, 443, true), 0, 0), SHOT);
    assert_eq!(guard(&f, &tcp(REMOTE, STRANGER.0, 443, true), 0, 1), NEXT);
    armed.tunnels.insert(1);
    armed.interfaces.clear();
    f.path_mut().apply(&state(), &armed, false).unwrap();
    assert_eq!(guard(&f, &unknown, 0, 1), NEXT);
    let uplink = Local { uplinks: vec![Interface { ifindex: 1, mac: [2; 6] }], ..armed };
    f.path_mut().apply(&state(), &uplink, false).unwrap();
    assert_eq!(guard(&f, &unknown, 0, 1), NEXT);
}

/// What entered nowhere is the node's own, or of a child of the uplink in a pod: only an address tells.
#[test]
fn the_guard_lets_a_node_speak_from_its_own_addresses_only() {
    let mut f = world(Role::Node);
    let armed = Local { drop_unknown: true, ..local() };
    f.path_mut().apply(&state(), &armed, false).unwrap();
    let (ns, far) = (Ns::new(), Ns::new());
    join(&ns, "up0", &far, "up0");
    ns.ready("up0");
    // In no list of nodes.
    let own = ["192.0.2.77", "2001:db8:77::77"];
    let strangers = [["198.18.0.1", "fd77::1"], ["203.0.113.9", "2001:db8:9::9"]];
    ns.ip("addr add 192.0.2.77/32 dev up0");
    ns.ip("addr add 2001:db8:77::77/128 dev up0 nodad");
    let up0 = ns.device("up0").0;
    let sent = |f: &Fixture, from: &str| {
        let to = if from.contains(':') { STRANGER.1 } else { STRANGER.0 };
        let frame = tcp(from, to, 443, true);
        let packet = TestPacket { frame: &frame, ifindex: up0, ingress_ifindex: 0, mark: 0, gso_size: 0, repeat: 1 };
        ns.enter(|| f.path().test_run(Program::NodeGuard, &packet).unwrap().code)
    };
    let forwarding = |on: &str| {
        ns.sysctl("net/ipv4/conf/up0/forwarding", on);
        ns.sysctl("net/ipv6/conf/up0/forwarding", on);
    };
    let all = |f: &Fixture, own_passes: i32, what: &str| {
        for from in own {
            assert_eq!(sent(f, from), own_passes, "{what}: {from}");
        }
        for from in strangers.as_flattened() {
            assert_eq!(sent(f, from), SHOT, "{what}: {from}");
        }
        // On its link only: neighbour discovery.
        assert_eq!(sent(f, "fe80::77"), NEXT, "{what}");
    };
    let none = [];
    let known = own.map(ip);

    forwarding("1");
    ns.ip("route add default dev up0");
    ns.ip("-6 route add default dev up0");
    all(&f, NEXT, "routes for everything tell");
    f.path_mut().addresses(&[ip("198.18.0.1"), ip("fd77::1")], false).unwrap();
    all(&f, NEXT, "whatever was listed before");

    ns.ip("route del default");
    ns.ip("-6 route del default");
    for what in ["no routes", "routes for some"] {
        f.path_mut().addresses(&none, false).unwrap();
        all(&f, SHOT, what);
        f.path_mut().addresses(&known, false).unwrap();
        all(&f, NEXT, what);
        // The next round.
        ns.ip("route replace 0.0.0.0/1 dev up0");
        ns.ip("-6 route replace 2000::/3 dev up0");
    }

    forwarding("0");
    all(&f, NEXT, "a device that does not forward");
    f.path_mut().addresses(&none, false).unwrap();
    all(&f, SHOT, "a device that does not forward");

    // What others take out of the kernel comes back.
    f.path_mut().addresses(&known, false).unwrap();
    let pinned = Map::HashMap(MapData::from_pin(f.pin("OWN")).unwrap());
    let mut held = HashMap::<_, [u8; 16], u32>::try_from(pinned).unwrap();
    held.remove(&std::net::Ipv4Addr::new(192, 0, 2, 77).to_ipv6_mapped().octets()).unwrap();
    assert_eq!((sent(&f, own[0]), sent(&f, own[1])), (SHOT, NEXT));
    assert_eq!(f.path_mut().addresses(&known, false).unwrap(), 0);
    assert_eq!(f.path_mut().addresses(&known, true).unwrap(), 1);
    all(&f, NEXT, "put right");
    // A node with more of them than there are places goes on: the first ones count.
    let others = (0..20_000u32).map(|n| IpAddr::V4((0x0a80_0000 + n).into()));
    let many: Vec<IpAddr> = known.into_iter().chain(others).collect();
    f.path_mut().addresses(&many, false).unwrap();
    assert_eq!(f.path().entries()["OWN"], 16_384);
    all(&f, NEXT, "the first of many");
}

#[test]
fn the_guard_holds_what_passed_to_the_cluster_to_it() {
    let f = world(Role::Node);
    let guard = |to: &str, port: u16, mark: u32, from: u32| {
        let frame = tcp(if to.contains(':') { ISOLATED.1 } else { ISOLATED.0 }, to, port, true);
        let packet = TestPacket { frame: &frame, ifindex: 1, ingress_ifindex: from, mark, gso_size: 0, repeat: 1 };
        f.path().test_run(Program::NodeGuard, &packet).unwrap().code
    };
    for to in ["10.244.9.9", "fd00:10:244::99", "192.0.2.2"] {
        assert_eq!(guard(to, 443, BY_CLUSTER | 0x4000, 1), NEXT, "{to}");
    }
    // A service's address that was translated to one outside, or to a port behind which is anything.
    for (to, port) in [(STRANGER.0, 443), (STRANGER.1, 443), ("192.0.2.2", 30_080)] {
        let before = counted(&f, Hook::NodeGuard, Outcome::Drop, Reason::NotAllowed);
        assert_eq!(guard(to, port, BY_CLUSTER, 1), SHOT, "{to}");
        assert_eq!(counted(&f, Hook::NodeGuard, Outcome::Drop, Reason::NotAllowed), before + 1);
        assert_eq!(guard(to, port, MARK, 1), NEXT, "{to}");
        // Outer packets of the network plugin carry the mark on, and entered nowhere.
        assert_eq!(guard(to, port, BY_CLUSTER, 0), NEXT, "{to}");
    }
}

#[test]
fn overlays_of_the_network_plugin_are_closed_to_touched_pods() {
    let f = world(Role::Node);
    for (pod, node) in [(ISOLATED.0, "192.0.2.2"), (GUARDED.0, "192.0.2.1"), (ISOLATED.1, "2001:db8:ffff::2")] {
        for port in [4789, 8472, 6081, 51_820, 51_821] {
            drops(&f, &udp(pod, node, port), Reason::TunnelPort);
        }
        assert_eq!(egress(&f, &udp(pod, node, 4790)), NEXT);
        drops(&f, &raw(pod, node, 4, &[0; 20]), Reason::Protocol);
        drops(&f, &raw(pod, node, 47, &[0; 20]), Reason::Protocol);
    }
    drops(&f, &udp(ISOLATED.0, "10.244.9.1", 8472), Reason::TunnelPort);
    drops(&f, &raw(ISOLATED.0, "10.244.9.1", 4, &[0; 20]), Reason::Protocol);
}

#[test]
fn the_gateway_marks_what_it_carries() {
    let mut f = world(Role::Gateway);
    let mut events = f.path_mut().events().unwrap();
    let gateway = |f: &Fixture, frame: &[u8]| {
        let r = run(f, Program::GatewayIngress, frame);
        (r.code, r.mark)
    };
    for (pod, outside, stranger) in [(ISOLATED.0, OUTSIDE.0, STRANGER.0), (ISOLATED.1, OUTSIDE.1, STRANGER.1)] {
        assert_eq!(gateway(&f, &tcp(pod, outside, 443, true)), (OK, 0x302));
        assert_eq!(gateway(&f, &udp(pod, outside, 443)), (OK, 0x303));
        assert_eq!(gateway(&f, &udp(pod, stranger, 53)), (OK, 0x304));
        assert!(events.try_next().is_none());
        // Forwarded flows have no relay that would tell of them.
        assert_eq!(gateway(&f, &tcp(pod, outside, 5432, true)), (OK, 0x301));
        let event = events.try_next().unwrap();
        assert_eq!((event.outcome, event.reason, event.destination.port()), (Outcome::Steer, Reason::Allowed, 5432));
        assert_eq!(gateway(&f, &tcp(pod, outside, 5432, false)), (OK, 0x301));
        assert!(events.try_next().is_none());
        assert_eq!(gateway(&f, &udp(pod, outside, 4500)), (OK, 0x301));
        assert!(events.try_next().is_some());
        assert_eq!(gateway(&f, &udp(pod, outside, 4500)), (OK, 0x301));
        assert!(events.try_next().is_none());
        assert_eq!(gateway(&f, &tcp(pod, stranger, 443, true)).0, SHOT);
        assert_eq!(events.try_next().unwrap().outcome, Outcome::Drop);
    }
    assert_eq!(gateway(&f, &tcp(ISOLATED.0, "10.244.9.9", 80, true)).0, SHOT);
    assert_eq!(gateway(&f, &tcp("10.244.9.9", OUTSIDE.0, 443, true)).0, SHOT);
    assert_eq!(gateway(&f, &tcp(GUARDED.0, STRANGER.0, 443, true)).0, SHOT);
    let ago = f.path().fact_last_seen(SCOPE, ip(OUTSIDE.0)).unwrap();
    assert!(ago <= Duration::from_secs(2));
    // A refreshed fact keeps its last-seen time.
    f.path_mut().facts(&[fact(OUTSIDE.0, 60)]).unwrap();
    assert!(f.path().fact_last_seen(SCOPE, ip(OUTSIDE.0)).is_some());
    assert_eq!(f.path().fact_last_seen(SCOPE, ip(STRANGER.0)), None);
}

#[test]
fn a_gateway_reports_flows_without_a_place_and_keeps_silent_about_its_devices() {
    let mut f = world(Role::Gateway);
    let mut events = f.path_mut().events().unwrap();
    let mut told = |f: &Fixture, frame: &[u8]| {
        run(f, Program::GatewayIngress, frame);
        std::iter::from_fn(|| events.try_next()).count()
    };
    // The budget is eight flows.
    let flow = |port: u16| {
        let mut frame = udp(ISOLATED.0, OUTSIDE.0, 4500);
        frame[34..36].copy_from_slice(&port.to_be_bytes());
        frame
    };
    for port in 1..=20 {
        assert_eq!(told(&f, &flow(port)), 1, "{port}");
    }
    assert_eq!((told(&f, &flow(8)), told(&f, &flow(20))), (0, 1));
    // Router solicitation and listener reports of the veth itself.
    for frame in [
        raw("fe80::7", "ff02::2", 58, &[133, 0, 0, 0, 0, 0, 0, 0]),
        raw("::", "ff02::16", 58, &[143, 0, 0, 0, 0, 0, 0, 0]),
        raw("::", "ff02::1:ff00:1", 58, &[135, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    ] {
        assert_eq!(run(&f, Program::GatewayIngress, &frame).code, SHOT);
        assert_eq!(told(&f, &frame), 0);
    }
    assert_eq!(told(&f, &udp("fd00:10:244::77", OUTSIDE.1, 4500)), 1);
}

#[test]
fn a_gateway_of_this_node_needs_no_tunnel() {
    let mut f = world(Role::Node);
    let mut s = state();
    s.gateways.insert("gw".into(), Gateway { node: "n1".into(), control: vec![] });
    let plugged =
        Local { plugged: Some(Plugged { gateway: "gw".into(), tgq: 1, tgh: 1 }), tunnel_ifindex: 0, ..local() };
    f.path_mut().apply(&s, &plugged, false).unwrap();
    assert_eq!(egress(&f, &tcp(ISOLATED.0, OUTSIDE.0, 443, true)), REDIRECT);
    // Without the tunnel there is no way to another node's.
    f.path_mut().apply(&state(), &Local { tunnel_ifindex: 0, ..local() }, false).unwrap();
    drops(&f, &tcp(ISOLATED.0, OUTSIDE.0, 443, true), Reason::NoGateway);
}

#[test]
fn replies_go_to_pods_here_and_elsewhere() {
    let f = world(Role::Node);
    let back = |frame: &[u8]| run(&f, Program::GatewayReturn, frame);
    let here = back(&tcp(OUTSIDE.0, ISOLATED.0, 40_000, false));
    assert_eq!((here.code, &here.frame[..6]), (REDIRECT, &[2, 0, 0, 0, 0, 5][..]));
    assert_eq!(back(&tcp(OUTSIDE.0, REMOTE, 40_000, false)).code, REDIRECT);
    assert_eq!(back(&tcp(OUTSIDE.0, STRANGER.0, 40_000, false)).code, SHOT);
    assert_eq!(counted(&f, Hook::GatewayReturn, Outcome::Drop, Reason::UnknownPod), 1);
    // A frame that did not come through the tunnel.
    assert_eq!(run(&f, Program::TunnelIngress, &tcp(OUTSIDE.0, ISOLATED.0, 40_000, false)).code, SHOT);
}

#[test]
fn held_addresses_are_answered_for_while_the_lease_runs() {
    let mut f = world(Role::Node);
    let own = [2, 0xaa, 0, 0, 0, 1];
    let here = Local {
        plugged: Some(Plugged { gateway: "gw".into(), tgq: 1, tgh: 1 }),
        uplinks: vec![Interface { ifindex: 1, mac: own }],
        ..local()
    };
    f.path_mut().apply(&state(), &here, false).unwrap();
    let (held4, held6) = ("192.0.2.10", "2001:db8:ffff::10");
    let arp = common::packets::arp("192.0.2.254", held4);
    let solicit = common::packets::solicitation("2001:db8:ffff::1", held6, true);
    let uplink = |f: &Fixture, frame: &[u8]| run(f, Program::UplinkIngress, frame);
    assert_eq!((uplink(&f, &arp).code, uplink(&f, &solicit).code), (NEXT, NEXT));
    f.path_mut().hold(&[ip(held4), ip(held6)], Duration::from_secs(1)).unwrap();

    let answer = uplink(&f, &arp);
    let a = &answer.frame;
    assert_eq!((answer.code, &a[..6], &a[6..12]), (REDIRECT, &arp[6..12], &own[..]));
    assert_eq!(&a[14..22], &[0, 1, 8, 0, 6, 4, 0, 2]);
    assert_eq!((&a[22..28], &a[28..32]), (&own[..], &arp[38..42]));
    assert_eq!((&a[32..38], &a[38..42]), (&arp[22..28], &arp[28..32]));
    assert_eq!(uplink(&f, &common::packets::arp(held4, held4)).code, NEXT);
    assert_eq!(uplink(&f, &common::packets::arp("192.0.2.254", "192.0.2.11")).code, NEXT);

    for (asker, option, to_mac, flags) in [
        ("2001:db8:ffff::1", true, [2, 0, 0, 0, 0, 1], 0x60),
        ("2001:db8:ffff::1", false, [2, 0, 0, 0, 0, 1], 0x60),
        ("::", false, [0x33, 0x33, 0, 0, 0, 1], 0x20),
    ] {
        let answer = uplink(&f, &common::packets::solicitation(asker, held6, option));
        let a = &answer.frame;
        assert_eq!((answer.code, a.len(), a[20], a[21]), (REDIRECT, 86, 58, 255));
        assert_eq!((&a[..6], &a[6..12]), (&to_mac[..], &own[..]));
        assert_eq!((a[54], a[58]), (136, flags));
        assert_eq!((&a[22..38], &a[62..78]), (&solicit[62..78], &solicit[62..78]));
        assert_eq!(&a[78..86], &[2, 1, 2, 0xaa, 0, 0, 0, 1]);
        assert_eq!(checksum(&[&a[22..54], &[0, 0, 0, 32, 0, 0, 0, 58], &a[54..]]), 0);
    }

    assert_eq!(uplink(&f, &tcp(STRANGER.0, held4, 40_000, false)).code, REDIRECT);
    assert_eq!(uplink(&f, &tcp(STRANGER.0, "192.0.2.11", 40_000, false)).code, NEXT);
    let redirect = raw("2001:db8:ffff::1", held6, 58, &[137, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(uplink(&f, &redirect).code, SHOT);

    // Out: only with a held address, and only while the lease runs.
    let out = |f: &Fixture, frame: &[u8]| run(f, Program::UplinkEgress, frame).code;
    assert_eq!(out(&f, &tcp("192.0.2.11", STRANGER.0, 443, true)), SHOT);
    assert_eq!(counted(&f, Hook::UplinkEgress, Outcome::Drop, Reason::SpoofedSource), 1);
    assert_eq!(out(&f, &tcp(held4, "192.0.2.1", 22, true)), SHOT);
    std::thread::sleep(Duration::from_millis(1_050));
    assert_eq!((uplink(&f, &arp).code, uplink(&f, &solicit).code), (NEXT, NEXT));
    assert_eq!(uplink(&f, &tcp(STRANGER.0, held4, 40_000, false)).code, NEXT);
    f.path_mut().hold(&[ip(held4)], Duration::from_secs(60)).unwrap();
    assert_eq!(uplink(&f, &arp).code, REDIRECT);
    f.path_mut().release(&[ip(held4), ip(held4)]).unwrap();
    assert_eq!(uplink(&f, &arp).code, NEXT);
}

#[test]
fn apply_is_idempotent_prunes_and_repairs() {
    let mut f = world(Role::Node);
    assert_eq!(f.path_mut().apply(&state(), &local(), false).unwrap(), Default::default());
    assert_eq!(f.path_mut().apply(&state(), &local(), true).unwrap(), Default::default());
    // A port edit writes the grant and nothing else.
    let mut edited = state();
    edited.grants.insert((GroupKey(1), CLASS), ports(&[range(Proto::Tcp, 8443, 8443, Via::Allow(Carry::Tls))]));
    let applied = f.path_mut().apply(&edited, &local(), false).unwrap();
    assert_eq!((applied.updated, applied.deleted), (1, 0));
    assert_eq!(egress(&f, &tcp(ISOLATED.0, OUTSIDE.0, 8443, true)), REDIRECT);
    drops(&f, &tcp(ISOLATED.0, OUTSIDE.0, 443, true), Reason::NotAllowed);
    // Everything goes but the facts.
    f.path_mut().apply(&NodeState::default(), &Local::default(), false).unwrap();
    assert_eq!(egress(&f, &tcp(ISOLATED.0, STRANGER.0, 443, true)), NEXT);
    f.path_mut().apply(&state(), &local(), false).unwrap();
    assert_eq!(egress(&f, &tcp(ISOLATED.0, OUTSIDE.0, 443, true)), REDIRECT);
}

#[test]
fn another_process_finds_everything_as_it_was() {
    let mut f = world(Role::Node);
    let syn = tcp(ISOLATED.0, OUTSIDE.0, 443, true);
    f.restart();
    f.path_mut().heartbeat("gw").unwrap();
    // Enforcement went on meanwhile: facts and policy are there before anything is applied.
    assert_eq!(egress(&f, &syn), REDIRECT);
    drops(&f, &tcp(ISOLATED.0, STRANGER.0, 443, true), Reason::NotAllowed);
    let applied = f.path_mut().apply(&state(), &local(), false).unwrap();
    assert_eq!((applied.updated, applied.deleted), (0, 0));
    // Port sets in use are not overwritten by new ones.
    let mut edited = state();
    edited.grants.insert((GroupKey(2), CLASS), ports(&[range(Proto::Tcp, 1, 9, Via::Deny)]));
    f.path_mut().apply(&edited, &local(), false).unwrap();
    assert_eq!(egress(&f, &syn), REDIRECT);
    assert!(f.path().counters().unwrap().iter().any(|c| c.outcome == Outcome::Drop));
}

#[test]
fn long_port_sets_and_too_long_ones() {
    let mut f = world(Role::Node);
    let many = |n: u16| {
        ports(
            &(0..n)
                .map(|i| range(Proto::Tcp, 1_000 + 2 * i, 1_000 + 2 * i, Via::Allow(Carry::Forward)))
                .collect::<Vec<_>>(),
        )
    };
    let mut s = state();
    s.grants.insert((GroupKey(1), CLASS), many(64));
    f.path_mut().apply(&s, &local(), false).unwrap();
    for port in [1_000, 1_062, 1_126] {
        assert_eq!(egress(&f, &tcp(ISOLATED.0, OUTSIDE.0, port, true)), REDIRECT);
    }
    drops(&f, &tcp(ISOLATED.0, OUTSIDE.0, 1_001, true), Reason::NotAllowed);
    s.grants.insert((GroupKey(1), CLASS), many(65));
    assert!(f.path_mut().apply(&s, &local(), false).is_err());
    // Sets that come and go do not use the map up.
    for i in 1..200 {
        s.grants.insert((GroupKey(1), CLASS), ports(&[range(Proto::Tcp, i, i, Via::Deny)]));
        if f.path_mut().apply(&s, &local(), false).is_err() {
            std::thread::sleep(Duration::from_millis(1_010));
            f.path_mut().apply(&s, &local(), false).unwrap();
        }
    }
    drops(&f, &tcp(ISOLATED.0, OUTSIDE.0, 199, true), Reason::DeniedByPolicy);
}

#[test]
fn events_are_limited_and_counts_are_not() {
    let mut f = world(Role::Node);
    let mut events = f.path_mut().events().unwrap();
    let frame = tcp(ISOLATED.0, STRANGER.0, 443, true);
    let packet = TestPacket { frame: &frame, ifindex: 1, ingress_ifindex: 0, mark: 0, gso_size: 0, repeat: 5_000 };
    assert_eq!(f.path().test_run(Program::PodEgress, &packet).unwrap().code, SHOT);
    let mut seen = 0;
    while events.try_next().is_some() {
        seen += 1;
    }
    assert!((64..5_000).contains(&seen), "{seen}");
    assert_eq!(counted(&f, Hook::PodEgress, Outcome::Drop, Reason::NotAllowed), 5_000);
    assert_eq!(f.path().suppressed_events().unwrap() + seen, 5_000);
}

#[tokio::test]
async fn events_can_be_awaited() {
    let mut f = world(Role::Node);
    let mut events = f.path_mut().events().unwrap();
    let waiting = tokio::spawn(async move { events.next().await.unwrap() });
    tokio::time::sleep(Duration::from_millis(50)).await;
    drops(&f, &tcp(ISOLATED.1, STRANGER.1, 443, true), Reason::NotAllowed);
    let event = waiting.await.unwrap();
    assert_eq!(event.destination, format!("[{}]:443", STRANGER.1).parse().unwrap());
    let audit = event.into_event(None);
    assert_eq!(audit.reason, Reason::NotAllowed);
}

/// Where a question goes to, and a name that everybody knows.
const SERVERS: [&str; 2] = ["10.244.1.53", "fd00:10:244::53"];
const SERVICE: &str = "db.shop.svc.cluster.local";
const ABSENT: &str = "www.example.com.shop.svc.cluster.local";

fn question(name: &str) -> Vec<u8> {
    let mut out = vec![0x12, 0x34, 1, 0x10, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        out.push(u8::try_from(label.len()).unwrap());
        out.extend(label.as_bytes());
    }
    out.extend([0, 0, 28, 0, 1]);
    out
}

/// A world where names are known.
fn named() -> NodeState {
    let mut state = state();
    state.cluster.dns = SERVERS.iter().map(|s| SocketAddr::new(ip(s), 53)).collect();
    state.cluster.suffixes = vec!["cluster.local".into()];
    state.names.insert("db.shop.svc".into(), Named::Inside);
    state.names.insert("partner.shop.svc".into(), Named::Outside);
    state
}

/// That world, and whether its gateway says nothing.
fn names(silent: bool) -> Fixture {
    let mut f = Fixture::new(Role::Node);
    let mut local = local();
    if silent {
        local.silent.insert("gw".into());
    }
    f.path_mut().apply(&named(), &local, false).unwrap();
    f
}

#[test]
fn questions_for_services_pass_and_no_others() {
    for silent in [false, true] {
        let f = names(silent);
        for (i, server) in SERVERS.iter().enumerate() {
            let pick = |of: (&'static str, &'static str)| if i == 0 { of.0 } else { of.1 };
            let (pod, guarded) = (pick(ISOLATED), pick(GUARDED));
            let asks =
                |from: &str, name: &str| run(&f, Program::PodEgress, &udp_with(from, server, 53, &question(name)));
            let passed = asks(pod, SERVICE);
            assert_eq!((passed.code, passed.mark), (NEXT, BY_CLUSTER));
            let passed = asks(guarded, "DB.Shop.svc.Cluster.local");
            assert_eq!((passed.code, passed.mark), (NEXT, MARK));
            for name in ["www.example.com", "partner.shop.svc.cluster.local", "db.shop.svc"] {
                assert_eq!(asks(pod, name).code, REDIRECT, "{name}");
            }
            // To the gateway as it was asked, or back as its answer.
            let asked = udp_with(pod, server, 53, &question(ABSENT));
            let back = run(&f, Program::PodEgress, &asked);
            assert_eq!(back.code, REDIRECT);
            assert_eq!(back.frame != asked, silent);
            if silent {
                is_no_name(&back.frame, &asked);
            }
            // Several datagrams that are sent as one: only the first is seen.
            let frame = udp_with(pod, server, 53, &question(SERVICE));
            let all = TestPacket { frame: &frame, ifindex: 1, ingress_ifindex: 0, mark: 0, gso_size: 45, repeat: 1 };
            assert_eq!(f.path().test_run(Program::PodEgress, &all).unwrap().code, REDIRECT);
            // To other servers, over TCP: as ever.
            let elsewhere = udp_with(pod, pick(STRANGER), 53, &question(SERVICE));
            assert_eq!(egress(&f, &elsewhere), REDIRECT);
            assert_eq!(egress(&f, &tcp(pod, server, 53, true)), REDIRECT);
        }
        assert_eq!(counted(&f, Hook::PodEgress, Outcome::Pass, Reason::NoGateway), 2 * u64::from(silent));
    }
}

/// The question, turned around: NXDOMAIN, from whom it was asked, with a right checksum.
#[track_caller]
fn is_no_name(frame: &[u8], asked: &[u8]) {
    assert_eq!((&frame[..6], &frame[6..12]), (&asked[6..12], &asked[..6]));
    let (old, new) = (SlicedPacket::from_ethernet(asked).unwrap(), SlicedPacket::from_ethernet(frame).unwrap());
    let ends = |p: &SlicedPacket<'_>| match p.net.as_ref().unwrap() {
        NetSlice::Ipv4(h) => (IpAddr::from(h.header().source_addr()), IpAddr::from(h.header().destination_addr())),
        NetSlice::Ipv6(h) => (IpAddr::from(h.header().source_addr()), IpAddr::from(h.header().destination_addr())),
        _ => panic!("no IP"),
    };
    assert_eq!(ends(&new), (ends(&old).1, ends(&old).0));
    let (Some(TransportSlice::Udp(was)), Some(TransportSlice::Udp(is))) = (&old.transport, &new.transport) else {
        panic!("no UDP");
    };
    assert_eq!((is.source_port(), is.destination_port()), (was.destination_port(), was.source_port()));
    let mut answer = was.payload().to_vec();
    answer[2..4].copy_from_slice(&[0x85, 0x93]);
    assert_eq!(is.payload(), answer, "QR, AA, RD, RA, CD and NXDOMAIN, and nothing else is other");
    let header = is.to_header();
    let sum = match new.net.as_ref().unwrap() {
        NetSlice::Ipv4(h) => header.calc_checksum_ipv4(&h.header().to_header(), is.payload()),
        NetSlice::Ipv6(h) => header.calc_checksum_ipv6(&h.header().to_header(), is.payload()),
        _ => panic!("no IP"),
    };
    assert_eq!(sum.unwrap(), header.checksum);
}

#[test]
fn names_have_the_nodes_own_key_and_outlive_a_restart() {
    let key = |f: &Fixture| {
        let map: aya::maps::Array<_, [u64; 42]> =
            Map::from_map_data(MapData::from_pin(f.pin("NAMING")).unwrap()).unwrap().try_into().unwrap();
        let naming = map.get(&0, 0).unwrap();
        [naming[0], naming[1]]
    };
    let (mut a, mut b) = (names(false), names(false));
    assert_ne!(key(&a), key(&b));
    let before = key(&a);
    a.restart();
    assert_eq!(key(&a), before);
    let asked = udp_with(ISOLATED.0, SERVERS[0], 53, &question(SERVICE));
    assert_eq!(egress(&a, &asked), NEXT, "before anybody has spoken");
    // One comes and one goes: only these are written, and nothing is left to put right.
    let mut state = named();
    state.names.insert("new.shop.svc".into(), Named::Inside);
    state.names.remove("db.shop.svc");
    let applied = b.path_mut().apply(&state, &local(), false).unwrap();
    assert_eq!((applied.updated, applied.deleted), (2, 0));
    let new = udp_with(ISOLATED.0, SERVERS[0], 53, &question("new.shop.svc.cluster.local"));
    assert_eq!((egress(&b, &new), egress(&b, &asked)), (NEXT, REDIRECT));
    let applied = b.path_mut().apply(&state, &local(), true).unwrap();
    assert_eq!((applied.repaired, applied.updated, applied.deleted), (0, 0, 0));
    // The names go, and so does what they open.
    a.path_mut().apply(&self::state(), &local(), false).unwrap();
    assert_eq!(egress(&a, &asked), REDIRECT);
}

#[test]
fn answers_of_the_clusters_dns_open_nothing() {
    // A server that is in no prefix of the cluster, such as a cache on the node.
    let mut f = names(false);
    let mut state = state();
    state.cluster.prefixes.clear();
    state.cluster.dns = vec![SocketAddr::new(ip(SERVERS[0]), 53)];
    f.path_mut().apply(&state, &local(), false).unwrap();
    let answer = |from: &str| {
        let mut frame = udp_with(from, ISOLATED.0, 40_000, b"answer");
        frame[34..36].copy_from_slice(&53u16.to_be_bytes());
        run(&f, Program::PodIngress, &frame);
        egress(&f, &udp_with(ISOLATED.0, from, 53, &question("www.example.com")))
    };
    assert_eq!(answer(SERVERS[0]), REDIRECT);
    assert_eq!(answer(STRANGER.0), NEXT, "what was opened from outside");
}
