//! Which classes facts have.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ahash::AHashMap;
use tidegate_ledger::Classify;
use tidegate_policy::world::World;
use tidegate_policy::{ClassKey, Name, ScopeKey};

use super::Shared;

/// Finds classes in whatever policy holds now.
pub struct Classifier(pub Arc<Shared>);

impl Classify for Classifier {
    fn class(&self, scope: ScopeKey, ip: IpAddr, names: &mut dyn Iterator<Item = &Name>) -> ClassKey {
        match self.0.world.load().scope(scope) {
            Some(s) => s.class(ip, names),
            // No grant has this class: it allows nothing.
            None => ClassKey(0),
        }
    }
}

/// Which classes facts have, so that their grants are pushed and those of others are not.
#[derive(Default)]
pub(super) struct Classes {
    pub(super) of: AHashMap<(ScopeKey, IpAddr), ClassKey>,
    pub(super) count: BTreeMap<(ScopeKey, ClassKey), u32>,
}

impl Classes {
    /// Notes a fact's class; says whether no other fact of the scope had it.
    pub(super) fn note(&mut self, scope: ScopeKey, ip: IpAddr, class: Option<ClassKey>) -> bool {
        let old = match class {
            Some(c) => self.of.insert((scope, ip), c),
            None => self.of.remove(&(scope, ip)),
        };
        if old == class {
            return false;
        }
        if let Some(old) = old
            && let Some(n) = self.count.get_mut(&(scope, old))
        {
            *n -= 1;
            if *n == 0 {
                self.count.remove(&(scope, old));
            }
        }
        let Some(class) = class else { return false };
        let n = self.count.entry((scope, class)).or_default();
        *n += 1;
        *n == 1
    }

    pub(super) fn active(&self) -> impl Iterator<Item = (ScopeKey, ClassKey)> {
        self.count.keys().copied()
    }
}

/// Which nodes have a pod of which scope.
pub(super) fn placed(world: &World) -> BTreeSet<(ScopeKey, Arc<str>)> {
    world.endpoints().filter_map(|(_, e)| Some((e.member?.scope, e.who.node.clone()))).collect()
}
