//! The devices that are ours: the tunnel `tgn` and two veth pairs per plugged
//! gateway, `tgq`–`tgp` towards pods and `tgh`–`tga` towards the uplink. The
//! first of each pair is in the node's namespace, the second in the gateway's.

use std::fs;
use std::future::Future;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use netlink_packet_route::link::{InfoData, InfoKind, InfoVeth, LinkMessage};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVxlan};
use tokio::sync::oneshot;

use crate::links::{Kind, Link, LinkError, Netlink};
use crate::sysctl::Setting;

/// The tunnel device.
pub const TUNNEL: &str = "tgn";
/// Towards a plugged gateway's pod side, in the node's namespace.
pub const POD_SIDE: &str = "tgq";
/// Towards a plugged gateway's egress side, in the node's namespace.
pub const EGRESS_SIDE: &str = "tgh";
/// The other end of [`POD_SIDE`], in the gateway's namespace.
pub const POD_SIDE_INNER: &str = "tgp";
/// The other end of [`EGRESS_SIDE`], in the gateway's namespace.
pub const EGRESS_SIDE_INNER: &str = "tga";
/// All of ours in the node's namespace.
pub const OURS: [&str; 3] = [TUNNEL, POD_SIDE, EGRESS_SIDE];

/// Larger than any packet that pods send: redirects ignore it, and what is too large for the path is fragmented
/// outside or answered by `pod_egress`.
const TUNNEL_DEVICE_MTU: u32 = 65_000;

/// What plugging a gateway in gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plugged {
    /// [`POD_SIDE`].
    pub pod_side: Link,
    /// [`EGRESS_SIDE`].
    pub egress_side: Link,
}

/// A locally administered unicast hardware address of our own. Set explicitly, so that udev's policy leaves it alone.
fn random_mac() -> io::Result<[u8; 6]> {
    let mut mac = [0; 6];
    fs::File::open("/dev/urandom")?.read_exact(&mut mac)?;
    mac[0] = mac[0] & 0xfc | 0x02;
    Ok(mac)
}

fn mac() -> Result<Vec<u8>, LinkError> {
    random_mac().map(Vec::from).map_err(LinkError::io("read /dev/urandom"))
}

/// Sets a per-device sysctl in the namespace of the calling thread, if it is not so already. A kernel without IPv6
/// has no such file; that is no error.
/// Returns whether it was not.
fn sysctl(family: &str, device: &str, key: &str, value: &str) -> Result<bool, LinkError> {
    let path = format!("/proc/sys/net/{family}/conf/{device}/{key}");
    match fs::read_to_string(&path) {
        Ok(now) if now.trim() == value => Ok(false),
        Ok(_) => fs::write(&path, value).map(|()| true).map_err(LinkError::io(format!("write {path}"))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(LinkError::io(format!("read {path}"))(e)),
    }
}

/// Our devices carry no addresses and speak to nobody by themselves. Returns how many sysctls were otherwise.
fn quiet(device: &str) -> Result<usize, LinkError> {
    let mut wanted = vec![
        ("ipv4", "rp_filter", "0"),
        ("ipv4", "arp_ignore", "8"),
        ("ipv6", "addr_gen_mode", "1"),
        ("ipv6", "accept_ra", "0"),
    ];
    if device == EGRESS_SIDE {
        // `bpf_fib_lookup` answers FWD_DISABLED for a device that does not forward.
        wanted.extend([("ipv4", "forwarding", "1"), ("ipv6", "forwarding", "1")]);
    }
    let mut n = 0;
    for (family, key, value) in wanted {
        n += usize::from(sysctl(family, device, key, value)?);
    }
    Ok(n)
}

impl Netlink {
    /// Makes sure that the tunnel device exists, is of our port and is up. One device in metadata mode listens on IPv4
    /// and on IPv6.
    ///
    /// # Errors
    /// The kernel refused: another metadata device has the port, or VXLAN is not there.
    pub async fn ensure_tunnel(&self, port: u16) -> Result<Link, LinkError> {
        let wanted = Kind::Vxlan { port, external: true };
        let found = self.link(TUNNEL).await?;
        if let Some(other) = found.as_ref().filter(|l| l.kind != wanted) {
            tracing::warn!(kind = ?other.kind, "device {TUNNEL} is not as it should be; making it anew");
            self.delete(TUNNEL).await?;
        }
        if found.is_none_or(|l| l.kind != wanted) {
            let message = LinkMessageBuilder::<LinkVxlan>::new(TUNNEL)
                .collect_metadata(true)
                .learning(false)
                .port(port)
                .address(mac()?)
                .mtu(TUNNEL_DEVICE_MTU)
                .build();
            let what = format!("make VXLAN device {TUNNEL} on port {port}");
            self.handle.link().add(message).execute().await.map_err(LinkError::netlink(what))?;
        }
        // Before it is up, so that no router solicitation or duplicate address detection is ever sent.
        quiet(TUNNEL)?;
        Ok(self.adjust(TUNNEL, TUNNEL_DEVICE_MTU, false).await?.0)
    }

    /// Puts right what others changed of our devices that are there: flags, MTU, sysctls. `pairs` are the MTUs of
    /// [`POD_SIDE`] and of [`EGRESS_SIDE`], where a gateway is plugged in. Returns how many devices and how many sysctls
    /// were otherwise.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn restore(&self, pairs: Option<(u32, u32)>) -> Result<(usize, usize), LinkError> {
        let (mut devices, mut sysctls) = (0, 0);
        let mut ours = vec![(TUNNEL, TUNNEL_DEVICE_MTU, false)];
        ours.extend(pairs.into_iter().flat_map(|(pods, egress)| [(POD_SIDE, pods, true), (EGRESS_SIDE, egress, true)]));
        for (name, mtu, silent) in ours {
            if self.link(name).await?.is_some() {
                sysctls += quiet(name)?;
                devices += usize::from(self.adjust(name, mtu, silent).await?.1);
            }
        }
        Ok((devices, sysctls))
    }

    /// Sets what is not as it should be and brings the device up; returns it, and whether something was otherwise.
    /// `silent` is for the devices of a gateway: no neighbour is looked for, and the kernel joins no group, of which it
    /// would have to tell.
    async fn adjust(&self, name: &str, mtu: u32, silent: bool) -> Result<(Link, bool), LinkError> {
        let gone = || LinkError::State(format!("device {name} is gone"));
        let link = self.link(name).await?.ok_or_else(gone)?;
        if link.up && link.mtu == mtu && (link.silent || !silent) {
            return Ok((link, false));
        }
        let mut message = LinkUnspec::new_with_index(link.index).up().mtu(mtu);
        if silent {
            message = message.arp(false).multicast(false);
        }
        let what = format!("set up device {name}");
        self.handle.link().change(message.build()).execute().await.map_err(LinkError::netlink(what))?;
        Ok((self.link(name).await?.ok_or_else(gone)?, true))
    }

    /// Plugs a gateway's network namespace in: two veth pairs. Pairs that are already plugged into that namespace stay
    /// as they are; ends in another namespace are deleted first.
    ///
    /// # Errors
    /// `netns` is no network namespace or is the node's own; the kernel refused.
    pub async fn plug(&self, netns: BorrowedFd<'_>, pod_mtu: u16, egress_mtu: u32) -> Result<Plugged, LinkError> {
        refuse_own(netns)?;
        self.pair(netns, POD_SIDE, POD_SIDE_INNER, pod_mtu.into()).await?;
        quiet(POD_SIDE)?;
        let (pod_side, _) = self.adjust(POD_SIDE, pod_mtu.into(), true).await?;
        self.pair(netns, EGRESS_SIDE, EGRESS_SIDE_INNER, egress_mtu).await?;
        quiet(EGRESS_SIDE)?;
        let (egress_side, _) = self.adjust(EGRESS_SIDE, egress_mtu, true).await?;
        Ok(Plugged { pod_side, egress_side })
    }

    /// Makes settings of a gateway's network namespace. Returns how many were otherwise.
    ///
    /// # Errors
    /// The namespace could not be entered, or the kernel refused.
    pub async fn settle(&self, netns: BorrowedFd<'_>, settings: Vec<Setting>) -> Result<usize, LinkError> {
        let apply = move |_| async move {
            let mut n = 0;
            for setting in &settings {
                n += usize::from(setting.apply().map_err(LinkError::io("settings of the gateway's namespace"))?);
            }
            Ok(n)
        };
        in_netns(netns, apply).await
    }

    async fn pair(&self, netns: BorrowedFd<'_>, outer: &str, inner: &str, mtu: u32) -> Result<(), LinkError> {
        let name = inner.to_owned();
        let inside = in_netns(netns, move |nl| async move { nl.link(&name).await }).await?;
        let found = self.link(outer).await?;
        let matched = match (&found, &inside) {
            (Some(o), Some(i)) => {
                o.kind == Kind::Veth && i.kind == Kind::Veth && o.peer == Some(i.index) && i.peer == Some(o.index)
            }
            _ => false,
        };
        if !matched {
            if found.is_some() {
                self.delete(outer).await?;
            }
            let name = inner.to_owned();
            in_netns(netns, move |nl| async move { nl.delete(&name).await }).await?;
            let peer = LinkMessageBuilder::<LinkUnspec>::default()
                .name(inner)
                .address(mac()?)
                .mtu(mtu)
                .arp(false)
                .multicast(false)
                .setns_by_fd(netns.as_raw_fd())
                .build();
            let message = pair_message(outer, mac()?, mtu, peer);
            let what = format!("make veth pair {outer}, {inner}");
            self.handle.link().add(message).execute().await.map_err(LinkError::netlink(what))?;
        }
        let name = inner.to_owned();
        let set_up = move |nl: Netlink| async move {
            // Before it is up: the first router solicitation comes at once.
            quiet(&name)?;
            nl.adjust(&name, mtu, true).await
        };
        in_netns(netns, set_up).await.map(drop)
    }
}

fn pair_message(outer: &str, mac: Vec<u8>, mtu: u32, peer: LinkMessage) -> LinkMessage {
    LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
        .name(outer)
        .address(mac)
        .mtu(mtu)
        .arp(false)
        .multicast(false)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .build()
}

/// A gateway in the node's own namespace would lose its devices among the node's.
fn refuse_own(netns: BorrowedFd<'_>) -> Result<(), LinkError> {
    let theirs = netns.try_clone_to_owned().map(fs::File::from).and_then(|f| f.metadata());
    let theirs = theirs.map_err(LinkError::io("look at the namespace"))?;
    let own = fs::metadata("/proc/thread-self/ns/net").map_err(LinkError::io("look at the own namespace"))?;
    if (theirs.dev(), theirs.ino()) == (own.dev(), own.ino()) {
        return Err(LinkError::State("the gateway is in the node's own network namespace".into()));
    }
    Ok(())
}

/// Runs a future with a netlink socket inside a network namespace, on a thread of its own: a thread that has changed
/// its namespace must never be a runtime's worker.
///
/// # Errors
/// The namespace could not be entered, or what the future says.
pub async fn in_netns<T, F, R>(netns: BorrowedFd<'_>, work: F) -> Result<T, LinkError>
where
    T: Send + 'static,
    F: FnOnce(Netlink) -> R + Send + 'static,
    R: Future<Output = Result<T, LinkError>>,
{
    let netns: OwnedFd = netns.try_clone_to_owned().map_err(LinkError::io("duplicate the namespace"))?;
    let (done, answer) = oneshot::channel();
    let inside = move || {
        nix::sched::setns(netns.as_fd(), nix::sched::CloneFlags::CLONE_NEWNET)
            .map_err(|e| LinkError::io("enter the namespace")(e.into()))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
        runtime.map_err(LinkError::io("runtime"))?.block_on(async { work(Netlink::open()?).await })
    };
    std::thread::Builder::new()
        .name("netns".into())
        // The asker may be gone; then nobody wants the answer.
        .spawn(move || drop(done.send(inside())))
        .map_err(LinkError::io("thread"))?;
    answer.await.unwrap_or_else(|_| Err(LinkError::State("the thread in the namespace died".into())))
}
