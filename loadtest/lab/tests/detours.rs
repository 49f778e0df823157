//! Ways out that are not the pod's own interface: an interface that no program watches yet, a pod that nobody knows, a
//! second interface, devices, routes and rules on the node. In a cluster that masquerades pods and in one that routes
//! them: where packets are translated before the uplink's program sees them, the netfilter half alone can hold them.
//!
//! Not held: what processes in the node's own network carry (a proxy there); they are the node. A child of the uplink
//! (macvlan, ipvlan), or a cable bridged to it, in a pod can claim the address of the node or of an untouched pod of this
//! node: nothing in the packet tells them apart.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;
use support::{PASSES, address, detach, named, nobody_else_checks, node_address, routed, run, sees, target};
use tidegate_lab::forge::{self, ACK, SYN};
use tidegate_lab::lab::wait_for;
use tidegate_lab::observe::Watch;
use tidegate_lab::place::Place;
use tidegate_lab::probe::{self, Echo, FAMILIES, Family};
use tidegate_lab::scenario::Pod;
use tidegate_lab::world::veth;
use tidegate_lab::{Lab, Options, Scenario};

static ONE: Mutex<()> = Mutex::new(());

const NODE: &str = "node-1";
/// Isolated, and allowed a prefix.
const POD: &str = "shop/web";
/// In no manifest.
const STRANGER: &str = "untouched/stranger";

fn up(variant: &str) -> (MutexGuard<'static, ()>, Lab) {
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let file = if variant == "masquerading" { "demo.yaml" } else { "variants/routed.yaml" };
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios");
    let mut scenario = Scenario::load(format!("{folder}/{file}").as_ref()).unwrap();
    assert_eq!(scenario.masquerade, variant == "masquerading");
    let agent = &mut scenario.tidegate.as_mut().unwrap().agent;
    agent.insert("unknownPods".into(), json!("Drop"));
    // A bridge that takes the uplink in, in one of the steps.
    agent.insert("uplinks".into(), json!(["eth0", "br-ext"]));
    scenario.pods.push(Pod {
        name: "stranger".into(),
        namespace: "untouched".into(),
        node: NODE.into(),
        labels: Default::default(),
        ipv4: Some([10, 244, 1, 200].into()),
        ipv6: Some("fd00:10:244:1::200".parse().unwrap()),
        listen: Default::default(),
    });
    let options = Options { lab: Some(env!("CARGO_BIN_EXE_tidegate-lab").into()), ..Options::unique("detours") };
    let lab = Lab::up(scenario, &options).unwrap();
    nobody_else_checks(&lab);
    (one, lab)
}

/// Denied for everybody who is isolated.
fn outside(family: Family) -> SocketAddr {
    named(family, 14, 7001)
}

struct Eyes(Vec<Watch>);

impl Eyes {
    fn open(lab: &Lab) -> Self {
        Self(FAMILIES.map(|f| lab.watch(outside(f).ip(), "").unwrap()).into())
    }

    #[track_caller]
    fn nothing(&self, what: &str) {
        std::thread::sleep(PASSES);
        let seen: Vec<u64> = self.0.iter().map(|w| w.packets().unwrap()).collect();
        assert_eq!(seen, [0, 0], "{what}");
    }
}

/// Datagrams, segments and echo requests to what is denied, from these sources, by the pod's routes or by a device.
fn go(lab: &Lab, pod: &str, device: Option<&str>, sources: &[IpAddr]) {
    send(&lab.pod(pod), device, sources);
}

fn send(place: &Place, device: Option<&str>, sources: &[IpAddr]) {
    for source in sources {
        let family = Family::of(*source);
        let (from, to) = (SocketAddr::new(*source, 24_000), outside(family));
        let echo = forge::icmp(from.ip(), to.ip(), family.pick(8, 128), 0, [0, 7, 0, 1], b"ping");
        let all = [
            forge::udp(from, to, b"secret"),
            forge::tcp(from, to, SYN, 1, 0, b""),
            forge::tcp(from, to, ACK, 1, 1, b"secret"),
            echo,
        ];
        for packet in all {
            forge::send(place, device, &packet).unwrap();
        }
    }
}

fn own(lab: &Lab, pod: &str) -> Vec<IpAddr> {
    FAMILIES.iter().map(|f| address(lab, pod, *f)).collect()
}

/// Whom a pod may claim to be: itself, an isolated neighbour, untouched ones here and elsewhere, a gateway's pod, an
/// egress address, nobody.
fn claims(lab: &Lab, pod: &str) -> Vec<IpAddr> {
    let pods = [pod, "billing/pay", "untouched/app", "untouched/backend", "tidegate-system/gw-a"];
    let mut all: Vec<IpAddr> = pods.iter().flat_map(|p| own(lab, p)).collect();
    for family in FAMILIES {
        all.push(target(family, "203.0.113.10", "2001:db8::10", 0).ip());
        all.push(target(family, "172.31.9.2", "fd31::2", 0).ip());
    }
    all
}

/// The counterpart: an untouched pod's same packets arrive, so the way is open.
#[track_caller]
fn untouched_passes(lab: &Lab, eyes: &Eyes, what: &str) {
    eyes.nothing(what);
    passes(lab, "untouched/app", eyes, what);
}

/// The packets of a pod that is known and untouched arrive, all four of each family; while a neighbour is looked for some
/// may be lost.
#[track_caller]
fn passes(lab: &Lab, pod: &str, eyes: &Eyes, what: &str) {
    let open = wait_for(Duration::from_secs(5), || {
        go(lab, pod, None, &own(lab, pod));
        eyes.0.iter().all(|w| w.packets().unwrap() >= 4).then_some(())
    });
    assert!(open.is_some(), "{what}: {pod}'s packets pass");
}

#[track_caller]
fn allowed_again(lab: &Lab, what: &str) {
    for family in FAMILIES {
        let echo = wait_for(Duration::from_secs(20), || Echo::connect(&lab.pod(POD), routed(family, 40, 7000)).ok());
        assert!(echo.is_some(), "{what}: {family:?}: what is allowed passes");
    }
}

/// Takes the pod's cable away.
fn unplug(lab: &Lab, pod: &str) {
    run(lab, NODE, &format!("ip link del {}", veth(lab.scenario(), lab.scenario().pod(pod).unwrap())));
}

/// Lays a cable as the network plugin does.
fn plug(lab: &Lab, pod: &str) {
    let veth = veth(lab.scenario(), lab.scenario().pod(pod).unwrap());
    let netns = lab.pod(pod).netns().to_owned();
    let (a, b) = (address(lab, pod, Family::V4), address(lab, pod, Family::V6));
    run(
        lab,
        NODE,
        &format!(
            "set -e; ip link add {veth} type veth peer name eth0 netns {netns}
             echo 0 > /proc/sys/net/ipv4/conf/{veth}/rp_filter; echo 1 > /proc/sys/net/ipv4/conf/{veth}/proxy_arp
             echo 0 > /proc/sys/net/ipv4/neigh/{veth}/proxy_delay
             ip addr add fe80::1/64 dev {veth} nodad; ip link set {veth} up
             ip route add {a} dev {veth}; ip route add {b} dev {veth}"
        ),
    );
    run(
        lab,
        pod,
        &format!(
            "set -e; ip addr add {a}/32 dev eth0; ip addr add {b}/128 dev eth0 nodad; ip link set eth0 up
             ip route add 169.254.1.1 dev eth0 scope link; ip route add default via 169.254.1.1 dev eth0
             ip route add default via fe80::1 dev eth0"
        ),
    );
}

/// The agent hangs while a pod's interface comes.
fn interfaces_not_attached_yet(lab: &Lab) {
    for known in ["cable replaced", "cable new"] {
        let eyes = Eyes::open(lab);
        let inside = FAMILIES.map(|f| lab.watch(routed(f, 40, 0).ip(), "").unwrap());
        if known == "cable new" {
            // The agent knows the pod and that it has no interface.
            unplug(lab, POD);
            std::thread::sleep(Duration::from_secs(1));
        }
        lab.signal(NODE, Signal::SIGSTOP, None).unwrap();
        if known == "cable replaced" {
            unplug(lab, POD);
        }
        plug(lab, POD);
        go(lab, POD, None, &claims(lab, POD));
        // Nor what it may do: that has to be steered.
        for family in FAMILIES {
            let to = routed(family, 40, 7000);
            forge::send(&lab.pod(POD), None, &forge::udp(SocketAddr::new(address(lab, POD, family), 9), to, b"x"))
                .unwrap();
        }
        eyes.nothing(known);
        assert!(inside.iter().all(|w| w.packets().unwrap() == 0), "{known}: what is allowed has to be steered");
        lab.signal(NODE, Signal::SIGCONT, None).unwrap();
        allowed_again(lab, known);
        go(lab, POD, None, &claims(lab, POD));
        untouched_passes(lab, &eyes, known);
    }
}

/// Each half of the guard alone holds an interface that is not attached, as far as it can: where the network plugin
/// masquerades, the program on the uplink sees the node's packets.
fn halves(lab: &mut Lab) {
    let masquerades = lab.scenario().masquerade;
    lab.signal(NODE, Signal::SIGKILL, Some(Duration::from_secs(5))).unwrap();
    unplug(lab, POD);
    plug(lab, POD);
    let eyes = Eyes::open(lab);
    let table = run(lab, NODE, "nft list table inet tidegate");
    let file = lab.layout().folder.join("run/table.nft");
    std::fs::write(&file, table).unwrap();
    run(lab, NODE, "nft delete table inet tidegate");
    if !masquerades {
        go(lab, POD, None, &own(lab, POD));
        eyes.nothing("the program on the uplink alone");
    }
    run(lab, NODE, &format!("nft -f {}", file.display()));
    detach(lab, NODE, "node_guard", "eth0");
    go(lab, POD, None, &own(lab, POD));
    eyes.nothing("netfilter alone");
    run(lab, NODE, "nft delete table inet tidegate");
    go(lab, POD, None, &own(lab, POD));
    assert!(eyes.0.iter().all(|w| sees(w, 1)), "without both it leaves, or this test could not fail");
    lab.start(NODE).unwrap();
    lab.wait_ready(NODE, Duration::from_secs(30)).unwrap();
    let eyes = Eyes::open(lab);
    allowed_again(lab, "both again");
    go(lab, POD, None, &claims(lab, POD));
    untouched_passes(lab, &eyes, "both again");
}

/// Lists the stranger in no manifest, or as an untouched pod again.
fn list(lab: &Lab, listed: bool) {
    let all = lab.layout().folder.join("run/pods.all.yaml");
    if !all.exists() {
        std::fs::write(&all, lab.manifest("pods.yaml").unwrap()).unwrap();
    }
    let text = std::fs::read_to_string(all).unwrap();
    let kept: Vec<&str> = text.split("---\n").filter(|d| listed || !d.contains("name: stranger")).collect();
    assert_eq!(kept.len(), text.split("---\n").count() - usize::from(!listed));
    lab.edit_manifest("pods.yaml", &kept.join("---\n")).unwrap();
    let own = address(lab, STRANGER, Family::V4).to_string();
    let told = wait_for(Duration::from_secs(10), || {
        (run(lab, NODE, "nft list set inet tidegate pods4").contains(&own) == listed).then_some(())
    });
    assert!(told.is_some(), "the guard knows");
}

/// A pod that nobody told of.
fn unknown_pods(lab: &Lab) {
    list(lab, false);
    let eyes = Eyes::open(lab);
    go(lab, STRANGER, None, &claims(lab, STRANGER));
    untouched_passes(lab, &eyes, "a stranger");
    // By a way round the uplink: a device above it, with a route of its own.
    let eyes = Eyes::open(lab);
    around(lab, true);
    go(lab, STRANGER, None, &claims(lab, STRANGER));
    go(lab, POD, None, &claims(lab, POD));
    eyes.nothing("routes and rules round the uplink");
    // The way round works for others.
    passes(lab, "untouched/app", &eyes, "the way round");
    around(lab, false);
    // Known, it is as free as others.
    let eyes = Eyes::open(lab);
    list(lab, true);
    passes(lab, STRANGER, &eyes, "known again");
    list(lab, false);
}

/// A device above the uplink, rules and routes that lead everything of pods there.
fn around(lab: &Lab, there: bool) {
    let (v4, v6) = ("203.0.113.1", "2001:db8::1");
    if !there {
        run(lab, NODE, "ip rule del pref 90; ip -6 rule del pref 90; ip link del round");
        return;
    }
    run(
        lab,
        NODE,
        &format!(
            "set -e; ip link add round link eth0 type macvlan mode bridge; echo 0 > /proc/sys/net/ipv4/conf/round/rp_filter
             ip addr add 203.0.113.90/32 dev round; ip addr add 2001:db8::90/128 dev round nodad; ip link set round up
             ip route add {v4} dev round table 90; ip route add default via {v4} dev round onlink table 90
             ip -6 route add {v6} dev round table 90; ip -6 route add default via {v6} dev round table 90
             ip rule add pref 90 to 198.51.100.0/24 lookup 90; ip -6 rule add pref 90 to 2001:db8:100::/48 lookup 90"
        ),
    );
    let told = wait_for(Duration::from_secs(5), || {
        run(lab, NODE, "nft list set inet tidegate uplinks").contains("round").then_some(())
    });
    assert!(told.is_some(), "the guard knows");
}

/// A second cable to the node, with an address that is nobody's, its own network translation, and whatever source.
fn second_interfaces(lab: &Lab) {
    let netns = lab.pod(POD).netns().to_owned();
    for bridge in [false, true] {
        let eyes = Eyes::open(lab);
        let at = if bridge { "br-more" } else { "more" };
        run(
            lab,
            NODE,
            &format!(
                "set -e; ip link add more type veth peer name eth1 netns {netns}
                 {}
                 echo 0 > /proc/sys/net/ipv4/conf/{at}/rp_filter; ip link set more up
                 ip addr add 172.31.9.1/24 dev {at}; ip addr add fd31::1/64 dev {at} nodad
                 nft 'add table inet more; add chain inet more post {{ type nat hook postrouting priority srcnat; }}
                 add rule inet more post ip saddr 172.31.9.0/24 masquerade
                 add rule inet more post ip6 saddr fd31::/64 masquerade'",
                if bridge {
                    "ip link add br-more type bridge; ip link set br-more up; ip link set more master br-more"
                } else {
                    ""
                }
            ),
        );
        run(
            lab,
            POD,
            "set -e; ip link set eth1 up; ip addr add 172.31.9.2/24 dev eth1; ip addr add fd31::2/64 dev eth1 nodad
             ip route add 198.51.100.14 via 172.31.9.1 dev eth1; ip route add 2001:db8:100::14 via fd31::1 dev eth1",
        );
        go(lab, POD, None, &claims(lab, POD));
        let node: Vec<IpAddr> = FAMILIES.iter().map(|f| node_address(lab, NODE, *f)).collect();
        go(lab, POD, None, &node);
        let what = format!("a second interface, {at}");
        untouched_passes(lab, &eyes, &what);
        // It reaches what it was made for.
        let near = run(lab, POD, "ping -c 1 -W 3 172.31.9.1; ping -c 1 -W 3 fd31::1; true");
        assert_eq!(near.matches("1 received").count(), 2, "{what}: {near}");
        run(lab, NODE, &format!("nft delete table inet more; ip link del more; ip link del {at} 2>/dev/null; true"));
    }
}

/// A child of the uplink in the pod: its packets meet no hook of the node but the uplink's own.
fn children_of_the_uplink(lab: &Lab) {
    let netns = lab.pod(POD).netns().to_owned();
    for kind in ["macvlan mode bridge", "ipvlan mode l2", "ipvlan mode l3"] {
        let eyes = Eyes::open(lab);
        let add = format!("ip link add eth2 link eth0 netns {netns} type {kind}");
        let added = lab.place(NODE).unwrap().run(&["sh", "-c", &add]);
        if kind.starts_with("ipvlan") && added.stderr.contains("Unknown device type") {
            println!("this kernel has no ipvlan: {kind} is left out");
            continue;
        }
        assert_eq!(added.status, 0, "{add}: {}", added.stderr);
        let via = if kind == "ipvlan mode l3" { ["", ""] } else { ["via 203.0.113.1", "via 2001:db8::1"] };
        run(
            lab,
            POD,
            &format!(
                "set -e; ip link set eth2 up; ip addr add 203.0.113.77/24 dev eth2; ip addr add 2001:db8::77/64 dev eth2 nodad
                 ip route add 198.51.100.14 {} dev eth2; ip route add 2001:db8:100::14 {} dev eth2",
                via[0], via[1]
            ),
        );
        let mut sources = claims(lab, POD);
        for family in FAMILIES {
            sources.push(target(family, "203.0.113.77", "2001:db8::77", 0).ip());
            sources.push(node_address(lab, "node-2", family));
        }
        // What nobody can tell from the node's own.
        sources.retain(|ip| !own(lab, "untouched/app").contains(ip));
        go(lab, POD, None, &sources);
        let what = format!("a child of the uplink, {kind}");
        untouched_passes(lab, &eyes, &what);
        run(lab, POD, "ip link del eth2");
    }
}

/// Nodes whose routes do not tell their own addresses from others': without a default route, without forwarding. A child
/// of the uplink sends from addresses that no route leads to.
fn children_where_routes_do_not_tell(lab: &Lab) {
    let netns = lab.pod(POD).netns().to_owned();
    run(lab, NODE, "ping -c 1 -W 3 203.0.113.1; ping -c 1 -W 3 2001:db8::1");
    let router = run(lab, NODE, "ip -o neigh show 203.0.113.1 dev eth0");
    let mac = router.split_whitespace().skip_while(|w| *w != "lladdr").nth(1).unwrap();
    run(lab, NODE, &format!("ip link add eth2 link eth0 netns {netns} type macvlan mode bridge"));
    run(
        lab,
        POD,
        &format!(
            "set -e; ip link set eth2 up; ip addr add 10.99.0.77/32 dev eth2; ip addr add fd77::77/128 dev eth2 nodad
             ip neigh replace 203.0.113.1 lladdr {mac} dev eth2; ip neigh replace 2001:db8::1 lladdr {mac} dev eth2
             ip route add 198.51.100.14 via 203.0.113.1 dev eth2 onlink
             ip -6 route add 2001:db8:100::14 via 2001:db8::1 dev eth2 onlink"
        ),
    );
    let mut sources = claims(lab, POD);
    sources.retain(|ip| !own(lab, "untouched/app").contains(ip));
    for family in FAMILIES {
        sources.push(target(family, "10.99.0.77", "fd77::77", 0).ip());
        sources.push(target(family, "203.0.113.77", "2001:db8::77", 0).ip());
    }
    // In no list of nodes, and on no uplink.
    let second = FAMILIES.map(|f| target(f, "10.99.0.91", "fd77::91", 0).ip());
    let node = lab.place(NODE).unwrap();
    for (what, change, back) in [
        (
            "no route for everything",
            "set -e; ip -4 route show default > /tmp/$N.4; ip -6 route show default > /tmp/$N.6
             ip route del default; ip -6 route del default
             ip route add 198.51.100.14 via 203.0.113.1; ip -6 route add 2001:db8:100::14 via 2001:db8::1 dev eth0",
            "set -e; ip route del 198.51.100.14; ip -6 route del 2001:db8:100::14
             ip -4 route add $(cat /tmp/$N.4); ip -6 route add $(cat /tmp/$N.6); rm /tmp/$N.4 /tmp/$N.6",
        ),
        (
            "a device that does not forward",
            "for f in ipv4 ipv6; do echo 0 > /proc/sys/net/$f/conf/eth0/forwarding; done",
            "for f in ipv4 ipv6; do echo 1 > /proc/sys/net/$f/conf/eth0/forwarding; done",
        ),
    ] {
        run(lab, NODE, &format!("N={netns}; {change}"));
        let eyes = Eyes::open(lab);
        go(lab, POD, None, &sources);
        untouched_passes(lab, &eyes, what);
        // The node's own, also of an address that it has only now.
        let eyes = Eyes::open(lab);
        send(&node, None, &second);
        eyes.nothing("an address that it has not");
        run(lab, NODE, "ip addr add 10.99.0.91/32 dev eth0; ip addr add fd77::91/128 dev eth0 nodad");
        let passes = wait_for(Duration::from_secs(5), || {
            send(&node, None, &second);
            eyes.0.iter().all(|w| w.packets().unwrap() >= 4).then_some(())
        });
        assert!(passes.is_some(), "{what}: the node's own packets pass");
        run(lab, NODE, "ip addr del 10.99.0.91/32 dev eth0; ip addr del fd77::91/128 dev eth0");
        run(lab, NODE, &format!("N={netns}; {back}"));
    }
    run(lab, POD, "ip link del eth2");
    // What servers sent back was not forwarded: the pod's resets are due, and must not be seen later.
    passes(lab, "untouched/app", &Eyes::open(lab), "all is as before");
}

/// The uplink is a port of a bridge, and so is a pod's second cable: nothing is routed, and no netfilter hook is met.
fn bridged_to_the_uplink(lab: &Lab) {
    let netns = lab.pod(POD).netns().to_owned();
    run(
        lab,
        NODE,
        &format!(
            "set -e; ip link add br-ext type bridge stp_state 0 forward_delay 0; ip link set br-ext address $(cat /sys/class/net/eth0/address)
             echo 0 > /proc/sys/net/ipv4/conf/br-ext/rp_filter
             ip -4 route save dev eth0 > /dev/null; ip -o route show dev eth0 | grep -v 'proto kernel' > /tmp/{netns}.4
             ip -6 -o route show dev eth0 | grep -v 'proto kernel' > /tmp/{netns}.6
             ip link set br-ext up; ip addr flush dev eth0; ip link set eth0 master br-ext
             ip addr add 203.0.113.101/24 dev br-ext; ip addr add 2001:db8::101/64 dev br-ext nodad
             while read -r r; do ip route replace $r dev br-ext; done < /tmp/{netns}.4
             while read -r r; do ip -6 route replace $r dev br-ext; done < /tmp/{netns}.6; rm /tmp/{netns}.4 /tmp/{netns}.6
             ip link add more type veth peer name eth3 netns {netns}; ip link set more master br-ext up"
        ),
    );
    allowed_again(lab, "the uplink is in a bridge");
    let eyes = Eyes::open(lab);
    run(
        lab,
        POD,
        "set -e; ip link set eth3 up; ip addr add 203.0.113.78/24 dev eth3; ip addr add 2001:db8::78/64 dev eth3 nodad
         ip route add 198.51.100.14 via 203.0.113.1 dev eth3; ip route add 2001:db8:100::14 via 2001:db8::1 dev eth3",
    );
    let mut sources = claims(lab, POD);
    sources.extend(FAMILIES.map(|f| target(f, "203.0.113.78", "2001:db8::78", 0).ip()));
    sources.retain(|ip| !own(lab, "untouched/app").contains(ip));
    go(lab, POD, None, &sources);
    untouched_passes(lab, &eyes, "bridged to the uplink");
    run(lab, NODE, "ip link del more");
}

fn detours(variant: &str) {
    let (_one, mut lab) = up(variant);
    for family in FAMILIES {
        assert!(!probe::dig(&lab.pod(POD), "api.example.com", family.record(), &[]).answers.is_empty());
    }
    unknown_pods(&lab);
    second_interfaces(&lab);
    children_of_the_uplink(&lab);
    children_where_routes_do_not_tell(&lab);
    interfaces_not_attached_yet(&lab);
    halves(&mut lab);
    bridged_to_the_uplink(&lab);
}

#[test]
fn where_pods_are_masqueraded() {
    detours("masquerading");
}

#[test]
fn where_pods_are_routed() {
    detours("routed");
}
