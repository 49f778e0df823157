//! The documentation: every manifest of it loads, compiles and does what it says, and its numbers are those that hold.
// Helpers of tests may panic as the tests themselves do.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use tidegate_api::{Reader, Severity, annotation, convert, rule};
use tidegate_policy::model::{Objects, Pod, UnixSeconds};
use tidegate_policy::world::{Answer, Group};
use tidegate_policy::{Carry, Name, Proto, Via, World};

/// Before the dates of the examples.
const NOW: UnixSeconds = UnixSeconds(1_790_000_000);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The manifests that a page shows.
fn blocks(text: &str) -> Vec<&str> {
    let all = text.split("```yaml\n").skip(1).filter_map(|b| b.split("```").next());
    all.filter(|b| b.contains("apiVersion: tidegate.dev") || b.contains("tidegate.dev/allow")).collect()
}

/// Every manifest of the documentation, with where it stands.
fn manifests() -> Vec<(String, String)> {
    let mut out = Vec::new();
    for folder in ["", "docs", "docs/examples"] {
        for entry in std::fs::read_dir(root().join(folder)).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            let read = || std::fs::read_to_string(&path).unwrap();
            match path.extension().and_then(|e| e.to_str()) {
                Some("md") => out.extend(blocks(&read()).into_iter().map(|b| (name.clone(), b.to_owned()))),
                Some("yaml") if folder == "docs/examples" => out.push((name, read())),
                _ => {}
            }
        }
    }
    out
}

fn load(text: &str) -> (Objects, Vec<String>) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.yaml"), text).unwrap();
    let loaded = Reader::new(dir.path()).reload();
    let said = loaded.problems.iter().filter(|p| p.severity != Severity::Note).map(ToString::to_string).collect();
    (loaded.objects, said)
}

fn pod(o: &mut Objects, namespace: &str, labels: &BTreeMap<String, String>) -> IpAddr {
    let ip = IpAddr::from([10, 0, 0, o.pods.len() as u8 + 1]);
    let pod = Pod {
        node: "n1".into(),
        addresses: vec![ip],
        labels: labels.clone(),
        host_network: false,
        ending: false,
        mirror: false,
    };
    o.pods.insert((namespace.to_owned(), format!("p{ip}")), pod);
    ip
}

#[test]
fn every_manifest_loads_and_compiles_to_what_it_says() {
    let all = manifests();
    assert!(all.len() >= 12, "{}", all.len());
    for (place, text) in &all {
        let (mut o, said) = load(text);
        assert_eq!(said, Vec::<String>::new(), "{place}: {text}");
        // A pod for each policy, selected by it.
        let own: Vec<_> =
            o.policies.iter().map(|((ns, n), p)| (ns.clone(), n.clone(), p.pod_selector.labels.clone())).collect();
        let mut subjects = Vec::new();
        for (namespace, name, labels) in own {
            subjects.push((pod(&mut o, &namespace, &labels), "EgressPolicy", name));
        }
        let cluster: Vec<_> = o.cluster_policies.iter().map(|(n, p)| (n.clone(), p.clone())).collect();
        for (name, p) in cluster {
            let ns = o.namespaces.entry(format!("for-{name}")).or_default();
            ns.labels.clone_from(&p.namespaces.labels);
            subjects.push((pod(&mut o, &format!("for-{name}"), &p.pods.labels), "ClusterEgressPolicy", name));
        }
        for namespace in o.namespaces.clone().into_iter().filter(|(_, ns)| ns.has_allow).map(|(n, _)| n) {
            subjects.push((pod(&mut o, &namespace, &BTreeMap::new()), "Namespace", namespace));
        }
        // Pools that stand elsewhere.
        let pools: Vec<String> = o
            .policies
            .values()
            .filter_map(|p| p.pool.clone())
            .chain(o.namespaces.values().filter_map(|n| n.pool.clone()))
            .collect();
        for pool in pools {
            o.pools.entry(pool).or_insert_with(|| tidegate_policy::model::Pool {
                allowed_namespaces: Some(Default::default()),
                source: tidegate_policy::model::AddressSource::PodNetwork,
                gateway_nodes: None,
            });
        }
        let world = World::compile(&o, NOW, None);
        assert_eq!(world.issues(), [], "{place}: {text}");
        for (ip, kind, name) in subjects {
            let group = world.group_of(ip).unwrap_or_else(|| panic!("{place}: nothing concerns {ip}"));
            let has = group.policies().any(|p| p.kind == kind && *p.name == *name);
            assert!(has, "{place}: {kind} {name} does not select its pod");
        }
    }
}

#[test]
fn the_examples_do_what_they_say() {
    let example = |name: &str| std::fs::read_to_string(root().join("docs/examples").join(name)).unwrap();
    let group = |text: &str, namespace: &str, labels: &[(&str, &str)], space: &[(&str, &str)]| {
        let owned =
            |l: &[(&str, &str)]| l.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<BTreeMap<_, _>>();
        let (mut o, _) = load(text);
        o.namespaces.entry(namespace.to_owned()).or_default().labels.extend(owned(space));
        let ip = pod(&mut o, namespace, &owned(labels));
        World::compile(&o, NOW, None).group_of(ip).unwrap().clone()
    };
    let to = |g: &Group, name: &str, port: u16| {
        g.connection(Some(&Name::parse(name).unwrap()), "203.0.113.1".parse().unwrap(), Proto::Tcp, port).via
    };
    let by_ip = |g: &Group, ip: &str, port: u16| g.connection(None, ip.parse().unwrap(), Proto::Tcp, port).via;
    let (tls, forward) = (Via::Allow(Carry::Tls), Via::Allow(Carry::Forward));

    let g = group(&example("github.yaml"), "build", &[], &[]);
    assert_eq!(
        (to(&g, "api.github.com", 443), to(&g, "github.com", 22), to(&g, "api.github.com", 22)),
        (tls, forward, Via::Deny)
    );
    let g = group(&example("postgresql.yaml"), "shop", &[("app", "orders")], &[]);
    let db = "orders.cluster-abc.eu-central-1.rds.amazonaws.com";
    assert_eq!((to(&g, db, 5432), to(&g, db, 443)), (forward, Via::Deny));
    let g = group(&example("registries.yaml"), "build", &[("app", "builder")], &[]);
    assert_eq!(
        (to(&g, "ghcr.io", 443), to(&g, "europe-docker.pkg.dev", 443), to(&g, "pkg.dev", 443)),
        (tls, tls, Via::Deny)
    );
    let g = group(&example("stripe.yaml"), "shop", &[("app", "checkout")], &[]);
    assert_eq!(
        (to(&g, "api.stripe.com", 443), to(&g, "stripe.com", 443), &**g.scope().pool()),
        (tls, Via::Deny, "payments")
    );
    assert!(g.scope().pair().is_some_and(|p| p.ipv4.is_some() && p.ipv6.is_some()));
    let g = group(&example("rollout.yaml"), "billing", &[], &[]);
    assert!(g.audit());
    assert_eq!(
        (to(&g, "a.b.cdn.example.com", 443), by_ip(&g, "203.0.113.9", 8443), by_ip(&g, "203.0.113.9", 443)),
        (tls, forward, Via::Deny)
    );
    let g = group(&example("workload-identity.yaml"), "jobs", &[], &[("tidegate.example/workload-identity", "true")]);
    assert_eq!((by_ip(&g, "169.254.169.254", 80), by_ip(&g, "169.254.170.23", 80)), (Via::Pass, Via::Pass));
    // Guardrails: paste sites never, and a namespace grants itself names on 443 alone.
    let own = "---\napiVersion: tidegate.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {name: own, namespace: web}\nspec:\n  podSelector: {}\n  \
               egress:\n  - toFQDNs: [{matchPattern: '**.example.com'}, {matchName: pastebin.com}]\n    toPorts: [{protocol: TCP, port: 443}, {protocol: TCP, port: 8443}]\n  \
               - toCIDRs: [{cidr: 203.0.113.0/24}]\n    toPorts: [{protocol: TCP, port: 443}]\n";
    let g = group(&(example("guardrails.yaml") + own), "web", &[], &[("env", "prod")]);
    assert_eq!(
        (to(&g, "a.example.com", 443), to(&g, "a.example.com", 8443), to(&g, "pastebin.com", 443)),
        (tls, Via::Deny, Via::Deny)
    );
    assert_eq!((by_ip(&g, "203.0.113.9", 443), g.name("x.pastebin.com", 1).answer), (Via::Deny, Answer::NxDomain));
}

#[test]
fn documented_numbers_are_those_that_hold() {
    let text = std::fs::read_to_string(root().join("docs/policy.md")).unwrap();
    let says = |what: String| assert!(text.contains(&what), "docs/policy.md does not say `{what}`");
    says(format!("| `egress` | list of rules, at most {} | none |", convert::MAX_RULES));
    says(format!("| `egressDeny` | list of rules, at most {} | none |", convert::MAX_RULES));
    says(format!(
        "`matchLabels` (at most {}) and `matchExpressions` (at most {0}, each with at most {} `values`;",
        convert::MAX_SELECTOR,
        convert::MAX_SELECTOR_VALUES
    ));
    says(format!("| `toFQDNs` | list, 1 to {} |", rule::MAX_FQDNS));
    says(format!(
        "| `toCIDRs` | list, 1 to {} | | prefixes: `cidr`, and `except` (at most {}, each",
        rule::MAX_CIDRS,
        rule::MAX_EXCEPT
    ));
    says(format!("| `toFQDNs` | list, at most {} | no names |", rule::MAX_FQDNS));
    says(format!("| `toCIDRs` | list, at most {} | no prefixes |", rule::MAX_CIDRS));
    says(format!("| `toPorts` | list, 1 to {} | required |", rule::MAX_PORTS));
    says(format!("| `toPorts` | list, 1 to {} | any port |", rule::MAX_PORTS));
    says(format!("| `dnsTypes` | list, 1 to {} | none |", rule::MAX_DNS_TYPES));
    says(format!("| `privateAddresses` | list of prefixes, 1 to {} | none |", rule::MAX_PRIVATE));
    says(format!("| `minBindingSeconds` | integer, 0 to {}, seconds | 0 |", rule::MAX_MIN_BINDING));
    says(format!("| `priority` | integer, 0 to {} | required |", convert::MAX_PRIORITY));
    says(format!("| `static.addresses` | list, 1 to {} |", convert::MAX_PAIRS));
    says(format!("| `externalAddresses` | list of addresses or prefixes, at most {} |", convert::MAX_EXTERNAL));
    says(format!(
        "At most {} items and {} KiB ({} octets)",
        annotation::MAX_ITEMS,
        annotation::MAX_ALLOW / 1024,
        annotation::MAX_ALLOW
    ));
    says(format!("(at most {} deep)", tidegate_api::MAX_DEPTH));
    says(format!(
        "Limits: {} files, {} MiB and {} documents per file",
        tidegate_api::MAX_FILES,
        tidegate_api::MAX_FILE >> 20,
        tidegate_api::MAX_DOCUMENTS
    ));
}
