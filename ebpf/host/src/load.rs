//! The loaded programs with their maps.

use std::fs::{self, File};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ahash::AHashMap;
use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, MapInfo, MapType, PerCpuArray, RingBuf};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use nix::fcntl::{Flock, FlockArg};
use tidegate_ebpf_common::code::COUNTERS;
use tidegate_ebpf_common::layout::{
    Addr, Budget, CARRIED, Config, DnsKey, Endpoint, Fact, FactKey, Flow, FlowKey, Gateway, GrantKey, Group, Iface,
    Naming, Node, OVERLAYS, Prefix, Scope, VERSION,
};
use tidegate_policy::ScopeKey;
use tidegate_policy::state::{FactUpdate, MAX_NAMES, NodeState};

use crate::attach::remove_all;
use crate::carry::Before;
use crate::ids::{Ids, Kind};
use crate::incarnation::Incarnations;
use crate::names;
use crate::own::OWN;
use crate::ports::PortSets;
use crate::preflight::on_bpffs;
use crate::table::{Hashed, Table, Trie};
use crate::{Capacities, Error, Local, Options, Program, Role, carry, kernel};

/// The object, aligned as its parser needs it.
#[repr(C, align(8))]
struct Aligned<T: ?Sized>(T);
static OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/programs.o")));

/// What a pinned map must look like before it is adopted.
struct Layout {
    name: &'static str,
    kind: MapType,
    key: u32,
    value: u32,
    entries: u32,
    flags: u32,
}

const NO_PREALLOC: u32 = 1;
const EVENT_BYTES: u32 = 1 << 20;
/// Budgets of events that the kernel keeps.
pub(crate) const BUDGETS: u32 = 2;

fn layouts(c: &Capacities) -> Vec<Layout> {
    fn hash<K, V>(name: &'static str, entries: u32) -> Layout {
        Layout {
            name,
            kind: MapType::Hash,
            key: size_of::<K>() as u32,
            value: size_of::<V>() as u32,
            entries,
            flags: NO_PREALLOC,
        }
    }
    fn trie<V>(name: &'static str, entries: u32) -> Layout {
        Layout { name, kind: MapType::LpmTrie, key: 24, value: size_of::<V>() as u32, entries, flags: NO_PREALLOC }
    }
    fn array<V>(name: &'static str, kind: MapType, entries: u32) -> Layout {
        Layout { name, kind, key: 4, value: size_of::<V>() as u32, entries, flags: 0 }
    }
    vec![
        array::<Config>("CONFIG", MapType::Array, 1),
        hash::<Addr, Endpoint>("ENDPOINTS", c.endpoints),
        hash::<u32, Iface>("IFACES", 4_096),
        hash::<u32, Group>("GROUPS", c.endpoints),
        hash::<u32, Scope>("SCOPES", c.endpoints),
        hash::<u32, Gateway>("GATEWAYS", 1_024),
        hash::<u32, u64>("HEARTBEATS", 1_024),
        hash::<Addr, Node>("NODES", 32_768),
        hash::<u32, Addr>("OUTER", 16_384),
        hash::<Addr, u32>("OWN", OWN),
        hash::<FactKey, Fact>("FACTS", c.facts),
        hash::<GrantKey, u32>("GRANTS", c.grants),
        array::<tidegate_ebpf_common::layout::PortSet>("PORTSETS", MapType::Array, c.portsets),
        trie::<Prefix>("PREFIXES", c.prefixes),
        trie::<u32>("CLUSTER", 65_536),
        hash::<DnsKey, u32>("CLUSTER_DNS", 4_096),
        hash::<u64, u32>("NAMES", MAX_NAMES as u32),
        array::<Naming>("NAMING", MapType::Array, 1),
        hash::<Addr, u64>("HELD", 1_024),
        hash::<FlowKey, Flow>("FLOWS", c.flows),
        hash::<Addr, u32>("FLOW_COUNTS", c.endpoints),
        // The second halves are the host's: what was counted in maps before these.
        array::<u64>("COUNTERS", MapType::PerCpuArray, 2 * COUNTERS),
        array::<Budget>("BUDGETS", MapType::PerCpuArray, 2 * BUDGETS),
        Layout { name: "EVENTS", kind: MapType::RingBuf, key: 0, value: 0, entries: EVENT_BYTES, flags: 0 },
        hash::<tidegate_ebpf_common::layout::IdKey, u32>("IDS", 262_144),
    ]
}

/// Coarse monotonic time in nanoseconds: the clock of the kernel programs.
pub(crate) fn now_ns() -> u64 {
    let t = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC_COARSE).map_or(Duration::ZERO, Duration::from);
    u64::try_from(t.as_nanos()).unwrap_or(u64::MAX)
}

pub(crate) fn now_secs() -> u32 {
    tidegate_ebpf_common::verdict::seconds(now_ns())
}

/// The tables that `apply` reconciles.
pub(crate) struct Tables {
    pub config: Array<MapData, Config>,
    pub endpoints: Hashed<Addr, Endpoint>,
    pub ifaces: Hashed<u32, Iface>,
    pub groups: Hashed<u32, Group>,
    pub scopes: Hashed<u32, Scope>,
    pub gateways: Hashed<u32, Gateway>,
    pub nodes: Hashed<Addr, Node>,
    pub outer: Hashed<u32, Addr>,
    pub own: Hashed<Addr, u32>,
    pub grants: Hashed<GrantKey, u32>,
    pub portsets: PortSets,
    pub prefixes: Trie<Prefix>,
    pub cluster: Trie<u32>,
    pub cluster_dns: Hashed<DnsKey, u32>,
    pub names: Hashed<u64, u32>,
    pub naming: Array<MapData, Naming>,
}

/// The kernel side of a node or a gateway.
pub struct Datapath {
    pub(crate) options: Options,
    /// Folder of this layout's pins.
    pub(crate) root: PathBuf,
    pub(crate) ebpf: Ebpf,
    /// A second copy of the programs, for taking the first place back.
    pub(crate) spare: Option<Ebpf>,
    pub(crate) ids: Ids,
    pub(crate) tables: Tables,
    pub(crate) incarnations: Incarnations,
    /// The key of the names' hashes.
    pub(crate) name_key: [u64; 2],
    pub(crate) heartbeats: HashMap<MapData, u32, u64>,
    pub(crate) facts: HashMap<MapData, FactKey, Fact>,
    /// Class and expiry of every fact: nobody tells a fact again as long as it holds, so that one which another
    /// program deleted could not come back.
    pub(crate) told: AHashMap<FactKey, (u32, u32)>,
    pub(crate) held: HashMap<MapData, Addr, u64>,
    pub(crate) flows: HashMap<MapData, FlowKey, Flow>,
    pub(crate) flow_counts: HashMap<MapData, Addr, u32>,
    pub(crate) counters: PerCpuArray<MapData, u64>,
    pub(crate) budgets: PerCpuArray<MapData, Budget>,
    /// What was counted in maps before these.
    pub(crate) before: Before,
    pub(crate) ring: Option<RingBuf<MapData>>,
    pub(crate) last: Option<(NodeState, Local)>,
    /// Whether an `apply` went through all tables, with errors or without.
    pub(crate) tried: bool,
    /// `CONFIG` as it was written.
    pub(crate) config: Option<Config>,
    /// Every map by its pin, which others may remove.
    pub(crate) pinned: Vec<(&'static str, MapData)>,
    /// Layouts whose programs were there before this one's.
    pub(crate) others: Vec<PathBuf>,
    /// Held for the life of the value: one process at a time works with the pins.
    _lock: Flock<File>,
}

impl Datapath {
    /// Loads the programs, and makes the pinned maps or adopts those of an earlier process.
    ///
    /// # Errors
    /// [`Error::Busy`] while another process works below the same folder, with whatever layout; [`Error::Layout`] if a pinned map is not
    /// what this version made; otherwise what the kernel refused.
    pub fn load(options: &Options) -> Result<Self, Error> {
        let root = options.pins.join(format!("v{VERSION}-{CARRIED}-{:08x}", fingerprint(&options.capacities)));
        let make =
            |path: PathBuf| fs::create_dir_all(&path).map_err(Error::io(format!("cannot make {}", path.display())));
        make(options.pins.clone())?;
        on_bpffs(&options.pins)?;
        // Before anything else is made: whoever is refused leaves nothing behind.
        let lock = lock(&options.pins)?;
        make(root.join("maps"))?;
        make(root.join("links"))?;
        check_layouts(&root.join("maps"), &options.capacities)?;
        let mut ebpf = load_object(options, &root)?;
        let (left, others): (Vec<PathBuf>, _) =
            carry::others(&options.pins, &root).into_iter().partition(|p| carry::is_left(p, &root));
        for path in left {
            if let Err(error) = remove_all(&path) {
                tracing::warn!(%error, "maps of a start that was never finished stay");
            }
        }
        if !carry::is_own(&root)? {
            if let Some(source) = carry::source(&others)
                && let Err(error) = carry::fill(&source, &root)
            {
                // Policy comes from the gateways, and enforcement must not wait for flows.
                tracing::error!(%error, "what another layout knows cannot be taken over");
            }
            carry::own(&root)?;
        }
        let before = carry::before(&root)?;
        for root in others.iter().chain([&root]) {
            if let Err(error) = carry::silence(root) {
                tracing::error!(%error, "the gateways' signs of life in the kernel cannot be forgotten");
            }
        }
        let mut pinned = Vec::new();
        for l in layouts(&options.capacities) {
            pinned.push((l.name, MapData::from_pin(root.join("maps").join(l.name)).map_err(Error::map(l.name))?));
        }
        fn take<T: TryFrom<Map, Error = aya::maps::MapError>>(ebpf: &mut Ebpf, name: &'static str) -> Result<T, Error> {
            let map = ebpf.take_map(name).ok_or(Error::Layout { map: name, what: "it is not in the object".into() })?;
            T::try_from(map).map_err(Error::map(name))
        }
        macro_rules! table {
            ($name:literal) => {
                Table::new($name, take(&mut ebpf, $name)?)?
            };
        }
        let grants: Hashed<GrantKey, u32> = table!("GRANTS");
        let prefixes: Trie<Prefix> = Table::new("PREFIXES", take::<LpmTrie<_, _, _>>(&mut ebpf, "PREFIXES")?)?;
        let heads: Vec<u32> = grants.iter().map(|(_, v)| *v).chain(prefixes.iter().map(|(_, v)| v.ports)).collect();
        let tables = Tables {
            config: take(&mut ebpf, "CONFIG")?,
            endpoints: table!("ENDPOINTS"),
            ifaces: table!("IFACES"),
            groups: table!("GROUPS"),
            scopes: table!("SCOPES"),
            gateways: table!("GATEWAYS"),
            nodes: table!("NODES"),
            outer: table!("OUTER"),
            own: table!("OWN"),
            grants,
            portsets: PortSets::adopt(take(&mut ebpf, "PORTSETS")?, heads.into_iter())?,
            prefixes,
            cluster: table!("CLUSTER"),
            cluster_dns: table!("CLUSTER_DNS"),
            names: table!("NAMES"),
            naming: take(&mut ebpf, "NAMING")?,
        };
        let facts: HashMap<MapData, FactKey, Fact> = take(&mut ebpf, "FACTS")?;
        Ok(Self {
            options: options.clone(),
            told: facts.iter().flatten().map(|(k, f): (FactKey, Fact)| (k, (f.class, f.expires))).collect(),
            ids: Ids::new(table!("IDS")),
            incarnations: Incarnations::adopt(tables.endpoints.iter()),
            name_key: names::key(tables.naming.get(&0, 0).map_err(Error::map("NAMING"))?.key)?,
            tables,
            heartbeats: take(&mut ebpf, "HEARTBEATS")?,
            facts,
            held: take(&mut ebpf, "HELD")?,
            flows: take(&mut ebpf, "FLOWS")?,
            flow_counts: take(&mut ebpf, "FLOW_COUNTS")?,
            counters: take(&mut ebpf, "COUNTERS")?,
            budgets: take(&mut ebpf, "BUDGETS")?,
            before,
            ring: Some(take(&mut ebpf, "EVENTS")?),
            root,
            ebpf,
            spare: None,
            last: None,
            tried: false,
            config: None,
            pinned,
            others,
            _lock: lock,
        })
    }

    /// Sets and deletes learnt facts. New connections may start for the given durations from now on.
    ///
    /// # Errors
    /// What the kernel refused; facts before that one hold.
    pub fn facts(&mut self, updates: &[FactUpdate]) -> Result<(), Error> {
        let now = now_ns();
        for update in updates {
            let addr = Addr::from_ip(update.ip);
            let Some(value) = &update.value else {
                if let Some(scope) = self.ids.find(Kind::Scope, update.scope.0) {
                    self.told.remove(&FactKey { scope, addr });
                    match self.facts.remove(&FactKey { scope, addr }) {
                        Ok(()) => {}
                        Err(e) if is_missing(&e) => {}
                        Err(e) => return Err(Error::map("FACTS")(e)),
                    }
                }
                continue;
            };
            let key = FactKey { scope: self.ids.get(Kind::Scope, update.scope.0)?, addr };
            let class = self.ids.get(Kind::Class, value.class.0)?;
            // Whole seconds of the moment itself, rounded up: an answer must not outlive its fact by a part of a second.
            // What has expired already is so at once.
            let ttl = u64::try_from(value.ttl.as_nanos()).unwrap_or(u64::MAX);
            let end = if ttl == 0 { now } else { now.saturating_add(ttl).saturating_add(999_999_999) };
            let expires = u32::try_from(end / 1_000_000_000).unwrap_or(u32::MAX);
            let seen = match self.options.role {
                Role::Node => 0,
                // A packet between reading and writing is noted again by the next one.
                Role::Gateway => self.facts.get(&key, 0).map_or(0, |f| f.seen),
            };
            self.facts.insert(key, Fact { class, expires, seen }, 0).map_err(Error::map("FACTS"))?;
            self.told.insert(key, (class, expires));
        }
        Ok(())
    }

    /// How long ago the fact last carried a packet, to the second; `None` if it never did or is not there.
    /// Only gateways note it.
    pub fn fact_last_seen(&self, scope: ScopeKey, ip: IpAddr) -> Option<Duration> {
        let scope = self.ids.find(Kind::Scope, scope.0)?;
        let fact = self.facts.get(&FactKey { scope, addr: Addr::from_ip(ip) }, 0).ok()?;
        (fact.seen != 0).then(|| Duration::from_secs(u64::from(now_secs().saturating_sub(fact.seen))))
    }

    /// Notes that the gateway's `Facts` stream is up and the maps hold all that it said: from then on the node's programs
    /// drop what they do not know. To be called at least every second while it is; a load begins with none noted.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn heartbeat(&mut self, gateway: &str) -> Result<(), Error> {
        let id = self.ids.named(Kind::Gateway, gateway)?;
        self.heartbeats.insert(id, now_ns(), 0).map_err(Error::map("HEARTBEATS"))
    }

    /// Holds egress addresses until the lease ends, unless it is called again before.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn hold(&mut self, addresses: &[IpAddr], lease: Duration) -> Result<(), Error> {
        let deadline = now_ns().saturating_add(u64::try_from(lease.as_nanos()).unwrap_or(u64::MAX));
        for ip in addresses {
            self.held.insert(Addr::from_ip(*ip), deadline, 0).map_err(Error::map("HELD"))?;
        }
        self.hold_before(addresses, Some(deadline))
    }

    /// Lets egress addresses go.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn release(&mut self, addresses: &[IpAddr]) -> Result<(), Error> {
        for ip in addresses {
            match self.held.remove(&Addr::from_ip(*ip)) {
                Ok(()) => {}
                Err(e) if is_missing(&e) => {}
                Err(e) => return Err(Error::map("HELD")(e)),
            }
        }
        self.hold_before(addresses, None)
    }

    fn hold_before(&self, addresses: &[IpAddr], deadline: Option<u64>) -> Result<(), Error> {
        let Some(source) = carry::source(&self.others) else { return Ok(()) };
        addresses.iter().try_for_each(|ip| carry::hold(&source, Addr::from_ip(*ip), deadline))
    }

    /// The programs of this role with the instructions that the verifier walked.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn verified_instructions(&self) -> Result<Vec<(Program, u32)>, Error> {
        let mut out = Vec::new();
        for &program in Program::ALL.iter().filter(|p| p.role() == self.options.role) {
            let info = self.program(program)?.info().map_err(program_error(program))?;
            out.push((program, info.verified_instruction_count().unwrap_or(0)));
        }
        Ok(out)
    }

    pub(crate) fn program(&self, program: Program) -> Result<&SchedClassifier, Error> {
        let loaded = self.ebpf.program(program.name()).ok_or(Error::NotLoaded(program.name()))?;
        loaded.try_into().map_err(program_error(program))
    }

    /// Runs a program on a packet without attaching it (`BPF_PROG_TEST_RUN`). Redirects are not carried out.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn test_run(&self, program: Program, packet: &TestPacket<'_>) -> Result<TestResult, Error> {
        let mut context = [0u8; 192];
        context[8..12].copy_from_slice(&packet.mark.to_ne_bytes());
        context[36..40].copy_from_slice(&packet.ingress_ifindex.to_ne_bytes());
        context[40..44].copy_from_slice(&packet.ifindex.to_ne_bytes());
        context[176..180].copy_from_slice(&packet.gso_size.to_ne_bytes());
        let mut context_out = [0u8; 192];
        let mut frame = vec![0u8; packet.frame.len() + 256];
        let options = TestRunOptions {
            data_in: Some(packet.frame),
            data_out: Some(&mut frame),
            ctx_in: Some(&context),
            ctx_out: Some(&mut context_out),
            repeat: packet.repeat.max(1),
            ..TestRunOptions::new()
        };
        let done = self.program(program)?.test_run(options).map_err(program_error(program))?;
        frame.truncate(done.data_size_out as usize);
        let mark = u32::from_ne_bytes([context_out[8], context_out[9], context_out[10], context_out[11]]);
        Ok(TestResult { code: done.return_value as i32, mark, frame, duration: done.duration })
    }
}

/// A packet for [`Datapath::test_run`].
#[derive(Clone, Copy, Debug)]
pub struct TestPacket<'a> {
    /// The Ethernet frame.
    pub frame: &'a [u8],
    /// The device of the hook; it must exist in this network namespace, 0 is its loopback.
    pub ifindex: u32,
    /// The device by which it entered.
    pub ingress_ifindex: u32,
    /// The mark.
    pub mark: u32,
    /// Size of the segments that it is to be cut into, 0 if it is not.
    pub gso_size: u32,
    /// How often it is run; the program sees its own changes. 0 counts as 1.
    pub repeat: u32,
}

/// What a test run gave.
#[derive(Clone, Debug)]
pub struct TestResult {
    /// The program's return code: -1 next, 0 OK, 2 dropped, 7 redirected.
    pub code: i32,
    /// The mark afterwards.
    pub mark: u32,
    /// The frame afterwards.
    pub frame: Vec<u8>,
    /// Time per run.
    pub duration: Duration,
}

pub(crate) fn program_error(program: Program) -> impl Fn(aya::programs::ProgramError) -> Error {
    move |source| Error::Program { program: program.name(), source: Box::new(source) }
}

pub(crate) fn is_missing(e: &aya::maps::MapError) -> bool {
    match e {
        aya::maps::MapError::KeyNotFound => true,
        aya::maps::MapError::SyscallError(e) => e.io_error.raw_os_error() == Some(libc::ENOENT),
        _ => false,
    }
}

/// How often a program's load is tried, as libbpf does.
const ATTEMPTS: u32 = 5;

fn is_again(e: &aya::programs::ProgramError) -> bool {
    use aya::programs::ProgramError::LoadError;
    matches!(e, LoadError { io_error, .. } if io_error.raw_os_error() == Some(libc::EAGAIN))
}

/// Loads the object with its maps below `root`, and the role's programs into the kernel.
pub(crate) fn load_object(options: &Options, root: &Path) -> Result<Ebpf, Error> {
    let mtu = u32::from(options.tunnel_mtu);
    let mut overlay = [0u16; OVERLAYS];
    overlay.iter_mut().zip(&options.overlay_ports).for_each(|(to, port)| *to = *port);
    let mut loader = EbpfLoader::new();
    for layout in layouts(&options.capacities) {
        loader.map_max_entries(layout.name, layout.entries);
        loader.map_pin_path(layout.name, root.join("maps").join(layout.name));
    }
    let mut ebpf = loader
        .override_global("SKB", &kernel::skb()?, true)
        .override_global("TUNNEL_PORT", &options.tunnel_port, true)
        .override_global("MARK", &options.mark, true)
        .override_global("OVERLAY", &overlay, true)
        .override_global("MARK_CLUSTER", &options.mark_cluster, true)
        .override_global("MARK_MASK", &options.mark_mask, true)
        .override_global("TUNNEL_MTU", &mtu, true)
        .override_global("FLOW_BUDGET", &options.flows_per_endpoint, true)
        .load(&OBJECT.0)?;
    for &program in Program::ALL.iter().filter(|p| p.role() == options.role) {
        let loaded: &mut SchedClassifier = ebpf
            .program_mut(program.name())
            .ok_or(Error::NotLoaded(program.name()))?
            .try_into()
            .map_err(program_error(program))?;
        let mut tried = 1;
        // The verifier gives up when a signal is pending.
        while let Err(e) = loaded.load() {
            if tried == ATTEMPTS || !is_again(&e) {
                return Err(program_error(program)(e));
            }
            tried += 1;
        }
    }
    Ok(ebpf)
}

/// Whether another process works below a folder of pins now.
pub fn is_taken(pins: &Path) -> bool {
    matches!(lock(pins), Err(Error::Busy(_)))
}

/// One process at a time works below a folder of pins.
pub(crate) fn lock(pins: &Path) -> Result<Flock<File>, Error> {
    let folder = File::open(pins).map_err(Error::io(format!("cannot open {}", pins.display())))?;
    Flock::lock(folder, FlockArg::LockExclusiveNonblock).map_err(|_| Error::Busy(pins.to_owned()))
}

/// FNV-1a over all that the layouts say, so that another size has another folder.
fn fingerprint(capacities: &Capacities) -> u32 {
    let mut h = 0x811c_9dc5_u32;
    for l in layouts(capacities) {
        let numbers = [l.kind as u32, l.key, l.value, l.entries, l.flags];
        for b in l.name.bytes().chain(numbers.iter().flat_map(|n| n.to_be_bytes())) {
            h = (h ^ u32::from(b)).wrapping_mul(0x0100_0193);
        }
    }
    h
}

/// The loader takes a pinned map as it is, so it is looked at first.
fn check_layouts(maps: &Path, capacities: &Capacities) -> Result<(), Error> {
    for l in layouts(capacities) {
        let path = maps.join(l.name);
        if !path.exists() {
            continue;
        }
        let info = MapInfo::from_pin(&path).map_err(Error::map(l.name))?;
        let kind = info.map_type().map_err(Error::map(l.name))?;
        let found = [info.key_size(), info.value_size(), info.max_entries(), info.map_flags()];
        let wanted = [l.key, l.value, l.entries, l.flags];
        if kind != l.kind || found != wanted {
            let what = format!("{kind:?} {found:?} instead of {:?} {wanted:?} (key, value, entries, flags)", l.kind);
            return Err(Error::Layout { map: l.name, what });
        }
    }
    Ok(())
}
