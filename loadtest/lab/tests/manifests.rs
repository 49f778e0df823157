//! What the lab writes for the product is what the product's own reader takes.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use tidegate_api::{Reader, Severity};
use tidegate_lab::Scenario;
use tidegate_lab::product::{self, Layout};

#[test]
fn the_demos_manifests_have_no_errors() {
    let scenario = Scenario::load(concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/demo.yaml").as_ref()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let layout = Layout {
        folder: folder.path().into(),
    };
    layout.create().unwrap();
    product::write(&scenario, &layout).unwrap();
    let loaded = Reader::new(layout.manifests()).reload();
    let errors: Vec<String> = loaded
        .problems
        .iter()
        .filter(|p| matches!(p.severity, Severity::Error | Severity::Refused))
        .map(|p| format!("{p:?}"))
        .collect();
    assert!(errors.is_empty(), "{}", errors.join("\n"));
    let objects = &loaded.objects;
    assert_eq!(objects.namespaces.len(), scenario.namespaces.len());
    assert_eq!(objects.pods.len(), scenario.pods.len());
    assert_eq!(objects.nodes.len(), scenario.nodes.len());
    assert_eq!(objects.pools.len(), scenario.pools.len());
    assert_eq!((objects.policies.len(), objects.cluster_policies.len()), (4, 7));
}
