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
        /// The file, or the files, as `$KUBECONFIG` has them.
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
    /// Kubeconfigs; what the first of them has counts. None: the pod's own ServiceAccount.
    pub kubeconfig: Vec<PathBuf>,
    /// A context of theirs; absent: the current one.
    pub context: Option<String>,
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
        let files = settings.kubeconfig;
        let mut config = if files.is_empty() {
            Config::incluster().map_err(|e| Error::InCluster(Box::new(e)))?
        } else {
            let refused = |path: &PathBuf| {
                let path = path.clone();
                move |source| Error::Kubeconfig { path, source: Box::new(source) }
            };
            let mut read = Kubeconfig::default();
            for file in &files {
                read = Kubeconfig::read_from(file).and_then(|next| read.merge(next)).map_err(refused(file))?;
            }
            let all = files.iter().map(|f| f.display().to_string()).collect::<Vec<_>>().join(":").into();
            let options = KubeConfigOptions { context: settings.context, ..KubeConfigOptions::default() };
            Config::from_custom_kubeconfig(read, &options).await.map_err(refused(&all))?
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

#[cfg(test)]
mod tests {
    use super::*;

    fn file(folder: &std::path::Path, name: &str, current: &str, contexts: &[(&str, &str)]) -> PathBuf {
        let list: Vec<String> = contexts
            .iter()
            .map(|(context, namespace)| {
                format!("{{name: {context}, context: {{cluster: c, user: u, namespace: {namespace}}}}}")
            })
            .collect();
        let text = format!(
            "apiVersion: v1\nkind: Config\n{current}clusters: [{{name: c, cluster: {{server: 'http://127.0.0.1:1'}}}}]\n\
             users: [{{name: u, user: {{}}}}]\ncontexts: [{}]\n",
            list.join(", ")
        );
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    #[tokio::test]
    async fn several_kubeconfigs_are_one() {
        let folder = tempfile::tempdir().unwrap();
        let first = file(folder.path(), "a", "", &[("one", "of-one")]);
        let second = file(folder.path(), "b", "current-context: two\n", &[("one", "other"), ("two", "of-two")]);
        let namespace = async |files: &[&PathBuf], context: Option<&str>| {
            let kubeconfig = files.iter().map(|f| (*f).clone()).collect();
            let settings = Settings { kubeconfig, context: context.map(str::to_owned), ..Settings::default() };
            Connection::new(settings).await.map(|c| c.namespace).map_err(|e| e.to_string())
        };
        assert_eq!(namespace(&[&first, &second], None).await, Ok("of-two".into()));
        assert_eq!(namespace(&[&first, &second], Some("one")).await, Ok("of-one".into()));
        assert_eq!(namespace(&[&second, &first], Some("one")).await, Ok("other".into()));
        let refused = namespace(&[&first, &second], Some("three")).await.unwrap_err();
        assert!(refused.contains("/a:") && refused.contains("/b cannot be used: "), "{refused}");
        let none = folder.path().join("none");
        let refused = namespace(&[&first, &none], None).await.unwrap_err();
        assert!(refused.contains("/none cannot be used: "), "{refused}");
    }
}
