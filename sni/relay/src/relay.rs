//! The relay's threads: start, accept, drain, stop.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use tidegate_policy::Reason;
use tidegate_policy::event::Emit;
use tidegate_sni_core::Check;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep};

use crate::config::{Error, RelayConfig};
use crate::metric::Metrics;
use crate::registry::Registry;
use crate::serve::Shared;
use crate::{pipe, socket};

/// What the threads should do.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Accept,
    Drain,
    Stop,
}

/// How long connections have to write their last event after a reset.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How often a drain looks whether the last connection is gone.
const LOOK: Duration = Duration::from_millis(20);
/// How long accept waits after a local limit refused it a descriptor.
const BREATHER: Duration = Duration::from_millis(20);
/// How often a thread wakes up for nothing. A timer that comes before all others costs the runtime two calls to set,
/// so there is always one that comes before those of connections.
const BEAT: Duration = Duration::from_millis(100);

/// A running relay. Dropping it resets what is left.
pub struct Relay {
    addresses: Vec<SocketAddr>,
    registry: Arc<Registry>,
    stage: watch::Sender<Stage>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Relay {
    /// Opens all listeners and starts the threads. Needs no runtime of the caller's. A metrics
    /// recorder must be installed before.
    ///
    /// # Errors
    /// If a listener cannot be made (a port in use, or CAP_NET_ADMIN missing), or a thread, or if the
    /// configuration cannot hold.
    pub fn start<C: Check>(config: RelayConfig, check: Arc<C>, emit: Arc<dyn Emit>) -> Result<Self, Error> {
        if config.threads == 0 || config.listen.is_empty() {
            return Err(Error::Nothing);
        }
        if let (Some(wanted), Some(kernel)) = (&config.ports, socket::namespace_ports())
            && !(wanted.start() <= wanted.end() && kernel.contains(wanted.start()) && kernel.contains(wanted.end()))
        {
            return Err(Error::Ports { wanted: wanted.clone(), kernel });
        }
        let mut addresses = config.listen.clone();
        let mut listeners: Vec<Vec<TcpListener>> = Vec::new();
        for _ in 0..config.threads {
            listeners.push(addresses.iter_mut().map(|a| listen(a, &config)).collect::<Result<_, _>>()?);
        }
        let ports = config.ports.clone().filter(|_| {
            let can = socket::has_local_ports();
            if !can {
                tracing::warn!("this kernel has no IP_LOCAL_PORT_RANGE: upstream ports follow ip_local_port_range");
            }
            can
        });
        let registry = Arc::new(Registry::new(config.quota).with_total(config.total));
        let dials = Semaphore::new(config.dials.min(Semaphore::MAX_PERMITS));
        let shared =
            Arc::new(Shared { ports, dials, check, emit, registry: registry.clone(), metrics: Metrics::new(), config });
        let (stage, _) = watch::channel(Stage::Accept);
        let relay = Self { addresses, registry, stage, threads: Mutex::default() };
        for (i, listeners) in listeners.into_iter().enumerate() {
            let runtime = Builder::new_current_thread().enable_all().build().map_err(Error::Thread)?;
            let (shared, stage) = (shared.clone(), relay.stage.subscribe());
            let thread = std::thread::Builder::new()
                .name(format!("relay-{i}"))
                .spawn(move || work(runtime, listeners, shared, stage))
                .map_err(Error::Thread)?;
            relay.threads.lock().push(thread);
        }
        Ok(relay)
    }

    /// Where it listens, in the order of the configuration, with the ports that it got.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// The connections that live now.
    pub fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// Stops accepting, waits up to `within` for connections to end by themselves, then resets what
    /// is left with reason `no-gateway` and ends the threads. Returns how many were reset. Must run
    /// in a tokio runtime with time.
    pub async fn drain(&self, within: Duration) -> usize {
        self.stage.send_modify(|s| *s = Stage::Drain.max(*s));
        self.wait(within).await;
        let reset = self.registry.revoke(|_| true, Reason::NoGateway);
        self.wait(LAST_WORDS).await;
        self.stage.send_replace(Stage::Stop);
        let threads = std::mem::take(&mut *self.threads.lock());
        while threads.iter().any(|t| !t.is_finished()) {
            sleep(LOOK).await;
        }
        reset
    }

    async fn wait(&self, within: Duration) {
        let deadline = Instant::now() + within;
        while !self.registry.is_empty() && Instant::now() < deadline {
            sleep(LOOK).await;
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stage.send_replace(Stage::Stop);
        for thread in self.threads.get_mut().drain(..) {
            // A thread that panicked has said so itself.
            let _ = thread.join();
        }
    }
}

/// Listens on `address`, and writes back the port that it got so that all threads share one.
fn listen(address: &mut SocketAddr, config: &RelayConfig) -> Result<TcpListener, Error> {
    let made = socket::listen(*address, config.transparent, config.reply_mark)
        .and_then(|l| l.local_addr().map(|a| (l, a.port())));
    let (listener, port) = made.map_err(|source| Error::Listen { address: *address, source })?;
    address.set_port(port);
    Ok(listener)
}

fn work<C: Check>(
    runtime: Runtime,
    listeners: Vec<TcpListener>,
    shared: Arc<Shared<C>>,
    mut stage: watch::Receiver<Stage>,
) {
    pipe::allow(shared.config.pipes);
    runtime.block_on(async {
        tokio::spawn(async {
            loop {
                sleep(BEAT).await;
            }
        });
        for listener in listeners {
            tokio::spawn(accept(listener, shared.clone(), stage.clone()));
        }
        // An error means that the relay is gone.
        let _ = stage.wait_for(|s| *s == Stage::Stop).await;
    });
    // Tasks end with their runtime, and their sockets reset.
    drop(runtime);
}

async fn accept<C: Check>(listener: TcpListener, shared: Arc<Shared<C>>, mut stage: watch::Receiver<Stage>) {
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "cannot register a relay listener");
            return;
        }
    };
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stage.wait_for(|s| *s != Stage::Accept) => return,
        };
        match accepted {
            Ok((client, peer)) => {
                if let Some(admitted) = shared.admit(client, peer) {
                    tokio::spawn(shared.clone().serve(admitted));
                }
            }
            // The client gave up before it was accepted.
            Err(e) if matches!(e.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) => {}
            Err(error) => {
                shared.metrics.accept_errors.increment(1);
                tracing::warn!(%error, "cannot accept");
                sleep(BREATHER).await;
            }
        }
    }
}
