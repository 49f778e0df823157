//! The status of `NamespaceEgress/tidegate`: what Tidegate does with a namespace.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use jiff::Timestamp;
use tidegate_api::resource::{
    Cause, Denial, HostNetworkPods, Isolation, NamespaceEgressStatus, NamespaceMode, ScopePair, Verdict,
};
use tidegate_policy::denied::Denied;
use tidegate_policy::model::{self, ClusterDefault, UnixSeconds};
use tidegate_policy::world::{Group, Issue, Scope, World};
use tidegate_policy::{Name, ScopeKey};
use tidegate_proto::Pair;

use super::condition::{condition, conflicted, cut, refused, refused_items};
use super::denials::{Entry, Table};
use super::rollout::{Count, Population, reference};
use super::suggest::{cause, for_pod};
use super::survey::{CLUSTER_POLICY, POLICY, Place, Survey};
use crate::core::NodeStatus;
use crate::desired::Desired;

/// The most causes, egress pairs and denials of a status, by the API.
const MAX_CAUSES: usize = 32;
const MAX_PAIRS: usize = 64;
const MAX_DENIALS: usize = 10;

/// What a report of a namespace is made of.
pub struct Subject<'a> {
    /// Its name.
    pub name: &'a str,
    /// What is written about it.
    pub place: &'a Place,
    /// The whole survey.
    pub survey: &'a Survey,
    /// The policy.
    pub world: &'a World,
    /// What its pods are.
    pub population: Option<&'a Population>,
    /// Issues of its annotations, and of its pods.
    pub issues: Vec<Issue>,
    /// Its scopes, each with its pool.
    pub scopes: &'a [ScopeKey],
    /// The nodes.
    pub nodes: &'a BTreeMap<String, NodeStatus>,
    /// Which gateway holds a pair.
    pub owner: &'a dyn Fn(&Pair) -> Option<&'a str>,
    /// Denials of all namespaces.
    pub denials: &'a Table,
    /// The names that a scope was told for an address.
    pub names: &'a dyn Fn(ScopeKey, std::net::IpAddr) -> Vec<Name>,
    /// Now, by the wall clock.
    pub now: UnixSeconds,
}

impl Subject<'_> {
    fn groups(&self) -> impl Iterator<Item = &Group> {
        let keys = self.population.into_iter().flat_map(|p| &p.groups);
        keys.filter_map(|k| self.world.group_by_key(*k)).map(|g| &**g)
    }

    /// How far its pods are under Tidegate; of a namespace without pods, how far those would be that come.
    pub fn isolation(&self) -> Isolation {
        let (place, survey) = (self.place, self.survey);
        if place.exempt {
            return Isolation::Untouched;
        }
        let mut own = place.policies.values().filter(|p| p.in_force && !p.staged).peekable();
        let everything = place.annotations.managed
            || place.annotations.has_allow
            || survey.default == ClusterDefault::Isolated
            || (survey.default == ClusterDefault::Audit && place.cluster.is_empty());
        match self.population.map(|p| p.touches) {
            Some([0, 0, isolated]) if isolated > 0 => Isolation::Isolated,
            Some([_, _, isolated]) if isolated > 0 => Isolation::Partial,
            Some([_, guarded, _]) if guarded > 0 => Isolation::Guarded,
            Some([untouched, ..]) if untouched > 0 => {
                // Policies that select none of its pods yet.
                if own.peek().is_some() { Isolation::Partial } else { Isolation::Untouched }
            }
            _ if everything || own.clone().any(|p| p.everywhere) => Isolation::Isolated,
            _ if own.peek().is_some() => Isolation::Partial,
            _ if !place.cluster.is_empty() => Isolation::Guarded,
            _ => Isolation::Untouched,
        }
    }

    fn because(&self) -> Vec<Cause> {
        let mut all: BTreeSet<(&str, String)> = BTreeSet::new();
        let place = self.place;
        if place.annotations.managed {
            all.insert(("Annotation", "tidegate.dev/managed".to_owned()));
        }
        if place.annotations.has_allow {
            all.insert(("Annotation", "tidegate.dev/allow".to_owned()));
        }
        all.extend(self.groups().flat_map(Group::policies).map(cause));
        let own = place.policies.iter().filter(|(_, p)| p.in_force && !p.staged);
        all.extend(own.filter(|(_, p)| p.everywhere || !place.has_pods).map(|(n, _)| (POLICY, n.clone())));
        if !place.has_pods {
            all.extend(place.cluster.iter().map(|n| (CLUSTER_POLICY, n.to_string())));
        }
        match self.survey.default {
            ClusterDefault::Untouched => {}
            ClusterDefault::Audit => drop(all.insert(("ClusterDefault", "Audit".to_owned()))),
            ClusterDefault::Isolated => drop(all.insert(("ClusterDefault", "Isolated".to_owned()))),
        }
        let cause = |(kind, name): (&str, String)| Cause { kind: kind.to_owned(), name };
        all.into_iter().take(MAX_CAUSES).map(cause).collect()
    }

    fn mode(&self, isolation: Isolation) -> NamespaceMode {
        let own = self.place.annotations.managed || self.place.annotations.has_allow || !self.place.policies.is_empty();
        let audited = match self.groups().next() {
            Some(_) => self.groups().all(Group::audit),
            None => {
                self.place.audited(self.now)
                    || (self.survey.default == ClusterDefault::Audit && isolation == Isolation::Isolated && !own)
            }
        };
        if audited { NamespaceMode::Audit } else { NamespaceMode::Enforce }
    }

    /// The pairs of its scopes. One that was given once stays while the pool has it and something still asks for the pool. A scope
    /// whose pair drains leaves it for another one of the same gateway: what its packets reach must know the flows that live.
    fn egress(&self) -> Vec<ScopePair> {
        let mut out: BTreeMap<&str, ScopePair> = BTreeMap::new();
        let pair = |pool: &str, ipv4: Option<std::net::Ipv4Addr>, ipv6: Option<std::net::Ipv6Addr>| ScopePair {
            pool: pool.to_owned(),
            ipv4: ipv4.map(|a| a.to_string()),
            ipv6: ipv6.map(|a| a.to_string()),
        };
        for key in self.scopes {
            let Some(scope) = self.world.scope(*key) else { continue };
            let pair_of = elsewhere(scope, self.owner).or(scope.pair());
            let (ipv4, ipv6) = pair_of.map_or((None, None), |p| (p.ipv4, p.ipv6));
            out.insert(scope.pool(), pair(scope.pool(), ipv4, ipv6));
        }
        let place = self.place;
        let asks = |pool: &str| {
            let mut policies = place.policies.values().filter_map(|p| p.pool.as_deref());
            pool == "default" || place.annotations.pool.as_deref() == Some(pool) || policies.any(|p| p == pool)
        };
        for (pool, old) in place.assigned.iter().filter(|(pool, _)| asks(pool)) {
            let has = |p: &&model::Pair| !p.draining && (p.ipv4, p.ipv6) == (old.ipv4, old.ipv6);
            let stays = self.survey.pools.get(pool).is_some_and(|b| b.pairs.iter().any(|p| has(&p)));
            if stays && !out.contains_key(pool.as_str()) {
                out.insert(pool, pair(pool, old.ipv4, old.ipv6));
            }
        }
        out.into_values().take(MAX_PAIRS).collect()
    }

    fn denial(&self, e: &Entry) -> Denial {
        let d = &e.denied;
        let pod = d.who.as_ref().map(|w| &*w.pod).unwrap_or_default();
        Denial {
            last_time: time(e.last),
            count: i64::try_from(d.count).unwrap_or(i64::MAX),
            pod: pod.to_owned(),
            to: to(d),
            name: d.name.as_deref().map(|n| cut(n.to_owned(), 1000)),
            address: d.address.map(|a| a.to_string()),
            protocol: d.protocol.map(protocol),
            port: d.port.map(i64::from),
            reason: d.reason.as_str().to_owned(),
            verdict: if d.audit { Verdict::Audited } else { Verdict::Denied },
            allow_with: for_pod(d, self.population, self.world, self.names).map(|t| cut(t, 2000)),
        }
    }

    /// What its status should say; nothing for a namespace that Tidegate leaves alone.
    pub fn status(&self) -> Option<NamespaceEgressStatus> {
        let isolation = self.isolation();
        let place = self.place;
        let mut refused_all = refused_items(&place.record.notes);
        refused_all.extend(refused(&self.issues));
        refused_all.truncate(MAX_CAUSES);
        if isolation == Isolation::Untouched && refused_all.is_empty() && place.record.error().is_none() {
            return None;
        }
        let accepted = match (refused_all.first(), place.record.error()) {
            (_, Some(e)) => condition("Accepted", false, None, e.code.as_str(), super::condition::said(e)),
            (Some(first), None) => {
                let more = match refused_all.len() {
                    1 => String::new(),
                    n => format!(" (and {} more, see refused)", n - 1),
                };
                let why = first.message.as_deref().unwrap_or(&first.reason);
                condition("Accepted", false, None, "PartlyRefused", format!("{}: {why}{more}", first.path))
            }
            (None, None) => {
                condition("Accepted", true, None, "Accepted", "every annotation of the namespace is valid".to_owned())
            }
        };
        let mut conditions = vec![accepted];
        if self.issues.iter().any(|i| i.kind == tidegate_policy::world::IssueKind::Conflicted) {
            conditions.push(conflicted(None, &self.issues));
        }
        let count = Count::of(self.population.map(|p| &p.nodes), self.nodes);
        conditions.push(match (count.desired, count.complete()) {
            (0, _) => {
                condition("Programmed", true, None, "NoPods", "no node has pods of it that policy concerns".to_owned())
            }
            (_, true) => condition("Programmed", true, None, "Programmed", count.to_string()),
            (_, false) => condition("Programmed", false, None, "NodesMissing", count.to_string()),
        });
        let mode = self.mode(isolation);
        let audit_until_time = (mode == NamespaceMode::Audit && place.audited(self.now))
            .then_some(place.annotations.audit_until)
            .flatten()
            .map(time);
        let (count, names) = place.host_network.clone();
        Some(NamespaceEgressStatus {
            conditions,
            isolation: Some(isolation),
            because: self.because(),
            mode: Some(mode),
            audit_until_time,
            egress: self.egress(),
            refused: refused_all,
            denials: self.denials.of(self.name).take(MAX_DENIALS).map(|e| self.denial(e)).collect(),
            host_network_pods: (count > 0).then_some(HostNetworkPods { count, names }),
        })
    }
}

/// The pair that a scope leaves with from now on, if its own one drains and the gateway that holds it has another one.
pub fn elsewhere<'a>(scope: &Scope, owner: &dyn Fn(&Pair) -> Option<&'a str>) -> Option<model::Pair> {
    let now = owner(&Desired::pair(scope)?)?;
    let named = |p: &model::Pair| Pair { pool: scope.pool().to_string(), ipv4: p.ipv4, ipv6: p.ipv6 };
    scope.elsewhere(|p| owner(&named(p)) == Some(now))
}

/// Where a pod wanted to go, in one word: `api.example.com`, `203.0.113.9:443`, `[2001:db8::1]:443`.
fn to(d: &Denied) -> String {
    let text = match (&d.name, d.address, d.port) {
        (Some(name), _, None) => name.to_string(),
        (Some(name), _, Some(port)) => format!("{name}:{port}"),
        (None, Some(ip), None) => ip.to_string(),
        (None, Some(ip), Some(port)) => SocketAddr::new(ip, port).to_string(),
        (None, None, _) => String::new(),
    };
    cut(text, 1000)
}

/// Issues of a namespace's annotations and of its pods. `issues` are sorted, as a world has them.
pub fn issues_of(issues: &[Issue], namespace: &str) -> Vec<Issue> {
    let annotations = super::of_policy(issues, &reference("Namespace", namespace, namespace));
    let pods = |i: &Issue| (i.policy.kind, &*i.policy.namespace).cmp(&("Pod", namespace));
    let start = issues.partition_point(|i| pods(i).is_lt());
    let end = start + issues[start..].partition_point(|i| pods(i).is_eq());
    annotations.iter().chain(&issues[start..end]).cloned().collect()
}

/// A time as the API has it.
pub fn time(t: UnixSeconds) -> String {
    Timestamp::from_second(t.0).map(|t| t.to_string()).unwrap_or_default()
}

/// The name of an IP protocol.
pub fn protocol(number: u8) -> String {
    match number {
        6 => "TCP".to_owned(),
        17 => "UDP".to_owned(),
        1 => "ICMP".to_owned(),
        58 => "ICMPv6".to_owned(),
        132 => "SCTP".to_owned(),
        other => other.to_string(),
    }
}
