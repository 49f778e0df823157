//! What a place has in its kernel, to be compared before and after.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use aya::maps::MapInfo;
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{SchedClassifier, TcAttachType};

use crate::place::Place;

/// What is looked at, and how. Left out: what the kernel counts by itself.
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

/// Texts of many lines, by what was looked at.
pub type Traces = BTreeMap<&'static str, String>;

/// Looks at a place.
///
/// # Errors
/// When a tool fails, or the kernel does not say what is attached.
pub fn of(place: &Place<'_>) -> Result<Traces> {
    let mut all = Traces::new();
    for (what, line) in LOOK {
        let out = place.try_run(&["sh", "-c", line])?;
        ensure!(out.status == 0, "{}: {line}: {}", place.name(), out.stderr);
        all.insert(what, out.stdout);
    }
    all.insert("programs", place.within(programs)??.join("\n"));
    Ok(all)
}

/// Programs that hang by tcx on any device of the calling thread's namespace.
fn programs() -> Result<Vec<String>> {
    let mut all = Vec::new();
    for interface in &nix::net::if_::if_nameindex()? {
        let device = interface.name().to_string_lossy().into_owned();
        for kind in [TcAttachType::Ingress, TcAttachType::Egress] {
            let (_, found) = SchedClassifier::query_tcx(&device, kind).with_context(|| device.clone())?;
            let line = |p: &aya::programs::ProgramInfo| {
                format!("{device} {kind:?} {} {}", p.id(), p.name_as_str().unwrap_or("?"))
            };
            all.extend(found.iter().map(line));
        }
    }
    Ok(all)
}

/// Lines that are there now and were not, and those that were and are not.
pub fn differences(before: &Traces, after: &Traces) -> Vec<String> {
    let lines =
        |text: Option<&String>| text.into_iter().flat_map(|t| t.lines()).map(str::to_owned).collect::<BTreeSet<_>>();
    let mut found = Vec::new();
    for (what, was) in before {
        let (was, now) = (lines(Some(was)), lines(after.get(what)));
        found.extend(now.difference(&was).map(|line| format!("{what}: more: {line}")));
        found.extend(was.difference(&now).map(|line| format!("{what}: less: {line}")));
    }
    found
}

/// Every file and folder below a folder.
pub fn tree(folder: &Path) -> BTreeSet<PathBuf> {
    let mut all = BTreeSet::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        all.insert(entry.path());
        if entry.path().is_dir() {
            all.extend(tree(&entry.path()));
        }
    }
    all
}

/// Ids of the maps that are pinned below a folder, and of the programs of pinned links: names do not tell machines on one
/// kernel apart.
///
/// # Errors
/// When a pin is none.
pub fn pinned(folder: &Path) -> Result<(BTreeSet<u32>, BTreeSet<u32>)> {
    let (mut maps, mut programs) = (BTreeSet::new(), BTreeSet::new());
    for file in tree(folder) {
        let is_in = |folder: &str| file.parent().is_some_and(|p| p.ends_with(folder));
        if is_in("maps") {
            maps.insert(MapInfo::from_pin(&file)?.id());
        } else if is_in("links") {
            programs.insert(FdLink::from(PinnedLink::from_pin(&file)?).info()?.program_id());
        }
    }
    Ok((maps, programs))
}

/// How many of these are in the kernel still.
pub fn loaded(maps: &BTreeSet<u32>, programs: &BTreeSet<u32>) -> usize {
    let maps = aya::maps::loaded_maps().flatten().filter(|m| maps.contains(&m.id())).count();
    maps + aya::programs::loaded_programs().flatten().filter(|p| programs.contains(&p.id())).count()
}
