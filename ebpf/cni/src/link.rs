//! Which device on the node leads to a container: two questions to the kernel, without a runtime.

use std::fs::File;
use std::io;
use std::path::Path;

use netlink_packet_core::{NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// The node's side of a container's cable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Its index.
    pub ifindex: u32,
    /// Its name.
    pub name: String,
}

/// What a device is.
struct Device {
    index: u32,
    name: String,
    veth: bool,
    other: Option<u32>,
}

/// The node's side of the device `ifname` of a namespace; `None` if it is no veth that leads here.
///
/// # Errors
/// There is no such namespace or device, or the kernel refused.
pub fn host_side(netns: &Path, ifname: &str) -> io::Result<Option<Host>> {
    let inside = std::thread::scope(|s| {
        let look = || {
            nix::sched::setns(File::open(netns)?, nix::sched::CloneFlags::CLONE_NEWNET)?;
            ask(|m| m.attributes.push(LinkAttribute::IfName(ifname.to_owned())))
        };
        s.spawn(look).join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace died")))
    })?;
    let Some(other) = inside.other.filter(|_| inside.veth) else { return Ok(None) };
    let here = match ask(|m| m.header.index = other) {
        Err(e) if e.raw_os_error() == Some(nix::libc::ENODEV) => return Ok(None),
        asked => asked?,
    };
    // An index is unique in its namespace only.
    let leads = here.veth && here.other == Some(inside.index);
    Ok(leads.then_some(Host { ifindex: here.index, name: here.name }))
}

fn ask(which: impl FnOnce(&mut LinkMessage)) -> io::Result<Device> {
    let mut link = LinkMessage::default();
    which(&mut link);
    let mut header = NetlinkHeader::default();
    (header.flags, header.sequence_number) = (NLM_F_REQUEST, 1);
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(RouteNetlinkMessage::GetLink(link)));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&bytes, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer).map_err(io::Error::other)?;
    match answer.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => Ok(device(link)),
        NetlinkPayload::Error(e) => Err(e.to_io()),
        _ => Err(io::Error::other("the kernel's answer is no device")),
    }
}

fn device(link: LinkMessage) -> Device {
    let mut out = Device { index: link.header.index, name: String::new(), veth: false, other: None };
    for attribute in link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => out.name = name,
            LinkAttribute::Link(other) => out.other = Some(other),
            LinkAttribute::LinkInfo(infos) => {
                out.veth |= infos.iter().any(|i| matches!(i, LinkInfo::Kind(InfoKind::Veth)));
            }
            _ => {}
        }
    }
    out
}
