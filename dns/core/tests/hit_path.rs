//! What a pod gets: the hit path against a scripted policy, its replies read by another parser.
#![allow(clippy::unwrap_used, reason = "a test may fail")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::IpAddr;

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::{RData, RecordType};
use proptest::prelude::*;
use tidegate_dns_core::answer::{check, upstream_query};
use tidegate_dns_core::wire::{Parsed, parse};
use tidegate_dns_core::{
    AddressDecision, Allow, AskMode, Asker, Denial, NameDecision, Outcome, Scratch, Served, Store, StoreLimits, serve,
};
use tidegate_policy::event::Verdict;
use tidegate_policy::{Reason, ScopeKey};

mod wiring;
use wiring::{Holds, Rr, Table, a, aaaa, allow, answer, asker, cname, deny, key, name, query, rr, rules};

thread_local!(static ALLOCATIONS: Cell<u64> = const { Cell::new(0) });

struct Counting;

// SAFETY: every call goes to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|c| c.set(c.get() + 1));
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Bench {
    store: Store,
    view: Table,
    asker: Asker,
    scratch: Scratch,
    now: u64,
    holds: bool,
    udp: bool,
}

impl Bench {
    fn new(view: Table, mode: AskMode) -> Self {
        let store = Store::new(StoreLimits::default(), [1, 2, 3, 4]);
        Self { store, view, asker: asker(mode), scratch: Scratch::new(), now: 1000, holds: true, udp: true }
    }

    fn learn(&mut self, n: &str, qtype: u16, rcode: u8, rrs: &[Rr]) {
        let soa = rr("example", 6, 30, [&[0, 0][..], &[0; 16], &30u32.to_be_bytes()].concat());
        let sent = upstream_query(&key(n, qtype), 1, &[0; 32], true);
        let stored = check(&sent, &answer(&sent, rcode, rrs, &[soa]), true, self.now, 3600).unwrap();
        self.store.insert(self.asker.scope, &stored, self.now);
    }

    fn serve(&mut self, bytes: &[u8]) -> Option<Outcome> {
        let Parsed::Query(q) = parse(bytes) else { panic!() };
        let limit = if self.udp { q.udp_limit() } else { 65_535 };
        let holds = Holds(self.holds);
        let r = rules();
        match serve(&q, &self.asker, &self.view, &holds, &self.store, &r, self.now, limit, &mut self.scratch) {
            Served::Reply { outcome, .. } => Some(outcome),
            Served::Miss => None,
        }
    }

    fn ask(&mut self, n: &str, qtype: u16) -> Option<(Outcome, Message)> {
        let outcome = self.serve(&query(n, qtype, 0, Some(1232)))?;
        let m = Message::from_vec(&self.scratch.out).unwrap();
        assert_eq!(m.metadata.response_code, ResponseCode::from(0, outcome.rcode));
        Some((outcome, m))
    }

    fn denied(&mut self, n: &str, qtype: u16) -> (Reason, u8) {
        let (o, m) = self.ask(n, qtype).unwrap();
        assert_eq!(o.verdict, Verdict::Deny);
        assert!(m.answers.is_empty());
        assert_eq!(m.authorities.len(), 1, "a SOA");
        assert_eq!(m.authorities[0].ttl, 5);
        (o.reason, o.rcode)
    }
}

fn ips(m: &Message) -> Vec<IpAddr> {
    m.answers.iter().filter_map(|r| r.data.ip_addr()).collect()
}

#[test]
fn an_allowed_name_is_answered_with_its_chain_and_what_is_left_of_the_ttl() {
    let mut b = Bench::new(Table::allowing(&["www.example.com"]), AskMode::Enforced);
    assert!(b.ask("www.example.com", 1).is_none(), "a miss");
    b.learn(
        "www.example.com",
        1,
        0,
        &[
            cname("www.example.com", 60, "cdn.example.net"),
            cname("cdn.example.net", 60, "edge.example.net"),
            a("edge.example.net", 60, [192, 0, 2, 1]),
            a("edge.example.net", 60, [192, 0, 2, 2]),
        ],
    );
    b.now += 10_600;
    let (o, m) = b.ask("WwW.Example.com", 1).unwrap();
    assert_eq!((o.verdict, o.reason), (Verdict::Allow, Reason::Allowed));
    assert_eq!(m.queries[0].name().to_string(), "WwW.Example.com.");
    assert_eq!(m.answers.len(), 4);
    assert_eq!(m.answers[0].record_type(), RecordType::CNAME);
    assert_eq!(m.answers[1].name.to_string(), "cdn.example.net.");
    assert_eq!(m.answers[2].name.to_string(), "edge.example.net.");
    assert!(m.answers.iter().all(|r| r.ttl == 49));
    assert_eq!(ips(&m), b.scratch.sent);
    b.now += 60_000;
    assert!(b.ask("www.example.com", 1).is_none(), "expired");
}

#[test]
fn addresses_take_turns() {
    let mut b = Bench::new(Table::allowing(&["a.example"]), AskMode::Enforced);
    b.learn("a.example", 1, 0, &[a("a.example", 60, [192, 0, 2, 1]), a("a.example", 60, [192, 0, 2, 2])]);
    let mut first = |id| {
        b.serve(&query("a.example", 1, id, None)).unwrap();
        b.scratch.sent[0]
    };
    assert_ne!(first(4), first(5));
}

#[test]
fn nothing_is_sent_before_it_stands() {
    let mut b = Bench::new(Table::allowing(&["a.example"]), AskMode::Enforced);
    b.learn("a.example", 1, 0, &[a("a.example", 60, [192, 0, 2, 1])]);
    b.holds = false;
    assert!(b.ask("a.example", 1).is_none());
    b.view.default = Some(NameDecision::Resolve { reason: Reason::Allowed, rule: None });
    b.learn("open.example", 1, 0, &[a("open.example", 60, [192, 0, 2, 1])]);
    assert!(b.ask("open.example", 1).is_some(), "what does not bind need not stand");
}

#[test]
fn denials_say_what_the_policy_says() {
    let view = Table::allowing(&["www.example.com"])
        .with("example.com", deny(Denial::NoData, Reason::NameNotAllowed))
        .with("refused.example", deny(Denial::Refused, Reason::NameNotAllowed));
    let mut b = Bench::new(view, AskMode::Enforced);
    assert_eq!(b.denied("evil.example", 1), (Reason::NameNotAllowed, 3));
    assert_eq!(b.denied("example.com", 1), (Reason::NameNotAllowed, 0));
    assert_eq!(b.denied("www.example.com", 16), (Reason::DnsType, 0));
    assert_eq!(b.denied("www.example.com", 255), (Reason::DnsType, 0));
    let o = b.serve(&query("refused.example", 1, 1, None)).unwrap();
    assert_eq!(o.rcode, 5);
}

#[test]
fn encrypted_resolvers_and_canary_are_denied_even_below_a_star() {
    let view = Table { default: Some(NameDecision::Allow(allow())), ..Table::default() };
    let mut b = Bench::new(view, AskMode::Enforced);
    for n in ["dns.google", "x1.dns.nextdns.io", "use-application-dns.net"] {
        assert_eq!(b.denied(n, 1), (Reason::EncryptedDns, 3), "{n}");
    }
    assert_eq!(b.denied("_dns.resolver.arpa", 64), (Reason::EncryptedDns, 0));
    b.learn("cdn.example", 1, 0, &[cname("cdn.example", 9, "dns.google"), a("dns.google", 9, [192, 0, 2, 8])]);
    assert_eq!(b.denied("cdn.example", 1), (Reason::EncryptedDns, 0), "behind an alias");
    b.learn("ip.example", 1, 0, &[a("ip.example", 9, [8, 8, 8, 8])]);
    assert_eq!(b.denied("ip.example", 1), (Reason::EncryptedDns, 0), "by address");
}

#[test]
fn a_deny_holds_behind_an_alias() {
    let view = Table::allowing(&["a.example"]).with("bad.example", deny(Denial::NxDomain, Reason::DeniedByPolicy));
    let mut b = Bench::new(view, AskMode::Enforced);
    b.learn("a.example", 1, 0, &[cname("a.example", 9, "bad.example"), a("bad.example", 9, [192, 0, 2, 1])]);
    assert_eq!(b.denied("a.example", 1), (Reason::DeniedByPolicy, 0));
    b.learn("a.example", 1, 0, &[cname("a.example", 9, "unlisted.example"), a("unlisted.example", 9, [192, 0, 2, 1])]);
    assert_eq!(b.ask("a.example", 1).unwrap().0.reason, Reason::Allowed, "an alias need not be allowed");
}

#[test]
fn the_rebinding_filter_leaves_what_is_public() {
    let mut b = Bench::new(Table::allowing(&["a.example", "b.example"]), AskMode::Enforced);
    b.view.addresses.insert("10.20.0.9".parse().unwrap(), AddressDecision::Accept);
    b.view.addresses.insert("127.0.0.9".parse().unwrap(), AddressDecision::Accept);
    b.view.addresses.insert("192.0.2.66".parse().unwrap(), AddressDecision::Filter(Reason::Rebinding));
    let all = [
        [10, 0, 0, 1],
        [192, 0, 2, 1],
        [127, 0, 0, 1],
        [169, 254, 169, 254],
        [10, 20, 0, 9],
        [127, 0, 0, 9],
        [192, 0, 2, 66],
    ];
    b.learn("a.example", 1, 0, &all.map(|ip| a("a.example", 60, ip)));
    let (_, m) = b.ask("a.example", 1).unwrap();
    assert_eq!(ips(&m), ["192.0.2.1".parse::<IpAddr>().unwrap(), "10.20.0.9".parse().unwrap()]);
    b.learn("b.example", 1, 0, &[a("b.example", 60, [10, 0, 0, 1])]);
    assert_eq!(b.denied("b.example", 1), (Reason::Rebinding, 0));
    b.learn("b.example", 28, 0, &[aaaa("b.example", 60, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, 1])]);
    assert_eq!(b.denied("b.example", 28), (Reason::Rebinding, 0));
}

#[test]
fn a_family_that_the_pool_lacks_is_empty() {
    let mut b = Bench::new(Table::allowing(&["a.example"]), AskMode::Enforced);
    b.asker.v6 = false;
    assert_eq!(b.denied("a.example", 28), (Reason::NoEgressFamily, 0));
    b.asker.mode = AskMode::Audited;
    assert!(b.ask("a.example", 28).is_none(), "audited pods use their own way out");
}

#[test]
fn audit_resolves_everything_and_says_what_it_would_do() {
    let mut b = Bench::new(Table::allowing(&["ok.example"]), AskMode::Audited);
    b.holds = false;
    b.learn("evil.example", 1, 0, &[a("evil.example", 60, [10, 0, 0, 1])]);
    let (o, m) = b.ask("evil.example", 1).unwrap();
    assert_eq!((o.verdict, o.reason, ips(&m).len()), (Verdict::Audit, Reason::NameNotAllowed, 1));
    b.learn("dns.google", 1, 0, &[a("dns.google", 60, [8, 8, 8, 8])]);
    assert_eq!(b.ask("dns.google", 1).unwrap().0.reason, Reason::EncryptedDns);
    b.learn("ok.example", 16, 0, &[rr("ok.example", 16, 60, b"\x02hi".to_vec())]);
    assert_eq!(b.ask("ok.example", 16).unwrap().0.reason, Reason::DnsType);
    b.learn("ok.example", 1, 0, &[a("ok.example", 60, [10, 0, 0, 1])]);
    let (o, m) = b.ask("ok.example", 1).unwrap();
    assert_eq!((o.verdict, o.reason, ips(&m).len()), (Verdict::Audit, Reason::Rebinding, 1));
    b.learn("ok.example", 1, 0, &[a("ok.example", 60, [192, 0, 2, 1])]);
    assert!(b.ask("ok.example", 1).is_none(), "an allowed name binds in audit too");
}

#[test]
fn guarded_pods_only_meet_denies() {
    let open = NameDecision::Resolve { reason: Reason::Allowed, rule: None };
    let view = Table { default: Some(open), ..Table::default() }
        .with("bad.example", deny(Denial::NxDomain, Reason::DeniedByPolicy));
    let mut b = Bench::new(view, AskMode::Guarded);
    b.holds = false;
    b.asker.v4 = false;
    b.learn("corp.example", 1, 0, &[a("corp.example", 60, [10, 0, 0, 1])]);
    assert_eq!(ips(&b.ask("corp.example", 1).unwrap().1).len(), 1);
    b.learn("t.example", 16, 0, &[rr("t.example", 16, 60, b"\x02hi".to_vec())]);
    assert_eq!(b.ask("t.example", 16).unwrap().1.answers.len(), 1);
    assert_eq!(b.denied("bad.example", 1), (Reason::DeniedByPolicy, 3));
}

#[test]
fn guarded_pods_bind_where_the_view_asks_for_it() {
    // A deny of some ports of a name holds in the kernel, which has to know the name's addresses.
    let mut b = Bench::new(Table::allowing(&["partly.example"]), AskMode::Guarded);
    b.holds = false;
    b.learn("partly.example", 1, 0, &[a("partly.example", 60, [192, 0, 2, 1])]);
    assert!(b.ask("partly.example", 1).is_none());
}

#[test]
fn open_filter_resolves_without_binding() {
    let open = NameDecision::Resolve { reason: Reason::Allowed, rule: None };
    let mut b = Bench::new(Table { default: Some(open), ..Table::default() }, AskMode::Enforced);
    b.holds = false;
    b.learn("a.example", 1, 0, &[a("a.example", 60, [192, 0, 2, 1]), a("a.example", 60, [10, 0, 0, 1])]);
    assert_eq!(ips(&b.ask("a.example", 1).unwrap().1).len(), 1);
    assert_eq!(b.denied("a.example", 16), (Reason::DnsType, 0));
}

#[test]
fn cluster_answers_pass_unless_they_lead_out() {
    let mut b = Bench::new(Table::allowing(&["ok.example"]), AskMode::Enforced);
    b.holds = false;
    let svc = "web.shop.svc.cluster.local";
    b.learn(svc, 1, 0, &[a(svc, 5, [10, 96, 0, 7])]);
    assert_eq!(ips(&b.ask(svc, 1).unwrap().1).len(), 1);
    let many: Vec<Rr> = (0..100).map(|i| a("pods.shop.svc.cluster.local", 5, [10, 244, 0, i])).collect();
    b.learn("pods.shop.svc.cluster.local", 1, 0, &many);
    b.udp = false;
    assert_eq!(ips(&b.ask("pods.shop.svc.cluster.local", 1).unwrap().1).len(), 100);
    let ext = "ext.shop.svc.cluster.local";
    b.learn(ext, 1, 0, &[cname(ext, 5, "evil.example"), a("evil.example", 5, [192, 0, 2, 1])]);
    assert_eq!(b.denied(ext, 1), (Reason::NameNotAllowed, 0));
    b.learn(
        ext,
        1,
        0,
        &[cname(ext, 5, "ok.example"), a("ok.example", 5, [192, 0, 2, 1]), a("ok.example", 5, [10, 0, 0, 1])],
    );
    assert!(b.ask(ext, 1).is_none(), "an allowed target binds");
    b.holds = true;
    assert_eq!(ips(&b.ask(ext, 1).unwrap().1).len(), 1, "and is filtered");
}

fn https(priority: u16, target: &str, params: &[(u16, &[u8])]) -> Vec<u8> {
    let mut r = priority.to_be_bytes().to_vec();
    r.extend(name(target));
    for (k, v) in params {
        r.extend(k.to_be_bytes());
        r.extend((v.len() as u16).to_be_bytes());
        r.extend(*v);
    }
    r
}

#[test]
fn https_records_keep_only_what_is_allowed() {
    let view = Table::allowing(&["a.example"]).with("e.example", NameDecision::Allow(Allow { ech: true, ..allow() }));
    let mut b = Bench::new(view, AskMode::Enforced);
    let records = [
        https(1, ".", &[(1, b"\x02h2"), (4, &[192, 0, 2, 1, 10, 0, 0, 1]), (5, b"ech")]),
        https(2, "a.example", &[(3, &[1, 187])]),
        https(3, "other.example", &[(1, b"\x02h2")]),
        https(4, ".", &[(3, &[31, 144])]),
        https(5, ".", &[(0, &[0, 5]), (5, b"ech")]),
        https(0, "other.example", &[]),
    ];
    b.learn("a.example", 65, 0, &records.map(|r| rr("a.example", 65, 60, r)));
    let (_, m) = b.ask("a.example", 65).unwrap();
    let raw = b.scratch.out.clone();
    assert_eq!(m.answers.len(), 2);
    assert_eq!(b.scratch.sent, ["192.0.2.1".parse::<IpAddr>().unwrap()]);
    assert!(!raw.windows(3).any(|w| w == b"ech") && !raw.windows(4).any(|w| w == [10, 0, 0, 1]));
    b.holds = false;
    assert!(b.ask("a.example", 65).is_none(), "hints bind first");
    b.learn("e.example", 65, 0, &[rr("e.example", 65, 60, https(1, ".", &[(5, b"ech")]))]);
    assert_eq!(b.ask("e.example", 65).unwrap().1.answers.len(), 1);
    assert!(b.scratch.out.windows(3).any(|w| w == b"ech"));
}

#[test]
fn upstream_negatives_pass_with_a_short_soa() {
    let mut b = Bench::new(Table::allowing(&["no.example", "empty.example"]), AskMode::Enforced);
    b.learn("no.example", 1, 3, &[]);
    let (o, m) = b.ask("no.example", 1).unwrap();
    assert_eq!((o.verdict, o.rcode, m.authorities[0].ttl), (Verdict::Allow, 3, 5));
    b.learn("empty.example", 1, 0, &[cname("empty.example", 60, "x.example")]);
    let (o, m) = b.ask("empty.example", 1).unwrap();
    assert_eq!((o.rcode, m.answers.len(), m.authorities.len()), (0, 1, 1));
}

#[test]
fn what_does_not_fit_is_truncated() {
    let mut b = Bench::new(Table::allowing(&["big.example"]), AskMode::Enforced);
    let many: Vec<Rr> = (1..=60).map(|i| a("big.example", 60, [192, 0, 2, i])).collect();
    b.learn("big.example", 1, 0, &many);
    b.serve(&query("big.example", 1, 0, None)).unwrap();
    let m = Message::from_vec(&b.scratch.out).unwrap();
    assert!(m.metadata.truncation && b.scratch.out.len() <= 512);
    assert_eq!(ips(&m), b.scratch.sent);
    let (_, m) = b.ask("big.example", 1).unwrap();
    assert!(!m.metadata.truncation && b.scratch.out.len() <= 1232);
    assert_eq!(m.answers.len(), 60);
    // A client may not ask for more than fits a packet.
    b.serve(&query("big.example", 1, 0, Some(100))).unwrap();
    assert!(b.scratch.out.len() <= 512);
}

#[test]
fn scopes_do_not_see_each_other() {
    let mut b = Bench::new(Table::allowing(&["a.example"]), AskMode::Enforced);
    b.learn("a.example", 1, 0, &[a("a.example", 60, [192, 0, 2, 1])]);
    b.asker.scope = ScopeKey(2);
    assert!(b.ask("a.example", 1).is_none());
    b.asker.scope = ScopeKey(1);
    assert!(b.ask("a.example", 1).is_some());
    b.store.flush(ScopeKey(1));
    assert!(b.ask("a.example", 1).is_none());
}

#[test]
fn the_store_is_bounded_per_scope() {
    let mut b = Bench::new(Table::default(), AskMode::Enforced);
    b.store = Store::new(StoreLimits { answers: 10, bytes: 1 << 20 }, [1, 2, 3, 4]);
    b.learn("kept.example", 1, 0, &[a("kept.example", 60, [192, 0, 2, 1])]);
    b.asker.scope = ScopeKey(2);
    for i in 0..1000 {
        let n = format!("n{i}.example");
        b.learn(&n, 1, 0, &[a(&n, 60, [192, 0, 2, 1])]);
        assert!(b.store.len(ScopeKey(2)) <= 10);
        assert!(b.store.get(ScopeKey(2), &key(&n, 1), b.now).is_some());
    }
    assert!(b.store.get(ScopeKey(1), &key("kept.example", 1), b.now).is_some(), "another scope keeps its own");
    b.store.sweep(b.now + 61_000);
    assert_eq!((b.store.len(ScopeKey(1)), b.store.len(ScopeKey(2))), (0, 0));
    // Octets are a bound of their own.
    b.store = Store::new(StoreLimits { answers: 1000, bytes: 2000 }, [1, 2, 3, 4]);
    for i in 0..100 {
        let n = format!("t{i}.example");
        b.learn(&n, 16, 0, &[rr(&n, 16, 60, vec![b'x'; 200])]);
        assert!(b.store.len(ScopeKey(2)) <= 8);
    }
}

#[test]
fn the_types_of_a_name_are_kept_and_end_apart() {
    let mut b = Bench::new(Table::allowing(&["a.example"]), AskMode::Enforced);
    let v6 = |last| [0x26, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last];
    let asked = |b: &mut Bench, qtype| b.ask("a.example", qtype).map(|(_, m)| (ips(&m), m.answers[0].ttl));
    let first: IpAddr = [192, 0, 2, 1].into();
    b.learn("a.example", 28, 0, &[aaaa("a.example", 300, v6(1))]);
    b.learn("a.example", 1, 0, &[cname("a.example", 60, "b.example"), a("b.example", 60, [192, 0, 2, 1])]);
    assert_eq!(asked(&mut b, 1), Some((vec![first], 60)));
    assert_eq!(asked(&mut b, 28), Some((vec![v6(1).into()], 300)));
    assert!(asked(&mut b, 65).is_none());
    assert_eq!(b.store.len(ScopeKey(1)), 2);
    // One is replaced, the other stays as it is.
    b.learn("a.example", 28, 0, &[aaaa("a.example", 200, v6(2))]);
    assert_eq!(asked(&mut b, 28), Some((vec![v6(2).into()], 200)));
    assert_eq!(asked(&mut b, 1), Some((vec![first], 60)));
    assert_eq!(b.store.len(ScopeKey(1)), 2);
    // One expires, and leaves with the next answer or by itself.
    b.now += 61_000;
    assert!(asked(&mut b, 1).is_none());
    assert_eq!(asked(&mut b, 28), Some((vec![v6(2).into()], 139)));
    b.store.sweep(b.now);
    assert_eq!(asked(&mut b, 28), Some((vec![v6(2).into()], 139)));
    b.learn("a.example", 65, 0, &[rr("a.example", 65, 60, https(1, ".", &[]))]);
    assert_eq!(b.store.len(ScopeKey(1)), 2);
    // TTL 0 only takes away what was there.
    b.learn("a.example", 28, 0, &[aaaa("a.example", 0, v6(3))]);
    assert_eq!(b.store.len(ScopeKey(1)), 1);
    assert!(asked(&mut b, 28).is_none());
    b.now += 61_000;
    b.store.sweep(b.now);
    assert_eq!(b.store.len(ScopeKey(1)), 0);
}

#[test]
fn an_answer_in_the_old_half_stays_beside_a_new_one() {
    let mut b = Bench::new(Table::default(), AskMode::Enforced);
    b.store = Store::new(StoreLimits { answers: 4, bytes: 1 << 20 }, [1, 2, 3, 4]);
    let there = |b: &Bench, qtype| b.store.get(ScopeKey(1), &key("a.example", qtype), b.now).is_some();
    b.learn("a.example", 1, 0, &[a("a.example", 60, [192, 0, 2, 1])]);
    for n in ["b.example", "c.example"] {
        b.learn(n, 1, 0, &[a(n, 60, [192, 0, 2, 1])]);
    }
    assert!(there(&b, 1), "in the old half now");
    b.learn("a.example", 28, 0, &[aaaa("a.example", 60, [1; 16])]);
    assert!(there(&b, 1) && there(&b, 28));
    b.learn("a.example", 1, 0, &[a("a.example", 0, [192, 0, 2, 1])]);
    assert!(!there(&b, 1) && there(&b, 28));
}

#[test]
fn many_types_of_one_name_stay_within_the_bounds() {
    let mut b = Bench::new(Table::default(), AskMode::Enforced);
    b.store = Store::new(StoreLimits { answers: 10, bytes: 4000 }, [1, 2, 3, 4]);
    for t in 1000..1100 {
        b.learn("a.example", t, 0, &[rr("a.example", t, 60, vec![b'x'; 500])]);
        assert!(b.store.len(ScopeKey(1)) <= 4);
        assert!(b.store.get(ScopeKey(1), &key("a.example", t), b.now).is_some(), "the last one is there");
    }
    for t in 1000..1100 {
        b.learn("a.example", t, 0, &[rr("a.example", t, 60, vec![b'x'; 5])]);
        assert!(b.store.len(ScopeKey(1)) <= 10);
    }
    // With room for all in the scope, a name keeps the newest: they are copied with each new one.
    b.store = Store::new(StoreLimits::default(), [1, 2, 3, 4]);
    for t in 1000..1100 {
        b.learn("a.example", t, 0, &[rr("a.example", t, 60, vec![b'x'; 5])]);
    }
    assert_eq!(b.store.len(ScopeKey(1)), 16);
    assert!((1084..1100).all(|t| b.store.get(ScopeKey(1), &key("a.example", t), b.now).is_some()));
}

#[test]
fn the_hit_path_allocates_nothing() {
    let mut b = Bench::new(Table::allowing(&["www.example.com", "h.example"]), AskMode::Enforced);
    let many: Vec<Rr> = (1..=40).map(|i| a("cdn.example.net", 60, [192, 0, 2, i])).collect();
    b.learn("www.example.com", 1, 0, &[&[cname("www.example.com", 60, "cdn.example.net")][..], &many].concat());
    b.learn("h.example", 65, 0, &[rr("h.example", 65, 60, https(1, ".", &[(4, &[192, 0, 2, 1]), (5, b"ech")]))]);
    let r = rules();
    for bytes in [
        query("www.example.com", 1, 7, Some(1232)),
        query("h.example", 65, 7, None),
        query("evil.example", 1, 7, Some(1232)),
    ] {
        let before = ALLOCATIONS.with(Cell::get);
        let Parsed::Query(q) = parse(&bytes) else { panic!() };
        let limit = q.udp_limit();
        let s = serve(&q, &b.asker, &b.view, &Holds(true), &b.store, &r, b.now, limit, &mut b.scratch);
        assert_eq!(ALLOCATIONS.with(Cell::get), before);
        assert!(matches!(s, Served::Reply { .. }));
    }
}

proptest! {
    #[test]
    fn any_stored_answer_gives_a_reply_that_parses(
        raw in proptest::collection::vec((any::<[u8; 4]>(), 0u32..100), 0..80),
        id in any::<u16>(),
        edns in proptest::option::of(any::<u16>()),
        mode in 0..3,
    ) {
        let mode = [AskMode::Enforced, AskMode::Audited, AskMode::Guarded][mode as usize];
        let mut b = Bench::new(Table::allowing(&["a.example"]), mode);
        let rrs: Vec<Rr> = raw.iter().map(|(ip, ttl)| a("b.example", ttl + 1, *ip)).collect();
        b.learn("a.example", 1, 0, &[&[cname("a.example", 50, "b.example")][..], &rrs].concat());
        let q = query("a.example", 1, id, edns);
        b.serve(&q).unwrap();
        let m = Message::from_vec(&b.scratch.out).unwrap();
        prop_assert_eq!(m.metadata.id, id);
        prop_assert!(b.scratch.out.len() <= edns.map_or(512, |s| usize::from(s).clamp(512, 1232)));
        prop_assert!(m.edns.is_some() == edns.is_some());
        if mode == AskMode::Enforced {
            for r in &m.answers {
                if let RData::A(ip) = &r.data {
                    prop_assert!(!ip.0.is_private() && !ip.0.is_loopback() && !ip.0.is_link_local());
                }
            }
        }
    }
}
