//! What looks like a secret, and objects without what may be one.

use serde_json::{Value, json};

const STRUCK: &str = "[struck out]";
/// PEM blocks whose kind ends so.
const KEY: &str = "PRIVATE KEY-----";
/// How JSON Web Tokens begin: `{"` in base64.
const TOKEN: &str = "eyJ";
/// Shorter ones are no tokens, in octets.
const TOKEN_MIN: usize = 20;

/// A text without private keys, tokens and passwords in URLs, whoever put them there.
pub fn redact(text: &str) -> String {
    let mut out = without_keys(text);
    out = without_tokens(&out);
    without_bearers(&out)
}

/// Without the insides of private keys; one whose end is cut off, to the end of the text.
fn without_keys(text: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(begin) = rest.find("-----BEGIN ") {
        let (before, block) = rest.split_at(begin);
        out += before;
        // As text and, in JSON, with its line ends escaped.
        let head = block.find(KEY).filter(|at| *at < 40);
        match head {
            Some(_) => {
                out += STRUCK;
                rest = block
                    .find("-----END ")
                    .and_then(|end| {
                        let tail = &block[end..];
                        tail.find(KEY).map(|at| &tail[at + KEY.len()..])
                    })
                    .unwrap_or_default();
            }
            None => {
                let (head, more) = block.split_at("-----BEGIN ".len());
                out += head;
                rest = more;
            }
        }
    }
    out + rest
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

/// Without what stands behind `Bearer ` and `Basic `.
fn without_bearers(text: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    loop {
        let next = ["Bearer ", "bearer ", "Basic "].iter().filter_map(|w| Some((rest.find(w)?, w.len()))).min();
        let Some((at, len)) = next else { return out + rest };
        let (before, after) = rest.split_at(at + len);
        out += before;
        let end = after.find(|c| !is_base64(c) && c != '.' && c != '~').unwrap_or(after.len());
        out += if end >= TOKEN_MIN { STRUCK } else { &after[..end] };
        rest = &after[end..];
    }
}

/// An object without values of environment variables, and without what nobody reads.
pub fn object(mut object: Value) -> Value {
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.remove("managedFields");
        if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
            // The whole object once more, environment included.
            annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
        }
    }
    without_environment(&mut object);
    object
}

fn without_environment(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                if key == "env" {
                    for variable in value.as_array_mut().into_iter().flatten() {
                        if let Some(value) = variable.get_mut("value") {
                            *value = json!(STRUCK);
                        }
                    }
                } else {
                    without_environment(value);
                }
            }
        }
        Value::Array(all) => all.iter_mut().for_each(without_environment),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_tokens_are_struck_out() {
        let token = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJ4In0.c2ln_bmF0dXJl";
        let key = "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEE\n-----END EC PRIVATE KEY-----";
        let certificate = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----";
        for (text, expected) in [
            (format!("a {key} b"), "a [struck out] b".to_owned()),
            (format!("{{\"k\":\"{}\"}}", key.replace('\n', "\\n")), "{\"k\":\"[struck out]\"}".into()),
            (format!("a {certificate} {key}"), format!("a {certificate} [struck out]")),
            ("x -----BEGIN PRIVATE KEY-----\nMHcCAQEE".into(), "x [struck out]".into()),
            (format!("token={token}, eyJ and eyJa.b"), "token=[struck out], eyJ and eyJa.b".into()),
            (
                "authorization: Bearer abcdefghijklmnopqrstuvwxyz012345, ok".into(),
                "authorization: Bearer [struck out], ok".into(),
            ),
            ("Basic rules hold".into(), "Basic rules hold".into()),
        ] {
            assert_eq!(redact(&text), expected);
        }
    }

    #[test]
    fn values_of_the_environment_are_struck_out() {
        let pod = json!({
            "metadata": {"name": "x", "managedFields": [1], "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}"}},
            "spec": {"containers": [{"env": [{"name": "A", "value": "hunter2"}, {"name": "B", "valueFrom": {"fieldRef": {}}}]}]},
        });
        let seen = object(pod);
        assert!(!seen.to_string().contains("hunter2") && seen["metadata"]["managedFields"].is_null());
        assert_eq!(seen["spec"]["containers"][0]["env"][0], json!({"name": "A", "value": STRUCK}));
        assert_eq!(seen["metadata"]["annotations"], json!({}));
    }
}
