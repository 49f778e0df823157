//! What must hold when much comes at once: bursts of fresh names, nodes that do not confirm, floods of one tenant,
//! addresses that are dead.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod barrier;
mod burst;
mod clients;
mod flood;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tidegate_lab::scenario::{Listen, NameSpec, Pod};
use tidegate_lab::{Lab, Options, Scenario};

static ONE: Mutex<()> = Mutex::new(());
const GATEWAYS: [&str; 2] = ["gw-a", "gw-b"];
const A: u16 = 1;
const AAAA: u16 = 28;

fn scenario() -> Scenario {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/demo.yaml");
    Scenario::load(file.as_ref()).unwrap()
}

fn up(name: &str, scenario: Scenario) -> (MutexGuard<'static, ()>, Lab) {
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let options = Options { lab: Some(env!("CARGO_BIN_EXE_tidegate-lab").into()), ..Options::unique(name) };
    (one, Lab::up(scenario, &options).unwrap())
}

/// A web pod with number `n` on node-1.
fn pod(name: &str, namespace: &str, n: u8) -> Pod {
    Pod {
        name: name.into(),
        namespace: namespace.into(),
        node: "node-1".into(),
        labels: BTreeMap::from([("app".into(), "web".into())]),
        // Behind those of the demo's pods, and of its DNS.
        ipv4: Some(Ipv4Addr::new(10, 244, 1, 54 + n)),
        ipv6: Some(Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 1, n.into())),
        listen: Listen::default(),
    }
}

fn name(name: String, ipv4: Vec<Ipv4Addr>, ipv6: Vec<Ipv6Addr>) -> NameSpec {
    NameSpec { name, ttl: 300, ipv4, ipv6, ..NameSpec::default() }
}

/// A policy of a namespace's web pods with one rule.
fn policy(namespace: &str, pool: Option<&str>, fqdns: &[serde_json::Value], port: u16) -> String {
    let pool = pool.map(|p| format!("  poolRef: {{name: {p}}}\n")).unwrap_or_default();
    let sni = if port == 443 { "" } else { "    sni: Unchecked\n" };
    format!(
        "apiVersion: tidegate.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {{name: load-{port}, namespace: {namespace}}}\nspec:\n  \
         podSelector: {{matchLabels: {{app: web}}}}\n{pool}  egress:\n  - name: load\n    toFQDNs: {}\n    \
         toPorts: [{{protocol: TCP, port: {port}}}]\n{sni}",
        serde_json::to_string(fqdns).unwrap()
    )
}

fn dns(lab: &Lab) -> SocketAddr {
    SocketAddr::new(lab.scenario().pod("kube-system/coredns").unwrap().ipv4.unwrap().into(), 53)
}

/// The response code and the first address of a reply without aliases.
fn parse(reply: &[u8], qtype: u16) -> Option<(u8, Option<IpAddr>)> {
    let code = reply.get(3)? & 15;
    if reply[6..8] == [0, 0] {
        return Some((code, None));
    }
    let question = 12 + reply.get(12..)?.iter().position(|b| *b == 0)? + 5;
    let data = reply.get(question + 12..)?;
    let ip = match qtype {
        A => IpAddr::from(<[u8; 4]>::try_from(data.get(..4)?).ok()?),
        _ => IpAddr::from(<[u8; 16]>::try_from(data.get(..16)?).ok()?),
    };
    Some((code, Some(ip)))
}

/// A counter of TCP in the calling thread's network namespace.
fn netstat(counter: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/netstat").unwrap();
    let mut lines = text.lines();
    while let (Some(keys), Some(values)) = (lines.next(), lines.next()) {
        if let Some(at) = keys.split(' ').position(|k| k == counter) {
            return values.split(' ').nth(at).unwrap().parse().unwrap();
        }
    }
    panic!("the kernel does not count {counter}");
}

fn percentile(sorted: &[Duration], p: f64) -> Duration {
    sorted[((sorted.len() as f64 * p).ceil() as usize).clamp(1, sorted.len()) - 1]
}
