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
    assert!(before.exists() && f.path().is_upgrade());
    f.path_mut().retire_others().unwrap();
    assert!(!before.exists() && !f.path().is_upgrade());
    assert_eq!(MapInfo::from_pin(f.pin("FACTS")).unwrap().max_entries(), 512);
}

#[test]
fn pins_that_others_removed_are_back_with_the_same_maps() {
    let mut f = Fixture::new(Role::Node);
    let local = Local { node: "n".into(), ..Local::default() };
    f.path_mut().apply(&networks(), &local, false).unwrap();
    let id = |f: &Fixture, map| MapInfo::from_pin(f.pin(map)).unwrap().id();
    let (cluster, facts) = (id(&f, "CLUSTER"), id(&f, "FACTS"));
    for map in ["CLUSTER", "FACTS"] {
        std::fs::remove_file(f.pin(map)).unwrap();
    }
    assert_eq!(f.path_mut().apply(&networks(), &local, true).unwrap().pinned, 2);
    assert_eq!((id(&f, "CLUSTER"), id(&f, "FACTS")), (cluster, facts));
    assert_eq!(f.path_mut().apply(&networks(), &local, true).unwrap().pinned, 0);
}

#[test]
fn maps_are_put_right_though_their_pins_cannot_be() {
    let mut f = Fixture::new(Role::Node);
    let local = Local { node: "n".into(), ..Local::default() };
    f.path_mut().apply(&networks(), &local, false).unwrap();
    let cluster = f.pin("CLUSTER");
    let map = Map::from_map_data(MapData::from_pin(&cluster).unwrap()).unwrap();
    let mut others: aya::maps::LpmTrie<_, [u8; 20], u32> = map.try_into().unwrap();
    let keys: Vec<_> = others.keys().map(Result::unwrap).collect();
    // Something else lies where the folder was.
    let folder = cluster.parent().unwrap();
    let other = MapData::from_pin(f.pin("CONFIG")).unwrap();
    std::fs::remove_dir_all(folder).unwrap();
    other.pin(folder).unwrap();
    others.remove(&keys[0]).unwrap();
    assert!(f.path_mut().apply(&networks(), &local, true).is_err());
    assert_eq!(others.keys().count(), 2);
    std::fs::remove_file(folder).unwrap();
    assert!(f.path_mut().apply(&networks(), &local, true).unwrap().pinned > 2);
}

#[test]
fn what_is_left_of_any_layout_is_removed_but_not_under_a_process() {
    let mut f = Fixture::new(Role::Node);
    let pins = f.options.pins.clone();
    f.options.capacities.facts = 512;
    f.restart();
    assert!(matches!(tidegate_ebpf::remove_pins(&pins), Err(Error::Busy(_))));
    assert_eq!(std::fs::read_dir(&pins).unwrap().count(), 2);
    f.stop();
    for _ in 0..2 {
        tidegate_ebpf::remove_pins(&pins).unwrap();
        assert!(!pins.exists());
    }
}

#[test]
fn both_roles_load_and_stay_cheap_to_verify() {
    for role in [Role::Node, Role::Gateway] {
        let fixture = Fixture::new(role);
        for (program, instructions) in fixture.path().verified_instructions().unwrap() {
            println!("{:16} {instructions}", program.name());
            // The kernel's limit is a million.
            assert!(instructions > 0 && instructions < 60_000, "{}: {instructions}", program.name());
        }
    }
}

#[test]
fn one_process_at_a_time() {
    let mut fixture = Fixture::new(Role::Node);
    let mut options = fixture.options.clone();
    assert!(matches!(Datapath::load(&options), Err(Error::Busy(_))));
    assert!(tidegate_ebpf::is_taken(&options.pins) && !tidegate_ebpf::is_taken(&options.pins.join("none")));
    // Also with maps of another layout: both would work on the same devices.
    options.capacities.facts = 512;
    assert!(matches!(Datapath::load(&options), Err(Error::Busy(_))));
    assert_eq!(std::fs::read_dir(&options.pins).unwrap().count(), 1, "who is refused leaves nothing");
    // What never came as far as maps is nobody's.
    let left = options.pins.join("v0-0-0");
    for folder in ["maps", "links"] {
        std::fs::create_dir_all(left.join(folder)).unwrap();
    }
    fixture.restart();
    assert!(!fixture.path().is_upgrade() && !left.exists());
}

#[test]
fn defaults_are_the_documented_ones() {
    let o = Options::new(Role::Node, "/x");
    assert_eq!((o.tunnel_port, o.mark, o.mark_mask), (8475, 0x0020_0000, 0x00f0_0000));
}
