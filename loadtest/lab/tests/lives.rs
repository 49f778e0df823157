//! What namespaces, policies and pods live through while traffic goes on: kubectl against a real API server, real packets.
//!
//! One lab serves all tests of this file, one after another; each leaves the objects as it found them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tidegate_lab::family::{FAMILIES, Family};
use tidegate_lab::kube::{Guest, Kubernetes};
use tidegate_lab::lab::wait_for;
use tidegate_lab::observe::Watch;
use tidegate_lab::probe::{Dig, Echo, Knock, curl, dig, knock};
use tidegate_lab::story::{POOL_A, POOL_B, named, of};
use tidegate_lab::{Lab, Options, Scenario};

/// How soon a change holds everywhere, on a busy machine.
const SOON: Duration = Duration::from_secs(8);
/// How long what passed in audit goes on when the audit has ended.
const DRAIN: Duration = Duration::from_secs(30);

static LAB: Mutex<Option<Lab>> = Mutex::new(None);

/// Runs a test in the lab that all share.
#[track_caller]
fn with(test: impl FnOnce(&Lab)) {
    let mut shared: MutexGuard<'static, Option<Lab>> = LAB.lock().unwrap_or_else(PoisonError::into_inner);
    let lab = shared.get_or_insert_with(|| {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/demo.yaml");
        let mut scenario = Scenario::load(path.as_ref()).unwrap().with_kubernetes().unwrap();
        // Empties namespaces that are deleted.
        scenario.kubernetes =
            Some(Kubernetes { controllers: vec!["namespace-controller".into()], ..Kubernetes::default() });
        let options = Options { lab: Some(env!("CARGO_BIN_EXE_tidegate-lab").into()), ..Options::unique("lives") };
        Lab::up_guarded(scenario, &options).unwrap()
    });
    test(lab);
}

fn named_http(family: Family) -> SocketAddr {
    named(family, 14, 8080)
}

/// The address of a pod's node: what the world sees of a pod that nothing touches.
fn node_of(lab: &Lab, pod: &str, family: Family) -> IpAddr {
    let node = lab.scenario().node(&lab.scenario().pod(pod).unwrap().node).unwrap();
    family.pick(node.ipv4.into(), node.ipv6.into())
}

fn addresses(lab: &Lab, pod: &str) -> Vec<IpAddr> {
    lab.scenario().pod(pod).unwrap().addresses()
}

#[track_caller]
fn soon(what: &str, holds: impl Fn() -> bool) {
    assert!(wait_for(SOON, || holds().then_some(())).is_some(), "{what} does not come");
}

fn ask(lab: &Lab, pod: &str, family: Family, name: &str) -> Dig {
    dig(&lab.pod(pod), name, family.record(), &[])
}

/// Whom a server saw; `None` when the pod did not get there.
fn seen(lab: &Lab, pod: &str, family: Family, name: &str) -> Option<IpAddr> {
    curl(&lab.pod(pod), family, &format!("https://{name}/"), &[]).source()
}

/// A live connection of a pod that is forwarded.
#[track_caller]
fn live(lab: &Lab, pod: &str, family: Family) -> Echo {
    let found = wait_for(SOON, || {
        ask(lab, pod, family, "tcp.example.com");
        Echo::connect(&lab.pod(pod), named(family, 12, 7000)).ok()
    });
    found.unwrap_or_else(|| panic!("{pod} cannot reach tcp.example.com"))
}

/// Whether a connection is cut within a few seconds.
fn is_cut(echo: &mut Echo) -> bool {
    echo.patience(Duration::from_millis(500)).unwrap();
    wait_for(SOON, || echo.say("still here?\n").is_err().then_some(())).is_some()
}

/// Talks until nobody answers; when that was said to which no answer came. `None` if there is one until then.
fn lives_until(mut echo: Echo, end: Instant) -> Option<Instant> {
    while Instant::now() < end {
        let said = Instant::now();
        if echo.say("still here?\n").is_err() {
            return Some(said);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    None
}

/// The pod is in nobody's way: the world sees its node.
#[track_caller]
fn untouched(lab: &Lab, pod: &str) {
    for family in FAMILIES {
        let node = node_of(lab, pod, family);
        soon(&format!("{pod} untouched, {family:?}"), || seen(lab, pod, family, "other.example.org") == Some(node));
    }
}

/// The pod may not go to what no rule allows: its DNS says so, and its node's kernel.
#[track_caller]
fn isolated(lab: &Lab, pod: &str) {
    for family in FAMILIES {
        soon(&format!("{pod} isolated, {family:?}"), || ask(lab, pod, family, "other.example.org").is_denied());
        let silent = || knock(&lab.pod(pod), named(family, 14, 443)).unwrap() == Knock::Silent;
        soon(&format!("{pod} isolated by its node, {family:?}"), silent);
    }
}

#[test]
fn annotations_come_change_and_go() {
    with(|lab| {
        let pod = "untouched/app";
        untouched(lab, pod);
        let backend = addresses(lab, "untouched/backend");
        // What is inside the cluster is nobody's business, whatever happens.
        let mut inside: Vec<Echo> =
            backend.iter().map(|ip| Echo::connect(&lab.pod(pod), SocketAddr::new(*ip, 7000)).unwrap()).collect();
        let tcp = "tcp.example.com:7000/tcp-unchecked";

        let allow = |what: &str| lab.annotate("untouched", &[("tidegate.dev/allow", what)]).unwrap();
        allow(&format!("api.example.com, {tcp}"));
        isolated(lab, pod);
        let gateways = |family| ["gw-a", "gw-b"].map(|g| node_of(lab, g, family));
        let mut outside = Vec::new();
        for family in FAMILIES {
            let source = seen(lab, pod, family, "api.example.com").unwrap();
            assert!(gateways(family).contains(&source), "{source}");
            outside.push(live(lab, pod, family));
        }

        allow(&format!("www.example.com, {tcp}"));
        for family in FAMILIES {
            soon("another name", || seen(lab, pod, family, "www.example.com").is_some());
            soon("the first name's end", || ask(lab, pod, family, "api.example.com").is_denied());
        }
        for echo in &mut outside {
            echo.say("what the change does not touch goes on\n").unwrap();
        }

        allow("www.example.com");
        for echo in &mut outside {
            assert!(is_cut(echo), "its rule is gone");
        }
        // What is too long to be read allows nothing, and isolates all the same.
        allow(&format!("www.example.com, {}", "a.example.net, ".repeat(1200)));
        soon("the end of what was too long", || ask(lab, pod, Family::V4, "www.example.com").is_denied());
        isolated(lab, pod);
        lab.annotate("untouched", &[]).unwrap();
        untouched(lab, pod);
        for echo in &mut inside {
            echo.say("still here\n").unwrap();
        }
    });
}

/// Each state means something to flows: those inside the cluster live through all, what leaves the cluster is cut when the
/// namespace is isolated, and what passed in audit goes on until it has drained.
#[test]
fn a_namespace_goes_through_every_state_and_back() {
    with(|lab| {
        let pod = "untouched/app";
        // Allowed by nobody.
        let outside = |family| Echo::connect(&lab.pod(pod), named(family, 14, 7000)).unwrap();
        untouched(lab, pod);
        let backend = addresses(lab, "untouched/backend");
        let mut inside: Vec<Echo> =
            backend.iter().map(|ip| Echo::connect(&lab.pod(pod), SocketAddr::new(*ip, 7000)).unwrap()).collect();
        let mut goes_on = |state: &str| inside.iter_mut().for_each(|e| e.say(state).unwrap());
        let mut early: Vec<Echo> = FAMILIES.map(outside).into();
        // Guarded: a policy of the platform, which denies and isolates nobody.
        lab.kubectl(&["label", "namespace", "untouched", "guard=yes"]).unwrap();
        for family in FAMILIES {
            let denied = || ask(lab, pod, family, "secret.example.org").answers.is_empty();
            soon("the guard", denied);
            assert_eq!(seen(lab, pod, family, "other.example.org"), Some(node_of(lab, pod, family)));
        }
        goes_on("guarded");
        early.iter_mut().for_each(|e| e.say("guarded").unwrap());
        let [managed, allow] = [("tidegate.dev/managed", "true"), ("tidegate.dev/allow", "api.example.com")];
        lab.annotate("untouched", &[managed, allow]).unwrap();
        isolated(lab, pod);
        for family in FAMILIES {
            assert!(seen(lab, pod, family, "api.example.com").is_some());
        }
        goes_on("isolated");
        assert!(early.iter_mut().all(is_cut), "it was opened before, to what is not allowed");
        let mark = lab.mark();
        lab.annotate("untouched", &[managed, allow, ("tidegate.dev/mode", "audit")]).unwrap();
        untouched(lab, pod);
        let told = |r: &Value| r["namespace"] == "untouched" && r["verdict"] == "audit";
        assert!(lab.wait_audit(&["gw-a", "gw-b"], &mark, told).is_some(), "audit says what would be denied");
        goes_on("audited");
        let audited = FAMILIES.map(outside);
        let flip = Instant::now();
        lab.annotate("untouched", &[managed, allow]).unwrap();
        std::thread::scope(|scope| {
            let ends = audited.map(|echo| scope.spawn(move || lives_until(echo, flip + DRAIN + SOON)));
            // The drain begins when the pod's node is told, within SOON.
            isolated(lab, pod);
            for end in ends {
                let after = end.join().unwrap().map(|at| at.duration_since(flip));
                println!("what passed in audit went on for {after:?} after the flip");
                // The node counts whole seconds.
                let drains = after.is_some_and(|a| a >= DRAIN - Duration::from_secs(1));
                assert!(drains, "it is cut when it has drained, not sooner: {after:?}");
            }
        });
        goes_on("enforced");
        lab.annotate("untouched", &[]).unwrap();
        lab.kubectl(&["label", "namespace", "untouched", "guard-"]).unwrap();
        untouched(lab, pod);
        soon("the guard's end", || !ask(lab, pod, Family::V4, "secret.example.org").answers.is_empty());
        goes_on("untouched");
    });
}

#[test]
fn policies_are_deleted_and_made_again() {
    with(|lab| {
        let pod = "shop/web";
        let mut others: Vec<Echo> = FAMILIES.iter().map(|f| live(lab, "billing/pay", *f)).collect();
        let mut own: Vec<Echo> = FAMILIES.iter().map(|f| live(lab, pod, *f)).collect();
        lab.kubectl(&["delete", "egresspolicies", "--all", "-n", "shop"]).unwrap();
        // No policy selects it any more; the platform's own still guard it.
        untouched(lab, pod);
        assert!(ask(lab, pod, Family::V4, "blocked.example.com").answers.is_empty());
        for echo in &mut own {
            assert!(is_cut(echo), "it had the pool's address");
        }
        for file in ["shop.yaml", "shop-revocable.yaml"] {
            lab.edit_manifest(file, &lab.manifest(file).unwrap()).unwrap();
        }
        isolated(lab, pod);
        for family in FAMILIES {
            soon("the pool", || seen(lab, pod, family, "api.example.com") == Some(of(POOL_A, family)));
        }
        for echo in &mut others {
            echo.say("another namespace's flows go on\n").unwrap();
        }
    });
}

/// A pool admits namespaces by their labels: who else names it, in a policy or by an annotation, leaves as without it, and is told.
#[test]
fn nobody_borrows_a_pool() {
    with(|lab| {
        let pod = "annotated/app";
        let without = |name: &str| {
            FAMILIES.iter().all(|f| {
                let nodes = ["gw-a", "gw-b"].map(|g| node_of(lab, g, *f));
                seen(lab, pod, *f, name).is_some_and(|source| nodes.contains(&source))
            })
        };
        let all = "/apis/tidegate.dev/v1alpha1/namespaces/annotated/egresspolicies";
        let policy = json!({
            "apiVersion": "tidegate.dev/v1alpha1", "kind": "EgressPolicy", "metadata": {"name": "borrows"},
            "spec": {"podSelector": {}, "poolRef": {"name": "partner-a"}, "egress": [
                {"name": "one", "toFQDNs": [{"matchName": "www.example.com"}], "toPorts": [{"protocol": "TCP", "port": 443}]},
            ]},
        });
        lab.request("POST", all, &policy).unwrap();
        soon("what the policy allows", || without("www.example.com"));
        let told =
            |o: &Value| o["status"]["conditions"].to_string().contains("partner-a does not admit this namespace");
        lab.wait_object(&format!("{all}/borrows"), Duration::from_secs(20), told).unwrap();
        lab.request("DELETE", &format!("{all}/borrows"), &Value::Null).unwrap();
        lab.kubectl(&["annotate", "namespace", "annotated", "tidegate.dev/pool=partner-a"]).unwrap();
        soon("the policy's end", || ask(lab, pod, Family::V4, "www.example.com").is_denied());
        assert!(without("api.example.com"));
        // Whoever may label the namespace admits it.
        lab.kubectl(&["label", "namespace", "annotated", "team=payments"]).unwrap();
        for family in FAMILIES {
            soon("the pool", || seen(lab, pod, family, "api.example.com") == Some(of(POOL_A, family)));
        }
        lab.kubectl(&["label", "namespace", "annotated", "team-"]).unwrap();
        soon("the pool's end", || without("api.example.com"));
        lab.kubectl(&["annotate", "namespace", "annotated", "tidegate.dev/pool-"]).unwrap();
    });
}

#[test]
fn every_address_of_a_pod_is_the_pods() {
    with(|lab| {
        let pod = "shop/worker";
        let both = addresses(lab, pod);
        isolated(lab, pod);
        // Learnt over one family, used over the other.
        let server = |family: Family| format!("@{}", family.pick("10.244.1.53", "fd00:10:244:1::53"));
        for (asks, uses) in [(Family::V4, Family::V6), (Family::V6, Family::V4)] {
            let answers = dig(&lab.pod(pod), "tcp.example.com", uses.record(), &[&server(asks)]).answers;
            assert_eq!(answers.len(), 1);
            let echo = Echo::connect(&lab.pod(pod), named(uses, 12, 7000)).unwrap();
            assert_eq!(tidegate_lab::probe::source(&echo.seen), Some(of(POOL_A, uses)));
        }
        // An address that Kubernetes does not know, or no longer, is no way out either: the interface is the pod's.
        lab.set_addresses(pod, &both[..1]).unwrap();
        let six = server(Family::V6);
        let unknown = || dig(&lab.pod(pod), "api.example.com", "A", &[&six]).answers.is_empty();
        soon("the end of an address", unknown);
        for family in FAMILIES {
            let silent = knock(&lab.pod(pod), named(family, 14, 7000)).unwrap();
            assert_eq!(silent, Knock::Silent, "{family:?}");
        }
        lab.set_addresses(pod, &both).unwrap();
        isolated(lab, pod);
    });
}

#[test]
fn an_address_that_moves_to_another_namespace_starts_with_nothing() {
    with(|lab| {
        let pod = "shop/worker";
        let ips = addresses(lab, pod);
        let mut flows: Vec<Echo> = FAMILIES.iter().map(|f| live(lab, pod, *f)).collect();
        for family in FAMILIES {
            assert_eq!(seen(lab, pod, family, "www.example.com"), Some(of(POOL_A, family)));
        }
        let guest = |key: &'static str, app: &str| Guest::new(key, "node-2", app, &ips);
        // Who is faster than a watch: the address never belongs to nobody for longer than two requests take.
        lab.delete_pod(pod).unwrap();
        lab.make_pod(&guest("billing/heir", "pay")).unwrap();
        for family in FAMILIES {
            soon("the heir's pool", || seen(lab, pod, family, "bank.example.com") == Some(of(POOL_B, family)));
            assert!(ask(lab, pod, family, "www.example.com").is_denied(), "the shop's name");
            let bound = knock(&lab.pod(pod), named(family, 11, 443)).unwrap();
            assert_eq!(bound, Knock::Silent, "an address that only the shop resolved");
        }
        for echo in &mut flows {
            assert!(is_cut(echo), "a flow of the shop does not become billing's");
        }
        lab.delete_pod("billing/heir").unwrap();
        lab.make_pod(&guest(pod, "web")).unwrap();
        for family in FAMILIES {
            soon("the shop's pool", || seen(lab, pod, family, "www.example.com") == Some(of(POOL_A, family)));
            assert!(ask(lab, pod, family, "bank.example.com").is_denied());
        }
    });
}

/// They have no address of their own: nobody manages them, and the namespace's status says so.
#[test]
fn pods_on_their_nodes_network_are_named() {
    with(|lab| {
        let node = lab.scenario().node("node-2").unwrap();
        let addresses = lab.scenario().node_addresses(node);
        let key = "managed/exporter";
        lab.make_pod(&Guest { key, node: "node-2", labels: json!({}), addresses, host_network: true }).unwrap();
        let path = "/apis/tidegate.dev/v1alpha1/namespaces/managed/namespaceegresses/tidegate";
        let named = |o: &Value| o["status"]["hostNetworkPods"]["names"] == json!(["exporter"]);
        lab.wait_object(path, Duration::from_secs(90), named).unwrap();
        // A node is not its pods' namespace.
        let place = lab.place("node-2").unwrap();
        for family in FAMILIES {
            let out = curl(&place, family, &format!("http://{}/", named_http(family)), &[]);
            assert_eq!(out.source(), Some(node_of(lab, "shop/worker", family)), "{}", out.text());
        }
        isolated(lab, "managed/app");
        lab.delete_pod(key).unwrap();
    });
}

#[test]
fn external_names_are_resolved_under_policy() {
    with(|lab| {
        let pod = "shop/web";
        lab.make_external_name("shop/partner", "api.example.com").unwrap();
        lab.make_external_name("shop/stranger", "other.example.org").unwrap();
        for family in FAMILIES {
            let address = named(family, 10, 0).ip().to_string();
            let alias = || ask(lab, pod, family, "partner.shop.svc.cluster.local").answers;
            soon("the alias's address", || alias().last() == Some(&address));
            let pinned = format!("api.example.com:443:{}", family.pick(address.clone(), format!("[{address}]")));
            let there = curl(&lab.pod(pod), family, "https://api.example.com/", &["--resolve", &pinned]);
            assert_eq!(there.source(), Some(of(POOL_A, family)), "{}", there.text());
            let no = ask(lab, pod, family, "stranger.shop.svc.cluster.local");
            assert!(no.answers.is_empty() && no.ede.is_some(), "a Service is no way to look names up: {}", no.text());
        }
        let asked = lab.queries("cluster").unwrap();
        let stray = asked.iter().find(|q| q["name"].as_str().is_some_and(|n| n.starts_with("stranger.")));
        assert!(stray.is_none(), "nor is the cluster's DNS asked: {stray:?}");
        lab.delete_external_name("shop/partner").unwrap();
        lab.delete_external_name("shop/stranger").unwrap();
        soon("the alias's end", || ask(lab, pod, Family::V4, "partner.shop.svc.cluster.local").answers.is_empty());
    });
}

/// A namespace that is isolated, by an annotation or by a policy, is deleted; its pod takes its time.
#[test]
fn a_deleted_namespaces_pods_stay_isolated_while_they_end() {
    with(|lab| {
        let place = "shop/batch";
        let ips = addresses(lab, place);
        lab.delete_pod(place).unwrap();
        let policy = json!({
            "apiVersion": "tidegate.dev/v1alpha1", "kind": "EgressPolicy", "metadata": {"name": "own"},
            "spec": {"podSelector": {}, "egress": [
                {"name": "api", "toFQDNs": [{"matchName": "api.example.com"}], "toPorts": [{"protocol": "TCP", "port": 443}]},
            ]},
        });
        for (namespace, annotations, policy) in [
            ("doomed-by-annotation", json!({"tidegate.dev/allow": "api.example.com"}), None),
            ("doomed-by-policy", json!({}), Some(policy)),
        ] {
            let object = json!({"metadata": {"name": namespace, "annotations": annotations}});
            lab.request("POST", "/api/v1/namespaces", &object).unwrap();
            if let Some(policy) = policy {
                let path = format!("/apis/tidegate.dev/v1alpha1/namespaces/{namespace}/egresspolicies");
                lab.request("POST", &path, &policy).unwrap();
            }
            let key = format!("{namespace}/app");
            lab.make_pod(&Guest::new(&key, "node-2", "doomed", &ips)).unwrap();
            isolated(lab, place);
            assert!(seen(lab, place, Family::V4, "api.example.com").is_some());

            // What it tries: ends of connections that other tests' pods had there are sent again for minutes.
            let tries = "tcp dport 443 tcp flags & (syn | ack) == syn";
            let leaks = FAMILIES.map(|f| lab.watch(named(f, 14, 0).ip(), tries).unwrap());
            lab.kubectl(&["delete", "namespace", namespace, "--wait=false"]).unwrap();
            let pod = format!("/api/v1/namespaces/{namespace}/pods/app");
            lab.wait_object(&pod, Duration::from_secs(60), |p| p["metadata"]["deletionTimestamp"].is_string()).unwrap();
            if namespace == "doomed-by-policy" {
                // API servers before 1.33 delete what is in a namespace in any order (CVE-2024-7598).
                lab.kubectl(&["delete", "egresspolicies", "own", "-n", namespace]).unwrap();
            }
            for _ in 0..4 {
                for family in FAMILIES {
                    let knocked = knock(&lab.pod(place), named(family, 14, 443)).unwrap();
                    assert_eq!(knocked, Knock::Silent, "{namespace}: the pod that ends gets out, {family:?}");
                }
                std::thread::sleep(Duration::from_millis(500));
            }
            let none = leaks.iter().all(|l| l.packets().unwrap() == 0);
            assert!(none, "{namespace}: {:?}", leaks.each_ref().map(Watch::senders));
            lab.delete_pod(&key).unwrap();
            let gone = || lab.request("GET", &format!("/api/v1/namespaces/{namespace}"), &Value::Null).is_err();
            let end = wait_for(Duration::from_secs(60), || gone().then_some(()));
            assert!(end.is_some(), "{namespace} is not emptied");
        }
        lab.make_pod(&Guest::new(place, "node-2", "batch", &ips)).unwrap();
        untouched(lab, place);
    });
}
