//! Who is connected now: quotas, counts and cuts.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::hash::Hash;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use tidegate_policy::event::Who;
use tidegate_policy::{GroupKey, Name, Reason, ScopeKey};
use tidegate_sni_core::{Client, Hello, Sni};
use tokio::sync::Notify;

/// A connection as a predicate sees it.
#[derive(Clone, Debug)]
pub struct Live {
    /// The pod's address and port.
    pub client: SocketAddr,
    /// The pod.
    pub who: Arc<Who>,
    /// Its scope.
    pub scope: ScopeKey,
    /// Its group when the connection came.
    pub group: GroupKey,
    /// The group's dense index then.
    pub group_index: u32,
    /// Where the pod wanted to go.
    pub asked: SocketAddr,
    /// Where the relay went, as soon as it is connected.
    pub actual: Option<SocketAddr>,
    /// What the hello says, as soon as it is read.
    pub hello: Option<Hello>,
    /// The name in that hello.
    pub name: Option<Name>,
    /// The destination port.
    pub port: u16,
}

impl Live {
    /// The pod in the form in which a [`Check`](tidegate_sni_core::Check) takes it.
    pub fn as_client(&self) -> Client {
        Client { who: self.who.clone(), scope: self.scope, group: self.group, group_index: self.group_index }
    }
}

/// One connection's shared state.
pub(crate) struct Entry {
    pub peer: SocketAddr,
    pub client: Client,
    pub asked: SocketAddr,
    pub hello: OnceLock<Hello>,
    pub actual: OnceLock<SocketAddr>,
    pub sent: AtomicU64,
    pub received: AtomicU64,
    cut: OnceLock<Reason>,
    wake: Notify,
}

impl Entry {
    fn live(&self) -> Live {
        let hello = self.hello.get().cloned();
        Live {
            client: self.peer,
            who: self.client.who.clone(),
            scope: self.client.scope,
            group: self.client.group,
            group_index: self.client.group_index,
            asked: self.asked,
            actual: self.actual.get().copied(),
            name: hello.as_ref().and_then(|h| h.sni.name().cloned()),
            hello,
            port: self.asked.port(),
        }
    }

    /// Waits until somebody cuts this connection.
    pub async fn cut(&self) -> Reason {
        loop {
            if let Some(reason) = self.cut.get() {
                return *reason;
            }
            self.wake.notified().await;
        }
    }

    /// The name that the hello says.
    pub fn name(&self) -> Option<Arc<str>> {
        match &self.hello.get()?.sni {
            Sni::Name(name) => Some(name.as_str().into()),
            Sni::Missing | Sni::Ip => None,
        }
    }

    /// All bytes moved.
    pub fn moved(&self) -> u64 {
        self.sent.load(Ordering::Relaxed) + self.received.load(Ordering::Relaxed)
    }
}

#[derive(Default)]
struct Inner {
    next: u64,
    entries: HashMap<u64, Arc<Entry>, ahash::RandomState>,
    namespaces: HashMap<Arc<str>, usize, ahash::RandomState>,
    facts: HashMap<(ScopeKey, IpAddr), usize, ahash::RandomState>,
}

/// All connections of a relay, from the moment they are accepted.
pub struct Registry {
    inner: Mutex<Inner>,
    quota: usize,
    total: usize,
}

impl Registry {
    /// An empty one that lets a namespace have `quota` connections.
    pub fn new(quota: usize) -> Self {
        Self { inner: Mutex::default(), quota, total: usize::MAX }
    }

    /// With room for so many connections of all namespaces together.
    pub(crate) fn with_total(self, total: usize) -> Self {
        Self { total, ..self }
    }

    /// Resets the connections for which `pred` holds, each with a close event (or, before the
    /// upstream leg is up, an open event that denies it) of this reason. Returns how many.
    ///
    /// Call it after the new policy is in force: a connection is registered with what its hello
    /// says before it is judged, so that none slips between the two. `pred` may take any lock.
    pub fn revoke(&self, pred: impl Fn(&Live) -> bool, reason: Reason) -> usize {
        let entries: Vec<Arc<Entry>> = self.inner.lock().entries.values().cloned().collect();
        let mut cut = 0;
        for entry in entries {
            if entry.cut.get().is_none() && pred(&entry.live()) && entry.cut.set(reason).is_ok() {
                entry.wake.notify_one();
                cut += 1;
            }
        }
        cut
    }

    /// How many connections of this scope asked for this address.
    pub fn live(&self, scope: ScopeKey, ip: IpAddr) -> usize {
        self.inner.lock().facts.get(&(scope, ip)).copied().unwrap_or(0)
    }

    /// How many connections live now.
    pub fn len(&self) -> usize {
        self.inner.lock().entries.len()
    }

    /// Whether no connection lives now.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes a place for a connection, unless its namespace has used up its quota or there is no room left.
    pub(crate) fn admit(self: &Arc<Self>, peer: SocketAddr, client: Client, asked: SocketAddr) -> Option<Ticket> {
        let mut inner = self.inner.lock();
        if inner.entries.len() >= self.total {
            return None;
        }
        let namespace = inner.namespaces.entry(client.who.namespace.clone()).or_default();
        if *namespace >= self.quota {
            if *namespace == 0 {
                inner.namespaces.remove(&client.who.namespace);
            }
            return None;
        }
        *namespace += 1;
        *inner.facts.entry((client.scope, asked.ip())).or_default() += 1;
        let id = inner.next;
        inner.next += 1;
        let entry = Arc::new(Entry {
            peer,
            client,
            asked,
            hello: OnceLock::new(),
            actual: OnceLock::new(),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            cut: OnceLock::new(),
            wake: Notify::new(),
        });
        inner.entries.insert(id, entry.clone());
        Some(Ticket { registry: self.clone(), id, entry })
    }
}

/// A place in the registry, given back when dropped.
pub(crate) struct Ticket {
    registry: Arc<Registry>,
    id: u64,
    pub entry: Arc<Entry>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut inner = self.registry.inner.lock();
        inner.entries.remove(&self.id);
        let client = &self.entry.client;
        release(&mut inner.namespaces, client.who.namespace.clone());
        release(&mut inner.facts, (client.scope, self.entry.asked.ip()));
    }
}

fn release<K: Eq + Hash>(counts: &mut HashMap<K, usize, ahash::RandomState>, key: K) {
    if let Slot::Occupied(mut slot) = counts.entry(key) {
        *slot.get_mut() -= 1;
        if *slot.get() == 0 {
            slot.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(namespace: &str, scope: u128) -> Client {
        let who = Who { namespace: namespace.into(), pod: "p".into(), node: "n".into() };
        Client { who: Arc::new(who), scope: ScopeKey(scope), group: GroupKey(1), group_index: 0 }
    }

    #[test]
    fn quota_is_per_namespace_and_comes_back() {
        let registry = Arc::new(Registry::new(2).with_total(3));
        let peer: SocketAddr = "10.0.0.1:1000".parse().unwrap();
        let asked: SocketAddr = "192.0.2.1:443".parse().unwrap();
        let a = registry.admit(peer, client("a", 1), asked).unwrap();
        let _b = registry.admit(peer, client("a", 2), asked).unwrap();
        assert!(registry.admit(peer, client("a", 1), asked).is_none());
        let c = registry.admit(peer, client("b", 3), asked).unwrap();
        assert!(registry.admit(peer, client("c", 4), asked).is_none(), "in total");
        drop(c);
        assert_eq!(registry.live(ScopeKey(1), asked.ip()), 1);
        drop(a);
        assert_eq!(registry.live(ScopeKey(1), asked.ip()), 0);
        assert!(registry.admit(peer, client("a", 1), asked).is_some());
        assert_eq!(registry.len(), 1);
        assert_eq!(registry.inner.lock().namespaces.len(), 1);
    }

    #[test]
    fn a_predicate_may_ask_the_registry() {
        let registry = Arc::new(Registry::new(2));
        let asked: SocketAddr = "192.0.2.1:443".parse().unwrap();
        let t = registry.admit(asked, client("a", 1), asked).unwrap();
        assert_eq!(registry.revoke(|l| registry.live(l.scope, l.asked.ip()) == 1, Reason::Revoked), 1);
        assert_eq!(registry.revoke(|_| true, Reason::Quota), 0);
        assert_eq!(t.entry.cut.get(), Some(&Reason::Revoked));
    }
}
