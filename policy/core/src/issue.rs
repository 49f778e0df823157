//! What is wrong with policies, in a form that status, `policy check` and events share.

use std::fmt;
use std::sync::Arc;

/// A policy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PolicyRef {
    /// `EgressPolicy`, `ClusterEgressPolicy`, or `Namespace` (annotations).
    pub kind: &'static str,
    /// Its namespace; empty for cluster policies.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IssueKind {
    /// The item at the path has no effect.
    Refused,
    /// The item has only a part of the effect that was asked for.
    Clipped,
    /// Two policies contradict each other; which one holds is defined.
    Conflicted,
}

/// What it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IssueReason {
    /// A cluster policy's ceiling does not hold it.
    AboveCeiling,
    /// A field that weakens inspection, and a ceiling does not permit it.
    NotPermitted,
    /// The pool does not exist.
    PoolUnknown,
    /// The pool does not admit the namespace.
    PoolNotAllowed,
    /// Another policy that selects the same pod asks for another pool and wins.
    PoolConflict,
    /// Another policy of the same tier and priority selects the same pod and acts differently: Deny comes first.
    EqualPriority,
    /// More wildcard labels hang off one suffix than are matched at a bounded cost.
    TooManyPatterns,
    /// The rules that can meet on one destination have more port ranges than the kernel holds; the rest is denied.
    TooManyPortRanges,
    /// Two pods claim one address: while they do it is isolated on each node that has one of them, and nothing is allowed to it.
    DuplicateAddress,
}

impl IssueReason {
    /// The published code, as in conditions.
    pub const fn as_str(self) -> &'static str {
        match self {
            IssueReason::AboveCeiling => "AboveCeiling",
            IssueReason::NotPermitted => "NotPermitted",
            IssueReason::PoolUnknown => "PoolUnknown",
            IssueReason::PoolNotAllowed => "PoolNotAllowed",
            IssueReason::PoolConflict => "PoolConflict",
            IssueReason::EqualPriority => "EqualPriority",
            IssueReason::TooManyPatterns => "TooManyPatterns",
            IssueReason::TooManyPortRanges => "TooManyPortRanges",
            IssueReason::DuplicateAddress => "DuplicateAddress",
        }
    }
}

/// One finding of compilation.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Issue {
    /// The policy (or namespace) that it is about.
    pub policy: PolicyRef,
    /// The field, such as `egress[db].toCIDRs[0]`; empty for the policy as a whole.
    pub path: String,
    /// How bad it is.
    pub kind: IssueKind,
    /// What it is.
    pub reason: IssueReason,
    /// What it is measured against: the other policy, the pool, the pattern or the address.
    pub by: Option<Arc<str>>,
}

impl fmt::Display for Issue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.policy.kind)?;
        if !self.policy.namespace.is_empty() && self.policy.namespace != self.policy.name {
            write!(f, "{}/", self.policy.namespace)?;
        }
        write!(f, "{}", self.policy.name)?;
        if !self.path.is_empty() {
            write!(f, ": {}", self.path)?;
        }
        let kind = match self.kind {
            IssueKind::Refused => "refused",
            IssueKind::Clipped => "clipped",
            IssueKind::Conflicted => "conflicted",
        };
        write!(f, ": {kind}, {}", self.reason.as_str())?;
        if let Some(by) = &self.by {
            write!(f, " (by {by})")?;
        }
        Ok(())
    }
}
