//! Packets that the programs answer in place: ICMP for packets that are too large, ARP and
//! neighbour advertisements for held addresses.

use aya_ebpf::bindings::__sk_buff;
use tidegate_ebpf_common::Bytes;
use tidegate_ebpf_common::packet::ETH;

use crate::maps;
use crate::skb::{SHOT, Skb};

/// Adds big-endian words to a one's complement sum (RFC 1071).
#[inline(always)]
fn sum<const N: usize>(start: u32, bytes: &[u8; N]) -> u32 {
    let mut total = start;
    let mut i = 0;
    while i + 1 < N {
        total += u32::from(u16::from_be_bytes([bytes[i], bytes[i + 1]]));
        i += 2;
    }
    total
}

#[inline(always)]
fn fold(total: u32) -> [u8; 2] {
    let t = (total & 0xffff) + (total >> 16);
    let t = (t & 0xffff) + (t >> 16);
    (!(t as u16)).to_be_bytes()
}

/// Turns the frame around: the sender's MAC address becomes the destination.
#[inline(always)]
fn swap_macs(skb: &Skb) -> bool {
    let (mut dst, mut src) = ([0u8; 6], [0u8; 6]);
    skb.load(0, &mut dst) && skb.load(6, &mut src) && skb.store(0, &src) && skb.store(6, &dst)
}

/// Answers Frag-Needed (RFC 1191) or Packet-Too-Big (RFC 4443, section 3.2) to the sender, from
/// the original destination. A global function in the kernel's sense: it has a stack of its own.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn too_big(ctx: *mut __sk_buff, v6: u32) -> i32 {
    let skb = &Skb::of(ctx);
    let done = if v6 != 0 { too_big_v6(skb) } else { too_big_v4(skb) };
    if done && swap_macs(skb) { skb.redirect(skb.ifindex()) } else { SHOT }
}

#[inline(always)]
fn too_big_v4(skb: &Skb) -> bool {
    let mut original = [0u8; 28];
    if !skb.load(ETH, &mut original) || !skb.resize(ETH + 20 + 8 + 28) {
        return false;
    }
    let mtu = (maps::tunnel_mtu() as u16).to_be_bytes();
    let mut icmp = [3, 4, 0, 0, 0, 0, mtu[0], mtu[1]];
    let check = fold(sum(sum(0, &icmp), &original));
    icmp[2] = check[0];
    icmp[3] = check[1];
    let o = &original;
    let mut ip = [0x45, 0, 0, 56, 0, 0, 0x40, 0, 64, 1, 0, 0, o[16], o[17], o[18], o[19], o[12], o[13], o[14], o[15]];
    let check = fold(sum(0, &ip));
    ip[10] = check[0];
    ip[11] = check[1];
    skb.store(ETH, &ip) && skb.store(ETH + 20, &icmp) && skb.store(ETH + 28, &original)
}

#[inline(always)]
fn too_big_v6(skb: &Skb) -> bool {
    let mut original = [0u8; 48];
    if !skb.load(ETH, &mut original) || !skb.resize(ETH + 40 + 8 + 48) {
        return false;
    }
    let mtu = (maps::tunnel_mtu() as u16).to_be_bytes();
    let mut icmp = [2, 0, 0, 0, 0, 0, mtu[0], mtu[1]];
    let (mut src, mut dst) = ([0u8; 16], [0u8; 16]);
    if !skb.load(ETH + 8, &mut src) || !skb.load(ETH + 24, &mut dst) {
        return false;
    }
    let pseudo = sum(sum(8 + 48 + 58, &src), &dst);
    let check = fold(sum(sum(pseudo, &icmp), &original));
    icmp[2] = check[0];
    icmp[3] = check[1];
    let head = [0x60, 0, 0, 0, 0, 56, 58, 64];
    skb.store(ETH, &head)
        && skb.store(ETH + 8, &dst)
        && skb.store(ETH + 24, &src)
        && skb.store(ETH + 40, &icmp)
        && skb.store(ETH + 48, &original)
}

/// Turns an ARP request (RFC 826) into its answer: `mac` has the address that was asked for.
#[inline(always)]
pub fn arp(skb: &Skb, mac: &[u8; 6]) -> bool {
    let mut body = [0u8; 28];
    if !skb.load(ETH, &mut body) {
        return false;
    }
    let b = &body;
    let asker = [b[8], b[9], b[10], b[11], b[12], b[13]];
    let reply = [
        0, 1, 8, 0, 6, 4, 0, 2, mac[0], mac[1], mac[2], mac[3], mac[4], mac[5], b[24], b[25], b[26], b[27], asker[0],
        asker[1], asker[2], asker[3], asker[4], asker[5], b[14], b[15], b[16], b[17],
    ];
    skb.store(0, &asker) && skb.store(6, mac) && skb.store(ETH, &reply)
}

/// Length of an advertisement with the target's link-layer address, in its frame.
const ADVERTISEMENT: u32 = ETH + 40 + 24 + 8;

/// Turns a neighbour solicitation into its advertisement (RFC 4861, section 4.4).
#[inline(always)]
pub fn advertise(skb: &Skb, mac: &[u8; 6]) -> bool {
    let (mut asker_mac, mut asker, mut target) = ([0u8; 6], [0u8; 16], [0u8; 16]);
    if !skb.load(6, &mut asker_mac) || !skb.load(ETH + 8, &mut asker) || !skb.load(ETH + 48, &mut target) {
        return false;
    }
    // Somebody probes whether the address is free: all nodes shall hear that it is not.
    let probe = asker == [0; 16];
    if probe {
        asker = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        asker_mac = [0x33, 0x33, 0, 0, 0, 1];
    }
    if !skb.resize(ADVERTISEMENT) {
        return false;
    }
    // Solicited and override, or override alone.
    let mut icmp = [136, 0, 0, 0, if probe { 0x20 } else { 0x60 }, 0, 0, 0];
    let option = [2, 1, mac[0], mac[1], mac[2], mac[3], mac[4], mac[5]];
    // The target stands in the pseudo header as source, and in the message.
    let pseudo = sum(sum(32 + 58, &target), &asker);
    let check = fold(sum(sum(sum(pseudo, &icmp), &target), &option));
    icmp[2] = check[0];
    icmp[3] = check[1];
    let head = [0x60, 0, 0, 0, 0, 32, 58, 255];
    skb.store(0, &asker_mac)
        && skb.store(6, mac)
        && skb.store(ETH, &head)
        && skb.store(ETH + 8, &target)
        && skb.store(ETH + 24, &asker)
        && skb.store(ETH + 40, &icmp)
        && skb.store(ETH + 48, &target)
        && skb.store(ETH + 64, &option)
}
