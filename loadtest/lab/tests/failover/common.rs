//! What the files about failover share: steady traffic with a log of what worked when, what the gateways say of
//! ownership, and who announces an egress address on the wire.
#![allow(dead_code, reason = "no file uses all of it")]

use std::io::{ErrorKind, Read};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use socket2::{Domain, Protocol, Socket, Type};
use tidegate_lab::family::{FAMILIES, Family};
use tidegate_lab::lab::wait_for;
use tidegate_lab::netns::ip_batch;
use tidegate_lab::probe::{curl, dig};
use tidegate_lab::steady::gaps::{Asked, Recorder};
pub use tidegate_lab::steady::gaps::{Traffic, connect};
pub use tidegate_lab::story::named;
use tidegate_lab::story::{POOL_B, of};
use tidegate_lab::{Lab, Options, Scenario};

/// Pods of the namespace whose egress pair is looked at, on the nodes without a gateway.
pub const PODS: [&str; 2] = ["shop/web", "shop/worker"];
/// A pod whose namespace has no pool: it leaves as its gateway's pod does, by the PodNetwork.
pub const PLAIN: &str = "annotated/app";
/// Names are back so soon when a gateway has died, and egress addresses.
pub const NAMES: Duration = Duration::from_secs(1);
pub const ADDRESSES: Duration = Duration::from_secs(3);
/// A pair that is handed over moves so soon. By silence it could not: that takes two seconds, from a beat that came 200 ms before
/// at the earliest.
pub const HANDED: Duration = Duration::from_millis(1800);
/// What traffic may notice of what should not touch it, on a busy machine.
pub const CALM: (Duration, Duration) = (Duration::from_millis(700), Duration::from_secs(1));
/// A pod that is nobody's business: what its traffic notices is the machine's doing.
const CONTROL: &str = "untouched/app";
/// A pod whose egress pair gw-b has.
const BILLING: &str = "billing/pay";
/// The shop's pool.
pub const POOL: &str = "/apis/tidegate.dev/v1alpha1/egresspools/partner-a";
/// A gateway must be ready so soon after its start.
pub const READY: Duration = Duration::from_secs(20);

/// tcp.example.com, which policy lets through without inspection.
pub fn tcp(family: Family) -> SocketAddr {
    named(family, 12, 7000)
}

fn dns(family: Family) -> SocketAddr {
    let ip: IpAddr = family.pick("10.244.1.53", "fd00:10:244:1::53").parse().unwrap();
    SocketAddr::new(ip, 53)
}

/// The egress address of the shop's pool.
pub fn egress(family: Family) -> IpAddr {
    family.pick("203.0.113.10", "2001:db8::10").parse().unwrap()
}

/// The address of a gateway's node.
pub fn node_of(lab: &Lab, gateway: &str, family: Family) -> IpAddr {
    let name = &lab.scenario().gateways.iter().find(|g| g.name == gateway).unwrap().node;
    let node = lab.scenario().node(name).unwrap();
    family.pick(node.ipv4.into(), node.ipv6.into())
}

/// The demo's cluster, with the shop's pair at gw-a.
#[track_caller]
pub fn up(name: &str) -> Lab {
    up_like("demo.yaml", name, |_| {})
}

/// The cluster of another scenario file, or a changed one, with whoever has taken which pair.
#[track_caller]
pub fn start(file: &str, name: &str, change: impl FnOnce(&mut Scenario)) -> Lab {
    let scenarios = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/");
    let mut scenario = Scenario::load(format!("{scenarios}{file}").as_ref()).unwrap();
    change(&mut scenario);
    let options = Options { lab: Some(env!("CARGO_BIN_EXE_tidegate-lab").into()), ..Options::unique(name) };
    Lab::up(scenario, &options).unwrap()
}

/// The same with two gateways, and the shop's pair at gw-a.
#[track_caller]
pub fn up_like(file: &str, name: &str, change: impl FnOnce(&mut Scenario)) -> Lab {
    let mut lab = start(file, name, change);
    if owner(&lab, "gw-b").0 != "gw-a" {
        // On a machine so busy that gw-a was not able for ten seconds the other one has begun.
        lab.restart("gw-b").unwrap();
        wait_owner(&lab, "gw-a", "gw-a", Duration::from_secs(10));
    }
    lab
}

/// Resolves these names in all pods and families.
#[track_caller]
pub fn learn(lab: &Lab, names: &[&str]) {
    for pod in PODS {
        for family in FAMILIES {
            for name in names {
                let seen = dig(&lab.pod(pod), name, family.record(), &[]);
                assert_eq!(seen.answers.len(), 1, "{pod} {name}: {}", seen.text());
            }
        }
    }
}

/// Steady traffic of these pods in both families while `work` goes on.
pub fn under_traffic<T>(lab: &mut Lab, pods: &[&str], work: impl FnOnce(&mut Lab) -> T) -> (T, Vec<Traffic>) {
    let asked = Asked { name: "api.example.com", dns, to: tcp };
    let pods: Vec<_> = pods.iter().map(|pod| (lab.pod(pod), asked)).collect();
    // To a server that nobody else asks: what goes to the others is watched for other sources.
    let recorder = Recorder::start(&pods, (&lab.pod(CONTROL), named(Family::V4, 22, 7000)));
    drop(pods);
    std::thread::sleep(Duration::from_secs(1));
    let out = work(lab);
    (out, recorder.finish())
}

/// The longest gaps of names and of connections since then, which are below these on a machine that keeps up, see
/// [`Traffic::limit`]; no source but the pool's.
#[track_caller]
pub fn gaps(what: &str, all: &[Traffic], since: Instant, names: Duration, flows: Duration) {
    let mut worst = (Duration::ZERO, Duration::ZERO);
    for t in all.iter().filter(|t| PODS.contains(&t.pod.as_str())) {
        let (dns, ip) = (t.names.longest(since), t.flows.longest(since));
        println!("{what}: {} {:?}: longest DNS gap {dns:?}, egress address gap {ip:?}", t.pod, t.family);
        let (names, flows) = (t.limit(names, since), t.limit(flows, since));
        assert!(dns < names && ip < flows, "{what}: not within {names:?} and {flows:?}");
        worst = (worst.0.max(dns), worst.1.max(ip));
        assert_eq!(t.flows.sources(None), [egress(t.family)], "{what}: no other source address");
    }
    println!("{what}: DNS gap {:?}, egress address gap {:?}", worst.0, worst.1);
}

/// Without a pool of its own a pod leaves with the address of its gateway's node: another one after a failover. `plain` is
/// such a pod, `now` the gateway that has them since soon after `since`.
#[track_caller]
pub fn pod_network(lab: &Lab, plain: &str, traffic: &[Traffic], since: Instant, now: &str) {
    for t in traffic.iter().filter(|t| t.pod == plain) {
        let (dns, flows) = (t.names.longest(since), t.flows.longest(since));
        println!("PodNetwork {:?}: longest DNS gap {dns:?}, gap {flows:?}", t.family);
        assert!(dns < t.limit(NAMES, since) && flows < t.limit(ADDRESSES, since), "PodNetwork: {dns:?} {flows:?}");
        let gateways = &lab.scenario().gateways;
        let known: Vec<IpAddr> = gateways.iter().map(|g| node_of(lab, &g.name, t.family)).collect();
        assert!(t.flows.sources(None).iter().all(|ip| known.contains(ip)), "{:?}", t.flows.sources(None));
        let late = t.flows.sources(Some(since + ADDRESSES));
        assert_eq!(late, [node_of(lab, now, t.family)]);
    }
}

/// Ends a process at once; says when.
pub fn kill(lab: &Lab, name: &str) -> Instant {
    let at = Instant::now();
    lab.signal(name, Signal::SIGKILL, Some(Duration::from_secs(5))).unwrap();
    at
}

pub fn status(lab: &Lab, gateway: &str) -> serde_json::Value {
    serde_json::from_str(&lab.admin(gateway, "/status").unwrap().1).unwrap()
}

/// How many facts a gateway knows.
pub fn facts(lab: &Lab, gateway: &str) -> u64 {
    status(lab, gateway)["core"]["facts"].as_u64().unwrap()
}

/// Who owns the pair whose name holds this text, by a gateway's word: the owner, the epoch, and whether it is held.
pub fn owner_of(lab: &Lab, gateway: &str, pair: &str) -> (String, u64, bool) {
    let Ok((_, body)) = lab.admin(gateway, "/status") else { return Default::default() };
    let status: serde_json::Value = serde_json::from_str(&body).unwrap();
    let pairs = status["core"]["pairs"].as_array().cloned().unwrap_or_default();
    let found = pairs.iter().find(|p| p["pair"].as_str().is_some_and(|t| t.contains(pair))).cloned();
    let found = found.unwrap_or_default();
    (
        found["owner"].as_str().unwrap_or_default().into(),
        found["epoch"].as_u64().unwrap_or_default(),
        found["held"].as_bool().unwrap_or_default(),
    )
}

/// Who owns the shop's pair, by a gateway's word.
pub fn owner(lab: &Lab, gateway: &str) -> (String, u64) {
    let (owner, epoch, _) = owner_of(lab, gateway, "203.0.113.10");
    (owner, epoch)
}

/// Waits until a gateway says that the shop's pair is this one's; gives the epoch.
#[track_caller]
pub fn wait_owner(lab: &Lab, asked: &str, owned_by: &str, limit: Duration) -> u64 {
    let found = wait_for(limit, || Some(owner(lab, asked)).filter(|(o, _)| o == owned_by));
    found.unwrap_or_else(|| panic!("{asked} says {:?}, not {owned_by}", owner(lab, asked))).1
}

/// With an API server: what stands in the status of the shop's pool.
pub fn recorded(lab: &Lab) -> (String, u64) {
    let pool = lab.request("GET", POOL, &serde_json::Value::Null).unwrap();
    let entry = &pool["status"]["addresses"][0];
    (entry["owner"].as_str().unwrap_or_default().into(), entry["epoch"].as_u64().unwrap_or_default())
}

/// Waits until this owner is recorded, with an epoch that is at least this and the one that the owner says; gives it.
#[track_caller]
pub fn wait_recorded(lab: &Lab, gateway: &str, least: u64) -> u64 {
    let agree = || {
        let (who, epoch) = recorded(lab);
        let own = owner_of(lab, gateway, "203.0.113.10");
        (who == gateway && epoch >= least && own == (who, epoch, true)).then_some(epoch)
    };
    let found = wait_for(Duration::from_secs(10), agree);
    found.unwrap_or_else(|| panic!("{:?} is recorded; {gateway} says {:?}", recorded(lab), owner(lab, gateway)))
}

/// Whether gw-b has billing's pair, not gw-a both. On a machine that is so busy that one gateway comes long after the other,
/// the first has all.
pub fn is_apart(lab: &Lab) -> bool {
    owner_of(lab, "gw-b", "203.0.113.20").0 == "gw-b"
}

/// Records [`CONTROL`], beside what no node of the cluster has to do with: the router, outside.
fn record_untouched(lab: &Lab) -> Recorder {
    let asked = Asked { name: "api.example.com", dns, to: tcp };
    Recorder::start(&[(lab.pod(CONTROL), asked)], (&lab.place("router").unwrap(), named(Family::V4, 23, 7000)))
}

/// A pod that something is no business of does not notice it: names and new connections go on, with the same address.
#[track_caller]
fn notices_nothing(what: &str, traffic: &[Traffic], pod: &str, since: Instant, source: impl Fn(Family) -> IpAddr) {
    let own: Vec<&Traffic> = traffic.iter().filter(|t| t.pod == pod).collect();
    assert_eq!(own.len(), FAMILIES.len(), "{pod} is recorded");
    for t in own {
        let (dns, flows) = (t.names.longest(since), t.flows.longest(since));
        println!("{what}: {pod} {:?}: longest DNS gap {dns:?}, of connections {flows:?}", t.family);
        let limits = (t.limit(CALM.0, since), t.limit(CALM.1, since));
        assert!(dns < limits.0 && flows < limits.1, "{what}: {pod} notices it: not within {limits:?}");
        assert_eq!(t.flows.sources(None), [source(t.family)], "{what}: {pod}, no other source address");
    }
}

/// The link of the node of gw-a, the owner, fails: it hears nobody and withdraws, gw-b serves, and neither whom gw-b served
/// before nor who is untouched notices it. Back again, it takes nothing. Gives the epoch of gw-b.
#[track_caller]
pub fn owner_is_cut_off(lab: &mut Lab, wire: &Wire) -> u64 {
    let (who, epoch) = owner(lab, "gw-a");
    assert_eq!(who, "gw-a");
    let node = "gw-node-a";
    let port = lab.scenario().nodes.iter().position(|n| n.name == node).unwrap();
    let fabric = lab.place("fabric").unwrap().netns().to_owned();
    let home = lab.scenario().pod(CONTROL).unwrap().node.clone();
    let home = lab.scenario().node(&home).unwrap().clone();
    let apart = is_apart(lab);
    for family in FAMILIES {
        assert_eq!(dig(&lab.pod(BILLING), "tcp.example.com", family.record(), &[]).answers.len(), 1);
    }
    let ((cut, untouched), traffic) = under_traffic(lab, &[PODS[0], PODS[1], BILLING], |lab| {
        let untouched = record_untouched(lab);
        std::thread::sleep(Duration::from_secs(1));
        let cut = Instant::now();
        ip_batch(&fabric, &[format!("link set port{port} down")]).unwrap();
        wait_owner(lab, "gw-b", "gw-b", Duration::from_secs(10));
        let withdrawn = || (!owner_of(lab, "gw-a", "203.0.113.10").2).then_some(());
        assert!(wait_for(Duration::from_secs(10), withdrawn).is_some(), "the owner withdraws");
        let held = || (lab.metric(node, "tidegate_held_addresses", &[]).unwrap() == 0.0).then_some(());
        assert!(wait_for(Duration::from_secs(5), held).is_some(), "its node holds nothing");
        std::thread::sleep(Duration::from_secs(1));
        (cut, untouched.finish())
    });
    gaps("owner cut off", &traffic, cut, NAMES, ADDRESSES);
    if apart {
        notices_nothing("owner cut off", &traffic, BILLING, cut, |f| of(POOL_B, f));
    }
    notices_nothing("owner cut off", &untouched, CONTROL, cut, |f| f.pick(home.ipv4.into(), home.ipv6.into()));
    assert_eq!(owner(lab, "gw-b"), ("gw-b".into(), epoch + 1));
    let (back, traffic) = under_traffic(lab, &PODS, |lab| {
        let back = Instant::now();
        ip_batch(&fabric, &[format!("link set port{port} up")]).unwrap();
        wait_owner(lab, "gw-a", "gw-b", Duration::from_secs(20));
        std::thread::sleep(Duration::from_secs(4));
        back
    });
    gaps("owner is back", &traffic, back, CALM.0, CALM.1);
    for g in ["gw-a", "gw-b"] {
        assert_eq!(owner(lab, g), ("gw-b".into(), epoch + 1), "{g}");
    }
    wire.only(cut, &["gw-b"]);
    epoch + 1
}

/// Connections to what was resolved long ago, forwarded and relayed, with no query by anybody.
#[track_caller]
pub fn facts_hold(lab: &Lab, limit: Duration) -> Duration {
    let asked = lab.internet_queries().unwrap().len();
    let start = Instant::now();
    for pod in PODS {
        for family in FAMILIES {
            loop {
                let seen = lab.pod(pod).within(|| connect(tcp(family), Duration::from_millis(500))).unwrap();
                if seen == Ok(egress(family)) {
                    break;
                }
                assert!(start.elapsed() < limit, "{pod} {family:?}: {seen:?}");
            }
        }
    }
    let took = start.elapsed();
    for pod in PODS {
        for family in FAMILIES {
            let seen = relayed(lab, pod, family, 11, "www.example.com");
            assert_eq!(seen.source(), Some(egress(family)), "{pod} {family:?}, relayed: {}", seen.text());
        }
    }
    assert_eq!(lab.internet_queries().unwrap().len(), asked, "nobody asked anything anew");
    took
}

/// A TLS connection to an address that was resolved long ago.
pub fn relayed(lab: &Lab, pod: &str, family: Family, n: u16, name: &str) -> tidegate_lab::probe::Curl {
    let to = named(family, n, 443).ip();
    let ip = if to.is_ipv6() { format!("[{to}]") } else { to.to_string() };
    let resolve = format!("{name}:443:{ip}");
    curl(&lab.pod(pod), family, &format!("https://{name}/"), &["--resolve", &resolve])
}

/// A gateway's log.
pub fn log(lab: &Lab, name: &str) -> String {
    std::fs::read_to_string(lab.layout().log(name)).unwrap_or_default()
}

/// When, the address, whether somebody had asked for it, and the hardware address that said so.
type Seen = (Instant, IpAddr, bool, [u8; 6]);

/// Who said on the segment of nodes and router that an egress address is at which hardware address: gratuitous ARP
/// and answers (RFC 826, RFC 5227), neighbour advertisements (RFC 4861, section 4.4).
pub struct Wire {
    seen: Arc<Mutex<Vec<Seen>>>,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// Hardware addresses of the gateways' nodes.
    nodes: Vec<(String, [u8; 6])>,
}

/// A node's agent has seen the end of its gateway within this.
const LETS_GO: Duration = Duration::from_millis(300);

/// ETH_P_ALL.
const EVERY_PROTOCOL: u16 = 3;

/// The address that a frame announces, and whether it answers a question.
fn announces(frame: &[u8]) -> Option<(IpAddr, bool)> {
    match frame.get(12..14)? {
        // A request announces only where it asks for the sender's own address.
        [8, 6] => {
            let (operation, sender, target) = (frame.get(20..22)?, frame.get(28..32)?, frame.get(38..42)?);
            let sender: [u8; 4] = sender.try_into().ok()?;
            (operation == [0, 2] || sender == target).then(|| (sender.into(), sender != target))
        }
        [0x86, 0xdd] if frame.get(20) == Some(&58) && frame.get(54) == Some(&136) => {
            let target: [u8; 16] = frame.get(62..78)?.try_into().ok()?;
            // Solicited (RFC 4861, section 4.4).
            Some((target.into(), frame[58] & 0x40 != 0))
        }
        _ => None,
    }
}

impl Wire {
    pub fn watch(lab: &Lab) -> Self {
        let nodes = lab.scenario().gateways.iter().map(|g| {
            let text = lab.place(&g.node).unwrap().run(&["ip", "-j", "link", "show", "eth0"]).stdout;
            let links: serde_json::Value = serde_json::from_str(&text).unwrap();
            let mut mac = [0; 6];
            for (octet, hex) in mac.iter_mut().zip(links[0]["address"].as_str().unwrap().split(':')) {
                *octet = u8::from_str_radix(hex, 16).unwrap();
            }
            (g.name.clone(), mac)
        });
        let nodes = nodes.collect();
        let socket = lab.place("fabric").unwrap().within(|| {
            let all = Protocol::from(i32::from(EVERY_PROTOCOL.to_be()));
            Socket::new(Domain::PACKET, Type::RAW, Some(all)).unwrap()
        });
        let mut socket = socket.unwrap();
        socket.set_recv_buffer_size(8 << 20).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let (seen, end) = (Arc::<Mutex<Vec<Seen>>>::default(), Arc::<AtomicBool>::default());
        let (s, e) = (Arc::clone(&seen), Arc::clone(&end));
        let thread = std::thread::spawn(move || {
            let mut frame = [0; 2048];
            while !e.load(Ordering::Relaxed) {
                match socket.read(&mut frame) {
                    Ok(n) => {
                        let ours = |(ip, _): &(IpAddr, bool)| FAMILIES.map(egress).contains(ip);
                        if let Some((ip, asked)) = announces(&frame[..n]).filter(ours) {
                            s.lock().unwrap().push((Instant::now(), ip, asked, frame[6..12].try_into().unwrap()));
                        }
                    }
                    Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                    Err(e) => panic!("{e}"),
                }
            }
        });
        Self { seen, end, thread: Some(thread), nodes }
    }

    /// Waits until nobody has announced anything for a second: an announcement is repeated a few times.
    #[track_caller]
    pub fn wait_quiet(&self) {
        let begun = Instant::now();
        let last = || self.seen.lock().unwrap().last().map_or(begun, |(at, ..)| begun.max(*at));
        let quiet = || (last().elapsed() >= Duration::from_secs(1)).then_some(());
        assert!(wait_for(Duration::from_secs(10), quiet).is_some(), "somebody announces on and on");
    }

    /// Only these announced both addresses since then, one after the other: two that do so at the same time alternate.
    #[track_caller]
    pub fn only(&self, since: Instant, gateways: &[&str]) {
        self.after("", since, gateways);
    }

    /// As [`Wire::only`], after the end of a gateway: its node answers who asks for its addresses until it has let them go.
    #[track_caller]
    pub fn after(&self, ended: &str, since: Instant, gateways: &[&str]) {
        let seen = self.seen.lock().unwrap();
        let name = |mac: &[u8; 6]| {
            let node = self.nodes.iter().find(|(_, m)| m == mac);
            node.map_or_else(|| format!("{mac:?}"), |(name, _)| name.clone())
        };
        for family in FAMILIES {
            let late = seen.iter().filter(|(at, ip, ..)| *at > since && *ip == egress(family));
            let late = late.map(|(at, _, asked, mac)| (*at, *asked, name(mac)));
            let counts = late.filter(|(at, asked, name)| name != ended || !asked || *at > since + LETS_GO);
            let mut names: Vec<(Instant, String)> = counts.map(|(at, _, name)| (at, name)).collect();
            names.dedup_by(|(_, next), (_, name)| next == name);
            assert!(names.iter().map(|(_, name)| name).eq(gateways), "{}: {names:?} since {since:?}", egress(family));
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A capture that failed has said so on standard error.
            let _ = thread.join();
        }
    }
}
