//! Steady traffic of a pod while something else happens: flows that must not be cut, and packets that must not get out.
//! [`gaps`] has what may be kept waiting for a moment: names, and new connections.

pub mod gaps;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::family::{FAMILIES, Family};
use crate::lab::{Lab, wait_for};
use crate::netns;
use crate::probe::source;
use crate::state::MARKER;

/// How often each flow says something.
const PACE: Duration = Duration::from_millis(50);
/// A TCP flow that gets no answer for so long counts as cut; a lost packet is sent again long before.
const PATIENCE: Duration = Duration::from_secs(25);
/// Octets of one download, and how many a second.
const DOWNLOAD: (usize, &str) = (400_000, "200k");

/// One flow, or one kind of flows.
#[derive(Debug)]
struct Flow {
    name: String,
    /// How often it got an answer.
    answers: AtomicU64,
    cut: Mutex<Option<String>>,
}

/// What runs, until it is dropped.
#[derive(Debug)]
pub struct Steady {
    end: Arc<AtomicBool>,
    flows: Vec<Arc<Flow>>,
    threads: Vec<JoinHandle<()>>,
}

/// Servers of a family, and what they must see.
#[derive(Clone, Copy, Debug)]
pub struct Servers {
    /// The family.
    pub family: Family,
    /// Name of a TCP echo server that policy has forwarded, and its address and port.
    pub tcp: (&'static str, SocketAddr),
    /// The same for UDP, where policy has one.
    pub udp: Option<(&'static str, SocketAddr)>,
    /// A relayed HTTPS server.
    pub https: &'static str,
    /// A server that nobody may reach.
    pub denied: IpAddr,
    /// The source that servers see.
    pub source: IpAddr,
    /// The pod's own TCP and UDP echo servers, which clients outside ask.
    pub own: Option<(SocketAddr, SocketAddr)>,
}

impl Servers {
    /// Those of the demo's internet that its shop may ask, for a pod that leaves with the shop's address.
    ///
    /// # Errors
    /// When there is no such pod.
    pub fn of_demo(lab: &Lab, pod: &str) -> Result<Vec<Self>> {
        let pod = lab.scenario().pod(pod).with_context(|| format!("there is no pod {pod:?}"))?;
        let (own4, own6) = pod.ipv4.zip(pod.ipv6).context("the pod has no addresses")?;
        let all = FAMILIES.map(|family| {
            let named = |n: u8, port: u16| -> Result<SocketAddr> {
                let ip: IpAddr = format!("{}{n}", family.pick("198.51.100.", "2001:db8:100::")).parse()?;
                Ok(SocketAddr::new(ip, port))
            };
            let own = family.pick(IpAddr::from(own4), IpAddr::from(own6));
            Ok(Self {
                family,
                tcp: ("tcp.example.com", named(12, 7000)?),
                udp: Some(("udp.example.com", named(13, 7001)?)),
                https: "api.example.com",
                denied: named(14, 0)?.ip(),
                source: family.pick("203.0.113.10", "2001:db8::10").parse()?,
                own: Some((SocketAddr::new(own, 7000), SocketAddr::new(own, 7001))),
            })
        });
        all.into_iter().collect()
    }
}

/// Everything that a thread needs to be somewhere.
#[derive(Clone, Debug)]
struct Where {
    name: String,
    netns: String,
    resolv: Option<PathBuf>,
    ca: PathBuf,
    lab: String,
    end: Arc<AtomicBool>,
}

impl Where {
    fn goes_on(&self) -> bool {
        !self.end.load(Ordering::Relaxed)
    }

    fn curl(&self, arguments: &[&str]) -> Result<std::process::Child> {
        let mut command = Command::new("curl");
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        command.env(MARKER, &self.lab).env("CURL_CA_BUNDLE", &self.ca);
        netns::spawn(&self.netns, self.resolv.as_deref(), &mut command)
    }
}

impl Steady {
    /// Begins: for each family a forwarded TCP and a UDP flow, a TCP and a UDP flow opened from outside, and tries to
    /// reach what is denied; with `relayed` a TLS stream and one download after the other, too. Returns once every flow
    /// got an answer.
    ///
    /// # Errors
    /// A flow that does not begin.
    pub fn start(lab: &Lab, pod: &str, servers: &[Servers], relayed: bool) -> Result<Self> {
        let mut this = Self { end: Arc::default(), flows: Vec::new(), threads: Vec::new() };
        let place = lab.place(pod)?;
        let inside = Where {
            name: pod.to_owned(),
            netns: place.netns.clone(),
            resolv: place.resolv.clone(),
            ca: lab.internet_ca(),
            lab: lab.name().to_owned(),
            end: Arc::clone(&this.end),
        };
        let outside = Where { netns: lab.place("internet")?.netns.clone(), resolv: None, ..inside.clone() };
        for server in servers {
            let s = *server;
            for name in [Some(s.tcp.0), s.udp.map(|u| u.0)].into_iter().flatten() {
                let seen = crate::probe::dig(&place, name, s.family.record(), &[]);
                ensure!(!seen.answers.is_empty(), "{name}: {}", seen.text());
            }
            this.spawn("forwarded TCP", s.family, &inside, move |w, f| talk(w, f, s.tcp.1, Some(s.source)));
            if let Some((_, to)) = s.udp {
                this.spawn("forwarded UDP", s.family, &inside, move |w, f| chat(w, f, to, Some(s.source)));
            }
            if let Some((tcp, udp)) = s.own {
                this.spawn("TCP from outside", s.family, &outside, move |w, f| talk(w, f, tcp, None));
                this.spawn("UDP from outside", s.family, &outside, move |w, f| chat(w, f, udp, None));
            }
            if relayed {
                this.spawn("TLS stream", s.family, &inside, move |w, f| stream(w, f, s.family, s.https));
                this.spawn("download", s.family, &inside, move |w, f| download(w, f, s.family, s.https));
            }
            this.spawn("denied", s.family, &inside, move |w, f| pester(w, f, s.denied));
        }
        this.goes_on(Duration::from_secs(20))?;
        Ok(this)
    }

    fn spawn(
        &mut self,
        what: &str,
        family: Family,
        place: &Where,
        work: impl FnOnce(&Where, &Flow) -> Result<()> + Send + 'static,
    ) {
        let flow = Arc::new(Flow {
            name: format!("{what} of {} over {}", place.name, family.pick("IPv4", "IPv6")),
            answers: AtomicU64::new(0),
            cut: Mutex::default(),
        });
        self.flows.push(Arc::clone(&flow));
        let place = place.clone();
        self.threads.push(std::thread::spawn(move || {
            let done = netns::within(&place.netns.clone(), || work(&place, &flow)).and_then(|r| r);
            if let Err(e) = done
                && place.goes_on()
            {
                *flow.cut.lock().unwrap_or_else(PoisonError::into_inner) = Some(format!("{e:#}"));
            }
        }));
    }

    /// Waits until every flow got three more answers.
    ///
    /// # Errors
    /// Which did not within the limit, or were cut.
    pub fn goes_on(&self, limit: Duration) -> Result<()> {
        let count = |f: &Arc<Flow>| f.answers.load(Ordering::Relaxed);
        let before: Vec<u64> = self.flows.iter().map(count).collect();
        wait_for(limit, || {
            let done = self.flows.iter().zip(&before).all(|(f, n)| count(f) >= n + 3);
            (done || self.uncut().is_err()).then_some(())
        });
        self.uncut()?;
        let late: Vec<&str> =
            self.flows.iter().zip(&before).filter(|(f, n)| count(f) < **n + 3).map(|(f, _)| f.name.as_str()).collect();
        ensure!(late.is_empty(), "no answers within {limit:?}: {}", late.join(", "));
        Ok(())
    }

    /// Whether no flow was cut, and nothing that is denied was answered.
    ///
    /// # Errors
    /// Which was, and how.
    pub fn uncut(&self) -> Result<()> {
        let cut = |f: &Arc<Flow>| {
            let cut = f.cut.lock().unwrap_or_else(PoisonError::into_inner);
            cut.as_ref().map(|how| format!("{}: {how}", f.name))
        };
        let all: Vec<String> = self.flows.iter().filter_map(cut).collect();
        ensure!(all.is_empty(), "cut: {}", all.join("; "));
        Ok(())
    }
}

impl Drop for Steady {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

impl Flow {
    fn answered(&self) {
        self.answers.fetch_add(1, Ordering::Relaxed);
    }
}

fn check(seen: &Value, wanted: Option<IpAddr>) -> Result<()> {
    ensure!(wanted.is_none() || source(seen) == wanted, "the server saw {:?}, not {wanted:?}", source(seen));
    Ok(())
}

/// One TCP connection, a line and its echo again and again.
fn talk(place: &Where, flow: &Flow, to: SocketAddr, wanted: Option<IpAddr>) -> Result<()> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE).context("connect")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line)?;
    check(&serde_json::from_str(&line)?, wanted)?;
    for n in 0u64.. {
        if !place.goes_on() {
            break;
        }
        let text = format!("line {n}\n");
        stream.get_mut().write_all(text.as_bytes()).context("write")?;
        let mut back = vec![0; text.len()];
        stream.read_exact(&mut back).context("read")?;
        ensure!(back == text.as_bytes(), "another echo");
        flow.answered();
        std::thread::sleep(PACE);
    }
    Ok(())
}

/// One UDP socket. What is lost is lost; a flow that ends shows in [`Steady::goes_on`].
fn chat(place: &Where, flow: &Flow, to: SocketAddr, wanted: Option<IpAddr>) -> Result<()> {
    let any: IpAddr = if to.is_ipv4() { [0u8; 4].into() } else { [0u8; 16].into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(PACE))?;
    let mut buffer = [0; 2048];
    while place.goes_on() {
        // An ICMP error shows here; the next datagram is another try.
        let _ = socket.send(b"datagram\n");
        if let Ok(n) = socket.recv(&mut buffer) {
            let line = buffer[..n].split(|b| *b == b'\n').next().unwrap_or_default();
            check(&serde_json::from_slice(line)?, wanted)?;
            flow.answered();
        }
        std::thread::sleep(PACE);
    }
    Ok(())
}

/// One HTTPS response that has no end.
fn stream(place: &Where, flow: &Flow, family: Family, host: &str) -> Result<()> {
    let url = format!("https://{host}/stream");
    let mut child = place.curl(&["-sSN", "-m", "600", family.flag(), &url])?;
    let mut lines = BufReader::new(child.stdout.take().context("no output")?);
    let mut line = String::new();
    let mut result = Ok(());
    while place.goes_on() {
        line.clear();
        match lines.read_line(&mut line) {
            Ok(n) if n > 0 => flow.answered(),
            other => {
                result = Err(anyhow::anyhow!("it ended: {other:?}, curl {:?}", child.wait()));
                break;
            }
        }
    }
    // Both fail only if it has ended already.
    let _ = child.kill();
    let _ = child.wait();
    result
}

/// One long download after the other, each over its first connection: a name that cannot be resolved is tried again, a
/// response that begins must come to its end.
fn download(place: &Where, flow: &Flow, family: Family, host: &str) -> Result<()> {
    let url = format!("https://{host}/bytes/{}", DOWNLOAD.0);
    while place.goes_on() {
        let write = "%{http_code} %{size_download}";
        let arguments =
            ["-sS", "-m", "120", "--limit-rate", DOWNLOAD.1, "-o", "/dev/null", "-w", write, family.flag(), &url];
        let mut child = place.curl(&arguments)?;
        let mut text = String::new();
        child.stdout.take().context("no output")?.read_to_string(&mut text)?;
        let status = child.wait()?;
        let whole = text == format!("200 {}", DOWNLOAD.0);
        ensure!(whole || text.starts_with("000 "), "{text}, curl {status}");
        if whole {
            // Counts as much as a line of the others.
            (0..3).for_each(|_| flow.answered());
        }
    }
    Ok(())
}

/// Tries what is denied: connections and datagrams. That nobody answers is half of it; the other half is counted at the
/// router.
fn pester(place: &Where, flow: &Flow, denied: IpAddr) -> Result<()> {
    let any: IpAddr = if denied.is_ipv4() { [0u8; 4].into() } else { [0u8; 16].into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
    socket.set_read_timeout(Some(Duration::from_millis(5)))?;
    while place.goes_on() {
        for port in [443, 7000] {
            let open = TcpStream::connect_timeout(&SocketAddr::new(denied, port), Duration::from_millis(20)).is_ok();
            ensure!(!open, "{denied}:{port} answered");
        }
        // A drop is silent, and nothing is waited for.
        let _ = socket.send_to(b"denied\n", SocketAddr::new(denied, 7001));
        ensure!(socket.recv(&mut [0; 64]).is_err(), "{denied} answered a datagram");
        flow.answered();
        std::thread::sleep(PACE);
    }
    Ok(())
}
