//! Hellos of a real TLS stack, and what two other parsers say of the same bytes.
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions, not in their helpers")]

use std::sync::Arc;

use proptest::prelude::*;
use rustls::client::Resumption;
use rustls::crypto::{SupportedKxGroup, ring};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::Acceptor;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
use tidegate_policy::{Name, Reason};
use tidegate_sni_core::{Gate, Hello, Peek, Progress, Sni};
use tls_parser::{TlsExtension, TlsMessage, TlsMessageHandshake};

fn provider(groups: &[&'static dyn SupportedKxGroup]) -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::CryptoProvider { kx_groups: groups.to_vec(), ..ring::default_provider() })
}

fn both() -> [&'static dyn SupportedKxGroup; 2] {
    [ring::kx_group::X25519, ring::kx_group::SECP256R1]
}

/// A client of which the hello can be written.
struct Stack {
    sni: bool,
    alpn: usize,
    fragment: Option<usize>,
    tls12: bool,
}

impl Stack {
    fn connect(&self, name: &'static str, roots: RootCertStore) -> ClientConnection {
        let versions: &[_] = if self.tls12 { &[&rustls::version::TLS12] } else { rustls::ALL_VERSIONS };
        let mut config = ClientConfig::builder_with_provider(provider(&both()))
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.enable_sni = self.sni;
        config.max_fragment_size = self.fragment;
        config.resumption = Resumption::disabled();
        config.alpn_protocols = (0..self.alpn).map(|i| format!("protocol-{i}").into_bytes()).collect();
        ClientConnection::new(Arc::new(config), ServerName::try_from(name).unwrap()).unwrap()
    }

    fn hello(&self, name: &'static str) -> Vec<u8> {
        flight(&mut self.connect(name, RootCertStore::empty()))
    }
}

const PLAIN: Stack = Stack { sni: true, alpn: 2, fragment: None, tls12: false };

fn flight(client: &mut ClientConnection) -> Vec<u8> {
    let mut out = Vec::new();
    while client.wants_write() {
        client.write_tls(&mut out).unwrap();
    }
    out
}

fn peek(stream: &[u8]) -> Progress {
    Peek::new().push(stream)
}

fn named(name: &str) -> Progress {
    Progress::Hello(Hello { sni: Sni::Name(Name::parse(name).unwrap()), ech: false })
}

#[test]
fn real_hellos_at_every_cut() {
    for stack in [
        PLAIN,
        Stack { tls12: true, ..PLAIN },
        Stack { fragment: Some(32), ..PLAIN },
        Stack { fragment: Some(100), alpn: 200, ..PLAIN },
    ] {
        let stream = stack.hello("api.example.com");
        for cut in 0..stream.len() {
            let mut peek = Peek::new();
            assert_eq!(peek.push(&stream[..cut]), Progress::NeedMore);
            assert_eq!(peek.push(&stream[cut..]), named("api.example.com"));
        }
        let mut peek = Peek::new();
        let mut last = Progress::NeedMore;
        for byte in &stream {
            last = peek.push(std::slice::from_ref(byte));
        }
        assert_eq!(last, named("api.example.com"));
    }
}

#[test]
fn a_hello_that_fills_many_records() {
    let stream = Stack { alpn: 4000, ..PLAIN }.hello("api.example.com");
    assert!(stream.len() > 3 * 16384 && stream.len() < 65536);
    assert_eq!(peek(&stream), named("api.example.com"));
}

#[test]
fn hellos_without_a_name() {
    let missing = Progress::Hello(Hello { sni: Sni::Missing, ech: false });
    assert_eq!(peek(&Stack { sni: false, ..PLAIN }.hello("api.example.com")), missing);
    assert_eq!(peek(&PLAIN.hello("192.0.2.1")), missing);
}

/// What rustls' server reads: `None` if it refuses or wants more.
fn rustls_reads(stream: &[u8]) -> Option<Option<String>> {
    let mut acceptor = Acceptor::default();
    let mut rest = stream;
    while !rest.is_empty() {
        acceptor.read_tls(&mut rest).ok()?;
        match acceptor.accept() {
            Ok(Some(accepted)) => return Some(accepted.client_hello().server_name().map(str::to_owned)),
            Ok(None) => {}
            Err(_) => return None,
        }
    }
    None
}

/// What tls-parser reads of a hello in one record: `None` if it refuses.
fn tls_parser_reads(stream: &[u8]) -> Option<Vec<Vec<u8>>> {
    let (_, record) = tls_parser::parse_tls_plaintext(stream).ok()?;
    let [TlsMessage::Handshake(TlsMessageHandshake::ClientHello(hello))] = &record.msg[..] else { return None };
    let (rest, extensions) = tls_parser::parse_tls_client_hello_extensions(hello.ext.unwrap_or_default()).ok()?;
    if !rest.is_empty() {
        return None;
    }
    let names = extensions.iter().filter_map(|e| match e {
        TlsExtension::SNI(list) => Some(list.iter().map(|(_, n)| n.to_vec())),
        _ => None,
    });
    Some(names.flatten().collect())
}

/// Whether a text from another parser is the canonical name.
fn same(text: &str, name: &str) -> bool {
    text.strip_suffix('.').unwrap_or(text).eq_ignore_ascii_case(name)
}

#[test]
fn other_parsers_read_the_same_of_real_hellos() {
    for name in ["a.example", "API.Example.COM", "x_y.example", "xn--bcher-kva.example"] {
        let stream = PLAIN.hello(name);
        let Progress::Hello(Hello { sni: Sni::Name(ours), .. }) = peek(&stream) else { panic!("{name}") };
        assert!(same(&rustls_reads(&stream).unwrap().unwrap(), ours.as_str()));
        assert_eq!(tls_parser_reads(&stream).unwrap().len(), 1);
    }
}

/// Others who understand the hello read what we read.
fn agree(
    hello: &Hello,
    rustls: Option<Option<String>>,
    tls_parser: Option<Vec<Vec<u8>>>,
) -> Result<(), proptest::test_runner::TestCaseError> {
    if let Some(theirs) = rustls {
        match (&hello.sni, theirs) {
            (Sni::Name(ours), Some(theirs)) => prop_assert!(same(&theirs, ours.as_str()), "{ours} {theirs}"),
            (Sni::Name(ours), None) => prop_assert!(false, "rustls reads no name, we {ours}"),
            (Sni::Missing | Sni::Ip, theirs) => prop_assert_eq!(theirs, None),
        }
    }
    if let Some(theirs) = tls_parser {
        match &hello.sni {
            Sni::Name(ours) => {
                prop_assert_eq!(theirs.len(), 1);
                prop_assert!(same(std::str::from_utf8(&theirs[0]).unwrap(), ours.as_str()));
            }
            Sni::Missing => prop_assert!(theirs.is_empty()),
            Sni::Ip => prop_assert_eq!(theirs.len(), 1),
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// Whatever is damaged: where we let a hello pass with a name, nobody reads another name in it.
    #[test]
    fn no_damage_makes_two_readings(
        damage in proptest::collection::vec((0usize..600, any::<u8>()), 1..6),
        near in proptest::collection::vec((0usize..40, any::<u8>()), 0..3),
        tls12 in any::<bool>(),
    ) {
        let mut stream = Stack { tls12, ..PLAIN }.hello("api.example.com");
        let at = stream.windows(3).position(|w| w == b"api").unwrap();
        for (i, b) in damage {
            let len = stream.len();
            stream[i % len] = b;
        }
        for (i, b) in near {
            // Around the name, where the lengths and types are.
            let len = stream.len();
            stream[(at - 12 + i) % len] = b;
        }
        if let Progress::Hello(hello) = peek(&stream) {
            agree(&hello, rustls_reads(&stream), tls_parser_reads(&stream))?;
        }
    }
}

/// A hello in one record, taken apart: what is before the extensions, and these.
fn parts(stream: &[u8]) -> (Vec<u8>, Vec<(u16, Vec<u8>)>) {
    let body = &stream[9..];
    let u16_at = |at: usize| usize::from(u16::from_be_bytes([body[at], body[at + 1]]));
    let session = 34 + 1 + usize::from(body[34]);
    let suites = session + 2 + u16_at(session);
    let start = suites + 1 + usize::from(body[suites]);
    let (mut at, mut extensions) = (start + 2, Vec::new());
    while at < body.len() {
        let end = at + 4 + u16_at(at + 2);
        extensions.push((u16_at(at) as u16, body[at + 4..end].to_vec()));
        at = end;
    }
    (body[..start].to_vec(), extensions)
}

/// Puts it together again, in records of at most so many octets.
fn joined(head: &[u8], extensions: &[(u16, Vec<u8>)], most: usize) -> Vec<u8> {
    let mut list = Vec::new();
    for (kind, data) in extensions {
        list.extend(kind.to_be_bytes());
        list.extend((data.len() as u16).to_be_bytes());
        list.extend(data);
    }
    let mut body = head.to_vec();
    body.extend((list.len() as u16).to_be_bytes());
    body.extend(list);
    let mut message = vec![1];
    message.extend(&(body.len() as u32).to_be_bytes()[1..]);
    message.extend(body);
    message.chunks(most).flat_map(|c| [&[22, 3, 1][..], &(c.len() as u16).to_be_bytes(), c].concat()).collect()
}

/// A list of server names.
fn names(list: &[(u8, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (kind, name) in list {
        out.push(*kind);
        out.extend((name.len() as u16).to_be_bytes());
        out.extend(*name);
    }
    [&(out.len() as u16).to_be_bytes()[..], &out].concat()
}

const LISTS: [&[(u8, &[u8])]; 12] = [
    &[],
    &[(0, b"api.example.com")],
    &[(0, b"other.example.com")],
    &[(0, b"API.Example.COM")],
    &[(0, b"api.example.com.")],
    &[(0, b"api.example.com"), (0, b"other.example.com")],
    &[(0, b"api.example.com"), (1, b"other.example.com")],
    &[(1, b"other.example.com"), (0, b"api.example.com")],
    &[(0, b"api.example.com\0.other.example.com")],
    &[(0, b"")],
    &[(0, b"192.0.2.1")],
    &[(0, b"xn--bcher-kva.example")],
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// However a hello is put together, in whatever records: nobody reads another name in what we let pass.
    #[test]
    fn no_structure_makes_two_readings(
        edits in proptest::collection::vec((0usize..6, any::<u8>(), 0usize..LISTS.len()), 0..4),
        most in prop_oneof![Just(16_384usize), 1usize..600],
        tls12 in any::<bool>(),
    ) {
        let (head, mut extensions) = parts(&Stack { tls12, ..PLAIN }.hello("api.example.com"));
        for (what, at, list) in edits {
            let (at, said) = (usize::from(at) % extensions.len(), names(LISTS[list]));
            let sni = extensions.iter().position(|e| e.0 == 0);
            match (what, sni) {
                // Instead of what it said, beside it, without it, under another number, with something behind it.
                (0, Some(i)) => extensions[i].1 = said,
                (1, _) => extensions.insert(at, (0, said)),
                (2, Some(i)) if extensions.len() > 1 => drop(extensions.remove(i)),
                (3, _) => extensions[at].0 = [0, 21, 16, 0xfe0d, 0xffff][list % 5],
                (4, Some(i)) => extensions[i].1.push(0),
                _ => {
                    let one = extensions[at].clone();
                    extensions.push(one);
                }
            }
        }
        let stream = joined(&head, &extensions, most);
        let one = joined(&head, &extensions, 16_384);
        prop_assert_eq!(peek(&stream), peek(&one), "records change what is read");
        if let Progress::Hello(hello) = peek(&stream) {
            agree(&hello, rustls_reads(&stream), tls_parser_reads(&one))?;
        }
    }
}

/// A server that does not take the key share that the client sends first.
fn picky() -> (ServerConnection, RootCertStore) {
    let made = rcgen::generate_simple_self_signed(["api.example.com".to_owned()]).unwrap();
    let cert = CertificateDer::from(made.cert);
    let mut roots = RootCertStore::empty();
    roots.add(cert.clone()).unwrap();
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let config = ServerConfig::builder_with_provider(provider(&[ring::kx_group::SECP256R1]))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert], key)
        .unwrap();
    (ServerConnection::new(Arc::new(config)).unwrap(), roots)
}

fn server_flight(server: &mut ServerConnection) -> Vec<u8> {
    let mut out = Vec::new();
    while server.wants_write() {
        server.write_tls(&mut out).unwrap();
    }
    out
}

/// Runs a handshake through a gate until the client's second flight, which `alter` may change.
fn second_flight(alter: impl Fn(&mut Vec<u8>)) -> (Result<Vec<u8>, Reason>, ClientConnection, ServerConnection) {
    let (mut server, roots) = picky();
    let mut client = PLAIN.connect("api.example.com", roots);
    let first = flight(&mut client);
    let Progress::Hello(hello) = peek(&first) else { panic!("no hello") };
    let mut gate = Gate::new(hello);
    server.read_tls(&mut &first[..]).unwrap();
    server.process_new_packets().unwrap();
    let retry = server_flight(&mut server);
    gate.server(&retry);
    assert!(gate.is_retry());
    client.read_tls(&mut &retry[..]).unwrap();
    client.process_new_packets().unwrap();
    let mut second = flight(&mut client);
    alter(&mut second);
    let mut out = Vec::new();
    let result = gate.client(&second, &mut out);
    assert_eq!(gate.is_open(), result.is_ok());
    (result.map(|()| out), client, server)
}

#[test]
fn a_retry_that_keeps_its_name_completes() {
    let (passed, mut client, mut server) = second_flight(|_| {});
    server.read_tls(&mut &passed.unwrap()[..]).unwrap();
    server.process_new_packets().unwrap();
    let answer = server_flight(&mut server);
    client.read_tls(&mut &answer[..]).unwrap();
    client.process_new_packets().unwrap();
    assert!(!client.is_handshaking());
}

#[test]
fn a_retry_that_changes_its_name_is_refused() {
    let (refused, ..) = second_flight(|bytes| {
        let at = bytes.windows(3).position(|w| w == b"api").unwrap();
        bytes[at..at + 3].copy_from_slice(b"bad");
    });
    assert_eq!(refused, Err(Reason::SniMismatch));
}
