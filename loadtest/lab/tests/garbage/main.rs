//! What hostile bytes, slow clients, broken files, resolvers that lie and a full disk must not do: end a process, or hurt
//! others.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bytes;
mod files;
mod lies;
mod slow;

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::json;
use tidegate_lab::family::{FAMILIES, Family};
use tidegate_lab::probe::curl;
use tidegate_lab::{Lab, Options, Scenario};

static ONE: Mutex<()> = Mutex::new(());
const GATEWAYS: [&str; 2] = ["gw-a", "gw-b"];
/// The resolvers of the names that end in `lies`, `mute` and `void`.
const LIAR: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 54);
const MUTE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 55);
const VOID: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 56);

fn up(name: &str) -> (MutexGuard<'static, ()>, Lab, Vec<i32>) {
    up_as(name, None)
}

/// As [`up`], with another binary of the product.
fn up_as(name: &str, tidegate: Option<PathBuf>) -> (MutexGuard<'static, ()>, Lab, Vec<i32>) {
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/demo.yaml");
    let mut scenario = Scenario::load(file.as_ref()).unwrap();
    let group =
        |ip: Ipv4Addr, suffix: &str| json!({"servers": [format!("{ip}:53")], "protocol": "Udp", "suffixes": [suffix]});
    let resolvers = json!([
        {"servers": ["198.51.100.53:53", "[2001:db8:100::53]:53"], "protocol": "Udp"},
        group(LIAR, "lies.example.com"),
        group(MUTE, "mute.example.com"),
        group(VOID, "void.example.com"),
    ]);
    scenario.tidegate.as_mut().unwrap().gateway.insert("resolvers".into(), resolvers);
    let lab = Some(env!("CARGO_BIN_EXE_tidegate-lab").into());
    let options = Options { lab, tidegate, ..Options::unique(name) };
    let lab = Lab::up(scenario, &options).unwrap();
    let pids = pids(&lab);
    (one, lab, pids)
}

fn pids(lab: &Lab) -> Vec<i32> {
    lab.product_names().iter().map(|n| lab.process(n).unwrap()).filter(|p| p.is_alive()).map(|p| p.pid).collect()
}

/// Pods, and the egress addresses that they have.
const SHOP: (&str, &str, &str) = ("shop/worker", "203.0.113.10", "2001:db8::10");
const BILLING: (&str, &str, &str) = ("billing/pay", "203.0.113.20", "2001:db8::20");

/// Tenants, those of the same namespace and others, reach what they may, and every process is the one that it was.
#[track_caller]
fn unaffected(lab: &Lab, before: &[i32], what: &str) {
    unaffected_are(&[SHOP, BILLING], lab, before, what);
}

/// As [`unaffected`], of these pods.
#[track_caller]
fn unaffected_are(pods: &[(&str, &str, &str)], lab: &Lab, before: &[i32], what: &str) {
    for family in FAMILIES {
        for (pod, v4, v6) in pods {
            let seen = curl(&lab.pod(pod), family, "https://api.example.com/", &[]);
            let egress: IpAddr = family.pick(v4, v6).parse().unwrap();
            assert_eq!(seen.source(), Some(egress), "{pod} after {what}: {}", seen.text());
        }
    }
    assert_eq!(pids(lab), before, "the processes after {what}");
    for name in lab.product_names() {
        assert_eq!(lab.admin(&name, "/healthz").unwrap().0, 200, "{name} after {what}");
    }
}

/// A pod's address.
fn address(lab: &Lab, pod: &str, family: Family) -> IpAddr {
    let pod = lab.scenario().pod(pod).unwrap();
    family.pick(pod.ipv4.unwrap().into(), pod.ipv6.unwrap().into())
}
