//! The hit path beside the slow path, on answers and policy that nobody wrote: what a pod is told the second time, out
//! of the store, is what it was told the first time, after a resolver was asked and addresses were bound.
#![allow(clippy::unwrap_used, reason = "a test may fail")]

use std::net::IpAddr;
use std::sync::Arc;

use hickory_proto::op::Message;
use tidegate_dns::DnsConfig;
use tidegate_dns_core::budget::BudgetLimits;
use tidegate_dns_core::{AddressDecision, Allow, AskMode, Denial, NameDecision};
use tidegate_policy::Reason;
use tidegate_random::Random;

mod bench;
use bench::wiring::{Rr, Table, a, aaaa, allow, answer, cname, deny, name, query, rr};
use bench::{Asked, Authority, Bench, Policy, config, pod};

/// Names that are asked for, each with every type.
const NAMES: u64 = 120;
const TYPES: [u16; 6] = [1, 28, 65, 64, 16, 5];

/// Answers out of random numbers.
struct Draw(Random);

impl Draw {
    fn below(&mut self, n: u64) -> u64 {
        self.0.below(n)
    }

    /// Of this text, always the same.
    fn of(text: &str, salt: u64) -> Self {
        Self(Random(text.bytes().fold(salt, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))))
    }

    fn v4(&mut self) -> [u8; 4] {
        const ALL: [[u8; 4]; 10] = [
            [192, 0, 2, 1],
            [198, 51, 100, 1],
            [10, 0, 0, 1],
            [10, 20, 0, 9],
            [127, 0, 0, 1],
            [169, 254, 169, 254],
            [8, 8, 8, 8],
            [192, 0, 2, 66],
            [100, 64, 0, 1],
            [224, 0, 0, 1],
        ];
        let mut ip = ALL[self.below(10) as usize];
        if ip[0] == 198 {
            ip[3] = self.below(256) as u8;
        }
        ip
    }

    fn v6(&mut self) -> [u8; 16] {
        let text = ["2001:db8::1", "2001:db8::2", "fd00::1", "::1", "::ffff:192.0.2.1", "64:ff9b::a00:1"];
        let IpAddr::V6(ip) = text[self.below(6) as usize].parse().unwrap() else { panic!("IPv6") };
        ip.octets()
    }

    fn svcb(&mut self) -> Vec<u8> {
        let mut r = (self.below(3) as u16).to_be_bytes().to_vec();
        r.extend(name(["", "x.example", "n1.example"][self.below(3) as usize]));
        let mut put = |key: u16, value: &[u8]| {
            r.extend(key.to_be_bytes());
            r.extend((value.len() as u16).to_be_bytes());
            r.extend(value);
        };
        if self.below(2) == 0 {
            put(1, b"\x02h2");
        }
        if self.below(3) == 0 {
            put(3, &[1, 187 + self.below(2) as u8]);
        }
        let (one, other, six) = (self.v4(), self.v4(), self.v6());
        if self.below(2) == 0 {
            put(4, &[one, other].concat());
        }
        if self.below(2) == 0 {
            put(5, b"ech");
        }
        if self.below(2) == 0 {
            put(6, &six);
        }
        r
    }

    /// What the resolver says.
    fn records(&mut self, asked: &str, qtype: u16) -> Vec<Rr> {
        let mut out = Vec::new();
        let mut owner = asked.to_owned();
        for i in 0..self.below(4) {
            let next = match self.below(6) {
                0 => "bad.example".to_owned(),
                1 => "dns.google".to_owned(),
                _ => format!("alias-{i}.example"),
            };
            // A loop is a broken answer, which has a test of its own.
            if next == owner || out.iter().any(|r: &Rr| r.owner == next) {
                break;
            }
            out.push(cname(&owner, 300, &next));
            owner = next;
        }
        for _ in 0..[0, 1, 1, 2, 5, 70][self.below(6) as usize] {
            let ttl = 200 + self.below(100) as u32;
            out.push(match qtype {
                1 => a(&owner, ttl, self.v4()),
                28 => aaaa(&owner, ttl, self.v6()),
                64 | 65 => rr(&owner, qtype, ttl, self.svcb()),
                _ => rr(&owner, 16, ttl, b"\x02hi".to_vec()),
            });
        }
        if qtype == 5 {
            out.retain(|r| r.rtype == 5);
        }
        out
    }
}

fn resolver(q: &Asked<'_>) -> Option<Vec<u8>> {
    let mut r = Draw::of(&q.name, u64::from(q.qtype));
    let records = r.records(&q.name, q.qtype);
    let rdata = [&name("m.example")[..], &name("r.example"), &[0; 16], &60u32.to_be_bytes()].concat();
    let code = if records.is_empty() && r.below(2) == 0 { 3 } else { 0 };
    Some(answer(q.bytes, code, &records, &[rr("example", 6, 60, rdata)]))
}

fn policy() -> Table {
    let mut table = Table::default();
    for n in 0..NAMES {
        let mut r = Random(n);
        let decision = match r.below(8) {
            0 => deny([Denial::NxDomain, Denial::NoData, Denial::Refused][n as usize % 3], Reason::DeniedByPolicy),
            1 => NameDecision::Resolve { reason: Reason::Allowed, rule: None },
            _ => NameDecision::Allow(Allow {
                ech: r.below(2) == 0,
                extra_type: r.below(2) == 0,
                wildcard: r.below(2) == 0,
                ..allow()
            }),
        };
        table = table.with(&format!("n{n}.example"), decision);
    }
    table.addresses.insert("10.20.0.9".parse().unwrap(), AddressDecision::Accept);
    table.addresses.insert("192.0.2.66".parse().unwrap(), AddressDecision::Filter(Reason::DeniedByPolicy));
    table.with("bad.example", deny(Denial::NxDomain, Reason::DeniedByPolicy))
}

#[test]
fn any_answer_is_the_same_out_of_the_store() {
    let up = Authority::start(resolver);
    // Names are new here, and below wildcards.
    let budget = BudgetLimits { names: 60_000, bytes: u32::MAX };
    let b = Bench::start(DnsConfig { budget, ..config(&[up.address]) }, Table::default());
    let (mut answered, mut denied, mut asked) = (0, 0, 0);
    for (i, mode) in [AskMode::Enforced, AskMode::Audited, AskMode::Guarded].into_iter().enumerate() {
        let (ip, mut asker) = pod(i as u8 + 1);
        asker.mode = mode;
        b.view.store(Arc::new(Policy { generation: 2 + i as u64, askers: [(ip, asker)].into(), table: policy() }));
        for n in 0..NAMES {
            for t in TYPES {
                let mut r = Random(n << 16 | u64::from(t));
                let edns = [None, Some(512), Some(1232)][r.below(3) as usize];
                let q = query(&format!("N{n}.example"), t, r.below(1 << 16) as u16, edns);
                let slow = b.raw(i as u8 + 1, &q);
                let before = up.asked();
                let hit = b.raw(i as u8 + 1, &q);
                assert_eq!(up.asked(), before, "n{n} {t}: the second time nobody is asked");
                let timeless = |bytes: &[u8]| {
                    let mut m = Message::from_vec(bytes).unwrap();
                    m.answers.iter_mut().for_each(|r| r.ttl = 0);
                    m
                };
                let (slow, hit) = (timeless(&slow), timeless(&hit));
                assert_eq!(slow.to_string(), hit.to_string(), "n{n} {t} {mode:?} {edns:?}");
                answered += usize::from(!hit.answers.is_empty());
                denied += usize::from(hit.answers.is_empty());
                asked += 1;
            }
        }
    }
    assert!(answered > asked / 5 && denied > asked / 5, "{answered} answered, {denied} denied of {asked}");
}
