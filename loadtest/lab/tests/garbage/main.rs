//! What hostile bytes, broken files, resolvers that lie and a full disk must not do: end a process, or hurt others.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::json;
use tidegate_lab::family::FAMILIES;
use tidegate_lab::lab::wait_for;
use tidegate_lab::liar::{self, Liar, noise};
use tidegate_lab::probe::{Echo, Knock, curl, dig, knock};
use tidegate_lab::{Lab, Mark, Options, Scenario};

static ONE: Mutex<()> = Mutex::new(());
const GATEWAYS: [&str; 2] = ["gw-a", "gw-b"];
/// The resolvers of the names that end in `lies`, `mute` and `void`.
const LIAR: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 54);
const MUTE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 55);
const VOID: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 56);
/// What one query may take when its resolver is lost, with some patience for a busy machine.
const FAILURE: Duration = Duration::from_secs(7);

fn up(name: &str) -> (MutexGuard<'static, ()>, Lab, Vec<i32>) {
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/demo.yaml");
    let mut scenario = Scenario::load(file.as_ref()).unwrap();
    let group =
        |ip: Ipv4Addr, suffix: &str| json!({"servers": [format!("{ip}:53")], "protocol": "Udp", "suffixes": [suffix]});
    let resolvers = json!([
        {"servers": ["198.51.100.53:53", "[2001:db8:100::53]:53"], "protocol": "Udp"},
        group(LIAR, "lies.example.com"),
        group(MUTE, "mute.example.com"),
        group(VOID, "void.example.com"),
    ]);
    scenario.tidegate.as_mut().unwrap().gateway.insert("resolvers".into(), resolvers);
    let options = Options { lab: Some(env!("CARGO_BIN_EXE_tidegate-lab").into()), ..Options::unique(name) };
    let lab = Lab::up(scenario, &options).unwrap();
    let pids = pids(&lab);
    (one, lab, pids)
}

fn pids(lab: &Lab) -> Vec<i32> {
    lab.product_names().iter().map(|n| lab.process(n).unwrap()).filter(|p| p.is_alive()).map(|p| p.pid).collect()
}

/// Tenants, those of the same namespace and others, reach what they may, and every process is the one that it was.
#[track_caller]
fn unaffected(lab: &Lab, before: &[i32], what: &str) {
    for family in FAMILIES {
        for (pod, v4, v6) in
            [("shop/worker", "203.0.113.10", "2001:db8::10"), ("billing/pay", "203.0.113.20", "2001:db8::20")]
        {
            let seen = curl(&lab.pod(pod), family, "https://api.example.com/", &[]);
            let egress: IpAddr = family.pick(v4, v6).parse().unwrap();
            assert_eq!(seen.source(), Some(egress), "{pod} after {what}: {}", seen.text());
        }
    }
    assert_eq!(pids(lab), before, "the processes after {what}");
    for name in lab.product_names() {
        assert_eq!(lab.admin(&name, "/healthz").unwrap().0, 200, "{name} after {what}");
    }
}

/// A rule for names of the test's own resolvers.
fn allow_lies(lab: &Lab) {
    let text = r#"
apiVersion: tidegate.dev/v1alpha1
kind: EgressPolicy
metadata: {name: lies, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  poolRef: {name: partner-a}
  egress:
  - name: lies
    toFQDNs: [{matchPattern: "*.lies.example.com"}, {matchPattern: "*.mute.example.com"}, {matchPattern: "*.void.example.com"}]
    toPorts: [{protocol: TCP, port: 7000}]
    sni: Unchecked
"#;
    lab.edit_manifest("lies.yaml", text).unwrap();
    let known = wait_for(Duration::from_secs(10), || {
        (dig(&lab.pod("shop/web"), "known.lies.example.com", "A", &[]).status == "NOERROR").then_some(())
    });
    assert!(known.is_some(), "the policy is in force");
}

/// A resolver that lies is caught: a reason, no fact, no packet.
#[test]
fn a_lying_resolver_teaches_nothing() {
    let (_one, lab, before) = up("lies");
    let _liar = Liar::start(lab.place("internet").unwrap().netns(), LIAR).unwrap();
    allow_lies(&lab);
    let web = lab.pod("shop/web");
    let to = |lie: &str| SocketAddr::new(liar::address(lie).into(), 7000);
    let watches: Vec<_> = liar::FATAL.iter().map(|l| (*l, lab.watch(liar::address(l).into(), "").unwrap())).collect();
    let mark = lab.mark();
    std::thread::scope(|scope| {
        for lie in liar::FATAL {
            let (web, lab, mark) = (&web, &lab, &mark);
            scope.spawn(move || {
                let name = format!("{lie}.lies.example.com");
                let started = Instant::now();
                let seen = dig(web, &name, "A", &["+time=9"]);
                assert_eq!(seen.status, "SERVFAIL", "{lie}: {}", seen.text());
                assert!(started.elapsed() < FAILURE, "{lie}: {:?}", started.elapsed());
                let fits = |r: &serde_json::Value| r["kind"] == "dns" && r["name"] == *name;
                let record = lab.wait_audit(&GATEWAYS, mark, fits);
                assert_eq!(record.unwrap()["reason"], "dns-upstream", "{lie}");
                assert_eq!(knock(web, to(lie)).unwrap(), Knock::Silent, "{lie} taught an address");
            });
        }
    });
    for (lie, watch) in &watches {
        assert_eq!(watch.packets().unwrap(), 0, "{lie}: a packet left");
    }
    // A time to live with the top bit set is none (RFC 2181, section 8), and none is no permission for good.
    for lie in liar::BRIEF {
        let name = format!("{lie}.lies.example.com");
        let seen = dig(&web, &name, "A", &[]);
        assert_eq!(seen.answers, [liar::address(lie).to_string()], "{lie}: {}", seen.text());
        Echo::connect(&web, to(lie)).unwrap();
    }
    // The shortest life, 1 s, its grace, 1 s, and the sweep.
    std::thread::sleep(Duration::from_secs(4));
    let mark = lab.mark();
    for lie in liar::BRIEF {
        assert_eq!(knock(&web, to(lie)).unwrap(), Knock::Silent, "{lie} lives on");
        let ip = liar::address(lie).to_string();
        let fits = |r: &serde_json::Value| r["kind"] == "packet" && r["destination"]["asked"]["ip"] == *ip;
        let record = lab.wait_audit(&["node-1", "gw-a", "gw-b"], &mark, fits).unwrap();
        let reason = record["reason"].as_str().unwrap();
        assert!(["binding-expired", "no-binding", "not-allowed"].contains(&reason), "{lie}: {record}");
    }
    unaffected(&lab, &before, "lies");
}

/// A resolver that is gone costs those who ask it a SERVFAIL in bounded time, and nobody else anything.
#[test]
fn an_unreachable_resolver_fails_alone() {
    let (_one, lab, before) = up("mute");
    // Held and never read: no answer, no error. Nobody at all is at the other: ICMP errors.
    let _mute = lab.place("internet").unwrap().within(|| UdpSocket::bind((MUTE, 53))).unwrap().unwrap();
    let liar = Liar::start(lab.place("internet").unwrap().netns(), LIAR).unwrap();
    allow_lies(&lab);
    drop(liar);
    let web = lab.pod("shop/web");
    let mark = lab.mark();
    std::thread::scope(|scope| {
        for of in ["mute", "void"] {
            for n in 0..20 {
                let (web, lab, mark) = (&web, &lab, &mark);
                scope.spawn(move || {
                    let name = format!("n{n}.{of}.example.com");
                    let started = Instant::now();
                    let seen = dig(web, &name, "A", &["+time=12"]);
                    assert_eq!(seen.status, "SERVFAIL", "{name}: {}", seen.text());
                    assert!(started.elapsed() < FAILURE, "{name}: {:?}", started.elapsed());
                    let fits = |r: &serde_json::Value| r["kind"] == "dns" && r["name"] == *name;
                    assert_eq!(lab.wait_audit(&GATEWAYS, mark, fits).unwrap()["reason"], "dns-upstream");
                });
            }
        }
        std::thread::sleep(Duration::from_millis(500));
        let started = Instant::now();
        let seen = dig(&web, "fresh.one.example.net", "A", &[]);
        assert_eq!(seen.status, "NOERROR", "others' names resolve meanwhile: {}", seen.text());
        assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    });
    unaffected(&lab, &before, "lost resolvers");
}

/// Bytes by TCP to a port, from a place; what comes back is read to its end, or for a second.
fn throw(lab: &Lab, place: &str, to: SocketAddr, bytes: &[u8]) {
    lab.place(place)
        .unwrap()
        .within(|| {
            let Ok(mut stream) = TcpStream::connect_timeout(&to, Duration::from_millis(500)) else { return };
            stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            stream.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
            // A peer that has had enough may close while we still write.
            let _ = stream.write_all(bytes);
            let _ = stream.read(&mut [0; 4096]);
        })
        .unwrap();
}

/// Datagrams of every length up to 1,400 octets, and from one port.
fn shower(lab: &Lab, place: &str, to: SocketAddr, head: &[u8]) {
    lab.place(place)
        .unwrap()
        .within(|| {
            let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
            let socket = UdpSocket::bind(SocketAddr::new(any, 0)).unwrap();
            for n in 0..200u64 {
                let bytes = [head, &noise(n, n as usize * 7)].concat();
                // Errors reported back are part of the game.
                let _ = socket.send_to(&bytes, to);
            }
        })
        .unwrap();
}

/// What is thrown at TCP ports: nothing, a byte, noise, much noise, and heads of protocols that go wrong after them.
fn throws() -> Vec<Vec<u8>> {
    let mut all = vec![vec![], vec![0], vec![0xff; 3], noise(1, 64), noise(2, 5_000), noise(3, 300_000)];
    all.push([b"GET /".as_slice(), &[b'a'; 100_000]].concat());
    all.push(b"POST /config HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n".to_vec());
    // TLS records: a hello cut short, one longer than any, one of noise, an alert.
    all.push([&[22, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xfc, 3, 3][..], &noise(4, 200)].concat());
    all.push([&[22, 3, 1, 0xff, 0xff, 1, 0xff, 0xff, 0xff][..], &noise(5, 70_000)].concat());
    all.push([&[22, 3, 3, 0, 200][..], &noise(6, 200)].concat());
    all.push(vec![21, 3, 3, 0, 2, 2, 40]);
    all.push([b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice(), &noise(7, 500)].concat());
    // Lengths of DNS over TCP that promise too little and too much.
    all.push(vec![0, 0, 0, 0]);
    all.push([&[0xff, 0xff][..], &noise(8, 1000)].concat());
    all.push([&[0, 17][..], &noise(9, 17)].concat());
    all
}

/// A TLS client of the control port, with a certificate or without.
fn control(lab: &Lab, gateway: &str, who: Option<&str>) -> StreamOwned<ClientConnection, TcpStream> {
    let ca = lab.layout().ca();
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca.join("control.crt")).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let builder = builder.with_root_certificates(roots);
    let mut config = match who {
        Some(name) => {
            let chain = vec![CertificateDer::from_pem_file(ca.join(format!("{name}.crt"))).unwrap()];
            builder
                .with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(ca.join(format!("{name}.key"))).unwrap())
                .unwrap()
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let name = ServerName::try_from(format!("{gateway}.gateway.tidegate")).unwrap();
    let pod = lab.scenario().pod(&format!("tidegate-system/{gateway}")).unwrap().ipv4.unwrap();
    let to = SocketAddr::new(pod.into(), 7443);
    let connect = || TcpStream::connect_timeout(&to, Duration::from_secs(3));
    let stream = lab.place("node-2").unwrap().within(connect).unwrap().unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(6))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(6))).unwrap();
    StreamOwned::new(ClientConnection::new(Arc::new(config), name).unwrap(), stream)
}

/// An HTTP/2 frame (RFC 9113, section 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The start of a gRPC call: preface, settings, headers without Huffman coding (RFC 7541).
fn call(method: &str) -> Vec<u8> {
    let text = |s: &str| [&[s.len() as u8], s.as_bytes()].concat();
    let mut block = vec![0x83, 0x87];
    block.extend([&[0x04], &text(&format!("/tidegate.v1.Control/{method}"))[..]].concat());
    block.extend([&[0x01], &text("gw")[..]].concat());
    block.extend([&[0x0f, 0x10], &text("application/grpc")[..]].concat());
    block.extend([&[0x00], &text("te")[..], &text("trailers")[..]].concat());
    [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(4, 0, 0, &[]), frame(1, 4, 1, &block)].concat()
}

/// Sends bytes, and says whether the call, or the whole connection, was ended by the other side.
fn is_ended(mut stream: StreamOwned<ClientConnection, TcpStream>, bytes: &[u8]) -> bool {
    if stream.write_all(bytes).is_err() {
        return true;
    }
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return true,
            Ok(n) => seen.extend_from_slice(&buffer[..n]),
            Err(e) => return !matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut),
        }
        let mut rest = &seen[..];
        while let Some((head, body)) = rest.split_at_checked(9) {
            let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
            let own = head[5..9] == [0, 0, 0, 1];
            match head[3] {
                3 if own => return true,
                0 | 1 if own && head[4] & 1 == 1 => return true,
                7 => return true,
                _ => {}
            }
            let Some((_, next)) = body.split_at_checked(length) else { break };
            rest = next;
        }
    }
}

/// Hostile bytes at every port: what does not fit is refused, and no process ends.
#[test]
fn random_bytes_at_every_port() {
    let (_one, lab, before) = up("bytes");
    let address = |pod: &str| lab.scenario().pod(pod).unwrap().ipv4.unwrap();
    let (dns, gateway) = (address("kube-system/coredns"), address("tidegate-system/gw-a"));
    let at = |ip: Ipv4Addr, port| SocketAddr::new(ip.into(), port);
    assert!(!dig(&lab.pod("shop/web"), "api.example.com", "A", &[]).answers.is_empty());

    // DNS, steered: noise, and noise behind the heads of queries.
    for head in [&[][..], &[0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0], &[0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 63]] {
        shower(&lab, "shop/web", at(dns, 53), head);
    }
    // DNS over TCP, the relay with and without a destination, control, admin ports.
    let api = Ipv4Addr::new(198, 51, 100, 10);
    let ports = [
        ("shop/web", at(dns, 53)),
        ("shop/web", at(api, 443)),
        ("shop/local", at(gateway, 15001)),
        ("router", at(gateway, 15001)),
        ("node-2", at(gateway, 7443)),
        ("shop/web", at(gateway, 7443)),
        ("router", at(gateway, 9090)),
        ("gw-a", at(Ipv4Addr::LOCALHOST, 9090)),
        ("node-1", at(Ipv4Addr::LOCALHOST, 9091)),
    ];
    std::thread::scope(|scope| {
        for (place, to) in ports {
            let lab = &lab;
            scope.spawn(move || throws().iter().for_each(|bytes| throw(lab, place, to, bytes)));
        }
    });
    // The tunnel's port, with and without what looks like a head of Geneve.
    for node in ["node-1", "gw-node-a"] {
        let node = lab.scenario().node(node).unwrap().ipv4;
        for head in [&[][..], &[0, 0, 0x65, 0x58, 0, 0, 1, 0], &[0, 0, 8, 0, 0, 0, 1, 0]] {
            shower(&lab, "router", at(node, 8475), head);
            shower(&lab, "node-2", at(node, 8475), head);
        }
    }
    let dropped = lab.metric("gw-a", "tidegate_dns_queries_total", &["dns-malformed"]).unwrap();
    assert!(dropped > 0.0, "bad queries are counted");
    unaffected(&lab, &before, "noise at all ports");

    // The agent's Unix socket.
    let hello = br#"{"gateway":"gw-x","tunnelMtu":1450,"static":["203.0.113.10"]}"#;
    let lines = [
        vec![],
        noise(1, 100),
        noise(2, 200_000),
        b"\n\n\n".to_vec(),
        b"{\n".to_vec(),
        vec![b'['; 60_000],
        [hello.as_slice(), b"\n"].concat(),
        br#"{"renew":true,"static":["203.0.113.10"]}"#.to_vec(),
    ];
    for node in ["node-1", "gw-node-a"] {
        for line in &lines {
            let mut stream = UnixStream::connect(lab.layout().socket(node)).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
            stream.set_write_timeout(Some(Duration::from_secs(3))).unwrap();
            let _ = stream.write_all(line);
            let _ = stream.write_all(b"\n");
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let mut answer = String::new();
            let _ = stream.read_to_string(&mut answer);
            assert!(!answer.contains("plugged"), "without a namespace nothing is plugged in: {answer}");
        }
    }
    unaffected(&lab, &before, "noise at the agents' sockets");
}

/// Messages that break the streams' contract end the call that brought them, and nothing else.
#[test]
fn broken_messages_on_the_streams() {
    let (_one, lab, before) = up("streams");
    // Without a certificate of the cluster's authority there is no call at all.
    assert!(is_ended(control(&lab, "gw-a", None), &call("State")));
    let message = |length: u32, body: &[u8]| [&[0][..], &length.to_be_bytes(), body].concat();
    // A field that claims more than there is; a group that never ends; an id of 0; nesting in the oneof.
    let fields = [vec![0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f], vec![0x0b; 200], vec![0, 0, 0], [0x0a, 2].repeat(500)];
    let whole = |body: &[u8]| message(body.len() as u32, body);
    let mut bodies = vec![
        ("truncated", frame(0, 1, 1, &message(100, &noise(1, 10)))),
        ("without an end", frame(0, 1, 1, &[0, 0, 0])),
        ("oversized", frame(0, 0, 1, &message(u32::MAX, &noise(2, 1000)))),
        ("of 1 GiB", frame(0, 0, 1, &message(1 << 30, &noise(3, 1000)))),
        ("compressed", frame(0, 0, 1, &[&[1][..], &whole(&noise(4, 50))[1..]].concat())),
        ("noise", frame(0, 0, 1, &whole(&noise(5, 300)))),
        ("empty", frame(0, 0, 1, &whole(&[]))),
        // Hello of another node: "node-1" with node-2's certificate.
        ("another's hello", frame(0, 0, 1, &whole(b"\x0a\x0a\x0a\x06node-1\x10\x07"))),
        ("frames out of nothing", [frame(9, 0, 7, &noise(6, 40)), frame(0, 0, 99, &noise(7, 40))].concat()),
    ];
    bodies.extend(fields.iter().map(|f| ("bad fields", frame(0, 0, 1, &whole(f)))));
    std::thread::scope(|scope| {
        for (what, body) in &bodies {
            for (method, who) in [
                ("State", "node-2.node.tidegate"),
                ("Facts", "node-2.node.tidegate"),
                ("Peer", "gw-b.gateway.tidegate"),
            ] {
                let lab = &lab;
                scope.spawn(move || {
                    let bytes = [call(method), body.clone()].concat();
                    assert!(is_ended(control(lab, "gw-a", Some(who)), &bytes), "{method}: {what}");
                });
            }
        }
    });
    // A gateway takes no node's part, and a node no gateway's.
    let hello = whole(b"\x0a\x0e\x0a\x04gw-b\x10\x07");
    let bytes = [call("State"), frame(0, 0, 1, &hello)].concat();
    assert!(is_ended(control(&lab, "gw-a", Some("gw-b.gateway.tidegate")), &bytes));
    unaffected(&lab, &before, "broken messages");
}

/// Bad manifests among good ones: the good ones hold and change, the bad ones are named.
#[test]
fn bad_manifests_among_good_ones() {
    let (_one, lab, before) = up("manifests");
    let folder = lab.layout().manifests();
    let policy = |spec: &str| {
        format!(
            "apiVersion: tidegate.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {{name: bad, namespace: shop}}\nspec:\n{spec}\n"
        )
    };
    let bomb = (1..12).fold("a0: &a0 [x,x,x,x,x,x,x,x,x]\n".to_owned(), |s, n| {
        let p = n - 1;
        format!("{s}a{n}: &a{n} [*a{p},*a{p},*a{p},*a{p},*a{p},*a{p},*a{p},*a{p},*a{p}]\n")
    });
    let bad: Vec<(&str, Vec<u8>)> = vec![
        ("bad-noise.yaml", noise(1, 5_000)),
        ("bad-utf8.yaml", b"apiVersion: \xff\xfe\n".to_vec()),
        ("bad-bomb.yaml", bomb.into_bytes()),
        ("bad-deep.yaml", [vec![b'['; 20_000], vec![b']'; 20_000]].concat()),
        ("bad-json.json", b"{\"apiVersion\": \"tidegate.dev/v1alpha1\",".to_vec()),
        ("bad-field.yaml", policy("  podSelector: {}\n  egres: []").into()),
        ("bad-type.yaml", policy("  podSelector: 7\n  egress: {}").into()),
        ("bad-port.yaml", policy("  podSelector: {}\n  egress: [{toFQDNs: [{matchName: a.example}], toPorts: [{protocol: TCP, port: 70000}]}]").into()),
        ("bad-name.yaml", policy("  podSelector: {}\n  egress: [{toFQDNs: [{matchName: \"a..b\"}], toPorts: [{protocol: TCP, port: 443}]}]").into()),
        ("bad-pattern.yaml", policy("  podSelector: {}\n  egress: [{toFQDNs: [{matchPattern: \"**\"}, {matchPattern: \"a*b*\"}], toPorts: [{protocol: TCP, port: 443}]}]").into()),
        ("bad-version.yaml", b"apiVersion: tidegate.dev/v9\nkind: EgressPolicy\nmetadata: {name: x, namespace: shop}\nspec: {}\n".to_vec()),
    ];
    for (name, bytes) in &bad {
        let temporary: PathBuf = lab.layout().folder.join(name);
        std::fs::write(&temporary, bytes).unwrap();
        std::fs::rename(&temporary, folder.join(name)).unwrap();
    }
    for gateway in GATEWAYS {
        for (name, _) in &bad {
            let log = || std::fs::read_to_string(lab.layout().log(gateway)).unwrap();
            let named = wait_for(Duration::from_secs(15), || log().contains(name).then_some(()));
            assert!(named.is_some(), "{gateway} names {name} in its log");
            let status =
                wait_for(Duration::from_secs(5), || lab.admin(gateway, "/status").ok()?.1.contains(name).then_some(()));
            assert!(status.is_some(), "{gateway} names {name} in its status");
        }
    }
    unaffected(&lab, &before, "bad manifests");
    // What is good still changes, in both directions.
    let web = lab.pod("shop/web");
    let good = lab.manifest("shop.yaml").unwrap();
    lab.edit_manifest("shop.yaml", &good.replace("www.example.com", "other.example.org")).unwrap();
    let asked = |name: &str, want: &str| {
        wait_for(Duration::from_secs(15), || (dig(&web, name, "A", &[]).status == want).then_some(())).is_some()
    };
    assert!(asked("other.example.org", "NOERROR"), "a good change comes through");
    assert!(asked("www.example.com", "NXDOMAIN"), "and takes away what it takes away");
    unaffected(&lab, &before, "a good change among bad ones");
}

/// A small filesystem over the folder of audit logs, until it is dropped.
struct Full(PathBuf);

impl Full {
    fn over(folder: PathBuf) -> Self {
        mount(Some("tmpfs"), &folder, Some("tmpfs"), MsFlags::empty(), Some("size=64k")).unwrap();
        Self(folder)
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        // Detached: the product may hold files on it.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// The disk of the audit log is full: traffic flows, what is lost is counted, and said once there is room.
#[test]
fn a_full_disk_loses_records_and_nothing_else() {
    let (_one, lab, before) = up("full");
    let web = lab.pod("shop/web");
    let lost = || -> f64 { GATEWAYS.iter().map(|g| lab.metric(g, "tidegate_audit_lost_total", &[]).unwrap()).sum() };
    assert_eq!(lost(), 0.0);
    let full = Full::over(lab.layout().folder.join("audit"));
    let dns = SocketAddr::new(lab.scenario().pod("kube-system/coredns").unwrap().ipv4.unwrap().into(), 53);
    let ask = |round: usize| {
        let work = || {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            for n in 0..200u16 {
                let _ = socket.send_to(&liar::query(n, &format!("denied-{round}-{n}.example.org"), 1), dns);
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        web.within(work).unwrap();
    };
    let counted = (0..20).any(|round| {
        ask(round);
        std::thread::sleep(Duration::from_millis(300));
        lost() > 0.0
    });
    assert!(counted, "what was lost is counted");
    unaffected(&lab, &before, "a full disk");
    let log = GATEWAYS.map(|g| std::fs::read_to_string(lab.layout().log(g)).unwrap()).concat();
    assert!(log.contains("the audit log cannot be written"), "said in the log");
    drop(full);
    let told = wait_for(Duration::from_secs(8), || {
        GATEWAYS.iter().find_map(|g| lab.audit(g, &Mark::default()).ok()?.into_iter().find(|r| r["lost"].is_object()))
    });
    let told = told.unwrap();
    assert!(told["lost"]["dns"].as_u64().unwrap_or(0) > 0, "the next record says how many: {told}");
    let mark = lab.mark();
    assert_eq!(dig(&web, "denied.example.org", "A", &[]).status, "NXDOMAIN");
    assert!(lab.wait_audit(&GATEWAYS, &mark, |r| r["name"] == "denied.example.org").is_some(), "written again");
    unaffected(&lab, &before, "room again");
}
