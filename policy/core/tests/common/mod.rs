//! Objects for tests, in few words.
#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(clippy::unwrap_used, reason = "texts of tests are well formed")]

pub mod same;

use std::net::IpAddr;
use std::sync::Arc;

use tidegate_policy::model::*;
use tidegate_policy::pattern::Pattern;
use tidegate_policy::world::{Answer, Decision, Group};
use tidegate_policy::{Name, Proto, World};

pub fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

pub fn selector(pairs: &[(&str, &str)]) -> Selector {
    Selector { labels: labels(pairs), expressions: vec![] }
}

pub fn fqdn(text: &str) -> Fqdn {
    if text.contains('*') { Fqdn::Pattern(Pattern::parse(text).unwrap()) } else { Fqdn::Name(name(text)) }
}

/// `203.0.113.0/24` or `203.0.113.0/24-203.0.113.7/32` (minus exceptions).
pub fn cidr(text: &str) -> Cidr {
    let mut parts = text.split('-').map(|p| p.parse().unwrap());
    Cidr { cidr: parts.next().unwrap(), except: parts.collect() }
}

/// `443`, `443/udp`, `5432-5439`, `any`.
pub fn port(text: &str) -> Ports {
    if text == "any" {
        return Ports { proto: None, lo: 0, hi: 65535 };
    }
    let (range, proto) = text.split_once('/').unwrap_or((text, "tcp"));
    let (lo, hi) = range.split_once('-').unwrap_or((range, range));
    let proto = match proto {
        "tcp" => Some(Proto::Tcp),
        "udp" => Some(Proto::Udp),
        _ => None,
    };
    Ports { proto, lo: lo.parse().unwrap(), hi: hi.parse().unwrap() }
}

/// A rule to names or prefixes (told apart by a slash).
pub fn rule(label: &str, to: &[&str], ports: &[&str]) -> Rule {
    let (cidrs, fqdns): (Vec<&str>, Vec<&str>) = to.iter().partition(|t| t.contains('/'));
    Rule {
        fqdns: fqdns.into_iter().map(fqdn).collect(),
        cidrs: cidrs.into_iter().map(cidr).collect(),
        ..Rule::new(label, ports.iter().map(|p| port(p)).collect())
    }
}

pub fn policy(egress: Vec<Rule>, deny: Vec<Rule>) -> Policy {
    Policy {
        created: UnixSeconds(0),
        pod_selector: Selector::default(),
        mode: PolicyMode::Enforce,
        pool: None,
        egress,
        deny,
    }
}

pub fn cluster(tier: Tier, priority: u16, rules: Vec<(Action, Rule)>) -> ClusterPolicy {
    ClusterPolicy {
        tier,
        priority,
        mode: PolicyMode::Enforce,
        namespaces: Selector::default(),
        pods: Selector::default(),
        subject_lost: false,
        rules,
        ceiling: None,
    }
}

pub fn ceiling(to: &[&str], ports: &[&str], permits: &[Permit]) -> ClusterPolicy {
    let r = rule("", to, ports);
    ClusterPolicy {
        ceiling: Some(Ceiling { fqdns: r.fqdns, cidrs: r.cidrs, ports: r.ports, permits: permits.to_vec() }),
        ..cluster(Tier::Admin, 500, vec![])
    }
}

pub fn pod(address: &str, l: &[(&str, &str)]) -> Pod {
    Pod {
        node: "n1".into(),
        addresses: vec![ip(address)],
        labels: labels(l),
        host_network: false,
        ending: false,
        mirror: false,
    }
}

/// A namespace `shop` (labels `env: prod`) with one pod 10.1.0.1 (`app: web`).
pub fn shop() -> Objects {
    let mut o = Objects::default();
    let ns = Namespace { uid: "u-shop".into(), labels: labels(&[("env", "prod")]), ..Namespace::default() };
    o.namespaces.insert("shop".into(), ns);
    o.pods.insert(("shop".into(), "web".into()), pod("10.1.0.1", &[("app", "web")]));
    o
}

pub trait ObjectsExt {
    fn own(self, name: &str, p: Policy) -> Self;
    fn clustered(self, name: &str, p: ClusterPolicy) -> Self;
    fn world(&self) -> World;
    fn group(&self) -> Arc<Group>;
    fn with_ns(self, f: impl FnOnce(&mut Namespace)) -> Self;
}

impl ObjectsExt for Objects {
    fn own(mut self, name: &str, p: Policy) -> Self {
        self.policies.insert(("shop".into(), name.into()), p);
        self
    }

    fn clustered(mut self, name: &str, p: ClusterPolicy) -> Self {
        self.cluster_policies.insert(name.into(), p);
        self
    }

    fn world(&self) -> World {
        World::compile(self, UnixSeconds(1000), None)
    }

    fn group(&self) -> Arc<Group> {
        self.world().group_of(ip("10.1.0.1")).expect("a touched pod").clone()
    }

    fn with_ns(mut self, f: impl FnOnce(&mut Namespace)) -> Self {
        f(self.namespaces.get_mut("shop").unwrap());
        self
    }
}

pub trait GroupExt {
    /// A TCP connection to a public address that has this name bound.
    fn to(&self, n: &str, port: u16) -> Decision;
    /// A TCP connection to an address without a name.
    fn to_ip(&self, address: &str, port: u16) -> Decision;
    fn a(&self, n: &str) -> Answer;
}

impl GroupExt for Group {
    fn to(&self, n: &str, port: u16) -> Decision {
        self.connection(Some(&name(n)), ip("192.0.2.1"), Proto::Tcp, port)
    }

    fn to_ip(&self, address: &str, port: u16) -> Decision {
        self.connection(None, ip(address), Proto::Tcp, port)
    }

    fn a(&self, n: &str) -> Answer {
        self.name(n, 1).answer
    }
}
