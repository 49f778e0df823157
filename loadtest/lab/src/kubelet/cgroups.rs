//! The control groups that a node's containers are in: one group for each node, in every hierarchy of cgroup v1 or in the one of v2.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::lab::wait_for;

/// Where hierarchies are mounted.
const ROOT: &str = "/sys/fs/cgroup";
/// How long groups may take to become empty after their processes were killed.
const EMPTY_LIMIT: Duration = Duration::from_secs(10);

/// The group of an instance, as kubelets write it.
pub fn parent(lab: &str) -> String {
    format!("/tidegate-lab-{lab}")
}

/// Folders in which every group is made.
fn hierarchies() -> Result<Vec<PathBuf>> {
    let root = Path::new(ROOT);
    if root.join("cgroup.controllers").exists() {
        return Ok(vec![root.to_owned()]);
    }
    let entries = fs::read_dir(root).context("this machine has no control groups in /sys/fs/cgroup")?;
    // A hierarchy has its file of processes; a link is the second name of one.
    Ok(entries
        .flatten()
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()) && e.path().join("cgroup.procs").exists())
        .map(|e| e.path())
        .collect())
}

/// Makes a group with all that is above it.
///
/// # Errors
/// When a hierarchy refuses.
pub fn create(group: &str) -> Result<()> {
    for hierarchy in hierarchies()? {
        let mut above = hierarchy;
        for part in group.split('/').filter(|p| !p.is_empty()) {
            let folder = above.join(part);
            match fs::create_dir(&folder) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(e).with_context(|| format!("cannot make {}", folder.display()));
                }
                _ => {}
            }
            inherit(&above, &folder)?;
            above = folder;
        }
    }
    Ok(())
}

/// Gives a new group what it needs of the one above.
fn inherit(above: &Path, group: &Path) -> Result<()> {
    // cgroup v2: controllers are handed down one level at a time; some may be bound to v1 hierarchies.
    for controller in fs::read_to_string(above.join("cgroup.controllers")).unwrap_or_default().split_whitespace() {
        let _ = fs::write(above.join("cgroup.subtree_control"), format!("+{controller}"));
    }
    // cgroup v1: a group without CPUs and memory nodes takes no process.
    if !group.join("cgroup.clone_children").exists() {
        return Ok(());
    }
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if group.join(file).exists() {
            fs::write(group.join(file), fs::read_to_string(above.join(file))?)
                .with_context(|| format!("cannot set {file} of {}", group.display()))?;
        }
    }
    Ok(())
}

/// Removes a group with all that is in it, when its processes have ended.
///
/// # Errors
/// When processes stay in it.
pub fn remove(group: &str) -> Result<()> {
    for hierarchy in hierarchies()? {
        let folder = hierarchy.join(group.trim_start_matches('/'));
        let mut last = None;
        let gone = wait_for(EMPTY_LIMIT, || remove_tree(&folder).map_err(|e| last = Some(e)).ok());
        if let (None, Some(e)) = (gone, last) {
            return Err(e).with_context(|| format!("cannot remove {}", folder.display()));
        }
    }
    Ok(())
}

fn remove_tree(folder: &Path) -> io::Result<()> {
    if !folder.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(folder)?.flatten() {
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    // Its files go with it.
    fs::remove_dir(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_come_and_go_in_every_hierarchy() {
        let parent = parent(&format!("test-{}", std::process::id()));
        let group = format!("{parent}/node");
        create(&group).unwrap();
        for hierarchy in hierarchies().unwrap() {
            let folder = hierarchy.join(&group[1..]);
            assert!(folder.is_dir(), "{}", folder.display());
            // What a container is given there takes processes.
            fs::create_dir(folder.join("pod")).unwrap();
        }
        create(&group).unwrap();
        remove(&parent).unwrap();
        assert!(hierarchies().unwrap().iter().all(|h| !h.join(&parent[1..]).exists()));
        remove(&parent).unwrap();
    }
}
