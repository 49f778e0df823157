//! A TLS client whose first message is as large as one with a post-quantum key share, sent in pieces of any size.
//!
//! No library here computes ML-KEM. The hello offers X25519MLKEM768 with a share of the right length
//! (draft-ietf-tls-ecdhe-mlkem, section 3.1) and X25519 beside it, as browsers do; the servers of the lab choose X25519.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use rustls::crypto::ring::{default_provider, kx_group::X25519};
use rustls::crypto::{ActiveKeyExchange, CryptoProvider, SharedSecret, SupportedKxGroup};
use rustls::{ClientConfig, ClientConnection, Error, NamedGroup, RootCertStore, StreamOwned};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use serde_json::Value;
use tidegate_random::noise;

use crate::place::Place;

/// Octets of an ML-KEM-768 encapsulation key.
const ENCAPSULATION_KEY: usize = 1184;
/// How long the server may take.
const PATIENCE: Duration = Duration::from_secs(15);

/// How the client sends.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// Octets of each write, and so of each segment; what is larger than a segment is cut by the kernel.
    pub piece: usize,
    /// Octets of a TLS record, its header included; absent: as large as may be.
    pub record: Option<usize>,
}

#[derive(Debug)]
struct PostQuantum;

struct Exchange {
    classic: Box<dyn ActiveKeyExchange>,
    share: Vec<u8>,
}

impl SupportedKxGroup for PostQuantum {
    fn start(&self) -> Result<Box<dyn ActiveKeyExchange>, Error> {
        let classic = X25519.start()?;
        let share = [&noise(768, ENCAPSULATION_KEY)[..], classic.pub_key()].concat();
        Ok(Box::new(Exchange { classic, share }))
    }

    fn name(&self) -> NamedGroup {
        NamedGroup::X25519MLKEM768
    }

    fn usable_for_version(&self, version: rustls::ProtocolVersion) -> bool {
        version == rustls::ProtocolVersion::TLSv1_3
    }
}

impl ActiveKeyExchange for Exchange {
    fn complete(self: Box<Self>, _: &[u8]) -> Result<SharedSecret, Error> {
        Err(Error::General("the server chose a group that it does not have".into()))
    }

    fn hybrid_component(&self) -> Option<(NamedGroup, &[u8])> {
        Some((self.classic.group(), self.classic.pub_key()))
    }

    fn complete_hybrid_component(self: Box<Self>, peer: &[u8]) -> Result<SharedSecret, Error> {
        self.classic.complete(peer)
    }

    fn pub_key(&self) -> &[u8] {
        &self.share
    }

    fn group(&self) -> NamedGroup {
        NamedGroup::X25519MLKEM768
    }
}

/// Writes in pieces.
struct Pieces {
    stream: TcpStream,
    piece: usize,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.read(buffer)
    }
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(&bytes[..bytes.len().min(self.piece)])
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

fn connection(ca: &std::path::Path, name: &str, cut: Cut) -> Result<ClientConnection> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca)?)?;
    let provider = CryptoProvider { kx_groups: vec![&PostQuantum, X25519], ..default_provider() };
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.max_fragment_size = cut.record;
    Ok(ClientConnection::new(Arc::new(config), ServerName::try_from(name.to_owned())?)?)
}

/// Asks an HTTPS server of the lab for `/` from a place; gives what it said.
///
/// # Errors
/// When the connection, the handshake or the answer fails.
pub fn fetch(from: &Place<'_>, to: SocketAddr, name: &str, cut: Cut) -> Result<Value> {
    let client = connection(&from.lab.internet_ca(), name, cut)?;
    let stream = from.within(|| TcpStream::connect_timeout(&to, PATIENCE))?.context("connect")?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut tls = StreamOwned::new(client, Pieces { stream, piece: cut.piece.max(1) });
    write!(tls, "GET / HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    tls.read_to_string(&mut answer).context("the answer")?;
    let (_, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    serde_json::from_str(body).context("the server's JSON")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hello_is_larger_than_a_segment() {
        let folder = tempfile::tempdir().unwrap();
        let authority = crate::certs::Authority::new("test").unwrap();
        let ca = authority.write(folder.path(), "ca", true).unwrap();
        let mut client = connection(&ca, "api.example.com", Cut { piece: 1, record: None }).unwrap();
        let mut out = Vec::new();
        client.write_tls(&mut out).unwrap();
        assert!(out.len() > 1430, "{}", out.len());
        // The group, and a share of that length.
        let share = [&[0x11, 0xec][..], &1216u16.to_be_bytes()].concat();
        assert!(out.windows(4).any(|w| w == share));
    }
}
