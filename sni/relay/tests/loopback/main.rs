//! The relay between real TLS clients and servers: over loopback, and steered by TPROXY between
//! network namespaces (as root).
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions, not in their helpers")]

mod carry;
mod common;
mod decide;
mod steered;
