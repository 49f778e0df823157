//! The border between a relay and what decides: compiled policy and learnt facts.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tidegate_policy::event::{RuleRef, Who};
use tidegate_policy::{GroupKey, Name, Reason, ScopeKey};

use crate::Sni;

/// A pod as the relay knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// What its events say of it.
    pub who: Arc<Who>,
    /// Its unit of learning.
    pub scope: ScopeKey,
    /// Its unit of decision.
    pub group: GroupKey,
    /// The group's dense index in the compiled policy of the scope.
    pub group_index: u32,
}

/// What was decided about a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// It may go on.
    Allow {
        /// The name that is allowed and bound; absent where a prefix allows the destination.
        name: Option<Name>,
        /// The rule that allows it.
        rule: Option<RuleRef>,
        /// Other addresses that this scope currently has bound to the name, to race when the asked one does not answer.
        others: Vec<IpAddr>,
    },
    /// It is refused.
    Deny {
        /// Why.
        reason: Reason,
        /// The rule that denies it, if one did.
        rule: Option<RuleRef>,
    },
}

/// How a connection leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Egress {
    /// The source address; absent where the routing table chooses (PodNetwork).
    pub source: Option<IpAddr>,
    /// The socket mark of the upstream leg; 0 for none.
    pub mark: u32,
}

/// Decides about connections. All four facts meet in [`Check::judge`]: the namespace's policy, its
/// DNS answers, the destination, and the name in the hello. Never blocks.
pub trait Check: Send + Sync + 'static {
    /// The pod with this address, if it is known here.
    fn client(&self, ip: IpAddr) -> Option<Client>;

    /// Whether this pod may connect to `destination` with a hello that says `sni` and `ech`.
    fn judge(&self, client: &Client, destination: SocketAddr, sni: &Sni, ech: bool) -> Judgement;

    /// How this pod's connections of an IP family leave, or the reason why there is no way.
    fn egress(&self, client: &Client, v6: bool) -> Result<Egress, Reason>;

    /// Whether `destination` is the gateway's own, a node's or the API server's: never a relay's destination.
    fn forbidden(&self, destination: SocketAddr) -> bool;
}
