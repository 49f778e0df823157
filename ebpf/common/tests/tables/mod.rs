//! Tables in memory, and packets made by etherparse.
#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use etherparse::{IpNumber, PacketBuilder, TcpHeader};
use tidegate_ebpf_common::layout::*;
use tidegate_ebpf_common::packet::{self, Packet, Parsed};
use tidegate_ebpf_common::{Addr, Decision, Tables, names, verdict};

/// A second of the coarse clock at which tests start.
pub const NOW: u32 = 1_000;

#[derive(Default)]
pub struct Memory<const G: bool> {
    pub now_ns: Cell<u64>,
    pub flags: u32,
    pub interfaces: HashMap<u32, u16>,
    pub endpoints: HashMap<Addr, Endpoint>,
    pub groups: HashMap<u32, Group>,
    pub scopes: HashMap<u32, Scope>,
    pub gateways: HashMap<u32, u64>,
    pub nodes: HashSet<Addr>,
    pub cluster: Vec<(IpAddr, u32)>,
    pub cluster_dns: HashSet<(Addr, u32)>,
    pub facts: HashMap<(u32, Addr), Fact>,
    pub carried: RefCell<HashSet<(u32, Addr)>>,
    pub grants: HashMap<(u32, u32), u32>,
    pub portsets: HashMap<u32, PortSet>,
    pub prefixes: Vec<(u32, IpAddr, u32, Prefix)>,
    pub flows: RefCell<HashMap<FlowKey, Flow>>,
    pub budget: usize,
    pub naming: Naming,
    pub names: HashMap<u64, u32>,
    /// The frame that is being judged.
    pub frame: RefCell<Vec<u8>>,
}

fn matches(net: IpAddr, len: u32, addr: &Addr) -> bool {
    let bits = |a: IpAddr| match a {
        IpAddr::V4(a) => (u128::from(a.to_bits()) << 96, 4),
        IpAddr::V6(a) => (a.to_bits(), 6),
    };
    let ((a, fa), (b, fb)) = (bits(net), bits(addr.to_ip()));
    fa == fb && (len == 0 || a >> (128 - len) == b >> (128 - len))
}

impl<const G: bool> Tables for Memory<G> {
    const GATEWAY: bool = G;
    fn now_ns(&self) -> u64 {
        self.now_ns.get()
    }
    fn tunnel_port(&self) -> u16 {
        8475
    }
    fn overlay(&self, port: u16) -> bool {
        matches!(port, 4789 | 8472 | 51_820)
    }
    fn flags(&self) -> u32 {
        self.flags
    }
    fn node_ports(&self) -> (u16, u16) {
        (30_000, 32_767)
    }
    fn interface(&self, ifindex: u32) -> u16 {
        self.interfaces.get(&ifindex).copied().unwrap_or(0)
    }
    fn endpoint(&self, addr: &Addr) -> Option<&Endpoint> {
        self.endpoints.get(addr)
    }
    fn group(&self, id: u32) -> Option<&Group> {
        self.groups.get(&id)
    }
    fn scope(&self, id: u32) -> Option<&Scope> {
        self.scopes.get(&id)
    }
    fn gateway(&self, id: u32) -> bool {
        self.gateways.contains_key(&id)
    }
    fn heartbeat(&self, id: u32) -> u64 {
        self.gateways.get(&id).copied().unwrap_or(0)
    }
    fn node(&self, addr: &Addr) -> bool {
        self.nodes.contains(addr)
    }
    fn cluster(&self, key: &PrefixKey) -> bool {
        self.cluster.iter().any(|(net, len)| matches(*net, *len, &key.addr))
    }
    fn cluster_dns(&self, key: &DnsKey) -> bool {
        self.cluster_dns.contains(&(key.addr, key.port))
    }
    fn asks(&self, p: &Packet) -> u32 {
        let known = |hash| self.names.get(&hash).copied().unwrap_or(0);
        names::ask(&self.frame.borrow().as_slice(), p.l4, packet::ETH + p.length, &self.naming, known)
    }
    fn fact(&self, key: &FactKey) -> Option<&Fact> {
        self.facts.get(&(key.scope, key.addr))
    }
    fn carried(&self, key: &FactKey, _: u32) {
        self.carried.borrow_mut().insert((key.scope, key.addr));
    }
    fn grant(&self, key: &GrantKey) -> Option<u32> {
        self.grants.get(&(key.group, key.class)).copied()
    }
    fn portset(&self, id: u32) -> Option<&PortSet> {
        self.portsets.get(&id)
    }
    fn prefix(&self, key: &PrefixKey) -> Option<&Prefix> {
        let fits =
            |(set, net, len, _): &&(u32, IpAddr, u32, Prefix)| *set == key.set / 2 && matches(*net, *len, &key.addr);
        self.prefixes.iter().filter(fits).max_by_key(|p| p.2).map(|p| &p.3)
    }
    fn flow(&self, key: &FlowKey, now: u32) -> u32 {
        self.flows.borrow_mut().get_mut(key).map_or(0, |f| {
            f.seen = now;
            f.flags
        })
    }
    fn remember(&self, key: &FlowKey, flags: u32, now: u32) -> bool {
        let mut flows = self.flows.borrow_mut();
        if !flows.contains_key(key) && flows.len() >= self.budget {
            return false;
        }
        let flow = flows.entry(*key).or_default();
        flow.seen = now;
        flow.flags |= flags;
        true
    }
}

pub fn addr(ip: &str) -> Addr {
    Addr::from_ip(ip.parse().unwrap())
}

pub fn range(proto: u8, lo: u16, hi: u16, via: u8) -> Range {
    Range { lo, hi, proto, via }
}

pub fn set(ranges: &[Range]) -> PortSet {
    let mut s = PortSet::default();
    s.ranges[..ranges.len()].copy_from_slice(ranges);
    s
}

/// The pods of the world: isolated, guarded and audited, each on its interface.
pub const ISOLATED: (&str, &str, u32) = ("10.244.1.5", "fd00:10:244::5", 5);
pub const GUARDED: (&str, &str, u32) = ("10.244.1.6", "fd00:10:244::6", 6);
pub const AUDITED: (&str, &str, u32) = ("10.244.1.7", "fd00:10:244::7", 7);
pub const UNTOUCHED: u32 = 8;

/// Scope 1, groups 1 to 3, gateway 1, class 1 with grants, prefix sets 1 (admin) and 2 (own).
pub fn world<const G: bool>() -> Memory<G> {
    let mut m = Memory::<G> { budget: 100, ..Memory::default() };
    m.now_ns.set(u64::from(NOW) * 1_000_000_000);
    m.gateways.insert(1, m.now_ns.get());
    m.scopes.insert(1, Scope { owner: 1, pair: 0, dns: 1 });
    let pods = [
        (ISOLATED, 1, endpoint::TOUCHED | endpoint::ISOLATED, group::ISOLATED),
        (GUARDED, 2, endpoint::TOUCHED, 0),
        (AUDITED, 3, endpoint::TOUCHED | endpoint::ISOLATED, group::ISOLATED | group::AUDIT),
    ];
    for ((v4, v6, ifindex), g, flags, group_flags) in pods {
        for ip in [v4, v6] {
            let place = Endpoint { scope: 1, group: g, node: 1, ifindex, flags, ..Endpoint::default() };
            m.endpoints.insert(addr(ip), place);
        }
        m.interfaces.insert(ifindex, iface::ENDPOINT);
        m.groups.insert(g, Group { flags: group_flags, admin: 1, own: 2, drain: 0 });
        m.grants.insert((g, 1), 1);
    }
    m.interfaces.insert(UNTOUCHED, iface::UNTOUCHED);
    m.cluster.push(("10.244.0.0".parse().unwrap(), 16));
    m.cluster.push(("fd00:10:244::".parse().unwrap(), 56));
    m.nodes.insert(addr("192.0.2.1"));
    m.cluster_dns.insert((addr("10.244.1.53"), 5353));
    for ip in ["198.51.100.1", "2001:db8::1"] {
        m.facts.insert((1, addr(ip)), Fact { class: 1, expires: NOW + 60, seen: 0 });
    }
    m.portsets.insert(
        1,
        set(&[
            range(6, 80, 80, via::DENY),
            range(6, 443, 443, via::TLS),
            range(6, 5432, 5439, via::FORWARD),
            range(17, 443, 443, via::BLOCK),
            range(17, 4500, 4500, via::FORWARD),
        ]),
    );
    m
}

/// An IP address pair of one family.
pub fn ends(source: &str, destination: &str) -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
    let eth = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    match (source.parse().unwrap(), destination.parse().unwrap()) {
        (IpAddr::V4(s), IpAddr::V4(d)) => eth.ipv4(s.octets(), d.octets(), 64),
        (IpAddr::V6(s), IpAddr::V6(d)) => eth.ipv6(s.octets(), d.octets(), 64),
        _ => panic!("two families"),
    }
}

pub fn tcp(source: &str, destination: &str, port: u16, syn: bool) -> Vec<u8> {
    let mut header = TcpHeader::new(40_000, port, 1, 1_000);
    header.syn = syn;
    header.ack = !syn;
    let mut out = Vec::new();
    ends(source, destination).tcp_header(header).write(&mut out, &[]).unwrap();
    out
}

pub fn udp(source: &str, destination: &str, port: u16) -> Vec<u8> {
    let mut out = Vec::new();
    ends(source, destination).udp(40_000, port).write(&mut out, b"payload").unwrap();
    out
}

pub fn raw(source: &str, destination: &str, proto: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    // The builder wants to fill extension headers itself, so the number is set afterwards.
    ends(source, destination).write(&mut out, IpNumber(253), payload).unwrap();
    let at = if ethertype(&out) == packet::IPV4 { 14 + 9 } else { 14 + 6 };
    out[at] = proto;
    out
}

pub fn ethertype(frame: &[u8]) -> u16 {
    frame.get(12..14).map_or(0, |b| u16::from_be_bytes([b[0], b[1]]))
}

pub fn decide<const G: bool>(m: &Memory<G>, frame: &[u8], ifindex: u32) -> Decision {
    *m.frame.borrow_mut() = frame.to_vec();
    let mut p = Packet::default();
    let parsed: Parsed = packet::parse(&frame, ethertype(frame), &mut p);
    let mut d = Decision::default();
    verdict(parsed, &p, ifindex, m, &mut d);
    d
}
