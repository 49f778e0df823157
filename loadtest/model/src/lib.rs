//! A small reference model beside the real code.
//!
//! ```text
//!            ┌─ objects ──▶ reference: rules walked one by one, a flat map of facts for each gateway ──▶ what must happen
//! bytes ─▶ drive
//!            └─ gateways: World, Ledger, Ownership, Desired, dns plan, contract ─▶ nodes: merge, told ─▶ kernel: parse, verdict ──▶ what happens
//! ```
//!
//! Bytes are decoded into edits, questions, deliveries, cuts, restarts, deaths, time and packets, so that a fuzzer
//! can look for what nobody thought of. Three gateways follow each other as owners. After each step, and for everything
//! once all acks are in:
//!
//! - a packet fares as policy says, with the same carry, on the node and at each gateway: at the owner exactly by what
//!   that gateway knows, and nowhere else;
//! - the addresses of a released answer connect for as long as the answer said;
//! - what another scope learnt counts for nothing, and an expired fact starts nothing;
//! - whatever is the same before and after an edit is the same during it, and live flows go on;
//! - when everything is well every pair has one holder, whom all follow, and every gateway knows what any of them learnt;
//! - nodes hold what gateways would tell a new one, and nothing is left when everything has ended.
//!
//! Threads, sockets and the kernel itself are left out: `gateway` and `node` put the real parts together in the
//! order of the gateway's core and the agent's reconciler, with queues that deliver when the bytes say so.
#![forbid(unsafe_code)]
// Unit tests of the shared files need what their own packages have, and run there; clippy builds them for all targets.
#![cfg(not(test))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a model fails by panicking")]

mod ask;
mod bytes;
mod compare;
mod drive;
mod gateway;
mod kernel;
mod machines;
mod node;
mod objects;
mod peers;
mod reference;

#[path = "../../../gateway/src/asker.rs"]
mod asker;
#[path = "../../../gateway/src/core/classes.rs"]
#[allow(dead_code, reason = "the core's own")]
mod classes;
#[path = "../../../gateway/src/desired.rs"]
#[allow(dead_code, reason = "the core's own")]
mod desired;
#[path = "../../../gateway/src/core/machine.rs"]
mod machine;
#[path = "../../../gateway/src/members.rs"]
#[allow(dead_code, reason = "the core's own")]
mod members;
#[path = "../../../ebpf/agent/src/orphans.rs"]
mod orphans;
#[path = "../../../gateway/src/ownership.rs"]
#[allow(dead_code, reason = "the core's own")]
mod ownership;
#[path = "../../../gateway/src/core/placement.rs"]
#[allow(dead_code, reason = "the core's own")]
mod placement;
#[path = "../../../gateway/src/core/pushes.rs"]
mod pushes;
#[path = "../../../gateway/src/records.rs"]
#[allow(dead_code, reason = "the core's own")]
mod records;
#[path = "../../../gateway/src/core/sent.rs"]
#[allow(dead_code, reason = "the core's own")]
mod sent;
#[path = "../../../gateway/src/core/settling.rs"]
mod settling;
#[path = "../../../ebpf/agent/src/told.rs"]
#[allow(dead_code, reason = "the agent's own")]
mod told;

/// What `desired` reads of a gateway's configuration.
mod config {
    pub use crate::objects::{Config, Owner, Replica};
}

/// What `desired` says of egress pairs.
mod egress {
    pub mod nft {
        use std::net::{Ipv4Addr, Ipv6Addr};

        /// A pair that a gateway holds.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub struct HeldPair {
            /// Index in the mark.
            pub index: u8,
            /// Its IPv4 address.
            pub ipv4: Option<Ipv4Addr>,
            /// Its IPv6 address.
            pub ipv6: Option<Ipv6Addr>,
        }
    }
}

pub use bytes::random;
pub use drive::{Stats, run, run_telling};
