//! What `tidegate status` shows.

use std::collections::BTreeMap;

use serde::Serialize;

/// A node's part of the status.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeStatus {
    /// Whether both streams are up.
    pub connected: bool,
    /// The last state sent.
    pub sent: u64,
    /// The last state that its kernel holds.
    pub applied: u64,
    /// Why the last one could not be applied in whole.
    pub error: Option<String>,
    /// The last compile of which its kernel holds all that concerns it; 0 while nothing is known of it.
    pub held: u64,
}

/// What `tidegate status` shows of the core.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Nodes by name.
    pub nodes: BTreeMap<String, NodeStatus>,
    /// Learnt facts.
    pub facts: usize,
    /// Live relayed connections.
    pub connections: usize,
    /// Who owns which egress pair.
    pub pairs: Vec<PairStatus>,
    /// What is wrong with that.
    #[serde(skip)]
    pub problems: Vec<String>,
}

/// A pair's part of the status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PairStatus {
    /// Its pool and addresses.
    pub pair: String,
    /// The owning gateway.
    pub owner: String,
    /// The epoch of that.
    pub epoch: u64,
    /// Who owned it before, if this gateway saw it move.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// Whether this gateway is the owner and serves it.
    pub held: bool,
}
