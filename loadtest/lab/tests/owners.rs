//! With Kubernetes: owners of egress pairs stand in the status of their pools, and whoever takes over is recorded. The API
//! server, the owner and the ways between them fail one after the other.
//!
//! One lab, one test: each step begins where the last one ended.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "failover/common.rs"]
mod common;

use std::net::IpAddr;
use std::time::{Duration, Instant};

use common::{
    ADDRESSES, CALM, NAMES, PLAIN, PODS, POOL, READY, Traffic, Wire, connect, egress, gaps, kill, learn, node_of,
    owner, owner_is_cut_off, owner_of, recorded, status, tcp, under_traffic, up_like, wait_owner, wait_recorded,
};
use serde_json::{Value, json};
use tidegate_lab::Lab;
use tidegate_lab::family::{FAMILIES, Family};
use tidegate_lab::lab::wait_for;
use tidegate_lab::netns::nft;
use tidegate_lab::probe::dig;
use tidegate_lab::steady::{Servers, Steady};

#[test]
fn owners() {
    // The gateways are those that the API server lists.
    let mut lab = up_like("variants/kubernetes.yaml", "owners", |_| {});
    let wire = Wire::watch(&lab);
    learn(&lab, &["tcp.example.com", "www.example.com", "api.example.com"]);
    let (_, epoch) = recorded(&lab);
    wait_recorded(&lab, "gw-a", epoch);
    owner_dies(&mut lab, &wire);
    owner_loses_the_api_server_alone(&mut lab);
    owner_loses_the_api_server_and_policy_changes(&mut lab, &wire);
    owner_is_cut_off_from_everything(&mut lab, &wire);
    owner_dies_without_an_api_server(&mut lab, &wire);
    pair_drains_and_goes(&mut lab);
    pool_is_deleted_and_serves_on(&mut lab);
    lab.down().unwrap();
}

fn other(gateway: &str) -> &'static str {
    if gateway == "gw-a" { "gw-b" } else { "gw-a" }
}

/// The pool's status says that one of its pairs has drained.
#[track_caller]
fn has_drained(lab: &Lab, pair: usize) {
    let drained = |p: &Value| p["status"]["addresses"][pair]["drained"] == true;
    if let Err(error) = lab.wait_object(POOL, Duration::from_secs(30), drained) {
        let flows = ["gw-a", "gw-b"].map(|g| lab.place(g).unwrap().run(&["cat", "/proc/net/nf_conntrack"]));
        panic!("{error}\n{}\n{}", flows[0].stdout, flows[1].stdout);
    }
}

/// The owner dies: names and the same addresses come from the other one, which is recorded.
fn owner_dies(lab: &mut Lab, wire: &Wire) {
    let (who, epoch) = recorded(lab);
    assert_eq!(who, "gw-a");
    let (dead, traffic) = under_traffic(lab, &PODS, |lab| {
        let dead = kill(lab, "gw-a");
        wait_owner(lab, "gw-b", "gw-b", Duration::from_secs(10));
        std::thread::sleep(Duration::from_secs(1));
        dead
    });
    gaps("owner killed", &traffic, dead, NAMES, ADDRESSES);
    assert_eq!(wait_recorded(lab, "gw-b", epoch + 1), epoch + 1);
    lab.start("gw-a").unwrap();
    lab.wait_ready("gw-a", READY).unwrap();
    wait_owner(lab, "gw-a", "gw-b", Duration::from_secs(10));
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(recorded(lab), ("gw-b".into(), epoch + 1), "who returns takes nothing");
    wire.only(dead, &["gw-b"]);
}

/// Nothing goes between a gateway's pod and the API server any more.
fn cut_api(lab: &Lab, gateway: &str) {
    let pod = lab.scenario().pod(&format!("tidegate-system/{gateway}")).unwrap().clone();
    let (v4, v6) = lab.scenario().control();
    let (pod4, pod6) = (pod.ipv4.unwrap(), pod.ipv6.unwrap());
    let rules = format!(
        "table inet lab-api {{ chain cut {{ type filter hook forward priority -300; policy accept;
         ip saddr {pod4} ip daddr {v4} drop; ip saddr {v4} ip daddr {pod4} drop;
         ip6 saddr {pod6} ip6 daddr {v6} drop; ip6 saddr {v6} ip6 daddr {pod6} drop; }}; }}"
    );
    nft(lab.place(&pod.node).unwrap().netns(), &rules).unwrap();
}

fn mend_api(lab: &Lab, gateway: &str) {
    let node = lab.scenario().pod(&format!("tidegate-system/{gateway}")).unwrap().node.clone();
    nft(lab.place(&node).unwrap().netns(), "delete table inet lab-api").unwrap();
}

/// Whether a gateway says that the API server does not answer.
fn misses_api(lab: &Lab, gateway: &str) -> bool {
    status(lab, gateway)["problems"].to_string().contains("the API server does not answer")
}

/// It keeps serving, whatever is written there that changes no policy, and nothing is decided anew.
fn owner_loses_the_api_server_alone(lab: &mut Lab) {
    let before = recorded(lab);
    assert_eq!(before.0, "gw-b");
    let (cut, traffic) = under_traffic(lab, &PODS, |lab| {
        let cut = Instant::now();
        cut_api(lab, "gw-b");
        assert!(wait_for(Duration::from_secs(10), || misses_api(lab, "gw-b").then_some(())).is_some());
        assert!(!misses_api(lab, "gw-a"));
        // As kubelets and others write all the time.
        for object in [["node", "node-1"].as_slice(), &["pod", "-n", "shop", "web"], &["namespace", "shop"]] {
            lab.kubectl(&[&["annotate"], object, &["example.com/seen=now"]].concat()).unwrap();
        }
        std::thread::sleep(Duration::from_secs(8));
        assert_eq!(lab.admin("gw-b", "/readyz").unwrap().0, 200, "it serves what it knows");
        mend_api(lab, "gw-b");
        assert!(wait_for(Duration::from_secs(15), || (!misses_api(lab, "gw-b")).then_some(())).is_some());
        cut
    });
    gaps("API server cut off", &traffic, cut, CALM.0, CALM.1);
    assert_eq!(recorded(lab), before);
    for g in ["gw-a", "gw-b"] {
        assert_eq!(owner(lab, g), before, "{g}");
    }
}

/// Policy changes that it cannot see: within five seconds it helps nobody to what is not allowed any more. It carries on until
/// the other one has the pair in place, and takes nothing when it is back.
fn owner_loses_the_api_server_and_policy_changes(lab: &mut Lab, wire: &Wire) {
    let (who, epoch) = recorded(lab);
    let heir = other(&who);
    let file = "shop-revocable.yaml";
    let before = lab.manifest(file).unwrap();
    let allowed = |lab: &Lab, name: &str| !dig(&lab.pod("shop/web"), name, "A", &[]).answers.is_empty();
    assert!(allowed(lab, "revoked.example.com"));
    let (edit, traffic) = under_traffic(lab, &PODS, |lab| {
        cut_api(lab, &who);
        assert!(wait_for(Duration::from_secs(10), || misses_api(lab, &who).then_some(())).is_some());
        let edit = Instant::now();
        lab.edit_manifest(file, &before.replace("revoked.example.com", "granted.example.com")).unwrap();
        // It is made by now: kubectl takes seconds itself on a busy machine.
        let made = Instant::now();
        let denied =
            wait_for(Duration::from_secs(15), || (!allowed(lab, "revoked.example.com")).then(|| made.elapsed()));
        println!("the rule was gone after {denied:?}");
        assert!(denied.is_some_and(|after| after < Duration::from_secs(6)), "{denied:?}");
        wait_owner(lab, heir, heir, Duration::from_secs(10));
        std::thread::sleep(Duration::from_secs(2));
        edit
    });
    gaps("policy changed behind the owner's back", &traffic, edit, NAMES, CALM.1);
    assert_eq!(wait_recorded(lab, heir, epoch + 1), epoch + 1);
    wire.only(edit, &[heir]);
    assert_ne!(lab.admin(&who, "/readyz").unwrap().0, 200, "{who} knows less");
    let (back, traffic) = under_traffic(lab, &PODS, |lab| {
        let back = Instant::now();
        mend_api(lab, &who);
        lab.edit_manifest(file, &before).unwrap();
        lab.wait_ready(&who, READY).unwrap();
        std::thread::sleep(Duration::from_secs(3));
        back
    });
    gaps("it is back", &traffic, back, CALM.0, CALM.1);
    assert!(allowed(lab, "revoked.example.com"));
    assert_eq!(recorded(lab), (heir.into(), epoch + 1), "who returns takes nothing");
}

/// The other one takes over by the gateways' own word, and is recorded once that can be.
fn owner_dies_without_an_api_server(lab: &mut Lab, wire: &Wire) {
    let (who, epoch) = recorded(lab);
    let heir = other(&who);
    let calm = |what: &str, since: Instant, traffic: &[Traffic]| gaps(what, traffic, since, CALM.0, CALM.1);
    let (down, traffic) = under_traffic(lab, &PODS, |lab| {
        let down = Instant::now();
        lab.stop_api_server().unwrap();
        assert!(wait_for(Duration::from_secs(10), || misses_api(lab, heir).then_some(())).is_some());
        std::thread::sleep(Duration::from_secs(3));
        down
    });
    calm("API server down", down, &traffic);
    let (dead, traffic) = under_traffic(lab, &PODS, |lab| {
        let dead = kill(lab, &who);
        wait_owner(lab, heir, heir, Duration::from_secs(10));
        std::thread::sleep(Duration::from_secs(1));
        dead
    });
    gaps("owner killed without an API server", &traffic, dead, NAMES, ADDRESSES);
    let (back, traffic) = under_traffic(lab, &PODS, |lab| {
        let back = Instant::now();
        lab.start_api_server().unwrap();
        assert_eq!(wait_recorded(lab, heir, epoch + 1), epoch + 1);
        back
    });
    calm("API server back", back, &traffic);
    lab.start(&who).unwrap();
    lab.wait_ready(&who, READY).unwrap();
    wait_owner(lab, &who, heir, Duration::from_secs(10));
    wire.only(dead, &[heir]);
}

/// It withdraws, and nobody else's traffic suffers; back again it reads who owns the pair now.
fn owner_is_cut_off_from_everything(lab: &mut Lab, wire: &Wire) {
    let (_, before) = recorded(lab);
    let epoch = owner_is_cut_off(lab, wire);
    assert!(epoch > before);
    assert_eq!(recorded(lab), ("gw-b".into(), epoch));
}

/// The pair that the shop's pool gets beside the one that drains.
fn second(family: Family) -> IpAddr {
    family.pick("203.0.113.11", "2001:db8::11").parse().unwrap()
}

/// Says which pairs the shop's pool has.
fn set_pairs(lab: &Lab, pairs: Value) {
    lab.request("PATCH", POOL, &json!({"spec": {"static": {"addresses": pairs}}})).unwrap();
}

/// Waits until so many namespaces are counted for the pairs of the shop's pool, in their order.
#[track_caller]
fn wait_counted(lab: &Lab, counts: &[u64]) -> Value {
    let counted = |p: &Value| {
        let all = p["status"]["addresses"].as_array().into_iter().flatten();
        all.map(|a| a["namespaces"].as_u64().unwrap()).eq(counts.iter().copied())
    };
    lab.wait_object(POOL, Duration::from_secs(30), counted).unwrap()
}

/// Waits until new connections of a pod leave with this address.
#[track_caller]
fn wait_source(lab: &Lab, pod: &str, source: fn(Family) -> IpAddr) {
    for family in FAMILIES {
        let seen = || {
            dig(&lab.pod(pod), "tcp.example.com", family.record(), &[]);
            lab.pod(pod).within(|| connect(tcp(family), Duration::from_millis(900))).unwrap()
        };
        let found = wait_for(Duration::from_secs(20), || (seen() == Ok(source(family))).then_some(()));
        assert!(found.is_some(), "{pod} {family:?}: {:?}", seen());
    }
}

/// New connections of these pods had no gap and no source but this one.
#[track_caller]
fn all_leave_with(what: &str, traffic: &[Traffic], pods: &[&str], since: Instant, source: fn(Family) -> IpAddr) {
    for t in traffic.iter().filter(|t| pods.contains(&t.pod.as_str())) {
        let (dns, flows) = (t.names.longest(since), t.flows.longest(since));
        println!("{what}: {} {:?}: longest DNS gap {dns:?}, egress address gap {flows:?}", t.pod, t.family);
        let (seen, all) = t.flows.seen(source(t.family));
        println!("{what}: {seen} of {all} connections by {}", source(t.family));
        assert!(seen > 0 && seen == all, "{what}: {} {:?}", t.pod, t.flows.sources(None));
        assert!(dns < t.limit(CALM.0, since) && flows < t.limit(CALM.1, since), "{what}: {dns:?} {flows:?}");
    }
}

/// A pair that drains takes no new connections, and those that live go on; when the last is dead it says so, and is taken out
/// without anybody noticing. The only pair of a pool goes on, and one that is in use is missed for no longer than a failover
/// takes.
fn pair_drains_and_goes(lab: &mut Lab) {
    let pair =
        |ip: fn(Family) -> IpAddr, state: &str| json!({"ipv4": ip(Family::V4), "ipv6": ip(Family::V6), "state": state});
    let (first, other) = (|state: &str| pair(egress, state), |state: &str| pair(second, state));
    let (owner, epoch) = recorded(lab);
    // UDP lives for as long as conntrack says: without it flows end with the clients.
    let mut servers = Servers::of_demo(lab, PODS[0]).unwrap();
    servers.iter_mut().for_each(|s| s.udp = None);
    let steady = Steady::start(lab, PODS[0], &servers, true).unwrap();
    let both = [PODS[0], PODS[1], PLAIN];
    let (drains, traffic) = under_traffic(lab, &PODS, |lab| {
        let drains = Instant::now();
        set_pairs(lab, json!([first("Draining"), other("Active")]));
        // Another namespace comes.
        lab.kubectl(&["label", "namespace", "annotated", "team=payments"]).unwrap();
        lab.kubectl(&["annotate", "namespace", "annotated", "tidegate.dev/pool=partner-a"]).unwrap();
        both.iter().for_each(|pod| wait_source(lab, pod, second));
        drains
    });
    for t in &traffic {
        let (dns, flows) = (t.names.longest(drains), t.flows.longest(drains));
        println!("a pair drains: {} {:?}: longest DNS gap {dns:?}, egress address gap {flows:?}", t.pod, t.family);
        assert!(dns < t.limit(CALM.0, drains) && flows < t.limit(CALM.1, drains), "{dns:?} {flows:?}");
        assert_eq!(
            t.flows.sources(Some(drains)),
            [egress(t.family), second(t.family)],
            "first the one, then the other"
        );
    }
    let (since, traffic) = under_traffic(lab, &both, |lab| {
        let since = Instant::now();
        let pool = wait_counted(lab, &[0, 2]);
        assert_eq!(pool["status"]["addresses"][0]["drained"], false, "connections live: {pool}");
        for namespace in ["shop", "annotated"] {
            let path = format!("/apis/tidegate.dev/v1alpha1/namespaces/{namespace}/namespaceegresses/tidegate");
            let has = |o: &Value| {
                let all = o["status"]["egress"].as_array().into_iter().flatten();
                all.filter(|e| e["pool"] == "partner-a").any(|e| e["ipv4"] == second(Family::V4).to_string())
            };
            lab.wait_object(&path, Duration::from_secs(20), has).unwrap();
        }
        // Longer than it takes to look whether it has drained.
        std::thread::sleep(Duration::from_secs(6));
        since
    });
    all_leave_with("beside a pair that drains", &traffic, &both, since, second);
    assert_eq!(recorded(lab), (owner, epoch));
    let pool = lab.request("GET", POOL, &Value::Null).unwrap();
    assert_eq!(pool["status"]["addresses"][0]["drained"], false, "connections live: {pool}");
    steady.goes_on(Duration::from_secs(10)).unwrap();
    drop(steady);
    // Its gateways lost and regained it, and flows from before that are nobody's: only those that lived counted.
    has_drained(lab, 0);
    // It is taken out.
    servers.iter_mut().for_each(|s| s.source = second(s.family));
    let steady = Steady::start(lab, PODS[0], &servers, true).unwrap();
    let (taken, traffic) = under_traffic(lab, &both, |lab| {
        let taken = Instant::now();
        set_pairs(lab, json!([other("Active")]));
        let has = |g: &str| !owner_of(lab, g, "203.0.113.10").0.is_empty();
        let left = wait_for(Duration::from_secs(10), || (!has("gw-a") && !has("gw-b")).then_some(()));
        assert!(left.is_some(), "{}", status(lab, "gw-a")["core"]["pairs"]);
        wait_counted(lab, &[2]);
        // The only one drains: there is nowhere to go, and it says so.
        set_pairs(lab, json!([other("Draining")]));
        let stay = |p: &Value| {
            let mut all =
                p["status"]["conditions"].as_array().into_iter().flatten().filter(|c| c["reason"] == "Draining");
            // Its gateway says that, and the leader this.
            p["status"]["addresses"][0]["drained"] == false
                && all.any(|c| c.to_string().contains("2 namespaces go on leaving with"))
        };
        lab.wait_object(POOL, Duration::from_secs(20), stay).unwrap();
        taken
    });
    all_leave_with("the pair is taken out", &traffic, &both, taken, second);
    steady.goes_on(Duration::from_secs(10)).unwrap();
    // It has somewhere to go, and the last that lives there ends.
    set_pairs(lab, json!([first("Active"), other("Draining")]));
    both.iter().for_each(|pod| wait_source(lab, pod, egress));
    let pool = wait_counted(lab, &[2, 0]);
    assert_eq!(pool["status"]["addresses"][1]["drained"], false, "connections live: {pool}");
    steady.goes_on(Duration::from_secs(10)).unwrap();
    drop(steady);
    has_drained(lab, 1);
    // One that is in use is taken out all the same: new connections leave with the other one at once.
    let (swapped, traffic) = under_traffic(lab, &PODS, |lab| {
        let swapped = Instant::now();
        set_pairs(lab, json!([other("Active")]));
        PODS.iter().for_each(|pod| wait_source(lab, pod, second));
        std::thread::sleep(Duration::from_secs(1));
        swapped
    });
    for t in &traffic {
        let gap = t.flows.longest(swapped);
        println!("a used pair is taken out: {} {:?}: gap {gap:?}", t.pod, t.family);
        assert!(gap < t.limit(ADDRESSES, swapped), "{gap:?}");
        assert!(t.flows.sources(Some(swapped + ADDRESSES)).iter().all(|ip| *ip == second(t.family)));
    }
    set_pairs(lab, json!([first("Active")]));
    PODS.iter().for_each(|pod| wait_source(lab, pod, egress));
    lab.kubectl(&["annotate", "namespace", "annotated", "tidegate.dev/pool-"]).unwrap();
    lab.kubectl(&["label", "namespace", "annotated", "team-"]).unwrap();
}

/// A pool that is deleted while it is used is held, says so, and carries on.
fn pool_is_deleted_and_serves_on(lab: &mut Lab) {
    let finalizers = |p: &Value| p["metadata"]["finalizers"] == json!(["tidegate.dev/in-use"]);
    lab.wait_object(POOL, Duration::from_secs(20), finalizers).unwrap();
    let (owner, _) = recorded(lab);
    let owner = owner.as_str();
    let (deleted, traffic) = under_traffic(lab, &PODS, |lab| {
        let deleted = Instant::now();
        lab.kubectl(&["delete", "egresspool", "partner-a", "--wait=false"]).unwrap();
        let said = || status(lab, owner)["problems"].to_string().contains("partner-a: it is deleted and still used");
        assert!(wait_for(Duration::from_secs(10), || said().then_some(())).is_some());
        std::thread::sleep(Duration::from_secs(9));
        deleted
    });
    gaps("pool deleted", &traffic, deleted, CALM.0, CALM.1);
    assert!(lab.request("GET", POOL, &Value::Null).unwrap()["metadata"]["deletionTimestamp"].is_string());
    for family in FAMILIES {
        assert_ne!(node_of(lab, owner, family), egress(family));
    }
}
