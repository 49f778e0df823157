//! TLS records as a stream: which type each byte belongs to (RFC 8446, section 5.1).

/// Content type `change_cipher_spec`.
pub(crate) const CHANGE_CIPHER_SPEC: u8 = 20;
/// Content type `alert`.
pub(crate) const ALERT: u8 = 21;
/// Content type `handshake`.
pub(crate) const HANDSHAKE: u8 = 22;
/// Content type `application_data`.
pub(crate) const APPLICATION_DATA: u8 = 23;

/// Octets of a record's header: type, version, length.
pub(crate) const HEADER: usize = 5;
/// The longest fragment of a record in the clear: 2^14 octets.
pub(crate) const MAX_PLAIN: usize = 1 << 14;
/// The longest protected fragment that any version allows: 2^14 + 2048 octets (RFC 5246, section 6.2.3).
pub(crate) const MAX_PROTECTED: usize = MAX_PLAIN + 2048;

/// A header that is no TLS record's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotTls;

/// A piece of the stream that belongs to one record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// The record's content type.
    pub kind: u8,
    /// How many octets of the input belong to it, header included.
    pub len: usize,
    /// How many of these are header.
    pub header: usize,
    /// Whether the piece begins a record.
    pub first: bool,
}

/// Walks over records without keeping more than a header.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Walk {
    header: [u8; HEADER],
    seen: usize,
    left: usize,
}

impl Walk {
    /// The next piece at the start of `bytes`, which must not be empty. Its type is known from the
    /// first octet on, so that a stream that is not TLS is seen at once.
    pub fn next(&mut self, bytes: &[u8]) -> Result<Piece, NotTls> {
        let first = self.at_record();
        if first {
            self.seen = 0;
        }
        let missing = HEADER - self.seen;
        let header = missing.min(bytes.len());
        if header > 0 {
            self.header[self.seen..self.seen + header].copy_from_slice(&bytes[..header]);
            self.seen += header;
            self.check()?;
            if self.seen == HEADER {
                self.left = usize::from(u16::from_be_bytes([self.header[3], self.header[4]]));
            }
        }
        let body = self.left.min(bytes.len() - header);
        self.left -= body;
        Ok(Piece { kind: self.header[0], len: header + body, header, first })
    }

    /// Whether the next octet begins a record.
    pub fn at_record(&self) -> bool {
        self.left == 0 && (self.seen == 0 || self.seen == HEADER)
    }

    /// Octets that the current record still has to bring; 0 also before its header is complete.
    pub fn left(&self) -> usize {
        self.left
    }

    fn check(&self) -> Result<(), NotTls> {
        let h = &self.header[..self.seen];
        let protected = h[0] == APPLICATION_DATA;
        if !(CHANGE_CIPHER_SPEC..=APPLICATION_DATA).contains(&h[0]) || h.get(1).is_some_and(|v| *v != 3) {
            return Err(NotTls);
        }
        if let [_, _, _, hi, lo] = *h {
            let len = usize::from(u16::from_be_bytes([hi, lo]));
            let most = if protected { MAX_PROTECTED } else { MAX_PLAIN };
            // An empty fragment is only allowed for application data.
            if len > most || (len == 0 && !protected) {
                return Err(NotTls);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_same_however_the_stream_is_cut() {
        let stream =
            [&[22u8, 3, 1, 0, 3, 1, 2, 3][..], &[20, 3, 3, 0, 1, 1], &[23, 3, 3, 0, 0], &[21, 3, 3, 0, 2, 1, 0]]
                .concat();
        let kinds = |cut: usize| {
            let mut walk = Walk::default();
            let mut out = Vec::new();
            for mut chunk in stream.chunks(cut) {
                while !chunk.is_empty() {
                    let p = walk.next(chunk).unwrap();
                    out.extend(std::iter::repeat_n(p.kind, p.len));
                    chunk = &chunk[p.len..];
                }
            }
            out
        };
        let whole = kinds(stream.len());
        assert_eq!(whole.iter().filter(|k| **k == 22).count(), 8);
        for cut in 1..stream.len() {
            assert_eq!(kinds(cut), whole);
        }
    }

    #[test]
    fn what_is_not_tls_is_seen_at_the_octet_that_says_so() {
        for bad in [&b"G"[..], &[22, 2], &[22, 3, 1, 0, 0], &[22, 3, 1, 0x40, 1], &[23, 3, 3, 0x48, 1], &[24]] {
            let mut walk = Walk::default();
            assert!(walk.next(&bad[..bad.len() - 1]).is_ok() || bad.len() == 1);
            assert_eq!(walk.next(&bad[bad.len() - 1..]), Err(NotTls), "{bad:?}");
        }
        assert!(Walk::default().next(&[23, 3, 3, 0x48, 0]).is_ok());
    }
}
