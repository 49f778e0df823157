//! Whatever another program changes or takes away comes back within the full pass, is counted, and meanwhile nothing
//! leaks. One lab; each damage by itself.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, Map, MapData};
use nix::sys::signal::Signal;
use tidegate_ebpf_common::Addr;
use tidegate_ebpf_common::layout::{
    Config, DnsKey, Endpoint, Fact, FactKey, Gateway, GrantKey, Group, IdKey, Iface, Node, PortSet, Prefix, PrefixKey,
    Scope,
};
use tidegate_lab::family::{FAMILIES, Family};
use tidegate_lab::lab::wait_for;
use tidegate_lab::observe::Watch;
use tidegate_lab::probe::{Echo, curl, datagram, dig};
use tidegate_lab::{Lab, Options, Scenario, netns, world};

const POD: &str = "shop/web";
/// The full pass here, seconds.
const FULL_PASS: u64 = 1;
/// What was taken away is back within two of them: one that runs looks at some things before they are gone. Of every kind, half of
/// the damages: what a busy machine does to one of them, it does not do to most.
const PASSES: Duration = Duration::from_secs(2 * FULL_PASS);
/// Until anything is back, on a busy machine.
const BACK: Duration = Duration::from_secs(20);

fn named(family: Family, n: u8, port: u16) -> SocketAddr {
    let ip: IpAddr = format!("{}{n}", family.pick("198.51.100.", "2001:db8:100::")).parse().unwrap();
    SocketAddr::new(ip, port)
}

fn egress(family: Family) -> IpAddr {
    family.pick("203.0.113.10", "2001:db8::10").parse().unwrap()
}

/// What tries all the time to get out: to what is denied, and to what is allowed, which must leave with the egress
/// address or not at all.
struct Pest {
    end: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
    watches: Vec<Watch>,
    /// By kind, how long what was damaged meanwhile took to be back.
    healed: RefCell<BTreeMap<String, Vec<Duration>>>,
}

impl Pest {
    fn new(lab: &Lab) -> Self {
        let mut watches = Vec::new();
        for family in FAMILIES {
            watches.push(lab.watch(named(family, 14, 0).ip(), "").unwrap());
            // Errors that a node sends about answers are its own.
            let other = format!("{} saddr != {} meta l4proto {{ tcp, udp }}", family.pick("ip", "ip6"), egress(family));
            watches.extend([10, 12, 13].map(|n| lab.watch(named(family, n, 0).ip(), &other).unwrap()));
        }
        let end: Arc<AtomicBool> = Arc::default();
        let (stop, netns) = (Arc::clone(&end), lab.pod(POD).netns().to_owned());
        let work = move || {
            let sockets = ["0.0.0.0:0", "[::]:0"].map(|any| UdpSocket::bind(any).unwrap());
            while !stop.load(Ordering::Relaxed) {
                for (family, socket) in FAMILIES.into_iter().zip(&sockets) {
                    for (n, port) in [(14, 443), (14, 7000), (12, 7000)] {
                        // How it ends is seen at the router.
                        let _ = TcpStream::connect_timeout(&named(family, n, port), Duration::from_millis(10));
                    }
                    for (n, port) in [(14, 7001), (13, 7001)] {
                        let _ = socket.send_to(b"pest\n", named(family, n, port));
                    }
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        };
        let thread = std::thread::spawn(move || netns::within(&netns, work).unwrap());
        Self { end, thread: Some(thread), watches, healed: RefCell::default() }
    }

    #[track_caller]
    fn nothing_leaked(&self, when: &str) {
        let packets: Vec<u64> = self.watches.iter().map(|w| w.packets().unwrap()).collect();
        assert!(packets.iter().all(|n| *n == 0), "{when}: packets at the router, by watch: {packets:?}");
    }

    #[track_caller]
    fn all_healed_in_time(&self) {
        for (kind, mut took) in self.healed.take() {
            took.sort_unstable();
            let half = took[(took.len() - 1) / 2];
            println!("{kind}: {} damages, half of them back within {half:?}, all within {:?}", took.len(), took.last());
            assert!(half < PASSES, "{kind}: {took:?}");
        }
    }
}

impl Drop for Pest {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

#[track_caller]
fn sh(lab: &Lab, place: &str, line: &str) -> String {
    let out = lab.place(place).unwrap().run(&["sh", "-c", line]);
    assert_eq!(out.status, 0, "{place}: {line}: {}", out.stderr);
    out.stdout
}

/// The settings of a gateway's namespace are mended by whoever comes first: itself, or its node's agent.
fn repairs(lab: &Lab, process: &str, kind: &str) -> f64 {
    let of = |p: &str| lab.metric(p, "tidegate_repairs_total", &[&format!("kind=\"{kind}\"")]).unwrap_or(0.0);
    let agent = if process == "gw-a" && kind == "sysctl" { of("gw-node-a") } else { 0.0 };
    of(process) + agent
}

/// Both families work, forwarded and relayed.
#[track_caller]
fn all_works(lab: &Lab, when: &str) {
    for family in FAMILIES {
        for name in ["tcp.example.com", "udp.example.com"] {
            let known =
                wait_for(BACK, || (!dig(&lab.pod(POD), name, family.record(), &[]).answers.is_empty()).then_some(()));
            assert!(known.is_some(), "{when}: {name}");
        }
        let echo = wait_for(BACK, || Echo::connect(&lab.pod(POD), named(family, 12, 7000)).ok());
        assert_eq!(echo.and_then(|e| tidegate_lab::probe::source(&e.seen)), Some(egress(family)), "{when}: TCP");
        let reply = wait_for(BACK, || datagram(&lab.pod(POD), named(family, 13, 7001), b"x", true).ok().flatten());
        assert_eq!(reply.and_then(|r| tidegate_lab::probe::source(&r)), Some(egress(family)), "{when}: UDP");
    }
    let seen = wait_for(BACK, || curl(&lab.pod(POD), Family::V4, "https://api.example.com/", &[]).source());
    assert_eq!(seen, Some(egress(Family::V4)), "{when}: TLS");
}

/// Does a damage, and holds that it is one by `look`, that `look` is soon as it was, and that it was counted.
#[track_caller]
fn heals(lab: &Lab, pest: &Pest, process: &str, kind: &str, what: &str, look: &dyn Fn() -> String, damage: &dyn Fn()) {
    let when = format!("{process}: {what}");
    let (before, counted) = (look(), repairs(lab, process, kind));
    damage();
    let begin = Instant::now();
    let damaged = look();
    // Looking takes its time, too.
    let back = wait_for(BACK, || Some(begin.elapsed()).filter(|_| look() == before));
    let Some(took) = back else { panic!("{when}: not back: {} instead of {before}", look()) };
    pest.healed.borrow_mut().entry(kind.into()).or_default().push(took);
    let more = wait_for(Duration::from_secs(5), || Some(repairs(lab, process, kind)).filter(|n| *n > counted));
    assert!(more.is_some(), "{when}: not counted as {kind}");
    // A repair may be quicker than the look; then the count is the proof that there was a damage.
    println!("{when}: back after {took:?}{}", if damaged == before { ", before it was seen" } else { "" });
    pest.nothing_leaked(&when);
}

/// A place, the process that answers for it, and what it has.
struct At<'a> {
    lab: &'a Lab,
    pest: &'a Pest,
    place: &'a str,
}

impl At<'_> {
    /// The same, with a shell's line, and a line that shows the state.
    #[track_caller]
    fn heals(&self, kind: &str, look: &str, damage: &str) {
        let look = || sh(self.lab, self.place, look);
        heals(self.lab, self.pest, self.place, kind, damage, &look, &|| drop(sh(self.lab, self.place, damage)));
    }

    fn pins(&self, folder: &str) -> PathBuf {
        let all = self.lab.layout().bpffs().join(self.place);
        std::fs::read_dir(all).unwrap().next().unwrap().unwrap().path().join(folder)
    }

    /// Removes the pin of each link whose name begins so, which detaches the program.
    #[track_caller]
    fn program_heals(&self, program: &str) {
        let links = self.pins("links");
        let names = || -> Vec<String> {
            let all = std::fs::read_dir(&links).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
            let mut all: Vec<String> = all.filter(|n| n.starts_with(program)).collect();
            all.sort();
            all
        };
        assert!(!names().is_empty(), "{program}");
        let remove = || names().iter().for_each(|n| std::fs::remove_file(links.join(n)).unwrap());
        let what = format!("rm {program}-*");
        heals(self.lab, self.pest, self.place, "program", &what, &|| format!("{:?}", names()), &remove);
    }
}

/// Entries of a pinned map as octets.
trait Entries {
    fn all(&self) -> Vec<(Vec<u8>, Vec<u8>)>;
    fn clear(&mut self);
    /// Changes one octet of every value.
    fn change(&mut self, octet: usize);
}

fn pinned(path: &std::path::Path) -> Map {
    Map::from_map_data(MapData::from_pin(path).unwrap()).unwrap()
}

impl<const K: usize, const V: usize> Entries for HashMap<MapData, [u8; K], [u8; V]> {
    fn all(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        self.iter().flatten().map(|(k, v)| (k.to_vec(), v.to_vec())).collect()
    }
    fn clear(&mut self) {
        for key in self.keys().flatten().collect::<Vec<_>>() {
            // Whoever owns it may be quicker.
            let _ = self.remove(&key);
        }
    }
    fn change(&mut self, octet: usize) {
        for (key, mut value) in self.iter().flatten().collect::<Vec<_>>() {
            value[octet] ^= 0x40;
            self.insert(key, value, 0).unwrap();
        }
    }
}

/// Octets of an LPM key's data.
type Lpm = [u8; size_of::<PrefixKey>()];

impl<const V: usize> Entries for LpmTrie<MapData, Lpm, [u8; V]> {
    fn all(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let octets = |k: Key<Lpm>| [&k.prefix_len().to_be_bytes()[..], &k.data()].concat();
        self.iter().flatten().map(|(k, v)| (octets(k), v.to_vec())).collect()
    }
    fn clear(&mut self) {
        for key in self.keys().flatten().collect::<Vec<_>>() {
            let _ = self.remove(&key);
        }
    }
    fn change(&mut self, octet: usize) {
        for (key, mut value) in self.iter().flatten().collect::<Vec<_>>() {
            value[octet] ^= 0x40;
            self.insert(&key, value, 0).unwrap();
        }
    }
}

/// How many entries of an array are looked at.
const FEW: u32 = 64;

impl<const V: usize> Entries for Array<MapData, [u8; V]> {
    fn all(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        (0..self.len().min(FEW)).map(|i| (i.to_be_bytes().to_vec(), self.get(&i, 0).unwrap().to_vec())).collect()
    }
    fn clear(&mut self) {
        for i in 0..self.len().min(FEW) {
            self.set(i, [0; V], 0).unwrap();
        }
    }
    fn change(&mut self, octet: usize) {
        for i in 0..self.len().min(FEW) {
            let mut value = self.get(&i, 0).unwrap();
            // Nobody looks at what is not in use.
            if value != [0; V] {
                value[octet] ^= 0x40;
                self.set(i, value, 0).unwrap();
            }
        }
    }
}

macro_rules! hash {
    ($path:expr, $key:ty, $value:ty) => {
        Box::new(HashMap::<_, [u8; size_of::<$key>()], [u8; size_of::<$value>()]>::try_from($path).unwrap())
            as Box<dyn Entries>
    };
}

macro_rules! trie {
    ($path:expr, $value:ty) => {
        Box::new(LpmTrie::<_, Lpm, [u8; size_of::<$value>()]>::try_from($path).unwrap()) as Box<dyn Entries>
    };
}

macro_rules! array {
    ($path:expr, $value:ty) => {
        Box::new(Array::<_, [u8; size_of::<$value>()]>::try_from($path).unwrap()) as Box<dyn Entries>
    };
}

/// Every map whose entries only a process writes, with an octet whose change leads to what does not exist, and opens
/// nothing: what a change means that another program makes on purpose, no kernel map can know.
fn maps(at: &At<'_>) -> Vec<(&'static str, usize, Box<dyn Entries>)> {
    let map = |name| pinned(&at.pins("maps").join(name));
    vec![
        ("CONFIG", 4, array!(map("CONFIG"), Config)),
        ("ENDPOINTS", 0, hash!(map("ENDPOINTS"), Addr, Endpoint)),
        ("IFACES", 5, hash!(map("IFACES"), u32, Iface)),
        ("GROUPS", 8, hash!(map("GROUPS"), u32, Group)),
        ("SCOPES", 0, hash!(map("SCOPES"), u32, Scope)),
        ("GATEWAYS", 0, hash!(map("GATEWAYS"), u32, Gateway)),
        ("NODES", 0, hash!(map("NODES"), Addr, Node)),
        ("OUTER", 15, hash!(map("OUTER"), u32, Addr)),
        ("OWN", 0, hash!(map("OWN"), Addr, u32)),
        ("FACTS", 0, hash!(map("FACTS"), FactKey, Fact)),
        ("GRANTS", 0, hash!(map("GRANTS"), GrantKey, u32)),
        ("PORTSETS", 0, array!(map("PORTSETS"), PortSet)),
        ("PREFIXES", 0, trie!(map("PREFIXES"), Prefix)),
        ("CLUSTER", 0, trie!(map("CLUSTER"), u32)),
        ("CLUSTER_DNS", 0, hash!(map("CLUSTER_DNS"), DnsKey, u32)),
        ("IDS", 0, hash!(map("IDS"), IdKey, u32)),
    ]
}

/// The entries as a text; of facts only what does not change by itself.
fn text(name: &str, entries: &dyn Entries) -> String {
    let mut all = entries.all();
    if name == "FACTS" {
        all.iter_mut().for_each(|(_, v)| v.truncate(size_of::<u32>()));
    }
    all.sort();
    format!("{all:?}")
}

const TABLE: &str = "nft -s -t list table inet tidegate 2>&1 || true";
const WHOLE_TABLE: &str = "nft -s list table inet tidegate 2>&1 || true";

/// Deletes a rule by a text that only it has.
fn drop_rule(chain: &str, text: &str) -> String {
    format!(
        "nft delete rule inet tidegate {chain} handle $(nft -a list chain inet tidegate {chain} | grep -F '{text}' | head -n1 | sed 's/.*handle //')"
    )
}

fn gateway(at: &At<'_>) {
    let table = [
        "nft delete table inet tidegate".to_owned(),
        "nft flush chain inet tidegate intercept".to_owned(),
        "nft flush chain inet tidegate postrouting".to_owned(),
        drop_rule("forward", "ct state invalid"),
        drop_rule("leave", "fib saddr type"),
        "nft add rule inet tidegate forward counter accept".to_owned(),
    ];
    for damage in table {
        at.heals("table", TABLE, &damage);
        all_works(at.lab, &damage);
    }
    let rules = "ip rule; ip -6 rule";
    let routes = "for t in 100 101 102; do ip route show table $t; ip -6 route show table $t; done 2>/dev/null; true";
    let links = "ip -o link show | sed 's/.* \\(tg[ap]\\)@[^ ]*/\\1/; s/state.*//' | sort";
    for (kind, look, damage) in [
        ("rule", rules, "ip rule del pref 20100"),
        ("rule", rules, "ip -6 rule del pref 20105"),
        ("rule", rules, "ip rule del from 203.0.113.10; ip -6 rule del from 2001:db8::10"),
        ("route", routes, "ip route flush table 100; ip -6 route flush table 101"),
        ("route", routes, "ip route flush table 102; ip -6 route flush table 102"),
        ("address", "ip -o addr show dev tga | sort", "ip addr del 203.0.113.10/32 dev tga"),
        ("address", "ip -o addr show dev tga | sort", "ip -6 addr del 2001:db8::10/128 dev tga"),
        ("sysctl", "sysctl net.ipv4.ip_forward", "sysctl -w net.ipv4.ip_forward=0"),
        ("sysctl", "sysctl net.ipv6.conf.all.forwarding", "sysctl -w net.ipv6.conf.all.forwarding=0"),
        ("sysctl", "sysctl net.ipv4.conf.tgp.rp_filter", "sysctl -w net.ipv4.conf.tgp.rp_filter=1"),
        ("device", links, "ip link set tga down"),
        ("device", links, "ip link set tgp mtu 1300"),
        ("device", links, "ip link del tgp"),
        ("device", links, "ip link del tga"),
    ] {
        at.heals(kind, look, damage);
        all_works(at.lab, damage);
    }
    at.program_heals("gateway_ingress");
    all_works(at.lab, "gateway_ingress");
}

fn node(at: &At<'_>) {
    for damage in [
        "nft delete table inet tidegate",
        "nft flush chain inet tidegate forward",
        "nft flush chain inet tidegate prerouting",
        &drop_rule("forward", "@isolated4"),
        "nft flush set inet tidegate isolated4; nft flush set inet tidegate isolated6",
        "nft flush set inet tidegate cluster4; nft flush set inet tidegate nodes6",
        "nft insert rule inet tidegate forward accept",
    ] {
        at.heals("table", WHOLE_TABLE, damage);
    }
    all_works(at.lab, "tables of a node");
    let tunnel = "ip -d -o link show dev tgn 2>/dev/null | grep -o 'mtu [0-9]*\\|vxlan external\\|,UP'; true";
    for (kind, look, damage) in [
        ("device", tunnel, "ip link set tgn down"),
        ("device", tunnel, "ip link set tgn mtu 1400"),
        ("device", tunnel, "ip link del tgn"),
        ("sysctl", "sysctl net.ipv4.conf.tgn.rp_filter", "sysctl -w net.ipv4.conf.tgn.rp_filter=1"),
    ] {
        at.heals(kind, look, damage);
        all_works(at.lab, damage);
    }
    for program in ["pod_egress", "pod_ingress", "node_guard", "uplink_ingress", "tunnel_ingress"] {
        at.program_heals(program);
        all_works(at.lab, program);
    }
    let pins = at.pins("maps");
    let names = || {
        let mut all: Vec<_> = std::fs::read_dir(&pins).into_iter().flatten().flatten().map(|e| e.file_name()).collect();
        all.sort();
        format!("{all:?}")
    };
    let one = || std::fs::remove_file(pins.join("FACTS")).unwrap();
    heals(at.lab, at.pest, at.place, "pin", "rm maps/FACTS", &names, &one);
    let folder = || std::fs::remove_dir_all(&pins).unwrap();
    heals(at.lab, at.pest, at.place, "pin", "rm -r maps", &names, &folder);
    // Another program comes first on a pod's interface, and hides those behind it.
    let veth = world::veth(at.lab.scenario(), at.lab.scenario().pod(POD).unwrap());
    let first = || {
        let query = || aya::programs::SchedClassifier::query_tcx(veth.as_str(), aya::programs::TcAttachType::Ingress);
        let (_, programs) = at.lab.place(at.place).unwrap().within(query).unwrap().unwrap();
        programs.first().and_then(|p| p.name_as_str().map(str::to_owned)).unwrap_or_default()
    };
    heals(at.lab, at.pest, at.place, "program", "another program first", &first, &|| {
        at.lab.attach_foreign("foreign").unwrap()
    });
    all_works(at.lab, "another program first");
}

fn gateway_node(at: &At<'_>) {
    let links = "for d in tgn tgq tgh; do ip -o link show dev $d 2>/dev/null | grep -o ' tg[nqh]\\|mtu [0-9]*\\|,UP\\|NOARP'; done; true";
    for (kind, damage) in [
        ("device", "ip link del tgn"),
        ("device", "ip link set tgq down"),
        ("device", "ip link set tgh down"),
        ("device", "ip link set tgq arp on"),
    ] {
        at.heals(kind, links, damage);
        all_works(at.lab, damage);
    }
    for key in ["net.ipv4.conf.tgh.forwarding", "net.ipv6.conf.tgh.forwarding"] {
        at.heals("sysctl", &format!("sysctl {key}"), &format!("sysctl -w {key}=0"));
        all_works(at.lab, key);
    }
    for program in ["gateway_return", "uplink_egress", "uplink_ingress", "tunnel_ingress"] {
        at.program_heals(program);
        all_works(at.lab, program);
    }
    at.heals("table", WHOLE_TABLE, "nft delete table inet tidegate");
    // Pairs that are gone only the gateway can ask for again, and it counts them.
    for device in ["tgq", "tgh"] {
        let look = || sh(at.lab, at.place, links);
        let damage = || drop(sh(at.lab, at.place, &format!("ip link del {device}")));
        heals(at.lab, at.pest, "gw-a", "device", &format!("{}: ip link del {device}", at.place), &look, &damage);
        all_works(at.lab, device);
    }
}

fn lab(name: &str) -> Lab {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/demo.yaml");
    let mut scenario = Scenario::load(file.as_ref()).unwrap();
    let product = scenario.tidegate.as_mut().unwrap();
    for keys in [&mut product.agent, &mut product.gateway] {
        keys.insert("fullPassSeconds".into(), FULL_PASS.into());
    }
    let options = Options { lab: Some(env!("CARGO_BIN_EXE_tidegate-lab").into()), ..Options::unique(name) };
    let lab = Lab::up(scenario, &options).unwrap();
    // Alone: a peer takes over from a gateway that lost its devices.
    lab.signal("gw-b", Signal::SIGTERM, Some(Duration::from_secs(35))).unwrap();
    all_works(&lab, "before");
    lab
}

#[test]
fn a_gateway_whose_way_out_cannot_be_set_up_says_that_it_is_not_ready() {
    let lab = lab("unready");
    let pest = Pest::new(&lab);
    let ready = || lab.admin("gw-a", "/readyz").unwrap();
    assert_eq!(ready().0, 200);
    // A table that belongs to a process is nobody else's to change: the kernel refuses the gateway's rules.
    let mut owner = lab.place("gw-a").unwrap().spawn(&["nft", "--interactive"]).unwrap();
    let taken = wait_for(BACK, || {
        owner.send("delete table inet tidegate\nadd table inet tidegate { flags owner; }\n").unwrap();
        sh(&lab, "gw-a", "nft list ruleset").contains("progname nft").then_some(())
    });
    assert!(taken.is_some(), "the table could not be taken: {}", owner.output());
    let said = wait_for(BACK, || Some(ready()).filter(|(code, _)| *code == 503));
    assert!(said.is_some_and(|(_, parts)| parts.contains("way")), "{:?}", ready());
    pest.nothing_leaked("while the rules are refused");
    // The table goes with its owner.
    drop(owner);
    assert!(wait_for(BACK, || (ready().0 == 200).then_some(())).is_some(), "{:?}", ready());
    all_works(&lab, "the rules are there again");
    pest.nothing_leaked("afterwards");
}

#[test]
fn what_others_take_away_comes_back_is_counted_and_nothing_leaks() {
    let lab = lab("repairs");
    let pest = Pest::new(&lab);
    let at = |place| At { lab: &lab, pest: &pest, place };
    node(&at("node-1"));
    gateway_node(&at("gw-node-a"));
    gateway(&at("gw-a"));
    for place in ["node-1", "gw-a"] {
        let at = at(place);
        for (name, octet, entries) in maps(&at) {
            let entries = RefCell::new(entries);
            let look = || text(name, entries.borrow().as_ref());
            // A gateway's own kernel knows no devices and no tunnel.
            if entries.borrow().all().is_empty() {
                assert!(place == "gw-a" && ["IFACES", "OUTER", "OWN"].contains(&name), "{place}: {name} is empty");
                continue;
            }
            heals(&lab, &pest, place, "map", &format!("{name} emptied"), &look, &|| entries.borrow_mut().clear());
            let change = || entries.borrow_mut().change(octet);
            heals(&lab, &pest, place, "map", &format!("{name} changed"), &look, &change);
        }
        all_works(&lab, place);
    }
    pest.all_healed_in_time();
}
