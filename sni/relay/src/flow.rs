//! Moves bytes between a client and its server until both are done.

use std::cell::RefCell;
use std::io;
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use metrics::Counter;
use parking_lot::Mutex;
use rustix::net::{RecvFlags, recv};
use socket2::SockRef;
use tidegate_policy::Reason;
use tidegate_sni_core::Gate;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::task::coop::consume_budget;

use crate::metric::Metrics;
use crate::pipe::Pipe;
use crate::registry::Entry;
use crate::socket;

/// The buffer that all flows of a thread share, in bytes.
pub(crate) const BUFFER: usize = 64 * 1024;
/// A direction that moved so many bytes is spliced from then on.
const SPLICE_AFTER: u64 = 64 * 1024;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER].into());
}

/// Reads once into the thread's buffer and hands the bytes to `f`; an empty slice is the end of the data.
///
/// # Errors
/// Those of the read, `WouldBlock` included.
pub(crate) fn read<R>(from: &TcpStream, f: impl FnOnce(&[u8]) -> R) -> io::Result<R> {
    SCRATCH.with_borrow_mut(|buffer| {
        let mut read = None;
        let tried = from.try_io(Interest::READABLE, || {
            let (n, _) = recv(from, &mut buffer[..], RecvFlags::empty())?;
            read = Some(n);
            // Less than there was room for: the socket is drained, and what comes next is announced (edge-triggered).
            // Saying so spares the call that would find nothing.
            if n > 0 && n < BUFFER { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        match read {
            Some(n) => Ok(f(&buffer[..n])),
            None => Err(tried.err().unwrap_or_else(|| io::ErrorKind::WouldBlock.into())),
        }
    })
}

/// How a flow ended, when not cleanly.
#[derive(Debug)]
pub(crate) enum End {
    /// A side failed or reset the connection.
    Failed(io::Error),
    /// Nothing moved for too long.
    Idle,
    /// The client broke what it was allowed.
    Refused(Reason),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        End::Failed(error)
    }
}

/// One direction, from the reader's point of view.
#[derive(Clone, Copy)]
struct Way<'a> {
    from: &'a TcpStream,
    to: &'a TcpStream,
    count: &'a AtomicU64,
    total: &'a Counter,
    up: bool,
}

impl Way<'_> {
    fn moved(&self, n: usize) {
        self.count.fetch_add(n as u64, Ordering::Relaxed);
        self.total.increment(n as u64);
    }

    async fn write(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.to.try_write(bytes) {
                Ok(n) => {
                    self.moved(n);
                    bytes = &bytes[n..];
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.to.writable().await?,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// What one turn did.
enum Turn {
    Moved(usize),
    Nothing,
    End,
}

/// A client, its server, and what is known of both.
pub(crate) struct Flow<'a> {
    client: &'a TcpStream,
    upstream: &'a TcpStream,
    entry: &'a Entry,
    metrics: &'a Metrics,
    gate: Mutex<Gate>,
    retry: Notify,
    half: AtomicBool,
}

impl<'a> Flow<'a> {
    pub fn new(
        client: &'a TcpStream,
        upstream: &'a TcpStream,
        entry: &'a Entry,
        metrics: &'a Metrics,
        gate: Gate,
    ) -> Self {
        Self {
            client,
            upstream,
            entry,
            metrics,
            gate: Mutex::new(gate),
            retry: Notify::new(),
            half: AtomicBool::new(false),
        }
    }

    /// Sends the judged hello, the first `first` octets of `bytes`, and what already followed it, then moves bytes until both sides have
    /// ended their data. Sockets keep resetting on close unless that end was clean.
    ///
    /// # Errors
    /// How it ended otherwise.
    pub async fn run(
        &self,
        mut bytes: Vec<u8>,
        first: usize,
        hello_timeout: Duration,
        idle: Duration,
    ) -> Result<(), End> {
        let up =
            Way { from: self.client, to: self.upstream, count: &self.entry.sent, total: &self.metrics.sent, up: true };
        let down = Way {
            from: self.upstream,
            to: self.client,
            count: &self.entry.received,
            total: &self.metrics.received,
            up: false,
        };
        let moving = async {
            let followed = bytes.split_off(first);
            self.gate.lock().client(&followed, &mut bytes).map_err(End::Refused)?;
            up.write(&bytes).await?;
            // The flow may live for hours.
            drop((bytes, followed));
            tokio::try_join!(self.direction(up), self.direction(down)).map(drop)
        };
        tokio::select! {
            result = moving => result?,
            end = self.idle(idle) => return Err(end),
            end = self.second_hello(hello_timeout) => return Err(end),
        }
        socket::close_cleanly(self.upstream)?;
        socket::close_cleanly(self.client)?;
        Ok(())
    }

    async fn direction(&self, way: Way<'_>) -> Result<(), End> {
        let mut gated = true;
        let mut moved = 0u64;
        loop {
            consume_budget().await;
            way.from.readable().await?;
            gated = gated && !self.gate.lock().is_open();
            let pipe = if gated || moved < SPLICE_AFTER { None } else { self.pipe() };
            let turn = match pipe {
                Some(pipe) => Self::splice(way, pipe).await?,
                None => self.copy(way, gated).await?,
            };
            match turn {
                Turn::Moved(n) => moved += n as u64,
                Turn::Nothing => {}
                Turn::End => break,
            }
        }
        // The last side to end is told by the close itself.
        if !self.half.swap(true, Ordering::Relaxed) {
            SockRef::from(way.to).shutdown(Shutdown::Write)?;
        }
        Ok(())
    }

    fn pipe(&self) -> Option<Pipe> {
        let pipe = Pipe::take();
        if pipe.is_none() {
            self.metrics.no_pipe.increment(1);
        }
        pipe
    }

    async fn splice(way: Way<'_>, mut pipe: Pipe) -> Result<Turn, End> {
        let n = match way.from.try_io(Interest::READABLE, || pipe.fill(way.from)) {
            Ok(0) => return Ok(Turn::End),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Turn::Nothing),
            Err(e) => return Err(e.into()),
        };
        while pipe.held() > 0 {
            match way.to.try_io(Interest::WRITABLE, || pipe.empty(way.to)) {
                Ok(n) => way.moved(n),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => way.to.writable().await?,
                Err(e) => return Err(e.into()),
            }
        }
        Ok(Turn::Moved(n))
    }

    /// Through the shared buffer. What the other side does not take at once is kept until it does;
    /// nothing more is read meanwhile.
    async fn copy(&self, way: Way<'_>, gated: bool) -> Result<Turn, End> {
        let mut rest = Vec::new();
        let read = read(way.from, |bytes| {
            if gated && way.up {
                self.gate.lock().client(bytes, &mut rest).map_err(End::Refused)?;
                return Ok(bytes.len());
            }
            if gated {
                let mut gate = self.gate.lock();
                let before = gate.is_retry();
                gate.server(bytes);
                if gate.is_retry() && !before {
                    self.retry.notify_one();
                }
            }
            if bytes.is_empty() {
                return Ok(0);
            }
            let taken = match way.to.try_write(bytes) {
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => 0,
                Err(e) => return Err(End::Failed(e)),
            };
            way.moved(taken);
            rest.extend_from_slice(&bytes[taken..]);
            Ok(bytes.len())
        });
        let n = match read {
            Ok(n) => n?,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Turn::Nothing),
            Err(e) => return Err(e.into()),
        };
        way.write(&rest).await?;
        Ok(if n == 0 { Turn::End } else { Turn::Moved(n) })
    }

    /// Ends a flow that moves nothing. It looks four times per `limit` instead of noting the time of every read.
    async fn idle(&self, limit: Duration) -> End {
        let mut seen = self.entry.moved();
        let mut quiet = 0;
        loop {
            tokio::time::sleep(limit / 4).await;
            let now = self.entry.moved();
            quiet = if now == seen { quiet + 1 } else { 0 };
            seen = now;
            if quiet == 4 {
                return End::Idle;
            }
        }
    }

    /// Ends a flow whose second hello does not come.
    async fn second_hello(&self, limit: Duration) -> End {
        self.retry.notified().await;
        tokio::time::sleep(limit).await;
        if self.gate.lock().is_retry() {
            return End::Refused(Reason::HelloTimeout);
        }
        std::future::pending().await
    }
}
