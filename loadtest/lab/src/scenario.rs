//! What a lab is made of: the scenario file (docs/lab.md describes every key).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A whole scenario.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Scenario {
    /// Whether nodes masquerade what pods send outside, as most CNIs do.
    #[serde(default = "yes")]
    pub masquerade: bool,
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
    /// Everything behind the router.
    pub internet: Internet,
    /// Egress pools.
    #[serde(default)]
    pub pools: Vec<Pool>,
    /// Directory of policy manifests, relative to the scenario file.
    #[serde(default)]
    pub policies: Option<PathBuf>,
    /// The product's processes; absent: only the world is built.
    #[serde(default)]
    pub tidegate: Option<Tidegate>,
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

/// A headless service.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Service {
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Names of its pods, in its namespace.
    pub pods: Vec<String>,
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
}

/// An egress pair.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Pair {
    /// On the underlay.
    pub ipv4: Ipv4Addr,
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
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut scenario = Self::parse(&text).with_context(|| format!("in {}", path.display()))?;
        if let Some(policies) = &mut scenario.policies {
            let base = path.parent().unwrap_or(Path::new("."));
            *policies = base.join(&*policies);
            ensure!(policies.is_dir(), "policies: {} is not a directory", policies.display());
        }
        Ok(scenario)
    }

    /// Reads a scenario from text; `policies` stays as written.
    ///
    /// # Errors
    /// As [`Scenario::load`].
    pub fn parse(text: &str) -> Result<Self> {
        let mut scenario: Self = serde_saphyr::from_str(text).map_err(|e| anyhow::anyhow!("{e}"))?;
        scenario.complete()?;
        Ok(scenario)
    }

    fn complete(&mut self) -> Result<()> {
        for gateway in &self.gateways {
            self.pods.push(Pod {
                name: gateway.name.clone(),
                namespace: SYSTEM_NAMESPACE.into(),
                node: gateway.node.clone(),
                labels: BTreeMap::from([("app".into(), "tidegate-gateway".into())]),
                ipv4: None,
                ipv6: None,
                listen: Listen::default(),
            });
        }
        for name in self.pods.iter().map(|p| p.namespace.clone()).collect::<BTreeSet<_>>() {
            if !self.namespaces.iter().any(|n| n.name == name) {
                self.namespaces.push(Namespace { name, labels: BTreeMap::new(), annotations: BTreeMap::new() });
            }
        }
        self.check_names()?;
        self.allocate()?;
        self.check_references()
    }

    fn check_names(&self) -> Result<()> {
        let mut places = BTreeSet::from(["fabric".to_owned(), "router".to_owned(), "internet".to_owned()]);
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
            (pod.ipv4, pod.ipv6) = (Some(v4), Some(v6));
        }
        Ok(())
    }

    fn check_references(&self) -> Result<()> {
        let dns = self.pod(&self.cluster_dns).context("clusterDns")?;
        ensure!(dns.listen.is_empty(), "clusterDns: {} cannot listen for anything else", dns.key());
        for service in &self.services {
            for pod in &service.pods {
                self.pod(&format!("{}/{pod}", service.namespace))
                    .with_context(|| format!("service {}", service.name))?;
            }
        }
        for pool in &self.pools {
            for pair in &pool.addresses {
                let here = self.underlay.ipv4.contains(&pair.ipv4)
                    && pair.ipv6.is_none_or(|ip| self.underlay.ipv6.contains(&ip));
                ensure!(here, "pool {}: {} is not on the underlay", pool.name, pair.ipv4);
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
        ensure!(!self.internet.resolvers.is_empty(), "internet.resolvers is empty");
        for ip in self.internet.resolvers.iter().chain(&self.internet.public_resolvers) {
            ensure!(
                self.internet.prefixes.iter().any(|p| p.contains(ip)),
                "internet: no prefix contains resolver {ip}"
            );
        }
        ensure!(self.internet.resolvers.iter().any(IpAddr::is_ipv4), "internet.resolvers needs an IPv4 address");
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

    /// The router's addresses on the underlay.
    pub fn router(&self) -> (Ipv4Addr, Ipv6Addr) {
        let v4 = u32::from(self.underlay.ipv4.network()) + 1;
        let v6 = u128::from(self.underlay.ipv6.network()) + 1;
        (v4.into(), v6.into())
    }

    /// Where the cluster DNS listens.
    pub fn cluster_dns_servers(&self) -> Vec<SocketAddr> {
        self.pod(&self.cluster_dns)
            .map(|p| p.addresses().into_iter().map(|ip| SocketAddr::new(ip, 53)).collect())
            .unwrap_or_default()
    }
}

impl Pod {
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
    fn mistakes_are_named() {
        for (from, to, says) in [
            ("clusterDns: kube-system/coredns", "clusterDns: kube-system/nope", "nope"),
            ("node: n1, ipv4: 10.244.1.2", "node: n2, ipv4: 10.244.1.2", "n2"),
            ("resolvers: [198.51.100.53]", "resolvers: [192.0.2.53]", "192.0.2.53"),
            ("resolvers:", "resolver:", "resolver"),
            ("name: web, namespace: billing", "name: web, namespace: shop", "twice"),
            ("{name: web, namespace: shop", "{name: \"w;b\", namespace: shop", "DNS label"),
        ] {
            assert!(SMALL.contains(from));
            let e = format!("{:#}", Scenario::parse(&SMALL.replace(from, to)).unwrap_err());
            assert!(e.contains(says), "{to}: {e}");
        }
    }
}
