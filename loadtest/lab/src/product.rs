//! What the product's processes get: certificates, configuration files and manifests, as an administrator would write them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::certs::{Authority, Files};
use crate::cluster::gateway_service;
use crate::kube::{self, agent_token, gateway_kubeconfig, trust};
use crate::scenario::{CLUSTER_DOMAIN, Pod, SYSTEM_NAMESPACE, Scenario};

/// Where agents find gateways, on the gateway pod's own address.
const CONTROL_PORT: u16 = 7443;
/// Admin port of agents, on loopback.
pub const AGENT_ADMIN: u16 = 9091;
/// Admin port of gateways.
pub const GATEWAY_ADMIN: u16 = 9090;

/// Files and folders of an instance.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The state folder.
    pub folder: PathBuf,
}

impl Layout {
    /// Where the product reads manifests.
    pub fn manifests(&self) -> PathBuf {
        self.folder.join("manifests")
    }

    /// Certificates and keys.
    pub fn ca(&self) -> PathBuf {
        self.folder.join("ca")
    }

    /// Where a bpffs is mounted.
    pub fn bpffs(&self) -> PathBuf {
        self.folder.join("bpf")
    }

    /// Configuration of a process.
    pub fn config(&self, name: &str) -> PathBuf {
        self.folder.join("config").join(format!("{}.yaml", name.replace('/', ".")))
    }

    /// What a process wrote to its standard output and error.
    pub fn log(&self, name: &str) -> PathBuf {
        self.folder.join("log").join(format!("{}.log", name.replace(['/', ' '], ".")))
    }

    /// Audit records of a process.
    pub fn audit(&self, name: &str) -> PathBuf {
        self.folder.join("audit").join(format!("{name}.jsonl"))
    }

    /// The journal of a gateway.
    pub fn journal(&self, name: &str) -> PathBuf {
        self.folder.join("journal").join(name)
    }

    /// The Unix socket of a node's agent.
    pub fn socket(&self, node: &str) -> PathBuf {
        self.folder.join("socket").join(format!("{node}.sock"))
    }

    /// Folder of the CNI plugin on a node: its socket, its records, and what holds while no agent runs.
    pub fn cni(&self, node: &str) -> PathBuf {
        self.folder.join("cni").join(node)
    }

    /// Where a node's agent keeps the certificate that a gateway gave it.
    pub fn identity(&self, node: &str) -> PathBuf {
        self.folder.join("identity").join(node)
    }

    /// Everything of the control plane.
    pub fn control(&self) -> PathBuf {
        self.folder.join("control")
    }

    /// Makes the folders.
    pub fn create(&self) -> Result<()> {
        let folders = [
            self.manifests(),
            self.ca(),
            self.bpffs(),
            self.folder.join("config"),
            self.folder.join("log"),
            self.folder.join("audit"),
            self.folder.join("socket"),
            self.folder.join("serve"),
            self.folder.join("run"),
        ];
        for folder in folders {
            std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        }
        Ok(())
    }
}

/// Writes certificates, configuration and manifests.
///
/// # Errors
/// When a file cannot be written.
pub fn write(scenario: &Scenario, layout: &Layout) -> Result<()> {
    let manifests = if scenario.kubernetes.is_some() { kube::files(scenario)? } else { manifests(scenario)? };
    for (name, text) in manifests {
        std::fs::write(layout.manifests().join(name), text)?;
    }
    if let Some(policies) = &scenario.policies {
        copy_policies(policies, &layout.manifests())?;
    }
    let Some(tidegate) = &scenario.tidegate else {
        return Ok(());
    };
    let mut agents = Vec::new();
    for node in &scenario.nodes {
        agents.push((&node.name, agent(scenario, layout, &node.name)?));
    }
    let mut gateways: Vec<_> =
        scenario.gateways.iter().map(|g| (&g.name, gateway(scenario, layout, &g.name, &g.node))).collect();
    // With an API server gateways are the authority, and agents show their tokens.
    if scenario.kubernetes.is_none() {
        let authority = Authority::new("tidegate-lab control")?;
        let ca = authority.write(&layout.ca(), "control", false)?;
        for (all, role) in [(&mut agents, "node"), (&mut gateways, "gateway")] {
            for (name, config) in all {
                let files = authority.sign(&layout.ca(), &format!("{name}.{role}.tidegate"), &ca)?;
                config["tls"] = tls(&files);
            }
        }
    }
    for (all, keys) in [(agents, &tidegate.agent), (gateways, &tidegate.gateway)] {
        for (name, config) in all {
            std::fs::write(layout.config(name), yaml(&overlay(config, keys))?)?;
        }
    }
    Ok(())
}

/// Writes the configuration of a gateway that was added; with an API server, where it needs no certificate.
pub(crate) fn write_gateway(scenario: &Scenario, layout: &Layout, name: &str, node: &str) -> Result<()> {
    let keys = scenario.tidegate.as_ref().map(|t| t.gateway.clone()).unwrap_or_default();
    let config = overlay(gateway(scenario, layout, name, node), &keys);
    Ok(std::fs::write(layout.config(name), yaml(&config)?)?)
}

/// Policy manifests are copied flat; the product re-reads the copies, so a user's files stay as they are.
fn copy_policies(from: &Path, to: &Path) -> Result<()> {
    for entry in std::fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
        let path = entry?.path();
        let yaml = path.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json");
        if let (true, Some(name)) = (yaml, path.file_name()) {
            std::fs::copy(&path, to.join(name)).with_context(|| format!("cannot copy {}", path.display()))?;
        }
    }
    Ok(())
}

/// A value as YAML.
///
/// # Errors
/// When it cannot be written so.
pub fn yaml(value: &Value) -> Result<String> {
    serde_saphyr::to_string(value).map_err(|e| anyhow::anyhow!("{e}"))
}

/// Lays the scenario's own keys over a generated configuration, maps key by key.
fn overlay(mut base: Value, keys: &BTreeMap<String, Value>) -> Value {
    for (key, value) in keys {
        match (base.get_mut(key), value) {
            (Some(Value::Object(old)), Value::Object(new)) => {
                old.extend(new.iter().map(|(k, v)| (k.clone(), v.clone())));
            }
            _ => base[key] = value.clone(),
        }
    }
    base
}

fn tls(files: &Files) -> Value {
    json!({"certificate": files.certificate, "key": files.key, "ca": files.ca})
}

fn agent(scenario: &Scenario, layout: &Layout, node: &str) -> Result<Value> {
    let gateways = scenario.gateways.iter().map(|gateway| {
        let pod = scenario.pod(&format!("{SYSTEM_NAMESPACE}/{}", gateway.name))?;
        let address = pod.addresses().first().copied().context("a gateway pod has no address")?;
        Ok(json!({"name": gateway.name, "address": SocketAddr::new(address, CONTROL_PORT)}))
    });
    let mut config = json!({
        "node": node,
        "socket": layout.socket(node),
        "cni": {
            "folder": layout.cni(node).join("run"),
            "standing": layout.cni(node).join("standing.json"),
        },
        "pins": layout.bpffs().join(node),
        "interfaces": if scenario.hosts.cni.is_bridge() { "Bridge" } else { "HostRoute" },
        "admin": format!("127.0.0.1:{AGENT_ADMIN}"),
        "audit": {"file": layout.audit(node)},
    });
    if scenario.kubernetes.is_some() {
        config["discover"] = json!({"service": gateway_service(), "port": CONTROL_PORT});
        config["join"] = json!({
            "token": agent_token(&layout.control(), node),
            "ca": trust(&layout.control()),
            "folder": layout.identity(node),
        });
    } else {
        config["gateways"] = json!(gateways.collect::<Result<Vec<_>>>()?);
    }
    Ok(config)
}

fn gateway(scenario: &Scenario, layout: &Layout, name: &str, node: &str) -> Value {
    let owners: Vec<Value> = scenario
        .pools
        .iter()
        .flat_map(|pool| pool.addresses.iter().map(move |pair| (pool, pair)))
        .filter_map(|(pool, pair)| {
            let owner = pair.owner.as_ref()?;
            Some(match pair.ipv4 {
                Some(ipv4) => json!({"pool": pool.name, "ipv4": ipv4, "gateway": owner}),
                None => json!({"pool": pool.name, "ipv6": pair.ipv6, "gateway": owner}),
            })
        })
        .collect();
    let ranges = scenario.nodes.iter().map(|n| &n.pods).chain(&scenario.service_ranges);
    let prefixes: Vec<String> = ranges.flat_map(|r| scenario.ranges(r)).map(|r| r.to_string()).collect();
    let resolvers: Vec<String> =
        scenario.internet.resolvers.iter().map(|ip| SocketAddr::new(*ip, 53).to_string()).collect();
    let gateways: Vec<Value> = scenario
        .gateways
        .iter()
        .map(|g| {
            let pod = scenario.pod(&format!("{SYSTEM_NAMESPACE}/{}", g.name)).ok();
            let address = pod.and_then(|p| p.addresses().first().map(|ip| SocketAddr::new(*ip, CONTROL_PORT)));
            json!({"name": g.name, "node": g.node, "address": address})
        })
        .collect();
    let mut config = json!({
        "name": name,
        "node": node,
        "control": format!("[::]:{CONTROL_PORT}"),
        "socket": layout.socket(node),
        "pins": layout.bpffs().join(name),
        "admin": format!("0.0.0.0:{GATEWAY_ADMIN}"),
        "audit": {"file": layout.audit(name)},
        "gateways": gateways,
        "journal": layout.journal(name),
        "owners": owners,
        "cluster": {
            "prefixes": prefixes,
            "nodePorts": {"first": 30000, "last": 32767},
            "dns": scenario.cluster_dns_servers(),
            "suffixes": suffixes(scenario),
        },
        "resolvers": [{"servers": resolvers, "protocol": "Udp"}],
        "exemptNamespaces": ["kube-system", SYSTEM_NAMESPACE],
    });
    if scenario.kubernetes.is_some() {
        // The API server says where pods, Services and the cluster's DNS are, and who the gateways are.
        config["cluster"] = json!({"suffixes": suffixes(scenario)});
        config["gateways"] = json!([]);
        config["kubernetes"] = json!({
            "kubeconfig": gateway_kubeconfig(&layout.control(), name),
            "namespace": SYSTEM_NAMESPACE,
        });
    } else {
        config["directory"] = json!(layout.manifests());
    }
    config
}

/// What the cluster DNS is the authority for: the cluster domain and the reverse zones of the pod ranges.
pub fn suffixes(scenario: &Scenario) -> Vec<String> {
    let mut all = vec![CLUSTER_DOMAIN.to_owned()];
    for node in &scenario.nodes {
        let octets = node.pods.ipv4.network().octets();
        let kept = usize::from(node.pods.ipv4.prefix_len() / 8);
        let labels: Vec<String> = octets[..kept].iter().rev().map(u8::to_string).collect();
        all.push(format!("{}.in-addr.arpa", labels.join(".")));
        let bits = format!("{:032x}", u128::from(node.pods.ipv6.network()));
        let kept = usize::from(node.pods.ipv6.prefix_len() / 4);
        let labels: Vec<String> = bits[..kept].chars().rev().map(String::from).collect();
        all.push(format!("{}.ip6.arpa", labels.join(".")));
    }
    all
}

/// A UID that is the same in every run: scopes are named by it.
fn uid(kind: &str, name: &str) -> String {
    let hash = format!("{kind}/{name}").bytes().fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d_u128, |h, b| {
        (h ^ u128::from(b)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
    });
    let h = format!("{hash:032x}");
    format!("{}-{}-{}-{}-{}", &h[..8], &h[8..12], &h[12..16], &h[16..20], &h[20..])
}

/// The cluster's objects, one file for each kind, and one for each Namespace so that tests can edit it.
///
/// # Errors
/// When one cannot be written as YAML.
pub fn manifests(scenario: &Scenario) -> Result<Vec<(String, String)>> {
    let mut files = Vec::new();
    for namespace in &scenario.namespaces {
        let mut labels = namespace.labels.clone();
        labels.insert("kubernetes.io/metadata.name".into(), namespace.name.clone());
        let object = namespace_object(&namespace.name, &labels, &namespace.annotations);
        files.push((format!("namespace-{}.yaml", namespace.name), yaml(&object)?));
    }
    let nodes = scenario.nodes.iter().map(|node| {
        let own = scenario.node_addresses(node).into_iter().map(|ip| json!({"type": "InternalIP", "address": ip}));
        let addresses: Vec<Value> = own.chain([json!({"type": "Hostname", "address": node.name})]).collect();
        json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": node.name, "uid": uid("node", &node.name), "labels": node.labels},
            "spec": {"podCIDR": scenario.ranges(&node.pods).first(), "podCIDRs": scenario.ranges(&node.pods)},
            "status": {"addresses": addresses},
        })
    });
    files.push(("nodes.yaml".into(), documents(nodes)?));
    let pods = scenario.pods.iter().map(pod_object);
    files.push(("pods.yaml".into(), documents(pods)?));
    let pools = scenario.pools.iter().map(|pool| {
        let addresses: Vec<Value> = pool
            .addresses
            .iter()
            .map(|pair| {
                let ips = [pair.ipv4.map(|ip| ("ipv4", json!(ip))), pair.ipv6.map(|ip| ("ipv6", json!(ip)))];
                ips.into_iter().flatten().map(|(key, ip)| (key.to_owned(), ip)).collect()
            })
            .collect();
        let selector = |labels: &BTreeMap<String, String>| match labels.is_empty() {
            true => json!({}),
            false => json!({"matchLabels": labels}),
        };
        let mut spec = json!({
            "allowedNamespaces": selector(&pool.allowed_namespaces),
            "addressSource": "Static", "static": {"addresses": addresses},
        });
        if !pool.gateway_node_selector.is_empty() {
            spec["gatewayNodeSelector"] = selector(&pool.gateway_node_selector);
        }
        json!({"apiVersion": "tidegate.dev/v1alpha1", "kind": "EgressPool", "metadata": {"name": pool.name}, "spec": spec})
    });
    if !scenario.pools.is_empty() {
        files.push(("pools.yaml".into(), documents(pools)?));
    }
    Ok(files)
}

/// A Namespace manifest, with the UID that the lab always gives it.
pub fn namespace_object(
    name: &str,
    labels: &BTreeMap<String, String>,
    annotations: &BTreeMap<String, String>,
) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": name, "uid": uid("namespace", name), "labels": labels, "annotations": annotations},
    })
}

/// The Pod of a pod.
pub(crate) fn pod_object(pod: &Pod) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": pod.name, "namespace": pod.namespace, "uid": uid("pod", &pod.key()), "labels": pod.labels,
        },
        "spec": {"nodeName": pod.node, "containers": [{"name": "main", "image": "lab"}]},
        "status": {
            "phase": "Running",
            "podIP": pod.addresses().first(),
            "podIPs": pod.addresses().iter().map(|ip| json!({"ip": ip})).collect::<Vec<_>>(),
        },
    })
}

/// Objects as one text.
pub(crate) fn documents(objects: impl Iterator<Item = Value>) -> Result<String> {
    Ok(objects.map(|o| yaml(&o)).collect::<Result<Vec<_>>>()?.join("---\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yaml_reads_back_as_written() {
        let value = json!({
            "a": ["::1", "yes", "0x10", "12", "[::]:7443", "*.example.com", "", "x: y", "10.244.0.0/16", "1e3", "null"],
            "b": {"c": 1, "d": true, "e": null, "f": {}, "g": []},
        });
        let back: Value = serde_saphyr::from_str(&yaml(&value).unwrap()).unwrap();
        assert_eq!(back, value);
    }

    #[test]
    fn own_keys_are_laid_over() {
        let keys = BTreeMap::from([("dns".to_owned(), json!({"graceSeconds": 1})), ("ping".to_owned(), json!(true))]);
        let base = json!({"dns": {"graceSeconds": 60, "ttlMinSeconds": 30}, "name": "x"});
        let want = json!({"dns": {"graceSeconds": 1, "ttlMinSeconds": 30}, "name": "x", "ping": true});
        assert_eq!(overlay(base, &keys), want);
    }

    #[test]
    fn uids_are_stable_and_distinct() {
        assert_eq!(uid("namespace", "shop"), uid("namespace", "shop"));
        assert_ne!(uid("namespace", "shop"), uid("namespace", "shot"));
        assert_eq!(uid("pod", "x").len(), 36);
    }
}
