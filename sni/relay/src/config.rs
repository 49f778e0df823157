//! What a relay is told at start.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

/// Where the original destination of an accepted connection is found.
#[derive(Clone)]
pub enum Destination {
    /// It is the local address of the accepted socket (TPROXY).
    Local,
    /// This function says it, from the client's address and the local one. For relays that nothing is steered to.
    Mapped(Arc<dyn Fn(SocketAddr, SocketAddr) -> SocketAddr + Send + Sync>),
}

impl fmt::Debug for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Destination::Local => "Local",
            Destination::Mapped(_) => "Mapped",
        })
    }
}

/// What a relay is told at start.
#[derive(Clone, Debug)]
pub struct RelayConfig {
    /// Where to listen. An IPv6 address takes IPv6 only: name one of each family. Port 0 takes a
    /// free port, the same one on all threads.
    pub listen: Vec<SocketAddr>,
    /// Threads, at least 1.
    pub threads: usize,
    /// Whether listeners accept connections to addresses that are not ours (IP_TRANSPARENT; needs CAP_NET_ADMIN).
    pub transparent: bool,
    /// The mark of all packets to clients, by which they find the way back to the pod; 0 for none (needs CAP_NET_ADMIN).
    pub reply_mark: u32,
    /// Where the original destination is found.
    pub destination: Destination,
    /// Source ports of upstream connections, disjoint from those of the kernel's SNAT and within
    /// net.ipv4.ip_local_port_range, outside of which the kernel ignores them; absent for that whole range.
    pub ports: Option<RangeInclusive<u16>>,
    /// How long a client may take for its hello, and for a second one after a HelloRetryRequest.
    pub hello_timeout: Duration,
    /// How long connecting may take over all addresses.
    pub connect_timeout: Duration,
    /// How long one address has a start over the next one.
    pub race_delay: Duration,
    /// A connection that moved nothing for this long is reset (within a quarter more).
    pub idle: Duration,
    /// The most connections per namespace, those without a hello included.
    pub quota: usize,
    /// The most connections of all namespaces. Each takes two descriptors, apart from `dials`.
    pub total: usize,
    /// The most sockets, all connections together, that connect beside a connection's first one: what silent addresses
    /// take. Each is a descriptor. Beyond it a connection tries one address at a time.
    pub dials: usize,
    /// The most pipes per thread; 0 moves all bytes through the thread's buffer. A pipe takes two
    /// descriptors and, while it carries data, up to 256 KiB.
    pub pipes: usize,
}

impl Default for RelayConfig {
    /// A transparent relay that listens nowhere yet, with the limits of the published configuration.
    fn default() -> Self {
        Self {
            listen: Vec::new(),
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            transparent: true,
            reply_mark: 0,
            destination: Destination::Local,
            ports: None,
            hello_timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
            race_delay: Duration::from_millis(250),
            idle: Duration::from_secs(7200),
            quota: 8192,
            total: 65_536,
            dials: 1024,
            pipes: 1024,
        }
    }
}

/// Why a relay could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A listener could not be made.
    #[error("cannot listen on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// A thread or its runtime could not be made.
    #[error("cannot start a relay thread")]
    Thread(#[source] io::Error),
    /// The kernel would ignore `ports`.
    #[error("ports {wanted:?} are not within net.ipv4.ip_local_port_range, {kernel:?}")]
    Ports {
        /// What was asked for.
        wanted: RangeInclusive<u16>,
        /// What the network namespace gives.
        kernel: RangeInclusive<u16>,
    },
    /// `listen` is empty or `threads` is 0.
    #[error("a relay needs at least one thread and one address")]
    Nothing,
}
