//! The verdict's tables over the kernel maps; counters and events.

use aya_ebpf::bindings::{__sk_buff, BPF_NOEXIST};
use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use tidegate_ebpf_common::code::{CODES, COUNTERS as ENTRIES, OUTCOMES};
use tidegate_ebpf_common::layout::{
    Addr, Config, DnsKey, Endpoint, Event, Fact, FactKey, Flow, FlowKey, GrantKey, Group, Node, PREFIX_BITS, PortSet,
    Prefix, PrefixKey, Scope, WINDOW_BITS, WINDOW_EVENTS, flow,
};
use tidegate_ebpf_common::names::asks;
use tidegate_ebpf_common::packet::ETH;
use tidegate_ebpf_common::tunnel::Places;
use tidegate_ebpf_common::verdict::{Case, Judged, policy, scan};
use tidegate_ebpf_common::{Code, Hook, Outcome, Packet, Tables};

use crate::globals;
use crate::skb::Skb;
use crate::{maps, names};

/// Looks a hash map up. Values of maps without preallocation are freed after a grace period
/// only, so that a program never sees another key's value.
macro_rules! get {
    ($map:ident, $key:expr) => {
        // SAFETY: see above; the program runs inside one RCU read section.
        unsafe { crate::maps::$map.get($key) }
    };
}
pub(crate) use get;

/// The machine-wide configuration.
#[inline(always)]
pub fn config() -> Option<&'static Config> {
    maps::CONFIG.get(0)
}

/// The coarse monotonic clock.
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: no arguments.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// The kernel's tables; `G` tells a gateway from a node.
pub struct Kernel<const G: bool> {
    pub config: &'static Config,
    /// The packet's context, for who asks what it says; else null.
    pub ctx: *mut __sk_buff,
}

impl<const G: bool> Kernel<G> {
    /// For what the tables alone say.
    #[inline(always)]
    pub fn new(config: &'static Config) -> Self {
        Self { config, ctx: core::ptr::null_mut() }
    }
}

impl<const G: bool> Tables for Kernel<G> {
    const GATEWAY: bool = G;

    #[inline(always)]
    fn now_ns(&self) -> u64 {
        now_ns()
    }
    #[inline(always)]
    fn tunnel_port(&self) -> u16 {
        globals::tunnel_port()
    }
    #[inline(always)]
    fn overlay(&self, port: u16) -> bool {
        globals::overlay(port)
    }
    #[inline(always)]
    fn flags(&self) -> u32 {
        self.config.flags
    }
    #[inline(always)]
    fn node_ports(&self) -> (u16, u16) {
        (self.config.node_port_lo, self.config.node_port_hi)
    }
    #[inline(always)]
    fn interface(&self, ifindex: u32) -> u16 {
        get!(IFACES, &ifindex).map_or(0, |i| i.kind)
    }
    #[inline(always)]
    fn endpoint(&self, addr: &Addr) -> Option<&Endpoint> {
        get!(ENDPOINTS, addr)
    }
    #[inline(always)]
    fn group(&self, id: u32) -> Option<&Group> {
        get!(GROUPS, &id)
    }
    #[inline(always)]
    fn scope(&self, id: u32) -> Option<&Scope> {
        get!(SCOPES, &id)
    }
    #[inline(always)]
    fn gateway(&self, id: u32) -> bool {
        get!(GATEWAYS, &id).is_some()
    }
    #[inline(always)]
    fn heartbeat(&self, id: u32) -> u64 {
        get!(HEARTBEATS, &id).map_or(0, |at| *at)
    }
    #[inline(always)]
    fn node(&self, addr: &Addr) -> bool {
        get!(NODES, addr).is_some()
    }
    #[inline(always)]
    fn cluster(&self, key: &PrefixKey) -> bool {
        maps::CLUSTER.get(aya_ebpf::maps::lpm_trie::Key::new(PREFIX_BITS, *key)).is_some()
    }
    #[inline(always)]
    fn cluster_dns(&self, key: &DnsKey) -> bool {
        get!(CLUSTER_DNS, key).is_some()
    }
    #[inline(always)]
    fn asks(&self, p: &Packet) -> u32 {
        asked(self.ctx, p.l4, ETH + p.length)
    }
    #[inline(always)]
    fn fact(&self, key: &FactKey) -> Option<&Fact> {
        get!(FACTS, key)
    }
    #[inline(always)]
    fn carried(&self, key: &FactKey, now: u32) {
        if let Some(fact) = maps::FACTS.get_ptr_mut(key) {
            // SAFETY: a live map value; a torn read of one aligned word is not possible, and a lost
            // update is made good by the next packet.
            unsafe {
                if (*fact).seen != now {
                    (*fact).seen = now;
                }
            }
        }
    }
    #[inline(always)]
    fn grant(&self, key: &GrantKey) -> Option<u32> {
        get!(GRANTS, key).copied()
    }
    #[inline(always)]
    fn portset(&self, id: u32) -> Option<&PortSet> {
        maps::PORTSETS.get(id)
    }
    #[inline(always)]
    fn ports(&self, set: u32, question: u32) -> u8 {
        scan_ports(set, question) as u8
    }
    #[inline(always)]
    fn judge(&self, p: &Packet, case: &Case) -> Judged {
        Judged(if G { judge_gateway(p, case) } else { judge_node(p, case) })
    }
    #[inline(always)]
    fn prefix(&self, key: &PrefixKey) -> Option<&Prefix> {
        maps::PREFIXES.get(aya_ebpf::maps::lpm_trie::Key::new(PREFIX_BITS, *key))
    }
    #[inline(always)]
    fn flow(&self, key: &FlowKey, now: u32) -> u32 {
        let Some(found) = maps::FLOWS.get_ptr_mut(key) else {
            return 0;
        };
        // SAFETY: as in `carried`.
        unsafe {
            let flags = (*found).flags;
            if (*found).seen != now {
                (*found).seen = now;
            }
            if flags & flow::ANSWERED == 0 {
                (*found).flags = flags | flow::ANSWERED;
            }
            flags
        }
    }
    #[inline(always)]
    fn remember(&self, key: &FlowKey, flags: u32, now: u32) -> bool {
        remember(key, flags, now)
    }
}

impl<const G: bool> Places for Kernel<G> {
    #[inline(always)]
    fn place(&self, addr: &Addr) -> Option<&Endpoint> {
        get!(ENDPOINTS, addr)
    }
    #[inline(always)]
    fn node_at(&self, addr: &Addr) -> Option<&Node> {
        get!(NODES, addr)
    }
    #[inline(always)]
    fn outer(&self, node: u32) -> Option<&Addr> {
        get!(OUTER, &node)
    }
}

/// A global function in the kernel's sense: it is verified once, for any arguments, and not again on
/// every path that calls it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn scan_ports(set: u32, question: u32) -> u32 {
    match config() {
        Some(config) => u32::from(scan(&Kernel::<false>::new(config), set, question)),
        None => 0,
    }
}

/// Steps 8 to 12 on a node. A global function as [`scan_ports`] is.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn judge_node(p: *const Packet, case: *const Case) -> u32 {
    judged::<false>(p, case)
}

/// The same at a gateway.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn judge_gateway(p: *const Packet, case: *const Case) -> u32 {
    judged::<true>(p, case)
}

#[inline(always)]
fn judged<const G: bool>(p: *const Packet, case: *const Case) -> u32 {
    // SAFETY: the verifier lets no other pass than null and a whole structure.
    let (Some(p), Some(case)) = (unsafe { p.as_ref() }, unsafe { case.as_ref() }) else { return Judged::REFUSED.0 };
    let Some(config) = config() else { return Judged::REFUSED.0 };
    policy(&Kernel::<G>::new(config), p, case).0
}

/// A global function as [`scan_ports`] is.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn asked(ctx: *mut __sk_buff, l4: u32, end: u32) -> u32 {
    let Some(naming) = maps::NAMING.get(0) else { return asks::OTHER };
    names::ask(&Skb::of(ctx), l4, end, naming, |hash| get!(NAMES, &hash).copied().unwrap_or(0))
}

/// Remembers a flow within its endpoint's budget.
#[inline(always)]
pub fn remember(key: &FlowKey, flags: u32, now: u32) -> bool {
    if let Some(found) = maps::FLOWS.get_ptr_mut(key) {
        // SAFETY: as in `carried`.
        unsafe {
            (*found).seen = now;
            (*found).flags |= flags;
        }
        return true;
    }
    if let Some(count) = maps::FLOW_COUNTS.get_ptr_mut(&key.pod) {
        // SAFETY: as in `carried`; lost increments are corrected by the host's sweep.
        unsafe {
            if *count >= maps::flow_budget() {
                return false;
            }
            *count += 1;
        }
    } else if maps::FLOW_COUNTS.insert(&key.pod, &1, u64::from(BPF_NOEXIST)).is_err() {
        return false;
    }
    let placed = maps::FLOWS.insert(key, &Flow { seen: now, flags }, u64::from(BPF_NOEXIST)).is_ok();
    if !placed && let Some(count) = maps::FLOW_COUNTS.get_ptr_mut(&key.pod) {
        // SAFETY: as above.
        unsafe { *count = (*count).saturating_sub(1) };
    }
    placed
}

/// Counts one packet.
#[inline(always)]
pub fn count(hook: Hook, outcome: Outcome, code: u8) {
    let index = (hook as u32 * OUTCOMES + outcome as u32) * CODES + (u32::from(code) & (CODES - 1));
    if let Some(n) = maps::COUNTERS.get_ptr_mut(index & (ENTRIES - 1)) {
        // SAFETY: this CPU's own slot; programs on one CPU do not preempt each other at the same hook.
        unsafe { *n += 1 };
    }
}

/// Writes an event, within the budget of its kind. What does not fit is counted.
#[inline(always)]
pub fn report(skb: &Skb, hook: Hook, outcome: Outcome, code: u8, p: &Packet) {
    let kind = u32::from(!matches!(outcome, Outcome::Drop | Outcome::Audit));
    let Some(budget) = maps::BUDGETS.get_ptr_mut(kind) else {
        return;
    };
    let window = now_ns() >> WINDOW_BITS;
    // SAFETY: this CPU's own slot.
    unsafe {
        if (*budget).window != window {
            (*budget).window = window;
            (*budget).used = 0;
        }
        if (*budget).used >= WINDOW_EVENTS {
            (*budget).suppressed += 1;
            return;
        }
        (*budget).used += 1;
        let Some(mut entry) = maps::EVENTS.reserve::<Event>(0) else {
            (*budget).suppressed += 1;
            return;
        };
        let e = entry.as_mut_ptr();
        (*e).src = p.src;
        (*e).dst = p.dst;
        (*e).sport = p.sport;
        (*e).dport = p.dport;
        (*e).ifindex = skb.ifindex();
        (*e).hook = hook as u8;
        (*e).outcome = outcome as u8;
        (*e).code = code;
        (*e).proto = p.proto;
        entry.submit(0);
    }
}

/// Counts and reports a drop.
#[inline(always)]
pub fn dropped(skb: &Skb, hook: Hook, code: Code, p: &Packet) -> i32 {
    count(hook, Outcome::Drop, code as u8);
    report(skb, hook, Outcome::Drop, code as u8, p);
    crate::skb::SHOT
}
