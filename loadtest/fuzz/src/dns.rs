//! What pods send to port 53, and what resolvers send back.

use std::net::IpAddr;
use std::sync::Arc;

use hickory_proto::op::{Message, MessageType};
use tidegate_dns_core::answer::{MAX_CHAIN, check, upstream_query};
use tidegate_dns_core::serve::{Decision, decide, plan, render};
use tidegate_dns_core::wire::{Parsed, parse, question, rtype};
use tidegate_dns_core::{
    AddressDecision, Allow, AskMode, Asker, BindRequest, Binder, Denial, NameDecision, Rules, Scratch, Served, Store,
    StoreLimits, Stored, View, reply, serve,
};
use tidegate_policy::event::Who;
use tidegate_policy::{GroupKey, Reason, ScopeKey};

const NOW: u64 = 5_000;
const MODES: [AskMode; 3] = [AskMode::Enforced, AskMode::Audited, AskMode::Guarded];

/// A policy that decides by the text alone: names with an `x` are denied, those with an `o` resolve, others bind.
struct Policy;

impl View for Policy {
    fn generation(&self) -> u64 {
        1
    }

    fn asker(&self, _: IpAddr) -> Option<&Asker> {
        None
    }

    fn name(&self, _: &Asker, name: &str, _: u16) -> NameDecision {
        if name.contains('x') {
            let denial = if name.len().is_multiple_of(2) { Denial::NxDomain } else { Denial::NoData };
            NameDecision::Deny { denial, reason: Reason::DeniedByPolicy, rule: None }
        } else if name.contains('o') {
            NameDecision::Resolve { reason: Reason::Allowed, rule: None }
        } else {
            let extra_type = name.len().is_multiple_of(2);
            NameDecision::Allow(Allow { rule: None, ech: !extra_type, extra_type, wildcard: true, min_binding_secs: 0 })
        }
    }

    fn address(&self, _: &Asker, _: &str, ip: IpAddr) -> AddressDecision {
        match ip {
            IpAddr::V4(a) if a.octets()[3].is_multiple_of(16) => AddressDecision::Filter(Reason::DeniedByPolicy),
            IpAddr::V4(a) if a.octets()[0] == 10 => AddressDecision::Accept,
            _ => AddressDecision::Default,
        }
    }
}

struct Everything;

impl Binder for Everything {
    fn standing(&self, _: &Asker, _: &str, _: &[IpAddr], _: u32) -> bool {
        true
    }

    async fn bind(&self, request: BindRequest) -> Result<Vec<IpAddr>, Reason> {
        Ok(request.ips)
    }
}

fn asker(mode: AskMode) -> Asker {
    let who = Arc::new(Who { namespace: "shop".into(), pod: "web".into(), node: "n1".into() });
    Asker {
        ip: IpAddr::from([10, 0, 0, 1]),
        who,
        scope: ScopeKey(1),
        group: GroupKey(1),
        group_index: 0,
        mode,
        v4: true,
        v6: true,
    }
}

fn rules() -> Rules {
    Rules { cluster_suffixes: vec!["cluster.local".into()], addresses: 8 }
}

/// What a pod gets is a response to what it asked, within its limit, that others can read.
fn check_reply(request: &[u8], out: &[u8], limit: usize) {
    assert!(out.len() <= limit, "{} octets, limit {limit}", out.len());
    assert_eq!(out[..2], request[..2], "the id");
    let m = Message::from_vec(out).expect("a reply can be read");
    assert_eq!(m.metadata.message_type, MessageType::Response);
}

/// A query from a pod: octets of a datagram. The store has an answer of three addresses for it.
pub fn dns_query(data: &[u8]) -> bool {
    let mut scratch = Scratch::new();
    let query = match parse(data) {
        Parsed::Drop => return false,
        Parsed::Refuse { rcode, edns, question } => {
            reply::error(data, rcode, edns, question, &mut scratch.out);
            check_reply(data, &scratch.out, data.len().max(12) + 11);
            return false;
        }
        Parsed::Query(query) => query,
    };
    assert!(data.windows(query.question().len()).any(|w| w == query.question()));
    let lower = query.wire_name().to_ascii_lowercase();
    assert_eq!(query.key()[2..], lower, "the key is the name in one case");
    assert_eq!(query.name(), query.name().to_ascii_lowercase());
    assert!((512..=1232).contains(&query.udp_limit()));
    let sent = upstream_query(query.key(), 7, &[0; 32], false);
    let Parsed::Query(ours) = parse(&sent) else { panic!("our own query is refused") };
    assert_eq!((ours.key(), ours.name()), (query.key(), query.name()), "what is asked upstream is what was asked");
    let stored = match query.qtype {
        rtype::A => check(&sent, &addresses(&sent, &[[192, 0, 2, 1], [10, 0, 0, 1], [127, 0, 0, 1]]), true, NOW, 60),
        _ => check(&sent, &addresses(&sent, &[]), true, NOW, 60),
    };
    let store = Store::new(StoreLimits::default(), [1, 2, 3, 4]);
    if let Ok(stored) = stored {
        store.insert(ScopeKey(1), &stored, NOW);
    }
    for mode in MODES {
        for limit in [query.udp_limit(), 65_535] {
            let served =
                serve(&query, &asker(mode), &Policy, &Everything, &store, &rules(), NOW + 1, limit, &mut scratch);
            if let Served::Reply { outcome, .. } = served {
                check_reply(data, &scratch.out, limit);
                // What the cluster's own DNS says of its own names is not filtered.
                let filtered = mode == AskMode::Enforced && !rules().is_cluster(query.name());
                assert!(!filtered || !scratch.sent.iter().any(IpAddr::is_loopback), "{outcome:?}");
            }
        }
    }
    true
}

/// A response with these addresses, and a SOA where there are none.
fn addresses(sent: &[u8], all: &[[u8; 4]]) -> Vec<u8> {
    let mut m = sent.to_vec();
    m[2..4].copy_from_slice(&[0x81, 0x80]);
    m[7] = all.len() as u8;
    for a in all {
        m.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 30, 0, 4]);
        m.extend_from_slice(a);
    }
    if all.is_empty() {
        m[9] = 1;
        m.extend_from_slice(&[0xc0, 12, 0, 6, 0, 1, 0, 0, 0, 30, 0, 22, 0, 0]);
        m.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 30]);
    }
    m
}

const NAMES: [&str; 4] = ["a.example", "www.shop.test", "svc.cluster.local", "_dns.resolver.arpa"];
const TYPES: [u16; 8] = [rtype::A, rtype::AAAA, rtype::CNAME, rtype::HTTPS, rtype::SVCB, 15, 16, rtype::SRV];

/// An answer of a resolver. The first octet says which question was asked and whether the others are the whole
/// message or only what follows the question.
pub fn dns_answer(data: &[u8]) -> bool {
    let Some((&first, rest)) = data.split_first() else { return false };
    let (name, qtype) = (NAMES[usize::from(first & 3)], TYPES[usize::from(first >> 2 & 7)]);
    let (raw, exact) = (first & 32 != 0, first & 64 != 0);
    let mut key = qtype.to_be_bytes().to_vec();
    let asked = question(name, qtype).expect("a constant's question");
    key.extend_from_slice(&asked[..asked.len() - 4]);
    let sent = upstream_query(&key, 0x1234, &[0x55; 32], false);
    let message = if raw {
        rest.to_vec()
    } else {
        // Flags and counts come from the bytes, identity and question are right.
        let Some((head, body)) = rest.split_at_checked(5) else { return false };
        let mut m = sent.clone();
        m[2..4].copy_from_slice(&[0x80 | head[0], head[1]]);
        (m[7], m[9], m[11]) = (head[2], head[3], head[4]);
        m.extend_from_slice(body);
        m
    };
    let Ok(stored) = check(&sent, &message, exact, NOW, 60) else { return false };
    assert!(stored.chain_len() <= MAX_CHAIN);
    assert!(stored.ttl_or_zero(NOW) <= 60);
    assert_eq!((stored.qtype(), stored.name()), (qtype, &key[2..]));
    for mode in MODES {
        reply_of(&stored, &message, name, qtype, mode);
    }
    true
}

fn reply_of(stored: &Stored, message: &[u8], name: &str, qtype: u16, mode: AskMode) {
    let mut request = vec![0, 9, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    request.extend(question(name, qtype).expect("a constant's question"));
    let Parsed::Query(query) = parse(&request) else { panic!("a well formed query is refused") };
    let asker = asker(mode);
    let mut scratch = Scratch::new();
    let Decision::Go(go) = decide(query.name(), qtype, &asker, &Policy, &rules()) else { return };
    let Ok(plan) = plan(go, &query, stored, &asker, &Policy, &rules(), &mut scratch) else { return };
    let told = |ip: &IpAddr| match ip {
        IpAddr::V4(a) => message.windows(4).any(|w| w == a.octets()),
        IpAddr::V6(a) => message.windows(16).any(|w| w == a.octets()),
    };
    assert!(scratch.bind.len() <= 8 && scratch.bind.iter().all(told), "{:?}", scratch.bind);
    if mode == AskMode::Enforced && plan.bind {
        let bad = |ip: &IpAddr| ip.is_loopback() || ip.is_multicast() || ip.is_unspecified();
        assert!(!scratch.bind.iter().any(bad), "{:?}", scratch.bind);
    }
    for limit in [512, 65_535] {
        let bound = scratch.bind.clone();
        render(&query, stored, plan.clone(), stored.ttl_or_zero(NOW), limit, &mut scratch);
        assert!(!plan.bind || plan.lenient || scratch.sent.iter().all(|ip| bound.contains(ip)), "only what is bound");
        assert!(scratch.out.len() <= limit);
        if matches!(qtype, rtype::A | rtype::AAAA | rtype::CNAME) {
            check_reply(&request, &scratch.out, limit);
        }
    }
}
