//! UDP: plain threads with a socket each.

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use tidegate_dns_core::serve::Scratch;
use tidegate_dns_core::view::{Binder, View};
use tokio::runtime::Handle;

use crate::engine::{Engine, Flow, Step};
use crate::mmsg::{Batch, send_one};
use crate::record::Repeats;

/// Serves one socket until `stop` is set.
pub(crate) fn run<V: View, B: Binder>(
    engine: &Arc<Engine<V, B>>,
    socket: UdpSocket,
    transparent: bool,
    runtime: &Handle,
    stop: &AtomicBool,
) {
    let bound = match socket.local_addr() {
        Ok(a) => a,
        Err(error) => {
            tracing::error!(%error, "a DNS socket has no address");
            return;
        }
    };
    let v6 = bound.is_ipv6();
    let socket = Arc::new(socket);
    let mut batch = Batch::new();
    let mut scratch = Scratch::new();
    let mut repeats = Repeats::new();
    let metrics = &engine.recorder.metrics;
    while !stop.load(Ordering::Relaxed) {
        let n = match batch.receive(socket.as_fd()) {
            Ok(n) => n,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
            // An ICMP error of an earlier reply is reported here and means nothing for the next datagram.
            Err(error) => {
                tracing::debug!(%error, "receiving DNS queries");
                0
            }
        };
        let started = Instant::now();
        let now = engine.millis(started);
        let view = engine.view();
        let mut hits = 0;
        for i in 0..n {
            let Some((request, received)) = batch.get(i) else { break };
            let Some(server) = received.server else {
                metrics.dropped("no-destination");
                continue;
            };
            // The reply would leave from the bound port, which is not where the query went.
            if transparent && server.port() != bound.port() {
                metrics.dropped("port");
                continue;
            }
            let flow = Flow { client: received.client, server, udp: true };
            match engine.first(request, flow, &view, now, &mut scratch, Some(&mut repeats)) {
                Step::Reply => {
                    batch.push(&scratch.out, flow.client, flow.server);
                    hits += 1;
                }
                Step::Slow(permit) => {
                    let (engine, socket, request) = (Arc::clone(engine), Arc::clone(&socket), request.to_vec());
                    // Bounded: every task holds a permit of its namespace's quota.
                    runtime.spawn(async move {
                        let mut scratch = Scratch::new();
                        engine.resolve(&request, flow, &mut scratch).await;
                        if let Err(error) = send_one(socket.as_fd(), &scratch.out, flow.client, flow.server, v6) {
                            engine.recorder.metrics.dropped("send");
                            tracing::debug!(%error, client = %flow.client, "sending a DNS reply");
                        }
                        drop(permit);
                    });
                }
                Step::Nothing => {}
            }
        }
        if hits > 0 {
            for _ in 0..batch.send(socket.as_fd(), v6) {
                metrics.dropped("send");
            }
            repeats.answered(&engine.recorder, hits, started, started.elapsed());
        }
        repeats.tick(&engine.recorder, started, n > 0);
    }
    repeats.flush(&engine.recorder);
}
