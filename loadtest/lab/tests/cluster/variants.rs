//! Clusters that are set up in other ways, each as people install Tidegate there: something allowed, something denied, and nothing left.

use std::net::IpAddr;
use std::time::Duration;

use serde_json::Value;
use tidegate_lab::Lab;
use tidegate_lab::family::Family;
use tidegate_lab::lab::wait_for;
use tidegate_lab::probe::curl;
use tidegate_lab::scenario::{Cni, Scenario};

use crate::install::{SYSTEM, gateways, node, source, typed};

/// How long an edit may take to hold everywhere.
const EDIT: Duration = Duration::from_secs(20);

/// Addresses of a pod.
fn addresses(lab: &Lab, namespace: &str, pod: &str) -> Vec<IpAddr> {
    let pod: Value = lab.object(&["pod", "--namespace", namespace, pod]).unwrap();
    let ips = pod["status"]["podIPs"].as_array().unwrap().iter();
    ips.map(|ip| ip["ip"].as_str().unwrap().parse().unwrap()).collect()
}

/// The address that the world sees of what a pod on a node sends by itself.
fn own(lab: &Lab, namespace: &str, pod: &str, on: &str, family: Family) -> IpAddr {
    if lab.scenario().masquerade {
        return node(lab, on, family);
    }
    let all = addresses(lab, namespace, pod);
    *all.iter().find(|ip| Family::of(**ip) == family).unwrap_or_else(|| panic!("{namespace}/{pod}: {all:?}"))
}

/// The whole of it in the cluster of `loadtest/scenarios/clusters/NAME.yaml`.
fn holds(name: &str) {
    let file = crate::root().join("loadtest/scenarios/clusters").join(name).with_extension("yaml");
    let scenario = Scenario::load(&file).unwrap();
    let lab = crate::up(scenario, name);
    let families = lab.scenario().families.clone();
    for namespace in ["shop", "untouched"] {
        lab.host_kubectl(&["create", "namespace", namespace], "").unwrap();
    }
    let pods = [("shop/one", "node-1"), ("shop/two", "node-2"), ("untouched/one", "node-1")];
    lab.make_clients(&pods).unwrap();
    let untouched = |when: &str| {
        for &family in &families {
            let seen = source(&lab, "untouched/one", family, "other.example.org");
            assert_eq!(seen, Some(own(&lab, "untouched", "one", "node-1", family)), "{when}: {family:?}");
        }
    };
    untouched("before");

    let more = if lab.scenario().hosts.cni == Cni::Bridge { " --set agent.config.interfaces=Bridge" } else { "" };
    let install = format!("helm install tidegate helm/tidegate --namespace {SYSTEM} --create-namespace --wait{more}");
    typed(&lab, &install);
    typed(&lab, "kubectl annotate namespace shop tidegate.dev/allow=api.example.com");
    let gateways = gateways(&lab);
    for (pod, _) in &pods[..2] {
        for &family in &families {
            let denied = || source(&lab, pod, family, "other.example.org").is_none().then_some(());
            assert!(wait_for(EDIT, denied).is_some(), "{pod} {family:?}: nothing is denied");
            let seen = curl(&lab.cluster_pod(pod), family, "https://api.example.com/", &[]);
            let by: Vec<IpAddr> = gateways.iter().map(|(pod, on)| own(&lab, SYSTEM, pod, on, family)).collect();
            assert!(seen.source().is_some_and(|s| by.contains(&s)), "{pod} {family:?}: {}; {by:?}", seen.text());
            // By the address that only others have resolved.
            let other = lab.scenario().internet.names.iter().find(|n| n.name == "other.example.org").unwrap();
            let pinned =
                format!("other.example.org:443:{}", family.pick::<IpAddr>(other.ipv4[0].into(), other.ipv6[0].into()));
            let seen = curl(&lab.cluster_pod(pod), family, "https://other.example.org/", &["--resolve", &pinned]);
            assert_eq!(seen.source(), None, "{pod} {family:?}: {}", seen.text());
        }
        // In-cluster traffic goes its own way, by service and node.
        let api = curl(&lab.cluster_pod(pod), families[0], "https://kubernetes.default/version", &["--insecure"]);
        assert!(api.body["gitVersion"].is_string(), "{pod}: {}", api.text());
    }
    untouched("with Tidegate");

    typed(&lab, &format!("helm uninstall tidegate --namespace {SYSTEM} --wait"));
    for (pod, on) in &pods[..2] {
        for &family in &families {
            let own = Some(own(&lab, "shop", pod.split_once('/').unwrap().1, on, family));
            let as_before = || (source(&lab, pod, family, "other.example.org") == own).then_some(());
            assert!(wait_for(EDIT, as_before).is_some(), "{pod} {family:?}: not as before");
        }
    }
    untouched("after");
    crate::down(lab);
}

#[test]
fn a_bridge_without_masquerade_behind_iptables() {
    holds("bridge-routed");
}

#[test]
fn ipv6_alone() {
    holds("ipv6");
}

#[test]
#[ignore = "make test-cluster-variants"]
fn a_bridge() {
    holds("bridge");
}

#[test]
#[ignore = "make test-cluster-variants"]
fn pods_with_addresses_of_their_own() {
    holds("routed");
}

#[test]
#[ignore = "make test-cluster-variants"]
fn iptables() {
    holds("iptables");
}

#[test]
#[ignore = "make test-cluster-variants"]
fn ipv4_alone() {
    holds("ipv4");
}
