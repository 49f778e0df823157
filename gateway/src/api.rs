//! The admin API for others than those on loopback: TLS with this gateway's certificate, and bearer tokens that the API
//! server knows.
//!
//! | path | who |
//! |---|---|
//! | `/status?namespace=N`, `/records?namespace=N` | who may `get` `namespaceegresses.tidegate.dev` in N |
//! | `/status` | who may in every namespace |
//! | `/metrics`, `/config` | who may `get` that nonResourceURL |
//!
//! Without a token that is known: 401. Without the right: 403. While the API server does not say: 503. What it said
//! holds for ten seconds.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use parking_lot::Mutex;
use serde_json::Value;
use tidegate_identity::Source;
use tidegate_kubernetes::{Access, User};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use crate::accept;
use crate::admin::{self, Server, json};
use crate::audit::Recent;
use crate::identity::{Reviews, Unknown};
use crate::places::{Place, Places};
use crate::timed::Timed;

/// The most connections at a time, the most from one address, and how long each lives.
const MAX_CONNECTIONS: usize = 64;
const MAX_PER_SOURCE: usize = 8;
const LIFE: Duration = Duration::from_secs(20);
/// How long an answer of the API server holds.
const HOLDS: Duration = Duration::from_secs(10);
/// The most answers that are kept.
const MAX_ANSWERS: usize = 1024;
/// The most questions to the API server at a time.
const QUESTIONS: usize = 16;
/// The most octets of a token.
const MAX_TOKEN: usize = 16 * 1024;

/// Says the status, of one namespace or of all. Must not block for long.
pub type Status = dyn Fn(Option<&str>) -> Value + Send + Sync;
/// The answer to who may not, or asks for what there is not.
type Refusal = Box<Response>;

/// What it serves.
pub struct Api {
    /// This gateway's certificate.
    pub identity: Source,
    /// Who somebody is and what he may.
    pub reviews: Arc<dyn Reviews>,
    /// Metrics.
    pub metrics: PrometheusHandle,
    /// The effective configuration.
    pub config: Value,
    /// The status.
    pub status: Arc<Status>,
    /// Audit records.
    pub recent: Recent,
}

/// Binds the port and serves it on a thread of its own.
///
/// # Errors
/// When the address cannot be bound or the thread cannot be started.
pub fn serve(address: SocketAddr, api: Api) -> Result<Server> {
    let listener = TcpListener::bind(address)
        .with_context(|| format!("cannot listen on {address} for the admin API: choose another address for `api`"))?;
    listener.set_nonblocking(true).context("the admin API's port cannot be set to non-blocking")?;
    run(listener, api)
}

fn run(listener: TcpListener, api: Api) -> Result<Server> {
    admin::thread("api", async move {
        let listener = match tokio::net::TcpListener::from_std(listener) {
            Ok(listener) => listener,
            Err(error) => return tracing::error!(%error, "the admin API cannot be served"),
        };
        let identity = api.identity.clone();
        let own = move || identity.now().ok()?.plain_server().ok().map(Arc::new);
        let bounded = Bounded {
            incoming: accept::plain(listener, own, MAX_CONNECTIONS),
            permits: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            places: Places::new(MAX_PER_SOURCE),
        };
        if let Err(error) = axum::serve(bounded, router(api)).await {
            tracing::error!(%error, "the admin API has ended");
        }
    })
}

struct Shared {
    api: Api,
    answers: Answers,
    questions: Semaphore,
}

fn router(api: Api) -> Router {
    let shared = Shared { api, answers: Answers::default(), questions: Semaphore::new(QUESTIONS) };
    Router::new()
        .route("/status", get(status))
        .route("/records", get(records))
        .route("/metrics", get(metrics))
        .route("/config", get(config))
        .with_state(Arc::new(shared))
}

type Asked = State<Arc<Shared>>;

async fn status(State(shared): Asked, request: Request) -> Response {
    let namespace = match namespace(request.uri().query()) {
        Ok(namespace) => namespace,
        Err(refused) => return *refused,
    };
    let access = namespace.clone().map_or(Access::Everything, Access::Namespace);
    match shared.may(request.headers(), access).await {
        Ok(()) => json(&(shared.api.status)(namespace.as_deref())),
        Err(refused) => *refused,
    }
}

async fn records(State(shared): Asked, request: Request) -> Response {
    let namespace = match namespace(request.uri().query()) {
        Ok(Some(namespace)) => namespace,
        Ok(None) => return (StatusCode::BAD_REQUEST, "say which: /records?namespace=NAME\n").into_response(),
        Err(refused) => return *refused,
    };
    match shared.may(request.headers(), Access::Namespace(namespace.clone())).await {
        Ok(()) => ([(header::CONTENT_TYPE, "application/x-ndjson")], shared.api.recent.of(&namespace)).into_response(),
        Err(refused) => *refused,
    }
}

async fn metrics(State(shared): Asked, request: Request) -> Response {
    match shared.may(request.headers(), Access::Path("/metrics".into())).await {
        Ok(()) => admin::metrics_page(&shared.api.metrics),
        Err(refused) => *refused,
    }
}

async fn config(State(shared): Asked, request: Request) -> Response {
    match shared.may(request.headers(), Access::Path("/config".into())).await {
        Ok(()) => json(&shared.api.config),
        Err(refused) => *refused,
    }
}

/// The one parameter that there is.
fn namespace(query: Option<&str>) -> Result<Option<String>, Refusal> {
    let Some(query) = query.filter(|q| !q.is_empty()) else { return Ok(None) };
    let label = |s: &&str| tidegate_identity::is_name(s) && s.len() <= 63 && !s.contains('.');
    query
        .strip_prefix("namespace=")
        .filter(label)
        .map(|n| Some(n.to_owned()))
        .ok_or_else(|| Box::new((StatusCode::BAD_REQUEST, "the only parameter is namespace=NAME\n").into_response()))
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty() && token.len() <= MAX_TOKEN).then_some(token)
}

fn who_are_you() -> Refusal {
    let text = "a bearer token of this cluster is needed: kubectl create token NAME\n";
    Box::new((StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, "Bearer")], text).into_response())
}

impl Shared {
    /// Whether whoever shows these headers may; else the answer that he gets.
    async fn may(&self, headers: &HeaderMap, access: Access) -> Result<(), Refusal> {
        let token = bearer(headers).ok_or_else(who_are_you)?;
        let unknown = |why: Unknown| {
            tracing::debug!(%why, "the admin API cannot say who asks");
            Box::new((StatusCode::SERVICE_UNAVAILABLE, "the API server does not say who you are\n").into_response())
        };
        let key = self.answers.key(token);
        let now = Instant::now;
        let busy = |_| Box::new((StatusCode::SERVICE_UNAVAILABLE, "too many ask\n").into_response());
        let user = match self.answers.users.get(&key, now()) {
            Some(user) => user,
            None => {
                let _permit = self.questions.try_acquire().map_err(busy)?;
                let user = self.api.reviews.token(token.to_owned(), Vec::new()).await.map_err(unknown)?;
                self.answers.users.put(key, user.clone(), now());
                user
            }
        }
        .ok_or_else(who_are_you)?;
        let asked = (key, access.clone());
        let allowed = match self.answers.rights.get(&asked, now()) {
            Some(allowed) => allowed,
            None => {
                let _permit = self.questions.try_acquire().map_err(busy)?;
                let allowed = self.api.reviews.access(user.clone(), access.clone()).await.map_err(unknown)?;
                self.answers.rights.put(asked, allowed, now());
                allowed
            }
        };
        if allowed {
            return Ok(());
        }
        let what = match access {
            Access::Namespace(n) => format!("get namespaceegresses.tidegate.dev in namespace {n}"),
            Access::Everything => "get namespaceegresses.tidegate.dev in all namespaces: ask for ?namespace=".into(),
            Access::Path(path) => format!("get {path}"),
        };
        Err(Box::new((StatusCode::FORBIDDEN, format!("{} may not {what}\n", user.name)).into_response()))
    }
}

/// Stands for a token, which is not kept. Of 128 bits, keyed: nobody finds two that are the same.
type TokenKey = (u64, u64);

/// What the API server said.
#[derive(Default)]
struct Answers {
    keys: (RandomState, RandomState),
    users: Cache<TokenKey, Option<User>>,
    rights: Cache<(TokenKey, Access), bool>,
}

impl Answers {
    fn key(&self, token: &str) -> TokenKey {
        (self.keys.0.hash_one(token), self.keys.1.hash_one(token))
    }
}

struct Cache<K, V>(Mutex<HashMap<K, (Instant, V)>>);

impl<K, V> Default for Cache<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + std::hash::Hash, V: Clone> Cache<K, V> {
    fn get(&self, key: &K, now: Instant) -> Option<V> {
        self.0.lock().get(key).filter(|(at, _)| now.duration_since(*at) < HOLDS).map(|(_, v)| v.clone())
    }

    fn put(&self, key: K, value: V, now: Instant) {
        let mut all = self.0.lock();
        if all.len() >= MAX_ANSWERS {
            all.retain(|_, (at, _)| now.duration_since(*at) < HOLDS);
        }
        if all.len() < MAX_ANSWERS {
            all.insert(key, (now, value));
        }
    }
}

/// A listener with few connections, each with an end; no source may take them all.
struct Bounded {
    incoming: ReceiverStream<io::Result<accept::Control>>,
    permits: Arc<Semaphore>,
    places: Places,
}

impl axum::serve::Listener for Bounded {
    type Io = Timed<accept::Control, (OwnedSemaphorePermit, Place)>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        loop {
            let Some(next) = self.incoming.next().await else { std::future::pending().await };
            let Ok(stream) = next else { continue };
            let peer = stream.held().peer.address;
            // Beyond the limits a connection is closed at once: waiting would hold up everybody behind it.
            let Some(place) = self.places.take(peer.ip()) else { continue };
            let Ok(permit) = self.permits.clone().try_acquire_owned() else { continue };
            return (Timed::new(stream, LIFE, (permit, place)), peer);
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        // Nobody asks.
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(test)]
#[path = "api_tests.rs"]
mod tests;
