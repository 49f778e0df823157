//! The names of Services, as the kernel knows them.

use std::fs::File;
use std::io::Read;

use ahash::AHashMap;
use tidegate_ebpf_common::layout::{Naming, SUFFIXES, Suffix};
use tidegate_ebpf_common::names::{hash, named};
use tidegate_policy::state::{MAX_NAMES, Named, NodeState};

use crate::Error;

/// A key as it was, or a new one.
///
/// # Errors
/// The kernel gives no random octets.
pub(crate) fn key(held: [u64; 2]) -> Result<[u64; 2], Error> {
    let mut key = held;
    let mut octets = [0; 16];
    while key == [0; 2] {
        let path = "/dev/urandom";
        let read = File::open(path).and_then(|mut f| f.read_exact(&mut octets));
        read.map_err(Error::io(format!("cannot read {path}")))?;
        let words = u128::from_ne_bytes(octets);
        key = [(words >> 64) as u64, words as u64];
    }
    Ok(key)
}

/// How names below these suffixes are told from others; of more than there is place for the first.
pub(crate) fn naming(key: [u64; 2], suffixes: &[String]) -> Naming {
    let mut out = Naming { key, ..Naming::default() };
    let all = suffixes.iter().filter_map(|s| Suffix::new(s)).take(SUFFIXES);
    out.suffixes.iter_mut().zip(all).for_each(|(to, suffix)| *to = suffix);
    out
}

/// The kernel's entries of a name that stands without its suffix.
fn hashes<'a>(key: &'a [u64; 2], suffixes: &'a [String], name: &'a str) -> impl Iterator<Item = u64> + 'a {
    suffixes.iter().filter_map(move |suffix| hash(key, &format!("{name}.{suffix}")))
}

const fn value(named: Named) -> u32 {
    match named {
        Named::Inside => named::INSIDE,
        Named::Outside => named::OUTSIDE,
    }
}

/// The kernel's entries of all names; of more than there is place for some.
pub(crate) fn entries(key: &[u64; 2], state: &NodeState) -> AHashMap<u64, u32> {
    let mut out = AHashMap::new();
    for (name, named) in state.names.iter() {
        for hash in hashes(key, &state.cluster.suffixes, name) {
            if out.len() >= MAX_NAMES {
                return out;
            }
            out.insert(hash, value(*named));
        }
    }
    out
}

/// What leads from the entries of one state to those of the next, at the cost of the names that differ. `None` where all have to
/// be looked at: the suffixes are others, or some names may have no place.
pub(crate) fn step(key: &[u64; 2], old: &NodeState, new: &NodeState) -> Option<Vec<(u64, Option<u32>)>> {
    let suffixes = &new.cluster.suffixes;
    let most = old.names.len().max(new.names.len()).saturating_mul(suffixes.len());
    if old.cluster.suffixes != *suffixes || most > MAX_NAMES {
        return None;
    }
    // What goes makes place for what comes.
    let (mut gone, mut come) = (Vec::new(), Vec::new());
    new.names.compare(&old.names, |name, old, new| {
        let to = if new.is_some() { &mut come } else { &mut gone };
        if old != new {
            to.extend(hashes(key, suffixes, name).map(|hash| (hash, new.copied().map(value))));
        }
    });
    gone.append(&mut come);
    Some(gone)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: [u64; 2] = [1, 2];

    fn state(names: usize) -> NodeState {
        let mut out = NodeState::default();
        out.cluster.suffixes = vec!["cluster.local".into(), "corp.example".into()];
        for n in 0..names {
            out.names.insert(format!("s{n}.shop.svc").into(), Named::Inside);
        }
        out
    }

    #[test]
    fn a_change_of_one_service_costs_its_own_entries() {
        let old = state(20_000);
        let mut new = old.clone();
        new.names.remove("s7.shop.svc");
        new.names.insert("s8.shop.svc".into(), Named::Outside);
        new.names.insert("new.shop.svc".into(), Named::Inside);
        let step = step(&KEY, &old, &new).unwrap();
        assert_eq!(step.len(), 3 * 2);
        assert!(step[..2].iter().all(|(_, value)| value.is_none()), "what goes makes place");
        let mut all = entries(&KEY, &old);
        for (hash, value) in step {
            match value {
                Some(value) => drop(all.insert(hash, value)),
                None => drop(all.remove(&hash)),
            }
        }
        assert_eq!(all, entries(&KEY, &new));
    }

    #[test]
    fn all_names_are_looked_at_when_any_may_have_another_entry() {
        let old = state(3);
        let mut new = old.clone();
        new.cluster.suffixes.pop();
        assert!(step(&KEY, &old, &new).is_none());
        let (full, next) = (state(MAX_NAMES / 2), state(MAX_NAMES / 2 + 1));
        assert!(step(&KEY, &full, &next).is_none() && step(&KEY, &next, &full).is_none());
        assert_eq!(entries(&KEY, &next).len(), MAX_NAMES);
    }
}
