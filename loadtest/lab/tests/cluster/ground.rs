//! Steady traffic of pods on both workers while something happens: what it notices, who is seen outside, what dies, and
//! whether anything gets past the policy.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use serde_json::Value;
use tidegate_lab::Lab;
use tidegate_lab::family::{FAMILIES, Family};
use tidegate_lab::lab::wait_for;
use tidegate_lab::observe::Watch;
use tidegate_lab::probe::dig;
use tidegate_lab::steady::gaps::{Asked, Recorder, Traffic, connect};
use tidegate_lab::steady::{Servers, Steady};
use tidegate_lab::story::{POOL_A, POOL_B, bare, named, of};

use crate::install::{gateways, node};

/// Names are back so soon while a gateway is left, and egress addresses.
const NAMES: Duration = Duration::from_secs(1);
const ADDRESSES: Duration = Duration::from_secs(3);
/// How long a fault with what follows is looked at, and how long after its end, at least.
const LOOK: Duration = Duration::from_secs(6);
const AFTER: Duration = Duration::from_secs(2);
/// How long a flow that was not cut may take to go on, and new ones to begin.
const ON: Duration = Duration::from_secs(30);

/// How long Events may take: who led may be gone, and the next leader needs its time.
const TOLD: Duration = Duration::from_secs(60);
/// The head of the table.
const HEAD: &str = "| step | DNS gap | egress gap | untouched pod's gap | addresses moved | packets past the policy | long connections cut |\n\
    |---|---|---|---|---|---|---|";
/// How long a connection is tried.
const TRY: Duration = Duration::from_millis(300);

/// The label of gateways' nodes.
pub const LABEL: &str = "tidegate.dev/gateway";
/// The pools.
const POOLS: [[&str; 2]; 2] = [POOL_A, POOL_B];
/// Pods with traffic: of two pools, and of none, on both workers.
const PODS: [(&str, Option<[&str; 2]>); 3] =
    [("shop/node-2", Some(POOL_A)), ("billing/client", Some(POOL_B)), ("annotated/client", None)];
/// Those of them with long connections.
const LONG: [&str; 2] = ["shop/node-2", "billing/client"];

fn cluster_dns(family: Family) -> SocketAddr {
    let ip: IpAddr = family.pick("10.96.0.10", "fd00:10:96::a").parse().unwrap();
    SocketAddr::new(ip, 53)
}

fn asked(pool: Option<[&str; 2]>) -> Asked {
    let to = if pool.is_some() { |f| named(f, 12, 7000) } else { |f| bare(f, 40, 7000) };
    Asked { name: "api.example.com", dns: cluster_dns, to }
}

/// The pool by which a pod leaves.
fn pool(pod: &str) -> Option<[&'static str; 2]> {
    PODS.iter().find(|(p, _)| *p == pod).and_then(|(_, pool)| *pool)
}

/// What a pool is called.
fn name(pool: [&str; 2]) -> &'static str {
    if pool == POOL_A { "partner-a" } else { "partner-b" }
}

/// The gateway that a pool's status names, and its epoch; `None` while the API server does not answer.
pub fn owner(lab: &Lab, pool: [&str; 2]) -> Option<(String, u64)> {
    // kubectl asks a silent one for a long time.
    lab.process("kube-apiserver").ok().filter(|p| p.is_alive())?;
    let pool = lab.object(&["egresspool", name(pool)]).ok()?;
    let entry = &pool["status"]["addresses"][0];
    Some((entry["owner"].as_str().unwrap_or_default().to_owned(), entry["epoch"].as_u64().unwrap_or_default()))
}

/// How long traffic may notice something.
#[derive(Clone, Copy)]
pub struct Expected {
    names: Duration,
    addresses: Duration,
    /// Whether egress addresses may move. Only then long connections end, those that leave with them.
    moves: bool,
    /// A node whose pods are gone.
    gone: Option<&'static [&'static str]>,
}

/// Nothing moves, and nothing ends.
pub const UNNOTICED: Expected = Expected { names: NAMES, addresses: NAMES, moves: false, gone: None };
/// Egress addresses may move, and are back in time.
pub const MOVES: Expected = Expected { addresses: ADDRESSES, moves: true, ..UNNOTICED };
/// Gateways end one by one, each when agents know who goes on, and hand over what they hold: nobody has to find out that one is gone.
pub const HANDED_OVER: Expected = Expected { names: Duration::from_millis(400), addresses: NAMES, ..MOVES };

impl Expected {
    /// With pods that are gone.
    pub fn without(self, pods: &'static [&'static str]) -> Self {
        Self { gone: Some(pods), ..self }
    }
}

pub struct Ground {
    recorder: Recorder,
    /// What the router counts that no policy lets out, by what it is.
    leaks: Vec<(String, Watch)>,
    long: BTreeMap<&'static str, Steady>,
    /// What was not as it should be, by step.
    bad: Vec<String>,
    /// What Events have to tell.
    told: Vec<Told>,
    /// The table's rows.
    rows: Vec<String>,
}

/// What an Event must say.
#[derive(Debug)]
enum Told {
    /// The pool, to whom, and above which epoch, up to which.
    Moved(String, String, u64, u64),
    /// That the agent of this node was away, and came back.
    Agent(String),
}

impl Told {
    /// Whether one of these events does.
    fn by(&self, events: &[Value]) -> bool {
        let says = |reason: &str, about: &str, text: &dyn Fn(&str) -> bool| {
            let fits = |e: &&Value| e["reason"] == reason && e["involvedObject"]["name"] == about;
            events.iter().filter(fits).any(|e| e["message"].as_str().is_some_and(text))
        };
        match self {
            Told::Moved(pool, to, above, until) => (above + 1..=*until)
                .any(|epoch| says("EgressMoved", pool, &|text| text.contains(&format!(" to {to}, epoch {epoch}:")))),
            Told::Agent(node) => ["AgentAway", "AgentBack"].iter().all(|reason| says(reason, node, &|_| true)),
        }
    }
}

impl Ground {
    pub fn new(lab: &Lab) -> Self {
        let mut leaks = Vec::new();
        for family in FAMILIES {
            let to = named(family, 14, 0).ip();
            leaks.push((format!("to {to}"), lab.watch(to, "").unwrap()));
            let pools = format!("{{ {}, {} }}", of(POOL_A, family), of(POOL_B, family));
            // Errors that a node sends about answers are its own.
            let others = format!("{} saddr != {pools} meta l4proto {{ tcp, udp }}", family.pick("ip", "ip6"));
            for n in [10, 12, 13] {
                let to = named(family, n, 0).ip();
                leaks.push((format!("to {to} from nobody's pool"), lab.watch(to, &others).unwrap()));
            }
            // Who has no pool leaves by a gateway all the same.
            let nodes: Vec<String> = gateway_nodes(lab, family).iter().map(IpAddr::to_string).collect();
            let others =
                format!("{} saddr != {{ {} }} meta l4proto {{ tcp, udp }}", family.pick("ip", "ip6"), nodes.join(", "));
            let to = bare(family, 40, 0).ip();
            leaks.push((format!("to {to} past the gateways"), lab.watch(to, &others).unwrap()));
        }
        let long = LONG.iter().map(|pod| (*pod, long(lab, pod))).collect();
        Self { recorder: record(lab), leaks, long, bad: Vec::new(), told: Vec::new(), rows: Vec::new() }
    }

    /// Begins again with pods that were gone.
    pub fn again(&mut self, lab: &Lab, pods: &[&str]) {
        self.recorder = record(lab);
        self.long.extend(LONG.iter().filter(|pod| pods.contains(pod)).map(|pod| (*pod, long(lab, pod))));
    }

    /// An agent was away for longer than one takes to begin anew.
    pub fn agent_was_away(&mut self, node: &str) {
        self.told.push(Told::Agent(node.to_owned()));
    }

    /// Prints the table, and holds that all was as it should be and that Events have told what happened.
    #[track_caller]
    pub fn finish(mut self, lab: &Lab) {
        println!("\n{HEAD}\n{}\n", self.rows.join("\n"));
        let missing = || {
            let events = lab.object(&["events", "--namespace", "default"]).unwrap()["items"].take();
            let events = events.as_array().unwrap();
            self.told.iter().filter(|t| !t.by(events)).map(|t| format!("no Event tells {t:?}")).collect::<Vec<_>>()
        };
        if wait_for(TOLD, || missing().is_empty().then_some(())).is_none() {
            let missing = missing();
            self.bad.extend(missing);
        }
        assert!(self.bad.is_empty(), "{:#?}", self.bad);
    }

    /// What else was not as it should be in a step.
    pub fn also(&mut self, what: &str, bad: Vec<String>) {
        bad.iter().for_each(|bad| println!("  FAIL {bad}"));
        self.bad.extend(bad.iter().map(|bad| format!("{what}: {bad}")));
    }

    fn row(&mut self, what: &str, [dns, egress, control]: [Duration; 3], moved: bool, past: usize, ended: &[&str]) {
        let ms = |d: Duration| if d.is_zero() { "-".to_owned() } else { format!("{:.2} s", d.as_secs_f32()) };
        let ended = if ended.is_empty() { "none".to_owned() } else { ended.join(", ") };
        let (dns, egress, control, moved) = (ms(dns), ms(egress), ms(control), if moved { "yes" } else { "no" });
        self.rows.push(format!("| {what} | {dns} | {egress} | {control} | {moved} | {past} | {ended} |"));
    }

    /// Something happens. Traffic notices no more than this, and nothing gets past the policy.
    pub fn step(&mut self, lab: &mut Lab, what: &str, expected: Expected, work: impl FnOnce(&mut Lab)) {
        let before = POOLS.map(|pool| owner(lab, pool));
        let is_gone = |pod: &str| expected.gone.is_some_and(|gone| gone.contains(&pod));
        // Without a network they would end late.
        self.long.retain(|pod, _| !is_gone(pod));
        let since = Instant::now();
        work(lab);
        let took = since.elapsed();
        std::thread::sleep(LOOK.saturating_sub(took).max(AFTER));
        let mut bad = Vec::new();
        let mut worst = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
        for t in self.recorder.traffic().iter().filter(|t| !is_gone(&t.pod)) {
            let (dns, flow, control) = (t.names.longest(since), t.flows.longest(since), t.control.longest(since));
            worst = (worst.0.max(dns), worst.1.max(flow), worst.2.max(control));
            bad.extend(noticed(lab, t, since, expected));
        }
        let after = POOLS.map(|pool| owner(lab, pool));
        let other = |n: &usize| before[*n].is_some() && after[*n].is_some() && before[*n] != after[*n];
        let moved: Vec<_> = (0..2).filter(other).map(|n| POOLS[n]).collect();
        let mut ended = Vec::new();
        for (pod, flows) in &self.long {
            if let Err(e) = flows.goes_on(ON) {
                ended.push(*pod);
                println!("  {pod}: {e:#}");
            }
        }
        let past = self.past();
        self.row(what, [worst.0, worst.1, worst.2], !moved.is_empty(), past.len(), &ended);
        self.expect_moves(&before, &after);
        println!(
            "{what}, {took:.1?}: DNS gap {:.2?}, egress gap {:.2?} (untouched pod {:.2?}), {} packets past the policy; \
             long connections of {ended:?} ended; {before:?}, then {after:?}",
            worst.0,
            worst.1,
            worst.2,
            past.len()
        );
        if !moved.is_empty() && !expected.moves {
            bad.push(format!("{moved:?} moved"));
        }
        let spared = ended.iter().filter(|pod| !moved.contains(&pool(pod).unwrap()));
        bad.extend(spared.map(|pod| format!("connections of {pod} died")));
        bad.extend(past);
        self.also(what, bad);
        self.renew(lab, &ended);
    }

    /// Every gateway is away for a while: `work` ends when one is ready again. Then names and egress addresses are back in time, for
    /// whoever asks for the name of what it wants. Nothing gets past the policy meanwhile.
    pub fn outage(&mut self, lab: &mut Lab, what: &str, work: impl FnOnce(&mut Lab)) {
        let before = POOLS.map(|pool| owner(lab, pool));
        let since = Instant::now();
        work(lab);
        let (took, ready) = (since.elapsed(), Instant::now());
        let mut bad = Vec::new();
        let mut worst = (Duration::ZERO, Duration::ZERO);
        for (pod, pool) in PODS.iter().filter_map(|(pod, pool)| Some((*pod, (*pool)?))) {
            let place = lab.pod(pod);
            for family in FAMILIES {
                let reached = || {
                    dig(&place, "tcp.example.com", family.record(), &["+time=1"]);
                    let seen = place.within(|| connect(named(family, 12, 7000), TRY)).unwrap();
                    (seen == Ok(of(pool, family))).then_some(())
                };
                if wait_for(ON, reached).is_none() {
                    bad.push(format!("{pod} {family:?}: the egress address does not come back"));
                }
            }
        }
        std::thread::sleep(AFTER);
        let mut slack = Duration::ZERO;
        for t in self.recorder.traffic() {
            let (names, flows) = (t.names.back(ready), t.flows.back(ready));
            println!("  {} {:?}: names back after {names:.2?}, connections after {flows:.2?}", t.pod, t.family);
            worst.0 = worst.0.max(names);
            if pool(&t.pod).is_some() {
                worst.1 = worst.1.max(flows);
            }
            slack = slack.max(t.limit(ADDRESSES, ready) - ADDRESSES);
        }
        let ended: Vec<_> =
            self.long.iter().filter(|(_, flows)| flows.goes_on(ON).is_err()).map(|(pod, _)| *pod).collect();
        let past = self.past();
        self.row(
            &format!("{what}, from the first gateway that is ready"),
            [worst.0, worst.1, slack],
            true,
            past.len(),
            &ended,
        );
        println!(
            "{what}, {took:.1?}: from the first gateway that is ready names are back after {:.2?}, egress addresses after \
             {:.2?}, {} packets past the policy; long connections of {ended:?} ended",
            worst.0,
            worst.1,
            past.len()
        );
        // Statuses name who serves now, and Events tell of what has moved.
        let named = || {
            let (now, there) = (POOLS.map(|pool| owner(lab, pool)), gateways(lab));
            now.iter().all(|o| o.as_ref().is_some_and(|(gateway, _)| there.contains_key(gateway))).then_some(now)
        };
        match wait_for(TOLD, named) {
            Some(after) => self.expect_moves(&before, &after),
            None => bad.push(format!("statuses name {:?}", POOLS.map(|pool| owner(lab, pool)))),
        }
        if worst.0 > ADDRESSES + slack || worst.1 > ADDRESSES + slack {
            bad.push(format!("names back after {:?}, egress addresses after {:?}", worst.0, worst.1));
        }
        bad.extend(past);
        self.also(what, bad);
        self.renew(lab, &ended);
    }

    /// Events will have to tell of the pools that others own now.
    fn expect_moves(&mut self, before: &[Option<(String, u64)>; 2], after: &[Option<(String, u64)>; 2]) {
        for (pool, (before, after)) in POOLS.iter().zip(before.iter().zip(after)) {
            if let (Some((from, above)), Some((to, until))) = (before, after)
                && from != to
                && !from.is_empty()
            {
                self.told.push(Told::Moved(name(*pool).to_owned(), to.clone(), *above, *until));
            }
        }
    }

    /// What got past the policy since the beginning.
    fn past(&self) -> Vec<String> {
        let past = self.leaks.iter().map(|(what, watch)| (what, watch, watch.packets().unwrap()));
        past.filter(|(.., n)| *n > 0)
            .map(|(what, watch, n)| format!("{n} packets {what}: {}", watch.senders()))
            .collect()
    }

    /// Long connections of these pods begin anew.
    fn renew(&mut self, lab: &Lab, pods: &[&'static str]) {
        for pod in pods {
            // The old ones end first.
            self.long.remove(pod);
            self.long.insert(pod, long(lab, pod));
        }
    }
}

fn record(lab: &Lab) -> Recorder {
    let pods: Vec<_> = PODS.iter().map(|(pod, pool)| (lab.pod(pod), asked(*pool))).collect();
    Recorder::start(&pods, (&lab.pod("untouched/client"), named(Family::V4, 22, 7000)))
}

/// The addresses of the nodes that gateways may run on.
fn gateway_nodes(lab: &Lab, family: Family) -> Vec<IpAddr> {
    let nodes = lab.scenario().nodes.iter().filter(|n| n.labels.contains_key(LABEL));
    nodes.map(|n| node(lab, &n.name, family)).collect()
}

/// What of a pod's traffic is not as it should be.
fn noticed(lab: &Lab, t: &Traffic, since: Instant, expected: Expected) -> Vec<String> {
    let mut bad = Vec::new();
    let ((dns, at), flow) = (t.names.gap(since), t.flows.longest(since));
    let seen = t.flows.sources(Some(since));
    let (names, addresses) = (t.limit(expected.names, since), t.limit(expected.addresses, since));
    let silent = t.names.silence().max(t.flows.silence());
    let own = [t.names.failures(since), t.flows.failures(since)];
    println!(
        "  {} {:?}: DNS gap {dns:.2?} at {at:.1?}, egress gap {flow:.2?}, failed {own:?}, seen {seen:?}",
        t.pod, t.family
    );
    if dns > names || flow > addresses || silent > t.limit(NAMES, since) {
        bad.push(format!("{} {:?}: DNS gap {dns:?}, egress gap {flow:?}, silent {silent:?}", t.pod, t.family));
    }
    let allowed: Vec<IpAddr> = match pool(&t.pod) {
        Some(pool) => vec![of(pool, t.family)],
        None => gateway_nodes(lab, t.family),
    };
    if seen.iter().any(|ip| !allowed.contains(ip)) {
        bad.push(format!("{} {:?}: seen as {seen:?}, not {allowed:?}", t.pod, t.family));
    }
    bad
}

/// Long connections of a pod, and its tries to get past the policy.
fn long(lab: &Lab, pod: &str) -> Steady {
    let pool = pool(pod).unwrap();
    let servers = FAMILIES.map(|family| Servers {
        family,
        tcp: ("tcp.example.com", named(family, 12, 7000)),
        udp: (pool == POOL_A).then(|| ("udp.example.com", named(family, 13, 7001))),
        https: "api.example.com",
        denied: named(family, 14, 0).ip(),
        source: of(pool, family),
        own: None,
    });
    let mut last = String::new();
    let begun = wait_for(ON, || Steady::start(lab, pod, &servers, true).map_err(|e| last = format!("{e:#}")).ok());
    begun.unwrap_or_else(|| panic!("{pod}: {last}"))
}
