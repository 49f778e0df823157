//! Rolling upgrades: of values, and of everything to another version, with pods that start meanwhile.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tidegate_lab::steady::gaps::Threads;
use tidegate_lab::{Lab, kubelet};

use crate::faults::ready;
use crate::ground::{Ground, HANDED_OVER, MOVES, UNNOTICED};
use crate::install::{SYSTEM, gateways, typed};

/// What the other version is called.
const NEXT: &str = "next";
/// The pods that start meanwhile.
const STARTING: &str = "starting";
/// So many pods end well, at least.
const FEW: u64 = 4;
/// How often the plugin's file is looked at, and how many looks there are to a call of it.
const LOOK: Duration = Duration::from_millis(5);
const CALL: u32 = 40;
/// Tries what is denied first, then what is allowed until it answers.
const BEGIN: &str = r"
for to in 198.51.100.14 [2001:db8:100::14]; do
    echo | socat -t0 - UDP:$to:7001
    timeout 0.2 socat -u /dev/null TCP:$to:443
done
exec curl -sS -o /dev/null --connect-timeout 2 --max-time 4 --retry 9 --retry-all-errors --retry-delay 1 https://api.example.com/";

fn upgrade(lab: &Lab, values: &str) {
    typed(lab, &format!("helm upgrade tidegate helm/tidegate --namespace {SYSTEM} --reuse-values --wait {values}"));
    ready(lab);
}

/// A value of the agents, which costs nobody a connection, and one of the gateways.
pub fn of_values(lab: &mut Lab, ground: &mut Ground) {
    ground
        .step(lab, "a value of agents changed", UNNOTICED, |lab| upgrade(lab, "--set agent.config.fullPassSeconds=20"));
    let before: Vec<String> = gateways(lab).into_keys().collect();
    ground.step(lab, "a value of gateways changed", HANDED_OVER, |lab| {
        upgrade(lab, "--set gateway.config.fullPassSeconds=20");
    });
    assert!(gateways(lab).keys().all(|g| !before.contains(g)), "{before:?}");
}

/// Gateways, agents and the CNI plugin of each node at once. Pods start meanwhile: none of them fails, none gets out.
pub fn of_everything(lab: &mut Lab, ground: &mut Ground) {
    lab.another_version(NEXT).unwrap();
    let plugins = Plugins::of(lab);
    begin_pods(lab);
    ground.step(lab, "upgraded to another version", MOVES, |lab| upgrade(lab, &format!("--set image.tag={NEXT}")));
    let (ended, mut bad) = end_pods(lab);
    println!("  {ended} pods began and ended well meanwhile");
    if ended < FEW {
        bad.push(format!("only {ended} pods ended well"));
    }
    bad.extend(plugins.finish(lab));
    ground.also("upgraded to another version", bad);
}

/// Two at a time, one after the other, wherever there is room.
fn begin_pods(lab: &Lab) {
    let container = json!({
        "name": "main", "image": kubelet::CLIENT_IMAGE, "imagePullPolicy": "Never", "command": ["sh", "-c", BEGIN],
    });
    let job = json!({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": STARTING, "namespace": "shop"},
        "spec": {
            "parallelism": 2, "completions": 1000, "backoffLimit": 0,
            "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {"restartPolicy": "Never", "terminationGracePeriodSeconds": 0, "containers": [container]},
            },
        },
    });
    lab.host_kubectl(&["apply", "-f", "-"], &job.to_string()).unwrap();
}

/// How many ended well, and what went wrong with others.
fn end_pods(lab: &Lab) -> (u64, Vec<String>) {
    let status = lab.object(&["job", "--namespace", "shop", STARTING]).unwrap()["status"].take();
    let mut bad = Vec::new();
    if status["failed"].as_u64().is_some_and(|n| n > 0) {
        bad.push(status.to_string());
    }
    let events = lab.object(&["events", "--namespace", "shop", "--field-selector", "reason=FailedCreatePodSandBox"]);
    let about = |e: &Value| e["involvedObject"]["name"].as_str().is_some_and(|name| name.starts_with(STARTING));
    let events = events.unwrap()["items"].take();
    bad.extend(events.as_array().unwrap().iter().filter(|e| about(e)).map(|e| e["message"].to_string()));
    lab.host_kubectl(&["delete", "job", "--namespace", "shop", STARTING, "--cascade=foreground"], "").unwrap();
    (status["succeeded"].as_u64().unwrap_or_default(), bad)
}

/// The plugins' files, which are looked at all the time: each is whole whenever a runtime may call it.
struct Plugins {
    threads: Threads,
    /// By node.
    seen: Arc<Mutex<BTreeMap<String, Seen>>>,
}

/// The lengths that a file had, and what its calls said that was wrong.
type Seen = (Vec<u64>, Vec<String>);

fn plugin(lab: &Lab, node: &str) -> PathBuf {
    kubelet::disk(lab.name()).join(node).join("opt/cni/bin/tidegate-cni")
}

/// Calls a plugin as a runtime does; says what was wrong.
fn call(file: &Path) -> Result<(), String> {
    let mut command = Command::new(file);
    command.env_clear().env("CNI_COMMAND", "VERSION");
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.map_err(|e| e.to_string())?;
    let input = child.stdin.take().unwrap().write_all(br#"{"cniVersion":"1.0.0"}"#);
    let out = child.wait_with_output().map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&out.stdout);
    let good = input.is_ok() && out.status.success() && said.contains("supportedVersions");
    if good { Ok(()) } else { Err(format!("{} {said} {}", out.status, String::from_utf8_lossy(&out.stderr))) }
}

impl Plugins {
    fn of(lab: &Lab) -> Self {
        let mut this = Self { threads: Threads::new(), seen: Arc::default() };
        let files: Vec<_> = lab.scenario().nodes.iter().map(|n| (n.name.clone(), plugin(lab, &n.name))).collect();
        let (seen, end) = (Arc::clone(&this.seen), Arc::clone(&this.threads.end));
        this.threads.start(move || {
            let mut looks = 0u32;
            while !end.load(std::sync::atomic::Ordering::Relaxed) {
                for (n, (node, file)) in (0u32..).zip(&files) {
                    let length = fs::metadata(file).map_or(0, |m| m.len());
                    let said = if looks % CALL == n * 10 { call(file) } else { Ok(()) };
                    let mut seen = seen.lock().unwrap();
                    let (lengths, bad) = seen.entry(node.clone()).or_default();
                    if lengths.last() != Some(&length) {
                        lengths.push(length);
                    }
                    bad.extend(said.err());
                }
                looks = looks.wrapping_add(1);
                std::thread::sleep(LOOK);
            }
        });
        this
    }

    /// What is not as it should be: each was replaced, once, by one that is an octet longer.
    fn finish(self, lab: &Lab) -> Vec<String> {
        self.threads.finish();
        let seen = self.seen.lock().unwrap();
        let nodes = lab.scenario().nodes.iter().map(|n| (&n.name, &seen[&n.name]));
        let good = |(lengths, bad): &Seen| lengths.len() == 2 && lengths[1] == lengths[0] + 1 && bad.is_empty();
        let bad = nodes.filter(|(_, seen)| !good(seen));
        bad.map(|(node, (lengths, bad))| format!("the plugin of {node}: lengths {lengths:?}, {bad:?}")).collect()
    }
}
