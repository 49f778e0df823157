//! The Unix socket on which a gateway of this node hands over its network
//! namespace and keeps its egress addresses alive.
//!
//! The gateway connects and sends one JSON line with the namespace's file
//! descriptor (SCM_RIGHTS):
//! `{"gateway":"gw-a","tunnelMtu":1450,"device":"eth0","flowIdleSeconds":7200,"static":["203.0.113.10"]}`. The answer is
//! `{"plugged":true,"tgpMtu":1450}` or `{"error":"…"}`. Then a renewal comes every
//! 500 ms: `{"renew":true,"static":[…]}`. After 2 s of silence, or at the end of the
//! connection, the addresses are let go; the devices stay for its return.
//!
//! A gateway that says `"answers":true` in its first line is told what the kernel holds for it: in the first answer, and
//! in one for each renewal: `{"held":["203.0.113.10"]}`.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

/// After how long without a renewal the addresses are let go.
pub const SILENCE: Duration = Duration::from_secs(2);
/// The most egress addresses of one gateway.
pub const MAX_ADDRESSES: usize = 256;
/// The longest line, in bytes.
const MAX_LINE: usize = 64 << 10;
/// The most connections at once.
const MAX_CONNECTIONS: usize = 8;

/// The first line of a gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Hello {
    /// The gateway's name.
    pub gateway: String,
    /// The largest packet that the gateway wants to see from the tunnel, in bytes.
    pub tunnel_mtu: u16,
    /// The pod's own device.
    #[serde(default = "default_device")]
    pub device: String,
    /// After how many seconds without packets a flow is dead.
    #[serde(default = "default_idle")]
    pub flow_idle_seconds: u64,
    /// Egress addresses to hold.
    #[serde(default)]
    pub r#static: Vec<IpAddr>,
    /// Whether the gateway reads what it is told of each renewal.
    #[serde(default)]
    pub answers: bool,
}

fn default_device() -> String {
    "eth0".into()
}

fn default_idle() -> u64 {
    7_200
}

/// Every other line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewal {
    /// Always true.
    pub renew: bool,
    /// Egress addresses to hold from now on; those that are absent are let go.
    #[serde(default)]
    pub r#static: Vec<IpAddr>,
}

/// What a gateway is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Answer {
    /// The devices are there.
    #[serde(rename_all = "camelCase")]
    Plugged {
        /// Always true.
        plugged: bool,
        /// MTU of `tgp` in bytes.
        tgp_mtu: u16,
        /// Those of its addresses that the kernel holds, for a gateway that wants to know.
        #[serde(skip_serializing_if = "Option::is_none")]
        held: Option<Vec<IpAddr>>,
    },
    /// The lease is renewed.
    Held {
        /// Those of its addresses that the kernel holds.
        held: Vec<IpAddr>,
    },
    /// They are not.
    Error {
        /// Why, in one sentence.
        error: String,
    },
}

/// A gateway that is plugged in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plugged {
    /// MTU of `tgp` in bytes.
    pub mtu: u16,
    /// Those of its addresses that the kernel holds.
    pub held: Vec<IpAddr>,
}

/// What a connection asks of the node.
#[derive(Debug)]
pub enum Request {
    /// Plug this namespace in.
    Plug {
        /// The connection.
        connection: u64,
        /// What the gateway said.
        hello: Hello,
        /// Its network namespace.
        netns: OwnedFd,
        /// Where the answer goes, or why not.
        answer: oneshot::Sender<Result<Plugged, String>>,
    },
    /// Hold these addresses.
    Renew {
        /// The connection.
        connection: u64,
        /// The addresses.
        addresses: Vec<IpAddr>,
        /// Told which of them the kernel holds.
        held: oneshot::Sender<Vec<IpAddr>>,
    },
    /// The connection ended.
    Gone {
        /// The connection.
        connection: u64,
    },
}

/// Listens on `path`, readable by root alone. A socket file of an earlier run is replaced.
///
/// # Errors
/// The path is not usable.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    // Until here somebody else may have connected: every connection's credentials are checked too.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves connections until the listener fails or `requests` is closed.
pub async fn serve(listener: UnixListener, requests: mpsc::Sender<Request>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connection = 0u64;
    while !requests.is_closed() {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(e) => {
                tracing::warn!(error = %e, "accept on the gateway socket");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
            tracing::warn!("too many connections on the gateway socket");
            continue;
        };
        connection += 1;
        let requests = requests.clone();
        tokio::spawn(async move {
            if let Err(e) = handle(stream, connection, &requests).await {
                tracing::info!(connection, error = %e, "gateway connection ended");
            }
            // The reconciler is gone when this fails, and the leases run out by themselves.
            let _ = requests.send(Request::Gone { connection }).await;
            drop(slot);
        });
    }
}

fn invalid(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

async fn handle(stream: UnixStream, connection: u64, requests: &mpsc::Sender<Request>) -> io::Result<()> {
    let peer = stream.peer_cred()?;
    if peer.uid() != 0 {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("user {} is not root", peer.uid())));
    }
    let mut lines = Lines { stream, buffer: VecDeque::new(), netns: None };
    let answers = match plug(&mut lines, connection, requests).await {
        Ok((plugged, answers)) => {
            let held = answers.then_some(plugged.held);
            lines.say(&Answer::Plugged { plugged: true, tgp_mtu: plugged.mtu, held }).await?;
            answers
        }
        Err(e) => {
            lines.say(&Answer::Error { error: e.to_string() }).await?;
            return Err(e);
        }
    };
    loop {
        let Some(line) = lines.next(SILENCE).await? else { return Ok(()) };
        // A gateway that sends another descriptor with a renewal must not make us keep it.
        lines.netns = None;
        let renewal: Renewal = serde_json::from_slice(&line)?;
        check(&renewal.r#static)?;
        let (held, answer) = oneshot::channel();
        let request = Request::Renew { connection, addresses: renewal.r#static, held };
        requests.send(request).await.map_err(|_| stopped())?;
        let held = answer.await.map_err(|_| stopped())?;
        if answers {
            lines.say(&Answer::Held { held }).await?;
        }
    }
}

fn stopped() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the agent is stopping")
}

/// Returns whether the gateway reads what it is told of renewals.
async fn plug(lines: &mut Lines, connection: u64, requests: &mpsc::Sender<Request>) -> io::Result<(Plugged, bool)> {
    let line = lines.next(SILENCE).await?.ok_or_else(|| invalid("no line"))?;
    let hello: Hello = serde_json::from_slice(&line)?;
    check(&hello.r#static)?;
    if hello.gateway.is_empty() || hello.gateway.len() > 253 {
        return Err(invalid("gateway: not a name"));
    }
    // It becomes part of a path.
    if !is_device(&hello.device) {
        return Err(invalid("device: not a device's name"));
    }
    if !(1280..=9000).contains(&hello.tunnel_mtu) {
        return Err(invalid("tunnelMtu: must be from 1280 to 9000"));
    }
    let netns = lines.netns.take().ok_or_else(|| invalid("no network namespace came with the line"))?;
    let (answer, answered) = oneshot::channel();
    let answers = hello.answers;
    requests.send(Request::Plug { connection, hello, netns, answer }).await.map_err(|_| stopped())?;
    Ok((answered.await.map_err(|_| stopped())?.map_err(invalid)?, answers))
}

/// Whether a device can have this name; `all` and `default` are none.
fn is_device(name: &str) -> bool {
    let kept = ["", ".", "..", "all", "default"];
    name.len() < 16 && !kept.contains(&name) && !name.bytes().any(|b| b == b'/' || b <= b' ')
}

fn check(addresses: &[IpAddr]) -> io::Result<()> {
    if addresses.len() > MAX_ADDRESSES {
        return Err(invalid(format!("static: more than {MAX_ADDRESSES} addresses")));
    }
    let bad = |a: &&IpAddr| {
        a.is_unspecified()
            || a.is_multicast()
            || a.is_loopback()
            || match a {
                IpAddr::V4(v4) => v4.is_broadcast() || v4.is_link_local(),
                IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.to_ipv4_mapped().is_some(),
            }
    };
    match addresses.iter().find(bad) {
        Some(a) => Err(invalid(format!("static: {a} cannot be an egress address"))),
        None => Ok(()),
    }
}

/// Lines from a stream, with the last file descriptor that came along.
struct Lines {
    stream: UnixStream,
    buffer: VecDeque<u8>,
    netns: Option<OwnedFd>,
}

impl Lines {
    /// The next line without its end; `None` at the end of the stream.
    async fn next(&mut self, within: Duration) -> io::Result<Option<Vec<u8>>> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let mut line: Vec<u8> = self.buffer.drain(..=end).collect();
                line.pop();
                return Ok(Some(line));
            }
            if self.buffer.len() > MAX_LINE {
                return Err(invalid("the line is too long"));
            }
            let more = timeout_at(deadline, self.receive());
            if more.await.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "silence"))?? == 0 {
                return Ok(None);
            }
        }
    }

    /// A gateway that does not read what it asked for is gone, as one that is silent.
    async fn say(&mut self, answer: &Answer) -> io::Result<()> {
        let mut text = serde_json::to_vec(answer)?;
        text.push(b'\n');
        let said = timeout_at(Instant::now() + SILENCE, self.stream.write_all(&text)).await;
        said.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "it does not read"))?
    }

    async fn receive(&mut self) -> io::Result<usize> {
        let fd = self.stream.as_raw_fd();
        let (bytes, netns) = self.stream.async_io(Interest::READABLE, || receive(fd)).await?;
        self.buffer.extend(&bytes);
        if netns.is_some() {
            self.netns = netns;
        }
        Ok(bytes.len())
    }
}

fn receive(fd: RawFd) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut bytes = vec![0; 4096];
    // Room for one descriptor: the kernel closes what does not fit.
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let (length, fds) = {
        let mut io = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let message = recvmsg::<()>(fd, &mut io, Some(&mut space), flags)?;
        let mut fds = Vec::new();
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(received) = control {
                // SAFETY: the kernel has just made these descriptors for us; nothing else knows them.
                fds.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        (message.bytes, fds)
    };
    bytes.truncate(length);
    Ok((bytes, fds.into_iter().next_back()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_as_the_contract_writes_them() {
        let hello: Hello =
            serde_json::from_str(r#"{"gateway":"gw-a","tunnelMtu":1450,"static":["203.0.113.10","2001:db8::10"]}"#)
                .unwrap();
        assert_eq!((hello.gateway.as_str(), hello.tunnel_mtu, hello.r#static.len()), ("gw-a", 1450, 2));
        assert_eq!((hello.device.as_str(), hello.flow_idle_seconds), ("eth0", 7200));
        for bad in ["", ".", "..", "../x", "a b", "all", "sixteen-letters-"] {
            assert!(!is_device(bad), "{bad}");
        }
        assert!(is_device("eth0.7"));
        let renewal: Renewal = serde_json::from_str(r#"{"renew":true,"static":[]}"#).unwrap();
        assert!(renewal.r#static.is_empty());
        let text = |a| serde_json::to_string(&a).unwrap();
        let held = vec!["203.0.113.10".parse().unwrap()];
        for (line, answer) in [
            (r#"{"plugged":true,"tgpMtu":1450}"#, Answer::Plugged { plugged: true, tgp_mtu: 1450, held: None }),
            (
                r#"{"plugged":true,"tgpMtu":1450,"held":["203.0.113.10"]}"#,
                Answer::Plugged { plugged: true, tgp_mtu: 1450, held: Some(held.clone()) },
            ),
            (r#"{"held":["203.0.113.10"]}"#, Answer::Held { held }),
            (r#"{"error":"x"}"#, Answer::Error { error: "x".into() }),
        ] {
            assert_eq!(text(answer.clone()), line);
            assert_eq!(serde_json::from_str::<Answer>(line).unwrap(), answer);
        }
    }

    #[test]
    fn addresses_that_no_gateway_can_own_are_refused() {
        for bad in [
            "0.0.0.0",
            "127.0.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "169.254.1.1",
            "::",
            "::1",
            "fe80::1",
            "ff02::1",
            "::ffff:1.2.3.4",
        ] {
            assert!(check(&[bad.parse().unwrap()]).is_err(), "{bad}");
        }
        assert!(check(&["203.0.113.10".parse().unwrap(), "2001:db8::10".parse().unwrap()]).is_ok());
        assert!(check(&vec!["203.0.113.10".parse().unwrap(); MAX_ADDRESSES + 1]).is_err());
    }
}
