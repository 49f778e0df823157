//! Resolving as a C library does, with the response code and the reason kept.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::Family;

const PORT: u16 = 53;
const HEADER: usize = 12;
const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const TYPE_OPT: u16 = 41;
/// The option of an OPT record with a reason (RFC 8914).
const OPTION_REASON: u16 = 15;
/// The largest answer over UDP that is asked for, in octets.
const UDP_SIZE: u16 = 1232;
/// How long is waited for an answer at most; gateways tell that they have none before that.
pub const PATIENCE: Duration = Duration::from_millis(2500);
/// As many times is each server asked.
const TRIES: usize = 2;
/// As many servers and search domains count (resolv.conf(5)).
const SERVERS: usize = 3;
const DOMAINS: usize = 6;

/// What the servers say of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The response code.
    pub code: String,
    /// The reason that came with it.
    pub reason: Option<String>,
    /// Addresses of the family.
    pub addresses: Vec<IpAddr>,
}

/// The words of the lines that begin with a key.
fn words<'a>(conf: &'a str, key: &'a str) -> impl Iterator<Item = &'a str> {
    conf.lines().filter_map(move |line| line.trim().strip_prefix(key)).flat_map(str::split_whitespace)
}

/// Resolves a name by the servers of a resolv.conf, with its search domains if `search` says so.
///
/// # Errors
/// Nobody answers, or not with DNS.
pub fn resolve(conf: &str, name: &str, search: bool, family: Family, patience: Duration) -> Result<Answer> {
    let servers: Vec<IpAddr> = words(conf, "nameserver").filter_map(|w| w.parse().ok()).take(SERVERS).collect();
    ensure!(!servers.is_empty(), "resolv.conf names no server");
    let domains = if search { words(conf, "search").take(DOMAINS).collect() } else { Vec::new() };
    let mut last = None;
    for domain in domains.into_iter().chain([""]) {
        let full = format!("{name}.{domain}");
        let answer = ask(&servers, full.trim_end_matches('.'), family, patience)?;
        if !answer.addresses.is_empty() {
            return Ok(answer);
        }
        last = Some(answer);
    }
    last.context("no answer")
}

fn ask(servers: &[IpAddr], name: &str, family: Family, patience: Duration) -> Result<Answer> {
    let mut last = None;
    for _ in 0..TRIES {
        for server in servers {
            match ask_one(*server, name, family, patience) {
                // A server that fails is no answer as long as there are others, or another try.
                Ok(answer) if answer.code == "SERVFAIL" => last = Some(Ok(answer)),
                Ok(answer) => return Ok(answer),
                Err(error) => last = last.or(Some(Err(error.context(format!("{server}"))))),
            }
        }
    }
    last.context("nobody was asked")?
}

fn ask_one(server: IpAddr, name: &str, family: Family, patience: Duration) -> Result<Answer> {
    let any: IpAddr = if server.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(SocketAddr::new(server, PORT))?;
    let qtype = if family == Family::V4 { TYPE_A } else { TYPE_AAAA };
    let query = query(rand::random(), name, qtype).context("not a name")?;
    socket.send(&query)?;
    let deadline = Instant::now() + patience;
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), "no answer within {} ms", patience.as_millis());
        socket.set_read_timeout(Some(left))?;
        let n = match socket.recv(&mut buffer) {
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => continue,
            other => other?,
        };
        let got = &buffer[..n];
        // What is no answer to this question is somebody else's.
        if got.get(..2) == query.get(..2) && got.get(2).is_some_and(|flags| flags & 0x80 != 0) {
            return parse(got, qtype).context("an answer that is no DNS");
        }
    }
}

fn query(id: u16, name: &str, qtype: u16) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    out.extend(id.to_be_bytes());
    // Recursion desired; one question; one additional record, OPT.
    out.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 1]);
    out.extend(tidegate_dns_core::wire::question(name, qtype)?);
    out.push(0);
    out.extend(TYPE_OPT.to_be_bytes());
    out.extend(UDP_SIZE.to_be_bytes());
    out.extend([0; 6]);
    Some(out)
}

fn be16(m: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(u16::from_be_bytes(m.get(at..at + 2)?.try_into().ok()?)))
}

/// The offset behind a name.
fn skip_name(m: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match usize::from(*m.get(at)?) {
            0 => return Some(at + 1),
            n if n & 0xc0 == 0xc0 => return Some(at + 2),
            n if n & 0xc0 == 0 => at += 1 + n,
            _ => return None,
        }
    }
}

fn parse(m: &[u8], qtype: u16) -> Option<Answer> {
    let code = match m.get(3)? & 0xf {
        0 => "NOERROR".to_owned(),
        1 => "FORMERR".to_owned(),
        2 => "SERVFAIL".to_owned(),
        3 => "NXDOMAIN".to_owned(),
        4 => "NOTIMP".to_owned(),
        5 => "REFUSED".to_owned(),
        n => format!("RCODE{n}"),
    };
    let mut answer = Answer { code, reason: None, addresses: Vec::new() };
    let mut at = HEADER;
    for _ in 0..be16(m, 4)? {
        at = skip_name(m, at)? + 4;
    }
    let (answers, authorities, additional) = (be16(m, 6)?, be16(m, 8)?, be16(m, 10)?);
    for n in 0..answers + authorities + additional {
        at = skip_name(m, at)?;
        let (kind, len) = (be16(m, at)?, be16(m, at + 8)?);
        let data = m.get(at + 10..at + 10 + len)?;
        at += 10 + len;
        if n < answers && kind == usize::from(qtype) {
            match qtype {
                TYPE_A => answer.addresses.push(<[u8; 4]>::try_from(data).ok()?.into()),
                _ => answer.addresses.push(<[u8; 16]>::try_from(data).ok()?.into()),
            }
        } else if kind == usize::from(TYPE_OPT) {
            answer.reason = reason(data);
        }
    }
    Some(answer)
}

/// The text of an extended error, or its number.
fn reason(mut options: &[u8]) -> Option<String> {
    while options.len() >= 4 {
        let (code, len) = (be16(options, 0)?, be16(options, 2)?);
        let data = options.get(4..4 + len)?;
        if code == usize::from(OPTION_REASON) {
            let text = String::from_utf8_lossy(data.get(2..)?);
            let number = be16(data, 0)?;
            return Some(if text.is_empty() { format!("extended error {number}") } else { text.into_owned() });
        }
        options = &options[4 + len..];
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONF: &str = "search shop.svc.cluster.local svc.cluster.local\nnameserver 127.0.0.1\noptions ndots:5\n";

    fn answer(query: &[u8], code: u8, records: &[u8], counts: [u8; 2], more: &[u8]) -> Vec<u8> {
        let question = &query[..query.len() - 11];
        let mut m = question.to_vec();
        m[2] = 0x81;
        m[3] = code;
        m[7] = counts[0];
        m[11] = counts[1];
        m.extend(records);
        m.extend(more);
        m
    }

    #[test]
    fn addresses_and_reasons_are_read() {
        let q = query(7, "api.example.com", TYPE_A).unwrap();
        // A CNAME, and an address behind a compressed name.
        let records =
            [0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 9, 0, 2, 0xc0, 16, 0xc0, 16, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 192, 0, 2, 7];
        let got = parse(&answer(&q, 0, &records, [2, 0], &[]), TYPE_A).unwrap();
        assert_eq!((got.code.as_str(), got.addresses), ("NOERROR", vec![IpAddr::from([192, 0, 2, 7])]));
        let opt = [&[0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 15, 0, 15, 0, 11, 0, 15][..], b"(blocked)"].concat();
        let got = parse(&answer(&q, 3, &[], [0, 1], &opt), TYPE_A).unwrap();
        assert_eq!((got.code.as_str(), got.reason.as_deref()), ("NXDOMAIN", Some("(blocked)")));
    }

    #[test]
    fn nonsense_is_no_answer_and_no_panic() {
        let q = query(7, "api.example.com", TYPE_A).unwrap();
        let records = [0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 192, 0, 2, 7];
        let good = answer(&q, 0, &records, [1, 0], &[]);
        for end in 0..good.len() {
            assert!(parse(&good[..end], TYPE_A).is_none(), "{end}");
        }
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] = 0xff;
            let _ = parse(&bad, TYPE_A);
        }
    }

    #[test]
    fn a_resolv_conf_is_read() {
        assert_eq!(words(CONF, "search").collect::<Vec<_>>(), ["shop.svc.cluster.local", "svc.cluster.local"]);
        assert_eq!(words(CONF, "nameserver").collect::<Vec<_>>(), ["127.0.0.1"]);
        let none = resolve("", "x", false, Family::V4, Duration::from_millis(1));
        assert!(none.unwrap_err().to_string().contains("no server"));
    }
}
