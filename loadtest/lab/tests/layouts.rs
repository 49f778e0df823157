//! The layouts of interfaces that CNIs make, each with the names, addresses, routes and rules that it uses: the story in
//! each, pods that come later and whose addresses go to others, programs of others on their interfaces, and pods that
//! nobody told of. One lab for each.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/mod.rs"]
mod support;

use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::detach;
use tidegate_lab::family::Family;
use tidegate_lab::lab::wait_for;
use tidegate_lab::observe::Watch;
use tidegate_lab::probe::{Knock, curl, datagram, dig, knock};
use tidegate_lab::scenario::Pod;
use tidegate_lab::story::{self, POOL_A, POOL_B, named, of};
use tidegate_lab::{Lab, Options, Scenario, foreign, world};

/// One lab at a time: what these tests wait for has its limits in real time.
static ONE: Mutex<()> = Mutex::new(());
/// Where pods come and go, and a gateway's own node.
const NODES: [&str; 2] = ["node-2", "gw-node-a"];
/// Nodes without a gateway.
const PODS_NODES: [&str; 2] = ["node-1", "node-2"];
/// How soon a change holds, on a busy machine.
const SOON: Duration = Duration::from_secs(10);
/// How soon somebody else's program is behind the agent's.
const FIRST: Duration = Duration::from_secs(5);

fn up(variant: &str) -> (MutexGuard<'static, ()>, Lab) {
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let path = format!("{}/../scenarios/variants/{variant}.yaml", env!("CARGO_MANIFEST_DIR"));
    let mut scenario = Scenario::load(path.as_ref()).unwrap();
    scenario.tidegate.as_mut().unwrap().agent.insert("unknownPods".into(), json!("Drop"));
    let options = Options { lab: Some(env!("CARGO_BIN_EXE_tidegate-lab").into()), ..Options::unique(variant) };
    (one, Lab::up(scenario, &options).unwrap())
}

fn families(lab: &Lab) -> Vec<Family> {
    lab.scenario().families.clone()
}

/// What a pod's place says of its way to an address.
fn way(lab: &Lab, place: &str, to: IpAddr, more: &[&str]) -> String {
    let to = to.to_string();
    lab.place(place).unwrap().run(&[&["ip", "route", "get", &to], more].concat()).stdout
}

/// Everything that this CNI is known by is there, from a pod's and from a node's side.
fn looks(lab: &Lab, prefix: &str, gateway: impl Fn(Family, &str) -> String) {
    for key in ["shop/web", "untouched/app"] {
        let pod = lab.scenario().pod(key).unwrap();
        let device = world::veth(lab.scenario(), pod);
        assert!(device.starts_with(prefix), "{device}");
        for ip in pod.addresses() {
            let family = Family::of(ip);
            let out = way(lab, key, named(family, 14, 0).ip(), &[]);
            assert!(out.contains(&format!("via {}", gateway(family, &pod.node))), "{out}");
            let back = way(lab, &pod.node, ip, &[]);
            let bridge = lab.scenario().hosts.cni.is_bridge();
            assert!(back.contains(&format!("dev {}", if bridge { "cni0" } else { &device })), "{back}");
        }
    }
}

/// Whom a server saw; `None` when the pod did not get there.
fn seen(lab: &Lab, pod: &str, family: Family, name: &str) -> Option<IpAddr> {
    curl(&lab.pod(pod), family, &format!("https://{name}/"), &[]).source()
}

/// Counts what comes to a server that no policy allows.
fn denied(lab: &Lab) -> Vec<Watch> {
    families(lab).into_iter().map(|f| lab.watch(named(f, 14, 0).ip(), "").unwrap()).collect()
}

#[track_caller]
fn nothing(what: &str, watches: &[Watch]) {
    let packets: Vec<u64> = watches.iter().map(|w| w.packets().unwrap()).collect();
    assert!(packets.iter().all(|n| *n == 0), "{what}: packets at the router: {packets:?}");
}

/// Does something for each of these pods and every family, all at the same time: it is mostly waiting.
fn each(lab: &Lab, pods: &[String], work: impl Fn(&str, Family) + Sync) {
    std::thread::scope(|scope| {
        for pod in pods {
            for family in families(lab) {
                let work = &work;
                scope.spawn(move || work(pod, family));
            }
        }
    });
}

/// TCP and UDP to what is denied: nobody answers.
#[track_caller]
fn silent(lab: &Lab, pods: &[String]) {
    each(lab, pods, |pod, family| {
        let place = lab.pod(pod);
        assert_eq!(knock(&place, named(family, 14, 443)).unwrap(), Knock::Silent, "{pod} {family:?}");
        let answer = datagram(&place, named(family, 14, 7001), b"x", false);
        assert!(answer.as_ref().is_ok_and(Option::is_none), "{pod} {family:?}: {answer:?}");
    });
}

/// Each of them reaches this name with this address of a pool.
#[track_caller]
fn leave_by(lab: &Lab, pods: &[String], name: &str, pool: [&str; 2]) {
    each(lab, pods, |pod, family| {
        let there = wait_for(SOON, || seen(lab, pod, family, name));
        assert_eq!(there, Some(of(pool, family)), "{pod} {family:?}");
    });
}

fn keys(keys: &[&str]) -> Vec<String> {
    keys.iter().map(|k| (*k).to_owned()).collect()
}

fn pod(namespace: &str, name: &str, node: &str, app: &str) -> Pod {
    let mut pod = Pod::new(namespace, name, node);
    pod.labels.insert("app".into(), app.into());
    pod
}

/// Pods come, two on each node, and go; pods of the next namespace get their addresses.
fn pods_come_later(lab: &mut Lab) {
    let watches = denied(lab);
    let web = lab.scenario().pod("shop/web").unwrap().addresses();
    let begun = Instant::now();
    let mut came = Vec::new();
    for (node, name) in NODES.iter().flat_map(|n| ["first", "second"].map(|name| (n, name))) {
        let name = format!("{name}-{node}");
        lab.add_pod(pod("shop", &name, node, "web")).unwrap();
        came.push(format!("shop/{name}"));
    }
    leave_by(lab, &came, "api.example.com", POOL_A);
    println!("four pods came: all leave by the pool after {:.1} s", begun.elapsed().as_secs_f32());
    each(lab, &came, |key, family| {
        assert!(dig(&lab.pod(key), "other.example.org", family.record(), &[]).is_denied(), "{key}");
        // Inside the cluster, to another node.
        let web = web.iter().find(|ip| Family::of(**ip) == family).unwrap();
        let inside = curl(&lab.pod(key), family, &format!("http://{}/", SocketAddr::new(*web, 8080)), &[]);
        assert_eq!(inside.exit, 0, "{key}: {}", inside.text());
    });
    silent(lab, &came);
    let mut heirs = Vec::new();
    for key in &came {
        let gone = lab.scenario().pod(key).unwrap().clone();
        lab.remove_pod(key).unwrap();
        let mut heir = pod("billing", &gone.name, &gone.node, "pay");
        (heir.ipv4, heir.ipv6) = (gone.ipv4, gone.ipv6);
        heirs.push(heir.key());
        lab.add_pod(heir).unwrap();
    }
    leave_by(lab, &heirs, "bank.example.com", POOL_B);
    // What the shop's pods resolved is not billing's.
    each(lab, &heirs, |key, family| {
        assert_eq!(knock(&lab.pod(key), named(family, 10, 443)).unwrap(), Knock::Silent, "{key} {family:?}");
    });
    silent(lab, &heirs);
    heirs.iter().for_each(|key| lab.remove_pod(key).unwrap());
    nothing("pods come later", &watches);
}

/// Somebody else's program comes first on every pod's interface, also on that of a pod that came later.
fn first_place_is_taken_back(lab: &mut Lab) {
    lab.add_pod(pod("shop", "late", NODES[0], "web")).unwrap();
    let pods = keys(&["shop/web", "shop/late", "shop/local"]);
    leave_by(lab, &pods, "api.example.com", POOL_A);
    let watches = denied(lab);
    lab.attach_foreign("foreign").unwrap();
    silent(lab, &pods);
    for key in &pods {
        let pod = lab.scenario().pod(key).unwrap();
        let device = world::veth(lab.scenario(), pod);
        let netns = lab.place(&pod.node).unwrap().netns().to_owned();
        let look = || foreign::programs(&netns, &device).unwrap();
        // The new attachment is there before the old one goes: never is there none.
        let first = |all: &[String]| {
            all.first().is_some_and(|p| p == "pod_egress") && all.iter().filter(|p| *p == "pod_egress").count() == 1
        };
        assert!(wait_for(FIRST, || first(&look()).then_some(())).is_some(), "{key}: {:?}", look());
        assert!(look().iter().any(|p| p == "foreign"), "{:?}", look());
    }
    silent(lab, &pods);
    leave_by(lab, &pods, "api.example.com", POOL_A);
    nothing("another program was first", &watches);
    lab.remove_pod("shop/late").unwrap();
}

/// A network plugin gives a pod's device another name, and later makes it anew. What the pod tries all the while stays inside, and what
/// it may reach it reaches again.
fn devices_change(lab: &mut Lab) {
    let pods = keys(&["shop/late"]);
    lab.add_pod(pod("shop", "late", NODES[0], "web")).unwrap();
    leave_by(lab, &pods, "api.example.com", POOL_A);
    let watches = denied(lab);
    let to: Vec<String> = families(lab).into_iter().map(|f| named(f, 14, 0).ip().to_string()).collect();
    let eager =
        format!("while :; do for to in {}; do echo x > /dev/udp/$to/7001; done; sleep 0.001; done", to.join(" "));
    let mut eager = lab.pod(&pods[0]).spawn(&["bash", "-c", &eager]).unwrap();
    let device = world::veth(lab.scenario(), lab.scenario().pod(&pods[0]).unwrap());
    let index = |lab: &Lab, device: &str| {
        let link = lab.place(NODES[0]).unwrap().run(&["ip", "-o", "link", "show", "dev", device]);
        assert_eq!(link.status, 0, "{}", link.stderr);
        link.stdout.split(':').next().unwrap().to_owned()
    };
    let first = index(lab, &device);
    for (old, new) in [(device.as_str(), "renamed0"), ("renamed0", device.as_str())] {
        let link = lab.place(NODES[0]).unwrap().run(&["ip", "link", "set", old, "name", new]);
        assert_eq!(link.status, 0, "{}", link.stderr);
        leave_by(lab, &pods, "api.example.com", POOL_A);
        silent(lab, &pods);
    }
    assert_eq!(index(lab, &device), first);
    lab.make_card_anew(&pods[0]).unwrap();
    assert_ne!(index(lab, &device), first, "it is the same device");
    leave_by(lab, &pods, "api.example.com", POOL_A);
    silent(lab, &pods);
    assert!(eager.is_alive(), "it has ceased to try: {}", eager.output());
    drop(eager);
    nothing("the device changed", &watches);
    lab.remove_pod(&pods[0]).unwrap();
}

/// Pods that no gateway told of, and pods whose interface has no program: none gets out, by whatever card.
fn nobody_knows_them(lab: &mut Lab) {
    let watches = denied(lab);
    let mut strays = Vec::new();
    for (node, name) in NODES.iter().flat_map(|n| ["stray", "other"].map(|name| (n, name))) {
        let pod = lab.add_network(Pod::new("shop", &format!("{name}-{node}"), node)).unwrap();
        strays.push(pod.key());
    }
    silent(lab, &strays);
    nothing("pods that nobody told of", &watches);
    // Agents are away and their programs too: what nft holds is all there is.
    for node in PODS_NODES {
        lab.signal(node, Signal::SIGKILL, Some(SOON)).unwrap();
    }
    let pods = keys(&["shop/web", "shop/worker", "billing/pay", "billing/ledger", "managed/app"]);
    for key in &pods {
        let pod = lab.scenario().pod(key).unwrap().clone();
        detach(lab, &pod.node, "pod_egress", &world::veth(lab.scenario(), &pod));
    }
    silent(lab, &pods);
    nothing("pods without a program", &watches);
    for node in PODS_NODES {
        lab.start(node).unwrap();
        lab.wait_ready(node, SOON).unwrap();
    }
    leave_by(lab, &keys(&["shop/web", "shop/worker"]), "api.example.com", POOL_A);
}

#[test]
fn calico() {
    let (_one, mut lab) = up("calico");
    looks(&lab, "cali", |f, _| f.pick("169.254.1.1", "fe80::ecee:eeff:feee:eeee").into());
    whole(&mut lab);
    devices_change(&mut lab);
}

fn whole(lab: &mut Lab) {
    let begun = Instant::now();
    assert_eq!(story::whole(lab), 0, "surprises");
    println!("story: {:.1} s", begun.elapsed().as_secs_f32());
    pods_come_later(lab);
    println!("pods: {:.1} s", begun.elapsed().as_secs_f32());
    first_place_is_taken_back(lab);
    println!("first: {:.1} s", begun.elapsed().as_secs_f32());
    nobody_knows_them(lab);
    println!("unknown: {:.1} s", begun.elapsed().as_secs_f32());
}

/// The first address of a node's range of pods.
fn first(lab: &Lab, family: Family, node: &str) -> String {
    let n = lab.scenario().nodes.iter().position(|n| n.name == node).unwrap() + 1;
    family.pick(format!("10.244.{n}.1"), format!("fd00:10:244:{n}::1"))
}

#[test]
fn kind() {
    let (_one, mut lab) = up("kind");
    looks(&lab, "veth", |f, node| first(&lab, f, node));
    let values: Value = serde_saphyr::from_str(include_str!("../../../helm/tidegate/values.yaml")).unwrap();
    let agent: Value = serde_json::from_str(&lab.admin("node-1", "/config").unwrap().1).unwrap();
    assert_eq!(agent["interfaces"], values["agent"]["config"]["interfaces"], "kind takes the chart's default");
    whole(&mut lab);
}

#[test]
fn flannel() {
    let (_one, mut lab) = up("flannel");
    looks(&lab, "veth", |f, node| first(&lab, f, node));
    for family in families(&lab) {
        let worker = lab.scenario().pod("shop/worker").unwrap().addresses();
        let out = way(&lab, "node-1", family.pick(worker[0], worker[1]), &[]);
        assert!(out.contains(family.pick("dev flannel.1", "dev flannel-v6.1")), "{out}");
    }
    whole(&mut lab);
    devices_change(&mut lab);
}

#[test]
fn aws_vpc() {
    let (_one, mut lab) = up("aws-vpc");
    looks(&lab, "eni", |f, _| f.pick("169.254.1.1", "fe80::1").into());
    // Every other pod's own way out is the second card.
    let out = named(Family::V4, 14, 0).ip();
    let mut cards = [0, 0];
    for pod in lab.scenario().pods.iter().filter(|p| p.node == "node-1") {
        let second = world::is_second(lab.scenario(), pod);
        let from = pod.ipv4.unwrap().to_string();
        let iif = world::veth(lab.scenario(), pod);
        let text = way(&lab, "node-1", out, &["from", &from, "iif", &iif]);
        assert!(text.contains(if second { "dev eth1" } else { "dev eth0" }), "{text}");
        cards[usize::from(second)] += 1;
    }
    assert!(cards.iter().all(|n| *n >= 2), "{cards:?}");
    whole(&mut lab);
}
