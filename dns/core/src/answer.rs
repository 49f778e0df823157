//! Answers of upstream resolvers: the query that Tidegate sends, the checks of
//! what comes back, and the form in which it is kept.

use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;
use thiserror::Error;

use crate::wire::{CLASS_IN, FLAG_QR, FLAG_TC, HEADER, MAX_UDP, be16, be32, rcode, read_name, rtype};

/// Longest CNAME chain that is followed inside an answer.
pub const MAX_CHAIN: usize = 8;
/// Most records of an answer that are looked at.
pub const MAX_RECORDS: usize = 1024;
/// Most octets of records that are kept for one answer.
const MAX_TAIL: usize = 60_000;
/// Longest that a negative is kept, in seconds; pods hear 5 s.
const MAX_NEGATIVE: u32 = 60;

/// Why an upstream answer is not used. Nothing is learnt from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AnswerError {
    /// The id, the question or its casing differs: perhaps forged, so ask again over TCP.
    #[error("the answer is not to this question")]
    Mismatch,
    /// Truncated: ask again over TCP.
    #[error("the answer is truncated")]
    Truncated,
    /// A response code other than NOERROR and NXDOMAIN.
    #[error("the resolver answered with code {0}")]
    Code(u8),
    /// It cannot be parsed.
    #[error("the answer cannot be parsed")]
    Malformed,
    /// A record whose owner the question does not lead to.
    #[error("the answer has a record of a name that was not asked")]
    ForeignOwner,
    /// More than [`MAX_CHAIN`] aliases, a loop, or two aliases of one name.
    #[error("the chain of aliases is too long or not a chain")]
    Chain,
    /// More records or octets than are kept.
    #[error("the answer is too large")]
    TooLarge,
}

/// Builds an upstream query (RFC 1035, section 4.1): RD set, CD clear, no client options.
/// `key` is a [`crate::wire::Query::key`]. `case` gives a random bit per octet of
/// the name (0x20); `edns` adds an OPT of 1232 octets.
pub fn upstream_query(key: &[u8], id: u16, case: &[u8; 32], edns: bool) -> Vec<u8> {
    let (qtype, name) = key.split_at(2.min(key.len()));
    let mut out = Vec::with_capacity(HEADER + key.len() + 2 + 11);
    out.extend_from_slice(&id.to_be_bytes());
    out.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, u8::from(edns)]);
    for (i, &b) in name.iter().enumerate() {
        let upper = case[i / 8 % 32] >> (i % 8) & 1 == 1;
        out.push(if upper { b.to_ascii_uppercase() } else { b });
    }
    out.extend_from_slice(qtype);
    out.extend_from_slice(&CLASS_IN.to_be_bytes());
    if edns {
        out.push(0);
        out.extend_from_slice(&rtype::OPT.to_be_bytes());
        out.extend_from_slice(&(MAX_UDP as u16).to_be_bytes());
        out.extend_from_slice(&[0; 6]);
    }
    out
}

/// A checked answer, unfiltered, in the form in which it is kept: one of those in the entry of its name.
///
/// ```text
/// entry     length of the name (1 octet), name on the wire in lower case, answers
/// answer    length of the records (2), type (2), end on the caller's millisecond clock (6), code and aliases (1), number (2), records
/// records   aliases in the order of the chain, then the RRset; of each the length of its RDATA (2) and the RDATA
/// ```
///
/// Names and overhead are most of what is kept, so all types of a name share one allocation. In a reply owners are
/// pointers to the question or to the alias before, so that any record of the RRset can be left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    entry: Arc<[u8]>,
    head: Head,
    /// Its records in the entry.
    records: Range<usize>,
}

/// What an answer's records are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    qtype: u16,
    expires: u64,
    rcode: u8,
    chain: u8,
    records: u16,
}

impl Head {
    const SIZE: usize = 11;

    fn read(bytes: &[u8]) -> Option<Self> {
        let &[t0, t1, e0, e1, e2, e3, e4, e5, marks, n0, n1] = bytes.first_chunk()?;
        Some(Self {
            qtype: u16::from_be_bytes([t0, t1]),
            expires: u64::from_be_bytes([0, 0, e0, e1, e2, e3, e4, e5]),
            rcode: marks >> 4,
            chain: marks & 0xf,
            records: u16::from_be_bytes([n0, n1]),
        })
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.qtype.to_be_bytes());
        // Milliseconds of nine thousand years.
        out.extend_from_slice(&self.expires.to_be_bytes()[2..]);
        out.push(self.rcode << 4 | self.chain);
        out.extend_from_slice(&self.records.to_be_bytes());
    }

    fn lives(&self, now: u64) -> bool {
        self.expires > now
    }
}

/// The name of an entry, on the wire.
pub(crate) fn name_of(entry: &[u8]) -> &[u8] {
    let Some((len, rest)) = entry.split_first() else { return &[] };
    rest.get(..usize::from(*len)).unwrap_or_default()
}

/// The answers of an entry: what they are of and where their records are.
fn answers(entry: &[u8]) -> impl Iterator<Item = (Head, Range<usize>)> {
    let mut at = 1 + name_of(entry).len();
    std::iter::from_fn(move || {
        let len = usize::from(be16(entry, at)?);
        let head = Head::read(entry.get(at + 2..)?)?;
        let start = at + 2 + Head::SIZE;
        at = start + len;
        Some((head, start..at))
    })
}

/// How many answers an entry has.
pub(crate) fn count(entry: &[u8]) -> usize {
    answers(entry).count()
}

/// Whether some answer of an entry has not expired at `now`.
pub(crate) fn lives(entry: &[u8], now: u64) -> bool {
    answers(entry).any(|(h, _)| h.lives(now))
}

/// One record of a [`Stored`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stanza<'a> {
    /// Owner, type and class: the octets before the TTL.
    pub head: [u8; 6],
    pub rdata: &'a [u8],
}

impl Stored {
    /// The answer of a type in an entry.
    pub(crate) fn find(entry: &Arc<[u8]>, qtype: u16) -> Option<Self> {
        let (head, records) = answers(entry).find(|(h, _)| h.qtype == qtype)?;
        Some(Self { entry: Arc::clone(entry), head, records })
    }

    /// An entry with this answer, and beside it those of other types in `others`; without what has expired at
    /// `now`. At most `most` answers and `octets`, this one before others; `None` if nothing is left.
    pub(crate) fn beside(&self, others: Option<&[u8]>, now: u64, most: usize, octets: usize) -> Option<Arc<[u8]>> {
        let own = (self.head, &self.entry[self.records.clone()]);
        let others = others.unwrap_or_default();
        let others = answers(others).filter(|(h, _)| h.qtype != self.head.qtype).map(|(h, r)| (h, &others[r]));
        let mut out = Vec::with_capacity(self.entry.len());
        out.push(self.name().len() as u8);
        out.extend_from_slice(self.name());
        let mut n = 0;
        for (head, records) in std::iter::once(own).chain(others) {
            if n < most && head.lives(now) && out.len() + 2 + Head::SIZE + records.len() <= octets {
                out.extend_from_slice(&(records.len() as u16).to_be_bytes());
                head.write(&mut out);
                out.extend_from_slice(records);
                n += 1;
            }
        }
        (n > 0).then(|| out.into())
    }

    /// The name that was asked, on the wire in lower case.
    pub fn name(&self) -> &[u8] {
        name_of(&self.entry)
    }

    /// The type that was asked.
    pub fn qtype(&self) -> u16 {
        self.head.qtype
    }

    /// NOERROR or NXDOMAIN.
    pub fn rcode(&self) -> u8 {
        self.head.rcode
    }

    /// How many aliases come before the RRset.
    pub fn chain_len(&self) -> usize {
        usize::from(self.head.chain)
    }

    /// How many records the RRset has; 0 for a negative.
    pub fn len(&self) -> usize {
        usize::from(self.head.records)
    }

    /// Whether it is a negative.
    pub fn is_empty(&self) -> bool {
        self.head.records == 0
    }

    /// What is left of its TTL at `now`, to the nearest second; `None` once it has expired.
    pub fn ttl(&self, now: u64) -> Option<u32> {
        let left = self.head.expires.checked_sub(now).filter(|l| *l > 0)?;
        Some(u32::try_from((left + 500) / 1000).unwrap_or(u32::MAX))
    }

    /// As [`Stored::ttl`], and 0 once it has expired: for the query that fetched it.
    pub fn ttl_or_zero(&self, now: u64) -> u32 {
        self.ttl(now).unwrap_or(0)
    }

    /// All records, the chain first.
    pub(crate) fn stanzas(&self) -> impl Iterator<Item = Stanza<'_>> {
        let mut rest = &self.entry[self.records.clone()];
        let mut owner = [0xc0, HEADER as u8];
        let mut aliases = self.chain_len();
        // Where the next RDATA is in a reply: behind header, question, and owner, type, class, TTL and length.
        let mut at = HEADER + self.name().len() + 4 + 12;
        std::iter::from_fn(move || {
            let len = usize::from(be16(rest, 0)?);
            let rdata = rest.get(2..2 + len)?;
            rest = &rest[2 + len..];
            let [t0, t1] = if aliases > 0 { rtype::CNAME } else { self.head.qtype }.to_be_bytes();
            let head = [owner[0], owner[1], t0, t1, 0, CLASS_IN as u8];
            if aliases > 0 {
                // At most MAX_CHAIN names of 255 octets: below the 16,384 that a pointer reaches.
                owner = (0xc000 | at as u16).to_be_bytes();
                aliases -= 1;
            }
            at += len + 12;
            Some(Stanza { head, rdata })
        })
    }

    /// Targets of the chain, on the wire.
    pub(crate) fn targets(&self) -> impl Iterator<Item = &[u8]> {
        self.stanzas().take(self.chain_len()).map(|s| s.rdata)
    }

    /// The RRset.
    pub(crate) fn rrset(&self) -> impl Iterator<Item = Stanza<'_>> {
        self.stanzas().skip(self.chain_len())
    }
}

struct Record {
    owner: SmallVec<[u8; 256]>,
    rtype: u16,
    ttl: u32,
    rdata: (usize, usize),
}

/// Reads a record header at `at`; returns it with where the next one starts.
fn record(m: &[u8], at: usize) -> Option<(Record, u16, usize)> {
    let mut owner = SmallVec::new();
    let end = read_name(m, at, &mut owner)?;
    let (rtype, class, ttl, len) = (be16(m, end)?, be16(m, end + 2)?, be32(m, end + 4)?, be16(m, end + 8)?);
    let (start, stop) = (end + 10, end + 10 + usize::from(len));
    if stop > m.len() {
        return None;
    }
    // RFC 2181, section 8: a TTL with the top bit set is zero.
    let ttl = if ttl > i32::MAX as u32 { 0 } else { ttl };
    Some((Record { owner, rtype, ttl, rdata: (start, stop) }, class, stop))
}

/// DNSSEC and its kin, and DNAMEs whose synthesised aliases are there too: left out, whoever owns them.
fn is_left_out(t: u16) -> bool {
    matches!(
        t,
        rtype::RRSIG | rtype::NSEC | rtype::NSEC3 | rtype::SIG | rtype::KEY | rtype::NXT | rtype::DNAME | rtype::OPT
    )
}

/// Appends RDATA without compression: octets, names and octets by type (RFC 3597, section 4).
fn copy_rdata(m: &[u8], r: &Record, out: &mut Vec<u8>) -> Option<()> {
    let (start, stop) = r.rdata;
    let (mut at, names, tail) = match r.rtype {
        rtype::A if stop - start != 4 => return None,
        rtype::AAAA if stop - start != 16 => return None,
        rtype::NS | rtype::CNAME | rtype::PTR => (start, 1, 0),
        rtype::MX | rtype::AFSDB => (start + 2, 1, 0),
        rtype::SRV => (start + 6, 1, 0),
        rtype::RP => (start, 2, 0),
        rtype::SOA => (start, 2, 20),
        rtype::NAPTR => {
            let mut at = start + 4;
            for _ in 0..3 {
                at += 1 + usize::from(*m.get(at)?);
            }
            (at, 1, 0)
        }
        // Targets of SVCB are not compressed (RFC 9460, section 2.2); `svcb` checks them.
        _ => {
            out.extend_from_slice(&m[start..stop]);
            return Some(());
        }
    };
    out.extend_from_slice(m.get(start..at)?);
    let mut name = SmallVec::new();
    for _ in 0..names {
        at = read_name(m.get(..stop)?, at, &mut name)?;
        out.extend_from_slice(&name);
    }
    if at + tail != stop {
        return None;
    }
    out.extend_from_slice(m.get(at..stop)?);
    Some(())
}

/// Checks an answer against the query that was sent and brings it into the form
/// that is kept. `exact_case` asks for the casing that was sent (over UDP).
/// `now` is in milliseconds; `ttl_max` in seconds bounds how long it is kept.
pub fn check(sent: &[u8], m: &[u8], exact_case: bool, now: u64, ttl_max: u32) -> Result<Stored, AnswerError> {
    use AnswerError::{Chain, Code, ForeignOwner, Malformed, Mismatch, TooLarge, Truncated};
    let flags = be16(m, 2).ok_or(Mismatch)?;
    if m.len() < HEADER || m.get(..2) != sent.get(..2) || flags & FLAG_QR == 0 || flags & 0x7800 != 0 {
        return Err(Mismatch);
    }
    let code = (flags & 0xf) as u8;
    let mut qname = SmallVec::new();
    let name_end = read_name(sent, HEADER, &mut qname).ok_or(Malformed)?;
    let qtype = be16(sent, name_end).ok_or(Malformed)?;
    let end = name_end + 4;
    if be16(m, 4) != Some(1) {
        // A server that cannot parse EDNS may answer with the header alone.
        return Err(if be16(m, 4) == Some(0) && code != 0 { Code(code) } else { Mismatch });
    }
    let (ours, theirs) = (sent.get(HEADER..end).ok_or(Malformed)?, m.get(HEADER..end).ok_or(Mismatch)?);
    let same = if exact_case { ours == theirs } else { ours.eq_ignore_ascii_case(theirs) };
    if !same {
        return Err(Mismatch);
    }
    if flags & FLAG_TC != 0 {
        return Err(Truncated);
    }
    if !matches!(code, rcode::NOERROR | rcode::NXDOMAIN) {
        return Err(Code(code));
    }

    let count = |at| be16(m, at).map_or(0, usize::from);
    let (answers, authorities, additionals) = (count(6), count(8), count(10));
    if answers > MAX_RECORDS {
        return Err(TooLarge);
    }
    let mut at = end;
    let mut records = Vec::with_capacity(answers);
    for _ in 0..answers {
        let (r, class, next) = record(m, at).ok_or(Malformed)?;
        at = next;
        if is_left_out(r.rtype) && r.rtype != qtype {
            continue;
        }
        if class != CLASS_IN {
            return Err(Malformed);
        }
        records.push(r);
    }
    let mut negative_ttl = None;
    for i in 0..authorities + additionals {
        let (r, _, next) = record(m, at).ok_or(Malformed)?;
        at = next;
        if i < authorities && r.rtype == rtype::SOA && r.rdata.1 - r.rdata.0 >= 20 {
            // RFC 2308, section 5: the lesser of the SOA's TTL and its minimum.
            let minimum = be32(m, r.rdata.1 - 4).ok_or(Malformed)?;
            negative_ttl = Some(r.ttl.min(minimum));
        }
        if i >= authorities && r.rtype == rtype::OPT && m[r.rdata.0 - 6] != 0 {
            return Err(Code(rcode::BADVERS));
        }
    }

    let mut kept = Kept::new(qtype, &qname);
    let mut owner = qname.clone();
    let mut reached = vec![qname];
    while qtype != rtype::CNAME && !records.iter().any(|r| r.rtype == qtype && r.owner == owner) {
        let mut target: Option<SmallVec<[u8; 256]>> = None;
        let mut ttl = u32::MAX;
        for r in records.iter().filter(|r| r.rtype == rtype::CNAME && r.owner == owner) {
            let mut name = SmallVec::new();
            if read_name(&m[..r.rdata.1], r.rdata.0, &mut name) != Some(r.rdata.1) {
                return Err(Malformed);
            }
            if target.as_ref().is_some_and(|t| *t != name) {
                return Err(Chain);
            }
            ttl = ttl.min(r.ttl);
            target = Some(name);
        }
        let Some(target) = target else { break };
        if reached.len() > MAX_CHAIN || reached.contains(&target) {
            return Err(Chain);
        }
        kept.alias(&target, ttl);
        reached.push(target.clone());
        owner = target;
    }
    if records.iter().any(|r| !reached.contains(&r.owner)) {
        return Err(ForeignOwner);
    }
    for r in records.iter().filter(|r| r.rtype == qtype && r.owner == owner) {
        kept.record(m, r).ok_or(Malformed)?;
    }
    kept.finish(code, now, negative_ttl.unwrap_or(0).min(MAX_NEGATIVE), ttl_max).ok_or(TooLarge)
}

/// A [`Stored`] in the making.
struct Kept {
    /// The entry: name, room for the head, records.
    data: Vec<u8>,
    /// Where the records begin.
    start: usize,
    qtype: u16,
    ttl: u32,
    chain: u8,
    records: u16,
}

impl Kept {
    fn new(qtype: u16, qname: &[u8]) -> Self {
        let mut data = Vec::with_capacity(128);
        // At most MAX_WIRE_NAME.
        data.push(qname.len() as u8);
        data.extend_from_slice(qname);
        data.extend_from_slice(&[0; 2 + Head::SIZE]);
        let start = data.len();
        Self { data, start, qtype, ttl: u32::MAX, chain: 0, records: 0 }
    }

    fn alias(&mut self, target: &[u8], ttl: u32) {
        self.data.extend_from_slice(&(target.len() as u16).to_be_bytes());
        self.data.extend_from_slice(target);
        self.ttl = self.ttl.min(ttl);
        self.chain += 1;
    }

    fn record(&mut self, m: &[u8], r: &Record) -> Option<()> {
        let at = self.data.len();
        self.data.extend_from_slice(&[0, 0]);
        copy_rdata(m, r, &mut self.data)?;
        let len = u16::try_from(self.data.len() - at - 2).ok()?;
        self.data[at..at + 2].copy_from_slice(&len.to_be_bytes());
        self.ttl = self.ttl.min(r.ttl);
        self.records += 1;
        Some(())
    }

    fn finish(mut self, rcode: u8, now: u64, negative_ttl: u32, ttl_max: u32) -> Option<Stored> {
        let len = self.data.len() - self.start;
        // In a reply each record has ten octets more: owner, type, class and TTL.
        if len > MAX_TAIL - 10 * (usize::from(self.records) + usize::from(self.chain)) {
            return None;
        }
        // NXDOMAIN with records contradicts itself: the records are what was asked for.
        let (rcode, ttl) =
            if self.records == 0 { (rcode, self.ttl.min(negative_ttl)) } else { (rcode::NOERROR, self.ttl) };
        let expires = now + 1000 * u64::from(ttl.min(ttl_max));
        let head = Head { qtype: self.qtype, expires, rcode, chain: self.chain, records: self.records };
        let mut front = Vec::with_capacity(2 + Head::SIZE);
        front.extend_from_slice(&(len as u16).to_be_bytes());
        head.write(&mut front);
        self.data[self.start - front.len()..self.start].copy_from_slice(&front);
        let records = self.start..self.data.len();
        Some(Stored { entry: self.data.into(), head, records })
    }
}
