//! The story on nodes as people have them: one lab for each variant, and the whole story in each.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tidegate_lab::hello::{self, Cut};
use tidegate_lab::lab::wait_for;
use tidegate_lab::place::Place;
use tidegate_lab::probe::{self, Echo, Family, Knock};
use tidegate_lab::story::{self, POOL_A};
use tidegate_lab::{Lab, Mark, Options, Scenario};

/// One lab at a time: what these tests wait for has its limits in real time.
static ONE: Mutex<()> = Mutex::new(());

/// Octets of a large upload.
const BODY: usize = 2_000_000;

/// Octets of the IP and UDP headers.
fn headers(family: Family) -> usize {
    family.pick(28, 48)
}

fn up(variant: &str) -> (MutexGuard<'static, ()>, Lab) {
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios");
    let file = if variant == "demo" { "demo.yaml".to_owned() } else { format!("variants/{variant}.yaml") };
    let scenario = Scenario::load(format!("{folder}/{file}").as_ref()).unwrap();
    let options = Options { lab: Some(env!("CARGO_BIN_EXE_tidegate-lab").into()), ..Options::unique(variant) };
    (one, Lab::up(scenario, &options).unwrap())
}

/// The whole story.
#[track_caller]
fn tell(lab: &Lab) {
    assert_eq!(story::whole(lab), 0, "surprises");
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A named server of the demo.
fn named(family: Family, n: u16, port: u16) -> SocketAddr {
    SocketAddr::new(ip(&format!("{}{n}", family.pick("198.51.100.", "2001:db8:100::"))), port)
}

fn pool_a(family: Family) -> IpAddr {
    ip(family.pick(POOL_A[0], POOL_A[1]))
}

fn node_address(lab: &Lab, node: &str, family: Family) -> IpAddr {
    let node = lab.scenario().node(node).unwrap();
    family.pick(node.ipv4.into(), node.ipv6.into())
}

/// The path MTU that a place has learnt towards an address.
fn learnt(place: &Place<'_>, to: IpAddr) -> Option<usize> {
    let text = place.run(&["ip", "route", "get", &to.to_string()]).stdout;
    text.split_once(" mtu ")?.1.split_whitespace().next()?.parse().ok()
}

/// Sends a datagram that fills `size` octets with its headers; it must not be answered, but make the pod learn `mtu`.
fn too_big(place: &Place<'_>, family: Family, size: usize, mtu: usize) {
    let to = named(family, 13, 7001);
    let payload = vec![b'.'; size - headers(family)];
    let found = wait_for(Duration::from_secs(5), || {
        probe::datagram(place, to, &payload, false).ok();
        learnt(place, to.ip()).filter(|m| *m == mtu)
    });
    assert_eq!(found, Some(mtu), "{} {family:?}: {size} octets, learnt {:?}", place.name(), learnt(place, to.ip()));
}

/// Packets that were too big for the tunnel, by the kernel's counters.
fn too_bigs(lab: &Lab, place: &str) -> f64 {
    lab.metric(place, "tidegate_packets_total", &["reason=\"too-big\""]).unwrap()
}

/// A hello that is larger than a segment, as post-quantum key shares make them: whole, in records, an octet at a
/// time, and with its first segment behind the second.
fn hellos(lab: &Lab, place: &Place<'_>, family: Family) {
    let (to, name) = (named(family, 10, 443), "api.example.com");
    assert!(!probe::dig(place, name, family.record(), &[]).answers.is_empty());
    let whole = Cut { piece: usize::MAX, record: None };
    let fetch = |what: &str, cut: Cut| {
        let seen = hello::fetch(place, to, name, cut);
        let source = seen.as_ref().ok().and_then(probe::source);
        assert_eq!(source, Some(pool_a(family)), "{} {family:?}, {what}: {seen:?}", place.name());
    };
    fetch("whole", whole);
    fetch("in records of 100 octets", Cut { piece: 100, record: Some(100) });
    fetch("an octet at a time", Cut { piece: 1, record: None });
    // The first full segment is lost once: the next one overtakes it.
    let rules = format!(
        "add table inet lossy; add chain inet lossy out {{ type filter hook output priority filter; }}; \
         add rule inet lossy out {} daddr {} tcp dport 443 meta length > 1000 limit rate 1/day burst 1 packets counter drop",
        family.pick("ip", "ip6"),
        to.ip()
    );
    assert_eq!(place.run(&["nft", &rules]).status, 0);
    fetch("its first segment last", whole);
    let listed = place.run(&["nft", "list table inet lossy"]).stdout;
    assert_eq!(place.run(&["nft", "delete table inet lossy"]).status, 0);
    assert!(listed.contains("counter packets 1 "), "one segment was lost: {listed}");
    // The name is still what decides.
    let other = hello::fetch(place, to, "www.example.com", Cut { piece: 700, record: None });
    assert!(other.is_err(), "{} {family:?}: another name, {other:?}", place.name());
    let fits = |r: &serde_json::Value| r["kind"] == "open" && r["reason"] == "sni-mismatch";
    assert!(lab.wait_audit(&["gw-a", "gw-b"], &Mark::default(), fits).is_some());
}

/// Full-size packets both ways, by every kind of carriage. `tunnel` is what fits into the tunnel, in octets.
fn full_size(lab: &Lab, tunnel: usize) {
    let wide = usize::try_from(lab.scenario().mtu).unwrap();
    let internet = usize::try_from(lab.scenario().internet.mtu.unwrap_or(lab.scenario().mtu)).unwrap();
    let body = lab.layout().folder.join("run").join("body");
    std::fs::write(&body, vec![b'.'; BODY]).unwrap();
    for family in lab.scenario().families.clone() {
        for pod in ["shop/web", "shop/local"] {
            let place = lab.pod(pod);
            for name in ["tcp.example.com", "udp.example.com"] {
                assert!(!probe::dig(&place, name, family.record(), &[]).answers.is_empty(), "{name}");
            }
            // TCP, forwarded: both directions are full of segments of the largest size, which both sides know from the
            // first packet on: nothing was too big on its way, and nothing was fragmented.
            let to = named(family, 12, 7000);
            let node = lab.scenario().pod(pod).unwrap().node.clone();
            let before = (too_bigs(lab, &node), too_bigs(lab, "gw-a"));
            let most = tunnel - family.pick(40, 60);
            let large = lab.watch(to.ip(), &format!("tcp flags syn tcp option maxseg size > {most}")).unwrap();
            let mut echo = Echo::connect(&place, to).unwrap();
            for _ in 0..20 {
                echo.say(&"x".repeat(50_000)).unwrap();
            }
            assert_eq!(large.packets().unwrap(), 0, "{pod} {family:?}: the server was told of larger segments");
            let segment = echo.segment().unwrap();
            let most = tunnel.min(internet) - family.pick(40, 60);
            // Timestamps take twelve octets of each.
            assert!((most - 12..=most).contains(&segment), "{pod} {family:?}: segments of {segment} octets");
            assert_eq!((too_bigs(lab, &node), too_bigs(lab, "gw-a")), before, "{pod} {family:?}");
            // TCP, relayed.
            let url = "https://api.example.com/bytes/2000000";
            let out = place.run(&[
                "curl",
                "-sS",
                "-m",
                "20",
                family.flag(),
                "-o",
                "/dev/null",
                "-w",
                "%{size_download}",
                url,
            ]);
            assert_eq!(out.stdout, "2000000", "{}", out.stderr);
            let up = probe::curl(
                &place,
                family,
                "https://api.example.com/",
                &["--data-binary", &format!("@{}", body.display())],
            );
            assert_eq!(up.body["length"], BODY, "{}", up.text());
            hellos(lab, &place, family);
            // UDP: what fills the tunnel passes. The answer has a line more: with this size it does not fit, and the
            // server has to learn the path's MTU; a larger one it would fragment by itself.
            for size in [tunnel - 60, tunnel] {
                let fits = vec![b'.'; size.min(internet) - headers(family)];
                let answered = wait_for(Duration::from_secs(10), || {
                    probe::datagram(&place, named(family, 13, 7001), &fits, false).ok().flatten()
                });
                assert_eq!(
                    answered.as_ref().and_then(probe::source),
                    Some(pool_a(family)),
                    "{pod} {family:?}: {size} octets"
                );
            }
        }
        if lab.scenario().internet.mtu.is_none() {
            let server = lab.place("internet").unwrap();
            assert_eq!(learnt(&server, pool_a(family)), Some(tunnel), "the server learns what fits, {family:?}");
        }
        // What does not fit is answered on the node, and by the router where its next link is narrower.
        let web = lab.pod("shop/web");
        let before = too_bigs(lab, "node-1");
        too_big(&web, family, wide, tunnel);
        assert!(wait_for(Duration::from_secs(3), || (too_bigs(lab, "node-1") > before).then_some(())).is_some());
        if let Some(narrow) = lab.scenario().internet.mtu {
            too_big(&web, family, tunnel, usize::try_from(narrow).unwrap());
        }
    }
}

#[test]
fn full_size_packets_pass_links_of_1500() {
    let (_one, lab) = up("demo");
    full_size(&lab, 1430);
}

#[test]
fn full_size_packets_pass_links_of_9000() {
    let (_one, lab) = up("jumbo");
    full_size(&lab, 8930);
    tell(&lab);
}

#[test]
fn pods_are_routed() {
    let (_one, lab) = up("routed");
    tell(&lab);
}

#[test]
fn pods_are_on_a_bridge() {
    let (_one, lab) = up("bridge");
    tell(&lab);
    // Two pods of one bridge find each other anew.
    for family in lab.scenario().families.clone() {
        for pod in ["shop/web", "untouched/app"] {
            lab.pod(pod).run(&["ip", "neigh", "flush", "dev", "eth0"]);
        }
        let seen = probe::curl(&lab.pod("untouched/app"), family, "http://web.shop:8080/", &[]);
        assert_eq!(seen.exit, 0, "{seen:?}");
    }
}

/// Node ports work from outside on nodes, and are nothing on an egress address or for an isolated pod.
fn node_ports(lab: &Lab) {
    let internet = lab.place("internet").unwrap();
    for family in lab.scenario().families.clone() {
        for node in ["node-1", "gw-node-a"] {
            let to = SocketAddr::new(node_address(lab, node, family), 30081);
            let seen = probe::curl(&internet, family, &format!("http://{to}/"), &[]);
            assert_eq!((seen.exit, seen.source()), (0, Some(to.ip())), "{to}: {seen:?}");
            for pod in ["shop/web", "shop/local"] {
                assert_eq!(probe::knock(&lab.pod(pod), to).unwrap(), Knock::Silent, "{pod} to {to}");
            }
        }
        for port in [53, 30081, 7443, 9090, 10250] {
            let to = SocketAddr::new(pool_a(family), port);
            assert_eq!(probe::knock(&internet, to).unwrap(), Knock::Silent, "{to}");
        }
        let to = SocketAddr::new(pool_a(family), 30701);
        assert!(probe::datagram(&internet, to, b"x", false).unwrap().is_none(), "{to}");
    }
}

#[test]
fn kube_proxy_translates_services() {
    let (_one, lab) = up("kube-proxy");
    tell(&lab);
    for family in lab.scenario().families.clone() {
        let server = format!("@{}", family.pick("10.96.0.10", "fd00:10:96::10"));
        for (pod, want) in [("untouched/app", "NOERROR"), ("shop/web", "NXDOMAIN"), ("shop/local", "NXDOMAIN")] {
            for more in [&[server.as_str()][..], &[&server, "+tcp"]] {
                let seen = probe::dig(&lab.pod(pod), "other.example.org", family.record(), more);
                assert_eq!(seen.status, want, "{pod} {more:?}: {seen:?}");
                let seen = probe::dig(&lab.pod(pod), "backend.untouched.svc.cluster.local", family.record(), more);
                assert_eq!(seen.answers, [family.pick("10.96.0.30", "fd00:10:96::30")], "{pod} {more:?}");
            }
        }
    }
    node_ports(&lab);
}

#[test]
fn gateways_nodes_translate_sources_by_destination() {
    let (_one, lab) = up("snat");
    tell(&lab);
}

#[test]
fn a_firewall_drops_by_default() {
    let (_one, lab) = up("firewall");
    tell(&lab);
}

#[test]
fn gateways_nodes_have_daemons_and_node_ports() {
    let (_one, lab) = up("busy-node");
    tell(&lab);
    let mut asked = 0;
    for family in lab.scenario().families.clone() {
        for more in [&[][..], &["+tcp"]] {
            let server = format!("@{}", node_address(&lab, "gw-node-a", family));
            let seen = probe::dig(
                &lab.place("internet").unwrap(),
                "daemon.test",
                family.record(),
                &[&[server.as_str()], more].concat(),
            );
            assert_eq!(seen.answers, [&server[1..]], "the daemon answers on its own address");
            asked += 1;
            for name in ["other.example.org", "www.example.com"] {
                let allowed = name == "www.example.com";
                let seen =
                    probe::dig(&lab.pod("shop/local"), name, family.record(), &[&[server.as_str()], more].concat());
                assert_eq!(seen.status == "NOERROR", allowed, "{name} asked at {server}: {seen:?}");
                let want = named(family, 11, 0).ip().to_string();
                assert!(!allowed || seen.answers == [want], "{seen:?}");
            }
        }
    }
    assert_eq!(lab.queries("gw-node-a").unwrap().len(), asked, "no pod's question went to the node's daemon");
    node_ports(&lab);
}

#[test]
fn source_validation_is_strict() {
    let (_one, lab) = up("strict");
    tell(&lab);
    full_size(&lab, 1430);
}

#[test]
fn another_program_is_first_before_and_later() {
    let (_one, lab) = up("foreign");
    assert_eq!(story::play(&lab, &[1, 3], true).unwrap(), 0, "surprises");
    // The next one comes first again. Until it is behind, the guard holds what the verdict does not see.
    lab.attach_foreign("later").unwrap();
    for family in lab.scenario().families.clone() {
        let to = named(family, 14, 443);
        let watch = lab.watch(to.ip(), "").unwrap();
        assert_eq!(probe::knock(&lab.pod("shop/web"), to).unwrap(), Knock::Silent);
        assert_eq!(watch.packets().unwrap(), 0, "packets passed the router");
    }
    std::thread::sleep(Duration::from_secs(1));
    tell(&lab);
}

#[test]
fn a_cluster_has_only_ipv4() {
    let (_one, lab) = up("ipv4");
    tell(&lab);
    full_size(&lab, 1450);
}

#[test]
fn a_cluster_has_only_ipv6() {
    let (_one, lab) = up("ipv6");
    tell(&lab);
    full_size(&lab, 1430);
}

#[test]
fn everything_at_once() {
    let (_one, lab) = up("crowded");
    tell(&lab);
}
