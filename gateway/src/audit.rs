//! The audit log: JSON lines of the schema `tidegate.audit/v1` (docs/audit.md).
//!
//! ```text
//! emit ──► connections ─┐
//!      └─► the rest ────┴─► thread: record → batch ──► file or standard output
//! ```
//!
//! `emit` never blocks: it counts the event in the metrics and hands it to a bounded queue. Connections have a queue
//! of their own, so that a flood of queries or packets does not push them out. What finds its queue
//! full, or cannot be written, is counted by kind, and the next record that gets through says so in `lost`.

mod recent;
mod record;
mod sink;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded, select};
use jiff::Timestamp;
use metrics::Counter;
use parking_lot::Mutex;
use tidegate_policy::Reason;
use tidegate_policy::event::{Emit, Event, Verdict, What};

use crate::telemetry::{AUDIT_LOST, DECISIONS};
pub use recent::Recent;
use record::Control;
use sink::Sink;

/// The kinds of events, as records and metrics name them.
pub const KINDS: [&str; 4] = ["dns", "open", "close", "packet"];
/// Events that wait of connections, and of all other kinds.
const QUEUE: usize = 16_384;
/// A batch is written when it has this size, in octets, or when no event waits.
const BATCH: usize = 64 * 1024;
/// How long a stop waits for the last batch: a reader of standard output may have stalled for good.
const STOP: Duration = Duration::from_secs(3);
/// How often a file is looked after when nothing happens.
const IDLE: Duration = Duration::from_secs(1);

const fn kind(what: &What) -> usize {
    match what {
        What::Dns { .. } => 0,
        What::Open { .. } => 1,
        What::Close { .. } => 2,
        What::Packet { .. } => 3,
    }
}

/// Where records go and what they say of their writer.
#[derive(Clone, Debug)]
pub struct Config {
    /// A file, appended to and opened again when it is renamed or deleted; absent: standard output.
    pub file: Option<PathBuf>,
    /// The gateway's name; absent on a node agent.
    pub gateway: Option<String>,
    /// The node that the writer runs on.
    pub node: String,
    /// Identity of this run: sequences count within it.
    pub boot: String,
    /// Where the latest records are kept for those who ask; absent: nowhere.
    pub recent: Option<Recent>,
}

/// A new identity for a run, from the kernel's random numbers.
///
/// # Errors
/// When /proc is not mounted.
pub fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().to_owned())
}

/// Lost events by kind, in the order of [`KINDS`].
#[derive(Debug, Default)]
struct Lost([AtomicU64; 4]);

impl Lost {
    fn add(&self, kind: usize, count: u64) {
        if count > 0 {
            self.0[kind].fetch_add(count, Ordering::Relaxed);
            metrics::counter!(AUDIT_LOST, "kind" => KINDS[kind]).increment(count);
        }
    }

    fn take(&self) -> [u64; 4] {
        std::array::from_fn(|i| self.0[i].swap(0, Ordering::Relaxed))
    }

    fn any(&self) -> bool {
        self.0.iter().any(|n| n.load(Ordering::Relaxed) > 0)
    }

    /// Gives back what was taken and did not get through.
    fn give_back(&self, counts: [u64; 4]) {
        for (a, n) in self.0.iter().zip(counts) {
            a.fetch_add(n, Ordering::Relaxed);
        }
    }
}

const VERDICTS: [Verdict; 3] = [Verdict::Allow, Verdict::Deny, Verdict::Audit];

/// Counters of decisions, registered when first used.
struct Decisions(Vec<OnceLock<Counter>>);

impl Decisions {
    fn new() -> Self {
        Self((0..KINDS.len() * VERDICTS.len() * Reason::ALL.len()).map(|_| OnceLock::new()).collect())
    }

    fn count(&self, event: &Event) {
        let (k, v, r) = (kind(&event.what), event.verdict, event.reason);
        let v_index = VERDICTS.iter().position(|x| *x == v).unwrap_or_default();
        let index = (k * VERDICTS.len() + v_index) * Reason::ALL.len() + r as usize;
        let register =
            || metrics::counter!(DECISIONS, "kind" => KINDS[k], "verdict" => v.as_str(), "reason" => r.as_str());
        if let Some(slot) = self.0.get(index) {
            slot.get_or_init(register).increment(event.count);
        }
    }
}

type Stamped = (Timestamp, Event);

/// The audit log. Share it as `Arc<dyn Emit>`.
pub struct Writer {
    connections: Sender<Stamped>,
    rest: Sender<Stamped>,
    lost: Arc<Lost>,
    decisions: Decisions,
    /// Stops the thread when it is taken, with the end that says that it has ended.
    running: Mutex<Option<(Sender<()>, Receiver<()>)>>,
}

/// Opens the log, writes its `start` record and starts its thread. Metrics must be installed before.
///
/// # Errors
/// When the file cannot be opened or the thread cannot be started.
pub fn start(config: Config) -> io::Result<Writer> {
    start_with(config, QUEUE)
}

fn start_with(config: Config, queue: usize) -> io::Result<Writer> {
    let (connections, connections_rx) = bounded(queue);
    let (rest, rest_rx) = bounded(queue);
    let (stop, stop_rx) = bounded::<()>(0);
    let (ended, ended_rx) = bounded::<()>(0);
    let lost = Arc::new(Lost::default());
    let (sink, previous) = match &config.file {
        None => (Sink::stdout(), None),
        Some(path) => Sink::file(path).map_err(|e| {
            let text = format!(
                "cannot open the audit log {}: {e}; create its directory, or change `audit.file`",
                path.display()
            );
            io::Error::new(e.kind(), text)
        })?,
    };
    let mut thread = Thread { config, sink, lost: lost.clone(), sequence: 0, batch: Batch::default() };
    let body = move || {
        thread.control(&Control::Start { version: env!("CARGO_PKG_VERSION"), previous });
        thread.run(&connections_rx, &rest_rx, &stop_rx);
        // From here on emitting fails, and is counted, before anyone hears that the log has stopped.
        drop((connections_rx, rest_rx));
        drop(ended);
    };
    std::thread::Builder::new().name("audit".to_owned()).spawn(body)?;
    let running = Mutex::new(Some((stop, ended_rx)));
    Ok(Writer { connections, rest, lost, decisions: Decisions::new(), running })
}

impl Writer {
    /// Writes what waits and a `stop` record, and ends the thread. Events that come later are lost, and counted
    /// in the metrics. Returns after 3 s at the latest, even if the sink blocks.
    pub fn stop(&self) {
        let Some((stop, ended)) = self.running.lock().take() else {
            return;
        };
        drop(stop);
        // Nothing is ever sent: the channel's end is the news.
        let _ = ended.recv_timeout(STOP);
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Emit for Writer {
    fn emit(&self, event: Event) {
        self.decisions.count(&event);
        let k = kind(&event.what);
        let queue = match event.what {
            What::Open { .. } | What::Close { .. } => &self.connections,
            What::Dns { .. } | What::Packet { .. } => &self.rest,
        };
        let count = event.count;
        if queue.try_send((Timestamp::now(), event)).is_err() {
            self.lost.add(k, count);
        }
    }
}

/// Records that are formatted and not yet written.
#[derive(Debug, Default)]
struct Batch {
    text: Vec<u8>,
    /// For each record: where its line ends, its kind, its count, and the losses that it tells of.
    records: Vec<(usize, Option<usize>, u64, [u64; 4])>,
}

struct Thread {
    config: Config,
    sink: Sink,
    lost: Arc<Lost>,
    sequence: u64,
    batch: Batch,
}

impl Thread {
    fn run(&mut self, connections: &Receiver<Stamped>, rest: &Receiver<Stamped>, stop: &Receiver<()>) {
        loop {
            // Connections first: they are few, and each matters.
            match connections.try_recv().or_else(|_| rest.try_recv()) {
                Ok((time, event)) => {
                    self.event(time, &event);
                    continue;
                }
                // Both senders live in the Writer, which stops this thread before it goes.
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => self.flush(),
            }
            let next = select! {
                recv(connections) -> e => e.ok(),
                recv(rest) -> e => e.ok(),
                recv(stop) -> _ => break,
                default(IDLE) => {
                    self.sink.look_after();
                    // Nothing may come for long, and what was lost must not wait for it.
                    if self.lost.any() {
                        self.control(&Control::Lost);
                    }
                    continue;
                }
            };
            match next {
                Some((time, event)) => self.event(time, &event),
                None => break,
            }
        }
        while let Ok((time, event)) = connections.try_recv().or_else(|_| rest.try_recv()) {
            self.event(time, &event);
        }
        self.control(&Control::Stop);
        while let Ok((_, event)) = connections.try_recv().or_else(|_| rest.try_recv()) {
            self.lost.add(kind(&event.what), event.count);
        }
    }

    fn event(&mut self, time: Timestamp, event: &Event) {
        let lost = self.lost.take();
        self.sequence += 1;
        let begin = self.batch.text.len();
        record::event(&mut self.batch.text, &self.config, self.sequence, time, event, &lost);
        if let (Some(recent), Some(who)) = (&self.config.recent, &event.who) {
            recent.keep(&who.namespace, &self.batch.text[begin..]);
        }
        self.batch.records.push((self.batch.text.len(), Some(kind(&event.what)), event.count, lost));
        if self.batch.text.len() >= BATCH {
            self.flush();
        }
    }

    fn control(&mut self, control: &Control) {
        let lost = self.lost.take();
        self.sequence += 1;
        record::control(&mut self.batch.text, &self.config, self.sequence, Timestamp::now(), control, &lost);
        self.batch.records.push((self.batch.text.len(), None, 0, lost));
        self.flush();
    }

    /// Writes the batch. Records that do not get through whole are lost, with what they would have told.
    fn flush(&mut self) {
        if self.batch.records.is_empty() {
            return;
        }
        let written = self.sink.write(&self.batch.text, |n| {
            // What counts is the last whole line.
            self.batch.records.iter().map(|r| r.0).take_while(|end| *end <= n).last().unwrap_or(0)
        });
        for (_, kind, count, told) in self.batch.records.iter().filter(|(end, ..)| *end > written) {
            if let Some(k) = kind {
                self.lost.add(*k, *count);
            }
            self.lost.give_back(*told);
        }
        self.batch.records.clear();
        self.batch.text.clear();
    }
}

#[cfg(test)]
mod tests;
