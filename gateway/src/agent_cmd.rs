//! `tidegate agent`: the node agent's process around the agent library.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tidegate_agent::{Config, Status};
use tidegate_policy::event::Emit;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::admin::{self, Admin, Guard, Readiness};
use crate::{audit, telemetry};

fn load(path: &Path) -> Result<Config> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut config: Config = crate::config::parse(&text, path, "agent")?;
    // The pods of a DaemonSet share their configuration.
    if config.node.is_empty() {
        config.node = std::env::var("NODE_NAME").unwrap_or_default();
    }
    config.validate().with_context(|| format!("{} is not a valid agent configuration", path.display()))?;
    Ok(config)
}

/// Prints what a configuration file means.
pub fn check(path: &Path) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(&load(path)?)?);
    Ok(())
}

/// How long the admin port is waited for: of an agent whose node this one takes over it is the last that it lets go.
const TAKEN: Duration = Duration::from_secs(5);
/// What readiness waits for.
const SNAPSHOT: &str = "snapshot";

/// Runs the agent until SIGTERM or SIGINT. Enforcement stays then.
pub fn run(path: &Path) -> Result<()> {
    let config = load(path)?;
    telemetry::logs()?;
    let effective = serde_json::to_value(&config)?;
    tracing::info!(config = %effective, version = env!("CARGO_PKG_VERSION"), "effective configuration");
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot make a runtime")?;
    if !runtime.block_on(turn(&config.pins))? {
        return Ok(());
    }
    let metrics = telemetry::install_metrics()?;
    let writer = Arc::new(
        audit::start(audit::Config {
            file: config.audit.as_ref().map(|a| a.file.clone()),
            gateway: None,
            node: config.node.clone(),
            boot: audit::boot_id()?,
            recent: None,
        })
        .context("cannot start the audit log")?,
    );
    let (status, seen) = watch::channel(Status::default());
    let readiness = Readiness::default();
    // Before anybody can ask: an agent that has done nothing yet is not ready.
    let waiting = readiness.guard(SNAPSHOT);
    let admin = match config.admin {
        None => None,
        Some(address) => {
            let (node, now) = (config.node.clone(), seen.clone());
            let status = move || {
                let s = now.borrow();
                serde_json::json!({"node": node, "ready": s.ready, "conditions": s.conditions})
            };
            let admin = Admin { metrics, readiness: readiness.clone(), config: effective, status: Arc::new(status) };
            Some(admin::serve(address, admin, TAKEN)?)
        }
    };
    let result = runtime.block_on(async {
        let mut term = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
        let mut int = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
        let shutdown = async move {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
        };
        tokio::spawn(follow(seen, readiness, waiting));
        let emit: Arc<dyn Emit> = writer.clone();
        tidegate_agent::run(config, emit, shutdown, status).await.context("the agent ended")
    });
    drop(admin);
    writer.stop();
    result
}

/// How often a waiting agent looks whether the one before has ended.
const LOOK: Duration = Duration::from_millis(100);

/// Waits until no other agent works on this node: in an upgrade the next one is started while the last still runs, which
/// answers for both until then. Returns whether to go on; false when it was told to end meanwhile.
async fn turn(pins: &Path) -> Result<bool> {
    let mut term = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    let mut said = false;
    while tidegate_ebpf::is_taken(pins) {
        if !said {
            tracing::info!("another agent works on this node; waiting for it to end");
            said = true;
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            _ = term.recv() => return Ok(false),
            _ = int.recv() => return Ok(false),
        }
    }
    Ok(true)
}

/// Readiness is the agent's: not ready until the kernel holds a complete snapshot.
async fn follow(mut seen: watch::Receiver<Status>, readiness: Readiness, waiting: Guard) {
    let mut waiting = Some(waiting);
    loop {
        let ready = seen.borrow_and_update().ready;
        match (ready, waiting.is_some()) {
            (true, true) => waiting = None,
            (false, false) => waiting = Some(readiness.guard(SNAPSHOT)),
            _ => {}
        }
        if seen.changed().await.is_err() {
            return;
        }
    }
}

/// Removes everything of Tidegate from this node, what gateways that have ended pinned in their folder, and folders that have nothing
/// but empty ones in them.
pub fn cleanup(path: &Path, gateways: Option<&Path>, folders: &[PathBuf]) -> Result<()> {
    let config = load(path)?;
    tidegate_agent::cleanup(&config).context("cannot clean up")?;
    if let Some(folder) = gateways {
        for pins in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            tidegate_ebpf::remove_pins(&pins.path()).context("cannot clean up after gateways")?;
        }
        // Fails if somebody else keeps something there, and then it shall.
        let _ = std::fs::remove_dir(folder);
    }
    for folder in folders {
        let below = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path());
        for empty in below.chain([folder.clone()]) {
            match std::fs::remove_dir(&empty) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => eprintln!("{} stays: {e}", empty.display()),
                _ => {}
            }
        }
    }
    println!("removed Tidegate's programs, maps, rules and devices from node {}", config.node);
    Ok(())
}
