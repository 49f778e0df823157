//! The resources of `tidegate.dev/v1alpha1` as they are written.
//!
//! Unknown fields are refused and nothing is coerced. What the fields mean, their
//! limits and defaults are in `docs/policy.md`; [`crate::convert`] checks them.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::IgnoredAny;

/// The API group.
pub const GROUP: &str = "tidegate.dev";
/// The API version of all resources.
pub const API_VERSION: &str = "tidegate.dev/v1alpha1";

/// What an object is called and by whom.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Its name.
    pub name: String,
    /// Its namespace; empty for cluster-scoped kinds.
    pub namespace: String,
    /// Its UID; empty outside a cluster.
    pub uid: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// When it was created (RFC 3339); absent outside a cluster.
    pub creation_timestamp: Option<String>,
}

/// `metadata`: what Tidegate reads of it, and by name all that the API has.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct RawMeta {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
    creation_timestamp: Option<String>,
    #[serde(rename = "generateName")]
    _generate_name: Option<IgnoredAny>,
    #[serde(rename = "generation")]
    _generation: Option<IgnoredAny>,
    #[serde(rename = "resourceVersion")]
    _resource_version: Option<IgnoredAny>,
    #[serde(rename = "managedFields")]
    _managed_fields: Option<IgnoredAny>,
    #[serde(rename = "ownerReferences")]
    _owner_references: Option<IgnoredAny>,
    #[serde(rename = "finalizers")]
    _finalizers: Option<IgnoredAny>,
    #[serde(rename = "selfLink")]
    _self_link: Option<IgnoredAny>,
    #[serde(rename = "deletionTimestamp")]
    _deletion_timestamp: Option<IgnoredAny>,
    #[serde(rename = "deletionGracePeriodSeconds")]
    _deletion_grace_period_seconds: Option<IgnoredAny>,
}

impl From<RawMeta> for Meta {
    fn from(raw: RawMeta) -> Self {
        Self {
            name: raw.name.unwrap_or_default(),
            namespace: raw.namespace.unwrap_or_default(),
            uid: raw.uid.unwrap_or_default(),
            labels: raw.labels.unwrap_or_default(),
            annotations: raw.annotations.unwrap_or_default(),
            creation_timestamp: raw.creation_timestamp,
        }
    }
}

/// `LabelSelector` of the Kubernetes API. Empty selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct LabelSelector {
    /// Labels that must be there with these values.
    #[serde(default)]
    pub match_labels: BTreeMap<String, String>,
    /// Expressions that must hold.
    #[serde(default)]
    pub match_expressions: Vec<LabelExpression>,
}

/// One of `matchExpressions`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct LabelExpression {
    /// The label's key.
    pub key: String,
    /// The operator.
    pub operator: LabelOperator,
    /// The values: some for `In` and `NotIn`, none for the others.
    #[serde(default)]
    pub values: Vec<String>,
}

/// Operator of a label expression.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum LabelOperator {
    /// The value is one of these.
    In,
    /// The value is none of these, or the key is absent.
    NotIn,
    /// The key is present.
    Exists,
    /// The key is absent.
    DoesNotExist,
}

/// `mode` of a policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum Mode {
    /// It holds.
    #[default]
    Enforce,
    /// It is checked, and has no effect.
    Staged,
}

/// `onRevoke` of a policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum OnRevoke {
    /// Connections that an edit no longer allows are reset.
    #[default]
    Reset,
    /// They may end by themselves.
    Drain,
}

/// A reference to a pool.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolRef {
    /// The pool's name.
    pub name: String,
}

/// `spec` of an `EgressPolicy`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct EgressPolicySpec {
    /// The pods of the namespace that it selects; `{}` is all.
    pub pod_selector: LabelSelector,
    /// Whether it has effect.
    #[serde(default)]
    pub mode: Mode,
    /// The pool whose addresses the pods leave with.
    pub pool_ref: Option<PoolRef>,
    /// What an edit does to live connections.
    #[serde(default)]
    pub on_revoke: OnRevoke,
    /// What it allows; absent or empty: it only isolates.
    #[serde(default)]
    pub egress: Vec<Rule>,
    /// What it denies, over anything that the namespace allows.
    #[serde(default)]
    pub egress_deny: Vec<Rule>,
}

/// `spec` of a `ClusterEgressPolicy`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ClusterEgressPolicySpec {
    /// Before or after the namespaces' own policies.
    pub tier: Tier,
    /// 0 to 1000, lower first.
    pub priority: i64,
    /// Whether it has effect.
    #[serde(default)]
    pub mode: Mode,
    /// Whom it is about.
    pub subject: Subject,
    /// Its rules; the first match decides.
    #[serde(default)]
    pub egress: Vec<Rule>,
    /// What its subjects may grant themselves; absent: unbounded.
    pub ceiling: Option<Ceiling>,
    /// Break-glass; not carried out by this version.
    #[serde(rename = "override")]
    pub break_glass: Option<Unread>,
}

/// Tier of a cluster policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum Tier {
    /// Before the namespaces' own policies.
    Admin,
    /// For pods that no own policy selects.
    Baseline,
}

/// Whom a cluster policy is about.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Subject {
    /// The namespaces; `{}` is all.
    pub namespace_selector: LabelSelector,
    /// The pods in them; absent or `{}` is all.
    #[serde(default)]
    pub pod_selector: LabelSelector,
}

/// An upper bound of what namespaces may grant themselves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Ceiling {
    /// Names that may be granted.
    #[serde(rename = "toFQDNs", default)]
    pub to_fqdns: Vec<FqdnPeer>,
    /// Prefixes that may be granted.
    #[serde(rename = "toCIDRs", default)]
    pub to_cidrs: Vec<CidrPeer>,
    /// Ports that may be granted; absent: any.
    pub to_ports: Option<Vec<Port>>,
    /// Fields that weaken inspection and are permitted.
    #[serde(default)]
    pub permits: Vec<Permit>,
}

/// A weakening that a ceiling permits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum Permit {
    /// `privateAddresses`.
    PrivateAddresses,
    /// `sni: Unchecked`.
    #[serde(rename = "SNIUnchecked")]
    SniUnchecked,
    /// `ech: Allow`.
    #[serde(rename = "ECHAllow")]
    EchAllow,
    /// `dnsTypes`.
    #[serde(rename = "DNSTypes")]
    DnsTypes,
    /// `toCIDRs` of any prefix.
    #[serde(rename = "CIDRs")]
    Cidrs,
    /// Resolving names that no rule matches.
    #[serde(rename = "DNSOpen")]
    DnsOpen,
}

/// One rule: names or prefixes, with ports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Rule {
    /// Its name.
    pub name: Option<String>,
    /// What it says; only in a `ClusterEgressPolicy`, and required there.
    pub action: Option<Action>,
    /// Names.
    #[serde(rename = "toFQDNs")]
    pub to_fqdns: Option<Vec<FqdnPeer>>,
    /// Prefixes.
    #[serde(rename = "toCIDRs")]
    pub to_cidrs: Option<Vec<CidrPeer>>,
    /// Ports.
    pub to_ports: Option<Vec<Port>>,
    /// TLS inspection.
    pub sni: Option<Sni>,
    /// What happens to QUIC.
    pub quic: Option<Quic>,
    /// Whether an encrypted ClientHello passes.
    pub ech: Option<Ech>,
    /// Query types beyond A, AAAA, HTTPS and SVCB.
    pub dns_types: Option<Vec<String>>,
    /// Answers in these prefixes are accepted.
    pub private_addresses: Option<Vec<String>>,
    /// Addresses stay bound at least so long, in seconds.
    pub min_binding_seconds: Option<i64>,
    /// The rule has no effect from then on (RFC 3339).
    pub expire_time: Option<String>,
    /// HTTP inspection; not carried out by this version.
    pub http: Option<Unread>,
}

/// What a cluster rule says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum Action {
    /// Allow.
    Accept,
    /// Refuse.
    Deny,
    /// End this tier undecided.
    Pass,
}

/// A name or a pattern: exactly one of both.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct FqdnPeer {
    /// Exactly this name.
    pub match_name: Option<String>,
    /// Names that this pattern matches.
    pub match_pattern: Option<String>,
}

/// A prefix with exceptions inside it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CidrPeer {
    /// The prefix.
    pub cidr: String,
    /// What is left out.
    #[serde(default)]
    pub except: Vec<String>,
}

/// A port or a range of ports.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Port {
    /// The protocol.
    pub protocol: Protocol,
    /// The port, or the first of a range.
    pub port: Option<i64>,
    /// The last port of a range.
    pub end_port: Option<i64>,
}

/// A protocol of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum Protocol {
    /// TCP.
    #[serde(rename = "TCP")]
    Tcp,
    /// UDP.
    #[serde(rename = "UDP")]
    Udp,
    /// SCTP; refused with a reason.
    #[serde(rename = "SCTP")]
    Sctp,
    /// Any; only in denies.
    Any,
}

/// TLS inspection of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum Sni {
    /// The ClientHello must name an allowed name that is bound to the address.
    Required,
    /// Not offered; refused with a reason.
    IfPresent,
    /// Forwarded without a look.
    Unchecked,
}

/// What happens to QUIC of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum Quic {
    /// Refused, so that clients fall back to TCP.
    Block,
    /// Not carried out by this version; refused with a reason.
    Inspect,
}

/// Whether an encrypted ClientHello passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum Ech {
    /// It is refused.
    Deny,
    /// It passes.
    Allow,
}

/// `spec` of an `EgressPool`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct EgressPoolSpec {
    /// The nodes whose gateways may hold it; absent: any.
    pub gateway_node_selector: Option<LabelSelector>,
    /// The namespaces that may use it; absent: none.
    pub allowed_namespaces: Option<LabelSelector>,
    /// Where traffic leaves.
    pub address_source: AddressSource,
    /// The addresses, with `addressSource: Static`.
    #[serde(rename = "static")]
    pub fixed: Option<StaticSource>,
    /// What the world sees, with `addressSource: PodNetwork`; for people.
    #[serde(default)]
    pub external_addresses: Vec<String>,
}

/// Where a pool's traffic leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum AddressSource {
    /// With addresses that the gateway's node announces.
    Static,
    /// As the gateway's pod leaves by itself.
    PodNetwork,
}

/// Addresses that the gateway's node announces.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StaticSource {
    /// The uplink of the gateway's node; absent: by route.
    pub interface: Option<String>,
    /// The pairs, at least one.
    pub addresses: Vec<PairSpec>,
}

/// An egress pair: addresses that move together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PairSpec {
    /// IPv4 address.
    pub ipv4: Option<String>,
    /// IPv6 address.
    pub ipv6: Option<String>,
    /// Whether it takes new namespaces.
    #[serde(default)]
    pub state: PairState,
}

/// State of a pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum PairState {
    /// It takes new namespaces.
    #[default]
    Active,
    /// It keeps its flows and takes no new ones.
    Draining,
}

/// A field that is known and not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unread;

impl<'de> Deserialize<'de> for Unread {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(deserializer).map(|_| Self)
    }
}
