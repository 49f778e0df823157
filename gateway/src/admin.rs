//! The admin port: `/metrics`, `/healthz`, `/readyz`, `/config` and `/status` over HTTP, read only.
//!
//! It runs on a thread and a runtime of its own, so that a stalled data path can still be looked at
//! and a scrape never delays a packet. It may be reachable from pods: connections are few, short
//! and bounded, and nothing secret is served.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use axum::Router;
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, Request};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::serve::IncomingStream;
use metrics_exporter_prometheus::PrometheusHandle;
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::places::{Place, Places};
use crate::timed::Timed;

/// The most connections at a time.
const MAX_CONNECTIONS: usize = 64;
/// The longest life of a connection, whatever it does.
const MAX_LIFE: Duration = Duration::from_secs(10);
/// Time between two tries to bind the port.
const AGAIN: Duration = Duration::from_millis(50);
/// The most of them from one address.
const MAX_PER_SOURCE: usize = 8;

/// What has to be ready before the process is. Cheap to clone.
///
/// Each part takes a guard at start and drops it once it can serve; a part that
/// becomes unable to serve takes one again.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Mutex<BTreeMap<String, usize>>>);

/// Holds readiness back until it is dropped.
#[derive(Debug)]
#[must_use = "dropping it says that the part is ready"]
pub struct Guard {
    readiness: Readiness,
    name: String,
}

impl Readiness {
    /// Holds readiness back in the name of a part, which `/readyz` then lists.
    pub fn guard(&self, name: &str) -> Guard {
        *self.0.lock().entry(name.to_owned()).or_default() += 1;
        Guard { readiness: self.clone(), name: name.to_owned() }
    }

    /// The parts that are not ready, sorted; empty when all are.
    pub fn waiting_for(&self) -> Vec<String> {
        self.0.lock().keys().cloned().collect()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut waiting = self.readiness.0.lock();
        if let Some(n) = waiting.get_mut(&self.name) {
            *n -= 1;
            if *n == 0 {
                waiting.remove(&self.name);
            }
        }
    }
}

/// What the port serves.
pub struct Admin {
    /// Metrics.
    pub metrics: PrometheusHandle,
    /// Readiness.
    pub readiness: Readiness,
    /// The effective configuration: paths of keys, never keys.
    pub config: Value,
    /// Says the status. Must not block for long.
    pub status: Arc<dyn Fn() -> Value + Send + Sync>,
}

/// A running admin port; dropping it closes the port.
#[derive(Debug)]
pub struct Server {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(t) = self.thread.take() {
            // The thread ends at once and has no result.
            let _ = t.join();
        }
    }
}

/// Binds the port, for which it waits so long at most, and serves it on a thread of its own, in the network namespace of the
/// calling thread.
///
/// # Errors
/// When the address cannot be bound or the thread cannot be started; the text says what to do.
pub fn serve(address: SocketAddr, admin: Admin, patience: Duration) -> Result<Server> {
    let listener = bind(address, patience)?;
    // Port 0 lets the kernel choose.
    let address = listener.local_addr().context("the admin port has no address")?;
    let server = run(listener, admin, MAX_LIFE)?;
    tracing::info!(%address, "the admin port is open");
    Ok(server)
}

fn bind(address: SocketAddr, patience: Duration) -> Result<TcpListener> {
    let begun = Instant::now();
    let bound = loop {
        match TcpListener::bind(address) {
            Err(e) if e.kind() == ErrorKind::AddrInUse && begun.elapsed() < patience => std::thread::sleep(AGAIN),
            bound => break bound,
        }
    };
    let listener = bound.with_context(|| {
        format!("cannot listen on {address} for the admin port: choose another address for `admin`, or end the process that holds it")
    })?;
    listener.set_nonblocking(true).context("the admin port cannot be set to non-blocking")?;
    Ok(listener)
}

fn run(listener: TcpListener, admin: Admin, life: Duration) -> Result<Server> {
    thread("admin", async move {
        let listener = match tokio::net::TcpListener::from_std(listener) {
            Ok(l) => Bounded {
                listener: l,
                permits: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
                places: Places::new(MAX_PER_SOURCE),
                life,
            },
            Err(e) => return tracing::error!("the admin port cannot be served: {e}"),
        };
        if let Err(e) = axum::serve(listener, router(admin).into_make_service_with_connect_info::<Peer>()).await {
            tracing::error!("the admin port has ended: {e}");
        }
    })
}

/// Runs a server on a thread and a runtime of its own until it is dropped. Open connections end then, at most one answer
/// is cut.
///
/// # Errors
/// When there is no thread or no runtime.
pub fn thread(name: &str, serve: impl Future<Output = ()> + Send + 'static) -> Result<Server> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .with_context(|| format!("the runtime of the {name} port cannot be started"))?;
    let (stop, stopped) = oneshot::channel::<()>();
    let body = move || {
        runtime.block_on(async move {
            tokio::select! {
                () = serve => {}
                _ = stopped => {}
            }
        });
    };
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(body);
    let thread = thread.with_context(|| format!("the thread of the {name} port cannot be started"))?;
    Ok(Server { stop: Some(stop), thread: Some(thread) })
}

/// Metrics in Prometheus' text format.
pub fn metrics_page(metrics: &PrometheusHandle) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], metrics.render()).into_response()
}

/// A JSON document.
pub fn json(value: &Value) -> Response {
    // A Value always serialises.
    let text = serde_json::to_string_pretty(value).unwrap_or_default();
    ([(header::CONTENT_TYPE, "application/json")], text + "\n").into_response()
}

fn router(admin: Admin) -> Router {
    let Admin { metrics, readiness, config, status } = admin;
    let metrics_page = move || async move { metrics_page(&metrics) };
    let ready_page = move || async move {
        match readiness.waiting_for() {
            w if w.is_empty() => (StatusCode::OK, "ready\n".to_owned()),
            w => (StatusCode::SERVICE_UNAVAILABLE, format!("waiting for: {}\n", w.join(", "))),
        }
    };
    let local = Router::new()
        .route("/config", get(move || async move { json(&config) }))
        .route("/status", get(move || async move { json(&status()) }))
        .route_layer(axum::middleware::from_fn(only_local));
    Router::new()
        .route("/metrics", get(metrics_page))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready_page))
        .merge(local)
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
struct Peer(SocketAddr);

impl Connected<IncomingStream<'_, Bounded>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Bounded>) -> Self {
        Self(*stream.remote_addr())
    }
}

/// Configuration and status name every namespace: only who is in this network namespace may read them.
async fn only_local(ConnectInfo(Peer(peer)): ConnectInfo<Peer>, request: Request, next: Next) -> Response {
    if peer.ip().to_canonical().is_loopback() {
        return next.run(request).await;
    }
    (StatusCode::FORBIDDEN, "ask on loopback: tidegate status\n").into_response()
}

/// A connection with its places.
type Connection = Timed<tokio::net::TcpStream, (OwnedSemaphorePermit, Place)>;

/// A listener with few connections, each with an end; no source may take them all.
struct Bounded {
    listener: tokio::net::TcpListener,
    permits: Arc<Semaphore>,
    places: Places,
    life: Duration,
}

impl axum::serve::Listener for Bounded {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        loop {
            let (stream, peer) = axum::serve::Listener::accept(&mut self.listener).await;
            // Beyond the limits a connection is closed at once: waiting would hold up everybody behind it.
            let Some(place) = self.places.take(peer.ip()) else { continue };
            let Ok(permit) = self.permits.clone().try_acquire_owned() else { continue };
            return (Timed::new(stream, self.life, (permit, place)), peer);
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpStream;

    struct Test {
        address: SocketAddr,
        _server: Server,
    }

    fn start() -> (Test, Readiness) {
        start_with(MAX_LIFE)
    }

    fn start_with(life: Duration) -> (Test, Readiness) {
        start_at("127.0.0.1:0", life)
    }

    fn start_at(at: &str, life: Duration) -> (Test, Readiness) {
        let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
        metrics::with_local_recorder(&recorder, || metrics::counter!("tidegate_test_total").increment(7));
        let readiness = Readiness::default();
        let admin = Admin {
            metrics: recorder.handle(),
            readiness: readiness.clone(),
            config: serde_json::json!({"name": "gw-a"}),
            status: Arc::new(|| serde_json::json!({"agents": 2})),
        };
        let listener = bind(at.parse().unwrap(), Duration::ZERO).unwrap();
        let address = listener.local_addr().unwrap();
        (Test { address, _server: run(listener, admin, life).unwrap() }, readiness)
    }

    fn ask(server: &Test, request: &str) -> (u16, String) {
        let mut s = TcpStream::connect(server.address).unwrap();
        s.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        write!(s, "{request} HTTP/1.0\r\n\r\n").unwrap();
        let mut text = String::new();
        s.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    #[test]
    fn pages() {
        let (server, _) = start();
        assert_eq!(ask(&server, "GET /healthz"), (200, "ok\n".into()));
        assert!(ask(&server, "GET /metrics").1.contains("tidegate_test_total 7"));
        assert_eq!(ask(&server, "GET /config"), (200, "{\n  \"name\": \"gw-a\"\n}\n".into()));
        assert_eq!(ask(&server, "GET /status"), (200, "{\n  \"agents\": 2\n}\n".into()));
        assert_eq!(ask(&server, "GET /other").0, 404);
        assert_eq!(ask(&server, "POST /config").0, 405);
    }

    #[test]
    fn ready_when_every_guard_is_gone() {
        let (server, readiness) = start();
        assert_eq!(ask(&server, "GET /readyz"), (200, "ready\n".into()));
        let dns = readiness.guard("dns");
        let (a, b) = (readiness.guard("agents"), readiness.guard("agents"));
        assert_eq!(ask(&server, "GET /readyz"), (503, "waiting for: agents, dns\n".into()));
        drop((dns, a));
        assert_eq!(ask(&server, "GET /readyz"), (503, "waiting for: agents\n".into()));
        drop(b);
        assert_eq!(ask(&server, "GET /readyz").0, 200);
    }

    #[test]
    fn the_port_of_one_that_ends_is_waited_for() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let ends = std::thread::spawn(move || {
            std::thread::sleep(4 * AGAIN);
            drop(taken);
        });
        assert!(bind(address, Duration::ZERO).is_err());
        assert_eq!(bind(address, MAX_LIFE).unwrap().local_addr().unwrap(), address);
        ends.join().unwrap();
    }

    #[test]
    fn an_address_in_use_says_what_to_do() {
        let (server, _) = start();
        let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
        let admin = Admin {
            metrics: recorder.handle(),
            readiness: Readiness::default(),
            config: Value::Null,
            status: Arc::new(|| Value::Null),
        };
        let text = format!("{:#}", serve(server.address, admin, Duration::ZERO).unwrap_err());
        assert!(text.contains("choose another address for `admin`") && text.contains("in use"), "{text}");
    }

    #[test]
    fn one_source_cannot_take_every_place() {
        let server = start_at("[::]:0", MAX_LIFE).0;
        let port = server.address.port();
        let mut held: Vec<TcpStream> =
            (0..MAX_CONNECTIONS).map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap()).collect();
        for s in &mut held {
            // Those beyond the limit are closed already.
            let _ = s.write_all(b"GET /met");
        }
        let mut other = TcpStream::connect(("::1", port)).unwrap();
        write!(other, "GET /healthz HTTP/1.0\r\n\r\n").unwrap();
        let mut text = String::new();
        other.read_to_string(&mut text).unwrap();
        assert!(text.contains("200 OK"), "{text}");
    }

    #[test]
    fn clients_that_hold_their_places_are_cut() {
        let (server, _) = start_with(Duration::from_millis(200));
        let mut held: Vec<TcpStream> =
            (0..MAX_PER_SOURCE).map(|_| TcpStream::connect(server.address).unwrap()).collect();
        for s in &mut held {
            s.write_all(b"GET /met").unwrap();
        }
        std::thread::sleep(Duration::from_millis(400));
        assert_eq!(ask(&server, "GET /healthz").0, 200);
    }

    #[test]
    fn status_and_configuration_stay_inside() {
        std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let up = "ip link set lo up && ip addr add 192.0.2.1/32 dev lo";
            assert!(std::process::Command::new("sh").args(["-c", up]).status().unwrap().success());
            let mut server = start_at("0.0.0.0:0", MAX_LIFE).0;
            server.address.set_ip([192, 0, 2, 1].into());
            assert_eq!(ask(&server, "GET /status").0, 403);
            assert_eq!(ask(&server, "GET /config").0, 403);
            assert_eq!(ask(&server, "GET /healthz").0, 200);
            server.address.set_ip([127, 0, 0, 1].into());
            assert_eq!(ask(&server, "GET /status").0, 200);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn dropping_closes_the_port_even_with_idle_clients() {
        let (server, _) = start();
        let address = server.address;
        let _idle = TcpStream::connect(address).unwrap();
        drop(server);
        assert!(TcpStream::connect(address).is_err());
    }
}
