//! Agents and gateways end and come back, with the same maps or with others, under traffic that nothing may cut and
//! that nothing may get through.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aya::maps::MapInfo;
use aya::programs::links::{FdLink, PinnedLink};
use nix::sys::signal::Signal;
use tidegate_lab::family::{FAMILIES, Family};
use tidegate_lab::lab::wait_for;
use tidegate_lab::observe::Watch;
use tidegate_lab::probe::curl;
use tidegate_lab::steady::{Servers, Steady};
use tidegate_lab::story::named;
use tidegate_lab::{Lab, Options, Scenario, foreign, world};

static ONE: Mutex<()> = Mutex::new(());
const POD: &str = "shop/web";
const READY: Duration = Duration::from_secs(30);
/// For what goes on without a stop, on a busy machine.
const SOON: Duration = Duration::from_secs(10);

fn up(name: &str) -> (MutexGuard<'static, ()>, Lab) {
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/demo.yaml");
    let scenario = Scenario::load(file.as_ref()).unwrap();
    let options = Options { lab: Some(env!("CARGO_BIN_EXE_tidegate-lab").into()), ..Options::unique(name) };
    (one, Lab::up(scenario, &options).unwrap())
}

fn egress(family: Family) -> IpAddr {
    family.pick("203.0.113.10", "2001:db8::10").parse().unwrap()
}

/// Counts, at the router, what no policy lets out, and what goes where policy lets it with any other source.
fn leaks(lab: &Lab) -> Vec<Watch> {
    let mut all = Vec::new();
    for family in FAMILIES {
        all.push(lab.watch(named(family, 14, 0).ip(), "").unwrap());
        // Errors that a node sends about answers are its own.
        let other = format!("{} saddr != {} meta l4proto {{ tcp, udp }}", family.pick("ip", "ip6"), egress(family));
        all.extend([10, 12, 13, 16].map(|n| lab.watch(named(family, n, 0).ip(), &other).unwrap()));
    }
    all
}

#[track_caller]
fn nothing_leaked(watches: &[Watch]) {
    let packets: Vec<u64> = watches.iter().map(|w| w.packets().unwrap()).collect();
    assert!(packets.iter().all(|n| *n == 0), "packets at the router, by watch: {packets:?}");
}

/// A name that nobody asked for before works.
#[track_caller]
fn new_name(lab: &Lab, label: &str, limit: Duration) {
    for family in FAMILIES {
        let url = format!("https://{label}-{}.one.example.net/", family.pick("4", "6"));
        let seen = wait_for(limit, || curl(&lab.pod(POD), family, &url, &[]).source());
        assert_eq!(seen, Some(egress(family)), "{url}");
    }
}

/// Pins of a process, its only layout's, with the kernel's ids of what they hold.
fn pins(lab: &Lab, name: &str) -> BTreeMap<PathBuf, u32> {
    let mut out = BTreeMap::new();
    for file in files(&layout(lab, name).join("maps")) {
        out.insert(file.clone(), MapInfo::from_pin(&file).unwrap().id());
    }
    for file in files(&layout(lab, name).join("links")) {
        let link = FdLink::from(PinnedLink::from_pin(&file).unwrap());
        out.insert(file.clone(), link.info().unwrap().id());
    }
    out
}

fn files(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect()
}

/// The folder of a process's only set of maps.
#[track_caller]
fn layout(lab: &Lab, name: &str) -> PathBuf {
    let all = files(&lab.layout().bpffs().join(name));
    assert_eq!(all.len(), 1, "{all:?}");
    all[0].clone()
}

/// The programs on a device of a place, first to last.
fn programs(lab: &Lab, place: &str, device: &str) -> Vec<String> {
    foreign::programs(lab.place(place).unwrap().netns(), device).unwrap()
}

/// Adds keys to a process's configuration, and gives what it was.
fn lay(lab: &Lab, name: &str, keys: &str) -> String {
    let file = lab.layout().config(name);
    let before = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("{}\n{keys}\n", before.trim_end())).unwrap();
    before
}

fn drops(lab: &Lab, name: &str, hook: &str, reason: &str) -> f64 {
    let labels = [&format!("hook=\"{hook}\"") as &str, "outcome=\"drop\"", &format!("reason=\"{reason}\"")];
    lab.metric(name, "tidegate_packets_total", &labels).unwrap()
}

/// What would show that programs ran before their maps were filled. What was counted before a move still counts.
const EMPTY: [(&str, &str); 5] = [
    ("tunnel_ingress", "spoofed-source"),
    ("tunnel_ingress", "unknown-pod"),
    ("tunnel_ingress", "tunnel-port"),
    ("gateway_return", "unknown-pod"),
    ("pod_egress", "no-gateway"),
];

/// Killed, away, and back: live flows of every kind go on, new names work, what is denied stays out, and what is in the
/// kernel is adopted as it is.
#[test]
fn an_agent_is_killed_under_traffic_and_comes_back() {
    let (_one, mut lab) = up("agent");
    let watches = leaks(&lab);
    let steady = Steady::start(&lab, POD, &Servers::of_demo(&lab, POD).unwrap(), true).unwrap();
    new_name(&lab, "before", SOON);
    let held = pins(&lab, "node-1");
    for round in 0..2 {
        lab.signal("node-1", Signal::SIGKILL, Some(READY)).unwrap();
        steady.goes_on(SOON).unwrap();
        // Without its agent the node's misses are steered, and the gateway gives the same verdict.
        new_name(&lab, &format!("away{round}"), READY);
        steady.goes_on(SOON).unwrap();
        nothing_leaked(&watches);
        lab.start("node-1").unwrap();
        lab.wait_ready("node-1", READY).unwrap();
        new_name(&lab, &format!("back{round}"), SOON);
        steady.goes_on(SOON).unwrap();
        assert_eq!(pins(&lab, "node-1"), held, "maps and links are adopted");
        nothing_leaked(&watches);
    }
    steady.uncut().unwrap();
}

/// An agent with maps of other sizes, which are another layout, takes over from the one before it; and back again.
#[test]
fn an_agent_moves_to_other_maps_and_back_under_traffic() {
    let (_one, mut lab) = up("moves");
    let veth = world::veth(lab.scenario(), lab.scenario().pod(POD).unwrap());
    moves(&mut lab, "node-1", &[(&veth, 2), ("tgn", 1), ("eth0", 2)]);
}

/// The same on a gateway's node.
#[test]
fn the_agent_of_a_gateways_node_moves_to_other_maps_and_back_under_traffic() {
    let (_one, mut lab) = up("gwmoves");
    // Alone: where there is a peer, it takes over from a gateway whose agent is away for two seconds, which on a busy
    // machine an agent can be.
    lab.signal("gw-b", Signal::SIGTERM, Some(Duration::from_secs(35))).unwrap();
    moves(&mut lab, "gw-node-a", &[("tgq", 1), ("tgh", 1), ("tgn", 1), ("eth0", 2)]);
}

/// Moves a node's agent to other maps and back; each of `devices` has so many programs.
fn moves(lab: &mut Lab, node: &str, devices: &[(&str, usize)]) {
    let watches = leaks(lab);
    let steady = Steady::start(lab, POD, &Servers::of_demo(lab, POD).unwrap(), true).unwrap();
    let first = layout(lab, node);
    let config = lay(lab, node, "capacities: {flows: 131072, facts: 65536}");
    for (signal, restore) in [(Signal::SIGTERM, None), (Signal::SIGKILL, Some(&config))] {
        if let Some(config) = restore {
            std::fs::write(lab.layout().config(node), config).unwrap();
        }
        let before = pins(lab, node);
        let dropped = EMPTY.map(|(hook, reason)| drops(lab, node, hook, reason));
        lab.signal(node, signal, Some(READY)).unwrap();
        lab.start(node).unwrap();
        lab.wait_ready(node, READY).unwrap();
        steady.goes_on(READY).unwrap();
        assert_eq!(layout(lab, node) == first, restore.is_some(), "{node}: {signal}");
        let after = pins(lab, node);
        let maps = |pins: &BTreeMap<PathBuf, u32>| {
            let all = pins.iter().filter(|(pin, _)| pin.parent().is_some_and(|p| p.ends_with("maps")));
            all.map(|(_, id)| *id).collect::<Vec<_>>()
        };
        assert!(maps(&before).iter().all(|id| !maps(&after).contains(id)), "{node}: other maps");
        assert_eq!(before.len(), after.len(), "{node}: as many maps and links");
        for (device, n) in devices {
            let found = programs(lab, node, device);
            assert_eq!(found.len(), *n, "{node}: {device} has one set of programs: {found:?}");
        }
        let now = EMPTY.map(|(hook, reason)| drops(lab, node, hook, reason));
        // They are published every second, and until then 0.
        let grew: Vec<_> =
            EMPTY.iter().zip(now.iter().zip(dropped)).filter(|(_, (now, before))| *now > before).collect();
        assert!(grew.is_empty(), "{node} {signal}: {grew:?}");
        new_name(lab, &format!("{node}-{signal}").to_lowercase(), READY);
        nothing_leaked(&watches);
    }
    steady.uncut().unwrap();
}

/// The gateway's own program with other maps: forwarded flows go on in the kernel while its process is away, and the
/// program of the new maps judges only once they are filled.
#[test]
fn a_gateway_moves_to_other_maps_under_traffic() {
    let (_one, mut lab) = up("gwmaps");
    let watches = leaks(&lab);
    // Alone: a peer would take over, which cuts forwarded flows.
    lab.signal("gw-b", Signal::SIGTERM, Some(Duration::from_secs(35))).unwrap();
    let steady = Steady::start(&lab, POD, &Servers::of_demo(&lab, POD).unwrap(), false).unwrap();
    let first = layout(&lab, "gw-a");
    let config = lay(&lab, "gw-a", "capacities: {flows: 131072, facts: 65536}");
    for restore in [None, Some(&config)] {
        if let Some(config) = restore {
            std::fs::write(lab.layout().config("gw-a"), config).unwrap();
        }
        let spoofed = |lab: &Lab| drops(lab, "gw-a", "gateway_ingress", "spoofed-source");
        let before = spoofed(&lab);
        lab.signal("gw-a", Signal::SIGKILL, Some(READY)).unwrap();
        lab.start("gw-a").unwrap();
        lab.wait_ready("gw-a", READY).unwrap();
        steady.goes_on(READY).unwrap();
        let moved = wait_for(READY, || (files(&lab.layout().bpffs().join("gw-a")).len() == 1).then_some(()));
        assert!(moved.is_some(), "the old set is gone");
        assert_eq!(layout(&lab, "gw-a") == first, restore.is_some());
        assert_eq!(programs(&lab, "gw-a", "tgp"), ["gateway_ingress"]);
        assert!(spoofed(&lab) <= before);
        new_name(&lab, if restore.is_some() { "back" } else { "forth" }, READY);
        nothing_leaked(&watches);
    }
    steady.uncut().unwrap();
}
