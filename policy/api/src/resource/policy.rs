//! Policies and their rules.

use schemars::JsonSchema;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use super::LabelSelector;
use crate::convert::{MAX_PRIORITY, MAX_RULES};
use crate::rule::{MAX_CIDRS, MAX_DNS_TYPES, MAX_EXCEPT, MAX_FQDNS, MAX_MIN_BINDING, MAX_PORTS, MAX_PRIVATE};
use crate::schema;

/// What pods of the policy's namespace may reach outside the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = schema::unique_names(&["egress", "egressDeny"])))]
pub struct EgressPolicySpec {
    /// The pods of the namespace that the policy selects. Empty ({}): all of them. A selected pod is isolated: what no rule
    /// allows is denied.
    pub pod_selector: LabelSelector,
    /// Whether the policy has effect. Defaults to Enforce.
    #[serde(default)]
    pub mode: Mode,
    /// The EgressPool that the pods leave with, if it admits the namespace. Absent: the pool of the namespace's annotation
    /// tidegate.dev/pool, else the pool `default`. Where two policies of one pod differ, the oldest wins, then the first
    /// by name, and the other is Conflicted.
    pub pool_ref: Option<PoolRef>,
    /// What happens to live connections that an edit of this policy no longer allows. Defaults to Reset.
    #[serde(default)]
    pub on_revoke: OnRevoke,
    /// What the pods may reach. At most 256 rules. Absent or empty: the policy isolates the pods, and allows nothing.
    #[serde(default)]
    #[schemars(
        length(max = MAX_RULES),
        extend("x-kubernetes-list-type" = "atomic"),
        transform = schema::allow_rules
    )]
    pub egress: Vec<Rule>,
    /// What the pods may not reach, over everything that this namespace allows. At most 256 rules. Ports may be left out
    /// here, and the protocol may be Any.
    #[serde(default)]
    #[schemars(
        length(max = MAX_RULES),
        extend("x-kubernetes-list-type" = "atomic"),
        transform = schema::deny_rules
    )]
    pub egress_deny: Vec<Rule>,
}

/// What the platform accepts, denies, and lets namespaces grant themselves.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = schema::unique_names(&["egress"])))]
pub struct ClusterEgressPolicySpec {
    /// When the policy is asked.
    pub tier: Tier,
    /// The order among policies of the same tier: lower is asked first. 0 to 1000. At equal priority a Deny comes before an
    /// Accept.
    #[schemars(extend("format" = "int32"), range(min = 0, max = MAX_PRIORITY))]
    pub priority: i64,
    /// Whether the policy has effect. Defaults to Enforce.
    #[serde(default)]
    pub mode: Mode,
    /// The pods that the policy is about.
    pub subject: Subject,
    /// Rules in order: the first that matches decides. Where none does, the next policy is asked. At most 256.
    #[serde(default)]
    #[schemars(
        length(max = MAX_RULES),
        extend("x-kubernetes-list-type" = "atomic"),
        transform = schema::cluster_rules
    )]
    pub egress: Vec<Rule>,
    /// What the subjects may grant themselves by their own policies and annotations. It never grants: what holds is what the
    /// namespace grants and every ceiling that selects the pod permits. Absent: unbounded.
    pub ceiling: Option<Ceiling>,
    /// Break-glass; not carried out by this version.
    #[serde(rename = "override")]
    #[schemars(skip)]
    pub break_glass: Option<Unread>,
}

/// Whether a policy has effect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum Mode {
    /// The policy holds.
    #[default]
    Enforce,
    /// The policy is checked and recorded, and has no effect.
    Staged,
}

/// What an edit does to live connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum OnRevoke {
    /// They are reset at once.
    #[default]
    Reset,
    /// Not carried out by this version; refused with a reason.
    #[schemars(skip)]
    Drain,
}

/// A reference to an EgressPool.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolRef {
    /// The name of the EgressPool.
    #[schemars(with = "schema::ObjectName")]
    pub name: String,
}

/// When a cluster policy is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
pub enum Tier {
    /// Before the namespaces' own policies.
    Admin,
    /// For pods that no policy and no tidegate.dev/allow annotation of their namespace selects.
    Baseline,
}

/// The pods that a cluster policy is about.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Subject {
    /// The namespaces, by their labels. Empty ({}): every namespace.
    pub namespace_selector: LabelSelector,
    /// The pods in these namespaces, by their labels. Absent or empty: all of them. Tenants can label their pods, so
    /// do not accept by it what a tenant must not have.
    #[serde(default)]
    pub pod_selector: LabelSelector,
}

/// An upper bound of what namespaces may grant themselves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Ceiling {
    /// Names that may be granted. At most 1024. Absent or empty: none.
    #[serde(rename = "toFQDNs", default)]
    #[schemars(length(max = MAX_FQDNS), extend("x-kubernetes-list-type" = "atomic"))]
    pub to_fqdns: Vec<FqdnPeer>,
    /// Prefixes that may be granted. At most 256. Absent or empty: none, unless `permits` has CIDRs.
    #[serde(rename = "toCIDRs", default)]
    #[schemars(length(max = MAX_CIDRS), extend("x-kubernetes-list-type" = "atomic"))]
    pub to_cidrs: Vec<CidrPeer>,
    /// Ports that may be granted, 1 to 32. Absent: any.
    #[schemars(
        length(min = 1, max = MAX_PORTS),
        extend("x-kubernetes-list-type" = "atomic"),
        transform = schema::allow_ports
    )]
    pub to_ports: Option<Vec<Port>>,
    /// Weakenings that may be granted. Absent or empty: none.
    #[serde(default)]
    #[schemars(length(max = 6), extend("x-kubernetes-list-type" = "atomic"))]
    pub permits: Vec<Permit>,
}

/// A weakening that a ceiling permits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
pub enum Permit {
    /// Answers with private addresses (`privateAddresses`).
    PrivateAddresses,
    /// TCP without a look at the SNI (`sni: Unchecked`).
    #[serde(rename = "SNIUnchecked")]
    SniUnchecked,
    /// Encrypted ClientHellos (`ech: Allow`).
    #[serde(rename = "ECHAllow")]
    EchAllow,
    /// Further query types (`dnsTypes`).
    #[serde(rename = "DNSTypes")]
    DnsTypes,
    /// Any prefix in `toCIDRs`.
    #[serde(rename = "CIDRs")]
    Cidrs,
    /// Resolving names that no rule matches.
    #[serde(rename = "DNSOpen")]
    DnsOpen,
}

/// Names or prefixes, with ports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(transform = schema::rule)]
pub struct Rule {
    /// The rule's name in status and audit records, once per policy: 1 to 63 lower-case letters, digits and '-', starting with a
    /// letter. Defaults to the rule's index, from 0.
    #[schemars(with = "Option<schema::RuleName>")]
    pub name: Option<String>,
    /// What the rule says. Required in a ClusterEgressPolicy, and only there.
    pub action: Option<Action>,
    /// Names, 1 to 1024. A rule has either toFQDNs or toCIDRs.
    #[serde(rename = "toFQDNs")]
    #[schemars(length(min = 1, max = MAX_FQDNS), extend("x-kubernetes-list-type" = "atomic"))]
    pub to_fqdns: Option<Vec<FqdnPeer>>,
    /// Prefixes, 1 to 256. A rule has either toFQDNs or toCIDRs. Connections to prefixes are not inspected.
    #[serde(rename = "toCIDRs")]
    #[schemars(length(min = 1, max = MAX_CIDRS), extend("x-kubernetes-list-type" = "atomic"))]
    pub to_cidrs: Option<Vec<CidrPeer>>,
    /// Ports, 1 to 32. Required: a missing list never means every port.
    #[schemars(required, length(min = 1, max = MAX_PORTS), extend("x-kubernetes-list-type" = "atomic"))]
    pub to_ports: Option<Vec<Port>>,
    /// How TCP connections to the names are checked. Only in rules that allow by toFQDNs; defaults to Required.
    pub sni: Option<Sni>,
    /// What happens to QUIC (UDP 443). Only in rules that allow by toFQDNs; defaults to Block.
    pub quic: Option<Quic>,
    /// Whether a TLS ClientHello with encrypted_client_hello passes; only its outer name can be checked then. Only in
    /// rules that allow by toFQDNs; defaults to Deny.
    pub ech: Option<Ech>,
    /// DNS query types that are answered beyond A, AAAA, HTTPS and SVCB, 1 to 16: TXT, SRV, MX and others by their
    /// mnemonic, or TYPE with a number. Only in rules that allow by toFQDNs; defaults to none.
    #[schemars(
        with = "Option<Vec<schema::DnsType>>",
        length(min = 1, max = MAX_DNS_TYPES),
        extend("x-kubernetes-list-type" = "atomic")
    )]
    pub dns_types: Option<Vec<String>>,
    /// Prefixes of private addresses that DNS answers for the names may have, 1 to 32; others are refused as rebinding.
    /// Never loopback, link-local or multicast. Only in rules that allow by toFQDNs; defaults to none.
    #[schemars(
        with = "Option<Vec<schema::PrivateCidr>>",
        length(min = 1, max = MAX_PRIVATE),
        extend("x-kubernetes-list-type" = "atomic")
    )]
    pub private_addresses: Option<Vec<String>>,
    /// How long an address stays bound to its name at least, in seconds, 0 to 86400: for clients that resolve once and
    /// connect for long. Only in rules that allow by toFQDNs; defaults to 0.
    #[schemars(extend("format" = "int32"), range(min = 0, max = MAX_MIN_BINDING))]
    pub min_binding_seconds: Option<i64>,
    /// When the rule ends (RFC 3339, such as 2027-01-31T00:00:00Z): it has no effect from then on. Absent: never.
    #[schemars(with = "Option<schema::Time>")]
    pub expire_time: Option<String>,
    /// HTTP requests that pass. Not carried out by this version, and refused, so that nobody relies on it.
    #[schemars(with = "Option<schema::Http>")]
    pub http: Option<Unread>,
}

/// What a rule of a cluster policy says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
pub enum Action {
    /// It passes.
    Accept,
    /// It is denied.
    Deny,
    /// This tier ends undecided: the namespace's own policies decide, or the default.
    Pass,
}

/// A name or a pattern, exactly one of both.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = schema::rules(&[schema::Cel {
    rule: "has(self.matchName) != has(self.matchPattern)",
    message: "exactly one of `matchName` and `matchPattern` is required",
    path: "",
}])))]
pub struct FqdnPeer {
    /// Exactly this name, such as api.example.com. Case and a final dot do not matter; at most 253 characters. Not an
    /// address.
    #[schemars(with = "Option<schema::Name>")]
    pub match_name: Option<String>,
    /// Names that this pattern matches. `*` stands for zero or more of [-a-zA-Z0-9_] inside one label, `**.` in front for one
    /// or more whole labels, `*` alone for every name: *.example.com matches a.example.com, **.example.com also
    /// a.b.example.com, neither matches example.com.
    #[schemars(with = "Option<schema::NamePattern>")]
    pub match_pattern: Option<String>,
}

/// A prefix with exceptions inside it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CidrPeer {
    /// The prefix, such as 203.0.113.0/24 or 2001:db8::/32, without bits behind its length. An address is written with /32
    /// or /128.
    #[schemars(with = "schema::Cidr")]
    pub cidr: String,
    /// Prefixes inside cidr that are left out. At most 64.
    #[serde(default)]
    #[schemars(
        with = "Vec<schema::AnyCidr>",
        length(max = MAX_EXCEPT),
        extend("x-kubernetes-list-type" = "atomic")
    )]
    pub except: Vec<String>,
}

/// A port, or a range of ports.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = schema::rules(&[schema::Cel {
    rule: "!has(self.endPort) || has(self.port) && self.endPort >= self.port",
    message: "needs a `port` that is not above it",
    path: ".endPort",
}])))]
pub struct Port {
    /// The protocol. SCTP is not supported and always denied.
    pub protocol: Protocol,
    /// The port, or the first of a range: 1 to 65535. In denies it may be left out, for every port.
    #[schemars(extend("format" = "int32"), range(min = 1, max = 65_535))]
    pub port: Option<i64>,
    /// The last port of a range, 1 to 65535, not below port. Defaults to port.
    #[schemars(extend("format" = "int32"), range(min = 1, max = 65_535))]
    pub end_port: Option<i64>,
}

/// A protocol of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
pub enum Protocol {
    /// TCP.
    #[serde(rename = "TCP")]
    Tcp,
    /// UDP.
    #[serde(rename = "UDP")]
    Udp,
    /// SCTP; refused with a reason.
    #[serde(rename = "SCTP")]
    #[schemars(skip)]
    Sctp,
    /// TCP and UDP, and every other protocol where no port is given. Only in denies.
    Any,
}

/// How TCP connections to names are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
pub enum Sni {
    /// Every connection must start with a TLS ClientHello that names an allowed name which DNS bound to this address.
    Required,
    /// Not offered; refused with a reason.
    #[schemars(skip)]
    IfPresent,
    /// TCP is forwarded without a look: name, address and port are bound, for protocols that do not start with TLS.
    Unchecked,
}

/// What happens to QUIC of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
pub enum Quic {
    /// It is refused at once, so that clients fall back to TCP.
    Block,
    /// Not carried out by this version; refused with a reason.
    #[schemars(skip)]
    Inspect,
}

/// Whether an encrypted ClientHello passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
pub enum Ech {
    /// It is refused.
    Deny,
    /// It passes.
    Allow,
}

/// A field that is known and not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unread;

impl<'de> Deserialize<'de> for Unread {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(deserializer).map(|_| Self)
    }
}
