//! Keys and values of the kernel maps. No type has implicit padding; a change
//! of any of them is a new [`VERSION`].

use core::net::IpAddr;

/// Version of the layouts; part of the pin path, so that two versions live side by side during an upgrade.
pub const VERSION: u32 = 4;

/// Version of what an upgrade takes over from the maps before it: [`Addr`], [`Endpoint`], [`FactKey`], [`Fact`],
/// [`FlowKey`], [`Flow`], [`IdKey`], [`Budget`] and the places of counters. A change of one of these is a new one, and
/// flows do not survive that upgrade.
pub const CARRIED: u32 = 1;

/// An IP address as sixteen octets in network order; IPv4 is mapped (`::ffff:a.b.c.d`,
/// RFC 4291, section 2.5.5.2). The words hold the octets as they lie in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct Addr(pub [u32; 4]);

/// The third word of a mapped IPv4 address.
const MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

impl Addr {
    /// From an IPv4 address's octets, read as a native word.
    #[inline(always)]
    pub const fn v4(word: u32) -> Self {
        Self([0, 0, MAPPED, word])
    }

    /// Whether this is a mapped IPv4 address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == MAPPED
    }

    /// The first sixteen bits of an IPv6 address, or of the IPv4 address.
    #[inline(always)]
    pub const fn head(&self) -> u16 {
        let word = if self.is_v4() { self.0[3] } else { self.0[0] };
        (u32::from_be(word) >> 16) as u16
    }

    /// From the standard type.
    pub const fn from_ip(ip: IpAddr) -> Self {
        let o = match ip {
            IpAddr::V4(a) => a.to_ipv6_mapped().octets(),
            IpAddr::V6(a) => a.octets(),
        };
        Self([
            u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
            u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
            u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
            u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
        ])
    }

    /// To the standard type; a mapped address is IPv4.
    pub fn to_ip(self) -> IpAddr {
        let mut o = [0; 16];
        for (to, word) in o.chunks_exact_mut(4).zip(self.0) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        core::net::Ipv6Addr::from(o).to_canonical()
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        Self::from_ip(ip)
    }
}

/// Offsets in this kernel's `struct sk_buff`, in octets; a global of the programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SkbOffsets {
    /// The octet that holds `ip_summed`.
    pub summed: u32,
    /// The lower of its two bits.
    pub summed_shift: u32,
    /// `csum_start`; `csum_offset` follows.
    pub csum: u32,
    /// `head`; `data` follows.
    pub head: u32,
}

/// `CONFIG[0]`: what the whole machine shares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Config {
    /// [`config`] flags.
    pub flags: u32,
    /// First port on node addresses that is not part of the cluster set; above `node_port_hi` if there is none.
    pub node_port_lo: u16,
    /// Last such port.
    pub node_port_hi: u16,
    /// The tunnel device, 0 if there is none.
    pub tunnel: u32,
    /// Node side of the plugged gateway's pod-facing veth, 0 if there is none.
    pub tgq: u32,
    /// Node side of the plugged gateway's uplink-facing veth, 0 if there is none.
    pub tgh: u32,
    /// This node's id.
    pub node: u32,
}

/// Flags of [`Config`].
pub mod config {
    /// Packets of unknown pods are dropped.
    pub const DROP_UNKNOWN: u32 = 1;
    /// ICMP echo to allowed destinations is steered.
    pub const PING: u32 = 2;
}

/// Value of `ENDPOINTS {Addr}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Endpoint {
    /// Its scope, 0 for an untouched endpoint.
    pub scope: u32,
    /// Its group, 0 for an untouched endpoint.
    pub group: u32,
    /// Its node.
    pub node: u32,
    /// Its host-side interface on this node, 0 elsewhere.
    pub ifindex: u32,
    /// Its MAC address, zero if not known.
    pub mac: [u8; 6],
    /// [`endpoint`] flags.
    pub flags: u16,
    /// Another number for every pod that has the address after another: flows of the earlier one are not its.
    pub incarnation: u32,
}

/// Flags of [`Endpoint`].
pub mod endpoint {
    /// A policy selects it.
    pub const TOUCHED: u16 = 1;
    /// Default deny.
    pub const ISOLATED: u16 = 2;
}

/// Value of `IFACES {ifindex}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Iface {
    /// One of [`iface`].
    pub kind: u16,
    /// The device's own MAC address; set for uplinks.
    pub mac: [u8; 6],
}

/// Kinds of [`Iface`].
pub mod iface {
    /// Of an endpoint that a policy selects.
    pub const ENDPOINT: u16 = 1;
    /// Of an untouched endpoint.
    pub const UNTOUCHED: u16 = 2;
    /// An uplink.
    pub const UPLINK: u16 = 3;
    /// Another that leads to pods of this node: a bridge of theirs, a second interface.
    pub const INSIDE: u16 = 4;
    /// A tunnel of the network plugin: what enters by it is another node's.
    pub const TUNNEL: u16 = 5;
}

/// Value of `GROUPS {id}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Group {
    /// [`group`] flags.
    pub flags: u32,
    /// Prefix set of cluster policies, 0 for none.
    pub admin: u32,
    /// Prefix set of the namespace's own policies, 0 for none.
    pub own: u32,
    /// Until then (seconds) flows that passed in audit still pass after the group left audit.
    pub drain: u32,
}

/// Flags of [`Group`].
pub mod group {
    /// Default deny.
    pub const ISOLATED: u32 = 1;
    /// Would-be denies pass and are reported.
    pub const AUDIT: u32 = 2;
}

/// Value of `SCOPES {id}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Scope {
    /// The gateway that owns it.
    pub owner: u32,
    /// Index of the egress pair at the owner; below 256.
    pub pair: u32,
    /// The gateway that answers its DNS: the owner, or a stand-in while that is silent; 0 while all are.
    pub dns: u32,
}

/// Value of `GATEWAYS {id}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Gateway {
    /// Its node.
    pub node: u32,
    /// Node side of its pod-facing veth if it is plugged in on this node, else 0.
    pub tgq: u32,
}

/// Value of `NODES {Addr}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Node {
    /// The node's id.
    pub id: u32,
    /// [`node`] flags.
    pub flags: u32,
}

/// Flags of [`Node`].
pub mod node {
    /// A gateway runs on it.
    pub const GATEWAY: u32 = 1;
}

/// Key of `FACTS`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct FactKey {
    /// The scope that learnt it.
    pub scope: u32,
    /// The address.
    pub addr: Addr,
}

/// Value of `FACTS`; times are seconds of the coarse monotonic clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Fact {
    /// The class of the address.
    pub class: u32,
    /// New flows may start before this second.
    pub expires: u32,
    /// When it last carried a packet, 0 if never; kept by gateways only.
    pub seen: u32,
}

/// Key of `GRANTS`; the value is a port set's id.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct GrantKey {
    /// The group.
    pub group: u32,
    /// The class.
    pub class: u32,
}

/// The most ports of overlays.
pub const OVERLAYS: usize = 8;

/// Ranges per entry of `PORTSETS`.
pub const RANGES: usize = 8;
/// Entries that one port set may chain.
pub const CHAIN: usize = 8;

/// An inclusive range of ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct Range {
    /// First port.
    pub lo: u16,
    /// Last port.
    pub hi: u16,
    /// IP protocol number, or [`crate::packet::proto::OTHER`].
    pub proto: u8,
    /// One of [`via`]; [`via::NONE`] ends the set.
    pub via: u8,
}

/// What a range says.
pub mod via {
    /// Nothing.
    pub const NONE: u8 = 0;
    /// Routed and source-NATed by the gateway.
    pub const FORWARD: u8 = 1;
    /// Relayed after the SNI check.
    pub const TLS: u8 = 2;
    /// Refused with an answer by the gateway.
    pub const BLOCK: u8 = 3;
    /// To the gateway's DNS server; never in a port set.
    pub const DNS: u8 = 4;
    /// Denied.
    pub const DENY: u8 = 5;
    /// Keeps the CNI's path.
    pub const PASS: u8 = 6;
}

/// Entry of `PORTSETS`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PortSet {
    /// The entry that goes on, 0 for none.
    pub next: u32,
    /// The ranges.
    pub ranges: [Range; RANGES],
}

/// Data of the LPM keys of `PREFIXES` and `CLUSTER`. The lookup length is 160 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct PrefixKey {
    /// The prefix set's id times two, plus one for IPv6: `::/0` must not hold for mapped IPv4.
    pub set: u32,
    /// The address.
    pub addr: Addr,
}

/// Key of the set `set` for `addr`.
#[inline(always)]
pub const fn prefix_key(set: u32, addr: Addr) -> PrefixKey {
    PrefixKey { set: set.wrapping_mul(2) | !addr.is_v4() as u32, addr }
}

/// Bits of an LPM key in front of the address's own prefix: set id, and the mapping of IPv4.
pub const fn prefix_bits(v4: bool) -> u32 {
    if v4 { 32 + 96 } else { 32 }
}

/// Bits of a whole LPM key.
pub const PREFIX_BITS: u32 = 160;

/// Value of `PREFIXES`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Prefix {
    /// The port set's id.
    pub ports: u32,
    /// Length of the matched prefix in the address's own family.
    pub len: u32,
}

/// Key of `CLUSTER_DNS`; the value is 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct DnsKey {
    /// The server's address.
    pub addr: Addr,
    /// Its port.
    pub port: u32,
}

/// Words of the longest name on the wire (RFC 1035, section 2.3.4: 255 octets).
pub const NAME_WORDS: usize = 32;
/// Words of the longest suffix on the wire. They lie inside what precedes a name: Ethernet, IPv4, UDP and DNS.
pub const SUFFIX_WORDS: usize = 5;
/// The most suffixes of the cluster.
pub const SUFFIXES: usize = 4;

/// `NAMING[0]`: how the cluster's names are told from others. The keys of `NAMES` are their hashes, its values
/// [`crate::names::named`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Naming {
    /// The key of the hashes; chosen at random, never zero.
    pub key: [u64; 2],
    /// The cluster's suffixes.
    pub suffixes: [Suffix; SUFFIXES],
}

/// A suffix on the wire, its last octet in the last place; as little-endian words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Suffix {
    /// Ones where it has octets; zero if there is none.
    pub mask: [u64; SUFFIX_WORDS],
    /// Its octets in lower case.
    pub text: [u64; SUFFIX_WORDS],
}

impl Suffix {
    /// From text; `None` if it is no name or too long.
    pub fn new(name: &str) -> Option<Self> {
        let mut octets = [0; 8 * NAME_WORDS];
        let length = crate::names::wire(name, &mut octets)?;
        let (mut mask, mut text) = ([0u8; 8 * SUFFIX_WORDS], [0u8; 8 * SUFFIX_WORDS]);
        let from = mask.len().checked_sub(length)?;
        mask[from..].fill(0xff);
        text[from..].copy_from_slice(&octets[..length]);
        let words = |octets: [u8; 8 * SUFFIX_WORDS]| {
            core::array::from_fn(|i| u64::from_le_bytes(core::array::from_fn(|j| octets[8 * i + j])))
        };
        Some(Self { mask: words(mask), text: words(text) })
    }
}

/// Key of `FLOWS`, as seen from the pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct FlowKey {
    /// The pod's address.
    pub pod: Addr,
    /// The other side.
    pub peer: Addr,
    /// The pod's port, or the echo identifier.
    pub pod_port: u16,
    /// The other side's port, 0 for echo.
    pub peer_port: u16,
    /// IP protocol number.
    pub proto: u32,
    /// [`Endpoint::incarnation`] of the pod.
    pub incarnation: u32,
}

/// Value of `FLOWS`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Flow {
    /// When a packet of the pod was last seen (seconds).
    pub seen: u32,
    /// [`flow`] flags.
    pub flags: u32,
}

/// Flags of [`Flow`].
pub mod flow {
    /// Opened from outside.
    pub const OUTSIDE: u32 = 1;
    /// Passed in audit.
    pub const AUDIT: u32 = 2;
    /// A steered UDP flow.
    pub const STEERED: u32 = 4;
    /// The pod answered.
    pub const ANSWERED: u32 = 8;
}

/// Record of `EVENTS`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Event {
    /// Source.
    pub src: Addr,
    /// Destination.
    pub dst: Addr,
    /// Source port, ICMP type, or 0.
    pub sport: u16,
    /// Destination port, ICMP code, or 0.
    pub dport: u16,
    /// The interface of the hook.
    pub ifindex: u32,
    /// A [`crate::Hook`].
    pub hook: u8,
    /// A [`crate::Outcome`].
    pub outcome: u8,
    /// A [`crate::Code`].
    pub code: u8,
    /// IP protocol number.
    pub proto: u8,
}

/// Value of `BUDGETS`: per CPU, what the current window has used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Budget {
    /// The window: coarse nanoseconds without their lower [`WINDOW_BITS`].
    pub window: u64,
    /// Events in it.
    pub used: u64,
    /// Events suppressed since the start.
    pub suppressed: u64,
}

/// Length of an event window: 2^27 ns, about 134 ms.
pub const WINDOW_BITS: u32 = 27;
/// Events per window and CPU, for each of the two budgets.
pub const WINDOW_EVENTS: u64 = 64;

/// Identities in `IDS`: which dense id a 128-bit key has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct IdKey {
    /// One of the host's kinds.
    pub kind: u32,
    /// The key.
    pub key: [u32; 4],
}

/// Virtual network identifier of packets on their way to a gateway.
pub const VNI_TO_GATEWAY: u32 = 1;
/// Virtual network identifier of packets on their way from a gateway to a pod.
pub const VNI_TO_POD: u32 = 2;

/// Age of a heartbeat from which misses are steered, in nanoseconds.
pub const STALE_NS: u64 = 2_000_000_000;

#[cfg(feature = "user")]
mod pod {
    #![allow(unsafe_code)]
    use super::*;

    macro_rules! pod {
        ($($t:ty),* $(,)?) => {
            // SAFETY: each is `repr(C)`, `Copy`, made of integers only and without padding.
            $(unsafe impl aya::Pod for $t {})*
        };
    }
    pod!(
        Addr, Config, Endpoint, Iface, Group, Scope, Gateway, Node, FactKey, Fact, GrantKey, PortSet, PrefixKey,
        Prefix, DnsKey, FlowKey, Flow, Budget, IdKey, Naming, SkbOffsets,
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_have_no_padding() {
        assert_eq!(size_of::<Config>(), 4 + 4 + 16);
        assert_eq!(size_of::<Endpoint>(), 16 + 6 + 2 + 4);
        assert_eq!(size_of::<Iface>(), 8);
        assert_eq!(size_of::<FactKey>(), 20);
        assert_eq!(size_of::<PortSet>(), 4 + RANGES * 6);
        assert_eq!(size_of::<FlowKey>(), 44);
        assert_eq!(size_of::<Event>(), 44);
        assert_eq!(size_of::<PrefixKey>(), 20);
        assert_eq!(size_of::<DnsKey>(), 20);
        assert_eq!(size_of::<IdKey>(), 20);
        assert_eq!(size_of::<Naming>(), 16 + SUFFIXES * 2 * 8 * SUFFIX_WORDS);
    }

    #[test]
    fn families_do_not_mix() {
        let v4 = Addr::from_ip("10.1.2.3".parse().unwrap());
        let v6 = Addr::from_ip("2001:db8::1".parse().unwrap());
        assert!(v4.is_v4() && !v6.is_v4());
        assert_eq!(v4.to_ip(), "10.1.2.3".parse::<IpAddr>().unwrap());
        assert_eq!(v6.to_ip(), "2001:db8::1".parse::<IpAddr>().unwrap());
        assert_eq!((v4.head(), v6.head()), (0x0a01, 0x2001));
        assert_ne!(prefix_key(7, v4).set, prefix_key(7, v6).set);
    }
}
