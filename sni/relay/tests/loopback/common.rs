//! A relay over loopback with servers, clients, a policy table and a list of events.

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use parking_lot::Mutex;
use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tidegate_policy::event::{Event, RuleRef, What, Who};
use tidegate_policy::{GroupKey, Reason, ScopeKey};
use tidegate_sni::{Destination, Relay, RelayConfig};
use tidegate_sni_core::{Check, Client, Egress, Judgement, Sni};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

/// Certificates of the test's names.
pub struct Tls {
    pub server: ServerConfig,
    pub client: ClientConfig,
}

pub static TLS: LazyLock<Tls> = LazyLock::new(|| {
    let made = rcgen::generate_simple_self_signed(["a.example".to_owned(), "b.example".to_owned()]).unwrap();
    let cert = CertificateDer::from(made.cert);
    let mut roots = RootCertStore::empty();
    roots.add(cert.clone()).unwrap();
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(ring::default_provider());
    let mut tls = Tls {
        server: ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert], key)
            .unwrap(),
        client: ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth(),
    };
    // Every hello for one name is then of one length.
    tls.client.resumption = rustls::client::Resumption::disabled();
    tls
});

/// A loopback address that no other test uses.
pub fn fresh_ip() -> Ipv4Addr {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let pid = std::process::id();
    Ipv4Addr::new(127, 64 + (pid >> 8 & 0x3f) as u8, pid as u8, n as u8)
}

/// A policy as a table.
#[derive(Default)]
pub struct Table {
    pub bound: Mutex<HashSet<(String, IpAddr)>>,
    pub others: Mutex<HashMap<String, Vec<IpAddr>>>,
    pub forbidden: Mutex<HashSet<SocketAddr>>,
    pub strangers: Mutex<HashSet<IpAddr>>,
    pub source: Mutex<Option<IpAddr>>,
    pub no_egress: Mutex<bool>,
}

pub fn rule() -> RuleRef {
    RuleRef { kind: "EgressPolicy", namespace: "ns".into(), policy: "p".into(), rule: "0".into() }
}

pub const SCOPE: ScopeKey = ScopeKey(7);

impl Check for Table {
    fn client(&self, ip: IpAddr) -> Option<Client> {
        let who = Who { namespace: "ns".into(), pod: "pod".into(), node: "node".into() };
        (!self.strangers.lock().contains(&ip)).then(|| Client {
            who: Arc::new(who),
            scope: SCOPE,
            group: GroupKey(8),
            group_index: 0,
        })
    }

    fn judge(&self, _: &Client, destination: SocketAddr, sni: &Sni, ech: bool) -> Judgement {
        let deny = |reason| Judgement::Deny { reason, rule: None };
        match sni {
            _ if ech => deny(Reason::Ech),
            Sni::Missing => deny(Reason::SniMissing),
            Sni::Ip => deny(Reason::SniIsIp),
            Sni::Name(name) if self.bound.lock().contains(&(name.to_string(), destination.ip())) => Judgement::Allow {
                name: Some(name.clone()),
                rule: Some(rule()),
                others: self.others.lock().get(name.as_str()).cloned().unwrap_or_default(),
            },
            Sni::Name(_) => deny(Reason::SniMismatch),
        }
    }

    fn egress(&self, _: &Client, v6: bool) -> Result<Egress, Reason> {
        if *self.no_egress.lock() {
            return Err(Reason::NoEgressFamily);
        }
        Ok(Egress { source: self.source.lock().filter(|s| s.is_ipv6() == v6), mark: 0 })
    }

    fn forbidden(&self, destination: SocketAddr) -> bool {
        self.forbidden.lock().contains(&destination)
    }
}

/// A relay with what surrounds it.
pub struct Lab {
    pub relay: Relay,
    pub table: Arc<Table>,
    events: Arc<Mutex<Vec<Event>>>,
    asked: Arc<Mutex<SocketAddr>>,
}

pub fn config() -> RelayConfig {
    RelayConfig {
        listen: vec![SocketAddr::from(([127, 0, 0, 1], 0))],
        threads: 2,
        transparent: false,
        hello_timeout: Duration::from_secs(5),
        connect_timeout: Duration::from_secs(5),
        ..RelayConfig::default()
    }
}

impl Lab {
    /// Waits until `live` connections are left: a connection's event comes a moment before its place is free.
    pub async fn left(&self, live: usize) {
        let wait = async {
            while self.relay.registry().len() != live {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), wait).await.expect("connections stay in the registry");
    }

    pub fn new() -> Self {
        Self::with(config())
    }

    pub fn with(config: RelayConfig) -> Self {
        let table = Arc::new(Table::default());
        let events = Arc::new(Mutex::new(Vec::new()));
        let asked = Arc::new(Mutex::new(SocketAddr::from(([127, 0, 0, 1], 1))));
        let map = asked.clone();
        let destination = match config.transparent {
            true => Destination::Local,
            false => Destination::Mapped(Arc::new(move |_, _| *map.lock())),
        };
        let config = RelayConfig { destination, ..config };
        let sink = events.clone();
        let relay = Relay::start(config, table.clone(), Arc::new(move |e: Event| sink.lock().push(e))).unwrap();
        Self { relay, table, events, asked }
    }

    /// What the next connections ask for.
    pub fn ask(&self, destination: SocketAddr) {
        *self.asked.lock() = destination;
    }

    /// Binds a name to an address.
    pub fn bind(&self, name: &str, ip: IpAddr) {
        self.table.bound.lock().insert((name.to_owned(), ip));
    }

    /// A connection to the relay, nothing said.
    pub async fn tcp(&self) -> TcpStream {
        TcpStream::connect(self.relay.addresses()[0]).await.unwrap()
    }

    /// A TLS connection through the relay.
    pub async fn tls(&self, name: &'static str) -> std::io::Result<client::TlsStream<TcpStream>> {
        self.tls_with(name, TLS.client.clone()).await
    }

    pub async fn tls_with(
        &self,
        name: &'static str,
        config: ClientConfig,
    ) -> std::io::Result<client::TlsStream<TcpStream>> {
        let tcp = self.tcp().await;
        TlsConnector::from(Arc::new(config)).connect(ServerName::try_from(name).unwrap(), tcp).await
    }

    /// Waits for an event.
    pub async fn event(&self, pred: impl Fn(&Event) -> bool) -> Event {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(event) = self.events.lock().iter().find(|e| pred(e)) {
                return event.clone();
            }
            assert!(Instant::now() < deadline, "no such event in {:#?}", self.events.lock());
            sleep(Duration::from_millis(5)).await;
        }
    }

    pub async fn open(&self) -> Event {
        self.event(|e| matches!(e.what, What::Open { .. })).await
    }

    pub async fn close(&self) -> Event {
        self.event(|e| matches!(e.what, What::Close { .. })).await
    }

    pub fn count(&self, pred: impl Fn(&Event) -> bool) -> usize {
        self.events.lock().iter().filter(|e| pred(e)).count()
    }
}

/// A server with a handler of its own for every raw connection, on an address of its own.
pub async fn tcp_server<F, Fut>(ip: IpAddr, port: u16, handler: F) -> SocketAddr
where
    F: Fn(TcpStream) -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind((ip, port)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(handler(stream));
        }
    });
    address
}

/// A TLS server with a handler for every connection.
pub async fn tls_server<F, Fut>(ip: IpAddr, port: u16, config: ServerConfig, handler: F) -> SocketAddr
where
    F: Fn(server::TlsStream<TcpStream>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let handler = Arc::new(handler);
    tcp_server(ip, port, move |stream| {
        let (acceptor, handler) = (acceptor.clone(), handler.clone());
        async move {
            if let Ok(stream) = acceptor.accept(stream).await {
                handler(stream).await;
            }
        }
    })
    .await
}

/// A TLS server that sends back what it gets, bound to `a.example` at a fresh address that is then asked for.
pub async fn echo(lab: &Lab) -> SocketAddr {
    let ip = fresh_ip().into();
    let address = tls_server(ip, 0, TLS.server.clone(), |stream| async move {
        let (mut read, mut write) = tokio::io::split(stream);
        let _ = tokio::io::copy(&mut read, &mut write).await;
        let _ = tokio::io::AsyncWriteExt::shutdown(&mut write).await;
    })
    .await;
    lab.bind("a.example", ip);
    lab.ask(address);
    address
}

/// Nothing in these tests should take this long.
pub async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(60), future).await.expect("it took too long")
}

/// Whether an error is the peer's reset.
pub fn is_reset(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::ConnectionReset
}

/// The hello that a real client sends for a name.
pub fn hello(name: &'static str) -> Vec<u8> {
    let name = ServerName::try_from(name).unwrap();
    let mut connection = rustls::ClientConnection::new(Arc::new(TLS.client.clone()), name).unwrap();
    let mut out = Vec::new();
    connection.write_tls(&mut out).unwrap();
    out
}
