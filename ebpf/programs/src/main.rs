//! The kernel programs: tcx classifiers around the one verdict of `tidegate-ebpf-common`.
//!
//! | program | hook | on |
//! |---|---|---|
//! | `pod_egress`, `pod_ingress` | ingress, egress | host side of a pod's veth |
//! | `node_guard`, `uplink_ingress` | egress, ingress | uplinks |
//! | `tunnel_ingress` | ingress | `tgn` |
//! | `gateway_return` | ingress | `tgq` |
//! | `uplink_egress` | ingress | `tgh` |
//! | `gateway_ingress` | ingress | `tgp`, inside the gateway's namespace |
//!
//! For any other target than BPF this is an empty binary, so that host tools can build the workspace.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod answer;
#[cfg(target_arch = "bpf")]
mod gateway;
#[cfg(target_arch = "bpf")]
mod globals;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod names;
#[cfg(target_arch = "bpf")]
mod node;
#[cfg(target_arch = "bpf")]
mod object;
#[cfg(target_arch = "bpf")]
mod skb;
#[cfg(target_arch = "bpf")]
mod tables;
#[cfg(target_arch = "bpf")]
mod uplink;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
