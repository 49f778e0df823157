//! Upgrades and faults under steady traffic.

use std::time::Duration;

use serde_json::json;
use tidegate_lab::family::Family;
use tidegate_lab::lab::wait_for;
use tidegate_lab::probe::{curl, dig};
use tidegate_lab::story::POOL_A;
use tidegate_lab::{Lab, kubelet};

use crate::ground::{Ground, MOVES, UNNOTICED, owner};
use crate::install::{SYSTEM, gateways, typed};

/// How long a cluster may take to be as before.
const BACK: Duration = Duration::from_secs(90);
/// How long a part of it is away.
const AWAY: Duration = Duration::from_secs(6);
/// With what nodes register that are new.
const TAINT: &str = "tidegate.dev/agent-not-ready";
/// The node that is switched off, and the pods with traffic on it.
const OFF: (&str, &[&str]) = ("node-2", &["shop/node-2", "annotated/client"]);

/// Tries to get past the policy from its first instruction on.
const EAGER: &str = r"
while :; do
    for to in 198.51.100.14 [2001:db8:100::14]; do
        echo | socat -t0 - UDP:$to:7001
        timeout 0.2 socat -u /dev/null TCP:$to:443
    done
    sleep 0.2
done";

/// Installs the chart, with gateways on the nodes that are labelled so.
pub fn install(lab: &Lab) {
    typed(
        lab,
        &format!(
            "helm install tidegate helm/tidegate --namespace {SYSTEM} --create-namespace --wait \
             --set gateway.config.drainSeconds=5 --set agent.startupTaint=true --set-string 'gateway.nodeSelector.tidegate\\.dev/gateway=true'"
        ),
    );
}

/// Everything, one after the other.
pub fn happen(lab: &mut Lab) {
    eager(lab);
    let mut ground = Ground::new(lab);
    agents_killed(lab, &mut ground);
    gateway_killed(lab, &mut ground);
    upgraded(lab, &mut ground);
    api_server_away(lab, &mut ground);
    names_of_the_cluster(lab, &mut ground);
    cut_off(lab, &mut ground);
    // Its kubelet takes a while to notice that the API server is there again.
    rebooted(lab, &mut ground);
    drained(lab, &mut ground);
    all_gateways_away(lab, &mut ground);
    ground.finish();
}

/// A pod that never ceases to try what is denied, on the node that is switched off.
fn eager(lab: &Lab) {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "eager", "namespace": "shop", "labels": {"app": "web"}},
        "spec": {
            "nodeName": OFF.0, "terminationGracePeriodSeconds": 0,
            "containers": [{
                "name": "eager", "image": kubelet::CLIENT_IMAGE, "imagePullPolicy": "Never", "command": ["sh", "-c", EAGER],
            }],
        },
    });
    lab.host_kubectl(&["apply", "-f", "-"], &pod.to_string()).unwrap();
}

/// The pod of an agent on a node.
fn agent(lab: &Lab, node: &str) -> String {
    let (label, on) = ("app.kubernetes.io/component=agent", format!("spec.nodeName={node},status.phase=Running"));
    let pods = lab.object(&["pods", "--namespace", SYSTEM, "-l", label, "--field-selector", &on]).unwrap();
    format!("{SYSTEM}/{}", pods["items"][0]["metadata"]["name"].as_str().unwrap())
}

/// The gateway that owns the shop's pool, and its node.
fn busy(lab: &Lab) -> (String, String) {
    let (gateway, _) = owner(lab, POOL_A).unwrap();
    let node = gateways(lab)[&gateway].clone();
    (gateway, node)
}

/// Waits until everything that the chart makes is there and ready.
fn ready(lab: &Lab) {
    for what in ["deployment/tidegate-gateway", "daemonset/tidegate-agent"] {
        lab.host_kubectl(&["rollout", "status", "--timeout=120s", "--namespace", SYSTEM, what], "").unwrap();
    }
}

/// Kills the process of a pod's only container, and waits until it is ready again.
fn crash(lab: &Lab, pod: &str, argument: &str) {
    let (namespace, name) = pod.split_once('/').unwrap();
    let state =
        || Some(lab.object(&["pod", "--namespace", namespace, name]).ok()?["status"]["containerStatuses"][0].take());
    let restarts = |state: &serde_json::Value| state["restartCount"].as_u64().unwrap_or_default();
    let before = restarts(&state().unwrap());
    lab.kill_in_pod(pod, &[argument]).unwrap();
    let back = || state().filter(|s| restarts(s) > before && s["ready"] == true);
    assert!(wait_for(BACK, back).is_some(), "{pod} does not come back: {:?}", state());
}

/// A worker's is away unnoticed. Without one of its own node a gateway holds no address: after two seconds another one does.
fn agents_killed(lab: &mut Lab, ground: &mut Ground) {
    for (at, expected) in [("node-1", UNNOTICED), (&busy(lab).1, MOVES)] {
        let pod = agent(lab, at);
        ground.step(lab, &format!("agent of {at} killed"), expected, |lab| crash(lab, &pod, "agent"));
    }
}

/// Its container is started again at once: whoever is sooner goes on.
fn gateway_killed(lab: &mut Lab, ground: &mut Ground) {
    let pod = format!("{SYSTEM}/{}", busy(lab).0);
    ground.step(lab, "gateway killed", MOVES, |lab| crash(lab, &pod, "gateway"));
}

fn upgraded(lab: &mut Lab, ground: &mut Ground) {
    let upgrade = |lab: &mut Lab, values: &str| {
        typed(lab, &format!("helm upgrade tidegate helm/tidegate --namespace {SYSTEM} --reuse-values --wait {values}"));
        ready(lab);
    };
    ground.step(lab, "agents upgraded", MOVES, |lab| upgrade(lab, "--set agent.config.fullPassSeconds=20"));
    let before: Vec<String> = gateways(lab).into_keys().collect();
    ground.step(lab, "gateways upgraded", MOVES, |lab| upgrade(lab, "--set gateway.config.fullPassSeconds=20"));
    assert!(gateways(lab).keys().all(|g| !before.contains(g)), "{before:?}");
    moves_are_told(lab);
}

/// Whoever looks at the pool sees who left it to whom.
fn moves_are_told(lab: &Lab) {
    let now = owner(lab, POOL_A).unwrap();
    let said = || {
        let events = lab.object(&["events", "--field-selector", "reason=EgressMoved"]).ok()?;
        let to = format!("to {}, epoch {}", now.0, now.1);
        events["items"].as_array()?.iter().any(|e| e["message"].as_str().is_some_and(|m| m.contains(&to))).then_some(())
    };
    assert!(wait_for(BACK, said).is_some(), "no event says that {now:?} has the pool");
}

/// For a minute, in which containerd and kubelet of a worker are killed, too.
fn api_server_away(lab: &mut Lab, ground: &mut Ground) {
    let begun = std::time::Instant::now();
    let minute = Duration::from_secs(60);
    ground.step(lab, "API server away", UNNOTICED, |lab| {
        lab.stop_api_server().unwrap();
        std::thread::sleep(3 * AWAY);
    });
    for service in ["containerd", "kubelet"] {
        ground.step(lab, &format!("{service} restarted meanwhile"), UNNOTICED, |lab| {
            lab.kill_service("node-1", service).unwrap();
            std::thread::sleep(AWAY);
        });
    }
    ground.step(lab, "API server back", UNNOTICED, |lab| {
        std::thread::sleep(minute.saturating_sub(begun.elapsed()));
        lab.start_api_server().unwrap();
        ready(lab);
    });
}

/// All of CoreDNS ends at the same time.
fn names_of_the_cluster(lab: &mut Lab, ground: &mut Ground) {
    let pods = lab.object(&["pods", "--namespace", "kube-system", "-l", "k8s-app=kube-dns"]).unwrap();
    let pods = pods["items"].as_array().unwrap().clone();
    ground.step(lab, "CoreDNS restarted", UNNOTICED, |lab| {
        for pod in &pods {
            crash(lab, &format!("kube-system/{}", pod["metadata"]["name"].as_str().unwrap()), "/coredns");
        }
    });
}

fn cut_off(lab: &mut Lab, ground: &mut Ground) {
    let (_, at) = busy(lab);
    ground.step(lab, &format!("{at} cut off"), MOVES, |lab| {
        lab.set_link(&at, false).unwrap();
        std::thread::sleep(AWAY);
    });
    ground.step(lab, &format!("{at} back"), UNNOTICED, |lab| {
        lab.set_link(&at, true).unwrap();
        std::thread::sleep(AWAY);
    });
}

fn drained(lab: &mut Lab, ground: &mut Ground) {
    let (_, at) = busy(lab);
    ground.step(lab, &format!("{at} drained"), MOVES, |lab| {
        let drain = ["drain", &at, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=60s"];
        lab.host_kubectl(&drain, "").unwrap();
    });
    ground.step(lab, &format!("{at} uncordoned"), UNNOTICED, |lab| {
        lab.host_kubectl(&["uncordon", &at], "").unwrap();
        ready(lab);
    });
}

/// All of them are killed at once; then there is none for so long that DNS servers know it, and there are new ones.
fn all_gateways_away(lab: &mut Lab, ground: &mut Ground) {
    let some_ready = |lab: &Lab| {
        let get = ["deployment", "--namespace", SYSTEM, "tidegate-gateway"];
        let ready = || (lab.object(&get).ok()?["status"]["readyReplicas"].as_u64()? > 0).then_some(());
        assert!(wait_for(BACK, ready).is_some(), "no gateway is ready");
    };
    ground.outage(lab, "all gateways killed", |lab| {
        for gateway in gateways(lab).keys() {
            lab.kill_in_pod(&format!("{SYSTEM}/{gateway}"), &["gateway"]).unwrap();
        }
        // Until kubelets have noticed.
        std::thread::sleep(Duration::from_secs(2));
        some_ready(lab);
    });
    ready(lab);
    let scale = |lab: &Lab, replicas: &str| {
        let scale = ["scale", "--namespace", SYSTEM, "deployment/tidegate-gateway", "--replicas", replicas];
        lab.host_kubectl(&scale, "").unwrap();
    };
    ground.outage(lab, "all gateways gone and back", |lab| {
        scale(lab, "0");
        assert!(wait_for(BACK, || gateways(lab).is_empty().then_some(())).is_some(), "{:?}", gateways(lab));
        // Of two DNS servers each has forgotten the old addresses, and remembers that there are none.
        let name = format!("tidegate-gateway.{SYSTEM}.svc.cluster.local");
        let knows = || dig(&lab.pod("untouched/client"), &name, "A", &[]).answers.is_empty();
        assert!(wait_for(BACK, || (0..8).all(|_| knows()).then_some(())).is_some(), "{name} has addresses");
        for pod in ["shop/node-2", "annotated/client", "untouched/client"] {
            let seen = curl(&lab.cluster_pod(pod), Family::V4, "https://kubernetes.default/version", &["--insecure"]);
            assert!(seen.body["gitVersion"].is_string(), "{pod} does not reach a Service by its name: {}", seen.text());
        }
        scale(lab, "2");
        some_ready(lab);
    });
    ready(lab);
}

/// A pod that the scheduler has to place on the node, which is not yet fit for it.
fn waits_for_its_node(lab: &Lab, node: &str) {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "waits", "namespace": "shop", "labels": {"app": "web"}},
        "spec": {
            "nodeSelector": {"kubernetes.io/hostname": node}, "terminationGracePeriodSeconds": 0,
            // That the node is away, it does not mind.
            "tolerations": [{"key": "node.kubernetes.io/unreachable", "operator": "Exists"}, {"key": "node.kubernetes.io/not-ready", "operator": "Exists"}],
            "containers": [{"name": "client", "image": kubelet::CLIENT_IMAGE, "imagePullPolicy": "Never"}],
        },
    });
    lab.host_kubectl(&["apply", "-f", "-"], &pod.to_string()).unwrap();
    std::thread::sleep(AWAY / 2);
    assert!(!placed(lab), "nothing keeps pods off the node");
}

fn placed(lab: &Lab) -> bool {
    lab.object(&["pod", "--namespace", "shop", "waits"]).unwrap()["spec"]["nodeName"].is_string()
}

/// Its pods begin again with what the disk has, beside one that tries to get past the policy before there is an agent. As a node that is
/// new it has the startup taint: what the scheduler has to place waits until its agent enforces.
fn rebooted(lab: &mut Lab, ground: &mut Ground) {
    let (node, pods) = OFF;
    ground.step(lab, &format!("{node} rebooted"), UNNOTICED.without(pods), |lab| {
        let old: Vec<_> = pods.iter().map(|pod| lab.pod_processes(pod).unwrap()).collect();
        lab.switch_off(node).unwrap();
        // Until gateways have noticed: a node that is new was never connected.
        std::thread::sleep(AWAY);
        lab.host_kubectl(&["taint", "node", node, &format!("{TAINT}=:NoSchedule")], "").unwrap();
        waits_for_its_node(lab, node);
        lab.switch_on(node).unwrap();
        let begun = || {
            pods.iter()
                .zip(&old)
                .all(|(pod, old)| lab.pod_processes(pod).is_ok_and(|now| !now.is_empty() && now != *old))
        };
        assert!(wait_for(BACK, || begun().then_some(())).is_some(), "the pods do not come back");
        let placed = || placed(lab).then_some(());
        assert!(
            wait_for(BACK, placed).is_some(),
            "the startup taint stays: {}",
            lab.object(&["node", node]).unwrap()["spec"]
        );
        ready(lab);
    });
    ground.again(lab, pods);
    ground.step(lab, &format!("{node} is back"), UNNOTICED, |_| {});
}
