//! HTTP to the API server through kubectl's proxy, which does the TLS: a request takes milliseconds, where a kubectl
//! takes a good part of a second.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::json;

/// The administrator's way to the API.
#[derive(Debug)]
pub struct Api {
    socket: PathBuf,
}

/// What the API server answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status of HTTP.
    pub status: u16,
    /// The body, JSON; of a refusal a `Status`.
    pub body: String,
}

impl Api {
    /// By the socket of a running proxy.
    pub fn at(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Asks whether the API server is ready, and has made its own namespaces, which come a moment later.
    ///
    /// # Errors
    /// With what it, or the proxy, says instead.
    pub fn ready(&self) -> Result<()> {
        for path in ["/readyz", "/api/v1/namespaces/default", "/api/v1/namespaces/kube-system"] {
            let answer = self.send("GET", path, &[], "")?;
            ensure!(answer.status == 200, "{path}: {} {}", answer.status, answer.body);
        }
        Ok(())
    }

    /// Applies an object on the server's side, as kubectl does; whoever else set its fields loses them. `path` is its own,
    /// `object` YAML.
    ///
    /// # Errors
    /// When there is no answer, or a refusal.
    pub fn apply(&self, path: &str, object: &str) -> Result<()> {
        let headers = [("Content-Type", "application/apply-patch+yaml")];
        let answer = self.send("PATCH", &format!("{path}?fieldManager=kubectl&force=true"), &headers, object)?;
        ensure!(matches!(answer.status, 200 | 201), "{path}: {} {}", answer.status, answer.body);
        Ok(())
    }

    /// Makes a namespace; one that is there stays as it is.
    ///
    /// # Errors
    /// As [`Api::apply`].
    pub fn make_namespace(&self, name: &str) -> Result<()> {
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        self.apply(&format!("/api/v1/namespaces/{name}"), &object.to_string())
    }

    /// Sends a request. `headers` are further ones, such as `Impersonate-User`; `body` may be YAML.
    ///
    /// # Errors
    /// When there is no answer. A refusal is an answer.
    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Result<Answer> {
        // HTTP/1.0: one request a connection, and no chunks in the answer.
        let mut head = format!("{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Length: {}\r\n", body.len());
        if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-type")) {
            head += "Content-Type: application/yaml\r\n";
        }
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        let mut stream = UnixStream::connect(&self.socket).context("kubectl's proxy is gone")?;
        stream.write_all(format!("{head}\r\n{body}").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("the answer has no head")?;
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).context("the answer has no status")?;
        Ok(Answer { status, body: body.to_owned() })
    }
}
