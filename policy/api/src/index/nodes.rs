//! Whose an internal address is that several nodes claim: that of the node that was created first, of equals that of the first by
//! name. What a kubelet says of its own addresses nobody checks, and a stolen one must not take those of others.

use std::collections::BTreeMap;
use std::net::IpAddr;

use tidegate_policy::model::Node;

/// What nodes say of themselves.
#[derive(Debug, Default)]
pub(super) struct Claims {
    said: BTreeMap<String, Node>,
    /// When each was created, as the API server writes it (RFC 3339, UTC).
    created: BTreeMap<String, String>,
}

/// Nodes as they count.
pub(super) struct Settled {
    pub nodes: BTreeMap<String, Node>,
    /// What does not count of each, in a sentence.
    pub contested: BTreeMap<String, Vec<String>>,
}

impl Claims {
    /// Notes when a node was created.
    pub fn created(&mut self, name: &str, time: String) {
        self.created.insert(name.to_owned(), time);
    }

    /// A node says this of itself now, or is gone. Says whether that is news.
    pub fn set(&mut self, name: &str, node: Option<Node>) -> bool {
        match node {
            Some(new) => {
                self.said.get(name) != Some(&new) && {
                    self.said.insert(name.to_owned(), new);
                    true
                }
            }
            None => {
                // Its time stays until another one of its name says its own.
                self.said.remove(name).is_some()
            }
        }
    }

    /// The older is the less. One of which nobody knows when it was created is the youngest.
    fn age<'a>(&'a self, name: &'a str) -> (bool, &'a str, &'a str) {
        let created = self.created.get(name).map_or("", String::as_str);
        (created.is_empty(), created, name)
    }

    /// All nodes as they count.
    pub fn settled(&self) -> Settled {
        let mut owners: BTreeMap<IpAddr, &str> = BTreeMap::new();
        for (name, node) in &self.said {
            for ip in &node.addresses {
                let owner = owners.entry(*ip).or_insert(name);
                if self.age(name) < self.age(owner) {
                    *owner = name;
                }
            }
        }
        let mut out = Settled { nodes: self.said.clone(), contested: BTreeMap::new() };
        for (name, node) in &mut out.nodes {
            node.addresses.retain(|ip| match owners.get(ip) {
                Some(owner) if *owner != name.as_str() => {
                    let text = format!("status.addresses: {ip} does not count: it is the older node {owner}'s");
                    out.contested.entry(name.clone()).or_default().push(text);
                    false
                }
                _ => true,
            });
        }
        out
    }
}
