//! etcd and kube-apiserver on a loopback address of their own.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::fs;
use std::hash::BuildHasher;
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::api::Api;
use crate::certs::{self, Authority, Files};
use crate::process::Server;
use crate::tools::{Tool, tool};

/// The API server's port. The address is nobody else's, so ports need not be searched.
const API_PORT: u16 = 6443;
const ETCD_PORT: u16 = 2379;
const ETCD_PEER_PORT: u16 = 2380;
const CONTROLLERS_PORT: u16 = 10257;
/// How long a server may take until it answers. It is ready in 3 s on an idle machine; others may be busy.
const READY: Duration = Duration::from_secs(120);
/// The addresses of Services; the first is `kubernetes.default`.
const SERVICES: &str = "10.96.0.0/16";
/// The first address of [`SERVICES`].
const KUBERNETES: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
/// What `default/kubernetes` names as the API server: endpoints may not be loopback. Nothing listens there (RFC 5737).
const ADVERTISED: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// Folders of clusters are `PREFIX-PID-NUMBER`, so that those of dead processes are known.
const PREFIX: &str = "tidegate-kube";

/// A running API: etcd and kube-apiserver, with RBAC, without controllers, scheduler and nodes.
///
/// ServiceAccount admission is off, since nobody makes the accounts: pods can be created as they are. Everything goes
/// when the cluster is dropped, and with this process.
#[derive(Debug)]
pub struct Cluster {
    address: Ipv4Addr,
    kubectl: PathBuf,
    // Dropped in this order.
    api_server: Mutex<Option<Server>>,
    etcd: Server,
    folder: Folder,
}

/// Running controllers; ended when dropped.
#[derive(Debug)]
pub struct Controllers {
    _server: Server,
}

/// What a command said.
#[derive(Clone, Debug)]
pub struct Output {
    /// Whether it ended with 0.
    pub ok: bool,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Output {
    /// The standard output of a command that succeeded.
    ///
    /// # Errors
    /// With its standard error when it did not.
    pub fn success(self) -> Result<String> {
        ensure!(self.ok, "{}", self.stderr.trim());
        Ok(self.stdout)
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.stdout, self.stderr)
    }
}

impl Cluster {
    /// Starts a cluster and waits until it answers.
    ///
    /// # Errors
    /// When a program is missing, or does not come up; with the end of its log.
    pub fn start() -> Result<Self> {
        let (etcd, api_server, kubectl) = (tool(Tool::Etcd)?, tool(Tool::ApiServer)?, tool(Tool::Kubectl)?);
        sweep();
        let folder = Folder::new()?;
        let address = free_address()?;
        let authority = Authority::new(&folder.0)?;
        let etcd = start_etcd(&etcd, &folder.0, address, &authority)?;
        write_credentials(&folder.0, address, &authority)?;
        let this = Self { address, kubectl, api_server: Mutex::new(None), etcd, folder };
        this.start_api_server_from(&api_server)?;
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
        self.folder.0.join("kubeconfig")
    }

    /// The API server's URL.
    pub fn url(&self) -> String {
        format!("https://{}:{API_PORT}", self.address)
    }

    /// Where everything of this cluster lies; logs are `etcd.log` and `kube-apiserver.log`.
    pub fn folder(&self) -> &Path {
        &self.folder.0
    }

    /// Process ids of etcd and, while it runs, the API server.
    pub fn pids(&self) -> Vec<u32> {
        let api_server = self.api_server.lock().unwrap_or_else(PoisonError::into_inner);
        [self.etcd.pid()].into_iter().chain(api_server.as_ref().map(Server::pid)).collect()
    }

    /// Runs kubectl as the administrator, with `stdin`. `--as USER` and `--as-group GROUP` make it somebody else.
    ///
    /// # Errors
    /// When kubectl cannot be run. That it failed is in the output.
    pub fn kubectl(&self, args: &[&str], stdin: &str) -> Result<Output> {
        let mut child = Command::new(&self.kubectl)
            .args(args)
            .env("KUBECONFIG", self.kubeconfig())
            .env("KUBECACHEDIR", self.folder.0.join("kubectl"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run kubectl")?;
        let mut pipe = child.stdin.take().context("kubectl has no input")?;
        let out = std::thread::scope(|s| {
            // Beside the reading of its output, so that neither waits for the other. kubectl may end without reading all.
            s.spawn(move || drop(pipe.write_all(stdin.as_bytes())));
            child.wait_with_output()
        })?;
        Ok(Output {
            ok: out.status.success(),
            stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
        })
    }

    /// A way to speak to the API as the administrator, without a client: for tests that ask often.
    ///
    /// # Errors
    /// When kubectl's proxy does not come up.
    pub fn api(&self) -> Result<Api> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("proxy-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let socket = self.folder.0.join(&name);
        let mut command = Command::new(&self.kubectl);
        command.args(["proxy", "--unix-socket"]).arg(&socket).env("KUBECONFIG", self.kubeconfig());
        let mut server = Server::start("kubectl proxy", command, self.folder.0.join(format!("{name}.log")))?;
        wait(&mut server, || Ok(UnixStream::connect(&socket).map(drop).map_err(|e| e.to_string())))?;
        Ok(Api::new(server, socket))
    }

    /// Runs controllers of kube-controller-manager, by their names. They end when the guard is dropped.
    ///
    /// # Errors
    /// When it does not come up; with the end of its log.
    pub fn start_controllers(&self, names: &[&str]) -> Result<Controllers> {
        let mut command = Command::new(tool(Tool::ControllerManager)?);
        for (flag, value) in [
            ("bind-address", self.address.to_string()),
            ("cert-dir", self.folder.0.display().to_string()),
            ("controllers", names.join(",")),
            ("kubeconfig", self.kubeconfig().display().to_string()),
            ("leader-elect", "false".to_owned()),
            ("secure-port", CONTROLLERS_PORT.to_string()),
        ] {
            command.arg(format!("--{flag}={value}"));
        }
        let log = self.folder.0.join("kube-controller-manager.log");
        let mut server = Server::start("kube-controller-manager", command, log)?;
        let address = (self.address, CONTROLLERS_PORT);
        wait(&mut server, || Ok(TcpStream::connect(address).map(drop).map_err(|e| e.to_string())))?;
        Ok(Controllers { _server: server })
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
        self.start_api_server_from(&tool(Tool::ApiServer)?)
    }

    fn start_api_server_from(&self, program: &Path) -> Result<()> {
        let file = |name: &str| self.folder.0.join(name).display().to_string();
        let mut command = Command::new(program);
        for (flag, value) in [
            ("advertise-address", ADVERTISED.to_string()),
            ("allow-privileged", "true".to_owned()),
            ("authorization-mode", "Node,RBAC".to_owned()),
            ("bind-address", self.address.to_string()),
            ("client-ca-file", file("ca.crt")),
            ("disable-admission-plugins", "ServiceAccount".to_owned()),
            ("etcd-cafile", file("ca.crt")),
            ("etcd-certfile", file("kube-apiserver.crt")),
            ("etcd-keyfile", file("kube-apiserver.key")),
            ("etcd-servers", format!("https://{}:{ETCD_PORT}", self.address)),
            ("secure-port", API_PORT.to_string()),
            ("service-account-issuer", "https://kubernetes.default.svc".to_owned()),
            ("service-account-key-file", file("tokens.pub")),
            ("service-account-signing-key-file", file("tokens.key")),
            ("service-cluster-ip-range", SERVICES.to_owned()),
            ("tls-cert-file", file("kube-apiserver.crt")),
            ("tls-private-key-file", file("kube-apiserver.key")),
        ] {
            command.arg(format!("--{flag}={value}"));
        }
        let mut slot = self.api_server.lock().unwrap_or_else(PoisonError::into_inner);
        let mut server = Server::start("kube-apiserver", command, self.folder.0.join("kube-apiserver.log"))?;
        wait(&mut server, || {
            if TcpStream::connect((self.address, API_PORT)).is_err() {
                return Ok(Err("it does not listen".to_owned()));
            }
            // Namespaces that it makes itself come a moment after it says that it is ready.
            for args in [&["get", "--raw", "/readyz"][..], &["get", "namespaces", "default", "kube-system"]] {
                let out = self.kubectl(args, "")?;
                if !out.ok {
                    return Ok(Err(out.stderr));
                }
            }
            Ok(Ok(()))
        })?;
        *slot = Some(server);
        Ok(())
    }
}

fn start_etcd(program: &Path, folder: &Path, address: Ipv4Addr, authority: &Authority) -> Result<Server> {
    let Files { certificate, key } = authority.server("etcd", &[], &[address])?;
    let clients = format!("https://{address}:{ETCD_PORT}");
    let peers = format!("http://{address}:{ETCD_PEER_PORT}");
    let mut command = Command::new(program);
    for (flag, value) in [
        ("advertise-client-urls", clients.clone()),
        ("cert-file", certificate.display().to_string()),
        ("client-cert-auth", "true".to_owned()),
        ("data-dir", folder.join("etcd").display().to_string()),
        ("initial-advertise-peer-urls", peers.clone()),
        ("initial-cluster", format!("default={peers}")),
        ("key-file", key.display().to_string()),
        ("listen-client-urls", clients),
        ("listen-peer-urls", peers),
        ("log-level", "warn".to_owned()),
        ("trusted-ca-file", authority.certificate().display().to_string()),
        // A test's data need not outlive a power failure.
        ("unsafe-no-fsync", "true".to_owned()),
    ] {
        command.arg(format!("--{flag}={value}"));
    }
    let mut server = Server::start("etcd", command, folder.join("etcd.log"))?;
    wait(&mut server, || Ok(TcpStream::connect((address, ETCD_PORT)).map(drop).map_err(|e| e.to_string())))?;
    Ok(server)
}

/// Writes what the API server and its administrator show: certificates, the key of tokens, the kubeconfig.
fn write_credentials(folder: &Path, address: Ipv4Addr, authority: &Authority) -> Result<()> {
    let names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"];
    authority.server("kube-apiserver", &names, &[address, KUBERNETES])?;
    certs::token_keys(folder)?;
    // Members of this group may do everything, whatever RBAC says.
    let Files { certificate, key } = authority.client("admin", "system:masters")?;
    let kubeconfig = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: admin\n\
         clusters: [{{name: tidegate-kube, cluster: {{server: 'https://{address}:{API_PORT}', certificate-authority: {}}}}}]\n\
         users: [{{name: admin, user: {{client-certificate: {}, client-key: {}}}}}]\n\
         contexts: [{{name: admin, context: {{cluster: tidegate-kube, user: admin}}}}]\n",
        authority.certificate().display(),
        certificate.display(),
        key.display(),
    );
    Ok(fs::write(folder.join("kubeconfig"), kubeconfig)?)
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
