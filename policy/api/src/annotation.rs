//! The annotations of a namespace: `tidegate.dev/allow`, `managed`, `mode`, `audit-until`, `pool`.
//!
//! An annotation that cannot be read never opens anything: a bad item of `allow` is
//! refused alone, and the others then hold on their safe side.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use tidegate_policy::pattern::Pattern;
use tidegate_policy::{Name, Proto, model};

use crate::convert::{Converted, Ctx, NOT_A_TIME};
use crate::format;
use crate::lint;
use crate::problem::{Code, printable};
use crate::resource::Meta;
use crate::rule;

/// The prefix of Tidegate's annotations.
pub const PREFIX: &str = "tidegate.dev/";
/// The most items of `tidegate.dev/allow`.
pub const MAX_ITEMS: usize = 256;
/// The longest `tidegate.dev/allow`, in octets.
pub const MAX_ALLOW: usize = 16 * 1024;

/// Converts a namespace.
pub fn namespace(meta: &Meta) -> Converted<model::Namespace> {
    let mut ctx = Ctx::default();
    let ns = ctx.field("metadata", |ctx| ctx.field("annotations", |ctx| annotations(ctx, meta)));
    ctx.finish(Some(ns))
}

fn annotations(ctx: &mut Ctx, meta: &Meta) -> model::Namespace {
    let mut ns = model::Namespace {
        uid: if meta.uid.is_empty() { meta.name.clone() } else { meta.uid.clone() },
        labels: meta.labels.clone(),
        ..Default::default()
    };
    // The API server sets this label on every namespace; selectors by name rely on it.
    ns.labels.insert("kubernetes.io/metadata.name".to_owned(), meta.name.clone());
    let mut until_is_bad = false;
    for (key, text) in &meta.annotations {
        let Some(what) = key.strip_prefix(PREFIX) else { continue };
        ctx.field(key, |ctx| match what {
            "allow" => {
                ns.has_allow = true;
                ns.allow = allow(ctx, text);
            }
            "managed" => {
                ns.managed = text != "false";
                if !matches!(text.as_str(), "true" | "false") {
                    let text = printable(text);
                    ctx.refuse(
                        Code::BadItem,
                        format!("`{text}` is neither \"true\" nor \"false\"; the namespace is isolated"),
                    );
                }
            }
            "mode" => {
                ns.audit = text == "audit";
                if !matches!(text.as_str(), "audit" | "enforce") {
                    let text = printable(text);
                    ctx.refuse(Code::BadItem, format!("`{text}` is neither enforce nor audit; the namespace enforces"));
                }
            }
            "audit-until" => {
                ns.audit_until = format::time(text);
                if ns.audit_until.is_none() {
                    until_is_bad = true;
                    ctx.refuse(Code::BadItem, format!("{NOT_A_TIME}; the namespace enforces"));
                }
            }
            "pool" => {
                if format::is_subdomain(text) {
                    ns.pool = Some(text.clone());
                } else {
                    ctx.refuse(Code::BadItem, format!("`{}` is not a name of a pool", printable(text)));
                }
            }
            _ => ctx.warn(
                Code::NoEffect,
                "is not an annotation that Tidegate reads; those are allow, managed, mode, audit-until and pool",
            ),
        });
    }
    // An end that cannot be read must not mean audit without an end.
    ns.audit &= !until_is_bad;
    ns
}

fn allow(ctx: &mut Ctx, text: &str) -> Vec<model::Rule> {
    if text.len() > MAX_ALLOW {
        ctx.refuse(
            Code::TooMany,
            format!(
                "has {} octets, at most {MAX_ALLOW} are read; nothing of it holds; write an EgressPolicy",
                text.len()
            ),
        );
        return Vec::new();
    }
    let mut out: Vec<model::Rule> = Vec::new();
    let items = text.split([',', '\n']).map(str::trim).filter(|t| !t.is_empty());
    for (i, item) in items.enumerate() {
        if i == MAX_ITEMS {
            ctx.refuse(
                Code::TooMany,
                format!("has more than {MAX_ITEMS} items; the first {MAX_ITEMS} hold; write an EgressPolicy"),
            );
            break;
        }
        ctx.item(i, None, |ctx| match allow_item(item) {
            Ok(rule) => {
                for f in &rule.fqdns {
                    if let model::Fqdn::Pattern(_) = f {
                        lint::pattern(ctx, host_of(item));
                    }
                }
                lint::grant(ctx, &rule);
                out.push(rule);
            }
            Err(why) => ctx.refuse(Code::BadItem, format!("`{}`: {why}", printable(item))),
        });
    }
    out
}

/// The host of an item that is known to be one.
fn host_of(item: &str) -> &str {
    item.split([':', '/']).next().unwrap_or(item)
}

/// Reads one item: `host|cidr|[v6cidr]` `[:port[-end]]` `[/tcp|/udp|/tcp-unchecked]`.
///
/// Without a port it is 443 with TCP and UDP; a port without a protocol is TCP.
///
/// # Errors
/// Says what is wrong with the item and what to write instead.
pub fn allow_item(item: &str) -> Result<model::Rule, String> {
    if item.contains("://") {
        return Err("it is a URL; write the host alone, without scheme and path".to_owned());
    }
    let (rest, suffix) = match item.rsplit_once('/') {
        Some((rest, s)) if s.starts_with(|c: char| c.is_ascii_alphabetic()) => (rest, Some(s)),
        _ => (item, None),
    };
    let (target, port) = split_port(rest)?;
    let (lo, hi) = match port {
        None => (443, 443),
        Some(text) => port_range(text)?,
    };
    let mut sni = model::SniMode::Required;
    let protos: &[Proto] = match (suffix, port) {
        (None, None) => &[Proto::Tcp, Proto::Udp],
        (None, Some(_)) | (Some("tcp"), _) => &[Proto::Tcp],
        (Some("udp"), _) => &[Proto::Udp],
        (Some("tcp-unchecked"), _) => {
            sni = model::SniMode::Unchecked;
            &[Proto::Tcp]
        }
        (Some(other), _) => {
            return Err(format!("`/{}` is none of /tcp, /udp and /tcp-unchecked", printable(other)));
        }
    };
    let (fqdns, cidrs) = peer(target)?;
    if !cidrs.is_empty() && sni == model::SniMode::Unchecked {
        return Err("connections to a prefix are never inspected; write /tcp".to_owned());
    }
    Ok(model::Rule {
        name: Arc::from(item),
        fqdns,
        cidrs,
        ports: protos.iter().map(|p| model::Ports { proto: Some(*p), lo, hi }).collect(),
        sni,
        ech_allow: false,
        dns_types: Vec::new(),
        private_addresses: Vec::new(),
        min_binding: None,
        expires: None,
    })
}

fn split_port(text: &str) -> Result<(&str, Option<&str>), String> {
    if let Some(rest) = text.strip_prefix('[') {
        let (target, after) = rest.split_once(']').ok_or("the `[` has no `]`")?;
        if !target.contains(':') {
            return Err("only IPv6 prefixes stand in brackets".to_owned());
        }
        return match after {
            "" => Ok((target, None)),
            _ => {
                after.strip_prefix(':').map(|p| (target, Some(p))).ok_or_else(|| "a `:` must follow the `]`".to_owned())
            }
        };
    }
    match text.split_once(':') {
        None => Ok((text, None)),
        Some((_, port)) if port.contains(':') => {
            Err("write IPv6 prefixes in brackets, as in [2001:db8::/32]:443".to_owned())
        }
        Some((target, port)) => Ok((target, Some(port))),
    }
}

fn port_range(text: &str) -> Result<(u16, u16), String> {
    let one = |t: &str| -> Result<u16, String> {
        let digits = !t.is_empty() && t.bytes().all(|b| b.is_ascii_digit());
        t.parse()
            .ok()
            .filter(|n| digits && *n > 0)
            .ok_or_else(|| format!("`{}` is not a port (1 to 65535)", printable(t)))
    };
    let (lo, hi) = match text.split_once('-') {
        None => (one(text)?, one(text)?),
        Some((lo, hi)) => (one(lo)?, one(hi)?),
    };
    if hi < lo { Err(format!("the range ends at {hi}, below its start {lo}")) } else { Ok((lo, hi)) }
}

fn peer(text: &str) -> Result<(Vec<model::Fqdn>, Vec<model::Cidr>), String> {
    let cidr = |net: IpNet| Ok((Vec::new(), vec![model::Cidr { cidr: net, except: Vec::new() }]));
    if text.is_empty() {
        return Err("it names no host".to_owned());
    }
    if let Ok(ip) = text.parse::<IpAddr>() {
        return cidr(rule::prefix(&IpNet::from(ip).to_string())?);
    }
    if text.contains(['/', ':']) {
        return cidr(rule::prefix(text)?);
    }
    if text.contains('*') {
        let p = Pattern::parse(text).map_err(|e| e.to_string())?;
        return Ok((vec![model::Fqdn::Pattern(p)], Vec::new()));
    }
    let name = Name::from_user(text).map_err(|e| e.to_string())?;
    if rule::is_address(name.as_str()) {
        return Err("it is neither a name nor an address".to_owned());
    }
    Ok((vec![model::Fqdn::Name(name)], Vec::new()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(r: &model::Rule) -> String {
        let mut out = String::new();
        for f in &r.fqdns {
            match f {
                model::Fqdn::Name(n) => out += n.as_str(),
                model::Fqdn::Pattern(p) => out += &p.to_string(),
            }
        }
        for c in &r.cidrs {
            out += &c.cidr.to_string();
        }
        for p in &r.ports {
            out += &format!(" {:?} {}-{}", p.proto.unwrap(), p.lo, p.hi);
        }
        if r.sni == model::SniMode::Unchecked {
            out += " unchecked";
        }
        out
    }

    #[test]
    fn the_grammar_of_items() {
        for (item, want) in [
            ("api.example.com", "api.example.com Tcp 443-443 Udp 443-443"),
            ("API.Example.com.", "api.example.com Tcp 443-443 Udp 443-443"),
            ("bücher.example:8443", "xn--bcher-kva.example Tcp 8443-8443"),
            ("**.example.com:80", "**.example.com Tcp 80-80"),
            ("api.example.com/tcp", "api.example.com Tcp 443-443"),
            ("api.example.com/udp", "api.example.com Udp 443-443"),
            ("db.example.com:5432-5439/tcp-unchecked", "db.example.com Tcp 5432-5439 unchecked"),
            ("203.0.113.7", "203.0.113.7/32 Tcp 443-443 Udp 443-443"),
            ("203.0.113.0/24", "203.0.113.0/24 Tcp 443-443 Udp 443-443"),
            ("203.0.113.0/24:5432", "203.0.113.0/24 Tcp 5432-5432"),
            ("203.0.113.0/24:53/udp", "203.0.113.0/24 Udp 53-53"),
            ("[2001:db8::/32]:443/tcp", "2001:db8::/32 Tcp 443-443"),
            ("[2001:db8::1]", "2001:db8::1/128 Tcp 443-443 Udp 443-443"),
        ] {
            let r = allow_item(item).unwrap();
            assert_eq!(text(&r), want, "{item}");
            assert_eq!(&*r.name, item);
        }
    }

    #[test]
    fn bad_items_say_why() {
        for (item, want) in [
            ("", "it names no host"),
            (":443", "it names no host"),
            ("api.example.com:0", "`0` is not a port (1 to 65535)"),
            ("api.example.com:65536", "`65536` is not a port (1 to 65535)"),
            ("api.example.com:+1", "`+1` is not a port (1 to 65535)"),
            ("api.example.com:", "`` is not a port (1 to 65535)"),
            ("api.example.com:9-8", "the range ends at 8, below its start 9"),
            ("api.example.com/sctp", "`/sctp` is none of /tcp, /udp and /tcp-unchecked"),
            ("2001:db8::/32", "write IPv6 prefixes in brackets, as in [2001:db8::/32]:443"),
            ("[2001:db8::/32", "the `[` has no `]`"),
            ("[2001:db8::/32]443", "a `:` must follow the `]`"),
            ("[api.example.com]", "only IPv6 prefixes stand in brackets"),
            ("10.0.0.1/8", "has bits set behind its length; write `10.0.0.0/8`"),
            ("10.0.0.0/33", "`10.0.0.0/33` is not a prefix such as 203.0.113.0/24 or 2001:db8::/32"),
            ("300.1.1.1", "it is neither a name nor an address"),
            ("a b", "the name has a character that is not a letter, a digit, '-' or '_'"),
            ("https://api.example.com", "it is a URL; write the host alone, without scheme and path"),
            ("10.0.0.0/8:5432/tcp-unchecked", "connections to a prefix are never inspected; write /tcp"),
        ] {
            assert_eq!(allow_item(item).unwrap_err(), want, "{item}");
        }
    }

    fn meta(pairs: &[(&str, &str)]) -> Meta {
        Meta {
            name: "shop".into(),
            annotations: pairs.iter().map(|(k, v)| (format!("{PREFIX}{k}"), (*v).to_owned())).collect(),
            ..Default::default()
        }
    }

    fn messages(c: &Converted<model::Namespace>) -> Vec<String> {
        c.problems.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_bad_item_is_refused_alone() {
        let c = namespace(&meta(&[("allow", "a.example.com, b.example.com:x\nc.example.com,")]));
        let ns = c.value.as_ref().unwrap();
        assert_eq!(ns.allow.len(), 2);
        assert!(ns.has_allow);
        assert_eq!(
            messages(&c),
            ["metadata.annotations[tidegate.dev/allow][1]: `b.example.com:x`: `x` is not a port (1 to 65535)"]
        );
    }

    #[test]
    fn limits_of_allow() {
        let many = (0..300).map(|i| format!("h{i}.example.com")).collect::<Vec<_>>().join(",");
        let c = namespace(&meta(&[("allow", &many)]));
        assert_eq!(c.value.as_ref().unwrap().allow.len(), MAX_ITEMS);
        assert_eq!(c.problems.len(), 1);
        let long = format!("a.example.com,{}", " ".repeat(MAX_ALLOW));
        let c = namespace(&meta(&[("allow", &long)]));
        let ns = c.value.as_ref().unwrap();
        assert!(ns.allow.is_empty() && ns.has_allow, "it isolates all the same");
        assert_eq!(c.problems[0].code, Code::TooMany);
    }

    #[test]
    fn what_cannot_be_read_never_opens() {
        let c = namespace(&meta(&[("managed", "yes"), ("mode", "Audit")]));
        let ns = c.value.as_ref().unwrap();
        assert!(ns.managed && !ns.audit);
        assert_eq!(c.problems.len(), 2);
        let c = namespace(&meta(&[("mode", "audit"), ("audit-until", "soon"), ("pool", "A b"), ("colour", "red")]));
        let ns = c.value.as_ref().unwrap();
        assert!(!ns.audit && ns.audit_until.is_none() && ns.pool.is_none());
        assert_eq!(c.problems.len(), 3);
        let c = namespace(&meta(&[
            ("managed", "false"),
            ("mode", "audit"),
            ("audit-until", "2027-01-31T00:00:00Z"),
            ("pool", "a"),
        ]));
        let ns = c.value.unwrap();
        assert!(!ns.managed && ns.audit && ns.audit_until.is_some() && ns.pool.as_deref() == Some("a"));
        assert!(c.problems.is_empty());
        assert_eq!(ns.labels["kubernetes.io/metadata.name"], "shop");
    }
}
