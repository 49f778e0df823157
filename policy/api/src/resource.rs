//! The resources of `tidegate.dev/v1alpha1` as they are written.
//!
//! These types are the one source of the fields: the directory reader reads them, and the CRDs are generated from them
//! (`crate::crd`). Their doc comments are what `kubectl explain` says, so they speak to people who write manifests; their
//! limits are constants of [`crate::convert`] and [`crate::rule`], which check them. Unknown fields are refused and
//! nothing is coerced.

mod meta;
mod policy;
mod pool;
mod selector;
mod status;

pub(crate) use meta::RawMeta;

pub use meta::Meta;
pub use policy::{
    Action, Ceiling, CidrPeer, ClusterEgressPolicySpec, Ech, EgressPolicySpec, FqdnPeer, Mode, OnRevoke, Permit,
    PoolRef, Port, Protocol, Quic, Rule, Sni, Subject, Tier, Unread,
};
pub use pool::{AddressSource, EgressPoolSpec, PairSpec, PairState, StaticSource};
pub use selector::{LabelExpression, LabelOperator, LabelSelector};
pub use status::{
    Cause, Condition, ConditionStatus, Denial, EgressPoolStatus, HeldPair, HostNetworkPods, Isolation,
    NamespaceEgressStatus, NamespaceMode, NodeCount, PolicyStatus, Refused, ScopePair, Verdict,
};

/// The API group.
pub const GROUP: &str = "tidegate.dev";
/// The version of all resources.
pub const VERSION: &str = "v1alpha1";
/// The API version of all resources.
pub const API_VERSION: &str = "tidegate.dev/v1alpha1";
