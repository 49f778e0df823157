//! The names of Services, as the kernel knows them.

use std::fs::File;
use std::io::Read;

use ahash::AHashMap;
use tidegate_ebpf_common::layout::{Naming, SUFFIXES, Suffix};
use tidegate_ebpf_common::names::{hash, named};
use tidegate_policy::state::{MAX_NAMES, Named};

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

/// The kernel's entries of names that stand without their suffix.
pub(crate) fn entries<'a>(
    key: &[u64; 2],
    suffixes: &[String],
    names: impl Iterator<Item = (&'a str, Named)>,
) -> AHashMap<u64, u32> {
    let mut out = AHashMap::new();
    for (name, named) in names {
        let value = match named {
            Named::Inside => named::INSIDE,
            Named::Outside => named::OUTSIDE,
        };
        for suffix in suffixes {
            if out.len() >= MAX_NAMES {
                return out;
            }
            if let Some(hash) = hash(key, &format!("{name}.{suffix}")) {
                out.insert(hash, value);
            }
        }
    }
    out
}
