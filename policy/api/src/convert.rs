//! From resources as written to `tidegate_policy::model`, with every refusal named.

use ipnet::IpNet;
use tidegate_policy::model;

use crate::format;
use crate::problem::{Code, FieldPath, FieldProblem, Seg, Severity};
use crate::resource::{
    AddressSource, Ceiling, ClusterEgressPolicySpec, EgressPolicySpec, EgressPoolSpec, LabelOperator, LabelSelector,
    Meta, Mode, OnRevoke, PairState, Permit, StaticSource, Tier,
};
use crate::rule::{self, Use};

/// The most problems that are reported of one object.
pub const MAX_PROBLEMS: usize = 64;
/// The most rules of `egress`, and of `egressDeny`.
pub const MAX_RULES: usize = 256;
/// The most labels of `matchLabels`, and expressions of `matchExpressions`.
pub const MAX_SELECTOR: usize = 64;
/// The most values of one label expression.
pub const MAX_SELECTOR_VALUES: usize = 64;
/// The most pairs of a pool.
pub const MAX_PAIRS: usize = 64;
/// The most `externalAddresses` of a pool.
pub const MAX_EXTERNAL: usize = 64;
/// The highest `priority` of a cluster policy.
pub const MAX_PRIORITY: i64 = 1000;

/// A converted object, if it had no error, with all that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Converted<T> {
    /// The value; absent when one of the problems is an error.
    pub value: Option<T>,
    /// Errors, refused parts and warnings, in the order of the text.
    pub problems: Vec<FieldProblem>,
}

/// Where a conversion stands, and what it found.
#[derive(Default)]
pub(crate) struct Ctx {
    path: Vec<Seg>,
    problems: Vec<FieldProblem>,
    failed: bool,
}

impl Ctx {
    /// Runs a step at a field.
    pub(crate) fn field<R>(&mut self, name: &str, step: impl FnOnce(&mut Self) -> R) -> R {
        self.path.push(Seg::Field(name.to_owned()));
        let out = step(self);
        self.path.pop();
        out
    }

    /// Runs a step at an item of a list.
    pub(crate) fn item<R>(&mut self, index: usize, name: Option<&str>, step: impl FnOnce(&mut Self) -> R) -> R {
        let name = name.filter(|n| format::is_label(n)).map(str::to_owned);
        self.path.push(Seg::Index(index, name));
        let out = step(self);
        self.path.pop();
        out
    }

    fn report(&mut self, severity: Severity, code: Code, message: String) {
        self.failed |= severity == Severity::Error;
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(FieldProblem { severity, code, path: FieldPath(self.path.clone()), message });
        }
    }

    /// The object is not taken.
    pub(crate) fn error(&mut self, code: Code, message: impl Into<String>) {
        self.report(Severity::Error, code, message.into());
    }

    /// This part has no effect.
    pub(crate) fn refuse(&mut self, code: Code, message: impl Into<String>) {
        self.report(Severity::Refused, code, message.into());
    }

    /// It holds, and is probably not meant.
    pub(crate) fn warn(&mut self, code: Code, message: impl Into<String>) {
        self.report(Severity::Warning, code, message.into());
    }

    /// Refuses a list that is longer than its limit; says whether it may be read.
    pub(crate) fn at_most(&mut self, len: usize, limit: usize) -> bool {
        if len > limit {
            self.error(Code::TooMany, format!("has {len} items; at most {limit} are allowed"));
        }
        len <= limit
    }

    pub(crate) fn finish<T>(self, value: Option<T>) -> Converted<T> {
        Converted { value: value.filter(|_| !self.failed), problems: self.problems }
    }
}

/// Converts an `EgressPolicy`.
pub fn policy(meta: &Meta, spec: &EgressPolicySpec) -> Converted<model::Policy> {
    let mut ctx = Ctx::default();
    let created = created(&mut ctx, meta);
    let value = ctx.field("spec", |ctx| {
        let pod_selector = ctx.field("podSelector", |ctx| selector(ctx, &spec.pod_selector));
        let pool = spec.pool_ref.as_ref().map(|r| {
            ctx.field("poolRef", |ctx| ctx.field("name", |ctx| object_name(ctx, &r.name)));
            r.name.clone()
        });
        if spec.on_revoke == OnRevoke::Drain {
            ctx.field("onRevoke", |ctx| {
                ctx.error(
                    Code::UnsupportedField,
                    "`Drain` is not carried out yet; write `Reset`, the default: connections that an edit no longer allows \
                     are ended",
                );
            });
        }
        let mut names = rule::Names::default();
        let egress = rules(ctx, "egress", &spec.egress, Use::Allow, &mut names);
        let deny = rules(ctx, "egressDeny", &spec.egress_deny, Use::Deny, &mut names);
        model::Policy {
            created,
            pod_selector,
            mode: mode(spec.mode),
            pool,
            egress,
            deny,
        }
    });
    ctx.finish(Some(value))
}

fn rules(
    ctx: &mut Ctx,
    field: &str,
    rules: &[crate::resource::Rule],
    usage: Use,
    names: &mut rule::Names,
) -> Vec<model::Rule> {
    ctx.field(field, |ctx| {
        if !ctx.at_most(rules.len(), MAX_RULES) {
            return Vec::new();
        }
        let one = |(i, r): (usize, &crate::resource::Rule)| {
            ctx.item(i, r.name.as_deref(), |ctx| {
                if r.action.is_some() {
                    ctx.field("action", |ctx| {
                        ctx.error(
                            Code::UnknownField,
                            "only rules of a ClusterEgressPolicy have an action; `egress` allows, `egressDeny` denies",
                        );
                    });
                }
                rule::rule(ctx, i, r, usage, names)
            })
        };
        rules.iter().enumerate().map(one).collect()
    })
}

/// Converts a `ClusterEgressPolicy`.
pub fn cluster_policy(_: &Meta, spec: &ClusterEgressPolicySpec) -> Converted<model::ClusterPolicy> {
    let mut ctx = Ctx::default();
    let value = ctx.field("spec", |ctx| cluster_policy_spec(ctx, spec));
    ctx.finish(value)
}

fn cluster_policy_spec(ctx: &mut Ctx, spec: &ClusterEgressPolicySpec) -> Option<model::ClusterPolicy> {
    if spec.break_glass.is_some() {
        ctx.field("override", |ctx| {
            ctx.error(
                Code::UnsupportedField,
                "break-glass is not supported yet; write an Admin policy with `priority: 0` and an `Accept` rule instead",
            );
        });
    }
    if !(0..=MAX_PRIORITY).contains(&spec.priority) {
        ctx.field("priority", |ctx| ctx.error(Code::Invalid, format!("must be between 0 and {MAX_PRIORITY}")));
    }
    let (namespaces, pods) = ctx.field("subject", |ctx| {
        let namespaces = ctx.field("namespaceSelector", |ctx| selector(ctx, &spec.subject.namespace_selector));
        let pods = ctx.field("podSelector", |ctx| {
            let pods = selector(ctx, &spec.subject.pod_selector);
            let accepts = spec.egress.iter().any(|r| r.action == Some(crate::resource::Action::Accept));
            if accepts && pods != model::Selector::default() {
                ctx.warn(
                    Code::TenantLabel,
                    "the policy accepts by a pod label, which whoever creates pods can set; \
                     select namespaces alone where tenants are not trusted with it",
                );
            }
            pods
        });
        (namespaces, pods)
    });
    let mut names = rule::Names::default();
    let rules = ctx.field("egress", |ctx| {
        if !ctx.at_most(spec.egress.len(), MAX_RULES) {
            return Vec::new();
        }
        let one = |(i, r): (usize, &crate::resource::Rule)| {
            ctx.item(i, r.name.as_deref(), |ctx| {
                use crate::resource::Action;
                let (action, usage) = match r.action {
                    Some(Action::Accept) => (model::Action::Accept, Use::Allow),
                    Some(Action::Deny) => (model::Action::Deny, Use::Deny),
                    Some(Action::Pass) => (model::Action::Pass, Use::Pass),
                    None => {
                        ctx.error(Code::Missing, "`action` is required: Accept, Deny or Pass");
                        (model::Action::Deny, Use::Deny)
                    }
                };
                (action, rule::rule(ctx, i, r, usage, &mut names))
            })
        };
        spec.egress.iter().enumerate().map(one).collect()
    });
    let ceiling = spec.ceiling.as_ref().map(|c| ctx.field("ceiling", |ctx| ceiling(ctx, c)));
    if spec.egress.is_empty() && spec.ceiling.is_none() {
        ctx.warn(Code::NoEffect, "has neither `egress` nor `ceiling`, so the policy says nothing");
    }
    Some(model::ClusterPolicy {
        tier: match spec.tier {
            Tier::Admin => model::Tier::Admin,
            Tier::Baseline => model::Tier::Baseline,
        },
        priority: u16::try_from(spec.priority).ok()?,
        mode: mode(spec.mode),
        namespaces,
        pods,
        subject_lost: false,
        rules,
        ceiling,
    })
}

fn ceiling(ctx: &mut Ctx, c: &Ceiling) -> model::Ceiling {
    let mut permits: Vec<model::Permit> = c
        .permits
        .iter()
        .map(|p| match p {
            Permit::PrivateAddresses => model::Permit::PrivateAddresses,
            Permit::SniUnchecked => model::Permit::SniUnchecked,
            Permit::EchAllow => model::Permit::EchAllow,
            Permit::DnsTypes => model::Permit::DnsTypes,
            Permit::Cidrs => model::Permit::Cidrs,
            Permit::DnsOpen => model::Permit::DnsOpen,
        })
        .collect();
    permits.sort_unstable();
    permits.dedup();
    let fqdns = ctx.field("toFQDNs", |ctx| rule::fqdns(ctx, &c.to_fqdns, false));
    let cidrs = ctx.field("toCIDRs", |ctx| rule::cidrs(ctx, &c.to_cidrs, false));
    let ports = match &c.to_ports {
        None => Vec::new(),
        Some(list) => ctx.field("toPorts", |ctx| rule::ports(ctx, list, false)),
    };
    if c.to_fqdns.is_empty() && c.to_cidrs.is_empty() && !permits.contains(&model::Permit::Cidrs) {
        ctx.warn(Code::NoEffect, "names neither `toFQDNs` nor `toCIDRs`, so its subjects can grant themselves nothing");
    }
    model::Ceiling { fqdns, cidrs, ports, permits }
}

/// Converts an `EgressPool`.
pub fn pool(_: &Meta, spec: &EgressPoolSpec) -> Converted<model::Pool> {
    let mut ctx = Ctx::default();
    let value = ctx.field("spec", |ctx| pool_spec(ctx, spec));
    ctx.finish(value)
}

fn pool_spec(ctx: &mut Ctx, spec: &EgressPoolSpec) -> Option<model::Pool> {
    let gateway_nodes =
        spec.gateway_node_selector.as_ref().map(|s| ctx.field("gatewayNodeSelector", |ctx| selector(ctx, s)));
    let allowed_namespaces =
        spec.allowed_namespaces.as_ref().map(|s| ctx.field("allowedNamespaces", |ctx| selector(ctx, s)));
    ctx.field("externalAddresses", |ctx| {
        if ctx.at_most(spec.external_addresses.len(), MAX_EXTERNAL) {
            for (i, text) in spec.external_addresses.iter().enumerate() {
                if text.parse::<std::net::IpAddr>().is_err() && text.parse::<IpNet>().is_err() {
                    ctx.item(i, None, |ctx| ctx.error(Code::Invalid, "must be an IP address or a prefix"));
                }
            }
        }
    });
    let source = match (spec.address_source, &spec.fixed) {
        (AddressSource::PodNetwork, None) => model::AddressSource::PodNetwork,
        (AddressSource::Static, Some(s)) => ctx.field("static", |ctx| static_source(ctx, s)),
        (AddressSource::PodNetwork, Some(_)) => {
            ctx.field("static", |ctx| {
                ctx.error(Code::Invalid, "belongs to `addressSource: Static`; with PodNetwork leave it out");
            });
            return None;
        }
        (AddressSource::Static, None) => {
            ctx.error(Code::Missing, "`static` is required with `addressSource: Static`");
            return None;
        }
    };
    Some(model::Pool { allowed_namespaces, source, gateway_nodes })
}

fn static_source(ctx: &mut Ctx, s: &StaticSource) -> model::AddressSource {
    if let Some(name) = s.interface.as_deref().filter(|n| !format::is_interface(n)) {
        let message = format!("`{}` cannot be the name of a network interface", crate::problem::printable(name));
        ctx.field("interface", |ctx| ctx.error(Code::Invalid, message));
    }
    let mut seen = std::collections::BTreeSet::new();
    let pairs = ctx.field("addresses", |ctx| {
        if s.addresses.is_empty() {
            ctx.error(Code::Missing, "needs at least one pair");
        }
        if !ctx.at_most(s.addresses.len(), MAX_PAIRS) {
            return Vec::new();
        }
        let one = |(i, p): (usize, &crate::resource::PairSpec)| {
            ctx.item(i, None, |ctx| {
                let ipv4: Option<std::net::Ipv4Addr> = address(ctx, "ipv4", p.ipv4.as_deref(), "an IPv4 address");
                let ipv6: Option<std::net::Ipv6Addr> = address(ctx, "ipv6", p.ipv6.as_deref(), "an IPv6 address");
                if p.ipv4.is_none() && p.ipv6.is_none() {
                    ctx.error(Code::Missing, "needs `ipv4`, `ipv6` or both");
                }
                for (field, ip) in [("ipv4", ipv4.map(Into::into)), ("ipv6", ipv6.map(Into::into))] {
                    let Some(ip) = ip else { continue };
                    ctx.field(field, |ctx| {
                        if !can_be_source(ip) {
                            ctx.error(Code::Invalid, format!("{ip} cannot be the source of a connection"));
                        } else if !seen.insert(ip) {
                            ctx.error(Code::Duplicate, format!("{ip} is in the pool twice"));
                        }
                    });
                }
                model::Pair { ipv4, ipv6, draining: p.state == PairState::Draining }
            })
        };
        s.addresses.iter().enumerate().map(one).collect()
    });
    model::AddressSource::Static { interface: s.interface.clone(), pairs }
}

fn address<T: std::str::FromStr>(ctx: &mut Ctx, field: &str, text: Option<&str>, what: &str) -> Option<T> {
    let parsed = text?.parse().ok();
    if parsed.is_none() {
        ctx.field(field, |ctx| ctx.error(Code::Invalid, format!("must be {what}")));
    }
    parsed
}

/// Whether an address can be announced and used as a source: unicast, and wider than one link.
fn can_be_source(ip: std::net::IpAddr) -> bool {
    match ip {
        std::net::IpAddr::V4(a) => {
            let first = a.octets()[0];
            first != 0 && first < 224 && !a.is_loopback() && !a.is_link_local()
        }
        std::net::IpAddr::V6(a) => {
            !a.is_unspecified()
                && !a.is_loopback()
                && !a.is_multicast()
                && !a.is_unicast_link_local()
                && a.to_ipv4_mapped().is_none()
        }
    }
}

fn mode(m: Mode) -> model::PolicyMode {
    match m {
        Mode::Enforce => model::PolicyMode::Enforce,
        Mode::Staged => model::PolicyMode::Staged,
    }
}

fn created(ctx: &mut Ctx, meta: &Meta) -> model::UnixSeconds {
    let Some(text) = &meta.creation_timestamp else {
        return model::UnixSeconds(0);
    };
    format::time(text).unwrap_or_else(|| {
        ctx.field("metadata", |ctx| {
            ctx.field("creationTimestamp", |ctx| ctx.error(Code::Invalid, NOT_A_TIME));
        });
        model::UnixSeconds(0)
    })
}

/// What a text that should be a time is told.
pub(crate) const NOT_A_TIME: &str = "must be a time as RFC 3339 has it, such as \"2027-01-31T00:00:00Z\"";

/// Refuses a text that cannot name an object.
pub(crate) fn object_name(ctx: &mut Ctx, name: &str) {
    if name.is_empty() {
        ctx.error(Code::Missing, "must not be empty");
    } else if !format::is_subdomain(name) {
        ctx.error(
            Code::Invalid,
            "must be labels of lower-case letters, digits and '-', separated by dots, at most 253 characters",
        );
    }
}

/// Converts a label selector.
pub(crate) fn selector(ctx: &mut Ctx, s: &LabelSelector) -> model::Selector {
    ctx.field("matchLabels", |ctx| {
        if ctx.at_most(s.match_labels.len(), MAX_SELECTOR) {
            for (k, v) in &s.match_labels {
                ctx.field(k, |ctx| {
                    label_key(ctx, k);
                    label_value(ctx, v);
                });
            }
        }
    });
    let expressions = ctx.field("matchExpressions", |ctx| {
        if !ctx.at_most(s.match_expressions.len(), MAX_SELECTOR) {
            return Vec::new();
        }
        let one = |(i, e): (usize, &crate::resource::LabelExpression)| {
            ctx.item(i, None, |ctx| {
                ctx.field("key", |ctx| label_key(ctx, &e.key));
                let takes_values = matches!(e.operator, LabelOperator::In | LabelOperator::NotIn);
                ctx.field("values", |ctx| {
                    if takes_values && e.values.is_empty() {
                        ctx.error(Code::Missing, "the operator needs at least one value");
                    } else if !takes_values && !e.values.is_empty() {
                        ctx.error(Code::Invalid, "the operator takes no values");
                    } else if ctx.at_most(e.values.len(), MAX_SELECTOR_VALUES) {
                        for (i, v) in e.values.iter().enumerate() {
                            ctx.item(i, None, |ctx| label_value(ctx, v));
                        }
                    }
                });
                model::Expression {
                    key: e.key.clone(),
                    op: match e.operator {
                        LabelOperator::In => model::Operator::In(e.values.clone()),
                        LabelOperator::NotIn => model::Operator::NotIn(e.values.clone()),
                        LabelOperator::Exists => model::Operator::Exists,
                        LabelOperator::DoesNotExist => model::Operator::DoesNotExist,
                    },
                }
            })
        };
        s.match_expressions.iter().enumerate().map(one).collect()
    });
    model::Selector { labels: s.match_labels.clone(), expressions }
}

fn label_key(ctx: &mut Ctx, key: &str) {
    if !format::is_label_key(key) {
        ctx.error(Code::Invalid, "the key is not a label key ([prefix/]name with letters, digits, '-', '_' and '.')");
    }
}

fn label_value(ctx: &mut Ctx, value: &str) {
    if !format::is_label_value(value) {
        ctx.error(
            Code::Invalid,
            "the value is not a label value (at most 63 letters, digits, '-', '_' and '.', ends alphanumeric)",
        );
    }
}
