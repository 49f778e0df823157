//! The ClientHello (RFC 8446, section 4.1.2; RFC 6066, section 3), read strictly: what two TLS
//! stacks could read differently is refused.

use std::net::IpAddr;

use smallvec::SmallVec;
use tidegate_policy::{Name, Reason};

/// What the hello says of the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sni {
    /// No server_name extension.
    Missing,
    /// A name, in canonical form.
    Name(Name),
    /// An IP address, which RFC 6066 forbids.
    Ip,
}

impl Sni {
    /// The name, if there is one.
    pub fn name(&self) -> Option<&Name> {
        match self {
            Sni::Name(name) => Some(name),
            Sni::Missing | Sni::Ip => None,
        }
    }
}

/// What matters of a ClientHello.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The server that it names.
    pub sni: Sni,
    /// Whether it has an encrypted_client_hello extension, real or GREASE: they cannot be told apart.
    pub ech: bool,
}

/// Handshake type `client_hello`.
pub(crate) const CLIENT_HELLO: u8 = 1;

const SERVER_NAME: u16 = 0;
const ENCRYPTED_CLIENT_HELLO: u16 = 0xfe0d;
/// `encrypted_server_name` of the drafts before ECH: servers that still take it would serve another name.
const ENCRYPTED_SERVER_NAME: u16 = 0xffce;

/// A reader that never goes past its end.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|b| b[0])
    }

    fn u16(&mut self) -> Option<u16> {
        self.take(2).map(|b| u16::from_be_bytes([b[0], b[1]]))
    }

    fn vec8(&mut self) -> Option<&'a [u8]> {
        let len = self.u8()?;
        self.take(usize::from(len))
    }

    fn vec16(&mut self) -> Option<&'a [u8]> {
        let len = self.u16()?;
        self.take(usize::from(len))
    }
}

impl Hello {
    /// Reads the body of a ClientHello, without its handshake header.
    ///
    /// # Errors
    /// [`Reason::HelloMalformed`] if it is not exactly one well-formed hello, has an extension
    /// twice, or its server_name is not exactly one valid host name or address.
    pub fn parse(body: &[u8]) -> Result<Self, Reason> {
        parse(body).ok_or(Reason::HelloMalformed)
    }
}

fn parse(body: &[u8]) -> Option<Hello> {
    let mut r = Reader(body);
    // legacy_version: any TLS; the extensions say what is meant.
    (r.u16()? >> 8 == 3).then_some(())?;
    r.take(32)?;
    (r.vec8()?.len() <= 32).then_some(())?;
    let suites = r.vec16()?;
    (!suites.is_empty() && suites.len() % 2 == 0).then_some(())?;
    (!r.vec8()?.is_empty()).then_some(())?;

    let mut hello = Hello { sni: Sni::Missing, ech: false };
    if r.0.is_empty() {
        // Before TLS 1.3 a hello may end here (RFC 5246, section 7.4.1.2).
        return Some(hello);
    }
    let mut extensions = Reader(r.vec16()?);
    r.0.is_empty().then_some(())?;
    let mut kinds: SmallVec<[u16; 32]> = SmallVec::new();
    while !extensions.0.is_empty() {
        let kind = extensions.u16()?;
        let data = extensions.vec16()?;
        kinds.push(kind);
        match kind {
            SERVER_NAME => hello.sni = server_name(data)?,
            ENCRYPTED_CLIENT_HELLO | ENCRYPTED_SERVER_NAME => hello.ech = true,
            _ => {}
        }
    }
    kinds.sort_unstable();
    kinds.windows(2).all(|w| w[0] != w[1]).then_some(hello)
}

/// A list with exactly one name: RFC 6066 allows one of each type and defines only host_name;
/// servers differ in which one of several they take.
fn server_name(data: &[u8]) -> Option<Sni> {
    let mut r = Reader(data);
    let mut list = Reader(r.vec16()?);
    r.0.is_empty().then_some(())?;
    (list.u8()? == 0).then_some(())?;
    let text = std::str::from_utf8(list.vec16()?).ok()?;
    list.0.is_empty().then_some(())?;
    let bare = text.strip_suffix('.').unwrap_or(text);
    let unbracketed = bare.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(bare);
    if unbracketed.parse::<IpAddr>().is_ok() {
        return Some(Sni::Ip);
    }
    Name::parse(text).ok().map(Sni::Name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{hello, host, server_name};

    fn read(extensions: &[(u16, Vec<u8>)]) -> Result<Hello, Reason> {
        Hello::parse(&hello(extensions)[4..])
    }

    fn sni(name: &str) -> Result<Sni, Reason> {
        read(&[host(name)]).map(|h| h.sni)
    }

    const MALFORMED: Reason = Reason::HelloMalformed;

    #[test]
    fn names_come_in_canonical_form() {
        let name = |n| Ok(Sni::Name(Name::parse(n).unwrap()));
        assert_eq!(sni("api.example"), name("api.example"));
        assert_eq!(sni("API.Example."), name("api.example"));
        assert_eq!(sni("xn--bcher-kva.example"), name("xn--bcher-kva.example"));
        for ip in ["192.0.2.1", "192.0.2.1.", "2001:db8::1", "[2001:db8::1]", "::ffff:192.0.2.1"] {
            assert_eq!(sni(ip), Ok(Sni::Ip), "{ip}");
        }
        for bad in ["", ".", "..", "a..b", "a b", "a\0.example", "bücher.example", "*.example", "a.example:443"] {
            assert_eq!(sni(bad), Err(MALFORMED), "{bad:?}");
        }
        assert_eq!(sni(&"a".repeat(300)), Err(MALFORMED));
    }

    #[test]
    fn nothing_may_be_said_twice() {
        assert_eq!(read(&[host("a.example"), host("b.example")]), Err(MALFORMED));
        assert_eq!(read(&[host("a.example"), (16, vec![]), (16, vec![])]), Err(MALFORMED));
        let two = server_name(&[(0, b"a.example"), (0, b"b.example")]);
        assert_eq!(read(&[two]), Err(MALFORMED));
        // Of a second type that a server may or may not skip.
        assert_eq!(read(&[server_name(&[(1, b"x"), (0, b"b.example")])]), Err(MALFORMED));
        assert_eq!(read(&[server_name(&[(0, b"a.example"), (1, b"x")])]), Err(MALFORMED));
        assert_eq!(read(&[server_name(&[])]), Err(MALFORMED));
        assert_eq!(read(&[(0, vec![])]), Err(MALFORMED));
    }

    #[test]
    fn any_ech_extension_counts() {
        assert!(!read(&[host("a.example")]).unwrap().ech);
        assert!(read(&[host("a.example"), (0xfe0d, vec![])]).unwrap().ech);
        assert!(read(&[host("a.example"), (0xffce, vec![1])]).unwrap().ech);
        assert_eq!(read(&[(0xfe0d, vec![1, 2, 3])]).unwrap(), Hello { sni: Sni::Missing, ech: true });
    }

    #[test]
    fn lengths_must_fit_exactly() {
        let whole = hello(&[host("a.example"), (43, vec![2, 3, 4])]);
        let body = &whole[4..];
        assert!(Hello::parse(body).is_ok());
        // Before the extensions: version, random, session, suites, compression.
        let fixed = 2 + 32 + 1 + 4 + 2;
        for cut in 0..body.len() {
            assert_eq!(Hello::parse(&body[..cut]).is_ok(), cut == fixed, "{cut}");
        }
        let longer = [body, &[0]].concat();
        assert_eq!(Hello::parse(&longer), Err(MALFORMED));
        let with = |at: usize, value: u8| {
            let mut b = body.to_vec();
            b[at] = value;
            Hello::parse(&b)
        };
        assert_eq!(with(0, 2), Err(MALFORMED), "SSL 2");
        assert_eq!(with(34, 33), Err(MALFORMED), "session id");
        assert_eq!(with(36, 1), Err(MALFORMED), "odd suites");
        assert_eq!(with(39, 0), Err(MALFORMED), "no compression method");
    }
}
