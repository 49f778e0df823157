//! The gateway: puts its threads together, and takes them apart on SIGTERM.
//!
//! ```text
//!  policy thread ──Compiled──▶ core thread ──▶ nodes (control runtime), own kernel maps
//!  DNS workers ──hit── view, bindings          ▲
//!      └─miss── DNS runtime ──Bind─────────────┘
//!  relay threads ── RelayCheck: world, bindings
//!  way thread ── agent's socket, namespace     admin thread ── metrics, status
//! ```

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use arc_swap::{ArcSwap, ArcSwapOption};
use tidegate_dns::{ClusterDns, ClusterServers, DnsConfig, Protocol, ResolverGroup};
use tidegate_ebpf::{Datapath, Events, Options, Role};
use tidegate_ledger::Ledger;
use tidegate_policy::event::Emit;
use tidegate_policy::model::Objects;
use tidegate_policy::world::World;
use tidegate_sni::{Relay, RelayConfig};
use tokio::signal::unix::{SignalKind, signal};

use crate::admin::{Admin, Readiness};
use crate::api::Api;
use crate::cluster::ClusterNames;
use crate::config::{self, Config};
use crate::core::{Classifier, Core, Shared, ToCore};
use crate::descriptors::{Shares, of_one};
use crate::desired::Desired;
use crate::dns_view::CoreBinder;
use crate::egress::nft::{RELAY_PORTS, REPLY};
use crate::identity::Identity;
use crate::journal::{Clocks, Journal, Recovered};
use crate::kube::Kube;
use crate::ownership::Ownership;
use crate::push::Streams;
use crate::relay_check::RelayCheck;
use crate::report::thread::Tee;
use crate::report::{Reports, Snapshot, Surveyor};
use crate::source::kubernetes::{Follower, health};
use crate::source::{Compiler, Problems, now};
use crate::starts::Starts;
use crate::way::Keeper;
use crate::{
    admin, api, audit, core, descriptors, members, nodes, peering, peers, push, report, resolv, source, telemetry,
};

/// Prints what a configuration file means.
pub fn check(path: &Path) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(&Config::load(path)?)?);
    Ok(())
}

/// Removes everything of this gateway from its network namespace but sysctls, and its kernel maps.
pub fn cleanup(path: &Path) -> Result<()> {
    let config = Config::load(path)?;
    tidegate_ebpf::remove_pins(&config.pins).context("cannot clean up")?;
    runtime()?.block_on(crate::egress::remove()).context("cannot clean up")?;
    println!("removed the kernel program, maps, rules and routes of gateway {}", config.name);
    Ok(())
}

/// The port that is DNS whatever the destination; endpoints of the cluster's DNS may add others.
const DNS_PORT: u16 = 53;
/// Where intercepted TLS arrives. Only TPROXY reaches it.
const RELAY_PORT: u16 = 15001;
/// Whether this namespace has a route out for IPv4 and IPv6. Nothing is sent.
fn families() -> (bool, bool) {
    let reaches = |from: SocketAddr, to: SocketAddr| UdpSocket::bind(from).and_then(|s| s.connect(to)).is_ok();
    // Documentation addresses (RFC 5737, RFC 3849).
    let v4 = reaches((Ipv4Addr::UNSPECIFIED, 0).into(), (Ipv4Addr::new(192, 0, 2, 1), 9).into());
    let v6 = reaches((Ipv6Addr::UNSPECIFIED, 0).into(), (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1), 9).into());
    (v4, v6)
}

/// Every port on which DNS is intercepted.
fn dns_ports(config: &Config) -> Vec<u16> {
    let mut ports: Vec<u16> = config.cluster.dns.iter().map(SocketAddr::port).chain([DNS_PORT]).collect();
    ports.sort_unstable();
    ports.dedup();
    ports
}

fn dns_config(config: &Config, shares: &Shares, servers: ClusterServers) -> DnsConfig {
    let default = DnsConfig::default();
    DnsConfig {
        listen: dns_ports(config).into_iter().map(|port| (Ipv6Addr::UNSPECIFIED, port).into()).collect(),
        transparent: true,
        mark: Some(REPLY),
        cluster: ClusterDns { servers, suffixes: config.cluster.suffixes.clone() },
        resolvers: config
            .resolvers
            .iter()
            .map(|r| ResolverGroup {
                servers: r.servers.clone(),
                protocol: match r.protocol {
                    config::ResolverProtocol::Udp => Protocol::Udp,
                    config::ResolverProtocol::Tcp => Protocol::Tcp,
                },
                suffixes: r.suffixes.clone(),
            })
            .collect(),
        ttl_max_seconds: u32::try_from(config.dns.ttl_max_seconds).unwrap_or(u32::MAX),
        addresses_per_name: config.quotas.addresses_per_name.clamp(1, 64),
        in_flight_per_namespace: config.quotas.queries_in_flight.min(of_one(shares.queries)),
        in_flight: default.in_flight.min(shares.queries),
        connections_per_namespace: default.connections_per_namespace.min(of_one(shares.dns_connections)),
        connections: default.connections.min(shares.dns_connections),
        ..default
    }
}

fn ledger_config(config: &Config) -> tidegate_ledger::Config {
    let bound = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    tidegate_ledger::Config {
        ttl_min: Duration::from_secs(config.dns.ttl_min_seconds),
        ttl_max: Duration::from_secs(config.dns.ttl_max_seconds),
        grace: Duration::from_secs(config.dns.grace_seconds),
        barrier: Duration::from_millis(config.dns.barrier_millis),
        quotas: tidegate_ledger::Quotas {
            facts: bound(config.quotas.facts),
            names: bound(config.quotas.names),
            addresses_per_name: bound(config.quotas.addresses_per_name),
        },
        track: true,
        ..tidegate_ledger::Config::default()
    }
}

/// Drops and first packets of forwarded flows, as the kernel program saw them.
async fn kernel_events(
    mut events: Events,
    shared: Arc<Shared>,
    emit: Arc<dyn Emit>,
    mut ended: tokio::sync::oneshot::Receiver<()>,
) {
    loop {
        tokio::select! {
            _ = &mut ended => return,
            event = events.next() => match event {
                Ok(e) => {
                    let who = shared.world.load().endpoint(e.source.ip()).map(|p| p.who.clone());
                    emit.emit(e.into_event(who));
                }
                Err(error) => {
                    tracing::error!(%error, "the kernel's events cannot be read; trying again");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }
}

fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new().name(name.into()).spawn(body).with_context(|| format!("cannot start the {name} thread"))
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot make a runtime")
}

/// Runs a gateway until SIGTERM or SIGINT.
pub fn run(path: &Path) -> Result<()> {
    let mut config = Config::load(path)?;
    if config.resolvers.is_empty() {
        let servers = resolv::read(Path::new("/etc/resolv.conf"))?;
        config.resolvers.push(config::Resolver { servers, ..config::Resolver::default() });
    }
    let config = Arc::new(config);
    telemetry::logs()?;
    let effective = serde_json::to_value(&*config)?;
    tracing::info!(config = %effective, version = env!("CARGO_PKG_VERSION"), "effective configuration");
    tidegate_ebpf::preflight().map_err(|e| anyhow!("{e}"))?;
    let metrics = telemetry::install_metrics()?;
    let kube = config.kubernetes.as_ref().map(|k| Kube::start(&config, k, runtime()?)).transpose()?;
    let followed = kube.as_ref().zip(config.kubernetes.as_ref()).map(|(kube, k)| kube.watch(k));
    let (changes, watched) = followed.unzip();
    let readiness = Readiness::default();
    let starting = readiness.guard("start");
    let (teller, nodes) = nodes::channel();
    let Identity { source: identity, joins, reviews } =
        Identity::start(&config, kube.as_ref(), nodes.clone(), readiness.guard("certificate"))?;
    let snapshot: Arc<ArcSwapOption<Snapshot>> = Arc::default();
    let recent = config.api.map(|_| {
        let snapshot = snapshot.clone();
        let uid = move |namespace: &str| {
            let snapshot = snapshot.load();
            Some(snapshot.as_ref()?.survey.namespaces.get(namespace)?.annotations.uid.clone())
        };
        audit::Recent::new(uid)
    });

    let writer = Arc::new(
        audit::start(audit::Config {
            file: config.audit.file.clone(),
            gateway: Some(config.name.clone()),
            node: config.node.clone(),
            boot: audit::boot_id()?,
            recent: recent.clone(),
        })
        .context("cannot start the audit log")?,
    );
    let (post, denied) = report::thread::post();
    let emit: Arc<dyn Emit> = Arc::new(Tee { log: writer.clone(), post: post.clone() });

    let limit = descriptors::raise();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let shares = descriptors::share(limit, threads);
    let quota = config.quotas.connections.min(of_one(shares.relayed));
    if quota < config.quotas.connections {
        tracing::warn!(
            limit,
            quota,
            configured = config.quotas.connections,
            "the limit of file descriptors is too low for quotas.connections, which is lowered: raise LimitNOFILE or `ulimit -Hn`"
        );
    }

    let families = families();
    let desired = Arc::new(Desired::new(config.clone()));
    let empty = Arc::new(World::compile(&Objects::default(), now(), None));
    let names = Arc::new(ClusterNames::new(config.cluster.suffixes.clone(), config.cluster.dns.clone()));
    let shared = Arc::new(Shared::new(empty, names.clone()));
    let seeds: [u64; 4] = std::array::from_fn(|_| random());
    let ledger = Ledger::new(ledger_config(&config), seeds, Classifier(shared.clone()), shared.now());
    let bindings = ledger.bindings();
    let options = Options {
        tunnel_port: config.tunnel_port,
        capacities: config.capacities,
        ..Options::new(Role::Gateway, &config.pins)
    };
    let (to_core, rx) = core::channel();
    let stop = Arc::new(AtomicBool::new(false));
    let keeper = Keeper {
        gateway: config.name.clone(),
        socket: config.socket.clone(),
        device: config.device.clone(),
        dns_ports: dns_ports(&config),
        relay_port: RELAY_PORT,
        flow_idle_seconds: config.flow_idle_seconds,
        flows_per_scope: u32::try_from(config.quotas.connections).unwrap_or(u32::MAX),
        refused: {
            let (shared, emit) = (shared.clone(), emit.clone());
            Box::new(move |r| {
                let who = shared.world.load().endpoint(r.source).map(|p| p.who.clone());
                emit.emit(r.into_event(who));
            })
        },
        pairs: shared.pairs.subscribe(),
        applied: shared.applied.clone(),
        lost: shared.lost.clone(),
        core: to_core.clone(),
        readiness: readiness.clone(),
        full_pass: desired.full_pass(),
        stop: stop.clone(),
    };
    tidegate_agent::events::describe_repairs();
    keeper.close().context("cannot close the gateway's namespace")?;
    let mut datapath = Datapath::load(&options).context("cannot load the kernel program")?;
    let events = datapath.events().context("the kernel's events are taken already")?;

    let relay_config = RelayConfig {
        listen: vec![(Ipv4Addr::UNSPECIFIED, RELAY_PORT).into(), (Ipv6Addr::UNSPECIFIED, RELAY_PORT).into()],
        reply_mark: REPLY,
        ports: Some(RELAY_PORTS.0..=RELAY_PORTS.1),
        idle: Duration::from_secs(config.flow_idle_seconds),
        quota,
        total: shares.relayed,
        dials: shares.dials,
        threads,
        pipes: shares.pipes.min(1024),
        ..RelayConfig::default()
    };
    let check = RelayCheck { shared: shared.clone(), bindings: bindings.clone(), desired: desired.clone(), families };
    let relay = Relay::start(relay_config, Arc::new(check), emit.clone()).context("cannot start the TLS relay")?;

    let (journal, recovered, journal_thread) = match &config.journal {
        None => (None, Recovered::default(), None),
        Some(folder) => {
            let (journal, recovered, thread) = Journal::open(folder, &config.name, Clocks::now)?;
            tracing::info!(facts = recovered.facts.len(), claims = recovered.claims.len(), "journal read");
            (Some(journal), recovered, Some(thread))
        }
    };
    let journal_health = journal.as_ref().map(Journal::health);
    let configured = members::configured(&config);
    let with_address = configured.iter().filter(|m| !m.addresses.is_empty());
    let mut ownership = Ownership::new(&config.name, with_address.map(|m| m.name.clone()), shared.now());
    let followed = kube.as_ref().filter(|_| configured.is_empty());
    let follows = followed.is_some();
    let (stale, is_stale) = tokio::sync::watch::channel(false);
    let (members, gateways) = tokio::sync::watch::channel((!follows).then_some(configured));
    if kube.is_some() {
        ownership = ownership.recorded(!follows);
    }
    let api = kube.as_ref().map(|kube| peering::record(kube, to_core.clone(), is_stale.clone()));
    if let Some(kube) = followed {
        peering::follow(kube, members);
    }
    ownership.recall(recovered.claims);

    let core_thread = {
        let core = Core {
            rx,
            shared: shared.clone(),
            desired: desired.clone(),
            families,
            ledger,
            datapath,
            registry: relay.registry().clone(),
            boot_id: random(),
            gateway: config.name.clone(),
            flow_idle: Duration::from_secs(config.flow_idle_seconds),
            ownership,
            api,
            journal,
            recovered: recovered.facts,
            denials: post.clone(),
            starting: Some(readiness.guard("peers")),
            readiness: readiness.clone(),
            watched: watched.clone(),
            stale,
        };
        thread("core", move || core.run())?
    };
    let (end_events, events_ended) = tokio::sync::oneshot::channel::<()>();
    let events_thread = {
        let (shared, emit) = (shared.clone(), emit.clone());
        let runtime = runtime()?;
        thread("events", move || runtime.block_on(kernel_events(events, shared, emit, events_ended)))?
    };
    let problems: Problems = Arc::default();
    let reports: Arc<ArcSwap<Reports>> = Arc::default();
    let taint = config.kubernetes.as_ref().is_some_and(|k| k.startup_taint);
    let (outlet, leading) = kube.as_ref().map(|kube| report::leading::start(kube, is_stale.clone(), taint)).unzip();
    let report_thread = {
        let reporting = report::thread::Thread {
            denied,
            shared: shared.clone(),
            snapshot: snapshot.clone(),
            bindings: bindings.clone(),
            core: to_core.clone(),
            reports: reports.clone(),
            outlet,
            stop: stop.clone(),
        };
        thread("report", move || reporting.run())?
    };
    let starts = Starts::default();
    let compiler = Compiler::new(to_core.clone(), problems.clone(), Surveyor::new(snapshot), readiness.guard("policy"));
    let policy_thread = match changes.zip(watched.clone()) {
        None => {
            let (config, stop) = (config.clone(), stop.clone());
            thread("policy", move || source::directory(&config, compiler, &stop))?
        }
        Some((changes, watched)) => {
            let names = names.clone();
            let (runtime, stop) = (runtime()?, stop.clone());
            let starts = starts.clone();
            let follower = Follower { changes, watched, names, nodes: teller, starts, compiler, runtime, stop };
            let config = config.clone();
            thread("policy", move || follower.run(&config))?
        }
    };

    let dns_runtime = runtime()?;
    let binder = CoreBinder { shared: shared.clone(), bindings, core: to_core.clone() };
    let dns = tidegate_dns::Server::start(
        dns_config(&config, &shares, names.servers.clone()),
        shared.view.clone(),
        Arc::new(binder),
        emit.clone(),
        dns_runtime.handle().clone(),
    )
    .context("cannot start the DNS service")?;
    let (end_dns, dns_ended) = tokio::sync::oneshot::channel::<()>();
    let dns_thread = thread("dns-slow", move || {
        // The service's tasks run here until the sender goes.
        let _ = dns_runtime.block_on(dns_ended);
    })?;

    let way_thread = thread("way", move || keeper.run())?;

    let status: Arc<api::Status> = {
        let (shared, problems, name) = (shared.clone(), problems, config.name.clone());
        Arc::new(move |namespace| {
            let world = shared.world.load();
            let scopes = world.scopes().values().filter(|s| namespace.is_none_or(|n| n == &**s.namespace()));
            let scopes = scopes.map(|s| {
                serde_json::json!({
                    "namespace": &**s.namespace(),
                    "pool": &**s.pool(),
                    "owned": desired.way_out(s).is_some(),
                    "ipv4": s.pair().and_then(|p| p.ipv4),
                    "ipv6": s.pair().and_then(|p| p.ipv6),
                })
            });
            let objects = report::listed(&reports.load(), namespace);
            let mut status =
                serde_json::json!({"gateway": name, "scopes": scopes.collect::<Vec<_>>(), "objects": objects});
            // The rest names other namespaces.
            if namespace.is_none() {
                let journal = journal_health.iter().flat_map(|h| h.problems());
                status["core"] = serde_json::json!(**shared.status.load());
                status["kubernetes"] = serde_json::json!(watched.as_ref().map(health));
                let own = shared.status.load();
                status["problems"] =
                    problems.load().iter().cloned().chain(own.problems.iter().cloned()).chain(journal).collect();
            }
            status
        })
    };
    let api = match (config.api, reviews, recent) {
        (Some(address), Some(reviews), Some(recent)) => {
            let (metrics, config) = (metrics.clone(), effective.clone());
            let (identity, status) = (identity.clone(), status.clone());
            Some(api::serve(address, Api { identity, reviews, metrics, config, status, recent })?)
        }
        _ => None,
    };
    let admin = match config.admin {
        None => None,
        Some(address) => {
            let status = Arc::new(move || status(None));
            let admin = Admin { metrics, readiness: readiness.clone(), config: effective, status };
            Some(admin::serve(address, admin, Duration::ZERO)?)
        }
    };

    let control = runtime()?;
    let result = control.block_on(async {
        let mut term = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
        let mut int = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let mut serve = std::pin::pin!(push::serve(
            config.control,
            identity.clone(),
            shares.handshakes,
            Streams::new(to_core.clone(), post, nodes, starts),
            joins,
            async {
                // The sender's end is the news.
                let _ = ended.await;
            }
        ));
        let (name, core, identity) = (config.name.clone(), to_core.clone(), identity.clone());
        let client =
            move |peer, addresses| peers::Client { name: name.clone(), peer, addresses, identity: identity.clone() };
        let me = config.name.clone();
        tokio::spawn(async move { peering::keep(&me, gateways, follows, core, client).await });
        drop(starting);
        tokio::select! {
            r = &mut serve => r.and_then(|()| Err(anyhow!("the control server ended"))),
            _ = term.recv() => Ok(()),
            _ = int.recv() => Ok(()),
        }?;
        let _draining = readiness.guard("draining");
        tracing::info!(seconds = config.drain_seconds, "draining");
        if let Some(leading) = leading {
            // Beside everything else: nothing waits for it.
            tokio::spawn(leading.release());
        }
        let drain = Duration::from_secs(config.drain_seconds);
        let ending = async {
            // Other gateways first take over what this one holds. Where there is none, what lives has its time to end.
            let (reply, left) = tokio::sync::oneshot::channel();
            if to_core.send(ToCore::Leave { reply }).is_ok() {
                // An error says that the core has ended, and holds nothing.
                let _ = left.await;
            }
            relay.drain(drain).await
        };
        // Nodes stay connected while connections end: their facts must not go stale under them.
        let (reset, served) = tokio::select! {
            reset = ending => (reset, false),
            _ = &mut serve => (0, true),
        };
        tracing::info!(reset, "relay drained");
        dns.drain(Duration::from_secs(1)).await;
        drop(end);
        // Streams live as long as nodes hold them: they are not waited for.
        if !served {
            let _ = tokio::time::timeout(Duration::from_millis(200), serve).await;
        }
        Ok(())
    });
    // Held addresses go with the handover's connection, kernel maps and rules stay: what is forwarded goes on.
    stop.store(true, Ordering::Relaxed);
    // The way out looks at `stop` when it is told of pairs.
    shared.pairs.send_modify(|_| {});
    let _ = to_core.send(ToCore::Stop);
    drop((end_dns, end_events));
    for t in [way_thread, policy_thread, report_thread, core_thread, dns_thread, events_thread]
        .into_iter()
        .chain(journal_thread)
    {
        if t.join().is_err() {
            tracing::error!("a thread has panicked");
        }
    }
    drop((admin, api, kube));
    writer.stop();
    result
}

/// A random number from the kernel, by way of the standard library's hash keys.
fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    RandomState::new().build_hasher().finish()
}
