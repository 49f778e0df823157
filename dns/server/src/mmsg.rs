//! Batches of datagrams with their original destination: the one place with
//! `unsafe`, since a message's control data differs from its neighbour's.

use std::io;
use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Most datagrams of one batch. The first reply leaves after the last query of its batch is answered: with 64 the
/// slowest hundredth of queries waited for a whole batch, and from 16 on the calls cost next to nothing for each.
pub const BATCH: usize = 16;
/// Octets of a datagram that are kept; a longer one is no query and fails to parse.
const DATAGRAM: usize = 2048;

/// Room for the control messages of one datagram, aligned as the kernel wants.
type Control = [u64; 32];

/// One datagram that came in.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    len: usize,
    /// Who sent it.
    pub client: SocketAddr,
    /// Where it was sent to, before TPROXY; absent if the kernel did not say.
    pub server: Option<SocketAddr>,
}

/// Buffers of one worker.
pub struct Batch {
    data: Box<[[u8; DATAGRAM]]>,
    names: Box<[libc::sockaddr_storage]>,
    controls: Box<[Control]>,
    /// What recvmmsg fills, pointing to the buffers above: made once, for at low rates a batch is one
    /// datagram, and writing [`BATCH`] headers for it costs more than answering it.
    incoming: Box<[libc::mmsghdr]>,
    /// The pieces that `incoming` points to.
    _pieces: Box<[libc::iovec]>,
    /// How many of `incoming` the kernel may have written since they were set.
    touched: usize,
    outgoing: Box<[libc::mmsghdr]>,
    out_pieces: Box<[libc::iovec]>,
    received: Vec<Received>,
    replies: Vec<Reply>,
    used: usize,
}

struct Reply {
    data: Vec<u8>,
    client: SocketAddr,
    server: SocketAddr,
}

fn zeroed<T: Copy>(value: T) -> Box<[T]> {
    vec![value; BATCH].into_boxed_slice()
}

impl Batch {
    /// Buffers for [`BATCH`] datagrams each way.
    pub fn new() -> Self {
        // SAFETY: all-zero bytes are valid for these plain C structs: null pointers and zero lengths.
        let (name, header, piece): (libc::sockaddr_storage, libc::mmsghdr, libc::iovec) = unsafe { mem::zeroed() };
        let (mut data, mut names, mut controls) = (zeroed([0; DATAGRAM]), zeroed(name), zeroed([0; 32]));
        let (mut incoming, mut pieces) = (zeroed(header), zeroed(piece));
        for i in 0..BATCH {
            pieces[i] = libc::iovec { iov_base: data[i].as_mut_ptr().cast(), iov_len: DATAGRAM };
            let h = &mut incoming[i].msg_hdr;
            h.msg_name = (&raw mut names[i]).cast();
            h.msg_iov = &raw mut pieces[i];
            h.msg_iovlen = 1;
            h.msg_control = controls[i].as_mut_ptr().cast();
        }
        Self {
            data,
            names,
            controls,
            incoming,
            _pieces: pieces,
            touched: BATCH,
            outgoing: zeroed(header),
            out_pieces: zeroed(piece),
            received: Vec::with_capacity(BATCH),
            replies: Vec::with_capacity(BATCH),
            used: 0,
        }
    }

    /// Waits for datagrams (bounded by SO_RCVTIMEO) and takes as many as are there.
    pub fn receive(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        self.received.clear();
        self.used = 0;
        for h in &mut self.incoming[..self.touched] {
            h.msg_hdr.msg_namelen = size_of::<libc::sockaddr_storage>() as u32;
            h.msg_hdr.msg_controllen = size_of::<Control>() as _;
            h.msg_hdr.msg_flags = 0;
        }
        // SAFETY: every header points to buffers of self, which are on the heap and stay where they are as long as
        // self lives, with their true lengths: `new` set the fixed ones, the loop those that the kernel changes.
        let n = unsafe {
            libc::recvmmsg(
                fd.as_raw_fd(),
                self.incoming.as_mut_ptr(),
                BATCH as u32,
                libc::MSG_WAITFORONE as _,
                std::ptr::null_mut(),
            )
        };
        let n = usize::try_from(n).map_err(|_| io::Error::last_os_error());
        // The one after the last may have been begun.
        self.touched = (*n.as_ref().unwrap_or(&0) + 1).min(BATCH);
        let n = n?;
        for (i, h) in self.incoming.iter().enumerate().take(n) {
            let len = (h.msg_len as usize).min(DATAGRAM);
            let unspecified = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
            let client = address(&self.names[i]).unwrap_or(unspecified);
            self.received.push(Received { len, client, server: destination(&h.msg_hdr) });
        }
        Ok(n)
    }

    /// One datagram of the last batch.
    pub fn get(&self, i: usize) -> Option<(&[u8], Received)> {
        let r = self.received.get(i)?;
        Some((&self.data[i][..r.len], *r))
    }

    /// Queues a reply; buffers are used again.
    pub fn push(&mut self, data: &[u8], client: SocketAddr, server: SocketAddr) {
        match self.replies.get_mut(self.used) {
            Some(r) => {
                r.data.clear();
                r.data.extend_from_slice(data);
                (r.client, r.server) = (client, server);
            }
            None => {
                let mut copy = Vec::with_capacity(DATAGRAM);
                copy.extend_from_slice(data);
                self.replies.push(Reply { data: copy, client, server });
            }
        }
        self.used += 1;
    }

    /// Sends the queued replies. Returns how many the kernel refused: sendmmsg
    /// stops at one that fails, so it is skipped.
    pub fn send(&mut self, fd: BorrowedFd<'_>, v6: bool) -> usize {
        let mut failed = 0;
        let used = self.used.min(BATCH);
        for (i, r) in self.replies.iter().take(used).enumerate() {
            let control = &mut self.controls[i];
            let name_len = write_address(&mut self.names[i], r.client, v6);
            let control_len = write_source(control, r.server.ip());
            self.out_pieces[i] = libc::iovec { iov_base: r.data.as_ptr().cast_mut().cast(), iov_len: r.data.len() };
            let h = &mut self.outgoing[i].msg_hdr;
            h.msg_name = (&raw mut self.names[i]).cast();
            h.msg_namelen = name_len;
            h.msg_iov = &raw mut self.out_pieces[i];
            h.msg_iovlen = 1;
            h.msg_control = control.as_mut_ptr().cast();
            h.msg_controllen = control_len as _;
        }
        let mut at = 0;
        while at < used {
            let rest = &mut self.outgoing[at..used];
            // SAFETY: every header of the slice points to buffers that outlive the call; the kernel only reads them.
            let n = unsafe { libc::sendmmsg(fd.as_raw_fd(), rest.as_mut_ptr(), rest.len() as u32, 0) };
            match usize::try_from(n) {
                Ok(n) if n > 0 => at += n,
                _ if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
                _ => {
                    failed += 1;
                    at += 1;
                }
            }
        }
        self.used = 0;
        failed
    }
}

/// Sends one reply without waiting.
pub fn send_one(fd: BorrowedFd<'_>, data: &[u8], client: SocketAddr, server: SocketAddr, v6: bool) -> io::Result<()> {
    // SAFETY: all-zero bytes are valid for these plain C structs.
    let (mut name, mut header): (libc::sockaddr_storage, libc::msghdr) = unsafe { (mem::zeroed(), mem::zeroed()) };
    let mut control: Control = [0; 32];
    let mut iovec = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    header.msg_namelen = write_address(&mut name, client, v6);
    header.msg_controllen = write_source(&mut control, server.ip()) as _;
    header.msg_name = (&raw mut name).cast();
    header.msg_iov = &raw mut iovec;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    // SAFETY: the header points to locals and to `data`, which outlive the call; the kernel only reads them.
    let n = unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const header, libc::MSG_DONTWAIT) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn canonical(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip.to_canonical(), port)
}

/// Reads an address that the kernel wrote; IPv4 comes out as IPv4 whatever the socket.
fn address(s: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match i32::from(s.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says that the storage holds a sockaddr_in, which is smaller and less aligned.
            let a = unsafe { &*(&raw const *s).cast::<libc::sockaddr_in>() };
            Some(from_in(a))
        }
        libc::AF_INET6 => {
            // SAFETY: as above for sockaddr_in6.
            let a = unsafe { &*(&raw const *s).cast::<libc::sockaddr_in6>() };
            Some(from_in6(a))
        }
        _ => None,
    }
}

fn from_in(a: &libc::sockaddr_in) -> SocketAddr {
    canonical(IpAddr::V4(Ipv4Addr::from(u32::from_be(a.sin_addr.s_addr))), u16::from_be(a.sin_port))
}

fn from_in6(a: &libc::sockaddr_in6) -> SocketAddr {
    canonical(IpAddr::V6(Ipv6Addr::from(a.sin6_addr.s6_addr)), u16::from_be(a.sin6_port))
}

/// Reads the original destination out of the control messages.
fn destination(header: &libc::msghdr) -> Option<SocketAddr> {
    let mut found = None;
    // SAFETY: the header is as the kernel left it, with its control buffer alive.
    let mut cmsg = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !cmsg.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return only headers that lie in the buffer.
        let (level, kind, len, data) =
            unsafe { ((*cmsg).cmsg_level, (*cmsg).cmsg_type, (*cmsg).cmsg_len as usize, libc::CMSG_DATA(cmsg)) };
        // SAFETY: CMSG_LEN only computes.
        let fits = |size: usize| len >= unsafe { libc::CMSG_LEN(size as u32) } as usize;
        match (level, kind) {
            (libc::SOL_IP, libc::IP_ORIGDSTADDR) if fits(size_of::<libc::sockaddr_in>()) => {
                // SAFETY: the message has this type and length; it may be unaligned.
                let a = unsafe { data.cast::<libc::sockaddr_in>().read_unaligned() };
                found = Some(from_in(&a));
            }
            (libc::SOL_IPV6, libc::IPV6_ORIGDSTADDR) if fits(size_of::<libc::sockaddr_in6>()) => {
                // SAFETY: as above.
                let a = unsafe { data.cast::<libc::sockaddr_in6>().read_unaligned() };
                // For an IPv4 packet on an IPv6 socket the IPv4 message decides.
                found.get_or_insert(from_in6(&a));
            }
            _ => {}
        }
        // SAFETY: `cmsg` is a header of this buffer.
        cmsg = unsafe { libc::CMSG_NXTHDR(header, cmsg) };
    }
    found
}

/// Writes where a datagram goes, as the socket's family wants it. Returns the length.
fn write_address(s: &mut libc::sockaddr_storage, to: SocketAddr, v6: bool) -> libc::socklen_t {
    match to.ip() {
        IpAddr::V4(ip) if !v6 => {
            // SAFETY: sockaddr_storage is larger than sockaddr_in and at least as aligned.
            let a = unsafe { &mut *(&raw mut *s).cast::<libc::sockaddr_in>() };
            a.sin_family = libc::AF_INET as _;
            a.sin_port = to.port().to_be();
            a.sin_addr.s_addr = u32::from(ip).to_be();
            a.sin_zero = [0; 8];
            size_of::<libc::sockaddr_in>() as _
        }
        ip => {
            let ip = match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                IpAddr::V6(ip) => ip,
            };
            // SAFETY: as above for sockaddr_in6.
            let a = unsafe { &mut *(&raw mut *s).cast::<libc::sockaddr_in6>() };
            a.sin6_family = libc::AF_INET6 as _;
            a.sin6_port = to.port().to_be();
            a.sin6_flowinfo = 0;
            a.sin6_scope_id = 0;
            a.sin6_addr.s6_addr = ip.octets();
            size_of::<libc::sockaddr_in6>() as _
        }
    }
}

/// Writes the control message that sets the source address. Returns its length.
fn write_source(control: &mut Control, from: IpAddr) -> usize {
    control.fill(0);
    match from {
        IpAddr::V4(ip) => {
            let addr = libc::in_addr { s_addr: u32::from(ip).to_be() };
            let info = libc::in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: addr, ipi_addr: libc::in_addr { s_addr: 0 } };
            write_control(control, libc::SOL_IP, libc::IP_PKTINFO, info)
        }
        IpAddr::V6(ip) => {
            let info = libc::in6_pktinfo { ipi6_addr: libc::in6_addr { s6_addr: ip.octets() }, ipi6_ifindex: 0 };
            write_control(control, libc::SOL_IPV6, libc::IPV6_PKTINFO, info)
        }
    }
}

fn write_control<T: Copy>(control: &mut Control, level: i32, kind: i32, value: T) -> usize {
    let size = size_of::<T>() as u32;
    let header: *mut libc::cmsghdr = control.as_mut_ptr().cast();
    // SAFETY: Control is aligned for a header, and 256 octets hold a header with either pktinfo struct.
    unsafe {
        (*header).cmsg_level = level;
        (*header).cmsg_type = kind;
        (*header).cmsg_len = libc::CMSG_LEN(size) as _;
        libc::CMSG_DATA(header).cast::<T>().write_unaligned(value);
        libc::CMSG_SPACE(size) as usize
    }
}
