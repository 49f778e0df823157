//! The DNS service's view of compiled policy, and its way to the ledger.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use tidegate_dns_core::{AddressDecision, Asker, BindRequest, Binder, NameDecision, View};
use tidegate_ledger::{Bindings, NodeId, OwnerId};
use tidegate_policy::shards::Shards;
use tidegate_policy::world::World;
use tidegate_policy::{Name, Reason};
use tokio::sync::oneshot;

use crate::asker;
use crate::cluster::ClusterNames;
use crate::core::{Bind, Shared, ToCore};
use crate::desired::Compiled;

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
            match asker::asker(world, ip, families) {
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
        asker::name(&self.world, asker, name, qtype)
    }

    fn address(&self, asker: &Asker, name: &str, ip: IpAddr) -> AddressDecision {
        // Egress addresses are the gateways' own, and pods may live outside the configured ranges.
        if self.egress.contains(&ip) || self.world.in_cluster(ip) {
            return AddressDecision::Filter(Reason::Rebinding);
        }
        asker::address(&self.world, asker, name, ip)
    }

    fn svcb_port(&self, asker: &Asker, name: &str, port: u16) -> bool {
        asker::svcb_port(&self.world, asker, name, port)
    }
}

/// The way to the ledger.
pub struct CoreBinder {
    /// What the core shares.
    pub shared: Arc<Shared>,
    /// The ledger's read side.
    pub bindings: Arc<Bindings>,
    /// The core.
    pub core: SyncSender<ToCore>,
}

impl Binder for CoreBinder {
    fn standing(&self, asker: &Asker, name: &str, ips: &[IpAddr], ttl_secs: u32) -> bool {
        let node = NodeId(self.shared.nodes.id(&asker.who.node));
        if self.shared.settling.has(node, asker.ip) {
            return false;
        }
        let until = self.shared.now() + Duration::from_secs(ttl_secs.into());
        let acked = self.bindings.is_steered(node) && asker::needs_ack(&self.shared.world.load(), asker, name);
        self.bindings.answer_stands(asker.scope, name, ips, node, until, acked)
    }

    async fn bind(&self, request: BindRequest) -> Result<Vec<IpAddr>, Reason> {
        let who = &request.asker.who;
        // Only names of the canonical form match a rule, and only those come here.
        let name = Name::parse(&request.name).map_err(|_| Reason::DnsMalformed)?;
        let acked = asker::needs_ack(&self.shared.world.load(), &request.asker, name.as_str());
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
