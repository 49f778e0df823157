//! Network namespaces: names under /run/netns, threads that enter them, batches of `ip` and `nft`.
//!
//! The lab is not the product: it may run `ip` and `nft` while it builds the world.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

/// Where named network namespaces live.
pub fn path(netns: &str) -> PathBuf {
    Path::new("/run/netns").join(netns)
}

/// The inode of a named namespace, if there is one: it tells a namespace from another that got its name later.
pub fn inode(netns: &str) -> Option<u64> {
    std::fs::metadata(path(netns)).ok().map(|m| m.ino())
}

/// Makes a named namespace; fails if the name is taken.
pub fn create(netns: &str) -> Result<()> {
    checked(Command::new("ip").args(["netns", "add", netns]), None)
}

/// Deletes a named namespace.
pub fn delete(netns: &str) -> Result<()> {
    checked(Command::new("ip").args(["netns", "delete", netns]), None)
}

/// Moves the calling thread into a named namespace, for good.
pub fn enter_thread(netns: &str) -> io::Result<()> {
    let file = File::open(path(netns))?;
    setns(&file, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)
}

/// Gives the calling thread a mount namespace of its own in which `resolv_conf` is /etc/resolv.conf.
pub fn own_resolv_conf(resolv_conf: &Path) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    // Slave and not private: what is unmounted outside, as bpffs when the lab goes down, must go here too.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>)?;
    mount(Some(resolv_conf), "/etc/resolv.conf", None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    Ok(())
}

/// Runs `work` in a thread of its own inside a named namespace.
pub fn within<T: Send>(netns: &str, work: impl FnOnce() -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            enter_thread(netns).with_context(|| format!("cannot enter namespace {netns}"))?;
            Ok(work())
        });
        match thread.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Starts a command inside a namespace, with a resolv.conf of its own if one is given.
pub fn spawn(netns: &str, resolv_conf: Option<&Path>, command: &mut Command) -> Result<Child> {
    within(netns, || {
        if let Some(resolv) = resolv_conf {
            own_resolv_conf(resolv).context("cannot mount resolv.conf")?;
        }
        command.spawn().with_context(|| format!("cannot start {:?}", command.get_program()))
    })?
}

/// Sets sysctls, written with `/` between their parts (device names may hold dots).
pub fn sysctls(netns: &str, values: &[(String, String)]) -> Result<()> {
    within(netns, || {
        for (key, value) in values {
            std::fs::write(Path::new("/proc/sys").join(key), value)
                .with_context(|| format!("cannot set {key} to {value} in {netns}"))?;
        }
        Ok(())
    })?
}

/// Runs `ip` once for many commands.
pub fn ip_batch(netns: &str, lines: &[String]) -> Result<()> {
    batch("ip", netns, lines)
}

/// Runs `bridge` once for many commands.
pub fn bridge_batch(netns: &str, lines: &[String]) -> Result<()> {
    batch("bridge", netns, lines)
}

fn batch(tool: &str, netns: &str, lines: &[String]) -> Result<()> {
    if lines.is_empty() {
        return Ok(());
    }
    let mut text = lines.join("\n");
    text.push('\n');
    checked(Command::new(tool).args(["-n", netns, "-batch", "-"]), Some(&text))
        .with_context(|| format!("in namespace {netns}, of\n{text}"))
}

/// The hardware address of a device.
pub fn hardware_address(netns: &str, device: &str) -> Result<String> {
    let text = output(Command::new("ip").args(["-n", netns, "-o", "link", "show", "dev", device]), None)?;
    let mut words = text.split_whitespace().skip_while(|w| *w != "link/ether");
    words.nth(1).map(str::to_owned).with_context(|| format!("{device} has no hardware address: {text}"))
}

/// Loads an nft ruleset.
pub fn nft(netns: &str, rules: &str) -> Result<()> {
    within(netns, || checked(Command::new("nft").args(["-f", "-"]), Some(rules)))?
}

/// The text of a table of family `inet`.
pub fn nft_list(netns: &str, table: &str) -> Result<String> {
    within(netns, || output(Command::new("nft").args(["list", "table", "inet", table]), None))?
}

/// Runs a command to its end; an error carries what it wrote.
fn checked(command: &mut Command, input: Option<&str>) -> Result<()> {
    output(command, input).map(drop)
}

/// As [`checked`], and gives its standard output.
fn output(command: &mut Command, input: Option<&str>) -> Result<String> {
    let mut child = command
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {:?}", command.get_program()))?;
    if let (Some(text), Some(mut stdin)) = (input, child.stdin.take()) {
        stdin.write_all(text.as_bytes())?;
    }
    let out = child.wait_with_output()?;
    if !out.status.success() {
        bail!(
            "{:?} failed: {}{}",
            command.get_program(),
            String::from_utf8_lossy(&out.stderr).trim(),
            String::from_utf8_lossy(&out.stdout).trim()
        );
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}
