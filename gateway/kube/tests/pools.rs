//! Owners of egress pairs against a real API server.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tidegate_kube::Cluster;
use tidegate_kubernetes::members::{self, Member};
use tidegate_kubernetes::pools::{self, Address, Command, Event, Owner, Record, Used, Write};
use tidegate_kubernetes::{Connection, FINALIZER, Settings};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use self::support::Proxy;

const SOON: Duration = Duration::from_secs(20);

/// Who says what is in use says of all other pools that they are not: one test at a time, as the API server is shared.
static USE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

fn cluster() -> Arc<Cluster> {
    let cluster = Cluster::shared().unwrap();
    cluster.define().unwrap();
    cluster
}

async fn connect(cluster: &Cluster) -> kube::Client {
    let settings = Settings { kubeconfig: vec![cluster.kubeconfig()], ..Settings::default() };
    Connection::new(settings).await.unwrap().client
}

fn pair(last: u8) -> Address {
    Address { ipv4: Some([203, 0, 113, last].into()), ipv6: None }
}

fn by(gateway: &str, epoch: u64) -> Owner {
    Owner { gateway: gateway.into(), epoch }
}

fn record(last: u8, gateway: &str, epoch: u64) -> Record {
    Record { address: pair(last), owner: by(gateway, epoch) }
}

fn write(pool: &str, last: u8, claim: Owner, over: Option<Owner>) -> Command {
    Command::Write(Write { pool: pool.into(), address: pair(last), claim, over })
}

/// The task of one gateway.
struct Gateway {
    commands: mpsc::Sender<Command>,
    stale: watch::Sender<bool>,
    /// The addresses that flows leave with.
    live: Arc<Mutex<BTreeSet<IpAddr>>>,
    events: mpsc::UnboundedReceiver<Event>,
    task: JoinHandle<()>,
}

impl Gateway {
    async fn start(cluster: &Cluster, name: &str) -> Self {
        Self::with(connect(cluster).await, name)
    }

    fn with(client: kube::Client, name: &str) -> Self {
        let (commands, rx) = mpsc::channel(64);
        let (tell, events) = mpsc::unbounded_channel();
        let (stale, is_stale) = watch::channel(false);
        let live = Arc::<Mutex<BTreeSet<IpAddr>>>::default();
        let lives = live.clone();
        let lives = Arc::new(move || Ok(lives.lock().unwrap().clone()));
        let run = pools::run(client, name.into(), rx, is_stale, lives, move |e| drop(tell.send(e)));
        Self { commands, stale, live, events, task: tokio::spawn(run) }
    }

    async fn send(&self, command: Command) {
        self.commands.send(command).await.unwrap();
    }

    /// Waits until a pool's records are these.
    async fn records(&mut self, pool: &str, wanted: &[Record]) {
        self.told(pool, |e| matches!(e, Event::Pool { records: Some(r), .. } if r == wanted)).await;
    }

    /// Sends until a pool's records are these: what the API server did not answer in time is asked for again, as by the core.
    async fn recorded(&mut self, all: &[Command], pool: &str, wanted: &[Record]) {
        let commands = self.commands.clone();
        let asks = async {
            loop {
                for c in all {
                    commands.send(c.clone()).await.unwrap();
                }
                tokio::time::sleep(Duration::from_secs(2)).await;
            }
        };
        tokio::select! {
            () = self.records(pool, wanted) => {}
            () = asks => {}
        }
    }

    async fn told(&mut self, pool: &str, mut is: impl FnMut(&Event) -> bool) {
        let mut last = None;
        let wait = async {
            while let Some(event) = self.events.recv().await {
                if matches!(&event, Event::Pool { name, .. } if name == pool) {
                    if is(&event) {
                        return;
                    }
                    last = Some(event);
                }
            }
        };
        if timeout(SOON, wait).await.is_err() {
            panic!("of {pool} this was told last: {last:?}");
        }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn path(pool: &str) -> String {
    format!("/apis/tidegate.dev/v1alpha1/egresspools/{pool}")
}

fn make(cluster: &Cluster, name: &str, lasts: &[u8]) {
    let addresses: Vec<Value> = lasts.iter().map(|l| json!({"ipv4": format!("203.0.113.{l}")})).collect();
    apply(cluster, name, &json!({"addressSource": "Static", "static": {"addresses": addresses}}));
}

fn apply(cluster: &Cluster, name: &str, spec: &Value) {
    let pool = json!({
        "apiVersion": "tidegate.dev/v1alpha1", "kind": "EgressPool", "metadata": {"name": name}, "spec": spec,
    });
    cluster.api().apply(&path(name), &pool.to_string()).unwrap();
}

/// Says who owns the first pair of a pool, as another gateway does.
fn set_owner(cluster: &Cluster, name: &str, gateway: &str, epoch: u64) {
    let addresses = json!([{"ipv4": "203.0.113.1", "owner": gateway, "epoch": epoch, "namespaces": 0}]);
    let patch = json!({"status": {"addresses": addresses}}).to_string();
    let merge = [("Content-Type", "application/merge-patch+json")];
    let answer = cluster.api().send("PATCH", &format!("{}/status", path(name)), &merge, &patch).unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
}

fn get(cluster: &Cluster, name: &str) -> Value {
    let answer = cluster.api().send("GET", &path(name), &[], "").unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    serde_json::from_str(&answer.body).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_stands_over_what_it_was_meant_for_and_nothing_else() {
    let cluster = cluster();
    make(&cluster, "cas", &[1, 2]);
    let (mut a, mut b) = (Gateway::start(&cluster, "gw-a").await, Gateway::start(&cluster, "gw-b").await);
    a.records("cas", &[]).await;
    a.send(write("cas", 1, by("gw-a", 1), None)).await;
    b.records("cas", &[record(1, "gw-a", 1)]).await;
    // Too late: told what stands there.
    b.send(write("cas", 1, by("gw-b", 1), None)).await;
    b.records("cas", &[record(1, "gw-a", 1)]).await;
    b.send(write("cas", 1, by("gw-b", 2), Some(by("gw-a", 1)))).await;
    a.records("cas", &[record(1, "gw-b", 2)]).await;
    // A lower epoch is written over one that nobody believes.
    a.send(write("cas", 1, by("gw-a", 1), Some(by("gw-b", 2)))).await;
    a.send(write("cas", 2, by("gw-a", 1), None)).await;
    a.records("cas", &[record(1, "gw-a", 1), record(2, "gw-a", 1)]).await;
    // What others wrote of the status stays, theirs and ours, also what this version does not know of an entry.
    let patch = json!({"status": {"conditions": [{
        "type": "Accepted", "status": "True", "reason": "Valid", "message": "", "lastTransitionTime": "2026-11-20T00:00:00Z",
    }]}});
    let args = ["patch", "egresspool", "cas", "--subresource=status", "--type=merge", "-p", &patch.to_string()];
    cluster.kubectl(&args, "").unwrap().success().unwrap();
    a.send(write("cas", 1, by("gw-a", 2), Some(by("gw-a", 1)))).await;
    a.records("cas", &[record(1, "gw-a", 2), record(2, "gw-a", 1)]).await;
    let status = get(&cluster, "cas")["status"].clone();
    assert_eq!(status["conditions"][0]["type"], "Accepted");
    assert_eq!(
        status["addresses"],
        json!([
            {"ipv4": "203.0.113.1", "owner": "gw-a", "epoch": 2, "namespaces": 0},
            {"ipv4": "203.0.113.2", "owner": "gw-a", "epoch": 1, "namespaces": 0},
        ])
    );
    // A pair that the pool has no more goes with the next claim.
    make(&cluster, "cas", &[1]);
    a.send(write("cas", 1, by("gw-a", 3), Some(by("gw-a", 2)))).await;
    a.records("cas", &[record(1, "gw-a", 3)]).await;
    // There is none: nobody records anything.
    a.send(write("nowhere", 1, by("gw-a", 1), None)).await;
    a.told("nowhere", |e| matches!(e, Event::Pool { records: None, .. })).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_that_race_one_wins_each_epoch() {
    let cluster = cluster();
    make(&cluster, "race", &[1, 2, 3, 4]);
    let names = ["gw-a", "gw-b", "gw-c"];
    let mut gateways = Vec::new();
    for name in names {
        gateways.push(Gateway::start(&cluster, name).await);
    }
    let mut stands: Vec<Option<Owner>> = vec![None; 4];
    for epoch in 1..=10 {
        // Everybody knows what stands there, wants every pair, and all at once.
        for (g, name) in gateways.iter().zip(names) {
            for (last, over) in (1..=4).zip(&stands) {
                g.send(write("race", last, by(name, epoch), over.clone())).await;
            }
        }
        // All of them are told the same in the end.
        let mut found: Vec<Vec<Record>> = Vec::new();
        for g in &mut gateways {
            let done = |e: &Event| match e {
                Event::Pool { records: Some(r), .. } if r.len() == 4 && r.iter().all(|r| r.owner.epoch == epoch) => {
                    found.push(r.clone());
                    true
                }
                _ => false,
            };
            g.told("race", done).await;
        }
        assert!(found.iter().all(|f| *f == found[0]), "{found:?}");
        stands = found[0].iter().map(|r| Some(r.owner.clone())).collect();
    }
    let before = get(&cluster, "race")["metadata"]["resourceVersion"].clone();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(get(&cluster, "race")["metadata"]["resourceVersion"], before, "who came too late writes nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_network_has_one_pair_without_addresses() {
    let cluster = cluster();
    apply(&cluster, "net", &json!({"addressSource": "PodNetwork"}));
    let mut a = Gateway::start(&cluster, "gw-a").await;
    let none = Address::default();
    a.send(Command::Write(Write { pool: "net".into(), address: none, claim: by("gw-a", 1), over: None })).await;
    a.records("net", &[Record { address: none, owner: by("gw-a", 1) }]).await;
    // What somebody broke is no record, and does not stand for the pair without addresses.
    let patch = json!({"status": {"addresses": [{"ipv4": "203.0.113.7", "epoch": 9, "namespaces": 0}]}});
    let args = ["patch", "egresspool", "net", "--subresource=status", "--type=merge", "-p", &patch.to_string()];
    cluster.kubectl(&args, "").unwrap().success().unwrap();
    a.records("net", &[Record { address: pair(7), owner: by("", 9) }]).await;
    a.send(Command::Write(Write { pool: "net".into(), address: none, claim: by("gw-a", 2), over: None })).await;
    a.records("net", &[Record { address: none, owner: by("gw-a", 2) }]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_in_use_is_held_and_counted() {
    let _use = USE.lock().await;
    let cluster = cluster();
    make(&cluster, "used", &[1, 2]);
    let mut a = Gateway::start(&cluster, "gw-a").await;
    let claims = [write("used", 1, by("gw-a", 1), None), write("used", 2, by("gw-b", 1), None)];
    a.recorded(&claims, "used", &[record(1, "gw-a", 1), record(2, "gw-b", 1)]).await;
    let used = |n: u32| Used::from([("used".to_owned(), BTreeMap::from([(pair(1), n), (pair(2), 9)]))]);
    a.send(Command::Used(used(3))).await;
    let until = |what: &dyn Fn(&Value) -> bool| {
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            if what(&get(&cluster, "used")) {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("{}", get(&cluster, "used"));
    };
    until(&|p| p["metadata"]["finalizers"] == json!([FINALIZER]));
    // Its own pairs are counted, those of others are theirs to count.
    until(&|p| p["status"]["addresses"][0]["namespaces"] == 3);
    assert_eq!(get(&cluster, "used")["status"]["addresses"][1]["namespaces"], 0);
    cluster.kubectl(&["delete", "egresspool", "used", "--wait=false"], "").unwrap().success().unwrap();
    a.told("used", |e| matches!(e, Event::Pool { deleted: true, records: Some(_), .. })).await;
    // It goes on serving: claims are recorded.
    let claims = [write("used", 1, by("gw-a", 2), Some(by("gw-a", 1)))];
    a.recorded(&claims, "used", &[record(1, "gw-a", 2), record(2, "gw-b", 1)]).await;
    std::thread::sleep(Duration::from_secs(7));
    assert!(get(&cluster, "used")["metadata"]["deletionTimestamp"].is_string(), "held as long as it is in use");
    // Who knows less than others may not know that it is used again.
    a.stale.send_replace(true);
    a.send(Command::Used(Used::new())).await;
    std::thread::sleep(Duration::from_secs(9));
    assert!(get(&cluster, "used")["metadata"]["deletionTimestamp"].is_string(), "a stale gateway lets nothing go");
    a.stale.send_replace(false);
    a.told("used", |e| matches!(e, Event::Pool { records: None, .. })).await;
}

/// One that drains has drained when no namespace and no living flow leaves with it; of others nothing is said.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pair_that_drains_says_when_it_has() {
    let _use = USE.lock().await;
    let cluster = cluster();
    let addresses = json!([{"ipv4": "203.0.113.1", "state": "Draining"}, {"ipv4": "203.0.113.2"}]);
    apply(&cluster, "drains", &json!({"addressSource": "Static", "static": {"addresses": addresses}}));
    let mut a = Gateway::start(&cluster, "gw-a").await;
    let claims = [write("drains", 1, by("gw-a", 1), None), write("drains", 2, by("gw-a", 1), None)];
    a.recorded(&claims, "drains", &[record(1, "gw-a", 1), record(2, "gw-a", 1)]).await;
    let until = |what: Value| {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let now = get(&cluster, "drains")["status"]["addresses"].clone();
            let said = json!([now[0]["drained"], now[1]["drained"]]);
            if said == what {
                return;
            }
            assert!(Instant::now() < deadline, "{now}");
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    let used = |n: &[(u8, u32)]| {
        let counts = n.iter().map(|(last, n)| (pair(*last), *n)).collect();
        Command::Used(Used::from([("drains".to_owned(), counts)]))
    };
    a.live.lock().unwrap().extend(["203.0.113.1", "203.0.113.2"].map(|a| a.parse::<IpAddr>().unwrap()));
    a.send(used(&[(1, 1), (2, 1)])).await;
    until(json!([false, null]));
    a.send(used(&[(2, 2)])).await;
    std::thread::sleep(Duration::from_secs(3));
    until(json!([false, null]));
    a.live.lock().unwrap().remove(&"203.0.113.1".parse::<IpAddr>().unwrap());
    until(json!([true, null]));
    // It is given to namespaces again.
    apply(&cluster, "drains", &json!({"addressSource": "Static", "static": {"addresses": [{"ipv4": "203.0.113.1"}]}}));
    until(json!([null, null]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counts_that_change_all_the_time_are_written_now_and_then() {
    let _use = USE.lock().await;
    let cluster = cluster();
    make(&cluster, "busy", &[1]);
    let mut a = Gateway::start(&cluster, "gw-a").await;
    a.send(write("busy", 1, by("gw-a", 1), None)).await;
    a.records("busy", &[record(1, "gw-a", 1)]).await;
    let begun = Instant::now();
    for n in 1.. {
        a.send(Command::Used(Used::from([("busy".to_owned(), BTreeMap::from([(pair(1), n)]))]))).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        if begun.elapsed() > Duration::from_secs(4) {
            break;
        }
    }
    let mut told = 0;
    while let Ok(event) = a.events.try_recv() {
        told += usize::from(matches!(event, Event::Pool { name, .. } if name == "busy"));
    }
    // Every write is told when it is done; the watch's copy of it is no news.
    assert!((2..=12).contains(&told), "{told} changes of a pool in 4 s");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_is_silence_and_the_end_of_it_is_heard() {
    let cluster = Cluster::start().unwrap();
    cluster.define().unwrap();
    make(&cluster, "p", &[1]);
    let mut a = Gateway::start(&cluster, "gw-a").await;
    a.records("p", &[]).await;
    cluster.stop_api_server();
    tokio::time::sleep(Duration::from_millis(1200)).await;
    while a.events.try_recv().is_ok() {}
    a.send(write("p", 1, by("gw-a", 1), None)).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(a.events.try_recv().is_err(), "nothing is heard, and nothing taken for written");
    cluster.start_api_server().unwrap();
    timeout(SOON, async { while a.events.recv().await != Some(Event::Answered) {} }).await.unwrap();
    // What nobody has answered is asked again.
    a.send(write("p", 1, by("gw-a", 1), None)).await;
    a.records("p", &[record(1, "gw-a", 1)]).await;
    // What others write comes in as soon as of any other kind.
    let started = Instant::now();
    set_owner(&cluster, "p", "gw-b", 2);
    a.records("p", &[record(1, "gw-b", 2)]).await;
    assert!(started.elapsed() < Duration::from_secs(6), "{:?}", started.elapsed());
}

/// Connections that were open hang, that of the watch among them, and new ones work: what others write is heard in seconds, since the
/// API server's sign of life hangs too and is tried again. A watch that hangs while that goes on is given up after half a minute.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_hang_are_replaced() {
    let cluster = cluster();
    make(&cluster, "hangs", &[1]);
    let proxy = Proxy::start(&cluster);
    let settings = Settings { kubeconfig: vec![proxy.kubeconfig()], ..Settings::default() };
    let mut a = Gateway::with(Connection::new(settings).await.unwrap().client, "gw-a");
    a.records("hangs", &[]).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    proxy.swallow();
    tokio::time::sleep(Duration::from_millis(100)).await;
    proxy.forward_new();
    let started = Instant::now();
    set_owner(&cluster, "hangs", "gw-b", 2);
    a.records("hangs", &[record(1, "gw-b", 2)]).await;
    let took = started.elapsed();
    set_owner(&cluster, "hangs", "gw-b", 3);
    a.records("hangs", &[record(1, "gw-b", 3)]).await;
    assert!(took < Duration::from_secs(9), "{took:?}");
}

/// The watch alone hangs, and is given up after half a minute. Nobody waits for that: who writes a claim, or looks after a pool, reads
/// what he did not hear of.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_that_hangs_alone_holds_nothing_up() {
    let _use = USE.lock().await;
    let cluster = cluster();
    make(&cluster, "quiet", &[1]);
    let proxy = Proxy::start(&cluster);
    let settings = Settings { kubeconfig: vec![proxy.kubeconfig()], ..Settings::default() };
    let mut a = Gateway::with(Connection::new(settings).await.unwrap().client, "gw-a");
    a.send(write("quiet", 1, by("gw-a", 1), None)).await;
    a.records("quiet", &[record(1, "gw-a", 1)]).await;
    let namespaces = |n| Command::Used(BTreeMap::from([("quiet".into(), BTreeMap::from([(pair(1), n)]))]));
    let counted = async |n: u32| {
        let is = || get(&cluster, "quiet")["status"]["addresses"][0]["namespaces"] == n;
        timeout(Duration::from_secs(12), async {
            while !is() {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        })
        .await
        .unwrap_or_else(|_| panic!("{n} namespaces: {}", get(&cluster, "quiet")));
    };
    a.send(namespaces(1)).await;
    counted(1).await;
    // A sign of life is asked for more often, on another connection.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    proxy.swallow_quiet(Duration::from_secs(1));
    let started = Instant::now();
    cluster.kubectl(&["label", "egresspool", "quiet", "a=b"], "").unwrap().success().unwrap();
    a.send(namespaces(2)).await;
    counted(2).await;
    set_owner(&cluster, "quiet", "gw-b", 2);
    a.send(write("quiet", 1, by("gw-a", 2), Some(by("gw-a", 1)))).await;
    let written = Instant::now();
    a.records("quiet", &[record(1, "gw-b", 2)]).await;
    assert!(written.elapsed() < Duration::from_secs(1), "{:?}", written.elapsed());
    assert!(started.elapsed() < Duration::from_secs(20), "the watch has not been replaced: {:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_restored_backup_says_counts() {
    let cluster = Cluster::start().unwrap();
    cluster.define().unwrap();
    make(&cluster, "p", &[1]);
    let mut a = Gateway::start(&cluster, "gw-a").await;
    a.send(write("p", 1, by("gw-a", 1), None)).await;
    a.records("p", &[record(1, "gw-a", 1)]).await;
    let backup = cluster.back_up().unwrap();
    support::write_much(&cluster);
    make(&cluster, "late", &[2]);
    a.told("late", |e| matches!(e, Event::Pool { records: Some(_), .. })).await;
    a.send(write("p", 1, by("gw-b", 2), Some(by("gw-a", 1)))).await;
    a.records("p", &[record(1, "gw-b", 2)]).await;
    cluster.restore(&backup).unwrap();
    // It is told of the pool that is not there any more, and of what stands in the other one.
    let gone = |e: &Event| matches!(e, Event::Pool { records: None, .. });
    let mut seen = (false, false);
    let told = async {
        while seen != (true, true) {
            match a.events.recv().await.unwrap() {
                e @ Event::Pool { .. } if gone(&e) => seen.0 = true,
                Event::Pool { records: Some(r), .. } if r == [record(1, "gw-a", 1)] => seen.1 = true,
                _ => {}
            }
        }
    };
    timeout(SOON, told).await.unwrap();
    // What others write from now on is heard, though its versions were seen before.
    let mut b = Gateway::start(&cluster, "gw-b").await;
    b.send(write("p", 1, by("gw-b", 3), Some(by("gw-a", 1)))).await;
    a.records("p", &[record(1, "gw-b", 3)]).await;
    a.send(write("p", 1, by("gw-a", 4), Some(by("gw-b", 3)))).await;
    b.records("p", &[record(1, "gw-a", 4)]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateways_are_the_endpoints_of_their_service() {
    let cluster = Cluster::shared().unwrap();
    let _ = cluster.kubectl(&["create", "namespace", "gateways"], "").unwrap();
    let slice = |name: &str, service: &str, endpoints: Value| {
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": name, "namespace": "gateways", "labels": {"kubernetes.io/service-name": service}},
            "ports": [{"name": "control", "port": 7443, "protocol": "TCP"}], "endpoints": endpoints,
        });
        cluster.kubectl(&["apply", "--server-side", "-f", "-"], &slice.to_string()).unwrap().success().unwrap();
    };
    let endpoint = |pod: &str, ip: &str, terminating: bool| {
        json!({"addresses": [ip], "nodeName": "n1", "targetRef": {"kind": "Pod", "name": pod, "namespace": "gateways"},
            "conditions": {"ready": false, "serving": true, "terminating": terminating}})
    };
    slice("s-1", "gw", json!([endpoint("gw-a", "192.0.2.1", false)]));
    slice("s-9", "other", json!([endpoint("x", "192.0.2.9", false)]));
    let (tell, mut told) = mpsc::unbounded_channel();
    let client = connect(&cluster).await;
    let task = tokio::spawn(async move { members::run(client, "gateways", "gw", move |m| drop(tell.send(m))).await });
    let names = |m: &[Member]| m.iter().map(|m| (m.name.clone(), m.terminating)).collect::<Vec<_>>();
    let mut next = async || timeout(SOON, told.recv()).await.unwrap().unwrap();
    assert_eq!(names(&next().await), [("gw-a".to_owned(), false)]);
    slice("s-2", "gw", json!([endpoint("gw-b", "192.0.2.2", false)]));
    assert_eq!(names(&next().await), [("gw-a".to_owned(), false), ("gw-b".to_owned(), false)]);
    slice("s-1", "gw", json!([endpoint("gw-a", "192.0.2.1", true)]));
    assert_eq!(names(&next().await), [("gw-a".to_owned(), true), ("gw-b".to_owned(), false)]);
    cluster.kubectl(&["delete", "endpointslice", "-n", "gateways", "s-1"], "").unwrap().success().unwrap();
    assert_eq!(names(&next().await), [("gw-b".to_owned(), false)]);
    task.abort();
}
