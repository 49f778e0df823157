//! The names that the cluster's DNS answers by itself, without their suffix.

use std::collections::BTreeMap;
use std::sync::Arc;

use tidegate_policy::shards::Shards;
use tidegate_policy::state::{MAX_NAMES, Named};

use super::Key;

/// Names that there was no place for: they are next when others go.
#[derive(Debug, Default)]
pub(super) struct Waiting(BTreeMap<Arc<str>, Named>);

/// The name of a Service.
pub(super) fn service((namespace, name): &Key) -> String {
    format!("{name}.{namespace}.svc")
}

impl Waiting {
    /// Puts a name in place, or takes it away; says whether that changed anything.
    pub fn set(&mut self, names: &mut Shards<Arc<str>, Named>, name: &str, named: Option<Named>) -> bool {
        let known = names.get(name).copied();
        match named {
            Some(named) if known.is_none() && names.len() >= MAX_NAMES => {
                self.0.insert(name.into(), named);
                false
            }
            Some(named) if known == Some(named) => false,
            Some(named) => {
                names.insert(name.into(), named);
                true
            }
            None if names.remove(name).is_none() => {
                self.0.remove(name);
                false
            }
            None => {
                if let Some((next, named)) = self.0.pop_first() {
                    names.insert(next, named);
                }
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_without_a_place_gets_the_next_free_one() {
        let (mut names, mut waiting) = (Shards::default(), Waiting::default());
        let name = |n: usize| format!("s{n}.shop.svc");
        assert!((0..MAX_NAMES).all(|n| waiting.set(&mut names, &name(n), Some(Named::Inside))));
        for n in [MAX_NAMES, MAX_NAMES + 1] {
            assert!(!waiting.set(&mut names, &name(n), Some(Named::Inside)));
        }
        // What waits may change and go, too; what is known may change.
        assert!(!waiting.set(&mut names, &name(MAX_NAMES), Some(Named::Outside)));
        assert!(!waiting.set(&mut names, &name(MAX_NAMES + 1), None));
        assert!(waiting.set(&mut names, &name(1), Some(Named::Outside)));
        assert!(waiting.set(&mut names, &name(7), None));
        let of = |n: usize| names.get(name(n).as_str()).copied();
        assert_eq!((names.len(), of(7), of(MAX_NAMES)), (MAX_NAMES, None, Some(Named::Outside)));
        assert!(waiting.0.is_empty());
        assert!(waiting.set(&mut names, &name(8), None));
        assert_eq!(names.len(), MAX_NAMES - 1);
    }
}
