//! What the lab writes for the product is what the product's own reader takes.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use tidegate_api::{Reader, Severity};
use tidegate_lab::Scenario;
use tidegate_lab::product::{self, Layout};
use tidegate_policy::model::UnixSeconds;
use tidegate_policy::{Name, Proto, World};

#[test]
fn the_demos_manifests_have_no_errors() {
    let scenario = Scenario::load(concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/demo.yaml").as_ref()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let layout = Layout { folder: folder.path().into() };
    layout.create().unwrap();
    product::write(&scenario, &layout).unwrap();
    let loaded = Reader::new(layout.manifests()).reload();
    let errors: Vec<String> = loaded
        .problems
        .iter()
        .filter(|p| matches!(p.severity, Severity::Error | Severity::Refused))
        .map(|p| format!("{p:?}"))
        .collect();
    assert!(errors.is_empty(), "{}", errors.join("\n"));
    let objects = &loaded.objects;
    assert_eq!(objects.namespaces.len(), scenario.namespaces.len());
    assert_eq!(objects.pods.len(), scenario.pods.len());
    assert_eq!(objects.nodes.len(), scenario.nodes.len());
    assert_eq!(objects.pools.len(), scenario.pools.len());
    assert_eq!((objects.policies.len(), objects.cluster_policies.len()), (4, 7));
}

/// The policies alone, before any packet: what the story expects of names and connections is what the product's
/// pure core decides.
#[test]
fn the_demos_policies_decide_as_the_story_tells() {
    let scenario = Scenario::load(concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/demo.yaml").as_ref()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let layout = Layout { folder: folder.path().into() };
    layout.create().unwrap();
    product::write(&scenario, &layout).unwrap();
    let mut objects = Reader::new(layout.manifests()).reload().objects;
    objects.settings.exempt_namespaces = vec!["kube-system".into(), "tidegate-system".into()];
    let world = World::compile(&objects, UnixSeconds(1_800_000_000), None);
    let group = |pod: &str| world.group_of(scenario.pod(pod).unwrap().addresses()[0]);

    let names = [
        ("shop/web", "api.example.com", "Bind allowed"),
        ("shop/web", "other.example.org", "NxDomain name-not-allowed"),
        ("shop/web", "many.example.net", "NoData"),
        ("shop/web", "x.one.example.net", "Bind"),
        ("shop/web", "x.y.one.example.net", "NxDomain"),
        ("shop/web", "x.y.many.example.net", "Bind"),
        ("shop/web", "old.many.example.net", "NoData denied-by-policy"),
        ("shop/web", "granted.example.com", "Bind"),
        ("shop/web", "blocked.example.com", "NxDomain denied-by-policy"),
        ("shop/web", "passed.example.com", "Bind"),
        ("shop/web", "tie.example.com", "NxDomain denied-by-policy"),
        ("shop/web", "base.example.com", "NxDomain name-not-allowed"),
        ("managed/app", "base.example.com", "Bind"),
        ("managed/app", "api.example.com", "NxDomain"),
        ("annotated/app", "www.example.com", "NxDomain"),
        ("capped/app", "api.example.net", "NxDomain above-ceiling"),
        ("guarded/app", "secret.example.org", "NoData denied-by-policy"),
        ("guarded/app", "other.example.org", "Resolve allowed"),
        ("billing/pay", "bank.example.com", "Bind"),
        ("shop/batch", "other.example.org", "Bind allowed"),
    ];
    let mut wrong = Vec::new();
    for (pod, name, want) in names {
        let decision = group(pod).unwrap().name(name, 1);
        let got = format!("{:?} {}", decision.answer, decision.reason);
        if !got.starts_with(want) {
            wrong.push(format!("{pod} {name}: {got}, not {want}"));
        }
    }
    let connections = [
        ("shop/web", Some("api.example.com"), "198.51.100.10", Proto::Tcp, 443, "Allow(Tls)"),
        ("shop/web", Some("api.example.com"), "198.51.100.10", Proto::Udp, 443, "Allow(Block)"),
        ("shop/web", Some("api.example.com"), "198.51.100.10", Proto::Tcp, 8443, "Deny not-allowed"),
        ("shop/web", Some("tcp.example.com"), "198.51.100.12", Proto::Tcp, 7000, "Allow(Forward)"),
        ("shop/web", Some("udp.example.com"), "198.51.100.13", Proto::Udp, 7001, "Allow(Forward)"),
        ("shop/web", Some("tcp.example.com"), "198.51.100.12", Proto::Tcp, 853, "Deny encrypted-dns"),
        ("shop/worker", None, "192.0.2.200", Proto::Tcp, 5432, "Allow(Forward)"),
        ("shop/worker", None, "192.0.2.200", Proto::Tcp, 7009, "Allow(Forward)"),
        ("shop/worker", None, "192.0.2.50", Proto::Tcp, 5432, "Deny not-allowed"),
        ("shop/worker", None, "192.0.2.7", Proto::Tcp, 7000, "Deny not-allowed"),
        ("shop/worker", None, "192.0.2.66", Proto::Tcp, 7000, "Deny denied-by-policy"),
        ("shop/worker", None, "192.0.2.66", Proto::Tcp, 7001, "Allow(Forward)"),
        ("shop/worker", None, "2001:db8:200::8200", Proto::Tcp, 5432, "Allow(Forward)"),
        ("shop/worker", None, "2001:db8:200::66", Proto::Tcp, 7000, "Deny denied-by-policy"),
        ("shop/worker", None, "169.254.169.254", Proto::Tcp, 80, "Deny metadata"),
        ("annotated/app", None, "2001:db8:200::40", Proto::Tcp, 7001, "Allow(Forward)"),
        ("annotated/app", None, "192.0.2.40", Proto::Tcp, 7009, "Deny not-allowed"),
        ("annotated/app", Some("tcp.example.com"), "198.51.100.12", Proto::Tcp, 7000, "Allow(Forward)"),
        ("capped/app", Some("api.example.com"), "198.51.100.10", Proto::Tcp, 443, "Allow(Tls)"),
        ("capped/app", Some("api.example.com"), "198.51.100.10", Proto::Tcp, 8443, "Deny above-ceiling"),
        ("guarded/app", None, "192.0.2.66", Proto::Tcp, 7000, "Deny denied-by-policy"),
        ("guarded/app", None, "192.0.2.67", Proto::Tcp, 7000, "Pass"),
    ];
    for (pod, name, ip, proto, port, want) in connections {
        let name = name.map(|n| Name::parse(n).unwrap());
        let decision = group(pod).unwrap().connection(name.as_ref(), ip.parse().unwrap(), proto, port);
        let got = format!("{:?} {}", decision.via, decision.reason);
        if !got.starts_with(want) {
            wrong.push(format!("{pod} {name:?} {ip} {proto:?} {port}: {got}, not {want}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(group("untouched/app").is_none());
    assert!(group("audited/app").unwrap().audit());
}
