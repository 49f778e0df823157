//! Fuzz targets: each takes any bytes, and panics when a promise about hostile input is broken.
//!
//! `cargo test` replays `corpus/` and what comes of damaging it a little. `fuzz/` hands the same functions to
//! libFuzzer: `cargo +nightly fuzz run --fuzz-dir loadtest/fuzz/fuzz TARGET loadtest/fuzz/corpus/TARGET`.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a fuzz target fails by panicking")]

mod cni;
mod dns;
mod manifests;
mod messages;
mod packets;
mod tls;
mod tunnel;

pub use cni::cni;
pub use dns::{dns_answer, dns_query};
pub use manifests::{annotation, manifest};
pub use messages::message;
pub use packets::{kernel_event, packet};
pub use tls::tls;
pub use tunnel::tunnel;

/// A target's name, which is also its corpus's, and the target. It says whether the input was taken, so that there was
/// more to hold than that it is refused.
pub type Target = (&'static str, fn(&[u8]) -> bool);

/// Every target.
pub const TARGETS: &[Target] = &[
    ("annotation", annotation),
    ("cni", cni),
    ("dns_answer", dns_answer),
    ("dns_query", dns_query),
    ("kernel_event", kernel_event),
    ("manifest", manifest),
    ("message", message),
    ("packet", packet),
    ("tls", tls),
    ("tunnel", tunnel),
];
