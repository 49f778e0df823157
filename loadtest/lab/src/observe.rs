//! What an instance shows and how it is changed: admin ports, metrics, audit logs, manifests, names.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::lab::{Lab, wait_for};
use crate::product::{self, AGENT_ADMIN, GATEWAY_ADMIN};
use crate::scenario::NameSpec;
use crate::serve::zone::Zone;
use crate::{admin, netns, state};

/// Where the audit logs ended at some moment.
#[derive(Clone, Debug, Default)]
pub struct Mark(BTreeMap<String, u64>);

/// Counts packets that pass the router, until it is dropped.
#[derive(Debug)]
pub struct Watch {
    netns: String,
    table: String,
}

impl Watch {
    /// How many were seen so far.
    ///
    /// # Errors
    /// When the counter cannot be read.
    pub fn packets(&self) -> Result<u64> {
        let text = netns::nft_list(&self.netns, &self.table)?;
        let count = text.split_once("counter packets ").and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
        count.with_context(|| format!("no counter in {text}"))
    }

    /// Who sent them: addresses, protocols and ports, as nft prints them. For the message of a test that fails.
    pub fn senders(&self) -> String {
        let text = netns::nft_list(&self.netns, &self.table).unwrap_or_default();
        let elements = text.split_once("elements = {").and_then(|(_, rest)| rest.split('}').next());
        elements.unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // It goes with its namespace at the latest.
        let _ = netns::nft(&self.netns, &format!("delete table inet {}", self.table));
    }
}

impl Lab {
    /// Starts to count the packets to an address that pass the router, on whatever way they came there. `matches` is
    /// a further nft match, or empty.
    ///
    /// # Errors
    /// When nft refuses it.
    pub fn watch(&self, to: IpAddr, matches: &str) -> Result<Watch> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let table = format!("lab-watch-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let family = if to.is_ipv4() { "ip" } else { "ip6" };
        let netns = self.place("router")?.netns().to_owned();
        netns::nft(
            &netns,
            &format!(
                "table inet {table} {{ set senders {{ typeof {family} saddr . meta l4proto . th sport . th dport; \
                 flags dynamic; size 64; }}; chain seen {{ type filter hook prerouting priority raw; policy accept; \
                 {family} daddr {to} {matches} counter \
                 update @senders {{ {family} saddr . meta l4proto . th sport . th dport }}; }}; }}"
            ),
        )?;
        Ok(Watch { netns, table })
    }

    /// Asks a process's admin port.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn admin(&self, name: &str, path: &str) -> Result<(u16, String)> {
        let agent = self.scenario().node(name).is_ok();
        let port = if agent { AGENT_ADMIN } else { GATEWAY_ADMIN };
        admin::get(&self.place(name)?.netns, SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port), path)
    }

    /// The metrics of a node's agent or of a gateway.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn metrics(&self, name: &str) -> Result<String> {
        let (status, body) = self.admin(name, "/metrics")?;
        ensure!(status == 200, "{name} answers /metrics with {status}");
        Ok(body)
    }

    /// Sum of the samples of a metric whose labels contain each of the given texts.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn metric(&self, name: &str, metric: &str, labels: &[&str]) -> Result<f64> {
        Ok(sum_metric(&self.metrics(name)?, metric, labels))
    }

    /// Where all audit logs end now.
    pub fn mark(&self) -> Mark {
        let names = self.product_names().into_iter();
        Mark(names.map(|n| (n.clone(), fs::metadata(self.layout().audit(&n)).map_or(0, |m| m.len()))).collect())
    }

    /// The audit records of a node's agent or a gateway since a mark.
    ///
    /// # Errors
    /// When a record is not JSON.
    pub fn audit(&self, name: &str, since: &Mark) -> Result<Vec<Value>> {
        let Ok(mut file) = File::open(self.layout().audit(name)) else {
            return Ok(Vec::new());
        };
        let since = since.0.get(name).copied().unwrap_or(0);
        file.seek(SeekFrom::Start(since.saturating_sub(1)))?;
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        let text = String::from_utf8_lossy(&text);
        // A line was on its way when the mark was set: it was written before. The last one may still be.
        let begun = if since == 0 { Some(&*text) } else { text.split_once('\n').map(|(_, rest)| rest) };
        let whole = begun.and_then(|text| Some(&text[..text.rfind('\n')?])).unwrap_or_default();
        whole.lines().map(|l| serde_json::from_str(l).with_context(|| format!("audit of {name}: {l}"))).collect()
    }

    /// Waits up to 5 s for a record that fits, at any of the named processes.
    pub fn wait_audit(&self, names: &[&str], since: &Mark, fits: impl Fn(&Value) -> bool) -> Option<Value> {
        wait_for(Duration::from_secs(5), || {
            names.iter().find_map(|n| self.audit(n, since).unwrap_or_default().into_iter().find(|r| fits(r)))
        })
    }

    /// Replaces or adds a manifest, in one step. With an API server it is applied, and what it no longer has is deleted.
    ///
    /// # Errors
    /// When the file cannot be written, or the API server refuses it.
    pub fn edit_manifest(&self, file: &str, text: &str) -> Result<()> {
        let before = self.manifest(file).ok();
        // Not in the watched folder: the product must see only the finished file.
        let temporary = self.layout().folder.join(format!("edit.{file}"));
        fs::write(&temporary, text)?;
        fs::rename(&temporary, self.layout().manifests().join(file))
            .with_context(|| format!("cannot replace {file}"))?;
        if self.has_kubernetes() { self.sync_manifest(file, before.as_deref(), Some(text)) } else { Ok(()) }
    }

    /// The text of a manifest.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn manifest(&self, file: &str) -> Result<String> {
        fs::read_to_string(self.layout().manifests().join(file)).with_context(|| format!("there is no manifest {file}"))
    }

    /// Removes a manifest; with an API server its objects are deleted.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn remove_manifest(&self, file: &str) -> Result<()> {
        let before = self.manifest(file)?;
        fs::remove_file(self.layout().manifests().join(file))
            .with_context(|| format!("there is no manifest {file}"))?;
        if self.has_kubernetes() { self.sync_manifest(file, Some(&before), None) } else { Ok(()) }
    }

    /// Gives a Namespace exactly these annotations: in its manifest, or with kubectl.
    ///
    /// # Errors
    /// When the scenario has no such namespace.
    pub fn annotate(&self, namespace: &str, annotations: &[(&str, &str)]) -> Result<()> {
        if self.has_kubernetes() {
            return self.annotate_object(namespace, annotations);
        }
        let known = self.scenario().namespaces.iter().find(|n| n.name == namespace);
        let mut labels = known.with_context(|| format!("there is no namespace {namespace:?}"))?.labels.clone();
        labels.insert("kubernetes.io/metadata.name".into(), namespace.into());
        let annotations = annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let object = product::namespace_object(namespace, &labels, &annotations);
        self.edit_manifest(&format!("namespace-{namespace}.yaml"), &product::yaml(&object)?)
    }

    /// Changes what a name of the internet resolves to, from the next query on.
    ///
    /// # Errors
    /// When the zone cannot be replaced.
    pub fn set_name(&self, spec: NameSpec) -> Result<()> {
        self.set_name_of("internet", spec)
    }

    /// As [`Lab::set_name`], for the DNS servers of `internet` or `cluster`.
    pub(crate) fn set_name_of(&self, of: &str, spec: NameSpec) -> Result<()> {
        self.edit_zone(of, |zone| {
            zone.names.retain(|n| n.name != spec.name);
            zone.names.push(spec);
        })
    }

    /// Changes what the DNS servers of `internet` or `cluster` know.
    pub(crate) fn edit_zone(&self, of: &str, edit: impl FnOnce(&mut Zone)) -> Result<()> {
        let path = self.layout().folder.join(format!("serve/{of}.zone.json"));
        let mut zone: Zone = serde_json::from_str(&fs::read_to_string(&path)?)?;
        edit(&mut zone);
        state::replace(&path, &serde_json::to_vec_pretty(&zone)?)
    }

    /// Every query that the internet's DNS servers saw: server, client, name, type, transport.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn internet_queries(&self) -> Result<Vec<Value>> {
        self.queries("internet")
    }

    /// Every query that the DNS servers of a place saw: `internet`, `cluster`, or a node with a daemon of its own.
    ///
    /// # Errors
    /// When there is no such log.
    pub fn queries(&self, of: &str) -> Result<Vec<Value>> {
        let text = fs::read_to_string(self.layout().folder.join(format!("serve/{of}.queries.jsonl")))?;
        Ok(text.lines().filter_map(|l| serde_json::from_str(l).ok()).collect())
    }
}

/// Sums the samples of a metric in Prometheus's text format whose labels contain each of the given texts.
pub fn sum_metric(text: &str, metric: &str, labels: &[&str]) -> f64 {
    let samples = text.lines().filter(|l| !l.starts_with('#')).filter_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        let (name, set) = series.split_once('{').unwrap_or((series, ""));
        let fits = name == metric && labels.iter().all(|l| set.contains(l));
        fits.then(|| value.parse::<f64>().ok()).flatten()
    });
    // A sum of nothing would be -0.
    samples.fold(0.0, |sum, value| sum + value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_summed_by_labels() {
        let text = "# HELP x y\nx{reason=\"a\",hook=\"p\"} 2\nx{reason=\"a\",hook=\"q\"} 3\nx{reason=\"b\"} 5\nxy{reason=\"a\"} 7\nz 1\n";
        assert_eq!(sum_metric(text, "x", &["reason=\"a\""]), 5.0);
        assert_eq!(sum_metric(text, "x", &["reason=\"a\"", "hook=\"q\""]), 3.0);
        assert_eq!(sum_metric(text, "z", &[]), 1.0);
    }
}
