//! The pure core of Tidegate: names, patterns, rules and what follows from them.
//!
//! Nothing here opens a socket, reads a clock or knows a runtime. Time is an
//! argument; what should happen is a returned value.
#![forbid(unsafe_code)]

mod class;
mod clip;
mod compile;
mod decide;
mod decision;
pub mod denied;
mod eval;
pub mod event;
mod issue;
pub mod key;
mod layer;
pub mod matcher;
pub mod model;
pub mod name;
pub mod pattern;
pub mod port;
pub mod prefix;
mod ranges;
pub mod reason;
pub mod shards;
mod space;
pub mod special;
pub mod state;
pub mod world;

pub use key::{ClassKey, GroupKey, PrefixSetKey, ScopeKey};
pub use name::{Name, NameError};
pub use port::{Carry, PortRange, PortSet, Proto, Via};
pub use reason::Reason;
pub use world::World;
