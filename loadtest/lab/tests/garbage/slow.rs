//! Clients that hold what they were given: connections without a word, half a message, a byte now and then.
//!
//! The gateways may open few files, so that what is not bounded shows.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use rustls_pki_types::ServerName;
use socket2::{Domain, Socket, Type};
use tidegate_lab::Lab;
use tidegate_lab::family::Family;
use tidegate_lab::lab::wait_for;
use tidegate_lab::probe::{curl, dig};

use crate::bytes::{call, control};
use crate::{BILLING, GATEWAYS, address, unaffected, unaffected_are, up_as};

/// The files that a gateway may have open.
const FILES: u32 = 1024;
/// The longest that anything waits for a client, by its own limits 10 s, with some patience for a busy machine.
const LET_GO: Duration = Duration::from_secs(20);

/// The product, with few files to open. The limit that may be raised is lower still: the product raises it.
fn with_few_files(folder: &Path) -> PathBuf {
    let lab: PathBuf = env!("CARGO_BIN_EXE_tidegate-lab").into();
    let beside = lab.with_file_name("tidegate");
    let real = std::env::var_os("TIDEGATE_BIN").map_or(beside, PathBuf::from);
    let path = folder.join("tidegate");
    std::fs::write(&path, format!("#!/bin/sh\nulimit -Sn 256\nulimit -Hn {FILES}\nexec '{}' \"$@\"\n", real.display()))
        .unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Connections from a place, each with some first bytes; those that were refused are left out.
fn open(lab: &Lab, place: &str, to: SocketAddr, bytes: &[u8], count: usize) -> Vec<TcpStream> {
    let connect = || {
        let mut silent = 0;
        let mut one = |_| {
            // Where nobody answers, it is no use to go on for an hour.
            let tried = (silent < 3).then(|| TcpStream::connect_timeout(&to, Duration::from_secs(2)))?;
            silent += usize::from(tried.as_ref().is_err_and(|e| e.kind() == ErrorKind::TimedOut));
            let mut stream = tried.ok()?;
            stream.write_all(bytes).ok()?;
            stream.set_nonblocking(true).ok()?;
            Some(stream)
        };
        (0..count).filter_map(&mut one).collect()
    };
    lab.place(place).unwrap().within(connect).unwrap()
}

/// Whether the other side has let go of a connection.
fn is_closed(stream: &mut TcpStream) -> bool {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(e) => return e.kind() != ErrorKind::WouldBlock,
        }
    }
}

/// The first flight of a TLS client.
fn hello(name: &'static str) -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = builder.with_root_certificates(RootCertStore::empty()).with_no_client_auth();
    let mut client = ClientConnection::new(Arc::new(config), ServerName::try_from(name).unwrap()).unwrap();
    let mut out = Vec::new();
    client.write_tls(&mut out).unwrap();
    out
}

/// How many files the gateway that has the most has open.
fn files(lab: &Lab) -> usize {
    let of = |name| std::fs::read_dir(format!("/proc/{}/fd", lab.process(name).unwrap().pid)).unwrap().count();
    GATEWAYS.into_iter().map(of).max().unwrap()
}

#[track_caller]
fn let_go(what: &str, held: &mut [TcpStream]) {
    let mut open = 0;
    let all = wait_for(LET_GO, || {
        open = held.iter_mut().filter_map(|s| (!is_closed(s)).then_some(())).count();
        (open == 0).then_some(())
    });
    assert!(all.is_some(), "{what}: {open} of {} connections are still held", held.len());
}

/// One tenant and a pod of nobody's hold all that they get, everywhere: others see nothing of it, and it ends.
#[test]
fn slow_clients_hold_nothing_that_others_need() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (_one, lab, before) = up_as("slow", Some(with_few_files(folder.path())));
    let at = |pod: &str, port| SocketAddr::new(address(&lab, pod, Family::V4), port);
    let (gateway, dns) = ("tidegate-system/gw-a", at("kube-system/coredns", 53));
    let (api, www) = (Ipv4Addr::new(198, 51, 100, 10), Ipv4Addr::new(198, 51, 100, 11));
    for name in ["api.example.com", "www.example.com"] {
        assert!(!dig(&lab.pod("shop/web"), name, "A", &[]).answers.is_empty());
    }
    let mark = lab.mark();
    let hello = hello("api.example.com");
    let quiet = files(&lab);

    // Silent at the control port, and at the admin port after half a request.
    let control_port = open(&lab, "shop/web", at(gateway, 7443), b"", 700);
    let more = open(&lab, "untouched/app", at(gateway, 7443), &hello[..100], 700);
    let admin = open(&lab, "shop/web", at(gateway, 9090), b"GET /metrics HT", 100);
    // DNS over TCP: a length and less than that.
    let questions = open(&lab, "shop/web", dns, &[1, 0, 7], 400);
    // Half a hello, and whole hellos whose handshake never goes on: two sockets each.
    let half = open(&lab, "shop/web", SocketAddr::new(api.into(), 443), &hello[..50], 100);
    let whole = open(&lab, "shop/web", SocketAddr::new(api.into(), 443), &hello, 700);
    // First packets whose answers never arrive.
    let drop_answers = format!(
        "add table inet deaf; add chain inet deaf in {{ type filter hook input priority filter; }}; \
         add rule inet deaf in ip saddr {www} drop"
    );
    assert_eq!(lab.pod("shop/web").run(&["nft", &drop_answers]).status, 0);
    let deaf: Vec<Socket> = lab
        .pod("shop/web")
        .within(|| {
            let one = |_| {
                let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None).ok()?;
                // In progress, and so for good.
                let _ = socket.connect(&SocketAddr::new(www.into(), 443).into());
                Some(socket)
            };
            (0..3000).filter_map(one).collect()
        })
        .unwrap();
    assert_eq!(deaf.len(), 3000);

    let used = files(&lab);
    println!("{quiet} files before, {used} while {} and more are held", whole.len());
    assert!(used < FILES as usize - 64, "{used} files: some are left for others");
    // The quota is the namespace's: those of the same one have to share it.
    unaffected_are(&[BILLING], &lab, &before, "all that is held");
    for more in [&[][..], &["+tcp"]] {
        let seen = dig(&lab.pod("billing/pay"), "fresh.bank.example.com", "A", more);
        assert!(!seen.status.is_empty(), "billing asks while shop holds DNS connections");
        let seen = dig(&lab.pod("billing/pay"), "bank.example.com", "A", more);
        assert_eq!(seen.status, "NOERROR", "{}", seen.text());
    }
    let fetched =
        curl(&lab.place("node-1").unwrap(), Family::V4, &format!("http://{}/healthz", at(gateway, 9090)), &[]);
    assert_eq!(fetched.exit, 0, "a scrape from elsewhere: {}", fetched.error);
    // A node comes in at the control port: its call is taken, as it is not cut before it says its hello.
    let mut node = control(&lab, "gw-a", Some("node-2.node.tidegate"));
    node.write_all(&call("State")).unwrap();
    node.flush().unwrap();
    let mut first = [0; 9];
    node.read_exact(&mut first).unwrap();
    assert_eq!(first[3], 4, "settings of a server that speaks HTTP/2");

    // Who trickles is no better off than who is silent.
    let started = Instant::now();
    let trickle = |to: SocketAddr, place: &str, head: &[u8]| {
        let mut stream = open(&lab, place, to, head, 1);
        let ended = wait_for(LET_GO, || {
            std::thread::sleep(Duration::from_millis(500));
            (stream.is_empty() || stream[0].write_all(&[0]).is_err() || is_closed(&mut stream[0])).then_some(())
        });
        assert!(ended.is_some(), "{to}: a byte now and then holds a connection");
    };
    std::thread::scope(|scope| {
        scope.spawn(|| trickle(at("kube-system/coredns", 53), "billing/pay", &[15, 0, 7]));
        scope.spawn(|| trickle(SocketAddr::new(api.into(), 443), "billing/pay", &hello[..60]));
        scope.spawn(|| trickle(at(gateway, 7443), "annotated/app", &hello[..60]));
        scope.spawn(|| trickle(at(gateway, 9090), "annotated/app", b"GET /"));
    });
    assert!(started.elapsed() < LET_GO);
    for (what, mut held) in [
        ("control", control_port),
        ("half hellos at control", more),
        ("admin", admin),
        ("DNS", questions),
        ("relay", half),
    ] {
        let_go(what, &mut held);
    }
    for reason in ["quota", "hello-timeout"] {
        let fits = |r: &serde_json::Value| r["kind"] == "open" && r["namespace"] == "shop" && r["reason"] == reason;
        assert!(lab.wait_audit(&GATEWAYS, &mark, fits).is_some(), "refused connections say {reason}");
    }
    drop((whole, deaf));
    assert_eq!(lab.pod("shop/web").run(&["nft", "delete table inet deaf"]).status, 0);
    let back = wait_for(Duration::from_secs(10), || (files(&lab) < quiet + 40).then_some(()));
    assert!(back.is_some(), "{} files afterwards, {quiet} before", files(&lab));
    unaffected(&lab, &before, "slow clients");
}
