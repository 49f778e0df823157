//! Pods whose network was made, as their node's agent tells.

use std::net::IpAddr;

use super::{Problem, WireError, bounded, ip_from_wire, ip_to_wire, name_from_wire};
use crate::wire;

/// The most pods that one node tells of.
pub const MAX_STARTED: usize = 1024;
/// The most addresses of one.
const MAX_ADDRESSES: usize = 16;
/// The most octets of a UID.
const MAX_UID: usize = 64;

/// A pod whose network was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartedPod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub pod: String,
    /// Its UID.
    pub uid: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// The message that says these, instead of all before; the first [`MAX_STARTED`] count.
pub fn started(pods: &[StartedPod]) -> wire::FactsAck {
    let pod = |p: &StartedPod| wire::StartedPod {
        namespace: p.namespace.clone(),
        pod: p.pod.clone(),
        uid: p.uid.clone(),
        addresses: p.addresses.iter().copied().map(ip_to_wire).collect(),
    };
    let pods = pods.iter().take(MAX_STARTED).map(pod).collect();
    wire::FactsAck { kind: Some(wire::facts_ack::Kind::Started(wire::StartedPods { pods })) }
}

pub(super) fn started_from_wire(all: wire::StartedPods) -> Result<Vec<StartedPod>, WireError> {
    bounded(all.pods.len(), MAX_STARTED, "started.pods")?;
    let pod = |p: wire::StartedPod| {
        bounded(p.addresses.len(), MAX_ADDRESSES, "started.addresses")?;
        bounded(p.uid.len(), MAX_UID, "started.uid")?;
        if p.uid.is_empty() {
            return Err(Problem::Missing.of("started.uid"));
        }
        Ok(StartedPod {
            namespace: name_from_wire(p.namespace, "started.namespace")?,
            pod: name_from_wire(p.pod, "started.pod")?,
            uid: p.uid,
            addresses: p.addresses.iter().map(|a| ip_from_wire(a, "started.addresses")).collect::<Result<_, _>>()?,
        })
    };
    all.pods.into_iter().map(pod).collect()
}

#[cfg(test)]
mod tests {
    use super::super::FactsUp;
    use super::*;

    #[test]
    fn pods_survive_the_wire_and_others_are_refused() {
        let pod = |n: usize| StartedPod {
            namespace: "shop".into(),
            pod: format!("web-{n}"),
            uid: "u-1".into(),
            addresses: vec![[10, 0, 0, 1].into(), "fd00::1".parse().unwrap_or([0; 4].into())],
        };
        let all: Vec<StartedPod> = (0..MAX_STARTED + 1).map(pod).collect();
        assert_eq!(FactsUp::try_from(started(&all)).ok(), Some(FactsUp::Started(all[..MAX_STARTED].to_vec())));
        let refused = |p: StartedPod| FactsUp::try_from(started(&[p])).is_err();
        assert!(refused(StartedPod { uid: String::new(), ..pod(0) }));
        assert!(refused(StartedPod { uid: "u".repeat(65), ..pod(0) }));
        assert!(refused(StartedPod { addresses: vec![[10, 0, 0, 1].into(); 17], ..pod(0) }));
        assert!(refused(StartedPod { pod: String::new(), ..pod(0) }));
    }
}
