//! Finds an address that answers.

use std::io;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use tidegate_sni_core::Egress;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep_until};

use crate::socket;

/// The most addresses that one connection tries.
pub(crate) const MOST: usize = 8;

/// An address and how to leave for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    pub address: SocketAddr,
    pub egress: Egress,
}

/// Connects to the first of `targets` that answers. They start one after the other, `delay` apart or
/// as soon as the one before failed (as RFC 8305, section 5, races); the first to connect ends the others.
/// Each that starts while others still connect takes a permit of `extra`. Without one it waits: for a permit, or until
/// those before it have had their share of the time and are given up.
///
/// # Errors
/// The last failure when all failed, or `TimedOut` after `limit`.
pub(crate) async fn race(
    targets: &[Target],
    ports: Option<&RangeInclusive<u16>>,
    extra: &Semaphore,
    delay: Duration,
    limit: Duration,
) -> io::Result<(TcpStream, SocketAddr)> {
    let deadline = Instant::now() + limit;
    let mut waiting = targets.iter().copied();
    let mut tries = FuturesUnordered::new();
    let mut error = io::Error::from(io::ErrorKind::AddrNotAvailable);
    let mut next = Instant::now();
    // When those that connect are given up for the next one, if it must take their place.
    let mut patience = next;
    loop {
        let now = Instant::now();
        if tries.is_empty() || now >= next {
            let permit = if tries.is_empty() { None } else { extra.try_acquire().ok() };
            if waiting.len() == 0 {
                if tries.is_empty() {
                    return Err(error);
                }
                next = deadline;
            } else if permit.is_none() && !tries.is_empty() && now < patience {
                next = patience.min(now + delay);
            } else {
                if permit.is_none() {
                    tries.clear();
                }
                if let Some(target) = waiting.next() {
                    tries.push(async move {
                        let _permit = permit;
                        dial(target, ports).await.map(|s| (s, target.address))
                    });
                }
                next = now + delay;
                patience = now + deadline.saturating_duration_since(now) / (waiting.len() as u32 + 1);
            }
        }
        tokio::select! {
            biased;
            done = tries.next() => match done {
                Some(Ok(connected)) => return Ok(connected),
                Some(Err(e)) => {
                    error = e;
                    next = Instant::now();
                }
                None => {}
            },
            () = sleep_until(next.min(deadline)) => {
                if Instant::now() >= deadline {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
        }
    }
}

async fn dial(target: Target, ports: Option<&RangeInclusive<u16>>) -> io::Result<TcpStream> {
    socket::upstream(target.address, target.egress, ports)?.connect(target.address).await
}
