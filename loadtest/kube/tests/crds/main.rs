//! The definitions of Tidegate's resources, held against the real API server and against the directory reader.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bad;
mod table;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bad::Bad;
use serde_json::{Value, json};
use tidegate_api::Severity;
use tidegate_api::resource::{
    Cause, Condition, ConditionStatus, Denial, EgressPoolStatus, HeldPair, HostNetworkPods, Isolation,
    NamespaceEgressStatus, NamespaceMode, NodeCount, PolicyStatus, Refused, ScopePair, Verdict,
};
use tidegate_kube::{Api, Cluster};

const GROUP: &str = "/apis/tidegate.dev/v1alpha1";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The shared cluster with the committed definitions in it, and the namespace `shop`.
fn cluster() -> (Arc<Cluster>, Api) {
    let cluster = Cluster::shared().unwrap();
    cluster.define().unwrap();
    let api = cluster.api();
    namespace(&api, "shop");
    // Established means that the schema holds; a moment later the path does.
    for _ in 0..200 {
        if api.send("GET", &format!("{GROUP}/namespaces/shop/namespaceegresses"), &[], "").unwrap().status == 200 {
            return (cluster, api);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("the resources are not served");
}

fn namespace(api: &Api, name: &str) {
    let body = format!("{{\"apiVersion\": \"v1\", \"kind\": \"Namespace\", \"metadata\": {{\"name\": \"{name}\"}}}}");
    let answer = api.send("POST", "/api/v1/namespaces", &[], &body).unwrap();
    assert!([201, 409].contains(&answer.status), "{answer:?}");
}

/// The path of the collection that a manifest belongs to.
fn collection(text: &str) -> String {
    if text.contains("kind: EgressPolicy") {
        format!("{GROUP}/namespaces/shop/egresspolicies")
    } else if text.contains("kind: ClusterEgressPolicy") {
        format!("{GROUP}/clusteregresspolicies")
    } else {
        format!("{GROUP}/egresspools")
    }
}

/// Why the API server does not take a manifest; empty if it does.
fn refusal(api: &Api, text: &str) -> String {
    let path = collection(text) + "?fieldValidation=Strict&dryRun=All";
    let answer = api.send("POST", &path, &[], text).unwrap();
    let body: Value = serde_json::from_str(&answer.body).unwrap();
    if answer.status == 201 {
        return String::new();
    }
    // CEL says the type in the place of the value.
    let mut message = body["message"].as_str().unwrap().to_owned();
    for kind in ["object", "array", "string", "integer"] {
        message = message.replace(&format!("Invalid value: \"{kind}\": "), "Invalid value: ");
    }
    message
}

/// Why the directory reader does not take a manifest; empty if it does.
fn reading(folder: &Path, text: &str) -> String {
    let path = folder.join("a.yaml");
    std::fs::write(&path, text).unwrap();
    let problems = tidegate_api::check_file(&path).unwrap();
    let errors = problems.iter().filter(|p| p.severity == Severity::Error);
    errors.map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

#[test]
fn bad_manifests_are_refused_with_their_field() {
    let (_cluster, api) = cluster();
    let folder = tempfile::tempdir().unwrap();
    let mut wrong = Vec::new();
    let table = bad::bad();
    for Bad { text, api: want_api, reader: want_reader } in &table {
        for (who, want, got) in
            [("API server", want_api, refusal(&api, text)), ("reader", want_reader, reading(folder.path(), text))]
        {
            if got.is_empty() != want.is_empty() || !got.contains(want) {
                let text: String = text.chars().take(600).collect();
                wrong.push(format!("{who}\n  want: {want}\n  got:  {got}\n{text}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), table.len(), wrong.join("\n"));
}

#[test]
fn good_manifests_are_taken_by_both() {
    let (_cluster, api) = cluster();
    let folder = tempfile::tempdir().unwrap();
    for text in table::good() {
        let short: String = text.chars().take(300).collect();
        assert_eq!(refusal(&api, &text), "", "{short}");
        assert_eq!(reading(folder.path(), &text), "", "{short}");
    }
}

/// A tenant must not be able to keep the API server busy: comparing each rule with each in CEL took it seconds.
#[test]
fn names_of_many_rules_are_compared_cheaply() {
    let (_cluster, api) = cluster();
    // The best of several, since the machine may be busy.
    let time = |text: &str| {
        let one = || {
            let start = Instant::now();
            assert_eq!(refusal(&api, text), "");
            start.elapsed()
        };
        (0..5).map(|_| one()).min().unwrap()
    };
    let (with, without) = (time(&table::full(true)), time(&table::full(false)));
    assert!(with < 4 * without, "{with:?} with names, {without:?} without");
}

/// The manifests of a file: itself, or what a page of the documentation shows.
fn manifests(path: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap();
    if path.extension().is_some_and(|e| e == "md") {
        let blocks = text.split("```yaml\n").skip(1).filter_map(|b| b.split("```").next());
        return blocks.filter(|b| b.contains("apiVersion: tidegate.dev")).map(str::to_owned).collect();
    }
    vec![text]
}

#[test]
fn every_policy_of_the_documentation_and_the_lab_applies() {
    let (cluster, api) = cluster();
    let mut found = Vec::new();
    for folder in ["", "docs", "docs/examples", "loadtest/manifests/demo"] {
        for entry in std::fs::read_dir(root().join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "md" || e == "yaml") {
                found.extend(manifests(&path).into_iter().map(|m| (path.clone(), m)));
            }
        }
    }
    assert!(found.len() >= 15, "{}", found.len());
    for name in found.iter().flat_map(|(_, m)| m.split("namespace: ").skip(1)) {
        namespace(&api, &name[..name.find(|c: char| c != '-' && !c.is_ascii_alphanumeric()).unwrap()]);
    }
    for (path, manifest) in found {
        let args = ["apply", "--server-side", "--validate=strict", "--force-conflicts", "-f", "-"];
        let out = cluster.kubectl(&args, &manifest).unwrap();
        assert!(out.ok && out.stderr.is_empty(), "{}: {out}", path.display());
    }
}

#[test]
fn the_definitions_are_structural_and_explain_themselves() {
    let (cluster, _api) = cluster();
    let list = cluster.kubectl(&["get", "crd", "-o", "json"], "").unwrap().success().unwrap();
    let list: Value = serde_json::from_str(&list).unwrap();
    assert_eq!(list["items"].as_array().unwrap().len(), 4);
    for crd in list["items"].as_array().unwrap() {
        let conditions = crd["status"]["conditions"].as_array().unwrap();
        let there = |kind: &str| conditions.iter().any(|c| c["type"] == kind && c["status"] == "True");
        assert!(there("Established") && there("NamesAccepted") && !there("NonStructuralSchema"), "{conditions:?}");
    }

    for (field, says) in [
        ("egp", &["A pod that it selects is isolated"][..]),
        ("egp.spec", &["podSelector\t<Object> -required-", "enum: Enforce, Staged", "Defaults to Reset."]),
        ("egp.spec.egress", &["toPorts\t<[]Object> -required-", "in seconds, 0 to", "- Unchecked: TCP is forwarded"]),
        ("egp.spec.egress.toPorts", &["enum: TCP, UDP The protocol.", "1 to 65535", "port\t<integer> -required-"]),
        ("egp.spec.egressDeny.toPorts", &["enum: TCP, UDP, Any", "- Any: TCP and UDP, and every other protocol"]),
        ("egp.status.nodes", &["Nodes with pods that the policy selects."]),
        ("cegp.spec", &["0 to 1000", "- Baseline: For pods that no policy", "subject\t<Object> -required-"]),
        ("cegp.spec.egress", &["action\t<string> -required-"]),
        ("cegp.spec.ceiling.permits", &["- SNIUnchecked: TCP without a look at the SNI"]),
        ("epool.spec.static.addresses", &["state\t<string>", "- Draining: It takes no new connections"]),
        ("nsegress.status.denials", &["allowWith\t<string>", "such as TCP", "The rule that would allow it"]),
    ] {
        let text = cluster.kubectl(&["explain", field], "").unwrap().success().unwrap();
        // Explain breaks lines where the terminal ends.
        let flat = |t: &str| t.split_whitespace().collect::<Vec<_>>().join(" ");
        for s in says {
            assert!(flat(&text).contains(&flat(s)), "{field} does not say {s:?}:\n{text}");
        }
    }

    // Columns and short names, and all of Tidegate in one word.
    let list = |args: &[&str]| cluster.kubectl(args, "").unwrap().success().unwrap();
    let name = "columns";
    let policy = table::policy("podSelector: {}\npoolRef: {name: partner-a}").replace("{name: p,", "{name: columns,");
    cluster.kubectl(&["apply", "-f", "-"], &policy).unwrap().success().unwrap();
    let text = list(&["get", "egp", "-n", "shop", name]);
    let lines: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["NAME", "MODE", "POOL", "ACCEPTED", "PROGRAMMED", "AGE"]);
    assert_eq!(lines[1][..3], ["columns", "Enforce", "partner-a"]);
    assert!(list(&["get", "tidegate", "-n", "shop"]).contains("egresspolicy.tidegate.dev/columns"));
}

/// Creates an object, writes a status and gives back what the API server then holds.
fn with_status(api: &Api, collection: &str, object: &Value, status: &Value) -> Value {
    let answer = api.send("POST", &format!("{collection}?fieldValidation=Strict"), &[], &object.to_string()).unwrap();
    assert_eq!(answer.status, 201, "{}", answer.body);
    let mut written: Value = serde_json::from_str(&answer.body).unwrap();
    written["status"] = status.clone();
    let name = object["metadata"]["name"].as_str().unwrap();
    let path = format!("{collection}/{name}/status?fieldValidation=Strict");
    let answer = api.send("PUT", &path, &[("Content-Type", "application/json")], &written.to_string()).unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    serde_json::from_str(&answer.body).unwrap()
}

#[test]
fn the_api_server_holds_every_field_of_status_that_tidegate_writes() {
    let (_cluster, api) = cluster();
    let conditions = vec![Condition {
        kind: "Accepted".into(),
        status: ConditionStatus::True,
        observed_generation: Some(1),
        last_transition_time: "2027-01-31T00:00:00Z".into(),
        reason: "Accepted".into(),
        message: String::new(),
    }];
    let refused = vec![Refused {
        path: "egress[db].toCIDRs[0]".into(),
        reason: "AboveCeiling".into(),
        by: Some("saas".into()),
        message: Some("not in the ceiling".into()),
    }];
    let (ipv4, ipv6) = (Some("203.0.113.10".to_owned()), Some("2001:db8::10".to_owned()));
    let policy = PolicyStatus {
        conditions: conditions.clone(),
        nodes: Some(NodeCount { desired: 40, programmed: 38 }),
        refused: refused.clone(),
    };
    let pool = EgressPoolStatus {
        conditions: conditions.clone(),
        addresses: vec![HeldPair {
            drained: Some(false),
            ipv4: ipv4.clone(),
            ipv6: ipv6.clone(),
            owner: Some("gw-a".into()),
            epoch: 7,
            namespaces: 12,
        }],
    };
    let namespace = NamespaceEgressStatus {
        conditions,
        isolation: Some(Isolation::Partial),
        because: vec![Cause { kind: "Annotation".into(), name: "tidegate.dev/allow".into() }],
        mode: Some(NamespaceMode::Audit),
        audit_until_time: Some("2027-01-31T00:00:00Z".into()),
        egress: vec![ScopePair { pool: "partner-a".into(), ipv4, ipv6 }],
        refused,
        denials: vec![Denial {
            last_time: "2027-01-31T00:00:00.25Z".into(),
            count: 3,
            pod: "web-1".into(),
            to: "example.org:443".into(),
            name: Some("example.org".into()),
            address: Some("203.0.113.7".into()),
            protocol: Some("TCP".into()),
            port: Some(443),
            reason: "not-allowed".into(),
            verdict: Verdict::Audited,
            allow_with: Some("{toFQDNs: [{matchName: example.org}], toPorts: [{protocol: TCP, port: 443}]}".into()),
        }],
        host_network_pods: Some(HostNetworkPods { count: 1, names: vec!["node-exporter".into()] }),
    };

    let object = |kind: &str, namespaced: bool, spec: Option<Value>| {
        let mut o = json!({"apiVersion": "tidegate.dev/v1alpha1", "kind": kind, "metadata": {"name": "status"}});
        if namespaced {
            o["metadata"]["namespace"] = "shop".into();
        }
        if let Some(spec) = spec {
            o["spec"] = spec;
        }
        o
    };
    for (collection, object, status) in [
        (
            "namespaces/shop/egresspolicies",
            object("EgressPolicy", true, Some(json!({"podSelector": {}}))),
            json!(policy),
        ),
        (
            "clusteregresspolicies",
            object(
                "ClusterEgressPolicy",
                false,
                Some(json!({"tier": "Admin", "priority": 1, "subject": {"namespaceSelector": {}}})),
            ),
            json!(policy),
        ),
        ("egresspools", object("EgressPool", false, Some(json!({"addressSource": "PodNetwork"}))), json!(pool)),
        ("namespaces/shop/namespaceegresses", object("NamespaceEgress", true, None), json!(namespace)),
    ] {
        let held = with_status(&api, &format!("{GROUP}/{collection}"), &object, &status);
        assert_eq!(held["status"], status, "{collection}");
    }

    // Conditions of several writers stand side by side.
    let path = format!("{GROUP}/namespaces/shop/egresspolicies/status/status");
    let apply = |manager: &str, kind: &str| {
        let condition = json!({"type": kind, "status": "False", "reason": "R", "message": "", "lastTransitionTime": "2027-01-31T00:00:00Z"});
        let mut o = object("EgressPolicy", true, None);
        o["status"] = json!({"conditions": [condition]});
        let path = format!("{path}?fieldManager={manager}&fieldValidation=Strict");
        let answer =
            api.send("PATCH", &path, &[("Content-Type", "application/apply-patch+yaml")], &o.to_string()).unwrap();
        assert_eq!(answer.status, 200, "{}", answer.body);
        serde_json::from_str::<Value>(&answer.body).unwrap()
    };
    apply("one", "Conflicted");
    let both = apply("two", "Programmed");
    let kinds: Vec<&str> =
        both["status"]["conditions"].as_array().unwrap().iter().map(|c| c["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["Accepted", "Conflicted", "Programmed"]);
}
