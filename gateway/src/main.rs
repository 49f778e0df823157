//! The `tidegate` binary.
mod config;
mod egress;
fn main() {}
