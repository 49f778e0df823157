//! A running service on loopback with a scripted policy, ledger and upstream.
#![allow(dead_code, clippy::unwrap_used, reason = "each test file uses a part; a test may fail")]

use std::collections::{HashMap, HashSet};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use arc_swap::ArcSwap;
use hickory_proto::op::Message;
use parking_lot::Mutex;
use tidegate_dns::{ClusterDns, ClusterServers, DnsConfig, Protocol, ResolverGroup, Server};
use tidegate_dns_core::{AddressDecision, AskMode, Asker, BindRequest, Binder, NameDecision, View};
use tidegate_policy::event::{Event, Who};
use tidegate_policy::{GroupKey, Reason, ScopeKey};
use tokio::runtime::Runtime;

#[path = "../../../core/tests/wiring/mod.rs"]
pub mod wiring;
use wiring::Table;

/// A server that answers by a script, UDP and TCP on one port.
pub struct Authority {
    pub address: SocketAddr,
    pub udp: Arc<AtomicUsize>,
    pub tcp: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

/// What the script is told: the query, its name in lower case, its type, and whether it came by TCP.
pub struct Asked<'a> {
    pub bytes: &'a [u8],
    pub name: String,
    pub qtype: u16,
    pub tcp: bool,
}

pub type Script = dyn Fn(&Asked<'_>) -> Option<Vec<u8>> + Send + Sync;

fn play(script: &Script, bytes: &[u8], tcp: bool) -> Option<Vec<u8>> {
    let m = Message::from_vec(bytes).ok()?;
    let q = m.queries.first()?;
    let name = q.name().to_lowercase().to_string();
    let name = name.trim_end_matches('.').to_owned();
    script(&Asked { bytes, name, qtype: q.query_type().into(), tcp })
}

impl Authority {
    pub fn start(script: impl Fn(&Asked<'_>) -> Option<Vec<u8>> + Send + Sync + 'static) -> Self {
        let script: Arc<Script> = Arc::new(script);
        let (socket, listener) = loop {
            let u = UdpSocket::bind("127.0.0.1:0").unwrap();
            if let Ok(l) = TcpListener::bind(u.local_addr().unwrap()) {
                break (u, l);
            }
        };
        let address = socket.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (udp, tcp) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        listener.set_nonblocking(true).unwrap();
        let by_udp = {
            let (stop, script, count) = (stop.clone(), script.clone(), udp.clone());
            std::thread::spawn(move || {
                let socket = Arc::new(socket);
                let mut b = [0; 4096];
                while !stop.load(Ordering::Relaxed) {
                    let Ok((n, from)) = socket.recv_from(&mut b) else {
                        continue;
                    };
                    count.fetch_add(1, Ordering::Relaxed);
                    let (bytes, script, socket) = (b[..n].to_vec(), script.clone(), socket.clone());
                    std::thread::spawn(move || {
                        if let Some(r) = play(&*script, &bytes, false) {
                            let _ = socket.send_to(&r, from);
                        }
                    });
                }
            })
        };
        let by_tcp = {
            let (stop, count) = (stop.clone(), tcp.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let Ok((mut s, _)) = listener.accept() else {
                        std::thread::sleep(Duration::from_millis(5));
                        continue;
                    };
                    count.fetch_add(1, Ordering::Relaxed);
                    s.set_nonblocking(false).unwrap();
                    s.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
                    let Some(q) = read_framed(&mut s) else { continue };
                    if let Some(r) = play(&*script, &q, true) {
                        write_framed(&mut s, &r);
                    }
                }
            })
        };
        Self { address, udp, tcp, stop, threads: vec![by_udp, by_tcp] }
    }

    pub fn asked(&self) -> usize {
        self.udp.load(Ordering::Relaxed)
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for t in self.threads.drain(..) {
            let _ = t.join();
        }
    }
}

pub fn read_framed(s: &mut TcpStream) -> Option<Vec<u8>> {
    let mut len = [0; 2];
    s.read_exact(&mut len).ok()?;
    let mut m = vec![0; usize::from(u16::from_be_bytes(len))];
    s.read_exact(&mut m).ok()?;
    Some(m)
}

pub fn write_framed(s: &mut TcpStream, m: &[u8]) {
    let mut f = (m.len() as u16).to_be_bytes().to_vec();
    f.extend(m);
    s.write_all(&f).unwrap();
}

/// A table with askers.
pub struct Policy {
    pub generation: u64,
    pub askers: HashMap<IpAddr, Asker>,
    pub table: Table,
}

impl View for Policy {
    fn generation(&self) -> u64 {
        self.generation
    }
    fn asker(&self, client: IpAddr) -> Option<&Asker> {
        self.askers.get(&client)
    }
    fn name(&self, asker: &Asker, name: &str, qtype: u16) -> NameDecision {
        self.table.name(asker, name, qtype)
    }
    fn address(&self, asker: &Asker, name: &str, ip: IpAddr) -> AddressDecision {
        self.table.address(asker, name, ip)
    }
}

/// The pod with this last octet, in a namespace and scope of its own.
pub fn pod(n: u8) -> (IpAddr, Asker) {
    let namespace = format!("ns-{n}").as_str().into();
    let who = Arc::new(Who { namespace, pod: "p".into(), node: "n1".into() });
    let (scope, group) = (ScopeKey(n.into()), GroupKey(n.into()));
    let ip = IpAddr::from([127, 0, 0, n]);
    (ip, Asker { ip, who, scope, group, group_index: 0, mode: AskMode::Enforced, v4: true, v6: true })
}

pub type OnBind = dyn Fn(&BindRequest) -> Result<Vec<IpAddr>, Reason> + Send + Sync;

/// A ledger that remembers what was bound.
#[derive(Default)]
pub struct Ledger {
    pub bound: Mutex<HashSet<(ScopeKey, String, IpAddr)>>,
    pub requests: Mutex<Vec<BindRequest>>,
    pub script: Mutex<Option<Box<OnBind>>>,
}

impl Binder for Ledger {
    fn standing(&self, asker: &Asker, name: &str, ips: &[IpAddr], _: u32) -> bool {
        let bound = self.bound.lock();
        ips.iter().all(|ip| bound.contains(&(asker.scope, name.to_owned(), *ip)))
    }

    async fn bind(&self, request: BindRequest) -> Result<Vec<IpAddr>, Reason> {
        let result = match &*self.script.lock() {
            Some(f) => f(&request),
            None => Ok(request.ips.clone()),
        };
        if let Ok(ips) = &result {
            self.bound.lock().extend(ips.iter().map(|ip| (request.asker.scope, request.name.to_string(), *ip)));
        }
        self.requests.lock().push(request);
        result
    }
}

/// Everything together.
pub struct Bench {
    pub view: Arc<ArcSwap<Policy>>,
    pub ledger: Arc<Ledger>,
    pub events: Arc<Mutex<Vec<Event>>>,
    pub server: Option<Server>,
    pub address: SocketAddr,
    pub runtime: Runtime,
}

pub fn config(upstream: &[SocketAddr]) -> DnsConfig {
    DnsConfig {
        listen: vec!["[::]:0".parse().unwrap()],
        transparent: false,
        workers: 2,
        resolvers: vec![ResolverGroup { servers: upstream.to_vec(), protocol: Protocol::Udp, suffixes: vec![] }],
        cluster: ClusterDns { servers: ClusterServers::default(), suffixes: vec!["cluster.local".into()] },
        try_timeout: Duration::from_millis(900),
        overall_timeout: Duration::from_millis(3000),
        ..DnsConfig::default()
    }
}

pub fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

impl Bench {
    pub fn start(config: DnsConfig, table: Table) -> Self {
        Self::start_on(runtime(), config, table)
    }

    /// Opens the sockets in the namespace of the calling thread; upstreams are asked from the runtime's.
    pub fn start_on(runtime: Runtime, config: DnsConfig, table: Table) -> Self {
        let askers = (1..=9).map(pod).chain([("::1".parse().unwrap(), pod(6).1)]).collect();
        let view = Arc::new(ArcSwap::from_pointee(Policy { generation: 1, askers, table }));
        let ledger = Arc::new(Ledger::default());
        let events = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&events);
        let emit = Arc::new(move |e: Event| sink.lock().push(e));
        let server =
            Server::start(config, Arc::clone(&view), Arc::clone(&ledger), emit, runtime.handle().clone()).unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], server.addresses()[0].port()));
        Self { view, ledger, events, server: Some(server), address, runtime }
    }

    /// A UDP socket of a pod.
    pub fn socket(&self, pod: u8) -> UdpSocket {
        let s = UdpSocket::bind(SocketAddr::from(([127, 0, 0, pod], 0))).unwrap();
        s.set_read_timeout(Some(Duration::from_secs(4))).unwrap();
        // Connected, so that only a reply from the address and port that was asked comes in.
        s.connect(self.address).unwrap();
        s
    }

    pub fn raw(&self, pod: u8, q: &[u8]) -> Vec<u8> {
        let s = self.socket(pod);
        s.send(q).unwrap();
        let mut b = [0; 4096];
        let n = s.recv(&mut b).expect("a reply");
        b[..n].to_vec()
    }

    pub fn ask(&self, pod: u8, name: &str, qtype: u16) -> Message {
        Message::from_vec(&self.raw(pod, &wiring::query(name, qtype, 0x4242, Some(1232)))).unwrap()
    }

    /// A TCP connection of a pod.
    pub fn connect(&self, pod: u8) -> TcpStream {
        let s = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        s.bind(&SocketAddr::from(([127, 0, 0, pod], 0)).into()).unwrap();
        s.connect(&self.address.into()).unwrap();
        let s: TcpStream = s.into();
        s.set_read_timeout(Some(Duration::from_secs(4))).unwrap();
        s
    }

    pub fn last(&self) -> Event {
        self.events.lock().last().cloned().expect("an event")
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if let Some(s) = self.server.take() {
            s.stop();
        }
    }
}

pub fn ips(m: &Message) -> Vec<IpAddr> {
    m.answers.iter().filter_map(|r| r.data.ip_addr()).collect()
}
