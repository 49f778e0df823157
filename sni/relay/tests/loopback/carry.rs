//! What happens to bytes, and how connections end.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::common::*;
use metrics::{Counter, CounterFn, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use parking_lot::Mutex;
use tidegate_policy::Reason;
use tidegate_policy::event::{Verdict, What};
use tidegate_sni::{RelayConfig, metric};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::Instant;

const MIB: usize = 1024 * 1024;

/// Bytes that show where they belong.
fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed | 1;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x as u8
        })
        .collect()
}

fn counts(what: What) -> (u64, u64) {
    let What::Close { sent, received, .. } = what else { unreachable!() };
    (sent, received)
}

/// A server that is not TLS, so that a test can count every byte; it is asked for as `a.example`.
/// It answers the hello with one byte and hands the connection over.
async fn plain_server(lab: &Lab) -> oneshot::Receiver<TcpStream> {
    let ip = fresh_ip().into();
    let (give, take) = oneshot::channel();
    let give = Arc::new(Mutex::new(Some(give)));
    let length = hello("a.example").len();
    let address = tcp_server(ip, 0, move |mut stream| {
        let give = give.clone();
        async move {
            stream.read_exact(&mut vec![0; length]).await.unwrap();
            stream.write_all(b"!").await.unwrap();
            let _ = give.lock().take().unwrap().send(stream);
        }
    })
    .await;
    lab.bind("a.example", ip);
    lab.ask(address);
    take
}

/// A raw connection whose hello was accepted: the client's end and the server's.
async fn plain_pair(lab: &Lab) -> (TcpStream, TcpStream) {
    let server = plain_server(lab).await;
    let mut client = lab.tcp().await;
    client.write_all(&hello("a.example")).await.unwrap();
    let mut one = [0];
    soon(client.read_exact(&mut one)).await.unwrap();
    (client, soon(server).await.unwrap())
}

/// Sends so many bytes both ways, and returns how often a pipe was wanted and could not be had.
async fn both_ways(config: RelayConfig, bytes: usize) -> u64 {
    let counters = Counters::default();
    let lab = metrics::with_local_recorder(&counters, || Lab::with(config));
    let lab = &lab;
    let (client, server) = plain_pair(lab).await;
    let (up, down) = (pattern(bytes, 3), pattern(bytes + 11, 5));
    let ends = |stream: TcpStream, say: Vec<u8>, hear: Vec<u8>| async move {
        let (mut read, mut write) = stream.into_split();
        let writing = tokio::spawn(async move {
            write.write_all(&say).await.unwrap();
            write.shutdown().await.unwrap();
        });
        let mut got = Vec::with_capacity(hear.len());
        read.read_to_end(&mut got).await.unwrap();
        assert!(got == hear, "{} of {} bytes, or damaged", got.len(), hear.len());
        writing.await.unwrap();
    };
    let a = tokio::spawn(ends(client, up.clone(), down.clone()));
    let b = tokio::spawn(ends(server, down, up));
    soon(a).await.unwrap();
    soon(b).await.unwrap();
    let close = lab.close().await;
    assert_eq!(close.reason, Reason::Allowed);
    let hello = hello("a.example").len();
    assert_eq!(counts(close.what), ((bytes + hello) as u64, (bytes + 12) as u64));
    counters.get(&format!("{} ", metric::NO_PIPE))
}

#[tokio::test]
async fn fifty_mebibytes_both_ways_intact_and_counted() {
    assert_eq!(both_ways(config(), 50 * MIB).await, 0);
}

#[tokio::test]
async fn without_pipes_the_buffer_does_it() {
    assert!(both_ways(RelayConfig { pipes: 0, ..config() }, 5 * MIB).await > 0);
}

#[tokio::test]
async fn a_large_tls_transfer() {
    let lab = Lab::new();
    echo(&lab).await;
    let (mut read, mut write) = tokio::io::split(lab.tls("a.example").await.unwrap());
    let bytes = pattern(8 * MIB, 9);
    let say = bytes.clone();
    let writing = tokio::spawn(async move {
        write.write_all(&say).await.unwrap();
        write.shutdown().await.unwrap();
    });
    let mut got = Vec::new();
    soon(read.read_to_end(&mut got)).await.unwrap();
    assert!(got == bytes);
    writing.await.unwrap();
    let (sent, received) = counts(lab.close().await.what);
    assert!(sent > bytes.len() as u64 && received > bytes.len() as u64);
}

#[tokio::test]
async fn an_end_of_one_direction_leaves_the_other() {
    let lab = Lab::new();
    let (mut client, mut server) = plain_pair(&lab).await;
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    let mut got = Vec::new();
    soon(server.read_to_end(&mut got)).await.unwrap();
    assert_eq!(got, b"question");
    lab.left(1).await;
    let answer = pattern(MIB, 1);
    for part in answer.chunks(MIB / 4) {
        server.write_all(part).await.unwrap();
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop(server);
    let mut got = Vec::new();
    soon(client.read_to_end(&mut got)).await.unwrap();
    assert!(got == answer);
    lab.close().await;
}

#[tokio::test]
async fn an_end_of_the_server_is_a_clean_end() {
    let lab = Lab::new();
    let (mut client, server) = plain_pair(&lab).await;
    drop(server);
    let mut got = Vec::new();
    assert_eq!(soon(client.read_to_end(&mut got)).await.unwrap(), 0);
    drop(client);
    assert_eq!(lab.close().await.reason, Reason::Allowed);
}

#[tokio::test]
async fn an_abort_of_the_server_is_a_reset_for_the_client() {
    for half_closed in [false, true] {
        let lab = Lab::new();
        let (mut client, mut server) = plain_pair(&lab).await;
        server.write_all(b"half of the ans").await.unwrap();
        let mut got = [0; 15];
        soon(client.read_exact(&mut got)).await.unwrap();
        if half_closed {
            client.shutdown().await.unwrap();
            assert_eq!(soon(server.read(&mut got)).await.unwrap(), 0);
        }
        socket2::SockRef::from(&server).set_linger(Some(Duration::ZERO)).unwrap();
        drop(server);
        let error = soon(client.read(&mut got)).await.unwrap_err();
        assert!(is_reset(&error), "{error}");
        lab.close().await;
    }
}

#[tokio::test]
async fn an_abort_of_the_client_is_a_reset_for_the_server() {
    let lab = Lab::new();
    let (client, mut server) = plain_pair(&lab).await;
    socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    let error = soon(server.read(&mut [0; 16])).await.unwrap_err();
    assert!(is_reset(&error), "{error}");
}

#[tokio::test]
async fn a_slow_reader_holds_its_server_back() {
    let lab = Lab::new();
    let (client, mut server) = plain_pair(&lab).await;
    let part = pattern(MIB, 4);
    let mut written = 0;
    // Kernel buffers take some MiB; a relay that buffered without bound would take all.
    while written < 256 {
        match tokio::time::timeout(Duration::from_millis(500), server.write_all(&part)).await {
            Ok(result) => result.unwrap(),
            Err(_) => break,
        }
        written += 1;
    }
    assert!(written < 256);
    drop(client);
}

#[tokio::test]
async fn an_idle_connection_is_reset() {
    let lab = Lab::with(RelayConfig { idle: Duration::from_millis(400), ..config() });
    let (mut client, mut server) = plain_pair(&lab).await;
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        client.write_all(b"x").await.unwrap();
        server.read_exact(&mut [0]).await.unwrap();
    }
    let begin = Instant::now();
    assert_eq!(soon(client.read(&mut [0])).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!((300..1500).contains(&begin.elapsed().as_millis()), "{:?}", begin.elapsed());
    assert_eq!(lab.close().await.verdict, Verdict::Allow);
}

#[tokio::test]
async fn a_revocation_cuts_what_it_names_and_nothing_else() {
    let lab = Lab::new();
    let server = echo(&lab).await;
    lab.bind("b.example", server.ip());
    let mut a = lab.tls("a.example").await.unwrap();
    let mut b = lab.tls("b.example").await.unwrap();
    let mut silent = lab.tcp().await;
    let cut = lab.relay.registry().revoke(
        |live| {
            assert!(live.name.is_none() || live.actual == Some(server));
            assert_eq!((live.port, live.scope), (server.port(), SCOPE));
            live.name.as_ref().is_some_and(|n| n.as_str() == "a.example")
        },
        Reason::Revoked,
    );
    assert_eq!(cut, 1);
    assert!(is_reset(&soon(a.read(&mut [0])).await.unwrap_err()));
    let close = lab.close().await;
    assert_eq!((close.verdict, close.reason, close.rule), (Verdict::Deny, Reason::Revoked, Some(rule())));
    b.write_all(b"tide").await.unwrap();
    soon(b.read_exact(&mut [0; 4])).await.unwrap();
    // One that has not said its hello yet is cut too, and told as never opened.
    assert_eq!(lab.relay.registry().revoke(|live| live.hello.is_none(), Reason::Revoked), 1);
    assert!(is_reset(&soon(silent.read(&mut [0])).await.unwrap_err()));
    lab.event(|e| matches!(e.what, What::Open { .. }) && e.reason == Reason::Revoked).await;
}

#[tokio::test]
async fn a_drain_lets_connections_end_then_resets_the_rest() {
    let lab = Lab::new();
    echo(&lab).await;
    let mut quick = lab.tls("a.example").await.unwrap();
    let mut stuck = lab.tls("a.example").await.unwrap();
    let ends = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(TcpStream::connect(lab.relay.addresses()[0]).await.is_err(), "no new ones");
        quick.write_all(b"tide").await.unwrap();
        let mut got = Vec::new();
        quick.shutdown().await.unwrap();
        quick.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"tide");
    };
    let begin = Instant::now();
    let (reset, ()) = soon(async { tokio::join!(lab.relay.drain(Duration::from_millis(600)), ends) }).await;
    assert_eq!(reset, 1);
    assert!(begin.elapsed() >= Duration::from_millis(600));
    assert!(is_reset(&soon(stuck.read(&mut [0])).await.unwrap_err()));
    lab.event(|e| matches!(e.what, What::Close { .. }) && e.reason == Reason::NoGateway).await;
    assert_eq!(lab.relay.drain(Duration::ZERO).await, 0);
}

#[tokio::test]
async fn a_relay_that_is_dropped_resets_its_connections() {
    let lab = Lab::new();
    let (mut client, mut server) = plain_pair(&lab).await;
    let Lab { relay, .. } = lab;
    tokio::task::spawn_blocking(move || drop(relay)).await.unwrap();
    assert!(is_reset(&soon(client.read(&mut [0])).await.unwrap_err()));
    assert!(is_reset(&soon(server.read(&mut [0])).await.unwrap_err()));
}

/// Counters by name and label values.
#[derive(Clone, Default)]
struct Counters(Arc<Mutex<HashMap<String, Arc<Cell>>>>);

#[derive(Default)]
struct Cell(AtomicU64);

impl CounterFn for Cell {
    fn increment(&self, value: u64) {
        self.0.fetch_add(value, Ordering::Relaxed);
    }

    fn absolute(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }
}

impl Counters {
    fn get(&self, key: &str) -> u64 {
        self.0.lock().get(key).map_or(0, |c| c.0.load(Ordering::Relaxed))
    }
}

impl Recorder for Counters {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        let labels: Vec<_> = key.labels().map(|l| l.value().to_owned()).collect();
        let cell = self.0.lock().entry(format!("{} {}", key.name(), labels.join(" "))).or_default().clone();
        Counter::from_arc(cell)
    }

    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::noop()
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}

#[tokio::test]
async fn metrics_say_what_events_say() {
    let counters = Counters::default();
    let lab = metrics::with_local_recorder(&counters, Lab::new);
    echo(&lab).await;
    lab.tls("b.example").await.unwrap_err();
    let mut stream = lab.tls("a.example").await.unwrap();
    stream.shutdown().await.unwrap();
    soon(stream.read_to_end(&mut Vec::new())).await.unwrap();
    let (sent, received) = counts(lab.close().await.what);
    assert_eq!(counters.get(&format!("{} sent", metric::BYTES)), sent);
    assert_eq!(counters.get(&format!("{} received", metric::BYTES)), received);
    assert_eq!(counters.get(&format!("{} allowed", metric::CONNECTIONS)), 1);
    assert_eq!(counters.get(&format!("{} sni-mismatch", metric::CONNECTIONS)), 1);
    assert_eq!(counters.get(&format!("{} clean", metric::ENDS)), 1);
}
