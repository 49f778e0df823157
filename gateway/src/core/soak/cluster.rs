//! The cluster of the soak, its names, and how it changes.

use std::net::IpAddr;
use std::path::Path;

use tidegate_policy::Proto;
use tidegate_policy::model::{
    Action, Cidr, ClusterPolicy, Fqdn, Labels, Namespace, Node, Objects, Pair, Pod, Policy, PolicyMode, Pool, Ports,
    Rule, Selector, Tier, UnixSeconds,
};
use tidegate_policy::pattern::Pattern;

use crate::config::Config;

/// Nodes that stay.
pub const NODES: [&str; 2] = ["node-1", "node-2"];
/// Namespaces that stay.
pub const TEAMS: [&str; 5] = ["team-a", "team-b", "team-c", "team-d", "team-e"];
/// Names that stay.
pub const FIXED: u64 = 10_000;

pub fn config(folder: &Path, pins: &Path) -> Config {
    let text = format!(
        "{{name: gw-a, node: node-1, directory: {d}, control: '127.0.0.1:1', socket: {d}/s, pins: {p}, \
         tls: {{certificate: c, key: k, ca: a}}, \
         gateways: [{{name: gw-a, node: node-1, address: '127.0.0.1:1'}}, {{name: gw-b, node: node-2, address: '127.0.0.1:2'}}], \
         owners: [{{pool: static, ipv4: 203.0.113.10, gateway: gw-a}}], \
         cluster: {{prefixes: [10.96.0.0/12], dns: ['10.96.0.10:53']}}, \
         resolvers: [{{servers: ['192.0.2.53:53']}}]}}",
        d = folder.display(),
        p = pins.display(),
    );
    serde_saphyr::from_str(&text).unwrap()
}

fn labels(k: &str, v: &str) -> Labels {
    [(k.to_owned(), v.to_owned())].into_iter().collect()
}

fn rule(name: &str, patterns: &[&str], ports: &[(u16, u16)]) -> Rule {
    Rule {
        fqdns: patterns.iter().map(|p| Fqdn::Pattern(Pattern::parse(p).unwrap())).collect(),
        ..Rule::new(name, ports.iter().map(|(lo, hi)| Ports { proto: Some(Proto::Tcp), lo: *lo, hi: *hi }).collect())
    }
}

fn policy(egress: Vec<Rule>) -> Policy {
    Policy {
        created: UnixSeconds(0),
        pod_selector: Selector::default(),
        mode: PolicyMode::Enforce,
        pool: None,
        egress,
        deny: vec![],
    }
}

fn base(extra: &[(u16, u16)]) -> Policy {
    let ports: Vec<(u16, u16)> = [(443, 443)].iter().chain(extra).copied().collect();
    let cidr = Cidr { cidr: "203.0.0.0/9".parse().unwrap(), except: vec![] };
    policy(vec![
        rule("a", &["*.a.fixed.example"], &ports),
        rule("b", &["*.b.fixed.example"], &[(443, 443), (8443, 8443)]),
        rule("all", &["**.fixed.example"], &[(80, 80)]),
        rule("fresh", &["**.fresh.example"], &[(443, 443)]),
        Rule { cidrs: vec![cidr], ..rule("prefix", &[], &[(5432, 5432)]) },
    ])
}

fn node(i: u8) -> Node {
    Node {
        addresses: vec![[10, 0, 0, i].into()],
        labels: Labels::new(),
        pod_prefixes: vec![format!("10.244.{i}.0/24").parse().unwrap()],
    }
}

fn pod(node: &str, net: u8, host: u8) -> Pod {
    let addresses = vec![IpAddr::from([10, 244, net, host])];
    Pod {
        node: node.into(),
        addresses,
        labels: labels("app", "web"),
        host_network: false,
        ending: false,
        mirror: false,
    }
}

/// What the cluster is before anything changes.
pub fn objects() -> Objects {
    let mut o = Objects::default();
    o.settings.cluster_prefixes = vec!["10.96.0.0/12".parse().unwrap()];
    for (i, n) in NODES.iter().enumerate() {
        o.nodes.insert((*n).into(), node(i as u8 + 1));
    }
    for (i, t) in TEAMS.iter().enumerate() {
        let uid = format!("{t}-uid");
        let pool = (i == 0).then(|| "static".to_owned());
        o.namespaces.insert((*t).into(), Namespace { uid, pool, ..Namespace::default() });
        o.policies.insert(((*t).into(), "base".into()), base(&[]));
        for (k, n) in NODES.iter().enumerate() {
            o.pods.insert(((*t).into(), format!("web-{k}")), pod(n, k as u8 + 1, i as u8 + 1));
        }
    }
    let pair = Pair { ipv4: Some([203, 0, 113, 10].into()), ipv6: None, draining: false };
    let source = tidegate_policy::model::AddressSource::Static { interface: None, pairs: vec![pair] };
    o.pools
        .insert("static".into(), Pool { allowed_namespaces: Some(Selector::default()), source, gateway_nodes: None });
    o
}

/// The pod that asks for a fixed name, the name, and its TTL in seconds: two minutes to a day, each magnitude as often.
pub fn fixed(n: u64) -> (IpAddr, String, u32) {
    let (team, node) = (n % TEAMS.len() as u64, n / TEAMS.len() as u64 % 2);
    let kind = ["a", "b", "c"][n as usize / 10 % 3];
    let ttl = 120.0 * 720f64.powf(n as f64 * 0.618_034 % 1.0);
    ([10, 244, node as u8 + 1, team as u8 + 1].into(), format!("n{n}.{kind}.fixed.example"), ttl as u32)
}

/// Two addresses of a name's six; `turn` 0 are the first two, which no other name has.
pub fn addresses(n: u64, turn: u64) -> Vec<IpAddr> {
    let own = |i: u64| IpAddr::from((0xc800_0000 + (n as u32 % (1 << 20)) * 2 + i as u32).to_be_bytes());
    // Those that change are shared by many names, as a content network's are.
    let shared = |i: u64| IpAddr::from((0xcb00_0000 + ((n * 7 + i) % 3_000) as u32 * 256 + 1).to_be_bytes());
    match turn % 3 {
        0 => vec![own(0), own(1)],
        _ => vec![shared(turn % 4), shared(turn / 4 % 4 + 4)],
    }
}

/// Pods that ask for new names.
pub fn askers(o: &Objects) -> Vec<IpAddr> {
    o.pods.values().map(|p| p.addresses[0]).collect()
}

/// The `n`th change. What an earlier one made goes again. Gives the nodes that are gone.
pub fn edit(o: &mut Objects, n: u64) -> Vec<String> {
    let team = TEAMS[n as usize / 8 % TEAMS.len()].to_owned();
    match n % 8 {
        0 => {
            // A policy with names, ports and prefixes that never were before.
            o.policies.retain(|k, _| !k.1.starts_with("new-"));
            let prefix = Cidr { cidr: IpAddr::from((n as u32).to_be_bytes()).into(), except: vec![] };
            let rules = vec![
                rule("x", &[&format!("**.x{n}.example"), "*.a.fixed.example"], &[(n as u16 % 40_000 + 1_000, 50_000)]),
                Rule { cidrs: vec![prefix], ..rule("y", &[], &[(n as u16 % 40_000 + 1_000, 50_000)]) },
            ];
            o.policies.insert((team, format!("new-{n}")), policy(rules));
        }
        1 => drop(o.policies.insert((team, "base".into()), base(&[(9_000, 9_000 + (n % 900) as u16)]))),
        2 => drop(o.policies.insert((team, "base".into()), base(&[]))),
        3 | 7 => {
            // A namespace of a build, with its pod; three of them live at a time.
            let old: Vec<String> = o.namespaces.keys().filter(|k| k.starts_with("ci-")).cloned().collect();
            if old.len() >= 3 {
                o.namespaces.remove(&old[0]);
                o.policies.retain(|k, _| k.0 != old[0]);
                o.pods.retain(|k, _| k.0 != old[0]);
            }
            let name = format!("ci-{n:08}");
            o.namespaces.insert(name.clone(), Namespace { uid: format!("{name}-uid"), ..Namespace::default() });
            o.policies.insert((name.clone(), "base".into()), base(&[]));
            o.pods.insert((name, "job".into()), pod(NODES[0], 1, 100 + (n / 4 % 100) as u8));
        }
        4 => {
            // A machine that is rented for a while.
            let old: Vec<String> = o.nodes.keys().filter(|k| k.starts_with("spot-")).cloned().collect();
            old.iter().for_each(|k| drop(o.nodes.remove(k)));
            o.pods.retain(|_, p| !p.node.starts_with("spot-"));
            let (name, net) = (format!("spot-{n}"), 10 + (n / 8 % 200) as u8);
            o.nodes.insert(name.clone(), node(net));
            o.pods.insert((team, "spot".into()), pod(&name, net, 7));
            return old;
        }
        5 => {
            // A deployment's new pod beside the ones that stay.
            o.pods.retain(|k, _| !k.1.starts_with("roll-"));
            o.pods.insert((team, format!("roll-{n}")), pod(NODES[1], 2, 50 + (n / 8 % 100) as u8));
        }
        _ => {
            let rules = vec![(Action::Deny, rule("bad", &[&format!("**.bad{n}.example")], &[(1, 65_535)]))];
            let p = ClusterPolicy {
                tier: Tier::Admin,
                priority: 1,
                mode: PolicyMode::Enforce,
                namespaces: Selector::default(),
                pods: Selector::default(),
                subject_lost: false,
                rules,
                ceiling: None,
            };
            o.cluster_policies.clear();
            o.cluster_policies.insert(format!("deny-{n}"), p);
        }
    }
    Vec::new()
}

/// A resolver's response with one record per address.
pub fn answer(sent: &[u8], ips: &[IpAddr], ttl: u32) -> Vec<u8> {
    let mut m = sent.to_vec();
    m[2..4].copy_from_slice(&[0x81, 0x80]);
    m[6..8].copy_from_slice(&(ips.len() as u16).to_be_bytes());
    for ip in ips {
        let IpAddr::V4(a) = ip else { panic!("only IPv4") };
        m.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1]);
        m.extend_from_slice(&ttl.to_be_bytes());
        m.extend_from_slice(&[0, 4]);
        m.extend_from_slice(&a.octets());
    }
    m
}
