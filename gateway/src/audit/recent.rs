//! The latest records of each namespace, for those who may read them. In memory, and bounded.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;

/// The most records of one namespace.
const RECORDS: usize = 256;
/// The most octets of all records together.
const OCTETS: usize = 32 << 20;

/// Lines of the log, by namespace. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Recent(Arc<Mutex<Kept>>);

#[derive(Debug, Default)]
struct Kept {
    by: BTreeMap<Arc<str>, VecDeque<Box<[u8]>>>,
    octets: usize,
}

impl Recent {
    /// Keeps a line, with its newline.
    pub fn keep(&self, namespace: &Arc<str>, line: &[u8]) {
        self.0.lock().keep(namespace, line, OCTETS);
    }

    /// The lines of a namespace, oldest first.
    pub fn of(&self, namespace: &str) -> Vec<u8> {
        self.0.lock().by.get(namespace).map(|lines| lines.iter().flatten().copied().collect()).unwrap_or_default()
    }
}

impl Kept {
    fn keep(&mut self, namespace: &Arc<str>, line: &[u8], most: usize) {
        let lines = match self.by.get_mut(namespace) {
            Some(lines) => lines,
            None => self.by.entry(namespace.clone()).or_default(),
        };
        if lines.len() == RECORDS {
            self.octets -= lines.pop_front().map_or(0, |l| l.len());
        }
        lines.push_back(line.into());
        self.octets += line.len();
        if self.octets > most {
            self.shrink(most / 2);
        }
    }

    /// Gives each namespace the same share: those with little lose nothing to one with much.
    fn shrink(&mut self, most: usize) {
        let share = most / self.by.len().max(1);
        for lines in self.by.values_mut() {
            let mut octets: usize = lines.iter().map(|l| l.len()).sum();
            while octets > share
                && let Some(line) = lines.pop_front()
            {
                octets -= line.len();
                self.octets -= line.len();
            }
        }
        self.by.retain(|_, lines| !lines.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_namespace_keeps_its_own_latest() {
        let recent = Recent::default();
        for i in 0..RECORDS + 3 {
            recent.keep(&"shop".into(), format!("{i}\n").as_bytes());
        }
        recent.keep(&"bank".into(), b"one\n");
        let shop = String::from_utf8(recent.of("shop")).unwrap();
        assert_eq!((shop.lines().count(), shop.lines().next()), (RECORDS, Some("3")));
        assert_eq!(recent.of("bank"), b"one\n");
        assert_eq!(recent.of("other"), b"");
    }

    #[test]
    fn a_loud_namespace_takes_nothing_from_a_quiet_one() {
        let mut kept = Kept::default();
        kept.keep(&"quiet".into(), b"said once\n", 1000);
        for _ in 0..500 {
            kept.keep(&"loud".into(), &[b'x'; 90], 1000);
            assert!(kept.octets <= 1000);
            let sum: usize = kept.by.values().flatten().map(|l| l.len()).sum();
            assert_eq!(sum, kept.octets);
        }
        assert_eq!(kept.by["quiet" as &str].len(), 1);
        for i in 0..500 {
            kept.keep(&format!("n{i}").into(), &[b'x'; 90], 1000);
            assert!(kept.octets <= 1000 && kept.by.len() <= 12);
        }
    }
}
