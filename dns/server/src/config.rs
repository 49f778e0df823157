//! What the DNS service is told.

use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tidegate_dns_core::budget::BudgetLimits;
use tidegate_dns_core::{MAX_ADDRESSES, StoreLimits};

/// How servers are asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// UDP first, TCP for what is truncated or looks forged.
    #[default]
    Udp,
    /// TCP only.
    Tcp,
}

/// Servers that are asked for some names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolverGroup {
    /// The servers, in order of preference; at least one.
    pub servers: Vec<SocketAddr>,
    /// How they are asked.
    pub protocol: Protocol,
    /// The names at or below which they are asked, canonical; empty for every
    /// name that no other group has. The longest suffix wins.
    pub suffixes: Vec<String>,
}

/// Servers that may become others while they are asked. Cheap to clone: all clones are the same.
#[derive(Clone, Debug, Default)]
pub struct ClusterServers(Arc<ArcSwap<Vec<SocketAddr>>>);

impl ClusterServers {
    /// These, in order of preference.
    pub fn new(servers: Vec<SocketAddr>) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(servers)))
    }

    /// Others, from the next query on.
    pub fn set(&self, servers: Vec<SocketAddr>) {
        if **self.0.load() != servers {
            self.0.store(Arc::new(servers));
        }
    }

    pub(crate) fn get(&self) -> Arc<Vec<SocketAddr>> {
        self.0.load_full()
    }
}

/// The cluster's own DNS.
#[derive(Clone, Debug, Default)]
pub struct ClusterDns {
    /// Its endpoints.
    pub servers: ClusterServers,
    /// Its suffixes (`cluster.local`, reverse zones): canonical, no final dot.
    pub suffixes: Vec<String>,
}

/// Configuration of the DNS service.
#[derive(Clone, Debug)]
pub struct DnsConfig {
    /// Where to listen, UDP and TCP: one set of sockets per intercepted port.
    /// `[::]` serves both families. Port 0 takes a free port (tests).
    pub listen: Vec<SocketAddr>,
    /// Whether queries come by TPROXY with foreign destinations (needs NET_ADMIN).
    pub transparent: bool,
    /// SO_MARK of replies; absent: none.
    pub mark: Option<u32>,
    /// SO_MARK of queries to resolvers; absent: none.
    pub upstream_mark: Option<u32>,
    /// UDP threads per address of `listen`; range 1 to 64.
    pub workers: usize,
    /// Receive buffer per UDP socket, in octets. The kernel's default loses bursts of a few hundred queries.
    pub receive_buffer: usize,
    /// The cluster's DNS.
    pub cluster: ClusterDns,
    /// Resolvers for everything outside.
    pub resolvers: Vec<ResolverGroup>,
    /// Longest TTL that is stored and sent, in seconds: no more than what a fact lives.
    pub ttl_max_seconds: u32,
    /// Most addresses of one answer; range 1 to 64.
    pub addresses_per_name: usize,
    /// Queries in flight per namespace.
    pub in_flight_per_namespace: usize,
    /// Queries in flight in total.
    pub in_flight: usize,
    /// TCP connections per namespace.
    pub connections_per_namespace: usize,
    /// TCP connections in total.
    pub connections: usize,
    /// Queries in flight per TCP connection.
    pub pipeline: usize,
    /// How long a TCP connection may be silent.
    pub idle: Duration,
    /// How long one server has for one try.
    pub try_timeout: Duration,
    /// How long all tries of one query have together.
    pub overall_timeout: Duration,
    /// How long a failure is remembered (RFC 9520: at least 1 s).
    pub failure_ttl: Duration,
    /// What one scope may store.
    pub store: StoreLimits,
    /// The tunnelling budget of wildcards.
    pub budget: BudgetLimits,
}

impl Default for DnsConfig {
    fn default() -> Self {
        Self {
            listen: vec![SocketAddr::from((Ipv6Addr::UNSPECIFIED, 53))],
            transparent: true,
            mark: None,
            upstream_mark: None,
            workers: std::thread::available_parallelism().map_or(1, usize::from).min(64),
            receive_buffer: 8 << 20,
            cluster: ClusterDns::default(),
            resolvers: Vec::new(),
            ttl_max_seconds: 3600,
            addresses_per_name: MAX_ADDRESSES,
            in_flight_per_namespace: 512,
            in_flight: 8192,
            connections_per_namespace: 256,
            connections: 4096,
            pipeline: 32,
            idle: Duration::from_secs(10),
            try_timeout: Duration::from_secs(2),
            overall_timeout: Duration::from_secs(5),
            failure_ttl: Duration::from_secs(2),
            store: StoreLimits::default(),
            budget: BudgetLimits::default(),
        }
    }
}
