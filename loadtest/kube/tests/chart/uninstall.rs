//! `tidegate status --cluster` and the hook of `helm uninstall`: the real program, with the rights that the chart gives it,
//! against a real API server with the controllers of Deployments and DaemonSets. What kubelets do is done here.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tidegate_kube::{Api, Cluster, Output};

use crate::common::{NAMESPACE, chart, documents, find, helm, run, template, tidegate};

const GROUP: &str = "/apis/tidegate.dev/v1alpha1";
const NODES: [&str; 2] = ["node-1", "node-2"];

pub fn send(api: &Api, method: &str, path: &str, body: &Value) -> Value {
    let kind = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
    let answer = api.send(method, path, &[("Content-Type", kind)], &body.to_string()).unwrap();
    assert!(answer.status < 300, "{method} {path}: {} {}", answer.status, answer.body);
    serde_json::from_str(&answer.body).unwrap()
}

pub fn soon<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what} does not come");
        std::thread::sleep(Duration::from_millis(100));
    }
}

pub fn pods(api: &Api) -> Vec<Value> {
    let list = send(api, "GET", &format!("/api/v1/namespaces/{NAMESPACE}/pods"), &Value::Null);
    list["items"].as_array().unwrap().clone()
}

/// What scheduler and kubelets do: places pods, makes them ready, and lets go of those that are deleted.
pub fn kubelets(api: &Api, silent: Option<&str>) {
    for pod in pods(api) {
        let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/{}", pod["metadata"]["name"].as_str().unwrap());
        let terms = &pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
        let node = terms["nodeSelectorTerms"][0]["matchFields"][0]["values"][0].as_str().unwrap_or(NODES[0]);
        if Some(node) == silent {
            continue;
        }
        if pod["metadata"]["deletionTimestamp"].is_string() {
            let now = json!({"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0});
            api.send("DELETE", &path, &[("Content-Type", "application/json")], &now.to_string()).unwrap();
            continue;
        }
        if pod["spec"]["nodeName"].is_null() {
            let to = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod["metadata"]["name"]}, "target": {"kind": "Node", "name": node}});
            send(api, "POST", &format!("{path}/binding"), &to);
        }
        let condition = json!({"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"});
        let status = json!({"status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.9"}], "podIP": "10.0.0.9", "conditions": [condition]}});
        let answer = api.send(
            "PATCH",
            &format!("{path}/status"),
            &[("Content-Type", "application/merge-patch+json")],
            &status.to_string(),
        );
        assert!([200, 404, 409].contains(&answer.unwrap().status));
    }
}

/// The chart with so many gateways in a cluster with two nodes.
pub fn cluster(replicas: u32) -> (Cluster, tidegate_kube::Controllers, Api) {
    let cluster = Cluster::start().unwrap();
    let names = ["daemonset-controller", "deployment-controller", "disruption-controller", "replicaset-controller"];
    let controllers = cluster.start_controllers(&names).unwrap();
    let api = cluster.api();
    for node in NODES {
        let labels = json!({"kubernetes.io/os": "linux", "kubernetes.io/hostname": node});
        let object = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node, "labels": labels}});
        send(&api, "POST", "/api/v1/nodes", &object);
    }
    let chart = chart();
    let args = ["install", "tidegate", chart.to_str().unwrap(), "--namespace", NAMESPACE, "--create-namespace"];
    helm(Some(&cluster), &[&args[..], &["--set", &format!("gateway.replicas={replicas}")]].concat(), "")
        .success()
        .unwrap();
    let wait = ["wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"];
    cluster.kubectl(&wait, "").unwrap().success().unwrap();
    (cluster, controllers, api)
}

/// Creates the objects of a hook but its pod, as helm does, and a kubeconfig with the rights of its ServiceAccount.
fn hook(cluster: &Cluster, name: &str) -> (PathBuf, Vec<String>) {
    let all = documents(&template("", true).success().unwrap());
    let of_hook = |d: &&Value| d["metadata"]["name"] == name && !["Job", "Pod"].contains(&d["kind"].as_str().unwrap());
    let items: Vec<&Value> = all.iter().filter(of_hook).collect();
    assert!(items.len() >= 5, "{items:?}");
    let list = json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string();
    cluster.kubectl(&["apply", "--server-side", "-f", "-"], &list).unwrap().success().unwrap();
    let token = cluster.kubectl(&["create", "token", name, "-n", NAMESPACE], "").unwrap().success().unwrap();
    let admin = fs::read_to_string(cluster.kubeconfig()).unwrap();
    let (rest, _) = admin.split_once("users:").unwrap();
    let (_, contexts) = admin.split_once("contexts:").unwrap();
    let user = format!("users: [{{name: admin, user: {{token: {}}}}}]\ncontexts:{contexts}", token.trim());
    let path = cluster.folder().join(format!("kubeconfig-{name}"));
    fs::write(&path, format!("{rest}{user}")).unwrap();
    let pod = match name {
        "tidegate-test" => find(&all, "Pod", name)["spec"].clone(),
        _ => find(&all, "Job", name)["spec"]["template"]["spec"].clone(),
    };
    let args = pod["containers"][0]["args"].as_array().unwrap().iter().map(|a| a.as_str().unwrap().to_owned());
    (path, args.collect())
}

fn command(kubeconfig: &PathBuf, args: &[String]) -> Command {
    let mut command = Command::new(tidegate());
    command.args(args).arg("--kubeconfig").arg(kubeconfig);
    command
}

/// Lets kubelets work until a program has ended.
fn until_it_ends(api: &Api, mut child: Child, silent: Option<&str>) -> Output {
    let deadline = Instant::now() + Duration::from_secs(120);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
        }
        kubelets(api, silent);
        std::thread::sleep(Duration::from_millis(100));
    }
    let out = child.wait_with_output().unwrap();
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    Output { ok: out.status.success(), stdout: text(&out.stdout), stderr: text(&out.stderr) }
}

fn spawn(mut command: Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn status_says_what_is_there_and_whether_it_works() {
    let (cluster, _controllers, api) = cluster(1);
    let (kubeconfig, args) = hook(&cluster, "tidegate-test");
    let at_once: Vec<String> = args.iter().map(|a| if a == "120" { "0".into() } else { a.clone() }).collect();
    let out = run(&mut command(&kubeconfig, &at_once), "");
    assert!(!out.ok && out.stderr.contains("not ready: none of"), "{out}");

    let pool = json!({"apiVersion": "tidegate.dev/v1alpha1", "kind": "EgressPool", "metadata": {"name": "partner-a"},
        "spec": {"addressSource": "Static", "static": {"addresses": [{"ipv4": "203.0.113.10"}]}}});
    send(&api, "POST", &format!("{GROUP}/egresspools"), &pool);
    let status =
        json!({"status": {"addresses": [{"ipv4": "203.0.113.10", "owner": "gw-a", "epoch": 7, "namespaces": 2}]}});
    send(&api, "PATCH", &format!("{GROUP}/egresspools/partner-a/status"), &status);
    send(
        &api,
        "POST",
        "/api/v1/namespaces",
        &json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}),
    );
    let policy = json!({"apiVersion": "tidegate.dev/v1alpha1", "kind": "EgressPolicy", "metadata": {"name": "web"}, "spec": {"podSelector": {}}});
    send(&api, "POST", &format!("{GROUP}/namespaces/shop/egresspolicies"), &policy);

    // As `helm test` runs it: it waits until gateway and agents are ready.
    let out = until_it_ends(&api, spawn(command(&kubeconfig, &args)), None);
    assert!(out.ok, "{out}");
    for words in ["NODES  2 of 2 ready", "tidegate-gateway-", "203.0.113.10  gw-a   7", "egp shop/web"] {
        assert!(out.stdout.contains(words), "{words}: {out}");
    }
    let out = run(command(&kubeconfig, &at_once).args(["--output", "json"]), "");
    let all: Value = serde_json::from_str(&out.stdout).unwrap();
    assert_eq!(
        (&all["ready"], &all["nodes"], &all["forbidden"]),
        (&json!(true), &json!({"desired": 2, "ready": 2}), &json!([]))
    );
    assert_eq!(all["pools"][0]["pairs"][0]["owner"], "gw-a");
    // Somebody who may see less sees less, and is told.
    let (kubeconfig, _) = hook(&cluster, "tidegate-uninstall");
    let out = run(&mut command(&kubeconfig, &at_once), "");
    assert!(!out.ok && out.stdout.contains("you may not list egresspolicies"), "{out}");
}

#[test]
fn uninstall_cleans_nodes_ends_gateways_and_lets_pools_go() {
    let (cluster, _controllers, api) = cluster(1);
    for _ in 0..10 {
        kubelets(&api, None);
    }
    let agents = format!("/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets/tidegate-agent");
    soon("agents", || {
        kubelets(&api, None);
        (send(&api, "GET", &agents, &Value::Null)["status"]["numberReady"] == 2).then_some(())
    });
    let pool = |name: &str, finalizers: Value| {
        json!({"apiVersion": "tidegate.dev/v1alpha1", "kind": "EgressPool", "metadata": {"name": name, "finalizers": finalizers},
            "spec": {"addressSource": "PodNetwork"}})
    };
    send(
        &api,
        "POST",
        &format!("{GROUP}/egresspools"),
        &pool("a", json!(["tidegate.dev/in-use", "example.com/other"])),
    );
    send(&api, "POST", &format!("{GROUP}/egresspools"), &pool("b", json!([])));
    send(
        &api,
        "POST",
        "/api/v1/namespaces",
        &json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}),
    );
    let egress =
        json!({"apiVersion": "tidegate.dev/v1alpha1", "kind": "NamespaceEgress", "metadata": {"name": "tidegate"}});
    send(&api, "POST", &format!("{GROUP}/namespaces/shop/namespaceegresses"), &egress);

    // What gateways made has their label; what has it not was given to them.
    let made = json!({"app.kubernetes.io/part-of": "tidegate"});
    let object = |name: &str, labels: &Value| json!({"metadata": {"name": name, "labels": labels}});
    let core = format!("/api/v1/namespaces/{NAMESPACE}");
    let leases = format!("/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases");
    send(&api, "POST", &leases, &object("tidegate-gateway", &Value::Null));
    send(&api, "POST", &format!("{core}/configmaps"), &object("tidegate-trust", &made));
    send(&api, "POST", &format!("{core}/secrets"), &object("tidegate-ca", &Value::Null));

    // A node that does not answer does not hold up the rest.
    let (kubeconfig, args) = hook(&cluster, "tidegate-uninstall");
    let short: Vec<String> =
        args.iter().map(|a| if a == "--timeout=300" { "--timeout=5".into() } else { a.clone() }).collect();
    let out = until_it_ends(&api, spawn(command(&kubeconfig, &short)), Some(NODES[1]));
    assert!(out.ok && out.stdout.contains("1 of 2 nodes") && out.stderr.contains("keep enforcing"), "{out}");

    let left = |path: &str| api.send("GET", path, &[], "").unwrap().status == 200;
    assert!(!left(&format!("{leases}/tidegate-gateway")) && !left(&format!("{core}/configmaps/tidegate-trust")));
    assert!(left(&format!("{core}/secrets/tidegate-ca")), "somebody's own");
    send(&api, "PATCH", &format!("{core}/secrets/tidegate-ca"), &json!({"metadata": {"labels": made}}));

    // Again, and now it does.
    let out = until_it_ends(&api, spawn(command(&kubeconfig, &args)), None);
    assert!(out.ok && out.stdout.contains("2 of 2 nodes"), "{out}");
    assert!(!left(&format!("{core}/secrets/tidegate-ca")), "the gateways' own");
    let spec = &send(&api, "GET", &agents, &Value::Null)["spec"]["template"]["spec"];
    let clean_up = &spec["initContainers"][0];
    let pins = "/sys/fs/bpf/tidegate-gateway";
    let args: Vec<&str> = clean_up["args"].as_array().unwrap().iter().map(|a| a.as_str().unwrap()).collect();
    let once_more = ["agent", "--config", "/etc/tidegate/agent.yaml", "--cleanup", "--gateways", pins];
    assert_eq!(args[..6], once_more, "after the gateways have ended");
    // What kubelets have made for the pods is seen from the folder above.
    let volumes = spec["volumes"].as_array().unwrap();
    let folders: Vec<String> = args[6..]
        .chunks(2)
        .map(|folder| {
            let (at, name) = folder[1].rsplit_once('/').unwrap();
            let mount = clean_up["volumeMounts"].as_array().unwrap().iter().find(|m| m["mountPath"] == at).unwrap();
            let volume = volumes.iter().find(|v| v["name"] == mount["name"]).unwrap();
            assert_eq!(folder[0], "--folder");
            format!("{}/{name}", volume["hostPath"]["path"].as_str().unwrap())
        })
        .collect();
    assert_eq!(folders, ["/run/tidegate", "/var/lib/tidegate"]);
    assert_eq!(clean_up["securityContext"]["privileged"], true);
    assert_eq!(spec["containers"][0]["args"], json!(["infinity"]));
    // The program knows what it is told.
    assert!(run(Command::new(tidegate()).args(args).arg("--help"), "").ok);
    let gateways =
        send(&api, "GET", &format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments/tidegate-gateway"), &Value::Null);
    assert_eq!((&gateways["spec"]["replicas"], &gateways["status"]["replicas"]), (&json!(0), &Value::Null));
    let a = send(&api, "GET", &format!("{GROUP}/egresspools/a"), &Value::Null);
    assert_eq!(a["metadata"]["finalizers"], json!(["example.com/other"]), "only ours goes");
    let left = send(&api, "GET", &format!("{GROUP}/namespaceegresses"), &Value::Null);
    assert_eq!(left["items"], json!([]));
    let policies = cluster.kubectl(&["get", "crd", "egresspools.tidegate.dev"], "").unwrap();
    assert!(policies.ok, "definitions stay");
    // What the hook's ServiceAccount may not.
    let out = cluster.kubectl(
        &[
            "auth",
            "can-i",
            "delete",
            "egresspools.tidegate.dev",
            "--as",
            &format!("system:serviceaccount:{NAMESPACE}:tidegate-uninstall"),
        ],
        "",
    );
    assert!(!out.unwrap().ok);
}
