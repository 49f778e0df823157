//! With Kubernetes: owners of egress pairs stand in the status of their pools, and whoever takes over is recorded. The API
//! server, the owner and the ways between them fail one after the other.
//!
//! One lab, one test: each step begins where the last one ended.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "failover/common.rs"]
mod common;

use std::time::{Duration, Instant};

use common::{
    ADDRESSES, CALM, NAMES, PODS, POOL, READY, Traffic, Wire, egress, gaps, kill, learn, node_of, owner,
    owner_is_cut_off, recorded, status, under_traffic, up_like, wait_owner, wait_recorded,
};
use serde_json::{Value, json};
use tidegate_lab::Lab;
use tidegate_lab::family::FAMILIES;
use tidegate_lab::lab::wait_for;
use tidegate_lab::netns::nft;
use tidegate_lab::probe::dig;

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
    pool_is_deleted_and_serves_on(&mut lab);
    lab.down().unwrap();
}

fn other(gateway: &str) -> &'static str {
    if gateway == "gw-a" { "gw-b" } else { "gw-a" }
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
        let denied =
            wait_for(Duration::from_secs(15), || (!allowed(lab, "revoked.example.com")).then(|| edit.elapsed()));
        println!("the rule was gone after {denied:?}");
        // Edits take a moment themselves.
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
