//! Nodes that ask for certificates, and what those are worth: real sockets, the agent's own client, and an API server's
//! answers out of a table. `keeper_tests.rs` has the real one.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use crossbeam_channel::Receiver;
use parking_lot::Mutex;
use rcgen::{CertificateParams, KeyPair};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tidegate_agent::config::Join;
use tidegate_agent::find::Names;
use tidegate_agent::join::Joiner;
use tidegate_agent::stream::Client;
use tidegate_identity::{Connection, Credentials, Source, authorities_from_pem, connect};
use tidegate_kubernetes::Access;
use tidegate_proto::wire::control_client::ControlClient;
use tidegate_proto::wire::identity_client::IdentityClient;
use tidegate_proto::wire::{PeerHello, StateAck};
use tidegate_proto::{Seen, Up};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tonic::Code;

use super::*;
use crate::core::ToCore;
use crate::push::{self, Streams};

pub(crate) const ACCOUNT: &str = "system:serviceaccount:tidegate-system:tidegate-agent";
const WAIT: Duration = Duration::from_secs(10);
pub(crate) const DAY: Times = Times { certificate: 86_400, authority: 31_536_000, overlap: 3600 };

/// What the API server would say of each token.
#[derive(Default)]
struct Table {
    users: BTreeMap<&'static str, User>,
    away: Mutex<bool>,
}

#[tonic::async_trait]
impl Reviews for Table {
    async fn token(&self, token: String, audiences: Vec<String>) -> Result<Option<User>, Unknown> {
        if *self.away.lock() {
            return Err(Unknown::Away("a test".into()));
        }
        assert_eq!(audiences, ["tidegate"]);
        Ok(self.users.get(&*token).cloned())
    }

    async fn access(&self, _: User, _: Access) -> Result<bool, Unknown> {
        Err(Unknown::Refused("nobody asks that".into()))
    }
}

fn user(name: &str, nodes: &[&str]) -> User {
    let nodes = nodes.iter().map(|n| (*n).to_owned()).collect();
    let extra = BTreeMap::from([("authentication.kubernetes.io/node-name".to_owned(), nodes)]);
    User { name: name.into(), extra, ..User::default() }
}

pub(crate) fn own(authority: &Authority, role: Role, name: &str, at: u64, times: &Times) -> Credentials {
    let key = KeyPair::generate().unwrap();
    let issued = match role {
        Role::Gateway => authority.gateway(name, &[], &key, at, times).unwrap(),
        Role::Node => authority.node(name, &request(&role.dns_name(name), &key), at, times).unwrap(),
    };
    credentials(vec![issued.certificate], &key, &authority.bundle())
}

fn credentials(chain: Vec<CertificateDer<'static>>, key: &KeyPair, bundle: &str) -> Credentials {
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    Credentials::new(chain, key, authorities_from_pem(bundle.as_bytes()).unwrap()).unwrap()
}

fn request(name: &str, key: &KeyPair) -> Vec<u8> {
    CertificateParams::new(vec![name.to_owned()]).unwrap().serialize_request(key).unwrap().der().to_vec()
}

/// A gateway's control port, with its core's end.
pub(crate) struct Gateway {
    pub address: SocketAddr,
    pub core: Receiver<ToCore>,
    issued: watch::Sender<Option<Arc<Credentials>>>,
    task: JoinHandle<()>,
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A loopback address of its own for each port.
pub(crate) fn free() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

pub(crate) async fn gateway(own: Arc<Credentials>, joins: Option<Joins>) -> Gateway {
    let (issued, source) = watch::channel(Some(own));
    let (to_core, core) = crossbeam_channel::bounded(64);
    let address = free();
    let streams = Streams::new(to_core, crate::report::thread::post().0);
    let served = push::serve(address, Source::Issued(source), 64, streams, joins, std::future::pending());
    let task = tokio::spawn(async move { served.await.unwrap() });
    while tokio::net::TcpStream::connect(address).await.is_err() {
        sleep(Duration::from_millis(10)).await;
    }
    Gateway { address, core, issued, task }
}

struct World {
    authority: Arc<Authority>,
    table: Arc<Table>,
    gateway: Gateway,
}

async fn world(times: Times) -> World {
    let authority = Arc::new(Authority::first(now(), &times, KeyPair::generate().unwrap()).unwrap());
    let users = BTreeMap::from([
        ("node-1's", user(ACCOUNT, &["node-1"])),
        ("node-2's", user(ACCOUNT, &["node-2"])),
        ("another account's", user("system:serviceaccount:tidegate-system:default", &["node-1"])),
        ("another namespace's", user("system:serviceaccount:shop:tidegate-agent", &["node-1"])),
        ("no pod's", user(ACCOUNT, &[])),
        ("of two nodes", user(ACCOUNT, &["node-1", "node-2"])),
    ]);
    let table = Arc::new(Table { users, away: Mutex::new(false) });
    let (_, read) = watch::channel(Some(authority.clone()));
    let joins = Joins::new(read, table.clone(), ACCOUNT.into(), "tidegate".into(), times);
    let gateway = gateway(Arc::new(own(&authority, Role::Gateway, "gw-a", now(), &DAY)), Some(joins)).await;
    World { authority, table, gateway }
}

impl World {
    fn bundle(&self) -> Vec<CertificateDer<'static>> {
        authorities_from_pem(self.authority.bundle().as_bytes()).unwrap()
    }

    async fn ask(
        &self,
        held: Option<&Credentials>,
        node: &str,
        token: &str,
        request: &[u8],
    ) -> Result<JoinReply, Status> {
        let Connection { channel, gateway } =
            tidegate_identity::join(self.gateway.address, self.bundle(), held, None, WAIT).await.unwrap();
        assert_eq!(gateway, "gw-a");
        let asked = JoinRequest { node: node.into(), token: token.into(), request: request.to_vec() };
        IdentityClient::new(channel).join(asked).await.map(Response::into_inner)
    }

    fn client(&self, node: &str, own: Credentials) -> Client {
        let (issued, source) = watch::channel(Some(Arc::new(own)));
        std::mem::forget(issued);
        stream(self.gateway.address, node, Source::Issued(source))
    }
}

pub(crate) fn stream(address: SocketAddr, node: &str, identity: Source) -> Client {
    Client {
        node: node.into(),
        boot: 1,
        address,
        name: None,
        names: Names::default(),
        identity,
        seen: watch::channel(Seen::default()).1,
        denied: watch::channel(Arc::default()).1,
    }
}

/// What the core hears within a while.
pub(crate) async fn heard(core: &Receiver<ToCore>, limit: Duration) -> Option<ToCore> {
    let until = Instant::now() + limit;
    loop {
        match core.try_recv() {
            Ok(message) => return Some(message),
            Err(_) if Instant::now() > until => return None,
            Err(_) => sleep(Duration::from_millis(10)).await,
        }
    }
}

fn code(result: Result<JoinReply, Status>) -> Code {
    result.unwrap_err().code()
}

pub(crate) fn joiner(folder: &Path, address: SocketAddr) -> (Joiner, Source, watch::Receiver<Option<String>>) {
    let (issued, source) = watch::channel(None);
    let (trouble, said) = watch::channel(None);
    let (targets, known) = watch::channel(vec![address]);
    std::mem::forget(targets);
    let join = Join { token: folder.join("token"), ca: folder.join("ca.crt"), folder: folder.join("identity") };
    (Joiner { node: "node-1".into(), join, targets: known, issued, trouble }, Source::Issued(source), said)
}

#[tokio::test]
async fn an_agent_joins_speaks_and_renews() {
    // Renewed after two seconds.
    let world = world(Times { certificate: 3, ..DAY }).await;
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("ca.crt"), world.authority.bundle()).unwrap();
    let (joiner, source, said) = joiner(folder.path(), world.gateway.address);
    let task = tokio::spawn(joiner.run());
    // No token yet: it says so, and goes on.
    sleep(Duration::from_millis(200)).await;
    assert!(said.borrow().as_ref().is_some_and(|t| t.contains("is missing") && t.contains("/token")));
    std::fs::write(folder.path().join("token"), "node-1's\n").unwrap();
    let first = timeout(WAIT, async {
        loop {
            match source.now() {
                Ok(own) => break own,
                Err(_) => sleep(Duration::from_millis(20)).await,
            }
        }
    });
    let first = first.await.unwrap();
    assert_eq!(*said.borrow(), None);
    let (tx, _rx) = tokio::sync::mpsc::channel(8);
    let streams = tokio::spawn(stream(world.gateway.address, "node-1", source.clone()).state(tx));
    let Some(ToCore::StateUp { node, out: _out, .. }) = heard(&world.gateway.core, WAIT).await else { panic!() };
    assert_eq!(node, "node-1");
    // The certificate is renewed. The stream ends with the one that opened it, and comes back with the new one.
    let Some(ToCore::StateDown { .. }) = heard(&world.gateway.core, WAIT).await else { panic!() };
    assert!(now() >= first.ends() as u64);
    assert!(source.now().unwrap().ends() > first.ends());
    let Some(ToCore::StateUp { .. }) = heard(&world.gateway.core, WAIT).await else {
        panic!("{:?}", *said.borrow());
    };

    // The API server goes: who is in stays, beyond the end of what he has.
    *world.table.away.lock() = true;
    let held = source.now().unwrap().ends();
    sleep(Duration::from_secs(4)).await;
    let later = source.now().unwrap_or_else(|e| panic!("{e}: {:?}", *said.borrow()));
    assert!(later.ends() > held, "renewed by the certificate that still held");
    later.check(Role::Node, "node-1", now()).unwrap();
    task.abort();
    streams.abort();

    // The agent restarts, and no gateway is there: what it kept serves while it holds.
    let kept = folder.path().join("identity/node.json");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&kept).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let (joiner, source, said) = self::joiner(folder.path(), free());
    let task = tokio::spawn(joiner.run());
    sleep(Duration::from_millis(200)).await;
    assert_eq!(source.now().unwrap().ends(), later.ends());
    sleep(Duration::from_secs(5)).await;
    assert!(source.now().is_err(), "one that has ended is not shown");
    assert!(said.borrow().as_ref().is_some_and(|t| t.contains("is missing")));
    task.abort();
}

#[tokio::test]
async fn who_shows_the_wrong_token_gets_nothing() {
    let world = world(DAY).await;
    let key = KeyPair::generate().unwrap();
    let one = request("node-1.node.tidegate", &key);
    let two = request("node-2.node.tidegate", &key);
    let gateways = request("gw-a.gateway.tidegate", &key);
    for (node, token, asked, why) in [
        // Nobody's, ended, or for another audience: the API server says no.
        ("node-1", "stolen", &one, Code::Unauthenticated),
        ("node-1", "another account's", &one, Code::PermissionDenied),
        ("node-1", "another namespace's", &one, Code::PermissionDenied),
        ("node-1", "no pod's", &one, Code::PermissionDenied),
        ("node-1", "of two nodes", &one, Code::PermissionDenied),
        // The token of a pod on another node.
        ("node-1", "node-2's", &one, Code::PermissionDenied),
        // Somebody else's request, for his name or for one's own.
        ("node-1", "node-1's", &two, Code::PermissionDenied),
        ("node-2", "node-1's", &two, Code::PermissionDenied),
        // A gateway's name, either way.
        ("node-1", "node-1's", &gateways, Code::PermissionDenied),
        ("gw-a.gateway.tidegate", "node-1's", &gateways, Code::PermissionDenied),
        ("node-1", "", &one, Code::InvalidArgument),
        ("", "node-1's", &one, Code::InvalidArgument),
        ("no de", "node-1's", &one, Code::InvalidArgument),
        ("node-1", "node-1's", &vec![0x30; 100], Code::InvalidArgument),
        ("node-1", "node-1's", &vec![0; MAX_REQUEST + 1], Code::InvalidArgument),
    ] {
        assert_eq!(code(world.ask(None, node, token, asked).await), why, "{node} {token}");
    }
    let reply = world.ask(None, "node-1", "node-1's", &one).await.unwrap();
    assert_eq!(reply.renew_ms, 57_600_000);

    // While the API server is away only who holds that node's certificate is served.
    *world.table.away.lock() = true;
    let [first, second] = ["node-1", "node-2"].map(|n| own(&world.authority, Role::Node, n, now(), &DAY));
    assert_eq!(code(world.ask(None, "node-1", "node-1's", &one).await), Code::Unavailable);
    assert_eq!(code(world.ask(Some(&second), "node-1", "node-1's", &one).await), Code::Unavailable);
    world.ask(Some(&first), "node-1", "anything", &one).await.unwrap();
    let gateway = own(&world.authority, Role::Gateway, "node-1", now(), &DAY);
    assert_eq!(code(world.ask(Some(&gateway), "node-1", "anything", &one).await), Code::Unavailable);
}

#[tokio::test]
async fn a_certificate_speaks_for_its_node_alone() {
    let world = world(DAY).await;
    let node = |name| own(&world.authority, Role::Node, name, now(), &DAY);
    let refused = |node: &'static str, own| {
        let (client, core) = (world.client(node, own), world.gateway.core.clone());
        async move {
            let (tx, _rx) = tokio::sync::mpsc::channel(8);
            let task = tokio::spawn(client.state(tx));
            let heard = heard(&core, Duration::from_millis(600)).await;
            task.abort();
            heard.is_none()
        }
    };
    // Another node's hello; a gateway's certificate for a node; one that has ended; one of another cluster.
    assert!(refused("node-2", node("node-1")).await);
    assert!(refused("gw-b", own(&world.authority, Role::Gateway, "gw-b", now(), &DAY)).await);
    assert!(refused("node-1", own(&world.authority, Role::Node, "node-1", now() - 2 * DAY.certificate, &DAY)).await);
    let foreign = Authority::first(now(), &DAY, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let issued = foreign.node("node-1", &request("node-1.node.tidegate", &key), now(), &DAY).unwrap();
    assert!(refused("node-1", credentials(vec![issued.certificate], &key, &world.authority.bundle())).await);
    // The same, as it should be.
    assert!(!refused("node-1", node("node-1")).await);

    // A node is no gateway: not to a gateway that it asks, ...
    let peer = |own: Credentials, name: &'static str| {
        let address = world.gateway.address;
        async move {
            let channel = connect(address, &own, Some("gw-a"), WAIT, |e| e).await.unwrap().channel;
            ControlClient::new(channel).peer(PeerHello { gateway: name.into() }).await.map(drop)
        }
    };
    assert_eq!(peer(node("node-1"), "node-1").await.unwrap_err().code(), Code::PermissionDenied);
    let gateway = |name| own(&world.authority, Role::Gateway, name, now(), &DAY);
    assert_eq!(peer(gateway("gw-b"), "gw-c").await.unwrap_err().code(), Code::PermissionDenied);
    peer(gateway("gw-b"), "gw-b").await.unwrap();
    // ... nor to agents that connect to it, whatever name it has,
    let liar = self::gateway(Arc::new(node("gw-a")), None).await;
    let own = node("node-1");
    for name in [None, Some("gw-a")] {
        assert!(connect(liar.address, &own, name, WAIT, |e| e).await.is_err());
    }
    assert!(tidegate_identity::join(liar.address, world.bundle(), None, None, WAIT).await.is_err());
    // and a gateway is only the one that it is.
    assert!(connect(world.gateway.address, &own, Some("gw-b"), WAIT, |e| e).await.is_err());
    assert_eq!(connect(world.gateway.address, &own, None, WAIT, |e| e).await.unwrap().gateway, "gw-a");
}

#[tokio::test]
async fn strangers_get_nothing_but_the_question() {
    let world = world(DAY).await;
    // Without a certificate there are no streams, ...
    let joined = tidegate_identity::join(world.gateway.address, world.bundle(), None, None, WAIT).await.unwrap();
    let hello = StateAck::from(Up::Hello { node: "node-1".into(), boot_id: 1 });
    let asked = ControlClient::new(joined.channel).state(tokio_stream::once(hello)).await;
    assert_eq!(asked.unwrap_err().code(), Code::Unimplemented);
    // ... with one no questions, ...
    let own = own(&world.authority, Role::Node, "node-1", now(), &DAY);
    let channel = connect(world.gateway.address, &own, None, WAIT, |e| e).await.unwrap().channel;
    let asked = IdentityClient::new(channel).join(JoinRequest::default()).await;
    assert_eq!(asked.unwrap_err().code(), Code::Unimplemented);
    // ... and of one source only few are listened to.
    let mut held = Vec::new();
    let mut refused = false;
    for _ in 0..6 {
        match tidegate_identity::join(world.gateway.address, world.bundle(), None, None, WAIT).await {
            Ok(connection) => {
                let asked = IdentityClient::new(connection.channel.clone()).join(JoinRequest::default()).await;
                refused |= asked.unwrap_err().code() != Code::InvalidArgument;
                held.push(connection);
            }
            Err(_) => refused = true,
        }
    }
    assert!(refused, "six at a time");
    assert!(held.len() >= 4);
}

#[tokio::test]
async fn a_new_certificate_of_the_gateway_drops_no_stream() {
    let world = world(DAY).await;
    let node = |bundle: &str| {
        let key = KeyPair::generate().unwrap();
        let issued = world.authority.node("node-1", &request("node-1.node.tidegate", &key), now(), &DAY).unwrap();
        credentials(vec![issued.certificate], &key, bundle)
    };
    // Of another authority, as after a rotation: nodes trust both.
    let next = Authority::first(now(), &DAY, KeyPair::generate().unwrap()).unwrap();
    let both = world.authority.bundle() + &next.bundle();
    let (tx, _rx) = tokio::sync::mpsc::channel(8);
    let task = tokio::spawn(world.client("node-1", node(&both)).state(tx));
    let Some(ToCore::StateUp { out, .. }) = heard(&world.gateway.core, WAIT).await else { panic!() };
    let key = KeyPair::generate().unwrap();
    let issued = next.gateway("gw-a", &[], &key, now(), &DAY).unwrap();
    world.gateway.issued.send_replace(Some(Arc::new(credentials(vec![issued.certificate], &key, &both))));
    // New connections get the new one: who trusts only the former authority does not take it.
    let address = world.gateway.address;
    assert!(connect(address, &node(&world.authority.bundle()), None, WAIT, |e| e).await.is_err());
    connect(address, &node(&both), None, WAIT, |e| e).await.unwrap();
    assert!(heard(&world.gateway.core, Duration::from_millis(500)).await.is_none(), "no stream went down");
    assert!(!out.is_closed());
    task.abort();
}
