//! The pure core of Tidegate: names, patterns, rules and what follows from them.
//!
//! Nothing here opens a socket, reads a clock or knows a runtime. Time is an
//! argument; what should happen is a returned value.
#![forbid(unsafe_code)]

pub mod event;
pub mod key;
pub mod model;
pub mod name;
pub mod pattern;
pub mod port;
pub mod reason;
pub mod state;

pub use key::{ClassKey, GroupKey, PrefixSetKey, ScopeKey};
pub use name::{Name, NameError};
pub use port::{Carry, PortRange, PortSet, Proto, Via};
pub use reason::Reason;
