//! The readiness of many sockets, and a timer that is one of them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// An edge-triggered epoll instance; tokens say who is ready.
pub struct Poll {
    epoll: Epoll,
    events: Vec<EpollEvent>,
}

impl Poll {
    /// An empty one.
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?, events: vec![EpollEvent::empty(); 256] })
    }

    /// Watches a descriptor both ways; it leaves when it is closed.
    pub fn add(&self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        let both = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
        Ok(self.epoll.add(fd, EpollEvent::new(both, token))?)
    }

    /// Waits, and returns the tokens that may be ready.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Vec<u64> {
        let limit = timeout
            .map_or(EpollTimeout::NONE, |t| EpollTimeout::from(u16::try_from(t.as_millis()).unwrap_or(u16::MAX)));
        // An interrupted wait found nothing.
        let n = self.epoll.wait(&mut self.events, limit).unwrap_or(0);
        self.events[..n].iter().map(EpollEvent::data).collect()
    }
}

/// Ticks at an even interval.
pub struct Ticker(TimerFd);

impl Ticker {
    /// Starts at once.
    pub fn new(interval: Duration) -> io::Result<Self> {
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
        timer.set(Expiration::Interval(TimeSpec::from_duration(interval)), TimerSetTimeFlags::empty())?;
        Ok(Self(timer))
    }

    /// Takes note of a tick: the kernel sets the next one only then.
    pub fn ticked(&self) {
        // Fails when there was no tick, which is as well.
        let _ = self.0.wait();
    }
}

impl AsFd for Ticker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_ticker_goes_on() {
        let mut poll = Poll::new().unwrap();
        let ticker = Ticker::new(Duration::from_millis(1)).unwrap();
        poll.add(ticker.as_fd(), 7).unwrap();
        let start = Instant::now();
        for _ in 0..20 {
            assert_eq!(poll.wait(Some(Duration::from_secs(5))), [7]);
            ticker.ticked();
        }
        assert!(start.elapsed() < Duration::from_secs(4), "no wait ran into its limit");
    }
}
