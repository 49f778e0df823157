//! The ledger: which scope was told that which name has which address, until
//! when, and which kernels have confirmed it.
//!
//! One thread owns a [`Ledger`] and feeds it [`Input`]s; what should happen comes
//! back as [`Output`]s, to be carried out in order. It opens no socket and reads
//! no clock, so that every rule can be tested and simulated. Other threads read
//! the same tables through [`Bindings`].
//!
//! ```text
//! answer ─▶ quota ─▶ fact (scope, name, address, expiry) ─▶ class of the address
//!        ─▶ Local (own kernel) ─▶ Push (asking pod's node) ─▶ … Ack ─▶ Release
//! ```
//!
//! The words: a *fact* binds a name to an address within a scope. All facts of one
//! address make one *kernel entry*, which holds the class of the address and its
//! latest expiry. A node that has the entry is a *holder*. A fact that has expired
//! stays, without letting new connections start, until somebody says that the
//! address carries no flow any more ([`Input::Idle`]), or [`Config::sweep`] has passed.
//!
//! Times are durations since boot on the monotonic clock. They are kept in tenths
//! of a second; expiries are rounded down, demands up.
#![forbid(unsafe_code)]

mod answer;
mod bindings;
mod ledger;
mod node;
mod slab;
mod table;
mod tick;

#[cfg(test)]
mod tests;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tidegate_policy::state::FactUpdate;
use tidegate_policy::{ClassKey, Name, Reason, ScopeKey};

pub use bindings::{Addresses, Bindings, Bound, Names};
pub use ledger::{Counts, Ledger, Usage};

/// The longest life of a fact, whatever a rule's `minBindingSeconds` says.
pub const MAX_BINDING: Duration = Duration::from_secs(7 * 24 * 3600);

/// A node, by the caller's dense id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u32);

/// A namespace that quotas belong to, by the caller's dense id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OwnerId(pub u32);

/// What one namespace may hold at most, expired facts included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quotas {
    /// Facts: pairs of name and address.
    pub facts: u32,
    /// Names.
    pub names: u32,
    /// Addresses of one name.
    pub addresses_per_name: u32,
}

/// Settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Shorter TTLs count as this long.
    pub ttl_min: Duration,
    /// Longer TTLs count as this long.
    pub ttl_max: Duration,
    /// How much longer than its TTL a fact holds; at least `hello_timeout` is used.
    pub grace: Duration,
    /// How much earlier nodes' kernels expire a fact, so that a hello that is still awaited is judged in time.
    pub hello_timeout: Duration,
    /// How long a reply waits for a node's kernel.
    pub barrier: Duration,
    /// After how long without its stream a node's misses are steered, so that replies need no ack.
    pub steer_after: Duration,
    /// When an expired fact is deleted although nobody said that it is idle.
    pub sweep: Duration,
    /// How often [`Output::CheckIdle`] is repeated for an expired fact.
    pub recheck: Duration,
    /// Per-namespace quotas.
    pub quotas: Quotas,
    /// How many replies may wait at the same time.
    pub max_waiting: usize,
    /// How many pushed facts a node may leave without ack before it gets a snapshot instead of more.
    pub max_unacked: usize,
    /// Whether [`Ledger::changes`] is asked: what changed is kept until then.
    pub track: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            ttl_min: Duration::from_secs(30),
            ttl_max: Duration::from_secs(3600),
            grace: Duration::from_secs(60),
            hello_timeout: Duration::from_secs(10),
            barrier: Duration::from_millis(200),
            steer_after: Duration::from_millis(2500),
            sweep: Duration::from_secs(24 * 3600),
            recheck: Duration::from_secs(60),
            quotas: Quotas { facts: 16384, names: 8192, addresses_per_name: 64 },
            max_waiting: 65536,
            max_unacked: 65536,
            track: false,
        }
    }
}

/// Finds the class of an address: the set of rules that it and the names bound to it match.
pub trait Classify {
    /// The class of `ip` in `scope` while `names` are bound to it (at least one). Must not
    /// write to the ledger; may read [`Bindings`].
    fn class(&self, scope: ScopeKey, ip: IpAddr, names: &mut dyn Iterator<Item = &Name>) -> ClassKey;
}

impl<T: Classify + ?Sized> Classify for Arc<T> {
    fn class(&self, scope: ScopeKey, ip: IpAddr, names: &mut dyn Iterator<Item = &Name>) -> ClassKey {
        (**self).class(scope, ip, names)
    }
}

/// A checked answer whose addresses are to be bound before the reply goes out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Names the reply in [`Output::Release`] and [`Output::Fail`]; unique among waiting replies.
    pub ticket: u64,
    /// The asking pod's scope.
    pub scope: ScopeKey,
    /// The namespace whose quota counts.
    pub owner: OwnerId,
    /// The asking pod's node.
    pub node: NodeId,
    /// The name that a rule allows.
    pub name: Name,
    /// The addresses; duplicates count once. None: the reply is released at once.
    pub addresses: Vec<IpAddr>,
    /// What is left of the RRset's TTL (not of a reply's, which may be shorter).
    pub ttl: Duration,
    /// The rule's `minBindingSeconds`: the least life of a newly learnt or refreshed fact; at most [`MAX_BINDING`].
    pub min_binding: Option<Duration>,
    /// The node must have confirmed the addresses, even when it steers what it does not know: this pod's packets it passes.
    pub acked: bool,
}

/// One fact with all that is needed to learn it again elsewhere or after a restart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FactRecord {
    /// The scope.
    pub scope: ScopeKey,
    /// The namespace whose quota counts.
    pub owner: OwnerId,
    /// The name.
    pub name: Name,
    /// The address.
    pub ip: IpAddr,
    /// Until it expires; zero for an expired fact that may still carry flows.
    pub remaining: Duration,
    /// What is left of the RRset's TTL.
    pub ttl: Duration,
    /// The nodes whose kernels have the address.
    pub nodes: Vec<NodeId>,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Nothing but time: call it at [`Ledger::next_deadline`].
    Tick,
    /// A name was resolved for a pod.
    Answer(Answer),
    /// A node's Facts stream is up, from the agent that had it before: what it acked still
    /// holds. It gets a snapshot.
    NodeUp {
        /// The node.
        node: NodeId,
    },
    /// A node's Facts stream is up and nothing is known of its kernel (first contact, new agent). It gets a snapshot.
    NodeReset {
        /// The node.
        node: NodeId,
    },
    /// A node's Facts stream is down.
    NodeDown {
        /// The node.
        node: NodeId,
    },
    /// The node is no part of the cluster any more. Replies that wait for it fail.
    NodeGone {
        /// The node.
        node: NodeId,
    },
    /// A node has applied everything up to a sequence. Sequences that were never sent are ignored.
    Ack {
        /// The node.
        node: NodeId,
        /// The sequence, from [`Output::Push`].
        seq: u64,
    },
    /// The node's kernel holds addresses of which nobody told this ledger, and whose gateway may be gone: the node becomes a
    /// holder of those that are known, and of the others once they are. Replaces what was said before; forgotten with
    /// the node's stream.
    Orphans {
        /// The node.
        node: NodeId,
        /// The addresses; only of scopes that the node has pods of.
        facts: Vec<(ScopeKey, IpAddr)>,
    },
    /// Policy changed: classes are found anew, for one scope at once, for all in slices
    /// ([`Ledger::next_deadline`] says that more is to do). No fact is discarded.
    Reclassify {
        /// The scope; `None` means all.
        scope: Option<ScopeKey>,
    },
    /// An address of which [`Output::CheckIdle`] asked carries no flow: its expired facts go.
    Idle {
        /// The scope.
        scope: ScopeKey,
        /// The address.
        ip: IpAddr,
    },
    /// The scope's last endpoint on a node is gone: the node's copies of its facts go.
    ScopeLeft {
        /// The scope.
        scope: ScopeKey,
        /// The node.
        node: NodeId,
    },
    /// The scope is gone with all of its endpoints: so are its facts. Replies that wait fail.
    ScopeGone {
        /// The scope.
        scope: ScopeKey,
    },
    /// Facts from the journal or from a peer; where one is known already, the later expiry holds.
    Import(Vec<FactRecord>),
}

/// What should happen, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// For the gateway's own kernel, before any later [`Output::Release`].
    Local(FactUpdate),
    /// For a node's kernel. Acks are cumulative; several may be sent as one under the last sequence.
    Push {
        /// The node.
        node: NodeId,
        /// Rises by one with every push to the node, over all of its streams.
        seq: u64,
        /// Replaces all facts that the node has from this gateway.
        snapshot: bool,
        /// The facts, in the order in which to apply them.
        facts: Vec<FactUpdate>,
    },
    /// The reply may go out with these addresses, those that are bound.
    Release {
        /// From the answer.
        ticket: u64,
        /// The bound addresses, in the order of the answer.
        addresses: Vec<IpAddr>,
    },
    /// The reply must not go out.
    Fail {
        /// From the answer.
        ticket: u64,
        /// [`Reason::BarrierTimeout`] or [`Reason::Quota`].
        reason: Reason,
    },
    /// A fact of the address has expired: answer with [`Input::Idle`] as soon as no flow
    /// of the scope to the address lives. Asked again every [`Config::recheck`].
    CheckIdle {
        /// The scope.
        scope: ScopeKey,
        /// The address.
        ip: IpAddr,
    },
    /// The scope has no name for the address any more.
    Unbound {
        /// The scope.
        scope: ScopeKey,
        /// The address.
        ip: IpAddr,
    },
}
