//! What the ledger says to our own kernel and to nodes, as one message for each.

use std::collections::BTreeMap;

use tidegate_ledger::{NodeId, Output};
use tidegate_policy::state::FactUpdate;

/// What one node is told.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Push {
    /// The last sequence of what is in it: acks are cumulative.
    pub seq: u64,
    /// Whether these are all facts.
    pub snapshot: bool,
    /// The facts, in the order in which they were said.
    pub facts: Vec<FactUpdate>,
}

/// Takes out what is for our own kernel, and what is for nodes.
pub fn take(out: &mut Vec<Output>) -> (Vec<FactUpdate>, BTreeMap<NodeId, Push>) {
    let mut updates = Vec::new();
    let mut pushes: BTreeMap<NodeId, Push> = BTreeMap::new();
    out.retain_mut(|output| match output {
        Output::Local(update) => {
            updates.push(update.clone());
            false
        }
        Output::Push { node, seq, snapshot, facts } => {
            let push = pushes.entry(*node).or_default();
            if *snapshot {
                // It says all that was said before.
                *push = Push { snapshot: true, ..Push::default() };
            }
            push.seq = *seq;
            push.facts.append(facts);
            false
        }
        _ => true,
    });
    (updates, pushes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_policy::ScopeKey;

    fn fact(last: u8) -> FactUpdate {
        FactUpdate { scope: ScopeKey(1), ip: [192, 0, 2, last].into(), value: None }
    }

    #[test]
    fn a_node_is_told_once_and_a_snapshot_replaces_what_came_before() {
        let push =
            |node, seq, snapshot, last| Output::Push { node: NodeId(node), seq, snapshot, facts: vec![fact(last)] };
        let kept = Output::Release { ticket: 7, addresses: Vec::new() };
        let mut out = vec![
            push(1, 1, false, 1),
            push(2, 1, false, 2),
            Output::Local(fact(1)),
            push(1, 2, true, 3),
            kept.clone(),
            push(1, 3, false, 4),
            push(2, 2, false, 5),
        ];
        let (updates, pushes) = take(&mut out);
        assert_eq!((updates, out), (vec![fact(1)], vec![kept]));
        let one = Push { seq: 3, snapshot: true, facts: vec![fact(3), fact(4)] };
        let two = Push { seq: 2, snapshot: false, facts: vec![fact(2), fact(5)] };
        assert_eq!(pushes, [(NodeId(1), one), (NodeId(2), two)].into());
    }
}
