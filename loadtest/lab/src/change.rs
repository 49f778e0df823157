//! What comes and goes while the lab runs: pods with their networks, and gateways.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::cluster;
use crate::lab::Lab;
use crate::scenario::{Gateway, Pod, SYSTEM_NAMESPACE};
use crate::{netns, product, world};

/// How long a gateway that is told to end may take: as long as its kubelet would give it.
const GRACE: Duration = Duration::from_secs(35);

impl Lab {
    /// Adds a pod with its network, and tells the product of it. It serves nothing.
    ///
    /// # Errors
    /// When it cannot be made, or its name is taken.
    pub fn add_pod(&mut self, pod: Pod) -> Result<()> {
        let pod = self.add_network(pod)?;
        if self.has_kubernetes() { self.make_object(&pod) } else { self.list_pods() }
    }

    /// Adds the network of a pod that nobody tells the product of; gives it with its addresses.
    ///
    /// # Errors
    /// As [`Lab::add_pod`].
    pub fn add_network(&mut self, pod: Pod) -> Result<Pod> {
        ensure!(pod.listen.is_empty(), "{}: a pod that is added later serves nothing", pod.key());
        let key = pod.key();
        let state = self.state_mut();
        ensure!(state.scenario.namespaces.iter().any(|n| n.name == pod.namespace), "{key}: there is no such namespace");
        let pod = state.scenario.add_pod(pod)?;
        state.save()?;
        world::add(state, &key).with_context(|| format!("the network of {key}"))?;
        Ok(pod)
    }

    /// Makes the network card of a pod that was added anew, as a network plugin may: another device of the same name, with the same addresses.
    ///
    /// # Errors
    /// When there is no such pod.
    pub fn make_card_anew(&mut self, key: &str) -> Result<()> {
        let pod = self.scenario().pod(key)?.clone();
        let state = self.state_mut();
        world::remove(state, &pod)?;
        world::wire(state, &pod)
    }

    /// Removes a pod that was added, object first, as a kubelet does when its containers have ended.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn remove_pod(&mut self, key: &str) -> Result<()> {
        let pod = self.scenario().pod(key)?.clone();
        let key = pod.key();
        if self.has_kubernetes() {
            self.delete_pod(&key)?;
        }
        let state = self.state_mut();
        world::remove(state, &pod)?;
        let netns = state.netns(&key);
        netns::delete(&netns)?;
        state.namespaces.retain(|n| n.netns != netns);
        state.scenario.pods.retain(|p| p.key() != key);
        state.save()?;
        if self.has_kubernetes() { Ok(()) } else { self.list_pods() }
    }

    /// Writes the manifest of all pods anew.
    fn list_pods(&self) -> Result<()> {
        let files = product::manifests(self.scenario())?;
        let pods = files.into_iter().find(|(name, _)| name == "pods.yaml");
        let (name, text) = pods.context("there is no manifest of pods")?;
        self.edit_manifest(&name, &text)
    }

    /// Deletes a gateway's pod as a Deployment does that has a newer version: it is terminating, its process is told to end,
    /// and once that has ended it is gone with its network.
    ///
    /// # Errors
    /// When it does not end within its grace period.
    pub fn delete_gateway(&mut self, name: &str) -> Result<()> {
        ensure!(self.has_kubernetes(), "gateways come and go with an API server only");
        self.kubectl(&["delete", "pod", name, "-n", SYSTEM_NAMESPACE, "--wait=false"])?;
        self.signal(name, Signal::SIGTERM, Some(GRACE))?;
        self.remove_pod(&format!("{SYSTEM_NAMESPACE}/{name}"))?;
        let state = self.state_mut();
        state.scenario.gateways.retain(|g| g.name != name);
        state.processes.retain(|p| p.name != name);
        state.save()
    }

    /// Says which gateways the cluster's DNS names from now on. It follows none that come or go, as one that remembers old answers.
    ///
    /// # Errors
    /// When there is no such gateway.
    pub fn name_gateways(&self, names: &[&str]) -> Result<()> {
        self.set_name_of("cluster", cluster::gateways(self.scenario(), names.iter().copied())?)
    }

    /// Starts a gateway in a pod of its own. [`Lab::wait_ready`] waits for it.
    ///
    /// # Errors
    /// When the node has one, or it does not start.
    pub fn add_gateway(&mut self, name: &str, node: &str) -> Result<()> {
        ensure!(self.has_kubernetes(), "gateways come and go with an API server only");
        if self.scenario().gateways.iter().any(|g| g.node == node) {
            bail!("{node} has a gateway");
        }
        let gateway = Gateway { name: name.into(), node: node.into() };
        let pod = gateway.pod();
        self.state_mut().scenario.gateways.push(gateway);
        self.add_pod(pod)?;
        product::write_gateway(self.scenario(), self.layout(), name, node)?;
        self.give_kubeconfig(name)?;
        self.start(name)
    }
}
