//! Conditions, and what they say to people.

use tidegate_api::Severity;
use tidegate_api::resource::{Condition, ConditionStatus, Refused};
use tidegate_policy::world::{Issue, IssueKind, IssueReason};

use super::survey::{Note, Record};

/// The most items of `refused`.
const MAX_REFUSED: usize = 32;
/// The longest path, message and text of a condition, in octets; the API takes some more.
const MAX_PATH: usize = 500;
const MAX_ITEM: usize = 1000;
const MAX_MESSAGE: usize = 2000;

/// A condition without a time: whoever writes it knows when it changed.
pub fn condition(kind: &str, holds: bool, generation: Option<i64>, reason: &str, message: String) -> Condition {
    Condition {
        kind: kind.to_owned(),
        status: if holds { ConditionStatus::True } else { ConditionStatus::False },
        observed_generation: generation,
        last_transition_time: String::new(),
        reason: reason.to_owned(),
        message: cut(message, MAX_MESSAGE),
    }
}

/// Cuts a text at a character's border.
pub fn cut(mut text: String, most: usize) -> String {
    if text.len() > most {
        let mut end = most;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push('…');
    }
    text
}

/// `spec.egress[0].toPorts: is required`.
pub fn said(note: &Note) -> String {
    if note.path.is_empty() { note.message.clone() } else { format!("{}: {}", note.path, note.message) }
}

/// Why an object is not taken, and what holds instead: `closed` where no good version is known.
pub fn not_taken(record: &Record, error: &Note, in_force: bool, closed: &str) -> Condition {
    let errors = record.notes.iter().filter(|n| n.severity == Severity::Error).count();
    let more = if errors > 1 { format!(" (and {} more)", errors - 1) } else { String::new() };
    let instead = match (in_force, record.closed) {
        (true, false) => "the last good version stays in force".to_owned(),
        (true, true) => format!("no good version is known: {closed}"),
        (false, _) => "nothing of it is in force".to_owned(),
    };
    let message = format!("{}{more}; {instead}", said(error));
    condition("Accepted", false, record.generation, error.code.as_str(), message)
}

/// That an object is taken, with what is noteworthy about it. `state` is what is said first, and the reason where
/// there is nothing else.
pub fn taken(record: &Record, (reason, state): (&str, &str), refused: &[Refused]) -> Condition {
    let mut message = state.to_owned();
    let mut reason = reason;
    let warnings: Vec<&Note> = record.notes.iter().filter(|n| n.severity == Severity::Warning).collect();
    if let Some(first) = warnings.first() {
        reason = "Warning";
        let more = if warnings.len() > 1 { format!(" (and {} more)", warnings.len() - 1) } else { String::new() };
        message += &format!("; warning: {}{more}", said(first));
    }
    if let Some(first) = refused.first() {
        reason = "PartlyRefused";
        let more =
            if refused.len() > 1 { format!(" (and {} more, see refused)", refused.len() - 1) } else { String::new() };
        message += &format!("; {}: {}{more}", first.path, first.message.as_deref().unwrap_or(&first.reason));
    }
    condition("Accepted", true, record.generation, reason, message)
}

/// Whether a policy contradicts others.
pub fn conflicted(generation: Option<i64>, issues: &[Issue]) -> Condition {
    let mut reason = "NoConflict";
    let mut texts = Vec::new();
    for i in issues.iter().filter(|i| i.kind == IssueKind::Conflicted) {
        reason = i.reason.as_str();
        texts.push(explained(i));
    }
    texts.dedup();
    let holds = !texts.is_empty();
    let message = if holds { texts.join("; ") } else { "contradicts no other policy".to_owned() };
    condition("Conflicted", holds, generation, reason, message)
}

/// What of a policy has no effect, or not all of it.
pub fn refused(issues: &[Issue]) -> Vec<Refused> {
    let items = issues.iter().filter(|i| i.kind != IssueKind::Conflicted).map(|i| Refused {
        path: cut(if i.path.is_empty() { "spec".to_owned() } else { i.path.clone() }, MAX_PATH),
        reason: match (i.reason, i.kind) {
            (IssueReason::AboveCeiling, IssueKind::Clipped) => "Clipped",
            (IssueReason::PoolNotAllowed, _) => "NotAdmitted",
            (reason, _) => reason.as_str(),
        }
        .to_owned(),
        by: by(i).filter(|b| b.len() <= 253).map(str::to_owned),
        message: Some(cut(explained(i), MAX_ITEM)),
    });
    items.take(MAX_REFUSED).collect()
}

/// Items of annotations that cannot be read.
pub fn refused_items(notes: &[Note]) -> Vec<Refused> {
    let items = notes.iter().filter(|n| n.severity <= Severity::Refused).map(|n| Refused {
        path: cut(annotation_path(&n.path), MAX_PATH),
        reason: n.code.as_str().to_owned(),
        by: None,
        message: Some(cut(n.message.clone(), MAX_ITEM)),
    });
    items.take(MAX_REFUSED).collect()
}

/// `tidegate.dev/allow[3]` out of `metadata.annotations[tidegate.dev/allow][3]`.
fn annotation_path(path: &str) -> String {
    let Some(rest) = path.strip_prefix("metadata.annotations[") else { return path.to_owned() };
    rest.replacen(']', "", 1)
}

/// What stands against it, as its namespace may know it: the pods of others are not its business.
fn by(i: &Issue) -> Option<&str> {
    let by = i.by.as_deref()?;
    let foreign = i.reason == IssueReason::DuplicateAddress
        && by.split_once('/').is_none_or(|(namespace, _)| namespace != &*i.policy.namespace);
    (!foreign).then_some(by)
}

/// An issue in a sentence.
fn explained(i: &Issue) -> String {
    let by = by(i).unwrap_or("another one");
    match (i.reason, i.kind) {
        (IssueReason::AboveCeiling, IssueKind::Clipped) => {
            format!("only a part of it is below the ceiling of ClusterEgressPolicy {by}; the rest is denied")
        }
        (IssueReason::AboveCeiling, _) => format!("it is above the ceiling of ClusterEgressPolicy {by}"),
        (IssueReason::NotPermitted, _) => format!("the ceiling of ClusterEgressPolicy {by} does not permit it"),
        (IssueReason::PoolUnknown, _) => format!("there is no EgressPool {by}"),
        (IssueReason::PoolNotAllowed, _) => {
            format!("`allowedNamespaces` of the EgressPool {by} does not admit this namespace")
        }
        (IssueReason::PoolConflict, _) => {
            format!(
                "another policy that selects the same pods is older, or first by name, and asks for the EgressPool {by}, which holds"
            )
        }
        (IssueReason::EqualPriority, _) => {
            format!(
                "ClusterEgressPolicy {by} has the same tier and priority, selects the same pods and acts differently: Deny comes first; give them different priorities"
            )
        }
        (IssueReason::TooManyPatterns, IssueKind::Clipped) => {
            format!("too many wildcards hang off one suffix; `{by}` denies every name below it")
        }
        (IssueReason::TooManyPatterns, _) => format!("too many wildcards hang off one suffix; `{by}` has no effect"),
        (IssueReason::TooManyPortRanges, _) => {
            "the rules of its pods have more port ranges than a node can hold; the rest is denied".to_owned()
        }
        (IssueReason::DuplicateAddress, _) => {
            let other =
                self::by(i).map_or_else(|| "a pod of another namespace".to_owned(), |by| format!("the pod {by}"));
            format!("{other} has the same address: until one of them is gone, nothing is allowed to it")
        }
    }
}
