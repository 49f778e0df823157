//! Single changes in the real kernel come to the same as a whole state.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::net::IpAddr;

use common::Fixture;
use tidegate_ebpf::{Applied, Local, Role};
use tidegate_policy::state::{Endpoint, Entry, EntryKey, Gateway, Group, Node, NodeState, Scope, Touch};
use tidegate_policy::{Carry, ClassKey, GroupKey, PortRange, PortSet, PrefixSetKey, Proto, ScopeKey, Via};

fn ports(n: u64) -> PortSet {
    let range = |lo| PortRange { proto: Proto::Tcp, lo, hi: lo + 1, via: Via::Allow(Carry::Forward) };
    PortSet::from_precedence((0..=n as u16).map(|i| range(10 * i + 1)))
}

fn endpoint(group: u64, node: &str, pod: &str) -> Endpoint {
    Endpoint {
        node: node.into(),
        namespace: "shop".into(),
        pod: pod.into(),
        touch: Touch::Isolated,
        member: Some((ScopeKey(1), GroupKey(group.into()))),
    }
}

/// A state that this number stands for.
fn state(mut n: u64) -> NodeState {
    let mut below = |m: u64| {
        n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (n >> 33) % m
    };
    let mut s = NodeState::default();
    s.nodes.insert("n1".into(), Node { addresses: vec![[192, 0, 2, 1].into()] });
    s.gateways.insert("gw-a".into(), Gateway { node: "n1".into(), control: vec![] });
    for i in 0..8 {
        let ip: IpAddr = [10, 0, 0, i].into();
        if below(3) > 0 {
            s.endpoints.insert(ip, endpoint(below(3), ["n1", "n2"][below(2) as usize], ["a", "b"][below(2) as usize]));
        }
    }
    for key in 0..3 {
        if below(4) == 0 {
            continue;
        }
        let set = (below(2) > 0).then_some(PrefixSetKey(100 + below(3) as u128));
        s.groups.insert(GroupKey(key), Group { isolated: below(2) > 0, audit: below(2) > 0, admin: None, own: set });
        for class in 0..3 {
            if below(2) > 0 {
                s.grants.insert((GroupKey(key), ClassKey(class)), ports(below(4)));
            }
        }
    }
    let standbys = if below(2) > 0 { vec!["gw-a".to_owned()] } else { vec![] };
    let owner = ["gw-a", "gw-b"][below(2) as usize].to_owned();
    s.scopes.insert(ScopeKey(1), Scope { owner, epoch: 1, pair: below(3) as u8, standbys });
    // What a set holds follows from its key.
    for set in s.groups.values().filter_map(|g| g.own) {
        let nets = (0..=set.0 as u8 - 100).map(|i| (format!("198.51.{i}.0/24").parse().unwrap(), ports(i.into())));
        s.prefixes.insert(set, nets.collect());
    }
    s
}

#[test]
fn changes_come_to_the_same_as_a_whole_state() {
    let mut f = Fixture::new(Role::Gateway);
    let local = Local { node: "n1".into(), ..Local::default() };
    let mut held = state(0);
    assert!(!f.path_mut().change(&held.entries(), &[]).unwrap(), "nothing was applied before");
    f.path_mut().apply(&held, &local, false).unwrap();
    for n in 1..60 {
        let next = state(n);
        let (set, delete) = held.diff(&next);
        assert!(f.path_mut().change(&set, &delete).unwrap());
        // Nothing is left to do, and the state counts as the one that was applied.
        assert_eq!(f.path_mut().apply(&next, &local, false).unwrap(), Applied::default(), "{n}");
        assert_eq!(f.path_mut().apply(&next, &local, true).unwrap(), Applied::default(), "{n}");
        held = next;
    }
}

#[test]
fn what_is_more_than_a_change_is_left_to_apply() {
    let mut f = Fixture::new(Role::Gateway);
    let local = Local { node: "n1".into(), ..Local::default() };
    let held = state(1);
    f.path_mut().apply(&held, &local, false).unwrap();
    let node = Entry::Node("n2".into(), Node { addresses: vec![[192, 0, 2, 2].into()] });
    assert!(!f.path_mut().change(&[node], &[]).unwrap());
    assert!(!f.path_mut().change(&[], &[EntryKey::Gateway("gw-a".into())]).unwrap());
    assert_eq!(f.path_mut().apply(&held, &local, true).unwrap(), Applied::default(), "and nothing was begun");
}

#[test]
fn a_change_that_the_kernel_refuses_is_made_good_by_the_next_state() {
    let mut f = Fixture::new(Role::Gateway);
    let local = Local { node: "n1".into(), ..Local::default() };
    let held = state(1);
    f.path_mut().apply(&held, &local, false).unwrap();
    // More than there is room for.
    let many: Vec<Entry> =
        (0..200).map(|i| Entry::Endpoint([10, 1, 0, i].into(), endpoint(1, "n1", &format!("p{i}")))).collect();
    f.path_mut().change(&many, &[]).unwrap_err();
    assert!(!f.path_mut().change(&many[..1], &[]).unwrap(), "what the maps hold is not known");
    f.path_mut().apply(&held, &local, false).unwrap();
    assert_eq!(f.path_mut().apply(&held, &local, true).unwrap(), Applied::default());
}
