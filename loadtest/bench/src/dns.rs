//! Cached DNS queries: Tidegate's DNS service beside unbound and dnsdist.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::arena::{self, AUTHORITY, NAMES, POD};
use crate::process::{SERVER_CPU, Server};
use crate::stat::{Schedule, median, percentile};
use crate::table::Table;
use crate::udp::{BATCH, Batch};

/// How long late answers are waited for.
const TAIL: Duration = Duration::from_millis(300);

/// A query without EDNS, as libc sends it.
fn query(i: u32) -> Vec<u8> {
    let mut q = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in arena::name(i).split('.') {
        q.push(label.len() as u8);
        q.extend_from_slice(label.as_bytes());
    }
    q.extend_from_slice(&[0, 0, 1, 0, 1]);
    q
}

/// The index in a query's name, whatever its case.
fn index(query: &[u8]) -> Option<u32> {
    std::str::from_utf8(query.get(13..)?.get(5..9)?).ok()?.parse().ok()
}

/// Answers every name with its two addresses, for an hour; health checks of peers with nothing.
fn answer(query: &[u8]) -> Option<Vec<u8>> {
    let end = 12 + query.get(12..)?.iter().position(|b| *b == 0)? + 5;
    let mut m = query.get(..end)?.to_vec();
    let known = index(query).filter(|_| m[end - 4..] == [0, 1, 0, 1]);
    m[2] = 0x85;
    m[3] = 0x80;
    m[6..12].copy_from_slice(&[0, if known.is_some() { 2 } else { 0 }, 0, 0, 0, 0]);
    for ip in known.into_iter().flat_map(arena::addresses) {
        m.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0x0e, 0x10, 0, 4]);
        m.extend_from_slice(&ip.octets());
    }
    Some(m)
}

/// The authority, in a thread that lasts as long as the process. Once names are cached nobody asks it.
pub fn authority() -> Result<()> {
    let socket = UdpSocket::bind(AUTHORITY)?;
    std::thread::spawn(move || {
        let mut b = [0; 1500];
        while let Ok((n, from)) = socket.recv_from(&mut b) {
            if let Some(a) = answer(&b[..n]) {
                let _ = socket.send_to(&a, from);
            }
        }
    });
    Ok(())
}

/// Echoes on `port`.
pub fn echo(port: u16) -> Result<()> {
    // Not on all addresses: the answers would leave from another one.
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, port))?;
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &(8 << 20))?;
    Ok(Batch::new().echo(&socket)?)
}

/// Whether a datagram is the whole answer to the query for name `i`.
fn is_answer(m: &[u8], i: u32) -> bool {
    let Some(ips) = m.len().checked_sub(32).map(|at| [&m[at + 12..at + 16], &m[at + 28..]]) else { return false };
    let want = arena::addresses(i).map(|a| a.octets());
    m[2] & 0x80 != 0 && m[3] & 0xf == 0 && m[6..8] == [0, 2] && want.iter().all(|w| ips.contains(&&w[..]))
}

fn connected(port: u16) -> Result<UdpSocket> {
    let socket = UdpSocket::bind((POD, 0))?;
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &(8 << 20))?;
    socket.connect((Ipv4Addr::LOCALHOST, port))?;
    Ok(socket)
}

/// Has the server cache every name.
fn warm(port: u16) -> Result<()> {
    let socket = connected(port)?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    let mut b = [0; 512];
    for i in 0..NAMES {
        let mut tries = 0;
        loop {
            socket.send(&query(i))?;
            if socket.recv(&mut b).is_ok_and(|n| is_answer(&b[..n], i)) {
                break;
            }
            tries += 1;
            ensure!(tries < 10, "no good answer for {} from port {port}", arena::name(i));
        }
    }
    Ok(())
}

/// What one run gave.
#[derive(Clone, Copy)]
struct Run {
    /// Answered queries a second.
    answered: f64,
    /// Server CPU per answered query, in microseconds.
    cpu: f64,
    /// Latencies from the time that a query was due, in microseconds.
    p50: f64,
    p99: f64,
    /// Share of queries that were not answered, or wrongly.
    lost: f64,
    /// How late the generator sent, 99th percentile, in microseconds.
    late: f64,
    /// The share of its time that the generator had nothing to do.
    idle: f64,
}

/// Asks at an even rate whatever comes back, and counts the server's CPU time meanwhile.
fn run(server: &Server, port: u16, check: bool, rate: u64, seconds: f64) -> Result<Run> {
    let socket = connected(port)?;
    let queries: Vec<Vec<u8>> = (0..NAMES).map(query).collect();
    let schedule = Schedule::new(rate, seconds);
    let (mut out, mut back) = (Batch::new(), Batch::new());
    // By query id: when it was due, and the name; ids come again after 65,536 queries.
    let mut asked: Vec<Option<(u64, u32)>> = vec![None; 1 << 16];
    let mut latencies = Vec::with_capacity(schedule.total() as usize);
    let mut lateness = Vec::with_capacity(schedule.total() as usize);
    let (mut wrong, mut sent, mut idle, mut turn) = (0u64, 0u64, 0u64, 0u64);
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let before = server.cpu();
    let start = Instant::now();
    let now = || u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let end = schedule.due(schedule.total()) + TAIL.as_nanos() as u64;
    loop {
        let at = now();
        let due = schedule.until(at).saturating_sub(sent).min(BATCH as u64);
        for k in 0..due {
            // xorshift: names in no order, the same for every server.
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let i = (seed % u64::from(NAMES)) as u32;
            let id = (sent + k) as u16;
            out.set(k as usize, &queries[i as usize])[..2].copy_from_slice(&id.to_be_bytes());
            asked[usize::from(id)] = Some((schedule.due(sent + k), i));
            lateness.push(at.saturating_sub(schedule.due(sent + k)));
        }
        if due > 0 {
            // What the kernel refuses counts as lost.
            let _ = out.send(&socket, due as usize);
            sent += due;
        }
        let n = back.receive(&socket, false).unwrap_or(0);
        let at = now();
        for i in 0..n {
            let m = back.get(i);
            let Some(id) = m.first_chunk::<2>().map(|b| u16::from_be_bytes(*b)) else { continue };
            match asked[usize::from(id)].take() {
                Some((due, i)) if !check || is_answer(m, i) => latencies.push(at.saturating_sub(due)),
                _ => wrong += 1,
            }
        }
        // A turn that sent and received nothing was waiting.
        if due == 0 && n == 0 {
            idle += at.saturating_sub(turn);
        }
        turn = at;
        if sent == schedule.total() && (latencies.len() as u64 + wrong >= sent || at > end) {
            break;
        }
    }
    let took = start.elapsed().as_secs_f64();
    let cpu = (server.cpu() - before).as_secs_f64() * 1e6;
    latencies.sort_unstable();
    lateness.sort_unstable();
    let good = latencies.len() as f64;
    Ok(Run {
        answered: good / took.min(seconds),
        cpu: cpu / good,
        p50: percentile(&latencies, 0.5) / 1e3,
        p99: percentile(&latencies, 0.99) / 1e3,
        lost: 1.0 - good / sent as f64,
        late: percentile(&lateness, 0.99) / 1e3,
        idle: idle as f64 / 1e9 / took,
    })
}

/// Starts every server, measures them in turn, and makes the table.
pub fn measure(peers: &Path, rates: &[u64], seconds: f64, runs: usize) -> Result<Vec<Table>> {
    let own = std::env::current_exe()?;
    let command = |program: &Path, arguments: &[&str]| {
        let mut c = Command::new(program);
        c.args(arguments).current_dir(peers);
        c
    };
    let tidegate = command(&own, &["serve-dns", "5303"]);
    let unbound = command(Path::new("/usr/sbin/unbound"), &["-d", "-p", "-c", "unbound.conf"]);
    let dnsdist = command(Path::new("/usr/bin/dnsdist"), &["--supervised", "--disable-syslog", "-C", "dnsdist.conf"]);
    let bare = command(&own, &["echo", "5304"]);
    let mut servers = Vec::new();
    for (name, mut command, port, check) in [
        ("Tidegate", tidegate, 5303, true),
        ("unbound", unbound, 5301, true),
        ("dnsdist", dnsdist, 5302, true),
        ("bare echo", bare, 5304, false),
    ] {
        let mut server = Server::start(name, &mut command, SERVER_CPU)?;
        server.wait(|| answers((Ipv4Addr::LOCALHOST, port).into()))?;
        if check {
            warm(port).with_context(|| name.to_owned())?;
        }
        servers.push((server, port, check));
    }
    let mut tables = Vec::new();
    for &rate in rates {
        let mut results = vec![Vec::new(); servers.len()];
        for _ in 0..runs {
            for ((server, port, check), all) in servers.iter().zip(&mut results) {
                all.push(run(server, *port, *check, rate, seconds)?);
            }
        }
        let how = format!(
            "{NAMES} names, all cached, one worker thread on one CPU, {rate} queries a second evenly spaced for \
             {seconds} s, median of {runs} interleaved runs. Latency counts from when a query was due. \
             “late” is how late the generator sent (p99), “idle” the share of its time in which it had nothing to do; the bare echo shows what it can do."
        );
        let head = ["server", "CPU µs/query", "p50 µs", "p99 µs", "answered/s", "lost %", "late µs", "idle %"];
        let mut table = Table::new(&format!("Cached DNS queries, {rate} a second"), how, &head);
        for ((server, ..), all) in servers.iter().zip(&results) {
            let of = |f: fn(&Run) -> f64| median(all.iter().map(f));
            table.row(vec![
                server.name.to_owned(),
                format!("{:.2}", of(|r| r.cpu)),
                format!("{:.0}", of(|r| r.p50)),
                format!("{:.0}", of(|r| r.p99)),
                format!("{:.0}", of(|r| r.answered)),
                format!("{:.2}", of(|r| r.lost) * 100.0),
                format!("{:.0}", of(|r| r.late)),
                format!("{:.0}", of(|r| r.idle) * 100.0),
            ]);
        }
        tables.push(table);
    }
    Ok(tables)
}

/// Whether something answers a query on this address.
fn answers(at: SocketAddr) -> bool {
    let ask = || -> Result<()> {
        let socket = connected(at.port())?;
        socket.set_read_timeout(Some(Duration::from_millis(200)))?;
        socket.send(&query(0))?;
        socket.recv(&mut [0; 512])?;
        Ok(())
    };
    ask().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_authority_says_what_the_generator_expects() {
        let q = query(517);
        assert_eq!(index(&q), Some(517));
        let a = answer(&q).unwrap();
        assert!(is_answer(&a, 517));
        assert!(!is_answer(&a, 518));
        assert!(!is_answer(&q, 517));
        assert!(!is_answer(&a[..20], 517));
    }
}
