//! What is learnt from upstream answers, and what is not.

use proptest::prelude::*;
use tidegate_dns_core::answer::{AnswerError, MAX_CHAIN, check, upstream_query};
use tidegate_dns_core::wire::{Parsed, parse, question};

mod wiring;
use wiring::{Rr, a, aaaa, answer, cname, key, rr};

const HOUR: u32 = 3600;

fn sent(name: &str, qtype: u16) -> Vec<u8> {
    upstream_query(&key(name, qtype), 77, &[0x5a; 32], true)
}

fn checked(name: &str, qtype: u16, rcode: u8, rrs: &[Rr]) -> Result<tidegate_dns_core::Stored, AnswerError> {
    let q = sent(name, qtype);
    check(&q, &answer(&q, rcode, rrs, &[]), true, 1000, HOUR)
}

#[test]
fn the_query_says_nothing_about_the_client() {
    let q = sent("api.example.com", 28);
    let Parsed::Query(p) = parse(&q) else { panic!() };
    assert_eq!((p.id, p.qtype, p.name()), (77, 28, "api.example.com"));
    assert_eq!(p.edns.unwrap().udp_size, 1232);
    assert_eq!(q[2..4], [1, 0], "RD, and neither AD nor CD");
    assert_eq!(q[q.len() - 2..], [0, 0], "no options");
    assert_ne!(&q[12..29], &question("api.example.com", 28).unwrap()[..17], "0x20 casing");
    assert!(p.question()[..17].eq_ignore_ascii_case(&question("api.example.com", 28).unwrap()[..17]));
}

#[test]
fn a_good_answer_keeps_its_shortest_ttl() {
    let s = checked(
        "www.example.com",
        1,
        0,
        &[cname("www.example.com", 60, "cdn.example.net"), a("cdn.example.net", 300, [192, 0, 2, 1])],
    );
    let s = s.unwrap();
    assert_eq!((s.chain_len(), s.len(), s.rcode()), (1, 1, 0));
    assert_eq!(s.ttl(1000), Some(60));
    assert_eq!(s.ttl(1000 + 3), Some(60), "to the nearest second");
    assert_eq!(s.ttl(1000 + 59_600), Some(0));
    assert_eq!(s.ttl(1000 + 60_000), None);
    assert_eq!(checked("a.example", 1, 0, &[a("a.example", 90_000, [192, 0, 2, 1])]).unwrap().ttl(1000), Some(HOUR));
    // RFC 2181, section 8.
    assert_eq!(checked("a.example", 1, 0, &[a("a.example", 1 << 31, [192, 0, 2, 1])]).unwrap().ttl(1000), None);
}

#[test]
fn the_order_of_records_does_not_matter() {
    let s = checked(
        "w.example",
        1,
        0,
        &[a("y.example", 9, [1, 2, 3, 4]), cname("x.example", 9, "y.example"), cname("w.example", 9, "x.example")],
    );
    assert_eq!(s.unwrap().chain_len(), 2);
}

#[test]
fn foreign_owners_spoil_the_answer() {
    let bad = [a("a.example", 9, [192, 0, 2, 1]), a("bank.example", 9, [192, 0, 2, 66])];
    assert_eq!(checked("a.example", 1, 0, &bad).unwrap_err(), AnswerError::ForeignOwner);
    // Also where the chain does not reach.
    let bad = [cname("b.example", 9, "c.example"), a("c.example", 9, [192, 0, 2, 1])];
    assert_eq!(checked("a.example", 1, 0, &bad).unwrap_err(), AnswerError::ForeignOwner);
}

#[test]
fn chains_are_bounded() {
    let chain = |n: usize| -> Vec<Rr> {
        let mut v: Vec<Rr> =
            (0..n).map(|i| cname(&format!("n{i}.example"), 9, &format!("n{}.example", i + 1))).collect();
        v.push(a(&format!("n{n}.example"), 9, [192, 0, 2, 1]));
        v
    };
    assert_eq!(checked("n0.example", 1, 0, &chain(MAX_CHAIN)).unwrap().chain_len(), MAX_CHAIN);
    assert_eq!(checked("n0.example", 1, 0, &chain(MAX_CHAIN + 1)).unwrap_err(), AnswerError::Chain);
    let lp = [cname("a.example", 9, "b.example"), cname("b.example", 9, "a.example")];
    assert_eq!(checked("a.example", 1, 0, &lp).unwrap_err(), AnswerError::Chain);
    let two = [cname("a.example", 9, "b.example"), cname("a.example", 9, "c.example")];
    assert_eq!(checked("a.example", 1, 0, &two).unwrap_err(), AnswerError::Chain);
}

#[test]
fn what_is_not_the_answer_is_refused() {
    let q = sent("a.example", 1);
    let good = answer(&q, 0, &[a("a.example", 9, [192, 0, 2, 1])], &[]);
    let with = |f: &dyn Fn(&mut Vec<u8>)| {
        let mut m = good.clone();
        f(&mut m);
        check(&q, &m, true, 0, HOUR).unwrap_err()
    };
    assert_eq!(with(&|m| m[1] ^= 1), AnswerError::Mismatch, "id");
    assert_eq!(with(&|m| m[2] &= 0x7f), AnswerError::Mismatch, "not a response");
    assert_eq!(with(&|m| m[13] ^= 0x20), AnswerError::Mismatch, "casing");
    assert_eq!(with(&|m| m[13] ^= 1), AnswerError::Mismatch, "another name");
    assert_eq!(with(&|m| m[24] = 28), AnswerError::Mismatch, "another type");
    assert_eq!(with(&|m| m[2] |= 2), AnswerError::Truncated);
    assert_eq!(with(&|m| m[3] |= 2), AnswerError::Code(2));
    assert_eq!(with(&|m| m.truncate(m.len() - 1)), AnswerError::Malformed);
    let mut cased = good.clone();
    cased[13] ^= 0x20;
    assert!(check(&q, &cased, false, 0, HOUR).is_ok(), "TCP needs no casing");
    let chaos = Rr { class: 3, ..a("a.example", 9, [192, 0, 2, 1]) };
    assert_eq!(checked("a.example", 1, 0, &[chaos]).unwrap_err(), AnswerError::Malformed);
    assert_eq!(
        checked("a.example", 1, 0, &[rr("a.example", 1, 9, vec![1, 2, 3])]).unwrap_err(),
        AnswerError::Malformed
    );
}

#[test]
fn signatures_are_left_out() {
    let s = checked(
        "a.example",
        1,
        0,
        &[a("a.example", 9, [192, 0, 2, 1]), rr("a.example", 46, 1, vec![0; 40]), rr("example", 47, 1, vec![0])],
    );
    let s = s.unwrap();
    assert_eq!((s.len(), s.ttl(1000)), (1, Some(9)));
}

#[test]
fn negatives_live_as_their_soa_says() {
    let q = sent("no.example", 1);
    let soa = |ttl, minimum: u32| {
        let mut rdata = vec![0, 0];
        rdata.extend([0; 16]);
        rdata.extend(minimum.to_be_bytes());
        rr("example", 6, ttl, rdata)
    };
    let s = check(&q, &answer(&q, 3, &[], &[soa(30, 20)]), true, 0, HOUR).unwrap();
    assert_eq!((s.rcode(), s.is_empty(), s.ttl(0)), (3, true, Some(20)));
    let s = check(&q, &answer(&q, 0, &[], &[soa(9000, 9000)]), true, 0, HOUR).unwrap();
    assert_eq!((s.rcode(), s.ttl(0)), (0, Some(60)));
    let s = check(&q, &answer(&q, 0, &[], &[]), true, 0, HOUR).unwrap();
    assert_eq!(s.ttl(0), None, "without a SOA it is not kept");
}

#[test]
fn compressed_rdata_is_kept_uncompressed() {
    let q = sent("example.com", 15);
    // MX whose exchange points back into the question.
    let mut m = answer(&q, 0, &[], &[]);
    m[7] = 1;
    m.extend([0xc0, 12, 0, 15, 0, 1, 0, 0, 0, 60, 0, 9, 0, 10, 4, b'm', b'a', b'i', b'l', 0xc0, 12]);
    let s = check(&q, &m, true, 0, HOUR).unwrap();
    assert_eq!((s.qtype(), s.name()), (15, &b"\x07example\x03com\0"[..]));
    let s = format!("{s:?}");
    // The name follows in full: example, com.
    assert!(s.contains("4, 109, 97, 105, 108, 7, 101, 120, 97, 109, 112, 108, 101, 3, 99, 111, 109, 0"), "{s}");
}

proptest! {
    #[test]
    fn hostile_answers_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), qtype in any::<u16>()) {
        let q = sent("a.example", qtype);
        let mut m = answer(&q, 0, &[], &[]);
        m[7] = 3;
        m.extend(&bytes);
        let _ = check(&q, &m, true, 0, HOUR);
        let _ = check(&q, &bytes, false, 0, HOUR);
    }

    #[test]
    fn mangled_answers_never_panic(at in 0usize..140, value in any::<u8>(), cut in 0usize..40) {
        let q = sent("www.example.com", 28);
        let mut m = answer(&q, 0, &[cname("www.example.com", 60, "cdn.example.net"), aaaa("cdn.example.net", 300, [1; 16])], &[]);
        if let Some(b) = m.get_mut(at) { *b = value; }
        m.truncate(m.len() - cut.min(m.len()));
        if let Ok(s) = check(&q, &m, false, 0, HOUR) {
            prop_assert!(s.len() <= 1 && s.chain_len() <= 1);
        }
    }
}
