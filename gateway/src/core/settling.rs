//! Pods whose node has not confirmed yet what an edit made of them.
//!
//! An edit can put a pod into another group. Until its node's kernel holds that, the pod's packets meet the old
//! group's grants, and an answer that came before would cost it its first packet. So its answers wait for the node's ack of
//! that state, as they wait for the ack of facts.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};

use ahash::AHashMap;
use parking_lot::RwLock;
use tidegate_ledger::NodeId;

/// By node and pod address, the sequence of the state that the node must ack. The core writes, DNS workers read.
#[derive(Debug, Default)]
pub struct Settling {
    /// Whether there is anything, which there mostly is not.
    any: AtomicBool,
    nodes: RwLock<AHashMap<NodeId, AHashMap<IpAddr, u64>>>,
}

impl Settling {
    /// Whether answers to this pod must wait.
    pub fn has(&self, node: NodeId, pod: IpAddr) -> bool {
        self.any.load(Ordering::Acquire) && self.nodes.read().get(&node).is_some_and(|pods| pods.contains_key(&pod))
    }

    /// A node was sent a state that changes these pods.
    pub(super) fn sent(&self, node: NodeId, sequence: u64, pods: impl Iterator<Item = IpAddr>) {
        let mut pods = pods.peekable();
        if pods.peek().is_some() {
            self.any.store(true, Ordering::Release);
            self.nodes.write().entry(node).or_default().extend(pods.map(|pod| (pod, sequence)));
        }
    }

    /// The node holds the states up to this one.
    pub(super) fn acked(&self, node: NodeId, sequence: u64) {
        self.keep(node, |needed| needed > sequence);
    }

    /// The node's acks do not matter any more: its kernel steers what it does not know, and begins anew when it is back.
    pub(super) fn forget(&self, node: NodeId) {
        self.keep(node, |_| false);
    }

    fn keep(&self, node: NodeId, keep: impl Fn(u64) -> bool) {
        let mut nodes = self.nodes.write();
        let Some(pods) = nodes.get_mut(&node) else { return };
        pods.retain(|_, needed| keep(*needed));
        if pods.is_empty() {
            nodes.remove(&node);
        }
        if nodes.is_empty() {
            self.any.store(false, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_waits_for_the_state_that_changed_it_last() {
        let (node, other, pod) = (NodeId(1), NodeId(2), IpAddr::from([10, 0, 0, 1]));
        let settling = Settling::default();
        settling.sent(node, 3, [pod].into_iter());
        settling.sent(node, 5, [pod].into_iter());
        assert!(settling.has(node, pod) && !settling.has(other, pod));
        settling.acked(node, 4);
        settling.acked(other, 9);
        assert!(settling.has(node, pod));
        settling.acked(node, 5);
        assert!(!settling.has(node, pod));
        settling.sent(node, 6, [pod].into_iter());
        settling.forget(node);
        assert!(!settling.has(node, pod));
        assert!(settling.nodes.read().is_empty());
    }
}
