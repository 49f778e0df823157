//! Names and the small numbers that stand for them.

use std::sync::Arc;

use ahash::AHashMap;
use parking_lot::RwLock;

/// Dense ids of nodes and namespaces by name; ids are never used again, also not those of names that were forgotten.
#[derive(Debug, Default)]
pub struct Ids(RwLock<IdTable>);

#[derive(Debug, Default)]
struct IdTable {
    ids: AHashMap<Arc<str>, u32>,
    names: AHashMap<u32, Arc<str>>,
    next: u32,
}

impl Ids {
    /// The id of a name, new if it was not known.
    pub fn id(&self, name: &str) -> u32 {
        if let Some(id) = self.0.read().ids.get(name) {
            return *id;
        }
        let mut guard = self.0.write();
        let IdTable { ids, names, next } = &mut *guard;
        if let Some(id) = ids.get(name) {
            return *id;
        }
        let id = *next;
        // A new node or namespace every second would take a century.
        *next = next.wrapping_add(1);
        let name: Arc<str> = name.into();
        ids.insert(name.clone(), id);
        names.insert(id, name);
        id
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.read().names.len()
    }

    /// The name of an id.
    pub(super) fn name(&self, id: u32) -> Option<Arc<str>> {
        self.0.read().names.get(&id).cloned()
    }

    /// Forgets names that `keep` does not want.
    pub(super) fn retain(&self, keep: impl Fn(u32, &str) -> bool) {
        let mut guard = self.0.write();
        let IdTable { ids, names, .. } = &mut *guard;
        names.retain(|id, name| keep(*id, name));
        ids.retain(|_, id| names.contains_key(id));
    }
}
