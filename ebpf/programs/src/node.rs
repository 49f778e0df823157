//! Programs of every node: pods, guard, tunnel.

use aya_ebpf::bindings::bpf_fib_lookup;
use aya_ebpf::helpers::generated as bpf;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use tidegate_ebpf_common::layout::{
    DnsKey, Endpoint, VNI_TO_GATEWAY, VNI_TO_POD, config, endpoint, flow, group, iface,
};
use tidegate_ebpf_common::packet::{self, mark, proto};
use tidegate_ebpf_common::tunnel::{self, Outer, Way};
use tidegate_ebpf_common::verdict::{flow_key, in_cluster, is_link_local, seconds};
use tidegate_ebpf_common::{Action, Addr, Code, Decision, Hook, Outcome, Packet, Parsed, verdict};

use crate::skb::{NEXT, SHOT, Skb};
use crate::tables::{self, Kernel, count, dropped, get, now_ns, report};
use crate::{globals, maps, names};

/// What a pod sends.
#[classifier]
pub fn pod_egress(ctx: TcContext) -> i32 {
    pod_egress_inner(&Skb::new(&ctx))
}

#[inline(always)]
fn pod_egress_inner(skb: &Skb) -> i32 {
    let Some(config) = tables::config() else { return SHOT };
    let t = Kernel::<false> { config, ctx: skb.ctx };
    let mut p = Packet::default();
    let mut d = Decision::default();
    match skb.parse_lasting(&mut p) {
        Some(parsed) => verdict(parsed, &p, skb.ifindex(), &t, &mut d),
        None => d.drop(Code::Checksum),
    }
    match d.action {
        Action::Ignore => NEXT,
        Action::Pass => {
            let outcome = if d.audit { Outcome::Audit } else { Outcome::Pass };
            count(Hook::PodEgress, outcome, d.code);
            if d.report {
                report(skb, Hook::PodEgress, outcome, d.code, &p);
            }
            let mark = if d.cluster { globals::mark_cluster() } else { globals::mark() };
            skb.set_mark(skb.mark() & !globals::mark_mask() | mark);
            NEXT
        }
        Action::Drop => {
            count(Hook::PodEgress, Outcome::Drop, d.code);
            report(skb, Hook::PodEgress, Outcome::Drop, d.code, &p);
            SHOT
        }
        Action::Steer => steer(skb, &p, d.owner, config.tunnel),
        Action::NoName => {
            count(Hook::PodEgress, Outcome::Pass, d.code);
            names::no_name(skb, &p)
        }
    }
}

/// To the gateway: into its namespace if it is plugged in here, else through the tunnel.
#[inline(always)]
fn steer(skb: &Skb, p: &Packet, owner: u32, tunnel: u32) -> i32 {
    let Some(gateway) = get!(GATEWAYS, &owner) else {
        return dropped(skb, Hook::PodEgress, Code::NoGateway, p);
    };
    let (node, tgq) = (gateway.node, gateway.tgq);
    skb.set_mark(skb.mark() & !globals::mark_mask());
    if tgq != 0 {
        count(Hook::PodEgress, Outcome::Steer, Code::Allowed as u8);
        return skb.redirect_peer(tgq);
    }
    if p.has(mark::DONT_FRAGMENT) && too_large(skb, p) {
        count(Hook::PodEgress, Outcome::Drop, Code::TooBig as u8);
        report(skb, Hook::PodEgress, Outcome::Drop, Code::TooBig as u8, p);
        return crate::answer::too_big(skb.ctx, u32::from(p.is_v6()));
    }
    let Some(remote) = get!(OUTER, &node) else {
        return dropped(skb, Hook::PodEgress, Code::NoGateway, p);
    };
    if tunnel == 0 || !skb.set_tunnel(VNI_TO_GATEWAY, remote) {
        return dropped(skb, Hook::PodEgress, Code::NoGateway, p);
    }
    count(Hook::PodEgress, Outcome::Steer, Code::Allowed as u8);
    skb.redirect(tunnel)
}

/// Whether the packet, or a segment of it, does not fit into the tunnel.
#[inline(always)]
fn too_large(skb: &Skb, p: &Packet) -> bool {
    let segment = skb.gso_size();
    let length =
        if segment == 0 { skb.len() - packet::ETH } else { p.l4 - packet::ETH + u32::from(p.l4_length) + segment };
    length > maps::tunnel_mtu()
}

/// What a pod receives by the ordinary way: flows that are opened from outside are remembered,
/// so that their replies pass.
#[classifier]
pub fn pod_ingress(ctx: TcContext) -> i32 {
    let skb = Skb::new(&ctx);
    record(&skb);
    NEXT
}

#[inline(always)]
fn record(skb: &Skb) {
    let mut p = Packet::default();
    if skb.parse(&mut p) != Parsed::Ip || p.has(mark::LATER_FRAGMENT) {
        return;
    }
    if !(p.is_syn() || p.proto == proto::UDP || p.is_echo_request()) {
        return;
    }
    let incarnation = match get!(ENDPOINTS, &p.dst) {
        Some(ep) if ep.flags & endpoint::TOUCHED != 0 => ep.incarnation,
        _ => return,
    };
    let Some(config) = tables::config() else { return };
    let t = Kernel::<false>::new(config);
    // Answers into the cluster set pass anyway, and need no place in the table. What the cluster's DNS answers makes none
    // of the next questions one that is not looked at.
    let dns = p.proto == proto::UDP && get!(CLUSTER_DNS, &DnsKey { addr: p.src, port: u32::from(p.sport) }).is_some();
    if dns || in_cluster(&t, &p.src, p.proto, p.sport) || forged(skb, &p.src) {
        return;
    }
    core::mem::swap(&mut p.src, &mut p.dst);
    if p.proto != proto::ICMP && p.proto != proto::ICMP6 {
        core::mem::swap(&mut p.sport, &mut p.dport);
    }
    if !tables::remember(&flow_key(&p, incarnation), flow::OUTSIDE, seconds(now_ns())) {
        count(Hook::PodIngress, Outcome::Pass, Code::Quota as u8);
    }
}

/// Whether the packet entered by an interface of this node's pods with a source that none of them has there.
#[inline(always)]
fn forged(skb: &Skb, src: &Addr) -> bool {
    let from = skb.ingress_ifindex();
    let kind = get!(IFACES, &from).map_or(0, |i| i.kind);
    let place = || get!(ENDPOINTS, src).map_or(0, |ep| ep.ifindex);
    match kind {
        iface::ENDPOINT | iface::UNTOUCHED => place() != from,
        iface::INSIDE => place() == 0,
        _ => false,
    }
}

/// What leaves by an uplink: nothing of an isolated pod that did not come through the verdict.
#[classifier]
pub fn node_guard(ctx: TcContext) -> i32 {
    guard(&Skb::new(&ctx))
}

#[inline(always)]
fn guard(skb: &Skb) -> i32 {
    let ethertype = skb.ethertype();
    let marked = skb.mark() & globals::mark_mask();
    if (ethertype != packet::IPV4 && ethertype != packet::IPV6) || marked == globals::mark() {
        return NEXT;
    }
    let Some(config) = tables::config() else { return NEXT };
    let t = Kernel::<false>::new(config);
    let mut p = Packet::default();
    skb.parse(&mut p);
    if marked == globals::mark_cluster() {
        // A service's address may have been translated to one outside. What entered nowhere is the network plugin's
        // outer packet: unlike its pods' packets it goes to an address that may be in no set.
        if skb.ingress_ifindex() == 0 || in_cluster(&t, &p.dst, p.proto, p.dport) {
            return NEXT;
        }
        return dropped(skb, Hook::NodeGuard, Code::NotAllowed, &p);
    }
    let (armed, from) = (config.flags & config::DROP_UNKNOWN != 0, skb.ingress_ifindex());
    if let Some(ep) = get!(ENDPOINTS, &p.src) {
        if ep.node != config.node {
            // Another node's pods come by an uplink. What entered nowhere with their source is of a child of this one.
            return if armed && from == 0 { dropped(skb, Hook::NodeGuard, Code::UnknownPod, &p) } else { NEXT };
        }
        if ep.flags & endpoint::ISOLATED == 0 {
            return NEXT;
        }
        let audit = get!(GROUPS, &ep.group).is_some_and(|g| g.flags & group::AUDIT != 0);
        if audit {
            count(Hook::NodeGuard, Outcome::Audit, Code::NotAllowed as u8);
            report(skb, Hook::NodeGuard, Outcome::Audit, Code::NotAllowed as u8, &p);
            return NEXT;
        }
        return dropped(skb, Hook::NodeGuard, Code::NotAllowed, &p);
    }
    if !armed || get!(HELD, &p.src).is_some() {
        return NEXT;
    }
    let pass = if from == 0 {
        // This node's own packet, if it has the address: else one of a pod that was given a child of the uplink
        // (macvlan, ipvlan).
        get!(NODES, &p.src).is_some_and(|n| n.id == config.node) || is_own(skb, &p)
    } else {
        // Masqueraded, or entered by an uplink and so another node's.
        get!(NODES, &p.src).is_some()
            || get!(IFACES, &from).is_some_and(|i| matches!(i.kind, iface::UPLINK | iface::UNTOUCHED | iface::TUNNEL))
    };
    if pass {
        return NEXT;
    }
    dropped(skb, Hook::NodeGuard, Code::UnknownPod, &p)
}

/// Whether the source is an address of this node, or one that never leaves the link.
///
/// The kernel's routes say so also of an address that came a moment ago, or while no agent runs. But "not forwarded" is
/// its answer for an address of its own and for one that no route leads to: it counts only where there is a route for
/// everything. Without one, and where the device does not forward, the agent's list decides.
#[inline(always)]
fn is_own(skb: &Skb, p: &Packet) -> bool {
    if is_link_local(&p.src) || p.src == Addr::default() || p.src == Addr::v4(0) {
        return true;
    }
    match route(skb, &p.src) {
        FIB_NOT_FORWARDED => {
            let nobodys = if p.is_v6() { NOBODYS6 } else { NOBODYS4 };
            matches!(route(skb, &nobodys), FIB_FOUND | FIB_NO_NEIGHBOUR) || get!(OWN, &p.src).is_some()
        }
        FIB_FORWARDING_OFF => get!(OWN, &p.src).is_some(),
        _ => false,
    }
}

const FIB_FOUND: i64 = 0;
const FIB_NOT_FORWARDED: i64 = 4;
const FIB_FORWARDING_OFF: i64 = 5;
const FIB_NO_NEIGHBOUR: i64 = 7;

/// Addresses that only a route for everything leads to: 240.0.0.1 is reserved (RFC 1112, section 4), 4000::1 lies outside
/// all that was ever given out (RFC 4291, section 2.4).
const NOBODYS4: Addr = Addr::v4(u32::from_ne_bytes([240, 0, 0, 1]));
const NOBODYS6: Addr = Addr([u32::from_ne_bytes([0x40, 0, 0, 0]), 0, 0, u32::from_ne_bytes([0, 0, 0, 1])]);

/// What the kernel would do with a packet to `dst` that came in by this device.
#[inline(always)]
fn route(skb: &Skb, dst: &Addr) -> i64 {
    // SAFETY: all zero is valid for a structure of integers.
    let mut fib: bpf_fib_lookup = unsafe { core::mem::zeroed() };
    fib.ifindex = skb.ifindex();
    if dst.is_v4() {
        fib.family = 2;
        fib.__bindgen_anon_4.ipv4_dst = dst.0[3];
    } else {
        fib.family = 10;
        fib.__bindgen_anon_4.ipv6_dst = dst.0;
    }
    // SAFETY: the context and the parameters are valid.
    unsafe { bpf::bpf_fib_lookup(skb.ctx.cast(), &raw mut fib, size_of::<bpf_fib_lookup>() as i32, 0) }
}

/// What comes out of the tunnel: packets of pods for the gateway of this node, packets of
/// gateways for the pods of this node. Never up the host's stack.
#[classifier]
pub fn tunnel_ingress(ctx: TcContext) -> i32 {
    from_tunnel(&Skb::new(&ctx))
}

#[inline(always)]
fn from_tunnel(skb: &Skb) -> i32 {
    let mut p = Packet::default();
    let mut outer = Outer::default();
    let Some(config) = tables::config() else { return SHOT };
    let t = Kernel::<false>::new(config);
    let parsed = skb.parse(&mut p);
    let way = if skb.tunnel(&mut outer) {
        tunnel::arrives(parsed, &p, &outer, config, &t)
    } else {
        Way::Drop(Code::Malformed)
    };
    go(skb, Hook::TunnelIngress, way, config.tunnel, &p)
}

/// Into a pod of this node, with the pod's MAC address as destination.
#[inline(always)]
fn to_pod(skb: &Skb, hook: Hook, ep: &Endpoint) -> i32 {
    let (ifindex, mac) = (ep.ifindex, ep.mac);
    if mac != [0; 6] {
        skb.store(0, &mac);
    }
    count(hook, Outcome::Steer, Code::Allowed as u8);
    skb.redirect_peer(ifindex)
}

/// What a gateway sends to pods.
#[classifier]
pub fn gateway_return(ctx: TcContext) -> i32 {
    to_pods(&Skb::new(&ctx))
}

#[inline(always)]
fn to_pods(skb: &Skb) -> i32 {
    let mut p = Packet::default();
    let Some(config) = tables::config() else { return SHOT };
    let t = Kernel::<false>::new(config);
    let parsed = skb.parse(&mut p);
    go(skb, Hook::GatewayReturn, tunnel::returns(parsed, &p, config, &t), config.tunnel, &p)
}

/// On its way.
#[inline(always)]
fn go(skb: &Skb, hook: Hook, way: Way<'_>, device: u32, p: &Packet) -> i32 {
    match way {
        Way::Drop(code) => dropped(skb, hook, code, p),
        Way::Gateway(ifindex) => {
            count(hook, Outcome::Steer, Code::Allowed as u8);
            skb.redirect_peer(ifindex)
        }
        Way::Pod(ep) => to_pod(skb, hook, ep),
        Way::Node(remote) => {
            skb.set_mark(skb.mark() & !globals::mark_mask());
            if !skb.set_tunnel(VNI_TO_POD, remote) {
                return dropped(skb, hook, Code::UnknownPod, p);
            }
            count(hook, Outcome::Steer, Code::Allowed as u8);
            skb.redirect(device)
        }
    }
}
