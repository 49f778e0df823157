//! The answers that groups give.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use crate::eval::Step;
use crate::event::RuleRef;
use crate::{Carry, PortSet, Reason, Via};

/// A built-in verdict that comes before every policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BuiltIn {
    /// Link-local or metadata, and no cluster policy accepts exactly that prefix.
    Metadata,
    /// DNS over TLS or QUIC, and no cluster policy accepts it.
    EncryptedDns,
}

/// How a decision came about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Explanation {
    /// A built-in verdict that decided before any policy.
    pub built_in: Option<BuiltIn>,
    /// The policies that were consulted, in order, and what each said.
    pub steps: Vec<Step>,
    /// No policy decided: the group's default did.
    pub default: bool,
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut sep = "";
        match self.built_in {
            Some(BuiltIn::Metadata) => {
                f.write_str("link-local and metadata addresses are denied unless a cluster policy of the Admin tier accepts exactly that prefix")?;
            }
            Some(BuiltIn::EncryptedDns) => {
                f.write_str("encrypted DNS (port 853) is denied unless a cluster policy of the Admin tier accepts it")?;
            }
            None => {}
        }
        if self.built_in.is_some() {
            sep = "; ";
        }
        for s in &self.steps {
            write!(f, "{sep}{s}")?;
            sep = "; ";
        }
        if self.default {
            write!(f, "{sep}no policy decides: the default holds")?;
        }
        Ok(())
    }
}

/// What enforcement does with a connection; an audited group reports it and lets it pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What happens to it. The default is already in it: `Deny` for isolated groups, `Pass` for guarded ones.
    pub via: Via,
    /// Why.
    pub reason: Reason,
    /// The rule that decided; absent for built-in verdicts and the default.
    pub rule: Option<RuleRef>,
    /// Whether a hello with the encrypted_client_hello extension passes.
    pub ech_allow: bool,
    /// How it came about.
    pub explanation: Explanation,
}

impl Decision {
    /// Whether it may go on.
    pub fn allowed(&self) -> bool {
        !matches!(self.via, Via::Deny | Via::Allow(Carry::Block))
    }
}

/// How a query is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// It resolves, and its addresses bind.
    Bind,
    /// It resolves, and nothing binds.
    Resolve,
    /// NOERROR without records: the type is not wanted, or something below the name may be allowed.
    NoData,
    /// No rule allows the name or anything below it.
    NxDomain,
}

/// What holds for the answers of a name: the union of the rules that allow it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NameFacts {
    /// `ech` stays in HTTPS and SVCB records (RFC 9460).
    pub ech_allow: bool,
    /// Answers in these prefixes are accepted although they are private.
    pub private: Vec<IpNet>,
    /// Query types beyond A, AAAA, CNAME, HTTPS and SVCB, sorted.
    pub dns_types: Vec<u16>,
    /// The longest `minBindingSeconds`.
    pub min_binding: Option<Duration>,
    /// The ports of the name by name rules alone.
    pub ports: PortSet,
}

/// What enforcement does with a query; an audited group reports it and resolves everything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameDecision {
    /// How it is answered.
    pub answer: Answer,
    /// Why.
    pub reason: Reason,
    /// The rule that decided, if one did.
    pub rule: Option<RuleRef>,
    /// Only patterns match the name, so that the scope's tunnelling budget applies.
    pub wildcard: bool,
    /// What holds for its answers; empty where nothing allows it.
    pub facts: Arc<NameFacts>,
}

/// What policy says of an address in an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AddressDecision {
    /// Nothing: the built-in ranges decide.
    Default,
    /// A rule's `privateAddresses` holds it.
    Accept,
    /// It is left out: an in-cluster address, or denied on every port.
    Filter(Reason),
}
