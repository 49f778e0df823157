//! What pinned maps hold, as text: for people who look for a fault. It only reads, and needs nothing of the process at work.

use std::fmt::Debug;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use aya::Pod;
use aya::maps::lpm_trie::LpmTrie;
use aya::maps::{HashMap, Map, MapData, MapError, MapInfo};
use tidegate_ebpf_common::layout::{
    Addr, DnsKey, Endpoint, Fact, FactKey, Flow, FlowKey, Gateway, GrantKey, Group, IdKey, Iface, Node, Prefix,
    PrefixKey, Scope,
};

/// Entries of a map that are counted at most: each costs a system call.
const COUNTED: usize = 200_000;

/// Writes of every map below a folder of pins what it is, how many entries it has, and the first `most` of them.
///
/// # Errors
/// The folder cannot be read, or `out` takes no more. A map that cannot be read is said to be so.
pub fn dump(pins: &Path, most: usize, out: &mut impl Write) -> io::Result<()> {
    for folder in sorted(pins)? {
        let maps = folder.join("maps");
        if !maps.is_dir() {
            continue;
        }
        for path in sorted(&maps)? {
            if let Err(error) = one(&path, most, out)? {
                writeln!(out, "{}: {error}", path.display())?;
            }
        }
    }
    Ok(())
}

fn sorted(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut all: Vec<PathBuf> = std::fs::read_dir(folder)?.flatten().map(|e| e.path()).collect();
    all.sort();
    Ok(all)
}

fn one(path: &Path, most: usize, out: &mut impl Write) -> io::Result<Result<(), MapError>> {
    let info = match MapInfo::from_pin(path) {
        Ok(info) => info,
        Err(error) => return Ok(Err(error)),
    };
    let (key, value, entries) = (info.key_size(), info.value_size(), info.max_entries());
    writeln!(out, "{}: id {}, key {key}, value {value}, room for {entries}", path.display(), info.id())?;
    match path.file_name().and_then(|n| n.to_str()).unwrap_or_default() {
        "ENDPOINTS" => hash::<Addr, Endpoint>(path, most, out),
        "IFACES" => hash::<u32, Iface>(path, most, out),
        "GROUPS" => hash::<u32, Group>(path, most, out),
        "SCOPES" => hash::<u32, Scope>(path, most, out),
        "GATEWAYS" => hash::<u32, Gateway>(path, most, out),
        "HEARTBEATS" => hash::<u32, u64>(path, most, out),
        "NODES" => hash::<Addr, Node>(path, most, out),
        "OUTER" => hash::<u32, Addr>(path, most, out),
        "OWN" => hash::<Addr, u32>(path, most, out),
        "FACTS" => hash::<FactKey, Fact>(path, most, out),
        "GRANTS" => hash::<GrantKey, u32>(path, most, out),
        "PREFIXES" => trie::<Prefix>(path, most, out),
        "CLUSTER" => trie::<u32>(path, most, out),
        "CLUSTER_DNS" => hash::<DnsKey, u32>(path, most, out),
        "HELD" => hash::<Addr, u64>(path, most, out),
        "FLOWS" => hash::<FlowKey, Flow>(path, most, out),
        "FLOW_COUNTS" => hash::<Addr, u32>(path, most, out),
        "IDS" => hash::<IdKey, u32>(path, most, out),
        "NAMES" => hash::<u64, u32>(path, most, out),
        // Arrays and rings: the metrics have what they count, and the key of names' hashes is nobody's business.
        _ => Ok(Ok(())),
    }
}

fn open<T: TryFrom<Map, Error = MapError>>(path: &Path) -> Result<T, MapError> {
    MapData::from_pin(path).and_then(Map::from_map_data).and_then(T::try_from)
}

fn hash<K: Pod + Debug, V: Pod + Debug>(
    path: &Path,
    most: usize,
    out: &mut impl Write,
) -> io::Result<Result<(), MapError>> {
    let map: HashMap<MapData, K, V> = match open(path) {
        Ok(map) => map,
        Err(error) => return Ok(Err(error)),
    };
    let line = |(key, value)| format!("{key:?} {value:?}");
    entries(map.iter().map(|e| e.map(line)), most, out)
}

fn trie<V: Pod + Debug>(path: &Path, most: usize, out: &mut impl Write) -> io::Result<Result<(), MapError>> {
    let map: LpmTrie<MapData, PrefixKey, V> = match open(path) {
        Ok(map) => map,
        Err(error) => return Ok(Err(error)),
    };
    let line = |(key, value): (aya::maps::lpm_trie::Key<PrefixKey>, V)| {
        let (bits, data) = (key.prefix_len(), key.data());
        format!("{data:?}/{bits} {value:?}")
    };
    entries(map.iter().map(|e| e.map(line)), most, out)
}

fn entries(
    all: impl Iterator<Item = Result<String, MapError>>,
    most: usize,
    out: &mut impl Write,
) -> io::Result<Result<(), MapError>> {
    let mut n = 0;
    // The kernel may write meanwhile: an entry that is gone is none, and an iteration that loses its place starts over.
    for line in all.take(COUNTED).flatten() {
        n += 1;
        if n <= most {
            writeln!(out, "  {line}")?;
        }
    }
    writeln!(out, "  {n} entries{}", if n == COUNTED { ", or more" } else { "" })?;
    Ok(Ok(()))
}
