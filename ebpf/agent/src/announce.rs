//! Telling the neighbours of an uplink that an egress address has moved here:
//! gratuitous ARP (RFC 5227, section 3) as request and as reply, since hosts
//! differ in which they believe, and unsolicited neighbour advertisements with
//! the override flag (RFC 4861, section 7.2.6).

use std::io;
use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const ETH_P_ARP: u16 = 0x0806;
const ETH_P_IPV6: u16 = 0x86dd;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// The frames that announce `address` at `mac`.
pub fn frames(address: IpAddr, mac: [u8; 6]) -> Vec<Vec<u8>> {
    match address {
        IpAddr::V4(a) => vec![arp(1, a, mac), arp(2, a, mac)],
        IpAddr::V6(a) => vec![advertisement(a, mac)],
    }
}

fn ethernet(to: [u8; 6], from: [u8; 6], kind: u16) -> Vec<u8> {
    let mut f = Vec::with_capacity(86);
    f.extend_from_slice(&to);
    f.extend_from_slice(&from);
    f.extend_from_slice(&kind.to_be_bytes());
    f
}

/// An ARP request (1) or reply (2) (RFC 826) with the address as sender and as target.
fn arp(operation: u16, address: Ipv4Addr, mac: [u8; 6]) -> Vec<u8> {
    let mut f = ethernet([0xff; 6], mac, ETH_P_ARP);
    f.extend_from_slice(&[0, 1, 0x08, 0, 6, 4]);
    f.extend_from_slice(&operation.to_be_bytes());
    f.extend_from_slice(&mac);
    f.extend_from_slice(&address.octets());
    // A request does not know the target's hardware address; in a gratuitous reply it is the sender's own.
    f.extend_from_slice(&if operation == 1 { [0; 6] } else { mac });
    f.extend_from_slice(&address.octets());
    f
}

/// An unsolicited neighbour advertisement (RFC 4861, section 4.4) to all nodes.
fn advertisement(address: Ipv6Addr, mac: [u8; 6]) -> Vec<u8> {
    // Type 136, code 0, checksum, flags: override only.
    let mut icmp = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    icmp.extend_from_slice(&address.octets());
    // Option 2, target link-layer address, one unit of 8 octets.
    icmp.extend_from_slice(&[2, 1]);
    icmp.extend_from_slice(&mac);
    let sum = checksum(address, ALL_NODES, &icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());

    let mut f = ethernet([0x33, 0x33, 0, 0, 0, 1], mac, ETH_P_IPV6);
    f.extend_from_slice(&[0x60, 0, 0, 0]);
    f.extend_from_slice(&(icmp.len() as u16).to_be_bytes());
    // Next header ICMPv6; a hop limit of 255 proves that no router was in between.
    f.extend_from_slice(&[58, 255]);
    f.extend_from_slice(&address.octets());
    f.extend_from_slice(&ALL_NODES.octets());
    f.extend_from_slice(&icmp);
    f
}

/// The ICMPv6 checksum over pseudo-header and message (RFC 4443, section 2.3).
fn checksum(from: Ipv6Addr, to: Ipv6Addr, message: &[u8]) -> u16 {
    let mut sum = 58 + message.len() as u32;
    let (from, to) = (from.octets(), to.octets());
    for part in [&from[..], &to[..], message] {
        for pair in part.chunks(2) {
            sum += u32::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u32::from);
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// A packet socket that only sends.
#[derive(Debug)]
pub struct Announcer(OwnedFd);

impl Announcer {
    /// Opens the socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// CAP_NET_RAW is missing.
    pub fn open() -> io::Result<Self> {
        // Protocol 0: nothing is received.
        // SAFETY: socket(2) takes no pointers; the result is checked.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and ours alone.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Announces the address on a device.
    ///
    /// # Errors
    /// The device is gone or down, or its queue is full.
    pub fn announce(&self, ifindex: u32, mac: [u8; 6], address: IpAddr) -> io::Result<()> {
        for frame in frames(address, mac) {
            self.send(ifindex, &frame)?;
        }
        Ok(())
    }

    fn send(&self, ifindex: u32, frame: &[u8]) -> io::Result<()> {
        // SAFETY: sockaddr_ll is plain data for which zeroes are valid.
        let mut to: libc::sockaddr_ll = unsafe { mem::zeroed() };
        to.sll_family = libc::AF_PACKET as u16;
        to.sll_protocol = u16::from_be_bytes([frame[12], frame[13]]).to_be();
        to.sll_ifindex = i32::try_from(ifindex).map_err(|_| io::ErrorKind::InvalidInput)?;
        to.sll_halen = 6;
        to.sll_addr[..6].copy_from_slice(&frame[..6]);
        // SAFETY: both pointers are valid for the lengths given, and the kernel only reads them.
        let sent = unsafe {
            libc::sendto(
                self.0.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const to).cast(),
                mem::size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

    #[test]
    fn arp_announces_as_request_and_as_reply() {
        let f = frames("203.0.113.10".parse().unwrap(), MAC);
        assert_eq!(f.len(), 2);
        for (frame, operation, target) in [(&f[0], 1, [0; 6]), (&f[1], 2, MAC)] {
            assert_eq!(frame.len(), 42);
            assert_eq!(frame[..6], [0xff; 6]);
            assert_eq!(frame[6..12], MAC);
            assert_eq!(frame[12..22], [0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, operation]);
            assert_eq!(frame[22..28], MAC);
            assert_eq!(frame[28..32], [203, 0, 113, 10]);
            assert_eq!(frame[32..38], target);
            assert_eq!(frame[38..42], [203, 0, 113, 10]);
        }
    }

    #[test]
    fn the_advertisement_overrides_and_its_checksum_holds() {
        let address: Ipv6Addr = "2001:db8::10".parse().unwrap();
        let f = &frames(address.into(), MAC)[0];
        assert_eq!(f.len(), 14 + 40 + 32);
        assert_eq!(f[..6], [0x33, 0x33, 0, 0, 0, 1]);
        assert_eq!(f[20], 58);
        assert_eq!(f[21], 255);
        let icmp = &f[54..];
        assert_eq!((icmp[0], icmp[4]), (136, 0x20));
        assert_eq!(icmp[8..24], address.octets());
        assert_eq!(icmp[24..26], [2, 1]);
        assert_eq!(icmp[26..32], MAC);
        // Summed with its checksum in place, a message gives zero.
        assert_eq!(checksum(address, ALL_NODES, icmp), 0);
    }
}
