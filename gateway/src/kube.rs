//! The thread that speaks to the API server: one runtime for every task that does.
//!
//! It is apart from the others: what hangs there holds up no packet, no answer and no node.

use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use tidegate_api::index::Feed;
use tidegate_kubernetes::watch::{Change, Watched, watch};
use tidegate_kubernetes::{Connection, Settings};
use tokio::runtime::{Handle, Runtime};
use tokio::sync::{mpsc, oneshot};

use crate::config::{Config, Kubernetes};
use crate::source::kubernetes::lists;

/// The running thread. Its tasks end when it is dropped.
pub struct Kube {
    runtime: Handle,
    connection: Arc<Connection>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Kube {
    /// Reads the credentials and starts the thread. Nothing is sent yet: the API server may be away.
    ///
    /// # Errors
    /// When the credentials cannot be used, or the thread cannot be started.
    pub fn start(config: &Config, kubernetes: &Kubernetes, runtime: Runtime) -> Result<Self> {
        let settings = Settings {
            kubeconfig: kubernetes.kubeconfig.iter().cloned().collect(),
            context: None,
            namespace: kubernetes.namespace.clone(),
            service: kubernetes.service.clone(),
            name: config.name.clone(),
            node: config.node.clone(),
        };
        let connection = runtime.block_on(Connection::new(settings)).context("kubernetes")?;
        tracing::info!(namespace = connection.namespace, service = connection.service, "the source is Kubernetes");
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let body = move || {
            // The sender's end is the news. Tasks that wait end with the runtime.
            let _ = runtime.block_on(stopped);
            runtime.shutdown_background();
        };
        let thread = std::thread::Builder::new().name("kube".into()).spawn(body);
        let thread = Some(thread.context("cannot start the kube thread")?);
        Ok(Self { runtime: handle, connection: Arc::new(connection), stop: Some(stop), thread })
    }

    /// Follows everything that policy comes from: the changes, and how that goes.
    pub fn watch(&self, kubernetes: &Kubernetes) -> (mpsc::Receiver<Change<Feed>>, Watched<Feed>) {
        let (changes, watched, tasks) = watch(&self.connection.client, lists(kubernetes));
        for task in tasks {
            self.spawn(task);
        }
        (changes, watched)
    }

    /// The way to the API server.
    pub fn connection(&self) -> Connection {
        (*self.connection).clone()
    }

    /// The thread's runtime, for those who wait elsewhere for an answer.
    pub fn handle(&self) -> Handle {
        self.runtime.clone()
    }

    /// Runs a task on the thread until it ends, or the thread does. It must not block.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(task);
    }
}

impl Drop for Kube {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the kube thread has panicked");
        }
    }
}
