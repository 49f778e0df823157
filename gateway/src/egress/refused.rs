//! Which forwarded flows the namespace's rules refused: the rules count them by flow in sets of our table, which are
//! read here. A packet costs nothing beyond the rules, and reading empty sets takes microseconds.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tidegate_policy::Reason;
use tidegate_policy::event::{Event, Verdict, What, Who};

use super::netfilter::{self, NLA_F_NESTED, NLM_F_ACK, NLM_F_DUMP, attribute, attributes, open, put};
use super::nft::{REFUSED, RefusedSet, TABLE};

/// Packets that were refused since the last look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The pod.
    pub source: IpAddr,
    /// Where it wanted to go; unspecified where the rules had no room to say it.
    pub destination: SocketAddr,
    /// IP protocol number; 0 where the rules had no room to say it.
    pub protocol: u8,
    /// How many.
    pub packets: u64,
}

impl Refused {
    /// The event that becomes the audit record, for the endpoint `who`.
    pub fn into_event(self, who: Option<Arc<Who>>) -> Event {
        let Self { source, destination, protocol, packets } = self;
        let source = SocketAddr::new(source, 0);
        let what = What::Packet { hook: "forward", protocol, source, destination };
        Event { who, what, verdict: Verdict::Deny, reason: Reason::Quota, rule: None, count: packets }
    }
}

/// Tells `each` what was refused since the last call, in this thread's network namespace; what was told is told even if
/// reading fails later. To be called at least every few seconds, and before the rules are loaded anew: counts go with
/// their elements.
///
/// # Errors
/// What the kernel refused, such as a table that is not there.
pub fn read(mut each: impl FnMut(Refused)) -> io::Result<()> {
    let socket = open()?;
    for set in &REFUSED {
        let mut keys = Vec::new();
        // A dump of a set that changes may show an element twice, or not at all: it says only where to look.
        ask(&socket, NFT_MSG_GETSETELEM, set.name, &[], |key, packets| {
            if packets > 0 {
                keys.push(key.to_vec());
            }
        })?;
        for keys in keys.chunks(AT_ONCE) {
            let taken = ask(&socket, NFT_MSG_GETSETELEM_RESET, set.name, keys, |key, packets| {
                if packets > 0
                    && let Some(refused) = parse(set, key, packets)
                {
                    each(refused);
                }
            });
            // An element has just ended, and those behind it wait for the next call.
            taken.or_else(|e| if e.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(e) })?;
        }
    }
    Ok(())
}

/// From an element's key: the source, and with `flow` destination, protocol and port, each padded to four octets.
fn parse(set: &RefusedSet, key: &[u8], packets: u64) -> Option<Refused> {
    let ip = |bytes: &[u8]| -> Option<IpAddr> {
        if set.v6 {
            Some(<[u8; 16]>::try_from(bytes).ok()?.into())
        } else {
            Some(<[u8; 4]>::try_from(bytes).ok()?.into())
        }
    };
    let length = if set.v6 { 16 } else { 4 };
    let (source, rest) = key.split_at_checked(length)?;
    let source = ip(source)?;
    if !set.flow {
        let nowhere = if set.v6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { Ipv4Addr::UNSPECIFIED.into() };
        return Some(Refused { source, destination: SocketAddr::new(nowhere, 0), protocol: 0, packets });
    }
    let (destination, rest) = rest.split_at_checked(length)?;
    let [protocol, _, _, _, high, low, ..] = *rest else { return None };
    let destination = SocketAddr::new(ip(destination)?, u16::from_be_bytes([high, low]));
    Some(Refused { source, destination, protocol, packets })
}

// linux/netfilter/nf_tables.h.
const NFT_MSG_GETSETELEM: u16 = 10 << 8 | 13;
/// Linux 6.5. The kernel sets counters to zero as it reads them. In a dump it does so too with the element that finds no
/// room in a message any more, whose count is lost: only for elements that are named.
const NFT_MSG_GETSETELEM_RESET: u16 = 10 << 8 | 33;
/// Elements named in one request. The kernel answers each with a message, all of which must find room in the socket.
const AT_ONCE: usize = 32;
const NFPROTO_INET: u8 = 1;
const LIST_TABLE: u16 = 1;
const LIST_SET: u16 = 2;
const LIST_ELEMENTS: u16 = 3;
const LIST_ELEMENT: u16 = 1;
const ELEM_KEY: u16 = 1;
const ELEM_EXPR: u16 = 7;
const DATA_VALUE: u16 = 1;
const EXPR_NAME: u16 = 1;
const EXPR_DATA: u16 = 2;
const COUNTER_PACKETS: u16 = 2;

/// The key of an element and the packets that its counter has seen.
fn counted(element: &[u8]) -> Option<(&[u8], u64)> {
    let key = attribute(attribute(element, ELEM_KEY)?, DATA_VALUE)?;
    let expression = attribute(element, ELEM_EXPR)?;
    if attribute(expression, EXPR_NAME)? != b"counter\0" {
        return None;
    }
    let packets = attribute(attribute(expression, EXPR_DATA)?, COUNTER_PACKETS)?;
    Some((key, u64::from_be_bytes(packets.try_into().ok()?)))
}

/// Asks for these elements of a set of our table, or for all if there are none.
fn ask(socket: &OwnedFd, what: u16, set: &str, keys: &[Vec<u8>], mut each: impl FnMut(&[u8], u64)) -> io::Result<()> {
    let mut request = Vec::new();
    for (kind, text) in [(LIST_TABLE, TABLE), (LIST_SET, set)] {
        put(&mut request, kind, format!("{text}\0").as_bytes());
    }
    let mut elements = Vec::new();
    for key in keys {
        let (mut value, mut element) = (Vec::new(), Vec::new());
        put(&mut value, DATA_VALUE, key);
        put(&mut element, ELEM_KEY | NLA_F_NESTED, &value);
        put(&mut elements, LIST_ELEMENT | NLA_F_NESTED, &element);
    }
    if !keys.is_empty() {
        put(&mut request, LIST_ELEMENTS | NLA_F_NESTED, &elements);
    }
    let flags = if keys.is_empty() { NLM_F_DUMP } else { NLM_F_ACK };
    netfilter::ask(socket, what, flags, NFPROTO_INET, &request, |message| {
        let elements = attribute(message, LIST_ELEMENTS).unwrap_or_default();
        attributes(elements).filter_map(|(_, e)| counted(e)).for_each(|(key, packets)| each(key, packets));
    })
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;
    use crate::egress::load_rules;
    use crate::egress::nft::{REFUSED, Rules};

    /// Rules whose quota a test can use up on loopback: the counting chains of the real ones, reached from an output hook.
    fn rules(flows: u32) -> String {
        let text = Rules {
            device: "eth0".into(),
            mtu: 1450,
            dns_ports: vec![53],
            relay_port: 15001,
            pairs: Vec::new(),
            flows_per_scope: flows,
        }
        .render();
        let (all, end) = text.rsplit_once('}').unwrap();
        format!(
            "{all}  chain test {{ type filter hook output priority mangle; oifname \"lo\" ct state new ct mark 0 meta priority set 1:1 jump new_flow; oifname \"lo\" ct mark set 1; }}\n}}{end}"
        )
    }

    #[test]
    fn flows_beyond_the_quota_are_counted_one_by_one() {
        std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            assert!(read(drop).is_err(), "there is no table yet");
            let read = || {
                let mut news = Vec::new();
                read(|r| news.push(r)).unwrap();
                news
            };
            let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
            assert!(up.success());
            load_rules(&rules(3)).unwrap();
            assert_eq!(read(), [], "nothing was refused");
            for (from, to) in [("127.0.0.1:0", "127.0.0.1:7001"), ("[::1]:0", "[::1]:7001")] {
                let to: SocketAddr = to.parse().unwrap();
                let sockets: Vec<UdpSocket> = (0..8).map(|_| UdpSocket::bind(from).unwrap()).collect();
                // The first three are flows of the scope, in whatever family.
                let sent: Vec<bool> = sockets.iter().map(|s| s.send_to(b"x", to).is_ok()).collect();
                let refused = sent.iter().filter(|ok| !**ok).count() as u64;
                assert_eq!(refused, if to.is_ipv4() { 5 } else { 8 }, "{sent:?}");
                let told = read();
                let expected = Refused { source: to.ip(), destination: to, protocol: 17, packets: refused };
                assert_eq!(told, [expected]);
                assert_eq!(read(), [], "each packet is told once");
                assert!(sockets[7].send_to(b"y", to).is_err());
                assert_eq!(read(), [Refused { packets: 1, ..expected }]);
                // The flows that live go on.
                assert_eq!(sockets[0].send_to(b"z", to).is_ok(), to.is_ipv4());
            }
            // Each of so many that they take several messages, in whatever family.
            load_rules(&rules(0)).unwrap();
            for (from, to) in
                [("127.0.0.1:0", Ipv4Addr::LOCALHOST.into()), ("[::1]:0", IpAddr::from(Ipv6Addr::LOCALHOST))]
            {
                let socket = UdpSocket::bind(from).unwrap();
                for n in 1..=2 {
                    for port in 1..=1000 {
                        (0..n).for_each(|_| assert!(socket.send_to(b"x", (to, port)).is_err()));
                    }
                    let told = read();
                    assert_eq!(told.len(), 1000, "{to}");
                    assert!(told.iter().all(|r| r.protocol == 17 && r.packets == n), "{told:?}");
                }
            }
            // Also while elements come.
            load_rules(&rules(0)).unwrap();
            let sender = std::thread::spawn(|| {
                let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
                for port in (1..=1000).cycle().take(10_000) {
                    assert!(socket.send_to(b"x", ("127.0.0.1", port)).is_err());
                }
            });
            let mut told = 0;
            loop {
                let ended = sender.is_finished();
                told += read().iter().map(|r| r.packets).sum::<u64>();
                if ended {
                    break;
                }
            }
            sender.join().unwrap();
            assert_eq!(told, 10_000);
            // Without room for flows pods are counted, exactly.
            load_rules(&rules(0).replace("size 1024", "size 1")).unwrap();
            read();
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            for port in 1..=20 {
                assert!(socket.send_to(b"x", ("127.0.0.1", 7000 + port)).is_err());
            }
            let told = read();
            assert_eq!(told.iter().map(|r| r.packets).sum::<u64>(), 20, "{told:?}");
            let rest = told.iter().find(|r| r.protocol == 0).unwrap();
            assert_eq!((rest.source, rest.destination), ("127.0.0.1".parse().unwrap(), "0.0.0.0:0".parse().unwrap()));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn keys_that_are_too_short_are_no_flow() {
        for set in &REFUSED {
            for length in 0..if set.flow { 8 } else { 4 } {
                assert_eq!(parse(set, &vec![0; length], 1), None);
            }
        }
    }
}
