//! What people write: manifests and annotations.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use tidegate_api::Reader;
use tidegate_api::annotation::allow_item;
use tidegate_policy::World;
use tidegate_policy::model::{Touched, UnixSeconds};
use tidegate_policy::world::Sight;

/// A file of this process and thread that goes with its value.
struct File(PathBuf);

impl File {
    fn new(data: &[u8]) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let memory = PathBuf::from("/dev/shm");
        let folder = if memory.is_dir() { memory } else { std::env::temp_dir() };
        let path = folder.join(format!("tidegate-fuzz-{}-{number}.yaml", std::process::id()));
        std::fs::write(&path, data).expect("a temporary file can be written");
        Self(path)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // Nothing can be done about one that stays.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A file in the directory of manifests: it is read or refused, whatever it is, and what is read can be compiled.
pub fn manifest(data: &[u8]) -> bool {
    let file = File::new(data);
    let mut reader = Reader::new(&file.0);
    let first = reader.reload();
    for p in &first.problems {
        let text = p.to_string();
        assert!(!text.is_empty() && !text.chars().any(char::is_control), "{text:?}");
    }
    let again = reader.reload();
    assert!(!again.changed, "the same file gives the same objects");
    assert_eq!(first.problems.len(), again.problems.len());
    let world = World::compile(&first.objects, UnixSeconds(1_700_000_000), None);
    let incremental = World::compile(&first.objects, UnixSeconds(1_700_000_000), Some((&world, Touched::ALL)));
    assert_eq!(world.issues(), incremental.issues());
    let all = Sight { everything: true, here: None };
    assert_eq!(world.parts(all, |_| []), incremental.parts(all, |_| []));
    let o = &first.objects;
    o.namespaces.len() + o.pods.len() + o.nodes.len() + o.pools.len() + o.policies.len() + o.cluster_policies.len() > 0
}

/// The text of `tidegate.dev/allow`: alone and item by item.
pub fn annotation(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    let mut taken = false;
    for item in text.split([',', '\n']).map(str::trim).take(64) {
        match allow_item(item) {
            Ok(rule) => {
                taken = true;
                assert_eq!(*rule.name, *item);
                assert!(rule.fqdns.is_empty() != rule.cidrs.is_empty(), "names or prefixes");
                assert!(!rule.ports.is_empty() && rule.ports.iter().all(|p| p.lo <= p.hi && p.proto.is_some()));
            }
            Err(why) => assert!(!why.is_empty() && !why.chars().any(char::is_control), "{why:?}"),
        }
    }
    // As YAML quotes any text.
    let quoted: String = text.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect();
    let value = format!(
        r#"{{"apiVersion": "v1", "kind": "Namespace", "metadata": {{"name": "shop", "annotations": {{"tidegate.dev/allow": "{quoted}"}}}}}}"#
    );
    assert!(manifest(value.as_bytes()), "the namespace is read, whatever its annotation says");
    taken
}
