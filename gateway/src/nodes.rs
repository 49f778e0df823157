//! The nodes that are in the cluster now, for those who ask whether one is: certificates outlive their nodes.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use tidegate_api::index::{Feed, Index};
use tokio::sync::watch;

/// The nodes of one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// By name, with the UID of each.
    uids: BTreeMap<String, String>,
    /// With the name of the node that each is.
    addresses: BTreeMap<IpAddr, String>,
}

impl Known {
    /// Those of an index. Of an address that several claim the one counts whose it is there.
    pub fn of(index: &Index) -> Self {
        let uids = index.records(Feed::Nodes).map(|((_, name), r)| (name.clone(), r.uid.clone())).collect();
        let nodes = index.objects().nodes.iter();
        let addresses =
            nodes.flat_map(|(name, n)| n.addresses.iter().map(|a| (a.to_canonical(), name.clone()))).collect();
        Self { uids, addresses }
    }
}

/// Says which nodes there are.
pub struct Teller(watch::Sender<Option<Arc<Known>>>);

impl Teller {
    /// These, from now on.
    pub fn tell(&self, known: Known) {
        self.0.send_if_modified(|old| {
            let new = old.as_deref() != Some(&known);
            if new {
                *old = Some(Arc::new(known));
            }
            new
        });
    }
}

/// Knows which nodes there are. Cheap to clone. As long as nobody has said, as with a folder of manifests, everyone is one.
#[derive(Clone)]
pub struct Nodes(watch::Receiver<Option<Arc<Known>>>);

/// Nodes, and who tells of them.
pub fn channel() -> (Teller, Nodes) {
    let (tx, rx) = watch::channel(None);
    (Teller(tx), Nodes(rx))
}

impl Nodes {
    /// Whether a certificate speaks for a node that is there: one of its name, and with its UID where it says one. Those
    /// that were given in files say none.
    pub fn admits(&self, name: &str, uid: Option<&str>) -> bool {
        let known = self.0.borrow();
        let Some(known) = &*known else { return true };
        known.uids.get(name).is_some_and(|is| uid.is_none_or(|u| u == is || is.is_empty()))
    }

    /// The node whose own address this is.
    pub fn at(&self, address: IpAddr) -> Option<String> {
        self.0.borrow().as_ref()?.addresses.get(&address.to_canonical()).cloned()
    }

    /// Waits until the node is not there any more.
    pub async fn gone(mut self, name: &str, uid: Option<&str>) {
        while self.admits(name, uid) {
            self.0.mark_unchanged();
            if !self.admits(name, uid) {
                return;
            }
            if self.0.changed().await.is_err() {
                // Nobody will say anything any more.
                std::future::pending().await
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;

    pub fn known(nodes: &[(&str, &str, &str)]) -> Known {
        Known {
            uids: nodes.iter().map(|(n, u, _)| ((*n).to_owned(), (*u).to_owned())).collect(),
            addresses: nodes.iter().map(|(n, _, a)| (a.parse().unwrap(), (*n).to_owned())).collect(),
        }
    }

    #[test]
    fn an_index_tells_them() {
        let mut index = Index::new(Default::default());
        let node = json!({"metadata": {"name": "a", "uid": "1"}, "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}});
        index.apply(Feed::Nodes, &node);
        // One that cannot be read is there all the same.
        index.apply(Feed::Nodes, &json!({"metadata": {"name": "b", "uid": "2"}, "spec": {"podCIDR": "x"}}));
        let mut expected = known(&[("a", "1", "192.0.2.1"), ("b", "2", "192.0.2.1")]);
        expected.addresses = [("192.0.2.1".parse().unwrap(), "a".to_owned())].into();
        assert_eq!(Known::of(&index), expected);
    }

    #[tokio::test]
    async fn a_node_is_its_name_and_its_uid() {
        let (teller, nodes) = channel();
        assert!(nodes.admits("x", Some("any")) && nodes.at("192.0.2.1".parse().unwrap()).is_none());
        teller.tell(known(&[("a", "1", "192.0.2.1")]));
        assert!(nodes.admits("a", Some("1")) && nodes.admits("a", None));
        assert!(!nodes.admits("a", Some("2")) && !nodes.admits("b", None));
        assert_eq!(nodes.at("::ffff:192.0.2.1".parse().unwrap()).as_deref(), Some("a"));
        let gone = tokio::spawn(nodes.clone().gone("a", Some("1")));
        tokio::task::yield_now().await;
        teller.tell(known(&[("a", "1", "192.0.2.2")]));
        tokio::task::yield_now().await;
        assert!(!gone.is_finished());
        teller.tell(known(&[("a", "2", "192.0.2.2")]));
        gone.await.unwrap();
    }
}
