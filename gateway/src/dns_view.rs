//! The DNS service's view of compiled policy, and its way to the ledger.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_channel::Sender;
use tidegate_dns_core::{AddressDecision, Allow, AskMode, Asker, BindRequest, Binder, Denial, NameDecision, View};
use tidegate_ledger::{Bindings, NodeId, OwnerId};
use tidegate_policy::shards::Shards;
use tidegate_policy::state::Touch;
use tidegate_policy::world::{self, Answer, World};
use tidegate_policy::{Name, Proto, Reason, Via};
use tokio::sync::oneshot;

use crate::cluster::ClusterNames;
use crate::core::{Bind, Shared, ToCore};
use crate::desired::{Compiled, Desired};

static GENERATION: AtomicU64 = AtomicU64::new(1);

/// An immutable view.
pub struct DnsView {
    generation: u64,
    world: Arc<World>,
    egress: Arc<BTreeSet<IpAddr>>,
    askers: Shards<IpAddr, Asker>,
    names: Arc<ClusterNames>,
    closed: bool,
}

impl DnsView {
    /// The view of a later compile. Pods of scopes that other gateways own are answered too: this gateway stands in while
    /// their owner is silent. `families` says whether the pod's own network has a way out for IPv4 and IPv6; always the
    /// same.
    pub fn next(&self, compiled: &Compiled, families: (bool, bool), names: Arc<ClusterNames>) -> Self {
        let world = &compiled.world;
        let changes = world.changes(&self.world);
        let scopes = changes.scopes.iter().filter_map(|s| world.scope(*s));
        let groups = changes.groups.iter().filter_map(|g| world.group_by_key(*g)).map(|g| g.scope());
        let namespaces: BTreeSet<&str> = scopes.chain(groups).map(|s| &**s.namespace()).collect();
        let of_namespaces = namespaces.into_iter().flat_map(|n| world.addresses_of(n));
        let mut askers = self.askers.clone();
        for ip in of_namespaces.chain(changes.endpoints.iter().copied()) {
            match asker(world, ip, families) {
                Some(asker) if askers.get(&ip) == Some(&asker) => {}
                Some(asker) => drop(askers.insert(ip, asker)),
                None => drop(askers.remove(&ip)),
            }
        }
        Self {
            generation: GENERATION.fetch_add(1, Ordering::Relaxed),
            world: world.clone(),
            egress: compiled.egress.clone(),
            askers,
            names,
            closed: false,
        }
    }

    /// The same, but answers nobody if `closed`: this gateway knows less of policy than another one.
    pub fn closed(self, closed: bool) -> Self {
        Self { closed, ..self }
    }

    /// A view that knows nobody.
    pub fn empty(world: Arc<World>) -> Self {
        let (egress, askers, names) = Default::default();
        Self { generation: 0, world, egress, askers, names, closed: false }
    }
}

fn asker(world: &World, ip: IpAddr, families: (bool, bool)) -> Option<Asker> {
    let e = world.endpoint(ip)?;
    let m = e.member?;
    let group = world.group(m.index)?;
    // A scope whose pool has no pair left has no way out.
    let pair = Desired::pair(group.scope())?;
    let (v4, v6) = match (pair.ipv4, pair.ipv6) {
        (None, None) => families,
        (v4, v6) => (v4.is_some(), v6.is_some()),
    };
    let mode = match (group.audit(), e.touch) {
        (true, _) => AskMode::Audited,
        (false, Touch::Isolated) => AskMode::Enforced,
        (false, _) => AskMode::Guarded,
    };
    // What is not isolated keeps the CNI's path, whatever the pool's families are.
    let free = mode != AskMode::Enforced;
    Some(Asker {
        ip,
        who: e.who.clone(),
        scope: m.scope,
        group: m.group,
        group_index: m.index,
        mode,
        v4: v4 || free,
        v6: v6 || free,
    })
}

impl View for DnsView {
    fn generation(&self) -> u64 {
        self.generation
    }

    fn closed(&self) -> Option<Reason> {
        self.closed.then_some(Reason::NoGateway)
    }

    fn leads_to(&self, name: &str) -> Option<Name> {
        self.names.target(name)
    }

    fn asker(&self, client: IpAddr) -> Option<&Asker> {
        self.askers.get(&client)
    }

    fn name(&self, asker: &Asker, name: &str, qtype: u16) -> NameDecision {
        let Some(group) = self.world.group(asker.group_index) else {
            return NameDecision::Deny { denial: Denial::NoData, reason: Reason::NoBinding, rule: None };
        };
        let d = group.name(name, qtype);
        let deny = |denial| NameDecision::Deny { denial, reason: d.reason, rule: d.rule.clone() };
        match d.answer {
            Answer::Bind => NameDecision::Allow(Allow {
                ech: d.facts.ech_allow,
                extra_type: d.facts.dns_types.binary_search(&qtype).is_ok(),
                wildcard: d.wildcard,
                min_binding_secs: d.facts.min_binding.map_or(0, |m| u32::try_from(m.as_secs()).unwrap_or(u32::MAX)),
                rule: d.rule,
            }),
            Answer::Resolve => NameDecision::Resolve { reason: d.reason, rule: d.rule },
            Answer::NoData => deny(Denial::NoData),
            Answer::NxDomain => deny(Denial::NxDomain),
        }
    }

    fn address(&self, asker: &Asker, name: &str, ip: IpAddr) -> AddressDecision {
        // Egress addresses are the gateways' own, and pods may live outside the configured ranges.
        if self.egress.contains(&ip) || self.world.in_cluster(ip) {
            return AddressDecision::Filter(Reason::Rebinding);
        }
        let Some(group) = self.world.group(asker.group_index) else {
            return AddressDecision::Filter(Reason::NoBinding);
        };
        match group.address(name, ip) {
            world::AddressDecision::Default => AddressDecision::Default,
            world::AddressDecision::Accept => AddressDecision::Accept,
            world::AddressDecision::Filter(reason) => AddressDecision::Filter(reason),
        }
    }

    fn svcb_port(&self, asker: &Asker, name: &str, port: u16) -> bool {
        let Some(group) = self.world.group(asker.group_index) else { return false };
        let ports = &group.name(name, 1).facts.ports;
        [Proto::Tcp, Proto::Udp].iter().any(|p| matches!(ports.get(*p, port), Some(Via::Allow(_))))
    }
}

/// Whether the asking pod's node must know the addresses of a name: it steers what an isolated pod sends to addresses that it
/// does not know, but what a guarded one sends it passes, and here some ports are denied.
pub fn needs_ack(world: &World, asker: &Asker, name: &str) -> bool {
    let denied = |g: &Arc<world::Group>| g.name(name, 1).facts.ports.ranges().iter().any(|r| r.via == Via::Deny);
    asker.mode == AskMode::Guarded && world.group_by_key(asker.group).is_some_and(denied)
}

/// The way to the ledger.
pub struct CoreBinder {
    /// What the core shares.
    pub shared: Arc<Shared>,
    /// The ledger's read side.
    pub bindings: Arc<Bindings>,
    /// The core.
    pub core: Sender<ToCore>,
}

impl Binder for CoreBinder {
    fn standing(&self, asker: &Asker, name: &str, ips: &[IpAddr], ttl_secs: u32) -> bool {
        let node = NodeId(self.shared.nodes.id(&asker.who.node));
        if self.shared.settling.has(node, asker.ip) {
            return false;
        }
        let until = self.shared.now() + Duration::from_secs(ttl_secs.into());
        let acked = self.bindings.is_steered(node) && needs_ack(&self.shared.world.load(), asker, name);
        self.bindings.answer_stands(asker.scope, name, ips, node, until, acked)
    }

    async fn bind(&self, request: BindRequest) -> Result<Vec<IpAddr>, Reason> {
        let who = &request.asker.who;
        // Only names of the canonical form match a rule, and only those come here.
        let name = Name::parse(&request.name).map_err(|_| Reason::DnsMalformed)?;
        let acked = needs_ack(&self.shared.world.load(), &request.asker, name.as_str());
        let (reply, answer) = oneshot::channel();
        let bind = Bind {
            scope: request.asker.scope,
            pod: request.asker.ip,
            node: NodeId(self.shared.nodes.id(&who.node)),
            owner: OwnerId(self.shared.namespaces.id(&who.namespace)),
            name,
            addresses: request.ips,
            ttl: Duration::from_secs(request.ttl_secs.into()),
            min_binding: (request.min_binding_secs > 0).then(|| Duration::from_secs(request.min_binding_secs.into())),
            acked,
            reply,
        };
        // A full queue is overload: fail closed, and at once.
        self.core.try_send(ToCore::Bind(Box::new(bind))).map_err(|_| Reason::Quota)?;
        answer.await.map_err(|_| Reason::BarrierTimeout)?
    }
}
