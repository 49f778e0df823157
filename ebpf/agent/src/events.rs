//! From kernel records to events: who sent the packet, and what is published of it.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use tidegate_ebpf::{Counter, Outcome};
use tidegate_policy::event::Who;
use tidegate_policy::state::NodeState;

/// Packets that a program decided about, by `hook`, `reason` and `outcome`. Exact.
pub const PACKETS: &str = "tidegate_packets_total";
/// Whether the nftables table is as it should be.
pub const GUARD_OK: &str = "tidegate_guard_ok";
/// Packets that the nftables table dropped, by `rule`.
pub const GUARD_PACKETS: &str = "tidegate_guard_packets_total";
/// Endpoints of this node, by `attached`.
pub const ENDPOINTS: &str = "tidegate_endpoints";
/// Whether a gateway's `State` stream is in sync, by `gateway`.
pub const GATEWAY_UP: &str = "tidegate_gateway_up";
/// What other programs had changed or taken away and was put right, by `kind`, one of [`KINDS`].
pub const REPAIRS: &str = "tidegate_repairs_total";
/// What can be put right: programs on hooks and their place there, entries of kernel maps, pins of maps, nftables
/// tables, devices, addresses, policy rules, routes, sysctls.
pub const KINDS: [&str; 9] = ["program", "map", "pin", "table", "device", "address", "rule", "route", "sysctl"];
/// Egress addresses that this node holds.
pub const HELD: &str = "tidegate_held_addresses";
/// Seconds that new pods waited for their programs and their policy.
pub const POD_STARTS: &str = "tidegate_pod_start_seconds";
/// Passes of the reconciler, by `result`.
pub const PASSES: &str = "tidegate_passes_total";
/// Kernel events that were not reported one by one because there were too many; they are counted in [`PACKETS`].
pub const SUPPRESSED: &str = "tidegate_events_suppressed_total";

/// Says what the metrics of this crate mean; once at start.
pub fn describe() {
    metrics::describe_counter!(PACKETS, "Packets that a kernel program decided about");
    metrics::describe_gauge!(GUARD_OK, "1 if the nftables table is as it should be");
    metrics::describe_counter!(GUARD_PACKETS, "Packets that the nftables table dropped");
    metrics::describe_gauge!(ENDPOINTS, "Endpoints of this node");
    metrics::describe_gauge!(GATEWAY_UP, "1 if the gateway's State stream is in sync");
    describe_repairs();
    metrics::describe_gauge!(HELD, "Egress addresses that this node holds");
    metrics::describe_histogram!(POD_STARTS, "Seconds that new pods waited for their programs and their policy");
    metrics::describe_counter!(PASSES, "Passes of the reconciler");
    metrics::describe_counter!(SUPPRESSED, "Kernel events that were counted but not reported one by one");
}

/// Says what [`REPAIRS`] means, and publishes it from the start.
pub fn describe_repairs() {
    metrics::describe_counter!(REPAIRS, "What other programs had changed or taken away and was put right");
    for kind in KINDS {
        repaired(kind, 0);
    }
}

/// Counts what was put right; `kind` is one of [`KINDS`].
pub fn repaired(kind: &'static str, n: usize) {
    metrics::counter!(REPAIRS, "kind" => kind).increment(n as u64);
}

/// The published text of an outcome.
pub const fn outcome(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Pass => "pass",
        Outcome::Steer => "steer",
        Outcome::Drop => "drop",
        Outcome::Audit => "audit",
    }
}

/// Publishes counters of kernel programs, of a node or of a gateway.
pub fn publish(counters: &[Counter]) {
    for c in counters {
        metrics::counter!(
            PACKETS,
            "hook" => tidegate_ebpf::hook_name(c.hook),
            "reason" => c.reason.as_str(),
            "outcome" => outcome(c.outcome),
        )
        .absolute(c.packets);
    }
}

/// Who has which address; read for every event, replaced at every change.
#[derive(Debug, Default)]
pub struct People(ArcSwap<HashMap<IpAddr, Arc<Who>, ahash::RandomState>>);

impl People {
    /// Takes the endpoints of a state. Who did not change stays the same value.
    pub fn update(&self, state: &NodeState) {
        let old = self.0.load();
        let mut new = HashMap::with_capacity_and_hasher(state.endpoints.len(), ahash::RandomState::new());
        for (ip, e) in &state.endpoints {
            let same = |w: &&Arc<Who>| *w.namespace == *e.namespace && *w.pod == *e.pod && *w.node == *e.node;
            let who = old.get(ip).filter(same).map(Arc::clone).unwrap_or_else(|| {
                let (namespace, pod, node) =
                    (e.namespace.as_str().into(), e.pod.as_str().into(), e.node.as_str().into());
                Arc::new(Who { namespace, pod, node })
            });
            new.insert(*ip, who);
        }
        self.0.store(Arc::new(new));
    }

    /// Who has this address.
    pub fn get(&self, ip: IpAddr) -> Option<Arc<Who>> {
        self.0.load().get(&ip).map(Arc::clone)
    }
}

#[cfg(test)]
mod tests {
    use tidegate_policy::state::{Endpoint, Touch};

    use super::*;

    #[test]
    fn who_follows_the_state_and_keeps_its_value() {
        let ip: IpAddr = "10.0.0.1".parse().unwrap();
        let endpoint = |pod: &str| Endpoint {
            node: "n1".into(),
            namespace: "ns".into(),
            pod: pod.into(),
            touch: Touch::Isolated,
            member: None,
        };
        let mut state = NodeState::default();
        state.endpoints.insert(ip, endpoint("a"));
        let people = People::default();
        assert!(people.get(ip).is_none());
        people.update(&state);
        let first = people.get(ip).unwrap();
        assert_eq!((&*first.namespace, &*first.pod, &*first.node), ("ns", "a", "n1"));
        people.update(&state);
        assert!(Arc::ptr_eq(&first, &people.get(ip).unwrap()));
        state.endpoints.insert(ip, endpoint("b"));
        people.update(&state);
        assert_eq!(&*people.get(ip).unwrap().pod, "b");
        state.endpoints.clear();
        people.update(&state);
        assert!(people.get(ip).is_none());
    }
}
