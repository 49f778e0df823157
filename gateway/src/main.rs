//! The `tidegate` binary: the gateway, the node agent, and tools for people who write policy.

mod accept;
mod admin;
mod agent_cmd;
mod appliance;
mod audit;
mod config;
mod core;
mod descriptors;
mod desired;
mod dns_view;
mod egress;
mod handover;
mod journal;
mod kube;
mod ownership;
mod peers;
mod places;
mod policy_cmd;
mod push;
mod relay_check;
mod status;
mod telemetry;
mod watch;
mod way;

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// A DNS-aware egress gateway for Kubernetes.
#[derive(Debug, Parser)]
#[command(name = "tidegate", version, about, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a gateway: DNS, TLS relay, forwarding, and the push to the nodes' kernels.
    ///
    /// Runs in the network namespace in which it is started, and needs NET_ADMIN and BPF there. Ends on SIGTERM,
    /// after a drain. docs/configuration.md has every key of the configuration file.
    Gateway {
        /// The configuration file (YAML).
        #[arg(long)]
        config: PathBuf,
        /// Remove everything of this gateway but sysctls from its network namespace instead, with its kernel maps, and
        /// end. It must not run.
        #[arg(long)]
        cleanup: bool,
    },
    /// Run the agent of a node: kernel programs, guard, tunnel, held addresses.
    ///
    /// Runs in the node's network namespace, as root. SIGTERM ends the process and leaves enforcement in place.
    Agent {
        /// The configuration file (YAML).
        #[arg(long)]
        config: PathBuf,
        /// Remove everything of Tidegate from this node instead, and end. No agent may run.
        #[arg(long)]
        cleanup: bool,
    },
    /// Tools for people who write policy.
    Policy {
        #[command(subcommand)]
        command: policy_cmd::PolicyCommand,
    },
    /// Print the definitions of Tidegate's resources, for `kubectl apply --server-side -f -`. The chart brings them, too.
    Crds,
    /// Print the status of a running gateway or agent. Exit code 1 if it is not ready.
    Status {
        /// Its admin address: `admin` in its configuration.
        #[arg(long, default_value = "127.0.0.1:9090")]
        admin: SocketAddr,
    },
}

/// A thread that died by a bug must not leave a process behind that looks alive: enforcement stays in the kernel, and
/// whoever started the process starts it again.
fn abort_on_panic() {
    let say = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        say(info);
        std::process::abort();
    }));
}

fn crds() -> anyhow::Result<u8> {
    std::io::stdout().lock().write_all(tidegate_api::crd::manifest()?.as_bytes())?;
    Ok(0)
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    if matches!(command, Command::Gateway { .. } | Command::Agent { .. }) {
        abort_on_panic();
    }
    let result = match command {
        Command::Gateway { config, cleanup: false } => appliance::run(&config).map(|()| 0),
        Command::Gateway { config, cleanup: true } => appliance::cleanup(&config).map(|()| 0),
        Command::Agent { config, cleanup: false } => agent_cmd::run(&config).map(|()| 0),
        Command::Agent { config, cleanup: true } => agent_cmd::cleanup(&config).map(|()| 0),
        Command::Policy { command } => {
            policy_cmd::run(&command, &mut std::io::stdout().lock(), &mut std::io::stderr().lock()).map_err(Into::into)
        }
        Command::Crds => crds(),
        Command::Status { admin } => status::run(admin),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("tidegate: {error:#}");
            ExitCode::from(2)
        }
    }
}
