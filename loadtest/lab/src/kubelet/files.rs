//! What containerd, kubelet, kube-proxy and the network plugin of a node read. Pure.

use serde_json::{Value, json};

use super::{PAUSE_IMAGE, Proxy, cgroups};
use crate::scenario::{CLUSTER_DOMAIN, Cni, Node, Scenario};

/// A file of a node, by its path below the node's root.
pub type File = (&'static str, String);

/// Everything that a node's programs read, beside their certificates.
pub fn of(scenario: &Scenario, node: &Node, lab: &str, proxy: Proxy) -> Vec<File> {
    let yaml = |value: Value| value.to_string();
    let resolvers: Vec<String> = scenario.internet.resolvers.iter().map(|ip| format!("nameserver {ip}\n")).collect();
    vec![
        ("etc/containerd.toml", containerd()),
        ("etc/kubernetes/kubelet.yaml", yaml(kubelet(scenario, node, lab))),
        ("etc/kubernetes/proxy.yaml", yaml(kube_proxy(node, proxy))),
        ("etc/cni/net.d/10-lab.conflist", yaml(network(scenario, node))),
        ("etc/resolv.conf", resolvers.concat()),
        ("etc/hostname", format!("{}\n", node.name)),
    ]
}

/// The group of a node's pods.
pub fn cgroup_of(node: &str, lab: &str) -> String {
    format!("{}/{node}", cgroups::parent(lab))
}

fn containerd() -> String {
    format!(
        r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.opt"]
[grpc]
address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE_IMAGE}"
# Machines without CAP_SYS_RESOURCE cannot make a process less likely to be killed than its parent.
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/opt/cni/bin"
conf_dir = "/etc/cni/net.d"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = false
"#
    )
}

fn kubelet(scenario: &Scenario, node: &Node, lab: &str) -> Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": "/etc/kubernetes/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": cgroup_of(&node.name, lab),
        "clusterDNS": scenario.kubelet_dns(),
        "clusterDomain": CLUSTER_DOMAIN,
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        // The machine's disk and memory are everybody's: a full disk is no reason to evict pods.
        "evictionHard": {"nodefs.available": "0%", "imagefs.available": "0%", "memory.available": "0%"},
        "failCgroupV1": false,
        "failSwapOn": false,
        "imageGCHighThresholdPercent": 100,
        "localStorageCapacityIsolation": false,
        "makeIPTablesUtilChains": false,
        "resolvConf": "/etc/resolv.conf",
        "tlsCertFile": "/etc/kubernetes/kubelet.crt",
        "tlsPrivateKeyFile": "/etc/kubernetes/kubelet.key",
    })
}

fn kube_proxy(node: &Node, proxy: Proxy) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": "/etc/kubernetes/proxy.conf"},
        // These settings are the machine's and not a namespace's.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpCloseWaitTimeout": "0s", "tcpEstablishedTimeout": "0s"},
        "detectLocalMode": "NodeCIDR",
        "hostnameOverride": node.name,
        "mode": match proxy { Proxy::Nftables => "nftables", Proxy::Iptables => "iptables" },
    })
}

fn network(scenario: &Scenario, node: &Node) -> Value {
    let ranges: Vec<Value> = scenario.ranges(&node.pods).iter().map(|r| json!([{"subnet": r.to_string()}])).collect();
    let routes: Vec<Value> = scenario.families.iter().map(|f| json!({"dst": f.pick("0.0.0.0/0", "::/0")})).collect();
    let mut plugin = json!({
        "type": "ptp",
        "mtu": scenario.mtu,
        // What leaves the cluster is masqueraded by the node's own rules, where the scenario says so.
        "ipMasq": false,
        "ipam": {"type": "host-local", "ranges": ranges, "routes": routes, "dataDir": "/run/cni/networks"},
    });
    if scenario.hosts.cni == Cni::Bridge {
        plugin["type"] = json!("bridge");
        plugin["bridge"] = json!("cni0");
        plugin["isGateway"] = json!(true);
        plugin["hairpinMode"] = json!(true);
    }
    json!({"cniVersion": "1.0.0", "name": "lab", "plugins": [plugin]})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scenario(more: &str) -> Scenario {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../scenarios/cluster.yaml");
        // Tests run beside each other.
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x.yaml");
        std::fs::write(&file, format!("extends: {}\n{more}\n", path.display())).unwrap();
        Scenario::load(&file).unwrap()
    }

    fn read(scenario: &Scenario, file: &str) -> Value {
        let node = scenario.nodes[0].clone();
        let files = of(scenario, &node, "x", Proxy::Iptables);
        let text = files.iter().find(|(name, _)| *name == file).map(|(_, text)| text.clone()).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn pods_get_addresses_of_their_nodes_ranges() {
        let plugin = read(&scenario(""), "etc/cni/net.d/10-lab.conflist")["plugins"][0].take();
        assert_eq!(plugin["type"], "ptp");
        assert_eq!(
            plugin["ipam"]["ranges"],
            json!([[{"subnet": "10.244.1.0/24"}], [{"subnet": "fd00:10:244:1::/64"}]])
        );
        assert_eq!(plugin["ipam"]["routes"], json!([{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]));
        let bridge = read(&scenario("families: [IPv4]\nhosts: {cni: Bridge}"), "etc/cni/net.d/10-lab.conflist");
        let plugin = &bridge["plugins"][0];
        assert_eq!((&plugin["type"], &plugin["isGateway"]), (&json!("bridge"), &json!(true)));
        assert_eq!(plugin["ipam"]["ranges"], json!([[{"subnet": "10.244.1.0/24"}]]));
    }

    #[test]
    fn nodes_know_their_names_groups_and_dns() {
        let both = scenario("");
        let kubelet = read(&both, "etc/kubernetes/kubelet.yaml");
        assert_eq!(kubelet["clusterDNS"], json!(["10.96.0.10", "fd00:10:96::a"]));
        assert_eq!(kubelet["cgroupRoot"], "/tidegate-lab-x/node-1");
        let proxy = read(&both, "etc/kubernetes/proxy.yaml");
        assert_eq!((&proxy["mode"], &proxy["hostnameOverride"]), (&json!("iptables"), &json!("node-1")));
    }
}
