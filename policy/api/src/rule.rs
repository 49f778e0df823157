//! Rules: names or prefixes with ports.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use tidegate_policy::model;
use tidegate_policy::pattern::Pattern;
use tidegate_policy::{Name, Proto};

use crate::convert::{Ctx, NOT_A_TIME};
use crate::format;
use crate::lint;
use crate::problem::{Code, printable};
use crate::resource::{CidrPeer, Ech, FqdnPeer, Port, Protocol, Quic, Rule, Sni};

/// The most names and patterns of a rule, and of a ceiling.
pub const MAX_FQDNS: usize = 1024;
/// The most prefixes of a rule, and of a ceiling.
pub const MAX_CIDRS: usize = 256;
/// The most exceptions of a prefix.
pub const MAX_EXCEPT: usize = 64;
/// The most ports of a rule, and of a ceiling.
pub const MAX_PORTS: usize = 32;
/// The most `dnsTypes` of a rule.
pub const MAX_DNS_TYPES: usize = 16;
/// The most `privateAddresses` of a rule.
pub const MAX_PRIVATE: usize = 32;
/// The highest `minBindingSeconds`: a day.
pub const MAX_MIN_BINDING: i64 = 86_400;

/// What a rule is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// It grants.
    Allow,
    /// It denies.
    Deny,
    /// It ends a tier.
    Pass,
}

/// Names that rules of one policy have taken.
pub(crate) type Names = BTreeSet<String>;

/// Converts one rule.
pub(crate) fn rule(ctx: &mut Ctx, index: usize, r: &Rule, usage: Use, names: &mut Names) -> model::Rule {
    if let Some(name) = &r.name {
        ctx.field("name", |ctx| {
            if !format::is_rule_name(name) {
                ctx.error(
                    Code::Invalid,
                    "must be 1 to 63 lower-case letters, digits and '-', start with a letter and not end with '-'",
                );
            } else if !names.insert(name.clone()) {
                ctx.error(Code::Duplicate, format!("another rule of this policy is named `{name}`"));
            }
        });
    }
    let (to_fqdns, to_cidrs) = peers(ctx, r, usage);
    let ports = match &r.to_ports {
        Some(list) => ctx.field("toPorts", |ctx| ports(ctx, list, usage == Use::Deny)),
        None => {
            let hint = if usage == Use::Deny { "; for every port write `toPorts: [{protocol: Any}]`" } else { "" };
            ctx.error(Code::Missing, format!("`toPorts` is required{hint}"));
            Vec::new()
        }
    };
    inspection(ctx, r, usage);
    let dns_types = list(ctx, "dnsTypes", r.dns_types.as_deref(), MAX_DNS_TYPES, dns_type);
    let private_addresses = list(ctx, "privateAddresses", r.private_addresses.as_deref(), MAX_PRIVATE, private);
    let min_binding = r.min_binding_seconds.and_then(|s| {
        let ok = u64::try_from(s).ok().filter(|_| s <= MAX_MIN_BINDING);
        if ok.is_none() {
            ctx.field("minBindingSeconds", |ctx| {
                ctx.error(Code::Invalid, format!("must be between 0 and {MAX_MIN_BINDING}"));
            });
        }
        ok.map(Duration::from_secs)
    });
    let expires = r.expire_time.as_deref().and_then(|t| {
        let time = format::time(t);
        if time.is_none() {
            ctx.field("expireTime", |ctx| ctx.error(Code::Invalid, NOT_A_TIME));
        }
        time
    });
    let name = r.name.clone().unwrap_or_else(|| index.to_string());
    let out = model::Rule {
        name: Arc::from(name),
        fqdns: to_fqdns,
        cidrs: to_cidrs,
        ports,
        sni: match r.sni {
            Some(Sni::Unchecked) => model::SniMode::Unchecked,
            _ => model::SniMode::Required,
        },
        ech_allow: r.ech == Some(Ech::Allow),
        dns_types,
        private_addresses,
        min_binding,
        expires,
    };
    if usage == Use::Allow {
        lint::grant(ctx, &out);
    }
    out
}

fn peers(ctx: &mut Ctx, r: &Rule, usage: Use) -> (Vec<model::Fqdn>, Vec<model::Cidr>) {
    match (&r.to_fqdns, &r.to_cidrs) {
        (Some(f), None) => {
            if f.is_empty() {
                ctx.field("toFQDNs", |ctx| ctx.error(Code::Missing, NEEDS_ONE));
            }
            (ctx.field("toFQDNs", |ctx| fqdns(ctx, f, usage == Use::Allow)), Vec::new())
        }
        (None, Some(c)) => {
            if c.is_empty() {
                ctx.field("toCIDRs", |ctx| ctx.error(Code::Missing, NEEDS_ONE));
            }
            (Vec::new(), ctx.field("toCIDRs", |ctx| cidrs(ctx, c, usage == Use::Allow)))
        }
        (Some(_), Some(_)) => {
            ctx.error(Code::Invalid, "has both `toFQDNs` and `toCIDRs`; write two rules");
            Default::default()
        }
        (None, None) => {
            ctx.error(Code::Missing, "one of `toFQDNs` and `toCIDRs` is required");
            Default::default()
        }
    }
}

const NEEDS_ONE: &str = "needs at least one item; an empty list does not mean everything";

/// The fields that steer inspection: they mean something only where names are granted.
pub(crate) const INSPECTION: [&str; 6] = ["sni", "quic", "ech", "dnsTypes", "privateAddresses", "minBindingSeconds"];

fn inspection(ctx: &mut Ctx, r: &Rule, usage: Use) {
    let present = [
        r.sni.is_some(),
        r.quic.is_some(),
        r.ech.is_some(),
        r.dns_types.is_some(),
        r.private_addresses.is_some(),
        r.min_binding_seconds.is_some(),
    ];
    let why = match usage {
        Use::Deny => Some("has no meaning in a deny; leave it out"),
        Use::Pass => Some("has no meaning with `action: Pass`; leave it out"),
        Use::Allow if r.to_cidrs.is_some() => Some("belongs to `toFQDNs`; connections to prefixes are not inspected"),
        Use::Allow => None,
    };
    for (field, _) in INSPECTION.into_iter().zip(present).filter(|(_, there)| *there) {
        if let Some(why) = why {
            ctx.field(field, |ctx| ctx.error(Code::Invalid, why));
        }
    }
    if r.sni == Some(Sni::IfPresent) {
        ctx.field("sni", |ctx| {
            ctx.error(
                Code::UnsupportedField,
                "`IfPresent` is not offered, since a hostile client leaves TLS out; write `Required`, or `Unchecked` \
                 for a protocol that does not start with TLS",
            );
        });
    }
    if r.quic == Some(Quic::Inspect) {
        ctx.field("quic", |ctx| {
            ctx.error(
                Code::UnsupportedField,
                "QUIC is not inspected yet; write `Block`, the default until then: clients fall back to TCP",
            );
        });
    }
    if r.http.is_some() {
        ctx.field("http", |ctx| {
            ctx.error(
                Code::UnsupportedField,
                "HTTP is not inspected yet; leave `http` out, and write `sni: Unchecked` to allow plain HTTP unchecked",
            );
        });
    }
}

fn list<T>(
    ctx: &mut Ctx,
    field: &str,
    items: Option<&[String]>,
    limit: usize,
    one: impl Fn(&mut Ctx, &str) -> Option<T>,
) -> Vec<T> {
    let Some(items) = items else { return Vec::new() };
    ctx.field(field, |ctx| {
        if items.is_empty() {
            ctx.error(Code::Missing, "needs at least one item; leave the field out instead");
        }
        if !ctx.at_most(items.len(), limit) {
            return Vec::new();
        }
        items.iter().enumerate().filter_map(|(i, text)| ctx.item(i, None, |ctx| one(ctx, text))).collect()
    })
}

/// Converts names and patterns. With `grant`, they are linted.
pub(crate) fn fqdns(ctx: &mut Ctx, items: &[FqdnPeer], grant: bool) -> Vec<model::Fqdn> {
    if !ctx.at_most(items.len(), MAX_FQDNS) {
        return Vec::new();
    }
    let mut out = Vec::with_capacity(items.len());
    for (i, item) in items.iter().enumerate() {
        let one = ctx.item(i, None, |ctx| match (&item.match_name, &item.match_pattern) {
            (Some(name), None) => ctx.field("matchName", |ctx| match_name(ctx, name)),
            (None, Some(pattern)) => ctx.field("matchPattern", |ctx| {
                let p = match_pattern(ctx, pattern)?;
                if grant {
                    lint::pattern(ctx, pattern);
                }
                Some(p)
            }),
            (Some(_), Some(_)) => {
                ctx.error(Code::Invalid, "has both `matchName` and `matchPattern`; write two items");
                None
            }
            (None, None) => {
                ctx.error(Code::Missing, "one of `matchName` and `matchPattern` is required");
                None
            }
        });
        out.extend(one);
    }
    out
}

fn match_name(ctx: &mut Ctx, text: &str) -> Option<model::Fqdn> {
    if text.contains('*') {
        ctx.error(Code::Invalid, "is exact and takes no `*`; write `matchPattern`");
        return None;
    }
    match Name::from_user(text) {
        Ok(n) if is_address(n.as_str()) => {
            ctx.error(Code::Invalid, "is an address, not a name; write `toCIDRs`");
            None
        }
        Ok(n) => Some(model::Fqdn::Name(n)),
        Err(e) => {
            ctx.error(Code::Invalid, e.to_string());
            None
        }
    }
}

fn match_pattern(ctx: &mut Ctx, text: &str) -> Option<model::Fqdn> {
    match Pattern::parse(text) {
        Ok(p) => Some(model::Fqdn::Pattern(p)),
        Err(e) => {
            ctx.error(Code::Invalid, e.to_string());
            None
        }
    }
}

/// Whether a name's last label is a number: such a text is an IPv4 address or a slip of one (URL Standard, "ends in a number").
pub(crate) fn is_address(name: &str) -> bool {
    name.rsplit('.').next().is_some_and(|l| !l.is_empty() && l.bytes().all(|b| b.is_ascii_digit()))
}

/// Reads a prefix; the refusal says what to write.
pub(crate) fn prefix(text: &str) -> Result<IpNet, String> {
    let net: IpNet = match text.parse() {
        Ok(net) => net,
        Err(_) => {
            return Err(match text.parse::<IpAddr>() {
                Ok(ip) => format!("is an address, not a prefix; write `{}`", IpNet::from(ip)),
                Err(_) => format!("`{}` is not a prefix such as 203.0.113.0/24 or 2001:db8::/32", printable(text)),
            });
        }
    };
    if net != net.trunc() {
        return Err(format!("has bits set behind its length; write `{}`", net.trunc()));
    }
    if let IpNet::V6(v6) = net
        && v6.addr().to_ipv4_mapped().is_some()
        && v6.prefix_len() >= 96
    {
        return Err("is an IPv4-mapped prefix; write it as IPv4".to_owned());
    }
    Ok(net)
}

/// Converts prefixes. With `grant`, they are linted.
pub(crate) fn cidrs(ctx: &mut Ctx, items: &[CidrPeer], grant: bool) -> Vec<model::Cidr> {
    if !ctx.at_most(items.len(), MAX_CIDRS) {
        return Vec::new();
    }
    let mut out = Vec::with_capacity(items.len());
    for (i, item) in items.iter().enumerate() {
        ctx.item(i, None, |ctx| {
            let cidr = ctx.field("cidr", |ctx| match prefix(&item.cidr) {
                Ok(net) => {
                    if grant && net.prefix_len() == 0 {
                        ctx.warn(Code::Broad, format!("{net} is every address of its family"));
                    }
                    Some(net)
                }
                Err(why) => {
                    ctx.error(Code::Invalid, why);
                    None
                }
            });
            let except = ctx.field("except", |ctx| {
                if !ctx.at_most(item.except.len(), MAX_EXCEPT) {
                    return Vec::new();
                }
                let one = |(i, text): (usize, &String)| {
                    ctx.item(i, None, |ctx| match (prefix(text), cidr) {
                        (Ok(net), Some(cidr)) if net == cidr || !cidr.contains(&net) => {
                            ctx.error(Code::Invalid, format!("{net} does not lie inside {cidr}"));
                            None
                        }
                        (Ok(net), _) => Some(net),
                        (Err(why), _) => {
                            ctx.error(Code::Invalid, why);
                            None
                        }
                    })
                };
                item.except.iter().enumerate().filter_map(one).collect()
            });
            out.extend(cidr.map(|cidr| model::Cidr { cidr, except }));
        });
    }
    out
}

/// Converts ports. `Any` and a missing port stand only where `deny` is true.
pub(crate) fn ports(ctx: &mut Ctx, items: &[Port], deny: bool) -> Vec<model::Ports> {
    if items.is_empty() {
        ctx.error(Code::Missing, NEEDS_ONE);
    }
    if !ctx.at_most(items.len(), MAX_PORTS) {
        return Vec::new();
    }
    items.iter().enumerate().filter_map(|(i, p)| ctx.item(i, None, |ctx| port(ctx, p, deny))).collect()
}

fn port(ctx: &mut Ctx, p: &Port, deny: bool) -> Option<model::Ports> {
    let proto = match p.protocol {
        Protocol::Tcp => Some(Proto::Tcp),
        Protocol::Udp => Some(Proto::Udp),
        Protocol::Any if deny => None,
        Protocol::Any => {
            ctx.field("protocol", |ctx| {
                ctx.error(Code::Invalid, "`Any` is valid only in denies; write one item for TCP and one for UDP");
            });
            return None;
        }
        Protocol::Sctp => {
            ctx.field("protocol", |ctx| {
                ctx.error(Code::UnsupportedField, "SCTP is not supported: it is always refused; write TCP or UDP");
            });
            return None;
        }
    };
    let (lo, hi) = match (p.port, p.end_port) {
        (None, None) if deny => (0, 65_535),
        (None, None) => {
            ctx.error(Code::Missing, "`port` is required; it can be left out only in denies");
            return None;
        }
        (None, Some(_)) => {
            ctx.error(Code::Missing, "`endPort` needs a `port` where the range starts");
            return None;
        }
        (Some(lo), None) => (lo, lo),
        (Some(lo), Some(hi)) => (lo, hi),
    };
    for (field, n) in [("port", p.port), ("endPort", p.end_port)] {
        if n.is_some_and(|n| !(1..=65_535).contains(&n)) {
            ctx.field(field, |ctx| ctx.error(Code::Invalid, "must be between 1 and 65535"));
            return None;
        }
    }
    if hi < lo {
        ctx.field("endPort", |ctx| ctx.error(Code::Invalid, format!("must not be below `port` ({lo})")));
        return None;
    }
    Some(model::Ports { proto, lo: u16::try_from(lo).ok()?, hi: u16::try_from(hi).ok()? })
}

/// Query types by name (IANA DNS parameters); those that a resolver library may ask for.
pub const DNS_TYPES: &[(&str, u16)] = &[
    ("NS", 2),
    ("CNAME", 5),
    ("SOA", 6),
    ("PTR", 12),
    ("HINFO", 13),
    ("MX", 15),
    ("TXT", 16),
    ("RP", 17),
    ("AFSDB", 18),
    ("LOC", 29),
    ("SRV", 33),
    ("NAPTR", 35),
    ("CERT", 37),
    ("DNAME", 39),
    ("DS", 43),
    ("SSHFP", 44),
    ("RRSIG", 46),
    ("NSEC", 47),
    ("DNSKEY", 48),
    ("NSEC3", 50),
    ("NSEC3PARAM", 51),
    ("TLSA", 52),
    ("SMIMEA", 53),
    ("CDS", 59),
    ("CDNSKEY", 60),
    ("OPENPGPKEY", 61),
    ("SPF", 99),
    ("URI", 256),
    ("CAA", 257),
];

fn dns_type(ctx: &mut Ctx, text: &str) -> Option<u16> {
    if matches!(text, "A" | "AAAA" | "HTTPS" | "SVCB") {
        ctx.error(Code::Invalid, format!("`{text}` is always answered; leave it out"));
        return None;
    }
    let known = DNS_TYPES.iter().find(|(n, _)| *n == text).map(|(_, t)| *t);
    // RFC 3597, section 5; not OPT (41), nor the query and meta types (RFC 6895, section 3.1).
    let found = known.or_else(|| {
        let n: u16 = text.strip_prefix("TYPE").filter(|d| !d.starts_with(['0', '+']))?.parse().ok()?;
        (!matches!(n, 0 | 1 | 28 | 41 | 64 | 65 | 128..=255)).then_some(n)
    });
    if found.is_none() {
        let text = printable(text);
        ctx.error(Code::Invalid, format!("`{text}` is not a query type; write TXT, SRV, MX, … or TYPE with a number"));
    }
    found
}

fn private(ctx: &mut Ctx, text: &str) -> Option<IpNet> {
    let net = match prefix(text) {
        Ok(net) => net,
        Err(why) => {
            ctx.error(Code::Invalid, why);
            return None;
        }
    };
    let never = match net {
        IpNet::V4(n) => {
            let a = n.network();
            n.prefix_len() >= 4 && (a.is_loopback() || a.is_multicast()) || n.prefix_len() >= 16 && a.is_link_local()
        }
        IpNet::V6(n) => {
            let a = n.network();
            n.prefix_len() == 128 && a.is_loopback()
                || n.prefix_len() >= 8 && a.is_multicast()
                || n.prefix_len() >= 10 && a.is_unicast_link_local()
        }
    };
    if never {
        ctx.error(Code::Invalid, format!("{net} is loopback, link-local or multicast, which no answer may contain"));
        return None;
    }
    if net.prefix_len() < 7 {
        ctx.warn(Code::Broad, format!("{net} accepts nearly every private address as an answer"));
    }
    Some(net)
}
