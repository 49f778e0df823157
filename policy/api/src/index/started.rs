//! Addresses of pods whose network was made, before the API server knows them: their nodes' agents tell.
//!
//! They hold for a pod that the API server has on that node, with that UID and without an address of its own. What it says
//! itself goes first, and a pod that has ended has none. A node so says nothing that its kubelet could not write.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde_json::Value;
use tidegate_policy::model::Pod;

use super::{Feed, Index, Key};

/// A pod whose network was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Started {
    /// Its namespace and name.
    pub key: Key,
    /// Its UID.
    pub uid: String,
    /// Its addresses; the first of each family counts.
    pub addresses: Vec<IpAddr>,
}

/// What nodes told, and which pods wait for it.
#[derive(Debug, Default)]
pub(super) struct Starts {
    told: BTreeMap<String, BTreeMap<Key, Started>>,
    /// Pods that have no address by themselves, with their UIDs.
    waiting: BTreeMap<Key, String>,
}

impl Starts {
    /// The API server's pod: gives it the address that its node told, if it has none.
    pub fn seen(&mut self, key: &Key, uid: &str, object: &Value, pod: &mut Pod) {
        let ended = matches!(object["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
        if !pod.addresses.is_empty() || pod.host_network || ended || pod.node.is_empty() {
            self.waiting.remove(key);
            return;
        }
        self.waiting.insert(key.clone(), uid.to_owned());
        pod.addresses = self.addresses(&pod.node, key);
    }

    /// The pod is gone.
    pub fn gone(&mut self, key: &Key) {
        self.waiting.remove(key);
    }

    fn addresses(&self, node: &str, key: &Key) -> Vec<IpAddr> {
        let told = self.told.get(node).and_then(|pods| pods.get(key));
        let mut out: Vec<IpAddr> = Vec::new();
        for ip in told.filter(|t| self.waiting.get(key) == Some(&t.uid)).iter().flat_map(|t| &t.addresses) {
            if !out.iter().any(|o| o.is_ipv4() == ip.is_ipv4()) {
                out.push(*ip);
            }
        }
        out
    }
}

impl Index {
    /// A node told which of its pods have started, instead of all that it said before.
    pub fn started(&mut self, node: &str, pods: Vec<Started>) {
        let pods: BTreeMap<Key, Started> = pods.into_iter().map(|p| (p.key.clone(), p)).collect();
        let old = match pods.is_empty() {
            true => self.starts.told.remove(node),
            false => self.starts.told.insert(node.to_owned(), pods),
        };
        let now = self.starts.told.get(node);
        let both = old.iter().flat_map(BTreeMap::keys).chain(now.into_iter().flat_map(BTreeMap::keys));
        let keys: BTreeSet<Key> = both.filter(|key| self.starts.waiting.contains_key(*key)).cloned().collect();
        for key in keys {
            let Some(pod) = self.objects.pods.get_mut(&key).filter(|p| p.node == node) else { continue };
            let addresses = self.starts.addresses(node, &key);
            if pod.addresses != addresses {
                pod.addresses = addresses;
                self.touched.pods.insert(key);
            }
        }
    }

    /// Forgets what nodes told that are not there any more.
    pub fn forget_started(&mut self) {
        let nodes = self.records.get(&Feed::Nodes);
        let there = |name: &str| nodes.is_some_and(|n| n.contains_key(&(String::new(), name.to_owned())));
        let gone: Vec<String> = self.starts.told.keys().filter(|n| !there(n)).cloned().collect();
        gone.iter().for_each(|node| self.started(node, Vec::new()));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const IP: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 244, 1, 5));

    fn pod(uid: &str, node: &str, status: Value) -> Value {
        json!({"metadata": {"name": "web", "namespace": "shop", "uid": uid}, "spec": {"nodeName": node}, "status": status})
    }

    fn told(uid: &str) -> Vec<Started> {
        let key = ("shop".to_owned(), "web".to_owned());
        vec![Started {
            key,
            uid: uid.into(),
            addresses: vec![IP, [10, 244, 1, 6].into(), "fd00::5".parse().unwrap_or(IP)],
        }]
    }

    fn addresses(index: &Index) -> Vec<String> {
        index.objects().pods[&("shop".into(), "web".into())].addresses.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_pod_has_the_address_that_its_node_told_until_it_has_its_own() {
        for first in [true, false] {
            let mut index = Index::new(Default::default());
            if first {
                index.started("n1", told("1"));
            }
            index.apply(Feed::Pods, &pod("1", "n1", json!({"phase": "Pending"})));
            index.take_touched();
            if !first {
                index.started("n1", told("1"));
                assert!(index.is_touched());
            }
            assert_eq!(addresses(&index), ["10.244.1.5", "fd00::5"], "one of each family");
            index.apply(Feed::Pods, &pod("1", "n1", json!({"phase": "Running", "podIP": "10.244.1.9"})));
            assert_eq!(addresses(&index), ["10.244.1.9"]);
            index.started("n1", told("1"));
            assert_eq!(addresses(&index), ["10.244.1.9"]);
            index.apply(Feed::Pods, &pod("1", "n1", json!({"phase": "Succeeded"})));
            assert!(addresses(&index).is_empty(), "it has ended");
        }
    }

    #[test]
    fn another_pod_another_node_and_no_word_give_none() {
        let mut index = Index::new(Default::default());
        index.apply(Feed::Pods, &pod("1", "n1", json!({})));
        index.started("n1", told("2"));
        index.started("n2", told("1"));
        assert!(addresses(&index).is_empty());
        index.started("n1", told("1"));
        assert!(!addresses(&index).is_empty());
        index.started("n1", Vec::new());
        assert!(addresses(&index).is_empty(), "it is gone from the node");
        index.started("n1", told("1"));
        index.apply(Feed::Pods, &pod("3", "n1", json!({})));
        assert!(addresses(&index).is_empty(), "another pod of the name");
        index.apply(Feed::Pods, &pod("1", "n1", json!({})));
        assert!(!addresses(&index).is_empty());
        index.forget_started();
        assert!(addresses(&index).is_empty(), "there is no such node");
    }
}
