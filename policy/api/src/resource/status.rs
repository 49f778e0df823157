//! What Tidegate writes into `status`. People and other controllers read it; Tidegate reads back only what it has
//! assigned: owners of addresses, and the pairs of namespaces.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::schema;

/// What came of a policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PolicyStatus {
    /// Accepted: the policy is valid and used. Conflicted: it contradicts another policy for a live pod. Programmed: the nodes
    /// that need it hold it; the message says how many of how many.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), transform = schema::conditions)]
    pub conditions: Vec<Condition>,
    /// How far the policy has come to the nodes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nodes: Option<NodeCount>,
    /// Parts of the policy that have no effect, or not all of it. At most 32.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "atomic"))]
    pub refused: Vec<Refused>,
}

/// A condition, as all of Kubernetes has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// What it is about.
    #[serde(rename = "type")]
    #[schemars(with = "schema::Reason")]
    pub kind: String,
    /// Whether it holds.
    pub status: ConditionStatus,
    /// The generation of the object that it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub observed_generation: Option<i64>,
    /// When it changed between True, False and Unknown.
    #[schemars(with = "schema::Time")]
    pub last_transition_time: String,
    /// Why, in one word for programs.
    #[schemars(with = "schema::Reason")]
    pub reason: String,
    /// Why, for people.
    #[schemars(length(max = 4096))]
    pub message: String,
}

/// Whether a condition holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ConditionStatus {
    /// It does.
    True,
    /// It does not.
    False,
    /// Nobody can say.
    Unknown,
}

/// How many nodes hold a policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeCount {
    /// Nodes with pods that the policy selects.
    #[schemars(extend("format" = "int32"), range(min = 0))]
    pub desired: u32,
    /// Nodes among them whose kernel holds this generation of the policy.
    #[schemars(extend("format" = "int32"), range(min = 0))]
    pub programmed: u32,
}

/// A part that has no effect, or not all of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Refused {
    /// Where it is written, such as egress[db].toCIDRs[0] or tidegate.dev/allow[3].
    #[schemars(length(max = 512))]
    pub path: String,
    /// Why, in one word: AboveCeiling (no effect), Clipped (less than it says), BadItem, NotAdmitted.
    #[schemars(with = "schema::Reason")]
    pub reason: String,
    /// The ClusterEgressPolicy or EgressPool that refuses it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub by: Option<String>,
    /// Why, for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub message: Option<String>,
}

/// Who holds the pool's addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EgressPoolStatus {
    /// Accepted: the pool is valid. Programmed: every pair has a gateway that serves it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), transform = schema::conditions)]
    pub conditions: Vec<Condition>,
    /// The pairs with their owners. At most 64.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "atomic"))]
    pub addresses: Vec<HeldPair>,
}

/// A pair with its owner.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HeldPair {
    /// The IPv4 address.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<schema::Ipv4>")]
    pub ipv4: Option<String>,
    /// The IPv6 address.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<schema::Ipv6>")]
    pub ipv6: Option<String>,
    /// The gateway that holds the pair; absent while nobody does.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub owner: Option<String>,
    /// Counts the changes of the owner. Nodes follow the highest.
    #[schemars(range(min = 0))]
    pub epoch: i64,
    /// How many namespaces leave with the pair.
    #[schemars(extend("format" = "int32"), range(min = 0))]
    pub namespaces: u32,
    /// Of a pair that drains: whether it can be removed from the pool without harm, since no namespace leaves with it and no
    /// connection that does is alive.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drained: Option<bool>,
}

/// What Tidegate does with a namespace, and what it denied lately.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NamespaceEgressStatus {
    /// Accepted: every annotation of the namespace is valid. Programmed: the nodes with pods of the namespace hold what is
    /// said of them; the message says how many of how many.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), transform = schema::conditions)]
    pub conditions: Vec<Condition>,
    /// How far the pods of the namespace are under Tidegate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub isolation: Option<Isolation>,
    /// What makes it so: annotations and policies that select pods of the namespace. At most 32.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "atomic"))]
    pub because: Vec<Cause>,
    /// What happens to traffic that no rule allows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<NamespaceMode>,
    /// When Audit ends and the namespace enforces (RFC 3339).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<schema::Time>")]
    pub audit_until_time: Option<String>,
    /// The source addresses of the namespace, one pair for each pool that its pods use. At most 64. A pair that was given
    /// once is kept.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "atomic"))]
    pub egress: Vec<ScopePair>,
    /// Items of the namespace's annotations that have no effect, or not all of it. At most 32.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "atomic"))]
    pub refused: Vec<Refused>,
    /// The latest denials, newest first. At most 10.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 10), extend("x-kubernetes-list-type" = "atomic"))]
    pub denials: Vec<Denial>,
    /// Pods on the host's network, which have no address of their own and are not managed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_network_pods: Option<HostNetworkPods>,
}

/// How far the pods of a namespace are under Tidegate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Isolation {
    /// Nothing selects its pods.
    Untouched,
    /// Only cluster policies select its pods: their denies hold, everything else passes.
    Guarded,
    /// Some of its pods are isolated.
    Partial,
    /// What no rule allows is denied, for all of its pods.
    Isolated,
}

/// An object or annotation that has an effect on a namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Cause {
    /// EgressPolicy, ClusterEgressPolicy, Annotation, or ClusterDefault (a setting of the installation).
    #[schemars(with = "schema::Reason")]
    pub kind: String,
    /// The name of the object, the annotation's key, or the setting's value.
    #[schemars(length(max = 317))]
    pub name: String,
}

/// What happens to traffic that no rule allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum NamespaceMode {
    /// It is denied.
    Enforce,
    /// It passes and is recorded.
    Audit,
}

/// The source addresses of a namespace in one pool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ScopePair {
    /// The EgressPool.
    #[schemars(length(max = 253))]
    pub pool: String,
    /// The IPv4 address.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<schema::Ipv4>")]
    pub ipv4: Option<String>,
    /// The IPv6 address.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<schema::Ipv6>")]
    pub ipv6: Option<String>,
}

/// A denial, with what would allow it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Denial {
    /// When it happened last (RFC 3339).
    #[schemars(with = "schema::Time")]
    pub last_time: String,
    /// How often it happened since it is in the list.
    #[schemars(range(min = 1))]
    pub count: i64,
    /// The pod.
    #[schemars(length(max = 253))]
    pub pod: String,
    /// Where the pod wanted to go: the name, or else the address, with the port where there is one.
    #[serde(default)]
    #[schemars(length(max = 1024))]
    pub to: String,
    /// The name that the pod asked for, or that its connection named; absent where there was none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub name: Option<String>,
    /// The address that the pod sent to; absent where the query was denied.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 45))]
    pub address: Option<String>,
    /// The protocol, such as TCP.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    pub protocol: Option<String>,
    /// The port.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "int32"), range(min = 0, max = 65_535))]
    pub port: Option<i64>,
    /// Why, as in audit records: not-allowed, denied-by-policy, sni-mismatch and others of docs/audit.md.
    #[schemars(length(max = 63))]
    pub reason: String,
    /// What came of it.
    pub verdict: Verdict,
    /// The rule that would allow it, for the egress of an EgressPolicy; what stands against one is said as a comment.
    /// Absent where no rule helps.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 2048))]
    pub allow_with: Option<String>,
}

/// What came of what no rule allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Verdict {
    /// It was denied.
    #[default]
    Denied,
    /// It passed, since the namespace is audited; enforcement would deny it.
    Audited,
}

/// Pods that have no address of their own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HostNetworkPods {
    /// How many there are.
    #[schemars(extend("format" = "int32"), range(min = 0))]
    pub count: u32,
    /// The first of them by name. At most 10.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 10), inner(length(max = 253)), extend("x-kubernetes-list-type" = "atomic"))]
    pub names: Vec<String>,
}
