//! What a datagram asks the cluster's DNS, as far as the kernel has to know: whether it is one question, and whose name.
//!
//! Names are compared by a keyed hash of their octets on the wire (RFC 1035, section 3.1), in lower case and with the
//! root's. Two names with the same octets have the same labels, so none are looked for: what cannot be read does not match.
//! The key is the node's own, so that nobody outside can find a second name with the hash of a first one.

use crate::layout::{NAME_WORDS, Naming, SUFFIX_WORDS};
use crate::packet::Bytes;

/// What a datagram asks.
pub mod asks {
    /// Nothing that is decided on the node.
    pub const OTHER: u32 = 0;
    /// The address or port of a Service that is known.
    pub const KNOWN: u32 = 1;
    /// A name of the cluster that is not known.
    pub const STRANGE: u32 = 2;
}

/// What is known of a name: values of `NAMES`.
pub mod named {
    /// A Service of the cluster, which the cluster's DNS answers by itself.
    pub const INSIDE: u32 = 1;
    /// A Service that leads outside: answered under policy.
    pub const OUTSIDE: u32 = 2;
}

/// Query types (RFC 1035, 2782, 3596, 9460) that pass: what a Service has, or clients ask beside it.
const TYPES: [u16; 4] = [1, 28, 33, 65];
/// Length of the headers of UDP and DNS.
const HEADERS: u32 = 8 + 12;

const ONES: u64 = 0x0101_0101_0101_0101;
const HIGHS: u64 = 0x8080_8080_8080_8080;

/// Eight octets in lower case (RFC 4343). Lengths of labels, at most 63, are no letters.
#[inline(always)]
const fn lower(w: u64) -> u64 {
    let low = w & !HIGHS;
    let from_a = low + ONES * (0x80 - b'A' as u64);
    let above_z = low + ONES * (0x7f - b'Z' as u64);
    w | ((from_a ^ above_z) & !w & HIGHS) >> 2
}

/// A word's octets up to the first that is zero, and how many that are with it; all of it and 0 if none is.
#[inline(always)]
const fn until_zero(w: u64) -> (u64, u32) {
    let zero = w.wrapping_sub(ONES) & !w & HIGHS;
    if zero == 0 {
        return (w, 0);
    }
    let first = zero & zero.wrapping_neg();
    let mut n = 1;
    let mut i = 0;
    while i < 7 {
        n += (first > 0x80 << (8 * i)) as u32;
        i += 1;
    }
    (w & (first | (first - 1)), n)
}

/// SipHash-2-4 (Aumasson and Bernstein, 2012) of whole words.
struct Sip {
    v: [u64; 4],
    words: u64,
}

impl Sip {
    #[inline(always)]
    const fn new(key: &[u64; 2]) -> Self {
        let v = [
            key[0] ^ 0x736f_6d65_7073_6575,
            key[1] ^ 0x646f_7261_6e64_6f6d,
            key[0] ^ 0x6c79_6765_6e65_7261,
            key[1] ^ 0x7465_6462_7974_6573,
        ];
        Self { v, words: 0 }
    }

    #[inline(always)]
    const fn round(&mut self) {
        let [mut a, mut b, mut c, mut d] = self.v;
        a = a.wrapping_add(b);
        b = b.rotate_left(13) ^ a;
        a = a.rotate_left(32);
        c = c.wrapping_add(d);
        d = d.rotate_left(16) ^ c;
        a = a.wrapping_add(d);
        d = d.rotate_left(21) ^ a;
        c = c.wrapping_add(b);
        b = b.rotate_left(17) ^ c;
        c = c.rotate_left(32);
        self.v = [a, b, c, d];
    }

    #[inline(always)]
    const fn mix(&mut self, word: u64) {
        self.v[3] ^= word;
        self.round();
        self.round();
        self.v[0] ^= word;
    }

    #[inline(always)]
    const fn word(&mut self, word: u64) {
        self.mix(word);
        self.words += 1;
    }

    #[inline(always)]
    const fn finish(mut self) -> u64 {
        self.mix(self.words << 59);
        self.v[2] ^= 0xff;
        self.round();
        self.round();
        self.round();
        self.round();
        self.v[0] ^ self.v[1] ^ self.v[2] ^ self.v[3]
    }
}

/// Writes a name as it is on the wire, in lower case and with the root's octet; its length. `None` if it is no name.
pub fn wire(name: &str, to: &mut [u8; 8 * NAME_WORDS]) -> Option<usize> {
    let mut at = 0;
    for label in name.trim_end_matches('.').split('.') {
        let text = label.as_bytes();
        if !(1..=63).contains(&text.len()) || at + text.len() + 2 > 255 {
            return None;
        }
        to[at] = text.len() as u8;
        to[at + 1..at + 1 + text.len()].copy_from_slice(text);
        to[at + 1..at + 1 + text.len()].make_ascii_lowercase();
        at += 1 + text.len();
    }
    to[at..].fill(0);
    Some(at + 1)
}

/// A name's hash: its key in `NAMES`. `None` if it is no name.
pub fn hash(key: &[u64; 2], name: &str) -> Option<u64> {
    let mut octets = [0; 8 * NAME_WORDS];
    let length = wire(name, &mut octets)?;
    let mut sip = Sip::new(key);
    for chunk in octets.chunks_exact(8).take(length.div_ceil(8)) {
        sip.word(u64::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3], chunk[4], chunk[5], chunk[6], chunk[7]]));
    }
    Some(sip.finish())
}

/// Eight octets of a frame, in lower case. At its end what is left, and zeros.
#[inline(always)]
fn word<B: Bytes>(bytes: &B, at: u32, whole: &mut bool) -> u64 {
    let mut octets = [0u8; 8];
    *whole = bytes.load(at, &mut octets);
    if !*whole {
        octets = [0; 8];
        let mut i = 0;
        while i < 7 {
            let mut one = [0u8; 1];
            if !bytes.load(at + i, &mut one) {
                break;
            }
            octets[i as usize & 7] = one[0];
            i += 1;
        }
    }
    lower(u64::from_le_bytes(octets))
}

/// What the datagram asks whose UDP header lies at `l4` of a frame and whose IP packet ends at `end`: one of [`asks`].
/// `known` says what is known of a hash.
///
/// It must be one ordinary query (RFC 1035, section 4.1) of the class IN, with at most EDNS behind it ([`is_edns`]), in a
/// packet that holds nothing else.
#[inline(always)]
pub fn ask<B: Bytes>(bytes: &B, l4: u32, end: u32, naming: &Naming, known: impl Fn(u64) -> u32) -> u32 {
    let mut h = [0u8; HEADERS as usize];
    if !bytes.load(l4, &mut h) {
        return asks::OTHER;
    }
    let be16 = |i: usize| u16::from_be_bytes([h[i], h[i + 1]]);
    // QR, the opcode, AA, TC and the code must be zero.
    let plain = be16(10) & 0xfe0f == 0;
    let counts = be16(12) == 1 && be16(14) == 0 && be16(16) == 0 && be16(18) <= 1;
    if !plain || !counts || l4 + u32::from(be16(4)) != end {
        return asks::OTHER;
    }
    let mut at = l4 + HEADERS;
    let mut sip = Sip::new(&naming.key);
    let mut ended = false;
    for _ in 0..NAME_WORDS {
        let mut whole = true;
        let (w, n) = until_zero(word(bytes, at, &mut whole));
        sip.word(w);
        if n != 0 {
            at += n;
            ended = true;
            break;
        }
        if !whole {
            break;
        }
        at += 8;
    }
    let mut tail = [0u8; 4];
    if !ended || at + 4 > end || !bytes.load(at, &mut tail) || u16::from_be_bytes([tail[2], tail[3]]) != 1 {
        return asks::OTHER;
    }
    if !(if be16(18) == 0 { at + 4 == end } else { is_edns(bytes, at + 4, end) }) {
        return asks::OTHER;
    }
    match known(sip.finish()) {
        0 if is_below(bytes, at, naming) => asks::STRANGE,
        named::INSIDE if TYPES.contains(&u16::from_be_bytes([tail[0], tail[1]])) => asks::KNOWN,
        _ => asks::OTHER,
    }
}

/// Whether an OPT record (RFC 6891, section 6.1.2) of version 0 and nothing else lies between `at` and `end`, with no
/// option but a cookie (RFC 7873, section 4), which some clients send with every query.
#[inline(always)]
fn is_edns<B: Bytes>(bytes: &B, at: u32, end: u32) -> bool {
    let mut opt = [0u8; 11];
    if at + 11 > end || !bytes.load(at, &mut opt) {
        return false;
    }
    // Of the flags DO alone; the two octets of the class are a size.
    if [opt[0], opt[1], opt[2]] != [0, 0, 41] || [opt[5], opt[6], opt[7] & 0x7f, opt[8]] != [0; 4] {
        return false;
    }
    let length = u32::from(u16::from_be_bytes([opt[9], opt[10]]));
    if at + 11 + length != end {
        return false;
    }
    if length == 0 {
        return true;
    }
    // The kernel's stack is small: the same octets once more, so that the last four are the option's.
    let cookie = matches!(length, 12 | 20..=44) && bytes.load(at + 4, &mut opt);
    cookie && [opt[7], opt[8], opt[9], opt[10]] == [0, 10, 0, length as u8 - 4]
}

/// Whether what ends at `end` ends with one of the cluster's suffixes.
#[inline(always)]
fn is_below<B: Bytes>(bytes: &B, end: u32, naming: &Naming) -> bool {
    // The headers before a name are longer than a suffix.
    let mut octets = [0u8; 8 * SUFFIX_WORDS];
    if !bytes.load(end - octets.len() as u32, &mut octets) {
        return false;
    }
    let mut words = [0u64; SUFFIX_WORDS];
    for (i, w) in words.iter_mut().enumerate() {
        let o = |j: usize| octets[8 * i + j];
        *w = lower(u64::from_le_bytes([o(0), o(1), o(2), o(3), o(4), o(5), o(6), o(7)]));
    }
    for s in &naming.suffixes {
        let mut differ = (s.mask[SUFFIX_WORDS - 1] == 0) as u64;
        for (i, w) in words.iter().enumerate() {
            differ |= (w & s.mask[i]) ^ s.text[i];
        }
        if differ == 0 {
            return true;
        }
    }
    false
}
