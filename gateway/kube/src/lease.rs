//! One leader among the gateways, by a Lease of `coordination.k8s.io`.
//!
//! No clock of another machine is believed: a Lease that has not changed for its duration, by the local monotonic clock
//! since it was seen to change, is free. A leader that could not renew stops well before that. The times in the Lease
//! are for people.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::Api;
use kube::api::PostParams;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::client::{Connection, Error, within};

/// How an election goes.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// A Lease that has not changed for so long is free.
    pub lease: Duration,
    /// A leader that has not renewed for so long is none any more. Shorter than `lease` by more than a write takes.
    pub renew: Duration,
    /// Time between two tries; each is up to a fifth longer or shorter.
    pub retry: Duration,
}

impl Default for Times {
    fn default() -> Self {
        Self { lease: Duration::from_secs(15), renew: Duration::from_secs(10), retry: Duration::from_secs(2) }
    }
}

/// A Lease as it was read or written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Who holds it; empty if nobody does.
    pub holder: String,
    /// For how long.
    pub duration: Duration,
    /// How often it went from one to another.
    pub transitions: i32,
    /// Its resourceVersion.
    pub version: String,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Make the Lease, as its holder.
    Create,
    /// Write oneself into it, if it still has this version.
    Take(Record),
    /// Prolong it, if it still has this version.
    Renew(Record),
    /// Another one holds it.
    Wait,
}

/// What one candidate knows. Times are local, since any moment.
#[derive(Debug)]
pub struct Election {
    me: String,
    times: Times,
    /// The Lease, and since when it is as it is.
    seen: Option<(Option<Record>, Duration)>,
    /// When the last renewal that was confirmed was sent.
    renewed: Option<Duration>,
}

impl Election {
    /// A candidate.
    pub fn new(me: String, times: Times) -> Self {
        Self { me, times, seen: None, renewed: None }
    }

    /// The Lease was read; absent: there is none.
    pub fn observe(&mut self, record: Option<Record>, now: Duration) {
        if record.as_ref().is_none_or(|r| r.holder != self.me) {
            self.renewed = None;
        }
        if self.seen.as_ref().is_none_or(|(old, _)| *old != record) {
            self.seen = Some((record, now));
        }
    }

    /// What to do now. The Lease must have been observed.
    pub fn step(&self, now: Duration) -> Step {
        match &self.seen {
            None | Some((None, _)) => Step::Create,
            Some((Some(r), _)) if r.holder == self.me => Step::Renew(r.clone()),
            Some((Some(r), _)) if r.holder.is_empty() => Step::Take(r.clone()),
            Some((Some(r), since)) if now.saturating_sub(*since) > r.duration.max(self.times.lease) => {
                Step::Take(r.clone())
            }
            Some(_) => Step::Wait,
        }
    }

    /// A write succeeded that was sent at `sent` and gave this record.
    pub fn written(&mut self, record: Record, sent: Duration) {
        self.renewed = (record.holder == self.me).then_some(sent);
        self.seen = Some((Some(record), sent));
    }

    /// This candidate leads no more, whatever the Lease says.
    pub fn resign(&mut self) {
        self.renewed = None;
    }

    /// Until when this candidate leads; absent if it does not.
    pub fn leads_until(&self, now: Duration) -> Option<Duration> {
        self.renewed.map(|sent| sent + self.times.renew).filter(|until| now < *until)
    }
}

/// Until when this gateway leads; absent: it does not.
pub type Leads = watch::Receiver<Option<Instant>>;

/// Whether a gateway leads at this moment.
pub fn leads(leads: &Leads) -> bool {
    leads.borrow().is_some_and(|until| Instant::now() < until)
}

/// Waits for the answer to what only the leader asks for, and not longer than this gateway leads: another one may
/// write soon after.
///
/// # Errors
/// The request's own, [`Error::Timeout`], and [`Error::Deposed`].
pub async fn while_leading<T>(
    leads: &Leads,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, Error> {
    let mut leads = leads.clone();
    let until = leads.borrow_and_update().filter(|until| Instant::now() < *until).ok_or(Error::Deposed)?;
    tokio::select! {
        answer = within(request) => answer,
        () = tokio::time::sleep_until(until) => Err(Error::Deposed),
        _ = leads.wait_for(Option::is_none) => Err(Error::Deposed),
    }
}

/// Until it says so; for ever if it never does.
async fn told(says: &mut watch::Receiver<bool>) {
    if says.wait_for(|s| *s).await.is_err() {
        std::future::pending().await
    }
}

/// Stands for election with the Lease of this name until `stop` says so, then gives it up. While this gateway is `stale`
/// it gives it up, too, and does not stand.
pub async fn stand(
    connection: Connection,
    lease: &str,
    times: Times,
    leads: watch::Sender<Option<Instant>>,
    mut stale: watch::Receiver<bool>,
    mut stop: watch::Receiver<bool>,
) {
    let api: Api<Lease> = Api::namespaced(connection.client.clone(), &connection.namespace);
    let start = Instant::now();
    let mut election = Election::new(connection.name.clone(), times);
    let mut said = String::new();
    loop {
        if *stale.borrow_and_update() {
            leads.send_replace(None);
            give_up(&api, lease, &mut election, start).await;
            tracing::info!(lease, "this gateway does not stand for election: it knows less than others");
            tokio::select! {
                fit = stale.wait_for(|s| !*s) => if fit.is_err() { return },
                () = told(&mut stop) => return,
            }
        }
        let turned = {
            let mut turn = std::pin::pin!(turn(&api, lease, &mut election, start, times.retry * 2));
            tokio::select! {
                turned = &mut turn => turned,
                () = told(&mut stale) => {
                    leads.send_replace(None);
                    turn.await
                }
            }
        };
        match turned {
            Ok(()) => said.clear(),
            Err(error) => {
                // The same failure again and again is one line.
                let text = error.to_string();
                if text != said {
                    tracing::warn!(lease, error = text, "the election of a leader does not go on; trying again");
                    said = text;
                }
            }
        }
        if *stale.borrow() {
            continue;
        }
        let until = election.leads_until(start.elapsed()).map(|until| start + until);
        if until.is_some() != leads.borrow().is_some() {
            tracing::info!(lease, leads = until.is_some(), "the leader writes statuses and events");
        }
        leads.send_replace(until);
        let jitter = f64::from(u32::from(rand())) / f64::from(u16::MAX);
        let wait = times.retry.mul_f64(0.8 + 0.4 * jitter);
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = told(&mut stale) => {}
            () = told(&mut stop) => {
                leads.send_replace(None);
                give_up(&api, lease, &mut election, start).await;
                return;
            }
        }
    }
}

/// Gives the Lease up, if it is held: others need not wait for its end.
async fn give_up(api: &Api<Lease>, name: &str, election: &mut Election, start: Instant) {
    election.resign();
    if let Some((Some(r), _)) = &election.seen
        && r.holder == election.me
    {
        let free = written(api, name, "", r, Duration::from_secs(1));
        // Otherwise it ends by itself.
        if let Ok(Ok(free)) = tokio::time::timeout(election.times.retry, free).await {
            election.observe(Some(free), start.elapsed());
        }
    }
}

/// Reads the Lease, or writes it.
async fn turn(
    api: &Api<Lease>,
    name: &str,
    election: &mut Election,
    start: Instant,
    limit: Duration,
) -> Result<(), Error> {
    let me = election.me.clone();
    let duration = election.times.lease;
    let limited = async {
        // A holder knows what it wrote last; everybody else looks.
        if !matches!(&election.seen, Some((Some(r), _)) if r.holder == me) {
            let found = api.get_opt(name).await?.as_ref().map(record);
            election.observe(found, start.elapsed());
        }
        let sent = start.elapsed();
        let result = match election.step(sent) {
            Step::Wait => return Ok(()),
            Step::Create => {
                let new = Record { holder: me.clone(), duration, transitions: 0, version: String::new() };
                let lease = object(name, &new, true);
                api.create(&PostParams::default(), &lease).await.map(|l| record(&l))
            }
            Step::Take(old) => {
                let old = Record { transitions: old.transitions.saturating_add(1), ..old };
                written(api, name, &me, &old, duration).await
            }
            Step::Renew(old) => written(api, name, &me, &old, duration).await,
        };
        match result {
            Ok(record) => election.written(record, sent),
            Err(error) => {
                // Somebody else was faster, or nobody knows what became of it: it is read again.
                let found = api.get_opt(name).await?.as_ref().map(record);
                election.observe(found, start.elapsed());
                if !matches!(&error, kube::Error::Api(s) if s.code == 409) {
                    return Err(error);
                }
            }
        }
        Ok(())
    };
    match tokio::time::timeout(limit, limited).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(Error::Timeout),
    }
}

async fn written(
    api: &Api<Lease>,
    name: &str,
    holder: &str,
    old: &Record,
    duration: Duration,
) -> Result<Record, kube::Error> {
    let taken = holder != old.holder;
    let new = Record { holder: holder.to_owned(), duration, ..old.clone() };
    // The version makes it fail where somebody else wrote.
    let lease = object(name, &new, taken);
    Ok(record(&api.replace(name, &PostParams::default(), &lease).await?))
}

fn object(name: &str, r: &Record, taken: bool) -> Lease {
    let now = MicroTime(k8s_openapi::jiff::Timestamp::now());
    Lease {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            resource_version: (!r.version.is_empty()).then(|| r.version.clone()),
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(r.holder.clone()),
            lease_duration_seconds: Some(i32::try_from(r.duration.as_secs()).unwrap_or(i32::MAX)),
            acquire_time: taken.then(|| now.clone()),
            renew_time: Some(now),
            lease_transitions: Some(r.transitions),
            ..LeaseSpec::default()
        }),
    }
}

fn record(lease: &Lease) -> Record {
    let spec = lease.spec.as_ref();
    let seconds = spec.and_then(|s| s.lease_duration_seconds).and_then(|s| u64::try_from(s).ok());
    Record {
        holder: spec.and_then(|s| s.holder_identity.clone()).unwrap_or_default(),
        duration: Duration::from_secs(seconds.unwrap_or_default()),
        transitions: spec.and_then(|s| s.lease_transitions).unwrap_or_default(),
        version: lease.metadata.resource_version.clone().unwrap_or_default(),
    }
}

/// A random number: a new `RandomState` has new random keys.
fn rand() -> u16 {
    use std::hash::BuildHasher;
    std::hash::RandomState::new().hash_one(0u8) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: Times =
        Times { lease: Duration::from_secs(15), renew: Duration::from_secs(10), retry: Duration::from_secs(2) };

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn held(holder: &str, version: &str) -> Record {
        Record { holder: holder.into(), duration: s(15), transitions: 0, version: version.into() }
    }

    #[test]
    fn a_lease_is_free_when_it_did_not_change_for_its_duration_by_the_own_clock() {
        let mut e = Election::new("a".into(), T);
        assert_eq!(e.step(s(0)), Step::Create);
        e.observe(Some(held("b", "1")), s(100));
        assert_eq!(e.step(s(115)), Step::Wait);
        // It lives: the time begins anew.
        e.observe(Some(held("b", "2")), s(114));
        assert_eq!(e.step(s(129)), Step::Wait);
        e.observe(Some(held("b", "2")), s(129));
        assert_eq!(e.step(s(130)), Step::Take(held("b", "2")));
        // One that says that it ends sooner than ours is believed no sooner; one that says later is.
        e.observe(Some(Record { duration: s(1), ..held("b", "3") }), s(200));
        assert_eq!(e.step(s(210)), Step::Wait);
        e.observe(Some(Record { duration: s(60), ..held("b", "4") }), s(300));
        assert_eq!(e.step(s(350)), Step::Wait);
        // Given up.
        e.observe(Some(held("", "5")), s(400));
        assert_eq!(e.step(s(400)), Step::Take(held("", "5")));
    }

    #[test]
    fn a_leader_stops_before_another_may_begin() {
        let mut e = Election::new("a".into(), T);
        assert_eq!(e.leads_until(s(0)), None);
        e.written(held("a", "1"), s(10));
        assert_eq!(e.leads_until(s(11)), Some(s(20)));
        assert_eq!(e.step(s(11)), Step::Renew(held("a", "1")));
        assert_eq!(e.leads_until(s(20)), None);
        // Another one sees the write at the earliest when it was sent.
        let mut other = Election::new("b".into(), T);
        other.observe(Some(held("a", "1")), s(10));
        assert_eq!(other.step(s(25)), Step::Wait);
        // It lost the Lease: it leads no more, at once.
        e.written(held("a", "2"), s(21));
        e.observe(Some(held("b", "3")), s(22));
        assert_eq!((e.leads_until(s(22)), e.step(s(22))), (None, Step::Wait));
        // A Lease that has its name from before its restart is its own only when it has renewed it.
        let mut again = Election::new("a".into(), T);
        again.observe(Some(held("a", "9")), s(0));
        assert_eq!((again.leads_until(s(0)), again.step(s(0))), (None, Step::Renew(held("a", "9"))));
    }

    #[tokio::test]
    async fn what_the_leader_asks_for_ends_with_its_lead() {
        let never = || std::future::pending::<Result<(), kube::Error>>();
        let (tx, leads) = watch::channel(None);
        assert!(matches!(while_leading(&leads, never()).await, Err(Error::Deposed)));
        // Its time ends.
        tx.send_replace(Some(Instant::now() + Duration::from_millis(200)));
        while_leading(&leads, async { Ok(()) }).await.unwrap();
        let begun = Instant::now();
        assert!(matches!(while_leading(&leads, never()).await, Err(Error::Deposed)));
        assert!(begun.elapsed() < Duration::from_secs(2));
        // It is none any more, such as because it is stale.
        tx.send_replace(Some(Instant::now() + s(60)));
        let asked = while_leading(&leads, never());
        let deposed = async { tx.send_replace(None) };
        let (answer, _) = tokio::join!(asked, deposed);
        assert!(matches!(answer, Err(Error::Deposed)));
    }
}
