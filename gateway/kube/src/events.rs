//! Events of `events.k8s.io` on pods: what was denied, once in a while.

use std::collections::HashMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::PostParams;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::client::{Connection, Error, within};
use crate::lease::{Leads, leads};

/// The reason of all of them.
pub const REASON: &str = "EgressDenied";
/// The same denial is said again after so long.
const ONCE: Duration = Duration::from_secs(600);
/// Different denials that are remembered.
const REMEMBERED: usize = 8192;
/// Events in a burst, and the time between two of many.
const BURST: u32 = 25;
const SPACING: Duration = Duration::from_millis(500);
/// The longest note, by the API.
const MAX_NOTE: usize = 1024;
/// The longest name before the API server's own suffix.
const MAX_PREFIX: usize = 200;

/// A denial, for its pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod.
    pub pod: String,
    /// The name or address that it asked for.
    pub what: String,
    /// The published reason code.
    pub reason: String,
    /// What to say.
    pub note: String,
}

/// Decides which denials are said: each once in ten minutes, and not too many. Times are local, since any moment.
#[derive(Debug, Default)]
pub struct Sieve {
    said: HashMap<(String, String, String, String), Duration>,
    /// When all of the burst is there again.
    full_at: Duration,
}

impl Sieve {
    /// Whether this one is said now.
    pub fn lets(&mut self, d: &Denial, now: Duration) -> bool {
        let key = (d.namespace.clone(), d.pod.clone(), d.what.clone(), d.reason.clone());
        let old = |at: &Duration| now.saturating_sub(*at) < ONCE;
        if self.said.get(&key).is_some_and(old) {
            return false;
        }
        let used = self.full_at.max(now);
        if used - now > SPACING * (BURST - 1) {
            return false;
        }
        if self.said.len() >= REMEMBERED {
            self.said.retain(|_, at| old(at));
            if self.said.len() >= REMEMBERED {
                return false;
            }
        }
        self.full_at = used + SPACING;
        self.said.insert(key, now);
        true
    }

    /// This one could not be said: it may be tried again.
    fn forget(&mut self, d: &Denial) {
        self.said.remove(&(d.namespace.clone(), d.pod.clone(), d.what.clone(), d.reason.clone()));
    }
}

/// Writes events while this gateway leads, until the channel ends. `reporter` is its name.
pub async fn write(connection: Connection, mut denials: mpsc::Receiver<Denial>, leading: Leads) {
    let start = Instant::now();
    let mut sieve = Sieve::default();
    while let Some(denial) = denials.recv().await {
        if !leads(&leading) || !sieve.lets(&denial, start.elapsed()) {
            continue;
        }
        match one(&connection, &denial).await {
            Ok(()) => {}
            Err(error) => {
                sieve.forget(&denial);
                tracing::debug!(%error, namespace = denial.namespace, pod = denial.pod, "no event of a denial");
            }
        }
    }
}

async fn one(connection: &Connection, d: &Denial) -> Result<(), Error> {
    let pods: Api<Pod> = Api::namespaced(connection.client.clone(), &d.namespace);
    // `kubectl describe` finds events by the pod's UID.
    let Some(pod) = within(pods.get_metadata_opt(&d.pod)).await? else { return Ok(()) };
    let Some(uid) = pod.metadata.uid else { return Ok(()) };
    let events: Api<Event> = Api::namespaced(connection.client.clone(), &d.namespace);
    within(events.create(&PostParams::default(), &event(d, uid, &connection.name, Timestamp::now()))).await?;
    Ok(())
}

fn event(d: &Denial, uid: String, reporter: &str, now: Timestamp) -> Event {
    Event {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}.egress-", cut(&d.pod, MAX_PREFIX).trim_end_matches(['.', '-']))),
            namespace: Some(d.namespace.clone()),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(now)),
        reporting_controller: Some("tidegate.dev/gateway".to_owned()),
        reporting_instance: Some(cut(reporter, 128).to_owned()),
        action: Some("Deny".to_owned()),
        reason: Some(REASON.to_owned()),
        type_: Some("Warning".to_owned()),
        note: Some(cut(&d.note, MAX_NOTE).to_owned()),
        regarding: Some(ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: Some(d.pod.clone()),
            namespace: Some(d.namespace.clone()),
            uid: Some(uid),
            ..ObjectReference::default()
        }),
        ..Event::default()
    }
}

fn cut(text: &str, most: usize) -> &str {
    let end = (0..=most.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or_default();
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denial(pod: &str, what: &str) -> Denial {
        Denial {
            namespace: "shop".into(),
            pod: pod.into(),
            what: what.into(),
            reason: "name-not-allowed".into(),
            note: "n".into(),
        }
    }

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_same_once_in_ten_minutes() {
        let mut f = Sieve::default();
        for (d, at, lets) in [
            (denial("a", "x"), 0, true),
            (denial("a", "x"), 599, false),
            (denial("a", "y"), 599, true),
            (denial("b", "x"), 599, true),
            (Denial { reason: "ech".into(), ..denial("a", "x") }, 599, true),
            (denial("a", "x"), 600, true),
            (denial("a", "x"), 601, false),
        ] {
            assert_eq!(f.lets(&d, s(at)), lets, "{d:?} at {at}");
        }
    }

    #[test]
    fn a_flood_is_cut_and_memory_has_an_end() {
        let mut f = Sieve::default();
        let said = (0..1000).filter(|i| f.lets(&denial("a", &i.to_string()), s(0))).count();
        assert_eq!(said, BURST as usize);
        let said = (0..1000).filter(|i| f.lets(&denial("b", &i.to_string()), s(10))).count();
        assert_eq!(said, 20);
        // What was not said may be said later.
        assert!(f.lets(&denial("b", "999"), s(60)));
        let mut at = 0;
        for i in 0..20_000 {
            at += 1;
            f.lets(&denial("c", &i.to_string()), s(at));
        }
        assert!(f.said.len() <= REMEMBERED);
    }
}
