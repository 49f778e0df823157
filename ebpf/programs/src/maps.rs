//! The maps, and values that the loader sets for this object alone.

use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, PerCpuArray, RingBuf};
use tidegate_ebpf_common::code::COUNTERS as COUNTER_ENTRIES;
use tidegate_ebpf_common::layout::{
    Addr, Budget, Config, DnsKey, Endpoint, Fact, FactKey, Flow, FlowKey, Gateway, GrantKey, Group, IdKey, Iface,
    Naming, Node, PortSet, Prefix, PrefixKey, Scope,
};

use crate::globals::global;

/// `BPF_F_NO_PREALLOC`: maps that may be large take memory as they fill.
const NO_PREALLOC: u32 = 1;

#[map]
pub static CONFIG: Array<Config> = Array::with_max_entries(1, 0);
#[map]
pub static ENDPOINTS: HashMap<Addr, Endpoint> = HashMap::with_max_entries(65_536, NO_PREALLOC);
#[map]
pub static IFACES: HashMap<u32, Iface> = HashMap::with_max_entries(4_096, NO_PREALLOC);
#[map]
pub static GROUPS: HashMap<u32, Group> = HashMap::with_max_entries(65_536, NO_PREALLOC);
#[map]
pub static SCOPES: HashMap<u32, Scope> = HashMap::with_max_entries(65_536, NO_PREALLOC);
#[map]
pub static GATEWAYS: HashMap<u32, Gateway> = HashMap::with_max_entries(1_024, NO_PREALLOC);
#[map]
pub static HEARTBEATS: HashMap<u32, u64> = HashMap::with_max_entries(1_024, NO_PREALLOC);
#[map]
pub static NODES: HashMap<Addr, Node> = HashMap::with_max_entries(32_768, NO_PREALLOC);
/// The address to use as the tunnel's outer destination, by node id.
#[map]
pub static OUTER: HashMap<u32, Addr> = HashMap::with_max_entries(16_384, NO_PREALLOC);
/// This node's own addresses, whatever device has them.
#[map]
pub static OWN: HashMap<Addr, u32> = HashMap::with_max_entries(16_384, NO_PREALLOC);
#[map]
pub static FACTS: HashMap<FactKey, Fact> = HashMap::with_max_entries(1_048_576, NO_PREALLOC);
#[map]
pub static GRANTS: HashMap<GrantKey, u32> = HashMap::with_max_entries(262_144, NO_PREALLOC);
#[map]
pub static PORTSETS: Array<PortSet> = Array::with_max_entries(65_536, 0);
#[map]
pub static PREFIXES: LpmTrie<PrefixKey, Prefix> = LpmTrie::with_max_entries(262_144, NO_PREALLOC);
#[map]
pub static CLUSTER: LpmTrie<PrefixKey, u32> = LpmTrie::with_max_entries(65_536, NO_PREALLOC);
#[map]
pub static CLUSTER_DNS: HashMap<DnsKey, u32> = HashMap::with_max_entries(4_096, NO_PREALLOC);
/// Names of Services, by their hashes.
#[map]
pub static NAMES: HashMap<u64, u32> = HashMap::with_max_entries(65_536, NO_PREALLOC);
#[map]
pub static NAMING: Array<Naming> = Array::with_max_entries(1, 0);
/// Deadlines (coarse nanoseconds) of held egress addresses.
#[map]
pub static HELD: HashMap<Addr, u64> = HashMap::with_max_entries(1_024, NO_PREALLOC);
#[map]
pub static FLOWS: HashMap<FlowKey, Flow> = HashMap::with_max_entries(262_144, NO_PREALLOC);
/// Flows per endpoint; corrected by the host's sweep.
#[map]
pub static FLOW_COUNTS: HashMap<Addr, u32> = HashMap::with_max_entries(65_536, NO_PREALLOC);
#[map]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(COUNTER_ENTRIES, 0);
/// Budgets of drops (0) and of first packets (1).
#[map]
pub static BUDGETS: PerCpuArray<Budget> = PerCpuArray::with_max_entries(2, 0);
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);
/// Dense ids by 128-bit key, for the host.
#[map]
pub static IDS: HashMap<IdKey, u32> = HashMap::with_max_entries(262_144, NO_PREALLOC);

/// The largest IP packet that fits into the tunnel.
#[unsafe(no_mangle)]
static TUNNEL_MTU: u32 = 1450;
/// Flows per endpoint.
#[unsafe(no_mangle)]
static FLOW_BUDGET: u32 = 4_096;

global!(tunnel_mtu, TUNNEL_MTU, u32);
global!(flow_budget, FLOW_BUDGET, u32);
