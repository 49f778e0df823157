//! `tidegate status`: asks a running gateway or agent for its status.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// The most that a status may have, in octets.
const LIMIT: u64 = 16 << 20;

/// Gets a path of an admin port: the HTTP status code and the body.
pub fn get(admin: SocketAddr, path: &str) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&admin, Duration::from_secs(3)).with_context(|| {
        format!(
            "cannot reach the admin port at {admin}: is the component running, and `admin` set in its configuration?"
        )
    })?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    // HTTP/1.0: one answer, not chunked, and the server closes.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: tidegate\r\n\r\n").context("cannot ask the admin port")?;
    let mut text = String::new();
    stream.take(LIMIT).read_to_string(&mut text).context("the admin port's answer broke off")?;
    let (head, body) = text.split_once("\r\n\r\n").context("the admin port's answer is not HTTP")?;
    let code = head.split(' ').nth(1).and_then(|c| c.parse().ok()).context("the admin port's answer is not HTTP")?;
    Ok((code, body.to_owned()))
}

/// Prints readiness and status. Exit code 0 if the component is ready, 1 if not.
pub fn run(admin: SocketAddr) -> Result<u8> {
    let (ready, why) = get(admin, "/readyz")?;
    let (code, body) = get(admin, "/status")?;
    ensure!(code == 200, "the admin port answered {code}");
    let status: serde_json::Value = serde_json::from_str(&body).context("the status is not JSON")?;
    println!("{}", serde_json::to_string_pretty(&status)?);
    if ready != 200 {
        eprintln!("not ready: {}", why.trim());
        return Ok(1);
    }
    Ok(0)
}
