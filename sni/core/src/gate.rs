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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{hello, host, message, record, records};
    use proptest::prelude::*;

    fn server_hello(random: [u8; 32]) -> Vec<u8> {
        message(2, &[&[3, 3][..], &random, &[0, 0x13, 1, 0, 0, 0]].concat())
    }

    fn behind(name: &str) -> Gate {
        Gate::new(Hello::parse(&hello(&[host(name)])[4..]).unwrap())
    }

    fn retrying(name: &str) -> Gate {
        let mut gate = behind(name);
        gate.server(&record(22, &server_hello(RETRY_RANDOM)));
        assert!(gate.is_retry());
        gate
    }

    #[test]
    fn a_server_hello_opens_and_a_retry_does_not_however_they_are_cut() {
        let warning = record(21, &[1, 112]);
        for (random, retry) in [([5; 32], false), (RETRY_RANDOM, true)] {
            for size in [1, 6, 37, 100] {
                let stream = [warning.clone(), records(&server_hello(random), size)].concat();
                for cut in 0..stream.len() {
                    let mut gate = behind("a.example");
                    gate.server(&stream[..cut]);
                    gate.server(&stream[cut..]);
                    assert_eq!((gate.is_retry(), gate.is_open()), (retry, !retry), "{size} {cut}");
                }
            }
        }
        // Not TLS: then there is no second hello.
        let mut gate = behind("a.example");
        gate.server(b"HTTP/1.1 400");
        assert!(gate.is_open());
    }

    #[test]
    fn no_second_hello_before_the_server_answered() {
        let mut out = Vec::new();
        let mut gate = behind("a.example");
        let early = [record(20, &[1]), record(23, &[4; 90])].concat();
        for chunk in early.chunks(7) {
            gate.client(chunk, &mut out).unwrap();
        }
        assert_eq!(out, early);
        let second = record(22, &hello(&[host("a.example")]));
        assert_eq!(gate.client(&second, &mut out), Err(Reason::HelloMalformed));
        assert_eq!(out, early);
    }

    #[test]
    fn the_second_hello_passes_whole_or_not_at_all() {
        let second = records(&hello(&[host("A.example."), (44, vec![0, 0])]), 40);
        let after = record(23, &[6; 20]);
        let stream = [record(20, &[1]), record(23, &[4; 30]), second, after].concat();
        let until = stream.len() - 25;
        for step in [1, 3, 64, 1000] {
            let mut gate = retrying("a.example");
            let mut out = Vec::new();
            let mut sent = 0;
            for chunk in stream.chunks(step) {
                gate.client(chunk, &mut out).unwrap();
                sent += chunk.len();
                assert!(sent >= until || out.len() <= 6 + 35, "held until it is whole");
            }
            assert_eq!(out, stream);
            assert!(gate.is_open());
        }
    }

    #[test]
    fn the_second_hello_must_say_what_the_first_said() {
        let second = |extensions: &[(u16, Vec<u8>)]| {
            let mut out = Vec::new();
            let stream = [record(20, &[1]), record(22, &hello(extensions))].concat();
            let result = retrying("a.example").client(&stream, &mut out);
            assert_eq!(out.len() > 6, result.is_ok(), "nothing of a refused hello passes");
            result
        };
        assert_eq!(second(&[host("a.example")]), Ok(()));
        assert_eq!(second(&[host("b.example")]), Err(Reason::SniMismatch));
        assert_eq!(second(&[]), Err(Reason::SniMismatch));
        assert_eq!(second(&[host("192.0.2.1")]), Err(Reason::SniMismatch));
        assert_eq!(second(&[host("a.example"), (0xfe0d, vec![])]), Err(Reason::Ech));
        assert_eq!(second(&[host("a.example"), host("a.example")]), Err(Reason::HelloMalformed));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(
            turns in proptest::collection::vec((any::<bool>(), proptest::collection::vec(any::<u8>(), 0..60)), 0..20),
            retry in any::<bool>(),
        ) {
            let mut gate = if retry { retrying("a.example") } else { behind("a.example") };
            let mut out = Vec::new();
            for (client, bytes) in turns {
                if client {
                    if gate.client(&bytes, &mut out).is_err() {
                        break;
                    }
                } else {
                    gate.server(&bytes);
                }
            }
        }
    }
}
