//! The taint with which kubelets register nodes that are new (`--register-with-taints`): it keeps pods off until the node's agent
//! enforces. Agents have no rights at the API server, so the leader among the gateways takes it off.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::{Patch, PatchParams};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};

use crate::client::{Connection, Error, within};
use crate::lease::{Leads, leads, while_leading};
use crate::watch::{self as follow, Change, Event, List};

/// The taint's key.
pub const TAINT: &str = "tidegate.dev/agent-not-ready";
/// What could not be done is tried again so often.
const AGAIN: Duration = Duration::from_secs(1);
/// Nodes of one round.
const AT_ONCE: usize = 64;

/// The nodes whose agents are connected and whose kernels hold policy, by name.
pub type Enforcing = Arc<BTreeSet<String>>;

/// Takes the taint off nodes that enforce, while this gateway leads, until nobody says any more which ones do.
pub async fn clear(connection: Connection, enforcing: watch::Receiver<Enforcing>, leading: Leads) {
    let nodes = List {
        feed: (),
        path: "/api/v1/nodes".to_owned(),
        fields: String::new(),
        labels: String::new(),
        optional: false,
    };
    let (changes, _watched, tasks) = follow::watch(&connection.client, vec![nodes]);
    tokio::select! {
        _ = join_all(tasks) => {}
        () = work(Api::all(connection.client.clone()), changes, enforcing, leading) => {}
    }
}

async fn work(
    api: Api<Node>,
    mut changes: mpsc::Receiver<Change<()>>,
    mut enforcing: watch::Receiver<Enforcing>,
    leading: Leads,
) {
    let mut tainted: BTreeSet<String> = BTreeSet::new();
    let mut again = interval(AGAIN);
    again.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut said = String::new();
    loop {
        tokio::select! {
            change = changes.recv() => match change {
                Some(change) => note(&mut tainted, change.event),
                None => return,
            },
            _ = again.tick() => {}
        }
        // What else has come meanwhile.
        while let Ok(change) = changes.try_recv() {
            note(&mut tainted, change.event);
        }
        if !leads(&leading) {
            continue;
        }
        let enforce = enforcing.borrow_and_update().clone();
        if enforcing.has_changed().is_err() {
            return;
        }
        let ready: Vec<String> = tainted.iter().filter(|n| enforce.contains(*n)).take(AT_ONCE).cloned().collect();
        for name in ready {
            match untaint(&api, &name, &leading).await {
                // The watch may say for a moment what it was.
                Ok(()) => {
                    tainted.remove(&name);
                    tracing::info!(node = name, "its agent enforces: pods may be scheduled there");
                }
                Err(error) => {
                    let text = format!("{name}: {error}");
                    if text != said {
                        tracing::warn!(node = name, %error, "the startup taint cannot be taken off; trying again");
                        said = text;
                    }
                }
            }
        }
    }
}

fn note(tainted: &mut BTreeSet<String>, event: Event) {
    match event {
        Event::Applied(node) => {
            let Some(name) = node["metadata"]["name"].as_str() else { return };
            let has = node["spec"]["taints"].as_array().is_some_and(|all| all.iter().any(|t| t["key"] == TAINT));
            if has {
                tainted.insert(name.to_owned());
            } else {
                tainted.remove(name);
            }
        }
        Event::Deleted(node) => drop(node["metadata"]["name"].as_str().map(|name| tainted.remove(name))),
        Event::Restarted(all) => tainted.retain(|name| all.contains(&(String::new(), name.clone()))),
        Event::Bookmark => {}
    }
}

/// Takes the taint off as the node is now: whoever changes it at the same time is not overwritten.
async fn untaint(api: &Api<Node>, name: &str, leading: &Leads) -> Result<(), Error> {
    let Some(node) = within(api.get_opt(name)).await? else { return Ok(()) };
    let all = node.spec.and_then(|s| s.taints).unwrap_or_default();
    let other: Vec<_> = all.iter().filter(|t| t.key != TAINT).collect();
    if other.len() == all.len() {
        return Ok(());
    }
    let patch = serde_json::json!({
        "metadata": {"resourceVersion": node.metadata.resource_version},
        "spec": {"taints": other},
    });
    while_leading(leading, api.patch(name, &PatchParams::default(), &Patch::Merge(&patch))).await.map(drop)
}
