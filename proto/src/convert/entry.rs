//! Entries of the desired state and their identities.

use std::net::IpAddr;

use tidegate_policy::state::{Cluster, Endpoint, Entry, EntryKey, Gateway, Group, Named, Node, Prefixes, Scope, Touch};
use tidegate_policy::{ClassKey, GroupKey, PortSet, PrefixSetKey, ScopeKey};

use super::{
    MAX_DNS, MAX_GATEWAY_ADDRESSES, MAX_GATEWAYS, MAX_NODE_ADDRESSES, MAX_PREFIXES, MAX_SUFFIXES, Problem, WireError,
    bounded, ip_from_wire, ip_to_wire, key_from_wire, key_to_wire, name_from_wire, names_from_wire, ports_from_wire,
    ports_to_wire, prefix_from_wire, prefix_to_wire, socket_from_wire, socket_to_wire, u16_from_wire,
};
use crate::wire;
use wire::entry::Kind;
use wire::entry_key::Kind as KeyKind;

pub(super) fn grant_to_wire(group: GroupKey, class: ClassKey, ports: &PortSet) -> wire::Grant {
    let (ports, other) = ports_to_wire(ports);
    wire::Grant { group: key_to_wire(group.0), class: key_to_wire(class.0), ports, other }
}

pub(super) fn grant_from_wire(grant: &wire::Grant) -> Result<(GroupKey, ClassKey, PortSet), WireError> {
    Ok((
        GroupKey(key_from_wire(&grant.group, "grant.group")?),
        ClassKey(key_from_wire(&grant.class, "grant.class")?),
        ports_from_wire(&grant.ports, grant.other)?,
    ))
}

impl From<&Entry> for wire::Entry {
    fn from(entry: &Entry) -> Self {
        let kind = match entry {
            Entry::Cluster(c) => Kind::Cluster(wire::Cluster {
                prefixes: c.prefixes.iter().copied().map(prefix_to_wire).collect(),
                node_ports: c.node_ports.map(|(a, b)| wire::NodePorts { first: a.into(), last: b.into() }),
                dns: c.dns.iter().copied().map(socket_to_wire).collect(),
                ping: c.ping,
                suffixes: c.suffixes.clone(),
            }),
            Entry::Node(name, n) => Kind::Node(wire::Node {
                name: name.clone(),
                addresses: n.addresses.iter().copied().map(ip_to_wire).collect(),
            }),
            Entry::Gateway(name, g) => Kind::Gateway(wire::Gateway {
                name: name.clone(),
                node: g.node.clone(),
                control: g.control.iter().copied().map(socket_to_wire).collect(),
            }),
            Entry::Endpoint(ip, e) => Kind::Endpoint(endpoint_to_wire(*ip, e)),
            Entry::Scope(key, s) => Kind::Scope(wire::Scope {
                key: key_to_wire(key.0),
                owner: s.owner.clone(),
                epoch: s.epoch,
                pair: s.pair.into(),
                standbys: s.standbys.clone(),
            }),
            Entry::Group(key, g) => Kind::Group(wire::Group {
                key: key_to_wire(key.0),
                isolated: g.isolated,
                audit: g.audit,
                admin: g.admin.map(|k| key_to_wire(k.0)).unwrap_or_default(),
                own: g.own.map(|k| key_to_wire(k.0)).unwrap_or_default(),
            }),
            Entry::Prefixes(key, set) => Kind::Prefixes(wire::PrefixSet {
                key: key_to_wire(key.0),
                prefixes: set
                    .iter()
                    .map(|(net, ports)| {
                        let (ports, other) = ports_to_wire(ports);
                        wire::PrefixPorts { prefix: Some(prefix_to_wire(*net)), ports, other }
                    })
                    .collect(),
            }),
            Entry::Grant(group, class, ports) => Kind::Grant(grant_to_wire(*group, *class, ports)),
            Entry::Namespace(name, touch) => {
                Kind::Namespace(wire::Namespace { name: name.clone(), touch: touch_to_wire(*touch).into() })
            }
            // A field of its own in an update.
            Entry::Name(..) => return wire::Entry { kind: None },
        };
        wire::Entry { kind: Some(kind) }
    }
}

fn endpoint_to_wire(ip: IpAddr, e: &Endpoint) -> wire::Endpoint {
    wire::Endpoint {
        ip: ip_to_wire(ip),
        node: e.node.clone(),
        namespace: e.namespace.clone(),
        pod: e.pod.clone(),
        touch: touch_to_wire(e.touch).into(),
        member: e
            .member
            .map(|(scope, group)| wire::Member { scope: key_to_wire(scope.0), group: key_to_wire(group.0) }),
    }
}

impl TryFrom<wire::Entry> for Entry {
    type Error = WireError;

    fn try_from(entry: wire::Entry) -> Result<Self, WireError> {
        Ok(match entry.kind.ok_or(Problem::Missing.of("entry.kind"))? {
            Kind::Cluster(c) => Entry::Cluster(cluster_from_wire(&c)?),
            Kind::Node(n) => {
                bounded(n.addresses.len(), MAX_NODE_ADDRESSES, "node.addresses")?;
                let addresses =
                    n.addresses.iter().map(|a| ip_from_wire(a, "node.addresses")).collect::<Result<_, _>>()?;
                Entry::Node(name_from_wire(n.name, "node.name")?, Node { addresses })
            }
            Kind::Gateway(g) => {
                bounded(g.control.len(), MAX_GATEWAY_ADDRESSES, "gateway.control")?;
                let control =
                    g.control.iter().map(|a| socket_from_wire(a, "gateway.control")).collect::<Result<_, _>>()?;
                let node = name_from_wire(g.node, "gateway.node")?;
                Entry::Gateway(name_from_wire(g.name, "gateway.name")?, Gateway { node, control })
            }
            Kind::Endpoint(e) => endpoint_from_wire(e)?,
            Kind::Scope(s) => Entry::Scope(
                ScopeKey(key_from_wire(&s.key, "scope.key")?),
                Scope {
                    owner: name_from_wire(s.owner, "scope.owner")?,
                    epoch: s.epoch,
                    pair: u8::try_from(s.pair).map_err(|_| Problem::Range(s.pair.into()).of("scope.pair"))?,
                    standbys: names_from_wire(s.standbys, MAX_GATEWAYS, "scope.standbys")?,
                },
            ),
            Kind::Group(g) => Entry::Group(
                GroupKey(key_from_wire(&g.key, "group.key")?),
                Group {
                    isolated: g.isolated,
                    audit: g.audit,
                    admin: optional_set(&g.admin, "group.admin")?,
                    own: optional_set(&g.own, "group.own")?,
                },
            ),
            Kind::Prefixes(p) => {
                Entry::Prefixes(PrefixSetKey(key_from_wire(&p.key, "prefix_set.key")?), prefixes_from_wire(&p)?)
            }
            Kind::Grant(g) => {
                let (group, class, ports) = grant_from_wire(&g)?;
                Entry::Grant(group, class, ports)
            }
            Kind::Namespace(n) => Entry::Namespace(
                name_from_wire(n.name, "namespace.name")?,
                touch_from_wire(n.touch, "namespace.touch")?,
            ),
        })
    }
}

const fn touch_to_wire(touch: Touch) -> wire::Touch {
    match touch {
        Touch::Untouched => wire::Touch::Untouched,
        Touch::Guarded => wire::Touch::Guarded,
        Touch::Isolated => wire::Touch::Isolated,
    }
}

fn touch_from_wire(touch: i32, field: &'static str) -> Result<Touch, WireError> {
    match wire::Touch::try_from(touch).unwrap_or_default() {
        wire::Touch::Unspecified => Err(Problem::Unknown(touch).of(field)),
        wire::Touch::Untouched => Ok(Touch::Untouched),
        wire::Touch::Guarded => Ok(Touch::Guarded),
        wire::Touch::Isolated => Ok(Touch::Isolated),
    }
}

fn optional_set(bytes: &[u8], field: &'static str) -> Result<Option<PrefixSetKey>, WireError> {
    if bytes.is_empty() { Ok(None) } else { key_from_wire(bytes, field).map(|k| Some(PrefixSetKey(k))) }
}

fn cluster_from_wire(c: &wire::Cluster) -> Result<Cluster, WireError> {
    bounded(c.prefixes.len(), MAX_PREFIXES, "cluster.prefixes")?;
    bounded(c.dns.len(), MAX_DNS, "cluster.dns")?;
    let node_ports = match &c.node_ports {
        None => None,
        Some(p) => {
            let first = u16_from_wire(p.first, "node_ports.first")?;
            let last = u16_from_wire(p.last, "node_ports.last")?;
            if first > last {
                return Err(Problem::Range(last.into()).of("node_ports.last"));
            }
            Some((first, last))
        }
    };
    Ok(Cluster {
        prefixes: c.prefixes.iter().map(|p| prefix_from_wire(p, "cluster.prefixes")).collect::<Result<_, _>>()?,
        node_ports,
        dns: c.dns.iter().map(|a| socket_from_wire(a, "cluster.dns")).collect::<Result<_, _>>()?,
        ping: c.ping,
        suffixes: names_from_wire(c.suffixes.clone(), MAX_SUFFIXES, "cluster.suffixes")?,
    })
}

pub(super) fn name_to_wire(name: &str, to: Named) -> wire::ClusterName {
    wire::ClusterName { name: name.to_owned(), outside: to == Named::Outside }
}

pub(super) fn named_from_wire(n: wire::ClusterName) -> Result<Entry, WireError> {
    let to = if n.outside { Named::Outside } else { Named::Inside };
    Ok(Entry::Name(name_from_wire(n.name, "cluster_name.name")?, to))
}

fn endpoint_from_wire(e: wire::Endpoint) -> Result<Entry, WireError> {
    let touch = touch_from_wire(e.touch, "endpoint.touch")?;
    let member = match &e.member {
        None => None,
        Some(m) => Some((
            ScopeKey(key_from_wire(&m.scope, "member.scope")?),
            GroupKey(key_from_wire(&m.group, "member.group")?),
        )),
    };
    Ok(Entry::Endpoint(
        ip_from_wire(&e.ip, "endpoint.ip")?,
        Endpoint {
            node: name_from_wire(e.node, "endpoint.node")?,
            namespace: name_from_wire(e.namespace, "endpoint.namespace")?,
            pod: name_from_wire(e.pod, "endpoint.pod")?,
            touch,
            member,
        },
    ))
}

fn prefixes_from_wire(set: &wire::PrefixSet) -> Result<Prefixes, WireError> {
    bounded(set.prefixes.len(), MAX_PREFIXES, "prefix_set.prefixes")?;
    let mut out = Prefixes::new();
    for p in &set.prefixes {
        let prefix = p.prefix.as_ref().ok_or(Problem::Missing.of("prefix_ports.prefix"))?;
        let net = prefix_from_wire(prefix, "prefix_ports.prefix")?;
        if out.insert(net, ports_from_wire(&p.ports, p.other)?).is_some() {
            return Err(Problem::Duplicate.of("prefix_ports.prefix"));
        }
    }
    Ok(out)
}

impl From<&EntryKey> for wire::EntryKey {
    fn from(key: &EntryKey) -> Self {
        let kind = match key {
            EntryKey::Cluster => KeyKind::Cluster(wire::ClusterKey {}),
            EntryKey::Node(n) => KeyKind::Node(n.clone()),
            EntryKey::Gateway(n) => KeyKind::Gateway(n.clone()),
            EntryKey::Endpoint(ip) => KeyKind::Endpoint(ip_to_wire(*ip)),
            EntryKey::Scope(k) => KeyKind::Scope(key_to_wire(k.0)),
            EntryKey::Group(k) => KeyKind::Group(key_to_wire(k.0)),
            EntryKey::Prefixes(k) => KeyKind::Prefixes(key_to_wire(k.0)),
            EntryKey::Grant(g, c) => {
                KeyKind::Grant(wire::GrantKey { group: key_to_wire(g.0), class: key_to_wire(c.0) })
            }
            EntryKey::Namespace(n) => KeyKind::Namespace(n.clone()),
            EntryKey::Name(_) => return wire::EntryKey { kind: None },
        };
        wire::EntryKey { kind: Some(kind) }
    }
}

impl TryFrom<wire::EntryKey> for EntryKey {
    type Error = WireError;

    fn try_from(key: wire::EntryKey) -> Result<Self, WireError> {
        Ok(match key.kind.ok_or(Problem::Missing.of("entry_key.kind"))? {
            KeyKind::Cluster(_) => EntryKey::Cluster,
            KeyKind::Node(n) => EntryKey::Node(name_from_wire(n, "entry_key.node")?),
            KeyKind::Gateway(n) => EntryKey::Gateway(name_from_wire(n, "entry_key.gateway")?),
            KeyKind::Endpoint(ip) => EntryKey::Endpoint(ip_from_wire(&ip, "entry_key.endpoint")?),
            KeyKind::Scope(k) => EntryKey::Scope(ScopeKey(key_from_wire(&k, "entry_key.scope")?)),
            KeyKind::Group(k) => EntryKey::Group(GroupKey(key_from_wire(&k, "entry_key.group")?)),
            KeyKind::Prefixes(k) => EntryKey::Prefixes(PrefixSetKey(key_from_wire(&k, "entry_key.prefixes")?)),
            KeyKind::Grant(g) => EntryKey::Grant(
                GroupKey(key_from_wire(&g.group, "grant_key.group")?),
                ClassKey(key_from_wire(&g.class, "grant_key.class")?),
            ),
            KeyKind::Namespace(n) => EntryKey::Namespace(name_from_wire(n, "entry_key.namespace")?),
        })
    }
}
