//! Coalesces a ClientHello out of any number of TCP segments and TLS records, and keeps the bytes
//! so that they can be forwarded as they came.

use tidegate_policy::Reason;

use crate::hello::{CLIENT_HELLO, Hello};
use crate::record::{HANDSHAKE, HEADER, MAX_PLAIN, Walk};

/// The most that a ClientHello may take on the wire, record headers included, in octets.
pub const MAX_HELLO: usize = 64 * 1024;

/// What is known after some bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The hello is not complete.
    NeedMore,
    /// The hello is complete and well formed.
    Hello(Hello),
    /// There will be no acceptable hello.
    Reject(Reason),
}

/// A hello in the making. At most [`MAX_HELLO`] octets, and what one more `push` brought, are kept.
#[derive(Debug, Default)]
pub struct Peek {
    raw: Vec<u8>,
    /// Octets of `raw` that were walked over.
    seen: usize,
    walk: Walk,
    /// The handshake header: type and length.
    head: [u8; 4],
    /// Octets of the handshake message seen, header included.
    have: usize,
    records: usize,
    done: Option<Progress>,
}

impl Peek {
    /// A peek that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes of the stream. Once it has answered anything but
    /// [`Progress::NeedMore`], it keeps that answer and only collects bytes.
    pub fn push(&mut self, bytes: &[u8]) -> Progress {
        self.raw.extend_from_slice(bytes);
        if let Some(done) = &self.done {
            return done.clone();
        }
        let progress = match self.advance() {
            Ok(None) if self.raw.len() >= MAX_HELLO => Progress::Reject(Reason::HelloTooLarge),
            Ok(None) => return Progress::NeedMore,
            Ok(Some(hello)) => Progress::Hello(hello),
            Err(reason) => Progress::Reject(reason),
        };
        self.done = Some(progress.clone());
        progress
    }

    /// All bytes pushed, and how many of them are the records of the hello. What follows is the
    /// client's next flight and must still pass the [`Gate`](crate::Gate).
    pub fn into_bytes(self) -> (Vec<u8>, usize) {
        (self.raw, self.seen)
    }

    /// Whether no byte was pushed.
    pub fn is_empty(&self) -> bool {
        self.raw.is_empty()
    }

    fn advance(&mut self) -> Result<Option<Hello>, Reason> {
        while self.seen < self.raw.len() {
            let rest = &self.raw[self.seen..];
            // Nothing may come between the records of one message (RFC 8446, section 5.1).
            let piece = self.walk.next(rest).ok().filter(|p| p.kind == HANDSHAKE).ok_or(self.unreadable())?;
            self.records += usize::from(piece.first);
            let body = &rest[piece.header..piece.len];
            for (to, from) in self.head.iter_mut().skip(self.have).zip(body) {
                *to = *from;
            }
            self.have += body.len();
            self.seen += piece.len;
            if let Some(total) = self.total()? {
                if self.have + self.walk.left() > total {
                    // Something follows the hello in its last record: no client may know what to say there.
                    return Err(Reason::HelloMalformed);
                }
                if self.seen > MAX_HELLO {
                    return Err(Reason::HelloTooLarge);
                }
                if self.have == total {
                    return self.parse(total).map(Some);
                }
            }
        }
        Ok(None)
    }

    /// Before any handshake octet it is not TLS; later it is TLS that is broken.
    fn unreadable(&self) -> Reason {
        if self.have > 0 { Reason::HelloMalformed } else { Reason::NotTls }
    }

    /// The message's length with its header, as soon as it is known.
    fn total(&self) -> Result<Option<usize>, Reason> {
        if self.have > 0 && self.head[0] != CLIENT_HELLO {
            return Err(Reason::HelloMalformed);
        }
        if self.have < self.head.len() {
            return Ok(None);
        }
        let [_, a, b, c] = self.head;
        let total = self.head.len() + u32::from_be_bytes([0, a, b, c]) as usize;
        // Whatever the cut, every 2^14 octets need a record header of their own.
        if total + total.div_ceil(MAX_PLAIN) * HEADER > MAX_HELLO {
            return Err(Reason::HelloTooLarge);
        }
        Ok(Some(total))
    }

    fn parse(&self, total: usize) -> Result<Hello, Reason> {
        if self.records == 1 {
            return Hello::parse(&self.raw[HEADER + self.head.len()..self.seen]);
        }
        let mut message = Vec::with_capacity(total);
        let mut rest = &self.raw[..self.seen];
        while let Some((header, tail)) = rest.split_at_checked(HEADER) {
            let len = usize::from(u16::from_be_bytes([header[3], header[4]])).min(tail.len());
            message.extend_from_slice(&tail[..len]);
            rest = &tail[len..];
        }
        Hello::parse(&message[self.head.len()..])
    }
}
