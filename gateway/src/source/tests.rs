//! The policy thread against a real API server: what it compiles, how often, and what it says of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use crossbeam_channel::Receiver;
use tidegate_api::index::Feed;
use tidegate_kube::Cluster;
use tidegate_kubernetes::watch::Watched;

use super::kubernetes::Follower;
use super::{Compiler, Problems};
use crate::admin::Readiness;
use crate::cluster::ClusterNames;
use crate::config::Config;
use crate::core::ToCore;
use crate::desired::Compiled;
use crate::generations::{Generations, Versions};
use crate::kube::Kube;

const SOON: Duration = Duration::from_secs(20);

/// A gateway's policy thread without the rest of the gateway.
struct Gateway {
    core: Receiver<ToCore>,
    readiness: Readiness,
    problems: Problems,
    names: Arc<ClusterNames>,
    watched: Watched<Feed>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    compiled: Option<Arc<Compiled>>,
    compiles: usize,
    versions: Versions,
    _kube: Kube,
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

impl Gateway {
    fn new(kubeconfig: &std::path::Path) -> Self {
        let text = format!(
            "name: gw\nnode: n1\ncontrol: '127.0.0.1:1'\nsocket: /s\npins: /p\nresolvers: [{{servers: ['192.0.2.1:53']}}]\n\
             kubernetes: {{kubeconfig: {}, namespace: tidegate-system}}\n",
            kubeconfig.display()
        );
        let config: Config = serde_saphyr::from_str(&text).unwrap();
        let kubernetes = config.kubernetes.clone().unwrap();
        let kube = Kube::start(&config, &kubernetes, runtime()).unwrap();
        let (changes, watched) = kube.watch(&kubernetes);
        let (to_core, core) = crate::core::channel();
        let readiness = Readiness::default();
        let problems: Problems = Arc::new(ArcSwap::default());
        let names = Arc::new(ClusterNames::new(vec!["cluster.local".into()], Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let compiler = Compiler::new(to_core, problems.clone(), readiness.guard("policy"));
        let (told, ends) = (names.clone(), stop.clone());
        let follower = Follower { changes, names: told, compiler, runtime: runtime(), stop: ends };
        let thread = Some(std::thread::spawn(move || follower.run(&config)));
        let (compiled, versions) = (None, Versions::new());
        Self { core, readiness, problems, names, watched, stop, thread, compiled, compiles: 0, versions, _kube: kube }
    }

    /// Hears the policy thread until something holds; says how long it took.
    #[track_caller]
    fn until(&mut self, limit: Duration, what: &str, holds: impl Fn(&Self) -> bool) -> Duration {
        let started = Instant::now();
        while !holds(self) {
            let said = (self.problems.load(), self.watched.failing());
            assert!(started.elapsed() < limit, "{what}: not within {limit:?}; {said:?}");
            match self.core.recv_timeout(Duration::from_millis(20)) {
                Ok(ToCore::World(compiled)) => {
                    self.compiled = Some(compiled);
                    self.compiles += 1;
                }
                Ok(ToCore::Versions(versions)) => self.versions = versions,
                _ => {}
            }
        }
        started.elapsed()
    }

    fn rest(&mut self, time: Duration) {
        let end = Instant::now() + time;
        self.until(time * 2 + SOON, "time", |_| Instant::now() >= end);
    }

    /// Whether the pod with this address is known.
    fn knows(&self, ip: &str) -> bool {
        self.compiled.as_ref().is_some_and(|c| c.world.endpoint(ip.parse().unwrap()).is_some())
    }

    /// The number of rules that the pod's group has for a name.
    fn allows(&self, ip: &str, name: &str) -> bool {
        let Some(world) = self.compiled.as_ref().map(|c| &c.world) else { return false };
        let member = world.endpoint(ip.parse().unwrap()).and_then(|e| e.member);
        let group = member.and_then(|m| world.group(m.index));
        group.is_some_and(|g| g.name(name, 1).answer == tidegate_policy::world::Answer::Bind)
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        drop(self.thread.take().map(JoinHandle::join));
    }
}

fn apply(cluster: &Cluster, text: &str) {
    cluster.kubectl(&["apply", "--server-side", "--force-conflicts", "-f", "-"], text).unwrap().success().unwrap();
}

fn kubectl(cluster: &Cluster, args: &[&str]) {
    cluster.kubectl(args, "").unwrap().success().unwrap();
}

/// A cluster with the CRDs, a namespace, and a pod that has an address.
fn cluster() -> Cluster {
    let cluster = Cluster::start().unwrap();
    let crds = concat!(env!("CARGO_MANIFEST_DIR"), "/../helm/tidegate/files/crds");
    kubectl(&cluster, &["apply", "--server-side", "-f", crds]);
    kubectl(&cluster, &["wait", "--for=condition=Established", "crd", "--all", "--timeout=30s"]);
    kubectl(&cluster, &["create", "namespace", "shop"]);
    pod(&cluster, "web", "10.244.0.1");
    cluster
}

fn pod(cluster: &Cluster, name: &str, ip: &str) {
    apply(
        cluster,
        &format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{app: {name}}}}}\n\
             spec: {{nodeName: n1, containers: [{{name: c, image: i}}]}}\n"
        ),
    );
    status(
        cluster,
        name,
        &format!(r#"{{"status": {{"phase": "Running", "podIP": "{ip}", "podIPs": [{{"ip": "{ip}"}}]}}}}"#),
    );
}

fn status(cluster: &Cluster, pod: &str, patch: &str) {
    kubectl(cluster, &["patch", "pod", pod, "-n", "shop", "--subresource=status", "--type=merge", "-p", patch]);
}

fn policy(name: &str, host: &str) -> String {
    format!(
        "apiVersion: tidegate.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{podSelector: {{}}, egress: [{{toFQDNs: [{{matchName: {host}}}], toPorts: [{{protocol: TCP, port: 443}}]}}]}}\n---\n"
    )
}

#[test]
fn objects_of_an_api_server_become_policy() {
    let cluster = cluster();
    apply(&cluster, &policy("one", "one.example"));
    let mut gw = Gateway::new(&cluster.kubeconfig());
    assert_eq!(gw.readiness.waiting_for(), ["policy"], "not before every list is there");
    gw.until(SOON, "the first compile", |g| g.allows("10.244.0.1", "one.example"));
    gw.until(SOON, "readiness", |g| g.readiness.waiting_for().is_empty());
    assert_eq!(gw.compiles, 1, "one for all lists");
    let prefixes: Vec<String> = gw.compiled.as_ref().unwrap().prefixes.iter().map(ToString::to_string).collect();
    assert!(
        prefixes.contains(&"10.96.0.0/16".to_owned()) && prefixes.contains(&"192.0.2.1/32".to_owned()),
        "{prefixes:?}"
    );

    // Heartbeats are no news. kubectl takes its time, so they go through a proxy.
    let api = cluster.api().unwrap();
    let merge = [("Content-Type", "application/merge-patch+json")];
    let path = "/api/v1/namespaces/shop/pods/web";
    let before = (gw.compiles, gw.watched.health()[&Feed::Pods].events);
    for n in 0..200 {
        let body = format!(r#"{{"metadata": {{"annotations": {{"beat": "{n}"}}}}}}"#);
        assert_eq!(api.send("PATCH", path, &merge, &body).unwrap().status, 200);
    }
    gw.until(SOON, "the beats", |g| g.watched.health()[&Feed::Pods].events >= before.1 + 200);
    gw.rest(Duration::from_secs(1));
    assert_eq!(gw.compiles, before.0, "200 heartbeats");
    // A flood of changes that matter is few compiles.
    for n in 0..200 {
        let body = format!(r#"{{"metadata": {{"labels": {{"n": "{n}"}}}}}}"#);
        assert_eq!(api.send("PATCH", path, &merge, &body).unwrap().status, 200);
    }
    gw.until(SOON, "the changes", |g| g.watched.health()[&Feed::Pods].events >= before.1 + 400);
    gw.rest(Duration::from_secs(1));
    let compiles = gw.compiles - before.0;
    println!("200 changes of a pod: {compiles} compiles");
    assert!((1..=100).contains(&compiles), "{compiles}");

    // The API server takes what this version cannot read; the others go on.
    let crd = "egresspolicies.tidegate.dev";
    let loose = r#"[{"op": "replace", "path": "/spec/versions/0/schema/openAPIV3Schema",
        "value": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}]"#;
    kubectl(&cluster, &["patch", "crd", crd, "--type=json", "-p", loose]);
    std::thread::sleep(Duration::from_secs(1));
    apply(&cluster, &policy("one", "other.example").replace("podSelector", "fromTomorrow: 1, podSelector"));
    apply(&cluster, &policy("two", "two.example"));
    gw.until(SOON, "the good one", |g| g.allows("10.244.0.1", "two.example"));
    gw.until(SOON, "the problem", |g| {
        let problems = g.problems.load();
        problems.iter().any(|p| p.starts_with("EgressPolicy shop/one: spec.fromTomorrow: ") && p.contains("last good"))
    });
    assert!(gw.allows("10.244.0.1", "one.example") && !gw.allows("10.244.0.1", "other.example"));

    // Last known good while nobody answers, and everything that changed meanwhile afterwards.
    cluster.stop_api_server();
    gw.until(SOON, "the outage", |g| g.watched.failing().is_some());
    gw.rest(Duration::from_secs(2));
    assert!(gw.allows("10.244.0.1", "two.example") && gw.readiness.waiting_for().is_empty());
    cluster.start_api_server().unwrap();
    kubectl(&cluster, &["delete", "egresspolicy", "two", "-n", "shop"]);
    kubectl(&cluster, &["delete", "pod", "web", "-n", "shop", "--force", "--grace-period=0"]);
    pod(&cluster, "new", "10.244.0.2");
    gw.until(Duration::from_secs(40), "what changed", |g| g.knows("10.244.0.2") && !g.knows("10.244.0.1"));
    // Lists do not wait for each other.
    gw.until(Duration::from_secs(40), "policies", |g| !g.allows("10.244.0.2", "two.example"));
    assert!(gw.allows("10.244.0.2", "one.example"));
    gw.until(SOON, "all lists", |g| g.watched.failing().is_none());
    // One that has ended has no address, though it is still there.
    status(&cluster, "new", r#"{"status": {"phase": "Succeeded"}}"#);
    gw.until(SOON, "the end of the pod", |g| !g.knows("10.244.0.2"));
}

#[test]
fn the_clusters_dns_and_external_names_follow() {
    let cluster = cluster();
    let mut gw = Gateway::new(&cluster.kubeconfig());
    gw.until(SOON, "the first compile", |g| g.compiled.is_some());
    apply(
        &cluster,
        "apiVersion: v1\nkind: Service\nmetadata: {name: kube-dns, namespace: kube-system}\n\
         spec: {clusterIP: 10.96.0.10, ports: [{name: dns, port: 53, protocol: UDP}, {name: metrics, port: 9153}]}\n---\n\
         apiVersion: v1\nkind: Service\nmetadata: {name: db, namespace: shop}\n\
         spec: {type: ExternalName, externalName: db.example.com}\n",
    );
    let dns = |g: &Gateway| g.compiled.as_ref().map(|c| c.dns.clone()).unwrap_or_default();
    gw.until(SOON, "the Service", |g| dns(g) == ["10.96.0.10:53".parse().unwrap()]);
    gw.until(SOON, "the name", |g| g.names.target("db.shop.svc.cluster.local").is_some());
    assert_eq!(gw.names.servers.get().len(), 1);
    let compiles = gw.compiles;
    kubectl(&cluster, &["delete", "service", "db", "-n", "shop"]);
    gw.until(SOON, "the end of the name", |g| g.names.target("db.shop.svc.cluster.local").is_none());
    assert_eq!(gw.compiles, compiles, "no rule depends on it");
    apply(
        &cluster,
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
         metadata: {name: kube-dns-1, namespace: kube-system, labels: {kubernetes.io/service-name: kube-dns}}\n\
         endpoints: [{addresses: [10.244.0.9], conditions: {ready: true}}]\n\
         ports: [{name: dns, port: 1053, protocol: UDP}]\n",
    );
    gw.until(SOON, "the endpoint", |g| *g.names.servers.get() == ["10.244.0.9:1053".parse().unwrap()]);
    gw.until(SOON, "the kernel's part", |g| dns(g).len() == 2);
    gw.until(SOON, "what is wrong with that", |g| g.problems.load().iter().any(|p| p.contains("10.244.0.9:1053")));
}

#[test]
fn a_gateway_whose_watch_hangs_is_stale_until_it_has_caught_up() {
    let cluster = cluster();
    apply(&cluster, &policy("one", "one.example"));
    let proxy = tidegate_kube::Proxy::start(&cluster).unwrap();
    let (mut a, mut b) = (Gateway::new(&cluster.kubeconfig()), Gateway::new(&proxy.kubeconfig()));
    for gw in [&mut a, &mut b] {
        gw.until(SOON, "the policy", |g| g.allows("10.244.0.1", "one.example"));
        gw.rest(Duration::from_millis(500));
    }
    let started = Instant::now();
    let now = || started.elapsed();
    let mut seen = Generations::default();
    let mut beat = |a: &mut Gateway, b: &mut Gateway| {
        a.rest(Duration::from_millis(50));
        b.rest(Duration::from_millis(50));
        let mut other = Generations::default();
        other.set_own(a.versions.clone());
        seen.set_own(b.versions.clone());
        seen.heard("a", &other.told(), now());
        (seen.is_stale(now()), seen.behind(now()))
    };
    // Pods beat all the time; both hear it.
    for n in 0..10 {
        status(&cluster, "web", &format!(r#"{{"metadata": {{"annotations": {{"n": "{n}"}}}}}}"#));
        assert!(!beat(&mut a, &mut b).0);
    }
    proxy.swallow();
    kubectl(&cluster, &["delete", "egresspolicy", "one", "-n", "shop"]);
    let removed = Instant::now();
    a.until(SOON, "the removal", |g| !g.allows("10.244.0.1", "one.example"));
    while !beat(&mut a, &mut b).0 {
        assert!(removed.elapsed() < Duration::from_secs(6), "not stale");
    }
    println!("stale {:?} after the removal", removed.elapsed());
    assert!(removed.elapsed() < Duration::from_secs(5), "{:?}", removed.elapsed());
    assert!(b.allows("10.244.0.1", "one.example") && b.watched.failing().is_none(), "by itself it cannot tell");

    // The way is free again for those who ask anew, as the core has the watch do.
    proxy.forward_new();
    for feed in beat(&mut a, &mut b).1.keys() {
        b.watched.hurry(*feed);
    }
    b.until(SOON, "the removal", |g| !g.allows("10.244.0.1", "one.example"));
    let deadline = Instant::now() + SOON;
    while beat(&mut a, &mut b).0 {
        assert!(Instant::now() < deadline, "still stale");
    }
}
