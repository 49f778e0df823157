//! What the cluster says of itself: where Services have their addresses, where the API servers and the cluster's DNS are,
//! where ExternalName Services lead to, and what Tidegate has assigned.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;
use tidegate_policy::Name;
use tidegate_policy::model::{Pair, Settings};

use super::{Feed, Key};
use crate::problem::printable;

/// The most addresses of the cluster's DNS and of the API servers that are used.
const MAX_ADDRESSES: usize = 512;
/// The most servers of the cluster's DNS that are asked.
const MAX_SERVERS: usize = 64;

/// What one object says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Part {
    prefixes: Vec<IpNet>,
    /// Where DNS is, and whether it is ready to answer.
    dns: Vec<(SocketAddr, bool)>,
}

/// What all of them say.
#[derive(Debug, Default)]
pub(super) struct Cluster {
    parts: BTreeMap<(Feed, Key), Part>,
}

impl Cluster {
    /// Puts what an object says in place, or takes it away; says whether that changed anything.
    pub(super) fn set(&mut self, feed: Feed, key: &Key, part: Option<Part>) -> bool {
        let key = (feed, key.clone());
        match part {
            Some(part) if self.parts.get(&key) == Some(&part) => false,
            Some(part) => {
                self.parts.insert(key, part);
                true
            }
            None => self.parts.remove(&key).is_some(),
        }
    }

    /// The settings of the configuration with what the cluster says.
    pub(super) fn settings(&self, base: &Settings) -> Settings {
        let mut out = base.clone();
        out.cluster_prefixes.extend(self.parts.values().flat_map(|p| &p.prefixes));
        out.cluster_prefixes.sort_unstable();
        out.cluster_prefixes.dedup();
        out.cluster_dns.extend(self.parts.values().flat_map(|p| &p.dns).map(|(at, _)| at));
        out.cluster_dns.sort_unstable();
        out.cluster_dns.dedup();
        out.cluster_dns.truncate(MAX_ADDRESSES);
        out
    }

    /// Who is asked.
    pub(super) fn servers(&self, base: &[SocketAddr]) -> Vec<SocketAddr> {
        let of = |feed: Feed| {
            let parts = self.parts.iter().filter(move |((f, _), _)| *f == feed);
            parts.flat_map(|(_, p)| &p.dns).filter(|(_, ready)| *ready).map(|(at, _)| *at)
        };
        let mut out: Vec<SocketAddr> = of(Feed::DnsEndpoints).collect();
        if out.is_empty() {
            out = of(Feed::DnsService).collect();
        }
        out.sort_unstable();
        let mut all = base.to_vec();
        all.extend(out);
        let mut seen = std::collections::BTreeSet::new();
        all.retain(|at| seen.insert(*at));
        all.truncate(MAX_SERVERS);
        all
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Port {
    port: Option<u16>,
    protocol: Option<String>,
}

impl Port {
    /// DNS is what answers over UDP: the metrics of its pods do not.
    fn udp(ports: Vec<Self>) -> Vec<u16> {
        ports.iter().filter(|p| p.protocol.as_deref() == Some("UDP")).filter_map(|p| p.port).collect()
    }
}

#[derive(Deserialize)]
struct CidrSpec {
    cidrs: Vec<IpNet>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ServiceSpec {
    #[serde(rename = "clusterIPs")]
    cluster_ips: Option<Vec<String>>,
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    ports: Option<Vec<Port>>,
    #[serde(rename = "type")]
    kind: Option<String>,
    external_name: Option<String>,
}

#[derive(Deserialize)]
struct Slice {
    endpoints: Option<Vec<Endpoint>>,
    ports: Option<Vec<Port>>,
}

#[derive(Deserialize)]
struct Endpoint {
    addresses: Vec<String>,
    conditions: Option<Conditions>,
}

#[derive(Deserialize)]
struct Conditions {
    ready: Option<bool>,
}

#[derive(Deserialize)]
struct AssignedStatus {
    egress: Option<Vec<crate::resource::ScopePair>>,
}

fn part<T: serde::de::DeserializeOwned>(value: &Value) -> Result<T, String> {
    T::deserialize(value).map_err(|e| e.to_string())
}

/// Addresses that are addresses: a Service may say `None`, a slice names.
fn addresses<'a>(texts: impl IntoIterator<Item = &'a String>) -> impl Iterator<Item = IpAddr> {
    texts.into_iter().filter_map(|t| t.parse().ok())
}

/// Reads a part of the cluster.
pub(super) fn read(feed: Feed, object: &Value) -> Result<Part, String> {
    let mut out = Part::default();
    match feed {
        Feed::ServiceCidrs => {
            let spec: CidrSpec = part(&object["spec"])?;
            out.prefixes = spec.cidrs.iter().map(IpNet::trunc).collect();
        }
        Feed::DnsService => {
            let spec: ServiceSpec = part(&object["spec"])?;
            let ports = Port::udp(spec.ports.unwrap_or_default());
            let mut ips: Vec<IpAddr> = addresses(spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip)).collect();
            ips.sort_unstable();
            ips.dedup();
            out.dns = ips.iter().flat_map(|ip| ports.iter().map(|p| (SocketAddr::new(*ip, *p), true))).collect();
        }
        Feed::DnsEndpoints | Feed::ApiEndpoints => {
            let slice: Slice = part(object)?;
            let endpoints = slice.endpoints.unwrap_or_default();
            if feed == Feed::ApiEndpoints {
                out.prefixes = endpoints.iter().flat_map(|e| addresses(&e.addresses)).map(IpNet::from).collect();
                out.prefixes.truncate(MAX_ADDRESSES);
            } else {
                let ports = Port::udp(slice.ports.unwrap_or_default());
                for e in &endpoints {
                    let ready = e.conditions.as_ref().and_then(|c| c.ready).unwrap_or(true);
                    for ip in addresses(&e.addresses) {
                        out.dns.extend(ports.iter().map(|p| (SocketAddr::new(ip, *p), ready)));
                    }
                }
                out.dns.truncate(MAX_ADDRESSES);
            }
        }
        _ => return Err("says nothing of the cluster".to_owned()),
    }
    Ok(out)
}

/// Where a Service leads to, if it is an ExternalName.
pub(super) fn external(object: &Value) -> Result<Option<Name>, String> {
    let spec: ServiceSpec = part(&object["spec"])?;
    if spec.kind.as_deref() != Some("ExternalName") {
        return Ok(None);
    }
    let target = spec.external_name.unwrap_or_default();
    let name = Name::from_user(&target).map_err(|e| format!("spec.externalName `{}`: {e}", printable(&target)))?;
    Ok(Some(name))
}

/// The pairs that a namespace was assigned, by pool.
pub(super) fn assigned(object: &Value) -> Result<Vec<(String, Pair)>, String> {
    if object["status"].is_null() {
        return Ok(Vec::new());
    }
    let status: AssignedStatus = part(&object["status"])?;
    let mut out = Vec::new();
    for p in status.egress.unwrap_or_default() {
        let wrong = |text: &str| format!("status.egress: `{}` is not an address", printable(text));
        let ipv4 = p.ipv4.as_deref().map(|t| t.parse().map_err(|_| wrong(t))).transpose()?;
        let ipv6 = p.ipv6.as_deref().map(|t| t.parse().map_err(|_| wrong(t))).transpose()?;
        if ipv4.is_some() || ipv6.is_some() {
            out.push((p.pool, Pair { ipv4, ipv6, draining: false }));
        }
    }
    Ok(out)
}
