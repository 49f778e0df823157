//! Packets whose checksum a device is yet to write: a pod, its node with an uplink that has the kernel write it, another
//! pod of the cluster behind that.
//!
//! ```text
//!  pod eth0 ── pod0 node wan ── eth0 far
//! ```
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::Duration;

use common::forge::{Frame, addressed, no_offload, transport};
use common::netns::{Ns, join};
use common::{Fixture, packets};
use tidegate_ebpf::{Fixed, Hook, Interface, Local, Outcome, Program, Role, attach_fixed, detach_fixed};
use tidegate_policy::state::{Cluster, Endpoint, Group, Named, Node, NodeState, Scope, Touch};
use tidegate_policy::{GroupKey, Reason, ScopeKey};

const POD: [&str; 2] = ["10.244.1.5", "fd00:10:244:1::5"];
const FAR: [&str; 2] = ["10.244.2.5", "fd00:10:244:2::5"];
/// An address of the far end that is a node's.
const NODE: [&str; 2] = ["192.0.2.9", "2001:db8:2::9"];
/// Both of which a pod may send to.
const PLAIN: u16 = 1_111;
/// DNS, encrypted DNS, our tunnel, the network plugin's.
const PORTS: [u16; 4] = [53, 853, 8_475, 8_472];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn state(touch: Touch) -> NodeState {
    let prefixes = vec!["10.244.0.0/16".parse().unwrap(), "fd00:10:244::/56".parse().unwrap()];
    let dns = FAR.iter().map(|a| SocketAddr::new(ip(a), 5353)).collect();
    let cluster = Cluster { prefixes, dns, suffixes: vec!["cluster.local".into()], ..Cluster::default() };
    let mut s = NodeState { cluster, ..NodeState::default() };
    s.names.insert("db.shop.svc".into(), Named::Inside);
    s.nodes.insert("n".into(), Node { addresses: vec![ip("192.0.2.1")] });
    s.nodes.insert("far".into(), Node { addresses: NODE.map(ip).into() });
    s.scopes.insert(ScopeKey(1), Scope { owner: "gw".into(), epoch: 1, pair: 1, standbys: vec![] });
    s.groups.insert(GroupKey(1), Group { isolated: true, audit: false, admin: None, own: None });
    for address in POD.map(ip) {
        let member = (touch != Touch::Untouched).then_some((ScopeKey(1), GroupKey(1)));
        let (node, namespace, pod) = ("n".into(), "shop".into(), "web".into());
        s.endpoints.insert(address, Endpoint { node, namespace, pod, touch, member });
    }
    s
}

struct World {
    pod: Ns,
    node: Ns,
    far: Ns,
    /// Of the pod's interface, and its node's end.
    macs: [[u8; 6]; 2],
    pod0: u32,
}

impl World {
    fn new() -> Self {
        let (pod, node, far) = (Ns::new(), Ns::new(), Ns::new());
        join(&node, "pod0", &pod, "eth0");
        join(&node, "wan", &far, "eth0");
        node.sysctl("net/ipv4/ip_forward", "1");
        node.sysctl("net/ipv6/conf/all/forwarding", "1");
        node.sysctl("net/ipv4/conf/all/rp_filter", "0");
        node.sysctl("net/ipv4/conf/pod0/rp_filter", "0");
        let ((pod0, host), (_, mac)) = (node.device("pod0"), pod.device("eth0"));
        let ((_, wan), (_, there)) = (node.device("wan"), far.device("eth0"));
        let text = |mac: [u8; 6]| mac.map(|b| format!("{b:02x}")).join(":");
        // Neighbours are told, so that the first packet goes at once.
        let link = |ns: &Ns, device: &str, own: &[&str], peer: &[u8; 6]| {
            for (router, own) in [("169.254.1.1", own[0]), ("fe80::1", own[1])] {
                let (bits, nodad) = if own.contains(':') { (128, "nodad") } else { (32, "") };
                ns.ip(&format!("address add {own}/{bits} dev {device} {nodad}"));
                ns.ip(&format!("neigh replace {router} lladdr {} dev {device}", text(*peer)));
                ns.ip(&format!("route replace default via {router} dev {device} onlink"));
            }
        };
        link(&pod, "eth0", &POD, &host);
        link(&far, "eth0", &FAR, &wan);
        for (at, node_address) in FAR.iter().zip(NODE) {
            let (bits, nodad) = if at.contains(':') { (128, "nodad") } else { (32, "") };
            far.ip(&format!("address add {node_address}/{bits} dev eth0 {nodad}"));
            for to in [*at, node_address] {
                node.ip(&format!("route add {to}/{bits} dev wan"));
                node.ip(&format!("neigh replace {to} lladdr {} dev wan", text(there)));
            }
        }
        for address in POD {
            let bits = if address.contains(':') { 128 } else { 32 };
            node.ip(&format!("route add {address}/{bits} dev pod0"));
            node.ip(&format!("neigh replace {address} lladdr {} dev pod0", text(mac)));
        }
        no_offload(&node, "wan");
        Self { pod, node, far, macs: [mac, host], pod0 }
    }

    fn datagram(&self, family: usize, to: &str, port: u16, payload: &[u8]) -> Vec<u8> {
        let frame = packets::udp_with(POD[family], to, port, payload);
        addressed(frame, self.macs[1], self.macs[0])
    }

    /// A datagram to a port that becomes another one behind the node, and to which.
    fn ports(&self, family: usize) -> Vec<(Frame, SocketAddr)> {
        let to = |address: &str, port: u16| {
            let plain = self.datagram(family, address, PLAIN, b"tuned to a port");
            let l4 = transport(&plain);
            let frame = Frame::forged(plain, l4 + 2, port.to_be_bytes(), l4 + 8, POD[family], address);
            (frame, SocketAddr::new(ip(address), port))
        };
        PORTS.into_iter().map(|port| to(FAR[family], port)).chain([to(NODE[family], 8_472)]).collect()
    }

    /// A question for a Service whose name becomes another one: "oc" of "local" is "eg" then.
    fn name(&self, family: usize) -> (Frame, SocketAddr) {
        let plain = self.datagram(family, FAR[family], 5353, &question());
        let l4 = transport(&plain);
        let at = plain.windows(5).position(|w| w == b"local").unwrap() + 1;
        let frame = Frame::forged(plain, at, *b"eg", l4 + 8, POD[family], FAR[family]);
        (frame, SocketAddr::new(ip(FAR[family]), 5353))
    }

    /// What the pod's kernel would send.
    fn honest(&self, family: usize, port: u16, payload: &[u8]) -> (Frame, SocketAddr) {
        let plain = self.datagram(family, FAR[family], port, payload);
        (Frame::own(plain, POD[family], FAR[family]), SocketAddr::new(ip(FAR[family]), port))
    }

    /// What arrives of a frame.
    fn arrives(&self, (frame, to): &(Frame, SocketAddr), wait: Duration) -> Option<Vec<u8>> {
        let server = self.far.enter(|| UdpSocket::bind(to).unwrap());
        server.set_read_timeout(Some(wait)).unwrap();
        frame.send(&self.pod, "eth0");
        let mut buffer = [0; 2_048];
        server.recv(&mut buffer).ok().map(|n| buffer[..n].to_vec())
    }

    fn local(&self) -> Local {
        let interface = Interface { ifindex: self.pod0, mac: self.macs[0] };
        Local { node: "n".into(), interfaces: POD.map(|a| (ip(a), interface)).into(), ..Local::default() }
    }
}

fn question() -> Vec<u8> {
    let mut out = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in ["db", "shop", "svc", "cluster", "local"] {
        out.push(label.len() as u8);
        out.extend(label.bytes());
    }
    out.extend([0, 0, 1, 0, 1]);
    out
}

const SOON: Duration = Duration::from_secs(3);
const NEVER: Duration = Duration::from_millis(50);

/// Nothing arrives of what arrives changed where nobody judges; `count` tells how many were refused, if that is known.
fn refuses(w: &World, mut count: impl FnMut() -> Option<u64>) {
    for family in 0..2 {
        let forged = w.ports(family).into_iter().chain([w.name(family)]);
        for (n, attack) in forged.enumerate() {
            let before = count();
            assert_eq!(w.arrives(&attack, NEVER), None, "{n} {}", attack.1);
            let after = count();
            assert_eq!(after, before.map(|b| b + 1), "{n} {}", attack.1);
        }
        for port in [PLAIN, 5353] {
            let payload = if port == PLAIN { b"hello".to_vec() } else { question() };
            assert_eq!(w.arrives(&w.honest(family, port, &payload), SOON).as_ref(), Some(&payload), "{port}");
        }
    }
}

#[test]
fn no_checksum_is_written_into_what_was_judged() {
    let w = World::new();
    for family in 0..2 {
        for attack in w.ports(family) {
            assert!(w.arrives(&attack, SOON).is_some(), "{}: the attack is one", attack.1);
        }
        let got = w.arrives(&w.name(family), SOON).unwrap();
        assert!(got.windows(5).any(|x| x == b"legal"), "{family}: the attack is one");
    }
    let mut f = Fixture::new(Role::Node);
    f.path_mut().apply(&state(Touch::Isolated), &w.local(), false).unwrap();
    w.node.enter(|| f.path_mut().attach(Program::PodEgress, "pod0")).unwrap();
    for touch in [Touch::Isolated, Touch::Untouched] {
        f.path_mut().apply(&state(touch), &w.local(), false).unwrap();
        refuses(&w, || {
            let all = f.path().counters().unwrap();
            let of = (Hook::PodEgress, Outcome::Drop, Reason::Checksum);
            Some(all.iter().find(|c| (c.hook, c.outcome, c.reason) == of).map_or(0, |c| c.packets))
        });
    }
    // Before there is an agent.
    f.path_mut().apply(&state(Touch::Isolated), &w.local(), false).unwrap();
    w.node.enter(|| f.path_mut().detach(Program::PodEgress, "pod0")).unwrap();
    let c = state(Touch::Isolated).cluster;
    let fixed = Fixed {
        tunnel_port: 8475,
        overlay_ports: vec![8_472],
        mark: 0x0020_0000,
        mark_cluster: 0x0030_0000,
        mark_mask: 0x00f0_0000,
        nodes: NODE.map(ip).into(),
        prefixes: c.prefixes,
        node_ports: None,
        dns: c.dns,
        suffixes: c.suffixes,
        names: vec!["db.shop.svc".into()],
    };
    let Pins(pins) = &Pins(common::pins());
    std::fs::create_dir(pins).unwrap();
    let before = sizes("NAMES");
    w.node.enter(|| attach_fixed(pins, &fixed, "pod0", w.pod0, &POD.map(ip)).unwrap());
    // It takes no more memory than what it goes by.
    let new: Vec<u32> = sizes("NAMES").into_iter().filter(|(id, _)| !before.contains_key(id)).map(|(_, n)| n).collect();
    assert!(new.contains(&1), "{new:?}");
    refuses(&w, || None);
    w.node.enter(|| detach_fixed(pins, w.pod0).unwrap());
}

/// A folder of pins that goes with the test, also when that fails.
struct Pins(PathBuf);

impl Drop for Pins {
    fn drop(&mut self) {
        let removed = tidegate_ebpf::remove_pins(&self.0);
        assert!(std::thread::panicking() || removed.is_ok(), "{removed:?}");
    }
}

/// How many entries maps of a name may have, by their id. Others may load theirs at the same time.
fn sizes(name: &str) -> BTreeMap<u32, u32> {
    let named = |m: &aya::maps::MapInfo| m.name_as_str() == Some(name);
    aya::maps::loaded_maps().flatten().filter(named).map(|m| (m.id(), m.max_entries())).collect()
}

/// Sends a mebibyte and hears it back.
fn bulk(w: &World, to: SocketAddr) {
    let listener = w.far.enter(|| TcpListener::bind(to).unwrap());
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut got = vec![0; 1 << 20];
        stream.read_exact(&mut got).unwrap();
        stream.write_all(&got[got.len() - 8..]).unwrap();
    });
    let mut client = w.pod.enter(|| TcpStream::connect_timeout(&to, Duration::from_secs(10)).unwrap());
    client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    client.write_all(&[vec![1; (1 << 20) - 8], b"the last".to_vec()].concat()).unwrap();
    let mut last = [0; 8];
    client.read_exact(&mut last).unwrap();
    assert_eq!(&last, b"the last");
    server.join().unwrap();
}

#[test]
fn what_devices_write_and_cut_goes_on() {
    let w = World::new();
    let mut f = Fixture::new(Role::Node);
    w.node.enter(|| f.path_mut().attach(Program::PodEgress, "pod0")).unwrap();
    for touch in [Touch::Isolated, Touch::Untouched] {
        f.path_mut().apply(&state(touch), &w.local(), false).unwrap();
        for far in FAR.map(ip) {
            bulk(&w, SocketAddr::new(far, 7_000));
            // Datagrams that are sent as one.
            let server = w.far.enter(|| UdpSocket::bind((far, 7_001)).unwrap());
            server.set_read_timeout(Some(SOON)).unwrap();
            let any = if far.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let client = w.pod.enter(|| UdpSocket::bind(any).unwrap());
            let size: libc::c_int = 1_000;
            // SAFETY: a valid descriptor and a pointer to an integer of the size told.
            let set = unsafe {
                let (value, length) = ((&raw const size).cast(), size_of_val(&size) as libc::socklen_t);
                libc::setsockopt(client.as_raw_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, value, length)
            };
            assert_eq!(set, 0);
            client.send_to(&[7; 10_500], (far, 7_001)).unwrap();
            let mut buffer = [0; 2_048];
            let got: Vec<usize> = (0..11).map(|_| server.recv(&mut buffer).unwrap()).collect();
            assert_eq!(got, [vec![1_000; 10], vec![500]].concat());
        }
    }
    // A tunnel of the pod's own: what its device leaves to be written belongs to the inner packet.
    for (ns, [own, peer], n) in [(&w.pod, [POD[0], FAR[0]], 1), (&w.far, [FAR[0], POD[0]], 2)] {
        ns.ip(&format!("link add name own type vxlan id 7 local {own} remote {peer} dstport 5555"));
        ns.ip(&format!("address add 172.31.0.{n}/24 dev own"));
        ns.ip("link set own up");
    }
    f.path_mut().apply(&state(Touch::Isolated), &w.local(), false).unwrap();
    bulk(&w, "172.31.0.2:7000".parse().unwrap());
    let dropped: u64 =
        f.path().counters().unwrap().iter().filter(|c| c.reason == Reason::Checksum).map(|c| c.packets).sum();
    assert_eq!(dropped, 0);
}
