//! What people read with kubectl, from a real API server.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use serde_json::{Value, json};
use tidegate_api::index::{Feed, Index};
use tidegate_kube::Cluster;
use tidegate_policy::World;
use tidegate_policy::denied::Denied;
use tidegate_policy::event::Who;
use tidegate_policy::model::{Settings, Touched, UnixSeconds};

use super::denials::tests::denied;
use super::leading::{self, Outlet};
use super::{Beside, Reporter, Snapshot, Surveyor, Table};
use crate::core::{NodeStatus, Status};
use crate::kube::Kube;

const OBJECTS: &str = r#"
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Namespace
  metadata: {name: shop, annotations: {tidegate.dev/allow: "a.example.com, b c"}}
- {apiVersion: v1, kind: Pod, metadata: {name: web, namespace: shop}, spec: {nodeName: n1, containers: [{name: c, image: i}]}}
- {apiVersion: v1, kind: Pod, metadata: {name: proxy, namespace: shop}, spec: {nodeName: n1, hostNetwork: true, containers: [{name: c, image: i}]}}
- apiVersion: tidegate.dev/v1alpha1
  kind: ClusterEgressPolicy
  metadata: {name: saas}
  spec:
    tier: Admin
    priority: 1
    subject: {namespaceSelector: {}}
    ceiling: {toFQDNs: [{matchPattern: "**.example.com"}], toPorts: [{protocol: TCP, port: 443}]}
- apiVersion: tidegate.dev/v1alpha1
  kind: EgressPool
  metadata: {name: partner}
  spec: {allowedNamespaces: {}, addressSource: Static, static: {addresses: [{ipv4: 203.0.113.10}]}}
- apiVersion: tidegate.dev/v1alpha1
  kind: EgressPolicy
  metadata: {name: payments, namespace: shop}
  spec:
    podSelector: {}
    poolRef: {name: partner}
    egress:
    - {name: pay, toFQDNs: [{matchName: pay.example.com}], toPorts: [{protocol: TCP, port: 443}]}
    - {name: stripe, toFQDNs: [{matchName: api.stripe.com}], toPorts: [{protocol: TCP, port: 443}]}
- apiVersion: tidegate.dev/v1alpha1
  kind: EgressPolicy
  metadata: {name: broken, namespace: shop}
  spec:
    podSelector: {}
    egress:
    - {name: x, toFQDNs: [{matchName: pay.example.com}], toPorts: [{protocol: TCP, port: 443}], dnsTypes: [TYPE65000]}
    - {name: y1, toCIDRs: [{cidr: 203.0.113.0/24, except: [198.51.100.0/24]}], toPorts: [{protocol: TCP, port: 443}]}
"#;

struct Test {
    cluster: Cluster,
    index: Index,
    surveyor: Surveyor,
    snapshot: Arc<ArcSwapOption<Snapshot>>,
    reporter: Reporter,
    outlet: Outlet,
    number: u64,
}

impl Test {
    fn kubectl(&self, args: &[&str], stdin: &str) -> String {
        self.cluster.kubectl(args, stdin).unwrap().success().unwrap()
    }

    /// Lists what the gateway watches, compiles, and wishes the statuses that follow.
    fn look(&mut self, status: &Status, table: &Table) {
        for feed in [
            Feed::Namespaces,
            Feed::Pods,
            Feed::EgressPools,
            Feed::ClusterEgressPolicies,
            Feed::EgressPolicies,
            Feed::NamespaceEgresses,
        ] {
            let list = self.kubectl(&["get", feed.name(), "-A", "-o", "json"], "");
            let list: Value = serde_json::from_str(&list).unwrap();
            list["items"].as_array().unwrap().iter().for_each(|o| self.index.apply(feed, o));
        }
        let now = UnixSeconds(jiff::Timestamp::now().as_second());
        let last = self.snapshot.load_full();
        let world = World::compile(self.index.objects(), now, last.as_ref().map(|l| (&*l.world, Touched::ALL)));
        self.number += 1;
        self.surveyor.look(self.number, &Arc::new(world), self.index.objects(), &self.index, Touched::ALL);
        let snapshot = self.snapshot.load_full().unwrap();
        let beside = Beside { status, denials: table, names: &|_, _| Vec::new(), now };
        let reports = self.reporter.reports(&snapshot, &beside);
        self.outlet.wish(&reports);
    }
}

#[test]
fn a_tenant_reads_what_holds_and_what_to_do() {
    let cluster = Cluster::start().unwrap();
    let kubectl = |args: &[&str], stdin: &str| cluster.kubectl(args, stdin).unwrap().success().unwrap();
    cluster.define().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !cluster.kubectl(&["apply", "-f", "-"], OBJECTS).unwrap().ok {
        assert!(Instant::now() < deadline, "the objects are not taken");
        std::thread::sleep(Duration::from_millis(200));
    }
    let patch =
        json!({"status": {"phase": "Running", "podIP": "10.1.0.1", "podIPs": [{"ip": "10.1.0.1"}]}}).to_string();
    kubectl(&["patch", "pod", "-n", "shop", "web", "--subresource=status", "--type=merge", "-p", &patch], "");

    let config = format!(
        "name: gw-a\nnode: n1\ncontrol: '[::]:7443'\nsocket: /run/a.sock\npins: /sys/fs/bpf/x\n\
         kubernetes: {{kubeconfig: {}, namespace: default}}\nresolvers: [{{servers: ['198.51.100.53:53']}}]\n",
        cluster.kubeconfig().display()
    );
    let config: crate::config::Config = serde_saphyr::from_str(&config).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let kube = Kube::start(&config, config.kubernetes.as_ref().unwrap(), runtime).unwrap();
    let (_fresh, stale) = tokio::sync::watch::channel(false);
    let (outlet, leading) = leading::start(&kube, stale, false);
    let snapshot: Arc<ArcSwapOption<Snapshot>> = Arc::default();
    let mut test = Test {
        cluster,
        index: Index::new(Settings::default()),
        surveyor: Surveyor::new(snapshot.clone()),
        snapshot,
        reporter: Reporter::default(),
        outlet,
        number: 0,
    };

    let who = Arc::new(Who { namespace: "shop".into(), pod: "web".into(), node: "n1".into() });
    let denied =
        Denied { source: [10, 1, 0, 1].into(), who: Some(who), count: 3, ..denied("shop", "api.other.example") };
    let mut table = Table::default();
    table.add(denied.clone(), UnixSeconds(jiff::Timestamp::now().as_second()));
    let node = |held| NodeStatus { connected: true, held, ..NodeStatus::default() };
    let pairs = vec![crate::core::PairStatus {
        pair: "partner 203.0.113.10".into(),
        owner: "gw-a".into(),
        epoch: 1,
        from: None,
        held: true,
    }];
    let mut status = Status { nodes: [("n1".to_owned(), node(0))].into(), pairs, ..Status::default() };
    test.look(&status, &table);
    let wait = |test: &Test, condition: &str, object: &str| {
        test.kubectl(&["wait", "-n", "shop", &format!("--for=condition={condition}"), "--timeout=60s", object], "")
    };
    wait(&test, "Accepted", "egp/payments");
    wait(&test, "Programmed=false", "egp/payments");
    // The node confirms what it was sent; that is news.
    status.nodes.insert("n1".into(), node(1));
    test.look(&status, &table);
    wait(&test, "Programmed", "egp/payments");
    wait(&test, "Accepted=false", "egp/broken");
    wait(&test, "Accepted=false", "nsegress/tidegate");
    let deadline = Instant::now() + Duration::from_secs(20);
    while !test.kubectl(&["describe", "pod", "-n", "shop", "web"], "").contains("EgressDenied") {
        test.outlet.tell(
            &denied,
            Some("- toFQDNs: [{matchName: api.other.example}]\n  toPorts: [{protocol: TCP, port: 443}]"),
        );
        assert!(Instant::now() < deadline, "no event");
        std::thread::sleep(Duration::from_millis(100));
    }

    let read = |args: &[&str]| {
        let text = test.kubectl(args, "");
        println!("$ kubectl {}\n{text}", args.join(" "));
        text
    };
    let table_of = read(&["get", "egp,nsegress", "-n", "shop"]);
    assert!(table_of.contains("api.other.example"), "{table_of}");
    read(&["get", "cegp,epool"]);
    let payments = read(&["describe", "egp", "-n", "shop", "payments"]);
    for text in ["1 of 1 node", "egress[stripe].toFQDNs[0]: it is above the ceiling of ClusterEgressPolicy saas"] {
        assert!(payments.contains(text), "{text}");
    }
    let broken = read(&["describe", "egp", "-n", "shop", "broken"]);
    assert!(broken.contains("no good version is known: the pods that it selects are isolated"), "{broken}");
    let egress = read(&["get", "nsegress", "-n", "shop", "tidegate", "-o", "yaml"]);
    for text in [
        "- toFQDNs: [{matchName: api.other.example}]",
        "# The ceiling of ClusterEgressPolicy saas stands against this rule: ask the platform",
        "path: tidegate.dev/allow[1]",
        "- proxy",
        "ipv4: 203.0.113.10",
    ] {
        assert!(egress.contains(text), "{text}");
    }
    read(&["describe", "epool", "partner"]);
    read(&["describe", "pod", "-n", "shop", "web"]);
    let assigned = |test: &mut Test| {
        test.look(&status, &table);
        test.index.objects().assigned.clone()
    };
    // What was written is what is read back.
    let pair = assigned(&mut test).into_iter().next().map(|(k, p)| (k, p.ipv4));
    assert_eq!(pair, Some((("shop".to_owned(), "partner".to_owned()), Some([203, 0, 113, 10].into()))));
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(leading.release());
    let lease = test.kubectl(&["get", "lease", "tidegate-gateway", "-o", "jsonpath={.spec.holderIdentity}"], "");
    assert_eq!(lease, "");
}
