//! What kernels are told: the gateway's own, and those of the nodes, as `gateway/src/core/nodes.rs` has it.

use std::collections::BTreeSet;

use tidegate_ledger::NodeId;
use tidegate_policy::state::{Entry, FactUpdate, NodeState};
use tidegate_policy::world::World;
use tidegate_policy::{ClassKey, ScopeKey};
use tidegate_proto::{FactsBatch, GrantEntry, StateBatch};

use crate::desired::{Desired, Target};
use crate::gateway::{Gateway, node_id, to_wire};
use crate::machine::{Basis, Delta, Uses, take_news};
use crate::objects::NODES;
use crate::pushes::Push;

impl Gateway {
    /// The pass that comes every half a minute.
    pub fn full_pass(&mut self) {
        if self.version.is_none() {
            return;
        }
        self.apply_own();
        self.send_states();
        let now = self.kernel.now;
        self.classes.news(now);
        self.world().retain_classes(&self.classes.active(now).map(|(_, c)| c).collect());
    }

    pub(crate) fn send_states(&mut self) {
        NODES.iter().for_each(|n| self.send_state(n));
        self.told = self.desired.said();
    }

    pub(crate) fn apply_own(&mut self) {
        self.own = self.whole(Target::Own);
        self.own_uses = Uses::of(&self.own);
        self.apply_maps();
    }

    fn apply_maps(&mut self) {
        self.kernel.apply(&self.own, self.node, &BTreeSet::new(), &BTreeSet::new());
    }

    /// Whether nodes were told of another owner of a pair that scopes had and have.
    pub(crate) fn owners_changed(&self, old: &World, world: &World) -> bool {
        let pairs = |w: &World| w.ways().filter_map(|(s, _)| Desired::pair(s)).collect::<BTreeSet<_>>();
        let claims = self.desired.claims();
        pairs(old).intersection(&pairs(world)).any(|p| self.told.get(p) != claims.get(p))
    }

    /// Brings its own kernel and every node from one world to the next, at the cost of what has changed.
    pub(crate) fn follow(&mut self, delta: &Delta) {
        let compiled = self.compiled.clone();
        let basis = Basis::new(&self.desired, &compiled.world, &self.classes, self.kernel.now);
        let own = self.own_uses.follow(&self.own, &basis, Target::Own, delta);
        let mut told = Vec::new();
        for (node, n) in self.nodes.iter_mut().filter(|(_, n)| n.state && n.sent.begun) {
            let news = n.uses.follow(&n.sent.state, &basis, Target::Node(node), delta);
            told.extend(n.sent.news(self.name, self.boot, news).map(|batch| (*node, batch)));
        }
        take_news(&mut self.own, &own.set, &own.delete);
        self.apply_maps();
        told.into_iter().for_each(|(node, batch)| self.say_state(node, batch));
        self.told = self.desired.said();
    }

    fn whole(&self, target: Target<'_>) -> NodeState {
        let basis = Basis::new(&self.desired, &self.compiled.world, &self.classes, self.kernel.now);
        self.desired.state(&self.compiled, target, |scope| basis.live(scope))
    }

    /// What it would tell a node that knows nothing.
    pub fn fresh(&self, node: &str) -> NodeState {
        self.whole(Target::Node(node))
    }

    pub(crate) fn send_state(&mut self, node: &'static str) {
        if self.nodes.get(node).is_none_or(|n| !n.state) {
            return;
        }
        let wanted = self.whole(Target::Node(node));
        let Some(n) = self.nodes.get_mut(node) else { return };
        let batch = n.sent.state(self.name, self.boot, wanted);
        n.uses = Uses::of(&n.sent.state);
        if let Some(batch) = batch {
            self.say_state(node, batch);
        }
    }

    fn say_state(&mut self, node: &'static str, batch: StateBatch) {
        let Some(n) = self.nodes.get_mut(node) else { return };
        if !batch.snapshot && n.facts {
            let pod = |e: &Entry| if let Entry::Endpoint(ip, _) = e { Some(*ip) } else { None };
            self.settling.sent(node_id(node), batch.sequence, batch.set.iter().filter_map(pod));
        }
        to_wire(batch.into_messages(), &mut n.state_out);
    }

    pub(crate) fn local(&mut self, updates: &[FactUpdate]) {
        let world = self.world();
        let mut new = Vec::new();
        for u in updates {
            let class = u.value.map(|v| v.class);
            let first = self.classes.note(u.scope, u.ip, class, self.kernel.now);
            let Some(class) = class.filter(|_| first) else { continue };
            if world.scope(u.scope).is_none_or(|s| self.desired.way_out(s).is_none()) {
                continue;
            }
            let missing = |(g, ports): &(_, _)| self.own.grants.get(&(*g, class)) != Some(ports);
            let grants = self.compiled.grants(u.scope, class).into_iter().filter(missing);
            new.extend(grants.map(|(g, ports)| (g, class, ports)));
        }
        self.kernel.grants(&new);
        self.own_uses.pushed(new.iter().map(|(group, class, _)| (*group, *class)));
        for (g, c, ports) in new {
            self.own.set(Entry::Grant(g, c, ports));
        }
        self.kernel.facts(updates);
    }

    pub(crate) fn push(&mut self, node: NodeId, push: Push) {
        let Push { seq, snapshot, facts } = push;
        let name = NODES[node.0 as usize];
        let Some(n) = self.nodes.get_mut(name) else { return };
        let classes: BTreeSet<(ScopeKey, ClassKey)> =
            facts.iter().filter_map(|f| Some((f.scope, f.value.as_ref()?.class))).collect();
        let needed = classes.into_iter().flat_map(|(scope, class)| {
            let grants = self.compiled.grants(scope, class).into_iter();
            grants.map(move |(group, ports)| GrantEntry { group, class, ports })
        });
        let grants = n.sent.missing(n.state, needed);
        if let Some(named) = n.sent.name(self.name, self.boot, &grants).filter(|_| n.state) {
            to_wire(named.into_messages(), &mut n.state_out);
        }
        n.uses.pushed(grants.iter().map(|g| (g.group, g.class)));
        let batch = FactsBatch { boot_id: self.boot, sequence: seq, snapshot, grants, facts, ..FactsBatch::default() };
        if n.facts {
            to_wire(batch.into_messages(), &mut n.facts_out);
        }
    }
}
