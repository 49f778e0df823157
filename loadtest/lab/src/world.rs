//! From a scenario to namespaces, links, addresses, routes and rules: pure, and applied by [`build`].

use std::net::{IpAddr, Ipv4Addr};

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
/// The hardware address of Calico's end of every pod's link, and the link-local address that follows from it.
const CALICO: (&str, &str) = ("ee:ee:ee:ee:ee:ee", "fe80::ecee:eeff:feee:eeee");
/// A node's second network card, and the table of routes for pods whose addresses belong to it (AWS VPC).
const SECOND: (&str, u32) = ("eth1", 2);
/// The table's rules: towards such a pod, and from it.
const SECOND_RULES: (u32, u32) = (512, 1536);
/// Flannel's VXLAN devices: network identifier and port.
const FLANNEL: (u32, u16) = (1, 8472);
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
    /// `bridge` commands that fill forwarding tables.
    pub forwarding: Vec<String>,
    /// `ip` commands that set addresses and routes.
    pub addresses: Vec<String>,
    /// nft rules.
    pub rules: Option<String>,
}

/// Name of the node's end of a pod's veth pair, as the CNI calls it.
pub fn veth(scenario: &Scenario, pod: &Pod) -> String {
    // FNV-1a: 11 hex digits keep the name within the 15 octets of a device name.
    let hash =
        pod.key().bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let prefix = match scenario.hosts.cni {
        Cni::Calico => "cali",
        Cni::AwsVpc => "eni",
        Cni::Ptp | Cni::Kind | Cni::Bridge | Cni::Flannel => "veth",
    };
    format!("{prefix}{:011x}", hash >> 20)
}

/// A hardware address of the lab's own: locally administered, from a kind and a number.
fn mac(kind: u8, n: usize) -> String {
    format!("0a:{kind:02x}:00:00:{:02x}:{:02x}", n >> 8 & 0xff, n & 0xff)
}

/// The place of a node among the nodes, from 1 on.
fn number(scenario: &Scenario, node: &Node) -> usize {
    scenario.nodes.iter().take_while(|n| n.name != node.name).count() + 1
}

/// The hardware address of the node's end of a pod's link, where the CNI chooses it.
fn end_mac(scenario: &Scenario, pod: &Pod) -> Option<String> {
    match scenario.hosts.cni {
        Cni::Calico => Some(CALICO.0.into()),
        // Of one node each is another.
        Cni::AwsVpc => pod.addresses().first().map(|ip| match ip {
            IpAddr::V4(ip) => mac(1, u32::from(*ip) as usize),
            IpAddr::V6(ip) => mac(1, u128::from(*ip) as usize),
        }),
        Cni::Ptp | Cni::Kind | Cni::Bridge | Cni::Flannel => None,
    }
}

/// The address of a node's second network card: the first one's and 100.
fn second_address(node: &Node) -> Ipv4Addr {
    (u32::from(node.ipv4) + 100).into()
}

/// Whether a pod's IPv4 address belongs to its node's second network card: the even ones. The CNI has clusters of one
/// family, and with IPv6 one card.
pub fn is_second(scenario: &Scenario, pod: &Pod) -> bool {
    scenario.hosts.cni == Cni::AwsVpc && pod.ipv4.is_some_and(|ip| ip.octets()[3] % 2 == 0)
}

/// Pods whose addresses belong to a second network card.
fn seconds(scenario: &Scenario) -> impl Iterator<Item = (Ipv4Addr, &Node)> {
    let all = scenario.pods.iter().filter(|p| is_second(scenario, p));
    all.filter_map(|p| Some((p.ipv4?, scenario.node(&p.node).ok()?)))
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
        place.settle(&netns)?;
    }
    Ok(())
}

/// Makes the place of a pod that was added to the scenario, and links it to its node.
pub fn add(state: &mut State, key: &str) -> Result<()> {
    let added = state.scenario.pod(key)?.clone();
    let place = pod(&state.scenario, &added)?;
    let netns = state.make_namespace(&place.name)?;
    netns::sysctls(&netns, &place.before)?;
    wire(state, &added)
}

/// Links a pod to its node.
pub fn wire(state: &State, added: &Pod) -> Result<()> {
    let place = pod(&state.scenario, added)?;
    let netns = state.netns(&place.name);
    let on = state.scenario.node(&added.node)?.clone();
    let mut host = Place { families: state.scenario.families.clone(), ..Place::default() };
    host.cable(&state.scenario, &on, added, &netns);
    let there = state.netns(&on.name);
    netns::ip_batch(&there, &host.links)?;
    host.settle(&there)?;
    netns::ip_batch(&netns, &place.links)?;
    place.settle(&netns)?;
    for (ip, node) in seconds(&state.scenario).filter(|(ip, _)| Some(*ip) == added.ipv4) {
        let route = [format!("route add {ip}/32 via {}", second_address(node))];
        for place in elsewhere(&state.scenario, node) {
            netns::ip_batch(&state.netns(&place), &route)?;
        }
    }
    Ok(())
}

/// Takes away what [`add`] made outside of the pod's own namespace.
pub fn remove(state: &State, pod: &Pod) -> Result<()> {
    // It would go with the namespace, at some time.
    let link = format!("link del {}", veth(&state.scenario, pod));
    netns::ip_batch(&state.netns(&pod.node), &[link])?;
    for (ip, node) in seconds(&state.scenario).filter(|(ip, _)| Some(*ip) == pod.ipv4) {
        for place in elsewhere(&state.scenario, node) {
            netns::ip_batch(&state.netns(&place), &[format!("route del {ip}/32")])?;
        }
    }
    let rules: Vec<String> = rules_of(&state.scenario, pod).iter().map(|r| format!("rule del {r}")).collect();
    netns::ip_batch(&state.netns(&pod.node), &rules)
}

/// The node's rules for a pod: what comes to it is for the main table, what it sends for its card's.
fn rules_of(scenario: &Scenario, pod: &Pod) -> Vec<String> {
    let Some(ip) = pod.ipv4.filter(|_| scenario.hosts.cni == Cni::AwsVpc) else { return Vec::new() };
    let ((to, from), (_, table)) = (SECOND_RULES, SECOND);
    let mut rules = vec![format!("to {ip} pref {to} lookup main")];
    rules.extend(is_second(scenario, pod).then(|| format!("from {ip} pref {from} lookup {table}")));
    rules
}

/// Everybody else on the underlay who knows the way to pods.
fn elsewhere(scenario: &Scenario, node: &Node) -> Vec<String> {
    let nodes = scenario.nodes.iter().map(|n| n.name.clone()).filter(|n| *n != node.name);
    let control = scenario.kubernetes.as_ref().map(|_| kube::PLACE.to_owned());
    nodes.chain(["router".to_owned()]).chain(control).collect()
}

/// Makes a node's place anew, with the network card that it had: what its kernel knew is gone. For nodes whose pods are not the lab's.
pub fn renew(state: &mut State, name: &str) -> Result<()> {
    let scenario = state.scenario.clone();
    let (netns, on) = (state.netns(name), state.netns("fabric"));
    let card = netns::hardware_address(&netns, "eth0")?;
    let port = format!("port{}", number(&scenario, scenario.node(name)?) - 1);
    netns::ip_batch(&on, &[format!("link del {port}")])?;
    netns::delete(&netns)?;
    state.namespaces.retain(|n| n.netns != netns);
    let netns = state.make_namespace(name)?;
    let place = node(&scenario, scenario.node(name)?, &|place| state.netns(place))?;
    netns::sysctls(&netns, &place.before)?;
    let mut cable = Place::default();
    cable.plug(&port, &netns, scenario.mtu);
    netns::ip_batch(&on, &cable.links)?;
    netns::ip_batch(&netns, &[format!("link set eth0 address {card}")])?;
    netns::ip_batch(&netns, &place.links)?;
    place.settle(&netns)
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

    /// A port of the segment, and the network card at its other end.
    fn plug(&mut self, port: &str, there: &str, mtu: u32) {
        self.pair(port, there, mtu);
        self.link(format!("link set {port} master br0 up"));
    }

    /// Routes to the pods of all nodes but one.
    fn ways_to_pods(&mut self, scenario: &Scenario, but: Option<&Node>) {
        for node in scenario.nodes.iter().filter(|n| but.is_none_or(|b| b.name != n.name)) {
            self.of(Family::V4, format!("route add {} via {}", node.pods.ipv4, node.ipv4));
            self.of(Family::V6, format!("route add {} via {}", node.pods.ipv6, node.ipv6));
        }
        for (ip, node) in seconds(scenario).filter(|(_, n)| but.is_none_or(|b| b.name != n.name)) {
            self.address(format!("route add {ip}/32 via {}", second_address(node)));
        }
    }

    /// Everything after the links: they may lead to other places.
    fn settle(&self, netns: &str) -> Result<()> {
        netns::sysctls(netns, &self.after)?;
        netns::ip_batch(netns, &self.addresses)?;
        netns::bridge_batch(netns, &self.forwarding)?;
        self.rules.as_ref().map_or(Ok(()), |rules| netns::nft(netns, rules))
    }

    /// The node's end of a pod's link, with its addresses and routes.
    fn cable(&mut self, scenario: &Scenario, node: &Node, pod: &Pod, there: &str) {
        let veth = veth(scenario, pod);
        self.pair(&veth, there, scenario.mtu);
        if let Some(mac) = end_mac(scenario, pod) {
            self.link(format!("link set {veth} address {mac}"));
        }
        let cni = scenario.hosts.cni;
        if cni.is_bridge() {
            self.address(format!("link set {veth} master {BRIDGE} up"));
            self.address(format!("link set {veth} type bridge_slave hairpin on"));
            return;
        }
        if matches!(cni, Cni::Ptp | Cni::Calico) {
            // The node answers for the pods' gateway address, at once (the default waits up to 0.8 s).
            self.after(format!("net/ipv4/conf/{veth}/proxy_arp"), "1");
            self.after(format!("net/ipv4/neigh/{veth}/proxy_delay"), "0");
        }
        match cni {
            Cni::Ptp => self.of(Family::V6, format!("addr add {POD_GATEWAY6}/64 dev {veth} nodad")),
            Cni::Kind => {
                for range in scenario.ranges(&node.pods) {
                    let (gateway, nodad) = (first_address(range), Family::of(range.addr()).pick("", " nodad"));
                    self.address(format!("addr add {gateway}/{} dev {veth}{nodad}", range.max_prefix_len()));
                }
            }
            Cni::Calico | Cni::AwsVpc | Cni::Bridge | Cni::Flannel => {}
        }
        self.address(format!("link set {veth} up"));
        for ip in pod.addresses() {
            let length = Family::of(ip).pick(32, 128);
            self.address(format!("route add {ip}/{length} dev {veth}"));
        }
        for rule in rules_of(scenario, pod) {
            self.address(format!("rule add {rule}"));
        }
    }

    /// A node's second network card, and the routes of what belongs to it.
    fn second(&mut self, scenario: &Scenario, node: &Node) {
        let ((card, table), (router, _)) = (SECOND, scenario.router());
        // The VPC leads each address to its own card. Linux answers for every address on every card unless it is told so: what
        // is for the first one would come in by the one that answers sooner.
        self.after("net/ipv4/conf/all/arp_ignore", "1");
        self.address(format!("addr add {}/{} dev {card}", second_address(node), scenario.underlay.ipv4.prefix_len()));
        self.address(format!("link set {card} up"));
        self.address(format!("route add {router} dev {card} scope link table {table}"));
        self.address(format!("route add default via {router} dev {card} table {table}"));
    }

    /// Flannel's overlay: its devices, and where the other nodes are.
    fn overlay(&mut self, scenario: &Scenario, node: &Node) {
        let (id, port) = FLANNEL;
        for (i, family) in scenario.families.iter().enumerate() {
            let device = family.pick("flannel.1", "flannel-v6.1");
            let outer = |n: &Node| family.pick(IpAddr::from(n.ipv4), n.ipv6.into());
            let range = |n: &Node| family.pick(IpNet::from(n.pods.ipv4), n.pods.ipv6.into());
            let lladdr = |n: &Node| mac(2 + i as u8, number(scenario, n));
            let mtu = scenario.mtu - family.pick(50, 70);
            self.address(format!(
                "link add {device} address {} mtu {mtu} type vxlan id {id} dev eth0 local {} dstport {port} nolearning",
                lladdr(node),
                outer(node)
            ));
            let (own, nodad) = (range(node), family.pick("", " nodad"));
            self.address(format!("addr add {}/{} dev {device}{nodad}", own.network(), own.max_prefix_len()));
            self.address(format!("link set {device} up"));
            for other in scenario.nodes.iter().filter(|n| n.name != node.name) {
                let (to, via, at) = (range(other), range(other).network(), lladdr(other));
                self.address(format!("neigh add {via} lladdr {at} dev {device} nud permanent"));
                self.address(format!("route add {to} via {via} dev {device} onlink"));
                self.forwarding.push(format!("fdb append {at} dev {device} dst {}", outer(other)));
            }
        }
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
        place.plug(&format!("port{i}"), &netns(name), scenario.mtu);
    }
    if scenario.hosts.cni == Cni::AwsVpc {
        // Not the end of a cable, which would look as if a container were behind it.
        for (i, node) in scenario.nodes.iter().enumerate() {
            let mtu = scenario.mtu;
            place.link(format!("link add slot{i} mtu {mtu} type veth peer name card{i} mtu {mtu}"));
            place.link(format!("link set slot{i} master br0 up"));
            place.link(format!("link set card{i} up"));
            let netns = netns(&node.name);
            place.link(format!("link add link card{i} name {} netns {netns} type macvlan mode passthru", SECOND.0));
        }
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
    place.ways_to_pods(scenario, None);
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
    place.ways_to_pods(scenario, None);
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
    match scenario.hosts.cni {
        Cni::Flannel => place.overlay(scenario, node),
        _ => place.ways_to_pods(scenario, Some(node)),
    }
    match scenario.hosts.cni {
        Cni::AwsVpc => place.second(scenario, node),
        // Addresses of the node's own block that no pod has.
        Cni::Calico => {
            for range in scenario.ranges(&node.pods) {
                place.address(format!("route add blackhole {range} proto bird"));
            }
        }
        Cni::Ptp | Cni::Kind | Cni::Bridge | Cni::Flannel => {}
    }
    // A network plugin makes its own.
    if scenario.hosts.cni.is_bridge() && !scenario.has_kubelets() {
        place.link(format!("link add {BRIDGE} mtu {} type bridge stp_state 0 forward_delay 0", scenario.mtu));
        for range in scenario.ranges(&node.pods) {
            let nodad = Family::of(range.addr()).pick("", " nodad");
            place.address(format!("addr add {}/{} dev {BRIDGE}{nodad}", first_address(range), range.prefix_len()));
        }
        place.address(format!("link set {BRIDGE} up"));
    }
    for pod in scenario.pods.iter().filter(|p| p.node == node.name) {
        place.cable(scenario, node, pod, &netns(&pod.key()));
    }
    place.rules = Some(rules::of(scenario, node)?);
    Ok(place)
}

/// The first address in a range of pods, which no pod gets: the bridge's own, or the gateway's.
fn first_address(range: IpNet) -> IpAddr {
    match range {
        IpNet::V4(r) => IpAddr::V4((u32::from(r.network()) + 1).into()),
        IpNet::V6(r) => IpAddr::V6((u128::from(r.network()) + 1).into()),
    }
}

/// A pod: on a link of its own with a gateway that need be no address of the cluster, or on its node's bridge.
fn pod(scenario: &Scenario, pod: &Pod) -> Result<Place> {
    let mut place = Place::new(scenario, &pod.key(), false);
    let cni = scenario.hosts.cni;
    let ranges = scenario.node(&pod.node)?.pods.both();
    let of = |ip: IpAddr| Family::of(ip).pick(ranges[0], ranges[1]);
    for ip in pod.addresses() {
        let nodad = Family::of(ip).pick("", " nodad");
        let (length, more) = match cni {
            Cni::Bridge | Cni::Flannel => (of(ip).prefix_len(), ""),
            // host-local gives the range's mask, and ptp deletes the route that follows from it.
            Cni::Kind => (of(ip).prefix_len(), " noprefixroute"),
            Cni::Ptp | Cni::Calico | Cni::AwsVpc => (of(ip).max_prefix_len(), ""),
        };
        place.address(format!("addr add {ip}/{length} dev eth0{nodad}{more}"));
    }
    place.address("link set eth0 up");
    for ip in pod.addresses().into_iter().filter(|_| cni.is_bridge() || cni == Cni::Kind) {
        let (range, gateway) = (of(ip), first_address(of(ip)));
        if cni == Cni::Kind {
            place.address(format!("route add {gateway}/{} dev eth0 src {ip}", range.max_prefix_len()));
            place.address(format!("route add {} via {gateway} dev eth0 src {ip}", range.trunc()));
        }
        place.address(format!("route add default via {gateway} dev eth0"));
    }
    if cni.is_bridge() || cni == Cni::Kind {
        return Ok(place);
    }
    let gateway6 = if cni == Cni::Calico { CALICO.1 } else { POD_GATEWAY6 };
    place.of(Family::V4, format!("route add {POD_GATEWAY4} dev eth0 scope link"));
    place.of(Family::V4, format!("route add default via {POD_GATEWAY4} dev eth0"));
    place.of(Family::V6, format!("route add default via {gateway6} dev eth0"));
    if let Some(mac) = end_mac(scenario, pod).filter(|_| cni == Cni::AwsVpc) {
        place.of(Family::V4, format!("neigh add {POD_GATEWAY4} lladdr {mac} dev eth0 nud permanent"));
        place.of(Family::V6, format!("neigh add {gateway6} lladdr {mac} dev eth0 nud permanent"));
    }
    Ok(place)
}
