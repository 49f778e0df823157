//! Port sets in the kernel: interned by content, chained in entries of eight ranges.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use ahash::{AHashMap, AHashSet};
use aya::maps::{Array, MapData};
use tidegate_ebpf_common::layout::{CHAIN, PortSet as Entry, RANGES, Range, via};
use tidegate_policy::{Carry, PortSet, Via};

use crate::Error;

const MAP: &str = "PORTSETS";

/// How long an entry rests before it is written again: a program may still follow an older reference.
const REST: Duration = Duration::from_secs(1);

/// The kernel's code of a [`Via`].
fn via_code(v: Via) -> u8 {
    match v {
        Via::Allow(Carry::Forward) => via::FORWARD,
        Via::Allow(Carry::Tls) => via::TLS,
        Via::Allow(Carry::Block) => via::BLOCK,
        Via::Deny => via::DENY,
        Via::Pass => via::PASS,
    }
}

pub(crate) struct PortSets {
    map: Array<MapData, Entry>,
    by_content: AHashMap<Vec<Range>, u32>,
    /// Content and entries of each set, by its first entry.
    sets: AHashMap<u32, (Vec<Range>, Vec<u32>)>,
    used: AHashSet<u32>,
    free: Vec<u32>,
    resting: VecDeque<(Instant, Vec<u32>)>,
    /// First entry that was never written; 0 is the empty set.
    next: u32,
}

impl PortSets {
    /// Takes over what the kernel holds: `heads` are the sets that grants and prefixes refer to.
    pub fn adopt(map: Array<MapData, Entry>, heads: impl Iterator<Item = u32>) -> Result<Self, Error> {
        let mut this = Self {
            map,
            by_content: AHashMap::new(),
            sets: AHashMap::new(),
            used: AHashSet::new(),
            free: Vec::new(),
            resting: VecDeque::new(),
            next: 1,
        };
        let mut taken = AHashSet::new();
        for head in heads {
            if head == 0 || this.sets.contains_key(&head) {
                continue;
            }
            let (content, entries) = this.read(head)?;
            taken.extend(entries.iter().copied());
            this.by_content.insert(content.clone(), head);
            this.sets.insert(head, (content, entries));
        }
        this.next = taken.iter().max().map_or(1, |m| m + 1);
        this.free = (1..this.next).filter(|i| !taken.contains(i)).collect();
        Ok(this)
    }

    fn read(&self, head: u32) -> Result<(Vec<Range>, Vec<u32>), Error> {
        let (mut content, mut entries, mut id) = (Vec::new(), Vec::new(), head);
        for _ in 0..CHAIN {
            let entry = self.map.get(&id, 0).map_err(Error::map(MAP))?;
            entries.push(id);
            content.extend(entry.ranges.iter().filter(|r| r.via != via::NONE));
            id = entry.next;
            if id == 0 {
                break;
            }
        }
        Ok((content, entries))
    }

    /// How many entries are in use, resting ones included.
    pub fn taken(&self) -> usize {
        self.next as usize - 1 - self.free.len()
    }

    /// Rereads every set; those whose entries were changed by others are written again.
    pub fn repair(&mut self) -> Result<usize, Error> {
        let mut wrong = 0;
        for (head, (content, entries)) in &self.sets {
            if self.read(*head)? != (content.clone(), entries.clone()) {
                wrong += 1;
                write(&mut self.map, content, entries)?;
            }
        }
        Ok(wrong)
    }

    /// Starts a pass: every set that is not asked for until [`Self::finish`] goes.
    pub fn begin(&mut self) {
        self.used.clear();
        while self.resting.front().is_some_and(|(at, _)| at.elapsed() >= REST) {
            if let Some((_, entries)) = self.resting.pop_front() {
                self.free.extend(entries);
            }
        }
    }

    /// The set's id, 0 for the empty set.
    pub fn intern(&mut self, set: &PortSet) -> Result<u32, Error> {
        if set.is_empty() {
            return Ok(0);
        }
        let content: Vec<Range> = set
            .ranges()
            .iter()
            .map(|r| Range { lo: r.lo, hi: r.hi, proto: r.proto as u8, via: via_code(r.via) })
            .collect();
        if let Some(id) = self.by_content.get(&content) {
            self.used.insert(*id);
            return Ok(*id);
        }
        let needed = content.len().div_ceil(RANGES);
        if needed > CHAIN {
            return Err(Error::Capacity(format!(
                "a port set has {} ranges, more than {}",
                content.len(),
                CHAIN * RANGES
            )));
        }
        let mut entries = Vec::with_capacity(needed);
        for _ in 0..needed {
            let id = match self.free.pop() {
                Some(id) => id,
                None if self.next < self.map.len() => {
                    self.next += 1;
                    self.next - 1
                }
                None => {
                    self.free.append(&mut entries);
                    return Err(Error::Capacity("the port sets are full".into()));
                }
            };
            entries.push(id);
        }
        write(&mut self.map, &content, &entries)?;
        let head = entries[0];
        self.used.insert(head);
        self.by_content.insert(content.clone(), head);
        self.sets.insert(head, (content, entries));
        Ok(head)
    }

    /// Ends a pass, after nothing in the kernel refers to unused sets any more.
    pub fn finish(&mut self) {
        let gone: Vec<u32> = self.sets.keys().filter(|h| !self.used.contains(h)).copied().collect();
        let mut resting = Vec::new();
        for head in gone {
            if let Some((content, entries)) = self.sets.remove(&head) {
                self.by_content.remove(&content);
                resting.extend(entries);
            }
        }
        if !resting.is_empty() {
            self.resting.push_back((Instant::now(), resting));
        }
    }
}

/// Writes a set from its last entry to its first, so that no entry refers to one that is not written yet.
fn write(map: &mut Array<MapData, Entry>, content: &[Range], entries: &[u32]) -> Result<(), Error> {
    let mut next = 0;
    for (chunk, id) in content.chunks(RANGES).zip(entries).rev() {
        let mut entry = Entry { next, ..Entry::default() };
        entry.ranges[..chunk.len()].copy_from_slice(chunk);
        map.set(*id, entry, 0).map_err(Error::map(MAP))?;
        next = *id;
    }
    Ok(())
}
