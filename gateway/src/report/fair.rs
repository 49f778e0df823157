//! Denials that wait to be told, so many of each namespace: one that is denied much pushes out nothing of the others.

use std::collections::BTreeMap;
use std::sync::Arc;

use tidegate_policy::denied::{Denied, Folded};

/// The most different denials of one namespace that wait.
const EACH: usize = 32;
/// The most namespaces with denials that wait.
const NAMESPACES: usize = 4096;

/// Those of each namespace, which take turns. Denials without a pod count as one namespace's.
#[derive(Debug, Default)]
pub struct Fair {
    by: BTreeMap<Arc<str>, Folded>,
    /// After whom the next turn begins.
    last: Option<Arc<str>>,
    lost: u64,
}

impl Fair {
    /// Takes one.
    pub fn add(&mut self, denied: Denied) {
        let name = denied.who.as_ref().map_or_else(|| "".into(), |w| w.namespace.clone());
        if self.by.len() >= NAMESPACES && !self.by.contains_key(&name) {
            self.lost = self.lost.saturating_add(denied.count);
            return;
        }
        let of = self.by.entry(name).or_insert_with(|| Folded::new(EACH));
        of.add(denied);
        self.lost = self.lost.saturating_add(of.take_lost());
    }

    /// So many of them at most, each namespace's first before anybody's second.
    pub fn take(&mut self, most: usize) -> Vec<Denied> {
        let mut out = Vec::new();
        while out.len() < most && !self.by.is_empty() {
            let after = |last: &Arc<str>| {
                let rest = (std::ops::Bound::Excluded(last.clone()), std::ops::Bound::Unbounded);
                self.by.range(rest).next().map(|(name, _)| name.clone())
            };
            let next = self.last.as_ref().and_then(after).or_else(|| self.by.keys().next().cloned());
            let Some(name) = next else { break };
            if let Some(of) = self.by.get_mut(&name) {
                out.append(&mut of.take(1));
                if of.is_empty() {
                    self.by.remove(&name);
                }
            }
            self.last = Some(name);
        }
        out
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.by.is_empty()
    }

    /// How many denials found no place since this was asked last.
    pub fn take_lost(&mut self) -> u64 {
        std::mem::take(&mut self.lost)
    }
}

#[cfg(test)]
mod tests {
    use super::super::denials::tests::denied;
    use super::*;

    #[test]
    fn namespaces_take_turns() {
        let mut f = Fair::default();
        for n in 0..1000 {
            f.add(denied("loud", &n.to_string()));
        }
        f.add(denied("quiet", "a"));
        f.add(denied("quiet", "a"));
        f.add(denied("silent", "b"));
        // Each counts two.
        assert_eq!((f.take_lost(), f.take_lost()), ((1000 - EACH as u64) * 2, 0));
        let of = |all: &[Denied]| all.iter().map(|d| d.who.as_ref().unwrap().namespace.to_string()).collect::<Vec<_>>();
        let first = f.take(4);
        assert_eq!(of(&first), ["loud", "quiet", "silent", "loud"]);
        assert_eq!(first[1].count, 4);
        f.add(denied("quiet", "c"));
        assert_eq!(of(&f.take(3)), ["quiet", "loud", "loud"]);
        assert_eq!(f.take(1000).len(), EACH - 4);
        assert!(f.is_empty());
    }

    #[test]
    fn memory_has_an_end() {
        let mut f = Fair::default();
        (0..2 * NAMESPACES).for_each(|n| f.add(denied(&n.to_string(), "a")));
        assert_eq!((f.by.len(), f.take_lost()), (NAMESPACES, 2 * NAMESPACES as u64));
    }
}
