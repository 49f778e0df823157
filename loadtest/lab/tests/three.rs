//! Three gateways, listed by a real controller: owners die one after the other, pods are replaced one after the other as an
//! upgrade does it, a node is cordoned, and a pool says on which nodes its gateways run.
//!
//! One lab, one test: each step begins where the last one ended.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "failover/common.rs"]
mod common;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{
    ADDRESSES, CALM, HANDED, NAMES, PLAIN, PODS, POOL, READY, Traffic, Wire, egress, gaps, kill, learn, owner,
    owner_of, pod_network, recorded, start, status, under_traffic, wait_recorded,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tidegate_lab::Lab;
use tidegate_lab::family::FAMILIES;
use tidegate_lab::lab::wait_for;
use tidegate_lab::steady::gaps::Threads;

/// Those whose traffic is looked at: by the pool's address, and by the nodes'.
const ALL: [&str; 3] = [PODS[0], PODS[1], PLAIN];
/// A new gateway has heard of all agents within this: it goes on without them after twelve seconds.
const MET: Duration = Duration::from_secs(10);
/// Octets of a long download, and how many a second: longer than a pod's replacement takes, and more than buffers hold.
const DOWNLOAD: (u64, &str) = (20_000_000, "4000k");

#[test]
fn three() {
    let mut lab = start("variants/three.yaml", "three", |_| {});
    let wire = Wire::watch(&lab);
    // Nobody is there first: they tell each other who they are, and one of them claims the pair.
    let first = wait_for(READY, || Some(recorded(&lab).0).filter(|o| !o.is_empty())).unwrap();
    wait_recorded(&lab, &first, 1);
    learn(&lab, &["tcp.example.com", "www.example.com", "api.example.com"]);
    for family in FAMILIES {
        tidegate_lab::probe::dig(&lab.pod(PLAIN), "tcp.example.com", family.record(), &[]);
    }
    owners_die_one_after_the_other(&mut lab, &wire);
    pods_are_replaced_one_after_the_other(&mut lab);
    let wire = Wire::watch(&lab);
    a_cordoned_node_keeps_its_pairs(&mut lab);
    only_some_nodes_may_hold_the_pool(&mut lab, &wire);
    lab.down().unwrap();
}

fn gateways(lab: &Lab) -> Vec<String> {
    lab.scenario().gateways.iter().map(|g| g.name.clone()).collect()
}

fn node(lab: &Lab, gateway: &str) -> String {
    lab.scenario().gateways.iter().find(|g| g.name == gateway).unwrap().node.clone()
}

/// Waits until one of these says that it holds the shop's pair, with a later epoch than this; who it is.
#[track_caller]
fn heir(lab: &Lab, of: &[String], epoch: u64) -> (String, u64) {
    let holds = |g: &String| {
        let (who, now, held) = owner_of(lab, g, "203.0.113.10");
        (who == *g && now > epoch && held).then_some((who, now))
    };
    let found = wait_for(Duration::from_secs(10), || of.iter().find_map(holds));
    found.unwrap_or_else(|| panic!("nobody of {of:?}: {:?}", of.iter().map(|g| owner(lab, g)).collect::<Vec<_>>()))
}

/// The owner dies, and then the next one: each time names and both kinds of addresses come from another one. Those that come
/// back take nothing.
fn owners_die_one_after_the_other(lab: &mut Lab, wire: &Wire) {
    let (first, epoch) = recorded(lab);
    let mut left = gateways(lab);
    left.retain(|g| *g != first);
    let ((killed, second, third, last), traffic) = under_traffic(lab, &ALL, |lab| {
        let killed = kill(lab, &first);
        let (second, _) = heir(lab, &left, epoch);
        println!("owner killed: {second} holds the pair after {:?}", killed.elapsed());
        std::thread::sleep(Duration::from_millis(1500));
        left.retain(|g| *g != second);
        let last = kill(lab, &second);
        let (third, _) = heir(lab, &left, epoch + 1);
        println!("next owner killed: {third} holds the pair after {:?}", last.elapsed());
        std::thread::sleep(Duration::from_secs(4));
        (killed, second, third, last)
    });
    gaps("two owners killed", &traffic, killed, NAMES, ADDRESSES);
    wire.after(&first, killed, &[&second, &third]);
    pod_network(lab, PLAIN, &traffic, last, &owner_of(lab, &third, "default").0);
    assert_eq!(wait_recorded(lab, &third, epoch + 2), epoch + 2, "each took over once");
    for gateway in [&first, &second] {
        lab.start(gateway).unwrap();
    }
    for gateway in [&first, &second] {
        lab.wait_ready(gateway, READY).unwrap();
    }
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(recorded(lab), (third, epoch + 2), "who returns takes nothing");
}

/// Downloads one after the other, until told to end: each came whole, or was cut and said so.
struct Downloads {
    threads: Threads,
    /// When each ended, and whether it was whole.
    done: Arc<Mutex<Vec<(Instant, bool)>>>,
}

impl Downloads {
    fn start(lab: &Lab) -> Self {
        let (mut threads, done) = (Threads::new(), Arc::<Mutex<Vec<(Instant, bool)>>>::default());
        for family in FAMILIES {
            let (end, done, name) = (Arc::clone(&threads.end), Arc::clone(&done), lab.name().to_owned());
            threads.start(move || {
                let lab = Lab::open(&name).unwrap();
                let url = format!("https://api.example.com/bytes/{}", DOWNLOAD.0);
                while !end.load(Ordering::Relaxed) {
                    let out = lab.pod(PODS[0]).run(&[
                        "curl",
                        "-sS",
                        family.flag(),
                        "--limit-rate",
                        DOWNLOAD.1,
                        "-o",
                        "/dev/null",
                        "-w",
                        "%{http_code} %{size_download}",
                        &url,
                    ]);
                    let whole = out.stdout == format!("200 {}", DOWNLOAD.0);
                    assert_eq!(whole, out.status == 0, "what is cut short must look so: {out:?}");
                    if whole || out.stdout.starts_with("200") {
                        done.lock().unwrap().push((Instant::now(), whole));
                    }
                }
            });
        }
        Self { threads, done }
    }

    /// How many came whole, and how many were cut.
    fn finish(self) -> (usize, usize) {
        self.threads.finish();
        let done = self.done.lock().unwrap();
        let whole = done.iter().filter(|(_, whole)| *whole).count();
        (whole, done.len() - whole)
    }
}

/// How many new connections failed, and how many DNS queries, of how many.
fn failures(traffic: &[Traffic], since: Instant) -> [(usize, usize); 2] {
    let sum = |of: &dyn Fn(&Traffic) -> (usize, usize)| {
        traffic.iter().map(of).fold((0, 0), |(failed, all), (f, a)| (failed + f, all + a))
    };
    [sum(&|t| t.flows.failures(since)), sum(&|t| t.names.failures(since))]
}

/// An upgrade as the chart's Deployment makes it: one pod after the other ends, and another one with another name and address
/// takes its place. Its pairs go before it does; connections that it relayed end with it.
fn pods_are_replaced_one_after_the_other(lab: &mut Lab) {
    let (_, before) = recorded(lab);
    let old = gateways(lab);
    // The cluster's DNS remembers an old answer all the time: gateways lead agents to each other.
    lab.name_gateways(&[&old[2]]).unwrap();
    let downloads = Downloads::start(lab);
    let ((begun, moves), traffic) = under_traffic(lab, &ALL, |lab| {
        let begun = Instant::now();
        let mut moves = 0;
        for gateway in &old {
            let (owner, epoch) = recorded(lab);
            let node = node(lab, gateway);
            let told = Instant::now();
            if owner == *gateway {
                let others: Vec<String> = gateways(lab).into_iter().filter(|g| g != gateway).collect();
                let name = lab.name().to_owned();
                let watch = std::thread::spawn(move || {
                    let (next, _) = heir(&Lab::open(&name).unwrap(), &others, epoch);
                    (next, told.elapsed())
                });
                lab.delete_gateway(gateway).unwrap();
                let ended = told.elapsed();
                let (next, took) = watch.join().unwrap();
                println!("{gateway} is told to end: {next} holds its pair after {took:?}");
                assert!(took < ended, "it had to fall silent first: {took:?}, ended after {ended:?}");
                moves += 1;
            } else {
                lab.delete_gateway(gateway).unwrap();
                assert_eq!(recorded(lab), (owner, epoch), "who holds nothing moves nothing");
            }
            let ended = told.elapsed();
            println!("{gateway} has ended after {ended:?}");
            let new = format!("{gateway}2");
            lab.add_gateway(&new, &node).unwrap();
            lab.wait_ready(&new, READY).unwrap();
            let took = told.elapsed() - ended;
            println!("{new} is ready after {took:?}");
            assert!(took < MET, "it waited for agents that did not hear of it: {took:?}");
            // As the Deployment does, which looks at readiness every two seconds.
            std::thread::sleep(Duration::from_secs(2));
        }
        (begun, moves)
    });
    let (whole, cut) = downloads.finish();
    let [flows, names] = failures(&traffic, begun);
    println!(
        "upgrade of three gateways: {:?}, {moves} moves; new connections failed {} of {}, DNS queries {} of {}; downloads \
         {whole} whole, {cut} cut",
        begun.elapsed(),
        flows.0,
        flows.1,
        names.0,
        names.1
    );
    gaps("upgrade", &traffic, begun, CALM.0, CALM.1);
    for t in traffic.iter().filter(|t| t.pod == PLAIN) {
        let (dns, flows) = (t.names.longest(begun), t.flows.longest(begun));
        println!("upgrade, PodNetwork {:?}: DNS gap {dns:?}, gap {flows:?}", t.family);
        let limits = (t.limit(CALM.0, begun), t.limit(CALM.1, begun));
        assert!(dns < limits.0 && flows < limits.1, "PodNetwork: {dns:?} {flows:?}, not within {limits:?}");
    }
    assert!(moves >= 1 && cut <= moves * FAMILIES.len() && whole >= 2, "a move ends what it must, and nothing else");
    let (last, epoch) = recorded(lab);
    assert_eq!(epoch, before + moves as u64, "one epoch for each move");
    assert!(!old.contains(&last));
    let new = gateways(lab);
    assert_eq!(new.len(), 3);
    lab.name_gateways(&new.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
}

/// A node that takes no new pods keeps those that it has, and they what they hold.
fn a_cordoned_node_keeps_its_pairs(lab: &mut Lab) {
    let before = recorded(lab);
    let node = node(lab, &before.0);
    let (cordoned, traffic) = under_traffic(lab, &PODS, |lab| {
        let cordoned = Instant::now();
        lab.kubectl(&["cordon", &node]).unwrap();
        std::thread::sleep(Duration::from_secs(4));
        lab.kubectl(&["uncordon", &node]).unwrap();
        cordoned
    });
    gaps("cordoned", &traffic, cordoned, CALM.0, CALM.1);
    assert_eq!(recorded(lab), before);
}

/// Says which nodes may hold the shop's pool; `null` for all.
fn select(lab: &Lab, selector: Value) {
    lab.request("PATCH", POOL, &json!({"spec": {"gatewayNodeSelector": selector}})).unwrap();
}

fn label(lab: &Lab, node: &str, label: &str) {
    lab.kubectl(&["label", "node", node, label, "--overwrite"]).unwrap();
}

/// The pair moves to where it may be and nowhere else, without a gap; while nobody may hold it, it stays where it is.
fn only_some_nodes_may_hold_the_pool(lab: &mut Lab, wire: &Wire) {
    let (before, epoch) = recorded(lab);
    let others: Vec<String> = gateways(lab).into_iter().filter(|g| *g != before).collect();
    let (chosen, other) = (&others[0], &others[1]);
    label(lab, &node(lab, chosen), "egress=yes");
    let (selected, traffic) = under_traffic(lab, &PODS, |lab| {
        let selected = Instant::now();
        select(lab, json!({"matchLabels": {"egress": "yes"}}));
        heir(lab, std::slice::from_ref(chosen), epoch);
        println!("selected: {chosen} holds the pair after {:?}", selected.elapsed());
        std::thread::sleep(Duration::from_secs(2));
        selected
    });
    gaps("selected", &traffic, selected, CALM.0, CALM.1);
    let epoch = wait_recorded(lab, chosen, epoch + 1);
    wire.only(selected, &[chosen]);
    // The only one dies: nobody else takes the pair, however long. Names go on.
    let (killed, traffic) = under_traffic(lab, &PODS, |lab| {
        let killed = kill(lab, chosen);
        std::thread::sleep(Duration::from_secs(6));
        assert_eq!(recorded(lab), (chosen.clone(), epoch), "nobody else may");
        lab.start(chosen).unwrap();
        lab.wait_ready(chosen, READY).unwrap();
        std::thread::sleep(Duration::from_secs(2));
        killed
    });
    for t in &traffic {
        assert_eq!(t.flows.sources(None), [egress(t.family)], "no other way out");
        let (dns, flows) = (t.names.longest(killed), t.flows.longest(killed));
        println!("the only one killed: {} {:?}: DNS gap {dns:?}, egress address gap {flows:?}", t.pod, t.family);
        assert!(dns < NAMES && flows > Duration::from_secs(5), "{dns:?} {flows:?}");
    }
    wire.only(killed, &[chosen]);
    let epoch = wait_recorded(lab, chosen, epoch);
    // The label goes: better this one than none, and it says so. Then it is another node's.
    label(lab, &node(lab, chosen), "egress-");
    let said =
        |g: &str| status(lab, g)["problems"].to_string().contains("none runs on a node that gatewayNodeSelector takes");
    let problem = wait_for(Duration::from_secs(10), || said(chosen).then_some(()));
    assert!(problem.is_some(), "{}", status(lab, chosen)["problems"]);
    assert_eq!(recorded(lab), (chosen.clone(), epoch));
    let (moved, traffic) = under_traffic(lab, &PODS, |lab| {
        let moved = Instant::now();
        label(lab, &node(lab, other), "egress=yes");
        heir(lab, std::slice::from_ref(other), epoch);
        std::thread::sleep(Duration::from_secs(2));
        moved
    });
    gaps("the label moved", &traffic, moved, CALM.0, CALM.1);
    let epoch = wait_recorded(lab, other, epoch + 1);
    wire.only(moved, &[other]);
    // All may: nothing moves.
    select(lab, Value::Null);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(recorded(lab), (other.clone(), epoch));
    // And with SIGTERM alone, as a kubelet's when the node shuts down, the pair is handed over, too.
    let told = Instant::now();
    lab.signal(other, Signal::SIGTERM, None).unwrap();
    let rest: Vec<String> = gateways(lab).into_iter().filter(|g| g != other).collect();
    heir(lab, &rest, epoch);
    assert!(told.elapsed() < HANDED, "{:?}", told.elapsed());
}
