//! The journal: what the ledger knows, on disk, so that a restarted gateway does not begin with nothing.
//!
//! Two files in one folder, `facts.snapshot` and `facts.log`. Each begins with a magic and a header; both and every
//! frame after them carry their length and a checksum. New facts are appended to the log; when it has outgrown the
//! snapshot, both are written anew as one snapshot. A thread of its own does all that, so that the core never
//! waits for a disk; the disk is synced at most once a second.
//!
//! Lives are kept as durations from the moment of their frame, by the kernel's boot clock. After a restart on the
//! same boot of the kernel that clock says how old a frame is. After a reboot only the wall clock can: when it stands
//! before the frame it is not known how old the facts are, and they are dropped, since a fact that lives too long
//! opens what should be closed, and a lost one costs a query. Facts that have expired meanwhile are kept on the
//! same boot, for flows that go on, and dropped after a reboot.
//!
//! A file that is damaged, of another version or of another gateway is refused, renamed to `*.refused`, and the gateway
//! starts without it. So it does where the folder cannot be used; the disk is tried again every 5 s. Either is said in
//! the log, the status and the metrics. A frame that is cut off at the end of a file is what a crash leaves: what comes before it counts.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tidegate_policy::key::KeyHasher;
use tidegate_policy::{Name, ScopeKey};
use tidegate_proto::{Beat, Claim, PeerFact, PeerMessage};

use crate::telemetry::{JOURNAL_FAILING, JOURNAL_REFUSED};

/// First octets of a file; the last two are the version.
const MAGIC: &[u8; 8] = b"TGFACT\0\x01";
/// The longest frame, in octets.
const MAX_FRAME: usize = 16 << 20;
/// The most octets of both files together; beyond that nothing is appended.
const MAX_FILES: u64 = 256 << 20;
/// A log of so many octets is never too long.
const SMALL_LOG: u64 = 1 << 20;
/// The disk is synced at most so often.
const SYNC: Duration = Duration::from_secs(1);
/// Batches that may wait for the disk; beyond that the core sends everything again later.
const QUEUE: usize = 256;
/// After a failure of the disk it is tried again so often.
const RETRY: Duration = Duration::from_secs(5);

/// The clocks of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clocks {
    /// Names this boot of the kernel.
    pub kernel: String,
    /// Since that boot, suspended time included, in milliseconds.
    pub boot_ms: u64,
    /// The wall clock, in milliseconds since 1970.
    pub wall_ms: u64,
}

impl Clocks {
    /// What they show now.
    pub fn now() -> Self {
        let boot = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default();
        let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        let kernel = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self { kernel: kernel.trim().to_owned(), boot_ms: millis(boot), wall_ms: millis(wall) }
    }
}

#[derive(Serialize, Deserialize)]
struct Header {
    gateway: String,
    kernel: String,
    boot_ms: u64,
    wall_ms: u64,
}

/// What a journal held.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Facts, their lives as they are now.
    pub facts: Vec<PeerFact>,
    /// The highest claims that were known.
    pub claims: Vec<Claim>,
}

/// Why a file is refused.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error("it is no journal of this version")]
    Magic,
    #[error("it is of gateway {0:?}")]
    Foreign(String),
    #[error("the checksum of the frame at octet {0} does not fit")]
    Checksum(u64),
    #[error("the frame at octet {0} is not understood")]
    Content(u64),
}

fn checksum(payload: &[u8]) -> u64 {
    KeyHasher::new("journal").field(payload).finish() as u64
}

fn frame(payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(payload.len() + 12);
    // A frame is far below 4 GiB: messages are cut into parts.
    out.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    out.extend_from_slice(&checksum(payload).to_le_bytes());
    out.extend_from_slice(payload);
    out
}

/// The next frame of a file: `None` at its end, and where the file was cut off.
fn next_frame<'a>(bytes: &'a [u8], at: &mut usize) -> Result<Option<&'a [u8]>, Refused> {
    let start = *at as u64;
    let Some(head) = bytes.get(*at..*at + 12) else { return Ok(None) };
    let mut len = [0; 4];
    len.copy_from_slice(&head[..4]);
    let len = u32::from_le_bytes(len) as usize;
    if len > MAX_FRAME {
        return Err(Refused::Checksum(start));
    }
    let Some(payload) = bytes.get(*at + 12..*at + 12 + len) else { return Ok(None) };
    if checksum(payload).to_le_bytes() != head[4..] {
        return Err(Refused::Checksum(start));
    }
    *at += 12 + len;
    Ok(Some(payload))
}

type Fact = (ScopeKey, Name, IpAddr);

/// What files held, by identity: what came later holds.
#[derive(Default)]
struct Contents {
    facts: HashMap<Fact, PeerFact, ahash::RandomState>,
    claims: Vec<Claim>,
}

impl Contents {
    fn take(&mut self, message: PeerMessage, age: Duration, keep_expired: bool) {
        for mut f in message.facts {
            f.remaining = f.remaining.saturating_sub(age);
            f.ttl = f.ttl.saturating_sub(age);
            let key = (f.scope, f.name.clone(), f.ip);
            if f.remaining.is_zero() && !keep_expired {
                self.facts.remove(&key);
            } else {
                self.facts.insert(key, f);
            }
        }
        if let Some(beat) = message.beat {
            self.claims = beat.claims;
        }
    }

    /// Reads one file into what is known.
    fn read(&mut self, path: &Path, gateway: &str, now: &Clocks) -> Result<(), Refused> {
        let mut file = match File::open(path) {
            Ok(f) => f,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        let mut bytes = Vec::new();
        (&mut file).take(MAX_FILES + MAX_FRAME as u64).read_to_end(&mut bytes)?;
        if bytes.is_empty() {
            // Made, and the machine went down before the first octet was on the disk.
            return Ok(());
        }
        if bytes.get(..MAGIC.len()) != Some(MAGIC) {
            return Err(Refused::Magic);
        }
        let mut at = MAGIC.len();
        let Some(header) = next_frame(&bytes, &mut at)? else { return Ok(()) };
        let header: Header = serde_json::from_slice(header).map_err(|_| Refused::Content(MAGIC.len() as u64))?;
        if header.gateway != gateway {
            return Err(Refused::Foreign(header.gateway));
        }
        let same_boot = !header.kernel.is_empty() && header.kernel == now.kernel;
        let frames = at;
        // Read twice: a file that is refused half way must leave nothing behind, and all that a long log says of the
        // same facts would take many times its octets.
        loop {
            let start = at as u64;
            let Some(payload) = next_frame(&bytes, &mut at)? else { break };
            decode(payload).ok_or(Refused::Content(start))?;
        }
        if at < bytes.len() {
            tracing::info!(path = %path.display(), octets = bytes.len() - at, "the journal's last frame was cut off");
        }
        at = frames;
        while let Some(payload) = next_frame(&bytes, &mut at)? {
            let (stamp, mut message) = decode(payload).ok_or(Refused::Content(at as u64))?;
            let since = stamp.saturating_sub(header.boot_ms);
            let age = if same_boot {
                now.boot_ms.checked_sub(stamp)
            } else {
                now.wall_ms.checked_sub(header.wall_ms.saturating_add(since))
            };
            if age.is_none() {
                message.facts.clear();
            }
            self.take(message, Duration::from_millis(age.unwrap_or_default()), same_boot);
        }
        Ok(())
    }
}

fn decode(payload: &[u8]) -> Option<(u64, PeerMessage)> {
    let (stamp, message) = payload.split_first_chunk::<8>()?;
    let message = tidegate_proto::decode_peer(message).ok()?;
    Some((u64::from_le_bytes(*stamp), message))
}

fn encode(stamp: u64, message: PeerMessage) -> Vec<u8> {
    let mut out = Vec::new();
    for part in tidegate_proto::encode_peer(message) {
        let mut payload = stamp.to_le_bytes().to_vec();
        payload.extend_from_slice(&part);
        out.extend_from_slice(&frame(&payload));
    }
    out
}

/// What is wrong with the journal, for the status.
#[derive(Debug, Default)]
pub struct Health {
    /// Files that were refused since the start, and why.
    refused: Mutex<BTreeMap<&'static str, String>>,
    /// Why it cannot be written now.
    failing: Mutex<Option<String>>,
}

impl Health {
    /// One sentence for each trouble.
    pub fn problems(&self) -> Vec<String> {
        let refused = self.refused.lock();
        let refused = refused.iter().map(|(file, why)| format!("journal: {file} was refused: {why}"));
        let failing = self.failing.lock().clone().map(|why| format!("journal: it cannot be written: {why}"));
        refused.chain(failing).collect()
    }

    fn refuse(&self, file: &'static str, why: &Refused) {
        metrics::counter!(JOURNAL_REFUSED).increment(1);
        self.refused.lock().insert(file, why.to_string());
    }

    fn written(&self, result: &io::Result<()>) {
        metrics::gauge!(JOURNAL_FAILING).set(if result.is_err() { 1.0 } else { 0.0 });
        *self.failing.lock() = result.as_ref().err().map(ToString::to_string);
    }
}

/// The core's end of the journal.
#[derive(Debug)]
pub struct Journal {
    tx: Sender<PeerMessage>,
    resync: Arc<AtomicBool>,
    health: Arc<Health>,
}

impl Journal {
    /// Reads what an earlier run left and starts the thread, which ends when the journal is dropped. `clocks` is
    /// [`Clocks::now`] but in a test.
    ///
    /// # Errors
    /// The thread cannot be started. Bad files and a folder that cannot be used are no error.
    pub fn open(
        folder: &Path,
        gateway: &str,
        clocks: fn() -> Clocks,
    ) -> Result<(Self, Recovered, std::thread::JoinHandle<()>)> {
        let health = Arc::<Health>::default();
        let contents = recover(folder, gateway, &clocks(), &health);
        let recovered =
            Recovered { facts: contents.facts.values().cloned().collect(), claims: contents.claims.clone() };
        let (tx, rx) = bounded(QUEUE);
        let resync = Arc::new(AtomicBool::new(false));
        let mut writer = Writer {
            folder: folder.to_owned(),
            gateway: gateway.to_owned(),
            clocks,
            resync: resync.clone(),
            health: health.clone(),
            log: None,
            snapshot: 0,
        };
        let thread = std::thread::Builder::new()
            .name("journal".into())
            .spawn(move || writer.run(&rx, contents))
            .context("cannot start the journal thread")?;
        Ok((Self { tx, resync, health }, recovered, thread))
    }

    /// What is wrong with it, now and later.
    pub fn health(&self) -> Arc<Health> {
        self.health.clone()
    }

    /// Appends facts, and claims if there are any. Never waits.
    pub fn append(&self, facts: Vec<PeerFact>, claims: Option<Vec<Claim>>) {
        let beat = claims.map(|claims| Beat { claims, ..Beat::default() });
        if self.tx.try_send(PeerMessage { facts, beat, ..PeerMessage::default() }).is_err() {
            self.resync.store(true, Ordering::Relaxed);
        }
    }

    /// Whether something was lost and there is room again: everything is to be appended once more. Says so once.
    pub fn wants_all(&self) -> bool {
        self.tx.is_empty() && self.resync.swap(false, Ordering::Relaxed)
    }
}

/// Reads both files; those that are refused are set aside.
fn recover(folder: &Path, gateway: &str, now: &Clocks, health: &Health) -> Contents {
    let mut contents = Contents::default();
    if !folder.is_dir() {
        // Writing says why, if it is more than the first start.
        return contents;
    }
    for name in ["facts.snapshot", "facts.log"] {
        let path = folder.join(name);
        if let Err(why) = contents.read(&path, gateway, now) {
            let aside = folder.join(format!("{name}.refused"));
            health.refuse(name, &why);
            let moved = fs::rename(&path, &aside);
            tracing::error!(
                path = %path.display(),
                aside = %aside.display(),
                moved = moved.is_ok(),
                "a journal file is refused: {why}; starting without it"
            );
        }
    }
    contents
}

struct Log {
    file: File,
    octets: u64,
    synced: bool,
}

struct Writer {
    folder: PathBuf,
    gateway: String,
    clocks: fn() -> Clocks,
    resync: Arc<AtomicBool>,
    health: Arc<Health>,
    log: Option<Log>,
    /// Octets of the snapshot.
    snapshot: u64,
}

impl Writer {
    fn run(&mut self, rx: &Receiver<PeerMessage>, contents: Contents) {
        let mut failed: Option<Instant> = None;
        let begun = self.begin(contents);
        self.health.written(&begun);
        if let Err(error) = begun {
            tracing::error!(%error, folder = %self.folder.display(), "the journal cannot be written; trying again every 5 s");
            failed = Some(Instant::now());
        }
        let mut sync = Instant::now();
        loop {
            let message = match rx.recv_timeout(SYNC) {
                Ok(m) => Some(m),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            if let Some(at) = failed {
                if at.elapsed() < RETRY {
                    continue;
                }
                // What was written before the failure still counts; the core sends the rest again.
                let contents = recover(&self.folder, &self.gateway, &(self.clocks)(), &self.health);
                let begun = self.begin(contents);
                self.health.written(&begun);
                match begun {
                    Ok(()) => {
                        tracing::info!("the journal is written again");
                        self.resync.store(true, Ordering::Relaxed);
                        failed = None;
                    }
                    Err(_) => {
                        failed = Some(Instant::now());
                        continue;
                    }
                }
            }
            let step = || -> io::Result<()> {
                if let Some(m) = message {
                    self.append(m)?;
                }
                if sync.elapsed() >= SYNC {
                    sync = Instant::now();
                    self.sync()?;
                }
                Ok(())
            };
            let stepped = step();
            if let Err(error) = &stepped {
                self.health.written(&stepped);
                tracing::error!(%error, folder = %self.folder.display(), "the journal cannot be written; trying again every 5 s");
                self.log = None;
                failed = Some(Instant::now());
            }
        }
        if let Err(error) = self.sync() {
            tracing::error!(%error, "the journal could not be synced at the end");
        }
    }

    fn open(&self, name: &str, clocks: &Clocks) -> io::Result<(File, u64)> {
        let mut file = File::create(self.folder.join(name))?;
        let header = Header {
            gateway: self.gateway.clone(),
            kernel: clocks.kernel.clone(),
            boot_ms: clocks.boot_ms,
            wall_ms: clocks.wall_ms,
        };
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&frame(&serde_json::to_vec(&header)?));
        file.write_all(&bytes)?;
        Ok((file, bytes.len() as u64))
    }

    /// Writes a snapshot of what is known and begins a new log.
    fn begin(&mut self, contents: Contents) -> io::Result<()> {
        self.log = None;
        // Which names pods ask for is nobody else's business.
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
        let clocks = (self.clocks)();
        let (file, _) = self.open("facts.snapshot.new", &clocks)?;
        let mut out = BufWriter::new(file);
        let claims = Some(Beat { claims: contents.claims, ..Beat::default() });
        let facts: Vec<PeerFact> = contents.facts.into_values().collect();
        out.write_all(&encode(clocks.boot_ms, PeerMessage { facts, beat: claims, ..PeerMessage::default() }))?;
        let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        self.snapshot = file.metadata()?.len();
        fs::rename(self.folder.join("facts.snapshot.new"), self.folder.join("facts.snapshot"))?;
        // The log's frames are in the snapshot now; read once more after a crash here, they say the same.
        let (file, octets) = self.open("facts.log", &clocks)?;
        File::open(&self.folder)?.sync_all()?;
        self.log = Some(Log { file, octets, synced: false });
        Ok(())
    }

    fn append(&mut self, message: PeerMessage) -> io::Result<()> {
        let bytes = encode((self.clocks)().boot_ms, message);
        let Some(log) = &mut self.log else { return Ok(()) };
        if log.octets + self.snapshot + bytes.len() as u64 <= MAX_FILES {
            log.file.write_all(&bytes)?;
            log.octets += bytes.len() as u64;
            log.synced = false;
        }
        if log.octets > SMALL_LOG.max(2 * self.snapshot) {
            let mut contents = Contents::default();
            let clocks = (self.clocks)();
            for name in ["facts.snapshot", "facts.log"] {
                contents.read(&self.folder.join(name), &self.gateway, &clocks).map_err(io::Error::other)?;
            }
            // An expired fact that is still worth something is held by the core.
            contents.facts.retain(|_, f| !f.remaining.is_zero());
            self.begin(contents)?;
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        if let Some(log) = self.log.as_mut().filter(|l| !l.synced) {
            log.file.sync_data()?;
            log.synced = true;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fact(i: u8, seconds: u64) -> PeerFact {
        PeerFact {
            scope: ScopeKey(1),
            namespace: "shop".into(),
            name: Name::parse("api.example.com").unwrap(),
            ip: [192, 0, 2, i].into(),
            remaining: Duration::from_secs(seconds),
            ttl: Duration::from_secs(seconds),
            nodes: vec!["node-1".into()],
        }
    }

    fn claim(epoch: u64) -> Claim {
        let pair = tidegate_proto::Pair { pool: "p".into(), ipv4: None, ipv6: None };
        Claim { pair, owner: "gw-a".into(), epoch, held: false }
    }

    /// Writes facts and ends the journal in order.
    fn write(folder: &Path, facts: Vec<PeerFact>, claims: Option<Vec<Claim>>) -> Recovered {
        let (journal, recovered, thread) = Journal::open(folder, "gw-a", Clocks::now).unwrap();
        journal.append(facts, claims);
        drop(journal);
        thread.join().unwrap();
        recovered
    }

    fn read_at(folder: &Path, clocks: &Clocks) -> Vec<(IpAddr, u64)> {
        let mut facts: Vec<_> = recover(folder, "gw-a", clocks, &Health::default())
            .facts
            .into_values()
            .map(|f| (f.ip, f.remaining.as_secs()))
            .collect();
        facts.sort_unstable();
        facts
    }

    #[test]
    fn facts_and_claims_come_back_older_by_the_time_between() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(write(dir.path(), vec![fact(1, 100), fact(2, 10)], Some(vec![claim(3)])), Recovered::default());
        let now = Clocks::now();
        let ip = |i: u8| IpAddr::from([192, 0, 2, i]);
        // The same boot of the kernel: its clock counts, whatever the wall clock says.
        let later = Clocks { boot_ms: now.boot_ms + 20_000, wall_ms: 0, ..now.clone() };
        let back = read_at(dir.path(), &later);
        assert_eq!(back[1], (ip(2), 0), "expired, and kept for flows that go on");
        assert!(back[0].0 == ip(1) && (78..=80).contains(&back[0].1), "{back:?}");
        // After a reboot the wall clock counts; what has expired has no flows any more.
        let rebooted = Clocks { kernel: "other".into(), boot_ms: 5, wall_ms: now.wall_ms + 20_000 };
        let back = read_at(dir.path(), &rebooted);
        assert!(back.len() == 1 && (78..=80).contains(&back[0].1), "{back:?}");
        // A wall clock that went back says nothing of their age: they are dropped, the claims are not.
        let earlier = Clocks { wall_ms: now.wall_ms - 3_600_000, ..rebooted };
        assert_eq!(read_at(dir.path(), &earlier), []);
        assert_eq!(recover(dir.path(), "gw-a", &earlier, &Health::default()).claims, [claim(3)]);
        // The next run reads the same, out of its new snapshot too.
        for _ in 0..2 {
            let again = write(dir.path(), vec![], None);
            assert_eq!((again.facts.len(), again.claims), (2, vec![claim(3)]));
        }
    }

    #[test]
    fn a_cut_off_end_is_what_a_crash_leaves() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), vec![fact(1, 100)], None);
        let log = dir.path().join("facts.log");
        let whole = fs::read(&log).unwrap();
        let mut longer = whole.clone();
        longer.extend_from_slice(&encode(
            Clocks::now().boot_ms,
            PeerMessage { facts: vec![fact(2, 100)], ..PeerMessage::default() },
        ));
        for end in whole.len()..longer.len() {
            fs::write(&log, &longer[..end]).unwrap();
            assert_eq!(read_at(dir.path(), &Clocks::now()).len(), 1, "cut at {end}");
        }
        fs::write(&log, &longer).unwrap();
        assert_eq!(read_at(dir.path(), &Clocks::now()).len(), 2);
    }

    #[test]
    fn damaged_and_foreign_files_are_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), vec![fact(1, 100)], None);
        let log = dir.path().join("facts.log");
        let good = fs::read(&log).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            fs::write(&log, &bad).unwrap();
            // A longer length is a frame that was cut off; anything else is seen. Never a wrong fact.
            for (_, f) in recover(dir.path(), "gw-a", &Clocks::now(), &Health::default()).facts {
                assert_eq!((f.ip, f.namespace.as_str()), ([192, 0, 2, 1].into(), "shop"));
            }
            let refused = dir.path().join("facts.log.refused");
            if log.exists() {
                assert!(!refused.exists());
            } else {
                fs::remove_file(refused).unwrap();
            }
        }
        for bad in [&b"hello, this is no journal"[..], b"TGFACT\0\x02"] {
            fs::write(&log, bad).unwrap();
            assert_eq!(read_at(dir.path(), &Clocks::now()), []);
            assert!(!log.exists());
        }
        fs::write(&log, &good).unwrap();
        assert!(recover(dir.path(), "gw-b", &Clocks::now(), &Health::default()).facts.is_empty());
        assert!(!log.exists() && !dir.path().join("facts.snapshot").exists());
        // And the gateway goes on with a new one.
        write(dir.path(), vec![fact(3, 100)], None);
        assert_eq!(write(dir.path(), vec![], None).facts.len(), 1);
    }

    #[test]
    fn a_log_that_outgrew_its_snapshot_is_folded_into_it() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _, thread) = Journal::open(dir.path(), "gw-a", Clocks::now).unwrap();
        let mut sent = 0;
        while sent < 6 << 20 {
            let facts: Vec<_> = (0..100).map(|i| fact(i, 1000)).collect();
            sent += encode(0, PeerMessage { facts: facts.clone(), ..PeerMessage::default() }).len();
            while journal.tx.is_full() {
                std::thread::sleep(Duration::from_millis(1));
            }
            journal.append(facts, None);
        }
        assert!(!journal.wants_all());
        drop(journal);
        thread.join().unwrap();
        let size = |n: &str| fs::metadata(dir.path().join(n)).unwrap().len();
        assert!(size("facts.log") + size("facts.snapshot") < 2 << 20);
        assert_eq!(write(dir.path(), vec![], None).facts.len(), 100);
    }

    #[test]
    fn what_is_wrong_is_said_and_the_rest_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("journal");
        fs::write(&folder, b"a file").unwrap();
        let (journal, recovered, thread) = Journal::open(&folder, "gw-a", Clocks::now).unwrap();
        assert_eq!(recovered, Recovered::default());
        let health = journal.health();
        let end = Instant::now() + Duration::from_secs(10);
        while health.problems().is_empty() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(health.problems()[0].starts_with("journal: it cannot be written: "), "{:?}", health.problems());
        drop(journal);
        thread.join().unwrap();
        // A folder in the place of a file cannot be read, and a new file takes its place.
        fs::remove_file(&folder).unwrap();
        write(&folder, vec![fact(1, 100)], None);
        fs::remove_file(folder.join("facts.log")).unwrap();
        fs::create_dir(folder.join("facts.log")).unwrap();
        let (journal, _, thread) = Journal::open(&folder, "gw-a", Clocks::now).unwrap();
        let problems = journal.health().problems();
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].starts_with("journal: facts.log was refused: it cannot be read"), "{problems:?}");
        journal.append(vec![fact(2, 100)], None);
        drop(journal);
        thread.join().unwrap();
        assert_eq!(read_at(&folder, &Clocks::now()).len(), 1);
    }
}
