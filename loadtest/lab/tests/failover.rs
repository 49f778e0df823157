//! Gateways die, come back, and lose their disks: names, egress addresses and facts must not go with them.
//!
//! One lab, one test: each step begins where the last one ended.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tidegate_lab::family::{FAMILIES, Family};
use tidegate_lab::netns::within;
use tidegate_lab::probe::{curl, dig};
use tidegate_lab::{Lab, Options, Scenario};

const PODS: [&str; 2] = ["shop/web", "shop/worker"];
/// tcp.example.com, which policy lets through without inspection.
const TCP4: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(198, 51, 100, 12)), 7000);
const TCP6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x100, 0, 0, 0, 0, 0x12)), 7000);
/// api.example.com, which is relayed.
const TLS4: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(198, 51, 100, 10)), 443);
const TLS6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x100, 0, 0, 0, 0, 0x10)), 443);
const DNS4: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 244, 1, 53)), 53);
const DNS6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 0, 0x53)), 53);

fn egress(family: Family) -> IpAddr {
    family.pick(Ipv4Addr::new(203, 0, 113, 10).into(), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x10).into())
}

/// When something worked, by what was tried.
#[derive(Default)]
struct Log(Mutex<Vec<(Instant, Result<IpAddr, String>)>>);

impl Log {
    fn note(&self, result: Result<IpAddr, String>) {
        self.0.lock().unwrap().push((Instant::now(), result));
    }

    /// The longest time without a success after `since`.
    fn longest(&self, since: Instant) -> Duration {
        let log = self.0.lock().unwrap();
        let good: Vec<Instant> = std::iter::once(since)
            .chain(log.iter().filter(|(at, r)| *at > since && r.is_ok()).map(|(at, _)| *at))
            .collect();
        good.windows(2).map(|w| w[1].duration_since(w[0])).max().unwrap_or(Duration::MAX)
    }

    fn sources(&self) -> Vec<IpAddr> {
        let mut all: Vec<IpAddr> = self.0.lock().unwrap().iter().filter_map(|(_, r)| r.clone().ok()).collect();
        all.sort_unstable();
        all.dedup();
        all
    }
}

/// A query for api.example.com.
fn query(id: u16, family: Family) -> Vec<u8> {
    let mut q = id.to_be_bytes().to_vec();
    q.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in ["api", "example", "com"] {
        q.push(label.len() as u8);
        q.extend_from_slice(label.as_bytes());
    }
    q.extend_from_slice(&[0, 0, family.pick(1, 28), 0, 1]);
    q
}

/// Asks every 50 ms, each time from a socket of its own and with no second try.
fn ask(family: Family, log: &Log, end: &AtomicBool) {
    let mut open: Vec<(Instant, UdpSocket)> = Vec::new();
    let any: SocketAddr = family.pick((Ipv4Addr::UNSPECIFIED, 0).into(), (Ipv6Addr::UNSPECIFIED, 0).into());
    let mut id = 0u16;
    while !end.load(Ordering::Relaxed) {
        let socket = UdpSocket::bind(any).unwrap();
        socket.connect(family.pick(DNS4, DNS6)).unwrap();
        socket.set_nonblocking(true).unwrap();
        id += 1;
        let _ = socket.send(&query(id, family));
        open.push((Instant::now(), socket));
        let next = Instant::now() + Duration::from_millis(50);
        while Instant::now() < next {
            open.retain(|(at, s)| {
                let mut reply = [0; 512];
                match s.recv(&mut reply) {
                    // No error and at least one answer.
                    Ok(n) if n > 12 && reply[3] & 15 == 0 && reply[7] > 0 => {
                        log.note(Ok(family.pick(DNS4, DNS6).ip()));
                        false
                    }
                    Ok(_) => {
                        log.note(Err("an error".into()));
                        false
                    }
                    Err(_) => at.elapsed() < Duration::from_secs(3),
                }
            });
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// One connection: whom the server saw.
fn connect(to: SocketAddr, limit: Duration) -> Result<IpAddr, String> {
    let stream = TcpStream::connect_timeout(&to, limit).map_err(|e| e.to_string())?;
    stream.set_read_timeout(Some(limit)).unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).map_err(|e| e.to_string())?;
    let seen: serde_json::Value = serde_json::from_str(&line).map_err(|e| e.to_string())?;
    seen["source"].as_str().and_then(|s| s.parse().ok()).ok_or_else(|| "no source".into())
}

/// Opens a connection every 100 ms, without any query.
fn open(family: Family, log: &Arc<Log>, end: &AtomicBool) {
    let mut running = Vec::new();
    while !end.load(Ordering::Relaxed) {
        let log = Arc::clone(log);
        running.push(std::thread::spawn(move || {
            log.note(connect(family.pick(TCP4, TCP6), Duration::from_millis(900)));
        }));
        std::thread::sleep(Duration::from_millis(100));
    }
    running.into_iter().for_each(|t| t.join().unwrap());
}

/// Steady traffic of both pods and families while `work` goes on.
fn under_traffic<T>(lab: &mut Lab, work: impl FnOnce(&mut Lab) -> T) -> (T, Vec<(String, Arc<Log>, Arc<Log>)>) {
    let end = Arc::new(AtomicBool::new(false));
    let mut threads = Vec::new();
    let mut logs = Vec::new();
    for pod in PODS {
        for family in FAMILIES {
            let (names, flows) = (Arc::<Log>::default(), Arc::<Log>::default());
            logs.push((format!("{pod} {family:?}"), Arc::clone(&names), Arc::clone(&flows)));
            let netns = lab.pod(pod).netns().to_owned();
            let (e, n) = (Arc::clone(&end), names);
            let ns = netns.clone();
            threads.push(std::thread::spawn(move || within(&ns, || ask(family, &n, &e)).unwrap()));
            let e = Arc::clone(&end);
            threads.push(std::thread::spawn(move || within(&netns, || open(family, &flows, &e)).unwrap()));
        }
    }
    std::thread::sleep(Duration::from_secs(1));
    let out = work(lab);
    end.store(true, Ordering::Relaxed);
    threads.into_iter().for_each(|t| t.join().unwrap());
    (out, logs)
}

fn kill(lab: &Lab, name: &str) -> Instant {
    let at = Instant::now();
    lab.signal(name, Signal::SIGKILL, Some(Duration::from_secs(5))).unwrap();
    at
}

fn status(lab: &Lab, gateway: &str) -> serde_json::Value {
    serde_json::from_str(&lab.admin(gateway, "/status").unwrap().1).unwrap()
}

/// Who owns shop's pair, by a gateway's word.
fn owner(lab: &Lab, gateway: &str) -> (String, u64) {
    let status = status(lab, gateway);
    let pairs = status["core"]["pairs"].as_array().cloned().unwrap_or_default();
    let pair = pairs
        .iter()
        .find(|p| p["pair"].as_str().is_some_and(|t| t.contains("203.0.113.10")))
        .cloned()
        .unwrap_or_default();
    (pair["owner"].as_str().unwrap_or_default().into(), pair["epoch"].as_u64().unwrap_or_default())
}

/// Connections to what was resolved long ago, with no new query.
fn facts_hold(lab: &Lab, limit: Duration) -> Duration {
    let start = Instant::now();
    for pod in PODS {
        for family in FAMILIES {
            loop {
                let seen =
                    lab.pod(pod).within(|| connect(family.pick(TCP4, TCP6), Duration::from_millis(500))).unwrap();
                if seen == Ok(egress(family)) {
                    break;
                }
                assert!(start.elapsed() < limit, "{pod} {family:?}: {seen:?}");
            }
        }
    }
    start.elapsed()
}

#[test]
fn failover() {
    let scenario = Scenario::load(concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/demo.yaml").as_ref()).unwrap();
    let options = Options { lab: Some(env!("CARGO_BIN_EXE_tidegate-lab").into()), ..Options::unique("failover") };
    let mut lab = Lab::up(scenario, &options).unwrap();
    for pod in PODS {
        for family in FAMILIES {
            for name in ["tcp.example.com", "api.example.com"] {
                assert_eq!(dig(&lab.pod(pod), name, family.record(), &[]).answers.len(), 1);
            }
        }
    }
    assert_eq!(owner(&lab, "gw-a"), ("gw-a".into(), 1));

    // The owner dies under traffic. Flows that it carried end quickly.
    let mut dead = Vec::new();
    for to in [TCP4, TCP6, TLS4, TLS6] {
        dead.push((
            to,
            lab.pod(PODS[0]).within(|| TcpStream::connect_timeout(&to, Duration::from_secs(2)).unwrap()).unwrap(),
        ));
    }
    let ((killed, ended), logs) = under_traffic(&mut lab, |lab| {
        let killed = kill(lab, "gw-a");
        std::thread::sleep(Duration::from_secs(4));
        let mut ended = Vec::new();
        for (to, stream) in &mut dead {
            stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
            let since = Instant::now();
            // A forwarded one has its server's first line unread.
            let cut = stream.write_all(b"x").and_then(|()| {
                let mut rest = Vec::new();
                stream.read_to_end(&mut rest)
            });
            ended.push((*to, since.elapsed(), cut.map_err(|e| e.kind())));
        }
        std::thread::sleep(Duration::from_secs(1));
        (killed, ended)
    });
    let mut slowest = (Duration::ZERO, Duration::ZERO);
    for (who, names, flows) in &logs {
        let (dns, ip) = (names.longest(killed), flows.longest(killed));
        println!("{who}: longest DNS gap {dns:?}, egress address gap {ip:?}, sources {:?}", flows.sources());
        slowest = (slowest.0.max(dns), slowest.1.max(ip));
        let family = if who.ends_with("V4") { Family::V4 } else { Family::V6 };
        assert_eq!(flows.sources(), [egress(family)], "no other source address");
    }
    for (to, after, how) in &ended {
        println!("flow to {to} of the dead gateway: {how:?} after {after:?}");
    }
    println!("owner killed: DNS gap {:?}, egress address gap {:?}", slowest.0, slowest.1);
    assert!(slowest.0 < Duration::from_secs(1) && slowest.1 < Duration::from_secs(3), "{slowest:?}");
    for (to, _, how) in ended {
        assert_eq!(how, Err(std::io::ErrorKind::ConnectionReset), "{to}");
    }
    assert_eq!(owner(&lab, "gw-b"), ("gw-b".into(), 2));
    for family in FAMILIES {
        let seen = curl(&lab.pod(PODS[1]), family, "https://api.example.com/", &[]);
        assert_eq!(seen.source(), Some(egress(family)), "{}", seen.text());
    }

    // It comes back: it takes nothing, and knows what the other one knows.
    let ((), logs) = under_traffic(&mut lab, |lab| {
        lab.start("gw-a").unwrap();
        lab.wait_ready("gw-a", Duration::from_secs(10)).unwrap();
        std::thread::sleep(Duration::from_secs(3));
    });
    let start = Instant::now() - Duration::from_secs(4);
    for (who, names, flows) in &logs {
        let (dns, ip) = (names.longest(start), flows.longest(start));
        println!("{who}: while the owner returned, longest gaps: DNS {dns:?}, connections {ip:?}");
        assert!(dns < Duration::from_millis(700) && ip < Duration::from_secs(1));
    }
    assert_eq!(owner(&lab, "gw-a"), ("gw-b".into(), 2));
    assert_eq!(owner(&lab, "gw-b"), ("gw-b".into(), 2));
    let known = |g: &str| status(&lab, g)["core"]["facts"].as_u64().unwrap();
    println!("facts: gw-a {}, gw-b {}", known("gw-a"), known("gw-b"));
    assert!(known("gw-a") >= 4, "they came from the other gateway");

    // The owner hangs, which ends no stream: silence alone says so. When it goes on, it finds that it has lost.
    let (stopped, logs) = under_traffic(&mut lab, |lab| {
        let stopped = Instant::now();
        lab.signal("gw-b", Signal::SIGSTOP, None).unwrap();
        std::thread::sleep(Duration::from_secs(4));
        lab.signal("gw-b", Signal::SIGCONT, None).unwrap();
        std::thread::sleep(Duration::from_secs(3));
        stopped
    });
    let mut slowest = (Duration::ZERO, Duration::ZERO);
    for (who, names, flows) in &logs {
        let (dns, ip) = (names.longest(stopped), flows.longest(stopped));
        println!("{who}: owner hangs, longest DNS gap {dns:?}, egress address gap {ip:?}");
        slowest = (slowest.0.max(dns), slowest.1.max(ip));
        assert_eq!(flows.sources().len(), 1, "no other source address");
    }
    println!("owner hung: DNS gap {:?}, egress address gap {:?}", slowest.0, slowest.1);
    assert!(slowest.0 < Duration::from_secs(1) && slowest.1 < Duration::from_secs(3), "{slowest:?}");
    for g in ["gw-a", "gw-b"] {
        assert_eq!(owner(&lab, g), ("gw-a".into(), 3), "{g}");
    }

    // Both die; what they knew is in their journals.
    std::thread::sleep(Duration::from_millis(1500));
    for g in ["gw-a", "gw-b"] {
        kill(&lab, g);
    }
    for g in ["gw-a", "gw-b"] {
        lab.start(g).unwrap();
    }
    for g in ["gw-a", "gw-b"] {
        lab.wait_ready(g, Duration::from_secs(15)).unwrap();
    }
    println!("both back: facts hold {:?} after they are ready", facts_hold(&lab, Duration::from_secs(4)));
    let (who, epoch) = owner(&lab, "gw-a");
    assert!(epoch > 2, "an epoch is used once: {who} {epoch}");

    // And with one journal damaged.
    std::thread::sleep(Duration::from_millis(1500));
    for g in ["gw-a", "gw-b"] {
        kill(&lab, g);
    }
    for file in ["facts.snapshot", "facts.log"] {
        let path = lab.layout().journal("gw-a").join(file);
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = 20 + (bytes.len() - 20) / 2;
        bytes[middle] ^= 0xff;
        std::fs::write(&path, bytes).unwrap();
    }
    for g in ["gw-a", "gw-b"] {
        lab.start(g).unwrap();
    }
    for g in ["gw-a", "gw-b"] {
        lab.wait_ready(g, Duration::from_secs(15)).unwrap();
    }
    let log = std::fs::read_to_string(lab.layout().log("gw-a")).unwrap();
    assert!(log.contains("a journal file is refused"), "it is said");
    assert!(lab.layout().journal("gw-a").join("facts.snapshot.refused").exists(), "it is set aside");
    println!("a damaged journal: facts hold {:?} after both are ready", facts_hold(&lab, Duration::from_secs(4)));
    lab.down().unwrap();
}
