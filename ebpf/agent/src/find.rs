//! Which gateways there are: those of the configuration, or whoever a DNS name leads to.
//!
//! An address that is new gets its streams at once. One that the name lost keeps them while they are up: a gateway that
//! ends says so itself. While the name cannot be resolved the known ones stay.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// The most gateways.
pub const MAX: usize = 64;
/// How often the name is resolved.
pub const EVERY: Duration = Duration::from_secs(5);
/// How long a question may take.
const ANSWER: Duration = Duration::from_secs(10);
/// How often an address whose gateway is connected elsewhere is looked at again.
const LOOK: Duration = Duration::from_millis(500);
/// After so long it is asked again who is there.
const LOOKS: u32 = 120;

/// At which address each gateway is connected. A gateway with an IPv4 and an IPv6 address is one gateway: its streams go
/// to the address that was first. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Names(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// By name: the address, and how many streams.
    by: Mutex<HashMap<Arc<str>, (SocketAddr, usize)>>,
    /// Told when the last stream of an address ends.
    ended: Notify,
    changed: watch::Sender<()>,
}

/// One stream to a gateway.
#[derive(Debug)]
pub struct Held {
    names: Names,
    name: Arc<str>,
}

impl Names {
    /// Says that a stream to `name` goes to `address`. None if others go to another one.
    pub fn hold(&self, name: &Arc<str>, address: SocketAddr) -> Option<Held> {
        let mut by = self.0.by.lock();
        let (at, streams) = by.entry(Arc::clone(name)).or_insert((address, 0));
        if *at != address {
            return None;
        }
        *streams += 1;
        Some(Held { names: self.clone(), name: Arc::clone(name) })
    }

    /// Waits until no stream goes to another address of this gateway, or a minute.
    pub async fn free(&self, name: &str, address: SocketAddr) {
        for _ in 0..LOOKS {
            if self.0.by.lock().get(name).is_none_or(|(at, _)| *at == address) {
                return;
            }
            sleep(LOOK).await;
        }
    }

    fn connected(&self, address: SocketAddr) -> bool {
        self.0.by.lock().values().any(|(at, _)| *at == address)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut by = self.names.0.by.lock();
        let Some((_, streams)) = by.get_mut(&self.name) else { return };
        *streams -= 1;
        if *streams == 0 {
            by.remove(&self.name);
            self.names.0.ended.notify_one();
            self.names.0.changed.send_replace(());
        }
    }
}

/// Asks the system's resolver.
///
/// # Errors
/// When it has no answer.
pub async fn resolve(service: String, port: u16) -> io::Result<Vec<SocketAddr>> {
    Ok(tokio::net::lookup_host((service, port)).await?.collect())
}

/// Keeps a task of `streams` for each address, forever. The name is resolved so often, and when a connection ends after a
/// fifth of that. The known addresses go to `targets`.
pub async fn find<R, S>(
    every: Duration,
    mut resolve: impl FnMut() -> R,
    names: Names,
    targets: watch::Sender<Vec<SocketAddr>>,
    mut streams: impl FnMut(SocketAddr) -> S,
) where
    R: Future<Output = io::Result<Vec<SocketAddr>>>,
    S: Future<Output = ()> + Send + 'static,
{
    let (wanted_tx, wanted) = watch::channel(BTreeSet::new());
    let mut tasks = JoinSet::new();
    let mut running = BTreeMap::new();
    let mut failing = false;
    loop {
        let answer = timeout(ANSWER, resolve()).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        while let Some(ended) = tasks.try_join_next_with_id() {
            // Of a task that panicked too: its address is free again.
            let id = ended.map_or_else(|e| e.id(), |(id, ())| id);
            running.retain(|_, running| *running != id);
        }
        match answer {
            // No address is no answer: the gateways that were there may still be.
            Ok(all) if !all.is_empty() => {
                failing = false;
                let now: BTreeSet<SocketAddr> =
                    all.into_iter().collect::<BTreeSet<_>>().into_iter().take(MAX).collect();
                if *wanted_tx.borrow() != now {
                    tracing::info!(addresses = ?now, "gateways found");
                    targets.send_replace(now.iter().copied().collect());
                    wanted_tx.send_replace(now);
                }
            }
            answer => {
                if !std::mem::replace(&mut failing, true) {
                    let why = answer.err().map_or_else(|| "no addresses".to_owned(), |e| e.to_string());
                    tracing::warn!(why, "the gateways' name cannot be resolved; going on with those that are known");
                }
            }
        }
        let new: Vec<SocketAddr> = wanted.borrow().iter().filter(|a| !running.contains_key(*a)).copied().collect();
        for address in new {
            // Those that the name lost and that are still connected count too.
            if running.len() >= 2 * MAX {
                break;
            }
            let (work, over) = (streams(address), abandoned(address, wanted.clone(), names.clone()));
            let task = tasks.spawn(async move {
                tokio::select! {
                    () = work => {}
                    () = over => tracing::info!(%address, "no gateway here any more"),
                }
            });
            running.insert(address, task.id());
        }
        tokio::select! {
            () = sleep(every) => {}
            () = async {
                names.0.ended.notified().await;
                sleep(every / 5).await;
            } => {}
        }
    }
}

/// Waits until nobody wants the address any more and nothing is connected to it.
async fn abandoned(address: SocketAddr, mut wanted: watch::Receiver<BTreeSet<SocketAddr>>, names: Names) {
    let mut changed = names.0.changed.subscribe();
    loop {
        if !wanted.borrow_and_update().contains(&address) && !names.connected(address) {
            return;
        }
        tokio::select! {
            _ = wanted.changed() => {}
            _ = changed.changed() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(500);

    fn at(last: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, last], 7443))
    }

    type Answer = Result<Vec<SocketAddr>, ()>;

    /// Runs `find` with answers that the test sets; the second value says which addresses have streams.
    struct Test {
        answer: watch::Sender<Answer>,
        live: Arc<Mutex<BTreeSet<SocketAddr>>>,
        names: Names,
        targets: watch::Receiver<Vec<SocketAddr>>,
        task: tokio::task::JoinHandle<()>,
    }

    struct Alive(SocketAddr, Arc<Mutex<BTreeSet<SocketAddr>>>);

    impl Drop for Alive {
        fn drop(&mut self) {
            self.1.lock().remove(&self.0);
        }
    }

    impl Test {
        fn new() -> Self {
            let (answer, now) = watch::channel(Ok(vec![]));
            let live = Arc::new(Mutex::new(BTreeSet::new()));
            let names = Names::default();
            let (targets_tx, targets) = watch::channel(vec![]);
            let resolve = move || {
                let now = now.borrow().clone().map_err(|()| io::ErrorKind::Other.into());
                async move { now }
            };
            let alive = live.clone();
            let streams = move |address| {
                let alive = alive.clone();
                assert!(alive.lock().insert(address), "one task for each address");
                let alive = Alive(address, alive);
                async move {
                    let _alive = alive;
                    std::future::pending::<()>().await;
                }
            };
            let task = tokio::spawn(find(SHORT, resolve, names.clone(), targets_tx, streams));
            Self { answer, live, names, targets, task }
        }

        async fn after(&self, answer: Answer) -> Vec<SocketAddr> {
            let _ = self.answer.send_replace(answer);
            sleep(SHORT + Duration::from_millis(100)).await;
            self.live.lock().iter().copied().collect()
        }
    }

    #[tokio::test]
    async fn streams_follow_the_name_and_stay_while_it_fails() {
        let t = Test::new();
        assert_eq!(t.after(Ok(vec![at(2), at(1), at(1)])).await, [at(1), at(2)]);
        assert_eq!(*t.targets.borrow(), [at(1), at(2)]);
        assert_eq!(t.after(Err(())).await, [at(1), at(2)], "the name cannot be resolved");
        assert_eq!(t.after(Ok(vec![])).await, [at(1), at(2)], "the name has no addresses");
        assert_eq!(t.after(Ok(vec![at(2), at(3)])).await, [at(2), at(3)]);
        let many = (0..=255).map(at).collect();
        assert_eq!(t.after(Ok(many)).await.len(), MAX);
        t.task.abort();
    }

    #[tokio::test]
    async fn a_gateway_that_is_connected_stays_until_its_streams_end() {
        let t = Test::new();
        t.after(Ok(vec![at(1), at(2)])).await;
        let name: Arc<str> = "gw-a".into();
        let streams = [t.names.hold(&name, at(1)).unwrap(), t.names.hold(&name, at(1)).unwrap()];
        assert_eq!(t.after(Ok(vec![at(2)])).await, [at(1), at(2)]);
        let [state, facts] = streams;
        drop(state);
        assert_eq!(t.after(Ok(vec![at(2)])).await, [at(1), at(2)]);
        drop(facts);
        // At once, not at the next question.
        sleep(Duration::from_millis(50)).await;
        assert_eq!(*t.live.lock(), [at(2)].into());
        // It may come back.
        assert_eq!(t.after(Ok(vec![at(1), at(2)])).await, [at(1), at(2)]);
        t.task.abort();
    }

    #[tokio::test]
    async fn the_name_is_asked_again_when_a_connection_ends() {
        let asked = Arc::new(Mutex::new(0));
        let resolve = {
            let asked = asked.clone();
            move || {
                *asked.lock() += 1;
                async { Ok(vec![at(1)]) }
            }
        };
        let (names, (targets, _known)) = (Names::default(), watch::channel(vec![]));
        let long = Duration::from_secs(1);
        let task = tokio::spawn(find(long, resolve, names.clone(), targets, |_| std::future::pending()));
        sleep(Duration::from_millis(100)).await;
        let held = names.hold(&"gw-a".into(), at(1));
        sleep(Duration::from_millis(100)).await;
        assert_eq!(*asked.lock(), 1);
        drop(held);
        sleep(Duration::from_millis(400)).await;
        assert_eq!(*asked.lock(), 2);
        task.abort();
    }

    #[tokio::test]
    async fn two_addresses_of_one_gateway_are_one_gateway() {
        let names = Names::default();
        let name: Arc<str> = "gw-a".into();
        let first = names.hold(&name, at(1)).unwrap();
        assert!(names.hold(&name, at(2)).is_none());
        assert!(names.hold(&"gw-b".into(), at(2)).is_some());
        let waiting = tokio::spawn({
            let names = names.clone();
            async move { names.free("gw-a", at(2)).await }
        });
        sleep(LOOK * 2).await;
        assert!(!waiting.is_finished());
        drop(first);
        sleep(LOOK * 2).await;
        assert!(waiting.is_finished());
        assert!(names.hold(&name, at(2)).is_some());
    }
}
