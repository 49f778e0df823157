//! The streams against a server with mutual TLS on loopback.
// Helpers are tests too.
#![allow(clippy::unwrap_used)]

#[path = "support/gateway.rs"]
#[allow(dead_code)]
mod gateway;

use std::sync::Arc;
use std::time::Duration;

use gateway::{Authority, both, serve};
use parking_lot::Mutex;
use tidegate_agent::config::Tls;
use tidegate_agent::find::Names;
use tidegate_agent::stream::{Applied, Client, Facts, State};
use tidegate_identity::{Files, Paths, Source};
use tidegate_policy::ScopeKey;
use tidegate_policy::state::{Entry, Scope};
use tidegate_proto::{FactsBatch, Seen, StateBatch, Up};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

const WAIT: Duration = Duration::from_secs(10);

fn identity(tls: Tls) -> Source {
    let Tls { certificate, key, ca } = tls;
    Source::Files(Arc::new(Mutex::new(Files::new(Paths { certificate, key, ca }))))
}

fn client(tls: Tls, address: std::net::SocketAddr) -> Client {
    Client {
        node: "n1".into(),
        boot: 77,
        address,
        name: Some("gw-a".into()),
        names: Names::default(),
        identity: identity(tls),
        seen: tokio::sync::watch::channel(Seen::default()).1,
        denied: tokio::sync::watch::channel(Arc::default()).1,
        started: tokio::sync::watch::channel(Arc::default()).1,
        stop: tokio::sync::watch::channel(false).1,
    }
}

fn snapshot(sequence: u64) -> StateBatch {
    let scope = Scope { owner: "gw-a".into(), epoch: 1, pair: 0, standbys: vec![] };
    StateBatch {
        gateway: "gw-a".into(),
        boot_id: 5,
        sequence,
        snapshot: true,
        set: vec![Entry::Scope(ScopeKey(1), scope)],
        ..StateBatch::default()
    }
}

async fn next<T>(rx: &mut mpsc::Receiver<T>) -> T {
    timeout(WAIT, rx.recv()).await.expect("in time").expect("open")
}

#[tokio::test]
async fn streams_come_up_with_mutual_tls_carry_acks_and_come_back() {
    let ca = Authority::new();
    let (address, mut opened) = serve(&ca.sign("gw-a.gateway.tidegate"), "127.0.0.1:0").await;
    let client = client(ca.sign("n1.node.tidegate"), address);
    let (state_tx, mut state_rx) = mpsc::channel(8);
    let (facts_tx, mut facts_rx) = mpsc::channel(8);
    let s = tokio::spawn(client.clone().state(state_tx));
    let f = tokio::spawn(client.facts(facts_tx));
    let (mut state, mut facts) = both(&mut opened).await;

    let hello = Up::Hello { node: "n1".into(), boot_id: 77 };
    assert_eq!((state.hear().await, facts.hear().await), (hello.clone(), hello));

    state.say(snapshot(1)).await;
    let State::Update { gateway, update, ack } = next(&mut state_rx).await else { panic!("an update") };
    assert_eq!(&*gateway, "gw-a");
    assert!(update.snapshot && update.boot == 5 && update.set.len() == 1);
    ack.send(Applied { boot: 5, sequence: 1, error: Some("no".into()) }).unwrap();
    assert_eq!(state.hear().await, Up::Applied { boot_id: 5, sequence: 1, error: Some("no".into()) });

    facts.say(FactsBatch { boot_id: 5, sequence: 1, snapshot: true, ..FactsBatch::default() }).await;
    facts.say(FactsBatch::heartbeat(5, 1)).await;
    let Facts { batch: Some((batch, ack)), .. } = next(&mut facts_rx).await else { panic!("facts") };
    assert!(batch.snapshot);
    ack.send(Applied { boot: 5, sequence: 1, error: None }).unwrap();
    assert_eq!(facts.hear().await, Up::Applied { boot_id: 5, sequence: 1, error: None });
    assert!(next(&mut facts_rx).await.batch.is_none(), "a heartbeat");

    // A facts stream that falls silent is dead, and is opened anew; the state stream lives on.
    let silent = Instant::now();
    let again = next(&mut opened).await;
    assert!(matches!(again, gateway::Opened::Facts(_)));
    assert!((1000..4000).contains(&silent.elapsed().as_millis()), "{:?}", silent.elapsed());

    // A state stream that ends is told and opened anew.
    drop(state);
    assert!(matches!(next(&mut state_rx).await, State::Away { .. }));
    loop {
        if let gateway::Opened::State(mut state) = next(&mut opened).await {
            assert!(matches!(state.hear().await, Up::Hello { .. }));
            break;
        }
    }
    // Whoever stops reading ends the client.
    drop((state_rx, facts_rx));
    timeout(WAIT, s).await.unwrap().unwrap();
    timeout(WAIT, f).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_client_that_is_stopped_says_that_its_streams_have_ended() {
    let ca = Authority::new();
    let (address, mut opened) = serve(&ca.sign("gw-a.gateway.tidegate"), "127.0.0.1:0").await;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let client = Client { stop: stopped, ..client(ca.sign("n1.node.tidegate"), address) };
    let (state_tx, mut state_rx) = mpsc::channel(8);
    let (facts_tx, mut facts_rx) = mpsc::channel(8);
    let s = tokio::spawn(client.clone().state(state_tx));
    let f = tokio::spawn(client.facts(facts_tx));
    let (state, facts) = both(&mut opened).await;
    state.say(snapshot(1)).await;
    facts.say(FactsBatch { boot_id: 5, sequence: 1, snapshot: true, ..FactsBatch::default() }).await;
    assert!(matches!(next(&mut state_rx).await, State::Update { .. }));
    assert!(next(&mut facts_rx).await.batch.is_some());
    stop.send_replace(true);
    assert!(matches!(next(&mut state_rx).await, State::Away { .. }));
    assert!(next(&mut facts_rx).await.away);
    timeout(WAIT, s).await.unwrap().unwrap();
    timeout(WAIT, f).await.unwrap().unwrap();
    assert!(opened.try_recv().is_err(), "they are not opened anew");
}

#[tokio::test]
async fn a_delta_without_a_snapshot_and_another_gateways_name_end_the_stream() {
    let ca = Authority::new();
    let (address, mut opened) = serve(&ca.sign("gw-a.gateway.tidegate"), "127.0.0.1:0").await;
    let (tx, mut rx) = mpsc::channel(8);
    let task = tokio::spawn(client(ca.sign("n1.node.tidegate"), address).state(tx));
    for bad in [StateBatch { snapshot: false, ..snapshot(1) }, StateBatch { gateway: "gw-b".into(), ..snapshot(1) }] {
        let gateway::Opened::State(state) = next(&mut opened).await else { panic!("a state stream") };
        state.say(bad).await;
        timeout(WAIT, state.down.closed()).await.expect("the agent hangs up");
    }
    assert!(rx.try_recv().is_err(), "nothing of it was handed on");
    task.abort();
}

#[tokio::test]
async fn nobody_else_can_be_the_gateway_or_the_agent() {
    let (ca, other) = (Authority::new(), Authority::new());
    // A server with another name, a server of another authority, an agent of another authority.
    let cases = [
        (ca.sign("gw-b.gateway.tidegate"), ca.sign("n1.node.tidegate")),
        (other.sign("gw-a.gateway.tidegate"), ca.sign("n1.node.tidegate")),
        (ca.sign("gw-a.gateway.tidegate"), {
            let mut foreign = other.sign("n1.node.tidegate");
            foreign.ca = ca.folder().join("ca.crt");
            foreign
        }),
    ];
    for (server, agent) in cases {
        let (address, mut opened) = serve(&server, "127.0.0.1:0").await;
        let (tx, _rx) = mpsc::channel(8);
        let task = tokio::spawn(client(agent, address).state(tx));
        assert!(timeout(Duration::from_millis(700), opened.recv()).await.is_err());
        task.abort();
    }
}
