//! What a client may send between its first ClientHello and the server's answer.
//!
//! A server that answers with a HelloRetryRequest acts on the second ClientHello, so that one must
//! name the same server. And a client that knows its server could send both at once: until the
//! server's first flight is known, no second handshake message passes.

use tidegate_policy::Reason;

use crate::hello::Hello;
use crate::peek::{Peek, Progress};
use crate::record::{ALERT, CHANGE_CIPHER_SPEC, HANDSHAKE, NotTls, Walk};

/// `SHA-256("HelloRetryRequest")`, the random of a ServerHello that is a HelloRetryRequest (RFC 8446, section 4.1.3).
pub const RETRY_RANDOM: [u8; 32] = [
    0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11, 0xbe, 0x1d, 0x8c, 0x02, 0x1e, 0x65, 0xb8, 0x91, 0xc2, 0xa2, 0x11,
    0x16, 0x7a, 0xbb, 0x8c, 0x5e, 0x07, 0x9e, 0x09, 0xe2, 0xc8, 0xa8, 0x33, 0x9c,
];

/// Handshake type `server_hello`.
const SERVER_HELLO: u8 = 2;
/// Type, length, legacy_version and random of a ServerHello.
const SERVER_HEAD: usize = 4 + 2 + 32;

#[derive(Debug)]
enum State {
    /// The server has not answered yet.
    Waiting,
    /// It asked for a second hello, of which this is known.
    Retry(Peek),
    /// Nothing is left to check.
    Open,
}

/// Watches both directions of one connection until no more hello can follow.
#[derive(Debug)]
pub struct Gate {
    first: Hello,
    state: State,
    server: Walk,
    client: Walk,
    head: [u8; SERVER_HEAD],
    have: usize,
}

impl Gate {
    /// A gate behind the hello that was judged and forwarded.
    pub fn new(first: Hello) -> Self {
        Self {
            first,
            state: State::Waiting,
            server: Walk::default(),
            client: Walk::default(),
            head: [0; SERVER_HEAD],
            have: 0,
        }
    }

    /// Whether nothing is left to check: both directions may then move bytes without this gate.
    pub fn is_open(&self) -> bool {
        matches!(self.state, State::Open)
    }

    /// Whether the server asked for a second hello that has not passed yet.
    pub fn is_retry(&self) -> bool {
        matches!(self.state, State::Retry(_))
    }

    /// Reads bytes of the server, before they are forwarded.
    pub fn server(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && matches!(self.state, State::Waiting) {
            let Ok(piece) = self.server.next(bytes) else {
                self.state = State::Open;
                return;
            };
            let body = &bytes[piece.header..piece.len];
            match piece.kind {
                // A warning may precede the ServerHello (RFC 6066, section 3: unrecognized_name).
                ALERT | CHANGE_CIPHER_SPEC => {}
                HANDSHAKE => {
                    for (to, from) in self.head.iter_mut().skip(self.have).zip(body) {
                        *to = *from;
                    }
                    self.have = (self.have + body.len()).min(SERVER_HEAD);
                    if self.have > 0 && self.head[0] != SERVER_HELLO {
                        self.state = State::Open;
                    } else if self.have == SERVER_HEAD {
                        self.state =
                            if self.head[6..] == RETRY_RANDOM { State::Retry(Peek::new()) } else { State::Open };
                    }
                }
                _ => self.state = State::Open,
            }
            bytes = &bytes[piece.len..];
        }
    }

    /// Reads bytes of the client and appends to `out` what may be forwarded now. A second hello is
    /// held until it is complete and checked.
    ///
    /// # Errors
    /// [`Reason::SniMismatch`] or [`Reason::Ech`] if the second hello differs from the first in that,
    /// and what [`Peek`] rejects. [`Reason::HelloMalformed`] for a handshake message before the server
    /// answered. The connection must then end; `out` is not to be sent.
    pub fn client(&mut self, mut bytes: &[u8], out: &mut Vec<u8>) -> Result<(), Reason> {
        while !bytes.is_empty() {
            match &mut self.state {
                State::Open => {
                    out.extend_from_slice(bytes);
                    return Ok(());
                }
                State::Retry(peek) if !peek.is_empty() => return self.second(bytes, out),
                State::Waiting | State::Retry(_) => {}
            }
            if bytes[0] == HANDSHAKE && self.client.at_record() {
                if !self.is_retry() {
                    return Err(Reason::HelloMalformed);
                }
                return self.second(bytes, out);
            }
            // Early data, a change_cipher_spec for middleboxes, an alert.
            let piece = self.client.next(bytes).map_err(|NotTls| Reason::HelloMalformed)?;
            out.extend_from_slice(&bytes[..piece.len]);
            bytes = &bytes[piece.len..];
        }
        Ok(())
    }

    fn second(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<(), Reason> {
        let State::Retry(peek) = &mut self.state else {
            return Err(Reason::HelloMalformed);
        };
        match peek.push(bytes) {
            Progress::NeedMore => Ok(()),
            Progress::Reject(reason) => Err(reason),
            Progress::Hello(hello) if hello.sni != self.first.sni => Err(Reason::SniMismatch),
            Progress::Hello(hello) if hello.ech != self.first.ech => Err(Reason::Ech),
            Progress::Hello(_) => {
                // A server must not ask a third time (RFC 8446, section 4.1.4): all that follows is protected.
                let (raw, _) = std::mem::take(peek).into_bytes();
                out.extend_from_slice(&raw);
                self.state = State::Open;
                Ok(())
            }
        }
    }
}
