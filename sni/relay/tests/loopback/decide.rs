//! What the relay lets through, what it refuses, and what it says about it.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use crate::common::*;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::ServerName;
use tidegate_policy::Reason;
use tidegate_policy::event::{Event, Verdict, What};
use tidegate_sni::{Error, Relay, RelayConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

/// Waits until the relay ends a raw connection, and says how.
async fn ending(stream: &mut TcpStream) -> ErrorKind {
    let mut sink = [0; 1024];
    loop {
        match soon(stream.read(&mut sink)).await {
            Ok(0) => return ErrorKind::UnexpectedEof,
            Ok(_) => {}
            Err(e) => return e.kind(),
        }
    }
}

/// How the relay ends a connection that it does not even read.
async fn turned_away(lab: &Lab) -> ErrorKind {
    match TcpStream::connect(lab.relay.addresses()[0]).await {
        Ok(mut stream) => ending(&mut stream).await,
        Err(e) => e.kind(),
    }
}

async fn refused(lab: &Lab, first: &[u8], reason: Reason) {
    let mut stream = lab.tcp().await;
    stream.write_all(first).await.unwrap();
    assert_eq!(ending(&mut stream).await, ErrorKind::ConnectionReset, "{reason}");
    let event = lab.open().await;
    assert_eq!((event.verdict, event.reason), (Verdict::Deny, reason));
}

#[tokio::test]
async fn an_allowed_name_goes_through_and_is_told() {
    let lab = Lab::new();
    let server = echo(&lab).await;
    let mut stream = lab.tls("a.example").await.unwrap();
    stream.write_all(b"tide").await.unwrap();
    let mut got = [0; 4];
    stream.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"tide");
    assert_eq!(lab.relay.registry().live(SCOPE, server.ip()), 1);
    stream.shutdown().await.unwrap();
    assert_eq!(soon(stream.read(&mut got)).await.unwrap(), 0);

    let open = lab.open().await;
    assert_eq!((open.verdict, open.reason, open.rule), (Verdict::Allow, Reason::Allowed, Some(rule())));
    let What::Open { client, asked, actual, egress, sni, .. } = open.what else { unreachable!() };
    assert_eq!((asked, actual, sni.as_deref()), (server, Some(server), Some("a.example")));
    assert_eq!(client, stream.get_ref().0.local_addr().unwrap());
    assert!(egress.is_some());
    let close = lab.close().await;
    assert_eq!((close.verdict, close.reason), (Verdict::Allow, Reason::Allowed));
    lab.left(0).await;
    assert_eq!(lab.relay.registry().live(SCOPE, server.ip()), 0);
}

#[tokio::test]
async fn a_name_that_is_not_bound_to_the_address_is_reset() {
    let lab = Lab::new();
    echo(&lab).await;
    let error = lab.tls("b.example").await.unwrap_err();
    assert!(is_reset(&error), "{error}");
    let event = lab.open().await;
    assert_eq!((event.verdict, event.reason), (Verdict::Deny, Reason::SniMismatch));
    let What::Open { actual, sni, .. } = event.what else { unreachable!() };
    assert_eq!((actual, sni.as_deref()), (None, Some("b.example")));
    lab.left(0).await;
}

#[tokio::test]
async fn what_names_no_server_is_reset() {
    let lab = Lab::new();
    echo(&lab).await;
    refused(&lab, b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n", Reason::NotTls).await;
    let lab = Lab::new();
    echo(&lab).await;
    refused(&lab, &hello("192.0.2.1"), Reason::SniMissing).await;
    let lab = Lab::new();
    refused(&lab, &[22, 3, 1, 0, 4, 1, 1, 0, 0], Reason::HelloTooLarge).await;
    let lab = Lab::new();
    refused(&lab, &[22, 3, 1, 0, 4, 2, 0, 0, 0], Reason::HelloMalformed).await;
}

#[tokio::test]
async fn a_client_that_leaves_before_its_hello_is_told() {
    let lab = Lab::new();
    lab.tcp().await.shutdown().await.unwrap();
    assert_eq!(lab.open().await.reason, Reason::NotTls);
    let lab = Lab::new();
    let mut stream = lab.tcp().await;
    stream.write_all(&hello("a.example")[..40]).await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(lab.open().await.reason, Reason::HelloMalformed);
}

#[tokio::test]
async fn a_hello_may_come_slowly_but_not_too_slowly() {
    let lab = Lab::with(RelayConfig { hello_timeout: Duration::from_millis(600), ..config() });
    let echo = echo(&lab).await;
    let hello = hello("a.example");
    let mut slow = lab.tcp().await;
    for part in hello.chunks(hello.len().div_ceil(5)) {
        slow.write_all(part).await.unwrap();
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    let open = lab.open().await;
    assert_eq!((open.reason, open.verdict), (Reason::Allowed, Verdict::Allow));
    assert!(matches!(open.what, What::Open { actual: Some(a), .. } if a == echo));
    drop(slow);

    let mut silent = lab.tcp().await;
    silent.write_all(&hello[..hello.len() - 1]).await.unwrap();
    let begin = Instant::now();
    assert_eq!(ending(&mut silent).await, ErrorKind::ConnectionReset);
    assert!(begin.elapsed() > Duration::from_millis(300));
    lab.event(|e| e.reason == Reason::HelloTimeout && e.verdict == Verdict::Deny).await;
}

#[tokio::test]
async fn strangers_and_forbidden_destinations_are_reset() {
    let lab = Lab::new();
    lab.table.strangers.lock().insert([127, 0, 0, 1].into());
    assert_eq!(turned_away(&lab).await, ErrorKind::ConnectionReset);
    let event = lab.open().await;
    assert_eq!((event.reason, event.who), (Reason::UnknownPod, None));

    let lab = Lab::new();
    let server = echo(&lab).await;
    lab.table.forbidden.lock().insert(server);
    refused(&lab, &hello("a.example"), Reason::NotAllowed).await;
}

#[tokio::test]
async fn a_quota_bounds_connections_without_a_hello_too() {
    let lab = Lab::with(RelayConfig { quota: 2, ..config() });
    echo(&lab).await;
    let first = lab.tcp().await;
    let mut second = lab.tls("a.example").await.unwrap();
    assert_eq!(turned_away(&lab).await, ErrorKind::ConnectionReset);
    lab.event(|e| e.reason == Reason::Quota && e.verdict == Verdict::Deny).await;
    drop(first);
    lab.event(|e| e.reason == Reason::NotTls).await;
    while lab.relay.registry().len() > 1 {
        tokio::task::yield_now().await;
    }
    lab.tls("a.example").await.unwrap();
    second.write_all(b"still here").await.unwrap();
}

#[tokio::test]
async fn an_address_that_refuses_is_told() {
    let lab = Lab::new();
    let server = echo(&lab).await;
    lab.bind("a.example", fresh_ip().into());
    let ip = fresh_ip().into();
    lab.bind("a.example", ip);
    lab.ask((ip, server.port()).into());
    refused(&lab, &hello("a.example"), Reason::ConnectFailed).await;
    assert_eq!(lab.open().await.rule, Some(rule()));
    assert_eq!(lab.count(|e| matches!(e.what, What::Close { .. })), 0);
}

/// An address that takes no more connections and does not answer: a full backlog.
struct Hole {
    _listener: socket2::Socket,
    _full: Vec<socket2::Socket>,
}

fn hole(ip: std::net::IpAddr, port: u16) -> Hole {
    let address = std::net::SocketAddr::new(ip, port).into();
    let make = || socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    let listener = make();
    listener.bind(&address).unwrap();
    listener.listen(0).unwrap();
    let full = (0..4)
        .map(|_| {
            let s = make();
            s.set_nonblocking(true).unwrap();
            let _ = s.connect(&address);
            s
        })
        .collect();
    Hole { _listener: listener, _full: full }
}

#[tokio::test]
async fn another_bound_address_is_raced_when_the_asked_one_is_silent() {
    let start = Duration::from_millis(1500);
    let lab = Lab::with(RelayConfig { race_delay: start, ..config() });
    let live = echo(&lab).await;
    let (dead, refusing) = (fresh_ip().into(), fresh_ip().into());
    let _hole = hole(dead, live.port());
    lab.bind("a.example", dead);
    lab.table.others.lock().insert("a.example".into(), vec![dead, refusing, live.ip()]);
    let asked = (dead, live.port()).into();
    lab.ask(asked);
    let begin = Instant::now();
    let mut stream = soon(lab.tls("a.example")).await.unwrap();
    // One head start; the address that refuses hands on at once.
    assert!(begin.elapsed() >= start, "{:?}", begin.elapsed());
    assert!(begin.elapsed() < start * 2, "{:?}", begin.elapsed());
    stream.write_all(b"x").await.unwrap();
    let What::Open { asked: was, actual, .. } = lab.open().await.what else { unreachable!() };
    assert_eq!((was, actual), (asked, Some(live)));
}

#[tokio::test]
async fn addresses_of_the_asked_ones_family_come_first() {
    let lab = Lab::with(RelayConfig { race_delay: Duration::from_millis(10), ..config() });
    let live = echo(&lab).await;
    let other = Ipv6Addr::LOCALHOST.into();
    let _other = tls_server(other, live.port(), TLS.server.clone(), |_| async {}).await;
    let refusing: IpAddr = fresh_ip().into();
    lab.bind("a.example", refusing);
    lab.table.others.lock().insert("a.example".into(), vec![other, live.ip()]);
    lab.ask((refusing, live.port()).into());
    let _stream = soon(lab.tls("a.example")).await.unwrap();
    let What::Open { actual, .. } = lab.open().await.what else { unreachable!() };
    assert_eq!(actual, Some(live));
}

#[tokio::test]
async fn without_a_socket_to_spare_addresses_are_tried_one_by_one() {
    let limit = Duration::from_millis(1800);
    let lab =
        Lab::with(RelayConfig { dials: 0, race_delay: Duration::from_millis(10), connect_timeout: limit, ..config() });
    let live = echo(&lab).await;
    let silent: [std::net::IpAddr; 2] = [fresh_ip().into(), fresh_ip().into()];
    let _holes = silent.map(|ip| hole(ip, live.port()));
    lab.bind("a.example", silent[0]);
    lab.table.others.lock().insert("a.example".into(), vec![silent[0], silent[1], live.ip()]);
    lab.ask((silent[0], live.port()).into());
    let begin = Instant::now();
    let mut stream = soon(lab.tls("a.example")).await.unwrap();
    // Each had a third of the time.
    assert!(begin.elapsed() >= limit / 3 * 2, "{:?}", begin.elapsed());
    stream.write_all(b"x").await.unwrap();
    let What::Open { actual, .. } = lab.open().await.what else { unreachable!() };
    assert_eq!(actual, Some(live));
}

#[tokio::test]
async fn silent_addresses_end_in_connect_failed() {
    let lab = Lab::with(RelayConfig { connect_timeout: Duration::from_millis(400), ..config() });
    let live = echo(&lab).await;
    let dead = fresh_ip().into();
    let _hole = hole(dead, live.port());
    lab.bind("a.example", dead);
    lab.ask((dead, live.port()).into());
    refused(&lab, &hello("a.example"), Reason::ConnectFailed).await;
}

#[tokio::test]
async fn others_that_are_forbidden_are_not_raced() {
    let lab = Lab::new();
    let live = echo(&lab).await;
    let dead: std::net::IpAddr = fresh_ip().into();
    lab.bind("a.example", dead);
    lab.table.others.lock().insert("a.example".into(), vec![live.ip()]);
    lab.table.forbidden.lock().insert(live);
    lab.ask((dead, live.port()).into());
    refused(&lab, &hello("a.example"), Reason::ConnectFailed).await;
}

#[tokio::test]
async fn the_upstream_leg_leaves_from_the_egress_address_and_the_range() {
    let lab = Lab::with(RelayConfig { ports: Some(42_000..=42_063), ..config() });
    let server = echo(&lab).await;
    let source = fresh_ip().into();
    *lab.table.source.lock() = Some(source);
    let mut streams = Vec::new();
    for _ in 0..20 {
        streams.push(lab.tls("a.example").await.unwrap());
    }
    for stream in &streams {
        let client = stream.get_ref().0.local_addr().unwrap();
        let of = |e: &Event| matches!(e.what, What::Open { client: c, .. } if c == client);
        let What::Open { egress, actual, .. } = lab.event(of).await.what else { unreachable!() };
        let egress = egress.unwrap();
        assert_eq!((egress.ip(), actual), (source, Some(server)));
        assert!((42_000..=42_063).contains(&egress.port()), "{egress}");
    }
}

#[test]
fn ports_that_the_kernel_would_ignore_are_refused() {
    for ports in [1024..=2047, 60_000..=65_535, std::ops::RangeInclusive::new(50_000, 40_000)] {
        let config = RelayConfig { ports: Some(ports), ..config() };
        let started = Relay::start(config, Arc::new(Table::default()), Arc::new(|_: Event| {}));
        assert!(matches!(started, Err(Error::Ports { .. })));
    }
}

#[tokio::test]
async fn no_way_out_of_the_family_is_told() {
    let lab = Lab::new();
    echo(&lab).await;
    *lab.table.no_egress.lock() = true;
    refused(&lab, &hello("a.example"), Reason::NoEgressFamily).await;
}

#[tokio::test]
async fn ipv6_is_relayed() {
    let lab = Lab::with(RelayConfig { listen: vec!["[::1]:0".parse().unwrap()], ..config() });
    let ip = std::net::Ipv6Addr::LOCALHOST.into();
    let server = tls_server(ip, 0, TLS.server.clone(), |mut stream| async move {
        let _ = stream.write_all(b"six").await;
        let _ = stream.shutdown().await;
    })
    .await;
    lab.bind("a.example", ip);
    lab.ask(server);
    *lab.table.source.lock() = Some(ip);
    let mut got = String::new();
    soon(lab.tls("a.example").await.unwrap().read_to_string(&mut got)).await.unwrap();
    assert_eq!(got, "six");
    let What::Open { client, egress, .. } = lab.open().await.what else { unreachable!() };
    assert!(client.is_ipv6() && egress.unwrap().is_ipv6());
}

/// A server that asks every client for a second hello.
async fn retrying_server(lab: &Lab) {
    let mut config = TLS.server.clone();
    let provider = CryptoProvider { kx_groups: vec![ring::kx_group::SECP256R1], ..ring::default_provider() };
    let resolver = config.cert_resolver.clone();
    config = rustls::ServerConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(resolver);
    let ip = fresh_ip().into();
    let address = tls_server(ip, 0, config, |mut stream| async move {
        let _ = stream.write_all(b"hi").await;
        let _ = stream.shutdown().await;
    })
    .await;
    lab.bind("a.example", ip);
    lab.ask(address);
}

#[tokio::test]
async fn a_hello_retry_completes() {
    let lab = Lab::new();
    retrying_server(&lab).await;
    let mut stream = lab.tls("a.example").await.unwrap();
    assert_eq!(stream.get_ref().1.handshake_kind(), Some(rustls::HandshakeKind::FullWithHelloRetryRequest));
    let mut got = String::new();
    soon(stream.read_to_string(&mut got)).await.unwrap();
    assert_eq!(got, "hi");
}

#[tokio::test]
async fn a_second_hello_with_another_name_is_refused() {
    let lab = Lab::new();
    retrying_server(&lab).await;
    let mut tcp = lab.tcp().await;
    let name = ServerName::try_from("a.example").unwrap();
    let mut tls = rustls::ClientConnection::new(Arc::new(TLS.client.clone()), name).unwrap();
    let mut flight = Vec::new();
    tls.write_tls(&mut flight).unwrap();
    tcp.write_all(&flight).await.unwrap();
    while tls.is_handshaking() && !tls.wants_write() {
        let mut got = [0; 4096];
        let n = soon(tcp.read(&mut got)).await.unwrap();
        tls.read_tls(&mut &got[..n]).unwrap();
        tls.process_new_packets().unwrap();
    }
    let mut second = Vec::new();
    while tls.wants_write() {
        tls.write_tls(&mut second).unwrap();
    }
    let at = second.windows(9).position(|w| w == b"a.example").unwrap();
    second[at] = b'b';
    tcp.write_all(&second).await.unwrap();
    assert_eq!(ending(&mut tcp).await, ErrorKind::ConnectionReset);
    let close = lab.close().await;
    assert_eq!((close.verdict, close.reason), (Verdict::Deny, Reason::SniMismatch));
    // The first hello went upstream, nothing of the second flight did.
    let What::Close { sent, .. } = close.what else { unreachable!() };
    assert_eq!(sent as usize, flight.len());
}

#[tokio::test]
async fn a_second_hello_that_does_not_come_is_a_timeout() {
    let lab = Lab::with(RelayConfig { hello_timeout: Duration::from_millis(300), ..config() });
    retrying_server(&lab).await;
    let mut tcp = lab.tcp().await;
    tcp.write_all(&hello("a.example")).await.unwrap();
    assert_eq!(ending(&mut tcp).await, ErrorKind::ConnectionReset);
    assert_eq!(lab.close().await.reason, Reason::HelloTimeout);
}

#[tokio::test]
async fn two_hellos_at_once_are_refused() {
    let lab = Lab::new();
    retrying_server(&lab).await;
    let mut tcp = lab.tcp().await;
    tcp.write_all(&[hello("a.example"), hello("b.example")].concat()).await.unwrap();
    assert_eq!(ending(&mut tcp).await, ErrorKind::ConnectionReset);
    assert_eq!(lab.close().await.reason, Reason::HelloMalformed);
}
