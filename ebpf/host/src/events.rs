//! Counters and events of the kernel programs, in published terms.

use std::net::SocketAddr;
use std::sync::Arc;

use aya::maps::{MapData, RingBuf};
use tidegate_ebpf_common::code::counter_index;
use tidegate_ebpf_common::layout::Event as Record;
use tidegate_ebpf_common::{Addr, Code, Hook, Outcome};
use tidegate_policy::Reason;
use tidegate_policy::event::{Event, Verdict, What, Who};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::Error;
use crate::load::{BUDGETS, Datapath};

/// The published name of a hook.
pub const fn hook_name(hook: Hook) -> &'static str {
    match hook {
        Hook::PodEgress => "pod_egress",
        Hook::PodIngress => "pod_ingress",
        Hook::NodeGuard => "node_guard",
        Hook::TunnelIngress => "tunnel_ingress",
        Hook::GatewayReturn => "gateway_return",
        Hook::UplinkEgress => "uplink_egress",
        Hook::UplinkIngress => "uplink_ingress",
        Hook::GatewayIngress => "gateway_ingress",
    }
}

/// The published reason of a kernel code.
pub const fn reason(code: Code) -> Reason {
    match code {
        Code::Allowed => Reason::Allowed,
        Code::NotAllowed => Reason::NotAllowed,
        Code::DeniedByPolicy => Reason::DeniedByPolicy,
        Code::BindingExpired => Reason::BindingExpired,
        Code::EncryptedDns => Reason::EncryptedDns,
        Code::Metadata => Reason::Metadata,
        Code::SpoofedSource => Reason::SpoofedSource,
        Code::TunnelPort => Reason::TunnelPort,
        Code::UnknownPod => Reason::UnknownPod,
        Code::Protocol => Reason::Protocol,
        Code::Fragment => Reason::Fragment,
        Code::Malformed => Reason::Malformed,
        Code::NoGateway => Reason::NoGateway,
        Code::TooBig => Reason::TooBig,
        Code::Quota => Reason::Quota,
        Code::Checksum => Reason::Checksum,
    }
}

/// The published verdict of an outcome.
pub const fn verdict(outcome: Outcome) -> Verdict {
    match outcome {
        Outcome::Pass | Outcome::Steer => Verdict::Allow,
        Outcome::Drop => Verdict::Deny,
        Outcome::Audit => Verdict::Audit,
    }
}

/// How many packets met one fate at one hook; exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counter {
    /// Where.
    pub hook: Hook,
    /// What happened to them.
    pub outcome: Outcome,
    /// Why.
    pub reason: Reason,
    /// How many, since the maps were made; with what was counted in another layout's maps before.
    pub packets: u64,
}

/// One packet's fate, as the kernel reported it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketEvent {
    /// Where it was decided.
    pub hook: Hook,
    /// What happened to it.
    pub outcome: Outcome,
    /// Why.
    pub reason: Reason,
    /// IP protocol number.
    pub protocol: u8,
    /// Source; the port is the echo identifier or 0 where the protocol has none.
    pub source: SocketAddr,
    /// Destination; the port is 0 where the protocol has none.
    pub destination: SocketAddr,
    /// The device of the hook.
    pub ifindex: u32,
}

impl PacketEvent {
    /// The event that becomes the audit record, for the endpoint `who`.
    pub fn into_event(self, who: Option<Arc<Who>>) -> Event {
        Event {
            who,
            what: What::Packet {
                hook: hook_name(self.hook),
                protocol: self.protocol,
                source: self.source,
                destination: self.destination,
            },
            verdict: verdict(self.outcome),
            reason: self.reason,
            rule: None,
            count: 1,
        }
    }

    /// Reads one record of the ring; `None` if it is none of this version.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != size_of::<Record>() {
            return None;
        }
        let addr = |at: usize| {
            let mut words = [0u32; 4];
            for (word, b) in words.iter_mut().zip(bytes[at..at + 16].chunks_exact(4)) {
                *word = u32::from_ne_bytes([b[0], b[1], b[2], b[3]]);
            }
            Addr(words).to_ip()
        };
        let port = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Some(Self {
            source: SocketAddr::new(addr(0), port(32)),
            destination: SocketAddr::new(addr(16), port(34)),
            ifindex: u32::from_ne_bytes([bytes[36], bytes[37], bytes[38], bytes[39]]),
            hook: Hook::from_u8(bytes[40])?,
            outcome: Outcome::from_u8(bytes[41])?,
            reason: reason(Code::from_u8(bytes[42])?),
            protocol: bytes[43],
        })
    }
}

/// The events of a datapath.
pub struct Events {
    ring: Option<RingBuf<MapData>>,
    waiting: Option<AsyncFd<RingBuf<MapData>>>,
}

impl Events {
    /// The next event if one is there.
    pub fn try_next(&mut self) -> Option<PacketEvent> {
        let ring = match (&mut self.ring, &mut self.waiting) {
            (Some(ring), _) => ring,
            (None, Some(waiting)) => waiting.get_mut(),
            (None, None) => return None,
        };
        take(ring)
    }

    /// Waits for the next event. Needs a tokio runtime with IO; cancelling it loses nothing.
    ///
    /// # Errors
    /// The ring cannot be waited for.
    pub async fn next(&mut self) -> Result<PacketEvent, Error> {
        if let Some(ring) = self.ring.take() {
            // SAFETY: the descriptor belongs to the ring's map, which lives as long as the ring and never changes it.
            match unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) } {
                Ok(waiting) => self.waiting = Some(waiting),
                Err(refused) => {
                    let (ring, error) = refused.into_parts();
                    self.ring = Some(ring);
                    return Err(Error::io("cannot wait for events")(error));
                }
            }
        }
        let Some(waiting) = &mut self.waiting else {
            return Err(Error::Layout { map: "EVENTS", what: "the ring is closed".into() });
        };
        loop {
            if let Some(event) = take(waiting.get_mut()) {
                return Ok(event);
            }
            let mut ready = waiting.readable_mut().await.map_err(Error::io("cannot wait for events"))?;
            if let Some(event) = take(ready.get_inner_mut()) {
                return Ok(event);
            }
            ready.clear_ready();
        }
    }
}

/// The next record that this version can read; others are skipped.
fn take(ring: &mut RingBuf<MapData>) -> Option<PacketEvent> {
    while let Some(item) = ring.next() {
        if let Some(event) = PacketEvent::parse(&item) {
            return Some(event);
        }
    }
    None
}

impl Datapath {
    /// The reader of events; there is one, so later calls give `None`.
    pub fn events(&mut self) -> Option<Events> {
        self.ring.take().map(|ring| Events { ring: Some(ring), waiting: None })
    }

    /// All counters that are not zero.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn counters(&self) -> Result<Vec<Counter>, Error> {
        let mut out = Vec::new();
        for &hook in Hook::ALL {
            for &outcome in Outcome::ALL {
                for &code in Code::ALL {
                    let index = counter_index(hook, outcome, code);
                    let values = self.counters.get(&index, 0).map_err(Error::map("COUNTERS"))?;
                    let packets = values.iter().sum::<u64>() + self.before.counters[index as usize];
                    if packets != 0 {
                        out.push(Counter { hook, outcome, reason: reason(code), packets });
                    }
                }
            }
        }
        Ok(out)
    }

    /// How many events were not written because a budget or the ring was full, since the maps were made; with
    /// those of another layout's programs before, and what these wrote and nobody read.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn suppressed_events(&self) -> Result<u64, Error> {
        let mut sum = self.before.suppressed;
        for kind in 0..BUDGETS {
            let values = self.budgets.get(&kind, 0).map_err(Error::map("BUDGETS"))?;
            sum += values.iter().map(|b| b.suppressed).sum::<u64>();
        }
        Ok(sum)
    }
}
