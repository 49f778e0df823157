//! The chart in a real API server: installed, upgraded, its rights tried, taken out.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tidegate_kube::{Api, Cluster, Output};

use crate::common::{NAMESPACE, chart, helm, root};
use crate::uninstall::soon;

/// The chart as it was last published: what people upgrade from. Replaced by `helm package` when a version is tagged.
const BEFORE: &str = "loadtest/kube/tests/chart/before/tidegate-0.1.0.tgz";

fn install(cluster: &Cluster, name: &str, namespace: &str, values: &str) -> Output {
    let chart = chart();
    let args =
        ["install", name, chart.to_str().unwrap(), "--namespace", namespace, "--create-namespace", "--values", "-"];
    helm(Some(cluster), &args, values)
}

/// While it takes a changed definition up, an API server asks clients to come again (429).
fn get(api: &Api, path: &str) -> Value {
    let answer = soon(path, || Some(api.send("GET", path, &[], "").unwrap()).filter(|a| a.status != 429));
    assert_eq!(answer.status, 200, "{path}: {}", answer.body);
    serde_json::from_str(&answer.body).unwrap()
}

fn gateway(api: &Api) -> Value {
    get(api, &format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments/tidegate-gateway"))["spec"].clone()
}

#[test]
fn a_second_installation_is_refused_and_says_where_the_first_is() {
    let cluster = Cluster::start().unwrap();
    install(&cluster, "tidegate", NAMESPACE, "").success().unwrap();
    for (name, namespace) in [("other", NAMESPACE), ("tidegate", "elsewhere")] {
        let out = install(&cluster, name, namespace, "");
        let words = format!("already in this cluster, as the release tidegate in the namespace {NAMESPACE}");
        assert!(!out.ok && out.stderr.contains(&words), "{out}");
    }
    // The first one can still be upgraded.
    let chart = chart();
    let args = ["upgrade", "tidegate", chart.to_str().unwrap(), "--namespace", NAMESPACE];
    let upgrade = |more: &[&str]| helm(Some(&cluster), &[&args, more].concat(), "").success().unwrap();
    // Another authority cuts all agents off: who asks for that is told, also before it is done.
    let told = |text: &str| text.contains("WARNING: identity.given");
    assert!(!told(&upgrade(&[])));
    let (given, own) = (["--set", "identity.given=true"], ["--set", "identity.given=false"]);
    assert!(told(&upgrade(&[&given[..], &["--dry-run=server"]].concat())) && told(&upgrade(&given)));
    assert!(!told(&upgrade(&given)) && told(&upgrade(&own)) && !told(&upgrade(&own)), "there and back");
    // An image that is not the chart's may not know what the chart writes.
    let pinned = |text: &str| text.contains("The image is pinned");
    assert!(!pinned(&upgrade(&["--reset-values"])) && pinned(&upgrade(&["--set", "image.tag=0.0.1"])));
}

#[test]
fn an_upgrade_from_the_chart_before_keeps_policies_and_takes_new_values() {
    let cluster = Cluster::start().unwrap();
    let api = cluster.api();
    let before = root().join(BEFORE);
    let with = |verb: &str, chart: &Path, values: &str| {
        let namespace = ["--namespace", NAMESPACE, "--create-namespace", "--values", "-"];
        let mut args = vec![verb, "tidegate", chart.to_str().unwrap()];
        // An upgrade knows its namespace.
        args.extend(namespace.into_iter().filter(|a| verb == "install" || *a != "--create-namespace"));
        helm(Some(&cluster), &args, values).success().unwrap();
    };
    with("install", &before, "gateway: {replicas: 1}");
    let wait = ["wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"];
    cluster.kubectl(&wait, "").unwrap().success().unwrap();
    let policy = fs::read_to_string(root().join("docs/examples/stripe.yaml")).unwrap();
    cluster.kubectl(&["create", "namespace", "shop"], "").unwrap().success().unwrap();
    cluster.kubectl(&["apply", "--server-side", "-n", "shop", "-f", "-"], &policy).unwrap().success().unwrap();
    let old = gateway(&api);
    assert_eq!(old["replicas"], 1);

    with("upgrade", &chart(), "gateway: {replicas: 3, config: {clusterDefault: Audit}}\ntunnelPort: 8999");
    let new = gateway(&api);
    assert_eq!(new["replicas"], 3);
    // A changed file is a new pod.
    let checksum = |spec: &Value| spec["template"]["metadata"]["annotations"]["checksum/config"].clone();
    assert_ne!(checksum(&old), checksum(&new));
    let agent = get(&api, &format!("/api/v1/namespaces/{NAMESPACE}/configmaps/tidegate-agent"));
    assert!(agent["data"]["agent.yaml"].as_str().unwrap().contains("tunnelPort: 8999"));

    // Back, and the policies are where they were.
    with("upgrade", &before, "");
    with("upgrade", &chart(), "");
    let policies = get(&api, "/apis/tidegate.dev/v1alpha1/egresspolicies");
    assert_eq!(policies["items"].as_array().unwrap().len(), 1);

    // Definitions, and with them policies, outlive the release.
    helm(Some(&cluster), &["uninstall", "tidegate", "--namespace", NAMESPACE, "--no-hooks"], "").success().unwrap();
    let policies = get(&api, "/apis/tidegate.dev/v1alpha1/egresspolicies");
    assert_eq!(policies["items"].as_array().unwrap().len(), 1);
    let left =
        cluster.kubectl(&["get", "clusterroles,clusterrolebindings,validatingadmissionpolicies", "-o", "name"], "");
    let left = left.unwrap().success().unwrap();
    assert!(!left.contains("tidegate"), "{left}");
    with("install", &chart(), "");
}

/// The right to patch nodes comes with the startup taint, and is for that alone.
#[test]
fn gateways_take_their_taint_off_nodes_and_nothing_else() {
    let cluster = Arc::new(Cluster::start().unwrap());
    install(&cluster, "tidegate", NAMESPACE, "agent: {startupTaint: true}").success().unwrap();
    let other = json!({"key": "example.com/other", "effect": "NoSchedule"});
    let ours = json!({"key": "tidegate.dev/agent-not-ready", "effect": "NoSchedule"});
    let node = json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": "n", "labels": {"a": "b"}},
        "spec": {"taints": [other, ours], "providerID": "x://1"},
    });
    // The API server gives a node that is created a taint of its own.
    for how in ["create", "replace"] {
        cluster.kubectl(&[how, "-f", "-"], &node.to_string()).unwrap().success().unwrap();
    }
    let who = format!("--as=system:serviceaccount:{NAMESPACE}:{GATEWAY}");
    let patch = |patch: &Value| {
        cluster.kubectl(&["patch", "node", "n", "--type=merge", &who, "--patch", &patch.to_string()], "").unwrap()
    };
    let refused = [
        json!({"spec": {"taints": []}}),
        json!({"spec": {"taints": [ours]}}),
        json!({"spec": {"taints": [other, ours, {"key": "more", "effect": "NoExecute"}]}}),
        json!({"spec": {"taints": [other], "unschedulable": true}}),
        json!({"spec": {"taints": [other], "podCIDR": "10.9.0.0/24", "podCIDRs": ["10.9.0.0/24"]}}),
        json!({"spec": {"taints": [other]}, "metadata": {"labels": {"a": "c"}}}),
        json!({"spec": {"taints": [other]}, "metadata": {"labels": null}}),
        json!({"spec": {"taints": [other]}, "metadata": {"annotations": {"x": "y"}}}),
        json!({"spec": {"taints": [other]}, "metadata": {"finalizers": ["x.example/y"]}}),
    ];
    // The API server takes a policy up a moment after it was made.
    let deadline = Instant::now() + Duration::from_secs(20);
    while !patch(&refused[0]).stderr.contains("gateways may") {
        assert!(Instant::now() < deadline, "the policy has no effect");
        cluster.kubectl(&["replace", "-f", "-"], &node.to_string()).unwrap().success().unwrap();
        std::thread::sleep(Duration::from_millis(100));
    }
    for what in &refused {
        let said = patch(what);
        assert!(!said.ok && said.stderr.contains("gateways may"), "{what}: {said}");
    }
    patch(&json!({"spec": {"taints": [other]}})).success().unwrap();
    // Others go on as they may.
    cluster.kubectl(&["label", "node", "n", "a=c", "--overwrite"], "").unwrap().success().unwrap();
}

/// Asks the API server whether somebody may do something; `resource` is `GROUP/RESOURCE[/SUBRESOURCE]`.
fn may(api: &Api, user: &str, verb: &str, resource: &str, namespace: &str, name: &str) -> bool {
    let mut parts = resource.split('/');
    let mut part = || parts.next().unwrap_or_default();
    let (group, kind, sub) = (part(), part(), part());
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {
            "user": format!("system:serviceaccount:{NAMESPACE}:{user}"),
            "groups": ["system:serviceaccounts", format!("system:serviceaccounts:{NAMESPACE}"), "system:authenticated"],
            "resourceAttributes": {"verb": verb, "group": group, "resource": kind, "subresource": sub, "namespace": namespace, "name": name},
        },
    });
    let path = "/apis/authorization.k8s.io/v1/subjectaccessreviews";
    let answer = api.send("POST", path, &[("Content-Type", "application/json")], &review.to_string()).unwrap();
    assert_eq!(answer.status, 201, "{}", answer.body);
    serde_json::from_str::<Value>(&answer.body).unwrap()["status"]["allowed"].as_bool().unwrap()
}

const OWN: &str = NAMESPACE;
const GATEWAY: &str = "tidegate-gateway";
const T: &str = "tidegate.dev";

#[test]
fn rights_are_these_and_no_more() {
    let cluster = Arc::new(Cluster::start().unwrap());
    install(&cluster, "tidegate", NAMESPACE, "").success().unwrap();
    let api = cluster.api();
    let t = |resource: &str| format!("{T}/{resource}");
    // Who, verb, resource, namespace (none: all of them), name.
    let allowed: &[(&str, &[&str], &str, &str, &str)] = &[
        (GATEWAY, &["get", "list", "watch"], "/pods", "", ""),
        (GATEWAY, &["get", "list", "watch"], "/namespaces", "", ""),
        (GATEWAY, &["get", "list", "watch"], "/nodes", "", ""),
        (GATEWAY, &["get", "list", "watch"], "/services", "", ""),
        (GATEWAY, &["get", "list", "watch"], "discovery.k8s.io/endpointslices", "", ""),
        (GATEWAY, &["get", "list", "watch"], "networking.k8s.io/servicecidrs", "", ""),
        (GATEWAY, &["get", "list", "watch"], &t("egresspolicies"), "", ""),
        (GATEWAY, &["get", "list", "watch"], &t("clusteregresspolicies"), "", ""),
        (GATEWAY, &["get", "list", "watch", "patch"], &t("egresspools"), "", ""),
        (GATEWAY, &["get", "list", "watch", "create", "delete"], &t("namespaceegresses"), "", ""),
        (GATEWAY, &["update", "patch"], &t("egresspolicies/status"), "", ""),
        (GATEWAY, &["update", "patch"], &t("clusteregresspolicies/status"), "", ""),
        (GATEWAY, &["update", "patch"], &t("egresspools/status"), "", ""),
        (GATEWAY, &["update", "patch"], &t("namespaceegresses/status"), "", ""),
        (GATEWAY, &["create"], "events.k8s.io/events", "", ""),
        (GATEWAY, &["create"], "authentication.k8s.io/tokenreviews", "", ""),
        (GATEWAY, &["create"], "authorization.k8s.io/subjectaccessreviews", "", ""),
        (GATEWAY, &["create"], "coordination.k8s.io/leases", OWN, ""),
        (GATEWAY, &["get", "update", "patch"], "coordination.k8s.io/leases", OWN, "tidegate-gateway"),
        (GATEWAY, &["create"], "/secrets", OWN, ""),
        (GATEWAY, &["get", "update", "patch"], "/secrets", OWN, "tidegate-ca"),
        (GATEWAY, &["create"], "/configmaps", OWN, ""),
        (GATEWAY, &["get", "update", "patch"], "/configmaps", OWN, "tidegate-trust"),
    ];
    for (who, verbs, resource, namespace, name) in allowed {
        for verb in *verbs {
            assert!(
                may(&api, who, verb, resource, namespace, name),
                "{who} may not {verb} {resource} {namespace}/{name}"
            );
        }
    }
    let all = &["get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"][..];
    let refused: &[(&str, &[&str], &str, &str, &str)] = &[
        // Nobody's policy is a gateway's to change, and no pool's.
        (GATEWAY, &["create", "update", "patch", "delete", "deletecollection"], &t("egresspolicies"), "shop", "a"),
        (GATEWAY, &["create", "update", "patch", "delete", "deletecollection"], &t("clusteregresspolicies"), "", "a"),
        (GATEWAY, &["create", "update", "delete", "deletecollection"], &t("egresspools"), "", "a"),
        (GATEWAY, &["update", "deletecollection", "administer"], &t("namespaceegresses"), "shop", "tidegate"),
        (GATEWAY, &["create", "update", "patch", "delete"], "/namespaces", "", "shop"),
        (GATEWAY, &["create", "update", "patch", "delete"], "/pods", "shop", "a"),
        (GATEWAY, &["create", "get"], "/pods/exec", "shop", "a"),
        (GATEWAY, &["update", "patch"], "/nodes", "", "n"),
        (GATEWAY, &["update", "patch", "delete"], "/services", "shop", "a"),
        // Secrets and configuration: its own, by name, in its own namespace.
        (GATEWAY, all, "/secrets", "shop", "tidegate-ca"),
        (GATEWAY, &["get", "list", "watch", "update", "patch", "delete"], "/secrets", OWN, "another"),
        (GATEWAY, &["list", "watch", "delete"], "/secrets", OWN, ""),
        (GATEWAY, &["list", "watch", "delete"], "/secrets", OWN, "tidegate-ca"),
        (GATEWAY, all, "/configmaps", "shop", "tidegate-trust"),
        (GATEWAY, &["get", "update", "patch", "delete"], "/configmaps", OWN, "tidegate-gateway"),
        (GATEWAY, &["get", "update", "patch", "delete"], "coordination.k8s.io/leases", OWN, "another"),
        (GATEWAY, all, "coordination.k8s.io/leases", "kube-system", "tidegate-gateway"),
        (GATEWAY, &["create"], "/serviceaccounts/token", OWN, "tidegate-agent"),
        (GATEWAY, &["patch", "update"], "apps/daemonsets", OWN, "tidegate-agent"),
        (GATEWAY, &["escalate", "bind", "create"], "rbac.authorization.k8s.io/clusterroles", "", "x"),
        (GATEWAY, &["impersonate"], "/users", "", "x"),
        // An agent may nothing.
        ("tidegate-agent", all, "/pods", "shop", ""),
        ("tidegate-agent", all, "/secrets", OWN, "tidegate-ca"),
        ("tidegate-agent", all, "/configmaps", OWN, "tidegate-trust"),
        ("tidegate-agent", all, &t("egresspolicies"), "shop", ""),
        ("tidegate-agent", all, &t("egresspools"), "", ""),
        ("tidegate-agent", &["get", "patch", "update"], "/nodes", "", "n"),
        ("tidegate-agent", &["create"], "authentication.k8s.io/tokenreviews", "", ""),
        // What only `helm uninstall` and `helm test` use is not there before.
        ("tidegate-uninstall", all, "apps/daemonsets", OWN, "tidegate-agent"),
        ("tidegate-uninstall", all, &t("egresspools"), "", ""),
        ("tidegate-test", all, &t("egresspolicies"), "shop", ""),
    ];
    for (who, verbs, resource, namespace, name) in refused {
        for verb in *verbs {
            assert!(!may(&api, who, verb, resource, namespace, name), "{who} may {verb} {resource} {namespace}/{name}");
        }
    }
}
