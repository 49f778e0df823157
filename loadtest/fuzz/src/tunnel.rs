//! Packets that come out of the tunnel between nodes, and those that a gateway sends back: who is believed, and where they go.

use std::net::{Ipv4Addr, Ipv6Addr};

use tidegate_ebpf_common::layout::{Config, Endpoint, Node, VNI_TO_GATEWAY, VNI_TO_POD, endpoint, node};
use tidegate_ebpf_common::packet;
use tidegate_ebpf_common::tunnel::{Outer, Places, Way, arrives, returns};
use tidegate_ebpf_common::{Addr, Code, Packet, Parsed};

/// Nodes, by their numbers: this one and another one with a gateway, one without, one whose address for the tunnel nobody knows.
const HERE: u8 = 1;
const GATEWAYS: [u8; 2] = [HERE, 2];
const NODES: [u8; 4] = [HERE, 2, 3, LOST];
const LOST: u8 = 4;
/// Pods, by their numbers: the node, the interface, and whether a policy selects them. One of this node is not attached yet.
const PODS: [(u8, u32, bool); 7] =
    [(HERE, 11, true), (HERE, 12, false), (HERE, 0, true), (2, 0, true), (3, 0, true), (3, 0, false), (LOST, 0, true)];
/// Devices of this node: towards its gateway, and the tunnel's.
const GATEWAY: u32 = 30;
const TUNNEL: u32 = 31;

/// The addresses of number `n` of nodes, or of pods.
fn both(n: u8, pods: bool) -> ([u8; 4], [u8; 16]) {
    let (v4, v6) = if pods { ([10, 244, 0, n], 0xfd00) } else { ([192, 0, 2, n], 0x2001) };
    (v4, Ipv6Addr::new(v6, 0, 0, 0, 0, 0, 0, n.into()).octets())
}

/// The number that has the address.
fn number(addr: &Addr, pods: bool, last: usize) -> Option<u8> {
    (1..=last as u8).find(|n| {
        let (v4, v6) = both(*n, pods);
        [Addr::from_ip(Ipv4Addr::from(v4).into()), Addr::from_ip(Ipv6Addr::from(v6).into())].contains(addr)
    })
}

/// The node with this address.
fn node_of(addr: &Addr) -> Option<u8> {
    number(addr, false, NODES.len())
}

/// The pod with this address: its number, its node, its interface, and whether a policy selects it.
fn pod_of(addr: &Addr) -> Option<(usize, (u8, u32, bool))> {
    let n = usize::from(number(addr, true, PODS.len())?) - 1;
    Some((n, PODS[n]))
}

struct World {
    pods: [Endpoint; PODS.len()],
    nodes: [Node; NODES.len()],
    outer: [Addr; NODES.len()],
}

impl World {
    fn new() -> Self {
        let pods = PODS.map(|(node, ifindex, touched)| {
            let flags = if touched { endpoint::TOUCHED } else { 0 };
            Endpoint { node: node.into(), ifindex, flags, ..Endpoint::default() }
        });
        let nodes = NODES.map(|n| {
            let flags = if GATEWAYS.contains(&n) { node::GATEWAY } else { 0 };
            Node { id: n.into(), flags }
        });
        Self { pods, nodes, outer: NODES.map(|n| Addr::from_ip(Ipv4Addr::from(both(n, false).0).into())) }
    }
}

impl Places for World {
    fn place(&self, addr: &Addr) -> Option<&Endpoint> {
        pod_of(addr).map(|(n, _)| &self.pods[n])
    }
    fn node_at(&self, addr: &Addr) -> Option<&Node> {
        node_of(addr).map(|n| &self.nodes[usize::from(n) - 1])
    }
    fn outer(&self, node: u32) -> Option<&Addr> {
        let n = NODES.iter().position(|n| u32::from(*n) == node && *n != LOST)?;
        Some(&self.outer[n])
    }
}

/// A frame behind four octets: the tunnel's network, the nodes at both ends (bit 0: IPv6), and what there is: the gateway (bit 0), the
/// tunnel (1), a pod's address instead of the frame's source (2) and destination (3), by the last octet of each.
pub fn tunnel(data: &[u8]) -> bool {
    let [vni, from, to, bits, rest @ ..] = data else { return false };
    let is = |bit: u8| bits >> bit & 1 == 1;
    let mut frame = rest.to_vec();
    let ethertype = frame.get(12..14).map_or(0, |b| u16::from_be_bytes([b[0], b[1]]));
    let ends = match ethertype {
        packet::IPV4 if frame.len() >= 34 => [26..30, 30..34],
        packet::IPV6 if frame.len() >= 54 => [22..38, 38..54],
        _ => [0..0, 0..0],
    };
    for (end, _) in ends.into_iter().zip([2, 3]).filter(|(end, bit)| is(*bit) && !end.is_empty()) {
        let (v4, v6) = both(frame[end.end - 1] % 9, true);
        let pod = if end.len() == 4 { &v4[..] } else { &v6[..] };
        frame[end].copy_from_slice(pod);
    }
    let node = |octet: u8| {
        let (v4, v6) = both(octet >> 1, false);
        Addr::from_ip(if octet & 1 == 0 { Ipv4Addr::from(v4).into() } else { Ipv6Addr::from(v6).into() })
    };
    let outer = Outer { vni: u32::from(*vni), from: node(*from), to: node(*to) };
    let device = |bit: u8, index: u32| if is(bit) { index } else { 0 };
    let config = Config { node: HERE.into(), tgq: device(0, GATEWAY), tunnel: device(1, TUNNEL), ..Config::default() };
    let world = World::new();
    let mut p = Packet::default();
    let parsed = packet::parse(&&frame[..], ethertype, &mut p);

    let here = arrives(parsed, &p, &outer, &config, &world);
    check_arrival(parsed, &p, &outer, &config, here);
    let back = returns(parsed, &p, &config, &world);
    check_return(parsed, &p, &config, &world, back);
    [here, back].iter().any(|w| !matches!(w, Way::Drop(_)))
}

fn check_arrival(parsed: Parsed, p: &Packet, outer: &Outer, config: &Config, way: Way<'_>) {
    let said = || format!("{way:?}: {p:?} {outer:?}");
    let ours = parsed == Parsed::Ip && node_of(&outer.to) == Some(HERE);
    let sender = node_of(&outer.from);
    // A node speaks for its own pods alone, and only for those that a policy selects.
    let source = pod_of(&p.src).is_some_and(|(_, (node, _, touched))| touched && sender == Some(node));
    let to_gateway = ours && outer.vni == VNI_TO_GATEWAY && source && config.tgq != 0;
    // Only who has a gateway speaks to pods.
    let gateway = sender.is_some_and(|n| GATEWAYS.contains(&n));
    let pod = pod_of(&p.dst).filter(|(_, (_, ifindex, _))| *ifindex != 0);
    let to_pod = ours && outer.vni == VNI_TO_POD && gateway && pod.is_some();
    match way {
        Way::Gateway(ifindex) => assert!(to_gateway && ifindex == GATEWAY, "{}", said()),
        Way::Pod(ep) => assert!(to_pod && pod.is_some_and(|(_, p)| p.1 == ep.ifindex), "{}", said()),
        Way::Node(_) => panic!("it goes through the tunnel again: {}", said()),
        Way::Drop(code) => assert!(code != Code::Allowed && !to_gateway && !to_pod, "{}", said()),
    }
}

fn check_return(parsed: Parsed, p: &Packet, config: &Config, world: &World, way: Way<'_>) {
    let pod = pod_of(&p.dst).filter(|_| parsed == Parsed::Ip).map(|(_, pod)| pod);
    let attached = pod.is_some_and(|(_, ifindex, _)| ifindex != 0);
    let elsewhere = pod.filter(|(node, ..)| *node != HERE && *node != LOST && config.tunnel != 0);
    match way {
        Way::Pod(ep) => assert!(attached && pod.is_some_and(|p| p.1 == ep.ifindex), "{way:?}: {p:?}"),
        Way::Node(to) => {
            assert_eq!(elsewhere.map(|(node, ..)| world.outer[usize::from(node) - 1]), Some(*to), "{p:?}");
        }
        Way::Gateway(_) => panic!("a gateway's packet goes back to it: {p:?}"),
        Way::Drop(code) => {
            assert!(code != Code::Allowed && !attached && elsewhere.is_none(), "{way:?}: {p:?}");
        }
    }
}
