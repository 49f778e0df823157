//! The kernel's maps in memory, filled from a [`NodeState`] and facts as `tidegate-ebpf` fills the real ones.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use tidegate_ebpf_common::layout::{
    CHAIN, DnsKey, Endpoint, Fact, FactKey, FlowKey, GrantKey, Group, PortSet as Entry, Prefix, PrefixKey, RANGES,
    Range, Scope, endpoint, group, iface, via,
};
use tidegate_ebpf_common::{Addr, Decision, Packet, Tables, packet, verdict};
use tidegate_policy::state::{FactUpdate, NodeState, Touch};
use tidegate_policy::{Carry, ClassKey, GroupKey, PortSet, ScopeKey, Via};

use crate::objects::TUNNEL_PORT;

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Scope,
    Group,
    Class,
    Prefixes,
    Gateway,
}

/// Dense ids; none is given twice.
#[derive(Default)]
struct Ids {
    of: HashMap<(Kind, u128), u32>,
    keys: HashMap<u32, u128>,
    last: u32,
}

impl Ids {
    fn get(&mut self, kind: Kind, key: u128) -> u32 {
        *self.of.entry((kind, key)).or_insert_with(|| {
            self.last += 1;
            self.keys.insert(self.last, key);
            self.last
        })
    }

    fn key(&self, id: u32) -> u128 {
        self.keys.get(&id).copied().unwrap_or_default()
    }

    fn named(&mut self, kind: Kind, name: &str) -> u32 {
        self.get(kind, tidegate_policy::key::KeyHasher::new("model").field(name.as_bytes()).finish())
    }
}

/// One machine's maps. `G`: a gateway's.
#[derive(Default)]
pub struct Kernel<const G: bool> {
    /// Now, on the clock since boot.
    pub now: Duration,
    ids: Ids,
    endpoints: HashMap<Addr, Endpoint>,
    interfaces: HashMap<u32, u16>,
    groups: HashMap<u32, Group>,
    scopes: HashMap<u32, Scope>,
    gateways: BTreeMap<u32, String>,
    heartbeats: HashMap<u32, Duration>,
    nodes: BTreeSet<Addr>,
    cluster: Vec<IpNet>,
    node_ports: (u16, u16),
    facts: HashMap<FactKey, Fact>,
    grants: HashMap<GrantKey, u32>,
    portsets: Vec<Entry>,
    prefixes: HashMap<u32, BTreeMap<IpNet, Prefix>>,
}

/// The interface of a pod's address.
pub fn ifindex(ip: IpAddr) -> u32 {
    let Addr(w) = Addr::from_ip(ip);
    // The host's part of both families is the pod's number on its node.
    100 + (u32::from_be(w[3]) & 0xff) + (u32::from(ip.is_ipv6()) << 8)
}

fn code(v: Via) -> u8 {
    match v {
        Via::Allow(Carry::Forward) => via::FORWARD,
        Via::Allow(Carry::Tls) => via::TLS,
        Via::Allow(Carry::Block) => via::BLOCK,
        Via::Deny => via::DENY,
        Via::Pass => via::PASS,
    }
}

impl<const G: bool> Kernel<G> {
    /// Empty maps.
    pub fn new(now: Duration) -> Self {
        Self { now, ..Self::default() }
    }

    /// Writes a port set in chained entries; gives its id, 0 for the empty set.
    fn intern(&mut self, set: &PortSet) -> u32 {
        let ranges: Vec<Range> =
            set.ranges().iter().map(|r| Range { lo: r.lo, hi: r.hi, proto: r.proto as u8, via: code(r.via) }).collect();
        assert!(ranges.len() <= CHAIN * RANGES, "a port set fits its chain");
        let first = self.portsets.len() as u32;
        let chunks = ranges.chunks(RANGES).count();
        for (i, chunk) in ranges.chunks(RANGES).enumerate() {
            let next = if i + 1 < chunks { first + i as u32 + 1 } else { 0 };
            let mut entry = Entry { next, ..Entry::default() };
            entry.ranges[..chunk.len()].copy_from_slice(chunk);
            self.portsets.push(entry);
        }
        if chunks == 0 { 0 } else { first }
    }

    /// Holds `state` and nothing else but facts; `local` are the addresses of this machine's pods, `silent` the gateways
    /// that others stand in for.
    pub fn apply(&mut self, state: &NodeState, node: &str, local: &BTreeSet<IpAddr>, silent: &BTreeSet<String>) {
        self.portsets = vec![Entry::default()];
        self.cluster.clone_from(&state.cluster.prefixes);
        self.node_ports = state.cluster.node_ports.unwrap_or((1, 0));
        self.nodes = state.nodes.values().flat_map(|n| &n.addresses).map(|a| Addr::from_ip(*a)).collect();
        self.gateways = state.gateways.keys().map(|g| (self.ids.named(Kind::Gateway, g), g.clone())).collect();
        self.prefixes.clear();
        for (key, prefixes) in &state.prefixes {
            let id = self.ids.get(Kind::Prefixes, key.0);
            let set = prefixes
                .iter()
                .map(|(net, ports)| (*net, Prefix { ports: self.intern(ports), len: u32::from(net.prefix_len()) }));
            let set = set.collect();
            self.prefixes.insert(id, set);
        }
        self.scopes.clear();
        for (key, scope) in &state.scopes {
            let owner = self.ids.named(Kind::Gateway, &scope.owner);
            let speaks = |g: &&String| !silent.contains(*g) && state.gateways.contains_key(*g);
            let answers = std::iter::once(&scope.owner).chain(&scope.standbys).find(speaks);
            let dns = answers.map_or(owner, |g| self.ids.named(Kind::Gateway, g));
            self.scopes.insert(self.ids.get(Kind::Scope, key.0), Scope { owner, pair: scope.pair.into(), dns });
        }
        self.groups.clear();
        for (key, g) in &state.groups {
            let mut flags = if g.isolated { group::ISOLATED } else { 0 };
            flags |= if g.audit { group::AUDIT } else { 0 };
            let mut set = |k: Option<tidegate_policy::PrefixSetKey>| k.map_or(0, |k| self.ids.get(Kind::Prefixes, k.0));
            let value = Group { flags, admin: set(g.admin), own: set(g.own), drain: 0 };
            self.groups.insert(self.ids.get(Kind::Group, key.0), value);
        }
        self.grants.clear();
        for ((g, c), ports) in &state.grants {
            let key = GrantKey { group: self.ids.get(Kind::Group, g.0), class: self.ids.get(Kind::Class, c.0) };
            let set = self.intern(ports);
            self.grants.insert(key, set);
        }
        self.endpoints.clear();
        self.interfaces.clear();
        for (ip, e) in &state.endpoints {
            let flags = match e.touch {
                Touch::Untouched => 0,
                Touch::Guarded => endpoint::TOUCHED,
                Touch::Isolated => endpoint::TOUCHED | endpoint::ISOLATED,
            };
            let (scope, group) = match e.member {
                Some((s, g)) => (self.ids.get(Kind::Scope, s.0), self.ids.get(Kind::Group, g.0)),
                None => (0, 0),
            };
            let ifindex = if e.node == node && local.contains(ip) { ifindex(*ip) } else { 0 };
            let value = Endpoint { scope, group, node: 1, ifindex, mac: [0; 6], flags, ..Endpoint::default() };
            self.endpoints.insert(Addr::from_ip(*ip), value);
            if ifindex != 0 {
                self.interfaces.insert(ifindex, if flags == 0 { iface::UNTOUCHED } else { iface::ENDPOINT });
            }
        }
    }

    /// Writes facts, as the datapath does.
    pub fn facts(&mut self, updates: &[FactUpdate]) {
        for u in updates {
            let key = FactKey { scope: self.ids.get(Kind::Scope, u.scope.0), addr: Addr::from_ip(u.ip) };
            let Some(value) = &u.value else {
                self.facts.remove(&key);
                continue;
            };
            let end =
                if value.ttl.is_zero() { self.now } else { self.now + value.ttl + Duration::from_nanos(999_999_999) };
            let expires = end.as_secs() as u32;
            let class = self.ids.get(Kind::Class, value.class.0);
            self.facts.insert(key, Fact { class, expires, seen: 0 });
        }
    }

    /// Adds grants.
    pub fn grants(&mut self, grants: &[(GroupKey, ClassKey, PortSet)]) {
        for (g, c, ports) in grants {
            let key = GrantKey { group: self.ids.get(Kind::Group, g.0), class: self.ids.get(Kind::Class, c.0) };
            let set = self.intern(ports);
            self.grants.insert(key, set);
        }
    }

    /// The facts that it holds.
    pub fn held(&self) -> impl Iterator<Item = (ScopeKey, IpAddr, ClassKey)> {
        let key = |id| self.ids.key(id);
        self.facts.iter().map(move |(k, f)| (ScopeKey(key(k.scope)), k.addr.to_ip(), ClassKey(key(f.class))))
    }

    /// The facts that it holds, with when they expire in seconds.
    pub fn lives(&self) -> impl Iterator<Item = ((ScopeKey, IpAddr), u64)> {
        self.facts.iter().map(|(k, f)| ((ScopeKey(self.ids.key(k.scope)), k.addr.to_ip()), f.expires.into()))
    }

    /// Forgets other facts.
    pub fn retain_facts(&mut self, keep: impl Fn(ScopeKey, IpAddr) -> bool) {
        let ids = &self.ids;
        self.facts.retain(|k, _| keep(ScopeKey(ids.key(k.scope)), k.addr.to_ip()));
    }

    /// Forgets what expired a day ago.
    pub fn sweep(&mut self) {
        let now = self.now.as_secs();
        self.facts.retain(|_, f| now.saturating_sub(f.expires.into()) <= 24 * 3600);
    }

    /// The gateway with this id.
    pub fn gateway_name(&self, id: u32) -> Option<&str> {
        self.gateways.get(&id).map(String::as_str)
    }

    /// A sign of life of a gateway.
    pub fn heartbeat(&mut self, gateway: &str) {
        let id = self.ids.named(Kind::Gateway, gateway);
        self.heartbeats.insert(id, self.now);
    }

    /// The verdict on a frame that enters by an interface.
    pub fn decide(&self, frame: &[u8], ifindex: u32) -> Decision {
        let ethertype = frame.get(12..14).map_or(0, |b| u16::from_be_bytes([b[0], b[1]]));
        let (mut p, mut d) = (Packet::default(), Decision::default());
        let parsed = packet::parse(&frame, ethertype, &mut p);
        verdict(parsed, &p, ifindex, self, &mut d);
        d
    }
}

fn nanos(d: Duration) -> u64 {
    d.as_nanos() as u64
}

impl<const G: bool> Tables for Kernel<G> {
    const GATEWAY: bool = G;

    fn now_ns(&self) -> u64 {
        nanos(self.now)
    }
    fn tunnel_port(&self) -> u16 {
        TUNNEL_PORT
    }
    fn overlay(&self, _: u16) -> bool {
        false
    }
    fn flags(&self) -> u32 {
        0
    }
    fn node_ports(&self) -> (u16, u16) {
        self.node_ports
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
        self.heartbeats.get(&id).map_or(0, |d| nanos(*d))
    }
    fn node(&self, addr: &Addr) -> bool {
        self.nodes.contains(addr)
    }
    fn cluster(&self, key: &PrefixKey) -> bool {
        let ip = key.addr.to_ip();
        self.cluster.iter().any(|n| n.contains(&ip))
    }
    fn cluster_dns(&self, _: &DnsKey) -> bool {
        false
    }
    fn fact(&self, key: &FactKey) -> Option<&Fact> {
        self.facts.get(key)
    }
    fn carried(&self, _: &FactKey, _: u32) {}
    fn grant(&self, key: &GrantKey) -> Option<u32> {
        self.grants.get(key).copied()
    }
    fn portset(&self, id: u32) -> Option<&Entry> {
        self.portsets.get(id as usize)
    }
    fn prefix(&self, key: &PrefixKey) -> Option<&Prefix> {
        let ip = key.addr.to_ip();
        let set = self.prefixes.get(&(key.set / 2))?;
        set.iter().filter(|(net, _)| net.contains(&ip)).max_by_key(|(net, _)| net.prefix_len()).map(|(_, p)| p)
    }
    fn flow(&self, _: &FlowKey, _: u32) -> u32 {
        0
    }
    fn remember(&self, _: &FlowKey, _: u32, _: u32) -> bool {
        true
    }
}

/// A frame with one segment or datagram of an address to another of the same family.
pub fn frame(source: IpAddr, destination: IpAddr, proto: u8, port: u16, syn: bool) -> Vec<u8> {
    let mut l4 = Vec::with_capacity(20);
    l4.extend_from_slice(&40_000u16.to_be_bytes());
    l4.extend_from_slice(&port.to_be_bytes());
    if proto == packet::proto::TCP {
        l4.extend_from_slice(&[0; 8]);
        l4.extend_from_slice(&[5 << 4, if syn { packet::tcp::SYN } else { packet::tcp::ACK }, 1, 0, 0, 0, 0, 0]);
    } else {
        l4.extend_from_slice(&[0, 8, 0, 0]);
    }
    let mut out = vec![2; packet::ETH as usize - 2];
    match (source, destination) {
        (IpAddr::V4(s), IpAddr::V4(d)) => {
            out.extend_from_slice(&packet::IPV4.to_be_bytes());
            out.extend_from_slice(&[0x45, 0]);
            out.extend_from_slice(&(20 + l4.len() as u16).to_be_bytes());
            out.extend_from_slice(&[0, 0, 0x40, 0, 64, proto, 0, 0]);
            out.extend_from_slice(&s.octets());
            out.extend_from_slice(&d.octets());
        }
        (s, d) => {
            let v6 = |ip: IpAddr| match ip {
                IpAddr::V4(a) => a.to_ipv6_mapped().octets(),
                IpAddr::V6(a) => a.octets(),
            };
            out.extend_from_slice(&packet::IPV6.to_be_bytes());
            out.extend_from_slice(&[0x60, 0, 0, 0]);
            out.extend_from_slice(&(l4.len() as u16).to_be_bytes());
            out.extend_from_slice(&[proto, 64]);
            out.extend_from_slice(&v6(s));
            out.extend_from_slice(&v6(d));
        }
    }
    out.extend_from_slice(&l4);
    out
}
