//! Who owns which egress pair, in the status of `EgressPool`s: read by a watch, written by compare-and-swap.
//!
//! `status.addresses` is written here alone, as a merge patch that names the resourceVersion that it was made from: of two
//! gateways that write at once one is refused, reads again, and finds what the other one wrote. Other fields of the status
//! belong to other writers, who must leave the list out of what they apply. The finalizer `tidegate.dev/in-use` holds a
//! pool that scopes use.

mod object;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams};
use kube::{Api, Client, ResourceExt};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, sleep, sleep_until, timeout};

pub use object::{Address, Owner, Record};

use crate::FINALIZER;
use crate::watch::{self as follow, Change, List, Watched};

/// The API server is asked for a sign of life so often. Two seconds of silence count as an outage.
const PROBE: Duration = Duration::from_millis(500);
/// A request without an answer for so long has failed: a claim waits for less than a second to be written.
const ANSWER: Duration = Duration::from_secs(1);
/// Tries of one write. Each that fails has found a newer object.
const TRIES: usize = 4;
/// Pools that are written at the same time.
const AT_ONCE: usize = 16;
/// Counts and finalizers are looked after so often.
const TEND: Duration = Duration::from_secs(5);
/// And no sooner than so long after the last time, whatever is news: counts change with every pod that comes and goes.
const TEND_AGAIN: Duration = Duration::from_secs(1);
/// A pool that is deleted is let go when it has been out of use for so long: a pod that moves from one policy to another
/// may come back.
const UNUSED: Duration = Duration::from_secs(3);

/// A claim that is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// The pool.
    pub pool: String,
    /// The pair.
    pub address: Address,
    /// What is to stand there.
    pub claim: Owner,
    /// What must stand there until then; absent: nothing.
    pub over: Option<Owner>,
}

/// The pairs in use by pool, each with the number of namespaces that leave with it.
pub type Used = BTreeMap<String, BTreeMap<Address, u32>>;

/// What a gateway wants.
#[derive(Clone, Debug)]
pub enum Command {
    /// A claim is to be written. What came of it is told by [`Event::Pool`].
    Write(Write),
    /// What is in use now.
    Used(Used),
}

/// What the API server said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It has answered.
    Answered,
    /// What stands in the status of a pool.
    Pool {
        /// Its name.
        name: String,
        /// Who owns its pairs; `None`: there is no such pool.
        records: Option<Vec<Record>>,
        /// Whether it is deleted, and held because it is in use.
        deleted: bool,
    },
}

/// The kind.
pub fn resource() -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("tidegate.dev", "v1alpha1", "EgressPool"), "egresspools")
}

/// The addresses that flows leave with which live, asked for while a pair drains. It may block for seconds.
pub type Live = dyn Fn() -> std::io::Result<BTreeSet<IpAddr>> + Send + Sync;

/// Runs for the gateway `me` until the commands end. While it is `stale` what it says of the use of pools is old, and none
/// is held or let go. `tell` must not block.
pub async fn run(
    client: Client,
    me: String,
    commands: mpsc::Receiver<Command>,
    stale: watch::Receiver<bool>,
    live: Arc<Live>,
    tell: impl Fn(Event) + Send + Sync + 'static,
) {
    let pools = Arc::new(Pools {
        api: Api::all_with(client.clone(), &resource()),
        me,
        known: parking_lot::Mutex::default(),
        live,
        tell: Box::new(tell),
    });
    let (used, in_use) = watch::channel(None);
    let list = List {
        feed: (),
        path: "/apis/tidegate.dev/v1alpha1/egresspools".to_owned(),
        fields: String::new(),
        labels: String::new(),
        optional: false,
    };
    let (changes, watched, tasks) = follow::watch(&client, vec![list]);
    tokio::select! {
        _ = join_all(tasks) => {}
        () = pools.take(changes) => {}
        () = pools.probe(&watched) => {}
        () = pools.tend(in_use, stale) => {}
        () = pools.clone().obey(commands, used) => {}
    }
}

struct Pools {
    api: Api<DynamicObject>,
    me: String,
    /// The newest object of each pool that was seen.
    known: parking_lot::Mutex<BTreeMap<String, DynamicObject>>,
    live: Arc<Live>,
    tell: Box<dyn Fn(Event) + Send + Sync>,
}

/// How one try to write ended.
enum Tried {
    Done,
    /// Somebody else was faster: read and try again.
    Stale,
}

impl Pools {
    /// Tells every change.
    async fn take(&self, mut changes: mpsc::Receiver<Change<()>>) {
        while let Some(change) = changes.recv().await {
            match change.event {
                follow::Event::Applied(o) => match serde_json::from_value::<DynamicObject>(*o) {
                    Ok(o) => self.hear(o).await,
                    Err(error) => tracing::warn!(%error, "a pool cannot be read"),
                },
                follow::Event::Deleted(o) => self.gone(o["metadata"]["name"].as_str().unwrap_or_default()),
                follow::Event::Restarted(seen) => {
                    let known: Vec<String> = self.known.lock().keys().cloned().collect();
                    let gone = known.iter().filter(|n| !seen.contains(&(String::new(), (*n).clone())));
                    gone.for_each(|n| self.gone(n));
                }
                follow::Event::Bookmark => {}
            }
        }
    }

    /// Others say what an object is. One that is older than what is known is either late, or of a cluster that was restored
    /// from a backup: then what is known is of no history any more.
    async fn hear(&self, new: DynamicObject) {
        let name = new.name_any();
        let known = self.known.lock().get(&name).cloned();
        let Some(known) = known.filter(|known| object::is_older(&new, known)) else { return self.saw(new) };
        for _ in 0..TRIES {
            let Ok(now) = self.within(self.api.get_opt(&name)).await else { continue };
            match now {
                Some(now) if object::is_older(&now, &known) => {
                    // Unless something was written in the meantime.
                    let same = |k: &DynamicObject| k.resource_version() == known.resource_version();
                    let back = {
                        let mut all = self.known.lock();
                        let back = all.get(&name).is_some_and(same);
                        if back {
                            all.insert(name.clone(), now.clone());
                        }
                        back
                    };
                    if back {
                        tracing::warn!(
                            pool = name,
                            "its versions have gone back: the cluster was restored from a backup"
                        );
                        self.tell(&now);
                    }
                }
                Some(now) => self.saw(now),
                None => self.gone(&name),
            }
            return;
        }
    }

    /// Asks for something that the API server has to read from its storage.
    async fn probe(&self, watched: &Watched<()>) {
        let mut tick = tokio::time::interval(PROBE);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut silent = false;
        loop {
            tick.tick().await;
            let result = self.within(self.api.get_opt("default")).await;
            match &result {
                Ok(_) => (self.tell)(Event::Answered),
                Err(error) if !silent => {
                    tracing::warn!(error, "no answer from the API server: egress pairs go by the gateways' own word");
                }
                Err(_) => {}
            }
            if silent && result.is_ok() {
                tracing::info!("the API server answers again");
                // The watch may hang on a dead connection for a while yet.
                watched.hurry(());
                match self.within(self.api.list(&Default::default())).await {
                    Ok(list) => {
                        for pool in list.items {
                            self.hear(pool).await;
                        }
                    }
                    Err(error) => tracing::warn!(error, "cannot list pools"),
                }
            }
            silent = result.is_err();
        }
    }

    async fn obey(self: Arc<Self>, mut commands: mpsc::Receiver<Command>, used: watch::Sender<Option<Used>>) {
        let mut waiting: BTreeMap<String, BTreeMap<Address, Write>> = BTreeMap::new();
        let mut busy: BTreeSet<String> = BTreeSet::new();
        let mut tasks: JoinSet<String> = JoinSet::new();
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Write(w)) => {
                        waiting.entry(w.pool.clone()).or_default().insert(w.address, w);
                    }
                    Some(Command::Used(u)) => drop(used.send_replace(Some(u))),
                    None => return,
                },
                Some(ended) = tasks.join_next() => match ended {
                    Ok(pool) => drop(busy.remove(&pool)),
                    // A task that has panicked does not say for which pool: only what waits is lost.
                    Err(_) => busy.clear(),
                },
            }
            let ready: Vec<String> = waiting
                .keys()
                .filter(|p| !busy.contains(*p))
                .take(AT_ONCE.saturating_sub(tasks.len()))
                .cloned()
                .collect();
            for pool in ready {
                let Some(writes) = waiting.remove(&pool) else { continue };
                busy.insert(pool.clone());
                let counts = used.borrow().as_ref().and_then(|u| u.get(&pool)).cloned();
                let this = self.clone();
                tasks.spawn(async move {
                    this.write(&pool, &writes, &counts.unwrap_or_default()).await;
                    pool
                });
            }
        }
    }

    /// Writes claims of one pool, or tells why that is too late.
    async fn write(&self, pool: &str, writes: &BTreeMap<Address, Write>, counts: &BTreeMap<Address, u32>) {
        let mut object = self.known.lock().get(pool).cloned();
        for _ in 0..TRIES {
            let read = match object.take() {
                Some(o) => o,
                None => match self.within(self.api.get_opt(pool)).await {
                    Ok(Some(o)) => {
                        self.saw(o.clone());
                        o
                    }
                    Ok(None) => return self.gone(pool),
                    Err(error) => return tracing::warn!(pool, error, "cannot read a pool to record its owner"),
                },
            };
            let Some(addresses) = object::with_claims(&read, writes, counts) else {
                // None of them stands over what it was meant for. What is remembered may be old: somebody has to have told.
                if self.is_newest(&read).await {
                    return self.tell(&read);
                }
                continue;
            };
            match self.patch_addresses(&read, addresses).await {
                Ok(Tried::Done) => return,
                Ok(Tried::Stale) => {}
                Err(error) => return tracing::warn!(pool, error, "cannot record the owner of an egress pair"),
            }
        }
        tracing::warn!(pool, "others write a pool all the time; its owner is not recorded yet");
    }

    /// Whether the API server has nothing newer; what it has is told.
    async fn is_newest(&self, read: &DynamicObject) -> bool {
        match self.within(self.api.get_opt(&read.name_any())).await {
            Ok(Some(o)) => {
                let same = o.resource_version() == read.resource_version();
                self.saw(o);
                same
            }
            Ok(None) => {
                self.gone(&read.name_any());
                true
            }
            Err(_) => true,
        }
    }

    async fn patch_addresses(&self, read: &DynamicObject, addresses: serde_json::Value) -> Result<Tried, String> {
        let name = read.name_any();
        let patch = serde_json::json!({
            "metadata": {"resourceVersion": read.resource_version()},
            "status": {"addresses": addresses},
        });
        let (params, patch) = (PatchParams::default(), Patch::Merge(&patch));
        self.patched(self.api.patch_status(&name, &params, &patch)).await
    }

    async fn patch_finalizers(&self, read: &DynamicObject, finalizers: Vec<String>) -> Result<Tried, String> {
        let name = read.name_any();
        let metadata = serde_json::json!({"resourceVersion": read.resource_version(), "finalizers": finalizers});
        let patch = serde_json::json!({"metadata": metadata});
        let (params, patch) = (PatchParams::default(), Patch::Merge(&patch));
        self.patched(self.api.patch(&name, &params, &patch)).await
    }

    async fn patched(&self, request: impl Future<Output = kube::Result<DynamicObject>>) -> Result<Tried, String> {
        match timeout(ANSWER, request).await {
            Ok(Ok(o)) => {
                (self.tell)(Event::Answered);
                self.saw(o);
                Ok(Tried::Done)
            }
            Ok(Err(kube::Error::Api(status))) if status.is_conflict() || status.is_not_found() => {
                (self.tell)(Event::Answered);
                Ok(Tried::Stale)
            }
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {} s", ANSWER.as_secs())),
        }
    }

    /// Looks after pools soon after what is in use has changed, and again and again.
    async fn tend(&self, mut used: watch::Receiver<Option<Used>>, mut stale: watch::Receiver<bool>) {
        let mut unused: BTreeMap<String, Instant> = BTreeMap::new();
        loop {
            if *stale.borrow_and_update() {
                unused.clear();
                if stale.wait_for(|s| !*s).await.is_err() {
                    return;
                }
            }
            let began = Instant::now();
            let now = used.borrow_and_update().clone();
            if let Some(now) = &now {
                self.look_after(now, &mut unused, &stale).await;
            }
            sleep(TEND_AGAIN).await;
            tokio::select! {
                changed = used.changed() => if changed.is_err() { return },
                () = sleep_until(began + TEND) => {}
            }
        }
    }

    /// Holds pools that are in use, lets those go that are not, and counts the namespaces of the pairs that are ours.
    async fn look_after(&self, used: &Used, unused: &mut BTreeMap<String, Instant>, stale: &watch::Receiver<bool>) {
        let pools: Vec<DynamicObject> = self.known.lock().values().cloned().collect();
        unused.retain(|p, _| !used.contains_key(p));
        for pool in pools {
            if *stale.borrow() {
                return;
            }
            let name = pool.name_any();
            let (held, deleted) =
                (pool.finalizers().iter().any(|f| f == FINALIZER), pool.metadata.deletion_timestamp.is_some());
            let result = match used.get(&name) {
                Some(_) if !held && !deleted => {
                    let all = pool.finalizers().iter().cloned().chain([FINALIZER.to_owned()]).collect();
                    self.patch_finalizers(&pool, all).await
                }
                Some(counts) => {
                    let live = match self.live(&pool).await {
                        Ok(live) => live,
                        Err(error) => {
                            tracing::warn!(pool = name, %error, "flows cannot be counted: it is not known what has drained");
                            continue;
                        }
                    };
                    match object::with_counts(&pool, &self.me, counts, &live) {
                        Some(addresses) => self.patch_addresses(&pool, addresses).await,
                        None => continue,
                    }
                }
                None if held
                    && deleted
                    && unused.entry(name.clone()).or_insert_with(Instant::now).elapsed() >= UNUSED =>
                {
                    let rest = pool.finalizers().iter().filter(|f| *f != FINALIZER).cloned().collect();
                    self.patch_finalizers(&pool, rest).await
                }
                None => continue,
            };
            match result {
                Ok(Tried::Done) => {}
                // What somebody else wrote the watch has not told yet, and one that hangs does not for a while.
                Ok(Tried::Stale) => drop(self.is_newest(&pool).await),
                Err(error) => tracing::warn!(pool = name, error, "cannot look after a pool; trying again"),
            }
        }
    }

    /// The addresses that living flows leave with, if that matters: one of the pool's pairs, and ours, drains.
    async fn live(&self, pool: &DynamicObject) -> std::io::Result<BTreeSet<IpAddr>> {
        if !object::drains(pool, &self.me) {
            return Ok(BTreeSet::new());
        }
        let live = self.live.clone();
        tokio::task::spawn_blocking(move || live()).await.map_err(std::io::Error::other)?
    }

    async fn within<T>(&self, request: impl Future<Output = kube::Result<T>>) -> Result<T, String> {
        match timeout(ANSWER, request).await {
            Ok(answer) => answer.map_err(|e| e.to_string()),
            Err(_) => Err(format!("no answer within {} s", ANSWER.as_secs())),
        }
    }

    /// Remembers an object, unless a newer one is known, and tells it.
    fn saw(&self, new: DynamicObject) {
        {
            let mut known = self.known.lock();
            if known.get(&new.name_any()).is_some_and(|old| object::is_older(&new, old)) {
                return;
            }
            known.insert(new.name_any(), new.clone());
        }
        self.tell(&new);
    }

    fn gone(&self, name: &str) {
        self.known.lock().remove(name);
        (self.tell)(Event::Pool { name: name.to_owned(), records: None, deleted: false });
    }

    fn tell(&self, object: &DynamicObject) {
        (self.tell)(Event::Pool {
            name: object.name_any(),
            records: Some(object::records(object)),
            deleted: object.metadata.deletion_timestamp.is_some(),
        });
    }
}
