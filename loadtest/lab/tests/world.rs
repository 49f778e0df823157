//! The lab's world without the product: what pods, cluster and internet see of each other.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::{IpAddr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use tidegate_lab::probe::{self, Echo, FAMILIES, Family};
use tidegate_lab::scenario::NameSpec;
use tidegate_lab::{Lab, Options, Scenario, state, story};

const BINARY: &str = env!("CARGO_BIN_EXE_tidegate-lab");
const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/demo.yaml");

fn bare() -> Scenario {
    let mut scenario = Scenario::load(DEMO.as_ref()).unwrap();
    scenario.tidegate = None;
    scenario
}

fn up(scenario: Scenario) -> Lab {
    Lab::up(scenario, &Options { lab: Some(BINARY.into()), ..Options::unique("world") }).unwrap()
}

fn pod_ip(lab: &Lab, pod: &str, family: Family) -> IpAddr {
    let all = lab.scenario().pod(pod).unwrap().addresses();
    family.pick(all[0], all[1])
}

fn namespaces(prefix: &str) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/run/netns") else {
        return Vec::new();
    };
    entries.flatten().filter_map(|e| e.file_name().into_string().ok()).filter(|n| n.starts_with(prefix)).collect()
}

#[test]
fn traffic_flows_between_pods_cluster_and_internet() {
    let lab = up(bare());
    for family in FAMILIES {
        let web = lab.pod("shop/web");
        // Outside, masqueraded as the node.
        let seen = probe::curl(&web, family, "https://api.example.com/", &[]);
        let node: IpAddr = family.pick("203.0.113.101", "2001:db8::101").parse().unwrap();
        assert_eq!((seen.exit, seen.source()), (0, Some(node)), "{seen:?}");
        assert_eq!(seen.body["sni"], "api.example.com");
        let seen = probe::curl(&web, family, "http://udp.example.com/", &[]);
        assert_eq!(seen.source(), Some(node), "{seen:?}");
        // Other pods, by name, across nodes and from a gateway's node, with their own address.
        for pod in ["shop/web", "shop/local"] {
            let seen = probe::curl(&lab.pod(pod), family, "http://backend.untouched:8080/", &[]);
            assert_eq!((seen.exit, seen.source()), (0, Some(pod_ip(&lab, pod, family))), "{seen:?}");
        }
        // Echo over TCP and UDP, also at addresses that have no name.
        for ip in [family.pick("198.51.100.12", "2001:db8:100::12"), family.pick("192.0.2.77", "2001:db8:200::77")] {
            let mut echo = Echo::connect(&web, SocketAddr::new(ip.parse().unwrap(), 7000)).unwrap();
            assert_eq!(probe::source(&echo.seen), Some(node));
            echo.say("hello\n").unwrap();
            let seen = probe::datagram(&web, SocketAddr::new(ip.parse().unwrap(), 7001), b"x", true).unwrap().unwrap();
            assert_eq!((probe::source(&seen), seen["server"].as_str()), (Some(node), Some(ip)));
        }
        // From outside to a pod.
        let to = SocketAddr::new(pod_ip(&lab, "shop/web", family), 8080);
        let seen = probe::curl(&lab.place("internet").unwrap(), family, &format!("http://{to}/"), &[]);
        assert_eq!(seen.exit, 0, "{seen:?}");
        // The gateways' pods reach the resolver and are reached by every node.
        let resolver = format!("@{}", family.pick("198.51.100.53", "2001:db8:100::53"));
        let seen = probe::dig(&lab.pod("gw-a"), "api.example.com", "A", &[&resolver]);
        assert_eq!(seen.answers, ["198.51.100.10"]);
        let gateway = SocketAddr::new(pod_ip(&lab, "gw-b", family), 7443);
        assert_eq!(probe::knock(&lab.place("node-1").unwrap(), gateway).unwrap(), probe::Knock::Refused);
    }
    // The router's counters see what passes, and only that.
    let to: SocketAddr = "198.51.100.12:7000".parse().unwrap();
    let [hit, missed] =
        ["tcp dport 7000 tcp flags & (syn | ack) == syn", "udp dport 7000"].map(|m| lab.watch(to.ip(), m).unwrap());
    probe::knock(&lab.pod("shop/web"), to).unwrap();
    assert_eq!((hit.packets().unwrap(), missed.packets().unwrap()), (1, 0));
    let metadata = probe::curl(&lab.pod("shop/web"), Family::V4, "http://169.254.169.254/", &[]);
    assert_eq!(metadata.exit, 0);
}

#[test]
fn names_are_served_as_written_and_can_change() {
    let lab = up(bare());
    let (web, public) = (lab.pod("shop/web"), "@198.51.100.153");
    let dig = |name: &str, kind: &str, more: &[&str]| probe::dig(&web, name, kind, more);
    assert_eq!(dig("alias.example.com", "A", &[]).answers, ["api.example.com.", "198.51.100.10"]);
    assert_eq!(dig("a.b.many.example.net", "AAAA", &["+tcp"]).answers, ["2001:db8:100::17"]);
    assert!(dig("svc.example.com", "HTTPS", &[public]).answers[0].contains("ech="));
    assert!(dig("v4only.example.com", "AAAA", &[]).is_no_data());
    assert_eq!(dig("nope.example.com", "A", &[public]).status, "NXDOMAIN");
    assert_eq!(dig("web.shop.svc.cluster.local", "A", &[]).answers, [pod_ip(&lab, "shop/web", Family::V4).to_string()]);
    assert_eq!(dig("nope.shop.svc.cluster.local", "A", &[]).status, "NXDOMAIN");

    let many = NameSpec {
        name: "moving.example.com".into(),
        ttl: 1,
        ipv4: (1..=60).map(|n| [192, 0, 2, n].into()).collect(),
        ..NameSpec::default()
    };
    lab.set_name(many.clone()).unwrap();
    // 60 addresses do not fit 512 octets: truncated, and whole over TCP.
    assert_eq!(dig("moving.example.com", "A", &[public]).answers.len(), 60);
    let cut = lab.pod("shop/web").run(&["dig", "+noedns", "+ignore", "moving.example.com", "A", public]);
    assert!(cut.stdout.contains("flags: qr aa tc"), "{}", cut.stdout);
    lab.set_name(NameSpec { ipv4: vec![[192, 0, 2, 200].into()], ..many }).unwrap();
    assert_eq!(dig("moving.example.com", "A", &[public]).answers, ["192.0.2.200"]);

    let seen = lab.internet_queries().unwrap();
    let asked = |name: &str, transport: &str| seen.iter().any(|q| q["name"] == name && q["transport"] == transport);
    assert!(asked("a.b.many.example.net", "TCP") && asked("svc.example.com", "UDP"));
    assert!(!asked("web.shop.svc.cluster.local", "UDP"), "cluster names stay in the cluster");
}

#[test]
fn without_masquerade_pods_keep_their_address() {
    let lab = up(Scenario { masquerade: false, ..bare() });
    for family in FAMILIES {
        let seen = probe::curl(&lab.pod("shop/worker"), family, "https://api.example.com/", &[]);
        assert_eq!(seen.source(), Some(pod_ip(&lab, "shop/worker", family)), "{seen:?}");
    }
}

#[test]
fn labs_stand_side_by_side_and_take_only_their_own_away() {
    let (one, two) = (up(bare()), up(bare()));
    let prefix = format!("tl-{}-", one.name());
    // Something that only looks like the lab's.
    let foreign = format!("{prefix}foreign");
    assert!(Command::new("ip").args(["netns", "add", &foreign]).status().unwrap().success());
    let taken = Lab::up(bare(), &Options { name: one.name().into(), lab: Some(BINARY.into()), ..Options::default() });
    assert!(format!("{:#}", taken.unwrap_err()).contains("there already"));
    let folder = one.layout().folder.clone();
    one.down().unwrap();
    let left = namespaces(&prefix);
    assert!(Command::new("ip").args(["netns", "delete", &foreign]).status().unwrap().success());
    assert_eq!((left, folder.exists()), (vec![foreign], false));
    assert_eq!(probe::curl(&two.pod("shop/web"), Family::V4, "https://api.example.com/", &[]).exit, 0);
}

#[test]
fn a_foreign_namespace_in_the_way_is_left_alone() {
    let options = Options { lab: Some(BINARY.into()), ..Options::unique("blocked") };
    let foreign = format!("tl-{}-router", options.name);
    assert!(Command::new("ip").args(["netns", "add", &foreign]).status().unwrap().success());
    let error = format!("{:#}", Lab::up(bare(), &options).unwrap_err());
    let left = namespaces(&format!("tl-{}-", options.name));
    assert!(Command::new("ip").args(["netns", "delete", &foreign]).status().unwrap().success());
    assert!(error.contains("not this lab's"), "{error}");
    assert_eq!(left, [foreign]);
}

#[test]
fn down_works_after_a_crash_at_any_moment() {
    for (i, millis) in [5, 40, 90, 160, 240, 330].into_iter().enumerate() {
        let name = format!("crash-{}-{i}", std::process::id());
        let mut child = Command::new(BINARY)
            .args(["up", "--bare", "--scenario", DEMO, "--name", &name])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(millis));
        child.kill().unwrap();
        child.wait().unwrap();
        // A child of the killed process may still be at work for a moment.
        std::thread::sleep(Duration::from_millis(50));
        if state::instances().contains(&name) {
            let down = Command::new(BINARY).args(["down", "--name", &name]).status().unwrap();
            assert!(down.success());
        }
        assert_eq!(namespaces(&format!("tl-{name}-")), Vec::<String>::new(), "after {millis} ms");
        assert!(!Path::new("/run/tidegate-lab").join(&name).exists());
        assert_eq!(marked(&name), Vec::<String>::new());
    }
}

/// Processes that a lab of this name started.
fn marked(name: &str) -> Vec<String> {
    let wanted = format!("TIDEGATE_LAB={name}");
    let entries = std::fs::read_dir("/proc").unwrap().flatten().map(|e| e.path());
    let mine = entries.filter(|p| {
        let environment = std::fs::read(p.join("environ")).unwrap_or_default();
        environment.split(|b| *b == 0).any(|v| v == wanted.as_bytes())
    });
    mine.map(|p| p.display().to_string()).collect()
}

#[test]
fn commands_run_in_a_pod_with_its_resolver() {
    let lab = up(bare());
    let exec = |command: &[&str]| {
        let out =
            Command::new(BINARY).args(["exec", "--name", lab.name(), "shop/web", "--"]).args(command).output().unwrap();
        (out.status.code(), String::from_utf8_lossy(&out.stdout).into_owned())
    };
    let resolv = exec(&["cat", "/etc/resolv.conf"]).1;
    assert!(resolv.contains("nameserver 10.244.1.53") && resolv.contains("search shop.svc.cluster.local"), "{resolv}");
    assert_ne!(std::fs::read_to_string("/etc/resolv.conf").unwrap(), resolv);
    assert!(exec(&["ip", "-4", "addr", "show", "eth0"]).1.contains("10.244.1.2/32"));
    assert_eq!(exec(&["sh", "-c", "exit 7"]).0, Some(7));
    let status = Command::new(BINARY).args(["status", "--name", lab.name()]).output().unwrap();
    assert!(String::from_utf8_lossy(&status.stdout).contains("shop/web"));
    // A command in the background ends with the lab.
    let mut running = lab.pod("shop/web").spawn(&["sleep", "100"]).unwrap();
    assert!(running.is_alive());
    lab.down().unwrap();
    assert_eq!(running.wait(Duration::from_secs(2)).map(|code| code >= 128), Some(true));
}

#[test]
fn the_story_tells_a_world_with_the_product_from_one_without() {
    let lab = up(bare());
    // In-cluster traffic is the same in both; all that is about denying or about egress addresses must be surprised.
    story::hold(&lab, 11).unwrap();
    for point in 1..=7 {
        assert!(story::play(&lab, &[point], true).unwrap() > 0, "point {point} holds without the product");
    }
}
