//! The whole agent in namespaces: real programs, real tunnel, a gateway that is played by the test.
// Helpers are tests too.
#![allow(clippy::unwrap_used)]

#[path = "support/gateway.rs"]
#[allow(dead_code)]
mod gateway;
mod support;

use std::io::{BufRead, BufReader, IoSlice, Write};
use std::net::{IpAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use gateway::{Authority, Session, both, serve};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use support::Ns;
use tidegate_agent::config::{Config, GatewayAddress};
use tidegate_agent::{AgentError, Status, cleanup, run};
use tidegate_policy::event::{Emit, Event, What};
use tidegate_policy::state::{Cluster, Endpoint, FactUpdate, FactValue, Gateway, Group, Node, NodeState, Scope, Touch};
use tidegate_policy::{Carry, ClassKey, GroupKey, PortRange, PortSet, Proto, Reason, ScopeKey, Via};
use tidegate_proto::wire::{FactsUpdate, StateUpdate};
use tidegate_proto::{FactsBatch, GrantEntry, StateBatch};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

const BOOT: u64 = 5;
const SCOPE: ScopeKey = ScopeKey(1);
const GROUP: GroupKey = GroupKey(2);
const CLASS: ClassKey = ClassKey(3);
const OUTSIDE: &str = "198.51.100.7";

fn ip(s: &str) -> IpAddr {
    s.parse().unwrap()
}

/// A node with an isolated and an untouched pod, and the rest of the world, which is also the gateway's node.
struct World {
    node: Ns,
    isolated: Ns,
    untouched: Ns,
    world: Ns,
    ca: Authority,
    pins: PathBuf,
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.pins);
    }
}

fn world() -> World {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // The folder of pins has to be on a bpffs.
    tidegate_ebpf::preflight().unwrap();
    let unique = format!("tidegate-agent-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let w = World {
        node: Ns::new(),
        isolated: Ns::new(),
        untouched: Ns::new(),
        world: Ns::new(),
        ca: Authority::new(),
        pins: PathBuf::from("/sys/fs/bpf").join(unique),
    };
    w.node.sh("echo 1 > /proc/sys/net/ipv4/ip_forward");
    w.node.cable("up0", &w.world, "eth0");
    w.node.ip("addr add 192.0.2.1/24 dev up0");
    w.node.ip("route add default via 192.0.2.9");
    w.world.ip("addr add 192.0.2.9/24 dev eth0");
    w.world.ip(&format!("addr add {OUTSIDE}/32 dev lo"));
    w.world.ip("route add 10.0.0.0/24 via 192.0.2.1");
    for (name, pod, address) in [("pod0", &w.isolated, "10.0.0.2"), ("pod1", &w.untouched, "10.0.0.3")] {
        w.node.cable(name, pod, "eth0");
        w.node.ip(&format!("addr add 10.0.0.1/32 dev {name}"));
        w.node.ip(&format!("route add {address}/32 dev {name}"));
        pod.ip(&format!("addr add {address}/32 dev eth0"));
        pod.ip("route add 10.0.0.1 dev eth0");
        pod.ip("route add default via 10.0.0.1");
    }
    w
}

fn state(gateway_node: &str, pair: u8) -> NodeState {
    let mut s = NodeState {
        cluster: Cluster { prefixes: vec!["10.0.0.0/24".parse().unwrap()], ..Cluster::default() },
        ..NodeState::default()
    };
    s.nodes.insert("n1".into(), Node { addresses: vec![ip("192.0.2.1")] });
    s.nodes.insert("n2".into(), Node { addresses: vec![ip("192.0.2.9")] });
    s.gateways.insert("gw-a".into(), Gateway { node: gateway_node.into(), control: vec![] });
    s.scopes.insert(SCOPE, Scope { owner: "gw-a".into(), epoch: 1, pair, standbys: vec![] });
    s.groups.insert(GROUP, Group { isolated: true, audit: false, admin: None, own: None });
    for (address, pod, touch, member) in [
        ("10.0.0.2", "isolated", Touch::Isolated, Some((SCOPE, GROUP))),
        ("10.0.0.3", "untouched", Touch::Untouched, None),
    ] {
        let endpoint = Endpoint { node: "n1".into(), namespace: "ns".into(), pod: pod.into(), touch, member };
        s.endpoints.insert(ip(address), endpoint);
    }
    s
}

fn snapshot(sequence: u64, state: &NodeState) -> StateBatch {
    StateBatch {
        gateway: "gw-a".into(),
        boot_id: BOOT,
        sequence,
        snapshot: true,
        set: state.entries(),
        ..StateBatch::default()
    }
}

fn facts(sequence: u64, port: u16) -> FactsBatch {
    let ports = PortSet::from_precedence([PortRange {
        proto: Proto::Udp,
        lo: port,
        hi: port,
        via: Via::Allow(Carry::Forward),
    }]);
    let value = FactValue { class: CLASS, ttl: Duration::from_secs(60) };
    FactsBatch {
        boot_id: BOOT,
        sequence,
        snapshot: sequence == 1,
        grants: vec![GrantEntry { group: GROUP, class: CLASS, ports }],
        facts: vec![FactUpdate { scope: SCOPE, ip: ip(OUTSIDE), value: Some(value) }],
        ..FactsBatch::default()
    }
}

#[derive(Default)]
struct Seen(Mutex<Vec<Event>>);

impl Emit for Seen {
    fn emit(&self, event: Event) {
        self.0.lock().unwrap().push(event);
    }
}

/// A running agent with both of its streams.
struct Agent {
    state: Session<StateUpdate>,
    facts: Session<FactsUpdate>,
    status: watch::Receiver<Status>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), AgentError>>,
    seen: Arc<Seen>,
    beat: JoinHandle<()>,
}

fn config(w: &World, gateways: Vec<GatewayAddress>) -> Config {
    Config {
        node: "n1".into(),
        gateways,
        discover: None,
        tls: Some(w.ca.sign("n1.node.tidegate")),
        join: None,
        socket: w.ca.folder().join("agent.sock"),
        pins: w.pins.clone(),
        ..serde_json::from_value(serde_json::json!({
            "node": "x", "gateways": [], "tls": {"certificate": "/", "key": "/", "ca": "/"},
        }))
        .unwrap()
    }
}

async fn start(w: &World) -> (Agent, Config) {
    start_with(w, vec![]).await
}

async fn start_with(w: &World, others: Vec<GatewayAddress>) -> (Agent, Config) {
    let (address, mut opened) = serve(&w.ca.sign("gw-a.gateway.tidegate"), "127.0.0.1:0").await;
    let mut gateways = vec![GatewayAddress { name: "gw-a".into(), address }];
    gateways.extend(others);
    let config = config(w, gateways);
    let seen = Arc::new(Seen::default());
    let (status_tx, status) = watch::channel(Status::default());
    let (stop, stopped) = oneshot::channel::<()>();
    let shutdown = async move { drop(stopped.await) };
    let emit: Arc<dyn Emit> = Arc::clone(&seen) as Arc<dyn Emit>;
    let mut task = tokio::spawn(run(config.clone(), emit, shutdown, status_tx));
    let (state, facts) = tokio::select! {
        sessions = both(&mut opened) => sessions,
        end = &mut task => panic!("{end:?}"),
    };
    let beat = facts.beat(BOOT);
    (Agent { state, facts, status, stop, task, seen, beat }, config)
}

impl Agent {
    async fn end(self) {
        self.beat.abort();
        self.stop.send(()).unwrap();
        tokio::time::timeout(Duration::from_secs(10), self.task).await.unwrap().unwrap().unwrap();
    }
}

fn receiver(ns: &Ns, address: &str) -> UdpSocket {
    let socket = ns.run(|| UdpSocket::bind(address).unwrap());
    socket.set_read_timeout(Some(Duration::from_millis(700))).unwrap();
    socket
}

/// Sends a datagram from a pod, twice since the first may wait for a neighbour.
fn send(pod: &Ns, to: &str) {
    let socket = pod.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    for _ in 0..2 {
        socket.send_to(b"tide", to).unwrap();
    }
}

/// Throws away what has arrived.
fn drain(socket: &UdpSocket) {
    socket.set_nonblocking(true).unwrap();
    while socket.recv(&mut [0; 2048]).is_ok() {}
    socket.set_nonblocking(false).unwrap();
}

/// Whether a VXLAN packet with our payload for this port arrives at the gateway's node.
fn steered(tunnel: &UdpSocket, port: u16) -> bool {
    let mut buffer = [0; 2048];
    while let Ok(n) = tunnel.recv(&mut buffer) {
        // VXLAN 8, Ethernet 14, IPv4 20, then UDP ports.
        let inner = &buffer[8..n];
        if n >= 50 && inner.ends_with(b"tide") && inner[14 + 20 + 2..][..2] == port.to_be_bytes() {
            return true;
        }
    }
    false
}

async fn eventually(what: &str, mut f: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !f() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[test]
fn an_isolated_pod_is_held_steered_and_stays_so_without_the_agent_until_cleanup() {
    let w = world();
    w.node.run(|| support::drive(lifecycle(&w)));
}

async fn lifecycle(w: &World) {
    let direct = receiver(&w.world, &format!("{OUTSIDE}:5001"));
    let other = receiver(&w.world, &format!("{OUTSIDE}:5002"));
    let tunnel = receiver(&w.world, "192.0.2.9:8475");
    let hits = |s: &UdpSocket| s.recv(&mut [0; 64]).is_ok();
    send(&w.isolated, &format!("{OUTSIDE}:5001"));
    assert!(hits(&direct), "nobody guards yet");
    drain(&direct);

    let (mut agent, _) = start(w).await;
    assert!(!agent.status.borrow().ready);
    agent.facts.say(FactsBatch { boot_id: BOOT, sequence: 1, snapshot: true, ..FactsBatch::default() }).await;
    agent.state.say(snapshot(1, &state("n2", 0))).await;
    assert_eq!(agent.state.acked(1).await, None);
    eventually("ready", || *agent.status.borrow() == Status { ready: true, conditions: vec![] }).await;

    // Not allowed, untouched, allowed.
    send(&w.isolated, &format!("{OUTSIDE}:5001"));
    assert!(!hits(&direct) && !steered(&tunnel, 5001));
    send(&w.untouched, &format!("{OUTSIDE}:5001"));
    assert!(hits(&direct));
    let sent = Instant::now();
    agent.facts.say(facts(2, 5001)).await;
    assert_eq!(agent.facts.acked(2).await, None);
    assert!(sent.elapsed() < Duration::from_millis(500), "a DNS reply waits for this: {:?}", sent.elapsed());
    send(&w.isolated, &format!("{OUTSIDE}:5001"));
    assert!(steered(&tunnel, 5001), "the first packet after the ack works");
    send(&w.isolated, &format!("{OUTSIDE}:5002"));
    assert!(!hits(&other) && !steered(&tunnel, 5002));

    // The drop is an event with its pod's name.
    let denied = |e: &Event| {
        e.reason == Reason::NotAllowed
            && e.who.as_ref().is_some_and(|w| &*w.pod == "isolated" && &*w.namespace == "ns")
            && matches!(e.what, What::Packet { hook: "pod_egress", protocol: 17, destination, .. } if destination.port() == 5002)
    };
    eventually("the event", || agent.seen.0.lock().unwrap().iter().any(denied)).await;

    // Somebody takes a program away: it comes back.
    let index = w.node.ip("-o link show pod0");
    let name = format!("pod_egress-{}", index.split(':').next().unwrap());
    let layouts = std::fs::read_dir(&w.pins).unwrap().flatten();
    let pin = layouts.map(|d| d.path().join("links").join(&name)).find(|p| p.exists()).expect("a pin");
    std::fs::remove_file(&pin).unwrap();
    eventually("the program is attached again", || pin.exists()).await;

    // Netfilter holds the second half.
    eventually("the guard", || w.node.sh("nft list tables").contains("inet tidegate")).await;
    eventually("the guard's set", || w.node.sh("nft list set inet tidegate isolated4").contains("10.0.0.2")).await;

    // A new pod is attached as soon as its route is there.
    let late = Ns::new();
    let mut bigger = state("n2", 0);
    let endpoint = bigger.endpoints[&ip("10.0.0.2")].clone();
    bigger.endpoints.insert(ip("10.0.0.4"), Endpoint { pod: "late".into(), ..endpoint });
    let (set, delete) = state("n2", 0).diff(&bigger);
    agent.state.say(StateBatch { snapshot: false, set, delete, ..snapshot(2, &bigger) }).await;
    assert_eq!(agent.state.acked(2).await, None);
    eventually("a condition names the pod", || !agent.status.borrow().conditions.is_empty()).await;
    w.node.cable("pod2", &late, "eth0");
    w.node.ip("addr add 10.0.0.1/32 dev pod2");
    w.node.ip("route add 10.0.0.4/32 dev pod2");
    late.ip("addr add 10.0.0.4/32 dev eth0");
    late.ip("route add 10.0.0.1 dev eth0");
    late.ip("route add default via 10.0.0.1");
    eventually("the new pod is found", || agent.status.borrow().conditions.is_empty()).await;
    send(&late, &format!("{OUTSIDE}:5001"));
    assert!(steered(&tunnel, 5001));

    // Without the agent everything stands. (After two seconds without heartbeats misses are steered too.)
    agent.end().await;
    drain(&direct);
    send(&w.isolated, &format!("{OUTSIDE}:5001"));
    assert!(steered(&tunnel, 5001));
    assert!(!hits(&direct));
    assert!(w.node.sh("nft list tables").contains("inet tidegate"));

    // The next one adopts what is there.
    let (mut agent, config) = start(w).await;
    send(&w.isolated, &format!("{OUTSIDE}:5001"));
    assert!(steered(&tunnel, 5001), "before the first snapshot the old state holds");
    agent.state.say(snapshot(1, &bigger)).await;
    assert_eq!(agent.state.acked(1).await, None);
    // Heartbeats alone do not say that what was learnt meanwhile is here.
    tokio::time::sleep(Duration::from_millis(500)).await;
    send(&w.isolated, &format!("{OUTSIDE}:5002"));
    assert!(steered(&tunnel, 5002), "a miss is the gateway's to judge until the facts are here");
    // The gateway knows nothing, as its next one might: it hears what the kernel holds all the same, until it stands by it.
    agent.facts.say(FactsBatch { boot_id: BOOT, sequence: 1, snapshot: true, ..FactsBatch::default() }).await;
    assert_eq!(agent.facts.acked(1).await, None);
    let seen = agent.facts.seen.clone();
    eventually("the fact that an earlier agent wrote", || seen.borrow().orphans == [(SCOPE, ip(OUTSIDE))]).await;
    agent.facts.say(facts(2, 5001)).await;
    assert_eq!(agent.facts.acked(2).await, None);
    eventually("the gateway stands by it", || seen.borrow().orphans.is_empty()).await;
    eventually("misses are dropped", || {
        drain(&tunnel);
        send(&w.isolated, &format!("{OUTSIDE}:5002"));
        !steered(&tunnel, 5002)
    })
    .await;
    match w.node.run(|| cleanup(&config)) {
        Err(AgentError::Datapath(tidegate_ebpf::Error::Busy(_))) => {}
        other => panic!("a running agent is not cleaned up behind its back: {other:?}"),
    }
    agent.end().await;

    drain(&direct);
    w.node.run(|| cleanup(&config).unwrap());
    send(&w.isolated, &format!("{OUTSIDE}:5001"));
    assert!(hits(&direct), "the pod is as if there had never been an agent");
    assert!(!w.node.sh("nft list tables").contains("tidegate"));
    assert!(!w.node.ip("link").contains("tgn"));
    assert!(!w.pins.exists());
    w.node.run(|| cleanup(&config).unwrap());
}

#[test]
fn a_plugged_gateway_gets_its_pods_and_holds_its_addresses() {
    let w = world();
    let inside = Ns::new();
    w.node.run(|| support::drive(plugged(&w, &inside)));
}

fn hand_over(config: &Config, inside: &Ns, addresses: &str) -> UnixStream {
    let stream = UnixStream::connect(&config.socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let line = format!("{{\"gateway\":\"gw-a\",\"tunnelMtu\":1400,\"device\":\"lo\",\"static\":[{addresses}]}}\n");
    let fds = [inside.fd().as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    let io = [IoSlice::new(line.as_bytes())];
    sendmsg::<()>(stream.as_raw_fd(), &io, &rights, MsgFlags::MSG_NOSIGNAL, None).unwrap();
    let mut answer = String::new();
    BufReader::new(&stream).read_line(&mut answer).unwrap();
    assert_eq!(answer.trim(), r#"{"plugged":true,"tgpMtu":1400}"#);
    stream
}

async fn plugged(w: &World, inside: &Ns) {
    let (address, mut opened) = serve(&w.ca.sign("gw-b.gateway.tidegate"), "127.0.0.1:0").await;
    let (mut agent, config) = start_with(w, vec![GatewayAddress { name: "gw-b".into(), address }]).await;
    let (mut successor, _successor_facts) = both(&mut opened).await;
    agent.facts.say(facts(1, 5001)).await;
    let ready = config.socket.clone();
    eventually("the socket", || ready.exists()).await;
    let mut lease = hand_over(&config, inside, "\"203.0.113.10\"");
    agent.state.say(snapshot(1, &state("n1", 1))).await;
    assert_eq!(agent.state.acked(1).await, None);
    assert_eq!(agent.facts.acked(1).await, None);

    // What the pod sends arrives in the gateway's namespace as the pod sent it.
    inside.sh("for d in all tgp tga; do echo 0 > /proc/sys/net/ipv4/conf/$d/rp_filter; done");
    inside.ip(&format!("addr add {OUTSIDE}/32 dev lo"));
    inside.ip("addr add 203.0.113.10/32 dev tga");
    inside.ip("route add 10.0.0.0/24 dev tgp");
    inside.ip("route add default dev tga");
    let answering = receiver(inside, &format!("{OUTSIDE}:5001"));
    let pod = receiver(&w.isolated, "0.0.0.0:0");
    pod.send_to(b"tide", format!("{OUTSIDE}:5001")).unwrap();
    let mut buffer = [0; 64];
    let (n, from) = answering.recv_from(&mut buffer).expect("steered into the gateway");
    assert_eq!((&buffer[..n], from.ip()), (&b"tide"[..], ip("10.0.0.2")));
    answering.send_to(b"back", from).unwrap();
    let (n, from) = pod.recv_from(&mut buffer).expect("an answer from the original destination");
    assert_eq!((&buffer[..n], from.ip()), (&b"back"[..], ip(OUTSIDE)));

    // The egress address answers ARP and takes packets in and out, while renewals come.
    w.world.ip("route add 203.0.113.10/32 dev eth0");
    let egress = receiver(inside, "203.0.113.10:7000");
    let world = receiver(&w.world, "192.0.2.9:0");
    let mut renewals = 0;
    let arrived = {
        let mut arrived = false;
        for _ in 0..20 {
            lease.write_all(b"{\"renew\":true,\"static\":[\"203.0.113.10\"]}\n").unwrap();
            renewals += 1;
            world.send_to(b"in", "203.0.113.10:7000").unwrap();
            if egress.recv(&mut buffer).is_ok() {
                arrived = true;
                break;
            }
        }
        arrived
    };
    assert!(arrived, "after {renewals} renewals");
    egress.send_to(b"out", world.local_addr().unwrap()).unwrap();
    let (n, from) = world.recv_from(&mut buffer).expect("out by the uplink");
    assert_eq!((&buffer[..n], from), (&b"out"[..], "203.0.113.10:7000".parse().unwrap()));

    // A higher epoch that names another gateway ends the lease although renewals come.
    let mut moved = state("n1", 1);
    moved.scopes.insert(SCOPE, Scope { owner: "gw-b".into(), epoch: 2, pair: 1, standbys: vec![] });
    successor.say(StateBatch { gateway: "gw-b".into(), ..snapshot(1, &moved) }).await;
    assert_eq!(successor.acked(1).await, None);
    let mut reached = || {
        drain(&egress);
        lease.write_all(b"{\"renew\":true,\"static\":[\"203.0.113.10\"]}\n").unwrap();
        world.send_to(b"in", "203.0.113.10:7000").unwrap();
        egress.recv(&mut [0; 64]).is_ok()
    };
    assert!(!reached());
    // And it comes back with a higher one.
    let mut back = state("n1", 1);
    back.scopes.insert(SCOPE, Scope { owner: "gw-a".into(), epoch: 3, pair: 1, standbys: vec![] });
    agent.state.say(snapshot(2, &back)).await;
    assert_eq!(agent.state.acked(2).await, None);
    eventually("the address is held again", &mut reached).await;

    // The connection ends: the address is let go, the devices stay.
    drop(lease);
    eventually("the address is let go", || {
        drain(&egress);
        world.send_to(b"in", "203.0.113.10:7000").unwrap();
        egress.recv(&mut [0; 64]).is_err()
    })
    .await;
    let before = inside.ip("-o link show tgp");
    let again = hand_over(&config, inside, "");
    assert_eq!(inside.ip("-o link show tgp"), before);
    drop(again);

    // Another gateway's name is refused.
    let stranger = UnixStream::connect(&config.socket).unwrap();
    stranger.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let fds = [inside.fd().as_raw_fd()];
    let line = b"{\"gateway\":\"gw-z\",\"tunnelMtu\":1400,\"static\":[]}\n";
    sendmsg::<()>(
        stranger.as_raw_fd(),
        &[IoSlice::new(line)],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    )
    .unwrap();
    let mut answer = String::new();
    BufReader::new(&stranger).read_line(&mut answer).unwrap();
    assert!(answer.contains("not in the agent's configuration"), "{answer}");
    agent.end().await;
    w.node.run(|| cleanup(&config).unwrap());
    assert!(!inside.ip("link").contains("tgp"));
}
