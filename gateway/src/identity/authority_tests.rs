//! What the authority signs and does not sign, and rotations with gateways and nodes that are behind.

use super::*;
use rcgen::BasicConstraints as Basic;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tidegate_identity::{Credentials, authorities_from_pem, name_of};

const NOW: u64 = 1_800_000_000;
const HOUR: u64 = 3600;
const TIMES: Times = Times { certificate: 24 * HOUR, authority: 12 * 24 * HOUR, overlap: HOUR };

fn authority() -> Authority {
    Authority::first(NOW, &TIMES, KeyPair::generate().unwrap()).unwrap()
}

fn request(names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> (Vec<u8>, KeyPair) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>()).unwrap();
    change(&mut params);
    (params.serialize_request(&key).unwrap().der().to_vec(), key)
}

fn credentials(issued: &Issued, key: &KeyPair, bundle: &str) -> Credentials {
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    Credentials::new(issued.chain.clone(), key, authorities_from_pem(bundle.as_bytes()).unwrap()).unwrap()
}

#[test]
fn a_node_gets_a_certificate_for_its_name_and_a_day() {
    let authority = authority();
    let (request, key) = request(&["node-1.node.tidegate"], |_| {});
    let issued = authority.node("node-1", Some("uid-1"), &request, NOW, &TIMES).unwrap();
    assert_eq!((issued.ends, issued.renew), (NOW + 24 * HOUR, 16 * HOUR));
    let own = credentials(&issued, &key, &authority.bundle());
    for (at, holds) in [(NOW, true), (NOW - HOUR + 1, true), (NOW + 24 * HOUR - 1, true), (NOW + 24 * HOUR + 1, false)]
    {
        assert_eq!(own.check(Role::Node, "node-1", at).is_ok(), holds, "{at}");
    }
    assert!(own.check(Role::Node, "node-2", NOW).is_err());
    assert!(own.check(Role::Gateway, "node-1", NOW).is_err());
    // A client's, and nothing that could sign or serve.
    let (_, parsed) = x509_parser::parse_x509_certificate(&issued.chain[0]).unwrap();
    let uses = parsed.extended_key_usage().unwrap().unwrap().value;
    assert!(uses.client_auth && !uses.server_auth && !uses.any);
    assert!(!parsed.is_ca());
    // Another cluster's authority does not know it.
    let other = Authority::first(NOW, &TIMES, KeyPair::generate().unwrap()).unwrap();
    assert!(credentials(&issued, &key, &other.bundle()).check(Role::Node, "node-1", NOW).is_err());
}

#[test]
fn a_request_for_more_than_the_own_name_is_refused() {
    let authority = authority();
    let none: fn(&mut CertificateParams) = |_| {};
    type Case = (&'static [&'static str], fn(&mut CertificateParams));
    let cases: [Case; 5] = [
        (&["node-2.node.tidegate"], none),
        (&["node-1.gateway.tidegate"], none),
        (&["node-1.node.tidegate", "node-2.node.tidegate"], none),
        (&[], none),
        (&["node-1.node.tidegate"], |p| p.is_ca = IsCa::Ca(Basic::Unconstrained)),
    ];
    for (names, change) in cases {
        let (request, _) = request(names, change);
        // rcgen itself refuses to read some of what a CA asks for.
        let refused = authority.node("node-1", Some("uid-1"), &request, NOW, &TIMES);
        assert!(matches!(refused, Err(Refused::Other(_) | Refused::Malformed(_))), "{names:?}");
    }
    // Who does not hold the key cannot have signed; and what is no request at all.
    let (mut forged, _) = request(&["node-1.node.tidegate"], |_| {});
    let last = forged.len() - 1;
    forged[last] ^= 1;
    for bad in [&forged[..], &[], &[0x30, 0x80], &[0xff; 100]] {
        assert!(matches!(authority.node("node-1", Some("uid-1"), bad, NOW, &TIMES), Err(Refused::Malformed(_))));
    }
}

#[test]
fn a_secret_of_somebody_else_is_not_used() {
    let (a, b) = (authority(), authority());
    let (a, b) = (a.to_bytes(), b.to_bytes());
    assert!(Authority::from_bytes(&a).is_ok());
    let (mut mixed, other): (serde_json::Value, serde_json::Value) =
        (serde_json::from_slice(&a).unwrap(), serde_json::from_slice(&b).unwrap());
    mixed["signer"]["key"] = other["signer"]["key"].clone();
    for bad in [mixed.to_string().as_bytes(), b"{}", b"", &a[..a.len() - 1]] {
        assert!(Authority::from_bytes(bad).is_err());
    }
    assert!(!format!("{:?}", Authority::from_bytes(&a).unwrap()).contains("PRIVATE"));
}

/// A certificate that somebody has, and until when.
struct Held(Credentials, u64, KeyPair, Issued);

/// Forty days, hour by hour. The bundle cannot always be published, nodes see it an hour late, and one gateway signs with
/// what it knew up to a day ago. Nobody ever shows a certificate that another one does not trust.
#[test]
fn in_a_rotation_everybody_is_trusted_all_the_time() {
    let mut authority = authority();
    let mut published = authority.bundle();
    let (mut views, mut history) = (vec![published.clone()], vec![authority.clone()]);
    let mut held: Vec<Held> = Vec::new();
    let (mut rotations, mut signers) = (0, vec![authority.signer.certificate.clone()]);
    let mut keys = 0;
    for hour in 1..=40 * 24 {
        let now = NOW + hour * HOUR;
        let fresh = || {
            keys += 1;
            KeyPair::generate()
        };
        if let Some(new) = authority.step(now, &TIMES, fresh).unwrap() {
            authority = Authority::from_bytes(&new.to_bytes()).unwrap();
        }
        // For one day of each eight nobody can write the ConfigMap.
        if hour / 24 % 8 > 0 {
            published = authority.bundle();
            if let Some(new) = authority.published(now) {
                authority = new;
            }
        }
        if signers.last() != Some(&authority.signer.certificate) {
            signers.push(authority.signer.certificate.clone());
            rotations += 1;
        }
        // What nodes see: the bundle of an hour ago.
        let seen = views.last().cloned().unwrap();
        views.push(published.clone());
        history.push(authority.clone());
        if hour % 5 == 0 {
            let late = &history[history.len().saturating_sub(24)];
            for signer in [&authority, late] {
                let key = KeyPair::generate().unwrap();
                let issued = signer.gateway("gw-a", &[], &key, now, &TIMES).unwrap();
                assert!(issued.ends >= now + TIMES.certificate, "no certificate is cut short");
                held.push(Held(credentials(&issued, &key, &seen), issued.ends, key, issued));
            }
        }
        held.retain(|h| now < h.1);
        for h in &mut held {
            h.0 = credentials(&h.3, &h.2, &seen);
            h.0.check(Role::Gateway, "gw-a", now).unwrap_or_else(|e| panic!("hour {hour}: {e}"));
        }
    }
    assert!(rotations >= 3, "{rotations}");
    assert_eq!(keys, rotations + usize::from(authority.next.is_some()), "one key for each");
    // Former ones go.
    assert!(authority.old.len() <= 1 && authority.bundle().matches("BEGIN").count() <= 3);
    assert!(name_of(&der(&authority.signer.certificate).unwrap(), Role::Gateway).is_none());
}

#[test]
fn nothing_is_signed_with_what_was_never_published() {
    let mut authority = authority();
    let first = authority.signer.certificate.clone();
    let late = NOW + TIMES.authority * 2 / 3 + HOUR;
    authority = authority.step(late, &TIMES, KeyPair::generate).unwrap().unwrap();
    assert_eq!(authority.bundle().matches("BEGIN").count(), 2);
    assert!(authority.step(late + 30 * 24 * HOUR, &TIMES, KeyPair::generate).unwrap().is_none());
    assert_eq!(authority.signer.certificate, first);
    authority = authority.published(late + HOUR).unwrap();
    assert!(authority.published(late + HOUR).is_none());
    assert_eq!(authority.due(&TIMES), Some(late + HOUR + TIMES.overlap));
    assert!(authority.step(late + HOUR + TIMES.overlap - 1, &TIMES, KeyPair::generate).unwrap().is_none());
    let authority = authority.step(late + HOUR + TIMES.overlap, &TIMES, KeyPair::generate).unwrap().unwrap();
    assert_ne!(authority.signer.certificate, first);
    assert!(!String::from_utf8(authority.to_bytes()).unwrap().contains(&first[..]) || authority.old.len() == 1);
    // The former key is gone for good.
    assert_eq!(String::from_utf8(authority.to_bytes()).unwrap().matches("PRIVATE KEY").count(), 2);
}
