//! The scenario as objects of an API server. Pure.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::family::Family;
use crate::product::{documents, manifests, pod_object};
use crate::scenario::{Node, Pod, SYSTEM_NAMESPACE, Scenario};

/// The ServiceAccount of agents.
pub const AGENT_ACCOUNT: &str = "tidegate-agent";
/// The headless Service of gateways, and their ServiceAccount.
pub const GATEWAY_SERVICE: &str = "tidegate-gateway";
/// The controller that makes slices of Services with selectors, such as the gateways'.
const SLICER: &str = "endpointslice-controller";
/// Where gateways listen.
const CONTROL_PORT: u16 = 7443;

/// An object's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Id {
    /// `GROUP/VERSION`, or `v1`.
    pub api: String,
    /// Its kind.
    pub kind: String,
    /// Its namespace, if it has one.
    pub namespace: Option<String>,
    /// Its name.
    pub name: String,
}

impl Id {
    fn of(object: &Value) -> Result<Self> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let metadata = &object["metadata"];
        Ok(Self {
            api: text(&object["apiVersion"]).context("an object without apiVersion")?,
            kind: text(&object["kind"]).context("an object without kind")?,
            namespace: text(&metadata["namespace"]),
            name: text(&metadata["name"]).context("an object without a name")?,
        })
    }

    /// As kubectl takes it: `KIND.VERSION.GROUP/NAME`.
    pub fn target(&self) -> String {
        match self.api.split_once('/') {
            Some((group, version)) => format!("{}.{version}.{group}/{}", self.kind, self.name),
            None => format!("{}/{}", self.kind, self.name),
        }
    }
}

/// The objects of a manifest.
fn parse(text: &str) -> Result<Vec<Value>> {
    let all: Vec<Value> = serde_saphyr::from_multiple(text).map_err(|e| anyhow::anyhow!("{e}"))?;
    Ok(all.into_iter().filter(|o| !o.is_null()).collect())
}

/// The names of a manifest's objects.
///
/// # Errors
/// When it is no YAML, or an object has no name.
pub fn ids(text: &str) -> Result<Vec<Id>> {
    parse(text)?.iter().map(Id::of).collect()
}

/// Statuses that a kubelet would write: where each goes, and what it is.
///
/// # Errors
/// As [`ids`].
pub fn statuses(text: &str) -> Result<Vec<(String, Value)>> {
    let mut all = Vec::new();
    for mut object in parse(text)? {
        let Id { kind, namespace, name, .. } = Id::of(&object)?;
        let status = object["status"].take();
        if status.is_null() {
            continue;
        }
        let path = match (kind.as_str(), namespace) {
            ("Node", _) => format!("/api/v1/nodes/{name}/status"),
            ("Pod", Some(namespace)) => format!("/api/v1/namespaces/{namespace}/pods/{name}/status"),
            _ => continue,
        };
        all.push((path, status));
    }
    Ok(all)
}

/// A manifest without the statuses of its objects.
///
/// # Errors
/// When it is no YAML.
pub fn without_statuses(text: &str) -> Result<String> {
    let mut all = parse(text)?;
    for object in all.iter_mut().filter_map(Value::as_object_mut) {
        object.remove("status");
    }
    documents(all.into_iter())
}

/// All manifests of a scenario: those that a directory has, as an API server takes them, and what the cluster itself
/// would add.
///
/// # Errors
/// When one cannot be written as YAML.
pub fn files(scenario: &Scenario) -> Result<Vec<(String, String)>> {
    let mut files = Vec::new();
    for (name, text) in manifests(scenario)? {
        let objects = parse(&text)?.into_iter().map(|object| native(scenario, object));
        files.push((name, documents(objects)?));
    }
    files.push(("services.yaml".into(), documents(services(scenario)?.into_iter())?));
    files.push(("agents.yaml".into(), documents(scenario.nodes.iter().map(|node| agent(scenario, node)))?));
    Ok(files)
}

/// The name of the agent's pod on a node.
pub fn agent_pod(node: &str) -> String {
    format!("tidegate-agent-{node}")
}

/// The agent's pod, as its DaemonSet makes it: on the node's own network.
fn agent(scenario: &Scenario, node: &Node) -> Value {
    let ips: Vec<Value> = scenario.node_addresses(node).iter().map(|ip| json!({"ip": ip})).collect();
    let first = ips.first().map(|ip| ip["ip"].clone());
    native(
        scenario,
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": agent_pod(&node.name), "namespace": SYSTEM_NAMESPACE,
                "labels": {
                    "app.kubernetes.io/name": "tidegate",
                    "app.kubernetes.io/instance": "tidegate",
                    "app.kubernetes.io/component": "agent",
                },
            },
            "spec": {
                "nodeName": node.name, "hostNetwork": true, "serviceAccountName": AGENT_ACCOUNT,
                "containers": [{"name": "main", "image": "lab"}],
            },
            "status": {"phase": "Running", "podIP": first, "podIPs": ips, "hostIP": first, "hostIPs": ips},
        }),
    )
}

/// A pod that comes while the lab runs, as kubelets write it.
pub fn pod(scenario: &Scenario, pod: &Pod) -> Value {
    native(scenario, pod_object(pod))
}

/// An object as people and kubelets write it.
fn native(scenario: &Scenario, mut object: Value) -> Value {
    if let Some(metadata) = object["metadata"].as_object_mut() {
        // The API server's own.
        metadata.remove("uid");
    }
    if object["kind"] == "Node" {
        object["status"]["conditions"] = json!([{"type": "Ready", "status": "True"}]);
    }
    if object["kind"] == "Pod" {
        object["status"]["conditions"] = json!([{"type": "Ready", "status": "True"}]);
        object["status"]["containerStatuses"] = json!([{
            "name": "main", "image": "lab", "imageID": "lab", "ready": true, "restartCount": 0, "started": true,
            "state": {"running": {}},
        }]);
        let metadata = &object["metadata"];
        let gateway = scenario.gateways.iter().any(|g| metadata["name"] == *g.name);
        if gateway && metadata["namespace"] == SYSTEM_NAMESPACE {
            object["metadata"]["labels"] = json!({
                "app.kubernetes.io/name": "tidegate",
                "app.kubernetes.io/instance": "tidegate",
                "app.kubernetes.io/component": "gateway",
            });
            object["spec"]["serviceAccountName"] = json!(GATEWAY_SERVICE);
            // The Service names its port by the container's.
            object["spec"]["containers"][0]["ports"] = json!([{"name": "control", "containerPort": CONTROL_PORT}]);
        }
    }
    object
}

/// Services with their EndpointSlices, and the slices of the gateways' Service, which is the chart's.
fn services(scenario: &Scenario) -> Result<Vec<Value>> {
    let mut all = Vec::new();
    for service in &scenario.services {
        let pods = scenario.service_pods(service)?;
        let ports = ports(scenario, &pods);
        let listed: Vec<Value> = ports
            .iter()
            .map(|(name, protocol, port)| json!({"name": name, "protocol": protocol, "port": port}))
            .collect();
        let own = scenario.hosts.kube_proxy && !service.cluster_ips.is_empty();
        let mut spec = json!({"ports": listed, "ipFamilyPolicy": "PreferDualStack"});
        if own {
            spec["clusterIP"] = json!(service.cluster_ips.first());
            spec["clusterIPs"] = json!(service.cluster_ips);
        } else {
            spec["clusterIP"] = json!("None");
        }
        all.push(json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": service.name, "namespace": service.namespace},
            "spec": spec,
        }));
        all.extend(slices(scenario, &service.namespace, &service.name, &ports, &pods));
    }
    if scenario.kubernetes.as_ref().is_some_and(|k| k.controllers.iter().any(|c| c == SLICER)) {
        return Ok(all);
    }
    let pods = scenario.gateways.iter().map(|g| scenario.pod(&format!("{SYSTEM_NAMESPACE}/{}", g.name)));
    let pods = pods.collect::<Result<Vec<_>>>()?;
    let control = [("control".to_owned(), "TCP", CONTROL_PORT)];
    all.extend(slices(scenario, SYSTEM_NAMESPACE, GATEWAY_SERVICE, &control, &pods));
    Ok(all)
}

/// The ports of a service: (name, protocol, number).
fn ports(scenario: &Scenario, pods: &[&Pod]) -> Vec<(String, &'static str, u16)> {
    if pods.iter().any(|p| scenario.cluster_dns == p.key()) {
        return vec![("dns".into(), "UDP", 53), ("dns-tcp".into(), "TCP", 53)];
    }
    let Some(listen) = pods.first().map(|p| &p.listen) else {
        return Vec::new();
    };
    let tcp =
        [("https", &listen.https), ("http", &listen.http), ("echo", &listen.tcp_echo)].map(|(n, p)| (n, "TCP", p));
    let all = tcp.into_iter().chain([("echo-udp", "UDP", &listen.udp_echo)]);
    let all = all.flat_map(|(name, protocol, ports)| ports.iter().map(move |p| (format!("{name}-{p}"), protocol, *p)));
    all.collect()
}

/// What the EndpointSlice controller makes of a service: one slice of each family.
fn slices(
    scenario: &Scenario,
    namespace: &str,
    name: &str,
    ports: &[(String, &'static str, u16)],
    pods: &[&Pod],
) -> Vec<Value> {
    let one = |family: &Family| {
        let endpoints: Vec<Value> = pods
            .iter()
            .flat_map(|pod| {
                pod.addresses().into_iter().filter(|ip| Family::of(*ip) == *family).map(move |ip| (pod, ip))
            })
            .map(|(pod, ip)| {
                json!({
                    "addresses": [ip],
                    "conditions": {"ready": true, "serving": true, "terminating": false},
                    "nodeName": pod.node,
                    "targetRef": {"kind": "Pod", "name": pod.name, "namespace": pod.namespace},
                })
            })
            .collect();
        let ports: Vec<Value> = ports
            .iter()
            .map(|(name, protocol, port)| json!({"name": name, "protocol": protocol, "port": port}))
            .collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{name}-{}", family.pick("ipv4", "ipv6")), "namespace": namespace,
                "labels": {"kubernetes.io/service-name": name, "endpointslice.kubernetes.io/managed-by": "tidegate-lab"},
            },
            "addressType": family.pick("IPv4", "IPv6"), "endpoints": endpoints, "ports": ports,
        })
    };
    scenario.families.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop}
status: {podIP: 10.244.1.2}
---
apiVersion: tidegate.dev/v1alpha1
kind: ClusterEgressPolicy
metadata: {name: guard}
";

    #[test]
    fn statuses_stand_apart() {
        let path = "/api/v1/namespaces/shop/pods/web/status".to_owned();
        assert_eq!(statuses(TEXT).unwrap(), [(path, json!({"podIP": "10.244.1.2"}))]);
        let rest = without_statuses(TEXT).unwrap();
        assert!(!rest.contains("podIP") && statuses(&rest).unwrap().is_empty());
        assert_eq!(ids(&rest).unwrap(), ids(TEXT).unwrap());
    }

    #[test]
    fn objects_are_named_for_kubectl() {
        let targets: Vec<String> = ids(TEXT).unwrap().iter().map(Id::target).collect();
        assert_eq!(targets, ["Pod/web", "ClusterEgressPolicy.v1alpha1.tidegate.dev/guard"]);
        assert!(ids("kind: Pod\nmetadata: {name: x}\n").is_err());
        assert!(ids("").unwrap().is_empty());
    }

    #[test]
    fn the_cluster_has_what_kubernetes_would_add() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/variants/kubernetes.yaml");
        let files = files(&Scenario::load(path.as_ref()).unwrap()).unwrap();
        let all: Vec<Value> = files.iter().flat_map(|(_, text)| parse(text).unwrap()).collect();
        assert!(all.iter().all(|o| o["metadata"]["uid"].is_null()), "uids are the API server's to give");
        let of = |kind: &str, name: &str| {
            all.iter()
                .find(|o| o["kind"] == kind && o["metadata"]["name"] == name)
                .unwrap_or_else(|| panic!("{kind} {name}"))
        };
        let gateways = of("EndpointSlice", "tidegate-gateway-ipv4");
        let names: Vec<&Value> =
            gateways["endpoints"].as_array().unwrap().iter().map(|e| &e["targetRef"]["name"]).collect();
        assert_eq!(names, ["gw-a", "gw-b"]);
        assert_eq!(of("EndpointSlice", "kube-dns-ipv6")["endpoints"][0]["addresses"], json!(["fd00:10:244:1::53"]));
        assert_eq!(of("Pod", "gw-a")["spec"]["serviceAccountName"], "tidegate-gateway");
    }
}
