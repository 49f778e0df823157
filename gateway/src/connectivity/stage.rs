//! Where the test plays: two namespaces with a pod on each node, which it makes and takes away.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tidegate_kubernetes::objects::{create, delete_one, get, list, merge};
use tidegate_kubernetes::pods::{self, Container, Ran};
use tidegate_kubernetes::{Connection, Error};
use tokio::time::sleep;

use super::{GROUP, Names, Options};
use crate::probe::{Attempt, Seen};

/// What made an object.
const MADE: (&str, &str) = ("app.kubernetes.io/managed-by", "tidegate-connectivity-test");
/// The annotation of a namespace that says which run made it.
const RUN: &str = "tidegate.dev/connectivity-test-run";
/// The object that a running test changes all the time, so that others see that it runs.
const LEASE: &str = "connectivity-test";
const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces";
/// How often it is changed.
const BEAT: Duration = Duration::from_secs(2);
/// A test that has not changed it for so long has ended. Clocks are not compared.
const DEAD: Duration = Duration::from_secs(8);
/// How often it is looked for what is waited for.
const LOOK: Duration = Duration::from_millis(500);
/// How long pods may take to run; they have the nodes' own image.
const START: Duration = Duration::from_secs(60);
/// How long namespaces may take to be gone.
const GONE: Duration = Duration::from_secs(120);
/// Pods end by themselves after so long, in seconds, whatever becomes of the test.
const LIFE: u64 = 3600;
/// The most that a probe says, in octets.
const OUTPUT: usize = 64 << 10;
const PROGRAM: &str = "/usr/local/bin/tidegate";
const CONTAINER: &str = "client";

/// Whose pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Of the namespace that has a policy.
    Managed,
    /// Of the namespace that nothing selects.
    Free,
}

/// A pod that runs.
#[derive(Clone, Debug)]
pub struct Client {
    /// Its node.
    pub node: String,
    namespace: String,
    name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// What is there for the test.
pub struct Stage<'a> {
    connection: &'a Connection,
    names: Names,
    /// No other run has it.
    run: String,
    beat: Option<tokio::task::JoinHandle<()>>,
}

fn namespace_path(name: &str) -> String {
    format!("/api/v1/namespaces/{name}")
}

/// What a run that did not end left behind is removed, and named. Who else is at work there is an error.
pub async fn sweep(connection: &Connection, names: &Names) -> Result<Vec<String>> {
    let (mut left, mut looked) = (Vec::new(), false);
    for name in names.both() {
        let Some(found) = get(connection, &namespace_path(name)).await? else { continue };
        ensure!(
            found["metadata"]["labels"][MADE.0] == MADE.1 && found["metadata"]["annotations"][RUN].is_string(),
            "the namespace {name} is somebody else's: choose another one with --test-namespace"
        );
        if found["metadata"]["deletionTimestamp"].is_null() && !looked {
            looked = true;
            eprintln!("the namespace {name} is there already: looking whether somebody is at work in it");
            ensure!(
                !is_at_work(connection, &names.managed).await?,
                "another connectivity test is at work in the namespace {name}: wait for its end, or use --test-namespace"
            );
        }
        left.push(Made::new(name, &found));
    }
    remove(connection, &left).await?;
    Ok(left.into_iter().map(|made| made.name).collect())
}

/// A namespace as it was seen: one that is made anew by that name is another one.
struct Made {
    name: String,
    uid: String,
}

impl Made {
    fn new(name: &str, found: &Value) -> Self {
        Self { name: name.to_owned(), uid: found["metadata"]["uid"].as_str().unwrap_or_default().to_owned() }
    }
}

/// Whether somebody changes the lease.
async fn is_at_work(connection: &Connection, namespace: &str) -> Result<bool, Error> {
    let path = format!("{LEASES}/{namespace}/leases/{LEASE}");
    let version = async || {
        let lease = get(connection, &path).await?.unwrap_or_default();
        Ok::<_, Error>(lease["metadata"]["resourceVersion"].clone())
    };
    let first = version().await?;
    let deadline = Instant::now() + DEAD;
    while Instant::now() < deadline {
        sleep(LOOK).await;
        if version().await? != first {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Deletes namespaces and waits until they are gone.
async fn remove(connection: &Connection, all: &[Made]) -> Result<()> {
    for Made { name, uid } in all {
        delete_one(connection, &namespace_path(name), uid)
            .await
            .with_context(|| format!("cannot delete the namespace {name}"))?;
    }
    let deadline = Instant::now() + GONE;
    for Made { name, uid } in all {
        while get(connection, &namespace_path(name)).await?.is_some_and(|n| n["metadata"]["uid"] == **uid) {
            ensure!(
                Instant::now() < deadline,
                "the namespace {name} is deleted, but not gone after {} s",
                GONE.as_secs()
            );
            sleep(LOOK).await;
        }
    }
    Ok(())
}

impl<'a> Stage<'a> {
    pub fn new(connection: &'a Connection, names: Names) -> Self {
        Self { connection, names, run: format!("{:032x}", rand::random::<u128>()), beat: None }
    }

    /// Makes the namespaces, and shows from then on that somebody is at work in them.
    pub async fn make(&mut self, labels: &[(&str, &str)]) -> Result<()> {
        let name = self.names.managed.clone();
        let managed = self.namespace(&name, labels);
        create(self.connection, "/api/v1/namespaces", &managed).await.context("cannot make a namespace")?;
        let lease = json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": {"name": LEASE, "namespace": name}, "spec": {"leaseTransitions": 0},
        });
        create(self.connection, &format!("{LEASES}/{name}/leases"), &lease).await.context("cannot make a Lease")?;
        let (connection, path) = (self.connection.clone(), format!("{LEASES}/{name}/leases/{LEASE}"));
        self.beat = Some(tokio::spawn(async move {
            for n in 1u32.. {
                sleep(BEAT).await;
                // One that fails is followed by the next.
                let _ = merge(&connection, &path, &json!({"spec": {"leaseTransitions": n}})).await;
            }
        }));
        let free = self.namespace(&self.names.free, labels);
        create(self.connection, "/api/v1/namespaces", &free).await.context("cannot make a namespace")?;
        Ok(())
    }

    fn namespace(&self, name: &str, labels: &[(&str, &str)]) -> Value {
        let own = [MADE, ("pod-security.kubernetes.io/enforce", "restricted")];
        let labels: BTreeMap<&str, &str> = labels.iter().copied().chain(own).collect();
        let metadata = json!({"name": name, "labels": labels, "annotations": {RUN: self.run}});
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    }

    /// Makes the policy of the managed namespace.
    pub async fn allow(&self, policy: &Value) -> Result<()> {
        let path = format!("{GROUP}/namespaces/{}/egresspolicies", self.names.managed);
        create(self.connection, &path, policy).await.context("cannot make an EgressPolicy")?;
        Ok(())
    }

    /// Waits until every node has the policy: what its status says then, and whether that is good.
    pub async fn programmed(&self, policy: &str, limit: Duration) -> Result<(bool, String)> {
        let path = format!("{GROUP}/namespaces/{}/egresspolicies/{policy}", self.names.managed);
        let deadline = Instant::now() + limit;
        loop {
            let found = get(self.connection, &path).await?.unwrap_or_default();
            let state = state(&found);
            if state.0 || Instant::now() >= deadline {
                return Ok(state);
            }
            sleep(LOOK).await;
        }
    }

    /// Makes the pods.
    pub async fn populate(&self, nodes: &[String], options: &Options, image: &Image) -> Result<()> {
        for namespace in self.names.both() {
            for (n, node) in nodes.iter().enumerate() {
                let pod = pod(&format!("client-{n}"), node, image, &options.pull_secret);
                let path = format!("/api/v1/namespaces/{namespace}/pods");
                // The controller that makes a namespace's ServiceAccount may be later than this.
                let deadline = Instant::now() + START;
                loop {
                    match create(self.connection, &path, &pod).await {
                        Ok(_) => break,
                        Err(error) if error.code() == Some(403) && Instant::now() < deadline => sleep(LOOK).await,
                        Err(error) => return Err(error).context("cannot make a pod"),
                    }
                }
            }
        }
        Ok(())
    }

    /// Waits for the pods: those that run, and the nodes whose pods do not, with the reason.
    ///
    /// # Errors
    /// An image cannot be had.
    pub async fn clients(&self, side: Side) -> Result<(Vec<Client>, BTreeMap<String, String>)> {
        let namespace = self.names.of(side);
        let path = format!("/api/v1/namespaces/{namespace}/pods");
        let deadline = Instant::now() + START;
        loop {
            let (mut running, mut others) = (Vec::new(), BTreeMap::new());
            for pod in list(self.connection, &path, &format!("{}={}", MADE.0, MADE.1)).await? {
                let node = pod["spec"]["nodeName"].as_str().unwrap_or_default().to_owned();
                let name = pod["metadata"]["name"].as_str().unwrap_or_default().to_owned();
                let waiting = &pod["status"]["containerStatuses"][0]["state"]["waiting"];
                let (reason, message) = (waiting["reason"].as_str(), waiting["message"].as_str().unwrap_or_default());
                if pod["status"]["phase"] == "Running" {
                    let ips = pod["status"]["podIPs"].as_array().into_iter().flatten();
                    let addresses = ips.filter_map(|ip| ip["ip"].as_str()?.parse().ok()).collect();
                    running.push(Client { node, namespace: namespace.to_owned(), name, addresses });
                } else if reason.is_some_and(|r| r.contains("Image")) {
                    bail!("a pod on {node} has no image: {message}; name one that it can have with --image");
                } else {
                    let why = reason.or(pod["status"]["reason"].as_str()).or(pod["status"]["phase"].as_str());
                    others.insert(node, format!("{} {message}", why.unwrap_or_default()).trim().to_owned());
                }
            }
            if others.is_empty() || Instant::now() >= deadline {
                return Ok((running, others));
            }
            sleep(LOOK).await;
        }
    }

    /// Has a pod try something.
    ///
    /// # Errors
    /// Nobody can tell how it went.
    pub async fn attempt(&self, client: &Client, attempt: &Attempt) -> Result<Seen> {
        let text = serde_json::to_string(attempt)?;
        let at = Container { namespace: &client.namespace, pod: &client.name, name: CONTAINER };
        // Every server and every address may take its time; what is over that is the API server's way there.
        let limit = Duration::from_millis(attempt.patience) * 20 + Duration::from_secs(15);
        let Ran { code, output, said, .. } =
            pods::exec(self.connection, at, &[PROGRAM, "probe", &text], OUTPUT, limit).await.with_context(|| {
                format!("cannot run a command in {}/{} on {}", client.namespace, client.name, client.node)
            })?;
        ensure!(code == Some(0), "the probe on {} failed ({code:?}): {said}", client.node);
        serde_json::from_slice(&output)
            .with_context(|| format!("what the probe on {} says cannot be read", client.node))
    }

    /// Takes everything away that this run has made.
    pub async fn clear(&mut self) -> Result<()> {
        if let Some(beat) = self.beat.take() {
            beat.abort();
        }
        let mut there = Vec::new();
        for name in self.names.both() {
            // By what it says, not by what was answered when it was made: that answer may not have come.
            let found = get(self.connection, &namespace_path(name)).await?.unwrap_or_default();
            if found["metadata"]["annotations"][RUN] == *self.run {
                there.push(Made::new(name, &found));
            }
        }
        remove(self.connection, &there).await
    }
}

/// Whether a policy holds on every node, and what is said of it.
fn state(policy: &Value) -> (bool, String) {
    let generation = policy["metadata"]["generation"].as_i64();
    let all = policy["status"]["conditions"].as_array().map_or(&[][..], Vec::as_slice);
    let now = |kind: &str| all.iter().find(|c| c["type"] == kind && c["observedGeneration"].as_i64() >= generation);
    let text = |c: &Value, key: &str| tidegate_api::printable(c[key].as_str().unwrap_or_default());
    if let Some(refused) = now("Accepted").filter(|c| c["status"] == "False") {
        return (false, format!("not accepted: {}", text(refused, "message")));
    }
    match now("Programmed") {
        None => (false, "no gateway says anything of the policy".into()),
        // Its pods are not known yet.
        Some(c) if c["reason"] == "NoPods" => (false, "no gateway knows the test's pods".into()),
        Some(c) => (c["status"] == "True", format!("{}: {}", text(c, "reason"), text(c, "message"))),
    }
}

/// What pods run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its name.
    pub name: String,
    /// When nodes fetch it.
    pub pull_policy: Value,
}

fn pod(name: &str, node: &str, image: &Image, pull_secret: &[String]) -> Value {
    let secrets: Vec<Value> = pull_secret.iter().map(|s| json!({"name": s})).collect();
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "labels": {MADE.0: MADE.1}},
        "spec": {
            "nodeName": node,
            "tolerations": [{"operator": "Exists"}],
            "restartPolicy": "Never",
            "activeDeadlineSeconds": LIFE,
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "imagePullSecrets": secrets,
            "containers": [{
                "name": CONTAINER,
                "image": image.name,
                "imagePullPolicy": image.pull_policy,
                "command": ["/bin/sleep"],
                "args": [LIFE.to_string()],
                "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"memory": "128Mi"}},
                "securityContext": {
                    "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]},
                    "readOnlyRootFilesystem": true, "runAsNonRoot": true, "runAsUser": 65532, "runAsGroup": 65532,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
            }],
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_holds_when_the_present_one_does() {
        let policy = |generation: i64, accepted: &str, programmed: &str| {
            json!({"metadata": {"generation": generation}, "status": {"conditions": [
                {"type": "Accepted", "status": accepted, "observedGeneration": 2, "message": "bad\nname"},
                {"type": "Programmed", "status": programmed, "observedGeneration": 2, "reason": "R", "message": "3 of 4 nodes"},
            ]}})
        };
        assert_eq!(state(&policy(2, "True", "True")), (true, "R: 3 of 4 nodes".into()));
        assert!(!state(&policy(2, "True", "False")).0);
        assert!(!state(&policy(3, "True", "True")).0, "that is the one before");
        let mut none = policy(2, "True", "True");
        none["status"]["conditions"][1]["reason"] = json!("NoPods");
        assert!(!state(&none).0);
        assert_eq!(state(&policy(2, "False", "True")), (false, "not accepted: bad\\nname".into()));
        assert!(!state(&json!({"metadata": {"generation": 1}})).0);
    }

    /// Against a real API server.
    #[tokio::test]
    async fn nobody_takes_away_what_others_made() {
        let cluster = tidegate_kube::Cluster::shared().unwrap();
        let controllers = cluster.start_controllers(&["namespace-controller"]).unwrap();
        let settings = tidegate_kubernetes::Settings { kubeconfig: vec![cluster.kubeconfig()], ..Default::default() };
        let connection = Connection::new(settings).await.unwrap();
        let names = Names::new("stage").unwrap();
        let uid = async |name: &str| {
            get(&connection, &namespace_path(name)).await.unwrap().map(|n| n["metadata"]["uid"].clone())
        };

        // A user's, with the label that says what made it.
        let labels = json!({MADE.0: MADE.1});
        let theirs =
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": names.free, "labels": labels}});
        create(&connection, "/api/v1/namespaces", &theirs).await.unwrap();
        assert!(sweep(&connection, &names).await.unwrap_err().to_string().contains("somebody else's"));
        // Two that begin at the same time: the second one fails, and leaves the first one's alone.
        let (mut one, mut two) = (Stage::new(&connection, names.clone()), Stage::new(&connection, names.clone()));
        assert!(one.make(&[]).await.is_err(), "the user's is in the way");
        let there = uid(&names.managed).await;
        assert!(there.is_some() && two.make(&[]).await.is_err());
        two.clear().await.unwrap();
        assert_eq!(uid(&names.managed).await, there);
        // A namespace by that name that is not the one that was seen.
        remove(&connection, &[Made { name: names.managed.clone(), uid: "another".into() }]).await.unwrap();
        assert_eq!(uid(&names.managed).await, there);
        one.clear().await.unwrap();
        assert_eq!(uid(&names.managed).await, None);
        let free = get(&connection, &namespace_path(&names.free)).await.unwrap().unwrap();
        assert!(free["metadata"]["deletionTimestamp"].is_null(), "the user's is gone");
        drop(controllers);
    }
}
