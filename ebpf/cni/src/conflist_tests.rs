#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;

const LIST: &str = "{\n  \"name\": \"k8s\",\n  \"x\": \"a \\\" ] [ plugins\",\n  \"cniVersion\": \"1.0.0\",\n  \"plugins\": [\n    {\"type\": \"ptp\",   \"mtu\": 1500, \"ipam\": {\"ranges\": [[{}], []]}},\n    {\"type\": \"portmap\"}\n  ],\n  \"z\": 1\n}\n";

fn ours() -> Value {
    entry(&Paths::default())
}

#[test]
fn the_entry_comes_last_and_nothing_else_moves() {
    let new = with(LIST, &ours()).unwrap().unwrap();
    let added = format!(",\n    {}", ours());
    assert_eq!(new.replacen(&added, "", 1), LIST);
    let value: Value = serde_json::from_str(&new).unwrap();
    let types: Vec<&str> = value["plugins"].as_array().unwrap().iter().map(|p| p["type"].as_str().unwrap()).collect();
    assert_eq!(types, ["ptp", "portmap", TYPE]);
    assert_eq!(with(&new, &ours()).unwrap(), None, "it is there");
    assert_eq!(without(&new).unwrap().unwrap(), LIST, "and goes without a trace");
    assert_eq!(without(LIST).unwrap(), None);
}

#[test]
fn it_is_put_right_where_it_is() {
    let new = with(LIST, &json!({"type": TYPE, "folder": "/old"})).unwrap().unwrap();
    // Somebody else was chained behind.
    let more = with(&new, &json!({"type": TYPE, "folder": "/old"})).unwrap();
    assert_eq!(more, None);
    let behind = new.replacen("\"tidegate-cni\"}", "\"tidegate-cni\"}, {\"type\": \"mesh\"}", 1);
    let new = with(&behind, &ours()).unwrap().unwrap();
    let value: Value = serde_json::from_str(&new).unwrap();
    assert_eq!((&value["plugins"][2], value["plugins"][3]["type"].as_str()), (&ours(), Some("mesh")));
    let twice = behind.replacen("{\"type\": \"mesh\"}", "{\"type\": \"tidegate-cni\"}", 1);
    let new = with(&twice, &ours()).unwrap().unwrap();
    assert_eq!(serde_json::from_str::<Value>(&new).unwrap()["plugins"].as_array().unwrap().len(), 3);
    let first = LIST.replacen("{\"type\": \"ptp\"", "{\"type\": \"tidegate-cni\"}, {\"type\": \"ptp\"", 1);
    assert_eq!(without(&first).unwrap().unwrap(), LIST);
}

#[test]
fn what_cannot_be_edited_is_refused() {
    let bad = |text: &str| with(text, &ours()).unwrap_err().to_string();
    assert!(bad("{").starts_with("it is no JSON"));
    assert!(bad("{}").starts_with("plugins"));
    assert!(bad("[]").starts_with("plugins"));
    assert!(bad(r#"{"cniVersion":"1.0.0","plugins":[]}"#).contains("chained"));
    assert!(bad(r#"{"cniVersion":"0.2.0","plugins":[{"type":"a"}]}"#).starts_with("cniVersion"));
    assert!(bad(r#"{"cniVersion":"1.0.0","plugin\u0073":[{"type":"a"}]}"#).contains("unusual"));
    let one = with(r#"{"cniVersion":"1.0.0","plugins":[{"type":"a"}]}"#, &ours()).unwrap().unwrap();
    assert_eq!(serde_json::from_str::<Value>(&one).unwrap()["plugins"][1]["type"], TYPE);
}

#[test]
fn runtimes_take_the_first_by_name() {
    let names = ["99-loopback.conf", "README", "10-b.conflist", "10-a.json", "05-x.conflist.before-tidegate", ".x.new"];
    assert_eq!(choose(names), Some("10-a.json"));
    assert_eq!(choose(["x.txt", "conf"]), None);
    assert_eq!(choose(["05-a.conflist", "05-a.conf"]), Some("05-a.conf"));
    assert!(is_list("a.conflist") && !is_list("a.conf"));
}

#[test]
fn a_single_plugin_becomes_a_list() {
    let list = list_of("{\"cniVersion\": \"0.4.0\", \"name\": \"net\", \"type\": \"bridge\"}\n").unwrap();
    let value: Value = serde_json::from_str(&list).unwrap();
    assert_eq!((value["name"].as_str(), value["cniVersion"].as_str()), (Some("net"), Some("0.4.0")));
    assert_eq!(value["plugins"][0]["type"], "bridge");
    assert!(with(&list, &ours()).unwrap().is_some());
    assert!(list_of("{\"name\": \"net\"}").is_err());
}
