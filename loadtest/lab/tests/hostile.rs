//! Tenants that have root in their pods, and what they try against their nodes. tunnels.rs has what they try against
//! our tunnel, strays.rs packets out of nothing, detours.rs other ways out than the pod's interface.
//!
//! One lab, one test. Every attack has a counterpart that arrives, so that a silent drop elsewhere is no success.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};
use support::{PASSES, address, named, run, sees, translate};
use tidegate_lab::forge;
use tidegate_lab::lab::wait_for;
use tidegate_lab::probe::{self, FAMILIES, Family};
use tidegate_lab::{Lab, Options, Scenario};

/// other.example.org, which is allowed for nobody.
fn denied(family: Family) -> SocketAddr {
    named(family, 14, 7001)
}

fn answers(lab: &Lab, from: &str, to: SocketAddr) -> bool {
    // Twice: the first may wait for a neighbour.
    (0..2).any(|_| probe::datagram(&lab.pod(from), to, b"hello", true).unwrap().is_some())
}

/// Sends a datagram from an address of the pod's choice, which it gives itself.
fn send(lab: &Lab, pod: &str, from: SocketAddr, to: SocketAddr, payload: &[u8]) {
    let own = lab.scenario().pod(pod).is_ok_and(|p| p.addresses().contains(&from.ip()));
    let net = format!("{}/{}", from.ip(), if from.is_ipv4() { 32 } else { 128 });
    if !own {
        run(lab, pod, &format!("ip address replace {net} dev lo {}", if from.is_ipv4() { "" } else { "nodad" }));
    }
    let place = lab.place(pod).unwrap();
    let sent =
        place.within(|| UdpSocket::bind(from).and_then(|s| (0..2).try_for_each(|_| s.send_to(payload, to).map(drop))));
    sent.unwrap().unwrap();
    if !own {
        run(lab, pod, &format!("ip address delete {net} dev lo"));
    }
    std::thread::sleep(Duration::from_millis(300));
}

#[test]
fn hostile_tenants() {
    let mut scenario = Scenario::load(concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/demo.yaml").as_ref()).unwrap();
    scenario.tidegate.as_mut().unwrap().agent.insert("unknownPods".into(), json!("Drop"));
    let options = Options { lab: Some(env!("CARGO_BIN_EXE_tidegate-lab").into()), ..Options::unique("hostile") };
    let lab = Lab::up(scenario, &options).unwrap();
    services_that_lead_outside(&lab);
    tunnels_of_the_network_plugin(&lab);
    openings_that_nobody_sent(&lab);
    ports_that_devices_write(&lab);
}

/// On a bridge a pod's interface is found by what its neighbours say of themselves: one that takes another's address by
/// ARP or neighbour discovery must not get what that one may.
#[test]
fn a_neighbours_address_on_a_bridge() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/variants/bridge.yaml");
    let options = Options { lab: Some(env!("CARGO_BIN_EXE_tidegate-lab").into()), ..Options::unique("bridged") };
    let mut lab = Lab::up(Scenario::load(file.as_ref()).unwrap(), &options).unwrap();
    let (node, thief, owner) = ("node-1", "shop/web", "untouched/app");
    let link = run(&lab, thief, "ip -br link show eth0");
    let mac = link.split_whitespace().nth(2).unwrap().to_owned();
    for again in [false, true] {
        for family in FAMILIES {
            let (theirs, to) = (address(&lab, owner, family), denied(family));
            let watch = lab.watch(to.ip(), "").unwrap();
            let length = family.pick(32, 128);
            let bridge = family.pick("10.244.1.1", "fd00:10:244:1::1");
            let claim = format!(
                "ip addr replace {theirs}/{length} dev eth0 {}; ip neigh flush dev eth0; ping -c 1 -W 1 -I {theirs} {bridge}; true",
                family.pick("", "nodad")
            );
            let go = |lab: &Lab| {
                // A node does not believe another one within a second.
                let taken = wait_for(Duration::from_secs(10), || {
                    run(lab, thief, &claim);
                    run(lab, node, &format!("ip neigh show {theirs} dev cni0")).contains(&mac).then_some(())
                });
                assert!(taken.is_some(), "{family:?}: the node takes the thief for the owner");
                // Until the agent has heard of it.
                std::thread::sleep(Duration::from_millis(500));
                for source in [theirs, address(lab, thief, family)] {
                    let packet = forge::udp(SocketAddr::new(source, 6333), to, b"stolen");
                    forge::send(&lab.pod(thief), None, &packet).unwrap();
                }
                std::thread::sleep(PASSES);
            };
            go(&lab);
            if again {
                // An agent that comes later finds it so.
                lab.restart(node).unwrap();
                lab.wait_ready(node, Duration::from_secs(30)).unwrap();
                go(&lab);
            }
            assert_eq!(watch.packets().unwrap(), 0, "{family:?}, the agent restarted: {again}");
            // Given back, all is as before.
            run(&lab, thief, &format!("ip addr del {theirs}/{length} dev eth0"));
            let back = wait_for(Duration::from_secs(10), || {
                run(&lab, owner, &format!("ip neigh flush dev eth0; ping -c 1 -W 1 {bridge}; true"));
                answers(&lab, owner, to).then_some(())
            });
            assert!(back.is_some(), "{family:?}: the owner goes on");
            let seen = wait_for(Duration::from_secs(10), || {
                let seen = probe::curl(&lab.pod(thief), family, "https://api.example.com/", &[]);
                (seen.exit == 0).then_some(())
            });
            assert!(seen.is_some(), "{family:?}: so does the other one with what it may");
        }
    }
}

/// An address of the cluster set that is translated to one outside.
fn services_that_lead_outside(lab: &Lab) {
    for family in FAMILIES {
        let service =
            |n: u8| -> IpAddr { format!("{}{n}", family.pick("10.96.0.2", "fd00:10:96::2")).parse().unwrap() };
        translate(lab, "node-1", service(0), denied(family));
        translate(lab, "node-1", service(1), SocketAddr::new(address(lab, "untouched/backend", family), 7001));
        let watch = lab.watch(denied(family).ip(), "").unwrap();
        assert!(!answers(lab, "shop/web", SocketAddr::new(service(0), 7001)), "{family:?}");
        assert_eq!(watch.packets().unwrap(), 0, "{family:?}: it reached the router");
        assert!(answers(lab, "shop/web", SocketAddr::new(service(1), 7001)), "{family:?}: a pod behind a service");
        assert!(answers(lab, "untouched/app", SocketAddr::new(service(0), 7001)), "{family:?}: not ours");
        assert!(watch.packets().unwrap() > 0);
    }
}

/// What a node of a network plugin with an overlay unpacks.
fn tunnels_of_the_network_plugin(lab: &Lab) {
    for family in FAMILIES {
        let node: IpAddr = family.pick("203.0.113.102", "2001:db8::102").parse().unwrap();
        let node2 = lab.place("node-2").unwrap();
        let overlay = node2.within(|| UdpSocket::bind((node, 8472)).unwrap()).unwrap();
        let inner = node2.within(|| {
            let domain = if node.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
            Socket::new(domain, Type::RAW, Some(Protocol::from(47))).unwrap()
        });
        let gre = inner.unwrap();
        overlay.set_read_timeout(Some(Duration::from_millis(700))).unwrap();
        gre.set_read_timeout(Some(Duration::from_millis(700))).unwrap();
        let arrive = |pod: &str| {
            let to = SocketAddr::new(node, 8472);
            lab.pod(pod)
                .within(|| UdpSocket::bind(family.pick("0.0.0.0:0", "[::]:0")).unwrap().send_to(b"x", to))
                .unwrap()
                .unwrap();
            let target = family.pick(format!("IP4-SENDTO:{node}:47"), format!("IP6-SENDTO:[{node}]:47"));
            run(lab, pod, &format!("printf '\\0\\0\\10\\0tunnel and a little more' | socat -u - '{target}'"));
            let udp = overlay.recv_from(&mut [0; 64]).is_ok();
            (udp, std::io::Read::read(&mut &gre, &mut [0; 64]).is_ok())
        };
        for pod in ["shop/web", "guarded/app", "audited/app"] {
            assert_eq!(arrive(pod), (false, false), "{pod} {family:?}");
        }
        assert_eq!(arrive("untouched/app"), (true, true), "{family:?}: not ours");
    }
}

/// "Replies" to what a neighbour sent in somebody else's name.
fn openings_that_nobody_sent(lab: &Lab) {
    // Not every network plugin leaves the kernel's own check on.
    run(lab, "node-1", "for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 > $f; done");
    for family in FAMILIES {
        let (outside, victim) = (denied(family), address(lab, "shop/web", family));
        let watch = lab.watch(outside.ip(), "udp dport 7001").unwrap();
        let socket = lab.pod("shop/web").within(|| UdpSocket::bind((victim, 6111)).unwrap()).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        send(lab, "untouched/app", outside, SocketAddr::new(victim, 6111), b"open");
        assert_eq!(socket.recv_from(&mut [0; 64]).unwrap().1, outside, "the neighbour's packet arrives");
        socket.send_to(b"secret", outside).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(watch.packets().unwrap(), 0, "{family:?}");
    }
}

/// A datagram whose port is another one when a device has written its checksum.
fn ports_that_devices_write(lab: &Lab) {
    // On a worker, on a gateway's node.
    for (pod, node) in [("shop/web", "node-1"), ("shop/local", "gw-node-a")] {
        for family in FAMILIES {
            let to = named(family, 13, 7001);
            assert!(!probe::dig(&lab.pod(pod), "udp.example.com", family.record(), &[]).answers.is_empty(), "{pod}");
            assert!(answers(lab, pod, to), "{pod} {family:?}");
            let refused =
                || lab.metric(node, "tidegate_packets_total", &["hook=\"pod_egress\"", "reason=\"checksum\""]).unwrap();
            let (watch, before) = (lab.watch(to.ip(), "meta l4proto udp").unwrap(), refused());
            let from = SocketAddr::new(address(lab, pod, family), 6_444);
            let ports = [53, 853, 8475, 8472];
            for port in ports {
                forge::send_unfinished(&lab.pod(pod), &forge::unfinished(from, to, Some(port))).unwrap();
            }
            let seen = wait_for(Duration::from_secs(5), || (refused() >= before + 4.0).then_some(()));
            assert!(seen.is_some(), "{pod} {family:?}: {}", refused() - before);
            std::thread::sleep(PASSES);
            assert_eq!(watch.packets().unwrap(), 0, "{pod} {family:?}");
            // As the pod's own kernel sends it.
            forge::send_unfinished(&lab.pod(pod), &forge::unfinished(from, to, None)).unwrap();
            assert!(sees(&watch, 1), "{pod} {family:?}");
            assert_eq!(refused(), before + 4.0);
        }
    }
}
