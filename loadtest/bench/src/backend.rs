//! The server behind all relays: answers any ClientHello with the same recorded flight of a real TLS
//! server, then sends as many octets as it is asked for. A relay that reads no further than the SNI
//! cannot tell, and no CPU goes into cryptography.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;

use anyhow::{Context, Result};
use rustls::crypto::ring;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use socket2::{Domain, Socket, Type};

use crate::arena::{self, BACKEND, NAMES};
use crate::poll::Poll;

/// What is written at once.
const CHUNK: usize = 256 * 1024;

/// A ClientHello for each name, from a real client.
pub fn hellos() -> Result<Vec<Vec<u8>>> {
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let config = Arc::new(config);
    let hello = |i| {
        let mut c = ClientConnection::new(config.clone(), ServerName::try_from(arena::name(i))?)?;
        let mut out = Vec::new();
        c.write_tls(&mut out)?;
        Ok(out)
    };
    (0..NAMES).map(hello).collect()
}

/// What a real server answers: ServerHello to Finished.
fn flight() -> Result<Vec<u8>> {
    let made = rcgen::generate_simple_self_signed([arena::name(0)])?;
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).map_err(anyhow::Error::msg)?;
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![CertificateDer::from(made.cert)], key)?;
    let mut server = ServerConnection::new(Arc::new(config))?;
    let hello = hellos()?.swap_remove(0);
    server.read_tls(&mut hello.as_slice())?;
    server.process_new_packets().context("the hello")?;
    let mut out = Vec::new();
    while server.wants_write() {
        server.write_tls(&mut out)?;
    }
    Ok(out)
}

struct Conn {
    stream: TcpStream,
    greeted: bool,
    left: u64,
}

/// What became of a connection.
#[derive(PartialEq, Eq)]
enum State {
    Open,
    Closed,
}

impl Conn {
    fn step(&mut self, flight: &[u8], chunk: &[u8], buffer: &mut [u8]) -> io::Result<State> {
        loop {
            match self.stream.read(buffer) {
                Ok(0) => return Ok(State::Closed),
                // A hello of a few hundred octets comes in one piece, and so does the number.
                Ok(_) if !self.greeted => {
                    self.greeted = true;
                    self.stream.write_all(flight)?;
                }
                Ok(n) => self.left += buffer[..n].first_chunk::<8>().map_or(0, |b| u64::from_be_bytes(*b)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
        }
        while self.left > 0 {
            let n = usize::try_from(self.left).unwrap_or(CHUNK).min(CHUNK);
            match self.stream.write(&chunk[..n]) {
                Ok(n) => self.left -= n as u64,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
        }
        Ok(State::Open)
    }
}

/// A listener with a backlog that bursts do not fill.
pub fn listen(port: u16) -> Result<TcpListener> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_tcp_nodelay(true)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)).into())?;
    socket.listen(4096)?;
    Ok(socket.into())
}

/// Serves until the process is ended.
pub fn serve() -> Result<()> {
    let flight = flight()?;
    let chunk = vec![0; CHUNK];
    let mut buffer = vec![0; 16 * 1024];
    let listener = listen(BACKEND)?;
    listener.set_nonblocking(true)?;
    let mut poll = Poll::new()?;
    poll.add(listener.as_fd(), 0)?;
    let mut all: HashMap<u64, Conn> = HashMap::new();
    let mut next = 1;
    loop {
        for token in poll.wait(None) {
            if token == 0 {
                while let Ok((stream, _)) = listener.accept() {
                    stream.set_nonblocking(true)?;
                    poll.add(stream.as_fd(), next)?;
                    all.insert(next, Conn { stream, greeted: false, left: 0 });
                    next += 1;
                }
            } else if let Some(c) = all.get_mut(&token) {
                // A failed connection is the client's loss, which it counts.
                if !matches!(c.step(&flight, &chunk, &mut buffer), Ok(State::Open)) {
                    all.remove(&token);
                }
            }
        }
    }
}

/// How long the flight is that a client waits for.
pub fn flight_len() -> Result<usize> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, BACKEND))?;
    let mut stream = stream;
    stream.set_read_timeout(Some(std::time::Duration::from_millis(200)))?;
    stream.write_all(&hellos()?[0])?;
    let mut buffer = [0; 16 * 1024];
    let mut n = 0;
    while let Ok(more @ 1..) = stream.read(&mut buffer[n..]) {
        n += more;
    }
    anyhow::ensure!(n > 500 && buffer[0] == 22, "the backend does not answer");
    Ok(n)
}
