//! One value for every observable thing: the audit record, the metric and the
//! log line are all made from it, so that they cannot disagree.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::{Carry, Reason};

/// What was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// It went through.
    Allow,
    /// It was refused.
    Deny,
    /// It went through because the namespace is audited; enforcement would refuse it.
    Audit,
}

impl Verdict {
    /// The published text.
    pub const fn as_str(self) -> &'static str {
        match self {
            Verdict::Allow => "allow",
            Verdict::Deny => "deny",
            Verdict::Audit => "audit",
        }
    }
}

/// Who asked: what is known of an endpoint, shared between all of its events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Who {
    /// Namespace of the pod.
    pub namespace: Arc<str>,
    /// Name of the pod.
    pub pod: Arc<str>,
    /// Name of the pod's node.
    pub node: Arc<str>,
}

/// Which rule decided.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleRef {
    /// `EgressPolicy`, `ClusterEgressPolicy` or `Namespace` (an annotation).
    pub kind: &'static str,
    /// Namespace of the policy; empty for cluster policies.
    pub namespace: Arc<str>,
    /// Name of the policy.
    pub policy: Arc<str>,
    /// Name of the rule, or its index where it has none.
    pub rule: Arc<str>,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// A DNS query was decided.
    Dns {
        /// The name in escaped presentation form, no final dot.
        name: Arc<str>,
        /// The query type (RFC 1035 TYPE).
        qtype: u16,
        /// The response code sent.
        rcode: u8,
        /// The addresses sent.
        answers: Vec<IpAddr>,
        /// Whether it came from the answer store.
        cached: bool,
        /// The server that the pod asked.
        server: SocketAddr,
    },
    /// A relayed connection was accepted or refused.
    Open {
        /// The pod's address and port.
        client: SocketAddr,
        /// Where the pod wanted to go.
        asked: SocketAddr,
        /// Where the relay went, when it did.
        actual: Option<SocketAddr>,
        /// The egress address and port, when it is known.
        egress: Option<SocketAddr>,
        /// The name that the hello said, escaped.
        sni: Option<Arc<str>>,
        /// How it is carried.
        carry: Carry,
    },
    /// A relayed connection ended.
    Close {
        /// The pod's address and port.
        client: SocketAddr,
        /// Where the pod wanted to go.
        asked: SocketAddr,
        /// Where the relay went.
        actual: Option<SocketAddr>,
        /// The name that the hello said.
        sni: Option<Arc<str>>,
        /// Bytes from the pod.
        sent: u64,
        /// Bytes to the pod.
        received: u64,
        /// How long it lived, in milliseconds.
        millis: u64,
    },
    /// A kernel program decided about a packet: a drop, a forwarded flow's first packet, or what audit would have dropped.
    Packet {
        /// Where it was decided: the hook's name.
        hook: &'static str,
        /// IP protocol number.
        protocol: u8,
        /// Source address and port (0 if the protocol has none).
        source: SocketAddr,
        /// Destination address and port (0 if the protocol has none).
        destination: SocketAddr,
    },
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Who; absent where the source is not known.
    pub who: Option<Arc<Who>>,
    /// What happened.
    pub what: What,
    /// What was decided.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// The rule that decided, if one did.
    pub rule: Option<RuleRef>,
    /// How many times it happened, at least 1.
    pub count: u64,
}

/// Where events go. Never blocks; an implementation counts what it had to drop.
pub trait Emit: Send + Sync + 'static {
    /// Takes one event.
    fn emit(&self, event: Event);
}

impl<F: Fn(Event) + Send + Sync + 'static> Emit for F {
    fn emit(&self, event: Event) {
        self(event);
    }
}

/// A name from the wire in escaped presentation form: every octet that is not
/// printable ASCII, and `\` and `"`, become `\DDD` (RFC 1035, section 5.1), so that no name can forge a record.
pub fn escape(bytes: &[u8]) -> String {
    use std::fmt::Write;
    let mut out = String::with_capacity(bytes.len());
    for &b in bytes {
        if (0x21..0x7f).contains(&b) && b != b'\\' && b != b'"' {
            out.push(char::from(b));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(out, "\\{b:03}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escaping_leaves_no_way_to_forge() {
        assert_eq!(escape(b"a.example"), "a.example");
        assert_eq!(escape(b"a\n\"\\ \xff"), "a\\010\\034\\092\\032\\255");
    }
}
