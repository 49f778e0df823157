//! With Kubernetes: what ends or begins anew beneath the product. Lists of which etcd has forgotten the changes, API servers
//! that are replaced, clocks minutes apart, an authority that is rotated: nobody is locked out, and traffic goes on.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "failover/common.rs"]
mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use common::{
    ADDRESSES, CALM, NAMES, PODS, READY, Wire, gaps, kill, learn, log, owner, recorded, status, tcp, under_traffic,
    up_like, wait_owner, wait_recorded,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tidegate_lab::Lab;
use tidegate_lab::family::{FAMILIES, Family};
use tidegate_lab::lab::wait_for;
use tidegate_lab::netns::nft;
use tidegate_lab::probe::{Echo, curl, dig};
use tidegate_lab::story;

static ONE: Mutex<()> = Mutex::new(());
const GATEWAYS: [&str; 2] = ["gw-a", "gw-b"];
/// How soon a change holds everywhere, on a busy machine.
const SOON: Duration = Duration::from_secs(15);
const POLICIES: &str = "/apis/tidegate.dev/v1alpha1/namespaces/shop/egresspolicies";

#[test]
fn lists_servers_and_clocks() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut lab = up_like("variants/kubernetes.yaml", "outages", |_| {});
    learn(&lab, &["tcp.example.com", "www.example.com", "api.example.com"]);
    wait_recorded(&lab, "gw-a", 1);
    the_api_server_is_replaced(&mut lab);
    etcd_has_forgotten_what_changed(&mut lab);
    clocks_are_minutes_apart(&mut lab);
    a_nodes_clock_is_days_wrong(&mut lab);
    a_backup_is_put_back(&mut lab);
    lab.down().unwrap();
}

fn denied(lab: &Lab, pod: &str, name: &str) -> bool {
    dig(&lab.pod(pod), name, "A", &[]).is_denied()
}

#[track_caller]
fn soon(what: &str, holds: impl Fn() -> bool) {
    assert!(wait_for(SOON, || holds().then_some(())).is_some(), "{what} does not come");
}

/// A policy that allows one name to shop's pods.
fn policy(name: &str, allows: &str) -> Value {
    json!({
        "apiVersion": "tidegate.dev/v1alpha1", "kind": "EgressPolicy", "metadata": {"name": name},
        "spec": {"podSelector": {"matchLabels": {"app": "web"}}, "poolRef": {"name": "partner-a"}, "egress": [
            {"name": "one", "toFQDNs": [{"matchName": allows}], "toPorts": [{"protocol": "TCP", "port": 443}]},
        ]},
    })
}

/// Told to end, killed at the end of its grace period and started again, while every watch is open: traffic does not notice, and changes come through.
fn the_api_server_is_replaced(lab: &mut Lab) {
    let before = recorded(lab);
    let (ended, traffic) = under_traffic(lab, &PODS, |lab| {
        let ended = Instant::now();
        // It waits for whoever watches, up to a minute: its grace period ends before.
        lab.signal("kube-apiserver", Signal::SIGTERM, None).unwrap();
        std::thread::sleep(Duration::from_secs(5));
        lab.stop_api_server().unwrap();
        lab.start_api_server().unwrap();
        println!("the API server is back after {:?}", ended.elapsed());
        let back = Instant::now();
        lab.request("POST", POLICIES, &policy("new", "neighbour.example.com")).unwrap();
        soon("a change after it is back", || !denied(lab, PODS[0], "neighbour.example.com"));
        println!("and a change holds {:?} later", back.elapsed());
        ended
    });
    gaps("API server replaced", &traffic, ended, CALM.0, CALM.1);
    assert_eq!(recorded(lab), before);
    lab.request("DELETE", &format!("{POLICIES}/new"), &Value::Null).unwrap();
    soon("its end", || denied(lab, PODS[0], "neighbour.example.com"));
}

/// Drops every packet between gateways' nodes and the API server, and says nothing to either side.
fn cut(lab: &Lab) {
    let nodes = lab.scenario().gateways.iter().map(|g| lab.scenario().node(&g.node).unwrap().ipv4.to_string());
    let nodes = nodes.collect::<Vec<_>>().join(", ");
    let rules = format!(
        "table inet lab-cut {{ chain in {{ type filter hook input priority -300; ip saddr {{ {nodes} }} tcp dport 6443 drop; }};
         chain out {{ type filter hook output priority -300; ip daddr {{ {nodes} }} tcp sport 6443 drop; }}; }}"
    );
    nft(lab.place("control").unwrap().netns(), &rules).unwrap();
}

/// The newest revision of the store: the resourceVersion of a list.
fn revision(lab: &Lab) -> u64 {
    let list = lab.request("GET", "/api/v1/namespaces?limit=1", &Value::Null).unwrap();
    list["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap()
}

/// Has etcd forget all that was before a revision, by its own API.
fn compact(lab: &Lab, revision: u64) {
    let folder = lab.layout().control();
    let file = |name: &str| folder.join(name).display().to_string();
    let out = lab.place("control").unwrap().run(&[
        "curl",
        "-sS",
        "--fail-with-body",
        "--cacert",
        &file("ca.crt"),
        "--cert",
        &file("kube-apiserver.crt"),
        "--key",
        &file("kube-apiserver.key"),
        "-d",
        &json!({"revision": revision.to_string(), "physical": true}).to_string(),
        "https://127.0.0.1:2379/v3/kv/compaction",
    ]);
    assert_eq!(out.status, 0, "{out:?}");
}

/// How often a gateway has read which list again because what it knew was too old.
fn read_again(lab: &Lab, gateway: &str) -> usize {
    let old = |l: &&str| l.contains("the list is read again") && l.contains("too old resource version");
    log(lab, gateway).lines().filter(old).count()
}

/// While no gateway hears the API server, a policy goes and another comes, and etcd forgets that it was so. What the watches
/// go on from is gone (410): the lists are read again, and what they do not have any more is taken away.
fn etcd_has_forgotten_what_changed(lab: &mut Lab) {
    let mut live: Vec<Echo> = FAMILIES.iter().map(|f| Echo::connect(&lab.pod(PODS[0]), tcp(*f)).unwrap()).collect();
    let before: Vec<usize> = GATEWAYS.map(|g| read_again(lab, g)).into();
    let old = revision(lab);
    let (start, traffic) = under_traffic(lab, &PODS, |lab| {
        let start = Instant::now();
        cut(lab);
        lab.request("POST", POLICIES, &policy("new", "neighbour.example.com")).unwrap();
        lab.kubectl(&["delete", "egresspolicy", "revocable", "-n", "shop"]).unwrap();
        lab.annotate("annotated", &[("tidegate.dev/allow", "www.example.com")]).unwrap();
        compact(lab, revision(lab));
        // It would still know the last changes by itself.
        lab.stop_api_server().unwrap();
        lab.start_api_server().unwrap();
        let watch = format!("/api/v1/namespaces?watch=1&resourceVersion={old}");
        let gone = lab.kubectl_with(&["get", "--raw", &watch], "").unwrap();
        assert!(gone.to_string().contains("too old resource version"), "the way back is gone: {gone}");
        nft(lab.place("control").unwrap().netns(), "delete table inet lab-cut").unwrap();
        // A connection attempt whose first packets were dropped is tried again after seconds.
        let late = wait_for(Duration::from_secs(30), || (!denied(lab, PODS[0], "neighbour.example.com")).then_some(()));
        assert!(late.is_some(), "the new policy does not come");
        soon("what is gone is gone", || denied(lab, PODS[0], "revoked.example.com"));
        soon("the annotation", || denied(lab, "annotated/app", "api.example.com"));
        start
    });
    gaps("etcd has forgotten", &traffic, start, CALM.0, CALM.1);
    for (gateway, before) in GATEWAYS.iter().zip(before) {
        let enough = || (read_again(lab, gateway) >= before + 3).then_some(());
        assert!(wait_for(Duration::from_secs(30), enough).is_some(), "{gateway}: {}", read_again(lab, gateway));
        let lists = read_again(lab, gateway) - before;
        println!("{gateway} has read {lists} lists again");
        // Policies, pods, namespaces …, each once.
        assert!(lists <= 20, "{gateway}: {lists}");
    }
    for echo in &mut live {
        echo.say("what nobody changed goes on\n").unwrap();
    }
    lab.request("DELETE", &format!("{POLICIES}/new"), &Value::Null).unwrap();
    let file = "shop-revocable.yaml";
    lab.edit_manifest(file, &lab.manifest(file).unwrap()).unwrap();
    let annotations = lab.scenario().namespaces.iter().find(|n| n.name == "annotated").unwrap().annotations.clone();
    let annotations: Vec<(&str, &str)> = annotations.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    lab.annotate("annotated", &annotations).unwrap();
    soon("the policy", || !denied(lab, PODS[0], "revoked.example.com"));
}

/// Copies a folder, which may be there already.
fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let _ = std::fs::remove_dir_all(to);
    anyhow::ensure!(
        Command::new("cp").arg("-a").args([from, to]).status()?.success(),
        "cannot copy {}",
        from.display()
    );
    Ok(())
}

/// etcd is restored to before the owner died, and a policy came: what it says of owners and versions is older than what both gateways
/// know. Both go by it, the record follows the gateways, and neither stays behind.
fn a_backup_is_put_back(lab: &mut Lab) {
    let backup = lab.layout().control().join("backup");
    lab.with_storage(|stored| copy(stored, &backup)).unwrap();
    let (first, epoch) = recorded(lab);
    let [heir] = GATEWAYS.into_iter().filter(|g| *g != first).collect::<Vec<_>>()[..] else { unreachable!() };
    kill(lab, &first);
    let epoch = wait_recorded(lab, heir, epoch + 1);
    lab.start(&first).unwrap();
    lab.wait_ready(&first, READY).unwrap();
    lab.request("POST", POLICIES, &policy("forgotten", "neighbour.example.com")).unwrap();
    soon("the policy", || !denied(lab, PODS[0], "neighbour.example.com"));
    // Versions are far beyond those of the backup.
    for n in 0..100 {
        let change = json!({"metadata": {"annotations": {"example.com/n": n.to_string()}}});
        lab.request("PATCH", "/api/v1/namespaces/untouched", &change).unwrap();
    }
    let newest = revision(lab);
    let (begun, traffic) = under_traffic(lab, &PODS, |lab| {
        let begun = Instant::now();
        lab.with_storage(|stored| copy(&backup, stored)).unwrap();
        let restored = Instant::now();
        assert!(revision(lab) < newest, "the versions have gone back");
        assert!(lab.request("GET", &format!("{POLICIES}/forgotten"), &Value::Null).is_err());
        soon("the end of what the backup does not have", || denied(lab, PODS[0], "neighbour.example.com"));
        // The pair stays where it is, and that is recorded again.
        let recorded_again = wait_for(Duration::from_secs(30), || (recorded(lab) == owner(lab, heir)).then_some(()));
        assert!(recorded_again.is_some(), "{:?} {:?}", recorded(lab), owner(lab, heir));
        println!("the backup was followed {:?} after the API server was back", restored.elapsed());
        std::thread::sleep(Duration::from_secs(1));
        begun
    });
    gaps("a backup is put back", &traffic, begun, CALM.0, CALM.1);
    assert_eq!(GATEWAYS.map(|g| owner(lab, g).0), [heir, heir]);
    assert!(owner(lab, heir).1 >= epoch, "epochs never go back");
    GATEWAYS.iter().for_each(|g| lab.wait_ready(g, READY).unwrap());
    // Each hears what is new, and would say so to the other for ever if it did not.
    lab.request("POST", POLICIES, &policy("new", "neighbour.example.com")).unwrap();
    soon("a change", || !denied(lab, PODS[0], "neighbour.example.com"));
    let end = Instant::now() + Duration::from_secs(8);
    while Instant::now() < end {
        GATEWAYS.iter().for_each(|g| assert_eq!(lab.admin(g, "/readyz").unwrap().0, 200, "{g} is behind"));
        std::thread::sleep(Duration::from_millis(250));
    }
    let holders = GATEWAYS.map(|g| status(lab, g)["core"]["pairs"].to_string().matches("203.0.113.10").count());
    assert_eq!(holders, [1, 1], "one pair, one entry");
    lab.request("DELETE", &format!("{POLICIES}/new"), &Value::Null).unwrap();
    soon("its end", || denied(lab, PODS[0], "neighbour.example.com"));
}

/// How far the clock of a gateway is from the machine's, by the time of its last record, in seconds.
fn apart(lab: &Lab, gateway: &str) -> i64 {
    let text = std::fs::read_to_string(lab.layout().log(gateway)).unwrap();
    let last = text.lines().rev().find_map(|l| l.split_whitespace().next().filter(|t| t.ends_with('Z'))).unwrap();
    let out = Command::new("date").args(["-u", "+%s", "-d", last]).output().unwrap();
    let then: i64 = String::from_utf8(out.stdout).unwrap().trim().parse().unwrap();
    then - SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64
}

/// How often a gateway has become, or ceased to be, the one that writes statuses.
fn leads(lab: &Lab, gateway: &str) -> usize {
    log(lab, gateway).lines().filter(|l| l.contains("leads=")).count()
}

/// Makes the library that sets a process's wall clock apart.
fn clock(lab: &Lab) -> String {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clock.c");
    let library = lab.layout().folder.join("clock.so");
    let done = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status().unwrap();
    assert!(done.success());
    library.display().to_string()
}

/// One gateway is ten minutes ahead, the other one behind, and a node a quarter of an hour: they give each other
/// certificates, one of them leads, the owner's death is noticed as soon as ever.
fn clocks_are_minutes_apart(lab: &mut Lab) {
    let library = clock(lab);
    let wire = Wire::watch(lab);
    for (name, seconds) in [("gw-a", 600i64), ("gw-b", -600), ("node-1", 900)] {
        lab.signal(name, Signal::SIGTERM, Some(Duration::from_secs(35))).unwrap();
        // It asks for a certificate anew.
        let _ = std::fs::remove_dir_all(lab.layout().identity(name));
        let environment = [("LD_PRELOAD", library.as_str()), ("LAB_CLOCK_SECONDS", &seconds.to_string())];
        lab.start_with(name, &environment).unwrap();
        lab.wait_ready(name, READY).unwrap();
        if seconds.abs() == 600 {
            let far = apart(lab, name);
            assert!((far - seconds).abs() < 60, "{name} is {far} s from this machine's clock");
        }
    }
    let connected = |g: &str| {
        let nodes = status(lab, g)["core"]["nodes"].as_object().cloned().unwrap_or_default();
        nodes.len() == 4 && nodes.values().all(|n| n["connected"] == true)
    };
    for g in GATEWAYS {
        assert!(wait_for(SOON, || connected(g).then_some(())).is_some(), "{g}: {}", status(lab, g)["core"]["nodes"]);
    }
    let (who, epoch) = recorded(lab);
    for g in GATEWAYS {
        assert_eq!(owner(lab, g), (who.clone(), epoch), "{g}");
    }
    let before = GATEWAYS.map(|g| leads(lab, g));
    assert_eq!(story::play(lab, &[1, 2, 3, 5, 7], false).unwrap(), 0, "surprises");
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(GATEWAYS.map(|g| leads(lab, g)), before, "one leads, and goes on");
    // Each of the two dies once: whose clock is behind, and whose is ahead.
    let mut dead = who;
    for round in 1..=2 {
        let next = if dead == "gw-a" { "gw-b" } else { "gw-a" };
        let (killed, traffic) = under_traffic(lab, &PODS, |lab| {
            let killed = kill(lab, &dead);
            wait_owner(lab, next, next, Duration::from_secs(10));
            println!("clocks apart: {next} owns the pair {:?} after {dead}'s death", killed.elapsed());
            std::thread::sleep(Duration::from_secs(1));
            killed
        });
        gaps("clocks apart, owner killed", &traffic, killed, NAMES, ADDRESSES);
        assert_eq!(wait_recorded(lab, next, epoch + round), epoch + round);
        wire.only(killed, &[next]);
        let seconds = if dead == "gw-a" { "600" } else { "-600" };
        lab.start_with(&dead, &[("LD_PRELOAD", library.as_str()), ("LAB_CLOCK_SECONDS", seconds)]).unwrap();
        lab.wait_ready(&dead, READY).unwrap();
        dead = next.to_owned();
    }
    // Whoever led is gone by now: somebody writes.
    lab.request("POST", POLICIES, &policy("late", "neighbour.example.com")).unwrap();
    let accepted = |o: &Value| o["status"]["conditions"].as_array().is_some_and(|c| !c.is_empty());
    lab.wait_object(&format!("{POLICIES}/late"), Duration::from_secs(40), accepted).unwrap();
    lab.request("DELETE", &format!("{POLICIES}/late"), &Value::Null).unwrap();
    soon("its end", || denied(lab, PODS[0], "neighbour.example.com"));
}

/// A node is days ahead, then behind: no certificate holds by its clock. That is said, its kernel enforces on, and it comes back with the right
/// clock.
fn a_nodes_clock_is_days_wrong(lab: &mut Lab) {
    const NODE: &str = "node-2";
    let library = clock(lab);
    let pod = "shop/worker";
    assert_eq!(lab.scenario().pod(pod).unwrap().node, NODE);
    let outside: [IpAddr; 2] = ["198.51.100.14", "2001:db8:100::14"].map(|ip| ip.parse().unwrap());
    for days in [2i64, -2] {
        let watches = outside.map(|ip| lab.watch(ip, "").unwrap());
        lab.signal(NODE, Signal::SIGTERM, Some(Duration::from_secs(35))).unwrap();
        let seconds = (days * 86_400).to_string();
        lab.start_with(NODE, &[("LD_PRELOAD", library.as_str()), ("LAB_CLOCK_SECONDS", &seconds)]).unwrap();
        let told = || {
            let (_, text) = lab.admin(NODE, "/status").ok()?;
            let status: Value = serde_json::from_str(&text).ok()?;
            let all = status["conditions"].as_array()?.iter();
            all.filter_map(|c| c.as_str()).find(|c| c.contains("is the clock of this machine right")).map(str::to_owned)
        };
        let said = wait_for(READY, told);
        println!("{days} days: {said:?}");
        assert!(said.is_some(), "{days} days: {:?}", lab.admin(NODE, "/status"));
        assert_ne!(lab.admin(NODE, "/readyz").unwrap().0, 200, "{days} days");
        let place = lab.pod(pod);
        for ip in outside {
            let url = format!("http://{}/", SocketAddr::new(ip, 8080));
            assert_eq!(curl(&place, Family::of(ip), &url, &["--max-time", "1"]).source(), None, "{days} days: {ip}");
        }
        assert_eq!(watches.map(|w| w.packets().unwrap()), [0, 0], "{days} days: packets got out");
        lab.restart(NODE).unwrap();
        lab.wait_ready(NODE, READY).unwrap();
    }
}

/// How long certificates and authorities hold here, in seconds: a rotation in two thirds of a minute.
const CERTIFICATE: u64 = 12;
const OVERLAP: u64 = 6;
const AUTHORITY: u64 = 54;

/// The certificates that agents trust.
fn bundle(lab: &Lab) -> BTreeSet<String> {
    let path = "/api/v1/namespaces/tidegate-system/configmaps/tidegate-trust";
    let map = lab.request("GET", path, &Value::Null).unwrap();
    let text = map["data"]["ca.crt"].as_str().unwrap_or_default().to_owned();
    text.split_inclusive("-----END CERTIFICATE-----").map(|c| c.trim().to_owned()).filter(|c| !c.is_empty()).collect()
}

/// The certificate of the authority that signs.
fn signer(lab: &Lab) -> String {
    let secret = lab.request("GET", "/api/v1/namespaces/tidegate-system/secrets/tidegate-ca", &Value::Null).unwrap();
    let text = STANDARD.decode(secret["data"]["authority.json"].as_str().unwrap()).unwrap();
    let authority: Value = serde_json::from_slice(&text).unwrap();
    authority["signer"]["certificate"].as_str().unwrap().trim().to_owned()
}

/// Waits for a whole rotation, and looks at its order: what signs was trusted for the overlap before, and what signed is
/// trusted as long as anything that it signed may hold.
#[track_caller]
fn rotated(lab: &Lab, first: &BTreeSet<String>) {
    let end = Instant::now() + Duration::from_secs(AUTHORITY + OVERLAP + 4 * CERTIFICATE);
    let mut trusted: BTreeMap<String, Instant> = BTreeMap::new();
    let mut next: Option<Instant> = None;
    // What is new came after this look, on a busy machine long before the present one: times count from there.
    let mut before = Instant::now();
    loop {
        let look = Instant::now();
        let (now, signs) = (bundle(lab), signer(lab));
        let at = Instant::now();
        assert!(at < end, "the first authority does not go");
        for certificate in &now {
            trusted.entry(certificate.clone()).or_insert(before);
        }
        if now.is_disjoint(first) {
            let kept = at.duration_since(next.expect("another one signs"));
            assert!(kept >= Duration::from_secs(CERTIFICATE), "the first one was trusted for {kept:?} only");
            return;
        }
        if next.is_none() && !first.contains(&signs) {
            let known = trusted.get(&signs).map_or(Duration::ZERO, |since| at.duration_since(*since));
            // Gateways count whole seconds: what began at the end of one is a second short.
            assert!(known + Duration::from_secs(1) >= Duration::from_secs(OVERLAP), "it signs after {known:?}");
            next = Some(before);
        }
        before = look;
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Mounts whom agents trust again and again, until it is dropped.
struct Kubelet(Arc<AtomicBool>, Option<JoinHandle<()>>);

impl Kubelet {
    fn start(lab: &Lab) -> Self {
        let (end, name) = (Arc::<AtomicBool>::default(), lab.name().to_owned());
        let ends = Arc::clone(&end);
        let work = move || {
            let lab = Lab::open(&name).unwrap();
            while !ends.load(Ordering::Relaxed) {
                lab.mount_trust().unwrap();
                std::thread::sleep(Duration::from_millis(500));
            }
        };
        Self(end, Some(std::thread::spawn(work)))
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        if let Some(thread) = self.1.take() {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}

/// A node that was away until its certificate and whom it trusted were of no use any more, and that finds no gateway when it is back. It says so,
/// its kernel enforces all the time, and it joins when there are gateways.
fn a_certificate_expires(lab: &mut Lab) {
    const NODE: &str = "node-2";
    let pod = "shop/worker";
    assert_eq!(lab.scenario().pod(pod).unwrap().node, NODE);
    let outside: [IpAddr; 2] = ["198.51.100.14", "2001:db8:100::14"].map(|ip| ip.parse().unwrap());
    let watches = outside.map(|ip| lab.watch(ip, "").unwrap());
    let tries = |lab: &Lab| {
        for ip in outside {
            let url = format!("http://{}/", SocketAddr::new(ip, 8080));
            let seen = curl(&lab.pod(pod), Family::of(ip), &url, &["--max-time", "0.3"]);
            assert_eq!(seen.source(), None, "{ip} is reached");
        }
    };
    kill(lab, NODE);
    let expired = Instant::now() + Duration::from_secs(CERTIFICATE + 1);
    while Instant::now() < expired {
        tries(lab);
    }
    for g in GATEWAYS {
        kill(lab, g);
    }
    lab.start(NODE).unwrap();
    let said = wait_for(READY, || {
        tries(lab);
        let status: Value = serde_json::from_str(&lab.admin(NODE, "/status").ok()?.1).ok()?;
        let all = status["conditions"].as_array()?.iter();
        all.filter_map(|c| c.as_str()).find(|c| c.starts_with("this node's certificate is missing")).map(str::to_owned)
    });
    println!("after its certificate has expired: {said:?}");
    assert!(said.is_some(), "{:?}", lab.admin(NODE, "/status"));
    assert_ne!(lab.admin(NODE, "/readyz").unwrap().0, 200);
    for g in GATEWAYS {
        lab.start(g).unwrap();
    }
    lab.wait_ready(NODE, READY).unwrap();
    GATEWAYS.iter().for_each(|g| lab.wait_ready(g, READY).unwrap());
    tries(lab);
    assert_eq!(watches.map(|w| w.packets().unwrap()), [0, 0], "packets got out");
}

/// Certificates that hold for seconds, and an authority that is followed by another one: streams end with their
/// certificates and come back, and traffic does not notice. Who comes after it is all over is taken in.
#[test]
fn the_authority_is_rotated() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut lab = up_like("variants/kubernetes.yaml", "rotation", |s| {
        let identity =
            json!({"certificateSeconds": CERTIFICATE, "overlapSeconds": OVERLAP, "authoritySeconds": AUTHORITY});
        s.tidegate.as_mut().unwrap().gateway.insert("kubernetes".into(), json!({"identity": identity}));
    });
    learn(&lab, &["tcp.example.com", "www.example.com", "api.example.com"]);
    let before = wait_recorded(&lab, "gw-a", 1);
    let first = bundle(&lab);
    assert_eq!(first.len(), 1);
    // What a kubelet does with the ConfigMap, if faster.
    let kubelet = Kubelet::start(&lab);
    let (begun, traffic) = under_traffic(&mut lab, &PODS, |lab| {
        let begun = Instant::now();
        rotated(lab, &first);
        println!("rotation: the first one is gone after {:?}", begun.elapsed());
        std::thread::sleep(Duration::from_secs(3));
        begun
    });
    gaps("rotation", &traffic, begun, CALM.0, CALM.1);
    drop(kubelet);
    assert_eq!(recorded(&lab), ("gw-a".into(), before), "nobody took another one for dead");
    for g in GATEWAYS {
        let connected = || {
            let nodes = status(&lab, g)["core"]["nodes"].as_object().cloned().unwrap_or_default();
            (nodes.len() == 4 && nodes.values().all(|n| n["connected"] == true)).then_some(())
        };
        assert!(wait_for(SOON, connected).is_some(), "{g}: {}", status(&lab, g)["core"]["nodes"]);
    }
    a_certificate_expires(&mut lab);
    learn(&lab, &["tcp.example.com"]);
    assert_eq!(story::play(&lab, &[1], false).unwrap(), 0, "surprises");
    lab.down().unwrap();
}
