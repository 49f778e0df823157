//! The thread that follows an API server, with a real one: what time alone changes, and what a watch that hangs does not tell.

#[path = "../../kube/tests/support/mod.rs"]
mod support;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::mpsc::Receiver;
use std::thread::JoinHandle;

use arc_swap::ArcSwapOption;
use tidegate_kube::Cluster;
use tidegate_policy::Proto;
use tidegate_policy::model::UnixSeconds;
use tidegate_policy::state::Touch;
use tidegate_policy::world::World;

use self::support::Proxy;
use super::*;
use crate::admin::Readiness;
use crate::kube::Kube;
use crate::report::Surveyor;

const SOON: Duration = Duration::from_secs(20);

/// The thread, and what it told the core last.
struct Running {
    _kube: Kube,
    watched: Watched<Feed>,
    core: Receiver<ToCore>,
    world: Option<Arc<World>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn start(kubeconfig: PathBuf) -> Self {
        Self::over(kubeconfig, |changes| changes)
    }

    /// With other changes than those that come from the API server, or with these on another way.
    fn over(
        kubeconfig: PathBuf,
        way: impl FnOnce(mpsc::Receiver<Change<Feed>>) -> mpsc::Receiver<Change<Feed>>,
    ) -> Self {
        let text = format!(
            "{{name: gw-a, node: n1, control: '127.0.0.1:1', socket: /nowhere/s, pins: /nowhere/p, \
             kubernetes: {{kubeconfig: {}, namespace: x}}, resolvers: [{{servers: ['192.0.2.53:53']}}]}}",
            kubeconfig.display()
        );
        let config: Config = serde_saphyr::from_str(&text).unwrap();
        let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let kubernetes = config.kubernetes.as_ref().unwrap();
        let kube = Kube::start(&config, kubernetes, runtime()).unwrap();
        let (changes, watched) = kube.watch(kubernetes);
        let (to_core, core) = std::sync::mpsc::sync_channel(1024);
        let snapshot = Arc::new(ArcSwapOption::empty());
        let waiting = Readiness::default().guard("policy");
        let stop = Arc::<AtomicBool>::default();
        let follower = Follower {
            changes: way(changes),
            watched: watched.clone(),
            names: Arc::new(ClusterNames::new(Vec::new(), Vec::new())),
            nodes: crate::nodes::channel().0,
            starts: Starts::default(),
            compiler: Compiler::new(to_core, Arc::default(), Surveyor::new(snapshot), waiting),
            runtime: runtime(),
            stop: stop.clone(),
        };
        let thread = Some(std::thread::spawn(move || follower.run(&config)));
        Self { _kube: kube, watched, core, world: None, stop, thread }
    }

    /// Takes what is there; says what was compiled last.
    fn world(&mut self) -> Option<&Arc<World>> {
        while let Ok(message) = self.core.recv_timeout(Duration::from_millis(50)) {
            if let ToCore::World(compiled) = message {
                self.world = Some(compiled.world.clone());
            }
        }
        self.world.as_ref()
    }

    /// Everything that is compiled until this holds of the last.
    #[track_caller]
    fn all_until(&self, what: &str, holds: impl Fn(&World) -> bool) -> Vec<Arc<World>> {
        let (started, mut all) = (Instant::now(), Vec::<Arc<World>>::new());
        while !all.last().is_some_and(|w| holds(w)) {
            assert!(started.elapsed() < SOON, "{what}: not within {SOON:?}");
            if let Ok(ToCore::World(compiled)) = self.core.recv_timeout(Duration::from_millis(50)) {
                all.push(compiled.world.clone());
            }
        }
        all
    }

    /// Waits until this holds of what was compiled last; says how long that took.
    #[track_caller]
    fn until(&mut self, limit: Duration, what: &str, holds: impl Fn(&World) -> bool) -> Duration {
        let started = Instant::now();
        while !self.world().is_some_and(|w| holds(w)) {
            assert!(started.elapsed() < limit, "{what}: not within {limit:?}");
        }
        started.elapsed()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // One that has panicked has said so.
            let _ = thread.join();
        }
    }
}

fn cluster() -> Arc<Cluster> {
    let cluster = Cluster::shared().unwrap();
    cluster.define().unwrap();
    cluster
}

fn kubectl(cluster: &Cluster, args: &[&str], stdin: &str) {
    cluster.kubectl(args, stdin).unwrap().success().unwrap();
}

/// A namespace with a pod that has this address.
fn made(cluster: &Cluster, namespace: &str, ip: &str) -> IpAddr {
    kubectl(cluster, &["create", "namespace", namespace], "");
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "namespace": namespace},
        "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "x"}]}});
    kubectl(cluster, &["apply", "-f", "-"], &pod.to_string());
    let status = json!({"status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]}}).to_string();
    let patch = ["patch", "pod", "-n", namespace, "web", "--subresource=status", "--type=merge", "-p", &status];
    kubectl(cluster, &patch, "");
    ip.parse().unwrap()
}

fn policy(cluster: &Cluster, namespace: &str, egress: Value) {
    let policy = json!({"apiVersion": "tidegate.dev/v1alpha1", "kind": "EgressPolicy",
        "metadata": {"name": "all", "namespace": namespace}, "spec": {"podSelector": {}, "egress": egress}});
    kubectl(cluster, &["apply", "--server-side", "-f", "-"], &policy.to_string());
}

fn gone(cluster: &Cluster, namespace: &str) {
    kubectl(cluster, &["delete", "egresspolicy", "-n", namespace, "all"], "");
}

fn touch(w: &World, ip: IpAddr) -> Option<Touch> {
    w.endpoint(ip).map(|e| e.touch)
}

#[test]
fn what_time_alone_changes_is_compiled() {
    let cluster = cluster();
    let (ends, audited, left) =
        (made(&cluster, "ends", "10.7.0.1"), made(&cluster, "audited", "10.7.0.2"), made(&cluster, "left", "10.7.0.3"));
    let mut running = Running::start(cluster.kubeconfig());
    running.until(SOON, "the pods", |w| [ends, audited, left].iter().all(|ip| w.endpoint(*ip).is_some()));
    let at = |seconds: i64| {
        let now = jiff::Timestamp::now().as_second();
        (UnixSeconds(now + seconds), jiff::Timestamp::from_second(now + seconds).unwrap().to_string())
    };
    // Time for it to be heard of before that.
    let (end, text) = at(6);
    let rule = json!([{"toCIDRs": [{"cidr": "192.0.2.0/24"}], "toPorts": [{"protocol": "TCP", "port": 443}], "expireTime": text}]);
    policy(&cluster, "ends", rule);
    let until = format!("tidegate.dev/audit-until={text}");
    let annotate = ["annotate", "namespace", "audited", "tidegate.dev/managed=true", "tidegate.dev/mode=audit", &until];
    kubectl(&cluster, &annotate, "");
    let allows = |w: &World| {
        w.group_of(ends).is_some_and(|g| g.connection(None, [192, 0, 2, 1].into(), Proto::Tcp, 443).allowed())
    };
    let audits = |w: &World| w.group_of(audited).is_some_and(|g| g.audit());
    running.until(SOON, "the rule and the audit", |w| allows(w) && audits(w) && w.now() < end);
    running.until(SOON, "the end of both", |w| !allows(w) && !audits(w));
    let late = at(0).0.0 - end.0;
    assert!((0..=2).contains(&late), "{late} s late");
    assert_eq!(touch(running.world().unwrap(), ends), Some(Touch::Isolated), "the policy itself stays");

    // A policy that goes is strict for a moment, and then no more.
    policy(&cluster, "left", json!([]));
    running.until(SOON, "the policy", |w| touch(w, left) == Some(Touch::Isolated));
    gone(&cluster, "left");
    let took = running.until(SOON, "the end of the policy", |w| touch(w, left) == Some(Touch::Untouched));
    assert!(took < Duration::from_secs(8), "{took:?}");
}

#[test]
fn a_policy_that_went_with_a_namespace_whose_end_a_hung_watch_does_not_tell_holds() {
    let cluster = cluster();
    let ip = made(&cluster, "hung", "10.7.1.1");
    policy(&cluster, "hung", json!([]));
    let proxy = Proxy::start(&cluster);
    let mut running = Running::start(proxy.kubeconfig());
    running.until(SOON, "the policy", |w| touch(w, ip) == Some(Touch::Isolated));
    std::thread::sleep(Duration::from_secs(2));
    proxy.swallow();
    // No controller empties it: its pod stays.
    kubectl(&cluster, &["delete", "namespace", "hung", "--wait=false"], "");
    gone(&cluster, "hung");
    std::thread::sleep(Duration::from_millis(300));
    // Only the watch on policies has another connection.
    proxy.forward_new();
    running.watched.hurry(Feed::EgressPolicies);
    let until = Instant::now() + Duration::from_secs(6);
    while Instant::now() < until {
        assert_eq!(touch(running.world().unwrap(), ip), Some(Touch::Isolated));
    }
}

/// A flood of changes is compiled as often as [`FLOOD`] says and no more, and each compile is about what changed since the
/// one before: all else is what it was, not made anew.
#[test]
fn a_flood_of_pod_changes_costs_what_it_touches() {
    const PODS: u16 = 1000;
    let ip = |n: u16| IpAddr::from([10, 8, (n >> 8) as u8, n as u8]);
    let calm = IpAddr::from([10, 9, 0, 1]);
    let pod = |namespace: &str, name: &str, ip: IpAddr, on: &str| {
        json!({"metadata": {"namespace": namespace, "name": name, "uid": name, "labels": {"on": on}},
            "spec": {"nodeName": "n1"}, "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]}})
    };
    let flood = |n: u16, on: &str| pod("flood", &format!("p{n}"), ip(n), on);
    let namespace = |name: &str| json!({"metadata": {"name": name, "uid": name}});
    let policy = |namespace: &str| {
        json!({"metadata": {"namespace": namespace, "name": "p", "uid": namespace, "generation": 1},
            "spec": {"podSelector": {"matchLabels": {"on": "yes"}}, "egress": [
                {"toFQDNs": [{"matchName": "api.example.com"}], "toPorts": [{"protocol": "TCP", "port": 443}]}]}})
    };
    let (sender, changes) = mpsc::channel(4 * usize::from(PODS));
    let running = Running::over(cluster().kubeconfig(), |_| changes);
    let mut version = 0;
    let mut change = |feed, event| {
        version += 1;
        Change { feed, event, reached: Some(version), newest: Some(version) }
    };
    let first = |feed| match feed {
        Feed::Namespaces => vec![namespace("flood"), namespace("calm")],
        Feed::EgressPolicies => vec![policy("flood"), policy("calm")],
        // The last one is selected from the beginning: nobody's group is new later.
        Feed::Pods => {
            let all = (0..PODS).map(|n| flood(n, "no"));
            all.chain([flood(PODS, "yes"), pod("calm", "c", calm, "yes")]).collect()
        }
        _ => Vec::new(),
    };
    for feed in Feed::ALL {
        let objects = first(feed);
        let text = |o: &Value, key: &str| o["metadata"][key].as_str().unwrap_or_default().to_owned();
        let seen = objects.iter().map(|o| (text(o, "namespace"), text(o, "name"))).collect();
        for object in objects {
            sender.blocking_send(change(feed, Event::Applied(Box::new(object)))).unwrap();
        }
        sender.blocking_send(change(feed, Event::Restarted(seen))).unwrap();
    }
    let is = |w: &World, ip, touched| touch(w, ip) == Some(touched);
    let quiet = |w: &World| {
        [ip(PODS), calm].iter().all(|ip| is(w, *ip, Touch::Isolated))
            && (0..PODS).all(|n| is(w, ip(n), Touch::Untouched))
    };
    let before = running.all_until("the lists", quiet).pop().unwrap();

    let mut flip = |pods: std::ops::Range<u16>, on: &str, touched: Touch| {
        let changes: Vec<_> =
            pods.clone().map(|n| change(Feed::Pods, Event::Applied(Box::new(flood(n, on))))).collect();
        let (begun, mut pauses, mut last) = (Instant::now(), 0, Instant::now());
        for change in changes {
            // While this thread has to wait for a CPU there is no flood.
            pauses += usize::from(last.elapsed() >= SETTLE);
            last = Instant::now();
            sender.blocking_send(change).unwrap();
        }
        let worlds = running.all_until("the flood", |w| pods.clone().all(|n| is(w, ip(n), touched)));
        (worlds, begun.elapsed(), pauses)
    };
    let (worlds, took, pauses) = flip(0..PODS, "yes", Touch::Isolated);
    println!("{PODS} changes were {} compiles in {took:?}, with {pauses} pauses", worlds.len());
    let most = (took.as_millis() / FLOOD.as_millis()) as usize + 1 + pauses;
    assert!(worlds.len() <= most, "{} compiles in {took:?}", worlds.len());
    let one = flip(7..8, "no", Touch::Untouched).0;
    assert_eq!(one.len(), 1);
    let all: Vec<&Arc<World>> = [&before].into_iter().chain(&worlds).chain(&one).collect();
    let mut changed = Vec::new();
    for pair in all.windows(2) {
        let changes = pair[1].changes(pair[0]);
        changed.extend(changes.endpoints.clone());
        let rest = tidegate_policy::world::Changes { endpoints: changes.endpoints.clone(), ..Default::default() };
        assert_eq!(changes, rest, "nothing but pods changed");
        let [old, new] = [pair[0], pair[1]].map(|w| w.group_of(calm).unwrap());
        assert!(Arc::ptr_eq(old, new), "another namespace was compiled anew");
    }
    assert_eq!(changed.pop(), Some(ip(7)));
    changed.sort_unstable();
    assert_eq!(changed, (0..PODS).map(ip).collect::<Vec<_>>(), "each once");
}
