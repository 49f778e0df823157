//! Which values the chart takes, and what it makes of them.

use std::fs;
use std::process::Command;
use std::sync::Arc;

use serde_json::{Value, json};
use tidegate_kube::{Api, Cluster};

use crate::common::{NAMESPACE, chart, documents, find, helm, root, run, template, tidegate};
use crate::schemas::Schemas;

/// Values that somebody may install with. Together they set every value of values.yaml.
const MATRIX: &[(&str, &str)] = &[
    ("defaults", "{}"),
    ("one gateway", "gateway: {replicas: 1, config: {drainSeconds: 0}}"),
    ("many gateways", "gateway: {replicas: 64, podDisruptionBudget: false, spreadOverZones: false}"),
    (
        "image by digest",
        "image: {repository: 'localhost:5000/a/tidegate', digest: 'sha256:0000000000000000000000000000000000000000000000000000000000000000', pullPolicy: Always, pullSecrets: [a, b]}",
    ),
    ("image by tag", "image: {tag: v9.9.9_x, pullPolicy: Never}"),
    (
        "bridge network",
        "agent: {config: {interfaces: Bridge, uplinks: [eth0, bond0.7], tunnelMtu: 1400, unknownPods: Drop}}\ntunnelPort: 8999",
    ),
    (
        "marks",
        "agent: {config: {mark: {value: 0x10, mask: 0xf0}, overlayPorts: [], flowsPerEndpoint: 16, fullPassSeconds: 3600}, adminPort: 9999}",
    ),
    (
        "strict cluster",
        "gateway: {config: {clusterDefault: Isolated, mirrorPods: Trusted, dnsFilter: Open, ping: true, exemptNamespaces: [], flowIdleSeconds: 60, fullPassSeconds: 1, device: net0, drainSeconds: 3600}}",
    ),
    (
        "resolvers",
        "gateway: {config: {resolvers: [{servers: ['192.0.2.53:53', '[2001:db8::53]:53'], protocol: Tcp}, {servers: ['192.0.2.54:5353'], suffixes: [corp.example, a.b]}]}}",
    ),
    (
        "cluster",
        "clusterDns: {namespace: openshift-dns, service: dns-default}\ngateway: {config: {cluster: {prefixes: [10.0.0.0/8, 'fd00::/8'], dns: ['10.0.0.10:53'], suffixes: [k8s.example, cluster.local], nodePorts: {first: 1, last: 1}}}}",
    ),
    (
        "bounds",
        "gateway: {config: {dns: {ttlMinSeconds: 0, ttlMaxSeconds: 0, graceSeconds: 0, barrierMillis: 5000}, quotas: {facts: 1, names: 1, addressesPerName: 1, queriesInFlight: 1, connections: 14115}, capacities: {endpoints: 1024, facts: 16777216, grants: 1024, portsets: 1024, prefixes: 1024, flows: 16777216}}}\nagent: {config: {capacities: {endpoints: 1024, facts: 16777216, grants: 1024, portsets: 1024, prefixes: 1024, flows: 16777216}}}",
    ),
    (
        "placed",
        "gateway: &p {nodeSelector: {tidegate.dev/gateway: 'true'}, tolerations: [{key: gateway, operator: Exists, effect: NoSchedule}], priorityClassName: high, resources: {requests: {cpu: 2, memory: 1Gi}, limits: {cpu: 4, memory: 4Gi}}, podAnnotations: {a.b/c: d}, podLabels: {team: net}, env: {TIDEGATE_LOG: debug}}\nagent: *p",
    ),
    (
        "affinity",
        "gateway: {affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: a, operator: Exists}]}]}}, podAntiAffinity: {requiredDuringSchedulingIgnoredDuringExecution: [{topologyKey: rack, labelSelector: {}}]}}, seccompProfile: {type: Unconfined}}",
    ),
    (
        "monitoring",
        "metrics: {serviceMonitor: {enabled: true, interval: 10s, labels: {release: prometheus}}, agents: true, alerts: {enabled: true, labels: {release: prometheus}}, dashboard: {enabled: true, labels: {grafana: x, grafana_dashboard: 'yes'}}}",
    ),
    ("monitoring without agents", "metrics: {serviceMonitor: {enabled: true}}"),
    ("the plugin elsewhere", "cni: {binDir: /var/lib/cni/bin, confDir: /etc/rancher/cni}"),
    ("no plugin", "cni: {enabled: false}"),
    ("startup taint", "agent: {startupTaint: true}"),
    (
        "kept labels",
        "access: {protectNamespaces: false, protectDeletion: false, protectedLabels: [team, example.com/zone]}",
    ),
    ("kept labels and annotations", "access: {protectedLabels: [team]}"),
    (
        "identity",
        "identity: {secret: own-ca, trust: own-trust, audience: egress.example, certificateSeconds: 3, authoritySeconds: 9, overlapSeconds: 0}\napi: {enabled: true, port: 9443}",
    ),
    ("given authority", "identity: {given: true, secret: corp-ca}"),
    (
        "cert-manager",
        "identity: {certManager: {enabled: true, issuerRef: {name: corp, kind: Issuer, group: pki.example}, duration: 720h, renewBefore: 240h30m}}",
    ),
    (
        "nothing extra",
        "access: {aggregate: false, protectNamespaces: false}\ncrds: {install: false}\nuninstall: {cleanUp: false}",
    ),
    ("uninstall", "uninstall: {cleanUp: true, timeoutSeconds: 3600}"),
];

/// Values that contradict themselves or are none, with words of the refusal: it names the value.
const REFUSED: &[(&str, &[&str])] = &[
    ("cni: {binDir: opt/cni/bin}", &["cni/binDir"]),
    ("surprise: 1", &["surprise"]),
    ("gateway: {config: {surprise: 1}}", &["gateway.config", "surprise"]),
    ("agent: {config: {gateways: []}}", &["agent.config", "gateways"]),
    ("gateway: {config: {kubernetes: {}}}", &["gateway.config", "kubernetes"]),
    ("gateway: {replicas: 0}", &["gateway.replicas", "1"]),
    ("gateway: {replicas: two}", &["gateway.replicas", "integer"]),
    ("gateway: {config: {clusterDefault: isolated}}", &["gateway.config.clusterDefault", "Isolated"]),
    ("gateway: {config: {resolvers: [{servers: ['192.0.2.53']}]}}", &["gateway.config.resolvers.0.servers.0"]),
    ("gateway: {config: {resolvers: [{servers: []}]}}", &["gateway.config.resolvers.0.servers"]),
    ("gateway: {config: {cluster: {prefixes: ['10.0.0.1']}}}", &["gateway.config.cluster.prefixes.0"]),
    ("gateway: {config: {cluster: {suffixes: []}}}", &["gateway.config.cluster.suffixes"]),
    ("gateway: {config: {flowIdleSeconds: 59}}", &["gateway.config.flowIdleSeconds", "60"]),
    ("gateway: {config: {quotas: {connections: 14116}}}", &["gateway.config.quotas.connections", "14,115"]),
    ("gateway: {config: {capacities: {facts: 1023}}}", &["gateway.config.capacities.facts", "1,024"]),
    ("gateway: {config: {device: a-name-that-is-too-long}}", &["gateway.config.device"]),
    (
        "gateway: {config: {dns: {ttlMinSeconds: 61, ttlMaxSeconds: 60}}}",
        &["gateway.config.dns.ttlMinSeconds (61)", "gateway.config.dns.ttlMaxSeconds (60)"],
    ),
    (
        "gateway: {config: {cluster: {nodePorts: {first: 2, last: 1}}}}",
        &["gateway.config.cluster.nodePorts.first (2)", "gateway.config.cluster.nodePorts.last (1)"],
    ),
    ("tunnelPort: 4789", &["tunnelPort"]),
    ("tunnelPort: 6081", &["tunnelPort (6081)", "agent.config.overlayPorts"]),
    ("agent: {config: {overlayPorts: [1, 2, 3, 4, 5, 6, 7, 8, 9]}}", &["agent.config.overlayPorts"]),
    (
        "agent: {config: {mark: {value: 0x10, mask: 0xe0}}}",
        &["agent.config.mark.value (16)", "agent.config.mark.mask (224)"],
    ),
    ("agent: {config: {mark: {value: 0x10, mask: 0x10}}}", &["agent.config.mark.mask (16)"]),
    ("agent: {config: {flowsPerEndpoint: 15}}", &["agent.config.flowsPerEndpoint"]),
    ("agent: {config: {interfaces: bridge}}", &["agent.config.interfaces", "Bridge"]),
    ("agent: {podLabels: {app.kubernetes.io/component: x}}", &["agent.podLabels", "app.kubernetes.io/component"]),
    ("gateway: {podLabels: {app.kubernetes.io/name: x}}", &["gateway.podLabels", "app.kubernetes.io/name"]),
    ("image: {digest: 'sha256:0'}", &["image.digest"]),
    ("image: {repository: 'a@sha256:0'}", &["image.repository"]),
    ("access: {protectedLabels: ['a b']}", &["access.protectedLabels.0"]),
    ("identity: {certificateSeconds: 2}", &["identity.certificateSeconds"]),
    (
        "identity: {authoritySeconds: 269999}",
        &["identity.authoritySeconds (269999)", "identity.certificateSeconds", "identity.overlapSeconds"],
    ),
    ("identity: {given: true, certManager: {enabled: true}}", &["identity.given", "identity.certManager.enabled"]),
    ("identity: {certManager: {enabled: true}}", &["identity.certManager.issuerRef.name"]),
    ("identity: {certManager: {duration: a year}}", &["identity.certManager.duration"]),
    ("identity: {secret: ''}", &["identity.secret"]),
    ("api: {port: 7443}", &["api.port"]),
    ("uninstall: {timeoutSeconds: 1}", &["uninstall.timeoutSeconds", "30"]),
    ("gateway: {env: {PATH: /}}", &["gateway.env", "PATH"]),
];

/// A cluster with our definitions and the namespace of the release.
fn cluster() -> (Arc<Cluster>, Api) {
    let cluster = Cluster::shared().unwrap();
    cluster.define().unwrap();
    let api = cluster.api();
    api.make_namespace(NAMESPACE).unwrap();
    (cluster, api)
}

#[test]
fn helm_finds_nothing_to_say() {
    let chart = chart();
    helm(None, &["lint", "--strict", chart.to_str().unwrap()], "").success().unwrap();
}

#[test]
fn values_that_contradict_are_refused_by_name() {
    for (values, words) in REFUSED {
        let out = template(values, true);
        assert!(!out.ok, "{values} is taken");
        // The schema's own messages have paths like '/gateway/config'.
        let said = out.stderr.replace('/', ".");
        for word in *words {
            assert!(said.contains(&word.replace('/', ".")), "{values}: {word} is missing: {}", out.stderr);
        }
    }
}

#[test]
fn everything_that_is_rendered_is_what_the_api_server_takes() {
    let (cluster, api) = cluster();
    let schemas = Schemas::new(&api);
    // The schemas are strict, or the rest says nothing.
    let typo = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {clusterIP: None, prots: []}\n";
    let said = schemas.check(typo);
    assert!(!said.ok && said.stdout.contains("prots"), "{said}");

    for (name, values) in MATRIX {
        let text = template(values, true).success().unwrap_or_else(|e| panic!("{name}: {e}"));
        let said = schemas.check(&text);
        assert!(said.ok && said.stdout.contains("Skipped: 0"), "{name}: {said}");
        // The resources of the Prometheus operator and of cert-manager are unknown here.
        let unknown = |group: &str| ["monitoring.coreos.com", "cert-manager.io"].contains(&group);
        let known: Vec<Value> = documents(&text)
            .into_iter()
            .filter(|d| !unknown(d["apiVersion"].as_str().unwrap().split('/').next().unwrap()))
            .collect();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": known}).to_string();
        let args = ["apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-"];
        let out = cluster.kubectl(&args, &list).unwrap();
        assert!(out.ok && !out.stderr.contains("Warning"), "{name}: {out}");
    }
}

#[test]
fn the_matrix_sets_every_value() {
    let defaults: Value = serde_saphyr::from_str(&fs::read_to_string(chart().join("values.yaml")).unwrap()).unwrap();
    let sets: Vec<Value> = MATRIX.iter().map(|(_, v)| serde_saphyr::from_str(v).unwrap()).collect();
    let mut missing = Vec::new();
    leaves(&defaults, "", &mut |pointer, default| {
        let other = |v: &Value| v.pointer(pointer).is_some_and(|v| v != default);
        // These are set, but to their defaults, where the rest is switched off.
        if !sets.iter().any(other) {
            missing.push(pointer.to_owned());
        }
    });
    assert_eq!(missing, Vec::<String>::new());
}

/// Calls with each value that has no keys of its own, and its JSON pointer.
fn leaves(value: &Value, at: &str, each: &mut dyn FnMut(&str, &Value)) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            for (k, v) in map {
                leaves(v, &format!("{at}/{}", k.replace('~', "~0").replace('/', "~1")), each);
            }
        }
        _ => each(at, value),
    }
}

/// Has the program read a configuration file of the chart; what it understood.
fn understood(component: &str, manifests: &[Value]) -> Value {
    let data = find(manifests, "ConfigMap", &format!("tidegate-{component}"))["data"].clone();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.yaml");
    fs::write(&file, data[format!("{component}.yaml")].as_str().unwrap()).unwrap();
    let mut command = Command::new(tidegate());
    command.args([component, "--check", "--config"]).arg(&file).env("POD_NAME", "gw-x").env("NODE_NAME", "node-x");
    let out = run(&mut command, "");
    serde_json::from_str(&out.success().unwrap()).unwrap()
}

#[test]
fn the_program_reads_what_the_chart_writes() {
    for (name, values) in MATRIX {
        println!("{name}");
        let manifests = documents(&template(values, false).success().unwrap());
        let (gateway, agent) = (understood("gateway", &manifests), understood("agent", &manifests));
        let (own, node) = (json!("gw-x"), json!("node-x"));
        assert_eq!((&gateway["name"], &gateway["node"], &agent["node"]), (&own, &node, &node));
        // What both must agree on.
        for key in ["tunnelPort", "socket", "drainSeconds"] {
            assert_eq!(gateway[key], agent[key], "{key}");
        }
        assert!(gateway["control"].as_str().unwrap().ends_with(&format!(":{}", agent["discover"]["port"])));
        let exempt = gateway["exemptNamespaces"].as_array().unwrap();
        assert!(exempt.contains(&json!(NAMESPACE)), "{exempt:?}");
    }
}

#[test]
fn what_the_chart_calls_a_default_is_the_programs_default() {
    let defaults = documents(&template("{}", false).success().unwrap());
    for component in ["gateway", "agent"] {
        let chart = understood(component, &defaults);
        // The same file with only what the chart decides itself.
        let values: Value =
            serde_saphyr::from_str(&fs::read_to_string(self::chart().join("values.yaml")).unwrap()).unwrap();
        let mut bare = defaults.clone();
        let name = format!("tidegate-{component}");
        let map = bare.iter_mut().find(|d| d["kind"] == "ConfigMap" && d["metadata"]["name"] == name.as_str()).unwrap();
        let file = &mut map["data"][format!("{component}.yaml")];
        let mut keys: Value = serde_saphyr::from_str(file.as_str().unwrap()).unwrap();
        for key in values[component]["config"].as_object().unwrap().keys() {
            // The chart adds its own namespace to this one.
            if key != "exemptNamespaces" {
                keys.as_object_mut().unwrap().remove(key);
            }
        }
        *file = keys.to_string().into();
        assert_eq!(understood(component, &bare), chart, "{component}");
    }
}

#[test]
fn pods_hold_what_their_configuration_names() {
    let manifests = documents(&template("gateway: {config: {drainSeconds: 40}}", false).success().unwrap());
    let pod = |kind: &str, name: &str| find(&manifests, kind, name)["spec"]["template"]["spec"].clone();
    let (gateway, agent) = (pod("Deployment", "tidegate-gateway"), pod("DaemonSet", "tidegate-agent"));
    // Drained before it is killed.
    assert_eq!(gateway["terminationGracePeriodSeconds"], 55);
    // The gateway is an ordinary pod: what it may do beyond that is in this list, and in docs/install.md.
    let rights = &gateway["containers"][0]["securityContext"];
    assert_eq!(
        rights["capabilities"],
        json!({"drop": ["ALL"], "add": ["BPF", "NET_ADMIN", "NET_BIND_SERVICE", "PERFMON"]})
    );
    assert_eq!((&rights["privileged"], &rights["readOnlyRootFilesystem"]), (&json!(false), &json!(true)));
    assert!(["hostNetwork", "hostPID", "hostIPC"].iter().all(|k| gateway[*k].is_null()));
    let docs = fs::read_to_string(root().join("docs/install.md")).unwrap();
    for capability in rights["capabilities"]["add"].as_array().unwrap() {
        let capability = capability.as_str().unwrap();
        assert!(docs.contains(&format!("| `{capability}` |")), "docs/install.md has no reason for {capability}");
    }
    // The agent has no token but the one for gateways.
    assert_eq!(agent["automountServiceAccountToken"], false);
    let tokens: Vec<&Value> =
        agent["volumes"].as_array().unwrap().iter().filter(|v| v.get("projected").is_some()).collect();
    assert_eq!(tokens.len(), 1);
    assert_eq!(tokens[0]["projected"]["sources"][0]["serviceAccountToken"]["audience"], "tidegate");

    for (component, pod) in [("gateway", &gateway), ("agent", &agent)] {
        let config = understood(component, &manifests);
        let container = &pod["containers"][0];
        let mounts: Vec<&str> =
            container["volumeMounts"].as_array().unwrap().iter().map(|m| m["mountPath"].as_str().unwrap()).collect();
        for (pointer, writable) in [
            // A gateway only connects to it.
            ("/socket", component == "agent"),
            ("/pins", true),
            ("/journal", true),
            ("/join/folder", true),
            ("/join/token", false),
            ("/join/ca", false),
        ] {
            let Some(path) = config.pointer(pointer).and_then(Value::as_str) else { continue };
            let mount = mounts.iter().position(|m| std::path::Path::new(path).starts_with(m));
            let mount = mount.unwrap_or_else(|| panic!("{component}: nothing is mounted for {pointer}, {path}"));
            assert_eq!(container["volumeMounts"][mount]["readOnly"].is_null(), writable, "{component}: {path}");
        }
        let port = config["admin"].as_str().unwrap().rsplit_once(':').unwrap().1.parse::<u16>().unwrap();
        for probe in ["livenessProbe", "readinessProbe"] {
            let asked = match &container[probe]["httpGet"]["port"] {
                Value::String(name) => {
                    container["ports"].as_array().unwrap().iter().find(|p| p["name"] == *name).unwrap()["containerPort"]
                        .clone()
                }
                number => number.clone(),
            };
            assert_eq!(asked, port, "{component} {probe}");
        }
        for volume in pod["volumes"].as_array().unwrap() {
            assert!(
                container["volumeMounts"].as_array().unwrap().iter().any(|m| m["name"] == volume["name"]),
                "{volume}"
            );
        }
    }
    // The socket that both name is the same file on the node, and a gateway does not see what lies beside its folder.
    let file = |component: &str, pod: &Value| {
        let path = understood(component, &manifests)["socket"].as_str().unwrap().to_owned();
        let find = |list: &Value| list.as_array().unwrap().iter().find(|v| v["name"] == "run").unwrap().clone();
        let mounted = find(&pod["containers"][0]["volumeMounts"])["mountPath"].as_str().unwrap().to_owned();
        let host = find(&pod["volumes"])["hostPath"]["path"].as_str().unwrap().to_owned();
        (path.replacen(&mounted, &host, 1), host)
    };
    let (plug, seen) = file("gateway", &gateway);
    assert_eq!(plug, file("agent", &agent).0);
    assert_eq!(seen, plug.trim_end_matches("/agent.sock"));
}

#[test]
fn alerts_and_dashboard_ask_for_metrics_that_exist() {
    let files = chart().join("files");
    let mut code = String::new();
    for folder in ["gateway/src", "ebpf/agent/src", "dns/server/src", "sni/relay/src"] {
        read_all(&root().join(folder), &mut code);
    }
    let mut asked = 0;
    for file in ["alerts.yaml", "dashboard.json"] {
        let text = fs::read_to_string(files.join(file)).unwrap();
        for part in text.split("tidegate_").skip(1) {
            let end = part.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap();
            let name = format!("tidegate_{}", part[..end].trim_end_matches("_bucket"));
            assert!(code.contains(&format!("\"{name}\"")), "{file}: nothing publishes {name}");
            asked += 1;
        }
    }
    assert!(asked > 15);
    serde_json::from_str::<Value>(&fs::read_to_string(files.join("dashboard.json")).unwrap()).unwrap();
}

fn read_all(folder: &std::path::Path, text: &mut String) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read_all(&path, text);
        } else {
            text.push_str(&fs::read_to_string(path).unwrap());
        }
    }
}
