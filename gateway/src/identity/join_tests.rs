//! Nodes that ask for certificates, and what those are worth: real sockets, the agent's own client, and an API server's
//! answers out of a table. `keeper_tests.rs` has the real one.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use parking_lot::Mutex;
use rcgen::{CertificateParams, KeyPair};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::json;
use tidegate_agent::config::Join;
use tidegate_agent::find::Names;
use tidegate_agent::join::Joiner;
use tidegate_agent::stream::Client;
use tidegate_identity::{Bearer, Connection, Credentials, Source, authorities_from_pem, connect};
use tidegate_kubernetes::Access;
use tidegate_proto::wire::control_client::ControlClient;
use tidegate_proto::wire::identity_client::IdentityClient;
use tidegate_proto::wire::{FactsAck, PeerHello, StateAck};
use tidegate_proto::{ScopeClaim, Seen, Up};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_stream::StreamExt;
use tonic::Code;

use super::*;
use crate::core::ToCore;
use crate::nodes;
use crate::nodes::tests::known;
use crate::push::{self, Streams};

pub(crate) const ACCOUNT: &str = "system:serviceaccount:tidegate-system:tidegate-agent";
const WAIT: Duration = Duration::from_secs(10);
pub(crate) const DAY: Times = Times { certificate: 86_400, authority: 31_536_000, overlap: 3600 };

/// What the API server would say of each token.
#[derive(Default)]
struct Table {
    users: BTreeMap<&'static str, User>,
    away: Mutex<bool>,
    asked: Mutex<usize>,
}

/// A token with these claims. Its signature says whose it is.
fn token_with(whose: &str, claims: &serde_json::Value) -> String {
    [br#"{"alg":"RS256"}"#, claims.to_string().as_bytes(), whose.as_bytes()]
        .map(|p| URL_SAFE_NO_PAD.encode(p))
        .join(".")
}

fn token(whose: &str) -> String {
    token_with(whose, &json!({"aud": ["tidegate"], "sub": ACCOUNT, "exp": now() + 3600}))
}

#[tonic::async_trait]
impl Reviews for Table {
    async fn token(&self, token: String, audiences: Vec<String>) -> Result<Option<User>, Unknown> {
        if *self.away.lock() {
            return Err(Unknown::Away("a test".into()));
        }
        assert_eq!(audiences, ["tidegate"]);
        *self.asked.lock() += 1;
        let whose = token.rsplit('.').next().and_then(|s| URL_SAFE_NO_PAD.decode(s).ok()).unwrap();
        Ok(self.users.get(std::str::from_utf8(&whose).unwrap()).cloned())
    }

    async fn access(&self, _: User, _: Access) -> Result<bool, Unknown> {
        Err(Unknown::Refused("nobody asks that".into()))
    }
}

fn user(name: &str, nodes: &[&str]) -> User {
    let uids = nodes.iter().map(|n| format!("uid of {n}")).collect();
    let nodes = nodes.iter().map(|n| (*n).to_owned()).collect();
    let key = |k: &str| format!("authentication.kubernetes.io/{k}");
    let extra = BTreeMap::from([(key("node-name"), nodes), (key("node-uid"), uids)]);
    User { name: name.into(), extra, ..User::default() }
}

pub(crate) fn own(authority: &Authority, role: Role, name: &str, at: u64, times: &Times) -> Credentials {
    let key = KeyPair::generate().unwrap();
    let issued = match role {
        Role::Gateway => authority.gateway(name, &[], &key, at, times).unwrap(),
        Role::Node => authority.node(name, None, &request(&role.dns_name(name), &key), at, times).unwrap(),
    };
    credentials(issued.chain, &key, &authority.bundle())
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

pub(crate) async fn gateway(own: Arc<Credentials>, joins: Option<Joins>, nodes: Nodes) -> Gateway {
    let (issued, source) = watch::channel(Some(own));
    let (to_core, core) = std::sync::mpsc::sync_channel(64);
    let address = free();
    let streams = Streams::new(to_core, crate::report::thread::post().0, nodes, crate::starts::Starts::default());
    let served = push::serve(address, Source::Issued(source), 64, streams, joins, std::future::pending());
    let task = tokio::spawn(async move { served.await.unwrap() });
    while TcpStream::connect(address).await.is_err() {
        sleep(Duration::from_millis(10)).await;
    }
    Gateway { address, core, issued, task }
}

/// The nodes of the cluster: name, UID, address.
const ALL: [(&str, &str, &str); 2] =
    [("node-1", "uid of node-1", "127.0.0.1"), ("node-2", "uid of node-2", "192.0.2.2")];

struct World {
    authority: Arc<Authority>,
    table: Arc<Table>,
    gateway: Gateway,
    nodes: nodes::Teller,
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
    let table = Arc::new(Table { users, ..Table::default() });
    let (_, read) = watch::channel(Some(authority.clone()));
    let (teller, nodes) = nodes::channel();
    teller.tell(known(&ALL));
    let joins = Joins::new(read, table.clone(), ACCOUNT.into(), "tidegate".into(), times, nodes.clone());
    let own = Arc::new(own(&authority, Role::Gateway, "gw-a", now(), &DAY));
    let gateway = gateway(own, Some(joins), nodes).await;
    World { authority, table, gateway, nodes: teller }
}

impl World {
    fn bundle(&self) -> Vec<CertificateDer<'static>> {
        authorities_from_pem(self.authority.bundle().as_bytes()).unwrap()
    }

    async fn ask(
        &self,
        held: Option<&Credentials>,
        node: &str,
        token: String,
        request: &[u8],
    ) -> Result<JoinReply, Status> {
        let Connection { channel, gateway } =
            tidegate_identity::join(self.gateway.address, self.bundle(), held, None, WAIT).await.unwrap();
        assert_eq!(gateway, "gw-a");
        let asked = JoinRequest { node: node.into(), token, request: request.to_vec() };
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
        started: watch::channel(Arc::default()).1,
        stop: watch::channel(false).1,
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
    // No token yet, which is no trouble so soon.
    sleep(Duration::from_millis(200)).await;
    assert_eq!(*said.borrow(), None);
    std::fs::write(folder.path().join("token"), token("node-1's") + "\n").unwrap();
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

    // It starts with one that has ended, as a node that was off for long: it shows its token again.
    *world.table.away.lock() = false;
    let (joiner, source, said) = self::joiner(folder.path(), world.gateway.address);
    let task = tokio::spawn(joiner.run());
    let joined = timeout(WAIT, async {
        while source.now().is_err() {
            sleep(Duration::from_millis(20)).await;
        }
    });
    joined.await.unwrap_or_else(|_| panic!("{:?}", *said.borrow()));
    source.now().unwrap().check(Role::Node, "node-1", now()).unwrap();
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
        ("", "node-1's", &one, Code::InvalidArgument),
        ("no de", "node-1's", &one, Code::InvalidArgument),
        ("node-1", "node-1's", &vec![0x30; 100], Code::InvalidArgument),
        ("node-1", "node-1's", &vec![0; MAX_REQUEST + 1], Code::InvalidArgument),
    ] {
        assert_eq!(code(world.ask(None, node, self::token(token), asked).await), why, "{node} {token}");
    }
    let reply = world.ask(None, "node-1", token("node-1's"), &one).await.unwrap();
    assert_eq!(reply.renew_ms, 57_600_000);
    let leaf = CertificateDer::from(reply.chain[0].clone());
    assert_eq!(Bearer::of(&leaf).and_then(|b| b.uid).as_deref(), Some("uid of node-1"));

    // What cannot be a token for this is not asked about.
    let asked = *world.table.asked.lock();
    let claims = |key: &str, value: serde_json::Value| {
        let mut all = json!({"aud": ["tidegate"], "sub": ACCOUNT, "exp": now() + 3600});
        all[key] = value;
        token_with("node-1's", &all)
    };
    for (token, why) in [
        (String::new(), Code::InvalidArgument),
        ("node-1's".into(), Code::Unauthenticated),
        (claims("aud", json!(["https://kubernetes.default.svc"])), Code::Unauthenticated),
        (claims("exp", json!(now() - LEEWAY - 1)), Code::Unauthenticated),
        (claims("sub", json!("system:serviceaccount:shop:tidegate-agent")), Code::PermissionDenied),
    ] {
        assert_eq!(code(world.ask(None, "node-1", token.clone(), &one).await), why, "{token}");
    }
    assert_eq!(*world.table.asked.lock(), asked);
    world.ask(None, "node-1", claims("exp", json!(now() - LEEWAY / 2)), &one).await.unwrap();

    // While the API server is away only who holds that node's certificate is served.
    *world.table.away.lock() = true;
    let [first, second] = ["node-1", "node-2"].map(|n| own(&world.authority, Role::Node, n, now(), &DAY));
    assert_eq!(code(world.ask(None, "node-1", token("node-1's"), &one).await), Code::Unavailable);
    assert_eq!(code(world.ask(Some(&second), "node-1", token("node-1's"), &one).await), Code::Unavailable);
    world.ask(Some(&first), "node-1", token("anything"), &one).await.unwrap();
    let gateway = own(&world.authority, Role::Gateway, "node-1", now(), &DAY);
    assert_eq!(code(world.ask(Some(&gateway), "node-1", token("anything"), &one).await), Code::Unavailable);
}

#[tokio::test]
async fn a_certificate_speaks_for_its_node_alone() {
    let world = world(DAY).await;
    let node = |name| own(&world.authority, Role::Node, name, now(), &DAY);
    let refused = |node: &'static str, own| {
        let (client, core) = (world.client(node, own), &world.gateway.core);
        async move {
            let (tx, _rx) = tokio::sync::mpsc::channel(8);
            let task = tokio::spawn(client.state(tx));
            let heard = heard(core, Duration::from_millis(600)).await;
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
    let issued =
        foreign.node("node-1", Some("uid of node-1"), &request("node-1.node.tidegate", &key), now(), &DAY).unwrap();
    assert!(refused("node-1", credentials(issued.chain, &key, &world.authority.bundle())).await);
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
    let liar = self::gateway(Arc::new(node("gw-a")), None, nodes::channel().1).await;
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
        let issued = world
            .authority
            .node("node-1", Some("uid of node-1"), &request("node-1.node.tidegate", &key), now(), &DAY)
            .unwrap();
        credentials(issued.chain, &key, bundle)
    };
    // Of another authority, as after a rotation: nodes trust both.
    let next = Authority::first(now(), &DAY, KeyPair::generate().unwrap()).unwrap();
    let both = world.authority.bundle() + &next.bundle();
    let (tx, _rx) = tokio::sync::mpsc::channel(8);
    let task = tokio::spawn(world.client("node-1", node(&both)).state(tx));
    let Some(ToCore::StateUp { out, .. }) = heard(&world.gateway.core, WAIT).await else { panic!() };
    let key = KeyPair::generate().unwrap();
    let issued = next.gateway("gw-a", &[], &key, now(), &DAY).unwrap();
    world.gateway.issued.send_replace(Some(Arc::new(credentials(issued.chain, &key, &both))));
    // New connections get the new one: who trusts only the former authority does not take it.
    let address = world.gateway.address;
    assert!(connect(address, &node(&world.authority.bundle()), None, WAIT, |e| e).await.is_err());
    connect(address, &node(&both), None, WAIT, |e| e).await.unwrap();
    assert!(heard(&world.gateway.core, Duration::from_millis(500)).await.is_none(), "no stream went down");
    assert!(!out.is_closed());
    task.abort();
}

/// A client's end of a connection that wants a certificate, from an address of its own. None: it is not listened to.
async fn knock(world: &World, from: [u8; 4]) -> Option<TlsStream<TcpStream>> {
    let mut roots = rustls::RootCertStore::empty();
    world.bundle().into_iter().for_each(|c| roots.add(c).unwrap());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let mut config = config.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![tidegate_identity::JOIN.to_vec()];
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind((from, 0).into()).unwrap();
    let stream = socket.connect(world.gateway.address).await.unwrap();
    let name = "gw-a.gateway.tidegate".try_into().unwrap();
    let mut stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.ok()?;
    // With TLS 1.3 the client is done before the server has refused.
    let read = timeout(Duration::from_millis(300), tokio::io::AsyncReadExt::read(&mut stream, &mut [0; 64])).await;
    match read {
        Ok(Ok(0) | Err(_)) => None,
        _ => Some(stream),
    }
}

#[tokio::test]
async fn pods_that_fill_the_places_keep_no_node_out() {
    let world = world(DAY).await;
    let key = KeyPair::generate().unwrap();
    let asked = request("node-1.node.tidegate", &key);
    let mut pods: Vec<_> = futures_util::future::join_all((1..=60).map(|n| knock(&world, [127, 0, 1, n])))
        .await
        .into_iter()
        .flatten()
        .collect();
    assert!((20..60).contains(&pods.len()), "{}", pods.len());
    assert!(knock(&world, [127, 0, 2, 1]).await.is_none(), "their places are full");
    // By its address, ...
    world.ask(None, "node-1", token("node-1's"), &asked).await.unwrap();
    // ... and, where that is not known, by the certificate that it still has.
    world.nodes.tell(known(&[("node-1", "uid of node-1", "192.0.2.1")]));
    let held = own(&world.authority, Role::Node, "node-1", now(), &DAY);
    world.ask(Some(&held), "node-1", token("node-1's"), &asked).await.unwrap();
    let none = tidegate_identity::join(world.gateway.address, world.bundle(), None, None, WAIT).await;
    let refused = match none {
        Err(_) => true,
        Ok(c) => {
            IdentityClient::new(c.channel).join(JoinRequest::default()).await.unwrap_err().code()
                != Code::InvalidArgument
        }
    };
    assert!(refused);
    // However many addresses a node says it has, it is one.
    world.nodes.tell(known(&[("node-7", "7", "127.0.7.1"), ("node-7", "7", "127.0.7.2")]));
    let mut stolen = Vec::new();
    for n in 0..12 {
        stolen.extend(knock(&world, [127, 0, 7, 1 + n % 2]).await);
    }
    assert_eq!(stolen.len(), 4);
    // Their places come back, but one address asks only a few times.
    pods.clear();
    sleep(Duration::from_millis(300)).await;
    let mut listened = 0;
    for _ in 0..12 {
        listened += usize::from(knock(&world, [127, 0, 3, 1]).await.is_some());
    }
    assert!((1..=8).contains(&listened), "{listened}");
}

#[tokio::test]
async fn a_node_that_is_gone_is_cut_off() {
    let world = world(DAY).await;
    let certificate = |uid: &str| {
        let key = KeyPair::generate().unwrap();
        let asked = request("node-1.node.tidegate", &key);
        let issued = world.authority.node("node-1", Some(uid), &asked, now(), &DAY).unwrap();
        credentials(issued.chain, &key, &world.authority.bundle())
    };
    let (tx, _rx) = tokio::sync::mpsc::channel(8);
    let task = tokio::spawn(world.client("node-1", certificate("uid of node-1")).state(tx));
    let Some(ToCore::StateUp { id: first, out: _out, .. }) = heard(&world.gateway.core, WAIT).await else { panic!() };
    // What happens to others ends nothing, ...
    world.nodes.tell(known(&ALL[..1]));
    assert!(heard(&world.gateway.core, Duration::from_millis(300)).await.is_none());
    // ... another machine of the name does, and the former one does not come back; nor does it get a certificate.
    world.nodes.tell(known(&[("node-1", "another", "127.0.0.1")]));
    let Some(ToCore::StateDown { id, .. }) = heard(&world.gateway.core, WAIT).await else { panic!() };
    assert_eq!(id, first);
    assert!(heard(&world.gateway.core, Duration::from_millis(600)).await.is_none());
    let key = KeyPair::generate().unwrap();
    let asked = request("node-1.node.tidegate", &key);
    assert_eq!(code(world.ask(None, "node-1", token("node-1's"), &asked).await), Code::PermissionDenied);
    *world.table.away.lock() = true;
    let former = certificate("uid of node-1");
    assert_eq!(code(world.ask(Some(&former), "node-1", token("node-1's"), &asked).await), Code::PermissionDenied);
    task.abort();
    let (tx, _rx) = tokio::sync::mpsc::channel(8);
    let task = tokio::spawn(world.client("node-1", certificate("another")).state(tx));
    let Some(ToCore::StateUp { .. }) = heard(&world.gateway.core, WAIT).await else { panic!() };
    task.abort();
}

#[tokio::test]
async fn one_certificate_has_few_connections() {
    let world = world(DAY).await;
    let [one, two] = ["node-1", "node-2"].map(|n| own(&world.authority, Role::Node, n, now(), &DAY));
    let ask = async |own: &Credentials| {
        let connection = connect(world.gateway.address, own, None, WAIT, |e| e).await.ok()?;
        let hello = StateAck::from(Up::Applied { boot_id: 1, sequence: 1, error: None });
        let said = ControlClient::new(connection.channel.clone()).state(tokio_stream::once(hello)).await;
        Some((connection, said.unwrap_err().code()))
    };
    let open = async |own: &Credentials| {
        // It is listened to, and told that this is no hello.
        ask(own).await.filter(|(_, code)| *code == Code::InvalidArgument).map(|(connection, _)| connection)
    };
    let mut held = Vec::new();
    for _ in 0..20 {
        held.extend(open(&one).await);
    }
    assert_eq!(held.len(), 8);
    assert!(open(&two).await.is_some(), "another node");
    held.clear();
    sleep(Duration::from_millis(300)).await;
    assert!(open(&one).await.is_some(), "its places came back");
    // A machine that is gone holds no place of the one that has its name now.
    let certificate = |uid: &str| {
        let key = KeyPair::generate().unwrap();
        let asked = request("node-1.node.tidegate", &key);
        let issued = world.authority.node("node-1", Some(uid), &asked, now(), &DAY).unwrap();
        credentials(issued.chain, &key, &world.authority.bundle())
    };
    let (former, new) = (certificate("uid of node-1"), certificate("another"));
    for _ in 0..8 {
        held.extend(open(&former).await);
    }
    assert_eq!(held.len(), 8);
    world.nodes.tell(known(&[("node-1", "another", "127.0.0.1")]));
    assert!(open(&new).await.is_some(), "the new one");
    held.clear();
    sleep(Duration::from_millis(300)).await;
    let answer = ask(&former).await.map(|(_, code)| code);
    assert!(
        ![Some(Code::InvalidArgument), Some(Code::PermissionDenied)].contains(&answer),
        "the former one is not talked to: {answer:?}"
    );
}

/// Whether a Facts stream ends.
async fn ended(world: &World) -> bool {
    loop {
        match heard(&world.gateway.core, WAIT).await {
            Some(ToCore::FactsDown { .. }) => return true,
            Some(_) => {}
            None => return false,
        }
    }
}

#[tokio::test]
async fn what_a_node_sees_is_heard_at_a_pace_and_not_too_large() {
    let world = world(DAY).await;
    let own = own(&world.authority, Role::Node, "node-1", now(), &DAY);
    let facts = async |said: Vec<FactsAck>| {
        let hello = FactsAck::from(Up::Hello { node: "node-1".into(), boot_id: 1 });
        let channel = connect(world.gateway.address, &own, None, WAIT, |e| e).await.unwrap().channel;
        let (open, more) = tokio::sync::mpsc::channel(1);
        let more = tokio_stream::wrappers::ReceiverStream::new(more);
        let said = tokio_stream::iter(std::iter::once(hello).chain(said)).chain(more);
        let stream = ControlClient::new(channel).facts(said).await.unwrap();
        let Some(ToCore::FactsUp { out, .. }) = heard(&world.gateway.core, WAIT).await else { panic!() };
        (open, stream, out)
    };
    let seen = |n: u128| {
        let claims = (0..n).map(|k| ScopeClaim { scope: tidegate_policy::ScopeKey(k), epoch: u64::MAX }).collect();
        FactsAck::from(Seen { gateways: vec!["gw-a".into()], claims, ..Seen::default() })
    };
    let held = facts(vec![seen(1); 500]).await;
    sleep(Duration::from_secs(1)).await;
    let mut n = 0;
    while let Ok(message) = world.gateway.core.try_recv() {
        assert!(matches!(message, ToCore::Seen { .. }));
        n += 1;
    }
    assert!((32..60).contains(&n), "{n} in a second");
    drop(held);
    assert!(ended(&world).await);
    // As many scopes as there are in a large cluster, and more than any has.
    let _held = facts(vec![seen(20_000)]).await;
    assert!(matches!(heard(&world.gateway.core, WAIT).await, Some(ToCore::Seen { .. })));
    let _large = facts(vec![seen(100_000)]).await;
    assert!(ended(&world).await);
}
