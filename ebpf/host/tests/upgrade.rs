//! What survives when another set of maps takes over, and what others changed in the maps that no state tells again.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use aya::Pod;
use aya::maps::{HashMap, Map, MapData};
use common::Fixture;
use common::packets::{tcp, udp};
use tidegate_ebpf::{Interface, Local, Program, Role, TestPacket};
use tidegate_ebpf_common::Addr;
use tidegate_ebpf_common::layout::{Fact, FactKey, Flow, FlowKey, IdKey};
use tidegate_policy::state::{Endpoint, FactUpdate, FactValue, Gateway, Group, Node, NodeState, Scope, Touch};
use tidegate_policy::{Carry, ClassKey, GroupKey, PortRange, PortSet, Proto, ScopeKey, Via};

const NEXT: i32 = -1;
const SHOT: i32 = 2;
const REDIRECT: i32 = 7;
const SCOPE: ScopeKey = ScopeKey(1);
const CLASS: ClassKey = ClassKey(1);
const PODS: [&str; 2] = ["10.244.1.5", "fd00:10:244::5"];
const SERVERS: [&str; 2] = ["198.51.100.1", "2001:db8::1"];
const CLIENTS: [&str; 2] = ["198.51.100.99", "2001:db8::99"];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn state() -> NodeState {
    let mut s = NodeState::default();
    s.nodes.insert("n1".into(), Node { addresses: vec![ip("192.0.2.1")] });
    s.nodes.insert("n2".into(), Node { addresses: vec![ip("192.0.2.2")] });
    s.gateways.insert("gw".into(), Gateway { node: "n2".into(), control: vec![] });
    s.scopes.insert(SCOPE, Scope { owner: "gw".into(), epoch: 1, pair: 1, standbys: vec![] });
    let group = GroupKey(1);
    s.groups.insert(group, Group { isolated: true, audit: false, admin: None, own: None });
    let port = |proto, port| PortRange { proto, lo: port, hi: port, via: Via::Allow(Carry::Forward) };
    s.grants.insert((group, CLASS), PortSet::from_precedence([port(Proto::Tcp, 443), port(Proto::Udp, 4500)]));
    for pod in PODS {
        let endpoint = Endpoint {
            node: "n1".into(),
            namespace: "shop".into(),
            pod: "web".into(),
            touch: Touch::Isolated,
            member: Some((SCOPE, group)),
        };
        s.endpoints.insert(ip(pod), endpoint);
    }
    s
}

fn local() -> Local {
    let interface = Interface { ifindex: 1, mac: [2, 0, 0, 0, 0, 5] };
    let interfaces = PODS.iter().map(|a| (ip(a), interface)).collect();
    Local { node: "n1".into(), tunnel_ifindex: 1, interfaces, ..Local::default() }
}

fn fact(address: &str, ttl: u64) -> FactUpdate {
    FactUpdate { scope: SCOPE, ip: ip(address), value: Some(FactValue { class: CLASS, ttl: Duration::from_secs(ttl) }) }
}

fn world(role: Role) -> Fixture {
    let mut f = Fixture::new(role);
    f.path_mut().apply(&state(), &local(), false).unwrap();
    f.path_mut().facts(&[fact(SERVERS[0], 600), fact(SERVERS[1], 600)]).unwrap();
    f.path_mut().heartbeat("gw").unwrap();
    f
}

fn run(f: &Fixture, program: Program, frame: &[u8]) -> i32 {
    let packet = TestPacket { frame, ifindex: 1, ingress_ifindex: 0, mark: 0, gso_size: 0, repeat: 1 };
    f.path().test_run(program, &packet).unwrap().code
}

/// From the client to port 80 of the pod, and the answer.
fn inbound(client: &str, pod: &str) -> (Vec<u8>, Vec<u8>) {
    let mut answer = tcp(pod, client, 40_000, false);
    let l4 = if pod.contains(':') { 14 + 40 } else { 14 + 20 };
    answer[l4..l4 + 2].copy_from_slice(&80u16.to_be_bytes());
    (tcp(client, pod, 80, true), answer)
}

#[test]
fn flows_facts_and_who_has_them_survive_another_layout_and_the_way_back() {
    let mut f = world(Role::Node);
    for (server, (client, pod)) in SERVERS.iter().zip(CLIENTS.iter().zip(PODS)) {
        run(&f, Program::PodIngress, &inbound(client, pod).0);
        assert_eq!(run(&f, Program::PodEgress, &inbound(client, pod).1), NEXT);
        assert_eq!(run(&f, Program::PodEgress, &udp(pod, server, 4500)), REDIRECT);
    }
    // Expired, and carrying a flow: only the kernel knows.
    f.path_mut().facts(&[fact(SERVERS[0], 0), fact(SERVERS[1], 0)]).unwrap();
    for flows in [512, 256] {
        f.options.capacities.flows = flows;
        f.restart();
        assert!(f.path().is_upgrade());
        f.path_mut().apply(&state(), &local(), false).unwrap();
        f.path_mut().heartbeat("gw").unwrap();
        f.path_mut().carry_flows().unwrap();
        f.path_mut().retire_others().unwrap();
        for (server, (client, pod)) in SERVERS.iter().zip(CLIENTS.iter().zip(PODS)) {
            assert_eq!(run(&f, Program::PodEgress, &inbound(client, pod).1), NEXT, "{flows} {pod}");
            assert_eq!(run(&f, Program::PodEgress, &tcp(pod, client, 41_000, false)), SHOT, "{flows} {pod}");
            assert_eq!(run(&f, Program::PodEgress, &udp(pod, server, 4500)), REDIRECT, "{flows} {pod}");
            assert_eq!(run(&f, Program::PodEgress, &tcp(pod, server, 443, false)), REDIRECT, "{flows} {pod}");
            assert_eq!(run(&f, Program::PodEgress, &tcp(pod, server, 443, true)), SHOT, "{flows} {pod}: expired");
        }
        assert_eq!(f.path_mut().sweep().unwrap(), tidegate_ebpf::Swept::default(), "{flows}");
    }
}

#[test]
fn what_came_after_the_new_set_was_made_is_taken_over_too() {
    let mut f = world(Role::Node);
    let old = f.pin("FLOWS");
    f.options.capacities.flows = 512;
    f.restart();
    f.path_mut().apply(&state(), &local(), false).unwrap();
    f.path_mut().heartbeat("gw").unwrap();
    // As the old program, which runs on, would: by the new one, whose entries are moved into the old map.
    for (client, pod) in CLIENTS.iter().zip(PODS) {
        run(&f, Program::PodIngress, &inbound(client, pod).0);
    }
    let layouts = std::fs::read_dir(&f.options.pins).unwrap();
    let new = layouts.map(|e| e.unwrap().path().join("maps/FLOWS")).find(|p| *p != old).unwrap();
    let (mut theirs, mut ours): (HashMap<_, FlowKey, Flow>, HashMap<_, FlowKey, Flow>) = (open(&old), open(&new));
    let entries: Vec<_> = ours.iter().map(Result::unwrap).collect();
    assert_eq!(entries.len(), 2);
    for (key, value) in entries {
        theirs.insert(key, value, 0).unwrap();
        ours.remove(&key).unwrap();
    }
    assert_eq!(run(&f, Program::PodEgress, &inbound(CLIENTS[0], PODS[0]).1), SHOT);
    assert_eq!(f.path_mut().carry_flows().unwrap(), 2);
    for (client, pod) in CLIENTS.iter().zip(PODS) {
        assert_eq!(run(&f, Program::PodEgress, &inbound(client, pod).1), NEXT);
    }
}

#[test]
fn what_was_filled_by_half_is_filled_again_with_the_same_ids() {
    let mut f = world(Role::Node);
    let old = f.pin("IDS");
    f.options.capacities.flows = 512;
    f.restart();
    let layouts = std::fs::read_dir(&f.options.pins).unwrap();
    let new = layouts.map(|e| e.unwrap().path().join("maps/IDS")).find(|p| *p != old).unwrap();
    let (theirs, mut ours): (HashMap<_, IdKey, u32>, HashMap<_, IdKey, u32>) = (open(&old), open(&new));
    let all = |map: &HashMap<_, IdKey, u32>| map.iter().map(Result::unwrap).collect::<BTreeMap<_, _>>();
    assert_eq!(all(&ours), all(&theirs));
    // As after a crash: neither the last entry nor the names are there, and the counters are old.
    f.stop();
    for (key, id) in all(&ours) {
        match key.kind {
            0x101.. => ours.insert(key, id - 1, 0).unwrap(),
            _ => ours.remove(&key).unwrap(),
        }
    }
    f.restart();
    assert_eq!(all(&ours), all(&theirs));
    f.path_mut().apply(&state(), &local(), false).unwrap();
    for (pod, server) in PODS.iter().zip(SERVERS) {
        assert_eq!(run(&f, Program::PodEgress, &tcp(pod, server, 443, true)), REDIRECT);
    }
    // From then on it gives its own.
    let some = all(&ours).into_iter().find(|(key, _)| key.kind < 0x100).unwrap().0;
    ours.remove(&some).unwrap();
    f.restart();
    assert!(ours.get(&some, 0).is_err());
}

#[test]
fn what_was_counted_survives_another_layout_and_the_next_start() {
    let mut f = world(Role::Node);
    let drops = |f: &Fixture| {
        let all = f.path().counters().unwrap();
        all.iter().filter(|c| c.outcome == tidegate_ebpf::Outcome::Drop).map(|c| c.packets).sum::<u64>()
    };
    let miss = |f: &Fixture| assert_eq!(run(f, Program::PodEgress, &tcp(PODS[0], CLIENTS[0], 443, true)), SHOT);
    miss(&f);
    for round in 1..3 {
        f.options.capacities.flows *= 2;
        f.restart();
        f.path_mut().apply(&state(), &local(), false).unwrap();
        f.path_mut().heartbeat("gw").unwrap();
        assert_eq!(drops(&f), round, "as before the upgrade");
        miss(&f);
        f.path_mut().retire_others().unwrap();
        assert_eq!(drops(&f), round + 1);
        assert_eq!(f.path().suppressed_events().unwrap(), round, "nobody read the old ring");
        f.restart();
        assert_eq!((drops(&f), f.path().suppressed_events().unwrap()), (round + 1, round));
        f.path_mut().apply(&state(), &local(), false).unwrap();
        f.path_mut().heartbeat("gw").unwrap();
    }
}

#[test]
fn who_was_just_loaded_steers_misses_until_the_gateway_has_told_what_it_learnt() {
    let mut f = world(Role::Node);
    let misses = |f: &Fixture| {
        PODS.map(|pod| run(f, Program::PodEgress, &tcp(pod, CLIENTS[pod.contains(':') as usize], 443, true)))
    };
    assert_eq!(misses(&f), [SHOT; 2]);
    f.restart();
    assert_eq!(misses(&f), [REDIRECT; 2]);
    f.path_mut().heartbeat("gw").unwrap();
    assert_eq!(misses(&f), [SHOT; 2]);
    // The programs of the other layout run on, and hear nothing any more.
    let old: HashMap<_, u32, u64> = open(&f.pin("HEARTBEATS"));
    assert_eq!(old.keys().count(), 1);
    f.options.capacities.flows = 512;
    f.restart();
    assert_eq!(old.keys().count(), 0);
}

#[test]
fn a_gateway_still_knows_which_facts_are_in_use() {
    let mut f = world(Role::Gateway);
    for (server, pod) in SERVERS.iter().zip(PODS) {
        assert_eq!(run(&f, Program::GatewayIngress, &tcp(pod, server, 443, true)), 0);
    }
    f.options.capacities.facts = 512;
    f.restart();
    f.path_mut().apply(&state(), &local(), false).unwrap();
    f.path_mut().retire_others().unwrap();
    for server in SERVERS {
        assert!(f.path().fact_last_seen(SCOPE, ip(server)).is_some(), "{server}");
    }
}

fn open<K: Pod, V: Pod>(path: &std::path::Path) -> HashMap<MapData, K, V> {
    Map::from_map_data(MapData::from_pin(path).unwrap()).unwrap().try_into().unwrap()
}

#[test]
fn facts_that_others_deleted_changed_or_added_are_put_right() {
    let mut f = world(Role::Node);
    let syn = |f: &Fixture, i: usize| run(f, Program::PodEgress, &tcp(PODS[i], SERVERS[i], 443, true));
    let mut facts: HashMap<_, FactKey, Fact> = open(&f.pin("FACTS"));
    let keys: Vec<FactKey> = facts.keys().map(Result::unwrap).collect();
    let held: Vec<Fact> = keys.iter().map(|k| facts.get(k, 0).unwrap()).collect();
    facts.remove(&keys[0]).unwrap();
    facts.insert(keys[1], Fact { class: 999, ..held[1] }, 0).unwrap();
    // A way out for somebody who was given none.
    let mut stranger = keys[0];
    stranger.addr = ip(CLIENTS[0]).into();
    facts.insert(stranger, held[0], 0).unwrap();
    assert_eq!((syn(&f, 0), syn(&f, 1)), (SHOT, SHOT));
    assert_eq!(run(&f, Program::PodEgress, &tcp(PODS[0], CLIENTS[0], 443, true)), REDIRECT);
    assert_eq!(f.path_mut().sweep().unwrap().repaired, 3);
    assert_eq!((syn(&f, 0), syn(&f, 1)), (REDIRECT, REDIRECT));
    assert_eq!(run(&f, Program::PodEgress, &tcp(PODS[0], CLIENTS[0], 443, true)), SHOT);
    assert_eq!(f.path_mut().sweep().unwrap().repaired, 0);
    // A fact that is taken back stays away.
    f.path_mut().facts(&[FactUpdate { value: None, ..fact(SERVERS[0], 0) }]).unwrap();
    assert_eq!(f.path_mut().sweep().unwrap().repaired, 0);
    assert_eq!(syn(&f, 0), SHOT);
    // So does one that nobody vouches for after a restart.
    f.restart();
    assert_eq!(f.path_mut().retain_facts(|_, _| false).unwrap(), 1);
    assert_eq!((f.path_mut().sweep().unwrap().repaired, facts.keys().count()), (0, 0));
}

#[test]
fn ids_that_others_deleted_are_back_before_a_restart_gives_them_to_somebody_else() {
    let mut f = world(Role::Node);
    let mut ids: HashMap<_, IdKey, u32> = open(&f.pin("IDS"));
    let all: Vec<(IdKey, u32)> = ids.iter().map(Result::unwrap).collect();
    for (key, _) in &all {
        ids.remove(key).unwrap();
    }
    assert_eq!(f.path_mut().sweep().unwrap().repaired, all.len());
    for (key, id) in &all {
        assert_eq!(ids.get(key, 0).unwrap(), *id);
    }
    f.restart();
    f.path_mut().apply(&state(), &local(), false).unwrap();
    for (pod, server) in PODS.iter().zip(SERVERS) {
        assert_eq!(run(&f, Program::PodEgress, &tcp(pod, server, 443, true)), REDIRECT);
    }
}

#[test]
fn addresses_are_held_for_the_old_programs_until_they_are_replaced() {
    let mut f = world(Role::Node);
    let address = ip("203.0.113.10");
    f.path_mut().hold(&[address], Duration::from_secs(600)).unwrap();
    let old: HashMap<_, Addr, u64> = open(&f.pin("HELD"));
    f.options.capacities.flows = 512;
    f.restart();
    let deadline = |map: &HashMap<MapData, Addr, u64>| map.get(&address.into(), 0).unwrap_or(0);
    let before = deadline(&old);
    assert!(before > 0);
    f.path_mut().hold(&[address], Duration::from_secs(1200)).unwrap();
    assert!(deadline(&old) > before);
    f.path_mut().release(&[address]).unwrap();
    assert_eq!(deadline(&old), 0);
}

#[test]
fn the_old_programs_hear_of_the_nodes_new_addresses_until_they_are_replaced() {
    let mut f = world(Role::Node);
    let [before, since] = ["203.0.113.7", "2001:db8::7"].map(ip);
    f.path_mut().addresses(&[before], false).unwrap();
    let old: HashMap<_, Addr, u32> = open(&f.pin("OWN"));
    f.options.capacities.flows = 512;
    f.restart();
    f.path_mut().addresses(&[since], false).unwrap();
    for address in [before, since] {
        assert!(old.get(&address.into(), 0).is_ok(), "{address}");
    }
    assert_eq!(f.path().entries()["OWN"], 1);
}

#[test]
fn a_gateway_that_lost_its_scopes_lets_nothing_out_with_another_source() {
    let mut f = world(Role::Gateway);
    let mut scopes: HashMap<_, u32, tidegate_ebpf_common::layout::Scope> = open(&f.pin("SCOPES"));
    for key in scopes.keys().map(Result::unwrap).collect::<Vec<_>>() {
        scopes.remove(&key).unwrap();
    }
    for (pod, server) in PODS.iter().zip(SERVERS) {
        assert_eq!(run(&f, Program::GatewayIngress, &tcp(pod, server, 443, true)), SHOT);
        assert_eq!(run(&f, Program::GatewayIngress, &udp(pod, server, 53)), 0, "answers have no such source");
    }
    f.path_mut().apply(&state(), &local(), true).unwrap();
    for (pod, server) in PODS.iter().zip(SERVERS) {
        assert_eq!(run(&f, Program::GatewayIngress, &tcp(pod, server, 443, true)), 0);
    }
}
