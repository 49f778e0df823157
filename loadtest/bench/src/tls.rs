//! New TLS connections through the SNI check, and bulk octets through the relay: Tidegate beside
//! HAProxy, nginx and a relay that only splices.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use socket2::{Domain, SockRef, Socket, Type};

use crate::arena::{self, NAMES, POD};
use crate::backend;
use crate::poll::{Poll, Ticker};
use crate::process::{LOAD_CPU, SERVER_CPU, Server, own};
use crate::stat::{Schedule, median, percentile};
use crate::table::Table;

/// How long late connections are waited for.
const TAIL: Duration = Duration::from_secs(1);

/// The relays, each with its port.
pub struct Relays {
    all: Vec<(Server, u16)>,
    backend: Server,
    hellos: Vec<Vec<u8>>,
    flight: usize,
}

impl Relays {
    /// Starts the backend and every relay.
    pub fn start(peers: &Path) -> Result<Self> {
        let own = std::env::current_exe()?;
        let names: String = (0..NAMES).map(|i| arena::name(i) + "\n").collect();
        fs::write(peers.join("names.lst"), names)?;
        let map: String = (0..NAMES).map(|i| format!("{} {}:443;\n", arena::name(i), arena::addresses(i)[0])).collect();
        fs::write(peers.join("names.map"), map)?;
        let command = |program: &Path, arguments: &[&str]| {
            let mut c = Command::new(program);
            c.args(arguments).current_dir(peers);
            c
        };
        let mut backend = Server::start("backend", &mut command(&own, &["backend"]), LOAD_CPU)?;
        backend.wait(|| backend::flight_len().is_ok())?;
        let prefix = format!("{}/", peers.display());
        let mut all = Vec::new();
        for (name, mut command, port) in [
            ("Tidegate", command(&own, &["serve-relay", "8443"]), 8443),
            ("HAProxy", command(Path::new("/usr/sbin/haproxy"), &["-db", "-f", "haproxy.cfg"]), 8441),
            ("nginx", command(Path::new("/usr/sbin/nginx"), &["-p", &prefix, "-c", "nginx.conf"]), 8442),
            ("bare splice", command(&own, &["splice", "8444"]), 8444),
        ] {
            let mut server = Server::start(name, &mut command, SERVER_CPU)?;
            server.wait(|| TcpStream::connect((arena::addresses(0)[0], port)).is_ok())?;
            all.push((server, port));
        }
        Ok(Self { all, backend, hellos: backend::hellos()?, flight: backend::flight_len()? })
    }

    /// Each relay refuses a name that is not on the list; the splicing one, which is the last, knows none.
    pub fn check(&self) -> Result<()> {
        for (server, port) in &self.all[..self.all.len() - 1] {
            let mut hello = self.hellos[0].clone();
            let at = hello.windows(4).position(|w| w == b"host").unwrap_or(0);
            hello[at] = b'x';
            let mut stream = connect(0, *port, Type::STREAM)?;
            stream.set_read_timeout(Some(Duration::from_secs(2)))?;
            stream.write_all(&hello)?;
            let mut b = [0; 64];
            ensure!(!matches!(stream.read(&mut b), Ok(1..)), "{} lets any name through", server.name);
        }
        Ok(())
    }

    /// Connects at an even rate, measures each relay in turn.
    pub fn connections(&self, rate: u64, seconds: f64, runs: usize) -> Result<Table> {
        // A relay with threads for each connection is no measure of connections.
        let checking = self.all[..self.all.len() - 1].iter().map(|(s, port)| (s, *port));
        let measured: Vec<(&Server, u16)> = checking.chain([(&self.backend, arena::BACKEND)]).collect();
        let mut results = vec![Vec::new(); measured.len()];
        for _ in 0..runs {
            for ((server, port), all) in measured.iter().zip(&mut results) {
                all.push(self.run(server, *port, Schedule::new(rate, seconds))?);
            }
        }
        let how = format!(
            "{NAMES} names; connect, ClientHello with SNI ({} octets), the answer of a TLS 1.3 server ({} octets), \
             close by the client. One worker thread on one CPU, {rate} connections a second evenly spaced for \
             {seconds} s, median of {runs} interleaved runs. Latency counts from when a connection was due to its \
             last octet. “idle” is the share of the other CPU that generator and backend left. “backend” is the \
             generator and the backend with no relay between them: what the load takes by itself.",
            self.hellos[0].len(),
            self.flight
        );
        let head = ["relay", "CPU µs/connection", "p50 µs", "p99 µs", "done/s", "failed %", "late µs", "idle %"];
        let mut table = Table::new(&format!("New TLS connections, {rate} a second"), how, &head);
        for ((server, _), all) in measured.iter().zip(&results) {
            let of = |f: fn(&Run) -> f64| median(all.iter().map(f));
            table.row(vec![
                server.name.to_owned(),
                format!("{:.1}", of(|r| r.cpu)),
                format!("{:.0}", of(|r| r.p50)),
                format!("{:.0}", of(|r| r.p99)),
                format!("{:.0}", of(|r| r.done)),
                format!("{:.2}", of(|r| r.failed) * 100.0),
                format!("{:.0}", of(|r| r.late)),
                format!("{:.0}", of(|r| r.idle) * 100.0),
            ]);
        }
        Ok(table)
    }

    fn run(&self, server: &Server, port: u16, schedule: Schedule) -> Result<Run> {
        let mut poll = Poll::new()?;
        let interval = Duration::from_nanos(schedule.due(1));
        let ticker = Ticker::new(interval.max(Duration::from_micros(20)))?;
        poll.add(ticker.as_fd(), u64::MAX)?;
        let mut live: HashMap<u64, Attempt> = HashMap::new();
        let (mut latencies, mut lateness) = (Vec::new(), Vec::new());
        let (mut started, mut failed) = (0u64, 0u64);
        let mut buffer = [0; 16 * 1024];
        // Both are on one CPU, which nobody else has.
        let load = || own() + self.backend.cpu();
        let (before, busy) = (server.cpu(), load());
        let start = Instant::now();
        let now = || u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let end = schedule.due(schedule.total()) + TAIL.as_nanos() as u64;
        while started < schedule.total() || !live.is_empty() && now() < end {
            ticker.ticked();
            for token in poll.wait(Some(Duration::from_millis(10))) {
                let Some(a) = live.get_mut(&token) else { continue };
                match a.step(&self.hellos, self.flight, &mut buffer) {
                    Ok(false) => continue,
                    Ok(true) => latencies.push(now().saturating_sub(schedule.due(token))),
                    Err(_) => failed += 1,
                }
                live.remove(&token);
            }
            while started < schedule.until(now()) {
                lateness.push(now().saturating_sub(schedule.due(started)));
                match Attempt::new(started, port) {
                    Ok(a) => {
                        poll.add(a.stream.as_fd(), started)?;
                        live.insert(started, a);
                    }
                    Err(_) => failed += 1,
                }
                started += 1;
            }
        }
        let took = start.elapsed().as_secs_f64();
        let idle = 1.0 - (load() - busy).as_secs_f64() / took;
        failed += live.len() as u64;
        drop(live);
        // Closing goes on a moment longer.
        std::thread::sleep(Duration::from_millis(100));
        let cpu = (server.cpu() - before).as_secs_f64() * 1e6;
        latencies.sort_unstable();
        lateness.sort_unstable();
        let good = latencies.len() as f64;
        Ok(Run {
            cpu: cpu / good,
            p50: percentile(&latencies, 0.5) / 1e3,
            p99: percentile(&latencies, 0.99) / 1e3,
            done: good / took,
            failed: failed as f64 / started as f64,
            late: percentile(&lateness, 0.99) / 1e3,
            idle,
        })
    }

    /// Moves `octets` down one connection, or over several at once, through each relay in turn.
    pub fn bulk(&self, octets: u64, flows: u32, runs: usize) -> Result<Table> {
        let mut results = vec![Vec::new(); self.all.len()];
        for _ in 0..runs {
            for ((server, port), all) in self.all.iter().zip(&mut results) {
                all.push(self.move_bytes(server, *port, octets, flows)?);
            }
        }
        let gib = octets as f64 / (1u64 << 30) as f64;
        let how = format!(
            "{gib} GiB from server to client after the hello, over {flows} connection(s); sender and receiver share \
             the other CPU, so throughput is no figure of the relay alone. The bare splice relay has a thread and a pipe of \
             256 KiB for each direction. Median of {runs} interleaved runs."
        );
        let head = ["relay", "CPU s/GiB", "GiB/s"];
        let mut table = Table::new(&format!("Bulk bytes, {flows} connection(s)"), how, &head);
        for ((server, _), all) in self.all.iter().zip(&results) {
            table.row(vec![
                server.name.to_owned(),
                format!("{:.3}", median(all.iter().map(|r| r.0))),
                format!("{:.2}", median(all.iter().map(|r| r.1))),
            ]);
        }
        Ok(table)
    }

    /// CPU seconds per GiB and GiB a second.
    fn move_bytes(&self, server: &Server, port: u16, octets: u64, flows: u32) -> Result<(f64, f64)> {
        let each = octets / u64::from(flows);
        let mut streams = Vec::new();
        for i in 0..flows {
            let mut s = connect(i, port, Type::STREAM)?;
            s.write_all(&self.hellos[i as usize])?;
            s.read_exact(&mut vec![0; self.flight])?;
            streams.push((s, each));
        }
        let mut poll = Poll::new()?;
        let before = server.cpu();
        let start = Instant::now();
        for (i, (s, _)) in streams.iter_mut().enumerate() {
            s.write_all(&each.to_be_bytes())?;
            s.set_nonblocking(true)?;
            poll.add(s.as_fd(), i as u64)?;
        }
        let deadline = Duration::from_secs(60);
        while streams.iter().any(|(_, left)| *left > 0) {
            ensure!(start.elapsed() < deadline, "{} stalls", server.name);
            for token in poll.wait(Some(Duration::from_secs(1))) {
                let (s, left) = &mut streams[token as usize];
                while *left > 0 {
                    match discard(s) {
                        Ok(0) => anyhow::bail!("{} ended early", server.name),
                        Ok(n) => *left = left.saturating_sub(n as u64),
                        Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                        Err(e) => return Err(e.into()),
                    }
                }
            }
        }
        let took = start.elapsed().as_secs_f64();
        let cpu = (server.cpu() - before).as_secs_f64();
        let gib = octets as f64 / (1u64 << 30) as f64;
        Ok((cpu / gib, gib / took))
    }
}

/// Takes received octets without copying them (MSG_TRUNC, tcp(7)).
fn discard(stream: &TcpStream) -> io::Result<usize> {
    use std::os::fd::AsRawFd;
    // SAFETY: with MSG_TRUNC the kernel writes nothing on a TCP socket, so the length may exceed the (absent) buffer.
    let n = unsafe { libc::recv(stream.as_raw_fd(), std::ptr::null_mut(), 1 << 20, libc::MSG_TRUNC) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Connects from the pod to a name's address.
fn connect(name: u32, port: u16, kind: Type) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, kind, None)?;
    socket.set_tcp_nodelay(true)?;
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::IpBindAddressNoPort, &true)?;
    socket.bind(&SocketAddr::from((POD, 0)).into())?;
    match socket.connect(&SocketAddr::from((arena::addresses(name)[0], port)).into()) {
        Err(e) if e.raw_os_error() != Some(libc::EINPROGRESS) => Err(e),
        _ => Ok(socket.into()),
    }
}

/// What one run gave; times in microseconds.
#[derive(Clone, Copy)]
struct Run {
    cpu: f64,
    p50: f64,
    p99: f64,
    done: f64,
    failed: f64,
    late: f64,
    /// The share of the load's CPU that nobody used.
    idle: f64,
}

/// One connection of the generator.
struct Attempt {
    stream: TcpStream,
    name: usize,
    greeted: bool,
    got: usize,
}

impl Attempt {
    fn new(i: u64, port: u16) -> io::Result<Self> {
        let name = (i.wrapping_mul(7919) % u64::from(NAMES)) as u32;
        let stream = connect(name, port, Type::STREAM.nonblocking())?;
        Ok(Self { stream, name: name as usize, greeted: false, got: 0 })
    }

    /// True when the whole answer is there.
    fn step(&mut self, hellos: &[Vec<u8>], flight: usize, buffer: &mut [u8]) -> io::Result<bool> {
        if !self.greeted {
            match (&self.stream).write(&hellos[self.name]) {
                Ok(_) => self.greeted = true,
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::NotConnected) => {
                    return Ok(false);
                }
                Err(e) => return Err(e),
            }
        }
        loop {
            match (&self.stream).read(buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.got += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(e),
            }
            if self.got >= flight {
                return Ok(true);
            }
        }
    }
}

/// A relay that does nothing but splice: a thread per direction, a pipe of 256 KiB each.
pub fn splice(port: u16) -> Result<()> {
    let listener = backend::listen(port)?;
    for client in listener.incoming().flatten() {
        std::thread::spawn(move || {
            let Ok(to) = client.local_addr() else { return };
            let dial = || -> io::Result<TcpStream> {
                let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
                socket.set_tcp_nodelay(true)?;
                nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::IpBindAddressNoPort, &true)?;
                socket.bind(&SocketAddr::from((arena::EGRESS, 0)).into())?;
                socket.connect(&SocketAddr::new(to.ip(), arena::BACKEND).into())?;
                Ok(socket.into())
            };
            let Ok(server) = dial() else { return };
            std::thread::scope(|s| {
                s.spawn(|| splice_one(&client, &server));
                splice_one(&server, &client);
            });
        });
    }
    Ok(())
}

fn splice_one(from: &TcpStream, to: &TcpStream) {
    use rustix::pipe::{SpliceFlags, fcntl_setpipe_size, pipe, splice};
    const SIZE: usize = 256 * 1024;
    let run = || -> io::Result<()> {
        let (read, write) = pipe()?;
        fcntl_setpipe_size(&write, SIZE)?;
        loop {
            let mut n = splice(from, None, &write, None, SIZE, SpliceFlags::MOVE)?;
            if n == 0 {
                return Ok(());
            }
            while n > 0 {
                n -= splice(&read, None, to, None, n, SpliceFlags::MOVE)?;
            }
        }
    };
    // An error ends this direction as the end of the data does.
    let _ = run();
    let _ = SockRef::from(to).shutdown(std::net::Shutdown::Write);
}
