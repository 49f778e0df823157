//! Upgrades and faults under steady traffic.

use std::time::Duration;

use serde_json::{Value, json};
use tidegate_lab::family::Family;
use tidegate_lab::lab::wait_for;
use tidegate_lab::probe::{curl, dig};
use tidegate_lab::story::POOL_A;
use tidegate_lab::{Lab, kubelet};

use crate::ground::{Ground, HANDED_OVER, MOVES, UNNOTICED, owner};
use crate::install::{SYSTEM, gateways, source, typed};
use crate::upgrades;

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

type Step = fn(&mut Lab, &mut Ground);

/// Everything, one after the other. `TIDEGATE_STEPS` names those that are tried alone.
const STEPS: &[(&str, Step)] = &[
    ("agents-killed", agents_killed),
    ("gateway-killed", gateway_killed),
    ("values", upgrades::of_values),
    ("version", upgrades::of_everything),
    ("services", services_restarted),
    ("api-server", api_server_away),
    ("coredns", names_of_the_cluster),
    ("cut-off", cut_off),
    // Its kubelet takes a while to notice that the API server is there again.
    ("rebooted", rebooted),
    ("replaced", replaced),
    ("gateway-rebooted", gateway_rebooted),
    ("drained", drained),
    ("all-gateways", all_gateways_away),
];

pub fn happen(lab: &mut Lab) {
    let only = std::env::var("TIDEGATE_STEPS").ok();
    let steps: Vec<_> =
        STEPS.iter().filter(|(name, _)| only.as_ref().is_none_or(|o| o.split(',').any(|n| n == *name))).collect();
    assert!(!steps.is_empty(), "{only:?} are no steps");
    eager(lab, "eager", json!({"nodeName": OFF.0}));
    let mut ground = Ground::new(lab);
    for (_, step) in steps {
        step(lab, &mut ground);
    }
    ground.finish(lab);
}

/// A pod of `shop` that never ceases to try what is denied, placed by this of its specification.
fn eager(lab: &Lab, name: &str, placed: Value) {
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "shop", "labels": {"app": "web"}},
        "spec": placed,
    });
    pod["spec"]["terminationGracePeriodSeconds"] = json!(0);
    pod["spec"]["containers"] = json!([{
        "name": "eager", "image": kubelet::CLIENT_IMAGE, "imagePullPolicy": "Never", "command": ["sh", "-c", EAGER],
    }]);
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
pub fn ready(lab: &Lab) {
    for what in ["deployment/tidegate-gateway", "daemonset/tidegate-agent"] {
        lab.host_kubectl(&["rollout", "status", "--timeout=120s", "--namespace", SYSTEM, what], "").unwrap();
    }
}

/// Kills the process of a pod's only container, and waits until it is ready again.
fn crash(lab: &Lab, pod: &str, argument: &str) {
    let before = container(lab, pod);
    lab.kill_in_pod(pod, &[argument]).unwrap();
    begins_again(lab, pod, &before);
}

/// What a pod's only container is at the moment.
fn container(lab: &Lab, pod: &str) -> Value {
    let (namespace, name) = pod.split_once('/').unwrap();
    let pod = lab.object(&["pod", "--namespace", namespace, name]).unwrap_or_default();
    pod["status"]["containerStatuses"][0].clone()
}

/// Waits until a pod's container is another one than before, and ready.
fn begins_again(lab: &Lab, pod: &str, before: &Value) {
    let back = || {
        let now = container(lab, pod);
        (now["containerID"] != before["containerID"] && now["ready"] == true).then_some(())
    };
    assert!(wait_for(BACK, back).is_some(), "{pod} does not come back: {:?}", container(lab, pod));
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

/// On the node of a gateway that is busy, and on one of pods with traffic.
fn services_restarted(lab: &mut Lab, ground: &mut Ground) {
    for service in ["containerd", "kubelet"] {
        let (_, at) = busy(lab);
        ground.step(lab, &format!("{service} restarted on {at} and {}", OFF.0), UNNOTICED, |lab| {
            for node in [&*at, OFF.0] {
                lab.kill_service(node, service).unwrap();
            }
            std::thread::sleep(AWAY);
            ready(lab);
        });
    }
}

/// For a minute, in which containerd of one worker and the kubelet of another are killed, too.
fn api_server_away(lab: &mut Lab, ground: &mut Ground) {
    let begun = std::time::Instant::now();
    let minute = Duration::from_secs(60);
    ground.step(lab, "API server away", UNNOTICED, |lab| {
        lab.stop_api_server().unwrap();
        std::thread::sleep(3 * AWAY);
    });
    ground.step(lab, "containerd and a kubelet restarted meanwhile", UNNOTICED, |lab| {
        for (node, service) in [("node-1", "containerd"), (OFF.0, "kubelet")] {
            lab.kill_service(node, service).unwrap();
        }
        std::thread::sleep(AWAY);
    });
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
        // Who led may be there, too: another one needs the Lease first, and then sees who is away.
        std::thread::sleep(4 * AWAY);
    });
    ground.step(lab, &format!("{at} back"), UNNOTICED, |lab| {
        lab.set_link(&at, true).unwrap();
        std::thread::sleep(AWAY);
    });
    ground.agent_was_away(&at);
}

fn drained(lab: &mut Lab, ground: &mut Ground) {
    let (_, at) = busy(lab);
    ground.step(lab, &format!("{at} drained"), HANDED_OVER, |lab| {
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

/// Its pods begin again with what the disk has, beside one that tries to get past the policy before there is an agent.
fn rebooted(lab: &mut Lab, ground: &mut Ground) {
    let (node, pods) = OFF;
    ground.step(lab, &format!("{node} rebooted"), UNNOTICED.without(pods), |lab| {
        let old: Vec<_> = pods.iter().map(|pod| lab.pod_processes(pod).unwrap()).collect();
        lab.switch_off(node).unwrap();
        // Until gateways have noticed.
        std::thread::sleep(AWAY);
        edit_waits_for(lab, node);
        lab.switch_on(node).unwrap();
        let begun = || {
            pods.iter()
                .zip(&old)
                .all(|(pod, old)| lab.pod_processes(pod).is_ok_and(|now| !now.is_empty() && now != *old))
        };
        assert!(wait_for(BACK, || begun().then_some(())).is_some(), "the pods do not come back");
        ready(lab);
        programmed(lab, "true");
    });
    ground.agent_was_away(node);
    ground.again(lab, pods);
    ground.step(lab, &format!("{node} is back"), UNNOTICED, |_| {});
}

/// Another machine takes the node's place: nothing of Tidegate is on its disk, and its kubelet registers with the startup taint. What the
/// scheduler has to place there waits until its agent enforces, and then tries to get past the policy; who tolerates the taint and is
/// untouched runs meanwhile.
fn replaced(lab: &mut Lab, ground: &mut Ground) {
    let (node, pods) = OFF;
    let what = format!("{node} replaced by a new machine");
    ground.step(lab, &what, UNNOTICED.without(pods), |lab| {
        lab.switch_off(node).unwrap();
        // Who takes nodes away does this, too: what names its node would begin before the agent.
        let on = format!("spec.nodeName={node}");
        lab.host_kubectl(&["delete", "pods", "-A", "--field-selector", &on, "--force", "--grace-period=0"], "")
            .unwrap();
        lab.replace(node, TAINT).unwrap();
        let at = json!({"kubernetes.io/hostname": node});
        // That the node is not ready yet, neither minds.
        let away = ["not-ready", "unreachable"]
            .map(|key| json!({"key": format!("node.kubernetes.io/{key}"), "operator": "Exists"}));
        eager(lab, "waits", json!({"nodeSelector": at, "tolerations": away}));
        lab.make_client("untouched/first", json!({"nodeSelector": at, "tolerations": [{"operator": "Exists"}]}))
            .unwrap();
        std::thread::sleep(AWAY / 2);
        assert!(placed(lab, "untouched/first") && !placed(lab, "shop/waits"), "nothing keeps pods off the node");
        lab.switch_on(node).unwrap();
        let reached = || source(lab, "untouched/first", Family::V4, "api.example.net");
        let seen = wait_for(BACK, reached).expect("an untouched pod has its way out");
        assert_eq!(seen, crate::install::node(lab, node, Family::V4));
        let placed = || placed(lab, "shop/waits").then_some(());
        let spec = || lab.object(&["node", node]).unwrap()["spec"].take();
        assert!(wait_for(BACK, placed).is_some(), "the startup taint stays: {}", spec());
        ready(lab);
        programmed(lab, "true");
        let again: Vec<_> = pods.iter().map(|pod| (*pod, node)).collect();
        lab.make_clients(&again).unwrap();
    });
    ground.again(lab, pods);
    ground.step(lab, &format!("what began on the new {node}"), UNNOTICED, |_| {});
}

/// Whether a pod has its node.
fn placed(lab: &Lab, pod: &str) -> bool {
    let (namespace, name) = pod.split_once('/').unwrap();
    lab.object(&["pod", "--namespace", namespace, name]).unwrap()["spec"]["nodeName"].is_string()
}

/// Waits until the status of what `annotated` allows says that all nodes have it, or that not all have; gives all conditions.
fn programmed(lab: &Lab, whether: &str) -> String {
    let of = ["--namespace", "annotated", "namespaceegress/tidegate"];
    let condition = format!("--for=condition=Programmed={whether}");
    lab.host_kubectl(&[&["wait", &condition, "--timeout=30s"], &of[..]].concat(), "").unwrap();
    lab.host_kubectl(&[&["get", "-o", "jsonpath={.status.conditions}"], &of[..]].concat(), "").unwrap()
}

/// An edit while a node is away: its status names the node.
fn edit_waits_for(lab: &Lab, node: &str) {
    let allow = "tidegate.dev/allow=api.example.com, later.example.com, 192.0.2.40:7000-7001/tcp, [2001:db8:200::40]:7000-7001/tcp";
    lab.host_kubectl(&["annotate", "--overwrite", "namespace", "annotated", allow], "").unwrap();
    let said = programmed(lab, "false");
    assert!(said.contains(&format!("the agent of {node} is not connected")), "{said}");
}

/// The node of a busy gateway, with its agent and all that its kernel knew: another gateway has its addresses meanwhile.
fn gateway_rebooted(lab: &mut Lab, ground: &mut Ground) {
    let (gateway, at) = busy(lab);
    let pod = format!("{SYSTEM}/{gateway}");
    ground.step(lab, &format!("{at}, a gateway's, rebooted"), MOVES, |lab| {
        let before = container(lab, &pod);
        lab.switch_off(&at).unwrap();
        std::thread::sleep(AWAY);
        lab.switch_on(&at).unwrap();
        begins_again(lab, &pod, &before);
        ready(lab);
    });
    ground.agent_was_away(&at);
}
