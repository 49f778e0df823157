//! What a learnt name costs. Alone in its process, because it counts every allocation.

use std::alloc::{GlobalAlloc, Layout, System};
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tidegate_ledger::{Answer, Classify, Config, Input, Ledger, NodeId, OwnerId, Quotas};
use tidegate_policy::{ClassKey, Name, ScopeKey};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);

/// What glibc's malloc takes for a request: eight octets of header, steps of sixteen, at least 32.
fn cost(size: usize) -> usize {
    (size + 8).next_multiple_of(16).max(32)
}

// SAFETY: every call goes to the system's allocator unchanged; only a counter is kept beside.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(cost(layout.size()), Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(cost(layout.size()), Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct OneClass;

impl Classify for OneClass {
    fn class(&self, _: ScopeKey, _: IpAddr, _: &mut dyn Iterator<Item = &Name>) -> ClassKey {
        ClassKey(1)
    }
}

#[test]
fn a_learnt_name_with_both_families_costs_under_400_octets_and_leaves_nothing() {
    const SCOPES: u32 = 20;
    const NAMES: u32 = 5000;
    let quotas = Quotas { facts: u32::MAX, names: u32::MAX, addresses_per_name: 64 };
    let start = Duration::from_secs(1000);
    let before = LIVE.load(Ordering::Relaxed);
    let mut ledger = Ledger::new(Config { quotas, ..Config::default() }, [1, 2, 3, 4], OneClass, start);
    let mut out = Vec::new();
    ledger.handle(Input::NodeReset { node: NodeId(1) }, start, &mut out);
    let mut seq = 1;
    for i in 0..SCOPES * NAMES {
        let v4 = IpAddr::from(i.to_be_bytes());
        let v6 = IpAddr::from((0x2001_0db8_u128 << 96 | u128::from(i)).to_be_bytes());
        // One answer per family, as a pod asks.
        for ip in [v4, v6] {
            let answer = Answer {
                ticket: u64::from(i),
                scope: ScopeKey(u128::from(i / NAMES)),
                owner: OwnerId(i / NAMES),
                node: NodeId(1),
                name: Name::parse(&format!("host-{i:06}.service.example.com")).expect("a name"),
                addresses: vec![ip],
                ttl: Duration::from_secs(60),
                min_binding: None,
                acked: false,
            };
            ledger.handle(Input::Answer(answer), start, &mut out);
            seq += 1;
            ledger.handle(Input::Ack { node: NodeId(1), seq }, start, &mut out);
            out.clear();
        }
    }
    drop(std::mem::take(&mut out));
    let each = (LIVE.load(Ordering::Relaxed) - before) / (SCOPES * NAMES) as usize;
    println!("{each} octets for a name with two addresses");
    assert_eq!(ledger.counts().facts, 2 * (SCOPES * NAMES) as usize);
    assert!(each < 400, "{each}");

    for s in 0..SCOPES {
        ledger.handle(Input::ScopeGone { scope: ScopeKey(s.into()) }, start, &mut out);
        out.clear();
    }
    ledger.handle(Input::NodeGone { node: NodeId(1) }, start, &mut out);
    ledger.handle(Input::Tick, start + Duration::from_secs(7200), &mut out);
    drop(out);
    let left = LIVE.load(Ordering::Relaxed) - before;
    println!("{left} octets when all is gone");
    assert!(left < 64 << 10, "{left}");
}
