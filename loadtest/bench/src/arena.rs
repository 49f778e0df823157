//! The network namespace in which everything runs, and the names and addresses in it.
//!
//! All of [`NAMES`] lead to addresses of their own on the loopback device, so that DNS answers, rules
//! and connections are about the same names, and one source port range is no limit.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::Command;

use anyhow::{Result, ensure};
use nix::sched::{CloneFlags, unshare};

/// How many names there are.
pub const NAMES: u32 = 1000;
/// The pod that asks and connects.
pub const POD: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 1);
/// The source address of upstream connections.
pub const EGRESS: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
/// The authority that all DNS servers ask, once for each name.
pub const AUTHORITY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 5300);
/// The port on which backends listen, on all addresses.
pub const BACKEND: u16 = 443;

/// The text of a name.
pub fn name(i: u32) -> String {
    format!("host-{i:04}.service.bench.example")
}

/// The two addresses of a name. Public ones: private ones would be filtered.
pub fn addresses(i: u32) -> [Ipv4Addr; 2] {
    let [_, _, c, d] = i.to_be_bytes();
    [Ipv4Addr::new(45, 0, c, d), Ipv4Addr::new(45, 1, c, d)]
}

/// Moves this process, which must have one thread, into a network namespace of its own, gone with it.
pub fn enter() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    let local = [format!("{POD}/32"), format!("{EGRESS}/32"), "45.0.0.0/8".to_owned()];
    let add = local.iter().map(|a| vec!["addr", "add", a.as_str(), "dev", "lo"]);
    for arguments in std::iter::once(vec!["link", "set", "lo", "up"]).chain(add) {
        let done = Command::new("ip").args(&arguments).output()?;
        let said = String::from_utf8_lossy(&done.stderr);
        ensure!(done.status.success(), "ip {}: {}", arguments.join(" "), said.trim());
    }
    Ok(())
}
