//! The ledger's state, its timers, and how facts end.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use smallvec::SmallVec;
use tidegate_policy::state::{FactUpdate, FactValue};
use tidegate_policy::{Name, Reason, ScopeKey};

use crate::bindings::Bindings;
use crate::node::{Node, Ticket};
use crate::slab::growth;
use crate::table::{Address, Table, pack};
use crate::tick::Tick;
use crate::{Classify, Config, FactRecord, Input, NodeId, Output, OwnerId};

/// How many addresses one call classifies anew at most, once it has begun a scope.
const SLICE: usize = 1024;
/// Outdated timers that are kept before the heap is cleaned, beside as many as there are addresses.
const SPARE_TIMERS: usize = 1024;

/// What a namespace holds now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Facts.
    pub facts: u32,
    /// Names.
    pub names: u32,
}

/// What the ledger holds now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Scopes with at least one fact.
    pub scopes: usize,
    /// Names.
    pub names: usize,
    /// Addresses: entries of the gateway's own kernel.
    pub addresses: usize,
    /// Facts.
    pub facts: usize,
    /// Replies that wait for an ack.
    pub waiting: usize,
    /// Known nodes.
    pub nodes: usize,
    /// Kernel entries on nodes: pairs of node and address.
    pub held: usize,
    /// Timers, outdated ones too.
    pub timers: usize,
}

pub(crate) struct Scope {
    pub key: ScopeKey,
    pub owner: OwnerId,
    pub table: Arc<RwLock<Table>>,
}

/// Facts, classes, barrier, expiry and quotas. See the crate's documentation.
pub struct Ledger<C> {
    pub(crate) config: Config,
    pub(crate) classify: C,
    pub(crate) bindings: Arc<Bindings>,
    /// By number: a number is four octets, and timers outlive scopes.
    pub(crate) scopes: BTreeMap<u32, Scope>,
    pub(crate) numbers: BTreeMap<ScopeKey, u32>,
    next_number: u32,
    pub(crate) owners: BTreeMap<OwnerId, Usage>,
    pub(crate) nodes: BTreeMap<NodeId, Node>,
    /// Nodes whose streams are down and when they count as steered.
    pub(crate) falls: BTreeSet<(Duration, NodeId)>,
    pub(crate) tickets: BTreeMap<u64, Ticket>,
    pub(crate) deadlines: VecDeque<(Duration, u64)>,
    timers: BinaryHeap<Reverse<(Tick, u32, u32)>>,
    addresses: usize,
    /// Scopes whose classes are to be found anew.
    outdated: BTreeSet<u32>,
    /// Addresses whose facts or holders changed since [`Ledger::changes`], and whether anything but an import did it.
    changed: BTreeMap<(u32, u32), bool>,
    pub(crate) importing: bool,
    /// Which nodes hold what nobody told this ledger of; mostly none.
    pub(crate) orphans: BTreeMap<(ScopeKey, [u8; 16]), SmallVec<[NodeId; 2]>>,
    /// What this call pushes, by node.
    pub(crate) queued: BTreeMap<NodeId, Vec<FactUpdate>>,
    pub(crate) started: Duration,
    pub(crate) now: Duration,
}

/// The facts of an address.
fn records(scope: &Scope, table: &Table, a: &Address, now: Duration, each: &mut impl FnMut(FactRecord)) {
    for f in &a.facts {
        let Some(name) = table.name(f.name).and_then(|n| n.name()) else {
            continue;
        };
        each(FactRecord {
            scope: scope.key,
            owner: scope.owner,
            name: name.clone(),
            ip: a.ip(),
            remaining: f.expires.left(now),
            ttl: f.rrset.left(now),
            nodes: a.holders.iter().map(|h| h.node).collect(),
        });
    }
}

impl<C: Classify> Ledger<C> {
    /// An empty ledger at `now` since boot. `hash_keys` are random: names come from hostile clients.
    pub fn new(mut config: Config, hash_keys: [u64; 4], classify: C, now: Duration) -> Self {
        // Otherwise a kernel would expire a fact before the answer's own TTL has passed.
        config.grace = config.grace.max(config.hello_timeout);
        config.ttl_max = config.ttl_max.max(config.ttl_min);
        Self {
            config,
            classify,
            bindings: Arc::new(Bindings::new(hash_keys)),
            scopes: BTreeMap::new(),
            numbers: BTreeMap::new(),
            next_number: 0,
            owners: BTreeMap::new(),
            nodes: BTreeMap::new(),
            falls: BTreeSet::new(),
            tickets: BTreeMap::new(),
            deadlines: VecDeque::new(),
            timers: BinaryHeap::new(),
            addresses: 0,
            outdated: BTreeSet::new(),
            changed: BTreeMap::new(),
            importing: false,
            orphans: BTreeMap::new(),
            queued: BTreeMap::new(),
            started: now,
            now,
        }
    }

    /// The read side, for any thread.
    pub fn bindings(&self) -> Arc<Bindings> {
        self.bindings.clone()
    }

    /// Takes one input at `now` since boot and appends what should happen. Timers that are
    /// due are handled first. A time before an earlier one counts as that one.
    pub fn handle(&mut self, input: Input, now: Duration, out: &mut Vec<Output>) {
        self.now = self.now.max(now);
        self.run_timers(out);
        match input {
            Input::Tick => {}
            Input::Answer(answer) => self.answer(answer, out),
            Input::NodeUp { node } => self.node_up(node, true, out),
            Input::NodeReset { node } => self.node_up(node, false, out),
            Input::NodeDown { node } => self.node_down(node),
            Input::NodeGone { node } => self.node_gone(node, out),
            Input::Ack { node, seq } => self.ack(node, seq, out),
            Input::Orphans { node, facts } => self.adopt(node, facts, out),
            Input::Reclassify { scope: None } => self.outdated.extend(self.scopes.keys()),
            Input::Reclassify { scope: Some(key) } => {
                if let Some(&number) = self.numbers.get(&key) {
                    self.reclassify(number, out);
                }
            }
            Input::Idle { scope, ip } => self.idle(scope, ip, out),
            Input::ScopeLeft { scope, node } => self.scope_left(scope, node),
            Input::ScopeGone { scope } => self.scope_gone(scope, out),
            Input::Import(records) => {
                self.importing = true;
                records.into_iter().for_each(|r| self.import(r, out));
                self.importing = false;
            }
        }
        let mut examined = 0;
        while examined < SLICE {
            let Some(&number) = self.outdated.first() else { break };
            examined += self.reclassify(number, out);
        }
        self.flush(out);
    }

    /// When the next call is due at the latest, since boot; `None` means not before the next input.
    pub fn next_deadline(&self) -> Option<Duration> {
        if !self.outdated.is_empty() {
            return Some(self.now);
        }
        let timer = self.timers.peek().map(|Reverse((t, _, _))| t.duration());
        let reply = self.deadlines.front().map(|(t, _)| *t);
        let fall = self.falls.first().map(|(t, _)| *t);
        [timer, reply, fall].into_iter().flatten().min()
    }

    /// How long an answer waits for its node at most.
    pub fn barrier(&self) -> Duration {
        self.config.barrier
    }

    /// What is held now.
    pub fn counts(&self) -> Counts {
        Counts {
            scopes: self.scopes.len(),
            names: self.owners.values().map(|u| u.names as usize).sum(),
            addresses: self.addresses,
            facts: self.owners.values().map(|u| u.facts as usize).sum(),
            waiting: self.tickets.len(),
            nodes: self.nodes.len(),
            held: self.nodes.values().map(Node::held).sum(),
            timers: self.timers.len(),
        }
    }

    /// The known nodes.
    pub fn nodes(&self) -> impl Iterator<Item = NodeId> {
        self.nodes.keys().copied()
    }

    /// What a namespace holds now.
    pub fn usage(&self, owner: OwnerId) -> Usage {
        self.owners.get(&owner).copied().unwrap_or_default()
    }

    /// Every fact with its remaining life at `now` since boot, for [`Input::Import`] elsewhere or after a restart.
    pub fn export(&self, now: Duration, mut each: impl FnMut(FactRecord)) {
        for scope in self.scopes.values() {
            let table = scope.table.read();
            for a in (0..table.end()).filter_map(|i| table.address(i)) {
                records(scope, &table, a, now, &mut each);
            }
        }
    }

    /// As [`Ledger::export`], but only facts of addresses that changed since the last call: a fact is new or holds
    /// longer, or one more node has it. The flag says whether this ledger learnt it, rather than imported it. Facts
    /// that ended are not told: they end everywhere by themselves. Needs [`Config::track`].
    pub fn changes(&mut self, now: Duration, mut each: impl FnMut(FactRecord, bool)) {
        for ((number, index), own) in std::mem::take(&mut self.changed) {
            let Some(scope) = self.scopes.get(&number) else { continue };
            let table = scope.table.read();
            if let Some(a) = table.address(index) {
                records(scope, &table, a, now, &mut |r| each(r, own));
            }
        }
    }

    /// Whether [`Ledger::changes`] has something to tell.
    pub fn has_changes(&self) -> bool {
        !self.changed.is_empty()
    }

    pub(crate) fn tick(&self) -> Tick {
        Tick::floor(self.now)
    }

    /// The scope's number; a new one for a scope that holds nothing yet.
    pub(crate) fn number(&mut self, key: ScopeKey, owner: OwnerId) -> u32 {
        if let Some(&n) = self.numbers.get(&key) {
            return n;
        }
        while self.scopes.contains_key(&self.next_number) {
            self.next_number = self.next_number.wrapping_add(1);
        }
        let number = self.next_number;
        self.next_number = number.wrapping_add(1);
        let table = Arc::new(RwLock::new(Table::default()));
        self.bindings.add_scope(key, table.clone());
        self.scopes.insert(number, Scope { key, owner, table });
        self.numbers.insert(key, number);
        number
    }

    /// Forgets a scope that holds nothing.
    pub(crate) fn drop_if_empty(&mut self, number: u32) {
        let Some(scope) = self.scopes.get(&number) else { return };
        let table = scope.table.read();
        if table.names() > 0 || table.addresses() > 0 {
            return;
        }
        drop(table);
        self.bindings.remove_scope(scope.key);
        self.numbers.remove(&scope.key);
        self.outdated.remove(&number);
        self.scopes.remove(&number);
    }

    /// Takes `facts` and `names` off a namespace's account.
    fn give_back(&mut self, owner: OwnerId, facts: u32, names: u32) {
        let Some(u) = self.owners.get_mut(&owner) else { return };
        u.facts = u.facts.saturating_sub(facts);
        u.names = u.names.saturating_sub(names);
        if *u == Usage::default() {
            self.owners.remove(&owner);
        }
    }

    pub(crate) fn count_address(&mut self) {
        self.addresses += 1;
    }

    /// Sets an address's timer to its next event, if that is earlier than what is set.
    pub(crate) fn arm(&mut self, number: u32, index: u32) {
        let now = self.tick();
        let Some(scope) = self.scopes.get(&number) else { return };
        let mut table = scope.table.write();
        let Some(a) = table.address_mut(index) else { return };
        let due = a.next_event(now, self.config.recheck, self.config.sweep);
        if due < a.armed {
            a.armed = due;
            drop(table);
            if self.timers.len() == self.timers.capacity() {
                self.timers.reserve_exact(growth(self.timers.len()));
            }
            self.timers.push(Reverse((due, number, index)));
        }
    }

    /// Drops outdated timers when most are, and room that a burst has left.
    fn clean_timers(&mut self) {
        if self.timers.len() > 2 * self.addresses + SPARE_TIMERS {
            let scopes = &self.scopes;
            let mut seen = BTreeSet::new();
            self.timers.retain(|&Reverse((due, number, index))| {
                let armed = |s: &Scope| s.table.read().address(index).is_some_and(|a| a.armed == due);
                scopes.get(&number).is_some_and(armed) && seen.insert((number, index))
            });
        }
        if self.timers.capacity() > 4 * (self.timers.len() + SPARE_TIMERS) {
            self.timers.shrink_to(2 * self.timers.len() + SPARE_TIMERS);
        }
    }

    fn run_timers(&mut self, out: &mut Vec<Output>) {
        let now = self.tick();
        while let Some(&Reverse((due, number, index))) = self.timers.peek() {
            if due > now {
                break;
            }
            self.timers.pop();
            self.run_timer(number, index, due, out);
        }
        self.clean_timers();
        while let Some(&(due, node)) = self.falls.first() {
            if due > self.now {
                break;
            }
            self.falls.pop_first();
            self.node_fell(node, out);
        }
        while let Some(&(due, id)) = self.deadlines.front() {
            if due > self.now {
                break;
            }
            self.deadlines.pop_front();
            self.time_out(id, due, out);
        }
    }

    /// Something is due at an address, unless the timer is outdated.
    fn run_timer(&mut self, number: u32, index: u32, due: Tick, out: &mut Vec<Output>) {
        let now = self.tick();
        let Some(scope) = self.scopes.get(&number) else { return };
        let key = scope.key;
        let mut table = scope.table.write();
        let Some(a) = table.address_mut(index).filter(|a| a.armed == due) else {
            return;
        };
        a.armed = Tick::MAX;
        let sweep = self.config.sweep;
        let (ip, swept) = (a.ip(), a.facts.iter().any(|f| f.expires.plus(sweep) <= now));
        let ask = a.next_event(now, self.config.recheck, sweep) <= now;
        if ask {
            a.asked = now;
        }
        drop(table);
        if swept {
            self.unbind(number, index, |expires| expires.plus(sweep) <= now, out);
        }
        let expired = |s: &Scope| s.table.read().address(index).is_some_and(|a| a.has_expired(now));
        if ask && self.scopes.get(&number).is_some_and(expired) {
            out.push(Output::CheckIdle { scope: key, ip });
        }
        self.arm(number, index);
    }

    fn idle(&mut self, key: ScopeKey, ip: IpAddr, out: &mut Vec<Output>) {
        let now = self.tick();
        let Some(&number) = self.numbers.get(&key) else { return };
        let hash = &self.bindings.hash;
        let Some(index) = self.scopes.get(&number).and_then(|s| s.table.read().find_ip(hash, pack(ip))) else {
            return;
        };
        self.unbind(number, index, |expires| expires <= now, out);
    }

    /// Deletes the facts of an address whose expiry is `over`; the address with the last of them.
    fn unbind(&mut self, number: u32, index: u32, over: impl Fn(Tick) -> bool, out: &mut Vec<Output>) {
        let Some(scope) = self.scopes.get(&number) else { return };
        let (owner, bindings) = (scope.owner, self.bindings.clone());
        let table = scope.table.clone();
        let mut t = table.write();
        let Some(a) = t.address_mut(index) else { return };
        let gone: SmallVec<[u32; 4]> = a.facts.iter().filter(|f| over(f.expires)).map(|f| f.name).collect();
        if gone.is_empty() {
            return;
        }
        a.facts.retain(|f| !over(f.expires));
        if a.facts.len() <= 1 {
            a.facts.shrink_to_fit();
        }
        let left = !a.facts.is_empty();
        let mut names = 0;
        for name in &gone {
            let Some(n) = t.name_mut(*name) else { continue };
            n.addresses.retain(|i| *i != index);
            if n.addresses.is_empty() {
                t.remove_name(&bindings.hash, *name);
                names += 1;
            }
        }
        let removed = (!left).then(|| t.remove_ip(&bindings.hash, index));
        drop(t);
        // A table has far fewer than 2^32 facts.
        self.give_back(owner, gone.len() as u32, names);
        match removed {
            None => self.settle(number, index, &[], true, false, out),
            Some(a) => self.forget(number, &a, out),
        }
    }

    /// Tells everybody who has the address that it is gone; the table has let it go already.
    fn forget(&mut self, number: u32, a: &Address, out: &mut Vec<Output>) {
        let Some(scope) = self.scopes.get(&number).map(|s| s.key) else {
            return;
        };
        let (ip, gone) = (a.ip(), FactUpdate { scope, ip: a.ip(), value: None });
        self.addresses -= 1;
        out.push(Output::Local(gone.clone()));
        for h in &a.holders {
            self.queue(h.node, gone.clone());
            if let Some(n) = self.nodes.get_mut(&h.node) {
                n.release(number);
            }
        }
        out.push(Output::Unbound { scope, ip });
        self.drop_if_empty(number);
    }

    fn scope_gone(&mut self, key: ScopeKey, out: &mut Vec<Output>) {
        let Some(&number) = self.numbers.get(&key) else { return };
        let waiting: Vec<u64> = self.tickets.iter().filter(|(_, t)| t.scope == number).map(|(id, _)| *id).collect();
        for ticket in waiting {
            self.tickets.remove(&ticket);
            out.push(Output::Fail { ticket, reason: Reason::BarrierTimeout });
        }
        let end = self.scopes.get(&number).map_or(0, |s| s.table.read().end());
        for index in 0..end {
            self.unbind(number, index, |_| true, out);
        }
    }

    /// Finds the classes of a scope's addresses anew; gives their number.
    pub(crate) fn reclassify(&mut self, number: u32, out: &mut Vec<Output>) -> usize {
        self.outdated.remove(&number);
        let end = self.scopes.get(&number).map_or(0, |s| s.table.read().end());
        for index in 0..end {
            self.settle(number, index, &[], true, false, out);
        }
        end as usize + 1
    }

    pub(crate) fn is_outdated(&self, number: u32) -> bool {
        self.outdated.contains(&number)
    }

    /// Brings kernels to what an address is now. `reclass`: its names or the policy may have
    /// changed; `extended`: it is new or holds longer; `askers`: nodes that need it.
    pub(crate) fn settle(
        &mut self,
        number: u32,
        index: u32,
        askers: &[NodeId],
        reclass: bool,
        extended: bool,
        out: &mut Vec<Output>,
    ) {
        let Some(scope) = self.scopes.get(&number) else { return };
        let (key, table) = (scope.key, scope.table.clone());
        let class = if reclass {
            // No lock is held while the classifier works.
            let t = table.read();
            let Some(a) = t.address(index) else { return };
            let ip = a.ip();
            let names: SmallVec<[Name; 4]> =
                a.facts.iter().filter_map(|f| t.name(f.name).and_then(|n| n.name()).cloned()).collect();
            drop(t);
            Some(self.classify.class(key, ip, &mut names.iter()))
        } else {
            None
        };
        let mut t = table.write();
        let Some(a) = t.address_mut(index) else { return };
        let changed = class.is_some_and(|c| c != a.class());
        if let Some(class) = class {
            a.set_class(class);
        }
        if changed {
            for h in &mut a.holders {
                (h.sent, h.confirmed) = (Tick::ZERO, Tick::ZERO);
            }
        }
        let (expires, class) = (a.expires(), a.class());
        let update = |until: Tick| FactUpdate {
            scope: key,
            ip: a.ip(),
            value: Some(FactValue { class, ttl: until.left(self.now) }),
        };
        if changed || extended {
            out.push(Output::Local(update(expires)));
        }
        let kernel = expires.minus(self.config.hello_timeout);
        let kernel_update = update(kernel);
        let mut told = extended;
        let orphaned = self.orphans.get(&(key, pack(a.ip())));
        let askers: SmallVec<[NodeId; 4]> = askers.iter().chain(orphaned.into_iter().flatten()).copied().collect();
        for &node in &askers {
            if a.holder(node).is_none() {
                a.hold(node);
                self.node(node).hold(number);
                told = true;
            }
        }
        if told && self.config.track {
            *self.changed.entry((number, index)).or_default() |= !self.importing;
        }
        for h in &mut a.holders {
            let wanted = changed || (askers.contains(&h.node) && h.sent < kernel);
            if wanted && let Some(seq) = self.queue(h.node, kernel_update.clone()) {
                // Only the ack of exactly this push confirms; 32 bits tell it from any that are under way.
                (h.sent, h.seq) = (kernel, seq as u32);
            }
        }
    }
}
