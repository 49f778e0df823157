//! README's quick start, line by line, and what holds after it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use tidegate_kube::{Tool, tool};
use tidegate_lab::Lab;
use tidegate_lab::family::{FAMILIES, Family};
use tidegate_lab::lab::wait_for;
use tidegate_lab::probe::curl;

use crate::root;

pub const SYSTEM: &str = "tidegate-system";
/// Until everything is ready.
const READY: Duration = Duration::from_secs(60);
/// How long an edit may take to hold everywhere.
const EDIT: Duration = Duration::from_secs(20);

/// The source that a server of the internet saw.
pub fn source(lab: &Lab, pod: &str, family: Family, name: &str) -> Option<IpAddr> {
    curl(&lab.cluster_pod(pod), family, &format!("https://{name}/"), &[]).source()
}

/// The address with which a node's own traffic and that of its untouched pods leaves.
pub fn node(lab: &Lab, name: &str, family: Family) -> IpAddr {
    let node = lab.scenario().node(name).unwrap();
    family.pick(node.ipv4.into(), node.ipv6.into())
}

/// The nodes that gateways run on, by the gateways' names.
pub fn gateways(lab: &Lab) -> BTreeMap<String, String> {
    let pods = ["get", "pods", "--namespace", SYSTEM, "-l", "app.kubernetes.io/component=gateway", "-o", "json"];
    let pods: Value = serde_json::from_str(&lab.host_kubectl(&pods, "").unwrap()).unwrap();
    let text = |v: &Value| v.as_str().unwrap().to_owned();
    pods["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| (text(&p["metadata"]["name"]), text(&p["spec"]["nodeName"])))
        .collect()
}

/// The commands of a section of README, as they are written there.
fn commands(section: &str) -> Vec<String> {
    let text = std::fs::read_to_string(root().join("README.md")).unwrap();
    let (_, text) = text.split_once(&format!("\n## {section}\n")).unwrap();
    let (_, text) = text.split_once("\n```\n").unwrap();
    let (text, _) = text.split_once("\n```\n").unwrap();
    text.lines().map(str::to_owned).collect()
}

/// What a user types at this machine, with the cluster's kubeconfig.
pub fn typed(lab: &Lab, line: &str) -> String {
    let folders = [Tool::Helm, Tool::Kubectl].map(|t| tool(t).unwrap().parent().unwrap().to_owned());
    let own = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths(folders.into_iter().chain(std::env::split_paths(&own))).unwrap();
    let out = Command::new("sh")
        .args(["-c", line])
        .current_dir(root())
        .env("PATH", path)
        .env("HOME", lab.layout().folder.join("home"))
        .env("KUBECONFIG", lab.host_kubeconfig())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    if !out.status.success() {
        let pods = lab.host_kubectl(&["get", "pods", "-A", "-o", "wide"], "").unwrap();
        panic!("{line}: {said}{}\n{pods}", String::from_utf8_lossy(&out.stderr));
    }
    said
}

/// Types what README says, in a cluster that has a namespace `shop` with a pod `client`.
pub fn quick_start(lab: &Lab) {
    let lines = commands("Quick start");
    assert!(lines.len() == 4 && lines[0].starts_with("helm install") && lines[1].starts_with("helm test"), "{lines:?}");
    for line in lines {
        let begun = Instant::now();
        let said = typed(lab, &line);
        println!("{:.1} s: {line}", begun.elapsed().as_secs_f32());
        assert!(!line.starts_with("helm install") || begun.elapsed() < READY, "it took {:?}", begun.elapsed());
        assert!(!line.contains("curl") || said.contains("\"source\""), "{line}: {said}");
    }
}

/// The annotation holds: what it names leaves by a gateway, from every node, and nothing else leaves.
pub fn leaves_by_a_gateway(lab: &Lab) {
    // The name that nobody allows stops resolving when the annotation holds.
    let denied = |pod: &str, family| source(lab, pod, family, "other.example.org").is_none();
    let gateways = gateways(lab);
    let nodes = &lab.scenario().nodes;
    for at in nodes {
        let pod = format!("shop/{}", at.name);
        let holds = wait_for(EDIT, || denied(&pod, Family::V4).then_some(()));
        assert!(holds.is_some(), "{pod}: nothing is denied");
        for family in FAMILIES {
            assert!(denied(&pod, family), "{pod}: what nobody allows is reached over {family:?}");
            let seen = curl(&lab.cluster_pod(&pod), family, "https://api.example.com/", &[]);
            // Without addresses of a pool it is the gateway's node that a server sees.
            let by = gateways.iter().find(|(_, on)| Some(node(lab, on, family)) == seen.source());
            let by = by.unwrap_or_else(|| panic!("{pod} {family:?}: {}; gateways {gateways:?}", seen.text()));
            println!("{pod} {family:?}: left by {} on {}", by.0, by.1);
        }
    }
    // Some of them would have been seen with their own node's address, had they not left by a gateway.
    assert!(nodes.iter().any(|n| !gateways.values().any(|on| *on == n.name)), "every node has a gateway");
    for family in FAMILIES {
        let own = Some(node(lab, "node-1", family));
        assert_eq!(source(lab, "untouched/client", family, "other.example.org"), own, "untouched {family:?}");
    }
    // In-cluster traffic is not touched.
    for pod in ["shop/client", "untouched/client"] {
        let api = curl(&lab.cluster_pod(pod), Family::V4, "https://kubernetes.default/version", &["--insecure"]);
        assert!(api.body["gitVersion"].is_string(), "{pod}: {}", api.text());
    }
}
