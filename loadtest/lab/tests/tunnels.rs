//! Hand-made packets of our tunnel: from pods of every kind, with another pod's source inside, and from nodes that
//! speak for another node's pods.
//!
//! What is inside would leave by a gateway, or reach a pod with an outsider's source. The same packets of the node that
//! may send them arrive.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use nix::sys::signal::Signal;
use support::{PASSES, address, detach, named, nobody_else_checks, node_address, run, sees, target, translate};
use tidegate_lab::forge::{self, SYN};
use tidegate_lab::observe::Watch;
use tidegate_lab::probe::{self, FAMILIES, Family};
use tidegate_lab::scenario::Pod;
use tidegate_lab::world::veth;
use tidegate_lab::{Lab, Options, Scenario};

/// The tunnel's UDP port.
const PORT: u16 = 8475;
/// To a gateway, to a pod.
const VNI: [u32; 2] = [1, 2];
/// A pod, its node, and the pod whose source it puts inside: one of the same node, whose packets the gateways take from
/// there.
const ATTACKERS: [(&str, &str, &str); 9] = [
    ("untouched/app", "node-1", "shop/web"),
    ("audited/app", "node-1", "shop/web"),
    ("shop/web", "node-1", "billing/pay"),
    ("untouched/backend", "node-2", "shop/worker"),
    ("guarded/app", "node-2", "shop/worker"),
    ("managed/app", "node-2", "shop/worker"),
    ("shop/worker", "node-2", "annotated/app"),
    // On the gateway's own node.
    ("untouched/near", "gw-node-a", "shop/local"),
    ("shop/local", "gw-node-a", "shop/local"),
];
/// Nodes with a pod that waits for what comes out of the tunnel.
const VICTIMS: [(&str, &str); 3] = [("node-1", "shop/web"), ("node-2", "shop/worker"), ("gw-node-a", "shop/local")];
/// Sequence number of everything that is forged, which nobody on the way changes.
const COOKIE: u32 = 0x7ead_beef;

/// Everything that is forged goes here, and is allowed for the pods inside.
fn outside(family: Family) -> SocketAddr {
    named(family, 12, 7000)
}

/// An address that the state does not have, on a gateway's node.
fn second(family: Family) -> IpAddr {
    target(family, "203.0.113.203", "2001:db8::203", 0).ip()
}

/// A tunnel packet's payload: a SYN of `source` for a gateway, or a datagram of an outsider for a pod.
fn frame(lab: &Lab, vni: u32, pod: &str, family: Family) -> Vec<u8> {
    let own = address(lab, pod, family);
    let inner = if vni == VNI[0] {
        forge::tcp(SocketAddr::new(own, 23_000), outside(family), SYN, COOKIE, 0, b"")
    } else {
        forge::udp(named(family, 14, 7001), SocketAddr::new(own, 6222), b"forged")
    };
    forge::tunnelled(vni, &inner)
}

struct Eyes {
    router: Vec<Watch>,
    pods: Vec<(String, UdpSocket)>,
}

impl Eyes {
    fn open(lab: &Lab) -> Self {
        let router = FAMILIES.map(|f| lab.watch(outside(f).ip(), &format!("tcp sequence {COOKIE:#x}")).unwrap());
        let pods = VICTIMS.iter().flat_map(|(_, pod)| {
            FAMILIES.map(|f| {
                let own = address(lab, pod, f);
                let socket = lab.pod(pod).within(|| UdpSocket::bind((own, 6222)).unwrap()).unwrap();
                socket.set_nonblocking(true).unwrap();
                ((*pod).to_owned(), socket)
            })
        });
        Self { router: router.into(), pods: pods.collect() }
    }

    /// What has arrived where, of both kinds.
    fn seen(&self) -> (u64, Vec<&str>) {
        let out = self.router.iter().map(|w| w.packets().unwrap()).sum();
        let pods = self.pods.iter().filter(|(_, s)| s.recv_from(&mut [0; 64]).is_ok());
        (out, pods.map(|(p, _)| p.as_str()).collect())
    }

    #[track_caller]
    fn nothing(&self, what: &str) {
        std::thread::sleep(PASSES);
        assert_eq!(self.seen(), (0, vec![]), "{what}");
    }
}

/// Sends every frame from one place, from every source, to all addresses of nodes.
fn attack(lab: &Lab, from: &str, own: &[IpAddr], sources: &[IpAddr], to: &[IpAddr], frames: &[Vec<u8>]) {
    let place = lab.place(from).unwrap();
    for to in to {
        let sources = own.iter().chain(sources).filter(|s| s.is_ipv4() == to.is_ipv4());
        for source in sources {
            for frame in frames {
                let packet = forge::udp(SocketAddr::new(*source, 40_000), SocketAddr::new(*to, PORT), frame);
                forge::send(&place, None, &packet).unwrap();
            }
        }
    }
}

#[test]
fn hand_made_tunnel_packets() {
    let mut scenario = Scenario::load(concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/demo.yaml").as_ref()).unwrap();
    scenario.pods.push(Pod {
        name: "near".into(),
        namespace: "untouched".into(),
        node: "gw-node-a".into(),
        labels: Default::default(),
        ipv4: Some([10, 244, 3, 200].into()),
        ipv6: Some("fd00:10:244:3::200".parse().unwrap()),
        listen: Default::default(),
    });
    let options = Options { lab: Some(env!("CARGO_BIN_EXE_tidegate-lab").into()), ..Options::unique("tunnels") };
    let mut lab = Lab::up(scenario, &options).unwrap();
    nobody_else_checks(&lab);
    run(&lab, "gw-node-a", "ip address add 203.0.113.203/24 dev eth0; ip address add 2001:db8::203/64 dev eth0 nodad");
    for (_, _, inside) in ATTACKERS {
        for family in FAMILIES {
            assert!(
                !probe::dig(&lab.pod(inside), "tcp.example.com", family.record(), &[]).answers.is_empty(),
                "{inside}"
            );
        }
    }
    from_nodes(&lab);
    from_pods(&lab);
    layers(&mut lab);
}

/// A node speaks for its own pods, a gateway's node to all pods, and nobody for another's.
fn from_nodes(lab: &Lab) {
    let eyes = Eyes::open(lab);
    let carriers = ["gw-node-a", "gw-node-b"];
    for outer in FAMILIES {
        for inner in FAMILIES {
            let to_gateways = carriers.map(|n| node_address(lab, n, outer));
            let own = |node: &str| [node_address(lab, node, outer)];
            let speak = |node: &str, pod: &str, vni: u32, to: &[IpAddr]| {
                attack(lab, node, &own(node), &[], to, &[frame(lab, vni, pod, inner)]);
            };
            let what = format!("{outer:?} around {inner:?}");
            for (node, theirs) in [
                ("node-2", "shop/web"),
                ("node-1", "shop/worker"),
                ("node-2", "shop/local"),
                ("gw-node-b", "shop/web"),
                ("gw-node-a", "shop/worker"),
            ] {
                let to: Vec<IpAddr> =
                    to_gateways.iter().copied().filter(|t| *t != node_address(lab, node, outer)).collect();
                speak(node, theirs, VNI[0], &to);
                eyes.nothing(&format!("{node} speaks for {theirs}, {what}"));
            }
            // To a pod only gateways' nodes may send.
            for (node, pod) in VICTIMS {
                for from in ["node-1", "node-2"].into_iter().filter(|n| *n != node) {
                    speak(from, pod, VNI[1], &own(node));
                    eyes.nothing(&format!("{from} sends to {pod}, {what}"));
                }
            }
            // To an address that no list has, another network's number.
            if inner == outer {
                speak("node-1", "shop/web", VNI[0], &[second(outer)]);
                speak("node-1", "shop/web", 7, &to_gateways);
                eyes.nothing(&format!("to an address of no list, {what}"));
            }
        }
    }
    // The very same packets of those that may.
    for outer in FAMILIES {
        for inner in FAMILIES {
            let what = format!("{outer:?} around {inner:?}");
            let to = carriers.map(|n| node_address(lab, n, outer));
            let before = eyes.seen().0;
            for (node, pod) in [("node-1", "shop/web"), ("node-2", "shop/worker")] {
                attack(lab, node, &[node_address(lab, node, outer)], &[], &to, &[frame(lab, VNI[0], pod, inner)]);
            }
            let arrived = || eyes.router.iter().map(|w| w.packets().unwrap()).sum::<u64>() >= before + 2;
            let found = tidegate_lab::lab::wait_for(Duration::from_secs(3), || arrived().then_some(()));
            assert!(found.is_some(), "nodes speak for their pods, {what}: {} after {before}", eyes.seen().0);
            for (node, pod) in &VICTIMS[..2] {
                let to = [node_address(lab, node, outer)];
                let from = node_address(lab, "gw-node-a", outer);
                attack(lab, "gw-node-a", &[from], &[], &to, &[frame(lab, VNI[1], pod, inner)]);
                let found =
                    tidegate_lab::lab::wait_for(Duration::from_secs(3), || eyes.seen().1.contains(pod).then_some(()));
                assert!(found.is_some(), "a gateway's node sends to {pod}, {what}");
            }
        }
    }
}

/// All frames that an attacker on `node` may think of.
fn frames(lab: &Lab, inside: &str) -> Vec<Vec<u8>> {
    FAMILIES
        .iter()
        .flat_map(|f| {
            let to_pods = VICTIMS.iter().map(|(_, victim)| frame(lab, VNI[1], victim, *f));
            to_pods.chain([frame(lab, VNI[0], inside, *f)]).collect::<Vec<_>>()
        })
        .collect()
}

fn own(lab: &Lab, pod: &str) -> Vec<IpAddr> {
    FAMILIES.iter().map(|f| address(lab, pod, *f)).collect()
}

/// Every address of a node, and those at which a pod finds its own.
fn everywhere(lab: &Lab) -> Vec<IpAddr> {
    let mut all: Vec<IpAddr> = Vec::new();
    for family in FAMILIES {
        all.extend(support::NODES.iter().map(|n| node_address(lab, n, family)));
        all.push(second(family));
        all.push(target(family, "169.254.1.1", "fe80::1", 0).ip());
    }
    all
}

fn from_pods(lab: &Lab) {
    let eyes = Eyes::open(lab);
    for (pod, node, inside) in ATTACKERS {
        let frames = frames(lab, inside);
        // Its node's own source, another node's, a gateway's, an outsider's, and that of the pod inside.
        let mut sources = own(lab, inside);
        for family in FAMILIES {
            sources.extend([node, "node-1", "gw-node-a", "gw-node-b"].map(|n| node_address(lab, n, family)));
            sources.push(named(family, 14, 0).ip());
        }
        let mut to = everywhere(lab);
        // The link's own address needs a device.
        to.retain(|ip| !matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local()));
        attack(lab, pod, &own(lab, pod), &sources, &to, &frames);
        for source in own(lab, pod).iter().chain(&sources).filter(|s| s.is_ipv6()) {
            for frame in &frames {
                let to = target(Family::V6, "", "fe80::1", PORT);
                let packet = forge::udp(SocketAddr::new(*source, 40_000), to, frame);
                forge::send(&lab.pod(pod), Some("eth0"), &packet).unwrap();
            }
        }
        eyes.nothing(&format!("{pod} makes tunnel packets"));
        // Behind a service's address, of its own node and of gateways'.
        for family in FAMILIES {
            for (n, behind) in ["gw-node-a", "gw-node-b", node].into_iter().enumerate() {
                let service: IpAddr =
                    target(family, &format!("10.96.0.{}", 30 + n), &format!("fd00:10:96::{}", 30 + n), 0).ip();
                translate(lab, node, service, SocketAddr::new(node_address(lab, behind, family), PORT));
                let from = SocketAddr::new(address(lab, pod, family), 40_000);
                for frame in &frames {
                    let packet = forge::udp(from, SocketAddr::new(service, 8080), frame);
                    forge::send(&lab.pod(pod), None, &packet).unwrap();
                }
            }
        }
        eyes.nothing(&format!("{pod} sends to services in front of tunnels"));
        run(lab, node, "nft delete table inet services");
    }
    // To ports beside it, and outside the cluster to this one, an untouched pod's datagrams go their way.
    for family in FAMILIES {
        let to = target(family, "198.51.100.13", "2001:db8:100::13", PORT);
        let echoed = probe::datagram(&lab.pod("untouched/app"), to, b"not ours", true).unwrap();
        assert!(echoed.is_some(), "{to}");
        let to = SocketAddr::new(node_address(lab, "node-2", family), 8476);
        let node = lab.place("node-2").unwrap().within(|| UdpSocket::bind(to).unwrap()).unwrap();
        node.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        let from = SocketAddr::new(address(lab, "untouched/app", family), 40_000);
        forge::send(&lab.pod("untouched/app"), None, &forge::udp(from, to, b"beside")).unwrap();
        assert!(node.recv_from(&mut [0; 8]).is_ok(), "{to}");
    }
}

/// The program on the pod's interface and the netfilter half each hold alone. Without both, a masquerading network
/// plugin makes the node's packet of an untouched pod's, which this test sees.
fn layers(lab: &mut Lab) {
    let node = "node-1";
    let eyes = Eyes::open(lab);
    lab.signal(node, Signal::SIGKILL, Some(Duration::from_secs(5))).unwrap();
    let to: Vec<IpAddr> =
        FAMILIES.iter().flat_map(|f| ["gw-node-a", "gw-node-b"].map(|n| node_address(lab, n, *f))).collect();
    let go = |lab: &Lab| {
        for (pod, _, inside) in ATTACKERS.iter().filter(|(_, n, _)| *n == node) {
            attack(lab, pod, &own(lab, pod), &[], &to, &frames(lab, inside));
        }
    };
    let table = run(lab, node, "nft list table inet tidegate");
    run(lab, node, "nft delete table inet tidegate");
    go(lab);
    eyes.nothing("the program alone");
    let file = lab.layout().folder.join("run/table.nft");
    std::fs::write(&file, table).unwrap();
    run(lab, node, &format!("nft -f {}", file.display()));
    for (pod, ..) in ATTACKERS.iter().filter(|(_, n, _)| *n == node) {
        detach(lab, node, "pod_egress", &veth(lab.scenario(), lab.scenario().pod(pod).unwrap()));
    }
    go(lab);
    eyes.nothing("netfilter alone");
    run(lab, node, "nft delete table inet tidegate");
    go(lab);
    assert!(eyes.router.iter().all(|w| sees(w, 1)), "without both it leaves, or this test could not fail");
    // Back again, all is closed.
    lab.start(node).unwrap();
    lab.wait_ready(node, Duration::from_secs(30)).unwrap();
    let eyes = Eyes::open_again(lab, eyes);
    go(lab);
    eyes.nothing("with both again");
}

impl Eyes {
    /// Fresh counters; the pods' ports must be free again first.
    fn open_again(lab: &Lab, old: Self) -> Self {
        drop(old);
        Self::open(lab)
    }
}
