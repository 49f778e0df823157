//! The kernel verdict by BPF_PROG_TEST_RUN, beside a program that does nothing.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use etherparse::PacketBuilder;
use tidegate_ebpf::{Capacities, Datapath, Interface, Local, Options, Program, Role, TestPacket};
use tidegate_policy::state::{Endpoint, FactUpdate, FactValue, Gateway, Group, Node, NodeState, Scope, Touch};
use tidegate_policy::{Carry, ClassKey, GroupKey, PortRange, PortSet, Proto, ScopeKey, Via};

use crate::arena::POD;
use crate::empty::Empty;
use crate::stat::median;
use crate::table::Table;

const SCOPE: ScopeKey = ScopeKey(1);
const CLASS: ClassKey = ClassKey(1);
/// Runs of one system call, over which the kernel takes the mean.
const REPEAT: u32 = 1_000_000;
/// Single runs with a fact each.
const SINGLE: u32 = 20_000;
/// The code of a steered packet.
const REDIRECT: i32 = 7;

fn state() -> NodeState {
    let mut s = NodeState::default();
    s.nodes.insert("n1".into(), Node { addresses: vec![IpAddr::from([192, 0, 2, 1])] });
    s.nodes.insert("n2".into(), Node { addresses: vec![IpAddr::from([192, 0, 2, 2])] });
    s.gateways.insert("gw".into(), Gateway { node: "n2".into(), control: vec![] });
    s.scopes.insert(SCOPE, Scope { owner: "gw".into(), standbys: Vec::new(), epoch: 1, pair: 1 });
    s.groups.insert(GroupKey(1), Group { isolated: true, audit: false, admin: None, own: None });
    let ports =
        PortSet::from_precedence([PortRange { proto: Proto::Tcp, lo: 443, hi: 443, via: Via::Allow(Carry::Tls) }]);
    s.grants.insert((GroupKey(1), CLASS), ports);
    let pod = Endpoint {
        node: "n1".into(),
        namespace: "shop".into(),
        pod: "web".into(),
        touch: Touch::Isolated,
        member: Some((SCOPE, GroupKey(1))),
    };
    s.endpoints.insert(POD.into(), pod);
    s
}

/// The address of a fact: another one for each, spread as real ones are.
fn address(i: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x2000_0000 | i.wrapping_mul(0x9e37_79b1) & 0x1fff_ffff)
}

fn syn(to: Ipv4Addr) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    PacketBuilder::ethernet2([2, 0, 0, 0, 0, 5], [2, 0, 0, 0, 0, 2])
        .ipv4(POD.octets(), to.octets(), 64)
        .tcp(40_000, 443, 1, 64_000)
        .syn()
        .write(&mut out, &[])?;
    Ok(out)
}

/// The programs with maps of their own, removed when dropped.
struct Loaded(Option<Datapath>);

impl Loaded {
    fn new() -> Result<Self> {
        tidegate_ebpf::preflight().map_err(anyhow::Error::msg)?;
        let pins = PathBuf::from(format!("/sys/fs/bpf/tidegate-bench-{}", std::process::id()));
        let mut options = Options::new(Role::Node, pins);
        options.capacities = Capacities { facts: 1 << 20, ..Capacities::default() };
        let mut path = Datapath::load(&options)?;
        let interface = Interface { ifindex: 1, mac: [2, 0, 0, 0, 0, 5] };
        let interfaces = BTreeMap::from([(IpAddr::from(POD), interface)]);
        let local = Local { node: "n1".into(), tunnel_ifindex: 1, interfaces, ..Local::default() };
        path.apply(&state(), &local, false)?;
        path.heartbeat("gw")?;
        Ok(Self(Some(path)))
    }

    fn path(&mut self) -> Result<&mut Datapath> {
        self.0.as_mut().context("it is loaded")
    }

    fn learn(&mut self, facts: std::ops::Range<u32>) -> Result<()> {
        let value = Some(FactValue { class: CLASS, ttl: Duration::from_secs(3600) });
        let fact = |i| FactUpdate { scope: SCOPE, ip: address(i).into(), value };
        let all: Vec<FactUpdate> = facts.map(fact).collect();
        Ok(self.path()?.facts(&all)?)
    }

    /// Nanoseconds for one run.
    fn run(&mut self, to: Ipv4Addr, repeat: u32) -> Result<f64> {
        let path = self.path()?;
        let frame = syn(to)?;
        let packet = TestPacket { frame: &frame, ifindex: 1, ingress_ifindex: 0, mark: 0, gso_size: 0, repeat };
        let done = path.test_run(Program::PodEgress, &packet)?;
        ensure!(done.code == REDIRECT, "a packet to a fact is steered, not {}", done.code);
        Ok(done.duration.as_nanos() as f64)
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        if let Some(path) = self.0.take()
            && let Err(error) = path.cleanup()
        {
            eprintln!("cannot remove the pins: {error}");
        }
    }
}

/// Hot and random runs with growing numbers of facts.
pub fn measure(counts: &[u32], runs: usize) -> Result<Table> {
    let empty = Empty::load().context("an empty program")?;
    let mut loaded = Loaded::new()?;
    let how = format!(
        "pod_egress on a TCP SYN of 54 octets from an isolated pod to a learnt address (endpoint, flow, DNS, cluster \
         set, built-in denies, fact, grant, redirect to the tunnel). Hot: {REPEAT} runs on one packet in one system \
         call. Random: {SINGLE} single runs, each to the address of another fact, so that caches are as cold as \
         after a system call. The empty program returns at once. Medians of {runs} interleaved rounds."
    );
    let head = ["program", "facts", "hot ns", "random ns", "random p99 ns"];
    let mut table = Table::new("Kernel verdict", how, &head);
    let mut idle: (Vec<f64>, Vec<f64>) = (Vec::new(), Vec::new());
    let mut rows = Vec::new();
    let mut have = 0;
    for &count in counts {
        loaded.learn(have..count)?;
        have = count;
        let (mut hot, mut random) = (Vec::new(), Vec::new());
        let mut single = rand::random::<u32>();
        for _ in 0..runs {
            hot.push(loaded.run(address(count / 2), REPEAT)?);
            idle.0.push(empty.run(&syn(address(0))?, REPEAT)?);
            for _ in 0..SINGLE {
                single = single.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let i = ((u64::from(single) * u64::from(count)) >> 32) as u32;
                random.push(loaded.run(address(i), 1)?);
                idle.1.push(empty.run(&syn(address(i))?, 1)?);
            }
        }
        rows.push(("pod_egress", count.to_string(), hot, random));
    }
    rows.insert(0, ("empty", String::new(), idle.0, idle.1));
    for (program, facts, hot, random) in rows {
        let mut sorted: Vec<u64> = random.iter().map(|r| *r as u64).collect();
        sorted.sort_unstable();
        table.row(vec![
            program.into(),
            facts,
            format!("{:.0}", median(hot)),
            format!("{:.0}", median(random)),
            format!("{:.0}", crate::stat::percentile(&sorted, 0.99)),
        ]);
    }
    Ok(table)
}
