//! Nodes whose agent is away for longer than one takes to begin anew: people are told by Events of the Node. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use tidegate_kubernetes::events;

use crate::core::NodeStatus;

/// How long an agent is away before anybody is told.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is known of a node's agent that was once here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Agent {
    Here,
    /// Since when it is away, and whether that was told.
    Away(Duration, bool),
}

/// The agents that were ever connected to this gateway.
#[derive(Debug, Default)]
pub struct Absences(BTreeMap<String, Agent>);

impl Absences {
    /// What is to be told at `now`, since any moment. Nodes that are no part of the cluster any more are forgotten.
    pub fn look(&mut self, nodes: &BTreeMap<String, NodeStatus>, now: Duration) -> Vec<events::News> {
        self.0.retain(|node, _| nodes.contains_key(node));
        let mut told = Vec::new();
        for (node, status) in nodes {
            let next = match (self.0.get(node), status.connected) {
                (Some(Agent::Away(since, true)), true) => {
                    told.push(news(node, *since, Some(now.saturating_sub(*since))));
                    Agent::Here
                }
                (_, true) => Agent::Here,
                (None, false) => continue,
                (Some(Agent::Here), false) => Agent::Away(now, false),
                (Some(Agent::Away(since, false)), false) if now.saturating_sub(*since) >= PATIENCE => {
                    told.push(news(node, *since, None));
                    Agent::Away(*since, true)
                }
                (Some(away), false) => *away,
            };
            if self.0.get(node) != Some(&next) {
                self.0.insert(node.clone(), next);
            }
        }
        told
    }
}

/// The event of an agent that is away, or is back after so long.
fn news(node: &str, since: Duration, back: Option<Duration>) -> events::News {
    let note = match back {
        None => format!(
            "Tidegate's agent of {node} has not been connected to the gateway that leads for {} s. If it is away, the node's \
             kernel goes on with the policy that it holds, edits do not reach it, and of new pods the CNI plugin alone decides.",
            PATIENCE.as_secs()
        ),
        Some(after) => format!("Tidegate's agent of {node} is connected again, after {} s.", after.as_secs()),
    };
    let about = events::About::Agent { node: node.to_owned(), back: back.is_some(), since: since.as_secs() };
    events::News { namespace: events::CLUSTER.to_owned(), about, note }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_that_is_away_and_back_is_told_of_once_each() {
        let mut absences = Absences::default();
        let mut look = |connected: Option<bool>, at: u64| {
            let status = |connected| ("n1".to_owned(), NodeStatus { connected, ..NodeStatus::default() });
            let told = absences.look(&connected.map(status).into_iter().collect(), Duration::from_secs(at));
            told.into_iter().map(|n| n.note).collect::<Vec<_>>()
        };
        // One that never came is not missed, and one that begins anew is not told of.
        assert!(look(Some(false), 0).is_empty() && look(Some(false), 100).is_empty());
        for (connected, at) in [(true, 101), (false, 102), (false, 106), (true, 108), (false, 110), (false, 114)] {
            assert_eq!(look(Some(connected), at), [""; 0], "{at}");
        }
        let gone = look(Some(false), 115);
        assert!(
            gone.len() == 1 && gone[0].contains("n1 has not been connected to the gateway that leads for 5 s"),
            "{gone:?}"
        );
        assert!(look(Some(false), 200).is_empty());
        assert_eq!(look(Some(true), 210), ["Tidegate's agent of n1 is connected again, after 100 s."]);
        assert!(look(Some(true), 211).is_empty());
        // A node that is gone is forgotten.
        assert!(look(Some(false), 212).is_empty() && look(None, 213).is_empty() && look(Some(false), 300).is_empty());
    }
}
