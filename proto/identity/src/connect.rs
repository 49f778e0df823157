//! Connections to gateways.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::codegen::Service;
use tonic::codegen::http::Uri;
use tonic::transport::{Channel, Endpoint};

use crate::credentials::joining_client;
use crate::{Credentials, Error, Role, name_of};

/// The name that clients ask for, whoever answers: names are in certificates.
const ASKED: &str = "gateway.tidegate";

/// A connection to a gateway.
#[derive(Debug)]
pub struct Connection {
    /// Ends with the connection: nobody makes it anew.
    pub channel: Channel,
    /// The gateway's name, as its certificate has it.
    pub gateway: String,
}

/// Connects to the gateway of this name, or to whichever answers, within `limit`. `endpoint` sets what HTTP/2 needs.
///
/// # Errors
/// When nobody answers, or somebody whose certificate no trusted authority signed, or that is for another gateway.
pub async fn connect(
    address: SocketAddr,
    own: &Credentials,
    gateway: Option<&str>,
    limit: Duration,
    endpoint: impl FnOnce(Endpoint) -> Endpoint + Send,
) -> Result<Connection, Error> {
    open(address, own.client(gateway)?, limit, endpoint).await
}

/// Connects to ask for a certificate, trusting these authorities, with the one that is still there.
///
/// # Errors
/// As [`connect`].
pub async fn join(
    address: SocketAddr,
    authorities: Vec<CertificateDer<'static>>,
    own: Option<&Credentials>,
    gateway: Option<&str>,
    limit: Duration,
) -> Result<Connection, Error> {
    open(address, joining_client(authorities, gateway, own)?, limit, |e| e).await
}

async fn open(
    address: SocketAddr,
    config: ClientConfig,
    limit: Duration,
    endpoint: impl FnOnce(Endpoint) -> Endpoint + Send,
) -> Result<Connection, Error> {
    let name = ServerName::try_from(ASKED).map_err(|_| Error::Nameless)?;
    let shaken = async {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        TlsConnector::from(Arc::new(config)).connect(name, stream).await
    };
    let stream = timeout(limit, shaken).await.map_err(|_| Error::Slow(limit))?.map_err(refused)?;
    let leaf = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let gateway = leaf.and_then(|l| name_of(l, Role::Gateway)).ok_or(Error::Nameless)?;
    // The scheme says nothing here: the stream is encrypted already.
    let endpoint = endpoint(Endpoint::from_shared(format!("http://{}", Role::Gateway.dns_name(&gateway)))?);
    let connecting = endpoint.connect_with_connector(Once(Some(stream)));
    let channel = timeout(limit, connecting).await.map_err(|_| Error::Slow(limit))??;
    Ok(Connection { channel, gateway })
}

/// Why there is no connection. What is about time is so seldom the certificate's fault that the clock is named.
fn refused(error: io::Error) -> Error {
    use rustls::CertificateError::{Expired, ExpiredContext, NotValidYet, NotValidYetContext};
    let said = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    match said {
        Some(
            rustls::Error::InvalidCertificate(
                Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. },
            )
            | rustls::Error::AlertReceived(rustls::AlertDescription::CertificateExpired),
        ) => Error::Clock(error),
        _ => Error::Connect(error),
    }
}

/// Hands the one connection out.
struct Once(Option<TlsStream<TcpStream>>);

impl Service<Uri> for Once {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = io::Error;
    type Future = std::future::Ready<Result<Self::Response, io::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), io::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let gone = || io::Error::new(io::ErrorKind::NotConnected, "the connection ended");
        std::future::ready(self.0.take().map(TokioIo::new).ok_or_else(gone))
    }
}
