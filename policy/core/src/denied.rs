//! What people are told of denials: one value out of many events, small enough to travel.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use crate::Reason;
use crate::event::{Event, RuleRef, Verdict, What, Who};

/// A denial, or what would have been one in an audited namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denied {
    /// The pod's address.
    pub source: IpAddr,
    /// The pod; absent where only its address is known.
    pub who: Option<Arc<Who>>,
    /// The name that was asked for, or that the connection said, escaped.
    pub name: Option<Arc<str>>,
    /// Where the pod sent to; absent for queries.
    pub address: Option<IpAddr>,
    /// The IP protocol's number; absent for queries.
    pub protocol: Option<u8>,
    /// The port; absent where the protocol has none, and for queries.
    pub port: Option<u16>,
    /// The query type (RFC 1035 TYPE) of a query.
    pub qtype: Option<u16>,
    /// Why.
    pub reason: Reason,
    /// It passed, since the namespace is audited.
    pub audit: bool,
    /// The rule that denied it, if one did.
    pub rule: Option<RuleRef>,
    /// How often, at least 1.
    pub count: u64,
}

/// TCP's protocol number.
const TCP: u8 = 6;

impl Denied {
    /// What an event says to people, if it is a denial that concerns them. Left out is what a client copes with by
    /// itself (a refused QUIC connection, a packet that is too large), what policy has no part in, and forged packets,
    /// for which the address's owner is not to blame.
    pub fn of(event: &Event) -> Option<Self> {
        let audit = match event.verdict {
            Verdict::Allow => return None,
            Verdict::Deny => false,
            Verdict::Audit => true,
        };
        if matches!(
            event.reason,
            Reason::QuicBlocked
                | Reason::TooBig
                | Reason::ConnectFailed
                | Reason::Revoked
                | Reason::DnsUpstream
                | Reason::SpoofedSource
                | Reason::Checksum
        ) {
            return None;
        }
        let port = |p: u16| (p > 0).then_some(p);
        let new = |source| Denied {
            source,
            who: event.who.clone(),
            name: None,
            address: None,
            protocol: None,
            port: None,
            qtype: None,
            reason: event.reason,
            audit,
            rule: event.rule.clone(),
            count: event.count.max(1),
        };
        match &event.what {
            // A query's source is not in its event; who asked is.
            What::Dns { name, qtype, .. } => {
                event.who.as_ref()?;
                let source = IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);
                Some(Denied { name: Some(name.clone()), qtype: Some(*qtype), ..new(source) })
            }
            What::Open { client, asked, sni, .. } => Some(Denied {
                name: sni.clone(),
                address: Some(asked.ip().to_canonical()),
                protocol: Some(TCP),
                port: port(asked.port()),
                ..new(client.ip().to_canonical())
            }),
            What::Close { .. } => None,
            What::Packet { protocol, source, destination, .. } => Some(Denied {
                address: Some(destination.ip().to_canonical()),
                protocol: Some(*protocol),
                port: port(destination.port()),
                ..new(source.ip().to_canonical())
            }),
        }
    }

    /// What makes two denials the same for people.
    fn key(&self) -> Key {
        // One name or address at a port: the addresses of a name come and go.
        let address = if self.name.is_some() { None } else { self.address };
        Key {
            source: self.who.is_none().then_some(self.source),
            pod: self.who.as_ref().map(|w| (w.namespace.clone(), w.pod.clone())),
            name: self.name.clone(),
            address,
            protocol: self.protocol,
            port: self.port,
            reason: self.reason,
            audit: self.audit,
        }
    }

    /// Whether both are the same for people: pod, name or else address, port and reason.
    pub fn is_like(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    source: Option<IpAddr>,
    pod: Option<(Arc<str>, Arc<str>)>,
    name: Option<Arc<str>>,
    address: Option<IpAddr>,
    protocol: Option<u8>,
    port: Option<u16>,
    reason: Reason,
    audit: bool,
}

/// Denials that wait to be told, the same ones as one. Holds a fixed number; what finds no place is counted.
#[derive(Debug)]
pub struct Folded {
    room: usize,
    waiting: BTreeMap<Key, (u64, Denied)>,
    next: u64,
    lost: u64,
}

impl Folded {
    /// With room for so many.
    pub fn new(room: usize) -> Self {
        Self { room, waiting: BTreeMap::new(), next: 0, lost: 0 }
    }

    /// Takes one.
    pub fn add(&mut self, denied: Denied) {
        let key = denied.key();
        if let Some((_, old)) = self.waiting.get_mut(&key) {
            let count = old.count.saturating_add(denied.count);
            *old = Denied { count, ..denied };
        } else if self.waiting.len() < self.room {
            self.waiting.insert(key, (self.next, denied));
            self.next += 1;
        } else {
            self.lost = self.lost.saturating_add(denied.count);
        }
    }

    /// The first `most` of them, in the order in which they came.
    pub fn take(&mut self, most: usize) -> Vec<Denied> {
        let mut order: Vec<(u64, Key)> = self.waiting.iter().map(|(k, (n, _))| (*n, k.clone())).collect();
        order.sort_unstable();
        order.truncate(most);
        order.into_iter().filter_map(|(_, k)| Some(self.waiting.remove(&k)?.1)).collect()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// How many denials found no place since this was asked last.
    pub fn take_lost(&mut self) -> u64 {
        std::mem::take(&mut self.lost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Carry;

    fn event(what: What, verdict: Verdict, reason: Reason) -> Event {
        let who = Arc::new(Who { namespace: "shop".into(), pod: "web".into(), node: "n1".into() });
        Event { who: Some(who), what, verdict, reason, rule: None, count: 2 }
    }

    fn open(sni: Option<&str>) -> What {
        What::Open {
            client: "[::ffff:10.0.0.1]:40000".parse().unwrap(),
            asked: "203.0.113.9:443".parse().unwrap(),
            actual: None,
            egress: None,
            sni: sni.map(Into::into),
            carry: Carry::Tls,
        }
    }

    fn dns(name: &str) -> What {
        What::Dns {
            name: name.into(),
            qtype: 1,
            rcode: 3,
            answers: vec![],
            cached: false,
            server: "10.96.0.10:53".parse().unwrap(),
        }
    }

    fn packet(to: &str) -> What {
        let source = "10.0.0.1:0".parse().unwrap();
        What::Packet { hook: "pod_egress", protocol: 17, source, destination: to.parse().unwrap() }
    }

    #[test]
    fn what_concerns_people() {
        let d = Denied::of(&event(open(Some("evil.example")), Verdict::Deny, Reason::SniMismatch)).unwrap();
        assert_eq!((d.name.as_deref(), d.port, d.protocol), (Some("evil.example"), Some(443), Some(6)));
        assert_eq!((d.source, d.count, d.audit), ("10.0.0.1".parse().unwrap(), 2, false));
        let d = Denied::of(&event(packet("203.0.113.9:0"), Verdict::Audit, Reason::Protocol)).unwrap();
        assert_eq!((d.port, d.audit, d.name), (None, true, None));
        let d = Denied::of(&event(dns("a.example"), Verdict::Deny, Reason::NameNotAllowed)).unwrap();
        assert_eq!((d.address, d.qtype), (None, Some(1)));
        for (what, verdict, reason) in [
            (open(None), Verdict::Allow, Reason::Allowed),
            (open(None), Verdict::Deny, Reason::ConnectFailed),
            (packet("203.0.113.9:443"), Verdict::Deny, Reason::QuicBlocked),
        ] {
            assert_eq!(Denied::of(&event(what, verdict, reason)), None);
        }
    }

    #[test]
    fn the_same_denial_is_one_and_there_is_an_end() {
        let d = |to: &str| Denied::of(&event(packet(to), Verdict::Deny, Reason::NotAllowed)).unwrap();
        let mut f = Folded::new(2);
        f.add(d("203.0.113.9:53"));
        f.add(d("203.0.113.8:53"));
        f.add(d("203.0.113.9:53"));
        f.add(d("203.0.113.7:53"));
        assert_eq!((f.take_lost(), f.take_lost()), (2, 0));
        let first = f.take(1);
        assert_eq!((first.len(), first[0].count), (1, 4));
        assert_eq!(first[0].address, Some("203.0.113.9".parse().unwrap()));
        assert_eq!(f.take(9).len(), 1);
        assert!(f.is_empty());
    }

    #[test]
    fn addresses_of_one_name_are_one_denial() {
        let d = |ip: &str| {
            let mut d = Denied::of(&event(open(Some("a.example")), Verdict::Deny, Reason::NotAllowed)).unwrap();
            d.address = Some(ip.parse().unwrap());
            d
        };
        assert!(d("203.0.113.1").is_like(&d("203.0.113.2")));
        assert!(!d("203.0.113.1").is_like(&Denied { port: Some(8443), ..d("203.0.113.1") }));
    }
}
