//! A proxy before an API server that can stop carrying: for tests of clients that are cut off.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cluster::Cluster;

const FORWARD: u8 = 0;
const REFUSE: u8 = 1;
const SWALLOW: u8 = 2;

#[derive(Debug)]
struct State {
    mode: AtomicU8,
    /// Connections that began before this one are swallowed for ever.
    first_good: AtomicU64,
    accepted: AtomicU64,
    stop: AtomicBool,
}

/// A TCP proxy before the API server. It ends when dropped.
#[derive(Debug)]
pub struct Proxy {
    state: Arc<State>,
    address: SocketAddr,
    kubeconfig: PathBuf,
}

impl Proxy {
    /// Starts one before a cluster's API server, with a kubeconfig of the administrator that leads through it.
    ///
    /// # Errors
    /// When a socket cannot be opened, or the kubeconfig not be written.
    pub fn start(cluster: &Cluster) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let url = cluster.url();
        let upstream = url.strip_prefix("https://").context("the URL is no HTTPS")?.to_owned();
        let host = upstream.split(':').next().unwrap_or_default().to_owned();
        let state = Arc::new(State {
            mode: AtomicU8::new(FORWARD),
            first_good: AtomicU64::new(0),
            accepted: AtomicU64::new(0),
            stop: AtomicBool::new(false),
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
                let (Ok(from), Ok(to)) = (client.try_clone(), server.try_clone()) else { continue };
                for (from, to) in [(from, to), (server, client)] {
                    let shared = shared.clone();
                    std::thread::spawn(move || carry(&shared, number, from, to));
                }
            }
        });
        // The certificate is for the API server's own address.
        let text = std::fs::read_to_string(cluster.kubeconfig())?;
        let host = host.as_str();
        let text = text.replace(&format!("'{url}'"), &format!("'https://{address}', tls-server-name: '{host}'"));
        let kubeconfig = cluster.folder().join(format!("kubeconfig-{}", address.port()));
        std::fs::write(&kubeconfig, text)?;
        Ok(Self { state, address, kubeconfig })
    }

    /// The kubeconfig; it goes with the cluster.
    pub fn kubeconfig(&self) -> PathBuf {
        self.kubeconfig.clone()
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
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        self.state.mode.store(REFUSE, Ordering::SeqCst);
        // Wakes the thread that accepts.
        drop(TcpStream::connect(self.address));
    }
}

fn carry(state: &State, number: u64, mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = vec![0; 64 << 10];
    if from.set_read_timeout(Some(Duration::from_millis(50))).is_err() {
        return;
    }
    loop {
        let mode = state.mode.load(Ordering::SeqCst);
        if mode == REFUSE {
            break;
        }
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => {
                let mode = state.mode.load(Ordering::SeqCst);
                if mode == SWALLOW || number < state.first_good.load(Ordering::SeqCst) {
                    continue;
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
