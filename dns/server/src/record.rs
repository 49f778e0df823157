//! Events and metrics of every decision, made in one place.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use ahash::RandomState;
use metrics::{Counter, Histogram};
use tidegate_dns_core::serve::Outcome;
use tidegate_policy::Reason;
use tidegate_policy::event::{Emit, Event, Verdict, What, Who};

/// Seconds from receiving a query to its reply; label `path`: `hit` or `miss`.
pub const SECONDS: &str = "tidegate_dns_seconds";
/// Decided queries; labels `reason` and `verdict`.
pub const QUERIES: &str = "tidegate_dns_queries_total";
/// Datagrams without a reply; label `cause`: `not-a-query`, `no-destination`, `port`, `send`.
pub const DROPS: &str = "tidegate_dns_drops_total";

/// Repeats that one worker holds back at most; more are emitted at once.
const HELD: usize = 4096;
/// How often repeats are emitted.
const FLUSH: Duration = Duration::from_secs(1);
/// How many repeats are emitted after one batch: all at once would keep queries waiting.
const SLICE: usize = 8;
/// After how many flushes without a repeat a decision counts as new again.
const STALE: u64 = 60;
/// Every so many flushes those are forgotten.
const SWEEP: u64 = 10;
/// Of so many hits one goes into the histogram, which keeps every sample until it is folded.
const SAMPLE: usize = 64;
/// A hit that is the first for so long goes into it, too.
const SAMPLE_AFTER: Duration = Duration::from_millis(10);

/// Handles of the metrics. Made once, after the recorder was installed.
pub struct Metrics {
    queries: Vec<OnceLock<Counter>>,
    /// Latency of the hit path; over UDP by way of [`Repeats::answered`].
    pub hit: Histogram,
    /// Latency of the slow path.
    pub miss: Histogram,
}

const VERDICTS: usize = 3;

impl Metrics {
    /// Describes and registers.
    pub fn new() -> Self {
        metrics::describe_histogram!(
            SECONDS,
            metrics::Unit::Seconds,
            "Time from a DNS query to its reply; of many hits, a sample"
        );
        metrics::describe_counter!(QUERIES, "DNS queries by what was decided");
        metrics::describe_counter!(DROPS, "DNS datagrams that got no reply");
        Self {
            queries: (0..Reason::ALL.len() * VERDICTS).map(|_| OnceLock::new()).collect(),
            hit: metrics::histogram!(SECONDS, "path" => "hit"),
            miss: metrics::histogram!(SECONDS, "path" => "miss"),
        }
    }

    fn count(&self, reason: Reason, verdict: Verdict) {
        let v = match verdict {
            Verdict::Allow => 0,
            Verdict::Deny => 1,
            Verdict::Audit => 2,
        };
        let make = || metrics::counter!(QUERIES, "reason" => reason.as_str(), "verdict" => verdict.as_str());
        if let Some(cell) = self.queries.get(reason as usize * VERDICTS + v) {
            cell.get_or_init(make).increment(1);
        }
    }

    /// Counts a datagram that gets no reply.
    pub fn dropped(&self, cause: &'static str) {
        metrics::counter!(DROPS, "cause" => cause).increment(1);
    }
}

/// A decided query, borrowed for the time of recording.
pub struct Decided<'a> {
    /// Who asked, if it is known.
    pub who: Option<&'a Arc<Who>>,
    /// Its address.
    pub client: IpAddr,
    /// The server that it asked.
    pub server: SocketAddr,
    /// The name, escaped.
    pub name: &'a str,
    /// The query type.
    pub qtype: u16,
    /// What was decided.
    pub outcome: &'a Outcome,
    /// The addresses sent.
    pub sent: &'a [IpAddr],
    /// Whether it came from the store.
    pub cached: bool,
    /// Generation of the policy.
    pub generation: u64,
}

impl Decided<'_> {
    fn event(&self) -> Event {
        Event {
            who: self.who.cloned(),
            what: What::Dns {
                name: self.name.into(),
                qtype: self.qtype,
                rcode: self.outcome.rcode,
                answers: self.sent.to_vec(),
                cached: self.cached,
                server: self.server,
            },
            verdict: self.outcome.verdict,
            reason: self.outcome.reason,
            rule: self.outcome.rule.clone(),
            count: 1,
        }
    }
}

/// Where decisions are recorded.
pub struct Recorder {
    /// The metrics.
    pub metrics: Metrics,
    emit: Arc<dyn Emit>,
}

impl Recorder {
    /// Events go to `emit`.
    pub fn new(emit: Arc<dyn Emit>) -> Self {
        Self { metrics: Metrics::new(), emit }
    }

    /// Counts and emits at once.
    pub fn now(&self, decided: &Decided<'_>) {
        self.metrics.count(decided.outcome.reason, decided.outcome.verdict);
        self.emit.emit(decided.event());
    }
}

struct Repeat {
    event: Event,
    /// Repeats since it was emitted.
    pending: u64,
    /// The flush after which it came last.
    last: u64,
}

/// What one worker holds back: repeats of an unchanged allowed answer from the store.
pub struct Repeats {
    hasher: RandomState,
    held: HashMap<u64, Repeat, RandomState>,
    /// Keys of those that have repeats.
    pending: Vec<u64>,
    /// Keys of those that are being emitted, a few at a time.
    due: Vec<u64>,
    flushes: u64,
    next_flush: Instant,
    /// Hits since one went into the histogram, and when the next one does in any case.
    unsampled: usize,
    next_sample: Instant,
}

impl Repeats {
    /// Nothing held.
    pub fn new() -> Self {
        let hasher = RandomState::new();
        let now = Instant::now();
        Self {
            held: HashMap::with_hasher(hasher.clone()),
            hasher,
            pending: Vec::new(),
            due: Vec::new(),
            flushes: 0,
            next_flush: now + FLUSH,
            unsampled: 0,
            next_sample: now,
        }
    }

    /// Counts, and emits what is new, changed or denied.
    pub fn record(&mut self, recorder: &Recorder, decided: &Decided<'_>) {
        let Outcome { verdict, reason, rule, rcode } = decided.outcome;
        if *verdict != Verdict::Allow || !decided.cached {
            recorder.now(decided);
            return;
        }
        recorder.metrics.count(*reason, *verdict);
        // Answers take turns: their order is no change, so they are hashed without it.
        let answers = decided.sent.iter().fold(0u64, |h, ip| h.wrapping_add(self.hasher.hash_one(ip)));
        // Within a generation of the policy a rule is where it is.
        let rule = rule.as_ref().map(|r| (Arc::as_ptr(&r.policy).addr(), Arc::as_ptr(&r.rule).addr()));
        let key = self.hasher.hash_one((
            (decided.client, decided.server, decided.name, decided.qtype),
            (*reason as u8, rcode, rule, answers, decided.generation),
        ));
        if let Some(r) = self.held.get_mut(&key) {
            if r.pending == 0 {
                self.pending.push(key);
            }
            r.pending += 1;
            r.last = self.flushes;
            return;
        }
        let event = decided.event();
        if self.held.len() < HELD {
            self.held.insert(key, Repeat { event: event.clone(), pending: 0, last: self.flushes });
        }
        recorder.emit.emit(event);
    }

    /// Takes note of `hits` queries that came together and were answered after `took`.
    pub fn answered(&mut self, recorder: &Recorder, hits: usize, now: Instant, took: Duration) {
        self.unsampled += hits;
        if self.unsampled >= SAMPLE || now >= self.next_sample {
            recorder.metrics.hit.record(took.as_secs_f64());
            (self.unsampled, self.next_sample) = (0, now + SAMPLE_AFTER);
        }
    }

    /// After each batch at `now`: emits what was held for a second, some of it if there are `queries`.
    pub fn tick(&mut self, recorder: &Recorder, now: Instant, queries: bool) {
        if now >= self.next_flush {
            self.begin(recorder, now);
        }
        if !self.due.is_empty() {
            self.emit(recorder, if queries { SLICE } else { usize::MAX });
        }
    }

    /// Emits what is held.
    pub fn flush(&mut self, recorder: &Recorder) {
        self.begin(recorder, Instant::now());
        self.emit(recorder, usize::MAX);
    }

    fn begin(&mut self, recorder: &Recorder, now: Instant) {
        // Batches so few that a second was not enough: the rest goes now.
        self.emit(recorder, usize::MAX);
        std::mem::swap(&mut self.pending, &mut self.due);
        self.next_flush = now + FLUSH;
        self.flushes += 1;
        if self.flushes.is_multiple_of(SWEEP) {
            self.held.retain(|_, r| r.pending > 0 || self.flushes - r.last < STALE);
        }
    }

    fn emit(&mut self, recorder: &Recorder, most: usize) {
        let from = self.due.len().saturating_sub(most);
        for key in self.due.drain(from..) {
            if let Some(r) = self.held.get_mut(&key) {
                let count = std::mem::take(&mut r.pending);
                recorder.emit.emit(Event { count, ..r.event.clone() });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;

    #[test]
    fn repeats_are_counted_exactly_and_denials_come_at_once() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&seen);
        let recorder = Recorder::new(Arc::new(move |e: Event| sink.lock().push(e)));
        let mut repeats = Repeats::new();
        let allowed = Outcome { verdict: Verdict::Allow, reason: Reason::Allowed, rule: None, rcode: 0 };
        let one: [IpAddr; 2] = [[192, 0, 2, 1].into(), [192, 0, 2, 2].into()];
        let two: [IpAddr; 2] = [[192, 0, 2, 2].into(), [192, 0, 2, 1].into()];
        let mut d = Decided {
            who: None,
            client: [10, 0, 0, 1].into(),
            server: ([10, 0, 0, 53], 53).into(),
            name: "a.example",
            qtype: 1,
            outcome: &allowed,
            sent: &one,
            cached: true,
            generation: 1,
        };
        repeats.record(&recorder, &d);
        d.sent = &two;
        repeats.record(&recorder, &d);
        repeats.record(&recorder, &d);
        assert_eq!(seen.lock().len(), 1, "first sight at once, repeats held");
        d.sent = &one[..1];
        repeats.record(&recorder, &d);
        d.generation = 2;
        repeats.record(&recorder, &d);
        assert_eq!(seen.lock().len(), 3, "changes at once");
        let denied = Outcome { verdict: Verdict::Deny, reason: Reason::NameNotAllowed, rule: None, rcode: 3 };
        d.outcome = &denied;
        repeats.record(&recorder, &d);
        repeats.record(&recorder, &d);
        assert_eq!(seen.lock().len(), 5, "denials at once");
        repeats.flush(&recorder);
        assert_eq!(seen.lock().len(), 6);
        assert_eq!(seen.lock().iter().map(|e| e.count).sum::<u64>(), 7);
        for _ in 0..STALE + SWEEP {
            repeats.flush(&recorder);
        }
        assert!(repeats.held.is_empty());
        assert_eq!(seen.lock().len(), 6, "nothing is emitted without a repeat");
    }

    #[test]
    fn repeats_go_out_a_few_at_a_time_while_queries_come() {
        let seen = Arc::new(Mutex::new(0));
        let sink = Arc::clone(&seen);
        let recorder = Recorder::new(Arc::new(move |e: Event| *sink.lock() += e.count));
        let mut repeats = Repeats::new();
        let outcome = Outcome { verdict: Verdict::Allow, reason: Reason::Allowed, rule: None, rcode: 0 };
        let names: Vec<String> = (0..3 * SLICE).map(|i| format!("n{i}.example")).collect();
        let ask = |repeats: &mut Repeats| {
            for name in &names {
                let d = Decided {
                    who: None,
                    client: [10, 0, 0, 1].into(),
                    server: ([10, 0, 0, 53], 53).into(),
                    name,
                    qtype: 1,
                    outcome: &outcome,
                    sent: &[],
                    cached: true,
                    generation: 1,
                };
                repeats.record(&recorder, &d);
            }
        };
        let all = names.len() as u64;
        ask(&mut repeats);
        ask(&mut repeats);
        let start = repeats.next_flush - FLUSH;
        repeats.tick(&recorder, start, true);
        assert_eq!(*seen.lock(), all, "first sights only");
        repeats.tick(&recorder, start + FLUSH, true);
        assert_eq!(*seen.lock(), all + SLICE as u64);
        ask(&mut repeats);
        repeats.tick(&recorder, start + FLUSH, true);
        repeats.tick(&recorder, start + FLUSH, false);
        assert_eq!(
            *seen.lock(),
            3 * all - SLICE as u64,
            "what was emitted before it was asked again waits a second more"
        );
        repeats.tick(&recorder, start + 2 * FLUSH, false);
        assert_eq!(*seen.lock(), 3 * all);
        ask(&mut repeats);
        repeats.tick(&recorder, start + 3 * FLUSH, true);
        assert_eq!(*seen.lock(), 3 * all + SLICE as u64);
        repeats.tick(&recorder, start + 4 * FLUSH, true);
        assert_eq!(*seen.lock(), 4 * all, "with one batch a second the rest goes with the second one");
    }
}
