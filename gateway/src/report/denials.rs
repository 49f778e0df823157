//! The latest denials of each namespace.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use tidegate_policy::denied::Denied;
use tidegate_policy::model::UnixSeconds;

/// The most denials of a namespace that are kept; a report has the newest of them.
const PER_NAMESPACE: usize = 32;
/// The most namespaces; beyond them the one that was denied nothing for the longest time is forgotten.
const NAMESPACES: usize = 4096;

/// A denial that may have happened several times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// When it happened last.
    pub last: UnixSeconds,
    /// What, with how often.
    pub denied: Denied,
}

#[derive(Debug, Default)]
struct OfNamespace {
    /// The namespace's UID; empty until it is known.
    uid: String,
    /// Rises with every denial: which namespace was denied something last.
    touched: u64,
    /// The newest first.
    entries: VecDeque<Entry>,
}

/// Denials by namespace. What policy allows now stays until newer ones push it out.
#[derive(Debug, Default)]
pub struct Table {
    namespaces: BTreeMap<Arc<str>, OfNamespace>,
    /// The namespaces by when they were touched last.
    order: BTreeMap<u64, Arc<str>>,
    touched: u64,
    /// Those that were denied something since this was asked last.
    news: BTreeSet<Arc<str>>,
}

impl Table {
    /// Takes a denial; one whose pod is not known is nobody's.
    pub fn add(&mut self, mut denied: Denied, now: UnixSeconds) {
        let Some(who) = &denied.who else { return };
        let name = who.namespace.clone();
        self.touched += 1;
        if !self.namespaces.contains_key(&name) && self.namespaces.len() >= NAMESPACES {
            let oldest = self.order.pop_first();
            if let Some((_, name)) = oldest {
                self.namespaces.remove(&name);
                self.news.insert(name);
            }
        }
        let of = self.namespaces.entry(name.clone()).or_default();
        self.order.remove(&of.touched);
        self.order.insert(self.touched, name.clone());
        self.news.insert(name);
        of.touched = self.touched;
        if let Some(at) = of.entries.iter().position(|e| e.denied.is_like(&denied))
            && let Some(old) = of.entries.remove(at)
        {
            denied.count = denied.count.saturating_add(old.denied.count);
        }
        of.entries.push_front(Entry { last: now, denied });
        of.entries.truncate(PER_NAMESPACE);
    }

    /// The denials of a namespace, the newest first.
    pub fn of(&self, namespace: &str) -> impl Iterator<Item = &Entry> {
        self.namespaces.get(namespace).into_iter().flat_map(|n| &n.entries)
    }

    /// Which namespaces were denied something, or are forgotten, since this was asked last.
    pub fn take_news(&mut self) -> BTreeSet<Arc<str>> {
        std::mem::take(&mut self.news)
    }

    /// Forgets namespaces that are gone, or that are others of the same name now. `uid` has those that are there.
    pub fn retain<'a>(&mut self, uid: impl Fn(&str) -> Option<&'a str>) {
        let order = &mut self.order;
        self.namespaces.retain(|name, of| {
            let now = uid(name);
            let stays = now.is_some_and(|now| of.uid.is_empty() || of.uid == now);
            if stays {
                now.unwrap_or_default().clone_into(&mut of.uid);
            } else {
                order.remove(&of.touched);
            }
            stays
        });
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use tidegate_policy::Reason;
    use tidegate_policy::event::Who;

    pub fn denied(namespace: &str, name: &str) -> Denied {
        let who = Arc::new(Who { namespace: namespace.into(), pod: "p".into(), node: "n".into() });
        Denied {
            source: [10, 0, 0, 1].into(),
            who: Some(who),
            name: Some(name.into()),
            address: None,
            protocol: None,
            port: None,
            qtype: Some(1),
            reason: Reason::NameNotAllowed,
            audit: false,
            rule: None,
            count: 2,
        }
    }

    #[test]
    fn newest_first_and_the_same_once() {
        let mut t = Table::default();
        for (i, name) in ["a", "b", "a", "c"].iter().enumerate() {
            t.add(denied("shop", name), UnixSeconds(i as i64));
        }
        let got: Vec<_> = t.of("shop").map(|e| (e.denied.name.as_deref().unwrap(), e.denied.count, e.last.0)).collect();
        assert_eq!(got, [("c", 2, 3), ("a", 4, 2), ("b", 2, 1)]);
        t.add(Denied { who: None, ..denied("shop", "d") }, UnixSeconds(9));
        assert_eq!((t.of("shop").count(), t.of("other").count()), (3, 0));
        assert_eq!(t.take_news().len(), 1);
        t.retain(|_| Some("1"));
        assert_eq!(t.of("shop").count(), 3);
        // Another one of the name has nothing of it.
        t.retain(|_| Some("2"));
        assert_eq!(t.of("shop").count(), 0);
        t.add(denied("shop", "a"), UnixSeconds(9));
        t.retain(|ns| (ns != "shop").then_some("2"));
        assert_eq!((t.of("shop").count(), t.order.len()), (0, 0));
    }

    #[test]
    fn it_does_not_grow_without_end() {
        let mut t = Table::default();
        for i in 0..100 {
            t.add(denied("shop", &format!("n{i}")), UnixSeconds(0));
        }
        assert_eq!(t.of("shop").count(), PER_NAMESPACE);
        assert_eq!(t.of("shop").next().unwrap().denied.name.as_deref(), Some("n99"));
        for i in 0..NAMESPACES {
            t.add(denied(&format!("ns{i}"), "n"), UnixSeconds(0));
        }
        assert_eq!((t.namespaces.len(), t.order.len()), (NAMESPACES, NAMESPACES));
        assert_eq!((t.of("shop").count(), t.of("ns0").count()), (0, 1));
    }
}
