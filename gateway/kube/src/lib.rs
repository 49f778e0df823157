//! What the gateway asks of an API server, and tells it: the one package that speaks to Kubernetes.
//!
//! There is no policy in it: objects are handed on as JSON, as the API server sent them.
#![forbid(unsafe_code)]

mod client;
mod identity;
pub mod members;
pub mod objects;
pub mod pools;
mod uninstall;
pub mod watch;

pub use client::{Connection, Error, Settings, within};
pub use identity::{Access, ConfigMapKey, Reviewer, SecretKey, User, Versioned, Written};
pub use uninstall::{FINALIZER, Removed, uninstall};
