//! `tidegate probe`: one attempt of a client in a pod, told as JSON. `tidegate connectivity-test` runs it in its pods.
//!
//! It resolves by itself, as a C library would, but keeps the response code and the reason that came with it.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme, StreamOwned};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use serde::{Deserialize, Serialize};

mod dns;

/// The most of a server's answer that is read, in octets.
const BODY: u64 = 16 << 10;
/// The most addresses of a name that are tried.
const ADDRESSES: usize = 3;
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Family {
    /// IPv4.
    #[default]
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// An address's.
    pub const fn of(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// For people.
    pub const fn text(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}

/// What is tried: each step only if the one before succeeded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Attempt {
    /// The family of the addresses that are asked for.
    pub family: Family,
    /// A name to be resolved; absent: `address` is connected to without any.
    pub name: Option<String>,
    /// Whether the name is completed with the pod's search domains.
    pub search: bool,
    /// An address to connect to, whatever the name's are.
    pub address: Option<IpAddr>,
    /// A TCP port to connect to; absent: nothing but resolving.
    pub port: Option<u16>,
    /// The name in a TLS hello; absent: no TLS.
    pub sni: Option<String>,
    /// A path to be fetched over HTTP.
    pub path: Option<String>,
    /// How long each of the steps may take, in milliseconds.
    pub patience: u64,
}

/// Where an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// No address.
    Resolve,
    /// No connection.
    Connect,
    /// No TLS session.
    Hello,
    /// No answer.
    Fetch,
}

/// Why an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Why {
    /// Nobody answered in time.
    Silent,
    /// Refused, or unreachable.
    Refused,
    /// The connection was cut.
    Cut,
    /// Somebody answered otherwise than asked for, as with a TLS alert.
    Answered,
    /// There is no such name or address.
    Nothing,
}

/// What was seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Seen {
    /// The response code to the question for the name, such as `NXDOMAIN`.
    pub code: Option<String>,
    /// The reason that came with it (RFC 8914).
    pub reason: Option<String>,
    /// The name's addresses.
    pub addresses: Vec<IpAddr>,
    /// The address that was connected to.
    pub connected: Option<IpAddr>,
    /// The start of the answer's body.
    pub body: Option<String>,
    /// The step that failed, and why; absent: all was done.
    pub failed: Option<(Step, Why)>,
    /// In the system's words.
    pub error: Option<String>,
    /// All of it, in milliseconds.
    pub millis: u64,
}

impl Seen {
    fn fail(&mut self, step: Step, why: Why, error: impl std::fmt::Display) {
        self.failed = Some((step, why));
        self.error = Some(error.to_string());
    }

    /// In a few words.
    pub fn text(&self) -> String {
        let error = self.error.as_deref().unwrap_or_default();
        match self.failed {
            None => match self.connected {
                Some(ip) => format!("{ip} in {} ms", self.millis),
                None => format!("{} in {} ms", list(&self.addresses), self.millis),
            },
            Some((Step::Resolve, _)) => match (&self.code, &self.reason) {
                (Some(code), Some(reason)) => format!("{code}, {reason}"),
                (Some(code), None) => code.clone(),
                (None, _) => format!("no answer from DNS: {error}"),
            },
            Some((step, why)) => {
                let what = match step {
                    Step::Connect => "connect",
                    Step::Hello => "TLS",
                    _ => "HTTP",
                };
                let why = match why {
                    Why::Silent => "no answer",
                    Why::Refused => "refused",
                    Why::Cut => "connection reset",
                    Why::Answered | Why::Nothing => error,
                };
                let to = self.connected.or(self.addresses.first().copied());
                format!("{what}{}: {why}", to.map(|ip| format!(" {ip}")).unwrap_or_default())
            }
        }
    }
}

/// Addresses for people.
pub fn list(all: &[IpAddr]) -> String {
    all.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

fn why(error: &std::io::Error) -> Why {
    match error.kind() {
        ErrorKind::TimedOut | ErrorKind::WouldBlock => Why::Silent,
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof => Why::Cut,
        // rustls wraps what the other side says.
        ErrorKind::InvalidData | ErrorKind::Other => Why::Answered,
        _ => Why::Refused,
    }
}

/// The command: takes an attempt as JSON, prints what it saw as JSON.
///
/// # Errors
/// The attempt cannot be read.
pub fn run(attempt: &str) -> Result<u8> {
    let attempt: Attempt = serde_json::from_str(attempt).context("not an attempt")?;
    println!("{}", serde_json::to_string(&attempt.run())?);
    Ok(0)
}

impl Attempt {
    fn run(&self) -> Seen {
        let begun = Instant::now();
        let mut seen = Seen::default();
        self.step_by_step(&mut seen);
        seen.millis = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        seen
    }

    fn step_by_step(&self, seen: &mut Seen) {
        let patience = Duration::from_millis(self.patience.max(1));
        if let Some(name) = &self.name {
            let conf = std::fs::read_to_string(Path::new(RESOLV_CONF)).unwrap_or_default();
            match dns::resolve(&conf, name, self.search, self.family, patience.min(dns::PATIENCE)) {
                Ok(answer) => {
                    seen.code = Some(answer.code);
                    seen.reason = answer.reason;
                    seen.addresses = answer.addresses;
                }
                Err(error) => return seen.fail(Step::Resolve, Why::Silent, error),
            }
            if seen.addresses.is_empty() {
                return seen.fail(Step::Resolve, Why::Nothing, "no address");
            }
        }
        let Some(port) = self.port else { return };
        let to = self.address.map_or_else(|| seen.addresses.clone(), |one| vec![one]);
        let mut stream = None;
        for ip in to.into_iter().take(ADDRESSES) {
            match TcpStream::connect_timeout(&SocketAddr::new(ip, port), patience) {
                Ok(found) => {
                    seen.connected = Some(ip);
                    seen.failed = None;
                    seen.error = None;
                    stream = Some(found);
                    break;
                }
                Err(error) => seen.fail(Step::Connect, why(&error), error),
            }
        }
        let Some(mut stream) = stream else { return };
        let limits = stream.set_read_timeout(Some(patience)).and(stream.set_write_timeout(Some(patience)));
        if let Err(error) = limits {
            return seen.fail(Step::Connect, Why::Refused, error);
        }
        let host = self.sni.clone().or_else(|| self.name.clone()).unwrap_or_default();
        match &self.sni {
            None => self.fetch(&mut stream, &host, seen),
            Some(sni) => match hello(stream, sni) {
                Ok(mut stream) => self.fetch(&mut stream, &host, seen),
                Err(error) => seen.fail(Step::Hello, why(&error), error),
            },
        }
    }

    fn fetch(&self, stream: &mut (impl Read + Write), host: &str, seen: &mut Seen) {
        let Some(path) = &self.path else { return };
        match ask(stream, host, path) {
            Ok(body) => seen.body = Some(body),
            Err(error) => seen.fail(Step::Fetch, why(&error), error),
        }
    }
}

/// Makes a TLS session.
fn hello(mut stream: TcpStream, sni: &str) -> std::io::Result<StreamOwned<ClientConnection, TcpStream>> {
    let other = |e: &dyn std::fmt::Display| std::io::Error::new(ErrorKind::InvalidInput, e.to_string());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| other(&e))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
        .with_no_client_auth();
    let name = ServerName::try_from(sni.to_owned()).map_err(|e| other(&e))?;
    let mut session = ClientConnection::new(Arc::new(config), name).map_err(|e| other(&e))?;
    while session.is_handshaking() {
        session.complete_io(&mut stream)?;
    }
    Ok(StreamOwned::new(session, stream))
}

/// Fetches a path; HTTP/1.0, so that the answer comes in one piece.
fn ask(stream: &mut (impl Read + Write), host: &str, path: &str) -> std::io::Result<String> {
    let agent = concat!("tidegate/", env!("CARGO_PKG_VERSION"));
    // In one piece: a server that answers and closes after the first octets would reset the connection over the rest.
    let request = format!("GET {path} HTTP/1.0\r\nHost: {host}\r\nUser-Agent: {agent}\r\nAccept: */*\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut all = Vec::new();
    let ended = stream.take(BODY).read_to_end(&mut all);
    let text = String::from_utf8_lossy(&all);
    match text.split_once("\r\n\r\n") {
        // Servers end TLS sessions without saying so.
        Some((head, body)) if head.starts_with("HTTP/") => Ok(body.trim().to_owned()),
        _ => Err(ended.err().unwrap_or_else(|| ErrorKind::UnexpectedEof.into())),
    }
}

/// Takes every certificate: the probe sends no secret, and it is the way that is tried and not who is at its end. A company's
/// authority is not known to the image.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// The first address in a text that is not the server's own: what servers that echo a client's address say, as text or in JSON.
pub fn first_address(text: &str, server: Option<IpAddr>) -> Option<IpAddr> {
    let words = text.split(|c: char| !c.is_ascii_hexdigit() && c != '.' && c != ':');
    let mut addresses = words.filter_map(|word| {
        let v4 = || word.parse::<Ipv4Addr>().ok().map(IpAddr::from);
        // "::" and "1:2" of a time or a port are none.
        let v6 = || word.parse::<Ipv6Addr>().ok().filter(|ip| !ip.is_unspecified()).map(|ip| ip.to_canonical());
        v4().or_else(v6)
    });
    addresses.find(|ip| Some(*ip) != server)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn attempt(port: u16) -> Attempt {
        Attempt {
            address: Some([127, 0, 0, 1].into()),
            port: Some(port),
            patience: 500,
            path: Some("/ip".into()),
            ..Attempt::default()
        }
    }

    /// A server that does one thing with one connection.
    fn server(act: impl FnOnce(TcpStream) + Send + 'static) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || act(listener.accept().unwrap().0));
        port
    }

    fn read_some(stream: &mut TcpStream) {
        let mut some = [0; 4096];
        assert!(stream.read(&mut some).unwrap() > 0);
    }

    #[test]
    fn what_a_server_says_is_told() {
        let port = server(|mut s| {
            read_some(&mut s);
            s.write_all(b"HTTP/1.0 200 OK\r\n\r\n{\"source\": \"192.0.2.7\"}\n").unwrap();
        });
        let seen = attempt(port).run();
        assert_eq!((seen.failed, seen.connected), (None, Some([127, 0, 0, 1].into())));
        assert_eq!(seen.body.and_then(|b| first_address(&b, None)), Some([192, 0, 2, 7].into()));
    }

    #[test]
    fn cuts_silence_and_alerts_are_told_apart() {
        let tls = |port| Attempt { sni: Some("example.com".into()), ..attempt(port) }.run().failed;
        let silent = server(|s| {
            std::thread::sleep(Duration::from_secs(1));
            drop(s);
        });
        assert_eq!(tls(silent), Some((Step::Hello, Why::Silent)));
        let cut = server(|mut s| read_some(&mut s));
        assert_eq!(tls(cut), Some((Step::Hello, Why::Cut)));
        // Octets that nobody read make the end a reset.
        let reset = server(|s| drop(s.set_nodelay(true)));
        assert_eq!(tls(reset), Some((Step::Hello, Why::Cut)));
        // handshake_failure
        let alert = server(|mut s| {
            read_some(&mut s);
            s.write_all(&[21, 3, 3, 0, 2, 2, 40]).unwrap();
        });
        assert_eq!(tls(alert), Some((Step::Hello, Why::Answered)));
        let nobody = server(drop);
        assert!(attempt(nobody).run().failed.is_some());
    }

    #[test]
    fn an_address_is_found_in_any_text() {
        for (text, ip) in [
            ("203.0.113.10\n", Some("203.0.113.10")),
            ("{\"origin\": \"203.0.113.10, 10.0.0.1\"}", Some("203.0.113.10")),
            ("{\"time\":\"10:22:07\",\"source\":\"2001:db8::10\"}", Some("2001:db8::10")),
            ("{\"source\":\"::ffff:192.0.2.1\"}", Some("192.0.2.1")),
            ("{\"server\":\"198.51.100.10\",\"source\":\"192.0.2.1\"}", Some("192.0.2.1")),
            ("<html>none :: here</html>", None),
        ] {
            assert_eq!(first_address(text, Some([198, 51, 100, 10].into())), ip.map(|i| i.parse().unwrap()), "{text}");
        }
    }
}
