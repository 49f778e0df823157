//! The latest records of each namespace, for those who may read them. In memory, and bounded.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;

/// The most records of one namespace.
const RECORDS: usize = 256;
/// The most octets of all records together.
const OCTETS: usize = 32 << 20;

/// Says which namespace has a name now, by its UID.
type Uids = dyn Fn(&str) -> Option<String> + Send + Sync;

/// Lines of the log, by namespace. One that is made anew does not see its predecessor's. Cheap to clone.
#[derive(Clone)]
pub struct Recent {
    kept: Arc<Mutex<Kept>>,
    uids: Arc<Uids>,
}

impl std::fmt::Debug for Recent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.kept.fmt(f)
    }
}

#[derive(Debug, Default)]
struct Kept {
    by: BTreeMap<Arc<str>, Lines>,
    octets: usize,
}

#[derive(Debug, Default)]
struct Lines {
    /// Of the namespace.
    uid: String,
    lines: VecDeque<Box<[u8]>>,
}

impl Lines {
    fn octets(&self) -> usize {
        self.lines.iter().map(|l| l.len()).sum()
    }
}

impl Recent {
    /// Nothing yet. `uids` is asked for each line.
    pub fn new(uids: impl Fn(&str) -> Option<String> + Send + Sync + 'static) -> Self {
        Self { kept: Arc::default(), uids: Arc::new(uids) }
    }

    /// Keeps a line, with its newline, if there is such a namespace.
    pub fn keep(&self, namespace: &Arc<str>, line: &[u8]) {
        if let Some(uid) = (self.uids)(namespace) {
            self.kept.lock().keep(namespace, &uid, line, OCTETS);
        }
    }

    /// The lines of a namespace that is there, oldest first.
    pub fn of(&self, namespace: &str) -> Vec<u8> {
        let Some(uid) = (self.uids)(namespace) else { return Vec::new() };
        let kept = self.kept.lock();
        let of = kept.by.get(namespace).filter(|of| of.uid == uid);
        of.map(|of| of.lines.iter().flatten().copied().collect()).unwrap_or_default()
    }
}

impl Kept {
    fn keep(&mut self, namespace: &Arc<str>, uid: &str, line: &[u8], most: usize) {
        let of = match self.by.get_mut(namespace) {
            Some(of) => of,
            None => self.by.entry(namespace.clone()).or_default(),
        };
        if of.uid != uid {
            self.octets -= of.octets();
            *of = Lines { uid: uid.to_owned(), ..Lines::default() };
        }
        let lines = &mut of.lines;
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
        for of in self.by.values_mut() {
            let mut octets = of.octets();
            while octets > share
                && let Some(line) = of.lines.pop_front()
            {
                octets -= line.len();
                self.octets -= line.len();
            }
        }
        self.by.retain(|_, of| !of.lines.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_namespace_keeps_its_own_latest() {
        let recent = Recent::new(|namespace| (namespace != "gone").then(|| "1".into()));
        recent.keep(&"gone".into(), b"nobody's\n");
        assert_eq!(recent.kept.lock().octets, 0);
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
    fn a_namespace_that_is_made_anew_has_no_past() {
        let uid = Arc::new(Mutex::new(Some("1".to_owned())));
        let now = uid.clone();
        let recent = Recent::new(move |_| now.lock().clone());
        recent.keep(&"shop".into(), b"old\n");
        assert_eq!(recent.of("shop"), b"old\n");
        *uid.lock() = None;
        assert_eq!(recent.of("shop"), b"");
        *uid.lock() = Some("2".into());
        assert_eq!(recent.of("shop"), b"");
        recent.keep(&"shop".into(), b"new\n");
        assert_eq!((recent.of("shop"), recent.kept.lock().octets), (b"new\n".to_vec(), 4));
    }

    #[test]
    fn a_loud_namespace_takes_nothing_from_a_quiet_one() {
        let mut kept = Kept::default();
        kept.keep(&"quiet".into(), "1", b"said once\n", 1000);
        for _ in 0..500 {
            kept.keep(&"loud".into(), "1", &[b'x'; 90], 1000);
            assert!(kept.octets <= 1000);
            let sum: usize = kept.by.values().map(Lines::octets).sum();
            assert_eq!(sum, kept.octets);
        }
        assert_eq!(kept.by["quiet" as &str].lines.len(), 1);
        for i in 0..500 {
            kept.keep(&format!("n{i}").into(), "1", &[b'x'; 90], 1000);
            assert!(kept.octets <= 1000 && kept.by.len() <= 12);
        }
    }
}
