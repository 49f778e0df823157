//! What a DNS server of the lab knows, and what it answers: pure.

use std::collections::HashMap;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::rdata::svcb::{Alpn, EchConfigList, IpHint, SVCB, SvcParamKey, SvcParamValue};
use hickory_proto::rr::rdata::{A, AAAA, CNAME, HTTPS, PTR, SOA, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use serde::{Deserialize, Serialize};

use crate::scenario::{HttpsSpec, NameSpec, Rcode};

/// How many CNAMEs are followed.
const MAX_CHAIN: usize = 16;
/// SOA minimum and TTL of negative answers, in seconds.
const NEGATIVE_TTL: u32 = 5;

/// The file form of what a server knows.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Zone {
    /// Suffixes it is the authority for; an empty text is every name.
    pub suffixes: Vec<String>,
    /// The names.
    pub names: Vec<NameSpec>,
    /// Answer for any other name below the suffixes.
    pub any_name: Option<NameSpec>,
}

/// A zone, ready for look-ups.
#[derive(Debug, Default)]
pub struct Table {
    zone: Zone,
    index: HashMap<String, usize>,
}

/// What to answer.
#[derive(Debug, Default, PartialEq)]
pub struct Answer {
    /// The response code.
    pub rcode: Option<ResponseCode>,
    /// Answer section.
    pub answers: Vec<Record>,
    /// SOA of a negative answer.
    pub soa: Vec<Record>,
    /// Wait so long first, in milliseconds.
    pub delay_millis: u64,
    /// Do not answer.
    pub silent: bool,
}

/// Lower case, no final dot.
fn canonical(name: &str) -> String {
    name.trim_end_matches('.').to_ascii_lowercase()
}

/// Whether `name` is `suffix` or lies below it.
fn below(name: &str, suffix: &str) -> bool {
    suffix.is_empty() || name.strip_suffix(suffix).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn wire(name: &str) -> Option<Name> {
    let mut name = Name::from_ascii(name).ok()?;
    name.set_fqdn(true);
    Some(name)
}

impl Table {
    /// Indexes a zone.
    pub fn new(zone: Zone) -> Self {
        let index = zone.names.iter().enumerate().map(|(i, spec)| (canonical(&spec.name), i)).collect();
        Self { zone, index }
    }

    /// Whether it is the authority for a name.
    pub fn is_authority(&self, name: &str) -> bool {
        let name = canonical(name);
        self.zone.suffixes.iter().any(|s| below(&name, &canonical(s)))
    }

    /// The entry for a name: itself, else the closest wildcard, else the answer for any name.
    fn find(&self, name: &str) -> Option<&NameSpec> {
        if let Some(i) = self.index.get(name) {
            return Some(&self.zone.names[*i]);
        }
        let mut rest = name;
        while let Some((_, parent)) = rest.split_once('.') {
            if let Some(i) = self.index.get(&format!("*.{parent}")) {
                return Some(&self.zone.names[*i]);
            }
            rest = parent;
        }
        if self.has_children(name) {
            return None;
        }
        self.zone.any_name.as_ref()
    }

    fn has_children(&self, name: &str) -> bool {
        self.index.keys().any(|k| k.len() > name.len() && below(k, name))
    }

    /// Answers one question.
    pub fn answer(&self, name: &str, qtype: RecordType) -> Answer {
        let asked = canonical(name);
        let mut out = Answer::default();
        let mut owner = asked.clone();
        for _ in 0..MAX_CHAIN {
            let Some(spec) = self.find(&owner) else {
                out.rcode =
                    Some(if self.has_children(&owner) { ResponseCode::NoError } else { ResponseCode::NXDomain });
                break;
            };
            out.delay_millis += spec.delay_millis;
            out.silent |= spec.silent;
            if let Some(rcode) = spec.rcode {
                out.rcode = Some(match rcode {
                    Rcode::ServFail => ResponseCode::ServFail,
                    Rcode::NxDomain => ResponseCode::NXDomain,
                    Rcode::Refused => ResponseCode::Refused,
                });
                break;
            }
            out.rcode = Some(ResponseCode::NoError);
            let Some(owner_name) = wire(&owner) else { break };
            if let Some(target) = &spec.cname {
                let target = canonical(target);
                let Some(to) = wire(&target) else { break };
                out.answers.push(Record::from_rdata(owner_name, spec.ttl, RData::CNAME(CNAME(to))));
                if qtype == RecordType::CNAME {
                    break;
                }
                owner = target;
                continue;
            }
            let data = records(spec, qtype, &owner);
            out.answers.extend(data.into_iter().map(|d| Record::from_rdata(owner_name.clone(), spec.ttl, d)));
            break;
        }
        let negative = !matches!(out.rcode, Some(ResponseCode::ServFail | ResponseCode::Refused));
        if negative && !out.answers.iter().any(|r| r.data.record_type() == qtype) {
            out.soa.extend(soa(&owner));
        }
        out
    }
}

/// The records of a name that has this entry.
fn records(spec: &NameSpec, qtype: RecordType, name: &str) -> Vec<RData> {
    let own = if spec.spread { BuildHasherDefault::<DefaultHasher>::default().hash_one(name) } else { 0 };
    match qtype {
        RecordType::A => {
            let host = u32::try_from(own >> 40).unwrap_or_default();
            spec.ipv4.iter().map(|ip| RData::A(A(Ipv4Addr::from_bits(ip.to_bits() | host)))).collect()
        }
        RecordType::AAAA => {
            let host = u128::from(own);
            spec.ipv6.iter().map(|ip| RData::AAAA(AAAA(Ipv6Addr::from_bits(ip.to_bits() | host)))).collect()
        }
        RecordType::TXT => spec.txt.iter().map(|t| RData::TXT(TXT::new(vec![t.clone()]))).collect(),
        RecordType::PTR => spec.ptr.iter().filter_map(|n| Some(RData::PTR(PTR(wire(n)?)))).collect(),
        RecordType::HTTPS => spec.https.iter().filter_map(|h| Some(RData::HTTPS(HTTPS(svcb(h)?)))).collect(),
        _ => Vec::new(),
    }
}

fn svcb(spec: &HttpsSpec) -> Option<SVCB> {
    let target = match &spec.target {
        Some(name) => wire(name)?,
        None => Name::root(),
    };
    let mut params = Vec::new();
    if !spec.alpn.is_empty() {
        params.push((SvcParamKey::Alpn, SvcParamValue::Alpn(Alpn(spec.alpn.clone()))));
    }
    if let Some(port) = spec.port {
        params.push((SvcParamKey::Port, SvcParamValue::Port(port)));
    }
    if !spec.ipv4_hint.is_empty() {
        let hint = IpHint(spec.ipv4_hint.iter().map(|ip| A(*ip)).collect());
        params.push((SvcParamKey::Ipv4Hint, SvcParamValue::Ipv4Hint(hint)));
    }
    if spec.ech {
        // An ECHConfigList of one config of an unknown version: a client ignores it, a filter must not.
        let list = EchConfigList(vec![0, 6, 0xab, 0xcd, 0, 2, 0, 0]);
        params.push((SvcParamKey::EchConfigList, SvcParamValue::EchConfigList(list)));
    }
    if !spec.ipv6_hint.is_empty() {
        let hint = IpHint(spec.ipv6_hint.iter().map(|ip| AAAA(*ip)).collect());
        params.push((SvcParamKey::Ipv6Hint, SvcParamValue::Ipv6Hint(hint)));
    }
    Some(SVCB::new(spec.priority, target, params))
}

/// The SOA of a negative answer: the lab's zones are cut at two labels.
fn soa(name: &str) -> Option<Record> {
    let labels: Vec<&str> = name.split('.').collect();
    let zone = wire(&labels[labels.len().saturating_sub(2)..].join("."))?;
    let server = wire("ns.lab.example")?;
    let data = SOA::new(server.clone(), server, 1, 3600, 600, 86_400, NEGATIVE_TTL);
    Some(Record::from_rdata(zone, NEGATIVE_TTL, RData::SOA(data)))
}

/// The name of an address in the reverse zones (RFC 1035, section 3.5; RFC 3596, section 2.5).
pub fn reverse(ip: IpAddr) -> String {
    Name::from(ip).to_ascii().trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let name = |name: &str, ip: &str| NameSpec {
            name: name.into(),
            ttl: 60,
            ipv4: vec![ip.parse().unwrap()],
            ..NameSpec::default()
        };
        let alias =
            NameSpec { name: "www.a.example".into(), cname: Some("API.a.example.".into()), ..NameSpec::default() };
        let broken = NameSpec { name: "broken.a.example".into(), rcode: Some(Rcode::ServFail), ..NameSpec::default() };
        Table::new(Zone {
            suffixes: vec!["example".into()],
            names: vec![name("api.a.example", "198.51.100.1"), name("*.w.example", "198.51.100.2"), alias, broken],
            any_name: None,
        })
    }

    #[test]
    fn names_wildcards_and_aliases() {
        let t = table();
        let a = |n: &str| t.answer(n, RecordType::A);
        assert_eq!(a("API.A.example.").answers[0].data.to_string(), "198.51.100.1");
        assert_eq!(a("x.y.w.example").answers[0].data.to_string(), "198.51.100.2");
        assert_eq!(a("www.a.example").answers.len(), 2);
        assert_eq!(a("broken.a.example").rcode, Some(ResponseCode::ServFail));
    }

    #[test]
    fn each_name_of_a_spread_has_addresses_of_its_own() {
        let spec = NameSpec {
            name: "*.s.example".into(),
            ipv4: vec!["20.0.0.0".parse().unwrap()],
            ipv6: vec!["2001:db8:1::".parse().unwrap()],
            spread: true,
            ..NameSpec::default()
        };
        let t = Table::new(Zone { suffixes: vec!["example".into()], names: vec![spec], any_name: None });
        let of = |n: &str, qtype| t.answer(n, qtype).answers[0].data.to_string();
        for (qtype, start) in [(RecordType::A, "20."), (RecordType::AAAA, "2001:db8:1:")] {
            let (one, other) = (of("one.s.example", qtype), of("other.s.example", qtype));
            assert!(one != other && one.starts_with(start) && other.starts_with(start), "{one} {other}");
            assert_eq!(of("ONE.s.example.", qtype), one);
        }
    }

    #[test]
    fn negatives_differ() {
        let t = table();
        let no_data = t.answer("api.a.example", RecordType::AAAA);
        assert_eq!((no_data.rcode, no_data.answers.len(), no_data.soa.len()), (Some(ResponseCode::NoError), 0, 1));
        assert_eq!(t.answer("a.example", RecordType::A).rcode, Some(ResponseCode::NoError));
        assert_eq!(t.answer("w.example", RecordType::A).rcode, Some(ResponseCode::NoError));
        let none = t.answer("nope.a.example", RecordType::A);
        assert_eq!((none.rcode, none.soa.len()), (Some(ResponseCode::NXDomain), 1));
        assert!(t.is_authority("x.Example.") && !t.is_authority("x.anexample"));
    }

    #[test]
    fn reverse_names() {
        assert_eq!(reverse("10.244.1.2".parse().unwrap()), "2.1.244.10.in-addr.arpa");
        assert!(reverse("fd00::1".parse().unwrap()).ends_with("d.f.ip6.arpa"));
    }
}
