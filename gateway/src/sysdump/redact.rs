//! What looks like a secret, and objects without what may be one.

use base64::Engine;
use base64::alphabet::{STANDARD, URL_SAFE};
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde_json::{Value, json};

const STRUCK: &str = "[struck out]";
const BEGIN: &str = "-----BEGIN ";
const END: &str = "-----END ";
const KEY: &str = "PRIVATE KEY";
/// The longest kind of a PEM block, in octets.
const KIND: usize = 40;
/// How JSON Web Tokens begin: `{"` in base64.
const TOKEN: &str = "eyJ";
/// Shorter ones are no tokens, in octets.
const TOKEN_MIN: usize = 20;
/// What people write of credentials, without or with the padding.
const LOOSE: GeneralPurposeConfig = GeneralPurposeConfig::new()
    .with_decode_padding_mode(DecodePaddingMode::Indifferent)
    .with_decode_allow_trailing_bits(true);
/// Whose annotations are kept, as their keys begin. Of others nobody knows what is in them.
const ANNOTATIONS: &[&str] = &[
    "tidegate.dev/",
    "checksum/",
    "helm.sh/",
    "meta.helm.sh/",
    "deployment.kubernetes.io/revision",
    "deprecated.daemonset.template.generation",
    "endpoints.kubernetes.io/",
];

/// A text without private keys, tokens, and passwords in URLs and headers, whoever put them there. It takes time in proportion
/// to the text, whatever is in it.
pub fn redact(text: &str) -> String {
    without_passwords(&without_credentials(&without_tokens(&without_keys(text))))
}

/// The octets of a private key's first or last line, if the text begins with it.
fn key_line(text: &str, marker: &str) -> Option<usize> {
    let rest = text.strip_prefix(marker)?;
    let kind = rest.bytes().take(KIND).take_while(|b| b.is_ascii_alphanumeric() || *b == b' ').count();
    let dashes = "-----";
    (rest[..kind].contains(KEY) && rest[kind..].starts_with(dashes)).then_some(marker.len() + kind + dashes.len())
}

/// Without the insides of private keys: to the next end of one, or to the end of the text.
fn without_keys(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut done = 0;
    for (begin, _) in text.match_indices(BEGIN) {
        let Some(head) = key_line(&text[begin..], BEGIN).filter(|_| begin >= done) else { continue };
        out += &text[done..begin];
        out += STRUCK;
        let inside = begin + head;
        let end = text[inside..].match_indices(END).map(|(at, _)| inside + at);
        done = end.filter_map(|at| Some(at + key_line(&text[at..], END)?)).next().unwrap_or(text.len());
    }
    out + &text[done..]
}

fn is_base64(c: char) -> bool {
    c.is_ascii_alphanumeric() || "-_+/=".contains(c)
}

/// Without JSON Web Tokens: three parts with dots between.
fn without_tokens(text: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(begin) = rest.find(TOKEN) {
        let (before, token) = rest.split_at(begin);
        out += before;
        let end = token.find(|c| !is_base64(c) && c != '.').unwrap_or(token.len());
        let (token, after) = token.split_at(end);
        out += if token.len() >= TOKEN_MIN && token.contains('.') { STRUCK } else { token };
        rest = after;
    }
    out + rest
}

/// A text without that end, whatever the case of its letters.
fn without_end<'a>(text: &'a str, end: &str) -> Option<&'a str> {
    let (head, tail) = text.split_at_checked(text.len().checked_sub(end.len())?)?;
    tail.eq_ignore_ascii_case(end).then_some(head)
}

/// Without what stands behind `Bearer ` and `Basic ` and looks as it does in a header, and all that does in one.
fn without_credentials(text: &str) -> String {
    let (mut out, mut done) = (String::with_capacity(text.len()), 0);
    for (at, _) in text.match_indices(' ') {
        let Some(before) = text.get(done..at) else { continue };
        let (basic, bearer) = (without_end(before, "basic"), without_end(before, "bearer"));
        let Some(head) = basic.or(bearer) else { continue };
        let begin = text.len() - text[at..].trim_start_matches(' ').len();
        let value = &text[begin..];
        let value = &value[..value.find(|c| !is_base64(c) && c != '.' && c != '~').unwrap_or(value.len())];
        let head = head.trim_end_matches([' ', ':', '=', '"', '\'', '\\', '[']);
        let looks = if basic.is_some() { is_pair(value) } else { value.bytes().any(|b| b.is_ascii_digit()) };
        let secret = value.len() >= TOKEN_MIN || looks || without_end(head, "authorization").is_some();
        if !value.is_empty() && secret {
            out += &text[done..begin];
            out += STRUCK;
            done = begin + value.len();
        }
    }
    out + &text[done..]
}

/// Whether it is `USER:PASSWORD` in base64.
fn is_pair(value: &str) -> bool {
    let value = value.trim_end_matches('.');
    let mut all = [STANDARD, URL_SAFE].into_iter().map(|alphabet| GeneralPurpose::new(&alphabet, LOOSE).decode(value));
    all.any(|pair| pair.is_ok_and(|pair| pair.contains(&b':')))
}

/// Without who asks in URLs: `https://USER:PASSWORD@HOST`.
fn without_passwords(text: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + "://".len());
        out += before;
        let end = after.find(|c: char| c.is_whitespace() || "/?#\"'<>`\\".contains(c)).unwrap_or(after.len());
        let (authority, after) = after.split_at(end);
        match authority.rfind('@') {
            Some(at) => {
                out += STRUCK;
                out += &authority[at..];
            }
            None => out += authority,
        }
        rest = after;
    }
    out + rest
}

/// An object without values of environment variables and other people's annotations, also those of templates in it, and without
/// what nobody reads.
pub fn object(mut object: Value) -> Value {
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
    }
    clean(&mut object);
    object
}

fn clean(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                match (key.as_str(), value) {
                    ("env", Value::Array(all)) => {
                        for value in all.iter_mut().filter_map(|v| v.get_mut("value")) {
                            *value = json!(STRUCK);
                        }
                    }
                    ("annotations", Value::Object(all)) => {
                        all.retain(|key, _| ANNOTATIONS.iter().any(|a| key.starts_with(a)));
                    }
                    (_, value) => clean(value),
                }
            }
        }
        Value::Array(all) => all.iter_mut().for_each(clean),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn keys_and_tokens_are_struck_out() {
        let token = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJ4In0.c2ln_bmF0dXJl";
        let key = "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEE\n-----END EC PRIVATE KEY-----";
        let cut = "-----BEGIN PRIVATE KEY-----\nMHcCAQEE\n";
        let certificate = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----";
        for (text, expected) in [
            (format!("a {key} b"), "a [struck out] b".to_owned()),
            (format!("{{\"k\":\"{}\"}}", key.replace('\n', "\\n")), "{\"k\":\"[struck out]\"}".into()),
            (format!("a {certificate} {key}"), format!("a {certificate} [struck out]")),
            (format!("{key}{certificate}{key}."), format!("[struck out]{certificate}[struck out].")),
            // One that breaks off, before others.
            (format!("x {cut}"), "x [struck out]".into()),
            (format!("x {cut}{certificate} {key} y"), "x [struck out] y".into()),
            (format!("x {cut}{cut}{key} y"), "x [struck out] y".into()),
            (format!("x -----BEGIN {key} y"), "x -----BEGIN [struck out] y".into()),
            (format!("-----BEGIN CERTIFICATE-----\n{key}"), "-----BEGIN CERTIFICATE-----\n[struck out]".into()),
            (format!("token={token}, eyJ and eyJa.b"), "token=[struck out], eyJ and eyJa.b".into()),
            (
                "authorization: Bearer abcdefghijklmnopqrstuvwxyz012345, ok".into(),
                "authorization: Bearer [struck out], ok".into(),
            ),
        ] {
            assert_eq!(redact(&text), expected);
        }
    }

    #[test]
    fn credentials_are_struck_out_and_prose_is_not() {
        for (text, expected) in [
            ("Basic rules hold", "Basic rules hold"),
            ("a bearer token is basic", "a bearer token is basic"),
            // a:b
            ("Basic YTpi", "Basic [struck out]"),
            ("sent basic  YTpi. Then", "sent basic  [struck out] Then"),
            // Without a colon, where nothing else can be.
            ("Authorization: Basic YWJj x", "Authorization: Basic [struck out] x"),
            ("{\"Authorization\":[\"Bearer abc\"]}", "{\"Authorization\":[\"Bearer [struck out]\"]}"),
            ("BEARER s3cret", "BEARER [struck out]"),
            ("Bearer a1 Bearer a2 é", "Bearer [struck out] Bearer [struck out] é"),
            ("Bearer ", "Bearer "),
            ("get https://joe:hunter2@example.com/x?a@b", "get https://[struck out]@example.com/x?a@b"),
            ("\"http://t0ken@h\",\"ftp://h/a@b\"", "\"http://[struck out]@h\",\"ftp://h/a@b\""),
            ("socks5://a:p@ss@[::1]:1080", "socks5://[struck out]@[::1]:1080"),
            ("https://example.com, joe@example.com", "https://example.com, joe@example.com"),
        ] {
            assert_eq!(redact(text), expected);
        }
    }

    #[test]
    fn long_texts_take_their_time_only_once() {
        let long = |text: &str| text.repeat((4 << 20) / text.len());
        for text in [
            "-----BEGIN A-----",
            "-----BEGIN PRIVATE KEY-----",
            "-----END ",
            "eyJ ",
            "bearer ",
            " ",
            "Basic a ",
            "://",
            "a",
        ] {
            let begun = Instant::now();
            redact(&long(text));
            // A debug build on a busy machine; in proportion to its square it would be minutes.
            assert!(begun.elapsed() < Duration::from_secs(20), "{text}: {:?}", begun.elapsed());
        }
    }

    #[test]
    fn of_objects_the_environment_and_other_peoples_annotations_are_struck_out() {
        let annotations = json!({"kubectl.kubernetes.io/last-applied-configuration": "hunter2", "tidegate.dev/pool": "a", "vault/x": "hunter2"});
        let env = json!([{"name": "A", "value": "hunter2"}, {"name": "B", "valueFrom": {"fieldRef": {}}}]);
        let template = json!({"metadata": {"annotations": annotations}, "spec": {"containers": [{"env": env}]}});
        let metadata = json!({"name": "x", "managedFields": [1], "annotations": annotations});
        let seen = object(json!({"metadata": metadata, "spec": {"template": template}}));
        let kept = json!({"tidegate.dev/pool": "a"});
        let env = json!([{"name": "A", "value": STRUCK}, {"name": "B", "valueFrom": {"fieldRef": {}}}]);
        let template = json!({"metadata": {"annotations": kept}, "spec": {"containers": [{"env": env}]}});
        assert_eq!(seen, json!({"metadata": {"name": "x", "annotations": kept}, "spec": {"template": template}}));
        for other in [json!({"major": "1"}), json!([1]), json!("x")] {
            assert_eq!(object(other.clone()), other);
        }
    }
}
