//! Everything that Tidegate does to a machine, and that nothing of it is left when it is taken out.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use aya::maps::MapInfo;
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{SchedClassifier, TcAttachType};
use nix::sys::signal::Signal;
use tidegate_lab::family::{FAMILIES, Family};
use tidegate_lab::lab::wait_for;
use tidegate_lab::probe::{Knock, curl, knock};
use tidegate_lab::{Lab, Options, Output, Scenario};

const AGENTS: [&str; 4] = ["node-1", "node-2", "gw-node-a", "gw-node-b"];
const GATEWAYS: [&str; 2] = ["gw-a", "gw-b"];
const READY: Duration = Duration::from_secs(35);

/// What a place has, by what is looked at. Left out: what the kernel counts by itself.
const LOOK: [(&str, &str); 12] = [
    ("links", "ip -d -o link"),
    ("addresses", "ip -o addr"),
    ("routes", "(ip -4 route show table all; ip -6 route show table all) | sed 's/ expires [0-9]*sec//; /^anycast/d'"),
    ("rules", "ip rule; ip -6 rule"),
    ("neighbours", "ip neigh show nud permanent; ip neigh show proxy; ip -6 neigh show proxy"),
    ("forwarding tables", "bridge fdb show"),
    ("nftables", "nft -s list ruleset"),
    ("qdiscs", "tc qdisc show"),
    (
        "filters",
        "for d in $(ls /sys/class/net); do tc filter show dev $d ingress; tc filter show dev $d egress; done 2>&1",
    ),
    ("xfrm and tunnels", "ip xfrm state; ip xfrm policy; ip tunnel show"),
    ("listeners", "ss -lntuH | awk '{print $1, $5}' | sort -u"),
    (
        "sysctls",
        "sysctl -a 2>/dev/null | grep -E '^net\\.' | grep -vE 'nf_conntrack_count|\\.stable_secret|\\.mc_forwarding' | sort",
    ),
];

fn snapshot(lab: &Lab, place: &str) -> BTreeMap<&'static str, String> {
    let look = |line: &str| {
        let out = lab.place(place).unwrap().run(&["sh", "-c", line]);
        assert_eq!(out.status, 0, "{place}: {line}: {}", out.stderr);
        out.stdout
    };
    let mut all: BTreeMap<&str, String> = LOOK.iter().map(|(what, line)| (*what, look(line))).collect();
    all.insert("programs", programs(lab, place).join("\n"));
    all
}

/// Programs that hang by tcx on any device of a place.
fn programs(lab: &Lab, place: &str) -> Vec<String> {
    let look = || {
        let mut all = Vec::new();
        for (_, device) in nix::net::if_::if_nameindex().unwrap().iter().map(|i| (i.index(), i.name().to_owned())) {
            let device = device.to_str().unwrap().to_owned();
            for kind in [TcAttachType::Ingress, TcAttachType::Egress] {
                let (_, found) = SchedClassifier::query_tcx(&device, kind).unwrap();
                all.extend(
                    found.iter().map(|p| format!("{device} {kind:?} {} {}", p.id(), p.name_as_str().unwrap_or("?"))),
                );
            }
        }
        all
    };
    lab.place(place).unwrap().within(look).unwrap()
}

/// Every file below a folder.
fn tree(folder: &Path) -> BTreeSet<PathBuf> {
    let mut all = BTreeSet::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        all.insert(entry.path());
        if entry.path().is_dir() {
            all.extend(tree(&entry.path()));
        }
    }
    all
}

/// Ids of all maps and links that are pinned: names do not tell labs on one machine apart.
fn pinned(lab: &Lab) -> (BTreeSet<u32>, BTreeSet<u32>) {
    let files = tree(&lab.layout().bpffs());
    let below = |folder: &'static str| files.iter().filter(move |f| f.parent().is_some_and(|p| p.ends_with(folder)));
    let maps = below("maps").map(|f| MapInfo::from_pin(f).unwrap().id()).collect();
    let links = below("links").map(|f| FdLink::from(PinnedLink::from_pin(f).unwrap()).info().unwrap().program_id());
    (maps, links.collect())
}

fn cleanup(lab: &Lab, role: &str, name: &str) -> Output {
    let (binary, config) = (lab.tidegate().to_str().unwrap(), lab.layout().config(name));
    lab.place(name).unwrap().run(&[binary, role, "--config", config.to_str().unwrap(), "--cleanup"])
}

/// Compares what is there with what was there before.
#[track_caller]
fn same(lab: &Lab, place: &str, before: &BTreeMap<&'static str, String>) {
    let after = snapshot(lab, place);
    for (what, was) in before {
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
        let (was, now) = (lines(was), lines(&after[what]));
        let (more, less): (Vec<_>, Vec<_>) = (now.difference(&was).collect(), was.difference(&now).collect());
        assert!(more.is_empty() && less.is_empty(), "{place}: {what}: more {more:#?} less {less:#?}");
    }
}

/// Sysctls of a gateway's own namespace stay: nobody knows who else has come to need them, and they go with the pod. A
/// namespace that forwards is a router to its neighbours: it has anycast addresses and listens to routers' multicast.
fn without_sysctls(mut all: BTreeMap<&'static str, String>) -> BTreeMap<&'static str, String> {
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
    let nodes = AGENTS.map(|place| (place, snapshot(&lab, place)));
    let pods = ["shop/web", "untouched/app"].map(|place| (place, snapshot(&lab, place)));
    let gateways = GATEWAYS.map(|place| (place, without_sysctls(snapshot(&lab, place))));
    let files = (tree(&lab.layout().bpffs()), tree(&lab.layout().folder.join("socket")));

    lab.start_product().unwrap();
    for pod in ["shop/web", "shop/worker", "shop/local"] {
        for family in FAMILIES {
            let seen = curl(&lab.pod(pod), family, "https://api.example.com/", &[]);
            assert!(seen.source().is_some(), "{pod}: {}", seen.text());
        }
    }
    let (maps, programs) = pinned(&lab);
    assert!(maps.len() > 6 * 20 && programs.len() > 20, "{} {}", maps.len(), programs.len());
    for (place, before) in nodes.iter().chain(&gateways) {
        let now = snapshot(&lab, place);
        for what in ["links", "nftables", "programs"] {
            assert_ne!(now[what], before[what], "{place}: {what}: the look sees what Tidegate does");
        }
    }

    // While they run it is refused, and nothing is gone.
    for (role, name) in [("agent", "node-1"), ("gateway", "gw-a")] {
        let (maps, programs) = pinned(&lab);
        let out = cleanup(&lab, role, name);
        assert_ne!(out.status, 0, "{name} runs");
        assert!(out.stderr.contains("another process"), "{}", out.stderr);
        assert_eq!(pinned(&lab), (maps, programs), "{name}");
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
    assert_eq!(files, (tree(&lab.layout().bpffs()), tree(&lab.layout().folder.join("socket"))));
    // The kernel frees programs after a grace period.
    let gone = wait_for(READY, || {
        let maps = aya::maps::loaded_maps().flatten().filter(|m| maps.contains(&m.id())).count();
        let programs = aya::programs::loaded_programs().flatten().filter(|p| programs.contains(&p.id())).count();
        (maps + programs == 0).then_some(())
    });
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
