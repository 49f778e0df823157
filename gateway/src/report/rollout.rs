//! How far policies have come: which nodes must hold which compile, and which do.
//!
//! A node needs the compile at which a policy was edited last, and those at which the pods that it selects there
//! came to the group in which they are. It holds a compile when it has acked the state that was sent for it. A node that is
//! away and has missed nothing that a policy says still holds that policy.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use tidegate_policy::GroupKey;
use tidegate_policy::state::Touch;
use tidegate_policy::world::{PolicyRef, World};

use super::survey::{CLUSTER_POLICY, NAMESPACE, POLICY, Survey};
use crate::core::NodeStatus;

/// The number of a compile, rising from 1.
pub type CompileNumber = u64;

/// The most nodes that are named.
const MAX_NAMED: usize = 3;

/// Nodes, each with the compile that it needs.
pub type Needs = BTreeMap<Arc<str>, CompileNumber>;

/// What pods of a namespace are.
#[derive(Clone, Debug, Default)]
pub struct Population {
    /// The nodes of its pods that are not untouched.
    pub nodes: Needs,
    /// How many addresses are untouched, guarded, isolated.
    pub touches: [u32; 3],
    /// The groups of its pods.
    pub groups: BTreeSet<GroupKey>,
    /// The group of each pod.
    pub pods: HashMap<Arc<str>, GroupKey>,
}

/// Where policies are needed.
#[derive(Clone, Debug, Default)]
pub struct Spread {
    policies: HashMap<PolicyRef, Needs>,
    namespaces: HashMap<Arc<str>, Population>,
}

/// Remembers since which compile things are as they are.
#[derive(Debug, Default)]
pub struct Rollout {
    endpoints: HashMap<IpAddr, (GroupKey, Arc<str>, CompileNumber)>,
    editions: HashMap<PolicyRef, (u64, CompileNumber)>,
}

impl Rollout {
    /// Takes a compile with its number, and the survey of the same objects.
    pub fn compiled(&mut self, world: &World, survey: &Survey, number: CompileNumber) -> Spread {
        self.edited(survey, number);
        let mut endpoints = HashMap::with_capacity(self.endpoints.len());
        let mut of_group: HashMap<GroupKey, Needs> = HashMap::new();
        let mut out = Spread::default();
        for (ip, e) in world.endpoints() {
            let place = out.namespaces.entry(e.who.namespace.clone()).or_default();
            place.touches[match e.touch {
                Touch::Untouched => 0,
                Touch::Guarded => 1,
                Touch::Isolated => 2,
            }] += 1;
            let Some(m) = e.member else { continue };
            let node = &e.who.node;
            let same = |(group, at, _): &&(GroupKey, Arc<str>, _)| *group == m.group && at == node;
            let since = self.endpoints.get(&ip).filter(same).map_or(number, |(.., since)| *since);
            endpoints.insert(ip, (m.group, node.clone(), since));
            need(&mut place.nodes, node, since);
            place.groups.insert(m.group);
            place.pods.insert(e.who.pod.clone(), m.group);
            need(of_group.entry(m.group).or_default(), node, since);
        }
        self.endpoints = endpoints;
        for (key, nodes) in &of_group {
            let Some(group) = world.group_by_key(*key) else { continue };
            for policy in group.policies() {
                let needs = out.policies.entry(policy.clone()).or_default();
                nodes.iter().for_each(|(node, since)| need(needs, node, *since));
            }
        }
        for (policy, needs) in &mut out.policies {
            let since = self.editions.get(policy).map_or(number, |(_, since)| *since);
            needs.values_mut().for_each(|n| *n = since.max(*n));
        }
        for (name, place) in &mut out.namespaces {
            let since = self.editions.get(&reference(NAMESPACE, name, name)).map_or(number, |(_, since)| *since);
            place.nodes.values_mut().for_each(|n| *n = since.max(*n));
        }
        out
    }

    fn edited(&mut self, survey: &Survey, number: CompileNumber) {
        let mut editions = HashMap::with_capacity(self.editions.len());
        let mut note = |policy: PolicyRef, edition: u64| {
            let same = self.editions.get(&policy).filter(|(old, _)| *old == edition);
            let since = same.map_or(number, |(_, since)| *since);
            editions.insert(policy, (edition, since));
        };
        for (name, w) in &survey.cluster {
            note(reference(CLUSTER_POLICY, "", name), w.edition);
        }
        for (ns, place) in &survey.namespaces {
            note(reference(NAMESPACE, ns, ns), place.edition);
            for (name, w) in &place.policies {
                note(reference(POLICY, ns, name), w.edition);
            }
        }
        self.editions = editions;
    }
}

fn need(needs: &mut Needs, node: &Arc<str>, since: CompileNumber) {
    match needs.get_mut(node) {
        Some(n) => *n = since.max(*n),
        None => drop(needs.insert(node.clone(), since)),
    }
}

/// A policy by what it is called.
pub fn reference(kind: &'static str, namespace: &str, name: &str) -> PolicyRef {
    PolicyRef { kind, namespace: namespace.into(), name: name.into() }
}

impl Spread {
    /// The nodes that a policy concerns.
    pub fn of(&self, policy: &PolicyRef) -> Option<&Needs> {
        self.policies.get(policy)
    }

    /// What pods of a namespace are; nothing if it has none.
    pub fn namespace(&self, name: &str) -> Option<&Population> {
        self.namespaces.get(name)
    }
}

/// How many nodes there are of those that are needed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Nodes that should hold it.
    pub desired: u32,
    /// Those that do.
    pub programmed: u32,
    /// What the first of the others lack.
    waiting: Vec<String>,
}

impl Count {
    /// Counts the nodes that hold what they need.
    pub fn of(needs: Option<&Needs>, nodes: &BTreeMap<String, NodeStatus>) -> Self {
        let mut out = Self::default();
        for (node, needed) in needs.into_iter().flatten() {
            out.desired += 1;
            let status = nodes.get(&**node);
            let why = match status {
                Some(s) if s.held >= *needed && s.error.is_none() => {
                    out.programmed += 1;
                    continue;
                }
                Some(NodeStatus { error: Some(e), .. }) => format!("{node}: {}", tidegate_api::printable(e)),
                Some(s) if s.connected => format!("{node} has not confirmed it yet"),
                _ => format!("the agent of {node} is not connected"),
            };
            if out.waiting.len() < MAX_NAMED {
                out.waiting.push(why);
            }
        }
        out
    }

    /// Whether none is missing.
    pub fn complete(&self) -> bool {
        self.programmed == self.desired
    }
}

impl std::fmt::Display for Count {
    /// `38 of 40 nodes; the agent of node-7 is not connected; node-9 has not confirmed it yet`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let nodes = if self.desired == 1 { "node" } else { "nodes" };
        write!(f, "{} of {} {nodes}", self.programmed, self.desired)?;
        for w in &self.waiting {
            write!(f, "; {w}")?;
        }
        let more = (self.desired - self.programmed) as usize - self.waiting.len();
        if more > 0 {
            write!(f, "; and {more} more")?;
        }
        Ok(())
    }
}
