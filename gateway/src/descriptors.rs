//! File descriptors: as many as the process may have, and no tenant's work takes those of another part.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Beyond this a limit is none.
const PLENTY: u64 = 1 << 20;

/// How many of each kind of work there may be, all namespaces together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    /// Queries to resolvers, each on a socket of its own.
    pub queries: usize,
    /// DNS over TCP.
    pub dns_connections: usize,
    /// Relayed connections, each with two sockets.
    pub relayed: usize,
    /// Sockets of relayed connections that connect beside their first one.
    pub dials: usize,
    /// Pipes of each relay thread.
    pub pipes: usize,
    /// Handshakes on the control port.
    pub handshakes: usize,
}

/// Raises the limit to what this process may have at most, and gives it. Service managers keep the one that holds at
/// start low for programs that use `select`.
pub fn raise() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 1024 };
    match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(error) => {
            tracing::warn!(%error, soft, hard, "cannot raise the limit of file descriptors");
            soft
        }
    }
}

/// Divides the limit among the parts, in sixteenths: two and a rest stay for nodes, peers, kernel maps, files and the admin port.
pub fn share(limit: u64, threads: usize) -> Shares {
    let unit = usize::try_from(limit.min(PLENTY) / 16).unwrap_or(usize::MAX);
    Shares {
        queries: 2 * unit,
        dns_connections: 2 * unit,
        relayed: 6 * unit / 2,
        dials: unit.min(1024),
        pipes: 2 * unit / 2 / threads.max(1),
        handshakes: unit.min(512),
    }
}

/// What one namespace may have of a kind at most: half, so that there is room for others.
pub fn of_one(all: usize) -> usize {
    (all / 2).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shares_leave_a_rest() {
        for (limit, threads) in [(256, 1), (1024, 2), (20_000, 2), (524_288, 64), (u64::MAX, 8)] {
            let s = share(limit, threads);
            let taken = s.queries + s.dns_connections + 2 * s.relayed + s.dials + 2 * s.pipes * threads + s.handshakes;
            assert!(taken as u64 <= limit.min(PLENTY) / 16 * 14, "{limit}: {s:?}");
            assert!(s.relayed > 0 && s.queries > 0);
        }
    }

    #[test]
    fn a_usual_limit_leaves_the_default_quotas_whole() {
        let s = share(524_288, 2);
        assert!(of_one(s.relayed) >= 8192 && of_one(s.queries) >= 512 && of_one(s.dns_connections) >= 256, "{s:?}");
    }
}
