//! The way out: everything that the gateway sets up in its own network namespace.
//!
//! One desired state ([`Way`]) is applied idempotently at start, on a change and
//! in the periodic full pass; only what is ours is touched: our nftables table,
//! rules with our priorities, routes in our tables, addresses of `tga`.

pub mod live;
mod netfilter;
pub mod nft;
pub mod refused;
mod routes;

use std::io::Write;
use std::net::IpAddr;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use nft::{HeldPair, Rules};
use tidegate_agent::events::repaired;
use tidegate_agent::sysctl;

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
        self.rules.pairs.iter().flat_map(HeldPair::addresses).collect()
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

    /// Returns how many were otherwise. The agent makes them when the gateway is plugged in: in an ordinary pod only it can.
    fn sysctls(&self) -> Result<usize> {
        let mut n = 0;
        for setting in sysctl::of_gateway(&self.rules.device, self.flow_idle_seconds) {
            n += usize::from(setting.apply().context("neither the node's agent nor this gateway could set it")?);
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
