//! Connections to the control port until their handshakes are over.
//!
//! The port is on the pod network, so anybody may knock. Who shows no certificate of the cluster's authority holds
//! little, for a short time, and cannot keep nodes and other gateways out; a process that has no file descriptor
//! left waits for one instead of giving up.
//!
//! A client that offers the protocol [`JOIN`] wants a certificate: it need not show one, and its connection goes
//! to those who give them. There are few of these, and each ends in time.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use rustls::server::Acceptor;
use tidegate_identity::{Credentials, JOIN};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;

use crate::places::{Place, Places};
use crate::timed::Timed;

/// The longest that a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// The most handshakes of one address at a time.
const PER_SOURCE: usize = 8;
/// How long accept waits after it failed, for want of descriptors most likely.
const BREATHER: Duration = Duration::from_millis(100);

/// The longest life of a connection that wants a certificate.
const JOINING: Duration = Duration::from_secs(20);
/// The most of those, and of one address.
const JOINS: usize = 64;
const JOINS_PER_SOURCE: usize = 4;

/// A connection that wants a certificate, with its places.
pub type Joining = Timed<TlsStream<TcpStream>, (OwnedSemaphorePermit, Place)>;

/// Connections whose handshakes are done.
pub struct Incoming {
    /// Of nodes and gateways.
    pub control: ReceiverStream<io::Result<TlsStream<TcpStream>>>,
    /// Of those who want a certificate.
    pub joining: ReceiverStream<io::Result<Joining>>,
}

/// With what a handshake is done.
struct Choice {
    usual: Arc<ServerConfig>,
    /// For who wants a certificate; absent: nobody gives any.
    joining: Option<Arc<ServerConfig>>,
}

/// Connections whose handshakes are done, as long as the control stream is there. Must run in a tokio runtime. Of more
/// than `most` handshakes the oldest is given up: an honest one takes milliseconds. `own` is asked for each of them.
pub fn incoming(
    listener: TcpListener,
    mut own: impl FnMut() -> Option<Arc<Credentials>> + Send + 'static,
    most: usize,
) -> Incoming {
    let (out, done) = mpsc::channel(1);
    let (joining, joined) = mpsc::channel(JOINS);
    let choose = move || own().map(|own| Choice { usual: own.server(), joining: Some(own.joining()) });
    tokio::spawn(accept(listener, choose, most.max(1), out, joining));
    Incoming { control: ReceiverStream::new(done), joining: ReceiverStream::new(joined) }
}

/// As [`incoming`], where nobody gets certificates.
pub fn plain(
    listener: TcpListener,
    mut config: impl FnMut() -> Option<Arc<ServerConfig>> + Send + 'static,
    most: usize,
) -> ReceiverStream<io::Result<TlsStream<TcpStream>>> {
    let (out, done) = mpsc::channel(1);
    let choose = move || config().map(|usual| Choice { usual, joining: None });
    tokio::spawn(accept(listener, choose, most.max(1), out, mpsc::channel(1).0));
    ReceiverStream::new(done)
}

async fn accept(
    listener: TcpListener,
    mut choose: impl FnMut() -> Option<Choice>,
    most: usize,
    out: mpsc::Sender<io::Result<TlsStream<TcpStream>>>,
    joining: mpsc::Sender<io::Result<Joining>>,
) {
    let (joins, joins_places) = (Arc::new(Semaphore::new(JOINS)), Places::new(JOINS_PER_SOURCE));
    let places = Places::new(PER_SOURCE);
    let mut pending: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = out.closed() => return,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept on the control port; trying again");
                sleep(BREATHER).await;
                continue;
            }
        };
        // Beyond its limit a source's connection is closed at once.
        let Some(place) = places.take(peer.ip()) else { continue };
        pending.retain(|p| !p.is_finished());
        if pending.len() >= most
            && let Some(oldest) = pending.pop_front()
        {
            oldest.abort();
        }
        // Before there is a certificate nobody can be served.
        let Some(choice) = choose() else { continue };
        let (out, joining, joins, joins_places) = (out.clone(), joining.clone(), joins.clone(), joins_places.clone());
        let handshake = tokio::spawn(async move {
            let shaken = async {
                stream.set_nodelay(true)?;
                let hello = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
                let joins = hello.client_hello().alpn().is_some_and(|mut all| all.any(|p| p == JOIN));
                let joining = choice.joining.filter(|_| joins);
                let joins = joining.is_some();
                Ok::<_, io::Error>((hello.into_stream(joining.unwrap_or(choice.usual)).await?, joins))
            };
            match timeout(HANDSHAKE, shaken).await {
                // The receiver is gone when the port closes.
                Ok(Ok((stream, false))) => drop(out.send(Ok(stream)).await),
                Ok(Ok((stream, true))) => {
                    let places = joins_places.take(peer.ip()).zip(joins.try_acquire_owned().ok());
                    // Where nobody gives certificates, and beyond the limits, the connection is closed.
                    if let Some((place, permit)) = places {
                        let _ = joining.try_send(Ok(Timed::new(stream, JOINING, (permit, place))));
                    }
                }
                Ok(Err(error)) => tracing::debug!(%peer, %error, "no handshake on the control port"),
                Err(_) => tracing::debug!(%peer, "a handshake on the control port took too long"),
            }
            drop(place);
        });
        pending.push_back(handshake.abort_handle());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    async fn port(most: usize) -> (Incoming, std::net::SocketAddr) {
        let own = Arc::new(credentials());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (incoming(listener, move || Some(own.clone()), most), address)
    }

    fn credentials() -> Credentials {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec!["gw-a.gateway.tidegate".to_owned()]).unwrap();
        let own = params.self_signed(&key).unwrap();
        Credentials::from_pem(own.pem().as_bytes(), key.serialize_pem().as_bytes(), own.pem().as_bytes()).unwrap()
    }

    async fn is_closed(stream: &mut TcpStream) -> bool {
        !matches!(timeout(Duration::from_millis(200), stream.read_u8()).await, Err(_) | Ok(Ok(_)))
    }

    #[tokio::test]
    async fn the_oldest_handshake_makes_room() {
        let (_port, address) = port(2).await;
        let mut held = Vec::new();
        for _ in 0..3 {
            held.push(TcpStream::connect(address).await.unwrap());
        }
        let [oldest, others @ ..] = &mut held[..] else { panic!() };
        assert!(is_closed(oldest).await);
        for other in others {
            assert!(!is_closed(other).await);
        }
    }

    #[tokio::test]
    async fn one_source_has_few_handshakes() {
        let (_port, address) = port(100).await;
        let mut held = Vec::new();
        for _ in 0..=PER_SOURCE {
            held.push(TcpStream::connect(address).await.unwrap());
        }
        assert!(is_closed(&mut held[PER_SOURCE]).await);
        assert!(!is_closed(&mut held[0]).await);
        // A place comes back with its connection.
        drop(held);
        sleep(Duration::from_millis(100)).await;
        assert!(!is_closed(&mut TcpStream::connect(address).await.unwrap()).await);
    }
}
