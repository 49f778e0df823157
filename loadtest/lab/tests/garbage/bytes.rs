//! Hostile bytes at every port, and messages that break the streams' contract.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tidegate_lab::Lab;
use tidegate_lab::family::FAMILIES;
use tidegate_lab::probe::dig;
use tidegate_random::noise;

use crate::{address, unaffected, up};

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

/// What is thrown at TCP ports.
fn throws() -> Vec<Vec<u8>> {
    let mut all = tidegate_random::hostile();
    // Lengths of DNS over TCP that promise too little and too much.
    all.push(vec![0, 0, 0, 0]);
    all.push([&[0xff, 0xff][..], &noise(8, 1000)].concat());
    all.push([&[0, 17][..], &noise(9, 17)].concat());
    all
}

/// A TLS client of the control port, with a certificate or without.
pub fn control(lab: &Lab, gateway: &str, who: Option<&str>) -> StreamOwned<ClientConnection, TcpStream> {
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
pub fn call(method: &str) -> Vec<u8> {
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

/// What the product's process listens on in a place, as `tcp 53`.
fn listens(lab: &Lab, place: &str) -> BTreeSet<String> {
    let out = lab.place(place).unwrap().run(&["ss", "-lntuHp"]).stdout;
    let own = out.lines().filter(|l| l.contains("\"tidegate\""));
    own.filter_map(|l| {
        let mut fields = l.split_whitespace();
        let protocol = fields.next()?;
        // A resolver's answer is waited for on a port of the moment.
        let port: u16 = fields.nth(3)?.rsplit_once(':')?.1.parse().ok()?;
        (protocol == "tcp" || port < 32768).then(|| format!("{protocol} {port}"))
    })
    .collect()
}

/// Hostile bytes at every port: what does not fit is refused, and no process ends.
#[test]
fn random_bytes_at_every_port() {
    let (_one, lab, before) = up("bytes");
    // What this test throws at is all that there is; the port of `api` is there with an API server only, and has its own test.
    assert_eq!(
        listens(&lab, "gw-a"),
        ["tcp 15001", "tcp 53", "tcp 7443", "tcp 9090", "udp 53"].map(String::from).into()
    );
    assert_eq!(listens(&lab, "node-1"), ["tcp 9091"].map(String::from).into());
    assert!(!dig(&lab.pod("shop/web"), "api.example.com", "A", &[]).answers.is_empty());
    assert!(!dig(&lab.pod("shop/web"), "api.example.com", "AAAA", &[]).answers.is_empty());

    let mut ports = vec![
        ("gw-a", SocketAddr::from(([127, 0, 0, 1], 9090))),
        ("gw-a", SocketAddr::from(([127, 0, 0, 1], 53))),
        ("node-1", SocketAddr::from(([127, 0, 0, 1], 9091))),
    ];
    // Queries' heads before noise, and what looks like a tunnel's.
    let questions = [&[][..], &[0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0], &[0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 63]];
    let tunnels = [&[][..], &[0, 0, 0x65, 0x58, 0, 0, 1, 0], &[8, 0, 0, 0, 0, 0, 1, 0]];
    let mut showers = Vec::new();
    for family in FAMILIES {
        let dns = SocketAddr::new(address(&lab, "kube-system/coredns", family), 53);
        let gateway = |port| SocketAddr::new(address(&lab, "tidegate-system/gw-a", family), port);
        let at = |text: &str, port| SocketAddr::new(text.parse().unwrap(), port);
        let (api, egress) =
            (family.pick("198.51.100.10", "2001:db8:100::10"), family.pick("203.0.113.10", "2001:db8::10"));
        // Steered, and at the gateway's own address from the cluster and from outside; control, admin; held addresses.
        ports.extend([
            ("shop/web", dns),
            ("shop/web", at(api, 443)),
            ("shop/web", gateway(7443)),
            ("node-2", gateway(7443)),
            ("router", gateway(9090)),
            ("internet", at(egress, 443)),
        ]);
        for port in [53, 15001] {
            ports.extend(["shop/local", "node-2", "router"].map(|from| (from, gateway(port))));
        }
        for head in questions {
            showers.push(("shop/web", dns, head));
            showers.push(("router", gateway(53), head));
            showers.push(("shop/local", gateway(53), head));
        }
        for node in ["node-1", "gw-node-a"] {
            let node = lab.scenario().node(node).unwrap();
            let node = SocketAddr::new(family.pick(node.ipv4.into(), node.ipv6.into()), 8475);
            for head in tunnels {
                showers.extend(["router", "node-2"].map(|from| (from, node, head)));
            }
        }
        showers.push(("internet", at(egress, 8475), tunnels[1]));
    }
    let bad = lab.metric("gw-a", "tidegate_dns_queries_total", &["dns-malformed"]).unwrap();
    std::thread::scope(|scope| {
        for (place, to) in ports {
            let lab = &lab;
            scope.spawn(move || throws().iter().for_each(|bytes| throw(lab, place, to, bytes)));
        }
        for (place, to, head) in showers {
            shower(&lab, place, to, head);
        }
    });
    let dropped = lab.metric("gw-a", "tidegate_dns_queries_total", &["dns-malformed"]).unwrap();
    assert!(dropped > bad, "bad queries are counted");
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

    // The one for the CNI plugin.
    let add = |rest: &str| {
        let of = r#""attachment":{"container":"c","ifname":"eth0"},"pod":{"namespace":"shop","name":"web","uid":"u"}"#;
        format!(r#"{{"version":1,"ask":{{"add":{{{of},{rest}}}}}}}"#).into_bytes()
    };
    let lines = [
        vec![],
        noise(1, 100),
        noise(2, 3_000_000),
        b"{\n".to_vec(),
        vec![b'['; 60_000],
        br#"{"version":2,"ask":{"gc":[]}}"#.to_vec(),
        br#"{"version":1,"ask":{"sing":1}}"#.to_vec(),
        br#"{"version":1,"ask":{"gc":[{}]}}"#.to_vec(),
        add(r#""addresses":[],"ifindex":7"#),
        add(r#""addresses":["10.244.1.2"],"ifindex":0"#),
        add(r#""addresses":["10.244.1.2"],"ifindex":4294967296"#),
        add(&format!(r#""addresses":[{}"10.244.1.2"],"ifindex":7"#, r#""10.244.1.2","#.repeat(16))),
    ];
    for node in ["node-1", "gw-node-a"] {
        for line in &lines {
            let socket = lab.layout().cni(node).join("run").join("agent.sock");
            let mut stream = UnixStream::connect(socket).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            stream.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
            // What is too long is not read to its end.
            let _ = stream.write_all(line);
            let _ = stream.write_all(b"\n");
            let mut answer = String::new();
            let _ = stream.read_to_string(&mut answer);
            let text = String::from_utf8_lossy(&line[..line.len().min(80)]);
            assert!(answer.starts_with(r#"{"refused""#) || answer.is_empty(), "{node}: {text}: {answer}");
            assert!(line.len() > 1 << 20 || !answer.is_empty(), "{node}: {text}: no answer");
        }
    }
    unaffected(&lab, &before, "noise at the agents' sockets for the CNI plugin");
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
