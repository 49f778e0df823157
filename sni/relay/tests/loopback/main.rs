//! The relay over loopback, between real TLS clients and servers.

mod carry;
mod common;
mod decide;
