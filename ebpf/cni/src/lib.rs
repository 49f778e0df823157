//! The chained CNI plugin `tidegate cni`, and what it shares with the agent.
//!
//! ```text
//!  runtime ──env, stdin──▶ spec ──▶ plugin ──one line──▶ agent: attaches, waits for the pod's policy, answers
//!                                    │  └─ no agent ───▶ standing (disk) ──▶ static program, or nothing
//!                                    └─ record (/run): which pod is behind which device; agents read it when they start
//! ```
//! [`spec`], [`conflist`], [`wire`] and the types of [`files`] are pure. The plugin makes no runtime and no threads but one,
//! which looks into the pod's network namespace.
#![forbid(unsafe_code)]

pub mod conflist;
pub mod files;
mod link;
pub mod plugin;
pub mod spec;
pub mod wire;

pub use plugin::main;
