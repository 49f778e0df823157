//! Scripted exchanges: pods, the service and its upstream, all on loopback.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::rdata::opt::{EdnsCode, EdnsOption};
use tidegate_dns::{ClusterDns, ClusterServers, DnsConfig, Protocol, ResolverGroup};
use tidegate_dns_core::budget::BudgetLimits;
use tidegate_dns_core::{Allow, AskMode, Denial, NameDecision};
use tidegate_policy::Reason;
use tidegate_policy::event::{Event, Verdict, What};

mod bench;
use bench::wiring::{Rr, Table, a, aaaa, allow, answer, cname, deny, name, query, rr};
use bench::{Asked, Authority, Bench, Policy, config, ips, pod, read_framed, write_framed};

/// One address for whatever is asked.
fn simple(q: &Asked<'_>) -> Option<Vec<u8>> {
    let records = if q.qtype == 28 { vec![aaaa(&q.name, 300, V6)] } else { vec![a(&q.name, 300, [192, 0, 2, 1])] };
    Some(answer(q.bytes, 0, &records, &[]))
}

const V6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

fn allowing(upstream: &Authority, names: &[&str]) -> Bench {
    Bench::start(config(&[upstream.address]), Table::allowing(names))
}

fn ede(m: &Message) -> Option<(u16, String)> {
    match m.edns.as_ref()?.options().get(EdnsCode::Unknown(15))? {
        EdnsOption::Unknown(_, v) => {
            Some((u16::from_be_bytes([v[0], v[1]]), String::from_utf8_lossy(&v[2..]).into_owned()))
        }
        _ => None,
    }
}

#[test]
fn an_allowed_name_resolves_binds_and_is_kept() {
    let up = Authority::start(simple);
    let b = allowing(&up, &["api.example.com"]);
    let m = b.ask(1, "API.Example.com", 1);
    assert_eq!(m.metadata.response_code, ResponseCode::NoError);
    assert_eq!(m.queries[0].name().to_string(), "API.Example.com.");
    assert_eq!(ips(&m)[0].to_string(), "192.0.2.1");
    {
        let requests = b.ledger.requests.lock();
        assert_eq!((&*requests[0].name, requests[0].ttl_secs), ("api.example.com", 300));
        assert_eq!(requests[0].asker, pod(1).1);
    }
    let e = b.last();
    assert_eq!((e.verdict, e.reason, e.count), (Verdict::Allow, Reason::Allowed, 1));
    assert_eq!(&*e.who.unwrap().namespace, "ns-1");
    for _ in 0..5 {
        b.ask(1, "api.example.com", 1);
    }
    assert_eq!((up.asked(), b.ledger.requests.lock().len()), (1, 1), "hits ask nobody");
    let total = || b.events.lock().iter().map(|e| e.count).sum::<u64>();
    let deadline = Instant::now() + Duration::from_secs(10);
    while total() < 6 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
    }
    let events = b.events.lock();
    assert_eq!(events.iter().map(|e| e.count).sum::<u64>(), 6, "every query is counted");
    let What::Dns { cached, answers, server, name, .. } = &events[events.len() - 1].what else { panic!() };
    assert!(*cached && answers.len() == 1 && *server == b.address && &**name == "api.example.com");
}

#[test]
fn replies_come_from_where_the_query_went() {
    let up = Authority::start(simple);
    let b = allowing(&up, &["a.example"]);
    for to in ["127.0.0.53", "127.3.2.1", "::1"] {
        let client = if to == "::1" { "[::1]:0" } else { "127.0.0.1:0" };
        let s = UdpSocket::bind(client).unwrap();
        s.set_read_timeout(Some(Duration::from_secs(4))).unwrap();
        s.connect(SocketAddr::new(to.parse().unwrap(), b.address.port())).unwrap();
        // A miss and a hit: they send differently.
        for id in [1, 2] {
            s.send(&query("a.example", 1, id, None)).unwrap();
            let mut buffer = [0; 512];
            let n = s.recv(&mut buffer).unwrap_or_else(|e| panic!("{to} {id}: {e}"));
            assert_eq!(Message::from_vec(&buffer[..n]).unwrap().metadata.id, id);
        }
        let What::Dns { server, .. } = b.last().what else { panic!() };
        assert_eq!(server.ip().to_string(), to);
    }
}

#[test]
fn a_denied_name_is_nxdomain_with_the_reason_over_udp_and_tcp() {
    let up = Authority::start(simple);
    let b = allowing(&up, &[]);
    let check = |m: &Message| {
        assert_eq!(m.metadata.response_code, ResponseCode::NXDomain);
        assert_eq!(m.authorities[0].ttl, 5);
        assert_eq!(ede(m), Some((15, "name-not-allowed".into())));
    };
    check(&b.ask(1, "evil.example", 1));
    let mut s = b.connect(1);
    write_framed(&mut s, &query("evil.example", 1, 1, Some(1232)));
    check(&Message::from_vec(&read_framed(&mut s).unwrap()).unwrap());
    let plain = Message::from_vec(&b.raw(1, &query("evil.example", 1, 1, None))).unwrap();
    assert!(plain.edns.is_none());
    assert_eq!(up.asked(), 0, "nobody hears of it");
    let e = b.last();
    assert_eq!((e.verdict, e.reason), (Verdict::Deny, Reason::NameNotAllowed));
}

#[test]
fn ancestors_and_types_are_empty() {
    let up = Authority::start(simple);
    let table = Table::allowing(&["www.example.com"]).with("example.com", deny(Denial::NoData, Reason::NameNotAllowed));
    let b = Bench::start(config(&[up.address]), table);
    for (n, t, reason) in [("example.com", 1, Reason::NameNotAllowed), ("www.example.com", 16, Reason::DnsType)] {
        let m = b.ask(1, n, t);
        assert_eq!((m.metadata.response_code, m.answers.len()), (ResponseCode::NoError, 0), "{n}");
        assert_eq!(b.last().reason, reason);
    }
    assert_eq!(up.asked(), 0);
}

#[test]
fn a_listed_type_resolves() {
    let up = Authority::start(|q| Some(answer(q.bytes, 0, &[rr(&q.name, 16, 60, b"\x05hello".to_vec())], &[])));
    let listed = NameDecision::Allow(Allow { extra_type: true, ..allow() });
    let b = Bench::start(config(&[up.address]), Table::default().with("t.example", listed));
    assert_eq!(b.ask(1, "t.example", 16).answers.len(), 1);
    assert!(b.ledger.requests.lock().is_empty(), "only addresses bind");
}

#[test]
fn what_is_cut_over_udp_is_whole_over_tcp() {
    let up = Authority::start(|q| {
        let many: Vec<Rr> = (1..=60).map(|i| a(&q.name, 300, [192, 0, 2, i])).collect();
        let mut m = answer(q.bytes, 0, &many, &[]);
        if !q.tcp {
            m = answer(q.bytes, 0, &[], &[]);
            m[2] |= 2;
        }
        Some(m)
    });
    let b = allowing(&up, &["big.example"]);
    for _ in 0..2 {
        let m = Message::from_vec(&b.raw(1, &query("big.example", 1, 1, None))).unwrap();
        assert!(m.metadata.truncation && m.answers.len() < 60);
        let mut s = b.connect(1);
        write_framed(&mut s, &query("big.example", 1, 1, None));
        let m = Message::from_vec(&read_framed(&mut s).unwrap()).unwrap();
        assert_eq!((m.metadata.truncation, m.answers.len()), (false, 60));
    }
    assert_eq!((up.asked(), up.tcp.load(std::sync::atomic::Ordering::Relaxed)), (1, 1));
}

#[test]
fn tcp_is_pipelined_and_out_of_order() {
    let up = Authority::start(|q| {
        if q.name == "slow.example" {
            std::thread::sleep(Duration::from_millis(250));
        }
        simple(q)
    });
    let b = allowing(&up, &["slow.example", "fast.example"]);
    let mut s = b.connect(1);
    write_framed(&mut s, &query("slow.example", 1, 1, None));
    write_framed(&mut s, &query("fast.example", 1, 2, None));
    write_framed(&mut s, &query("evil.example", 1, 3, None));
    let ids: Vec<u16> = (0..3).map(|_| Message::from_vec(&read_framed(&mut s).unwrap()).unwrap().metadata.id).collect();
    assert_eq!(ids, [3, 2, 1]);
}

#[test]
fn silent_connections_end_and_connections_are_bounded() {
    let up = Authority::start(simple);
    let c = DnsConfig { idle: Duration::from_millis(700), connections_per_namespace: 1, ..config(&[up.address]) };
    let b = Bench::start(c, Table::allowing(&["a.example"]));
    let mut first = b.connect(1);
    write_framed(&mut first, &query("a.example", 1, 1, None));
    assert!(read_framed(&mut first).is_some());
    let mut second = b.connect(1);
    assert!(read_framed(&mut second).is_none(), "over the namespace's bound");
    let mut other = b.connect(2);
    write_framed(&mut other, &query("a.example", 1, 1, None));
    assert!(read_framed(&mut other).is_some(), "another namespace has its own");
    let started = Instant::now();
    assert!(read_framed(&mut first).is_none(), "idle");
    assert!(started.elapsed() < Duration::from_secs(2));
    let mut stranger = b.connect(200);
    assert!(read_framed(&mut stranger).is_none(), "not a known pod");
}

#[test]
fn chains_are_followed_and_bind_to_the_question() {
    let up = Authority::start(|q| {
        Some(answer(
            q.bytes,
            0,
            &[cname(&q.name, 60, "cdn.example.net"), a("cdn.example.net", 20, [192, 0, 2, 7])],
            &[],
        ))
    });
    let b = allowing(&up, &["www.example.com"]);
    let m = b.ask(1, "www.example.com", 1);
    assert_eq!(m.answers.len(), 2);
    assert_eq!(m.answers[1].name.to_string(), "cdn.example.net.");
    let requests = b.ledger.requests.lock();
    assert_eq!((&*requests[0].name, requests[0].ttl_secs), ("www.example.com", 20));
}

#[test]
fn a_forged_answer_leads_to_tcp() {
    for what in ["id", "case", "name"] {
        let up = Authority::start(move |q| {
            let forged = a(&q.name, 300, [192, 0, 2, 66]);
            let mut m = answer(q.bytes, 0, &[forged], &[]);
            match what {
                _ if q.tcp => return simple(q),
                "id" => m[0] ^= 0xff,
                "case" => m[12..30].iter_mut().filter(|b| b.is_ascii_alphabetic()).for_each(|b| *b ^= 0x20),
                _ => m[13] = if m[13].eq_ignore_ascii_case(&b'x') { b'y' } else { b'x' },
            }
            Some(m)
        });
        let b = allowing(&up, &["somewhat-long.example.com"]);
        let m = b.ask(1, "somewhat-long.example.com", 1);
        assert_eq!(ips(&m)[0].to_string(), "192.0.2.1", "{what}");
        assert_eq!(up.tcp.load(std::sync::atomic::Ordering::Relaxed), 1);
    }
}

#[test]
fn a_lying_upstream_teaches_nothing() {
    let up = Authority::start(|q| {
        let lie = a("bank.example", 300, [192, 0, 2, 66]);
        Some(answer(q.bytes, 0, &[a(&q.name, 300, [192, 0, 2, 1]), lie], &[]))
    });
    let b = allowing(&up, &["a.example", "bank.example"]);
    let m = b.ask(1, "a.example", 1);
    assert_eq!(m.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(b.last().reason, Reason::DnsUpstream);
    assert_eq!(ede(&m), Some((22, "dns-upstream".into())));
    assert!(b.ledger.requests.lock().is_empty());
    // The failure is remembered for a while.
    let asked = up.asked();
    b.ask(1, "a.example", 1);
    assert_eq!(up.asked(), asked);
}

#[test]
fn private_addresses_are_filtered_and_never_bound() {
    let up = Authority::start(|q| {
        let good = a(&q.name, 300, [192, 0, 2, 1]);
        let bad = [a(&q.name, 300, [10, 0, 0, 1]), a(&q.name, 300, [169, 254, 169, 254])];
        let all = if q.name == "mixed.example" { [&bad[..], &[good]].concat() } else { bad.to_vec() };
        Some(answer(q.bytes, 0, &all, &[]))
    });
    let b = allowing(&up, &["mixed.example", "evil.example"]);
    for _ in 0..2 {
        let m = b.ask(1, "mixed.example", 1);
        assert_eq!(ips(&m).iter().map(ToString::to_string).collect::<Vec<_>>(), ["192.0.2.1"]);
        let m = b.ask(1, "evil.example", 1);
        assert_eq!((m.metadata.response_code, m.answers.len()), (ResponseCode::NoError, 0));
        assert_eq!(b.last().reason, Reason::Rebinding);
    }
    assert_eq!(b.ledger.bound.lock().len(), 1);
}

#[test]
fn many_that_ask_the_same_ask_once() {
    let up = Authority::start(|q| {
        std::thread::sleep(Duration::from_millis(600));
        simple(q)
    });
    let b = allowing(&up, &["a.example"]);
    let sockets: Vec<_> = (0..20).map(|_| b.socket(1)).chain([b.socket(2)]).collect();
    for (i, s) in sockets.iter().enumerate() {
        s.send(&query("a.example", 1, i as u16, None)).unwrap();
    }
    for (i, s) in sockets.iter().enumerate() {
        let mut buffer = [0; 512];
        let n = s.recv(&mut buffer).unwrap();
        let m = Message::from_vec(&buffer[..n]).unwrap();
        assert_eq!((m.metadata.id, ips(&m).len()), (i as u16, 1));
    }
    assert_eq!(up.asked(), 2, "once per scope: timing tells nothing");
}

#[test]
fn a_namespace_has_its_quota_of_queries_in_flight() {
    let up = Authority::start(|q| {
        std::thread::sleep(Duration::from_millis(800));
        simple(q)
    });
    let c = DnsConfig { in_flight_per_namespace: 2, ..config(&[up.address]) };
    let b = Bench::start(c, Table::allowing(&["a.example", "b.example", "c.example"]));
    let held: Vec<_> = ["a.example", "b.example"]
        .map(|n| {
            let s = b.socket(1);
            s.send(&query(n, 1, 1, None)).unwrap();
            s
        })
        .into();
    std::thread::sleep(Duration::from_millis(50));
    let started = Instant::now();
    assert_eq!(b.ask(1, "c.example", 1).metadata.response_code, ResponseCode::ServFail);
    assert!(started.elapsed() < Duration::from_millis(500), "refused at once");
    assert_eq!(b.last().reason, Reason::Quota);
    assert_eq!(ips(&b.ask(2, "c.example", 1)).len(), 1, "another namespace has its own");
    for s in held {
        assert!(s.recv(&mut [0; 512]).is_ok());
    }
    assert_eq!(ips(&b.ask(1, "c.example", 1)).len(), 1, "room comes back");
}

#[test]
fn an_answer_that_is_not_confirmed_is_not_sent() {
    let up = Authority::start(simple);
    let b = allowing(&up, &["a.example"]);
    *b.ledger.script.lock() = Some(Box::new(|_| Err(Reason::BarrierTimeout)));
    let m = b.ask(1, "a.example", 1);
    assert_eq!((m.metadata.response_code, m.answers.len()), (ResponseCode::ServFail, 0));
    assert_eq!(b.last().reason, Reason::BarrierTimeout);
    *b.ledger.script.lock() = Some(Box::new(|_| Ok(vec![])));
    assert_eq!(b.ask(1, "a.example", 1).metadata.response_code, ResponseCode::ServFail);
    assert_eq!(b.last().reason, Reason::Quota);
    *b.ledger.script.lock() = None;
    assert_eq!(ips(&b.ask(1, "a.example", 1)).len(), 1);
    assert_eq!(up.asked(), 1, "the answer was kept meanwhile");
}

#[test]
fn only_bound_addresses_are_sent() {
    let up = Authority::start(|q| {
        Some(answer(q.bytes, 0, &[a(&q.name, 300, [192, 0, 2, 1]), a(&q.name, 300, [192, 0, 2, 2])], &[]))
    });
    let b = allowing(&up, &["a.example"]);
    *b.ledger.script.lock() = Some(Box::new(|r| Ok(r.ips[..1].to_vec())));
    assert_eq!(ips(&b.ask(1, "a.example", 1)).len(), 1);
}

#[test]
fn an_edit_while_an_answer_binds_decides_again() {
    let up = Authority::start(simple);
    let b = allowing(&up, &["a.example"]);
    let view = Arc::clone(&b.view);
    *b.ledger.script.lock() = Some(Box::new(move |r| {
        view.store(Arc::new(Policy { generation: 2, askers: [pod(1)].into(), table: Table::default() }));
        Ok(r.ips.clone())
    }));
    assert_eq!(b.ask(1, "a.example", 1).metadata.response_code, ResponseCode::NXDomain);
    assert_eq!(b.last().reason, Reason::NameNotAllowed);
}

#[test]
fn audit_answers_even_if_nothing_binds() {
    let up = Authority::start(simple);
    let b = allowing(&up, &["a.example"]);
    let (ip, mut asker) = pod(1);
    asker.mode = AskMode::Audited;
    let table = Table::allowing(&["a.example"]);
    b.view.store(Arc::new(Policy { generation: 2, askers: [(ip, asker)].into(), table }));
    *b.ledger.script.lock() = Some(Box::new(|_| Err(Reason::BarrierTimeout)));
    assert_eq!(ips(&b.ask(1, "a.example", 1)).len(), 1);
    assert_eq!(ips(&b.ask(1, "evil.example", 1)).len(), 1);
    let e = b.last();
    assert_eq!((e.verdict, e.reason), (Verdict::Audit, Reason::NameNotAllowed));
}

#[test]
fn the_next_server_answers_when_the_first_is_dead() {
    let up = Authority::start(simple);
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let failing = Authority::start(|q| Some(answer(q.bytes, 2, &[], &[])));
    for dead in [silent.local_addr().unwrap(), failing.address] {
        let b = Bench::start(config(&[dead, up.address]), Table::allowing(&["a.example", "b.example"]));
        assert_eq!(ips(&b.ask(1, "a.example", 1)).len(), 1);
        let started = Instant::now();
        assert_eq!(ips(&b.ask(1, "b.example", 1)).len(), 1);
        assert!(started.elapsed() < Duration::from_millis(600), "the living one comes first from now on");
    }
}

#[test]
fn a_server_without_edns_is_asked_plainly() {
    let up = Authority::start(|q| if q.bytes[11] == 1 { Some(answer(q.bytes, 1, &[], &[])) } else { simple(q) });
    let b = allowing(&up, &["a.example"]);
    assert_eq!(ips(&b.ask(1, "a.example", 1)).len(), 1);
}

#[test]
fn names_go_to_the_servers_of_their_suffix() {
    let up = Authority::start(simple);
    let corp = Authority::start(|q| Some(answer(q.bytes, 0, &[a(&q.name, 60, [192, 0, 2, 50])], &[])));
    let cluster = Authority::start(|q| Some(answer(q.bytes, 0, &[a(&q.name, 5, [10, 96, 0, 9])], &[])));
    let mut c = config(&[up.address]);
    let suffixes = vec!["corp.example".to_owned()];
    c.resolvers.push(ResolverGroup { servers: vec![corp.address], protocol: Protocol::Tcp, suffixes });
    c.cluster =
        ClusterDns { servers: ClusterServers::new(vec![cluster.address]), suffixes: vec!["cluster.local".into()] };
    let b = Bench::start(c, Table::allowing(&["git.corp.example", "xcorp.example"]));
    let one = |n: &str| ips(&b.ask(1, n, 1))[0].to_string();
    assert_eq!(one("git.corp.example"), "192.0.2.50");
    assert_eq!(corp.asked(), 0, "TCP only");
    assert_eq!(one("xcorp.example"), "192.0.2.1");
    assert_eq!(one("web.shop.svc.cluster.local"), "10.96.0.9");
    assert_eq!(b.ledger.requests.lock().len(), 2, "cluster answers do not bind");
}

#[test]
fn wildcards_have_a_budget() {
    let up = Authority::start(simple);
    let star = NameDecision::Allow(Allow { wildcard: true, ..allow() });
    let table = Table { default: Some(star), ..Table::default() };
    let c = DnsConfig { budget: BudgetLimits { names: 3, bytes: 1000 }, ..config(&[up.address]) };
    let b = Bench::start(c, table);
    for i in 0..3 {
        assert_eq!(ips(&b.ask(1, &format!("d{i}.evil.example"), 1)).len(), 1);
    }
    assert_eq!(b.ask(1, "d3.evil.example", 1).metadata.response_code, ResponseCode::ServFail);
    assert_eq!(b.last().reason, Reason::DnsBudget);
    assert_eq!(up.asked(), 3);
    assert_eq!(ips(&b.ask(1, "d0.evil.example", 28)).len(), 1, "a known name is free");
}

#[test]
fn strangers_and_garbage_get_an_error() {
    let up = Authority::start(simple);
    let b = allowing(&up, &["a.example"]);
    assert_eq!(b.ask(200, "a.example", 1).metadata.response_code, ResponseCode::ServFail);
    let e = b.last();
    assert_eq!((e.reason, e.who), (Reason::UnknownPod, None));
    let mut q = query("a.example", 1, 9, None);
    q[5] = 2;
    let r = b.raw(1, &q);
    assert_eq!((&r[..2], r[3] & 0xf), (&[0, 9][..], 1));
    assert_eq!(b.last().reason, Reason::DnsMalformed);
    // A response is not answered: that would make loops.
    let s = b.socket(1);
    s.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let mut q = query("a.example", 1, 9, None);
    q[2] |= 0x80;
    s.send(&q).unwrap();
    assert!(s.recv(&mut [0; 512]).is_err());
    assert_eq!(up.asked(), 0);
}

#[test]
fn the_hit_path_says_what_the_slow_path_said() {
    let up = Authority::start(|q| {
        let n = &q.name;
        let https = [&[0, 1, 0][..], &[0, 4, 0, 8, 192, 0, 2, 1, 10, 0, 0, 1], &[0, 5, 0, 3, 1, 2, 3]].concat();
        let records = match (n.as_str(), q.qtype) {
            (_, 65) => vec![rr(n, 65, 300, https)],
            (_, 28) => vec![aaaa(n, 300, V6)],
            ("chain.example", _) => vec![cname(n, 300, "x.example"), a("x.example", 300, [192, 0, 2, 1])],
            ("mixed.example", _) => {
                vec![a(n, 300, [10, 0, 0, 1]), a(n, 300, [192, 0, 2, 1]), a(n, 300, [192, 0, 2, 2])]
            }
            ("private.example", _) => vec![a(n, 300, [10, 0, 0, 1])],
            ("bad-chain.example", _) => vec![cname(n, 300, "bad.example"), a("bad.example", 300, [192, 0, 2, 1])],
            ("gone.example", _) => vec![],
            _ => (1..=50).map(|i| a(n, 300, [192, 0, 2, i])).collect(),
        };
        let rdata = [&name("m.example")[..], &name("r.example"), &[0; 16], &60u32.to_be_bytes()].concat();
        let code = if n == "gone.example" { 3 } else { 0 };
        Some(answer(q.bytes, code, &records, &[rr("example", 6, 60, rdata)]))
    });
    let names =
        ["chain.example", "mixed.example", "private.example", "bad-chain.example", "gone.example", "many.example"];
    let cases =
        || names.iter().flat_map(|n| [1, 28, 65, 16].map(|t| (*n, t))).chain([("evil.example", 1), ("w.example", 1)]);
    for mode in [AskMode::Enforced, AskMode::Audited, AskMode::Guarded] {
        let b = allowing(&up, &[]);
        let table = Table::allowing(&names).with("bad.example", deny(Denial::NxDomain, Reason::DeniedByPolicy));
        let (ip, mut asker) = pod(1);
        asker.mode = mode;
        b.view.store(Arc::new(Policy { generation: 2, askers: [(ip, asker)].into(), table }));
        for (n, t) in cases() {
            for edns in [None, Some(1232)] {
                b.server.as_ref().unwrap().flush(pod(1).1.scope);
                let q = query(n, t, 0x1234, edns);
                // Repeats of names that were asked before are told once in a second, at any time.
                let last = || {
                    let of =
                        |e: &&Event| matches!(&e.what, What::Dns { name, qtype, .. } if **name == *n && *qtype == t);
                    b.events.lock().iter().rfind(of).cloned().expect("an event")
                };
                let (slow, first) = (b.raw(1, &q), last());
                let (hit, second) = (b.raw(1, &q), last());
                let timeless = |bytes: &[u8]| {
                    let mut m = Message::from_vec(bytes).unwrap();
                    m.answers.iter_mut().for_each(|r| r.ttl = 0);
                    m.to_string()
                };
                assert_eq!(timeless(&slow), timeless(&hit), "{n} {t} {mode:?} {edns:?}");
                assert_eq!((first.verdict, first.reason), (second.verdict, second.reason), "{n} {t} {mode:?}");
                let What::Dns { rcode, answers, .. } = first.what else { panic!() };
                let What::Dns { rcode: rcode2, answers: answers2, .. } = second.what else { panic!() };
                assert_eq!((rcode, answers), (rcode2, answers2), "{n} {t} {mode:?}");
            }
        }
    }
}

#[test]
fn draining_lets_queries_finish() {
    let up = Authority::start(|q| {
        std::thread::sleep(Duration::from_millis(250));
        simple(q)
    });
    let mut b = allowing(&up, &["a.example"]);
    let s = b.socket(1);
    s.send(&query("a.example", 1, 1, None)).unwrap();
    let mut tcp = b.connect(1);
    write_framed(&mut tcp, &query("a.example", 1, 2, None));
    std::thread::sleep(Duration::from_millis(80));
    let server = b.server.take().unwrap();
    assert!(server.in_flight() > 0);
    b.runtime.block_on(server.drain(Duration::from_secs(3)));
    assert!(s.recv(&mut [0; 512]).is_ok());
    assert!(read_framed(&mut tcp).is_some());
    assert!(read_framed(&mut tcp).is_none(), "closed");
    assert!(std::net::TcpStream::connect(b.address).is_err(), "nobody listens");
}
