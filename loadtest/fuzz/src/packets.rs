//! Frames that pods and tunnels hand to the kernel, and the codes that the kernel hands back.

use etherparse::{LaxNetSlice, LaxSlicedPacket, TransportSlice};
use tidegate_ebpf::PacketEvent;
use tidegate_ebpf_common::code::counter_index;
use tidegate_ebpf_common::layout::{
    DnsKey, Endpoint, Fact, FactKey, FlowKey, GrantKey, Group, PortSet, Prefix, PrefixKey, Range, Scope, endpoint,
    group, iface, via,
};
use tidegate_ebpf_common::packet::{self, mark};
use tidegate_ebpf_common::{Action, Addr, Code, Decision, Hook, Outcome, Packet, Parsed, Tables, verdict};
use tidegate_policy::Reason;
use tidegate_policy::event::{Verdict, What};

/// The pod: isolated, with its two addresses, on interface 5.
const POD: [[u8; 16]; 2] = [mapped([10, 244, 1, 5]), [0xfd, 0, 0, 0x10, 2, 0x44, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5]];
const INTERFACE: u32 = 5;
const TUNNEL: u16 = 8475;

const fn mapped(a: [u8; 4]) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a[0], a[1], a[2], a[3]]
}

fn addr(octets: &[u8; 16]) -> Addr {
    Addr::from_ip(std::net::Ipv6Addr::from(*octets).into())
}

/// Addresses whose last octet is odd have a fact; 443 is inspected, 22 denied.
struct World<const G: bool> {
    pod: Endpoint,
    group: Group,
    scope: Scope,
    fact: Fact,
    ports: PortSet,
}

impl<const G: bool> World<G> {
    fn new() -> Self {
        let mut ports = PortSet::default();
        ports.ranges[0] = Range { lo: 22, hi: 22, proto: packet::proto::TCP, via: via::DENY };
        ports.ranges[1] = Range { lo: 443, hi: 443, proto: packet::proto::TCP, via: via::TLS };
        ports.ranges[2] = Range { lo: 5000, hi: 6000, proto: packet::proto::UDP, via: via::FORWARD };
        Self {
            pod: Endpoint {
                scope: 1,
                group: 1,
                node: 1,
                ifindex: INTERFACE,
                mac: [0; 6],
                flags: endpoint::TOUCHED | endpoint::ISOLATED,
                ..Endpoint::default()
            },
            group: Group { flags: group::ISOLATED, ..Group::default() },
            scope: Scope { owner: 1, ..Scope::default() },
            fact: Fact { class: 1, expires: 2_000, seen: 0 },
            ports,
        }
    }
}

fn last(a: &Addr) -> u8 {
    a.0[3].to_ne_bytes()[3]
}

fn is_node(a: &Addr) -> bool {
    *a == addr(&mapped([192, 0, 2, 1]))
}

fn is_inside(a: &Addr) -> bool {
    is_node(a) || a.is_v4() && a.head() == 0x0a60 || !a.is_v4() && a.head() == 0xfd00
}

impl<const G: bool> Tables for World<G> {
    const GATEWAY: bool = G;

    fn now_ns(&self) -> u64 {
        1_000_000_000_000
    }
    fn tunnel_port(&self) -> u16 {
        TUNNEL
    }
    fn overlay(&self, _: u16) -> bool {
        false
    }
    fn flags(&self) -> u32 {
        0
    }
    fn node_ports(&self) -> (u16, u16) {
        (30_000, 32_767)
    }
    fn interface(&self, ifindex: u32) -> u16 {
        if ifindex == INTERFACE { iface::ENDPOINT } else { 0 }
    }
    fn endpoint(&self, a: &Addr) -> Option<&Endpoint> {
        POD.iter().any(|p| addr(p) == *a).then_some(&self.pod)
    }
    fn group(&self, _: u32) -> Option<&Group> {
        Some(&self.group)
    }
    fn scope(&self, _: u32) -> Option<&Scope> {
        Some(&self.scope)
    }
    fn gateway(&self, id: u32) -> bool {
        id == 1
    }
    fn heartbeat(&self, _: u32) -> u64 {
        self.now_ns()
    }
    fn node(&self, a: &Addr) -> bool {
        is_node(a)
    }
    fn cluster(&self, key: &PrefixKey) -> bool {
        is_inside(&key.addr)
    }
    fn cluster_dns(&self, _: &DnsKey) -> bool {
        false
    }
    fn fact(&self, key: &FactKey) -> Option<&Fact> {
        (!last(&key.addr).is_multiple_of(2)).then_some(&self.fact)
    }
    fn carried(&self, _: &FactKey, _: u32) {}
    fn grant(&self, _: &GrantKey) -> Option<u32> {
        Some(1)
    }
    fn portset(&self, _: u32) -> Option<&PortSet> {
        Some(&self.ports)
    }
    fn prefix(&self, _: &PrefixKey) -> Option<&Prefix> {
        None
    }
    fn flow(&self, _: &FlowKey, _: u32) -> u32 {
        0
    }
    fn remember(&self, _: &FlowKey, _: u32, _: u32) -> bool {
        true
    }
}

/// A frame. Bit 0 of the first octet makes its source the pod's own address, so that the rest of the verdict is met too.
pub fn packet(data: &[u8]) -> bool {
    let Some((&first, rest)) = data.split_first() else { return false };
    let mut frame = rest.to_vec();
    let ethertype = frame.get(12..14).map_or(0, |b| u16::from_be_bytes([b[0], b[1]]));
    if first & 1 == 1 {
        match ethertype {
            packet::IPV4 if frame.len() >= 34 => frame[26..30].copy_from_slice(&POD[0][12..]),
            packet::IPV6 if frame.len() >= 54 => frame[22..38].copy_from_slice(&POD[1]),
            _ => {}
        }
    }
    let mut p = Packet::default();
    let parsed = packet::parse(&&frame[..], ethertype, &mut p);
    if parsed == Parsed::Ip {
        compare(&frame, &p);
    }
    let mut d = Decision::default();
    verdict(parsed, &p, INTERFACE, &World::<false>::new(), &mut d);
    check_node(parsed, &p, &d);
    verdict(parsed, &p, 1, &World::<true>::new(), &mut d);
    check_gateway(parsed, &p, &d);
    parsed == Parsed::Ip
}

/// Another parser reads the same addresses and ports, where it reads anything.
fn compare(frame: &[u8], p: &Packet) {
    let Ok(theirs) = LaxSlicedPacket::from_ethernet(frame) else { return };
    let (source, destination) = match &theirs.net {
        Some(LaxNetSlice::Ipv4(ip)) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        Some(LaxNetSlice::Ipv6(ip)) => {
            (std::net::IpAddr::from(ip.header().source_addr()), std::net::IpAddr::from(ip.header().destination_addr()))
        }
        _ => return,
    };
    assert_eq!((p.src.to_ip(), p.dst.to_ip()), (source, destination));
    // They look behind authentication headers too, where ours sees a protocol that it drops.
    let plain = matches!(p.proto, packet::proto::TCP | packet::proto::UDP);
    if !plain || p.has(mark::LATER_FRAGMENT | mark::FIRST_FRAGMENT | mark::DETOUR) {
        return;
    }
    match &theirs.transport {
        Some(TransportSlice::Tcp(t)) => {
            assert_eq!(p.proto, packet::proto::TCP);
            assert_eq!((p.sport, p.dport), (t.source_port(), t.destination_port()));
            assert_eq!(p.flags & packet::tcp::SYN != 0, t.syn());
        }
        Some(TransportSlice::Udp(u)) => {
            assert_eq!(p.proto, packet::proto::UDP);
            assert_eq!((p.sport, p.dport), (u.source_port(), u.destination_port()));
        }
        _ => {}
    }
}

fn is_ours(p: &Packet) -> bool {
    POD.iter().any(|a| addr(a) == p.src)
}

fn check_node(parsed: Parsed, p: &Packet, d: &Decision) {
    let goes = d.action != Action::Drop;
    match parsed {
        Parsed::Arp => return assert_eq!(d.action, Action::Ignore),
        Parsed::NotIp | Parsed::Malformed => return assert!(!goes, "{parsed:?} goes out"),
        Parsed::Ip => {}
    }
    if d.action == Action::Ignore {
        // Neighbour discovery, which cannot leave the link.
        let multicast = p.dst.head() == 0xff02;
        assert!(p.is_v6() && p.is_icmp() && (p.hops == 255 || multicast), "{p:?}");
        return;
    }
    if goes {
        assert!(is_ours(p), "a foreign source goes out: {p:?}");
        assert!(!p.has(mark::DETOUR), "a detour goes out: {p:?}");
        assert!(p.proto != packet::proto::UDP || p.has(mark::LATER_FRAGMENT) || p.dport != TUNNEL, "{p:?}");
    }
    if d.action == Action::Pass {
        assert!(is_inside(&p.dst), "an isolated pod reaches {:?} without a gateway", p.dst.to_ip());
    }
    if d.action == Action::Steer {
        let dns = d.via == via::DNS && p.dport == 53;
        let learnt = !last(&p.dst).is_multiple_of(2);
        assert!(dns || learnt && matches!(d.via, via::TLS | via::FORWARD), "{p:?} {d:?}");
        assert!(!p.has(mark::LATER_FRAGMENT));
    }
}

fn check_gateway(parsed: Parsed, p: &Packet, d: &Decision) {
    assert_ne!(d.action, Action::Pass, "nothing passes a gateway without being carried");
    if d.action == Action::Steer {
        assert_eq!(parsed, Parsed::Ip);
        assert!(is_ours(p), "{p:?}");
        assert!(matches!(d.via, via::DNS | via::TLS | via::FORWARD), "{d:?}");
        assert!(d.via == via::DNS || !is_inside(&p.dst), "in-cluster destinations are not carried: {p:?}");
    }
}

/// A record of the kernel's ring: it is read whole, and as what it is, or not at all.
pub fn kernel_event(data: &[u8]) -> bool {
    let at = |i: usize| data.get(i).copied().unwrap_or(u8::MAX);
    let known = (Hook::from_u8(at(40)), Outcome::from_u8(at(41)), Code::from_u8(at(42)));
    let Some(e) = PacketEvent::parse(data) else {
        let (hook, outcome, code) = known;
        assert!(data.len() != 44 || hook.is_none() || outcome.is_none() || code.is_none(), "{data:?} is refused");
        return false;
    };
    let (Some(h), Some(o), Some(c)) = known else { panic!("{e:?} out of codes that nobody knows") };
    assert_eq!(data.len(), 44);
    assert_eq!((h as u8, o as u8, c as u8), (at(40), at(41), at(42)));
    let end = |ip: usize, port: usize| {
        let octets: [u8; 16] = std::array::from_fn(|i| at(ip + i));
        // The kernel keeps IPv4 in the IPv4-mapped form.
        let ip = std::net::Ipv6Addr::from(octets);
        let ip = ip.to_ipv4_mapped().map_or(std::net::IpAddr::from(ip), Into::into);
        std::net::SocketAddr::new(ip, u16::from_ne_bytes([at(port), at(port + 1)]))
    };
    assert_eq!((e.source, e.destination), (end(0, 32), end(16, 34)));
    assert_eq!((e.hook, e.outcome, e.protocol), (h, o, at(43)));
    assert_eq!(e.ifindex, u32::from_ne_bytes([at(36), at(37), at(38), at(39)]));
    // What the record says: nobody is blamed for what passed, and a drop is never an allowed packet.
    let said = e.into_event(None);
    assert_eq!(said.verdict == Verdict::Deny, o == Outcome::Drop);
    assert_eq!(said.reason == Reason::Allowed, c == Code::Allowed);
    let What::Packet { hook, source, .. } = said.what else { panic!("{:?}", said.what) };
    assert!(!hook.is_empty() && source == e.source);
    // Counters have one place each.
    let index = counter_index(h, o, c);
    let others = (0..=u8::MAX).filter_map(Code::from_u8).filter(|x| *x != c);
    assert!(others.map(|x| counter_index(h, o, x)).all(|i| i != index));
    true
}
