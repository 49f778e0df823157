//! A gateway's core without its threads: the real world, ledger, answer planning and contract, put together in the
//! order of `gateway/src/core.rs`, with queues instead of streams.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use prost::Message;
use tidegate_dns_core::answer::{check, upstream_query};
use tidegate_dns_core::serve::{Decision, Rules, decide, plan};
use tidegate_dns_core::wire::{Parsed, parse, question};
use tidegate_dns_core::{AddressDecision, Allow, AskMode, Asker, Denial, NameDecision, Scratch, View};
use tidegate_ledger::{Answer, Classify, Config, FactRecord, Input, Ledger, NodeId, Output, OwnerId};
use tidegate_policy::model::{Objects, Touched, UnixSeconds};
use tidegate_policy::state::{self, Entry, FactUpdate, NodeState, Touch};
use tidegate_policy::world::{self, NodeStateParts, World};
use tidegate_policy::{ClassKey, Name, Proto, Reason, ScopeKey, Via};
use tidegate_proto::{FactsBatch, GrantEntry, StateBatch, wire};

use crate::kernel::Kernel;
use crate::objects::{NODE_PORTS, NODES};

/// The gateway's name.
pub const NAME: &str = "gw-a";

/// The policy that the ledger classifies by, shared with the core.
#[derive(Clone)]
pub struct Shared(Arc<RwLock<Arc<World>>>);

impl Shared {
    /// The policy of now.
    pub fn world(&self) -> Arc<World> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, world: Arc<World>) -> Arc<World> {
        std::mem::replace(&mut *self.0.write().unwrap_or_else(PoisonError::into_inner), world)
    }
}

impl Classify for Shared {
    fn class(&self, scope: ScopeKey, ip: IpAddr, names: &mut dyn Iterator<Item = &Name>) -> ClassKey {
        match self.world().scope(scope) {
            Some(s) => s.class(ip, names),
            None => ClassKey(0),
        }
    }
}

/// How long the grants of a class outlive its last fact: a node may hear of that later than of its new state. Beyond
/// two seconds without facts it steers what it does not know.
const LINGER: Duration = Duration::from_secs(5);

/// Which classes facts have, or had just now.
#[derive(Default)]
struct Classes {
    of: BTreeMap<(ScopeKey, IpAddr), ClassKey>,
    left: BTreeMap<(ScopeKey, ClassKey), Duration>,
}

impl Classes {
    /// Notes a fact's class; says whether no other fact of the scope had it.
    fn note(&mut self, scope: ScopeKey, ip: IpAddr, class: Option<ClassKey>, now: Duration) -> bool {
        let has = |s: &Self, class| s.of.iter().any(|(k, c)| k.0 == scope && *c == class);
        let first = class.is_some_and(|c| !has(self, c));
        let old = match class {
            Some(c) => self.of.insert((scope, ip), c),
            None => self.of.remove(&(scope, ip)),
        };
        if let Some(old) = old.filter(|old| !has(self, *old)) {
            self.left.insert((scope, old), now);
        }
        self.left.retain(|_, at| now < *at + LINGER);
        first
    }

    fn active(&self) -> impl Iterator<Item = (ScopeKey, ClassKey)> {
        self.of.iter().map(|((s, _), c)| (*s, *c)).chain(self.left.keys().copied())
    }
}

/// What the core knows of a node.
#[derive(Default)]
struct Node {
    state: bool,
    facts: bool,
    agent: Option<u64>,
    held: NodeState,
    state_seq: u64,
    applied: u64,
    facts_seq: u64,
    state_out: VecDeque<Vec<u8>>,
    facts_out: VecDeque<Vec<u8>>,
}

/// What came of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// It was not resolved.
    Denied(Reason),
    /// It went out, and nothing is learnt from it.
    Open,
    /// These addresses are to be bound; the reply has this ticket.
    Binds(u64, Vec<IpAddr>),
}

/// What became of replies that waited, and which addresses the ledger asks about.
#[derive(Default)]
pub struct Done {
    /// Tickets with the addresses that went out.
    pub released: Vec<(u64, Vec<IpAddr>)>,
    /// Tickets that failed.
    pub failed: Vec<u64>,
    /// Addresses that have an expired fact.
    pub ask: Vec<(ScopeKey, IpAddr)>,
}

/// The gateway.
pub struct Gateway {
    shared: Shared,
    objects: Objects,
    ledger: Ledger<Shared>,
    classes: Classes,
    placed: BTreeSet<(ScopeKey, Arc<str>)>,
    nodes: BTreeMap<&'static str, Node>,
    own: NodeState,
    /// Nodes that were sent grants with facts which no message of the State stream names yet.
    unnamed: BTreeSet<&'static str>,
    boot: u64,
    /// Its own kernel.
    pub kernel: Kernel<true>,
    /// What there is to tell since it was last taken.
    pub done: Done,
    next_ticket: u64,
}

fn placed(world: &World) -> BTreeSet<(ScopeKey, Arc<str>)> {
    world.endpoints().filter_map(|(_, e)| Some((e.member?.scope, e.who.node.clone()))).collect()
}

fn node_id(name: &str) -> NodeId {
    NodeId(NODES.iter().position(|n| *n == name).unwrap_or(NODES.len()) as u32)
}

fn to_wire<M: Message>(messages: Vec<M>, out: &mut VecDeque<Vec<u8>>) {
    out.extend(messages.iter().map(Message::encode_to_vec));
}

impl Gateway {
    /// A gateway that starts with this policy, and with what a journal holds.
    pub fn start(objects: &Objects, wall: UnixSeconds, now: Duration, boot: u64, journal: Vec<FactRecord>) -> Self {
        let world = Arc::new(World::compile(objects, wall, None));
        let shared = Shared(Arc::new(RwLock::new(world.clone())));
        let mut g = Self {
            ledger: Ledger::new(Config::default(), [boot, 2, 3, 4], shared.clone(), now),
            shared,
            objects: objects.clone(),
            classes: Classes::default(),
            placed: placed(&world),
            nodes: BTreeMap::new(),
            own: NodeState::default(),
            unnamed: BTreeSet::new(),
            boot,
            kernel: Kernel::new(now),
            done: Done::default(),
            next_ticket: boot << 32,
        };
        // Before the first policy the core's own maps are empty, as after a start.
        g.apply_own();
        let known = journal.into_iter().filter(|r| world.scope(r.scope).is_some()).collect();
        g.feed(Input::Import(known), now);
        g
    }

    /// The policy.
    pub fn world(&self) -> Arc<World> {
        self.shared.world()
    }

    /// The ledger, for those who read.
    pub fn ledger(&self) -> &Ledger<Shared> {
        &self.ledger
    }

    /// When the ledger wants to be called.
    pub fn deadline(&self) -> Option<Duration> {
        self.ledger.next_deadline()
    }

    /// What a journal would hold now.
    pub fn export(&self, now: Duration) -> Vec<FactRecord> {
        let mut all = Vec::new();
        self.ledger.export(now, |r| all.push(r));
        all
    }

    /// An edit, as the core takes it: classes first, then grants and facts.
    pub fn edit(&mut self, objects: &Objects, wall: UnixSeconds, now: Duration) {
        let world = Arc::new(World::compile(objects, wall, Some((&*self.world(), Touched::ALL))));
        self.objects = objects.clone();
        let old = self.shared.set(world.clone());
        for scope in old.scopes().keys().filter(|k| world.scope(**k).is_none()) {
            self.feed(Input::ScopeGone { scope: *scope }, now);
        }
        let placed = placed(&world);
        let left: Vec<_> = self.placed.difference(&placed).cloned().collect();
        self.placed = placed;
        for (scope, node) in left {
            self.feed(Input::ScopeLeft { scope, node: node_id(&node) }, now);
        }
        for scope in world.changed_scopes(&old) {
            self.feed(Input::Reclassify { scope: Some(scope) }, now);
        }
        self.refresh();
    }

    /// The pass that comes every half a minute.
    pub fn full_pass(&mut self) {
        self.refresh();
        self.world().retain_classes(&self.live_classes().into_iter().map(|(_, c)| c).collect());
    }

    fn refresh(&mut self) {
        self.apply_own();
        let parts = self.parts();
        for node in NODES {
            self.send_state(node, &parts, false);
        }
    }

    fn apply_own(&mut self) {
        self.own = self.state(&self.parts(), None);
        self.kernel.apply(&self.own, NODES[0], &BTreeSet::new());
    }

    /// Classes that facts have, and those that the next facts will have.
    fn live_classes(&self) -> BTreeSet<(ScopeKey, ClassKey)> {
        let ahead = |s: &Arc<world::Scope>| s.single_rule_classes().map(|c| (s.key(), c)).collect::<Vec<_>>();
        self.world().scopes().values().flat_map(ahead).chain(self.classes.active()).collect()
    }

    fn parts(&self) -> NodeStateParts {
        self.world().node_state_parts(self.live_classes())
    }

    fn way_out(world: &World, scope: ScopeKey) -> Option<u8> {
        let scope = world.scope(scope)?;
        match (scope.source(), scope.pair()) {
            (tidegate_policy::model::AddressSource::PodNetwork, _) => Some(0),
            (_, Some(pair)) => pair.ipv4.map(|a| a.octets()[3]),
            (_, None) => None,
        }
    }

    /// What a machine should hold, as `gateway/src/desired.rs` says; `None`: the gateway's own kernel.
    fn state(&self, parts: &NodeStateParts, node: Option<&str>) -> NodeState {
        let world = self.world();
        let mut out = NodeState::default();
        let mut prefixes: BTreeSet<_> = self.objects.settings.cluster_prefixes.iter().copied().collect();
        prefixes.extend(self.objects.nodes.values().flat_map(|n| &n.pod_prefixes));
        out.cluster = state::Cluster {
            prefixes: prefixes.into_iter().collect(),
            node_ports: Some(NODE_PORTS),
            dns: vec![],
            ping: false,
        };
        for (name, n) in &self.objects.nodes {
            out.nodes.insert(name.clone(), state::Node { addresses: n.addresses.clone() });
        }
        out.gateways.insert(NAME.into(), state::Gateway { node: NODES[0].into() });
        let everything = node.is_none_or(|n| n == NODES[0]);
        for (ip, e) in &parts.endpoints {
            if node == Some(e.node.as_str()) || everything && e.member.is_some() {
                out.endpoints.insert(*ip, e.clone());
            }
        }
        let mut granted = BTreeSet::new();
        for (scope, key) in out.endpoints.values().filter_map(|e| e.member).collect::<BTreeSet<_>>() {
            let way = Self::way_out(&world, scope);
            if let Some(pair) = way {
                // Built by way of the contract, as fields may be added.
                let scope = wire::Scope {
                    key: scope.0.to_be_bytes().to_vec(),
                    owner: NAME.into(),
                    epoch: 1,
                    pair: pair.into(),
                    ..wire::Scope::default()
                };
                let entry = wire::Entry { kind: Some(wire::entry::Kind::Scope(scope)) };
                out.set(Entry::try_from(entry).expect("a scope is well formed"));
            }
            let Some(mut group) = parts.groups.get(&key).cloned() else { continue };
            if way.is_some() || node.is_some() {
                granted.insert(key);
            } else {
                (group.admin, group.own) = (None, None);
            }
            for set in [group.admin, group.own].into_iter().flatten() {
                if let Some(p) = parts.prefixes.get(&set) {
                    out.prefixes.insert(set, p.as_ref().clone());
                }
            }
            out.groups.insert(key, group);
        }
        let grants = parts.grants.iter().filter(|((g, _), _)| granted.contains(g));
        out.grants = grants.map(|(k, v)| (*k, v.clone())).collect();
        out
    }

    fn send_state(&mut self, node: &'static str, parts: &NodeStateParts, snapshot: bool) {
        let wanted = self.state(parts, Some(node));
        let Some(n) = self.nodes.get_mut(node).filter(|n| n.state) else { return };
        let (set, delete) = if snapshot { (wanted.entries(), Vec::new()) } else { n.held.diff(&wanted) };
        if !snapshot && set.is_empty() && delete.is_empty() {
            return;
        }
        n.state_seq += 1;
        n.held = wanted;
        let (boot_id, sequence) = (self.boot, n.state_seq);
        let batch = StateBatch { gateway: NAME.into(), boot_id, sequence, snapshot, more: false, set, delete };
        to_wire(batch.into_messages(), &mut n.state_out);
    }

    /// A node's `State` stream is up.
    pub fn state_up(&mut self, node: &'static str) {
        let n = self.nodes.entry(node).or_default();
        (n.state, n.held) = (true, NodeState::default());
        n.state_out.clear();
        let parts = self.parts();
        self.send_state(node, &parts, true);
    }

    /// It is down.
    pub fn state_down(&mut self, node: &'static str) {
        let n = self.nodes.entry(node).or_default();
        n.state = false;
        n.state_out.clear();
    }

    /// A node's `Facts` stream is up, of the agent with this boot id.
    pub fn facts_up(&mut self, node: &'static str, agent: u64, now: Duration) {
        let n = self.nodes.entry(node).or_default();
        n.facts = true;
        n.facts_out.clear();
        let same = n.agent.replace(agent) == Some(agent);
        let node = node_id(node);
        self.feed(if same { Input::NodeUp { node } } else { Input::NodeReset { node } }, now);
    }

    /// It is down.
    pub fn facts_down(&mut self, node: &'static str, now: Duration) {
        let n = self.nodes.entry(node).or_default();
        n.facts = false;
        n.facts_out.clear();
        self.feed(Input::NodeDown { node: node_id(node) }, now);
    }

    /// The next message for a node.
    pub fn next_state(&mut self, node: &str) -> Option<Vec<u8>> {
        self.nodes.get_mut(node)?.state_out.pop_front()
    }

    /// The next message for a node.
    pub fn next_facts(&mut self, node: &str) -> Option<Vec<u8>> {
        self.nodes.get_mut(node)?.facts_out.pop_front()
    }

    /// Whether messages of the `Facts` stream are on their way to a node; a heartbeat would be behind them.
    pub fn has_facts_for(&self, node: &str) -> bool {
        self.nodes.get(node).is_some_and(|n| !n.facts_out.is_empty())
    }

    /// A node holds its state up to a sequence.
    pub fn state_ack(&mut self, node: &str, boot: u64, seq: u64) {
        if let Some(n) = self.nodes.get_mut(node).filter(|n| n.state && boot == self.boot) {
            n.applied = seq;
        }
    }

    /// A node holds facts up to a sequence.
    pub fn ack(&mut self, node: &str, boot: u64, seq: u64, now: Duration) {
        if boot == self.boot {
            self.feed(Input::Ack { node: node_id(node), seq }, now);
        }
    }

    /// An address that was asked about is idle.
    pub fn idle(&mut self, scope: ScopeKey, ip: IpAddr, now: Duration) {
        self.feed(Input::Idle { scope, ip }, now);
    }

    /// Time passes.
    pub fn tick(&mut self, now: Duration) {
        self.feed(Input::Tick, now);
    }

    fn feed(&mut self, input: Input, now: Duration) {
        self.kernel.now = now;
        let mut out = Vec::new();
        self.ledger.handle(input, now, &mut out);
        let local = |o: &Output| if let Output::Local(update) = o { Some(update.clone()) } else { None };
        let updates: Vec<FactUpdate> = out.iter().filter_map(local).collect();
        self.local(&updates);
        for o in out {
            match o {
                Output::Local(_) | Output::Unbound { .. } => {}
                Output::Push { node, seq, snapshot, facts } => self.push(node, seq, snapshot, facts),
                Output::Release { ticket, addresses } => self.done.released.push((ticket, addresses)),
                Output::Fail { ticket, .. } => self.done.failed.push(ticket),
                Output::CheckIdle { scope, ip } => self.done.ask.push((scope, ip)),
            }
        }
        let unnamed = std::mem::take(&mut self.unnamed);
        if !unnamed.is_empty() {
            let parts = self.parts();
            unnamed.into_iter().for_each(|n| self.send_state(n, &parts, false));
        }
    }

    fn grants(&self, scope: ScopeKey, class: ClassKey) -> Vec<GrantEntry> {
        let world = self.world();
        let groups = world.groups_of(scope);
        groups.filter_map(|g| Some(GrantEntry { group: g.key(), class, ports: g.grant(class)? })).collect()
    }

    fn local(&mut self, updates: &[FactUpdate]) {
        let mut new = Vec::new();
        for u in updates {
            let class = u.value.map(|v| v.class);
            let first = self.classes.note(u.scope, u.ip, class, self.kernel.now);
            let Some(class) = class.filter(|_| first) else { continue };
            if Self::way_out(&self.world(), u.scope).is_some() {
                new.extend(self.grants(u.scope, class));
            }
        }
        if !new.is_empty() {
            for g in new {
                self.own.set(Entry::Grant(g.group, g.class, g.ports));
            }
            self.kernel.apply(&self.own, NODES[0], &BTreeSet::new());
        }
        self.kernel.facts(updates);
    }

    fn push(&mut self, node: NodeId, seq: u64, snapshot: bool, facts: Vec<FactUpdate>) {
        let name = NODES[node.0 as usize];
        let classes: BTreeSet<(ScopeKey, ClassKey)> =
            facts.iter().filter_map(|f| Some((f.scope, f.value.as_ref()?.class))).collect();
        let known: Vec<GrantEntry> = classes.into_iter().flat_map(|(s, c)| self.grants(s, c)).collect();
        let Some(n) = self.nodes.get_mut(name) else { return };
        // What the State stream was sent but the node has not acked yet, the ack of these facts must not rely on. What
        // goes with facts may be lost with their stream, or taken away by an older message of the State stream: that
        // names it too, next.
        let behind = !n.state || n.state_seq > n.applied;
        let mut grants = Vec::new();
        for g in known {
            let held = n.held.grants.get(&(g.group, g.class)) == Some(&g.ports);
            if !held {
                self.unnamed.insert(name);
            }
            if behind || !held {
                grants.push(g);
            }
        }
        n.facts_seq = seq;
        let batch = FactsBatch { boot_id: self.boot, sequence: seq, snapshot, more: false, grants, facts };
        if n.facts {
            to_wire(batch.into_messages(), &mut n.facts_out);
        }
    }

    /// A pod asks for the addresses of a name, and upstream answers with these, to be kept for `ttl` seconds.
    pub fn ask(&mut self, pod: IpAddr, name: &str, v6: bool, ips: &[IpAddr], ttl: u32, now: Duration) -> Asked {
        let world = self.world();
        let view = Policy(world.clone());
        let Some(asker) = asker(&world, pod) else { return Asked::Denied(Reason::UnknownPod) };
        let qtype = if v6 { 28 } else { 1 };
        let rules = Rules { cluster_suffixes: vec!["cluster.local".into()], addresses: 64 };
        let go = match decide(name, qtype, &asker, &view, &rules) {
            Decision::Deny(o) => return Asked::Denied(o.reason),
            Decision::Go(go) => go,
        };
        let mut request = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        request.extend(question(name, qtype).expect("a constant's question"));
        let Parsed::Query(query) = parse(&request) else { panic!("a well formed query is refused") };
        let sent = upstream_query(query.key(), 9, &[0; 32], false);
        let stored = check(&sent, &answer(&sent, ips, ttl), true, now.as_millis() as u64, 3600);
        let stored = stored.expect("a well formed answer is refused");
        let mut scratch = Scratch::new();
        let plan = match plan(go, &query, &stored, &asker, &view, &rules, &mut scratch) {
            Ok(plan) => plan,
            Err(o) => return Asked::Denied(o.reason),
        };
        if !plan.bind {
            return Asked::Open;
        }
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let name = Name::parse(plan.bind_name(&query, &scratch)).expect("only names bind");
        let min = Duration::from_secs(plan.min_binding_secs.into());
        let ttl = stored.ttl_or_zero(now.as_millis() as u64);
        let bound = scratch.bind.clone();
        let answer = Answer {
            ticket,
            scope: asker.scope,
            owner: OwnerId(0),
            node: node_id(&asker.who.node),
            name,
            addresses: scratch.bind,
            ttl: Duration::from_secs(ttl.into()),
            min_binding: (!min.is_zero()).then_some(min),
        };
        self.feed(Input::Answer(answer), now);
        Asked::Binds(ticket, bound)
    }
}

/// A response with one record per address.
fn answer(sent: &[u8], ips: &[IpAddr], ttl: u32) -> Vec<u8> {
    let mut m = sent.to_vec();
    m[2..4].copy_from_slice(&[0x81, 0x80]);
    m[6..8].copy_from_slice(&(ips.len() as u16).to_be_bytes());
    for ip in ips {
        m.extend_from_slice(&[0xc0, 12]);
        m.extend_from_slice(&if ip.is_ipv4() { 1u16 } else { 28 }.to_be_bytes());
        m.extend_from_slice(&[0, 1]);
        m.extend_from_slice(&ttl.to_be_bytes());
        match ip {
            IpAddr::V4(a) => {
                m.extend_from_slice(&[0, 4]);
                m.extend_from_slice(&a.octets());
            }
            IpAddr::V6(a) => {
                m.extend_from_slice(&[0, 16]);
                m.extend_from_slice(&a.octets());
            }
        }
    }
    m
}

/// The pod, as the DNS service sees it.
fn asker(world: &World, pod: IpAddr) -> Option<Asker> {
    let e = world.endpoint(pod)?;
    let m = e.member?;
    let group = world.group(m.index)?;
    Gateway::way_out(world, m.scope)?;
    let mode = match (group.audit(), e.touch) {
        (true, _) => AskMode::Audited,
        (false, Touch::Isolated) => AskMode::Enforced,
        (false, _) => AskMode::Guarded,
    };
    let (v4, v6) = group.scope().families();
    let free = mode != AskMode::Enforced;
    Some(Asker {
        ip: pod,
        who: e.who.clone(),
        scope: m.scope,
        group: m.group,
        group_index: m.index,
        mode,
        v4: v4 || free,
        v6: v6 || free,
    })
}

/// The DNS service's view of a compile.
struct Policy(Arc<World>);

impl View for Policy {
    fn generation(&self) -> u64 {
        1
    }

    fn asker(&self, _: IpAddr) -> Option<&Asker> {
        None
    }

    fn name(&self, asker: &Asker, name: &str, qtype: u16) -> NameDecision {
        let Some(group) = self.0.group(asker.group_index) else {
            return NameDecision::Deny { denial: Denial::NoData, reason: Reason::NoBinding, rule: None };
        };
        let d = group.name(name, qtype);
        let deny = |denial| NameDecision::Deny { denial, reason: d.reason, rule: d.rule.clone() };
        match d.answer {
            world::Answer::Bind => NameDecision::Allow(Allow {
                ech: d.facts.ech_allow,
                extra_type: false,
                wildcard: d.wildcard,
                min_binding_secs: d.facts.min_binding.map_or(0, |m| m.as_secs() as u32),
                rule: d.rule,
            }),
            world::Answer::Resolve => NameDecision::Resolve { reason: d.reason, rule: d.rule },
            world::Answer::NoData => deny(Denial::NoData),
            world::Answer::NxDomain => deny(Denial::NxDomain),
        }
    }

    fn address(&self, asker: &Asker, name: &str, ip: IpAddr) -> AddressDecision {
        match self.0.group(asker.group_index).map(|g| g.address(name, ip)) {
            None => AddressDecision::Filter(Reason::NoBinding),
            Some(world::AddressDecision::Default) => AddressDecision::Default,
            Some(world::AddressDecision::Accept) => AddressDecision::Accept,
            Some(world::AddressDecision::Filter(reason)) => AddressDecision::Filter(reason),
        }
    }

    fn svcb_port(&self, asker: &Asker, name: &str, port: u16) -> bool {
        let Some(group) = self.0.group(asker.group_index) else { return false };
        let ports = &group.name(name, 1).facts.ports;
        [Proto::Tcp, Proto::Udp].iter().any(|p| matches!(ports.get(*p, port), Some(Via::Allow(_))))
    }
}
