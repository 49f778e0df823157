//! Sockets of the DNS service.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::config::DnsConfig;

/// How often a UDP thread looks up from its socket.
pub(crate) const TICK: Duration = Duration::from_millis(200);

fn set(fd: BorrowedFd<'_>, level: i32, option: i32, value: i32) -> io::Result<()> {
    // SAFETY: the value is an int that lives through the call, and its size is given.
    let rc = unsafe {
        libc::setsockopt(fd.as_raw_fd(), level, option, (&raw const value).cast(), size_of::<i32>() as libc::socklen_t)
    };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn open(at: SocketAddr, kind: Type, protocol: Protocol, config: &DnsConfig) -> io::Result<Socket> {
    use std::os::fd::AsFd;
    let socket = Socket::new(Domain::for_address(at), kind, Some(protocol))?;
    if at.is_ipv6() {
        socket.set_only_v6(at.ip() != Ipv6Addr::UNSPECIFIED)?;
    }
    if config.transparent {
        // A dual-stack socket needs both: IPv4 datagrams on it obey the IPv4 option.
        set(socket.as_fd(), libc::SOL_IP, libc::IP_TRANSPARENT, 1)?;
        if at.is_ipv6() {
            set(socket.as_fd(), libc::SOL_IPV6, libc::IPV6_TRANSPARENT, 1)?;
        }
    }
    if let Some(mark) = config.mark {
        socket.set_mark(mark)?;
    }
    Ok(socket)
}

/// One UDP socket of a set; all of a set share the port by SO_REUSEPORT.
pub(crate) fn udp(at: SocketAddr, config: &DnsConfig) -> io::Result<UdpSocket> {
    use std::os::fd::AsFd;
    let socket = open(at, Type::DGRAM, Protocol::UDP, config)?;
    socket.set_reuse_port(true)?;
    set(socket.as_fd(), libc::SOL_IP, libc::IP_RECVORIGDSTADDR, 1)?;
    if at.is_ipv6() {
        set(socket.as_fd(), libc::SOL_IPV6, libc::IPV6_RECVORIGDSTADDR, 1)?;
    }
    let octets = i32::try_from(config.receive_buffer).unwrap_or(i32::MAX);
    if set(socket.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, octets).is_err() {
        // Without NET_ADMIN the system's limit holds.
        socket.set_recv_buffer_size(config.receive_buffer)?;
    }
    socket.set_read_timeout(Some(TICK))?;
    socket.bind(&at.into())?;
    Ok(socket.into())
}

/// The TCP listener.
pub(crate) fn tcp(at: SocketAddr, config: &DnsConfig) -> io::Result<std::net::TcpListener> {
    let socket = open(at, Type::STREAM, Protocol::TCP, config)?;
    socket.set_reuse_address(true)?;
    socket.set_tcp_nodelay(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&at.into())?;
    socket.listen(1024)?;
    Ok(socket.into())
}

/// The sockets of one address: UDP for each worker, and TCP on the same port.
pub(crate) fn sets(at: SocketAddr, config: &DnsConfig) -> io::Result<(Vec<UdpSocket>, std::net::TcpListener)> {
    let mut at = at;
    let mut tries = 0;
    loop {
        let first = match udp(at, config) {
            // A kernel without IPv6: what would have served both families serves IPv4.
            Err(e) if e.raw_os_error() == Some(libc::EAFNOSUPPORT) && at.ip() == Ipv6Addr::UNSPECIFIED => {
                at = SocketAddr::from((Ipv4Addr::UNSPECIFIED, at.port()));
                udp(at, config)?
            }
            other => other?,
        };
        let bound = first.local_addr()?;
        let listener = match tcp(bound, config) {
            // A free UDP port need not be free for TCP.
            Err(e) if e.kind() == io::ErrorKind::AddrInUse && at.port() == 0 && tries < 16 => {
                tries += 1;
                continue;
            }
            other => other?,
        };
        let mut all = vec![first];
        for _ in 1..config.workers.clamp(1, 64) {
            all.push(udp(bound, config)?);
        }
        return Ok((all, listener));
    }
}

/// A UDP socket of its own for one upstream query: the kernel picks a random port.
pub(crate) fn upstream_udp(server: SocketAddr, mark: Option<u32>) -> io::Result<tokio::net::UdpSocket> {
    let socket = Socket::new(Domain::for_address(server), Type::DGRAM, Some(Protocol::UDP))?;
    if let Some(mark) = mark {
        socket.set_mark(mark)?;
    }
    socket.set_nonblocking(true)?;
    // Connected, so that only the server's datagrams come in, and its ICMP errors do.
    socket.connect(&server.into())?;
    tokio::net::UdpSocket::from_std(socket.into())
}

/// A TCP connection to a server.
pub(crate) async fn upstream_tcp(server: SocketAddr, mark: Option<u32>) -> io::Result<tokio::net::TcpStream> {
    let socket = if server.is_ipv4() { tokio::net::TcpSocket::new_v4()? } else { tokio::net::TcpSocket::new_v6()? };
    if let Some(mark) = mark {
        SockRef::from(&socket).set_mark(mark)?;
    }
    socket.set_nodelay(true)?;
    socket.connect(server).await
}
