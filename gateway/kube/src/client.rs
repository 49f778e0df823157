//! The way to the API server.

use std::path::PathBuf;
use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

/// A connection must be there within this time.
const CONNECT: Duration = Duration::from_secs(5);
/// The API server must take what is sent within this time.
const WRITE: Duration = Duration::from_secs(10);
/// A request that is no watch must be answered within this time.
const ANSWER: Duration = Duration::from_secs(15);

/// What went wrong with the API server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kubeconfig cannot be used.
    #[error("the kubeconfig {path} cannot be used: {source}")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<kube::config::KubeconfigError>,
    },
    /// This is no pod, or one without a ServiceAccount.
    #[error("there is no kubeconfig, and the pod's ServiceAccount cannot be used: {0}")]
    InCluster(Box<kube::config::InClusterError>),
    /// The client or the API server said no.
    #[error(transparent)]
    Client(#[from] kube::Error),
    /// No answer in time.
    #[error("the API server did not answer within {} s", ANSWER.as_secs())]
    Timeout,
    /// Another gateway may lead now.
    #[error("this gateway leads no more")]
    Deposed,
    /// What it sent broke off, or was an error.
    #[error("the API server's stream broke: {0}")]
    Broken(String),
}

impl Error {
    /// The status of HTTP with which the API server refused, such as 404 or 409.
    pub fn code(&self) -> Option<u16> {
        match self {
            Error::Client(kube::Error::Api(status)) => Some(status.code),
            _ => None,
        }
    }
}

/// Who this gateway is to Kubernetes, and how it gets there.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// A kubeconfig; absent: the pod's own ServiceAccount.
    pub kubeconfig: Option<PathBuf>,
    /// The gateways' namespace; absent: the pod's own, or that of the kubeconfig's context.
    pub namespace: Option<String>,
    /// The gateways' headless Service.
    pub service: String,
    /// This gateway's pod.
    pub name: String,
    /// Its node.
    pub node: String,
}

/// A client of the API server, and who it speaks for. Cheap to clone.
#[derive(Clone)]
pub struct Connection {
    /// The client. Requests through it have no timeout of their own: see [`within`].
    pub client: Client,
    /// The namespace of the gateways, their Service, Secret, ConfigMap and Lease.
    pub namespace: String,
    /// The gateways' headless Service.
    pub service: String,
    /// This gateway's pod.
    pub name: String,
    /// Its node.
    pub node: String,
}

impl Connection {
    /// Reads the credentials. Nothing is sent: the API server may be away. Needs a runtime of tokio around it.
    ///
    /// # Errors
    /// When there are no credentials, or they cannot be used.
    pub async fn new(settings: Settings) -> Result<Self, Error> {
        let mut config = match settings.kubeconfig {
            Some(path) => {
                let refused = |source| Error::Kubeconfig { path: path.clone(), source: Box::new(source) };
                let read = Kubeconfig::read_from(&path).map_err(refused)?;
                Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await.map_err(refused)?
            }
            None => Config::incluster().map_err(|e| Error::InCluster(Box::new(e)))?,
        };
        config.connect_timeout = Some(CONNECT);
        config.write_timeout = Some(WRITE);
        // Watches are silent for a minute and more; they and other requests have limits of their own.
        config.read_timeout = None;
        let agent = concat!("tidegate/", env!("CARGO_PKG_VERSION"));
        config.headers.push((http::header::USER_AGENT, http::HeaderValue::from_static(agent)));
        let namespace = settings.namespace.unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config)?;
        Ok(Self { client, namespace, service: settings.service, name: settings.name, node: settings.node })
    }
}

/// Waits for the answer to a request, but not for ever.
///
/// # Errors
/// The request's own, and [`Error::Timeout`] after 15 s.
pub async fn within<T>(request: impl Future<Output = Result<T, kube::Error>>) -> Result<T, Error> {
    match tokio::time::timeout(ANSWER, request).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(Error::Timeout),
    }
}
