//! The streams to the nodes: a gRPC server with mutual TLS that turns streams
//! into messages for the core thread and back. It decides nothing.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use crossbeam_channel::{Sender, TrySendError};
use futures_util::Stream;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tidegate_proto::wire::control_server::{Control, ControlServer};
use tidegate_proto::wire::{FactsAck, FactsUpdate, PeerHello, PeerUpdate, StateAck, StateUpdate};
use tidegate_proto::{FactsUp, MAX_MESSAGE, Up};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use crate::config::Tls;
use crate::core::ToCore;

/// Messages that may wait for a node; a node that is further behind is cut off and starts anew with a snapshot.
const QUEUE: usize = 1024;
/// Streams have to say hello within this time.
const HELLO: Duration = Duration::from_secs(5);

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
    core: Sender<ToCore>,
    next: AtomicU64,
}

type Out<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Streams {
    /// A service that talks to this core.
    pub fn new(core: Sender<ToCore>) -> Self {
        Self { core, next: AtomicU64::new(1) }
    }

    fn id(&self) -> StreamId {
        self.next.fetch_add(1, Ordering::Relaxed)
    }
}

/// Hands a message to the core. A core that is too far behind to take it must not grow without bound: the stream ends, and the node comes back.
fn tell(core: &Sender<ToCore>, message: ToCore) -> Result<(), Status> {
    core.try_send(message).map_err(|e| match e {
        TrySendError::Full(_) => Status::resource_exhausted("the gateway is overloaded"),
        TrySendError::Disconnected(_) => Status::unavailable("the gateway stops"),
    })
}

/// The name that the client's certificate speaks for: a node's or a gateway's, by the suffix of the SAN.
fn named<T>(request: &Request<T>, suffix: &str) -> Result<String, Status> {
    let certs = request.peer_certs().ok_or_else(|| Status::unauthenticated("a client certificate is required"))?;
    let leaf = certs.first().ok_or_else(|| Status::unauthenticated("a client certificate is required"))?;
    name_in_certificate(leaf, suffix)
        .ok_or_else(|| Status::permission_denied(format!("the certificate has no SAN NAME{suffix}")))
}

fn name_in_certificate(der: &[u8], suffix: &str) -> Option<String> {
    let (_, cert) = x509_parser::parse_x509_certificate(der).ok()?;
    let san = cert.subject_alternative_name().ok()??;
    san.value.general_names.iter().find_map(|n| match n {
        x509_parser::extensions::GeneralName::DNSName(d) => d.strip_suffix(suffix).map(str::to_owned),
        _ => None,
    })
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
        let gateway = named(&request, ".gateway.tidegate")?;
        let claimed = request.into_inner().gateway;
        if claimed != gateway {
            return Err(Status::permission_denied(format!(
                "the certificate is for gateway {gateway}, not for {claimed}"
            )));
        }
        let (out, rx) = mpsc::channel(QUEUE);
        tell(&self.core, ToCore::PeerUp { gateway, out })?;
        Ok(Response::new(Box::pin(ReceiverStream::new(rx).map(Ok))))
    }

    async fn state(&self, request: Request<Streaming<StateAck>>) -> Result<Response<Self::StateStream>, Status> {
        let node = named(&request, ".node.tidegate")?;
        let mut inbound = request.into_inner();
        hello(first(&mut inbound).await?, &node)?;
        let id = self.id();
        let (out, rx) = mpsc::channel(QUEUE);
        tell(&self.core, ToCore::StateUp { node: node.clone(), id, out })?;
        let core = self.core.clone();
        tokio::spawn(async move {
            while let Ok(Some(message)) = inbound.message().await {
                let Ok(Up::Applied { boot_id, sequence, error }) = Up::try_from(message) else { break };
                let ack = Ack { boot_id, sequence, error };
                if tell(&core, ToCore::StateAck { node: node.clone(), id, ack }).is_err() {
                    break;
                }
            }
            // If the queue is full now, the next message of this node's next stream replaces this one.
            let _ = core.try_send(ToCore::StateDown { node, id });
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(rx).map(Ok))))
    }

    async fn facts(&self, request: Request<Streaming<FactsAck>>) -> Result<Response<Self::FactsStream>, Status> {
        let node = named(&request, ".node.tidegate")?;
        let mut inbound = request.into_inner();
        let boot_id = hello(first(&mut inbound).await?, &node)?;
        let id = self.id();
        let (out, rx) = mpsc::channel(QUEUE);
        tell(&self.core, ToCore::FactsUp { node: node.clone(), id, boot_id, out })?;
        let core = self.core.clone();
        tokio::spawn(async move {
            while let Ok(Some(message)) = inbound.message().await {
                let node = node.clone();
                let message = match FactsUp::try_from(message) {
                    Ok(FactsUp::Up(Up::Applied { boot_id, sequence, error })) => {
                        ToCore::FactsAck { node, id, ack: Ack { boot_id, sequence, error } }
                    }
                    Ok(FactsUp::Seen(seen)) => ToCore::Seen { node, id, seen },
                    _ => break,
                };
                if tell(&core, message).is_err() {
                    break;
                }
            }
            let _ = core.try_send(ToCore::FactsDown { node, id });
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(rx).map(Ok))))
    }
}

/// Who may speak: nodes and gateways with a certificate of the cluster's authority.
fn tls_config(tls: &Tls) -> Result<rustls::ServerConfig> {
    let certificates = |path: &std::path::Path| -> Result<Vec<CertificateDer<'static>>> {
        let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
        read.with_context(|| format!("cannot read {}", path.display()))
    };
    let key = PrivateKeyDer::from_pem_file(&tls.key).with_context(|| format!("cannot read {}", tls.key.display()))?;
    let mut roots = rustls::RootCertStore::empty();
    roots.add_parsable_certificates(certificates(&tls.ca)?);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let clients =
        rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build()?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(clients)
        .with_single_cert(certificates(&tls.certificate)?, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// When a file was changed, how long it is, and which one it is: a link may lead to another one now.
type Stamp = Option<(std::time::SystemTime, u64, u64)>;

fn stamps(tls: &Tls) -> [Stamp; 3] {
    [&tls.certificate, &tls.key, &tls.ca].map(|path| {
        let meta = std::fs::metadata(path).ok()?;
        Some((meta.modified().ok()?, meta.len(), std::os::unix::fs::MetadataExt::ino(&meta)))
    })
}

/// Who this gateway is and whom it trusts, as the files say.
struct Certificates {
    tls: Tls,
    stamps: [Stamp; 3],
    config: Arc<rustls::ServerConfig>,
}

impl Certificates {
    fn open(tls: &Tls) -> Result<Self> {
        let stamps = stamps(tls);
        Ok(Self { tls: tls.clone(), stamps, config: Arc::new(tls_config(tls)?) })
    }

    /// What holds for the next connection. Files that changed are read again; while they do not fit together, as
    /// between two writes, what held before holds.
    fn now(&mut self) -> Arc<rustls::ServerConfig> {
        let stamps = stamps(&self.tls);
        if stamps != self.stamps {
            self.stamps = stamps;
            match tls_config(&self.tls) {
                Ok(config) => {
                    tracing::info!("certificates read again");
                    self.config = Arc::new(config);
                }
                Err(error) => {
                    tracing::error!(
                        error = format!("{error:#}"),
                        "changed certificates are not usable; the old ones hold"
                    );
                }
            }
        }
        self.config.clone()
    }
}

/// Serves until `stop` resolves, with at most so many handshakes at a time.
pub async fn serve(
    address: SocketAddr,
    tls: &Tls,
    handshakes: usize,
    streams: Streams,
    stop: impl Future<Output = ()>,
) -> Result<()> {
    let mut certificates = Certificates::open(tls).context("the certificates are not usable")?;
    let said = || format!("cannot serve agents on {address}");
    let listener = tokio::net::TcpListener::bind(address).await.with_context(said)?;
    let incoming = crate::accept::incoming(listener, move || certificates.now(), handshakes);
    let service =
        ControlServer::new(streams).max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE);
    Server::builder()
        .http2_keepalive_interval(Some(Duration::from_millis(500)))
        .http2_keepalive_timeout(Some(Duration::from_millis(1500)))
        .concurrency_limit_per_connection(16)
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, stop)
        .await
        .with_context(said)
}
