//! The way from the machine to the API server, which listens in a network namespace: loopback only.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::netns;

/// How long a connection to the API server may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// The loopback address of an instance: always the same one, and another's for another folder.
pub fn address(folder: &Path) -> IpAddr {
    // FNV-1a.
    let hash = folder
        .as_os_str()
        .as_encoded_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3));
    let [a, b, c, ..] = hash.to_be_bytes();
    // Not 127.0.0.x, where others listen.
    Ipv4Addr::new(127, a | 1, b, c).into()
}

/// Passes connections to `listen` on to `to` in a network namespace, until the process is ended.
///
/// # Errors
/// When it cannot listen.
pub fn run(listen: SocketAddr, netns: &str, to: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(listen).with_context(|| format!("cannot listen on {listen}"))?;
    for near in listener.incoming().flatten() {
        let netns = netns.to_owned();
        thread::spawn(move || {
            // A client whose connection ends here tries again.
            let _ = pass(&near, &netns, to);
        });
    }
    Ok(())
}

fn pass(near: &TcpStream, netns: &str, to: SocketAddr) -> Result<()> {
    let far = netns::within(netns, || TcpStream::connect_timeout(&to, CONNECT_LIMIT))??;
    thread::scope(|scope| {
        scope.spawn(|| copy(near, &far));
        copy(&far, near);
    });
    Ok(())
}

/// Copies one direction, and tells the other side when it ends.
fn copy(mut from: &TcpStream, mut to: &TcpStream) {
    // An end with an error is an end.
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_have_addresses_of_their_own() {
        let one = address(Path::new("/run/tidegate-lab/a/control"));
        assert!(one.is_loopback() && one != IpAddr::from([127, 0, 0, 1]));
        assert_eq!(one, address(Path::new("/run/tidegate-lab/a/control")));
        assert_ne!(one, address(Path::new("/run/tidegate-lab/b/control")));
    }
}
