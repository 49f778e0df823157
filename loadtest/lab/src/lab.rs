//! A running instance, for the commands and for tests.

use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::certs::{Authority, INTERNET_CA};
use crate::cluster::{cluster_zone, resolv_conf};
use crate::family::Family;
use crate::place::Place;
use crate::product::{self, Layout};
use crate::scenario::{Listen, NameSpec, Node, SYSTEM_NAMESPACE, Scenario};
use crate::serve::zone::Zone;
use crate::state::{self, MARKER, Process, State};
use crate::{foreign, kube, netns, serve, world};

/// How long a server of the lab may take to listen.
const SERVE_LIMIT: Duration = Duration::from_secs(10);
/// How long a process of the product may take to be ready.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// The first kernel with tcx.
const KERNEL: (u32, u32) = (6, 6);

/// How an instance is made.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Its name; several instances with different names run side by side.
    pub name: String,
    /// The lab's binary; absent: beside this process's.
    pub lab: Option<PathBuf>,
    /// The product's binary; absent: `$TIDEGATE_BIN`, else beside the lab's.
    pub tidegate: Option<PathBuf>,
    /// Make everything ready and start nothing of the product: [`Lab::start_product`] does.
    pub idle: bool,
    /// Print every kubectl command.
    pub tell_kubectl: bool,
}

impl Options {
    /// Options with a name that no other process uses.
    pub fn unique(prefix: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        Self { name: format!("{prefix}-{}-{n}", std::process::id()), ..Self::default() }
    }
}

/// A running instance. It goes down when it is dropped, unless it was opened or detached.
#[derive(Debug)]
pub struct Lab {
    state: State,
    layout: Layout,
    lab: PathBuf,
    tidegate: PathBuf,
    owned: bool,
    /// Whether kubectl commands are printed.
    told: AtomicBool,
}

/// Whether a path is a mount point.
pub fn is_mount(path: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts.lines().any(|line| line.split(' ').nth(4).is_some_and(|p| Path::new(p) == path))
}

/// Waits until something is there, looking every 20 ms.
pub fn wait_for<T>(limit: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if Instant::now() >= end {
            return None;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Says in one sentence what this machine lacks.
fn preflight() -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "the lab makes network namespaces: run it as root");
    let release = nix::sys::utsname::uname()?.release().to_string_lossy().into_owned();
    let mut parts = release.split(['.', '-']).map_while(|p| p.parse::<u32>().ok());
    let version = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    ensure!(version >= KERNEL, "this kernel is {release}; the lab needs {}.{} or newer (tcx)", KERNEL.0, KERNEL.1);
    for (tool, package) in [("ip", "iproute2"), ("nft", "nftables")] {
        let found = std::env::var_os("PATH").unwrap_or_default();
        let found = std::env::split_paths(&found).any(|folder| folder.join(tool).is_file());
        ensure!(found, "`{tool}` is missing: apt-get install {package}");
    }
    Ok(())
}

/// The lab's binary and the product's.
fn binaries(options: &Options) -> Result<(PathBuf, PathBuf)> {
    let exe = std::env::current_exe()?;
    // A test runs from target/debug/deps, the binaries are one folder up.
    let beside = |name: &str| exe.ancestors().skip(1).take(2).map(|f| f.join(name)).find(|p| p.is_file());
    let lab = options.lab.clone().or_else(|| beside("tidegate-lab")).context("the binary tidegate-lab is not built")?;
    let tidegate = options
        .tidegate
        .clone()
        .or_else(|| std::env::var_os("TIDEGATE_BIN").map(PathBuf::from))
        .or_else(|| lab.parent().map(|f| f.join("tidegate")))
        .unwrap_or_else(|| "tidegate".into());
    Ok((lab, tidegate))
}

/// A node's own DNS daemon: bound on every address, it answers every name with the node's.
fn daemon(scenario: &Scenario, node: &Node, serve: &Path) -> Result<serve::Dns> {
    let any = |family: &Family| family.pick(IpAddr::from([0u8; 4]), IpAddr::from([0u8; 16]));
    let own = NameSpec { ipv4: vec![node.ipv4], ipv6: vec![node.ipv6], ..NameSpec::default() };
    let zone = Zone { suffixes: vec![String::new()], names: Vec::new(), any_name: Some(own) };
    let dns = serve::Dns {
        addresses: scenario.families.iter().map(|f| SocketAddr::new(any(f), 53)).collect(),
        zone: serve.join(format!("{}.zone.json", node.name)),
        forward: None,
        log: serve.join(format!("{}.queries.jsonl", node.name)),
    };
    state::replace(&dns.zone, &serde_json::to_vec_pretty(&zone)?)?;
    Ok(dns)
}

impl Lab {
    /// Builds the world, starts its servers and, if the scenario has `tidegate`, the product, and waits until all is ready.
    ///
    /// # Errors
    /// In one sentence, what is missing or did not start; everything that was made is removed again.
    pub fn up(scenario: Scenario, options: &Options) -> Result<Self> {
        preflight()?;
        let (lab, tidegate) = binaries(options)?;
        ensure!(
            scenario.tidegate.is_none() || tidegate.is_file(),
            "{} is missing: cargo build -p tidegate",
            tidegate.display()
        );
        let state = State::create(&options.name, scenario)?;
        let layout = Layout { folder: state::folder(&options.name) };
        let mut this = Self { state, layout, lab, tidegate, owned: true, told: options.tell_kubectl.into() };
        this.build(options.idle).context("the lab did not come up")?;
        Ok(this)
    }

    /// As [`Lab::up`], and a process beside this one takes the instance down when this process is gone, however it
    /// ended: for tests that share an instance in a static, which is never dropped.
    ///
    /// # Errors
    /// As [`Lab::up`].
    pub fn up_guarded(scenario: Scenario, options: &Options) -> Result<Self> {
        let this = Self::up(scenario, options)?;
        this.guard(i32::try_from(std::process::id())?)?;
        Ok(this)
    }

    /// Starts a process that takes the instance down when another one is gone.
    ///
    /// # Errors
    /// When that one is gone already.
    pub fn guard(&self, pid: i32) -> Result<()> {
        let started = state::start_time(pid).with_context(|| format!("there is no process {pid}"))?;
        Command::new(&self.lab)
            .args(["guard", "--name", &self.state.name, "--pid", &pid.to_string(), "--started", &started.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .context("cannot start the guard")?;
        Ok(())
    }

    /// An instance that another process made; dropping it changes nothing.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn open(name: &str) -> Result<Self> {
        let (lab, tidegate) = binaries(&Options::default())?;
        let layout = Layout { folder: state::folder(name) };
        Ok(Self { state: State::load(name)?, layout, lab, tidegate, owned: false, told: AtomicBool::new(false) })
    }

    /// Lets it run on when this process ends.
    pub fn detach(mut self) {
        self.owned = false;
    }

    /// Removes everything that it made.
    ///
    /// # Errors
    /// What could not be removed.
    pub fn down(mut self) -> Result<()> {
        self.owned = false;
        self.state.tear_down()
    }

    fn build(&mut self, idle: bool) -> Result<()> {
        self.layout.create()?;
        if self.has_kubelets() {
            return self.build_cluster();
        }
        product::write(&self.state.scenario, &self.layout)?;
        fs::write(self.resolv_conf(SYSTEM_NAMESPACE), resolv_conf(&self.state.scenario, SYSTEM_NAMESPACE))?;
        for namespace in &self.state.scenario.namespaces {
            fs::write(self.resolv_conf(&namespace.name), resolv_conf(&self.state.scenario, &namespace.name))?;
        }
        world::build(&mut self.state)?;
        self.start_servers()?;
        if self.has_kubernetes() {
            self.start_control().context("the API server did not come up")?;
            self.load_objects().context("the API server did not take the scenario's objects")?;
        }
        if self.state.scenario.tidegate.is_some() || self.state.scenario.hosts.foreign_tcx {
            self.mount_bpffs()?;
        }
        if self.state.scenario.hosts.foreign_tcx {
            self.attach_foreign("foreign")?;
        }
        if self.state.scenario.tidegate.is_some() && !idle {
            self.start_product()?;
        }
        Ok(())
    }

    /// The world with nodes that run pods by themselves. What runs in them comes with kubectl and helm.
    fn build_cluster(&mut self) -> Result<()> {
        self.write_nodes()?;
        world::build(&mut self.state)?;
        self.start_servers()?;
        self.start_control().context("the API server did not come up")?;
        self.start_nodes().context("the nodes did not come up")
    }

    /// Writes down where nodes' files will be, before they are.
    pub(crate) fn claim_disk(&mut self, disk: &Path) -> Result<()> {
        ensure!(!disk.exists(), "{} is there already and not this lab's", disk.display());
        self.state.disk = Some(disk.to_owned());
        self.state.save()
    }

    /// Writes down a group of processes, and makes it.
    pub(crate) fn claim_cgroup(&mut self, group: &str) -> Result<()> {
        self.state.cgroups.push(group.to_owned());
        self.state.save()?;
        crate::kubelet::create_cgroup(group)
    }

    /// The lab's own binary.
    pub(crate) fn binary(&self) -> &Path {
        &self.lab
    }

    /// Starts all of the product, and waits until it is ready.
    ///
    /// # Errors
    /// In one sentence, what did not start.
    pub fn start_product(&mut self) -> Result<()> {
        // Gateways first and together: a pair goes to the first of its candidates that lives when the others look for
        // it, and on a busy machine one that starts seconds later than its peer comes too late.
        let gateways: Vec<String> = self.state.scenario.gateways.iter().map(|g| g.name.clone()).collect();
        for name in &gateways {
            self.start(name)?;
        }
        for name in &gateways {
            self.wait_answers(name, "/healthz", READY_LIMIT)?;
        }
        for name in self.product_names().iter().filter(|n| !gateways.contains(n)) {
            self.start(name)?;
        }
        for name in self.product_names() {
            self.wait_ready(&name, READY_LIMIT)?;
        }
        Ok(())
    }

    /// Attaches a program of somebody else first on every pod's interface; `name` tells it from other such programs.
    ///
    /// # Errors
    /// When the kernel refuses, or the name is taken.
    pub fn attach_foreign(&self, name: &str) -> Result<()> {
        let scenario = &self.state.scenario;
        for node in &scenario.nodes {
            let pods = scenario.pods.iter().filter(|p| p.node == node.name);
            let devices: Vec<String> = pods.map(|p| world::veth(scenario, p)).collect();
            let pins = self.layout.bpffs().join(name).join(&node.name);
            foreign::attach(&self.state.netns(&node.name), &devices, &pins)?;
        }
        Ok(())
    }

    /// One BPF filesystem for all nodes of this instance; unmounting it lets go of every pin.
    fn mount_bpffs(&mut self) -> Result<()> {
        let path = self.layout.bpffs();
        self.state.bpffs = Some(path.clone());
        self.state.save()?;
        nix::mount::mount(Some("bpf"), &path, Some("bpf"), nix::mount::MsFlags::empty(), None::<&str>)
            .context("this kernel has no BPF filesystem")
    }

    fn resolv_conf(&self, namespace: &str) -> PathBuf {
        self.layout.folder.join("config").join(format!("resolv.{namespace}.conf"))
    }

    fn start_servers(&mut self) -> Result<()> {
        let scenario = self.state.scenario.clone();
        let authority = Authority::new(INTERNET_CA)?;
        let certificate = authority.write(&self.layout.ca(), "internet", true)?;
        let signer = Some((certificate.clone(), certificate.with_extension("key")));
        let serve = self.layout.folder.join("serve");

        let servers = scenario.internet.resolvers.iter().chain(&scenario.internet.public_resolvers);
        let zone = Zone {
            suffixes: vec![String::new()],
            names: scenario.internet.names.clone(),
            any_name: scenario.internet.any_name.clone(),
        };
        let internet_dns = serve::Dns {
            addresses: servers.map(|ip| SocketAddr::new(*ip, 53)).collect(),
            zone: serve.join("internet.zone.json"),
            forward: None,
            log: serve.join("internet.queries.jsonl"),
        };
        state::replace(&internet_dns.zone, &serde_json::to_vec_pretty(&zone)?)?;
        let mut jobs = vec![("internet".to_owned(), scenario.internet.listen.clone(), Some(internet_dns))];

        if !self.has_kubelets() {
            let key = scenario.pod(&scenario.cluster_dns)?.key();
            let cluster_dns = serve::Dns {
                addresses: scenario.cluster_dns_servers(),
                zone: serve.join("cluster.zone.json"),
                forward: scenario.internet.resolvers.first().map(|ip| SocketAddr::new(*ip, 53)),
                log: serve.join("cluster.queries.jsonl"),
            };
            state::replace(&cluster_dns.zone, &serde_json::to_vec_pretty(&cluster_zone(&scenario)?)?)?;
            jobs.push((key, Listen::default(), Some(cluster_dns)));
        }
        jobs.extend(scenario.pods.iter().filter(|p| !p.listen.is_empty()).map(|p| (p.key(), p.listen.clone(), None)));

        if scenario.hosts.dns_daemons {
            let nodes = scenario.nodes.iter().filter(|n| scenario.is_gateway_node(n));
            for node in nodes {
                jobs.push((node.name.clone(), Listen::default(), Some(daemon(&scenario, node, &serve)?)));
            }
        }

        let mut waiting = Vec::new();
        for (place, listen, dns) in jobs {
            let file = place.replace('/', ".");
            let ready = serve.join(format!("{file}.ready"));
            let config = serve.join(format!("{file}.json"));
            let value = serve::Config { ready: ready.clone(), listen, authority: signer.clone(), dns };
            fs::write(&config, serde_json::to_vec_pretty(&value)?)?;
            let name = format!("serve {place}");
            let mut command = Command::new(&self.lab);
            command.arg("serve").arg(&config);
            let process = self.launch(&name, &self.state.netns(&place), command)?;
            waiting.push((process, ready));
        }
        for (process, ready) in waiting {
            let up = wait_for(SERVE_LIMIT, || (ready.exists() || !process.is_alive()).then(|| ready.exists()));
            ensure!(up == Some(true), "`{}` does not serve: {}", process.name, self.last_words(&process.name));
        }
        Ok(())
    }

    /// Starts a long-running process, its output appended to its log.
    pub(crate) fn launch(&mut self, name: &str, netns: &str, command: Command) -> Result<Process> {
        self.launch_with(name, netns, None, command)
    }

    /// As [`Lab::launch`], with a resolv.conf of its own.
    fn launch_with(&mut self, name: &str, netns: &str, resolv: Option<&Path>, mut command: Command) -> Result<Process> {
        self.prepare(name, &mut command)?;
        let child = netns::spawn(netns, resolv, &mut command)?;
        self.launched(name, child.id())
    }

    /// As [`Lab::launch`], in the network namespace of this process.
    pub(crate) fn launch_here(&mut self, name: &str, mut command: Command) -> Result<Process> {
        self.prepare(name, &mut command)?;
        let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        self.launched(name, child.id())
    }

    fn prepare(&self, name: &str, command: &mut Command) -> Result<()> {
        let log = File::options().create(true).append(true).open(self.layout.log(name))?;
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .current_dir("/")
            .env(MARKER, &self.state.name)
            // A group of its own: Ctrl-C at the terminal is for the lab, which then stops it in order.
            .process_group(0);
        Ok(())
    }

    fn launched(&mut self, name: &str, pid: u32) -> Result<Process> {
        self.state.add_process(name, pid).with_context(|| self.last_words(name))?;
        self.state.processes.last().cloned().context("no process was recorded")
    }

    /// The end of a process's log.
    pub(crate) fn last_words(&self, name: &str) -> String {
        let log = fs::read_to_string(self.layout.log(name)).unwrap_or_default();
        let lines: Vec<&str> = log.lines().rev().filter(|l| !l.trim().is_empty()).take(3).collect();
        let words = lines.into_iter().rev().collect::<Vec<_>>().join(" | ");
        if words.is_empty() { format!("{} is empty", self.layout.log(name).display()) } else { words }
    }

    pub(crate) fn state_mut(&mut self) -> &mut State {
        &mut self.state
    }

    pub(crate) fn told(&self) -> &AtomicBool {
        &self.told
    }

    /// Names of the product's processes: nodes for agents, then gateways.
    pub fn product_names(&self) -> Vec<String> {
        if self.state.scenario.tidegate.is_none() {
            return Vec::new();
        }
        let nodes = self.state.scenario.nodes.iter().map(|n| n.name.clone());
        nodes.chain(self.state.scenario.gateways.iter().map(|g| g.name.clone())).collect()
    }

    /// Starts a process of the product: an agent by its node's name, a gateway by its own.
    ///
    /// # Errors
    /// When there is none of this name or it ends at once.
    pub fn start(&mut self, name: &str) -> Result<()> {
        self.start_with(name, &[])
    }

    /// As [`Lab::start`], with more in its environment.
    ///
    /// # Errors
    /// As [`Lab::start`].
    pub fn start_with(&mut self, name: &str, environment: &[(&str, &str)]) -> Result<()> {
        let role = if self.state.scenario.node(name).is_ok() { "agent" } else { "gateway" };
        let netns = self.place(name)?.netns;
        let mut command = Command::new(&self.tidegate);
        command.arg(role).arg("--config").arg(self.layout.config(name)).envs(environment.iter().copied());
        let pod = role == "agent" && self.has_kubernetes();
        if pod {
            self.mount_trust()?;
        }
        // Agents are pods on the host's network with `dnsPolicy: ClusterFirstWithHostNet`: they find gateways by name.
        let resolv = pod.then(|| self.resolv_conf(SYSTEM_NAMESPACE));
        self.launch_with(name, &netns, resolv.as_deref(), command)?;
        Ok(())
    }

    /// Waits until a process of the product says that it is ready.
    ///
    /// # Errors
    /// What it said last.
    pub fn wait_ready(&self, name: &str, limit: Duration) -> Result<()> {
        self.wait_answers(name, "/readyz", limit)
    }

    /// Waits until a path of a process's admin port answers with 200; one that has ended is not waited for.
    fn wait_answers(&self, name: &str, path: &str, limit: Duration) -> Result<()> {
        let process = self.process(name)?;
        let mut last = String::from("it does not listen");
        let ready = wait_for(limit, || {
            if !process.is_alive() {
                return Some(false);
            }
            match self.admin(name, path) {
                Ok((200, _)) => Some(true),
                Ok((status, body)) => {
                    last = format!("{path} says {status} {}", body.trim());
                    None
                }
                Err(_) => None,
            }
        });
        match ready {
            Some(true) => Ok(()),
            Some(false) => bail!("{name} ended: {}", self.last_words(name)),
            None => bail!("{name} is not ready: {last}; its log ends with: {}", self.last_words(name)),
        }
    }

    /// Sends a signal to a process of the product; with `wait`, returns when it has ended.
    ///
    /// # Errors
    /// When there is none of this name, or it does not end within that time.
    pub fn signal(&self, name: &str, signal: Signal, wait: Option<Duration>) -> Result<()> {
        let process = self.process(name)?;
        process.signal(signal);
        if let Some(limit) = wait {
            ensure!(process.wait(limit), "{name} did not end within {limit:?} of {signal}");
            process.reap();
        }
        Ok(())
    }

    /// Ends a process of the product with SIGTERM and starts it anew.
    ///
    /// # Errors
    /// When it does not end or does not become ready.
    pub fn restart(&mut self, name: &str) -> Result<()> {
        self.signal(name, Signal::SIGTERM, Some(Duration::from_secs(35)))?;
        self.start(name)?;
        self.wait_ready(name, READY_LIMIT)
    }

    /// A recorded process.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn process(&self, name: &str) -> Result<&Process> {
        self.state.processes.iter().find(|p| p.name == name).with_context(|| format!("no process is called {name:?}"))
    }

    /// The product's binary.
    pub fn tidegate(&self) -> &Path {
        &self.tidegate
    }

    /// Every recorded process.
    pub fn processes(&self) -> &[Process] {
        &self.state.processes
    }

    /// The scenario, complete with chosen addresses.
    pub fn scenario(&self) -> &Scenario {
        &self.state.scenario
    }

    /// The instance's name.
    pub fn name(&self) -> &str {
        &self.state.name
    }

    /// Files and folders.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Certificate of the authority of the internet's servers.
    pub fn internet_ca(&self) -> PathBuf {
        self.layout.ca().join("internet.crt")
    }

    /// A place by name: `fabric`, `router`, `internet`, `control` with an API server, a node, a gateway, or a pod; of a pod that a
    /// kubelet runs, its network as long as its first container lives.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn place(&self, name: &str) -> Result<Place<'_>> {
        let scenario = &self.state.scenario;
        let control = name == kube::PLACE && self.has_kubernetes();
        let bare = control || matches!(name, "fabric" | "router" | "internet") || scenario.node(name).is_ok();
        if bare {
            return Ok(Place { lab: self, name: name.into(), netns: self.state.netns(name), resolv: None });
        }
        if self.has_kubelets() {
            return self.kubelets_place(name);
        }
        let pod = scenario.pod(name)?;
        Ok(Place {
            lab: self,
            name: pod.key(),
            netns: self.state.netns(&pod.key()),
            resolv: Some(self.resolv_conf(&pod.namespace)),
        })
    }

    /// A pod by name.
    ///
    /// # Panics
    /// When there is none of this name: for tests.
    #[expect(clippy::expect_used, reason = "a test names pods of its own scenario")]
    pub fn pod(&self, name: &str) -> Place<'_> {
        self.place(name).expect("the scenario has this pod")
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.owned {
            return;
        }
        if std::env::var_os("TIDEGATE_LAB_KEEP").is_some() {
            eprintln!("the lab {0} stays: `tidegate-lab down --name {0}` ends it", self.state.name);
            return;
        }
        if let Err(e) = self.state.tear_down() {
            eprintln!("the lab {} did not go down cleanly: {e:#}", self.state.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_told_from_folders() {
        assert!(is_mount(Path::new("/proc")));
        assert!(!is_mount(Path::new("/proc/self")));
    }
}
