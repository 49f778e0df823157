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
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustls::ServerConfig;
use rustls::server::Acceptor;
use tidegate_identity::{Bearer, Credentials, JOIN, Role};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

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

/// Who is at the other end of a connection.
#[derive(Debug)]
pub struct Peer {
    /// Its address.
    pub address: SocketAddr,
    /// For whom its certificate speaks; its authority was checked with the handshake.
    pub bearer: Option<Bearer>,
}

/// What a connection holds: its places.
pub struct Held<P> {
    /// The other end.
    pub peer: Arc<Peer>,
    _places: P,
}

/// What requests are told of their connection.
impl<S, P> Connected for Timed<S, Held<P>> {
    type ConnectInfo = Arc<Peer>;

    fn connect_info(&self) -> Arc<Peer> {
        self.held().peer.clone()
    }
}

/// A connection with a certificate, until that ends, with its bearer's place.
pub type Control = Timed<TlsStream<TcpStream>, Held<Option<Place<String>>>>;
/// A connection that wants a certificate, with its places.
pub type Joining = Timed<TlsStream<TcpStream>, Held<(OwnedSemaphorePermit, Place<String>)>>;

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
    Usual(TlsStream<TcpStream>, Peer),
    Joining(Joining),
}

async fn shake(stream: TcpStream, from: SocketAddr, choice: Choice, lobby: &Lobby) -> io::Result<Shaken> {
    let peer = |stream: &TlsStream<TcpStream>| {
        let leaf = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        Peer { address: from, bearer: leaf.and_then(Bearer::of) }
    };
    stream.set_nodelay(true)?;
    let hello = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
    let joins = hello.client_hello().alpn().is_some_and(|mut all| all.any(|p| p == JOIN));
    let Some(asking) = choice.joining.filter(|_| joins) else {
        let stream = hello.into_stream(choice.usual).await?;
        let peer = peer(&stream);
        return Ok(Shaken::Usual(stream, peer));
    };
    // Before anything is signed for it.
    if let Some((life, places)) = lobby.enter(from.ip()) {
        let stream = hello.into_stream(asking.anyone).await?;
        let held = Held { peer: Arc::new(peer(&stream)), _places: places };
        return Ok(Shaken::Joining(Timed::new(stream, life, held)));
    }
    let stream = hello.into_stream(asking.renewing).await?;
    let peer = peer(&stream);
    let bearer = peer.bearer.as_ref().filter(|b| is_there(b, &lobby.nodes));
    let places = bearer.and_then(|b| lobby.room(RENEWING, place(b)));
    let places = places.ok_or(io::ErrorKind::ConnectionRefused)?;
    Ok(Shaken::Joining(Timed::new(stream, JOINING, Held { peer: Arc::new(peer), _places: places })))
}

/// A node that is gone, or another machine now, must not hold anything: least of all its successor's places.
fn is_there(bearer: &Bearer, nodes: &Nodes) -> bool {
    bearer.role == Role::Gateway || nodes.admits(&bearer.name, bearer.uid.as_deref())
}

/// Whose places a bearer takes.
fn place(bearer: &Bearer) -> String {
    format!("{} {}", bearer.role.dns_name(&bearer.name), bearer.uid.as_deref().unwrap_or_default())
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
            match timeout(HANDSHAKE, shake(stream, peer, choice, &lobby)).await {
                Ok(Ok(Shaken::Usual(stream, peer))) => {
                    if let Some(connection) = admit(stream, peer, &lobby.nodes, &bearers) {
                        // The receiver is gone when the port closes.
                        let _ = out.send(Ok(connection)).await;
                    }
                }
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

/// Lets a client in as long as its certificate holds, if there is a place.
fn admit(stream: TlsStream<TcpStream>, peer: Peer, nodes: &Nodes, bearers: &Places<String>) -> Option<Control> {
    let Peer { address, bearer } = &peer;
    let Some(bearer) = bearer else {
        return Some(Timed::endless(stream, Held { peer: Arc::new(peer), _places: None }));
    };
    if !is_there(bearer, nodes) {
        tracing::info!(peer = %address, node = bearer.name, uid = bearer.uid, "a certificate of a node that is not there");
        return None;
    }
    let Some(held) = bearers.take(place(bearer)) else {
        tracing::debug!(peer = %address, name = bearer.name, "too many connections of one certificate");
        return None;
    };
    let left = bearer.left(identity::now());
    Some(Timed::new(stream, left, Held { peer: Arc::new(peer), _places: Some(held) }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_identity::node_uid_uri;
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

    #[test]
    fn a_certificate_speaks_for_one() {
        let of = |dns: &[&str], uids: &[&str]| {
            let uri = |uid: &&str| rcgen::SanType::URI(node_uid_uri(uid).try_into().unwrap());
            let mut params =
                rcgen::CertificateParams::new(dns.iter().map(|d| (*d).to_owned()).collect::<Vec<_>>()).unwrap();
            params.subject_alt_names.extend(uids.iter().map(uri));
            params.not_after = rcgen::date_time_ymd(2033, 5, 18);
            Bearer::of(params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().der())
        };
        let bearer = |role, name: &str, uid: Option<&str>| {
            Some(Bearer { role, name: name.into(), uid: uid.map(str::to_owned), ends: 1_999_987_200 })
        };
        assert_eq!(of(&["n1.node.tidegate"], &[]), bearer(Role::Node, "n1", None));
        assert_eq!(of(&["n1.node.tidegate", "n1"], &["u"]), bearer(Role::Node, "n1", Some("u")));
        assert_eq!(of(&["gw-a.gateway.tidegate"], &["u"]), bearer(Role::Gateway, "gw-a", None));
        assert_eq!(of(&["n1.node.tidegate", "n2.node.tidegate"], &[]), None);
        assert_eq!(of(&["n1.node.tidegate", "gw-a.gateway.tidegate"], &[]), None);
        assert_eq!(of(&["n1.node.tidegate"], &["u", "v"]), None);
        assert_eq!(of(&["n1"], &["u"]), None);
        let bearer = of(&["n1.node.tidegate"], &[]).unwrap();
        assert_eq!(bearer.left(bearer.ends - 5), Duration::from_secs(5));
        assert_eq!(bearer.left(bearer.ends + 5), Duration::ZERO);
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
