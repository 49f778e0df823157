//! From an API server's JSON to the tree that the strict reader reads.
//!
//! Only what is read is copied: pods carry much that is not, and metadata grows with the API.

use serde_json::{Map, Value as Json};

use super::Feed;
use crate::core_v1::MIRROR;
use crate::tree::{Key, Tree, Value};

/// What is read of `metadata`.
const META: [&str; 6] = ["name", "namespace", "uid", "labels", "creationTimestamp", "deletionTimestamp"];

/// The tree of an object. JSON has no lines: all is on line 0.
pub(crate) fn tree(feed: Feed, object: &Json) -> Tree {
    let (api_version, kind) = feed.kind();
    let mut out = vec![text("apiVersion", api_version), text("kind", kind)];
    for (field, value) in object.as_object().into_iter().flatten() {
        let value = match (field.as_str(), feed) {
            ("apiVersion" | "kind", _) => continue,
            ("metadata", feed) => metadata(feed, value),
            ("spec", Feed::Pods) => some(value, &["nodeName", "hostNetwork"]),
            ("status", Feed::Pods) => some(value, &["phase", "podIP", "podIPs"]),
            ("spec", Feed::Nodes) => some(value, &["podCIDR", "podCIDRs"]),
            ("status", Feed::Nodes) => some(value, &["addresses"]),
            ("spec" | "status", Feed::Namespaces) => continue,
            // Of Tidegate's own kinds everything is read but what Tidegate wrote.
            ("status", _) => continue,
            (_, feed) if feed.is_ours() => whole(value),
            _ => continue,
        };
        out.push((key(field), value));
    }
    at(Value::Map(out))
}

fn at(value: Value) -> Tree {
    Tree { line: 0, value }
}

fn key(text: &str) -> Key {
    Key { line: 0, text: text.to_owned() }
}

fn text(field: &str, value: &str) -> (Key, Tree) {
    (key(field), at(Value::Str(value.to_owned())))
}

fn entries<'a>(map: &'a Map<String, Json>, wanted: impl Fn(&str) -> bool + 'a) -> Vec<(Key, Tree)> {
    map.iter().filter(|(k, _)| wanted(k)).map(|(k, v)| (key(k), whole(v))).collect()
}

/// `metadata`. Annotations of namespaces say much, one of pods says something.
fn metadata(feed: Feed, value: &Json) -> Tree {
    let mut out = some(value, &META);
    let annotations = match (feed, &value["annotations"]) {
        (_, Json::Null) => return out,
        (Feed::Namespaces, all) => whole(all),
        (Feed::Pods, all) => some(all, &[MIRROR]),
        _ => return out,
    };
    if let Value::Map(entries) = &mut out.value {
        entries.push((key("annotations"), annotations));
    }
    out
}

/// These fields of a map.
fn some(value: &Json, fields: &[&str]) -> Tree {
    match value {
        Json::Object(map) => at(Value::Map(entries(map, |k| fields.contains(&k)))),
        other => whole(other),
    }
}

fn whole(value: &Json) -> Tree {
    at(match value {
        Json::Null => Value::Null,
        Json::Bool(b) => Value::Bool(*b),
        Json::Number(n) => {
            let int = n.as_i64().map(i128::from).or_else(|| n.as_u64().map(i128::from));
            int.map_or(Value::Float, Value::Int)
        }
        Json::String(s) => Value::Str(s.clone()),
        Json::Array(items) => Value::List(items.iter().map(whole).collect()),
        Json::Object(map) => Value::Map(entries(map, |_| true)),
    })
}
