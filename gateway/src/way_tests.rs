use std::sync::Mutex;
use std::time::Duration;

use tidegate_agent::plug::{self, Plugged, Request};
use tokio::sync::mpsc;

use super::*;

/// A node's agent behind its real socket: it holds what is asked for if `willing`, and notes each renewal.
struct Agent {
    willing: Arc<AtomicBool>,
    renewals: Arc<Mutex<Vec<Vec<IpAddr>>>>,
    /// Connections that it ended, or that ended.
    gone: Arc<Mutex<usize>>,
    socket: PathBuf,
    _folder: tempfile::TempDir,
}

fn agent(willing: bool) -> Agent {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("agent.sock");
    let agent = Agent {
        willing: Arc::new(AtomicBool::new(willing)),
        renewals: Arc::default(),
        gone: Arc::default(),
        socket: socket.clone(),
        _folder: folder,
    };
    let (willing, renewals, gone) = (agent.willing.clone(), agent.renewals.clone(), agent.gone.clone());
    let (up, is_up) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (tx, mut rx) = mpsc::channel(4);
            tokio::spawn(plug::serve(plug::listen(&socket).unwrap(), tx));
            up.send(()).unwrap();
            let hold = |asked: Vec<IpAddr>| if willing.load(Ordering::Relaxed) { asked } else { Vec::new() };
            while let Some(request) = rx.recv().await {
                match request {
                    Request::Plug { hello, answer, .. } => {
                        let _ = answer.send(Ok(Plugged { mtu: hello.tunnel_mtu, held: hold(hello.r#static) }));
                    }
                    Request::Renew { addresses, held, .. } => {
                        renewals.lock().unwrap().push(addresses.clone());
                        let _ = held.send(hold(addresses));
                    }
                    Request::Gone { .. } => *gone.lock().unwrap() += 1,
                }
            }
        });
    });
    is_up.recv().unwrap();
    agent
}

fn pair(last: u8) -> HeldPair {
    HeldPair { index: last, ipv4: Some([203, 0, 113, last].into()), ipv6: None }
}

fn keeper(agent: &Agent, core: SyncSender<ToCore>, pairs: &watch::Sender<Vec<HeldPair>>) -> Keeper {
    Keeper {
        gateway: "gw-a".into(),
        socket: agent.socket.clone(),
        device: "eth0".into(),
        dns_ports: vec![53],
        relay_port: 15001,
        flow_idle_seconds: 7200,
        flows_per_scope: 1000,
        pairs: pairs.subscribe(),
        applied: Arc::default(),
        lost: Arc::default(),
        refused: Box::new(|_| {}),
        core,
        readiness: Readiness::default(),
        full_pass: Duration::from_secs(30),
        stop: Arc::default(),
    }
}

fn within(limit: Duration, mut what: impl FnMut() -> bool) -> bool {
    let until = Instant::now() + limit;
    while !what() {
        if Instant::now() > until {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

#[test]
fn what_the_agent_does_not_hold_yet_is_not_in_place() {
    let agent = agent(false);
    let (core, inbox) = std::sync::mpsc::sync_channel(64);
    let (pairs, _) = watch::channel(vec![pair(10)]);
    let keeper = keeper(&agent, core, &pairs);
    let (applied, readiness, stop) = (keeper.applied.clone(), keeper.readiness.clone(), keeper.stop.clone());
    let attached = std::thread::spawn(move || {
        let mut n = 0;
        while let Ok(message) = inbox.recv() {
            if let ToCore::Attach { reply } = message {
                n += 1;
                reply.send(Ok(())).unwrap();
            }
        }
        n
    });
    let run = std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let devices = "for d in tgp tga eth0; do ip link add $d type veth peer name $d-peer; done";
        assert!(std::process::Command::new("sh").args(["-c", devices]).status().unwrap().success());
        keeper.run();
    });
    // Rules and program are there, and the agent has been asked again and again.
    assert!(within(Duration::from_secs(20), || agent.renewals.lock().unwrap().len() >= 3));
    assert_eq!(readiness.waiting_for(), ["agent"]);
    assert!(applied.load().is_empty());
    agent.willing.store(true, Ordering::Relaxed);
    assert!(within(Duration::from_secs(2), || **applied.load() == [pair(10)]), "{:?}", applied.load());
    assert!(readiness.waiting_for().is_empty());
    // It is told of others, and does not find them when it renews by and by.
    for last in [30, 10, 30, 10] {
        agent.renewals.lock().unwrap().clear();
        pairs.send_replace(vec![pair(last)]);
        let let_go = || agent.renewals.lock().unwrap().contains(&Vec::new());
        assert!(within(RENEW / 2, let_go), "a failover waits for it");
        assert!(within(Duration::from_secs(20), || **applied.load() == [pair(last)]));
    }
    // The same for one that is new; what is ours no more is let go whatever happens.
    agent.willing.store(false, Ordering::Relaxed);
    agent.renewals.lock().unwrap().clear();
    pairs.send_replace(vec![pair(20)]);
    let last = || agent.renewals.lock().unwrap().last().cloned();
    assert!(within(Duration::from_secs(20), || last() == Some(pair(20).addresses().collect())));
    assert_eq!(agent.renewals.lock().unwrap()[0], [] as [IpAddr; 0]);
    std::thread::sleep(RENEW);
    assert_eq!(**applied.load(), [pair(10)]);
    agent.willing.store(true, Ordering::Relaxed);
    assert!(within(Duration::from_secs(2), || **applied.load() == [pair(20)]), "{:?}", applied.load());
    stop.store(true, Ordering::Relaxed);
    run.join().unwrap();
    assert_eq!(attached.join().unwrap(), 1);
}

#[test]
fn flows_are_forgotten_of_addresses_that_went_elsewhere_alone() {
    std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let sh = |line: &str| assert!(std::process::Command::new("sh").args(["-c", line]).status().unwrap().success());
        sh("ip link set lo up; for n in 10 20 30; do ip addr add 203.0.113.$n/32 dev lo; done");
        // Something has to ask for conntrack.
        load_rules("table inet t {\n chain c {\n type filter hook output priority filter\n ct state new accept\n }\n}")
            .unwrap();
        let flow = |last: u8| {
            let socket = std::net::UdpSocket::bind(std::net::SocketAddr::from(([203, 0, 113, last], 0))).unwrap();
            socket.send_to(b"x", "127.0.0.1:9").unwrap();
        };
        let live = |last: u8| live::addresses().unwrap().contains(&IpAddr::from([203, 0, 113, last]));
        let agent = agent(true);
        let (core, _inbox) = std::sync::mpsc::sync_channel(64);
        let (pairs, _) = watch::channel(vec![pair(10)]);
        let keeper = keeper(&agent, core, &pairs);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let held: Vec<IpAddr> = [10, 20].into_iter().flat_map(|n| pair(n).addresses().collect::<Vec<_>>()).collect();
        let waits = |keeper: &Keeper| keeper.lost.lock().iter().copied().collect::<Vec<_>>();
        [10, 20, 30].into_iter().for_each(flow);
        // The first one is ours again, the second one not yet let go, the third one gone.
        keeper.lost.lock().extend([10, 20, 30].map(|last| IpAddr::from([203, 0, 113, last])));
        runtime.block_on(keeper.forget(&held));
        assert_eq!([10, 20, 30].map(live), [true, true, false]);
        assert_eq!(waits(&keeper), [IpAddr::from([203, 0, 113, 20])]);
        runtime.block_on(keeper.forget(&held[..1]));
        assert_eq!(([10, 20].map(live), waits(&keeper)), ([true, false], vec![]));
        flow(20);
        runtime.block_on(keeper.forget(&held[..1]));
        assert!(live(20), "once is enough");
    })
    .join()
    .unwrap();
}

#[test]
fn the_lease_is_renewed_whatever_takes_long() {
    let agent = agent(true);
    let (core, _inbox) = std::sync::mpsc::sync_channel(64);
    let (pairs, _) = watch::channel(vec![pair(10), pair(20)]);
    let keeper = keeper(&agent, core, &pairs);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let way = keeper.way(TUNNEL_MTU);
        let mut handover = Handover::connect(&agent.socket, "gw-a", TUNNEL_MTU, &way).unwrap();
        assert!(handover.holds(&way.addresses()));
        let long = async {
            tokio::time::sleep(plug::SILENCE + RENEW).await;
            // Another gateway has it now.
            pairs.send_replace(vec![pair(20)]);
            tokio::time::sleep(RENEW / 5).await;
        };
        keeper.holding(&mut handover, &way.addresses(), long).await.unwrap();
        assert_eq!(*agent.gone.lock().unwrap(), 0, "the agent hung up");
    });
    let renewals = agent.renewals.lock().unwrap();
    let (all, left): (Vec<_>, Vec<_>) = renewals.iter().partition(|r| r.len() == 2);
    assert!(all.len() >= 4, "{renewals:?}");
    assert_eq!(left, [&pair(20).addresses().collect::<Vec<_>>()]);
}
