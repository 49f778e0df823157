use super::*;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Instant;
use tidegate_policy::Carry;
use tidegate_policy::event::{RuleRef, Who, escape};

fn config(file: &Path) -> Config {
    Config {
        file: Some(file.to_owned()),
        gateway: Some("gw-a".into()),
        node: "gw-node".into(),
        boot: "b1".into(),
        recent: None,
    }
}

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn event(what: What, verdict: Verdict, reason: Reason) -> Event {
    let who = Who { namespace: "shop".into(), pod: "web-1".into(), node: "node-1".into() };
    Event { who: Some(Arc::new(who)), what, verdict, reason, rule: None, count: 1 }
}

fn dns(name: &str) -> Event {
    let what = What::Dns {
        name: name.into(),
        qtype: 28,
        rcode: 3,
        answers: vec!["2001:db8::1".parse().unwrap()],
        cached: true,
        server: at("10.96.0.10:53"),
    };
    event(what, Verdict::Deny, Reason::NotAllowed)
}

fn packet() -> Event {
    let what =
        What::Packet { hook: "pod_egress", protocol: 1, source: at("10.244.1.5:0"), destination: at("203.0.113.1:0") };
    Event { who: None, ..event(what, Verdict::Audit, Reason::Protocol) }
}

fn open() -> Event {
    let what = What::Open {
        client: at("10.244.1.5:40000"),
        asked: at("203.0.113.9:443"),
        actual: Some(at("203.0.113.9:443")),
        egress: Some(at("198.51.100.1:50000")),
        sni: Some("api.example.com".into()),
        carry: Carry::Tls,
    };
    let rule =
        RuleRef { kind: "EgressPolicy", namespace: "shop".into(), policy: "payments".into(), rule: "stripe".into() };
    Event { rule: Some(rule), ..event(what, Verdict::Allow, Reason::Allowed) }
}

fn close() -> Event {
    let what = What::Close {
        client: at("[2001:db8::5]:40000"),
        asked: at("[2001:db8:1::9]:443"),
        actual: None,
        sni: None,
        sent: 10,
        received: 20,
        millis: 1234,
    };
    event(what, Verdict::Deny, Reason::Revoked)
}

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.ends_with('\n'));
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn wait(what: &str, mut until: impl FnMut() -> bool) {
    let start = Instant::now();
    while !until() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The part of JSON Schema that docs/audit.schema.json uses.
fn check(schema: &Value, root: &Value, v: &Value, at: &str) {
    let known = [
        "$schema",
        "$id",
        "$defs",
        "$ref",
        "title",
        "description",
        "format",
        "pattern",
        "type",
        "const",
        "enum",
        "required",
        "additionalProperties",
        "properties",
        "minProperties",
        "items",
        "minimum",
        "maximum",
    ];
    for key in schema.as_object().unwrap().keys() {
        assert!(known.contains(&key.as_str()), "{at}: the checker does not know {key}");
    }
    if let Some(r) = schema.get("$ref") {
        let name = r.as_str().unwrap().strip_prefix("#/$defs/").unwrap();
        return check(&root["$defs"][name], root, v, at);
    }
    if let Some(c) = schema.get("const") {
        assert_eq!(v, c, "{at}");
    }
    if let Some(e) = schema.get("enum") {
        assert!(e.as_array().unwrap().contains(v), "{at}: {v}");
    }
    match schema.get("type").and_then(Value::as_str) {
        Some("object") => {
            let o = v.as_object().unwrap_or_else(|| panic!("{at}: {v}"));
            for r in schema.get("required").and_then(Value::as_array).into_iter().flatten() {
                assert!(o.contains_key(r.as_str().unwrap()), "{at}: {r} is missing");
            }
            assert!(o.len() as u64 >= schema.get("minProperties").and_then(Value::as_u64).unwrap_or(0), "{at}");
            assert_eq!(schema["additionalProperties"], json!(false));
            for (k, v) in o {
                let s = schema["properties"].get(k).unwrap_or_else(|| panic!("{at}: {k} is not in the schema"));
                check(s, root, v, &format!("{at}.{k}"));
            }
        }
        Some("array") => v.as_array().unwrap().iter().for_each(|v| check(&schema["items"], root, v, at)),
        Some("string") => assert!(v.is_string(), "{at}: {v}"),
        Some("boolean") => assert!(v.is_boolean(), "{at}: {v}"),
        Some("integer") => assert!(v.is_u64(), "{at}: {v}"),
        Some("number") => assert!(v.is_number(), "{at}: {v}"),
        None => {}
        Some(other) => panic!("{other}"),
    }
    if let Some(n) = v.as_f64() {
        assert!(schema.get("minimum").and_then(Value::as_f64).is_none_or(|m| n >= m), "{at}: {n}");
        assert!(schema.get("maximum").and_then(Value::as_f64).is_none_or(|m| n <= m), "{at}: {n}");
    }
}

#[test]
fn records_are_what_the_schema_says() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.jsonl");
    let w = start(config(&path)).unwrap();
    for e in [dns("evil.example"), open(), close(), packet()] {
        w.emit(e);
    }
    drop(w);
    let mut got = lines(&path);
    let schema: Value = serde_json::from_str(include_str!("../../../docs/audit.schema.json")).unwrap();
    for r in &got {
        check(&schema, &schema, r, "record");
    }
    // Connections come before what waits of the rest; the order within is kept.
    got.sort_by_key(|r| r["kind"].as_str().unwrap().to_owned());
    let mut plain = got.clone();
    for r in &mut plain {
        let o = r.as_object_mut().unwrap();
        let time = o.remove("time").unwrap();
        let time = time.as_str().unwrap();
        assert!(time.len() == 24 && time.ends_with('Z') && time.as_bytes()[19] == b'.', "{time}");
        assert_eq!(o.remove("schema").unwrap(), "tidegate.audit/v1");
        assert_eq!(o.remove("boot").unwrap(), "b1");
        assert_eq!(o.remove("gateway").unwrap(), "gw-a");
        o.remove("sequence").unwrap();
    }
    let client = json!({"ip": "10.244.1.5", "port": 40000});
    let server = json!({"ip": "203.0.113.9", "port": 443});
    assert_eq!(
        plain,
        [
            json!({"kind": "close", "node": "node-1", "verdict": "deny", "mode": "enforce", "reason": "revoked", "count": 1,
                "namespace": "shop", "pod": "web-1", "protocol": "TCP",
                "source": {"ip": "2001:db8::5", "port": 40000}, "destination": {"asked": {"ip": "2001:db8:1::9", "port": 443}},
                "bytes": {"sent": 10, "received": 20}, "duration": 1.234}),
            json!({"kind": "dns", "node": "node-1", "verdict": "deny", "mode": "enforce", "reason": "not-allowed", "count": 1,
                "namespace": "shop", "pod": "web-1", "name": "evil.example",
                "dns": {"qtype": "AAAA", "rcode": "NXDOMAIN", "answers": ["2001:db8::1"], "cached": true,
                    "server": {"ip": "10.96.0.10", "port": 53}}}),
            json!({"kind": "open", "node": "node-1", "verdict": "allow", "reason": "allowed", "count": 1,
                "namespace": "shop", "pod": "web-1", "protocol": "TCP", "carry": "tls", "source": client,
                "destination": {"asked": server, "actual": server}, "sni": "api.example.com",
                "policy": {"kind": "EgressPolicy", "namespace": "shop", "name": "payments", "rule": "stripe"},
                "egress": {"ip": "198.51.100.1", "port": 50000}}),
            json!({"kind": "packet", "node": "gw-node", "verdict": "audit", "mode": "audit", "reason": "protocol", "count": 1,
                "hook": "pod_egress", "protocol": "ICMP", "source": {"ip": "10.244.1.5"},
                "destination": {"asked": {"ip": "203.0.113.1"}}}),
            json!({"kind": "start", "node": "gw-node", "version": env!("CARGO_PKG_VERSION")}),
            json!({"kind": "stop", "node": "gw-node"}),
        ]
    );
    let mut sequences: Vec<u64> = got.iter().map(|r| r["sequence"].as_u64().unwrap()).collect();
    sequences.sort_unstable();
    assert_eq!(sequences, [1, 2, 3, 4, 5, 6]);
}

#[test]
fn every_reason_fits_the_schema() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let w = start(config(&path)).unwrap();
    for r in Reason::ALL {
        w.emit(Event { reason: *r, ..packet() });
    }
    w.stop();
    assert_eq!(lines(&path).len(), Reason::ALL.len() + 2);
    for r in lines(&path).iter().filter_map(|r| r.get("reason")) {
        assert!(r.as_str().unwrap().bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'));
    }
}

#[test]
fn a_forged_name_cannot_break_a_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let w = start(config(&path)).unwrap();
    let wire = b"a.example\",\"verdict\":\"allow\"}\n{\"schema\":\"tidegate.audit/v1\",\"kind\":\"open\xff\\";
    w.emit(dns(&escape(wire)));
    // Even an emitter that forgot to escape cannot.
    let raw = String::from_utf8_lossy(wire);
    w.emit(dns(&raw));
    w.stop();
    let got = lines(&path);
    let kinds: Vec<&str> = got.iter().map(|r| r["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["start", "dns", "dns", "stop"]);
    assert!(got[1..3].iter().all(|r| r["verdict"] == "deny"));
    assert_eq!(got[1]["name"], escape(wire));
    assert_eq!(got[2]["name"], raw.as_ref());
    assert!(!got[1]["name"].as_str().unwrap().contains(['\n', '"']));
}

#[test]
fn metric_and_record_come_from_one_event() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    metrics::with_local_recorder(&recorder, || {
        let w = start(config(&path)).unwrap();
        w.emit(Event { count: 41, ..dns("a.example") });
        w.emit(dns("b.example"));
        w.emit(open());
        w.stop();
        w.emit(open());
    });
    let text = recorder.handle().render();
    let line = |l: &str| assert!(text.lines().any(|t| t == l), "{l}\n{text}");
    line("tidegate_decisions_total{kind=\"dns\",verdict=\"deny\",reason=\"not-allowed\"} 42");
    line("tidegate_decisions_total{kind=\"open\",verdict=\"allow\",reason=\"allowed\"} 2");
    // The one after the stop was decided, and has no record.
    line("tidegate_audit_lost_total{kind=\"open\"} 1");
    let records = lines(&path);
    let sum: u64 = records.iter().filter(|r| r["kind"] == "dns").map(|r| r["count"].as_u64().unwrap()).sum();
    assert_eq!(sum, 42);
}

#[test]
fn a_full_queue_and_a_full_disk_are_counted_and_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    // Every write to it fails with "no space left".
    symlink("/dev/full", &path).unwrap();
    let w = start_with(config(&path), 4).unwrap();
    let mut sent = 0;
    let begin = Instant::now();
    for _ in 0..1000 {
        w.emit(Event { count: 2, ..dns("a.example") });
        w.emit(close());
        sent += 1;
    }
    assert!(begin.elapsed() < Duration::from_secs(5), "emit never waits");
    wait("all is lost", || w.connections.is_empty() && w.rest.is_empty());
    std::fs::remove_file(&path).unwrap();
    wait("the file is opened again", || {
        w.emit(packet());
        std::thread::sleep(Duration::from_millis(50));
        path.is_file() && std::fs::metadata(&path).unwrap().len() > 0
    });
    w.stop();
    let mut told = [0u64; 4];
    let mut written = [0u64; 4];
    for r in lines(&path) {
        for (i, k) in KINDS.iter().enumerate() {
            told[i] += r["lost"][k].as_u64().unwrap_or(0);
            written[i] += if r["kind"] == *k { r["count"].as_u64().unwrap() } else { 0 };
        }
    }
    assert_eq!(told[0] + written[0], 2 * sent, "dns: {told:?} {written:?}");
    assert_eq!(told[2] + written[2], sent, "close: {told:?} {written:?}");
    assert_eq!(told[1], 0);
    assert!(told[0] > 0 && told[2] > 0);
}

#[test]
fn losses_are_told_even_when_nothing_more_happens() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    symlink("/dev/full", &path).unwrap();
    let w = start(config(&path)).unwrap();
    w.emit(open());
    wait("it is lost", || w.lost.any());
    std::fs::remove_file(&path).unwrap();
    wait("a record of its own", || path.is_file() && std::fs::metadata(&path).unwrap().len() > 0);
    let first = &lines(&path)[0];
    assert_eq!((&first["kind"], &first["lost"]), (&json!("lost"), &json!({"open": 1})));
    w.stop();
}

#[test]
fn a_renamed_file_is_left_and_a_new_one_begun() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let w = start(config(&path)).unwrap();
    w.emit(open());
    wait("the first record", || std::fs::read_to_string(&path).unwrap().lines().count() == 2);
    std::fs::rename(&path, dir.path().join("a.1")).unwrap();
    wait("a new file", || path.is_file());
    w.emit(close());
    w.stop();
    let kinds = |p: &Path| lines(p).iter().map(|r| r["kind"].as_str().unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!(kinds(&dir.path().join("a.1")), ["start", "open"]);
    assert_eq!(kinds(&path), ["close", "stop"]);
}

#[test]
fn a_start_says_where_the_last_run_ended() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let w = start(config(&path)).unwrap();
    w.emit(open());
    w.stop();
    // As after a power cut.
    let mut text = std::fs::read_to_string(&path).unwrap();
    text.push_str("{\"schema\":\"tide");
    std::fs::write(&path, text).unwrap();
    let w = start(Config { boot: "b2".into(), gateway: None, ..config(&path) }).unwrap();
    w.stop();
    let text = std::fs::read_to_string(&path).unwrap();
    let start: Value = serde_json::from_str(text.lines().nth(4).unwrap()).unwrap();
    assert_eq!(start["previous"], json!({"boot": "b1", "sequence": 3}));
    assert_eq!((&start["boot"], &start["sequence"]), (&json!("b2"), &json!(1)));
    assert!(start.get("gateway").is_none());
    assert_eq!(text.lines().nth(3).unwrap(), "{\"schema\":\"tide");
}

#[test]
fn a_file_that_cannot_be_opened_says_what_to_do() {
    let e = start(config(Path::new("/nonexistent/audit.jsonl"))).err().unwrap();
    let text = e.to_string();
    assert!(text.starts_with("cannot open the audit log /nonexistent/audit.jsonl: "), "{text}");
    assert!(text.ends_with("; create its directory, or change `audit.file`"), "{text}");
}

#[test]
fn boot_ids_differ() {
    assert_ne!(boot_id().unwrap(), boot_id().unwrap());
    assert_eq!(boot_id().unwrap().len(), 36);
}
