//! Takes Tidegate out of a cluster before the chart's objects go: the hook of `helm uninstall`.
//!
//! 1. The agents' DaemonSet becomes one whose pods remove everything from their node and then sleep. Pods take the network
//!    plugin's way from then on.
//! 2. The gateways end, which by now carry nothing, so that nobody puts finalizers back. What they pinned on their nodes
//!    outlives them, and kubelets have made folders for both: the agents' pods clean up once more.
//! 3. The pools' finalizer and the objects that Tidegate itself made go: what it told of namespaces, the Lease, and what agents
//!    and gateways know each other by.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::identity::MADE;
use crate::objects::{delete, get, list, merge};
use crate::{Connection, Error};

/// Holds a pool that is in use.
pub const FINALIZER: &str = "tidegate.dev/in-use";
/// Who leads.
const LEASE: &str = "tidegate-gateway";
/// How often it is looked how far nodes and gateways are.
const LOOK: Duration = Duration::from_secs(1);
const GROUP: &str = "/apis/tidegate.dev/v1alpha1";

/// What gateways made in their namespace, by names that an installation chooses. Absent: it stays.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Made {
    /// The Secret with the authority's key.
    pub secret: Option<String>,
    /// The ConfigMap with what agents trust.
    pub trust: Option<String>,
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Nodes with an agent.
    pub nodes: u64,
    /// Nodes of these that have nothing of Tidegate any more.
    pub clean: u64,
    /// Whether every gateway has ended.
    pub gateways_ended: bool,
    /// Pools that were let go.
    pub pools: usize,
    /// Objects that Tidegate had made, and that are gone.
    pub objects: usize,
}

/// Takes Tidegate out. What nodes and gateways have not done after `limit` is said, and the rest is done all the same.
///
/// # Errors
/// The API server refused, or is away. It can be called again.
pub async fn uninstall(connection: &Connection, made: &Made, limit: Duration) -> Result<Removed, Error> {
    let mut removed = Removed::default();
    let deadline = Instant::now() + limit;
    let apps = format!("/apis/apps/v1/namespaces/{}", connection.namespace);
    let agents = format!("{apps}/daemonsets/tidegate-agent");
    if let Some(found) = get(connection, &agents).await? {
        merge(connection, &agents, &cleaning(&found)).await?;
        (removed.nodes, removed.clean) = all_clean(connection, &agents, deadline).await?;
    }
    let gateways = format!("{apps}/deployments/tidegate-gateway");
    let mut pinned = None;
    if let Some(found) = get(connection, &gateways).await? {
        pinned = pins(&found).map(str::to_owned);
        merge(connection, &gateways, &json!({"spec": {"replicas": 0}})).await?;
    }
    loop {
        let now = get(connection, &gateways).await?;
        removed.gateways_ended =
            now.is_none_or(|d| observed(&d) && d["status"]["replicas"].as_u64().unwrap_or_default() == 0);
        if removed.gateways_ended || Instant::now() >= deadline {
            break;
        }
        tokio::time::sleep(LOOK).await;
    }
    if removed.gateways_ended
        && let Some(found) = get(connection, &agents).await?
    {
        merge(connection, &agents, &cleaning_the_rest(&found, pinned.as_deref())).await?;
        (removed.nodes, removed.clean) = all_clean(connection, &agents, deadline).await?;
    }
    removed.pools = let_go(connection).await?;
    for object in listed(connection, "namespaceegresses").await? {
        let metadata = &object["metadata"];
        let (Some(namespace), Some(name)) = (metadata["namespace"].as_str(), metadata["name"].as_str()) else {
            continue;
        };
        delete(connection, &format!("{GROUP}/namespaces/{namespace}/namespaceegresses/{name}")).await?;
        removed.objects += 1;
    }
    delete(connection, &format!("/apis/coordination.k8s.io/v1/namespaces/{}/leases/{LEASE}", connection.namespace))
        .await?;
    for (kind, name) in [("secrets", &made.secret), ("configmaps", &made.trust)] {
        let Some(name) = name else { continue };
        let path = format!("/api/v1/namespaces/{}/{kind}/{name}", connection.namespace);
        if get(connection, &path).await?.as_ref().is_some_and(is_ours) {
            delete(connection, &path).await?;
            removed.objects += 1;
        }
    }
    Ok(removed)
}

/// Waits until every node is clean, and says of how many how many are.
async fn all_clean(connection: &Connection, agents: &str, deadline: Instant) -> Result<(u64, u64), Error> {
    loop {
        let now = get(connection, agents).await?.unwrap_or_default();
        let (nodes, clean) = clean(&now);
        if observed(&now) && clean >= nodes || Instant::now() >= deadline {
            return Ok((nodes, clean));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Where gateways pin what outlives them, on their nodes.
fn pins(gateways: &Value) -> Option<&str> {
    let volumes = gateways["spec"]["template"]["spec"]["volumes"].as_array()?;
    volumes.iter().find(|v| v["name"] == "bpf")?["hostPath"]["path"].as_str()
}

/// What makes the pods that have cleaned up do so again, with what gateways pinned, and with the folders that kubelets have made for
/// these pods. A pod cannot remove what is mounted into it: it sees the folder above, too.
fn cleaning_the_rest(agents: &Value, pinned: Option<&str>) -> Value {
    const FOLDER: &str = "--folder";
    let pod = &agents["spec"]["template"]["spec"];
    let (mut containers, mut volumes) = (pod["initContainers"].clone(), pod["volumes"].clone());
    let (Some(clean_up), Some(volumes)) = (containers.get_mut(0), volumes.as_array_mut()) else { return json!({}) };
    // The hook may be repeated.
    if clean_up["args"].as_array().is_none_or(|args| args.iter().any(|a| a == FOLDER)) {
        return json!({});
    }
    let (mut args, mut mounts) = (Vec::new(), Vec::new());
    if let Some(pinned) = pinned {
        args.extend(["--gateways".to_owned(), pinned.to_owned()]);
    }
    for n in 0..volumes.len() {
        let host = &volumes[n]["hostPath"];
        let Some(path) = host["path"].as_str().filter(|_| host["type"] == "DirectoryOrCreate") else { continue };
        let path = path.trim_end_matches('/');
        // Folders of others are made where they are not there, too: only ours are removed.
        let Some((above, "tidegate")) = path.rsplit_once('/').filter(|(above, _)| !above.is_empty()) else { continue };
        let (name, at) = (format!("above-{n}"), format!("/above/{n}"));
        args.extend([FOLDER.to_owned(), format!("{at}/tidegate")]);
        mounts.push(json!({"name": name, "mountPath": at}));
        volumes.push(json!({"name": name, "hostPath": {"path": above, "type": "Directory"}}));
    }
    for (key, more) in [("args", json!(args)), ("volumeMounts", json!(mounts))] {
        if let (Some(all), Value::Array(more)) = (clean_up[key].as_array_mut(), more) {
            all.extend(more);
        }
    }
    json!({"spec": {"template": {"spec": {"initContainers": containers, "volumes": volumes}}}})
}

/// Whether gateways made an object, and not somebody who gave it to them.
fn is_ours(object: &Value) -> bool {
    object["metadata"]["labels"][MADE.0] == MADE.1
}

/// A collection; empty if its definition is not there.
async fn listed(connection: &Connection, resource: &str) -> Result<Vec<Value>, Error> {
    match list(connection, &format!("{GROUP}/{resource}"), "").await {
        Err(error) if error.code() == Some(404) => Ok(Vec::new()),
        other => other,
    }
}

/// Removes our finalizer from every pool that has it, and no other.
async fn let_go(connection: &Connection) -> Result<usize, Error> {
    let mut n = 0;
    for pool in listed(connection, "egresspools").await? {
        let Some(patch) = without_finalizer(&pool) else { continue };
        let Some(name) = pool["metadata"]["name"].as_str() else { continue };
        // With the version that was read: somebody else's finalizer that came meanwhile is a conflict, and the hook runs again.
        match merge(connection, &format!("{GROUP}/egresspools/{name}"), &patch).await {
            Err(error) if error.code() == Some(404) => {}
            Err(error) => return Err(error),
            Ok(_) => n += 1,
        }
    }
    Ok(n)
}

fn without_finalizer(pool: &Value) -> Option<Value> {
    let metadata = &pool["metadata"];
    let all = metadata["finalizers"].as_array()?;
    let rest: Vec<&Value> = all.iter().filter(|f| *f != FINALIZER).collect();
    (rest.len() < all.len())
        .then(|| json!({"metadata": {"finalizers": rest, "resourceVersion": metadata["resourceVersion"]}}))
}

/// What makes the agents' DaemonSet one that cleans up: the agent's own container with `--cleanup` comes first, and is tried
/// again until it succeeds; then the pod sleeps, and is ready.
fn cleaning(agents: &Value) -> Value {
    let pod = &agents["spec"]["template"]["spec"];
    // The hook may be repeated.
    if pod["initContainers"].is_array() {
        return json!({});
    }
    let mut clean_up = pod["containers"][0].clone();
    let sleep = json!({
        "name": "agent",
        "image": clean_up["image"],
        "imagePullPolicy": clean_up["imagePullPolicy"],
        "command": ["/bin/sleep"],
        "args": ["infinity"],
        "securityContext": {
            "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "runAsUser": 65532, "runAsNonRoot": true,
        },
    });
    if let Some(container) = clean_up.as_object_mut() {
        container.insert("name".into(), "clean-up".into());
        for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
            container.remove(probe);
        }
        if let Some(args) = container.entry("args").or_insert_with(|| json!([])).as_array_mut() {
            args.push("--cleanup".into());
        }
    }
    // Gateways that never came up have not written it.
    let mut volumes = pod["volumes"].clone();
    for volume in volumes.as_array_mut().into_iter().flatten().filter(|v| v["name"] == "trust") {
        volume["configMap"]["optional"] = json!(true);
    }
    json!({"spec": {
        // The old agent must have ended: both on one node would wait for each other.
        "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": "100%"}},
        "template": {"spec": {
            "initContainers": [clean_up], "containers": [sleep], "volumes": volumes, "terminationGracePeriodSeconds": 1,
        }},
    }})
}

/// Whether the controller has seen the object's present form.
fn observed(object: &Value) -> bool {
    object["status"]["observedGeneration"].as_i64() >= object["metadata"]["generation"].as_i64()
}

/// Nodes with an agent, and those of them whose pod has cleaned up.
fn clean(agents: &Value) -> (u64, u64) {
    let count = |key: &str| agents["status"][key].as_u64().unwrap_or_default();
    // Ready ones may be of the old form.
    let clean = if observed(agents) { count("updatedNumberScheduled").min(count("numberReady")) } else { 0 };
    (count("desiredNumberScheduled"), clean)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_clean_up_and_then_sleep() {
        let agents = json!({"spec": {"template": {"spec": {"containers": [{
            "name": "agent", "image": "i", "args": ["agent", "--config", "/c"], "livenessProbe": {"x": 1},
            "volumeMounts": [{"name": "bpf"}], "securityContext": {"privileged": true},
        }], "volumes": [{"name": "config", "configMap": {"name": "c"}}, {"name": "trust", "configMap": {"name": "t"}}]}}}});
        let patch = cleaning(&agents);
        let spec = &patch["spec"]["template"]["spec"];
        let first = &spec["initContainers"][0];
        assert_eq!(first["args"], json!(["agent", "--config", "/c", "--cleanup"]));
        assert!(first["livenessProbe"].is_null() && first["securityContext"]["privileged"] == true);
        assert_eq!(first["volumeMounts"], json!([{"name": "bpf"}]));
        assert_eq!(
            (&spec["containers"][0]["image"], &spec["containers"][0]["command"]),
            (&json!("i"), &json!(["/bin/sleep"]))
        );
        assert_eq!(
            spec["volumes"],
            json!([
                {"name": "config", "configMap": {"name": "c"}},
                {"name": "trust", "configMap": {"name": "t", "optional": true}},
            ]),
            "it does not wait for gateways that never came up"
        );
        // The second time there is nothing to do.
        assert_eq!(cleaning(&patch), json!({}));

        // Once the gateways have ended. In the cluster the patch is merged into the rest.
        let mut patch = patch;
        patch["spec"]["template"]["spec"]["volumes"] = json!([
            {"name": "run", "hostPath": {"path": "/run/tidegate", "type": "DirectoryOrCreate"}},
            {"name": "cni", "hostPath": {"path": "/opt/cni/bin", "type": "DirectoryOrCreate"}},
            {"name": "bpf", "hostPath": {"path": "/sys/fs/bpf", "type": "Directory"}},
        ]);
        let gateways = json!({"spec": {"template": {"spec": {"volumes": [
            {"name": "run", "hostPath": {"path": "/r"}}, {"name": "bpf", "hostPath": {"path": "/b"}},
        ]}}}});
        let again = cleaning_the_rest(&patch, pins(&gateways));
        let spec = &again["spec"]["template"]["spec"];
        let first = &spec["initContainers"][0];
        let own = ["agent", "--config", "/c", "--cleanup"];
        let more = ["--gateways", "/b", "--folder", "/above/0/tidegate"];
        assert_eq!(first["args"], json!([own.as_slice(), &more].concat()));
        assert_eq!(first["volumeMounts"], json!([{"name": "bpf"}, {"name": "above-0", "mountPath": "/above/0"}]));
        let all = spec["volumes"].as_array().unwrap();
        assert_eq!((all.len(), &all[3]["hostPath"]), (4, &json!({"path": "/run", "type": "Directory"})));
        assert_eq!(cleaning_the_rest(&again, Some("/b")), json!({}));
        let without = cleaning_the_rest(&patch, None);
        assert_eq!(without["spec"]["template"]["spec"]["initContainers"][0]["args"][4], "--folder");
    }

    #[test]
    fn a_node_counts_once_the_new_pod_is_ready() {
        let at = |generation: i64, updated: u64, ready: u64| {
            json!({"metadata": {"generation": 2}, "status": {"observedGeneration": generation,
                "desiredNumberScheduled": 3, "updatedNumberScheduled": updated, "numberReady": ready}})
        };
        assert_eq!(clean(&at(1, 3, 3)), (3, 0), "the controller has not seen it");
        assert_eq!(clean(&at(2, 0, 3)), (3, 0), "the old ones are ready");
        assert_eq!(clean(&at(2, 3, 2)), (3, 2));
        assert_eq!(clean(&at(2, 3, 3)), (3, 3));
    }

    #[test]
    fn what_was_given_to_gateways_is_not_theirs() {
        assert!(is_ours(&json!({"metadata": {"labels": {"app.kubernetes.io/part-of": "tidegate"}}})));
        assert!(!is_ours(&json!({"metadata": {"labels": {"app.kubernetes.io/part-of": "vault"}}})));
        assert!(!is_ours(&json!({"metadata": {"name": "tidegate-ca"}})));
    }

    #[test]
    fn only_our_finalizer_goes() {
        let pool = |f: Value| json!({"metadata": {"resourceVersion": "7", "finalizers": f}});
        let patch = without_finalizer(&pool(json!([FINALIZER, "other"]))).unwrap();
        assert_eq!(patch, json!({"metadata": {"resourceVersion": "7", "finalizers": ["other"]}}));
        assert_eq!(without_finalizer(&pool(json!(["other"]))), None);
        assert_eq!(without_finalizer(&pool(Value::Null)), None);
    }
}
