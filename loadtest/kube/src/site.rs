//! A control plane, described: the files that its servers read, and the commands that start them.
//!
//! Nothing runs here. [`crate::Cluster`] starts the servers on loopback; others may start them in a network namespace of
//! theirs, and find everything again from the folder alone.

use std::fs;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::{fmt, thread};

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;

use crate::certs::{self, Authority, Files};
use crate::tools::{Tool, tool};

/// The API server's port.
pub const API_PORT: u16 = 6443;
pub(crate) const ETCD_PORT: u16 = 2379;
pub(crate) const ETCD_PEER_PORT: u16 = 2380;
pub(crate) const CONTROLLERS_PORT: u16 = 10257;
/// Users of Kubernetes' own components.
const CONTROLLER_MANAGER: &str = "system:kube-controller-manager";
const SCHEDULER: &str = "system:kube-scheduler";
const PROXY: &str = "system:kube-proxy";
/// As whom the API server speaks to kubelets.
const KUBELET_CLIENT: &str = "kube-apiserver-kubelet-client";
/// Where a node keeps what it shows to the API server.
const NODE_FOLDER: &str = "/etc/kubernetes";

/// Where a control plane is.
#[derive(Clone, Debug)]
pub struct Addresses {
    /// What etcd and the controllers listen on; the API server reaches etcd by it.
    pub own: Ipv4Addr,
    /// What the API server listens on.
    pub bind: IpAddr,
    /// What its clients dial: the first one is in kubeconfigs, its certificate is good for each.
    pub clients: Vec<IpAddr>,
    /// What `default/kubernetes` names; of the family of the first service range, and never loopback.
    pub advertised: IpAddr,
    /// Where Services get addresses from, at most one range of each family.
    pub services: Vec<IpNet>,
}

/// The control plane of one folder.
#[derive(Clone, Debug)]
pub struct Site {
    folder: PathBuf,
    addresses: Addresses,
    kubelets: bool,
}

/// A node that gets certificates.
#[derive(Clone, Copy, Debug)]
pub struct NodeFiles<'a> {
    /// Its name.
    pub name: &'a str,
    /// Where its kubelet is reached.
    pub addresses: &'a [IpAddr],
    /// The folder that is its /etc; what it gets is in `kubernetes` there.
    pub etc: &'a Path,
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

    /// Feeds a child that was started with all three pipes, and waits for its end.
    ///
    /// # Errors
    /// When a pipe is missing or breaks. That the command failed is in the output.
    pub fn of(mut child: Child, stdin: &str) -> Result<Self> {
        let mut pipe = child.stdin.take().context("the command has no input")?;
        let out = thread::scope(|s| {
            // Beside the reading of its output, so that neither waits for the other. It may end without reading all.
            s.spawn(move || drop(pipe.write_all(stdin.as_bytes())));
            child.wait_with_output()
        })?;
        Ok(Self {
            ok: out.status.success(),
            stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
        })
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.stdout, self.stderr)
    }
}

impl Site {
    /// Describes the control plane of a folder that has its files already.
    pub fn new(folder: &Path, addresses: Addresses) -> Self {
        Self { folder: folder.to_owned(), addresses, kubelets: false }
    }

    /// The same with all that a cluster with kubelets has: ServiceAccounts in pods, kubelets that may touch their own pods
    /// alone, every controller.
    #[must_use]
    pub fn with_kubelets(self) -> Self {
        Self { kubelets: true, ..self }
    }

    /// Writes what the servers and the administrator show: certificates, the keys of tokens, the kubeconfig.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write_credentials(&self) -> Result<()> {
        self.sign_credentials().map(drop)
    }

    /// As [`Site::write_credentials`], for a cluster with kubelets: also what each node shows, into a folder that is the node's
    /// /etc, and what controllers and scheduler show.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write_cluster_credentials(&self, nodes: &[NodeFiles<'_>]) -> Result<()> {
        let authority = self.sign_credentials()?;
        for (user, group) in [(CONTROLLER_MANAGER, CONTROLLER_MANAGER), (SCHEDULER, SCHEDULER)] {
            let Files { certificate, key } = authority.client(user, group)?;
            let shows = format!("client-certificate: {}, client-key: {}", certificate.display(), key.display());
            self.write_kubeconfig(&self.component_kubeconfig(user), user, &shows)?;
        }
        // Bound to nothing by default: kubelets ask the API server whether it may.
        authority.client(KUBELET_CLIENT, "system:masters")?;
        let proxy = authority.client(PROXY, PROXY)?;
        for node in nodes {
            let user = format!("system:node:{}", node.name);
            let client = authority.client(&user, "system:nodes")?;
            let server = authority.server(&format!("kubelet-{}", node.name), &[node.name], node.addresses)?;
            let folder = node.etc.join("kubernetes");
            fs::create_dir_all(&folder)?;
            fs::copy(self.authority(), folder.join("ca.crt"))?;
            for (name, files) in [("client", &client), ("kubelet", &server), ("proxy", &proxy)] {
                fs::copy(&files.certificate, folder.join(format!("{name}.crt")))?;
                fs::copy(&files.key, folder.join(format!("{name}.key")))?;
            }
            for (file, user, pair) in [("kubelet.conf", user.as_str(), "client"), ("proxy.conf", PROXY, "proxy")] {
                let shows =
                    format!("client-certificate: {NODE_FOLDER}/{pair}.crt, client-key: {NODE_FOLDER}/{pair}.key");
                let text = kubeconfig(&self.url(), &format!("{NODE_FOLDER}/ca.crt"), user, &shows);
                fs::write(folder.join(file), text)?;
            }
        }
        Ok(())
    }

    /// Writes the administrator's kubeconfig for clients that dial another of the server's addresses.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_admin_kubeconfig(&self, path: &Path, server: IpAddr) -> Result<()> {
        let url = format!("https://{}", SocketAddr::new(server, API_PORT));
        let shows = format!("client-certificate: {}, client-key: {}", self.file("admin.crt"), self.file("admin.key"));
        Ok(fs::write(path, kubeconfig(&url, &self.authority().display().to_string(), "admin", &shows))?)
    }

    fn sign_credentials(&self) -> Result<Authority> {
        let authority = Authority::new(&self.folder)?;
        authority.server("etcd", &[], &[self.addresses.own.into()])?;
        let names =
            ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"];
        // The Service `kubernetes` has the first address of each range.
        let services = self.addresses.services.iter().map(first);
        let all: Vec<IpAddr> = self.addresses.clients.iter().copied().chain(services).collect();
        authority.server("kube-apiserver", &names, &all)?;
        certs::token_keys(&self.folder)?;
        // Members of this group may do everything, whatever RBAC says.
        let Files { certificate, key } = authority.client("admin", "system:masters")?;
        let user = format!("client-certificate: {}, client-key: {}", certificate.display(), key.display());
        self.write_kubeconfig(&self.kubeconfig(), "admin", &user)?;
        Ok(authority)
    }

    /// Writes the kubeconfig of a user who shows the token of a file, which clients read again when it changes.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_token_kubeconfig(&self, path: &Path, user: &str, token: &Path) -> Result<()> {
        self.write_kubeconfig(path, user, &format!("tokenFile: {}", token.display()))
    }

    fn write_kubeconfig(&self, path: &Path, user: &str, shows: &str) -> Result<()> {
        let text = kubeconfig(&self.url(), &self.authority().display().to_string(), user, shows);
        Ok(fs::write(path, text)?)
    }

    fn component_kubeconfig(&self, user: &str) -> PathBuf {
        self.folder.join(format!("{user}.kubeconfig"))
    }

    /// The certificate of the authority that signed the API server's.
    pub fn authority(&self) -> PathBuf {
        self.folder.join("ca.crt")
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.join("kubeconfig")
    }

    /// Where clients dial the API server.
    pub fn endpoint(&self) -> SocketAddr {
        let first = self.addresses.clients.first().copied();
        SocketAddr::new(first.unwrap_or_else(|| self.addresses.own.into()), API_PORT)
    }

    /// The API server's URL.
    pub fn url(&self) -> String {
        format!("https://{}", self.endpoint())
    }

    /// Where everything lies.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub(crate) fn etcd_endpoint(&self) -> SocketAddr {
        SocketAddr::new(self.addresses.own.into(), ETCD_PORT)
    }

    pub(crate) fn controllers_endpoint(&self) -> SocketAddr {
        SocketAddr::new(self.addresses.own.into(), CONTROLLERS_PORT)
    }

    fn file(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    /// Starts etcd.
    ///
    /// # Errors
    /// When there is no such program.
    pub fn etcd(&self) -> Result<Command> {
        let clients = format!("https://{}", self.etcd_endpoint());
        let peers = format!("http://{}:{ETCD_PEER_PORT}", self.addresses.own);
        command(
            Tool::Etcd,
            [
                ("advertise-client-urls", clients.clone()),
                ("cert-file", self.file("etcd.crt")),
                ("client-cert-auth", "true".to_owned()),
                ("data-dir", self.file("etcd")),
                ("initial-advertise-peer-urls", peers.clone()),
                ("initial-cluster", format!("default={peers}")),
                ("key-file", self.file("etcd.key")),
                ("listen-client-urls", clients),
                ("listen-peer-urls", peers),
                ("log-level", "warn".to_owned()),
                ("trusted-ca-file", self.file("ca.crt")),
                // A test's data need not outlive a power failure.
                ("unsafe-no-fsync", "true".to_owned()),
            ],
        )
    }

    /// Starts the API server.
    ///
    /// # Errors
    /// When there is no such program.
    pub fn api_server(&self) -> Result<Command> {
        let services: Vec<String> = self.addresses.services.iter().map(ToString::to_string).collect();
        let admission = if self.kubelets {
            [
                ("enable-admission-plugins", "NodeRestriction".to_owned()),
                ("kubelet-certificate-authority", self.file("ca.crt")),
                ("kubelet-client-certificate", self.file(&format!("{KUBELET_CLIENT}.crt"))),
                ("kubelet-client-key", self.file(&format!("{KUBELET_CLIENT}.key"))),
                ("kubelet-preferred-address-types", "InternalIP".to_owned()),
            ]
            .to_vec()
        } else {
            [
                ("disable-admission-plugins", "ServiceAccount".to_owned()),
                ("enable-admission-plugins", "NodeRestriction".to_owned()),
            ]
            .to_vec()
        };
        let mut command = command(
            Tool::ApiServer,
            [
                ("advertise-address", self.addresses.advertised.to_string()),
                ("allow-privileged", "true".to_owned()),
                ("authorization-mode", "Node,RBAC".to_owned()),
                ("bind-address", self.addresses.bind.to_string()),
                ("client-ca-file", self.file("ca.crt")),
                ("etcd-cafile", self.file("ca.crt")),
                ("etcd-certfile", self.file("kube-apiserver.crt")),
                ("etcd-keyfile", self.file("kube-apiserver.key")),
                ("etcd-servers", format!("https://{}", self.etcd_endpoint())),
                ("secure-port", API_PORT.to_string()),
                ("service-account-issuer", "https://kubernetes.default.svc".to_owned()),
                ("service-account-key-file", self.file("tokens.pub")),
                ("service-account-signing-key-file", self.file("tokens.key")),
                ("service-cluster-ip-range", services.join(",")),
                ("tls-cert-file", self.file("kube-apiserver.crt")),
                ("tls-private-key-file", self.file("kube-apiserver.key")),
            ],
        )?;
        command.args(admission.iter().map(|(flag, value)| format!("--{flag}={value}")));
        Ok(command)
    }

    /// Starts every controller of a cluster with kubelets, each with the rights of its own account. Nodes say themselves
    /// which addresses their pods get.
    ///
    /// # Errors
    /// When there is no such program.
    pub fn all_controllers(&self) -> Result<Command> {
        command(
            Tool::ControllerManager,
            [
                ("bind-address", self.addresses.own.to_string()),
                ("cert-dir", self.folder.display().to_string()),
                ("cluster-signing-cert-file", self.file("ca.crt")),
                ("cluster-signing-key-file", self.file("ca.key")),
                ("kubeconfig", self.component_kubeconfig(CONTROLLER_MANAGER).display().to_string()),
                ("leader-elect", "false".to_owned()),
                ("root-ca-file", self.file("ca.crt")),
                ("secure-port", CONTROLLERS_PORT.to_string()),
                ("service-account-private-key-file", self.file("tokens.key")),
                ("use-service-account-credentials", "true".to_owned()),
            ],
        )
    }

    /// Starts the scheduler.
    ///
    /// # Errors
    /// When there is no such program.
    pub fn scheduler(&self) -> Result<Command> {
        command(
            Tool::Scheduler,
            [
                ("bind-address", self.addresses.own.to_string()),
                ("cert-dir", self.folder.display().to_string()),
                ("kubeconfig", self.component_kubeconfig(SCHEDULER).display().to_string()),
                ("leader-elect", "false".to_owned()),
            ],
        )
    }

    /// Starts controllers of kube-controller-manager, by their names.
    ///
    /// # Errors
    /// When there is no such program.
    pub fn controllers(&self, names: &[&str]) -> Result<Command> {
        command(
            Tool::ControllerManager,
            [
                ("bind-address", self.addresses.own.to_string()),
                ("cert-dir", self.folder.display().to_string()),
                ("controllers", names.join(",")),
                ("kubeconfig", self.kubeconfig().display().to_string()),
                ("leader-elect", "false".to_owned()),
                ("secure-port", CONTROLLERS_PORT.to_string()),
            ],
        )
    }

    /// kubectl as the administrator, its pipes ready for [`Output::of`].
    ///
    /// # Errors
    /// When there is no such program.
    pub fn kubectl(&self, args: &[&str]) -> Result<Command> {
        let mut command = Command::new(tool(Tool::Kubectl)?);
        command
            .args(args)
            .env("KUBECONFIG", self.kubeconfig())
            .env("KUBECACHEDIR", self.folder.join("kubectl"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Ok(command)
    }

    /// Starts kubectl's proxy on a Unix socket, for [`crate::Api`].
    ///
    /// # Errors
    /// When there is no such program.
    pub fn proxy(&self, socket: &Path) -> Result<Command> {
        let mut command = self.kubectl(&["proxy", "--unix-socket"])?;
        command.arg(socket);
        Ok(command)
    }
}

/// The first address of a range after the network's own.
fn first(range: &IpNet) -> IpAddr {
    match range {
        IpNet::V4(r) => IpAddr::V4((u32::from(r.network()) + 1).into()),
        IpNet::V6(r) => IpAddr::V6((u128::from(r.network()) + 1).into()),
    }
}

fn kubeconfig(url: &str, authority: &str, user: &str, shows: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: '{user}'\n\
         clusters: [{{name: tidegate-kube, cluster: {{server: '{url}', certificate-authority: {authority}}}}}]\n\
         users: [{{name: '{user}', user: {{{shows}}}}}]\n\
         contexts: [{{name: '{user}', context: {{cluster: tidegate-kube, user: '{user}'}}}}]\n"
    )
}

fn command<const N: usize>(program: Tool, flags: [(&str, String); N]) -> Result<Command> {
    let mut command = Command::new(tool(program)?);
    command.args(flags.iter().map(|(flag, value)| format!("--{flag}={value}")));
    Ok(command)
}
