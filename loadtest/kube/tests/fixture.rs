//! The fixture itself: it starts, in parallel with itself, and leaves nothing behind.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tidegate_kube::Cluster;

fn is_alive(pid: u32) -> bool {
    // A zombie has no executable any more.
    std::fs::read_link(format!("/proc/{pid}/exe")).is_ok()
}

/// Whether a condition holds within 10 s.
fn soon(mut holds: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        if holds() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    false
}

#[test]
fn two_at_once_know_nothing_of_each_other_and_leave_nothing() {
    let (a, b) = std::thread::scope(|s| {
        let a = s.spawn(Cluster::start);
        let b = s.spawn(Cluster::start);
        (a.join().unwrap().unwrap(), b.join().unwrap().unwrap())
    });
    assert_ne!(a.url(), b.url());
    a.kubectl(&["create", "namespace", "only-a"], "").unwrap().success().unwrap();
    assert!(a.kubectl(&["get", "namespace", "only-a"], "").unwrap().ok);
    let missing = b.kubectl(&["get", "namespace", "only-a"], "").unwrap();
    assert!(!missing.ok && missing.stderr.contains("NotFound"), "{missing}");

    // RBAC is on: a stranger may do nothing.
    let refused = a.kubectl(&["get", "pods", "--as", "stranger"], "").unwrap();
    assert!(refused.stderr.contains("Forbidden"), "{refused}");
    // Services that name the API server are there, for those who watch them.
    let slices = a.kubectl(&["get", "endpointslices", "kubernetes", "-o", "jsonpath={.endpoints[0].addresses}"], "");
    assert_eq!(slices.unwrap().success().unwrap(), r#"["192.0.2.1"]"#);

    for cluster in [a, b] {
        let (pids, folder) = (cluster.pids(), cluster.folder().to_owned());
        assert_eq!(pids.len(), 2);
        assert!(pids.iter().all(|p| is_alive(*p)) && folder.join("etcd").exists());
        drop(cluster);
        assert!(!pids.iter().any(|p| is_alive(*p)) && !folder.exists());
    }
}

#[test]
fn an_outage_ends_with_everything_still_there() {
    let cluster = Cluster::start().unwrap();
    cluster.kubectl(&["create", "namespace", "stays"], "").unwrap().success().unwrap();
    cluster.stop_api_server();
    assert!(!cluster.kubectl(&["get", "namespaces"], "").unwrap().ok);

    // One that cannot start says why.
    let keys = cluster.folder().join("tokens.pub");
    let good = std::fs::read(&keys).unwrap();
    std::fs::write(&keys, "no key").unwrap();
    let why = cluster.start_api_server().unwrap_err().to_string();
    assert!(why.contains("the end of kube-apiserver's log") && why.contains("public key"), "{why}");

    std::fs::write(&keys, good).unwrap();
    cluster.start_api_server().unwrap();
    cluster.kubectl(&["get", "namespace", "stays"], "").unwrap().success().unwrap();
}

/// Not a test of its own: what the next one runs and kills.
#[test]
#[ignore = "is started by servers_end_with_a_process_that_is_killed"]
fn a_process_that_will_be_killed() {
    // From a thread that ends: servers live as long as the process, not as the thread that asked for them.
    let cluster = std::thread::spawn(Cluster::start).join().unwrap().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert!(cluster.pids().iter().all(|p| is_alive(*p)));
    println!("up {} {:?}", cluster.folder().display(), cluster.pids());
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn servers_end_with_a_process_that_is_killed() {
    use std::io::{BufRead, BufReader};
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", "a_process_that_will_be_killed"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let up = lines.map_while(Result::ok).find_map(|l| Some(l.split_once("up /")?.1.to_owned()));
    child.kill().unwrap();
    child.wait().unwrap();
    let up = up.expect("the cluster came up");
    let (folder, pids) = up.split_once(" [").unwrap();
    let pids: Vec<u32> = pids.trim_end_matches(']').split(", ").map(|p| p.parse().unwrap()).collect();
    assert_eq!(pids.len(), 2);
    assert!(soon(|| !pids.iter().any(|p| is_alive(*p))), "{pids:?} live on");

    // The next cluster removes the folder that could not be removed.
    let folder = format!("/{folder}");
    assert!(Path::new(&folder).exists());
    drop(Cluster::start().unwrap());
    assert!(!Path::new(&folder).exists());
}
