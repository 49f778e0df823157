//! Replies: header, echoed question, negatives with a SOA, EDNS and Extended DNS Errors.

use tidegate_policy::Reason;

use crate::wire::{self, FLAG_CD, FLAG_QR, FLAG_RA, FLAG_RD, FLAG_TC, HEADER, MAX_UDP, Query, be16, rcode, rtype};

/// How long a pod may remember a negative, in seconds.
pub const NEGATIVE_TTL: u32 = 5;

/// Largest Extended DNS Error text plus its framing: codes of reasons are short.
const MAX_OPT: usize = 11 + 6 + 32;

/// Starts a reply: header with counts of zero but for the question, and the question as it was asked.
pub(crate) fn begin(query: &Query<'_>, rcode: u8, out: &mut Vec<u8>) {
    out.clear();
    header(query.id, query.flags, rcode, query.question, out);
}

fn header(id: u16, flags: u16, rcode: u8, question: &[u8], out: &mut Vec<u8>) {
    // AD is never set: nothing was validated for the pod (RFC 6840, section 5.7).
    let flags = FLAG_QR | FLAG_RA | (flags & (FLAG_RD | FLAG_CD | 0x7800)) | u16::from(rcode & 0xf);
    out.extend_from_slice(&id.to_be_bytes());
    out.extend_from_slice(&flags.to_be_bytes());
    out.extend_from_slice(&[0, u8::from(!question.is_empty()), 0, 0, 0, 0, 0, 0]);
    out.extend_from_slice(question);
}

pub(crate) fn set_answers(out: &mut [u8], count: u16) {
    out[6..8].copy_from_slice(&count.to_be_bytes());
}

pub(crate) fn set_truncated(out: &mut [u8]) {
    out[2] |= (FLAG_TC >> 8) as u8;
}

/// Appends the SOA of a negative (RFC 2308, section 3), owned by the question's name.
pub(crate) fn soa(out: &mut Vec<u8>) {
    out.extend_from_slice(&[0xc0, HEADER as u8]);
    out.extend_from_slice(&rtype::SOA.to_be_bytes());
    out.extend_from_slice(&wire::CLASS_IN.to_be_bytes());
    out.extend_from_slice(&NEGATIVE_TTL.to_be_bytes());
    // MNAME and RNAME are the root; serial, refresh, retry, expire, minimum.
    out.extend_from_slice(&22u16.to_be_bytes());
    out.extend_from_slice(&[0, 0]);
    for n in [1u32, 3600, 600, 86_400, NEGATIVE_TTL] {
        out.extend_from_slice(&n.to_be_bytes());
    }
    out[9] = 1;
}

/// The octets of [`soa`].
pub(crate) const SOA_SIZE: usize = 12 + 22;

/// The Extended DNS Error of a reason (RFC 8914, section 4).
fn ede(reason: Reason) -> Option<u16> {
    Some(match reason {
        Reason::Allowed => return None,
        // No Reachable Authority.
        Reason::DnsUpstream => 22,
        // Not Ready.
        Reason::BarrierTimeout | Reason::NoGateway | Reason::UnknownPod => 14,
        // Other Error.
        Reason::Quota | Reason::DnsBudget | Reason::DnsMalformed => 0,
        // Not Supported.
        Reason::DnsType | Reason::NoEgressFamily => 21,
        // Blocked.
        _ => 15,
    })
}

/// Appends the OPT record if the query had one, with an Extended DNS Error for every reason but `allowed`.
pub(crate) fn opt(query: &Query<'_>, reason: Reason, out: &mut Vec<u8>) {
    if query.edns.is_some() {
        write_opt(0, ede(reason).map(|code| (code, reason.as_str())), out);
    }
}

/// How many octets [`opt`] may add.
pub(crate) fn opt_size(query: &Query<'_>) -> usize {
    if query.edns.is_some() { MAX_OPT } else { 0 }
}

fn write_opt(extended: u8, ede: Option<(u16, &str)>, out: &mut Vec<u8>) {
    out.push(0);
    out.extend_from_slice(&rtype::OPT.to_be_bytes());
    out.extend_from_slice(&(MAX_UDP as u16).to_be_bytes());
    out.extend_from_slice(&[extended, 0, 0, 0]);
    match ede {
        Some((code, text)) => {
            out.extend_from_slice(&(6 + text.len() as u16).to_be_bytes());
            out.extend_from_slice(&15u16.to_be_bytes());
            out.extend_from_slice(&(2 + text.len() as u16).to_be_bytes());
            out.extend_from_slice(&code.to_be_bytes());
            out.extend_from_slice(text.as_bytes());
        }
        None => out.extend_from_slice(&[0, 0]),
    }
    out[11] += 1;
}

/// Writes a reply without answers. NOERROR and NXDOMAIN get the SOA of a negative.
pub fn deny(query: &Query<'_>, code: u8, reason: Reason, out: &mut Vec<u8>) {
    begin(query, code, out);
    if matches!(code, rcode::NOERROR | rcode::NXDOMAIN) {
        soa(out);
    }
    opt(query, reason, out);
}

/// Writes the reply to a request that is no valid query ([`wire::Parsed::Refuse`]).
pub fn error(request: &[u8], code: u8, edns: bool, question: &[u8], out: &mut Vec<u8>) {
    out.clear();
    header(be16(request, 0).unwrap_or(0), be16(request, 2).unwrap_or(0), code, question, out);
    if edns {
        write_opt(code >> 4, None, out);
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::{Message, ResponseCode};
    use hickory_proto::rr::RecordType;
    use hickory_proto::rr::rdata::opt::EdnsCode;

    use super::*;
    use crate::wire::{Parsed, parse};

    fn query(edns: bool) -> Vec<u8> {
        let mut m = vec![7, 7, 1, 0x10, 0, 1, 0, 0, 0, 0, 0, u8::from(edns)];
        m.extend(wire::question("Ab.Example", 1).unwrap());
        if edns {
            m.extend([0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
        }
        m
    }

    #[test]
    fn a_denial_echoes_the_question_and_says_why_only_to_edns() {
        for edns in [true, false] {
            let m = query(edns);
            let Parsed::Query(q) = parse(&m) else { panic!() };
            let mut out = vec![];
            deny(&q, rcode::NXDOMAIN, Reason::NameNotAllowed, &mut out);
            let r = Message::from_vec(&out).unwrap();
            assert_eq!(r.metadata.id, 0x0707);
            assert_eq!(r.metadata.response_code, ResponseCode::NXDomain);
            assert!(r.metadata.recursion_desired && r.metadata.recursion_available && r.metadata.checking_disabled);
            assert!(!r.metadata.authentic_data && !r.metadata.truncation);
            assert_eq!(r.queries[0].name().to_string(), "Ab.Example.");
            assert_eq!(r.authorities.len(), 1);
            assert_eq!(r.authorities[0].record_type(), RecordType::SOA);
            assert_eq!(r.authorities[0].ttl, NEGATIVE_TTL);
            assert_eq!(r.edns.is_some(), edns);
            if let Some(e) = r.edns {
                assert_eq!(e.max_payload(), MAX_UDP as u16);
                assert!(e.options().get(EdnsCode::Unknown(15)).is_some() || e.options().as_ref().len() == 1);
            }
        }
    }

    #[test]
    fn every_reason_fits_the_space_kept_for_it() {
        for r in Reason::ALL {
            let mut out = vec![0; HEADER];
            write_opt(0, ede(*r).map(|c| (c, r.as_str())), &mut out);
            assert!(out.len() - HEADER <= MAX_OPT);
        }
    }

    #[test]
    fn bad_versions_get_an_extended_code() {
        let m = query(true);
        let mut out = vec![];
        error(&m, rcode::BADVERS, true, &m[12..26], &mut out);
        assert_eq!(out[3] & 0xf, 0);
        assert_eq!(out[out.len() - 6], 1);
        assert_eq!(out[11], 1);
    }
}
