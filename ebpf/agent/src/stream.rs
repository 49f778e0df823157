//! The client of every gateway: mutual TLS, a `State` and a `Facts` stream each
//! on a connection of its own, so that an urgent fact never waits behind a
//! snapshot's bytes. Messages are checked here and handed to the reconciler
//! through bounded channels; acks come back through a watch, since they are cumulative.

use std::fs;
use std::io::Read;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use tidegate_identity::Source;
use tidegate_policy::denied::Denied;
use tidegate_proto::wire::control_client::ControlClient;
use tidegate_proto::wire::{FactsAck, StateAck};
use tidegate_proto::{FactsBatch, Joiner, MAX_MESSAGE, Seen, StartedPod, StateBatch, Up, WireError, denials, started};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::wrappers::WatchStream;
use tonic::transport::{Channel, Endpoint};

use crate::find::{Held, Names};
use crate::merge::Update;

/// A `Facts` stream without a message for so long is dead: gateways send a heartbeat every 200 ms.
pub const SILENCE: Duration = Duration::from_millis(1500);

const CONNECT: Duration = Duration::from_secs(2);
const KEEPALIVE_EVERY: Duration = Duration::from_millis(500);
const KEEPALIVE_WAIT: Duration = Duration::from_millis(1500);
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_LAST: Duration = Duration::from_secs(2);

/// What the kernel holds of a stream: everything up to here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// The gateway's boot id.
    pub boot: u64,
    /// The sequence.
    pub sequence: u64,
    /// Why it does not hold all of it.
    pub error: Option<String>,
}

/// Where an ack goes.
pub type Ack = watch::Sender<Applied>;

/// From a `State` stream.
#[derive(Debug)]
pub enum State {
    /// An update; a whole one, parts are joined.
    Update {
        /// The gateway's name.
        gateway: Arc<str>,
        /// What it says.
        update: Update,
        /// Where the ack goes.
        ack: Ack,
    },
    /// The stream ended.
    Away {
        /// The gateway's name.
        gateway: Arc<str>,
    },
}

/// From a `Facts` stream. Every one of them is also a sign of life.
#[derive(Debug)]
pub struct Facts {
    /// The gateway's name.
    pub gateway: Arc<str>,
    /// When it arrived.
    pub at: Instant,
    /// The batch; absent for a heartbeat.
    pub batch: Option<(FactsBatch, Ack)>,
    /// The stream ended: the opposite of a sign of life.
    pub away: bool,
    /// The gateway wants others to be asked for names.
    pub steps_back: bool,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// No certificate, or no connection.
    #[error("connect: {}", chain(.0))]
    Connect(#[from] tidegate_identity::Error),
    /// The gateway is connected at another of its addresses.
    #[error("gateway {0} is connected at another address")]
    Elsewhere(String),
    /// The gateway ended the stream.
    #[error("{}: {}", .0.code(), .0.message())]
    Status(Box<tonic::Status>),
    /// The gateway broke the contract.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The gateway broke the contract.
    #[error("{0}")]
    Protocol(&'static str),
    /// The gateway ended the stream without a word.
    #[error("the gateway closed the stream")]
    Closed,
    /// Nothing came for [`SILENCE`].
    #[error("nothing came for 1.5 s")]
    Silent,
    /// The agent is stopping, or goes to this address no more.
    #[error("nobody is to be connected to here any more")]
    Stopping,
}

impl From<tonic::Status> for StreamError {
    fn from(status: tonic::Status) -> Self {
        StreamError::Status(Box::new(status))
    }
}

/// The causes too: "transport error" alone helps nobody.
fn chain(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut next = e.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

/// A random number for boot ids and jitter; zeroes where there is no `/dev/urandom`.
pub fn random() -> u64 {
    let mut bytes = [0; 8];
    let _ = fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes));
    u64::from_ne_bytes(bytes)
}

/// The client of one gateway.
#[derive(Clone, Debug)]
pub struct Client {
    /// This node.
    pub node: String,
    /// Chosen at the agent's start.
    pub boot: u64,
    /// The gateway's control endpoint.
    pub address: SocketAddr,
    /// Its name; absent: whichever is in its certificate.
    pub name: Option<String>,
    /// Who is connected where.
    pub names: Names,
    /// The agent's identity.
    pub identity: Source,
    /// What the node sees of the gateways, for each of them.
    pub seen: watch::Receiver<Seen>,
    /// What the node denied in the last second.
    pub denied: watch::Receiver<Arc<Vec<Denied>>>,
    /// Pods whose network was made.
    pub started: watch::Receiver<Arc<Vec<StartedPod>>>,
    /// Says when nobody is to be connected to at this address any more.
    pub stop: watch::Receiver<bool>,
}

/// Who has spoken on a stream, and that nobody else speaks for it meanwhile.
type Spoke = Option<(Arc<str>, Held)>;

impl Client {
    /// Waits until this client has to end.
    async fn stopped(&self) {
        let mut stop = self.stop.clone();
        if stop.wait_for(|stop| *stop).await.is_err() {
            // Nobody can say so any more.
            std::future::pending::<()>().await;
        }
    }

    fn is_stopped(&self) -> bool {
        *self.stop.borrow()
    }

    /// Keeps a `State` stream until it is stopped or `out` is closed.
    pub async fn state(self, out: mpsc::Sender<State>) {
        let mut backoff = Backoff::default();
        while !out.is_closed() && !self.is_stopped() {
            let started = Instant::now();
            let mut spoke = None;
            let e = tokio::select! {
                Err(e) = self.state_once(&out, &mut spoke) => e,
                () = self.stopped() => StreamError::Stopping,
            };
            let name = spoke.as_ref().map(|(name, _)| Arc::clone(name));
            if let Some(gateway) = &name
                && out.send(State::Away { gateway: Arc::clone(gateway) }).await.is_err()
            {
                return;
            }
            // Only now: whoever else connects to it speaks after that.
            drop(spoke);
            tokio::select! {
                () = self.wait("State", &mut backoff, name, started, e) => {}
                () = self.stopped() => {}
            }
        }
    }

    /// Keeps a `Facts` stream until it is stopped or `out` is closed.
    pub async fn facts(self, out: mpsc::Sender<Facts>) {
        let mut backoff = Backoff::default();
        while !out.is_closed() && !self.is_stopped() {
            let started = Instant::now();
            let mut spoke = None;
            let e = tokio::select! {
                Err(e) = self.facts_once(&out, &mut spoke) => e,
                () = self.stopped() => StreamError::Stopping,
            };
            let name = spoke.as_ref().map(|(name, _)| Arc::clone(name));
            if let Some(gateway) = &name {
                let gateway = Arc::clone(gateway);
                let away = Facts { gateway, at: Instant::now(), batch: None, away: true, steps_back: false };
                if out.send(away).await.is_err() {
                    return;
                }
            }
            drop(spoke);
            tokio::select! {
                () = self.wait("Facts", &mut backoff, name, started, e) => {}
                () = self.stopped() => {}
            }
        }
    }

    async fn wait(
        &self,
        stream: &str,
        backoff: &mut Backoff,
        spoke: Option<Arc<str>>,
        started: Instant,
        error: StreamError,
    ) {
        match error {
            StreamError::Stopping => return,
            StreamError::Elsewhere(name) => {
                tracing::debug!(gateway = name, address = %self.address, stream, "connected at another address");
                return self.names.free(&name, self.address).await;
            }
            _ => {}
        }
        let gateway = spoke.as_deref().or(self.name.as_deref()).unwrap_or_default();
        let address = self.address;
        // One line for a loss or a first failure; the rest of a long outage is for those who look closely.
        // Without a certificate nothing can be tried, and the joiner says so when it is too long.
        let tried = !matches!(error, StreamError::Connect(tidegate_identity::Error::None));
        if spoke.is_some() || tried && backoff.0 == BACKOFF_FIRST {
            tracing::warn!(gateway, %address, stream, %error, "stream lost; connecting again");
        } else {
            tracing::debug!(gateway, %address, stream, %error, "no stream yet");
        }
        if spoke.is_some() && started.elapsed() > BACKOFF_LAST {
            *backoff = Backoff::default();
        }
        sleep(backoff.next(random())).await;
    }

    async fn connect(&self) -> Result<(ControlClient<Channel>, Arc<str>, Held), StreamError> {
        let own = self.identity.now()?;
        let settings = |endpoint: Endpoint| {
            endpoint
                .http2_keep_alive_interval(KEEPALIVE_EVERY)
                .keep_alive_timeout(KEEPALIVE_WAIT)
                .keep_alive_while_idle(true)
        };
        let wanted = self.name.as_deref();
        let connection = tidegate_identity::connect(self.address, &own, wanted, CONNECT, settings).await?;
        let name: Arc<str> = connection.gateway.as_str().into();
        let held = self.names.hold(&name, self.address).ok_or(StreamError::Elsewhere(connection.gateway))?;
        Ok((ControlClient::new(connection.channel).max_decoding_message_size(MAX_MESSAGE), name, held))
    }

    fn hello(&self) -> Up {
        Up::Hello { node: self.node.clone(), boot_id: self.boot }
    }

    /// The latest ack whenever it has changed.
    fn acks<T: From<Up>>(acks: watch::Receiver<Applied>) -> impl futures_util::Stream<Item = T> + use<T> {
        WatchStream::from_changes(acks)
            .map(|a| T::from(Up::Applied { boot_id: a.boot, sequence: a.sequence, error: a.error }))
    }

    async fn state_once(
        &self,
        out: &mpsc::Sender<State>,
        spoke: &mut Spoke,
    ) -> Result<std::convert::Infallible, StreamError> {
        let (mut client, gateway, held) = self.connect().await?;
        let mut held = Some(held);
        let (ack, acks) = watch::channel(Applied::default());
        let hello = stream::once(std::future::ready(StateAck::from(self.hello())));
        let mut inbound = client.state(hello.chain(Self::acks(acks))).await?.into_inner();
        tracing::info!(gateway = &*gateway, "State stream is up");
        let mut joiner = Joiner::<StateBatch>::default();
        let mut last: Option<(u64, u64)> = None;
        loop {
            let message = tokio::select! {
                m = inbound.message() => m?.ok_or(StreamError::Closed)?,
                () = out.closed() => return Err(StreamError::Stopping),
            };
            let part = StateBatch::try_from(message)?;
            if part.gateway != *gateway {
                return Err(StreamError::Protocol("another gateway answers at this address"));
            }
            let Some(whole) = joiner.push(part)? else { continue };
            follows(last, whole.boot_id, whole.sequence, whole.snapshot)?;
            last = Some((whole.boot_id, whole.sequence));
            let StateBatch { boot_id: boot, sequence, snapshot, set, delete, .. } = whole;
            let update = Update { boot, sequence, snapshot, set, delete };
            if let Some(held) = held.take() {
                *spoke = Some((Arc::clone(&gateway), held));
            }
            let update = State::Update { gateway: Arc::clone(&gateway), update, ack: ack.clone() };
            out.send(update).await.map_err(|_| StreamError::Stopping)?;
        }
    }

    async fn facts_once(
        &self,
        out: &mpsc::Sender<Facts>,
        spoke: &mut Spoke,
    ) -> Result<std::convert::Infallible, StreamError> {
        let (mut client, gateway, held) = self.connect().await?;
        let mut held = Some(held);
        let (ack, acks) = watch::channel(Applied::default());
        let seen = WatchStream::new(self.seen.clone()).map(FactsAck::from);
        let denied = WatchStream::from_changes(self.denied.clone()).map(|d| denials(&d));
        let begun = WatchStream::new(self.started.clone()).map(|s| started(&s));
        // The hello comes first; of what follows, acks and news take turns.
        let hello = stream::once(std::future::ready(FactsAck::from(self.hello())));
        let outbound =
            hello.chain(stream::select(Self::acks(acks), stream::select(stream::select(seen, begun), denied)));
        let mut inbound = client.facts(outbound).await?.into_inner();
        tracing::info!(gateway = &*gateway, "Facts stream is up");
        let mut joiner = Joiner::<FactsBatch>::default();
        let mut last: Option<(u64, u64)> = None;
        loop {
            let message = tokio::select! {
                m = timeout(SILENCE, inbound.message()) => m,
                () = out.closed() => return Err(StreamError::Stopping),
            };
            let message = message.map_err(|_| StreamError::Silent)??.ok_or(StreamError::Closed)?;
            let at = Instant::now();
            let part = FactsBatch::try_from(message)?;
            let steps_back = part.steps_back;
            if let Some(held) = held.take() {
                *spoke = Some((Arc::clone(&gateway), held));
            }
            let batch = if part.is_heartbeat() {
                None
            } else if let Some(whole) = joiner.push(part)? {
                follows(last, whole.boot_id, whole.sequence, whole.snapshot)?;
                last = Some((whole.boot_id, whole.sequence));
                Some((whole, ack.clone()))
            } else {
                None
            };
            let facts = Facts { gateway: Arc::clone(&gateway), at, batch, away: false, steps_back };
            out.send(facts).await.map_err(|_| StreamError::Stopping)?;
        }
    }
}

/// A stream begins with a snapshot, stays with one boot of the gateway and its sequence grows.
fn follows(last: Option<(u64, u64)>, boot: u64, sequence: u64, snapshot: bool) -> Result<(), StreamError> {
    match last {
        None if !snapshot => Err(StreamError::Protocol("the stream does not begin with a snapshot")),
        Some((b, _)) if b != boot => Err(StreamError::Protocol("the boot id changed within a stream")),
        Some((_, s)) if sequence <= s => Err(StreamError::Protocol("the sequence does not grow")),
        _ => Ok(()),
    }
}

/// 100 ms, doubling to 2 s; of each step between a half and the whole, so that nodes do not return as one.
#[derive(Clone, Copy, Debug)]
struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(BACKOFF_FIRST)
    }
}

impl Backoff {
    fn next(&mut self, random: u64) -> Duration {
        let step = self.0;
        self.0 = (step * 2).min(BACKOFF_LAST);
        let half = step.as_millis() as u64 / 2;
        Duration::from_millis(half + random % (half + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_with_jitter_and_is_bounded() {
        let mut b = Backoff::default();
        let steps: Vec<u64> = (0..7).map(|_| b.next(u64::MAX - 3).as_millis() as u64).collect();
        for (got, most) in steps.iter().zip([100, 200, 400, 800, 1600, 2000, 2000]) {
            assert!((most / 2..=most).contains(got), "{got} of {most}");
        }
        assert_eq!(Backoff::default().next(0), Duration::from_millis(50));
        assert_eq!(Backoff::default().next(50), Duration::from_millis(100));
    }

    #[test]
    fn a_stream_begins_with_a_snapshot_and_its_sequence_grows() {
        assert!(follows(None, 1, 5, true).is_ok());
        assert!(follows(None, 1, 5, false).is_err());
        assert!(follows(Some((1, 5)), 1, 6, false).is_ok());
        assert!(follows(Some((1, 5)), 1, 5, false).is_err());
        assert!(follows(Some((1, 5)), 2, 6, true).is_err());
    }
}
