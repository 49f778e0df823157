//! Devices, routes, guard, handover and announcements against the real kernel, in namespaces of their own.
// Helpers are tests too.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{BufRead, BufReader, IoSlice, Write};
use std::net::{IpAddr, UdpSocket};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use support::Ns;
use tidegate_agent::announce::{Announcer, frames};
use tidegate_agent::config::{Interfaces, Mark};
use tidegate_agent::guard::{self, Desired, Done, Settings, Table};
use tidegate_agent::links::{Kind, Netlink};
use tidegate_agent::plug::{self, Plugged, Request};
use tokio::sync::mpsc;

fn ip(s: &str) -> IpAddr {
    s.parse().unwrap()
}

#[test]
fn the_tunnel_device_is_made_once_and_repaired() {
    let node = Ns::new();
    let first = node.block_on(|| async { Netlink::open().unwrap().ensure_tunnel(8475).await.unwrap() });
    assert_eq!(first.kind, Kind::Vxlan { port: 8475, external: true });
    assert!(first.up && first.mac != [0; 6]);
    let second = node.block_on(|| async { Netlink::open().unwrap().ensure_tunnel(8475).await.unwrap() });
    assert_eq!(first, second);
    // It listens on both families.
    for file in ["udp", "udp6"] {
        let sockets = node.sh(&format!("cat /proc/thread-self/net/{file}"));
        assert!(sockets.contains(":211B"), "{file}: {sockets}");
    }
    // It speaks to nobody by itself.
    assert!(!node.ip("-6 addr show dev tgn").contains("inet6"));
    node.ip("link set tgn down mtu 1400");
    let repaired = node.block_on(|| async { Netlink::open().unwrap().ensure_tunnel(8475).await.unwrap() });
    assert_eq!(first, repaired);
    // Another port is another device.
    let other = node.block_on(|| async { Netlink::open().unwrap().ensure_tunnel(8476).await.unwrap() });
    assert_eq!(other.kind, Kind::Vxlan { port: 8476, external: true });
    // A device of another kind in its place goes.
    node.ip("link del tgn");
    node.ip("link add tgn type bridge");
    let again = node.block_on(|| async { Netlink::open().unwrap().ensure_tunnel(8475).await.unwrap() });
    assert_eq!(again.kind, first.kind);
}

#[test]
fn one_tunnel_device_carries_packets_over_ipv4_and_over_ipv6() {
    let (a, b) = (Ns::new(), Ns::new());
    a.cable("up0", &b, "up0");
    for (ns, own, peer) in [(&a, 1, 2), (&b, 2, 1)] {
        ns.ip(&format!("addr add 192.0.2.{own}/24 dev up0"));
        ns.ip(&format!("addr add 2001:db8::{own}/64 dev up0 nodad"));
        ns.block_on(|| async { Netlink::open().unwrap().ensure_tunnel(8475).await.unwrap() });
        ns.ip(&format!("addr add 10.9.{own}.1/32 dev lo"));
        ns.ip(&format!("addr add 10.8.{own}.1/32 dev lo"));
        ns.ip(&format!("route add 10.9.{peer}.1 encap ip id 1 dst 192.0.2.{peer} csum dev tgn src 10.9.{own}.1"));
        ns.ip(&format!("route add 10.8.{peer}.1 encap ip6 id 1 dst 2001:db8::{peer} csum dev tgn src 10.8.{own}.1"));
    }
    // Both tunnel devices answer for their addresses: tell each the other's hardware address.
    for (ns, other, nets) in [(&a, &b, ["10.9.2.1", "10.8.2.1"]), (&b, &a, ["10.9.1.1", "10.8.1.1"])] {
        let mac = other.ip("-o link show tgn");
        let mac = mac.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
        for net in nets {
            ns.ip(&format!("neigh replace {net} lladdr {mac} dev tgn nud permanent"));
        }
    }
    for net in ["10.9", "10.8"] {
        let server = b.run(|| UdpSocket::bind(format!("{net}.2.1:5000")).unwrap());
        server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let client = a.run(|| UdpSocket::bind(format!("{net}.1.1:0")).unwrap());
        client.send_to(b"hello", format!("{net}.2.1:5000")).unwrap();
        let mut buffer = [0; 16];
        let (n, _) = server.recv_from(&mut buffer).unwrap_or_else(|e| panic!("{net}: {e}"));
        assert_eq!(&buffer[..n], b"hello");
    }
}

#[test]
fn a_gateway_is_plugged_in_once_and_moved_when_its_namespace_changes() {
    let (node, gateway, successor) = (Ns::new(), Ns::new(), Ns::new());
    let plug = |into: &Ns| {
        let fd = into.fd();
        node.block_on(|| async { Netlink::open().unwrap().plug(fd, 1430, 1500).await.unwrap() })
    };
    let inside =
        |ns: &Ns, name: &'static str| ns.block_on(|| async { Netlink::open().unwrap().link(name).await.unwrap() });
    let first = plug(&gateway);
    let tgp = inside(&gateway, "tgp").unwrap();
    let tga = inside(&gateway, "tga").unwrap();
    assert_eq!((tgp.mtu, tga.mtu), (1430, 1500));
    for end in [&first.pod_side, &first.egress_side, &tgp, &tga] {
        assert!(end.up && end.silent && end.kind == Kind::Veth, "{end:?}");
    }
    let mut macs = [first.pod_side.mac, first.egress_side.mac, tgp.mac, tga.mac];
    macs.sort();
    assert!(macs.windows(2).all(|w| w[0] != w[1]));
    for (key, wanted) in [("ipv4/conf/tgh/forwarding", "1"), ("ipv6/conf/tgh/forwarding", "1")] {
        assert_eq!(node.sh(&format!("cat /proc/sys/net/{key}")).trim(), wanted);
    }

    // What a pod with a read-only /proc/sys cannot set itself.
    gateway.ip("link add up0 type veth peer name up1");
    gateway.sh("echo 1 > /proc/sys/net/ipv4/conf/up0/rp_filter; echo 0 > /proc/sys/net/ipv4/ip_forward");
    let settle = || {
        let fd = gateway.fd();
        let settings = tidegate_agent::sysctl::of_gateway("up0", 7200);
        node.block_on(|| async { Netlink::open().unwrap().settle(fd, settings).await.unwrap() })
    };
    assert!(settle() >= 2);
    assert_eq!(settle(), 0, "it is as it should be");
    for (key, wanted) in [("ip_forward", "1"), ("conf/up0/rp_filter", "0"), ("conf/tgp/rp_filter", "0")] {
        assert_eq!(gateway.sh(&format!("cat /proc/sys/net/ipv4/{key}")).trim(), wanted, "{key}");
    }

    // Again, also after an agent's restart: nothing moves.
    assert_eq!(plug(&gateway), first);
    assert_eq!(inside(&gateway, "tgp").unwrap(), tgp);
    // What somebody changed is put right, in place.
    node.ip("link set tgq down");
    gateway.ip("link set tgp mtu 1300");
    assert_eq!(plug(&gateway), first);
    assert_eq!(inside(&gateway, "tgp").unwrap(), tgp);
    // A gateway that was replaced by a new pod.
    let moved = plug(&successor);
    assert_ne!(moved.pod_side.index, first.pod_side.index);
    assert!(inside(&gateway, "tgp").is_none());
    assert!(inside(&successor, "tgp").is_some());
    // The other end of a veth is seen across namespaces.
    let seen = node.block_on(|| async { Netlink::open().unwrap().peer_mac(&moved.pod_side).await.unwrap() });
    assert_eq!(seen, inside(&successor, "tgp").unwrap().mac);
}

#[test]
fn the_kernel_says_nothing_by_itself_on_the_devices_of_a_gateway() {
    let (node, gateway) = (Ns::new(), Ns::new());
    let inside = gateway.fd();
    node.block_on(|| async {
        let netlink = Netlink::open().unwrap();
        netlink.plug(inside, 1430, 1500).await.unwrap();
        netlink.settle(inside, tidegate_agent::sysctl::of_gateway("lo", 7200)).await.unwrap();
    });
    gateway.ip("addr add 203.0.113.10/32 dev tga");
    gateway.ip("addr add 2001:db8::10/128 dev tga");
    // Reports of the groups that a forwarding device joins come within a second, and once more.
    std::thread::sleep(Duration::from_secs(3));
    for (ns, device) in [(&gateway, "tgp"), (&gateway, "tga"), (&node, "tgq"), (&node, "tgh")] {
        let shown = ns.ip(&format!("-j -s link show dev {device}"));
        let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
        assert_eq!(shown[0]["stats64"]["tx"]["packets"], 0, "{device}");
    }
}

#[test]
fn a_gateway_in_the_nodes_own_namespace_is_refused() {
    let node = Ns::new();
    let fd = node.fd();
    let e = node.block_on(|| async { Netlink::open().unwrap().plug(fd, 1430, 1500).await.unwrap_err() });
    assert!(e.to_string().contains("own network namespace"), "{e}");
}

#[test]
fn a_pods_interface_is_found_by_its_route() {
    let (node, pod) = (Ns::new(), Ns::new());
    node.cable("veth1", &pod, "eth0");
    node.ip("link add eth0 type bridge");
    node.ip("link set eth0 up");
    node.ip("addr add 192.0.2.1/24 dev eth0");
    node.ip("route add default via 192.0.2.254 dev eth0");
    node.ip("route add 10.0.0.5/32 dev veth1");
    node.ip("route add fd00::5/128 dev veth1");
    node.ip("route add 10.0.0.6/32 via 192.0.2.9");
    node.ip("addr add 192.0.2.7 peer 198.51.100.9/32 dev eth0");
    node.ip("addr add fd00:7::1 peer fd00:9::1/128 dev eth0 nodad");
    let t = node.block_on(|| async { Netlink::open().unwrap().topology(Interfaces::HostRoute).await.unwrap() });
    for address in ["10.0.0.5", "fd00::5"] {
        assert_eq!(t.interface(ip(address), Interfaces::HostRoute).unwrap().name, "veth1");
    }
    assert!(t.interface(ip("10.0.0.6"), Interfaces::HostRoute).is_none());
    assert!(t.interface(ip("192.0.2.1"), Interfaces::HostRoute).is_none());
    assert_eq!(t.uplinks(None).iter().map(|l| l.name.as_str()).collect::<Vec<_>>(), ["eth0"]);
    // The other end of a link is not here.
    let own = t.own(&t.uplinks(None));
    assert_eq!(own[..4], ["192.0.2.1", "192.0.2.7", "fd00:7::1", "127.0.0.1"].map(ip), "{own:?}");
    assert!(own.iter().all(|a| *a != ip("198.51.100.9") && *a != ip("fd00:9::1")), "{own:?}");
    let veth = t.by_name("veth1").unwrap().clone();
    let mac = node.block_on(|| async { Netlink::open().unwrap().peer_mac(&veth).await.unwrap() });
    let own = pod.block_on(|| async { Netlink::open().unwrap().link("eth0").await.unwrap().unwrap().mac });
    assert_eq!(mac, own);
}

#[test]
fn a_pods_interface_is_found_through_its_bridge() {
    let (node, pod, other) = (Ns::new(), Ns::new(), Ns::new());
    node.ip("link add br0 type bridge");
    node.ip("link set br0 up");
    node.ip("addr add 10.1.0.1/24 dev br0");
    for (name, ns, address) in [("veth1", &pod, "10.1.0.5/24"), ("veth2", &other, "10.1.0.6/24")] {
        node.cable(name, ns, "eth0");
        node.ip(&format!("link set {name} master br0"));
        ns.ip(&format!("addr add {address} dev eth0"));
    }
    let read = || node.block_on(|| async { Netlink::open().unwrap().topology(Interfaces::Bridge).await.unwrap() });
    // Nobody has spoken yet: the kernel is asked to look.
    let t = read();
    assert!(t.interface(ip("10.1.0.5"), Interfaces::Bridge).is_none());
    let bridge = t.bridge(ip("10.1.0.5")).unwrap();
    // What enters by these was sent on this node; a bridge with the node's address leads elsewhere.
    let names = |indexes: &std::collections::BTreeSet<u32>| -> Vec<String> {
        indexes.iter().map(|i| t.links[i].name.clone()).collect()
    };
    let mut inside = names(&t.inside(&t.underlay(None, &[])));
    inside.sort();
    assert_eq!(inside, ["br0", "veth1", "veth2"]);
    let underlay = t.underlay(None, &[ip("10.1.0.1")]);
    assert_eq!(underlay.iter().map(|l| l.name.as_str()).collect::<Vec<_>>(), ["br0"]);
    let mut inside = names(&t.inside(&underlay));
    inside.sort();
    assert_eq!(inside, ["veth1", "veth2"]);
    node.block_on(|| async {
        let nl = Netlink::open().unwrap();
        nl.resolve(bridge, ip("10.1.0.5")).await.unwrap();
        nl.resolve(bridge, ip("10.1.0.6")).await.unwrap();
    });
    let deadline = std::time::Instant::now() + Duration::from_secs(5);
    loop {
        let t = read();
        let found = ["10.1.0.5", "10.1.0.6"].map(|a| t.interface(ip(a), Interfaces::Bridge).map(|l| l.name.clone()));
        if found == [Some("veth1".into()), Some("veth2".into())] {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "{found:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A node that forwards for two pods to a server.
struct World {
    node: Ns,
    pods: [Ns; 2],
    server: Ns,
}

const PODS: [&str; 2] = ["10.0.0.2", "10.0.1.2"];

fn world() -> World {
    let w = World { node: Ns::new(), pods: [Ns::new(), Ns::new()], server: Ns::new() };
    w.node.sh("echo 1 > /proc/sys/net/ipv4/ip_forward");
    for (i, pod) in w.pods.iter().enumerate() {
        w.node.cable(&format!("pod{i}"), pod, "eth0");
        w.node.ip(&format!("addr add 10.0.{i}.1/24 dev pod{i}"));
        pod.ip(&format!("addr add {}/24 dev eth0", PODS[i]));
        pod.ip(&format!("route add default via 10.0.{i}.1"));
    }
    w.node.cable("up0", &w.server, "eth0");
    w.node.ip("addr add 192.0.2.1/24 dev up0");
    w.server.ip("addr add 192.0.2.9/24 dev eth0");
    w.server.ip("route add default via 192.0.2.1");
    w
}

impl World {
    /// Whether a datagram of pod `i` reaches `to`, where somebody has bound it.
    fn reaches(&self, i: usize, at: &Ns, to: &str) -> bool {
        let socket = at.run(|| UdpSocket::bind(to).unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let pod = self.pods[i].run(|| UdpSocket::bind((PODS[i], 0)).unwrap());
        // Twice: the first may wait for a neighbour.
        for _ in 0..2 {
            pod.send_to(b"x", to).unwrap();
        }
        socket.recv_from(&mut [0; 8]).is_ok()
    }
}

fn settings() -> Settings {
    Settings { tunnel_port: 8475, mark: Mark::default(), overlay_ports: [4789, 51_820].into() }
}

fn desired(isolated: &[&str]) -> Desired {
    Desired {
        isolated: isolated.iter().map(|a| ip(a)).collect(),
        pods: PODS.iter().map(|a| ip(a)).collect(),
        places: PODS.iter().enumerate().map(|(i, a)| (ip(a), format!("pod{i}"))).collect(),
        nodes: [ip("192.0.2.1"), ip("192.0.2.9")].into(),
        cluster: vec!["10.0.0.0/8".parse().unwrap(), "10.0.0.0/24".parse().unwrap()],
        node_ports: Some((30_000, 32_767)),
        uplinks: vec!["up0".into()],
        underlay: vec!["up0".into()],
        foreign: vec!["up0".into()],
        drop_unknown: false,
    }
}

#[test]
fn the_guard_drops_what_an_isolated_pod_sends_unmarked_and_nothing_else() {
    let w = world();
    let mut table = Table::new(settings());
    assert_eq!(w.node.run(|| table.apply(&desired(&["10.0.0.2"])).unwrap()), Done::Replaced);
    assert!(!w.reaches(0, &w.server, "192.0.2.9:5001"));
    assert!(w.reaches(1, &w.server, "192.0.2.9:5002"));
    // Marked by the verdict, here by another table.
    w.node.sh("nft 'add table ip marker; add chain ip marker pre { type filter hook prerouting priority mangle; };
         add rule ip marker pre udp dport 5003 meta mark set meta mark | 0x00200000'");
    assert!(w.reaches(0, &w.server, "192.0.2.9:5003"));
    let counters = w.node.run(|| guard::read().unwrap().unwrap().counters);
    assert!(counters.iter().any(|(n, packets)| n == "isolated" && *packets > 0), "{counters:?}");
    // A change of members changes elements only, at once.
    assert_eq!(w.node.run(|| table.apply(&desired(&["10.0.1.2"])).unwrap()), Done::Elements);
    assert!(w.reaches(0, &w.server, "192.0.2.9:5004"));
    assert!(!w.reaches(1, &w.server, "192.0.2.9:5005"));
    // Gone: nobody is dropped, and the other table stands.
    w.node.run(|| guard::remove().unwrap());
    assert!(w.reaches(1, &w.server, "192.0.2.9:5006"));
    assert!(w.node.sh("nft list tables").contains("marker"));
    w.node.run(|| guard::remove().unwrap());
}

/// Marks what comes from pod 0, as the verdict does.
fn mark(w: &World, value: u32) {
    w.node.sh(&format!(
        "nft 'add table ip marker; delete table ip marker; add table ip marker;
         add chain ip marker pre {{ type filter hook prerouting priority mangle; }};
         add rule ip marker pre iifname pod0 meta mark set meta mark | {value:#x}'"
    ));
}

/// Makes packets to one address go to another, as services do.
fn translate(w: &World, from: &str, to: &str) {
    w.node.sh(&format!(
        "nft 'add table ip services; add chain ip services pre {{ type nat hook prerouting priority dstnat; }};
         add rule ip services pre ip daddr {from} meta l4proto udp dnat to {to}'"
    ));
}

#[test]
fn the_guard_holds_what_passed_to_the_cluster_to_it_after_translation() {
    let w = world();
    for name in ["10.96.0.1", "10.96.0.2", "10.96.0.3", "10.96.0.4"] {
        w.node.ip(&format!("route add {name}/32 via 192.0.2.9"));
    }
    for address in ["198.51.100.1", "10.7.7.7"] {
        w.server.ip(&format!("addr add {address}/32 dev lo"));
        w.node.ip(&format!("route add {address} via 192.0.2.9"));
    }
    translate(&w, "10.96.0.1", "198.51.100.1:5001");
    translate(&w, "10.96.0.2", "10.7.7.7:5001");
    translate(&w, "10.96.0.3", "192.0.2.9:5001");
    translate(&w, "10.96.0.4", "192.0.2.9:30080");
    w.node.run(|| Table::new(settings()).apply(&desired(&["10.0.0.2"])).unwrap());
    let arrives = |service: &str, at: &str| {
        let socket = w.server.run(|| UdpSocket::bind(at).unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let pod = w.pods[0].run(|| UdpSocket::bind((PODS[0], 0)).unwrap());
        for _ in 0..2 {
            pod.send_to(b"x", (service, 5000)).unwrap();
        }
        socket.recv_from(&mut [0; 8]).is_ok()
    };
    // A policy's pass is one whatever is translated.
    mark(&w, Mark::default().value);
    assert!(arrives("10.96.0.1", "198.51.100.1:5001"));
    mark(&w, Mark::default().cluster());
    assert!(!arrives("10.96.0.1", "198.51.100.1:5001"), "outside");
    assert!(!arrives("10.96.0.4", "192.0.2.9:30080"), "a node port");
    let counters = w.node.run(|| guard::read().unwrap().unwrap().counters);
    assert!(counters.iter().any(|(n, packets)| n == "translated" && *packets >= 2), "{counters:?}");
    assert!(arrives("10.96.0.2", "10.7.7.7:5001"), "another pod");
    assert!(arrives("10.96.0.3", "192.0.2.9:5001"), "a node");
}

#[test]
fn the_guard_keeps_translated_packets_of_touched_pods_from_overlays() {
    let w = world();
    for (name, to) in [
        ("10.96.0.1", "192.0.2.9:4789"),
        ("10.96.0.2", "192.0.2.9:51820"),
        ("10.96.0.3", "10.7.7.7:4789"),
        ("10.96.0.4", "192.0.2.1:4789"),
    ] {
        w.node.ip(&format!("route add {name}/32 via 192.0.2.9"));
        translate(&w, name, to);
    }
    w.server.ip("addr add 10.7.7.7/32 dev lo");
    w.node.ip("route add 10.7.7.7 via 192.0.2.9");
    w.node.run(|| Table::new(settings()).apply(&desired(&[])).unwrap());
    let arrives = |i: usize, service: &str, ns: &Ns, at: &str| {
        let socket = ns.run(|| UdpSocket::bind(at).unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let pod = w.pods[i].run(|| UdpSocket::bind((PODS[i], 0)).unwrap());
        for _ in 0..2 {
            pod.send_to(b"x", (service, 5000)).unwrap();
        }
        socket.recv_from(&mut [0; 8]).is_ok()
    };
    for value in [Mark::default().value, Mark::default().cluster()] {
        mark(&w, value);
        assert!(!arrives(0, "10.96.0.1", &w.server, "192.0.2.9:4789"));
        assert!(!arrives(0, "10.96.0.2", &w.server, "192.0.2.9:51820"));
        assert!(!arrives(0, "10.96.0.3", &w.server, "10.7.7.7:4789"));
        assert!(!arrives(0, "10.96.0.4", &w.node, "192.0.2.1:4789"));
    }
    // Pods that no policy selects are not marked, and not kept from anything.
    assert!(arrives(1, "10.96.0.1", &w.server, "192.0.2.9:4789"));
    assert!(arrives(1, "10.96.0.4", &w.node, "192.0.2.1:4789"));
}

#[test]
fn the_guard_keeps_pods_from_the_tunnel_port_of_nodes_and_leaves_it_to_others() {
    let w = world();
    assert!(w.reaches(1, &w.node, "192.0.2.1:8475"));
    w.node.run(|| Table::new(settings()).apply(&desired(&[])).unwrap());
    assert!(!w.reaches(1, &w.node, "192.0.2.1:8475"), "the pod's own node");
    assert!(!w.reaches(1, &w.server, "192.0.2.9:8475"), "another node");
    assert!(w.reaches(1, &w.node, "192.0.2.1:8476"));
    w.server.ip("addr add 198.51.100.1/32 dev lo");
    w.node.ip("route add 198.51.100.1 via 192.0.2.9");
    assert!(w.reaches(1, &w.server, "198.51.100.1:8475"), "no node: not ours");
    // Whoever it is: what did not enter from other nodes is not from them.
    w.pods[0].ip("addr add 192.0.2.9/32 dev lo");
    w.node.sh("for f in all pod0 pod1; do echo 0 > /proc/sys/net/ipv4/conf/$f/rp_filter; done");
    let socket = w.node.run(|| UdpSocket::bind("192.0.2.1:8475").unwrap());
    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    w.pods[0].run(|| UdpSocket::bind("192.0.2.9:0").unwrap()).send_to(b"x", "192.0.2.1:8475").unwrap();
    assert!(socket.recv_from(&mut [0; 8]).is_err(), "a forged source");
    let other = w.node.run(|| UdpSocket::bind("10.0.0.1:8475").unwrap());
    other.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    w.pods[0].run(|| UdpSocket::bind("192.0.2.9:0").unwrap()).send_to(b"x", "10.0.0.1:8475").unwrap();
    assert!(other.recv_from(&mut [0; 8]).is_err(), "another address of the node");
    w.server.run(|| UdpSocket::bind("192.0.2.9:0").unwrap()).send_to(b"x", "192.0.2.1:8475").unwrap();
    assert!(socket.recv_from(&mut [0; 8]).is_ok(), "from a node");
}

#[test]
fn tunnel_packets_are_not_tracked() {
    let w = world();
    // A rule with a state makes connection tracking run in this namespace.
    w.node.sh("nft 'add table ip watch; add counter ip watch untracked;
         add chain ip watch in { type filter hook input priority 0; };
         add rule ip watch in udp dport 8475 ct state untracked counter name untracked'");
    let untracked = || {
        let text = w.node.sh("nft list counters table ip watch");
        !text.contains("packets 0 ")
    };
    w.node.run(|| Table::new(settings()).apply(&desired(&[])).unwrap());
    let socket = w.node.run(|| UdpSocket::bind("192.0.2.1:8475").unwrap());
    let peer = w.server.run(|| UdpSocket::bind("192.0.2.9:0").unwrap());
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    assert!(!untracked());
    peer.send_to(b"x", "192.0.2.1:8475").unwrap();
    socket.recv_from(&mut [0; 8]).unwrap();
    assert!(untracked());
}

#[test]
fn unknown_pods_are_dropped_on_their_way_out_only_when_armed() {
    let w = world();
    let mut table = Table::new(settings());
    let mut d = desired(&[]);
    d.pods = [ip(PODS[1])].into();
    w.node.run(|| table.apply(&d).unwrap());
    assert!(w.reaches(0, &w.server, "192.0.2.9:5001"));
    d.drop_unknown = true;
    w.node.run(|| table.apply(&d).unwrap());
    assert!(!w.reaches(0, &w.server, "192.0.2.9:5002"));
    assert!(w.reaches(1, &w.server, "192.0.2.9:5003"));
    assert!(w.reaches(0, &w.pods[1], "10.0.1.2:5004"), "what stays on the node is not ours");
    // An address outside the cluster's is as unknown, unless another node or our gateway sends from it.
    w.pods[0].ip("addr add 172.31.9.2/32 dev eth0");
    w.node.ip("route add 172.31.9.2/32 dev pod0");
    let odd = |port: u16| {
        let socket = w.server.run(|| UdpSocket::bind(("192.0.2.9", port)).unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        w.pods[0].run(|| UdpSocket::bind("172.31.9.2:0").unwrap()).send_to(b"x", ("192.0.2.9", port)).unwrap();
        socket.recv_from(&mut [0; 8]).is_ok()
    };
    assert!(!odd(5005));
    d.foreign.push("pod0".into());
    w.node.run(|| table.apply(&d).unwrap());
    assert!(odd(5006));
    d.foreign.pop();
    // Another pod's address on a way that is not that pod's.
    let taken = |port: u16| {
        let socket = w.server.run(|| UdpSocket::bind(("192.0.2.9", port)).unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        w.pods[0].run(|| UdpSocket::bind((PODS[1], 0)).unwrap()).send_to(b"x", ("192.0.2.9", port)).unwrap();
        socket.recv_from(&mut [0; 8]).is_ok()
    };
    w.pods[0].ip(&format!("addr add {}/32 dev eth0", PODS[1]));
    w.node.sh("for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 > $f; done");
    w.node.run(|| table.apply(&d).unwrap());
    assert!(!taken(5007));
    assert!(w.reaches(1, &w.server, "192.0.2.9:5008"));
    // Its interface is not known: nobody can tell.
    d.places.remove(&ip(PODS[1]));
    assert_eq!(w.node.run(|| table.apply(&d).unwrap()), Done::Elements);
    assert!(taken(5009));
    d.places.insert(ip(PODS[1]), "pod1".into());
    assert_eq!(w.node.run(|| table.apply(&d).unwrap()), Done::Elements);
    assert!(!taken(5010));
}

#[test]
fn the_guard_is_idempotent_and_repairs_what_others_change() {
    let node = Ns::new();
    let d = Desired { isolated: (0..200).map(|i| IpAddr::from([10, 0, 1, i])).collect(), ..desired(&["fd00::5"]) };
    let mut table = Table::new(settings());
    assert_eq!(node.run(|| table.check().unwrap()), Done::Unchanged, "nothing is wanted yet");
    assert_eq!(node.run(|| table.apply(&d).unwrap()), Done::Replaced);
    assert_eq!(node.run(|| table.apply(&d).unwrap()), Done::Unchanged);
    assert_eq!(node.run(|| table.check().unwrap()), Done::Unchanged);
    let before = node.sh("nft list table inet tidegate");
    for damage in [
        "nft flush chain inet tidegate forward",
        "nft delete element inet tidegate isolated4 '{ 10.0.1.7 }'",
        "nft add rule inet tidegate input accept",
        "nft delete table inet tidegate",
    ] {
        node.sh(damage);
        assert_eq!(node.run(|| table.check().unwrap()), Done::Repaired, "{damage}");
        assert_eq!(node.sh("nft list table inet tidegate"), before, "{damage}");
    }
    // A restart knows nothing and writes the same.
    assert_eq!(node.run(|| Table::new(settings()).apply(&d).unwrap()), Done::Replaced);
    assert_eq!(node.sh("nft list table inet tidegate"), before);
    // A change of members finds what others changed, too: else it would be taken for what was written.
    let changed = Desired { isolated: desired(&["10.0.0.2"]).isolated, ..d.clone() };
    for (damage, d) in [("nft flush chain inet tidegate forward", &changed), ("nft delete table inet tidegate", &d)] {
        node.run(|| table.check().unwrap());
        node.sh(damage);
        assert_eq!(node.run(|| table.apply(d).unwrap()), Done::Repaired, "{damage}");
        assert_eq!(node.run(|| table.check().unwrap()), Done::Unchanged, "{damage}");
        assert!(node.sh("nft list chain inet tidegate forward").contains("@isolated4"), "{damage}");
    }
}

#[test]
fn a_firewall_that_closes_the_input_is_seen() {
    let node = Ns::new();
    assert!(node.run(|| guard::closed_inputs(8475).unwrap()).is_empty());
    node.sh("nft 'add table ip fw; add chain ip fw in { type filter hook input priority 0; policy drop; }'");
    assert_eq!(node.run(|| guard::closed_inputs(8475).unwrap()), ["fw in"]);
    node.sh("nft add rule ip fw in udp dport 8475 accept");
    assert!(node.run(|| guard::closed_inputs(8475).unwrap()).is_empty());
}

fn send_with_fd(stream: &UnixStream, line: &str, fd: Option<BorrowedFd<'_>>) {
    let fds: Vec<i32> = fd.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let io = [IoSlice::new(line.as_bytes())];
    let controls = if fds.is_empty() { &[][..] } else { &rights[..] };
    let sent = sendmsg::<()>(stream.as_raw_fd(), &io, controls, MsgFlags::MSG_NOSIGNAL, None).unwrap();
    assert_eq!(sent, line.len());
}

fn connect(path: &Path) -> UnixStream {
    let deadline = std::time::Instant::now() + Duration::from_secs(5);
    loop {
        match UnixStream::connect(path) {
            Ok(s) => {
                s.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                return s;
            }
            Err(e) => assert!(std::time::Instant::now() < deadline, "{e}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn answer(stream: &UnixStream) -> String {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    line.trim().to_owned()
}

#[test]
fn a_gateway_hands_its_namespace_over_and_renews_until_it_falls_silent() {
    let (node, gateway) = (Ns::new(), Ns::new());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run/agent.sock");
    let (tx, mut rx) = mpsc::channel(4);
    std::thread::scope(|s| {
        let served = s.spawn(|| {
            node.block_on(|| async {
                let listener = plug::listen(&path).unwrap();
                tokio::spawn(plug::serve(listener, tx));
                let nl = Netlink::open().unwrap();
                let mut seen = Vec::new();
                // Refused lines never get here; two connections end in silence or by closing.
                while seen.iter().filter(|l: &&String| l.starts_with("gone")).count() < 6 {
                    let request = tokio::time::timeout(Duration::from_secs(10), rx.recv()).await;
                    match request.expect("a request").unwrap() {
                        Request::Plug { hello, netns, answer, .. } => {
                            use std::os::fd::AsFd;
                            let plugged = nl.plug(netns.as_fd(), hello.tunnel_mtu, 1500).await;
                            seen.push(format!("plug {}", hello.gateway));
                            let told = |_| Plugged { mtu: hello.tunnel_mtu, held: hello.r#static.clone() };
                            answer.send(plugged.map(told).map_err(|e| e.to_string())).unwrap();
                        }
                        Request::Renew { addresses, held, .. } => {
                            seen.push(format!("renew {addresses:?}"));
                            let _ = held.send(addresses);
                        }
                        Request::Gone { .. } => seen.push("gone".into()),
                    }
                }
                seen
            })
        });

        let mode = {
            let first = connect(&path);
            let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
            send_with_fd(&first, "{\"gateway\":\"gw-a\",\"tunnelMtu\":1400,\"static\":[]}\n", Some(gateway.fd()));
            assert_eq!(answer(&first), r#"{"plugged":true,"tgpMtu":1400}"#);
            assert!(gateway.ip("link show tgp").contains("mtu 1400"));
            (&first).write_all(b"{\"renew\":true,\"static\":[\"203.0.113.10\"]}\n").unwrap();
            // Dropped here: the end of the connection.
            mode
        };
        assert_eq!(mode & 0o777, 0o600);

        let told = connect(&path);
        let hello = r#"{"gateway":"gw-a","tunnelMtu":1400,"static":["203.0.113.10"],"answers":true}"#;
        send_with_fd(&told, &format!("{hello}\n"), Some(gateway.fd()));
        assert_eq!(answer(&told), r#"{"plugged":true,"tgpMtu":1400,"held":["203.0.113.10"]}"#);
        (&told).write_all(b"{\"renew\":true,\"static\":[\"2001:db8::10\"]}\n").unwrap();
        assert_eq!(answer(&told), r#"{"held":["2001:db8::10"]}"#);
        drop(told);

        let quiet = connect(&path);
        send_with_fd(&quiet, "{\"gateway\":\"gw-a\",\"tunnelMtu\":1400}\n", Some(gateway.fd()));
        assert_eq!(answer(&quiet), r#"{"plugged":true,"tgpMtu":1400}"#);
        let since = std::time::Instant::now();
        assert_eq!(answer(&quiet), "", "silence ends the connection");
        assert!((1500..4000).contains(&since.elapsed().as_millis()), "{:?}", since.elapsed());

        for (line, fd, why) in [
            ("{\"gateway\":\"gw-a\",\"tunnelMtu\":1400}\n", None, "no network namespace"),
            ("{\"gateway\":\"gw-a\",\"tunnelMtu\":100}\n", Some(gateway.fd()), "tunnelMtu"),
            ("not json\n", Some(gateway.fd()), "expected"),
        ] {
            let bad = connect(&path);
            send_with_fd(&bad, line, fd);
            let said = answer(&bad);
            assert!(said.starts_with("{\"error\":") && said.contains(why), "{said}");
        }
        let seen = served.join().unwrap();
        assert_eq!(seen.iter().filter(|l| *l == "plug gw-a").count(), 3);
        assert!(seen.contains(&"renew [203.0.113.10]".to_owned()), "{seen:?}");
    });
}

#[test]
fn a_file_that_is_no_network_namespace_is_refused() {
    let node = Ns::new();
    let file = std::fs::File::open("/dev/null").unwrap();
    let e = node.block_on(|| async {
        use std::os::fd::AsFd;
        Netlink::open().unwrap().plug(file.as_fd(), 1430, 1500).await.unwrap_err()
    });
    assert!(e.to_string().contains("enter the namespace"), "{e}");
}

#[test]
fn neighbours_hear_of_an_address_that_moved_here() {
    let (node, peer) = (Ns::new(), Ns::new());
    node.cable("up0", &peer, "up0");
    let capture = peer.run(|| {
        use std::os::fd::{FromRawFd, OwnedFd};
        let all = i32::from((libc::ETH_P_ALL as u16).to_be());
        // SAFETY: socket(2) takes no pointers; the result is checked.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, all) };
        assert!(fd >= 0);
        // SAFETY: the descriptor is new and ours alone.
        std::fs::File::from(unsafe { OwnedFd::from_raw_fd(fd) })
    });
    let addresses = [ip("203.0.113.10"), ip("2001:db8::10")];
    let mac = node.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let up = runtime.block_on(async { Netlink::open().unwrap().link("up0").await.unwrap().unwrap() });
        let announcer = Announcer::open().unwrap();
        for a in addresses {
            announcer.announce(up.index, up.mac, a).unwrap();
        }
        up.mac
    });
    let mut wanted: Vec<Vec<u8>> = addresses.iter().flat_map(|a| frames(*a, mac)).collect();
    assert_eq!(wanted.len(), 3);
    nix::sys::socket::setsockopt(
        &capture,
        nix::sys::socket::sockopt::ReceiveTimeout,
        &nix::sys::time::TimeVal::new(5, 0),
    )
    .unwrap();
    while !wanted.is_empty() {
        let mut frame = [0; 2048];
        let n = std::io::Read::read(&mut &capture, &mut frame).expect("all announcements arrive");
        wanted.retain(|w| w[..] != frame[..n]);
    }
}
