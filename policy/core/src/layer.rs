//! Compiled rules of one namespace, or of all cluster policies: what names and
//! prefixes lead to. Immutable; a layer is built anew only when its objects change.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::ops::Range;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use ipnet::IpNet;
use smallvec::SmallVec;

use crate::Proto;
use crate::event::RuleRef;
use crate::issue::{Issue, IssueKind, IssueReason, PolicyRef};
use crate::key::KeyHasher;
use crate::matcher::{Matcher, Target};
use crate::model::{Action, Cidr, ClusterPolicy, Fqdn, Permit, Policy, PolicyMode, Ports, Rule, SniMode, UnixSeconds};
use crate::pattern::Pattern;
use crate::ranges::Ranges;
use crate::space::Window;

/// Sorted dense rule ids.
pub(crate) type Ids = SmallVec<[u32; 8]>;

/// What a compiled rule says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Says {
    /// Refuse.
    Deny,
    /// End the tier.
    Pass,
    /// The names of a ceiling; no rule of its own.
    CeilingNames,
    /// The prefixes of a ceiling; no rule of its own.
    CeilingCidrs,
    /// A cluster policy's accept.
    Accept,
    /// A namespace's own allow.
    Allow,
}

/// One compiled rule.
#[derive(Clone, Debug)]
pub(crate) struct CRule {
    /// Stable identity: the policy and the rule's name, never its content.
    pub key: u128,
    pub refer: RuleRef,
    pub says: Says,
    /// Whether it matches names; otherwise prefixes.
    pub by_name: bool,
    pub fqdns: Vec<Fqdn>,
    pub cidrs: Vec<Cidr>,
    pub ports: Vec<Ports>,
    pub sni: SniMode,
    pub ech_allow: bool,
    pub dns_types: Vec<u16>,
    pub private: Vec<IpNet>,
    pub min_binding: Option<Duration>,
}

impl CRule {
    pub fn has_port(&self, proto: Proto, port: u16) -> bool {
        has_port(&self.ports, proto, port)
    }
}

/// Whether a list of ports has this one. Other protocols than TCP and UDP are in it where it has all ports of any.
pub(crate) fn has_port(ports: &[Ports], proto: Proto, port: u16) -> bool {
    if proto == Proto::Other {
        // Port 0 is nobody's.
        return ports.iter().any(|p| p.proto.is_none() && p.lo <= 1 && p.hi == u16::MAX);
    }
    ports.iter().any(|p| p.proto.is_none_or(|x| x == proto) && p.lo <= port && port <= p.hi)
}

/// A ceiling: its ports and permits, and the ids of its two pseudo rules.
#[derive(Clone, Debug)]
pub(crate) struct CCeiling {
    pub names: u32,
    pub cidrs: u32,
    pub ports: Vec<Ports>,
    pub permits: Vec<Permit>,
}

impl CCeiling {
    pub fn has_port(&self, proto: Proto, port: u16) -> bool {
        self.ports.is_empty() || has_port(&self.ports, proto, port)
    }

    pub fn permits(&self, p: Permit) -> bool {
        self.permits.contains(&p)
    }
}

/// One compiled policy that has effect.
#[derive(Clone, Debug)]
pub(crate) struct CPolicy {
    pub who: PolicyRef,
    pub rules: Range<u32>,
    pub ceiling: Option<CCeiling>,
    /// Whether it has a deny, and whether it has an accept or a pass.
    pub actions: (bool, bool),
}

/// What a layer is made of; equal sources give equal layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A namespace's policies by name, and its `allow` annotation.
    Own { namespace: String, policies: Vec<(String, Policy)>, allow: Option<Vec<Rule>> },
    /// All cluster policies by name.
    Cluster(Vec<(String, ClusterPolicy)>),
}

/// Compiled rules with their indices.
#[derive(Debug)]
pub(crate) struct Layer {
    pub source: Source,
    pub policies: Vec<CPolicy>,
    pub rules: Vec<CRule>,
    pub matcher: Matcher,
    pub cidrs: CidrIndex,
    /// What some rule's `privateAddresses` holds.
    pub private: Ranges,
    pub by_key: HashMap<u128, u32, ahash::RandomState>,
    pub issues: Vec<Issue>,
    /// When it was compiled, and the next end of a rule after that.
    pub valid: (UnixSeconds, Option<UnixSeconds>),
    /// Whether time plays a role at all.
    timed: bool,
}

impl Layer {
    /// The layer without a rule.
    pub fn empty() -> Arc<Self> {
        static EMPTY: LazyLock<Arc<Layer>> = LazyLock::new(|| {
            let source = Source::Own { namespace: String::new(), policies: Vec::new(), allow: None };
            Arc::new(Layer::compile(source, UnixSeconds(0)))
        });
        EMPTY.clone()
    }

    /// The layer of a namespace; `old` if that is the same.
    pub fn own(
        name: &str,
        own: &[(&str, &Policy)],
        rules: Option<&Vec<Rule>>,
        now: UnixSeconds,
        old: Option<&Arc<Self>>,
    ) -> Arc<Self> {
        if own.is_empty() && rules.is_none() {
            return Self::empty();
        }
        let same = |l: &&Arc<Self>| match &l.source {
            Source::Own { namespace, policies, allow } => {
                namespace == name
                    && allow.as_ref() == rules
                    && policies.iter().map(|(n, p)| (n.as_str(), p)).eq(own.iter().copied())
            }
            Source::Cluster(_) => false,
        };
        if let Some(old) = old.filter(|l| l.in_time(now)).filter(same) {
            return old.clone();
        }
        let policies = own.iter().map(|(n, p)| ((*n).to_owned(), (*p).clone())).collect();
        Arc::new(Self::compile(Source::Own { namespace: name.to_owned(), policies, allow: rules.cloned() }, now))
    }

    /// The layer of all cluster policies; `old` if that is the same.
    pub fn cluster(all: &BTreeMap<String, ClusterPolicy>, now: UnixSeconds, old: Option<&Arc<Self>>) -> Arc<Self> {
        let same = |l: &&Arc<Self>| match &l.source {
            Source::Cluster(policies) => policies.iter().map(|(n, p)| (n, p)).eq(all.iter()),
            Source::Own { .. } => false,
        };
        if let Some(old) = old.filter(|l| l.in_time(now)).filter(same) {
            return old.clone();
        }
        Arc::new(Self::compile(Source::Cluster(all.iter().map(|(n, p)| (n.clone(), p.clone())).collect()), now))
    }

    /// Whether it would be the same if it were compiled from its source at this time.
    pub fn in_time(&self, now: UnixSeconds) -> bool {
        self.window().is_none_or(|w| w.holds(now))
    }

    /// When it is the same; absent where time plays no role.
    pub fn window(&self) -> Option<Window> {
        self.timed.then_some(Window { from: Some(self.valid.0), until: self.valid.1 })
    }

    fn compile(source: Source, now: UnixSeconds) -> Self {
        let mut b = Builder::new(now);
        match &source {
            Source::Own { namespace, policies, allow } => {
                let namespace: Arc<str> = namespace.as_str().into();
                for (name, p) in policies {
                    if p.mode == PolicyMode::Staged {
                        continue;
                    }
                    let who =
                        PolicyRef { kind: "EgressPolicy", namespace: namespace.clone(), name: name.as_str().into() };
                    let start = b.rules.len() as u32;
                    p.egress.iter().enumerate().for_each(|(i, r)| b.rule(&who, "egress", i, Says::Allow, r));
                    p.deny.iter().enumerate().for_each(|(i, r)| b.rule(&who, "egressDeny", i, Says::Deny, r));
                    b.policy(who, start, None);
                }
                if let Some(allow) = allow {
                    let who = PolicyRef { kind: "Namespace", namespace: namespace.clone(), name: namespace.clone() };
                    let start = b.rules.len() as u32;
                    allow.iter().enumerate().for_each(|(i, r)| b.rule(&who, "allow", i, Says::Allow, r));
                    b.policy(who, start, None);
                }
            }
            Source::Cluster(policies) => {
                for (name, p) in policies {
                    if p.mode == PolicyMode::Staged {
                        continue;
                    }
                    let who =
                        PolicyRef { kind: "ClusterEgressPolicy", namespace: "".into(), name: name.as_str().into() };
                    let start = b.rules.len() as u32;
                    for (i, (action, r)) in p.rules.iter().enumerate() {
                        let says = match action {
                            Action::Deny => Says::Deny,
                            Action::Accept => Says::Accept,
                            Action::Pass => Says::Pass,
                        };
                        b.rule(&who, "egress", i, says, r);
                    }
                    let ceiling = p.ceiling.as_ref().map(|c| {
                        let pseudo = |name: &str, fqdns: &[Fqdn], cidrs: &[Cidr]| Rule {
                            fqdns: fqdns.to_vec(),
                            cidrs: cidrs.to_vec(),
                            ..Rule::new(name, Vec::new())
                        };
                        let names = b.rules.len() as u32;
                        b.rule(&who, "ceiling", 0, Says::CeilingNames, &pseudo("toFQDNs", &c.fqdns, &[]));
                        b.rule(&who, "ceiling", 1, Says::CeilingCidrs, &pseudo("toCIDRs", &[], &c.cidrs));
                        CCeiling { names, cidrs: names + 1, ports: c.ports.clone(), permits: c.permits.clone() }
                    });
                    b.policy(who, start, ceiling);
                }
            }
        }
        b.finish(source)
    }

    /// The cluster policies that have effect, in the order of `policies`, by name.
    pub fn subjects(&self) -> impl Iterator<Item = (&str, &ClusterPolicy)> {
        let all: &[(String, ClusterPolicy)] = match &self.source {
            Source::Cluster(policies) => policies,
            Source::Own { .. } => &[],
        };
        all.iter().filter(|(_, p)| p.mode == PolicyMode::Enforce).map(|(name, p)| (name.as_str(), p))
    }

    /// A cluster policy that has effect.
    pub fn subject(&self, name: &str) -> Option<&ClusterPolicy> {
        let Source::Cluster(policies) = &self.source else { return None };
        let at = policies.binary_search_by(|(n, _)| n.as_str().cmp(name)).ok()?;
        Some(&policies[at].1).filter(|p| p.mode == PolicyMode::Enforce)
    }

    pub fn rule(&self, id: u32) -> &CRule {
        &self.rules[id as usize]
    }

    pub fn policy(&self, id: u32) -> &CPolicy {
        &self.policies[id as usize]
    }

    /// The rules whose names match; `of` says which rules count. Also tells whether one was exact.
    pub fn names(&self, name: &str, of: impl Fn(u32) -> bool) -> (Ids, bool) {
        let mut ids = Ids::new();
        let mut exact = false;
        self.matcher.matches(name, |h| {
            if of(h.rule) {
                ids.push(h.rule);
                exact |= h.exact;
            }
        });
        ids.sort_unstable();
        ids.dedup();
        (ids, exact)
    }

    /// The dense ids of those of the stable keys that are still there, sorted.
    pub fn ids(&self, keys: &[u128]) -> Ids {
        let mut ids: Ids = keys.iter().filter_map(|k| self.by_key.get(k).copied()).collect();
        ids.sort_unstable();
        ids
    }
}

#[derive(Debug)]
struct Builder {
    now: UnixSeconds,
    rules: Vec<CRule>,
    owner: Vec<u32>,
    policies: Vec<CPolicy>,
    keys: BTreeMap<u128, u32>,
    /// Keys given out, also to rules that have ended: an end must not rename its neighbour.
    seen: BTreeSet<u128>,
    next: Option<UnixSeconds>,
    timed: bool,
}

impl Builder {
    fn new(now: UnixSeconds) -> Self {
        Self {
            now,
            rules: Vec::new(),
            owner: Vec::new(),
            policies: Vec::new(),
            keys: BTreeMap::new(),
            seen: BTreeSet::new(),
            next: None,
            timed: false,
        }
    }

    fn rule(&mut self, who: &PolicyRef, section: &str, index: usize, says: Says, r: &Rule) {
        let hash = |salt: &[u8]| {
            KeyHasher::new("rule")
                .field(who.kind.as_bytes())
                .field(who.namespace.as_bytes())
                .field(who.name.as_bytes())
                .field(section.as_bytes())
                .field(r.name.as_bytes())
                .field(salt)
                .finish()
        };
        // Two rules of one section may have one name: the place then tells them apart.
        let mut key = hash(b"");
        if !self.seen.insert(key) {
            key = hash(&(index as u64).to_be_bytes());
        }
        if let Some(end) = r.expires {
            self.timed = true;
            if end <= self.now {
                return;
            }
            self.next = Some(self.next.map_or(end, |n| n.min(end)));
        }
        let id = self.rules.len() as u32;
        self.keys.insert(key, id);
        self.owner.push(self.policies.len() as u32);
        self.rules.push(CRule {
            key,
            refer: RuleRef {
                kind: who.kind,
                namespace: who.namespace.clone(),
                policy: who.name.clone(),
                rule: r.name.clone(),
            },
            says,
            by_name: !r.fqdns.is_empty(),
            fqdns: r.fqdns.clone(),
            cidrs: r.cidrs.clone(),
            ports: r.ports.clone(),
            sni: r.sni,
            ech_allow: r.ech_allow,
            dns_types: r.dns_types.clone(),
            private: r.private_addresses.clone(),
            min_binding: r.min_binding,
        });
    }

    fn policy(&mut self, who: PolicyRef, start: u32, ceiling: Option<CCeiling>) {
        let rules = start..self.rules.len() as u32;
        let has = |f: &dyn Fn(Says) -> bool| self.rules[start as usize..].iter().any(|r| f(r.says));
        let actions = (has(&|s| s == Says::Deny), has(&|s| matches!(s, Says::Accept | Says::Pass)));
        self.policies.push(CPolicy { who, rules, ceiling, actions });
    }

    fn finish(self, source: Source) -> Layer {
        let mut issues = Vec::new();
        // Denies come first, so that they are the last to find an anchor full.
        let mut order: Vec<u32> = (0..self.rules.len() as u32).collect();
        order.sort_by_key(|i| self.rules[*i as usize].says);
        let target = |i: u32| Target {
            rule: i,
            policy: self.owner[i as usize],
            // A pass may open what a later deny would close.
            opens: matches!(self.rules[i as usize].says, Says::Allow | Says::Accept | Says::Pass),
        };
        let entries = || order.iter().flat_map(|i| self.rules[*i as usize].fqdns.iter().map(move |f| (f, target(*i))));
        let (mut matcher, full) = Matcher::build(entries());
        let mut widened = Vec::new();
        for (pattern, t) in &full {
            let rule = &self.rules[t.rule as usize];
            let deny = rule.says == Says::Deny;
            if deny {
                // A deny must not get lost: it takes all names of its anchor.
                let suffix = pattern.literal_suffix();
                let text = if suffix.is_empty() { "*".to_owned() } else { format!("**.{suffix}") };
                if let Ok(wide) = Pattern::parse(&text) {
                    widened.push((Fqdn::Pattern(wide), *t));
                }
            }
            issues.push(Issue {
                kind: if deny { IssueKind::Clipped } else { IssueKind::Refused },
                policy: self.policies[t.policy as usize].who.clone(),
                path: format!("egress[{}].toFQDNs", rule.refer.rule),
                reason: IssueReason::TooManyPatterns,
                by: Some(pattern.as_str().into()),
            });
        }
        if !widened.is_empty() {
            matcher = Matcher::build(widened.iter().map(|(f, t)| (f, *t)).chain(entries())).0;
        }
        let mut cidrs = CidrIndex::default();
        for (i, r) in self.rules.iter().enumerate() {
            r.cidrs.iter().for_each(|c| cidrs.insert(c, i as u32));
        }
        let private = self.rules.iter().flat_map(|r| r.private.iter().copied()).collect();
        Layer {
            source,
            policies: self.policies,
            rules: self.rules,
            matcher,
            cidrs,
            private,
            by_key: self.keys.into_iter().collect(),
            issues,
            valid: (self.now, self.next),
            timed: self.timed,
        }
    }
}

/// Finds the rules whose prefixes hold an address: one look-up per prefix length in use.
#[derive(Clone, Debug, Default)]
pub(crate) struct CidrIndex {
    v4: Vec<u8>,
    v6: Vec<u8>,
    nets: HashMap<IpNet, Vec<(u32, Vec<IpNet>)>, ahash::RandomState>,
}

impl CidrIndex {
    fn insert(&mut self, c: &Cidr, rule: u32) {
        let net = c.cidr.trunc();
        let lens = if matches!(net, IpNet::V4(_)) { &mut self.v4 } else { &mut self.v6 };
        if let Err(at) = lens.binary_search(&net.prefix_len()) {
            lens.insert(at, net.prefix_len());
        }
        self.nets.entry(net).or_default().push((rule, c.except.iter().map(IpNet::trunc).collect()));
    }

    /// Calls `found` for each rule with the prefix of it that holds all of `net`, the shortest first.
    pub fn containing(&self, net: IpNet, mut found: impl FnMut(u32, IpNet)) {
        let lens = if matches!(net, IpNet::V4(_)) { &self.v4 } else { &self.v6 };
        for len in lens.iter().take_while(|l| **l <= net.prefix_len()) {
            let Ok(wide) = IpNet::new(net.addr(), *len) else {
                continue;
            };
            let wide = wide.trunc();
            for (rule, except) in self.nets.get(&wide).into_iter().flatten() {
                if !except.iter().any(|e| e.contains(&net)) {
                    found(*rule, wide);
                }
            }
        }
    }

    /// The rules that hold an address, sorted; `of` says which count.
    pub fn rules(&self, ip: IpAddr, of: impl Fn(u32) -> bool) -> Ids {
        let mut ids = Ids::new();
        self.containing(IpNet::from(ip), |r, _| {
            if of(r) {
                ids.push(r);
            }
        });
        ids.sort_unstable();
        ids.dedup();
        ids
    }
}
