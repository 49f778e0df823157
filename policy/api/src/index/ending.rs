//! Namespaces that end, and policies that go.
//!
//! A namespace that is deleted loses its policies before its pods have ended, and nothing says in which order the feeds tell
//! of all that. As long as a pod of it is known, what held for it before must hold, or something stricter:
//!
//! - Policies that go with their namespace stay until it and its pods are gone.
//! - A policy that goes while its namespace seems to stay allows nothing any more, but isolates and denies for two more
//!   calls of [`Index::age`] that mean it: its namespace's end may be heard a moment later. If it is, the policy is back.
//! - Of a namespace that was ending when it was first seen nobody knows what held: nothing is allowed to its pods.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use tidegate_policy::model::{Namespace, Policy, PolicyMode};

use super::{Feed, Index, Key, Read};
use crate::manifest::Object;
use crate::problem::{Code, FieldPath, FieldProblem, Severity};

/// So many calls of [`Index::age`] a policy that went is still strict.
const STRICT: u8 = 2;
/// So many calls it is remembered.
const REMEMBERED: u8 = 120;
/// So many of them are remembered.
const MAX_LEFT: usize = 4096;

/// What is known of namespaces and policies that go.
#[derive(Debug, Default)]
pub(super) struct Endings {
    /// Namespaces that are being deleted.
    ending: BTreeSet<String>,
    /// Those that were when they were first seen.
    blind: BTreeSet<String>,
    /// Namespaces that are gone, while pods of them are known.
    gone: BTreeSet<String>,
    /// Policies that went with their namespaces.
    orphans: BTreeSet<Key>,
    /// Policies that went while their namespaces seemed to stay.
    left: BTreeMap<Key, Left>,
    /// How many ever were.
    went: u64,
    /// What policies of blind namespaces say.
    withheld: BTreeMap<Key, Policy>,
}

#[derive(Debug)]
struct Left {
    policy: Policy,
    /// The resourceVersion of its end.
    version: Option<u64>,
    /// How many went before it.
    number: u64,
    age: u8,
}

/// An object's resourceVersion as a number: the revision of the etcd that keeps namespaces and policies alike.
pub(super) fn version(object: &Value) -> Option<u64> {
    object["metadata"]["resourceVersion"].as_str()?.parse().ok()
}

/// It isolates and denies, and allows nothing.
fn strict(policy: &Policy) -> Policy {
    Policy { egress: Vec::new(), ..policy.clone() }
}

fn of<V: Clone>(map: &BTreeMap<Key, V>, namespace: &str) -> Vec<(Key, V)> {
    let all = map.range((namespace.to_owned(), String::new())..);
    all.take_while(|((ns, _), _)| ns == namespace).map(|(k, v)| (k.clone(), v.clone())).collect()
}

impl Index {
    /// How many policies have gone so far while their namespaces seemed to stay.
    pub fn went(&self) -> u64 {
        self.endings.went
    }

    /// Time passes, about a second, for the first `known` policies that went: how namespaces fared since is known of those.
    /// What only waited for that takes effect.
    pub fn age(&mut self, known: u64) {
        let mut open = Vec::new();
        self.endings.left.retain(|key, left| {
            if left.number >= known {
                return true;
            }
            left.age += 1;
            if left.age == STRICT {
                open.push(key.clone());
            }
            left.age < REMEMBERED
        });
        for key in open {
            self.hold(Feed::EgressPolicies, &key, None);
        }
    }

    /// A namespace is there. Gives what holds of it, and what is noteworthy.
    pub(super) fn namespace_seen(
        &mut self,
        name: &str,
        object: &Value,
        first: bool,
        read: Option<Namespace>,
    ) -> (Option<Namespace>, Option<FieldProblem>) {
        if first {
            // Its predecessor's pods are not its own.
            self.forget(name);
        }
        let meta = &object["metadata"];
        if meta["deletionTimestamp"].is_string() && self.endings.ending.insert(name.to_owned()) {
            self.changes += 1;
            if first {
                self.blind(name);
            } else {
                // Later versions than that of its end have conditions: then it is not certain what came before.
                let exact = object["status"]["conditions"].as_array().is_none_or(Vec::is_empty);
                self.reinstate(name, version(object).filter(|_| exact));
            }
        }
        if !self.endings.blind.contains(name) {
            return (read, None);
        }
        let known = read.unwrap_or_else(|| Namespace {
            uid: meta["uid"].as_str().unwrap_or_default().to_owned(),
            ..Namespace::default()
        });
        let problem = FieldProblem {
            severity: Severity::Warning,
            code: Code::NoEffect,
            path: FieldPath::fields(&["metadata", "deletionTimestamp"]),
            message: "it was being deleted when it was first seen, and its policies may be gone already: \
                      nothing is allowed to its pods until they have ended"
                .to_owned(),
        };
        (Some(Namespace { managed: true, has_allow: true, allow: Vec::new(), ..known }), Some(problem))
    }

    fn blind(&mut self, name: &str) {
        self.endings.blind.insert(name.to_owned());
        for (key, policy) in of(&self.objects.policies, name) {
            self.hold(Feed::EgressPolicies, &key, None);
            self.endings.withheld.insert(key, policy);
        }
    }

    /// A namespace is gone.
    pub(super) fn namespace_gone(&mut self, name: &str) {
        self.endings.ending.remove(name);
        if self.has_pods(name) {
            self.endings.gone.insert(name.to_owned());
            self.reinstate(name, None);
        } else {
            self.forget(name);
        }
    }

    /// A pod is gone.
    pub(super) fn pod_gone(&mut self, namespace: &str) {
        if self.endings.gone.contains(namespace) && !self.has_pods(namespace) {
            self.forget(namespace);
        }
    }

    /// Says whether what holds of a policy is set: in a blind namespace none is.
    pub(super) fn policy_seen(&mut self, key: &Key, policy: Option<&Policy>) -> bool {
        self.endings.orphans.remove(key);
        self.endings.left.remove(key);
        if !self.endings.blind.contains(&key.0) {
            return true;
        }
        match policy {
            Some(p) => drop(self.endings.withheld.insert(key.clone(), p.clone())),
            None => drop(self.endings.withheld.remove(key)),
        }
        false
    }

    /// A policy is gone, at a version if that is known.
    pub(super) fn policy_gone(&mut self, key: &Key, version: Option<u64>) {
        let e = &mut self.endings;
        e.withheld.remove(key);
        if e.ending.contains(&key.0) || e.gone.contains(&key.0) {
            // Not somebody's wish, and pods take their time to end: without it they would be open until then.
            if self.objects.policies.contains_key(key) {
                e.orphans.insert(key.clone());
            }
            return;
        }
        let policy = self.objects.policies.get(key).filter(|p| p.mode == PolicyMode::Enforce).cloned();
        self.hold(Feed::EgressPolicies, key, policy.as_ref().map(|p| Read::Object(Object::Policy(strict(p)))));
        let Some(policy) = policy else { return };
        let Endings { left, went: number, .. } = &mut self.endings;
        if left.len() >= MAX_LEFT
            && let Some(old) = left.iter().find(|(_, l)| l.age >= STRICT).map(|(k, _)| k.clone())
        {
            left.remove(&old);
        }
        left.insert(key.clone(), Left { policy, version, number: *number, age: 0 });
        *number += 1;
    }

    /// A namespace ends: policies that went after `since` went with it. Of those of which that is not known what is strict
    /// comes back.
    fn reinstate(&mut self, name: &str, since: Option<u64>) {
        let all: Vec<Key> = self.endings.left.keys().filter(|(ns, _)| ns == name).cloned().collect();
        for key in all {
            let Some(left) = self.endings.left.get(&key) else { continue };
            let holds = match left.version.zip(since) {
                Some((end, since)) if end < since => continue,
                Some(_) => left.policy.clone(),
                None => strict(&left.policy),
            };
            self.endings.left.remove(&key);
            self.endings.orphans.insert(key.clone());
            self.hold(Feed::EgressPolicies, &key, Some(Read::Object(Object::Policy(holds))));
        }
    }

    /// Nothing of a namespace's end matters any more.
    fn forget(&mut self, name: &str) {
        let e = &mut self.endings;
        e.ending.remove(name);
        e.gone.remove(name);
        let mut gone: Vec<Key> = e.orphans.extract_if(.., |o| o.0 == name).collect();
        gone.extend(e.left.extract_if(.., |key, _| key.0 == name).filter(|(_, l)| l.age < STRICT).map(|(key, _)| key));
        let kept = if e.blind.remove(name) { of(&e.withheld, name) } else { Vec::new() };
        e.withheld.retain(|key, _| key.0 != name);
        for key in gone {
            self.hold(Feed::EgressPolicies, &key, None);
        }
        for (key, policy) in kept {
            self.hold(Feed::EgressPolicies, &key, Some(Read::Object(Object::Policy(policy))));
        }
        self.hold(Feed::Namespaces, &(String::new(), name.to_owned()), None);
    }

    fn has_pods(&self, namespace: &str) -> bool {
        let first = (namespace.to_owned(), String::new());
        self.objects.pods.range(first..).next().is_some_and(|((ns, _), _)| ns == namespace)
    }
}
