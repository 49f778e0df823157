//! What the core's channel carries.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tidegate_kubernetes::members::Member;
use tidegate_kubernetes::pools;
use tidegate_ledger::{NodeId, OwnerId};
use tidegate_policy::denied::Denied;
use tidegate_policy::{Name, Reason, ScopeKey};
use tidegate_proto::wire::{FactsUpdate, PeerUpdate, StateUpdate};
use tidegate_proto::{PeerMessage, Seen};
use tokio::sync::{mpsc, oneshot};

use crate::desired::Compiled;
use crate::generations::Versions;
use crate::push::{Ack, StreamId};

/// What a DNS answer waits for.
pub struct Bind {
    /// The asking pod's scope.
    pub scope: ScopeKey,
    /// The asking pod's address.
    pub pod: IpAddr,
    /// The asking pod's node.
    pub node: NodeId,
    /// The namespace whose quotas count.
    pub owner: OwnerId,
    /// The name.
    pub name: Name,
    /// The addresses.
    pub addresses: Vec<IpAddr>,
    /// What is left of the RRset's TTL.
    pub ttl: Duration,
    /// The rule's least life of a binding.
    pub min_binding: Option<Duration>,
    /// The node must have confirmed the addresses in any case.
    pub acked: bool,
    /// Told which addresses are bound.
    pub reply: oneshot::Sender<Result<Vec<IpAddr>, Reason>>,
}

/// Messages to the core.
pub enum ToCore {
    /// Policy was compiled anew.
    World(Arc<Compiled>),
    /// What was compiled so far has seen the API server up to here.
    Versions(Versions),
    /// An answer waits for its addresses to be bound.
    Bind(Box<Bind>),
    /// A State stream is up.
    StateUp {
        /// The node's name, from its certificate.
        node: String,
        /// The stream.
        id: StreamId,
        /// Towards the node.
        out: mpsc::Sender<StateUpdate>,
    },
    /// A node applied a state.
    StateAck {
        /// The node's name.
        node: String,
        /// The stream.
        id: StreamId,
        /// What it holds.
        ack: Ack,
    },
    /// A State stream ended.
    StateDown {
        /// The node's name.
        node: String,
        /// The stream.
        id: StreamId,
    },
    /// A Facts stream is up.
    FactsUp {
        /// The node's name, from its certificate.
        node: String,
        /// The stream.
        id: StreamId,
        /// The agent's boot id.
        boot_id: u64,
        /// Towards the node.
        out: mpsc::Sender<FactsUpdate>,
    },
    /// A node applied facts.
    FactsAck {
        /// The node's name.
        node: String,
        /// The stream.
        id: StreamId,
        /// What it holds.
        ack: Ack,
    },
    /// A Facts stream ended.
    FactsDown {
        /// The node's name.
        node: String,
        /// The stream.
        id: StreamId,
    },
    /// What an agent sees of the gateways.
    Seen {
        /// The node's name.
        node: String,
        /// The Facts stream that said it.
        id: StreamId,
        /// What it sees.
        seen: Seen,
    },
    /// Who the gateways are now.
    Members(Vec<Member>),
    /// The API server said something of owners.
    Api(pools::Event),
    /// Another gateway asks for what this one knows.
    PeerUp {
        /// Its name, from its certificate.
        gateway: String,
        /// Towards it.
        out: mpsc::Sender<PeerUpdate>,
    },
    /// What this gateway denied, for the others.
    Denied(Vec<Denied>),
    /// Another gateway said something.
    Peer {
        /// Its name.
        gateway: String,
        /// What it said.
        message: PeerMessage,
    },
    /// The pod-facing device is there: attach the program to it.
    Attach {
        /// Told how it went.
        reply: oneshot::Sender<Result<(), String>>,
    },
    /// Nothing listens where another gateway did, at any of its addresses.
    PeerRefused {
        /// The other gateway.
        gateway: String,
    },
    /// The node's agent is gone: nothing is held there any more.
    Unplugged,
    /// This gateway is about to end: others take over what it holds.
    Leave {
        /// Told when they have, or cannot.
        reply: oneshot::Sender<()>,
    },
    /// End the thread.
    Stop,
}
