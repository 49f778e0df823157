//! Where this kernel has the fields of a packet's buffer: its types (BTF) say it. The format is that of the kernel's
//! Documentation/bpf/btf.rst.

use std::sync::OnceLock;

use tidegate_ebpf_common::layout::SkbOffsets;

use crate::Error;

const TYPES: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u32 = 0x0001_eb9f;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
/// How deep unnamed structures and unions are followed.
const DEPTH: u32 = 4;

/// The offsets of this kernel, read once.
pub(crate) fn skb() -> Result<SkbOffsets, Error> {
    static FOUND: OnceLock<SkbOffsets> = OnceLock::new();
    if let Some(found) = FOUND.get() {
        return Ok(*found);
    }
    let types = std::fs::read(TYPES).map_err(Error::io(format!("cannot read {TYPES}")))?;
    let found = offsets(&types)?;
    Ok(*FOUND.get_or_init(|| found))
}

fn offsets(types: &[u8]) -> Result<SkbOffsets, Error> {
    let types = Types::new(types).ok_or(Error::Types("they cannot be read"))?;
    let skb = types.find("sk_buff").ok_or(Error::Types("there is no sk_buff"))?;
    let bits = |name, size| match types.member(skb, name, DEPTH) {
        Some(m) if m.bits == size => Ok(m.at),
        _ => Err(Error::Types("sk_buff is not as it was")),
    };
    let summed = bits("ip_summed", 2)?;
    let (start, offset, head, data) =
        (bits("csum_start", 0)?, bits("csum_offset", 0)?, bits("head", 0)?, bits("data", 0)?);
    // The programs read each pair at once.
    if summed % 8 > 6 || start % 8 != 0 || offset != start + 16 || head % 8 != 0 || data != head + 64 {
        return Err(Error::Types("fields of sk_buff lie apart"));
    }
    Ok(SkbOffsets { summed: summed / 8, summed_shift: summed % 8, csum: start / 8, head: head / 8 })
}

/// A member: where it begins, in bits, and how many it has if it is a bit field, else 0.
struct Member {
    at: u32,
    bits: u32,
}

/// The kernel's types. Nothing of them is trusted to lie inside.
struct Types<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// Where each type begins; the first is type 1.
    at: Vec<u32>,
}

fn word(from: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(from.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

impl<'a> Types<'a> {
    fn new(all: &'a [u8]) -> Option<Self> {
        // The magic number, the version and the flags are one word.
        if word(all, 0)? != MAGIC {
            return None;
        }
        let body = all.get(word(all, 4)? as usize..)?;
        let section = |at: usize| body.get(word(all, at)? as usize..)?.get(..word(all, at + 4)? as usize);
        let (types, strings) = (section(8)?, section(16)?);
        let (mut at, mut next) = (Vec::new(), 0);
        while next < types.len() {
            at.push(u32::try_from(next).ok()?);
            let info = word(types, next + 4)?;
            let members = (info & 0xffff) as usize;
            next += 12
                + match info >> 24 & 31 {
                    // Integers, variables, tags of declarations.
                    1 | 14 | 17 => 4,
                    2 | 7..=12 | 16 | 18 => 0,
                    3 => 12,
                    STRUCT | UNION | 15 | 19 => 12 * members,
                    // Values of enumerations, arguments.
                    6 | 13 => 8 * members,
                    _ => return None,
                };
        }
        Some(Self { types, strings, at })
    }

    fn is(&self, name: u32, wanted: &str) -> bool {
        let found = self.strings.get(name as usize..).and_then(|s| s.strip_prefix(wanted.as_bytes()));
        found.is_some_and(|rest| rest.first() == Some(&0))
    }

    /// The structure with this name.
    fn find(&self, name: &str) -> Option<u32> {
        self.at.iter().copied().find(|at| {
            let at = *at as usize;
            let (Some(called), Some(info)) = (word(self.types, at), word(self.types, at + 4)) else { return false };
            info >> 24 & 31 == STRUCT && info & 0xffff != 0 && self.is(called, name)
        })
    }

    /// The member of the structure or union at `at`, also in unnamed ones inside.
    fn member(&self, at: u32, name: &str, depth: u32) -> Option<Member> {
        let at = at as usize;
        let info = word(self.types, at + 4)?;
        if !matches!(info >> 24 & 31, STRUCT | UNION) {
            return None;
        }
        for n in 0..(info & 0xffff) as usize {
            let m = at + 12 + 12 * n;
            let (called, of, place) = (word(self.types, m)?, word(self.types, m + 4)?, word(self.types, m + 8)?);
            // With bit fields the upper octet is their size.
            let (at, bits) = if info >> 31 == 1 { (place & 0xff_ffff, place >> 24) } else { (place, 0) };
            if called != 0 && self.is(called, name) {
                return Some(Member { at, bits });
            }
            let inside = self.at.get((of as usize).wrapping_sub(1));
            if called == 0
                && depth > 0
                && let Some(found) = inside.and_then(|inside| self.member(*inside, name, depth - 1))
            {
                return Some(Member { at: at.checked_add(found.at)?, bits: found.bits });
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernels_buffer_is_understood() {
        let all = std::fs::read(TYPES).unwrap();
        let found = offsets(&all).unwrap();
        assert_eq!(skb().unwrap(), found);
        let (types, fields) = (Types::new(&all).unwrap(), ["len", "mark", "protocol", "mac_header"]);
        let buffer = types.find("sk_buff").unwrap();
        for other in fields {
            let at = types.member(buffer, other, DEPTH).unwrap().at / 8;
            assert!(![found.summed, found.csum, found.head].contains(&at), "{other}");
        }
        assert!(types.member(buffer, "no such member", DEPTH).is_none());
    }

    #[test]
    fn types_that_break_off_are_refused() {
        let all = std::fs::read(TYPES).unwrap();
        for end in [0, 3, 8, 23, 24, 4_096, all.len() / 2] {
            assert!(offsets(&all[..end]).is_err(), "{end}");
        }
        let mut other = all[..64].to_vec();
        other[0] ^= 1;
        assert!(matches!(offsets(&other), Err(Error::Types("they cannot be read"))));
    }
}
