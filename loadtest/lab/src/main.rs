//! `tidegate-lab`: builds, shows and removes labs.
#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use tidegate_lab::{Lab, Options, Scenario, kubelet, serve, state, story};

/// A whole cluster in network namespaces on one machine.
#[derive(Parser)]
#[command(name = "tidegate-lab", version)]
struct Arguments {
    #[command(subcommand)]
    command: Do,
}

#[derive(Subcommand)]
enum Do {
    /// Builds a lab and leaves it running.
    Up {
        /// The scenario; without it the demo's.
        #[arg(long)]
        scenario: Option<PathBuf>,
        /// Name of the instance; several run side by side.
        #[arg(long, default_value = "lab")]
        name: String,
        /// Only the world, without the product.
        #[arg(long)]
        bare: bool,
    },
    /// Runs a command in a pod, node, gateway, `router` or `internet`.
    Exec {
        /// Name of the instance.
        #[arg(long, default_value = "lab")]
        name: String,
        /// The place: NAMESPACE/POD, or a name that only one pod has.
        place: String,
        /// The command.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Runs kubectl as the administrator of a lab with an API server.
    Kubectl {
        /// Name of the instance.
        #[arg(long, default_value = "lab")]
        name: String,
        /// What kubectl gets.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Shows what runs.
    Status {
        /// Name of the instance; without it every instance.
        #[arg(long)]
        name: Option<String>,
    },
    /// Removes a lab, also after a crash.
    Down {
        /// Name of the instance.
        #[arg(long, default_value = "lab")]
        name: String,
        /// Every instance.
        #[arg(long, conflicts_with = "name")]
        all: bool,
    },
    /// Brings a lab up, plays the story in it, takes it down; fails on any surprise.
    Demo {
        /// The scenario; without it the demo's. Names, pods and policies must be the demo's.
        #[arg(long)]
        scenario: Option<PathBuf>,
        /// Only these points, from 1 to 14.
        #[arg(long)]
        point: Vec<u8>,
        /// Leaves the lab running afterwards, under the name `demo`.
        #[arg(long)]
        keep: bool,
        /// With a real API server: objects are made with kubectl, and every command is shown.
        #[arg(long)]
        kubernetes: bool,
    },
    /// A Kubernetes cluster with kubelets on this machine.
    Cluster {
        /// Name of the instance.
        #[arg(long, default_value = "cluster", global = true)]
        name: String,
        #[command(subcommand)]
        command: ClusterDo,
    },
    /// Takes a lab down when a process has ended.
    #[command(hide = true)]
    Guard {
        /// Name of the instance.
        #[arg(long)]
        name: String,
        /// The process.
        #[arg(long)]
        pid: i32,
        /// Its start time in clock ticks.
        #[arg(long)]
        started: u64,
    },
    /// Serves what a file of the state folder says, in the namespace it is started in.
    #[command(hide = true)]
    Serve {
        /// The file.
        file: PathBuf,
    },
    /// Becomes a node with a kubelet.
    #[command(hide = true)]
    Node {
        /// Become its first process: the namespaces are made.
        #[arg(long)]
        inside: bool,
        /// The file.
        file: PathBuf,
    },
    /// Passes connections on to a network namespace.
    #[command(hide = true)]
    Relay {
        /// Where it listens.
        #[arg(long)]
        listen: SocketAddr,
        /// The namespace.
        #[arg(long)]
        netns: String,
        /// The address there.
        #[arg(long)]
        to: SocketAddr,
    },
}

#[derive(Subcommand)]
enum ClusterDo {
    /// Builds a cluster and leaves it running.
    Up {
        /// The scenario; without it the cluster's.
        #[arg(long)]
        scenario: Option<PathBuf>,
    },
    /// Shows what runs.
    Status,
    /// Runs kubectl as the administrator.
    Kubectl {
        /// What kubectl gets.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Runs a command on a node, among its own processes and mounts.
    Exec {
        /// The node.
        node: String,
        /// The command.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Removes it, also after a crash.
    Down,
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("tidegate-lab: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// The demo's scenario.
fn demo_scenario() -> PathBuf {
    scenario_file("demo.yaml")
}

/// A scenario of the tree, found from the folder of the call or of the build.
fn scenario_file(name: &str) -> PathBuf {
    let relative = PathBuf::from("loadtest/scenarios").join(name);
    if relative.is_file() {
        return relative;
    }
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../scenarios").join(name)
}

fn run(command: Do) -> Result<ExitCode> {
    match command {
        Do::Up { scenario, name, bare } => {
            let mut scenario = Scenario::load(&scenario.unwrap_or_else(demo_scenario))?;
            if bare {
                scenario.tidegate = None;
            }
            let lab = Lab::up(scenario, &Options { name, ..Options::default() })?;
            show(&lab);
            println!("try: tidegate-lab exec --name {} POD -- COMMAND", lab.name());
            lab.detach();
        }
        Do::Exec { name, place, command } => {
            Lab::open(&name)?.place(&place)?.exec(&command)?;
        }
        Do::Kubectl { name, command } => {
            let kubectl = tidegate_kube::tool(tidegate_kube::Tool::Kubectl)?.display().to_string();
            let command: Vec<String> = std::iter::once(kubectl).chain(command).collect();
            Lab::open(&name)?.place(tidegate_lab::kube::PLACE)?.exec(&command)?;
        }
        Do::Status { name } => {
            let names = name.map_or_else(state::instances, |n| vec![n]);
            for name in names {
                match Lab::open(&name) {
                    Ok(lab) => show(&lab),
                    Err(e) => println!("{name}: {e:#}"),
                }
            }
        }
        Do::Down { name, all } => {
            let names = if all { state::instances() } else { vec![name] };
            for name in names {
                Lab::open(&name)?.down().with_context(|| format!("{name} did not go down cleanly"))?;
            }
        }
        Do::Demo { scenario, point, keep, kubernetes } => {
            let mut scenario = Scenario::load(&scenario.unwrap_or_else(demo_scenario))?;
            if kubernetes {
                scenario = scenario.with_kubernetes()?;
            }
            return demo(scenario, &point, keep);
        }
        Do::Guard { name, pid, started } => {
            let process = state::Process { name: "guarded".into(), pid, started };
            while process.is_alive() {
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
            if state::instances().contains(&name) {
                Lab::open(&name)?.down()?;
            }
        }
        Do::Serve { file } => serve::run(&file)?,
        Do::Cluster { name, command } => cluster(name, command)?,
        Do::Node { inside: true, file } => kubelet::boot::init(&file)?,
        Do::Node { inside: false, file } => kubelet::boot::run(&file)?,
        Do::Relay { listen, netns, to } => kubelet::relay::run(listen, &netns, to)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn cluster(name: String, command: ClusterDo) -> Result<()> {
    match command {
        ClusterDo::Up { scenario } => {
            let begun = std::time::Instant::now();
            let scenario = Scenario::load(&scenario.unwrap_or_else(|| scenario_file("cluster.yaml")))?;
            let lab = Lab::up(scenario, &Options { name, ..Options::default() })?;
            println!("the cluster is up after {:.1} s", begun.elapsed().as_secs_f32());
            println!("try: export KUBECONFIG={}", lab.host_kubeconfig().display());
            lab.detach();
        }
        ClusterDo::Status => {
            let lab = Lab::open(&name)?;
            show(&lab);
            print!("{}", lab.host_kubectl(&["get", "nodes,pods", "--all-namespaces", "--output=wide"], "")?);
        }
        ClusterDo::Kubectl { command } => {
            let lab = Lab::open(&name)?;
            let kubectl = tidegate_kube::tool(tidegate_kube::Tool::Kubectl)?;
            let mut kubectl = std::process::Command::new(kubectl);
            let error = kubectl.args(command).env("KUBECONFIG", lab.host_kubeconfig()).exec();
            return Err(error).context("cannot run kubectl");
        }
        ClusterDo::Exec { node, command } => {
            Lab::open(&name)?.exec_on_node(&node, &command)?;
        }
        ClusterDo::Down => Lab::open(&name)?.down().with_context(|| format!("{name} did not go down cleanly"))?,
    }
    Ok(())
}

/// Plays the story; an interrupt takes the lab down too.
fn demo(scenario: Scenario, points: &[u8], keep: bool) -> Result<ExitCode> {
    use nix::sys::signal::{SigSet, Signal};
    let name = if keep { "demo".to_owned() } else { Options::unique("demo").name };
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    // Blocked here, and so in every thread; children get an empty mask from the standard library.
    signals.thread_block()?;
    let watched = name.clone();
    std::thread::spawn(move || {
        if signals.wait().is_ok() {
            if let Ok(lab) = Lab::open(&watched)
                && let Err(e) = lab.down()
            {
                eprintln!("the lab {watched} did not go down cleanly: {e:#}");
            }
            std::process::exit(130);
        }
    });
    let begun = std::time::Instant::now();
    let lab = Lab::up(scenario, &Options { name, tell_kubectl: true, ..Options::default() })?;
    println!(
        "the lab is up after {:.1} s: {} pods on {} nodes, {} gateways",
        begun.elapsed().as_secs_f32(),
        lab.scenario().pods.len(),
        lab.scenario().nodes.len(),
        lab.scenario().gateways.len()
    );
    let surprises = story::play(&lab, points, true)?;
    if lab.has_kubernetes() {
        show_objects(&lab)?;
    }
    println!("{surprises} surprises, {:.1} s", begun.elapsed().as_secs_f32());
    if keep {
        println!("the lab stays: tidegate-lab exec --name demo POD -- COMMAND; tidegate-lab down --name demo");
        lab.detach();
    } else {
        lab.down()?;
    }
    Ok(if surprises == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What people see of all this with kubectl.
fn show_objects(lab: &Lab) -> Result<()> {
    println!("\nWhat kubectl shows");
    for args in [
        &["get", "egresspolicies,namespaceegresses", "-A"][..],
        &["get", "clusteregresspolicies,egresspools"],
        &["events", "-n", "shop", "--for", "pod/worker"],
        &["describe", "namespaceegress", "tidegate", "-n", "shop"],
    ] {
        let out = lab.kubectl_with(args, "")?;
        for line in out.to_string().lines() {
            println!("       {line}");
        }
    }
    Ok(())
}

/// One line for each process and pod.
fn show(lab: &Lab) {
    println!("lab {}  {}", lab.name(), lab.layout().folder.display());
    let products = lab.product_names();
    for process in lab.processes() {
        let state = if !process.is_alive() {
            "ended"
        } else if !products.contains(&process.name) {
            "runs"
        } else if matches!(lab.admin(&process.name, "/readyz"), Ok((200, _))) {
            "ready"
        } else {
            "not ready"
        };
        println!("  {:<28} pid {:<8} {state}", process.name, process.pid);
    }
    for pod in &lab.scenario().pods {
        let addresses: Vec<String> = pod.addresses().iter().map(ToString::to_string).collect();
        println!("  {:<28} {:<12} {}", pod.key(), pod.node, addresses.join(" "));
    }
}
