//! What the node's network looks like: devices, routes, neighbours, and which
//! device leads to which pod. Reading through rtnetlink; the answers themselves
//! are found by pure functions over a [`Topology`].

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use futures_util::{StreamExt, TryStreamExt};
use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::{InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourState};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType};
use rtnetlink::MulticastGroup;
use tokio::sync::Notify;

use crate::config::Interfaces;
use crate::devices;

/// Why the kernel's tables could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The kernel refused or the socket failed.
    #[error("{what}: {source}")]
    Netlink {
        /// What was tried.
        what: String,
        /// The answer.
        source: Box<rtnetlink::Error>,
    },
    /// A socket, file or thread failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// The answer.
        source: io::Error,
    },
    /// Something is not as it has to be.
    #[error("{0}")]
    State(String),
}

impl LinkError {
    pub(crate) fn netlink(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Self {
        let what = what.into();
        move |source| LinkError::Netlink { what, source: Box::new(source) }
    }

    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| LinkError::Io { what, source }
    }

    /// Whether the kernel said that the thing does not exist.
    pub fn is_gone(&self) -> bool {
        let code = match self {
            LinkError::Netlink { source, .. } => match source.as_ref() {
                rtnetlink::Error::NetlinkError(e) => -e.raw_code(),
                _ => return false,
            },
            LinkError::Io { source, .. } => source.raw_os_error().unwrap_or(0),
            LinkError::State(_) => return false,
        };
        matches!(code, libc::ENODEV | libc::ENOENT | libc::ENXIO)
    }
}

/// What kind of device it is, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One end of a virtual cable.
    Veth,
    /// A bridge.
    Bridge,
    /// A VXLAN device.
    Vxlan {
        /// Its UDP port.
        port: u16,
        /// Whether it takes the tunnel's ends from each packet.
        external: bool,
    },
    /// Another device that unpacks what other machines send.
    Tunnel,
    /// A netkit device: not supported yet.
    Netkit,
    /// Anything else.
    Other,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its kind.
    pub kind: Kind,
    /// Its hardware address; zeroes if it has none of 6 octets.
    pub mac: [u8; 6],
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// Looks for no neighbours, and is no member of groups of which it would tell.
    pub silent: bool,
    /// The index of the other end of a veth pair, in that end's namespace.
    pub peer: Option<u32>,
    /// The id of the other end's namespace; absent if it is in this one.
    pub peer_netns: Option<i32>,
    /// The bridge or bond that it is a port of.
    pub master: Option<u32>,
}

/// What the node's network looks like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// Devices by index.
    pub links: BTreeMap<u32, Link>,
    /// Devices of exact unicast routes to one address, the preferred one.
    pub host_routes: BTreeMap<IpAddr, u32>,
    /// Prefixes on a link without a next hop, and their devices.
    pub onlink: Vec<(IpNet, u32)>,
    /// Devices of default routes.
    pub defaults: BTreeSet<u32>,
    /// Devices of default routes in other tables than the main one: rules may lead to them. The rules are not read.
    pub ruled: BTreeSet<u32>,
    /// Neighbours: (device, address) → hardware address.
    pub neighbours: BTreeMap<(u32, IpAddr), [u8; 6]>,
    /// Forwarding tables: (bridge, hardware address) → port.
    pub forwarding: BTreeMap<(u32, [u8; 6]), u32>,
    /// Global addresses by device.
    pub addresses: BTreeMap<u32, BTreeSet<IpAddr>>,
}

impl Topology {
    /// The device of this name.
    pub fn by_name(&self, name: &str) -> Option<&Link> {
        self.links.values().find(|l| l.name == name)
    }

    /// The uplinks: those named, else the devices of the default routes. Our own devices are none.
    pub fn uplinks(&self, names: Option<&[String]>) -> Vec<&Link> {
        let ours = |l: &&Link| !devices::OURS.contains(&l.name.as_str());
        match names {
            Some(names) => names.iter().filter_map(|n| self.by_name(n)).filter(ours).collect(),
            None => self.defaults.iter().filter_map(|i| self.links.get(i)).filter(ours).collect(),
        }
    }

    /// The uplinks, and the devices that have one of `addresses`, the node's: by them tunnel packets of other nodes enter.
    pub fn underlay(&self, names: Option<&[String]>, addresses: &[IpAddr]) -> Vec<&Link> {
        let mut out = self.uplinks(names);
        let has = |l: &&Link| self.addresses.get(&l.index).is_some_and(|a| addresses.iter().any(|i| a.contains(i)));
        for link in self.links.values().filter(|l| l.name != "lo").filter(has) {
            if !out.contains(&link) {
                out.push(link);
            }
        }
        out
    }

    /// Whether some device has this address.
    pub fn is_own(&self, address: IpAddr) -> bool {
        self.addresses.values().any(|a| a.contains(&address))
    }

    /// The node's addresses, each once: first those of these devices, which it needs, as they are on the network.
    pub fn own(&self, first: &[&Link]) -> Vec<IpAddr> {
        let of = first.iter().filter_map(|l| self.addresses.get(&l.index));
        let mut seen = BTreeSet::new();
        of.chain(self.addresses.values()).flatten().copied().filter(|ip| seen.insert(*ip)).collect()
    }

    /// Devices by which rules send packets outside, such as a second network card of whose addresses some pods have one.
    /// None that leads to a container.
    pub fn by_rule(&self, uplinks: &[&Link]) -> Vec<&Link> {
        let inside = self.inside(&[]);
        let ours = |l: &Link| devices::OURS.contains(&l.name.as_str()) || inside.contains(&l.index);
        let known = |l: &Link| uplinks.iter().any(|u| u.index == l.index);
        self.ruled.iter().filter_map(|i| self.links.get(i)).filter(|l| !ours(l) && !known(l)).collect()
    }

    /// Devices on top of these that are no tunnels (VLANs, macvlans): what leaves by them leaves there.
    pub fn above(&self, these: &[&Link]) -> Vec<&Link> {
        let on = |l: &&Link| l.peer_netns.is_none() && these.iter().any(|t| l.peer == Some(t.index));
        self.links.values().filter(|l| l.kind == Kind::Other).filter(on).collect()
    }

    /// Devices that lead to containers of this node, and the bridges of such: what enters by them was sent here.
    /// `outward` lead to the rest of the network.
    pub fn inside(&self, outward: &[&Link]) -> BTreeSet<u32> {
        let ours = |l: &Link| devices::OURS.contains(&l.name.as_str());
        let cables = self.links.values().filter(|l| l.kind == Kind::Veth && l.peer_netns.is_some() && !ours(l));
        let all = cables.flat_map(|l| {
            let bridge = l.master.filter(|m| self.links.get(m).is_some_and(|b| b.kind == Kind::Bridge));
            [Some(l.index), bridge]
        });
        all.flatten().filter(|i| !outward.iter().any(|l| l.index == *i || l.master == Some(*i))).collect()
    }

    /// The host-side interface of the pod with this address.
    pub fn interface(&self, address: IpAddr, how: Interfaces) -> Option<&Link> {
        let index = match how {
            Interfaces::HostRoute => *self.host_routes.get(&address)?,
            Interfaces::Bridge => {
                let bridge = self.bridge(address)?;
                let mac = self.neighbours.get(&(bridge, address))?;
                *self.forwarding.get(&(bridge, *mac))?
            }
        };
        self.links.get(&index).filter(|l| l.kind == Kind::Veth && !devices::OURS.contains(&l.name.as_str()))
    }

    /// Whether the pod's host-side interface is a netkit device, which is not supported yet.
    pub fn is_netkit(&self, address: IpAddr) -> bool {
        let device = self.host_routes.get(&address).and_then(|i| self.links.get(i));
        device.is_some_and(|l| l.kind == Kind::Netkit)
    }

    /// The bridge whose link the address is on.
    pub fn bridge(&self, address: IpAddr) -> Option<u32> {
        self.onlink
            .iter()
            .filter(|(net, index)| {
                net.contains(&address) && self.links.get(index).is_some_and(|l| l.kind == Kind::Bridge)
            })
            .max_by_key(|(net, _)| net.prefix_len())
            .map(|(_, index)| *index)
    }

    /// The largest packet that fits into the tunnel on these uplinks, in bytes.
    pub fn tunnel_mtu(&self, uplinks: &[&Link]) -> u16 {
        let v6 = |l: &&Link| self.addresses.get(&l.index).is_some_and(|a| a.iter().any(IpAddr::is_ipv6));
        let overhead = if uplinks.iter().any(v6) { 70 } else { 50 };
        let smallest = uplinks.iter().map(|l| l.mtu).min().unwrap_or(1500);
        // IPv6 needs 1280 inside (RFC 8200, section 5): where the uplink gives less, outer packets are fragmented.
        u16::try_from(smallest.saturating_sub(overhead)).unwrap_or(9000).clamp(1280, 9000)
    }
}

fn link(message: LinkMessage) -> Link {
    let flags = message.header.flags;
    let mut out = Link {
        index: message.header.index,
        name: String::new(),
        kind: Kind::Other,
        mac: [0; 6],
        mtu: 0,
        up: flags.contains(LinkFlags::Up),
        silent: flags.contains(LinkFlags::Noarp) && !flags.contains(LinkFlags::Multicast),
        peer: None,
        peer_netns: None,
        master: None,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => out.name = name,
            LinkAttribute::Mtu(mtu) => out.mtu = mtu,
            LinkAttribute::Address(a) => out.mac = a.try_into().unwrap_or_default(),
            LinkAttribute::Link(i) => out.peer = Some(i),
            LinkAttribute::LinkNetNsId(id) => out.peer_netns = Some(id),
            LinkAttribute::Controller(i) => out.master = Some(i),
            LinkAttribute::LinkInfo(infos) => out.kind = kind(&infos),
            _ => {}
        }
    }
    out
}

/// The address that a device has: beside one of a link between two, the other end's is said, too.
fn own(attributes: &[AddressAttribute]) -> Option<IpAddr> {
    let local = attributes.iter().find_map(|a| if let AddressAttribute::Local(ip) = a { Some(*ip) } else { None });
    local.or_else(|| {
        attributes.iter().find_map(|a| if let AddressAttribute::Address(ip) = a { Some(*ip) } else { None })
    })
}

fn kind(infos: &[LinkInfo]) -> Kind {
    let mut kind = Kind::Other;
    for info in infos {
        match info {
            LinkInfo::Kind(InfoKind::Veth) => kind = Kind::Veth,
            LinkInfo::Kind(InfoKind::Bridge) => kind = Kind::Bridge,
            LinkInfo::Kind(InfoKind::Netkit) => kind = Kind::Netkit,
            LinkInfo::Kind(
                InfoKind::IpIp
                | InfoKind::Ip6Tnl
                | InfoKind::SitTun
                | InfoKind::GreTun
                | InfoKind::GreTun6
                | InfoKind::GreTap
                | InfoKind::GreTap6
                | InfoKind::Geneve
                | InfoKind::Wireguard
                | InfoKind::Xfrm
                | InfoKind::Vti
                | InfoKind::Vti6,
            ) => kind = Kind::Tunnel,
            LinkInfo::Data(InfoData::Vxlan(data)) => {
                let (mut port, mut external) = (0, false);
                for d in data {
                    match d {
                        InfoVxlan::Port(p) => port = *p,
                        InfoVxlan::CollectMetadata(c) => external = *c,
                        _ => {}
                    }
                }
                kind = Kind::Vxlan { port, external };
            }
            _ => {}
        }
    }
    kind
}

/// A netlink socket in the namespace of the thread that opened it.
#[derive(Clone, Debug)]
pub struct Netlink {
    pub(crate) handle: rtnetlink::Handle,
}

impl Netlink {
    /// Opens the socket; its driver runs on the current runtime.
    ///
    /// # Errors
    /// No socket.
    pub fn open() -> Result<Self, LinkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(LinkError::io("netlink socket"))?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// All devices.
    ///
    /// # Errors
    /// The dump failed.
    pub async fn links(&self) -> Result<Vec<Link>, LinkError> {
        let messages = self.handle.link().get().execute();
        messages.map_ok(link).try_collect().await.map_err(LinkError::netlink("list devices"))
    }

    /// A device by name.
    ///
    /// # Errors
    /// The request failed; that there is none is no error.
    pub async fn link(&self, name: &str) -> Result<Option<Link>, LinkError> {
        let mut answer = Box::pin(self.handle.link().get().match_name(name).execute());
        match answer.try_next().await.map_err(LinkError::netlink(format!("look for device {name}"))) {
            Ok(found) => Ok(found.map(link)),
            Err(e) if e.is_gone() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The hardware address of a veth's other end, also in another namespace.
    ///
    /// # Errors
    /// The request failed, or there is no other end.
    pub async fn peer_mac(&self, of: &Link) -> Result<[u8; 6], LinkError> {
        let none = || LinkError::State(format!("device {} has no other end", of.name));
        let mut request = self.handle.link().get().match_index(of.peer.ok_or_else(none)?);
        if let Some(id) = of.peer_netns {
            request.message_mut().attributes.push(LinkAttribute::IfNetnsId(id));
        }
        let mut answer = Box::pin(request.execute());
        let what = format!("look for the other end of device {}", of.name);
        answer.try_next().await.map_err(LinkError::netlink(what))?.map(|m| link(m).mac).ok_or_else(none)
    }

    /// Reads everything. Neighbours and forwarding tables only where pods are found by them.
    ///
    /// # Errors
    /// A dump failed.
    pub async fn topology(&self, how: Interfaces) -> Result<Topology, LinkError> {
        let mut out = Topology::default();
        for l in self.links().await? {
            out.links.insert(l.index, l);
        }
        let mut best: BTreeMap<IpAddr, u32> = BTreeMap::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            let mut routes = Box::pin(self.handle.route().get(request).execute());
            while let Some(route) = routes.try_next().await.map_err(LinkError::netlink("list routes"))? {
                add_route(&mut out, &mut best, &route);
            }
        }
        let mut addresses = Box::pin(self.handle.address().get().execute());
        while let Some(a) = addresses.try_next().await.map_err(LinkError::netlink("list addresses"))? {
            if let Some(ip) = own(&a.attributes)
                && !matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local())
            {
                out.addresses.entry(a.header.index).or_default().insert(ip);
            }
        }
        if how == Interfaces::Bridge {
            self.neighbours(&mut out, AddressFamily::Unspec).await?;
            self.neighbours(&mut out, AddressFamily::Bridge).await?;
        }
        Ok(out)
    }

    async fn neighbours(&self, out: &mut Topology, family: AddressFamily) -> Result<(), LinkError> {
        let request = self.handle.neighbours().get().set_address_family(family);
        let mut entries = Box::pin(request.execute());
        while let Some(n) = entries.try_next().await.map_err(LinkError::netlink("list neighbours"))? {
            if matches!(n.header.state, NeighbourState::Failed | NeighbourState::Incomplete | NeighbourState::None) {
                continue;
            }
            let (mut ip, mut mac, mut master) = (None, None, None);
            for attribute in n.attributes {
                match attribute {
                    NeighbourAttribute::Destination(NeighbourAddress::Inet(a)) => ip = Some(IpAddr::V4(a)),
                    NeighbourAttribute::Destination(NeighbourAddress::Inet6(a)) => ip = Some(IpAddr::V6(a)),
                    NeighbourAttribute::LinkLayerAddress(a) => mac = <[u8; 6]>::try_from(a).ok(),
                    NeighbourAttribute::Controller(i) => master = Some(i),
                    _ => {}
                }
            }
            match (n.header.family, mac) {
                (AddressFamily::Bridge, Some(mac)) => {
                    // The port's own address is in the table too, as a permanent entry.
                    if let Some(bridge) = master
                        && n.header.state != NeighbourState::Permanent
                    {
                        out.forwarding.insert((bridge, mac), n.header.ifindex);
                    }
                }
                (_, Some(mac)) => {
                    if let Some(ip) = ip {
                        out.neighbours.insert((n.header.ifindex, ip), mac);
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Has the kernel look for a neighbour: a pod that never spoke to its node is in no table yet.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn resolve(&self, ifindex: u32, address: IpAddr) -> Result<(), LinkError> {
        let request = self.handle.neighbours().add(ifindex, address);
        let request = request.state(NeighbourState::None).flags(NeighbourFlags::Use).replace();
        request.execute().await.map_err(LinkError::netlink(format!("resolve {address}")))
    }

    /// Deletes a device, if it is there.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn delete(&self, name: &str) -> Result<(), LinkError> {
        let Some(link) = self.link(name).await? else { return Ok(()) };
        match self.handle.link().del(link.index).execute().await {
            Ok(()) => Ok(()),
            Err(e) => Err(LinkError::netlink(format!("delete device {name}"))(e)),
        }
        .or_else(|e| if e.is_gone() { Ok(()) } else { Err(e) })
    }
}

fn add_route(out: &mut Topology, best: &mut BTreeMap<IpAddr, u32>, route: &RouteMessage) {
    if route.header.kind != RouteType::Unicast {
        return;
    }
    let (mut destination, mut gateway, mut priority, mut table) = (None, false, 0, u32::from(route.header.table));
    let mut out_devices: Vec<u32> = Vec::new();
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(a)) => destination = Some(IpAddr::V4(*a)),
            RouteAttribute::Destination(RouteAddress::Inet6(a)) => destination = Some(IpAddr::V6(*a)),
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) => gateway = true,
            RouteAttribute::Oif(i) => out_devices.push(*i),
            RouteAttribute::Priority(p) => priority = *p,
            RouteAttribute::Table(t) => table = *t,
            RouteAttribute::MultiPath(hops) => {
                gateway = true;
                out_devices.extend(hops.iter().map(|h| h.interface_index));
            }
            _ => {}
        }
    }
    let length = route.header.destination_prefix_length;
    let Some(destination) = destination else {
        if length == 0 {
            let main = table == u32::from(RouteHeader::RT_TABLE_MAIN);
            if main { &mut out.defaults } else { &mut out.ruled }.extend(out_devices);
        }
        return;
    };
    let (Some(device), Ok(net)) = (out_devices.first().copied(), IpNet::new(destination, length)) else { return };
    if net.prefix_len() == net.max_prefix_len() {
        if best.get(&destination).is_none_or(|p| priority < *p) {
            best.insert(destination, priority);
            out.host_routes.insert(destination, device);
        }
    } else if !gateway {
        out.onlink.push((net, device));
    }
}

/// Wakes `changed` on every change of devices, routes or addresses, and of neighbours where asked. The driver runs on the
/// current runtime and remembers nothing, so that a storm of changes costs one wake-up.
///
/// # Errors
/// No socket.
pub fn watch(neighbours: bool, changed: Arc<Notify>) -> Result<(), LinkError> {
    let mut groups = vec![
        MulticastGroup::Link,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
    ];
    if neighbours {
        groups.push(MulticastGroup::Neigh);
    }
    let (connection, _, mut messages) =
        rtnetlink::new_multicast_connection(&groups).map_err(LinkError::io("netlink multicast socket"))?;
    tokio::spawn(connection);
    tokio::spawn(async move {
        while messages.next().await.is_some() {
            changed.notify_one();
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(index: u32, name: &str, kind: Kind) -> Link {
        Link {
            index,
            name: name.into(),
            kind,
            mac: [2, 0, 0, 0, 0, index as u8],
            mtu: 1500,
            up: true,
            silent: false,
            peer: None,
            peer_netns: None,
            master: None,
        }
    }

    fn topology() -> Topology {
        let mut t = Topology::default();
        for l in [
            device(1, "eth0", Kind::Other),
            device(2, "veth1", Kind::Veth),
            device(3, "br0", Kind::Bridge),
            device(4, "tgq", Kind::Veth),
            device(5, "nk0", Kind::Netkit),
        ] {
            t.links.insert(l.index, l);
        }
        t.defaults = [1, 4].into();
        t
    }

    fn ip(s: &str) -> IpAddr {
        s.parse().unwrap()
    }

    #[test]
    fn uplinks_are_the_default_routes_devices_or_those_named_and_never_ours() {
        let t = topology();
        let names = |n: Option<&[String]>| t.uplinks(n).iter().map(|l| l.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(None), ["eth0"]);
        assert_eq!(names(Some(&["br0".into(), "none0".into()])), ["br0"]);
        assert!(names(Some(&["tgq".into()])).is_empty());
    }

    #[test]
    fn the_uplinks_addresses_come_first_and_each_once() {
        let mut t = topology();
        t.addresses =
            [(2, [ip("10.0.0.1"), ip("192.0.2.9")].into()), (1, [ip("192.0.2.9"), ip("fd00::9")].into())].into();
        let [first, second] = [1, 2].map(|n| t.links[&n].clone());
        assert_eq!(t.own(&[&first]), [ip("192.0.2.9"), ip("fd00::9"), ip("10.0.0.1")]);
        assert_eq!(t.own(&[&second]), [ip("10.0.0.1"), ip("192.0.2.9"), ip("fd00::9")]);
        assert!(t.is_own(ip("10.0.0.1")) && !t.is_own(ip("10.0.0.2")));
    }

    #[test]
    fn rules_lead_out_by_other_devices_but_never_by_a_containers() {
        let mut t = topology();
        let cable = Link { peer_netns: Some(1), ..device(6, "veth2", Kind::Veth) };
        for l in [device(7, "eth1", Kind::Other), cable] {
            t.links.insert(l.index, l);
        }
        t.ruled = [1, 4, 6, 7, 9].into();
        let names: Vec<&str> = t.by_rule(&t.uplinks(None)).iter().map(|l| l.name.as_str()).collect();
        assert_eq!(names, ["eth1"]);
        assert!(t.by_rule(&t.uplinks(Some(&["eth0".into(), "eth1".into()]))).is_empty());
    }

    #[test]
    fn a_host_route_leads_to_a_veth_and_to_nothing_else() {
        let mut t = topology();
        t.host_routes = [(ip("10.0.0.5"), 2), (ip("10.0.0.6"), 1), (ip("10.0.0.7"), 4), (ip("10.0.0.8"), 5)].into();
        let found = |a: &str| t.interface(ip(a), Interfaces::HostRoute).map(|l| l.index);
        assert_eq!(found("10.0.0.5"), Some(2));
        for other in ["10.0.0.6", "10.0.0.7", "10.0.0.8", "10.0.0.9"] {
            assert_eq!(found(other), None, "{other}");
        }
        assert!(t.is_netkit(ip("10.0.0.8")) && !t.is_netkit(ip("10.0.0.5")));
    }

    #[test]
    fn a_bridge_leads_through_neighbour_and_forwarding_table() {
        let mut t = topology();
        t.onlink = vec![("10.0.0.0/8".parse().unwrap(), 1), ("10.1.0.0/16".parse().unwrap(), 3)];
        let mac = [2, 9, 9, 9, 9, 9];
        t.neighbours.insert((3, ip("10.1.0.5")), mac);
        assert!(t.interface(ip("10.1.0.5"), Interfaces::Bridge).is_none());
        t.forwarding.insert((3, mac), 2);
        assert_eq!(t.interface(ip("10.1.0.5"), Interfaces::Bridge).unwrap().index, 2);
        assert_eq!(t.bridge(ip("10.1.0.6")), Some(3));
        assert_eq!(t.bridge(ip("10.2.0.6")), None, "eth0 is no bridge");
    }

    #[test]
    fn the_tunnel_fits_the_smallest_uplink_and_ipv6_needs_more_room() {
        let mut t = topology();
        assert_eq!(t.tunnel_mtu(&t.uplinks(None)), 1450);
        t.addresses.entry(1).or_default().insert(ip("2001:db8::1"));
        assert_eq!(t.tunnel_mtu(&t.uplinks(None)), 1430);
        t.links.get_mut(&1).unwrap().mtu = 1300;
        assert_eq!(t.tunnel_mtu(&t.uplinks(None)), 1280);
    }
}
