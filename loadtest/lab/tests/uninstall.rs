//! Everything that Tidegate does to a machine, and that nothing of it is left when it is taken out.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use nix::sys::signal::Signal;
use tidegate_lab::family::{FAMILIES, Family};
use tidegate_lab::lab::wait_for;
use tidegate_lab::probe::{Knock, curl, knock};
use tidegate_lab::traces::{self, Traces};
use tidegate_lab::{Lab, Options, Output, Scenario};

const AGENTS: [&str; 4] = ["node-1", "node-2", "gw-node-a", "gw-node-b"];
const GATEWAYS: [&str; 2] = ["gw-a", "gw-b"];
const READY: Duration = Duration::from_secs(35);

fn cleanup(lab: &Lab, role: &str, name: &str) -> Output {
    let (binary, config) = (lab.tidegate().to_str().unwrap(), lab.layout().config(name));
    lab.place(name).unwrap().run(&[binary, role, "--config", config.to_str().unwrap(), "--cleanup"])
}

/// Compares what is there with what was there before.
#[track_caller]
fn same(lab: &Lab, place: &str, before: &Traces) {
    let found = traces::differences(before, &traces::of(&lab.place(place).unwrap()).unwrap());
    assert!(found.is_empty(), "{place}: {found:#?}");
}

/// Sysctls of a gateway's own namespace stay: nobody knows who else has come to need them, and they go with the pod. A
/// namespace that forwards is a router to its neighbours: it has anycast addresses and listens to routers' multicast.
fn without_sysctls(mut all: Traces) -> Traces {
    all.remove("sysctls");
    all.remove("forwarding tables");
    all
}

#[test]
fn nothing_is_left_of_a_clean_uninstall() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/demo.yaml");
    let scenario = Scenario::load(file.as_ref()).unwrap();
    let lab_binary = Some(env!("CARGO_BIN_EXE_tidegate-lab").into());
    let options = Options { lab: lab_binary, idle: true, ..Options::unique("clean") };
    let mut lab = Lab::up(scenario, &options).unwrap();
    // Conntrack's keys and neighbours come with the first packets.
    let free = |lab: &Lab, family: Family| {
        let url = family.pick("http://198.51.100.14/", "http://[2001:db8:100::14]/");
        curl(&lab.pod("shop/web"), family, url, &[])
    };
    for family in FAMILIES {
        assert!(free(&lab, family).source().is_some());
    }
    let nodes = AGENTS.map(|place| (place, traces::of(&lab.place(place).unwrap()).unwrap()));
    let pods = ["shop/web", "untouched/app"].map(|place| (place, traces::of(&lab.place(place).unwrap()).unwrap()));
    let gateways = GATEWAYS.map(|place| (place, without_sysctls(traces::of(&lab.place(place).unwrap()).unwrap())));
    let files = (traces::tree(&lab.layout().bpffs()), traces::tree(&lab.layout().folder.join("socket")));

    lab.start_product().unwrap();
    for pod in ["shop/web", "shop/worker", "shop/local"] {
        for family in FAMILIES {
            let seen = curl(&lab.pod(pod), family, "https://api.example.com/", &[]);
            assert!(seen.source().is_some(), "{pod}: {}", seen.text());
        }
    }
    let (maps, programs) = traces::pinned(&lab.layout().bpffs()).unwrap();
    assert!(maps.len() > 6 * 20 && programs.len() > 20, "{} {}", maps.len(), programs.len());
    for (place, before) in nodes.iter().chain(&gateways) {
        let now = traces::of(&lab.place(place).unwrap()).unwrap();
        for what in ["links", "nftables", "programs"] {
            assert_ne!(now[what], before[what], "{place}: {what}: the look sees what Tidegate does");
        }
    }

    // While they run it is refused, and nothing is gone.
    for (role, name) in [("agent", "node-1"), ("gateway", "gw-a")] {
        let (maps, programs) = traces::pinned(&lab.layout().bpffs()).unwrap();
        let out = cleanup(&lab, role, name);
        assert_ne!(out.status, 0, "{name} runs");
        assert!(out.stderr.contains("another process"), "{}", out.stderr);
        assert_eq!(traces::pinned(&lab.layout().bpffs()).unwrap(), (maps, programs), "{name}");
    }
    for gateway in GATEWAYS {
        lab.signal(gateway, Signal::SIGTERM, Some(READY)).unwrap();
    }
    for (agent, signal) in AGENTS.into_iter().zip([Signal::SIGTERM, Signal::SIGKILL].into_iter().cycle()) {
        lab.signal(agent, signal, Some(READY)).unwrap();
    }
    // SIGTERM alone leaves enforcement.
    for family in FAMILIES {
        let denied = family.pick("198.51.100.14:443", "[2001:db8:100::14]:443").parse().unwrap();
        assert_eq!(knock(&lab.pod("shop/web"), denied).unwrap(), Knock::Silent);
    }
    // The second time there is nothing to do, and that is fine.
    for _ in 0..2 {
        for (role, name) in GATEWAYS.map(|g| ("gateway", g)).into_iter().chain(AGENTS.map(|a| ("agent", a))) {
            let out = cleanup(&lab, role, name);
            assert_eq!(out.status, 0, "{name}: {}", out.stderr);
        }
    }
    assert_eq!(files, (traces::tree(&lab.layout().bpffs()), traces::tree(&lab.layout().folder.join("socket"))));
    // The kernel frees programs after a grace period.
    let gone = wait_for(READY, || (traces::loaded(&maps, &programs) == 0).then_some(()));
    assert!(gone.is_some(), "maps or programs are still loaded");
    for (place, before) in nodes.iter().chain(&pods) {
        same(&lab, place, before);
    }
    for (place, before) in &gateways {
        same(&lab, place, before);
    }
    for family in FAMILIES {
        let seen = free(&lab, family);
        assert!(seen.source().is_some(), "traffic flows as before: {}", seen.text());
    }
}
