//! Bursts of fresh names: no first packet is lost.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use serde_json::json;
use tidegate_lab::lab::wait_for;
use tidegate_lab::liar::query;
use tidegate_lab::observe::sum_metric;
use tidegate_lab::probe::dig;
use tidegate_lab::{Lab, Place};

use crate::support::{GATEWAYS, name, netstat, policy, scenario, up};
use crate::{A, AAAA, dns, parse, percentile, pod};

/// A bound of the barrier's wait by the gateways' histograms, in seconds.
fn barrier(lab: &Lab, p: f64) -> f64 {
    let texts = GATEWAYS.map(|g| lab.metrics(g).unwrap());
    let sum = |metric: &str, labels: &[&str]| texts.iter().map(|t| sum_metric(t, metric, labels)).sum::<f64>();
    let all = sum("tidegate_barrier_seconds_count", &[]);
    let bounds = texts.iter().flat_map(|t| t.lines()).filter_map(|l| {
        let (_, rest) = l.strip_prefix("tidegate_barrier_seconds_bucket{")?.split_once("le=\"")?;
        Some(rest.split_once('"')?.0)
    });
    let holds = |le: &&str| sum("tidegate_barrier_seconds_bucket", &[&format!("le=\"{le}\"")]) >= all * p;
    bounds.filter(holds).filter_map(|le| le.parse().ok()).fold(f64::INFINITY, f64::min)
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
pub type Took = Result<(Duration, Duration), String>;

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
pub fn burst(from: &Place<'_>, server: SocketAddr, names: &[(String, u16)]) -> (Vec<Took>, u64) {
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
        barrier(lab, 0.5),
        barrier(lab, 0.99),
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
    // One more is for finding out that the policies are in force; no burst asks it.
    let known = NAMES + PODS;
    for n in 0..=known {
        let v4 = Ipv4Addr::from(u32::from(Ipv4Addr::new(198, 51, 96, 0)) + u32::from(n));
        let v6 = Ipv6Addr::new(0x2001, 0xdb8, 0x100, 9, 0, 0, 1, n);
        scenario.internet.names.push(name(burst_name(n), vec![v4], vec![v6]));
    }
    scenario.pods.extend((0..PODS as u8).map(|n| pod(&format!("p{n}"), "shop", n)));
    let gateway = &mut scenario.tidegate.as_mut().unwrap().gateway;
    // All of one namespace wait at once, more than the default lets; none longer than the default.
    gateway.insert("quotas".into(), json!({"queriesInFlight": 2048}));
    let started = Instant::now();
    let (_one, lab) = up("burst", scenario);
    println!("a lab with {PODS} more pods was up after {:?}", started.elapsed());
    // A name stands in the rules that its number's bits say: an address gets one of 63 classes, most of which no node has
    // heard of before the name's own answer.
    let rules = (0..6).map(|bit| {
        let stands = (0..NAMES).filter(|n| (n % 63 + 1) >> bit & 1 == 1);
        stands.map(|n| json!({"matchName": burst_name(n)})).collect::<Vec<_>>()
    });
    let more = (NAMES..=known).map(|n| json!({"matchName": burst_name(n)})).collect();
    let texts = rules.chain([more]).enumerate().map(|(rule, fqdns)| {
        policy("shop", Some("partner-a"), &fqdns, 7000).replace("load-7000", &format!("load-{rule}"))
    });
    lab.edit_manifest("load.yaml", &texts.collect::<Vec<_>>().join("---\n")).unwrap();
    let server = dns(&lab);
    // It stands in the last policy.
    let in_force = wait_for(Duration::from_secs(20), || {
        let seen = dig(&lab.pod("shop/worker"), &burst_name(known), "A", &[]);
        (seen.status == "NOERROR").then_some(())
    });
    assert!(in_force.is_some(), "the policies are in force");
    std::thread::sleep(Duration::from_secs(2));

    let before = drops(&lab);
    let names: Vec<_> = (0..NAMES).map(|n| (burst_name(n), if n % 2 == 0 { A } else { AAAA })).collect();
    let (all, again) = burst(&lab.pod("shop/web"), server, &names);
    // Counters are read from the kernel every so often.
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(all.len(), usize::from(NAMES));
    report(&lab, "1000 names, one pod", all, again, drops(&lab) - before);

    let before = drops(&lab);
    let together = Barrier::new(usize::from(PODS));
    let (mut all, mut again) = (Vec::new(), 0);
    std::thread::scope(|scope| {
        let pods: Vec<_> = (0..PODS)
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
    assert_eq!(all.len(), usize::from(PODS));
    report(&lab, "200 pods", all, again, drops(&lab) - before);
}
