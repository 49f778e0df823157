//! What nodes tell of pods that start, on its way from their streams to the policy thread. Of each node the last word counts.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tidegate_api::index::Started;
use tidegate_proto::StartedPod;
use tokio::sync::Notify;

/// Cheap to clone.
#[derive(Clone, Default)]
pub struct Starts(Arc<Inner>);

#[derive(Default)]
struct Inner {
    news: Mutex<BTreeMap<String, Vec<Started>>>,
    told: Notify,
}

impl Starts {
    /// A node says which of its pods have started.
    pub fn tell(&self, node: &str, pods: Vec<StartedPod>) {
        let started = |p: StartedPod| Started { key: (p.namespace, p.pod), uid: p.uid, addresses: p.addresses };
        self.0.news.lock().insert(node.to_owned(), pods.into_iter().map(started).collect());
        self.0.told.notify_one();
    }

    /// What was told since, by node.
    pub fn take(&self) -> BTreeMap<String, Vec<Started>> {
        std::mem::take(&mut self.0.news.lock())
    }

    /// Waits until something is told.
    pub async fn news(&self) {
        self.0.told.notified().await;
    }
}
