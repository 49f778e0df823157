//! Lists of a real API server are followed: through outages, silence, floods and answers that make no sense.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tidegate_kube::Cluster;
use tidegate_kubernetes::members;
use tidegate_kubernetes::watch::{Change, Event, List, Watched, watch};
use tidegate_kubernetes::{Connection, Settings};
use tokio::sync::mpsc;

use self::support::Proxy;

const MAPS: &str = "maps";

/// Follows the ConfigMaps of a namespace into what a consumer would hold.
struct Follower {
    changes: mpsc::Receiver<Change<&'static str>>,
    watched: Watched<&'static str>,
    held: BTreeMap<String, String>,
    lists: usize,
    reached: u64,
    newest: u64,
}

impl Follower {
    async fn new(kubeconfig: std::path::PathBuf, namespace: &str) -> Self {
        let settings = Settings { kubeconfig: vec![kubeconfig], service: "gw".into(), ..Settings::default() };
        let connection = Connection::new(settings).await.unwrap();
        let list = List {
            feed: MAPS,
            path: format!("/api/v1/namespaces/{namespace}/configmaps"),
            fields: String::new(),
            labels: "watched=yes".into(),
            optional: false,
        };
        let (changes, watched, tasks) = watch(&connection.client, vec![list]);
        for task in tasks {
            tokio::spawn(task);
        }
        Self { changes, watched, held: BTreeMap::new(), lists: 0, reached: 0, newest: 0 }
    }

    fn take(&mut self, change: Change<&'static str>) {
        let name = |o: &Value| o["metadata"]["name"].as_str().unwrap().to_owned();
        match change.event {
            Event::Applied(o) => drop(self.held.insert(name(&o), o["data"]["v"].as_str().unwrap_or("").to_owned())),
            Event::Deleted(o) => drop(self.held.remove(&name(&o))),
            Event::Restarted(seen) => {
                self.lists += 1;
                // A list may be of a restored backup.
                self.reached = 0;
                self.held.retain(|name, _| seen.iter().any(|(_, n)| n == name));
            }
            Event::Bookmark => {}
        }
        let reached = change.reached.unwrap_or_default();
        assert!(reached == 0 || reached >= self.reached, "versions rise");
        self.reached = self.reached.max(reached);
        self.newest = self.newest.max(change.newest.unwrap_or_default());
    }

    /// Takes changes until something holds; panics after `limit`. Says how long it took.
    async fn until(&mut self, limit: Duration, what: &str, holds: impl Fn(&Self) -> bool) -> Duration {
        let started = Instant::now();
        while !holds(self) {
            let left = limit.checked_sub(started.elapsed()).unwrap_or_else(|| {
                panic!("{what}: not within {limit:?}; {:?} {:?}", self.held, self.watched.health());
            });
            if let Ok(change) = tokio::time::timeout(left.min(Duration::from_millis(100)), self.changes.recv()).await {
                self.take(change.expect("the tasks run"));
            }
        }
        started.elapsed()
    }

    fn has(&self, wanted: &[(&str, &str)]) -> bool {
        self.held.len() == wanted.len() && wanted.iter().all(|(n, v)| self.held.get(*n).is_some_and(|h| h == v))
    }
}

fn map(namespace: &str, name: &str, value: &str) -> Value {
    let metadata = json!({"name": name, "namespace": namespace, "labels": {"watched": "yes"}});
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"v": value}})
}

/// The same, but not one that is asked for.
fn other(mut map: Value) -> Value {
    map["metadata"]["labels"]["watched"] = json!("no");
    map
}

fn path(namespace: &str, name: &str) -> String {
    format!("/api/v1/namespaces/{namespace}/configmaps/{name}")
}

fn apply(cluster: &Cluster, map: &Value) {
    let text = |key: &str| map["metadata"][key].as_str().unwrap();
    cluster.api().apply(&path(text("namespace"), text("name")), &map.to_string()).unwrap();
}

fn delete(cluster: &Cluster, namespace: &str, name: &str) {
    assert_eq!(cluster.api().send("DELETE", &path(namespace, name), &[], "").unwrap().status, 200);
}

fn made(cluster: &Cluster, namespace: &str) {
    cluster.api().make_namespace(namespace).unwrap();
}

const SOON: Duration = Duration::from_secs(20);

#[tokio::test]
async fn changes_come_in_order_and_only_those_that_were_asked_for() {
    let cluster = Cluster::shared().unwrap();
    made(&cluster, "order");
    apply(&cluster, &map("order", "a", "1"));
    apply(&cluster, &map("order", "b", "1"));
    apply(&cluster, &other(map("order", "other", "1")));
    let mut f = Follower::new(cluster.kubeconfig(), "order").await;
    f.until(SOON, "the list", |f| f.lists == 1).await;
    assert!(f.has(&[("a", "1"), ("b", "1")]));
    assert!(f.reached >= f.newest && f.newest > 0, "a list has reached all of its objects");
    apply(&cluster, &map("order", "a", "2"));
    delete(&cluster, "order", "b");
    apply(&cluster, &map("order", "c", "1"));
    let took = f.until(SOON, "the changes", |f| f.has(&[("a", "2"), ("c", "1")])).await;
    assert!(took < Duration::from_secs(2), "{took:?}");
    // What leaves the selector is gone.
    apply(&cluster, &other(map("order", "c", "1")));
    f.until(SOON, "the label", |f| f.has(&[("a", "2")])).await;
    assert_eq!(f.newest, f.reached, "a deletion has a version, too");
    let health = f.watched.health()[MAPS].clone();
    assert!(health.listed && health.lists == 1 && health.events >= 4 && health.failing.is_none());
    assert!(health.version == f.reached && f.watched.failing().is_none());
    assert!(f.watched.followed(MAPS).is_some(), "changes come in");
}

/// A message of protobuf that has these fields.
fn message(fields: &[(u8, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (number, octets) in fields {
        let short = u8::try_from(octets.len()).ok().filter(|n| *n < 128).unwrap();
        out.extend([number << 3 | 2, short]);
        out.extend_from_slice(octets);
    }
    out
}

/// In protobuf texts may have octets that are not UTF-8: the API server keeps them, and in JSON they are a sign that stands for them.
#[tokio::test]
async fn octets_that_are_no_text_stop_no_list() {
    let cluster = Cluster::shared().unwrap();
    made(&cluster, "octets");
    apply(&cluster, &map("octets", "good", "1"));
    let settings = Settings { kubeconfig: vec![cluster.kubeconfig()], service: "gw".into(), ..Settings::default() };
    let client = Connection::new(settings).await.unwrap().client;
    let mut f = Follower::new(cluster.kubeconfig(), "octets").await;
    f.until(SOON, "the list", |f| f.has(&[("good", "1")])).await;
    let entry = |key: &[u8], value: &[u8]| message(&[(1, key), (2, value)]);
    let bad = b"a\xff\xc0\x80.example";
    let (label, note) = (entry(b"watched", b"yes"), entry(b"tidegate.dev/allow", bad));
    let meta = message(&[(1, b"bad"), (11, &label), (12, &note)]);
    let raw = message(&[(1, &meta), (2, &entry(b"v", bad))]);
    let kind = message(&[(1, b"v1"), (2, b"ConfigMap")]);
    let body = [b"k8s\0".to_vec(), message(&[(1, &kind)]), vec![2 << 3 | 2, raw.len() as u8], raw].concat();
    let request = http::Request::post("/api/v1/namespaces/octets/configmaps")
        .header("Content-Type", "application/vnd.kubernetes.protobuf")
        .header("Accept", "application/json")
        .body(body)
        .unwrap();
    let made: Value = client.request(request).await.unwrap();
    assert_eq!(made["metadata"]["annotations"]["tidegate.dev/allow"], "a\u{fffd}\u{fffd}\u{fffd}.example");
    let same = |f: &Follower| f.has(&[("bad", "a\u{fffd}\u{fffd}\u{fffd}.example"), ("good", "1")]);
    f.until(SOON, "the object with octets", same).await;
    let mut again = Follower::new(cluster.kubeconfig(), "octets").await;
    again.until(SOON, "the list with them", same).await;
    apply(&cluster, &map("octets", "good", "2"));
    f.until(SOON, "what comes after them", |f| f.held["good"] == "2").await;
    assert_eq!(f.lists, 1);
}

#[tokio::test]
async fn a_list_of_many_pages_and_a_flood_come_whole() {
    let cluster = Cluster::shared().unwrap();
    made(&cluster, "flood");
    let many = |value: &str| (0..700).for_each(|n| apply(&cluster, &map("flood", &format!("m{n}"), value)));
    many("1");
    let mut f = Follower::new(cluster.kubeconfig(), "flood").await;
    // Nobody takes anything for a while: the queue is full, and stays bounded.
    tokio::time::sleep(Duration::from_secs(1)).await;
    many("2");
    f.until(Duration::from_secs(60), "all", |f| f.held.len() == 700 && f.held.values().all(|v| v == "2")).await;
    assert_eq!(f.lists, 1, "a flood is no reason to list again");
}

#[tokio::test]
async fn an_outage_takes_nothing_away_and_its_changes_come_after_it() {
    let cluster = Cluster::start().unwrap();
    made(&cluster, "outage");
    apply(&cluster, &map("outage", "a", "1"));
    apply(&cluster, &map("outage", "b", "1"));
    let mut f = Follower::new(cluster.kubeconfig(), "outage").await;
    f.until(SOON, "the list", |f| f.lists == 1).await;
    // While it is away for this client alone, others change things.
    let proxy = Proxy::start(&cluster);
    let mut cut = Follower::new(proxy.kubeconfig(), "outage").await;
    cut.until(SOON, "the list", |f| f.lists == 1).await;

    proxy.refuse();
    cut.until(SOON, "the failure", |f| f.watched.failing().is_some()).await;
    apply(&cluster, &map("outage", "a", "2"));
    delete(&cluster, "outage", "b");
    apply(&cluster, &map("outage", "c", "1"));
    tokio::time::sleep(Duration::from_secs(2)).await;
    cut.until(SOON, "nothing", |_| true).await;
    assert!(cut.has(&[("a", "1"), ("b", "1")]), "last known good: {:?}", cut.held);
    assert!(cut.watched.followed(MAPS).is_none(), "nothing comes in");
    proxy.forward();
    cut.until(SOON, "the changes", |f| f.has(&[("a", "2"), ("c", "1")])).await;
    cut.until(SOON, "health", |f| f.watched.failing().is_none()).await;
    assert_eq!(cut.lists, 1, "it goes on where it was");
    assert!(cut.watched.followed(MAPS).is_some());

    cluster.stop_api_server();
    f.until(SOON, "the failure", |f| f.watched.failing().is_some()).await;
    assert!(f.has(&[("a", "2"), ("c", "1")]));
    let why = f.watched.failing().unwrap().1;
    assert!(!why.is_empty());
    cluster.start_api_server().unwrap();
    delete(&cluster, "outage", "c");
    f.until(Duration::from_secs(40), "the deletion", |f| f.has(&[("a", "2")])).await;
    assert!(f.watched.failing().is_none());
}

#[tokio::test]
async fn a_watch_that_hangs_is_replaced_when_somebody_says_so() {
    let cluster = Cluster::shared().unwrap();
    made(&cluster, "hang");
    apply(&cluster, &map("hang", "a", "1"));
    let proxy = Proxy::start(&cluster);
    let mut f = Follower::new(proxy.kubeconfig(), "hang").await;
    f.until(SOON, "the list", |f| f.lists == 1).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    // Connections stay up, and nothing comes through them any more.
    proxy.swallow();
    apply(&cluster, &map("hang", "a", "2"));
    tokio::time::sleep(Duration::from_secs(2)).await;
    f.until(SOON, "nothing", |_| true).await;
    assert!(f.has(&[("a", "1")]) && f.watched.failing().is_none(), "nobody can tell");
    // New connections work again, the old one does not.
    proxy.forward_new();
    tokio::time::sleep(Duration::from_secs(1)).await;
    f.until(SOON, "nothing", |_| true).await;
    assert!(f.has(&[("a", "1")]));
    f.watched.hurry(MAPS);
    let took = f.until(SOON, "the change", |f| f.has(&[("a", "2")])).await;
    assert!(took < Duration::from_secs(3), "{took:?}");
    assert_eq!(f.lists, 1);
}

#[tokio::test]
async fn a_watch_that_hangs_is_replaced_in_half_a_minute_and_one_that_has_nothing_to_say_goes_on() {
    let cluster = Cluster::shared().unwrap();
    made(&cluster, "silent");
    apply(&cluster, &map("silent", "a", "1"));
    let mut quiet = Follower::new(cluster.kubeconfig(), "silent").await;
    let proxy = Proxy::start(&cluster);
    let mut f = Follower::new(proxy.kubeconfig(), "silent").await;
    f.until(SOON, "the list", |f| f.lists == 1).await;
    quiet.until(SOON, "the list", |f| f.lists == 1).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let heard = |f: &Follower| f.watched.health()[MAPS].heard.unwrap().elapsed();
    let first = quiet.watched.health()[MAPS].version;
    // It is not asked for, and still a version of the list.
    apply(&cluster, &other(map("silent", "other", "1")));
    let mut longest = Duration::ZERO;
    for _ in 0..55 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        longest = longest.max(heard(&quiet));
    }
    assert!(longest < Duration::from_secs(28), "{longest:?}: the API server ends each in time");
    quiet.until(SOON, "nothing", |_| true).await;
    let health = quiet.watched.health()[MAPS].clone();
    assert!(health.lists == 1 && health.failing.is_none() && health.version > first, "{health:?} {first}");
    proxy.swallow();
    apply(&cluster, &map("silent", "a", "2"));
    tokio::time::sleep(Duration::from_secs(1)).await;
    // New connections work again, the old one does not.
    proxy.forward_new();
    f.until(Duration::from_secs(33), "the change", |f| f.has(&[("a", "2")])).await;
    assert_eq!(f.lists, 1);
    quiet.until(SOON, "the change", |f| f.has(&[("a", "2")])).await;
}

#[tokio::test]
async fn a_watch_on_gateways_that_hangs_is_replaced_in_half_a_minute() {
    let cluster = Cluster::shared().unwrap();
    made(&cluster, "hung");
    let proxy = Proxy::start(&cluster);
    let settings = Settings { kubeconfig: vec![proxy.kubeconfig()], service: "gw".into(), ..Settings::default() };
    let client = Connection::new(settings).await.unwrap().client;
    let (tell, mut told) = mpsc::unbounded_channel();
    let task = tokio::spawn(async move { members::run(client, "hung", "gw", move |m| drop(tell.send(m))).await });
    assert_eq!(tokio::time::timeout(SOON, told.recv()).await.unwrap().unwrap(), []);
    proxy.swallow();
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": "s", "namespace": "hung", "labels": {"kubernetes.io/service-name": "gw"}},
        "ports": [{"name": "control", "port": 7443}],
        "endpoints": [{"addresses": ["192.0.2.1"], "nodeName": "n", "targetRef": {"kind": "Pod", "name": "gw-a"}}],
    });
    let path = "/apis/discovery.k8s.io/v1/namespaces/hung/endpointslices/s";
    cluster.api().apply(path, &slice.to_string()).unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(told.try_recv().is_err(), "nothing comes through");
    proxy.forward_new();
    let found =
        tokio::time::timeout(Duration::from_secs(33), told.recv()).await.expect("within half a minute").unwrap();
    assert_eq!(found.iter().map(|m| m.name.as_str()).collect::<Vec<_>>(), ["gw-a"]);
    task.abort();
}

#[tokio::test]
async fn after_an_outage_it_does_not_wait_when_others_are_back() {
    let cluster = Cluster::shared().unwrap();
    made(&cluster, "late");
    let proxy = Proxy::start(&cluster);
    let mut f = Follower::new(proxy.kubeconfig(), "late").await;
    f.until(SOON, "the list", |f| f.lists == 1).await;
    assert_eq!(f.watched.back_for(MAPS), None, "it never failed");
    proxy.refuse();
    f.until(SOON, "the failure", |f| f.watched.failing().is_some()).await;
    assert_eq!(f.watched.back_for(MAPS), Some(Duration::ZERO));
    // By now more than a second is between two tries; one has just failed.
    tokio::time::sleep(Duration::from_secs(4)).await;
    let before = proxy.attempts();
    f.until(SOON, "the next try", |_| proxy.attempts() > before).await;
    proxy.forward();
    apply(&cluster, &map("late", "a", "1"));
    f.watched.hurry(MAPS);
    let took = f.until(SOON, "the change", |f| f.has(&[("a", "1")])).await;
    assert!(took < Duration::from_millis(800), "{took:?}");
    assert!(f.watched.back_for(MAPS).is_some_and(|back| !back.is_zero() && back <= took));
    // Who asked for another one has it: this one stays.
    let events = f.watched.health()[MAPS].events;
    apply(&cluster, &map("late", "b", "1"));
    f.until(SOON, "the next change", |f| f.has(&[("a", "1"), ("b", "1")])).await;
    assert_eq!((f.lists, f.watched.health()[MAPS].events), (1, events + 1));
}

#[tokio::test]
async fn a_version_that_is_too_old_leads_to_a_new_list() {
    let cluster = Cluster::start().unwrap();
    made(&cluster, "old");
    apply(&cluster, &map("old", "a", "1"));
    apply(&cluster, &map("old", "b", "1"));
    let proxy = Proxy::start(&cluster);
    let mut f = Follower::new(proxy.kubeconfig(), "old").await;
    f.until(SOON, "the list", |f| f.lists == 1).await;
    proxy.refuse();
    f.until(SOON, "the failure", |f| f.watched.failing().is_some()).await;
    delete(&cluster, "old", "b");
    apply(&cluster, &map("old", "a", "2"));
    // A new API server has no events of before it began, and etcd forgets what is compacted.
    cluster.stop_api_server();
    support::compact(&cluster);
    cluster.start_api_server().unwrap();
    proxy.forward();
    f.until(Duration::from_secs(40), "the state of now", |f| f.has(&[("a", "2")])).await;
    assert_eq!(f.lists, 2, "{:?}", f.watched.health());
}

#[tokio::test]
async fn a_restored_backup_is_read_anew() {
    let cluster = Cluster::start().unwrap();
    made(&cluster, "back");
    apply(&cluster, &map("back", "a", "1"));
    apply(&cluster, &map("back", "b", "1"));
    let backup = cluster.back_up().unwrap();
    support::write_much(&cluster);
    apply(&cluster, &map("back", "a", "2"));
    delete(&cluster, "back", "b");
    apply(&cluster, &map("back", "c", "1"));
    let mut f = Follower::new(cluster.kubeconfig(), "back").await;
    f.until(SOON, "the list", |f| f.lists == 1 && f.has(&[("a", "2"), ("c", "1")])).await;
    let before = f.reached;
    cluster.restore(&backup).unwrap();
    let took = f.until(SOON, "the backup", |f| f.has(&[("a", "1"), ("b", "1")])).await;
    println!("what was restored is known {took:?} after the API server answers again");
    assert!(f.reached < before, "{} {before}", f.reached);
    // Versions that it has seen before are other changes now.
    apply(&cluster, &map("back", "a", "x"));
    let took = f.until(SOON, "the change", |f| f.has(&[("a", "x"), ("b", "1")])).await;
    assert!(took < Duration::from_secs(2), "{took:?}");
}

#[tokio::test]
async fn a_kind_that_is_not_there_is_said_or_taken_for_empty() {
    let cluster = Cluster::shared().unwrap();
    let settings = Settings { kubeconfig: vec![cluster.kubeconfig()], ..Settings::default() };
    let connection = Connection::new(settings).await.unwrap();
    assert_eq!(connection.namespace, "default");
    let list = |feed, optional| List {
        feed,
        path: "/apis/tidegate.dev/v1alpha1/nothings".into(),
        fields: String::new(),
        labels: String::new(),
        optional,
    };
    let (mut changes, watched, tasks) = watch(&connection.client, vec![list("must", false), list("may", true)]);
    for task in tasks {
        tokio::spawn(task);
    }
    let change = tokio::time::timeout(SOON, changes.recv()).await.unwrap().unwrap();
    assert!(change.feed == "may" && matches!(change.event, Event::Restarted(seen) if seen.is_empty()));
    let deadline = Instant::now() + SOON;
    while watched.failing().is_none() && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(watched.failing().unwrap().1.contains("not found") || watched.failing().unwrap().1.contains("404"));
    let health = watched.health();
    assert!(health["may"].listed && !health["must"].listed);
}
