//! A question, as the DNS service takes it: decided, answered upstream, checked, planned, and handed to the core.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tidegate_dns_core::answer::{check, upstream_query};
use tidegate_dns_core::serve::{Decision, Rules, decide, plan};
use tidegate_dns_core::wire::{Parsed, parse, question};
use tidegate_dns_core::{AddressDecision, Asker, NameDecision, Scratch, View};
use tidegate_ledger::{Answer, OwnerId};
use tidegate_policy::world::World;
use tidegate_policy::{Name, Reason};

use crate::asker;
use crate::gateway::{Gateway, node_id};

/// What came of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// It was not resolved.
    Denied(Reason),
    /// It went out, and nothing is learnt from it.
    Open,
    /// These addresses are to be bound; the reply has this ticket.
    Binds(u64, Vec<IpAddr>),
    /// They are, for as long as the answer says: it goes out at once.
    Stands(Vec<IpAddr>),
}

/// A question and what upstream says: a name's addresses, to be kept for `ttl` seconds.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// Who asks.
    pub pod: IpAddr,
    /// For what.
    pub name: &'a str,
    /// Whether for IPv6 addresses.
    pub v6: bool,
    /// The answer.
    pub ips: &'a [IpAddr],
    /// The answer's life in seconds.
    pub ttl: u32,
    /// Whether the answer is stored already.
    pub stored: bool,
}

impl Gateway {
    /// A pod asks.
    pub fn ask(&mut self, q: Question<'_>, now: Duration) -> Asked {
        let Question { pod, name, v6, ips, ttl, stored } = q;
        let hit = stored;
        let world = self.world();
        let view = Policy(world.clone());
        let Some(asker) = asker::asker(&world, pod, (true, true)) else { return Asked::Denied(Reason::UnknownPod) };
        let qtype = if v6 { 28 } else { 1 };
        let rules = Rules { cluster_suffixes: vec!["cluster.local".into()], addresses: 64 };
        let go = match decide(name, qtype, &asker, &view, &rules) {
            Decision::Deny(o) => return Asked::Denied(o.reason),
            Decision::Go(go) => go,
        };
        let mut request = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        request.extend(question(name, qtype).expect("a constant's question"));
        let Parsed::Query(query) = parse(&request) else { panic!("a well formed query is refused") };
        let sent = upstream_query(query.key(), 9, &[0; 32], false);
        let stored = check(&sent, &answer(&sent, ips, ttl), true, now.as_millis() as u64, 3600);
        let stored = stored.expect("a well formed answer is refused");
        let mut scratch = Scratch::new();
        let plan = match plan(go, &query, &stored, &asker, &view, &rules, &mut scratch) {
            Ok(plan) => plan,
            Err(o) => return Asked::Denied(o.reason),
        };
        if !plan.bind {
            return Asked::Open;
        }
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let name = Name::parse(plan.bind_name(&query, &scratch)).expect("only names bind");
        let min = Duration::from_secs(plan.min_binding_secs.into());
        let ttl = stored.ttl_or_zero(now.as_millis() as u64);
        let bound = scratch.bind.clone();
        let acked = asker::needs_ack(&world, &asker, name.as_str());
        let answer = Answer {
            ticket,
            scope: asker.scope,
            owner: OwnerId(0),
            node: node_id(&asker.who.node),
            name,
            addresses: scratch.bind,
            ttl: Duration::from_secs(ttl.into()),
            min_binding: (!min.is_zero()).then_some(min),
            acked,
        };
        if hit && self.stands(pod, &answer, now) {
            return Asked::Stands(bound);
        }
        self.bind(pod, answer, now);
        Asked::Binds(ticket, bound)
    }
}

/// A response with one record per address.
fn answer(sent: &[u8], ips: &[IpAddr], ttl: u32) -> Vec<u8> {
    let mut m = sent.to_vec();
    m[2..4].copy_from_slice(&[0x81, 0x80]);
    m[6..8].copy_from_slice(&(ips.len() as u16).to_be_bytes());
    for ip in ips {
        m.extend_from_slice(&[0xc0, 12]);
        m.extend_from_slice(&if ip.is_ipv4() { 1u16 } else { 28 }.to_be_bytes());
        m.extend_from_slice(&[0, 1]);
        m.extend_from_slice(&ttl.to_be_bytes());
        match ip {
            IpAddr::V4(a) => {
                m.extend_from_slice(&[0, 4]);
                m.extend_from_slice(&a.octets());
            }
            IpAddr::V6(a) => {
                m.extend_from_slice(&[0, 16]);
                m.extend_from_slice(&a.octets());
            }
        }
    }
    m
}

/// The DNS service's view of a compile.
struct Policy(Arc<World>);

impl View for Policy {
    fn generation(&self) -> u64 {
        1
    }

    fn asker(&self, _: IpAddr) -> Option<&Asker> {
        None
    }

    fn name(&self, asker: &Asker, name: &str, qtype: u16) -> NameDecision {
        asker::name(&self.0, asker, name, qtype)
    }

    fn address(&self, asker: &Asker, name: &str, ip: IpAddr) -> AddressDecision {
        asker::address(&self.0, asker, name, ip)
    }

    fn svcb_port(&self, asker: &Asker, name: &str, port: u16) -> bool {
        asker::svcb_port(&self.0, asker, name, port)
    }
}
