//! The program of a pod that starts while no agent runs: the verdict over tables that never change. Whoever attaches it may
//! end at once; the next agent puts its own before it and takes it away.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use aya::maps::lpm_trie::Key;
use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, MapError};
use aya::programs::links::FdLink;
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader, Pod};
use ipnet::IpNet;
use tidegate_ebpf_common::Addr;
use tidegate_ebpf_common::layout::{DnsKey, Endpoint, Naming, OVERLAYS, PrefixKey, endpoint, prefix_bits, prefix_key};
use tidegate_policy::state::{Named, NodeState};

use crate::attach::{entries, file_name, link_detach, link_error, remove};
use crate::preflight::on_bpffs;
use crate::{Error, Program, carry, kernel, names};

/// The folder of its pins below that of all pins.
pub(crate) const FIXED: &str = "static";
const NAME: &str = "pod_static";

/// The object, aligned as its parser needs it.
#[repr(C, align(8))]
struct Aligned<T: ?Sized>(T);
static OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/static.o")));

/// What it goes by: the cluster set, and what an agent is configured with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fixed {
    /// UDP port of the tunnel.
    pub tunnel_port: u16,
    /// UDP ports at which nodes unpack the network plugin's overlay; the first [`OVERLAYS`] count.
    pub overlay_ports: Vec<u16>,
    /// The mark of packets that passed the verdict.
    pub mark: u32,
    /// The mark of packets that passed because of the cluster set.
    pub mark_cluster: u32,
    /// The bits of both marks.
    pub mark_mask: u32,
    /// Addresses of nodes.
    pub nodes: Vec<IpAddr>,
    /// In-cluster destinations.
    pub prefixes: Vec<IpNet>,
    /// Ports on nodes that are none, inclusive.
    pub node_ports: Option<(u16, u16)>,
    /// Endpoints of the cluster's DNS, which takes questions for names of the cluster alone.
    pub dns: Vec<SocketAddr>,
    /// The cluster's suffixes.
    pub suffixes: Vec<String>,
    /// Names of Services that the cluster's DNS answers by itself, without their suffix.
    pub names: Vec<String>,
}

fn folder(pins: &Path) -> PathBuf {
    // What removes all pins detaches links in folders of this name first.
    pins.join(FIXED).join("links")
}

fn refused(e: ProgramError) -> Error {
    Error::Program { program: NAME, source: Box::new(e) }
}

fn program(ebpf: &mut Ebpf) -> Result<&mut SchedClassifier, Error> {
    ebpf.program_mut(NAME).ok_or(Error::NotLoaded(NAME))?.try_into().map_err(refused)
}

fn map<T: TryFrom<Map, Error = MapError>>(ebpf: &mut Ebpf, name: &'static str) -> Result<T, Error> {
    let map = ebpf.take_map(name).ok_or(Error::Layout { map: name, what: "it is not in the object".into() })?;
    T::try_from(map).map_err(Error::map(name))
}

fn fill<K: Pod, V: Pod>(
    ebpf: &mut Ebpf,
    name: &'static str,
    entries: impl Iterator<Item = (K, V)>,
) -> Result<(), Error> {
    let mut map: HashMap<MapData, K, V> = map(ebpf, name)?;
    for (key, value) in entries {
        map.insert(key, value, 0).map_err(Error::map(name))?;
    }
    Ok(())
}

/// Attaches it at the head of the ingress of a pod's host-side device, in the current network namespace, and pins it below
/// `pins`, on a bpffs. One that is there already is replaced.
///
/// # Errors
/// What the kernel refused.
pub fn attach_fixed(pins: &Path, fixed: &Fixed, device: &str, ifindex: u32, pod: &[IpAddr]) -> Result<(), Error> {
    let mut overlay = [0u16; OVERLAYS];
    overlay.iter_mut().zip(&fixed.overlay_ports).for_each(|(to, port)| *to = *port);
    let (lo, hi) = fixed.node_ports.unwrap_or((1, 0));
    let folder = folder(pins);
    fs::create_dir_all(&folder).map_err(Error::io(format!("cannot make {}", folder.display())))?;
    on_bpffs(&folder)?;
    let key = names::key([0; 2])?;
    let mut known = NodeState::default();
    known.cluster.suffixes = fixed.suffixes.clone();
    for name in &fixed.names {
        known.names.insert(name.as_str().into(), Named::Inside);
    }
    let known = names::entries(&key, &known);
    let mut loader = EbpfLoader::new();
    // Every pod has tables of its own, which never grow: places for what the largest cluster has would be 1.6 MiB each.
    for (name, entries) in [("NODES", fixed.nodes.len()), ("CLUSTER_DNS", fixed.dns.len()), ("NAMES", known.len())] {
        loader.map_max_entries(name, u32::try_from(entries).unwrap_or(u32::MAX).max(1));
    }
    let mut ebpf = loader
        // It relocates nothing, and reading the kernel's types takes longer than all the rest.
        .btf(None)
        .override_global("SKB", &kernel::skb()?, true)
        .override_global("TUNNEL_PORT", &fixed.tunnel_port, true)
        .override_global("OVERLAY", &overlay, true)
        .override_global("MARK", &fixed.mark, true)
        .override_global("MARK_CLUSTER", &fixed.mark_cluster, true)
        .override_global("MARK_MASK", &fixed.mark_mask, true)
        .override_global("NODE_PORT_LO", &lo, true)
        .override_global("NODE_PORT_HI", &hi, true)
        .load(&OBJECT.0)?;
    // Before the maps: taking one closes the descriptor that the program was prepared with.
    program(&mut ebpf)?.load().map_err(refused)?;
    let flags = endpoint::TOUCHED | endpoint::ISOLATED;
    let own = |ip: &IpAddr| (Addr::from_ip(*ip), Endpoint { ifindex, flags, ..Endpoint::default() });
    fill(&mut ebpf, "POD", pod.iter().map(own))?;
    fill(&mut ebpf, "NODES", fixed.nodes.iter().map(|ip| (Addr::from_ip(*ip), 1u32)))?;
    let dns = |a: &SocketAddr| (DnsKey { addr: Addr::from_ip(a.ip()), port: u32::from(a.port()) }, 1u32);
    fill(&mut ebpf, "CLUSTER_DNS", fixed.dns.iter().map(dns))?;
    fill(&mut ebpf, "NAMES", known.into_iter())?;
    let mut naming: Array<MapData, Naming> = map(&mut ebpf, "NAMING")?;
    naming.set(0, names::naming(key, &fixed.suffixes), 0).map_err(Error::map("NAMING"))?;
    let mut cluster: LpmTrie<MapData, PrefixKey, u32> = map(&mut ebpf, "CLUSTER")?;
    for net in &fixed.prefixes {
        let addr = Addr::from_ip(net.network());
        let key = Key::new(prefix_bits(addr.is_v4()) + u32::from(net.prefix_len()), prefix_key(0, addr));
        cluster.insert(&key, 1, 0).map_err(Error::map("CLUSTER"))?;
    }
    let program = program(&mut ebpf)?;
    let pin = folder.join(format!("{NAME}-{ifindex}"));
    let order = TcAttachOptions::TcxOrder(LinkOrder::first());
    let link = program.attach_with_options(device, TcAttachType::Ingress, order).map_err(refused)?;
    let link = FdLink::try_from(program.take_link(link).map_err(refused)?).map_err(link_error(&pin))?;
    // An earlier one has stayed until now.
    detach_fixed(pins, ifindex)?;
    link.pin(&pin).map_err(|e| Error::Link { path: pin.clone(), message: e.to_string() })?;
    Ok(())
}

/// The devices that have one, by their indices; some may be gone.
pub fn fixed_devices(pins: &Path) -> Vec<u32> {
    let all = entries(&folder(pins)).unwrap_or_default();
    all.iter().filter_map(|p| file_name(p).rsplit('-').next()?.parse().ok()).collect()
}

/// Takes it away from a device. That there is none is no error.
///
/// # Errors
/// The pin cannot be removed.
pub fn detach_fixed(pins: &Path, ifindex: u32) -> Result<(), Error> {
    let pin = folder(pins).join(format!("{NAME}-{ifindex}"));
    match fs::symlink_metadata(&pin) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        _ => {}
    }
    link_detach(&pin)?;
    remove(&pin)
}

/// Whether a program of ours judges what enters by a device: this one, or an agent's, as their pins say.
pub fn is_attached(pins: &Path, ifindex: u32) -> bool {
    let agents = carry::others(pins, Path::new("")).into_iter().map(|root| root.join("links"));
    let agents = agents.map(|links| links.join(format!("{}-{ifindex}", Program::PodEgress.name())));
    agents.chain([folder(pins).join(format!("{NAME}-{ifindex}"))]).any(|pin| pin.exists())
}
