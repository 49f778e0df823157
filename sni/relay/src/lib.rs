//! The TLS relay: takes connections that were steered to it, reads their ClientHello, asks the
//! four-fact check, and moves bytes to where the pod wanted to go, from the scope's egress address.
//!
//! ```text
//! accept ─▶ admit (known pod, quota) ─▶ hello ─▶ judge ─▶ race addresses ─▶ flow ─▶ close
//!              │                          │        │            │             │
//!              └──────────── reset, event, reason ─┴────────────┘     splice, gate, idle, revoke
//! ```
//!
//! One thread with a runtime of its own per core, each with listeners of its own (SO_REUSEPORT): a
//! connection never changes threads. Sockets are set to reset on close from the first moment on, so
//! that whatever goes wrong, even the death of the process, never looks like the end of the data.

#![deny(unsafe_code)]

mod config;
mod connect;
mod flow;
pub mod metric;
mod pipe;
mod registry;
mod relay;
mod serve;
mod socket;

pub use config::{Destination, Error, RelayConfig};
pub use registry::{Live, Registry};
pub use relay::Relay;
