//! Pipes to splice through: pooled per thread, held only while they carry data.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

/// What one pipe holds, in bytes. Bigger pipes mean fewer calls; this is where the gain ends.
const SIZE: usize = 256 * 1024;
/// How many requests go without after a pipe could not be made.
const PAUSE: u32 = 1024;

#[derive(Default)]
struct Pool {
    idle: Vec<(OwnedFd, OwnedFd)>,
    made: usize,
    most: usize,
    pause: u32,
}

thread_local! {
    static POOL: RefCell<Pool> = RefCell::default();
}

/// Allows this thread so many pipes.
pub(crate) fn allow(most: usize) {
    POOL.with_borrow_mut(|p| p.most = most);
}

/// A pipe, empty when taken. An empty one goes back to the pool when dropped; one with data in it is closed.
pub(crate) struct Pipe {
    ends: Option<(OwnedFd, OwnedFd)>,
    held: usize,
}

impl Pipe {
    /// A pipe of this thread, if it may have one more.
    pub fn take() -> Option<Self> {
        let ends = POOL.with_borrow_mut(|p| {
            if let Some(ends) = p.idle.pop() {
                return Some(ends);
            }
            if p.made >= p.most {
                return None;
            }
            if p.pause > 0 {
                p.pause -= 1;
                return None;
            }
            match make() {
                Ok(ends) => {
                    p.made += 1;
                    Some(ends)
                }
                Err(error) => {
                    tracing::debug!(%error, "no pipe to splice through");
                    p.pause = PAUSE;
                    None
                }
            }
        })?;
        Some(Self { ends: Some(ends), held: 0 })
    }

    /// Bytes in the pipe.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Moves what `from` has, at most what the pipe takes. 0 is the end of the data.
    pub fn fill(&mut self, from: impl AsFd) -> io::Result<usize> {
        let Some((_, write)) = &self.ends else { return Ok(0) };
        let n = splice(from, None, write, None, SIZE, SpliceFlags::NONBLOCK | SpliceFlags::MOVE)?;
        self.held += n;
        Ok(n)
    }

    /// Moves what the pipe holds, at most what `to` takes.
    pub fn empty(&mut self, to: impl AsFd) -> io::Result<usize> {
        let Some((read, _)) = &self.ends else { return Ok(0) };
        let n = splice(read, None, to, None, self.held, SpliceFlags::NONBLOCK | SpliceFlags::MOVE)?;
        self.held -= n.min(self.held);
        Ok(n)
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        let ends = self.ends.take();
        let clean = self.held == 0;
        // At the thread's end the pool may be gone already: then the pipe just closes.
        let _ = POOL.try_with(|p| {
            let mut p = p.borrow_mut();
            match ends {
                Some(ends) if clean => p.idle.push(ends),
                _ => p.made -= 1,
            }
        });
    }
}

/// A pipe of the full size: a user over its limit gets tiny ones, which are worse than the buffer.
fn make() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    fcntl_setpipe_size(&write, SIZE)?;
    Ok((read, write))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn only_empty_pipes_come_back() {
        allow(1);
        let (mut a, b) = UnixStream::pair().unwrap();
        let (c, mut d) = UnixStream::pair().unwrap();
        a.write_all(b"tide").unwrap();
        let mut pipe = Pipe::take().unwrap();
        assert!(Pipe::take().is_none());
        assert_eq!(pipe.fill(&b).unwrap(), 4);
        assert_eq!(pipe.held(), 4);
        assert_eq!(pipe.empty(&c).unwrap(), 4);
        let mut got = [0; 4];
        d.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"tide");
        drop(pipe);
        a.write_all(b"left").unwrap();
        let mut pipe = Pipe::take().unwrap();
        pipe.fill(&b).unwrap();
        drop(pipe);
        let mut fresh = Pipe::take().unwrap();
        assert_eq!(fresh.held(), 0);
        a.write_all(b"new").unwrap();
        assert_eq!(fresh.fill(&b).unwrap(), 3);
        fresh.empty(&c).unwrap();
        let mut got = [0; 3];
        d.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"new");
    }
}
