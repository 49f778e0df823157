//! The borders of the DNS service: what it asks the policy ([`View`]) and the
//! ledger ([`Binder`]). The gateway implements both.

use std::future::Future;
use std::net::IpAddr;
use std::sync::Arc;

use tidegate_policy::event::{RuleRef, Who};
use tidegate_policy::{GroupKey, Name, Reason, ScopeKey};

use crate::encrypted;

/// What a decision means for the pods of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AskMode {
    /// Decisions hold.
    Enforced,
    /// Everything resolves, and what would be denied is reported. Only allowed names bind.
    Audited,
    /// Only denies hold; all else resolves as if Tidegate were not there.
    Guarded,
}

/// A pod that asks, and what its answers depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asker {
    /// Its address.
    pub ip: IpAddr,
    /// The pod, for events.
    pub who: Arc<Who>,
    /// Its scope: the unit of learning and of the answer store.
    pub scope: ScopeKey,
    /// Its group: the unit of decision.
    pub group: GroupKey,
    /// The group's dense index in the view that returned this asker.
    pub group_index: u32,
    /// What decisions mean for it.
    pub mode: AskMode,
    /// Whether its pool has an IPv4 egress address.
    pub v4: bool,
    /// Whether its pool has an IPv6 egress address.
    pub v6: bool,
}

/// How a denied query is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Denial {
    /// NXDOMAIN: no rule could match the name or anything below it (RFC 8020).
    NxDomain,
    /// NOERROR without records (RFC 2308): something below the name, or another type of it, may be allowed.
    NoData,
    /// REFUSED, where the administrator asked for it.
    Refused,
}

/// What holds for the answers to an allowed name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allow {
    /// The rule that allows it.
    pub rule: Option<RuleRef>,
    /// Whether a matching rule allows ECH, so that `ech` stays in HTTPS and SVCB records (RFC 9460).
    pub ech: bool,
    /// Whether a matching rule lists the asked type in `dnsTypes`. A, AAAA, CNAME, HTTPS and SVCB need no listing.
    pub extra_type: bool,
    /// Whether only patterns match, so that the scope's tunnelling budget applies.
    pub wildcard: bool,
    /// The longest `minBindingSeconds` of the matching rules, in seconds; 0 if none has one.
    pub min_binding_secs: u32,
}

/// What the policy says of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NameDecision {
    /// It resolves, and its addresses bind.
    Allow(Allow),
    /// It resolves, and nothing binds (`dnsFilter: Open`, guarded pods).
    Resolve {
        /// Reported with verdict allow.
        reason: Reason,
        /// The rule that decided, if one did.
        rule: Option<RuleRef>,
    },
    /// It does not resolve.
    Deny {
        /// How that is said.
        denial: Denial,
        /// Why.
        reason: Reason,
        /// The rule that decided, if one did.
        rule: Option<RuleRef>,
    },
}

/// What the policy says of an address in an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AddressDecision {
    /// Nothing: the built-in ranges of [`crate::special`] decide.
    Default,
    /// A matching rule's `privateAddresses` holds it; metadata, loopback and the like stay filtered.
    Accept,
    /// It is filtered: a node, gateway, API server, pod or service address, or a denied prefix.
    Filter(Reason),
}

/// An immutable snapshot of the policy. Every method is called on the hit path:
/// none may block, and none should allocate.
pub trait View: Send + Sync + 'static {
    /// Changes whenever any decision of the view may have changed.
    fn generation(&self) -> u64;

    /// Why no query is answered now, if none is: each then gets SERVFAIL.
    fn closed(&self) -> Option<Reason> {
        None
    }

    /// Where a canonical name of the cluster leads to outside it, if it is known to (an ExternalName Service). Asking
    /// the cluster's DNS for it would be a lookup of that name, so policy decides about that name first.
    fn leads_to(&self, name: &str) -> Option<Name> {
        let _ = name;
        None
    }

    /// The pod with this address; `None` if it is not known (it gets SERVFAIL, `unknown-pod`).
    fn asker(&self, client: IpAddr) -> Option<&Asker>;

    /// What enforcement would do with a query; the asker's mode is applied by
    /// this crate, so an audited asker gets the same answer as an enforced one.
    /// Guarded askers get `Deny` only where a deny rule denies the whole name, `Allow` where a deny holds on some ports
    /// only and so needs the binding in the kernel, else `Resolve`.
    ///
    /// `name` is a canonical [`tidegate_policy::Name`] text, or has a backslash
    /// (an octet that no pattern matches, escaped as `\DDD`), or is `.`, the root.
    /// Cluster suffixes, the canary and the encrypted resolvers never come here.
    fn name(&self, asker: &Asker, name: &str, qtype: u16) -> NameDecision;

    /// What holds for an address that `name` resolved to.
    fn address(&self, asker: &Asker, name: &str, ip: IpAddr) -> AddressDecision;

    /// Whether an HTTPS or SVCB record may point at `port` of `name` (in host byte order).
    /// Without more knowledge only 443 is.
    fn svcb_port(&self, asker: &Asker, name: &str, port: u16) -> bool {
        let _ = (asker, name);
        port == 443
    }

    /// Whether a deny holds for a name that the answer's CNAME chain goes through.
    /// It need not be allowed: the question's name is what rules match.
    fn chain(&self, asker: &Asker, owner: &str, qtype: u16) -> Option<(Reason, Option<RuleRef>)> {
        match self.name(asker, owner, qtype) {
            NameDecision::Deny { reason: reason @ (Reason::DeniedByPolicy | Reason::EncryptedDns), rule, .. } => {
                Some((reason, rule))
            }
            _ => None,
        }
    }

    /// Whether this is the name of a public encrypted resolver; overridden where the list is updated.
    fn encrypted_name(&self, name: &str) -> bool {
        encrypted::is_resolver_name(name)
    }

    /// Whether this is the address of a public encrypted resolver; overridden where the list is updated.
    fn encrypted_address(&self, ip: IpAddr) -> bool {
        encrypted::is_resolver_address(ip)
    }
}

/// Addresses that should be bound to a name before they are sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BindRequest {
    /// Who asked: scope and node come from here.
    pub asker: Asker,
    /// The name to bind to, canonical.
    pub name: Arc<str>,
    /// The addresses, at most [`crate::MAX_ADDRESSES`], none filtered.
    pub ips: Vec<IpAddr>,
    /// What is left of the RRset's own TTL, in seconds. The fact's expiry follows from it, never from the reply.
    pub ttl_secs: u32,
    /// The rule's `minBindingSeconds`; 0 if it has none.
    pub min_binding_secs: u32,
}

/// The ledger, as the DNS service sees it.
pub trait Binder: Send + Sync + 'static {
    /// Whether the kernel of the asker's node is confirmed to hold each address
    /// for this name at least `ttl_secs` from now. Hit path: lock-cheap, no allocation.
    fn standing(&self, asker: &Asker, name: &str, ips: &[IpAddr], ttl_secs: u32) -> bool;

    /// Learns the facts and waits until the asker's node has confirmed them; the
    /// implementation bounds the wait. Returns the addresses that are bound (a
    /// quota may leave some out). An error is answered with SERVFAIL:
    /// `barrier-timeout`, `quota`, `no-gateway`.
    fn bind(&self, request: BindRequest) -> impl Future<Output = Result<Vec<IpAddr>, Reason>> + Send;
}
