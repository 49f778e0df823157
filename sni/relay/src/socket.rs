//! Sockets with the options that matter.

use std::io;
use std::mem::size_of;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};
use tidegate_sni_core::Egress;
use tokio::net::{TcpSocket, TcpStream};

/// Connections that wait for accept, per listener.
const BACKLOG: i32 = 4096;
/// IP_LOCAL_PORT_RANGE (Linux 6.3), for both families.
const IP_LOCAL_PORT_RANGE: libc::c_int = 51;

fn stream_socket(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_tcp_nodelay(true)?;
    // Reset on close until a clean end is certain: a crash must not look like the end of the data.
    socket.set_linger(Some(Duration::ZERO))?;
    // A peer that vanished without a word must not hold its place until the idle timeout.
    let keepalive =
        TcpKeepalive::new().with_time(Duration::from_secs(120)).with_interval(Duration::from_secs(15)).with_retries(4);
    socket.set_tcp_keepalive(&keepalive)?;
    Ok(socket)
}

/// A listener. Accepted sockets inherit TCP_NODELAY, SO_LINGER, keepalive and the mark.
pub(crate) fn listen(address: SocketAddr, transparent: bool, mark: u32) -> io::Result<std::net::TcpListener> {
    let socket = stream_socket(address)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if transparent {
        match address {
            SocketAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
            SocketAddr::V6(_) => socket.set_ip_transparent_v6(true)?,
        }
    }
    if mark != 0 {
        socket.set_mark(mark)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// A socket towards `to`, ready to connect.
pub(crate) fn upstream(to: SocketAddr, egress: Egress, ports: Option<&RangeInclusive<u16>>) -> io::Result<TcpSocket> {
    let socket = stream_socket(to)?;
    if egress.mark != 0 {
        socket.set_mark(egress.mark)?;
    }
    // The first acknowledgement rides on the hello: two packets fewer per connection.
    socket.set_tcp_quickack(false)?;
    if let Some(ports) = ports {
        local_ports(&socket, ports)?;
    }
    if let Some(source) = egress.source {
        // Without this every bind would look for a port of its own and block it for all destinations.
        setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
        // An egress address need not be on an interface.
        match source {
            IpAddr::V4(_) => socket.set_freebind_v4(true)?,
            IpAddr::V6(_) => socket.set_freebind_v6(true)?,
        }
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    Ok(TcpSocket::from_std_stream(socket.into()))
}

/// The ports that this thread's network namespace gives to outgoing connections, if it says so.
pub(crate) fn namespace_ports() -> Option<RangeInclusive<u16>> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?;
    let mut numbers = text.split_whitespace().map(str::parse);
    Some(numbers.next()?.ok()?..=numbers.next()?.ok()?)
}

/// Whether this kernel can keep a socket to a range of ports; without it the namespace's own range holds.
pub(crate) fn has_local_ports() -> bool {
    let any = [SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)), SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))];
    any.into_iter().any(|a| stream_socket(a).is_ok_and(|s| local_ports(&s, &(32768..=60999)).is_ok()))
}

#[allow(unsafe_code)]
fn local_ports(socket: &Socket, ports: &RangeInclusive<u16>) -> io::Result<()> {
    let value = u32::from(*ports.end()) << 16 | u32::from(*ports.start());
    // SAFETY: `value` lives through the call and its size is passed; the descriptor is open, for `socket` is borrowed.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_IP,
            IP_LOCAL_PORT_RANGE,
            (&raw const value).cast(),
            size_of::<u32>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes the next close of `stream` an ordinary end instead of a reset.
pub(crate) fn close_cleanly(stream: &TcpStream) -> io::Result<()> {
    socket2::SockRef::from(stream).set_linger(None)
}

/// An IPv4 address in IPv6 clothes becomes IPv4.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
