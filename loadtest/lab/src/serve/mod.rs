//! The servers of a place: `tidegate-lab serve FILE` in its namespace.
//!
//! Every server reports the source address that it saw.

mod dns;
mod echo;
mod http;
pub mod zone;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::scenario::Listen;

/// What a place serves.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Config {
    /// Written when everything listens.
    pub ready: PathBuf,
    /// Ports, on every address of the place.
    pub listen: Listen,
    /// Certificate and key of the authority that signs for the HTTPS servers.
    pub authority: Option<(PathBuf, PathBuf)>,
    /// DNS.
    pub dns: Option<Dns>,
}

/// A DNS server.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Dns {
    /// Where it listens, UDP and TCP.
    pub addresses: Vec<SocketAddr>,
    /// What it answers ([`zone::Zone`], JSON); read again when it changes.
    pub zone: PathBuf,
    /// Where names go that it is no authority for.
    pub forward: Option<SocketAddr>,
    /// One JSON line for each query that it saw.
    pub log: PathBuf,
}

/// Serves until the process is ended.
///
/// # Errors
/// When a port cannot be bound or a file cannot be read.
pub fn run(file: &Path) -> Result<()> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let config: Config = serde_json::from_str(&text)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        if let Some(authority) = &config.authority {
            let acceptor = http::acceptor(&authority.0, &authority.1)?;
            for port in &config.listen.https {
                http::serve(*port, Some(acceptor.clone()))?;
            }
        }
        for port in &config.listen.http {
            http::serve(*port, None)?;
        }
        for port in &config.listen.tcp_echo {
            echo::tcp(*port)?;
        }
        for port in &config.listen.udp_echo {
            echo::udp(*port)?;
        }
        let _dns = match &config.dns {
            Some(dns) => Some(dns::serve(dns).await?),
            None => None,
        };
        std::fs::write(&config.ready, "ready\n")?;
        std::future::pending::<()>().await;
        Ok(())
    })
}

/// A dual-stack listener on every address.
fn listener(port: u16) -> Result<tokio::net::TcpListener> {
    use socket2::{Domain, Protocol, Socket, Type};
    let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_only_v6(false)?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    let any = SocketAddr::new(std::net::Ipv6Addr::UNSPECIFIED.into(), port);
    socket.bind(&any.into()).with_context(|| format!("cannot bind TCP port {port}"))?;
    socket.listen(1024)?;
    Ok(tokio::net::TcpListener::from_std(socket.into())?)
}

/// An address as a person writes it: no v4-mapped form.
fn plain(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

/// The line with which echo servers say whom they saw.
fn seen(source: SocketAddr, server: SocketAddr) -> String {
    let (source, server) = (plain(source), plain(server));
    serde_json::json!({
        "source": source.ip(), "port": source.port(), "server": server.ip(), "serverPort": server.port(),
    })
    .to_string()
}
