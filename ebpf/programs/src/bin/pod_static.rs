//! What a new pod of a namespace that is isolated, or not known, gets while no agent runs: the same verdict over tables that
//! never change. In-cluster destinations pass, as do questions for Services, all else is dropped. An object of its own, so that it loads without the
//! agent's maps.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
#[path = "../globals.rs"]
mod globals;
#[cfg(target_arch = "bpf")]
#[path = "../names.rs"]
mod names;
#[cfg(target_arch = "bpf")]
#[path = "../object.rs"]
mod object;
#[cfg(target_arch = "bpf")]
#[path = "../skb.rs"]
#[allow(dead_code, reason = "shared with programs that do more")]
mod skb;

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
mod program {
    use aya_ebpf::bindings::__sk_buff;
    use aya_ebpf::macros::{classifier, map};
    use aya_ebpf::maps::lpm_trie::Key;
    use aya_ebpf::maps::{Array, HashMap, LpmTrie};
    use aya_ebpf::programs::TcContext;
    use tidegate_ebpf_common::layout::{
        Addr, DnsKey, Endpoint, Fact, FactKey, FlowKey, GrantKey, Group, Naming, PREFIX_BITS, PortSet, Prefix,
        PrefixKey, Scope, iface,
    };
    use tidegate_ebpf_common::names::asks;
    use tidegate_ebpf_common::packet::ETH;
    use tidegate_ebpf_common::{Action, Code, Decision, Packet, Tables, verdict};

    use crate::globals::{self, global};
    use crate::names;
    use crate::skb::{NEXT, SHOT, Skb};

    /// `BPF_F_NO_PREALLOC`.
    const NO_PREALLOC: u32 = 1;

    /// The pod's own addresses.
    #[map]
    static POD: HashMap<Addr, Endpoint> = HashMap::with_max_entries(16, NO_PREALLOC);
    #[map]
    static NODES: HashMap<Addr, u32> = HashMap::with_max_entries(32_768, NO_PREALLOC);
    #[map]
    static CLUSTER: LpmTrie<PrefixKey, u32> = LpmTrie::with_max_entries(65_536, NO_PREALLOC);
    #[map]
    static CLUSTER_DNS: HashMap<DnsKey, u32> = HashMap::with_max_entries(4_096, NO_PREALLOC);

    #[map]
    static NAMES: HashMap<u64, u32> = HashMap::with_max_entries(65_536, NO_PREALLOC);
    #[map]
    static NAMING: Array<Naming> = Array::with_max_entries(1, 0);

    /// First and last port on node addresses that is outside the cluster set.
    #[unsafe(no_mangle)]
    static NODE_PORT_LO: u16 = 1;
    #[unsafe(no_mangle)]
    static NODE_PORT_HI: u16 = 0;

    global!(node_port_lo, NODE_PORT_LO, u16);
    global!(node_port_hi, NODE_PORT_HI, u16);

    macro_rules! get {
        ($map:ident, $key:expr) => {
            // SAFETY: nobody changes the maps while the program is attached.
            unsafe { $map.get($key) }
        };
    }

    /// The tables, with the packet's context.
    struct Fixed(*mut __sk_buff);

    /// A global function in the kernel's sense: it is verified once.
    #[unsafe(no_mangle)]
    #[inline(never)]
    extern "C" fn asked(ctx: *mut __sk_buff, l4: u32, end: u32) -> u32 {
        let Some(naming) = NAMING.get(0) else { return asks::OTHER };
        names::ask(&Skb::of(ctx), l4, end, naming, |hash| get!(NAMES, &hash).copied().unwrap_or(0))
    }

    impl Tables for Fixed {
        const GATEWAY: bool = false;

        #[inline(always)]
        fn now_ns(&self) -> u64 {
            0
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
            0
        }
        #[inline(always)]
        fn node_ports(&self) -> (u16, u16) {
            (node_port_lo(), node_port_hi())
        }
        #[inline(always)]
        fn interface(&self, _: u32) -> u16 {
            iface::ENDPOINT
        }
        #[inline(always)]
        fn endpoint(&self, addr: &Addr) -> Option<&Endpoint> {
            get!(POD, addr)
        }
        #[inline(always)]
        fn group(&self, _: u32) -> Option<&Group> {
            None
        }
        #[inline(always)]
        fn scope(&self, _: u32) -> Option<&Scope> {
            None
        }
        #[inline(always)]
        fn gateway(&self, _: u32) -> bool {
            false
        }
        #[inline(always)]
        fn heartbeat(&self, _: u32) -> u64 {
            0
        }
        #[inline(always)]
        fn node(&self, addr: &Addr) -> bool {
            get!(NODES, addr).is_some()
        }
        #[inline(always)]
        fn cluster(&self, key: &PrefixKey) -> bool {
            CLUSTER.get(Key::new(PREFIX_BITS, *key)).is_some()
        }
        #[inline(always)]
        fn cluster_dns(&self, key: &DnsKey) -> bool {
            get!(CLUSTER_DNS, key).is_some()
        }
        #[inline(always)]
        fn asks(&self, p: &Packet) -> u32 {
            asked(self.0, p.l4, ETH + p.length)
        }
        #[inline(always)]
        fn fact(&self, _: &FactKey) -> Option<&Fact> {
            None
        }
        #[inline(always)]
        fn carried(&self, _: &FactKey, _: u32) {}
        #[inline(always)]
        fn grant(&self, _: &GrantKey) -> Option<u32> {
            None
        }
        #[inline(always)]
        fn portset(&self, _: u32) -> Option<&PortSet> {
            None
        }
        #[inline(always)]
        fn ports(&self, _: u32, _: u32) -> u8 {
            0
        }
        #[inline(always)]
        fn prefix(&self, _: &PrefixKey) -> Option<&Prefix> {
            None
        }
        #[inline(always)]
        fn flow(&self, _: &FlowKey, _: u32) -> u32 {
            0
        }
        #[inline(always)]
        fn remember(&self, _: &FlowKey, _: u32, _: u32) -> bool {
            false
        }
    }

    /// What a pod sends.
    #[classifier]
    pub fn pod_static(ctx: TcContext) -> i32 {
        judge(&Skb::new(&ctx))
    }

    #[inline(always)]
    fn judge(skb: &Skb) -> i32 {
        let mut p = Packet::default();
        let mut d = Decision::default();
        match skb.parse_lasting(&mut p) {
            Some(parsed) => verdict(parsed, &p, skb.ifindex(), &Fixed(skb.ctx), &mut d),
            None => d.drop(Code::Checksum),
        }
        match d.action {
            Action::Ignore => NEXT,
            Action::Pass => {
                let mark = if d.cluster { globals::mark_cluster() } else { globals::mark() };
                skb.set_mark(skb.mark() & !globals::mark_mask() | mark);
                NEXT
            }
            // There is no gateway to steer to.
            Action::Drop | Action::Steer => SHOT,
            Action::NoName => names::no_name(skb, &p),
        }
    }
}
