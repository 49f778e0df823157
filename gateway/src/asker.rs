//! What policy says to the DNS service of a pod that asks, and of names and addresses for it.

use std::net::IpAddr;
use std::sync::Arc;

use tidegate_dns_core::{AddressDecision, Allow, AskMode, Asker, Denial, NameDecision};
use tidegate_policy::state::Touch;
use tidegate_policy::world::{self, Answer, World};
use tidegate_policy::{Proto, Reason, Via};

use crate::desired::Desired;

/// The pod with this address, if it is answered by policy. `families` says whether the pod's own network has a way out for
/// IPv4 and IPv6.
pub fn asker(world: &World, ip: IpAddr, families: (bool, bool)) -> Option<Asker> {
    let e = world.endpoint(ip)?;
    let m = e.member?;
    let group = world.group(m.index)?;
    // A scope whose pool has no pair left has no way out.
    let pair = Desired::pair(group.scope())?;
    let (v4, v6) = match (pair.ipv4, pair.ipv6) {
        (None, None) => families,
        (v4, v6) => (v4.is_some(), v6.is_some()),
    };
    let mode = match (group.audit(), e.touch) {
        (true, _) => AskMode::Audited,
        (false, Touch::Isolated) => AskMode::Enforced,
        (false, _) => AskMode::Guarded,
    };
    // What is not isolated keeps the CNI's path, whatever the pool's families are.
    let free = mode != AskMode::Enforced;
    Some(Asker {
        ip,
        who: e.who.clone(),
        scope: m.scope,
        group: m.group,
        group_index: m.index,
        mode,
        v4: v4 || free,
        v6: v6 || free,
    })
}

/// Whether the asking pod's node must know the addresses of a name: it steers what an isolated pod sends to addresses that it
/// does not know, but what a guarded one sends it passes, and here some ports are denied.
pub fn needs_ack(world: &World, asker: &Asker, name: &str) -> bool {
    let denied = |g: &Arc<world::Group>| g.name(name, 1).facts.ports.ranges().iter().any(|r| r.via == Via::Deny);
    asker.mode == AskMode::Guarded && world.group_by_key(asker.group).is_some_and(denied)
}

/// Whether the pod may resolve a name.
pub fn name(world: &World, asker: &Asker, name: &str, qtype: u16) -> NameDecision {
    let Some(group) = world.group(asker.group_index) else {
        return NameDecision::Deny { denial: Denial::NoData, reason: Reason::NoBinding, rule: None };
    };
    let d = group.name(name, qtype);
    let deny = |denial| NameDecision::Deny { denial, reason: d.reason, rule: d.rule.clone() };
    match d.answer {
        Answer::Bind => NameDecision::Allow(Allow {
            ech: d.facts.ech_allow,
            extra_type: d.facts.dns_types.binary_search(&qtype).is_ok(),
            wildcard: d.wildcard,
            min_binding_secs: d.facts.min_binding.map_or(0, |m| u32::try_from(m.as_secs()).unwrap_or(u32::MAX)),
            rule: d.rule,
        }),
        Answer::Resolve => NameDecision::Resolve { reason: d.reason, rule: d.rule },
        Answer::NoData => deny(Denial::NoData),
        Answer::NxDomain => deny(Denial::NxDomain),
    }
}

/// Whether it may be told an address of the name, which is none of the cluster's.
pub fn address(world: &World, asker: &Asker, name: &str, ip: IpAddr) -> AddressDecision {
    let Some(group) = world.group(asker.group_index) else {
        return AddressDecision::Filter(Reason::NoBinding);
    };
    match group.address(name, ip) {
        world::AddressDecision::Default => AddressDecision::Default,
        world::AddressDecision::Accept => AddressDecision::Accept,
        world::AddressDecision::Filter(reason) => AddressDecision::Filter(reason),
    }
}

/// Whether a rule allows the name's port, which a service binding record names.
pub fn svcb_port(world: &World, asker: &Asker, name: &str, port: u16) -> bool {
    let Some(group) = world.group(asker.group_index) else { return false };
    let ports = &group.name(name, 1).facts.ports;
    [Proto::Tcp, Proto::Udp].iter().any(|p| matches!(ports.get(*p, port), Some(Via::Allow(_))))
}
