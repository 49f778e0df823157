//! `tidegate status --cluster`: gateways, nodes, pools and policies, as the API server has them.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::future::join_all;
use serde::Serialize;
use serde_json::Value;
use tidegate_kubernetes::pods::{self, Container};
use tidegate_kubernetes::{Connection, Error, Settings, objects};

use crate::sysdump::collect::{self, Item};

const GROUP: &str = "/apis/tidegate.dev/v1alpha1";
/// The most characters of what a pod says, and the most pods that say something.
const SAID: usize = 1000;
const TROUBLES: usize = 10;
/// How long an agent may take to answer, and the most of its status that is read, in octets.
const ASKED: Duration = Duration::from_secs(5);
const STATUS: usize = 256 << 10;
/// How often it is looked while waiting.
const LOOK: Duration = Duration::from_secs(2);

/// How the API server is reached.
#[derive(Clone, Debug, clap::Args)]
pub struct Api {
    /// Absent: the files of $KUBECONFIG, ~/.kube/config, or in a pod its ServiceAccount.
    #[arg(long)]
    pub kubeconfig: Option<PathBuf>,
    /// A context of the kubeconfig. Absent: the current one.
    #[arg(long)]
    pub context: Option<String>,
    /// The namespace in which Tidegate is installed.
    #[arg(short, long, default_value = "tidegate-system")]
    pub namespace: String,
}

/// How the command prints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Tables for people.
    #[default]
    Table,
    /// One JSON document.
    Json,
}

/// What is there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Overview {
    /// Whether a gateway and every node's agent is ready.
    pub ready: bool,
    /// Why not, one sentence each.
    pub waiting: Vec<String>,
    /// What keeps single pods from running, also where the rest is ready, as in an upgrade that does not go on.
    troubles: Vec<Trouble>,
    gateways: Vec<Gateway>,
    nodes: Nodes,
    pools: Vec<Pool>,
    policies: Vec<Policy>,
    /// Collections that this user may not read.
    forbidden: Vec<String>,
    /// Agents that run and are not ready, with their nodes: what keeps them they know alone.
    #[serde(skip)]
    unready: Vec<(String, String)>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
struct Trouble {
    pod: String,
    node: String,
    what: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
struct Gateway {
    name: String,
    node: String,
    ready: bool,
    addresses: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
struct Nodes {
    desired: u64,
    ready: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Pool {
    name: String,
    source: String,
    pairs: Vec<Pair>,
    conditions: Vec<Condition>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
struct Pair {
    addresses: Vec<String>,
    owner: Option<String>,
    epoch: i64,
    namespaces: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
struct Policy {
    kind: String,
    namespace: String,
    name: String,
    conditions: Vec<Condition>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
struct Condition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
    reason: String,
    message: String,
    /// Whether it speaks of an older version of the object.
    stale: bool,
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn conditions(object: &Value) -> Vec<Condition> {
    let generation = object["metadata"]["generation"].as_i64();
    let one = |c: &Value| Condition {
        kind: text(&c["type"]),
        status: text(&c["status"]),
        reason: text(&c["reason"]),
        message: text(&c["message"]),
        stale: c["observedGeneration"].as_i64() < generation,
    };
    array(&object["status"]["conditions"]).iter().map(one).collect()
}

/// Makes an overview of what was read; the agents' DaemonSet is null if there is none.
fn overview(pods: &[Value], agents: &Value, pools: &[Value], policies: &[Value], forbidden: Vec<String>) -> Overview {
    let is_gateway = |p: &&Value| p["metadata"]["labels"]["app.kubernetes.io/component"] == "gateway";
    let mut gateways: Vec<Gateway> = pods.iter().filter(is_gateway).map(gateway).collect();
    gateways.sort_by(|a, b| a.name.cmp(&b.name));
    let count = |key: &str| agents["status"][key].as_u64().unwrap_or_default();
    let nodes = Nodes { desired: count("desiredNumberScheduled"), ready: count("numberReady") };
    let mut waiting = Vec::new();
    if !gateways.iter().any(|g| g.ready) {
        waiting.push(format!("none of {} gateways is ready", gateways.len()));
    }
    if agents.is_null() {
        waiting.push("there are no agents".to_owned());
    } else if agents["status"]["observedGeneration"].as_i64() < agents["metadata"]["generation"].as_i64() {
        waiting.push("the agents have not been scheduled yet".to_owned());
    } else if nodes.ready < nodes.desired {
        waiting.push(format!("agents are ready on {} of {} nodes", nodes.ready, nodes.desired));
    }
    let of = |pod: &Value| {
        let (pod, node, what) = (text(&pod["metadata"]["name"]), text(&pod["spec"]["nodeName"]), trouble(pod)?);
        Some(Trouble { pod, node, what })
    };
    // One gateway says more than the tenth agent.
    let (first, others): (Vec<_>, Vec<_>) = pods.iter().partition(is_gateway);
    Overview {
        ready: waiting.is_empty(),
        waiting,
        troubles: first.into_iter().chain(others).filter_map(of).take(TROUBLES).collect(),
        gateways,
        nodes,
        pools: pools.iter().map(pool).collect(),
        policies: policies.iter().map(policy).collect(),
        forbidden,
        unready: pods.iter().filter_map(unready).take(TROUBLES).collect(),
    }
}

/// An agent that runs and is not ready, with its node.
fn unready(pod: &Value) -> Option<(String, String)> {
    let runs = |c: &Value| c["name"] == "agent" && c["ready"] != true && c["state"]["running"].is_object();
    let ours = pod["metadata"]["labels"]["app.kubernetes.io/component"] == "agent"
        && pod["metadata"]["deletionTimestamp"].is_null()
        && array(&pod["status"]["containerStatuses"]).iter().any(runs);
    ours.then(|| (text(&pod["metadata"]["name"]), text(&pod["spec"]["nodeName"])))
}

/// What an agent's status says is wrong.
fn said(status: &[u8]) -> Option<String> {
    let status: Value = serde_json::from_slice(status).ok()?;
    let all: Vec<&str> = array(&status["conditions"]).iter().filter_map(Value::as_str).collect();
    (!all.is_empty()).then(|| short(&all.join("; ")))
}

/// What keeps a pod from running: that it has no node, or what its kubelet or its program said.
fn trouble(pod: &Value) -> Option<String> {
    let status = &pod["status"];
    if pod["metadata"]["deletionTimestamp"].is_string() {
        return None;
    }
    // As of one that was evicted.
    if status["phase"] == "Failed" && status["message"].is_string() {
        return Some(format!("{}: {}", text(&status["reason"]), short(&text(&status["message"]))));
    }
    let unplaced = |c: &&Value| c["type"] == "PodScheduled" && c["status"] == "False";
    if let Some(c) = array(&status["conditions"]).iter().find(unplaced) {
        return Some(format!("{}: {}", text(&c["reason"]), short(&text(&c["message"]))));
    }
    let container = |c: &Value| {
        let waiting = &c["state"]["waiting"];
        let ended = [&c["state"]["terminated"], &c["lastState"]["terminated"]];
        // Why it ended says more than that it is waited.
        let ended = ended.iter().find(|e| e.is_object() && e["exitCode"] != 0).map(|e| match text(&e["message"]) {
            said if said.is_empty() => format!("{} (exit code {})", text(&e["reason"]), e["exitCode"]),
            said => short(&said),
        });
        let waits = waiting["message"].as_str().map(|said| format!("{}: {}", text(&waiting["reason"]), short(said)));
        (c["ready"] != true).then(|| ended.or(waits)).flatten()
    };
    array(&status["containerStatuses"]).iter().find_map(container)
}

/// In one line, and of a long text the end, where a program says why it ended.
fn short(text: &str) -> String {
    let line: Vec<&str> = text.split(|c: char| c.is_control() || c.is_whitespace()).filter(|w| !w.is_empty()).collect();
    let line = line.join(" ");
    let from = line.char_indices().rev().nth(SAID - 1).map_or(0, |(at, _)| at);
    format!("{}{}", if from > 0 { "…" } else { "" }, &line[from..])
}

fn gateway(pod: &Value) -> Gateway {
    let ready = |c: &Value| c["type"] == "Ready" && c["status"] == "True";
    Gateway {
        name: text(&pod["metadata"]["name"]),
        node: text(&pod["spec"]["nodeName"]),
        // One that is ending is no more.
        ready: pod["metadata"]["deletionTimestamp"].is_null() && array(&pod["status"]["conditions"]).iter().any(ready),
        addresses: array(&pod["status"]["podIPs"]).iter().map(|a| text(&a["ip"])).collect(),
    }
}

fn pool(object: &Value) -> Pool {
    let addresses = |p: &Value| ["ipv4", "ipv6"].iter().filter_map(|k| p[*k].as_str().map(str::to_owned)).collect();
    let pair = |p: &Value| Pair {
        addresses: addresses(p),
        owner: p["owner"].as_str().map(str::to_owned),
        epoch: p["epoch"].as_i64().unwrap_or_default(),
        namespaces: p["namespaces"].as_u64().unwrap_or_default(),
    };
    Pool {
        name: text(&object["metadata"]["name"]),
        source: text(&object["spec"]["addressSource"]),
        pairs: array(&object["status"]["addresses"]).iter().map(pair).collect(),
        conditions: conditions(object),
    }
}

fn policy(object: &Value) -> Policy {
    Policy {
        kind: text(&object["kind"]),
        namespace: text(&object["metadata"]["namespace"]),
        name: text(&object["metadata"]["name"]),
        conditions: conditions(object),
    }
}

/// Columns beside each other, two spaces apart.
pub fn table(out: &mut String, rows: &[Vec<String>]) {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|t| t.chars().count()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            // A String takes every write.
            let _ = write!(line, "{cell:width$}  ");
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
}

/// The cells of a condition: `True`, `False (Reason)`, `-`; with `old` when it speaks of an older version.
fn cell(conditions: &[Condition], kind: &str) -> String {
    let Some(c) = conditions.iter().find(|c| c.kind == kind) else { return "-".into() };
    let usual = if kind == "Conflicted" { "False" } else { "True" };
    let mut cell = if c.status == usual { c.status.clone() } else { format!("{} ({})", c.status, c.reason) };
    if c.stale {
        cell += " old";
    }
    tidegate_api::printable(&cell)
}

impl Overview {
    /// Asks agents that run what keeps them from being ready. From who may not run commands in their pods, or gets no answer, it stays hidden.
    async fn ask(&mut self, connection: &Connection) {
        let command = collect::command("agent", Item::Status);
        let command = command.each_ref().map(String::as_str);
        let asked = self.unready.iter().map(async |(pod, node)| {
            let at = Container { namespace: &connection.namespace, pod, name: "agent" };
            let ran = pods::exec(connection, at, &command, STATUS, ASKED).await.ok()?;
            Some(Trouble { pod: pod.clone(), node: node.clone(), what: said(&ran.output)? })
        });
        let found = join_all(asked).await;
        found.into_iter().flatten().for_each(|trouble| self.tell(trouble));
    }

    /// Notes what an agent says, in the place of how the one before it ended.
    fn tell(&mut self, trouble: Trouble) {
        if let Some(old) = self.troubles.iter_mut().find(|t| t.pod == trouble.pod) {
            *old = trouble;
        } else if self.troubles.len() < TROUBLES {
            self.troubles.push(trouble);
        }
    }

    /// Tables for people.
    pub fn render(&self) -> String {
        let mut out = String::new();
        let row = |cells: &[&str]| cells.iter().map(|c| (*c).to_owned()).collect::<Vec<String>>();
        let mut rows = vec![row(&["GATEWAY", "NODE", "READY", "ADDRESSES"])];
        for g in &self.gateways {
            let addresses = g.addresses.join(", ");
            rows.push(vec![g.name.clone(), g.node.clone(), if g.ready { "yes" } else { "no" }.into(), addresses]);
        }
        table(&mut out, &rows);
        // A String takes every write, here and below.
        let _ = writeln!(out, "\nNODES  {} of {} ready\n", self.nodes.ready, self.nodes.desired);
        let mut rows = vec![row(&["POOL", "SOURCE", "ADDRESSES", "OWNER", "EPOCH", "NAMESPACES"])];
        for p in &self.pools {
            if p.pairs.is_empty() {
                rows.push(vec![p.name.clone(), p.source.clone()]);
            }
            for pair in &p.pairs {
                let owner = pair.owner.as_deref().unwrap_or("-").to_owned();
                let addresses = pair.addresses.join(", ");
                let (epoch, namespaces) = (pair.epoch.to_string(), pair.namespaces.to_string());
                rows.push(vec![p.name.clone(), p.source.clone(), addresses, owner, epoch, namespaces]);
            }
        }
        table(&mut out, &rows);
        out.push('\n');
        let mut rows = vec![row(&["POLICY", "ACCEPTED", "CONFLICTED", "PROGRAMMED", "MESSAGE"])];
        for p in &self.policies {
            let name = if p.namespace.is_empty() { p.name.clone() } else { format!("{}/{}", p.namespace, p.name) };
            let short = if p.kind == "EgressPolicy" { "egp" } else { "cegp" };
            let state = |kind| cell(&p.conditions, kind);
            // The first that is not as it should be says most; else how many nodes have it.
            let wrong = |c: &&Condition| (c.kind == "Conflicted") == (c.status == "True");
            let said = p.conditions.iter().find(wrong).or_else(|| p.conditions.iter().find(|c| c.kind == "Programmed"));
            let message = said.map(|c| tidegate_api::printable(&c.message)).unwrap_or_default();
            let states = [state("Accepted"), state("Conflicted"), state("Programmed")];
            rows.push([vec![format!("{short} {name}")], states.to_vec(), vec![message]].concat());
        }
        table(&mut out, &rows);
        if !self.troubles.is_empty() {
            let mut rows = vec![row(&["POD", "NODE", "TROUBLE"])];
            let or = |node: &str| if node.is_empty() { "-".to_owned() } else { node.to_owned() };
            rows.extend(self.troubles.iter().map(|t| vec![t.pod.clone(), or(&t.node), t.what.clone()]));
            out.push('\n');
            table(&mut out, &rows);
        }
        for kind in &self.forbidden {
            let _ = writeln!(out, "you may not list {kind}");
        }
        out
    }
}

/// The way to the API server of somebody at a shell, or of a pod.
///
/// # Errors
/// There are no credentials, or they cannot be used.
pub async fn connect(api: Api) -> Result<Connection> {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let kubeconfig = kubeconfigs(api.kubeconfig, std::env::var_os("KUBECONFIG"), home);
    ensure!(api.context.is_none() || !kubeconfig.is_empty(), "--context is one of a kubeconfig, and there is none");
    let settings = Settings { kubeconfig, context: api.context, namespace: Some(api.namespace), ..Settings::default() };
    Ok(Connection::new(settings).await?)
}

/// The one that is named, else those of `$KUBECONFIG`, else `~/.kube/config` if it is there. As for kubectl, some of several may be missing.
fn kubeconfigs(named: Option<PathBuf>, variable: Option<OsString>, home: Option<PathBuf>) -> Vec<PathBuf> {
    if let Some(one) = named {
        return vec![one];
    }
    let variable = variable.unwrap_or_default();
    let all: Vec<PathBuf> = std::env::split_paths(&variable).filter(|p| !p.as_os_str().is_empty()).collect();
    if all.is_empty() {
        return home.map(|h| h.join(".kube/config")).filter(|p| p.exists()).into_iter().collect();
    }
    let there: Vec<PathBuf> = all.iter().filter(|p| p.exists()).cloned().collect();
    // Where all are missing the error names them.
    if there.is_empty() { all } else { there }
}

/// Reads everything. What this user may not read is left out and named.
async fn read(connection: &Connection) -> Result<Overview> {
    let mut forbidden = Vec::new();
    let mut lists = Vec::new();
    let own = &connection.namespace;
    for (what, path, labels) in [
        ("pods", format!("/api/v1/namespaces/{own}/pods"), "app.kubernetes.io/name=tidegate"),
        ("egresspools", format!("{GROUP}/egresspools"), ""),
        ("clusteregresspolicies", format!("{GROUP}/clusteregresspolicies"), ""),
        ("egresspolicies", format!("{GROUP}/egresspolicies"), ""),
    ] {
        let found = objects::list(connection, &path, labels).await;
        lists.push(allowed(found, what, &mut forbidden)?.unwrap_or_default());
    }
    let agents = objects::get(connection, &format!("/apis/apps/v1/namespaces/{own}/daemonsets/tidegate-agent")).await;
    let agents = allowed(agents, "daemonsets", &mut forbidden)?.flatten().unwrap_or_default();
    let [pods, pools, cluster, own] = lists.try_into().unwrap_or_default();
    // Items of a list do not say their kind.
    let named = |kind: &str, items: Vec<Value>| -> Vec<Value> {
        let kind = Value::from(kind);
        items
            .into_iter()
            .map(|mut i| {
                i["kind"] = kind.clone();
                i
            })
            .collect()
    };
    let policies = [named("ClusterEgressPolicy", cluster), named("EgressPolicy", own)].concat();
    Ok(overview(&pods, &agents, &pools, &policies, forbidden))
}

/// `None` if it is forbidden, which is remembered.
fn allowed<T>(found: Result<T, Error>, what: &str, forbidden: &mut Vec<String>) -> Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.code() == Some(403) => {
            forbidden.push(what.to_owned());
            Ok(None)
        }
        Err(error) if error.code() == Some(404) => {
            Err(error).with_context(|| format!("the cluster has no {what}: is Tidegate installed?"))
        }
        Err(error) => Err(error).with_context(|| format!("cannot list {what}")),
    }
}

/// Prints what is there, and waits for it to be ready for so long. Exit code 0 if it is, 1 if not.
///
/// # Errors
/// The API server cannot be asked.
pub fn run(api: Api, format: Format, wait: Duration) -> Result<u8> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot make a runtime")?;
    runtime.block_on(async {
        let connection = connect(api).await?;
        let deadline = Instant::now() + wait;
        let mut overview = loop {
            let found = read(&connection).await;
            // An API server that comes up late is waited for, too.
            if found.as_ref().is_ok_and(|o| o.ready) || Instant::now() >= deadline {
                break found?;
            }
            tokio::time::sleep(LOOK).await;
        };
        overview.ask(&connection).await;
        match format {
            Format::Table => print!("{}", overview.render()),
            Format::Json => println!("{}", serde_json::to_string_pretty(&overview)?),
        }
        for why in &overview.waiting {
            eprintln!("not ready: {why}");
        }
        Ok(u8::from(!overview.ready))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn condition(kind: &str, status: &str, reason: &str, message: &str, generation: i64) -> Value {
        json!({"type": kind, "status": status, "reason": reason, "message": message, "observedGeneration": generation})
    }

    fn example() -> Overview {
        let pod = |name: &str, ready: &str, ending: Value| {
            json!({
                "metadata": {"name": name, "deletionTimestamp": ending, "labels": {"app.kubernetes.io/component": "gateway"}},
                "spec": {"nodeName": "node-1"},
                "status": {"conditions": [{"type": "Ready", "status": ready}], "podIPs": [{"ip": "10.244.1.2"}, {"ip": "fd00::2"}]},
            })
        };
        let pods = [pod("gw-b", "True", json!("2026-11-20T10:00:00Z")), pod("gw-a", "True", Value::Null)];
        let agents = json!({"metadata": {"generation": 2}, "status": {"observedGeneration": 2, "desiredNumberScheduled": 40, "numberReady": 38}});
        let pools = [
            json!({"metadata": {"name": "partner-a"}, "spec": {"addressSource": "Static"}, "status": {"addresses": [
                {"ipv4": "203.0.113.10", "ipv6": "2001:db8::10", "owner": "gw-a", "epoch": 7, "namespaces": 12},
                {"ipv4": "203.0.113.11", "epoch": 0, "namespaces": 0},
            ]}}),
            json!({"metadata": {"name": "new"}, "spec": {"addressSource": "PodNetwork"}}),
        ];
        let policies = [
            json!({"kind": "ClusterEgressPolicy", "metadata": {"name": "guardrails", "generation": 3}, "status": {"conditions": [
                condition("Accepted", "True", "Accepted", "", 3), condition("Conflicted", "False", "NoConflict", "", 3),
                condition("Programmed", "False", "Pending", "38 of 40 nodes", 3),
            ]}}),
            json!({"kind": "EgressPolicy", "metadata": {"name": "web", "namespace": "shop", "generation": 2}, "status": {"conditions": [
                condition("Accepted", "True", "Accepted", "", 1), condition("Conflicted", "True", "Pool", "another pool\nwins", 2),
                condition("Programmed", "True", "Programmed", "40 of 40 nodes", 2),
            ]}}),
            json!({"kind": "EgressPolicy", "metadata": {"name": "new", "namespace": "shop", "generation": 1}}),
        ];
        overview(&pods, &agents, &pools, &policies, vec!["pods".into()])
    }

    #[test]
    fn people_see_what_matters() {
        let expected = "\
GATEWAY  NODE    READY  ADDRESSES
gw-a     node-1  yes    10.244.1.2, fd00::2
gw-b     node-1  no     10.244.1.2, fd00::2

NODES  38 of 40 ready

POOL       SOURCE      ADDRESSES                   OWNER  EPOCH  NAMESPACES
partner-a  Static      203.0.113.10, 2001:db8::10  gw-a   7      12
partner-a  Static      203.0.113.11                -      0      0
new        PodNetwork

POLICY           ACCEPTED  CONFLICTED   PROGRAMMED       MESSAGE
cegp guardrails  True      False        False (Pending)  38 of 40 nodes
egp shop/web     True old  True (Pool)  True             another pool\\nwins
egp shop/new     -         -            -
you may not list pods
";
        assert_eq!(example().render(), expected);
    }

    #[test]
    fn ready_is_a_gateway_and_every_agent() {
        assert_eq!(example().waiting, ["agents are ready on 38 of 40 nodes"]);
        let labels = json!({"app.kubernetes.io/component": "gateway"});
        let pod = json!({"metadata": {"name": "a", "labels": labels}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}});
        let agents = |seen: i64, ready: u64| json!({"metadata": {"generation": 2}, "status": {"observedGeneration": seen, "desiredNumberScheduled": 2, "numberReady": ready}});
        assert!(overview(std::slice::from_ref(&pod), &agents(2, 2), &[], &[], Vec::new()).ready);
        assert!(!overview(std::slice::from_ref(&pod), &agents(1, 2), &[], &[], Vec::new()).ready);
        assert!(!overview(&[], &agents(2, 2), &[], &[], Vec::new()).ready);
        assert!(!overview(&[pod], &Value::Null, &[], &[], Vec::new()).ready);
    }

    #[test]
    fn kubeconfigs_are_found_as_by_kubectl() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name);
        std::fs::create_dir(file(".kube")).unwrap();
        for name in [".kube/config", "a", "b"] {
            std::fs::write(file(name), "").unwrap();
        }
        let joined = |all: &[&str]| Some(std::env::join_paths(all.iter().map(|n| file(n))).unwrap());
        let home = || Some(folder.path().to_owned());
        assert_eq!(kubeconfigs(Some(file("x")), joined(&["a"]), home()), [file("x")]);
        assert_eq!(kubeconfigs(None, joined(&["a", "missing", "b"]), home()), [file("a"), file("b")]);
        assert_eq!(kubeconfigs(None, joined(&["missing"]), home()), [file("missing")]);
        assert_eq!(kubeconfigs(None, Some(OsString::new()), home()), [file(".kube/config")]);
        assert!(kubeconfigs(None, None, Some(file("a"))).is_empty() && kubeconfigs(None, None, None).is_empty());
    }

    #[test]
    fn pods_say_what_keeps_them_from_running() {
        let said = |status: Value| {
            let pod = json!({"metadata": {"name": "p"}, "spec": {"nodeName": "n"}, "status": status});
            overview(&[pod], &Value::Null, &[], &[], Vec::new()).troubles.pop().map(|t| t.what)
        };
        let container = |state: Value, last: Value| json!({"containerStatuses": [{"ready": false, "state": state, "lastState": last}]});
        let unplaced =
            json!({"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/4 nodes"});
        assert_eq!(said(json!({"conditions": [unplaced]})).as_deref(), Some("Unschedulable: 0/4 nodes"));
        let missing = json!({"waiting": {"reason": "ErrImageNeverPull", "message": "it is not present"}});
        assert_eq!(said(container(missing, json!({}))).as_deref(), Some("ErrImageNeverPull: it is not present"));
        // What ended says why, and its last words most of it.
        let back_off = json!({"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}});
        let killed = json!({"terminated": {"exitCode": 137, "reason": "OOMKilled"}});
        assert_eq!(said(container(back_off.clone(), killed)).as_deref(), Some("OOMKilled (exit code 137)"));
        let long = format!("{}unknown field", "é".repeat(2 * SAID));
        let failed = json!({"terminated": {"exitCode": 1, "reason": "Error", "message": long}});
        let last = said(container(back_off, failed)).unwrap();
        assert!(last.ends_with("éunknown field") && last.chars().count() == SAID + 1, "{last}");
        let evicted = json!({"phase": "Failed", "reason": "Evicted", "message": "The node was low on memory."});
        assert_eq!(said(evicted).as_deref(), Some("Evicted: The node was low on memory."));
        // What has done its work is in no trouble, nor is what waits for others.
        let done = json!({"terminated": {"exitCode": 0, "reason": "Completed"}});
        assert_eq!(said(container(done, json!({}))), None);
        assert_eq!(said(container(json!({"running": {}}), json!({}))), None);
        assert_eq!(said(container(json!({"waiting": {"reason": "ContainerCreating"}}), json!({}))), None);

        // Of an agent that runs again its own word counts, and of others that of their pods.
        let agent = |name: &str, state: Value, ready: bool| {
            let labels = json!({"app.kubernetes.io/component": "agent"});
            let killed = json!({"terminated": {"exitCode": 137, "reason": "Error"}});
            let status =
                json!({"containerStatuses": [{"name": "agent", "ready": ready, "state": state, "lastState": killed}]});
            json!({"metadata": {"name": name, "labels": labels}, "spec": {"nodeName": "n"}, "status": status})
        };
        let all = [
            agent("again", json!({"running": {}}), false),
            agent("waits", json!({"waiting": {"reason": "CrashLoopBackOff"}}), false),
            agent("ready", json!({"running": {}}), true),
        ];
        let mut shown = overview(&all, &Value::Null, &[], &[], Vec::new());
        assert_eq!(shown.unready, [("again".to_owned(), "n".to_owned())]);
        let status = br#"{"node": "n", "conditions": ["this node's certificate is missing", "a second one"]}"#;
        let trouble = |what: Option<String>| Trouble { pod: "again".into(), node: "n".into(), what: what.unwrap() };
        shown.tell(trouble(super::said(status)));
        assert_eq!((super::said(br#"{"conditions": []}"#), super::said(b"no JSON")), (None, None));
        let table = shown.render();
        let rows =
            "again  n     this node's certificate is missing; a second one\nwaits  n     Error (exit code 137)\n";
        assert!(table.ends_with(rows), "{table}");

        let pod = json!({"metadata": {"name": "p"}, "status": container(json!({"waiting": {"reason": "A", "message": "b"}}), json!({}))});
        let shown = overview(&[pod], &Value::Null, &[], &[], Vec::new()).render();
        assert!(shown.ends_with("POD  NODE  TROUBLE\np    -     A: b\n"), "{shown}");
    }
}
