//! HTTP/1.1 and HTTPS, small: what the tests need and no more.
//!
//! `/` answers with JSON that says whom the server saw; `/bytes/N` sends N octets; `/stream` sends a line every
//! 100 ms until somebody ends it.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use rcgen::{Issuer, KeyPair};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::TlsAcceptor;

/// The longest request head that is read, in octets.
const MAX_HEAD: usize = 64 * 1024;
/// The most certificates that are kept; hostile tests send random names.
const MAX_CERTIFICATES: usize = 4096;

/// Signs one certificate for each name that a client asks for.
struct BySni {
    issuer: Issuer<'static, KeyPair>,
    made: Mutex<HashMap<String, Arc<CertifiedKey>>>,
}

impl std::fmt::Debug for BySni {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BySni")
    }
}

impl BySni {
    fn make(&self, name: &str) -> Result<Arc<CertifiedKey>> {
        let (certificate, key) = crate::certs::leaf(&self.issuer, name)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let key = rustls::crypto::ring::sign::any_supported_type(&key)?;
        Ok(Arc::new(CertifiedKey::new(vec![certificate.der().clone()], key)))
    }
}

impl ResolvesServerCert for BySni {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name().unwrap_or("no-sni.invalid").to_owned();
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(key) = made.get(&name) {
            return Some(key.clone());
        }
        let key = self.make(&name).ok()?;
        if made.len() < MAX_CERTIFICATES {
            made.insert(name, key.clone());
        }
        Some(key)
    }
}

/// An acceptor that has a certificate for every name.
pub fn acceptor(certificate: &Path, key: &Path) -> Result<TlsAcceptor> {
    let issuer = crate::certs::read_authority(certificate, key)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(BySni { issuer, made: Mutex::default() }));
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Serves one port, over TLS if an acceptor is given.
pub fn serve(port: u16, tls: Option<TlsAcceptor>) -> Result<()> {
    let listener = super::listener(port)?;
    tokio::spawn(async move {
        while let Ok((stream, source)) = listener.accept().await {
            let tls = tls.clone();
            tokio::spawn(async move {
                let server = stream.local_addr()?;
                stream.set_nodelay(true)?;
                let mut seen: serde_json::Value = serde_json::from_str(&super::seen(source, server))?;
                match tls {
                    Some(acceptor) => {
                        let mut stream = acceptor.accept(stream).await?;
                        seen["sni"] = stream.get_ref().1.server_name().into();
                        requests(&mut stream, seen).await?;
                        stream.shutdown().await
                    }
                    None => {
                        let mut stream = stream;
                        requests(&mut stream, seen).await
                    }
                }
            });
        }
    });
    Ok(())
}

/// Answers requests until the client has had enough.
async fn requests<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, seen: serde_json::Value) -> std::io::Result<()> {
    let mut pending = Vec::new();
    loop {
        let Some(head) = read_head(stream, &mut pending).await? else {
            return Ok(());
        };
        let mut lines = head.split("\r\n");
        let mut request = lines.next().unwrap_or_default().split(' ');
        let (method, path) = (request.next().unwrap_or_default(), request.next().unwrap_or("/"));
        let header = |name: &str| {
            head.split("\r\n").skip(1).find_map(|line| {
                let (key, value) = line.split_once(':')?;
                key.eq_ignore_ascii_case(name).then(|| value.trim())
            })
        };
        let last = header("connection").is_some_and(|v| v.eq_ignore_ascii_case("close"));
        if path == "/stream" {
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n").await?;
            loop {
                stream.write_all(b"tick\n").await?;
                stream.flush().await?;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        if let Some(count) = path.strip_prefix("/bytes/").and_then(|n| n.parse::<u64>().ok()) {
            let head =
                format!("HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: {count}\r\n\r\n");
            stream.write_all(head.as_bytes()).await?;
            let block = [b'.'; 16 * 1024];
            let mut left = count;
            while left > 0 {
                let n = left.min(block.len() as u64);
                stream.write_all(&block[..n as usize]).await?;
                left -= n;
            }
        } else {
            let mut body = seen.clone();
            body["host"] = header("host").into();
            body["method"] = method.into();
            body["path"] = path.into();
            let length = header("content-length").and_then(|v| v.parse().ok()).unwrap_or(0);
            body["length"] = length.into();
            skip(stream, &mut pending, length).await?;
            let body = format!("{body}\n");
            let head =
                format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
            stream.write_all(head.as_bytes()).await?;
            stream.write_all(body.as_bytes()).await?;
        }
        stream.flush().await?;
        if last {
            return Ok(());
        }
    }
}

/// The next request's head, without the empty line; `None` at the end.
async fn read_head<S: AsyncRead + Unpin>(stream: &mut S, pending: &mut Vec<u8>) -> std::io::Result<Option<String>> {
    loop {
        if let Some(end) = pending.windows(4).position(|w| w == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&pending[..end]).into_owned();
            pending.drain(..end + 4);
            return Ok(Some(head));
        }
        let mut buffer = [0; 4096];
        let n = stream.read(&mut buffer).await?;
        if n == 0 || pending.len() + n > MAX_HEAD {
            return Ok(None);
        }
        pending.extend_from_slice(&buffer[..n]);
    }
}

/// Reads a request's body.
async fn skip<S: AsyncRead + Unpin>(stream: &mut S, pending: &mut Vec<u8>, length: usize) -> std::io::Result<()> {
    let mut left = length.saturating_sub(pending.len());
    pending.drain(..length.min(pending.len()));
    let mut buffer = vec![0; 16 * 1024];
    while left > 0 {
        let room = left.min(buffer.len());
        match stream.read(&mut buffer[..room]).await? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => left -= n,
        }
    }
    Ok(())
}
