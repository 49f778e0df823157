//! A gateway's control endpoint for tests: mutual TLS, and each stream handed to the test.

use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use futures_util::Stream;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tidegate_agent::config::Tls;
use tidegate_proto::wire::control_server::{Control, ControlServer};
use tidegate_proto::wire::{FactsAck, FactsUpdate, PeerHello, PeerUpdate, StateAck, StateUpdate};
use tidegate_proto::{FactsBatch, FactsUp, Seen, StateBatch, Up};
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

/// A stream that an agent has opened: what it says, and how to answer. Dropping `down` ends it.
pub struct Session<M> {
    pub up: mpsc::Receiver<Up>,
    /// What the agent last said that it sees of gateways.
    pub seen: watch::Receiver<Seen>,
    pub down: mpsc::Sender<Result<M, Status>>,
}

pub enum Opened {
    State(Session<StateUpdate>),
    Facts(Session<FactsUpdate>),
}

struct Service(mpsc::Sender<Opened>);

type Down<M> = Pin<Box<dyn Stream<Item = Result<M, Status>> + Send>>;

fn session<A, M>(request: Request<Streaming<A>>, read: fn(A) -> Option<FactsUp>) -> (Session<M>, Down<M>)
where
    A: Send + 'static,
    M: Send + 'static,
{
    let (up_tx, up) = mpsc::channel(64);
    let (seen_tx, seen) = watch::channel(Seen::default());
    let (down, down_rx) = mpsc::channel(64);
    let mut inbound = request.into_inner();
    tokio::spawn(async move {
        while let Some(Ok(message)) = inbound.next().await {
            match read(message) {
                Some(FactsUp::Up(up)) => {
                    let sent = up_tx.send(up).await;
                    if sent.is_err() {
                        return;
                    }
                }
                Some(FactsUp::Seen(seen)) => drop(seen_tx.send_replace(seen)),
                _ => {}
            }
        }
    });
    (Session { up, seen, down }, Box::pin(ReceiverStream::new(down_rx)))
}

#[tonic::async_trait]
impl Control for Service {
    type StateStream = Down<StateUpdate>;
    type FactsStream = Down<FactsUpdate>;
    type PeerStream = Down<PeerUpdate>;

    async fn peer(&self, _: Request<PeerHello>) -> Result<Response<Self::PeerStream>, Status> {
        Err(Status::unimplemented("no agent asks for that"))
    }

    async fn state(&self, request: Request<Streaming<StateAck>>) -> Result<Response<Self::StateStream>, Status> {
        let (session, down) = session(request, |ack| Up::try_from(ack).ok().map(FactsUp::Up));
        self.0.send(Opened::State(session)).await.map_err(|_| Status::unavailable("over"))?;
        Ok(Response::new(down))
    }

    async fn facts(&self, request: Request<Streaming<FactsAck>>) -> Result<Response<Self::FactsStream>, Status> {
        let (session, down) = session(request, |ack| FactsUp::try_from(ack).ok());
        self.0.send(Opened::Facts(session)).await.map_err(|_| Status::unavailable("over"))?;
        Ok(Response::new(down))
    }
}

/// An authority with its certificates in a folder.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: tempfile::TempDir,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("ca.crt"), issuer.pem()).unwrap();
        Self { issuer, folder }
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn sign(&self, name: &str) -> Tls {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &self.issuer).unwrap();
        let path = |end: &str| self.folder().join(format!("{name}.{end}"));
        std::fs::write(path("crt"), certificate.pem()).unwrap();
        std::fs::write(path("key"), key.serialize_pem()).unwrap();
        Tls { certificate: path("crt"), key: path("key"), ca: self.folder().join("ca.crt") }
    }
}

/// Serves on loopback in the namespace of the calling thread.
pub async fn serve(identity: &Tls, address: &str) -> (SocketAddr, mpsc::Receiver<Opened>) {
    let read = |path: &Path| std::fs::read(path).unwrap();
    let tls = ServerTlsConfig::new()
        .identity(Identity::from_pem(read(&identity.certificate), read(&identity.key)))
        .client_ca_root(Certificate::from_pem(read(&identity.ca)));
    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (tx, opened) = mpsc::channel(16);
    let server = Server::builder().tls_config(tls).unwrap().add_service(ControlServer::new(Service(tx)));
    tokio::spawn(async move { server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap() });
    (address, opened)
}

/// Both streams of an agent, in whatever order it opens them.
pub async fn both(opened: &mut mpsc::Receiver<Opened>) -> (Session<StateUpdate>, Session<FactsUpdate>) {
    let (mut state, mut facts) = (None, None);
    while state.is_none() || facts.is_none() {
        match tokio::time::timeout(Duration::from_secs(10), opened.recv()).await.expect("streams").unwrap() {
            Opened::State(s) => state = Some(s),
            Opened::Facts(f) => facts = Some(f),
        }
    }
    (state.unwrap(), facts.unwrap())
}

impl<M> Session<M> {
    pub async fn hear(&mut self) -> Up {
        tokio::time::timeout(Duration::from_secs(10), self.up.recv()).await.expect("a message").expect("a stream")
    }

    /// Waits for the ack of a sequence.
    pub async fn acked(&mut self, wanted: u64) -> Option<String> {
        loop {
            match self.hear().await {
                Up::Applied { sequence, error, .. } if sequence >= wanted => return error,
                _ => {}
            }
        }
    }
}

impl Session<StateUpdate> {
    pub async fn say(&self, batch: StateBatch) {
        for message in batch.into_messages() {
            self.down.send(Ok(message)).await.unwrap();
        }
    }
}

impl Session<FactsUpdate> {
    pub async fn say(&self, batch: FactsBatch) {
        for message in batch.into_messages() {
            self.down.send(Ok(message)).await.unwrap();
        }
    }

    /// Sends a heartbeat every 200 ms for as long as the stream lives.
    pub fn beat(&self, boot: u64) -> tokio::task::JoinHandle<()> {
        let down = self.down.clone();
        tokio::spawn(async move {
            while down.send(Ok(FactsBatch::heartbeat(boot, 1).into_messages().remove(0))).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        })
    }
}
