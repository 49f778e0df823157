//! The netfilter half of the guard: a table `inet tidegate` of our own.
//!
//! Most network plugins masquerade in POSTROUTING, before an egress program on
//! the uplink sees a packet. The forward hook still has the pod's source, and
//! the destination after DNAT. Rules are written at start, when a set changes
//! and when a check finds them changed; never per packet, and no other table is touched.
//!
//! `nft` is a process, so all of this runs on a thread of its own ([`Keeper`]).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use nftables::helper::{NftablesError, apply_ruleset_raw, get_current_ruleset_raw};
use parking_lot::{Condvar, Mutex};
use serde_json::{Value, json};

use tidegate_ebpf::EPHEMERAL;

use crate::config::Mark;

const FAMILY: &str = "inet";
const TABLE: &str = "tidegate";

/// How long changes are gathered before `nft` runs.
const DEBOUNCE: Duration = Duration::from_millis(100);
/// How long to wait after a failure.
const RETRY: Duration = Duration::from_secs(2);

/// What the rules are made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// Addresses of this node's isolated pods.
    pub isolated: BTreeSet<IpAddr>,
    /// Addresses of all pods of this node that are known.
    pub pods: BTreeSet<IpAddr>,
    /// The device by which a pod's packets enter, for those whose interface is known.
    pub places: BTreeMap<IpAddr, String>,
    /// Addresses of nodes.
    pub nodes: BTreeSet<IpAddr>,
    /// The cluster set.
    pub cluster: Vec<IpNet>,
    /// First and last port on nodes' addresses that is outside the cluster set.
    pub node_ports: Option<(u16, u16)>,
    /// Names of the uplinks and of devices on top of them.
    pub uplinks: Vec<String>,
    /// Names of the devices by which tunnel packets of other nodes enter.
    pub underlay: Vec<String>,
    /// Names of the devices by which packets enter that no pod of this node sent.
    pub foreign: Vec<String>,
    /// Drop what leaves by an uplink from an unknown address, or from a pod's by another device than its own, unless it
    /// entered by a foreign device.
    pub drop_unknown: bool,
}

/// What does not change while the agent runs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// UDP port of the tunnel.
    pub tunnel_port: u16,
    /// The marks of what the verdict let pass.
    pub mark: Mark,
    /// UDP ports at which nodes unpack the network plugin's tunnels.
    pub overlay_ports: BTreeSet<u16>,
}

/// Why the table could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// `nft` failed or could not be run.
    #[error("nft: {0}")]
    Nft(String),
    /// `nft` printed something that is not JSON.
    #[error("nft printed no JSON: {0}")]
    Json(#[from] serde_json::Error),
}

impl From<NftablesError> for GuardError {
    fn from(e: NftablesError) -> Self {
        match e {
            NftablesError::NftFailed { stderr, .. } => GuardError::Nft(stderr.trim().to_owned()),
            other => GuardError::Nft(other.to_string()),
        }
    }
}

fn run(commands: Vec<Value>) -> Result<(), GuardError> {
    let payload = serde_json::to_string(&json!({ "nftables": commands }))?;
    apply_ruleset_raw(&payload, nftables::helper::DEFAULT_NFT, nftables::helper::DEFAULT_ARGS)?;
    Ok(())
}

fn list(args: &[&str]) -> Result<Vec<Value>, GuardError> {
    let text = get_current_ruleset_raw(nftables::helper::DEFAULT_NFT, args)?;
    match serde_json::from_str::<Value>(&text)? {
        Value::Object(mut o) => match o.remove("nftables") {
            Some(Value::Array(items)) => Ok(items),
            _ => Ok(Vec::new()),
        },
        _ => Ok(Vec::new()),
    }
}

fn table_exists() -> Result<bool, GuardError> {
    Ok(list(&["list", "tables"])?
        .iter()
        .any(|t| t.pointer("/table/family") == Some(&json!(FAMILY)) && t.pointer("/table/name") == Some(&json!(TABLE))))
}

/// Removes the table, if it is there.
///
/// # Errors
/// `nft` failed.
pub fn remove() -> Result<(), GuardError> {
    if !table_exists()? {
        return Ok(());
    }
    run(vec![json!({"delete": {"table": {"family": FAMILY, "name": TABLE}}})])
}

/// Input chains of other tables that drop by default and name the tunnel's port nowhere: tunnel packets may not
/// arrive. Best effort, for a warning at start.
///
/// # Errors
/// `nft` failed.
pub fn closed_inputs(tunnel_port: u16) -> Result<Vec<String>, GuardError> {
    let items = list(&["list", "ruleset"])?;
    let port = tunnel_port.to_string();
    let mentions = |table: &Value| {
        items.iter().filter_map(|i| i.get("rule")).any(|r| {
            r.get("table") == Some(table) && r.get("expr").is_some_and(|e| e.to_string().contains(port.as_str()))
        })
    };
    let closed = |i: &Value| {
        let c = i.get("chain")?;
        let is = |k: &str, v: &str| c.get(k).and_then(Value::as_str) == Some(v);
        let table = c.get("table")?;
        (is("hook", "input") && is("policy", "drop") && !mentions(table))
            .then(|| format!("{} {}", table.as_str().unwrap_or_default(), c["name"].as_str().unwrap_or_default()))
    };
    Ok(items.iter().filter_map(closed).collect())
}

/// The table, as this process knows it.
#[derive(Debug)]
pub struct Table {
    settings: Settings,
    written: Option<Desired>,
    /// The rules are the kernel's right after they were written, for comparison; the counters those of the last look.
    listing: Listing,
}

/// The table, as the kernel has it.
#[derive(Debug, Default)]
pub struct Listing {
    /// It, without what changes by itself.
    pub rules: Vec<Value>,
    /// Its counters: name, packets.
    pub counters: Vec<(String, u64)>,
}

/// What [`Table::apply`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// Nothing: the kernel already has it.
    Unchanged,
    /// Elements of sets were added and deleted.
    Elements,
    /// The table was replaced in one transaction.
    Replaced,
    /// The same, because somebody else had changed it.
    Repaired,
}

impl Table {
    /// Knows nothing of the kernel yet.
    pub fn new(settings: Settings) -> Self {
        Self { settings, written: None, listing: Listing::default() }
    }

    /// Makes the kernel hold `desired`.
    ///
    /// # Errors
    /// `nft` failed; the next call writes the whole table.
    pub fn apply(&mut self, desired: &Desired) -> Result<Done, GuardError> {
        // What fails in the middle leaves nothing known: then the next one writes the whole.
        let done = match self.written.take() {
            Some(old) if old == *desired => {
                self.written = Some(old);
                return Ok(Done::Unchanged);
            }
            Some(old) if same_rules(&old, desired) => {
                let mut commands = Vec::new();
                for (name, old, new) in [
                    ("isolated", &old.isolated, &desired.isolated),
                    ("pods", &old.pods, &desired.pods),
                    ("nodes", &old.nodes, &desired.nodes),
                ] {
                    change(&mut commands, "delete", name, old.difference(new).copied().collect());
                    change(&mut commands, "add", name, new.difference(old).copied().collect());
                }
                let left = |a: &BTreeMap<_, _>, b: &BTreeMap<IpAddr, String>| {
                    let left = a.iter().filter(|(ip, device): &(&IpAddr, &String)| b.get(ip) != Some(device));
                    left.map(|(ip, device)| (*ip, device.clone())).collect::<Vec<_>>()
                };
                place(&mut commands, "delete", &left(&old.places, &desired.places));
                place(&mut commands, "add", &left(&desired.places, &old.places));
                // Elements may be all that is left of a table that somebody flushed.
                if self.is_changed()? {
                    self.replace(desired)?;
                    Done::Repaired
                } else {
                    run(commands).map(|()| Done::Elements).or_else(|_| self.replace(desired))?
                }
            }
            _ => self.replace(desired)?,
        };
        self.listing = read()?.ok_or_else(|| GuardError::Nft(format!("table {FAMILY} {TABLE} is gone again")))?;
        self.written = Some(desired.clone());
        Ok(done)
    }

    /// Compares the kernel's table with what was written and writes it anew if they differ.
    ///
    /// # Errors
    /// `nft` failed.
    pub fn check(&mut self) -> Result<Done, GuardError> {
        let Some(written) = self.written.clone() else { return Ok(Done::Unchanged) };
        if !self.is_changed()? {
            return Ok(Done::Unchanged);
        }
        self.written = None;
        self.apply(&written).map(|_| Done::Repaired)
    }

    /// Whether the last wish was written, and not found to be changed since.
    fn is_written(&self) -> bool {
        self.written.is_some()
    }

    /// Whether the kernel's table is not as it was after it was written.
    fn is_changed(&mut self) -> Result<bool, GuardError> {
        let same = match read()? {
            Some(now) => {
                self.listing.counters = now.counters;
                self.listing.rules == now.rules
            }
            None => false,
        };
        if !same {
            tracing::warn!("the nftables table {FAMILY} {TABLE} was changed by somebody else; writing it anew");
        }
        Ok(!same)
    }

    fn replace(&self, desired: &Desired) -> Result<Done, GuardError> {
        run(ruleset(&self.settings, desired))?;
        Ok(Done::Replaced)
    }
}

fn same_rules(a: &Desired, b: &Desired) -> bool {
    let rules = |d: &Desired| Desired {
        isolated: BTreeSet::new(),
        pods: BTreeSet::new(),
        places: BTreeMap::new(),
        nodes: BTreeSet::new(),
        ..d.clone()
    };
    rules(a) == rules(b)
}

/// Reads the table; `None` if it is not there.
///
/// # Errors
/// `nft` failed.
pub fn read() -> Result<Option<Listing>, GuardError> {
    let mut rules = match list(&["list", "table", FAMILY, TABLE]) {
        Ok(items) => items,
        // It may be that there is none.
        Err(e) => return if table_exists()? { Err(e) } else { Ok(None) },
    };
    let counter = |i: &Value| {
        let c = i.get("counter")?;
        Some((c.get("name")?.as_str()?.to_owned(), c.get("packets")?.as_u64()?))
    };
    let counters = rules.iter().filter_map(counter).collect();
    rules.retain(|i| i.get("metainfo").is_none());
    for item in &mut rules {
        for body in item.as_object_mut().into_iter().flat_map(|o| o.values_mut()) {
            if let Some(body) = body.as_object_mut() {
                for key in ["handle", "packets", "bytes"] {
                    body.remove(key);
                }
                if let Some(Value::Array(elements)) = body.get_mut("elem") {
                    elements.sort_by_key(Value::to_string);
                }
            }
        }
    }
    Ok(Some(Listing { rules, counters }))
}

fn object(kind: &str, mut body: Value) -> Value {
    body["family"] = json!(FAMILY);
    body["table"] = json!(TABLE);
    json!({ "add": { kind: body } })
}

fn change(commands: &mut Vec<Value>, verb: &str, set: &str, addresses: Vec<IpAddr>) {
    for (suffix, v4) in [("4", true), ("6", false)] {
        let elements: Vec<String> = addresses.iter().filter(|a| a.is_ipv4() == v4).map(ToString::to_string).collect();
        if !elements.is_empty() {
            let name = format!("{set}{suffix}");
            commands.push(json!({ verb: {"element": {
                "family": FAMILY, "table": TABLE, "name": name, "elem": elements,
            }}}));
        }
    }
}

/// Changes the sets of pods that have a place, and of places.
fn place(commands: &mut Vec<Value>, verb: &str, places: &[(IpAddr, String)]) {
    change(commands, verb, "placed", places.iter().map(|(ip, _)| *ip).collect());
    for (suffix, v4) in [("4", true), ("6", false)] {
        let of = places.iter().filter(|(ip, _)| ip.is_ipv4() == v4);
        let elements: Vec<Value> = of.map(|(ip, device)| json!({"concat": [ip, device]})).collect();
        if !elements.is_empty() {
            let name = format!("places{suffix}");
            commands.push(json!({ verb: {"element": {
                "family": FAMILY, "table": TABLE, "name": name, "elem": elements,
            }}}));
        }
    }
}

/// The whole table as one transaction: what was there before goes in the same instant.
fn ruleset(settings: &Settings, desired: &Desired) -> Vec<Value> {
    let table = json!({"table": {"family": FAMILY, "name": TABLE}});
    let mut out = vec![json!({"add": &table}), json!({"delete": &table}), json!({"add": &table})];

    for counter in ["isolated", "translated", "unknown", "tunnel_port"] {
        out.push(object("counter", json!({"name": counter})));
    }
    for (suffix, kind) in [("4", "ipv4_addr"), ("6", "ipv6_addr")] {
        for set in ["isolated", "pods", "placed", "nodes"] {
            out.push(object("set", json!({"name": format!("{set}{suffix}"), "type": kind})));
        }
        out.push(object("set", json!({"name": format!("places{suffix}"), "type": [kind, "ifname"]})));
        out.push(object("set", json!({"name": format!("cluster{suffix}"), "type": kind, "flags": ["interval"]})));
    }
    for set in ["uplinks", "underlay", "foreign"] {
        out.push(object("set", json!({"name": set, "type": "ifname"})));
    }

    // After DNAT and after every mark, before the filter chains of others, whose accept would not end ours anyway.
    for (name, hook, prio) in [
        ("forward", "forward", -5),
        ("input", "input", -5),
        ("prerouting", "prerouting", -300),
        ("output", "output", -300),
    ] {
        let body = json!({"name": name, "type": "filter", "hook": hook, "prio": prio, "policy": "accept"});
        out.push(object("chain", body));
    }

    let (Mark { value, mask }, by_cluster) = (settings.mark, settings.mark.cluster());
    let udp = |ports: Value| json!({"match": {"op": "==", "left": {"payload": {"protocol": "udp", "field": "dport"}}, "right": ports}});
    let port = udp(json!(settings.tunnel_port));
    let mark = |op: &str, right: Value| json!({"match": {"op": op, "left": {"&": [{"meta": {"key": "mark"}}, mask]}, "right": right}});
    let passed = json!({"set": [value, by_cluster]});
    let unmarked = mark("!=", passed.clone());
    let local =
        json!({"match": {"op": "==", "left": {"fib": {"result": "type", "flags": ["daddr"]}}, "right": "local"}});
    let name = |key: &str, op: &str, set: &str| json!({"match": {"op": op, "left": {"meta": {"key": key}}, "right": format!("@{set}")}});
    let drop = json!({ "drop": null });
    let rule = |chain: &str, expr: Vec<Value>| object("rule", json!({"chain": chain, "expr": expr}));
    let counted = |what: &str| json!({ "counter": what });
    let end = |mut expr: Vec<Value>, what: &str| {
        expr.extend([counted(what), drop.clone()]);
        expr
    };

    // The tunnel's outer packets come from other nodes; what anybody here sends would forge inner sources. In the
    // forward and input hooks also after DNAT.
    let inside = name("iifname", "!=", "underlay");
    out.push(rule("prerouting", end(vec![inside.clone(), port.clone(), local], "tunnel_port")));
    out.push(rule("input", end(vec![inside.clone(), port.clone()], "tunnel_port")));
    // As `pod_egress` says for the overlay, after DNAT.
    let low: Vec<u16> = settings.overlay_ports.iter().copied().filter(|p| *p < EPHEMERAL).collect();
    let overlay = |ports: Value| vec![mark("==", passed.clone()), udp(json!({ "set": ports }))];
    if !low.is_empty() {
        out.push(rule("input", end(overlay(json!(low)), "tunnel_port")));
    }

    for (suffix, protocol) in [("4", "ip"), ("6", "ip6")] {
        let address = |field: &str, op: &str, set: &str| {
            json!({"match": {"op": op, "left": {"payload": {"protocol": protocol, "field": field}},
                "right": format!("@{set}{suffix}")}})
        };
        let to_node = address("daddr", "==", "nodes");
        out.push(rule("forward", end(vec![inside.clone(), to_node.clone(), port.clone()], "tunnel_port")));
        let all = json!(settings.overlay_ports);
        for (chain, to, ports) in [
            ("input", &to_node, &all),
            ("forward", &to_node, &all),
            ("forward", &address("daddr", "==", "cluster"), &json!(low)),
        ] {
            if ports.as_array().is_some_and(|a| !a.is_empty()) {
                let mut expr = overlay(ports.clone());
                expr.push(to.clone());
                out.push(rule(chain, end(expr, "tunnel_port")));
            }
        }
        if protocol == "ip6" {
            // Where bridged frames meet this hook (br_netfilter), neighbour discovery between pods of one bridge does
            // too. Only what was not routed has a hop limit of 255 here (RFC 4861, section 7.1).
            let is = |protocol: &str, field: &str, right: Value| json!({"match": {"op": "==", "left": {"payload": {"protocol": protocol, "field": field}}, "right": right}});
            let types = json!({"set": ["nd-neighbor-solicit", "nd-neighbor-advert"]});
            let expr = vec![is("icmpv6", "type", types), is("ip6", "hoplimit", json!(255)), json!({"accept": null})];
            out.push(rule("forward", expr));
        }
        // What passed because it goes to the cluster must still go there after DNAT: behind a service's address may
        // be one outside.
        let elsewhere =
            vec![mark("==", json!(by_cluster)), address("daddr", "!=", "cluster"), address("daddr", "!=", "nodes")];
        out.push(rule("forward", end(elsewhere, "translated")));
        if let Some((lo, hi)) = desired.node_ports {
            let expr = vec![
                mark("==", json!(by_cluster)),
                to_node,
                json!({"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": {"set": ["tcp", "udp"]}}}),
                json!({"match": {"op": "==", "left": {"payload": {"protocol": "th", "field": "dport"}},
                    "right": {"range": [lo, hi]}}}),
            ];
            out.push(rule("forward", end(expr, "translated")));
        }
        out.push(rule("forward", end(vec![address("saddr", "==", "isolated"), unmarked.clone()], "isolated")));
        if desired.drop_unknown {
            let expr = vec![
                name("iifname", "!=", "foreign"),
                name("oifname", "==", "uplinks"),
                address("saddr", "!=", "pods"),
                unmarked.clone(),
            ];
            out.push(rule("forward", end(expr, "unknown")));
            // A pod's source on another way than the pod's: a second interface, or a stranger that takes it.
            let way = json!({"concat": [
                {"payload": {"protocol": protocol, "field": "saddr"}}, {"meta": {"key": "iifname"}},
            ]});
            let elsewhere = json!({"match": {"op": "!=", "left": way, "right": format!("@places{suffix}")}});
            let expr = vec![
                name("iifname", "!=", "foreign"),
                name("oifname", "==", "uplinks"),
                address("saddr", "==", "placed"),
                elsewhere,
                unmarked.clone(),
            ];
            out.push(rule("forward", end(expr, "unknown")));
        }
    }
    // Else two conntrack entries per flow and node. Port ranges of other UDP services that use the port as a source
    // are not touched: both directions of the tunnel have it as destination.
    for chain in ["prerouting", "output"] {
        out.push(rule(chain, vec![port.clone(), json!({ "notrack": null })]));
    }

    for (set, addresses) in [("isolated", &desired.isolated), ("pods", &desired.pods), ("nodes", &desired.nodes)] {
        change(&mut out, "add", set, addresses.iter().copied().collect());
    }
    place(&mut out, "add", &desired.places.iter().map(|(ip, device)| (*ip, device.clone())).collect::<Vec<_>>());
    // Interval sets refuse overlaps.
    let cluster = IpNet::aggregate(&desired.cluster);
    for (suffix, v4) in [("4", true), ("6", false)] {
        let nets: Vec<Value> = cluster
            .iter()
            .filter(|n| n.addr().is_ipv4() == v4)
            .map(|n| json!({"prefix": {"addr": n.network(), "len": n.prefix_len()}}))
            .collect();
        if !nets.is_empty() {
            out.push(object("element", json!({"name": format!("cluster{suffix}"), "elem": nets})));
        }
    }
    for (set, names) in [("uplinks", &desired.uplinks), ("underlay", &desired.underlay), ("foreign", &desired.foreign)]
    {
        if !names.is_empty() {
            out.push(object("element", json!({"name": set, "elem": names})));
        }
    }
    out
}

#[derive(Debug, Default)]
struct Wish {
    desired: Option<Desired>,
    fresh: bool,
    /// Whether the kernel has taken some of it.
    held: bool,
    /// Whom the kernel may take for isolated: by what it has taken, and by what was wished since.
    isolated: BTreeSet<IpAddr>,
    stop: bool,
}

impl Wish {
    fn set(&mut self, desired: Desired) {
        self.isolated.extend(&desired.isolated);
        self.desired = Some(desired);
        self.fresh = true;
    }

    /// The kernel has taken this one.
    fn taken(&mut self, desired: Desired) {
        self.held = true;
        self.isolated = desired.isolated;
        self.isolated.extend(self.desired.iter().flat_map(|d| &d.isolated));
    }
}

/// Keeps the table as desired, on a thread of its own in the namespace of the thread that starts it.
/// When it is dropped the thread ends and the table stays.
#[derive(Debug)]
pub struct Keeper {
    wish: Arc<(Mutex<Wish>, Condvar)>,
}

impl Keeper {
    /// Starts the thread, which compares the table with what was written at least so often.
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn start(settings: Settings, check: Duration) -> std::io::Result<Self> {
        let wish = Arc::new((Mutex::new(Wish::default()), Condvar::new()));
        let theirs = Arc::clone(&wish);
        std::thread::Builder::new().name("guard".into()).spawn(move || keep(&theirs, Table::new(settings), check))?;
        Ok(Self { wish })
    }

    /// Says what the table should be. Never waits; the latest wish counts.
    pub fn set(&self, desired: Desired) {
        let (wish, changed) = &*self.wish;
        let mut wish = wish.lock();
        if wish.desired.as_ref() != Some(&desired) {
            wish.set(desired);
            changed.notify_one();
        }
    }

    /// Addresses whose packets the kernel may drop as an isolated pod's, now or once it has what was asked for. Nothing is
    /// known before it has taken something.
    pub fn isolated(&self) -> Option<BTreeSet<IpAddr>> {
        let wish = self.wish.0.lock();
        wish.held.then(|| wish.isolated.clone())
    }

    /// Whether the kernel holds a table that was asked for: before that, a pod without a program is not held back.
    pub fn holds(&self) -> bool {
        self.wish.0.lock().held
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let (wish, changed) = &*self.wish;
        wish.lock().stop = true;
        changed.notify_one();
    }
}

fn keep(shared: &(Mutex<Wish>, Condvar), mut table: Table, check: Duration) {
    let (wish, changed) = shared;
    let up = metrics::gauge!(crate::events::GUARD_OK);
    let mut wait = check;
    loop {
        let until = Instant::now() + wait;
        {
            let mut wish = wish.lock();
            while !wish.stop && !wish.fresh && !changed.wait_until(&mut wish, until).timed_out() {}
            if wish.stop {
                return;
            }
        }
        std::thread::sleep(DEBOUNCE);
        let (desired, fresh) = {
            let mut wish = wish.lock();
            (wish.desired.clone(), std::mem::take(&mut wish.fresh))
        };
        let Some(desired) = desired else { continue };
        // After a failure the table may hold nothing that was asked for.
        let outcome = if fresh || !table.is_written() { table.apply(&desired) } else { table.check() };
        if matches!(outcome, Ok(Done::Repaired)) {
            crate::events::repaired("table", 1);
        }
        match outcome {
            Ok(_) => {
                up.set(1.0);
                wish.lock().taken(desired);
                wait = check;
                for (rule, packets) in &table.listing.counters {
                    metrics::counter!(crate::events::GUARD_PACKETS, "rule" => rule.clone()).absolute(*packets);
                }
            }
            Err(e) => {
                tracing::warn!(error = %e, "the nftables guard could not be written; trying again");
                up.set(0.0);
                wait = RETRY;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_transaction_replaces_our_table_and_names_no_other() {
        let settings = Settings { tunnel_port: 8475, mark: Mark::default(), overlay_ports: [8472].into() };
        let commands = ruleset(&settings, &Desired { drop_unknown: true, ..Desired::default() });
        for c in &commands {
            let body = c.as_object().unwrap().values().next().unwrap().as_object().unwrap().values().next().unwrap();
            assert_eq!(body["family"], FAMILY);
            assert_eq!(body.get("table").unwrap_or(&body["name"]), TABLE);
        }
        assert!(commands[1].pointer("/delete/table").is_some());
        assert_eq!(commands.iter().filter(|c| c.get("delete").is_some()).count(), 1);
    }

    #[test]
    fn what_could_not_be_written_is_written_the_next_time() {
        let settings = Settings { tunnel_port: 8475, mark: Mark::default(), overlay_ports: [8472].into() };
        // No device has such a name: nft refuses it, if there is an nft that may write at all.
        let old = Desired { uplinks: vec!["x".repeat(99)], ..Desired::default() };
        let mut table = Table { settings, written: Some(old.clone()), listing: Listing::default() };
        assert_eq!(table.apply(&old).unwrap(), Done::Unchanged);
        assert!(table.is_written());
        let isolated = BTreeSet::from([IpAddr::from([10, 0, 0, 1])]);
        assert!(table.apply(&Desired { isolated, ..old }).is_err());
        assert!(!table.is_written());
    }

    #[test]
    fn an_address_is_isolated_until_the_kernel_has_heard_otherwise() {
        let ip = |last: u8| IpAddr::from([10, 0, 0, last]);
        let of = |last: &[u8]| Desired { isolated: last.iter().map(|l| ip(*l)).collect(), ..Desired::default() };
        let mut wish = Wish::default();
        wish.set(of(&[1]));
        wish.set(of(&[2]));
        assert_eq!(wish.isolated, [ip(1), ip(2)].into(), "one of them may be on its way");
        wish.taken(of(&[1]));
        assert_eq!(wish.isolated, [ip(1), ip(2)].into());
        wish.taken(of(&[2]));
        assert_eq!(wish.isolated, [ip(2)].into());
        wish.set(of(&[]));
        assert_eq!(wish.isolated, [ip(2)].into());
        wish.taken(of(&[]));
        assert_eq!(wish.isolated, [].into());
    }

    #[test]
    fn unknown_pods_are_dropped_only_when_armed() {
        let settings = Settings { tunnel_port: 8475, mark: Mark::default(), overlay_ports: [8472].into() };
        let text = |drop_unknown| {
            let d = Desired { drop_unknown, ..Desired::default() };
            serde_json::to_string(&ruleset(&settings, &d)).unwrap()
        };
        assert!(!text(false).contains(r#""counter":"unknown""#));
        assert!(text(true).contains(r#""counter":"unknown""#));
    }
}
