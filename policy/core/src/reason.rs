//! Why something was decided: one published list, append-only.

use std::fmt;

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// A reason code. The texts are part of the audit schema and of the metrics; none is ever renamed or removed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum Reason { $($(#[$doc])* $name,)* }

        impl Reason {
            /// Every reason, in the published order.
            pub const ALL: &'static [Reason] = &[$(Reason::$name,)*];

            /// The published kebab-case code.
            pub const fn as_str(self) -> &'static str {
                match self { $(Reason::$name => $text,)* }
            }
        }
    };
}

reasons! {
    /// A rule allows it.
    Allowed = "allowed",
    /// No rule allows it, and the default is to deny.
    NotAllowed = "not-allowed",
    /// A deny rule matches it.
    DeniedByPolicy = "denied-by-policy",
    /// A rule grants it, but a cluster policy's ceiling does not.
    AboveCeiling = "above-ceiling",
    /// This scope's DNS never gave this address for an allowed name.
    NoBinding = "no-binding",
    /// The DNS answer that gave this address has expired.
    BindingExpired = "binding-expired",
    /// No rule could match the name.
    NameNotAllowed = "name-not-allowed",
    /// The ClientHello names no server.
    SniMissing = "sni-missing",
    /// The ClientHello names a server that is not bound to this address, or not allowed.
    SniMismatch = "sni-mismatch",
    /// The ClientHello names an IP address.
    SniIsIp = "sni-is-ip",
    /// The ClientHello is larger than 64 KiB.
    HelloTooLarge = "hello-too-large",
    /// The ClientHello did not come within 10 s.
    HelloTimeout = "hello-timeout",
    /// The ClientHello breaks RFC 8446 or names a server twice.
    HelloMalformed = "hello-malformed",
    /// The first bytes are not a TLS handshake.
    NotTls = "not-tls",
    /// The ClientHello has an encrypted_client_hello extension and the rule does not allow it.
    Ech = "ech",
    /// The HTTP request has no Host.
    HostMissing = "host-missing",
    /// The HTTP Host is not bound to this address, or not allowed.
    HostMismatch = "host-mismatch",
    /// The HTTP request matches no `http` item of the rule.
    HttpRule = "http-rule",
    /// The HTTP request cannot be parsed.
    HttpMalformed = "http-malformed",
    /// QUIC is blocked for this rule; clients fall back to TCP.
    QuicBlocked = "quic-blocked",
    /// The QUIC Initial cannot be parsed or decrypted.
    QuicMalformed = "quic-malformed",
    /// An encrypted DNS service that would bypass the gateway.
    EncryptedDns = "encrypted-dns",
    /// A link-local or metadata address that no cluster policy accepts.
    Metadata = "metadata",
    /// A public name that points to a private or special address.
    Rebinding = "rebinding",
    /// A query type that no connection needs.
    DnsType = "dns-type",
    /// More new unique names below a wildcard than the scope's budget.
    DnsBudget = "dns-budget",
    /// A DNS message that cannot be parsed.
    DnsMalformed = "dns-malformed",
    /// The resolver failed or its answer failed the checks.
    DnsUpstream = "dns-upstream",
    /// A per-namespace quota is used up.
    Quota = "quota",
    /// The source address is not the one that the endpoint owns.
    SpoofedSource = "spoofed-source",
    /// A packet to the tunnel port from a pod.
    TunnelPort = "tunnel-port",
    /// A packet of a pod that is not known or not attached.
    UnknownPod = "unknown-pod",
    /// An IP protocol other than TCP, UDP and the ICMP that path MTU needs.
    Protocol = "protocol",
    /// A fragment that does not go to the cluster.
    Fragment = "fragment",
    /// A packet whose headers cannot be parsed.
    Malformed = "malformed",
    /// A packet whose sender has a device write a checksum into what was judged.
    Checksum = "checksum",
    /// No gateway serves this scope now.
    NoGateway = "no-gateway",
    /// The pool has no egress address of this IP family.
    NoEgressFamily = "no-egress-family",
    /// A packet larger than the path with don't-fragment set; the sender was told.
    TooBig = "too-big",
    /// The node's kernel did not confirm the entry in time.
    BarrierTimeout = "barrier-timeout",
    /// The destination did not accept the connection.
    ConnectFailed = "connect-failed",
    /// A policy change or an expiry ended the connection.
    Revoked = "revoked",
}

impl Reason {
    /// The reason with this published code.
    pub fn from_code(code: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|r| r.as_str() == code)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_kebab_case() {
        for (i, r) in Reason::ALL.iter().enumerate() {
            assert_eq!(Reason::from_code(r.as_str()), Some(*r));
            assert_eq!(*r as usize, i);
            assert!(r.as_str().bytes().all(|b| b.is_ascii_lowercase() || b == b'-'));
        }
    }
}
