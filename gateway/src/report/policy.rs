//! The status of policies and pools.

use std::collections::BTreeMap;

use tidegate_api::resource::{Condition, EgressPoolStatus, NodeCount, PolicyStatus};
use tidegate_policy::world::Issue;

use super::condition::{condition, conflicted, not_taken, refused, taken};
use super::rollout::Count;
use super::survey::{Basin, Written};

/// What a policy's status should say. `issues` are its own, `exempt` that its namespace is.
pub fn status(written: &Written, exempt: bool, issues: &[Issue], count: &Count) -> PolicyStatus {
    let record = &written.record;
    let generation = record.generation;
    let refused = refused(issues);
    let accepted = if let Some(error) = record.error() {
        let closed = match (written.cluster, written.subject_lost) {
            (false, _) => "the pods that it selects are isolated, and it allows nothing",
            (true, false) => "what it denies is denied as far as it can be read, and its ceiling permits nothing",
            (true, true) => {
                "whom it is for cannot be read: for every pod that policy concerns, what it denies is denied as far as it can \
                 be read, and its ceiling permits nothing"
            }
        };
        not_taken(record, error, written.in_force, closed)
    } else if exempt {
        let message = "the installation exempts this namespace: no policy touches it";
        condition("Accepted", false, generation, "NamespaceExempt", message.to_owned())
    } else if written.staged {
        taken(record, ("Staged", "valid; mode Staged: it has no effect"), &refused)
    } else {
        taken(record, ("Accepted", "valid and in force"), &refused)
    };
    let (programmed, count) = programmed(written, exempt, count);
    PolicyStatus {
        conditions: vec![accepted, conflicted(generation, issues), programmed],
        nodes: Some(NodeCount { desired: count.desired, programmed: count.programmed }),
        refused,
    }
}

fn programmed(written: &Written, exempt: bool, count: &Count) -> (Condition, Count) {
    let generation = written.record.generation;
    let no = |reason: &str, message: String| condition("Programmed", false, generation, reason, message);
    let nothing = Count::default();
    if written.record.error().is_some() {
        let last = match (written.in_force, written.record.closed) {
            (true, false) => format!("; the last good version is held by {count}"),
            (true, true) => format!("; what holds instead is held by {count}"),
            (false, _) => String::new(),
        };
        let mut count = count.clone();
        count.programmed = 0;
        return (no("NotAccepted", format!("no node holds what is written now{last}")), count);
    }
    if exempt {
        return (no("NamespaceExempt", "no node is told of it".to_owned()), nothing);
    }
    if written.staged {
        return (no("Staged", "no node is told of it".to_owned()), nothing);
    }
    if count.desired == 0 {
        let message = "it selects no pod now: no node needs it".to_owned();
        return (condition("Programmed", true, generation, "NoPods", message), nothing);
    }
    let reason = if count.complete() { "Programmed" } else { "NodesMissing" };
    (condition("Programmed", count.complete(), generation, reason, count.to_string()), count.clone())
}

/// The pairs of a pool that are in use, by their addresses, each with the gateway that holds it, if one does; and whether
/// namespaces use it that have no pair, since all drain.
#[derive(Clone, Debug, Default)]
pub struct Used<'a> {
    /// By what people read of a pair.
    pub pairs: BTreeMap<String, Option<&'a str>>,
    /// Pairs that drain, with the number of namespaces that can go to no other one.
    pub stay: BTreeMap<String, u32>,
    /// Namespaces without a pair.
    pub without: u32,
}

/// What a pool's status should say, but for who holds its pairs.
pub fn pool(basin: &Basin, used: Option<&Used<'_>>) -> EgressPoolStatus {
    let record = &basin.record;
    let accepted = match record.error() {
        Some(error) => not_taken(record, error, basin.in_force, ""),
        None => taken(record, ("Accepted", "valid"), &[]),
    };
    let none = Used::default();
    let used = used.unwrap_or(&none);
    let held: Vec<String> = used.pairs.iter().filter_map(|(p, o)| Some(format!("{p} by {}", (*o)?))).collect();
    let missing: Vec<&str> = used.pairs.iter().filter(|(_, o)| o.is_none()).map(|(p, _)| p.as_str()).collect();
    let (holds, reason, message) = if used.without > 0 {
        let n = used.without;
        let namespaces = if n == 1 { "namespace has" } else { "namespaces have" };
        (false, "Draining", format!("every pair drains, so {n} {namespaces} no way out: add a pair"))
    } else if !missing.is_empty() {
        (false, "NoGateway", format!("no gateway holds {}", missing.join(", ")))
    } else if held.is_empty() {
        (true, "Unused", "no namespace uses it now".to_owned())
    } else if !used.stay.is_empty() {
        let stay = used.stay.iter().map(|(p, n)| {
            let namespaces = if *n == 1 { "namespace goes" } else { "namespaces go" };
            format!("{n} {namespaces} on leaving with {p}, which drains: its gateway has no other pair of the pool for new connections")
        });
        (true, "Draining", format!("{}; held: {}", stay.collect::<Vec<_>>().join("; "), held.join(", ")))
    } else {
        (true, "Programmed", format!("held: {}", held.join(", ")))
    };
    let programmed = condition("Programmed", holds, record.generation, reason, message);
    EgressPoolStatus { conditions: vec![accepted, programmed], addresses: Vec::new() }
}
