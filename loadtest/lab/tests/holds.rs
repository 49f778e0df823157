//! What must hold when all gateways are gone, outsiders knock, and names are forgotten.
//!
//! One test is one lab, one lab at a time.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tidegate_lab::family::{FAMILIES, Family};
use tidegate_lab::lab::wait_for;
use tidegate_lab::probe::{self, Echo, Knock, curl, dig, knock};
use tidegate_lab::story::named;
use tidegate_lab::{Lab, Options, Scenario};

static ONE: Mutex<()> = Mutex::new(());
const READY: Duration = Duration::from_secs(30);

fn up(name: &str) -> (MutexGuard<'static, ()>, Lab) {
    up_in(name, "demo.yaml", None)
}

/// A lab of this scenario; with another time between full passes, seconds.
fn up_in(name: &str, scenario: &str, full_pass: Option<u64>) -> (MutexGuard<'static, ()>, Lab) {
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios");
    let mut scenario = Scenario::load(&Path::new(folder).join(scenario)).unwrap();
    if let (Some(product), Some(seconds)) = (&mut scenario.tidegate, full_pass) {
        for keys in [&mut product.agent, &mut product.gateway] {
            keys.insert("fullPassSeconds".into(), seconds.into());
        }
    }
    let options = Options { lab: Some(env!("CARGO_BIN_EXE_tidegate-lab").into()), ..Options::unique(name) };
    (one, Lab::up(scenario, &options).unwrap())
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

/// New connections to a held address meet nothing, whoever opens them: not the gateway's own ports, not the node's, not
/// services behind node ports. Node and gateway pod stay reachable on their own addresses.
#[test]
fn nobody_reaches_an_egress_address() {
    let (_one, lab) = up_in("outside", "variants/kube-proxy.yaml", None);
    let clients = ["router", "internet", "node-2", "gw-node-a", "gw-node-b", "untouched/app"];
    // DNS, the gateway's control, admin and relay ports, node ports for TCP and UDP, and what its pools' flows may use.
    let ports = [22, 53, 443, 7000, 7443, 9090, 15001, 30080, 30700, 30701, 40000];
    for family in FAMILIES {
        allowed(&lab, "shop/web", family, "api.example.com");
        let (lab, to) = (&lab, |port| SocketAddr::new(egress(family), port));
        std::thread::scope(|scope| {
            for client in clients {
                for port in ports {
                    scope.spawn(move || {
                        let place = lab.place(client).unwrap();
                        let seen = knock(&place, to(port)).unwrap();
                        assert_ne!(seen, Knock::Open, "{client} to {}", to(port));
                        // From the outside there is not even a refusal; a node may know that nobody answers its ARP.
                        assert!(
                            seen == Knock::Silent || client != "router",
                            "{client} to {}: {}",
                            to(port),
                            seen.text()
                        );
                        let answer = probe::datagram(&place, to(port), b"hello", false);
                        assert!(!matches!(answer, Ok(Some(_))), "{client} to {} over UDP", to(port));
                    });
                }
            }
        });
        let router = lab.place("router").unwrap();
        let ping = router.run(&["ping", "-c", "1", "-W", "2", &egress(family).to_string()]);
        assert_eq!(ping.status, 0, "an egress address answers echo: {}", ping.stdout);
        let node = lab.scenario().node("gw-node-a").unwrap();
        let node: IpAddr = family.pick(node.ipv4.into(), node.ipv6.into());
        assert_eq!(knock(&router, SocketAddr::new(node, 30080)).unwrap(), Knock::Open, "the node's ports are there");
        let pod = lab.scenario().pod("tidegate-system/gw-a").unwrap();
        let pod: IpAddr = family.pick(pod.ipv4.unwrap().into(), pod.ipv6.unwrap().into());
        assert_eq!(knock(&router, SocketAddr::new(pod, 7443)).unwrap(), Knock::Open, "the gateway's own address");
        allowed(lab, "shop/web", family, "api.example.com");
    }
    let router = lab.place("router").unwrap();
    let pod = lab.scenario().pod("tidegate-system/gw-a").unwrap().ipv4.unwrap();
    let ready = router.run(&["curl", "-sS", "-m", "3", &format!("http://{pod}:9090/healthz")]);
    assert_eq!(ready.stdout.trim(), "ok", "the gateway's pod is reachable on its own address: {}", ready.stderr);
}

/// With every gateway gone and the agents started anew, isolated pods stay isolated, audited and guarded ones
/// go their own way, and in-cluster traffic goes on.
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
    drop(watch);
    assert_eq!(
        knock(&lab.pod(pod), named(Family::V4, 10, 443)).unwrap(),
        Knock::Silent,
        "allowed, but by no other way"
    );
    for pod in ["guarded/app", "audited/app"] {
        let node = lab.scenario().pod(pod).unwrap().node.clone();
        let node = lab.scenario().node(&node).unwrap();
        for family in FAMILIES {
            let out = curl(&lab.pod(pod), family, &format!("http://{}/", named(family, 14, 80)), &[]);
            let own: IpAddr = family.pick(node.ipv4.into(), node.ipv6.into());
            assert_eq!(out.source(), Some(own), "{pod} {family:?}: {}", out.text());
        }
    }
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
    let (_one, lab) = up_in("again", "demo.yaml", Some(1));
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
        std::thread::sleep(Duration::from_secs(if round == 0 { 6 } else { 3 }));
    }
}
