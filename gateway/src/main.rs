//! The `tidegate` binary: the gateway, the node agent, and tools for people who write policy.

mod accept;
mod admin;
mod agent_cmd;
mod api;
mod appliance;
mod asker;
mod audit;
mod cluster;
mod config;
mod connectivity;
mod core;
mod descriptors;
mod desired;
mod dns_view;
mod egress;
mod generations;
mod handover;
mod identity;
mod journal;
mod kube;
mod members;
mod nodes;
mod overview;
mod ownership;
mod peering;
mod peers;
mod places;
mod policy_cmd;
mod probe;
mod push;
mod records;
mod relay_check;
mod report;
mod resolv;
mod source;
mod starts;
mod status;
mod sysdump;
mod telemetry;
mod timed;
mod watch;
mod way;

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use tidegate_kubernetes::Made;

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
    /// Runs in the network namespace in which it is started, and needs NET_ADMIN, BPF and PERFMON there. Ends on SIGTERM,
    /// after a drain. docs/configuration.md has every key of the configuration file.
    Gateway {
        /// The configuration file (YAML).
        #[arg(long)]
        config: PathBuf,
        /// Remove everything of this gateway but sysctls from its network namespace instead, with its kernel maps, and
        /// end. It must not run.
        #[arg(long)]
        cleanup: bool,
        /// Only read the configuration file, and print what it means with every default.
        #[arg(long, conflicts_with = "cleanup")]
        check: bool,
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
        /// The folder in which gateways of this node keep their pins: remove those, too. No gateway may run.
        #[arg(long, requires = "cleanup")]
        gateways: Option<PathBuf>,
        /// Remove this folder at the end if nothing but empty folders is in it; may be repeated.
        #[arg(long, requires = "cleanup")]
        folder: Vec<PathBuf>,
        /// Only read the configuration file, and print what it means with every default.
        #[arg(long, conflicts_with = "cleanup")]
        check: bool,
    },
    /// The chained CNI plugin: container runtimes run it when a pod's network is made, before the pod's first instruction.
    ///
    /// Takes the network configuration on standard input and the CNI_* variables, as the CNI specification says, and asks
    /// this node's agent. The agent installs it. `tidegate cni version` says which versions of the specification it speaks.
    Cni {
        #[command(subcommand)]
        command: Option<CniCommand>,
    },
    /// Tools for people who write policy.
    Policy {
        #[command(subcommand)]
        command: policy_cmd::PolicyCommand,
    },
    /// Print the definitions of Tidegate's resources, for `kubectl apply --server-side -f -`. The chart brings them, too.
    Crds,
    /// Print the status of a running gateway or agent, or with --cluster that of gateways, nodes, pools and policies.
    ///
    /// Exit code 1 if it is not ready: with --cluster, if no gateway or not every node's agent is.
    Status {
        /// Its admin address: `admin` in its configuration.
        #[arg(long, default_value = "127.0.0.1:9090", conflicts_with = "cluster")]
        admin: SocketAddr,
        /// Ask the API server instead.
        #[arg(long)]
        cluster: bool,
        #[command(flatten)]
        api: overview::Api,
        /// How it is printed; a component's own status is always JSON.
        #[arg(short, long, value_enum, default_value_t)]
        output: overview::Format,
        /// Wait until it is ready, at most so many seconds.
        #[arg(long, default_value_t = 0, requires = "cluster")]
        wait: u64,
    },
    /// Try in a cluster what Tidegate promises, with pods and a policy in a namespace of its own, and leave nothing behind.
    ///
    /// Needs leave to make namespaces, pods and EgressPolicies and to run commands in those pods. Exit code 0: every promise is
    /// kept; 1: one is not, and the table says which, where, and what was seen; 2: the test could not be run.
    ConnectivityTest {
        #[command(flatten)]
        api: overview::Api,
        #[command(flatten)]
        options: connectivity::Options,
    },
    /// Write one archive for a bug report: configuration, versions, status, maps, rules, events and logs, without secrets.
    ///
    /// Exit code 0: everything is in it; 1: something could not be had, which is named there in summary.txt; 2: there is no archive.
    Sysdump {
        #[command(flatten)]
        api: overview::Api,
        #[command(flatten)]
        options: sysdump::Options,
    },
    /// What a pod of Tidegate knows, for sysdump.
    #[command(hide = true)]
    Collect {
        /// Its configuration file.
        #[arg(long)]
        config: PathBuf,
        /// What of it.
        #[arg(value_enum)]
        item: sysdump::collect::Item,
    },
    /// One attempt of a client, as JSON, for connectivity-test.
    #[command(hide = true)]
    Probe {
        /// What is tried.
        attempt: String,
    },
    /// Take Tidegate out of every node and pool of a cluster, before its objects are deleted: the hook of `helm uninstall`.
    Uninstall {
        #[command(flatten)]
        api: overview::Api,
        /// How long nodes and gateways may take, in seconds; what is not done then stays.
        #[arg(long, default_value_t = 300)]
        timeout: u64,
        /// The Secret that gateways made, to be deleted.
        #[arg(long)]
        secret: Option<String>,
        /// The ConfigMap that gateways made, to be deleted.
        #[arg(long)]
        trust: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
enum CniCommand {
    /// Print the versions of the CNI specification that it speaks.
    Version,
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

fn uninstall(api: overview::Api, timeout: u64, made: &Made) -> anyhow::Result<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let done = runtime.block_on(async {
        let connection = overview::connect(api).await?;
        anyhow::Ok(tidegate_kubernetes::uninstall(&connection, made, Duration::from_secs(timeout)).await?)
    })?;
    println!("{} of {} nodes have nothing of Tidegate any more", done.clean, done.nodes);
    println!("pools let go: {}, objects removed: {}", done.pools, done.objects);
    if done.clean < done.nodes {
        eprintln!("the other nodes keep enforcing: run `tidegate agent --config FILE --cleanup` there, or boot them");
    }
    if !done.gateways_ended {
        eprintln!("gateways have not ended yet");
    }
    Ok(0)
}

fn cni(command: Option<CniCommand>) -> ExitCode {
    if let Some(CniCommand::Version) = command {
        println!("CNI {}", tidegate_cni::spec::VERSIONS.join(", "));
        return ExitCode::SUCCESS;
    }
    if std::env::var_os("CNI_COMMAND").is_none() {
        eprintln!(
            "tidegate: a container runtime runs this, with CNI_COMMAND in its environment; see tidegate cni --help"
        );
        return ExitCode::from(2);
    }
    tidegate_cni::main()
}

fn main() -> ExitCode {
    // A runtime runs the file itself.
    if std::env::args_os().len() <= 1 && std::env::var_os("CNI_COMMAND").is_some() {
        return tidegate_cni::main();
    }
    let command = Cli::parse().command;
    if matches!(command, Command::Gateway { check: false, .. } | Command::Agent { check: false, .. }) {
        abort_on_panic();
    }
    let result = match command {
        Command::Gateway { config, check: true, .. } => appliance::check(&config).map(|()| 0),
        Command::Gateway { config, cleanup: false, .. } => appliance::run(&config).map(|()| 0),
        Command::Gateway { config, cleanup: true, .. } => appliance::cleanup(&config).map(|()| 0),
        Command::Agent { config, check: true, .. } => agent_cmd::check(&config).map(|()| 0),
        Command::Agent { config, cleanup: false, .. } => agent_cmd::run(&config).map(|()| 0),
        Command::Agent { config, cleanup: true, gateways, folder, .. } => {
            agent_cmd::cleanup(&config, gateways.as_deref(), &folder).map(|()| 0)
        }
        Command::Policy { command } => {
            let (mut input, mut out, mut err) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
            policy_cmd::run(&command, &mut input, &mut out, &mut err).map_err(Into::into)
        }
        Command::Crds => crds(),
        Command::Cni { command } => return cni(command),
        Command::Status { cluster: true, api, output, wait, .. } => {
            overview::run(api, output, Duration::from_secs(wait))
        }
        Command::Status { admin, .. } => status::run(admin),
        Command::ConnectivityTest { api, options } => connectivity::run(api, &options),
        Command::Sysdump { api, options } => sysdump::run(api, &options),
        Command::Collect { config, item } => sysdump::collect::run(&config, item),
        Command::Probe { attempt } => probe::run(&attempt),
        Command::Uninstall { api, timeout, secret, trust } => uninstall(api, timeout, &Made { secret, trust }),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("tidegate: {error:#}");
            ExitCode::from(2)
        }
    }
}
