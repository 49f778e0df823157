//! The way out: everything that the gateway sets up in its own network namespace.
//!
//! One desired state ([`Way`]) is applied idempotently at start, on a change and
//! in the periodic full pass; only what is ours is touched: our nftables table,
//! rules with our priorities, routes in our tables, addresses of `tga`.

pub mod nft;
pub mod refused;
mod routes;

use std::io::Write;
use std::net::IpAddr;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use nft::Rules;
use tidegate_agent::events::repaired;

/// The device towards pods, plugged in by the agent.
pub const TOWARDS_PODS: &str = "tgp";
/// The device towards the uplink, plugged in by the agent.
pub const TOWARDS_UPLINK: &str = "tga";

/// The desired state of the namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Way {
    /// The rules.
    pub rules: Rules,
    /// Idle seconds after which a tracked flow is forgotten.
    pub flow_idle_seconds: u64,
}

impl Way {
    /// The egress addresses.
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.rules.pairs.iter().flat_map(|p| [p.ipv4.map(IpAddr::from), p.ipv6.map(IpAddr::from)]).flatten().collect()
    }

    /// Makes the namespace so. Safe to call again at any time.
    pub async fn apply(&self) -> Result<()> {
        self.sysctls()?;
        // The rules come first: until they hold, nothing may be forwarded.
        let text = self.rules.render();
        tokio::task::spawn_blocking(move || load_rules(&text)).await.context("the nft thread died")??;
        routes::apply(&self.rules.device, self.rules.mtu, &self.addresses()).await.map(drop)
    }

    /// Repairs what another program may have changed, without loading the rules anew (their counters would start again).
    pub async fn repair(&self) -> Result<()> {
        repaired("sysctl", self.sysctls()?);
        let changed = routes::apply(&self.rules.device, self.rules.mtu, &self.addresses()).await?;
        for (kind, n) in [
            ("device", changed.devices),
            ("address", changed.addresses),
            ("rule", changed.rules),
            ("route", changed.routes),
        ] {
            repaired(kind, n);
        }
        Ok(())
    }

    /// Returns how many were otherwise.
    fn sysctls(&self) -> Result<usize> {
        let idle = self.flow_idle_seconds.to_string();
        let dev = &self.rules.device;
        let mut wanted: Vec<(String, &str)> = vec![
            ("net/ipv4/ip_forward".into(), "1"),
            ("net/ipv6/conf/all/forwarding".into(), "1"),
            // Answers that the stack makes by itself (resets, ICMP errors) go where the marked packet came from.
            ("net/ipv4/fwmark_reflect".into(), "1"),
            ("net/ipv6/fwmark_reflect".into(), "1"),
            // Without it, outgoing connections collapse once the ports are in TIME-WAIT.
            ("net/ipv4/tcp_tw_reuse".into(), "1"),
        ];
        for d in ["all", "default", TOWARDS_PODS, TOWARDS_UPLINK, dev] {
            wanted.push((format!("net/ipv4/conf/{d}/rp_filter"), "0"));
            wanted.push((format!("net/ipv4/conf/{d}/send_redirects"), "0"));
        }
        for d in ["lo", TOWARDS_PODS, TOWARDS_UPLINK] {
            // Plugins of IPv4 clusters disable IPv6 in pods, and the kernel then refuses our routes.
            wanted.push((format!("net/ipv6/conf/{d}/disable_ipv6"), "0"));
        }
        for d in [TOWARDS_PODS, TOWARDS_UPLINK] {
            wanted.push((format!("net/ipv6/conf/{d}/accept_ra"), "0"));
        }
        wanted.retain(|(key, _)| has_ipv6() || !key.starts_with("net/ipv6/"));
        let mut n = 0;
        for (key, value) in &wanted {
            n += usize::from(write_sysctl(key, value)?);
        }
        // The conntrack module shows its keys only once a rule of ours has loaded it.
        for (key, value) in [("timeout_established", idle.as_str()), ("be_liberal", "0")] {
            n += usize::from(write_sysctl(&format!("net/netfilter/nf_conntrack_tcp_{key}"), value).unwrap_or(false));
        }
        Ok(n)
    }
}

/// Removes what [`Way::apply`] made from this thread's network namespace, except for sysctls: nobody knows what else has
/// come to need them. What is not there is no error.
pub async fn remove() -> Result<()> {
    load_rules("table inet tidegate {}\ndelete table inet tidegate\n")?;
    routes::remove().await
}

/// Whether the kernel has IPv6 at all: with `ipv6.disable=1` it has neither its keys nor its routes.
fn has_ipv6() -> bool {
    std::path::Path::new("/proc/sys/net/ipv6").exists()
}

/// Sets a sysctl of this thread's network namespace, if it does not hold already (a read-only /proc/sys is fine then).
/// Returns whether it did not.
fn write_sysctl(key: &str, value: &str) -> Result<bool> {
    let path = format!("/proc/sys/{key}");
    let now = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    if now.trim() != value {
        std::fs::write(&path, value).with_context(|| {
            format!("cannot set {path} to {value}: the gateway needs NET_ADMIN and a writable /proc/sys/net")
        })?;
        return Ok(true);
    }
    Ok(false)
}

/// Loads a text as one nftables transaction. Called at start, on a change and in the full pass; never per packet.
pub fn load_rules(text: &str) -> Result<()> {
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run nft: install nftables")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(text.as_bytes()).context("cannot write to nft")?;
    }
    let output = child.wait_with_output().context("cannot wait for nft")?;
    if !output.status.success() {
        bail!("nft refused our rules: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Our table as the kernel has it, without counters and without elements that packets add; `None` if it is not there.
/// Compared with what it was after loading, it says whether another program changed it.
pub fn loaded_rules() -> Option<String> {
    let list = ["--stateless", "--terse", "list", "table", "inet", "tidegate"];
    let out = Command::new("nft").args(list).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    out.status.success().then(|| String::from_utf8_lossy(&out.stdout).into_owned())
}
