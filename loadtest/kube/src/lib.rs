//! A real Kubernetes API for tests: etcd and kube-apiserver, started in seconds, gone when dropped.
//!
//! Each [`Cluster`] has a loopback address, a folder and certificates of its own, so any number of them run side by
//! side. The programs come from `scripts/kube-tools`, which builds them once where the machine has none.

mod api;
mod certs;
mod cluster;
mod process;
mod site;
mod tools;

pub use api::{Answer, Api};
pub use cluster::{Backup, Cluster, Controllers};
pub use site::{API_PORT, Addresses, NodeFiles, Output, Site};
pub use tools::{Tool, tool};
