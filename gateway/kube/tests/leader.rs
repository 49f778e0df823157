//! One leader writes statuses, against a real API server.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tidegate_kube::{Api, Cluster};
use tidegate_kubernetes::{Connection, Settings, Statuses, events, lease, status, taints};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use self::support::Proxy;

const TIMES: lease::Times =
    lease::Times { lease: Duration::from_secs(3), renew: Duration::from_secs(2), retry: Duration::from_millis(300) };
const GROUP: &str = "/apis/tidegate.dev/v1alpha1";

struct Test {
    api: Api,
    cluster: Cluster,
    runtime: Runtime,
}

/// A gateway that stands for election, writes statuses, and events.
struct Gateway {
    wanted: watch::Sender<Option<Arc<Statuses>>>,
    denials: mpsc::Sender<events::News>,
    leads: lease::Leads,
    stale: watch::Sender<bool>,
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Gateway {
    fn leads(&self) -> bool {
        lease::leads(&self.leads)
    }

    /// It dies, without a word.
    fn kill(&mut self) {
        self.tasks.drain(..).for_each(|t| t.abort());
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Test {
    fn new() -> Self {
        let cluster = Cluster::start().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let test = Self { api: cluster.api(), cluster, runtime };
        test.cluster.define().unwrap();
        test.api.make_namespace("shop").unwrap();
        soon("the resources", || test.get(&format!("{GROUP}/namespaceegresses")).is_some());
        test
    }

    fn kubectl(&self, args: &[&str], stdin: &str) -> String {
        self.cluster.kubectl(args, stdin).unwrap().success().unwrap()
    }

    fn get(&self, path: &str) -> Option<Value> {
        let answer = self.api.send("GET", path, &[], "").ok().filter(|a| a.status == 200)?;
        serde_json::from_str(&answer.body).ok()
    }

    fn policy(&self, name: &str) -> Value {
        self.get(&format!("{GROUP}/namespaces/shop/egresspolicies/{name}")).unwrap_or_default()
    }

    /// Patches of a kind's statuses that the API server was asked for, by its own count.
    fn patches(&self, resource: &str) -> u64 {
        let text = self.api.send("GET", "/metrics", &[], "").unwrap().body;
        let is = |l: &&str| {
            let has = |part: &str| l.contains(part);
            l.starts_with("apiserver_request_total{")
                && has(&format!("resource=\"{resource}\""))
                && has("subresource=\"status\"")
                && has("verb=\"PATCH\"")
        };
        text.lines().filter(is).map(|l| l.rsplit(' ').next().unwrap().parse::<f64>().unwrap() as u64).sum()
    }

    fn gateway(&self, name: &str) -> Gateway {
        self.gateway_by(name, self.cluster.kubeconfig())
    }

    fn gateway_by(&self, name: &str, kubeconfig: std::path::PathBuf) -> Gateway {
        let settings = Settings {
            kubeconfig: vec![kubeconfig],
            namespace: Some("default".into()),
            name: name.into(),
            ..Settings::default()
        };
        let connection = self.runtime.block_on(Connection::new(settings)).unwrap();
        let (wanted, wishes) = watch::channel(None);
        let (leads_tx, leads) = watch::channel(None);
        let (stale, is_stale) = watch::channel(false);
        let (stop, stopped) = watch::channel(false);
        let (denials, rx) = mpsc::channel(64);
        let tasks = vec![
            self.runtime.spawn(lease::stand(
                connection.clone(),
                "tidegate-gateway",
                TIMES,
                leads_tx,
                is_stale,
                stopped,
            )),
            self.runtime.spawn(status::write(connection.client.clone(), wishes, leads.clone())),
            self.runtime.spawn(events::write(connection, rx, leads.clone())),
        ];
        Gateway { wanted, denials, leads, stale, stop, tasks }
    }

    /// Makes policies; their names and UIDs.
    fn create_policies(&self, names: &[String]) -> Vec<(String, String)> {
        for name in names {
            let policy = json!({"apiVersion": "tidegate.dev/v1alpha1", "kind": "EgressPolicy",
                "metadata": {"name": name, "namespace": "shop"}, "spec": {"podSelector": {}}});
            let path = format!("{GROUP}/namespaces/shop/egresspolicies/{name}");
            self.api.apply(&path, &policy.to_string()).unwrap();
        }
        let list = self.get(&format!("{GROUP}/namespaces/shop/egresspolicies")).unwrap();
        let uid = |o: &Value| {
            let text = |k: &str| o["metadata"][k].as_str().unwrap().to_owned();
            (text("name"), text("uid"))
        };
        list["items"].as_array().unwrap().iter().map(uid).filter(|(n, _)| names.contains(n)).collect()
    }
}

fn soon(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(40);
    while !holds() {
        assert!(Instant::now() < deadline, "{what} does not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn policy_status(generation: i64, programmed: u32, of: u32) -> Value {
    let condition = |kind: &str, holds: bool, message: String| {
        let status = if holds { "True" } else { "False" };
        json!({"type": kind, "status": status, "reason": kind, "observedGeneration": generation, "message": message})
    };
    json!({
        "conditions": [
            condition("Accepted", true, "valid and in force".into()),
            condition("Programmed", programmed == of, format!("{programmed} of {of} nodes")),
        ],
        "nodes": {"desired": of, "programmed": programmed},
    })
}

fn wishes(policies: &[(String, String)], status: &Value) -> Option<Arc<Statuses>> {
    let one =
        |(name, uid): &(String, String)| status::wanted("EgressPolicy", "shop", name, uid, || status.clone(), None);
    Some(Arc::new(policies.iter().filter_map(one).collect()))
}

fn programmed(policy: &Value) -> &Value {
    &policy["status"]["nodes"]["programmed"]
}

/// The taint that keeps pods off until the node's agent enforces goes when it does, and nothing else of the node.
#[test]
fn the_leader_takes_the_startup_taint_off_nodes_that_enforce() {
    let test = Test::new();
    let taint = |key: &str| json!({"key": key, "effect": "NoSchedule"});
    let node = |name: &str| {
        let spec = json!({"taints": [taint("example.com/other"), taint(taints::TAINT)], "unschedulable": true});
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"a": "b"}}, "spec": spec})
            .to_string()
    };
    let taints_of = |name: &str| {
        let node = test.get(&format!("/api/v1/nodes/{name}")).unwrap();
        assert_eq!((&node["metadata"]["labels"]["a"], &node["spec"]["unschedulable"]), (&json!("b"), &json!(true)));
        let all = node["spec"]["taints"].as_array().unwrap().clone();
        // What the API server makes of `unschedulable`, where its admission does.
        all.into_iter()
            .map(|t| t["key"].as_str().unwrap().to_owned())
            .filter(|k| !k.starts_with("node."))
            .collect::<Vec<_>>()
    };
    let both = ["example.com/other", taints::TAINT];
    for name in ["n1", "n2"] {
        test.kubectl(&["create", "-f", "-"], &node(name));
    }
    let settings = Settings {
        kubeconfig: vec![test.cluster.kubeconfig()],
        namespace: Some("default".into()),
        name: "gw-a".into(),
        ..Settings::default()
    };
    let connection = test.runtime.block_on(Connection::new(settings)).unwrap();
    let (enforcing, nodes) = watch::channel(taints::Enforcing::default());
    let (leads, leading) = watch::channel(None);
    let task = test.runtime.spawn(taints::clear(connection, nodes, leading));
    let names = |all: &[&str]| Arc::new(all.iter().map(|n| (*n).to_owned()).collect());
    // Not by who does not lead.
    enforcing.send_replace(names(&["n1", "no-node"]));
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(taints_of("n1"), both);
    leads.send_replace(Some(tokio::time::Instant::now() + Duration::from_secs(300)));
    soon("the first node's taint goes", || taints_of("n1") == both[..1]);
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(taints_of("n2"), both, "its agent does not enforce");
    // A node that comes later, and one that is made anew.
    enforcing.send_replace(names(&["n1", "n2", "n3"]));
    test.kubectl(&["delete", "node", "n1"], "");
    for name in ["n1", "n3"] {
        test.kubectl(&["create", "-f", "-"], &node(name));
    }
    for name in ["n1", "n2", "n3"] {
        soon("its taint goes", || taints_of(name) == both[..1]);
    }
    task.abort();
}

#[test]
fn one_leads_and_another_takes_over_and_nothing_is_written_twice() {
    let test = Test::new();
    let policies = test.create_policies(&["a".into(), "b".into()]);
    let (a, b) = (test.gateway("gw-a"), test.gateway("gw-b"));
    soon("a leader", || a.leads() || b.leads());
    let (mut first, second) = if a.leads() { (a, b) } else { (b, a) };
    for g in [&first, &second] {
        g.wanted.send_replace(wishes(&policies, &policy_status(1, 3, 3)));
    }
    soon("the status", || programmed(&test.policy("b")) == 3 && programmed(&test.policy("a")) == 3);
    let before = test.policy("a");
    let time = before["status"]["conditions"][1]["lastTransitionTime"].as_str().unwrap().to_owned();
    assert_eq!(time.len(), 20, "{time}");
    assert_eq!(test.patches("egresspolicies"), 2);
    let lease = test.get("/apis/coordination.k8s.io/v1/namespaces/default/leases/tidegate-gateway").unwrap();
    assert_eq!(lease["spec"]["leaseTransitions"], 0);

    // It goes on leading, alone, and writes nothing that is said already.
    let until = Instant::now() + Duration::from_secs(4);
    while Instant::now() < until {
        assert!(first.leads() && !second.leads());
        first.wanted.send_replace(wishes(&policies, &policy_status(1, 3, 3)));
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(test.patches("egresspolicies"), 2);
    assert_eq!(test.policy("a")["metadata"]["resourceVersion"], before["metadata"]["resourceVersion"]);

    // It dies: the other one waits for its Lease to end, finds everything said, and says what is new.
    first.kill();
    let died = Instant::now();
    soon("another leader", || second.leads());
    let took = died.elapsed();
    assert!(took > Duration::from_secs(2) && took < Duration::from_secs(8), "{took:?}");
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(test.patches("egresspolicies"), 2);
    second.wanted.send_replace(wishes(&policies, &policy_status(2, 3, 3)));
    soon("news", || test.policy("a")["status"]["conditions"][0]["observedGeneration"] == 2);
    // Its status is the same, so it changed when it changed.
    assert_eq!(test.policy("a")["status"]["conditions"][1]["lastTransitionTime"], time.as_str());

    // One that is told to end gives it up: nobody waits.
    let third = test.gateway("gw-c");
    std::thread::sleep(Duration::from_millis(700));
    assert!(!third.leads());
    second.stop.send_replace(true);
    let told = Instant::now();
    soon("the next leader", || third.leads());
    assert!(told.elapsed() < Duration::from_secs(2), "{:?}", told.elapsed());
    assert!(!second.leads());

    // One that knows less than others writes nothing from then on, and neither keeps the Lease nor waits for it.
    let fourth = test.gateway("gw-d");
    std::thread::sleep(Duration::from_millis(700));
    assert!(third.leads() && !fourth.leads());
    third.wanted.send_replace(wishes(&policies, &policy_status(2, 3, 3)));
    third.stale.send_replace(true);
    let told = Instant::now();
    soon("the end of the stale one's lead", || !third.leads());
    assert!(told.elapsed() < Duration::from_millis(200), "{:?}", told.elapsed());
    third.wanted.send_replace(wishes(&policies, &policy_status(2, 1, 3)));
    soon("a leader that is not stale", || fourth.leads());
    assert!(told.elapsed() < Duration::from_secs(2), "{:?}", told.elapsed());
    fourth.stop.send_replace(true);
    std::thread::sleep(Duration::from_secs(2));
    assert!(!third.leads() && programmed(&test.policy("a")) == 3, "it stands back");
    // It has caught up: it stands again.
    third.stale.send_replace(false);
    soon("its lead", || third.leads());
    soon("what it wishes", || programmed(&test.policy("a")) == 1);
}

#[test]
fn many_changes_are_no_storm_and_an_outage_loses_nothing() {
    let test = Test::new();
    let names: Vec<String> = (0..200).map(|i| format!("p{i}")).collect();
    let policies = test.create_policies(&names);
    assert_eq!(policies.len(), 200);
    let gateway = test.gateway("gw-a");
    soon("a leader", || gateway.leads());
    let started = Instant::now();
    gateway.wanted.send_replace(wishes(&policies, &policy_status(1, 0, 3)));
    let mut samples = Vec::new();
    loop {
        let count = test.patches("egresspolicies");
        samples.push((started.elapsed(), count));
        if count >= 200 {
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(90), "{samples:?}");
        std::thread::sleep(Duration::from_millis(500));
    }
    for (at, count) in &samples {
        assert!(*count as f64 <= at.as_secs_f64() * 10.0 + 2.0, "{count} writes after {at:?}");
    }
    println!("200 statuses in {:.1} s", started.elapsed().as_secs_f64());

    // Away for a while, with two changes meanwhile: the newest is written, and once.
    test.cluster.stop_api_server();
    gateway.wanted.send_replace(wishes(&policies[..5], &policy_status(2, 1, 3)));
    std::thread::sleep(Duration::from_secs(3));
    gateway.wanted.send_replace(wishes(&policies[..5], &policy_status(3, 3, 3)));
    test.cluster.start_api_server().unwrap();
    let said = |i: usize| test.policy(&policies[i].0);
    soon("the newest content", || (0..5).all(|i| programmed(&said(i)) == 3));
    let patches = test.patches("egresspolicies");
    assert!(patches <= 6, "{patches}");
    assert_eq!(programmed(&said(5)), 0);
}

#[test]
fn a_write_that_gets_no_answer_ends_with_the_lead() {
    let test = Test::new();
    let policies = test.create_policies(&["a".into()]);
    let proxy = Proxy::start(&test.cluster);
    let gateway = test.gateway_by("gw-a", proxy.kubeconfig());
    soon("a leader", || gateway.leads());
    gateway.wanted.send_replace(wishes(&policies, &policy_status(1, 1, 3)));
    soon("the status", || programmed(&test.policy("a")) == 1);
    // What is written from now on goes nowhere.
    proxy.swallow();
    gateway.wanted.send_replace(wishes(&policies, &policy_status(2, 2, 3)));
    soon("the end of its lead", || !gateway.leads());
    proxy.forward_new();
    soon("its lead", || gateway.leads());
    let led = Instant::now();
    soon("the status", || programmed(&test.policy("a")) == 2);
    assert!(led.elapsed() < Duration::from_secs(6), "nothing of the former lead is waited for: {:?}", led.elapsed());
}

/// Egress addresses of a pool have moved, `own` to who says so.
fn moved_to(pool: &str, epoch: u64, own: bool) -> events::News {
    let about = events::About::Moved { pool: pool.into(), pair: "2001xdb8xx10".into(), epoch, own };
    events::News { namespace: events::CLUSTER.into(), about, note: "It moved.".into() }
}

#[test]
fn objects_come_and_go_and_pods_hear_of_denials() {
    let test = Test::new();
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"containers": [{"name": "c", "image": "i"}]}});
    test.kubectl(&["apply", "-f", "-"], &pod.to_string());
    test.api.make_namespace("old").unwrap();
    for name in ["tidegate", "somebodys"] {
        let kind = "apiVersion: tidegate.dev/v1alpha1\nkind: NamespaceEgress";
        test.kubectl(&["apply", "-f", "-"], &format!("{kind}\nmetadata: {{name: {name}, namespace: old}}\n"));
    }
    let policies = test.create_policies(&["a".into()]);

    let gateway = test.gateway("gw-a");
    soon("a leader", || gateway.leads());
    let namespace = |mode: &str, denied: u32| {
        json!({
            "conditions": [{"type": "Accepted", "status": "True", "reason": "Accepted", "message": "m"}],
            "isolation": "Isolated",
            "mode": mode,
            "denials": [{"lastTime": "2026-01-01T00:00:00Z", "count": denied, "pod": "web",
                "reason": "name-not-allowed", "verdict": "Denied", "name": "evil.example"}],
        })
    };
    let all = |mode: &str, denied: u32| {
        let mut all: Statuses = (*wishes(&policies, &policy_status(1, 1, 1)).unwrap()).clone();
        let status = namespace(mode, denied);
        all.extend(status::wanted("NamespaceEgress", "shop", "tidegate", "", || status, None));
        Some(Arc::new(all))
    };
    gateway.wanted.send_replace(all("Enforce", 1));
    let egress = |ns: &str, name: &str| test.get(&format!("{GROUP}/namespaces/{ns}/namespaceegresses/{name}"));
    soon("what is said of the namespace", || {
        egress("shop", "tidegate").is_some_and(|o| o["status"]["isolation"] == "Isolated")
    });
    soon("the end of what is not wanted", || egress("old", "tidegate").is_none());
    assert!(egress("old", "somebodys").is_some());

    // More denials alone may wait; that somebody deleted it is made good.
    let writes = test.patches("namespaceegresses");
    gateway.wanted.send_replace(all("Enforce", 2));
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(test.patches("namespaceegresses"), writes);
    test.kubectl(&["delete", "namespaceegress", "-n", "shop", "tidegate"], "");
    gateway.wanted.send_replace(all("Audit", 3));
    soon("it again", || egress("shop", "tidegate").is_some_and(|o| o["status"]["mode"] == "Audit"));

    // The end of an audit is an event in its namespace, once, whoever leads.
    use events::AuditEnd::{Day, Hour};
    for (end, until) in [(Day, 1_790_000_000), (Hour, 1_790_000_000), (Hour, 1_790_000_000), (Hour, 1_790_000_600)] {
        let about = events::About::Audit { end, until };
        let news = events::News { namespace: "shop".into(), about, note: "It ends.".into() };
        gateway.denials.blocking_send(news).unwrap();
    }
    let ends = || test.kubectl(&["events", "-n", "shop", "--for", "namespaceegress/tidegate"], "");
    soon("the audit's end", || ends().matches("AuditEnding").count() == 3);

    // So is a move of egress addresses, of a pool, which is in no namespace.
    let pool = json!({"apiVersion": "tidegate.dev/v1alpha1", "kind": "EgressPool", "metadata": {"name": "p"},
        "spec": {"allowedNamespaces": {}, "addressSource": "Static", "static": {"addresses": [{"ipv6": "2001:db8::10"}]}}});
    test.kubectl(&["apply", "-f", "-"], &pool.to_string());
    for (epoch, pool) in [(2, "p"), (2, "p"), (3, "p"), (3, "gone")] {
        gateway.denials.blocking_send(moved_to(pool, epoch, false)).unwrap();
    }
    let moved = || test.kubectl(&["describe", "egresspool", "p"], "");
    soon("the moves", || moved().matches("EgressMoved").count() == 2);
    // Who took them over says so without a lead, and nothing else.
    let follower = test.gateway("gw-b");
    for (epoch, own) in [(3, true), (4, false), (5, true)] {
        follower.denials.blocking_send(moved_to("p", epoch, own)).unwrap();
    }
    soon("the new owner's word", || moved().matches("EgressMoved").count() == 3);
    assert!(!follower.leads());
    drop(follower);

    // A policy that is deleted and made anew is another one.
    test.kubectl(&["delete", "egresspolicy", "-n", "shop", "a"], "");
    let again = test.create_policies(&["a".into()]);
    assert_ne!(again, policies);
    gateway.wanted.send_replace(wishes(&again, &policy_status(1, 1, 1)));
    soon("the new one's status", || programmed(&test.policy("a")) == 1);
    soon("no namespace that nobody wants", || egress("shop", "tidegate").is_none());

    let denial = |pod: &str, name: &str| events::News {
        namespace: "shop".into(),
        about: events::About::Denied { pod: pod.into(), what: name.into(), code: "name-not-allowed".into() },
        note: format!("The DNS query for {name} was denied: name-not-allowed."),
    };
    for name in ["evil.example", "evil.example", "other.example"] {
        gateway.denials.blocking_send(denial("web", name)).unwrap();
    }
    gateway.denials.blocking_send(denial("gone", "x")).unwrap();
    let describe = || test.kubectl(&["describe", "pod", "-n", "shop", "web"], "");
    let told = || describe().matches("EgressDenied").count();
    soon("events", || told() >= 2);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(told(), 2);
    println!("{}", describe());
    // What could not be written is said when it is denied again.
    test.cluster.stop_api_server();
    gateway.denials.blocking_send(denial("web", "late.example")).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    test.cluster.start_api_server().unwrap();
    soon("the event that could not be written", || {
        gateway.denials.blocking_send(denial("web", "late.example")).unwrap();
        told() == 3
    });
}
