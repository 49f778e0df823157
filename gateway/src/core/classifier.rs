//! Finds classes for the ledger.

use std::net::IpAddr;
use std::sync::Arc;

use tidegate_ledger::Classify;
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
