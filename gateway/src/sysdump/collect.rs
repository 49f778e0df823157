//! `tidegate collect`: what a pod of Tidegate knows that nobody asks for from outside. `tidegate sysdump` runs it there, and of agents that
//! are not ready `tidegate status --cluster`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::status;

/// The program, where the image has it.
const PROGRAM: &str = "/usr/local/bin/tidegate";
/// Entries of a map that are written.
const ENTRIES: usize = 500;
/// What the kernel tells of this network namespace and machine, none of it secret.
const FILES: &[&str] = &[
    "/proc/version",
    "/proc/uptime",
    "/proc/meminfo",
    "/proc/mounts",
    "/proc/net/dev",
    "/proc/net/route",
    "/proc/net/ipv6_route",
    "/proc/net/if_inet6",
    "/proc/net/softnet_stat",
    "/proc/net/snmp",
    "/proc/net/netstat",
    "/proc/1/limits",
    "/proc/sys/net/ipv4/ip_forward",
    "/proc/sys/net/ipv4/conf/all/rp_filter",
    "/proc/sys/net/ipv6/conf/all/forwarding",
    "/proc/sys/net/netfilter/nf_conntrack_count",
    "/proc/sys/net/netfilter/nf_conntrack_max",
];

/// One thing that is collected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Item {
    /// The effective configuration.
    Config,
    /// The status.
    Status,
    /// The metrics.
    Metrics,
    /// The rules of nftables.
    Nftables,
    /// The kernel's maps.
    Maps,
    /// What the kernel says of devices, routes and memory.
    Machine,
}

impl Item {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Config, Self::Status, Self::Metrics, Self::Nftables, Self::Maps, Self::Machine];

    /// The word on the command line, and the file in the archive.
    pub const fn name(self) -> (&'static str, &'static str) {
        match self {
            Self::Config => ("config", "config.json"),
            Self::Status => ("status", "status.json"),
            Self::Metrics => ("metrics", "metrics.txt"),
            Self::Nftables => ("nftables", "nftables.txt"),
            Self::Maps => ("maps", "maps.txt"),
            Self::Machine => ("machine", "machine.txt"),
        }
    }
}

/// What prints an item, in a pod of this component.
pub fn command(component: &str, item: Item) -> [String; 5] {
    let config = format!("/etc/tidegate/{component}.yaml");
    [PROGRAM, "collect", "--config", &config, item.name().0].map(str::to_owned)
}

/// Prints an item.
///
/// # Errors
/// It cannot be had.
pub fn run(config: &Path, item: Item) -> Result<u8> {
    let page = |path: &str| {
        let (admin, _) = places(config)?;
        let admin = admin.context("the configuration has no admin port")?;
        let (code, body) = status::get(admin, path)?;
        ensure!(code == 200, "the admin port answered {code} to {path}");
        anyhow::Ok(body)
    };
    let mut out = std::io::stdout().lock();
    match item {
        Item::Config => out.write_all(page("/config")?.as_bytes())?,
        Item::Status => out.write_all(page("/status")?.as_bytes())?,
        Item::Metrics => out.write_all(page("/metrics")?.as_bytes())?,
        Item::Nftables => {
            let ended = Command::new("nft").args(["list", "ruleset"]).output().context("cannot run nft")?;
            ensure!(ended.status.success(), "nft: {}", String::from_utf8_lossy(&ended.stderr).trim());
            out.write_all(&ended.stdout)?;
        }
        Item::Maps => {
            let (_, pins) = places(config)?;
            tidegate_ebpf::dump(&pins, ENTRIES, &mut out).with_context(|| format!("cannot read {}", pins.display()))?;
        }
        Item::Machine => {
            for file in FILES {
                let text = std::fs::read_to_string(file).unwrap_or_else(|e| format!("{e}\n"));
                writeln!(out, "== {file}\n{text}")?;
            }
        }
    }
    Ok(0)
}

/// The admin port, on loopback, and the folder of pins, as a configuration file of either kind has them. The file may be one that
/// the process itself refuses.
fn places(config: &Path) -> Result<(Option<std::net::SocketAddr>, PathBuf)> {
    let text = std::fs::read_to_string(config).with_context(|| format!("cannot read {}", config.display()))?;
    let config: Value = serde_saphyr::from_str(&text).context("the configuration is no YAML")?;
    let admin: Option<std::net::SocketAddr> = config["admin"].as_str().and_then(|a| a.parse().ok());
    let admin = admin.map(|mut a| {
        if a.ip().is_unspecified() {
            a.set_ip(if a.is_ipv4() { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::LOCALHOST.into() });
        }
        a
    });
    Ok((admin, config["pins"].as_str().unwrap_or("/sys/fs/bpf/tidegate").into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unspecified_port_is_asked_on_loopback() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("c.yaml");
        for (admin, asked) in
            [("[::]:9090", "[::1]:9090"), ("0.0.0.0:1", "127.0.0.1:1"), ("127.0.0.1:2", "127.0.0.1:2")]
        {
            std::fs::write(&file, format!("admin: \"{admin}\"\npins: /p\nother: {{x: 1}}\n")).unwrap();
            assert_eq!(places(&file).unwrap(), (asked.parse().ok(), "/p".into()));
        }
    }
}
