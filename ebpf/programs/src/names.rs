//! Questions to the cluster's DNS: what is asked, and the answer that there is no such name.

use tidegate_ebpf_common::layout::Naming;
use tidegate_ebpf_common::names::{self, asks};
use tidegate_ebpf_common::packet::ETH;
use tidegate_ebpf_common::{Bytes, Packet};

use crate::skb::{SHOT, Skb};

/// What a datagram asks, one of [`asks`].
#[inline(always)]
pub fn ask(skb: &Skb, l4: u32, end: u32, naming: &Naming, known: impl Fn(u64) -> u32) -> u32 {
    // Of datagrams that are sent as one (UDP_SEGMENT) only the first would be looked at.
    if skb.gso_size() != 0 || !skb.keep() {
        return asks::OTHER;
    }
    names::ask(skb, l4, end, naming, known)
}

/// Turns the question around into its answer: NXDOMAIN (RFC 1035, section 4.1.1), without an SOA, so that nobody keeps
/// it (RFC 2308, section 5).
#[inline(always)]
pub fn no_name(skb: &Skb, p: &Packet) -> i32 {
    if turn(skb, p) { skb.redirect(skb.ifindex()) } else { SHOT }
}

#[inline(always)]
fn turn(skb: &Skb, p: &Packet) -> bool {
    let (mut dst, mut src, mut ports, mut old) = ([0u8; 6], [0u8; 6], [0u8; 4], [0u8; 2]);
    let flags = p.l4 + 8 + 2;
    if !skb.load(0, &mut dst) || !skb.load(6, &mut src) || !skb.load(p.l4, &mut ports) || !skb.load(flags, &mut old) {
        return false;
    }
    // QR, AA and RA, with RD and CD as they were asked with.
    let new = (u16::from_be_bytes(old) & 0x0110 | 0x8480 | 3).to_be_bytes();
    // Sums do not change when their parts change places.
    let turned = if p.is_v6() {
        skb.store(ETH + 8, &octets(&p.dst.0)) && skb.store(ETH + 24, &octets(&p.src.0))
    } else {
        skb.store(ETH + 12, &p.dst.0[3].to_ne_bytes()) && skb.store(ETH + 16, &p.src.0[3].to_ne_bytes())
    };
    turned
        && skb.store(0, &src)
        && skb.store(6, &dst)
        && skb.store(p.l4, &[ports[2], ports[3], ports[0], ports[1]])
        && skb.replace(flags, old, new, p.l4 + 6)
}

#[inline(always)]
fn octets(words: &[u32; 4]) -> [u8; 16] {
    let (a, b, c, d) = (words[0].to_ne_bytes(), words[1].to_ne_bytes(), words[2].to_ne_bytes(), words[3].to_ne_bytes());
    [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]]
}
