//! Random events of an API server: what the index says was touched is enough. A world that is compiled from the one before
//! it and from that is the same, to every machine, as one that is compiled from the objects alone.
// Helpers of tests may panic as the tests themselves do.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use proptest::prelude::*;
use serde_json::{Value, json};
use tidegate_api::index::{Feed, Index, Key};
use tidegate_policy::model::{Settings, UnixSeconds};
use tidegate_policy::world::Sight;
use tidegate_policy::{Name, ScopeKey, World};

const SPACES: [&str; 3] = ["bank", "lab", "shop"];
const SIGHTS: [Sight<'static>; 3] = [
    Sight { everything: true, here: None },
    Sight { everything: true, here: Some("n1") },
    Sight { everything: false, here: Some("n2") },
];

/// One event: what, of which object, and how.
#[derive(Clone, Debug)]
struct Edit {
    what: u8,
    space: usize,
    which: u8,
    how: u8,
}

fn edits() -> impl Strategy<Value = Edit> {
    (0..16u8, 0..SPACES.len(), 0..3u8, any::<u8>()).prop_map(|(what, space, which, how)| Edit {
        what,
        space,
        which,
        how,
    })
}

/// The API server: its objects, and a number for each of their versions.
#[derive(Default)]
struct Server {
    objects: BTreeMap<(Feed, Key), Value>,
    version: u64,
}

impl Server {
    fn stamp(&mut self, object: &mut Value) {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
    }

    fn apply(&mut self, i: &mut Index, feed: Feed, key: Key, mut object: Value) {
        (object["metadata"]["namespace"], object["metadata"]["name"]) = (json!(key.0), json!(key.1));
        if key.0.is_empty() {
            object["metadata"].as_object_mut().unwrap().remove("namespace");
        }
        self.stamp(&mut object);
        i.apply(feed, &object);
        self.objects.insert((feed, key), object);
    }

    fn delete(&mut self, i: &mut Index, feed: Feed, key: Key) {
        if let Some(mut object) = self.objects.remove(&(feed, key)) {
            self.stamp(&mut object);
            i.delete(feed, &object);
        }
    }

    /// A watch broke, and the feed is listed anew: some objects went meanwhile.
    fn restart(&mut self, i: &mut Index, feed: Feed, how: u8) {
        let mut n = how;
        self.objects.retain(|(f, _), _| {
            n = n.rotate_left(1);
            *f != feed || n & 3 != 0
        });
        let seen: BTreeMap<&Key, &Value> =
            self.objects.iter().filter(|((f, _), _)| *f == feed).map(|((_, k), v)| (k, v)).collect();
        seen.values().for_each(|o| i.apply(feed, o));
        i.restarted(feed, &seen.into_keys().cloned().collect::<BTreeSet<_>>());
    }
}

fn rules(e: &Edit) -> Value {
    let names = ["a.x.example", "b.x.example", "y.example"];
    let to = match e.how % 4 {
        0 => json!({"toCIDRs": [{"cidr": "192.0.2.0/24"}]}),
        1 => json!({"toFQDNs": [{"matchPattern": "*.x.example"}]}),
        _ => json!({"toFQDNs": [{"matchName": names[usize::from(e.which)]}]}),
    };
    let mut rule = to;
    // A port that cannot be read makes the object bad.
    rule["toPorts"] = json!([{"protocol": "TCP", "port": if e.how % 9 == 8 { 0 } else { 443 }}]);
    if e.how.is_multiple_of(5) {
        rule["expireTime"] = json!(["1970-01-01T00:17:00Z", "1970-01-01T00:20:00Z"][usize::from(e.how % 2)]);
    }
    json!([rule])
}

fn edit(s: &mut Server, i: &mut Index, e: &Edit) {
    let flag = |n: u8| e.how & (1 << n) != 0;
    let one = |n, yes, no| if flag(n) { yes } else { no };
    let space = SPACES[e.space].to_owned();
    let name = format!("o{}", e.which);
    let (key, global) = ((space.clone(), name.clone()), (String::new(), name));
    match e.what {
        0..=3 => {
            // Few addresses: several pods have one.
            let mut ips = vec![json!({"ip": format!("10.0.0.{}", e.how % 4)})];
            if flag(4) {
                ips.push(json!({"ip": format!("fd00::{}", e.how % 3)}));
            }
            let pod = json!({"metadata": {"uid": format!("{}", e.how % 2), "labels": {"app": one(5, "web", "job")}},
                "spec": {"nodeName": one(6, "n1", "n2"), "hostNetwork": e.how.is_multiple_of(13)},
                "status": {"phase": if e.how.is_multiple_of(17) { "Failed" } else { "Running" }, "podIPs": ips, "podIP": ips[0]["ip"]}});
            s.apply(i, Feed::Pods, key, pod);
        }
        4 => s.delete(i, Feed::Pods, key),
        5 | 6 => {
            let labels = if flag(6) { json!({"matchLabels": {"app": "web"}}) } else { json!({}) };
            let part = if flag(7) { "egressDeny" } else { "egress" };
            let mut spec =
                json!({"podSelector": labels, "mode": if e.how.is_multiple_of(19) { "Staged" } else { "Enforce" }});
            spec[part] = rules(e);
            if flag(5) {
                spec["poolRef"] = json!({"name": format!("o{}", e.how % 3)});
            }
            let meta = json!({"uid": format!("{}", e.how % 2), "creationTimestamp": "2026-01-01T00:00:00Z"});
            s.apply(i, Feed::EgressPolicies, key, json!({"metadata": meta, "spec": spec}));
        }
        7 => s.delete(i, Feed::EgressPolicies, key),
        8 => {
            let mut rule = rules(e);
            rule[0]["action"] = json!(["Accept", "Deny", "Pass"][usize::from(e.how % 3)]);
            let subject = match e.how % 7 {
                0 => json!({"namespaceSelector": {"matchLabels": 7}}),
                1 | 2 => json!({"namespaceSelector": {}}),
                _ => {
                    json!({"namespaceSelector": {"matchLabels": {"env": "test"}}, "podSelector": {"matchLabels": {"app": "job"}}})
                }
            };
            let mut spec = json!({"tier": if flag(5) { "Admin" } else { "Baseline" }, "priority": e.how % 2,
                "subject": subject, "egress": rule});
            if flag(6) {
                spec["ceiling"] = json!({"toFQDNs": [{"matchPattern": "**.x.example"}]});
            }
            s.apply(
                i,
                Feed::ClusterEgressPolicies,
                global,
                json!({"metadata": {"uid": format!("{}", e.how % 2)}, "spec": spec}),
            );
        }
        9 => s.delete(i, Feed::ClusterEgressPolicies, global),
        10 | 11 => {
            let mut meta = json!({"uid": format!("{space}-{}", e.how % 2), "labels": {"env": one(1, "test", "prod")}});
            meta["annotations"] = match e.how % 6 {
                0 => json!({"tidegate.dev/managed": "true", "tidegate.dev/mode": "audit"}),
                1 => json!({"tidegate.dev/allow": "a.x.example, b c", "tidegate.dev/pool": "o1"}),
                2 => json!({"tidegate.dev/mode": "audit", "tidegate.dev/audit-until": "1970-01-01T00:18:00Z"}),
                _ => json!({}),
            };
            if flag(7) && flag(4) {
                meta["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
            }
            s.apply(i, Feed::Namespaces, (String::new(), space), json!({"metadata": meta}));
        }
        12 if flag(0) => s.delete(i, Feed::Namespaces, (String::new(), space)),
        12 => i.age(u64::MAX),
        13 => {
            let node = json!({"metadata": {}, "spec": {"podCIDRs": [format!("10.{}.0.0/24", e.how % 3)]},
                "status": {"addresses": [{"type": "InternalIP", "address": format!("192.0.2.{}", e.how % 4)}]}});
            if flag(7) { s.delete(i, Feed::Nodes, global) } else { s.apply(i, Feed::Nodes, global, node) }
        }
        14 => {
            let state = |n: u8| if flag(n) { "Draining" } else { "Active" };
            let pool = json!({"metadata": {}, "spec": {"addressSource": "Static", "allowedNamespaces": {}, "static": {"addresses": [
                {"ipv4": format!("203.0.113.{}", e.how % 2), "state": state(3)}, {"ipv4": "203.0.113.9", "state": state(4)}]}}});
            if flag(6) { s.delete(i, Feed::EgressPools, global) } else { s.apply(i, Feed::EgressPools, global, pool) }
        }
        _ => {
            let feeds = [Feed::Pods, Feed::EgressPolicies, Feed::ClusterEgressPolicies, Feed::Namespaces, Feed::Nodes];
            s.restart(i, feeds[usize::from(e.how) % feeds.len()], e.how);
        }
    }
}

fn same(a: &World, b: &World) -> Result<(), TestCaseError> {
    let ips: Vec<IpAddr> = ["10.0.0.1", "10.1.0.7", "192.0.2.1"].map(|t| t.parse().unwrap()).into();
    let classes = |w: &World, s: ScopeKey| {
        let learnt = ["a.x.example", "y.example"].map(|n| Name::parse(n).unwrap());
        let of = w.scope(s).into_iter();
        of.flat_map(|s| s.single_rule_classes().chain([s.class(ips[2], &learnt)]).collect::<Vec<_>>())
            .collect::<Vec<_>>()
    };
    for sight in SIGHTS {
        prop_assert_eq!(a.parts(sight, |s| classes(a, s)), b.parts(sight, |s| classes(b, s)));
    }
    prop_assert_eq!(a.issues(), b.issues());
    prop_assert_eq!((a.now(), a.next_change()), (b.now(), b.next_change()));
    for ip in &ips {
        prop_assert_eq!(a.in_cluster(*ip), b.in_cluster(*ip));
    }
    let groups = |w: &World| {
        w.groups().values().map(|g| (g.key(), g.policies().cloned().collect::<Vec<_>>())).collect::<Vec<_>>()
    };
    prop_assert_eq!(groups(a), groups(b));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn event_after_event_comes_to_the_same(
        steps in prop::collection::vec((prop::collection::vec(edits(), 1..5), 0..5i64), 1..24),
    ) {
        let (mut server, mut index) = (Server::default(), Index::new(Settings::default()));
        let mut world = World::compile(index.objects(), UnixSeconds(900), None);
        for (batch, t) in steps {
            batch.iter().for_each(|e| edit(&mut server, &mut index, e));
            let now = UnixSeconds(900 + 100 * t);
            let touched = index.take_touched();
            let next = World::compile(index.objects(), now, Some((&world, &touched)));
            same(&next, &World::compile(index.objects(), now, None))?;
            world = next;
        }
    }
}
