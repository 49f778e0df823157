//! Files that plugin and agent share: which pods were added, and what holds while no agent runs.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use tidegate_ebpf::Fixed;

use crate::spec::Attachment;
use crate::wire::Attached;

/// Default folder of the agent's socket and of the records.
pub const FOLDER: &str = "/run/tidegate/cni";
/// Default file of what holds while no agent runs. It outlives a reboot.
pub const STANDING: &str = "/var/lib/tidegate/cni.json";
/// Default folder of pinned programs.
pub const PINS: &str = "/sys/fs/bpf/tidegate";

/// The most octets of a record, and of what holds.
const MAX_RECORD: u64 = 64 << 10;
const MAX_STANDING: u64 = 64 << 20;
/// The most records that are read.
const MAX_RECORDS: usize = 8_192;
/// Version of [`Standing`], and the oldest that is read: an agent that is upgraded has not written yet.
const VERSION: u32 = 2;
const OLDEST: u32 = 1;

/// The agent's socket.
pub fn socket(folder: &Path) -> PathBuf {
    folder.join("agent.sock")
}

fn records(folder: &Path) -> PathBuf {
    folder.join("pods")
}

fn record(folder: &Path, of: &Attachment) -> PathBuf {
    records(folder).join(format!("{}@{}.json", of.container, of.ifname))
}

/// What a new pod of a namespace may be at the strictest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Touch {
    /// Nothing is denied to it.
    Untouched,
    /// Only cluster policies select it.
    Guarded,
    /// Default deny.
    Isolated,
}

/// What holds while no agent runs: the last that one knew.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Standing {
    version: u32,
    tunnel_port: u16,
    overlay_ports: Vec<u16>,
    mark: u32,
    mark_cluster: u32,
    mark_mask: u32,
    nodes: Vec<IpAddr>,
    prefixes: Vec<IpNet>,
    node_ports: Option<(u16, u16)>,
    dns: Vec<SocketAddr>,
    #[serde(default)]
    suffixes: Vec<String>,
    #[serde(default)]
    names: Vec<String>,
    namespaces: BTreeMap<String, Touch>,
}

impl Standing {
    /// Of a cluster.
    pub fn new(fixed: Fixed, namespaces: BTreeMap<String, Touch>) -> Self {
        Self {
            version: VERSION,
            tunnel_port: fixed.tunnel_port,
            overlay_ports: fixed.overlay_ports,
            mark: fixed.mark,
            mark_cluster: fixed.mark_cluster,
            mark_mask: fixed.mark_mask,
            nodes: fixed.nodes,
            prefixes: fixed.prefixes,
            node_ports: fixed.node_ports,
            dns: fixed.dns,
            suffixes: fixed.suffixes,
            names: fixed.names,
            namespaces,
        }
    }

    /// What a program that stands alone goes by.
    pub fn fixed(&self) -> Fixed {
        Fixed {
            tunnel_port: self.tunnel_port,
            overlay_ports: self.overlay_ports.clone(),
            mark: self.mark,
            mark_cluster: self.mark_cluster,
            mark_mask: self.mark_mask,
            nodes: self.nodes.clone(),
            prefixes: self.prefixes.clone(),
            node_ports: self.node_ports,
            dns: self.dns.clone(),
            suffixes: self.suffixes.clone(),
            names: self.names.clone(),
        }
    }

    /// What a new pod of a namespace may be; of one that is not known, anything.
    pub fn touch(&self, namespace: &str) -> Touch {
        self.namespaces.get(namespace).copied().unwrap_or(Touch::Isolated)
    }

    /// Reads it. A file of another version says nothing.
    ///
    /// # Errors
    /// It is not there, or not readable.
    pub fn read(path: &Path) -> io::Result<Self> {
        let standing: Self = serde_json::from_slice(&bounded(path, MAX_STANDING)?)?;
        if !(OLDEST..=VERSION).contains(&standing.version) {
            return Err(io::Error::other(format!("version {}", standing.version)));
        }
        Ok(standing)
    }

    /// Writes it, so that a reader and a crash see either the old or the new one.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        replace(path, &serde_json::to_vec(self)?, 0o600, true)
    }
}

fn bounded(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(most + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        return Err(io::Error::other(format!("{} has more than {most} octets", path.display())));
    }
    Ok(bytes)
}

/// Replaces a file by rename; `keep` waits for the disk.
///
/// # Errors
/// The disk refuses.
pub fn replace(path: &Path, content: &[u8], mode: u32, keep: bool) -> io::Result<()> {
    let folder = path.parent().ok_or_else(|| io::Error::other("no folder"))?;
    fs::create_dir_all(folder)?;
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    // Hidden, and with an ending that no reader of the folder takes.
    let new = folder.join(format!(".{name}.{}.new", std::process::id()));
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&new)?;
        file.write_all(content)?;
        if keep {
            file.sync_all()?;
        }
        fs::rename(&new, path)
    })();
    if written.is_err() {
        // What is left over is in nobody's way.
        let _ = fs::remove_file(&new);
    }
    written
}

/// Notes that a pod was added.
///
/// # Errors
/// The disk refuses.
pub fn note(folder: &Path, attached: &Attached) -> io::Result<()> {
    replace(&record(folder, &attached.attachment), &serde_json::to_vec(attached)?, 0o600, false)
}

/// Forgets a pod. That it is not known is no error.
///
/// # Errors
/// The disk refuses.
pub fn forget(folder: &Path, of: &Attachment) -> io::Result<()> {
    match fs::remove_file(record(folder, of)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// The pod of an attachment.
pub fn noted(folder: &Path, of: &Attachment) -> Option<Attached> {
    serde_json::from_slice(&bounded(&record(folder, of), MAX_RECORD).ok()?).ok()
}

/// All pods that were added. What is no record is passed over.
pub fn all_noted(folder: &Path) -> Vec<Attached> {
    let Ok(files) = fs::read_dir(records(folder)) else { return Vec::new() };
    let files = files.flatten().map(|f| f.path()).filter(|p| p.extension().is_some_and(|e| e == "json"));
    let read = |p: PathBuf| serde_json::from_slice(&bounded(&p, MAX_RECORD).ok()?).ok();
    files.take(MAX_RECORDS).filter_map(read).collect()
}

/// Removes all records and the socket's folder.
///
/// # Errors
/// The disk refuses.
pub fn remove(folder: &Path, standing: &Path) -> io::Result<()> {
    for result in [fs::remove_dir_all(folder), fs::remove_file(standing)] {
        match result {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn what_the_agent_before_an_upgrade_wrote_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("standing.json");
        let fixed =
            Fixed { suffixes: vec!["cluster.local".into()], names: vec!["db.shop.svc".into()], ..Fixed::default() };
        let new = Standing::new(fixed.clone(), [("shop".to_owned(), Touch::Untouched)].into());
        new.write(&path).unwrap();
        assert_eq!(Standing::read(&path).unwrap().fixed(), fixed);
        let with = |version: u32| {
            let mut value = serde_json::to_value(&new).unwrap();
            value["version"] = version.into();
            for field in ["names", "suffixes"] {
                value.as_object_mut().unwrap().remove(field);
            }
            fs::write(&path, value.to_string()).unwrap();
            Standing::read(&path)
        };
        let old = with(1).unwrap();
        assert_eq!((old.touch("shop"), old.fixed()), (Touch::Untouched, Fixed::default()));
        assert!(with(0).is_err() && with(3).is_err());
    }
}
