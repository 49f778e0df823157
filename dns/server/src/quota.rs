//! Counted room per namespace and in total, so that no tenant starves another.

use std::collections::HashMap;
use std::sync::Arc;

use ahash::RandomState;
use parking_lot::Mutex;

#[derive(Debug, Default)]
struct Used {
    total: usize,
    per: HashMap<Arc<str>, usize, RandomState>,
}

/// A bound per namespace and in total.
#[derive(Debug)]
pub struct Quota {
    per: usize,
    total: usize,
    used: Mutex<Used>,
}

/// Room that was taken; given back when dropped.
#[derive(Debug)]
pub struct Permit {
    quota: Arc<Quota>,
    namespace: Arc<str>,
}

impl Quota {
    /// Room for `per` in a namespace and `total` in all.
    pub fn new(per: usize, total: usize) -> Arc<Self> {
        Arc::new(Self { per, total, used: Mutex::default() })
    }

    /// Takes room for one, if there is any.
    pub fn take(self: &Arc<Self>, namespace: &Arc<str>) -> Option<Permit> {
        let mut used = self.used.lock();
        if used.total >= self.total {
            return None;
        }
        let n = used.per.entry(Arc::clone(namespace)).or_insert(0);
        if *n >= self.per {
            return None;
        }
        *n += 1;
        used.total += 1;
        Some(Permit { quota: Arc::clone(self), namespace: Arc::clone(namespace) })
    }

    /// How many are taken in total.
    pub fn used(&self) -> usize {
        self.used.lock().total
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut used = self.quota.used.lock();
        used.total -= 1;
        if let Some(n) = used.per.get_mut(&self.namespace) {
            *n -= 1;
            if *n == 0 {
                used.per.remove(&self.namespace);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_bounded_and_comes_back() {
        let q = Quota::new(2, 3);
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        let held = [q.take(&a).unwrap(), q.take(&a).unwrap()];
        assert!(q.take(&a).is_none(), "per namespace");
        let other = q.take(&b).unwrap();
        assert!(q.take(&b).is_none(), "in total");
        drop(held);
        assert!(q.take(&a).is_some());
        drop(other);
        assert_eq!(q.used(), 0);
        assert!(q.used.lock().per.is_empty());
    }
}
