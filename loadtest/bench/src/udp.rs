//! Batches of datagrams on a connected socket.

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

/// Datagrams of one system call.
pub const BATCH: usize = 64;
const SIZE: usize = 512;

/// Buffers for one direction.
pub struct Batch {
    data: Box<[[u8; SIZE]; BATCH]>,
    lens: [usize; BATCH],
}

impl Batch {
    /// Empty buffers.
    pub fn new() -> Self {
        Self { data: Box::new([[0; SIZE]; BATCH]), lens: [0; BATCH] }
    }

    /// Sets datagram `i`, which must be shorter than 512 octets.
    pub fn set(&mut self, i: usize, bytes: &[u8]) -> &mut [u8] {
        self.lens[i] = bytes.len();
        self.data[i][..bytes.len()].copy_from_slice(bytes);
        &mut self.data[i][..bytes.len()]
    }

    /// Datagram `i`.
    pub fn get(&self, i: usize) -> &[u8] {
        &self.data[i][..self.lens[i]]
    }

    fn call(
        &mut self,
        n: usize,
        names: Option<&mut [libc::sockaddr_storage; BATCH]>,
        call: impl Fn(*mut libc::mmsghdr) -> libc::c_int,
        capacity: Option<usize>,
    ) -> io::Result<usize> {
        let mut iovecs: [libc::iovec; BATCH] = std::array::from_fn(|i| libc::iovec {
            iov_base: self.data[i].as_mut_ptr().cast(),
            iov_len: capacity.unwrap_or(self.lens[i]),
        });
        // SAFETY: all-zero bytes are a valid mmsghdr: null pointers and zero lengths.
        let mut headers: [libc::mmsghdr; BATCH] = unsafe { std::mem::zeroed() };
        for (i, h) in headers.iter_mut().enumerate().take(n) {
            h.msg_hdr.msg_iov = &raw mut iovecs[i];
            h.msg_hdr.msg_iovlen = 1;
        }
        if let Some(names) = names {
            for (h, name) in headers.iter_mut().zip(names) {
                h.msg_hdr.msg_name = (&raw mut *name).cast();
                h.msg_hdr.msg_namelen = size_of::<libc::sockaddr_storage>() as u32;
            }
        }
        let done = usize::try_from(call(headers.as_mut_ptr())).map_err(|_| io::Error::last_os_error())?;
        if capacity.is_some() {
            for (len, h) in self.lens.iter_mut().zip(&headers).take(done) {
                *len = (h.msg_len as usize).min(SIZE);
            }
        }
        Ok(done)
    }

    /// Sends the first `n` datagrams; returns how many went.
    pub fn send(&mut self, socket: &UdpSocket, n: usize) -> io::Result<usize> {
        let fd = socket.as_raw_fd();
        // SAFETY: `call` passes headers of BATCH messages whose buffers outlive it; `n` is at most BATCH.
        self.call(n, None, |h| unsafe { libc::sendmmsg(fd, h, n.min(BATCH) as u32, 0) }, None)
    }

    /// Takes what is there; with `wait` waits for the first.
    pub fn receive(&mut self, socket: &UdpSocket, wait: bool) -> io::Result<usize> {
        let fd = socket.as_raw_fd();
        let flags = if wait { libc::MSG_WAITFORONE } else { libc::MSG_DONTWAIT };
        // SAFETY: as in `send`; the kernel writes at most SIZE octets into each buffer.
        let call = |h| unsafe { libc::recvmmsg(fd, h, BATCH as u32, flags as _, std::ptr::null_mut()) };
        self.call(BATCH, None, call, Some(SIZE))
    }

    /// Sends every datagram back to where it came from, with the response bit set, forever: the least that a server can do.
    pub fn echo(&mut self, socket: &UdpSocket) -> io::Result<()> {
        let fd = socket.as_raw_fd();
        // SAFETY: all-zero bytes are a valid sockaddr_storage, a plain C struct.
        let mut names: [libc::sockaddr_storage; BATCH] = unsafe { std::mem::zeroed() };
        loop {
            // SAFETY: as in `receive`; names are as large as their headers say.
            let call =
                |h| unsafe { libc::recvmmsg(fd, h, BATCH as u32, libc::MSG_WAITFORONE as _, std::ptr::null_mut()) };
            let n = self.call(BATCH, Some(&mut names), call, Some(SIZE))?;
            for i in 0..n {
                if let Some(flags) = self.data[i].get_mut(2) {
                    *flags |= 0x80;
                }
            }
            // SAFETY: as in `send`; `n` is at most BATCH.
            let _ = self.call(n, Some(&mut names), |h| unsafe { libc::sendmmsg(fd, h, n as u32, 0) }, None);
        }
    }
}
