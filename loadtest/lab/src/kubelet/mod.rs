//! A whole Kubernetes cluster on one machine: nodes with containerd, kubelet and kube-proxy in namespaces of their own, every
//! controller, the scheduler and CoreDNS.
//!
//! The world around is the lab's: the same underlay, router and internet. Nothing of the product is started: kubectl and helm do
//! that, as they do in any cluster.

pub mod boot;
mod cgroups;
mod faults;
mod files;
mod images;
pub mod pods;
pub mod relay;

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tidegate_kube::{API_PORT, NodeFiles, Output, Tool, tool};

pub(crate) use cgroups::{create as create_cgroup, remove as remove_cgroup};

use crate::kube;
use crate::lab::{Lab, wait_for};
use crate::scenario::Node;

/// Where nodes' disks are; /run is often in memory.
const DISKS: &str = "/var/lib/tidegate-lab";
/// The image of every pod's first process.
pub const PAUSE_IMAGE: &str = "localhost/tidegate-lab/pause:1";
/// An image with a shell, curl, dig and socat, which trusts the internet's authority.
pub const CLIENT_IMAGE: &str = "localhost/tidegate-lab/client:1";
/// CoreDNS, without its Service.
const COREDNS: &str = include_str!("../../../manifests/cluster/coredns.yaml");
/// How long nodes and CoreDNS may take to be ready.
const READY: &str = "--timeout=180s";
/// How long a service of a node may take to be there.
const START_LIMIT: Duration = Duration::from_secs(60);

/// How nodes run pods.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Kubelets {
    /// How kube-proxy makes services.
    #[serde(default)]
    pub kube_proxy: Proxy,
}

/// The modes of kube-proxy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Proxy {
    /// `nftables`
    #[default]
    Nftables,
    /// `iptables`
    Iptables,
}

/// Says in one sentence what this machine lacks to run pods.
fn preflight(proxy: Proxy) -> Result<()> {
    let mut needed = vec![
        ("containerd", "containerd"),
        ("ctr", "containerd"),
        ("runc", "runc"),
        ("curl", "curl"),
        ("dig", "bind9-dnsutils"),
        ("socat", "socat"),
    ];
    if proxy == Proxy::Iptables {
        needed.push(("iptables", "iptables"));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    for (program, package) in needed {
        let found = std::env::split_paths(&path).any(|folder| folder.join(program).is_file());
        ensure!(found, "`{program}` is missing: scripts/setup cluster installs {package}");
    }
    Ok(())
}

/// Where the nodes of an instance keep their files.
pub fn disk(lab: &str) -> PathBuf {
    Path::new(DISKS).join(lab)
}

impl Lab {
    fn kubelets(&self) -> Option<&Kubelets> {
        self.scenario().kubernetes.as_ref()?.kubelets.as_ref()
    }

    /// Whether the cluster's nodes run pods by themselves.
    pub fn has_kubelets(&self) -> bool {
        self.scenario().has_kubelets()
    }

    /// The kubeconfig that is good outside of every namespace, for plain kubectl and helm.
    pub fn host_kubeconfig(&self) -> PathBuf {
        self.layout().folder.join("kubeconfig")
    }

    /// kubectl as somebody at this machine runs it.
    ///
    /// # Errors
    /// With what it said, when it fails.
    pub fn host_kubectl(&self, args: &[&str], stdin: &str) -> Result<String> {
        self.at_host(Tool::Kubectl, args, stdin)?.success().with_context(|| format!("kubectl {}", args.join(" ")))
    }

    /// Runs kubectl or helm as somebody at this machine does.
    ///
    /// # Errors
    /// When it cannot be run. That it failed is in the output.
    pub fn at_host(&self, program: Tool, args: &[&str], stdin: &str) -> Result<Output> {
        let home = self.layout().folder.join("home");
        let mut command = Command::new(tool(program)?);
        command.args(args).env("KUBECONFIG", self.host_kubeconfig()).env("KUBECACHEDIR", &home);
        // Nothing of whoever runs this.
        for key in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            command.env(key, &home);
        }
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        Output::of(child, stdin)
    }

    /// Writes what each node reads, and what it shows to the API server.
    pub(crate) fn write_nodes(&mut self) -> Result<()> {
        preflight(self.kubelets().cloned().unwrap_or_default().kube_proxy)?;
        self.claim_disk(&disk(self.name()))?;
        let scenario = self.scenario().clone();
        let mut nodes = Vec::new();
        for node in &scenario.nodes {
            let root = self.write_disk(node)?;
            nodes.push((node.name.clone(), scenario.node_addresses(node), root.join("etc")));
        }
        let nodes: Vec<NodeFiles<'_>> =
            nodes.iter().map(|(name, addresses, etc)| NodeFiles { name, addresses, etc }).collect();
        let site = self.site()?;
        fs::create_dir_all(site.folder())?;
        site.write_cluster_credentials(&nodes)
    }

    /// Writes what is on a node's disk at first, but for its credentials; gives its folder.
    fn write_disk(&self, node: &Node) -> Result<PathBuf> {
        let root = disk(self.name()).join(&node.name);
        let folders = [
            "etc.work",
            "etc/kubernetes",
            "etc/cni/net.d",
            "opt/cni/bin",
            "opt/node/images",
            "var/lib/kubelet",
            "var/log",
            "var/tmp",
        ];
        for folder in folders {
            fs::create_dir_all(root.join(folder))?;
        }
        let proxy = self.kubelets().cloned().unwrap_or_default().kube_proxy;
        for (file, text) in files::of(self.scenario(), node, self.name(), proxy) {
            fs::write(root.join(file), text).with_context(|| format!("cannot write {file}"))?;
        }
        for plugin in [Tool::Ptp, Tool::Bridge, Tool::Loopback, Tool::HostLocal] {
            fs::copy(tool(plugin)?, root.join("opt/cni/bin").join(plugin.name()))?;
        }
        Ok(root)
    }

    /// Starts controllers, scheduler and every node, and waits until pods can run and names resolve.
    pub(crate) fn start_nodes(&mut self) -> Result<()> {
        let site = self.site()?;
        self.launch_control("kube-controller-manager", site.all_controllers()?)?;
        self.launch_control("kube-scheduler", site.scheduler()?)?;
        self.start_relay()?;
        let images = self.write_images()?;
        let nodes = self.scenario().nodes.clone();
        let list: Vec<_> = nodes.iter().map(|n| self.node_object(n)).collect();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": list});
        self.host_kubectl(&["create", "-f", "-"], &list.to_string())?;
        self.claim_cgroup(&cgroups::parent(self.name()))?;
        for node in &nodes {
            self.claim_cgroup(&files::cgroup_of(&node.name, self.name()))?;
            self.start_node(node, &images)?;
        }
        self.host_kubectl(&["apply", "-f", "-"], COREDNS)?;
        self.host_kubectl(&["apply", "-f", "-"], &self.dns_service().to_string())?;
        let waits = [
            &["wait", "--for=condition=Ready", READY, "nodes", "--all"][..],
            &["rollout", "status", READY, "-n", "kube-system", "deployment/coredns"],
        ];
        for args in waits {
            self.host_kubectl(args, "").with_context(|| self.nodes_say())?;
        }
        Ok(())
    }

    fn start_relay(&mut self) -> Result<()> {
        let site = self.site()?;
        let address = relay::address(site.folder());
        site.write_admin_kubeconfig(&self.host_kubeconfig(), address)?;
        let mut command = Command::new(self.binary());
        command.args(["relay", "--listen", &SocketAddr::new(address, API_PORT).to_string()]);
        command.args(["--netns", self.place(kube::PLACE)?.netns(), "--to", &site.endpoint().to_string()]);
        let relay = self.launch_here("relay", command)?;
        let up = wait_for(START_LIMIT, || match self.host_kubectl(&["get", "--raw", "/readyz"], "") {
            _ if !relay.is_alive() => Some(false),
            said => said.is_ok().then_some(true),
        });
        ensure!(up == Some(true), "the API server cannot be reached from here: {}", self.last_words("relay"));
        Ok(())
    }

    /// Starts a node, or starts it again.
    ///
    /// # Errors
    /// When it ends at once.
    fn start_node(&mut self, node: &Node, images: &Path) -> Result<()> {
        let programs = [("kubelet", Tool::Kubelet), ("kube-proxy", Tool::Proxy)];
        let at = |name: &str| format!("{}/{name}", boot::PROGRAMS);
        let addresses: Vec<String> = self.scenario().node_addresses(node).iter().map(ToString::to_string).collect();
        let service = |name: &str, command: Vec<String>| (name.to_owned(), command);
        let config = boot::Config {
            name: node.name.clone(),
            disk: disk(self.name()).join(&node.name),
            programs: programs.iter().map(|(name, t)| Ok(((*name).to_owned(), tool(*t)?))).collect::<Result<_>>()?,
            images: images.to_owned(),
            services: vec![
                service("containerd", vec!["containerd".into(), "--config".into(), "/etc/containerd.toml".into()]),
                service(
                    "kubelet",
                    vec![
                        at("kubelet"),
                        "--config=/etc/kubernetes/kubelet.yaml".into(),
                        "--kubeconfig=/etc/kubernetes/kubelet.conf".into(),
                        format!("--hostname-override={}", node.name),
                        format!("--node-ip={}", addresses.join(",")),
                    ],
                ),
                service("kube-proxy", vec![at("kube-proxy"), "--config=/etc/kubernetes/proxy.yaml".into()]),
            ],
        };
        let file = self.layout().folder.join("config").join(format!("{}.node.json", node.name));
        fs::write(&file, serde_json::to_vec_pretty(&config)?)?;
        let mut command = Command::new(self.binary());
        command.arg("node").arg(&file);
        let netns = self.place(&node.name)?.netns().to_owned();
        self.launch(&format!("node {}", node.name), &netns, command).map(drop)
    }

    /// The Node, with the addresses of its pods, which a controller of a cloud or kubeadm's gives elsewhere.
    fn node_object(&self, node: &Node) -> serde_json::Value {
        let ranges: Vec<String> = self.scenario().ranges(&node.pods).iter().map(ToString::to_string).collect();
        json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": node.name, "labels": node.labels},
            "spec": {"podCIDR": ranges.first(), "podCIDRs": ranges},
        })
    }

    fn dns_service(&self) -> serde_json::Value {
        let addresses = self.scenario().kubelet_dns();
        let ports: Vec<_> = [("dns", "UDP"), ("dns-tcp", "TCP")]
            .map(|(name, protocol)| json!({"name": name, "port": 53, "protocol": protocol}))
            .to_vec();
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "kube-dns", "namespace": "kube-system", "labels": {"k8s-app": "kube-dns"}},
            "spec": {
                "selector": {"k8s-app": "kube-dns"}, "ports": ports, "ipFamilyPolicy": "PreferDualStack",
                "clusterIP": addresses.first(), "clusterIPs": addresses,
            },
        })
    }

    /// The ends of nodes' logs, for an error.
    fn nodes_say(&self) -> String {
        let mut text = String::new();
        for node in &self.scenario().nodes {
            let log = disk(self.name()).join(&node.name).join("var/log/kubelet.log");
            let log = fs::read_to_string(log).unwrap_or_default();
            let errors: Vec<&str> = log.lines().rev().filter(|l| l.starts_with('E')).take(2).collect();
            text.push_str(&format!(
                "{}: {}; {}\n",
                node.name,
                self.last_words(&format!("node {}", node.name)),
                errors.join(" | ")
            ));
        }
        text
    }

    /// Turns this process into a command on a node, among its processes and mounts.
    ///
    /// # Errors
    /// When the node does not run, or the command cannot be.
    pub fn exec_on_node(&self, node: &str, command: &[String]) -> Result<std::convert::Infallible> {
        use std::os::unix::process::CommandExt;
        let init = self.node_init(node)?;
        let error = Command::new("nsenter").arg(format!("--target={init}")).args(["--all", "--"]).args(command).exec();
        Err(error).context("cannot run nsenter")
    }

    /// A node's files, as it sees them itself.
    ///
    /// # Errors
    /// When the node does not run.
    pub fn node_root(&self, node: &str) -> Result<PathBuf> {
        Ok(Path::new("/proc").join(self.node_init(node)?.to_string()).join("root"))
    }

    /// The process id of a node's init, as the machine sees it.
    fn node_init(&self, node: &str) -> Result<i32> {
        let outer = self.process(&format!("node {node}"))?.pid;
        let children = fs::read_to_string(format!("/proc/{outer}/task/{outer}/children"))
            .with_context(|| format!("{node} does not run"))?;
        children.split_whitespace().next().and_then(|c| c.parse().ok()).with_context(|| format!("{node} has no init"))
    }
}
