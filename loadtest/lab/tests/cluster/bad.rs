//! What people get wrong and what nodes lack, where it takes kubelets to see it: each is named where people look, and nothing gets
//! out meanwhile that policy does not allow.

use std::net::IpAddr;
use std::process::Command;
use std::time::Duration;

use serde_json::json;
use tidegate_lab::family::{FAMILIES, Family};
use tidegate_lab::lab::wait_for;
use tidegate_lab::observe::Watch;
use tidegate_lab::probe::curl;
use tidegate_lab::{Lab, kubelet};

use crate::install::{SYSTEM, gateways, node, source, typed};

/// How long Kubernetes may take to notice, and an edit to hold.
const SOON: Duration = Duration::from_secs(60);
/// A worker that has no BPF file system at first.
const BARE: &str = "node-2";
const PODS: [&str; 2] = ["shop/one", "shop/two"];
const GATEWAYS: &str = "app.kubernetes.io/component=gateway";
/// Where a node's agent keeps its certificate.
const CERTIFICATE: &str = "/run/tidegate/identity";
/// What no policy allows, and the ports at which nobody else tries it.
const DENIED: [&str; 2] = ["198.51.100.14", "2001:db8:100::14"];
const PORTS: &str = "meta l4proto { tcp, udp } th dport { 7001, 8080 }";
/// Tries it from its first instruction on.
const EAGER: &str = r"
while :; do
    for to in 198.51.100.14 [2001:db8:100::14]; do echo | socat -t0 - UDP:$to:7001; timeout 0.2 socat -u /dev/null TCP:$to:8080; done
    sleep 0.1
done";

/// Runs a command on a node.
#[track_caller]
fn on_node(lab: &Lab, node: &str, command: &[&str]) -> String {
    crate::said(lab.name(), &[&["exec", node, "--"], command].concat())
}

/// What `tidegate status` shows.
fn status(lab: &Lab) -> String {
    let mut command = Command::new(lab.tidegate());
    let out = command.args(["status", "--cluster"]).env("KUBECONFIG", lab.host_kubeconfig()).output().unwrap();
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

/// `tidegate status` says all of these words.
#[track_caller]
fn says(lab: &Lab, what: &str, words: &[&str]) {
    let said = || words.iter().all(|w| status(lab).contains(w)).then_some(());
    assert!(wait_for(SOON, said).is_some(), "{what}: {}", status(lab));
    for line in status(lab).lines().filter(|l| words.iter().any(|w| l.contains(w))) {
        println!("{what}: {line}");
    }
}

fn helm(lab: &Lab, more: &str) {
    typed(
        lab,
        &format!("helm upgrade --install tidegate helm/tidegate --namespace {SYSTEM} --create-namespace {more}"),
    );
}

/// Changes are taken back, and everything is as before.
fn back(lab: &Lab) {
    helm(lab, "--reset-values --wait --timeout 2m");
    // A DaemonSet whose agents are ready may still have some to replace.
    typed(lab, &format!("kubectl rollout status --timeout=2m --namespace {SYSTEM} daemonset/tidegate-agent"));
    enforced(lab, "everything is taken back");
}

/// Pods of `shop` reach what is allowed, by a gateway, and nothing else.
#[track_caller]
fn enforced(lab: &Lab, when: &str) {
    for (pod, family) in PODS.iter().flat_map(|pod| FAMILIES.map(|f| (pod, f))) {
        let denied = || source(lab, pod, family, "other.example.org").is_none().then_some(());
        assert!(wait_for(SOON, denied).is_some(), "{when}: {pod} {family:?}: nothing is denied");
        let by = || {
            let seen = source(lab, pod, family, "api.example.com")?;
            gateways(lab).values().any(|on| node(lab, on, family) == seen).then_some(())
        };
        assert!(wait_for(SOON, by).is_some(), "{when}: {pod} {family:?}: what is allowed is not reached by a gateway");
    }
    let own = Some(node(lab, "node-1", Family::V4));
    assert_eq!(source(lab, "untouched/one", Family::V4, "other.example.org"), own, "{when}");
}

/// A pod that never ceases to try what is denied.
fn eager(lab: &Lab, name: &str, node: &str) {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "shop", "labels": {"app": "web"}},
        "spec": {
            "nodeName": node, "terminationGracePeriodSeconds": 0,
            "containers": [{
                "name": "eager", "image": kubelet::CLIENT_IMAGE, "imagePullPolicy": "Never", "command": ["sh", "-c", EAGER],
            }],
        },
    });
    lab.host_kubectl(&["apply", "-f", "-"], &pod.to_string()).unwrap();
    let ready = ["wait", "-n", "shop", "--for=condition=Ready", "--timeout=60s", &format!("pod/{name}")];
    lab.host_kubectl(&ready, "").unwrap();
}

#[track_caller]
fn nothing(watches: &[Watch], when: &str) {
    let packets: Vec<u64> = watches.iter().map(|w| w.packets().unwrap()).collect();
    let senders = || watches.iter().map(Watch::senders).collect::<Vec<_>>();
    assert!(packets.iter().all(|n| *n == 0), "{when}: packets got out: {packets:?} {:?}", senders());
}

#[test]
fn what_goes_wrong_is_named_and_nothing_gets_out() {
    let lab = crate::up(crate::scenario(), "bad");
    for namespace in ["shop", "billing", "untouched"] {
        lab.host_kubectl(&["create", "namespace", namespace], "").unwrap();
    }
    let pods = [(PODS[0], "node-1"), (PODS[1], BARE), ("billing/one", "node-1"), ("untouched/one", "node-1")];
    lab.make_clients(&pods).unwrap();

    no_node_for_gateways(&lab);
    without_bpffs(&lab);
    typed(&lab, "kubectl annotate namespace shop tidegate.dev/allow=api.example.com");
    enforced(&lab, "installed");
    let watches = DENIED.map(|ip| lab.watch(ip.parse().unwrap(), PORTS).unwrap());
    for (name, node) in [("eager-1", "node-1"), ("eager-2", BARE)] {
        eager(&lab, name, node);
    }
    no_node_for_gateways_any_more(&lab);
    nothing(&watches, "without a node for gateways");
    no_image(&lab);
    nothing(&watches, "without an image");
    too_little_memory(&lab);
    nothing(&watches, "without memory");
    an_unknown_setting(&lab);
    nothing(&watches, "with a setting that the program does not know");
    nobody_may_hold_the_pool(&lab);
    nothing(&watches, "with a pool that nobody may hold");
    drop(watches);
    crate::down(lab);
}

/// No node has the label that gateways are to have: nobody is managed, and it is said why.
fn no_node_for_gateways(lab: &Lab) {
    on_node(lab, BARE, &["umount", "/sys/fs/bpf"]);
    helm(lab, "--set gateway.nodeSelector.nobody=has");
    let words = ["none of 2 gateways is ready", "Unschedulable: 0/", "node affinity/selector"];
    says(lab, "no node for gateways", &words);
    for pod in [PODS[0], "untouched/one"] {
        let own = Some(node(lab, "node-1", Family::V4));
        assert_eq!(source(lab, pod, Family::V4, "other.example.org"), own, "{pod}: nothing is managed yet");
    }
}

/// The same in a cluster in which namespaces are managed: while there is no gateway they have no way out, and others have theirs. An agent
/// that begins meanwhile without a certificate says that it has none.
fn no_node_for_gateways_any_more(lab: &Lab) {
    helm(lab, "--set gateway.nodeSelector.nobody=has");
    says(lab, "gateways that find no other node", &["Unschedulable: 0/", "node affinity/selector"]);
    enforced(lab, "a gateway is left");
    // As after the nodes that had the label.
    let scale = |n: u8| typed(lab, &format!("kubectl scale -n {SYSTEM} deployment/tidegate-gateway --replicas={n}"));
    scale(0);
    typed(lab, &format!("kubectl wait -n {SYSTEM} --for=delete --timeout=60s pod -l {GATEWAYS}"));
    scale(2);
    says(lab, "no node for gateways any more", &["none of 2 gateways is ready", "Unschedulable: 0/"]);
    on_node(lab, BARE, &["rm", "-r", CERTIFICATE]);
    lab.kill_in_pod(&format!("{SYSTEM}/{}", agent(lab, BARE)), &["agent"]).unwrap();
    says(lab, "an agent without a certificate", &["agents are ready on", "this node's certificate is missing"]);
    for (pod, family) in PODS.iter().flat_map(|pod| FAMILIES.map(|f| (pod, f))) {
        for name in ["api.example.com", "other.example.org"] {
            assert_eq!(source(lab, pod, family, name), None, "{pod} {family:?} {name}");
        }
    }
    let own = Some(node(lab, "node-1", Family::V4));
    assert_eq!(source(lab, "untouched/one", Family::V4, "other.example.org"), own);
    back(lab);
}

/// The agent's pod on a node.
fn agent(lab: &Lab, node: &str) -> String {
    let on = format!("spec.nodeName={node}");
    let pods = ["pods", "-n", SYSTEM, "-l", "app.kubernetes.io/component=agent", "--field-selector", &on];
    lab.object(&pods).unwrap()["items"][0]["metadata"]["name"].as_str().unwrap().to_owned()
}

/// Where a node has no BPF file system its agent mounts one for it: what is pinned outlives the agent's container.
fn without_bpffs(lab: &Lab) {
    assert_ne!(on_node(lab, BARE, &["stat", "-f", "-c", "%T", "/sys/fs/bpf"]), "bpf_fs");
    helm(lab, "--reset-values --wait --timeout 2m");
    assert_eq!(on_node(lab, BARE, &["stat", "-f", "-c", "%T", "/sys/fs/bpf"]), "bpf_fs");
    assert_ne!(on_node(lab, BARE, &["ls", "/sys/fs/bpf/tidegate"]), "");
}

/// An upgrade to an image that no node has does not go on: what runs goes on.
fn no_image(lab: &Lab) {
    helm(lab, "--set image.tag=9.9.9 --set image.pullPolicy=Never");
    says(lab, "no image", &["ErrImageNeverPull", "tidegate:9.9.9"]);
    enforced(lab, "no image");
    back(lab);
}

/// Agents with maps for which there is no memory: what their nodes held they hold, and new pods are closed.
fn too_little_memory(lab: &Lab) {
    helm(lab, "--set agent.config.capacities.facts=16777216 --set agent.resources.limits.memory=160Mi");
    says(lab, "too little memory", &["agents are ready on", "FACTS", "too little memory"]);
    // Of the node's agent there is none now.
    eager(lab, "eager-3", "node-1");
    for pod in PODS {
        assert_eq!(source(lab, pod, Family::V4, "other.example.org"), None, "{pod}");
    }
    back(lab);
}

/// A setting that the program does not know, as of a chart that is newer than the image.
fn an_unknown_setting(lab: &Lab) {
    let get = ["get", "configmap", "-n", SYSTEM, "tidegate-agent", "-o", "jsonpath={.data.agent\\.yaml}"];
    let text = lab.host_kubectl(&get, "").unwrap();
    let patch = json!({"data": {"agent.yaml": format!("{text}\nfromTheFuture: 1\n")}}).to_string();
    lab.host_kubectl(&["patch", "configmap", "-n", SYSTEM, "tidegate-agent", "--type=merge", "-p", &patch], "")
        .unwrap();
    typed(lab, &format!("kubectl rollout restart --namespace {SYSTEM} daemonset/tidegate-agent"));
    says(lab, "an unknown setting", &["`fromTheFuture`", "leave image.tag"]);
    for pod in PODS {
        assert_eq!(source(lab, pod, Family::V4, "other.example.org"), None, "{pod}");
    }
    let patch = json!({"data": {"agent.yaml": text}}).to_string();
    lab.host_kubectl(&["patch", "configmap", "-n", SYSTEM, "tidegate-agent", "--type=merge", "-p", &patch], "")
        .unwrap();
    typed(lab, &format!("kubectl rollout undo --namespace {SYSTEM} daemonset/tidegate-agent"));
    typed(lab, &format!("kubectl rollout status --timeout=2m --namespace {SYSTEM} daemonset/tidegate-agent"));
    enforced(lab, "without the unknown setting");
}

/// A pool whose addresses no gateway may hold: who is to leave with it leaves by no other way.
fn nobody_may_hold_the_pool(lab: &Lab) {
    let pool = json!({
        "apiVersion": "tidegate.dev/v1alpha1", "kind": "EgressPool", "metadata": {"name": "nowhere"},
        "spec": {
            "addressSource": "Static", "allowedNamespaces": {}, "gatewayNodeSelector": {"matchLabels": {"nobody": "has"}},
            "static": {"addresses": [{"ipv4": "203.0.113.99"}]},
        },
    });
    lab.host_kubectl(&["apply", "-f", "-"], &pool.to_string()).unwrap();
    typed(lab, "kubectl annotate namespace billing tidegate.dev/pool=nowhere tidegate.dev/allow=api.example.com");
    let condition = || {
        let pool = lab.object(&["egresspool", "nowhere"]).unwrap();
        let all = pool["status"]["conditions"].as_array().cloned().unwrap_or_default();
        all.into_iter().find(|c| c["type"] == "Programmed" && c["reason"] == "NoGateway")
    };
    let said = wait_for(SOON, condition).unwrap_or_else(|| panic!("{}", status(lab)));
    println!("a pool that nobody may hold: {said}");
    assert!(said["message"].as_str().unwrap().contains("203.0.113.99"), "{said}");
    // Nobody else asks for it now.
    let name = "api.example.com";
    let spec = lab.scenario().internet.names.iter().find(|n| n.name == name).unwrap();
    let (v4, v6): (IpAddr, IpAddr) = (spec.ipv4[0].into(), spec.ipv6[0].into());
    let watches = [v4, v6].map(|ip| lab.watch(ip, "").unwrap());
    let pinned = |pod: &str, family: Family| {
        let to = format!("{name}:443:{}", family.pick(v4, v6));
        curl(&lab.cluster_pod(pod), family, &format!("https://{name}/"), &["--resolve", &to]).source()
    };
    for family in FAMILIES {
        for name in [name, "other.example.org"] {
            assert_eq!(source(lab, "billing/one", family, name), None, "{family:?} {name}");
        }
        assert_eq!(pinned("billing/one", family), None, "{family:?}: without a name");
    }
    nothing(&watches, "of who leaves with a pool that nobody may hold");
    // The watches see what a pod of the same node sends.
    for (family, watch) in FAMILIES.into_iter().zip(&watches) {
        assert_eq!(pinned("untouched/one", family), Some(node(lab, "node-1", family)));
        assert!(watch.packets().unwrap() > 0, "{family:?}");
    }
    enforced(lab, "a pool that nobody may hold");
}
