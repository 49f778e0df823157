//! Which pods start at once, before the node has looked at them. Pure.
//!
//! To a pod of a namespace that nothing selects nothing is denied. Its device has the program that judges what it sends, by maps
//! that know of neither: it lets pass all but packets for other nodes' tunnels, and what has another pod's address. Who has to
//! wait is told here, from what the kernel holds.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use tidegate_cni::wire::Attached;
use tidegate_policy::shards::Shards;
use tidegate_policy::state::Touch;

/// What the kernel judges as a pod's that policy selects: as it is, and as it will be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Closed {
    pub addresses: BTreeSet<IpAddr>,
    /// Devices, by index.
    pub devices: BTreeSet<u32>,
}

impl Closed {
    /// With more.
    pub fn extend(&mut self, more: Self) {
        self.addresses.extend(more.addresses);
        self.devices.extend(more.devices);
    }
}

/// What decides. Of nothing nobody starts.
#[derive(Clone, Debug, Default)]
pub struct Open {
    /// What a namespace's new pods may be at the strictest.
    pub namespaces: Shards<Arc<str>, Touch>,
    /// The cluster's prefixes.
    pub cluster: Vec<IpNet>,
    pub closed: Closed,
}

impl Open {
    /// Whether the pod starts at once. Not if its address or its device was just another pod's, whose packets its own would
    /// be taken for. Not outside the cluster's prefixes either: there isolated pods answer only flows that came from where the
    /// kernel knows a pod.
    pub fn starts(&self, a: &Attached) -> bool {
        let free =
            |ip: IpAddr| !self.closed.addresses.contains(&ip) && self.cluster.iter().any(|prefix| prefix.contains(&ip));
        self.namespaces.get(a.pod.namespace.as_str()) == Some(&Touch::Untouched)
            && !self.closed.devices.contains(&a.ifindex)
            && a.addresses.iter().all(|ip| free(ip.to_canonical()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use tidegate_cni::spec::{Attachment, Pod};

    use super::*;

    fn pod(namespace: &str, addresses: &[&str], ifindex: u32) -> Attached {
        let attachment = Attachment { container: "c".into(), ifname: "eth0".into() };
        let pod = Pod { namespace: namespace.into(), name: "p".into(), uid: "u".into() };
        Attached { attachment, pod, addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(), ifindex }
    }

    fn open() -> Open {
        let mut namespaces = Shards::default();
        for (name, touch) in [("free", Touch::Untouched), ("guarded", Touch::Guarded), ("shop", Touch::Isolated)] {
            namespaces.insert(Arc::from(name), touch);
        }
        let cluster = ["10.0.0.0/24", "fd00::/64"].map(|p| p.parse().unwrap()).to_vec();
        let closed = Closed { addresses: [[10, 0, 0, 9].into()].into(), devices: [9].into() };
        Open { namespaces, cluster, closed }
    }

    #[test]
    fn only_a_pod_to_which_nothing_is_denied_starts_at_once() {
        let starts = |namespace| open().starts(&pod(namespace, &["10.0.0.5", "fd00::5"], 5));
        assert!(starts("free"));
        assert!(!starts("guarded") && !starts("shop") && !starts("nobody told of it"));
        assert!(!Open::default().starts(&pod("free", &["10.0.0.5"], 5)));
    }

    #[test]
    fn one_that_would_be_taken_for_another_waits() {
        let starts = |addresses: &[&str], ifindex| open().starts(&pod("free", addresses, ifindex));
        assert!(starts(&["10.0.0.8"], 8) && starts(&["::ffff:10.0.0.8"], 8));
        assert!(!starts(&["10.0.0.9"], 8) && !starts(&["fd00::8", "10.0.0.9"], 8) && !starts(&["::ffff:10.0.0.9"], 8));
        assert!(!starts(&["10.0.0.8"], 9));
        assert!(!starts(&["10.0.1.8"], 8) && !starts(&["10.0.0.8", "fd01::8"], 8));
        let mut open = open();
        open.closed.extend(Closed { addresses: [[10, 0, 0, 8].into()].into(), devices: [7].into() });
        assert!(!open.starts(&pod("free", &["10.0.0.8"], 8)) && !open.starts(&pod("free", &["10.0.0.9"], 8)));
        assert!(!open.starts(&pod("free", &["10.0.0.7"], 7)) && open.starts(&pod("free", &["10.0.0.7"], 8)));
    }
}
