//! The thread that keeps reports: hears of denials, looks at policy and nodes, and hands on what should be said.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use tidegate_kubernetes::events::News;
use tidegate_ledger::Bindings;
use tidegate_policy::denied::Denied;
use tidegate_policy::event::{Emit, Event};
use tidegate_policy::{Name, ScopeKey};
use tidegate_proto::MAX_DENIED;

use super::absent::Absences;
use super::fair::Fair;
use super::leading::{self, Outlet};
use super::{Beside, Reporter, Reports, Snapshot, Table};
use crate::core::{NodeStatus, PairStatus, Shared, Status, ToCore};
use crate::source::now;
use crate::telemetry::DENIALS_LOST;

/// Denials that wait for the thread. Beyond them they are counted and left out of statuses; audit records have all.
const QUEUE: usize = 4096;
/// Reports are made so often at most, and other gateways are told of denials.
const EVERY: Duration = Duration::from_secs(1);
/// Audits that end are told of so often; each is an event once.
const AUDITS: Duration = Duration::from_secs(30);
/// What happened to egress addresses and agents is told again for so long, so often: who led may be who was lost, and the next
/// leader needs its time.
const HAPPENED: Duration = Duration::from_secs(60);
const AGAIN: Duration = Duration::from_secs(5);
/// The most of it that is remembered.
const HAPPENINGS: usize = 128;
/// The most denials of a round that may become events.
const EVENTS: usize = 64;
/// The thread takes at most one part in so many of a processor for reports.
const SHARE: u32 = 20;
/// How long the thread waits before it looks whether it is to stop.
const STEP: Duration = Duration::from_millis(200);

/// Who saw a denial.
#[derive(Clone, Debug)]
pub enum Origin {
    /// This gateway.
    Here,
    /// The agent of this node: believed about pods of the node.
    Node(Arc<str>),
    /// Another gateway.
    Gateway,
}

/// Takes denials, and never waits.
#[derive(Clone)]
pub struct Post(Sender<(Origin, Denied)>);

impl Post {
    /// Hands over a denial, or counts it where the thread does not keep up.
    pub fn send(&self, origin: Origin, denied: Denied) {
        let count = denied.count;
        if self.0.try_send((origin, denied)).is_err() {
            metrics::counter!(DENIALS_LOST).increment(count);
        }
    }
}

/// A way for denials into the thread.
pub fn post() -> (Post, Receiver<(Origin, Denied)>) {
    let (tx, rx) = bounded(QUEUE);
    (Post(tx), rx)
}

/// Hands events on to the audit log, and what of them are denials to the thread.
pub struct Tee {
    /// The audit log.
    pub log: Arc<dyn Emit>,
    /// The thread.
    pub post: Post,
}

impl Emit for Tee {
    fn emit(&self, event: Event) {
        if let Some(denied) = Denied::of(&event) {
            self.post.send(Origin::Here, denied);
        }
        self.log.emit(event);
    }
}

/// Everything that the thread works with.
pub struct Thread {
    /// Denials.
    pub denied: Receiver<(Origin, Denied)>,
    /// What the core shares.
    pub shared: Arc<Shared>,
    /// The last compile.
    pub snapshot: Arc<ArcSwapOption<Snapshot>>,
    /// Names by address.
    pub bindings: Arc<Bindings>,
    /// Told of this gateway's denials, for the others.
    pub core: SyncSender<ToCore>,
    /// Where reports go.
    pub reports: Arc<ArcSwap<Reports>>,
    /// Where all of it goes on to the API server, if there is one.
    pub outlet: Option<Outlet>,
    /// Ends the thread.
    pub stop: Arc<AtomicBool>,
}

/// What of the core's status reports depend on.
type Seen = (BTreeMap<String, NodeStatus>, Vec<PairStatus>);

struct Run {
    thread: Thread,
    table: Table,
    /// What other gateways are told next.
    folded: Fair,
    /// What people are told next by Events.
    news: Fair,
    reporter: Reporter,
    /// When audits that end were told of last.
    audits: Option<Instant>,
    /// What happened lately, and when, and when it was told last.
    happened: VecDeque<(Instant, News)>,
    told: Option<Instant>,
    absences: Absences,
    begun: Instant,
    seen: Seen,
    last: Option<Arc<Snapshot>>,
}

impl Thread {
    /// Runs until told to stop.
    pub fn run(self) {
        let mut run = Run::new(self);
        let mut next = Instant::now() + EVERY;
        while !run.thread.stop.load(Ordering::Relaxed) {
            let wait = next.saturating_duration_since(Instant::now()).min(STEP);
            match run.thread.denied.recv_timeout(wait) {
                Ok((origin, denied)) => run.hear(origin, denied),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            let now = Instant::now();
            if now >= next {
                run.tell();
                run.report();
                next = now + EVERY.max(now.elapsed() * SHARE);
            }
        }
    }
}

impl Run {
    fn new(thread: Thread) -> Self {
        Self {
            thread,
            table: Table::default(),
            folded: Fair::default(),
            news: Fair::default(),
            reporter: Reporter::default(),
            audits: None,
            happened: VecDeque::new(),
            told: None,
            absences: Absences::default(),
            begun: Instant::now(),
            seen: Seen::default(),
            last: None,
        }
    }

    fn hear(&mut self, origin: Origin, mut denied: Denied) {
        match origin {
            Origin::Here => self.folded.add(denied.clone()),
            Origin::Gateway => {}
            Origin::Node(node) => {
                // Whose address it is, the node does not decide.
                let world = self.thread.shared.world.load();
                let who = world.endpoint(denied.source).map(|e| e.who.clone()).filter(|w| w.node == node);
                if who.is_none() {
                    return;
                }
                denied.who = who;
            }
        }
        if denied.who.is_none() {
            return;
        }
        if self.thread.outlet.is_some() && !denied.audit {
            self.news.add(denied.clone());
        }
        self.table.add(denied, now());
    }

    /// Tells other gateways what was denied here, and people what was denied anywhere.
    fn tell(&mut self) {
        let lost = self.folded.take_lost();
        if lost > 0 {
            metrics::counter!(DENIALS_LOST).increment(lost);
        }
        if !self.folded.is_empty() {
            // A core that does not keep up has other worries.
            let _ = self.thread.core.try_send(ToCore::Denied(self.folded.take(MAX_DENIED)));
        }
        let news = self.news.take(EVENTS);
        let Some(outlet) = &self.thread.outlet else { return };
        let Some(snapshot) = self.thread.snapshot.load_full() else { return };
        for denied in news {
            let allow_with = self.reporter.allow_with(&snapshot, &denied, &|s, ip| self.names(s, ip));
            outlet.tell(&denied, allow_with.as_deref());
        }
    }

    fn names(&self, scope: ScopeKey, ip: IpAddr) -> Vec<Name> {
        self.thread.bindings.names_of(scope, ip).into_iter().map(|(name, _)| name).collect()
    }

    /// Tells of egress addresses that have moved, and of agents that are away.
    fn tell_happenings(&mut self, status: &Status) {
        let Some(outlet) = &self.thread.outlet else { return };
        let now = Instant::now();
        let mut new = leading::moves(&self.seen.1, &status.pairs);
        new.extend(self.absences.look(&status.nodes, now.duration_since(self.begun)));
        let due = !new.is_empty() || self.told.is_none_or(|at| now.duration_since(at) >= AGAIN);
        self.happened.extend(new.into_iter().map(|n| (now, n)));
        let many = self.happened.len().saturating_sub(HAPPENINGS);
        self.happened.drain(..many);
        self.happened.retain(|(at, _)| now.duration_since(*at) < HAPPENED);
        if due {
            self.told = Some(now);
            self.happened.iter().for_each(|(_, n)| outlet.happened(n));
        }
    }

    fn report(&mut self) {
        let Some(snapshot) = self.thread.snapshot.load_full() else { return };
        let status: Arc<Status> = self.thread.shared.status.load_full();
        let held = |s: &NodeStatus| NodeStatus { sent: 0, applied: 0, ..s.clone() };
        let nodes = status.nodes.iter().map(|(n, s)| (n.clone(), held(s))).collect();
        let seen: Seen = (nodes, status.pairs.clone());
        let same = self.last.as_ref().is_some_and(|last| Arc::ptr_eq(last, &snapshot));
        self.table.retain(|ns| Some(snapshot.survey.namespaces.get(ns)?.annotations.uid.as_str()));
        let denied = self.table.take_news();
        if let Some(outlet) = &mut self.thread.outlet
            && self.audits.is_none_or(|at| at.elapsed() >= AUDITS)
        {
            self.audits = Some(Instant::now());
            outlet.audits(&snapshot.survey, now());
        }
        self.tell_happenings(&status);
        if let Some(outlet) = &self.thread.outlet {
            outlet.enforce(status.nodes.iter());
        }
        // The most frequent case costs what is new.
        let all = !same || self.seen != seen;
        if !all && denied.is_empty() {
            return;
        }
        (self.seen, self.last) = (seen, Some(snapshot.clone()));
        let names = |s, ip| self.thread.bindings.names_of(s, ip).into_iter().map(|(name, _)| name).collect();
        let beside = Beside { status: &status, denials: &self.table, names: &names, now: now() };
        let reports = if all {
            self.reporter.reports(&snapshot, &beside)
        } else {
            self.reporter.denied(&snapshot, &beside, &denied)
        };
        if let Some(outlet) = &mut self.thread.outlet {
            outlet.wish(&reports);
        }
        self.thread.reports.store(Arc::new(reports));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::ClusterNames;
    use tidegate_policy::event::{Verdict, What, Who};
    use tidegate_policy::model::{Objects, Pod, UnixSeconds};
    use tidegate_policy::{Reason, World};

    const POD: [u8; 4] = [10, 1, 0, 1];

    /// A cluster with the pod `shop/web` on node `n1`.
    fn run(post: Receiver<(Origin, Denied)>) -> (Run, std::sync::mpsc::Receiver<ToCore>) {
        let mut objects = Objects::default();
        let pod = Pod {
            node: "n1".into(),
            addresses: vec![POD.into()],
            labels: Default::default(),
            host_network: false,
            ending: false,
            mirror: false,
        };
        objects.pods.insert(("shop".into(), "web".into()), pod);
        let world = Arc::new(World::compile(&objects, UnixSeconds(1), None));
        let shared = Arc::new(Shared::new(world, Arc::new(ClusterNames::new(Vec::new(), Vec::new()))));
        let classifier = crate::core::Classifier(shared.clone());
        let ledger = tidegate_ledger::Ledger::new(Default::default(), [1, 2, 3, 4], classifier, Duration::ZERO);
        let (core, to_core) = std::sync::mpsc::sync_channel(4);
        let thread = Thread {
            denied: post,
            shared,
            snapshot: Arc::default(),
            bindings: ledger.bindings(),
            core,
            reports: Arc::default(),
            outlet: None,
            stop: Arc::default(),
        };
        (Run::new(thread), to_core)
    }

    fn packet(source: [u8; 4], who: Option<Arc<Who>>) -> Event {
        let (source, destination) = ((source, 40000).into(), ([203, 0, 113, 9], 443).into());
        let what = What::Packet { hook: "pod_egress", protocol: 6, source, destination };
        Event { who, what, verdict: Verdict::Deny, reason: Reason::NoBinding, rule: None, count: 1 }
    }

    #[test]
    fn a_node_is_believed_about_its_own_pods_alone() {
        let (mut run, core) = run(post().1);
        let denied = |source| Denied::of(&packet(source, None)).unwrap();
        for (node, source, known) in [("n2", POD, 0), ("n1", [10, 1, 0, 2], 0), ("n1", POD, 1)] {
            run.hear(Origin::Node(node.into()), denied(source));
            assert_eq!(run.table.of("shop").count(), known, "{node}");
        }
        // What it says of who it was counts for nothing.
        let forged = Arc::new(Who { namespace: "other".into(), pod: "p".into(), node: "n1".into() });
        run.hear(Origin::Node("n1".into()), Denied { who: Some(forged), ..denied(POD) });
        assert_eq!((run.table.of("other").count(), run.table.of("shop").next().unwrap().denied.count), (0, 2));
        // Others hear that from the node themselves.
        run.tell();
        assert!(run.folded.is_empty() && core.try_recv().is_err());
    }

    #[test]
    fn other_gateways_are_told_what_was_seen_here_and_nothing_twice() {
        let (post, denied) = post();
        let (mut run, core) = run(denied);
        let tee = Tee { log: Arc::new(|_: Event| {}), post };
        let who = Arc::new(Who { namespace: "shop".into(), pod: "web".into(), node: "n1".into() });
        tee.emit(packet(POD, Some(who.clone())));
        tee.emit(packet(POD, Some(who)));
        while let Ok((origin, denied)) = run.thread.denied.try_recv() {
            run.hear(origin, denied);
        }
        run.tell();
        let Ok(ToCore::Denied(told)) = core.try_recv() else { panic!() };
        assert_eq!((told.len(), told[0].count), (1, 2));
        // What another one tells goes no further.
        run.hear(Origin::Gateway, told[0].clone());
        run.tell();
        assert!(core.try_recv().is_err());
        assert_eq!(run.table.of("shop").next().unwrap().denied.count, 4);
    }

    #[test]
    fn a_full_queue_holds_nobody_up() {
        let (post, denied) = post();
        let tee = Tee { log: Arc::new(|_: Event| {}), post };
        let who = Arc::new(Who { namespace: "shop".into(), pod: "web".into(), node: "n1".into() });
        (0..QUEUE + 10).for_each(|_| tee.emit(packet(POD, Some(who.clone()))));
        assert_eq!(denied.len(), QUEUE);
    }
}
