//! Names and new connections of pods, asked for again and again, with a log of what worked when: how long something
//! kept them waiting, and whom servers saw.

use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::family::{FAMILIES, Family};
use crate::netns::within;
use crate::place::Place;

/// A gap so long in the traffic of whom nobody touches is nothing: a machine that keeps up has it, too.
const STEADY: Duration = Duration::from_millis(200);
/// How often a name is asked for, and a connection opened.
const ASK: Duration = Duration::from_millis(50);
const OPEN: Duration = Duration::from_millis(100);
/// How long an answer is waited for, and a connection with what its server says first.
const ANSWERED: Duration = Duration::from_secs(3);
const CONNECTED: Duration = Duration::from_millis(900);
/// Longer than that the machine itself does not keep anybody waiting.
const LOST: Duration = Duration::from_secs(30);

/// When something worked, by what was tried.
#[derive(Debug, Default)]
pub struct Log(Mutex<Vec<(Instant, Result<IpAddr, String>)>>);

impl Log {
    fn entries(&self) -> MutexGuard<'_, Vec<(Instant, Result<IpAddr, String>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, result: Result<IpAddr, String>) {
        self.entries().push((Instant::now(), result));
    }

    /// The longest time without a success after `since`, of which the last one may be the end.
    pub fn longest(&self, since: Instant) -> Duration {
        self.gap(since).0
    }

    /// The same, and how long after `since` it began.
    pub fn gap(&self, since: Instant) -> (Duration, Duration) {
        let log = self.entries();
        let good: Vec<Instant> = std::iter::once(since)
            .chain(log.iter().filter(|(at, r)| *at > since && r.is_ok()).map(|(at, _)| *at))
            .collect();
        let gaps = good.windows(2).map(|w| (w[1].duration_since(w[0]), w[0].duration_since(since)));
        gaps.max().unwrap_or((Duration::MAX, Duration::ZERO))
    }

    /// How long it took from `since` to the first success.
    pub fn back(&self, since: Instant) -> Duration {
        let log = self.entries();
        log.iter().find(|(at, r)| *at > since && r.is_ok()).map_or(Duration::MAX, |(at, _)| at.duration_since(since))
    }

    /// How long after `since` the last success was; no time if there was none.
    pub fn last(&self, since: Instant) -> Duration {
        let log = self.entries();
        let good = log.iter().rev().find(|(_, r)| r.is_ok());
        good.map_or(Duration::ZERO, |(at, _)| at.saturating_duration_since(since))
    }

    /// How long ago the last success was.
    pub fn silence(&self) -> Duration {
        self.entries().iter().rev().find(|(_, r)| r.is_ok()).map_or(Duration::MAX, |(at, _)| at.elapsed())
    }

    /// How many tries failed after `since`, of how many.
    pub fn failures(&self, since: Instant) -> (usize, usize) {
        let log = self.entries();
        let late: Vec<bool> = log.iter().filter(|(at, _)| *at > since).map(|(_, r)| r.is_err()).collect();
        (late.iter().filter(|failed| **failed).count(), late.len())
    }

    /// Whom servers saw after `since`, each once.
    pub fn sources(&self, since: Option<Instant>) -> Vec<IpAddr> {
        let log = self.entries();
        let late = log.iter().filter(|(at, _)| since.is_none_or(|s| *at > s));
        let mut all: Vec<IpAddr> = late.filter_map(|(_, r)| r.clone().ok()).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// How many times servers saw this one, of how many times they saw anybody.
    pub fn seen(&self, source: IpAddr) -> (usize, usize) {
        let log = self.entries();
        let good = log.iter().filter_map(|(_, r)| r.as_ref().ok());
        (good.clone().filter(|ip| **ip == source).count(), good.count())
    }
}

/// A query for a name.
fn query(id: u16, name: &str, family: Family) -> Vec<u8> {
    let mut q = id.to_be_bytes().to_vec();
    q.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        q.push(label.len() as u8);
        q.extend_from_slice(label.as_bytes());
    }
    q.extend_from_slice(&[0, 0, family.pick(1, 28), 0, 1]);
    q
}

/// Asks for a name again and again, each time from a socket of its own and with no second try.
fn ask(server: SocketAddr, name: &str, log: &Log, end: &AtomicBool) {
    let mut open: Vec<(Instant, UdpSocket)> = Vec::new();
    let family = Family::of(server.ip());
    let any: SocketAddr = family.pick((Ipv4Addr::UNSPECIFIED, 0).into(), (Ipv6Addr::UNSPECIFIED, 0).into());
    let mut id = 0u16;
    let send = |id: u16| -> std::io::Result<UdpSocket> {
        let socket = UdpSocket::bind(any)?;
        socket.connect(server)?;
        socket.set_nonblocking(true)?;
        // What is not sent is not answered.
        let _ = socket.send(&query(id, name, family));
        Ok(socket)
    };
    while !end.load(Ordering::Relaxed) {
        id = id.wrapping_add(1);
        match send(id) {
            Ok(socket) => open.push((Instant::now(), socket)),
            Err(e) => log.note(Err(e.to_string())),
        }
        let next = Instant::now() + ASK;
        while Instant::now() < next {
            open.retain(|(at, s)| {
                let mut reply = [0; 512];
                match s.recv(&mut reply) {
                    // No error and at least one answer.
                    Ok(n) if n > 12 && reply[3] & 15 == 0 && reply[7] > 0 => {
                        log.note(Ok(server.ip()));
                        false
                    }
                    Ok(_) => {
                        log.note(Err("an error".into()));
                        false
                    }
                    Err(_) => at.elapsed() < ANSWERED,
                }
            });
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// One connection to an echo server: whom it saw.
///
/// # Errors
/// What ended it.
pub fn connect(to: SocketAddr, limit: Duration) -> Result<IpAddr, String> {
    let stream = TcpStream::connect_timeout(&to, limit).map_err(|e| e.to_string())?;
    stream.set_read_timeout(Some(limit)).map_err(|e| e.to_string())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).map_err(|e| e.to_string())?;
    let seen: serde_json::Value = serde_json::from_str(&line).map_err(|e| e.to_string())?;
    crate::probe::source(&seen).ok_or_else(|| "no source".into())
}

/// Opens a connection again and again, without any query.
fn open(to: SocketAddr, log: &Arc<Log>, end: &AtomicBool) {
    std::thread::scope(|scope| {
        while !end.load(Ordering::Relaxed) {
            scope.spawn(|| log.note(connect(to, CONNECTED)));
            std::thread::sleep(OPEN);
        }
    });
}

/// What is recorded of one pod.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// The name that it asks for.
    pub name: &'static str,
    /// The DNS server that it asks.
    pub dns: fn(Family) -> SocketAddr,
    /// The echo server that it connects to.
    pub to: fn(Family) -> SocketAddr,
}

/// What one pod saw of one family.
#[derive(Debug)]
pub struct Traffic {
    /// Its name.
    pub pod: String,
    /// The family.
    pub family: Family,
    /// Its queries.
    pub names: Arc<Log>,
    /// Its connections, with whom the server saw.
    pub flows: Arc<Log>,
    /// The connections of a pod that is not managed, in the same time.
    pub control: Arc<Log>,
}

impl Traffic {
    /// A limit for the time after `since` on this machine: longer by as much as it kept traffic waiting that Tidegate does
    /// not touch, twice as long at most.
    ///
    /// # Panics
    /// When that traffic did not get through.
    #[track_caller]
    pub fn limit(&self, limit: Duration, since: Instant) -> Duration {
        let gap = self.control.longest(since);
        assert!(gap < LOST, "the untouched pod does not get through");
        limit + gap.saturating_sub(STEADY).min(limit)
    }
}

/// Threads that end when they are told to, also by a panic of whoever started them.
#[derive(Debug, Default)]
pub struct Threads {
    /// Whether they should.
    pub end: Arc<AtomicBool>,
    all: Vec<JoinHandle<()>>,
}

impl Threads {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// One more.
    pub fn start(&mut self, work: impl FnOnce() + Send + 'static) {
        self.all.push(std::thread::spawn(work));
    }

    /// Ends them.
    ///
    /// # Panics
    /// If one of them did.
    pub fn finish(mut self) {
        self.end.store(true, Ordering::Relaxed);
        let panicked = self.all.drain(..).filter_map(|t| t.join().err()).next();
        if let Some(panic) = panicked {
            std::panic::resume_unwind(panic);
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        self.all.drain(..).for_each(|t| drop(t.join()));
    }
}

/// Records steady traffic until it is dropped or finished.
#[derive(Debug)]
pub struct Recorder {
    threads: Threads,
    traffic: Vec<Traffic>,
}

impl Recorder {
    /// Begins, in both families. `control` is a pod that is nobody's business, with a server that nobody else asks: what its
    /// traffic notices is the machine's doing.
    pub fn start(pods: &[(Place<'_>, Asked)], control: (&Place<'_>, SocketAddr)) -> Self {
        let mut this = Self { threads: Threads::new(), traffic: Vec::new() };
        let log = Arc::<Log>::default();
        let ((place, apart), l) = (control, Arc::clone(&log));
        this.run(place, move |end| open(apart, &l, end));
        for (place, asked) in pods {
            for family in FAMILIES {
                let (names, flows) = (Arc::<Log>::default(), Arc::<Log>::default());
                let (n, f) = (Arc::clone(&names), Arc::clone(&flows));
                let (server, to, name) = ((asked.dns)(family), (asked.to)(family), asked.name);
                this.run(place, move |end| ask(server, name, &n, end));
                this.run(place, move |end| open(to, &f, end));
                let pod = place.name().to_owned();
                this.traffic.push(Traffic { pod, family, names, flows, control: Arc::clone(&log) });
            }
        }
        this
    }

    fn run(&mut self, place: &Place<'_>, work: impl FnOnce(&AtomicBool) + Send + 'static) {
        let (end, netns) = (Arc::clone(&self.threads.end), place.netns().to_owned());
        // A place that is gone shows: nothing of it works.
        self.threads.start(move || drop(within(&netns, || work(&end))));
    }

    /// What was seen so far.
    pub fn traffic(&self) -> &[Traffic] {
        &self.traffic
    }

    /// Ends it; gives what was seen.
    pub fn finish(self) -> Vec<Traffic> {
        self.threads.finish();
        self.traffic
    }
}
