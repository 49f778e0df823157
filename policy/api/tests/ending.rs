//! Namespaces that end: whatever tells of it first, what held for their pods holds until they are gone, or something
//! stricter.
// Helpers of tests may panic as the tests themselves do.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::{Value, json};
use tidegate_api::index::{Feed, Index};
use tidegate_policy::model::{Settings, UnixSeconds};
use tidegate_policy::state::Touch;
use tidegate_policy::{Name, Proto, World};

fn index() -> Index {
    Index::new(Settings::default())
}

fn namespace(uid: &str, version: u64, ending: bool) -> Value {
    let mut object = json!({"metadata": {"name": "shop", "uid": uid, "resourceVersion": version.to_string()}});
    if ending {
        object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    }
    object
}

/// Allows `NAME.example` and denies `bad.example`.
fn policy(name: &str, version: u64) -> Value {
    let to = |to: String| json!([{"toFQDNs": [{"matchName": to}], "toPorts": [{"protocol": "TCP", "port": 443}]}]);
    json!({"metadata": {"namespace": "shop", "name": name, "uid": name, "generation": 1,
            "resourceVersion": version.to_string()},
        "spec": {"podSelector": {}, "egress": to(format!("{name}.example")), "egressDeny": to("bad.example".into())}})
}

fn pod() -> Value {
    json!({"metadata": {"namespace": "shop", "name": "web", "uid": "web"}, "spec": {"nodeName": "n1"},
        "status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}]}})
}

/// What the pod is, and the names that it may reach.
fn pods(i: &Index) -> Option<(Touch, Vec<&'static str>)> {
    let w = World::compile(i.objects(), UnixSeconds(1000), None);
    let ip: IpAddr = "10.0.0.1".parse().unwrap();
    let to = |n: &&&str| {
        let name = Name::parse(n).unwrap();
        let to = "203.0.113.1".parse().unwrap();
        w.group_of(ip).is_some_and(|g| g.connection(Some(&name), to, Proto::Tcp, 443).allowed())
    };
    let names = ["bad.example", "one.example", "two.example"].iter().filter(to).copied().collect();
    Some((w.endpoint(ip)?.touch, names))
}

/// One event.
type Step = fn(&mut Index);

const BOTH: [&str; 2] = ["one.example", "two.example"];

fn held(names: &[&'static str]) -> Option<(Touch, Vec<&'static str>)> {
    Some((Touch::Isolated, names.to_vec()))
}

/// A namespace with a pod and two policies.
fn shop() -> Index {
    let mut i = index();
    i.apply(Feed::Namespaces, &namespace("u", 1, false));
    i.apply(Feed::Pods, &pod());
    i.apply(Feed::EgressPolicies, &policy("one", 2));
    i.apply(Feed::EgressPolicies, &policy("two", 3));
    i
}

/// As much as it takes for a policy that went to have no effect.
fn age(i: &mut Index) {
    i.age(u64::MAX);
    i.age(u64::MAX);
}

/// All orders of several feeds' events, each feed's in its own order.
fn orders(feeds: &[&[usize]]) -> Vec<Vec<usize>> {
    if feeds.iter().all(|f| f.is_empty()) {
        return vec![Vec::new()];
    }
    let mut out = Vec::new();
    for (n, feed) in feeds.iter().enumerate() {
        let Some((first, rest)) = feed.split_first() else { continue };
        let mut others = feeds.to_vec();
        others[n] = rest;
        out.extend(orders(&others).into_iter().map(|o| std::iter::once(*first).chain(o).collect()));
    }
    out
}

#[test]
fn the_order_of_feeds_does_not_matter_when_a_namespace_ends() {
    let steps: [(&str, Step); 6] = [
        ("ending", |i| i.apply(Feed::Namespaces, &namespace("u", 10, true))),
        ("gone", |i| i.delete(Feed::Namespaces, &namespace("u", 20, true))),
        ("one", |i| i.delete(Feed::EgressPolicies, &policy("one", 11))),
        ("two", |i| i.delete(Feed::EgressPolicies, &policy("two", 12))),
        ("terminating", |i| {
            let mut p = pod();
            p["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
            i.apply(Feed::Pods, &p);
        }),
        ("pod", |i| i.delete(Feed::Pods, &pod())),
    ];
    let orders = orders(&[&[0, 1], &[2, 3], &[4, 5]]);
    assert_eq!(orders.len(), 90);
    for order in orders {
        for late in [false, true] {
            let mut i = shop();
            let mut done = BTreeSet::new();
            for step in &order {
                steps[*step].1(&mut i);
                done.insert(steps[*step].0);
                let (touch, names) = match pods(&i) {
                    None => {
                        assert!(done.contains("pod"), "{order:?}");
                        continue;
                    }
                    Some(found) => found,
                };
                assert_eq!(touch, Touch::Isolated, "{order:?} at {done:?}");
                assert!(!names.contains(&"bad.example"), "{order:?} at {done:?}");
                // All that was allowed is, once it is known why the policies went.
                if done.contains("ending") {
                    assert_eq!(names, BOTH, "{order:?} at {done:?}");
                }
                if late && *step != 2 && *step != 3 {
                    age(&mut i);
                }
            }
            age(&mut i);
            assert!(i.objects().policies.is_empty() && i.objects().namespaces.is_empty(), "{order:?}");
            assert!(i.objects().pods.is_empty());
        }
    }
}

#[test]
fn a_policy_that_goes_allows_nothing_at_once_and_isolates_a_little_longer() {
    let mut i = shop();
    i.delete(Feed::EgressPolicies, &policy("one", 11));
    assert_eq!(pods(&i), held(&["two.example"]));
    i.delete(Feed::EgressPolicies, &policy("two", 12));
    assert_eq!(pods(&i), held(&[]));
    i.age(u64::MAX);
    i.take_touched();
    assert_eq!(pods(&i), held(&[]));
    i.age(u64::MAX);
    assert!(i.is_touched());
    assert_eq!(pods(&i), Some((Touch::Untouched, vec![])));
    // Its namespace's end is heard only now: it was deleted with it.
    i.apply(Feed::Namespaces, &namespace("u", 10, true));
    assert_eq!(pods(&i), held(&BOTH));
    i.delete(Feed::Pods, &pod());
    i.delete(Feed::Namespaces, &namespace("u", 20, true));
    assert!(i.objects().policies.is_empty());

    // One that somebody deleted before does not come back.
    let mut i = shop();
    i.delete(Feed::EgressPolicies, &policy("one", 5));
    age(&mut i);
    i.apply(Feed::Namespaces, &namespace("u", 10, true));
    i.delete(Feed::EgressPolicies, &policy("two", 12));
    assert_eq!(pods(&i), held(&["two.example"]));
    // Where that cannot be known, what is strict of it does.
    for (version, conditions) in [(5, json!([{"type": "NamespaceContentRemaining"}])), (0, json!([]))] {
        let mut i = shop();
        if version > 0 {
            i.delete(Feed::EgressPolicies, &policy("one", version));
        } else {
            i.restarted(Feed::EgressPolicies, &[("shop".to_owned(), "two".to_owned())].into());
        }
        age(&mut i);
        let mut ending = namespace("u", 10, true);
        ending["status"]["conditions"] = conditions;
        i.apply(Feed::Namespaces, &ending);
        i.delete(Feed::EgressPolicies, &policy("two", 12));
        assert_eq!(pods(&i), held(&["two.example"]));
        assert_eq!(i.objects().policies.len(), 2);
    }
    // After two minutes nobody remembers it.
    let mut i = shop();
    i.delete(Feed::EgressPolicies, &policy("one", 11));
    (0..120).for_each(|_| i.age(u64::MAX));
    i.apply(Feed::Namespaces, &namespace("u", 10, true));
    assert_eq!(i.objects().policies.len(), 1);
}

#[test]
fn a_namespace_that_ends_when_it_is_first_seen_allows_nothing() {
    // A list of one feed after the other, in any order; of the policies one is there still, or none.
    for left in 0..2 {
        let steps: [fn(&mut Index, u64); 3] = [
            |i, _| i.apply(Feed::Namespaces, &namespace("u", 10, true)),
            |i, _| i.apply(Feed::Pods, &pod()),
            |i, left| (0..left).for_each(|_| i.apply(Feed::EgressPolicies, &policy("one", 2))),
        ];
        for order in orders(&[&[0], &[1], &[2]]) {
            let mut i = index();
            order.iter().for_each(|s| steps[*s](&mut i, left));
            assert_eq!(pods(&i), held(&[]), "{order:?}");
            assert!(!i.record(Feed::Namespaces, "", "shop").unwrap().problems.is_empty());
            i.delete(Feed::EgressPolicies, &policy("one", 11));
            assert_eq!(pods(&i), held(&[]), "{order:?}");
            i.delete(Feed::Namespaces, &namespace("u", 20, true));
            assert_eq!(pods(&i), held(&[]), "{order:?}");
            i.delete(Feed::Pods, &pod());
            assert!(i.objects().policies.is_empty() && i.objects().namespaces.is_empty());
        }
    }
    // Its name's next owner has what is written for it, even if that is heard first.
    let mut i = index();
    i.apply(Feed::Namespaces, &namespace("u", 10, true));
    i.apply(Feed::EgressPolicies, &policy("two", 21));
    assert!(i.objects().policies.is_empty());
    i.apply(Feed::Namespaces, &namespace("v", 20, false));
    i.apply(Feed::Pods, &pod());
    assert_eq!(pods(&i), held(&["two.example"]));
}

#[test]
fn the_names_next_owner_has_nothing_of_the_old_one() {
    // Deleted and made again while nobody watched.
    let mut i = shop();
    i.apply(Feed::Namespaces, &namespace("u", 10, true));
    i.restarted(Feed::EgressPolicies, &BTreeSet::new());
    assert_eq!(pods(&i), held(&BOTH));
    assert!(i.record(Feed::EgressPolicies, "shop", "one").is_none());
    i.apply(Feed::Namespaces, &namespace("v", 30, false));
    assert_eq!(pods(&i), Some((Touch::Untouched, vec![])));
    // Its end was heard, and a pod's was not yet.
    let mut i = shop();
    i.apply(Feed::Namespaces, &namespace("u", 10, true));
    i.delete(Feed::EgressPolicies, &policy("one", 11));
    i.delete(Feed::EgressPolicies, &policy("two", 12));
    i.delete(Feed::Namespaces, &namespace("u", 20, true));
    assert_eq!(pods(&i), held(&BOTH));
    i.apply(Feed::Namespaces, &namespace("v", 30, false));
    assert!(i.objects().policies.is_empty() && i.objects().namespaces["shop"].uid == "v");
    i.apply(Feed::EgressPolicies, &policy("one", 31));
    assert_eq!(pods(&i), held(&["one.example"]));
}
