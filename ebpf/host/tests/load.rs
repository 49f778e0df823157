//! Loading into the real kernel: layouts, adoption, the verifier's cost.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use aya::maps::{Map, MapData, MapInfo};
use common::Fixture;
use tidegate_ebpf::{Datapath, Error, Local, Options, Role};
use tidegate_policy::state::{Cluster, NodeState};

const _: fn() = || {
    fn sendable<T: Send>() {}
    sendable::<Datapath>();
};

fn networks() -> NodeState {
    let prefixes = vec!["10.244.0.0/16".parse().unwrap(), "10.96.0.0/12".parse().unwrap()];
    NodeState { cluster: Cluster { prefixes, ..Cluster::default() }, ..NodeState::default() }
}

#[test]
fn a_pinned_map_of_another_layout_is_refused() {
    let mut f = Fixture::new(Role::Node);
    let (endpoints, config) = (f.pin("ENDPOINTS"), f.pin("CONFIG"));
    std::fs::remove_file(&config).unwrap();
    MapData::from_pin(endpoints).unwrap().pin(&config).unwrap();
    assert!(matches!(f.reload(), Err(Error::Layout { map: "CONFIG", .. })));
}

#[test]
fn a_full_pass_puts_right_what_others_changed() {
    let mut f = Fixture::new(Role::Node);
    let local = Local { node: "n".into(), ..Local::default() };
    f.path_mut().apply(&networks(), &local, false).unwrap();
    let map = Map::from_map_data(MapData::from_pin(f.pin("CLUSTER")).unwrap()).unwrap();
    let mut others: aya::maps::LpmTrie<_, [u8; 20], u32> = map.try_into().unwrap();
    let keys: Vec<_> = others.keys().map(Result::unwrap).collect();
    assert_eq!(keys.len(), 2);
    others.remove(&keys[0]).unwrap();
    others.insert(&aya::maps::lpm_trie::Key::new(32, [9; 20]), 1, 0).unwrap();
    assert_eq!(f.path_mut().apply(&networks(), &local, false).unwrap(), Default::default());
    let applied = f.path_mut().apply(&networks(), &local, true).unwrap();
    assert_eq!((applied.repaired, applied.updated, applied.deleted), (2, 1, 1));
    assert_eq!(others.keys().count(), 2);
}

#[test]
fn capacities_are_the_maps_sizes_and_another_size_is_another_set() {
    let mut f = Fixture::new(Role::Node);
    let before = f.pin("FACTS");
    assert_eq!(MapInfo::from_pin(&before).unwrap().max_entries(), 256);
    f.options.capacities.facts = 512;
    f.restart();
    assert!(before.exists());
    f.path_mut().retire_others().unwrap();
    assert!(!before.exists());
    assert_eq!(MapInfo::from_pin(f.pin("FACTS")).unwrap().max_entries(), 512);
}

#[test]
fn both_roles_load_and_stay_cheap_to_verify() {
    for role in [Role::Node, Role::Gateway] {
        let fixture = Fixture::new(role);
        for (program, instructions) in fixture.path().verified_instructions().unwrap() {
            println!("{:16} {instructions}", program.name());
            // The kernel's limit is a million.
            assert!(instructions > 0 && instructions < 150_000, "{}: {instructions}", program.name());
        }
    }
}

#[test]
fn one_process_at_a_time() {
    let fixture = Fixture::new(Role::Node);
    let again = tidegate_ebpf::Datapath::load(&fixture.options);
    assert!(matches!(again, Err(Error::Busy(_))));
}

#[test]
fn defaults_are_the_documented_ones() {
    let o = Options::new(Role::Node, "/x");
    assert_eq!((o.tunnel_port, o.mark, o.mark_mask), (8475, 0x0020_0000, 0x00f0_0000));
}
