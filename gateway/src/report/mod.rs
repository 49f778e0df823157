//! What the status of each object should be: policy, nodes, owners and denials put into words for people.
//!
//! ```text
//! policy thread ── Snapshot (compile, survey) ──┐
//! core ── Status (nodes, owners) ───────────────┼─▶ thread ──▶ Reports ──▶ admin port, API server (the leader's)
//! events, agents, other gateways ── Denied ─────┘
//! ```
//!
//! Everything but [`thread`] is pure: objects and time in, statuses out. Conditions come without `lastTransitionTime`: whoever
//! writes a status knows what it said before.

mod absent;
#[cfg(test)]
mod cluster_tests;
mod condition;
mod denials;
mod fair;
pub mod leading;
mod namespace;
mod policy;
mod rollout;
#[cfg(test)]
mod scale_tests;
mod suggest;
mod survey;
#[cfg(test)]
mod tests;
pub mod thread;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use serde::Serialize;
use tidegate_api::ObjectRef;
use tidegate_api::resource::{EgressPoolStatus, NamespaceEgressStatus, PolicyStatus};
use tidegate_policy::denied::Denied;
use tidegate_policy::model::{Objects, Touched, UnixSeconds};
use tidegate_policy::world::{Issue, PolicyRef, World};
use tidegate_policy::{Name, ScopeKey};
use tidegate_proto::Pair;

pub use self::denials::Table;
use self::namespace::{Subject, issues_of};
use self::policy::Used;
use self::rollout::{CompileNumber, Count, Rollout, Spread, reference};
use self::survey::{CLUSTER_POLICY, POLICY, POOL, Place};
pub use self::survey::{Source, Survey, records_of};
use crate::core::{PairStatus, Status};
use crate::desired::Desired;

/// The kind of what Tidegate says of a namespace.
pub const NAMESPACE_EGRESS: &str = "NamespaceEgress";
/// The name of that object in each namespace.
pub const NAME: &str = "tidegate";

/// A status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Report {
    /// Of a policy or cluster policy.
    Policy(PolicyStatus),
    /// Of a pool, without who holds its pairs.
    Pool(EgressPoolStatus),
    /// Of a namespace.
    Namespace(Box<NamespaceEgressStatus>),
}

/// A status with the UID of the object that it is about; of a namespace's, the namespace's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reported {
    /// The UID; empty outside a cluster.
    pub uid: String,
    /// What the status should say.
    pub report: Report,
}

/// All statuses, by object. What did not change is the same value.
pub type Reports = BTreeMap<ObjectRef, Arc<Reported>>;

/// One compile with what was surveyed of the same objects.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Rises with every compile, from 1; nodes' acks are counted in it.
    pub number: CompileNumber,
    /// The policy.
    pub world: Arc<World>,
    /// What is written.
    pub survey: Arc<Survey>,
}

/// Surveys the objects of each compile, for the thread.
#[derive(Debug)]
pub struct Surveyor {
    survey: Option<Arc<Survey>>,
    out: Arc<ArcSwapOption<Snapshot>>,
}

impl Surveyor {
    /// Puts what it finds there.
    pub fn new(out: Arc<ArcSwapOption<Snapshot>>) -> Self {
        Self { survey: None, out }
    }

    /// Looks at what was touched since the last time, for this compile with its number.
    pub fn look(&mut self, number: u64, world: &Arc<World>, objects: &Objects, source: &dyn Source, touched: &Touched) {
        let survey = Arc::new(Survey::new(objects, source, touched, self.survey.as_deref()));
        self.survey = Some(survey.clone());
        self.out.store(Some(Arc::new(Snapshot { number, world: world.clone(), survey })));
    }
}

/// Makes reports, and remembers what it takes to say since when things are as they are.
#[derive(Debug, Default)]
pub struct Reporter {
    rollout: Rollout,
    spread: Spread,
    last: Option<Snapshot>,
    scopes: HashMap<Arc<str>, Vec<ScopeKey>>,
    /// What was said last.
    said: Reports,
}

/// What reports say beside policy.
pub struct Beside<'a> {
    /// Nodes and owners.
    pub status: &'a Status,
    /// Denials.
    pub denials: &'a Table,
    /// The names that a scope was told for an address.
    pub names: &'a dyn Fn(ScopeKey, IpAddr) -> Vec<Name>,
    /// Now, by the wall clock.
    pub now: UnixSeconds,
}

impl Reporter {
    /// What would allow a denial, by the last reports.
    pub fn allow_with(
        &self,
        snapshot: &Snapshot,
        denied: &Denied,
        names: &dyn Fn(ScopeKey, IpAddr) -> Vec<Name>,
    ) -> Option<String> {
        let population = denied.who.as_ref().and_then(|w| self.spread.namespace(&w.namespace));
        suggest::for_pod(denied, population, &snapshot.world, names)
    }

    /// All that should be said now.
    pub fn reports(&mut self, snapshot: &Snapshot, beside: &Beside<'_>) -> Reports {
        let Snapshot { world, survey, .. } = snapshot;
        let last = self.last.as_ref();
        if !last.is_some_and(|l| Arc::ptr_eq(&l.world, world) && Arc::ptr_eq(&l.survey, survey)) {
            self.last = Some(snapshot.clone());
            self.spread = self.rollout.compiled(world, survey, snapshot.number);
            self.scopes.clear();
            for scope in world.scopes().values() {
                self.scopes.entry(scope.namespace().clone()).or_default().push(scope.key());
            }
        }
        let mut out = Reports::new();
        let said = std::mem::take(&mut self.said);
        let mut say = |kind: &str, namespace: &str, name: &str, uid: &str, report: Report| {
            let object = ObjectRef { kind: kind.into(), namespace: namespace.into(), name: name.into() };
            let new = Reported { uid: uid.to_owned(), report };
            let same = said.get(&object).filter(|old| ***old == new).cloned();
            out.insert(object, same.unwrap_or_else(|| Arc::new(new)));
        };
        let issues = world.issues();
        let nodes = &beside.status.nodes;
        for (name, written) in &survey.cluster {
            let who = reference(CLUSTER_POLICY, "", name);
            let count = Count::of(self.spread.of(&who), nodes);
            let status = policy::status(written, false, of_policy(issues, &who), &count);
            say(CLUSTER_POLICY, "", name, &written.record.uid, Report::Policy(status));
        }
        let used = used(world, &beside.status.pairs);
        for (name, basin) in &survey.pools {
            let status = policy::pool(basin, used.get(name.as_str()));
            say(POOL, "", name, &basin.record.uid, Report::Pool(status));
        }
        for (ns, place) in &survey.namespaces {
            for (name, written) in &place.policies {
                let who = reference(POLICY, ns, name);
                let count = Count::of(self.spread.of(&who), nodes);
                let status = policy::status(written, place.exempt, of_policy(issues, &who), &count);
                say(POLICY, ns, name, &written.record.uid, Report::Policy(status));
            }
            if let Some(status) = self.namespace(snapshot, beside, ns, place) {
                say(NAMESPACE_EGRESS, ns, NAME, &place.annotations.uid, status);
            }
        }
        self.said.clone_from(&out);
        out
    }

    /// The same as [`Reporter::reports`] where nothing but denials of these namespaces is new since.
    pub fn denied(&mut self, snapshot: &Snapshot, beside: &Beside<'_>, namespaces: &BTreeSet<Arc<str>>) -> Reports {
        for ns in namespaces {
            let object = ObjectRef { kind: NAMESPACE_EGRESS.into(), namespace: ns.to_string(), name: NAME.into() };
            let place = snapshot.survey.namespaces.get(&**ns);
            let status = place.and_then(|p| Some((self.namespace(snapshot, beside, ns, p)?, p)));
            match status {
                Some((report, p)) => {
                    let new = Reported { uid: p.annotations.uid.clone(), report };
                    if self.said.get(&object).is_none_or(|old| **old != new) {
                        self.said.insert(object, Arc::new(new));
                    }
                }
                None => drop(self.said.remove(&object)),
            }
        }
        self.said.clone()
    }

    fn namespace(&self, snapshot: &Snapshot, beside: &Beside<'_>, ns: &str, place: &Place) -> Option<Report> {
        let subject = Subject {
            name: ns,
            place,
            survey: &snapshot.survey,
            world: &snapshot.world,
            population: self.spread.namespace(ns),
            issues: issues_of(snapshot.world.issues(), ns),
            scopes: self.scopes.get(ns).map(Vec::as_slice).unwrap_or_default(),
            nodes: &beside.status.nodes,
            owner: &|pair| owner(&beside.status.pairs, pair),
            denials: beside.denials,
            names: beside.names,
            now: beside.now,
        };
        Some(Report::Namespace(Box::new(subject.status()?)))
    }
}

/// The issues of one policy, out of all in their order.
fn of_policy<'a>(issues: &'a [Issue], who: &PolicyRef) -> &'a [Issue] {
    let start = issues.partition_point(|i| i.policy < *who);
    let end = start + issues[start..].partition_point(|i| i.policy == *who);
    &issues[start..end]
}

/// Who holds a pair.
fn owner<'a>(claims: &'a [PairStatus], pair: &Pair) -> Option<&'a str> {
    let text = pair.to_string();
    let claim = claims.iter().find(|c| c.pair == text)?;
    Some(claim.owner.as_str()).filter(|o| !o.is_empty())
}

/// The pairs that scopes use, by pool, with who holds them.
fn used<'a>(world: &'a World, claims: &'a [PairStatus]) -> BTreeMap<&'a str, Used<'a>> {
    let owners: HashMap<&str, &str> = claims.iter().map(|c| (c.pair.as_str(), c.owner.as_str())).collect();
    let mut out: BTreeMap<&str, Used<'_>> = BTreeMap::new();
    for scope in world.scopes().values() {
        let of = out.entry(scope.pool()).or_default();
        let Some(pair) = Desired::pair(scope) else {
            of.without += 1;
            continue;
        };
        let full = pair.to_string();
        let text = full.split_once(' ').map_or("the pod network", |(_, addresses)| addresses);
        let owner = owners.get(full.as_str()).copied().filter(|o| !o.is_empty());
        if scope.pair().is_some_and(|p| p.draining)
            && namespace::elsewhere(scope, &|p| self::owner(claims, p)).is_none()
        {
            *of.stay.entry(text.to_owned()).or_default() += 1;
        }
        of.pairs.insert(text.to_owned(), owner);
    }
    out
}

/// Reports as the admin port shows them; of one namespace alone, if one is named.
pub fn listed(reports: &Reports, namespace: Option<&str>) -> Vec<serde_json::Value> {
    let one = |(o, r): (&ObjectRef, &Arc<Reported>)| serde_json::json!({"kind": o.kind, "namespace": o.namespace, "name": o.name, "status": r.report});
    reports.iter().filter(|(o, _)| namespace.is_none_or(|n| n == o.namespace)).map(one).collect()
}
