//! etcd and kube-apiserver on a loopback address of their own.

use std::collections::hash_map::RandomState;
use std::fs;
use std::hash::BuildHasher;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ipnet::{IpNet, Ipv4Net};
use serde_json::Value;

use crate::api::Api;
use crate::process::Server;
use crate::site::{API_PORT, Addresses, ETCD_PEER_PORT, ETCD_PORT, Output, Site};
use crate::tools::{Tool, tool};

/// How long a server may take until it answers. It is ready in 3 s on an idle machine; others may be busy.
const READY: Duration = Duration::from_secs(120);
/// The addresses of Services.
const SERVICES: IpNet = IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(10, 96, 0, 0), 16));
/// What `default/kubernetes` names as the API server: endpoints may not be loopback. Nothing listens there (RFC 5737).
const ADVERTISED: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// The socket of kubectl's proxy, in a cluster's folder.
const PROXY: &str = "proxy";
/// Folders of clusters are `PREFIX-PID-NUMBER`, so that those of dead processes are known.
const PREFIX: &str = "tidegate-kube";

/// A running API: etcd and kube-apiserver, with RBAC, without controllers, scheduler and nodes.
///
/// ServiceAccount admission is off, since nobody makes the accounts: pods can be created as they are. Everything goes
/// when the cluster is dropped, and with this process.
#[derive(Debug)]
pub struct Cluster {
    site: Site,
    // Dropped in this order.
    _proxy: Server,
    api_server: Mutex<Option<Server>>,
    etcd: Mutex<Option<Server>>,
    folder: Folder,
}

/// Running controllers; ended when dropped.
#[derive(Debug)]
pub struct Controllers {
    _server: Server,
}

impl Cluster {
    /// Starts a cluster and waits until it answers.
    ///
    /// # Errors
    /// When a program is missing, or does not come up; with the end of its log.
    pub fn start() -> Result<Self> {
        sweep();
        let folder = Folder::new()?;
        // The address is nobody else's, so ports need not be searched.
        let own = free_address()?;
        let addresses = Addresses {
            own,
            bind: own.into(),
            clients: vec![own.into()],
            advertised: ADVERTISED.into(),
            services: vec![SERVICES],
        };
        let site = Site::new(&folder.0, addresses);
        site.write_credentials()?;
        let proxy = start_proxy(&site, &folder.0)?;
        let this = Self { site, _proxy: proxy, api_server: Mutex::new(None), etcd: Mutex::new(None), folder };
        this.start_etcd()?;
        this.start_api_server()?;
        Ok(this)
    }

    /// The cluster that the tests of this process share; started by the first that asks, gone with the last that
    /// holds it. Whoever uses it keeps to namespaces and names of his own.
    ///
    /// # Errors
    /// As [`Cluster::start`].
    pub fn shared() -> Result<Arc<Self>> {
        static SHARED: Mutex<Weak<Cluster>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cluster) = shared.upgrade() {
            return Ok(cluster);
        }
        let cluster = Arc::new(Self::start()?);
        *shared = Arc::downgrade(&cluster);
        Ok(cluster)
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.site.kubeconfig()
    }

    /// The API server's URL.
    pub fn url(&self) -> String {
        self.site.url()
    }

    /// Where everything of this cluster lies; logs are `etcd.log` and `kube-apiserver.log`.
    pub fn folder(&self) -> &Path {
        &self.folder.0
    }

    /// Process ids of etcd and, while it runs, the API server.
    pub fn pids(&self) -> Vec<u32> {
        let api_server = self.api_server.lock().unwrap_or_else(PoisonError::into_inner);
        let etcd = self.etcd.lock().unwrap_or_else(PoisonError::into_inner);
        etcd.iter().chain(api_server.as_ref()).map(Server::pid).collect()
    }

    /// Puts the committed definitions of Tidegate's kinds into the cluster, and waits until they hold. Again it changes
    /// nothing.
    ///
    /// # Errors
    /// What kubectl said.
    pub fn define(&self) -> Result<()> {
        let definitions = concat!(env!("CARGO_MANIFEST_DIR"), "/../../helm/tidegate/files/crds");
        let api = self.api();
        let mut paths = Vec::new();
        for file in fs::read_dir(definitions).context(definitions)? {
            let file = file?.path();
            // Files are called as what they define.
            let name = file.file_stem().and_then(|s| s.to_str()).context("a definition's name is not UTF-8")?;
            let path = format!("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}");
            api.apply(&path, &fs::read_to_string(&file)?)?;
            paths.push(path);
        }
        let deadline = Instant::now() + READY;
        for path in paths {
            while !is_established(&api.send("GET", &path, &[], "")?.body)? {
                anyhow::ensure!(Instant::now() < deadline, "{path} is not established");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }

    /// Runs kubectl as the administrator, with `stdin`. `--as USER` and `--as-group GROUP` make it somebody else.
    ///
    /// # Errors
    /// When kubectl cannot be run. That it failed is in the output.
    pub fn kubectl(&self, args: &[&str], stdin: &str) -> Result<Output> {
        Output::of(self.site.kubectl(args)?.spawn().context("cannot run kubectl")?, stdin)
    }

    /// A way to speak to the API as the administrator, without a client: for tests that ask often. Good as long as the cluster.
    pub fn api(&self) -> Api {
        Api::at(self.folder.0.join(PROXY))
    }

    /// Runs controllers of kube-controller-manager, by their names. They end when the guard is dropped.
    ///
    /// # Errors
    /// When it does not come up; with the end of its log.
    pub fn start_controllers(&self, names: &[&str]) -> Result<Controllers> {
        let log = self.folder.0.join("kube-controller-manager.log");
        let mut server = Server::start("kube-controller-manager", self.site.controllers(names)?, log)?;
        let address = self.site.controllers_endpoint();
        wait(&mut server, || Ok(TcpStream::connect(address).map(drop).map_err(|e| e.to_string())))?;
        Ok(Controllers { _server: server })
    }

    fn start_etcd(&self) -> Result<()> {
        let mut server = Server::start("etcd", self.site.etcd()?, self.folder.0.join("etcd.log"))?;
        let address = self.site.etcd_endpoint();
        wait(&mut server, || Ok(TcpStream::connect(address).map(drop).map_err(|e| e.to_string())))?;
        *self.etcd.lock().unwrap_or_else(PoisonError::into_inner) = Some(server);
        Ok(())
    }

    fn stop_etcd(&self) {
        drop(self.etcd.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Takes a backup of all that is stored. Both servers are away meanwhile.
    ///
    /// # Errors
    /// When it cannot be copied, or they do not come up again.
    pub fn back_up(&self) -> Result<Backup> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        self.stop_api_server();
        self.stop_etcd();
        let copy = self.folder.0.join(format!("backup-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        copy_folder(&self.folder.0.join("etcd"), &copy)?;
        self.start_etcd()?;
        self.start_api_server()?;
        Ok(Backup(copy))
    }

    /// Puts a backup in the place of what is stored: versions go back, and are given again to other changes. Both servers are
    /// away meanwhile.
    ///
    /// # Errors
    /// When it cannot be copied, or they do not come up again.
    pub fn restore(&self, backup: &Backup) -> Result<()> {
        self.stop_api_server();
        self.stop_etcd();
        let data = self.folder.0.join("etcd");
        fs::remove_dir_all(&data).context("cannot remove what was stored")?;
        copy_folder(&backup.0, &data)?;
        self.start_etcd()?;
        self.start_api_server()
    }

    /// Runs cert-manager's controllers of Certificates, and of issuers that sign by themselves or with a given authority. They end
    /// when the guard is dropped.
    ///
    /// # Errors
    /// When its definitions are not taken, or it does not start.
    pub fn start_cert_manager(&self) -> Result<Controllers> {
        let program = tool(Tool::CertManager)?;
        let definitions = program.with_extension("yaml");
        let definitions = definitions.to_str().context("the cache's path is not UTF-8")?;
        self.kubectl(&["apply", "--server-side", "-f", definitions], "")?.success()?;
        self.kubectl(&["wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"], "")?.success()?;
        let mut command = Command::new(program);
        command.arg(self.kubeconfig());
        Ok(Controllers { _server: Server::start("cert-manager", command, self.folder.0.join("cert-manager.log"))? })
    }

    /// Kills the API server, as an outage does. What it stored stays.
    pub fn stop_api_server(&self) {
        drop(self.api_server.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Starts the API server again, at the same address, and waits until it answers.
    ///
    /// # Errors
    /// When it does not come up; with the end of its log.
    pub fn start_api_server(&self) -> Result<()> {
        let command = self.site.api_server()?;
        let mut slot = self.api_server.lock().unwrap_or_else(PoisonError::into_inner);
        let mut server = Server::start("kube-apiserver", command, self.folder.0.join("kube-apiserver.log"))?;
        // A kubectl for each look would cost more than the server's own start.
        let api = self.api();
        wait(&mut server, || Ok(api.ready().map_err(|e| format!("{e:#}"))))?;
        *slot = Some(server);
        Ok(())
    }
}

/// Of what a cluster stored; goes with it.
#[derive(Debug)]
pub struct Backup(PathBuf);

fn start_proxy(site: &Site, folder: &Path) -> Result<Server> {
    let socket = folder.join(PROXY);
    let mut server = Server::start("kubectl proxy", site.proxy(&socket)?, folder.join("proxy.log"))?;
    wait(&mut server, || Ok(UnixStream::connect(&socket).map(drop).map_err(|e| e.to_string())))?;
    Ok(server)
}

/// Whether objects of the definition can be made.
fn is_established(definition: &str) -> Result<bool> {
    let definition: Value = serde_json::from_str(definition).context("a definition is not JSON")?;
    let conditions = definition["status"]["conditions"].as_array();
    Ok(conditions.into_iter().flatten().any(|c| c["type"] == "Established" && c["status"] == "True"))
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    let said = Command::new("cp").arg("-a").args([from, to]).status().context("cannot run cp")?;
    anyhow::ensure!(said.success(), "cp of {} ended with {said}", from.display());
    Ok(())
}

/// Waits until a server is ready, or has ended, or has had its time.
fn wait(server: &mut Server, mut ready: impl FnMut() -> Result<Result<(), String>>) -> Result<()> {
    let deadline = Instant::now() + READY;
    loop {
        // Before the question: an ended server's address may answer for somebody else.
        if let Some(status) = server.ended()? {
            bail!("it ended with {status}; {}", server.tail());
        }
        let Err(why) = ready()? else { return Ok(()) };
        if Instant::now() > deadline {
            bail!("it is not ready after {} s: {}; {}", READY.as_secs(), why.trim(), server.tail());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A loopback address that nobody uses: one of 16 million, so that no ports need to be searched and nobody who takes
/// a free port comes between.
fn free_address() -> Result<Ipv4Addr> {
    for attempt in 0..16u32 {
        // A new `RandomState` has new random keys.
        let [a, b, c, ..] = RandomState::new().hash_one(attempt).to_be_bytes();
        let address = Ipv4Addr::new(127, a, b, c);
        let ports = [API_PORT, ETCD_PORT, ETCD_PEER_PORT];
        if address.octets() != [127, 0, 0, 1] && ports.iter().all(|p| TcpListener::bind((address, *p)).is_ok()) {
            return Ok(address);
        }
    }
    bail!(
        "ports {API_PORT}, {ETCD_PORT} and {ETCD_PEER_PORT} of loopback are taken: something listens on every address"
    )
}

/// The folder of a cluster; removed when dropped.
#[derive(Debug)]
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("{PREFIX}-{}-{number}", std::process::id()));
        // Keys lie in it, and it may not be anybody else's.
        fs::DirBuilder::new().mode(0o700).create(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Whatever stays is swept by the next cluster.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Removes the folders of processes that were killed before they could.
fn sweep() {
    let Ok(entries) = fs::read_dir(std::env::temp_dir()) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|n| n.strip_prefix(PREFIX)?.strip_prefix('-')?.split_once('-'));
        let pid: Option<u32> = pid.and_then(|(pid, _)| pid.parse().ok());
        if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            // Another process may sweep at the same time.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
