//! What a TLS connection says of itself before anything is encrypted, and the
//! border at which the four facts are checked.
//!
//! ```text
//! client ──▶ Peek: records → ClientHello → Hello {sni, ech}
//!              │ Check::judge(client, destination, hello)
//!              ▼
//!            Gate: until the server's first flight is known, only what may precede a
//! server ──▶ second ClientHello passes; after a HelloRetryRequest that hello must
//!            say what the first one said
//! ```
//!
//! Nothing here opens a socket or reads a clock: bytes and time limits belong to the caller.
#![forbid(unsafe_code)]

pub mod check;
pub mod gate;
pub mod hello;
pub mod peek;
mod record;
#[cfg(test)]
mod testing;

pub use check::{Check, Client, Egress, Judgement};
pub use gate::Gate;
pub use hello::{Hello, Sni};
pub use peek::{MAX_HELLO, Peek, Progress};
