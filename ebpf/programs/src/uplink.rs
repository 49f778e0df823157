//! Programs around held egress addresses: out by the uplink, and in.

use aya_ebpf::bindings::bpf_fib_lookup;
use aya_ebpf::helpers::generated as bpf;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use tidegate_ebpf_common::layout::iface;
use tidegate_ebpf_common::packet::{self, ETH, mark, proto};
use tidegate_ebpf_common::{Addr, Bytes, Code, Hook, Outcome, Packet, Parsed};

use crate::answer;
use crate::skb::{NEXT, SHOT, Skb};
use crate::tables::{self, count, dropped, get, now_ns};

const FIB_SUCCESS: i64 = 0;
const FIB_NOT_FORWARDED: i64 = 4;
const FIB_NO_NEIGHBOUR: i64 = 7;

/// Whether this node holds the address now.
#[inline(always)]
fn held(addr: &Addr) -> bool {
    get!(HELD, addr).is_some_and(|deadline| now_ns() < *deadline)
}

/// What the gateway sends with an egress address.
#[classifier]
pub fn uplink_egress(ctx: TcContext) -> i32 {
    out(&Skb::new(&ctx))
}

#[inline(always)]
fn out(skb: &Skb) -> i32 {
    let mut p = Packet::default();
    let Some(config) = tables::config() else { return SHOT };
    if skb.parse(&mut p) != Parsed::Ip {
        return dropped(skb, Hook::UplinkEgress, Code::Malformed, &p);
    }
    if !held(&p.src) {
        return dropped(skb, Hook::UplinkEgress, Code::SpoofedSource, &p);
    }
    // SAFETY: all zero is valid for a structure of integers.
    let mut fib: bpf_fib_lookup = unsafe { core::mem::zeroed() };
    fib.ifindex = skb.ifindex();
    fib.l4_protocol = p.proto;
    if p.is_v6() {
        fib.family = 10;
        fib.__bindgen_anon_3.ipv6_src = p.src.0;
        fib.__bindgen_anon_4.ipv6_dst = p.dst.0;
    } else {
        fib.family = 2;
        fib.__bindgen_anon_3.ipv4_src = p.src.0[3];
        fib.__bindgen_anon_4.ipv4_dst = p.dst.0[3];
    }
    // SAFETY: the context and the parameters are valid.
    let found = unsafe { bpf::bpf_fib_lookup(skb.ctx.cast(), &raw mut fib, size_of::<bpf_fib_lookup>() as i32, 0) };
    if found == FIB_SUCCESS || found == FIB_NO_NEIGHBOUR {
        count(Hook::UplinkEgress, Outcome::Steer, Code::Allowed as u8);
        return skb.redirect_neigh(fib.ifindex);
    }
    let local = get!(NODES, &p.dst).is_some_and(|n| n.id == config.node);
    if found != FIB_NOT_FORWARDED || local {
        return dropped(skb, Hook::UplinkEgress, Code::NotAllowed, &p);
    }
    count(Hook::UplinkEgress, Outcome::Pass, Code::Allowed as u8);
    skb.to_host();
    NEXT
}

/// What arrives for a held address. Everything else goes its way untouched.
#[classifier]
pub fn uplink_ingress(ctx: TcContext) -> i32 {
    incoming(&Skb::new(&ctx))
}

#[inline(always)]
fn incoming(skb: &Skb) -> i32 {
    let Some(config) = tables::config() else { return NEXT };
    if config.tgh == 0 {
        return NEXT;
    }
    let ethertype = skb.ethertype();
    if ethertype == packet::ARP {
        return arp(skb);
    }
    let mut p = Packet::default();
    match skb.parse(&mut p) {
        Parsed::Ip => {}
        // What is malformed is dropped only where it is ours.
        Parsed::Malformed if held(&p.dst) => return dropped(skb, Hook::UplinkIngress, Code::Malformed, &p),
        _ => return NEXT,
    }
    let discovery = p.proto == proto::ICMP6 && !p.has(mark::LATER_FRAGMENT) && p.flags >= 133 && p.flags <= 137;
    if discovery && p.flags == 135 {
        return solicited(skb, &p);
    }
    if !held(&p.dst) {
        return NEXT;
    }
    if discovery {
        return dropped(skb, Hook::UplinkIngress, Code::Protocol, &p);
    }
    count(Hook::UplinkIngress, Outcome::Steer, Code::Allowed as u8);
    skb.redirect_peer(config.tgh)
}

/// The MAC address of this uplink.
#[inline(always)]
fn mac(skb: &Skb, to: &mut [u8; 6]) -> bool {
    match get!(IFACES, &skb.ifindex()) {
        Some(i) if i.kind == iface::UPLINK => {
            *to = i.mac;
            true
        }
        _ => false,
    }
}

#[inline(always)]
fn arp(skb: &Skb) -> i32 {
    let mut head = [0u8; 8];
    let (mut sender, mut target, mut own) = ([0u8; 4], [0u8; 4], [0u8; 6]);
    if !skb.load(ETH, &mut head) || !skb.load(ETH + 14, &mut sender) || !skb.load(ETH + 24, &mut target) {
        return NEXT;
    }
    // Ethernet, IPv4, request; an announcement asks nothing.
    if head != [0, 1, 8, 0, 6, 4, 0, 1] || sender == target || !held(&Addr::v4(u32::from_ne_bytes(target))) {
        return NEXT;
    }
    if !mac(skb, &mut own) || !answer::arp(skb, &own) {
        return NEXT;
    }
    count(Hook::UplinkIngress, Outcome::Pass, Code::Allowed as u8);
    skb.redirect(skb.ifindex())
}

#[inline(always)]
fn solicited(skb: &Skb, p: &Packet) -> i32 {
    let mut octets = [0u8; 16];
    let mut own = [0u8; 6];
    // RFC 4861, section 7.1.1: from this link, code 0, no extension headers that we would have to move.
    if p.hops != 255 || p.code != 0 || p.l4 != ETH + 40 || p.length < 64 || !skb.load(ETH + 48, &mut octets) {
        return NEXT;
    }
    let mut target = Addr::default();
    for i in 0..4 {
        let j = i * 4;
        target.0[i] = u32::from_ne_bytes([octets[j], octets[j + 1], octets[j + 2], octets[j + 3]]);
    }
    if !held(&target) {
        return NEXT;
    }
    if !mac(skb, &mut own) || !answer::advertise(skb, &own) {
        return SHOT;
    }
    count(Hook::UplinkIngress, Outcome::Pass, Code::Allowed as u8);
    skb.redirect(skb.ifindex())
}
