//! What of the objects reports are about, kept apart from the objects: small, shared between compiles, and made anew only
//! for namespaces that changed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use tidegate_api::index::{self, Feed, Index};
use tidegate_api::{Code, FieldProblem, ObjectRef, Problem, Severity};
use tidegate_policy::model::{
    AddressSource, ClusterDefault, ClusterPolicy, Namespace, Objects, Pair, PolicyMode, Selector, Settings, Touched,
    UnixSeconds,
};

/// The kind of namespaced policies.
pub const POLICY: &str = "EgressPolicy";
/// The kind of cluster policies.
pub const CLUSTER_POLICY: &str = "ClusterEgressPolicy";
/// The kind of pools.
pub const POOL: &str = "EgressPool";
/// The kind of namespaces.
pub const NAMESPACE: &str = "Namespace";

/// The most host-network pods that are named.
const MAX_NAMED: usize = 10;

/// What is wrong or noteworthy in an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// How much it matters.
    pub severity: Severity,
    /// What kind it is.
    pub code: Code,
    /// The field, as people write it; empty for the whole object.
    pub path: String,
    /// What is wrong, and what to write instead.
    pub message: String,
}

/// What a source knows of an object beside its content.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Its UID; empty outside a cluster.
    pub uid: String,
    /// Its generation; absent outside a cluster.
    pub generation: Option<i64>,
    /// What is wrong with what is written now.
    pub notes: Vec<Note>,
    /// No good version of it is known: if anything of it is in force, it is what is strict in it.
    pub closed: bool,
}

impl Record {
    /// The problem for which it is not taken.
    pub fn error(&self) -> Option<&Note> {
        self.notes.iter().find(|n| n.severity == Severity::Error)
    }
}

/// What knows records; also of objects of which no version was ever good.
pub trait Source {
    /// One object.
    fn record(&self, kind: &str, namespace: &str, name: &str) -> Option<Record>;
    /// The objects of a kind in a namespace, which is empty for kinds of the cluster.
    fn all(&self, kind: &str, namespace: &str) -> Vec<(String, Record)>;
    /// Namespaces with policies.
    fn namespaces(&self) -> BTreeSet<String>;
}

/// The records of a source that knows problems alone, as the directory reader does.
pub type Records = BTreeMap<ObjectRef, Record>;

fn object(kind: &str, namespace: &str, name: &str) -> ObjectRef {
    ObjectRef { kind: kind.into(), namespace: namespace.into(), name: name.into() }
}

/// Makes them out of the objects that hold and of what is wrong.
pub fn records_of(objects: &Objects, problems: &[Problem]) -> Records {
    let policies = objects.policies.keys().map(|(ns, n)| object(POLICY, ns, n));
    let cluster = objects.cluster_policies.keys().map(|n| object(CLUSTER_POLICY, "", n));
    let pools = objects.pools.keys().map(|n| object(POOL, "", n));
    let namespaces = objects.namespaces.keys().map(|n| object(NAMESPACE, "", n));
    let known = policies.chain(cluster).chain(pools).chain(namespaces);
    let mut out: Records = known.map(|r| (r, Record::default())).collect();
    for p in problems {
        let Some(object) = p.object.as_ref().filter(|o| !o.name.is_empty()) else { continue };
        let note = Note { severity: p.severity, code: p.code, path: p.path.to_string(), message: p.message.clone() };
        out.entry(object.clone()).or_default().notes.push(note);
    }
    out
}

impl Source for Records {
    fn record(&self, kind: &str, namespace: &str, name: &str) -> Option<Record> {
        self.get(&object(kind, namespace, name)).cloned()
    }

    fn all(&self, kind: &str, namespace: &str) -> Vec<(String, Record)> {
        let known = self.range(object(kind, namespace, "")..);
        let known = known.take_while(|(r, _)| r.kind == kind && r.namespace == namespace);
        known.map(|(r, record)| (r.name.clone(), record.clone())).collect()
    }

    fn namespaces(&self) -> BTreeSet<String> {
        self.keys().filter(|r| r.kind == POLICY).map(|r| r.namespace.clone()).collect()
    }
}

fn feed(kind: &str) -> Feed {
    match kind {
        POLICY => Feed::EgressPolicies,
        CLUSTER_POLICY => Feed::ClusterEgressPolicies,
        POOL => Feed::EgressPools,
        _ => Feed::Namespaces,
    }
}

impl From<&index::Record> for Record {
    fn from(r: &index::Record) -> Self {
        let note = |p: &FieldProblem| Note {
            severity: p.severity,
            code: p.code,
            path: p.path.to_string(),
            message: p.message.clone(),
        };
        let generation = (r.generation > 0).then_some(r.generation);
        Self { uid: r.uid.clone(), generation, notes: r.problems.iter().map(note).collect(), closed: !r.held }
    }
}

impl Source for Index {
    fn record(&self, kind: &str, namespace: &str, name: &str) -> Option<Record> {
        Index::record(self, feed(kind), namespace, name).map(Record::from)
    }

    fn all(&self, kind: &str, namespace: &str) -> Vec<(String, Record)> {
        self.records_in(feed(kind), namespace).map(|(name, r)| (name.to_owned(), r.into())).collect()
    }

    fn namespaces(&self) -> BTreeSet<String> {
        self.records(Feed::EgressPolicies).map(|((ns, _), _)| ns.clone()).collect()
    }
}

/// A policy as it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// What the source knows of it.
    pub record: Record,
    /// Differs between any two contents of which one follows the other.
    pub edition: u64,
    /// Whether a version of it is in force: what is written now, or the last good one.
    pub in_force: bool,
    /// `mode: Staged`.
    pub staged: bool,
    /// It selects every pod of its namespaces.
    pub everywhere: bool,
    /// The pool that it asks for.
    pub pool: Option<String>,
    /// It is a cluster policy.
    pub cluster: bool,
    /// It is a bad cluster policy, and whom it is for cannot be read.
    pub subject_lost: bool,
}

/// A namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// What the source knows of it.
    pub record: Record,
    /// Differs between any two contents of which one follows the other.
    pub edition: u64,
    /// What its annotations say; `labels` and `allow` are left out.
    pub annotations: Namespace,
    /// No policy and no default touches it.
    pub exempt: bool,
    /// Its policies by name.
    pub policies: BTreeMap<String, Written>,
    /// Cluster policies in force whose namespace selector takes it.
    pub cluster: Vec<Arc<str>>,
    /// How many pods on the host's network it has, and the first of them by name.
    pub host_network: (u32, Vec<String>),
    /// Whether it has pods with an address of their own.
    pub has_pods: bool,
    /// The pairs that are recorded for it, by pool.
    pub assigned: BTreeMap<String, Pair>,
}

/// A pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Basin {
    /// What the source knows of it.
    pub record: Record,
    /// Whether a version of it is in force.
    pub in_force: bool,
    /// Its pairs; none for PodNetwork.
    pub pairs: Vec<Pair>,
    /// Whether it is a PodNetwork pool.
    pub pod_network: bool,
}

/// All that reports need of the objects.
#[derive(Clone, Debug, Default)]
pub struct Survey {
    /// Namespaces by name.
    pub namespaces: BTreeMap<String, Arc<Place>>,
    /// Cluster policies by name.
    pub cluster: BTreeMap<String, Written>,
    /// Pools by name.
    pub pools: BTreeMap<String, Basin>,
    /// What a pod that nothing selects is.
    pub default: ClusterDefault,
}

impl Survey {
    /// Looks at the objects. Of an earlier survey stays what was not touched.
    pub fn new(objects: &Objects, source: &dyn Source, touched: &Touched, earlier: Option<&Survey>) -> Self {
        let earlier = earlier.filter(|_| !touched.all);
        let mut out = match earlier {
            Some(e) => e.clone(),
            None => Self {
                namespaces: BTreeMap::new(),
                cluster: cluster(objects, source),
                pools: pools(objects, source),
                default: objects.settings.cluster_default,
            },
        };
        let names: BTreeSet<String> = match earlier {
            Some(e) => {
                let pods = touched.pods.iter().map(|(ns, _)| ns);
                let mut names: BTreeSet<String> = touched.namespaces.iter().chain(pods).cloned().collect();
                if !touched.cluster_policies.is_empty() {
                    out.cluster = cluster(objects, source);
                    names.extend(e.concerned(objects, &touched.cluster_policies));
                }
                names
            }
            None => {
                let mut names = source.namespaces();
                names.extend(objects.namespaces.keys().cloned());
                names.extend(objects.pods.keys().chain(objects.policies.keys()).map(|(ns, _)| ns.clone()));
                names
            }
        };
        for name in names {
            match place(objects, source, &name) {
                Some(new) if out.namespaces.get(&name).is_some_and(|old| **old == new) => {}
                Some(new) => drop(out.namespaces.insert(name, Arc::new(new))),
                None => drop(out.namespaces.remove(&name)),
            }
        }
        out
    }
}

impl Survey {
    /// The namespaces that one of these cluster policies selects, or selected when this was surveyed.
    fn concerned(&self, objects: &Objects, policies: &BTreeSet<String>) -> Vec<String> {
        let none = BTreeMap::new();
        let now: Vec<&ClusterPolicy> = policies.iter().filter_map(|n| objects.cluster_policies.get(n)).collect();
        let all = self.namespaces.iter().filter(|(name, place)| {
            let labels = objects.namespaces.get(*name).map_or(&none, |ns| &ns.labels);
            place.cluster.iter().any(|n| policies.contains(&**n)) || now.iter().any(|p| p.namespaces.matches(labels))
        });
        all.map(|(name, _)| name.clone()).collect()
    }
}

fn cluster(objects: &Objects, source: &dyn Source) -> BTreeMap<String, Written> {
    let written = |(name, record): (String, Record)| {
        let p = objects.cluster_policies.get(&name);
        let all = |p: &ClusterPolicy| is_all(&p.namespaces) && is_all(&p.pods) && !p.subject_lost;
        let written = Written {
            edition: edition(&record, p),
            record,
            in_force: p.is_some(),
            staged: p.is_some_and(|p| p.mode == PolicyMode::Staged),
            everywhere: p.is_some_and(all),
            pool: None,
            cluster: true,
            subject_lost: p.is_some_and(|p| p.subject_lost),
        };
        (name, written)
    };
    source.all(CLUSTER_POLICY, "").into_iter().map(written).collect()
}

fn pools(objects: &Objects, source: &dyn Source) -> BTreeMap<String, Basin> {
    let basin = |(name, record): (String, Record)| {
        let p = objects.pools.get(&name);
        let (pairs, pod_network) = match p.map(|p| &p.source) {
            Some(AddressSource::Static { pairs, .. }) => (pairs.clone(), false),
            Some(AddressSource::PodNetwork) => (Vec::new(), true),
            None => (Vec::new(), false),
        };
        (name, Basin { record, in_force: p.is_some(), pairs, pod_network })
    };
    source.all(POOL, "").into_iter().map(basin).collect()
}

fn is_all(s: &Selector) -> bool {
    s.labels.is_empty() && s.expressions.is_empty()
}

/// Which content this is: by generation where there is one, else by what it says.
fn edition(record: &Record, content: Option<&impl std::fmt::Debug>) -> u64 {
    let mut h = Hashed(std::hash::DefaultHasher::new());
    match record.generation {
        Some(generation) => (&record.uid, generation).hash(&mut h.0),
        // Writing to a hasher cannot fail.
        None => drop(write!(h, "{content:?}")),
    }
    h.0.finish()
}

struct Hashed(std::hash::DefaultHasher);

impl std::fmt::Write for Hashed {
    fn write_str(&mut self, s: &str) -> std::fmt::Result {
        self.0.write(s.as_bytes());
        Ok(())
    }
}

fn exempt(settings: &Settings, name: &str) -> bool {
    settings.exempt_namespaces.iter().any(|e| e == name)
}

/// What a namespace has; nothing if nobody names it any more.
fn place(objects: &Objects, source: &dyn Source, name: &str) -> Option<Place> {
    let mut out = Place { exempt: exempt(&objects.settings, name), ..Place::default() };
    for (policy, record) in source.all(POLICY, name) {
        let p = objects.policies.get(&(name.to_owned(), policy.clone()));
        let written = Written {
            edition: edition(&record, p),
            record,
            in_force: p.is_some(),
            staged: p.is_some_and(|p| p.mode == PolicyMode::Staged),
            everywhere: p.is_some_and(|p| is_all(&p.pod_selector)),
            pool: p.and_then(|p| p.pool.clone()),
            cluster: false,
            subject_lost: false,
        };
        out.policies.insert(policy, written);
    }
    let pods = objects.pods.range((name.to_owned(), String::new())..).take_while(|((ns, _), _)| ns == name);
    for ((_, pod), p) in pods {
        if !p.host_network {
            out.has_pods |= !p.addresses.is_empty();
            continue;
        }
        out.host_network.0 += 1;
        if out.host_network.1.len() < MAX_NAMED {
            out.host_network.1.push(pod.clone());
        }
    }
    let assigned = objects.assigned.range((name.to_owned(), String::new())..).take_while(|((ns, _), _)| ns == name);
    out.assigned = assigned.map(|((_, pool), pair)| (pool.clone(), *pair)).collect();
    let ns = objects.namespaces.get(name);
    if ns.is_none() && out.policies.is_empty() && !out.has_pods && out.host_network.0 == 0 {
        return None;
    }
    if let Some(record) = source.record(NAMESPACE, "", name) {
        out.record = record;
    }
    let labels = ns.map(|ns| &ns.labels);
    let none = BTreeMap::new();
    let takes = |p: &ClusterPolicy| {
        let labels = labels.unwrap_or(&none);
        p.mode == PolicyMode::Enforce && !p.subject_lost && p.namespaces.matches(labels) && !out.exempt
    };
    out.cluster =
        objects.cluster_policies.iter().filter(|(_, p)| takes(p)).map(|(n, _)| Arc::from(n.as_str())).collect();
    if let Some(ns) = ns {
        // Annotations have no generation.
        out.edition = edition(&Record::default(), Some(ns));
        out.annotations = Namespace {
            uid: ns.uid.clone(),
            labels: BTreeMap::new(),
            managed: ns.managed,
            audit: ns.audit,
            audit_until: ns.audit_until,
            pool: ns.pool.clone(),
            allow: Vec::new(),
            has_allow: ns.has_allow,
        };
    }
    Some(out)
}

impl Place {
    /// Whether its annotations ask for audit now.
    pub fn audited(&self, now: UnixSeconds) -> bool {
        self.annotations.audit && self.annotations.audit_until.is_none_or(|end| now < end)
    }
}
