//! The streams to the nodes: a gRPC server with mutual TLS that turns streams
//! into messages for the core thread and back. It decides nothing.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::Duration;

use anyhow::{Context, Result};
use futures_util::{Stream, StreamExt};
use tidegate_identity::{Bearer, Role, Source};
use tidegate_proto::wire::control_server::{Control, ControlServer};
use tidegate_proto::wire::identity_server::IdentityServer;
use tidegate_proto::wire::{FactsAck, FactsUpdate, PeerHello, PeerUpdate, StateAck, StateUpdate};
use tidegate_proto::{FactsUp, MAX_MESSAGE, Up};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use crate::accept::Peer;
use crate::core::ToCore;
use crate::identity::{self, Joins};
use crate::nodes::Nodes;
use crate::report::thread::{Origin, Post};
use crate::starts::Starts;
use crate::timed::LONGEST;

/// Messages that may wait for a node; a node that is further behind is cut off and starts anew with a snapshot.
const QUEUE: usize = 1024;
/// Streams have to say hello within this time.
const HELLO: Duration = Duration::from_secs(5);
/// How long a node that wants a certificate waits for the answer.
const JOIN: Duration = Duration::from_secs(20);
/// The most octets of what it asks.
const MAX_JOIN: usize = 32 * 1024;
/// The most octets of a message of a node or a gateway: room for the owners of 30,000 scopes.
const MAX_UP: usize = 1 << 20;
/// What a node sees of the gateways is heard so often at once, and then once in so long: of what it says meanwhile the last
/// counts.
const SEEN_BURST: u32 = 32;
const SEEN_EVERY: Duration = Duration::from_millis(100);

/// Identifies one stream, so that a late message of a dead one is told from its successor's.
pub type StreamId = u64;

/// What a node's kernel holds.
#[derive(Clone, Debug)]
pub struct Ack {
    /// The boot id of the gateway that sent what is acked.
    pub boot_id: u64,
    /// Everything up to here is applied.
    pub sequence: u64,
    /// Why it was not applied in whole.
    pub error: Option<String>,
}

/// The service.
pub struct Streams {
    core: SyncSender<ToCore>,
    denials: Post,
    nodes: Nodes,
    starts: Starts,
    next: AtomicU64,
}

type Out<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Streams {
    /// A service that talks to this core, with those nodes that are there.
    pub fn new(core: SyncSender<ToCore>, denials: Post, nodes: Nodes, starts: Starts) -> Self {
        Self { core, denials, nodes, starts, next: AtomicU64::new(1) }
    }

    /// The node at the other end.
    fn node<T>(&self, request: &Request<T>) -> Result<(String, Life), Status> {
        let (Bearer { name, uid, .. }, until) = client(request, Role::Node)?;
        if !self.nodes.admits(&name, uid.as_deref()) {
            let text = format!("there is no node {name} that has the UID of the certificate: get a new one");
            return Err(Status::permission_denied(text));
        }
        Ok((name.clone(), Life { until, node: Some((self.nodes.clone(), name, uid)) }))
    }

    fn id(&self) -> StreamId {
        self.next.fetch_add(1, Ordering::Relaxed)
    }
}

/// Hands a message to the core. A core that is too far behind to take it must not grow without bound: the stream ends, and the node comes back.
fn tell(core: &SyncSender<ToCore>, message: ToCore) -> Result<(), Status> {
    core.try_send(message).map_err(|e| match e {
        TrySendError::Full(_) => Status::resource_exhausted("the gateway is overloaded"),
        TrySendError::Disconnected(_) => Status::unavailable("the gateway stops"),
    })
}

/// How often a node is heard about the gateways.
struct SeenPace {
    /// When all of the burst is there again.
    calm: Instant,
}

impl SeenPace {
    fn due(&self) -> Instant {
        self.calm.checked_sub(SEEN_EVERY * (SEEN_BURST - 1)).unwrap_or(self.calm)
    }

    fn take(&mut self, now: Instant) {
        self.calm = self.calm.max(now) + SEEN_EVERY;
    }
}

/// How long a stream lives.
#[derive(Clone)]
struct Life {
    until: Instant,
    /// Not longer than this node is there.
    node: Option<(Nodes, String, Option<String>)>,
}

impl Life {
    /// Waits for its end.
    async fn over(self) {
        let gone = async {
            match self.node {
                Some((nodes, name, uid)) => {
                    nodes.gone(&name, uid.as_deref()).await;
                    tracing::info!(node = name, "this node is not there any more; its stream ends");
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = sleep_until(self.until) => {}
            () = gone => {}
        }
    }
}

/// The client, which must be of this role, and until when its certificate says so. Its authority was checked with the
/// handshake, which may be long ago.
fn client<T>(request: &Request<T>, role: Role) -> Result<(Bearer, Instant), Status> {
    let bearer = request.extensions().get::<Arc<Peer>>().and_then(|peer| peer.bearer.clone());
    let bearer = bearer.filter(|b| b.role == role).ok_or_else(|| {
        Status::permission_denied(format!("the certificate does not speak for one NAME{} alone", role.suffix()))
    })?;
    let left = bearer.left(identity::now());
    if left.is_zero() {
        return Err(Status::unauthenticated("the certificate has ended"));
    }
    Ok((bearer, Instant::now() + left.min(LONGEST)))
}

/// What the core says to the client, until its certificate ends: with a new one it comes back.
fn down<T: Send + 'static>(rx: mpsc::Receiver<T>, life: Life) -> Response<Out<T>> {
    Response::new(Box::pin(ReceiverStream::new(rx).map(Ok).take_until(life.over())))
}

/// The next message of the client. None ends the stream.
async fn next<T>(inbound: &mut Streaming<T>, over: Pin<&mut (impl Future<Output = ()> + Send)>) -> Option<T> {
    tokio::select! {
        biased;
        () = over => None,
        message = inbound.message() => message.ok()?,
    }
}

async fn first<T>(inbound: &mut Streaming<T>) -> Result<T, Status> {
    tokio::time::timeout(HELLO, inbound.message())
        .await
        .map_err(|_| Status::deadline_exceeded("no hello"))??
        .ok_or_else(|| Status::invalid_argument("no hello"))
}

/// Checks the first message: the agent's boot id.
fn hello<T>(message: T, certified: &str) -> Result<u64, Status>
where
    Up: TryFrom<T, Error = tidegate_proto::WireError>,
{
    match Up::try_from(message) {
        Ok(Up::Hello { node, boot_id }) if node == certified => Ok(boot_id),
        Ok(Up::Hello { node, .. }) => {
            Err(Status::permission_denied(format!("the certificate is for node {certified}, not for {node}")))
        }
        Ok(Up::Applied { .. }) => Err(Status::invalid_argument("the first message must be a hello")),
        Err(e) => Err(Status::invalid_argument(e.to_string())),
    }
}

#[tonic::async_trait]
impl Control for Streams {
    type StateStream = Out<StateUpdate>;
    type FactsStream = Out<FactsUpdate>;
    type PeerStream = Out<PeerUpdate>;

    async fn peer(&self, request: Request<PeerHello>) -> Result<Response<Self::PeerStream>, Status> {
        let (Bearer { name: gateway, .. }, until) = client(&request, Role::Gateway)?;
        let claimed = request.into_inner().gateway;
        if claimed != gateway {
            return Err(Status::permission_denied(format!(
                "the certificate is for gateway {gateway}, not for {claimed}"
            )));
        }
        let (out, rx) = mpsc::channel(QUEUE);
        tell(&self.core, ToCore::PeerUp { gateway, out })?;
        Ok(down(rx, Life { until, node: None }))
    }

    async fn state(&self, request: Request<Streaming<StateAck>>) -> Result<Response<Self::StateStream>, Status> {
        let (node, life) = self.node(&request)?;
        let mut inbound = request.into_inner();
        hello(first(&mut inbound).await?, &node)?;
        let id = self.id();
        let (out, rx) = mpsc::channel(QUEUE);
        tell(&self.core, ToCore::StateUp { node: node.clone(), id, out })?;
        let (core, over) = (self.core.clone(), life.clone().over());
        tokio::spawn(async move {
            let mut over = std::pin::pin!(over);
            while let Some(message) = next(&mut inbound, over.as_mut()).await {
                let Ok(Up::Applied { boot_id, sequence, error }) = Up::try_from(message) else { break };
                let ack = Ack { boot_id, sequence, error };
                if tell(&core, ToCore::StateAck { node: node.clone(), id, ack }).is_err() {
                    break;
                }
            }
            // If the queue is full now, the next message of this node's next stream replaces this one.
            let _ = core.try_send(ToCore::StateDown { node, id });
        });
        Ok(down(rx, life))
    }

    async fn facts(&self, request: Request<Streaming<FactsAck>>) -> Result<Response<Self::FactsStream>, Status> {
        let (node, life) = self.node(&request)?;
        let mut inbound = request.into_inner();
        let boot_id = hello(first(&mut inbound).await?, &node)?;
        let id = self.id();
        let (out, rx) = mpsc::channel(QUEUE);
        tell(&self.core, ToCore::FactsUp { node: node.clone(), id, boot_id, out })?;
        let (core, denials, over) = (self.core.clone(), self.denials.clone(), life.clone().over());
        let starts = self.starts.clone();
        tokio::spawn(async move {
            let mut over = std::pin::pin!(over);
            let name: Arc<str> = node.as_str().into();
            let (mut pace, mut waiting) = (SeenPace { calm: Instant::now() }, None);
            loop {
                let node = node.clone();
                let message = tokio::select! {
                    biased;
                    () = over.as_mut() => break,
                    () = sleep_until(pace.due()), if waiting.is_some() => {
                        pace.take(Instant::now());
                        let Some(seen) = waiting.take() else { continue };
                        ToCore::Seen { node, id, seen }
                    }
                    message = inbound.message() => {
                        let Ok(Some(message)) = message else { break };
                        match FactsUp::try_from(message) {
                            Ok(FactsUp::Up(Up::Applied { boot_id, sequence, error })) => {
                                ToCore::FactsAck { node, id, ack: Ack { boot_id, sequence, error } }
                            }
                            Ok(FactsUp::Seen(seen)) => {
                                waiting = Some(seen);
                                continue;
                            }
                            Ok(FactsUp::Denied(denied)) => {
                                denied.into_iter().for_each(|d| denials.send(Origin::Node(name.clone()), d));
                                continue;
                            }
                            Ok(FactsUp::Started(pods)) => {
                                starts.tell(&node, pods);
                                continue;
                            }
                            _ => break,
                        }
                    }
                };
                if tell(&core, message).is_err() {
                    break;
                }
            }
            let _ = core.try_send(ToCore::FactsDown { node, id });
        });
        Ok(down(rx, life))
    }
}

/// Serves until `stop` resolves, with at most so many handshakes at a time. Nodes get certificates from `joins`.
pub async fn serve(
    address: SocketAddr,
    identity: Source,
    handshakes: usize,
    streams: Streams,
    joins: Option<Joins>,
    stop: impl Future<Output = ()>,
) -> Result<()> {
    if let Source::Files(_) = identity {
        identity.now().context("the certificates are not usable")?;
    }
    let said = || format!("cannot serve agents on {address}");
    let listener = tokio::net::TcpListener::bind(address).await.with_context(said)?;
    let nodes = streams.nodes.clone();
    let incoming = crate::accept::incoming(listener, move || identity.now().ok(), handshakes, nodes);
    let service = ControlServer::new(streams).max_decoding_message_size(MAX_UP).max_encoding_message_size(MAX_MESSAGE);
    let control = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_millis(500)))
        .http2_keepalive_timeout(Some(Duration::from_millis(1500)))
        .concurrency_limit_per_connection(16)
        .add_service(service)
        .serve_with_incoming_shutdown(incoming.control, stop);
    let Some(joins) = joins else { return control.await.with_context(said) };
    let joining = Server::builder()
        .max_concurrent_streams(1)
        .http2_max_header_list_size(4096)
        .initial_connection_window_size(65_536)
        .timeout(JOIN)
        .add_service(IdentityServer::new(joins).max_decoding_message_size(MAX_JOIN))
        .serve_with_incoming(incoming.joining);
    tokio::select! {
        served = control => served.with_context(said),
        served = joining => served.with_context(said),
    }
}
