//! Which status is written next, and when: pure, so that it can be tried without an API server.
//!
//! News that people wait for are written at once, the rest of an object at most every minute, nothing that the object says
//! already, and never more than ten writes a second. Of those namespaces take turns: one with much news delays no other. What is
//! written is what is wanted at that moment, however long it waited.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value, json};

/// Time between two writes.
pub const SPACING: Duration = Duration::from_millis(100);
/// Time between two writes of an object where nothing is urgent.
pub const REST: Duration = Duration::from_secs(60);
/// A condition that is no longer true has to be so for this time: a node that connects again must not look like news.
pub const SETTLE: Duration = Duration::from_secs(5);
/// Namespaces whose turn is remembered. Of more those that were written longest ago are forgotten, as if they never were.
const REMEMBERED: usize = 4096;
/// The first and the longest wait after a failure.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// A kind whose status is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `EgressPool`; only its conditions are ours.
    EgressPool,
    /// `ClusterEgressPolicy`.
    ClusterEgressPolicy,
    /// `EgressPolicy`.
    EgressPolicy,
    /// `NamespaceEgress`, which is made and deleted too.
    NamespaceEgress,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::EgressPool, Self::ClusterEgressPolicy, Self::EgressPolicy, Self::NamespaceEgress];

    /// As in manifests.
    pub const fn name(self) -> &'static str {
        match self {
            Self::EgressPool => "EgressPool",
            Self::ClusterEgressPolicy => "ClusterEgressPolicy",
            Self::EgressPolicy => "EgressPolicy",
            Self::NamespaceEgress => "NamespaceEgress",
        }
    }

    /// As in URLs.
    pub const fn plural(self) -> &'static str {
        match self {
            Self::EgressPool => "egresspools",
            Self::ClusterEgressPolicy => "clusteregresspolicies",
            Self::EgressPolicy => "egresspolicies",
            Self::NamespaceEgress => "namespaceegresses",
        }
    }

    /// The fields of the status that are ours.
    const fn fields(self) -> &'static [&'static str] {
        match self {
            Self::EgressPool => &["conditions"],
            Self::ClusterEgressPolicy | Self::EgressPolicy => &["conditions", "nodes", "refused"],
            Self::NamespaceEgress => &[
                "conditions",
                "isolation",
                "because",
                "mode",
                "auditUntilTime",
                "egress",
                "refused",
                "denials",
                "hostNetworkPods",
            ],
        }
    }

    /// Those of them that may wait.
    const fn patient(self) -> &'static [&'static str] {
        &["nodes", "denials", "hostNetworkPods"]
    }
}

/// Which object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Object {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace; empty for kinds of the cluster.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// What an object's status should say.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// The UID that the object must have; empty: any.
    pub uid: String,
    /// The status; conditions have no `lastTransitionTime`.
    pub status: Arc<Value>,
}

/// All that is wanted. A `NamespaceEgress` that is not among it is deleted.
pub type Statuses = BTreeMap<Object, Wanted>;

/// What an object's status says.
#[derive(Clone, Debug, Default)]
struct Observed {
    uid: String,
    /// Our fields, without times.
    status: Map<String, Value>,
    /// By type of condition: its status, and since when.
    since: BTreeMap<String, (String, String)>,
    /// When it was written last by this process.
    written: Option<Duration>,
}

/// What to write.
#[derive(Clone, Debug, PartialEq)]
pub enum Write {
    /// Make the object; its status comes next.
    Create(Object),
    /// A merge patch of its status.
    Status(Object, Value),
    /// Delete it, if it still has this UID.
    Delete(Object, String),
}

impl Write {
    /// The object.
    pub const fn object(&self) -> &Object {
        match self {
            Self::Create(o) | Self::Status(o, _) | Self::Delete(o, _) => o,
        }
    }
}

/// What is to be done next.
#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    /// This.
    Write(Write),
    /// Nothing for so long.
    Wait(Duration),
    /// Nothing.
    Idle,
}

/// Knows what is said and what should be. Times are local, since any moment.
#[derive(Debug, Default)]
pub struct Pace {
    wanted: Arc<Statuses>,
    observed: BTreeMap<Object, Observed>,
    due: BTreeMap<Object, Duration>,
    queue: BTreeSet<(Duration, Object)>,
    failures: BTreeMap<Object, u32>,
    /// When each namespace was written last, in turns; the cluster's own objects have the empty name.
    served: HashMap<String, u64>,
    turn: u64,
    /// No write before.
    not_before: Duration,
    /// Failures of the API server in a row.
    outage: u32,
}

impl Pace {
    /// Forgets what objects say: it is about to be learnt anew.
    pub fn forget(&mut self) {
        self.observed.clear();
        self.due.clear();
        self.queue.clear();
        self.failures.clear();
    }

    /// An object was read, with its status.
    pub fn learn(&mut self, object: Object, uid: &str, status: &Value) {
        let written = self.observed.get(&object).and_then(|o| o.written);
        let observed = Observed { written, ..Observed::of(object.kind, uid, status) };
        self.observed.insert(object, observed);
    }

    /// What is wanted now.
    pub fn want(&mut self, wanted: Arc<Statuses>, now: Duration) {
        let before = std::mem::replace(&mut self.wanted, wanted);
        let wanted = self.wanted.clone();
        self.failures.retain(|o, _| wanted.contains_key(o) || self.observed.contains_key(o));
        let gone: Vec<Object> = self.due.keys().filter(|o| !wanted.contains_key(*o)).cloned().collect();
        for object in gone {
            self.settle(&object, now);
        }
        for (object, new) in wanted.iter() {
            // What is wanted still is settled: what else can change that, settles it anew.
            let same = |old: &Wanted| Arc::ptr_eq(&old.status, &new.status) && old.uid == new.uid;
            if !before.get(object).is_some_and(same) {
                self.settle(object, now);
            }
        }
        let extra = self.observed.keys().filter(|o| o.kind == Kind::NamespaceEgress && !wanted.contains_key(*o));
        for object in extra.cloned().collect::<Vec<_>>() {
            self.settle(&object, now);
        }
    }

    /// Says when an object has to be written, if it has.
    fn settle(&mut self, object: &Object, now: Duration) {
        let due = self.need(object, now);
        let old = self.due.get(object).copied();
        // What waits already does not wait longer for more news; after a failure it does.
        let due = match (due, old) {
            (Some(new), Some(old)) if !self.failures.contains_key(object) => Some(new.min(old)),
            (due, _) => due,
        };
        if due == old {
            return;
        }
        if let Some(old) = old {
            self.queue.remove(&(old, object.clone()));
            self.due.remove(object);
        }
        if let Some(due) = due {
            self.queue.insert((due, object.clone()));
            self.due.insert(object.clone(), due);
        }
    }

    fn need(&self, object: &Object, now: Duration) -> Option<Duration> {
        if self.failures.contains_key(object)
            && let Some(due) = self.due.get(object)
        {
            return Some(*due);
        }
        let Some(wanted) = self.wanted.get(object) else {
            // Only what is ours is deleted.
            return (object.kind == Kind::NamespaceEgress && self.observed.contains_key(object)).then_some(now);
        };
        let Some(observed) = self.observed.get(object).filter(|o| o.is(object.kind, wanted)) else {
            return Some(now);
        };
        match observed.difference(object.kind, &wanted.status) {
            Difference::None => None,
            Difference::News => Some(now),
            Difference::Doubt => Some(now + SETTLE),
            Difference::Rest => Some(observed.written.map_or(now, |w| now.max(w + REST))),
        }
    }

    /// What to do at this moment. `time` is what people read as the time of a change.
    pub fn next(&mut self, now: Duration, time: &str) -> Next {
        loop {
            let Some((due, _)) = self.queue.first() else { return Next::Idle };
            let at = (*due).max(self.not_before);
            if at > now {
                return Next::Wait(at - now);
            }
            let turn = |o: &Object| self.served.get(&o.namespace).copied().unwrap_or_default();
            let ripe = self.queue.iter().take_while(|(due, _)| *due <= now);
            let Some(first) = ripe.min_by_key(|(due, o)| (turn(o), *due)).cloned() else { return Next::Idle };
            self.queue.remove(&first);
            let (_, object) = first;
            self.due.remove(&object);
            let namespace = object.namespace.clone();
            let Some(write) = self.write(object, time) else { continue };
            self.not_before = now + SPACING;
            self.serve(namespace);
            return Next::Write(write);
        }
    }

    fn serve(&mut self, namespace: String) {
        self.turn += 1;
        if self.served.len() >= REMEMBERED {
            let old = self.turn.saturating_sub(REMEMBERED as u64 / 2);
            self.served.retain(|_, turn| *turn > old);
        }
        self.served.insert(namespace, self.turn);
    }

    fn write(&self, object: Object, time: &str) -> Option<Write> {
        let observed = self.observed.get(&object);
        let Some(wanted) = self.wanted.get(&object) else {
            let uid = observed?.uid.clone();
            return Some(Write::Delete(object, uid));
        };
        if observed.is_none() && object.kind == Kind::NamespaceEgress {
            return Some(Write::Create(object));
        }
        let observed = observed.filter(|o| o.is(object.kind, wanted));
        let empty = Observed::default();
        let body = observed.unwrap_or(&empty).patch(object.kind, &wanted.status, time);
        Some(Write::Status(object, json!({"status": body})))
    }

    /// A write succeeded; the object as the API server has it now. Absent: it is gone.
    pub fn done(&mut self, write: &Write, object: Option<(&str, &Value)>, now: Duration) {
        let key = write.object();
        self.outage = 0;
        self.failures.remove(key);
        match object {
            Some((uid, status)) => {
                let written = match write {
                    Write::Status(..) => Some(now),
                    _ => None,
                };
                self.observed.insert(key.clone(), Observed { written, ..Observed::of(key.kind, uid, status) });
            }
            None => drop(self.observed.remove(key)),
        }
        self.settle(key, now);
        let other = |w: &Wanted| self.observed.get(key).is_some_and(|o| !o.is(key.kind, w));
        if matches!(write, Write::Status(..)) && self.wanted.get(key).is_some_and(other) {
            // It went to another object of the name, made anew: the next wish will be for that one.
            self.put(key.clone(), now + REST);
        }
    }

    /// A write was refused: it is this object's own matter. `jitter` is between 0 and 1.
    pub fn refused(&mut self, write: &Write, now: Duration, jitter: f64) {
        let key = write.object();
        self.outage = 0;
        let failures = self.failures.entry(key.clone()).or_default();
        let wait = backoff(*failures, jitter);
        *failures = failures.saturating_add(1);
        // What it says is read again, or found out by the next try.
        self.put(key.clone(), now + wait);
    }

    /// An object is not there (any more).
    pub fn missing(&mut self, write: &Write, now: Duration, jitter: f64) {
        self.observed.remove(write.object());
        if matches!(write, Write::Delete(..)) {
            return;
        }
        self.refused(write, now, jitter);
    }

    /// The API server did not answer, or had no time: nothing is written for a while.
    pub fn unanswered(&mut self, write: &Write, now: Duration, jitter: f64) {
        self.not_before = now + backoff(self.outage, jitter);
        self.outage = self.outage.saturating_add(1);
        self.put(write.object().clone(), now);
    }

    fn put(&mut self, object: Object, due: Duration) {
        if let Some(old) = self.due.insert(object.clone(), due) {
            self.queue.remove(&(old, object.clone()));
        }
        self.queue.insert((due, object));
    }
}

fn backoff(failures: u32, jitter: f64) -> Duration {
    let step = BACKOFF.0.saturating_mul(2u32.saturating_pow(failures)).min(BACKOFF.1);
    step.mul_f64(0.75 + jitter.clamp(0.0, 1.0) / 2.0)
}

/// How what is said differs from what should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Difference {
    None,
    /// In what may wait.
    Rest,
    /// In a condition that was true of this generation and may be so again in a moment.
    Doubt,
    /// In what people wait for.
    News,
}

impl Observed {
    fn of(kind: Kind, uid: &str, status: &Value) -> Self {
        let mut out = Self { uid: uid.to_owned(), ..Self::default() };
        for field in kind.fields() {
            let Some(value) = status.get(field).filter(|v| !v.is_null()) else { continue };
            out.status.insert((*field).to_owned(), value.clone());
        }
        if let Some(Value::Array(conditions)) = out.status.get_mut("conditions") {
            for c in conditions {
                let text = |c: &Value, k: &str| c.get(k).and_then(Value::as_str).unwrap_or_default().to_owned();
                let (kind, status, time) = (text(c, "type"), text(c, "status"), text(c, "lastTransitionTime"));
                out.since.insert(kind, (status, time));
                if let Value::Object(fields) = c {
                    fields.remove("lastTransitionTime");
                }
            }
        }
        out
    }

    /// Whether this is the object that is meant. A NamespaceEgress is known by its namespace.
    fn is(&self, kind: Kind, wanted: &Wanted) -> bool {
        kind == Kind::NamespaceEgress || wanted.uid.is_empty() || self.uid == wanted.uid
    }

    fn difference(&self, kind: Kind, wanted: &Value) -> Difference {
        let mut worst = Difference::None;
        let mut note = |d: Difference| worst = if d as u8 > worst as u8 { d } else { worst };
        for field in kind.fields() {
            let is = self.status.get(*field);
            let should = wanted.get(*field).filter(|v| !v.is_null());
            if *field == "conditions" {
                note(conditions(is, should));
            } else if is != should {
                note(if kind.patient().contains(field) { Difference::Rest } else { Difference::News });
            }
        }
        worst
    }

    /// The fields to write: what is wanted with times, and null for what goes.
    fn patch(&self, kind: Kind, wanted: &Value, time: &str) -> Value {
        let mut out = Map::new();
        for field in kind.fields() {
            match wanted.get(*field).filter(|v| !v.is_null()) {
                Some(v) => drop(out.insert((*field).to_owned(), v.clone())),
                None if self.status.contains_key(*field) => drop(out.insert((*field).to_owned(), Value::Null)),
                None => {}
            }
        }
        if let Some(Value::Array(conditions)) = out.get_mut("conditions") {
            for c in conditions {
                let kind = c.get("type").and_then(Value::as_str).unwrap_or_default();
                let since = self
                    .since
                    .get(kind)
                    .filter(|(s, t)| !t.is_empty() && Some(s.as_str()) == c.get("status").and_then(Value::as_str));
                let time = since.map_or(time, |(_, t)| t.as_str()).to_owned();
                c["lastTransitionTime"] = time.into();
            }
        }
        Value::Object(out)
    }
}

fn conditions(is: Option<&Value>, should: Option<&Value>) -> Difference {
    let empty = Vec::new();
    let list = |v: Option<&Value>| v.and_then(Value::as_array).cloned().unwrap_or_else(|| empty.clone());
    let (is, should) = (list(is), list(should));
    if is == should {
        return Difference::None;
    }
    let kinds = |l: &[Value]| l.iter().map(|c| c["type"].clone()).collect::<Vec<_>>();
    if kinds(&is) != kinds(&should) {
        return Difference::News;
    }
    let mut worst = Difference::None;
    for (old, new) in is.iter().zip(&should) {
        let same = |field: &str| old.get(field) == new.get(field);
        let d = if old == new {
            Difference::None
        } else if !same("observedGeneration") {
            Difference::News
        } else if old["status"] == "True" && new["status"] == "False" && new["type"] == "Programmed" {
            Difference::Doubt
        } else if !same("status") || !same("reason") {
            Difference::News
        } else {
            Difference::Rest
        };
        worst = if d as u8 > worst as u8 { d } else { worst };
    }
    worst
}

#[cfg(test)]
mod tests;
