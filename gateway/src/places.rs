//! Places for connections, counted by where they come from, so that no source takes them all.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;

/// How many connections each source has. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Places {
    most: usize,
    sources: Arc<Mutex<BTreeMap<IpAddr, usize>>>,
}

/// One source's place, given back when dropped.
#[derive(Debug)]
pub struct Place {
    places: Places,
    source: IpAddr,
}

impl Places {
    /// Room for so many connections of one source.
    pub fn new(most: usize) -> Self {
        Self { most, sources: Arc::default() }
    }

    /// A place for a source, unless it has as many as it may.
    pub fn take(&self, source: IpAddr) -> Option<Place> {
        let source = source.to_canonical();
        let mut sources = self.sources.lock();
        let n = sources.entry(source).or_default();
        if *n >= self.most {
            return None;
        }
        *n += 1;
        Some(Place { places: self.clone(), source })
    }
}

impl Drop for Place {
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
