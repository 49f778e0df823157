//! The first issue's story with pods that kubelets run. It is told twice: before anything selects a pod, when none of what
//! policy promises may be seen, so that no step can pass by itself; and with the policies.

use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use tidegate_lab::family::{FAMILIES, Family};
use tidegate_lab::lab::wait_for;
use tidegate_lab::probe::{Client, curl, dig, source};
use tidegate_lab::story::{POOL_A, POOL_B, bare, named, of};
use tidegate_lab::{Lab, kubelet};

use crate::install::{gateways, node};
use crate::root;

/// How long edits and what is told of them may take.
const EDIT: Duration = Duration::from_secs(30);
/// What is not seen by way of a gateway or of a denial: it holds with policies and without.
const ALWAYS: bool = true;

/// One step.
struct Seen {
    what: String,
    good: bool,
    saw: String,
    /// Whether it holds without policies, too.
    always: bool,
}

struct Teller<'a> {
    lab: &'a Lab,
    family: Family,
    seen: Vec<Seen>,
}

impl Teller<'_> {
    fn step(&mut self, what: String, good: bool, saw: String, always: bool) {
        self.seen.push(Seen { what: format!("{:?} {what}", self.family), good, saw, always });
    }

    /// A URL is answered, and the server saw this source.
    fn fetch(&mut self, pod: &str, url: &str, source: IpAddr, always: bool) {
        let seen = curl(&self.lab.cluster_pod(pod), self.family, url, &[]);
        let good = seen.exit == 0 && seen.source() == Some(source);
        self.step(format!("{pod}: {url} is answered to {source}"), good, seen.text(), always);
    }

    /// A name is answered with a denial and its reason.
    fn denied(&mut self, pod: &str, name: &str) {
        let seen = dig(&self.lab.cluster_pod(pod), name, self.family.record(), &[]);
        self.step(format!("{pod}: {name} is denied"), seen.is_denied(), seen.text(), false);
    }

    /// Has a name bound for the pod's namespace, where it may be.
    fn resolve(&self, pod: &str, name: &str) {
        dig(&self.lab.cluster_pod(pod), name, self.family.record(), &[]);
    }

    fn socat(&self, protocol: &str, to: SocketAddr) -> String {
        format!("{protocol}{}:{to}", self.family.pick("4", "6"))
    }

    /// A connection gets no answer, and the router sees nothing of it.
    fn dropped(&mut self, pod: &str, to: SocketAddr, why: &str) {
        let syn = format!("tcp dport {} tcp flags & (syn | ack) == syn", to.port());
        let watch = self.lab.watch(to.ip(), &syn).unwrap();
        let target = format!("{},connect-timeout=1.5", self.socat("TCP", to));
        let seen = self.lab.cluster_pod(pod).command(&["socat", "-u", "/dev/null", &target]);
        let passed = watch.packets().unwrap();
        let good = seen.status != 0 && seen.stderr.contains("timed out") && passed == 0;
        let saw = format!("exit {}, {passed} packets passed, {}", seen.status, seen.stderr.trim());
        self.step(format!("{pod}: {to} is dropped: {why}"), good, saw, false);
    }

    /// An echo server saw this source of a connection or of a datagram.
    fn echo(&mut self, pod: &str, protocol: &str, to: SocketAddr, from: IpAddr) {
        let target = self.socat(protocol, to);
        let line = match protocol {
            "TCP" => format!("socat -T 2 -u {target},connect-timeout=4 -"),
            _ => format!("echo hello | socat -t 2 - {target}"),
        };
        let seen = self.lab.cluster_pod(pod).command(&["sh", "-c", &line]);
        let said: Value = serde_json::from_str(seen.stdout.lines().next().unwrap_or_default()).unwrap_or_default();
        let good = source(&said) == Some(from);
        self.step(format!("{pod}: {protocol} {to} is answered to {from}"), good, format!("{seen:?}"), false);
    }

    /// The policy of `shop`, with its pool.
    fn shop(&mut self) {
        let (family, pod) = (self.family, "shop/client");
        let pool = of(POOL_A, family);
        for at in self.lab.scenario().nodes.iter().map(|n| format!("shop/{}", n.name)).collect::<Vec<_>>() {
            self.fetch(&at, "https://api.example.com/", pool, false);
        }
        self.denied(pod, "other.example.org");
        self.dropped(pod, named(family, 14, 443), "nobody has resolved it");
        self.dropped(pod, bare(family, 66, 443), "it has no name");

        self.fetch("billing/client", "https://bank.example.com/", of(POOL_B, family), false);
        self.dropped(pod, named(family, 15, 443), "another namespace has resolved it");

        self.resolve(pod, "api.example.com");
        let url = "https://other.example.org/";
        let to = format!("other.example.org:443:{}", family.pick("198.51.100.10", "[2001:db8:100::10]"));
        let seen = curl(&self.lab.cluster_pod(pod), family, url, &["--resolve", &to]);
        let reset = [35, 56].contains(&seen.exit);
        self.step(format!("{pod}: another SNI is reset"), reset, seen.text(), false);
        self.dropped(pod, named(family, 10, 8443), "no rule has this port");

        self.resolve(pod, "tcp.example.com");
        self.echo(pod, "TCP", named(family, 12, 7000), pool);
        self.resolve(pod, "udp.example.com");
        self.echo(pod, "UDP", named(family, 13, 7001), pool);

        self.fetch(pod, "https://a.one.example.net/", pool, false);
        self.denied(pod, "a.b.one.example.net");
        self.fetch(pod, "https://a.b.many.example.net/", pool, false);

        self.echo(pod, "TCP", bare(family, 40, 7000), pool);
        self.dropped(pod, bare(family, 40, 7010), "the prefix has other ports");
        self.dropped(pod, bare(family, 7, 7000), "it is excepted from the prefix");
    }

    /// A namespace with one annotation, whose connections leave by its gateway's node.
    fn annotated(&mut self) {
        let (family, pod) = (self.family, "annotated/client");
        let by: Vec<IpAddr> = gateways(self.lab).values().map(|on| node(self.lab, on, family)).collect();
        let seen = curl(&self.lab.cluster_pod(pod), family, "https://api.example.com/", &[]);
        // The pod's own node may be a gateway's: it is the others that are told apart.
        let good = seen.source().is_some_and(|from| by.contains(&from));
        let own = by.contains(&node(self.lab, "node-2", family));
        self.step(format!("{pod}: api.example.com by a gateway"), good, format!("{}, {by:?}", seen.text()), own);
        self.denied(pod, "www.example.com");
        self.dropped(pod, bare(family, 40, 7002), "the annotation has other ports");
    }

    /// Who is not managed goes his own way, and nobody's traffic inside the cluster is touched.
    fn undisturbed(&mut self) {
        let own = node(self.lab, "node-1", self.family);
        self.fetch("untouched/client", "https://other.example.org/", own, ALWAYS);
        for pod in ["shop/client", "annotated/client", "untouched/client"] {
            let address = address(self.lab, pod, self.family);
            self.fetch(pod, "http://backend.untouched:8080/", address, ALWAYS);
            let api =
                curl(&self.lab.cluster_pod(pod), Family::V4, "https://kubernetes.default/version", &["--insecure"]);
            let good = api.body["gitVersion"].is_string();
            self.step(format!("{pod}: the API server"), good, api.text(), ALWAYS);
        }
    }

    /// What audit mode lets go its own way and tells of, and enforcement does not.
    fn audited(&mut self) {
        let (family, pod) = (self.family, "audited/client");
        let own = node(self.lab, "gw-node-b", family);
        let seen = curl(&self.lab.cluster_pod(pod), family, "https://other.example.org/", &[]);
        let told = || self.lab.host_kubectl(&["describe", "namespaceegress", "tidegate", "--namespace", "audited"], "");
        // Nobody waits for what an unmanaged namespace is never told.
        let patience = told().map_or(Duration::ZERO, |_| EDIT);
        let told = wait_for(patience * 3, || told().ok().filter(|text| text.contains("other.example.org")));
        let good = seen.source() == Some(own) && told.is_some();
        let saw = format!("{}, told: {}", seen.text(), told.is_some());
        self.step(format!("{pod}: audit lets pass, and tells"), good, saw, false);
        let annotate = |what: &str| {
            self.lab.host_kubectl(&["annotate", "--overwrite", "namespace", "audited", what], "").unwrap();
        };
        annotate("tidegate.dev/mode-");
        let asked = || dig(&self.lab.cluster_pod(pod), "other.example.org", family.record(), &[]);
        let denied = wait_for(patience, || asked().is_denied().then_some(())).is_some();
        self.step(format!("{pod}: enforcement denies it"), denied, asked().text(), false);
        annotate("tidegate.dev/mode=audit");
        let lets = || curl(&self.lab.cluster_pod(pod), family, "https://other.example.org/", &[]).source();
        assert!(wait_for(EDIT, lets).is_some(), "audit mode does not come back");
    }
}

/// A pod's own address.
fn address(lab: &Lab, pod: &str, family: Family) -> IpAddr {
    let (namespace, name) = pod.split_once('/').unwrap();
    let all = lab.host_kubectl(&["get", "pod", "-n", namespace, name, "-o", "jsonpath={.status.podIPs[*].ip}"], "");
    all.unwrap().split_whitespace().map(|ip| ip.parse().unwrap()).find(|ip| Family::of(*ip) == family).unwrap()
}

/// Tells the story once, of both families at the same time, but for what they share.
fn tell(lab: &Lab) -> Vec<Seen> {
    let teller = |family| Teller { lab, family, seen: Vec::new() };
    // Denials are told of a namespace once in a minute at most: this one while the rest is tried.
    curl(&lab.cluster_pod("audited/client"), Family::V4, "https://other.example.org/", &[]);
    let mut seen: Vec<Seen> = thread::scope(|scope| {
        let tell = |family| {
            scope.spawn(move || {
                let mut teller = teller(family);
                teller.shop();
                teller.annotated();
                teller.undisturbed();
                teller.seen
            })
        };
        FAMILIES.map(tell).into_iter().flat_map(|told| told.join().unwrap()).collect()
    });
    for family in FAMILIES {
        let mut teller = teller(family);
        teller.audited();
        seen.extend(teller.seen);
    }
    seen
}

/// Answers one request over HTTP with whom it saw.
const ANSWER: &str = r#"
end=$(printf '\r')
while read -r line && [ "$line" != "$end" ]; do :; done
from=${SOCAT_PEERADDR#\[}
printf 'HTTP/1.0 200 OK\r\n\r\n{"source":"%s"}' "${from%\]}"
"#;
const SERVE: &str = r"
socat TCP4-LISTEN:8080,fork,reuseaddr 'EXEC:sh /etc/backend/answer' &
exec socat TCP6-LISTEN:8080,ipv6only=1,fork,reuseaddr 'EXEC:sh /etc/backend/answer'
";

/// A server inside, with a service.
pub fn backend(lab: &Lab) {
    let metadata = json!({"name": "backend", "namespace": "untouched", "labels": {"app": "backend"}});
    let container = json!({
        "name": "backend", "image": kubelet::CLIENT_IMAGE, "imagePullPolicy": "Never", "command": ["sh", "-c", SERVE],
        "volumeMounts": [{"name": "answer", "mountPath": "/etc/backend"}],
    });
    let list = json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"answer": ANSWER}},
        {
            "apiVersion": "v1", "kind": "Pod", "metadata": metadata,
            "spec": {
                "nodeName": "node-2", "terminationGracePeriodSeconds": 0, "containers": [container],
                "volumes": [{"name": "answer", "configMap": {"name": "backend"}}],
            },
        },
        {
            "apiVersion": "v1", "kind": "Service", "metadata": metadata,
            "spec": {"selector": {"app": "backend"}, "ports": [{"port": 8080}], "ipFamilyPolicy": "PreferDualStack"},
        },
    ]});
    lab.host_kubectl(&["apply", "-f", "-"], &list.to_string()).unwrap();
    let ready = ["wait", "-n", "untouched", "--for=condition=Ready", "--timeout=60s", "pod/backend"];
    lab.host_kubectl(&ready, "").unwrap();
}

/// The demo's policies of `shop` and `billing` with their pools, and two namespaces with annotations.
pub fn give(lab: &Lab) {
    let pool = |name: &str, [ipv4, ipv6]: [&str; 2]| {
        json!({
            "apiVersion": "tidegate.dev/v1alpha1", "kind": "EgressPool", "metadata": {"name": name},
            "spec": {"allowedNamespaces": {}, "addressSource": "Static", "static": {"addresses": [{"ipv4": ipv4, "ipv6": ipv6}]}},
        })
    };
    let pools =
        json!({"apiVersion": "v1", "kind": "List", "items": [pool("partner-a", POOL_A), pool("partner-b", POOL_B)]});
    lab.host_kubectl(&["apply", "-f", "-"], &pools.to_string()).unwrap();
    for file in ["shop.yaml", "billing.yaml"] {
        let path = root().join("loadtest/manifests/demo").join(file);
        lab.host_kubectl(&["apply", "-f", path.to_str().unwrap()], "").unwrap();
    }
    let annotations: [(&str, &[&str]); 2] = [
        (
            "annotated",
            &["tidegate.dev/allow=api.example.com, 192.0.2.40:7000-7001/tcp, [2001:db8:200::40]:7000-7001/tcp"],
        ),
        ("audited", &["tidegate.dev/managed=true", "tidegate.dev/mode=audit", "tidegate.dev/allow=api.example.com"]),
    ];
    for (namespace, what) in annotations {
        lab.host_kubectl(&[&["annotate", "--overwrite", "namespace", namespace], what].concat(), "").unwrap();
    }
    for (pod, pool) in [("shop/client", POOL_A), ("billing/client", POOL_B)] {
        let holds = || curl(&lab.cluster_pod(pod), Family::V4, "https://api.example.com/", &[]).source();
        let holds = wait_for(EDIT, || holds().filter(|from| *from == of(pool, Family::V4)));
        assert!(
            holds.is_some(),
            "{pod} does not leave by its pool: {}",
            lab.host_kubectl(&["describe", "egresspools"], "").unwrap()
        );
    }
    let denies = || dig(&lab.cluster_pod("annotated/client"), "www.example.com", "A", &[]).is_denied().then_some(());
    assert!(wait_for(EDIT, denies).is_some(), "the annotation does not hold");
    let programmed =
        ["wait", "-n", "audited", "--for=condition=Programmed", "--timeout=30s", "namespaceegress/tidegate"];
    assert!(wait_for(EDIT, || lab.host_kubectl(&programmed, "").ok()).is_some(), "audit mode does not come");
}

/// Tells it without policies and with them. `shop` has the quick start's annotation.
pub fn told(lab: &Lab) {
    lab.host_kubectl(&["annotate", "namespace", "shop", "tidegate.dev/allow-"], "").unwrap();
    let free = || curl(&lab.cluster_pod("shop/client"), Family::V4, "https://other.example.org/", &[]).source();
    assert!(wait_for(EDIT, free).is_some(), "an annotation that is gone still holds");
    hold("without policies", &tell(lab), |seen| seen.always);
    give(lab);
    hold("with policies", &tell(lab), |_| true);
}

#[track_caller]
fn hold(when: &str, told: &[Seen], wanted: impl Fn(&Seen) -> bool) {
    println!("{when}:");
    for seen in told {
        let mark = if seen.good == wanted(seen) { "ok  " } else { "FAIL" };
        println!("  {mark} {}: {}; {}", seen.what, if seen.good { "yes" } else { "no" }, seen.saw);
    }
    assert!(told.iter().all(|seen| seen.good == wanted(seen)), "{when}: surprises");
}
