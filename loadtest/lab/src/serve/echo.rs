//! Echo over TCP and UDP.

use std::io::{IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt, sockopt,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Serves TCP echo: one line that says whom it saw, then what comes in.
pub fn tcp(port: u16) -> Result<()> {
    let listener = super::listener(port)?;
    tokio::spawn(async move {
        while let Ok((mut stream, source)) = listener.accept().await {
            tokio::spawn(async move {
                let server = stream.local_addr()?;
                stream.set_nodelay(true)?;
                stream.write_all(format!("{}\n", super::seen(source, server)).as_bytes()).await?;
                let mut buffer = vec![0; 16 * 1024];
                loop {
                    let n = stream.read(&mut buffer).await?;
                    if n == 0 {
                        return std::io::Result::Ok(());
                    }
                    stream.write_all(&buffer[..n]).await?;
                }
            });
        }
    });
    Ok(())
}

/// Serves UDP echo on every address, also on those that only a route makes local: each datagram comes back
/// with a line before it that says whom the server saw.
pub fn udp(port: u16) -> Result<()> {
    for any in [IpAddr::from(Ipv4Addr::UNSPECIFIED), IpAddr::from(Ipv6Addr::UNSPECIFIED)] {
        let domain = if any.is_ipv4() { socket2::Domain::IPV4 } else { socket2::Domain::IPV6 };
        let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, None)?;
        if any.is_ipv6() {
            socket.set_only_v6(true)?;
            // Replies leave from addresses that only a route makes local.
            socket.set_freebind_v6(true)?;
            setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
        } else {
            setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
        }
        socket.bind(&SocketAddr::new(any, port).into()).with_context(|| format!("cannot bind UDP port {port}"))?;
        std::thread::Builder::new().name(format!("udp-{port}")).spawn(move || {
            loop {
                // One bad datagram, as an unreachable reported back, must not end the server.
                let _ = answer(&socket, port);
            }
        })?;
    }
    Ok(())
}

fn answer(socket: &socket2::Socket, port: u16) -> nix::Result<()> {
    let mut buffer = vec![0u8; 65_536];
    let mut control = nix::cmsg_space!(nix::libc::in6_pktinfo);
    let (length, source, to4, to6) = {
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let message =
            recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::empty())?;
        let (mut to4, mut to6) = (None, None);
        for item in message.cmsgs()? {
            match item {
                ControlMessageOwned::Ipv4PacketInfo(info) => to4 = Some(info),
                ControlMessageOwned::Ipv6PacketInfo(info) => to6 = Some(info),
                _ => {}
            }
        }
        (message.bytes, message.address, to4, to6)
    };
    let Some(source) = source else { return Ok(()) };
    let from = match (source.as_sockaddr_in(), source.as_sockaddr_in6()) {
        (Some(v4), _) => SocketAddr::new(v4.ip().into(), v4.port()),
        (_, Some(v6)) => SocketAddr::new(v6.ip().into(), v6.port()),
        _ => return Ok(()),
    };
    let server = match (to4, to6) {
        (Some(info), _) => IpAddr::from(Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr))),
        (_, Some(info)) => IpAddr::from(Ipv6Addr::from(info.ipi6_addr.s6_addr)),
        _ => return Ok(()),
    };
    let line = format!("{}\n", super::seen(from, SocketAddr::new(server, port)));
    let parts = [IoSlice::new(line.as_bytes()), IoSlice::new(&buffer[..length])];
    // The reply must leave with the address that was asked, on whatever device the route says.
    if let Some(mut info) = to4 {
        info.ipi_spec_dst = info.ipi_addr;
        info.ipi_ifindex = 0;
        sendmsg(
            socket.as_raw_fd(),
            &parts,
            &[ControlMessage::Ipv4PacketInfo(&info)],
            MsgFlags::empty(),
            Some(&source),
        )?;
    } else if let Some(mut info) = to6 {
        info.ipi6_ifindex = 0;
        sendmsg(
            socket.as_raw_fd(),
            &parts,
            &[ControlMessage::Ipv6PacketInfo(&info)],
            MsgFlags::empty(),
            Some(&source),
        )?;
    }
    Ok(())
}
