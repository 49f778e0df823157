//! What must hold when much comes at once: bursts of fresh names, floods of one tenant, addresses that are dead.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};

use std::sync::{Barrier, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;
use tidegate_lab::family::FAMILIES;
use tidegate_lab::lab::wait_for;
use tidegate_lab::liar::query;
use tidegate_lab::observe::sum_metric;
use tidegate_lab::probe::{Echo, Knock, dig, knock};
use tidegate_lab::scenario::{Listen, NameSpec, Namespace, Pod};
use tidegate_lab::{Lab, Mark, Options, Place, Scenario};

static ONE: Mutex<()> = Mutex::new(());
const GATEWAYS: [&str; 2] = ["gw-a", "gw-b"];
const A: u16 = 1;
const AAAA: u16 = 28;

fn scenario() -> Scenario {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/demo.yaml");
    Scenario::load(file.as_ref()).unwrap()
}

fn up(name: &str, scenario: Scenario) -> (MutexGuard<'static, ()>, Lab) {
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let options = Options { lab: Some(env!("CARGO_BIN_EXE_tidegate-lab").into()), ..Options::unique(name) };
    (one, Lab::up(scenario, &options).unwrap())
}

/// A web pod with number `n` on node-1.
fn pod(name: &str, namespace: &str, n: u8) -> Pod {
    Pod {
        name: name.into(),
        namespace: namespace.into(),
        node: "node-1".into(),
        labels: BTreeMap::from([("app".into(), "web".into())]),
        // Behind those of the demo's pods, and of its DNS.
        ipv4: Some(Ipv4Addr::new(10, 244, 1, 54 + n)),
        ipv6: Some(Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 1, n.into())),
        listen: Listen::default(),
    }
}

fn name(name: String, ipv4: Vec<Ipv4Addr>, ipv6: Vec<Ipv6Addr>) -> NameSpec {
    NameSpec { name, ttl: 300, ipv4, ipv6, ..NameSpec::default() }
}

/// A policy of a namespace's web pods with one rule.
fn policy(namespace: &str, pool: Option<&str>, fqdns: &[serde_json::Value], port: u16) -> String {
    let pool = pool.map(|p| format!("  poolRef: {{name: {p}}}\n")).unwrap_or_default();
    let sni = if port == 443 { "" } else { "    sni: Unchecked\n" };
    format!(
        "apiVersion: tidegate.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {{name: load-{port}, namespace: {namespace}}}\nspec:\n  \
         podSelector: {{matchLabels: {{app: web}}}}\n{pool}  egress:\n  - name: load\n    toFQDNs: {}\n    \
         toPorts: [{{protocol: TCP, port: {port}}}]\n{sni}",
        serde_json::to_string(fqdns).unwrap()
    )
}

fn dns(lab: &Lab) -> SocketAddr {
    SocketAddr::new(lab.scenario().pod("kube-system/coredns").unwrap().ipv4.unwrap().into(), 53)
}

/// The response code and the first address of a reply without aliases.
fn parse(reply: &[u8], qtype: u16) -> Option<(u8, Option<IpAddr>)> {
    let code = reply.get(3)? & 15;
    if reply[6..8] == [0, 0] {
        return Some((code, None));
    }
    let question = 12 + reply.get(12..)?.iter().position(|b| *b == 0)? + 5;
    let data = reply.get(question + 12..)?;
    let ip = match qtype {
        A => IpAddr::from(<[u8; 4]>::try_from(data.get(..4)?).ok()?),
        _ => IpAddr::from(<[u8; 16]>::try_from(data.get(..16)?).ok()?),
    };
    Some((code, Some(ip)))
}

/// A counter of TCP in the calling thread's network namespace.
fn netstat(counter: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/netstat").unwrap();
    let mut lines = text.lines();
    while let (Some(keys), Some(values)) = (lines.next(), lines.next()) {
        if let Some(at) = keys.split(' ').position(|k| k == counter) {
            return values.split(' ').nth(at).unwrap().parse().unwrap();
        }
    }
    panic!("the kernel does not count {counter}");
}

fn percentile(sorted: &[Duration], p: f64) -> Duration {
    sorted[((sorted.len() as f64 * p).ceil() as usize).clamp(1, sorted.len()) - 1]
}

/// Bounds of the barrier's wait by the gateway's histogram, in seconds.
fn barrier(lab: &Lab, gateway: &str, p: f64) -> f64 {
    let text = lab.metrics(gateway).unwrap();
    let all = sum_metric(&text, "tidegate_barrier_seconds_count", &[]);
    let buckets = text.lines().filter_map(|l| l.strip_prefix("tidegate_barrier_seconds_bucket{")?.split_once("le=\""));
    let buckets = buckets.filter_map(|(_, rest)| {
        let (le, count) = rest.split_once("\"} ")?;
        Some((le.parse::<f64>().ok()?, count.parse::<f64>().ok()?))
    });
    buckets.filter(|(_, count)| *count >= all * p).map(|(le, _)| le).fold(f64::INFINITY, f64::min)
}

/// Drops that a first packet lost to its own name's late fact would show as.
fn drops(lab: &Lab) -> f64 {
    let of = |place: &str, reason: &str| {
        lab.metric(place, "tidegate_packets_total", &[&format!("reason=\"{reason}\"")]).unwrap()
    };
    ["node-1", "gw-a", "gw-b"]
        .iter()
        .flat_map(|p| ["not-allowed", "no-binding", "binding-expired"].map(|r| of(p, r)))
        .sum()
}

/// What one resolve and connect took.
type Took = Result<(Duration, Duration), String>;

/// Asks for names from one socket, and connects to each as soon as its answer is there.
async fn ask(server: SocketAddr, names: Vec<(String, u16)>) -> Vec<Took> {
    let socket = tokio::net::UdpSocket::bind("0.0.0.0:0").await.unwrap();
    socket.connect(server).await.unwrap();
    let asked = Instant::now();
    for (id, (name, qtype)) in names.iter().enumerate() {
        socket.send(&query(id as u16, name, *qtype)).await.unwrap();
    }
    let mut tries = tokio::task::JoinSet::new();
    let mut open: Vec<usize> = (0..names.len()).collect();
    let mut buffer = [0; 1500];
    while !open.is_empty() {
        let Ok(Ok(n)) = tokio::time::timeout(Duration::from_secs(12), socket.recv(&mut buffer)).await else { break };
        let id = usize::from(u16::from_be_bytes([buffer[0], buffer[1]]));
        open.retain(|o| *o != id);
        let (name, qtype) = names[id].clone();
        let reply = buffer[..n].to_vec();
        tries.spawn(async move {
            let resolved = asked.elapsed();
            let Some((0, Some(ip))) = parse(&reply, qtype) else {
                return Err(format!("{name}: code {}", reply[3] & 15));
            };
            let (started, to) = (Instant::now(), SocketAddr::new(ip, 7000));
            match tokio::time::timeout(Duration::from_secs(10), tokio::net::TcpStream::connect(to)).await {
                Ok(Ok(_)) => Ok((resolved, started.elapsed())),
                other => Err(format!("{name}: connect {to}: {other:?}")),
            }
        });
    }
    let mut all = tries.join_all().await;
    all.extend(open.iter().map(|o| Err(format!("{}: no reply", names[*o].0))));
    all
}

/// Resolves and connects from a place, all at once; and how often a first packet was sent again.
fn burst(from: &Place<'_>, server: SocketAddr, names: &[(String, u16)]) -> (Vec<Took>, u64) {
    from.within(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let before = netstat("TCPSynRetrans");
        let all = runtime.block_on(async {
            let mut tasks = tokio::task::JoinSet::new();
            // The replies to few queries fit into a socket's default buffer.
            for part in names.chunks(20) {
                tasks.spawn(ask(server, part.to_vec()));
            }
            tasks.join_all().await.concat()
        });
        (all, netstat("TCPSynRetrans") - before)
    })
    .unwrap()
}

#[track_caller]
fn report(lab: &Lab, what: &str, all: Vec<Took>, again: u64, dropped: f64) {
    let failed: Vec<&String> = all.iter().filter_map(|t| t.as_ref().err()).collect();
    assert!(failed.is_empty(), "{what}: {} failed, as {:?}", failed.len(), &failed[..failed.len().min(5)]);
    let sorted = |f: fn(&(Duration, Duration)) -> Duration| {
        let mut times: Vec<Duration> = all.iter().map(|t| f(t.as_ref().unwrap())).collect();
        times.sort_unstable();
        times
    };
    let (resolve, connect) = (sorted(|t| t.0), sorted(|t| t.1));
    println!(
        "{what}: resolve p50 {:?} p99 {:?}, connect p50 {:?} p99 {:?}; barrier p50 <= {} s, p99 <= {} s",
        percentile(&resolve, 0.5),
        percentile(&resolve, 0.99),
        percentile(&connect, 0.5),
        percentile(&connect, 0.99),
        barrier(lab, "gw-a", 0.5),
        barrier(lab, "gw-a", 0.99),
    );
    // A SYN is sent again after 1 s: the time says the same where the machine is not too busy.
    assert_eq!(again, 0, "{what}: first packets that were sent again");
    assert_eq!(dropped, 0.0, "{what}: packets that a kernel program dropped");
}

/// A thousand fresh names at once from one pod, and 200 pods at once: not one first packet is lost.
#[test]
fn a_burst_of_fresh_names_loses_no_first_packet() {
    const NAMES: u16 = 1000;
    const PODS: u16 = 200;
    let mut scenario = scenario();
    // Each name has an address of its own: none is known because of another.
    scenario.internet.prefixes.push("198.51.96.0/21".parse().unwrap());
    let burst_name = |n: u16| format!("n{n}.burst.example.com");
    for n in 0..NAMES + PODS {
        let v4 = Ipv4Addr::from(u32::from(Ipv4Addr::new(198, 51, 96, 0)) + u32::from(n));
        let v6 = Ipv6Addr::new(0x2001, 0xdb8, 0x100, 9, 0, 0, 1, n);
        scenario.internet.names.push(name(burst_name(n), vec![v4], vec![v6]));
    }
    scenario.pods.extend((0..PODS as u8).map(|n| pod(&format!("p{n}"), "shop", n)));
    let gateway = &mut scenario.tidegate.as_mut().unwrap().gateway;
    // All of one namespace wait at once, more than the default lets.
    gateway.insert("quotas".into(), json!({"queriesInFlight": 2048}));
    gateway.insert("dns".into(), json!({"barrierMillis": 5000}));
    let started = Instant::now();
    let (_one, lab) = up("burst", scenario);
    println!("a lab with {PODS} more pods was up after {:?}", started.elapsed());
    let fqdns = |from: u16, to: u16| (from..to).map(|n| json!({"matchName": burst_name(n)})).collect::<Vec<_>>();
    let text = policy("shop", Some("partner-a"), &fqdns(0, NAMES), 7000);
    let more = policy("shop", Some("partner-a"), &fqdns(NAMES, NAMES + PODS), 7000).replace("load-", "more-");
    lab.edit_manifest("load.yaml", &format!("{text}---\n{more}")).unwrap();
    let server = dns(&lab);
    // The last name of the second policy is for finding out that it is in force; nobody else asks it.
    let known = wait_for(Duration::from_secs(20), || {
        let seen = dig(&lab.pod("shop/worker"), &burst_name(NAMES + PODS - 1), "A", &[]);
        (seen.status == "NOERROR").then_some(())
    });
    assert!(known.is_some(), "the policy is in force");
    std::thread::sleep(Duration::from_secs(2));

    let before = drops(&lab);
    let names: Vec<_> = (0..NAMES).map(|n| (burst_name(n), if n % 2 == 0 { A } else { AAAA })).collect();
    let (all, again) = burst(&lab.pod("shop/web"), server, &names);
    // Counters are read from the kernel every so often.
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(all.len(), usize::from(NAMES));
    report(&lab, "1000 names, one pod", all, again, drops(&lab) - before);

    let before = drops(&lab);
    let together = Barrier::new(usize::from(PODS) - 1);
    let (mut all, mut again) = (Vec::new(), 0);
    std::thread::scope(|scope| {
        let pods: Vec<_> = (0..PODS - 1)
            .map(|n| {
                let (lab, together) = (&lab, &together);
                let asks = [(burst_name(NAMES + n), if n % 2 == 0 { A } else { AAAA })];
                scope.spawn(move || {
                    let from = lab.pod(&format!("shop/p{n}"));
                    together.wait();
                    burst(&from, server, &asks)
                })
            })
            .collect();
        for done in pods {
            let (took, more) = done.join().unwrap();
            all.extend(took);
            again += more;
        }
    });
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(all.len(), usize::from(PODS) - 1);
    report(&lab, "200 pods", all, again, drops(&lab) - before);
}

/// A Go client that fetches a URL over one family and says how long it took.
const GO: &str = r#"package main

import ("context"; "fmt"; "io"; "net"; "net/http"; "os"; "time")

func main() {
	dialer := net.Dialer{}
	dial := func(c context.Context, _, address string) (net.Conn, error) { return dialer.DialContext(c, os.Args[1], address) }
	client := http.Client{Transport: &http.Transport{DialContext: dial}, Timeout: 20 * time.Second}
	started := time.Now()
	answer, err := client.Get(os.Args[2])
	if err != nil { fmt.Fprintln(os.Stderr, err); os.Exit(1) }
	io.Copy(io.Discard, answer.Body)
	fmt.Println(time.Since(started).Seconds())
}
"#;

/// The same in Python, which tries addresses one after the other.
const PYTHON: &str = r#"
import socket, ssl, sys, time
family = socket.AF_INET if sys.argv[1] == "tcp4" else socket.AF_INET6
host = sys.argv[2].split("/")[2]
context = ssl.create_default_context()
started = time.time()
for info in socket.getaddrinfo(host, 443, family, socket.SOCK_STREAM):
    try:
        raw = socket.socket(family, socket.SOCK_STREAM)
        raw.settimeout(20)
        raw.connect(info[4])
        break
    except OSError:
        continue
with context.wrap_socket(raw, server_hostname=host) as s:
    s.sendall(("GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % host).encode())
    assert b"200" in s.recv(65536)
print(time.time() - started)
"#;

/// The first address of an allowed name is dead: every client gets through in under a second, and the record says where.
#[test]
fn a_dead_first_address_costs_less_than_a_second() {
    let go = tempfile::tempdir().unwrap();
    std::fs::write(go.path().join("main.go"), GO).unwrap();
    let client = go.path().join("client");
    let built = std::process::Command::new("go")
        .args(["build", "-o"])
        .arg(&client)
        .arg("main.go")
        .current_dir(go.path())
        .env("CGO_ENABLED", "0")
        .env("GO111MODULE", "off")
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));

    let mut scenario = scenario();
    let v4 = |n| Ipv4Addr::new(198, 51, 100, n);
    let v6 = |n| Ipv6Addr::new(0x2001, 0xdb8, 0x100, 0, 0, 0, 0, n);
    let names: Vec<String> = ["curl", "python", "go"].map(|c| format!("{c}.two.example.com")).into();
    for n in &names {
        scenario.internet.names.push(name(n.clone(), vec![v4(90), v4(91)], vec![v6(0x90), v6(0x91)]));
    }
    let (_one, lab) = up("dead", scenario);
    let router = lab.place("router").unwrap();
    let rules = format!(
        "table inet dead {{ chain dead {{ type filter hook forward priority 0; ip daddr {} drop; ip6 daddr {} drop; }}; }}",
        v4(90),
        v6(0x90)
    );
    tidegate_lab::netns::nft(router.netns(), &rules).unwrap();
    lab.edit_manifest(
        "load.yaml",
        &policy("shop", Some("partner-a"), &[json!({"matchPattern": "*.two.example.com"})], 443),
    )
    .unwrap();
    let web = lab.pod("shop/web");
    for n in &names {
        for family in FAMILIES {
            let known = wait_for(Duration::from_secs(10), || {
                (dig(&web, n, family.record(), &[]).answers.len() == 2).then_some(())
            });
            assert!(known.is_some(), "{n}");
        }
    }
    for family in FAMILIES {
        let dead: IpAddr = family.pick(v4(90).into(), v6(0x90).into());
        // The relay races over both families, whichever the client asked by.
        let live = [IpAddr::from(v4(91)), v6(0x91).into()].map(|ip| ip.to_string());
        assert_eq!(knock(&router, SocketAddr::new(dead, 443)).unwrap(), Knock::Open, "the router's own packets pass");
        let tcp = family.pick("tcp4", "tcp6");
        let urls: Vec<String> = names.iter().map(|n| format!("https://{n}/")).collect();
        let curl = ["curl", "-sS", "-m", "20", family.flag(), "-o", "/dev/null", "-w", "%{time_total}", &urls[0]];
        let python = ["python3", "-c", PYTHON, tcp, &urls[1]];
        let go = [client.to_str().unwrap(), tcp, &urls[2]];
        for (command, host) in [&curl[..], &python, &go].into_iter().zip(&names) {
            // Whichever address a client picks first, it must be quick; the dead one must have been among them.
            let mut dead_first = false;
            for _ in 0..12 {
                let mark = lab.mark();
                let out = web.run(command);
                assert_eq!(out.status, 0, "{host} {tcp}: {}", out.stderr);
                let took: f64 = out.stdout.trim().parse().unwrap();
                assert!(took < 1.0, "{host} {tcp}: {took} s");
                let fits = |r: &serde_json::Value| r["kind"] == "open" && r["sni"] == **host;
                let record = lab.wait_audit(&GATEWAYS, &mark, fits).unwrap();
                assert_eq!(record["verdict"], "allow", "{record}");
                let destination = &record["destination"];
                let actual = destination["actual"]["ip"].as_str().unwrap();
                assert!(live.iter().any(|ip| ip == actual), "{record}");
                if destination["asked"]["ip"] == dead.to_string() {
                    dead_first = true;
                    println!("{host} {tcp}: {took:.3} s by way of {dead}");
                    break;
                }
            }
            assert!(dead_first, "{host} {tcp}: nobody asked for the dead address");
        }
    }
}

/// One window of a tenant's day: 150 cached names and 150 connections; the p99 of each.
fn window(from: &Place<'_>, server: SocketAddr, to: SocketAddr) -> [Duration; 2] {
    from.within(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect(server).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let mut times = [Vec::new(), Vec::new()];
        for id in 0..150u16 {
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

/// The median of three windows.
fn windows(from: &Place<'_>, server: SocketAddr, to: SocketAddr) -> [Duration; 2] {
    let all = [(); 3].map(|()| window(from, server, to));
    [0, 1].map(|of| {
        let mut of = all.map(|w| w[of]);
        of.sort_unstable();
        of[1]
    })
}

/// Names that nobody resolves, names below a wildcard that nobody asked before, names whose authority is silent,
/// addresses that nobody allows: about a thousand of each in a second, from the calling thread's namespace.
fn flood(server: SocketAddr, end: &AtomicBool) {
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
        let mut reply = [0; 1500];
        while socket.recv(&mut reply).is_ok() {}
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// One namespace floods: its own quotas stop it, and another namespace of the same node and gateway hardly feels it.
#[test]
fn a_flood_of_one_namespace_is_its_own() {
    const FACTS: usize = 150;
    const NAMES: usize = 100;
    const IN_FLIGHT: usize = 64;
    const CONNECTIONS: usize = 200;
    let mut scenario = scenario();
    // Both tenants share a gateway, and a node.
    let pair = scenario.pools.iter_mut().find(|p| p.name == "partner-b").unwrap();
    pair.addresses[0].owner = Some("gw-a".into());
    for (n, of) in ["names", "facts"].into_iter().enumerate() {
        scenario.namespaces.push(Namespace {
            name: of.into(),
            labels: BTreeMap::default(),
            annotations: BTreeMap::default(),
        });
        scenario.pods.push(pod(of, of, n as u8));
    }
    scenario.internet.names.push(NameSpec { silent: true, ..name("*.slow.example.net".into(), vec![], vec![]) });
    for n in 0..6 {
        let many = (0..60).map(|a| Ipv4Addr::new(192, 0, 2, 10 + a)).collect();
        scenario.internet.names.push(name(format!("wide{n}.example.net"), many, vec![]));
    }
    let gateway = &mut scenario.tidegate.as_mut().unwrap().gateway;
    let quotas = json!({"facts": FACTS, "names": NAMES, "queriesInFlight": IN_FLIGHT, "connections": CONNECTIONS});
    gateway.insert("quotas".into(), quotas);
    // Facts outlast the flood: what is gone was evicted.
    gateway.insert("dns".into(), json!({"ttlMinSeconds": 600, "barrierMillis": 2000}));
    let (_one, lab) = up("flood", scenario);
    let slow = policy("shop", Some("partner-a"), &[json!({"matchPattern": "*.slow.example.net"})], 443);
    let names = policy("names", None, &[json!({"matchPattern": "**.many.example.net"})], 7000);
    let facts = policy("facts", None, &[json!({"matchPattern": "*.example.net"})], 7000);
    lab.edit_manifest("load.yaml", &[slow, names, facts].join("---\n")).unwrap();
    let server = dns(&lab);
    let victim = lab.pod("billing/pay");
    let tcp = SocketAddr::from(([198, 51, 100, 12], 7000));
    assert!(!dig(&victim, "tcp.example.com", "A", &[]).answers.is_empty());
    let bank = SocketAddr::from(([198, 51, 100, 15], 443));
    assert!(!dig(&victim, "bank.example.com", "A", &[]).answers.is_empty());
    let mut live = Echo::connect(&victim, tcp).unwrap();
    let known = wait_for(Duration::from_secs(15), || {
        (!dig(&lab.pod("names/names"), "n.many.example.net", "A", &[]).answers.is_empty()).then_some(())
    });
    assert!(known.is_some(), "the policy is in force");

    // Names and facts stop at the quota, with the reason.
    let refused = |namespace: &str, kind: &str, mark: &Mark| {
        let fits = |r: &serde_json::Value| r["reason"] == "quota" && r["namespace"] == namespace && r["kind"] == kind;
        lab.wait_audit(&["gw-a", "gw-b"], mark, fits).is_some()
    };
    let mark = lab.mark();
    let status = || -> usize {
        let text = lab.admin("gw-a", "/status").unwrap().1;
        let status: serde_json::Value = serde_json::from_str(&text).unwrap();
        status["core"]["facts"].as_u64().unwrap() as usize
    };
    let asks = |from: &str, names: Vec<String>| -> Vec<u8> {
        let all = names.iter().map(|n| (dig(&lab.pod(from), n, "A", &[]).status == "NOERROR") as u8);
        all.collect()
    };
    let wide = asks("facts/facts", (0..6).map(|n| format!("wide{n}.example.net")).collect());
    assert_eq!(wide[..2], [1, 1], "below the quota names resolve: {wide:?}");
    assert_eq!(wide[3..], [0, 0, 0], "above it none does: {wide:?}");
    assert!(refused("facts", "dns", &mark), "facts stop with quota");
    let asked: Vec<_> = (0..NAMES + 40).map(|n| (format!("q{n}.many.example.net"), A)).collect();
    // Fewer at once than may be in flight.
    let few = asked.chunks(IN_FLIGHT / 2).map(|few| burst(&lab.pod("names/names"), server, few).0);
    let took: Vec<Took> = few.collect::<Vec<_>>().concat();
    let unresolved = took.iter().filter(|t| t.as_ref().is_err_and(|e| e.contains("code 2"))).count();
    assert!((40..=45).contains(&unresolved), "{unresolved} names were refused: {:?}", took.iter().find(|t| t.is_err()));
    assert!(refused("names", "dns", &mark), "names stop with quota");
    // The victim's two beside them.
    let learnt = status();
    assert!(learnt <= FACTS + NAMES + 2, "{learnt} facts");

    // Connections, relayed and forwarded.
    let web = lab.pod("shop/web");
    for name in ["api.example.com", "tcp.example.com"] {
        assert!(!dig(&web, name, "A", &[]).answers.is_empty());
    }
    let hold = |to: SocketAddr| {
        let connect = || {
            (0..CONNECTIONS + 60)
                .filter_map(|_| TcpStream::connect_timeout(&to, Duration::from_millis(200)).ok())
                .collect::<Vec<_>>()
        };
        web.within(connect).unwrap()
    };
    let quiet = windows(&victim, server, tcp);
    let mark = lab.mark();
    let relayed = hold(SocketAddr::from(([198, 51, 100, 10], 443)));
    assert!(refused("shop", "open", &mark), "relayed connections stop with quota");
    let forwarded = hold(tcp);
    // The bound is the namespace rules', which drop; they write no record.
    assert!(forwarded.len() <= CONNECTIONS, "{} forwarded connections", forwarded.len());

    let mark = lab.mark();
    let end = AtomicBool::new(false);
    let loud = std::thread::scope(|scope| {
        for place in ["shop/web", "shop/worker"] {
            let (lab, end) = (&lab, &end);
            scope.spawn(move || lab.pod(place).within(|| flood(server, end)).unwrap());
        }
        std::thread::sleep(Duration::from_secs(1));
        let loud = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| windows(&victim, server, tcp)));
        end.store(true, Ordering::Relaxed);
        loud.unwrap()
    });
    println!("p99 of DNS and of connecting: quiet {quiet:?}, under the flood {loud:?}");
    assert!(refused("shop", "dns", &mark), "queries in flight stop with quota");
    for (what, quiet, loud) in [("DNS", quiet[0], loud[0]), ("connect", quiet[1], loud[1])] {
        // Two cores run the flood, the servers and everything else.
        assert!(loud <= quiet * 2 + Duration::from_millis(10), "{what}: quiet {quiet:?}, loud {loud:?}");
    }
    let counted = lab.metric("gw-a", "tidegate_decisions_total", &["reason=\"quota\""]).unwrap();
    assert!(counted > 0.0, "and the metrics say so");
    drop((relayed, forwarded));
    // Nothing of the quiet tenant is gone: what it resolved before the flood still opens, and what lived lives.
    assert_eq!(knock(&victim, bank).unwrap(), Knock::Open);
    live.say("still here\n").unwrap();
}
