//! Gateways behind a DNS name: the system's resolver, a DNS server and mutual TLS, in namespaces of the test's own.
// Helpers are tests too.
#![allow(clippy::unwrap_used)]

#[path = "support/gateway.rs"]
#[allow(dead_code)]
mod gateway;

use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use gateway::{Authority, Opened, serve};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tidegate_agent::config::Tls;
use tidegate_agent::find::{Names, find, resolve};
use tidegate_agent::stream::{Client, State};
use tidegate_identity::{Files, Paths, Source};
use tidegate_proto::{Seen, StateBatch};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

const WAIT: Duration = Duration::from_secs(20);
const PORT: u16 = 7443;
const EVERY: Duration = Duration::from_millis(500);

/// The addresses of every name; none: the server fails.
type Zone = Arc<Mutex<Option<Vec<Ipv4Addr>>>>;

/// Answers A with the zone, and everything else with no data.
fn dns(zone: Zone) {
    let socket = UdpSocket::bind("127.0.0.53:53").unwrap();
    std::thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((n, peer)) = socket.recv_from(&mut query) {
            let labels = query[12..n].iter().position(|b| *b == 0).unwrap();
            let end = 12 + labels + 5;
            let is_a = query[end - 4..end - 2] == [0, 1];
            let zone = zone.lock().unwrap().clone();
            let rcode = if zone.is_some() { 0 } else { 2 };
            let addresses = zone.filter(|_| is_a).unwrap_or_default();
            let mut reply = query[..end].to_vec();
            reply[2..12].copy_from_slice(&[0x81, 0x80 | rcode, 0, 1, 0, addresses.len() as u8, 0, 0, 0, 0]);
            for a in addresses {
                reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4]);
                reply.extend(a.octets());
            }
            let _ = socket.send_to(&reply, peer);
        }
    });
}

/// The thread gets a loopback and a resolver of its own.
fn isolate(folder: &Path) {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("tests need root");
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).unwrap();
    let file = folder.join("resolv.conf");
    std::fs::write(&file, "nameserver 127.0.0.53\noptions timeout:1 attempts:1\n").unwrap();
    mount(Some(&file), "/etc/resolv.conf", none, MsFlags::MS_BIND, none).unwrap();
    assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
}

fn snapshot(gateway: &str) -> StateBatch {
    StateBatch { gateway: gateway.into(), boot_id: 5, sequence: 1, snapshot: true, ..StateBatch::default() }
}

/// Waits for the agent's `State` stream at a gateway, and says something on it.
async fn speak(opened: &mut mpsc::Receiver<Opened>, name: &str) -> gateway::Session<tidegate_proto::wire::StateUpdate> {
    let Opened::State(session) = timeout(WAIT, opened.recv()).await.expect(name).unwrap() else { panic!() };
    session.say(snapshot(name)).await;
    session
}

async fn next(rx: &mut mpsc::Receiver<State>) -> (String, bool) {
    match timeout(WAIT, rx.recv()).await.expect("in time").unwrap() {
        State::Update { gateway, .. } => (gateway.to_string(), true),
        State::Away { gateway } => (gateway.to_string(), false),
    }
}

async fn follow(ca: Authority, zone: Zone) {
    let Tls { certificate, key, ca: roots } = ca.sign("n1.node.tidegate");
    let paths = Paths { certificate, key, ca: roots };
    let identity = Source::Files(Arc::new(parking_lot::Mutex::new(Files::new(paths))));
    let (tx, mut rx) = mpsc::channel(16);
    let (names, (targets, known)) = (Names::default(), watch::channel(vec![]));
    let streams = {
        let names = names.clone();
        move |address| {
            let client = Client {
                node: "n1".into(),
                boot: 1,
                address,
                name: None,
                names: names.clone(),
                identity: identity.clone(),
                seen: watch::channel(Seen::default()).1,
            };
            client.state(tx.clone())
        }
    };
    let task = tokio::spawn(find(EVERY, || resolve("gateways.test.".into(), PORT), names, targets, streams));

    // Two gateways; what they are called is in their certificates. The second has two addresses, and is one gateway.
    let at = |last: u8| Ipv4Addr::new(127, 0, 1, last);
    let listen = |last: u8| format!("{}:{PORT}", at(last));
    let (_, mut a) = serve(&ca.sign("gw-a.gateway.tidegate"), &listen(1)).await;
    let both = ca.sign("gw-b.gateway.tidegate");
    let ((_, mut b), (_, mut b_too)) = (serve(&both, &listen(2)).await, serve(&both, &listen(3)).await);
    *zone.lock().unwrap() = Some(vec![at(1), at(2)]);
    let (a_says, b_says) = (speak(&mut a, "gw-a").await, speak(&mut b, "gw-b").await);
    let mut up = [next(&mut rx).await, next(&mut rx).await];
    up.sort();
    assert_eq!(up, [("gw-a".into(), true), ("gw-b".into(), true)]);
    assert_eq!(known.borrow().len(), 2);
    *zone.lock().unwrap() = Some(vec![at(1), at(2), at(3)]);
    sleep(EVERY * 3).await;
    assert_eq!(known.borrow().len(), 3);
    assert!(b_too.try_recv().is_err(), "one stream to a gateway");
    // Its first address fails: the other one serves.
    *zone.lock().unwrap() = Some(vec![at(1), at(3)]);
    drop((b, b_says));
    assert_eq!(next(&mut rx).await, ("gw-b".into(), false));
    let b_says = speak(&mut b_too, "gw-b").await;
    assert_eq!(next(&mut rx).await, ("gw-b".into(), true));

    // DNS fails: streams stay, and come back to addresses that are known.
    *zone.lock().unwrap() = None;
    drop(a_says);
    assert_eq!(next(&mut rx).await, ("gw-a".into(), false));
    let _a_says = speak(&mut a, "gw-a").await;
    assert_eq!(next(&mut rx).await, ("gw-a".into(), true));
    // Somebody who is no gateway listens at an address of the name: he hears nothing.
    let (_, mut liar) = serve(&Authority::new().sign("gw-c.gateway.tidegate"), &listen(4)).await;
    let (_, mut node) = serve(&ca.sign("n9.node.tidegate"), &listen(5)).await;
    *zone.lock().unwrap() = Some((1..=5).map(at).collect());
    sleep(EVERY * 4).await;
    assert!(liar.try_recv().is_err() && node.try_recv().is_err());
    assert!(!b_says.down.is_closed());
    task.abort();
}

#[test]
fn gateways_are_found_by_name_and_followed() {
    let thread = std::thread::spawn(|| {
        let ca = Authority::new();
        isolate(ca.folder());
        let zone = Zone::default();
        dns(zone.clone());
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(follow(ca, zone));
    });
    thread.join().unwrap();
}
