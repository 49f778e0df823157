//! The names that the cluster's DNS answers by itself, without their suffix.

use std::sync::Arc;

use tidegate_policy::shards::Shards;
use tidegate_policy::state::Named;

use super::Key;

/// The most names. Those of more are answered by gateways alone.
const MAX_NAMES: usize = 65_536;

/// The name of a Service.
pub(super) fn service((namespace, name): &Key) -> String {
    format!("{name}.{namespace}.svc")
}

/// Puts a name in place, or takes it away; says whether that changed anything.
pub(super) fn set(names: &mut Shards<Arc<str>, Named>, name: &str, named: Option<Named>) -> bool {
    match named {
        Some(named) if names.get(name) == Some(&named) => false,
        Some(_) if names.len() >= MAX_NAMES && !names.contains_key(name) => false,
        Some(named) => {
            names.insert(name.into(), named);
            true
        }
        None => names.remove(name).is_some(),
    }
}
