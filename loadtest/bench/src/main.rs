//! Measures Tidegate beside its peers: in one run, on one machine, with the same names.
//!
//! ```text
//!  CPU 1: generator, backend, authority ──▶ CPU 0: one server at a time (Tidegate, a peer, the bare minimum)
//! ```
//!
//! All of it runs in a network namespace of its own, over loopback. Servers are processes with one worker thread; their
//! CPU time is what the scheduler counted for them during a run. Loads are even and do not wait for answers.

mod arena;
mod backend;
mod dns;
mod empty;
mod kernel;
mod memory;
mod micro;
mod poll;
mod process;
mod product;
mod stat;
mod table;
mod tls;
mod udp;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand, ValueEnum};

use crate::process::{LOAD_CPU, Noise, SERVER_CPU};
use crate::table::Table;

/// Measures Tidegate beside its peers.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    role: Option<Role>,
    /// Write the tables as Markdown to this file too.
    #[arg(long)]
    markdown: Option<PathBuf>,
    /// Include what criterion measured in this folder.
    #[arg(long)]
    criterion: Option<PathBuf>,
    /// Only these parts.
    #[arg(long, value_enum)]
    only: Vec<Part>,
    /// Short runs, for looking whether everything works.
    #[arg(long)]
    quick: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    Dns,
    Tls,
    Bulk,
    Kernel,
    Memory,
}

/// Processes that the measuring one starts.
#[derive(Subcommand)]
#[command(hide = true)]
enum Role {
    ServeDns { port: u16 },
    ServeRelay { port: u16 },
    Echo { port: u16 },
    Splice { port: u16 },
    Backend,
    Memory,
}

/// The peers' configuration in a folder of this run, removed with it.
struct Peers(PathBuf);

impl Peers {
    fn new() -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("tidegate-bench-{}", std::process::id()));
        fs::create_dir(&folder)?;
        let own = Self(folder);
        for (file, text) in [
            ("unbound.conf", include_str!("../peers/unbound.conf")),
            ("dnsdist.conf", include_str!("../peers/dnsdist.conf")),
            ("haproxy.cfg", include_str!("../peers/haproxy.cfg")),
            ("nginx.conf", include_str!("../peers/nginx.conf")),
        ] {
            fs::write(own.0.join(file), text)?;
        }
        Ok(own)
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The first line of what a command says.
fn version(program: &str, argument: &str) -> String {
    let said = Command::new(program).arg(argument).output();
    let text = said.map(|o| [o.stdout, o.stderr].concat()).unwrap_or_default();
    String::from_utf8_lossy(&text).lines().next().unwrap_or("not installed").trim().to_owned()
}

fn load_average() -> String {
    fs::read_to_string("/proc/loadavg").unwrap_or_default().split(' ').take(3).collect::<Vec<_>>().join(" ")
}

/// The machine and the versions.
fn about() -> String {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": ")).map_or("", |m| m.1);
    let cpus = cpu.lines().filter(|l| l.starts_with("processor")).count();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!(
        "{model}, {cpus} CPUs, Linux {}. Tidegate {}; unbound: {}; dnsdist: {}; HAProxy: {}; nginx: {}.",
        kernel.trim(),
        env!("CARGO_PKG_VERSION"),
        version("/usr/sbin/unbound", "-V"),
        version("/usr/bin/dnsdist", "--version"),
        version("/usr/sbin/haproxy", "-v"),
        version("/usr/sbin/nginx", "-v"),
    )
}

fn measure(arguments: &Arguments) -> Result<()> {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    ensure!(cpus > 1, "two CPUs are needed: one for the server, one for the load");
    let wanted = |p: Part| arguments.only.is_empty() || arguments.only.contains(&p);
    let (runs, seconds) = if arguments.quick { (1, 0.5) } else { (5, 2.0) };
    let load = load_average();
    let started = Instant::now();
    let mut tables = Vec::new();
    let mut add = |made: Vec<Table>| {
        made.iter().for_each(|t| print!("{}", t.text()));
        tables.extend(made);
    };
    arena::enter().context("a network namespace of its own (as root)")?;
    process::pin(LOAD_CPU)?;
    let peers = Peers::new()?;
    let noise = Noise::start();
    if wanted(Part::Dns) {
        dns::authority()?;
        add(dns::measure(&peers.0, &[20_000, 80_000], seconds, runs)?);
    }
    if wanted(Part::Tls) || wanted(Part::Bulk) {
        let relays = tls::Relays::start(&peers.0)?;
        relays.check()?;
        if wanted(Part::Tls) {
            add(vec![relays.connections(2_000, seconds, runs)?]);
        }
        if wanted(Part::Bulk) {
            let octets = if arguments.quick { 256 << 20 } else { 1 << 30 };
            add(vec![relays.bulk(octets, 1, runs)?, relays.bulk(octets, 16, runs)?]);
        }
    }
    if wanted(Part::Kernel) {
        process::pin(SERVER_CPU)?;
        let counts: &[u32] = if arguments.quick { &[10, 10_000] } else { &[10, 10_000, 1_000_000] };
        add(vec![kernel::measure(counts, runs.min(3))?]);
    }
    if wanted(Part::Memory) {
        add(vec![memory::measure()?]);
    }
    if let Some(folder) = &arguments.criterion {
        add(vec![micro::table(folder).context("criterion's results")?]);
    }
    let about = format!(
        "{} Others used {:.0} % of the machine during the runs; load average before {load}, after {}. {:.0} s in all.",
        about(),
        noise.others() * 100.0,
        load_average(),
        started.elapsed().as_secs_f64(),
    );
    println!("\n{about}");
    if let Some(file) = &arguments.markdown {
        let body: Vec<String> = tables.iter().map(Table::markdown).collect();
        write(file, &format!("{about}\n\n{}", body.join("\n")))?;
    }
    Ok(())
}

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| file.display().to_string())
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    match arguments.role {
        None => measure(&arguments),
        Some(Role::ServeDns { port }) => product::serve_dns(port),
        Some(Role::ServeRelay { port }) => product::serve_relay(port),
        Some(Role::Echo { port }) => dns::echo(port),
        Some(Role::Splice { port }) => tls::splice(port),
        Some(Role::Backend) => backend::serve(),
        Some(Role::Memory) => memory::print(),
    }
}
