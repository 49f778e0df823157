//! Commands in pods, and their logs: for tools that run at a workstation.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Status;
use kube::Api;
use kube::api::{AttachParams, LogParams};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::{Connection, Error};

/// Octets on their way from a command that nobody has read yet.
const BUFFER: usize = 64 << 10;
/// The most that is kept of what a command says on standard error, in octets.
const SAID: usize = 16 << 10;

/// How a command in a pod ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ran {
    /// Its exit status; absent if nobody told it, as when its output was cut.
    pub code: Option<i32>,
    /// What it wrote to standard output.
    pub output: Vec<u8>,
    /// What it wrote to standard error, or why it could not be started.
    pub said: String,
    /// Whether it would have written more than was asked for.
    pub cut: bool,
}

/// Which container of which pod.
#[derive(Clone, Copy, Debug)]
pub struct Container<'a> {
    /// The pod's namespace.
    pub namespace: &'a str,
    /// The pod.
    pub pod: &'a str,
    /// The container.
    pub name: &'a str,
}

/// Runs a command, and keeps at most `most` octets of its output.
///
/// # Errors
/// The API server or the node refused, is away, or it did not end within `limit`.
pub async fn exec(
    connection: &Connection,
    at: Container<'_>,
    command: &[&str],
    most: usize,
    limit: Duration,
) -> Result<Ran, Error> {
    match tokio::time::timeout(limit, run(connection, at, command, most)).await {
        Ok(ran) => ran,
        Err(_) => Err(Error::Broken(format!("no end of {} within {} s", command.join(" "), limit.as_secs()))),
    }
}

async fn run(connection: &Connection, at: Container<'_>, command: &[&str], most: usize) -> Result<Ran, Error> {
    let pods: Api<Pod> = Api::namespaced(connection.client.clone(), at.namespace);
    let params = AttachParams::default().container(at.name).stdin(false).stdout(true).stderr(true);
    let params = params.max_stdout_buf_size(BUFFER).max_stderr_buf_size(BUFFER);
    let mut process = pods.exec(at.pod, command.iter().copied(), &params).await?;
    let (out, err, status) = (process.stdout(), process.stderr(), process.take_status());
    let (Some(out), Some(err), Some(status)) = (out, err, status) else {
        return Err(Error::Broken("a command without streams".into()));
    };
    let both = async { tokio::join!(read(out, most), read(err, SAID)) };
    let ((output, cut), (said, _)) = both.await;
    let mut ran = Ran { code: None, output, said: String::from_utf8_lossy(&said).trim().to_owned(), cut };
    // What is not read blocks the streams, the status among them.
    if !cut && let Some(status) = status.await {
        ran.code = code(&status);
        if ran.code.is_none() && ran.said.is_empty() {
            ran.said = status.message.unwrap_or_default();
        }
    }
    Ok(ran)
}

/// Reads to the end or to the limit: what, and whether there is more.
async fn read(from: impl AsyncRead + Unpin, most: usize) -> (Vec<u8>, bool) {
    let mut all = Vec::new();
    // One more than is kept shows that there is more. What breaks off is kept as far as it came.
    let _ = from.take(most as u64 + 1).read_to_end(&mut all).await;
    let cut = all.len() > most;
    all.truncate(most);
    (all, cut)
}

/// The exit status in what the node says of a command's end.
fn code(status: &Status) -> Option<i32> {
    if status.status.as_deref() == Some("Success") {
        return Some(0);
    }
    let causes = status.details.as_ref()?.causes.as_ref()?;
    causes.iter().find(|c| c.reason.as_deref() == Some("ExitCode"))?.message.as_ref()?.parse().ok()
}

/// Reads the end of a container's log, at most `most` octets; of the container before it with `previous`.
///
/// # Errors
/// The API server or the node refused, is away, or did not answer within `limit`.
pub async fn log(
    connection: &Connection,
    at: Container<'_>,
    previous: bool,
    most: usize,
    limit: Duration,
) -> Result<String, Error> {
    let pods: Api<Pod> = Api::namespaced(connection.client.clone(), at.namespace);
    // By lines: octets count from the beginning, and the end says most.
    let lines = i64::try_from((most / LINE).max(1)).unwrap_or(i64::MAX);
    let params = LogParams {
        container: Some(at.name.to_owned()),
        previous,
        tail_lines: Some(lines),
        limit_bytes: Some(i64::try_from(most.saturating_mul(LONGER)).unwrap_or(i64::MAX)),
        timestamps: true,
        ..LogParams::default()
    };
    match tokio::time::timeout(limit, pods.logs(at.pod, &params)).await {
        Ok(text) => Ok(end(text?, most)),
        Err(_) => Err(Error::Broken(format!("no log within {} s", limit.as_secs()))),
    }
}

/// The usual octets of a line of a log, and how much longer all of them may be before the last ones are lost.
const LINE: usize = 512;
const LONGER: usize = 4;

/// The last lines of a text, of so many octets together at most.
fn end(text: String, most: usize) -> String {
    let Some(mut from) = text.len().checked_sub(most).filter(|n| *n > 0) else { return text };
    while !text.is_char_boundary(from) {
        from += 1;
    }
    let rest = &text[from..];
    rest.split_once('\n').map_or(rest, |(_, whole)| whole).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_node_says_how_a_command_ended() {
        let of = |v: serde_json::Value| code(&serde_json::from_value(v).unwrap());
        assert_eq!(of(json!({"status": "Success"})), Some(0));
        let details = json!({"causes": [{"reason": "ExitCode", "message": "7"}]});
        assert_eq!(of(json!({"status": "Failure", "reason": "NonZeroExitCode", "details": details})), Some(7));
        assert_eq!(of(json!({"status": "Failure", "message": "no such file"})), None);
    }

    #[test]
    fn of_a_log_the_end_is_kept() {
        assert_eq!(end("a\nb\nc\n".into(), 6), "a\nb\nc\n");
        assert_eq!(end("aé\nbb\nc\n".into(), 7), "bb\nc\n");
    }

    #[tokio::test]
    async fn output_is_kept_up_to_the_limit() {
        assert_eq!(read(&b"abc"[..], 3).await, (b"abc".to_vec(), false));
        assert_eq!(read(&b"abcd"[..], 3).await, (b"abc".to_vec(), true));
    }
}
