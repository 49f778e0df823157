//! The real processes under a stream of names that nobody asked for before, connections and edits: what gateways and
//! agents hold when they have warmed up is what they hold at the end. `make soak` runs it for
//! `TIDEGATE_SOAK_MINUTES` (20 if it is not set).
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aya::Pod;
use aya::maps::{HashMap, Map, MapData};
use tidegate_ebpf_common::Addr;
use tidegate_ebpf_common::layout::{Endpoint, Fact, FactKey, Flow, FlowKey, GrantKey, IdKey};
use tidegate_lab::place::Running;
use tidegate_lab::scenario::NameSpec;
use tidegate_lab::{Lab, Options, Scenario};

const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/demo.yaml");

/// A flow without packets for so long is dead, and its fact goes; in seconds, the least that there is.
const IDLE: u64 = 60;
/// Until everything has begun and ended a few times.
const WARM: Duration = Duration::from_secs(3 * IDLE);
/// A look is the median of so many, five seconds apart: names come and go meanwhile.
const SAMPLES: usize = 7;
/// Addresses that the names share: each has no packet for longer than a flow may be idle before its turn comes again.
const ADDRESSES: u16 = 1_000;

/// New names of the pod's own, one connection each, and some that are not allowed.
const CLIENT: &str = r#"i=0
while :; do
  i=$((i + 1))
  curl -s -o /dev/null --max-time 5 https://n$i-$1.s$(( (i * 2 + $2) % 1000 )).soak.example.net/ && echo ok
  test $((i % 8)) = 0 && dig +tries=1 +time=1 n$i.denied.example.org >/dev/null
  sleep 0.1
done"#;

fn policy(last: u16) -> String {
    format!(
        "apiVersion: tidegate.dev/v1alpha1
kind: EgressPolicy
metadata: {{name: soak, namespace: shop}}
spec:
  podSelector: {{matchLabels: {{app: web}}}}
  poolRef: {{name: partner-a}}
  egress:
  - name: soak
    toFQDNs: [{{matchPattern: '**.soak.example.net'}}]
    toPorts: [{{protocol: TCP, port: 443}}, {{protocol: TCP, port: 9000, endPort: {last}}}]
"
    )
}

fn count<K: Pod, V: Pod>(pin: &Path) -> Option<usize> {
    let map = Map::from_map_data(MapData::from_pin(pin).ok()?).ok()?;
    Some(HashMap::<_, K, V>::try_from(map).ok()?.keys().flatten().count())
}

/// The folders of pins below a folder.
fn pins(below: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(below).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.join("FACTS").exists() {
            out.push(path);
        } else if path.is_dir() {
            pins(&path, out);
        }
    }
}

fn status(pid: i32, key: &str) -> usize {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix(key)).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// What is held now.
fn look(lab: &Lab) -> BTreeMap<String, usize> {
    let mut out = BTreeMap::new();
    for name in lab.product_names() {
        let pid = lab.process(&name).unwrap().pid;
        let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
        out.insert(format!("{name}: KiB of memory"), status(pid, "VmRSS:"));
        out.insert(format!("{name}: threads"), status(pid, "Threads:"));
        out.insert(format!("{name}: descriptors"), open);
    }
    for gateway in ["gw-a", "gw-b"] {
        let tracked = lab.place(gateway).unwrap().run(&["cat", "/proc/sys/net/netfilter/nf_conntrack_count"]);
        out.insert(format!("{gateway}: conntrack entries"), tracked.stdout.trim().parse().unwrap());
        let journal = std::fs::read_dir(lab.layout().journal(gateway)).into_iter().flatten().flatten();
        let octets: u64 = journal.filter_map(|f| Some(f.metadata().ok()?.len())).sum();
        out.insert(format!("{gateway}: KiB of journal"), (octets >> 10) as usize);
    }
    let (mut folders, bpffs) = (Vec::new(), lab.layout().bpffs());
    pins(&bpffs, &mut folders);
    assert_eq!(folders.len(), 6, "{folders:?}");
    for f in folders {
        let of = f.strip_prefix(&bpffs).unwrap().display().to_string();
        let mut put =
            |map: &str, n: Option<usize>| out.insert(format!("{of}: {map}"), n.expect("a map of this layout"));
        put("FACTS", count::<FactKey, Fact>(&f.join("FACTS")));
        put("GRANTS", count::<GrantKey, u32>(&f.join("GRANTS")));
        put("IDS", count::<IdKey, u32>(&f.join("IDS")));
        put("FLOWS", count::<FlowKey, Flow>(&f.join("FLOWS")));
        put("FLOW_COUNTS", count::<Addr, u32>(&f.join("FLOW_COUNTS")));
        put("ENDPOINTS", count::<Addr, Endpoint>(&f.join("ENDPOINTS")));
    }
    out
}

/// The medians of some looks.
fn medians(lab: &Lab) -> BTreeMap<String, usize> {
    let mut all: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for _ in 0..SAMPLES {
        for (k, v) in look(lab) {
            all.entry(k).or_default().push(v);
        }
        std::thread::sleep(Duration::from_secs(5));
    }
    let middle = |mut v: Vec<usize>| {
        v.sort_unstable();
        v[v.len() / 2]
    };
    all.into_iter().map(|(k, v)| (k, middle(v))).collect()
}

/// How much more there may be at the end: chance has a part in what comes and goes, none in threads and endpoints.
/// `faster`: by how much more connections were made before the second look, as other work left room for them.
fn slack(what: &str, before: usize, faster: f64) -> usize {
    match what.rsplit(": ").next().unwrap() {
        "KiB of memory" => before / 10 + 3 * 1024,
        "threads" | "ENDPOINTS" => 0,
        "descriptors" => 16,
        // It is folded when it has outgrown its snapshot.
        "KiB of journal" => 4 * 1024,
        "GRANTS" | "IDS" => 8,
        _ => (before as f64 * (1.25 * faster.max(1.0) - 1.0)) as usize + 64,
    }
}

#[test]
fn processes_end_as_they_began() {
    let minutes: u64 = std::env::var("TIDEGATE_SOAK_MINUTES").map_or(20, |m| m.parse().unwrap());
    assert!(minutes >= 3, "the second look is at least three minutes after the first");
    let mut scenario = Scenario::load(DEMO.as_ref()).unwrap();
    for i in 0..ADDRESSES {
        scenario.internet.names.push(NameSpec {
            name: format!("*.s{i}.soak.example.net"),
            ttl: 1 + u32::from(i % 5),
            ipv6: vec![[0x2001, 0xdb8, 0x200, 5, 0, 0, 0, i].into()],
            ..NameSpec::default()
        });
    }
    let product = scenario.tidegate.as_mut().unwrap();
    product.gateway.insert("flowIdleSeconds".into(), IDLE.into());
    let lab = Lab::up(scenario, &Options::unique("soak")).unwrap();
    lab.edit_manifest("soak.yaml", &policy(9_000)).unwrap();
    let clients: Vec<Running> = ["shop/web", "shop/worker"]
        .iter()
        .enumerate()
        .map(|(i, p)| lab.pod(p).spawn(&["sh", "-c", CLIENT, "client", &format!("p{i}"), &i.to_string()]).unwrap())
        .collect();
    let begun = Instant::now();
    let work = |until: Duration| {
        for n in 0u16.. {
            if begun.elapsed() >= until {
                break;
            }
            lab.edit_manifest("soak.yaml", &policy(9_000 + n % 500)).unwrap();
            std::thread::sleep(Duration::from_secs(5));
        }
        // Always the same policy under the look.
        lab.edit_manifest("soak.yaml", &policy(9_000)).unwrap();
    };
    let connections = || clients.iter().map(|c| c.output().matches("ok").count()).sum::<usize>();
    work(WARM);
    let warm = connections();
    let first = medians(&lab);
    let end = begun.elapsed() + Duration::from_secs(60 * minutes);
    work(end - WARM);
    let before = connections();
    work(end);
    let faster = (connections() - before) as f64 / warm as f64;
    let last = medians(&lab);
    let connected = connections();
    println!("{connected} connections in {} s, {faster:.2} times as fast at the end", begun.elapsed().as_secs());
    let mut grown = Vec::new();
    for (what, n) in &last {
        let before = first.get(what).copied().unwrap_or(0);
        println!("{what}: {before}, then {n}");
        if *n > before + slack(what, before, faster) {
            grown.push(format!("{what}: {before}, then {n}"));
        }
    }
    assert!(grown.is_empty(), "{grown:#?}");
    assert!(connected as u64 > 60 * minutes, "{connected} connections in {minutes} minutes");
}
