//! Checksums that a device is yet to write (`CHECKSUM_PARTIAL`). Who sends packets by hand says himself where the sum
//! begins and where it goes (`virtio_net_hdr` of packet sockets and taps), and two octets that were judged are others when
//! the packet leaves. So what is yet to be written must be the checksum of the header that was read, or lie behind it.

use crate::packet::{ETH, Packet, Parsed, mark, proto};

/// No checksum is to be written.
pub const NONE: u64 = 0;

/// A checksum over what begins at `start`, an offset in the frame, to be written `offset` octets behind that.
#[inline(always)]
pub const fn pending(start: u16, offset: u16) -> u64 {
    1 << 32 | (start as u64) << 16 | offset as u64
}

/// Whether the frame stays as it was read. Where the checksum belongs to something inside the packet, as a tunnel's inner
/// headers, the packet is marked with [`mark::INNER`]: its payload may change.
#[inline(always)]
pub fn stays(parsed: Parsed, p: &mut Packet, pending: u64) -> bool {
    if pending == NONE {
        return true;
    }
    let (start, offset) = ((pending >> 16) as u16 as u32, pending as u16);
    let behind = match parsed {
        Parsed::Arp => return false,
        Parsed::NotIp => ETH,
        // Only its addresses count, where anything does.
        Parsed::Malformed => ETH + if p.is_v6() { 40 } else { 20 },
        // The kernel cuts no packet whose checksum is not in it.
        Parsed::Ip if p.has(mark::LATER_FRAGMENT) => return false,
        Parsed::Ip => match p.proto {
            proto::TCP => return start == p.l4 && offset == 16,
            proto::UDP if start == p.l4 && offset == 6 => return true,
            proto::UDP | proto::ICMP | proto::ICMP6 => p.l4 + 8,
            _ => p.l4,
        },
    };
    p.marks |= mark::INNER;
    start >= behind
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(proto: u8) -> Packet {
        Packet { proto, l4: 34, l4_length: 20, length: 1_000, ..Packet::default() }
    }

    fn said(parsed: Parsed, mut p: Packet, start: u16, offset: u16) -> (bool, bool) {
        let stays = stays(parsed, &mut p, pending(start, offset));
        (stays, p.has(mark::INNER))
    }

    #[test]
    fn a_transport_headers_own_checksum_is_written() {
        let ip = |proto, start, offset| said(Parsed::Ip, packet(proto), start, offset);
        assert!(stays(Parsed::Ip, &mut packet(proto::TCP), NONE));
        assert_eq!(ip(proto::TCP, 34, 16), (true, false));
        assert_eq!(ip(proto::UDP, 34, 6), (true, false));
        assert!(ip(proto::SCTP, 34, 8).0);
        for (proto, offset) in [(proto::TCP, 16), (proto::UDP, 6)] {
            for wrong in [0, 2, 4, 6, 16, 18, 60].into_iter().filter(|o| *o != offset) {
                assert!(!ip(proto, 34, wrong).0, "{proto} {wrong}");
            }
            for start in [0, 14, 20, 33, 35, 41] {
                assert!(!ip(proto, start, offset).0, "{proto} {start}");
            }
        }
        // Over another part, to the same place.
        assert!(!ip(proto::UDP, 32, 8).0);
    }

    #[test]
    fn what_lies_behind_all_that_was_read_may_change() {
        let ip = |proto, start| said(Parsed::Ip, packet(proto), start, 16);
        for (proto, behind) in [(proto::UDP, 42), (proto::ICMP, 42), (proto::ICMP6, 42), (47, 34), (4, 34)] {
            assert_eq!(ip(proto, behind), (true, true), "{proto}");
            assert!(!ip(proto, behind - 1).0, "{proto}");
        }
        // There is no tunnel in TCP.
        assert!(!ip(proto::TCP, 100).0);
        let later = Packet { marks: mark::LATER_FRAGMENT, l4: 0, ..packet(proto::UDP) };
        assert!(!said(Parsed::Ip, later, 100, 6).0);
        assert!(!said(Parsed::Arp, packet(0), 100, 6).0);
        for start in 0..14 {
            assert!(!said(Parsed::NotIp, packet(0), start, 0).0);
        }
        assert!(said(Parsed::NotIp, packet(0), 14, 0).0);
        // Packets of more than 64 KiB (RFC 2675) are none that can be read.
        let v4 = Packet { dst: crate::Addr::v4(1), ..packet(0) };
        assert_eq!((said(Parsed::Malformed, v4, 34, 16).0, said(Parsed::Malformed, v4, 33, 16).0), (true, false));
        assert_eq!(
            (said(Parsed::Malformed, packet(0), 54, 16).0, said(Parsed::Malformed, packet(0), 53, 16).0),
            (true, false)
        );
    }
}
