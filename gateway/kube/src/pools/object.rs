//! What stands in a pool, and what it becomes. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use kube::ResourceExt;
use kube::api::DynamicObject;
use serde_json::{Map, Value, json};

use super::Write;

/// The most pairs of a pool.
const MAX_PAIRS: usize = 64;

/// A pair of addresses; the one without any is that of a `PodNetwork` pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    /// IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
}

impl Address {
    /// The addresses.
    pub fn ips(&self) -> impl Iterator<Item = IpAddr> + use<> {
        self.ipv4.map(IpAddr::from).into_iter().chain(self.ipv6.map(IpAddr::from))
    }
}

/// Who owns a pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The gateway; empty where nobody does.
    pub gateway: String,
    /// The epoch of that.
    pub epoch: u64,
}

/// What the status says of a pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The pair.
    pub address: Address,
    /// Its owner.
    pub owner: Owner,
}

fn address(entry: &Value) -> Option<Address> {
    // An address that cannot be read is not the pair without addresses.
    let text = |field: &str| match entry.get(field) {
        None | Some(Value::Null) => Some(None),
        Some(v) => v.as_str().map(Some),
    };
    let ipv4 = text("ipv4")?.map(str::parse).transpose().ok()?;
    let ipv6 = text("ipv6")?.map(str::parse).transpose().ok()?;
    Some(Address { ipv4, ipv6 })
}

fn owner(entry: &Value) -> Owner {
    let gateway = entry.get("owner").and_then(Value::as_str).unwrap_or_default().to_owned();
    Owner { gateway, epoch: entry.get("epoch").and_then(Value::as_u64).unwrap_or_default() }
}

/// The entries of the status by their pairs. Of two of the same pair the higher epoch counts.
fn entries(pool: &DynamicObject) -> BTreeMap<Address, &Value> {
    let mut out: BTreeMap<Address, &Value> = BTreeMap::new();
    let all = pool.data.pointer("/status/addresses").and_then(Value::as_array);
    for entry in all.into_iter().flatten().take(MAX_PAIRS) {
        let Some(address) = address(entry) else { continue };
        if out.get(&address).is_none_or(|old| owner(entry).epoch > owner(old).epoch) {
            out.insert(address, entry);
        }
    }
    out
}

/// The pairs that the pool has, in the order of its spec.
fn pairs(pool: &DynamicObject) -> Vec<Address> {
    match pool.data.pointer("/spec/addressSource").and_then(Value::as_str) {
        Some("PodNetwork") => vec![Address::default()],
        _ => {
            let all = pool.data.pointer("/spec/static/addresses").and_then(Value::as_array);
            let with_one = |a: &Address| *a != Address::default();
            all.into_iter().flatten().take(MAX_PAIRS).filter_map(address).filter(with_one).collect()
        }
    }
}

/// Who owns what, as far as anybody ever did.
pub fn records(pool: &DynamicObject) -> Vec<Record> {
    let record = |(address, entry): (Address, &Value)| Record { address, owner: owner(entry) };
    entries(pool).into_iter().map(record).filter(|r| r.owner.epoch > 0 || !r.owner.gateway.is_empty()).collect()
}

/// Whether `new` was read before `old` was written. Versions of one resource are comparable numbers (KEP-5504).
pub fn is_older(new: &DynamicObject, old: &DynamicObject) -> bool {
    let version = |o: &DynamicObject| o.resource_version()?.parse::<u64>().ok();
    // One that was made anew under the same name is newer whatever it says.
    new.uid() == old.uid() && matches!((version(new), version(old)), (Some(new), Some(old)) if new < old)
}

/// The list of addresses with these claims, of those that stand over what they were meant for; `None` if none does. Pairs
/// that the pool has no more go, fields of an entry that others have written stay.
pub fn with_claims(
    pool: &DynamicObject,
    writes: &BTreeMap<Address, Write>,
    counts: &BTreeMap<Address, u32>,
) -> Option<Value> {
    let entries = entries(pool);
    let mut out = Vec::new();
    let mut news = false;
    for pair in pairs(pool) {
        let stands = entries.get(&pair).map(|e| owner(e)).filter(|o| o.epoch > 0 || !o.gateway.is_empty());
        let write = writes.get(&pair).filter(|w| w.over == stands && Some(&w.claim) != stands.as_ref());
        let owner = write.map(|w| &w.claim).or(stands.as_ref());
        news |= write.is_some();
        let Some(owner) = owner else { continue };
        out.push(entry(entries.get(&pair).copied(), &pair, owner, write.and_then(|_| counts.get(&pair)).copied()));
    }
    news.then_some(Value::Array(out))
}

/// The pairs of the pool that drain.
fn draining(pool: &DynamicObject) -> BTreeSet<Address> {
    let all = pool.data.pointer("/spec/static/addresses").and_then(Value::as_array);
    let drains = all.into_iter().flatten().take(MAX_PAIRS).filter(|a| a["state"] == "Draining");
    drains.filter_map(address).collect()
}

/// Whether a pair of the pool that `me` owns drains.
pub fn drains(pool: &DynamicObject, me: &str) -> bool {
    let entries = entries(pool);
    draining(pool).iter().any(|p| entries.get(p).is_some_and(|e| owner(e).gateway == me))
}

/// The list of addresses with the counts of namespaces of the pairs that `me` owns, whether those of them that drain have drained,
/// and without pairs that the pool has no more; `None` if it says so already. `live`: the addresses that living flows leave with.
pub fn with_counts(
    pool: &DynamicObject,
    me: &str,
    counts: &BTreeMap<Address, u32>,
    live: &BTreeSet<IpAddr>,
) -> Option<Value> {
    let draining = draining(pool);
    let (entries, pairs) = (entries(pool), pairs(pool));
    let mut out = Vec::new();
    let mut news = entries.keys().any(|p| !pairs.contains(p));
    for pair in pairs {
        let Some(old) = entries.get(&pair).copied() else { continue };
        let owner = owner(old);
        let count = (owner.gateway == me).then(|| counts.get(&pair).copied().unwrap_or_default());
        let mut new = entry(Some(old), &pair, &owner, count);
        if let (Some(count), Some(fields)) = (count, new.as_object_mut()) {
            let lives = pair.ips().any(|ip| live.contains(&ip));
            match draining.contains(&pair) {
                true => drop(fields.insert("drained".into(), json!(count == 0 && !lives))),
                false => drop(fields.remove("drained")),
            }
        }
        news |= new != *old;
        out.push(new);
    }
    news.then_some(Value::Array(out))
}

fn entry(old: Option<&Value>, pair: &Address, owner: &Owner, namespaces: Option<u32>) -> Value {
    let mut out = old.and_then(Value::as_object).cloned().unwrap_or_else(|| {
        let mut new = Map::new();
        new.extend(pair.ipv4.map(|a| ("ipv4".to_owned(), json!(a))));
        new.extend(pair.ipv6.map(|a| ("ipv6".to_owned(), json!(a))));
        new
    });
    if !owner.gateway.is_empty() {
        out.insert("owner".into(), json!(owner.gateway));
    }
    out.insert("epoch".into(), json!(owner.epoch));
    if let Some(n) = namespaces {
        out.insert("namespaces".into(), json!(n));
    }
    out.entry("namespaces").or_insert_with(|| json!(0));
    Value::Object(out)
}
