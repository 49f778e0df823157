//! Loading, pinning and reconciling the kernel programs and maps.
//!
//! ```text
//!  NodeState + Local ──▶ Datapath::apply ──▶ kernel maps (update, delete, prune)
//!  FactUpdate        ──▶ Datapath::facts ──▶ FACTS
//!  Program, device   ──▶ Datapath::attach ─▶ tcx link, pinned
//!  EVENTS, COUNTERS  ──▶ Events, Datapath::counters
//! ```
//! Maps and links are pinned below a folder of a bpffs, so enforcement outlives the process.
//! All calls do their kernel work in the calling thread, and so in its network namespace.

mod attach;
mod carry;
mod desired;
mod dump;
mod early;
mod entries;
mod error;
mod events;
mod fixed;
mod ids;
mod incarnation;
mod kernel;
mod load;
mod names;
mod own;
mod ports;
mod preflight;
mod sweep;
mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use attach::{Attached, Place, remove_pins};
pub use dump::dump;
pub use early::Attacher;
pub use error::Error;
pub use events::{Counter, Events, PacketEvent, hook_name};
pub use fixed::{Fixed, attach_fixed, detach_fixed, fixed_devices, is_attached};
pub use load::{Datapath, TestPacket, TestResult, is_taken};
pub use own::OWN_ADDRESSES;
pub use preflight::preflight;
pub use sweep::Swept;
pub use tidegate_ebpf_common::layout::OVERLAYS;
pub use tidegate_ebpf_common::verdict::EPHEMERAL;
pub use tidegate_ebpf_common::{Hook, Outcome};

/// What the machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A node: the agent's programs.
    Node,
    /// A gateway: `gateway_ingress` in its own namespace.
    Gateway,
}

/// How the programs are loaded.
#[derive(Clone, Debug)]
pub struct Options {
    /// What the machine is.
    pub role: Role,
    /// A folder on a bpffs of this machine's own; it is made if it is not there.
    pub pins: PathBuf,
    /// UDP port of the tunnel.
    pub tunnel_port: u16,
    /// The mark of packets that passed the verdict; inside `mark_mask`.
    pub mark: u32,
    /// The mark of packets that passed because of the cluster set; another value inside `mark_mask`.
    pub mark_cluster: u32,
    /// The bits of both marks.
    pub mark_mask: u32,
    /// UDP ports at which nodes unpack the network plugin's overlay; the first [`OVERLAYS`] count.
    pub overlay_ports: Vec<u16>,
    /// Largest IP packet in octets that fits into the tunnel: the uplink's MTU less 50, or 70 over IPv6.
    pub tunnel_mtu: u16,
    /// How long flows that passed in audit still pass when their group leaves audit.
    pub drain: Duration,
    /// Flows remembered per endpoint (opened from outside, audit, UDP); a small part of [`Capacities::flows`], so that
    /// no pod leaves others without.
    pub flows_per_endpoint: u32,
    /// Sizes of the maps. A change makes a new set of maps.
    pub capacities: Capacities,
}

impl Options {
    /// The defaults for a machine that pins below `pins`.
    pub fn new(role: Role, pins: impl Into<PathBuf>) -> Self {
        Self {
            role,
            pins: pins.into(),
            tunnel_port: 8475,
            mark: 0x0020_0000,
            mark_cluster: 0x0030_0000,
            mark_mask: 0x00f0_0000,
            overlay_ports: vec![4789, 8472, 6081, 51_820, 51_821],
            tunnel_mtu: 1450,
            drain: Duration::from_secs(30),
            flows_per_endpoint: 4_096,
            capacities: Capacities::default(),
        }
    }
}

/// The most entries of the maps that grow with the cluster, each 1,024 to 16,777,216.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Capacities {
    /// Endpoints.
    pub endpoints: u32,
    /// Facts of all scopes.
    pub facts: u32,
    /// Grants.
    pub grants: u32,
    /// Entries of port sets, eight ranges each.
    pub portsets: u32,
    /// Prefixes of all prefix sets.
    pub prefixes: u32,
    /// Flows of all endpoints.
    pub flows: u32,
}

impl Capacities {
    /// Checks the bounds that hold in configuration files.
    ///
    /// # Errors
    /// The first key outside of them, and what is wrong.
    pub fn validate(&self) -> Result<(), String> {
        let all = [
            ("endpoints", self.endpoints),
            ("facts", self.facts),
            ("grants", self.grants),
            ("portsets", self.portsets),
            ("prefixes", self.prefixes),
            ("flows", self.flows),
        ];
        match all.into_iter().find(|(_, n)| !(1 << 10..=1 << 24).contains(n)) {
            Some((key, n)) => Err(format!("{key} is {n}; it must be from 1024 to 16777216")),
            None => Ok(()),
        }
    }
}

impl Default for Capacities {
    fn default() -> Self {
        Self {
            endpoints: 65_536,
            facts: 1_048_576,
            grants: 262_144,
            portsets: 65_536,
            prefixes: 262_144,
            flows: 262_144,
        }
    }
}

/// A network device with its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its index in the node's namespace.
    pub ifindex: u32,
    /// For a pod's interface the pod's own MAC address (zero if not known), for an uplink the uplink's.
    pub mac: [u8; 6],
}

/// A gateway that is plugged in on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plugged {
    /// The gateway's name.
    pub gateway: String,
    /// Node side of the pod-facing veth.
    pub tgq: u32,
    /// Node side of the uplink-facing veth.
    pub tgh: u32,
}

/// What only this machine knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Local {
    /// This node's name.
    pub node: String,
    /// The tunnel device, 0 if there is none yet.
    pub tunnel_ifindex: u32,
    /// Host-side interfaces of this node's pods, by pod address.
    pub interfaces: BTreeMap<IpAddr, Interface>,
    /// Interfaces that are known to be of untouched pods although the state does not list them.
    pub untouched: BTreeSet<u32>,
    /// Other devices that lead to pods of this node: bridges, second interfaces.
    pub inside: BTreeSet<u32>,
    /// The network plugin's tunnels.
    pub tunnels: BTreeSet<u32>,
    /// The plugged gateway.
    pub plugged: Option<Plugged>,
    /// The uplinks.
    pub uplinks: Vec<Interface>,
    /// Whether packets of unknown pods are dropped; set only once a complete snapshot was applied.
    pub drop_unknown: bool,
    /// Gateways that say nothing: DNS of their scopes goes to the next one that does.
    pub silent: BTreeSet<String>,
}

/// What [`Datapath::apply`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Entries written.
    pub updated: usize,
    /// Entries deleted.
    pub deleted: usize,
    /// Entries that the kernel did not hold as it should have (full passes).
    pub repaired: usize,
    /// Pins that were put back (full passes).
    pub pinned: usize,
}

/// A kernel program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Program {
    /// Ingress of the host side of a pod's veth.
    PodEgress,
    /// Egress of the host side of a pod's veth.
    PodIngress,
    /// Egress of an uplink.
    NodeGuard,
    /// Ingress of the tunnel device.
    TunnelIngress,
    /// Ingress of `tgq`.
    GatewayReturn,
    /// Ingress of `tgh`.
    UplinkEgress,
    /// Ingress of an uplink.
    UplinkIngress,
    /// Ingress of `tgp`, in the gateway's namespace.
    GatewayIngress,
}

impl Program {
    /// Every program.
    pub const ALL: &'static [Program] = &[
        Program::PodEgress,
        Program::PodIngress,
        Program::NodeGuard,
        Program::TunnelIngress,
        Program::GatewayReturn,
        Program::UplinkEgress,
        Program::UplinkIngress,
        Program::GatewayIngress,
    ];

    /// Its name in the object.
    pub const fn name(self) -> &'static str {
        match self {
            Program::PodEgress => "pod_egress",
            Program::PodIngress => "pod_ingress",
            Program::NodeGuard => "node_guard",
            Program::TunnelIngress => "tunnel_ingress",
            Program::GatewayReturn => "gateway_return",
            Program::UplinkEgress => "uplink_egress",
            Program::UplinkIngress => "uplink_ingress",
            Program::GatewayIngress => "gateway_ingress",
        }
    }

    /// The role that runs it.
    pub const fn role(self) -> Role {
        match self {
            Program::GatewayIngress => Role::Gateway,
            _ => Role::Node,
        }
    }

    /// Whether it sees what leaves by the device.
    pub const fn is_egress(self) -> bool {
        matches!(self, Program::PodIngress | Program::NodeGuard)
    }
}
