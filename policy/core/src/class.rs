//! Classes: the sets of rules that addresses match.
//!
//! The signature of a name is the sorted set of rules that match it. The class of
//! an address is the set of signatures of the names bound to it, with the
//! set of rules whose prefixes hold it. Rules stand in a class by their stable keys, so
//! that a class means the same on every replica and after every edit that keeps its rules.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use crate::eval::Hits;
use crate::key::KeyHasher;
use crate::layer::{Ids, Layer, Says};
use crate::model::{AddressSource, DnsFilter, Fqdn, Pair};
use crate::pattern::Pattern;
use crate::{ClassKey, Name, ScopeKey};

/// Sorted stable keys of rules.
pub(crate) type Signature = Box<[u128]>;

/// What a class is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ClassDef {
    /// Signatures of the names, sorted, without repeats.
    pub names: Vec<Signature>,
    /// Rules by prefix.
    pub cidrs: Signature,
}

impl ClassDef {
    fn key(&self) -> ClassKey {
        let mut h = KeyHasher::new("class");
        for s in self.names.iter().chain([&self.cidrs]) {
            let mut one = KeyHasher::new("signature");
            for k in s {
                one = one.field(&k.to_be_bytes());
            }
            h = h.field(&one.finish().to_be_bytes());
        }
        ClassKey(h.finish())
    }
}

/// All classes that were ever asked for and not dropped since; outlives a compile.
#[derive(Debug, Default)]
pub(crate) struct Registry(RwLock<HashMap<ClassKey, Arc<ClassDef>, ahash::RandomState>>);

impl Registry {
    pub fn get(&self, key: ClassKey) -> Option<Arc<ClassDef>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&key).cloned()
    }

    fn add(&self, def: ClassDef) -> ClassKey {
        let key = def.key();
        if self.get(key).is_none() {
            self.0.write().unwrap_or_else(PoisonError::into_inner).insert(key, Arc::new(def));
        }
        key
    }

    pub fn len(&self) -> usize {
        self.0.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub fn retain(&self, live: &BTreeSet<ClassKey>) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).retain(|k, _| live.contains(k));
    }
}

/// A scope: one namespace with one pool. Immutable but for the classes that it registers.
#[derive(Debug)]
pub struct Scope {
    pub(crate) key: ScopeKey,
    pub(crate) namespace: Arc<str>,
    pub(crate) uid: Arc<str>,
    pub(crate) pool: Arc<str>,
    pub(crate) source: AddressSource,
    pub(crate) pair: Option<Pair>,
    pub(crate) own: Arc<Layer>,
    pub(crate) cluster: Arc<Layer>,
    /// Cluster policies whose namespace selector takes this namespace, as dense ids, sorted.
    pub(crate) relevant: Vec<u32>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) dns_filter: DnsFilter,
    /// What [`Scope::single_rule_classes`] found; later scopes with the same rules have it too.
    pub(crate) ahead: Arc<OnceLock<BTreeMap<ClassKey, Arc<ClassDef>>>>,
}

impl Scope {
    /// Its identity.
    pub fn key(&self) -> ScopeKey {
        self.key
    }

    /// The namespace's name.
    pub fn namespace(&self) -> &Arc<str> {
        &self.namespace
    }

    /// The namespace's UID.
    pub fn uid(&self) -> &Arc<str> {
        &self.uid
    }

    /// The pool's name.
    pub fn pool(&self) -> &Arc<str> {
        &self.pool
    }

    /// Where the pool's traffic leaves.
    pub fn source(&self) -> &AddressSource {
        &self.source
    }

    /// The pair that this scope leaves by: the one that it was given before, or the highest rendezvous score of those
    /// that are not draining. `None` for PodNetwork, and where every pair drains (then there is no way out).
    pub fn pair(&self) -> Option<Pair> {
        self.pair
    }

    /// Where it leaves from now on if its pair drains: of the pairs that do not, lack no family that it has now, and `may` take
    /// it, the one with the highest score.
    pub fn elsewhere(&self, may: impl Fn(&Pair) -> bool) -> Option<Pair> {
        let (AddressSource::Static { pairs, .. }, Some(now)) = (&self.source, self.pair) else { return None };
        let lacks = |p: &Pair| now.ipv4.is_some() && p.ipv4.is_none() || now.ipv6.is_some() && p.ipv6.is_none();
        let able = pairs.iter().filter(|p| now.draining && !p.draining && !lacks(p) && may(p));
        able.max_by_key(|p| score(self.key, p)).copied()
    }

    /// Whether the pool has a way out for IPv4 and for IPv6. PodNetwork is taken to have both.
    pub fn families(&self) -> (bool, bool) {
        match (&self.source, self.pair) {
            (AddressSource::PodNetwork, _) => (true, true),
            (_, Some(p)) => (p.ipv4.is_some(), p.ipv6.is_some()),
            (_, None) => (false, false),
        }
    }

    pub(crate) fn is_relevant(&self, rule: u32) -> bool {
        self.cluster.policies.get(self.policy_of(rule)).is_some_and(|p| p.rules.contains(&rule))
            && self.relevant.binary_search(&(self.policy_of(rule) as u32)).is_ok()
    }

    fn policy_of(&self, rule: u32) -> usize {
        self.cluster.policies.partition_point(|p| p.rules.end <= rule)
    }

    /// The rules that match a canonical name, and whether one of them names it exactly.
    /// What is no [`Name`] (an escaped octet, the root) is matched by nothing.
    pub(crate) fn name_hits(&self, name: &str) -> (Hits, bool) {
        if name.is_empty() || name == "." || name.bytes().any(|b| b == b'\\') {
            return (Hits::default(), false);
        }
        let (own, a) = self.own.names(name, |_| true);
        let (cluster, b) = self.cluster.names(name, |r| self.is_relevant(r));
        (Hits { own, cluster, wide: Ids::new() }, a || b)
    }

    /// The rules by prefix, whoever they are for.
    fn cidr_hits(&self, ip: IpAddr) -> Hits {
        Hits {
            own: self.own.cidrs.rules(ip, |_| true),
            cluster: self.cluster.cidrs.rules(ip, |r| self.is_relevant(r)),
            wide: Ids::new(),
        }
    }

    fn signature(&self, hits: &Hits) -> Signature {
        let own = hits.own.iter().map(|id| self.own.rule(*id).key);
        let mut keys: Vec<u128> = own.chain(hits.cluster.iter().map(|id| self.cluster.rule(*id).key)).collect();
        keys.sort_unstable();
        keys.into()
    }

    pub(crate) fn hits_of(&self, signature: &[u128]) -> Hits {
        Hits { own: self.own.ids(signature), cluster: self.cluster.ids(signature), wide: Ids::new() }
    }

    /// The class of an address with the names that are bound to it now. The same
    /// for the same rules on every replica; registered, so that every later world can say what it grants.
    pub fn class<'n>(&self, ip: IpAddr, names: impl IntoIterator<Item = &'n Name>) -> ClassKey {
        let mut sigs: Vec<Signature> =
            names.into_iter().map(|n| self.signature(&self.name_hits(n.as_str()).0)).collect();
        sigs.sort_unstable();
        sigs.dedup();
        let cidrs = self.signature(&self.cidr_hits(ip));
        self.registry.add(ClassDef { names: sigs, cidrs })
    }

    /// The classes of single names as the rules suggest them, for addresses that no prefix rule
    /// holds: pushed ahead, so that facts learnt by a stand-in find their grants.
    pub fn single_rule_classes(&self) -> impl Iterator<Item = ClassKey> + '_ {
        self.ahead.get_or_init(|| self.find_ahead()).keys().copied()
    }

    /// Finds the classes that are pushed ahead, so that whoever asks for them later need not.
    pub fn prepare(&self) {
        self.ahead.get_or_init(|| self.find_ahead());
    }

    /// Whether a class is one of [`Scope::single_rule_classes`].
    pub fn is_ahead(&self, class: ClassKey) -> bool {
        self.ahead.get_or_init(|| self.find_ahead()).contains_key(&class)
    }

    /// What a class is made of, if somebody has registered it or it is pushed ahead.
    pub(crate) fn definition(&self, class: ClassKey) -> Option<Arc<ClassDef>> {
        self.ahead.get().and_then(|a| a.get(&class)).cloned().or_else(|| self.registry.get(class))
    }

    fn find_ahead(&self) -> BTreeMap<ClassKey, Arc<ClassDef>> {
        let own = self.own.rules.iter().filter(|r| matches!(r.says, Says::Allow | Says::Deny));
        let cluster = (0..self.cluster.rules.len() as u32)
            .filter(|id| self.is_relevant(*id))
            .map(|id| self.cluster.rule(id))
            .filter(|r| matches!(r.says, Says::Accept | Says::Deny | Says::Pass));
        let mut signatures = HashSet::new();
        for f in own.chain(cluster).flat_map(|r| &r.fqdns) {
            let pattern = match f {
                Fqdn::Name(n) => Pattern::from(n),
                Fqdn::Pattern(p) => p.clone(),
            };
            let Some(name) = pattern.sample() else { continue };
            signatures.insert(self.signature(&self.name_hits(name.as_str()).0));
        }
        let def = |s| Arc::new(ClassDef { names: vec![s], cidrs: Box::default() });
        signatures.into_iter().map(def).map(|d| (d.key(), d)).collect()
    }

    /// Whether both are the same to pods and leave by the same way.
    pub fn same_way(&self, other: &Scope) -> bool {
        self.namespace == other.namespace
            && self.pool == other.pool
            && self.source == other.source
            && self.pair == other.pair
    }

    /// Whether both give every address the same class: if not, learnt facts have to be reclassified.
    pub fn same_classes(&self, other: &Scope) -> bool {
        Arc::ptr_eq(&self.own, &other.own)
            && Arc::ptr_eq(&self.cluster, &other.cluster)
            && self.relevant == other.relevant
    }
}

/// The score of a pair for a scope (rendezvous hashing): the highest wins.
pub(crate) fn score(scope: ScopeKey, pair: &Pair) -> u128 {
    KeyHasher::new("pair")
        .field(&scope.0.to_be_bytes())
        .field(&pair.ipv4.map(|a| a.octets()).unwrap_or_default())
        .field(&pair.ipv6.map(|a| a.octets()).unwrap_or_default())
        .finish()
}
