//! What a question to the cluster's DNS is read as.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod tables;

use std::collections::HashMap;
#[allow(deprecated, reason = "the one SipHash-2-4 at hand")]
use std::hash::{Hasher, SipHasher};

use proptest::prelude::*;
use tables::{AUDITED, GUARDED, ISOLATED, addr, decide, ends, ethertype, world};
use tidegate_ebpf_common::layout::{Naming, Scope, Suffix, endpoint};
use tidegate_ebpf_common::names::{ask, asks, hash, named, wire};
use tidegate_ebpf_common::packet::{Packet, mark, parse};
use tidegate_ebpf_common::{Action, Code, Decision, verdict};

const KEY: [u64; 2] = [7, 11];
/// The cluster's DNS in the world of the tests.
const DNS: (&str, u16) = ("10.244.1.53", 5353);

fn naming(suffixes: &[&str]) -> Naming {
    let mut out = Naming { key: KEY, ..Naming::default() };
    for (to, s) in out.suffixes.iter_mut().zip(suffixes) {
        *to = Suffix::new(s).unwrap();
    }
    out
}

fn known() -> HashMap<u64, u32> {
    let h = |n: &str| hash(&KEY, n).unwrap();
    [(h("db.shop.svc.cluster.local"), named::INSIDE), (h("partner.shop.svc.cluster.local"), named::OUTSIDE)].into()
}

fn octets(name: &str) -> Vec<u8> {
    let mut out = Vec::new();
    for label in name.split('.') {
        out.push(label.len() as u8);
        out.extend(label.as_bytes());
    }
    out.push(0);
    out
}

/// A query: the header's words, the name's octets, type and class, and what follows.
fn message(header: [u16; 6], name: &[u8], qtype: u16, class: u16, more: &[u8]) -> Vec<u8> {
    let mut out: Vec<u8> = header.iter().flat_map(|w| w.to_be_bytes()).collect();
    out.extend(name);
    out.extend(qtype.to_be_bytes());
    out.extend(class.to_be_bytes());
    out.extend(more);
    out
}

const PLAIN: [u16; 6] = [0x1234, 0x0100, 1, 0, 0, 0];
const OPT: [u8; 11] = [0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0];

fn query(name: &str) -> Vec<u8> {
    message(PLAIN, &octets(name), 1, 1, &[])
}

fn frame(source: &str, to: &str, port: u16, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    ends(source, to).udp(40_000, port).write(&mut out, payload).unwrap();
    out
}

fn read(frame: &[u8]) -> u32 {
    let mut p = Packet::default();
    parse(&frame, ethertype(frame), &mut p);
    let (naming, known) = (naming(&["cluster.local", "k8s.example"]), known());
    ask(&frame, p.l4, 14 + p.length, &naming, |h| known.get(&h).copied().unwrap_or(0))
}

fn asked(payload: &[u8]) -> u32 {
    let four = read(&frame(ISOLATED.0, "10.96.0.10", 53, payload));
    assert_eq!(four, read(&frame(ISOLATED.1, "fd00:10:96::a", 53, payload)), "both families");
    four
}

#[test]
fn services_are_known_whatever_the_case_and_with_edns() {
    for name in ["db.shop.svc.cluster.local", "DB.shop.SVC.Cluster.LOCAL"] {
        assert_eq!(asked(&query(name)), asks::KNOWN, "{name}");
        let edns = message([1, 0x0120, 1, 0, 0, 1], &octets(name), 28, 1, &OPT);
        assert_eq!(asked(&edns), asks::KNOWN, "{name} with EDNS");
    }
    for name in [
        "www.example.com.shop.svc.cluster.local",
        "db.shop.svc.cluster.local.shop.svc.cluster.local",
        "x.db.shop.svc.cluster.local",
        "db2.shop.svc.cluster.local",
        "cluster.local",
        "db.shop.svc.k8s.example",
    ] {
        assert_eq!(asked(&query(name)), asks::STRANGE, "{name}");
    }
    for name in [
        "www.example.com",
        "cluster.local.example.com",
        "xcluster.local",
        "local",
        "db.shop.svc",
        "partner.shop.svc.cluster.local",
    ] {
        assert_eq!(asked(&query(name)), asks::OTHER, "{name}");
    }
}

#[test]
fn only_one_ordinary_question_counts() {
    let name = octets("db.shop.svc.cluster.local");
    let with = |header, qtype, class, more: &[u8]| asked(&message(header, &name, qtype, class, more));
    assert_eq!(with(PLAIN, 1, 1, &[]), asks::KNOWN);
    for header in [
        [1, 0x8180, 1, 0, 0, 0],
        [1, 0x2900, 1, 0, 0, 0],
        [1, 0x0300, 1, 0, 0, 0],
        [1, 0x0103, 1, 0, 0, 0],
        [1, 0x0100, 2, 0, 0, 0],
        [1, 0x0100, 0, 0, 0, 0],
        [1, 0x0100, 1, 1, 0, 0],
        [1, 0x0100, 1, 0, 1, 0],
        [1, 0x0100, 1, 0, 0, 2],
    ] {
        assert_eq!(with(header, 1, 1, &OPT), asks::OTHER, "{header:x?}");
    }
    for (qtype, class) in [(16, 1), (255, 1), (252, 1), (1, 3), (1, 255)] {
        assert_eq!(with(PLAIN, qtype, class, &[]), asks::OTHER, "{qtype} {class}");
    }
    for qtype in [1, 28, 33, 65] {
        assert_eq!(with(PLAIN, qtype, 1, &[]), asks::KNOWN, "{qtype}");
    }
    // The question ends behind the datagram: the network card's padding is no part of it.
    let mut cut = frame(ISOLATED.0, "10.96.0.10", 53, &message(PLAIN, &name, 1, 1, &[])[..40]);
    cut.extend([0; 60]);
    assert_eq!(read(&cut), asks::OTHER);
    // The datagram says that it is shorter than its packet.
    let mut short = frame(ISOLATED.0, "10.96.0.10", 53, &message(PLAIN, &name, 1, 1, b"something else"));
    let length = u16::from_be_bytes([short[38], short[39]]) - 14;
    short[38..40].copy_from_slice(&length.to_be_bytes());
    assert_eq!(read(&short), asks::OTHER);
}

#[test]
fn nothing_rides_behind_a_question() {
    let name = octets("db.shop.svc.cluster.local");
    let with = |additional: u16, more: &[u8]| asked(&message([1, 0x0100, 1, 0, 0, additional], &name, 1, 1, more));
    assert_eq!((with(0, &[]), with(1, &OPT)), (asks::KNOWN, asks::KNOWN));
    let changed = |at: usize, to: u8| {
        let mut opt = OPT;
        opt[at] = to;
        opt
    };
    // Records that are announced and not there, there and not announced, and what follows them.
    let evil = [6, b's', b'e', b'c', b'r', b'e', b't', 4, b'e', b'v', b'i', b'l', 0, 0, 1, 0, 1];
    for (additional, more) in [(0, &OPT[..]), (0, &[0]), (0, &evil), (1, &[]), (1, &OPT[..10]), (1, &evil)] {
        assert_eq!(with(additional, more), asks::OTHER, "{additional} {more:?}");
    }
    assert_eq!(with(1, &[&OPT[..], &evil].concat()), asks::OTHER);
    // Another owner, type, extended code, version, flag; a length that is not there.
    for (at, to) in [(0, 1), (1, 1), (2, 1), (5, 1), (6, 1), (7, 1), (8, 1), (9, 1), (10, 1)] {
        assert_eq!(with(1, &changed(at, to)), asks::OTHER, "{at}");
    }
    for (at, to) in [(3, 255), (4, 255), (7, 0x80)] {
        assert_eq!(with(1, &changed(at, to)), asks::KNOWN, "{at}");
    }
    let option = |code: u8, length: u8, data: usize| {
        let option = [vec![0, code, 0, length], vec![7; data]].concat();
        let mut opt = OPT.to_vec();
        opt[10] = option.len() as u8;
        opt.extend(option);
        with(1, &opt)
    };
    for length in [8, 16, 24, 40] {
        assert_eq!(option(10, length, usize::from(length)), asks::KNOWN, "a cookie of {length}");
    }
    for (code, length, data) in [(8, 8, 8), (10, 7, 7), (10, 9, 9), (10, 41, 41), (10, 8, 16), (10, 16, 8), (10, 0, 0)]
    {
        assert_eq!(option(code, length, data), asks::OTHER, "{code} {length} {data}");
    }
}

#[test]
fn octets_that_only_look_like_a_name_are_none() {
    // One label with dots inside it, a pointer, a label that holds the zero of the root.
    let mut one = vec![25];
    one.extend(b"db.shop.svc.cluster.local");
    one.push(0);
    let mut pointer = octets("db.shop.svc");
    pointer.truncate(pointer.len() - 1);
    pointer.extend([0xc0, 12]);
    let mut inside = vec![60];
    inside.extend(octets("db.shop.svc.cluster.local"));
    for name in [one, pointer, inside] {
        assert_ne!(asked(&message(PLAIN, &name, 1, 1, &[0; 64])), asks::KNOWN, "{name:?}");
    }
    // Names of 255 octets are read, longer ones are not names.
    let long = ["a".repeat(63), "b".repeat(63), "c".repeat(63), "d".repeat(47)].join(".") + ".cluster.local";
    assert_eq!(octets(&long).len(), 255);
    assert_eq!(asked(&query(&long)), asks::STRANGE);
    let endless: Vec<u8> = [63].into_iter().chain([b'a'; 63]).cycle().take(320).collect();
    assert_eq!(asked(&message(PLAIN, &endless, 1, 1, &[])), asks::OTHER);
}

#[test]
fn the_hash_is_siphash() {
    for name in ["db.shop.svc.cluster.local", "A.b", &"x".repeat(63)] {
        let mut octets = [0; 256];
        let length = wire(name, &mut octets).unwrap();
        #[allow(deprecated, reason = "as above")]
        let mut sip = SipHasher::new_with_keys(KEY[0], KEY[1]);
        sip.write(&octets[..length.div_ceil(8) * 8]);
        assert_eq!(hash(&KEY, name), Some(sip.finish()), "{name}");
        assert_ne!(hash(&[7, 12], name), Some(sip.finish()));
    }
    for none in ["", "a..b", &"x".repeat(64), &["y".repeat(63).as_str(); 4].join(".")] {
        assert_eq!(hash(&KEY, none), None, "{none}");
    }
}

#[test]
fn the_verdict_steers_what_is_not_a_services_name() {
    let mut w = world::<false>();
    w.naming = naming(&["cluster.local"]);
    w.names = known();
    w.cluster_dns.insert((addr("fd00:10:244::53"), 53));
    let strange = query("www.example.com.shop.svc.cluster.local");
    let (service, other) = (query("db.shop.svc.cluster.local"), query("www.example.com"));
    let servers = [(0, DNS.0, DNS.1), (1, "fd00:10:244::53", 53)];
    let pod = |of: (&'static str, &'static str, u32), family| if family == 0 { of.0 } else { of.1 };
    for dns in [1, 0] {
        w.scopes.insert(1, Scope { owner: 1, pair: 0, dns });
        for (family, server, port) in servers {
            for of in [ISOLATED, GUARDED, AUDITED] {
                let said = |payload: &[u8]| decide(&w, &frame(pod(of, family), server, port, payload), of.2);
                let passes = said(&service);
                assert_eq!((passes.action, passes.audit), (Action::Pass, false), "{of:?}");
                assert_eq!(passes.cluster, of == ISOLATED, "translated, it must still go to the cluster");
                assert_eq!(said(&other).action, Action::Steer, "{of:?}");
                let absent = if dns == 0 { Action::NoName } else { Action::Steer };
                assert_eq!(said(&strange).action, absent, "{of:?}, {dns}");
            }
        }
        // Not the cluster's DNS: neither.
        let elsewhere = frame(ISOLATED.0, "198.51.100.1", 53, &service);
        assert_eq!(decide(&w, &elsewhere, ISOLATED.2).action, Action::Steer);
    }
    // Nobody serves the scope.
    w.scopes.clear();
    let said = |of: (&str, &str, u32), payload: &[u8]| decide(&w, &frame(of.0, DNS.0, DNS.1, payload), of.2);
    assert_eq!(said(ISOLATED, &service).action, Action::Pass);
    assert_eq!(
        (said(ISOLATED, &strange).action, said(ISOLATED, &strange).code),
        (Action::NoName, Code::NoGateway as u8)
    );
    assert_eq!((said(ISOLATED, &other).action, said(ISOLATED, &other).code), (Action::Drop, Code::NoGateway as u8));
    assert_eq!(said(GUARDED, &strange).action, Action::Pass);
    assert!(w.endpoints.values().all(|e| e.flags & endpoint::TOUCHED != 0));
    // Something inside is yet to be written.
    let question = frame(ISOLATED.0, DNS.0, DNS.1, &service);
    let (mut p, mut d) = (Packet::default(), Decision::default());
    let parsed = parse(&question.as_slice(), ethertype(&question), &mut p);
    *w.frame.borrow_mut() = question;
    for (marks, said) in [(0, (Action::Pass, Code::Allowed)), (mark::INNER, (Action::Drop, Code::NoGateway))] {
        p.marks |= marks;
        verdict(parsed, &p, ISOLATED.2, &w, &mut d);
        assert_eq!((d.action, d.code), (said.0, said.1 as u8));
    }
    // Fragments are not read.
    let mut first = frame(ISOLATED.0, DNS.0, DNS.1, &service);
    first[20] |= 0x20;
    assert_eq!(decide(&w, &first, ISOLATED.2).action, Action::Drop);
}

#[test]
fn a_gateway_takes_every_question() {
    let mut w = world::<true>();
    w.naming = naming(&["cluster.local"]);
    w.names = known();
    let d = decide(&w, &frame(ISOLATED.0, DNS.0, DNS.1, &query("db.shop.svc.cluster.local")), ISOLATED.2);
    assert_eq!(d.action, Action::Steer);
}

proptest! {
    #[test]
    fn what_is_known_was_asked_for(payload in prop::collection::vec(any::<u8>(), 0..120), at in 0..60usize, by in any::<u8>()) {
        let mut changed = message(PLAIN, &octets("db.shop.svc.cluster.local"), 1, 1, &OPT);
        changed[5..][at % 40] ^= by;
        for payload in [&payload, &changed] {
            if asked(payload) == asks::KNOWN {
                prop_assert_eq!(&payload[4..6], &[0, 1]);
                prop_assert!(payload[12..39].eq_ignore_ascii_case(&octets("db.shop.svc.cluster.local")));
            }
        }
    }
}
