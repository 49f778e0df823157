//! What the tests about forged packets and detours share: places, and taking single layers of the guard away.
#![allow(dead_code, reason = "each file uses its part")]

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tidegate_lab::Lab;
use tidegate_lab::lab::wait_for;
use tidegate_lab::observe::Watch;
use tidegate_lab::probe::Family;

pub const NODES: [&str; 4] = ["node-1", "node-2", "gw-node-a", "gw-node-b"];

/// Long enough for a packet to pass the router, had anybody let it.
pub const PASSES: Duration = Duration::from_millis(400);

#[track_caller]
pub fn run(lab: &Lab, place: &str, command: &str) -> String {
    let out = lab.place(place).unwrap().run(&["sh", "-c", command]);
    assert_eq!(out.status, 0, "{place}: {command}: {}", out.stderr);
    out.stdout
}

/// Makes UDP to one address of a service go elsewhere, on one node.
pub fn translate(lab: &Lab, node: &str, from: IpAddr, to: SocketAddr) {
    let (family, dnat) = if from.is_ipv4() { ("ip", "dnat ip to") } else { ("ip6", "dnat ip6 to") };
    run(
        lab,
        node,
        &format!(
            "nft 'add table inet services; add chain inet services pre {{ type nat hook prerouting priority dstnat; }};
             add rule inet services pre {family} daddr {from} meta l4proto udp {dnat} {to}'"
        ),
    );
}

pub fn target(family: Family, v4: &str, v6: &str, port: u16) -> SocketAddr {
    SocketAddr::new(family.pick(v4, v6).parse().unwrap(), port)
}

/// A named server of the demo.
pub fn named(family: Family, n: u8, port: u16) -> SocketAddr {
    target(family, &format!("198.51.100.{n}"), &format!("2001:db8:100::{n}"), port)
}

/// An address of the prefix that shop may reach at 7000 to 7009.
pub fn routed(family: Family, n: u8, port: u16) -> SocketAddr {
    target(family, &format!("192.0.2.{n}"), &format!("2001:db8:200::{n}"), port)
}

pub fn address(lab: &Lab, pod: &str, family: Family) -> IpAddr {
    let all = lab.scenario().pod(pod).unwrap().addresses();
    family.pick(all[0], all[1])
}

pub fn node_address(lab: &Lab, node: &str, family: Family) -> IpAddr {
    let node = lab.scenario().node(node).unwrap();
    family.pick(node.ipv4.into(), node.ipv6.into())
}

/// Not every network plugin drops what conntrack calls invalid, or lets the kernel look at sources: here nobody does
/// our work.
pub fn nobody_else_checks(lab: &Lab) {
    for node in NODES {
        run(lab, node, "nft flush chain inet lab-cni forward");
        run(lab, node, "for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 > $f; done");
    }
}

/// Whether a watch has seen so many packets, soon.
pub fn sees(watch: &Watch, packets: u64) -> bool {
    wait_for(Duration::from_secs(3), || (watch.packets().unwrap() >= packets).then_some(())).is_some()
}

/// The index of a node's device.
pub fn index(lab: &Lab, node: &str, device: &str) -> u32 {
    let text = run(lab, node, &format!("ip -o link show dev {device}"));
    text.split(':').next().unwrap().trim().parse().unwrap()
}

/// Detaches a program from a node's device, as long as no agent puts it back.
pub fn detach(lab: &Lab, node: &str, program: &str, device: &str) {
    let name = format!("{program}-{}", index(lab, node, device));
    let mut folders = vec![lab.layout().bpffs().join(node)];
    let mut found = false;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            if entry.path().is_dir() {
                folders.push(entry.path());
            } else if entry.file_name().to_string_lossy() == name {
                std::fs::remove_file(entry.path()).unwrap();
                found = true;
            }
        }
    }
    assert!(found, "{name} is pinned at {node}");
}
