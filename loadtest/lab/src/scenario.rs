//! What a lab is made of: the scenario file (docs/lab.md describes every key).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::family::{FAMILIES, Family};
use crate::kube::{self, Kubernetes};

/// A whole scenario.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Scenario {
    /// The families that nodes and pods have.
    #[serde(default = "both")]
    pub families: Vec<Family>,
    /// Whether nodes masquerade what pods send outside, as most CNIs do.
    #[serde(default = "yes")]
    pub masquerade: bool,
    /// How nodes are set up.
    #[serde(default)]
    pub hosts: Hosts,
    /// MTU of every link, in octets.
    #[serde(default = "default_mtu")]
    pub mtu: u32,
    /// The segment that nodes, egress addresses and the router share; the router takes its first address.
    pub underlay: Ranges,
    /// The cluster's nodes.
    pub nodes: Vec<Node>,
    /// Gateway pods.
    #[serde(default)]
    pub gateways: Vec<Gateway>,
    /// Kubernetes namespaces; those that pods name are added by themselves.
    #[serde(default)]
    pub namespaces: Vec<Namespace>,
    /// Pods.
    pub pods: Vec<Pod>,
    /// The pod, `NAMESPACE/NAME`, that is the cluster DNS.
    pub cluster_dns: String,
    /// Headless services.
    #[serde(default)]
    pub services: Vec<Service>,
    /// Where services get addresses from; needed for `clusterIps`.
    #[serde(default)]
    pub service_ranges: Option<Ranges>,
    /// Everything behind the router.
    pub internet: Internet,
    /// Egress pools.
    #[serde(default)]
    pub pools: Vec<Pool>,
    /// The cluster has an API server, where the product reads its objects; absent: it reads a directory.
    #[serde(default)]
    pub kubernetes: Option<Kubernetes>,
    /// Directory of policy manifests, relative to the scenario file.
    #[serde(default)]
    pub policies: Option<PathBuf>,
    /// The product's processes; absent: only the world is built.
    #[serde(default)]
    pub tidegate: Option<Tidegate>,
}

/// How nodes are set up, as their distribution, CNI and kube-proxy do it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Hosts {
    /// How pods are linked to their node.
    #[serde(default)]
    pub cni: Cni,
    /// Source validation on every device.
    #[serde(default)]
    pub rp_filter: RpFilter,
    /// Rules as kube-proxy's: services get their `clusterIps` and `nodePorts`.
    #[serde(default)]
    pub kube_proxy: bool,
    /// Destinations towards which the CNI on gateways' nodes translates every source to the node's address.
    #[serde(default)]
    pub gateway_snat: Vec<IpNet>,
    /// A host firewall: input and forward drop by default, pods and the tunnel's port are accepted.
    #[serde(default)]
    pub firewall: bool,
    /// A DNS daemon on port 53 of every address of the gateways' nodes; it answers every name with itself.
    #[serde(default)]
    pub dns_daemons: bool,
    /// A program of somebody else stands first on every pod's interface, before the product comes, and lets
    /// everything through without asking those behind it.
    #[serde(default)]
    pub foreign_tcx: bool,
}

/// How pods are linked to their node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cni {
    /// A link and a host route for each pod, as such CNIs have them in common.
    #[default]
    Ptp,
    /// As kind has it: the plugins ptp and host-local. The node's end of every pod's link has the range's first address.
    Kind,
    /// As Calico without an overlay has it: no address on the node's ends, which all have one hardware address.
    Calico,
    /// As AWS VPC has it: a node's second network card has the even IPv4 addresses of pods, and rules send what such a pod
    /// sends out by it. Pods know their gateway's hardware address.
    AwsVpc,
    /// The bridge `cni0` with the node's range on it, and routes to other nodes.
    Bridge,
    /// The same, with flannel's VXLAN between nodes.
    Flannel,
}

impl Cni {
    /// Whether pods are on a bridge.
    pub const fn is_bridge(self) -> bool {
        matches!(self, Cni::Bridge | Cni::Flannel)
    }
}

/// Source validation (RFC 3704).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum RpFilter {
    /// Some route to the source, as systemd sets it.
    #[default]
    Loose,
    /// The route to the source is by the device it came in by, as RHEL sets it.
    Strict,
}

/// One range of each family.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Ranges {
    /// IPv4 range.
    pub ipv4: Ipv4Net,
    /// IPv6 range.
    pub ipv6: Ipv6Net,
}

/// A node.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Node {
    /// Name, a DNS label.
    pub name: String,
    /// Address on the underlay.
    pub ipv4: Ipv4Addr,
    /// Address on the underlay.
    pub ipv6: Ipv6Addr,
    /// Where its pods get addresses from.
    pub pods: Ranges,
    /// Labels of the Node.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// A gateway pod.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Gateway {
    /// Name; it is the pod's name in namespace `tidegate-system` too.
    pub name: String,
    /// The node that it runs on.
    pub node: String,
}

impl Gateway {
    /// The pod that it is.
    pub(crate) fn pod(&self) -> Pod {
        Pod {
            labels: BTreeMap::from([("app".into(), "tidegate-gateway".into())]),
            ..Pod::new(SYSTEM_NAMESPACE, &self.name, &self.node)
        }
    }
}

/// A Kubernetes namespace.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Namespace {
    /// Name.
    pub name: String,
    /// Labels, beside `kubernetes.io/metadata.name`.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
}

/// A pod.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Pod {
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// The node that it runs on.
    pub node: String,
    /// Labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Address; absent: the next free one of the node's range.
    #[serde(default)]
    pub ipv4: Option<Ipv4Addr>,
    /// Address; absent: the next free one of the node's range.
    #[serde(default)]
    pub ipv6: Option<Ipv6Addr>,
    /// What it serves.
    #[serde(default)]
    pub listen: Listen,
}

/// Ports on which a place serves, TCP and UDP, both families.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Listen {
    /// HTTPS.
    #[serde(default)]
    pub https: Vec<u16>,
    /// HTTP.
    #[serde(default)]
    pub http: Vec<u16>,
    /// TCP echo, which first says whom it saw.
    #[serde(default)]
    pub tcp_echo: Vec<u16>,
    /// UDP echo, which first says whom it saw.
    #[serde(default)]
    pub udp_echo: Vec<u16>,
}

impl Listen {
    /// Whether it serves nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A service: headless, or with addresses of its own where nodes have kube-proxy's rules.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Service {
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Names of its pods, in its namespace.
    pub pods: Vec<String>,
    /// Its own addresses, of `serviceRanges`; used with `hosts.kubeProxy`.
    #[serde(default)]
    pub cluster_ips: Vec<IpAddr>,
    /// Ports on every node; used with `hosts.kubeProxy`.
    #[serde(default)]
    pub node_ports: Vec<NodePort>,
}

/// A port on every node that leads to a service, TCP and UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NodePort {
    /// On nodes, 30000 to 32767.
    pub node_port: u16,
    /// Of the pods.
    pub port: u16,
}

/// Everything behind the router.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Internet {
    /// Every address in these prefixes is alive and served.
    pub prefixes: Vec<IpNet>,
    /// DNS servers that gateways and the cluster DNS use.
    pub resolvers: Vec<IpAddr>,
    /// DNS servers that a pod may try by itself.
    #[serde(default)]
    pub public_resolvers: Vec<IpAddr>,
    /// What every address serves.
    #[serde(default)]
    pub listen: Listen,
    /// The names that exist.
    #[serde(default)]
    pub names: Vec<NameSpec>,
    /// Answer for any other name; absent: NXDOMAIN.
    #[serde(default)]
    pub any_name: Option<NameSpec>,
    /// MTU of the link behind the router, in octets; absent: as every link.
    #[serde(default)]
    pub mtu: Option<u32>,
}

/// What a name resolves to. `*.x` stands for every name below `x` that is not listed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NameSpec {
    /// The name.
    pub name: String,
    /// Time to live of its records, in seconds.
    #[serde(default = "default_ttl")]
    pub ttl: u32,
    /// A records.
    #[serde(default)]
    pub ipv4: Vec<Ipv4Addr>,
    /// AAAA records.
    #[serde(default)]
    pub ipv6: Vec<Ipv6Addr>,
    /// CNAME record; it stands alone.
    #[serde(default)]
    pub cname: Option<String>,
    /// TXT records.
    #[serde(default)]
    pub txt: Vec<String>,
    /// PTR record.
    #[serde(default)]
    pub ptr: Option<String>,
    /// HTTPS record.
    #[serde(default)]
    pub https: Option<HttpsSpec>,
    /// Answer with this code and nothing else.
    #[serde(default)]
    pub rcode: Option<Rcode>,
    /// Wait so long before the answer, in milliseconds.
    #[serde(default)]
    pub delay_millis: u64,
    /// Never answer.
    #[serde(default)]
    pub silent: bool,
    /// Each name has addresses of its own: 24 bits of its IPv4 ones and 64 of its IPv6 ones are added to those above.
    #[serde(default)]
    pub spread: bool,
}

/// An HTTPS record (RFC 9460).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HttpsSpec {
    /// SvcPriority; 0 is AliasMode.
    #[serde(default = "one")]
    pub priority: u16,
    /// TargetName; absent: the owner.
    #[serde(default)]
    pub target: Option<String>,
    /// `alpn`.
    #[serde(default)]
    pub alpn: Vec<String>,
    /// `port`.
    #[serde(default)]
    pub port: Option<u16>,
    /// Whether it carries an `ech` parameter.
    #[serde(default)]
    pub ech: bool,
    /// `ipv4hint`.
    #[serde(default)]
    pub ipv4_hint: Vec<Ipv4Addr>,
    /// `ipv6hint`.
    #[serde(default)]
    pub ipv6_hint: Vec<Ipv6Addr>,
}

/// Response codes that a scenario can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rcode {
    /// RCODE 2.
    ServFail,
    /// RCODE 3.
    NxDomain,
    /// RCODE 5.
    Refused,
}

/// An egress pool.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Pool {
    /// Name.
    pub name: String,
    /// Its pairs.
    pub addresses: Vec<Pair>,
    /// Labels of the namespaces that may use it; empty: every namespace.
    #[serde(default)]
    pub allowed_namespaces: BTreeMap<String, String>,
    /// Labels of the nodes whose gateways may hold it; empty: every node.
    #[serde(default)]
    pub gateway_node_selector: BTreeMap<String, String>,
}

/// An egress pair.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Pair {
    /// On the underlay; absent: the pool has no IPv4.
    #[serde(default)]
    pub ipv4: Option<Ipv4Addr>,
    /// On the underlay; absent: the pool has no IPv6.
    #[serde(default)]
    pub ipv6: Option<Ipv6Addr>,
    /// The gateway that owns it; absent: the gateways' own order.
    #[serde(default)]
    pub owner: Option<String>,
}

/// How the product's processes are configured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Tidegate {
    /// Keys laid over every gateway's generated configuration.
    #[serde(default)]
    pub gateway: BTreeMap<String, Value>,
    /// Keys laid over every agent's generated configuration.
    #[serde(default)]
    pub agent: BTreeMap<String, Value>,
}

fn both() -> Vec<Family> {
    FAMILIES.to_vec()
}
const fn yes() -> bool {
    true
}
const fn one() -> u16 {
    1
}
const fn default_mtu() -> u32 {
    1500
}
const fn default_ttl() -> u32 {
    300
}

/// The namespace of the gateway pods.
pub const SYSTEM_NAMESPACE: &str = "tidegate-system";
/// The suffix of cluster names.
pub const CLUSTER_DOMAIN: &str = "cluster.local";

impl Scenario {
    /// Reads a scenario file, checks it and fills in what it leaves to be chosen.
    ///
    /// # Errors
    /// When the file cannot be read, has unknown keys, or does not fit together.
    pub fn load(path: &Path) -> Result<Self> {
        let value = read(path, 0)?;
        let mut scenario: Self = serde_json::from_value(value).with_context(|| format!("in {}", path.display()))?;
        scenario.complete().with_context(|| format!("in {}", path.display()))?;
        if let Some(policies) = &scenario.policies {
            ensure!(policies.is_dir(), "policies: {} is not a directory", policies.display());
        }
        Ok(scenario)
    }

    /// The same world with an API server, where the product reads its objects.
    ///
    /// # Errors
    /// When it lacks what an API server needs.
    pub fn with_kubernetes(mut self) -> Result<Self> {
        self.kubernetes.get_or_insert_default();
        self.check_references()?;
        Ok(self)
    }

    /// Reads a scenario from text; `policies` stays as written, and `extends` is not known.
    ///
    /// # Errors
    /// As [`Scenario::load`].
    pub fn parse(text: &str) -> Result<Self> {
        let mut scenario: Self = serde_saphyr::from_str(text).map_err(|e| anyhow::anyhow!("{e}"))?;
        scenario.complete()?;
        Ok(scenario)
    }

    /// Adds a pod, with addresses that nobody has; gives it complete.
    ///
    /// # Errors
    /// When its name or address is taken, or its node has no address left.
    pub(crate) fn add_pod(&mut self, pod: Pod) -> Result<Pod> {
        let key = pod.key();
        self.pods.push(pod);
        let added = self.check_names().and_then(|()| self.allocate()).and_then(|()| self.pod(&key).cloned());
        if added.is_err() {
            self.pods.pop();
        }
        added
    }

    fn complete(&mut self) -> Result<()> {
        ensure!(!self.families.is_empty(), "families is empty");
        self.drop_families();
        self.pods.extend(self.gateways.iter().map(Gateway::pod));
        for name in self.pods.iter().map(|p| p.namespace.clone()).collect::<BTreeSet<_>>() {
            if !self.namespaces.iter().any(|n| n.name == name) {
                self.namespaces.push(Namespace { name, labels: BTreeMap::new(), annotations: BTreeMap::new() });
            }
        }
        self.check_names()?;
        self.allocate()?;
        self.check_references()
    }

    /// Takes away what is of a family that the cluster does not have. Names keep their records: the world's DNS
    /// does not know what a cluster has.
    fn drop_families(&mut self) {
        let families = self.families.clone();
        let has = |ip: IpAddr| families.contains(&Family::of(ip));
        self.hosts.gateway_snat.retain(|p| has(p.addr()));
        self.internet.prefixes.retain(|p| has(p.addr()));
        self.internet.resolvers.retain(|ip| has(*ip));
        self.internet.public_resolvers.retain(|ip| has(*ip));
        for service in &mut self.services {
            service.cluster_ips.retain(|ip| has(*ip));
        }
        for pair in self.pools.iter_mut().flat_map(|p| &mut p.addresses) {
            pair.ipv4 = pair.ipv4.filter(|ip| has((*ip).into()));
            pair.ipv6 = pair.ipv6.filter(|ip| has((*ip).into()));
        }
    }

    fn check_names(&self) -> Result<()> {
        let mut places = BTreeSet::from(["fabric", "router", "internet", kube::PLACE].map(str::to_owned));
        let nodes = self.nodes.iter().map(|n| n.name.clone());
        let pods = self.pods.iter().map(Pod::key);
        for place in nodes.chain(pods).chain(self.gateways.iter().map(|g| g.name.clone())) {
            for label in place.split('/') {
                let ok = !label.is_empty()
                    && label.len() <= 63
                    && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
                ensure!(ok, "{place:?} is not a DNS label");
            }
            ensure!(places.insert(place.clone()), "{place:?} is there twice");
        }
        Ok(())
    }

    /// Gives every pod its addresses, in the order of the file, from host number 2 on.
    fn allocate(&mut self) -> Result<()> {
        let mut used: BTreeSet<IpAddr> = BTreeSet::new();
        for pod in &self.pods {
            for ip in pod.ipv4.map(IpAddr::from).into_iter().chain(pod.ipv6.map(IpAddr::from)) {
                ensure!(used.insert(ip), "pod {}: {ip} is taken", pod.key());
            }
        }
        for i in 0..self.pods.len() {
            let node = self.node(&self.pods[i].node).with_context(|| format!("pod {}", self.pods[i].key()))?.clone();
            let pod = &mut self.pods[i];
            let v4 = match pod.ipv4 {
                Some(ip) => ip,
                None => node
                    .pods
                    .ipv4
                    .hosts()
                    .skip(1)
                    .find(|ip| !used.contains(&IpAddr::from(*ip)))
                    .with_context(|| format!("node {}: no IPv4 address is left", node.name))?,
            };
            let v6 = match pod.ipv6 {
                Some(ip) => ip,
                None => (2..0x1_0000u128)
                    .map(|n| Ipv6Addr::from(u128::from(node.pods.ipv6.network()) + n))
                    .find(|ip| node.pods.ipv6.contains(ip) && !used.contains(&IpAddr::from(*ip)))
                    .with_context(|| format!("node {}: no IPv6 address is left", node.name))?,
            };
            ensure!(
                node.pods.ipv4.contains(&v4) && node.pods.ipv6.contains(&v6),
                "pod {}: its address is not of its node's range",
                pod.key()
            );
            used.extend([IpAddr::from(v4), IpAddr::from(v6)]);
            pod.ipv4 = self.families.contains(&Family::V4).then_some(v4);
            pod.ipv6 = self.families.contains(&Family::V6).then_some(v6);
        }
        Ok(())
    }

    fn check_references(&self) -> Result<()> {
        if self.has_kubelets() {
            let hosts = Hosts { cni: self.hosts.cni, rp_filter: self.hosts.rp_filter, ..Hosts::default() };
            let known = matches!(self.hosts.cni, Cni::Ptp | Cni::Bridge);
            ensure!(known, "kubernetes.kubelets: hosts.cni is Ptp or Bridge there");
            let bare = self.pods.is_empty()
                && self.namespaces.is_empty()
                && self.services.is_empty()
                && self.pools.is_empty()
                && self.policies.is_none()
                && self.tidegate.is_none()
                && self.hosts == hosts;
            ensure!(
                bare,
                "kubernetes.kubelets: gateways, namespaces, pods, services, pools, policies, tidegate and hosts other than cni and \
                 rpFilter are made with kubectl and helm, and not here"
            );
        } else {
            let dns = self.pod(&self.cluster_dns).context("clusterDns")?;
            ensure!(dns.listen.is_empty(), "clusterDns: {} cannot listen for anything else", dns.key());
        }
        for service in &self.services {
            for pod in &service.pods {
                self.pod(&format!("{}/{pod}", service.namespace))
                    .with_context(|| format!("service {}", service.name))?;
            }
            for ip in &service.cluster_ips {
                let here = self.service_ranges.is_some_and(|r| r.contains(*ip));
                ensure!(here, "service {}: {ip} is not of serviceRanges", service.name);
            }
            let span = 30_000..=32_767;
            let good = service.node_ports.iter().all(|p| span.contains(&p.node_port));
            ensure!(good, "service {}: a nodePort is not from 30000 to 32767", service.name);
        }
        for pool in &self.pools {
            for pair in &pool.addresses {
                let here = pair.ipv4.is_none_or(|ip| self.underlay.ipv4.contains(&ip))
                    && pair.ipv6.is_none_or(|ip| self.underlay.ipv6.contains(&ip));
                ensure!(here, "pool {}: an address is not on the underlay", pool.name);
                ensure!(
                    pair.ipv4.is_some() || pair.ipv6.is_some(),
                    "pool {}: a pair has no address of the cluster's families",
                    pool.name
                );
                if let Some(owner) = &pair.owner {
                    let known = self.gateways.iter().any(|g| g.name == *owner);
                    ensure!(known, "pool {}: there is no gateway {owner:?}", pool.name);
                }
            }
        }
        for node in &self.nodes {
            let here = self.underlay.ipv4.contains(&node.ipv4) && self.underlay.ipv6.contains(&node.ipv6);
            ensure!(here, "node {}: its address is not on the underlay", node.name);
        }
        ensure!(!self.internet.resolvers.is_empty(), "internet.resolvers has no address of the cluster's families");
        for ip in self.internet.resolvers.iter().chain(&self.internet.public_resolvers) {
            ensure!(
                self.internet.prefixes.iter().any(|p| p.contains(ip)),
                "internet: no prefix contains resolver {ip}"
            );
        }
        if self.kubernetes.is_some() {
            ensure!(
                self.service_ranges.is_some(),
                "kubernetes: serviceRanges is missing, from which Services get addresses"
            );
            let control = [IpAddr::from(self.control().0), self.control().1.into()];
            let taken =
                self.nodes.iter().find(|n| control.contains(&n.ipv4.into()) || control.contains(&n.ipv6.into()));
            ensure!(taken.is_none(), "kubernetes: the second address of the underlay is the API server's");
        }
        if self.tidegate.is_some() {
            ensure!(!self.gateways.is_empty(), "tidegate needs at least one gateway");
        }
        Ok(())
    }

    /// The node of this name.
    ///
    /// # Errors
    /// When there is none.
    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes.iter().find(|n| n.name == name).with_context(|| format!("there is no node {name:?}"))
    }

    /// The pod that `NAMESPACE/NAME`, or a name that only one pod has, stands for.
    ///
    /// # Errors
    /// When there is none or more than one.
    pub fn pod(&self, key: &str) -> Result<&Pod> {
        let mut found = self.pods.iter().filter(|p| p.name == key || p.key() == key);
        match (found.next(), found.next()) {
            (Some(pod), None) => Ok(pod),
            (None, _) => bail!("there is no pod {key:?}"),
            (Some(_), Some(_)) => bail!("more than one pod is called {key:?}: write NAMESPACE/NAME"),
        }
    }

    /// Whether nodes run pods by themselves.
    pub fn has_kubelets(&self) -> bool {
        self.kubernetes.as_ref().is_some_and(|k| k.kubelets.is_some())
    }

    /// Whether the cluster has a family.
    pub fn has(&self, family: Family) -> bool {
        self.families.contains(&family)
    }

    /// Those of a pair of ranges that are of the cluster's families.
    pub fn ranges(&self, of: &Ranges) -> Vec<IpNet> {
        of.both().into_iter().filter(|r| self.has(Family::of(r.addr()))).collect()
    }

    /// A node's addresses on the underlay, IPv4 first.
    pub fn node_addresses(&self, node: &Node) -> Vec<IpAddr> {
        [IpAddr::from(node.ipv4), node.ipv6.into()].into_iter().filter(|ip| self.has(Family::of(*ip))).collect()
    }

    /// Whether a gateway runs on a node.
    pub fn is_gateway_node(&self, node: &Node) -> bool {
        self.gateways.iter().any(|g| g.node == node.name)
    }

    /// The pods of a service.
    ///
    /// # Errors
    /// When one does not exist.
    pub fn service_pods(&self, service: &Service) -> Result<Vec<&Pod>> {
        service.pods.iter().map(|pod| self.pod(&format!("{}/{pod}", service.namespace))).collect()
    }

    /// The addresses that a service's name resolves to.
    ///
    /// # Errors
    /// When one of its pods does not exist.
    pub fn service_addresses(&self, service: &Service) -> Result<Vec<IpAddr>> {
        if self.hosts.kube_proxy && !service.cluster_ips.is_empty() {
            return Ok(service.cluster_ips.clone());
        }
        Ok(self.service_pods(service)?.iter().flat_map(|p| p.addresses()).collect())
    }

    /// What pods have in their resolv.conf: the cluster DNS's service, else its pod.
    pub fn pod_resolvers(&self) -> Vec<IpAddr> {
        let dns = self.pod(&self.cluster_dns).ok();
        let leads = |s: &&Service| dns.is_some_and(|d| s.namespace == d.namespace && s.pods == [d.name.clone()]);
        let service = self.services.iter().find(leads).and_then(|s| self.service_addresses(s).ok());
        service.unwrap_or_else(|| self.cluster_dns_servers().iter().map(SocketAddr::ip).collect())
    }

    /// The addresses of the cluster DNS's Service where nodes have kubelets: the tenth of each range.
    pub fn kubelet_dns(&self) -> Vec<IpAddr> {
        let ranges = self.service_ranges.iter().flat_map(|ranges| self.ranges(ranges));
        let tenth = |range: IpNet| match range {
            IpNet::V4(r) => IpAddr::V4((u32::from(r.network()) + 10).into()),
            IpNet::V6(r) => IpAddr::V6((u128::from(r.network()) + 10).into()),
        };
        ranges.map(tenth).collect()
    }

    /// The router's addresses on the underlay.
    pub fn router(&self) -> (Ipv4Addr, Ipv6Addr) {
        let v4 = u32::from(self.underlay.ipv4.network()) + 1;
        let v6 = u128::from(self.underlay.ipv6.network()) + 1;
        (v4.into(), v6.into())
    }

    /// The API server's addresses on the underlay: the next ones.
    pub fn control(&self) -> (Ipv4Addr, Ipv6Addr) {
        let (v4, v6) = self.router();
        ((u32::from(v4) + 1).into(), (u128::from(v6) + 1).into())
    }

    /// Where the cluster DNS listens.
    pub fn cluster_dns_servers(&self) -> Vec<SocketAddr> {
        self.pod(&self.cluster_dns)
            .map(|p| p.addresses().into_iter().map(|ip| SocketAddr::new(ip, 53)).collect())
            .unwrap_or_default()
    }
}

/// Reads a scenario file, laid over the one that it extends.
fn read(path: &Path, depth: usize) -> Result<Value> {
    ensure!(depth < 8, "{} extends itself", path.display());
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut own: Value = serde_saphyr::from_str(&text)
        .map_err(|e| anyhow::anyhow!("{e}"))
        .with_context(|| format!("in {}", path.display()))?;
    let folder = path.parent().unwrap_or(Path::new("."));
    if let Some(policies) = own.get("policies").and_then(Value::as_str).map(|p| folder.join(p)) {
        own["policies"] = serde_json::to_value(policies)?;
    }
    let Some(base) = own.as_object_mut().and_then(|keys| keys.remove("extends")) else {
        return Ok(own);
    };
    let base = base.as_str().context("extends: not a file's name")?;
    let mut whole = read(&folder.join(base), depth + 1)?;
    lay(&mut whole, own);
    Ok(whole)
}

/// Lays one value over another: maps key by key, everything else as a whole.
fn lay(base: &mut Value, over: Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                lay(base.entry(key).or_insert(Value::Null), value);
            }
        }
        (base, over) => *base = over,
    }
}

impl Ranges {
    /// Both, IPv4 first.
    pub fn both(&self) -> [IpNet; 2] {
        [self.ipv4.into(), self.ipv6.into()]
    }

    /// Whether an address is of one of them.
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.both().iter().any(|r| r.contains(&ip))
    }
}

impl Service {
    /// The ports that its pods serve: TCP, UDP.
    pub fn ports(&self, scenario: &Scenario) -> Result<(BTreeSet<u16>, BTreeSet<u16>)> {
        let (mut tcp, mut udp) = (BTreeSet::new(), BTreeSet::new());
        for pod in scenario.service_pods(self)? {
            let Listen { https, http, tcp_echo, udp_echo } = &pod.listen;
            tcp.extend([https, http, tcp_echo].into_iter().flatten());
            udp.extend(udp_echo);
            if pod.key() == scenario.pod(&scenario.cluster_dns)?.key() {
                tcp.insert(53);
                udp.insert(53);
            }
        }
        Ok((tcp, udp))
    }
}

impl Pod {
    /// A pod without labels that serves nothing; its addresses are chosen when it is added.
    pub fn new(namespace: &str, name: &str, node: &str) -> Self {
        Self {
            name: name.into(),
            namespace: namespace.into(),
            node: node.into(),
            labels: BTreeMap::new(),
            ipv4: None,
            ipv6: None,
            listen: Listen::default(),
        }
    }

    /// `NAMESPACE/NAME`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Its addresses, IPv4 first.
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.ipv4.map(IpAddr::from).into_iter().chain(self.ipv6.map(IpAddr::from)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub const SMALL: &str = r#"
underlay: {ipv4: 203.0.113.0/24, ipv6: "2001:db8::/64"}
nodes:
- {name: n1, ipv4: 203.0.113.101, ipv6: "2001:db8::101", pods: {ipv4: 10.244.1.0/24, ipv6: "fd00:10:244:1::/64"}}
pods:
- {name: coredns, namespace: kube-system, node: n1, ipv4: 10.244.1.2}
- {name: web, namespace: shop, node: n1}
- {name: web, namespace: billing, node: n1}
clusterDns: kube-system/coredns
internet: {prefixes: [198.51.100.0/24], resolvers: [198.51.100.53]}
"#;

    #[test]
    fn addresses_are_chosen_and_not_twice() {
        let s = Scenario::parse(SMALL).unwrap();
        let of = |k: &str| s.pod(k).unwrap().addresses();
        assert_eq!(of("coredns"), ["10.244.1.2".parse::<IpAddr>().unwrap(), "fd00:10:244:1::2".parse().unwrap()]);
        assert_eq!(of("shop/web"), ["10.244.1.3".parse::<IpAddr>().unwrap(), "fd00:10:244:1::3".parse().unwrap()]);
        assert!(s.pod("web").unwrap_err().to_string().contains("NAMESPACE/NAME"));
        assert_eq!(s.router().0, Ipv4Addr::new(203, 0, 113, 1));
    }

    #[test]
    fn one_family_takes_the_other_away() {
        let text = SMALL.replace("resolvers: [198.51.100.53]", "resolvers: [198.51.100.53, \"2001:db8:1::53\"]");
        let text = text.replace("[198.51.100.0/24]", "[198.51.100.0/24, \"2001:db8:1::/48\"]");
        let s = Scenario::parse(&format!("families: [IPv6]\n{text}")).unwrap();
        assert_eq!(s.pod("coredns").unwrap().addresses(), ["fd00:10:244:1::2".parse::<IpAddr>().unwrap()]);
        assert_eq!(s.internet.resolvers, ["2001:db8:1::53".parse::<IpAddr>().unwrap()]);
        assert_eq!(s.node_addresses(&s.nodes[0]), ["2001:db8::101".parse::<IpAddr>().unwrap()]);
        let e = format!("{:#}", Scenario::parse(&format!("families: [IPv6]\n{SMALL}")).unwrap_err());
        assert!(e.contains("resolvers"), "{e}");
    }

    #[test]
    fn a_file_is_laid_over_the_one_that_it_extends() {
        let demo = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/demo.yaml"));
        let variant = demo.with_file_name("variants").join("crowded.yaml");
        let (demo, variant) = (Scenario::load(demo).unwrap(), Scenario::load(&variant).unwrap());
        assert!(demo.masquerade && !variant.masquerade && variant.hosts.kube_proxy);
        assert_eq!(demo.pods.len(), variant.pods.len());
        assert!(variant.policies.unwrap().is_dir());
        let mut whole = serde_json::json!({"a": {"b": 1, "c": [1, 2]}, "d": 1});
        lay(&mut whole, serde_json::json!({"a": {"c": [3]}, "e": 2}));
        assert_eq!(whole, serde_json::json!({"a": {"b": 1, "c": [3]}, "d": 1, "e": 2}));
        let folder = std::env::temp_dir().join(format!("extends-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let file = folder.join("x.yaml");
        std::fs::write(&file, "extends: x.yaml\n").unwrap();
        let e = format!("{:#}", Scenario::load(&file).unwrap_err());
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(e.contains("extends itself"), "{e}");
    }

    #[test]
    fn mistakes_are_named() {
        for (from, to, says) in [
            ("clusterDns: kube-system/coredns", "clusterDns: kube-system/nope", "nope"),
            ("node: n1, ipv4: 10.244.1.2", "node: n2, ipv4: 10.244.1.2", "n2"),
            ("resolvers: [198.51.100.53]", "resolvers: [192.0.2.53]", "192.0.2.53"),
            ("resolvers:", "resolver:", "resolver"),
            ("clusterDns:", "hosts: {cnis: Ptp}\nclusterDns:", "cnis"),
            (
                "clusterDns:",
                "services: [{name: x, namespace: y, pods: [], clusterIps: [10.96.0.1]}]\nclusterDns:",
                "10.96.0.1",
            ),
            ("name: web, namespace: billing", "name: web, namespace: shop", "twice"),
            ("{name: web, namespace: shop", "{name: \"w;b\", namespace: shop", "DNS label"),
        ] {
            assert!(SMALL.contains(from));
            let e = format!("{:#}", Scenario::parse(&SMALL.replace(from, to)).unwrap_err());
            assert!(e.contains(says), "{to}: {e}");
        }
    }
}
