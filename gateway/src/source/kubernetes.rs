//! The API server as the source: its changes go into the index, and what they touch is compiled.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tidegate_api::index::{Feed, Index};
use tidegate_kubernetes::watch::{Change, Event, List, Watched};
use tidegate_policy::model::Touched;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use super::{Compiler, Ended, settings};
use crate::cluster::ClusterNames;
use crate::config::{Config, Kubernetes};
use crate::core::ToCore;
use crate::generations::{Version, Versions};
use crate::nodes::{Known, Teller};
use crate::starts::Starts;

/// Changes within this time are one compile, as long as they keep coming for at most [`FLOOD`].
const SETTLE: Duration = Duration::from_millis(20);
/// A flood of changes is compiled at least so often.
const FLOOD: Duration = Duration::from_millis(250);
/// The stop flag and the clock are looked at so often.
const STEP: Duration = Duration::from_millis(200);
/// The problems of objects are put together at most so often.
const SAY: Duration = Duration::from_secs(1);
/// Policies that were deleted age by so much, see [`Index::age`].
const AGE: Duration = Duration::from_secs(1);
/// After policies have gone, Namespaces are asked for anew, at most so often. Between two times policies can age.
const ASK: Duration = Duration::from_secs(3);
/// The most problems that are logged and shown; every object's own status says its own.
const MAX_PROBLEMS: usize = 1000;

/// What is followed.
pub fn lists(kubernetes: &Kubernetes) -> Vec<List<Feed>> {
    let dns = &kubernetes.cluster_dns;
    let list = |feed: Feed| {
        let path = |rest: &str| format!("/apis/tidegate.dev/v1alpha1/{rest}");
        let slices = |namespace: &str| format!("/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices");
        let of_service = |name: &str| format!("kubernetes.io/service-name={name}");
        let (path, fields, labels) = match feed {
            Feed::Namespaces => ("/api/v1/namespaces".into(), String::new(), String::new()),
            // Pods that have ended hold no address and never will.
            Feed::Pods => {
                let live = "status.phase!=Succeeded,status.phase!=Failed";
                ("/api/v1/pods".into(), live.into(), String::new())
            }
            Feed::Nodes => ("/api/v1/nodes".into(), String::new(), String::new()),
            Feed::ServiceCidrs => ("/apis/networking.k8s.io/v1/servicecidrs".into(), String::new(), String::new()),
            Feed::ApiEndpoints => (slices("default"), String::new(), of_service("kubernetes")),
            Feed::DnsService => {
                let path = format!("/api/v1/namespaces/{}/services", dns.namespace);
                (path, format!("metadata.name={}", dns.name), String::new())
            }
            Feed::DnsEndpoints => (slices(&dns.namespace), String::new(), of_service(&dns.name)),
            Feed::Services => ("/api/v1/services".into(), String::new(), String::new()),
            Feed::EgressPools => (path("egresspools"), String::new(), String::new()),
            Feed::ClusterEgressPolicies => (path("clusteregresspolicies"), String::new(), String::new()),
            Feed::EgressPolicies => (path("egresspolicies"), String::new(), String::new()),
            Feed::NamespaceEgresses => (path("namespaceegresses"), String::new(), String::new()),
        };
        // ServiceCIDRs came with Kubernetes 1.33.
        List { feed, path, fields, labels, optional: feed == Feed::ServiceCidrs }
    };
    Feed::ALL.into_iter().map(list).collect()
}

/// Takes changes and compiles them, until told to stop.
pub struct Follower {
    /// The changes.
    pub changes: mpsc::Receiver<Change<Feed>>,
    /// How the lists fare that they come from.
    pub watched: Watched<Feed>,
    /// What the DNS service is told of the cluster.
    pub names: Arc<ClusterNames>,
    /// Told which nodes there are.
    pub nodes: Teller,
    /// What nodes tell of pods that start.
    pub starts: Starts,
    /// Compiles.
    pub compiler: Compiler,
    /// Waits for changes.
    pub runtime: Runtime,
    /// Ends it.
    pub stop: Arc<AtomicBool>,
}

impl Follower {
    /// Runs until told to stop, or until the core has ended.
    pub fn run(mut self, config: &Config) {
        let mut state = State::new(config);
        while !self.stop.load(Ordering::Relaxed) {
            match self.take(&mut state) {
                Ok(true) if self.step(&mut state).is_err() => return,
                Ok(_) => {}
                // The tasks have ended: so does the gateway.
                Err(Ended) => return,
            }
        }
    }

    /// Takes what is there; says whether something may have to be done.
    fn take(&mut self, state: &mut State) -> Result<bool, Ended> {
        let (changes, stop, starts) = (&mut self.changes, &self.stop, &self.starts);
        self.runtime.block_on(async {
            let first = async {
                tokio::select! {
                    change = changes.recv() => change.map(Some).ok_or(Ended),
                    // A pod waits for this: at once.
                    () = starts.news() => Ok(None),
                }
            };
            match tokio::time::timeout(STEP, first).await {
                Err(_) | Ok(Ok(None)) => return Ok(true),
                Ok(Err(Ended)) => return Err(Ended),
                Ok(Ok(Some(change))) => state.take(change),
            }
            let until = Instant::now() + FLOOD;
            while Instant::now() < until && !stop.load(Ordering::Relaxed) {
                match tokio::time::timeout(SETTLE, changes.recv()).await {
                    Ok(Some(change)) => state.take(change),
                    Ok(None) | Err(_) => break,
                }
            }
            Ok(true)
        })
    }

    fn step(&mut self, state: &mut State) -> Result<(), Ended> {
        // Half of the objects is not what anybody wrote.
        if state.listed.len() < Feed::ALL.len() {
            return Ok(());
        }
        if state.age(Instant::now(), self.watched.followed(Feed::Namespaces)) {
            self.watched.hurry(Feed::Namespaces);
        }
        self.names.set(state.index.external_names(), state.index.dns_servers());
        if std::mem::take(&mut state.nodes) {
            self.nodes.tell(Known::of(&state.index));
            state.index.forget_started();
        }
        for (node, pods) in self.starts.take() {
            state.index.started(&node, pods);
        }
        let first = !self.compiler.started();
        let compile = first || state.index.is_touched() || self.compiler.is_due();
        let mut changed = state.index.take_noted();
        let noted = changed != Touched::default();
        if compile {
            let touched = state.index.take_touched();
            self.compiler.compile(state.index.objects(), &touched)?;
            changed.all |= first;
            changed.extend(touched);
        }
        if compile || noted {
            self.compiler.survey(state.index.objects(), &state.index, &changed);
        }
        if std::mem::take(&mut state.moved) || first {
            let versions = state.versions.clone();
            self.compiler.core.send(ToCore::Versions(versions)).map_err(|_| Ended)?;
        }
        let mut news = false;
        if state.said.is_none_or(|(noted, at)| noted != state.index.noted() && at.elapsed() >= SAY) {
            state.said = Some((state.index.noted(), Instant::now()));
            news = self.compiler.say(state.problems());
        }
        if news || compile {
            self.compiler.publish();
        }
        Ok(())
    }
}

/// What has come so far.
struct State {
    index: Index,
    /// Feeds whose first list has come in whole.
    listed: BTreeSet<Feed>,
    versions: Versions,
    /// Whether they moved since they were last told.
    moved: bool,
    /// Whether something was said of nodes.
    nodes: bool,
    /// When the index aged last.
    aged: Instant,
    /// When Namespaces were last asked for anew, and how many policies had gone by then.
    asked: Option<(Instant, u64)>,
    /// Which problems were put together last, and when.
    said: Option<(u64, Instant)>,
}

impl State {
    fn new(config: &Config) -> Self {
        Self {
            index: Index::new(settings(config)),
            listed: BTreeSet::new(),
            versions: Versions::new(),
            moved: false,
            nodes: false,
            aged: Instant::now(),
            asked: None,
            said: None,
        }
    }

    fn take(&mut self, change: Change<Feed>) {
        let Change { feed, event, reached, mut newest } = change;
        self.nodes |= feed == Feed::Nodes;
        let version = self.versions.entry(feed).or_default();
        let before = self.index.changes();
        match event {
            Event::Applied(object) => self.index.apply(feed, &object),
            Event::Deleted(object) => self.index.delete(feed, &object),
            Event::Restarted(seen) => {
                self.index.restarted(feed, &seen);
                self.listed.insert(feed);
                if reached.is_none() {
                    // The API server does not have the kind.
                    self.moved |= *version != Version::default();
                    self.versions.remove(&feed);
                    return;
                }
                // Versions can go back when a cluster is restored from a backup. What is newest then, the list says.
                if reached.is_some_and(|r| r < version.reached) {
                    *version = Version::default();
                }
                // A list does not say when what it lacks was deleted: at this version, or later. Who has not reached it does not
                // know of the deletion.
                newest = Some(version.reached + 1);
            }
            Event::Bookmark => {}
        }
        // What changed nothing nobody need have seen.
        if self.index.changes() != before {
            version.newest = version.newest.max(newest.unwrap_or_default());
        }
        version.reached = version.reached.max(reached.unwrap_or_default());
        self.moved |= reached.is_some();
    }

    /// Lets policies that went age, a second at a time. Only while Namespaces were `followed` for the whole of it, by a watch
    /// that began after they went: else the end of their namespace, with which they went, may not have been heard yet, and a
    /// watch that hangs does not show. Says whether Namespaces are to be asked for anew.
    fn age(&mut self, now: Instant, followed: Option<Duration>) -> bool {
        let went = self.index.went();
        let (asked, known) = self.asked.map_or((None, 0), |(at, known)| (Some(at), known));
        let since = |at: Instant| now.saturating_duration_since(at);
        let due = since(self.aged) >= AGE;
        if due && followed.is_some_and(|d| d >= AGE && asked.is_none_or(|at| d <= since(at))) {
            self.aged = now;
            self.index.age(known);
        }
        let ask = went > known && asked.is_none_or(|at| since(at) >= ASK);
        if ask {
            self.asked = Some((now, went));
        }
        ask
    }

    /// What is wrong with objects, in their order.
    fn problems(&self) -> Vec<String> {
        let all = Feed::ALL.into_iter().flat_map(|feed| {
            let records = self.index.records(feed).filter(|(_, r)| !r.problems.is_empty());
            records.flat_map(move |((namespace, name), r)| {
                let slash = if namespace.is_empty() { "" } else { "/" };
                let kind = feed.kind().1;
                let keeps = if !r.good && r.held { " (its last good version stays)" } else { "" };
                r.problems.iter().map(move |p| format!("{kind} {namespace}{slash}{name}: {p}{keeps}"))
            })
        });
        let contested =
            self.index.contested().iter().flat_map(|(name, all)| all.iter().map(move |p| format!("Node {name}: {p}")));
        all.chain(contested).take(MAX_PROBLEMS).collect()
    }
}

/// How the lists fare, for the status.
pub fn health(watched: &Watched<Feed>) -> Value {
    let ago = |at: Instant| (at.elapsed().as_secs_f64() * 10.0).round() / 10.0;
    let lists: BTreeMap<&str, Value> = watched
        .health()
        .into_iter()
        .map(|(feed, h)| {
            let value = json!({
                "heardSecondsAgo": h.heard.map(ago),
                "resourceVersion": h.version,
                "complete": h.listed,
                "followedForSeconds": h.followed.map(ago),
                "failingForSeconds": h.failing.as_ref().map(|(since, _)| ago(*since)),
                "why": h.failing.map(|(_, why)| why),
                "lists": h.lists,
                "events": h.events,
            });
            (feed.name(), value)
        })
        .collect();
    let failing = watched.failing();
    json!({
        "reachable": failing.is_none(),
        "awayForSeconds": failing.as_ref().map(|(since, _)| ago(*since)),
        "lists": lists,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#[path = "follower_tests.rs"]
mod follower_tests;

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use tidegate_policy::World;
    use tidegate_policy::model::UnixSeconds;
    use tidegate_policy::state::Touch;

    use super::*;
    use crate::generations::{Generations, LAG};

    fn state() -> State {
        let text = "{name: gw-a, node: n1, control: '127.0.0.1:1', socket: /nowhere/s, pins: /nowhere/p, \
             kubernetes: {namespace: x}, resolvers: [{servers: ['192.0.2.53:53']}]}";
        State::new(&serde_saphyr::from_str(text).unwrap())
    }

    fn node(version: u64, ip: &str) -> Change<Feed> {
        let object = json!({
            "metadata": {"name": "n1", "uid": "u", "resourceVersion": version.to_string()},
            "status": {"addresses": [{"type": "InternalIP", "address": ip}], "conditions": [{"lastHeartbeatTime": version}]},
        });
        let event = Event::Applied(Box::new(object));
        Change { feed: Feed::Nodes, event, reached: Some(version), newest: Some(version) }
    }

    #[test]
    fn what_changes_nothing_nobody_need_have_seen() {
        let mut s = state();
        s.take(node(5, "192.0.2.1"));
        s.take(node(6, "192.0.2.1"));
        assert_eq!(s.versions[&Feed::Nodes], Version { newest: 5, reached: 6 });
        s.take(node(7, "192.0.2.2"));
        assert_eq!(s.versions[&Feed::Nodes], Version { newest: 7, reached: 7 });
    }

    #[test]
    fn a_deletion_that_only_a_list_shows_is_told_to_others() {
        let list = |names: &[&str], reached| {
            let seen = names.iter().map(|n| (String::new(), (*n).to_owned())).collect();
            Change { feed: Feed::Nodes, event: Event::Restarted(seen), reached: Some(reached), newest: None }
        };
        let mut s = state();
        s.take(node(5, "192.0.2.1"));
        s.take(list(&["n1"], 8));
        assert_eq!(s.versions[&Feed::Nodes], Version { newest: 5, reached: 8 }, "nothing is gone");
        s.take(list(&[], 20));
        assert_eq!(s.versions[&Feed::Nodes], Version { newest: 9, reached: 20 });
        // It was deleted at some version from 9 on: who was there when it was has that, who was left behind at 8 has not.
        for (reached, stale) in [(8, true), (9, false), (20, false)] {
            let (mut told, mut other) = (Generations::default(), Generations::default());
            told.set_own(s.versions.clone());
            other.set_own([(Feed::Nodes, Version { newest: 5, reached })].into());
            let said = told.told(|_| None);
            other.heard("told", &said, Duration::ZERO);
            assert_eq!(other.is_stale(LAG), stale, "{reached}");
        }
    }

    #[test]
    fn a_kind_that_the_api_server_does_not_have_has_no_version() {
        let mut s = state();
        let all = |reached| {
            let event = Event::Restarted(BTreeSet::new());
            Change { feed: Feed::ServiceCidrs, event, reached, newest: None }
        };
        s.take(all(None));
        assert!(s.versions.is_empty() && !s.moved && s.listed.contains(&Feed::ServiceCidrs));
        s.take(all(Some(9)));
        assert_eq!(s.versions[&Feed::ServiceCidrs].reached, 9);
        s.moved = false;
        s.take(all(None));
        assert!(s.versions.is_empty() && s.moved, "others are told");
    }

    #[test]
    fn a_policy_that_went_stays_strict_until_namespaces_are_heard_again() {
        let mut state = state();
        let policy = json!({"metadata": {"namespace": "shop", "name": "p", "uid": "p", "generation": 1, "resourceVersion": "2"},
            "spec": {"podSelector": {}}});
        let pod = json!({"metadata": {"namespace": "shop", "name": "web", "uid": "web"}, "spec": {"nodeName": "n1"},
            "status": {"phase": "Running", "podIP": "10.0.0.1"}});
        state.index.apply(Feed::Namespaces, &json!({"metadata": {"name": "shop", "uid": "u", "resourceVersion": "1"}}));
        state.index.apply(Feed::Pods, &pod);
        state.index.apply(Feed::EgressPolicies, &policy);
        state.index.delete(Feed::EgressPolicies, &policy);
        let touch = |s: &State| {
            let w = World::compile(s.index.objects(), UnixSeconds(1000), None);
            w.endpoint(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1))).unwrap().touch
        };
        let second = |n: u64| Duration::from_secs(n);
        let start = state.aged;
        assert!(
            state.age(start + second(1), Some(second(90))),
            "what is said of namespaces may be old: they are asked for"
        );
        for n in 2..60 {
            // It hangs, is away, and is just back: what was missed may be on its way.
            let followed = [Some(second(90 + n)), None, Some(AGE / 2)][n as usize % 3];
            assert!(!state.age(start + second(n), followed), "once is enough");
        }
        assert_eq!(touch(&state), Touch::Isolated);
        state.age(start + second(60), Some(AGE));
        state.age(start + second(60) + AGE / 2, Some(AGE));
        assert_eq!(touch(&state), Touch::Isolated, "half a second is not another one");
        state.age(start + second(61), Some(second(2)));
        assert_eq!(touch(&state), Touch::Untouched);
    }

    #[test]
    fn policies_that_keep_going_hold_up_nobody() {
        let mut state = state();
        let policy = |name: &str| {
            json!({"metadata": {"namespace": name, "name": "p", "uid": name, "generation": 1, "resourceVersion": "2"},
            "spec": {"podSelector": {}}})
        };
        let go = |s: &mut State, name: &str| {
            s.index.apply(Feed::Namespaces, &json!({"metadata": {"name": name, "uid": name, "resourceVersion": "1"}}));
            s.index.apply(Feed::EgressPolicies, &policy(name));
            s.index.delete(Feed::EgressPolicies, &policy(name));
        };
        let held = |s: &State, name: &str| s.index.objects().policies.keys().any(|(ns, _)| ns == name);
        let start = state.aged;
        // One goes every half a second, and namespaces are followed from each time on that they are asked for.
        let (mut asked, mut times, mut open) = (start, 0, Vec::new());
        for n in 1..=40u32 {
            let now = start + AGE / 2 * n;
            go(&mut state, &format!("n{n}"));
            if state.age(now, Some(now - asked)) {
                (asked, times) = (now, times + 1);
            }
            let gone: Vec<u32> = (1..=n).filter(|m| !open.contains(m) && !held(&state, &format!("n{m}"))).collect();
            assert!(gone.iter().all(|m| n - m <= 12), "6 s: {n} {gone:?}");
            open.extend(gone);
        }
        assert!(open.len() >= 28 && times <= 7, "{open:?} {times}");
    }
}
