//! Tidegate's own servers as processes of their own: the DNS service and the TLS relay as the gateway
//! runs them, over compiled policy and a real ledger. What a cluster adds is played: the node confirms
//! every fact at once, and events are dropped where the gateway would write them to the audit file.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use arc_swap::ArcSwap;
use metrics_exporter_prometheus::PrometheusBuilder;
use parking_lot::Mutex;
use tidegate_dns::{DnsConfig, Protocol, ResolverGroup};
use tidegate_dns_core::{AddressDecision, Allow, AskMode, Asker, BindRequest, Binder, Denial, NameDecision, View};
use tidegate_ledger::{Answer, Bindings, Bound, Classify, Input, Ledger, NodeId, Output, OwnerId};
use tidegate_policy::event::Event;
use tidegate_policy::model::{
    AddressSource, Fqdn, Namespace, Node, Objects, Pair, Pod, Policy, PolicyMode, Pool, Ports, Rule, Selector,
    UnixSeconds,
};
use tidegate_policy::world::{self, World};
use tidegate_policy::{ClassKey, Name, Proto, Reason, ScopeKey, Via};
use tidegate_sni::{Destination, Relay, RelayConfig};
use tidegate_sni_core::{Check, Client, Egress, Judgement, Sni};

use crate::arena::{self, BACKEND, EGRESS, NAMES, POD};

const NODE: NodeId = NodeId(1);
/// As the gateway: apart from the ports of the kernel's SNAT.
const RELAY_PORTS: std::ops::RangeInclusive<u16> = 32768..=60999;

/// One namespace with one pod and a policy that allows every name of the arena on port 443.
fn objects() -> Result<Objects> {
    let mut o = Objects::default();
    o.namespaces
        .insert("shop".into(), Namespace { uid: "shop".into(), pool: Some("out".into()), ..Namespace::default() });
    o.nodes.insert("n1".into(), Node { addresses: vec![IpAddr::from([192, 0, 2, 1])], ..Node::default() });
    let pod = Pod {
        node: "n1".into(),
        addresses: vec![POD.into()],
        labels: BTreeMap::new(),
        host_network: false,
        ending: false,
        mirror: false,
    };
    o.pods.insert(("shop".into(), "web".into()), pod);
    let pair = Pair { ipv4: Some(EGRESS), ipv6: None, draining: false };
    let source = AddressSource::Static { interface: None, pairs: vec![pair] };
    o.pools.insert("out".into(), Pool { allowed_namespaces: Some(Selector::default()), source, gateway_nodes: None });
    let fqdns = (0..NAMES).map(|i| Ok(Fqdn::Name(Name::parse(&arena::name(i))?))).collect::<Result<_>>()?;
    let rule = Rule { fqdns, ..Rule::new("hosts", vec![Ports { proto: Some(Proto::Tcp), lo: BACKEND, hi: BACKEND }]) };
    let policy = Policy {
        created: UnixSeconds(0),
        pod_selector: Selector::default(),
        mode: PolicyMode::Enforce,
        pool: None,
        egress: vec![rule],
        deny: Vec::new(),
    };
    o.policies.insert(("shop".into(), "hosts".into()), policy);
    Ok(o)
}

struct Classifier(Arc<World>);

impl Classify for Classifier {
    fn class(&self, scope: ScopeKey, ip: IpAddr, names: &mut dyn Iterator<Item = &Name>) -> ClassKey {
        self.0.scope(scope).map_or(ClassKey(0), |s| s.class(ip, names))
    }
}

/// Compiled policy and ledger, as the gateway's threads see them.
struct Product {
    world: Arc<World>,
    ledger: Mutex<Ledger<Classifier>>,
    bindings: Arc<Bindings>,
    epoch: Instant,
}

impl Product {
    fn new() -> Result<Arc<Self>> {
        let world = Arc::new(World::compile(&objects()?, UnixSeconds(0), None));
        let mut ledger =
            Ledger::new(tidegate_ledger::Config::default(), rand::random(), Classifier(world.clone()), Duration::ZERO);
        ledger.handle(Input::NodeReset { node: NODE }, Duration::ZERO, &mut Vec::new());
        let bindings = ledger.bindings();
        Ok(Arc::new(Self { world, ledger: Mutex::new(ledger), bindings, epoch: Instant::now() }))
    }

    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    /// Learns, and has the node confirm.
    fn learn(&self, scope: ScopeKey, name: Name, addresses: Vec<IpAddr>, ttl: Duration) -> Result<Vec<IpAddr>, Reason> {
        let answer = Answer {
            ticket: 1,
            scope,
            owner: OwnerId(1),
            node: NODE,
            name,
            addresses,
            ttl,
            min_binding: None,
            acked: false,
        };
        let mut ledger = self.ledger.lock();
        let mut out = Vec::new();
        ledger.handle(Input::Answer(answer), self.now(), &mut out);
        let pushed = out.iter().filter_map(|o| if let Output::Push { seq, .. } = o { Some(*seq) } else { None }).max();
        if let Some(seq) = pushed {
            ledger.handle(Input::Ack { node: NODE, seq }, self.now(), &mut out);
        }
        let released = out.into_iter().find_map(|o| match o {
            Output::Release { addresses, .. } => Some(Ok(addresses)),
            Output::Fail { reason, .. } => Some(Err(reason)),
            _ => None,
        });
        released.unwrap_or(Err(Reason::BarrierTimeout))
    }
}

struct PolicyView {
    world: Arc<World>,
    askers: HashMap<IpAddr, Asker>,
}

impl PolicyView {
    fn new(world: &Arc<World>) -> Self {
        let member = |(ip, e): (IpAddr, &world::Endpoint)| {
            let m = e.member?;
            let asker = Asker {
                ip,
                who: e.who.clone(),
                scope: m.scope,
                group: m.group,
                group_index: m.index,
                mode: AskMode::Enforced,
                v4: true,
                v6: false,
            };
            Some((ip, asker))
        };
        Self { world: world.clone(), askers: world.endpoints().filter_map(member).collect() }
    }
}

impl View for PolicyView {
    fn generation(&self) -> u64 {
        1
    }

    fn asker(&self, client: IpAddr) -> Option<&Asker> {
        self.askers.get(&client)
    }

    fn name(&self, asker: &Asker, name: &str, qtype: u16) -> NameDecision {
        let Some(group) = self.world.group(asker.group_index) else {
            return NameDecision::Deny { denial: Denial::NoData, reason: Reason::NoBinding, rule: None };
        };
        let d = group.name(name, qtype);
        match d.answer {
            world::Answer::Bind => NameDecision::Allow(Allow {
                ech: d.facts.ech_allow,
                extra_type: d.facts.dns_types.binary_search(&qtype).is_ok(),
                wildcard: d.wildcard,
                min_binding_secs: d.facts.min_binding.map_or(0, |m| u32::try_from(m.as_secs()).unwrap_or(u32::MAX)),
                rule: d.rule,
            }),
            world::Answer::Resolve => NameDecision::Resolve { reason: d.reason, rule: d.rule },
            world::Answer::NoData => NameDecision::Deny { denial: Denial::NoData, reason: d.reason, rule: d.rule },
            world::Answer::NxDomain => NameDecision::Deny { denial: Denial::NxDomain, reason: d.reason, rule: d.rule },
        }
    }

    fn address(&self, asker: &Asker, name: &str, ip: IpAddr) -> AddressDecision {
        match self.world.group(asker.group_index).map(|g| g.address(name, ip)) {
            None => AddressDecision::Filter(Reason::NoBinding),
            Some(world::AddressDecision::Default) => AddressDecision::Default,
            Some(world::AddressDecision::Accept) => AddressDecision::Accept,
            Some(world::AddressDecision::Filter(reason)) => AddressDecision::Filter(reason),
        }
    }
}

impl Binder for Product {
    fn standing(&self, asker: &Asker, name: &str, ips: &[IpAddr], ttl_secs: u32) -> bool {
        let until = self.now() + Duration::from_secs(ttl_secs.into());
        self.bindings.answer_stands(asker.scope, name, ips, NODE, until, false)
    }

    async fn bind(&self, request: BindRequest) -> Result<Vec<IpAddr>, Reason> {
        let name = Name::parse(&request.name).map_err(|_| Reason::DnsMalformed)?;
        self.learn(request.asker.scope, name, request.ips, Duration::from_secs(request.ttl_secs.into()))
    }
}

impl Check for Product {
    fn client(&self, ip: IpAddr) -> Option<Client> {
        let e = self.world.endpoint(ip)?;
        let m = e.member?;
        Some(Client { who: e.who.clone(), scope: m.scope, group: m.group, group_index: m.index })
    }

    fn judge(&self, client: &Client, destination: SocketAddr, sni: &Sni, ech: bool) -> Judgement {
        let Sni::Name(name) = sni else { return Judgement::Deny { reason: Reason::SniMissing, rule: None } };
        let Some(group) = self.world.group_by_key(client.group) else {
            return Judgement::Deny { reason: Reason::NoBinding, rule: None };
        };
        let ip = destination.ip();
        if self.bindings.is_bound(client.scope, name.as_str(), ip, self.now()) != Bound::Bound {
            return Judgement::Deny { reason: Reason::SniMismatch, rule: None };
        }
        let to = |ip| group.connection(Some(name), ip, Proto::Tcp, BACKEND);
        let decision = to(ip);
        if !matches!(decision.via, Via::Allow(_)) || ech && !decision.ech_allow {
            return Judgement::Deny { reason: decision.reason, rule: decision.rule };
        }
        let all = self.bindings.addresses_of(client.scope, name.as_str(), self.now());
        let others = all.into_iter().filter(|a| *a != ip && to(*a).allowed()).collect();
        Judgement::Allow { name: Some(name.clone()), rule: decision.rule, others }
    }

    fn egress(&self, client: &Client, v6: bool) -> Result<Egress, Reason> {
        let pair = self.world.pair_of(client.scope).ok_or(Reason::NoGateway)?;
        let source = if v6 { pair.ipv6.map(IpAddr::from) } else { pair.ipv4.map(IpAddr::from) };
        Ok(Egress { source: Some(source.ok_or(Reason::NoEgressFamily)?), mark: 1 << 8 })
    }

    fn forbidden(&self, destination: SocketAddr) -> bool {
        let ip = destination.ip();
        ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || self.world.in_cluster(ip)
    }
}

fn drop_event(event: Event) {
    drop(std::hint::black_box(event));
}

fn install_metrics() -> Result<()> {
    PrometheusBuilder::new()
        .set_buckets(&[25e-6, 100e-6, 1e-3, 10e-3, 0.1, 1.0])
        .and_then(|b| b.install_recorder())
        .map(drop)
        .context("metrics cannot be installed")
}

/// The DNS service on `port` of all addresses, until the process is ended.
pub fn serve_dns(port: u16) -> Result<()> {
    install_metrics()?;
    let product = Product::new()?;
    let view = Arc::new(ArcSwap::from_pointee(PolicyView::new(&product.world)));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let config = DnsConfig {
        listen: vec![(std::net::Ipv6Addr::UNSPECIFIED, port).into()],
        transparent: false,
        workers: 1,
        resolvers: vec![ResolverGroup {
            servers: vec![arena::AUTHORITY],
            protocol: Protocol::Udp,
            suffixes: Vec::new(),
        }],
        ..DnsConfig::default()
    };
    let _server = tidegate_dns::Server::start(config, view, product, Arc::new(drop_event), runtime.handle().clone())?;
    runtime.block_on(std::future::pending::<()>());
    Ok(())
}

/// The relay on `port` of all addresses, until the process is ended. It connects to the address that the client wanted, on [`BACKEND`].
pub fn serve_relay(port: u16) -> Result<()> {
    install_metrics()?;
    let product = Product::new()?;
    let (_, pod) = product.world.endpoints().next().context("the pod")?;
    let scope = pod.member.context("the pod is a member")?.scope;
    for i in 0..NAMES {
        let ips = arena::addresses(i).into_iter().map(IpAddr::from).collect();
        product
            .learn(scope, Name::parse(&arena::name(i))?, ips, Duration::from_secs(3600))
            .map_err(|r| anyhow::anyhow!("{r}"))?;
    }
    let config = RelayConfig {
        listen: vec![(Ipv4Addr::UNSPECIFIED, port).into()],
        threads: 1,
        transparent: true,
        destination: Destination::Mapped(Arc::new(|_, local| SocketAddr::new(local.ip(), BACKEND))),
        ports: Some(RELAY_PORTS),
        ..RelayConfig::default()
    };
    let _relay = Relay::start(config, product, Arc::new(drop_event))?;
    loop {
        std::thread::park();
    }
}
