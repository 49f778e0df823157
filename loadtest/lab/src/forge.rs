//! Packets made by hand, as root in a pod or on a node can send them: any source, any flags, tunnels.

use std::io;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::place::Place;

/// TCP flags (RFC 9293, section 3.1).
pub const FIN: u8 = 1;
/// Opens a connection.
pub const SYN: u8 = 2;
/// Ends one at once.
pub const RST: u8 = 4;
/// Hand what came to the application.
pub const PSH: u8 = 8;
/// The acknowledgement field counts.
pub const ACK: u8 = 16;

/// VXLAN's header (RFC 7348, section 5).
const VNI_FLAG: u8 = 8;
/// A socket of this protocol sends whole IP packets.
const RAW: i32 = 255;

/// The one's complement sum of 16-bit words, folded and inverted (RFC 1071).
fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let all = parts.concat();
    let sum: u32 = all.chunks(2).map(|c| u32::from(c[0]) << 8 | c.get(1).map_or(0, |b| u32::from(*b))).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    (!((sum & 0xffff) as u16 + (sum >> 16) as u16)).to_be_bytes()
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// Puts the checksum over the pseudo header (RFC 9293, section 3.1; RFC 8200, section 8.1) at `at`.
fn sealed(src: IpAddr, dst: IpAddr, protocol: u8, mut body: Vec<u8>, at: usize) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX).to_be_bytes();
    let sum = checksum(&[&octets(src), &octets(dst), &length, &[0, 0, 0, protocol], &body]);
    body[at..at + 2].copy_from_slice(&sum);
    body
}

/// An IP packet around a transport header and its payload. Both addresses are of one family.
pub fn ip(src: IpAddr, dst: IpAddr, protocol: u8, body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(body.len()).unwrap_or(u16::MAX);
    let mut head = if src.is_ipv4() {
        let total = (length + 20).to_be_bytes();
        vec![0x45, 0, total[0], total[1], 0, 7, 0, 0, 64, protocol, 0, 0]
    } else {
        let length = length.to_be_bytes();
        vec![0x60, 0, 0, 0, length[0], length[1], protocol, 64]
    };
    head.extend(octets(src));
    head.extend(octets(dst));
    if src.is_ipv4() {
        let sum = checksum(&[&head]);
        head[10..12].copy_from_slice(&sum);
    }
    head.extend(body);
    head
}

/// A TCP segment.
pub fn tcp(src: SocketAddr, dst: SocketAddr, flags: u8, seq: u32, ack: u32, payload: &[u8]) -> Vec<u8> {
    let mut body = [src.port().to_be_bytes(), dst.port().to_be_bytes()].concat();
    body.extend(seq.to_be_bytes());
    body.extend(ack.to_be_bytes());
    body.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    body.extend(payload);
    ip(src.ip(), dst.ip(), 6, &sealed(src.ip(), dst.ip(), 6, body, 16))
}

/// A packet that the device by which it leaves the last kernel is to finish: it puts a checksum over what begins at `start`
/// of the packet there, `offset` octets behind that.
pub struct Unfinished {
    /// The IP packet.
    pub packet: Vec<u8>,
    /// Where the sum begins.
    pub start: u16,
    /// Where it goes.
    pub offset: u16,
}

/// A UDP datagram that will have the port `to` in place of its destination's; `None` leaves its own checksum to be written,
/// as every kernel does.
pub fn unfinished(src: SocketAddr, dst: SocketAddr, to: Option<u16>) -> Unfinished {
    let mut packet = udp(src, dst, b"to be tuned!");
    let start: u16 = if src.is_ipv4() { 20 } else { 40 };
    let l4 = usize::from(start);
    let sum = |parts: &[&[u8]]| !u16::from_be_bytes(checksum(parts));
    if let Some(port) = to {
        packet[l4 + 6..l4 + 10].fill(0);
        let tuned = sum(&[&(!port).to_be_bytes(), &checksum(&[&packet[l4..]])]);
        packet[l4 + 8..l4 + 10].copy_from_slice(&tuned.to_be_bytes());
        return Unfinished { packet, start, offset: 2 };
    }
    let length = u32::try_from(packet.len() - l4).unwrap_or(u32::MAX).to_be_bytes();
    let pseudo = sum(&[&octets(src.ip()), &octets(dst.ip()), &length, &[0, 0, 0, 17]]);
    packet[l4 + 6..l4 + 8].copy_from_slice(&pseudo.to_be_bytes());
    Unfinished { packet, start, offset: 6 }
}

/// Sends such a packet from a pod, to the next hop that it knows.
///
/// # Errors
/// When the pod knows none, or its kernel refuses.
pub fn send_unfinished(from: &Place<'_>, unfinished: &Unfinished) -> Result<()> {
    /// A packet socket with `PACKET_VNET_HDR`.
    const SEND: &str = "import socket, sys
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.setsockopt(263, 15, 1)
s.bind(('eth0', int(sys.argv[1])))
s.send(bytes.fromhex(sys.argv[2]))";
    let v4 = unfinished.packet.first().is_some_and(|b| b >> 4 == 4);
    let (family, kind) = if v4 { ("-4", 0x0800u16) } else { ("-6", 0x86dd) };
    let known = from.run(&["ip", family, "neigh", "show", "dev", "eth0"]).stdout;
    let hop = known.split_whitespace().skip_while(|w| *w != "lladdr").nth(1);
    let hop = hop.with_context(|| format!("{} knows no next hop", from.name()))?.replace(':', "");
    // VIRTIO_NET_HDR_F_NEEDS_CSUM; no segments.
    let mut head = vec![1, 0, 0, 0, 0, 0];
    head.extend((unfinished.start + 14).to_ne_bytes());
    head.extend(unfinished.offset.to_ne_bytes());
    let hex = |octets: &[u8]| octets.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let frame = format!("{}{hop}020000000005{kind:04x}{}", hex(&head), hex(&unfinished.packet));
    let out = from.run(&["python3", "-c", SEND, &kind.to_string(), &frame]);
    ensure!(out.status == 0, "{}: {}", from.name(), out.stderr);
    Ok(())
}

/// A UDP datagram.
pub fn udp(src: SocketAddr, dst: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let mut body = [src.port().to_be_bytes(), dst.port().to_be_bytes()].concat();
    body.extend(u16::try_from(payload.len() + 8).unwrap_or(u16::MAX).to_be_bytes());
    body.extend([0, 0]);
    body.extend(payload);
    ip(src.ip(), dst.ip(), 17, &sealed(src.ip(), dst.ip(), 17, body, 6))
}

/// An ICMP or ICMPv6 message: type, code, the four octets behind the checksum, the rest.
pub fn icmp(src: IpAddr, dst: IpAddr, kind: u8, code: u8, rest: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let mut body = vec![kind, code, 0, 0];
    body.extend(rest);
    body.extend(payload);
    if src.is_ipv4() {
        let sum = checksum(&[&body]);
        body[2..4].copy_from_slice(&sum);
        return ip(src, dst, 1, &body);
    }
    ip(src, dst, 58, &sealed(src, dst, 58, body, 2))
}

/// What a UDP datagram of the tunnel holds: VXLAN and Ethernet around an IP packet.
pub fn tunnelled(vni: u32, inner: &[u8]) -> Vec<u8> {
    let vni = vni.to_be_bytes();
    let mut out = vec![VNI_FLAG, 0, 0, 0, vni[1], vni[2], vni[3], 0];
    out.extend([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
    out.extend(if inner.first().is_some_and(|b| b >> 4 == 4) { [8, 0] } else { [0x86, 0xdd] });
    out.extend(inner);
    out
}

/// Sends a whole IP packet from a place, by its routes or by `device`.
///
/// # Errors
/// When the place is gone or its kernel refuses.
pub fn send(from: &Place<'_>, device: Option<&str>, packet: &[u8]) -> Result<()> {
    let to = destination(packet).context("no IP packet")?;
    let sent = from.within(|| -> io::Result<()> {
        let domain = if to.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(RAW)))?;
        if let Some(device) = device {
            socket.bind_device(Some(device.as_bytes()))?;
        }
        socket.send_to(packet, &SockAddr::from(SocketAddr::new(to, 0))).map(drop)
    })?;
    sent.with_context(|| format!("{} cannot send to {to}", from.name()))
}

fn destination(packet: &[u8]) -> Option<IpAddr> {
    if packet.first()? >> 4 == 4 {
        return Some(IpAddr::from(<[u8; 4]>::try_from(packet.get(16..20)?).ok()?));
    }
    Some(IpAddr::from(<[u8; 16]>::try_from(packet.get(24..40)?).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_becomes_a_port() {
        for (src, dst) in [("192.0.2.1:5", "192.0.2.2:6"), ("[2001:db8::1]:5", "[2001:db8::2]:6")] {
            let (src, dst) = (src.parse().unwrap(), dst.parse().unwrap());
            for (to, becomes) in [(Some(853), 853u16.to_be_bytes()), (None, [0, 0])] {
                let mut u = unfinished(src, dst, to);
                let (start, at) = (usize::from(u.start), usize::from(u.start + u.offset));
                let written = checksum(&[&u.packet[start..]]);
                if to.is_some() {
                    assert_eq!(written, becomes);
                    continue;
                }
                u.packet[at..at + 2].copy_from_slice(&written);
                assert_eq!(u.packet, udp(src, dst, b"to be tuned!"));
            }
        }
    }

    #[test]
    fn checksums_add_up() {
        for (src, dst) in [("192.0.2.1:5", "192.0.2.2:6"), ("[2001:db8::1]:5", "[2001:db8::2]:6")] {
            let (src, dst): (SocketAddr, SocketAddr) = (src.parse().unwrap(), dst.parse().unwrap());
            let head = if src.is_ipv4() { 20 } else { 40 };
            let pseudo = |p: &[u8], protocol: u8| {
                let length = (p.len() as u32).to_be_bytes();
                checksum(&[&octets(src.ip()), &octets(dst.ip()), &length, &[0, 0, 0, protocol], p])
            };
            let packet = tcp(src, dst, SYN, 1, 0, b"odd");
            assert_eq!(pseudo(&packet[head..], 6), [0, 0]);
            let packet = udp(src, dst, b"abc");
            assert_eq!(pseudo(&packet[head..], 17), [0, 0]);
            assert_eq!(destination(&packet), Some(dst.ip()));
            if head == 20 {
                assert_eq!(checksum(&[&packet[..20]]), [0, 0]);
            }
        }
    }
}
