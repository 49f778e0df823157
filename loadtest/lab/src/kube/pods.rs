//! Pods and Services that come and go while the lab runs: objects only, as their networks are the scenario's.

use std::net::IpAddr;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::objects;
use crate::lab::Lab;
use crate::scenario::{CLUSTER_DOMAIN, NameSpec, Pod};

/// A Pod object.
#[derive(Clone, Debug)]
pub struct Guest<'a> {
    /// `NAMESPACE/NAME`.
    pub key: &'a str,
    /// Its node.
    pub node: &'a str,
    /// Its labels.
    pub labels: Value,
    /// Its addresses, at most one of each family; they may be those of a pod of the scenario that was deleted.
    pub addresses: Vec<IpAddr>,
    /// Whether it is on its node's own network.
    pub host_network: bool,
}

impl<'a> Guest<'a> {
    /// A pod on its own network, with the label `app`.
    pub fn new(key: &'a str, node: &'a str, app: &str, addresses: &[IpAddr]) -> Self {
        Self { key, node, labels: json!({"app": app}), addresses: addresses.to_vec(), host_network: false }
    }
}

fn path(key: &str) -> Result<(String, &str)> {
    let (namespace, name) = key.split_once('/').context("a pod is called NAMESPACE/NAME")?;
    Ok((format!("/api/v1/namespaces/{namespace}/pods"), name))
}

fn listed(addresses: &[IpAddr]) -> Vec<Value> {
    addresses.iter().map(|ip| json!({"ip": ip})).collect()
}

impl Lab {
    /// Makes a Pod object that runs.
    ///
    /// # Errors
    /// What the API server says against it.
    pub fn make_pod(&self, guest: &Guest<'_>) -> Result<()> {
        let (pods, name) = path(guest.key)?;
        let spec = json!({
            "nodeName": guest.node, "hostNetwork": guest.host_network, "containers": [{"name": "main", "image": "lab"}],
        });
        let metadata = json!({"name": name, "labels": guest.labels});
        self.request("POST", &pods, &json!({"metadata": metadata, "spec": spec}))?;
        if guest.host_network {
            let (first, all) = (guest.addresses.first(), listed(&guest.addresses));
            let status = json!({"hostIP": first, "hostIPs": all});
            self.request("PATCH", &format!("{pods}/{name}/status"), &json!({"status": status}))?;
        }
        self.set_addresses(guest.key, &guest.addresses)
    }

    /// Makes the Pod object of a pod of the scenario, as its kubelet has it once it runs.
    pub(crate) fn make_object(&self, pod: &Pod) -> Result<()> {
        let mut object = objects::pod(self.scenario(), pod);
        let status = object["status"].take();
        let (pods, name) = path(&pod.key()).map(|(pods, name)| (pods, name.to_owned()))?;
        self.request("POST", &pods, &object)?;
        self.request("PATCH", &format!("{pods}/{name}/status"), &json!({"status": status})).map(drop)
    }

    /// Says in a pod's status which addresses it has, as its kubelet would.
    ///
    /// # Errors
    /// What the API server says against it.
    pub fn set_addresses(&self, key: &str, addresses: &[IpAddr]) -> Result<()> {
        let (pods, name) = path(key)?;
        let status = json!({"phase": "Running", "podIP": addresses.first(), "podIPs": listed(addresses)});
        self.request("PATCH", &format!("{pods}/{name}/status"), &json!({"status": status})).map(drop)
    }

    /// Deletes a Pod object at once, as its kubelet does when the containers have ended.
    ///
    /// # Errors
    /// What the API server says against it.
    pub fn delete_pod(&self, key: &str) -> Result<()> {
        let (pods, name) = path(key)?;
        self.request("DELETE", &format!("{pods}/{name}"), &json!({"gracePeriodSeconds": 0})).map(drop)
    }

    /// Makes an ExternalName Service, `NAMESPACE/NAME`, and has the cluster's DNS answer it as CoreDNS does: with the alias and,
    /// asked of the internet's servers, what it leads to.
    ///
    /// # Errors
    /// What the API server says against it.
    pub fn make_external_name(&self, key: &str, target: &str) -> Result<()> {
        let (namespace, name) = key.split_once('/').context("a Service is called NAMESPACE/NAME")?;
        let known = self.scenario().internet.names.iter().find(|n| n.name == target).cloned();
        let alias = NameSpec { cname: Some(target.into()), ..spec(namespace, name) };
        self.edit_zone("cluster", |zone| zone.names.extend([alias].into_iter().chain(known)))?;
        let object = json!({"metadata": {"name": name}, "spec": {"type": "ExternalName", "externalName": target}});
        self.request("POST", &format!("/api/v1/namespaces/{namespace}/services"), &object).map(drop)
    }

    /// Deletes an ExternalName Service.
    ///
    /// # Errors
    /// What the API server says against it.
    pub fn delete_external_name(&self, key: &str) -> Result<()> {
        let (namespace, name) = key.split_once('/').context("a Service is called NAMESPACE/NAME")?;
        let alias = spec(namespace, name).name;
        self.edit_zone("cluster", |zone| zone.names.retain(|n| n.name != alias))?;
        self.request("DELETE", &format!("/api/v1/namespaces/{namespace}/services/{name}"), &Value::Null).map(drop)
    }
}

/// The name of a Service, without records.
fn spec(namespace: &str, service: &str) -> NameSpec {
    NameSpec { name: format!("{service}.{namespace}.svc.{CLUSTER_DOMAIN}"), ttl: 5, ..NameSpec::default() }
}
