//! The leader's writer of statuses: reads what objects say, and writes what they should, at the pace of [`crate::pace`].

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::api::{ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams, Preconditions};
use kube::core::GroupVersionKind;
use kube::{Api, Client};
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::client::{Error, within};
use crate::lease::{Leads, leads, while_leading};
use crate::pace::{Kind, Next, Object, Pace, Statuses, Wanted, Write};

const GROUP: &str = "tidegate.dev";
const VERSION: &str = "v1alpha1";
/// The name under which fields are managed.
const MANAGER: &str = "tidegate-status";
/// Objects of one page of a list.
const PAGE: u32 = 500;
/// Everything is read again so often: somebody may have changed a status.
const RELIST: Duration = Duration::from_secs(600);
/// Time between two tries to read everything, longer after each.
const AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// Writes statuses while this gateway leads, until `wanted` ends. Nothing is written before the first wish.
pub async fn write(client: Client, mut wanted: watch::Receiver<Option<Arc<Statuses>>>, mut leading: Leads) {
    loop {
        let led = leading.wait_for(Option::is_some).await.is_ok();
        let wished = led && wanted.wait_for(Option::is_some).await.is_ok();
        if !wished {
            return;
        }
        let mut writer = Writer { client: client.clone(), pace: Pace::default(), start: Instant::now() };
        if !writer.learn(&leading).await {
            // It leads no more, and may not have heard it yet.
            tokio::time::sleep(AGAIN.0).await;
        } else if !writer.work(&mut wanted, &mut leading).await {
            return;
        }
    }
}

struct Writer {
    client: Client,
    pace: Pace,
    start: Instant,
}

fn resource(kind: Kind) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(GROUP, VERSION, kind.name()), kind.plural())
}

/// A number between 0 and 1: a new `RandomState` has new random keys.
fn jitter() -> f64 {
    use std::hash::BuildHasher;
    let n = std::hash::RandomState::new().hash_one(0u8) as u32;
    f64::from(n) / f64::from(u32::MAX)
}

fn status(object: &DynamicObject) -> &Value {
    object.data.get("status").unwrap_or(&Value::Null)
}

impl Writer {
    fn api(&self, object: &Object) -> Api<DynamicObject> {
        let resource = resource(object.kind);
        if object.namespace.is_empty() {
            Api::all_with(self.client.clone(), &resource)
        } else {
            Api::namespaced_with(self.client.clone(), &object.namespace, &resource)
        }
    }

    /// Reads what every object says. False: this gateway leads no more.
    async fn learn(&mut self, leading: &Leads) -> bool {
        let mut wait = AGAIN.0;
        loop {
            self.pace.forget();
            match self.list().await {
                Ok(()) => return leads(leading),
                Err(error) => {
                    tracing::warn!(%error, "the statuses cannot be read; trying again");
                    tokio::time::sleep(wait.mul_f64(0.75 + jitter() / 2.0)).await;
                    wait = (wait * 2).min(AGAIN.1);
                }
            }
            if !leads(leading) {
                return false;
            }
        }
    }

    async fn list(&mut self) -> Result<(), Error> {
        for kind in Kind::ALL {
            let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource(kind));
            let mut page = ListParams::default().limit(PAGE);
            loop {
                let list = within(api.list(&page)).await?;
                for o in list.items {
                    let (namespace, name) = (o.metadata.namespace.clone(), o.metadata.name.clone());
                    let object =
                        Object { kind, namespace: namespace.unwrap_or_default(), name: name.unwrap_or_default() };
                    // Others of that kind are not ours.
                    if kind == Kind::NamespaceEgress && object.name != NAME {
                        continue;
                    }
                    self.pace.learn(object, o.metadata.uid.as_deref().unwrap_or_default(), status(&o));
                }
                match list.metadata.continue_.filter(|c| !c.is_empty()) {
                    Some(token) => page = ListParams::default().limit(PAGE).continue_token(&token),
                    None => break,
                }
            }
        }
        Ok(())
    }

    /// Writes until this gateway leads no more, or everything should be read again (true), or nobody wishes (false).
    async fn work(&mut self, wanted: &mut watch::Receiver<Option<Arc<Statuses>>>, leading: &mut Leads) -> bool {
        let end = Instant::now() + RELIST.mul_f64(0.75 + jitter() / 2.0);
        let mut all = wanted.borrow_and_update().clone();
        loop {
            if let Some(all) = all.take() {
                self.pace.want(all, self.start.elapsed());
            }
            if !leads(leading) || Instant::now() >= end {
                return true;
            }
            let next = self.pace.next(self.start.elapsed(), &now());
            let wait = match next {
                Next::Write(write) => {
                    self.carry_out(&write, leading).await;
                    Duration::ZERO
                }
                Next::Wait(wait) => wait,
                Next::Idle => RELIST,
            };
            // A turn without a wait still sees what is wanted now.
            tokio::select! {
                biased;
                changed = wanted.changed() => {
                    if changed.is_err() {
                        return false;
                    }
                    all = wanted.borrow_and_update().clone();
                }
                // A leader's end that passes without news is seen at the next turn.
                _ = leading.changed() => {}
                () = tokio::time::sleep(wait.min(Duration::from_secs(1))) => {}
            }
        }
    }

    async fn carry_out(&mut self, write: &Write, leading: &Leads) {
        let object = write.object();
        let api = self.api(object);
        let done = match write {
            Write::Create(object) => {
                let mut new = DynamicObject::new(&object.name, &resource(object.kind)).within(&object.namespace);
                new.metadata.labels = Some([("app.kubernetes.io/managed-by".to_owned(), "tidegate".to_owned())].into());
                let params = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
                while_leading(leading, api.create(&params, &new)).await.map(Some)
            }
            Write::Status(object, body) => {
                let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
                while_leading(leading, api.patch_status(&object.name, &params, &Patch::Merge(body))).await.map(Some)
            }
            Write::Delete(object, uid) => {
                let preconditions = Preconditions { uid: Some(uid.clone()), resource_version: None };
                let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
                while_leading(leading, api.delete(&object.name, &params)).await.map(|_| None)
            }
        };
        let now = self.start.elapsed();
        let error = match done {
            Ok(Some(o)) => {
                let uid = o.metadata.uid.as_deref().unwrap_or_default();
                return self.pace.done(write, Some((uid, status(&o))), now);
            }
            Ok(None) => return self.pace.done(write, None, now),
            Err(error) => error,
        };
        match (error.code(), write) {
            (Some(404), _) => self.pace.missing(write, now, jitter()),
            // It is there already, with a status that nobody has read.
            (Some(409), Write::Create(object)) => match within(api.get_opt(&object.name)).await {
                Ok(Some(o)) => {
                    let uid = o.metadata.uid.as_deref().unwrap_or_default();
                    self.pace.done(write, Some((uid, status(&o))), now);
                }
                _ => self.pace.refused(write, now, jitter()),
            },
            // Another one of that name: it was made since, and is not ours to delete.
            (Some(409), Write::Delete(..)) => self.pace.done(write, None, now),
            (Some(code), _) if (400..500).contains(&code) && code != 429 => {
                tracing::warn!(kind = object.kind.name(), namespace = object.namespace, name = object.name, %error, "a status is refused; trying again");
                self.pace.refused(write, now, jitter());
            }
            _ => {
                tracing::warn!(%error, "no status can be written; trying again");
                self.pace.unanswered(write, now, jitter());
            }
        }
    }
}

/// The name of what Tidegate says of a namespace.
pub const NAME: &str = "tidegate";

fn now() -> String {
    // Whole seconds, as all of Kubernetes has them.
    let now = Timestamp::now();
    Timestamp::from_second(now.as_second()).unwrap_or(now).to_string()
}

/// One wish; absent for kinds whose status is not ours. `status` is asked for what it should say where `earlier`, in which it
/// is the same, does not know.
pub fn wanted(
    kind: &str,
    namespace: &str,
    name: &str,
    uid: &str,
    status: impl FnOnce() -> Value,
    earlier: Option<&Statuses>,
) -> Option<(Object, Wanted)> {
    let kind = Kind::ALL.into_iter().find(|k| k.name() == kind)?;
    let object = Object { kind, namespace: namespace.to_owned(), name: name.to_owned() };
    let same = earlier.and_then(|e| e.get(&object)).filter(|w| w.uid == uid).cloned();
    let wanted = same.unwrap_or_else(|| Wanted { uid: uid.to_owned(), status: Arc::new(status()) });
    Some((object, wanted))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_did_not_change_stays_the_same_value() {
        let all: Statuses = wanted("EgressPool", "", "p", "u", || json!({}), None).into_iter().collect();
        let again = wanted("EgressPool", "", "p", "u", || panic!(), Some(&all)).unwrap();
        assert!(Arc::ptr_eq(&again.1.status, &all[&again.0].status));
        assert_eq!(*wanted("EgressPool", "", "p", "v", || json!(1), Some(&all)).unwrap().1.status, json!(1));
        assert_eq!(wanted("Pod", "a", "b", "u", || json!({}), None), None);
        assert!(now().ends_with('Z') && now().len() == 20, "{}", now());
    }
}
