//! What policy is made of, as plain values: the one input of compilation.
//!
//! Readers (a directory, an API server) turn their objects into these types and
//! refuse there what is not well formed; here only meaning is left.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use crate::shards::Shards;
use crate::state::Named;
use crate::{Name, Proto};

/// Wall-clock time in seconds since 1970 (UTC): the form of `expireTime` and `audit-until`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnixSeconds(pub i64);

/// Labels of an object.
pub type Labels = BTreeMap<String, String>;

/// All objects that decide anything.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    /// Namespaces by name.
    pub namespaces: BTreeMap<String, Namespace>,
    /// Pods by (namespace, name).
    pub pods: BTreeMap<(String, String), Pod>,
    /// Nodes by name.
    pub nodes: BTreeMap<String, Node>,
    /// Pools by name; `default` exists without being written.
    pub pools: BTreeMap<String, Pool>,
    /// Namespaced policies by (namespace, name).
    pub policies: BTreeMap<(String, String), Policy>,
    /// Cluster policies by name.
    pub cluster_policies: BTreeMap<String, ClusterPolicy>,
    /// The pairs that scopes were given before, by (namespace, pool): kept as long as the pool has them.
    pub assigned: BTreeMap<(String, String), Pair>,
    /// Names of the cluster without their suffix: no rule depends on them, but nodes go by them.
    pub names: Shards<Arc<str>, Named>,
    /// Settings that have no resource.
    pub settings: Settings,
}

/// What of the objects is other than it was at the last compile. To say too much costs time; what is not said is not
/// seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// Anything may be: a pool or a setting changed.
    pub all: bool,
    /// Nodes are new, changed or gone.
    pub nodes: bool,
    /// Cluster policies that are new, changed or gone, by name.
    pub cluster_policies: BTreeSet<String>,
    /// Namespaces which changed themselves, have changed policies or were given another pair: all of their pods are looked
    /// at again.
    pub namespaces: BTreeSet<String>,
    /// Single pods, by (namespace, name): new, changed or gone.
    pub pods: BTreeSet<(String, String)>,
    /// Names of the cluster are new, changed or gone.
    pub names: bool,
}

impl Touched {
    /// Anything may be.
    pub const ALL: &'static Touched = &Touched {
        all: true,
        nodes: true,
        cluster_policies: BTreeSet::new(),
        namespaces: BTreeSet::new(),
        pods: BTreeSet::new(),
        names: true,
    };

    /// Adds what else was touched.
    pub fn extend(&mut self, more: Touched) {
        self.all |= more.all;
        self.nodes |= more.nodes;
        self.cluster_policies.extend(more.cluster_policies);
        self.namespaces.extend(more.namespaces);
        self.pods.extend(more.pods);
        self.names |= more.names;
    }
}

/// What a pod that no policy selects is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClusterDefault {
    /// Left alone.
    #[default]
    Untouched,
    /// Managed, in audit.
    Audit,
    /// Managed, isolated.
    Isolated,
}

/// Which names are resolved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DnsFilter {
    /// Only names that some rule could match.
    #[default]
    Strict,
    /// All names; only allowed ones bind.
    Open,
}

/// Cluster-wide settings of policy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// What a pod that nothing selects is.
    pub cluster_default: ClusterDefault,
    /// Which names are resolved.
    pub dns_filter: DnsFilter,
    /// Whether rules allow anything to mirror pods.
    pub trust_mirror_pods: bool,
    /// Namespaces that no policy and no default touches.
    pub exempt_namespaces: Vec<String>,
    /// In-cluster destinations: never a public name's answer, never steered.
    pub cluster_prefixes: Vec<IpNet>,
    /// Where the cluster's DNS is: what goes there is DNS whatever the port.
    pub cluster_dns: Vec<SocketAddr>,
}

/// A namespace with what its annotations say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespace {
    /// Its UID; the name where there is none.
    pub uid: String,
    /// Its labels.
    pub labels: Labels,
    /// `tidegate.dev/managed: "true"`.
    pub managed: bool,
    /// `tidegate.dev/mode: audit`.
    pub audit: bool,
    /// `tidegate.dev/audit-until`: from then on it enforces.
    pub audit_until: Option<UnixSeconds>,
    /// `tidegate.dev/pool`.
    pub pool: Option<String>,
    /// The items of `tidegate.dev/allow`, one rule each, named by the item's text.
    pub allow: Vec<Rule>,
    /// Whether the annotation `allow` is present at all: it isolates even when all of its items were refused.
    pub has_allow: bool,
}

/// A pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its node's name.
    pub node: String,
    /// Its addresses, at most one per family.
    pub addresses: Vec<IpAddr>,
    /// Its labels.
    pub labels: Labels,
    /// On the host's network: has no address of its own and is not managed.
    pub host_network: bool,
    /// It is being deleted.
    pub ending: bool,
    /// Its node's kubelet made it, in the namespace that it chose and with the labels that it chose.
    pub mirror: bool,
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its labels.
    pub labels: Labels,
    /// Its pod ranges.
    pub pod_prefixes: Vec<IpNet>,
}

/// An egress pair: addresses that move together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pair {
    /// IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
    /// It is given to no scope. Those that it was given to keep it.
    pub draining: bool,
}

/// Where a pool's traffic leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AddressSource {
    /// As the gateway's pod leaves by itself.
    PodNetwork,
    /// With addresses that the gateway's node announces.
    Static {
        /// The uplink's name; absent: by route.
        interface: Option<String>,
        /// The pairs, at least one.
        pairs: Vec<Pair>,
    },
}

/// An egress pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// The namespaces that may use it; absent: none.
    pub allowed_namespaces: Option<Selector>,
    /// Where traffic leaves.
    pub source: AddressSource,
    /// The nodes that may hold it; absent: any gateway.
    pub gateway_nodes: Option<Selector>,
}

/// A label selector (Kubernetes `LabelSelector`). Empty selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    /// `matchLabels`.
    pub labels: Labels,
    /// `matchExpressions`.
    pub expressions: Vec<Expression>,
}

/// One of `matchExpressions`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expression {
    /// The label's key.
    pub key: String,
    /// The operator with its values.
    pub op: Operator,
}

/// Operator of a label expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operator {
    /// The value is one of these.
    In(Vec<String>),
    /// The value is none of these, or the key is absent.
    NotIn(Vec<String>),
    /// The key is present.
    Exists,
    /// The key is absent.
    DoesNotExist,
}

impl Selector {
    /// Whether it selects an object with these labels.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.labels.iter().all(|(k, v)| labels.get(k) == Some(v))
            && self.expressions.iter().all(|e| {
                let value = labels.get(&e.key);
                match &e.op {
                    Operator::In(vs) => value.is_some_and(|v| vs.contains(v)),
                    Operator::NotIn(vs) => value.is_none_or(|v| !vs.contains(v)),
                    Operator::Exists => value.is_some(),
                    Operator::DoesNotExist => value.is_none(),
                }
            })
    }
}

/// Whether a policy has effect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PolicyMode {
    /// It holds.
    #[default]
    Enforce,
    /// It is validated and recorded, and has no effect.
    Staged,
}

/// A namespaced policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// When it was created; the oldest wins a conflict of pools.
    pub created: UnixSeconds,
    /// The pods of its namespace that it selects.
    pub pod_selector: Selector,
    /// Whether it has effect.
    pub mode: PolicyMode,
    /// The pool that it asks for.
    pub pool: Option<String>,
    /// What it allows.
    pub egress: Vec<Rule>,
    /// What it denies, over anything that the namespace allows.
    pub deny: Vec<Rule>,
}

/// Tier of a cluster policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// Before the namespaces' own policies.
    Admin,
    /// For pods that no own policy selects.
    Baseline,
}

/// What a cluster rule says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// Refuse. Sorted before the others: at equal priority a deny comes first.
    Deny,
    /// Allow.
    Accept,
    /// End this tier undecided.
    Pass,
}

/// A cluster policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterPolicy {
    /// Its tier.
    pub tier: Tier,
    /// 0 to 1000, lower first.
    pub priority: u16,
    /// Whether it has effect.
    pub mode: PolicyMode,
    /// The namespaces of its subjects.
    pub namespaces: Selector,
    /// The pods of its subjects.
    pub pods: Selector,
    /// The namespaces that it is for cannot be read. Then it is for pods of all that are guarded or isolated without it.
    pub subject_lost: bool,
    /// Its rules; the first match decides.
    pub rules: Vec<(Action, Rule)>,
    /// What its subjects may grant themselves; absent: unbounded.
    pub ceiling: Option<Ceiling>,
}

/// An upper bound of grants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ceiling {
    /// Names that may be granted.
    pub fqdns: Vec<Fqdn>,
    /// Prefixes that may be granted (`permits: CIDRs` allows any).
    pub cidrs: Vec<Cidr>,
    /// Ports that may be granted; empty: any.
    pub ports: Vec<Ports>,
    /// Fields that weaken inspection and are permitted.
    pub permits: Vec<Permit>,
}

/// A weakening that a ceiling permits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Permit {
    /// `privateAddresses`.
    PrivateAddresses,
    /// `sni: Unchecked`.
    SniUnchecked,
    /// `ech: Allow`.
    EchAllow,
    /// `dnsTypes`.
    DnsTypes,
    /// `toCIDRs` of any prefix.
    Cidrs,
    /// Resolving names that no rule matches.
    DnsOpen,
}

/// A name or a pattern, as written and checked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fqdn {
    /// `matchName`.
    Name(Name),
    /// `matchPattern`: the canonical text of a valid pattern.
    Pattern(crate::pattern::Pattern),
}

/// A prefix with exceptions inside it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cidr {
    /// The prefix.
    pub cidr: IpNet,
    /// What is left out; each lies inside `cidr`.
    pub except: Vec<IpNet>,
}

/// Ports of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ports {
    /// The protocol; absent: any (valid only in denies).
    pub proto: Option<Proto>,
    /// First port.
    pub lo: u16,
    /// Last port.
    pub hi: u16,
}

/// How a rule's TCP connections are checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SniMode {
    /// The ClientHello must name an allowed name that is bound to the address.
    #[default]
    Required,
    /// Forwarded without a look: three facts.
    Unchecked,
}

/// One rule: names or prefixes with ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Its name, or its index in decimal.
    pub name: Arc<str>,
    /// Names; empty when it has prefixes.
    pub fqdns: Vec<Fqdn>,
    /// Prefixes; empty when it has names.
    pub cidrs: Vec<Cidr>,
    /// Ports, at least one.
    pub ports: Vec<Ports>,
    /// TLS inspection.
    pub sni: SniMode,
    /// Whether a hello with the encrypted_client_hello extension passes.
    pub ech_allow: bool,
    /// Query types beyond A, AAAA, HTTPS and SVCB (RFC 1035 TYPE values).
    pub dns_types: Vec<u16>,
    /// Answers in these prefixes are accepted.
    pub private_addresses: Vec<IpNet>,
    /// Addresses stay bound at least so long.
    pub min_binding: Option<Duration>,
    /// It has no effect from then on.
    pub expires: Option<UnixSeconds>,
}

impl Rule {
    /// A rule to nothing yet: TLS is inspected, nothing is weakened, and it does not end.
    pub fn new(name: impl Into<Arc<str>>, ports: Vec<Ports>) -> Self {
        Self {
            name: name.into(),
            fqdns: Vec::new(),
            cidrs: Vec::new(),
            ports,
            sni: SniMode::Required,
            ech_allow: false,
            dns_types: Vec::new(),
            private_addresses: Vec::new(),
            min_binding: None,
            expires: None,
        }
    }
}
