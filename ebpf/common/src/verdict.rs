//! The verdict on a packet that a pod sends: the steps 0 to 12 in their order.
//!
//! ```text
//!  0 untouched interface   4 tunnel port      8 built-in denies
//!  1 not IP                5 known flow       9 protocol
//!  2 malformed, fragment   6 DNS             10 fact and grant
//!  3 source                7 cluster set     11 prefixes
//!                                            12 the group's default
//! ```

use crate::code::Code;
use crate::layout::{
    Addr, CHAIN, DnsKey, Endpoint, Fact, FactKey, FlowKey, GrantKey, Group, PortSet, Prefix, PrefixKey, Range,
    STALE_NS, Scope, config, endpoint, flow, group, iface, prefix_key, via,
};
use crate::names::asks;
use crate::packet::{Packet, Parsed, mark, proto};

/// What [`verdict`] looks things up in.
pub trait Tables {
    /// Whether this is a gateway: packets were steered already, so that nothing can pass un-steered.
    const GATEWAY: bool;

    /// The coarse monotonic clock in nanoseconds.
    fn now_ns(&self) -> u64;
    /// The tunnel's UDP port.
    fn tunnel_port(&self) -> u16;
    /// Whether nodes unpack what comes to this UDP port, for the network plugin's overlay.
    fn overlay(&self, port: u16) -> bool;
    /// [`config`] flags.
    fn flags(&self) -> u32;
    /// First and last port on node addresses that is outside the cluster set.
    fn node_ports(&self) -> (u16, u16);
    /// The interface's [`iface`] kind, 0 if it is not known.
    fn interface(&self, ifindex: u32) -> u16;
    /// An endpoint.
    fn endpoint(&self, addr: &Addr) -> Option<&Endpoint>;
    /// A group.
    fn group(&self, id: u32) -> Option<&Group>;
    /// A scope.
    fn scope(&self, id: u32) -> Option<&Scope>;
    /// Whether a gateway with this id is known.
    fn gateway(&self, id: u32) -> bool;
    /// When the gateway's last heartbeat was written (nanoseconds), 0 if never.
    fn heartbeat(&self, id: u32) -> u64;
    /// Whether this is a node's address.
    fn node(&self, addr: &Addr) -> bool;
    /// Whether the longest-match lookup finds the key in the cluster set.
    fn cluster(&self, key: &PrefixKey) -> bool;
    /// Whether this is an endpoint of the cluster DNS.
    fn cluster_dns(&self, key: &DnsKey) -> bool;
    /// What a datagram asks the cluster's DNS, one of [`asks`]; never asked at a gateway.
    fn asks(&self, p: &Packet) -> u32 {
        let _ = p;
        asks::OTHER
    }
    /// A fact.
    fn fact(&self, key: &FactKey) -> Option<&Fact>;
    /// Notes that the fact carries a packet (gateways).
    fn carried(&self, key: &FactKey, now: u32);
    /// The port set of a grant.
    fn grant(&self, key: &GrantKey) -> Option<u32>;
    /// An entry of the port sets.
    fn portset(&self, id: u32) -> Option<&PortSet>;
    /// [`scan`]; the kernel gives it a function of its own, which the verifier walks once.
    fn ports(&self, set: u32, question: u32) -> u8 {
        scan(self, set, question)
    }
    /// The longest match in a prefix set.
    fn prefix(&self, key: &PrefixKey) -> Option<&Prefix>;
    /// [`policy`]; the kernel gives it a function of its own, too.
    fn judge(&self, p: &Packet, case: &Case) -> Judged {
        policy(self, p, case)
    }
    /// Flags of a flow, 0 if it is not known; a known flow was seen at `now`.
    fn flow(&self, key: &FlowKey, now: u32) -> u32;
    /// Remembers a flow within its endpoint's budget; false if that is used up.
    fn remember(&self, key: &FlowKey, flags: u32, now: u32) -> bool;
}

/// What to do with the packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Action {
    /// It goes on, and may leave the node (it gets the mark).
    #[default]
    Pass,
    /// It goes on as if Tidegate were not there.
    Ignore,
    /// To the owner of its scope.
    Steer,
    /// Dropped.
    Drop,
    /// Answered here: the name that it asks for does not exist (NXDOMAIN).
    NoName,
}

/// The verdict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// What to do.
    pub action: Action,
    /// Why.
    pub code: u8,
    /// How it is carried, one of [`via`], if it is steered.
    pub via: u8,
    /// Whether an event is due: every drop, would-be drops of audit, first packets.
    pub report: bool,
    /// Whether the packet passed although enforcement would drop it.
    pub audit: bool,
    /// Whether it passes only because its destination belongs to the cluster set: it must still do so after
    /// network address translation.
    pub cluster: bool,
    /// The scope, 0 if it has none.
    pub scope: u32,
    /// The owner of the scope if the action is [`Action::Steer`], 0 at a gateway.
    pub owner: u32,
}

impl Decision {
    #[inline(always)]
    fn set(&mut self, action: Action, code: Code) {
        self.action = action;
        self.code = code as u8;
        self.report = matches!(action, Action::Drop);
    }

    /// Drops the packet.
    #[inline(always)]
    pub fn drop(&mut self, code: Code) {
        self.set(Action::Drop, code);
    }
}

/// Seconds of the coarse clock.
#[inline(always)]
pub const fn seconds(ns: u64) -> u32 {
    (ns / 1_000_000_000) as u32
}

/// Whether `addr` with `port` belongs to the cluster set (step 7).
#[inline(always)]
pub fn in_cluster<T: Tables>(t: &T, addr: &Addr, proto: u8, port: u16) -> bool {
    if t.node(addr) { is_no_node_port(t, proto, port) } else { t.cluster(&prefix_key(0, *addr)) }
}

/// Whether a port on a node belongs to the cluster set: behind node ports may be anything.
#[inline(always)]
fn is_no_node_port<T: Tables>(t: &T, proto: u8, port: u16) -> bool {
    let (lo, hi) = t.node_ports();
    !(matches!(proto, proto::TCP | proto::UDP) && port >= lo && port <= hi)
}

/// First of the ports that clients take by themselves (Linux, `ip_local_port_range`).
pub const EPHEMERAL: u16 = 32_768;

/// Whether this is neighbour discovery or listener reporting that cannot leave the link
/// (RFC 4861, section 6.1: hop limit 255; RFC 3810). Router advertisements and redirects are a router's.
#[inline(always)]
fn on_link<T: Tables>(p: &Packet, t: &T) -> bool {
    if !p.is_v6() || p.proto != proto::ICMP6 || p.has(mark::LATER_FRAGMENT | mark::FIRST_FRAGMENT | mark::DETOUR) {
        return false;
    }
    let multicast = p.dst.head() == 0xff02;
    match p.flags {
        133 | 135 | 136 => {
            p.hops == 255 && (multicast || p.dst.head() & 0xffc0 == 0xfe80 || in_cluster(t, &p.dst, p.proto, 0))
        }
        131 | 132 | 143 => multicast,
        _ => false,
    }
}

/// Whether an IPv6 packet is of those that a device sends by itself: from no address, or to all nodes of its link.
#[inline(always)]
fn stays_on_link(p: &Packet) -> bool {
    p.src == Addr::default() || p.dst.head() == 0xff02
}

/// What a port set is asked, in one word: port, protocol, and whether any allowed port counts (ICMP).
#[inline(always)]
pub const fn question(p: &Packet) -> u32 {
    p.dport as u32 | (p.proto as u32) << 16 | (p.is_icmp() as u32) << 24
}

/// The [`via`] that the port set `set` answers, [`via::NONE`] if it decides nothing.
#[inline(always)]
pub fn scan<T: Tables + ?Sized>(t: &T, set: u32, question: u32) -> u8 {
    let (port, proto, icmp) = (question as u16, (question >> 16) as u8, question >> 24 != 0);
    let mut id = set;
    for _ in 0..CHAIN {
        let Some(entry) = t.portset(id) else { return via::NONE };
        for r in &entry.ranges {
            let Range { lo, hi, proto: of, via } = *r;
            if via == via::NONE {
                return via::NONE;
            }
            if of == proto::OTHER {
                if !matches!(proto, proto::TCP | proto::UDP) {
                    return via;
                }
                continue;
            }
            if icmp {
                if via == via::PASS {
                    return via;
                }
                if via != via::DENY {
                    return via::FORWARD;
                }
            } else if of == proto && port >= lo && port <= hi {
                return via;
            }
        }
        id = entry.next;
        if id == 0 {
            return via::NONE;
        }
    }
    via::NONE
}

/// What a prefix set says of the packet.
#[inline(always)]
fn prefixes<T: Tables + ?Sized>(t: &T, set: u32, p: &Packet) -> u8 {
    if set == 0 {
        return via::NONE;
    }
    match t.prefix(&prefix_key(set, p.dst)) {
        Some(found) => t.ports(found.ports, question(p)),
        None => via::NONE,
    }
}

/// Addresses that give credentials away, or that never leave the link (step 8).
#[inline(always)]
fn is_metadata(addr: &Addr) -> bool {
    const AWS6: Addr =
        Addr::from_ip(core::net::IpAddr::V6(core::net::Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)));
    const GCP6: Addr =
        Addr::from_ip(core::net::IpAddr::V6(core::net::Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)));
    const ALIBABA: Addr = Addr::from_ip(core::net::IpAddr::V4(core::net::Ipv4Addr::new(100, 100, 100, 200)));
    const AZURE: Addr = Addr::from_ip(core::net::IpAddr::V4(core::net::Ipv4Addr::new(168, 63, 129, 16)));
    if is_link_local(addr) {
        return true;
    }
    *addr == ALIBABA || *addr == AZURE || *addr == AWS6 || *addr == GCP6
}

/// 169.254.0.0/16 (RFC 3927), fe80::/10 and link-local multicast (RFC 4291).
#[inline(always)]
pub fn is_link_local(addr: &Addr) -> bool {
    let head = addr.head();
    if addr.is_v4() { head == 0xa9fe } else { head & 0xffc0 == 0xfe80 || head == 0xff02 }
}

/// Whether a cluster policy accepts a built-in deny: its prefix lies inside what is denied, so that
/// an accepted default route does not open the metadata service.
#[inline(always)]
fn accepts<T: Tables + ?Sized>(t: &T, set: u32, p: &Packet, metadata: bool) -> bool {
    if set == 0 {
        return false;
    }
    let Some(found) = t.prefix(&prefix_key(set, p.dst)) else {
        return false;
    };
    let least = match (metadata, is_link_local(&p.dst), p.is_v6()) {
        (false, ..) => 1,
        (true, true, false) => 16,
        (true, true, true) => 10,
        (true, false, false) => 32,
        (true, false, true) => 128,
    };
    found.len >= least && !matches!(t.ports(found.ports, question(p)), via::NONE | via::DENY)
}

/// The flow that the packet belongs to, as seen from the pod that sends it.
#[inline(always)]
pub fn flow_key(p: &Packet, incarnation: u32) -> FlowKey {
    let (pod_port, peer_port) = (p.sport, p.dport);
    FlowKey { pod: p.src, peer: p.dst, pod_port, peer_port, proto: p.proto as u32, incarnation }
}

/// Decides about a packet that entered by `ifindex`.
#[inline(always)]
pub fn verdict<T: Tables>(parsed: Parsed, p: &Packet, ifindex: u32, t: &T, out: &mut Decision) {
    *out = Decision::default();
    // Step 0.
    let kind = if T::GATEWAY { iface::ENDPOINT } else { t.interface(ifindex) };
    if kind == iface::UNTOUCHED {
        return untouched(parsed, p, t, out);
    }
    // Step 1.
    match parsed {
        Parsed::Ip => {}
        Parsed::Arp => return out.set(Action::Ignore, Code::Allowed),
        Parsed::NotIp if kind == iface::ENDPOINT || t.flags() & config::DROP_UNKNOWN != 0 => {
            return out.drop(Code::Protocol);
        }
        Parsed::Malformed if kind == iface::ENDPOINT => return out.drop(Code::Malformed),
        _ => return untouched(parsed, p, t, out),
    }
    if T::GATEWAY && p.is_v6() && stays_on_link(p) {
        // The veth's own: nobody sent it, and nobody needs a record.
        out.drop(Code::Protocol);
        out.report = false;
        return;
    }
    if !T::GATEWAY && on_link(p, t) {
        return out.set(Action::Ignore, Code::Allowed);
    }
    // An interface that nobody announced yet: an endpoint's packets meet the source check below, strangers the guard.
    let Some(ep) = t.endpoint(&p.src) else {
        if kind == iface::ENDPOINT {
            // Steps 2 and 3.
            return out.drop(if p.has(mark::DETOUR) { Code::Malformed } else { Code::SpoofedSource });
        }
        if t.flags() & config::DROP_UNKNOWN != 0 {
            return out.drop(Code::UnknownPod);
        }
        return untouched(parsed, p, t, out);
    };
    if ep.flags & endpoint::TOUCHED == 0 && kind != iface::ENDPOINT {
        return untouched(parsed, p, t, out);
    }
    let isolated = ep.flags & endpoint::ISOLATED != 0;
    let (flags, admin, own, drain) = match t.group(ep.group) {
        Some(g) => (g.flags, g.admin, g.own, g.drain),
        None => (0, 0, 0, 0),
    };
    let audit = !T::GATEWAY && flags & group::AUDIT != 0;
    out.scope = ep.scope;
    let now_ns = t.now_ns();
    let now = seconds(now_ns);

    // Step 2.
    if p.has(mark::DETOUR) {
        return out.drop(Code::Malformed);
    }
    let later = p.has(mark::LATER_FRAGMENT);
    let node = t.node(&p.dst);
    let cluster = if node { is_no_node_port(t, p.proto, p.dport) } else { t.cluster(&prefix_key(0, p.dst)) };
    if later && !cluster && isolated && !audit {
        return out.drop(Code::Fragment);
    }
    // Step 3.
    if !T::GATEWAY && ep.ifindex != ifindex {
        return out.drop(Code::SpoofedSource);
    }
    // Step 4.
    if p.proto == proto::UDP && !later && p.dport == t.tunnel_port() {
        return out.drop(Code::TunnelPort);
    }
    // Nodes unpack the network plugin's tunnels, and believe what is inside. They do so at all their addresses, of
    // which some lie in the cluster's prefixes; there a port of clients may be an answer's.
    let ordinary = matches!(p.proto, proto::TCP | proto::UDP | proto::SCTP) || p.is_icmp();
    if !T::GATEWAY && node && !ordinary {
        return out.drop(Code::Protocol);
    }
    if !T::GATEWAY
        && p.proto == proto::UDP
        && !later
        && t.overlay(p.dport)
        && (node || (cluster && p.dport < EPHEMERAL))
    {
        return out.drop(Code::TunnelPort);
    }
    // Step 5. Echo requests and TCP SYNs start something new, whatever was there before.
    let key = flow_key(p, ep.incarnation);
    let known = if later || p.is_syn() || p.is_echo_request() { 0 } else { t.flow(&key, now) };
    if !T::GATEWAY && (known & flow::OUTSIDE != 0 || (known & flow::AUDIT != 0 && (audit || now < drain))) {
        return out.set(Action::Pass, Code::Allowed);
    }
    // Step 6.
    let transport = matches!(p.proto, proto::TCP | proto::UDP) && !later;
    let server = transport && t.cluster_dns(&DnsKey { addr: p.dst, port: p.dport as u32 });
    if server || (transport && p.dport == 53) {
        // Fragments behind the first one are not looked at, and what is yet to change is not what is asked.
        let datagram = p.proto == proto::UDP && !p.has(mark::FIRST_FRAGMENT | mark::INNER);
        let asked = if !T::GATEWAY && server && datagram { t.asks(p) } else { asks::OTHER };
        if asked == asks::KNOWN {
            // The cluster's DNS answers it by itself, whether or not a gateway is there.
            out.cluster = cluster && isolated && !audit;
            return out.set(Action::Pass, Code::Allowed);
        }
        out.owner = answers(t, ep.scope);
        if asked == asks::STRANGE && is_silent(t, ep.scope) && (out.owner != 0 || (isolated && !audit)) {
            // Clients ask for names of their search domains first, and go on only after an answer. Of the cluster's DNS
            // nobody knows whether it asks others for this one.
            return out.set(Action::NoName, Code::NoGateway);
        }
        if T::GATEWAY || out.owner != 0 {
            out.via = via::DNS;
            return out.set(Action::Steer, Code::Allowed);
        }
        if isolated && !audit {
            return out.drop(Code::NoGateway);
        }
        return out.set(Action::Pass, Code::Allowed);
    }
    // Step 7.
    if cluster {
        if T::GATEWAY {
            return out.drop(Code::NotAllowed);
        }
        if ordinary || !isolated {
            out.cluster = isolated && !audit;
            return out.set(Action::Pass, Code::Allowed);
        }
        if !audit {
            return out.drop(Code::Protocol);
        }
        out.set(Action::Pass, Code::Protocol);
        out.audit = true;
        out.report = true;
        return;
    }
    let case = Case { scope: ep.scope, group: ep.group, admin, own, known, now, isolated };
    let judged = t.judge(p, &case);
    judged.tell(out);
    if judged.unsure() && !T::GATEWAY && isolated && !audit && !later {
        // The gateway may know more than this node was told, and denies what it still denies.
        let gateway = owner(t, ep.scope);
        if gateway != 0 && now_ns.saturating_sub(t.heartbeat(gateway)) > STALE_NS {
            out.via = via::NONE;
            out.set(Action::Steer, Code::Allowed);
        }
    }
    if out.action == Action::Steer && !T::GATEWAY && !audit {
        out.owner = owner(t, ep.scope);
        if out.owner == 0 {
            if isolated {
                out.drop(Code::NoGateway);
            } else {
                out.set(Action::Pass, Code::Allowed);
            }
        }
    }
    if out.action == Action::Pass && T::GATEWAY {
        out.drop(Code::NotAllowed);
    }
    if audit {
        out.audit = out.action == Action::Drop;
        out.action = Action::Pass;
        out.report = true;
        if (transport || p.is_echo_request()) && !t.remember(&key, flow::AUDIT, now) && !out.audit {
            // Without a place in the table nobody knows which packet is the first: every datagram may be one.
            out.report = p.is_syn() || p.proto == proto::UDP;
        }
    } else if out.action == Action::Steer && p.proto == proto::UDP && known == 0 && out.via != via::NONE {
        // A first packet; at a gateway it is worth a record. Without a place in the table so is every one, within the
        // budget of events: a pod that has filled its places must not go on unseen.
        t.remember(&key, flow::STEERED, now);
        out.report = T::GATEWAY;
    } else if out.action == Action::Steer {
        out.report = T::GATEWAY && p.is_syn();
    }
}

/// What [`policy`] needs to know of who sends the packet.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Case {
    /// The scope.
    pub scope: u32,
    /// The group.
    pub group: u32,
    /// The group's prefix set of cluster policies, 0 if it has none.
    pub admin: u32,
    /// The group's own prefix set, 0 if it has none.
    pub own: u32,
    /// The flow's flags, 0 if it is not known.
    pub known: u32,
    /// Seconds of the coarse clock.
    pub now: u32,
    /// Whether what nothing allows is denied.
    pub isolated: bool,
}

/// What [`policy`] says: action, code, [`via`] and whether it is unsure, an octet each, in one word as the kernel's functions give it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judged(pub u32);

impl Judged {
    /// Where there is nothing to judge by.
    pub const REFUSED: Self = Self::new(Action::Drop, Code::Malformed);

    #[inline(always)]
    const fn new(action: Action, code: Code) -> Self {
        Self(action as u32 | (code as u32) << 8)
    }

    #[inline(always)]
    const fn by(self, via: u8, unsure: bool) -> Self {
        Self(self.0 | (via as u32) << 16 | (unsure as u32) << 24)
    }

    /// Whether it drops for want of a fact that holds: because nothing is known, or by the deny of a fact that has
    /// expired, of which a node that is cut off is not told that it has ended.
    #[inline(always)]
    const fn unsure(self) -> bool {
        self.0 >> 24 != 0
    }

    #[inline(always)]
    fn tell(self, out: &mut Decision) {
        out.action = match self.0 as u8 {
            x if x == Action::Pass as u8 => Action::Pass,
            x if x == Action::Steer as u8 => Action::Steer,
            _ => Action::Drop,
        };
        out.code = (self.0 >> 8) as u8;
        out.via = (self.0 >> 16) as u8;
        out.report = matches!(out.action, Action::Drop);
    }
}

/// Steps 8 to 12, as if nothing were audited and every gateway alive.
#[inline(always)]
pub fn policy<T: Tables + ?Sized>(t: &T, p: &Packet, case: &Case) -> Judged {
    const fn drop(code: Code) -> Judged {
        Judged::new(Action::Drop, code)
    }
    const PASS: Judged = Judged::new(Action::Pass, Code::Allowed);
    let isolated = case.isolated;
    let later = p.has(mark::LATER_FRAGMENT);
    if isolated {
        // Step 8.
        if is_metadata(&p.dst) {
            let accepted = !later && accepts(t, case.admin, p, true);
            // It passes on the node and is never steered: the gateway's own credentials live there.
            return if accepted { PASS } else { drop(Code::Metadata) };
        }
        let transport = matches!(p.proto, proto::TCP | proto::UDP);
        if transport && !later && p.dport == 853 && !accepts(t, case.admin, p, false) {
            return drop(Code::EncryptedDns);
        }
        if later {
            return drop(Code::Fragment);
        }
        // Step 9.
        let ping = p.is_echo_request() && t.flags() & config::PING != 0;
        if !(transport || ping || p.is_path_mtu()) {
            return drop(Code::Protocol);
        }
    } else if later {
        return PASS;
    }
    // Step 10.
    let key = FactKey { scope: case.scope, addr: p.dst };
    let mut expired = false;
    let mut denied = false;
    let mut found = via::NONE;
    if let Some(fact) = t.fact(&key) {
        let (class, expires) = (fact.class, fact.expires);
        if let Some(set) = t.grant(&GrantKey { group: case.group, class }) {
            found = t.ports(set, question(p));
        }
        let opens = p.is_syn() || (p.proto == proto::UDP && case.known & flow::STEERED == 0) || p.is_echo_request();
        if opens && case.now >= expires && matches!(found, via::FORWARD | via::TLS | via::BLOCK) {
            expired = true;
            found = via::NONE;
        }
        denied = case.now >= expires && found == via::DENY;
        if T::GATEWAY && found != via::NONE {
            t.carried(&key, case.now);
        }
    }
    // Step 11.
    if found == via::NONE {
        found = prefixes(t, case.admin, p);
    }
    if found == via::NONE {
        found = prefixes(t, case.own, p);
    }
    // Step 12.
    let judged = match found {
        via::FORWARD | via::TLS | via::BLOCK => Judged::new(Action::Steer, Code::Allowed),
        via::DENY => drop(Code::DeniedByPolicy),
        via::PASS => PASS,
        _ if !isolated => PASS,
        _ if expired => drop(Code::BindingExpired),
        _ => drop(Code::NotAllowed),
    };
    judged.by(found, denied || (found == via::NONE && isolated))
}

/// The known gateway that owns the scope, 0 if there is none.
#[inline(always)]
fn owner<T: Tables>(t: &T, scope: u32) -> u32 {
    match t.scope(scope) {
        Some(s) if t.gateway(s.owner) => s.owner,
        _ => 0,
    }
}

/// The known gateway that answers the scope's DNS, 0 if there is none.
#[inline(always)]
fn answers<T: Tables>(t: &T, scope: u32) -> u32 {
    match t.scope(scope) {
        Some(s) if t.gateway(s.dns) => s.dns,
        _ => owner(t, scope),
    }
}

/// Whether no gateway answers the scope's DNS now.
#[inline(always)]
fn is_silent<T: Tables>(t: &T, scope: u32) -> bool {
    t.scope(scope).is_none_or(|s| !t.gateway(s.dns))
}

/// Step 0: everything goes its way but UDP to the tunnel port that a node might take for another node's.
#[inline(always)]
fn untouched<T: Tables>(parsed: Parsed, p: &Packet, t: &T, out: &mut Decision) {
    let tunnel = match parsed {
        Parsed::Ip => p.proto == proto::UDP && !p.has(mark::LATER_FRAGMENT) && p.dport == t.tunnel_port(),
        // What the ports of a packet to a node are must be certain.
        Parsed::Malformed => true,
        Parsed::Arp | Parsed::NotIp => false,
    };
    if tunnel && (t.node(&p.dst) || t.node(&p.src) || is_link_local(&p.dst)) {
        return out.drop(if parsed == Parsed::Ip { Code::TunnelPort } else { Code::Malformed });
    }
    out.set(Action::Ignore, Code::Allowed);
}
