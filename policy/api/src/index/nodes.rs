//! Whose an internal address is that several nodes claim: that of the node that was created first, of equals that of the first by
//! name. What a kubelet says of its own addresses nobody checks, and a stolen one must not take those of others.

use std::collections::BTreeMap;
use std::net::IpAddr;

use tidegate_policy::model::Node;

use crate::problem::{Code, FieldPath, FieldProblem, Severity};

/// What nodes say of themselves.
#[derive(Debug, Default)]
pub(super) struct Claims {
    /// By name, each with when it was created, as the API server writes it (RFC 3339, UTC).
    said: BTreeMap<String, (String, Node)>,
}

/// A node as it counts, with what of it does not.
pub(super) type Settled = (Node, Vec<FieldProblem>);

impl Claims {
    /// A node says this of itself now, or is gone. Says whether that is news.
    pub fn set(&mut self, name: &str, node: Option<(String, Node)>) -> bool {
        match node {
            Some(new) => {
                let same = self.said.get(name) == Some(&new);
                self.said.insert(name.to_owned(), new);
                !same
            }
            None => self.said.remove(name).is_some(),
        }
    }

    /// All nodes as they count.
    pub fn settled(&self) -> BTreeMap<&str, Settled> {
        // One of which nobody knows when it was created is the youngest.
        let age = |(created, _): &(String, Node)| (created.is_empty(), created.clone());
        let mut owners: BTreeMap<IpAddr, (&str, (bool, String))> = BTreeMap::new();
        for (name, said) in &self.said {
            for ip in &said.1.addresses {
                let age = age(said);
                // In the order of their names: of equals the first stays.
                if owners.get(ip).is_none_or(|(_, other)| age < *other) {
                    owners.insert(*ip, (name, age));
                }
            }
        }
        let settle = |(name, (_, node)): (&'_ String, &(String, Node))| -> Settled {
            let mut out = node.clone();
            let mut problems = Vec::new();
            out.addresses.retain(|ip| match owners.get(ip) {
                Some((owner, _)) if *owner != name.as_str() => {
                    problems.push(FieldProblem {
                        severity: Severity::Refused,
                        code: Code::Invalid,
                        path: FieldPath::default(),
                        message: format!("status.addresses: {ip} is the node {owner}'s, which was there first; it does not count here"),
                    });
                    false
                }
                _ => true,
            });
            (out, problems)
        };
        self.said.iter().map(|entry| (entry.0.as_str(), settle(entry))).collect()
    }
}
