//! Labs, names and policies for what must hold when much comes at once.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tidegate_lab::scenario::NameSpec;
use tidegate_lab::{Lab, Options, Scenario};

static ONE: Mutex<()> = Mutex::new(());
pub const GATEWAYS: [&str; 2] = ["gw-a", "gw-b"];

pub fn scenario() -> Scenario {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/demo.yaml");
    Scenario::load(file.as_ref()).unwrap()
}

pub fn up(name: &str, scenario: Scenario) -> (MutexGuard<'static, ()>, Lab) {
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let options = Options { lab: Some(env!("CARGO_BIN_EXE_tidegate-lab").into()), ..Options::unique(name) };
    (one, Lab::up(scenario, &options).unwrap())
}

pub fn name(name: String, ipv4: Vec<Ipv4Addr>, ipv6: Vec<Ipv6Addr>) -> NameSpec {
    NameSpec { name, ttl: 300, ipv4, ipv6, ..NameSpec::default() }
}

/// A policy of a namespace's web pods with one rule.
pub fn policy(namespace: &str, pool: Option<&str>, fqdns: &[serde_json::Value], port: u16) -> String {
    let pool = pool.map(|p| format!("  poolRef: {{name: {p}}}\n")).unwrap_or_default();
    let sni = if port == 443 { "" } else { "    sni: Unchecked\n" };
    format!(
        "apiVersion: tidegate.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {{name: load-{port}, namespace: {namespace}}}\nspec:\n  \
         podSelector: {{matchLabels: {{app: web}}}}\n{pool}  egress:\n  - name: load\n    toFQDNs: {}\n    \
         toPorts: [{{protocol: TCP, port: {port}}}]\n{sni}",
        serde_json::to_string(fqdns).unwrap()
    )
}

/// A counter of TCP in the calling thread's network namespace.
pub fn netstat(counter: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/netstat").unwrap();
    let mut lines = text.lines();
    while let (Some(keys), Some(values)) = (lines.next(), lines.next()) {
        if let Some(at) = keys.split(' ').position(|k| k == counter) {
            return values.split(' ').nth(at).unwrap().parse().unwrap();
        }
    }
    panic!("the kernel does not count {counter}");
}
