//! What is gathered, in the order of what says most.

use std::time::Duration;

use anyhow::Result;
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use tidegate_kubernetes::objects::{each, get, list};
use tidegate_kubernetes::pods::{self, Container};
use tidegate_kubernetes::{Connection, Error};

use super::Options;
use super::archive::Archive;
use super::collect::{self, Item};
use super::redact;

const GROUP: &str = "/apis/tidegate.dev/v1alpha1";
/// Pods that are asked at a time.
const AT_ONCE: usize = 8;
/// How long one text of a pod may take.
const TEXT: Duration = Duration::from_secs(15);
/// Objects of a collection that are kept: the newest.
const OBJECTS: usize = 5_000;
/// How long one collection may take. Of what comes until then the rest is kept.
const COLLECTION: Duration = Duration::from_secs(20);
/// What the chart makes, its pods and the gateways' Lease: by this label, and where others make it for them, as its name begins.
const OURS: (&str, &str) = ("app.kubernetes.io/name=tidegate", "tidegate-");

/// Gathers everything. What cannot be had is noted in the archive.
///
/// # Errors
/// The archive cannot be written.
pub async fn gather(connection: &Connection, options: &Options, archive: &mut Archive) -> Result<()> {
    let own = &connection.namespace;
    let (core, apps) = (format!("/api/v1/namespaces/{own}"), format!("/apis/apps/v1/namespaces/{own}"));
    one(connection, archive, "cluster/version.json", "/version").await?;
    for kind in ["egresspools", "clusteregresspolicies", "egresspolicies", "namespaceegresses"] {
        many(connection, archive, &format!("objects/{kind}.json"), (&format!("{GROUP}/{kind}"), ""), Some).await?;
    }
    // Other things may run in this namespace, too.
    for (kind, path) in [
        ("deployments", &apps),
        ("daemonsets", &apps),
        ("services", &core),
        ("poddisruptionbudgets", &format!("/apis/policy/v1/namespaces/{own}")),
    ] {
        many(connection, archive, &format!("install/{kind}.json"), (&format!("{path}/{kind}"), OURS.0), Some).await?;
    }
    for (file, path) in [
        ("install/endpointslices.json", format!("/apis/discovery.k8s.io/v1/namespaces/{own}/endpointslices")),
        ("install/leases.json", format!("/apis/coordination.k8s.io/v1/namespaces/{own}/leases")),
    ] {
        many(connection, archive, file, (&path, ""), |o| is_ours(&o["metadata"]["name"]).then_some(o)).await?;
    }
    let of_install = |e: Value| (is_ours(&e["involvedObject"]["name"]) || is_told(&e)).then_some(e);
    many(connection, archive, "install/events.json", (&format!("{core}/events"), ""), of_install).await?;
    // By name: whoever else keeps a ConfigMap there may keep in it what he likes.
    for name in ["tidegate-gateway", "tidegate-agent", "tidegate-trust"] {
        one(connection, archive, &format!("install/configmap-{name}.json"), &format!("{core}/configmaps/{name}"))
            .await?;
    }
    let told = |e: Value| is_told(&e).then_some(e);
    many(connection, archive, "cluster/events.json", ("/api/v1/events", ""), told).await?;
    many(connection, archive, "cluster/nodes.json", ("/api/v1/nodes", ""), |n| Some(node(&n))).await?;
    many(connection, archive, "cluster/namespaces.json", ("/api/v1/namespaces", ""), |n| Some(namespace(&n))).await?;
    let definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    many(connection, archive, "cluster/definitions.json", (definitions, ""), definition).await?;
    pods(connection, options, archive).await
}

fn text(value: &Value) -> String {
    // A Value always serialises.
    serde_json::to_string_pretty(value).unwrap_or_default()
}

async fn one(connection: &Connection, archive: &mut Archive, file: &str, path: &str) -> Result<()> {
    match get(connection, path).await {
        Ok(Some(object)) => archive.add(file, &text(&redact::object(object))),
        Ok(None) => {
            archive.missing(file, "it is not there");
            Ok(())
        }
        Err(error) => {
            archive.missing(file, &error.to_string());
            Ok(())
        }
    }
}

/// What is kept of a collection.
#[derive(Default)]
struct Kept {
    objects: Vec<Value>,
    left_out: usize,
}

impl Kept {
    fn push(&mut self, object: Value) {
        self.objects.push(object);
        // Not at each one: the rest is sorted.
        if self.objects.len() > 2 * OBJECTS {
            self.cut();
        }
    }

    /// Leaves the newest.
    fn cut(&mut self) {
        if self.objects.len() > OBJECTS {
            self.objects.sort_by(|a, b| time(b).cmp(time(a)));
            self.left_out += self.objects.len() - OBJECTS;
            self.objects.truncate(OBJECTS);
        }
    }
}

/// When it was seen last, or made.
fn time(object: &Value) -> &str {
    let times = [
        &object["series"]["lastObservedTime"],
        &object["lastTimestamp"],
        &object["eventTime"],
        &object["metadata"]["creationTimestamp"],
    ];
    times.into_iter().find_map(Value::as_str).unwrap_or_default()
}

/// A collection by its path and labels, of each object what `keep` leaves of it.
async fn many(
    connection: &Connection,
    archive: &mut Archive,
    file: &str,
    (path, labels): (&str, &str),
    keep: impl Fn(Value) -> Option<Value>,
) -> Result<()> {
    let mut kept = Kept::default();
    let all = each(connection, path, labels, |object| {
        if let Some(object) = keep(object) {
            kept.push(redact::object(object));
        }
    });
    let broken = match tokio::time::timeout(COLLECTION, all).await {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error.to_string()),
        Err(_) => Some(format!("not all within {} s", COLLECTION.as_secs())),
    };
    if let Some(why) = &broken {
        archive.missing(file, why);
    }
    kept.cut();
    if kept.left_out > 0 {
        archive.missing(file, &format!("the oldest {} objects", kept.left_out));
    }
    if broken.is_some() && kept.objects.is_empty() {
        return Ok(());
    }
    archive.add(file, &text(&json!(kept.objects)))
}

fn is_ours(name: &Value) -> bool {
    name.as_str().is_some_and(|n| n.starts_with(OURS.1))
}

/// Whether an Event is Tidegate's, or about its objects.
fn is_told(event: &Value) -> bool {
    let has = |v: &Value| v.as_str().is_some_and(|s| s.contains("tidegate"));
    let by = [&event["reportingComponent"], &event["source"]["component"], &event["involvedObject"]["apiVersion"]];
    by.into_iter().any(has)
}

fn node(node: &Value) -> Value {
    let (metadata, status) = (&node["metadata"], &node["status"]);
    json!({
        "name": metadata["name"], "uid": metadata["uid"], "labels": metadata["labels"], "podCIDRs": node["spec"]["podCIDRs"],
        "taints": node["spec"]["taints"], "unschedulable": node["spec"]["unschedulable"], "addresses": status["addresses"],
        "nodeInfo": status["nodeInfo"], "conditions": status["conditions"], "allocatable": status["allocatable"],
    })
}

fn namespace(namespace: &Value) -> Value {
    let metadata = &namespace["metadata"];
    json!({
        "name": metadata["name"], "labels": metadata["labels"], "annotations": metadata["annotations"],
        "deletionTimestamp": metadata["deletionTimestamp"], "phase": namespace["status"]["phase"],
    })
}

fn definition(definition: Value) -> Option<Value> {
    let metadata = &definition["metadata"];
    (definition["spec"]["group"] == "tidegate.dev").then(|| {
        json!({
            "name": metadata["name"], "labels": metadata["labels"], "generation": metadata["generation"],
            "versions": definition["status"]["storedVersions"], "conditions": definition["status"]["conditions"],
        })
    })
}

/// A text of a pod, or why there is none.
type Text = (String, Result<(String, bool), String>);

async fn pods(connection: &Connection, options: &Options, archive: &mut Archive) -> Result<()> {
    let path = format!("/api/v1/namespaces/{}/pods", connection.namespace);
    let found: Result<Vec<Value>, Error> = list(connection, &path, OURS.0).await;
    let mut all = match found {
        Ok(found) => found,
        Err(error) => {
            archive.missing("pods", &error.to_string());
            return Ok(());
        }
    };
    archive.add("install/pods.json", &text(&json!(all.iter().cloned().map(redact::object).collect::<Vec<_>>())))?;
    // Gateways know most; among the rest those that are not ready.
    all.sort_by_key(|p| (component(p) != "gateway", is_ready(p)));
    let most = usize::from(options.pods);
    if all.len() > most {
        archive.missing("pods", &format!("{} of {} pods were not asked (--pods)", all.len() - most, all.len()));
        all.truncate(most);
    }
    let each = options.each as usize * 1024;
    let mut told = stream::iter(&all).map(|pod| of_pod(connection, pod, each)).buffer_unordered(AT_ONCE);
    while let Some(texts) = told.next().await {
        for (file, text) in texts {
            match text {
                Ok((text, cut)) => {
                    if cut {
                        archive.missing(&file, "its end was cut off (--each)");
                    }
                    archive.add(&file, &text)?;
                }
                Err(why) => archive.missing(&file, &why),
            }
        }
    }
    Ok(())
}

fn component(pod: &Value) -> &str {
    pod["metadata"]["labels"]["app.kubernetes.io/component"].as_str().unwrap_or_default()
}

fn is_ready(pod: &Value) -> bool {
    let all = pod["status"]["conditions"].as_array();
    all.is_some_and(|all| all.iter().any(|c| c["type"] == "Ready" && c["status"] == "True"))
}

async fn of_pod(connection: &Connection, pod: &Value, each: usize) -> Vec<Text> {
    let name = pod["metadata"]["name"].as_str().unwrap_or_default();
    let containers = pod["spec"]["containers"].as_array().into_iter().flatten();
    let first = pod["spec"]["initContainers"].as_array().into_iter().flatten();
    let mut texts = Vec::new();
    for container in first.chain(containers) {
        let container = container["name"].as_str().unwrap_or_default();
        let at = Container { namespace: &connection.namespace, pod: name, name: container };
        let log = pods::log(connection, at, false, each, TEXT).await;
        texts.push((format!("pods/{name}/{container}.log"), log.map(|t| (t, false)).map_err(|e| e.to_string())));
        if has_restarted(pod, container) {
            let log = pods::log(connection, at, true, each, TEXT).await;
            let log = log.map(|t| (t, false)).map_err(|e| e.to_string());
            texts.push((format!("pods/{name}/{container}.previous.log"), log));
        }
    }
    let component = component(pod);
    if !["gateway", "agent"].contains(&component) {
        return texts;
    }
    let at = Container { namespace: &connection.namespace, pod: name, name: component };
    for item in Item::ALL {
        let (_, file) = item.name();
        let command = collect::command(component, item);
        let text = match pods::exec(connection, at, &command.each_ref().map(String::as_str), each, TEXT).await {
            Ok(ran) if ran.code == Some(0) || ran.cut => {
                Ok((String::from_utf8_lossy(&ran.output).into_owned(), ran.cut))
            }
            Ok(ran) => Err(ran.said),
            Err(error) => Err(error.to_string()),
        };
        texts.push((format!("pods/{name}/{file}"), text));
    }
    texts
}

fn has_restarted(pod: &Value, container: &str) -> bool {
    let all = ["containerStatuses", "initContainerStatuses"];
    let mut all = all.iter().filter_map(|k| pod["status"][*k].as_array()).flatten();
    all.any(|c| c["name"] == container && c["restartCount"].as_u64().unwrap_or_default() > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_peoples_annotations_and_events_stay_out() {
        let annotations = json!({"tidegate.dev/allow": "a.example.com", "vault/token": "s.1234"});
        let seen = redact::object(namespace(&json!({"metadata": {"name": "shop", "annotations": annotations}})));
        assert_eq!(seen["annotations"], json!({"tidegate.dev/allow": "a.example.com"}));
        assert!(!is_told(&json!({"reportingComponent": "kubelet", "message": "x"})));
        assert!(is_told(&json!({"reportingComponent": "tidegate.dev/gateway"})));
        assert!(is_told(&json!({"involvedObject": {"apiVersion": "tidegate.dev/v1alpha1"}})));
    }

    #[test]
    fn of_many_the_newest_are_kept() {
        let mut kept = Kept::default();
        // The newest one comes first, the oldest one last.
        for n in (0..5 * OBJECTS).rev() {
            let at = format!("2027-01-01T{:02}:{:02}:{:02}Z", n / 3600, n / 60 % 60, n % 60);
            kept.push(json!({"n": n, "lastTimestamp": at, "metadata": {"creationTimestamp": "2027-01-02T00:00:00Z"}}));
            assert!(kept.objects.len() <= 2 * OBJECTS);
        }
        kept.cut();
        assert_eq!((kept.objects.len(), kept.left_out), (OBJECTS, 4 * OBJECTS));
        assert!(kept.objects.iter().all(|o| o["n"].as_u64() >= Some(4 * OBJECTS as u64)));
    }
}
