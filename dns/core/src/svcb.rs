//! SVCB and HTTPS records (RFC 9460): read in place, and written again without
//! what the policy does not allow.

use std::net::IpAddr;

use crate::wire::{be16, read_name};
use smallvec::SmallVec;

const MANDATORY: u16 = 0;
const PORT: u16 = 3;
const IPV4HINT: u16 = 4;
const ECH: u16 = 5;
const IPV6HINT: u16 = 6;

/// The RDATA of one record.
#[derive(Clone, Copy, Debug)]
pub struct Svcb<'a> {
    /// SvcPriority; 0 is AliasMode.
    pub priority: u16,
    /// TargetName on the wire, not compressed; one zero octet means the owner.
    pub target: &'a [u8],
    params: &'a [u8],
}

impl<'a> Svcb<'a> {
    /// Reads RDATA; `None` if it breaks RFC 9460, section 2.2: a bad name, or keys that are cut or not ascending.
    pub fn parse(rdata: &'a [u8]) -> Option<Self> {
        let priority = be16(rdata, 0)?;
        let mut name = SmallVec::new();
        let target_and_more = rdata.get(2..)?;
        let end = read_name(target_and_more, 0, &mut name)?;
        // The target is not compressed, and what was read must be all of it.
        if end != name.len() {
            return None;
        }
        let (target, params) = target_and_more.split_at(end);
        let mut rest = params;
        let mut last = None;
        while !rest.is_empty() {
            let (key, len) = (be16(rest, 0)?, usize::from(be16(rest, 2)?));
            if last.is_some_and(|l| l >= key) {
                return None;
            }
            let value = rest.get(4..4 + len)?;
            let fits = match key {
                MANDATORY => len > 0 && len.is_multiple_of(2),
                PORT => len == 2,
                IPV4HINT => len > 0 && len.is_multiple_of(4),
                IPV6HINT => len > 0 && len.is_multiple_of(16),
                _ => true,
            };
            if !fits {
                return None;
            }
            last = Some(key);
            rest = &rest[4 + value.len()..];
        }
        Some(Self { priority, target, params })
    }

    fn params(&self) -> impl Iterator<Item = (u16, &'a [u8])> + use<'a> {
        let mut rest = self.params;
        std::iter::from_fn(move || {
            let (key, len) = (be16(rest, 0)?, usize::from(be16(rest, 2)?));
            let value = rest.get(4..4 + len)?;
            rest = &rest[4 + len..];
            Some((key, value))
        })
    }

    /// The port, if the record names one.
    pub fn port(&self) -> Option<u16> {
        self.params().find(|(k, _)| *k == PORT).and_then(|(_, v)| be16(v, 0))
    }

    /// The addresses of both hints.
    pub fn hints(&self) -> impl Iterator<Item = IpAddr> + use<'a> {
        self.params().flat_map(|(key, value)| {
            let size = match key {
                IPV4HINT => 4,
                IPV6HINT => 16,
                _ => usize::MAX,
            };
            value.chunks_exact(size).filter_map(address)
        })
    }

    /// Appends the RDATA with only the hints that `hint` keeps, and `ech` only if
    /// it is allowed. Returns false, with nothing written, if a key that is
    /// mandatory would be missing.
    pub fn write(&self, ech: bool, hint: impl Fn(IpAddr) -> bool, out: &mut Vec<u8>) -> bool {
        let start = out.len();
        out.extend_from_slice(&self.priority.to_be_bytes());
        out.extend_from_slice(self.target);
        let mut mandatory: &[u8] = &[];
        for (key, value) in self.params() {
            match key {
                ECH if !ech => {}
                IPV4HINT | IPV6HINT => {
                    let at = out.len();
                    out.extend_from_slice(&key.to_be_bytes());
                    out.extend_from_slice(&[0, 0]);
                    for raw in value.chunks_exact(if key == IPV4HINT { 4 } else { 16 }) {
                        if address(raw).is_some_and(&hint) {
                            out.extend_from_slice(raw);
                        }
                    }
                    let len = out.len() - at - 4;
                    if len == 0 {
                        out.truncate(at);
                    } else {
                        out[at + 2..at + 4].copy_from_slice(&(len as u16).to_be_bytes());
                    }
                }
                _ => {
                    if key == MANDATORY {
                        mandatory = value;
                    }
                    out.extend_from_slice(&key.to_be_bytes());
                    out.extend_from_slice(&(value.len() as u16).to_be_bytes());
                    out.extend_from_slice(value);
                }
            }
        }
        if !mandatory.is_empty() {
            let written = Svcb { params: &out[start + 2 + self.target.len()..], ..*self };
            let complete = mandatory.chunks_exact(2).all(|m| written.params().any(|(k, _)| Some(k) == be16(m, 0)));
            if !complete {
                out.truncate(start);
                return false;
            }
        }
        true
    }
}

/// An address of 4 or 16 octets.
pub(crate) fn address(raw: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(raw) {
        return Some(IpAddr::from(v4));
    }
    <[u8; 16]>::try_from(raw).ok().map(IpAddr::from)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rdata(params: &[(u16, &[u8])]) -> Vec<u8> {
        let mut r = vec![0, 1, 0];
        for (k, v) in params {
            r.extend(k.to_be_bytes());
            r.extend((v.len() as u16).to_be_bytes());
            r.extend(*v);
        }
        r
    }

    #[test]
    fn ech_and_unbound_hints_go() {
        let r = rdata(&[(1, b"\x02h2"), (4, &[192, 0, 2, 1, 192, 0, 2, 2]), (5, b"secret"), (6, &[1; 16])]);
        let s = Svcb::parse(&r).unwrap();
        assert_eq!(s.hints().count(), 3);
        let mut out = vec![9];
        assert!(s.write(false, |ip| ip == IpAddr::from([192, 0, 2, 2]), &mut out));
        assert_eq!(out[1..], rdata(&[(1, b"\x02h2"), (4, &[192, 0, 2, 2])]));
        out.clear();
        assert!(s.write(true, |_| true, &mut out));
        assert_eq!(out, r);
    }

    #[test]
    fn a_mandatory_key_that_goes_takes_the_record_with_it() {
        let r = rdata(&[(0, &[0, 5]), (5, b"secret")]);
        let s = Svcb::parse(&r).unwrap();
        let mut out = vec![];
        assert!(!s.write(false, |_| true, &mut out));
        assert!(out.is_empty());
        assert!(s.write(true, |_| true, &mut out));
    }

    #[test]
    fn what_breaks_the_format_is_refused() {
        assert!(Svcb::parse(&rdata(&[(4, b""), (3, b"\x01\xbb")])).is_none());
        assert!(Svcb::parse(&rdata(&[(3, b"\x01")])).is_none());
        assert!(Svcb::parse(&rdata(&[(3, b"\x01\xbb"), (3, b"\x01\xbb")])).is_none());
        assert!(Svcb::parse(&[0, 1, 3, b'a']).is_none());
        assert_eq!(Svcb::parse(&rdata(&[(3, b"\x01\xbb")])).unwrap().port(), Some(443));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), ech in any::<bool>()) {
            if let Some(s) = Svcb::parse(&bytes) {
                let mut out = vec![];
                if s.write(ech, |_| false, &mut out) {
                    prop_assert!(Svcb::parse(&out).is_some());
                    prop_assert_eq!(Svcb::parse(&out).unwrap().hints().count(), 0);
                }
            }
        }
    }
}
