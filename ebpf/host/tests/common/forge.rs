//! Frames whose checksum is left to a device, at a place of the sender's choice.

use std::io::Error;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::netns::Ns;

/// An Ethernet frame with a UDP datagram whose sum over the pseudo header is left out, and its place, as packet sockets take
/// them.
pub struct Frame {
    pub octets: Vec<u8>,
    /// Where the sum begins.
    pub start: u16,
    /// Where it goes, behind that.
    pub offset: u16,
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

fn sum(of: &[u8]) -> u16 {
    let mut total: u32 = of.chunks(2).map(|c| u32::from(c[0]) << 8 | c.get(1).map_or(0, |b| u32::from(*b))).sum();
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

/// The sum of a UDP datagram's pseudo header.
fn pseudo(length: usize, source: &str, destination: &str) -> u16 {
    let mut all = octets(source.parse().unwrap());
    all.extend(octets(destination.parse().unwrap()));
    all.extend(u32::try_from(length).unwrap().to_be_bytes());
    all.extend([0, 0, 0, 17]);
    sum(&all)
}

/// A frame as [`super::packets`] makes them, for another receiver.
pub fn addressed(mut frame: Vec<u8>, to: [u8; 6], from: [u8; 6]) -> Vec<u8> {
    frame[..6].copy_from_slice(&to);
    frame[6..12].copy_from_slice(&from);
    frame
}

/// Where the transport header begins.
pub fn transport(frame: &[u8]) -> usize {
    if frame[12..14] == [8, 0] { 34 } else { 54 }
}

impl Frame {
    /// Leaves the frame's own UDP checksum out, as the kernel does.
    pub fn own(mut frame: Vec<u8>, source: &str, destination: &str) -> Self {
        let l4 = transport(&frame);
        let pseudo = pseudo(frame.len() - l4, source, destination);
        frame[l4 + 6..l4 + 8].copy_from_slice(&pseudo.to_be_bytes());
        Self { octets: frame, start: u16::try_from(l4).unwrap(), offset: 6 }
    }

    /// Makes the device write `want` over the two octets at `at`: those at `tune` make the sum so.
    pub fn forged(mut frame: Vec<u8>, at: usize, want: [u8; 2], tune: usize, source: &str, destination: &str) -> Self {
        let l4 = transport(&frame);
        let start = if source.contains(':') {
            // With a checksum that will be right, as IPv6 needs it: what the sum leaves out makes it so.
            let there = u16::from_be_bytes([frame[at], frame[at + 1]]);
            let port =
                sum(&[there.to_be_bytes(), (!pseudo(frame.len() - l4, source, destination)).to_be_bytes()].concat());
            frame[l4..l4 + 2].copy_from_slice(&port.to_be_bytes());
            l4 + 2
        } else {
            // Zero says that there is none.
            frame[l4 + 6..l4 + 8].fill(0);
            l4
        };
        frame[tune..tune + 2].fill(0);
        assert_eq!((tune - l4) % 2, 0);
        let wanted = !u16::from_be_bytes(want);
        let missing = sum(&[wanted.to_be_bytes(), (!sum(&frame[start..])).to_be_bytes()].concat());
        frame[tune..tune + 2].copy_from_slice(&missing.to_be_bytes());
        assert_eq!((!sum(&frame[start..])).to_be_bytes(), want);
        Self { octets: frame, start: u16::try_from(start).unwrap(), offset: u16::try_from(at - start).unwrap() }
    }

    /// Sends it from a namespace by a device.
    pub fn send(&self, ns: &Ns, device: &str) {
        const SOL_PACKET: libc::c_int = 263;
        const PACKET_VNET_HDR: libc::c_int = 15;
        const NEEDS_CSUM: u8 = 1;
        let mut packet = vec![NEEDS_CSUM, 0, 0, 0, 0, 0];
        packet.extend(self.start.to_ne_bytes());
        packet.extend(self.offset.to_ne_bytes());
        packet.extend(&self.octets);
        let (index, _) = ns.device(device);
        // SAFETY: no pointers.
        let fd = ns.enter(|| unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) });
        assert!(fd >= 0, "{}", Error::last_os_error());
        // SAFETY: it was just opened for us.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let on: libc::c_int = 1;
        // SAFETY: all zero is valid for a structure of integers.
        let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        to.sll_family = libc::AF_PACKET as u16;
        to.sll_ifindex = index as i32;
        to.sll_protocol = u16::from_ne_bytes([self.octets[12], self.octets[13]]);
        // SAFETY: valid pointers with the lengths of what they point to.
        let sent = unsafe {
            let length = size_of_val(&on) as libc::socklen_t;
            let set = libc::setsockopt(socket.as_raw_fd(), SOL_PACKET, PACKET_VNET_HDR, (&raw const on).cast(), length);
            assert_eq!(set, 0, "{}", Error::last_os_error());
            let length = size_of_val(&to) as libc::socklen_t;
            libc::sendto(socket.as_raw_fd(), packet.as_ptr().cast(), packet.len(), 0, (&raw const to).cast(), length)
        };
        assert_eq!(sent, packet.len() as isize, "{}", Error::last_os_error());
    }
}

/// Has the kernel write checksums before a device gets packets, as devices do that cannot write them.
pub fn no_offload(ns: &Ns, device: &str) {
    const ETHTOOL_STXCSUM: u32 = 0x17;
    const SIOCETHTOOL: libc::c_ulong = 0x8946;
    let value = [ETHTOOL_STXCSUM, 0];
    // SAFETY: all zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = value.as_ptr().cast_mut().cast();
    ns.enter(|| {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        // SAFETY: a request that the kernel reads, with a value that lives on.
        let set = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, &raw mut request) };
        assert_eq!(set, 0, "{}", Error::last_os_error());
    });
}
