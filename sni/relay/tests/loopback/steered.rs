//! A pod, a gateway and a server in namespaces of their own, the pod's connections steered by TPROXY.
//!
//! The gateway has no route to the pod but for marked packets, and its egress address is on no interface.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use tidegate_policy::Reason;
use tidegate_policy::event::What;
use tidegate_sni::RelayConfig;

use crate::common::*;

const REPLY_MARK: u32 = 0x10000;
const RELAY_PORT: u16 = 15001;

/// Addresses of one family.
struct Family {
    flag: &'static str,
    nft: &'static str,
    any: &'static str,
    pod: &'static str,
    pod_link: &'static str,
    gateway_link: &'static str,
    gateway_out: &'static str,
    server: &'static str,
    egress: &'static str,
    link: u8,
    host: u8,
}

const V4: Family = Family {
    flag: "-4",
    nft: "ip",
    any: "0.0.0.0",
    pod: "10.99.0.5",
    pod_link: "10.77.0.2",
    gateway_link: "10.77.0.1",
    gateway_out: "198.51.100.1",
    server: "198.51.100.10",
    egress: "203.0.113.10",
    link: 24,
    host: 32,
};

const V6: Family = Family {
    flag: "-6",
    nft: "ip6",
    any: "::",
    pod: "fd00:99::5",
    pod_link: "fd00:77::2",
    gateway_link: "fd00:77::1",
    gateway_out: "2001:db8:1::1",
    server: "2001:db8:1::10",
    egress: "2001:db8:2::10",
    link: 64,
    host: 128,
};

/// Three namespaces, deleted with all that is in them when dropped.
struct Net {
    pod: String,
    gateway: String,
    server: String,
}

impl Drop for Net {
    fn drop(&mut self) {
        for name in [&self.pod, &self.gateway, &self.server] {
            let _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}

fn run(program: &str, line: &str) {
    let status = Command::new(program).args(line.split_whitespace()).status().unwrap();
    assert!(status.success(), "{program} {line}");
}

impl Net {
    fn new(f: &Family) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let tag = format!("tgsni{}x{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let net = Self { pod: format!("{tag}p"), gateway: format!("{tag}g"), server: format!("{tag}s") };
        for name in [&net.pod, &net.gateway, &net.server] {
            run("ip", &format!("netns add {name}"));
            run("ip", &format!("-n {name} link set lo up"));
            run(
                "ip",
                &format!(
                    "netns exec {name} sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1"
                ),
            );
        }
        net.join((&net.pod, "p0"), (&net.gateway, "g0"));
        net.join((&net.gateway, "g1"), (&net.server, "s0"));
        let ip = |ns: &str, line: &str| run("ip", &format!("-n {ns} {} {line}", f.flag));
        let nodad = if f.flag == "-6" { "nodad" } else { "" };
        ip(&net.pod, &format!("addr add {}/{} dev p0 {nodad}", f.pod_link, f.link));
        ip(&net.pod, &format!("addr add {}/{} dev lo {nodad}", f.pod, f.host));
        ip(&net.pod, &format!("route add default via {} src {}", f.gateway_link, f.pod));
        ip(&net.gateway, &format!("addr add {}/{} dev g0 {nodad}", f.gateway_link, f.link));
        ip(&net.gateway, &format!("addr add {}/{} dev g1 {nodad}", f.gateway_out, f.link));
        ip(&net.gateway, &format!("route add local {} dev lo", f.egress));
        ip(&net.gateway, "rule add fwmark 1 lookup 100");
        ip(&net.gateway, "route add local default dev lo table 100");
        ip(&net.gateway, &format!("rule add fwmark {REPLY_MARK} lookup 101"));
        ip(&net.gateway, &format!("route add default via {} dev g0 table 101", f.pod_link));
        ip(&net.server, &format!("addr add {}/{} dev s0 {nodad}", f.server, f.link));
        ip(&net.server, &format!("route add {} via {}", f.egress, f.gateway_out));
        net.steer(f);
        net
    }

    fn join(&self, (a, x): (&str, &str), (b, y): (&str, &str)) {
        run("ip", &format!("link add {x} netns {a} type veth peer name {y} netns {b}"));
        run("ip", &format!("-n {a} link set {x} up"));
        run("ip", &format!("-n {b} link set {y} up"));
    }

    fn steer(&self, f: &Family) {
        let rules = format!(
            "table inet steer {{ chain in {{ type filter hook prerouting priority mangle; \
             iifname g0 meta l4proto tcp tproxy {} to :{RELAY_PORT} meta mark set 1 accept; }}; }}",
            f.nft
        );
        let mut nft = Command::new("ip")
            .args(["netns", "exec", &self.gateway, "nft", "-f", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        nft.stdin.take().unwrap().write_all(rules.as_bytes()).unwrap();
        assert!(nft.wait().unwrap().success());
    }
}

/// Runs `f` on a thread of this namespace.
fn inside<T: Send>(name: &str, f: impl FnOnce() -> T + Send) -> T {
    let file = File::open(format!("/run/netns/{name}")).unwrap();
    std::thread::scope(|s| {
        let thread = s.spawn(|| {
            setns(file, CloneFlags::CLONE_NEWNET).unwrap();
            f()
        });
        thread.join().unwrap()
    })
}

/// A connection of the pod that says a name and reads to the end.
fn ask(net: &Net, to: SocketAddr, name: &'static str) -> std::io::Result<String> {
    inside(&net.pod, || {
        let until = Instant::now() + Duration::from_secs(15);
        let mut stream = loop {
            match TcpStream::connect_timeout(&to, Duration::from_secs(5)) {
                // On a busy machine neighbours of interfaces that have just come up may be found late.
                Err(e) if e.kind() == ErrorKind::HostUnreachable && Instant::now() < until => {}
                other => break other?,
            }
        };
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(&hello(name))?;
        let mut got = String::new();
        stream.read_to_string(&mut got)?;
        Ok(got)
    })
}

async fn steered(f: &Family) {
    let net = Net::new(f);
    let [server, egress, pod]: [IpAddr; 3] = [f.server, f.egress, f.pod].map(|a| a.parse().unwrap());
    let to = SocketAddr::new(server, 443);
    let lab = inside(&net.gateway, || {
        Lab::with(RelayConfig {
            listen: vec![SocketAddr::new(f.any.parse().unwrap(), RELAY_PORT)],
            transparent: true,
            reply_mark: REPLY_MARK,
            ports: Some(50_000..=50_999),
            ..config()
        })
    });
    *lab.table.source.lock() = Some(egress);
    lab.bind("a.example", server);

    // The server tells the pod whom it saw.
    let listener = inside(&net.server, || TcpListener::bind(to).unwrap());
    let serving = std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept().unwrap();
        stream.read_exact(&mut vec![0; hello("a.example").len()]).unwrap();
        stream.write_all(peer.to_string().as_bytes()).unwrap();
        peer
    });
    let seen: SocketAddr = ask(&net, to, "a.example").unwrap().parse().unwrap();
    assert_eq!(serving.join().unwrap(), seen);
    assert_eq!(seen.ip(), egress);
    assert!((50_000..=50_999).contains(&seen.port()));

    let open = lab.open().await;
    assert_eq!(open.reason, Reason::Allowed);
    let What::Open { client, asked, actual, egress, .. } = open.what else { unreachable!() };
    assert_eq!((client.ip(), asked, actual, egress), (pod, to, Some(to), Some(seen)));

    assert_eq!(ask(&net, to, "b.example").unwrap_err().kind(), ErrorKind::ConnectionReset);
    lab.event(|e| e.reason == Reason::SniMismatch).await;
}

#[tokio::test]
async fn ipv4_is_steered_and_leaves_from_the_egress_address() {
    steered(&V4).await;
}

#[tokio::test]
async fn ipv6_is_steered_and_leaves_from_the_egress_address() {
    steered(&V6).await;
}
