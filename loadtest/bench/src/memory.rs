//! What a learnt name costs in the gateway. Runs in a process of its own with one thread, whose
//! malloc then counts everything.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use tidegate_dns_core::answer::{check, upstream_query};
use tidegate_dns_core::{Store, StoreLimits, wire};
use tidegate_ledger::{Answer, Classify, Config, Input, Ledger, NodeId, OwnerId, Quotas};
use tidegate_policy::{ClassKey, Name, ScopeKey};

use crate::table::Table;

const SCOPES: u32 = 20;
const NAMES: u32 = 5000;

/// Octets that malloc has given out, its own headers included.
fn used() -> usize {
    // SAFETY: mallinfo2 only reads malloc's counters.
    let m = unsafe { libc::mallinfo2() };
    m.uordblks + m.hblkhd
}

struct OneClass;

impl Classify for OneClass {
    fn class(&self, _: ScopeKey, _: IpAddr, _: &mut dyn Iterator<Item = &Name>) -> ClassKey {
        ClassKey(1)
    }
}

fn name(i: u32) -> String {
    format!("host-{i:06}.service.example.com")
}

fn addresses(i: u32) -> [IpAddr; 2] {
    [IpAddr::from(i.to_be_bytes()), IpAddr::from((0x2001_0db8_u128 << 96 | u128::from(i)).to_be_bytes())]
}

/// A ledger that holds every name with both addresses, confirmed by one node.
fn ledger() -> Result<Ledger<OneClass>> {
    let quotas = Quotas { facts: u32::MAX, names: u32::MAX, addresses_per_name: 64 };
    let now = Duration::from_secs(1000);
    let mut ledger = Ledger::new(Config { quotas, ..Config::default() }, [1, 2, 3, 4], OneClass, now);
    let mut out = Vec::new();
    ledger.handle(Input::NodeReset { node: NodeId(1) }, now, &mut out);
    let mut seq = 1;
    for i in 0..SCOPES * NAMES {
        for ip in addresses(i) {
            let answer = Answer {
                ticket: u64::from(i),
                scope: ScopeKey(u128::from(i / NAMES)),
                owner: OwnerId(i / NAMES),
                node: NodeId(1),
                name: Name::parse(&name(i))?,
                addresses: vec![ip],
                ttl: Duration::from_secs(60),
                min_binding: None,
                acked: false,
            };
            ledger.handle(Input::Answer(answer), now, &mut out);
            seq += 1;
            ledger.handle(Input::Ack { node: NodeId(1), seq }, now, &mut out);
            out.clear();
        }
    }
    Ok(ledger)
}

/// A store with an answer of each family for every name.
fn store() -> Result<Store> {
    let store = Store::new(StoreLimits::default(), [1, 2, 3, 4]);
    for i in 0..SCOPES * NAMES {
        for ip in addresses(i) {
            let (qtype, rdata) = match ip {
                IpAddr::V4(ip) => (1u16, ip.octets().to_vec()),
                IpAddr::V6(ip) => (28, ip.octets().to_vec()),
            };
            let question = wire::question(&name(i), qtype).context("a name")?;
            let mut key = qtype.to_be_bytes().to_vec();
            key.extend_from_slice(&question[..question.len() - 4]);
            let sent = upstream_query(&key, 1, &[0; 32], false);
            let mut m = sent.clone();
            m[2] = 0x81;
            m[3] = 0x80;
            m[7] = 1;
            m.extend_from_slice(&[0xc0, 12]);
            m.extend_from_slice(&qtype.to_be_bytes());
            m.extend_from_slice(&[0, 1, 0, 0, 0x0e, 0x10, 0, rdata.len() as u8]);
            m.extend_from_slice(&rdata);
            let stored = check(&sent, &m, true, 0, 3600).map_err(|e| anyhow::anyhow!("{e:?}"))?;
            store.insert(ScopeKey(u128::from(i / NAMES)), &stored, 0);
        }
    }
    for s in 0..SCOPES {
        anyhow::ensure!(store.len(ScopeKey(s.into())) == 2 * NAMES as usize, "every answer is kept");
    }
    Ok(store)
}

/// Prints the octets of a name in the ledger and in the store, for [`measure`].
pub fn print() -> Result<()> {
    let all = (SCOPES * NAMES) as usize;
    let start = used();
    let ledger = ledger()?;
    let between = used();
    let store = store()?;
    println!("{} {}", (between - start) / all, (used() - between) / all);
    drop((ledger, store));
    Ok(())
}

/// Runs [`print`] in a process of its own.
pub fn measure() -> Result<Table> {
    let done = std::process::Command::new(std::env::current_exe()?).arg("memory").output()?;
    let text = String::from_utf8(done.stdout)?;
    let mut numbers = text.split_whitespace().map(str::parse::<usize>);
    let (Some(Ok(ledger)), Some(Ok(store))) = (numbers.next(), numbers.next()) else {
        anyhow::bail!("counting memory failed: {}", String::from_utf8_lossy(&done.stderr));
    };
    let how = format!(
        "{} names of {} octets in {SCOPES} scopes, each with one IPv4 and one IPv6 address, confirmed by one node, \
         and both stored answers; as glibc's malloc counts, empty places of tables included.",
        SCOPES * NAMES,
        name(0).len()
    );
    let mut table = Table::new("Memory per learnt name", how, &["where", "octets"]);
    for (place, octets) in [("ledger", ledger), ("answer store", store), ("together", ledger + store)] {
        table.row(vec![place.into(), octets.to_string()]);
    }
    Ok(table)
}
