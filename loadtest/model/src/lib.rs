//! A small reference model beside the real code.
//!
//! ```text
//!            ┌─ objects ──▶ reference: rules walked one by one, facts in one flat map ──▶ what must happen
//! bytes ─▶ drive
//!            └─ gateway: World, Ledger, dns plan, contract ─▶ node: merge, told ─▶ kernel: parse, verdict ──▶ what happens
//! ```
//!
//! Bytes are decoded into edits, questions, deliveries, cuts, restarts, time and packets, so that a fuzzer
//! can look for what nobody thought of. After each step, and for everything once all acks are in:
//!
//! - a packet fares as policy says, with the same carry, on the node and at the gateway;
//! - the addresses of a released answer connect for as long as the answer said;
//! - what another scope learnt counts for nothing, and an expired fact starts nothing;
//! - whatever is the same before and after an edit is the same during it, and live flows go on;
//! - nothing is left when everything has ended.
//!
//! Threads, sockets and the kernel itself are left out: `gateway` and `node` put the real parts together in the
//! order of the gateway's core and the agent's reconciler, with queues that deliver when the bytes say so.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a model fails by panicking")]

mod bytes;
mod drive;
mod gateway;
mod kernel;
mod node;
mod objects;
mod reference;
#[path = "../../../ebpf/agent/src/told.rs"]
#[allow(dead_code, reason = "the agent's own")]
mod told;

pub use bytes::random;
pub use drive::{Stats, run, run_telling};
