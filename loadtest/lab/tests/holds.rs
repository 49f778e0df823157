//! What must hold when processes die, other programs interfere, outsiders knock, and everything is taken out.
//!
//! One test is one lab, one lab at a time.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tidegate_lab::family::{FAMILIES, Family};
use tidegate_lab::lab::wait_for;
use tidegate_lab::probe::{self, Echo, Knock, curl, dig, knock};
use tidegate_lab::{Lab, Options, Scenario};

static ONE: Mutex<()> = Mutex::new(());
const READY: Duration = Duration::from_secs(30);
/// What another program took away is back within the full pass, with some patience for a busy machine.
const FULL_PASS: Duration = Duration::from_secs(60);

fn up(name: &str) -> (MutexGuard<'static, ()>, Lab) {
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/demo.yaml");
    let scenario = Scenario::load(file.as_ref()).unwrap();
    let options = Options { lab: Some(env!("CARGO_BIN_EXE_tidegate-lab").into()), ..Options::unique(name) };
    (one, Lab::up(scenario, &options).unwrap())
}

/// A server of the demo's internet.
fn named(family: Family, n: u16, port: u16) -> SocketAddr {
    let ip: IpAddr = format!("{}{n}", family.pick("198.51.100.", "2001:db8:100::")).parse().unwrap();
    SocketAddr::new(ip, port)
}

fn egress(family: Family) -> IpAddr {
    family.pick("203.0.113.10", "2001:db8::10").parse().unwrap()
}

/// Fetches from the allowed name, and holds whom the server saw.
#[track_caller]
fn allowed(lab: &Lab, pod: &str, family: Family, name: &str) {
    let seen = curl(&lab.pod(pod), family, &format!("https://{name}/"), &[]);
    assert_eq!(seen.source(), Some(egress(family)), "{pod} {name}: {}", seen.text());
}

/// Fetches until it works: what is set up anew may take its time, but it must come.
#[track_caller]
fn allowed_within(lab: &Lab, pod: &str, family: Family, name: &str, limit: Duration) {
    let url = format!("https://{name}/");
    let seen = wait_for(limit, || curl(&lab.pod(pod), family, &url, &[]).source());
    assert_eq!(seen, Some(egress(family)), "{pod} {name}");
}

fn sh(lab: &Lab, place: &str, line: &str) -> String {
    let out = lab.place(place).unwrap().run(&["sh", "-c", line]);
    assert_eq!(out.status, 0, "{place}: {line}: {}", out.stderr);
    out.stdout
}

/// New connections from outside to a held address meet nothing; the node and the gateway's pod stay reachable.
#[test]
fn nobody_outside_reaches_an_egress_address() {
    let (_one, lab) = up("outside");
    let router = lab.place("router").unwrap();
    for family in FAMILIES {
        allowed(&lab, "shop/web", family, "api.example.com");
        for port in [22, 53, 443, 7000, 7443, 9090, 15001, 30080] {
            let to = SocketAddr::new(egress(family), port);
            assert_eq!(knock(&router, to).unwrap(), Knock::Silent, "{to}");
            assert_eq!(probe::datagram(&router, to, b"hello", false).unwrap(), None, "{to}");
        }
        let ping = router.run(&["ping", "-c", "1", "-W", "2", &egress(family).to_string()]);
        assert_eq!(ping.status, 0, "an egress address answers echo: {}", ping.stdout);
        allowed(&lab, "shop/web", family, "api.example.com");
    }
    let node = lab.scenario().node("gw-node-a").unwrap().ipv4;
    assert_eq!(router.run(&["ping", "-c", "1", "-W", "2", &node.to_string()]).status, 0, "the node is reachable");
    let pod = lab.scenario().pod("tidegate-system/gw-a").unwrap().ipv4.unwrap();
    let ready = router.run(&["curl", "-sS", "-m", "3", &format!("http://{pod}:9090/healthz")]);
    assert_eq!(ready.stdout.trim(), "ok", "the gateway's pod is reachable on its own address: {}", ready.stderr);
}

/// An agent that is killed leaves enforcement, live flows go on, new names work; back again, it adopts what is there.
#[test]
fn an_agent_is_killed_and_comes_back() {
    let (_one, mut lab) = up("agent");
    let pod = "shop/web";
    let denied = FAMILIES.map(|f| named(f, 14, 443));
    let watches = denied.map(|d| lab.watch(d.ip(), "").unwrap());
    let mut live = Vec::new();
    for family in FAMILIES {
        assert!(!dig(&lab.pod(pod), "tcp.example.com", family.record(), &[]).answers.is_empty());
        live.push(Echo::connect(&lab.pod(pod), named(family, 12, 7000)).unwrap());
        allowed(&lab, pod, family, "api.example.com");
    }
    lab.signal("node-1", Signal::SIGKILL, Some(Duration::from_secs(5))).unwrap();
    for (family, to) in FAMILIES.into_iter().zip(denied) {
        assert_eq!(knock(&lab.pod(pod), to).unwrap(), Knock::Silent);
        allowed(&lab, pod, family, "api.example.com");
    }
    // Without its agent the node's misses are steered, and the gateway gives the same verdict.
    for family in FAMILIES {
        allowed_within(&lab, pod, family, "fresh.one.example.net", Duration::from_secs(10));
    }
    for (echo, to) in live.iter_mut().zip(denied) {
        echo.say("still here\n").unwrap();
        assert_eq!(knock(&lab.pod(pod), to).unwrap(), Knock::Silent, "the gateway denies what the node steers");
    }
    lab.start("node-1").unwrap();
    lab.wait_ready("node-1", READY).unwrap();
    for (family, (echo, to)) in FAMILIES.into_iter().zip(live.iter_mut().zip(denied)) {
        echo.say("and now\n").unwrap();
        assert_eq!(knock(&lab.pod(pod), to).unwrap(), Knock::Silent);
        allowed_within(&lab, pod, family, "more.one.example.net", Duration::from_secs(5));
    }
    for w in &watches {
        assert_eq!(w.packets().unwrap(), 0, "nothing of what is denied reached the router");
    }
}

/// With every gateway gone and the agents started anew, isolated pods stay isolated, and in-cluster traffic goes on.
#[test]
fn nobody_is_freed_when_all_gateways_are_gone() {
    let (_one, mut lab) = up("gone");
    let pod = "shop/web";
    let to = named(Family::V4, 14, 443);
    let watch = lab.watch(to.ip(), "").unwrap();
    allowed(&lab, pod, Family::V4, "api.example.com");
    for gateway in ["gw-a", "gw-b"] {
        lab.signal(gateway, Signal::SIGKILL, Some(Duration::from_secs(5))).unwrap();
    }
    lab.signal("node-1", Signal::SIGKILL, Some(Duration::from_secs(5))).unwrap();
    lab.start("node-1").unwrap();
    // Longer than an agent waits for gateways before it trusts that what it heard is complete.
    let end = Instant::now() + Duration::from_secs(12);
    while Instant::now() < end {
        assert_eq!(knock(&lab.pod(pod), to).unwrap(), Knock::Silent);
        assert_eq!(knock(&lab.pod("managed/app"), to).unwrap(), Knock::Silent);
    }
    assert_eq!(watch.packets().unwrap(), 0);
    let backend = lab.scenario().pod("untouched/backend").unwrap().ipv4.unwrap();
    assert_eq!(knock(&lab.pod(pod), SocketAddr::new(backend.into(), 8080)).unwrap(), Knock::Open, "in-cluster");
    let free = curl(&lab.pod("untouched/app"), Family::V4, "http://198.51.100.14/", &[]);
    assert!(free.source().is_some(), "untouched pods are untouched: {}", free.text());
    for gateway in ["gw-a", "gw-b"] {
        lab.start(gateway).unwrap();
    }
    for gateway in ["gw-a", "gw-b"] {
        lab.wait_ready(gateway, READY).unwrap();
    }
    allowed_within(&lab, pod, Family::V4, "api.example.com", Duration::from_secs(15));
}

/// A name whose last fact was forgotten works again at the first try.
#[test]
fn a_forgotten_name_works_at_the_first_try_again() {
    let (_one, lab) = up("again");
    let pod = "shop/web";
    for round in 0..3 {
        // Resolved, never used, expired, forgotten: its grants go with it in the next full pass.
        let mut tries = 0;
        loop {
            let begin = Instant::now();
            let seen = dig(&lab.pod(pod), "short.example.com", "A", &[]);
            assert!(!seen.answers.is_empty(), "{}", seen.text());
            let asked = begin.elapsed();
            let echo = Echo::connect(&lab.pod(pod), named(Family::V4, 26, 7000));
            tries += 1;
            // The name lives for a second: on a machine that took longer to get here, nothing is said.
            if echo.is_err() && asked > Duration::from_millis(700) && tries < 10 {
                continue;
            }
            assert!(echo.is_ok(), "round {round}: the first connection after the answer: {:#}", echo.unwrap_err());
            break;
        }
        std::thread::sleep(Duration::from_secs(if round == 0 { 40 } else { 3 }));
    }
}

/// Whatever another program takes away is back within the full pass, and meanwhile nothing leaks.
#[test]
fn what_others_delete_comes_back() {
    let (_one, lab) = up("repair");
    let pod = "shop/web";
    let pods = lab.scenario().pod(pod).unwrap();
    let (source4, source6) = (pods.ipv4.unwrap(), pods.ipv6.unwrap());
    let denied = FAMILIES.map(|f| named(f, 14, 443));
    let allowed_to = FAMILIES.map(|f| named(f, 12, 7000));
    let mut watches: Vec<_> = denied.iter().map(|d| lab.watch(d.ip(), "").unwrap()).collect();
    // Nothing may leave with the pod's own address.
    watches.push(lab.watch(allowed_to[0].ip(), &format!("ip saddr {source4}")).unwrap());
    watches.push(lab.watch(allowed_to[1].ip(), &format!("ip6 saddr {source6}")).unwrap());
    for family in FAMILIES {
        allowed(&lab, pod, family, "api.example.com");
        assert!(!dig(&lab.pod(pod), "tcp.example.com", family.record(), &[]).answers.is_empty());
    }
    let damage: [(&str, &str); 8] = [
        ("gw-a", "nft delete table inet tidegate"),
        (
            "gw-a",
            "ip rule del pref 20100; ip -6 rule del pref 20101; ip route flush table 101; ip -6 route flush table 100",
        ),
        ("gw-a", "ip addr del 203.0.113.10/32 dev tga; ip -6 addr del 2001:db8::10/128 dev tga"),
        ("node-1", "nft delete table inet tidegate"),
        ("node-1", "ip link del tgn"),
        ("gw-node-a", "nft delete table inet tidegate"),
        ("gw-node-a", "ip link del tgn"),
        ("gw-node-a", "ip link del tgq; ip link del tgh"),
    ];
    for (place, line) in damage {
        sh(&lab, place, line);
        for (i, to) in denied.into_iter().enumerate() {
            assert_eq!(knock(&lab.pod(pod), to).unwrap(), Knock::Silent, "after {line} at {place}");
            // Whether it works now is not the question: only how it leaves.
            let _ = knock(&lab.pod(pod), allowed_to[i]);
        }
    }
    for family in FAMILIES {
        allowed_within(&lab, pod, family, "api.example.com", FULL_PASS);
        let to = named(family, 12, 7000);
        let echo = wait_for(FULL_PASS, || Echo::connect(&lab.pod(pod), to).ok());
        assert!(echo.is_some(), "forwarding to {to} is back");
    }
    for w in &watches {
        assert_eq!(w.packets().unwrap(), 0, "nothing leaked");
    }
}

/// What the gateway and the agents made in a place: devices, rules, tables.
fn traces(lab: &Lab, place: &str) -> String {
    sh(
        lab,
        place,
        "ip -o link | grep -oE ' (tgn|tgq|tgh)(@|:)' ; nft list tables | grep tidegate; ip rule | grep -E '^201'; \
         ip -6 rule | grep -E '^201'; true",
    )
}

/// After SIGTERM and `tidegate agent --cleanup` nothing of Tidegate is left on a node, and traffic flows as before.
#[test]
fn a_clean_uninstall_leaves_nothing() {
    let (_one, lab) = up("clean");
    allowed(&lab, "shop/web", Family::V4, "api.example.com");
    let agents = ["node-1", "node-2", "gw-node-a", "gw-node-b"];
    for gateway in ["gw-a", "gw-b"] {
        lab.signal(gateway, Signal::SIGTERM, Some(READY)).unwrap();
    }
    for agent in agents {
        lab.signal(agent, Signal::SIGTERM, Some(READY)).unwrap();
        assert!(traces(&lab, agent).contains("tgn"), "SIGTERM alone leaves enforcement");
    }
    let denied = named(Family::V4, 14, 443);
    assert_eq!(knock(&lab.pod("shop/web"), denied).unwrap(), Knock::Silent);
    for agent in agents {
        let binary = lab.tidegate().to_owned();
        let config = lab.layout().config(agent);
        let (binary, config) = (binary.to_str().unwrap(), config.to_str().unwrap());
        let out = lab.place(agent).unwrap().run(&[binary, "agent", "--config", config, "--cleanup"]);
        assert_eq!(out.status, 0, "{}", out.stderr);
        assert_eq!(traces(&lab, agent), "", "{agent}");
        assert!(!lab.layout().bpffs().join(agent).exists(), "{agent}: pins are gone");
    }
    let free = curl(&lab.pod("shop/web"), Family::V4, "http://198.51.100.14/", &[]);
    assert!(free.source().is_some(), "traffic flows as before: {}", free.text());
}
