//! Events of `events.k8s.io`: what was denied to a pod, once in a while, when the audit of a namespace ends, that egress
//! addresses have moved, and that a node's agent is away.

use std::collections::HashMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, ObjectReference, Pod};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{ApiResource, DynamicObject, PostParams};
use kube::core::GroupVersionKind;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::client::{Connection, Error, within};
use crate::lease::{Leads, leads, while_leading};
use crate::status::NAME;

/// The reason of denials.
pub const DENIED: &str = "EgressDenied";
/// The reason of egress addresses that have moved to another gateway.
pub const MOVED: &str = "EgressMoved";
/// The reason of an agent that is away.
pub const AWAY: &str = "AgentAway";
/// The reason of one that is back.
pub const BACK: &str = "AgentBack";
/// Where Events about objects without a namespace are.
pub const CLUSTER: &str = "default";
/// The same is said again after so long.
const ONCE: Duration = Duration::from_secs(600);
/// What there is to say of the end of an audit is told in an hour: not again in that time, so that others have their turn.
const AUDITED: Duration = Duration::from_secs(7200);
/// Different ones that are remembered.
const REMEMBERED: usize = 8192;
/// Events in a burst, and the time between two of many: of all namespaces that have said much lately.
const BURST: u32 = 25;
const SPACING: Duration = Duration::from_millis(1000);
/// The same of one namespace.
const OWN_BURST: u32 = 10;
const OWN_SPACING: Duration = Duration::from_secs(6);
/// The longest note, by the API.
const MAX_NOTE: usize = 1024;
/// The longest name of an object.
const MAX_NAME: usize = 253;
/// The longest name before the API server's own suffix.
const MAX_PREFIX: usize = 200;

/// What is to be said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct News {
    /// The namespace.
    pub namespace: String,
    /// Of what in it.
    pub about: About,
    /// What to say.
    pub note: String,
}

/// What an Event is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum About {
    /// A denial of a pod.
    Denied {
        /// The pod.
        pod: String,
        /// The name or address that it asked for.
        what: String,
        /// The published reason code.
        code: String,
    },
    /// The audit of the namespace: of its NamespaceEgress, since an Event about a Namespace could not be in it.
    Audit {
        /// What of it.
        end: AuditEnd,
        /// When the audit ends, in Unix seconds.
        until: i64,
    },
    /// Addresses of a pool have another gateway.
    Moved {
        /// The pool.
        pool: String,
        /// The pair, in letters, digits, `-` and `.` alone.
        pair: String,
        /// The epoch since when.
        epoch: u64,
        /// Whether this gateway is the new owner, which says so whoever leads: who leads next may only just have begun.
        own: bool,
    },
    /// A node's agent is away, or back.
    Agent {
        /// The node.
        node: String,
        /// Whether it is back.
        back: bool,
        /// When it went, in seconds since any moment: another time is another event.
        since: u64,
    },
}

/// What is told of the end of an audit: each by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AuditEnd {
    /// It is a day away.
    Day,
    /// It is an hour away.
    Hour,
    /// It has come.
    Over,
}

impl AuditEnd {
    /// The reason of the Event, and what the Event is called by.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            AuditEnd::Day => ("AuditEnding", "auditending-day"),
            AuditEnd::Hour => ("AuditEnding", "auditending"),
            AuditEnd::Over => ("AuditEnded", "auditended"),
        }
    }
}

impl About {
    /// The same is not said again for so long.
    fn once(&self) -> Duration {
        match self {
            About::Denied { .. } | About::Moved { .. } | About::Agent { .. } => ONCE,
            About::Audit { .. } => AUDITED,
        }
    }

    /// Whether it is told by a gateway that does not lead, too.
    fn needs_no_lead(&self) -> bool {
        matches!(self, About::Moved { own: true, .. })
    }

    /// Whether it is about what has no namespace, and nobody brings about by what he sends.
    fn is_of_cluster(&self) -> bool {
        matches!(self, About::Moved { .. } | About::Agent { .. })
    }
}

/// A token bucket, as the time at which it is full again.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket(Duration);

impl Bucket {
    fn has(self, burst: u32, spacing: Duration, now: Duration) -> bool {
        self.0.saturating_sub(now) <= spacing * (burst - 1)
    }

    fn take(&mut self, spacing: Duration, now: Duration) {
        self.0 = self.0.max(now) + spacing;
    }
}

/// Decides what is said: each once in its time, and not too much, of any namespace and of all. Times are local, since
/// any moment.
#[derive(Debug, Default)]
pub struct Sieve {
    said: HashMap<(String, About), Duration>,
    /// What each namespace may say, and when it said something last.
    of: HashMap<String, (Bucket, Duration)>,
    /// Of those that have said nothing lately, so that nobody holds up what they begin with; and of the others.
    quiet: Bucket,
    loud: Bucket,
    /// Of moves of addresses, and of agents.
    moves: Bucket,
    agents: Bucket,
}

impl Sieve {
    /// Whether this is said now.
    pub fn lets(&mut self, n: &News, now: Duration) -> bool {
        let key = (n.namespace.clone(), n.about.clone());
        let old = |at: &Duration| now.saturating_sub(*at) < ONCE;
        let known = |(_, about): &(String, About), at: &Duration| now.saturating_sub(*at) < about.once();
        if self.said.get(&key).is_some_and(|at| known(&key, at)) {
            return false;
        }
        if n.about.is_of_cluster() {
            let bucket = if let About::Agent { .. } = n.about { &mut self.agents } else { &mut self.moves };
            let lets = bucket.has(BURST, SPACING, now);
            if lets {
                bucket.take(SPACING, now);
                self.said.retain(|key, at| known(key, at));
                self.said.insert(key, now);
            }
            return lets;
        }
        let lately = self.of.get(&n.namespace).copied().filter(|(_, at)| old(at));
        let mut own = lately.unwrap_or_default().0;
        let common = if lately.is_none() { &mut self.quiet } else { &mut self.loud };
        if !own.has(OWN_BURST, OWN_SPACING, now) || !common.has(BURST, SPACING, now) {
            return false;
        }
        if self.said.len() >= REMEMBERED {
            self.said.retain(|key, at| known(key, at));
            if self.said.len() >= REMEMBERED {
                return false;
            }
        }
        common.take(SPACING, now);
        own.take(OWN_SPACING, now);
        if self.of.len() >= REMEMBERED {
            self.of.retain(|_, (_, at)| old(at));
        }
        self.of.insert(n.namespace.clone(), (own, now));
        self.said.insert(key, now);
        true
    }

    /// This could not be said: it may be tried again.
    fn forget(&mut self, n: &News) {
        self.said.remove(&(n.namespace.clone(), n.about.clone()));
    }
}

/// Writes events while this gateway leads, and of what it has taken over at any time, until the channel ends.
pub async fn write(connection: Connection, mut news: mpsc::Receiver<News>, leading: Leads) {
    let start = Instant::now();
    let mut sieve = Sieve::default();
    while let Some(n) = news.recv().await {
        if !(leads(&leading) || n.about.needs_no_lead()) || !sieve.lets(&n, start.elapsed()) {
            continue;
        }
        if let Err(error) = one(&connection, &n, &leading).await {
            sieve.forget(&n);
            tracing::debug!(%error, namespace = n.namespace, about = ?n.about, "no event");
        }
    }
}

async fn one(connection: &Connection, n: &News, leading: &Leads) -> Result<(), Error> {
    // `kubectl describe` finds events by the object's UID.
    let found = match &n.about {
        About::Denied { pod, .. } => {
            let pods: Api<Pod> = Api::namespaced(connection.client.clone(), &n.namespace);
            within(pods.get_metadata_opt(pod)).await?.map(|p| p.metadata)
        }
        About::Audit { .. } => {
            let kind = ApiResource::from_gvk(&GroupVersionKind::gvk("tidegate.dev", "v1alpha1", "NamespaceEgress"));
            let api: Api<DynamicObject> = Api::namespaced_with(connection.client.clone(), &n.namespace, &kind);
            within(api.get_metadata_opt(NAME)).await?.map(|p| p.metadata)
        }
        About::Moved { pool, .. } => {
            let api: Api<DynamicObject> = Api::all_with(connection.client.clone(), &crate::pools::resource());
            within(api.get_metadata_opt(pool)).await?.map(|p| p.metadata)
        }
        About::Agent { node, .. } => {
            let nodes: Api<Node> = Api::all(connection.client.clone());
            within(nodes.get_metadata_opt(node)).await?.map(|n| n.metadata)
        }
    };
    let Some(uid) = found.and_then(|m| m.uid) else { return Ok(()) };
    let events: Api<Event> = Api::namespaced(connection.client.clone(), &n.namespace);
    let event = event(n, uid, &connection.name, Timestamp::now());
    let params = PostParams::default();
    let create = events.create(&params, &event);
    let created = if n.about.needs_no_lead() { within(create).await } else { while_leading(leading, create).await };
    match created {
        // An earlier leader has said it, or the new owner.
        Err(error) if error.code() == Some(409) => Ok(()),
        other => other.map(drop),
    }
}

fn event(n: &News, uid: String, reporter: &str, now: Timestamp) -> Event {
    let some = |text: &str| Some(text.to_owned());
    let (kind, version, name, action, reason, grade, own) = match &n.about {
        About::Denied { pod, .. } => ("Pod", "v1", pod.as_str(), "Deny", DENIED, "Warning", None),
        About::Audit { end, until } => {
            let (reason, called) = end.names();
            let own = format!("{NAME}.{called}.{until}");
            ("NamespaceEgress", "tidegate.dev/v1alpha1", NAME, "EndAudit", reason, "Normal", Some(own))
        }
        About::Moved { pool, pair, epoch, .. } => {
            let end = format!(".{pair}.{}.{epoch}", MOVED.to_lowercase());
            let own = cut(pool, MAX_NAME.saturating_sub(end.len())).trim_end_matches(['.', '-']).to_owned() + &end;
            ("EgressPool", "tidegate.dev/v1alpha1", pool.as_str(), "Move", MOVED, "Normal", Some(own))
        }
        About::Agent { node, back: false, .. } => ("Node", "v1", node.as_str(), "Miss", AWAY, "Warning", None),
        About::Agent { node, back: true, .. } => ("Node", "v1", node.as_str(), "Miss", BACK, "Normal", None),
    };
    let within = !n.about.is_of_cluster();
    let prefix = format!("{}.egress-", cut(name, MAX_PREFIX).trim_end_matches(['.', '-']));
    Event {
        metadata: ObjectMeta {
            generate_name: own.is_none().then_some(prefix),
            name: own,
            namespace: Some(n.namespace.clone()),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(now)),
        reporting_controller: some("tidegate.dev/gateway"),
        reporting_instance: some(cut(reporter, 128)),
        action: some(action),
        reason: some(reason),
        type_: some(grade),
        note: some(cut(&n.note, MAX_NOTE)),
        regarding: Some(ObjectReference {
            api_version: some(version),
            kind: some(kind),
            name: some(name),
            namespace: within.then(|| n.namespace.clone()),
            uid: Some(uid),
            ..ObjectReference::default()
        }),
        ..Event::default()
    }
}

fn cut(text: &str, most: usize) -> &str {
    let end = (0..=most.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or_default();
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denial(namespace: &str, pod: &str, what: &str, code: &str) -> News {
        let about = About::Denied { pod: pod.into(), what: what.into(), code: code.into() };
        News { namespace: namespace.into(), about, note: "n".into() }
    }

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_same_once_in_ten_minutes() {
        let mut f = Sieve::default();
        let code = "name-not-allowed";
        for (d, at, lets) in [
            (denial("shop", "a", "x", code), 0, true),
            (denial("shop", "a", "x", code), 599, false),
            (denial("shop", "a", "y", code), 599, true),
            (denial("shop", "b", "x", code), 599, true),
            (denial("shop", "a", "x", "ech"), 599, true),
            (denial("shop", "a", "x", code), 600, true),
            (denial("shop", "a", "x", code), 601, false),
        ] {
            assert_eq!(f.lets(&d, s(at)), lets, "{d:?} at {at}");
        }
        let of = |end, until| News { about: About::Audit { end, until }, ..denial("shop", "", "", "") };
        let over = |until| of(AuditEnd::Over, until);
        assert!(f.lets(&over(1), s(700)) && !f.lets(&over(1), s(701)) && f.lets(&over(2), s(701)));
        // An audit that a day and an hour before was told of, each once.
        for (end, at, lets) in [
            (AuditEnd::Day, 1000, true),
            (AuditEnd::Day, 4599, false),
            (AuditEnd::Hour, 1001, true),
            (AuditEnd::Hour, 4600, false),
            (AuditEnd::Over, 4601, true),
        ] {
            assert_eq!(f.lets(&of(end, 9), s(at)), lets, "{end:?} at {at}");
        }
    }

    #[test]
    fn the_ends_of_many_audits_are_all_told_in_the_hour_before() {
        let mut f = Sieve::default();
        let about = About::Audit { end: AuditEnd::Hour, until: 4200 };
        let ends = |n| News { about: about.clone(), ..denial(&format!("n{n}"), "", "", "") };
        let told: usize = (0..3600).step_by(60).map(|at| (0..1200).filter(|n| f.lets(&ends(*n), s(at))).count()).sum();
        assert_eq!(told, 1200, "each of them, and none twice");
    }

    #[test]
    fn a_flood_is_cut_and_memory_has_an_end() {
        let mut f = Sieve::default();
        let flood = |f: &mut Sieve, namespace: &str, at| {
            (0..1000).filter(|i| f.lets(&denial(namespace, "a", &i.to_string(), "c"), s(at))).count()
        };
        assert_eq!(flood(&mut f, "loud", 0), OWN_BURST as usize);
        assert_eq!(flood(&mut f, "loud", 12), 2);
        // What was not said may be said later.
        assert!(f.lets(&denial("loud", "a", "999", "c"), s(60)));
        let mut at = 1000;
        for i in 0..20_000u64 {
            at += 6;
            f.lets(&denial(&format!("n{}", i % 7), "c", &i.to_string(), "c"), s(at));
            f.lets(&denial(&format!("once-{i}"), "c", "c", "c"), s(at));
        }
        assert!(f.said.len() <= REMEMBERED && f.of.len() <= REMEMBERED);
    }

    fn moved(pool: &str, epoch: u64) -> News {
        let about = About::Moved { pool: pool.into(), pair: "203.0.113.10-2001.db8..10".into(), epoch, own: false };
        News { namespace: CLUSTER.into(), about, note: "n".into() }
    }

    #[test]
    fn no_flood_of_denials_swallows_a_move() {
        let mut f = Sieve::default();
        for at in 0..120 {
            for n in 0..100 {
                f.lets(&denial(&format!("loud-{n}"), "p", &at.to_string(), "c"), s(at));
                f.lets(&denial(CLUSTER, "p", &format!("{at}-{n}"), "c"), s(at));
            }
            for n in 0..100 {
                f.lets(&denial(&format!("new-{at}-{n}"), "p", "x", "c"), s(at));
            }
        }
        let told = (0..100).filter(|n| f.lets(&moved("p", *n), s(119))).count();
        assert_eq!(told, BURST as usize, "and of moves there is an end, too");
        assert!(!f.lets(&moved("p", 0), s(140)) && f.lets(&moved("p", 100), s(140)));
        // Nor the other way round, nor agents.
        let mut agent = |n: u64, since| {
            let about = About::Agent { node: format!("n{n}"), back: false, since };
            f.lets(&News { namespace: CLUSTER.into(), about, note: "n".into() }, s(140))
        };
        assert!(agent(0, 1) && !agent(0, 1) && agent(0, 2));
        assert_eq!((1..100).filter(|n| agent(*n, 1)).count(), BURST as usize - 2);
        assert!(f.lets(&denial("quiet", "p", "x", "c"), s(140)));
    }

    #[test]
    fn names_of_events_are_short_enough_and_differ() {
        let name =
            |pool: &str, epoch| event(&moved(pool, epoch), "u".into(), "gw", Timestamp::now()).metadata.name.unwrap();
        for length in 180..=253 {
            let pool = format!("{}.p", "p".repeat(length - 2));
            let [one, two] = [1, u64::MAX].map(|epoch| name(&pool, epoch));
            assert!(one.len() <= 253 && two.len() <= 253 && one != two);
            assert!(one.split('.').all(|l| !l.starts_with('-') && !l.ends_with('-')), "{one}");
        }
        assert!(name("partner-a", 7).starts_with("partner-a.203.0.113.10-"));
    }

    #[test]
    fn loud_namespaces_keep_no_quiet_one_from_being_told() {
        let mut f = Sieve::default();
        // A hundred that never stop: all that they may say is used up.
        for at in 0..120 {
            for n in 0..100 {
                f.lets(&denial(&format!("loud-{n}"), "p", &at.to_string(), "c"), s(at));
            }
        }
        assert!(!f.lets(&denial("loud-1", "p", "more", "c"), s(119)));
        assert!(f.lets(&denial("quiet", "p", "x", "c"), s(119)));
        let all = f.said.len();
        assert!(all < 2 * (BURST as usize + 121), "{all}");
    }
}
