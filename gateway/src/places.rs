//! Places for connections, counted by where they come from or whose they are, so that nobody takes them all.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;

/// Whose a place is.
pub trait Source: Ord + Clone {
    /// The same for all that count as one.
    #[must_use]
    fn same(self) -> Self {
        self
    }
}

impl Source for IpAddr {
    fn same(self) -> Self {
        self.to_canonical()
    }
}

/// A name of a certificate.
impl Source for String {}

/// How many connections each source has. Cheap to clone.
#[derive(Debug)]
pub struct Places<S = IpAddr> {
    most: usize,
    sources: Arc<Mutex<BTreeMap<S, usize>>>,
}

impl<S> Clone for Places<S> {
    fn clone(&self) -> Self {
        Self { most: self.most, sources: self.sources.clone() }
    }
}

/// One source's place, given back when dropped.
#[derive(Debug)]
pub struct Place<S: Source = IpAddr> {
    places: Places<S>,
    source: S,
}

impl<S: Source> Places<S> {
    /// Room for so many connections of one source.
    pub fn new(most: usize) -> Self {
        Self { most, sources: Arc::default() }
    }

    /// A place for a source, unless it has as many as it may.
    pub fn take(&self, source: S) -> Option<Place<S>> {
        let source = source.same();
        let mut sources = self.sources.lock();
        let n = sources.get(&source).copied().unwrap_or_default();
        if n >= self.most {
            return None;
        }
        sources.insert(source.clone(), n + 1);
        Some(Place { places: self.clone(), source })
    }
}

impl<S: Source> Drop for Place<S> {
    fn drop(&mut self) {
        let mut sources = self.places.sources.lock();
        if let Some(n) = sources.get_mut(&self.source) {
            *n -= 1;
            if *n == 0 {
                sources.remove(&self.source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_per_source_and_come_back() {
        let places = Places::new(2);
        let (a, b) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
        let mapped: IpAddr = "::ffff:192.0.2.1".parse().unwrap();
        let held = [places.take(a).unwrap(), places.take(mapped).unwrap()];
        assert!(places.take(a).is_none());
        assert!(places.take(b).is_some());
        drop(held);
        assert!(places.take(a).is_some());
        assert!(places.sources.lock().is_empty());
    }
}
