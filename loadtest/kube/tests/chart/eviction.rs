//! What drains a node evicts: the chart's PodDisruptionBudget, a real API server and the controller of budgets. What kubelets
//! do is done here.

use serde_json::{Value, json};
use tidegate_kube::Api;

use crate::common::NAMESPACE;
use crate::uninstall::{cluster, kubelets, pods, send, soon};

/// Pods of a component that are not about to end.
fn of(api: &Api, component: &str) -> Vec<String> {
    let is = |p: &&Value| {
        p["metadata"]["labels"]["app.kubernetes.io/component"] == component
            && p["metadata"]["deletionTimestamp"].is_null()
    };
    pods(api).iter().filter(is).map(|p| p["metadata"]["name"].as_str().unwrap().to_owned()).collect()
}

/// What the API server says to an eviction: its status and what it answers.
fn evict(api: &Api, pod: &str) -> (u16, String) {
    let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/{pod}/eviction");
    let body =
        json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": NAMESPACE}});
    let answer = api.send("POST", &path, &[("Content-Type", "application/json")], &body.to_string()).unwrap();
    (answer.status, answer.body)
}

#[track_caller]
fn refused(api: &Api, pod: &str) {
    let (status, body) = evict(api, pod);
    assert!(status == 429 && body.contains("DisruptionBudget") && body.contains("tidegate-gateway"), "{status} {body}");
    assert!(of(api, "gateway").iter().any(|p| p == pod), "{pod} stays");
}

/// The budget, once it says so of gateways that are there and of those that may go.
#[track_caller]
fn budget(api: &Api, healthy: u64, allowed: u64, mut meanwhile: impl FnMut()) {
    let path = format!("/apis/policy/v1/namespaces/{NAMESPACE}/poddisruptionbudgets/tidegate-gateway");
    soon("the budget", || {
        meanwhile();
        let status = send(api, "GET", &path, &Value::Null)["status"].clone();
        let is = |field: &str, n: u64| status[field].as_u64() == Some(n);
        (is("expectedPods", 2) && is("currentHealthy", healthy) && is("disruptionsAllowed", allowed)).then_some(())
    });
}

#[test]
fn evictions_take_one_gateway_at_a_time() {
    let (_cluster, _controllers, api) = cluster(2);
    // Agents are there too, and do not count.
    soon("agents", || {
        kubelets(&api, None);
        (of(&api, "agent").len() == 2).then_some(())
    });
    budget(&api, 2, 1, || kubelets(&api, None));
    let gateways = of(&api, "gateway");
    let [first, second] = &gateways[..] else { panic!("{gateways:?}") };
    let (status, body) = evict(&api, first);
    assert_eq!(status, 201, "{body}");
    refused(&api, second);
    budget(&api, 1, 0, || ());
    refused(&api, second);
    // Its successor is ready: then the other one may go.
    budget(&api, 2, 1, || kubelets(&api, None));
    let (status, body) = evict(&api, second);
    assert_eq!(status, 201, "{body}");
    budget(&api, 2, 1, || kubelets(&api, None));

    // Those that are not ready hold up no drain, and let nobody else go.
    let gateways = of(&api, "gateway");
    let [first, second] = &gateways[..] else { panic!("{gateways:?}") };
    let fail = |pod: &str| {
        let unready = json!({"type": "Ready", "status": "False", "lastTransitionTime": "2026-01-01T00:00:00Z"});
        let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/{pod}/status");
        send(&api, "PATCH", &path, &json!({"status": {"conditions": [unready]}}));
    };
    fail(first);
    budget(&api, 1, 0, || ());
    refused(&api, second);
    fail(second);
    budget(&api, 0, 0, || ());
    for pod in [first, second] {
        let (status, body) = evict(&api, pod);
        assert_eq!(status, 201, "{body}");
    }
    // Agents are nobody's budget.
    let agents = of(&api, "agent");
    assert_eq!(evict(&api, &agents[0]).0, 201);
}
