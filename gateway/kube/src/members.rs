//! Who the gateways are: the endpoints of their headless Service, ready or not.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use futures_util::future::join_all;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::{Client, ResourceExt};

use crate::watch::{Event, List, watch};

/// The Service's port on which gateways listen.
const PORT: &str = "control";
/// The most gateways of a cluster.
const MAX_MEMBERS: usize = 64;
/// A gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its pod.
    pub name: String,
    /// Its node.
    pub node: String,
    /// Its control endpoints, one of each family that the Service has, IPv4 first.
    pub addresses: Vec<SocketAddr>,
    /// Whether its pod is about to end.
    pub terminating: bool,
}

/// Runs for ever; `tell` is told all gateways by name whenever that has changed. It must not block.
pub async fn run(client: Client, namespace: &str, service: &str, tell: impl Fn(Vec<Member>)) {
    let list = List {
        feed: (),
        path: format!("/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"),
        fields: String::new(),
        labels: format!("kubernetes.io/service-name={service}"),
        optional: false,
    };
    let (mut changes, _, tasks) = watch(&client, vec![list]);
    let follow = join_all(tasks);
    let take = async {
        let mut slices: BTreeMap<String, EndpointSlice> = BTreeMap::new();
        let mut told: Option<Vec<Member>> = None;
        while let Some(change) = changes.recv().await {
            match change.event {
                Event::Applied(o) => match serde_json::from_value::<EndpointSlice>(*o) {
                    Ok(slice) => drop(slices.insert(slice.name_any(), slice)),
                    Err(error) => tracing::warn!(%error, "an EndpointSlice of the gateways cannot be read"),
                },
                Event::Deleted(o) => drop(slices.remove(o["metadata"]["name"].as_str().unwrap_or_default())),
                Event::Restarted(seen) => slices.retain(|name, _| seen.contains(&(namespace.to_owned(), name.clone()))),
                Event::Bookmark => {}
            }
            // In the middle of a list some are missing.
            if change.reached.is_none() {
                continue;
            }
            let now = members(slices.values());
            if told.as_ref() != Some(&now) {
                tell(now.clone());
                told = Some(now);
            }
        }
    };
    tokio::join!(follow, take);
}

/// The gateways in these slices. One without a pod, a node or the port is none.
fn members<'s>(slices: impl IntoIterator<Item = &'s EndpointSlice>) -> Vec<Member> {
    let mut out: BTreeMap<String, Member> = BTreeMap::new();
    for slice in slices {
        let ports = slice.ports.iter().flatten();
        let port = ports.filter(|p| p.name.as_deref() == Some(PORT)).find_map(|p| u16::try_from(p.port?).ok());
        let Some(port) = port else { continue };
        for e in &slice.endpoints {
            let pod = e.target_ref.as_ref().filter(|r| r.kind.as_deref() == Some("Pod")).and_then(|r| r.name.clone());
            let (Some(name), Some(node)) = (pod, e.node_name.clone()) else { continue };
            let address =
                e.addresses.first().and_then(|a| a.parse::<IpAddr>().ok()).map(|ip| SocketAddr::new(ip, port));
            let terminating = e.conditions.as_ref().is_some_and(|c| c.terminating == Some(true));
            if out.len() >= MAX_MEMBERS && !out.contains_key(&name) {
                tracing::error!(gateway = name, "more than {MAX_MEMBERS} gateways: one is left out");
                continue;
            }
            let member = out.entry(name.clone()).or_insert(Member { name, node, addresses: Vec::new(), terminating });
            member.terminating |= terminating;
            member.addresses.extend(address);
            member.addresses.sort_unstable();
            member.addresses.dedup();
        }
    }
    out.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn slice(value: serde_json::Value) -> EndpointSlice {
        serde_json::from_value(value).unwrap()
    }

    fn endpoint(pod: &str, node: &str, ip: &str, terminating: bool) -> serde_json::Value {
        json!({
            "addresses": [ip], "nodeName": node, "targetRef": {"kind": "Pod", "name": pod},
            "conditions": {"ready": false, "terminating": terminating},
        })
    }

    #[test]
    fn families_of_a_pod_are_one_member_and_readiness_does_not_count() {
        let ports = json!([{"name": "metrics", "port": 9090}, {"name": "control", "port": 7443}]);
        let v6 = slice(json!({
            "addressType": "IPv6", "metadata": {"name": "s-6"}, "ports": ports,
            "endpoints": [endpoint("gw-b", "n2", "2001:db8::2", true), endpoint("gw-a", "n1", "2001:db8::1", false)],
        }));
        let v4 = slice(json!({
            "addressType": "IPv4", "metadata": {"name": "s-4"}, "ports": ports,
            "endpoints": [
                endpoint("gw-a", "n1", "192.0.2.1", false),
                {"addresses": ["192.0.2.9"], "conditions": {}},
                {"addresses": ["192.0.2.8"], "conditions": {}, "nodeName": "n3", "targetRef": {"kind": "Node", "name": "n3"}},
            ],
        }));
        let found = members([&v6, &v4]);
        let texts = |m: &Member| m.addresses.iter().map(ToString::to_string).collect::<Vec<_>>();
        let a = &found[0];
        assert_eq!((a.name.as_str(), a.node.as_str(), a.terminating), ("gw-a", "n1", false));
        assert_eq!(texts(a), ["192.0.2.1:7443", "[2001:db8::1]:7443"]);
        let b = &found[1];
        assert_eq!((b.name.as_str(), b.terminating, texts(b)), ("gw-b", true, vec!["[2001:db8::2]:7443".to_owned()]));
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn without_the_port_nobody_can_be_reached() {
        let s = slice(json!({
            "addressType": "IPv4", "metadata": {"name": "s"}, "ports": [{"name": "metrics", "port": 9090}],
            "endpoints": [endpoint("gw-a", "n1", "192.0.2.1", false)],
        }));
        assert!(members([&s]).is_empty());
    }

    #[test]
    fn there_is_an_end_to_members() {
        let all: Vec<_> = (0..100).map(|i| endpoint(&format!("gw-{i}"), "n", "192.0.2.1", false)).collect();
        let s = slice(json!({
            "addressType": "IPv4", "metadata": {"name": "s"}, "ports": [{"name": "control", "port": 7443}], "endpoints": all,
        }));
        assert_eq!(members([&s]).len(), MAX_MEMBERS);
    }
}
