//! Gateways die, hang, come back and start anew: names, egress addresses and facts must not go with them.
//!
//! One lab, one test: each step begins where the last one ended.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "failover/common.rs"]
mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use common::{
    ADDRESSES, NAMES, PLAIN, PODS, READY, Wire, egress, facts, facts_hold, gaps, kill, learn, named, owner, owner_of,
    pod_network, tcp, under_traffic, up, wait_owner,
};
use nix::sys::signal::Signal;
use tidegate_lab::Lab;
use tidegate_lab::family::{FAMILIES, Family};
use tidegate_lab::lab::wait_for;
use tidegate_lab::probe::{Echo, curl, dig};

#[test]
fn failover() {
    let mut lab = up("failover");
    let wire = Wire::watch(&lab);
    learn(&lab, &["tcp.example.com", "www.example.com", "api.example.com"]);
    for family in FAMILIES {
        assert_eq!(dig(&lab.pod(PLAIN), "tcp.example.com", family.record(), &[]).answers.len(), 1);
    }
    container_restart(&mut lab);
    owner_dies(&mut lab, &wire);
    owner_returns(&mut lab);
    owner_hangs(&mut lab, &wire);
    owner_hands_its_facts_over(&mut lab);
    lab.down().unwrap();
}

/// The process dies and starts at once in the namespace that stays, before anybody takes it for dead: what is forwarded
/// goes on, what is relayed is reset, and nothing gets out by another way meanwhile.
fn container_restart(lab: &mut Lab) {
    for attempt in 1..=5 {
        let (_, epoch) = owner(lab, "gw-a");
        let mut live: Vec<Echo> = Vec::new();
        let mut streams = Vec::new();
        for family in FAMILIES {
            live.extend(PODS.map(|pod| Echo::connect(&lab.pod(pod), tcp(family)).unwrap()));
            let url = ["curl", "-sSN", "-m", "30", family.flag(), "https://api.example.com/stream"];
            let stream = lab.pod(PODS[0]).spawn(&url).unwrap();
            assert!(stream.wait_output("\n", Duration::from_secs(5)), "{}", stream.output());
            streams.push(stream);
        }
        // Neither as the pod nor as anybody else: what is seen outside has the pool's address.
        let other = |f: Family| format!("{} saddr != {}", f.pick("ip", "ip6"), egress(f));
        let leaks = FAMILIES.map(|f| lab.watch(tcp(f).ip(), &other(f)).unwrap());
        let denied = FAMILIES.map(|f| lab.watch(named(f, 14, 443).ip(), "").unwrap());
        let (ends, traffic) = under_traffic(lab, &PODS, |lab| {
            kill(lab, "gw-a");
            let ends: Vec<_> = streams.iter_mut().map(|s| (s.wait(Duration::from_secs(1)), s.output())).collect();
            lab.start("gw-a").unwrap();
            for echo in &mut live {
                // While nobody is there: the kernel sends it again.
                let _ = echo.patience(Duration::from_millis(1));
                let _ = echo.say("");
            }
            for f in FAMILIES {
                let refused =
                    lab.pod(PODS[0]).within(|| common::connect(named(f, 14, 443), Duration::from_millis(300)));
                assert!(refused.unwrap().is_err());
            }
            lab.wait_ready("gw-a", READY).unwrap();
            std::thread::sleep(Duration::from_secs(1));
            ends
        });
        for t in &traffic {
            assert_eq!(t.flows.sources(None), [egress(t.family)]);
        }
        for watch in leaks.iter().chain(&denied) {
            assert_eq!(watch.packets().unwrap(), 0, "nothing leaked");
        }
        let (who, after) = owner(lab, "gw-b");
        if who != "gw-a" {
            // It took longer than two seconds on this machine: that is another promise.
            println!("attempt {attempt}: the restart took too long, {who} took over with epoch {after}");
            lab.restart("gw-b").unwrap();
            wait_owner(lab, "gw-a", "gw-a", Duration::from_secs(10));
            continue;
        }
        let renewed = ("gw-a".to_owned(), epoch + 1);
        let renewed = wait_for(Duration::from_secs(5), || Some(owner(lab, "gw-b")).filter(|o| *o == renewed));
        assert!(renewed.is_some(), "a new epoch for a new process: {:?} after {epoch}", owner(lab, "gw-b"));
        for echo in &mut live {
            echo.patience(Duration::from_secs(10)).unwrap();
            echo.say("still here\n").unwrap();
            assert_eq!(
                tidegate_lab::probe::source(&echo.seen).map(|ip| FAMILIES.map(egress).contains(&ip)),
                Some(true)
            );
        }
        for (end, output) in ends {
            assert_eq!(end, Some(56), "reset at once: {output}");
        }
        facts_hold(lab, Duration::from_secs(2));
        println!("attempt {attempt}: restarted in place");
        return;
    }
    panic!("gw-a never came back within two seconds");
}

/// The owner dies under traffic: names and the same address come from the other one. Flows that it carried end.
fn owner_dies(lab: &mut Lab, wire: &Wire) {
    let (_, epoch) = owner(lab, "gw-a");
    let plain = owner_of(lab, "gw-a", "default").0;
    let mut dead = Vec::new();
    for to in FAMILIES.map(tcp).into_iter().chain(FAMILIES.map(|f| named(f, 10, 443))) {
        let stream = lab.pod(PODS[0]).within(|| TcpStream::connect_timeout(&to, Duration::from_secs(2)).unwrap());
        dead.push((to, stream.unwrap()));
    }
    let pods = [PODS[0], PODS[1], PLAIN];
    let ((killed, ended), traffic) = under_traffic(lab, &pods, |lab| {
        let killed = kill(lab, "gw-a");
        std::thread::sleep(Duration::from_secs(4));
        let mut ended = Vec::new();
        for (to, stream) in &mut dead {
            stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
            // A forwarded one has its server's first line unread.
            let cut = stream.write_all(b"x").and_then(|()| {
                let mut rest = Vec::new();
                stream.read_to_end(&mut rest)
            });
            ended.push((*to, cut.map_err(|e| e.kind())));
        }
        std::thread::sleep(Duration::from_secs(1));
        (killed, ended)
    });
    gaps("owner killed", &traffic, killed, NAMES, ADDRESSES);
    for (to, how) in ended {
        assert_eq!(how, Err(ErrorKind::ConnectionReset), "{to}");
    }
    assert_eq!(owner(lab, "gw-b"), ("gw-b".into(), epoch + 1));
    wire.after("gw-a", killed, &["gw-b"]);
    if plain == "gw-a" {
        pod_network(lab, PLAIN, &traffic, killed, "gw-b");
    }
    // Names that only pods of the dead one asked for.
    println!("facts hold {:?} after the failover", facts_hold(lab, Duration::from_secs(1)));
    for family in FAMILIES {
        let seen = curl(&lab.pod(PODS[1]), family, "https://api.example.com/", &[]);
        assert_eq!(seen.source(), Some(egress(family)), "{}", seen.text());
    }
}

/// It comes back: it takes nothing, and knows what the other one knows before it says that it is ready.
fn owner_returns(lab: &mut Lab) {
    let before = owner(lab, "gw-b");
    // Not by its own journal.
    for file in ["facts.snapshot", "facts.log"] {
        std::fs::remove_file(lab.layout().journal("gw-a").join(file)).unwrap();
    }
    let ((start, known), traffic) = under_traffic(lab, &PODS, |lab| {
        let start = Instant::now();
        lab.start("gw-a").unwrap();
        lab.wait_ready("gw-a", READY).unwrap();
        // The status is published with the claims, which follow the import.
        let known = (facts(lab, "gw-a"), facts(lab, "gw-b"));
        std::thread::sleep(Duration::from_secs(3));
        (start, known)
    });
    gaps("owner returned", &traffic, start, Duration::from_millis(700), Duration::from_secs(1));
    for g in ["gw-a", "gw-b"] {
        assert_eq!(owner(lab, g), before, "{g}");
    }
    println!("facts: gw-a {}, gw-b {}", known.0, known.1);
    assert!(known.0 >= 6 && known.0 == known.1, "they came from the other gateway before it was ready: {known:?}");
}

/// The owner hangs, which ends no stream: silence alone says so. When it goes on, it finds that it has lost.
fn owner_hangs(lab: &mut Lab, wire: &Wire) {
    let (_, epoch) = owner(lab, "gw-b");
    assert_eq!(owner_of(lab, "gw-b", "default").0, "gw-b", "nothing was taken back");
    let pods = [PODS[0], PODS[1], PLAIN];
    let (stopped, traffic) = under_traffic(lab, &pods, |lab| {
        let stopped = Instant::now();
        lab.signal("gw-b", Signal::SIGSTOP, None).unwrap();
        std::thread::sleep(Duration::from_secs(4));
        lab.signal("gw-b", Signal::SIGCONT, None).unwrap();
        std::thread::sleep(Duration::from_secs(3));
        stopped
    });
    gaps("owner hung", &traffic, stopped, NAMES, ADDRESSES);
    pod_network(lab, PLAIN, &traffic, stopped, "gw-a");
    for g in ["gw-a", "gw-b"] {
        assert_eq!(owner(lab, g), ("gw-a".into(), epoch + 1), "{g}");
    }
    wire.only(stopped, &["gw-a"]);
}

/// What was learnt only after the other one had started goes to it as it comes, and holds there at once.
fn owner_hands_its_facts_over(lab: &mut Lab) {
    let name = "fresh.one.example.net";
    for family in FAMILIES {
        let found = dig(&lab.pod(PODS[0]), name, family.record(), &[]);
        assert_eq!(found.answers.len(), 1, "{family:?}: {}", found.text());
    }
    // Batches of 20 ms, on a busy machine.
    let same = || (facts(lab, "gw-a") == facts(lab, "gw-b")).then_some(());
    assert!(wait_for(Duration::from_secs(5), same).is_some(), "{} {}", facts(lab, "gw-a"), facts(lab, "gw-b"));
    let asked = lab.internet_queries().unwrap().len();
    kill(lab, "gw-a");
    wait_owner(lab, "gw-b", "gw-b", Duration::from_secs(10));
    for family in FAMILIES {
        let seen = wait_for(Duration::from_secs(3), || common::relayed(lab, PODS[0], family, 16, name).source());
        assert_eq!(seen, Some(egress(family)));
    }
    assert_eq!(lab.internet_queries().unwrap().len(), asked);
    lab.start("gw-a").unwrap();
    lab.wait_ready("gw-a", READY).unwrap();
}
