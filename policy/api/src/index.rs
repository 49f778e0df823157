//! The objects of an API server, kept up by its events. Pure: no API server is needed to use it.
//!
//! Events of one feed come in order, those of different feeds do not wait for each other. Every object is read by
//! itself: one that is bad is quarantined with its problem, its last good version stays, and the others go on. What
//! holds is always one value, [`Index::objects`], which is changed in place; what of it changed is collected until it is
//! asked for, so that a flood of events is one compile. Two indexes that were given the same objects in any order are
//! equal.

mod cluster;
mod json;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use serde_json::Value;
use tidegate_policy::Name;
use tidegate_policy::model::{self, Objects, Pair, Settings, Touched};

use self::cluster::Cluster;
use crate::convert::{self, Ctx};
use crate::manifest::{self, Object};
use crate::problem::{Code, FieldPath, FieldProblem, Severity};
use crate::resource::{API_VERSION, GROUP, LabelSelector};

/// The name of the one `NamespaceEgress` of a namespace.
pub const NAMESPACE_EGRESS: &str = "tidegate";

/// A list of objects that is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Feed {
    /// Every namespace.
    Namespaces,
    /// Every pod.
    Pods,
    /// Every node.
    Nodes,
    /// `networking.k8s.io/v1` ServiceCIDRs: where Services have their addresses.
    ServiceCidrs,
    /// The EndpointSlices of `default/kubernetes`: the API servers.
    ApiEndpoints,
    /// The Service of the cluster's DNS.
    DnsService,
    /// Its EndpointSlices.
    DnsEndpoints,
    /// Services of the type ExternalName.
    ExternalNames,
    /// Pools.
    EgressPools,
    /// Cluster policies.
    ClusterEgressPolicies,
    /// Namespaced policies.
    EgressPolicies,
    /// What Tidegate has assigned to namespaces.
    NamespaceEgresses,
}

impl Feed {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Namespaces,
        Self::Pods,
        Self::Nodes,
        Self::ServiceCidrs,
        Self::ApiEndpoints,
        Self::DnsService,
        Self::DnsEndpoints,
        Self::ExternalNames,
        Self::EgressPools,
        Self::ClusterEgressPolicies,
        Self::EgressPolicies,
        Self::NamespaceEgresses,
    ];

    /// The API version and kind of its objects. Items of a list do not say them.
    pub const fn kind(self) -> (&'static str, &'static str) {
        match self {
            Self::Namespaces => ("v1", "Namespace"),
            Self::Pods => ("v1", "Pod"),
            Self::Nodes => ("v1", "Node"),
            Self::ServiceCidrs => ("networking.k8s.io/v1", "ServiceCIDR"),
            Self::ApiEndpoints | Self::DnsEndpoints => ("discovery.k8s.io/v1", "EndpointSlice"),
            Self::DnsService | Self::ExternalNames => ("v1", "Service"),
            Self::EgressPools => (API_VERSION, "EgressPool"),
            Self::ClusterEgressPolicies => (API_VERSION, "ClusterEgressPolicy"),
            Self::EgressPolicies => (API_VERSION, "EgressPolicy"),
            Self::NamespaceEgresses => (API_VERSION, "NamespaceEgress"),
        }
    }

    /// Its name in lower case, for logs, metrics and other gateways.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Namespaces => "namespaces",
            Self::Pods => "pods",
            Self::Nodes => "nodes",
            Self::ServiceCidrs => "servicecidrs",
            Self::ApiEndpoints => "apiendpoints",
            Self::DnsService => "dnsservice",
            Self::DnsEndpoints => "dnsendpoints",
            Self::ExternalNames => "externalnames",
            Self::EgressPools => "egresspools",
            Self::ClusterEgressPolicies => "clusteregresspolicies",
            Self::EgressPolicies => "egresspolicies",
            Self::NamespaceEgresses => "namespaceegresses",
        }
    }

    /// Whether its objects are Tidegate's own: those are read strictly.
    pub fn is_ours(self) -> bool {
        self.kind().0.split_once('/').is_some_and(|(group, _)| group == GROUP)
    }
}

/// An object's namespace, empty for cluster-scoped kinds, and name.
pub type Key = (String, String);

/// Targets of ExternalName Services by the Service's (namespace, name).
pub type ExternalNames = BTreeMap<Key, Name>;

/// What is known of an object beside what it says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Its UID.
    pub uid: String,
    /// Its generation, of kinds that count them; else 0.
    pub generation: i64,
    /// The resourceVersion that was seen last.
    pub resource_version: String,
    /// Whether that version is the one that holds.
    pub good: bool,
    /// Whether some version of it holds: when it is not good, the last good one. Of a namespaced policy of which no good
    /// version is known only that it isolates.
    pub held: bool,
    /// What is wrong with it, or noteworthy.
    pub problems: Vec<FieldProblem>,
}

/// Everything that holds. See the module.
#[derive(Debug)]
pub struct Index {
    /// What the configuration says.
    base: Settings,
    objects: Objects,
    records: BTreeMap<Feed, BTreeMap<Key, Record>>,
    cluster: Cluster,
    external: Arc<ExternalNames>,
    /// The pairs that each namespace was assigned.
    assigned: BTreeMap<String, Vec<(String, Pair)>>,
    /// Namespaces that are being deleted.
    ending: BTreeSet<String>,
    /// Policies that were deleted with their namespace. They hold as long as its pods may still run: until it is gone.
    orphans: BTreeSet<Key>,
    touched: Touched,
    /// Counts the changes of what [`Index::records`] says, resourceVersions aside.
    noted: u64,
    /// Where those changes were.
    noted_in: Touched,
}

impl Index {
    /// An index without objects. `settings` are what the configuration says; what the API server says is added.
    pub fn new(settings: Settings) -> Self {
        let objects = Objects { settings: settings.clone(), ..Objects::default() };
        Self {
            base: settings,
            objects,
            records: BTreeMap::new(),
            cluster: Cluster::default(),
            external: Arc::default(),
            assigned: BTreeMap::new(),
            ending: BTreeSet::new(),
            orphans: BTreeSet::new(),
            touched: Touched::default(),
            noted: 0,
            noted_in: Touched::default(),
        }
    }

    /// All objects that hold now.
    pub fn objects(&self) -> &Objects {
        &self.objects
    }

    /// What changed since this was last asked for.
    pub fn take_touched(&mut self) -> Touched {
        std::mem::take(&mut self.touched)
    }

    /// Whether something changed since [`Index::take_touched`].
    pub fn is_touched(&self) -> bool {
        self.touched != Touched::default()
    }

    /// A number that changes when a record does in more than its resourceVersion.
    pub fn noted(&self) -> u64 {
        self.noted
    }

    /// Where records of policies, pools and namespaces changed, resourceVersions aside, since this was last asked for.
    pub fn take_noted(&mut self) -> Touched {
        std::mem::take(&mut self.noted_in)
    }

    fn note(&mut self, feed: Feed, key: &Key) {
        self.noted += 1;
        match feed {
            Feed::Namespaces => drop(self.noted_in.namespaces.insert(key.1.clone())),
            Feed::EgressPolicies => drop(self.noted_in.namespaces.insert(key.0.clone())),
            Feed::EgressPools | Feed::ClusterEgressPolicies => self.noted_in.all = true,
            _ => {}
        }
    }

    /// The objects of a feed in a namespace, by name.
    pub fn records_in<'a>(&'a self, feed: Feed, namespace: &'a str) -> impl Iterator<Item = (&'a str, &'a Record)> {
        let from = (namespace.to_owned(), String::new());
        let all = self.records.get(&feed).into_iter().flat_map(move |r| r.range(from.clone()..));
        all.take_while(move |((ns, _), _)| ns == namespace).map(|((_, name), r)| (name.as_str(), r))
    }

    /// Every object of a feed.
    pub fn records(&self, feed: Feed) -> impl Iterator<Item = (&Key, &Record)> {
        self.records.get(&feed).into_iter().flatten()
    }

    /// One object of a feed.
    pub fn record(&self, feed: Feed, namespace: &str, name: &str) -> Option<&Record> {
        self.records.get(&feed)?.get(&(namespace.to_owned(), name.to_owned()))
    }

    /// Where the cluster's DNS is asked, the best first: what the configuration says, the endpoints that are ready,
    /// else the addresses of its Service.
    pub fn dns_servers(&self) -> Vec<SocketAddr> {
        self.cluster.servers(&self.base.cluster_dns)
    }

    /// Where ExternalName Services lead to. The same value as long as nothing changed.
    pub fn external_names(&self) -> &Arc<ExternalNames> {
        &self.external
    }

    /// Takes an object as it is now, new or changed.
    pub fn apply(&mut self, feed: Feed, object: &Value) {
        let Some(key) = key(object) else { return };
        let meta = &object["metadata"];
        let text = |field: &str| meta[field].as_str().unwrap_or_default().to_owned();
        let (uid, version) = (text("uid"), text("resourceVersion"));
        let generation = meta["generation"].as_i64().unwrap_or_default();
        let before = self.records.get(&feed).and_then(|r| r.get(&key));
        if before.is_some_and(|r| r.uid != uid) {
            // Another object of the same name: nothing of the old one stays.
            self.remove(feed, &key);
        }
        let (read, problems) = match read(feed, object) {
            Ok((value, problems)) => (Some(value), problems),
            Err(problems) => (None, problems),
        };
        let good = read.is_some();
        match feed {
            Feed::Namespaces if meta["deletionTimestamp"].is_string() => drop(self.ending.insert(key.1.clone())),
            Feed::EgressPolicies => drop(self.orphans.remove(&key)),
            _ => {}
        }
        let held = good || self.record(feed, &key.0, &key.1).is_some_and(|r| r.held);
        if let Some(value) = read {
            self.hold(feed, &key, Some(value));
        } else if feed == Feed::EgressPolicies && !held {
            self.hold(feed, &key, closed(object).map(|p| Read::Object(Object::Policy(p))));
        }
        let records = self.records.entry(feed).or_default();
        let record = Record { uid, generation, resource_version: version, good, held, problems };
        match records.get_mut(&key) {
            Some(old) => {
                old.resource_version.clone_from(&record.resource_version);
                if *old != record {
                    *old = record;
                    self.note(feed, &key);
                }
            }
            None => {
                records.insert(key.clone(), record);
                self.note(feed, &key);
            }
        }
    }

    /// An object is gone.
    pub fn delete(&mut self, feed: Feed, object: &Value) {
        if let Some(key) = key(object) {
            self.remove(feed, &key);
        }
    }

    /// A list of the feed has come in whole, and these were in it: all others are gone.
    pub fn restarted(&mut self, feed: Feed, seen: &BTreeSet<Key>) {
        let gone: Vec<Key> = self.records(feed).map(|(k, _)| k).filter(|k| !seen.contains(*k)).cloned().collect();
        for key in gone {
            self.remove(feed, &key);
        }
    }

    fn remove(&mut self, feed: Feed, key: &Key) {
        if self.records.get_mut(&feed).is_some_and(|r| r.remove(key).is_some()) {
            self.note(feed, key);
            if feed == Feed::EgressPolicies && self.ending.contains(&key.0) {
                // Not somebody's wish, and pods take their time to end: without it they would be open until then.
                self.orphans.insert(key.clone());
                return;
            }
            self.hold(feed, key, None);
            if feed == Feed::Namespaces && self.ending.remove(&key.1) {
                for orphan in self.orphans.extract_if(.., |o| o.0 == key.1).collect::<Vec<_>>() {
                    self.hold(Feed::EgressPolicies, &orphan, None);
                }
            }
        }
    }

    /// Puts a value in place, or takes it away, and touches what that changes.
    fn hold(&mut self, feed: Feed, key: &Key, value: Option<Read>) {
        let o = &mut self.objects;
        let name = &key.1;
        let changed = match value {
            Some(Read::Object(Object::Namespace(v))) => set(&mut o.namespaces, name, v),
            Some(Read::Object(Object::Pod(v))) => set(&mut o.pods, key, v),
            Some(Read::Object(Object::Node(v))) => set(&mut o.nodes, name, v),
            Some(Read::Object(Object::Pool(v))) => set(&mut o.pools, name, v),
            Some(Read::Object(Object::ClusterPolicy(v))) => set(&mut o.cluster_policies, name, v),
            Some(Read::Object(Object::Policy(v))) => set(&mut o.policies, key, v),
            Some(Read::Cluster(part)) => self.cluster.set(feed, key, Some(part)),
            Some(Read::External(target)) => self.external_name(key, target),
            Some(Read::Assigned(pairs)) => *name == NAMESPACE_EGRESS && self.assign(&key.0, pairs),
            None => match feed {
                Feed::Namespaces => o.namespaces.remove(name).is_some(),
                Feed::Pods => o.pods.remove(key).is_some(),
                Feed::Nodes => o.nodes.remove(name).is_some(),
                Feed::EgressPools => o.pools.remove(name).is_some(),
                Feed::ClusterEgressPolicies => o.cluster_policies.remove(name).is_some(),
                Feed::EgressPolicies => o.policies.remove(key).is_some(),
                Feed::ExternalNames => self.external_name(key, None),
                Feed::NamespaceEgresses if *name == NAMESPACE_EGRESS => self.assign(&key.0, Vec::new()),
                Feed::NamespaceEgresses => false,
                Feed::ServiceCidrs | Feed::ApiEndpoints | Feed::DnsService | Feed::DnsEndpoints => {
                    self.cluster.set(feed, key, None)
                }
            },
        };
        if !changed {
            return;
        }
        let t = &mut self.touched;
        match feed {
            Feed::Namespaces => drop(t.namespaces.insert(name.clone())),
            Feed::Pods => drop(t.pods.insert(key.clone())),
            Feed::EgressPolicies | Feed::NamespaceEgresses => drop(t.namespaces.insert(key.0.clone())),
            Feed::Nodes | Feed::EgressPools | Feed::ClusterEgressPolicies => t.all = true,
            Feed::ServiceCidrs | Feed::ApiEndpoints | Feed::DnsService | Feed::DnsEndpoints => self.settle(),
            // No rule depends on them: the DNS service asks for them.
            Feed::ExternalNames => {}
        }
    }

    /// Brings the settings to what the cluster says.
    fn settle(&mut self) {
        let settings = self.cluster.settings(&self.base);
        if self.objects.settings != settings {
            self.objects.settings = settings;
            self.touched.all = true;
        }
    }

    fn external_name(&mut self, key: &Key, target: Option<Name>) -> bool {
        if self.external.get(key) == target.as_ref() {
            return false;
        }
        let names = Arc::make_mut(&mut self.external);
        match target {
            Some(target) => drop(names.insert(key.clone(), target)),
            None => drop(names.remove(key)),
        }
        true
    }

    fn assign(&mut self, namespace: &str, pairs: Vec<(String, Pair)>) -> bool {
        let old = self.assigned.get(namespace);
        if old.map_or(pairs.is_empty(), |old| *old == pairs) {
            return false;
        }
        for (pool, _) in old.into_iter().flatten() {
            self.objects.assigned.remove(&(namespace.to_owned(), pool.clone()));
        }
        for (pool, pair) in &pairs {
            self.objects.assigned.insert((namespace.to_owned(), pool.clone()), *pair);
        }
        self.assigned.insert(namespace.to_owned(), pairs);
        self.assigned.retain(|_, pairs| !pairs.is_empty());
        true
    }
}

/// What an object came to.
enum Read {
    Object(Object),
    Cluster(cluster::Part),
    External(Option<Name>),
    Assigned(Vec<(String, Pair)>),
}

/// What holds of a policy that cannot be read, and of which no good version is known, as after a restart: it isolates the
/// pods that it selects or, where not even that can be read, all of its namespace. Without it they would be open.
fn closed(object: &Value) -> Option<model::Policy> {
    let spec = &object["spec"];
    let selector = serde_json::from_value::<LabelSelector>(spec["podSelector"].clone()).ok().and_then(|s| {
        let mut ctx = Ctx::default();
        let selector = convert::selector(&mut ctx, &s);
        ctx.finish(Some(selector)).value
    });
    (spec["mode"] != "Staged").then(|| model::Policy {
        created: model::UnixSeconds(0),
        pod_selector: selector.unwrap_or_default(),
        mode: model::PolicyMode::Enforce,
        pool: None,
        on_revoke: model::OnRevoke::Reset,
        egress: Vec::new(),
        deny: Vec::new(),
    })
}

/// Reads an object; what was found besides, or why it is bad.
fn read(feed: Feed, object: &Value) -> Result<(Read, Vec<FieldProblem>), Vec<FieldProblem>> {
    let bad = |message: String| {
        vec![FieldProblem { severity: Severity::Error, code: Code::Invalid, path: FieldPath::default(), message }]
    };
    let whole = |read| Ok((read, Vec::new()));
    match feed {
        Feed::ServiceCidrs | Feed::ApiEndpoints | Feed::DnsService | Feed::DnsEndpoints => {
            cluster::read(feed, object).map_err(bad).and_then(|part| whole(Read::Cluster(part)))
        }
        Feed::ExternalNames => cluster::external(object).map_err(bad).and_then(|name| whole(Read::External(name))),
        Feed::NamespaceEgresses => cluster::assigned(object).map_err(bad).and_then(|p| whole(Read::Assigned(p))),
        _ => {
            let item = manifest::one(&json::tree(feed, object));
            let problem = |f: manifest::Found| FieldProblem {
                severity: f.severity,
                code: f.code,
                path: f.path,
                message: f.message,
            };
            let problems = item.found.into_iter().map(problem).collect();
            match item.object {
                Some(object) => Ok((Read::Object(object), problems)),
                None => Err(problems),
            }
        }
    }
}

fn key(object: &Value) -> Option<Key> {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    let key = (text("namespace"), text("name"));
    (!key.1.is_empty()).then_some(key)
}

/// Sets an entry; says whether that changed anything.
fn set<K: Ord + Clone, V: PartialEq>(map: &mut BTreeMap<K, V>, key: &K, value: V) -> bool {
    let changed = map.get(key) != Some(&value);
    if changed {
        map.insert(key.clone(), value);
    }
    changed
}
