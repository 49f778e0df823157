//! What one node was sent. Pure.
//!
//! Grants reach a node by two streams. With the first facts of a class they go by the Facts stream, so that the ack of
//! those covers them. But that message may be lost with its stream, and an older one of the State stream that is still on
//! its way may take away what it brought: so the State stream names them too, next.

use tidegate_policy::state::{Entry, NodeState};
use tidegate_proto::{GrantEntry, StateBatch};

/// What the State stream of a node has said, and how much of it the node holds.
#[derive(Default)]
pub struct Sent {
    pub(super) state: NodeState,
    /// Whether the stream has begun with a snapshot, as each must.
    pub(super) begun: bool,
    pub(super) sequence: u64,
    applied: u64,
}

impl Sent {
    /// A stream begins: the node may hold anything.
    pub fn anew(&mut self) {
        (self.state, self.begun) = (NodeState::default(), false);
    }

    /// The last sequence.
    pub const fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The node holds everything up to a sequence.
    pub fn applied(&mut self, sequence: u64) {
        self.applied = sequence;
    }

    /// What makes the node hold `wanted`; `None` if it was told already. `gateway` and `boot_id` are the sender's.
    pub fn state(&mut self, gateway: &str, boot_id: u64, wanted: NodeState) -> Option<StateBatch> {
        let snapshot = !std::mem::replace(&mut self.begun, true);
        let (set, delete) = if snapshot { (wanted.entries(), Vec::new()) } else { self.state.diff(&wanted) };
        if !snapshot && set.is_empty() && delete.is_empty() {
            return None;
        }
        self.sequence += 1;
        self.state = wanted;
        let gateway = gateway.to_owned();
        Some(StateBatch { gateway, boot_id, sequence: self.sequence, snapshot, more: false, set, delete })
    }

    /// Of the grants that facts need, those that must go with them: what the node was told but has not confirmed yet, or
    /// not told, the ack of these facts must not rely on. `up`: whether there is a State stream.
    pub fn missing(&self, up: bool, grants: impl Iterator<Item = GrantEntry>) -> Vec<GrantEntry> {
        let behind = !up || self.sequence > self.applied;
        grants.filter(|g| behind || !self.has(g)).collect()
    }

    /// Names grants that went with facts; `None` if the stream has said them, or has not begun.
    pub fn name(&mut self, gateway: &str, boot_id: u64, grants: &[GrantEntry]) -> Option<StateBatch> {
        let new = grants.iter().filter(|g| !self.has(g));
        let set: Vec<Entry> = new.map(|g| Entry::Grant(g.group, g.class, g.ports.clone())).collect();
        if !self.begun || set.is_empty() {
            return None;
        }
        set.iter().for_each(|e| self.state.set(e.clone()));
        self.sequence += 1;
        let (gateway, sequence) = (gateway.to_owned(), self.sequence);
        Some(StateBatch { gateway, boot_id, sequence, snapshot: false, more: false, set, delete: Vec::new() })
    }

    fn has(&self, g: &GrantEntry) -> bool {
        self.state.grants.get(&(g.group, g.class)) == Some(&g.ports)
    }
}

#[cfg(test)]
mod tests {
    use tidegate_policy::{ClassKey, GroupKey, PortSet};

    use super::*;

    #[test]
    fn grants_that_went_with_facts_are_named_once() {
        let mut sent = Sent::default();
        let grant = GrantEntry { group: GroupKey(1), class: ClassKey(2), ports: PortSet::default() };
        let mut wanted = NodeState::default();
        assert!(sent.name("g", 1, std::slice::from_ref(&grant)).is_none(), "a snapshot comes first");
        assert!(sent.state("g", 1, wanted.clone()).is_some_and(|s| s.snapshot));
        assert_eq!(sent.missing(true, [grant.clone()].into_iter()).len(), 1);
        let named = sent.name("g", 1, std::slice::from_ref(&grant)).expect("the stream has not said it");
        assert_eq!((named.sequence, named.set.len(), named.snapshot), (2, 1, false));
        assert!(sent.name("g", 1, std::slice::from_ref(&grant)).is_none());
        // Not confirmed yet: it goes with facts again.
        assert_eq!(sent.missing(true, [grant.clone()].into_iter()).len(), 1);
        sent.applied(2);
        assert!(sent.missing(true, [grant.clone()].into_iter()).is_empty());
        assert_eq!(sent.missing(false, [grant.clone()].into_iter()).len(), 1);
        wanted.set(Entry::Grant(grant.group, grant.class, grant.ports.clone()));
        assert!(sent.state("g", 1, wanted).is_none());
        assert_eq!(sent.state("g", 1, NodeState::default()).map(|s| s.delete.len()), Some(1));
        sent.anew();
        assert!(sent.state("g", 1, NodeState::default()).is_some_and(|s| s.snapshot));
    }
}
