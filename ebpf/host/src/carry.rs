//! What the kernel knows in maps of another layout, taken over into a new set.
//!
//! An upgrade, or other sizes, makes a new set of maps beside the old one, whose programs go on until the new ones are
//! attached before them. Policy comes anew from the gateways; what only the kernel knows would be lost: flows that were
//! opened from outside, which facts are in use, and the ids and incarnations by which both are named.

use std::fs;
use std::path::{Path, PathBuf};

use ahash::AHashMap;
use aya::Pod;
use aya::maps::{HashMap, Map, MapData, MapError, PerCpuArray, PerCpuValues, RingBuf};
use tidegate_ebpf_common::Addr;
use tidegate_ebpf_common::code::COUNTERS;
use tidegate_ebpf_common::layout::{Budget, CARRIED, Endpoint, Fact, FactKey, Flow, FlowKey, IdKey};

use crate::Error;
use crate::ids;
use crate::load::{BUDGETS, is_missing};

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

fn open_array<V: Pod>(root: &Path, map: &'static str) -> Result<PerCpuArray<MapData, V>, Error> {
    let data = MapData::from_pin(root.join("maps").join(map)).map_err(Error::map(map))?;
    Map::from_map_data(data).and_then(PerCpuArray::try_from).map_err(Error::map(map))
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
    counts(from, to)?;
    tracing::info!(from = %from.display(), facts, flows = seen, "took over what another layout knows");
    Ok(())
}

/// What was counted in maps before a set: one number each, in the second halves of `COUNTERS` and `BUDGETS`, where no
/// program writes. There it survives this process.
#[derive(Debug, Default)]
pub(crate) struct Before {
    /// Packets, by the index of the counter.
    pub counters: Vec<u64>,
    /// Events that were not written, or not read.
    pub suppressed: u64,
}

/// Reads what was counted before a set.
pub(crate) fn before(root: &Path) -> Result<Before, Error> {
    let (counters, budgets) = (open_array::<u64>(root, "COUNTERS")?, open_array::<Budget>(root, "BUDGETS")?);
    let counter = |i| counters.get(&(COUNTERS + i), 0).map(|n| n.iter().sum()).map_err(Error::map("COUNTERS"));
    let budget = budgets.get(&BUDGETS, 0).map_err(Error::map("BUDGETS"))?;
    Ok(Before {
        counters: (0..COUNTERS).map(counter).collect::<Result<_, _>>()?,
        suppressed: budget.iter().map(|b| b.suppressed).sum(),
    })
}

/// Takes over what a set has counted until now, with what was counted before it.
pub(crate) fn counts(from: &Path, to: &Path) -> Result<(), Error> {
    // An array of another size has other places.
    let old = open_array::<u64>(from, "COUNTERS")?;
    if old.len() != 2 * COUNTERS {
        return Err(Error::Layout { map: "COUNTERS", what: format!("{} entries", old.len()) });
    }
    let mut new = open_array::<u64>(to, "COUNTERS")?;
    let earlier = before(from)?;
    for i in 0..COUNTERS {
        let now: u64 = old.get(&i, 0).map_err(Error::map("COUNTERS"))?.iter().sum();
        put(&mut new, COUNTERS + i, now + earlier.counters[i as usize]).map_err(Error::map("COUNTERS"))?;
    }
    let (old, mut new) = (open_array::<Budget>(from, "BUDGETS")?, open_array::<Budget>(to, "BUDGETS")?);
    let mut suppressed = earlier.suppressed;
    for i in 0..BUDGETS {
        let now = old.get(&i, 0).map_err(Error::map("BUDGETS"))?;
        suppressed += now.iter().map(|b| b.suppressed).sum::<u64>();
    }
    put(&mut new, BUDGETS, Budget { suppressed, ..Budget::default() }).map_err(Error::map("BUDGETS"))
}

/// Writes one number for all CPUs.
fn put<V: Pod + Default>(map: &mut PerCpuArray<MapData, V>, index: u32, value: V) -> Result<(), MapError> {
    let cpus = map.get(&index, 0)?.len();
    let mut values = vec![V::default(); cpus];
    values[0] = value;
    map.set(index, PerCpuValues::try_from(values)?, 0)
}

/// Records in the ring of programs that are detached: nobody reads them any more. Returns how many.
pub(crate) fn unread(root: &Path) -> Result<u64, Error> {
    let data = MapData::from_pin(root.join("maps/EVENTS")).map_err(Error::map("EVENTS"))?;
    let mut ring: RingBuf<MapData> =
        Map::from_map_data(data).and_then(RingBuf::try_from).map_err(Error::map("EVENTS"))?;
    let mut n = 0;
    while ring.next().is_some() {
        n += 1;
    }
    Ok(n)
}

/// Adds events that were not read to what was counted before a set.
pub(crate) fn suppress(root: &Path, events: u64) -> Result<(), Error> {
    let suppressed = before(root)?.suppressed + events;
    let mut budgets = open_array::<Budget>(root, "BUDGETS")?;
    put(&mut budgets, BUDGETS, Budget { suppressed, ..Budget::default() }).map_err(Error::map("BUDGETS"))
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

/// Gives the old programs the node's addresses, too, if they ask for them.
pub(crate) fn addresses(old: &Path, own: &AHashMap<Addr, u32>) -> Result<(), Error> {
    if !old.join("maps/OWN").exists() {
        return Ok(());
    }
    let mut held = open::<Addr, u32>(old, "OWN")?;
    own.iter().try_for_each(|(address, one)| held.insert(address, one, 0).map_err(Error::map("OWN")))
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
