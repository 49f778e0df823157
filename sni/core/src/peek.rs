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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Sni;
    use crate::testing::{hello, host, message, record, records};
    use proptest::prelude::*;

    fn all(stream: &[u8]) -> Progress {
        Peek::new().push(stream)
    }

    fn name(progress: &Progress) -> Option<&str> {
        match progress {
            Progress::Hello(Hello { sni: Sni::Name(name), .. }) => Some(name.as_str()),
            _ => None,
        }
    }

    #[test]
    fn records_and_segments_may_be_cut_anywhere() {
        let message = hello(&[host("a.example"), (51, vec![9; 1200])]);
        for size in [1, 2, 3, 5, 7, 100, 1000, message.len()] {
            let stream = records(&message, size);
            for cut in 0..=stream.len() {
                let mut peek = Peek::new();
                let first = peek.push(&stream[..cut]);
                assert_eq!(first == Progress::NeedMore, cut < stream.len(), "{size} {cut}");
                if cut < stream.len() {
                    assert_eq!(name(&peek.push(&stream[cut..])), Some("a.example"));
                }
                assert_eq!(peek.into_bytes(), (stream.clone(), stream.len()));
            }
        }
    }

    #[test]
    fn what_follows_is_told_apart() {
        let first = records(&hello(&[host("a.example")]), 50);
        let follows = record(20, &[1]);
        let mut peek = Peek::new();
        assert_eq!(name(&peek.push(&[first.clone(), follows].concat())), Some("a.example"));
        let (bytes, len) = peek.into_bytes();
        assert_eq!((&bytes[..len], bytes.len()), (&first[..], len + 6));
    }

    #[test]
    fn other_protocols_are_not_tls() {
        for bytes in [&b"GET / HTTP/1.1\r\n"[..], b"SSH-2.0-x", b"\x80\x2e\x01\x03\x01", b"\x16\x02", b"\x00"] {
            assert_eq!(all(bytes), Progress::Reject(Reason::NotTls), "{bytes:?}");
        }
        assert_eq!(all(&record(21, &[1, 0])), Progress::Reject(Reason::NotTls));
        assert_eq!(all(&record(23, &[1, 0])), Progress::Reject(Reason::NotTls));
    }

    #[test]
    fn broken_tls_is_malformed() {
        let message1 = hello(&[host("a.example")]);
        let malformed = Progress::Reject(Reason::HelloMalformed);
        assert_eq!(all(&record(22, &message(2, &[0; 40]))), malformed, "a ServerHello");
        let (a, b) = message1.split_at(20);
        assert_eq!(all(&[record(22, a), record(20, &[1]), record(22, b)].concat()), malformed, "interleaved");
        assert_eq!(all(&[record(22, a), record(22, &[]), record(22, b)].concat()), malformed, "an empty record");
        assert_eq!(all(&record(22, &[&message1[..], &message1].concat())), malformed, "two hellos in one record");
        assert_eq!(all(&[record(22, a), b"GET".to_vec()].concat()), malformed);
    }

    #[test]
    fn size_is_bounded() {
        let too_large = Progress::Reject(Reason::HelloTooLarge);
        // By what it declares, before it is sent.
        assert_eq!(all(&record(22, &[1, 1, 0, 0])), too_large);
        // By what it takes on the wire.
        let message = hello(&[host("a.example"), (51, vec![9; 15_000])]);
        let stream = records(&message, 1);
        assert_eq!(all(&stream[..MAX_HELLO - 1]), Progress::NeedMore);
        assert_eq!(all(&stream[..MAX_HELLO]), too_large);
        assert_eq!(all(&stream), too_large);
        // The largest that fits.
        let room = MAX_HELLO - 4 * HEADER - hello(&[host("a.example"), (51, vec![])]).len();
        let stream = records(&hello(&[host("a.example"), (51, vec![9; room])]), MAX_PLAIN);
        assert_eq!(stream.len(), MAX_HELLO);
        assert_eq!(name(&all(&stream)), Some("a.example"));
        let stream = records(&hello(&[host("a.example"), (51, vec![9; room + 1])]), MAX_PLAIN);
        assert_eq!(all(&stream), too_large);
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), cuts in any::<u64>()) {
            let mut peek = Peek::new();
            let mut rest = &bytes[..];
            let mut cuts = cuts;
            while !rest.is_empty() {
                let n = ((cuts & 15) as usize + 1).min(rest.len());
                cuts = cuts.rotate_right(4);
                peek.push(&rest[..n]);
                rest = &rest[n..];
            }
        }

        #[test]
        fn damaged_hellos_never_panic_and_cuts_change_nothing(
            at in 0usize..160, value in any::<u8>(), size in 1usize..200, step in 1usize..50,
        ) {
            let mut message = hello(&[host("a.example"), (43, vec![2, 3, 4]), (0xfe0d, vec![5; 40])]);
            if let Some(b) = message.get_mut(at).filter(|_| !(1..4).contains(&at)) {
                *b = value;
            }
            let whole = all(&records(&message, message.len()));
            let mut peek = Peek::new();
            let mut last = Progress::NeedMore;
            for chunk in records(&message, size).chunks(step) {
                last = peek.push(chunk);
            }
            // All but the message's length was damaged: with another one, a later record may be no part of it.
            prop_assert_eq!(last, whole);
        }
    }
}
