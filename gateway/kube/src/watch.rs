//! Lists that are followed: every object once, then its changes, as JSON and in the order of the API server.
//!
//! A list is read in pages, of the newest state (an API server that is behind must not show an older one). From its
//! resourceVersion on it is watched. A watch that ends goes on where it was; one that the API server cannot go on with
//! (410), or whose version it has not reached, since its storage was restored from a backup, begins with a list again. The
//! API server is asked to end each after [`WATCH`], and before that sends a bookmark if there is a newer version: a watch
//! that says nothing for [`SILENT`] is given up for another one, as is one that
//! [`Watched::hurry`] asks for. What went before stays the truth until there is news, so an outage takes nothing away.
//!
//! The queue to whoever takes the changes is bounded. While it is full nothing is read, and the API server keeps what is
//! not read, or ends the watch.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::{AsyncBufReadExt, AsyncReadExt, FutureExt};
use kube::core::Request;
use kube::core::params::{ListParams, WatchParams};
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::{Notify, mpsc};

use crate::client::{Error, within};

/// A watch that says nothing for so long has been lost.
const SILENT: Duration = Duration::from_secs(30);
/// The API server ends a watch after so long. Seconds. The next one goes on over the same connection; a dozen lists are a
/// request every two seconds.
const WATCH: u32 = 25;
/// Objects of one page.
const PAGE: u32 = 500;
/// The longest event, in octets. Objects have at most 1.5 MiB or so in etcd.
const MAX_EVENT: u64 = 8 << 20;
/// Changes that may wait.
const QUEUE: usize = 1024;
/// The wait after the first failure, and the longest: each list waits by itself, and a gateway that hears of a change seconds after
/// another one has to step back.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(3));
/// A watch that ends earlier is not followed by another one at once.
const LIVED: Duration = Duration::from_secs(1);
/// How long a kind that the API server does not have, and need not have, is left alone.
const ABSENT: Duration = Duration::from_secs(60);

/// A list to follow.
#[derive(Clone, Debug)]
pub struct List<F> {
    /// What the changes are marked with.
    pub feed: F,
    /// The path of the API, such as `/api/v1/pods`.
    pub path: String,
    /// Server-side field selector; empty: all.
    pub fields: String,
    /// Server-side label selector; empty: all.
    pub labels: String,
    /// Whether an API server that does not know the kind is taken for one that has none of it.
    pub optional: bool,
}

/// An object's namespace, empty for cluster-scoped kinds, and name.
pub type Key = (String, String);

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// The object is there, or has changed.
    Applied(Box<Value>),
    /// The object is gone; this is its last state.
    Deleted(Box<Value>),
    /// A list has come in whole: these are all objects that there are.
    Restarted(BTreeSet<Key>),
    /// Nothing, up to a resourceVersion.
    Bookmark,
}

/// A change of a list.
#[derive(Debug)]
pub struct Change<F> {
    /// The list.
    pub feed: F,
    /// What happened.
    pub event: Event,
    /// The resourceVersion up to which everything is known by then; absent in the middle of a list.
    pub reached: Option<u64>,
    /// The resourceVersion of the object, or of its deletion.
    pub newest: Option<u64>,
}

/// How a list fares.
#[derive(Clone, Debug, Default)]
pub struct Health {
    /// When the API server last said something.
    pub heard: Option<Instant>,
    /// The last resourceVersion.
    pub version: u64,
    /// Whether a list came in whole.
    pub listed: bool,
    /// Since when its changes come in; absent while it is read anew or cannot be followed.
    pub followed: Option<Instant>,
    /// Since when it fails, and why.
    pub failing: Option<(Instant, String)>,
    /// Whether it is not known since when changes were missed: it is read anew, or its watch broke off after a silence.
    pub lost: bool,
    /// When it was last got back after it had been lost, or had failed for a second or longer.
    pub back: Option<Instant>,
    /// Lists that came in whole since the start.
    pub lists: u64,
    /// Events of watches since the start.
    pub events: u64,
}

impl Health {
    /// It works.
    fn works(&mut self) {
        let failed = self.failing.take().is_some_and(|(since, _)| since.elapsed() >= LIVED);
        if std::mem::take(&mut self.lost) || failed {
            self.back = Some(Instant::now());
        }
    }

    /// It fails. What was said last may be long ago: packets are lost without a word.
    fn fails(&mut self, why: String) {
        self.lost |= self.heard.is_some_and(|at| at.elapsed() >= LIVED);
        let since = self.failing.as_ref().map_or_else(Instant::now, |(since, _)| *since);
        self.failing = Some((since, why));
    }
}

struct Shared {
    health: Mutex<Health>,
    hurry: Notify,
}

impl Shared {
    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The lists that are followed. Cheap to clone.
#[derive(Clone)]
pub struct Watched<F>(Arc<BTreeMap<F, Shared>>);

impl<F: Ord + Copy> Watched<F> {
    /// How each of them fares.
    pub fn health(&self) -> BTreeMap<F, Health> {
        self.0.iter().map(|(feed, shared)| (*feed, shared.health().clone())).collect()
    }

    /// For how long a list that was lost is back: nothing while it is, absent if it never was.
    pub fn back_for(&self, feed: F) -> Option<Duration> {
        let health = self.0.get(&feed)?.health();
        let away = health.lost || health.failing.is_some();
        if away { Some(Duration::ZERO) } else { health.back.map(|at| at.elapsed()) }
    }

    /// Gives the list's connection up for another one, or the pause before that: this one is behind.
    pub fn hurry(&self, feed: F) {
        if let Some(shared) = self.0.get(&feed) {
            shared.hurry.notify_one();
        }
    }

    /// For how long the changes of one of them have been coming in.
    pub fn followed(&self, feed: F) -> Option<Duration> {
        self.0.get(&feed).and_then(|s| s.health().followed).map(|since| since.elapsed())
    }

    /// Since when at least one of them fails, and why.
    pub fn failing(&self) -> Option<(Instant, String)> {
        self.0.values().filter_map(|s| s.health().failing.clone()).min_by_key(|(since, _)| *since)
    }
}

/// Prepares to follow lists: the changes, how they fare, and one task for each, which ends when nobody takes the changes
/// any more.
pub fn watch<F>(
    client: &kube::Client,
    lists: Vec<List<F>>,
) -> (mpsc::Receiver<Change<F>>, Watched<F>, Vec<impl Future<Output = ()> + Send + 'static + use<F>>)
where
    F: Ord + Copy + std::fmt::Debug + Send + Sync + 'static,
{
    let (out, changes) = mpsc::channel(QUEUE);
    let shared = |l: &List<F>| (l.feed, Shared { health: Mutex::default(), hurry: Notify::new() });
    let watched = Watched(Arc::new(lists.iter().map(shared).collect()));
    let tasks = lists.into_iter().map(|list| {
        let request = Request::new(list.path.clone());
        Follow { client: client.clone(), request, list, out: out.clone(), watched: watched.clone() }.run()
    });
    let tasks = tasks.collect();
    (changes, watched, tasks)
}

/// Why a list or a watch ended.
enum End {
    /// It goes on where it was.
    Again,
    /// It begins with a list.
    Anew(String),
    /// Nobody takes the changes any more.
    Left,
    /// The API server does not know the kind, and need not.
    Absent,
    /// It failed.
    Failed(Error),
}

impl From<Error> for End {
    fn from(error: Error) -> Self {
        // 410: the version is too old. 504, of a watch: it is one that the API server does not have yet, as after a
        // restored backup.
        match error.code() {
            Some(410 | 504) => End::Anew(error.to_string()),
            _ => End::Failed(error),
        }
    }
}

#[derive(Deserialize)]
struct Page {
    metadata: PageMeta,
    #[serde(default)]
    items: Option<Vec<Value>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PageMeta {
    resource_version: Option<String>,
    #[serde(rename = "continue")]
    more: Option<String>,
}

#[derive(Deserialize)]
struct WatchEvent {
    #[serde(rename = "type")]
    kind: String,
    object: Value,
}

struct Follow<F> {
    client: kube::Client,
    request: Request,
    list: List<F>,
    out: mpsc::Sender<Change<F>>,
    watched: Watched<F>,
}

impl<F: Ord + Copy + std::fmt::Debug + Send + Sync + 'static> Follow<F> {
    async fn run(self) {
        let feed = self.list.feed;
        let Some(shared) = self.watched.0.get(&feed) else { return };
        let mut version: Option<String> = None;
        let mut wait = BACKOFF.0;
        let (mut lived, mut fresh) = (false, false);
        loop {
            let end = match &mut version {
                None => match self.all(shared).await {
                    Ok(v) => {
                        version = Some(v);
                        fresh = true;
                        wait = BACKOFF.0;
                        continue;
                    }
                    Err(end) => end,
                },
                Some(v) => {
                    let (before, started) = (v.clone(), Instant::now());
                    let fresh = std::mem::take(&mut fresh);
                    // What has been said is said with its version, so that nothing is lost where the watch is given up.
                    let end = tokio::select! {
                        end = self.changes(shared, v) => end,
                        end = self.forgets(&before), if !fresh => end,
                    };
                    shared.health().followed = None;
                    lived = started.elapsed() >= LIVED;
                    if *v != before || lived {
                        wait = BACKOFF.0;
                    }
                    end
                }
            };
            let pause = match end {
                End::Left => return,
                End::Again if lived => Duration::ZERO,
                End::Again => next(&mut wait),
                End::Anew(why) => {
                    tracing::info!(list = ?feed, why, "the list is read again");
                    version = None;
                    // What went unheard until then others may have missed, too.
                    shared.health().lost = true;
                    // A server that says so again and again is not to be asked without a pause.
                    next(&mut wait)
                }
                End::Absent => {
                    let known = Change { feed, event: Event::Restarted(BTreeSet::new()), reached: None, newest: None };
                    if self.say(known).await.is_err() {
                        return;
                    }
                    let mut health = shared.health();
                    health.listed = true;
                    health.works();
                    ABSENT
                }
                End::Failed(error) => {
                    let (mut health, error) = (shared.health(), error.to_string());
                    if health.failing.as_ref().is_none_or(|(_, why)| *why != error) {
                        tracing::warn!(list = ?feed, error, "the API server cannot be followed; trying again");
                    }
                    health.fails(error);
                    drop(health);
                    next(&mut wait)
                }
            };
            tokio::select! {
                () = self.out.closed() => return,
                () = tokio::time::sleep(pause) => {}
                // Others have it back already.
                () = shared.hurry.notified() => {}
            }
        }
    }

    async fn say(&self, change: Change<F>) -> Result<(), End> {
        self.out.send(change).await.map_err(|_| End::Left)
    }

    fn parameters(&self, limit: u32) -> ListParams {
        let selector = |s: &String| (!s.is_empty()).then(|| s.clone());
        ListParams {
            field_selector: selector(&self.list.fields),
            label_selector: selector(&self.list.labels),
            limit: Some(limit),
            ..ListParams::default()
        }
    }

    fn ask(&self, params: &ListParams) -> Result<http::Request<Vec<u8>>, End> {
        self.request.list(params).map_err(|e| End::Failed(kube::Error::BuildRequest(e).into()))
    }

    async fn page(&self, request: http::Request<Vec<u8>>) -> Result<Page, End> {
        // To a list 504 says that the API server is slow: to read all anew would make it slower.
        within(self.client.request(request)).await.map_err(|error| match error.code() {
            Some(504) => End::Failed(error),
            _ => error.into(),
        })
    }

    /// Ends when the API server has not come so far: one whose storage was restored from a backup has not. A watch from a version
    /// that is not there yet waits for it without a word, and what changes until then is missed.
    async fn forgets(&self, version: &str) -> End {
        // Objects that a selector leaves out would be searched through for one that it takes. By name it may be all that is allowed.
        let by_name = Some(&self.list.fields).filter(|f| f.starts_with("metadata.name="));
        let params = ListParams { field_selector: by_name.cloned(), limit: Some(1), ..ListParams::default() };
        let mut wait = BACKOFF.0;
        loop {
            let answer = match self.ask(&params) {
                Ok(mut request) => {
                    // A connection that stays idle beside the watch hangs when it does, and the next watch would be asked for there.
                    request.headers_mut().insert(http::header::CONNECTION, http::HeaderValue::from_static("close"));
                    self.page(request).await
                }
                Err(end) => Err(end),
            };
            let now = match answer {
                Ok(page) => page.metadata.resource_version.unwrap_or_default(),
                Err(End::Failed(_)) => {
                    // The watch says what that means for it.
                    tokio::time::sleep(next(&mut wait)).await;
                    continue;
                }
                Err(end) => return end,
            };
            match (now.parse::<u64>(), version.parse::<u64>()) {
                (Ok(now), Ok(version)) if now < version => {
                    return End::Anew(format!("its versions have gone back from {version} to {now}"));
                }
                _ => return std::future::pending().await,
            }
        }
    }

    /// Reads the list; says its version.
    async fn all(&self, shared: &Shared) -> Result<String, End> {
        let feed = &self.list.feed;
        let mut seen = BTreeSet::new();
        let mut params = self.parameters(PAGE);
        loop {
            let page = match self.page(self.ask(&params)?).await {
                Err(End::Failed(error)) if error.code() == Some(404) && self.list.optional => return Err(End::Absent),
                answer => answer?,
            };
            heard(shared);
            for object in page.items.into_iter().flatten() {
                let newest = number(&object["metadata"]["resourceVersion"]);
                let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
                seen.insert((text("namespace"), text("name")));
                let event = Event::Applied(Box::new(object));
                self.say(Change { feed: *feed, event, reached: None, newest }).await?;
            }
            let version = page.metadata.resource_version.unwrap_or_default();
            params.continue_token = page.metadata.more.filter(|m| !m.is_empty());
            if params.continue_token.is_some() {
                continue;
            }
            let reached = version.parse().ok();
            self.say(Change { feed: *feed, event: Event::Restarted(seen), reached, newest: None }).await?;
            let mut health = shared.health();
            health.listed = true;
            health.lists += 1;
            health.version = reached.unwrap_or_default();
            health.works();
            return Ok(version);
        }
    }

    /// Follows the list from a version on, which it moves.
    async fn changes(&self, shared: &Shared, version: &mut String) -> End {
        let List { feed, fields, labels, .. } = &self.list;
        let selector = |s: &String| (!s.is_empty()).then(|| s.clone());
        let params = WatchParams {
            field_selector: selector(fields),
            label_selector: selector(labels),
            timeout: Some(WATCH),
            ..WatchParams::default()
        };
        let request = match self.request.watch(&params, version) {
            Ok(request) => request,
            Err(error) => return End::Failed(kube::Error::BuildRequest(error).into()),
        };
        let stream = match within(self.client.request_stream(request)).await {
            Ok(stream) => stream,
            Err(error) => return error.into(),
        };
        heard(shared);
        {
            let mut health = shared.health();
            health.works();
            health.followed = Some(Instant::now());
        }
        // Whoever asked for another watch has it.
        let _ = shared.hurry.notified().now_or_never();
        let mut stream = std::pin::pin!(stream);
        let mut line = Vec::new();
        loop {
            line.clear();
            let mut limited = (&mut stream).take(MAX_EVENT);
            let read = tokio::select! {
                read = tokio::time::timeout(SILENT, limited.read_until(b'\n', &mut line)) => read,
                () = shared.hurry.notified() => {
                    tracing::info!(list = ?feed, "another watch takes the place of this one, which may be behind");
                    return End::Again;
                }
            };
            match read {
                Err(_) => {
                    tracing::warn!(list = ?feed, "the watch said nothing for {} s: another one takes its place", SILENT.as_secs());
                    shared.health().lost = true;
                    return End::Again;
                }
                Ok(Err(error)) => return End::Failed(Error::Broken(error.to_string())),
                // The API server ends each watch after a while.
                Ok(Ok(0)) => return End::Again,
                Ok(Ok(_)) if line.last() != Some(&b'\n') => {
                    return End::Failed(Error::Broken(format!("an event ends after {} octets", line.len())));
                }
                Ok(Ok(_)) => {}
            }
            heard(shared);
            let event: WatchEvent = match serde_json::from_slice(&line) {
                Ok(event) => event,
                Err(error) => return End::Anew(format!("an event cannot be read: {error}")),
            };
            let object = event.object;
            if event.kind == "ERROR" {
                let code = object["code"].as_u64();
                let message = object["message"].as_str().unwrap_or_default().to_owned();
                return match code {
                    Some(410 | 504) => End::Anew(message),
                    _ => End::Failed(Error::Broken(message)),
                };
            }
            let text = object["metadata"]["resourceVersion"].as_str().map(str::to_owned);
            let reached = number(&object["metadata"]["resourceVersion"]);
            let (event, newest) = match event.kind.as_str() {
                "ADDED" | "MODIFIED" => (Event::Applied(Box::new(object)), reached),
                "DELETED" => (Event::Deleted(Box::new(object)), reached),
                "BOOKMARK" => (Event::Bookmark, None),
                // A kind of event that is not known could be a change: a list shows it.
                other => return End::Anew(format!("an event of the unknown type {other}")),
            };
            if let Err(end) = self.say(Change { feed: *feed, event, reached, newest }).await {
                return end;
            }
            let mut health = shared.health();
            health.events += 1;
            if let Some(text) = text {
                health.version = reached.unwrap_or(health.version);
                *version = text;
            }
        }
    }
}

fn heard(shared: &Shared) {
    shared.health().heard = Some(Instant::now());
}

/// resourceVersions are decimal numbers (KEP-5504).
fn number(version: &Value) -> Option<u64> {
    version.as_str()?.parse().ok()
}

/// The time to wait, between half and all of `wait`, so that gateways do not come back all at once; the next wait is twice
/// as long.
fn next(wait: &mut Duration) -> Duration {
    let now = *wait;
    *wait = (now * 2).min(BACKOFF.1);
    now.mul_f64(rand::random_range(0.5..1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_back_when_nobody_knows_what_was_missed() {
        let ago = |ms| Instant::now().checked_sub(Duration::from_millis(ms));
        let back = |health: &mut Health| {
            health.works();
            (health.back.take().is_some(), health.lost, health.failing.is_some())
        };
        let mut health = Health { heard: ago(10), ..Health::default() };
        assert_eq!(back(&mut health), (false, false, false), "it never failed");
        health.fails("reset".into());
        assert_eq!(back(&mut health), (false, false, false), "it has just been heard");
        health.heard = ago(1000);
        health.fails("reset".into());
        assert_eq!(back(&mut health), (true, false, false), "nobody knows since when nothing came");
        health.heard = ago(10);
        health.failing = ago(1000).map(|at| (at, "refused".into()));
        health.fails("refused".into());
        assert_eq!(back(&mut health), (true, false, false), "it was away for long");
        health.lost = true;
        assert_eq!(back(&mut health), (true, false, false), "it was read anew");
    }

    #[test]
    fn waits_grow_to_a_bound_and_differ() {
        let mut wait = BACKOFF.0;
        let waits: Vec<Duration> = (0..20).map(|_| next(&mut wait)).collect();
        assert!(waits[0] <= BACKOFF.0 && waits[0] >= BACKOFF.0 / 2);
        let last = &waits[10..];
        assert!(last.iter().all(|w| *w <= BACKOFF.1 && *w >= BACKOFF.1 / 2));
        assert!(last.iter().collect::<BTreeSet<_>>().len() > 5);
    }
}
