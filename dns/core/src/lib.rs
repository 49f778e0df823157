//! The pure half of the DNS service.
//!
//! ```text
//! datagram ─ wire::parse ─ serve::serve ─┬─ reply (policy, or the answer store)
//!                                        └─ Miss ─ dns/server: upstream ─ answer::check ─ store
//!                                                              plan ─ Binder::bind ─ render
//! ```
//!
//! Nothing here opens a socket, reads a clock or knows a runtime. Time is an
//! argument, in milliseconds of any monotonic clock; seeds of hashes are too.
//! The policy and the ledger come in through [`View`] and [`Binder`].
#![forbid(unsafe_code)]

pub mod answer;
pub mod budget;
pub mod encrypted;
pub mod reply;
pub mod serve;
pub mod special;
pub mod store;
pub mod svcb;
pub mod view;
pub mod wire;

pub use answer::Stored;
pub use serve::{MAX_ADDRESSES, Outcome, Rules, Scratch, Served, serve};
pub use store::{Store, StoreLimits};
pub use view::{AddressDecision, Allow, AskMode, Asker, BindRequest, Binder, Denial, NameDecision, View};
