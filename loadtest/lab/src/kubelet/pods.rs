//! Pods that kubelets run: made with kubectl, and commands in them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tidegate_kube::Tool;

use super::{CLIENT_IMAGE, cgroups};
use crate::lab::Lab;
use crate::place::{Output, Place};
use crate::probe::Client;

/// The exit status of what could not even be run.
const NOT_RUN: i32 = 128;
/// How long pods may take to be ready.
const READY: &str = "--timeout=120s";

/// A pod of a cluster with kubelets.
#[derive(Clone, Copy, Debug)]
pub struct Pod<'a> {
    lab: &'a Lab,
    /// `NAMESPACE/NAME`.
    key: &'a str,
}

impl Client for Pod<'_> {
    fn command(&self, command: &[&str]) -> Output {
        let (namespace, name) = self.key.split_once('/').unwrap_or(("default", self.key));
        let args = [&["exec", "--namespace", namespace, name, "--"], command].concat();
        match self.lab.at_host(Tool::Kubectl, &args, "") {
            Ok(out) if out.ok => Output { status: 0, stdout: out.stdout, stderr: out.stderr },
            Ok(out) => {
                let (said, status) = ended(&out.stderr);
                Output { status, stdout: out.stdout, stderr: said.to_owned() }
            }
            Err(error) => Output { status: NOT_RUN, stdout: String::new(), stderr: format!("{error:#}") },
        }
    }
}

/// What a command wrote to standard error, and its exit status, which kubectl adds.
fn ended(stderr: &str) -> (&str, i32) {
    let (said, code) = stderr.trim_end().rsplit_once("command terminated with exit code ").unwrap_or((stderr, ""));
    (said, code.parse().unwrap_or(NOT_RUN))
}

impl Lab {
    /// A pod by `NAMESPACE/NAME`, in a cluster with kubelets.
    pub fn cluster_pod<'a>(&'a self, key: &'a str) -> Pod<'a> {
        Pod { lab: self, key }
    }

    /// An object, as the API server has it.
    ///
    /// # Errors
    /// When it has none.
    pub fn object(&self, get: &[&str]) -> Result<Value> {
        let text = self.host_kubectl(&[&["get", "-o", "json"], get].concat(), "")?;
        Ok(serde_json::from_str(&text)?)
    }

    /// The processes of a pod's containers as this machine sees them, each with its arguments: the pod's first one, which
    /// holds its network, and those of its containers.
    ///
    /// # Errors
    /// When there is no such pod.
    pub fn pod_processes(&self, key: &str) -> Result<Vec<(i32, Vec<String>)>> {
        let (namespace, name) = key.split_once('/').unwrap_or(("default", key));
        let pod = self.object(&["pod", "--namespace", namespace, name])?;
        let group = format!("/pod{}/", pod["metadata"]["uid"].as_str().context("a pod without UID")?);
        let own = format!("{}/", cgroups::parent(self.name()));
        let mut found = Vec::new();
        for process in fs::read_dir("/proc")?.flatten().map(|e| e.path()) {
            let Some(pid) = process.file_name().and_then(|n| n.to_str()?.parse().ok()) else { continue };
            // Who ends meanwhile is none of it any more.
            let groups = fs::read_to_string(process.join("cgroup")).unwrap_or_default();
            if groups.lines().any(|l| l.contains(&own) && l.contains(&group)) {
                let line = fs::read(process.join("cmdline")).unwrap_or_default();
                let line = String::from_utf8_lossy(&line);
                found.push((pid, line.split_terminator('\0').map(str::to_owned).collect()));
            }
        }
        Ok(found)
    }

    /// The network of a pod, and its own resolv.conf.
    pub(crate) fn kubelets_place(&self, key: &str) -> Result<Place<'_>> {
        let mut all: Vec<i32> = self.pod_processes(key)?.into_iter().map(|(pid, _)| pid).collect();
        all.sort_unstable();
        // Mounts of other processes cannot be mounted here, so it is read; the process that holds the network may have none.
        let of = |pid: &i32| Path::new("/proc").join(pid.to_string());
        let found = all.iter().find_map(|p| Some((of(p), fs::read(of(p).join("root/etc/resolv.conf")).ok()?)));
        let (process, text) = found.with_context(|| format!("{key} has no process with a resolv.conf"))?;
        let resolv = self.layout().folder.join("config").join(format!("resolv.{}.conf", key.replace('/', ".")));
        fs::write(&resolv, text)?;
        let netns: PathBuf = process.join("ns/net");
        Ok(Place { lab: self, name: key.to_owned(), netns: netns.display().to_string(), resolv: Some(resolv) })
    }

    /// Makes pods with the client's image and the label `app: web`, (`NAMESPACE/NAME`, node) each, and waits until they are ready.
    ///
    /// # Errors
    /// When kubectl fails, or one of them is not ready in time.
    pub fn make_clients(&self, pods: &[(&str, &str)]) -> Result<()> {
        let items: Vec<Value> = pods.iter().map(|(key, node)| client(key, json!({"nodeName": node}))).collect();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
        self.host_kubectl(&["apply", "-f", "-"], &list.to_string())?;
        for (key, _) in pods {
            let (namespace, name) = key.split_once('/').unwrap_or(("default", key));
            let pod = format!("pod/{name}");
            self.host_kubectl(&["wait", "--namespace", namespace, "--for=condition=Ready", READY, &pod], "")?;
        }
        Ok(())
    }

    /// Makes such a pod, placed by this of its specification; does not wait for it.
    ///
    /// # Errors
    /// When kubectl fails.
    pub fn make_client(&self, key: &str, placed: Value) -> Result<()> {
        self.host_kubectl(&["apply", "-f", "-"], &client(key, placed).to_string()).map(drop)
    }
}

fn client(key: &str, placed: Value) -> Value {
    let (namespace, name) = key.split_once('/').unwrap_or(("default", key));
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app": "web"}},
        "spec": placed,
    });
    pod["spec"]["terminationGracePeriodSeconds"] = json!(0);
    pod["spec"]["containers"] = json!([{"name": "client", "image": CLIENT_IMAGE, "imagePullPolicy": "Never"}]);
    pod
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubectl_says_how_a_command_ended() {
        assert_eq!(ended("curl: (6) no\ncommand terminated with exit code 6\n"), ("curl: (6) no\n", 6));
        assert_eq!(
            ended("Error from server (NotFound): pods \"x\" not found"),
            ("Error from server (NotFound): pods \"x\" not found", NOT_RUN)
        );
    }
}
