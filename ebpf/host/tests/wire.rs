//! Packets on real devices: two nodes, a gateway plugged in on one of them, the world.
//!
//! ```text
//!  pod1 ── node a ══ tgq/tgp, tgh/tga ══ gateway        pod2 ── node b
//!             │ underlay ─────── VXLAN ────────────────── underlay │
//!             └ wan ── world 203.0.113.1
//! ```
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use common::forge::{Frame, addressed};
use common::netns::{Ns, join};
use common::{Fixture, packets};
use tidegate_ebpf::{Attached, Hook, Interface, Local, Outcome, Place, Plugged, Program, Role};
use tidegate_policy::state::{Cluster, Endpoint, Gateway, Group, Node, NodeState, Scope, Touch};
use tidegate_policy::{GroupKey, Reason, ScopeKey};

const DNS: &str = "198.51.100.53:53";
const DNS6: &str = "[2001:db8:53::53]:53";
const EGRESS: &str = "203.0.113.10";

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn state() -> NodeState {
    let prefixes = vec!["10.244.0.0/16".parse().unwrap(), "fd00:10:244::/56".parse().unwrap()];
    let mut s = NodeState { cluster: Cluster { prefixes, ..Cluster::default() }, ..NodeState::default() };
    s.nodes.insert("a".into(), Node { addresses: vec![ip("192.0.2.1")] });
    s.nodes.insert("b".into(), Node { addresses: vec![ip("192.0.2.2")] });
    s.gateways.insert("gw".into(), Gateway { node: "a".into(), control: vec![] });
    s.scopes.insert(ScopeKey(1), Scope { owner: "gw".into(), epoch: 1, pair: 1, standbys: vec![] });
    s.groups.insert(GroupKey(1), Group { isolated: true, audit: false, admin: None, own: None });
    for (address, node) in
        [("10.244.1.5", "a"), ("fd00:10:244:1::5", "a"), ("10.244.2.5", "b"), ("fd00:10:244:2::5", "b")]
    {
        let pod = Endpoint {
            node: node.into(),
            namespace: "shop".into(),
            pod: format!("web-{node}"),
            touch: Touch::Isolated,
            member: Some((ScopeKey(1), GroupKey(1))),
        };
        s.endpoints.insert(ip(address), pod);
    }
    s
}

/// A node with one pod.
struct NodeSide {
    ns: Ns,
    pod: Ns,
    fixture: Fixture,
    local: Local,
}

impl NodeSide {
    fn new(name: &str, number: u8) -> Self {
        let (ns, pod) = (Ns::new(), Ns::new());
        ns.sysctl("net/ipv4/ip_forward", "1");
        ns.ip("link add name tgn type vxlan external dstport 8475");
        ns.ip("link set tgn up");
        join(&ns, "pod0", &pod, "eth0");
        let (v4, v6) = (format!("10.244.{number}.5"), format!("fd00:10:244:{number}::5"));
        let (ifindex, host_mac) = ns.device("pod0");
        let (_, mac) = pod.device("eth0");
        let host_mac = host_mac.map(|b| format!("{b:02x}")).join(":");
        pod.ip(&format!("address add {v4}/32 dev eth0"));
        pod.ip(&format!("address add {v6}/128 dev eth0 nodad"));
        for (router, any) in [("169.254.1.1", "default"), ("fe80::1", "default")] {
            pod.ip(&format!("neigh add {router} lladdr {host_mac} dev eth0"));
            pod.ip(&format!("route add {any} via {router} dev eth0 onlink"));
        }
        let pods = [ip(&v4), ip(&v6)];
        let local = Local {
            node: name.into(),
            tunnel_ifindex: ns.device("tgn").0,
            interfaces: pods.into_iter().map(|a| (a, Interface { ifindex, mac })).collect(),
            ..Local::default()
        };
        Self { ns, pod, fixture: Fixture::new(Role::Node), local }
    }

    fn attach(&mut self, programs: &[(Program, &str)]) {
        for (program, device) in programs {
            let attached = self.ns.enter(|| self.fixture.path_mut().attach(*program, device)).unwrap();
            assert_eq!(attached, Attached::New);
        }
    }

    fn apply(&mut self) {
        self.fixture.path_mut().apply(&state(), &self.local, false).unwrap();
        self.fixture.path_mut().heartbeat("gw").unwrap();
    }

    fn count(&self, hook: Hook, outcome: Outcome, reason: Reason) -> u64 {
        let all = self.fixture.path().counters().unwrap();
        all.iter().find(|c| (c.hook, c.outcome, c.reason) == (hook, outcome, reason)).map_or(0, |c| c.packets)
    }
}

struct World {
    a: NodeSide,
    b: NodeSide,
    gateway: Ns,
    gateway_path: Fixture,
    outside: Ns,
}

impl World {
    fn new() -> Self {
        let (mut a, mut b, gateway, outside) = (NodeSide::new("a", 1), NodeSide::new("b", 2), Ns::new(), Ns::new());
        join(&a.ns, "underlay", &b.ns, "underlay");
        a.ns.ip("address add 192.0.2.1/24 dev underlay");
        b.ns.ip("address add 192.0.2.2/24 dev underlay");
        join(&a.ns, "wan", &outside, "eth0");
        a.ns.ip("address add 203.0.113.2/24 dev wan");
        outside.ip("address add 203.0.113.1/24 dev eth0");

        join(&a.ns, "tgq", &gateway, "tgp");
        join(&a.ns, "tgh", &gateway, "tga");
        for name in ["tgp", "tga"] {
            gateway.sysctl(&format!("net/ipv4/conf/{name}/rp_filter"), "0");
            gateway.ip(&format!("link set {name} arp off"));
        }
        gateway.sysctl("net/ipv4/conf/all/rp_filter", "0");
        gateway.ip("link set tgp mtu 1450");
        gateway.ip("route add 10.244.0.0/16 dev tgp");
        gateway.ip("route add fd00:10:244::/56 dev tgp");
        gateway.ip("address add 198.51.100.53/32 dev lo");
        gateway.ip("address add 2001:db8:53::53/128 dev lo nodad");
        gateway.ip(&format!("address add {EGRESS}/32 dev tga"));
        gateway.ip(&format!("route add default dev tga src {EGRESS}"));

        let (wan, mac) = a.ns.device("wan");
        a.local.plugged = Some(Plugged { gateway: "gw".into(), tgq: a.ns.device("tgq").0, tgh: a.ns.device("tgh").0 });
        a.local.uplinks = vec![Interface { ifindex: wan, mac }];
        a.apply();
        b.apply();
        a.attach(&[
            (Program::PodEgress, "pod0"),
            (Program::PodIngress, "pod0"),
            (Program::TunnelIngress, "tgn"),
            (Program::GatewayReturn, "tgq"),
            (Program::UplinkEgress, "tgh"),
            (Program::UplinkIngress, "wan"),
            (Program::NodeGuard, "wan"),
        ]);
        b.attach(&[(Program::PodEgress, "pod0"), (Program::PodIngress, "pod0"), (Program::TunnelIngress, "tgn")]);
        let mut gateway_path = Fixture::new(Role::Gateway);
        let local = Local { node: "a".into(), ..Local::default() };
        gateway_path.path_mut().apply(&state(), &local, false).unwrap();
        gateway.enter(|| gateway_path.path_mut().attach(Program::GatewayIngress, "tgp")).unwrap();
        Self { a, b, gateway, gateway_path, outside }
    }
}

/// A server that sends back what it gets, until it hears "end".
fn echo(ns: &Ns, address: &str) -> std::thread::JoinHandle<()> {
    let socket = ns.enter(|| UdpSocket::bind(address).unwrap());
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((n, from)) = socket.recv_from(&mut buffer) {
            if &buffer[..n] == b"end" {
                return;
            }
            let _ = socket.send_to(&buffer[..n], from);
        }
    })
}

fn client(ns: &Ns, to: &str) -> UdpSocket {
    let to: SocketAddr = to.parse().unwrap();
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = ns.enter(|| UdpSocket::bind(any).unwrap());
    ns.enter(|| socket.connect(to).unwrap());
    socket.set_read_timeout(Some(Duration::from_millis(700))).unwrap();
    socket
}

/// Whether an echo comes back, tried again a little for the sake of a busy machine.
fn answers(ns: &Ns, to: &str) -> bool {
    let socket = client(ns, to);
    let mut buffer = [0; 64];
    (0..3).any(|_| socket.send(b"hello").is_ok() && matches!(socket.recv(&mut buffer), Ok(5)))
}

fn silent(ns: &Ns, to: &str) -> bool {
    let socket = client(ns, to);
    socket.send(b"hello").unwrap();
    let mut buffer = [0; 64];
    loop {
        match socket.recv(&mut buffer) {
            Err(e) if e.kind() == ErrorKind::WouldBlock => return true,
            // A signal that stops and continues the process is no answer.
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            other => {
                eprintln!("{to}: {other:?}");
                return false;
            }
        }
    }
}

#[test]
fn steered_packets_come_back_from_both_nodes() {
    let w = World::new();
    let servers = [echo(&w.gateway, DNS), echo(&w.gateway, DNS6)];
    for server in [DNS, DNS6] {
        assert!(answers(&w.a.pod, server), "same node, {server}");
        assert!(answers(&w.b.pod, server), "through the tunnel, {server}");
    }
    assert!(w.a.count(Hook::TunnelIngress, Outcome::Steer, Reason::Allowed) >= 2);
    assert!(w.b.count(Hook::TunnelIngress, Outcome::Steer, Reason::Allowed) >= 2);
    let carried = w.gateway_path.path().counters().unwrap();
    assert!(carried.iter().any(|c| c.hook == Hook::GatewayIngress && c.outcome == Outcome::Steer && c.packets >= 4));

    // What no rule allows goes nowhere.
    assert!(silent(&w.a.pod, "203.0.113.1:7000"));
    assert_eq!(w.a.count(Hook::PodEgress, Outcome::Drop, Reason::NotAllowed), 1);

    // A pod with another's address, and a node that lies about a pod.
    w.b.pod.ip("address add 10.244.1.5/32 dev eth0");
    let liar = w.b.pod.enter(|| UdpSocket::bind("10.244.1.5:0").unwrap());
    w.b.pod.enter(|| liar.send_to(b"hello", DNS)).unwrap();
    assert_eq!(w.b.count(Hook::PodEgress, Outcome::Drop, Reason::SpoofedSource), 1);
    let mut outer = vec![8, 0, 0, 0, 0, 0, 1, 0];
    outer.extend(packets::udp("10.244.1.5", "198.51.100.53", 53));
    let forger = w.b.ns.enter(|| UdpSocket::bind("192.0.2.2:0").unwrap());
    forger.send_to(&outer, "192.0.2.1:8475").unwrap();
    // The other network identifier: only gateways speak to pods.
    outer[6] = 2;
    outer.splice(8.., packets::udp("198.51.100.53", "10.244.1.5", 53));
    forger.send_to(&outer, "192.0.2.1:8475").unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(w.a.count(Hook::TunnelIngress, Outcome::Drop, Reason::SpoofedSource), 2);
    drop(w);
    for server in servers {
        // Its namespace lives on in its socket; the read timeout ends it if this does not.
        drop(server);
    }
}

/// As it comes over a veth, or from a neighbour's virtual machine, whose node has not looked at it.
#[test]
fn a_gateway_judges_nothing_that_is_yet_to_change() {
    let w = World::new();
    let server = w.gateway.enter(|| UdpSocket::bind(DNS).unwrap());
    server.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    let pod = "10.244.1.5";
    let (to, _) = DNS.split_once(':').unwrap();
    let frame = addressed(packets::udp(pod, to, 53), w.gateway.device("tgp").1, w.a.ns.device("tgq").1);
    let count = || {
        let all = w.gateway_path.path().counters().unwrap();
        let of = (Hook::GatewayIngress, Outcome::Drop, Reason::Checksum);
        all.iter().find(|c| (c.hook, c.outcome, c.reason) == of).map_or(0, |c| c.packets)
    };
    Frame::forged(frame.clone(), 36, 5_353u16.to_be_bytes(), 42, pod, to).send(&w.a.ns, "tgq");
    assert_eq!(count(), 1);
    Frame::own(frame, pod, to).send(&w.a.ns, "tgq");
    assert_eq!(server.recv(&mut [0; 64]).unwrap(), b"payload".len());
    assert_eq!(count(), 1);
}

#[test]
fn large_packets_learn_the_path() {
    let w = World::new();
    let _server = echo(&w.gateway, DNS);
    assert!(answers(&w.b.pod, DNS));
    let socket = client(&w.b.pod, DNS);
    let size = 1_450 - 28 + 1;
    // IP_MTU_DISCOVER = DO is the default of UDP sockets only for sending below the known path MTU.
    let on: libc::c_int = libc::IP_PMTUDISC_DO;
    // SAFETY: a valid descriptor and a pointer to an int of the given size.
    let set = unsafe {
        use std::os::fd::AsRawFd;
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    assert_eq!(set, 0);
    socket.send(&vec![7; size]).unwrap();
    let learnt = (0..20).any(|_| {
        std::thread::sleep(Duration::from_millis(20));
        matches!(socket.send(&vec![7; size]), Err(e) if e.raw_os_error() == Some(libc::EMSGSIZE))
    });
    assert!(learnt, "the sender was not told");
    assert!(w.b.count(Hook::PodEgress, Outcome::Drop, Reason::TooBig) >= 1);
    let mut buffer = [0; 2048];
    // The answer also waits as the socket's pending error.
    socket.take_error().unwrap();
    socket.send(&vec![7; size - 1]).unwrap();
    assert_eq!(socket.recv(&mut buffer).unwrap(), size - 1);
}

#[test]
fn egress_addresses_live_as_long_as_their_lease() {
    let mut w = World::new();
    let _server = echo(&w.outside, "203.0.113.1:7000");
    assert!(silent(&w.gateway, "203.0.113.1:7000"));
    w.a.fixture.path_mut().hold(&[ip(EGRESS)], Duration::from_secs(60)).unwrap();
    assert!(answers(&w.gateway, "203.0.113.1:7000"));
    assert!(w.a.count(Hook::UplinkIngress, Outcome::Steer, Reason::Allowed) >= 1);
    w.a.fixture.path_mut().release(&[ip(EGRESS)]).unwrap();
    assert!(silent(&w.gateway, "203.0.113.1:7000"));
}

#[test]
fn tunnel_packets_to_other_addresses_of_the_node_are_dropped() {
    let w = World::new();
    w.a.ns.ip("address add 192.0.2.201/24 dev underlay");
    // A frame of pod 2 for the gateway, as node b would send it.
    let mut packet = vec![8, 0, 0, 0, 0, 0, 1, 0];
    packet.extend(packets::udp("10.244.2.5", "198.51.100.53", 53));
    let sender = w.b.ns.enter(|| UdpSocket::bind("192.0.2.2:0").unwrap());
    let counts = || {
        let of = |outcome, reason| w.a.count(Hook::TunnelIngress, outcome, reason);
        (of(Outcome::Steer, Reason::Allowed), of(Outcome::Drop, Reason::TunnelPort))
    };
    for (to, wanted) in [("192.0.2.1:8475", (1, 0)), ("192.0.2.201:8475", (1, 1))] {
        sender.send_to(&packet, to).unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while counts() != wanted && std::time::Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(counts(), wanted, "{to}");
    }
}

/// A node's tunnel packet: to a gateway (1) or to a pod (2).
fn tunnelled(vni: u8, source: &str, destination: &str) -> Vec<u8> {
    let mut packet = vec![8, 0, 0, 0, 0, 0, vni, 0];
    packet.extend(packets::udp(source, destination, 53));
    packet
}

#[test]
fn who_is_in_no_list_neither_speaks_nor_hears_in_the_tunnel() {
    let mut w = World::new();
    let mut state = state();
    let mut untouched = state.endpoints[&ip("10.244.2.5")].clone();
    (untouched.touch, untouched.member) = (Touch::Untouched, None);
    state.endpoints.insert(ip("10.244.2.6"), untouched);
    w.a.fixture.path_mut().apply(&state, &w.a.local, false).unwrap();
    w.b.ns.ip("address add 192.0.2.202/24 dev underlay");
    let send = |from: &NodeSide, own: &str, to: &str, packet: &[u8]| {
        let socket = from.ns.enter(|| UdpSocket::bind((own, 0)).unwrap());
        socket.send_to(packet, (to, 8475)).unwrap();
    };
    let counts = |node: &NodeSide| {
        let of = |outcome, reason| node.count(Hook::TunnelIngress, outcome, reason);
        let dropped = [Reason::SpoofedSource, Reason::UnknownPod, Reason::Malformed].map(|r| of(Outcome::Drop, r));
        (of(Outcome::Steer, Reason::Allowed), dropped)
    };
    let soon = |node: &NodeSide, wanted: (u64, [u64; 3]), what: &str| {
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while counts(node) != wanted && std::time::Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(counts(node), wanted, "{what}");
    };
    // The gateway's node speaks to pods of the node, not to others and not up its stack.
    for (n, to) in [(1, "10.244.2.77"), (2, "10.244.1.5"), (3, "192.0.2.2")] {
        send(&w.a, "192.0.2.1", "192.0.2.2", &tunnelled(2, "198.51.100.53", to));
        soon(&w.b, (0, [0, n, 0]), to);
    }
    send(&w.a, "192.0.2.1", "192.0.2.2", &tunnelled(2, "198.51.100.53", "10.244.2.5"));
    soon(&w.b, (1, [0, 3, 0]), "a pod of the node");
    // Of a pod that nobody listed, of one that nobody selects, of a machine that is no node.
    let listed = tunnelled(1, "10.244.2.5", "198.51.100.53");
    send(&w.b, "192.0.2.2", "192.0.2.1", &tunnelled(1, "10.244.2.77", "198.51.100.53"));
    soon(&w.a, (0, [1, 0, 0]), "a stranger's source");
    send(&w.b, "192.0.2.2", "192.0.2.1", &tunnelled(1, "10.244.2.6", "198.51.100.53"));
    soon(&w.a, (0, [2, 0, 0]), "an untouched pod's source");
    send(&w.b, "192.0.2.202", "192.0.2.1", &listed);
    soon(&w.a, (0, [3, 0, 0]), "a machine that is no node");
    send(&w.b, "192.0.2.2", "192.0.2.1", &tunnelled(3, "10.244.2.5", "198.51.100.53"));
    soon(&w.a, (0, [3, 0, 1]), "another network's number");
    send(&w.b, "192.0.2.2", "192.0.2.1", &listed);
    soon(&w.a, (1, [3, 0, 1]), "a node speaks for its pod");
}

#[test]
fn the_guard_stops_detours() {
    let mut w = World::new();
    // As if the pod's packets reached the stack without the verdict.
    w.a.ns.enter(|| w.a.fixture.path_mut().detach(Program::PodEgress, "pod0")).unwrap();
    assert!(silent(&w.a.pod, "203.0.113.1:7000"));
    assert_eq!(w.a.count(Hook::NodeGuard, Outcome::Drop, Reason::NotAllowed), 1);
}

#[test]
fn links_outlive_the_process_and_are_adopted() {
    let mut w = World::new();
    let _server = echo(&w.gateway, DNS);
    assert!(answers(&w.a.pod, DNS));
    w.a.fixture.restart();
    assert!(answers(&w.a.pod, DNS), "between two processes");
    for (program, device) in [(Program::PodEgress, "pod0"), (Program::GatewayReturn, "tgq")] {
        let attached = w.a.ns.enter(|| w.a.fixture.path_mut().attach(program, device)).unwrap();
        assert_eq!(attached, Attached::Adopted);
        let again = w.a.ns.enter(|| w.a.fixture.path_mut().attach(program, device)).unwrap();
        assert_eq!(again, Attached::Adopted);
        assert_eq!(w.a.ns.enter(|| w.a.fixture.path().place(program, device)).unwrap(), Place::First);
    }
    assert!(answers(&w.a.pod, DNS));
}

#[test]
fn the_first_place_is_taken_back() {
    let mut w = World::new();
    let mut other = Fixture::new(Role::Node);
    let _server = echo(&w.gateway, DNS);
    for _ in 0..3 {
        w.a.ns.enter(|| other.path_mut().attach(Program::PodEgress, "pod0")).unwrap();
        let place = w.a.ns.enter(|| w.a.fixture.path().place(Program::PodEgress, "pod0")).unwrap();
        assert!(matches!(place, Place::Behind(names) if names.len() == 1));
        w.a.ns.enter(|| w.a.fixture.path_mut().reclaim(Program::PodEgress, "pod0")).unwrap();
        let place = w.a.ns.enter(|| w.a.fixture.path().place(Program::PodEgress, "pod0")).unwrap();
        assert_eq!(place, Place::First);
        w.a.ns.enter(|| other.path_mut().detach(Program::PodEgress, "pod0")).unwrap();
    }
    assert!(answers(&w.a.pod, DNS));
}

/// Runs something without CAP_SYS_ADMIN, as a gateway's container does.
fn without_sys_admin<R>(work: impl FnOnce() -> R) -> R {
    /// `_LINUX_CAPABILITY_VERSION_3`, of the calling thread.
    const HEADER: [u32; 2] = [0x2008_0522, 0];
    const CAP_SYS_ADMIN: u32 = 21;
    let call = |number: libc::c_long, sets: &mut [u32; 6]| {
        let header = HEADER;
        // SAFETY: both are as long as the version says: two times effective, permitted and inheritable.
        let done = unsafe { libc::syscall(number, header.as_ptr(), sets.as_mut_ptr()) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    };
    let mut before = [0; 6];
    call(libc::SYS_capget, &mut before);
    let mut less = before;
    less[0] &= !(1 << CAP_SYS_ADMIN);
    call(libc::SYS_capset, &mut less);
    let result = work();
    call(libc::SYS_capset, &mut before);
    result
}

#[test]
fn the_place_is_known_without_the_right_to_see_other_programs() {
    let w = World::new();
    let mut other = Fixture::new(Role::Node);
    let place = || w.a.ns.enter(|| without_sys_admin(|| w.a.fixture.path().place(Program::PodEgress, "pod0")));
    assert_eq!(place().unwrap(), Place::First);
    w.a.ns.enter(|| other.path_mut().attach(Program::PodEgress, "pod0")).unwrap();
    // By its number: what it is called is not for everybody.
    let seen = place().unwrap();
    assert!(matches!(&seen, Place::Behind(all) if all.len() == 1 && all[0].starts_with("program ")), "{seen:?}");
}

#[test]
fn a_new_device_with_an_old_index() {
    let ns = Ns::new();
    let mut f = Fixture::new(Role::Node);
    ns.ip("link add name d0 index 42 type veth");
    assert_eq!(ns.enter(|| f.path_mut().attach(Program::PodEgress, "d0")).unwrap(), Attached::New);
    ns.ip("link del d0");
    ns.ip("link add name d1 index 42 type veth");
    assert_eq!(ns.enter(|| f.path().place(Program::PodEgress, "d1")).unwrap(), Place::Missing);
    assert_eq!(ns.enter(|| f.path_mut().attach(Program::PodEgress, "d1")).unwrap(), Attached::New);
    assert_eq!(ns.enter(|| f.path().place(Program::PodEgress, "d1")).unwrap(), Place::First);
    ns.ip("link del d1");
    assert_eq!(ns.enter(|| f.path_mut().detach_gone()).unwrap(), 1);
    assert!(ns.enter(|| f.path_mut().attach(Program::PodEgress, "d1")).is_err());
}

#[test]
fn a_program_that_was_attached_beside_its_owner_is_adopted() {
    let ns = Ns::new();
    let mut f = Fixture::new(Role::Node);
    ns.ip("link add name d0 index 42 type veth");
    let early = f.path().attacher(Program::PodEgress).unwrap();
    let attach = || std::thread::scope(|all| all.spawn(|| ns.enter(|| early.attach(42))).join().unwrap());
    attach().unwrap();
    assert_eq!(ns.enter(|| f.path().place(Program::PodEgress, "d0")).unwrap(), Place::First);
    attach().unwrap();
    assert_eq!(ns.enter(|| f.path_mut().attach(Program::PodEgress, "d0")).unwrap(), Attached::Adopted);
    attach().unwrap();
    // Before what others have there.
    let mut other = Fixture::new(Role::Node);
    ns.enter(|| f.path_mut().detach(Program::PodEgress, "d0")).unwrap();
    ns.enter(|| other.path_mut().attach(Program::PodEgress, "d0")).unwrap();
    attach().unwrap();
    assert_eq!(ns.enter(|| f.path().place(Program::PodEgress, "d0")).unwrap(), Place::First);
    // The pin of a device that is gone is the owner's matter.
    ns.ip("link del d0");
    assert!(attach().is_err());
    ns.ip("link add name d1 index 42 type veth");
    assert!(attach().is_err());
    assert_eq!(ns.enter(|| f.path_mut().attach(Program::PodEgress, "d1")).unwrap(), Attached::New);
    attach().unwrap();
}

#[test]
fn another_layouts_programs_go_from_a_device_where_the_new_ones_are() {
    let ns = Ns::new();
    let mut f = Fixture::new(Role::Node);
    ns.ip("link add one type veth peer name two");
    let devices = ["one", "two"].map(|name| {
        ns.enter(|| f.path_mut().attach(Program::PodEgress, name)).unwrap();
        (name, ns.device(name).0)
    });
    let old = f.pin("CONFIG").ancestors().nth(2).unwrap().join("links");
    f.options.capacities.flows = 512;
    f.restart();
    assert!(!f.path().is_filled());
    // Also if not all of it fits.
    let mut large = state();
    large.cluster.prefixes.clear();
    let many = (0..70_000u32).map(|n| ipnet::IpNet::from(IpAddr::from((n << 8).to_be_bytes())));
    large.cluster.prefixes.extend(many);
    assert!(f.path_mut().apply(&large, &Local { node: "a".into(), ..Local::default() }, false).is_err());
    assert!(f.path().is_filled());
    let (name, index) = devices[0];
    assert_eq!(ns.enter(|| f.path_mut().attach(Program::PodEgress, name)).unwrap(), Attached::New);
    assert_eq!(f.path_mut().retire_from(index).unwrap(), 1);
    assert_eq!(f.path_mut().retire_from(index).unwrap(), 0);
    let left: Vec<_> = std::fs::read_dir(&old).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, [format!("pod_egress-{}", devices[1].1).as_str()]);
    assert!(f.path().is_upgrade(), "the other device still has its own");
    f.path_mut().retire_others().unwrap();
    assert!(!old.exists());
}
