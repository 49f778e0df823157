//! The chart: rendered, checked against the real API server, installed in it, and its rights tried.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
mod eviction;
mod image;
mod install;
mod schemas;
mod uninstall;
mod values;
