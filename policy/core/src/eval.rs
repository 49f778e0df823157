//! What the tiers say of one port of one destination: the one evaluator that
//! grants, prefixes, DNS decisions and explanations all use.
//!
//! Order: the Admin tier by priority → the namespace's own policies (deny over
//! allow, allows below every ceiling) where some select the pod, else the Baseline tier → the default.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use ipnet::IpNet;
use smallvec::SmallVec;

use crate::issue::PolicyRef;
use crate::layer::{CRule, Ids, Layer, Says};
use crate::model::{Permit, Ports, SniMode};
use crate::port::MAX_RANGES;
use crate::special::{ENCRYPTED_DNS, metadata_range};
use crate::{Carry, PortRange, PortSet, Proto, Via};

/// The policies that select the pods of a group, as dense ids of its layers.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Selection {
    /// Own policies, the annotation among them.
    pub own: Vec<u32>,
    /// Cluster policies by (priority, id).
    pub admin: Vec<(u16, u32)>,
    /// Cluster policies by (priority, id).
    pub baseline: Vec<(u16, u32)>,
    /// Cluster policies that have a ceiling.
    pub ceilings: Vec<u32>,
}

/// What an evaluation needs of a group.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules<'a> {
    pub own: &'a Layer,
    pub cluster: &'a Layer,
    pub selection: &'a Selection,
    pub isolated: bool,
}

/// The rules that match a destination, as dense ids of the two layers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Hits {
    pub own: Ids,
    pub cluster: Ids,
    /// Cluster rules that hold the destination only by a prefix of length 0: they do not accept encrypted DNS.
    pub wide: Ids,
}

fn merge(a: &Ids, b: &Ids) -> Ids {
    let mut out: Ids = a.iter().chain(b).copied().collect();
    out.sort_unstable();
    out.dedup();
    out
}

impl Hits {
    /// The rules of both.
    pub fn and(&self, other: &Hits) -> Hits {
        Hits {
            own: merge(&self.own, &other.own),
            cluster: merge(&self.cluster, &other.cluster),
            wide: merge(&self.wide, &other.wide),
        }
    }
}

/// What was found.
#[derive(Clone, Debug)]
pub(crate) enum Outcome<'a> {
    /// Nothing decides.
    Undecided,
    /// A deny.
    Deny(&'a CRule),
    /// A cluster policy accepts.
    Accept(&'a CRule),
    /// Own rules that allow and that every ceiling holds.
    Allow(SmallVec<[&'a CRule; 4]>),
    /// An own rule would allow, but a ceiling does not hold it.
    AboveCeiling(&'a CRule),
}

/// What one policy said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// None of its rules matches.
    Nothing,
    /// It denies.
    Deny,
    /// It accepts (cluster) or allows (own).
    Allow,
    /// It ends its tier.
    Pass,
    /// It allows, but the ceiling of the cluster policy with this name does not.
    AboveCeiling(Arc<str>),
}

/// One policy that was consulted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The policy.
    pub policy: PolicyRef,
    /// The rule of it that matched.
    pub rule: Option<Arc<str>>,
    /// What it said.
    pub said: Said,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.policy.kind, self.policy.name)?;
        if let Some(rule) = &self.rule {
            write!(f, ", rule {rule}")?;
        }
        match &self.said {
            Said::Nothing => f.write_str(": no rule matches"),
            Said::Deny => f.write_str(": denied"),
            Said::Allow => f.write_str(": allowed"),
            Said::Pass => f.write_str(": passed on to the next tier"),
            Said::AboveCeiling(by) => write!(f, ": above the ceiling of ClusterEgressPolicy {by}"),
        }
    }
}

/// Collects steps where somebody wants them.
pub(crate) type Steps<'s> = Option<&'s mut Vec<Step>>;

fn say(steps: &mut Steps<'_>, policy: &PolicyRef, rule: Option<&CRule>, said: Said) {
    if let Some(steps) = steps {
        steps.push(Step { policy: policy.clone(), rule: rule.map(|r| r.refer.rule.clone()), said });
    }
}

enum Tiered<'a> {
    Undecided,
    Deny(&'a CRule),
    Accept(&'a CRule),
}

impl<'a> Rules<'a> {
    /// The hits that lie in one policy's range, with their rules.
    fn of_policy(layer: &'a Layer, policy: u32, ids: &'a Ids) -> impl Iterator<Item = (u32, &'a CRule)> {
        let range = layer.policy(policy).rules.clone();
        let start = ids.partition_point(|id| *id < range.start);
        ids[start..].iter().take_while(move |id| **id < range.end).map(|id| (*id, layer.rule(*id)))
    }

    fn tier(
        &self,
        policies: &[(u16, u32)],
        hits: &'a Hits,
        proto: Proto,
        port: u16,
        steps: &mut Steps<'_>,
    ) -> Tiered<'a> {
        for run in policies.chunk_by(|a, b| a.0 == b.0) {
            // At equal priority each policy has its first match, and Deny comes before Accept before Pass.
            let mut best: Option<&CRule> = None;
            let rank = |s: Says| match s {
                Says::Deny => 0,
                Says::Accept => 1,
                _ => 2,
            };
            for (_, id) in run {
                let first = Self::of_policy(self.cluster, *id, &hits.cluster).find(|(i, r)| {
                    let acts = matches!(r.says, Says::Deny | Says::Accept | Says::Pass);
                    let opens_dns = self.isolated
                        && r.says == Says::Accept
                        && port == ENCRYPTED_DNS
                        && hits.wide.binary_search(i).is_ok();
                    acts && !opens_dns && r.has_port(proto, port)
                });
                let who = &self.cluster.policy(*id).who;
                match first {
                    None => say(steps, who, None, Said::Nothing),
                    Some((_, r)) => {
                        let said = match r.says {
                            Says::Deny => Said::Deny,
                            Says::Accept => Said::Allow,
                            _ => Said::Pass,
                        };
                        say(steps, who, Some(r), said);
                        if best.is_none_or(|b| rank(r.says) < rank(b.says)) {
                            best = Some(r);
                        }
                    }
                }
            }
            if let Some(r) = best {
                return match r.says {
                    Says::Deny => Tiered::Deny(r),
                    Says::Accept => Tiered::Accept(r),
                    _ => Tiered::Undecided,
                };
            }
        }
        Tiered::Undecided
    }

    /// The Admin tier alone.
    pub fn admin(&self, hits: &'a Hits, proto: Proto, port: u16, steps: &mut Steps<'_>) -> Outcome<'a> {
        match self.tier(&self.selection.admin, hits, proto, port, steps) {
            Tiered::Deny(r) => Outcome::Deny(r),
            Tiered::Accept(r) => Outcome::Accept(r),
            Tiered::Undecided => Outcome::Undecided,
        }
    }

    /// What comes after the Admin tier: own policies, or the Baseline tier where none selects the pod.
    pub fn rest(&self, hits: &'a Hits, proto: Proto, port: u16, steps: &mut Steps<'_>) -> Outcome<'a> {
        if self.selection.own.is_empty() {
            return match self.tier(&self.selection.baseline, hits, proto, port, steps) {
                Tiered::Deny(r) => Outcome::Deny(r),
                Tiered::Accept(r) => Outcome::Accept(r),
                Tiered::Undecided => Outcome::Undecided,
            };
        }
        let mut allow: SmallVec<[&CRule; 4]> = SmallVec::new();
        let mut deny = None;
        let mut above = None;
        for id in &self.selection.own {
            let who = &self.own.policy(*id).who;
            let mut silent = true;
            for (_, r) in Self::of_policy(self.own, *id, &hits.own) {
                if !r.has_port(proto, port) {
                    continue;
                }
                silent = false;
                if r.says == Says::Deny {
                    say(steps, who, Some(r), Said::Deny);
                    deny = deny.or(Some(r));
                } else if let Some(by) = self.above_ceiling(r, hits, proto, port) {
                    say(steps, who, Some(r), Said::AboveCeiling(by.name.clone()));
                    above = above.or(Some(r));
                } else {
                    say(steps, who, Some(r), Said::Allow);
                    allow.push(r);
                }
            }
            if silent {
                say(steps, who, None, Said::Nothing);
            }
        }
        match (deny, allow.is_empty(), above) {
            (Some(r), ..) => Outcome::Deny(r),
            (None, false, _) => Outcome::Allow(allow),
            (None, true, Some(r)) => Outcome::AboveCeiling(r),
            (None, true, None) => Outcome::Undecided,
        }
    }

    /// All tiers.
    pub fn all(&self, hits: &'a Hits, proto: Proto, port: u16, mut steps: Steps<'_>) -> Outcome<'a> {
        match self.admin(hits, proto, port, &mut steps) {
            Outcome::Undecided => self.rest(hits, proto, port, &mut steps),
            decided => decided,
        }
    }

    /// The ceiling that does not hold this grant, if one does not.
    fn above_ceiling(&self, r: &CRule, hits: &Hits, proto: Proto, port: u16) -> Option<&'a PolicyRef> {
        self.selection.ceilings.iter().find_map(|id| {
            let policy = self.cluster.policy(*id);
            let c = policy.ceiling.as_ref()?;
            let id = if r.by_name { c.names } else { c.cidrs };
            let inside = hits.cluster.binary_search(&id).is_ok() || (!r.by_name && c.permits(Permit::Cidrs));
            (!inside || !c.has_port(proto, port)).then_some(&policy.who)
        })
    }

    /// Whether every ceiling of the group permits a weakening. Cluster rules need no permit.
    pub fn permitted(&self, r: &CRule, what: Permit) -> bool {
        r.says != Says::Allow
            || self
                .selection
                .ceilings
                .iter()
                .all(|id| self.cluster.policy(*id).ceiling.as_ref().is_none_or(|c| c.permits(what)))
    }

    /// How a packet is carried that these rules allow: inspection wins where they overlap.
    pub fn carry(&self, rules: &[&CRule], proto: Proto, port: u16) -> Carry {
        let inspected = |r: &&CRule| match proto {
            Proto::Tcp => r.by_name && !(r.sni == SniMode::Unchecked && self.permitted(r, Permit::SniUnchecked)),
            Proto::Udp => r.by_name && port == 443,
            Proto::Other => false,
        };
        match (rules.iter().any(inspected), proto) {
            (false, _) | (true, Proto::Other) => Carry::Forward,
            (true, Proto::Tcp) => Carry::Tls,
            (true, Proto::Udp) => Carry::Block,
        }
    }

    /// What an outcome means for a packet; `None` leaves it to what comes next.
    /// `local` says that the destination never leaves the node (link-local, metadata).
    pub fn via(&self, o: &Outcome<'_>, proto: Proto, port: u16, local: bool) -> Option<Via> {
        match o {
            Outcome::Undecided | Outcome::AboveCeiling(_) => None,
            Outcome::Deny(_) => Some(Via::Deny),
            Outcome::Accept(_) if !self.isolated || local => Some(Via::Pass),
            Outcome::Accept(r) => Some(Via::Allow(self.carry(&[*r], proto, port))),
            Outcome::Allow(_) if local => None,
            Outcome::Allow(rules) => Some(Via::Allow(self.carry(rules, proto, port))),
        }
    }

    /// The first ports of the intervals on which nothing changes, for these hits.
    pub fn cuts(&self, hits: &[&Hits]) -> BTreeSet<(Proto, u16)> {
        let mut cuts = BTreeSet::from([
            (Proto::Other, 0),
            (Proto::Tcp, 0),
            (Proto::Tcp, 1),
            (Proto::Udp, 0),
            (Proto::Udp, 1),
            (Proto::Tcp, ENCRYPTED_DNS),
            (Proto::Tcp, ENCRYPTED_DNS + 1),
            (Proto::Udp, ENCRYPTED_DNS),
            (Proto::Udp, ENCRYPTED_DNS + 1),
            (Proto::Udp, 443),
            (Proto::Udp, 444),
        ]);
        let mut add = |ports: &[Ports]| {
            for p in ports {
                for proto in [Proto::Tcp, Proto::Udp] {
                    if p.proto.is_none_or(|x| x == proto) {
                        cuts.insert((proto, p.lo));
                        if let Some(next) = p.hi.checked_add(1) {
                            cuts.insert((proto, next));
                        }
                    }
                }
            }
        };
        for h in hits {
            h.own.iter().for_each(|id| add(&self.own.rule(*id).ports));
            h.cluster.iter().for_each(|id| add(&self.cluster.rule(*id).ports));
        }
        for id in &self.selection.ceilings {
            if let Some(c) = &self.cluster.policy(*id).ceiling {
                add(&c.ports);
            }
        }
        cuts
    }

    /// Calls `of` once for every interval of `cuts` and makes a port set of what it says.
    pub fn port_set(cuts: &BTreeSet<(Proto, u16)>, mut of: impl FnMut(Proto, u16) -> Option<Via>) -> PortSet {
        let mut ranges: Vec<PortRange> = Vec::new();
        let mut it = cuts.iter().peekable();
        while let Some((proto, lo)) = it.next() {
            let hi = match it.peek() {
                Some((p, next)) if p == proto => next - 1,
                _ => u16::MAX,
            };
            let Some(via) = of(*proto, *lo) else { continue };
            match ranges.last_mut() {
                Some(l) if l.proto == *proto && l.via == via && u32::from(l.hi) + 1 == u32::from(*lo) => l.hi = hi,
                _ => ranges.push(PortRange { proto: *proto, lo: *lo, hi, via }),
            }
        }
        bounded(ranges)
    }

    /// The rules that hold all of a prefix. For isolated groups an accept of more than the special range
    /// that a prefix lies in does not reach into it.
    pub fn cidr_hits(&self, net: IpNet, relevant: impl Fn(u32) -> bool) -> Hits {
        let mut hits = Hits::default();
        self.own.cidrs.containing(net, |r, _| hits.own.push(r));
        let mut narrow = Ids::new();
        self.cluster.cidrs.containing(net, |r, by| {
            if !relevant(r) {
                return;
            }
            let narrowed = self.isolated && self.cluster.rule(r).says == Says::Accept;
            if narrowed && metadata_range(&net).is_some_and(|s| !s.contains(&by)) {
                return;
            }
            hits.cluster.push(r);
            if by.prefix_len() > 0 {
                narrow.push(r);
            } else {
                hits.wide.push(r);
            }
        });
        hits.wide.retain(|r| !narrow.contains(r));
        for ids in [&mut hits.own, &mut hits.cluster, &mut hits.wide] {
            ids.sort_unstable();
            ids.dedup();
        }
        hits
    }
}

/// At most [`MAX_RANGES`]: from where there would be more, all is denied.
fn bounded(mut ranges: Vec<PortRange>) -> PortSet {
    if ranges.len() > MAX_RANGES {
        ranges.truncate(MAX_RANGES - 2);
        if let Some(last) = ranges.last().copied() {
            if let Some(lo) = last.hi.checked_add(1) {
                ranges.push(PortRange { proto: last.proto, lo, hi: u16::MAX, via: Via::Deny });
            }
            if last.proto == Proto::Tcp {
                ranges.push(PortRange { proto: Proto::Udp, lo: 0, hi: u16::MAX, via: Via::Deny });
            }
        }
    }
    PortSet::from_precedence(ranges)
}

/// Whether a port set may have been cut by [`bounded`].
pub(crate) fn is_full(set: &PortSet) -> bool {
    set.ranges().len() >= MAX_RANGES - 2
}
