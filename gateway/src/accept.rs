//! Connections to the control port until their handshakes are over.
//!
//! The port is on the pod network, so anybody may knock. Who shows no certificate of the cluster's authority holds
//! little, for a short time, and cannot keep nodes and other gateways out; a process that has no file descriptor
//! left waits for one instead of giving up.
//!
//! A client that offers the protocol [`JOIN`] wants a certificate: it need not show one, and its connection goes
//! to those who give them. There are few of these, and each ends in time. Nodes have places of their own ([`gate`]).

mod gate;

use std::collections::VecDeque;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustls::ServerConfig;
use rustls::server::Acceptor;
use tidegate_identity::{Credentials, JOIN, Role, name_of, node_uid_of, validity};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;

use self::gate::Gate;
use crate::identity;
use crate::nodes::{self, Nodes};
use crate::places::{Place, Places};
use crate::timed::Timed;

/// The longest that a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// The most handshakes of one address at a time.
const PER_SOURCE: usize = 8;
/// How long accept waits after it failed, for want of descriptors most likely.
const BREATHER: Duration = Duration::from_millis(100);

/// The longest life of a connection that wants a certificate, and of one that comes from nowhere known: an honest one takes
/// milliseconds.
const JOINING: Duration = Duration::from_secs(20);
const STRANGER: Duration = Duration::from_secs(5);
/// The most of those: from addresses of nodes, from others, and of others that show the certificate that they still have;
/// and the most of one node, of one other address, or of one certificate.
const JOINS: usize = 32;
const JOINS_EACH: usize = 4;
/// The most connections of one gateway, and of one node (a machine, not a name). An agent has two, and those that it gave up may not have ended yet.
const PER_BEARER: usize = 8;

/// A connection with a certificate, until that ends, with its bearer's place.
pub type Control = Timed<TlsStream<TcpStream>, Option<Place<String>>>;
/// A connection that wants a certificate, with its places.
pub type Joining = Timed<TlsStream<TcpStream>, (OwnedSemaphorePermit, Place<String>)>;

/// Connections whose handshakes are done.
pub struct Incoming {
    /// Of nodes and gateways.
    pub control: ReceiverStream<io::Result<Control>>,
    /// Of those who want a certificate.
    pub joining: ReceiverStream<io::Result<Joining>>,
}

/// With what a handshake is done.
struct Choice {
    usual: Arc<ServerConfig>,
    /// For who wants a certificate; absent: nobody gives any.
    joining: Option<Asking>,
}

/// The same for who wants a certificate.
struct Asking {
    /// Whoever it is.
    anyone: Arc<ServerConfig>,
    /// For who shows the one that he still has.
    renewing: Arc<ServerConfig>,
}

/// Places of those who want a certificate.
struct Lobby {
    nodes: Nodes,
    gate: Mutex<Gate>,
    start: Instant,
    /// From addresses of nodes, from others, and of others with a certificate.
    rooms: [Arc<Semaphore>; 3],
    each: Places<String>,
}

const NODES: usize = 0;
const STRANGERS: usize = 1;
const RENEWING: usize = 2;

impl Lobby {
    fn new(nodes: Nodes) -> Self {
        let rooms = std::array::from_fn(|_| Arc::new(Semaphore::new(JOINS)));
        Self { nodes, gate: Mutex::default(), start: Instant::now(), rooms, each: Places::new(JOINS_EACH) }
    }

    fn room(&self, room: usize, who: String) -> Option<(OwnedSemaphorePermit, Place<String>)> {
        self.rooms[room].clone().try_acquire_owned().ok().zip(self.each.take(who))
    }

    /// Places for a connection from this address, and its longest life. None: it has to show a certificate.
    fn enter(&self, from: IpAddr) -> Option<(Duration, (OwnedSemaphorePermit, Place<String>))> {
        let from = from.to_canonical();
        let node = self.nodes.at(from);
        let known = node.is_some();
        // A node counts as one, however many addresses it says it has.
        let (life, places) = match node {
            Some(name) => (JOINING, self.room(NODES, Role::Node.dns_name(&name))?),
            None => (STRANGER, self.room(STRANGERS, from.to_string())?),
        };
        self.gate.lock().admits(from, known, self.start.elapsed()).then_some((life, places))
    }
}

/// Connections whose handshakes are done, as long as the control stream is there. Must run in a tokio runtime. Of more
/// than `most` handshakes the oldest is given up: an honest one takes milliseconds. `own` is asked for each of them.
pub fn incoming(
    listener: TcpListener,
    mut own: impl FnMut() -> Option<Arc<Credentials>> + Send + 'static,
    most: usize,
    nodes: Nodes,
) -> Incoming {
    let (out, done) = mpsc::channel(1);
    let (joining, joined) = mpsc::channel(3 * JOINS);
    let choose = move || {
        let own = own()?;
        Some(Choice { usual: own.server(), joining: Some(Asking { anyone: own.joining(), renewing: own.renewing() }) })
    };
    tokio::spawn(accept(listener, choose, most.max(1), nodes, out, joining));
    Incoming { control: ReceiverStream::new(done), joining: ReceiverStream::new(joined) }
}

/// As [`incoming`], where nobody gets certificates.
pub fn plain(
    listener: TcpListener,
    mut config: impl FnMut() -> Option<Arc<ServerConfig>> + Send + 'static,
    most: usize,
) -> ReceiverStream<io::Result<Control>> {
    let (out, done) = mpsc::channel(1);
    let choose = move || config().map(|usual| Choice { usual, joining: None });
    tokio::spawn(accept(listener, choose, most.max(1), nodes::channel().1, out, mpsc::channel(1).0));
    ReceiverStream::new(done)
}

/// A connection after its handshake.
enum Shaken {
    Usual(TlsStream<TcpStream>),
    Joining(Joining),
}

async fn shake(stream: TcpStream, from: IpAddr, choice: Choice, lobby: &Lobby) -> io::Result<Shaken> {
    stream.set_nodelay(true)?;
    let hello = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
    let joins = hello.client_hello().alpn().is_some_and(|mut all| all.any(|p| p == JOIN));
    let Some(asking) = choice.joining.filter(|_| joins) else {
        return Ok(Shaken::Usual(hello.into_stream(choice.usual).await?));
    };
    // Before anything is signed for it.
    if let Some((life, places)) = lobby.enter(from) {
        return Ok(Shaken::Joining(Timed::new(hello.into_stream(asking.anyone).await?, life, places)));
    }
    let stream = hello.into_stream(asking.renewing).await?;
    let bearer = Bearer::of(&stream).filter(|b| b.is_there(&lobby.nodes));
    let places = bearer.and_then(|b| lobby.room(RENEWING, b.place()));
    let places = places.ok_or(io::ErrorKind::ConnectionRefused)?;
    Ok(Shaken::Joining(Timed::new(stream, JOINING, places)))
}

/// For whom the client's certificate speaks.
struct Bearer {
    role: Role,
    name: String,
    /// Of a node's object.
    uid: Option<String>,
    /// Unix seconds.
    ends: u64,
}

impl Bearer {
    fn of(stream: &TlsStream<TcpStream>) -> Option<Self> {
        let leaf = stream.get_ref().1.peer_certificates()?.first()?;
        let (role, name) = [Role::Node, Role::Gateway].into_iter().find_map(|r| Some((r, name_of(leaf, r)?)))?;
        let ends = u64::try_from(validity(leaf)?.1).ok()?;
        Some(Self { role, name, uid: node_uid_of(leaf), ends })
    }

    /// A node that is gone, or another machine now, must not hold anything: least of all its successor's places.
    fn is_there(&self, nodes: &Nodes) -> bool {
        self.role == Role::Gateway || nodes.admits(&self.name, self.uid.as_deref())
    }

    /// Whose places it takes.
    fn place(&self) -> String {
        format!("{} {}", self.role.dns_name(&self.name), self.uid.as_deref().unwrap_or_default())
    }

    fn left(&self) -> Duration {
        Duration::from_secs(self.ends.saturating_sub(identity::now()))
    }
}

async fn accept(
    listener: TcpListener,
    mut choose: impl FnMut() -> Option<Choice>,
    most: usize,
    nodes: Nodes,
    out: mpsc::Sender<io::Result<Control>>,
    joining: mpsc::Sender<io::Result<Joining>>,
) {
    let lobby = Arc::new(Lobby::new(nodes));
    let (places, bearers) = (Places::new(PER_SOURCE), Places::new(PER_BEARER));
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
        let (out, joining, lobby, bearers) = (out.clone(), joining.clone(), lobby.clone(), bearers.clone());
        let handshake = tokio::spawn(async move {
            match timeout(HANDSHAKE, shake(stream, peer.ip(), choice, &lobby)).await {
                Ok(Ok(Shaken::Usual(stream))) => match Bearer::of(&stream) {
                    // The receiver is gone when the port closes.
                    None => drop(out.send(Ok(Timed::endless(stream, None))).await),
                    Some(bearer) if !bearer.is_there(&lobby.nodes) => {
                        tracing::info!(%peer, node = bearer.name, uid = bearer.uid, "a certificate of a node that is not there");
                    }
                    Some(bearer) => match bearers.take(bearer.place()) {
                        Some(held) => drop(out.send(Ok(Timed::new(stream, bearer.left(), Some(held)))).await),
                        None => tracing::debug!(%peer, name = bearer.name, "too many connections of one certificate"),
                    },
                },
                // Where nobody gives certificates it is closed.
                Ok(Ok(Shaken::Joining(stream))) => drop(joining.try_send(Ok(stream))),
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
        (incoming(listener, move || Some(own.clone()), most, nodes::channel().1), address)
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
