//! What nobody deletes by name: idle flows, facts long expired, forgotten identities.

use ahash::{AHashMap, AHashSet};
use aya::Pod;
use aya::maps::{HashMap, MapData};
use tidegate_ebpf_common::Addr;
use tidegate_ebpf_common::layout::{Fact, FactKey, Flow, FlowKey, flow};
use tidegate_ebpf_common::packet::proto;

use crate::Error;
use crate::ids::Kind;
use crate::load::{Datapath, is_missing, now_secs};

/// How long an answered TCP flow may be silent (RFC 5382, REQ-5 asks for at least 2 h 4 min).
const TCP: u32 = 7_500;
/// How long an unanswered flow, and echo, is remembered.
const SHORT: u32 = 60;
/// How long a UDP flow may be silent (RFC 4787, REQ-5 recommends 5 min).
const UDP: u32 = 300;
/// How long an expired fact is kept for the flows that it may still carry.
const EXPIRED: u32 = 24 * 3600;

/// What [`Datapath::sweep`] removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Idle flows, and those of pods that are gone.
    pub flows: usize,
    /// Facts that expired more than a day ago.
    pub facts: usize,
    /// Identities that nothing names any more.
    pub ids: usize,
    /// Facts and identities that others had changed, deleted or added, and that were put right.
    pub repaired: usize,
}

fn idle_limit(key: &FlowKey, value: &Flow) -> u32 {
    match u8::try_from(key.proto) {
        Ok(proto::TCP) if value.flags & (flow::ANSWERED | flow::AUDIT) != 0 => TCP,
        // Anybody outside can send a datagram; only an answer makes it a flow.
        Ok(proto::UDP) if value.flags & (flow::ANSWERED | flow::AUDIT | flow::STEERED) != 0 => UDP,
        _ => SHORT,
    }
}

/// All entries of a map that the kernel changes meanwhile. An iteration that loses its place starts over,
/// so it is bounded by the map's size.
fn entries<K: Pod, V: Pod>(map: &HashMap<MapData, K, V>, most: u32) -> Vec<(K, V)> {
    map.iter().flatten().take(most as usize).collect()
}

fn gone(result: Result<(), aya::maps::MapError>, map: &'static str) -> Result<(), Error> {
    match result {
        Err(e) if !is_missing(&e) => Err(Error::map(map)(e)),
        _ => Ok(()),
    }
}

impl Datapath {
    /// Removes idle flows, and those of pods that are gone, corrects the endpoints' budgets, removes facts that expired more than 24 h ago
    /// and identities that neither the last applied state nor a fact names, and puts right what others changed of the
    /// rest. To be called in every full pass, and at least every minute.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn sweep(&mut self) -> Result<Swept, Error> {
        self.sweep_at(now_secs())
    }

    fn sweep_at(&mut self, now: u32) -> Result<Swept, Error> {
        let mut swept = Swept::default();
        let mut counts: AHashMap<Addr, u32> = AHashMap::new();
        for (key, value) in entries(&self.flows, self.options.capacities.flows) {
            let pod = self.tables.endpoints.get(&key.pod);
            let left = pod.is_none_or(|e| e.incarnation != key.incarnation);
            if left || now.saturating_sub(value.seen) > idle_limit(&key, &value) {
                gone(self.flows.remove(&key), "FLOWS")?;
                swept.flows += 1;
            } else {
                *counts.entry(key.pod).or_default() += 1;
            }
        }
        for (addr, count) in entries(&self.flow_counts, self.options.capacities.endpoints) {
            match counts.get(&addr) {
                Some(right) if *right == count => {}
                Some(right) => self.flow_counts.insert(addr, right, 0).map_err(Error::map("FLOW_COUNTS"))?,
                None => gone(self.flow_counts.remove(&addr), "FLOW_COUNTS")?,
            }
        }
        swept.repaired = self.ids.restore()?;
        let (mut scopes, mut classes) = (AHashSet::new(), AHashSet::new());
        let mut there = AHashSet::new();
        for (key, mut value) in entries::<FactKey, Fact>(&self.facts, self.options.capacities.facts) {
            let Some((class, expires)) = self.told.get(&key).copied() else {
                // Somebody else's word.
                gone(self.facts.remove(&key), "FACTS")?;
                swept.repaired += 1;
                continue;
            };
            if (value.class, value.expires) != (class, expires) {
                (value.class, value.expires) = (class, expires);
                self.facts.insert(key, value, 0).map_err(Error::map("FACTS"))?;
                swept.repaired += 1;
            }
            there.insert(key);
            let idle_since = value.expires.max(value.seen);
            if now.saturating_sub(idle_since) > EXPIRED {
                gone(self.facts.remove(&key), "FACTS")?;
                self.told.remove(&key);
                swept.facts += 1;
            } else {
                scopes.insert(key.scope);
                classes.insert(value.class);
            }
        }
        for (key, (class, expires)) in self.told.iter().filter(|(k, _)| !there.contains(k)) {
            let value = Fact { class: *class, expires: *expires, seen: 0 };
            self.facts.insert(key, value, 0).map_err(Error::map("FACTS"))?;
            scopes.insert(key.scope);
            classes.insert(*class);
            swept.repaired += 1;
        }
        let Some((state, local)) = &self.last else {
            return Ok(swept);
        };
        let mut used: AHashSet<(u32, u32)> = AHashSet::new();
        used.extend(scopes.into_iter().map(|id| (Kind::Scope as u32, id)));
        used.extend(classes.into_iter().map(|id| (Kind::Class as u32, id)));
        let mut keep = |kind: Kind, id: Option<u32>| used.extend(id.map(|id| (kind as u32, id)));
        let ids = &self.ids;
        let members = state.endpoints.values().filter_map(|e| e.member);
        for scope in state.scopes.keys().copied().chain(members.clone().map(|m| m.0)) {
            keep(Kind::Scope, ids.find(Kind::Scope, scope.0));
        }
        for group in state.groups.keys().copied().chain(members.map(|m| m.1)).chain(state.grants.keys().map(|g| g.0)) {
            keep(Kind::Group, ids.find(Kind::Group, group.0));
        }
        for (_, class) in state.grants.keys() {
            keep(Kind::Class, ids.find(Kind::Class, class.0));
        }
        for set in state.prefixes.keys().chain(state.groups.values().flat_map(|g| g.admin.iter().chain(&g.own))) {
            keep(Kind::Prefixes, ids.find(Kind::Prefixes, set.0));
        }
        let gateways = state.gateways.values().map(|g| &g.node);
        let pods = state.endpoints.values().map(|e| &e.node);
        for node in state.nodes.keys().chain(gateways).chain(pods).chain([&local.node]) {
            keep(Kind::Node, ids.find_named(Kind::Node, node));
        }
        for gateway in state.gateways.keys().chain(state.scopes.values().map(|s| &s.owner)) {
            keep(Kind::Gateway, ids.find_named(Kind::Gateway, gateway));
        }
        swept.ids = self.ids.retain(|kind, id| used.contains(&(kind, id)))?;
        Ok(swept)
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use tidegate_policy::state::{FactUpdate, FactValue, NodeState};
    use tidegate_policy::{ClassKey, ScopeKey};

    use super::*;
    use crate::{Capacities, Local, Options, Role};

    struct Pins(PathBuf);

    impl Drop for Pins {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn facts_are_forgotten_a_day_after_their_last_use() {
        let pins = Pins(PathBuf::from(format!("/sys/fs/bpf/tidegate-sweep-{}", std::process::id())));
        let mut options = Options::new(Role::Gateway, &pins.0);
        options.capacities = Capacities { endpoints: 64, facts: 64, grants: 64, portsets: 64, prefixes: 64, flows: 64 };
        let mut d = Datapath::load(&options).unwrap();
        d.apply(&NodeState::default(), &Local { node: "n1".into(), ..Local::default() }, false).unwrap();
        let fact = |last: u8, ttl| FactUpdate {
            scope: ScopeKey(last.into()),
            ip: [192, 0, 2, last].into(),
            value: Some(FactValue { class: ClassKey(last.into()), ttl: Duration::from_secs(ttl) }),
        };
        let before = now_secs();
        d.facts(&[fact(1, 60), fact(2, 60), fact(3, 600)]).unwrap();
        // The second one carried packets until later.
        let key = FactKey { scope: d.ids.find(Kind::Scope, 2).unwrap(), addr: Addr::from_ip([192, 0, 2, 2].into()) };
        let used = Fact { seen: before + 300, ..d.facts.get(&key, 0).unwrap() };
        d.facts.insert(key, used, 0).unwrap();
        let mut left = |after: u32| {
            let swept = d.sweep_at(before + after).unwrap();
            (swept.facts, swept.repaired, d.entries()["FACTS"], d.ids.find(Kind::Scope, 1).is_some())
        };
        const DAY: u32 = 24 * 3600;
        assert_eq!(left(0), (0, 0, 3, true));
        assert_eq!(left(DAY + 59), (0, 0, 3, true));
        assert_eq!(left(DAY + 70), (1, 0, 2, false), "and its scope's identity with it");
        assert_eq!(left(DAY + 299), (0, 0, 2, false));
        assert_eq!(left(DAY + 301), (1, 0, 1, false));
        assert_eq!(left(DAY + 620), (1, 0, 0, false));
    }
}
