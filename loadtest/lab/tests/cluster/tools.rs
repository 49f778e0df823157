//! The commands that people run at their workstation, as they do: with a kubeconfig and nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tidegate_lab::Lab;
use tidegate_lab::family::Family;
use tidegate_lab::lab::wait_for;
use tidegate_lab::traces::tree;

use crate::install::{SYSTEM, source};
use crate::starts;

/// How long a namespace of the test may take to be there.
const BEGUN: Duration = Duration::from_secs(60);
/// How long agents may take to be as their DaemonSet says: one after the other, and each has been ready for ten seconds before the
/// next one's turn comes.
const ROLLED: &str = "--timeout=180s";
const OUTSIDE: &[&str] = &["--allow", "api.example.com", "--deny", "other.example.org", "-o", "json"];
const TEST: &str = "tidegate-connectivity-test";

fn command(lab: &Lab, name: &str, more: &[&str]) -> Command {
    let mut command = Command::new(lab.tidegate());
    command.arg(name).args(more).env("KUBECONFIG", lab.host_kubeconfig());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn test(lab: &Lab, more: &[&str]) -> Output {
    command(lab, "connectivity-test", &[OUTSIDE, more].concat()).output().unwrap()
}

/// Exit code, what it found, and what it said.
fn said(out: &Output) -> (Option<i32>, Value, String) {
    let found = serde_json::from_slice(&out.stdout).unwrap_or_default();
    (out.status.code(), found, String::from_utf8_lossy(&out.stderr).into_owned())
}

fn namespaces(lab: &Lab) -> Vec<String> {
    let all = lab.host_kubectl(&["get", "namespaces", "-o", "name"], "").unwrap();
    all.lines().filter(|n| n.contains(TEST)).map(str::to_owned).collect()
}

/// The checks that ended so, as `CHECK NODE`.
fn ended(found: &Value, outcome: &str) -> BTreeSet<String> {
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let all = found["checks"].as_array().unwrap_or_else(|| panic!("{found}"));
    let these = all.iter().filter(|r| r["outcome"] == outcome);
    these.map(|r| format!("{} {} {}", text(&r["check"]), text(&r["family"]), text(&r["node"]))).collect()
}

/// A run that is ended by a signal once its namespaces are there.
fn ended_by(lab: &Lab, signal: Signal) -> Output {
    let child = command(lab, "connectivity-test", &[OUTSIDE, &["--nodes", "1"]].concat()).spawn().unwrap();
    assert!(wait_for(BEGUN, || (namespaces(lab).len() == 2).then_some(())).is_some(), "it does not begin");
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
    child.wait_with_output().unwrap()
}

/// Has agents everywhere, or everywhere but on a node.
fn agents_but(lab: &Lab, node: Option<&str>) {
    let wanted = node.map(|node| {
        let field = serde_json::json!({"key": "metadata.name", "operator": "NotIn", "values": [node]});
        let terms = serde_json::json!({"nodeSelectorTerms": [{"matchFields": [field]}]});
        serde_json::json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}})
    });
    let patch = serde_json::json!({"spec": {"template": {"spec": {"affinity": wanted}}}}).to_string();
    let agents = "daemonset/tidegate-agent";
    lab.host_kubectl(&["patch", "-n", SYSTEM, agents, "--type=merge", "-p", &patch], "").unwrap();
    lab.host_kubectl(&["rollout", "status", "-n", SYSTEM, agents, ROLLED], "").unwrap();
}

/// The test of a cluster that is in use: it finds what is kept and what is broken, and leaves nothing behind.
pub fn connectivity(lab: &Lab) {
    // Nothing is installed there.
    let (code, _, text) = said(&test(lab, &["--namespace", "default"]));
    assert!(code == Some(2) && text.contains("there is no Tidegate"), "{code:?} {text}");

    let (code, found, text) = said(&ended_by(lab, Signal::SIGINT));
    assert_eq!((code, namespaces(lab)), (Some(2), vec![]), "{text}");
    assert!(found["error"] == "interrupted" && found["kept"] == false, "{found}");

    ended_by(lab, Signal::SIGKILL);
    assert_eq!(namespaces(lab).len(), 2, "nobody could take them away");
    let good = ["--pool", "partner-a", "--egress-url", "https://api.example.com/"];
    let (code, found, text) = said(&test(lab, &good));
    assert!(code == Some(0) && found["kept"] == true, "{code:?} {text} {found}");
    assert!(text.contains(&format!("removed the namespace {TEST},")), "{text}");
    assert_eq!(namespaces(lab), [""; 0]);
    assert_eq!((ended(&found, "broken"), ended(&found, "skipped")), (BTreeSet::new(), BTreeSet::new()));
    let kept = ended(&found, "kept");
    let nodes = &lab.scenario().nodes;
    for (family, address) in [("V4", "203.0.113.10 "), ("V6", "2001:db8::10 ")] {
        for node in nodes {
            for check in
                ["untouched pod", "allowed name", "denied name", "unresolved address", "wrong SNI", "wrong port"]
            {
                assert!(kept.contains(&format!("{check} {family} {}", node.name)), "{check} {family}: {kept:?}");
            }
        }
        let from =
            found["checks"].as_array().unwrap().iter().find(|r| r["check"] == "egress IP" && r["family"] == family);
        assert!(from.is_some_and(|r| r["detail"].as_str().unwrap().starts_with(address)), "{family}: {from:?}");
    }
    assert!(kept.contains("in-cluster name V4 node-1"), "{kept:?}");

    // As people see it, by one of several contexts in one of several files.
    let paths = ["/nobody/has/this".into(), lab.host_kubeconfig()];
    let context = lab.host_kubectl(&["config", "current-context"], "").unwrap();
    let seen = &[&OUTSIDE[..4], &["--node", "node-2", "--context", context.trim()]].concat();
    let seen = command(lab, "connectivity-test", seen).env("KUBECONFIG", std::env::join_paths(paths).unwrap()).output();
    let seen = seen.unwrap();
    let table = String::from_utf8(seen.stdout).unwrap();
    println!("{table}");
    assert!(seen.status.success(), "{}", String::from_utf8_lossy(&seen.stderr));
    let row = |words: &[&str]| {
        let line = table.lines().find(|l| words.iter().all(|w| l.split_whitespace().any(|word| word == *w)));
        assert!(line.is_some(), "{words:?}: {table}");
    };
    row(&["CHECK", "FAMILY", "NODE", "RESULT", "SEEN"]);
    for family in ["IPv4", "IPv6"] {
        row(&["denied", "name", family, "node-2", "ok"]);
    }
    assert!(table.contains("\nevery promise is kept: "), "{table}");
}

/// An installation that is broken on one node.
pub fn without_an_agent(lab: &mut Lab) {
    agents_but(lab, Some("node-2"));
    let (code, found, text) = said(&test(lab, &["--node", "node-1", "--node", "node-2"]));
    let broken = ended(&found, "broken");
    println!("without an agent on node-2: {broken:?}");
    assert!(code == Some(1) && found["kept"] == false, "{code:?} {text} {found}");
    assert!(broken.contains("agent  node-2") && broken.contains("allowed name V4 node-2"), "{broken:?}");
    // What its node closes is said, since the pod is nobody's.
    let told = |r: &&Value| r["check"] == "untouched pod" && r["node"] == "node-2";
    let told: Vec<_> = found["checks"].as_array().unwrap().iter().filter(told).collect();
    let why = |r: &&Value| r["detail"].as_str().unwrap().starts_with("closed: new namespace, and no agent");
    assert!(!told.is_empty() && told.iter().all(why), "{told:?}");
    // The policy waits for it, too.
    let there = |check: &String| check.ends_with("node-2") || check == "policy programmed  ";
    assert!(broken.iter().all(there), "{broken:?}");
    assert_eq!(namespaces(lab), [""; 0]);
    starts::at_boot(lab, "node-2");
    agents_but(lab, None);
    let back = || source(lab, "shop/node-2", Family::V4, "api.example.com").map(drop);
    assert!(wait_for(BEGUN, back).is_some(), "what the plugin closed at boot stays closed");
}

/// An archive's files, and how the command that made it ended.
fn dumped(lab: &Lab, more: &[&str]) -> (BTreeMap<String, Vec<u8>>, Option<i32>, String) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("dump.tar.gz");
    let out = command(lab, "sysdump", &[&["--file", file.to_str().unwrap()], more].concat()).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    let unpack = Command::new("tar").arg("-xzf").arg(&file).arg("-C").arg(folder.path()).status().unwrap();
    assert!(unpack.success(), "{said}");
    fs::remove_file(&file).unwrap();
    let files = tree(folder.path()).into_iter().filter(|f| f.is_file());
    let inner = |f: &Path| f.strip_prefix(folder.path()).unwrap().components().skip(1).collect::<std::path::PathBuf>();
    let files = files.map(|f| (inner(&f).display().to_string(), fs::read(&f).unwrap())).collect();
    (files, out.status.code(), said)
}

fn text(files: &BTreeMap<String, Vec<u8>>, file: &str) -> String {
    let found = files.get(file).unwrap_or_else(|| panic!("{file} is not among {:?}", files.keys()));
    String::from_utf8_lossy(found).into_owned()
}

/// What must not be in an archive, by what it is: what Secrets hold, as it is and in base64, and every token of a pod. Certificates
/// are not secret.
fn secrets(lab: &Lab) -> Vec<(String, Vec<u8>)> {
    let all: Value =
        serde_json::from_str(&lab.host_kubectl(&["get", "secrets", "-A", "-o", "json"], "").unwrap()).unwrap();
    let mut found = Vec::new();
    for secret in all["items"].as_array().unwrap() {
        for (key, value) in secret["data"].as_object().into_iter().flatten() {
            let (name, value) = (format!("{} {key}", secret["metadata"]["name"]), value.as_str().unwrap());
            let bytes = BASE64_STANDARD.decode(value).unwrap();
            if bytes.starts_with(b"-----BEGIN CERTIFICATE") {
                continue;
            }
            found.push((name.clone(), value.as_bytes().to_vec()));
            // The authority's is a document; its parts are secret, too.
            let mut parts = Vec::new();
            strings(&serde_json::from_slice(&bytes).unwrap_or_default(), &mut parts);
            let secret = |p: &String| p.len() >= 24 && !p.starts_with("-----BEGIN CERTIFICATE");
            found.extend(parts.into_iter().filter(secret).map(|p| (name.clone(), p.into_bytes())));
            found.push((name, bytes));
        }
    }
    for node in &lab.scenario().nodes {
        // Kubelets keep them in memory.
        let pods = lab.node_root(&node.name).unwrap().join("var/lib/kubelet/pods");
        for file in tree(&pods).into_iter().filter(|f| f.ends_with("token") && f.is_file()) {
            found.push((file.display().to_string(), fs::read(&file).unwrap().trim_ascii().to_vec()));
        }
    }
    found
}

/// Every text in a document.
fn strings(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::String(text) => found.push(text.clone()),
        Value::Array(all) => all.iter().for_each(|v| strings(v, found)),
        Value::Object(all) => all.values().for_each(|v| strings(v, found)),
        _ => {}
    }
}

fn without_secrets(files: &BTreeMap<String, Vec<u8>>, secrets: &[(String, Vec<u8>)]) {
    let texts: Vec<_> = files.iter().map(|(file, data)| (file, String::from_utf8_lossy(data))).collect();
    for (what, secret) in secrets {
        assert!(secret.len() >= 8, "{what} is found everywhere");
        let secret = String::from_utf8_lossy(secret);
        for (file, text) in &texts {
            assert!(!text.contains(&*secret), "{file} has {what}");
        }
    }
}

/// One archive has all that a bug report needs and no secret, also when some of it cannot be had.
pub fn sysdump(lab: &Lab) {
    let secret =
        ["create", "secret", "generic", "-n", SYSTEM, "planted", "--from-literal=password=correct-horse-battery"];
    lab.host_kubectl(&secret, "").unwrap();
    lab.host_kubectl(&["annotate", "namespace", "shop", "vault/token=correct-horse-battery"], "").unwrap();
    let secrets = secrets(lab);
    assert!(
        secrets.iter().any(|(what, _)| what.contains("authority.json"))
            && secrets.iter().any(|(what, _)| what.ends_with("/token"))
    );

    let (files, code, said) = dumped(lab, &[]);
    assert_eq!(code, Some(0), "{said}");
    without_secrets(&files, &secrets);
    assert!(text(&files, "summary.txt").contains("nothing is missing"));
    assert!(text(&files, "objects/egresspools.json").contains("partner-a"));
    let json = |file: &str| -> Value { serde_json::from_str(&text(&files, file)).unwrap() };
    let version = lab.host_kubectl(&["get", "--raw", "/version"], "").unwrap();
    let version: Value = serde_json::from_str(&version).unwrap();
    assert!(version["gitVersion"].is_string());
    assert_eq!(json("cluster/version.json")["gitVersion"], version["gitVersion"]);
    // What kubelets say of Tidegate's pods, and what Tidegate says of others'.
    for (file, reason, of) in
        [("install/events.json", "Started", "tidegate-"), ("cluster/events.json", "EgressDenied", "")]
    {
        let told = |e: &Value| e["reason"] == reason && e["involvedObject"]["name"].as_str().unwrap().starts_with(of);
        let all = json(file);
        assert!(all.as_array().unwrap().iter().any(told), "{file} has no {reason}: {all}");
    }
    let pods = json("install/pods.json");
    let pods = pods.as_array().unwrap();
    assert_eq!(pods.len(), 2 + lab.scenario().nodes.len());
    for pod in pods {
        let name = pod["metadata"]["name"].as_str().unwrap();
        let component = pod["metadata"]["labels"]["app.kubernetes.io/component"].as_str().unwrap();
        let of = |file: &str| text(&files, &format!("pods/{name}/{file}"));
        for file in ["config.json", "status.json"] {
            assert!(serde_json::from_str::<Value>(&of(file)).unwrap().is_object(), "{name} {file}");
        }
        assert!(of("metrics.txt").contains("tidegate_build_info"), "{name}");
        assert!(of("nftables.txt").contains("tidegate"), "{name}");
        assert!(of("machine.txt").contains("MemTotal"), "{name}");
        assert!(of("maps.txt").contains("/maps/FACTS: id ") && of("maps.txt").contains(" entries"), "{name}");
        assert!(of(&format!("{component}.log")).contains("tidegate"), "{name}");
    }

    // A pod that never ran, and room for little.
    let metadata = serde_json::json!({
        "name": "broken", "namespace": SYSTEM,
        "labels": {"app.kubernetes.io/name": "tidegate", "app.kubernetes.io/component": "agent"},
    });
    let container = serde_json::json!({"name": "agent", "image": "localhost/nobody:1", "imagePullPolicy": "Never"});
    let pod = serde_json::json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": metadata,
        "spec": {"nodeName": "node-1", "terminationGracePeriodSeconds": 0, "containers": [container]},
    });
    lab.host_kubectl(&["create", "-f", "-"], &pod.to_string()).unwrap();
    let (files, code, said) = dumped(lab, &["--pods", "3", "--each", "4"]);
    lab.host_kubectl(&["delete", "pod", "-n", SYSTEM, "broken"], "").unwrap();
    let summary = text(&files, "summary.txt");
    assert!(code == Some(1) && said.contains("pods/broken/agent.log: "), "{code:?} {said}");
    let asked = files.keys().filter(|f| f.starts_with("pods/") && f.ends_with("/metrics.txt")).count();
    assert!(asked == 2 && summary.contains("pods were not asked (--pods)"), "gateways come first: {summary}");
    assert!(summary.contains("/metrics.txt: its end was cut off (--each)"), "{summary}");
    for line in ["pods/broken/status.json: ", "pods/broken/maps.txt: "] {
        assert!(summary.contains(line), "those that are not ready come next: {summary}");
    }
    let longest = files.iter().filter(|(name, _)| name.starts_with("pods/")).map(|(_, data)| data.len()).max();
    assert!(longest.is_some_and(|n| n <= 4 << 10), "{longest:?}");
    without_secrets(&files, &secrets);
    lab.host_kubectl(&["delete", "secret", "-n", SYSTEM, "planted"], "").unwrap();
    lab.host_kubectl(&["annotate", "namespace", "shop", "vault/token-"], "").unwrap();
}
