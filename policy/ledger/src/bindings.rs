//! The read side: what data-path threads ask while the ledger's thread writes.
//!
//! Two read locks per question, the directory's shard and the scope's table;
//! the writer holds the latter for one answer at a time.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ahash::RandomState;
use parking_lot::RwLock;
use smallvec::SmallVec;
use tidegate_policy::{ClassKey, Name, ScopeKey};

use crate::NodeId;
use crate::table::{Table, pack};
use crate::tick::Tick;

/// Addresses of a name.
pub type Addresses = SmallVec<[IpAddr; 4]>;
/// Names of an address, each with its expiry since boot.
pub type Names = SmallVec<[(Name, Duration); 2]>;

/// Whether a scope was told that a name has an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// Yes, and it holds.
    Bound,
    /// It was, but the answer has expired: live flows go on, new ones do not start.
    Expired,
    /// Never, or it is forgotten.
    No,
}

const SHARDS: usize = 64;

type Shard = RwLock<HashMap<ScopeKey, Arc<RwLock<Table>>, RandomState>>;

/// The tables that a [`Ledger`](crate::Ledger) keeps, for readers.
#[derive(Debug)]
pub struct Bindings {
    pub(crate) hash: RandomState,
    shards: Vec<Shard>,
    steered: RwLock<BTreeSet<NodeId>>,
    any_steered: AtomicBool,
}

impl Bindings {
    pub(crate) fn new(hash_keys: [u64; 4]) -> Self {
        let [a, b, c, d] = hash_keys;
        let hash = RandomState::with_seeds(a, b, c, d);
        let shards = (0..SHARDS).map(|_| RwLock::new(HashMap::with_hasher(hash.clone()))).collect();
        Self { hash, shards, steered: RwLock::default(), any_steered: AtomicBool::new(false) }
    }

    fn shard(&self, scope: ScopeKey) -> &Shard {
        // Scope keys are hashes already.
        &self.shards[scope.0 as usize % SHARDS]
    }

    pub(crate) fn add_scope(&self, scope: ScopeKey, table: Arc<RwLock<Table>>) {
        self.shard(scope).write().insert(scope, table);
    }

    pub(crate) fn remove_scope(&self, scope: ScopeKey) {
        let mut shard = self.shard(scope).write();
        shard.remove(&scope);
        shard.shrink_to(16);
    }

    pub(crate) fn set_steered(&self, node: NodeId, steered: bool) {
        let mut set = self.steered.write();
        if steered {
            set.insert(node);
        } else {
            set.remove(&node);
        }
        self.any_steered.store(!set.is_empty(), Ordering::Release);
    }

    fn read<R>(&self, scope: ScopeKey, f: impl FnOnce(&Table) -> R) -> Option<R> {
        let shard = self.shard(scope).read();
        Some(f(&shard.get(&scope)?.read()))
    }

    /// The names that the scope was told for an address, expired ones too, with their expiries since boot.
    pub fn names_of(&self, scope: ScopeKey, ip: IpAddr) -> Names {
        let names = |t: &Table| {
            let a = t.address(t.find_ip(&self.hash, pack(ip))?)?;
            let named = |f: &crate::table::Fact| Some((t.name(f.name)?.name()?.clone(), f.expires.duration()));
            Some(a.facts.iter().filter_map(named).collect())
        };
        self.read(scope, names).flatten().unwrap_or_default()
    }

    /// Whether the scope was told that `name` (canonical text) has the address, at `now` since boot.
    pub fn is_bound(&self, scope: ScopeKey, name: &str, ip: IpAddr, now: Duration) -> Bound {
        let expires = |t: &Table| {
            let n = t.find_name(&self.hash, name)?;
            let a = t.address(t.find_ip(&self.hash, pack(ip))?)?;
            a.facts.iter().find(|f| f.name == n).map(|f| f.expires)
        };
        match self.read(scope, expires).flatten() {
            None => Bound::No,
            Some(e) if Tick::floor(now) < e => Bound::Bound,
            Some(_) => Bound::Expired,
        }
    }

    /// The addresses that `name` (canonical text) has in the scope at `now` since boot, without expired ones.
    pub fn addresses_of(&self, scope: ScopeKey, name: &str, now: Duration) -> Addresses {
        let now = Tick::floor(now);
        let addresses = |t: &Table| {
            let n = t.find_name(&self.hash, name)?;
            let live = |&i: &u32| {
                let a = t.address(i)?;
                a.facts.iter().any(|f| f.name == n && f.expires > now).then(|| a.ip())
            };
            Some(t.name(n)?.addresses.iter().filter_map(live).collect())
        };
        self.read(scope, addresses).flatten().unwrap_or_default()
    }

    /// The class of an address that the scope has a name for.
    pub fn class_of(&self, scope: ScopeKey, ip: IpAddr) -> Option<ClassKey> {
        self.read(scope, |t| Some(t.address(t.find_ip(&self.hash, pack(ip))?)?.class())).flatten()
    }

    /// Whether replies to isolated pods of the node need no ack, because its stream has been down
    /// so long that its kernel steers what it does not know.
    pub fn is_steered(&self, node: NodeId) -> bool {
        self.any_steered.load(Ordering::Acquire) && self.steered.read().contains(&node)
    }

    /// Whether the node's kernel has confirmed that it holds the address until `until` since boot, with its present class.
    pub fn standing(&self, scope: ScopeKey, ip: IpAddr, node: NodeId, until: Duration) -> bool {
        let until = Tick::ceil(until);
        let confirmed = |t: &Table| {
            let h = *t.address(t.find_ip(&self.hash, pack(ip))?)?.holder(node)?;
            Some(h.confirmed >= until)
        };
        self.read(scope, confirmed).flatten().unwrap_or(false)
    }

    /// Whether a reply may go out without asking the ledger: `name` (canonical text) is bound to every
    /// address until `until` since boot, and the node's kernel has confirmed it ([`Self::standing`])
    /// or is steered ([`Self::is_steered`]) and will be told when it is back; with `acked` only the former.
    pub fn answer_stands(
        &self,
        scope: ScopeKey,
        name: &str,
        ips: &[IpAddr],
        node: NodeId,
        until: Duration,
        acked: bool,
    ) -> bool {
        if ips.is_empty() {
            return true;
        }
        let steered = !acked && self.is_steered(node);
        let until = Tick::ceil(until);
        let stands = |t: &Table| {
            let Some(n) = t.find_name(&self.hash, name) else {
                return false;
            };
            ips.iter().all(|ip| {
                let Some(a) = t.find_ip(&self.hash, pack(*ip)).and_then(|i| t.address(i)) else {
                    return false;
                };
                a.facts.iter().any(|f| f.name == n && f.expires >= until)
                    && a.holder(node).is_some_and(|h| steered || h.confirmed >= until)
            })
        };
        self.read(scope, stands).unwrap_or(false)
    }
}
