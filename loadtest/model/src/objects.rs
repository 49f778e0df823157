//! A small cluster, and random edits of its objects.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use tidegate_policy::model::{
    Action, AddressSource, Ceiling, Cidr, ClusterDefault, ClusterPolicy, DnsFilter, Expression, Fqdn, Labels,
    Namespace, Node, Objects, Operator, Pair, Permit, Pod, Policy, PolicyMode, Pool, Ports, Rule, Selector, SniMode,
    Tier, UnixSeconds,
};
use tidegate_policy::pattern::Pattern;
use tidegate_policy::{Name, Proto};

use crate::bytes::Bytes;

/// The nodes.
pub const NODES: [&str; 2] = ["n1", "n2"];
/// The gateways with their nodes: one on a node with pods, the others on nodes of their own.
pub const GATEWAYS: [(&str, &str); 3] = [("gw-a", "n1"), ("gw-b", "m1"), ("gw-c", "m2")];
/// The namespaces.
pub const NAMESPACES: [&str; 3] = ["shop", "bank", "lab"];
/// The pods of every namespace.
const PODS: [&str; 2] = ["a", "b"];
/// The names that are asked for.
pub const NAMES: [&str; 6] = ["a.x.com", "b.x.com", "c.b.x.com", "x.com", "y.org", "zz.y.org"];
/// Addresses outside: what names resolve to, and what packets go to.
pub const OUTSIDE: [&str; 8] = [
    "192.0.2.1",
    "192.0.2.9",
    "198.51.100.1",
    "2001:db8::1",
    "2001:db8:1::9",
    PRIVATE,
    "169.254.169.254",
    "100.100.100.200",
];
/// An address that names may only have where a rule says so.
pub const PRIVATE: &str = "172.20.0.1";
/// Addresses inside: a service, a node, a pod's range.
pub const INSIDE: [&str; 3] = ["10.96.0.1", "10.0.0.2", "10.244.2.77"];
/// Ports of packets: those of rules with their neighbours, and those with a meaning of their own.
pub const PORTS: [u16; 12] = [0, 1, 22, 53, 80, 81, 443, 444, 853, 5432, 8475, 30080];
/// The range of services.
const SERVICES: &str = "10.96.0.0/16";
/// The NodePort range.
pub const NODE_PORTS: (u16, u16) = (30000, 32767);
/// The tunnel's port.
pub const TUNNEL_PORT: u16 = 8475;
/// When a model's life begins (seconds since 1970).
pub const START: i64 = 1000;

const PATTERNS: [&str; 10] =
    ["a.x.com", "b.x.com", "x.com", "*.x.com", "**.x.com", "*", "a*.x.com", "*.b.x.com", "y.org", "*x.com"];
const CIDRS: [&str; 14] = [
    "192.0.2.0/24",
    "192.0.2.0/24-192.0.2.1/32",
    "192.0.2.0/29-192.0.2.0/30",
    "192.0.2.9/32",
    "0.0.0.0/0",
    "0.0.0.0/0-192.0.0.0/8",
    "198.51.100.0/24",
    "169.254.169.254/32",
    "169.254.0.0/16",
    "100.64.0.0/10",
    "100.100.100.200/32",
    "::/0",
    "2001:db8::/32",
    "10.0.0.0/8",
];
const RANGES: [(Option<Proto>, u16, u16); 9] = [
    (Some(Proto::Tcp), 443, 443),
    (Some(Proto::Udp), 443, 443),
    (Some(Proto::Tcp), 80, 443),
    (Some(Proto::Tcp), 0, 65535),
    (Some(Proto::Udp), 0, 65535),
    (Some(Proto::Tcp), 853, 853),
    (Some(Proto::Tcp), 5432, 5432),
    (Some(Proto::Udp), 1, 852),
    (None, 0, 65535),
];

/// What a gateway's configuration says that states follow from.
pub struct Config {
    /// Its node.
    pub node: String,
    /// Every gateway.
    pub gateways: Vec<Replica>,
    /// Pairs that are pinned.
    pub owners: Vec<Owner>,
    /// What is inside the cluster.
    pub cluster: Inside,
    /// Whether echo requests pass.
    pub ping: bool,
    /// Seconds between full passes.
    pub full_pass_seconds: u64,
}

/// A gateway's place.
pub struct Replica {
    /// The gateway's name.
    pub name: String,
    /// Its node.
    pub node: String,
    /// Where others reach it.
    pub address: Option<SocketAddr>,
}

/// A pair that is pinned to a gateway: there is none.
pub struct Owner {
    /// The pool's name.
    pub pool: String,
    /// The pair's IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// The pair's IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
    /// The gateway's name.
    pub gateway: String,
}

/// What is inside the cluster.
pub struct Inside {
    /// The NodePort range.
    pub node_ports: NodePorts,
    /// Suffixes of the cluster's names.
    pub suffixes: Vec<String>,
}

/// A range of ports.
pub struct NodePorts {
    /// Its first.
    pub first: u16,
    /// Its last.
    pub last: u16,
}

impl Config {
    /// Of the gateway on this node.
    pub fn new(node: &str) -> Self {
        Self {
            node: node.to_owned(),
            gateways: GATEWAYS.iter().map(|(n, at)| replica(n, at)).collect(),
            owners: Vec::new(),
            cluster: Inside { node_ports: NodePorts { first: NODE_PORTS.0, last: NODE_PORTS.1 }, suffixes: Vec::new() },
            ping: false,
            full_pass_seconds: 30,
        }
    }
}

fn replica(name: &str, node: &str) -> Replica {
    Replica { name: name.into(), node: node.into(), address: Some(([10, 0, 0, 9], 7443).into()) }
}

/// A constant's text as a value.
///
/// # Panics
/// When the constant is not one.
pub fn parsed<T: std::str::FromStr>(text: &str) -> T {
    match text.parse() {
        Ok(v) => v,
        Err(_) => panic!("the constant {text} is not well formed"),
    }
}

/// A constant's text as a name.
///
/// # Panics
/// When the constant is not one.
pub fn name(text: &str) -> Name {
    match Name::parse(text) {
        Ok(n) => n,
        Err(e) => panic!("the constant {text} is not a name: {e}"),
    }
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

/// The cluster before anybody edits it.
pub fn initial() -> Objects {
    let mut o = Objects::default();
    for (i, n) in NODES.iter().enumerate() {
        let node = Node {
            addresses: vec![parsed(&format!("10.0.0.{}", i + 1))],
            labels: Labels::new(),
            pod_prefixes: vec![
                parsed(&format!("10.244.{}.0/24", i + 1)),
                parsed(&format!("fd00:10:244:{}::/64", i + 1)),
            ],
        };
        o.nodes.insert((*n).to_owned(), node);
    }
    o.settings.cluster_prefixes = vec![parsed(SERVICES)];
    for n in NAMESPACES {
        let env = if n == "lab" { "test" } else { "prod" };
        let ns = Namespace { uid: format!("{n}-1"), labels: labels(&[("env", env)]), ..Namespace::default() };
        o.namespaces.insert(n.to_owned(), ns);
    }
    for (i, n) in NAMESPACES.iter().enumerate() {
        put_pod(&mut o, n, "a", NODES[i % 2], i as u8 + 1, &[("app", "web")]);
        // Names that share addresses and nothing else: other ports, other carries, and one that is denied in part.
        let egress = vec![
            plain(0, &["**.x.com", "y.org"], &[(Proto::Tcp, 80, 443)], SniMode::Required),
            plain(1, &["**.x.com"], &[(Proto::Udp, 1, 852)], SniMode::Required),
            plain(2, &["a.x.com", "*.y.org"], &[(Proto::Tcp, 5432, 5432), (Proto::Udp, 22, 22)], SniMode::Unchecked),
        ];
        let deny = vec![plain(0, &["b.x.com"], &[(Proto::Udp, 22, 22)], SniMode::Required)];
        let p = Policy {
            created: UnixSeconds(0),
            pod_selector: Selector::default(),
            mode: PolicyMode::Enforce,
            pool: (*n == "bank").then(|| "static".to_owned()),
            egress,
            deny,
        };
        o.policies.insert(((*n).to_owned(), "base".to_owned()), p);
    }
    let pairs = vec![pair(10, false), pair(11, false)];
    let source = AddressSource::Static { interface: None, pairs };
    let pool = Pool { allowed_namespaces: Some(Selector::default()), source, gateway_nodes: None };
    o.pools.insert("static".into(), pool);
    // Two that disagree, with equal rights.
    let of = |action, rule| ClusterPolicy {
        tier: Tier::Admin,
        priority: 1,
        mode: PolicyMode::Enforce,
        namespaces: Selector { labels: labels(&[("env", "test")]), expressions: vec![] },
        pods: Selector::default(),
        subject_lost: false,
        rules: vec![(action, rule)],
        ceiling: None,
    };
    let accept = plain(0, &["**.x.com"], &[(Proto::Tcp, 22, 22), (Proto::Tcp, 5432, 5432)], SniMode::Unchecked);
    let deny = plain(0, &["a.x.com", "x.com"], &[(Proto::Tcp, 22, 80)], SniMode::Required);
    o.cluster_policies.insert("k".into(), of(Action::Accept, accept));
    o.cluster_policies.insert("l".into(), of(Action::Deny, deny));
    o
}

fn plain(index: usize, names: &[&str], ports: &[(Proto, u16, u16)], sni: SniMode) -> Rule {
    Rule {
        name: index.to_string().into(),
        fqdns: names.iter().map(|n| fqdn(n)).collect(),
        cidrs: vec![],
        ports: ports.iter().map(|(p, lo, hi)| Ports { proto: Some(*p), lo: *lo, hi: *hi }).collect(),
        sni,
        ech_allow: false,
        dns_types: vec![],
        private_addresses: vec![],
        min_binding: None,
        expires: None,
    }
}

fn put_pod(o: &mut Objects, ns: &str, pod: &str, node: &str, host: u8, l: &[(&str, &str)]) {
    let net = if node == NODES[0] { 1 } else { 2 };
    let addresses: Vec<IpAddr> =
        vec![parsed(&format!("10.244.{net}.{host}")), parsed(&format!("fd00:10:244:{net}::{host:x}"))];
    let taken = |(k, p): (&(String, String), &Pod)| {
        (k.0 != ns || k.1 != pod) && p.addresses.iter().any(|a| addresses.contains(a))
    };
    // A CNI gives no address twice.
    if !o.pods.iter().any(taken) {
        let p = Pod {
            node: node.to_owned(),
            addresses,
            labels: labels(l),
            host_network: false,
            ending: false,
            mirror: false,
        };
        o.pods.insert((ns.to_owned(), pod.to_owned()), p);
    }
}

fn fqdn(text: &str) -> Fqdn {
    match Pattern::parse(text) {
        Ok(p) if text.contains('*') => Fqdn::Pattern(p),
        _ => Fqdn::Name(name(text)),
    }
}

fn cidr(text: &str) -> Cidr {
    let mut parts = text.split('-').map(parsed::<IpNet>);
    Cidr { cidr: parts.next().unwrap_or_default(), except: parts.collect() }
}

fn ports(b: &mut Bytes<'_>, deny: bool) -> Ports {
    let (proto, lo, hi) = b.pick(&RANGES[..if deny { 9 } else { 8 }]);
    Ports { proto, lo, hi }
}

fn at_least_one<T>(b: &mut Bytes<'_>, most: usize, mut make: impl FnMut(&mut Bytes<'_>) -> T) -> Vec<T> {
    let first = make(b);
    std::iter::once(first).chain(b.some(most - 1, make)).collect()
}

fn rule(b: &mut Bytes<'_>, index: usize, deny: bool, now: UnixSeconds) -> Rule {
    let by_name = !b.one_in(3);
    let (fqdns, cidrs) = if by_name {
        (at_least_one(b, 2, |b| fqdn(b.pick(&PATTERNS))), vec![])
    } else {
        (vec![], at_least_one(b, 2, |b| cidr(b.pick(&CIDRS))))
    };
    let style = b.byte();
    Rule {
        // Rules are often known by their place alone: an edit may give a name to another content.
        name: index.to_string().into(),
        fqdns,
        cidrs,
        ports: at_least_one(b, 2, |b| ports(b, deny)),
        sni: if style & 3 == 3 { SniMode::Unchecked } else { SniMode::Required },
        ech_allow: style & 12 == 12,
        dns_types: vec![],
        private_addresses: if style & 48 == 48 { vec![parsed("172.16.0.0/12")] } else { vec![] },
        min_binding: (style & 192 == 192).then(|| std::time::Duration::from_secs(500)),
        expires: b.one_in(8).then(|| UnixSeconds(now.0 + 40 * (1 + b.below(8) as i64))),
    }
}

fn rules(b: &mut Bytes<'_>, most: usize, deny: bool, now: UnixSeconds) -> Vec<Rule> {
    (0..b.below(most + 1)).map(|i| rule(b, i, deny, now)).collect()
}

fn pod_selector(b: &mut Bytes<'_>) -> Selector {
    match b.below(5) {
        0 => Selector { labels: labels(&[("app", "job")]), expressions: vec![] },
        1 => Selector {
            labels: Labels::new(),
            expressions: vec![Expression { key: "app".into(), op: Operator::NotIn(vec!["job".into()]) }],
        },
        _ => Selector::default(),
    }
}

fn policy(b: &mut Bytes<'_>, now: UnixSeconds) -> Policy {
    Policy {
        created: UnixSeconds(b.below(3) as i64),
        pod_selector: pod_selector(b),
        mode: if b.one_in(10) { PolicyMode::Staged } else { PolicyMode::Enforce },
        pool: b.one_in(5).then(|| b.pick(&["static", "nowhere"]).to_owned()),
        egress: rules(b, 3, false, now),
        deny: if b.one_in(2) { rules(b, 2, true, now) } else { vec![] },
    }
}

fn cluster_policy(b: &mut Bytes<'_>, now: UnixSeconds) -> ClusterPolicy {
    let namespaces = match b.below(4) {
        0 => Selector { labels: labels(&[("env", "test")]), expressions: vec![] },
        _ => Selector::default(),
    };
    let rules = rules(b, 3, true, now);
    let action = |b: &mut Bytes<'_>| b.pick(&[Action::Deny, Action::Accept, Action::Pass]);
    ClusterPolicy {
        tier: if b.one_in(2) { Tier::Admin } else { Tier::Baseline },
        priority: b.below(2) as u16,
        mode: if b.one_in(10) { PolicyMode::Staged } else { PolicyMode::Enforce },
        namespaces,
        pods: pod_selector(b),
        subject_lost: false,
        rules: rules.into_iter().map(|r| (action(b), r)).collect(),
        ceiling: b.one_in(4).then(|| Ceiling {
            fqdns: b.some(2, |b| fqdn(b.pick(&PATTERNS))),
            cidrs: b.some(2, |b| cidr(b.pick(&CIDRS))),
            ports: b.some(1, |b| ports(b, false)),
            permits: b.some(2, |b| b.pick(&[Permit::SniUnchecked, Permit::Cidrs, Permit::PrivateAddresses])),
        }),
    }
}

/// Changes one thing.
pub fn edit(o: &mut Objects, b: &mut Bytes<'_>, now: UnixSeconds) {
    let ns = b.pick(&NAMESPACES);
    match b.below(16) {
        0..=3 => {
            let key = (ns.to_owned(), b.pick(&["p", "q", "base"]).to_owned());
            if b.one_in(4) {
                o.policies.remove(&key);
            } else {
                o.policies.insert(key, policy(b, now));
            }
        }
        4..=6 => {
            let key = b.pick(&["k", "l", "m"]).to_owned();
            if b.one_in(3) {
                o.cluster_policies.remove(&key);
            } else {
                o.cluster_policies.insert(key, cluster_policy(b, now));
            }
        }
        7 => {
            // One rule of one policy is written anew and keeps its name.
            let key = (ns.to_owned(), b.pick(&["p", "q", "base"]).to_owned());
            let at = b.below(3);
            if let Some(r) = o.policies.get_mut(&key).and_then(|p| p.egress.get_mut(at)) {
                *r = rule(b, at, false, now);
            }
        }
        8 | 9 => {
            let pod = b.pick(&PODS);
            if b.one_in(4) {
                o.pods.remove(&(ns.to_owned(), pod.to_owned()));
            } else {
                let (node, host) = (b.pick(&NODES), b.below(5) as u8 + 1);
                let app = b.pick(&["web", "job"]);
                put_pod(o, ns, pod, node, host, &[("app", app)]);
            }
        }
        10 => {
            // Two pods change places: an address that was one namespace's is another's.
            let (to, pod) = (b.pick(&NAMESPACES), b.pick(&PODS));
            let (one, two) = ((ns.to_owned(), "a".to_owned()), (to.to_owned(), pod.to_owned()));
            if let (Some(p), Some(q)) = (o.pods.get(&one).cloned(), o.pods.get(&two).cloned())
                && one != two
            {
                let swap = |a: &Pod, b: &Pod| Pod { labels: a.labels.clone(), ..b.clone() };
                o.pods.insert(one, swap(&p, &q));
                o.pods.insert(two, swap(&q, &p));
            }
        }
        11 | 12 => namespace(o, ns, b, now),
        13 => {
            if b.one_in(3) {
                o.pools.remove("static");
            } else {
                o.pools.insert("static".into(), pool(b));
            }
        }
        14 => {
            o.settings.cluster_default =
                b.pick(&[ClusterDefault::Untouched, ClusterDefault::Isolated, ClusterDefault::Audit]);
        }
        _ => {
            o.settings.dns_filter = b.pick(&[DnsFilter::Strict, DnsFilter::Open]);
            o.settings.exempt_namespaces = if b.one_in(4) { vec!["lab".into()] } else { vec![] };
        }
    }
}

fn namespace(o: &mut Objects, name: &str, b: &mut Bytes<'_>, now: UnixSeconds) {
    let Some(ns) = o.namespaces.get_mut(name) else { return };
    match b.below(7) {
        0 => ns.managed = !ns.managed,
        1 => {
            ns.audit = !ns.audit;
            ns.audit_until = b.one_in(2).then(|| UnixSeconds(now.0 + 30));
        }
        2 => ns.labels = labels(&[("env", b.pick(&["prod", "test"]))]),
        3 => ns.pool = b.one_in(2).then(|| "static".to_owned()),
        4 | 5 => {
            ns.has_allow = b.one_in(2);
            ns.allow = if ns.has_allow { rules(b, 2, false, now) } else { vec![] };
        }
        // Deleted and made anew under the same name.
        _ => ns.uid = format!("{name}-{}", b.below(3) + 1),
    }
}

fn pair(host: u8, draining: bool) -> Pair {
    Pair { ipv4: Some([203, 0, 113, host].into()), ipv6: None, draining }
}

fn pool(b: &mut Bytes<'_>) -> Pool {
    let allowed = match b.below(3) {
        0 => Some(Selector { labels: labels(&[("env", "prod")]), expressions: vec![] }),
        1 => None,
        _ => Some(Selector::default()),
    };
    let both = b.one_in(4);
    Pool {
        allowed_namespaces: allowed,
        source: AddressSource::Static { interface: None, pairs: vec![pair(10, b.one_in(3) || both), pair(11, both)] },
        gateway_nodes: None,
    }
}
