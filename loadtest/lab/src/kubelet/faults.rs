//! What happens to nodes: services and containers that are killed, links that fail, a machine that is switched off and on.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::lab::{Lab, wait_for};
use crate::{netns, world};

use super::{cgroups, files, images};

/// How long what was killed may take to be gone.
const GONE: Duration = Duration::from_secs(10);

impl Lab {
    /// Kills the process of a container whose arguments hold all of these, as a crash does; its kubelet starts the container again.
    ///
    /// # Errors
    /// When the pod has none.
    pub fn kill_in_pod(&self, key: &str, arguments: &[&str]) -> Result<()> {
        let all = self.pod_processes(key)?;
        let fits = |line: &[String]| arguments.iter().all(|a| line.iter().any(|l| l == a));
        let (pid, _) =
            all.iter().find(|(_, l)| fits(l)).with_context(|| format!("{key} has no {arguments:?}: {all:?}"))?;
        end(*pid)
    }

    /// Kills a node's service: `containerd`, `kubelet`, `kube-proxy`. The node starts it again a second later.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill_service(&self, node: &str, service: &str) -> Result<()> {
        let init = self.node_init(node)?;
        let children = fs::read_to_string(format!("/proc/{init}/task/{init}/children"))?;
        let named = |pid: &&str| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let program = line.split(|b| *b == 0).next().unwrap_or_default();
            program.rsplit(|b| *b == b'/').next() == Some(service.as_bytes())
        };
        let pid = children.split_whitespace().find(named).with_context(|| format!("{node} has no {service}"))?;
        end(pid.parse()?)
    }

    /// Switches a node off: nothing runs on it, and nothing reaches it.
    ///
    /// # Errors
    /// When something of it goes on.
    pub fn switch_off(&self, node: &str) -> Result<()> {
        self.set_link(node, false)?;
        self.signal(&format!("node {node}"), Signal::SIGKILL, Some(GONE))?;
        let group = files::cgroup_of(node, self.name());
        cgroups::remove(&group)?;
        cgroups::create(&group)
    }

    /// Switches it on again: it has its disk and its network card, and nothing of what its kernel knew.
    ///
    /// # Errors
    /// When it does not start.
    pub fn switch_on(&mut self, node: &str) -> Result<()> {
        world::renew(self.state_mut(), node)?;
        let node = self.scenario().node(node)?.clone();
        self.start_node(&node, &images::folder(self.name()))
    }

    /// Puts another machine into the place of a node that is switched off: it has what its installer gives it, the credentials that are
    /// good for its name included, and a Node of its own with a taint that keeps new pods off. [`Lab::switch_on`] starts it.
    ///
    /// # Errors
    /// When what the old one had cannot be removed, or the API server refuses.
    pub fn replace(&self, node: &str, taint: &str) -> Result<()> {
        self.host_kubectl(&["delete", "node", node], "")?;
        let node = self.scenario().node(node)?.clone();
        let root = super::disk(self.name()).join(&node.name);
        let clear = |folder: &Path, kept: &str| {
            for entry in fs::read_dir(folder)?.flatten().filter(|e| e.file_name() != kept) {
                if entry.file_type()?.is_dir() {
                    fs::remove_dir_all(entry.path())?;
                } else {
                    fs::remove_file(entry.path())?;
                }
            }
            std::io::Result::Ok(())
        };
        clear(&root, "etc")?;
        clear(&root.join("etc"), "kubernetes")?;
        self.write_disk(&node)?;
        let mut object = self.node_object(&node);
        object["spec"]["taints"] = json!([{"key": taint, "effect": "NoSchedule"}]);
        self.host_kubectl(&["create", "-f", "-"], &object.to_string()).map(drop)
    }

    /// Takes a node's link to the underlay down, or brings it up again.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn set_link(&self, node: &str, up: bool) -> Result<()> {
        let nodes = &self.scenario().nodes;
        let port = nodes.iter().position(|n| n.name == node).with_context(|| format!("no node is called {node}"))?;
        let how = if up { "up" } else { "down" };
        netns::ip_batch(self.place("fabric")?.netns(), &[format!("link set port{port} {how}")])
    }
}

/// Kills a process, and waits until it is gone.
fn end(pid: i32) -> Result<()> {
    kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    // One that nobody has waited for yet has no arguments.
    let line = format!("/proc/{pid}/cmdline");
    let gone = wait_for(GONE, || fs::read(&line).unwrap_or_default().is_empty().then_some(()));
    ensure!(gone.is_some(), "process {pid} does not end");
    Ok(())
}
