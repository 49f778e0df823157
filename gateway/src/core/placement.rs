//! Where the pods of scopes are.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use tidegate_policy::ScopeKey;
use tidegate_policy::world::{Endpoint, World};

/// Which nodes have a pod of which scope.
#[derive(Debug, Default)]
pub(super) struct Placement {
    /// With the number of endpoints.
    scopes: BTreeMap<(ScopeKey, Arc<str>), u32>,
}

impl Placement {
    /// Follows one world to the next, in which these addresses may be others'. Returns where scopes have no endpoint any
    /// more.
    pub fn follow(&mut self, old: &World, new: &World, changed: &[IpAddr]) -> BTreeSet<(ScopeKey, Arc<str>)> {
        let mut left = BTreeSet::new();
        for ip in changed {
            let place = |e: &Endpoint| Some((e.member?.scope, e.who.node.clone()));
            if let Some(place) = new.endpoint(*ip).and_then(place) {
                *self.scopes.entry(place).or_default() += 1;
            }
            if let Some(place) = old.endpoint(*ip).and_then(place)
                && let Some(n) = self.scopes.get_mut(&place)
            {
                *n -= 1;
                if *n == 0 {
                    self.scopes.remove(&place);
                    left.insert(place);
                }
            }
        }
        left.retain(|place| !self.scopes.contains_key(place));
        left
    }

    /// Whether a node has a pod of a scope.
    pub fn has(&self, scope: ScopeKey, node: &str) -> bool {
        self.scopes.contains_key(&(scope, node.into()))
    }

    /// The nodes that have such pods.
    pub fn nodes(&self) -> BTreeSet<Arc<str>> {
        self.scopes.keys().map(|(_, node)| node.clone()).collect()
    }

    /// How many pairs of scope and node there are.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.scopes.len()
    }
}
