//! The node agent.
//!
//! ```text
//!  gateways ──State──▶ stream ──▶ merge ──▶ node (reconciler thread) ──▶ maps, programs (tidegate-ebpf)
//!           ──Facts──▶                        │   ▲    ▲                ├▶ tgn, tgq, tgh (devices)
//!           ◀──acks───────────────────────────┘   │    │                └▶ table inet tidegate (guard)
//!  gateway of this node ──netns──▶ plug ──────────┘    └── devices, routes, neighbours (links)
//! ```
//!
//! Streams and the Unix socket run on the caller's runtime; everything that waits for the
//! kernel runs on the reconciler's thread, and `nft` on one more. The channels between them are
//! bounded. All of it works in the network namespace of the thread that calls [`run`].
//!
//! When the agent stops, enforcement stays: programs, maps, devices and rules. [`cleanup`] removes them.

pub mod announce;
mod cni;
pub mod config;
mod denials;
pub mod devices;
pub mod events;
pub mod find;
pub mod guard;
mod held;
mod install;
pub mod join;
pub mod links;
pub mod merge;
mod node;
mod open;
mod orphans;
mod places;
pub mod plug;
pub mod stream;
pub mod sysctl;
mod told;

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tidegate_ebpf::{Options, Role};
use tidegate_identity::{Files, Paths, Source};
use tidegate_policy::event::Emit;
use tidegate_proto::Seen;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

pub use config::Config;
use denials::{Denials, Tee};

/// How long the reconciler may take to end.
const STOP: Duration = Duration::from_secs(5);

/// Why the agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The configuration is wrong.
    #[error("configuration: {0}")]
    Config(#[from] config::ConfigError),
    /// The machine lacks something.
    #[error("{0}")]
    Preflight(String),
    /// Programs or maps.
    #[error(transparent)]
    Datapath(#[from] tidegate_ebpf::Error),
    /// Devices.
    #[error(transparent)]
    Links(#[from] links::LinkError),
    /// The nftables table.
    #[error(transparent)]
    Guard(#[from] guard::GuardError),
    /// The gateway socket, a thread or a runtime.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The reconciler ended by itself.
    #[error("the reconciler died")]
    Died,
}

impl AgentError {
    fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| AgentError::Io { what, source }
    }
}

/// How the agent is, for `/readyz` and `/status`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Whether the kernel holds a complete snapshot: the data path works. Gateways that are away later do not
    /// change that.
    pub ready: bool,
    /// What is not as it should be, one sentence each; empty if all is well.
    pub conditions: Vec<String>,
}

/// Runs the agent until `shutdown` completes. Enforcement stays then.
///
/// Kernel events go to `emit`; `status` always has the present state.
///
/// # Errors
/// The agent cannot start, or its reconciler died.
pub async fn run(
    config: Config,
    emit: Arc<dyn Emit>,
    shutdown: impl Future<Output = ()> + Send,
    status: watch::Sender<Status>,
) -> Result<(), AgentError> {
    config.validate()?;
    tidegate_ebpf::preflight().map_err(AgentError::Preflight)?;
    events::describe();

    let (state_tx, state) = mpsc::channel(64);
    let (facts_tx, facts) = mpsc::channel(256);
    let (plug_tx, plugs) = mpsc::channel(16);
    let (cni_tx, cni) = mpsc::channel(cni::MAX_WAITING);
    let (seen_tx, seen) = watch::channel(Seen::default());
    let (started_pods, begun) = watch::channel(Arc::default());
    let (control, told) = watch::channel(BTreeSet::new());
    let (denials, denied) = Denials::new();
    let emit: Arc<dyn Emit> = Arc::new(Tee { log: emit, denials: denials.clone() });
    let (stop_tx, stop) = oneshot::channel();
    let (started_tx, started) = oneshot::channel();
    let (ended_tx, mut ended) = oneshot::channel();
    let (trouble, identity) = watch::channel(None);
    let (uninstalled, installed) = watch::channel(None);
    let ready = status.subscribe();
    let open = Arc::default();
    let inputs = node::Inputs {
        state,
        facts,
        plugs,
        cni,
        open: Arc::clone(&open),
        stop,
        seen: seen_tx,
        started: started_pods,
        control,
        identity,
        installed,
    };
    let shared = Arc::new(config.clone());
    std::thread::Builder::new()
        .name("reconciler".into())
        .spawn(move || drop(ended_tx.send(node::run(shared, inputs, emit, status, started_tx))))
        .map_err(AgentError::io("thread"))?;
    // Either it has started, or the end says why not.
    let Ok(attacher) = started.await else {
        return ended.await.unwrap_or(Err(AgentError::Died));
    };

    let listener = plug::listen(&config.socket).map_err(AgentError::io(config.socket.display().to_string()))?;
    let mut tasks = JoinSet::new();
    tasks.spawn(plug::serve(listener, plug_tx));
    if let Some(cni) = &config.cni {
        let socket = tidegate_cni::files::socket(&cni.folder);
        let listener = plug::listen(&socket).map_err(AgentError::io(socket.display().to_string()))?;
        let desk = cni::Desk { open, requests: cni_tx, attacher: Arc::new(attacher) };
        tasks.spawn(cni::serve(listener, desk));
        if let Some(installer) = install::Installer::new(cni, &config.pins) {
            tasks.spawn(installer.run(ready, uninstalled));
        }
    }
    tasks.spawn(denials.tell());
    let names = find::Names::default();
    let (targets, known) = watch::channel(config.gateways.iter().map(|g| g.address).collect());
    let identity = match (&config.tls, &config.join) {
        (Some(tls), _) => {
            let config::Tls { certificate, key, ca } = tls.clone();
            Source::Files(Arc::new(Mutex::new(Files::new(Paths { certificate, key, ca }))))
        }
        (None, Some(join)) => {
            let (issued, source) = watch::channel(None);
            let joiner =
                join::Joiner { node: config.node.clone(), join: join.clone(), targets: known, issued, trouble };
            tasks.spawn(joiner.run());
            Source::Issued(source)
        }
        // Refused by the check above.
        (None, None) => return Err(config::ConfigError { key: "tls", problem: "missing".into() }.into()),
    };
    let client = {
        let (node, boot, names) = (config.node.clone(), stream::random(), names.clone());
        move |address, name, stop| stream::Client {
            node: node.clone(),
            boot,
            address,
            name,
            names: names.clone(),
            identity: identity.clone(),
            seen: seen.clone(),
            denied: denied.clone(),
            started: begun.clone(),
            stop,
        }
    };
    // Those of the configuration are never left.
    let (_stop, never) = watch::channel(false);
    match config.discover.clone() {
        None => {
            for gateway in &config.gateways {
                let client = client(gateway.address, Some(gateway.name.clone()), never.clone());
                tasks.spawn(client.clone().state(state_tx.clone()));
                tasks.spawn(client.facts(facts_tx.clone()));
            }
        }
        Some(config::Discover { service, port, entrance }) => {
            let (state_tx, facts_tx) = (state_tx.clone(), facts_tx.clone());
            let streams = move |address, stop| {
                let client = client(address, None, stop);
                let (state, facts) = (client.clone().state(state_tx.clone()), client.facts(facts_tx.clone()));
                async move {
                    tokio::join!(state, facts);
                }
            };
            let resolve = move || find::resolve(service.clone(), port);
            let entrance = move || {
                let name = entrance.clone();
                async move {
                    match name {
                        Some(name) => find::resolve(name, port).await,
                        None => Ok(Vec::new()),
                    }
                }
            };
            tasks.spawn(find::find(find::EVERY, resolve, entrance, names, told, targets, streams));
        }
    }
    drop((state_tx, facts_tx));

    tokio::select! {
        () = shutdown => {}
        end = &mut ended => return end.unwrap_or(Err(AgentError::Died)).and(Err(AgentError::Died)),
    }
    tasks.shutdown().await;
    let _ = stop_tx.send(());
    tokio::time::timeout(STOP, ended).await.map_or(Err(AgentError::Died), |end| end.unwrap_or(Err(AgentError::Died)))
}

/// How the programs are loaded for this configuration.
fn options(config: &Config, tunnel_mtu: u16) -> Options {
    Options {
        role: Role::Node,
        pins: config.pins.clone(),
        tunnel_port: config.tunnel_port,
        mark: config.mark.value,
        mark_cluster: config.mark.cluster(),
        mark_mask: config.mark.mask,
        overlay_ports: config.overlay_ports.iter().copied().collect(),
        tunnel_mtu,
        drain: Duration::from_secs(config.drain_seconds.into()),
        flows_per_endpoint: config.flows_per_endpoint,
        capacities: config.capacities,
    }
}

/// Removes everything of Tidegate from this node: programs, maps, the nftables table, devices, the plugin, the socket, the
/// certificate with its key. What is not there is no error, so that it can be called again.
///
/// # Errors
/// The agent still runs, or the kernel refused; what could be removed before that is gone.
pub fn cleanup(config: &Config) -> Result<(), AgentError> {
    config.validate()?;
    tidegate_ebpf::remove_pins(&config.pins)?;
    guard::remove()?;
    // On a thread of its own: the caller may be inside a runtime.
    std::thread::scope(|s| {
        let devices = s.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
            runtime.map_err(AgentError::io("runtime"))?.block_on(async {
                let netlink = links::Netlink::open()?;
                for name in devices::OURS {
                    netlink.delete(name).await?;
                }
                Ok(())
            })
        });
        devices.join().unwrap_or(Err(AgentError::Died))
    })?;
    if let Some(cni) = &config.cni {
        // First, so that no runtime looks for a plugin that is gone.
        install::remove(cni).map_err(AgentError::io("the CNI plugin"))?;
        let removed = tidegate_cni::files::remove(&cni.folder, &cni.standing);
        removed.map_err(AgentError::io(cni.folder.display().to_string()))?;
    }
    let kept = config.join.iter().flat_map(|j| join::files(&j.folder));
    for file in kept.chain([config.socket.clone()]) {
        match std::fs::remove_file(&file) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(AgentError::io(file.display().to_string())(e));
            }
            _ => {}
        }
    }
    if let Some(join) = &config.join {
        // It may be somebody's who keeps more there.
        let _ = std::fs::remove_dir(&join.folder);
    }
    Ok(())
}
