//! Asking resolvers: queries of Tidegate's own making, never the pod's bytes.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tidegate_dns_core::Stored;
use tidegate_dns_core::answer::{AnswerError, check, upstream_query};
use tidegate_dns_core::encrypted::is_at_or_below;
use tidegate_dns_core::serve::Route;
use tidegate_dns_core::wire::rcode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::clock::Clock;
use crate::config::{ClusterServers, DnsConfig, Protocol};
use crate::socket;

/// Why no server gave an answer.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// No resolver is configured for the name.
    #[error("no resolver is configured for this name")]
    NoResolver,
    /// A socket failed.
    #[error("the resolver cannot be reached: {0}")]
    Io(#[from] std::io::Error),
    /// The answer failed the checks.
    #[error("the resolver's answer is not used: {0}")]
    Answer(#[from] AnswerError),
    /// Out of time.
    #[error("the resolver did not answer in time")]
    Timeout,
}

struct Group {
    servers: ClusterServers,
    protocol: Protocol,
    suffixes: Vec<String>,
    /// Index of the server that answered last.
    preferred: AtomicUsize,
}

impl Group {
    fn new(servers: ClusterServers, protocol: Protocol, suffixes: &[String]) -> Self {
        Self { servers, protocol, suffixes: suffixes.to_vec(), preferred: AtomicUsize::new(0) }
    }
}

/// All configured servers.
pub struct Upstream {
    cluster: Group,
    groups: Vec<Group>,
    mark: Option<u32>,
    try_timeout: Duration,
    overall: Duration,
    ttl_max: u32,
    clock: Clock,
}

impl Upstream {
    /// Takes the servers from the configuration.
    pub fn new(config: &DnsConfig, clock: Clock) -> Self {
        Self {
            cluster: Group::new(config.cluster.servers.clone(), Protocol::Udp, &[]),
            groups: config
                .resolvers
                .iter()
                .map(|g| Group::new(ClusterServers::new(g.servers.clone()), g.protocol, &g.suffixes))
                .collect(),
            mark: config.upstream_mark,
            try_timeout: config.try_timeout,
            overall: config.overall_timeout,
            ttl_max: config.ttl_max_seconds,
            clock,
        }
    }

    fn group(&self, route: Route, name: &str) -> Option<&Group> {
        if route == Route::Cluster {
            return Some(&self.cluster);
        }
        let fit = |g: &Group| {
            if g.suffixes.is_empty() {
                return Some(0);
            }
            g.suffixes.iter().filter(|s| is_at_or_below(name, s)).map(|s| s.len()).max()
        };
        let best =
            self.groups.iter().filter_map(|g| fit(g).map(|n| (n, g))).reduce(|a, b| if b.0 > a.0 { b } else { a });
        best.map(|(_, g)| g)
    }

    /// Resolves the question `key` ([`tidegate_dns_core::wire::Query::key`]).
    pub async fn query(&self, route: Route, name: &str, key: &[u8]) -> Result<Stored, UpstreamError> {
        let group = self.group(route, name).ok_or(UpstreamError::NoResolver)?;
        let servers = group.servers.get();
        if servers.is_empty() {
            return Err(UpstreamError::NoResolver);
        }
        let mut last = UpstreamError::Timeout;
        let tries = async {
            let first = group.preferred.load(Ordering::Relaxed);
            // Each server twice, a lone one three times, as time allows.
            for i in 0..(2 * servers.len()).max(3) {
                let at = (first + i) % servers.len();
                match self.ask(servers[at], group.protocol, key).await {
                    Ok(stored) => {
                        group.preferred.store(at, Ordering::Relaxed);
                        return Ok(stored);
                    }
                    // Asking the same server again brings the same answer.
                    Err(e @ UpstreamError::Answer(_)) if servers.len() == 1 => return Err(e),
                    Err(e) => last = e,
                }
            }
            Err(UpstreamError::Timeout)
        };
        match tokio::time::timeout(self.overall, tries).await {
            Ok(Err(UpstreamError::Timeout)) | Err(_) => Err(last),
            Ok(done) => done,
        }
    }

    /// One server: without EDNS if it does not know it.
    async fn ask(&self, server: SocketAddr, protocol: Protocol, key: &[u8]) -> Result<Stored, UpstreamError> {
        match self.ask_with(server, protocol, key, true).await {
            Err(UpstreamError::Answer(AnswerError::Code(rcode::FORMERR | rcode::NOTIMP | rcode::BADVERS))) => {
                self.ask_with(server, protocol, key, false).await
            }
            other => other,
        }
    }

    async fn ask_with(
        &self,
        server: SocketAddr,
        protocol: Protocol,
        key: &[u8],
        edns: bool,
    ) -> Result<Stored, UpstreamError> {
        if protocol == Protocol::Udp {
            match self.timed(self.ask_udp(server, key, edns)).await {
                Err(UpstreamError::Answer(AnswerError::Mismatch | AnswerError::Truncated)) => {}
                other => return other,
            }
        }
        self.timed(self.ask_tcp(server, key, edns)).await
    }

    async fn timed<F: Future<Output = Result<Stored, UpstreamError>>>(&self, f: F) -> Result<Stored, UpstreamError> {
        tokio::time::timeout(self.try_timeout, f).await.unwrap_or(Err(UpstreamError::Timeout))
    }

    async fn ask_udp(&self, server: SocketAddr, key: &[u8], edns: bool) -> Result<Stored, UpstreamError> {
        let query = upstream_query(key, rand::random(), &rand::random(), edns);
        let socket = socket::upstream_udp(server, self.mark)?;
        socket.send(&query).await?;
        let mut buffer = vec![0; 4096];
        let n = socket.recv(&mut buffer).await?;
        // One answer is looked at: a forged one leads to TCP, not to a second guess.
        Ok(check(&query, &buffer[..n], true, self.clock.now(), self.ttl_max)?)
    }

    async fn ask_tcp(&self, server: SocketAddr, key: &[u8], edns: bool) -> Result<Stored, UpstreamError> {
        let query = upstream_query(key, rand::random(), &rand::random(), edns);
        let mut stream = socket::upstream_tcp(server, self.mark).await?;
        let mut framed = (query.len() as u16).to_be_bytes().to_vec();
        framed.extend_from_slice(&query);
        stream.write_all(&framed).await?;
        let len = usize::from(stream.read_u16().await?);
        let mut answer = vec![0; len];
        stream.read_exact(&mut answer).await?;
        Ok(check(&query, &answer, false, self.clock.now(), self.ttl_max)?)
    }
}
