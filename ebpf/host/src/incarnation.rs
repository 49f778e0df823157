//! Which pod has an address: flows that were remembered for the one that had it before are not the next one's.

use ahash::{AHashMap, RandomState};
use tidegate_ebpf_common::Addr;
use tidegate_ebpf_common::layout::Endpoint;

/// What makes two pods different.
#[derive(Clone, Copy, Debug)]
struct Known {
    scope: u32,
    node: u32,
    /// The last interface that was known, 0 if none was.
    ifindex: u32,
    /// A hash of namespace and name; not known for what an earlier process left.
    pod: Option<u64>,
    incarnation: u32,
}

/// The incarnations of all endpoints.
pub(crate) struct Incarnations {
    known: AHashMap<Addr, Known>,
    last: u32,
    hasher: RandomState,
}

impl Incarnations {
    /// Those that the kernel holds.
    pub fn adopt<'a>(endpoints: impl Iterator<Item = (&'a Addr, &'a Endpoint)>) -> Self {
        let known: AHashMap<Addr, Known> = endpoints
            .map(|(addr, e)| {
                let (scope, node, ifindex, incarnation) = (e.scope, e.node, e.ifindex, e.incarnation);
                (*addr, Known { scope, node, ifindex, pod: None, incarnation })
            })
            .collect();
        let last = known.values().map(|k| k.incarnation).max().unwrap_or(0);
        Self { known, last, hasher: RandomState::new() }
    }

    /// The incarnation of the endpoint at `addr`, of which `now` (milliseconds, wrapping) is the time, and whether it
    /// is a new one. An interface that is not found for a moment is still the same.
    pub fn of(&mut self, addr: Addr, endpoint: &Endpoint, pod: (&str, &str), now: u32) -> (u32, bool) {
        let pod = self.hasher.hash_one(pod);
        let (scope, node) = (endpoint.scope, endpoint.node);
        if let Some(known) = self.known.get_mut(&addr) {
            let moved = endpoint.ifindex != 0 && known.ifindex != 0 && endpoint.ifindex != known.ifindex;
            if (known.scope, known.node) == (scope, node) && !moved && known.pod.is_none_or(|p| p == pod) {
                known.pod = Some(pod);
                if endpoint.ifindex != 0 {
                    known.ifindex = endpoint.ifindex;
                }
                return (known.incarnation, false);
            }
        }
        // Later than any that was, also of an endpoint that is forgotten.
        self.last = self.last.wrapping_add(1).max(now);
        let incarnation = self.last;
        self.known.insert(addr, Known { scope, node, ifindex: endpoint.ifindex, pod: Some(pod), incarnation });
        (incarnation, true)
    }

    /// Forgets an endpoint that is gone, and returns it if it was there.
    pub fn forget(&mut self, addr: &Addr) -> Option<Addr> {
        self.known.remove(addr).map(|_| *addr)
    }

    /// Forgets endpoints that are gone, and returns them.
    pub fn retain(&mut self, keep: impl Fn(&Addr) -> bool) -> Vec<Addr> {
        let gone: Vec<Addr> = self.known.keys().filter(|a| !keep(a)).copied().collect();
        for addr in &gone {
            self.known.remove(addr);
        }
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_pod_is_another_incarnation() {
        let addr = Addr::v4(7);
        let at = |scope, ifindex| Endpoint { scope, ifindex, node: 1, ..Endpoint::default() };
        let mut i = Incarnations::adopt(std::iter::empty());
        let (first, new) = i.of(addr, &at(1, 5), ("shop", "web"), 1_000);
        assert!(new && first == 1_000);
        for same in [at(1, 5), at(1, 0), at(1, 5)] {
            assert_eq!(i.of(addr, &same, ("shop", "web"), 1_000), (first, false));
        }
        // Another interface, also after a moment without one; another scope; another name.
        i.of(addr, &at(1, 0), ("shop", "web"), 1_000);
        assert_eq!(i.of(addr, &at(1, 6), ("shop", "web"), 1_000), (first + 1, true));
        assert_eq!(i.of(addr, &at(2, 6), ("shop", "web"), 1_000), (first + 2, true));
        assert_eq!(i.of(addr, &at(2, 6), ("shop", "api"), 1_000), (first + 3, true));
        // Gone and back in the same instant.
        assert_eq!(i.retain(|_| false), [addr]);
        assert_eq!(i.of(addr, &at(2, 6), ("shop", "api"), 1_000), (first + 4, true));
        // What an earlier process left stays, and is never given again.
        let left = Endpoint { incarnation: 9_000, ..at(2, 6) };
        let mut next = Incarnations::adopt([(&addr, &left)].into_iter());
        assert_eq!(next.of(addr, &at(2, 6), ("shop", "api"), 1_000), (9_000, false));
        assert_eq!(next.of(addr, &at(2, 7), ("shop", "api"), 1_000), (9_001, true));
    }
}
