//! What the gateway asks of an API server, and tells it: the one package that speaks to Kubernetes.
//!
//! There is no policy in it: objects are handed on as JSON, as the API server sent them.
#![forbid(unsafe_code)]

mod client;
pub mod events;
mod identity;
pub mod lease;
pub mod members;
pub mod objects;
mod pace;
pub mod pods;
pub mod pools;
pub mod status;
pub mod taints;
mod uninstall;
pub mod watch;

pub use client::{Connection, Error, Settings, within};
pub use identity::{Access, ConfigMapKey, Reviewer, SecretKey, User, Versioned, Written};
pub use pace::{Kind, Object, Statuses, Wanted};
pub use uninstall::{FINALIZER, Made, Removed, uninstall};
