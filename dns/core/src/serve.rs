//! From a query to a reply: decide, plan, render.
//!
//! ```text
//! serve (hit path)         : decide ─ store ─ plan ─ standing? ─ render
//! slow path (dns/server)   : decide ─ store or upstream ─ plan ─ bind ─ render
//! ```
//!
//! Both are made of the same three steps, so that they cannot answer differently.

use std::net::IpAddr;

use tidegate_policy::Reason;
use tidegate_policy::event::{RuleRef, Verdict};

use crate::answer::Stored;
use crate::encrypted::{self, is_at_or_below};
use crate::reply::{self, SOA_SIZE};
use crate::special::{self, Special};
use crate::store::Store;
use crate::svcb::{self, Svcb};
use crate::view::{AddressDecision, AskMode, Asker, Binder, Denial, NameDecision, View};
use crate::wire::{Query, as_str, rcode, rtype, text_of};

/// Most addresses of one answer that bind and are sent.
pub const MAX_ADDRESSES: usize = 64;

/// What holds for all scopes.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Suffixes that go to the cluster's DNS: canonical, no final dot.
    pub cluster_suffixes: Vec<Box<str>>,
    /// Most addresses of one answer that bind and are sent; range 1 to [`MAX_ADDRESSES`].
    pub addresses: usize,
}

impl Rules {
    /// Whether a canonical name belongs to the cluster.
    pub fn is_cluster(&self, name: &str) -> bool {
        self.cluster_suffixes.iter().any(|s| is_at_or_below(name, s))
    }
}

/// Buffers that a worker uses again for each query, so that the hit path allocates nothing.
#[derive(Debug, Default)]
pub struct Scratch {
    /// The reply.
    pub out: Vec<u8>,
    /// The addresses that bind, or would be sent if binding has no part in it.
    pub bind: Vec<IpAddr>,
    /// The addresses that the reply holds.
    pub sent: Vec<IpAddr>,
    /// The name that addresses bind to, if it is not the question's.
    alias: String,
}

impl Scratch {
    /// Buffers with room for any UDP reply.
    pub fn new() -> Self {
        Self {
            out: Vec::with_capacity(2048),
            bind: Vec::with_capacity(2 * MAX_ADDRESSES),
            sent: Vec::with_capacity(2 * MAX_ADDRESSES),
            alias: String::with_capacity(256),
        }
    }
}

/// What was decided, for the event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Allow, deny, or audit.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// The rule that decided.
    pub rule: Option<RuleRef>,
    /// The response code sent.
    pub rcode: u8,
}

/// Where a name is resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// The cluster's DNS.
    Cluster,
    /// The configured resolvers.
    Outside,
}

/// What [`decide`] says of a query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It is answered with this response code at once.
    Deny(Outcome),
    /// It is resolved.
    Go(Go),
}

/// How a query is resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Go {
    /// Where.
    pub route: Route,
    /// Whether the tunnelling budget applies.
    pub budget: bool,
    bind: bool,
    filter: bool,
    ech: bool,
    min_binding_secs: u32,
    verdict: Verdict,
    reason: Reason,
    rule: Option<RuleRef>,
}

impl Go {
    fn open(route: Route, verdict: Verdict, reason: Reason, rule: Option<RuleRef>) -> Self {
        let (bind, filter, ech) = (false, false, true);
        Self { route, budget: false, bind, filter, ech, min_binding_secs: 0, verdict, reason, rule }
    }
}

/// What is sent of a stored answer, and what must be bound first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    keep: Keep,
    ech: bool,
    /// Whether [`Scratch::bind`] must be bound before the reply is sent.
    pub bind: bool,
    /// Whether the reply goes out even if binding fails (audited pods).
    pub lenient: bool,
    /// The longest `minBindingSeconds` of the matching rules.
    pub min_binding_secs: u32,
    aliased: bool,
    /// What is reported.
    pub outcome: Outcome,
}

impl Plan {
    /// The name that addresses bind to.
    pub fn bind_name<'a>(&self, query: &'a Query<'_>, scratch: &'a Scratch) -> &'a str {
        if self.aliased { &scratch.alias } else { query.name() }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keep {
    /// Every record.
    All,
    /// Address records whose address is in [`Scratch::bind`].
    Listed,
    /// Records of the RRset by position; hints as in `Listed`.
    Mask(u64),
}

/// What the hit path did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Served {
    /// The reply is in [`Scratch::out`], the addresses sent in [`Scratch::sent`].
    Reply {
        /// What is reported.
        outcome: Outcome,
        /// Whether it came from the store; a denial does not.
        cached: bool,
    },
    /// The slow path must fetch or bind.
    Miss,
}

fn deny(code: u8, reason: Reason, rule: Option<RuleRef>) -> Outcome {
    Outcome { verdict: Verdict::Deny, reason, rule, rcode: code }
}

/// Applies the mode to a denial.
fn denied(asker: &Asker, code: u8, reason: Reason, rule: Option<RuleRef>) -> Decision {
    match asker.mode {
        AskMode::Audited => Decision::Go(Go::open(Route::Outside, Verdict::Audit, reason, rule)),
        AskMode::Enforced | AskMode::Guarded => Decision::Deny(deny(code, reason, rule)),
    }
}

/// Decides a query by name and type.
pub fn decide<V: View + ?Sized>(name: &str, qtype: u16, asker: &Asker, view: &V, rules: &Rules) -> Decision {
    // Meta types and transfers (RFC 6895, section 3.1) are no questions that a pod's resolver is asked; ANY as RFC 8482.
    if qtype == 0 || qtype == rtype::OPT || (128..=255).contains(&qtype) {
        return Decision::Deny(deny(rcode::NOERROR, Reason::DnsType, None));
    }
    if rules.is_cluster(name) {
        let target = view.leads_to(name).filter(|t| !rules.is_cluster(t.as_str()));
        if let Some(target) = target
            && let Decision::Deny(outcome) = decide(target.as_str(), qtype, asker, view, rules)
        {
            return Decision::Deny(Outcome { rcode: rcode::NOERROR, ..outcome });
        }
        return Decision::Go(Go::open(Route::Cluster, Verdict::Allow, Reason::Allowed, None));
    }
    if is_at_or_below(name, encrypted::DISCOVERY) {
        return Decision::Deny(deny(rcode::NOERROR, Reason::EncryptedDns, None));
    }
    if asker.mode != AskMode::Guarded && view.encrypted_name(name) || is_at_or_below(name, encrypted::CANARY) {
        return denied(asker, rcode::NXDOMAIN, Reason::EncryptedDns, None);
    }
    let enforced = asker.mode == AskMode::Enforced;
    let base_type = matches!(qtype, rtype::A | rtype::AAAA | rtype::CNAME | rtype::HTTPS | rtype::SVCB);
    let lacking = qtype == rtype::A && !asker.v4 || qtype == rtype::AAAA && !asker.v6;
    match view.name(asker, name, qtype) {
        NameDecision::Deny { denial, reason, rule } => {
            let code = match denial {
                Denial::NxDomain => rcode::NXDOMAIN,
                Denial::NoData => rcode::NOERROR,
                Denial::Refused => rcode::REFUSED,
            };
            denied(asker, code, reason, rule)
        }
        NameDecision::Allow(a) if !base_type && !a.extra_type && asker.mode != AskMode::Guarded => {
            denied(asker, rcode::NOERROR, Reason::DnsType, a.rule)
        }
        NameDecision::Allow(a) if enforced && lacking => {
            Decision::Deny(deny(rcode::NOERROR, Reason::NoEgressFamily, a.rule))
        }
        NameDecision::Allow(a) => Decision::Go(Go {
            budget: enforced && a.wildcard,
            bind: !lacking,
            filter: enforced,
            ech: a.ech,
            min_binding_secs: a.min_binding_secs,
            ..Go::open(Route::Outside, Verdict::Allow, Reason::Allowed, a.rule)
        }),
        NameDecision::Resolve { rule, .. } if enforced && !base_type => {
            Decision::Deny(deny(rcode::NOERROR, Reason::DnsType, rule))
        }
        NameDecision::Resolve { rule, .. } if enforced && lacking => {
            Decision::Deny(deny(rcode::NOERROR, Reason::NoEgressFamily, rule))
        }
        NameDecision::Resolve { reason, rule } => Decision::Go(Go {
            budget: enforced,
            filter: enforced,
            ech: !enforced,
            ..Go::open(Route::Outside, Verdict::Allow, reason, rule)
        }),
    }
}

/// Why an address is filtered, if it is.
fn filtered<V: View + ?Sized>(asker: &Asker, name: &str, view: &V, ip: IpAddr) -> Option<Reason> {
    if asker.mode == AskMode::Enforced && !(if ip.is_ipv4() { asker.v4 } else { asker.v6 }) {
        return Some(Reason::NoEgressFamily);
    }
    let class = special::classify(ip);
    if let Special::Never(reason) = class {
        return Some(reason);
    }
    if view.encrypted_address(ip) {
        return Some(Reason::EncryptedDns);
    }
    match (view.address(asker, name, ip), class) {
        // A guarded pod is sent it whatever we say, and only a bound address is denied for its name in the kernel.
        (AddressDecision::Filter(Reason::DeniedByPolicy), Special::Public) if asker.mode == AskMode::Guarded => None,
        (AddressDecision::Filter(reason), _) => Some(reason),
        (AddressDecision::Default, Special::Private) => Some(Reason::Rebinding),
        _ => None,
    }
}

/// Plans what is sent of a stored answer. [`Scratch::bind`] holds the addresses
/// that pass the filters afterwards.
pub fn plan<V: View + ?Sized>(
    go: Go,
    query: &Query<'_>,
    stored: &Stored,
    asker: &Asker,
    view: &V,
    rules: &Rules,
    scratch: &mut Scratch,
) -> Result<Plan, Outcome> {
    scratch.bind.clear();
    let mut go = go;
    let mut aliased = false;
    if go.route == Route::Cluster {
        // The cluster's own answers pass as they are. One that leaves the cluster (an
        // ExternalName, autopath) is decided by the name that it leads to.
        let outside = stored.targets().map(text_of).find(|t| !rules.is_cluster(as_str(t)));
        let Some(outside) = outside else {
            return Ok(whole(go));
        };
        match decide(as_str(&outside), query.qtype, asker, view, rules) {
            Decision::Deny(o) => {
                return Err(Outcome { rcode: rcode::NOERROR, ..o });
            }
            Decision::Go(g) => go = g,
        }
        scratch.alias.clear();
        scratch.alias.push_str(as_str(&outside));
        aliased = true;
    }
    for target in stored.targets() {
        let owner = text_of(target);
        let owner = as_str(&owner);
        if rules.is_cluster(owner) {
            continue;
        }
        let hit = if asker.mode != AskMode::Guarded && view.encrypted_name(owner) {
            Some((Reason::EncryptedDns, None))
        } else {
            view.chain(asker, owner, query.qtype)
        };
        let Some((reason, rule)) = hit else { continue };
        if asker.mode != AskMode::Audited {
            return Err(deny(rcode::NOERROR, reason, rule));
        }
        return Ok(whole(Go::open(go.route, Verdict::Audit, reason, rule)));
    }
    if stored.is_empty() || (!go.filter && !go.bind) {
        return Ok(Plan { aliased, ..whole(go) });
    }

    let mut first_reason = None;
    let Scratch { bind, alias, .. } = scratch;
    let name = if aliased { alias.as_str() } else { query.name() };
    let mut pass = |ip: IpAddr, bind: &mut Vec<IpAddr>| match filtered(asker, name, view, ip) {
        Some(reason) => drop(first_reason.get_or_insert(reason)),
        None if bind.len() < rules.addresses && !bind.contains(&ip) => bind.push(ip),
        None => {}
    };
    let keep = match query.qtype {
        rtype::A | rtype::AAAA => {
            // More than are ever sent may be looked at, so that filtered ones crowd no good one out.
            stored.rrset().take(2 * MAX_ADDRESSES).filter_map(|s| svcb::address(s.rdata)).for_each(|ip| pass(ip, bind));
            Keep::Listed
        }
        rtype::HTTPS | rtype::SVCB => {
            let mut mask = 0u64;
            for (i, s) in stored.rrset().take(64).enumerate() {
                let Some(record) = Svcb::parse(s.rdata) else { continue };
                if svcb_stays(&record, query, stored, asker, name, view, rules) {
                    mask |= 1 << i;
                    record.hints().for_each(|ip| pass(ip, bind));
                }
            }
            Keep::Mask(mask)
        }
        _ => Keep::All,
    };
    // Hints that were filtered only go; an address RRset with nothing left is the answer to the question.
    let emptied = keep == Keep::Listed && bind.is_empty();
    let mut plan = Plan { keep, aliased, bind: go.bind && !bind.is_empty(), ..whole(go) };
    if !go_on(&mut plan, asker, emptied, first_reason) {
        return Err(deny(rcode::NOERROR, first_reason.unwrap_or(Reason::Rebinding), plan.outcome.rule));
    }
    if !plan.bind && keep != Keep::Listed {
        // Hints that do not bind do not stay.
        bind.clear();
    }
    Ok(plan)
}

/// Applies the mode to what the filters left: false if the query is denied.
fn go_on(plan: &mut Plan, asker: &Asker, emptied: bool, reason: Option<Reason>) -> bool {
    if asker.mode != AskMode::Enforced {
        plan.keep = Keep::All;
        plan.ech = true;
        plan.lenient = true;
        if let Some(reason) = reason.filter(|_| asker.mode == AskMode::Audited) {
            plan.outcome.verdict = Verdict::Audit;
            plan.outcome.reason = reason;
        }
        return true;
    }
    !emptied
}

/// A plan that sends everything and binds nothing.
fn whole(go: Go) -> Plan {
    Plan {
        keep: Keep::All,
        ech: go.ech,
        bind: false,
        lenient: false,
        min_binding_secs: go.min_binding_secs,
        aliased: false,
        outcome: Outcome { verdict: go.verdict, reason: go.reason, rule: go.rule, rcode: rcode::NOERROR },
    }
}

/// Whether an HTTPS or SVCB record may stay: its target is the name that was
/// asked or the owner, and its port allowed; an alias only to a name that is allowed itself.
fn svcb_stays<V: View + ?Sized>(
    record: &Svcb<'_>,
    query: &Query<'_>,
    stored: &Stored,
    asker: &Asker,
    name: &str,
    view: &V,
    rules: &Rules,
) -> bool {
    let own = record.target == [0]
        || record.target.eq_ignore_ascii_case(query.wire_name())
        || stored.targets().last().is_some_and(|t| record.target.eq_ignore_ascii_case(t));
    if record.priority == 0 && !own {
        let target = text_of(record.target);
        return matches!(decide(as_str(&target), query.qtype, asker, view, rules), Decision::Go(g) if g.bind);
    }
    own && record.port().is_none_or(|p| view.svcb_port(asker, name, p))
}

/// Writes the reply into [`Scratch::out`], at most `limit` octets; what does not
/// fit is left out and TC set. `now` in milliseconds.
pub fn render(
    query: &Query<'_>,
    stored: &Stored,
    plan: Plan,
    ttl: u32,
    limit: usize,
    scratch: &mut Scratch,
) -> Outcome {
    let Scratch { out, bind, sent, .. } = scratch;
    sent.clear();
    let Plan { keep, ech, mut outcome, .. } = plan;
    reply::begin(query, stored.rcode(), out);
    let room = limit.saturating_sub(reply::opt_size(query));
    let address = matches!(query.qtype, rtype::A | rtype::AAAA);
    let ttl = ttl.to_be_bytes();
    let mut count = 0u16;
    let mut truncated = false;
    let mut put = |head: &[u8], rdata: &mut dyn FnMut(&mut Vec<u8>) -> bool, out: &mut Vec<u8>| -> bool {
        let start = out.len();
        out.extend_from_slice(head);
        out.extend_from_slice(&ttl);
        out.extend_from_slice(&[0, 0]);
        let at = out.len();
        if !rdata(out) {
            out.truncate(start);
            return false;
        }
        if out.len() > room {
            out.truncate(start);
            truncated = true;
            return false;
        }
        let len = (out.len() - at) as u16;
        out[at - 2..at].copy_from_slice(&len.to_be_bytes());
        count += 1;
        true
    };
    for s in stored.stanzas().take(stored.chain_len()) {
        put(
            &s.head,
            &mut |o| {
                o.extend_from_slice(s.rdata);
                true
            },
            out,
        );
    }
    // Addresses take turns, so that the pods of a scope spread over them.
    let turn = if address && stored.len() > 1 { usize::from(query.id) % stored.len() } else { 0 };
    let turned = stored.rrset().enumerate().skip(turn).chain(stored.rrset().enumerate().take(turn));
    for (i, s) in turned {
        match keep {
            Keep::All | Keep::Listed => {
                let ip = if address { svcb::address(s.rdata) } else { None };
                if keep == Keep::Listed && !ip.is_some_and(|ip| bind.contains(&ip)) {
                    continue;
                }
                if put(
                    &s.head,
                    &mut |o| {
                        o.extend_from_slice(s.rdata);
                        true
                    },
                    out,
                ) {
                    sent.extend(ip);
                }
            }
            Keep::Mask(mask) => {
                if i >= 64 || mask >> i & 1 == 0 {
                    continue;
                }
                let Some(record) = Svcb::parse(s.rdata) else { continue };
                if put(&s.head, &mut |o| record.write(ech, |ip| bind.contains(&ip), o), out) {
                    sent.extend(record.hints().filter(|ip| bind.contains(ip)));
                }
            }
        }
    }
    let chain = stored.chain_len() as u16;
    reply::set_answers(out, count);
    if truncated {
        reply::set_truncated(out);
    } else if count <= chain && out.len() + SOA_SIZE <= room {
        reply::soa(out);
    }
    outcome.rcode = stored.rcode();
    reply::opt(query, if outcome.verdict == Verdict::Deny { outcome.reason } else { Reason::Allowed }, out);
    outcome
}

/// Writes a denial into [`Scratch::out`].
pub fn refuse(query: &Query<'_>, outcome: &Outcome, scratch: &mut Scratch) {
    scratch.sent.clear();
    reply::deny(query, outcome.rcode, outcome.reason, &mut scratch.out);
}

/// The outcome of a failure: SERVFAIL.
pub fn failure(reason: Reason, rule: Option<RuleRef>) -> Outcome {
    deny(rcode::SERVFAIL, reason, rule)
}

/// The hit path: answers what the policy denies, and what the store has and the
/// asker's node holds. No allocation, no lock but for reading. `now` in
/// milliseconds, `limit` in octets of the reply.
#[expect(clippy::too_many_arguments, reason = "a struct of them would be built for each query")]
pub fn serve<V: View + ?Sized, B: Binder>(
    query: &Query<'_>,
    asker: &Asker,
    view: &V,
    binder: &B,
    store: &Store,
    rules: &Rules,
    now: u64,
    limit: usize,
    scratch: &mut Scratch,
) -> Served {
    let go = match decide(query.name(), query.qtype, asker, view, rules) {
        Decision::Deny(outcome) => {
            refuse(query, &outcome, scratch);
            return Served::Reply { outcome, cached: false };
        }
        Decision::Go(go) => go,
    };
    let Some(stored) = store.get(asker.scope, query.key(), now) else {
        return Served::Miss;
    };
    let Some(ttl) = stored.ttl(now) else {
        return Served::Miss;
    };
    match plan(go, query, &stored, asker, view, rules, scratch) {
        Err(outcome) => {
            refuse(query, &outcome, scratch);
            Served::Reply { outcome, cached: true }
        }
        Ok(plan) => {
            if plan.bind && !binder.standing(asker, plan.bind_name(query, scratch), &scratch.bind, ttl) {
                return Served::Miss;
            }
            let outcome = render(query, &stored, plan, ttl, limit, scratch);
            Served::Reply { outcome, cached: true }
        }
    }
}
