//! The rule that would allow what was denied, ready to be pasted; or what stands against one.

use std::fmt::Write;
use std::net::IpAddr;

use tidegate_policy::denied::Denied;
use tidegate_policy::event::RuleRef;
use tidegate_policy::model::Permit;
use tidegate_policy::world::{Answer, Group, PolicyRef, World};
use tidegate_policy::{Name, Proto, Reason, ScopeKey};

use super::rollout::Population;

/// HTTPS: where most queries lead, and a query names no port.
const HTTPS: u16 = 443;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// What would allow a denial of a pod. `names` are those that a scope was told for an address.
pub fn for_pod(
    d: &Denied,
    population: Option<&Population>,
    world: &World,
    names: &dyn Fn(ScopeKey, IpAddr) -> Vec<Name>,
) -> Option<String> {
    let pod = d.who.as_ref().map(|w| &*w.pod)?;
    let group = population.and_then(|p| p.pods.get(pod)).and_then(|k| world.group_by_key(*k));
    let names = match (group, d.address) {
        (Some(g), Some(ip)) => names(g.scope().key(), ip),
        _ => Vec::new(),
    };
    allow_with(d, group.map(|g| &**g), &names)
}

/// What would allow a denial, for `egress` of an EgressPolicy of the pod's namespace: YAML, with comments. Nothing where
/// no rule helps. `names` are those that the pod's namespace was told for the address.
pub fn allow_with(d: &Denied, group: Option<&Group>, names: &[Name]) -> Option<String> {
    let name = d.name.as_deref().and_then(|n| Name::parse(n).ok());
    match d.reason {
        Reason::DeniedByPolicy => return Some(denied_by(d.rule.as_ref())),
        Reason::AboveCeiling => return Some(above_ceiling(d, group, name.as_ref())),
        Reason::Metadata => {
            let address = d.address.map(|a| format!("{a}/{}", bits(a))).unwrap_or_default();
            return Some(format!(
                "# Link-local and metadata addresses are denied: the platform can accept {address} in a ClusterEgressPolicy of the Admin tier"
            ));
        }
        Reason::EncryptedDns => {
            return Some(
                "# Encrypted DNS would bypass the checks: use the cluster's DNS; the platform can accept it in a ClusterEgressPolicy of the Admin tier"
                    .to_owned(),
            );
        }
        Reason::Rebinding => return Some(private(name.as_ref()?, group)),
        Reason::NotAllowed
        | Reason::NameNotAllowed
        | Reason::NoBinding
        | Reason::BindingExpired
        | Reason::SniMismatch
        | Reason::SniMissing
        | Reason::SniIsIp
        | Reason::NotTls
        | Reason::HelloMalformed
        | Reason::HelloTimeout
        | Reason::Ech
        | Reason::DnsType => {}
        _ => return None,
    }
    let (proto, port) = match (d.protocol, d.port) {
        (None, _) => (Proto::Tcp, HTTPS),
        (Some(TCP), Some(port)) => (Proto::Tcp, port),
        (Some(UDP), Some(port)) => (Proto::Udp, port),
        _ => return Some("# Only TCP and UDP can be allowed".to_owned()),
    };
    let plain = matches!(d.reason, Reason::NotTls | Reason::SniMissing | Reason::HelloMalformed | Reason::HelloTimeout);
    match (name, d.address) {
        (Some(name), _) => by_name(d, group, &name, proto, port),
        // Exactly one name leads there: that is what the pod means.
        (None, Some(ip)) if names.len() == 1 && d.reason != Reason::NoBinding => {
            let name = &names[0];
            let allows = |g: &Group| g.connection(Some(name), ip, proto, port).allowed();
            if d.reason == Reason::BindingExpired && group.is_some_and(allows) {
                return Some(stale(name));
            }
            let unchecked = plain || proto == Proto::Tcp && tidegate_api::not_tls(port).is_some();
            Some(rule(group, name, proto, port, unchecked, &[]))
        }
        (None, Some(ip)) => Some(by_address(group, ip, names, proto, port)),
        (None, None) => None,
    }
}

fn by_name(d: &Denied, group: Option<&Group>, name: &Name, proto: Proto, port: u16) -> Option<String> {
    let known = group.is_some_and(|g| matches!(g.name(name.as_str(), 1).answer, Answer::Bind));
    match d.reason {
        Reason::Ech => return Some(rule(group, name, proto, port, false, &["  ech: Allow".to_owned()])),
        Reason::DnsType => {
            let kind = d.qtype.map(|t| format!("  dnsTypes: [{}]", type_name(t)))?;
            return Some(rule(group, name, proto, port, false, &[kind]));
        }
        // A name that is asked for: the ports of the rule that is there are not this denial's matter.
        Reason::NameNotAllowed if known => return Some("# The policy allows this name now".to_owned()),
        Reason::SniMismatch | Reason::BindingExpired if known => return Some(stale(name)),
        _ => {}
    }
    let unchecked = proto == Proto::Tcp && tidegate_api::not_tls(port).is_some();
    Some(rule(group, name, proto, port, unchecked, &[]))
}

/// What no rule changes: the name is allowed, and was not looked up.
fn stale(name: &Name) -> String {
    format!(
        "# The policy allows {name}, but the pod sent to an address that the cluster's DNS did not give it for this name, or not lately: let it look the name up before it connects"
    )
}

/// A rule for exactly one name.
fn rule(group: Option<&Group>, name: &Name, proto: Proto, port: u16, unchecked: bool, more: &[String]) -> String {
    let mut out = String::new();
    against(&mut out, group.and_then(|g| g.ceiling_against(Some(name), None, proto, port)));
    // Writing to a String cannot fail.
    let _ = write!(
        out,
        "- toFQDNs: [{{matchName: {}}}]\n  toPorts: [{{protocol: {}, port: {port}}}]",
        text(name.as_str()),
        text_of(proto)
    );
    if unchecked && proto == Proto::Tcp {
        if let Some(by) = group.and_then(|g| g.forbids(Permit::SniUnchecked)) {
            out.insert_str(0, &format!("# The ceiling of ClusterEgressPolicy {by} does not permit `sni: Unchecked`\n"));
        }
        let what = tidegate_api::not_tls(port).unwrap_or("not TLS");
        let _ = write!(out, "\n  sni: Unchecked   # {what}: there is no SNI to check");
    }
    for line in more {
        let _ = write!(out, "\n{line}");
    }
    out
}

/// A rule for exactly one address.
fn by_address(group: Option<&Group>, ip: IpAddr, names: &[Name], proto: Proto, port: u16) -> String {
    let mut out = String::new();
    if names.is_empty() {
        out +=
            "# If the pod can use a name, allow that with toFQDNs instead: it must look it up with the cluster's DNS\n";
    } else {
        let all: Vec<&str> = names.iter().take(3).map(Name::as_str).collect();
        let _ = writeln!(
            out,
            "# The address was also the answer for {}: better allow the name with toFQDNs",
            all.join(", ")
        );
    }
    against(&mut out, group.and_then(|g| g.ceiling_against(None, Some(ip), proto, port)));
    let _ = write!(
        out,
        "- toCIDRs: [{{cidr: {}}}]\n  toPorts: [{{protocol: {}, port: {port}}}]",
        text(&format!("{ip}/{}", bits(ip))),
        text_of(proto)
    );
    out
}

fn against(out: &mut String, by: Option<&std::sync::Arc<str>>) {
    if let Some(by) = by {
        let _ = writeln!(out, "# The ceiling of ClusterEgressPolicy {by} stands against this rule: ask the platform");
    }
}

fn denied_by(rule: Option<&RuleRef>) -> String {
    match rule {
        Some(r) if r.kind == "ClusterEgressPolicy" => format!(
            "# Rule {} of ClusterEgressPolicy {} denies it, and no rule of the namespace can allow it: ask the platform",
            r.rule, r.policy
        ),
        Some(r) => format!(
            "# Rule {} of {} {} denies it, over everything that allows: change that rule",
            r.rule, r.kind, r.policy
        ),
        None => "# A rule denies it, over everything that allows".to_owned(),
    }
}

fn above_ceiling(d: &Denied, group: Option<&Group>, name: Option<&Name>) -> String {
    let (proto, port) = (if d.protocol == Some(UDP) { Proto::Udp } else { Proto::Tcp }, d.port.unwrap_or(HTTPS));
    let by = group.and_then(|g| g.ceiling_against(name, d.address, proto, port));
    let ceiling = by.map_or("a ceiling".to_owned(), |by| format!("the ceiling of ClusterEgressPolicy {by}"));
    let rule = d.rule.as_ref().map_or("A rule".to_owned(), |r| format!("Rule {} of {} {}", r.rule, r.kind, r.policy));
    format!("# {rule} allows it, but {ceiling} does not: ask the platform")
}

fn private(name: &Name, group: Option<&Group>) -> String {
    let mut out = String::new();
    if let Some(by) = group.and_then(|g| g.forbids(Permit::PrivateAddresses)) {
        let _ = writeln!(
            out,
            "# The ceiling of ClusterEgressPolicy {by} does not permit private addresses: ask the platform"
        );
    }
    let _ = write!(
        out,
        "# {name} leads to a private or special address. If that is meant, put its prefix into the rule that allows the name:\n#   privateAddresses: [10.20.0.0/16]"
    );
    out
}

const fn bits(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

const fn text_of(proto: Proto) -> &'static str {
    match proto {
        Proto::Udp => "UDP",
        Proto::Tcp | Proto::Other => "TCP",
    }
}

/// A scalar inside a flow list: quoted where YAML would read something else than a text.
fn text(value: &str) -> String {
    let plain = value.starts_with(|c: char| c.is_ascii_alphabetic()) && value.contains('.') && !value.contains(':');
    if plain { value.to_owned() } else { format!("\"{value}\"") }
}

/// The mnemonic of a query type, as `dnsTypes` takes it.
fn type_name(qtype: u16) -> String {
    let known = tidegate_api::rule::DNS_TYPES.iter().find(|(_, t)| *t == qtype);
    known.map_or_else(|| format!("TYPE{qtype}"), |(name, _)| (*name).to_owned())
}

/// A policy in a few words.
pub fn cause(p: &PolicyRef) -> (&'static str, String) {
    if p.kind == "Namespace" { ("Annotation", "tidegate.dev/allow".to_owned()) } else { (p.kind, p.name.to_string()) }
}
