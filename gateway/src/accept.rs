//! Connections to the control port until their handshakes are over.
//!
//! The port is on the pod network, so anybody may knock. Who shows no certificate of the cluster's authority holds
//! little, for a short time, and cannot keep nodes and other gateways out; a process that has no file descriptor
//! left waits for one instead of giving up.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;

use crate::places::Places;

/// The longest that a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// The most handshakes of one address at a time.
const PER_SOURCE: usize = 8;
/// How long accept waits after it failed, for want of descriptors most likely.
const BREATHER: Duration = Duration::from_millis(100);

/// Connections whose handshakes are done, as long as the stream is there. Must run in a tokio runtime. Of more than
/// `most` handshakes the oldest is given up: an honest one takes milliseconds. `tls` is asked for each of them.
pub fn incoming(
    listener: TcpListener,
    tls: impl FnMut() -> Option<Arc<ServerConfig>> + Send + 'static,
    most: usize,
) -> ReceiverStream<io::Result<TlsStream<TcpStream>>> {
    let (out, done) = mpsc::channel(1);
    tokio::spawn(accept(listener, tls, most.max(1), out));
    ReceiverStream::new(done)
}

async fn accept(
    listener: TcpListener,
    mut tls: impl FnMut() -> Option<Arc<ServerConfig>>,
    most: usize,
    out: mpsc::Sender<io::Result<TlsStream<TcpStream>>>,
) {
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
        let Some(tls) = tls() else { continue };
        let (tls, out) = (TlsAcceptor::from(tls), out.clone());
        let handshake = tokio::spawn(async move {
            let shaken = async {
                stream.set_nodelay(true)?;
                tls.accept(stream).await
            };
            match timeout(HANDSHAKE, shaken).await {
                // The receiver is gone when the port closes.
                Ok(Ok(stream)) => drop(out.send(Ok(stream)).await),
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
    use rustls::server::ResolvesServerCertUsingSni;
    use tokio::io::AsyncReadExt;

    async fn port(most: usize) -> (ReceiverStream<io::Result<TlsStream<TcpStream>>>, std::net::SocketAddr) {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(ResolvesServerCertUsingSni::new()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let config = Arc::new(config);
        (incoming(listener, move || Some(config.clone()), most), address)
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
