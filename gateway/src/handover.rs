//! Handing this pod's network namespace to the node's agent, and renewing the
//! lease of the static addresses ([`tidegate_agent::plug`] has the lines).
//!
//! While the connection lives and renewals come, the agent holds the addresses; when either stops, it lets them go.

use std::fs::File;
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::egress::Way;
use anyhow::{Context, Result, bail};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use tidegate_agent::plug::{Answer, Hello, Renewal};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, Lines};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Notify;
use tokio::time::Instant;

/// How often the lease is renewed; the agent lets go after 2 s.
pub const RENEW: Duration = Duration::from_millis(500);
/// How long an answer of the agent may take.
const ANSWER: Duration = Duration::from_secs(10);

/// A live handover.
#[derive(Debug)]
pub struct Handover {
    answers: Lines<tokio::io::BufReader<OwnedReadHalf>>,
    renewals: OwnedWriteHalf,
    /// MTU towards pods that the agent chose, in bytes.
    pub mtu: u16,
    lease: Lease,
    news: Arc<Notify>,
}

impl Handover {
    /// Connects to the agent and hands over the namespace of the calling thread, in a tokio runtime. Blocks up to 10 s.
    ///
    /// # Errors
    /// There is no agent, or it says why not.
    pub fn connect(socket: &Path, gateway: &str, tunnel_mtu: u16, way: &Way) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("cannot reach the node's agent at {}", socket.display()))?;
        stream.set_read_timeout(Some(ANSWER)).context("cannot set a timeout")?;
        stream.set_write_timeout(Some(ANSWER)).context("cannot set a timeout")?;
        let namespace = File::open("/proc/thread-self/ns/net").context("cannot open this pod's network namespace")?;
        let asked = way.addresses();
        let mut line = serde_json::to_vec(&Hello {
            gateway: gateway.to_owned(),
            tunnel_mtu,
            device: way.rules.device.clone(),
            flow_idle_seconds: way.flow_idle_seconds,
            r#static: asked.clone(),
            answers: true,
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
        // It says nothing more before it is asked.
        BufReader::new(&stream).read_line(&mut answer).context("the agent did not answer")?;
        let (mtu, held) = match serde_json::from_str(&answer).context("the agent's answer is not understood")? {
            Answer::Plugged { tgp_mtu, held, .. } => (tgp_mtu, held),
            Answer::Error { error } => bail!("the agent could not plug this gateway in: {error}"),
            Answer::Held { .. } => bail!("the agent's answer is not understood"),
        };
        stream.set_nonblocking(true).context("cannot wait for the agent's answers")?;
        let stream = tokio::net::UnixStream::from_std(stream).context("cannot wait for the agent's answers")?;
        let (read, renewals) = stream.into_split();
        Ok(Self {
            answers: tokio::io::BufReader::new(read).lines(),
            renewals,
            mtu: if (1280..=9000).contains(&mtu) { mtu } else { tunnel_mtu },
            lease: Lease::new(asked, held, Instant::now()),
            news: Arc::default(),
        })
    }

    /// Renews the lease if it is time, or if these are others than before; an address that is left out is let go.
    ///
    /// # Errors
    /// The agent hung up.
    pub async fn hold(&mut self, addresses: &[IpAddr]) -> Result<()> {
        if !self.lease.ask(addresses, Instant::now()) {
            return Ok(());
        }
        let mut line = serde_json::to_vec(&Renewal { renew: true, r#static: addresses.to_vec() })?;
        line.push(b'\n');
        let written = tokio::time::timeout(ANSWER, self.renewals.write_all(&line)).await;
        written.context("the agent does not read")?.context("the agent hung up")
    }

    /// When the lease is to be renewed next.
    pub fn due(&self) -> Instant {
        self.lease.due
    }

    /// Waits for the agent's next answer; one that is not waited for to the end is not lost.
    ///
    /// # Errors
    /// The agent hung up, or is not understood.
    pub async fn answer(&mut self) -> Result<()> {
        let line = self.answers.next_line().await.context("the agent hung up")?.context("the agent hung up")?;
        match serde_json::from_str(&line).context("the agent's answer is not understood")? {
            Answer::Held { held } => {
                if self.lease.heard(held) {
                    self.news.notify_one();
                }
            }
            Answer::Error { error } => bail!("the agent says: {error}"),
            Answer::Plugged { .. } => bail!("the agent's answer is not understood"),
        }
        Ok(())
    }

    /// Told when an answer says something else than the one before, to what is asked for now.
    pub fn news(&self) -> Arc<Notify> {
        Arc::clone(&self.news)
    }

    /// Whether the agent has said that it holds these since they were asked for. An older one says nothing of it.
    pub fn holds(&self, addresses: &[IpAddr]) -> bool {
        self.lease.holds(addresses)
    }
}

/// What is asked of the agent, and what it said. Pure.
#[derive(Debug)]
struct Lease {
    /// What the last renewal asked for.
    asked: Vec<IpAddr>,
    /// When the next one is due.
    due: Instant,
    /// How many were sent.
    sent: u64,
    /// Which of them was the first to ask for these addresses.
    first: u64,
    /// How many were answered: in the order in which they were sent.
    answered: u64,
    /// What the last answer said; `None` from an agent that gives none.
    held: Option<Vec<IpAddr>>,
}

impl Lease {
    fn new(asked: Vec<IpAddr>, held: Option<Vec<IpAddr>>, now: Instant) -> Self {
        Self { asked, due: now + RENEW, sent: 0, first: 0, answered: 0, held }
    }

    /// Whether these have to be asked for now.
    fn ask(&mut self, addresses: &[IpAddr], now: Instant) -> bool {
        let others = self.asked != addresses;
        if !others && now < self.due {
            return false;
        }
        self.sent += 1;
        if others {
            self.asked = addresses.to_vec();
            self.first = self.sent;
        }
        self.due = now + RENEW;
        true
    }

    /// Says whether it is news.
    fn heard(&mut self, held: Vec<IpAddr>) -> bool {
        self.answered += 1;
        let other = self.held.as_ref() != Some(&held);
        self.held = Some(held);
        self.answered == self.first || other && self.answered > self.first
    }

    fn holds(&self, addresses: &[IpAddr]) -> bool {
        let Some(held) = &self.held else { return true };
        self.answered >= self.first && addresses.iter().all(|a| held.contains(a))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u8) -> IpAddr {
        [203, 0, 113, last].into()
    }

    #[test]
    fn an_address_is_held_when_the_answer_to_its_renewal_says_so() {
        let now = Instant::now();
        let mut l = Lease::new(vec![ip(1)], Some(vec![]), now);
        assert!(!l.holds(&[ip(1)]), "the agent may not hold it yet");
        assert!(!l.ask(&[ip(1)], now) && l.ask(&[ip(1)], now + RENEW));
        assert!(l.heard(vec![ip(1)]) && l.holds(&[ip(1)]) && !l.holds(&[ip(1), ip(2)]));
        // Others are asked for at once, and what was said before says nothing of them.
        let now = now + RENEW;
        assert!(l.ask(&[ip(2)], now) && l.ask(&[ip(1)], now));
        assert!(!l.holds(&[ip(1)]));
        assert!(!l.heard(vec![ip(2)]) && !l.holds(&[ip(1)]) && !l.holds(&[ip(2)]));
        assert!(l.heard(vec![ip(1)]) && l.holds(&[ip(1)]));
        assert!(l.ask(&[ip(1)], now + RENEW) && !l.heard(vec![ip(1)]), "nothing new");
    }

    #[test]
    fn an_agent_that_does_not_answer_is_taken_at_its_word() {
        let now = Instant::now();
        let mut l = Lease::new(vec![], None, now);
        assert!(l.ask(&[ip(1)], now) && l.holds(&[ip(1)]));
    }
}
