//! Who may send what through the tunnel between nodes, and where it goes on.

use crate::code::Code;
use crate::layout::{Addr, Config, Endpoint, Node, VNI_TO_GATEWAY, VNI_TO_POD, endpoint, node};
use crate::packet::{Packet, Parsed};

/// What the ways are looked up in.
pub trait Places {
    /// An endpoint.
    fn place(&self, addr: &Addr) -> Option<&Endpoint>;
    /// The node with this address.
    fn node_at(&self, addr: &Addr) -> Option<&Node>;
    /// The address of a node to use as the tunnel's outer destination.
    fn outer(&self, node: u32) -> Option<&Addr>;
}

/// What the tunnel said of a packet that came out of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outer {
    /// The virtual network identifier.
    pub vni: u32,
    /// The outer source.
    pub from: Addr,
    /// The outer destination.
    pub to: Addr,
}

/// Where a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way<'a> {
    /// Nowhere.
    Drop(Code),
    /// To the gateway of this node, behind this interface.
    Gateway(u32),
    /// To this pod of this node.
    Pod(&'a Endpoint),
    /// Through the tunnel, to this address of another node.
    Node(&'a Addr),
}

/// A packet out of the tunnel: one of a pod for the gateway of this node, or one of a gateway for a pod of this node.
#[inline(always)]
pub fn arrives<'a, T: Places>(parsed: Parsed, p: &Packet, outer: &Outer, config: &Config, t: &'a T) -> Way<'a> {
    if parsed != Parsed::Ip {
        return Way::Drop(Code::Malformed);
    }
    // Other nodes send to the addresses that the state has; at others a pod's packet may arrive with a node's source,
    // masqueraded on its way.
    if t.node_at(&outer.to).is_none_or(|n| n.id != config.node) {
        return Way::Drop(Code::TunnelPort);
    }
    let Some(from) = t.node_at(&outer.from) else {
        return Way::Drop(Code::SpoofedSource);
    };
    if outer.vni == VNI_TO_GATEWAY {
        return match t.place(&p.src) {
            Some(ep) if ep.node == from.id && ep.flags & endpoint::TOUCHED != 0 => {
                if config.tgq == 0 {
                    return Way::Drop(Code::NoGateway);
                }
                Way::Gateway(config.tgq)
            }
            _ => Way::Drop(Code::SpoofedSource),
        };
    }
    if outer.vni != VNI_TO_POD {
        return Way::Drop(Code::Malformed);
    }
    if from.flags & node::GATEWAY == 0 {
        return Way::Drop(Code::SpoofedSource);
    }
    match t.place(&p.dst) {
        Some(ep) if ep.ifindex != 0 => Way::Pod(ep),
        _ => Way::Drop(Code::UnknownPod),
    }
}

/// A packet of this node's gateway, for a pod.
#[inline(always)]
pub fn returns<'a, T: Places>(parsed: Parsed, p: &Packet, config: &Config, t: &'a T) -> Way<'a> {
    if parsed != Parsed::Ip {
        return Way::Drop(Code::Malformed);
    }
    let Some(ep) = t.place(&p.dst) else {
        return Way::Drop(Code::UnknownPod);
    };
    if ep.ifindex != 0 {
        return Way::Pod(ep);
    }
    match t.outer(ep.node) {
        Some(remote) if config.tunnel != 0 && ep.node != config.node => Way::Node(remote),
        _ => Way::Drop(Code::UnknownPod),
    }
}
