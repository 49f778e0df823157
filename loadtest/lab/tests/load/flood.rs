//! Floods: a namespace's own quotas stop it, and others hardly feel it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};
use tidegate_lab::lab::wait_for;
use tidegate_lab::liar::query;
use tidegate_lab::probe::{Echo, Knock, datagram, dig, knock};
use tidegate_lab::scenario::{NameSpec, Namespace};
use tidegate_lab::{Lab, Mark, Place};

use crate::burst::{Took, burst};
use crate::support::{GATEWAYS, name, policy, scenario, up};
use crate::{A, dns, percentile, pod};

const FACTS: usize = 150;
const NAMES: usize = 100;
const ADDRESSES: usize = 60;
const IN_FLIGHT: usize = 64;
const CONNECTIONS: usize = 200;
/// Windows of each kind whose median is looked at.
const ROUNDS: usize = 5;
/// Who floods, and whose flood Tidegate has nothing to do with, each on node-1 and on node-2.
const TENANT: [&str; 2] = ["shop/web", "shop/worker"];
const UNTOUCHED: [&str; 2] = ["untouched/app", "untouched/backend"];
/// Attempts beyond the quota.
const MORE: usize = 60;

/// A lab in which two tenants share a gateway and a node, and three others have a pod each.
fn lab() -> (std::sync::MutexGuard<'static, ()>, Lab) {
    let mut scenario = scenario();
    let pair = scenario.pools.iter_mut().find(|p| p.name == "partner-b").unwrap();
    pair.addresses[0].owner = Some("gw-a".into());
    for (n, of) in ["names", "facts", "turns"].into_iter().enumerate() {
        let (labels, annotations) = (BTreeMap::default(), BTreeMap::default());
        scenario.namespaces.push(Namespace { name: of.into(), labels, annotations });
        scenario.pods.push(pod(of, of, n as u8));
    }
    scenario.internet.names.push(NameSpec { silent: true, ..name("*.slow.example.net".into(), vec![], vec![]) });
    for n in 0..6 {
        scenario.internet.names.push(name(format!("wide{n}.example.net"), addresses(10), vec![]));
    }
    scenario.internet.names.push(NameSpec { ttl: 1, ..name("turns.example.net".into(), addresses(10), vec![]) });
    let gateway = &mut scenario.tidegate.as_mut().unwrap().gateway;
    let quotas = json!({
        "facts": FACTS,
        "names": NAMES,
        "addressesPerName": ADDRESSES,
        "queriesInFlight": IN_FLIGHT,
        "connections": CONNECTIONS,
    });
    gateway.insert("quotas".into(), quotas);
    // Facts outlast the flood: what is gone was evicted.
    gateway.insert("dns".into(), json!({"ttlMinSeconds": 600, "barrierMillis": 2000}));
    let (one, lab) = up("flood", scenario);
    let slow = policy("shop", Some("partner-a"), &[json!({"matchPattern": "*.slow.example.net"})], 443);
    let names = policy("names", None, &[json!({"matchPattern": "**.many.example.net"})], 7000);
    let wide = ["facts", "turns"].map(|of| policy(of, None, &[json!({"matchPattern": "*.example.net"})], 7000));
    lab.edit_manifest("load.yaml", &[slow, names, wide.join("---\n")].join("---\n")).unwrap();
    let known = wait_for(Duration::from_secs(15), || {
        (!dig(&lab.pod("names/names"), "n.many.example.net", "A", &[]).answers.is_empty()).then_some(())
    });
    assert!(known.is_some(), "the policy is in force");
    (one, lab)
}

fn addresses(from: u8) -> Vec<Ipv4Addr> {
    (0..ADDRESSES as u8).map(|n| Ipv4Addr::new(192, 0, 2, from + n)).collect()
}

/// Whether a namespace was refused something because of its quota.
fn refused(lab: &Lab, namespace: &str, kind: &str, mark: &Mark) -> bool {
    let fits = |r: &Value| r["reason"] == "quota" && r["namespace"] == namespace && r["kind"] == kind;
    lab.wait_audit(&GATEWAYS, mark, fits).is_some()
}

/// Names, facts and addresses of a name stop at the quota, with the reason.
fn learning_stops(lab: &Lab, server: SocketAddr) {
    let facts = |g| {
        let status: Value = serde_json::from_str(&lab.admin(g, "/status").unwrap().1).unwrap();
        status["core"]["facts"].as_u64().unwrap() as usize
    };
    let mark = lab.mark();
    let wide: Vec<bool> = (0..6)
        .map(|n| dig(&lab.pod("facts/facts"), &format!("wide{n}.example.net"), "A", &[]).status == "NOERROR")
        .collect();
    assert_eq!(wide[..2], [true, true], "below the quota names resolve: {wide:?}");
    assert_eq!(wide[3..], [false, false, false], "above it none does: {wide:?}");
    assert!(refused(lab, "facts", "dns", &mark), "facts stop with quota");

    // A name whose addresses change gets no more of them than the quota while the first ones are kept.
    let turns = lab.pod("turns/turns");
    assert_eq!(dig(&turns, "turns.example.net", "A", &["+tcp"]).answers.len(), ADDRESSES);
    lab.set_name(NameSpec { ttl: 1, ..name("turns.example.net".into(), addresses(100), vec![]) }).unwrap();
    let stopped = wait_for(Duration::from_secs(10), || {
        (dig(&turns, "turns.example.net", "A", &["+tcp"]).status == "SERVFAIL").then_some(())
    });
    assert!(stopped.is_some() && refused(lab, "turns", "dns", &mark), "addresses of a name stop with quota");

    let asked: Vec<_> = (0..NAMES + 40).map(|n| (format!("q{n}.many.example.net"), A)).collect();
    // Fewer at once than may be in flight.
    let few = asked.chunks(IN_FLIGHT / 2).map(|few| burst(&lab.pod("names/names"), server, few).0);
    let took: Vec<Took> = few.collect::<Vec<_>>().concat();
    let unresolved = took.iter().filter(|t| t.as_ref().is_err_and(|e| e.contains("code 2"))).count();
    assert!((40..=45).contains(&unresolved), "{unresolved} names were refused: {:?}", took.iter().find(|t| t.is_err()));
    assert!(refused(lab, "names", "dns", &mark), "names stop with quota");
    // The others are the quiet tenant's.
    let learnt = GATEWAYS.into_iter().map(facts).max().unwrap();
    assert!(learnt <= FACTS + NAMES + ADDRESSES + 2, "{learnt} facts");
}

/// Of more queries than may be in flight, exactly those beyond are refused at once.
fn asking_stops(lab: &Lab, server: SocketAddr) {
    let refused = || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect(server).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(700))).unwrap();
        for n in 0..IN_FLIGHT + MORE {
            // Their authority is silent, and waited for.
            socket.send(&query(n as u16, &format!("w{n}.slow.example.net"), A)).unwrap();
        }
        let mut reply = [0; 512];
        std::iter::from_fn(|| socket.recv(&mut reply).ok().map(|_| reply[3] & 15)).collect::<Vec<u8>>()
    };
    let codes = lab.pod("shop/web").within(refused).unwrap();
    assert_eq!(codes, [2; MORE], "queries beyond the quota");
}

/// Connects at once, so often; each attempt sends one packet. Gives what is connected.
fn hold(from: &Place<'_>, to: SocketAddr, times: usize) -> Vec<TcpStream> {
    from.within(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            // A SYN is sent again after 1 s.
            let once = || tokio::time::timeout(Duration::from_millis(900), tokio::net::TcpStream::connect(to));
            let mut tries = tokio::task::JoinSet::new();
            (0..times).for_each(|_| drop(tries.spawn(once())));
            let done = tries.join_all().await;
            done.into_iter().filter_map(|d| d.ok()?.ok()?.into_std().ok()).collect()
        })
    })
    .unwrap()
}

/// Relayed connections and forwarded flows of a namespace stop at the quota, whichever of its pods asks, and each
/// packet that was refused is in a record. Gives what lives.
fn connecting_stops(lab: &Lab) -> Vec<TcpStream> {
    let (web, worker) = (lab.pod("shop/web"), lab.pod("shop/worker"));
    for (pod, name) in
        [(&web, "api.example.com"), (&web, "tcp.example.com"), (&web, "udp.example.com"), (&worker, "tcp.example.com")]
    {
        for kind in ["A", "AAAA"] {
            assert!(!dig(pod, name, kind, &[]).answers.is_empty());
        }
    }
    let mark = lab.mark();
    let relayed = hold(&web, SocketAddr::from(([198, 51, 100, 10], 443)), CONNECTIONS + MORE);
    assert!(refused(lab, "shop", "open", &mark), "relayed connections stop with quota");

    let told = |mark: &Mark, pod: &str, to: SocketAddr, protocol: &str| -> u64 {
        let fits = |r: &&Value| {
            r["kind"] == "packet"
                && r["hook"] == "forward"
                && r["reason"] == "quota"
                && r["verdict"] == "deny"
                && r["namespace"] == "shop"
                && r["pod"] == pod
                && r["protocol"] == protocol
                && r["destination"]["asked"] == json!({"ip": to.ip().to_string(), "port": to.port()})
        };
        GATEWAYS
            .iter()
            .flat_map(|g| lab.audit(g, mark).unwrap())
            .filter(|r| fits(&r))
            .map(|r| r["count"].as_u64().unwrap())
            .sum()
    };
    let of = |g| lab.metric(g, "tidegate_decisions_total", &["kind=\"packet\"", "reason=\"quota\""]).unwrap();
    let quota = || GATEWAYS.into_iter().map(of).sum::<f64>();
    let (mark, before) = (lab.mark(), quota());
    let v4 = SocketAddr::from(([198, 51, 100, 12], 7000));
    let v6 = SocketAddr::new(IpAddr::from(Ipv6Addr::new(0x2001, 0xdb8, 0x100, 0, 0, 0, 0, 0x12)), 7000);
    let forwarded = hold(&web, v4, CONNECTIONS + MORE);
    // A connection may take its place and be given up, where the machine is slow.
    let lived = forwarded.len();
    assert!((CONNECTIONS - 20..=CONNECTIONS).contains(&lived), "{lived} forwarded flows: they stop at the quota");
    // The quota is the namespace's: another pod, another family and another protocol find it used up.
    assert_eq!(hold(&worker, v4, 7).len(), 0, "of another pod");
    assert_eq!(hold(&worker, v6, 5).len(), 0, "of the other family");
    let udp = SocketAddr::from(([198, 51, 100, 13], 7001));
    assert_eq!(datagram(&web, udp, b"x\n", false).unwrap(), None, "of the other protocol");
    let all =
        [("web", v4, "TCP", MORE as u64), ("worker", v4, "TCP", 7), ("worker", v6, "TCP", 5), ("web", udp, "UDP", 1)];
    let exact = wait_for(Duration::from_secs(5), || {
        all.iter().all(|(pod, to, protocol, n)| told(&mark, pod, *to, protocol) == *n).then_some(())
    });
    let found: Vec<u64> = all.iter().map(|(pod, to, protocol, _)| told(&mark, pod, *to, protocol)).collect();
    assert!(exact.is_some(), "each refused packet is recorded once: {all:?}, found {found:?}");
    assert_eq!(quota() - before, all.iter().map(|a| a.3 as f64).sum::<f64>(), "and counted");
    relayed.into_iter().chain(forwarded).collect()
}

/// One window of a tenant's day: 100 cached names and 100 connections; the p99 of each.
fn window(from: &Place<'_>, server: SocketAddr, to: SocketAddr) -> [Duration; 2] {
    from.within(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect(server).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let mut times = [Vec::new(), Vec::new()];
        for id in 0..100u16 {
            let started = Instant::now();
            socket.send(&query(id, "tcp.example.com", A)).unwrap();
            let mut reply = [0; 512];
            // A late reply to an earlier query is not this one's.
            while socket.recv(&mut reply).is_ok_and(|_| reply[..2] != id.to_be_bytes()) {}
            times[0].push(started.elapsed());
            let started = Instant::now();
            let stream = TcpStream::connect_timeout(&to, Duration::from_secs(3));
            times[1].push(started.elapsed());
            stream.expect("a tenant that keeps quiet connects");
            std::thread::sleep(Duration::from_millis(5));
        }
        times.map(|mut t| {
            t.sort_unstable();
            percentile(&t, 0.99)
        })
    })
    .unwrap()
}

/// Names that nobody resolves, names below a wildcard that nobody asked before, names whose authority is silent,
/// addresses that nobody allows, and connections beyond the quota: about a thousand of each in a second, from the calling
/// thread's namespace.
fn flood(server: SocketAddr, to: &[SocketAddr], end: &AtomicBool) {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.connect(server).unwrap();
    socket.set_nonblocking(true).unwrap();
    let denied = UdpSocket::bind("0.0.0.0:0").unwrap();
    for n in 0u64.. {
        if end.load(Ordering::Relaxed) {
            return;
        }
        for name in [format!("n{n}.example.org"), format!("n{n}.many.example.net"), format!("n{n}.slow.example.net")] {
            // What the socket does not take now is dropped, as a flood does.
            let _ = socket.send(&query(n as u16, &name, A));
        }
        let _ = denied.send_to(b"x", SocketAddr::from(([198, 51, 100, (n % 200) as u8], 4000 + (n % 1000) as u16)));
        let connect = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        connect.set_nonblocking(true).unwrap();
        let _ = connect.connect(&to[n as usize % to.len()].into());
        let mut reply = [0; 1500];
        while socket.recv(&mut reply).is_ok() {}
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What is measured while these two pods of a namespace flood.
fn under_flood<T>(lab: &Lab, pods: [&str; 2], server: SocketAddr, to: &[SocketAddr], measure: impl FnOnce() -> T) -> T {
    let end = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for place in pods {
            let end = &end;
            scope.spawn(move || lab.pod(place).within(|| flood(server, to, end)).unwrap());
        }
        std::thread::sleep(Duration::from_millis(500));
        let measured = std::panic::catch_unwind(std::panic::AssertUnwindSafe(measure));
        end.store(true, Ordering::Relaxed);
        measured.unwrap()
    })
}

/// One namespace floods: its own quotas stop it, and another namespace of the same node and gateway hardly feels it.
#[test]
fn a_flood_of_one_namespace_is_its_own() {
    let (_one, lab) = lab();
    let server = dns(&lab);
    let victim = lab.pod("billing/pay");
    let tcp = SocketAddr::from(([198, 51, 100, 12], 7000));
    assert!(!dig(&victim, "tcp.example.com", "A", &[]).answers.is_empty());
    let bank = SocketAddr::from(([198, 51, 100, 15], 443));
    assert!(!dig(&victim, "bank.example.com", "A", &[]).answers.is_empty());
    let mut live = Echo::connect(&victim, tcp).unwrap();

    learning_stops(&lab, server);
    let held = connecting_stops(&lab);
    asking_stops(&lab, server);

    // Three kinds of windows take turns, so that what else the machine does meets all: nobody floods, the tenant does, and
    // as a control a namespace on the same nodes that Tidegate does not touch does the same.
    let mark = lab.mark();
    let to = [tcp, SocketAddr::from(([198, 51, 100, 10], 443))];
    let mut rounds = Vec::new();
    for round in 0..ROUNDS {
        let quiet = window(&victim, server, tcp);
        let control = under_flood(&lab, UNTOUCHED, server, &to, || window(&victim, server, tcp));
        let loud = under_flood(&lab, TENANT, server, &to, || window(&victim, server, tcp));
        println!("round {round}: p99 of DNS and of connecting, quiet {quiet:?}, control {control:?}, loud {loud:?}");
        rounds.push([quiet, control, loud]);
    }
    for (of, what) in ["names", "connections"].into_iter().enumerate() {
        let [quiet, control, loud] = [0, 1, 2].map(|kind: usize| {
            let mut all: Vec<Duration> = rounds.iter().map(|r| r[kind][of]).collect();
            all.sort_unstable();
            all[ROUNDS / 2]
        });
        // By so much the machine slows down whoever is on it beside such a flood.
        let limit = 2 * quiet + control.saturating_sub(quiet);
        println!(
            "{what}: median p99 quiet {quiet:?}, control {control:?}, under the flood {loud:?}, at most {limit:?}"
        );
        assert!(loud <= limit, "the quiet tenant feels the flood: {what}, {rounds:?}");
    }
    assert!(refused(&lab, "shop", "dns", &mark), "queries in flight stop with quota");
    // Nothing of the quiet tenant is gone: what it resolved before the flood still opens, and what lived lives.
    assert_eq!(knock(&victim, bank).unwrap(), Knock::Open);
    live.say("still here\n").unwrap();
    // What ends makes room.
    drop(held);
    let room = wait_for(Duration::from_secs(20), || (hold(&lab.pod("shop/web"), tcp, 1).len() == 1).then_some(()));
    assert!(room.is_some(), "the quota is for flows that live");
}
