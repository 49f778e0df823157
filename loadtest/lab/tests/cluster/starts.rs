//! Pods that kubelets start: what their first instruction sends is judged.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tidegate_lab::Lab;
use tidegate_lab::family::{FAMILIES, Family};
use tidegate_lab::lab::wait_for;
use tidegate_lab::probe::curl;

use crate::install::{self, source};

/// How long a kubelet may take to start a pod and to say how it ended, on a busy machine.
const STARTED: Duration = Duration::from_secs(60);
/// One question has to do: resolvers ask again after five seconds. The last line says when the name and when the connection was there.
const ONCE: [&str; 8] =
    ["curl", "-sSk", "--connect-timeout", "4", "--max-time", "4", "-w", r"\n%{time_namelookup} %{time_connect}"];
/// One SYN has to do: it is repeated after a second.
const SYN: f64 = 0.9;

/// A pod that asks for something, as its first instruction.
fn pod(lab: &Lab, key: &str, node: &str, what: &[&str]) {
    let (namespace, name) = key.split_once('/').unwrap();
    let command = [&ONCE[..], what].concat();
    let object = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name, "labels": {"app": "web"}},
        "spec": {
            "nodeName": node, "restartPolicy": "Never", "terminationGracePeriodSeconds": 0,
            "containers": [{
                "name": "main", "image": tidegate_lab::kubelet::CLIENT_IMAGE, "imagePullPolicy": "Never", "command": command,
            }],
        },
    });
    lab.host_kubectl(&["apply", "-f", "-"], &object.to_string()).unwrap();
}

/// Whether it got there, with what it wrote.
fn ended(lab: &Lab, key: &str) -> (bool, String) {
    let (namespace, name) = key.split_once('/').unwrap();
    let phase = wait_for(STARTED, || {
        let args = ["get", "pod", name, "--namespace", namespace, "-o", "jsonpath={.status.phase}"];
        let phase = lab.host_kubectl(&args, "").unwrap();
        ["Succeeded", "Failed"].contains(&phase.as_str()).then_some(phase)
    });
    let said = lab.host_kubectl(&["logs", name, "--namespace", namespace], "").unwrap_or_default();
    (phase.as_deref() == Some("Succeeded"), format!("{phase:?}: {said}"))
}

/// How long after the name the connection was there, in seconds.
fn connected(said: &str) -> Option<f64> {
    let (name, connection) = said.lines().last()?.split_once(' ')?;
    Some(connection.parse::<f64>().ok()? - name.parse::<f64>().ok()?)
}

/// In a namespace that allows one name, on every node.
pub fn first_instruction(lab: &Lab) {
    let disk = tidegate_lab::kubelet::disk(lab.name());
    let outside: Vec<IpAddr> = ["198.51.100.14", "2001:db8:100::14"].map(|a| a.parse().unwrap()).to_vec();
    let watches: Vec<_> = outside.iter().map(|ip| lab.watch(*ip, "tcp dport 8080").unwrap()).collect();
    for node in &lab.scenario().nodes {
        let list = disk.join(&node.name).join(Path::new("etc/cni/net.d/10-lab.conflist"));
        let entry = || {
            let list: Value = serde_json::from_slice(&std::fs::read(&list).ok()?).ok()?;
            list["plugins"].as_array()?.iter().any(|p| p["type"] == "tidegate-cni").then_some(())
        };
        assert!(wait_for(STARTED, entry).is_some(), "{}: the plugin has no entry", node.name);
        let key = |what: &str| format!("shop/{what}-{}", node.name);
        // With both families at hand curl would try the other one while a SYN is lost.
        pod(lab, &key("allowed4"), &node.name, &["--ipv4", "https://api.example.com/"]);
        pod(lab, &key("allowed6"), &node.name, &["--ipv6", "https://api.example.com/"]);
        pod(lab, &key("denied4"), &node.name, &["http://198.51.100.14:8080/"]);
        pod(lab, &key("denied6"), &node.name, &["http://[2001:db8:100::14]:8080/"]);
    }
    pod(lab, "untouched/free", "node-1", &["https://other.example.org/"]);
    for node in &lab.scenario().nodes {
        for what in ["allowed4", "allowed6"] {
            let (worked, said) = ended(lab, &format!("shop/{what}-{}", node.name));
            assert!(worked && said.contains("\"source\""), "{} {what}: {said}", node.name);
            let after = connected(&said);
            println!("first instruction, {} {what}: connected {after:?} s after the name", node.name);
            assert!(after.is_some_and(|s| s < SYN), "{} {what}: the first SYN was lost: {said}", node.name);
        }
        for what in ["denied4", "denied6"] {
            let (worked, said) = ended(lab, &format!("shop/{what}-{}", node.name));
            assert!(!worked, "{} {what}: {said}", node.name);
        }
    }
    let (worked, said) = ended(lab, "untouched/free");
    assert!(worked, "{said}");
    for namespace in ["shop", "untouched"] {
        let mut args = vec!["delete", "pods", "--now", "--namespace", namespace];
        args.extend(["--field-selector", "status.phase!=Running"]);
        lab.host_kubectl(&args, "").unwrap();
    }
    for (watch, family) in watches.iter().zip(FAMILIES) {
        assert_eq!(watch.packets().unwrap(), 0, "{family:?}: packets got out");
    }
}

/// A node without an agent is switched off and on, and its pods begin anew with what the plugin has on the disk: who is untouched has its way
/// out, who is isolated reaches the cluster alone.
pub fn at_boot(lab: &mut Lab, node: &str) {
    let (isolated, untouched) = (format!("shop/{node}"), "untouched/boot");
    lab.make_clients(&[(untouched, node)]).unwrap();
    let pods = [isolated.as_str(), untouched];
    let old: Vec<_> = pods.iter().map(|pod| lab.pod_processes(pod).unwrap()).collect();
    let name = |name: &str| lab.scenario().internet.names.iter().find(|n| n.name == name).unwrap().clone();
    let allowed = name("api.example.com");
    let (v4, v6): (IpAddr, IpAddr) = (allowed.ipv4[0].into(), allowed.ipv6[0].into());
    lab.switch_off(node).unwrap();
    // Nobody else asks for it now.
    let watches = [v4, v6].map(|ip| lab.watch(ip, "").unwrap());
    lab.switch_on(node).unwrap();
    let begun = || {
        let new = |(pod, old): (&&str, &Vec<_>)| lab.pod_processes(pod).is_ok_and(|now| now.len() > 1 && now != *old);
        pods.iter().zip(&old).all(new).then_some(())
    };
    assert!(wait_for(STARTED, begun).is_some(), "the pods do not come back");
    let own = |family| Some(install::node(lab, node, family));
    for family in FAMILIES {
        let reached = || (source(lab, untouched, family, "other.example.org") == own(family)).then_some(());
        assert!(wait_for(STARTED, reached).is_some(), "{family:?}: an untouched pod has no way out");
        let to = format!("api.example.com:443:{}", family.pick(v4, v6));
        for more in [&["--resolve", &to][..], &[]] {
            let seen = curl(&lab.cluster_pod(&isolated), family, "https://api.example.com/", more);
            assert_eq!(seen.source(), None, "{family:?} {more:?}: an isolated pod has a way out");
        }
    }
    let api = curl(&lab.cluster_pod(&isolated), Family::V4, "https://kubernetes.default/version", &["--insecure"]);
    assert!(api.body["gitVersion"].is_string(), "an isolated pod does not reach the cluster: {}", api.text());
    let packets: Vec<u64> = watches.iter().map(|w| w.packets().unwrap()).collect();
    assert_eq!(packets, [0, 0], "packets got out");
    // The watches see what goes the same way.
    for (family, watch) in FAMILIES.into_iter().zip(&watches) {
        let to = format!("api.example.com:443:{}", family.pick(v4, v6));
        let seen = curl(&lab.cluster_pod(untouched), family, "https://api.example.com/", &["--resolve", &to]);
        assert!(seen.source() == own(family) && watch.packets().unwrap() > 0, "{family:?}: {}", seen.text());
    }
}
