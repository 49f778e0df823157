//! What the cluster's own DNS and its pods' resolvers are told.

use std::net::IpAddr;

use anyhow::Result;

use crate::kube::GATEWAY_SERVICE;
use crate::product;
use crate::scenario::{CLUSTER_DOMAIN, NameSpec, SYSTEM_NAMESPACE, Scenario};
use crate::serve::zone::{self, Zone};

/// /etc/resolv.conf as the kubelet writes it.
pub fn resolv_conf(scenario: &Scenario, namespace: &str) -> String {
    let mut text = String::new();
    for server in scenario.pod_resolvers() {
        text.push_str(&format!("nameserver {server}\n"));
    }
    text.push_str(&format!("search {namespace}.svc.{CLUSTER_DOMAIN} svc.{CLUSTER_DOMAIN} {CLUSTER_DOMAIN}\n"));
    text.push_str("options ndots:5 timeout:2 attempts:2\n");
    text
}

/// The name that leads agents to gateways.
pub fn gateway_service() -> String {
    format!("{GATEWAY_SERVICE}.{SYSTEM_NAMESPACE}.svc.{CLUSTER_DOMAIN}")
}

/// What the cluster's DNS says when it names these of them.
pub fn gateways<'a>(scenario: &Scenario, names: impl IntoIterator<Item = &'a str>) -> Result<NameSpec> {
    let mut spec = NameSpec { name: gateway_service(), ttl: 5, ..NameSpec::default() };
    for name in names {
        let pod = scenario.pod(&format!("{SYSTEM_NAMESPACE}/{name}"))?;
        spec.ipv4.extend(pod.ipv4);
        spec.ipv6.extend(pod.ipv6);
    }
    Ok(spec)
}

/// What the cluster DNS is the authority for: services, and the pods' reverse names.
pub fn cluster_zone(scenario: &Scenario) -> Result<Zone> {
    let mut names = Vec::new();
    if scenario.kubernetes.is_some() {
        names.push(gateways(scenario, scenario.gateways.iter().map(|g| g.name.as_str()))?);
    }
    for service in &scenario.services {
        let name = format!("{}.{}.svc.{CLUSTER_DOMAIN}", service.name, service.namespace);
        let mut spec = NameSpec { name: name.clone(), ttl: 5, ..NameSpec::default() };
        for ip in scenario.service_addresses(service)? {
            match ip {
                IpAddr::V4(ip) => spec.ipv4.push(ip),
                IpAddr::V6(ip) => spec.ipv6.push(ip),
            }
        }
        for pod in scenario.service_pods(service)? {
            for ip in pod.addresses() {
                names.push(NameSpec {
                    name: zone::reverse(ip),
                    ttl: 5,
                    ptr: Some(name.clone()),
                    ..NameSpec::default()
                });
            }
        }
        names.push(spec);
    }
    Ok(Zone { suffixes: product::suffixes(scenario), names, any_name: None })
}
