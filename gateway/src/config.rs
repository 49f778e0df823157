//! The gateway's configuration file.
//!
//! Unknown keys are refused; every key has its unit, default and range beside it.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use ipnet::IpNet;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tidegate_ebpf::Capacities;

use crate::egress::nft::MAX_CONNECTIONS;

/// Configuration of one gateway.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Config {
    /// This gateway's name, unique in the cluster. With `kubernetes` it is the pod's name, and may be absent: then the
    /// environment's `POD_NAME`.
    #[serde(default)]
    pub name: String,
    /// The node that it runs on. With `kubernetes` it may be absent: then the environment's `NODE_NAME`.
    #[serde(default)]
    pub node: String,
    /// Folder with manifests; re-read when a file changes. Either this or `kubernetes`.
    #[serde(default)]
    pub directory: Option<PathBuf>,
    /// The API server from which everything comes. Either this or `directory`.
    #[serde(default)]
    pub kubernetes: Option<Kubernetes>,
    /// Where agents connect: gRPC with mutual TLS.
    pub control: SocketAddr,
    /// Certificates, PEM. With `kubernetes` they may be absent.
    #[serde(default)]
    pub tls: Option<Tls>,
    /// Unix socket of this node's agent.
    pub socket: PathBuf,
    /// Folder in a BPF filesystem for this gateway's maps and links.
    pub pins: PathBuf,
    /// Metrics, health and status over HTTP; absent: none.
    #[serde(default)]
    pub admin: Option<SocketAddr>,
    /// The admin API for those who show a token, over TLS. Only with `kubernetes`; absent: none.
    #[serde(default)]
    pub api: Option<SocketAddr>,
    /// Audit log.
    #[serde(default)]
    pub audit: Audit,
    /// Folder of the journal, in which learnt facts outlive a restart; absent: none.
    #[serde(default)]
    pub journal: Option<PathBuf>,
    /// Every gateway, this one included, in the same order on each. With `kubernetes` it may be empty: then they are the
    /// pods behind `kubernetes.service`.
    #[serde(default)]
    pub gateways: Vec<Replica>,
    /// Which gateway holds which pair; pairs that are not listed follow rendezvous order.
    #[serde(default)]
    pub owners: Vec<Owner>,
    /// What is inside the cluster. With `kubernetes` it is added to what the API server says.
    #[serde(default)]
    pub cluster: Cluster,
    /// Where names outside are resolved. Empty: where the machine's `/etc/resolv.conf` says.
    #[serde(default)]
    pub resolvers: Vec<Resolver>,
    /// What a pod is that nothing selects. Default `Untouched`.
    #[serde(default)]
    pub cluster_default: ClusterDefault,
    /// Namespaces that nothing touches. Default `[kube-system]`.
    #[serde(default = "default_exempt")]
    pub exempt_namespaces: Vec<String>,
    /// What pods are that kubelets make. Default `Isolated`.
    #[serde(default)]
    pub mirror_pods: MirrorPods,
    /// Which names are resolved. Default `Strict`.
    #[serde(default)]
    pub dns_filter: DnsFilter,
    /// Clamps and bounds of DNS answers.
    #[serde(default)]
    pub dns: Dns,
    /// A flow without packets for so long is dead. Seconds, 60 to 86400, default 7200.
    #[serde(default = "default_idle")]
    pub flow_idle_seconds: u64,
    /// How long SIGTERM waits for connections to end. Seconds, 0 to 3600, default 30.
    #[serde(default = "default_drain")]
    pub drain_seconds: u64,
    /// UDP port of the tunnel, as the agents have it. Default 8475.
    #[serde(default = "default_tunnel_port")]
    pub tunnel_port: u16,
    /// The device by which this pod reaches the network. Default `eth0`.
    #[serde(default = "default_device")]
    pub device: String,
    /// Whether ICMP echo passes to destinations that a rule allows. Default false.
    #[serde(default)]
    pub ping: bool,
    /// Bounds per namespace.
    #[serde(default)]
    pub quotas: Quotas,
    /// Sizes of the kernel's maps. A change makes a new set of maps, and the gateway moves over to it.
    #[serde(default)]
    pub capacities: Capacities,
    /// How often everything in the kernel is compared with what should be there. Seconds, 1 to 3600, default 30.
    #[serde(default = "default_full_pass")]
    pub full_pass_seconds: u64,
}

/// Where policy and the cluster's facts come from when not from a directory.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Kubernetes {
    /// A kubeconfig; absent: the pod's own ServiceAccount.
    #[serde(default)]
    pub kubeconfig: Option<PathBuf>,
    /// Where the gateways, their Service, Secret, ConfigMap and Lease are; absent: the pod's own namespace, with a
    /// kubeconfig that of its context.
    #[serde(default)]
    pub namespace: Option<String>,
    /// The headless Service of the gateways. Default `tidegate-gateway`.
    #[serde(default = "default_service")]
    pub service: String,
    /// The Service of the cluster's DNS. Default `kube-system/kube-dns`.
    #[serde(default)]
    pub cluster_dns: ServiceName,
    /// Whether the leader takes the taint `tidegate.dev/agent-not-ready` off nodes whose agents enforce. Default false.
    #[serde(default)]
    pub startup_taint: bool,
    /// The cluster's own authority, where `tls` gives no certificates.
    #[serde(default)]
    pub identity: Identity,
}

/// The cluster's own certificate authority, and whom it gives certificates to.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Identity {
    /// The Secret of the authority, made when it is not there. Default `tidegate-ca`.
    pub secret: String,
    /// The Secret is somebody else's, of the type `kubernetes.io/tls`: `tls.crt` and `tls.key` of an authority, and `ca.crt` if
    /// that is signed by another one. It is only read. Default false.
    pub given: bool,
    /// The ConfigMap whose `ca.crt` agents trust, written by the gateways. Default `tidegate-trust`.
    pub trust: String,
    /// The agents' ServiceAccount, in the gateways' namespace. Default `tidegate-agent`.
    pub service_account: String,
    /// What agents' tokens are for. Default `tidegate`.
    pub audience: String,
    /// How long certificates of nodes and gateways hold; they are renewed after two thirds. Seconds, 3 to 2592000,
    /// default 86400.
    pub certificate_seconds: u64,
    /// How long an authority holds; the next one is made after two thirds. Seconds, default 31536000 (a year); at least
    /// three times `certificateSeconds` and `overlapSeconds` together, at most ten years.
    pub authority_seconds: u64,
    /// How long the next authority is trusted before it signs. Seconds, default 3600.
    pub overlap_seconds: u64,
}

impl Default for Identity {
    fn default() -> Self {
        Self {
            secret: "tidegate-ca".into(),
            given: false,
            trust: "tidegate-trust".into(),
            service_account: "tidegate-agent".into(),
            audience: "tidegate".into(),
            certificate_seconds: 86_400,
            authority_seconds: 31_536_000,
            overlap_seconds: 3600,
        }
    }
}

impl Identity {
    fn check(&self) -> Result<()> {
        let key = "kubernetes.identity";
        for (name, value) in [
            ("secret", &self.secret),
            ("trust", &self.trust),
            ("serviceAccount", &self.service_account),
            ("audience", &self.audience),
        ] {
            ensure!(!value.is_empty(), "{key}.{name}: must not be empty");
        }
        ensure!((3..=2_592_000).contains(&self.certificate_seconds), "{key}.certificateSeconds: 3 to 2592000");
        ensure!(self.authority_seconds <= 315_360_000, "{key}.authoritySeconds: at most ten years");
        ensure!(
            self.given
                || self.overlap_seconds <= self.authority_seconds
                    && self.authority_seconds / 3 >= self.certificate_seconds + self.overlap_seconds,
            "{key}.authoritySeconds: at least three times certificateSeconds and overlapSeconds together"
        );
        Ok(())
    }
}

/// The name of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    #[serde(rename = "service")]
    pub name: String,
}

impl Default for ServiceName {
    fn default() -> Self {
        Self { namespace: "kube-system".into(), name: "kube-dns".into() }
    }
}

/// Certificate files in PEM.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// This gateway's certificate chain, for `NAME.gateway.tidegate`.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The CA that signs agents' and gateways' certificates.
    pub ca: PathBuf,
}

/// Where audit records go.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Audit {
    /// A file, appended to; absent: standard output.
    #[serde(default)]
    pub file: Option<PathBuf>,
}

/// One gateway of the cluster.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Replica {
    /// Its name.
    pub name: String,
    /// Its node.
    pub node: String,
    /// Its control endpoint, for the other gateways; absent: they do not know each other's facts, and nobody takes over
    /// from it or for it.
    #[serde(default)]
    pub address: Option<SocketAddr>,
}

/// A pair that is pinned to a gateway.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Owner {
    /// The pool's name.
    pub pool: String,
    /// The pair's IPv4 address, if it has one.
    #[serde(default)]
    pub ipv4: Option<Ipv4Addr>,
    /// The pair's IPv6 address, if it has no IPv4 address.
    #[serde(default)]
    pub ipv6: Option<Ipv6Addr>,
    /// The gateway's name.
    pub gateway: String,
}

/// What is inside the cluster.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Cluster {
    /// Pod, service and other ranges that pass un-steered.
    #[serde(default)]
    pub prefixes: Vec<IpNet>,
    /// Ports on nodes that do not count as the cluster. Default 30000 to 32767.
    #[serde(default)]
    pub node_ports: PortSpan,
    /// Endpoints of the cluster's DNS.
    #[serde(default)]
    pub dns: Vec<SocketAddr>,
    /// Names that the cluster's DNS answers. Default `[cluster.local]`.
    #[serde(default = "default_suffixes")]
    pub suffixes: Vec<String>,
}

impl Default for Cluster {
    fn default() -> Self {
        Self { prefixes: Vec::new(), node_ports: PortSpan::default(), dns: Vec::new(), suffixes: default_suffixes() }
    }
}

/// An inclusive range of ports.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PortSpan {
    /// First port.
    pub first: u16,
    /// Last port.
    pub last: u16,
}

impl Default for PortSpan {
    fn default() -> Self {
        Self { first: 30000, last: 32767 }
    }
}

/// Servers that answer names outside.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Resolver {
    /// Only for names at or below these; absent: for every name.
    #[serde(default)]
    pub suffixes: Vec<String>,
    /// Address and port of each server, tried in order.
    pub servers: Vec<SocketAddr>,
    /// How they are asked. Default `Udp`, with TCP when an answer is truncated.
    #[serde(default)]
    pub protocol: ResolverProtocol,
}

/// How resolvers are asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum ResolverProtocol {
    /// UDP, and TCP on truncation or mismatch.
    #[default]
    Udp,
    /// TCP only.
    Tcp,
}

/// What a pod is that nothing selects.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub enum ClusterDefault {
    /// Left alone.
    #[default]
    Untouched,
    /// Audited.
    Audit,
    /// Default deny.
    Isolated,
}

/// What pods are that kubelets make, in namespaces and with labels of their choice (static pods).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum MirrorPods {
    /// Where policy concerns them, nothing is allowed to them.
    #[default]
    Isolated,
    /// Pods as any other.
    Trusted,
}

/// Which names are resolved.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub enum DnsFilter {
    /// Only those that some rule could match.
    #[default]
    Strict,
    /// All; only allowed ones bind.
    Open,
}

/// Clamps and bounds of DNS.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Dns {
    /// A fact lives at least so long. Seconds, default 30.
    pub ttl_min_seconds: u64,
    /// A fact lives at most so long. Seconds, default 3600.
    pub ttl_max_seconds: u64,
    /// Added to each fact's life. Seconds, default 60.
    pub grace_seconds: u64,
    /// How long an answer waits for the node's kernel. Milliseconds, default 200.
    pub barrier_millis: u64,
}

impl Default for Dns {
    fn default() -> Self {
        Self { ttl_min_seconds: 30, ttl_max_seconds: 3600, grace_seconds: 60, barrier_millis: 200 }
    }
}

/// Bounds per namespace.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Quotas {
    /// Learnt facts. Default 16384.
    pub facts: usize,
    /// Learnt names. Default 8192.
    pub names: usize,
    /// Addresses of one name. Default 64.
    pub addresses_per_name: usize,
    /// DNS queries waiting for an upstream or a node. Default 512.
    pub queries_in_flight: usize,
    /// Relayed connections, and as many forwarded flows for each pool. Default 8192, at most
    /// [`MAX_CONNECTIONS`](crate::egress::nft::MAX_CONNECTIONS).
    pub connections: usize,
}

impl Default for Quotas {
    fn default() -> Self {
        Self { facts: 16384, names: 8192, addresses_per_name: 64, queries_in_flight: 512, connections: 8192 }
    }
}

fn default_service() -> String {
    "tidegate-gateway".into()
}
fn default_exempt() -> Vec<String> {
    vec!["kube-system".into()]
}
fn default_suffixes() -> Vec<String> {
    vec!["cluster.local".into()]
}
fn default_idle() -> u64 {
    7200
}
fn default_drain() -> u64 {
    30
}
fn default_full_pass() -> u64 {
    30
}
fn default_tunnel_port() -> u16 {
    8475
}
fn default_device() -> String {
    "eth0".into()
}

/// Reads a configuration file's text. A key that is not known is an error, since it may be a typing error in what must hold;
/// those who have not typed it are told the way out.
///
/// # Errors
/// The place in the file, and what is wrong there.
pub fn parse<T: DeserializeOwned>(text: &str, path: &Path, of: &str) -> Result<T> {
    serde_saphyr::from_str(text).map_err(|error| {
        let mut said = format!("{} is not a valid {of} configuration: {error}", path.display());
        if said.contains("unknown field") {
            said += "\nThis is Tidegate ";
            said += env!("CARGO_PKG_VERSION");
            said += ". If nobody has typed that key, the chart is of another version: leave image.tag and image.digest to the chart, or install the chart of this version.";
        }
        anyhow::Error::msg(said)
    })
}

impl Config {
    /// Reads and checks the file.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut config: Self = parse(&text, path, "gateway")?;
        config.fill(|name| std::env::var(name).ok());
        config.check().with_context(|| format!("{} is not a valid gateway configuration", path.display()))?;
        Ok(config)
    }

    /// Takes what a pod is told of itself: a Deployment's pods share their configuration.
    fn fill(&mut self, environment: impl Fn(&str) -> Option<String>) {
        if self.kubernetes.is_none() {
            return;
        }
        for (field, variable) in [(&mut self.name, "POD_NAME"), (&mut self.node, "NODE_NAME")] {
            if field.is_empty() {
                *field = environment(variable).unwrap_or_default();
            }
        }
    }

    /// Where objects come from, and what may be absent only if that is an API server.
    fn check_source(&self) -> Result<()> {
        match (&self.directory, &self.kubernetes) {
            (Some(_), Some(_)) => bail!("directory, kubernetes: both are given; one of them is the source"),
            (None, None) => bail!("directory, kubernetes: one of them must be given"),
            (Some(_), None) => {
                ensure!(self.api.is_none(), "api: only with `kubernetes`, which says who may ask");
                ensure!(!self.name.is_empty(), "name: is required");
                ensure!(!self.node.is_empty(), "node: is required");
                ensure!(self.tls.is_some(), "tls: is required with `directory`");
                ensure!(!self.gateways.is_empty(), "gateways: is required with `directory`");
                ensure!(!self.cluster.prefixes.is_empty(), "cluster.prefixes: is required with `directory`");
                ensure!(!self.cluster.dns.is_empty(), "cluster.dns: is required with `directory`");
            }
            (None, Some(k)) => {
                ensure!(!self.name.is_empty(), "name: is required where the environment has no POD_NAME");
                ensure!(!self.node.is_empty(), "node: is required where the environment has no NODE_NAME");
                ensure!(k.namespace.as_deref() != Some(""), "kubernetes.namespace: must not be empty");
                ensure!(!k.service.is_empty(), "kubernetes.service: must not be empty");
                let dns = &k.cluster_dns;
                ensure!(!dns.namespace.is_empty(), "kubernetes.clusterDns.namespace: must not be empty");
                ensure!(!dns.name.is_empty(), "kubernetes.clusterDns.service: must not be empty");
                k.identity.check()?;
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        self.check_source()?;
        ensure!(self.gateways.len() <= 64, "gateways: at most 64");
        let names: BTreeSet<&str> = self.gateways.iter().map(|g| g.name.as_str()).collect();
        ensure!(names.len() == self.gateways.len(), "gateways: a name stands twice");
        let own = self.gateways.iter().find(|g| g.name == self.name);
        ensure!(
            self.gateways.is_empty() || own.is_some_and(|g| g.node == self.node),
            "gateways: {} on node {} is not in the list",
            self.name,
            self.node
        );
        for (i, o) in self.owners.iter().enumerate() {
            let known = self.gateways.is_empty() || names.contains(o.gateway.as_str());
            ensure!(known, "owners[{i}].gateway: {} is not in gateways", o.gateway);
            ensure!(o.ipv4.is_some() || o.ipv6.is_some(), "owners[{i}]: ipv4 or ipv6 must name the pair");
        }
        for (i, r) in self.resolvers.iter().enumerate() {
            ensure!(!r.servers.is_empty(), "resolvers[{i}].servers: at least one");
        }
        ensure!(
            self.cluster.node_ports.first <= self.cluster.node_ports.last,
            "cluster.nodePorts: first is above last"
        );
        ensure!((60..=86400).contains(&self.flow_idle_seconds), "flowIdleSeconds: 60 to 86400");
        self.capacities.validate().map_err(|e| anyhow::anyhow!("capacities: {e}"))?;
        ensure!((1..=3600).contains(&self.full_pass_seconds), "fullPassSeconds: 1 to 3600");
        ensure!(self.drain_seconds <= 3600, "drainSeconds: 0 to 3600");
        ensure!(self.dns.ttl_min_seconds <= self.dns.ttl_max_seconds, "dns.ttlMinSeconds is above dns.ttlMaxSeconds");
        ensure!((1..=5000).contains(&self.dns.barrier_millis), "dns.barrierMillis: 1 to 5000");
        ensure!(
            (1..=MAX_CONNECTIONS).contains(&self.quotas.connections),
            "quotas.connections: 1 to {MAX_CONNECTIONS}, half of an egress address's ports"
        );
        ensure!(!self.device.is_empty() && self.device.len() < 16, "device: 1 to 15 characters");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
name: gw-a
node: n1
directory: /m
control: "[::]:7443"
tls: {certificate: /c, key: /k, ca: /a}
socket: /run/a.sock
pins: /sys/fs/bpf/x
gateways: [{name: gw-a, node: n1}, {name: gw-b, node: n2}]
owners: [{pool: p, ipv4: 203.0.113.10, gateway: gw-b}]
cluster: {prefixes: [10.0.0.0/8], dns: ["10.0.0.53:53"]}
resolvers: [{servers: ["198.51.100.53:53"]}]
"#;

    #[test]
    fn good_config_has_defaults_and_owners() {
        let c: Config = serde_saphyr::from_str(GOOD).unwrap();
        c.check().unwrap();
        assert_eq!(c.flow_idle_seconds, 7200);
        assert_eq!(c.cluster.node_ports.first, 30000);
    }

    const KUBERNETES: &str = r#"
control: "[::]:7443"
socket: /run/a.sock
pins: /sys/fs/bpf/x
kubernetes: {}
resolvers: [{servers: ["198.51.100.53:53"]}]
"#;

    #[test]
    fn with_kubernetes_the_rest_comes_from_the_api() {
        let mut c: Config = serde_saphyr::from_str(KUBERNETES).unwrap();
        assert!(c.check().unwrap_err().to_string().starts_with("name: "));
        c.fill(|name| Some(format!("my-{}", name.to_lowercase())));
        c.check().unwrap();
        assert_eq!((c.name.as_str(), c.node.as_str()), ("my-pod_name", "my-node_name"));
        let k = c.kubernetes.clone().unwrap();
        assert_eq!((k.service.as_str(), k.cluster_dns), ("tidegate-gateway", ServiceName::default()));
        c.fill(|_| Some("other".into()));
        assert_eq!(c.name, "my-pod_name", "what the file says wins");
    }

    #[test]
    fn exactly_one_source() {
        let message = |text: &str| {
            let c: Config = serde_saphyr::from_str(text).unwrap();
            c.check().unwrap_err().to_string()
        };
        assert!(message(&format!("{GOOD}kubernetes: {{}}\n")).contains("both are given"));
        assert!(message(&GOOD.replace("directory: /m\n", "")).contains("one of them must be given"));
        assert!(message(&GOOD.replace("tls: {certificate: /c, key: /k, ca: /a}\n", "")).starts_with("tls: "));
        assert!(message(&GOOD.replace(", dns: [\"10.0.0.53:53\"]", "")).starts_with("cluster.dns: "));
        let named = format!("{KUBERNETES}name: a\nnode: b\n");
        let empty = named.replace("kubernetes: {}", "kubernetes: {service: ''}");
        assert!(message(&empty).starts_with("kubernetes.service: "));
        let named_identity = |text: &str| named.replace("kubernetes: {}", &format!("kubernetes: {{identity: {text}}}"));
        assert!(message(&named_identity("{secret: ''}")).starts_with("kubernetes.identity.secret: "));
        assert!(message(&named_identity("{certificateSeconds: 2}")).contains("certificateSeconds"));
        assert!(message(&named_identity("{authoritySeconds: 269999}")).contains("authoritySeconds"));
        assert!(message(&format!("{GOOD}api: '127.0.0.1:1'\n")).starts_with("api: "));
        let unknown = named.replace("kubernetes: {}", "kubernetes: {kubeConfig: /x}");
        let error = serde_saphyr::from_str::<Config>(&unknown).unwrap_err().to_string();
        assert!(error.contains("kubeConfig"), "{error}");
    }

    #[test]
    fn bad_config_names_the_field() {
        let unknown = format!("{GOOD}\nsurprise: 1\n");
        let said = parse::<Config>(&unknown, Path::new("/x/gateway.yaml"), "gateway").unwrap_err().to_string();
        let hint = concat!("This is Tidegate ", env!("CARGO_PKG_VERSION"));
        assert!(said.starts_with("/x/gateway.yaml") && said.contains("`surprise`") && said.contains(hint), "{said}");
        let wrong = parse::<Config>("name: []", Path::new("x"), "gateway").unwrap_err().to_string();
        assert!(!wrong.contains(hint), "{wrong}");
        let mut c: Config = serde_saphyr::from_str(GOOD).unwrap();
        c.owners[0].gateway = "gw-x".into();
        assert!(c.check().unwrap_err().to_string().contains("owners[0].gateway"));
        c.owners.clear();
        let over = Quotas { connections: MAX_CONNECTIONS + 1, ..c.quotas };
        let quotas = std::mem::replace(&mut c.quotas, over);
        assert!(c.check().unwrap_err().to_string().contains("quotas.connections"));
        c.quotas = quotas;
        c.node = "n9".into();
        assert!(c.check().unwrap_err().to_string().contains("gateways"));
    }
}
