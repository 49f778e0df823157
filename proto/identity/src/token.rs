//! What a ServiceAccount token says of itself: a signed JWT (RFC 7519, in the compact form of RFC 7515), read without
//! checking the signature. Who shows it may have written it: it is good for leaving a question unasked, never for an answer.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;

/// The most octets of a token.
pub const MAX_TOKEN: usize = 16 * 1024;

/// The claims that matter here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claims {
    /// `system:serviceaccount:NAMESPACE:NAME`.
    pub subject: String,
    /// Whom it is for.
    pub audiences: Vec<String>,
    /// When it ends, in Unix seconds.
    pub ends: u64,
    /// The UID of the node on which its pod runs (Kubernetes 1.30 and later).
    pub node_uid: Option<String>,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
}

#[derive(Deserialize)]
struct Payload {
    sub: String,
    aud: Audience,
    exp: u64,
    #[serde(rename = "kubernetes.io", default)]
    kubernetes: Kubernetes,
}

/// One is written without the list.
#[derive(Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Several(Vec<String>),
}

#[derive(Default, Deserialize)]
struct Kubernetes {
    node: Option<Object>,
}

#[derive(Deserialize)]
struct Object {
    uid: String,
}

impl Claims {
    /// Reads a token. None if it has not the form of one that is signed.
    pub fn read(token: &str) -> Option<Self> {
        if token.len() > MAX_TOKEN {
            return None;
        }
        let mut parts = token.split('.');
        let (header, payload, signature) = (parts.next()?, parts.next()?, parts.next()?);
        if parts.next().is_some() || decode(signature)?.is_empty() {
            return None;
        }
        let header: Header = serde_json::from_slice(&decode(header)?).ok()?;
        if header.alg.eq_ignore_ascii_case("none") {
            return None;
        }
        let Payload { sub, aud, exp, kubernetes } = serde_json::from_slice(&decode(payload)?).ok()?;
        let audiences = match aud {
            Audience::One(one) => vec![one],
            Audience::Several(all) => all,
        };
        Some(Self { subject: sub, audiences, ends: exp, node_uid: kubernetes.node.map(|n| n.uid) })
    }
}

fn decode(part: &str) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(part).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(header: &str, payload: &str, signature: &[u8]) -> String {
        [header.as_bytes(), payload.as_bytes(), signature].map(|p| URL_SAFE_NO_PAD.encode(p)).join(".")
    }

    const HEADER: &str = r#"{"alg":"RS256","kid":"k"}"#;
    const PAYLOAD: &str = r#"{"aud":["tidegate"],"exp":1800000000,"iat":1,"sub":"system:serviceaccount:a:b",
        "kubernetes.io":{"namespace":"a","node":{"name":"n","uid":"u"},"pod":{"name":"p","uid":"v"}}}"#;

    #[test]
    fn a_projected_token_is_read() {
        let read = Claims::read(&token(HEADER, PAYLOAD, b"s")).unwrap();
        assert_eq!((read.subject.as_str(), read.ends), ("system:serviceaccount:a:b", 1_800_000_000));
        assert_eq!((read.audiences, read.node_uid.as_deref()), (vec!["tidegate".to_owned()], Some("u")));
        let one = Claims::read(&token(HEADER, r#"{"aud":"x","exp":1,"sub":"s"}"#, b"s")).unwrap();
        assert_eq!((one.audiences, one.node_uid), (vec!["x".to_owned()], None));
    }

    #[test]
    fn what_has_another_form_is_none() {
        for bad in [
            String::new(),
            "Bearer".into(),
            "a.b.c".into(),
            token(HEADER, PAYLOAD, b""),
            token(HEADER, PAYLOAD, b"s") + ".x",
            token(r#"{"alg":"none"}"#, PAYLOAD, b"s"),
            token(HEADER, r#"{"aud":[],"sub":"s"}"#, b"s"),
            token(HEADER, r#"{"aud":[],"exp":-1,"sub":"s"}"#, b"s"),
            token(HEADER, "[]", b"s"),
            token(HEADER, PAYLOAD, &vec![b's'; MAX_TOKEN]),
        ] {
            assert_eq!(Claims::read(&bad), None, "{bad:.40}");
        }
    }
}
