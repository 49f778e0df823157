//! Denials, for the status that people read.

use std::sync::Arc;

use tidegate_policy::Reason;
use tidegate_policy::denied::Denied;
use tidegate_policy::event::{RuleRef, Who};

use super::{Problem, WireError, bounded, ip_from_wire, ip_to_wire, name_from_wire, u16_from_wire};
use crate::wire;

/// The most denials of one message.
pub const MAX_DENIED: usize = 256;
/// The most octets of an escaped name: 255 octets, of which each may take four.
const MAX_ESCAPED: usize = 1024;
/// The most octets of the name of a rule; an annotation's rules are called as their items.
const MAX_RULE: usize = 512;
/// Kinds of policies.
const KINDS: [&str; 3] = ["EgressPolicy", "ClusterEgressPolicy", "Namespace"];

/// Denials as an agent sends them.
pub fn denials(all: &[Denied]) -> wire::FactsAck {
    let denied = all.iter().take(MAX_DENIED).map(denied_to_wire).collect();
    wire::FactsAck { kind: Some(wire::facts_ack::Kind::Denied(wire::DeniedBatch { denied })) }
}

pub(super) fn denied_to_wire(d: &Denied) -> wire::Denied {
    wire::Denied {
        source: ip_to_wire(d.source),
        pod: d.who.as_ref().map(|w| wire::DeniedPod {
            namespace: w.namespace.to_string(),
            pod: w.pod.to_string(),
            node: w.node.to_string(),
        }),
        name: cut(d.name.as_deref().unwrap_or_default(), MAX_ESCAPED),
        address: d.address.map_or_else(Vec::new, ip_to_wire),
        protocol: d.protocol.unwrap_or_default().into(),
        port: d.port.unwrap_or_default().into(),
        qtype: d.qtype.unwrap_or_default().into(),
        reason: d.reason.as_str().to_owned(),
        audit: d.audit,
        rule: d.rule.as_ref().map(|r| wire::DeniedRule {
            kind: r.kind.to_owned(),
            namespace: r.namespace.to_string(),
            policy: r.policy.to_string(),
            rule: cut(&r.rule, MAX_RULE),
        }),
        count: d.count,
    }
}

fn cut(text: &str, most: usize) -> String {
    let end = (0..=most.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or_default();
    text[..end].to_owned()
}

/// A reason that this version does not know is of a newer one: that denial alone is left out.
pub(super) fn denied_from_wire(all: Vec<wire::Denied>, field: &'static str) -> Result<Vec<Denied>, WireError> {
    bounded(all.len(), MAX_DENIED, field)?;
    let known = all.into_iter().filter_map(|d| Reason::from_code(&d.reason).map(|reason| one(d, reason)));
    known.collect()
}

fn one(d: wire::Denied, reason: Reason) -> Result<Denied, WireError> {
    let who = d.pod.map(|p| {
        Ok(Arc::new(Who {
            namespace: name_from_wire(p.namespace, "denied_pod.namespace")?.into(),
            pod: name_from_wire(p.pod, "denied_pod.pod")?.into(),
            node: name_from_wire(p.node, "denied_pod.node")?.into(),
        }))
    });
    let protocol = u8::try_from(d.protocol).map_err(|_| Problem::Range(d.protocol.into()).of("denied.protocol"))?;
    let (port, qtype) = (u16_from_wire(d.port, "denied.port")?, u16_from_wire(d.qtype, "denied.qtype")?);
    Ok(Denied {
        source: ip_from_wire(&d.source, "denied.source")?,
        who: who.transpose()?,
        name: escaped(d.name, MAX_ESCAPED, "denied.name")?,
        address: if d.address.is_empty() { None } else { Some(ip_from_wire(&d.address, "denied.address")?) },
        protocol: (protocol > 0).then_some(protocol),
        port: (port > 0).then_some(port),
        qtype: (qtype > 0).then_some(qtype),
        reason,
        audit: d.audit,
        rule: d.rule.map(rule).transpose()?,
        count: d.count.max(1),
    })
}

fn rule(r: wire::DeniedRule) -> Result<RuleRef, WireError> {
    let kind = KINDS.into_iter().find(|k| *k == r.kind).ok_or(Problem::Missing.of("denied_rule.kind"))?;
    let namespace =
        if r.namespace.is_empty() { r.namespace } else { name_from_wire(r.namespace, "denied_rule.namespace")? };
    bounded(r.rule.len(), MAX_RULE, "denied_rule.rule")?;
    if r.rule.chars().any(char::is_control) {
        return Err(Problem::Name.of("denied_rule.rule"));
    }
    Ok(RuleRef {
        kind,
        namespace: namespace.into(),
        policy: name_from_wire(r.policy, "denied_rule.policy")?.into(),
        rule: r.rule.into(),
    })
}

/// A text in which nothing is left to escape, so that it can stand in any status.
fn escaped(text: String, most: usize, field: &'static str) -> Result<Option<Arc<str>>, WireError> {
    bounded(text.len(), most, field)?;
    if text.bytes().any(|b| !(0x21..0x7f).contains(&b)) {
        return Err(Problem::Name.of(field));
    }
    Ok((!text.is_empty()).then(|| text.into()))
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    fn denied() -> Denied {
        Denied {
            source: [10, 0, 0, 1].into(),
            who: Some(Arc::new(Who { namespace: "shop".into(), pod: "web".into(), node: "n1".into() })),
            name: Some("a.example\\046b".into()),
            address: Some("2001:db8::1".parse().unwrap()),
            protocol: Some(6),
            port: Some(443),
            qtype: None,
            reason: Reason::DeniedByPolicy,
            audit: true,
            rule: Some(RuleRef {
                kind: "EgressPolicy",
                namespace: "shop".into(),
                policy: "payments".into(),
                rule: "old".into(),
            }),
            count: 7,
        }
    }

    fn over(ack: &wire::FactsAck) -> Result<Vec<Denied>, WireError> {
        let ack = wire::FactsAck::decode(ack.encode_to_vec().as_slice()).unwrap();
        match super::super::FactsUp::try_from(ack)? {
            super::super::FactsUp::Denied(d) => Ok(d),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn denials_survive_the_wire() {
        let bare = Denied {
            who: None,
            name: None,
            address: None,
            protocol: None,
            port: None,
            rule: None,
            audit: false,
            qtype: Some(28),
            ..denied()
        };
        assert_eq!(over(&denials(&[denied(), bare.clone()])).unwrap(), [denied(), bare]);
        assert_eq!(over(&denials(&vec![denied(); 300])).unwrap().len(), MAX_DENIED);
        let message = crate::PeerMessage { denied: vec![denied()], ..Default::default() };
        let back = crate::PeerMessage::try_from(message.clone().into_messages().remove(0)).unwrap();
        assert_eq!(back, message);
    }

    #[test]
    fn bad_fields_are_refused_by_name() {
        let refused = |change: fn(&mut wire::Denied)| {
            let mut d = denied_to_wire(&denied());
            change(&mut d);
            denied_from_wire(vec![d], "x").unwrap_err().field
        };
        assert_eq!(refused(|d| d.source = vec![1]), "denied.source");
        assert_eq!(refused(|d| d.name = "a\nb".into()), "denied.name");
        assert_eq!(refused(|d| d.protocol = 256), "denied.protocol");
        assert_eq!(refused(|d| d.port = 70_000), "denied.port");
        assert_eq!(refused(|d| d.rule.as_mut().unwrap().kind = "Other".into()), "denied_rule.kind");
        assert_eq!(refused(|d| d.rule.as_mut().unwrap().rule = "a\u{1b}".into()), "denied_rule.rule");
        let newer = wire::Denied { reason: "of-tomorrow".into(), ..denied_to_wire(&denied()) };
        assert_eq!(denied_from_wire(vec![newer, denied_to_wire(&denied())], "x").unwrap().len(), 1);
    }
}
