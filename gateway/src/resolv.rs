//! The machine's resolvers, for a gateway that is given none.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// As many as a resolver library takes (resolv.conf(5), MAXNS).
const MAX: usize = 3;
const PORT: u16 = 53;

/// Reads the servers of a resolv.conf.
///
/// # Errors
/// It cannot be read, or names none that can be asked from here; the text says what to set.
pub fn read(path: &Path) -> Result<Vec<SocketAddr>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("resolvers: none are given, and {} cannot be read", path.display()))?;
    let servers = servers(&text);
    ensure!(
        !servers.is_empty(),
        "resolvers: none are given, and {} names none but loopback and link-local ones, which a gateway does not reach",
        path.display()
    );
    Ok(servers)
}

/// The servers in order, without those that only the node itself reaches.
fn servers(text: &str) -> Vec<SocketAddr> {
    let named = |line: &str| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()?.parse::<IpAddr>().ok()).flatten()
    };
    let reachable = |ip: &IpAddr| {
        let local = match ip {
            IpAddr::V4(v4) => v4.is_link_local(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
        !ip.is_loopback() && !ip.is_unspecified() && !local
    };
    text.lines().filter_map(named).filter(reachable).take(MAX).map(|ip| (ip, PORT).into()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_come_in_order_and_local_ones_do_not() {
        let text = "# nameserver 192.0.2.1\nsearch a b\nnameserver 192.0.2.53\n nameserver\t2001:db8::53 # x\n\
            nameserver 127.0.0.53\nnameserver ::1\nnameserver fe80::1%eth0\nnameserver fe80::1\nnameserver x\nnameserver\noptions edns0\n";
        let expected: Vec<SocketAddr> = vec!["192.0.2.53:53".parse().unwrap(), "[2001:db8::53]:53".parse().unwrap()];
        assert_eq!(servers(text), expected);
        assert_eq!(servers("nameserver 1.1.1.1\n".repeat(9).as_str()).len(), MAX);
    }

    #[test]
    fn none_says_what_to_set() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        assert!(format!("{:#}", read(&path).unwrap_err()).starts_with("resolvers: none are given"));
        std::fs::write(&path, "nameserver 127.0.0.53\n").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("loopback"));
    }
}
