//! Which gateways there are: those of the configuration, or whoever a DNS name leads to, and those that they tell of.
//!
//! An address that is new gets its streams at once. One that nobody names any more keeps them while they are up: a gateway
//! that ends says so itself. While the name cannot be resolved the known ones stay.
//!
//! A DNS server remembers for half a minute that a Service without pods has no addresses, or the addresses of pods that are
//! gone. Gateways hear of each other from the API server, and say where: whoever is connected to one of them goes to all.
//! While no gateway is connected the agent tries an entrance, too: one address behind which any of them answers.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::task::{Id, JoinSet};
use tokio::time::{Instant, sleep, timeout};

/// The most gateways.
pub const MAX: usize = 64;
/// How often the name is resolved.
pub const EVERY: Duration = Duration::from_secs(5);
/// How long a question may take.
const ANSWER: Duration = Duration::from_secs(10);
/// After so long it is asked again who is at an address whose gateway is connected elsewhere.
const AGAIN: Duration = Duration::from_secs(60);
/// An entrance behind which nobody answers is looked up again after so long.
const ENTERED: Duration = Duration::from_secs(60);
/// So long streams may take to say that they end.
const STOP: Duration = Duration::from_secs(2);

/// At which address each gateway is connected. A gateway with an IPv4 and an IPv6 address is one gateway: its streams go
/// to the address that was first. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Names(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    by: Mutex<HashMap<Arc<str>, Place>>,
    /// Told when the last stream of an address ends.
    ended: Notify,
    changed: watch::Sender<()>,
}

/// Where a gateway is connected.
#[derive(Debug)]
struct Place {
    address: SocketAddr,
    streams: usize,
    /// Another address at which it answered meanwhile.
    other: Option<SocketAddr>,
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
        let place = by.entry(Arc::clone(name)).or_insert(Place { address, streams: 0, other: None });
        if place.address != address {
            place.other = Some(address);
            return None;
        }
        place.streams += 1;
        Some(Held { names: self.clone(), name: Arc::clone(name) })
    }

    /// Waits until no stream goes to another address of this gateway, or a minute.
    pub async fn free(&self, name: &str, address: SocketAddr) {
        let mut changed = self.0.changed.subscribe();
        let elsewhere = || self.0.by.lock().get(name).is_some_and(|place| place.address != address);
        let free = async { while elsewhere() && changed.changed().await.is_ok() {} };
        let _ = timeout(AGAIN, free).await;
    }

    /// Whether no gateway is connected.
    fn nobody(&self) -> bool {
        self.0.by.lock().is_empty()
    }

    fn connected(&self, address: SocketAddr) -> bool {
        self.0.by.lock().values().any(|place| place.address == address)
    }

    /// Whether some gateway is connected, or could be, without these addresses.
    fn reached_without(&self, addresses: &BTreeSet<SocketAddr>) -> bool {
        let by = self.0.by.lock();
        let all = by.values().flat_map(|place| [Some(place.address), place.other]);
        all.flatten().any(|a| !addresses.contains(&a))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut by = self.names.0.by.lock();
        let Some(place) = by.get_mut(&self.name) else { return };
        place.streams -= 1;
        if place.streams == 0 {
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

/// The entrance while nobody is connected.
struct Entrance {
    addresses: BTreeSet<SocketAddr>,
    since: Instant,
}

/// A task of streams for each address.
struct Finder<F> {
    names: Names,
    targets: watch::Sender<Vec<SocketAddr>>,
    streams: F,
    wanted: watch::Sender<BTreeSet<SocketAddr>>,
    /// Each says whether it was left.
    tasks: JoinSet<bool>,
    running: BTreeMap<SocketAddr, Id>,
    /// What the name said last.
    named: BTreeSet<SocketAddr>,
    /// What gateways tell of each other.
    told: watch::Receiver<BTreeSet<SocketAddr>>,
    entered: Option<Entrance>,
}

impl<F, S> Finder<F>
where
    F: FnMut(SocketAddr, watch::Receiver<bool>) -> S,
    S: Future<Output = ()> + Send + 'static,
{
    /// Goes to who is known now.
    fn follow(&mut self) {
        // What the name says comes first: what one gateway tells must not be in its way.
        let mut known = self.named.clone();
        let told = self.told.borrow().clone();
        known.extend(told.difference(&self.named).take(MAX.saturating_sub(self.named.len())));
        // Once a gateway is reached where it is, each is to be found there, with both of its streams.
        let stays = |e: &Entrance| {
            !self.names.reached_without(&e.addresses) && (e.since.elapsed() < ENTERED || !self.names.nobody())
        };
        self.entered = self.entered.take().filter(stays);
        let through = self.entered.as_ref().map(|e| e.addresses.clone()).unwrap_or_default();
        let all: BTreeSet<SocketAddr> = known.union(&through).copied().collect();
        if *self.wanted.borrow() != all {
            tracing::info!(addresses = ?known, entrance = ?through, "gateways found");
            self.targets.send_replace(all.iter().copied().collect());
            self.wanted.send_replace(all.clone());
        }
        for address in all {
            // Those that nobody names and that are still connected count too.
            if self.running.contains_key(&address) || self.running.len() >= 2 * MAX {
                continue;
            }
            let stays = (!through.contains(&address)).then(|| self.names.clone());
            let (stop, stopped) = watch::channel(false);
            let (work, over) = ((self.streams)(address, stopped), abandoned(address, self.wanted.subscribe(), stays));
            let task = self.tasks.spawn(async move {
                let mut work = pin!(work);
                tokio::select! {
                    () = &mut work => return false,
                    () = over => tracing::info!(%address, "no gateway here any more"),
                }
                // Who listens to them has to hear of their end.
                stop.send_replace(true);
                let _ = timeout(STOP, work).await;
                true
            });
            self.running.insert(address, task.id());
        }
    }

    /// Waits for something, and goes meanwhile to whom gateways tell of: a DNS server that is slow holds nobody up. An address whose
    /// streams have ended is gone to anew if it is one again.
    async fn follow_until<T>(&mut self, end: impl Future<Output = T>) -> T {
        let mut end = pin!(end);
        loop {
            tokio::select! {
                end = &mut end => return end,
                Ok(()) = self.told.changed() => {}
                Some(ended) = self.tasks.join_next_with_id() => {
                    // Of a task that panicked too: its address is free again.
                    let (id, left) = ended.unwrap_or_else(|e| (e.id(), false));
                    self.running.retain(|_, running| *running != id);
                    // One that ended by itself would do so again: it has time until the next question.
                    if !left {
                        continue;
                    }
                }
            }
            self.follow();
        }
    }
}

/// Keeps a task of `streams` for each address, forever; what they are given says when they have to end. The name is resolved so
/// often, and when a connection ends after a fifth of that; `told` is what gateways tell of each other. `entrance` is asked for
/// when the name says nothing and nobody is connected, or as soon as nobody was for half of that. The known addresses go to
/// `targets`.
pub async fn find<R, E, S>(
    every: Duration,
    mut resolve: impl FnMut() -> R,
    mut entrance: impl FnMut() -> E,
    names: Names,
    told: watch::Receiver<BTreeSet<SocketAddr>>,
    targets: watch::Sender<Vec<SocketAddr>>,
    streams: impl FnMut(SocketAddr, watch::Receiver<bool>) -> S,
) where
    R: Future<Output = io::Result<Vec<SocketAddr>>>,
    E: Future<Output = io::Result<Vec<SocketAddr>>>,
    S: Future<Output = ()> + Send + 'static,
{
    let mut finder = Finder {
        names: names.clone(),
        targets,
        streams,
        wanted: watch::Sender::default(),
        tasks: JoinSet::new(),
        running: BTreeMap::new(),
        named: BTreeSet::new(),
        told,
        entered: None,
    };
    let mut failing = false;
    let mut alone: Option<Instant> = None;
    loop {
        let answer = finder.follow_until(timeout(ANSWER, resolve())).await;
        match answer.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            // No address is no answer: the gateways that were there may still be.
            Ok(all) if !all.is_empty() => {
                failing = false;
                finder.named = all.into_iter().collect::<BTreeSet<_>>().into_iter().take(MAX).collect();
            }
            answer => {
                if !std::mem::replace(&mut failing, true) {
                    let why = answer.err().map_or_else(|| "no addresses".to_owned(), |e| e.to_string());
                    tracing::warn!(why, "the gateways' name cannot be resolved; going on with those that are known");
                }
            }
        }
        finder.follow();
        let now = Instant::now();
        alone = if names.nobody() { alone.or(Some(now)) } else { None };
        let due = alone.map(|since| since + every / 2);
        if finder.entered.is_none() && due.is_some_and(|due| failing || due <= now) {
            let found = finder.follow_until(timeout(ANSWER, entrance())).await;
            let found = found.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).unwrap_or_default();
            let addresses: BTreeSet<SocketAddr> = found.into_iter().take(MAX).collect();
            let needed = names.nobody() && !addresses.is_empty();
            finder.entered = needed.then(|| Entrance { addresses, since: Instant::now() });
            finder.follow();
        }
        // When the entrance's time comes it is not waited for the next question.
        let entering = due.filter(|due| finder.entered.is_none() && *due > now);
        let next = async {
            tokio::select! {
                () = sleep(entering.map_or(every, |due| due.duration_since(now))) => {}
                () = async {
                    names.0.ended.notified().await;
                    sleep(every / 5).await;
                } => {}
            }
        };
        finder.follow_until(next).await;
    }
}

/// Waits until nobody wants the address any more and, if it stays that long, nothing is connected to it.
async fn abandoned(address: SocketAddr, mut wanted: watch::Receiver<BTreeSet<SocketAddr>>, stays: Option<Names>) {
    let names = stays.clone().unwrap_or_default();
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

    const ENTRANCE: u8 = 200;

    type Answer = Result<Vec<SocketAddr>, ()>;

    async fn nowhere() -> io::Result<Vec<SocketAddr>> {
        Err(io::ErrorKind::NotFound.into())
    }

    /// Runs `find` with answers that the test sets; the second value says which addresses have streams.
    struct Test {
        answer: watch::Sender<Answer>,
        live: Arc<Mutex<BTreeSet<SocketAddr>>>,
        names: Names,
        tell: watch::Sender<BTreeSet<SocketAddr>>,
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
            Self::with(nowhere)
        }

        fn with<E: Future<Output = io::Result<Vec<SocketAddr>>> + Send + 'static>(
            entrance: impl Fn() -> E + Send + 'static,
        ) -> Self {
            let (answer, now) = watch::channel(Ok(vec![]));
            let live = Arc::new(Mutex::new(BTreeSet::new()));
            let names = Names::default();
            let (targets_tx, targets) = watch::channel(vec![]);
            let resolve = move || {
                let now = now.borrow().clone().map_err(|()| io::ErrorKind::Other.into());
                async move { now }
            };
            let alive = live.clone();
            let streams = move |address, mut stop: watch::Receiver<bool>| {
                let alive = alive.clone();
                assert!(alive.lock().insert(address), "one task for each address");
                let alive = Alive(address, alive);
                async move {
                    let _alive = alive;
                    let _ = stop.wait_for(|stop| *stop).await;
                }
            };
            let (tell, told) = watch::channel(BTreeSet::new());
            let task = tokio::spawn(find(SHORT, resolve, entrance, names.clone(), told, targets_tx, streams));
            Self { answer, live, names, tell, targets, task }
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
    async fn the_entrance_is_tried_while_nobody_is_connected_and_left_when_somebody_is_reached_without_it() {
        let t = Test::with(|| async { Ok(vec![at(ENTRANCE)]) });
        // Nobody had the time to connect yet, and the name is fine.
        let _ = t.answer.send_replace(Ok(vec![at(1), at(2)]));
        sleep(SHORT / 4).await;
        assert_eq!(*t.live.lock(), [at(1), at(2)].into());
        let (a, b): (Arc<str>, Arc<str>) = ("gw-a".into(), "gw-b".into());
        let held = [t.names.hold(&a, at(1)).unwrap(), t.names.hold(&b, at(2)).unwrap()];
        sleep(SHORT * 3).await;
        assert_eq!(*t.live.lock(), [at(1), at(2)].into());
        assert_eq!(t.after(Err(())).await, [at(1), at(2)], "they are connected");
        drop(held);
        sleep(SHORT / 2).await;
        assert_eq!(*t.live.lock(), [at(1), at(2), at(ENTRANCE)].into());
        assert_eq!(*t.targets.borrow(), [at(1), at(2), at(ENTRANCE)]);
        // Whoever answers there stays connected, whatever the name says: only who answers is known to be there.
        let through = t.names.hold(&a, at(ENTRANCE)).unwrap();
        for said in [Err(()), Ok(vec![at(1), at(2)]), Err(())] {
            assert_eq!(t.after(said).await, [at(1), at(2), at(ENTRANCE)]);
        }
        assert_eq!(t.after(Ok(vec![at(3), at(4)])).await, [at(3), at(4), at(ENTRANCE)]);
        // It is found where it is, too, and takes its place at once.
        assert!(t.names.hold(&a, at(3)).is_none());
        let waits = {
            let names = t.names.clone();
            tokio::spawn(async move { names.free("gw-a", at(3)).await })
        };
        assert_eq!(t.after(Ok(vec![at(3), at(4)])).await, [at(3), at(4)], "also those that are connected through it");
        drop(through);
        timeout(SHORT / 10, waits).await.unwrap().unwrap();
        // Nobody is connected.
        sleep(SHORT * 2).await;
        assert_eq!(*t.live.lock(), [at(3), at(4), at(ENTRANCE)].into());
        t.task.abort();
    }

    #[tokio::test]
    async fn the_entrance_is_tried_as_soon_as_nobody_was_connected_for_long_enough() {
        let t = Test::with(|| async { Ok(vec![at(ENTRANCE)]) });
        let _ = t.answer.send_replace(Ok(vec![at(1)]));
        let held = t.names.hold(&"gw-a".into(), at(1)).unwrap();
        sleep(SHORT * 3).await;
        drop(held);
        // The name is looked at after a fifth, and says what it said: nobody else is known.
        sleep(SHORT / 5 + SHORT / 4).await;
        assert_eq!(*t.live.lock(), [at(1)].into());
        sleep(SHORT / 2).await;
        assert_eq!(*t.live.lock(), [at(1), at(ENTRANCE)].into(), "it waits for the next question");
        t.task.abort();
    }

    #[tokio::test]
    async fn gateways_lead_to_each_other_at_once_whatever_the_name_says() {
        let t = Test::with(|| async { Ok(vec![at(ENTRANCE)]) });
        t.after(Ok(vec![at(1)])).await;
        let held = t.names.hold(&"gw-a".into(), at(1));
        let soon = Duration::from_millis(50);
        t.tell.send_replace([at(1), at(2)].into());
        sleep(soon).await;
        assert_eq!(*t.live.lock(), [at(1), at(2)].into());
        assert_eq!(*t.targets.borrow(), [at(1), at(2)]);
        assert_eq!(t.after(Err(())).await, [at(1), at(2)]);
        // One that is not named any more goes, unless it is connected.
        t.tell.send_replace([at(3)].into());
        sleep(soon).await;
        assert_eq!(*t.live.lock(), [at(1), at(3)].into());
        // Whom the entrance leads to, he leads to all: it is left when one of them is connected.
        drop(held);
        assert_eq!(t.after(Err(())).await, [at(1), at(3), at(ENTRANCE)]);
        let _through = t.names.hold(&"gw-b".into(), at(ENTRANCE));
        t.tell.send_replace([at(4), at(5)].into());
        sleep(soon).await;
        assert_eq!(*t.live.lock(), [at(1), at(4), at(5), at(ENTRANCE)].into());
        let _direct = t.names.hold(&"gw-c".into(), at(5));
        assert_eq!(t.after(Err(())).await, [at(1), at(4), at(5)]);
        // What is told is not in the way of what the name says.
        t.tell.send_replace((100..=255).map(at).collect());
        let all = t.after(Ok((0..4).map(at).collect())).await;
        assert!((0..4).all(|n| all.contains(&at(n))) && all.len() <= MAX + 2, "{all:?}");
        t.task.abort();
    }

    #[tokio::test]
    async fn who_is_left_and_named_again_is_gone_to_at_once_and_what_ends_by_itself_is_not() {
        let t = Test::new();
        t.after(Ok(vec![at(1)])).await;
        for _ in 0..3 {
            t.tell.send_replace([at(2)].into());
            sleep(Duration::from_millis(20)).await;
            t.tell.send_replace([].into());
            // Not even so much later that it is gone.
            tokio::task::yield_now().await;
            t.tell.send_replace([at(2)].into());
            sleep(Duration::from_millis(50)).await;
            assert_eq!(*t.live.lock(), [at(1), at(2)].into());
        }
        t.task.abort();
        let (begun, (targets, _known), (tell, told)) =
            (Arc::new(Mutex::new(0)), watch::channel(vec![]), watch::channel([at(1)].into()));
        let count = begun.clone();
        let streams = move |_, _| {
            *count.lock() += 1;
            std::future::ready(())
        };
        let task = tokio::spawn(find(SHORT, nowhere, nowhere, Names::default(), told, targets, streams));
        sleep(SHORT * 3).await;
        assert!((2..8).contains(&*begun.lock()), "{} times", begun.lock());
        task.abort();
        drop(tell);
    }

    #[tokio::test]
    async fn a_dns_server_that_hangs_holds_nobody_up() {
        let (targets, mut known) = watch::channel(vec![]);
        let (tell, told) = watch::channel(BTreeSet::new());
        let hangs = || std::future::pending::<io::Result<Vec<SocketAddr>>>();
        let streams = |_, _| std::future::pending();
        let task = tokio::spawn(find(SHORT, hangs, nowhere, Names::default(), told, targets, streams));
        sleep(SHORT / 10).await;
        tell.send_replace([at(1)].into());
        timeout(SHORT, known.changed()).await.unwrap().unwrap();
        assert_eq!(*known.borrow(), [at(1)]);
        task.abort();
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
        let (_tell, told) = watch::channel(BTreeSet::new());
        let long = Duration::from_secs(1);
        let held = names.hold(&"gw-a".into(), at(1));
        let task =
            tokio::spawn(find(long, resolve, nowhere, names.clone(), told, targets, |_, _| std::future::pending()));
        sleep(Duration::from_millis(200)).await;
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
        sleep(Duration::from_millis(50)).await;
        assert!(!waiting.is_finished());
        drop(first);
        sleep(Duration::from_millis(50)).await;
        assert!(waiting.is_finished());
        assert!(names.hold(&name, at(2)).is_some());
    }
}
