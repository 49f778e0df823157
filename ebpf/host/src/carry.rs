//! What the kernel knows in maps of another layout, taken over into a new set.
//!
//! An upgrade, or other sizes, makes a new set of maps beside the old one, whose programs go on until the new ones are
//! attached before them. Policy comes anew from the gateways; what only the kernel knows would be lost: flows that were
//! opened from outside, which facts are in use, and the ids and incarnations by which both are named.

use std::fs;
use std::path::{Path, PathBuf};

use aya::Pod;
use aya::maps::{HashMap, Map, MapData, MapError};
use tidegate_ebpf_common::Addr;
use tidegate_ebpf_common::layout::{CARRIED, Endpoint, Fact, FactKey, Flow, FlowKey, IdKey};

use crate::Error;
use crate::ids;
use crate::load::is_missing;

/// Refuse to write over an entry (`BPF_NOEXIST`).
const NO_EXIST: u64 = 1;

/// Other layouts below the folder of all pins.
pub(crate) fn others(pins: &Path, own: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(pins) else { return Vec::new() };
    let theirs = |p: &PathBuf| p != own && p.is_dir() && name(p).starts_with('v');
    entries.flatten().map(|e| e.path()).filter(theirs).collect()
}

fn name(path: &Path) -> &str {
    path.file_name().and_then(|n| n.to_str()).unwrap_or_default()
}

fn pins(root: &Path, folder: &str) -> usize {
    fs::read_dir(root.join(folder)).map_or(0, Iterator::count)
}

/// Whether a layout is what a start left that was never finished: no program judges by it, while some do by `own`, or
/// there are no maps.
pub(crate) fn is_left(other: &Path, own: &Path) -> bool {
    pins(other, "links") == 0 && (pins(own, "links") > 0 || pins(other, "maps") == 0)
}

/// The layout whose programs run now, if what it knows is written as this version writes it: the one with the most
/// links, since one that a crash left unfinished has fewer.
pub(crate) fn source(others: &[PathBuf]) -> Option<PathBuf> {
    let same = |p: &&PathBuf| name(p).split('-').nth(1) == Some(CARRIED.to_string().as_str());
    others.iter().filter(same).max_by_key(|p| pins(p, "links")).cloned()
}

fn open<K: Pod, V: Pod>(root: &Path, map: &'static str) -> Result<HashMap<MapData, K, V>, Error> {
    let data = MapData::from_pin(root.join("maps").join(map)).map_err(Error::map(map))?;
    Map::from_map_data(data).and_then(HashMap::try_from).map_err(Error::map(map))
}

fn is(e: &MapError, code: i32) -> bool {
    matches!(e, MapError::SyscallError(e) if e.io_error.raw_os_error() == Some(code))
}

/// Copies entries as far as they fit; with [`NO_EXIST`] those that the new map does not have. Returns how many.
fn copy<K: Pod, V: Pod>(
    from: &Path,
    to: &Path,
    map: &'static str,
    flags: u64,
    which: impl Fn(&K) -> bool,
) -> Result<usize, Error> {
    let (old, mut new) = (open::<K, V>(from, map)?, open::<K, V>(to, map)?);
    // The kernel may write meanwhile, and an iteration that loses its place starts over.
    let most = MapData::from_pin(from.join("maps").join(map)).and_then(|m| m.info()).map_err(Error::map(map))?;
    let mut n = 0;
    for (key, value) in old.iter().flatten().take(most.max_entries() as usize) {
        if !which(&key) {
            continue;
        }
        match new.insert(key, value, flags) {
            Ok(()) => n += 1,
            Err(e) if is(&e, libc::EEXIST) => {}
            Err(e) if is(&e, libc::E2BIG) => {
                tracing::warn!(map, "the new map is smaller than what the old one holds; the rest is not taken over");
                break;
            }
            Err(e) => return Err(Error::map(map)(e)),
        }
    }
    Ok(n)
}

/// Whether a set of maps gives ids by itself: then nothing may be filled in that is named by another's.
pub(crate) fn is_own(root: &Path) -> Result<bool, Error> {
    Ok(open::<IdKey, u32>(root, "IDS")?.get(&ids::OWN, 0).is_ok())
}

/// Notes that a set of maps gives ids by itself from now on.
pub(crate) fn own(root: &Path) -> Result<(), Error> {
    open::<IdKey, u32>(root, "IDS")?.insert(ids::OWN, 1, 0).map_err(Error::map("IDS"))
}

/// Fills a set of maps that gives no ids by itself yet. What an earlier try left there is written over.
pub(crate) fn fill(from: &Path, to: &Path) -> Result<(), Error> {
    // First the counters, then what they counted, then what is named by it: wherever it ends, no id that something refers
    // to is given to something else.
    copy::<IdKey, u32>(from, to, "IDS", 0, |k| ids::is_counter(k) && *k != ids::OWN)?;
    copy::<IdKey, u32>(from, to, "IDS", 0, |k| !ids::is_counter(k))?;
    copy::<Addr, Endpoint>(from, to, "ENDPOINTS", 0, |_| true)?;
    let facts = copy::<FactKey, Fact>(from, to, "FACTS", 0, |_| true)?;
    let seen = flows(from, to)?;
    tracing::info!(from = %from.display(), facts, flows = seen, "took over what another layout knows");
    Ok(())
}

/// Holds an address for the old programs, too, or lets it go: until they are replaced it is they who carry packets.
pub(crate) fn hold(old: &Path, address: Addr, deadline: Option<u64>) -> Result<(), Error> {
    let mut held = open::<Addr, u64>(old, "HELD")?;
    match deadline {
        Some(deadline) => held.insert(address, deadline, 0).map_err(Error::map("HELD")),
        None => match held.remove(&address) {
            Err(e) if !is_missing(&e) => Err(Error::map("HELD")(e)),
            _ => Ok(()),
        },
    }
}

/// Forgets the gateways' signs of life. What they tell from now on goes to whoever was just loaded, so that no program
/// may drop a miss for what it knows.
pub(crate) fn silence(root: &Path) -> Result<(), Error> {
    if !root.join("maps/HEARTBEATS").exists() {
        return Ok(());
    }
    let mut heartbeats = open::<u32, u64>(root, "HEARTBEATS")?;
    for id in heartbeats.keys().flatten().collect::<Vec<_>>() {
        match heartbeats.remove(&id) {
            Err(e) if !is_missing(&e) => return Err(Error::map("HEARTBEATS")(e)),
            _ => {}
        }
    }
    Ok(())
}

/// What the old programs remembered since: flows, and the addresses that they hold.
pub(crate) fn flows(from: &Path, to: &Path) -> Result<usize, Error> {
    copy::<Addr, u64>(from, to, "HELD", NO_EXIST, |_| true)?;
    copy::<Addr, u32>(from, to, "FLOW_COUNTS", NO_EXIST, |_| true)?;
    copy::<FlowKey, Flow>(from, to, "FLOWS", NO_EXIST, |_| true)
}
