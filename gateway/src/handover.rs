//! Handing this pod's network namespace to the node's agent, and renewing the
//! lease of the static addresses.
//!
//! One JSON line each way over a Unix socket: the first carries the namespace's
//! file descriptor (SCM_RIGHTS). While the connection lives and renewals come, the
//! agent holds the addresses; when either stops, it lets them go.

use std::fs::File;
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::egress::Way;
use anyhow::{Context, Result, bail};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::{Deserialize, Serialize};

/// How often the lease is renewed; the agent lets go after 2 s.
pub const RENEW: Duration = Duration::from_millis(500);
/// How long an answer of the agent may take.
const ANSWER: Duration = Duration::from_secs(10);

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Hello<'a> {
    gateway: &'a str,
    tunnel_mtu: u16,
    device: &'a str,
    flow_idle_seconds: u64,
    r#static: &'a [IpAddr],
}

#[derive(Serialize)]
struct Renew<'a> {
    renew: bool,
    r#static: &'a [IpAddr],
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    #[serde(default)]
    error: Option<String>,
    #[serde(default)]
    tgp_mtu: Option<u16>,
}

/// A live handover.
#[derive(Debug)]
pub struct Handover {
    stream: UnixStream,
    /// MTU towards pods that the agent chose, in bytes.
    pub mtu: u16,
}

impl Handover {
    /// Connects to the agent and hands over the namespace of the calling thread. Blocks up to 10 s.
    pub fn connect(socket: &Path, gateway: &str, tunnel_mtu: u16, way: &Way) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("cannot reach the node's agent at {}", socket.display()))?;
        stream.set_read_timeout(Some(ANSWER)).context("cannot set a timeout")?;
        stream.set_write_timeout(Some(ANSWER)).context("cannot set a timeout")?;
        let namespace = File::open("/proc/thread-self/ns/net").context("cannot open this pod's network namespace")?;
        let mut line = serde_json::to_vec(&Hello {
            gateway,
            tunnel_mtu,
            device: &way.rules.device,
            flow_idle_seconds: way.flow_idle_seconds,
            r#static: &way.addresses(),
        })?;
        line.push(b'\n');
        let fds = [namespace.as_raw_fd()];
        let sent = sendmsg::<()>(
            stream.as_raw_fd(),
            &[IoSlice::new(&line)],
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .context("cannot hand the namespace to the agent")?;
        (&stream).write_all(&line[sent..]).context("cannot hand the namespace to the agent")?;
        let mut answer = String::new();
        BufReader::new(&stream).read_line(&mut answer).context("the agent did not answer")?;
        let answer: Answer = serde_json::from_str(&answer).context("the agent's answer is not understood")?;
        if let Some(error) = answer.error {
            bail!("the agent could not plug this gateway in: {error}");
        }
        let mtu = answer.tgp_mtu.filter(|m| (1280..=9000).contains(m)).unwrap_or(tunnel_mtu);
        Ok(Self { stream, mtu })
    }

    /// Renews the lease of these addresses; an address that is left out is let go.
    pub fn renew(&mut self, addresses: &[IpAddr]) -> Result<()> {
        let mut line = serde_json::to_vec(&Renew { renew: true, r#static: addresses })?;
        line.push(b'\n');
        self.stream.write_all(&line).context("the agent hung up")
    }
}
