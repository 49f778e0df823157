//! Connections with what they hold; those of strangers end in time, whatever they do.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// The longest life of a connection or a stream: its end must be a moment that a timer knows.
pub const LONGEST: Duration = Duration::from_secs(365 * 86_400);

/// A connection that ends in time, if it has to, even if its client neither asks nor reads. `G` is held as long.
pub struct Timed<S, G> {
    stream: S,
    end: Option<Pin<Box<Sleep>>>,
    held: G,
}

impl<S, G> Timed<S, G> {
    /// Gives a connection so long, at most [`LONGEST`].
    pub fn new(stream: S, life: Duration, held: G) -> Self {
        Self { stream, end: Some(Box::pin(sleep(life.min(LONGEST)))), held }
    }

    /// One that ends by itself.
    pub fn endless(stream: S, held: G) -> Self {
        Self { stream, end: None, held }
    }

    /// What it holds.
    pub fn held(&self) -> &G {
        &self.held
    }

    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.end.as_mut().map(|end| end.as_mut().poll(cx)) {
            Some(Poll::Ready(())) => Err(io::ErrorKind::TimedOut.into()),
            Some(Poll::Pending) | None => Ok(()),
        }
    }
}

impl<S: AsyncRead + Unpin, G: Unpin> AsyncRead for Timed<S, G> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin, G: Unpin> AsyncWrite for Timed<S, G> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
