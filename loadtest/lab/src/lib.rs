//! A whole cluster in network namespaces on one machine: nodes, pods, gateways, an internet with its servers.
//!
//! The lab starts the product's own processes with ordinary configuration files; no code of the product knows it.
//! docs/lab.md describes the scenario file and the commands.
#![forbid(unsafe_code)]

pub mod admin;
pub mod certs;
pub mod change;
pub mod cluster;
pub mod family;
pub mod foreign;
pub mod forge;
pub mod hello;
pub mod kube;
pub mod kubelet;
pub mod lab;
pub mod liar;
pub mod netns;
pub mod observe;
pub mod place;
pub mod probe;
pub mod product;
pub mod rules;
pub mod scenario;
pub mod serve;
pub mod state;
pub mod steady;
pub mod story;
pub mod traces;
pub mod world;

pub use lab::{Lab, Options};
pub use observe::Mark;
pub use place::{Output, Place, Running};
pub use scenario::Scenario;
