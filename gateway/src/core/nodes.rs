//! What kernels are told: our own, and those of the nodes.

use std::collections::BTreeSet;

use tidegate_ledger::{Input, NodeId, OwnerId, Usage};
use tidegate_policy::state::{Entry, FactUpdate, NodeState};
use tidegate_policy::{ClassKey, ScopeKey};
use tidegate_proto::{FactsBatch, GrantEntry, StateBatch};

use super::Run;
use super::machine::{Basis, Delta, Uses, take_news};
use super::pushes::Push;
use crate::desired::Target;

impl Run {
    pub(super) fn apply_own(&mut self) {
        self.whole_own(false);
    }

    fn whole_own(&mut self, full: bool) {
        self.own = self.whole(Target::Own);
        self.own_uses = Uses::of(&self.own);
        self.apply_maps(full);
    }

    /// Brings every node to what follows from policy, facts and ownership.
    pub(super) fn send_states(&mut self) {
        let names: Vec<String> = self.nodes.keys().cloned().collect();
        for node in names {
            self.send_state(&node);
        }
        self.told = self.core.desired.said();
    }

    /// What all machines hold alike.
    pub(super) fn frame(&self) -> NodeState {
        self.core.desired.frame(&self.compiled)
    }

    /// Brings our own kernel and every node from one world to the next, at the cost of what has changed. What all machines
    /// hold alike, and who owns what, must be as it was when they were told last.
    pub(super) fn follow(&mut self, delta: &Delta) {
        let (shared, gateway, boot_id) = (self.core.shared.clone(), self.core.gateway.clone(), self.core.boot_id);
        let world = &self.compiled.world;
        let basis = Basis::new(&self.core.desired, world, &self.classes, shared.now());
        let own = self.own_uses.follow(&self.own, &basis, Target::Own, delta);
        let mut told = Vec::new();
        for (node, n) in self.nodes.iter_mut().filter(|(_, n)| n.state.is_some() && n.sent.begun) {
            let news = n.uses.follow(&n.sent.state, &basis, Target::Node(node), delta);
            told.extend(n.sent.news(&gateway, boot_id, news).map(|batch| (node.clone(), batch)));
        }
        // Our own kernel first, as ever.
        take_news(&mut self.own, &own.set, &own.delete);
        match self.core.datapath.change(&own.set, &own.delete) {
            Ok(true) => {}
            Ok(false) => self.apply_maps(false),
            Err(error) => {
                tracing::error!(%error, "cannot change the kernel's maps: bringing all of them up to date");
                self.apply_maps(false);
            }
        }
        for (node, batch) in told {
            self.say_state(&node, batch);
        }
        self.told = self.core.desired.said();
    }

    fn whole(&self, target: Target<'_>) -> NodeState {
        let (desired, now) = (&self.core.desired, self.core.shared.now());
        let basis = Basis::new(desired, &self.compiled.world, &self.classes, now);
        desired.state(&self.compiled, target, |scope| basis.live(scope))
    }

    /// Our own kernel must hold facts, with their classes' grants, before any answer says them.
    pub(super) fn local(&mut self, updates: &[FactUpdate]) {
        let now = self.core.shared.now();
        let mut new = Vec::new();
        for update in updates {
            let class = update.value.map(|v| v.class);
            let first = self.classes.note(update.scope, update.ip, class, now);
            let Some(class) = class.filter(|_| first) else { continue };
            // Of scopes that another gateway owns this kernel carries nothing.
            let scope = self.compiled.world.scope(update.scope);
            if scope.is_none_or(|s| self.core.desired.way_out(s).is_none()) {
                continue;
            }
            let missing = |(g, ports): &(_, _)| self.own.grants.get(&(*g, class)) != Some(ports);
            let grants = self.compiled.grants(update.scope, class).into_iter().filter(missing);
            new.extend(grants.map(|(g, ports)| (g, class, ports)));
        }
        if let Err(error) = self.core.datapath.grants(&new) {
            tracing::error!(%error, "cannot write grants into the kernel");
        }
        self.own_uses.pushed(new.iter().map(|(group, class, _)| (*group, *class)));
        for (group, class, ports) in new {
            self.own.set(Entry::Grant(group, class, ports));
        }
        if let Err(error) = self.core.datapath.facts(updates) {
            tracing::error!(%error, "cannot write facts into the kernel");
        }
    }

    pub(super) fn push(&mut self, node: NodeId, push: Push) {
        let Push { seq, snapshot, facts } = push;
        let Some(name) = self.core.shared.nodes.name(node.0) else { return };
        let Some(n) = self.nodes.get_mut(&*name) else { return };
        let classes: BTreeSet<(ScopeKey, ClassKey)> =
            facts.iter().filter_map(|f| Some((f.scope, f.value.as_ref()?.class))).collect();
        let needed = classes.into_iter().flat_map(|(scope, class)| {
            let grants = self.compiled.grants(scope, class).into_iter();
            grants.map(move |(group, ports)| GrantEntry { group, class, ports })
        });
        let grants = n.sent.missing(n.state.is_some(), needed);
        let named = n.sent.name(&self.core.gateway, self.core.boot_id, &grants);
        n.uses.pushed(grants.iter().map(|g| (g.group, g.class)));
        n.facts_seq = seq;
        let (boot_id, steps_back) = (self.core.boot_id, self.stale.is_some());
        let batch = FactsBatch { boot_id, sequence: seq, snapshot, more: false, grants, facts, steps_back };
        if let Some(named) = named {
            self.say(&name, named);
        }
        let Some(n) = self.nodes.get_mut(&*name) else { return };
        let Some((_, out)) = &n.facts else { return };
        if batch.into_messages().into_iter().any(|m| out.try_send(m).is_err()) {
            tracing::warn!(node = &*name, "a node does not keep up with its facts: it will start anew");
            self.facts_down(&name);
        }
    }

    /// A node holds facts that nobody who lives told it of: it hears of them from now on, as far as it has pods for them.
    pub(super) fn adopt(&mut self, node: &str) {
        let Some(seen) = self.nodes.get(node).and_then(|n| n.seen.as_ref()) else { return };
        let placed = |(scope, _): &&(ScopeKey, _)| self.placement.has(*scope, node);
        let facts = seen.orphans.iter().filter(placed).copied().collect();
        let node = NodeId(self.core.shared.nodes.id(node));
        self.feed(Input::Orphans { node, facts });
    }

    pub(super) fn send_state(&mut self, node: &str) {
        if self.nodes.get(node).is_none_or(|n| n.state.is_none()) {
            return;
        }
        let wanted = self.whole(Target::Node(node));
        let Some(n) = self.nodes.get_mut(node) else { return };
        let batch = n.sent.state(&self.core.gateway, self.core.boot_id, wanted);
        n.uses = Uses::of(&n.sent.state);
        if let Some(batch) = batch {
            self.say_state(node, batch);
        }
    }

    /// Puts a state, or what is new in it, into a node's stream.
    fn say_state(&mut self, node: &str, batch: StateBatch) {
        let Some(n) = self.nodes.get(node) else { return };
        // A stream's first state is what the node mostly holds already, and without its facts' acks nothing waits.
        if !batch.snapshot && n.facts.is_some() {
            let pod = |e: &Entry| if let Entry::Endpoint(ip, _) = e { Some(*ip) } else { None };
            let id = NodeId(self.core.shared.nodes.id(node));
            self.core.shared.settling.sent(id, batch.sequence, batch.set.iter().filter_map(pod));
        }
        self.say(node, batch);
    }

    /// Puts a message into a node's State stream.
    fn say(&mut self, node: &str, batch: StateBatch) {
        let Some(n) = self.nodes.get_mut(node) else { return };
        let Some((_, out)) = &n.state else { return };
        n.status.sent = batch.sequence;
        if batch.into_messages().into_iter().any(|m| out.try_send(m).is_err()) {
            tracing::warn!(node, "a node does not keep up with its state: it will start anew");
            n.state = None;
            self.settled_without(node);
        }
    }

    /// A node was sent all that concerns it of the present compile.
    pub(super) fn compile_sent(&mut self, node: &str) {
        let Some(n) = self.nodes.get_mut(node).filter(|n| n.state.is_some()) else { return };
        n.compiles.sent(self.compiled.number, n.sent.sequence(), n.status.applied);
        n.status.held = n.compiles.compile();
    }

    /// Forgets nodes that are no part of the cluster any more, and namespaces that are gone with all of their facts.
    fn forget(&mut self) {
        let compiled = self.compiled.clone();
        let placed = self.placement.nodes();
        let stays = |name: &str| compiled.nodes.contains_key(name) || placed.contains(name);
        self.nodes.retain(|name, n| stays(name) || n.state.is_some() || n.facts.is_some());
        let names = &self.core.shared.nodes;
        names.retain(|_, name| stays(name) || self.nodes.contains_key(name));
        let gone: Vec<NodeId> = self.core.ledger.nodes().filter(|n| names.name(n.0).is_none()).collect();
        for node in gone {
            self.feed(Input::NodeGone { node });
        }
        let known: BTreeSet<&str> = compiled.world.scopes().values().map(|s| &**s.namespace()).collect();
        let ledger = &self.core.ledger;
        let used = |id| ledger.usage(OwnerId(id)) != Usage::default();
        self.core.shared.namespaces.retain(|id, name| known.contains(name) || used(id));
    }

    /// Repairs what another program changed in our maps, and forgets what nothing names any more.
    pub(super) fn full_pass(&mut self) {
        if !self.settled {
            return;
        }
        self.forget();
        self.whole_own(true);
        self.send_states();
        let now = self.core.shared.now();
        self.classes.news(now);
        // Classes that are pushed ahead are known to their scopes.
        self.compiled.world.retain_classes(&self.classes.active(now).map(|(_, c)| c).collect());
        match self.core.datapath.sweep() {
            Ok(swept) => tidegate_agent::events::repaired("map", swept.repaired),
            Err(error) => tracing::warn!(%error, "cannot sweep the kernel's tables"),
        }
    }

    fn apply_maps(&mut self, full: bool) {
        let local = self.core.desired.local();
        match self.core.datapath.apply(&self.own, &local, full) {
            Ok(applied) if applied.repaired + applied.pinned > 0 => {
                let (entries, pins) = (applied.repaired, applied.pinned);
                tracing::warn!(entries, pins, "another program had changed our kernel maps: repaired");
                tidegate_agent::events::repaired("map", entries);
                tidegate_agent::events::repaired("pin", pins);
            }
            Ok(_) => {}
            Err(error) => tracing::error!(%error, "cannot bring the kernel's maps up to date"),
        }
    }

    pub(super) fn heartbeat(&mut self) {
        let boot_id = self.core.boot_id;
        let gateway = self.core.gateway.clone();
        // Our own program judges by the same rules: to itself this gateway is alive.
        if let Err(error) = self.core.datapath.heartbeat(&gateway) {
            tracing::error!(%error, "cannot write the heartbeat");
        }
        // One that knows less than another one is not to be asked any more: that one answers before this one ceases to.
        let steps_back = self.stale.is_some();
        let mut down = Vec::new();
        for (name, n) in &mut self.nodes {
            n.status.connected = n.state.is_some() && n.facts.is_some();
            if let Some((_, out)) = &n.facts {
                let beat = FactsBatch { steps_back, ..FactsBatch::heartbeat(boot_id, n.facts_seq) };
                if beat.into_messages().into_iter().any(|m| out.try_send(m).is_err()) {
                    down.push(name.clone());
                }
            }
        }
        for node in down {
            self.facts_down(&node);
        }
        self.beat_peers();
    }
}
