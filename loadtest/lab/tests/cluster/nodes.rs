//! What Tidegate needs of nodes and of a cluster, and that it leaves nothing there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tidegate_kube::Tool;
use tidegate_lab::Lab;
use tidegate_lab::family::FAMILIES;
use tidegate_lab::lab::wait_for;
use tidegate_lab::traces::{self, Traces};

use crate::install::{SYSTEM, gateways, node, source, typed};

/// How long a pod may take to be replaced.
const REPLACED: Duration = Duration::from_secs(60);

/// What a node has: in its kernel, and files that Tidegate has to do with.
pub struct Before {
    traces: BTreeMap<String, Traces>,
    files: BTreeMap<String, BTreeMap<PathBuf, String>>,
}

/// The folder of network configurations.
const NETWORK: &str = "etc/cni/net.d";

/// Files, below the node's root, and folders of Tidegate's; with what network configurations say. Other empty folders that a kubelet made for a
/// mount are its own.
fn files(lab: &Lab, node: &str) -> BTreeMap<PathBuf, String> {
    let top = lab.node_root(node).unwrap();
    let folders = ["sys/fs/bpf", "run/tidegate", "opt/cni/bin", NETWORK, "var/lib/tidegate"];
    let all = folders.iter().flat_map(|folder| traces::tree(&top.join(folder)));
    let ours = ["run/tidegate", "var/lib/tidegate"].map(|folder| top.join(folder));
    let own = ours.clone().into_iter().filter(|f| f.exists());
    all.filter(|f| f.is_file() || f.starts_with(top.join("sys")) || ours.iter().any(|o| f.starts_with(o)))
        .chain(own)
        .map(|f| {
            let says = if f.starts_with(top.join(NETWORK)) {
                fs::read_to_string(&f).unwrap_or_default()
            } else {
                String::new()
            };
            (f.strip_prefix(&top).unwrap().to_owned(), says)
        })
        .collect()
}

fn nodes(lab: &Lab) -> impl Iterator<Item = String> {
    lab.scenario().nodes.iter().map(|n| n.name.clone())
}

pub fn look(lab: &Lab) -> Before {
    Before {
        traces: nodes(lab).map(|n| (n.clone(), traces::of(&lab.place(&n).unwrap()).unwrap())).collect(),
        files: nodes(lab).map(|n| (n.clone(), files(lab, &n))).collect(),
    }
}

/// The containers' seccomp profile is the runtime's own, and capabilities are the listed ones.
pub fn confined(lab: &Lab) {
    let mut found = 0;
    for process in fs::read_dir("/proc").unwrap().flatten().map(|e| e.path()) {
        let text = |file: &str| fs::read(process.join(file)).map(|b| String::from_utf8_lossy(&b).into_owned());
        let (Ok(groups), Ok(command), Ok(status)) = (text("cgroup"), text("cmdline"), text("status")) else { continue };
        if !groups.contains(&format!("tidegate-lab-{}/", lab.name())) || !command.contains("tidegate\0gateway") {
            continue;
        }
        let value = |key: &str| status.lines().find_map(|l| l.strip_prefix(key)).unwrap().trim().to_owned();
        // 2: a filter.
        assert_eq!((value("Seccomp:").as_str(), value("NoNewPrivs:").as_str()), ("2", "1"), "{command}");
        // NET_BIND_SERVICE, NET_ADMIN, PERFMON, BPF.
        assert_eq!(u64::from_str_radix(&value("CapEff:"), 16).unwrap(), 1 << 10 | 1 << 12 | 1 << 38 | 1 << 39);
        found += 1;
    }
    assert_eq!(found, 2, "gateways that run");
}

/// The budget lets one gateway go at a time, and the next one when the first one is back.
pub fn evictions(lab: &Lab) {
    let evict = |pod: &str| {
        let path = format!("/api/v1/namespaces/{SYSTEM}/pods/{pod}/eviction");
        let metadata = json!({"name": pod, "namespace": SYSTEM});
        let eviction = json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}).to_string();
        lab.at_host(Tool::Kubectl, &["create", "--raw", &path, "-f", "-"], &eviction).unwrap()
    };
    let before: Vec<String> = gateways(lab).into_keys().collect();
    let [first, second] = before.as_slice() else { panic!("{before:?}") };
    evict(first).success().unwrap();
    let refused = evict(second);
    assert!(!refused.ok && refused.stderr.contains("disruption budget"), "{refused}");
    let back = || {
        let get = ["get", "deployment", "-n", SYSTEM, "tidegate-gateway", "-o", "json"];
        let deployment: Value = serde_json::from_str(&lab.host_kubectl(&get, "").unwrap()).unwrap();
        let now = gateways(lab);
        (deployment["status"]["readyReplicas"] == 2 && now.len() == 2 && !now.contains_key(first)).then_some(())
    };
    assert!(wait_for(REPLACED, back).is_some(), "the evicted gateway is not replaced: {:?}", gateways(lab));
    let allowed = wait_for(REPLACED, || evict(second).ok.then_some(()));
    assert!(allowed.is_some(), "the second one may not go when the first one is back");
    assert!(wait_for(REPLACED, || (!gateways(lab).contains_key(second)).then_some(())).is_some());
    assert!(wait_for(REPLACED, back).is_some(), "{:?}", gateways(lab));
}

/// `helm uninstall` leaves nodes and namespace as they were, and traffic flows as before; then it can be installed again.
pub fn uninstall(lab: &Lab, before: &Before) {
    let (mut maps, mut programs) = (BTreeSet::new(), BTreeSet::new());
    for name in nodes(lab) {
        let found = traces::pinned(&lab.node_root(&name).unwrap().join("sys/fs/bpf")).unwrap();
        assert!(found.0.len() > 15 && found.1.len() > 2, "{name}: {found:?}");
        maps.extend(found.0);
        programs.extend(found.1);
        let now = traces::of(&lab.place(&name).unwrap()).unwrap();
        for what in ["links", "nftables", "programs"] {
            assert_ne!(now[what], before.traces[&name][what], "{name}: {what}: the look sees what Tidegate does");
        }
        for folder in ["run/tidegate", "var/lib/tidegate"] {
            assert!(files(lab, &name).contains_key(Path::new(folder)), "{name}: the look sees {folder}");
        }
        let network = |(file, says): (&PathBuf, &String)| {
            file.starts_with(NETWORK) && before.files[&name].get(file) != Some(says)
        };
        assert!(files(lab, &name).iter().any(network), "{name}: the look sees the plugin's entry");
    }
    typed(lab, "helm uninstall tidegate --namespace tidegate-system --wait");
    // The kernel frees programs after a grace period, kubelets pods a moment after they are gone from the API.
    let left = || {
        let mut left = Vec::new();
        for name in nodes(lab) {
            let found = traces::differences(&before.traces[&name], &traces::of(&lab.place(&name).unwrap()).unwrap());
            left.extend(found.into_iter().map(|what| format!("{name}: {what}")));
            let files = files(lab, &name);
            let was = &before.files[&name];
            let other = |a: &BTreeMap<PathBuf, String>, b: &BTreeMap<PathBuf, String>, what: &str| -> Vec<String> {
                let other = a.iter().filter(|(file, says)| b.get(*file) != Some(says));
                other.map(|(file, says)| format!("{name}: {what}: {} {says}", file.display())).collect()
            };
            left.extend(other(&files, was, "more"));
            left.extend(other(was, &files, "less"));
        }
        let loaded = traces::loaded(&maps, &programs);
        if loaded > 0 {
            left.push(format!("{loaded} maps and programs are loaded"));
        }
        left
    };
    let clean = wait_for(REPLACED, || left().is_empty().then_some(()));
    assert!(clean.is_some(), "{:#?}", left());
    // The namespace is the user's; what every namespace has comes with it.
    let kinds =
        "leases,secrets,configmaps,pods,services,serviceaccounts,roles,daemonsets,deployments,poddisruptionbudgets";
    let own = ["configmap/kube-root-ca.crt", "serviceaccount/default"];
    let objects = || -> Vec<String> {
        let all = lab.host_kubectl(&["get", kinds, "-n", SYSTEM, "-o", "name"], "").unwrap();
        all.lines().filter(|o| !own.contains(o)).map(str::to_owned).collect()
    };
    // Pods of what is gone end a moment later.
    assert!(wait_for(REPLACED, || objects().is_empty().then_some(())).is_some(), "{:?}", objects());
    for family in FAMILIES {
        for pod in ["shop/client", "untouched/client"] {
            let seen = source(lab, pod, family, "other.example.org");
            assert_eq!(seen, Some(node(lab, "node-1", family)), "{pod}: traffic flows as before");
        }
    }

    // Policies and pools have stayed: they hold again.
    typed(lab, "helm install tidegate helm/tidegate --namespace tidegate-system --wait");
    let denied = || source(lab, "shop/client", FAMILIES[0], "other.example.org").is_none().then_some(());
    assert!(wait_for(REPLACED, denied).is_some(), "after the second installation nothing is denied");
    let pool = wait_for(REPLACED, || {
        source(lab, "shop/client", FAMILIES[0], "api.example.com")
            .filter(|from| *from == tidegate_lab::story::of(tidegate_lab::story::POOL_A, FAMILIES[0]))
    });
    assert!(pool.is_some(), "after the second installation the pool does not carry");
}
