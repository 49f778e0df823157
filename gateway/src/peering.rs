//! Which other gateways there are streams from: they come and go with their pods.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use crossbeam_channel::Sender;
use tidegate_kubernetes::members::{self, Member};
use tidegate_kubernetes::{Connection, pools};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::core::ToCore;
use crate::kube::Kube;
use crate::peers::Client;

/// What may wait for the API server.
const COMMANDS: usize = 1024;
/// Time between two tries to tell a core that is overloaded.
const AGAIN: Duration = Duration::from_millis(100);

/// A client that runs.
struct Running {
    addresses: watch::Sender<Vec<SocketAddr>>,
    task: JoinHandle<()>,
}

/// Has who owns what recorded by the API server.
pub fn record(kube: &Kube, core: Sender<ToCore>) -> mpsc::Sender<pools::Command> {
    let (commands, rx) = mpsc::channel(COMMANDS);
    let Connection { client, name, .. } = kube.connection();
    // What a core that is too far behind does not hear is told again.
    let tell = move |event| drop(core.try_send(ToCore::Api(event)));
    kube.spawn(pools::run(client, name, rx, tell));
    commands
}

/// Follows who the gateways are, as the API server lists them.
pub fn follow(kube: &Kube, members: watch::Sender<Option<Vec<Member>>>) {
    let Connection { client, namespace, service, .. } = kube.connection();
    kube.spawn(async move {
        members::run(client, &namespace, &service, |all| drop(members.send_replace(Some(all)))).await;
    });
}

/// Keeps a client for each gateway but `me`. Where they are not those of the configuration the core is told who they are.
pub async fn keep(
    me: &str,
    mut members: watch::Receiver<Option<Vec<Member>>>,
    tell: bool,
    core: Sender<ToCore>,
    client: impl Fn(String, watch::Receiver<Vec<SocketAddr>>) -> Client,
) {
    let mut running: BTreeMap<String, Running> = BTreeMap::new();
    loop {
        let now = members.borrow_and_update().clone();
        if let Some(all) = now.as_ref().filter(|_| tell) {
            // Before anything comes from a new one.
            while core.try_send(ToCore::Members(all.clone())).is_err() {
                tokio::time::sleep(AGAIN).await;
            }
        }
        let now = now.unwrap_or_default();
        running.retain(|_, r| !r.task.is_finished());
        for (name, r) in &running {
            if now.iter().all(|m| m.name != *name) {
                r.addresses.send_replace(Vec::new());
            }
        }
        for m in now.into_iter().filter(|m| m.name != me && !m.addresses.is_empty()) {
            match running.get(&m.name) {
                Some(r) => drop(r.addresses.send_replace(m.addresses)),
                None => {
                    let (addresses, rx) = watch::channel(m.addresses);
                    let task = tokio::spawn(client(m.name.clone(), rx).run(core.clone()));
                    running.insert(m.name, Running { addresses, task });
                }
            }
        }
        if members.changed().await.is_err() {
            // Nobody tells of others any more: those that there are stay.
            std::future::pending::<()>().await;
        }
    }
}
