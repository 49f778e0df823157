//! Messages written by hand, and a scripted policy and ledger.
#![allow(dead_code, clippy::unwrap_used, reason = "each test file uses a part; a test may fail")]

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use tidegate_dns_core::wire::question;
use tidegate_dns_core::{
    AddressDecision, Allow, AskMode, Asker, BindRequest, Binder, Denial, NameDecision, Rules, View,
};
use tidegate_policy::event::Who;
use tidegate_policy::{GroupKey, Reason, ScopeKey};

#[derive(Clone)]
pub struct Rr {
    pub owner: String,
    pub rtype: u16,
    pub class: u16,
    pub ttl: u32,
    pub rdata: Vec<u8>,
}

pub fn name(n: &str) -> Vec<u8> {
    let mut q = question(n, 1).unwrap();
    q.truncate(q.len() - 4);
    q
}

pub fn rr(owner: &str, rtype: u16, ttl: u32, rdata: Vec<u8>) -> Rr {
    Rr { owner: owner.into(), rtype, class: 1, ttl, rdata }
}

pub fn a(owner: &str, ttl: u32, ip: [u8; 4]) -> Rr {
    rr(owner, 1, ttl, ip.to_vec())
}

pub fn aaaa(owner: &str, ttl: u32, ip: [u8; 16]) -> Rr {
    rr(owner, 28, ttl, ip.to_vec())
}

pub fn cname(owner: &str, ttl: u32, target: &str) -> Rr {
    rr(owner, 5, ttl, name(target))
}

pub fn key(n: &str, qtype: u16) -> Vec<u8> {
    let mut k = qtype.to_be_bytes().to_vec();
    k.extend(name(n));
    k
}

/// The response to a query, with its question as it was sent.
pub fn answer(sent: &[u8], rcode: u8, answers: &[Rr], authority: &[Rr]) -> Vec<u8> {
    let end = 12 + sent[12..].iter().position(|b| *b == 0).unwrap() + 5;
    let mut m = sent[..end].to_vec();
    m[2] = 0x81;
    m[3] = 0x80 | rcode;
    m[6..12].copy_from_slice(&[0, answers.len() as u8, 0, authority.len() as u8, 0, 0]);
    for r in answers.iter().chain(authority) {
        m.extend(name(&r.owner));
        m.extend(r.rtype.to_be_bytes());
        m.extend(r.class.to_be_bytes());
        m.extend(r.ttl.to_be_bytes());
        m.extend((r.rdata.len() as u16).to_be_bytes());
        m.extend(&r.rdata);
    }
    m
}

/// A client's query.
pub fn query(n: &str, qtype: u16, id: u16, edns: Option<u16>) -> Vec<u8> {
    let mut m = id.to_be_bytes().to_vec();
    m.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, u8::from(edns.is_some())]);
    m.extend(question(n, qtype).unwrap());
    if let Some(size) = edns {
        m.extend([0, 0, 41]);
        m.extend(size.to_be_bytes());
        m.extend([0; 6]);
    }
    m
}

pub fn asker(mode: AskMode) -> Asker {
    let who = Arc::new(Who { namespace: "shop".into(), pod: "web-1".into(), node: "n1".into() });
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

pub fn allow() -> Allow {
    Allow { rule: None, ech: false, extra_type: false, wildcard: false, min_binding_secs: 0 }
}

pub fn rules() -> Rules {
    Rules { cluster_suffixes: vec!["cluster.local".into()], addresses: 64 }
}

/// A policy written as a table; what is not in it is denied with NXDOMAIN.
#[derive(Default)]
pub struct Table {
    pub names: HashMap<String, NameDecision>,
    pub addresses: HashMap<IpAddr, AddressDecision>,
    pub default: Option<NameDecision>,
}

impl Table {
    pub fn allowing(names: &[&str]) -> Self {
        let names = names.iter().map(|n| ((*n).to_owned(), NameDecision::Allow(allow()))).collect();
        Self { names, ..Self::default() }
    }

    pub fn with(mut self, name: &str, decision: NameDecision) -> Self {
        self.names.insert(name.into(), decision);
        self
    }
}

pub fn deny(denial: Denial, reason: Reason) -> NameDecision {
    NameDecision::Deny { denial, reason, rule: None }
}

impl View for Table {
    fn generation(&self) -> u64 {
        1
    }

    fn asker(&self, _: IpAddr) -> Option<&Asker> {
        None
    }

    fn name(&self, _: &Asker, name: &str, _: u16) -> NameDecision {
        let fallback = || self.default.clone().unwrap_or(deny(Denial::NxDomain, Reason::NameNotAllowed));
        self.names.get(name).cloned().unwrap_or_else(fallback)
    }

    fn address(&self, _: &Asker, _: &str, ip: IpAddr) -> AddressDecision {
        self.addresses.get(&ip).copied().unwrap_or(AddressDecision::Default)
    }
}

/// A ledger that holds everything, or nothing.
pub struct Holds(pub bool);

impl Binder for Holds {
    fn standing(&self, _: &Asker, _: &str, _: &[IpAddr], _: u32) -> bool {
        self.0
    }

    async fn bind(&self, request: BindRequest) -> Result<Vec<IpAddr>, Reason> {
        Ok(request.ips)
    }
}
