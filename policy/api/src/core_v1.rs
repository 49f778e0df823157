//! The read-only parts of core v1 Pod and Node. Fields that Tidegate does not read are ignored,
//! since the API server grows them; the ones it reads must be what they are.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;
use tidegate_policy::model;

use crate::convert::{Converted, Ctx};
use crate::problem::Code;
use crate::resource::Meta;

/// The most addresses or prefixes that are read of one object.
const MAX_ADDRESSES: usize = 32;

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct RawPod {
    spec: Option<PodSpec>,
    status: Option<PodStatus>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct PodSpec {
    node_name: Option<String>,
    host_network: Option<bool>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct PodStatus {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<PodIp>>,
}

#[derive(Deserialize)]
struct PodIp {
    ip: String,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct RawNode {
    spec: Option<NodeSpec>,
    status: Option<NodeStatus>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct NodeSpec {
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct NodeStatus {
    addresses: Option<Vec<NodeAddress>>,
}

#[derive(Deserialize)]
struct NodeAddress {
    #[serde(rename = "type")]
    kind: String,
    address: String,
}

/// On every pod that a kubelet makes: it can make none without it, and nobody can add it or take it away later.
pub(crate) const MIRROR: &str = "kubernetes.io/config.mirror";

/// Converts a pod. One that has ended holds no address any more.
pub(crate) fn pod(meta: &Meta, raw: RawPod) -> Converted<model::Pod> {
    let mut ctx = Ctx::default();
    let spec = raw.spec.unwrap_or_default();
    let status = raw.status.unwrap_or_default();
    let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    let mut texts: Vec<String> = status.pod_ips.unwrap_or_default().into_iter().map(|p| p.ip).collect();
    texts.extend(status.pod_ip);
    let addresses = ctx.field("status", |ctx| ctx.field("podIPs", |ctx| addresses(ctx, texts, true)));
    let mirror = meta.annotations.contains_key(MIRROR);
    let host_network = spec.host_network.unwrap_or_default();
    if mirror && !host_network {
        let said = "its node's kubelet made it: where policy concerns it, nothing is allowed to it unless `mirrorPods` is `Trusted`";
        ctx.field("metadata", |ctx| ctx.field("annotations", |ctx| ctx.warn(Code::NoEffect, said.to_owned())));
    }
    let pod = model::Pod {
        node: spec.node_name.unwrap_or_default(),
        addresses: if ended { Vec::new() } else { addresses },
        labels: meta.labels.clone(),
        host_network,
        ending: meta.ending,
        mirror,
    };
    ctx.finish(Some(pod))
}

/// The shortest prefixes of pods that one node is believed to have, in bits. What a node says of itself a stolen one says,
/// too, and what is inside the cluster passes unjudged on every node.
const NODE_PREFIX: (u8, u8) = (16, 48);

/// Converts a node. Only its internal addresses count: it is not to make addresses of the internet a part of the cluster.
pub(crate) fn node(meta: &Meta, raw: RawNode) -> Converted<model::Node> {
    let mut ctx = Ctx::default();
    let all = raw.status.unwrap_or_default().addresses.unwrap_or_default();
    let texts = all.into_iter().filter(|a| a.kind == "InternalIP").map(|a| a.address).collect();
    let addresses = ctx.field("status", |ctx| ctx.field("addresses", |ctx| addresses(ctx, texts, false)));
    let spec = raw.spec.unwrap_or_default();
    let mut cidrs = spec.pod_cidrs.unwrap_or_default();
    cidrs.extend(spec.pod_cidr);
    let mut pod_prefixes: Vec<IpNet> = Vec::new();
    ctx.field("spec", |ctx| {
        ctx.field("podCIDRs", |ctx| {
            for text in cidrs.iter().take(MAX_ADDRESSES) {
                match text.parse::<IpNet>() {
                    Ok(net) if is_too_wide(&net) => {
                        ctx.refuse(
                            Code::Invalid,
                            format!(
                                "`{net}` is too much for one node: at most an IPv4 /{} or an IPv6 /{} counts as inside the cluster",
                                NODE_PREFIX.0, NODE_PREFIX.1
                            ),
                        );
                    }
                    Ok(net) if !pod_prefixes.contains(&net.trunc()) => pod_prefixes.push(net.trunc()),
                    Ok(_) => {}
                    Err(_) => {
                        ctx.error(Code::Invalid, format!("`{}` is not a prefix", crate::problem::printable(text)))
                    }
                }
            }
        });
    });
    ctx.finish(Some(model::Node { addresses, labels: meta.labels.clone(), pod_prefixes }))
}

fn is_too_wide(net: &IpNet) -> bool {
    net.prefix_len() < if net.addr().is_ipv4() { NODE_PREFIX.0 } else { NODE_PREFIX.1 }
}

/// Reads addresses, each once; with `one_per_family`, the first of each family.
fn addresses(ctx: &mut Ctx, texts: Vec<String>, one_per_family: bool) -> Vec<IpAddr> {
    let mut out: Vec<IpAddr> = Vec::new();
    for text in texts.into_iter().take(MAX_ADDRESSES).filter(|t| !t.is_empty()) {
        match text.parse::<IpAddr>() {
            Ok(ip) if out.contains(&ip) || one_per_family && out.iter().any(|o| o.is_ipv4() == ip.is_ipv4()) => {}
            Ok(ip) => out.push(ip),
            Err(_) => ctx.error(Code::Invalid, format!("`{}` is not an IP address", crate::problem::printable(&text))),
        }
    }
    out
}
