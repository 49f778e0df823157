//! What must hold when much comes at once, and is measured: bursts of fresh names, floods of one tenant, addresses that
//! are dead.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod burst;
mod clients;
mod flood;
mod support;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tidegate_lab::Lab;
use tidegate_lab::scenario::{Listen, Pod};

const A: u16 = 1;
const AAAA: u16 = 28;

/// A web pod with number `n` on node-1.
fn pod(name: &str, namespace: &str, n: u8) -> Pod {
    Pod {
        name: name.into(),
        namespace: namespace.into(),
        node: "node-1".into(),
        labels: BTreeMap::from([("app".into(), "web".into())]),
        // Behind those of the demo's pods, and of its DNS.
        ipv4: Some(Ipv4Addr::new(10, 244, 1, 54 + n)),
        ipv6: Some(Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 1, n.into())),
        listen: Listen::default(),
    }
}

fn dns(lab: &Lab) -> SocketAddr {
    SocketAddr::new(lab.scenario().pod("kube-system/coredns").unwrap().ipv4.unwrap().into(), 53)
}

/// The response code and the first address of a reply without aliases.
fn parse(reply: &[u8], qtype: u16) -> Option<(u8, Option<IpAddr>)> {
    let code = reply.get(3)? & 15;
    if reply[6..8] == [0, 0] {
        return Some((code, None));
    }
    let question = 12 + reply.get(12..)?.iter().position(|b| *b == 0)? + 5;
    let data = reply.get(question + 12..)?;
    let ip = match qtype {
        A => IpAddr::from(<[u8; 4]>::try_from(data.get(..4)?).ok()?),
        _ => IpAddr::from(<[u8; 16]>::try_from(data.get(..16)?).ok()?),
    };
    Some((code, Some(ip)))
}

fn percentile(sorted: &[Duration], p: f64) -> Duration {
    sorted[((sorted.len() as f64 * p).ceil() as usize).clamp(1, sorted.len()) - 1]
}
