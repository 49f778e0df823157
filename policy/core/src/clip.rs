//! What of a namespace's own policies its ceilings leave, for status. Enforcement
//! does not use this: it intersects per connection.

use ipnet::IpNet;

use crate::decide::Group;
use crate::eval::{Rules, is_full};
use crate::issue::{Issue, IssueKind, IssueReason, PolicyRef};
use crate::layer::{CRule, Says};
use crate::model::{Cidr, Fqdn, Permit, Ports, SniMode};
use crate::pattern::Pattern;

/// Rules with fewer port items than this cannot fill a port set together with the built-in cuts.
const MANY_PORTS: usize = 24;

/// How much of an item lies inside a ceiling.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    All,
    Some,
    None,
}

/// The issues of one group's own policies.
pub(crate) fn issues(g: &Group) -> Vec<Issue> {
    let rules = g.rules();
    let mut out = Vec::new();
    let mut port_items = 0;
    for id in &rules.selection.own {
        let policy = rules.own.policy(*id);
        for r in policy.rules.clone().map(|r| rules.own.rule(r)) {
            port_items += r.ports.len();
            if r.says == Says::Allow {
                for c in &rules.selection.ceilings {
                    against(&rules, *c, r, &policy.who, &mut out);
                }
                weakenings(&rules, r, &policy.who, &mut out);
            }
        }
    }
    let full = [g.admin_prefixes(), g.own_prefixes()].into_iter().flatten().any(|(_, p)| p.values().any(is_full));
    let full = full || (port_items >= MANY_PORTS && full_names(g));
    if full {
        let who = rules.selection.own.iter().map(|id| &rules.own.policy(*id).who);
        let cluster = rules.selection.admin.iter().map(|(_, id)| &rules.cluster.policy(*id).who);
        for policy in who.chain(cluster) {
            out.push(Issue {
                kind: IssueKind::Clipped,
                policy: policy.clone(),
                path: String::new(),
                reason: IssueReason::TooManyPortRanges,
                by: None,
            });
        }
    }
    out
}

fn full_names(g: &Group) -> bool {
    let rules = g.rules();
    let ids = rules.selection.own.iter().flat_map(|id| rules.own.policy(*id).rules.clone());
    ids.map(|id| rules.own.rule(id)).flat_map(|r| &r.fqdns).any(|f| {
        let name = match f {
            Fqdn::Name(n) => Some(n.clone()),
            Fqdn::Pattern(p) => p.sample(),
        };
        name.is_some_and(|n| is_full(&g.ports_of(n.as_str())))
    })
}

fn path(who: &PolicyRef, r: &CRule, field: &str) -> String {
    if who.kind == "Namespace" {
        format!("tidegate.dev/allow[{}]", r.refer.rule)
    } else {
        format!("egress[{}].{field}", r.refer.rule)
    }
}

fn against(rules: &Rules<'_>, ceiling: u32, r: &CRule, who: &PolicyRef, out: &mut Vec<Issue>) {
    let policy = rules.cluster.policy(ceiling);
    let Some(c) = &policy.ceiling else { return };
    let mut report = |part: Part, field: &str| {
        let kind = match part {
            Part::All => return,
            Part::Some => IssueKind::Clipped,
            Part::None => IssueKind::Refused,
        };
        out.push(Issue {
            kind,
            policy: who.clone(),
            path: path(who, r, field),
            reason: IssueReason::AboveCeiling,
            by: Some(policy.who.name.clone()),
        });
    };
    let names = &rules.cluster.rule(c.names).fqdns;
    for (i, f) in r.fqdns.iter().enumerate() {
        report(part_of_names(f, names), &format!("toFQDNs[{i}]"));
    }
    if !c.permits(Permit::Cidrs) {
        let cidrs = &rules.cluster.rule(c.cidrs).cidrs;
        for (i, item) in r.cidrs.iter().enumerate() {
            report(part_of_cidrs(item, cidrs), &format!("toCIDRs[{i}]"));
        }
    }
    if !c.ports.is_empty() {
        for (i, p) in r.ports.iter().enumerate() {
            report(part_of_ports(p, &c.ports), &format!("toPorts[{i}]"));
        }
    }
}

fn weakenings(rules: &Rules<'_>, r: &CRule, who: &PolicyRef, out: &mut Vec<Issue>) {
    let fields = [
        (r.sni == SniMode::Unchecked && r.by_name, Permit::SniUnchecked, "sni"),
        (r.ech_allow, Permit::EchAllow, "ech"),
        (!r.dns_types.is_empty(), Permit::DnsTypes, "dnsTypes"),
        (!r.private.is_empty(), Permit::PrivateAddresses, "privateAddresses"),
    ];
    for (set, permit, field) in fields {
        if set && !rules.permitted(r, permit) {
            let by = rules
                .selection
                .ceilings
                .iter()
                .map(|id| rules.cluster.policy(*id))
                .find(|p| p.ceiling.as_ref().is_some_and(|c| !c.permits(permit)));
            out.push(Issue {
                kind: IssueKind::Clipped,
                policy: who.clone(),
                path: path(who, r, field),
                reason: IssueReason::NotPermitted,
                by: by.map(|p| p.who.name.clone()),
            });
        }
    }
}

fn part_of_names(item: &Fqdn, ceiling: &[Fqdn]) -> Part {
    let pattern = |f: &Fqdn| match f {
        Fqdn::Name(n) => Pattern::from(n),
        Fqdn::Pattern(p) => p.clone(),
    };
    let item = pattern(item);
    let mut part = Part::None;
    for c in ceiling.iter().map(pattern) {
        if c.covers(&item) {
            return Part::All;
        }
        if c.overlaps(&item) {
            part = Part::Some;
        }
    }
    part
}

fn part_of_cidrs(item: &Cidr, ceiling: &[Cidr]) -> Part {
    let overlap = |a: &IpNet, b: &IpNet| a.contains(b) || b.contains(a);
    let mut part = Part::None;
    for c in ceiling {
        // An exception of the ceiling takes something away unless the item leaves it out too.
        let takes = |e: &&IpNet| overlap(e, &item.cidr) && !item.except.iter().any(|x| x.contains(*e));
        let taken: Vec<&IpNet> = c.except.iter().filter(takes).collect();
        if c.cidr.contains(&item.cidr) && taken.is_empty() {
            return Part::All;
        }
        if overlap(&c.cidr, &item.cidr) && !taken.iter().any(|e| e.contains(&item.cidr)) {
            part = Part::Some;
        }
    }
    part
}

fn part_of_ports(item: &Ports, ceiling: &[Ports]) -> Part {
    let protos = |p: &Ports, q: &Ports| p.proto.is_none() || q.proto.is_none() || p.proto == q.proto;
    let covers = |c: &Ports| (c.proto.is_none() || c.proto == item.proto) && c.lo <= item.lo && item.hi <= c.hi;
    if ceiling.iter().any(covers) {
        Part::All
    } else if ceiling.iter().any(|c| protos(c, item) && c.lo <= item.hi && item.lo <= c.hi) {
        Part::Some
    } else {
        Part::None
    }
}
