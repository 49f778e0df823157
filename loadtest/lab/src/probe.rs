//! What clients in pods try, and what they see.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

pub use crate::family::{FAMILIES, Family};
use crate::place::{Output, Place};

/// How long a client waits for what should work.
const PATIENCE: Duration = Duration::from_secs(4);
/// How long a client waits for what should be dropped.
const DROP: Duration = Duration::from_millis(900);

/// Where a client's commands run.
pub trait Client {
    /// Runs a command to its end.
    fn command(&self, command: &[&str]) -> Output;
}

impl Client for Place<'_> {
    fn command(&self, command: &[&str]) -> Output {
        self.run(command)
    }
}

/// What curl saw.
#[derive(Clone, Debug)]
pub struct Curl {
    /// Its exit status: 0, 6 (no address), 7 and 28 (no connection), 35 (TLS), 56 (reset).
    pub exit: i32,
    /// The server's JSON, or null.
    pub body: Value,
    /// What it wrote to standard error.
    pub error: String,
}

impl Curl {
    /// The source address that the server saw.
    pub fn source(&self) -> Option<IpAddr> {
        source(&self.body)
    }

    /// In a few words.
    pub fn text(&self) -> String {
        match self.source() {
            Some(ip) if self.exit == 0 => format!("answered, server saw {ip}"),
            _ => {
                let last = self.error.lines().last().unwrap_or_default().trim();
                // Where it tried to connect to, and what the kernel said.
                let told = self.error.lines().filter(|_| matches!(self.exit, 7 | 28));
                let told: Vec<&str> = told.filter_map(|l| l.strip_prefix("* ").map(str::trim)).collect();
                let told = if told.is_empty() { String::new() } else { format!(" ({})", told.join("; ")) };
                format!("curl exit {} {last}{told}", self.exit)
            }
        }
    }
}

/// The source address in what a server of the lab reports.
pub fn source(seen: &Value) -> Option<IpAddr> {
    seen["source"].as_str()?.parse().ok()
}

/// Fetches a URL once; more options of curl may follow.
pub fn curl(from: &impl Client, family: Family, url: &str, more: &[&str]) -> Curl {
    let mut command = vec!["curl", "-sSv", "-m", "5", "--connect-timeout", "4", family.flag(), url];
    command.extend(more);
    let out = from.command(&command);
    Curl { exit: out.status, body: serde_json::from_str(&out.stdout).unwrap_or_default(), error: out.stderr }
}

/// What dig saw.
#[derive(Clone, Debug, Default)]
pub struct Dig {
    /// `NOERROR`, `NXDOMAIN`, …; empty when nobody answered.
    pub status: String,
    /// The data of the answer section.
    pub answers: Vec<String>,
    /// The Extended DNS Error's text, if there is one.
    pub ede: Option<String>,
    /// Whether the authority section has a SOA.
    pub soa: bool,
}

impl Dig {
    /// In a few words.
    pub fn text(&self) -> String {
        let what = match (self.status.as_str(), self.answers.is_empty()) {
            ("", _) => return "no answer".into(),
            ("NOERROR", true) => "NODATA".to_owned(),
            ("NOERROR", false) => self.answers.join(" "),
            (other, _) => other.to_owned(),
        };
        match &self.ede {
            Some(ede) => format!("{what}, EDE {ede}"),
            None => what,
        }
    }

    /// No such name, with a reason.
    pub fn is_denied(&self) -> bool {
        self.status == "NXDOMAIN" && self.ede.is_some() && self.answers.is_empty()
    }

    /// The name exists but has nothing of the kind.
    pub fn is_no_data(&self) -> bool {
        self.status == "NOERROR" && self.answers.is_empty()
    }
}

/// Asks a name once; options such as `+tcp` or `@SERVER` may follow.
pub fn dig(from: &impl Client, name: &str, kind: &str, more: &[&str]) -> Dig {
    let mut command = vec!["dig", "+time=3", "+tries=1", "+nosearch", name, kind];
    command.extend(more);
    parse_dig(&from.command(&command).stdout)
}

fn parse_dig(text: &str) -> Dig {
    let mut out = Dig::default();
    let mut section = "";
    for line in text.lines() {
        if let Some((_, rest)) = line.split_once("status: ") {
            out.status = rest.split(',').next().unwrap_or_default().to_owned();
        } else if let Some((_, rest)) = line.split_once("EDE: ") {
            out.ede = Some(rest.trim().to_owned());
        } else if let Some(name) = line.strip_prefix(";; ").and_then(|l| l.strip_suffix(" SECTION:")) {
            section = if name == "ANSWER" {
                "answer"
            } else if name == "AUTHORITY" {
                "authority"
            } else {
                ""
            };
        } else if line.starts_with(';') || line.trim().is_empty() {
            continue;
        } else {
            let mut fields = line.split_whitespace().skip(3);
            let kind = fields.next().unwrap_or_default();
            match section {
                "answer" => out.answers.push(fields.collect::<Vec<_>>().join(" ")),
                "authority" => out.soa |= kind == "SOA",
                _ => {}
            }
        }
    }
    out
}

/// A TCP connection to an echo server of the lab.
#[derive(Debug)]
pub struct Echo {
    stream: BufReader<TcpStream>,
    /// The line with which the server said whom it saw.
    pub seen: Value,
}

impl Echo {
    /// Connects from a place and reads whom the server saw.
    ///
    /// # Errors
    /// As the socket's.
    pub fn connect(from: &Place<'_>, to: SocketAddr) -> Result<Self> {
        let stream = from.within(|| TcpStream::connect_timeout(&to, PATIENCE))?.context("connect")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        stream.read_line(&mut line).context("read")?;
        Ok(Self { stream, seen: serde_json::from_str(&line).context("the server's first line")? })
    }

    /// Sends a line and reads it back.
    ///
    /// # Errors
    /// When the connection is cut or silent.
    pub fn say(&mut self, text: &str) -> Result<()> {
        self.stream.get_mut().write_all(text.as_bytes())?;
        let mut back = vec![0; text.len()];
        self.stream.read_exact(&mut back)?;
        anyhow::ensure!(back == text.as_bytes(), "the echo differs");
        Ok(())
    }

    /// The largest segment that this side sends, in octets of TCP payload.
    ///
    /// # Errors
    /// When the socket is gone.
    pub fn segment(&self) -> Result<usize> {
        let size = nix::sys::socket::getsockopt(self.stream.get_ref(), nix::sys::socket::sockopt::TcpMaxSeg)?;
        Ok(usize::try_from(size)?)
    }

    /// Sets how long [`Echo::say`] waits.
    ///
    /// # Errors
    /// When the socket is gone.
    pub fn patience(&self, limit: Duration) -> Result<()> {
        Ok(self.stream.get_ref().set_read_timeout(Some(limit))?)
    }
}

/// Tries one TCP connection that should get no answer: says how it ended.
pub fn knock(from: &Place<'_>, to: SocketAddr) -> Result<Knock> {
    let tried = from.within(|| TcpStream::connect_timeout(&to, DROP))?;
    Ok(match tried {
        Ok(_) => Knock::Open,
        Err(e) if matches!(e.kind(), std::io::ErrorKind::TimedOut | std::io::ErrorKind::WouldBlock) => Knock::Silent,
        Err(_) => Knock::Refused,
    })
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Knock {
    /// Somebody answered.
    Open,
    /// An error came back.
    Refused,
    /// Nothing came back.
    Silent,
}

impl Knock {
    /// In a few words.
    pub const fn text(self) -> &'static str {
        match self {
            Knock::Open => "connected",
            Knock::Refused => "refused",
            Knock::Silent => "no answer",
        }
    }
}

/// Sends one datagram; gives what the echo server said of it, `None` if nothing came back.
///
/// # Errors
/// When the socket cannot be made.
pub fn datagram(from: &Place<'_>, to: SocketAddr, payload: &[u8], expect: bool) -> Result<Option<Value>> {
    from.within(|| {
        let any: IpAddr = if to.is_ipv4() { [0u8; 4].into() } else { [0u8; 16].into() };
        let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(if expect { PATIENCE } else { DROP }))?;
        socket.send(payload)?;
        let mut buffer = vec![0; 65_536];
        let Ok(n) = socket.recv(&mut buffer) else {
            return Ok(None);
        };
        let line = buffer[..n].split(|b| *b == b'\n').next().unwrap_or_default();
        Ok(Some(serde_json::from_slice(line).context("the server's line")?))
    })?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digs_output_is_read() {
        let text = "\n; <<>> DiG <<>> x\n;; Got answer:\n;; ->>HEADER<<- opcode: QUERY, status: NXDOMAIN, id: 1\n\n\
            ;; OPT PSEUDOSECTION:\n; EDNS: version: 0, flags:; udp: 1232\n; EDE: 15 (Blocked): (not-allowed)\n\
            ;; QUESTION SECTION:\n;x. IN A\n\n;; AUTHORITY SECTION:\nx. 5 IN SOA a. b. 1 2 3 4 5\n";
        let dig = parse_dig(text);
        assert!(dig.is_denied() && dig.soa);
        assert_eq!(dig.ede.as_deref(), Some("15 (Blocked): (not-allowed)"));
        let text = ";; ->>HEADER<<- opcode: QUERY, status: NOERROR, id: 1\n;; ANSWER SECTION:\nx. 300 IN A 192.0.2.1\n";
        assert_eq!(parse_dig(text).answers, ["192.0.2.1"]);
    }
}
