//! The relay between real TLS clients and servers: over loopback, and steered by TPROXY between
//! network namespaces (as root).

mod carry;
mod common;
mod decide;
mod steered;
