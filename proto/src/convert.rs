//! Messages to policy types and back.
//!
//! What comes from the wire is checked completely: lengths, ranges, unknown
//! enumeration values, canonical order, counts. An error names the field, so
//! that a mismatch between versions is found by reading one log line.

mod denied;
mod entry;
mod peer;
mod started;
mod stream;

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use tidegate_policy::port::MAX_RANGES;
use tidegate_policy::{Carry, PortRange, PortSet, Proto, Via};

use crate::wire;

pub use denied::{MAX_DENIED, denials};
pub use peer::{Beat, Claim, MAX_ORPHANS, Pair, PeerFact, PeerMessage, ScopeClaim, Seen, decode_peer, encode_peer};
pub use started::{StartedPod, started};
pub use stream::{FactsBatch, FactsUp, GrantEntry, Joiner, Part, StateBatch, Up};

/// The most octets of a name of a node, gateway, namespace or pod (RFC 1123 subdomain).
pub const MAX_NAME: usize = 253;
/// The most gateways of a cluster.
pub const MAX_GATEWAYS: usize = 64;
/// The most control endpoints of one gateway.
pub const MAX_GATEWAY_ADDRESSES: usize = 8;
/// The most egress pairs of a cluster.
pub const MAX_CLAIMS: usize = 1 << 16;
/// The most nodes that one fact names.
pub const MAX_FACT_NODES: usize = 1 << 16;
/// The most addresses of one node.
pub const MAX_NODE_ADDRESSES: usize = 64;
/// The most endpoints of the cluster's DNS.
pub const MAX_DNS: usize = 1024;
/// The most suffixes of the cluster's names.
pub const MAX_SUFFIXES: usize = 64;
/// The most prefixes of one set, and of the cluster set.
pub const MAX_PREFIXES: usize = 1 << 18;
/// The most entries, facts or grants of one message.
pub const MAX_ITEMS: usize = 1 << 17;
/// The most of them in all parts of one sequence.
pub const MAX_JOINED: usize = 1 << 22;
/// The longest life of a fact, in milliseconds: seven days.
pub const MAX_TTL_MS: u64 = 7 * 24 * 3600 * 1000;
/// The most octets of an error text.
pub const MAX_ERROR: usize = 1024;

/// Why a message is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("field {field}: {problem}")]
pub struct WireError {
    /// The field, `message.field` as in the contract.
    pub field: &'static str,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is wrong with a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// A required message or alternative is absent, or its kind is not known to this version.
    #[error("it is missing, or of a kind that this version does not know")]
    Missing,
    /// Wrong count of octets.
    #[error("{0} octets are not a valid length")]
    Length(usize),
    /// More items, or a longer text, than allowed.
    #[error("{0} is more than allowed")]
    TooMany(usize),
    /// A number outside its range.
    #[error("{0} is out of range")]
    Range(u64),
    /// An enumeration value that this version does not know.
    #[error("the value {0} is not known to this version")]
    Unknown(i32),
    /// Octets that no name has.
    #[error("it is not a valid name")]
    Name,
    /// A second spelling of the same value: host bits, an IPv4-mapped address, ranges out of order or overlapping.
    #[error("it is not in canonical form")]
    NotCanonical,
    /// The same identity twice.
    #[error("it appears twice")]
    Duplicate,
    /// Parts of different sequences are mixed.
    #[error("a part of another sequence came before the last part")]
    Parts,
}

impl Problem {
    pub(crate) fn of(self, field: &'static str) -> WireError {
        WireError { field, problem: self }
    }
}

pub(crate) fn ip_to_wire(ip: IpAddr) -> Vec<u8> {
    match ip.to_canonical() {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

/// Four or sixteen octets.
fn octets(bytes: &[u8], field: &'static str) -> Result<IpAddr, WireError> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(v4.into());
    }
    <[u8; 16]>::try_from(bytes).map(IpAddr::from).map_err(|_| Problem::Length(bytes.len()).of(field))
}

/// An address that identifies something: a mapped one would be a second identity.
pub(crate) fn ip_from_wire(bytes: &[u8], field: &'static str) -> Result<IpAddr, WireError> {
    let ip = octets(bytes, field)?;
    if ip.to_canonical() == ip { Ok(ip) } else { Err(Problem::NotCanonical.of(field)) }
}

pub(crate) fn key_to_wire(key: u128) -> Vec<u8> {
    key.to_be_bytes().to_vec()
}

pub(crate) fn key_from_wire(bytes: &[u8], field: &'static str) -> Result<u128, WireError> {
    <[u8; 16]>::try_from(bytes).map(u128::from_be_bytes).map_err(|_| Problem::Length(bytes.len()).of(field))
}

/// A name as Kubernetes writes it; upper case and `_` occur outside Kubernetes.
pub(crate) fn name_from_wire(name: String, field: &'static str) -> Result<String, WireError> {
    if name.len() > MAX_NAME {
        return Err(Problem::TooMany(name.len()).of(field));
    }
    let bytes = name.as_bytes();
    let edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    let inside = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
    if edge(bytes.first()) && edge(bytes.last()) && bytes.iter().all(inside) {
        Ok(name)
    } else {
        Err(Problem::Name.of(field))
    }
}

pub(crate) fn names_from_wire(names: Vec<String>, max: usize, field: &'static str) -> Result<Vec<String>, WireError> {
    bounded(names.len(), max, field)?;
    names.into_iter().map(|n| name_from_wire(n, field)).collect()
}

pub(crate) fn bounded(len: usize, max: usize, field: &'static str) -> Result<(), WireError> {
    if len > max { Err(Problem::TooMany(len).of(field)) } else { Ok(()) }
}

pub(crate) fn u16_from_wire(value: u32, field: &'static str) -> Result<u16, WireError> {
    u16::try_from(value).map_err(|_| Problem::Range(value.into()).of(field))
}

/// Host bits are cut off: they mean nothing, and two spellings would be two prefixes.
pub(crate) fn prefix_to_wire(net: IpNet) -> wire::Prefix {
    let address = match net.network() {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    };
    wire::Prefix { address, length: net.prefix_len().into() }
}

pub(crate) fn prefix_from_wire(prefix: &wire::Prefix, field: &'static str) -> Result<IpNet, WireError> {
    let ip = octets(&prefix.address, field)?;
    let out_of_range = || Problem::Range(prefix.length.into()).of(field);
    let len = u8::try_from(prefix.length).map_err(|_| out_of_range())?;
    let net = IpNet::new(ip, len).map_err(|_| out_of_range())?;
    if net.network() == ip { Ok(net) } else { Err(Problem::NotCanonical.of(field)) }
}

pub(crate) fn socket_to_wire(addr: SocketAddr) -> wire::SocketAddress {
    wire::SocketAddress { ip: ip_to_wire(addr.ip()), port: addr.port().into() }
}

pub(crate) fn socket_from_wire(addr: &wire::SocketAddress, field: &'static str) -> Result<SocketAddr, WireError> {
    Ok(SocketAddr::new(ip_from_wire(&addr.ip, field)?, u16_from_wire(addr.port, field)?))
}

fn via_to_wire(via: Via) -> wire::Via {
    match via {
        Via::Allow(Carry::Forward) => wire::Via::Forward,
        Via::Allow(Carry::Tls) => wire::Via::Tls,
        Via::Allow(Carry::Block) => wire::Via::Block,
        Via::Deny => wire::Via::Deny,
        Via::Pass => wire::Via::Pass,
    }
}

/// `None` for what is not specified.
fn via_from_wire(via: i32, field: &'static str) -> Result<Option<Via>, WireError> {
    Ok(Some(match wire::Via::try_from(via).map_err(|_| Problem::Unknown(via).of(field))? {
        wire::Via::Unspecified => return Ok(None),
        wire::Via::Forward => Via::Allow(Carry::Forward),
        wire::Via::Tls => Via::Allow(Carry::Tls),
        wire::Via::Block => Via::Allow(Carry::Block),
        wire::Via::Deny => Via::Deny,
        wire::Via::Pass => Via::Pass,
    }))
}

/// Ranges of TCP and UDP, and what holds for other protocols. The latter is a field of its own, which receivers of an
/// earlier version leave out instead of refusing all.
pub(crate) fn ports_to_wire(ports: &PortSet) -> (Vec<wire::PortRange>, i32) {
    let range = |r: &PortRange| {
        let protocol = match r.proto {
            Proto::Other => return None,
            Proto::Tcp => wire::Protocol::Tcp,
            Proto::Udp => wire::Protocol::Udp,
        };
        let (protocol, via) = (protocol.into(), via_to_wire(r.via).into());
        Some(wire::PortRange { protocol, first: r.lo.into(), last: r.hi.into(), via })
    };
    let other = ports.get(Proto::Other, 0).map_or(wire::Via::Unspecified, via_to_wire);
    (ports.ranges().iter().filter_map(range).collect(), other.into())
}

pub(crate) fn ports_from_wire(ports: &[wire::PortRange], other: i32) -> Result<PortSet, WireError> {
    bounded(ports.len(), MAX_RANGES, "port_ranges")?;
    let mut ranges = Vec::with_capacity(ports.len() + 1);
    if let Some(via) = via_from_wire(other, "port_ranges.other")? {
        ranges.push(PortRange { proto: Proto::Other, lo: 0, hi: u16::MAX, via });
    }
    for r in ports {
        let unknown = Problem::Unknown(r.protocol).of("port_range.protocol");
        let proto = match wire::Protocol::try_from(r.protocol).unwrap_or_default() {
            wire::Protocol::Unspecified => return Err(unknown),
            wire::Protocol::Tcp => Proto::Tcp,
            wire::Protocol::Udp => Proto::Udp,
        };
        let via = via_from_wire(r.via, "port_range.via")?.ok_or(Problem::Unknown(r.via).of("port_range.via"))?;
        let lo = u16_from_wire(r.first, "port_range.first")?;
        let hi = u16_from_wire(r.last, "port_range.last")?;
        if lo > hi {
            return Err(Problem::Range(hi.into()).of("port_range.last"));
        }
        ranges.push(PortRange { proto, lo, hi, via });
    }
    bounded(ranges.len(), MAX_RANGES, "port_ranges")?;
    let set = PortSet::from_precedence(ranges.iter().copied());
    // Only a canonical list survives unchanged.
    if set.ranges() == ranges { Ok(set) } else { Err(Problem::NotCanonical.of("port_ranges")) }
}
