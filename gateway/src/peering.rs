//! What the API server says to the core of gateways and owners, and which other gateways there are streams from: they
//! come and go with their pods.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::Duration;

use parking_lot::Mutex;
use tidegate_kubernetes::Connection;
use tidegate_kubernetes::members::{self, Member};
use tidegate_kubernetes::pools::{self, Event};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::core::ToCore;
use crate::egress::live;
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

/// Tells the core what stands in pools. What it has no room for is kept, the latest of each pool, until there is room.
struct Teller {
    core: SyncSender<ToCore>,
    /// Bounded by the pools that there are.
    kept: Mutex<BTreeMap<String, Event>>,
}

impl Teller {
    fn tell(&self, event: Event) {
        let mut kept = self.kept.lock();
        // That the API server has answered it says again soon.
        let Event::Pool { name, .. } = &event else { return drop(self.core.try_send(ToCore::Api(event))) };
        // What is new goes over what is kept.
        kept.remove(name);
        let name = name.clone();
        if let Err(TrySendError::Full(ToCore::Api(event))) = self.core.try_send(ToCore::Api(event)) {
            kept.insert(name, event);
        }
    }

    /// Tells what is kept.
    fn flush(&self) {
        let mut kept = self.kept.lock();
        while let Some((name, event)) = kept.pop_first() {
            if let Err(TrySendError::Full(ToCore::Api(event))) = self.core.try_send(ToCore::Api(event)) {
                kept.insert(name, event);
                return;
            }
        }
    }
}

/// Has who owns what recorded by the API server, and nothing more while this gateway is `stale`.
pub fn record(kube: &Kube, core: SyncSender<ToCore>, stale: watch::Receiver<bool>) -> mpsc::Sender<pools::Command> {
    let (commands, rx) = mpsc::channel(COMMANDS);
    let Connection { client, name, .. } = kube.connection();
    let teller = Arc::new(Teller { core, kept: Mutex::default() });
    let tell = teller.clone();
    let run = pools::run(client, name, rx, stale, Arc::new(live::addresses), move |event| tell.tell(event));
    kube.spawn(async move {
        let again = async {
            loop {
                tokio::time::sleep(AGAIN).await;
                teller.flush();
            }
        };
        tokio::select! {
            () = run => {}
            () = again => {}
        }
    });
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
    core: SyncSender<ToCore>,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(name: &str, deleted: bool) -> Event {
        Event::Pool { name: name.into(), records: None, deleted }
    }

    fn told(rx: &std::sync::mpsc::Receiver<ToCore>) -> Vec<Event> {
        let event = |m| if let ToCore::Api(event) = m { event } else { panic!() };
        rx.try_iter().map(event).collect()
    }

    #[test]
    fn what_a_busy_core_has_no_room_for_is_told_when_there_is_room_and_once() {
        let (core, rx) = std::sync::mpsc::sync_channel(2);
        let teller = Teller { core, kept: Mutex::default() };
        teller.tell(pool("a", false));
        teller.tell(Event::Answered);
        for name in ["b", "b", "c"] {
            teller.tell(pool(name, false));
        }
        teller.tell(pool("b", true));
        teller.tell(Event::Answered);
        teller.flush();
        assert_eq!(told(&rx), [pool("a", false), Event::Answered]);
        // There is room: a newer one does not wait behind the older one, which is never told.
        teller.tell(pool("c", true));
        teller.flush();
        assert_eq!(told(&rx), [pool("c", true), pool("b", true)]);
        teller.flush();
        assert!(told(&rx).is_empty() && teller.kept.lock().is_empty());
    }
}
