//! What agents and gateways take of memory and CPU, as their control groups have it: the figures behind the chart's requests and limits.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use tidegate_lab::lab::wait_for;
use tidegate_lab::probe::Client;
use tidegate_lab::scenario::NameSpec;
use tidegate_lab::{Lab, Options};

use crate::install::{SYSTEM, gateways, source, typed};

/// How long is measured.
const WINDOW: Duration = Duration::from_secs(20);
/// How long load has run before.
const WARM: Duration = Duration::from_secs(4);
const MIB: f64 = 1024.0 * 1024.0;
/// Namespaces that learn all they may: with one more the kernel's map of facts (`capacities.facts`) might not hold what they learn.
const FULL: usize = 60;
/// `quotas.names`.
const NAMES: usize = 8192;

/// A container of the product.
struct Process {
    /// `agent` or `gateway`, and its node.
    who: (String, String),
    pid: PathBuf,
    groups: BTreeMap<String, PathBuf>,
}

/// What it has used until now.
#[derive(Clone, Copy, Debug, Default)]
struct Used {
    /// Seconds of CPUs.
    cpu: f64,
    /// What the kernel would kill it for, without files that can be read again, in octets.
    working: f64,
    /// The most that was ever charged.
    peak: f64,
    /// Its own pages that no file has.
    anonymous: f64,
}

fn number(path: &Path) -> f64 {
    fs::read_to_string(path).ok().and_then(|t| t.trim().parse().ok()).unwrap_or_default()
}

/// The value behind a word in a file of words and numbers.
fn after(text: &str, word: &str) -> f64 {
    let line = text.lines().find_map(|l| l.strip_prefix(word)?.split_whitespace().next()?.parse().ok());
    line.unwrap_or_default()
}

impl Process {
    fn all(lab: &Lab) -> Vec<Self> {
        let mut found = Vec::new();
        for pid in fs::read_dir("/proc").unwrap().flatten().map(|e| e.path()) {
            let text = |file: &str| fs::read(pid.join(file)).map(|b| String::from_utf8_lossy(&b).into_owned());
            let (Ok(groups), Ok(command)) = (text("cgroup"), text("cmdline")) else { continue };
            let Some(what) = ["agent", "gateway"].into_iter().find(|w| command.contains(&format!("tidegate\0{w}\0")))
            else {
                continue;
            };
            let top = format!("/tidegate-lab-{}/", lab.name());
            let Some((_, below)) = groups.split_once(&top) else { continue };
            let node = below.split('/').next().unwrap().to_owned();
            let folders = groups.lines().filter_map(|line| {
                let mut fields = line.splitn(3, ':').skip(1);
                let (controllers, path) = (fields.next()?, fields.next()?.trim_start_matches('/'));
                Some(
                    controllers.split(',').map(move |c| (c.to_owned(), Path::new("/sys/fs/cgroup").join(c).join(path))),
                )
            });
            found.push(Self { who: (what.to_owned(), node), pid: pid.clone(), groups: folders.flatten().collect() });
        }
        found.sort_by(|a, b| a.who.cmp(&b.who));
        found
    }

    fn used(&self) -> Used {
        let (memory, cpu) = (&self.groups["memory"], &self.groups["cpuacct"]);
        let stat = fs::read_to_string(memory.join("memory.stat")).unwrap_or_default();
        let status = fs::read_to_string(self.pid.join("status")).unwrap_or_default();
        Used {
            cpu: number(&cpu.join("cpuacct.usage")) / 1e9,
            working: number(&memory.join("memory.usage_in_bytes")) - after(&stat, "total_inactive_file "),
            peak: number(&memory.join("memory.max_usage_in_bytes")),
            anonymous: after(&status, "RssAnon:") * 1024.0,
        }
    }
}

/// Octets of memory of the kernel's maps are charged to whoever fills them: they are in `working`.
fn measure(what: &str, processes: &[Process]) {
    let (before, begun) = (processes.iter().map(Process::used).collect::<Vec<_>>(), Instant::now());
    thread::sleep(WINDOW);
    let seconds = begun.elapsed().as_secs_f64();
    for (process, before) in processes.iter().zip(before) {
        let now = process.used();
        println!(
            "| {what} | {} on {} | {:.0} m | {:.1} | {:.1} | {:.1} |",
            process.who.0,
            process.who.1,
            (now.cpu - before.cpu) / seconds * 1e3,
            now.working / MIB,
            now.anonymous / MIB,
            now.peak / MIB
        );
    }
}

/// The sum of a counter's lines that have a label, over all gateways.
fn counted(lab: &Lab, counter: &str, label: &str) -> f64 {
    let page = |pod: &String| {
        let path = format!("/api/v1/namespaces/{SYSTEM}/pods/{pod}:9090/proxy/metrics");
        lab.host_kubectl(&["get", "--raw", &path], "").unwrap_or_default()
    };
    let lines: Vec<String> = gateways(lab).keys().map(page).collect();
    let of =
        |l: &str| (l.starts_with(counter) && l.contains(label)).then(|| l.rsplit(' ').next()?.parse::<f64>().ok())?;
    lines.iter().flat_map(|page| page.lines()).filter_map(of).sum()
}

#[test]
#[ignore = "measures: TIDEGATE_BIN names a release build, and the machine does nothing else"]
fn what_agents_and_gateways_take() {
    let mut scenario = crate::scenario();
    scenario.internet.names.push(NameSpec {
        name: "*.spread.example.net".into(),
        ttl: 3600,
        ipv4: vec!["20.0.0.0".parse().unwrap()],
        ipv6: vec!["2001:db8:100:1::".parse().unwrap()],
        spread: true,
        ..NameSpec::default()
    });
    let lab = Lab::up(scenario, &Options::unique("res")).unwrap();
    crate::clients(&lab);
    typed(&lab, "helm install tidegate helm/tidegate --namespace tidegate-system --create-namespace --wait");
    println!("| state | what | CPU | working set MiB | anonymous MiB | peak MiB |\n|---|---|---:|---:|---:|---:|");
    thread::sleep(Duration::from_secs(15));
    let processes = Process::all(&lab);
    assert_eq!(
        processes.len(),
        2 + lab.scenario().nodes.len(),
        "{:?}",
        processes.iter().map(|p| &p.who).collect::<Vec<_>>()
    );
    measure("at rest, nothing managed", &processes);
    typed(
        &lab,
        "kubectl annotate namespace shop tidegate.dev/allow='api.example.com, *.many.example.net, *.one.example.net'",
    );
    let denied =
        || source(&lab, "shop/node-1", tidegate_lab::family::Family::V4, "other.example.org").is_none().then_some(());
    assert!(wait_for(Duration::from_secs(30), denied).is_some());
    measure("at rest, a namespace managed", &processes);

    let seconds = (WARM + WINDOW).as_secs() + 4;
    let load = |what: &str, line: &str, kind: &str| {
        let line = format!("timeout {seconds} sh -c '{line}'");
        thread::scope(|scope| {
            for node in &lab.scenario().nodes {
                let (lab, line) = (&lab, &line);
                scope.spawn(move || lab.cluster_pod(&format!("shop/{}", node.name)).command(&["sh", "-c", line]));
            }
            thread::sleep(WARM);
            let (before, begun) = (counted(&lab, "tidegate_decisions_total", kind), Instant::now());
            measure(what, &processes);
            let done = counted(&lab, "tidegate_decisions_total", kind) - before;
            println!("{what}: {:.0} {kind} a second", done / begun.elapsed().as_secs_f64());
        });
    };
    let connections = r#"while :; do curl -sk -4 --parallel --parallel-max 20 -H "Connection: close" -o /dev/null "https://api.example.com/?[1-2000]"; done"#;
    load("new TLS connections", connections, "kind=\"open\"");
    let names = r#"while :; do i=0; while [ $i -lt 2000 ]; do i=$((i+1)); echo "n$i.many.example.net A"; done | dig -f /dev/stdin +time=1 +tries=1 >/dev/null; done"#;
    load("new and cached names", names, "kind=\"dns\"");
    let bulk = "while :; do curl -sk -4 -o /dev/null https://api.example.com/bytes/1000000000; done";
    load("bulk, four downloads", bulk, "kind=\"open\"");
    thread::sleep(Duration::from_secs(10));
    measure("at rest after it", &processes);
    fill(&lab);
    thread::sleep(Duration::from_secs(10));
    measure("full", &processes);
}

/// So many namespaces learn as many names as their quotas let them, with an address of each family. Their pods are on one node, whose
/// kernel then holds nearly as many facts as it can.
fn fill(lab: &Lab) {
    let spaces: Vec<String> = (0..FULL).map(|n| format!("full-{n}")).collect();
    let object = |name: &String| {
        let allow = json!({"tidegate.dev/allow": "*.spread.example.net"});
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "annotations": allow}})
    };
    let list = json!({"apiVersion": "v1", "kind": "List", "items": spaces.iter().map(object).collect::<Vec<_>>()});
    lab.host_kubectl(&["apply", "-f", "-"], &list.to_string()).unwrap();
    let pods: Vec<String> = spaces.iter().map(|space| format!("{space}/client")).collect();
    lab.make_clients(&pods.iter().map(|pod| (pod.as_str(), "node-1")).collect::<Vec<_>>()).unwrap();
    let line = format!(
        "i=0; while [ $i -lt {NAMES} ]; do echo n$i.spread.example.net A; echo n$i.spread.example.net AAAA; i=$((i+1)); done \
         | dig -f /dev/stdin +noall +comments +time=3 +tries=5 | grep -c NOERROR"
    );
    let begun = Instant::now();
    thread::scope(|scope| {
        let all: Vec<_> = pods
            .iter()
            .map(|pod| {
                scope.spawn(|| lab.cluster_pod(pod).command(&["sh", "-c", &line]).stdout.trim().parse::<usize>())
            })
            .collect();
        let answers: usize = all.into_iter().map(|t| t.join().unwrap().unwrap_or_default()).sum();
        println!("{answers} of {} answers in {:.0?}", 2 * NAMES * FULL, begun.elapsed());
        assert!(answers > NAMES * FULL * 19 / 10);
    });
}
