//! Messages to and from the kernel's netfilter, of nftables and of conntrack, in this thread's network namespace.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt, socket,
};
use nix::sys::time::{TimeVal, TimeValLike};

// linux/netlink.h.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
pub const NLM_F_ACK: u16 = 4;
pub const NLM_F_DUMP: u16 = 0x300;
pub const NLA_F_NESTED: u16 = 0x8000;

/// A socket to ask by.
///
/// # Errors
/// The kernel has none.
pub fn open() -> io::Result<OwnedFd> {
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)?;
    // The kernel answers at once; a thread that asks renews leases, and must not hang whatever happens.
    setsockopt(&socket, ReceiveTimeout, &TimeVal::milliseconds(200))?;
    Ok(socket)
}

/// Attributes of a netlink message, one after the other, with the flags of their types taken off.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let [a, b, c, d, ..] = *bytes else { return None };
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let body = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([c, d]) & 0x3fff, body))
    })
}

/// The first attribute of a kind.
pub fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(k, _)| *k == kind).map(|(_, body)| body)
}

/// Adds an attribute to a netlink message. Ours are short.
pub fn put(message: &mut Vec<u8>, kind: u16, body: &[u8]) {
    let length = 4 + body.len();
    message.extend((length as u16).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(body);
    message.resize(message.len() + length.next_multiple_of(4) - length, 0);
}

/// Asks something of a protocol family, and hands each message of the answer on, without its headers.
///
/// # Errors
/// What the kernel answers, and silence.
pub fn ask(
    socket: &OwnedFd,
    what: u16,
    flags: u16,
    family: u8,
    asked: &[u8],
    mut each: impl FnMut(&[u8]),
) -> io::Result<()> {
    let mut request = vec![0; 16];
    request.extend([family, 0, 0, 0]);
    request.extend(asked);
    let length = request.len() as u32;
    request[..4].copy_from_slice(&length.to_ne_bytes());
    request[4..6].copy_from_slice(&what.to_ne_bytes());
    request[6..8].copy_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
    sendto(socket.as_raw_fd(), &request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    // The kernel's dumps come in messages of at most 32 KiB.
    let mut buffer = vec![0; 1 << 16];
    loop {
        let n = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = &buffer[..n];
        while let Some(header) = rest.get(..16) {
            let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
            let Some(body) = rest.get(16..length) else { break };
            match u16::from_ne_bytes([header[4], header[5]]) {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => {
                    let code = body.get(..4).and_then(|c| c.try_into().ok()).map_or(0, i32::from_ne_bytes);
                    // 0 confirms that all was done.
                    return if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) };
                }
                _ => each(body.get(4..).unwrap_or_default()),
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}
