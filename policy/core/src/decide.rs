//! Decisions of one group: about connections, about what addresses of a class are granted, about names in DNS.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use ipnet::IpNet;

use crate::class::Scope;
use crate::decision::{AddressDecision, Answer, BuiltIn, Decision, Explanation, NameDecision, NameFacts};
use crate::eval::{Hits, Outcome, Rules, Selection};
use crate::event::RuleRef;
use crate::issue::{Issue, PolicyRef};
use crate::layer::{CRule, Says};
use crate::model::{DnsFilter, Permit, SniMode};
use crate::special::{ENCRYPTED_DNS, is_metadata};
use crate::state::{Prefixes, Touch};
use crate::{Carry, ClassKey, GroupKey, Name, PortSet, PrefixSetKey, Proto, Reason, Via};

/// The most name outcomes that a group remembers; there are as many as there are different sets of matching rules.
const REMEMBERED: usize = 1024;

/// What the rules that match a name come to; one per set of matching rules.
#[derive(Debug, Default)]
struct NameOutcome {
    allowed: bool,
    /// Every port is denied by a rule.
    denied: bool,
    /// What to say where it is not allowed.
    reason: Option<Reason>,
    rule: Option<RuleRef>,
    facts: Arc<NameFacts>,
}

type Outcomes = HashMap<Hits, Arc<NameOutcome>, ahash::RandomState>;

/// Endpoints of one scope that exactly the same policies select. Immutable but for
/// a memory of outcomes; cheap to share, safe to ask from any thread.
#[derive(Debug)]
pub struct Group {
    key: GroupKey,
    index: u32,
    scope: Arc<Scope>,
    selection: Selection,
    touch: Touch,
    audit: bool,
    /// Guarded, and names bind because some are denied on a part of their ports only.
    binds: bool,
    admin: Option<(PrefixSetKey, Arc<Prefixes>)>,
    own: Option<(PrefixSetKey, Arc<Prefixes>)>,
    pub(crate) issues: Arc<[Issue]>,
    outcomes: ArcSwap<Outcomes>,
}

/// What a group is made of.
pub(crate) struct GroupParts {
    pub key: GroupKey,
    pub scope: Arc<Scope>,
    pub selection: Selection,
    pub touch: Touch,
    pub audit: bool,
}

impl Group {
    /// `index` is its place in the world; `like` an earlier group of this key, whose work is taken over if it is the same.
    pub(crate) fn new(p: GroupParts, index: u32, like: Option<&Group>) -> Self {
        let mut g = Group {
            key: p.key,
            index,
            scope: p.scope,
            selection: p.selection,
            touch: p.touch,
            audit: p.audit,
            binds: false,
            admin: None,
            own: None,
            issues: Arc::default(),
            outcomes: ArcSwap::default(),
        };
        if let Some(like) = like.filter(|like| like.says_the_same(&g)) {
            g.binds = like.binds;
            (g.admin, g.own, g.issues) = (like.admin.clone(), like.own.clone(), like.issues.clone());
            return g;
        }
        if g.touch == Touch::Guarded {
            let total = |r: &CRule| r.ports.iter().any(|p| p.proto.is_none() && p.lo <= 1 && p.hi == u16::MAX);
            let rules: Vec<&CRule> = g.cluster_rules().filter(|r| r.by_name).collect();
            let partial = rules.iter().any(|r| r.says != Says::Deny || !total(r));
            g.binds = partial && rules.iter().any(|r| r.says == Says::Deny);
        }
        let interned = |p: Prefixes| crate::prefix::key_of(&p).map(|k| (k, Arc::new(p)));
        g.admin = interned(crate::prefix::flatten(&g.rules(), crate::prefix::Half::Admin));
        g.own = interned(crate::prefix::flatten(&g.rules(), crate::prefix::Half::Rest));
        g.issues = crate::clip::issues(&g).into();
        g
    }

    /// The cluster rules that decide here.
    fn cluster_rules(&self) -> impl Iterator<Item = &CRule> {
        let c = &self.scope.cluster;
        let ids = self.selection.admin.iter().chain(&self.selection.baseline);
        ids.flat_map(|(_, id)| c.policy(*id).rules.clone())
            .map(|r| c.rule(r))
            .filter(|r| matches!(r.says, Says::Accept | Says::Deny | Says::Pass))
    }

    pub(crate) fn same_parts(&self, p: &GroupParts) -> bool {
        Arc::ptr_eq(&self.scope, &p.scope)
            && self.selection == p.selection
            && self.touch == p.touch
            && self.audit == p.audit
    }

    /// Whether the same rules decide here and there in the same way: what machines are told is the same.
    pub fn says_the_same(&self, other: &Group) -> bool {
        self.scope.same_classes(&other.scope)
            && self.selection == other.selection
            && self.touch == other.touch
            && self.audit == other.audit
    }

    pub(crate) fn rules(&self) -> Rules<'_> {
        Rules {
            own: &self.scope.own,
            cluster: &self.scope.cluster,
            selection: &self.selection,
            isolated: self.touch == Touch::Isolated,
        }
    }

    /// Its identity: the scope and the set of selecting policies; never their content.
    pub fn key(&self) -> GroupKey {
        self.key
    }

    /// Its place in the world, the same for as long as there is a group with this key.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Its scope.
    pub fn scope(&self) -> &Arc<Scope> {
        &self.scope
    }

    /// Guarded or isolated.
    pub fn touch(&self) -> Touch {
        self.touch
    }

    /// Whether would-be denies pass and are reported.
    pub fn audit(&self) -> bool {
        self.audit
    }

    /// The policies that select its pods and have effect: the namespace's own, then cluster policies.
    pub fn policies(&self) -> impl Iterator<Item = &PolicyRef> {
        let (own, cluster) = (&self.scope.own, &self.scope.cluster);
        let tiers = self.selection.admin.iter().chain(&self.selection.baseline);
        let own = self.selection.own.iter().map(|id| &own.policy(*id).who);
        own.chain(tiers.map(|(_, id)| &cluster.policy(*id).who))
    }

    /// The cluster policy whose ceiling does not permit a weakening to the namespace's own rules, if there is one.
    pub fn forbids(&self, what: Permit) -> Option<&Arc<str>> {
        let policies = self.selection.ceilings.iter().map(|id| self.scope.cluster.policy(*id));
        let forbids = |p: &&crate::layer::CPolicy| p.ceiling.as_ref().is_some_and(|c| !c.permits(what));
        policies.into_iter().find(forbids).map(|p| &p.who.name)
    }

    /// The cluster policy whose ceiling stands against a rule of the namespace that would allow a name, or a prefix with
    /// an address, at a port.
    pub fn ceiling_against(
        &self,
        name: Option<&Name>,
        ip: Option<IpAddr>,
        proto: Proto,
        port: u16,
    ) -> Option<&Arc<str>> {
        let hits = match (name, ip) {
            (Some(n), _) => self.scope.name_hits(n.as_str()).0,
            (None, Some(ip)) => self.cidr_hits(ip),
            (None, None) => return None,
        };
        self.selection.ceilings.iter().find_map(|id| {
            let policy = self.scope.cluster.policy(*id);
            let c = policy.ceiling.as_ref()?;
            let holds = match name {
                Some(_) => hits.cluster.binary_search(&c.names).is_ok(),
                None => c.permits(Permit::Cidrs) || hits.cluster.binary_search(&c.cidrs).is_ok(),
            };
            (!holds || !c.has_port(proto, port)).then_some(&policy.who.name)
        })
    }

    /// Prefixes that the Admin tier decides.
    pub fn admin_prefixes(&self) -> Option<&(PrefixSetKey, Arc<Prefixes>)> {
        self.admin.as_ref()
    }

    /// Prefixes that own policies, or the Baseline tier, decide.
    pub fn own_prefixes(&self) -> Option<&(PrefixSetKey, Arc<Prefixes>)> {
        self.own.as_ref()
    }

    fn cidr_hits(&self, ip: IpAddr) -> Hits {
        self.rules().cidr_hits(IpNet::from(ip), |_| true)
    }

    /// Decides about a connection to `ip`. `name` is the name that the client said
    /// (SNI) and that this scope has bound to `ip`; without one, prefixes alone decide.
    pub fn connection(&self, name: Option<&Name>, ip: IpAddr, proto: Proto, port: u16) -> Decision {
        let hits = match name {
            Some(n) => self.scope.name_hits(n.as_str()).0.and(&self.cidr_hits(ip)),
            None => self.cidr_hits(ip),
        };
        self.judge(hits, ip, proto, port)
    }

    /// Decides about a connection to `ip` whose client says `name`, which is not bound to `ip`: prefixes may
    /// allow it, the name cannot, and denies of the name hold.
    pub fn connection_unbound(&self, name: &Name, ip: IpAddr, proto: Proto, port: u16) -> Decision {
        let (mut named, _) = self.scope.name_hits(name.as_str());
        let s = &self.scope;
        named.own.retain(|id| s.own.rule(*id).says == Says::Deny);
        named.cluster.retain(|id| matches!(s.cluster.rule(*id).says, Says::Deny | Says::Pass));
        self.judge(named.and(&self.cidr_hits(ip)), ip, proto, port)
    }

    fn judge(&self, mut hits: Hits, ip: IpAddr, proto: Proto, port: u16) -> Decision {
        let rules = self.rules();
        // How wide a prefix is matters to the built-in verdict alone.
        hits.wide.clear();
        let mut explanation = Explanation::default();
        let local = rules.isolated && is_metadata(ip);
        if rules.isolated && (local || port == ENCRYPTED_DNS) {
            // Only a prefix opens these; a name never does.
            let by_prefix = self.cidr_hits(ip);
            if !matches!(rules.admin(&by_prefix, proto, port, &mut None), Outcome::Accept(_)) {
                let (what, reason) = if local {
                    (BuiltIn::Metadata, Reason::Metadata)
                } else {
                    (BuiltIn::EncryptedDns, Reason::EncryptedDns)
                };
                explanation.built_in = Some(what);
                return Decision { via: Via::Deny, reason, rule: None, ech_allow: false, explanation };
            }
        }
        let outcome = rules.all(&hits, proto, port, Some(&mut explanation.steps));
        let via = rules.via(&outcome, proto, port, local);
        explanation.default = matches!(outcome, Outcome::Undecided);
        let default = if rules.isolated { Via::Deny } else { Via::Pass };
        let via = via.unwrap_or(default);
        let (reason, rule, ech_allow) = match &outcome {
            Outcome::Undecided if rules.isolated => (Reason::NotAllowed, None, false),
            Outcome::Undecided => (Reason::Allowed, None, true),
            Outcome::Deny(r) => (Reason::DeniedByPolicy, Some(*r), false),
            Outcome::AboveCeiling(r) => (Reason::AboveCeiling, Some(*r), false),
            Outcome::Accept(r) => (Reason::Allowed, Some(*r), self.passes_ech(&[*r])),
            Outcome::Allow(rs) => {
                (Reason::Allowed, rs.iter().find(|r| r.by_name).or(rs.first()).copied(), self.passes_ech(rs))
            }
        };
        let reason = if via == Via::Allow(Carry::Block) { Reason::QuicBlocked } else { reason };
        Decision { via, reason, rule: rule.map(|r| r.refer.clone()), ech_allow, explanation }
    }

    /// Whether ECH passes: some name rule says so or does not look; prefix rules never look.
    fn passes_ech(&self, rs: &[&CRule]) -> bool {
        let rules = self.rules();
        let mut named = rs.iter().filter(|r| r.by_name).peekable();
        named.peek().is_none()
            || named.any(|r| {
                (r.ech_allow && rules.permitted(r, Permit::EchAllow))
                    || (r.sni == SniMode::Unchecked && rules.permitted(r, Permit::SniUnchecked))
            })
    }

    /// What addresses of a class are granted: the complete decision for the ports that it has; others
    /// are left to the prefixes and the default, which then say the same. `None` if nobody has registered the class.
    ///
    /// An address with several names gets the union. Where it takes the name to tell allowed from denied,
    /// TCP is inspected and UDP is denied. For guarded groups a deny holds only if it holds for every name.
    pub fn grant(&self, class: ClassKey) -> Option<PortSet> {
        let def = self.scope.definition(class)?;
        let rules = self.rules();
        let bare = self.scope.hits_of(&def.cidrs);
        let named: Vec<Hits> = def.names.iter().map(|s| self.scope.hits_of(s).and(&bare)).collect();
        let cuts = rules.cuts(&named.iter().chain([&bare]).collect::<Vec<_>>());
        let of = |hits: &Hits, proto, port| rules.via(&rules.all(hits, proto, port, None), proto, port, false);
        Some(Rules::port_set(&cuts, |proto, port| {
            let by_prefix = of(&bare, proto, port);
            if named.is_empty() {
                return by_prefix;
            }
            let vias: Vec<Option<Via>> = named.iter().map(|h| of(h, proto, port)).collect();
            let any = |v: Via| vias.contains(&Some(v));
            if !rules.isolated {
                return if vias.iter().all(|v| *v == Some(Via::Deny)) {
                    Some(Via::Deny)
                } else if any(Via::Pass) || by_prefix == Some(Via::Deny) {
                    Some(Via::Pass)
                } else {
                    None
                };
            }
            let forward = any(Via::Allow(Carry::Forward));
            if any(Via::Allow(Carry::Tls)) || (forward && any(Via::Deny) && proto == Proto::Tcp) {
                Some(Via::Allow(Carry::Tls))
            } else if any(Via::Allow(Carry::Block)) {
                Some(Via::Allow(Carry::Block))
            } else if any(Via::Deny) {
                Some(Via::Deny)
            } else if forward {
                Some(Via::Allow(Carry::Forward))
            } else {
                // No name decides; a prefix must not decide otherwise behind their backs.
                by_prefix.map(|_| Via::Deny)
            }
        }))
    }

    /// What enforcement does with a query for a canonical name (as in [`Name`]; escaped or root names are
    /// matched by no rule). `qtype` is the RFC 1035 TYPE. Costs the same however many rules there are.
    pub fn name(&self, name: &str, qtype: u16) -> NameDecision {
        let (hits, exact) = self.scope.name_hits(name);
        let out = self.outcome(hits);
        let decide = |answer, reason, rule: Option<RuleRef>| NameDecision {
            answer,
            reason,
            rule,
            wildcard: !exact,
            facts: out.facts.clone(),
        };
        // A, CNAME, AAAA, SVCB, HTTPS.
        let wanted = matches!(qtype, 1 | 5 | 28 | 64 | 65) || out.facts.dns_types.binary_search(&qtype).is_ok();
        if self.touch != Touch::Isolated {
            if out.denied {
                return decide(self.denial(name), Reason::DeniedByPolicy, out.rule.clone());
            }
            let answer = if self.binds { Answer::Bind } else { Answer::Resolve };
            return decide(answer, Reason::Allowed, None);
        }
        if out.allowed {
            return if wanted {
                decide(Answer::Bind, Reason::Allowed, out.rule.clone())
            } else {
                decide(Answer::NoData, Reason::DnsType, out.rule.clone())
            };
        }
        let reason = out.reason.unwrap_or(Reason::NameNotAllowed);
        if self.resolves_all() && reason != Reason::DeniedByPolicy {
            return if wanted {
                decide(Answer::Resolve, Reason::Allowed, None)
            } else {
                decide(Answer::NoData, Reason::DnsType, None)
            };
        }
        decide(self.denial(name), reason, out.rule.clone())
    }

    /// `dnsFilter: Open`, and every ceiling permits it.
    fn resolves_all(&self) -> bool {
        self.scope.dns_filter == DnsFilter::Open
            && self.selection.ceilings.iter().all(|id| {
                let c = self.scope.cluster.policy(*id).ceiling.as_ref();
                c.is_none_or(|c| c.permits(Permit::DnsOpen))
            })
    }

    /// How a name is denied. NXDOMAIN also says that nothing is below it (RFC 8020), so it must be true.
    fn denial(&self, name: &str) -> Answer {
        let s = &self.scope;
        let own = |p: u32| self.selection.own.binary_search(&p).is_ok();
        let cluster = |p: u32| {
            let mut all = self.selection.admin.iter().chain(&self.selection.baseline);
            all.any(|(_, id)| *id == p)
        };
        let root = name.is_empty() || name == ".";
        if root || s.own.matcher.below(name, own) || s.cluster.matcher.below(name, cluster) {
            return Answer::NoData;
        }
        if self.touch != Touch::Isolated || self.resolves_all() {
            // What no rule matches resolves here: only denies that take all names below make them absent.
            // One that takes a fixed number of labels shows at one of these depths.
            let mut child = name.to_owned();
            let all = (0..4).all(|_| {
                child.insert_str(0, "tidegate--any.");
                self.refuses(&self.outcome(s.name_hits(&child).0))
            });
            return if all { Answer::NxDomain } else { Answer::NoData };
        }
        Answer::NxDomain
    }

    /// Whether denies leave no port: of all ports where the default is to pass, else of those that are allowed.
    fn refuses(&self, out: &NameOutcome) -> bool {
        out.denied || (self.touch == Touch::Isolated && !out.allowed && out.reason == Some(Reason::DeniedByPolicy))
    }

    fn outcome(&self, hits: Hits) -> Arc<NameOutcome> {
        let known = self.outcomes.load();
        if let Some(o) = known.get(&hits) {
            return o.clone();
        }
        let o = Arc::new(self.name_outcome(&hits));
        if known.len() < REMEMBERED {
            self.outcomes.rcu(|all| {
                let mut all = Outcomes::clone(all);
                all.insert(hits.clone(), o.clone());
                all
            });
        }
        o
    }

    fn name_outcome(&self, hits: &Hits) -> NameOutcome {
        let rules = self.rules();
        let mut allowing: Vec<&CRule> = Vec::new();
        let (mut deny, mut above) = (None, None);
        let mut denied = true;
        let ports = Rules::port_set(&rules.cuts(&[hits]), |proto, port| {
            if rules.isolated && port == ENCRYPTED_DNS {
                // A name does not open this port; see `judge`.
                return None;
            }
            let o = rules.all(hits, proto, port, None);
            match &o {
                Outcome::Accept(r) => allowing.push(r),
                Outcome::Allow(rs) => allowing.extend(rs.iter()),
                Outcome::Deny(r) => deny = deny.or(Some(*r)),
                Outcome::AboveCeiling(r) => above = above.or(Some(*r)),
                Outcome::Undecided => {}
            }
            // Port 0 is nobody's.
            denied &= port == 0 || matches!(o, Outcome::Deny(_));
            rules.via(&o, proto, port, false)
        });
        let allowed = !allowing.is_empty();
        let mut facts = NameFacts { ports, ..NameFacts::default() };
        facts.ech_allow = allowing.iter().any(|r| r.ech_allow && rules.permitted(r, Permit::EchAllow));
        for r in &allowing {
            if rules.permitted(r, Permit::PrivateAddresses) {
                facts.private.extend(&r.private);
            }
            if rules.permitted(r, Permit::DnsTypes) {
                facts.dns_types.extend(&r.dns_types);
            }
            facts.min_binding = facts.min_binding.max(r.min_binding);
        }
        facts.private.sort_unstable();
        facts.private.dedup();
        facts.dns_types.sort_unstable();
        facts.dns_types.dedup();
        let (reason, rule) = match (allowed, deny, above) {
            (true, ..) => (None, allowing.first().copied()),
            (_, Some(r), _) => (Some(Reason::DeniedByPolicy), Some(r)),
            (_, None, Some(r)) => (Some(Reason::AboveCeiling), Some(r)),
            _ => (None, None),
        };
        NameOutcome {
            allowed,
            denied: denied && deny.is_some(),
            reason,
            rule: rule.map(|r| r.refer.clone()),
            facts: Arc::new(facts),
        }
    }

    /// What holds for an address that a canonical name resolved to.
    pub fn address(&self, name: &str, ip: IpAddr) -> AddressDecision {
        let by_prefix = self.cidr_hits(ip);
        let s = &self.scope;
        let denies = by_prefix.own.iter().any(|id| s.own.rule(*id).says == Says::Deny)
            || by_prefix.cluster.iter().any(|id| s.cluster.rule(*id).says == Says::Deny);
        // Every address of every answer comes here: the name is only looked up for those about which it can say something.
        if !denies && !s.own.private.contains(ip) && !s.cluster.private.contains(ip) {
            return AddressDecision::Default;
        }
        let (named, _) = s.name_hits(name);
        if denies {
            let out = self.outcome(named.and(&by_prefix));
            if self.refuses(&out) {
                return AddressDecision::Filter(Reason::DeniedByPolicy);
            }
        }
        let accepted = self.outcome(named).facts.private.iter().any(|p| p.contains(&ip));
        if accepted { AddressDecision::Accept } else { AddressDecision::Default }
    }

    /// The ports of a name, for the bound on port ranges.
    pub(crate) fn ports_of(&self, name: &str) -> PortSet {
        self.outcome(self.scope.name_hits(name).0).facts.ports.clone()
    }
}
