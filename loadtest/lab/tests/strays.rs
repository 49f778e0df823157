//! Packets out of nothing: segments without a connection, answers without a question, what is left of a flow when its
//! gateway is dead. Nothing of it may leave, neither with a pod's address nor with a gateway's own.
//!
//! Every target is asked by nobody else, so whatever passes the router towards it counts, from whatever source.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::io::Write;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::Signal;
use support::{PASSES, address, named, nobody_else_checks, routed, run, sees, target};
use tidegate_lab::forge::{self, ACK, FIN, PSH, RST, SYN};
use tidegate_lab::lab::wait_for;
use tidegate_lab::observe::Watch;
use tidegate_lab::probe::{self, Echo, FAMILIES, Family, Knock};
use tidegate_lab::{Lab, Options, Scenario};

static ONE: Mutex<()> = Mutex::new(());

/// Isolated pods on a node, on another one and on a gateway's, all of shop.
const SHOP: [&str; 3] = ["shop/web", "shop/worker", "shop/local"];
const URG: u8 = 32;
/// Everything but what opens a connection, and that with flags that contradict it.
const FLAGS: [u8; 13] = [
    FIN,
    FIN | ACK,
    RST,
    RST | ACK,
    SYN | ACK,
    ACK,
    PSH | ACK,
    0,
    FIN | PSH | URG,
    SYN | FIN,
    SYN | RST,
    SYN | ACK | RST,
    PSH,
];
/// What conntrack takes up as a connection that it missed the beginning of.
const TAKEN_UP: [u8; 2] = [ACK, PSH | ACK];

fn up(name: &str) -> (MutexGuard<'static, ()>, Lab) {
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut scenario = Scenario::load(concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/demo.yaml").as_ref()).unwrap();
    // A gateway puts back what this test takes away.
    scenario.tidegate.as_mut().unwrap().gateway.insert("fullPassSeconds".into(), serde_json::json!(3600));
    let options = Options { lab: Some(env!("CARGO_BIN_EXE_tidegate-lab").into()), ..Options::unique(name) };
    let lab = Lab::up(scenario, &options).unwrap();
    nobody_else_checks(&lab);
    (one, lab)
}

/// Segments of all kinds, from a port that nobody uses.
fn segments(lab: &Lab, pod: &str, to: SocketAddr, flags: &[u8]) {
    let own = address(lab, pod, Family::of(to.ip()));
    for (i, flags) in flags.iter().enumerate() {
        let from = SocketAddr::new(own, 21_000 + u16::try_from(i).unwrap());
        let payload: &[u8] = if flags & PSH == 0 { b"" } else { b"GET / HTTP/1.0\r\n\r\n" };
        forge::send(&lab.pod(pod), None, &forge::tcp(from, to, *flags, 77_000, 99_000, payload)).unwrap();
    }
}

/// Answers to nothing and errors about nothing: type and code. Those that path MTU discovery needs come last.
fn messages(family: Family) -> &'static [(u8, u8)] {
    family.pick(
        &[(0, 0), (3, 0), (3, 1), (3, 3), (3, 13), (4, 0), (5, 1), (11, 0), (12, 0), (13, 0), (14, 0), (18, 0), (3, 4)],
        &[(129, 0), (1, 0), (1, 3), (1, 4), (3, 0), (4, 1), (137, 0), (134, 0), (136, 0), (140, 0), (2, 0)],
    )
}

/// Each about a packet that the target is said to have sent.
fn errors(lab: &Lab, pod: &str, to: SocketAddr) {
    let family = Family::of(to.ip());
    let own = address(lab, pod, family);
    for (kind, code) in messages(family) {
        let quoted = forge::tcp(to, SocketAddr::new(own, 21_100), ACK, 1, 1, b"");
        let rest = if (*kind, *code) == family.pick((3, 4), (2, 0)) { [0, 0, 5, 0] } else { [1, 2, 0, 1] };
        let packet = forge::icmp(own, to.ip(), *kind, *code, rest, &quoted);
        forge::send(&lab.pod(pod), None, &packet).unwrap();
    }
}

/// Where an isolated pod of a namespace may go, each of another carriage, and where it may not.
struct Targets {
    /// Forwarded for its prefix, forwarded for its name, relayed.
    allowed: Vec<SocketAddr>,
    denied: Vec<SocketAddr>,
}

fn shop(family: Family) -> Targets {
    Targets {
        allowed: vec![routed(family, 50, 7009), named(family, 12, 7000), named(family, 11, 443)],
        // The second is allowed at another port.
        denied: vec![named(family, 14, 443), routed(family, 51, 443)],
    }
}

#[track_caller]
fn learn(lab: &Lab, pod: &str) {
    for family in FAMILIES {
        for name in ["www.example.com", "tcp.example.com", "udp.example.com"] {
            assert_eq!(probe::dig(&lab.pod(pod), name, family.record(), &[]).answers.len(), 1, "{pod} {name}");
        }
    }
}

fn watch_all(lab: &Lab, targets: impl IntoIterator<Item = SocketAddr>) -> Vec<(SocketAddr, Watch)> {
    targets.into_iter().map(|to| (to, lab.watch(to.ip(), "").unwrap())).collect()
}

/// Nothing went to any of these. `what` says what was tried.
#[track_caller]
fn silent(watches: &[(SocketAddr, Watch)], what: &str) {
    std::thread::sleep(PASSES);
    for (to, watch) in watches {
        assert_eq!(watch.packets().unwrap(), 0, "{what}: something went to {to}");
    }
}

/// Tries everything out of nothing from a pod, and that none of it passes the router.
#[track_caller]
fn strays(lab: &Lab, pod: &str, targets: &[SocketAddr], what: &str) {
    let watches = watch_all(lab, targets.iter().copied());
    for to in targets {
        segments(lab, pod, *to, &FLAGS);
    }
    silent(&watches, &format!("{what}: segments of {pod}"));
    for to in targets {
        errors(lab, pod, *to);
    }
    silent(&watches, &format!("{what}: messages of {pod}"));
}

#[test]
fn packets_out_of_nothing() {
    let (_one, lab) = up("strays");
    for pod in SHOP {
        learn(&lab, pod);
    }
    for family in FAMILIES {
        let Targets { allowed, denied } = shop(family);
        let all = [&allowed[..], &denied].concat();
        for pod in SHOP {
            strays(&lab, pod, &all, "strays");
        }
        // By the pod's own way out, from the gateway's own address; and where nothing is allowed at all.
        strays(&lab, "annotated/app", &[target(family, "192.0.2.40", "2001:db8:200::40", 7000)], "PodNetwork");
        strays(&lab, "managed/app", &denied, "nothing is allowed");
        // Datagrams to what is denied.
        let watches = watch_all(&lab, denied.clone());
        for pod in SHOP.into_iter().chain(["managed/app"]) {
            for to in &denied {
                let from = SocketAddr::new(address(&lab, pod, family), 22_000);
                forge::send(&lab.pod(pod), None, &forge::udp(from, *to, b"out of nothing")).unwrap();
            }
        }
        silent(&watches, "datagrams");
        drop(watches);

        // The very same packets of pods that keep the network plugin's way pass the router.
        for pod in ["untouched/app", "guarded/app", "audited/app"] {
            for to in [allowed[0], denied[0]] {
                let watch = lab.watch(to.ip(), "").unwrap();
                segments(&lab, pod, to, &FLAGS);
                let all = FLAGS.len() as u64;
                assert!(sees(&watch, all), "{pod} to {to}: {} of {all}", watch.packets().unwrap());
                errors(&lab, pod, to);
                assert!(sees(&watch, all + 1), "{pod} to {to}: no message passed");
            }
        }
        // And what is allowed arrives.
        for pod in SHOP {
            for to in &allowed {
                let watch = lab.watch(to.ip(), "tcp flags & (syn|ack) == syn").unwrap();
                assert_eq!(probe::knock(&lab.pod(pod), *to).unwrap(), Knock::Open, "{pod} to {to}");
                // The relay connects when it has read a name.
                assert!(to.port() == 443 || watch.packets().unwrap() > 0);
            }
        }
        let to = target(family, "192.0.2.40", "2001:db8:200::40", 7000);
        assert!(Echo::connect(&lab.pod("annotated/app"), to).is_ok());
    }
    layers(&lab);
}

/// Takes rules of a gateway away, by a part of their text, and gives back what brings the table back.
fn without(lab: &Lab, gateway: &str, chain: &str, parts: &[&str]) -> String {
    let table = run(lab, gateway, "nft list table inet tidegate");
    let listing = run(lab, gateway, &format!("nft -a list chain inet tidegate {chain}"));
    let lines: Vec<&str> =
        listing.lines().filter(|l| l.contains("# handle") && parts.iter().any(|p| l.contains(p))).collect();
    assert!(lines.len() >= parts.len(), "{parts:?} in {listing}");
    for line in lines {
        let handle = line.rsplit(' ').next().unwrap();
        run(lab, gateway, &format!("nft delete rule inet tidegate {chain} handle {handle}"));
    }
    table
}

fn restore(lab: &Lab, gateway: &str, table: &str) {
    let file = lab.layout().folder.join("run/table.nft");
    std::fs::write(&file, format!("delete table inet tidegate\n{table}")).unwrap();
    run(lab, gateway, &format!("nft -f {}", file.display()));
}

/// Two layers keep invalid segments in: each holds alone, and without both this test sees what leaves.
fn layers(lab: &Lab) {
    const INVALID: (&str, &str) = ("forward", "ct state invalid");
    const LEAVE: (&str, &str) = ("leave", "fib saddr type != local");
    for family in FAMILIES {
        let to = target(family, "192.0.2.40", "2001:db8:200::40", 7000);
        let pod = "annotated/app";
        let carrier = &carrier(lab, to);
        for (chain, part) in [INVALID, LEAVE] {
            let table = without(lab, carrier, chain, &[part]);
            strays(lab, pod, &[to], &format!("without {part}"));
            restore(lab, carrier, &table);
        }
        let table = run(lab, carrier, "nft list table inet tidegate");
        without(lab, carrier, INVALID.0, &[INVALID.1]);
        without(lab, carrier, LEAVE.0, &[LEAVE.1]);
        let watch = lab.watch(to.ip(), "").unwrap();
        segments(lab, pod, to, &FLAGS);
        assert!(sees(&watch, 1), "without both something leaves, or this test could not fail");
        restore(lab, carrier, &table);
        strays(lab, pod, &[to], "with both again");
        // Towards an egress address's own way the uplink's program is a third: it knows the sources that may leave there.
        let pod = "shop/web";
        let at = owner(lab, "gw-a");
        let static_way = routed(family, 52, 7009);
        let table = run(lab, &at, "nft list table inet tidegate");
        without(lab, &at, INVALID.0, &[INVALID.1]);
        without(lab, &at, LEAVE.0, &[LEAVE.1]);
        strays(lab, pod, &[static_way], "by the uplink's program alone");
        restore(lab, &at, &table);
        // What is taken up as a connection in its middle is refused, or it would leave with the gateway's address.
        let table = without(lab, carrier, "forward", &["ct state new tcp flags"]);
        let watch = lab.watch(to.ip(), "").unwrap();
        segments(lab, "annotated/app", to, &TAKEN_UP);
        assert!(sees(&watch, 1), "without the refusal something leaves, or this test could not fail");
        restore(lab, carrier, &table);
    }
}

/// The gateway that carries annotated's flows: the server sees its node's address.
fn carrier(lab: &Lab, to: SocketAddr) -> String {
    let seen = probe::source(&Echo::connect(&lab.pod("annotated/app"), to).unwrap().seen).unwrap();
    let has = |node: &str| lab.scenario().node(node).is_ok_and(|n| lab.scenario().node_addresses(n).contains(&seen));
    let gateway = lab.scenario().gateways.iter().find(|g| has(&g.node));
    gateway.unwrap().name.clone()
}

fn owner(lab: &Lab, gateway: &str) -> String {
    let Ok((_, text)) = lab.admin(gateway, "/status") else { return String::new() };
    let status: serde_json::Value = serde_json::from_str(&text).unwrap();
    let pairs = status["core"]["pairs"].as_array().cloned().unwrap_or_default();
    let pair = pairs.iter().find(|p| p["pair"].as_str().is_some_and(|t| t.contains("203.0.113.10")));
    pair.and_then(|p| p["owner"].as_str()).unwrap_or_default().to_owned()
}

/// A flow of a pod, opened while its owner lived.
struct Flow {
    pod: &'static str,
    from: SocketAddr,
    to: SocketAddr,
    stream: TcpStream,
}

/// Packets of dead flows: what a pod's kernel and what root in the pod can still send on them.
#[track_caller]
fn go_on(lab: &Lab, flows: &mut [Flow], what: &str) {
    let watches = watch_all(lab, flows.iter().map(|f| f.to));
    for f in flows.iter_mut() {
        let place = lab.pod(f.pod);
        for flags in FLAGS {
            let payload: &[u8] = if flags & PSH == 0 { b"" } else { b"left over" };
            forge::send(&place, None, &forge::tcp(f.from, f.to, flags, 1, 1, payload)).unwrap();
        }
        errors(lab, f.pod, f.to);
        // By its own kernel, unless a reset has ended it.
        let _ = f.stream.write_all(b"left over");
        let _ = f.stream.shutdown(std::net::Shutdown::Both);
    }
    silent(&watches, what);
}

#[test]
fn flows_of_a_dead_gateway() {
    let (_one, mut lab) = up("dead-flows");
    for pod in SHOP {
        learn(&lab, pod);
    }
    // On a busy machine either may have been first.
    let old = owner(&lab, "gw-a");
    let new = if old == "gw-a" { "gw-b" } else { "gw-a" };
    // Each to an address of its own, forwarded and relayed; some for later.
    let mut rounds: Vec<Vec<Flow>> = Vec::new();
    for round in 0..2u8 {
        let mut flows = Vec::new();
        for family in FAMILIES {
            for (i, pod) in SHOP.into_iter().enumerate() {
                let n = 60 + round * 10 + i as u8;
                let to = routed(family, n, 7009);
                let stream = lab.pod(pod).within(|| TcpStream::connect_timeout(&to, Duration::from_secs(4)));
                let stream = stream.unwrap().unwrap();
                flows.push(Flow { pod, from: stream.local_addr().unwrap(), to, stream });
            }
            // Relayed, with the relay's own connection behind it.
            if round == 0 {
                let pod = "shop/web";
                let to = named(family, 11, 443);
                let seen = probe::curl(&lab.pod(pod), family, "https://www.example.com/", &[]);
                assert_eq!(seen.exit, 0, "{seen:?}");
                let stream = lab.pod(pod).within(|| TcpStream::connect_timeout(&to, Duration::from_secs(4)));
                let stream = stream.unwrap().unwrap();
                flows.push(Flow { pod, from: stream.local_addr().unwrap(), to, stream });
            }
        }
        rounds.push(flows);
    }
    let mut later = rounds.pop().unwrap();
    let mut first = rounds.pop().unwrap();

    lab.signal(&old, Signal::SIGKILL, Some(Duration::from_secs(5))).unwrap();
    let taken = wait_for(Duration::from_secs(15), || (owner(&lab, new) == new).then_some(()));
    assert!(taken.is_some(), "{new} takes over");
    arrives(&lab, "taken over");
    go_on(&lab, &mut first, "the owner is dead");

    lab.start(&old).unwrap();
    lab.wait_ready(&old, Duration::from_secs(30)).unwrap();
    go_on(&lab, &mut later, "the old owner is back");
    assert_eq!(owner(&lab, &old), new, "and owns nothing");
    arrives(&lab, "the old owner is back");

    // A flow of the new owner goes on.
    for family in FAMILIES {
        let mut echo = Echo::connect(&lab.pod("shop/web"), routed(family, 80, 7009)).unwrap();
        echo.say("still known\n").unwrap();
    }
}

/// New connections arrive, from the pool's address.
#[track_caller]
fn arrives(lab: &Lab, what: &str) {
    for family in FAMILIES {
        let egress: IpAddr = family.pick("203.0.113.10", "2001:db8::10").parse().unwrap();
        for pod in SHOP {
            let seen = wait_for(Duration::from_secs(10), || {
                Echo::connect(&lab.pod(pod), routed(family, 90, 7009)).ok().and_then(|e| probe::source(&e.seen))
            });
            assert_eq!(seen, Some(egress), "{what}: {pod} {family:?}");
        }
    }
}
