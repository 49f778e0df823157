//! What a round of reports costs with 10,000 namespaces: what is new, and not what there is.

use std::time::{Duration, Instant};

use tidegate_policy::model::{Namespace, Pod, Policy, PolicyMode, Selector, Touched};

use super::denials::tests::denied;
use super::*;
use crate::core::NodeStatus;

const NAMESPACES: usize = 10_000;
const NODES: usize = 100;
const NOW: UnixSeconds = UnixSeconds(1_790_000_000);

fn objects() -> Objects {
    let mut o = Objects::default();
    for n in 0..NAMESPACES {
        let name = format!("ns{n}");
        o.namespaces.insert(name.clone(), Namespace { uid: format!("uid-{n}"), ..Namespace::default() });
        for p in 0..2usize {
            let i = n * 2 + p;
            let address = std::net::Ipv4Addr::from(0x0a00_0000 + i as u32);
            let node = format!("node{}", i % NODES);
            let mut pod = Pod {
                node,
                addresses: vec![address.into()],
                labels: Default::default(),
                host_network: false,
                ending: false,
                mirror: false,
            };
            pod.labels.insert("app".into(), format!("p{p}"));
            o.pods.insert((name.clone(), format!("pod{p}")), pod);
        }
        let policy = Policy {
            created: NOW,
            pod_selector: Selector::default(),
            mode: PolicyMode::Enforce,
            pool: None,
            egress: Vec::new(),
            deny: Vec::new(),
        };
        o.policies.insert((name, "own".into()), policy);
    }
    o
}

fn beside<'a>(status: &'a Status, denials: &'a Table) -> Beside<'a> {
    Beside { status, denials, names: &|_, _| Vec::new(), now: NOW }
}

/// CPU that this thread has used.
fn cpu() -> Duration {
    let used = nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap();
    Duration::from(used)
}

fn timed<T>(what: &str, run: impl FnOnce() -> T) -> (T, Duration) {
    let (before, started) = (cpu(), Instant::now());
    let out = run();
    let took = cpu() - before;
    println!("{what}: {took:?} of CPU in {:?}", started.elapsed());
    (out, took)
}

/// How many values are others than before.
fn others(a: &Reports, b: &Reports) -> usize {
    b.iter().filter(|(o, r)| !a.get(*o).is_some_and(|old| Arc::ptr_eq(old, r))).count()
}

#[test]
fn a_round_costs_what_is_new() {
    let objects = objects();
    let records = records_of(&objects, &[]);
    let world = Arc::new(World::compile(&objects, NOW, None));
    let survey = Arc::new(Survey::new(&objects, &records, Touched::ALL, None));
    let snapshot = Snapshot { number: 1, world, survey };
    let held = |held| {
        let node = |n| (format!("node{n}"), NodeStatus { connected: true, held, ..NodeStatus::default() });
        Status { nodes: (0..NODES).map(node).collect(), ..Status::default() }
    };
    let (waiting, done) = (held(0), held(1));
    let mut table = Table::default();
    let mut reporter = Reporter::default();
    let (first, all) = timed("the first round", || reporter.reports(&snapshot, &beside(&waiting, &table)));
    assert_eq!(first.len(), 2 * NAMESPACES);
    let (same, _) = timed("all again", || reporter.reports(&snapshot, &beside(&waiting, &table)));
    assert_eq!(others(&first, &same), 0, "nothing that is the same is written");
    let (acked, _) = timed("all nodes have acked", || reporter.reports(&snapshot, &beside(&done, &table)));
    assert_eq!(others(&same, &acked), 2 * NAMESPACES);
    for n in 0..50 {
        table.add(denied(&format!("ns{n}"), "a.example"), NOW);
    }
    let news = table.take_news();
    let (denials, some) =
        timed("denials in 50 namespaces", || reporter.denied(&snapshot, &beside(&done, &table), &news));
    assert_eq!(others(&acked, &denials), 50);
    // It is what a whole round would have said.
    assert!(denials == reporter.reports(&snapshot, &beside(&done, &table)));
    assert!(some * 4 < all, "{some:?} of {all:?}");
    // Denials everywhere: of more namespaces than are remembered, each costs the same.
    let mut table = Table::default();
    let ((), few) = timed("2,000 namespaces", || {
        (0..2000).for_each(|n| table.add(denied(&format!("ns{n}"), "a.example"), NOW));
    });
    let ((), many) = timed("then 20,000", || {
        (2000..22_000).for_each(|n| table.add(denied(&format!("ns{n}"), "a.example"), NOW));
    });
    assert!(many < few * 40, "{many:?} after {few:?}");
}
