//! The committed definitions are what the types give.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use tidegate_api::crd;

#[test]
fn the_committed_definitions_are_current() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../helm/tidegate/files/crds");
    let fresh: BTreeMap<String, String> =
        crd::all().iter().map(|d| (crd::file_name(d), crd::yaml(d).unwrap())).collect();
    assert_eq!(fresh.len(), 4);
    if std::env::var_os("UPDATE_CRDS").is_some_and(|v| v == "1") {
        std::fs::create_dir_all(&folder).unwrap();
        for (name, text) in &fresh {
            std::fs::write(folder.join(name), text).unwrap();
        }
    }
    let mut committed = BTreeMap::new();
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        committed.insert(name, std::fs::read_to_string(path).unwrap());
    }
    assert!(
        committed == fresh,
        "helm/tidegate/files/crds is not what the types give; run UPDATE_CRDS=1 cargo test -p tidegate-api --test crds"
    );
    let together: String = committed.values().map(|text| format!("---\n{text}")).collect();
    assert_eq!(crd::manifest().unwrap(), together);
}

/// Every field says what it is, and nothing can grow without a bound: CEL's budget is reckoned from these.
#[test]
fn every_field_is_described_and_bounded() {
    fn walk(path: &str, schema: &Value, fields: &mut usize) {
        let there = |key: &str| !schema[key].is_null();
        match schema["type"].as_str() {
            Some("string") => assert!(there("enum") || there("maxLength"), "{path} has no maxLength"),
            Some("boolean") => {}
            Some("integer") => assert!(there("minimum"), "{path} has no minimum"),
            Some("array") => {
                assert!(there("maxItems") && there("x-kubernetes-list-type"), "{path} has no maxItems or list type");
                walk(&format!("{path}[]"), &schema["items"], fields);
            }
            Some("object") => {
                if there("additionalProperties") {
                    assert!(there("maxProperties"), "{path} has no maxProperties");
                    walk(&format!("{path}.*"), &schema["additionalProperties"], fields);
                }
                let preserved = there("x-kubernetes-preserve-unknown-fields");
                assert!(preserved || there("properties") || there("additionalProperties"), "{path} has no fields");
            }
            other => panic!("{path} has the type {other:?}"),
        }
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            *fields += 1;
            let path = format!("{path}.{name}");
            let text = property["description"].as_str().unwrap_or_default();
            // Sentences for people: no links of rustdoc.
            let first = text.chars().next();
            assert!(first.is_some_and(char::is_uppercase) && text.ends_with('.'), "{path}: {text:?}");
            assert!(!text.contains("[`") && !text.contains("crate::"), "{path}: {text:?}");
            walk(&path, property, fields);
        }
    }
    let mut fields = 0;
    for d in crd::all() {
        let kind = d["spec"]["names"]["kind"].as_str().unwrap().to_owned();
        let schema = &d["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        for part in ["spec", "status"] {
            if !schema["properties"][part].is_null() {
                walk(&format!("{kind}.{part}"), &schema["properties"][part], &mut fields);
            }
        }
    }
    assert!(fields > 100, "{fields}");
}
