//! Queries as they come from pods: a bounded parse in place of header, question
//! and OPT record. Everything else in a query is refused or ignored.

use smallvec::SmallVec;

/// Octets of a DNS header (RFC 1035, section 4.1.1).
pub const HEADER: usize = 12;
/// Longest name on the wire with its root label (RFC 1035, section 2.3.4).
pub const MAX_WIRE_NAME: usize = 255;
/// Largest UDP reply, in octets: fits an IPv6 packet of 1280 octets.
pub const MAX_UDP: usize = 1232;
/// Largest UDP reply to a client without EDNS (RFC 1035, section 2.3.4).
pub const PLAIN_UDP: usize = 512;
/// Class IN.
pub const CLASS_IN: u16 = 1;

/// Record and query types that are treated specially (IANA DNS parameters).
pub mod rtype {
    /// IPv4 address.
    pub const A: u16 = 1;
    /// Name server.
    pub const NS: u16 = 2;
    /// Alias.
    pub const CNAME: u16 = 5;
    /// Start of authority.
    pub const SOA: u16 = 6;
    /// Reverse name.
    pub const PTR: u16 = 12;
    /// Mail exchanger.
    pub const MX: u16 = 15;
    /// Text.
    pub const TXT: u16 = 16;
    /// Responsible person (RFC 1183).
    pub const RP: u16 = 17;
    /// AFS database (RFC 1183).
    pub const AFSDB: u16 = 18;
    /// Signature (RFC 2535).
    pub const SIG: u16 = 24;
    /// Key (RFC 2535).
    pub const KEY: u16 = 25;
    /// IPv6 address.
    pub const AAAA: u16 = 28;
    /// Denial of existence (RFC 2535).
    pub const NXT: u16 = 30;
    /// Service location (RFC 2782).
    pub const SRV: u16 = 33;
    /// Naming authority pointer (RFC 3403).
    pub const NAPTR: u16 = 35;
    /// Subtree alias (RFC 6672).
    pub const DNAME: u16 = 39;
    /// EDNS (RFC 6891).
    pub const OPT: u16 = 41;
    /// DNSSEC signature.
    pub const RRSIG: u16 = 46;
    /// DNSSEC denial.
    pub const NSEC: u16 = 47;
    /// DNSSEC denial.
    pub const NSEC3: u16 = 50;
    /// Service binding (RFC 9460).
    pub const SVCB: u16 = 64;
    /// Service binding of HTTPS (RFC 9460).
    pub const HTTPS: u16 = 65;
}

/// Response codes (RFC 1035, section 4.1.1; RFC 6891, section 9).
pub mod rcode {
    /// No error.
    pub const NOERROR: u8 = 0;
    /// The query cannot be parsed.
    pub const FORMERR: u8 = 1;
    /// The resolver failed.
    pub const SERVFAIL: u8 = 2;
    /// The name does not exist.
    pub const NXDOMAIN: u8 = 3;
    /// The kind of query is not implemented.
    pub const NOTIMP: u8 = 4;
    /// Refused by policy.
    pub const REFUSED: u8 = 5;
    /// Unknown EDNS version, an extended code.
    pub const BADVERS: u8 = 16;
}

pub(crate) const FLAG_QR: u16 = 0x8000;
pub(crate) const FLAG_TC: u16 = 0x0200;
pub(crate) const FLAG_RD: u16 = 0x0100;
pub(crate) const FLAG_RA: u16 = 0x0080;
pub(crate) const FLAG_CD: u16 = 0x0010;
const OPCODE: u16 = 0x7800;

/// Canonical text of a name. Valid names never leave the stack.
pub type Text = SmallVec<[u8; 256]>;
/// What an answer is stored under: the type, then the name on the wire in lower case.
pub type Key = SmallVec<[u8; 260]>;

/// What a query's OPT record says (RFC 6891).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edns {
    /// The largest UDP reply that the client takes, in octets, as it said.
    pub udp_size: u16,
}

/// A query with one question.
#[derive(Clone, Debug)]
pub struct Query<'a> {
    /// The id to echo.
    pub id: u16,
    pub(crate) flags: u16,
    /// The question section as it came: name, type, class; echoed with its casing.
    pub(crate) question: &'a [u8],
    /// The query type.
    pub qtype: u16,
    /// The OPT record, if there was one.
    pub edns: Option<Edns>,
    text: Text,
    key: Key,
}

impl<'a> Query<'a> {
    /// The name: canonical text; octets that no [`tidegate_policy::Name`] has are `\DDD`; `.` is the root.
    pub fn name(&self) -> &str {
        // ASCII by construction.
        std::str::from_utf8(&self.text).unwrap_or(".")
    }

    /// The key of the answer store.
    pub fn key(&self) -> &[u8] {
        &self.key
    }

    /// The name on the wire in lower case.
    pub fn wire_name(&self) -> &[u8] {
        &self.key[2..]
    }

    /// The question section as it came.
    pub fn question(&self) -> &'a [u8] {
        self.question
    }

    /// The largest reply over UDP, in octets.
    pub fn udp_limit(&self) -> usize {
        self.edns.map_or(PLAIN_UDP, |e| usize::from(e.udp_size).clamp(PLAIN_UDP, MAX_UDP))
    }
}

/// What came of a datagram.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "a box would allocate for each query")]
pub enum Parsed<'a> {
    /// A query.
    Query(Query<'a>),
    /// Something that is answered with this response code and nothing else ([`crate::reply::error`]).
    Refuse {
        /// The code.
        rcode: u8,
        /// Whether the query had an OPT record.
        edns: bool,
        /// The octets of the question to echo, if it could be parsed.
        question: &'a [u8],
    },
    /// Not a query: too short, or a response. Answering would make loops.
    Drop,
}

/// Reads a big-endian 16-bit number.
pub(crate) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Reads a big-endian 32-bit number.
pub(crate) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Whether an octet of a label stands in the canonical text as it is.
static PLAIN: [bool; 256] = {
    let mut plain = [false; 256];
    let mut b = 0;
    while b < 256 {
        plain[b] = matches!(b as u8, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_');
        b += 1;
    }
    plain
};

/// [`text_of`] a whole name in lower case without odd octets, as nearly all are: copied at once.
fn plain_text(wire: &[u8]) -> Option<Text> {
    let (&[first], labels, &[0]) = (wire.first_chunk()?, wire.get(1..wire.len() - 1)?, wire.last_chunk()?) else {
        return None;
    };
    let mut text = Text::from_slice(labels);
    let mut at = 0;
    let mut len = usize::from(first);
    loop {
        let label = text.get(at..at + len).filter(|l| !l.is_empty())?;
        if !label.iter().all(|b| PLAIN[usize::from(*b)]) {
            return None;
        }
        at += len;
        match text.get_mut(at) {
            None => return Some(text),
            Some(b) => len = usize::from(std::mem::replace(b, b'.')),
        }
        at += 1;
    }
}

/// Appends a label to a canonical text. A dot or backslash inside a label is escaped, so that labels stay apart.
fn push_label(text: &mut Text, label: &[u8]) {
    if !text.is_empty() {
        text.push(b'.');
    }
    for &b in label {
        match b {
            b'A'..=b'Z' => text.push(b.to_ascii_lowercase()),
            _ if PLAIN[usize::from(b)] => text.push(b),
            _ => text.extend_from_slice(&[b'\\', b'0' + b / 100, b'0' + b / 10 % 10, b'0' + b % 10]),
        }
    }
}

/// The canonical text of an uncompressed name on the wire; stops at its end or at what is malformed.
pub(crate) fn text_of(wire: &[u8]) -> Text {
    if let Some(text) = plain_text(wire) {
        return text;
    }
    let mut text = Text::new();
    let mut rest = wire;
    while let Some((&len, tail)) = rest.split_first() {
        let len = usize::from(len);
        if len == 0 || len > 63 || len > tail.len() {
            break;
        }
        push_label(&mut text, &tail[..len]);
        rest = &tail[len..];
    }
    if text.is_empty() {
        text.push(b'.');
    }
    text
}

/// A name's text read back as `&str`.
pub(crate) fn as_str(text: &Text) -> &str {
    std::str::from_utf8(text).unwrap_or(".")
}

/// Reads a name without compression from `at`: its end, if it is valid.
fn plain_name_end(bytes: &[u8], at: usize) -> Option<usize> {
    let mut pos = at;
    loop {
        let len = usize::from(*bytes.get(pos)?);
        if len > 63 {
            return None;
        }
        pos += 1 + len;
        if pos - at > MAX_WIRE_NAME || pos > bytes.len() {
            return None;
        }
        if len == 0 {
            return Some(pos);
        }
    }
}

/// Reads a possibly compressed name from `at` into `out`, uncompressed and in
/// lower case. Returns where the name ends in the message. Pointers must go
/// backwards, so that the walk ends.
pub(crate) fn read_name(bytes: &[u8], at: usize, out: &mut SmallVec<[u8; 256]>) -> Option<usize> {
    out.clear();
    let mut pos = at;
    let mut end = None;
    let mut floor = at;
    loop {
        let len = *bytes.get(pos)?;
        match len {
            0 => {
                out.push(0);
                return Some(end.unwrap_or(pos + 1));
            }
            1..=63 => {
                let label = bytes.get(pos + 1..pos + 1 + usize::from(len))?;
                // One octet is kept for the root label.
                if out.len() + 1 + label.len() + 1 > MAX_WIRE_NAME {
                    return None;
                }
                out.push(len);
                out.extend(label.iter().map(u8::to_ascii_lowercase));
                pos += 1 + label.len();
            }
            0xc0.. => {
                let target = usize::from(be16(bytes, pos)? & 0x3fff);
                if target >= floor {
                    return None;
                }
                end.get_or_insert(pos + 2);
                floor = target;
                pos = target;
            }
            _ => return None,
        }
    }
}

/// Parses a query.
pub fn parse(bytes: &[u8]) -> Parsed<'_> {
    let (Some(id), Some(flags)) = (be16(bytes, 0), be16(bytes, 2)) else {
        return Parsed::Drop;
    };
    if bytes.len() < HEADER || flags & FLAG_QR != 0 {
        return Parsed::Drop;
    }
    let refuse = |rcode, question| Parsed::Refuse { rcode, edns: false, question };
    if flags & OPCODE != 0 {
        return refuse(rcode::NOTIMP, &[]);
    }
    let counts = [be16(bytes, 4), be16(bytes, 6), be16(bytes, 8), be16(bytes, 10)];
    let [Some(1), Some(0), Some(0), Some(additional)] = counts else {
        return refuse(rcode::FORMERR, &[]);
    };
    let Some(name_end) = plain_name_end(bytes, HEADER) else {
        return refuse(rcode::FORMERR, &[]);
    };
    let (Some(qtype), Some(qclass)) = (be16(bytes, name_end), be16(bytes, name_end + 2)) else {
        return refuse(rcode::FORMERR, &[]);
    };
    let question = &bytes[HEADER..name_end + 4];
    let edns = match parse_opt(bytes, name_end + 4, additional) {
        Ok(edns) => edns,
        Err(rcode) => {
            return Parsed::Refuse { rcode, edns: rcode == rcode::BADVERS, question };
        }
    };
    if qclass != CLASS_IN {
        return Parsed::Refuse { rcode: rcode::REFUSED, edns: edns.is_some(), question };
    }
    let wire = &bytes[HEADER..name_end];
    let mut key = Key::new();
    key.extend_from_slice(&qtype.to_be_bytes());
    // Length octets are at most 63, so lower-casing leaves them alone.
    key.extend_from_slice(wire);
    key[2..].make_ascii_lowercase();
    Parsed::Query(Query { id, flags, question, qtype, edns, text: text_of(&key[2..]), key })
}

/// Reads the additional section: at most one OPT; other records (TSIG, SIG(0)) are stepped over.
fn parse_opt(bytes: &[u8], mut at: usize, count: u16) -> Result<Option<Edns>, u8> {
    let mut edns = None;
    // A query has an OPT and perhaps a signature: more is not a query that a resolver sends.
    if count > 4 {
        return Err(rcode::FORMERR);
    }
    for _ in 0..count {
        let root = bytes.get(at) == Some(&0);
        let end = plain_name_end(bytes, at).ok_or(rcode::FORMERR)?;
        let (Some(rtype), Some(class), Some(ttl), Some(len)) =
            (be16(bytes, end), be16(bytes, end + 2), be32(bytes, end + 4), be16(bytes, end + 8))
        else {
            return Err(rcode::FORMERR);
        };
        at = end + 10 + usize::from(len);
        if at > bytes.len() {
            return Err(rcode::FORMERR);
        }
        if rtype == rtype::OPT {
            if !root || edns.is_some() {
                return Err(rcode::FORMERR);
            }
            if (ttl >> 16) & 0xff != 0 {
                return Err(rcode::BADVERS);
            }
            edns = Some(Edns { udp_size: class });
        }
    }
    if at == bytes.len() { Ok(edns) } else { Err(rcode::FORMERR) }
}

/// Builds a question section (name, type, class IN) from canonical text; `None` if it is not a name.
/// The root is `.` or empty.
pub fn question(name: &str, qtype: u16) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(name.len() + 6);
    for label in name.trim_end_matches('.').split('.').filter(|_| name != "." && !name.is_empty()) {
        if label.is_empty() || label.len() > 63 {
            return None;
        }
        out.push(label.len() as u8);
        out.extend_from_slice(label.as_bytes());
    }
    out.push(0);
    if out.len() > MAX_WIRE_NAME {
        return None;
    }
    out.extend_from_slice(&qtype.to_be_bytes());
    out.extend_from_slice(&CLASS_IN.to_be_bytes());
    Some(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn query(name: &str, extra: &[u8], additional: u16) -> Vec<u8> {
        let mut m = vec![0x12, 0x34, 1, 0x20, 0, 1, 0, 0, 0, 0];
        m.extend(additional.to_be_bytes());
        m.extend(question(name, 1).unwrap());
        m.extend(extra);
        m
    }

    const OPT: [u8; 11] = [0, 0, 41, 0x10, 0, 0, 0, 0, 0, 0, 0];

    #[test]
    fn a_query_is_read() {
        let m = query("API.Example.com", &OPT, 1);
        let Parsed::Query(q) = parse(&m) else { panic!() };
        assert_eq!((q.id, q.qtype, q.name()), (0x1234, 1, "api.example.com"));
        assert_eq!(q.udp_limit(), MAX_UDP);
        assert_eq!(&q.question()[..4], b"\x03API");
        assert_eq!(&q.wire_name()[..4], b"\x03api");
        let plain = query("a", &[], 0);
        let Parsed::Query(q) = parse(&plain) else { panic!() };
        assert_eq!(q.udp_limit(), PLAIN_UDP);
    }

    #[test]
    fn the_root_and_odd_octets_have_a_text() {
        let m = query(".", &[], 0);
        assert!(matches!(parse(&m), Parsed::Query(q) if q.name() == "."));
        let mut m = query("abcd.x", &[], 0);
        m[HEADER + 1..HEADER + 5].copy_from_slice(b"a.\\\xff");
        let Parsed::Query(q) = parse(&m) else { panic!() };
        assert_eq!(q.name(), "a\\046\\092\\255.x");
    }

    #[test]
    fn a_text_ends_where_the_name_does() {
        for (wire, text) in [
            (&b"\x01a\x02bc\0"[..], "a.bc"),
            (b"\x01a\x02bc", "a.bc"),
            (b"\x01a\0\x02bc\0", "a"),
            (b"\x01a\x40bc\0", "a"),
            (b"\x01a\x05bc\0", "a"),
            (b"\x01A\x02b.\0", "a.b\\046"),
            (b"\0", "."),
            (b"\0\0", "."),
            (b"", "."),
        ] {
            assert_eq!(as_str(&text_of(wire)), text, "{wire:?}");
        }
    }

    #[test]
    fn what_is_no_query_is_refused() {
        let refused = |m: &[u8]| match parse(m) {
            Parsed::Refuse { rcode, .. } => Some(rcode),
            _ => None,
        };
        let good = query("a.example", &OPT, 1);
        let mut m = good.clone();
        m[2] |= 0x80;
        assert!(matches!(parse(&m), Parsed::Drop));
        assert!(matches!(parse(&good[..11]), Parsed::Drop));
        let mut m = good.clone();
        m[2] |= 0x28;
        assert_eq!(refused(&m), Some(rcode::NOTIMP));
        for at in [5, 7, 9] {
            let mut m = good.clone();
            m[at] = 2;
            assert_eq!(refused(&m), Some(rcode::FORMERR), "count at {at}");
        }
        let mut m = good.clone();
        m[HEADER] = 0xc0;
        assert_eq!(refused(&m), Some(rcode::FORMERR), "a pointer in the question");
        assert_eq!(refused(&query("a", &[OPT, OPT].concat(), 2)), Some(rcode::FORMERR));
        assert_eq!(refused(&query("a", &[1], 0)), Some(rcode::FORMERR), "bytes after the end");
        let mut opt = OPT;
        opt[6] = 1;
        assert_eq!(refused(&query("a", &opt, 1)), Some(rcode::BADVERS));
        let mut m = query("a", &[], 0);
        let last = m.len() - 1;
        m[last] = 3;
        assert_eq!(refused(&m), Some(rcode::REFUSED), "CHAOS");
    }

    #[test]
    fn compressed_names_end() {
        let mut out = SmallVec::new();
        // A pointer to itself, a forward pointer, and a pair that point at each other.
        assert_eq!(read_name(&[0xc0, 0], 0, &mut out), None);
        assert_eq!(read_name(&[0xc0, 2, 0], 0, &mut out), None);
        assert_eq!(read_name(&[0xc0, 2, 0xc0, 0], 2, &mut out), None);
        assert_eq!(read_name(&[1, b'A', 0, 1, b'b', 0xc0, 0], 3, &mut out), Some(7));
        assert_eq!(&out[..], b"\x01b\x01a\0");
        let long: Vec<u8> = [[1u8, b'x']; 128].concat();
        assert_eq!(read_name(&long, 0, &mut out), None);
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600), at in 0usize..600) {
            let _ = parse(&bytes);
            let mut out = SmallVec::new();
            let _ = read_name(&bytes, at, &mut out);
            prop_assert!(out.len() <= MAX_WIRE_NAME);
        }

        #[test]
        fn a_mangled_query_never_panics(at in 0usize..40, value in any::<u8>(), cut in 0usize..60) {
            let mut m = query("api.example.com", &OPT, 1);
            if let Some(b) = m.get_mut(at) { *b = value; }
            m.truncate(cut.max(at));
            let _ = parse(&m);
        }

        #[test]
        fn a_query_that_parses_has_a_bounded_text(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut m = vec![0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
            m.extend(bytes);
            if let Parsed::Query(q) = parse(&m) {
                prop_assert!(q.name().len() <= 4 * MAX_WIRE_NAME);
                prop_assert!(q.wire_name().len() <= MAX_WIRE_NAME);
            }
        }
    }
}
