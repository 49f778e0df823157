//! What must be there before anything is loaded.

use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use crate::Error;

const LOCKDOWN: &str = "/sys/kernel/security/lockdown";
const BPFFS: &str = "/sys/fs/bpf";

/// Checks what the kernel programs need, and mounts the bpffs if it is not mounted.
///
/// # Errors
/// One sentence that names what is missing.
pub fn preflight() -> Result<(), String> {
    let kernel = nix::sys::utsname::uname().map_err(|e| format!("the kernel does not tell its version: {e}"))?;
    let release = kernel.release().to_string_lossy();
    if parse_release(&release).is_none_or(|version| version < (6, 6)) {
        return Err(format!("kernel {release} is too old: tcx needs 6.6"));
    }
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        return Err("the kernel has no BTF: it must be built with CONFIG_DEBUG_INFO_BTF".into());
    }
    // Where there is no such file, loading the programs says it.
    if std::fs::read_to_string(LOCKDOWN).is_ok_and(|modes| modes.contains("[confidentiality]")) {
        return Err("the kernel is locked down to confidentiality: programs cannot read its packet buffers".into());
    }
    mount_bpffs()?;
    // Creating a map needs CAP_BPF, loading classifiers CAP_NET_ADMIN; without CAP_PERFMON the verifier refuses code that
    // reuses stack slots of pointers, as compilers make it, and reads of the kernel's memory.
    for (bit, name) in [(39, "CAP_BPF"), (12, "CAP_NET_ADMIN"), (38, "CAP_PERFMON")] {
        if !has_capability(bit) {
            return Err(format!("{name} is missing: run as root or grant it"));
        }
    }
    Ok(())
}

fn mount_bpffs() -> Result<(), String> {
    if is_bpffs(Path::new(BPFFS)).unwrap_or(false) {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), BPFFS, Some("bpf"), flags, Some("mode=0700"))
        .map_err(|e| format!("no bpffs is mounted at {BPFFS}, and mounting it failed: {e}"))
}

/// Nothing can be pinned elsewhere, and the kernel's word for it is that it is not permitted.
pub(crate) fn on_bpffs(folder: &Path) -> Result<(), Error> {
    let found = is_bpffs(folder).map_err(|e| Error::io(format!("cannot look at {}", folder.display()))(e.into()))?;
    if found { Ok(()) } else { Err(Error::NoBpffs(folder.to_owned())) }
}

fn is_bpffs(folder: &Path) -> nix::Result<bool> {
    statfs(folder).map(|s| s.filesystem_type() == BPF_FS_MAGIC)
}

/// Major and minor version.
fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn has_capability(bit: u32) -> bool {
    let Ok(status) = std::fs::read_to_string("/proc/thread-self/status") else {
        return false;
    };
    let effective = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    effective.and_then(|v| u64::from_str_radix(v.trim(), 16).ok()).is_some_and(|caps| caps & (1 << bit) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(parse_release("6.18.44-fc-v657"), Some((6, 18)));
        assert_eq!(parse_release("5.15.0"), Some((5, 15)));
        assert_eq!(parse_release("x"), None);
    }

    #[test]
    fn this_machine_will_do() {
        assert_eq!(preflight(), Ok(()));
    }
}
