//! TCP (RFC 7766): pipelined, answered out of order, bounded in every direction.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tidegate_dns_core::serve::Scratch;
use tidegate_dns_core::view::{Binder, View};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::OwnedWriteHalf;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::timeout;

use crate::config::DnsConfig;
use crate::engine::{Engine, Flow, Step};

/// Longest query that is read, in octets.
const MAX_QUERY: usize = 4096;

/// Bounds of one connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    idle: Duration,
    pipeline: usize,
}

impl Bounds {
    pub fn new(config: &DnsConfig) -> Self {
        Self { idle: config.idle, pipeline: config.pipeline.max(1) }
    }
}

fn canonical(a: SocketAddr) -> SocketAddr {
    SocketAddr::new(a.ip().to_canonical(), a.port())
}

/// Accepts until `stop` changes.
pub(crate) async fn run<V: View, B: Binder>(
    engine: Arc<Engine<V, B>>,
    listener: TcpListener,
    bounds: Bounds,
    mut stop: watch::Receiver<bool>,
) {
    loop {
        let accepted = tokio::select! {
            a = listener.accept() => a,
            _ = stop.changed() => return,
        };
        let (stream, client) = match accepted {
            Ok(a) => a,
            Err(error) => {
                // Out of descriptors, most likely: wait for some to come back.
                tracing::warn!(%error, "accepting a DNS connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(server) = stream.local_addr() else { continue };
        let flow = Flow { client: canonical(client), server: canonical(server), udp: false };
        // A pod that is not known has no quota to hold the connection.
        let namespace = engine.view().asker(flow.client.ip()).map(|a| Arc::clone(&a.who.namespace));
        let Some(permit) = namespace.and_then(|n| engine.connections.take(&n)) else {
            continue;
        };
        let (engine, stop) = (Arc::clone(&engine), stop.clone());
        tokio::spawn(async move {
            serve(engine, stream, flow, bounds, stop).await;
            drop(permit);
        });
    }
}

async fn write(mut half: OwnedWriteHalf, mut replies: mpsc::Receiver<Vec<u8>>, idle: Duration) {
    while let Some(reply) = replies.recv().await {
        // A client that does not read is let go. Replies are at most 65,535 octets.
        let Ok(len) = u16::try_from(reply.len()) else { return };
        let mut framed = Vec::with_capacity(reply.len() + 2);
        framed.extend_from_slice(&len.to_be_bytes());
        framed.extend_from_slice(&reply);
        if !matches!(timeout(idle, half.write_all(&framed)).await, Ok(Ok(()))) {
            return;
        }
    }
}

async fn serve<V: View, B: Binder>(
    engine: Arc<Engine<V, B>>,
    stream: TcpStream,
    flow: Flow,
    bounds: Bounds,
    mut stop: watch::Receiver<bool>,
) {
    let (mut half, writer) = stream.into_split();
    let (replies, queue) = mpsc::channel(bounds.pipeline);
    let writer = tokio::spawn(write(writer, queue, bounds.idle));
    let room = Arc::new(Semaphore::new(bounds.pipeline));
    let mut scratch = Scratch::new();
    let mut request = Vec::new();
    loop {
        // Reading waits while the pipeline is full, so that the client's window fills.
        let Ok(place) = Arc::clone(&room).acquire_owned().await else {
            break;
        };
        let read = async {
            let len = usize::from(half.read_u16().await.ok()?);
            if len > MAX_QUERY {
                return None;
            }
            request.resize(len, 0);
            half.read_exact(&mut request).await.ok()
        };
        let read = tokio::select! {
            r = timeout(bounds.idle, read) => r,
            _ = stop.changed() => break,
        };
        if !matches!(read, Ok(Some(_))) || writer.is_finished() {
            break;
        }
        let started = Instant::now();
        let step = engine.first(&request, flow, &engine.view(), engine.millis(started), &mut scratch, None);
        match step {
            Step::Reply => {
                engine.recorder.metrics.hit.record(started.elapsed().as_secs_f64());
                if replies.send(scratch.out.clone()).await.is_err() {
                    break;
                }
            }
            Step::Slow(permit) => {
                let (engine, replies, request) = (Arc::clone(&engine), replies.clone(), request.clone());
                tokio::spawn(async move {
                    let mut scratch = Scratch::new();
                    engine.resolve(&request, flow, &mut scratch).await;
                    // A client that left meanwhile needs no answer.
                    let _ = replies.send(scratch.out).await;
                    drop((permit, place));
                });
            }
            // What is not a query ends the connection.
            Step::Nothing => break,
        }
    }
    // Answers under way are still written; the writer ends with the last sender.
    drop(replies);
    let _ = writer.await;
}
