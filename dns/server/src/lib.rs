//! The DNS service: sockets, upstream resolution, events and metrics around
//! [`tidegate_dns_core`].
//!
//! ```text
//! UDP threads (recvmmsg) ─┐                ┌─ reply at once (hit, denial, quota)
//! TCP connections ────────┴─ engine::first ┤
//!                                          └─ Miss ─ task: engine::resolve ─ upstream ─ Binder ─ reply
//! ```

pub mod config;

mod clock;
mod engine;
mod mmsg;
mod quota;
mod record;
mod socket;
mod tcp;
mod udp;
mod upstream;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use arc_swap::ArcSwap;
use tidegate_dns_core::view::{Binder, View};
use tidegate_policy::ScopeKey;
use tidegate_policy::event::Emit;
use tokio::runtime::Handle;
use tokio::sync::watch;

pub use config::{ClusterDns, ClusterServers, DnsConfig, Protocol, ResolverGroup};
pub use record::{DROPS, QUERIES, SECONDS};

use crate::engine::Engine;
use crate::quota::Quota;

/// How often expired answers are dropped.
const SWEEP: Duration = Duration::from_secs(15);

/// Why the service does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A socket cannot be opened or bound.
    #[error("cannot listen on {at}: {source}")]
    Listen {
        /// Where.
        at: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// A thread cannot be started.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
    /// The configuration makes no sense.
    #[error("{0}")]
    Config(&'static str),
}

/// What [`Server`] needs of the engine, whatever its types.
trait Answers: Send + Sync {
    fn flush(&self, scope: ScopeKey);
}

impl<V: View, B: Binder> Answers for Engine<V, B> {
    fn flush(&self, scope: ScopeKey) {
        self.store.flush(scope);
    }
}

/// The running service. Dropping it stops it.
pub struct Server {
    addresses: Vec<SocketAddr>,
    engine: Arc<dyn Answers>,
    in_flight: Arc<Quota>,
    stop_udp: Arc<AtomicBool>,
    stop_tcp: watch::Sender<bool>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Opens the sockets and starts the threads; tasks run on `runtime`. The
    /// metrics recorder must be installed before. The view is read for each
    /// batch, so a swap acts on the next query.
    pub fn start<V: View, B: Binder>(
        config: DnsConfig,
        view: Arc<ArcSwap<V>>,
        binder: Arc<B>,
        emit: Arc<dyn Emit>,
        runtime: Handle,
    ) -> Result<Self, StartError> {
        if config.listen.is_empty() {
            return Err(StartError::Config("the DNS service has no address to listen on"));
        }
        if config.resolvers.iter().any(|g| g.servers.is_empty()) {
            return Err(StartError::Config("a resolver group has no servers"));
        }
        let engine = Arc::new(Engine::new(&config, view, binder, record::Recorder::new(emit)));
        let (stop_tcp, stopped) = watch::channel(false);
        let mut server = Self {
            addresses: Vec::new(),
            engine: Arc::clone(&engine) as Arc<dyn Answers>,
            in_flight: Arc::clone(&engine.in_flight),
            stop_udp: Arc::new(AtomicBool::new(false)),
            stop_tcp,
            threads: Vec::new(),
        };
        for &at in &config.listen {
            let listen = |source| StartError::Listen { at, source };
            let (udp, tcp) = socket::sets(at, &config).map_err(listen)?;
            server.addresses.push(tcp.local_addr().map_err(listen)?);
            let tcp = {
                let _inside = runtime.enter();
                tokio::net::TcpListener::from_std(tcp).map_err(listen)?
            };
            runtime.spawn(tcp::run(Arc::clone(&engine), tcp, tcp::Bounds::new(&config), stopped.clone()));
            for (i, socket) in udp.into_iter().enumerate() {
                let (engine, stop, runtime) = (Arc::clone(&engine), Arc::clone(&server.stop_udp), runtime.clone());
                let transparent = config.transparent;
                let thread = std::thread::Builder::new()
                    .name(format!("dns-{i}"))
                    .spawn(move || udp::run(&engine, socket, transparent, &runtime, &stop))
                    .map_err(StartError::Thread)?;
                server.threads.push(thread);
            }
        }
        let mut stopped = stopped;
        runtime.spawn(async move {
            loop {
                tokio::select! {
                    () = tokio::time::sleep(SWEEP) => engine.sweep(),
                    _ = stopped.changed() => return,
                }
            }
        });
        Ok(server)
    }

    /// The addresses that are served, in the order of the configuration.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Queries that the slow path holds now.
    pub fn in_flight(&self) -> usize {
        self.in_flight.used()
    }

    /// Forgets the stored answers of a scope. Edits need no flush: the store holds unfiltered answers.
    pub fn flush(&self, scope: ScopeKey) {
        self.engine.flush(scope);
    }

    /// Ends TCP connections after their running queries, answers UDP until
    /// nothing is in flight or `limit` has passed, and stops.
    pub async fn drain(self, limit: Duration) {
        self.stop_tcp.send_replace(true);
        let idle = async {
            while self.in_flight() > 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let _ = tokio::time::timeout(limit, idle).await;
        let _ = tokio::task::spawn_blocking(move || self.stop()).await;
    }

    /// Stops and waits for the threads: at most their tick of 200 ms.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.stop_tcp.send_replace(true);
        self.stop_udp.store(true, Ordering::Relaxed);
        for t in self.threads.drain(..) {
            if t.join().is_err() {
                tracing::error!("a DNS thread panicked");
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}
