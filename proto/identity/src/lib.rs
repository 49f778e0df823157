//! Who gateways and nodes are to each other.
//!
//! A certificate of the cluster's authority speaks for one gateway, `NAME.gateway.tidegate`, or one node,
//! `NODE.node.tidegate`, with the UID of its Node object where there is one. Both sides show theirs, and each checks the other's. One thing is done without a
//! certificate: asking for a first one, over a connection that offers [`JOIN`] as its protocol (ALPN, RFC 7301).
#![forbid(unsafe_code)]

mod connect;
mod credentials;
mod files;
mod token;

pub use connect::{Connection, connect, join};
pub use credentials::{Credentials, Source, authorities_from_pem};
pub use files::{Files, Paths};
pub use token::{Claims, MAX_TOKEN};

use std::time::Duration;

use rustls_pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;

/// What a client offers that wants a certificate and has none: the server then asks for none, and serves `Join` alone.
pub const JOIN: &[u8] = b"tidegate-join";
/// What everybody else speaks.
const H2: &[u8] = b"h2";

/// What a certificate speaks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A node, by its agent.
    Node,
    /// A gateway.
    Gateway,
}

impl Role {
    /// What follows the name in a certificate.
    pub const fn suffix(self) -> &'static str {
        match self {
            Self::Node => ".node.tidegate",
            Self::Gateway => ".gateway.tidegate",
        }
    }

    /// The DNS name of a certificate that speaks for `name`.
    pub fn dns_name(self, name: &str) -> String {
        format!("{name}{}", self.suffix())
    }
}

/// Why somebody is not known, or cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    File {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// What is no certificate, no key, or does not fit together.
    #[error("{what}: {why}")]
    Unusable {
        /// What it is.
        what: &'static str,
        /// Why.
        why: String,
    },
    /// There is none yet.
    #[error("there is no certificate yet")]
    None,
    /// No connection.
    #[error("cannot connect: {0}")]
    Connect(#[from] std::io::Error),
    /// A certificate does not hold now, as one of both clocks has it.
    #[error("cannot connect: {0}: is the clock of this machine right, and the gateway's?")]
    Clock(std::io::Error),
    /// It took too long.
    #[error("no connection within {} ms", .0.as_millis())]
    Slow(std::time::Duration),
    /// The other side is nobody's gateway.
    #[error("the other side's certificate names no gateway")]
    Nameless,
    /// The connection ended before it was used.
    #[error("the connection ended: {0}")]
    Transport(#[from] tonic::transport::Error),
}

pub(crate) fn unusable(what: &'static str) -> impl Fn(rustls::Error) -> Error {
    move |e| Error::Unusable { what, why: e.to_string() }
}

/// Whether this can stand before a [`Role::suffix`]: DNS labels, together at most 190 octets.
pub fn is_name(s: &str) -> bool {
    !s.is_empty()
        && s.len() <= 190
        && s.split('.').all(|label| {
            !label.is_empty()
                && label.len() <= 63
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        })
}

/// The names that a certificate speaks for in a role.
fn names<'n>(san: &'n [GeneralName<'n>], role: Role) -> impl Iterator<Item = &'n str> {
    san.iter().filter_map(move |n| match n {
        GeneralName::DNSName(d) => d.strip_suffix(role.suffix()).filter(|n| is_name(n)),
        _ => None,
    })
}

/// The UIDs of nodes that a certificate speaks for.
fn uids<'n>(san: &'n [GeneralName<'n>]) -> impl Iterator<Item = &'n str> {
    san.iter().filter_map(|n| match n {
        GeneralName::URI(uri) => uri.strip_prefix(NODE_UID),
        _ => None,
    })
}

/// The only one that there is.
fn only<T>(mut all: impl Iterator<Item = T>) -> Option<T> {
    let one = all.next()?;
    all.next().is_none().then_some(one)
}

/// The one name that a certificate speaks for in a role. None if there is none, or more than one. Says nothing of who
/// signed it.
pub fn name_of(certificate: &CertificateDer<'_>, role: Role) -> Option<String> {
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let san = certificate.subject_alternative_name().ok()??;
    only(names(&san.value.general_names, role)).map(str::to_owned)
}

/// For whom a certificate speaks, and how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bearer {
    /// As what.
    pub role: Role,
    /// The name.
    pub name: String,
    /// The UID of a node's object; absent where nodes are no objects.
    pub uid: Option<String>,
    /// When it ends. Unix seconds.
    pub ends: u64,
}

impl Bearer {
    /// None if it speaks for nobody, or for more than one. Says nothing of who signed it.
    pub fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
        let san = certificate.subject_alternative_name().ok()??;
        let san = &san.value.general_names;
        let all = [Role::Node, Role::Gateway].into_iter();
        let (role, name) = only(all.flat_map(|role| names(san, role).map(move |name| (role, name.to_owned()))))?;
        let mut uids = uids(san).filter(|_| role == Role::Node);
        let uid = uids.next().map(str::to_owned);
        let ends = u64::try_from(certificate.validity().not_after.timestamp()).ok()?;
        uids.next().is_none().then_some(Self { role, name, uid, ends })
    }

    /// How long it still holds. `now`: Unix seconds.
    pub fn left(&self, now: u64) -> Duration {
        Duration::from_secs(self.ends.saturating_sub(now))
    }
}

/// Goes before the UID of a node in its certificate's URI.
const NODE_UID: &str = "tidegate://node-uid/";

/// The URI of a certificate that speaks for the node with this UID.
pub fn node_uid_uri(uid: &str) -> String {
    format!("{NODE_UID}{uid}")
}

/// The UID of the node that a certificate speaks for. None if there is none, or more than one.
pub fn node_uid_of(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let san = certificate.subject_alternative_name().ok()??;
    only(uids(&san.value.general_names)).map(str::to_owned)
}

/// When a certificate begins and ends to hold, in Unix seconds. None if it is no certificate.
pub fn validity(certificate: &CertificateDer<'_>) -> Option<(i64, i64)> {
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    Some((certificate.validity().not_before.timestamp(), certificate.validity().not_after.timestamp()))
}
