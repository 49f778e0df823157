//! Who may read what, over real TLS; the answers of an API server are a table here.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream as Plain;

use parking_lot::Mutex as Lock;
use rcgen::{CertificateParams, KeyPair};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use tidegate_identity::Credentials;
use tokio::sync::watch;

use super::*;

const NAME: &str = "tidegate-gateway.tidegate-system.svc";

#[derive(Default)]
struct Table {
    rights: Lock<BTreeMap<&'static str, Vec<Access>>>,
    /// How often it was asked about tokens, and about rights.
    asked: Lock<(usize, usize)>,
    away: Lock<bool>,
}

#[tonic::async_trait]
impl Reviews for Table {
    async fn token(&self, token: String, audiences: Vec<String>) -> Result<Option<User>, Unknown> {
        self.asked.lock().0 += 1;
        assert!(audiences.is_empty(), "tokens of the cluster itself");
        if *self.away.lock() {
            return Err(Unknown::Away("a test".into()));
        }
        let known = self.rights.lock().contains_key(&*token);
        Ok(known.then(|| User { name: token, ..User::default() }))
    }

    async fn access(&self, user: User, access: Access) -> Result<bool, Unknown> {
        self.asked.lock().1 += 1;
        Ok(self.rights.lock().get(&*user.name).is_some_and(|r| r.contains(&access)))
    }
}

struct Test {
    address: SocketAddr,
    authority: CertificateDer<'static>,
    table: Arc<Table>,
    recent: Recent,
    _server: Server,
    _issued: watch::Sender<Option<Arc<Credentials>>>,
}

fn start() -> Test {
    let key = KeyPair::generate().unwrap();
    let own = CertificateParams::new(vec![NAME.to_owned()]).unwrap().self_signed(&key).unwrap();
    let authority = own.der().clone();
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let own = Credentials::new(vec![authority.clone()], key, vec![authority.clone()]).unwrap();
    let (issued, source) = watch::channel(Some(Arc::new(own)));
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    ::metrics::with_local_recorder(&recorder, || ::metrics::counter!("tidegate_test_total").increment(7));
    let rights = BTreeMap::from([
        ("alice", vec![Access::Namespace("shop".into())]),
        ("admin", vec![Access::Everything, Access::Path("/config".into())]),
        ("prometheus", vec![Access::Path("/metrics".into())]),
    ]);
    let table = Arc::new(Table { rights: Lock::new(rights), ..Table::default() });
    let recent = Recent::new(|_| Some("1".into()));
    let api = Api {
        identity: Source::Issued(source),
        reviews: table.clone(),
        metrics: recorder.handle(),
        config: serde_json::json!({"name": "gw-a"}),
        status: Arc::new(|n| serde_json::json!({"of": n})),
        recent: recent.clone(),
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    Test { address, authority, table, recent, _server: run(listener, api).unwrap(), _issued: issued }
}

impl Test {
    fn plain(&self) -> Plain {
        let stream = Plain::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    fn tls(&self) -> rustls::StreamOwned<rustls::ClientConnection, Plain> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.authority.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from(NAME).unwrap();
        let client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
        rustls::StreamOwned::new(client, self.plain())
    }

    fn get(&self, path: &str, authorization: Option<&str>) -> (u16, String) {
        let mut stream = self.tls();
        let header = authorization.map(|a| format!("Authorization: {a}\r\n")).unwrap_or_default();
        write!(stream, "GET {path} HTTP/1.0\r\n{header}\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    fn status(&self, path: &str, who: &str) -> u16 {
        self.get(path, Some(&format!("Bearer {who}"))).0
    }
}

#[test]
fn a_tenant_sees_his_own_namespace() {
    let test = start();
    test.recent.keep(&"shop".into(), b"{\"namespace\":\"shop\"}\n");
    test.recent.keep(&"bank".into(), b"{\"namespace\":\"bank\"}\n");
    let alice = Some("Bearer alice");
    assert_eq!(test.get("/records?namespace=shop", alice), (200, "{\"namespace\":\"shop\"}\n".into()));
    assert_eq!(test.get("/status?namespace=shop", alice), (200, "{\n  \"of\": \"shop\"\n}\n".into()));
    for path in ["/records?namespace=bank", "/status?namespace=bank", "/status", "/metrics", "/config"] {
        let (code, text) = test.get(path, alice);
        assert_eq!(code, 403, "{path}");
        assert!(!text.contains("\"of\"") && !text.contains('{'), "{text}");
    }
    // Nobody, and who only says that he is somebody.
    for who in [None, Some("Bearer mallory"), Some("Basic alice"), Some("Bearer "), Some("alice")] {
        for path in ["/records?namespace=shop", "/status", "/metrics", "/config"] {
            assert_eq!(test.get(path, who).0, 401, "{who:?} {path}");
        }
    }
    let huge = "x".repeat(MAX_TOKEN + 1);
    assert_eq!(test.status("/status", &huge), 401);
    // What is asked is said in one way only.
    for path in ["/records", "/records?namespace=", "/records?namespace=shop&namespace=bank", "/status?ns=shop"] {
        assert_eq!(test.status(path, "alice"), 400, "{path}");
    }
    assert_eq!(test.status("/status", "admin"), 200);
    assert_eq!(test.get("/config", Some("bearer admin")), (200, "{\n  \"name\": \"gw-a\"\n}\n".into()));
    assert_eq!(test.status("/metrics", "admin"), 403);
    assert!(test.get("/metrics", Some("Bearer prometheus")).1.contains("tidegate_test_total 7"));
}

#[test]
fn answers_hold_for_a_while_and_no_answer_is_no() {
    let test = start();
    for _ in 0..5 {
        assert_eq!(test.status("/status?namespace=shop", "alice"), 200);
        assert_eq!(test.status("/status?namespace=bank", "alice"), 403);
    }
    assert_eq!(*test.table.asked.lock(), (1, 2));
    *test.table.away.lock() = true;
    assert_eq!(test.status("/status?namespace=shop", "alice"), 200, "what was said holds");
    assert_eq!(test.status("/status", "admin"), 503);
    *test.table.away.lock() = false;
    assert_eq!(test.status("/status", "admin"), 200);
}

#[test]
fn the_cache_forgets_in_time_and_has_an_end() {
    let cache = Cache::<u32, bool>::default();
    let start = Instant::now();
    cache.put(1, true, start);
    assert_eq!(cache.get(&1, start + HOLDS - Duration::from_millis(1)), Some(true));
    assert_eq!(cache.get(&1, start + HOLDS), None);
    for i in 0..2 * MAX_ANSWERS as u32 {
        cache.put(i, true, start);
    }
    assert_eq!(cache.0.lock().len(), MAX_ANSWERS);
    cache.put(u32::MAX, false, start + HOLDS);
    assert_eq!(cache.0.lock().len(), 1);
}

#[test]
fn strangers_cannot_take_every_place() {
    let test = start();
    let _held: Vec<Plain> = (0..MAX_CONNECTIONS).map(|_| Plain::connect(test.address).unwrap()).collect();
    // Handshakes that never come have a limit of their own for each address, and end.
    std::thread::sleep(Duration::from_millis(5500));
    assert_eq!(test.status("/status?namespace=shop", "alice"), 200);
}

/// The port of this API is the one that the lab's test of hostile bytes does not have: it is there with an API server only.
#[test]
fn random_bytes_get_nothing_and_hurt_nobody() {
    let test = start();
    let mut throws = tidegate_random::hostile();
    throws.push(b"GET /status HTTP/1.1\r\nAuthorization: Bearer admin\r\n\r\n".to_vec());
    // A peer that has had enough may close while we still write, or reset.
    let mut all = Vec::new();
    for bytes in &throws {
        let mut stream = test.plain();
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut all);
        assert!(!all.windows(4).any(|w| w == b"HTTP"), "without TLS: {:?}", &bytes[..bytes.len().min(40)]);
    }
    for bytes in throws.iter().filter(|b| !b.windows(6).any(|w| w == b"Bearer")) {
        let (mut stream, mut answer) = (test.tls(), Vec::new());
        let _ = stream.write_all(bytes);
        stream.conn.send_close_notify();
        let _ = stream.flush();
        let _ = stream.sock.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut answer);
        let text = String::from_utf8_lossy(&answer);
        assert!(!text.starts_with("HTTP/1.1 2"), "{:?}: {text}", &bytes[..bytes.len().min(40)]);
    }
    assert_eq!(*test.table.asked.lock(), (0, 0), "nobody is asked for any of it");
    assert_eq!(test.status("/status?namespace=shop", "alice"), 200);
}
