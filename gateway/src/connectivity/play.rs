//! The test itself, from the first look to the last check.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};
use tidegate_kubernetes::Connection;
use tidegate_kubernetes::objects::{get, list};

use super::checks::{self, Baseline, Outside};
use super::report::{Outcome, Row};
use super::stage::{Client, Image, Side, Stage};
use super::{GROUP, Options};
use crate::probe::{Family, Seen, Step, Why};

const POLICY: &str = "connectivity-test";
/// How long a policy may take to be on every node.
const PROGRAMMED: Duration = Duration::from_secs(30);
/// Pods that try at a time.
const AT_ONCE: usize = 8;

/// What is installed.
struct Installed {
    image: Image,
    /// What is wrong with it.
    broken: bool,
    /// What pods are that nothing selects.
    default: String,
    /// Nodes with an agent that is ready.
    agents: BTreeSet<String>,
}

/// Who tries, and what there is to compare with.
struct Cast<'a> {
    stage: &'a Stage<'a>,
    outside: &'a Outside,
    installed: Installed,
}

/// Plays it, and notes every check.
///
/// # Errors
/// It could not be played to the end.
pub async fn play(
    connection: &Connection,
    stage: &mut Stage<'_>,
    options: &Options,
    outside: &Outside,
    rows: &mut Vec<Row>,
) -> Result<()> {
    let nodes = nodes(connection, options).await?;
    let installed = installed(connection, options, &nodes, rows).await?;
    let wanted = wanted(connection, options, rows).await?;
    stage.make(&options.labels()?).await?;
    stage.allow(&policy(options, outside)).await?;
    eprintln!("starting pods on {}", nodes.join(", "));
    stage.populate(&nodes, options, &installed.image).await?;
    let mut clients = Vec::new();
    for side in [Side::Free, Side::Managed] {
        let (running, others) = stage.clients(side).await?;
        for (node, why) in others {
            rows.push(Row::new("pod starts", None, &node, Outcome::Broken, why));
        }
        clients.push(running);
    }
    let (good, said) = stage.programmed(POLICY, PROGRAMMED).await?;
    rows.push(Row::new("policy programmed", None, "", if good { Outcome::Kept } else { Outcome::Broken }, said));
    eprintln!("trying");
    let cast = Cast { stage, outside, installed };
    let mut unreached = Vec::new();
    for family in [Family::V4, Family::V6] {
        let of_family = |c: &&Client| c.addresses.iter().any(|ip| Family::of(*ip) == family);
        let [free, managed] = [0, 1].map(|n| clients[n].iter().filter(of_family).collect::<Vec<_>>());
        if free.is_empty() && managed.is_empty() {
            rows.push(Row::new("family", Some(family), "", Outcome::Skipped, "pods have no such addresses"));
            continue;
        }
        match cast.baseline(family, &free, rows).await? {
            Ok(base) => cast.promises(family, &managed, &base, &wanted, rows).await?,
            Err(why) => unreached.push((family, why)),
        }
    }
    // Where one way leads outside, the cluster has no other; where none does, nothing was tried.
    if !rows.iter().any(|r| r.check == ALLOWED) {
        let all: Vec<String> = unreached.iter().map(|(f, why)| format!("{}: {why}", f.text())).collect();
        bail!(
            "pods that nothing selects do not reach {} and {} either, so that nothing can be compared: {}",
            outside.allowed,
            outside.denied,
            all.join("; ")
        );
    }
    for (family, why) in unreached {
        rows.push(Row::new("family", Some(family), "", Outcome::Skipped, format!("no way out of the cluster: {why}")));
    }
    Ok(())
}

const ALLOWED: &str = "allowed name";

fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn is_ready(object: &Value) -> bool {
    object["metadata"]["deletionTimestamp"].is_null()
        && items(&object["status"]["conditions"]).iter().any(|c| c["type"] == "Ready" && c["status"] == "True")
}

/// The nodes that are tried from: those that are named, else some of the ready ones with Linux, evenly taken.
async fn nodes(connection: &Connection, options: &Options) -> Result<Vec<String>> {
    let all = list(connection, "/api/v1/nodes", "kubernetes.io/os=linux").await.context("cannot list nodes")?;
    let mut ready: Vec<String> =
        all.iter().filter(|n| is_ready(n)).filter_map(|n| Some(n["metadata"]["name"].as_str()?.to_owned())).collect();
    ready.sort();
    if !options.node.is_empty() {
        for name in &options.node {
            ensure!(ready.contains(name), "there is no ready node {name} with Linux");
        }
        return Ok(options.node.clone());
    }
    ensure!(!ready.is_empty(), "no node with Linux is ready");
    Ok(some(&ready, usize::from(options.nodes)))
}

/// Whether nobody answered the question for a name.
fn is_deaf(seen: &Seen) -> bool {
    seen.failed == Some((Step::Resolve, Why::Silent))
}

/// So many of them, evenly taken.
fn some(all: &[String], n: usize) -> Vec<String> {
    let n = n.min(all.len());
    (0..n).map(|i| all[i * all.len() / n].clone()).collect()
}

/// Looks at the installation.
async fn installed(
    connection: &Connection,
    options: &Options,
    nodes: &[String],
    rows: &mut Vec<Row>,
) -> Result<Installed> {
    let own = &connection.namespace;
    let apps = format!("/apis/apps/v1/namespaces/{own}");
    let agents = get(connection, &format!("{apps}/daemonsets/tidegate-agent")).await?;
    let deployment = get(connection, &format!("{apps}/deployments/tidegate-gateway")).await?;
    let template = agents.as_ref().or(deployment.as_ref());
    let template = template.with_context(|| format!("there is no Tidegate in the namespace {own}: see --namespace"))?;
    let container = &template["spec"]["template"]["spec"]["containers"][0];
    let image = Image {
        name: options.image.clone().or_else(|| container["image"].as_str().map(str::to_owned)).context("no image")?,
        pull_policy: container["imagePullPolicy"].clone(),
    };
    let pods = list(connection, &format!("/api/v1/namespaces/{own}/pods"), "app.kubernetes.io/name=tidegate").await?;
    let of = |component: &str| {
        let is = |p: &&Value| p["metadata"]["labels"]["app.kubernetes.io/component"] == component && is_ready(p);
        pods.iter().filter(is).filter_map(|p| p["spec"]["nodeName"].as_str()).collect::<BTreeSet<_>>()
    };
    let (gateways, agents) = (of("gateway"), of("agent"));
    let outcome = |good| if good { Outcome::Kept } else { Outcome::Broken };
    let on = gateways.iter().copied().collect::<Vec<_>>().join(", ");
    let wanted = deployment.map_or(0, |d| d["spec"]["replicas"].as_u64().unwrap_or(1));
    let detail =
        format!("{} of {wanted} are ready{}", gateways.len(), if on.is_empty() { on } else { format!(": {on}") });
    rows.push(Row::new("gateways", None, "", outcome(!gateways.is_empty()), detail));
    for node in nodes {
        let good = agents.contains(node.as_str());
        let detail = if good { "ready" } else { "no agent is ready on this node" };
        rows.push(Row::new("agent", None, node, outcome(good), detail));
    }
    // Whoever may not read it sees by what the pods do.
    let config = get(connection, &format!("/api/v1/namespaces/{own}/configmaps/tidegate-gateway")).await;
    let config = config.ok().flatten().unwrap_or_default();
    let config: Option<Value> =
        config["data"]["gateway.yaml"].as_str().and_then(|text| serde_saphyr::from_str(text).ok());
    let default = config.and_then(|c| c["clusterDefault"].as_str().map(str::to_owned));
    let broken = super::report::is_broken(rows);
    let agents = agents.into_iter().map(str::to_owned).collect();
    Ok(Installed { image, broken, default: default.unwrap_or_else(|| "Untouched".into()), agents })
}

/// The addresses that traffic may leave with; none: any.
async fn wanted(connection: &Connection, options: &Options, rows: &mut Vec<Row>) -> Result<Vec<IpAddr>> {
    let mut wanted = options.egress_ip.clone();
    let Some(name) = &options.pool else { return Ok(wanted) };
    let Some(pool) = get(connection, &format!("{GROUP}/egresspools/{name}")).await? else {
        if name != "default" {
            rows.push(Row::new("pool", None, "", Outcome::Broken, format!("there is no EgressPool {name}")));
        }
        return Ok(wanted);
    };
    let pairs = items(&pool["spec"]["static"]["addresses"]);
    wanted.extend(
        pairs.iter().flat_map(|p| [&p["ipv4"], &p["ipv6"]]).filter_map(|ip| ip.as_str()?.parse::<IpAddr>().ok()),
    );
    Ok(wanted)
}

fn policy(options: &Options, outside: &Outside) -> Value {
    let mut names = vec![&outside.allowed];
    names.extend(outside.echo.as_ref().map(|(host, _)| host).filter(|h| **h != outside.allowed));
    let names: Vec<Value> = names.iter().map(|n| json!({"matchName": n})).collect();
    let mut spec = json!({
        "podSelector": {},
        "egress": [{"name": "allowed", "toFQDNs": names, "toPorts": [{"protocol": "TCP", "port": checks::HTTPS}]}],
    });
    if let Some(pool) = &options.pool {
        spec["poolRef"] = json!({"name": pool});
    }
    json!({
        "apiVersion": "tidegate.dev/v1alpha1", "kind": "EgressPolicy",
        "metadata": {"name": POLICY}, "spec": spec,
    })
}

/// What one managed pod has come to.
struct Tried {
    rows: Vec<Row>,
    source: Option<(String, IpAddr)>,
}

impl Cast<'_> {
    /// What pods reach that nothing selects. `Err`: the family leads nowhere.
    async fn baseline(
        &self,
        family: Family,
        clients: &[&Client],
        rows: &mut Vec<Row>,
    ) -> Result<Result<Baseline, String>> {
        let all: Vec<(&Client, [Seen; 4])> = stream::iter(clients)
            .map(|c| async move {
                let tries = [
                    checks::visit(&self.outside.allowed, family),
                    checks::visit(&self.outside.denied, family),
                    checks::other_port(&self.outside.allowed, family),
                    checks::inside(family),
                ];
                let mut seen: [Seen; 4] = Default::default();
                for (seen, attempt) in seen.iter_mut().zip(&tries) {
                    *seen = self.stage.attempt(c, attempt).await?;
                    if is_deaf(seen) {
                        break;
                    }
                }
                // What was not tried has not succeeded.
                let deaf = seen.iter().find(|s| is_deaf(s)).cloned();
                for seen in &mut seen {
                    if let (Some(deaf), true) = (&deaf, *seen == Seen::default()) {
                        *seen = deaf.clone();
                    }
                }
                anyhow::Ok((*c, seen))
            })
            .buffered(AT_ONCE)
            .try_collect()
            .await?;
        let good = |seen: &[Seen; 4]| seen[0].failed.is_none() && seen[1].failed.is_none();
        let told = |seen: &[Seen; 4]| {
            let names = [&self.outside.allowed, &self.outside.denied];
            let each: Vec<String> = names.iter().zip(seen).map(|(n, s)| format!("{n}: {}", s.text())).collect();
            each.join("; ")
        };
        let free = self.installed.default == "Untouched";
        let any = all.iter().any(|(_, seen)| good(seen));
        // With a broken installation it may be that which is in the way.
        if free && !any && !self.installed.broken {
            return Ok(Err(all.first().map(|(_, seen)| told(seen)).unwrap_or_default()));
        }
        if !free {
            let why = format!("clusterDefault is {}", self.installed.default);
            rows.push(Row::new("untouched pod", Some(family), "", Outcome::Skipped, why));
        }
        let mut base = Baseline::default();
        for (client, seen) in &all {
            if free {
                let outcome = if good(seen) { Outcome::Kept } else { Outcome::Broken };
                let detail = match (good(seen), self.installed.agents.contains(&client.node)) {
                    (true, _) => "reaches both names".to_owned(),
                    (false, true) => told(seen),
                    // Nobody can tell the node whether policy concerns the namespace.
                    (false, false) => format!("closed: new namespace, and no agent on its node; {}", told(seen)),
                };
                rows.push(Row::new("untouched pod", Some(family), &client.node, outcome, detail));
            }
            let [allowed, denied, other_port, inside] = seen;
            base.allowed.extend(&allowed.addresses);
            base.denies |= denied.failed.is_none();
            base.stranger = base.stranger.or(denied.connected.filter(|_| denied.failed.is_none()));
            base.other_port |= other_port.failed.is_none();
            base.inside |= inside.failed.is_none();
        }
        base.stranger = base.stranger.filter(|ip| !base.allowed.contains(ip));
        Ok(Ok(base))
    }

    /// What managed pods reach, and what they do not.
    async fn promises(
        &self,
        family: Family,
        clients: &[&Client],
        base: &Baseline,
        wanted: &[IpAddr],
        rows: &mut Vec<Row>,
    ) -> Result<()> {
        let all: Vec<Tried> =
            stream::iter(clients).map(|c| self.one(family, c, base)).buffered(AT_ONCE).try_collect().await?;
        let mut sources = Vec::new();
        for tried in all {
            rows.extend(tried.rows);
            sources.extend(tried.source);
        }
        rows.push(match &self.outside.echo {
            Some(_) => checks::stable(family, &sources, wanted),
            None => Row::new("egress IP", Some(family), "", Outcome::Skipped, "no --egress-url is given"),
        });
        Ok(())
    }

    async fn one(&self, family: Family, client: &Client, base: &Baseline) -> Result<Tried> {
        let (allowed, other) = (&self.outside.allowed, &self.outside.denied);
        let node = client.node.as_str();
        let mut rows = Vec::new();
        let mut note = |check: &str, outcome, seen: &Seen| {
            rows.push(Row::new(check, Some(family), node, outcome, seen.text()));
        };
        let visited = self.stage.attempt(client, &checks::visit(allowed, family)).await?;
        note(ALLOWED, checks::done(&visited), &visited);
        // Every further name would take as long to say the same.
        let deaf = is_deaf(&visited);
        if base.denies && !deaf {
            let seen = self.stage.attempt(client, &checks::visit(other, family)).await?;
            note("denied name", checks::denied(&seen), &seen);
        }
        if let Some(stranger) = base.stranger {
            let seen = self.stage.attempt(client, &checks::knock(stranger)).await?;
            note("unresolved address", checks::unreached(&seen), &Seen { addresses: vec![stranger], ..seen.clone() });
        }
        if visited.failed.is_none() {
            let seen = self.stage.attempt(client, &checks::other_sni(allowed, other, family)).await?;
            note("wrong SNI", checks::sni(&seen), &seen);
        }
        if base.other_port && visited.failed.is_none() {
            let seen = self.stage.attempt(client, &checks::other_port(allowed, family)).await?;
            note("wrong port", checks::unreached(&seen), &seen);
        }
        if base.inside && !deaf {
            let seen = self.stage.attempt(client, &checks::inside(family)).await?;
            note("in-cluster name", checks::done(&seen), &seen);
        }
        let mut source = None;
        if let Some((host, path)) = self.outside.echo.as_ref().filter(|_| !deaf) {
            let seen = self.stage.attempt(client, &checks::fetch(host, path, family)).await?;
            source = checks::egress(&seen).map(|ip| (node.to_owned(), ip));
            if source.is_none() {
                note("egress URL", Outcome::Broken, &seen);
            }
        }
        let mut skip = |check: &str, why: String| {
            rows.push(Row::new(check, Some(family), node, Outcome::Skipped, why));
        };
        if !base.denies {
            skip("denied name", format!("{other} cannot be reached by anybody"));
        }
        if base.stranger.is_none() {
            skip("unresolved address", format!("{other} has no address of its own that can be reached"));
        }
        if deaf {
            skip("denied name", "nobody answers DNS".into());
        }
        if visited.failed.is_some() {
            skip("wrong SNI", format!("{allowed} is not reached"));
        }
        Ok(Tried { rows, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_taken_evenly() {
        let all: Vec<String> = (0..10).map(|n| n.to_string()).collect();
        assert_eq!(some(&all, 3), ["0", "3", "6"]);
        assert_eq!(some(&all[..2], 8), ["0", "1"]);
    }
}
