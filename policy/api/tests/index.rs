//! The index of an API server's objects: events in, objects and what they touch out.
// Helpers of tests may panic as the tests themselves do.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::{Value, json};
use tidegate_api::index::{Feed, Index};
use tidegate_policy::World;
use tidegate_policy::model::{Action, Ceiling, Objects, PolicyMode, Selector, Settings, Tier, Touched, UnixSeconds};
use tidegate_policy::state::{Named, Touch};

fn index() -> Index {
    Index::new(Settings::default())
}

fn touched(all: bool, namespaces: &[&str], pods: &[(&str, &str)]) -> Touched {
    Touched {
        all,
        namespaces: namespaces.iter().map(|n| (*n).to_owned()).collect(),
        pods: pods.iter().map(|(n, p)| ((*n).to_owned(), (*p).to_owned())).collect(),
        ..Touched::default()
    }
}

fn namespace(name: &str, uid: &str, annotations: Value) -> Value {
    json!({"metadata": {"name": name, "uid": uid, "resourceVersion": "1", "annotations": annotations,
        "managedFields": [{"manager": "kubectl"}], "aFieldOfTomorrow": 1}, "spec": {"finalizers": ["kubernetes"]}})
}

fn pod(namespace: &str, name: &str, uid: &str, ips: &[&str]) -> Value {
    let ips: Vec<Value> = ips.iter().map(|ip| json!({"ip": ip})).collect();
    json!({"metadata": {"namespace": namespace, "name": name, "uid": uid, "labels": {"app": name}},
        "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "i"}]},
        "status": {"phase": "Running", "podIPs": ips, "podIP": ips.first().map(|i| i["ip"].clone())}})
}

fn policy(name: &str, uid: &str, generation: i64, port: u32) -> Value {
    json!({"apiVersion": "tidegate.dev/v1alpha1", "kind": "EgressPolicy",
        "metadata": {"namespace": "shop", "name": name, "uid": uid, "generation": generation,
            "resourceVersion": format!("{generation}"), "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"podSelector": {}, "egress": [
            {"toFQDNs": [{"matchName": "a.example"}], "toPorts": [{"protocol": "TCP", "port": port}]}]},
        "status": {"conditions": []}})
}

fn ports(o: &Objects) -> Vec<(&str, u16)> {
    o.policies.iter().map(|((_, n), p)| (n.as_str(), p.egress[0].ports[0].lo)).collect()
}

fn ips(o: &Objects, namespace: &str, name: &str) -> Vec<String> {
    let pod = o.pods.get(&(namespace.to_owned(), name.to_owned()));
    pod.map(|p| p.addresses.iter().map(IpAddr::to_string).collect()).unwrap_or_default()
}

/// As much as it takes for a policy that went to have no effect.
fn age(i: &mut Index) {
    i.age(u64::MAX);
    i.age(u64::MAX);
}

#[test]
fn what_changes_nothing_touches_nothing() {
    let mut i = index();
    i.apply(Feed::Namespaces, &namespace("shop", "u", json!({"tidegate.dev/managed": "true", "other": "1"})));
    i.apply(Feed::Pods, &pod("shop", "a", "p", &["10.0.0.1"]));
    i.apply(Feed::Nodes, &json!({"metadata": {"name": "n1"}, "status": {"addresses": []}}));
    i.apply(Feed::EgressPolicies, &policy("one", "u", 1, 443));
    assert_eq!(i.take_touched(), Touched { nodes: true, ..touched(false, &["shop"], &[("shop", "a")]) });
    let (noted, changes) = (i.noted(), i.changes());
    assert_eq!(changes, 4);

    let mut beat = pod("shop", "a", "p", &["10.0.0.1"]);
    beat["metadata"]["resourceVersion"] = json!("77");
    beat["metadata"]["annotations"] = json!({"cni": "x"});
    beat["status"]["conditions"] = json!([{"type": "Ready", "status": "True"}]);
    i.apply(Feed::Pods, &beat);
    i.apply(Feed::Namespaces, &namespace("shop", "u", json!({"tidegate.dev/managed": "true", "other": "2"})));
    let beat = json!({"metadata": {"name": "n1", "resourceVersion": "9"},
        "status": {"addresses": [], "conditions": [{"lastHeartbeatTime": "2026-01-01T00:00:00Z"}]}});
    i.apply(Feed::Nodes, &beat);
    let mut status = policy("one", "u", 1, 443);
    status["status"] = json!({"conditions": [{"type": "Accepted"}]});
    status["metadata"]["resourceVersion"] = json!("8");
    i.apply(Feed::EgressPolicies, &status);
    assert_eq!((i.take_touched(), i.noted(), i.changes()), (Touched::default(), noted, changes));
    assert_eq!(i.record(Feed::Pods, "shop", "a").unwrap().resource_version, "77");

    i.apply(Feed::Pods, &pod("shop", "a", "p", &["10.0.0.2"]));
    assert!(i.is_touched());
    assert_eq!(i.take_touched(), touched(false, &[], &[("shop", "a")]));
    assert_eq!(i.changes(), changes + 1);
    i.delete(Feed::Pods, &pod("shop", "a", "p", &[]));
    assert_eq!(i.changes(), changes + 2);
    i.take_touched();
    i.apply(Feed::Namespaces, &namespace("shop", "u", json!({})));
    i.apply(Feed::EgressPolicies, &policy("two", "v", 1, 443));
    assert_eq!(i.take_touched(), touched(false, &["shop"], &[]));
}

#[test]
fn a_bad_object_keeps_its_last_good_version_and_stops_no_other() {
    let mut i = index();
    i.apply(Feed::EgressPolicies, &policy("one", "u", 1, 443));
    i.take_touched();
    i.apply(Feed::EgressPolicies, &policy("one", "u", 2, 0));
    i.apply(Feed::EgressPolicies, &policy("two", "v", 1, 444));
    assert_eq!(ports(i.objects()), [("one", 443), ("two", 444)]);
    let r = i.record(Feed::EgressPolicies, "shop", "one").unwrap();
    assert_eq!((r.good, r.held, r.generation, r.resource_version.as_str()), (false, true, 2, "2"));
    assert!(r.problems[0].to_string().starts_with("spec.egress[0].toPorts[0].port: "), "{}", r.problems[0]);

    // Mended, then with a field that does not exist here.
    i.apply(Feed::EgressPolicies, &policy("one", "u", 3, 445));
    assert!(i.record(Feed::EgressPolicies, "shop", "one").unwrap().problems.is_empty());
    let mut unknown = policy("one", "u", 4, 446);
    unknown["spec"]["onlyFrom"] = json!("here");
    i.apply(Feed::EgressPolicies, &unknown);
    assert_eq!(ports(i.objects()), [("one", 445), ("two", 444)]);

    // Another object of the name inherits nothing. Its pods are isolated, as by any policy, until it is mended.
    let isolates = |i: &Index| {
        let p = &i.objects().policies[&("shop".to_owned(), "one".to_owned())];
        p.egress.is_empty() && p.mode == PolicyMode::Enforce && p.pod_selector == Selector::default()
    };
    i.apply(Feed::EgressPolicies, &policy("one", "w", 1, 0));
    assert!(isolates(&i));
    let r = i.record(Feed::EgressPolicies, "shop", "one").unwrap();
    assert!(!r.held && !r.good && r.uid == "w");
    let mut some = policy("one", "w", 1, 0);
    some["spec"]["podSelector"] = json!({"matchLabels": {"app": "web"}});
    i.apply(Feed::EgressPolicies, &some);
    let key = ("shop".to_owned(), "one".to_owned());
    assert_eq!(i.objects().policies[&key].pod_selector.labels["app"], "web");
    some["spec"]["podSelector"] = json!({"matchLabels": "app"});
    i.apply(Feed::EgressPolicies, &some);
    assert!(isolates(&i), "a selector that cannot be read selects all");
    some["spec"]["mode"] = json!("Staged");
    i.apply(Feed::EgressPolicies, &some);
    assert!(!i.objects().policies.contains_key(&key), "what is staged has no effect");
    // Nor does one that follows a deletion.
    i.apply(Feed::EgressPolicies, &policy("one", "w", 2, 443));
    i.delete(Feed::EgressPolicies, &policy("one", "w", 2, 443));
    i.apply(Feed::EgressPolicies, &policy("one", "w", 3, 0));
    assert!(isolates(&i));
    i.delete(Feed::EgressPolicies, &policy("one", "w", 3, 0));
    age(&mut i);
    assert_eq!(ports(i.objects()), [("two", 444)]);
}

fn cluster_policy(spec: Value) -> Value {
    json!({"apiVersion": "tidegate.dev/v1alpha1", "kind": "ClusterEgressPolicy",
        "metadata": {"name": "guard", "uid": "u", "generation": 1}, "spec": spec})
}

#[test]
fn of_a_bad_cluster_policy_the_strict_part_holds_when_no_good_version_is_known() {
    let held = |spec: Value| {
        let mut i = index();
        i.apply(Feed::ClusterEgressPolicies, &cluster_policy(spec));
        let r = i.record(Feed::ClusterEgressPolicies, "", "guard").unwrap();
        assert!(!r.good && !r.held && !r.problems.is_empty());
        i.objects().cluster_policies.get("guard").cloned()
    };
    let to = |names: &[&str]| names.iter().map(|n| json!({"matchName": n})).collect::<Vec<_>>();
    let spec = json!({"tier": "Baseline", "priority": 7,
        "subject": {"namespaceSelector": {"matchLabels": {"env": "prod"}}},
        "egress": [
            {"name": "ok", "action": "Deny", "toFQDNs": to(&["a.example"]), "toPorts": [{"protocol": "TCP", "port": 443}]},
            {"action": "Deny", "toFQDNs": to(&["b.example", "*.b.example", "c.example"]), "toPorts": [{"protocol": "SCTP"}]},
            {"action": "Accept", "toFQDNs": to(&["d.example"]), "toPorts": [{"protocol": "TCP", "port": 443}]},
            {"action": "Deny", "toCIDRs": [{"cidr": "203.0.113.0/24", "except": ["x"]}], "toPorts": [{"protocol": "Any"}]},
            {"action": "Nay", "toFQDNs": to(&["e.example"]), "toPorts": [{"protocol": "TCP", "port": 443}]},
            7],
        "ceiling": {"toFQDNs": to(&["a.example"]), "permits": ["Everything"]}});
    let p = held(spec.clone()).unwrap();
    assert_eq!((p.tier, p.priority, p.subject_lost, p.ceiling), (Tier::Baseline, 7, false, Some(Ceiling::default())));
    assert_eq!(p.namespaces.labels["env"], "prod");
    let rules: Vec<String> = p
        .rules
        .iter()
        .map(|(action, r)| {
            let names = r.fqdns.iter().map(|f| format!("{f:?}")).collect::<Vec<_>>().len();
            let nets: Vec<String> = r.cidrs.iter().map(|c| format!("{}-{}", c.cidr, c.except.len())).collect();
            let ports: Vec<_> = r.ports.iter().map(|p| (p.proto.is_some(), p.lo, p.hi)).collect();
            format!("{action:?} {} {names} {nets:?} {ports:?}", r.name)
        })
        .collect();
    assert_eq!(
        rules,
        [
            "Deny ok 1 [] [(true, 443, 443)]",
            "Deny 1 2 [] [(false, 0, 65535)]",
            "Deny 3 0 [\"203.0.113.0/24-0\"] [(false, 0, 65535)]",
            "Deny 4 1 [] [(true, 443, 443)]"
        ]
    );
    // Whom it is for, how important it is: what cannot be read is taken as the strictest.
    let mut lost = spec.clone();
    lost["subject"] = json!({"namespaceSelector": {"matchLabels": "env"}});
    (lost["tier"], lost["priority"]) = (json!("Other"), json!(-1));
    let p = held(lost).unwrap();
    assert_eq!((p.tier, p.priority, p.subject_lost), (Tier::Admin, 0, true));
    assert_eq!(p.namespaces, Selector::default());
    let mut pods = spec.clone();
    pods["subject"]["podSelector"] = json!([]);
    let p = held(pods).unwrap();
    assert!(!p.subject_lost && p.pods == Selector::default() && p.namespaces.labels["env"] == "prod");
    let mut open = spec.clone();
    open.as_object_mut().unwrap().remove("ceiling");
    assert_eq!(held(open).unwrap().ceiling, None, "it never had one");
    let nothing = held(json!("spec")).unwrap();
    assert!(nothing.subject_lost && nothing.rules.is_empty() && nothing.ceiling.is_some());
    let mut staged = spec.clone();
    staged["mode"] = json!("Staged");
    assert_eq!(held(staged), None);

    // A good one replaces it, and stays when a bad one follows.
    let mut i = index();
    i.apply(Feed::ClusterEgressPolicies, &cluster_policy(spec.clone()));
    let mut good = spec.clone();
    good["egress"] = json!([spec["egress"][2]]);
    good["ceiling"]["permits"] = json!([]);
    i.apply(Feed::ClusterEgressPolicies, &cluster_policy(good));
    i.apply(Feed::ClusterEgressPolicies, &cluster_policy(spec));
    let p = &i.objects().cluster_policies["guard"];
    assert_eq!((p.rules.len(), p.rules[0].0), (1, Action::Accept));
    assert!(i.record(Feed::ClusterEgressPolicies, "", "guard").unwrap().held);
}

#[test]
fn a_relist_takes_away_what_it_does_not_have() {
    let mut i = index();
    for name in ["a", "b", "c"] {
        i.apply(Feed::Pods, &pod("shop", name, name, &[]));
    }
    i.apply(Feed::EgressPolicies, &policy("one", "u", 1, 443));
    i.take_touched();
    i.apply(Feed::Pods, &pod("shop", "b", "b", &[]));
    let seen: BTreeSet<_> = [("shop".to_owned(), "b".to_owned())].into();
    i.restarted(Feed::Pods, &seen);
    assert_eq!(i.take_touched(), touched(false, &[], &[("shop", "a"), ("shop", "c")]));
    assert_eq!((i.objects().pods.len(), i.objects().policies.len()), (1, 1), "other feeds keep theirs");
    i.restarted(Feed::EgressPolicies, &BTreeSet::new());
    assert!(i.records(Feed::EgressPolicies).next().is_none());
    assert_eq!(i.take_touched(), touched(false, &["shop"], &[]));
    i.age(u64::MAX);
    assert!(!i.is_touched());
    i.age(u64::MAX);
    assert!(i.objects().policies.is_empty());
    assert_eq!(i.take_touched(), touched(false, &["shop"], &[]));
}

#[test]
fn a_namespace_made_anew_is_another_one() {
    let mut i = index();
    i.apply(Feed::Namespaces, &namespace("shop", "old", json!({"tidegate.dev/allow": "a.example"})));
    i.take_touched();
    // Deleted and made again while nobody watched: the list only has the new one.
    i.apply(Feed::Namespaces, &namespace("shop", "new", json!({})));
    i.restarted(Feed::Namespaces, &[(String::new(), "shop".to_owned())].into());
    let ns = &i.objects().namespaces["shop"];
    assert!(ns.uid == "new" && !ns.has_allow && ns.allow.is_empty());
    assert_eq!(i.take_touched(), touched(false, &["shop"], &[]));
}

#[test]
fn an_address_moves_to_another_namespace_within_a_batch() {
    let mut i = index();
    i.apply(Feed::Pods, &pod("shop", "a", "1", &["10.0.0.1"]));
    i.take_touched();
    i.delete(Feed::Pods, &pod("shop", "a", "1", &["10.0.0.1"]));
    i.apply(Feed::Pods, &pod("bank", "b", "2", &["10.0.0.1"]));
    assert_eq!(i.take_touched(), touched(false, &[], &[("bank", "b"), ("shop", "a")]));
    assert_eq!((ips(i.objects(), "shop", "a").len(), ips(i.objects(), "bank", "b")), (0, vec!["10.0.0.1".into()]));
}

#[test]
fn pods_hold_their_addresses_until_they_have_ended() {
    let mut i = index();
    let mut p = pod("shop", "a", "1", &["10.0.0.1", "fd00::1", "10.0.0.9"]);
    i.apply(Feed::Pods, &p);
    assert_eq!(ips(i.objects(), "shop", "a"), ["10.0.0.1", "fd00::1"], "one of each family");
    p["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    i.apply(Feed::Pods, &p);
    assert_eq!(ips(i.objects(), "shop", "a").len(), 2, "it may still send");
    for phase in ["Succeeded", "Failed"] {
        let mut ended = p.clone();
        ended["status"]["phase"] = json!(phase);
        i.apply(Feed::Pods, &ended);
        assert!(ips(i.objects(), "shop", "a").is_empty(), "{phase}");
        i.apply(Feed::Pods, &p);
    }
    p["spec"]["hostNetwork"] = json!(true);
    i.apply(Feed::Pods, &p);
    assert!(i.objects().pods[&("shop".to_owned(), "a".to_owned())].host_network);
}

#[test]
fn annotations_of_any_size_and_content_stop_nothing() {
    let mut i = index();
    let huge = "a.example,".repeat(30_000);
    // What Go makes of octets that are not UTF-8.
    let garbage = "\u{fffd}\u{0}\u{202e}\u{fffd}.example:\u{7f}";
    for (name, text) in [("huge", huge.as_str()), ("garbage", garbage)] {
        i.apply(Feed::Namespaces, &namespace(name, "u", json!({"tidegate.dev/allow": text})));
        let ns = &i.objects().namespaces[name];
        assert!(ns.has_allow && ns.allow.is_empty(), "{name} is isolated");
        let problems = &i.record(Feed::Namespaces, "", name).unwrap().problems;
        assert_eq!(problems.len(), 1, "{name}");
        let said = problems[0].to_string();
        assert!(said.len() < 500 && !said.chars().any(char::is_control), "{said}");
    }
    let odd = json!({"metadata": {"name": "odd", "annotations": {"tidegate.dev/allow": ["a", 1]}}});
    i.apply(Feed::Namespaces, &odd);
    assert!(!i.record(Feed::Namespaces, "", "odd").unwrap().held);
    for nonsense in [json!(null), json!([]), json!({"metadata": 1}), json!({"metadata": {"name": ""}})] {
        for feed in Feed::ALL {
            i.apply(feed, &nonsense);
            i.delete(feed, &nonsense);
        }
    }
    assert_eq!(i.objects().namespaces.len(), 2);
}

fn slice(name: &str, ready: bool, addresses: &[&str]) -> Value {
    json!({"metadata": {"namespace": "kube-system", "name": name}, "addressType": "IPv4",
        "endpoints": [{"addresses": addresses, "conditions": {"ready": ready}}],
        "ports": [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
            {"name": "metrics", "port": 9153, "protocol": "TCP"}]})
}

#[test]
fn the_cluster_says_where_it_is() {
    let base = Settings {
        cluster_prefixes: vec!["10.244.0.0/16".parse().unwrap()],
        cluster_dns: vec!["10.9.9.9:53".parse().unwrap()],
        ..Settings::default()
    };
    let mut i = Index::new(base.clone());
    let text = |i: &Index| {
        let s = &i.objects().settings;
        let prefixes: Vec<String> = s.cluster_prefixes.iter().map(ToString::to_string).collect();
        let dns: Vec<String> = s.cluster_dns.iter().map(ToString::to_string).collect();
        (prefixes.join(" "), dns.join(" "))
    };
    let cidr = json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16", "fd00:96::/112"]}});
    i.apply(Feed::ServiceCidrs, &cidr);
    let service = json!({"metadata": {"namespace": "kube-system", "name": "kube-dns"}, "spec": {"type": "ClusterIP",
        "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"], "ports": [{"port": 53, "protocol": "UDP"},
        {"port": 53, "protocol": "TCP"}, {"port": 9153, "protocol": "TCP"}]}});
    i.apply(Feed::DnsService, &service);
    let api = json!({"metadata": {"namespace": "default", "name": "kubernetes"},
        "endpoints": [{"addresses": ["192.0.2.1"]}], "ports": [{"port": 6443, "protocol": "TCP"}]});
    i.apply(Feed::ApiEndpoints, &api);
    assert_eq!(
        text(&i),
        ("10.96.0.0/16 10.244.0.0/16 192.0.2.1/32 fd00:96::/112".into(), "10.9.9.9:53 10.96.0.10:53".into())
    );
    assert_eq!(i.take_touched(), touched(true, &[], &[]));
    let servers = |i: &Index| i.dns_servers().iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    assert_eq!(servers(&i), "10.9.9.9:53 10.96.0.10:53", "without endpoints the Service is asked");

    i.apply(Feed::DnsEndpoints, &slice("a", true, &["10.244.0.2", "not-an-address"]));
    i.apply(Feed::DnsEndpoints, &slice("b", false, &["10.244.0.3"]));
    assert_eq!(servers(&i), "10.9.9.9:53 10.244.0.2:53", "only those that are ready");
    assert_eq!(text(&i).1, "10.9.9.9:53 10.96.0.10:53 10.244.0.2:53 10.244.0.3:53", "all of them are DNS");
    i.take_touched();
    // A slice is written often; what it says is the same.
    i.apply(Feed::DnsEndpoints, &slice("a", true, &["10.244.0.2"]));
    assert!(!i.is_touched());
    // A bad one keeps what it said.
    i.apply(Feed::ServiceCidrs, &json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["x"]}}));
    assert!(!i.is_touched() && !i.record(Feed::ServiceCidrs, "", "kubernetes").unwrap().good);

    for feed in [Feed::ServiceCidrs, Feed::DnsService, Feed::DnsEndpoints, Feed::ApiEndpoints] {
        i.restarted(feed, &BTreeSet::new());
    }
    assert_eq!(i.objects().settings, base);
}

#[test]
fn external_names_touch_no_policy() {
    let mut i = index();
    let service = |kind: &str, target: &str| json!({"metadata": {"namespace": "shop", "name": "db"}, "spec": {"type": kind, "externalName": target}});
    let target = |i: &Index| i.external_names().values().map(|n| n.as_str().to_owned()).collect::<Vec<_>>();
    i.apply(Feed::Services, &service("ExternalName", "DB.example.com"));
    assert_eq!(target(&i), ["db.example.com"]);
    let before = i.external_names().clone();
    i.apply(Feed::Services, &service("ExternalName", "db.example.com"));
    assert!(std::sync::Arc::ptr_eq(&before, i.external_names()));
    i.apply(Feed::Services, &service("ExternalName", "a b"));
    assert_eq!(target(&i), ["db.example.com"], "the last good one stays");
    i.take_touched();
    i.apply(Feed::Services, &service("ClusterIP", ""));
    assert!(target(&i).is_empty());
    assert_eq!(i.take_touched(), Touched { names: true, ..Touched::default() });
}

#[test]
fn names_of_services_are_told_with_where_they_lead() {
    let mut i = index();
    let service = |kind: &str, target: &str| json!({"metadata": {"namespace": "shop", "name": "db"}, "spec": {"type": kind, "externalName": target}});
    let mut says = |event: Option<Value>| {
        match event {
            Some(object) => i.apply(Feed::Services, &object),
            None => i.restarted(Feed::Services, &BTreeSet::new()),
        }
        let changed = i.take_touched().names;
        (i.objects().names.get("db.shop.svc").copied(), changed)
    };
    assert_eq!(says(Some(service("ClusterIP", ""))), (Some(Named::Inside), true));
    assert_eq!(says(Some(service("NodePort", ""))), (Some(Named::Inside), false));
    assert_eq!(says(Some(service("ExternalName", "a b"))), (Some(Named::Outside), true), "it may lead anywhere");
    assert_eq!(says(Some(service("ClusterIP", ""))), (Some(Named::Inside), true));
    assert_eq!(says(Some(service("ExternalName", "db.example.com"))), (Some(Named::Outside), true));
    assert_eq!(says(None), (None, true));

    // Only where one leads outside decides something.
    let mut deciding = |event: Option<Value>| {
        let before = i.changes();
        match event {
            Some(object) => i.apply(Feed::Services, &object),
            None => i.restarted(Feed::Services, &BTreeSet::new()),
        }
        (i.take_touched().names, i.changes() != before)
    };
    assert_eq!(deciding(Some(service("ClusterIP", ""))), (true, false));
    assert_eq!(deciding(None), (true, false));
    assert_eq!(deciding(Some(service("ExternalName", "db.example.com"))), (true, true));
    assert_eq!(deciding(Some(service("ExternalName", "dc.example.com"))), (true, true));
    assert_eq!(deciding(Some(service("ClusterIP", ""))), (true, true));
}

#[test]
fn what_was_assigned_comes_back() {
    let mut i = index();
    let egress = |name: &str, list: Value| {
        json!({"apiVersion": "tidegate.dev/v1alpha1", "kind": "NamespaceEgress",
            "metadata": {"namespace": "shop", "name": name}, "status": {"egress": list}})
    };
    let a = json!({"pool": "p", "ipv4": "203.0.113.10", "ipv6": "2001:db8::10"});
    i.apply(Feed::NamespaceEgresses, &egress("tidegate", json!([a, {"pool": "default"}])));
    let pair = i.objects().assigned[&("shop".to_owned(), "p".to_owned())];
    assert_eq!(pair.ipv4, Some([203, 0, 113, 10].into()));
    assert!(pair.ipv6.is_some() && i.objects().assigned.len() == 1, "a pool without addresses has no pair");
    assert_eq!(i.take_touched(), touched(false, &["shop"], &[]));
    i.apply(Feed::NamespaceEgresses, &egress("tidegate", json!([a])));
    i.apply(Feed::NamespaceEgresses, &egress("somebody", json!([{"pool": "q", "ipv4": "203.0.113.11"}])));
    i.apply(Feed::NamespaceEgresses, &egress("tidegate", json!([{"pool": "p", "ipv4": "x"}])));
    assert!(!i.is_touched() && i.objects().assigned.len() == 1);
    i.apply(Feed::NamespaceEgresses, &egress("tidegate", json!([{"pool": "q", "ipv4": "203.0.113.11"}])));
    assert_eq!(i.objects().assigned.keys().map(|(_, p)| p.as_str()).collect::<Vec<_>>(), ["q"]);
    i.delete(Feed::NamespaceEgresses, &egress("somebody", json!([])));
    assert_eq!(i.objects().assigned.len(), 1);
    i.delete(Feed::NamespaceEgresses, &egress("tidegate", json!([])));
    assert!(i.objects().assigned.is_empty());
}

#[test]
fn the_order_of_objects_does_not_matter() {
    let mut all: Vec<(Feed, Value)> = vec![
        (Feed::EgressPools, json!({"metadata": {"name": "p"}, "spec": {"source": "PodNetwork"}})),
        (Feed::DnsEndpoints, slice("a", true, &["10.244.0.2"])),
        (Feed::DnsEndpoints, slice("b", true, &["10.244.0.1"])),
    ];
    for n in 0..20 {
        let ns = format!("ns-{n}");
        all.push((Feed::Namespaces, namespace(&ns, &ns, json!({"tidegate.dev/allow": format!("{n}.example")}))));
        all.push((Feed::Pods, pod(&ns, "a", &ns, &[&format!("10.0.0.{n}")])));
        all.push((Feed::EgressPolicies, policy(&format!("p{n}"), &ns, 1, 400 + n)));
    }
    let fed = |all: &mut dyn Iterator<Item = &(Feed, Value)>| {
        let mut i = index();
        all.for_each(|(feed, o)| i.apply(*feed, o));
        i
    };
    let (a, b) = (fed(&mut all.iter()), fed(&mut all.iter().rev()));
    assert_eq!(format!("{:?}", a.objects()), format!("{:?}", b.objects()));
    assert_eq!(a.dns_servers(), b.dns_servers());
    assert_eq!(a.objects().pods.len(), 20);
}

#[test]
fn pods_that_kubelets_make_or_that_end_get_nothing_of_others() {
    let pod = |name: &str, node: &str, metadata: Value| {
        let mut o = json!({"metadata": {"namespace": "shop", "name": name, "uid": name}, "spec": {"nodeName": node},
            "status": {"phase": "Running", "podIP": "10.244.1.7"}});
        o["metadata"].as_object_mut().unwrap().extend(metadata.as_object().unwrap().clone());
        o
    };
    let node = |name: &str, net: &str| json!({"metadata": {"name": name, "uid": name}, "spec": {"podCIDRs": [net]}});
    let policy = json!({"metadata": {"namespace": "shop", "name": "p", "uid": "p"}, "spec": {"podSelector": {}, "egress": [
        {"toFQDNs": [{"matchName": "a.example"}], "toPorts": [{"protocol": "TCP", "port": 443}]}]}});
    let index = |mirrors: bool| {
        let mut i = Index::new(Settings { trust_mirror_pods: mirrors, ..Settings::default() });
        i.apply(Feed::EgressPolicies, &policy);
        // Of another group than the others.
        let mut more = policy.clone();
        (more["metadata"]["name"], more["spec"]["podSelector"]) = (json!("q"), json!({"matchLabels": {"app": "new"}}));
        i.apply(Feed::EgressPolicies, &more);
        i
    };
    let holder = |i: &Index| {
        let w = World::compile(i.objects(), UnixSeconds(1000), None);
        let e = w.endpoint("10.244.1.7".parse().unwrap()).unwrap();
        (e.who.pod.to_string(), e.touch == Touch::Isolated, e.member.is_some())
    };
    let is = |name: &str, has: bool| (name.to_owned(), true, has);
    // The annotation of a pod that a kubelet makes.
    let mirror = pod("static", "n1", json!({"annotations": {"kubernetes.io/config.mirror": "5f3a", "other": "x"}}));
    for trusted in [false, true] {
        let mut i = index(trusted);
        i.apply(Feed::Pods, &mirror);
        assert_eq!(holder(&i), is("static", trusted));
        let problems = &i.record(Feed::Pods, "shop", "static").unwrap().problems;
        assert!(problems[0].to_string().contains("kubelet made it"), "{problems:?}");
    }
    // The address is of the range of the node whose pod ends: no other node's pod gets it, another one of that node does.
    let ends = json!({"deletionTimestamp": "2026-01-01T00:00:00Z", "deletionGracePeriodSeconds": 30});
    for (next, has) in [("n1", "new"), ("n2", "old")] {
        let mut i = index(false);
        i.apply(Feed::Pods, &pod("old", "n1", json!({})));
        i.apply(Feed::Pods, &pod("new", next, json!({"labels": {"app": "new"}})));
        assert!(!holder(&i).2, "in doubt");
        i.apply(Feed::Nodes, &node("n1", "10.244.1.0/24"));
        i.apply(Feed::Nodes, &node("n2", "10.244.2.0/24"));
        i.apply(Feed::Pods, &pod("old", "n1", ends.clone()));
        assert_eq!(holder(&i), is(has, true));
    }
}

#[test]
fn an_address_that_two_nodes_claim_is_the_older_ones() {
    let node = |name: &str, created: &str, addresses: &[&str]| {
        let all: Vec<_> = addresses.iter().map(|a| json!({"type": "InternalIP", "address": a})).collect();
        json!({"metadata": {"name": name, "uid": name, "creationTimestamp": created}, "status": {"addresses": all}})
    };
    let old = node("z-old", "2025-01-01T00:00:00Z", &["192.0.2.1"]);
    let stolen = node("a-stolen", "2026-01-01T00:00:00Z", &["192.0.2.2", "192.0.2.1"]);
    let twin = node("b-twin", "2025-01-01T00:00:00Z", &["192.0.2.3"]);
    let other = node("c-twin", "2025-01-01T00:00:00Z", &["192.0.2.3"]);
    let timeless = json!({"metadata": {"name": "a", "uid": "a"}, "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.3"}]}});
    let all = [&old, &stolen, &twin, &other, &timeless];
    let of =
        |i: &Index, name: &str| i.objects().nodes[name].addresses.iter().map(ToString::to_string).collect::<Vec<_>>();
    for order in [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [1, 3, 0, 4, 2]] {
        let mut i = Index::new(Default::default());
        order.iter().for_each(|n| i.apply(Feed::Nodes, all[*n]));
        let got = ["z-old", "a-stolen", "b-twin", "c-twin", "a"].map(|n| of(&i, n).join(" "));
        assert_eq!(got, ["192.0.2.1", "192.0.2.2", "192.0.2.3", "", ""]);
        let told = &i.contested()["a-stolen"];
        assert_eq!(told, &["status.addresses: 192.0.2.1 does not count: it is the older node z-old's"]);
        assert_eq!(i.contested().len(), 3);
        // The older one goes: then it counts, and whoever depends on it is looked at.
        i.take_touched();
        let noted = i.noted();
        i.delete(Feed::Nodes, &old);
        assert_eq!(of(&i, "a-stolen"), ["192.0.2.2", "192.0.2.1"]);
        assert!(i.take_touched().nodes && i.noted() > noted && !i.contested().contains_key("a-stolen"));
        // Back, and it is the youngest now.
        i.apply(Feed::Nodes, &node("z-old", "2027-01-01T00:00:00Z", &["192.0.2.1"]));
        assert_eq!(of(&i, "z-old"), Vec::<String>::new());
    }
}
