//! What gateways tell each other, and what agents tell of gateways.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use tidegate_policy::denied::Denied;
use tidegate_policy::{Name, ScopeKey};

use super::denied::{MAX_DENIED, denied_from_wire, denied_to_wire};
use super::{
    MAX_CLAIMS, MAX_FACT_NODES, MAX_GATEWAYS, MAX_ITEMS, MAX_TTL_MS, Problem, WireError, bounded, ip_from_wire,
    ip_to_wire, key_from_wire, key_to_wire, name_from_wire, names_from_wire,
};
use crate::wire;

/// Lists of the API server that a gateway may speak of.
const MAX_LISTS: usize = 64;
/// Facts in one message.
const PART: usize = 2048;

/// An egress pair by its pool and addresses; without addresses it is PodNetwork.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pair {
    /// The pool's name.
    pub pool: String,
    /// Its IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
}

impl std::fmt::Display for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.pool)?;
        if let Some(a) = self.ipv4 {
            write!(f, " {a}")?;
        }
        if let Some(a) = self.ipv6 {
            write!(f, " {a}")?;
        }
        Ok(())
    }
}

/// Who owns a pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The pair.
    pub pair: Pair,
    /// The owning gateway's name.
    pub owner: String,
    /// A higher one wins.
    pub epoch: u64,
    /// Whether the sender is that owner and serves the pair now.
    pub held: bool,
}

/// That a gateway lives, and what it knows of ownership.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Beat {
    /// Whether it could serve a pair now.
    pub able: bool,
    /// The highest claim that it knows of each pair.
    pub claims: Vec<Claim>,
    /// It is about to end: others take its pairs over, and it takes none.
    pub leaving: bool,
    /// Not all that it claims for itself is in place yet. Others go by such a claim, and say it to nodes and others, once
    /// that ends, or after a second: a gateway that is about to end carries on meanwhile.
    pub placing: bool,
    /// The newest resourceVersion that it has seen of each list of the API server.
    pub versions: Vec<(String, u64)>,
}

/// A fact that another gateway, or this one before its restart, has learnt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerFact {
    /// The scope.
    pub scope: ScopeKey,
    /// The namespace whose quota counts.
    pub namespace: String,
    /// The name.
    pub name: Name,
    /// The address.
    pub ip: IpAddr,
    /// Until it expires; cut to [`MAX_TTL_MS`] when sent.
    pub remaining: Duration,
    /// What is left of the RRset's TTL.
    pub ttl: Duration,
    /// The nodes whose kernels have the address.
    pub nodes: Vec<String>,
}

/// From a gateway to another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerMessage {
    /// The sender's boot id.
    pub boot_id: u64,
    /// A part of the snapshot that begins the stream.
    pub snapshot: bool,
    /// Another part of the snapshot follows.
    pub more: bool,
    /// Facts that were learnt or prolonged.
    pub facts: Vec<PeerFact>,
    /// A sign of life.
    pub beat: Option<Beat>,
    /// What the sender denied lately; at most [`MAX_DENIED`].
    pub denied: Vec<Denied>,
}

impl PeerMessage {
    /// The messages to send: one, or several where one would be too large.
    pub fn into_messages(self) -> Vec<wire::PeerUpdate> {
        let empty = wire::PeerUpdate { boot_id: self.boot_id, snapshot: self.snapshot, ..Default::default() };
        let mut out: Vec<wire::PeerUpdate> = self
            .facts
            .chunks(PART)
            .map(|c| wire::PeerUpdate { facts: c.iter().map(Into::into).collect(), more: true, ..empty.clone() })
            .collect();
        if out.is_empty() {
            out.push(empty);
        }
        if let Some(last) = out.last_mut() {
            last.more = self.more;
            last.beat = self.beat.map(Into::into);
            last.denied = self.denied.iter().take(MAX_DENIED).map(denied_to_wire).collect();
        }
        out
    }
}

/// A message's octets, in one part or several: what a gateway keeps for itself has the form of what it sends.
pub fn encode_peer(message: PeerMessage) -> Vec<Vec<u8>> {
    message.into_messages().iter().map(prost::Message::encode_to_vec).collect()
}

/// A message out of its octets.
///
/// # Errors
/// They are not such a message.
pub fn decode_peer(octets: &[u8]) -> Result<PeerMessage, WireError> {
    let update: wire::PeerUpdate = prost::Message::decode(octets).map_err(|_| Problem::Missing.of("peer_update"))?;
    PeerMessage::try_from(update)
}

impl TryFrom<wire::PeerUpdate> for PeerMessage {
    type Error = WireError;

    fn try_from(u: wire::PeerUpdate) -> Result<Self, WireError> {
        bounded(u.facts.len(), MAX_ITEMS, "peer_update.facts")?;
        Ok(Self {
            boot_id: u.boot_id,
            snapshot: u.snapshot,
            more: u.more,
            facts: u.facts.into_iter().map(PeerFact::try_from).collect::<Result<_, _>>()?,
            beat: u.beat.map(Beat::try_from).transpose()?,
            denied: denied_from_wire(u.denied, "peer_update.denied")?,
        })
    }
}

impl From<Beat> for wire::Beat {
    fn from(b: Beat) -> Self {
        Self {
            able: b.able,
            claims: b.claims.into_iter().map(Into::into).collect(),
            leaving: b.leaving,
            placing: b.placing,
            versions: b.versions.into_iter().map(|(list, version)| wire::ListVersion { list, version }).collect(),
        }
    }
}

impl TryFrom<wire::Beat> for Beat {
    type Error = WireError;

    fn try_from(b: wire::Beat) -> Result<Self, WireError> {
        bounded(b.claims.len(), MAX_CLAIMS, "beat.claims")?;
        let claims = b.claims.into_iter().map(Claim::try_from).collect::<Result<_, _>>()?;
        bounded(b.versions.len(), MAX_LISTS, "beat.versions")?;
        let version = |v: wire::ListVersion| Ok((name_from_wire(v.list, "list_version.list")?, v.version));
        let versions = b.versions.into_iter().map(version).collect::<Result<_, WireError>>()?;
        Ok(Self { able: b.able, claims, leaving: b.leaving, placing: b.placing, versions })
    }
}

impl From<Claim> for wire::Claim {
    fn from(c: Claim) -> Self {
        Self {
            pool: c.pair.pool,
            ipv4: c.pair.ipv4.map_or_else(Vec::new, |a| a.octets().to_vec()),
            ipv6: c.pair.ipv6.map_or_else(Vec::new, |a| a.octets().to_vec()),
            owner: c.owner,
            epoch: c.epoch,
            held: c.held,
        }
    }
}

impl TryFrom<wire::Claim> for Claim {
    type Error = WireError;

    fn try_from(c: wire::Claim) -> Result<Self, WireError> {
        let (ipv4, ipv6) = (optional(&c.ipv4, "claim.ipv4")?, optional(&c.ipv6, "claim.ipv6")?);
        Ok(Self {
            pair: Pair {
                pool: name_from_wire(c.pool, "claim.pool")?,
                ipv4: ipv4.map(|o: [u8; 4]| o.into()),
                ipv6: ipv6.map(|o: [u8; 16]| o.into()),
            },
            owner: name_from_wire(c.owner, "claim.owner")?,
            epoch: c.epoch,
            held: c.held,
        })
    }
}

fn optional<const N: usize>(bytes: &[u8], field: &'static str) -> Result<Option<[u8; N]>, WireError> {
    if bytes.is_empty() {
        return Ok(None);
    }
    <[u8; N]>::try_from(bytes).map(Some).map_err(|_| Problem::Length(bytes.len()).of(field))
}

fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(MAX_TTL_MS).min(MAX_TTL_MS)
}

fn duration(ms: u64, field: &'static str) -> Result<Duration, WireError> {
    if ms > MAX_TTL_MS { Err(Problem::Range(ms).of(field)) } else { Ok(Duration::from_millis(ms)) }
}

impl From<&PeerFact> for wire::PeerFact {
    fn from(f: &PeerFact) -> Self {
        Self {
            scope: key_to_wire(f.scope.0),
            namespace: f.namespace.clone(),
            name: f.name.as_str().to_owned(),
            ip: ip_to_wire(f.ip),
            remaining_ms: millis(f.remaining),
            ttl_ms: millis(f.ttl),
            nodes: f.nodes.clone(),
        }
    }
}

impl TryFrom<wire::PeerFact> for PeerFact {
    type Error = WireError;

    fn try_from(f: wire::PeerFact) -> Result<Self, WireError> {
        let name = Name::parse(&f.name).map_err(|_| Problem::Name.of("peer_fact.name"))?;
        if name.as_str() != f.name {
            return Err(Problem::NotCanonical.of("peer_fact.name"));
        }
        Ok(Self {
            scope: ScopeKey(key_from_wire(&f.scope, "peer_fact.scope")?),
            namespace: name_from_wire(f.namespace, "peer_fact.namespace")?,
            name,
            ip: ip_from_wire(&f.ip, "peer_fact.ip")?,
            remaining: duration(f.remaining_ms, "peer_fact.remaining_ms")?,
            ttl: duration(f.ttl_ms, "peer_fact.ttl_ms")?,
            nodes: names_from_wire(f.nodes, MAX_FACT_NODES, "peer_fact.nodes")?,
        })
    }
}

/// Who owns a scope, as a node follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScopeClaim {
    /// The scope.
    pub scope: ScopeKey,
    /// The epoch of the ownership.
    pub epoch: u64,
}

/// Addresses in one message that no gateway stands by.
pub const MAX_ORPHANS: usize = 1024;

/// What an agent sees of the gateways.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// The gateways whose Facts streams said something within the last second, by name.
    pub gateways: Vec<String>,
    /// Who owns the scopes of the node.
    pub claims: Vec<ScopeClaim>,
    /// Addresses that the node's kernel holds, and no gateway that it hears stands by. The first [`MAX_ORPHANS`] are sent.
    pub orphans: Vec<(ScopeKey, IpAddr)>,
}

impl From<Seen> for wire::FactsAck {
    fn from(s: Seen) -> Self {
        let claim = |c: &ScopeClaim| wire::ScopeClaim { scope: key_to_wire(c.scope.0), epoch: c.epoch };
        let orphan =
            |(scope, ip): &(ScopeKey, IpAddr)| wire::Orphan { scope: key_to_wire(scope.0), ip: ip_to_wire(*ip) };
        let orphans = s.orphans.iter().take(MAX_ORPHANS).map(orphan).collect();
        let seen = wire::Seen { gateways: s.gateways, claims: s.claims.iter().map(claim).collect(), orphans };
        Self { kind: Some(wire::facts_ack::Kind::Seen(seen)) }
    }
}

impl TryFrom<wire::Seen> for Seen {
    type Error = WireError;

    fn try_from(s: wire::Seen) -> Result<Self, WireError> {
        bounded(s.claims.len(), MAX_ITEMS, "seen.claims")?;
        bounded(s.orphans.len(), MAX_ORPHANS, "seen.orphans")?;
        let claim = |c: &wire::ScopeClaim| {
            Ok(ScopeClaim { scope: ScopeKey(key_from_wire(&c.scope, "scope_claim.scope")?), epoch: c.epoch })
        };
        let orphan = |o: &wire::Orphan| {
            Ok((ScopeKey(key_from_wire(&o.scope, "orphan.scope")?), ip_from_wire(&o.ip, "orphan.ip")?))
        };
        Ok(Self {
            gateways: names_from_wire(s.gateways, MAX_GATEWAYS, "seen.gateways")?,
            claims: s.claims.iter().map(claim).collect::<Result<_, _>>()?,
            orphans: s.orphans.iter().map(orphan).collect::<Result<_, _>>()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    fn fact(i: u32) -> PeerFact {
        PeerFact {
            scope: ScopeKey(7),
            namespace: "shop".into(),
            name: Name::parse("api.example.com").unwrap(),
            ip: Ipv4Addr::from(i).into(),
            remaining: Duration::from_millis(u64::from(i)),
            ttl: Duration::from_secs(1),
            nodes: vec!["node-1".into()],
        }
    }

    fn over(m: &wire::PeerUpdate) -> PeerMessage {
        PeerMessage::try_from(wire::PeerUpdate::decode(m.encode_to_vec().as_slice()).unwrap()).unwrap()
    }

    #[test]
    fn facts_and_claims_survive_the_wire() {
        let pair = Pair { pool: "p".into(), ipv4: Some([203, 0, 113, 10].into()), ipv6: None };
        let claim = Claim { pair, owner: "gw-a".into(), epoch: u64::MAX, held: true };
        let none = Claim { pair: Pair { pool: "q".into(), ipv4: None, ipv6: None }, held: false, ..claim.clone() };
        let versions = vec![("pods".to_owned(), 7)];
        let beat = Some(Beat { able: true, claims: vec![claim, none], leaving: true, placing: true, versions });
        let m = PeerMessage {
            boot_id: 3,
            snapshot: true,
            more: false,
            facts: vec![fact(1), fact(2)],
            beat,
            denied: vec![],
        };
        let messages = m.clone().into_messages();
        assert_eq!(messages.len(), 1);
        assert_eq!(over(&messages[0]), m);
    }

    #[test]
    fn a_large_snapshot_comes_in_parts_and_only_the_last_ends_it() {
        let facts: Vec<_> = (0..5000).map(fact).collect();
        let m = PeerMessage { snapshot: true, facts: facts.clone(), ..PeerMessage::default() };
        let parts: Vec<_> = m.into_messages().iter().map(over).collect();
        assert_eq!(parts.iter().map(|p| p.more).collect::<Vec<_>>(), [true, true, false]);
        assert_eq!(parts.into_iter().flat_map(|p| p.facts).collect::<Vec<_>>(), facts);
    }

    #[test]
    fn bad_fields_are_refused_by_name() {
        let good = || wire::PeerFact::from(&fact(1));
        let refused = |f: wire::PeerFact| PeerFact::try_from(f).unwrap_err().field;
        assert_eq!(refused(wire::PeerFact { name: "UPPER.example".into(), ..good() }), "peer_fact.name");
        assert_eq!(refused(wire::PeerFact { ip: vec![1], ..good() }), "peer_fact.ip");
        assert_eq!(refused(wire::PeerFact { remaining_ms: u64::MAX, ..good() }), "peer_fact.remaining_ms");
        assert_eq!(refused(wire::PeerFact { nodes: vec![String::new()], ..good() }), "peer_fact.nodes");
        let claim = wire::Claim { pool: "p".into(), owner: "g".into(), ipv6: vec![0; 4], ..Default::default() };
        assert_eq!(Claim::try_from(claim).unwrap_err().field, "claim.ipv6");
    }

    #[test]
    fn what_an_agent_sees_survives_the_wire() {
        let claims = vec![ScopeClaim { scope: ScopeKey(1), epoch: 9 }];
        let all: Vec<_> = (0..=MAX_ORPHANS as u32).map(|i| (ScopeKey(3), Ipv4Addr::from(i).into())).collect();
        let seen =
            |orphans: &[_]| Seen { gateways: vec!["gw-a".into()], claims: claims.clone(), orphans: orphans.to_vec() };
        let back = |ack: wire::FactsAck| super::super::FactsUp::try_from(ack);
        let sent = back(wire::FactsAck::from(seen(&all))).unwrap();
        assert_eq!(sent, super::super::FactsUp::Seen(seen(&all[..MAX_ORPHANS])), "as many as are taken");
        let refused = |orphans| {
            let kind = wire::facts_ack::Kind::Seen(wire::Seen { orphans, ..Default::default() });
            back(wire::FactsAck { kind: Some(kind) }).unwrap_err().field
        };
        let good = wire::Orphan { scope: vec![0; 16], ip: vec![192, 0, 2, 1] };
        assert_eq!(refused(vec![good.clone(); MAX_ORPHANS + 1]), "seen.orphans");
        assert_eq!(refused(vec![wire::Orphan { scope: vec![1], ..good.clone() }]), "orphan.scope");
        assert_eq!(refused(vec![wire::Orphan { ip: vec![], ..good }]), "orphan.ip");
    }
}
