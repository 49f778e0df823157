//! Parsing of an Ethernet frame down to ports: bounded, without panics, and
//! strict where a lenient reading could mean two things.

use crate::layout::Addr;

/// Where bytes come from: `bpf_skb_load_bytes` in the kernel, a slice elsewhere.
pub trait Bytes {
    /// Fills `to` with the octets at `offset`; false if the frame is shorter.
    fn load<const N: usize>(&self, offset: u32, to: &mut [u8; N]) -> bool;
    /// Length of the frame in octets.
    fn size(&self) -> u32;
}

impl Bytes for &[u8] {
    fn load<const N: usize>(&self, offset: u32, to: &mut [u8; N]) -> bool {
        let Some(from) = self.get(offset as usize..).and_then(|s| s.get(..N)) else {
            return false;
        };
        to.copy_from_slice(from);
        true
    }

    fn size(&self) -> u32 {
        self.len() as u32
    }
}

/// Length of an Ethernet header.
pub const ETH: u32 = 14;
/// EtherType of IPv4.
pub const IPV4: u16 = 0x0800;
/// EtherType of IPv6.
pub const IPV6: u16 = 0x86dd;
/// EtherType of ARP.
pub const ARP: u16 = 0x0806;

/// IP protocol numbers.
pub mod proto {
    /// In a port set: all but TCP and UDP. It stands before them.
    pub const OTHER: u8 = 0;
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMPv6.
    pub const ICMP6: u8 = 58;
    /// SCTP.
    pub const SCTP: u8 = 132;
}

/// TCP flag bits (RFC 9293, section 3.1).
pub mod tcp {
    /// FIN.
    pub const FIN: u8 = 1;
    /// SYN.
    pub const SYN: u8 = 2;
    /// RST.
    pub const RST: u8 = 4;
    /// ACK.
    pub const ACK: u8 = 16;
}

/// Marks of [`Packet::marks`].
pub mod mark {
    /// The fragment with offset 0 of a fragmented packet.
    pub const FIRST_FRAGMENT: u8 = 1;
    /// A fragment with another offset: it has no ports.
    pub const LATER_FRAGMENT: u8 = 2;
    /// It must not be fragmented: IPv4 with DF, or IPv6.
    pub const DONT_FRAGMENT: u8 = 4;
    /// Headers that could send it elsewhere than the destination says: IPv4 options
    /// (RFC 7126), an IPv6 routing header (RFC 8200, section 4.4).
    pub const DETOUR: u8 = 8;
    /// Something inside its payload is yet to be written ([`crate::checksum`]).
    pub const INNER: u8 = 16;
}

/// What was read of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Packet {
    /// Source address; zero if it could not be read.
    pub src: Addr,
    /// Destination address; zero if it could not be read.
    pub dst: Addr,
    /// Source port, or the echo identifier, or 0.
    pub sport: u16,
    /// Destination port, or 0.
    pub dport: u16,
    /// IP protocol number behind all extension headers.
    pub proto: u8,
    /// TCP flags, or the ICMP type.
    pub flags: u8,
    /// The ICMP code.
    pub code: u8,
    /// [`mark`] bits.
    pub marks: u8,
    /// Length of the IP packet in octets, header included.
    pub length: u32,
    /// Offset of the transport header in the frame.
    pub l4: u32,
    /// TTL or hop limit.
    pub hops: u8,
    /// Length of the transport header in octets.
    pub l4_length: u8,
}

impl Packet {
    /// Whether this is IPv6.
    #[inline(always)]
    pub const fn is_v6(&self) -> bool {
        !self.dst.is_v4()
    }

    /// Whether any of the bits is set.
    #[inline(always)]
    pub const fn has(&self, marks: u8) -> bool {
        self.marks & marks != 0
    }

    /// Whether this opens a TCP connection.
    #[inline(always)]
    pub const fn is_syn(&self) -> bool {
        self.proto == proto::TCP && self.flags & (tcp::SYN | tcp::ACK) == tcp::SYN
    }

    /// Whether this is ICMP or ICMPv6 of its own IP version.
    #[inline(always)]
    pub const fn is_icmp(&self) -> bool {
        if self.is_v6() { self.proto == proto::ICMP6 } else { self.proto == proto::ICMP }
    }

    /// Whether this is an echo request.
    #[inline(always)]
    pub const fn is_echo_request(&self) -> bool {
        self.is_icmp() && !self.has(mark::LATER_FRAGMENT) && self.flags == if self.is_v6() { 128 } else { 8 }
    }

    /// Whether this is an echo reply.
    #[inline(always)]
    pub const fn is_echo_reply(&self) -> bool {
        self.is_icmp() && !self.has(mark::LATER_FRAGMENT) && self.flags == if self.is_v6() { 129 } else { 0 }
    }

    /// Whether this is what path MTU discovery needs: Frag-Needed (RFC 1191) or Packet-Too-Big (RFC 8201).
    #[inline(always)]
    pub const fn is_path_mtu(&self) -> bool {
        self.is_icmp()
            && !self.has(mark::LATER_FRAGMENT)
            && if self.is_v6() { self.flags == 2 } else { self.flags == 3 && self.code == 4 }
    }
}

/// How far parsing came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// All fields are filled.
    Ip,
    /// ARP.
    Arp,
    /// Another protocol than IP and ARP.
    NotIp,
    /// IP whose headers are truncated or contradict each other.
    Malformed,
}

/// The most IPv6 extension headers that are followed.
const EXTENSIONS: u32 = 6;

#[inline(always)]
const fn be16(b: &[u8], i: usize) -> u16 {
    u16::from_be_bytes([b[i], b[i + 1]])
}

#[inline(always)]
const fn word(b: &[u8], i: usize) -> u32 {
    u32::from_ne_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]])
}

/// Reads the frame whose EtherType is `ethertype`. On anything but [`Parsed::Ip`] the
/// addresses are set if they could be read.
#[inline(always)]
pub fn parse<B: Bytes>(bytes: &B, ethertype: u16, out: &mut Packet) -> Parsed {
    *out = Packet::default();
    match ethertype {
        IPV4 => parse_v4(bytes, out),
        IPV6 => parse_v6(bytes, out),
        ARP => Parsed::Arp,
        _ => Parsed::NotIp,
    }
}

#[inline(always)]
fn parse_v4<B: Bytes>(bytes: &B, out: &mut Packet) -> Parsed {
    let mut h = [0u8; 20];
    if !bytes.load(ETH, &mut h) {
        return Parsed::Malformed;
    }
    out.src = Addr::v4(word(&h, 12));
    out.dst = Addr::v4(word(&h, 16));
    let header = u32::from(h[0] & 15) * 4;
    let length = u32::from(be16(&h, 2));
    out.length = length;
    out.proto = h[9];
    out.hops = h[8];
    // GSO frames may carry more than the 16 bits say, never less than the header.
    if h[0] >> 4 != 4 || header < 20 || length < header || bytes.size() < ETH + length {
        return Parsed::Malformed;
    }
    if header > 20 {
        out.marks |= mark::DETOUR;
    }
    let fragment = be16(&h, 6);
    if fragment & 0x4000 != 0 {
        out.marks |= mark::DONT_FRAGMENT;
    }
    if fragment & 0x1fff != 0 {
        out.marks |= mark::LATER_FRAGMENT;
        return Parsed::Ip;
    }
    if fragment & 0x2000 != 0 {
        out.marks |= mark::FIRST_FRAGMENT;
    }
    out.l4 = ETH + header;
    parse_l4(bytes, length - header, out)
}

#[inline(always)]
fn parse_v6<B: Bytes>(bytes: &B, out: &mut Packet) -> Parsed {
    let mut h = [0u8; 40];
    if !bytes.load(ETH, &mut h) {
        return Parsed::Malformed;
    }
    out.src = Addr([word(&h, 8), word(&h, 12), word(&h, 16), word(&h, 20)]);
    out.dst = Addr([word(&h, 24), word(&h, 28), word(&h, 32), word(&h, 36)]);
    out.hops = h[7];
    out.marks = mark::DONT_FRAGMENT;
    let length = u32::from(be16(&h, 4)) + 40;
    out.length = length;
    // A mapped address on the wire would be taken for IPv4 in every map.
    if h[0] >> 4 != 6 || bytes.size() < ETH + length || out.src.is_v4() || out.dst.is_v4() {
        return Parsed::Malformed;
    }
    let end = ETH + length;
    let mut next = h[6];
    let mut at = ETH + 40;
    for _ in 0..EXTENSIONS {
        if !matches!(next, 0 | 43 | 44 | 60) {
            break;
        }
        let mut e = [0u8; 8];
        if at + 8 > end || !bytes.load(at, &mut e) {
            return Parsed::Malformed;
        }
        if next == 44 {
            let fragment = be16(&e, 2);
            at += 8;
            if fragment & 0xfff8 != 0 {
                out.marks |= mark::LATER_FRAGMENT;
                out.proto = e[0];
                return Parsed::Ip;
            }
            if fragment & 1 != 0 {
                out.marks |= mark::FIRST_FRAGMENT;
            }
        } else {
            if next == 43 {
                out.marks |= mark::DETOUR;
            }
            at += (u32::from(e[1]) + 1) * 8;
        }
        next = e[0];
    }
    out.proto = next;
    if at > end || matches!(next, 0 | 43 | 44 | 60) {
        return Parsed::Malformed;
    }
    out.l4 = at;
    parse_l4(bytes, end - at, out)
}

/// Reads ports, flags, type and code. `left` are the octets that the IP header promises.
#[inline(always)]
fn parse_l4<B: Bytes>(bytes: &B, left: u32, out: &mut Packet) -> Parsed {
    match out.proto {
        proto::TCP => {
            let mut h = [0u8; 14];
            if left < 20 || !bytes.load(out.l4, &mut h) {
                return Parsed::Malformed;
            }
            let header = u32::from(h[12] >> 4) * 4;
            if header < 20 || header > left {
                return Parsed::Malformed;
            }
            out.sport = be16(&h, 0);
            out.dport = be16(&h, 2);
            out.flags = h[13];
            out.l4_length = header as u8;
        }
        proto::UDP => {
            let mut h = [0u8; 8];
            if left < 8 || !bytes.load(out.l4, &mut h) {
                return Parsed::Malformed;
            }
            let length = u32::from(be16(&h, 4));
            if length < 8 || (length > left && !out.has(mark::FIRST_FRAGMENT)) {
                return Parsed::Malformed;
            }
            out.sport = be16(&h, 0);
            out.dport = be16(&h, 2);
            out.l4_length = 8;
        }
        proto::ICMP | proto::ICMP6 => {
            let mut h = [0u8; 8];
            if left < 8 || !bytes.load(out.l4, &mut h) {
                return Parsed::Malformed;
            }
            out.flags = h[0];
            out.code = h[1];
            out.l4_length = 8;
            if out.is_echo_request() || out.is_echo_reply() {
                out.sport = be16(&h, 4);
            }
        }
        _ => {}
    }
    Parsed::Ip
}
