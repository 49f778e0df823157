//! The contract between gateways and agents, two gRPC streams per pair, and among gateways, one each way.
//!
//! [`wire`] is generated from `tidegate.proto` and committed, so that no build
//! needs a protobuf compiler; a test compares the two. [`convert`] turns
//! messages into the types of `tidegate-policy` and back, and refuses whatever
//! is malformed or too large, naming the field.
#![forbid(unsafe_code)]

pub mod convert;

/// The generated messages, client and server. Write it anew with
/// `UPDATE_PROTO=1 cargo test -p tidegate-proto --test generated`.
#[rustfmt::skip]
#[allow(missing_docs, clippy::all)]
#[path = "generated.rs"]
pub mod wire;

pub use convert::{
    Beat, Claim, FactsBatch, FactsUp, GrantEntry, Joiner, MAX_DENIED, MAX_GATEWAY_ADDRESSES, MAX_ORPHANS, Pair,
    PeerFact, PeerMessage, Problem, ScopeClaim, Seen, StartedPod, StateBatch, Up, WireError, decode_peer, denials,
    encode_peer, started,
};

/// The most octets of one gRPC message; both sides set their decoding limit to it.
pub const MAX_MESSAGE: usize = 16 << 20;
