//! The form of records. Every text goes through the JSON writer, and names come escaped
//! already, so that nothing from the wire can end a line or forge a field.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use jiff::Timestamp;
use serde::{Serialize, Serializer};
use tidegate_policy::Carry;
use tidegate_policy::event::{Event, Verdict, What};

use super::{Config, KINDS};

/// The schema that every record names.
pub(super) const SCHEMA: &str = "tidegate.audit/v1";

/// Where the log of an earlier run ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Previous {
    pub boot: String,
    pub sequence: u64,
}

/// A record about the log itself.
#[derive(Clone, Debug)]
pub(super) enum Control {
    Start { version: &'static str, previous: Option<Previous> },
    Lost,
    Stop,
}

/// Times with milliseconds in UTC.
struct Millis(Timestamp);

impl Serialize for Millis {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(&format_args!("{:.3}", self.0))
    }
}

#[derive(Serialize)]
struct Endpoint {
    ip: IpAddr,
    /// Left out where the protocol has none.
    #[serde(skip_serializing_if = "is_zero")]
    port: u16,
}

fn is_zero(port: &u16) -> bool {
    *port == 0
}

impl From<SocketAddr> for Endpoint {
    fn from(a: SocketAddr) -> Self {
        Self { ip: a.ip(), port: a.port() }
    }
}

#[derive(Serialize)]
struct Destination {
    asked: Endpoint,
    #[serde(skip_serializing_if = "Option::is_none")]
    actual: Option<Endpoint>,
}

#[derive(Serialize)]
struct Dns<'a> {
    qtype: Code,
    rcode: Code,
    answers: &'a [IpAddr],
    cached: bool,
    server: Endpoint,
}

#[derive(Serialize)]
struct Policy<'a> {
    kind: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    namespace: &'a str,
    name: &'a str,
    rule: &'a str,
}

#[derive(Serialize)]
struct Bytes {
    sent: u64,
    received: u64,
}

#[derive(Serialize, Default)]
struct Losses {
    #[serde(skip_serializing_if = "zero")]
    dns: u64,
    #[serde(skip_serializing_if = "zero")]
    open: u64,
    #[serde(skip_serializing_if = "zero")]
    close: u64,
    #[serde(skip_serializing_if = "zero")]
    packet: u64,
}

fn zero(n: &u64) -> bool {
    *n == 0
}

#[derive(Serialize)]
struct Record<'a> {
    schema: &'static str,
    time: Millis,
    boot: &'a str,
    sequence: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    gateway: Option<&'a str>,
    node: &'a str,
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    previous: Option<&'a Previous>,
    #[serde(skip_serializing_if = "Option::is_none")]
    verdict: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mode: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    count: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pod: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hook: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    protocol: Option<Code>,
    #[serde(skip_serializing_if = "Option::is_none")]
    carry: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<Endpoint>,
    #[serde(skip_serializing_if = "Option::is_none")]
    destination: Option<Destination>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sni: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dns: Option<Dns<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    policy: Option<Policy<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    egress: Option<Endpoint>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<Bytes>,
    /// Seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    duration: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lost: Option<Losses>,
}

impl<'a> Record<'a> {
    fn new(config: &'a Config, sequence: u64, time: Timestamp, kind: &'static str, lost: &[u64; 4]) -> Self {
        let [dns, open, close, packet] = *lost;
        Self {
            schema: SCHEMA,
            time: Millis(time),
            boot: &config.boot,
            sequence,
            gateway: config.gateway.as_deref(),
            node: &config.node,
            kind,
            version: None,
            previous: None,
            verdict: None,
            mode: None,
            reason: None,
            count: None,
            namespace: None,
            pod: None,
            hook: None,
            protocol: None,
            carry: None,
            source: None,
            destination: None,
            name: None,
            sni: None,
            dns: None,
            policy: None,
            egress: None,
            bytes: None,
            duration: None,
            lost: lost.iter().any(|n| *n > 0).then_some(Losses { dns, open, close, packet }),
        }
    }

    fn line(&self, out: &mut Vec<u8>) {
        // Maps with string keys and finite numbers serialise, and a Vec takes every octet.
        let _ = serde_json::to_writer(&mut *out, self);
        out.push(b'\n');
    }
}

/// Appends the record of an event, with its newline.
pub(super) fn event(
    out: &mut Vec<u8>,
    config: &Config,
    sequence: u64,
    time: Timestamp,
    event: &Event,
    lost: &[u64; 4],
) {
    let mut r = Record::new(config, sequence, time, KINDS[super::kind(&event.what)], lost);
    r.verdict = Some(event.verdict.as_str());
    r.mode = match event.verdict {
        Verdict::Allow => None,
        Verdict::Deny => Some("enforce"),
        Verdict::Audit => Some("audit"),
    };
    r.reason = Some(event.reason.as_str());
    r.count = Some(event.count);
    if let Some(who) = &event.who {
        r.namespace = Some(&who.namespace);
        r.pod = Some(&who.pod);
        r.node = &who.node;
    }
    r.policy =
        event.rule.as_ref().map(|p| Policy { kind: p.kind, namespace: &p.namespace, name: &p.policy, rule: &p.rule });
    match &event.what {
        What::Dns { name, qtype, rcode, answers, cached, server } => {
            r.name = Some(name);
            r.dns = Some(Dns {
                qtype: Code { prefix: "TYPE", known: qtype_name(*qtype), number: *qtype },
                rcode: Code { prefix: "RCODE", known: rcode_name(*rcode), number: (*rcode).into() },
                answers,
                cached: *cached,
                server: (*server).into(),
            });
        }
        What::Open { client, asked, actual, egress, sni, carry } => {
            r.protocol = Some(protocol(6));
            r.carry = Some(match carry {
                Carry::Forward => "forward",
                Carry::Tls => "tls",
                Carry::Block => "block",
            });
            r.source = Some((*client).into());
            r.destination = Some(Destination { asked: (*asked).into(), actual: actual.map(Into::into) });
            r.sni = sni.as_deref();
            r.egress = egress.map(Into::into);
        }
        What::Close { client, asked, actual, sni, sent, received, millis } => {
            r.protocol = Some(protocol(6));
            r.source = Some((*client).into());
            r.destination = Some(Destination { asked: (*asked).into(), actual: actual.map(Into::into) });
            r.sni = sni.as_deref();
            r.bytes = Some(Bytes { sent: *sent, received: *received });
            // Exact up to 285 000 years.
            r.duration = Some(*millis as f64 / 1000.0);
        }
        What::Packet { hook, protocol: number, source, destination } => {
            r.hook = Some(hook);
            r.protocol = Some(protocol(*number));
            r.source = Some((*source).into());
            r.destination = Some(Destination { asked: (*destination).into(), actual: None });
        }
    }
    r.line(out);
}

/// Appends a record about the log itself, with its newline.
pub(super) fn control(
    out: &mut Vec<u8>,
    config: &Config,
    sequence: u64,
    time: Timestamp,
    control: &Control,
    lost: &[u64; 4],
) {
    let kind = match control {
        Control::Start { .. } => "start",
        Control::Lost => "lost",
        Control::Stop => "stop",
    };
    let mut r = Record::new(config, sequence, time, kind, lost);
    if let Control::Start { version, previous } = control {
        r.version = Some(version);
        r.previous = previous.as_ref();
    }
    r.line(out);
}

/// A registered number by its mnemonic, else by its generic form.
struct Code {
    prefix: &'static str,
    known: Option<&'static str>,
    number: u16,
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.known {
            Some(name) => f.write_str(name),
            None => write!(f, "{}{}", self.prefix, self.number),
        }
    }
}

impl Serialize for Code {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self.known {
            Some(name) => s.serialize_str(name),
            None => s.collect_str(self),
        }
    }
}

fn protocol(number: u8) -> Code {
    let known = match number {
        1 => Some("ICMP"),
        6 => Some("TCP"),
        17 => Some("UDP"),
        58 => Some("ICMPv6"),
        132 => Some("SCTP"),
        _ => None,
    };
    Code { prefix: "IP", known, number: number.into() }
}

/// RFC 1035, section 3.2.2, and the IANA registry; others in the form of RFC 3597.
const fn qtype_name(qtype: u16) -> Option<&'static str> {
    Some(match qtype {
        1 => "A",
        2 => "NS",
        5 => "CNAME",
        6 => "SOA",
        12 => "PTR",
        13 => "HINFO",
        15 => "MX",
        16 => "TXT",
        28 => "AAAA",
        33 => "SRV",
        35 => "NAPTR",
        43 => "DS",
        48 => "DNSKEY",
        52 => "TLSA",
        64 => "SVCB",
        65 => "HTTPS",
        251 => "IXFR",
        252 => "AXFR",
        255 => "ANY",
        257 => "CAA",
        _ => return None,
    })
}

/// RFC 1035, section 4.1.1.
const fn rcode_name(rcode: u8) -> Option<&'static str> {
    Some(match rcode {
        0 => "NOERROR",
        1 => "FORMERR",
        2 => "SERVFAIL",
        3 => "NXDOMAIN",
        4 => "NOTIMP",
        5 => "REFUSED",
        _ => return None,
    })
}
