//! Which addresses living flows leave with, forwarded and relayed ones: by conntrack, which tracks both.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use super::netfilter::{NLA_F_NESTED, NLM_F_ACK, NLM_F_DUMP, ask, attribute, open, put};

// linux/netfilter/nfnetlink_conntrack.h, nf_conntrack_tcp.h.
const IPCTNL_MSG_CT_GET: u16 = 1 << 8 | 1;
const IPCTNL_MSG_CT_DELETE: u16 = 1 << 8 | 2;
const AF_UNSPEC: u8 = 0;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_TUPLE_IP: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTOINFO: u16 = 4;
const CTA_ID: u16 = 12;
const CTA_PROTOINFO_TCP: u16 = 1;
const CTA_PROTOINFO_TCP_STATE: u16 = 1;
/// TIME_WAIT, and after it CLOSE: nothing is sent any more.
const TIME_WAIT: u8 = 7;

/// The addresses that replies of living flows come to, in this thread's network namespace. A hundred thousand flows take some 50 ms.
///
/// # Errors
/// What the kernel refused.
pub fn addresses() -> io::Result<BTreeSet<IpAddr>> {
    let mut out = BTreeSet::new();
    ask(&open()?, IPCTNL_MSG_CT_GET, NLM_F_DUMP, AF_UNSPEC, &[], |flow| out.extend(source(flow)))?;
    Ok(out)
}

/// Flows that are forgotten at a time: a third of a second.
const MAX_FORGOTTEN: usize = 1 << 16;

/// What [`forget`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forgotten {
    /// How many flows there were.
    pub flows: usize,
    /// Whether there are none left.
    pub all: bool,
}

/// Has the kernel forget the flows whose replies come to these addresses, in this thread's network namespace; 65,536 at a time.
///
/// # Errors
/// What the kernel refused.
pub fn forget(addresses: &BTreeSet<IpAddr>) -> io::Result<Forgotten> {
    let socket = open()?;
    let (mut flows, mut all) = (Vec::new(), true);
    ask(&socket, IPCTNL_MSG_CT_GET, NLM_F_DUMP, AF_UNSPEC, &[], |flow| {
        let Some(ip) = replies(flow).filter(|ip| addresses.contains(ip)) else { return };
        let (Some(tuple), Some(id)) = (attribute(flow, CTA_TUPLE_ORIG), attribute(flow, CTA_ID)) else { return };
        if flows.len() >= MAX_FORGOTTEN {
            all = false;
            return;
        }
        let mut flow = Vec::new();
        put(&mut flow, CTA_TUPLE_ORIG | NLA_F_NESTED, tuple);
        // The same tuple may be another flow's by then.
        put(&mut flow, CTA_ID, id);
        flows.push((if ip.is_ipv4() { AF_INET } else { AF_INET6 }, flow));
    })?;
    let mut failed = None;
    for (family, flow) in &flows {
        match ask(&socket, IPCTNL_MSG_CT_DELETE, NLM_F_ACK, *family, flow, |_| {}) {
            Ok(()) => {}
            // It has ended by itself.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => failed = Some(error),
        }
    }
    failed.map_or(Ok(Forgotten { flows: flows.len(), all }), Err)
}

/// Where the other side sends to, unless the flow has ended.
fn source(flow: &[u8]) -> Option<IpAddr> {
    let tcp = attribute(flow, CTA_PROTOINFO).and_then(|p| attribute(p, CTA_PROTOINFO_TCP));
    let state = tcp.and_then(|t| attribute(t, CTA_PROTOINFO_TCP_STATE)).and_then(|s| s.first());
    if state.is_some_and(|s| *s >= TIME_WAIT) {
        return None;
    }
    replies(flow)
}

/// Where the other side sends to.
fn replies(flow: &[u8]) -> Option<IpAddr> {
    let ip = attribute(attribute(flow, CTA_TUPLE_REPLY)?, CTA_TUPLE_IP)?;
    let v4 = attribute(ip, CTA_IP_V4_DST).and_then(|a| <[u8; 4]>::try_from(a).ok()).map(IpAddr::from);
    let v6 = attribute(ip, CTA_IP_V6_DST).and_then(|a| <[u8; 16]>::try_from(a).ok()).map(IpAddr::from);
    v4.or(v6)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::process::Command;

    use super::*;
    use crate::egress::load_rules;

    #[test]
    fn flows_count_until_they_end() {
        std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
            assert_eq!(addresses().unwrap(), BTreeSet::new());
            // Something has to ask for conntrack, which tracks nothing in a namespace without rules.
            load_rules(
                "table inet t {\n chain c {\n type filter hook output priority filter\n ct state new accept\n }\n}",
            )
            .unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let to = listener.local_addr().unwrap();
            let connect = |from: [u8; 4]| {
                let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
                socket.bind(&std::net::SocketAddr::from((from, 0)).into()).unwrap();
                socket.connect(&to.into()).unwrap();
                (TcpStream::from(socket), listener.accept().unwrap().0)
            };
            let one = connect([127, 0, 0, 2]);
            let (two, mut server) = connect([127, 0, 0, 3]);
            let udp = UdpSocket::bind("[::1]:0").unwrap();
            udp.send_to(b"x", udp.local_addr().unwrap()).unwrap();
            let has = |ip: &str| addresses().unwrap().contains(&ip.parse().unwrap());
            assert!(has("127.0.0.2") && has("127.0.0.3") && has("::1") && !has("127.0.0.4"));
            // Closed from both sides: its entry is there for a while yet, and counts no more.
            drop(two);
            assert_eq!(server.read(&mut [0]).unwrap(), 0);
            drop(server);
            assert!(!has("127.0.0.3") && has("127.0.0.2"));
            // What is forgotten is of these addresses, whether it has ended or not.
            let these = |all: &[&str]| all.iter().map(|ip| ip.parse().unwrap()).collect();
            let all = |flows| Forgotten { flows, all: true };
            assert_eq!(forget(&these(&["127.0.0.3", "127.0.0.4"])).unwrap(), all(1));
            assert_eq!(forget(&these(&["127.0.0.2", "::1"])).unwrap(), all(2));
            assert_eq!(addresses().unwrap(), BTreeSet::new());
            assert_eq!(forget(&these(&["127.0.0.2", "127.0.0.3", "::1"])).unwrap(), all(0));
            drop(one);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn what_is_cut_short_is_no_flow() {
        assert_eq!(source(&[]), None);
        assert_eq!(source(&[8, 0, 2, 0, 4, 0, 1, 0]), None);
    }
}
