//! One connection from accept to its last event.

use std::io;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tidegate_policy::event::{Emit, Event, RuleRef, Verdict, What, Who};
use tidegate_policy::{Carry, Reason};
use tidegate_sni_core::{Check, Gate, Hello, Judgement, Peek, Progress};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::config::{Destination, RelayConfig};
use crate::connect::{self, MOST, Target};
use crate::flow::{self, End, Flow};
use crate::metric::Metrics;
use crate::registry::{Entry, Registry, Ticket};
use crate::socket::canonical;

/// What all connections of a relay share.
pub(crate) struct Shared<C> {
    pub config: RelayConfig,
    pub ports: Option<RangeInclusive<u16>>,
    /// See [`RelayConfig::dials`].
    pub dials: Semaphore,
    pub check: Arc<C>,
    pub emit: Arc<dyn Emit>,
    pub registry: Arc<Registry>,
    pub metrics: Metrics,
}

/// Why a connection is refused, and by which rule.
struct Refusal {
    reason: Reason,
    rule: Option<RuleRef>,
}

impl From<Reason> for Refusal {
    fn from(reason: Reason) -> Self {
        Self { reason, rule: None }
    }
}

/// A connection that has its place.
pub(crate) struct Admitted {
    client: TcpStream,
    ticket: Ticket,
    started: Instant,
}

/// A connection whose upstream leg is up: its end is a close event.
struct Opened {
    rule: Option<RuleRef>,
}

impl<C: Check> Shared<C> {
    /// Gives an accepted connection its place, or refuses it at once.
    pub fn admit(&self, client: TcpStream, peer: SocketAddr) -> Option<Admitted> {
        let started = Instant::now();
        let peer = canonical(peer);
        // The socket may be dead already; then nobody is left to tell.
        let local = canonical(client.local_addr().ok()?);
        let asked = match &self.config.destination {
            Destination::Local => local,
            Destination::Mapped(map) => canonical(map(peer, local)),
        };
        let Some(pod) = self.check.client(peer.ip()) else {
            self.refuse(None, peer, asked, None, Reason::UnknownPod.into());
            return None;
        };
        let who = pod.who.clone();
        match self.registry.admit(peer, pod, asked) {
            Some(ticket) => {
                self.metrics.live.increment(1.0);
                Some(Admitted { client, ticket, started })
            }
            None => {
                self.refuse(Some(who), peer, asked, None, Reason::Quota.into());
                None
            }
        }
    }

    /// Serves a connection to its end. Dropping the sockets resets both legs unless the end was clean.
    pub async fn serve(self: Arc<Self>, admitted: Admitted) {
        let Admitted { client, ticket, started } = admitted;
        let entry = &*ticket.entry;
        let mut opened = None;
        let result = {
            let run = self.run(&client, entry, started, &mut opened);
            tokio::select! {
                biased;
                reason = entry.cut() => Err(Stop::Cut(reason)),
                result = run => result,
            }
        };
        let refusal = match result {
            Ok(()) => {
                self.metrics.clean.increment(1);
                None
            }
            Err(Stop::Refused(refusal)) => Some(refusal),
            Err(Stop::Cut(reason)) => {
                if opened.is_some() {
                    self.metrics.cut.increment(1);
                }
                Some(reason.into())
            }
            Err(Stop::Ended(End::Refused(reason))) => {
                self.metrics.refused.increment(1);
                Some(reason.into())
            }
            Err(Stop::Ended(End::Idle)) => {
                self.metrics.idle.increment(1);
                None
            }
            Err(Stop::Ended(End::Failed(error))) => {
                tracing::debug!(%error, client = %entry.peer, asked = %entry.asked, "relayed connection failed");
                self.metrics.reset.increment(1);
                None
            }
        };
        match (opened, refusal) {
            (Some(opened), refusal) => self.closed(entry, started, opened, refusal),
            (None, Some(refusal)) => {
                let who = Some(entry.client.who.clone());
                self.refuse(who, entry.peer, entry.asked, entry.name(), refusal);
            }
            // Nothing ends without a refusal before it was opened.
            (None, None) => {}
        }
        drop(client);
        self.metrics.live.decrement(1.0);
    }

    async fn run(
        &self,
        client: &TcpStream,
        entry: &Entry,
        started: Instant,
        opened: &mut Option<Opened>,
    ) -> Result<(), Stop> {
        let (hello, bytes, first) = timeout(self.config.hello_timeout, hello(client))
            .await
            .unwrap_or(Err(Reason::HelloTimeout))
            .map_err(|r| Stop::Refused(r.into()))?;
        self.metrics.hello.record(started.elapsed().as_secs_f64());
        // Known to the registry before it is judged: a policy change either is seen by this judgement or revokes it.
        let hello = entry.hello.get_or_init(|| hello);
        let (targets, rule) = self.targets(entry, hello).map_err(Stop::Refused)?;
        let (delay, limit) = (self.config.race_delay, self.config.connect_timeout);
        let race = connect::race(&targets, self.ports.as_ref(), &self.dials, delay, limit).await;
        let (upstream, actual) = race.map_err(|error| {
            tracing::debug!(%error, asked = %entry.asked, "cannot connect");
            Stop::Refused(Refusal { reason: Reason::ConnectFailed, rule: rule.clone() })
        })?;
        entry.actual.get_or_init(|| actual);
        self.opened(entry, upstream.local_addr().ok().map(canonical), rule.clone());
        *opened = Some(Opened { rule });
        let flow = Flow::new(client, &upstream, entry, &self.metrics, Gate::new(hello.clone()));
        flow.run(bytes, first, self.config.hello_timeout, self.config.idle).await.map_err(Stop::Ended)
    }

    /// Where the relay may go: the asked address first, then others that are bound to the name, those of its family
    /// before the rest: the family says which egress address the other side sees.
    fn targets(&self, entry: &Entry, hello: &Hello) -> Result<(Vec<Target>, Option<RuleRef>), Refusal> {
        let asked = entry.asked;
        if self.check.forbidden(asked) {
            return Err(Reason::NotAllowed.into());
        }
        let (rule, mut others) = match self.check.judge(&entry.client, asked, &hello.sni, hello.ech) {
            Judgement::Allow { rule, others, .. } => (rule, others),
            Judgement::Deny { reason, rule } => return Err(Refusal { reason, rule }),
        };
        others.sort_by_key(|ip| ip.to_canonical().is_ipv6() != asked.is_ipv6());
        let mut targets: Vec<Target> = Vec::with_capacity(1 + others.len().min(MOST));
        let mut no_way = Reason::NoEgressFamily;
        for ip in std::iter::once(asked.ip()).chain(others) {
            let address = SocketAddr::new(ip.to_canonical(), asked.port());
            if targets.iter().any(|t| t.address == address) || self.check.forbidden(address) {
                continue;
            }
            match self.check.egress(&entry.client, address.is_ipv6()) {
                Ok(egress) => targets.push(Target { address, egress }),
                Err(reason) => no_way = reason,
            }
            if targets.len() == MOST {
                break;
            }
        }
        if targets.is_empty() {
            return Err(Refusal { reason: no_way, rule });
        }
        Ok((targets, rule))
    }

    fn refuse(
        &self,
        who: Option<Arc<Who>>,
        client: SocketAddr,
        asked: SocketAddr,
        sni: Option<Arc<str>>,
        refusal: Refusal,
    ) {
        self.metrics.decided(refusal.reason);
        self.emit.emit(Event {
            who,
            what: What::Open { client, asked, actual: None, egress: None, sni, carry: Carry::Tls },
            verdict: Verdict::Deny,
            reason: refusal.reason,
            rule: refusal.rule,
            count: 1,
        });
    }

    fn opened(&self, entry: &Entry, egress: Option<SocketAddr>, rule: Option<RuleRef>) {
        self.metrics.decided(Reason::Allowed);
        let (client, asked, actual) = (entry.peer, entry.asked, entry.actual.get().copied());
        self.emit.emit(Event {
            who: Some(entry.client.who.clone()),
            what: What::Open { client, asked, actual, egress, sni: entry.name(), carry: Carry::Tls },
            verdict: Verdict::Allow,
            reason: Reason::Allowed,
            rule,
            count: 1,
        });
    }

    fn closed(&self, entry: &Entry, started: Instant, opened: Opened, refusal: Option<Refusal>) {
        let (verdict, reason) = match refusal {
            Some(refusal) => (Verdict::Deny, refusal.reason),
            None => (Verdict::Allow, Reason::Allowed),
        };
        self.emit.emit(Event {
            who: Some(entry.client.who.clone()),
            what: What::Close {
                client: entry.peer,
                asked: entry.asked,
                actual: entry.actual.get().copied(),
                sni: entry.name(),
                sent: entry.sent.load(Ordering::Relaxed),
                received: entry.received.load(Ordering::Relaxed),
                millis: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
            },
            verdict,
            reason,
            rule: opened.rule,
            count: 1,
        });
    }
}

/// Why a connection is over.
enum Stop {
    /// Refused before it was opened.
    Refused(Refusal),
    /// Ended after it was opened.
    Ended(End),
    /// Cut from outside.
    Cut(Reason),
}

/// Reads the hello: what it says, all bytes so far, and how many of them are the hello.
async fn hello(client: &TcpStream) -> Result<(Hello, Vec<u8>, usize), Reason> {
    let mut peek = Peek::new();
    loop {
        let progress = match flow::read(client, |bytes| (!bytes.is_empty()).then(|| peek.push(bytes))) {
            Ok(progress) => progress,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                client.readable().await.map_err(|_| gone(&peek))?;
                continue;
            }
            Err(_) => None,
        };
        match progress {
            Some(Progress::NeedMore) => {}
            Some(Progress::Hello(hello)) => {
                let (bytes, first) = peek.into_bytes();
                return Ok((hello, bytes, first));
            }
            Some(Progress::Reject(reason)) => return Err(reason),
            None => return Err(gone(&peek)),
        }
    }
}

/// The client left before its hello was complete.
fn gone(peek: &Peek) -> Reason {
    if peek.is_empty() { Reason::NotTls } else { Reason::HelloMalformed }
}
