//! What holds of a policy that cannot be read and of which no good version is known, as after a restart: the strictest
//! of what can be read. Without it, what it denied would be open.

use std::sync::Arc;

use ipnet::IpNet;
use tidegate_policy::model;

use crate::convert::{self, Ctx, MAX_PRIORITY};
use crate::de;
use crate::format;
use crate::manifest::{Kind, Object};
use crate::resource::{CidrPeer, FqdnPeer, LabelSelector, Port};
use crate::rule;
use crate::tree::{Tree, Value};

/// Every port of every protocol.
const EVERY_PORT: model::Ports = model::Ports { proto: None, lo: 0, hi: u16::MAX };

/// What holds of a bad object; nothing where it is staged, and of kinds that are no policies.
pub(crate) fn closed(kind: Kind, tree: &Tree) -> Option<Object> {
    let spec = tree.get("spec");
    let field = |name: &str| spec.and_then(|s| s.get(name));
    if field("mode").and_then(Tree::text) == Some("Staged") {
        return None;
    }
    match kind {
        Kind::EgressPolicy => Some(Object::Policy(model::Policy {
            created: model::UnixSeconds(0),
            pod_selector: field("podSelector").and_then(selector).unwrap_or_default(),
            mode: model::PolicyMode::Enforce,
            pool: None,
            egress: Vec::new(),
            deny: items(field("egressDeny")).enumerate().flat_map(|(i, r)| deny(i, r)).collect(),
        })),
        Kind::ClusterEgressPolicy => Some(Object::ClusterPolicy(cluster_policy(spec))),
        _ => None,
    }
}

/// Its denies hold, those among them of which cannot be read that they are none. What it accepts or lets pass does not, and
/// its ceiling, if it may have one, holds nothing.
fn cluster_policy(spec: Option<&Tree>) -> model::ClusterPolicy {
    let field = |name: &str| spec.and_then(|s| s.get(name)).filter(|t| !matches!(t.value, Value::Null));
    let subject = field("subject");
    let namespaces = subject.and_then(|s| s.get("namespaceSelector")).and_then(selector);
    let pods = subject.and_then(|s| s.get("podSelector")).and_then(selector);
    let priority = field("priority").and_then(|p| match p.value {
        Value::Int(n) if (0..=i128::from(MAX_PRIORITY)).contains(&n) => u16::try_from(n).ok(),
        _ => None,
    });
    let denies = items(field("egress")).enumerate();
    let denies = denies.filter(|(_, r)| !matches!(r.get("action").and_then(Tree::text), Some("Accept" | "Pass")));
    let is_read = spec.is_some_and(|s| matches!(s.value, Value::Map(_)));
    model::ClusterPolicy {
        tier: match field("tier").and_then(Tree::text) {
            Some("Baseline") => model::Tier::Baseline,
            _ => model::Tier::Admin,
        },
        priority: priority.unwrap_or(0),
        mode: model::PolicyMode::Enforce,
        subject_lost: namespaces.is_none(),
        namespaces: namespaces.unwrap_or_default(),
        pods: pods.unwrap_or_default(),
        rules: denies.flat_map(|(i, r)| deny(i, r)).map(|r| (model::Action::Deny, r)).collect(),
        ceiling: (!is_read || field("ceiling").is_some()).then(model::Ceiling::default),
    }
}

fn items(list: Option<&Tree>) -> impl Iterator<Item = &Tree> {
    let items: &[Tree] = match list.map(|l| &l.value) {
        Some(Value::List(items)) => items,
        _ => &[],
    };
    items.iter()
}

/// Converts what can be read without an error.
fn read<S: serde::de::DeserializeOwned, T>(tree: &Tree, step: impl FnOnce(&mut Ctx, &S) -> T) -> Option<T> {
    let part = de::read::<S>(tree, &[], false).ok()?;
    let mut ctx = Ctx::default();
    let value = step(&mut ctx, &part);
    ctx.finish(Some(value)).value
}

fn selector(tree: &Tree) -> Option<model::Selector> {
    read(tree, |ctx, s: &LabelSelector| convert::selector(ctx, s))
}

/// What a deny is to, name by name and prefix by prefix; at every port if its ports cannot be read. It ends as it says.
fn deny(index: usize, tree: &Tree) -> Vec<model::Rule> {
    let fqdn = |t: &Tree| read(t, |ctx, f: &FqdnPeer| rule::fqdns(ctx, std::slice::from_ref(f), false));
    let fqdns: Vec<model::Fqdn> = items(tree.get("toFQDNs")).filter_map(fqdn).flatten().collect();
    let cidrs: Vec<model::Cidr> = items(tree.get("toCIDRs")).filter_map(cidr).collect();
    let port = |t: &Tree| read(t, |ctx, p: &Port| rule::ports(ctx, std::slice::from_ref(p), true));
    let ports: Option<Vec<Vec<model::Ports>>> = items(tree.get("toPorts")).map(port).collect();
    let ports = ports.map(|p| p.concat()).filter(|p| !p.is_empty()).unwrap_or_else(|| vec![EVERY_PORT]);
    let name = tree.get("name").and_then(Tree::text).filter(|n| format::is_rule_name(n));
    let rule = model::Rule {
        expires: tree.get("expireTime").and_then(Tree::text).and_then(format::time),
        ..model::Rule::new(name.map_or_else(|| Arc::from(index.to_string()), Arc::from), ports)
    };
    let to_fqdns = (!fqdns.is_empty()).then(|| model::Rule { fqdns, ..rule.clone() });
    let to_cidrs = (!cidrs.is_empty()).then_some(model::Rule { cidrs, ..rule });
    to_fqdns.into_iter().chain(to_cidrs).collect()
}

/// A prefix, without its exceptions if those cannot be read.
fn cidr(tree: &Tree) -> Option<model::Cidr> {
    let whole = read(tree, |ctx, c: &CidrPeer| rule::cidrs(ctx, std::slice::from_ref(c), false));
    whole.and_then(|c| c.into_iter().next()).or_else(|| {
        let cidr: IpNet = rule::prefix(tree.get("cidr")?.text()?).ok()?;
        Some(model::Cidr { cidr, except: Vec::new() })
    })
}
