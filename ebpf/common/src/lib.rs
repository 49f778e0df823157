//! What kernel and host share: map layouts, packet parsing and the verdict.
//!
//! The crate is `no_std`, allocates nothing and has no dependency in the
//! kernel. [`verdict::verdict`] is generic over [`verdict::Tables`], and the tunnel's ways over [`tunnel::Places`], so the
//! very same code runs in the kernel programs, in host tests and in models.
#![no_std]
#![deny(unsafe_code)]

pub mod checksum;
pub mod code;
pub mod layout;
pub mod names;
pub mod packet;
pub mod tunnel;
pub mod verdict;

pub use code::{Code, Hook, Outcome};
pub use layout::Addr;
pub use packet::{Bytes, Packet, Parsed};
pub use verdict::{Action, Decision, Tables, verdict};
