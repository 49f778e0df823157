//! Parts of the cluster lose sight of each other, agents die, gateways are told to end, certificates are replaced: at no
//! time do two gateways announce an egress address, and traffic goes on.
//!
//! One lab, one test: each step begins where the last one ended.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "failover/common.rs"]
mod common;

use std::time::{Duration, Instant};

use common::{
    CALM, HANDED, PODS, READY, Wire, facts, facts_hold, gaps, is_apart, kill, learn, log, owner, owner_is_cut_off,
    owner_of, status, under_traffic, up, wait_owner,
};
use nix::sys::signal::Signal;
use tidegate_lab::Lab;
use tidegate_lab::certs::Authority;
use tidegate_lab::family::FAMILIES;
use tidegate_lab::lab::wait_for;
use tidegate_lab::netns::nft;
use tidegate_lab::probe::dig;

const NODES: [&str; 2] = ["gw-node-a", "gw-node-b"];
const GATEWAYS: [&str; 2] = ["gw-a", "gw-b"];

#[test]
fn partition() {
    let mut lab = up("partition");
    assert!(is_apart(&lab), "each gateway has a pair of its own");
    let wire = Wire::watch(&lab);
    learn(&lab, &["tcp.example.com", "www.example.com", "api.example.com"]);
    wire.wait_quiet();
    gateways_lose_each_other(&mut lab, &wire);
    owner_is_cut_off(&mut lab, &wire);
    owner_is_told_to_end(&mut lab, &wire);
    agent_of_the_owner_dies(&mut lab, &wire);
    agent_of_the_owner_hangs(&mut lab, &wire);
    certificates_are_replaced(&mut lab);
    lab.down().unwrap();
}

/// Who owns what, by both gateways' word.
fn owners(lab: &Lab) -> Vec<(String, u64, bool)> {
    let pairs = ["203.0.113.10", "203.0.113.20", "default"];
    GATEWAYS.iter().flat_map(|g| pairs.map(|p| owner_of(lab, g, p))).collect()
}

/// How often ownership was decided anew.
fn decisions(lab: &Lab) -> usize {
    GATEWAYS.iter().map(|g| log(lab, g).lines().filter(|l| l.contains(" ownership ")).count()).sum()
}

/// The gateways cannot hear each other while every agent hears both: nobody takes anything.
fn gateways_lose_each_other(lab: &mut Lab, wire: &Wire) {
    let before = (owners(lab), decisions(lab));
    assert!(before.1 > 0);
    let pods = GATEWAYS.map(|g| lab.scenario().pod(&format!("tidegate-system/{g}")).unwrap().clone());
    let all = |ips: [String; 2]| format!("{{ {} }}", ips.join(", "));
    let v4 = all(pods.each_ref().map(|p| p.ipv4.unwrap().to_string()));
    let v6 = all(pods.each_ref().map(|p| p.ipv6.unwrap().to_string()));
    let rules = format!(
        "table inet lab-cut {{ chain cut {{ type filter hook forward priority -300; policy accept;
         ip saddr {v4} ip daddr {v4} drop;
         ip6 saddr {v6} ip6 daddr {v6} drop; }}; }}"
    );
    let (start, traffic) = under_traffic(lab, &PODS, |lab| {
        let start = Instant::now();
        for node in NODES {
            nft(lab.place(node).unwrap().netns(), &rules).unwrap();
        }
        let lost = || log(lab, "gw-b").contains("no stream from another gateway; trying again").then_some(());
        assert!(wait_for(Duration::from_secs(10), lost).is_some(), "the streams are cut");
        // Longer than any silence that anybody waits for.
        std::thread::sleep(Duration::from_secs(5));
        start
    });
    gaps("peers cut", &traffic, start, CALM.0, CALM.1);
    assert_eq!((owners(lab), decisions(lab)), before, "no split, no flapping");
    wire.only(start, &[]);
    // What was learnt meanwhile is told when they hear each other again.
    for family in FAMILIES {
        assert_eq!(dig(&lab.pod(PODS[0]), "cut.one.example.net", family.record(), &[]).answers.len(), 1);
    }
    // The status is a second old at most.
    let more = || (facts(lab, "gw-a") > facts(lab, "gw-b")).then_some(());
    assert!(wait_for(Duration::from_secs(5), more).is_some(), "only one of them hears of it");
    for node in NODES {
        nft(lab.place(node).unwrap().netns(), "delete table inet lab-cut").unwrap();
    }
    let same = || (facts(lab, "gw-a") == facts(lab, "gw-b")).then_some(());
    assert!(wait_for(Duration::from_secs(15), same).is_some());
    assert_eq!((owners(lab), decisions(lab)), before);
}

/// SIGTERM: the other one has everything in place before this one lets go.
fn owner_is_told_to_end(lab: &mut Lab, wire: &Wire) {
    let (_, epoch) = owner(lab, "gw-b");
    let ((told, ready), traffic) = under_traffic(lab, &PODS, |lab| {
        let told = Instant::now();
        lab.signal("gw-b", Signal::SIGTERM, None).unwrap();
        let unready = wait_for(Duration::from_secs(1), || match lab.admin("gw-b", "/readyz") {
            Ok((200, _)) => None,
            Ok((_, body)) => Some(body),
            // The port is closed: it was not asked in time.
            Err(_) => Some(String::new()),
        });
        wait_owner(lab, "gw-a", "gw-a", Duration::from_secs(3));
        let took = told.elapsed();
        assert!(took < HANDED, "not by silence, which takes two seconds: {took:?}");
        let process = lab.process("gw-b").unwrap();
        assert!(process.wait(Duration::from_secs(8)), "it ends");
        process.reap();
        println!("told to end: taken over after {took:?}, ended after {:?}", told.elapsed());
        std::thread::sleep(Duration::from_secs(3));
        (told, unready)
    });
    assert!(ready.as_ref().is_some_and(|r| r.contains("draining")), "first it is not ready any more: {ready:?}");
    gaps("owner told to end", &traffic, told, Duration::from_millis(500), Duration::from_secs(1));
    assert_eq!(owner(lab, "gw-a"), ("gw-a".into(), epoch + 1), "one epoch, one move");
    wire.only(told, &["gw-a"]);
    facts_hold(lab, Duration::from_secs(1));
    lab.start("gw-b").unwrap();
    lab.wait_ready("gw-b", READY).unwrap();
    assert_eq!(owner(lab, "gw-b"), ("gw-a".into(), epoch + 1), "it takes nothing back");
}

/// An owner without its node's agent holds no address: it yields.
fn agent_of_the_owner_dies(lab: &mut Lab, wire: &Wire) {
    let (_, epoch) = owner(lab, "gw-a");
    let (killed, traffic) = under_traffic(lab, &PODS, |lab| {
        let killed = kill(lab, NODES[0]);
        wait_owner(lab, "gw-b", "gw-b", Duration::from_secs(10));
        println!("agent killed: taken over after {:?}", killed.elapsed());
        std::thread::sleep(Duration::from_secs(2));
        killed
    });
    gaps("agent killed", &traffic, killed, Duration::from_secs(1), Duration::from_secs(3));
    assert_eq!(lab.admin("gw-a", "/readyz").unwrap().0, 503);
    let (back, traffic) = under_traffic(lab, &PODS, |lab| {
        let back = Instant::now();
        lab.start(NODES[0]).unwrap();
        lab.wait_ready(NODES[0], READY).unwrap();
        lab.wait_ready("gw-a", READY).unwrap();
        std::thread::sleep(Duration::from_secs(1));
        back
    });
    gaps("agent is back", &traffic, back, CALM.0, CALM.1);
    for g in GATEWAYS {
        assert_eq!(owner(lab, g), ("gw-b".into(), epoch + 1), "{g}");
    }
    wire.only(killed, &["gw-b"]);
}

/// One that hangs ends no stream and no lease of the kernel's by itself: silence alone says so, 2 s of it, and as long
/// again its owner waits for it.
fn agent_of_the_owner_hangs(lab: &mut Lab, wire: &Wire) {
    let (_, epoch) = owner(lab, "gw-b");
    let (hung, traffic) = under_traffic(lab, &PODS, |lab| {
        let hung = Instant::now();
        lab.signal(NODES[1], Signal::SIGSTOP, None).unwrap();
        wait_owner(lab, "gw-a", "gw-a", Duration::from_secs(10));
        println!("agent hung: taken over after {:?}", hung.elapsed());
        std::thread::sleep(Duration::from_secs(2));
        lab.signal(NODES[1], Signal::SIGCONT, None).unwrap();
        lab.wait_ready(NODES[1], READY).unwrap();
        lab.wait_ready("gw-b", READY).unwrap();
        std::thread::sleep(Duration::from_secs(2));
        hung
    });
    gaps("agent hung", &traffic, hung, Duration::from_secs(1), Duration::from_secs(5));
    for g in GATEWAYS {
        assert_eq!(owner(lab, g), ("gw-a".into(), epoch + 1), "{g}");
    }
    wire.only(hung, &["gw-a"]);
}

/// Another authority and new certificates for all, while everything runs: who connects from then on shows the new
/// ones, and is asked for new ones.
fn certificates_are_replaced(lab: &mut Lab) {
    let authority = Authority::new("tidegate-lab renewed").unwrap();
    let ca = authority.write(&lab.layout().ca(), "control", false).unwrap();
    let nodes = lab.scenario().nodes.iter().map(|n| format!("{}.node.tidegate", n.name));
    for name in nodes.chain(GATEWAYS.map(|g| format!("{g}.gateway.tidegate"))) {
        authority.sign(&lab.layout().ca(), &name, &ca).unwrap();
    }
    let lines = GATEWAYS.map(|g| log(lab, g).lines().count());
    kill(lab, "node-1");
    lab.start("node-1").unwrap();
    lab.wait_ready("node-1", READY).unwrap();
    let up = |lab: &Lab, g: &str| status(lab, g)["core"]["nodes"]["node-1"]["connected"] == true;
    for (g, lines) in GATEWAYS.iter().zip(lines) {
        let again = || log(lab, g).lines().skip(lines).any(|l| l.contains("certificates read again")).then_some(());
        assert!(wait_for(Duration::from_secs(10), again).is_some(), "{g} reads them");
        assert!(wait_for(Duration::from_secs(10), || up(lab, g).then_some(())).is_some(), "{g}: {}", status(lab, g));
    }
    kill(lab, "gw-a");
    lab.start("gw-a").unwrap();
    lab.wait_ready("gw-a", READY).unwrap();
    let last = || log(lab, "gw-b").lines().rfind(|l| l.contains("stream from another gateway")).map(str::to_owned);
    let heard = || last().filter(|l| l.contains("is up"));
    assert!(wait_for(Duration::from_secs(10), heard).is_some(), "{:?}", last());
    learn(lab, &["tcp.example.com", "www.example.com"]);
    facts_hold(lab, Duration::from_secs(3));
}
