//! A proxy that can stop forwarding, etcd's compaction, and many versions.
#![allow(dead_code, reason = "no file uses all of it")]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tidegate_kube::Cluster;

const FORWARD: u8 = 0;
const REFUSE: u8 = 1;
const SWALLOW: u8 = 2;

struct State {
    mode: AtomicU8,
    /// Connections that began before this one are swallowed for ever.
    first_good: AtomicU64,
    accepted: AtomicU64,
    stop: AtomicBool,
    /// When the client of each connection last said something; absent of those that are swallowed for ever.
    said: Mutex<BTreeMap<u64, Option<Instant>>>,
}

impl State {
    fn said(&self) -> MutexGuard<'_, BTreeMap<u64, Option<Instant>>> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn swallows(&self, number: u64) -> bool {
        self.mode.load(Ordering::SeqCst) == SWALLOW
            || number < self.first_good.load(Ordering::SeqCst)
            || self.said().get(&number) == Some(&None)
    }
}

/// A TCP proxy before the API server. It ends when dropped.
pub struct Proxy {
    state: Arc<State>,
    address: SocketAddr,
    kubeconfig: PathBuf,
}

impl Proxy {
    pub fn start(cluster: &Cluster) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let url = cluster.url();
        let upstream = url.strip_prefix("https://").unwrap().to_owned();
        let state = Arc::new(State {
            mode: AtomicU8::new(FORWARD),
            first_good: AtomicU64::new(0),
            accepted: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            said: Mutex::default(),
        });
        let shared = state.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if shared.stop.load(Ordering::SeqCst) {
                    return;
                }
                let number = shared.accepted.fetch_add(1, Ordering::SeqCst);
                if shared.mode.load(Ordering::SeqCst) == REFUSE {
                    continue;
                }
                let Ok(server) = TcpStream::connect(&upstream) else { continue };
                shared.said().insert(number, Some(Instant::now()));
                for (from, to, says) in [
                    (client.try_clone().unwrap(), server.try_clone().unwrap(), true),
                    (server.try_clone().unwrap(), client.try_clone().unwrap(), false),
                ] {
                    let shared = shared.clone();
                    std::thread::spawn(move || carry(&shared, number, says, from, to));
                }
            }
        });
        // The certificate is for the API server's own address.
        let text = std::fs::read_to_string(cluster.kubeconfig()).unwrap();
        let host = upstream_host(&url);
        let (own, through) =
            (format!("server: '{url}'"), format!("server: 'https://{address}', tls-server-name: '{host}'"));
        assert!(text.contains(&own), "{text}");
        let text = text.replace(&own, &through);
        let kubeconfig = cluster.folder().join(format!("kubeconfig-{}", address.port()));
        std::fs::write(&kubeconfig, text).unwrap();
        Self { state, address, kubeconfig }
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.kubeconfig.clone()
    }

    /// Connections that were attempted so far.
    pub fn attempts(&self) -> u64 {
        self.state.accepted.load(Ordering::SeqCst)
    }

    /// Ends all connections, and takes no new ones.
    pub fn refuse(&self) {
        self.state.mode.store(REFUSE, Ordering::SeqCst);
    }

    /// Carries everything.
    pub fn forward(&self) {
        self.state.mode.store(FORWARD, Ordering::SeqCst);
    }

    /// Takes what comes and carries nothing: connections look as if nobody had anything to say.
    pub fn swallow(&self) {
        self.state.mode.store(SWALLOW, Ordering::SeqCst);
    }

    /// Carries new connections; those of before stay silent.
    pub fn forward_new(&self) {
        self.state.first_good.store(self.state.accepted.load(Ordering::SeqCst), Ordering::SeqCst);
        self.state.mode.store(FORWARD, Ordering::SeqCst);
    }

    /// Carries all but connections on which the client said nothing for so long, such as that of a watch: they stay silent.
    pub fn swallow_quiet(&self, quiet: Duration) {
        for said in self.state.said().values_mut() {
            *said = said.filter(|at| at.elapsed() < quiet);
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        self.state.mode.store(REFUSE, Ordering::SeqCst);
        // Wakes the thread that accepts.
        drop(TcpStream::connect(self.address));
    }
}

fn upstream_host(url: &str) -> String {
    url.strip_prefix("https://").unwrap().split(':').next().unwrap().to_owned()
}

fn carry(state: &State, number: u64, says: bool, mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = vec![0; 64 << 10];
    from.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    loop {
        let mode = state.mode.load(Ordering::SeqCst);
        if mode == REFUSE {
            break;
        }
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => {
                if state.swallows(number) {
                    continue;
                }
                if says {
                    state.said().insert(number, Some(Instant::now()));
                }
                if to.write_all(&buffer[..n]).is_err() {
                    break;
                }
            }
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
            Err(_) => break,
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

/// Makes versions go up by more than an API server does by itself when it starts.
pub fn write_much(cluster: &Cluster) {
    let api = cluster.api();
    let path = "/api/v1/namespaces/default/configmaps";
    let map = r#"{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "much"}}"#;
    assert_eq!(api.send("POST", path, &[], map).unwrap().status, 201);
    for n in 0..600 {
        let merge = [("Content-Type", "application/merge-patch+json")];
        let sent = api.send("PATCH", &format!("{path}/much"), &merge, &format!(r#"{{"data": {{"n": "{n}"}}}}"#));
        assert_eq!(sent.unwrap().status, 200);
    }
}

/// Lets etcd forget all versions but the last.
pub fn compact(cluster: &Cluster) {
    // etcd's JSON gateway takes the same certificates as its API.
    let folder = cluster.folder();
    let host = upstream_host(&cluster.url());
    let post = |path: &str, body: &str| {
        let out = Command::new("curl")
            .args(["-sS", "--fail", "--cacert"])
            .arg(folder.join("ca.crt"))
            .arg("--cert")
            .arg(folder.join("kube-apiserver.crt"))
            .arg("--key")
            .arg(folder.join("kube-apiserver.key"))
            .args(["-d", body])
            .arg(format!("https://{host}:2379{path}"))
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice::<serde_json::Value>(&out.stdout).unwrap()
    };
    let range = post("/v3/kv/range", r#"{"key": "AA=="}"#);
    let revision = range["header"]["revision"].as_str().unwrap().to_owned();
    post("/v3/kv/compaction", &format!(r#"{{"revision": "{revision}", "physical": true}}"#));
}
