//! A DNS server that lies: what it does is chosen by the first label of the name.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use tidegate_random::noise;

use crate::netns;

/// The lies by which a resolver must fail. Each speaks of an address of its own, see [`address`].
pub const FATAL: &[&str] = &[
    "id",
    "question",
    "foreign",
    "class",
    "twofold",
    "broken",
    "loop",
    "long",
    "flood",
    "cut",
    "truncated",
    "noise",
    "short",
    "beyond",
    "pointer",
    "size",
    "code",
    "silent",
    "late",
    "drip",
    "half",
];
/// The lies about a time to live: the answer is used, and must not live on.
pub const BRIEF: &[&str] = &["ttl31", "ttl0"];

/// Addresses that no public name may lead to: of the cluster, of nobody, of the link, of metadata services.
pub const FORBIDDEN: &[[u8; 4]] = &[
    [0, 0, 0, 0],
    [10, 96, 0, 10],
    [10, 244, 1, 53],
    [100, 64, 0, 1],
    [127, 0, 0, 1],
    [169, 254, 1, 1],
    [169, 254, 169, 254],
    [192, 168, 1, 1],
    [224, 0, 0, 1],
    [255, 255, 255, 255],
];
/// The address in the second answer to one question.
pub const SECOND: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 198);
/// Records of an answer with many, each with an address of its own.
pub const MANY: u16 = 1000;
/// Later than any resolver's client waits.
const LATE: Duration = Duration::from_millis(2600);
/// Between two octets of an answer that drips.
const DRIP: Duration = Duration::from_millis(150);

const A: u16 = 1;
const CNAME: u16 = 5;
const IN: u16 = 1;
const TTL: u32 = 300;
/// The compressed form of the question's name.
const QUESTION: &[u8] = &[0xc0, 12];
const POLL: Duration = Duration::from_millis(50);

/// The address that a lie speaks of.
pub fn address(lie: &str) -> Ipv4Addr {
    let at = FATAL.iter().chain(BRIEF).position(|l| *l == lie).and_then(|at| u8::try_from(at).ok());
    // What is no lie has the address before those of the lies.
    Ipv4Addr::new(198, 51, 100, at.map_or(199, |at| 200u8.wrapping_add(at)))
}

/// A name on the wire.
pub fn wire(name: &str) -> Vec<u8> {
    let labels = name.split('.').filter(|l| !l.is_empty());
    let mut out: Vec<u8> = labels.flat_map(|l| std::iter::once(l.len() as u8).chain(l.bytes())).collect();
    out.push(0);
    out
}

/// A query with recursion desired (RFC 1035, section 4.1).
pub fn query(id: u16, name: &str, qtype: u16) -> Vec<u8> {
    let mut out = id.to_be_bytes().to_vec();
    out.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    out.extend(wire(name));
    out.extend(qtype.to_be_bytes());
    out.extend(IN.to_be_bytes());
    out
}

fn record(owner: &[u8], rtype: u16, class: u16, ttl: u32, data: &[u8]) -> Vec<u8> {
    let mut out = owner.to_vec();
    out.extend(rtype.to_be_bytes());
    out.extend(class.to_be_bytes());
    out.extend(ttl.to_be_bytes());
    out.extend((data.len() as u16).to_be_bytes());
    out.extend_from_slice(data);
    out
}

/// The first label of the name that is asked.
fn label(query: &[u8]) -> Option<String> {
    let label = query.get(13..13 + usize::from(*query.get(12)?))?.to_ascii_lowercase();
    String::from_utf8(label).ok()
}

/// What to send back; `None` is silence.
fn lie(query: &[u8], tcp: bool) -> Option<Vec<u8>> {
    let label = &*label(query)?;
    let name = query.get(12..)?.iter().position(|b| *b == 0)? + 1;
    let mut question = query.get(12..12 + name + 4)?.to_vec();
    let mut id = [query[0], query[1]];
    let mut flags = 0x8180u16;
    let ip = address(label).octets();
    let a = |owner: &[u8]| record(owner, A, IN, TTL, &ip);
    let alias = |owner: &[u8], to: &str| record(owner, CNAME, IN, TTL, &wire(to));
    let own = a(QUESTION);
    let mut answers = vec![own.clone()];
    match label {
        "id" => id[0] ^= 0x55,
        "question" => question[1] = question[1].wrapping_add(1),
        "foreign" => answers.push(a(&wire("api.example.com"))),
        "class" => answers = vec![record(QUESTION, A, 3, TTL, &ip)],
        "twofold" => {
            let targets = ["x.lies.example.com", "y.lies.example.com"];
            answers = targets.iter().map(|t| alias(QUESTION, t)).chain([a(&wire(targets[0]))]).collect();
        }
        "broken" => answers = vec![alias(QUESTION, "x.lies.example.com"), a(&wire("y.lies.example.com"))],
        "loop" => {
            let back = [&wire("x.lies.example.com")[..], QUESTION];
            answers = vec![alias(QUESTION, "x.lies.example.com"), record(back[0], CNAME, IN, TTL, back[1])];
        }
        "long" => {
            let step = |n: usize| format!("s{n}.lies.example.com");
            answers = vec![alias(QUESTION, &step(0))];
            answers.extend((0..20).map(|n| alias(&wire(&step(n)), &step(n + 1))));
            answers.push(a(&wire(&step(20))));
        }
        // As many records as a message over TCP can hold.
        "flood" if tcp => answers = vec![own.clone(); (65_535 - 12 - question.len()) / own.len()],
        "many" if tcp => {
            let ip = |n: u16| [[198, 52], n.to_be_bytes()].concat();
            answers = (0..MANY).map(|n| record(QUESTION, A, IN, TTL, &ip(n))).collect();
        }
        "rebind" => answers = FORBIDDEN.iter().map(|ip| record(QUESTION, A, IN, TTL, ip)).collect(),
        "mixed" => answers.extend(FORBIDDEN.iter().map(|ip| record(QUESTION, A, IN, TTL, ip))),
        // Over TCP a drip and a half are good answers: only how they come is not.
        "drip" | "half" if tcp => {}
        "flood" | "cut" | "truncated" | "many" | "drip" | "half" => {
            flags |= 0x0200;
            answers.clear();
        }
        "noise" => return Some([&query[..2], &noise(7, 300)].concat()),
        "short" => return Some(query[..5].to_vec()),
        "beyond" => {
            let mut bad = own.clone();
            let at = bad.len() - 5;
            bad[at] = 200;
            answers = vec![bad];
        }
        // The owner's pointer points at itself.
        "pointer" => {
            let at = 0xc000 | (12 + question.len()) as u16;
            answers = vec![a(&at.to_be_bytes())];
        }
        "size" => answers = vec![record(QUESTION, A, IN, TTL, &ip[..3])],
        "code" => flags |= 2,
        "silent" => return None,
        "ttl31" => answers = vec![record(QUESTION, A, IN, 1 << 31, &ip)],
        "ttl0" => answers = vec![record(QUESTION, A, IN, 0, &ip)],
        _ => {}
    }
    let mut out = id.to_vec();
    out.extend(flags.to_be_bytes());
    for count in [1, answers.len() as u16, 0, 0] {
        out.extend(count.to_be_bytes());
    }
    out.extend(question);
    out.extend(answers.concat());
    Some(out)
}

/// The server; it ends when it is dropped.
#[derive(Debug)]
pub struct Liar {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Liar {
    /// Serves port 53 of an address in a namespace, UDP and TCP.
    ///
    /// # Errors
    /// When the address cannot be bound there.
    pub fn start(namespace: &str, address: Ipv4Addr) -> Result<Self> {
        let at = SocketAddr::new(address.into(), 53);
        let sockets =
            netns::within(namespace, || Ok::<_, std::io::Error>((UdpSocket::bind(at)?, TcpListener::bind(at)?)))?;
        let (udp, tcp) = sockets.with_context(|| format!("cannot bind {at}"))?;
        udp.set_read_timeout(Some(POLL))?;
        tcp.set_nonblocking(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, ended) = (stop.clone(), stop.clone());
        let threads = vec![
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while !stopped.load(Ordering::Relaxed) {
                    let Ok((n, from)) = udp.recv_from(&mut buffer) else { continue };
                    let Some(reply) = lie(&buffer[..n], false) else { continue };
                    // A client that is gone is no matter.
                    match label(&buffer[..n]).as_deref() {
                        Some("late") => {
                            let Ok(udp) = udp.try_clone() else { continue };
                            drop(std::thread::spawn(move || {
                                std::thread::sleep(LATE);
                                let _ = udp.send_to(&reply, from);
                            }));
                        }
                        Some("twice") => {
                            let end = reply.len() - 4;
                            let _ = udp.send_to(&reply, from);
                            let _ = udp.send_to(&[&reply[..end], &SECOND.octets()].concat(), from);
                        }
                        _ => drop(udp.send_to(&reply, from)),
                    }
                }
            }),
            std::thread::spawn(move || {
                while !ended.load(Ordering::Relaxed) {
                    match tcp.accept() {
                        Ok((stream, _)) => drop(std::thread::spawn(move || answer(stream))),
                        Err(_) => std::thread::sleep(POLL),
                    }
                }
            }),
        ];
        Ok(Self { stop, threads })
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // It ends by itself within a poll.
            let _ = thread.join();
        }
    }
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut query = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut query)?;
    let Some(reply) = lie(&query, true) else { return stream.read_exact(&mut length) };
    let framed = [&(reply.len() as u16).to_be_bytes()[..], &reply].concat();
    match label(&query).as_deref() {
        // A message that is announced and never comes whole.
        Some("cut") => stream.write_all(&[&[0xff, 0xff], &query[..]].concat()),
        Some("half") => stream.write_all(&framed[..framed.len() / 2]),
        Some("drip") => framed.iter().try_for_each(|octet| {
            std::thread::sleep(DRIP);
            stream.write_all(&[*octet])
        }),
        _ => stream.write_all(&framed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lies_are_what_they_are_called() {
        let of = |l: &str, tcp| lie(&query(9, &format!("{l}.lies.example.com"), A), tcp);
        assert_eq!(of("silent", false), None);
        assert_ne!(of("id", false).unwrap()[..2], [0, 9]);
        assert_eq!(of("truncated", true).unwrap()[2] & 2, 2);
        assert!((65_500..65_536).contains(&of("flood", true).unwrap().len()));
        assert!(of("flood", false).unwrap().len() < 100);
        assert_eq!(of("many", true).unwrap().len() / 16, usize::from(MANY) + 2);
        // They lie in how they are sent.
        assert_eq!(of("half", true).map(|m| m.len()), of("drip", true).map(|m| m.len()));
        let long = of("ttl31", false).unwrap();
        assert_eq!(long[long.len() - 10..long.len() - 6], [0x80, 0, 0, 0]);
    }
}
