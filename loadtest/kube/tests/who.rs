//! Who may: the chart's roles and its ValidatingAdmissionPolicy, tried as a tenant who wants more than he has.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tidegate_kube::{Api, Cluster, Controllers, Tool, tool};

const GROUP: &str = "/apis/tidegate.dev/v1alpha1";

/// Somebody at the API.
struct User<'a> {
    api: &'a Api,
    name: &'a str,
}

impl User<'_> {
    /// Sends a request; the status of HTTP with the API server's words.
    fn send(&self, method: &str, path: &str, body: &Value) -> (u16, String) {
        let kind = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
        let headers = [("Content-Type", kind), ("Impersonate-User", self.name)];
        let answer = self.api.send(method, path, &headers, &body.to_string()).unwrap();
        let body: Value = serde_json::from_str(&answer.body).unwrap();
        (answer.status, body["message"].as_str().unwrap_or_default().to_owned())
    }

    fn status(&self, method: &str, path: &str, body: &Value) -> u16 {
        self.send(method, path, body).0
    }

    /// Sets an annotation of a namespace, or removes it.
    fn annotate(&self, path: &str, key: &str, value: Option<&str>) -> (u16, String) {
        self.send("PATCH", path, &json!({"metadata": {"annotations": {key: value}}}))
    }
}

fn policy(name: &str, pool: &str) -> Value {
    json!({
        "apiVersion": "tidegate.dev/v1alpha1",
        "kind": "EgressPolicy",
        "metadata": {"name": name},
        "spec": {"podSelector": {}, "poolRef": {"name": pool}},
    })
}

/// Waits until something is as it should be: roles and admission policies come into force a moment after they are written.
fn soon(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "{what} does not come");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The chart in the cluster that these tests share, with the controllers that they need.
struct Installed {
    // Dropped in this order.
    _controllers: Controllers,
    cluster: Arc<Cluster>,
}

/// As [`Cluster::shared`]: put in by the first that asks. The label `team` is kept, and `example.com/zone`.
fn installed() -> Arc<Installed> {
    static SHARED: Mutex<Weak<Installed>> = Mutex::new(Weak::new());
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(installed) = shared.upgrade() {
        return installed;
    }
    let cluster = Cluster::shared().unwrap();
    let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../helm/tidegate");
    let helm = |args: &[&str]| {
        let out = Command::new(tool(Tool::Helm).unwrap()).args(args).arg(&chart).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    helm(&["lint", "--strict"]);
    let manifests =
        helm(&["template", "tidegate", "--no-hooks", "--set", "access.protectedLabels={team,example.com/zone}"]);
    apply(&cluster, &["--validate=strict"], &manifests);
    let users = r#"
apiVersion: v1
kind: List
items:
- apiVersion: rbac.authorization.k8s.io/v1
  kind: ClusterRole
  metadata: {name: namespaces}
  rules:
  - apiGroups: [""]
    resources: [namespaces, namespaces/status, namespaces/finalize]
    verbs: [get, create, update, patch, delete]
- apiVersion: rbac.authorization.k8s.io/v1
  kind: ClusterRole
  metadata: {name: platform}
  rules: [{apiGroups: [tidegate.dev], resources: [clusteregresspolicies], verbs: [update]}]
- apiVersion: rbac.authorization.k8s.io/v1
  kind: ClusterRoleBinding
  metadata: {name: platform}
  roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: platform}
  subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: pia}]
- apiVersion: rbac.authorization.k8s.io/v1
  kind: ClusterRoleBinding
  metadata: {name: namespaces}
  roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: namespaces}
  subjects:
  - {apiGroup: rbac.authorization.k8s.io, kind: User, name: ned}
  - {apiGroup: rbac.authorization.k8s.io, kind: User, name: carol}
  - {apiGroup: rbac.authorization.k8s.io, kind: User, name: pia}
"#;
    apply(&cluster, &[], users);
    let controllers =
        ["clusterrole-aggregation-controller", "namespace-controller", "validatingadmissionpolicy-status-controller"];
    let installed = Arc::new(Installed { _controllers: cluster.start_controllers(&controllers).unwrap(), cluster });
    *shared = Arc::downgrade(&installed);
    installed
}

fn apply(cluster: &Cluster, args: &[&str], text: &str) {
    let out = cluster.kubectl(&[&["apply", "--server-side", "-f", "-"], args].concat(), text).unwrap();
    assert!(out.ok, "{out}");
}

/// Two namespaces of one test's own, with users: `alice` edits the managed one, `vera` views it, `ned` may write every Namespace,
/// and `carol` as well, who administers the managed one, and `pia`, who may update cluster policies.
struct Tenants {
    installed: Arc<Installed>,
    api: Api,
    /// The managed one.
    shop: String,
    /// The other one.
    billing: String,
}

impl Tenants {
    fn new(of: &str) -> Self {
        let installed = installed();
        let (shop, billing) = (format!("shop-{of}"), format!("billing-{of}"));
        let binding = |who: &str, role: &str| {
            format!(
                r#"
- apiVersion: rbac.authorization.k8s.io/v1
  kind: RoleBinding
  metadata: {{name: {who}, namespace: {shop}}}
  roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: {role}}}
  subjects: [{{apiGroup: rbac.authorization.k8s.io, kind: User, name: {who}}}]"#
            )
        };
        let mut text = format!(
            r#"
apiVersion: v1
kind: List
items:
- {{apiVersion: v1, kind: Namespace, metadata: {{name: {shop}, annotations: {{tidegate.dev/managed: "true"}}}}}}
- {{apiVersion: v1, kind: Namespace, metadata: {{name: {billing}}}}}"#
        );
        for (who, role) in [("alice", "edit"), ("vera", "view"), ("carol", "tidegate-administer")] {
            text += &binding(who, role);
        }
        apply(&installed.cluster, &[], &text);
        let api = installed.cluster.api();
        Self { installed, api, shop, billing }
    }

    fn user(&self, name: &'static str) -> User<'_> {
        User { api: &self.api, name }
    }
}

/// The path of a namespace.
fn path(name: &str) -> String {
    format!("/api/v1/namespaces/{name}")
}

#[test]
fn a_tenant_writes_policies_of_his_namespace_and_nothing_else() {
    let tenants = Tenants::new("tenant");
    let (api, cluster) = (&tenants.api, &tenants.installed.cluster);
    let (alice, vera) = (tenants.user("alice"), tenants.user("vera"));
    let (its, others) = (&tenants.shop, format!("{GROUP}/namespaces/{}", tenants.billing));
    let shop = format!("{GROUP}/namespaces/{its}/egresspolicies");
    soon("the role of tenants", || alice.status("POST", &shop, &policy("own", "partner-a")) == 201);
    soon("the role of readers", || vera.status("GET", &shop, &json!(null)) == 200);

    let admin = |method: &str, path: &str, body: &Value| api.send(method, path, &[], &body.to_string()).unwrap().status;
    let egress =
        json!({"apiVersion": "tidegate.dev/v1alpha1", "kind": "NamespaceEgress", "metadata": {"name": "tidegate"}});
    let own = format!("{shop}/own");
    let denials = format!("{GROUP}/namespaces/{its}/namespaceegresses");
    assert_eq!(admin("POST", &denials, &egress), 201);
    let denials_object = format!("{denials}/tidegate");
    let truth = json!({"status": {"nodes": {"desired": 1, "programmed": 1}}});
    for (who, method, path, body, status) in [
        // His own.
        (&alice, "GET", &own, json!(null), 200),
        (&alice, "PATCH", &own, json!({"spec": {"mode": "Staged"}}), 200),
        (&alice, "GET", &denials_object, json!(null), 200),
        (&vera, "GET", &own, json!(null), 200),
        (&vera, "GET", &denials_object, json!(null), 200),
        // Tidegate's word is not his.
        (&alice, "PATCH", &format!("{own}/status"), truth.clone(), 403),
        (&alice, "PATCH", &denials_object, json!({"metadata": {"labels": {"a": "b"}}}), 403),
        (&alice, "PATCH", &format!("{denials_object}/status"), json!({"status": {"mode": "Audit"}}), 403),
        (&alice, "DELETE", &denials_object, json!(null), 403),
        (&alice, "POST", &denials, egress.clone(), 403),
        (&vera, "PATCH", &own, json!({"spec": {"mode": "Enforce"}}), 403),
        (&vera, "DELETE", &own, json!(null), 403),
        // Other people's, and the platform's.
        (&alice, "GET", &format!("{others}/egresspolicies"), json!(null), 403),
        (&alice, "POST", &format!("{others}/egresspolicies"), policy("p", "default"), 403),
        (&alice, "GET", &format!("{others}/namespaceegresses/tidegate"), json!(null), 403),
        (
            &alice,
            "POST",
            &format!("{GROUP}/clusteregresspolicies"),
            json!({"apiVersion": "tidegate.dev/v1alpha1", "kind": "ClusterEgressPolicy", "metadata": {"name": "mine"},
                "spec": {"tier": "Admin", "priority": 0, "subject": {"namespaceSelector": {}}}}),
            403,
        ),
        (
            &alice,
            "POST",
            &format!("{GROUP}/egresspools"),
            json!({"apiVersion": "tidegate.dev/v1alpha1", "kind": "EgressPool", "metadata": {"name": "mine"},
                "spec": {"addressSource": "PodNetwork", "allowedNamespaces": {}}}),
            403,
        ),
        // Weakening the own namespace, or labelling it into somebody's pool.
        (&alice, "PATCH", &path(its), json!({"metadata": {"labels": {"team": "payments"}}}), 403),
        (&alice, "PATCH", &path(its), json!({"metadata": {"annotations": {"tidegate.dev/mode": "audit"}}}), 403),
        (&alice, "DELETE", &own, json!(null), 200),
    ] {
        let (got, said) = who.send(method, path, &body);
        assert_eq!(got, status, "{} {method} {path}: {said}", who.name);
    }

    // The API server finds nothing wrong in the expressions of the admission policy.
    let status = || {
        let args = ["get", "validatingadmissionpolicy", "tidegate-namespaces", "-o", "jsonpath={.status}"];
        serde_json::from_str::<Value>(&cluster.kubectl(&args, "").unwrap().success().unwrap()).unwrap()
    };
    soon("the check of the admission policy", || !status()["typeChecking"].is_null());
    assert_eq!(status()["typeChecking"], json!({}));
}

#[test]
fn only_administrators_change_how_a_namespace_is_managed() {
    let tenants = Tenants::new("managed");
    let (ned, carol) = (tenants.user("ned"), tenants.user("carol"));
    let (shop, billing) = (&path(&tenants.shop), &path(&tenants.billing));
    let mut number = 0;
    soon("the admission policy", || {
        number += 1;
        ned.annotate(billing, "tidegate.dev/mode", Some(&number.to_string())).0 == 403
    });

    let refused = |(status, said): (u16, String), key: &str| {
        let words = "only those who may administer namespaceegresses.tidegate.dev in the namespace may change";
        assert!(status == 403 && said.contains(words) && said.ends_with(key), "{status} {said}");
    };
    // Added, changed, removed; through each way that leads to the annotations.
    for key in ["tidegate.dev/mode", "tidegate.dev/audit-until", "tidegate.dev/pool"] {
        refused(ned.annotate(shop, key, Some("x")), key);
    }
    refused(ned.annotate(shop, "tidegate.dev/managed", Some("false")), "tidegate.dev/managed");
    refused(ned.annotate(shop, "tidegate.dev/managed", None), "tidegate.dev/managed");
    refused(ned.annotate(&format!("{shop}/status"), "tidegate.dev/managed", None), "tidegate.dev/managed");
    let finalize = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": tenants.shop}, "spec": {"finalizers": ["kubernetes"]}});
    refused(ned.send("PUT", &format!("{shop}/finalize"), &finalize), "tidegate.dev/managed");
    let new = |annotations: Value| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "new", "annotations": annotations}});
    let both = new(json!({"tidegate.dev/managed": "false", "tidegate.dev/pool": "partner-a"}));
    refused(ned.send("POST", "/api/v1/namespaces", &both), "tidegate.dev/managed, tidegate.dev/pool");
    refused(carol.annotate(billing, "tidegate.dev/mode", Some("audit")), "tidegate.dev/mode");

    // What is not kept stays free, and those who may, may.
    for (got, said) in [
        ned.annotate(shop, "tidegate.dev/allow", Some("api.example.com")),
        ned.annotate(shop, "team", Some("payments")),
        ned.send("POST", "/api/v1/namespaces", &new(json!({"tidegate.dev/allow": "api.example.com"}))),
        carol.annotate(shop, "tidegate.dev/mode", Some("audit")),
        carol.annotate(shop, "tidegate.dev/managed", None),
    ] {
        assert!(got == 200 || got == 201, "{got} {said}");
    }
}

#[test]
fn nobody_leaves_a_cluster_policy_by_a_label_or_by_a_new_namespace() {
    let tenants = Tenants::new("labelled");
    let (ned, carol, pia) = (tenants.user("ned"), tenants.user("carol"), tenants.user("pia"));
    let label = |who: &User, path: &str, key: &str, value: Value| {
        who.send("PATCH", path, &json!({"metadata": {"labels": {key: value}}}))
    };
    let (shop, billing) = (path(&tenants.shop), path(&tenants.billing));
    let mut number = 0;
    soon("the admission policy", || {
        // What is there already would be no change.
        number += 1;
        label(&ned, &billing, "team", json!(number.to_string())).0 == 403
    });
    let refused = |(status, said): (u16, String), ending: &str| {
        let words = "only those who may update clusteregresspolicies.tidegate.dev may ";
        assert!(status == 403 && said.contains(words) && said.ends_with(ending), "{status} {said}");
    };
    let taken = |(status, said): (u16, String)| assert!(status == 200 || status == 201, "{status} {said}");
    // Set, changed, removed; through each way that leads to the labels.
    taken(label(&pia, &billing, "team", json!("payments")));
    refused(label(&ned, &billing, "team", json!("b")), "change the label team");
    refused(label(&ned, &billing, "team", json!(null)), "change the label team");
    refused(label(&ned, &format!("{billing}/status"), "team", json!(null)), "change the label team");
    refused(label(&carol, &shop, "example.com/zone", json!("open")), "change the label example.com/zone");
    let new = |name: &str, labels: Value| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}});
    refused(ned.send("POST", "/api/v1/namespaces", &new("own", json!({"team": "payments"}))), "change the label team");
    taken(label(&ned, &billing, "colour", json!("green")));
    taken(ned.annotate(&billing, "tidegate.dev/allow", Some("api.example.com")));

    // Made anew it would have neither.
    refused(ned.send("DELETE", &billing, &json!({})), "delete a namespace that has the label team");
    let (status, said) = ned.send("DELETE", &shop, &json!({}));
    assert!(status == 403 && said.ends_with("delete a namespace that has tidegate.dev/managed"), "{status} {said}");
    taken(ned.send("POST", "/api/v1/namespaces", &new("plain", json!({"colour": "red"}))));
    taken(ned.send("DELETE", &path("plain"), &json!({})));
    taken(carol.send("DELETE", &shop, &json!({})));
    taken(pia.send("DELETE", &billing, &json!({})));
    // What ends a namespace is not kept from it.
    soon("the end of the namespaces", || {
        [&shop, &billing].iter().all(|p| tenants.api.send("GET", p, &[], "").unwrap().status == 404)
    });
}

/// What the admin API asks before it shows a tenant anything, with the rights that the chart gives to gateways.
#[test]
fn a_gateway_may_ask_what_a_tenant_may_see_and_that_is_his_own() {
    let tenants = Tenants::new("token");
    let (api, cluster, shop) = (&tenants.api, &tenants.installed.cluster, &tenants.shop);
    let objects = format!(
        r#"
apiVersion: v1
kind: List
items:
- {{apiVersion: v1, kind: ServiceAccount, metadata: {{name: tenant, namespace: {shop}}}}}
- apiVersion: rbac.authorization.k8s.io/v1
  kind: RoleBinding
  metadata: {{name: tenant, namespace: {shop}}}
  roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: view}}
  subjects: [{{kind: ServiceAccount, name: tenant, namespace: {shop}}}]
"#
    );
    apply(cluster, &[], &objects);
    let token = cluster.kubectl(&["create", "token", "tenant", "-n", shop], "").unwrap().success().unwrap();
    let gateway = |path: &str, body: &Value| {
        let headers = [
            ("Content-Type", "application/json"),
            ("Impersonate-User", "system:serviceaccount:default:tidegate-gateway"),
            ("Impersonate-Group", "system:serviceaccounts"),
            ("Impersonate-Group", "system:authenticated"),
        ];
        let answer = api.send("POST", path, &headers, &body.to_string()).unwrap();
        assert_eq!(answer.status, 201, "{path}: {}", answer.body);
        serde_json::from_str::<Value>(&answer.body).unwrap()["status"].clone()
    };
    let review = |token: &str| {
        let body = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}});
        gateway("/apis/authentication.k8s.io/v1/tokenreviews", &body)
    };
    let user = review(token.trim());
    assert_eq!(
        (&user["authenticated"], &user["user"]["username"]),
        (&json!(true), &json!(format!("system:serviceaccount:{shop}:tenant")))
    );
    assert_ne!(review("stranger")["authenticated"], json!(true));
    let sees = |namespace: &str| {
        let about =
            json!({"group": "tidegate.dev", "resource": "namespaceegresses", "verb": "get", "namespace": namespace});
        let body = json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": {
            "user": user["user"]["username"], "groups": user["user"]["groups"], "resourceAttributes": about}});
        gateway("/apis/authorization.k8s.io/v1/subjectaccessreviews", &body)["allowed"] == true
    };
    soon("the role of readers", || sees(shop));
    assert!(!sees(&tenants.billing) && !sees("default") && !sees(""), "his own namespace only");
}

/// What policy believes of pods, a kubelet cannot change: `mirrorPods` rests on the first part of it.
#[test]
fn a_kubelets_pods_are_marked_and_it_can_relabel_none() {
    let cluster = Cluster::shared().unwrap();
    let api = cluster.api();
    let say = |user: &str, groups: &[&str], method: &str, path: &str, body: &Value| {
        let kind = if method == "PATCH" { "application/strategic-merge-patch+json" } else { "application/json" };
        let mut headers = vec![("Content-Type", kind), ("Impersonate-User", user)];
        headers.extend(groups.iter().map(|g| ("Impersonate-Group", *g)));
        let answer = api.send(method, path, &headers, &body.to_string()).unwrap();
        let body: Value = serde_json::from_str(&answer.body).unwrap_or_default();
        (answer.status, body["message"].as_str().unwrap_or_default().to_owned())
    };
    let admin = |method: &str, path: &str, body: &Value| say("admin", &["system:masters"], method, path, body);
    let kubelet =
        |method: &str, path: &str, body: &Value| say("system:node:thief", &["system:nodes"], method, path, body);
    assert_eq!(admin("POST", "/api/v1/namespaces", &json!({"metadata": {"name": "victim"}})).0, 201);
    assert_eq!(admin("POST", "/api/v1/nodes", &json!({"metadata": {"name": "thief", "uid": ""}})).0, 201);
    let uid = |path: &str| {
        let answer = api.send("GET", path, &[], "").unwrap();
        serde_json::from_str::<Value>(&answer.body).unwrap()["metadata"]["uid"].as_str().unwrap().to_owned()
    };
    let owner = json!([{"apiVersion": "v1", "kind": "Node", "name": "thief", "uid": uid("/api/v1/nodes/thief"), "controller": true}]);
    let pods = "/api/v1/namespaces/victim/pods";
    let pod = |name: &str, annotations: Value, owners: &Value| {
        json!({"metadata": {"name": name, "annotations": annotations, "ownerReferences": owners, "labels": {"app": "web"}},
            "spec": {"nodeName": "thief", "containers": [{"name": "c", "image": "i"}]}})
    };
    let (status, why) = kubelet("POST", pods, &pod("plain", json!({}), &owner));
    assert!(status == 403 && why.contains("mirror pods"), "{status} {why}");
    let mark = "kubernetes.io/config.mirror";
    assert_eq!(kubelet("POST", pods, &pod("static", json!({mark: "1"}), &owner)).0, 201);
    // The mark stays, whoever wants it away; its pods have the labels that they have.
    let of = |name: &str| format!("{pods}/{name}");
    let without = json!({"metadata": {"annotations": {mark: null}}});
    for path in [of("static"), of("static") + "/status"] {
        for send in [&kubelet as &dyn Fn(&str, &str, &Value) -> (u16, String), &admin] {
            let (status, why) = send("PATCH", &path, &without);
            assert!(status >= 400, "{path}: {status} {why}");
        }
    }
    assert_eq!(admin("POST", pods, &pod("ordinary", json!({}), &json!([]))).0, 201);
    let relabel = json!({"metadata": {"labels": {"app": "payments"}}});
    let (status, why) = kubelet("PATCH", &(of("ordinary") + "/status"), &relabel);
    assert!(status == 403 && why.contains("labels"), "{status} {why}");
    assert_eq!(kubelet("PATCH", &of("ordinary"), &relabel).0, 403);
    // What it may write is any address: that is what contested addresses are about.
    let claims = json!({"status": {"podIP": "10.244.1.7", "podIPs": [{"ip": "10.244.1.7"}]}});
    assert_eq!(kubelet("PATCH", &(of("ordinary") + "/status"), &claims).0, 200);
}
