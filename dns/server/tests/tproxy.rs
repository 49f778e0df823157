//! Queries to foreign servers, steered by TPROXY, in network namespaces: the
//! reply must come from the address and port that the pod asked. Needs root, `ip` and `nft`.
#![allow(clippy::unwrap_used, reason = "a test may fail")]

use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::time::Duration;

use hickory_proto::op::{Message, ResponseCode};
use nix::sched::{CloneFlags, setns};
use tidegate_dns::DnsConfig;
use tidegate_policy::event::What;

mod bench;
use bench::wiring::{Table, a, answer, query};
use bench::{Authority, Bench, Policy, config, ips, pod, read_framed, write_framed};

struct Netns(String);

fn run(args: &str) {
    let mut words = args.split_whitespace();
    let status = Command::new(words.next().unwrap()).args(words).stdin(Stdio::null()).status().unwrap();
    assert!(status.success(), "{args}");
}

impl Netns {
    fn new(role: &str) -> Self {
        let name = format!("tg-dns-{role}-{}", std::process::id());
        run(&format!("ip netns add {name}"));
        let ns = Self(name);
        ns.run("ip link set lo up");
        ns
    }

    fn run(&self, args: &str) {
        run(&format!("ip netns exec {} {args}", self.0));
    }

    /// Runs `f` on a thread of its own inside the namespace.
    fn inside<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|s| {
            s.spawn(|| {
                let file = std::fs::File::open(format!("/run/netns/{}", self.0)).unwrap();
                setns(file, CloneFlags::CLONE_NEWNET).unwrap();
                f()
            })
            .join()
            .unwrap()
        })
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.0]).status();
    }
}

const RULES: &str = "table inet dns {
  chain pre {
    type filter hook prerouting priority mangle;
    iifname g0 meta l4proto { udp, tcp } th dport 53 tproxy to :53 meta mark set 1 accept
    iifname g0 meta l4proto { udp, tcp } drop
  }
}";

fn link(gateway: &Netns, client: &Netns) {
    run(&format!("ip link add g0 netns {} type veth peer name c0 netns {}", gateway.0, client.0));
    for (ns, dev, last) in [(gateway, "g0", 1), (client, "c0", 2)] {
        ns.run(&format!("ip addr add 10.99.0.{last}/24 dev {dev}"));
        ns.run(&format!("ip addr add fd99::{last}/64 dev {dev} nodad"));
        ns.run(&format!("ip link set {dev} up"));
    }
    client.run("ip route add default via 10.99.0.1");
    client.run("ip -6 route add default via fd99::1");
    for family in ["-4", "-6"] {
        gateway.run(&format!("ip {family} rule add fwmark 1 lookup 100"));
        gateway.run(&format!("ip {family} route add local default dev lo table 100"));
    }
    let mut nft =
        Command::new("ip").args(["netns", "exec", &gateway.0, "nft", "-f", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut nft.stdin.take().unwrap(), RULES.as_bytes()).unwrap();
    assert!(nft.wait().unwrap().success());
}

#[test]
fn steered_queries_are_answered_from_where_they_went() {
    let (gateway, client) = (Netns::new("g"), Netns::new("c"));
    link(&gateway, &client);
    // The upstream and its sockets stay in this thread's namespace, on loopback.
    let up = Authority::start(|q| Some(answer(q.bytes, 0, &[a(&q.name, 60, [192, 0, 2, 1])], &[])));
    let runtime = bench::runtime();
    let c = DnsConfig { listen: vec!["[::]:53".parse().unwrap()], transparent: true, ..config(&[up.address]) };
    let b = gateway.inside(|| Bench::start_on(runtime, c, Table::default()));
    let askers = ["10.99.0.2", "fd99::2"].map(|ip| (ip.parse::<IpAddr>().unwrap(), pod(1).1)).into();
    b.view.store(std::sync::Arc::new(Policy { generation: 2, askers, table: Table::allowing(&["a.example"]) }));

    for server in ["8.8.8.8:53", "[2001:db8:53::53]:53", "10.99.0.1:53"] {
        let server: SocketAddr = server.parse().unwrap();
        let any: SocketAddr = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().unwrap();
        let (udp, tcp) = client.inside(|| {
            let s = UdpSocket::bind(any).unwrap();
            s.connect(server).unwrap();
            s.set_read_timeout(Some(Duration::from_secs(4))).unwrap();
            let t = TcpStream::connect_timeout(&server, Duration::from_secs(4)).unwrap();
            t.set_read_timeout(Some(Duration::from_secs(4))).unwrap();
            (s, t)
        });
        // A miss the first time, hits then, and a denial.
        for (id, name) in [(1, "a.example"), (2, "a.example"), (3, "evil.example")] {
            let q = query(name, 1, id, None);
            udp.send(&q).unwrap();
            let mut buffer = [0; 512];
            let n = udp.recv(&mut buffer).unwrap_or_else(|e| panic!("{server} {id}: {e}"));
            let mut by_tcp = tcp.try_clone().unwrap();
            write_framed(&mut by_tcp, &q);
            let framed = read_framed(&mut by_tcp).unwrap();
            for m in [&buffer[..n], &framed] {
                let m = Message::from_vec(m).unwrap();
                assert_eq!(m.metadata.id, id);
                match name {
                    "a.example" => assert_eq!(ips(&m).len(), 1),
                    _ => assert_eq!(m.metadata.response_code, ResponseCode::NXDomain),
                }
            }
        }
        let What::Dns { server: seen, .. } = b.last().what else { panic!() };
        assert_eq!(seen, server);
    }
}
