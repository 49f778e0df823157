//! From a scenario to namespaces, links, addresses, routes and rules: pure, and applied by [`build`].

use std::net::IpAddr;

use anyhow::Result;
use ipnet::IpNet;

use crate::family::Family;
use crate::scenario::{Cni, Node, Pod, RpFilter, Scenario};
use crate::state::State;
use crate::{kube, netns, rules};

/// The gateway address in every pod, as ptp CNIs use it.
const POD_GATEWAY4: &str = "169.254.1.1";
/// The gateway address in every pod.
const POD_GATEWAY6: &str = "fe80::1";
/// The bridge of a node with the bridge CNI.
const BRIDGE: &str = "cni0";
/// The link between the router and the internet's servers (benchmark range, RFC 2544).
const BACKBONE: (&str, &str) = ("198.18.0.1", "198.18.0.2");
/// The cloud's metadata address: alive, so that a pod that does not get there was stopped.
pub const METADATA: &str = "169.254.169.254";

/// One place: a network namespace and what is set up in it.
#[derive(Debug, Default)]
pub struct Place {
    /// The cluster's families.
    families: Vec<Family>,
    /// Its name: `fabric`, `router`, `internet`, a node, or `NAMESPACE/POD`.
    pub name: String,
    /// Sysctls before there is any link.
    pub before: Vec<(String, String)>,
    /// `ip` commands that make links.
    pub links: Vec<String>,
    /// Sysctls of those links.
    pub after: Vec<(String, String)>,
    /// `ip` commands that set addresses and routes.
    pub addresses: Vec<String>,
    /// nft rules.
    pub rules: Option<String>,
}

/// Name of the node's end of a pod's veth pair.
pub fn veth(pod: &Pod) -> String {
    // FNV-1a: 11 hex digits keep the name within the 15 octets of a device name.
    let hash =
        pod.key().bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    format!("veth{:011x}", hash >> 20)
}

/// Every place of a scenario; `netns` gives the namespace's name of a place.
///
/// # Errors
/// When a reference of the scenario leads nowhere.
pub fn places(scenario: &Scenario, netns: impl Fn(&str) -> String) -> Result<Vec<Place>> {
    let mut places = vec![fabric(scenario, &netns), router(scenario, &netns), internet(scenario)];
    if scenario.kubernetes.is_some() {
        places.push(control(scenario));
    }
    for one in &scenario.nodes {
        places.push(node(scenario, one, &netns)?);
    }
    for one in &scenario.pods {
        places.push(pod(scenario, one)?);
    }
    Ok(places)
}

/// Makes all places.
pub fn build(state: &mut State) -> Result<()> {
    let places = places(&state.scenario, |place| state.netns(place))?;
    for place in &places {
        let netns = state.make_namespace(&place.name)?;
        netns::sysctls(&netns, &place.before)?;
    }
    for place in &places {
        netns::ip_batch(&state.netns(&place.name), &place.links)?;
    }
    for place in &places {
        let netns = state.netns(&place.name);
        netns::sysctls(&netns, &place.after)?;
        netns::ip_batch(&netns, &place.addresses)?;
        if let Some(rules) = &place.rules {
            netns::nft(&netns, rules)?;
        }
    }
    Ok(())
}

impl Place {
    fn new(scenario: &Scenario, name: &str, forwards: bool) -> Self {
        let mut place = Self { name: name.into(), families: scenario.families.clone(), ..Self::default() };
        if !scenario.has(Family::V6) {
            place.before("net/ipv6/conf/all/disable_ipv6", "1");
            place.before("net/ipv6/conf/default/disable_ipv6", "1");
        }
        // No duplicate address detection: its second of silence has no place in a test.
        place.before("net/ipv6/conf/default/accept_dad", "0");
        place.before("net/ipv6/conf/all/accept_dad", "0");
        place.before("net/ipv6/conf/default/accept_ra", "0");
        if forwards {
            place.before("net/ipv4/ip_forward", "1");
            place.before("net/ipv6/conf/all/forwarding", "1");
            // What systemd sets on most distributions.
            place.before("net/ipv4/conf/all/rp_filter", "2");
            place.before("net/ipv4/conf/default/rp_filter", "2");
        }
        place.link("link set lo up");
        place
    }

    fn before(&mut self, key: &str, value: &str) {
        self.before.push((key.into(), value.into()));
    }

    fn after(&mut self, key: impl Into<String>, value: &str) {
        self.after.push((key.into(), value.into()));
    }

    fn link(&mut self, line: impl Into<String>) {
        self.links.push(line.into());
    }

    fn address(&mut self, line: impl Into<String>) {
        self.addresses.push(line.into());
    }

    /// A line that sets something of a family, if the cluster has it.
    fn of(&mut self, family: Family, line: impl Into<String>) {
        if self.families.contains(&family) {
            self.addresses.push(line.into());
        }
    }

    /// A veth pair: this end and the one called `eth0` elsewhere.
    fn pair(&mut self, here: &str, there: &str, mtu: u32) {
        self.link(format!("link add {here} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {there}"));
    }
}

/// The segment that nodes and router share: a bridge that only switches.
fn fabric(scenario: &Scenario, netns: &impl Fn(&str) -> String) -> Place {
    let mut place = Place::new(scenario, "fabric", false);
    place.link("link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0");
    place.link("link set br0 up");
    let control = scenario.kubernetes.as_ref().map(|_| kube::PLACE);
    let ports = scenario.nodes.iter().map(|n| n.name.as_str()).chain(["router"]).chain(control);
    for (i, name) in ports.enumerate() {
        place.pair(&format!("port{i}"), &netns(name), scenario.mtu);
        place.link(format!("link set port{i} master br0 up"));
    }
    place
}

/// The router between the underlay and the internet; it knows the way to pods, as a routed pod network's does.
fn router(scenario: &Scenario, netns: &impl Fn(&str) -> String) -> Place {
    let mut place = Place::new(scenario, "router", true);
    let (v4, v6) = scenario.router();
    place.pair("backbone", &netns("internet"), scenario.internet.mtu.unwrap_or(scenario.mtu));
    place.of(Family::V4, format!("addr add {v4}/{} dev eth0", scenario.underlay.ipv4.prefix_len()));
    place.of(Family::V6, format!("addr add {v6}/{} dev eth0 nodad", scenario.underlay.ipv6.prefix_len()));
    place.of(Family::V4, format!("addr add {}/30 dev backbone", BACKBONE.0));
    place.of(Family::V6, "addr add fe80::1/64 dev backbone nodad");
    place.address("link set eth0 up");
    place.address("link set backbone up");
    for prefix in &scenario.internet.prefixes {
        match prefix {
            IpNet::V4(p) => place.address(format!("route add {p} via {}", BACKBONE.1)),
            IpNet::V6(p) => place.address(format!("route add {p} via fe80::2 dev backbone")),
        }
    }
    place.of(Family::V4, format!("route add {METADATA}/32 via {}", BACKBONE.1));
    for node in &scenario.nodes {
        place.of(Family::V4, format!("route add {} via {}", node.pods.ipv4, node.ipv4));
        place.of(Family::V6, format!("route add {} via {}", node.pods.ipv6, node.ipv6));
    }
    place
}

/// The servers behind the router: whole prefixes are local there, so every address in them is alive.
fn internet(scenario: &Scenario) -> Place {
    let mut place = Place::new(scenario, "internet", false);
    place.of(Family::V4, format!("addr add {}/30 dev eth0", BACKBONE.1));
    place.of(Family::V6, "addr add fe80::2/64 dev eth0 nodad");
    place.address("link set eth0 up");
    for prefix in &scenario.internet.prefixes {
        place.address(format!("route add local {prefix} dev lo"));
    }
    place.of(Family::V4, format!("route add local {METADATA}/32 dev lo"));
    let mut source = None;
    for ip in scenario.internet.resolvers.iter().chain(&scenario.internet.public_resolvers) {
        // IPv6 sockets bind to configured addresses only, however local the route is.
        match ip {
            IpAddr::V4(ip) => {
                place.address(format!("addr add {ip}/32 dev lo"));
                source.get_or_insert(*ip);
            }
            IpAddr::V6(ip) => place.address(format!("addr add {ip}/128 dev lo nodad")),
        }
    }
    let source = source.map(|ip| format!(" src {ip}")).unwrap_or_default();
    place.of(Family::V4, format!("route add default via {}{source}", BACKBONE.0));
    place.of(Family::V6, "route add default via fe80::1 dev eth0");
    place
}

/// The machine of the API server: on the underlay, and it knows the way to pods.
fn control(scenario: &Scenario) -> Place {
    let mut place = Place::new(scenario, kube::PLACE, false);
    let (v4, v6) = scenario.control();
    let (router4, router6) = scenario.router();
    place.of(Family::V4, format!("addr add {v4}/{} dev eth0", scenario.underlay.ipv4.prefix_len()));
    place.of(Family::V6, format!("addr add {v6}/{} dev eth0 nodad", scenario.underlay.ipv6.prefix_len()));
    place.address("link set eth0 up");
    place.of(Family::V4, format!("route add default via {router4}"));
    place.of(Family::V6, format!("route add default via {router6}"));
    for node in &scenario.nodes {
        place.of(Family::V4, format!("route add {} via {}", node.pods.ipv4, node.ipv4));
        place.of(Family::V6, format!("route add {} via {}", node.pods.ipv6, node.ipv6));
    }
    place
}

/// A node with an uplink and the host's ends of its pods' links.
fn node(scenario: &Scenario, node: &Node, netns: &impl Fn(&str) -> String) -> Result<Place> {
    let mut place = Place::new(scenario, &node.name, true);
    if scenario.hosts.rp_filter == RpFilter::Strict {
        place.before("net/ipv4/conf/all/rp_filter", "1");
        place.before("net/ipv4/conf/default/rp_filter", "1");
    }
    let (router4, router6) = scenario.router();
    place.of(Family::V4, format!("addr add {}/{} dev eth0", node.ipv4, scenario.underlay.ipv4.prefix_len()));
    place.of(Family::V6, format!("addr add {}/{} dev eth0 nodad", node.ipv6, scenario.underlay.ipv6.prefix_len()));
    place.address("link set eth0 up");
    place.of(Family::V4, format!("route add default via {router4}"));
    place.of(Family::V6, format!("route add default via {router6}"));
    for other in scenario.nodes.iter().filter(|n| n.name != node.name) {
        place.of(Family::V4, format!("route add {} via {}", other.pods.ipv4, other.ipv4));
        place.of(Family::V6, format!("route add {} via {}", other.pods.ipv6, other.ipv6));
    }
    if scenario.hosts.cni == Cni::Bridge {
        place.link(format!("link add {BRIDGE} mtu {} type bridge stp_state 0 forward_delay 0", scenario.mtu));
        for range in scenario.ranges(&node.pods) {
            let nodad = Family::of(range.addr()).pick("", " nodad");
            place.address(format!("addr add {}/{} dev {BRIDGE}{nodad}", bridge_address(range), range.prefix_len()));
        }
        place.address(format!("link set {BRIDGE} up"));
    }
    for pod in scenario.pods.iter().filter(|p| p.node == node.name) {
        let veth = veth(pod);
        place.pair(&veth, &netns(&pod.key()), scenario.mtu);
        if scenario.hosts.cni == Cni::Bridge {
            place.address(format!("link set {veth} master {BRIDGE} up"));
            place.address(format!("link set {veth} type bridge_slave hairpin on"));
            continue;
        }
        // The node answers for the pods' gateway address, at once (the default waits up to 0.8 s).
        place.after(format!("net/ipv4/conf/{veth}/proxy_arp"), "1");
        place.after(format!("net/ipv4/neigh/{veth}/proxy_delay"), "0");
        place.of(Family::V6, format!("addr add {POD_GATEWAY6}/64 dev {veth} nodad"));
        place.address(format!("link set {veth} up"));
        for ip in pod.addresses() {
            let length = Family::of(ip).pick(32, 128);
            place.address(format!("route add {ip}/{length} dev {veth}"));
        }
    }
    place.rules = Some(rules::of(scenario, node)?);
    Ok(place)
}

/// The bridge's own address in a range of pods: the first, which no pod gets.
fn bridge_address(range: IpNet) -> IpAddr {
    match range {
        IpNet::V4(r) => IpAddr::V4((u32::from(r.network()) + 1).into()),
        IpNet::V6(r) => IpAddr::V6((u128::from(r.network()) + 1).into()),
    }
}

/// A pod: on a ptp link with host routes and a gateway that is no address of the cluster, or on its node's bridge.
fn pod(scenario: &Scenario, pod: &Pod) -> Result<Place> {
    let mut place = Place::new(scenario, &pod.key(), false);
    let bridged = scenario.hosts.cni == Cni::Bridge;
    let ranges = scenario.node(&pod.node)?.pods.both();
    for ip in pod.addresses() {
        let range = Family::of(ip).pick(ranges[0], ranges[1]);
        let length = if bridged { range.prefix_len() } else { range.max_prefix_len() };
        let nodad = Family::of(ip).pick("", " nodad");
        place.address(format!("addr add {ip}/{length} dev eth0{nodad}"));
    }
    place.address("link set eth0 up");
    if bridged {
        for ip in pod.addresses() {
            let range = Family::of(ip).pick(ranges[0], ranges[1]);
            place.address(format!("route add default via {} dev eth0", bridge_address(range)));
        }
        return Ok(place);
    }
    place.of(Family::V4, format!("route add {POD_GATEWAY4} dev eth0 scope link"));
    place.of(Family::V4, format!("route add default via {POD_GATEWAY4} dev eth0"));
    place.of(Family::V6, format!("route add default via {POD_GATEWAY6} dev eth0"));
    Ok(place)
}
