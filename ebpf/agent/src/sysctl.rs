//! Settings of a gateway's network namespace. In an ordinary pod `/proc/sys` is read-only, so the node's agent makes them
//! when a gateway is plugged in; a gateway that may write them does so itself.

use std::fs;
use std::io;
use std::path::Path;

use crate::devices::{EGRESS_SIDE_INNER, POD_SIDE_INNER};

/// One setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Its path below `/proc/sys`.
    pub key: String,
    /// Its value.
    pub value: String,
    /// Whether the kernel may not show it: the connection tracking's, until a rule has loaded that.
    pub optional: bool,
}

/// Whether the kernel has IPv6 at all: with `ipv6.disable=1` it has neither its keys nor its routes.
pub fn has_ipv6() -> bool {
    Path::new("/proc/sys/net/ipv6").exists()
}

/// What a gateway's namespace needs, in the namespace of the calling thread; `device` is the pod's own, and a flow is dead
/// after so many seconds without packets.
pub fn of_gateway(device: &str, flow_idle_seconds: u64) -> Vec<Setting> {
    let mut all: Vec<(String, &str)> = vec![
        ("net/ipv4/ip_forward".into(), "1"),
        ("net/ipv6/conf/all/forwarding".into(), "1"),
        // Answers that the stack makes by itself (resets, ICMP errors) go where the marked packet came from.
        ("net/ipv4/fwmark_reflect".into(), "1"),
        ("net/ipv6/fwmark_reflect".into(), "1"),
        // Without it, outgoing connections collapse once the ports are in TIME-WAIT.
        ("net/ipv4/tcp_tw_reuse".into(), "1"),
    ];
    for d in ["all", "default", POD_SIDE_INNER, EGRESS_SIDE_INNER, device] {
        all.push((format!("net/ipv4/conf/{d}/rp_filter"), "0"));
        all.push((format!("net/ipv4/conf/{d}/send_redirects"), "0"));
    }
    for d in ["lo", POD_SIDE_INNER, EGRESS_SIDE_INNER] {
        // Plugins of IPv4 clusters disable IPv6 in pods, and the kernel then refuses our routes.
        all.push((format!("net/ipv6/conf/{d}/disable_ipv6"), "0"));
    }
    for d in [POD_SIDE_INNER, EGRESS_SIDE_INNER] {
        all.push((format!("net/ipv6/conf/{d}/accept_ra"), "0"));
    }
    all.retain(|(key, _)| has_ipv6() || !key.starts_with("net/ipv6/"));
    let needed = all.into_iter().map(|(key, value)| Setting { key, value: value.into(), optional: false });
    let tracking = [("timeout_established", flow_idle_seconds.to_string()), ("be_liberal", "0".into())];
    let tracking = tracking.into_iter().map(|(key, value)| Setting {
        key: format!("net/netfilter/nf_conntrack_tcp_{key}"),
        value,
        optional: true,
    });
    needed.chain(tracking).collect()
}

impl Setting {
    /// Makes it so in the namespace of the calling thread, if it is not so already (a read-only `/proc/sys` is fine then).
    /// Returns whether it was not.
    ///
    /// # Errors
    /// It cannot be read or written, and is not optional; the text names it.
    pub fn apply(&self) -> io::Result<bool> {
        let path = format!("/proc/sys/{}", self.key);
        let said = |what: &str, e: io::Error| io::Error::new(e.kind(), format!("cannot {what} {path}: {e}"));
        let now = match fs::read_to_string(&path) {
            Ok(now) => now,
            Err(_) if self.optional => return Ok(false),
            Err(e) => return Err(said("read", e)),
        };
        if now.trim() == self.value {
            return Ok(false);
        }
        match fs::write(&path, &self.value) {
            Ok(()) => Ok(true),
            Err(_) if self.optional => Ok(false),
            Err(e) => Err(said(&format!("write {} to", self.value), e)),
        }
    }
}
