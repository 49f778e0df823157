//! Notices that a directory's files changed.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use inotify::{Inotify, WatchMask};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Editors and kubelets write in several steps: changes within this time are one.
const SETTLE: Duration = Duration::from_millis(50);

/// A watch over a folder and the folders in it.
pub struct Watch {
    inotify: Inotify,
    root: PathBuf,
    watched: BTreeSet<PathBuf>,
}

impl Watch {
    /// Watches `root`.
    pub fn new(root: &Path) -> Result<Self> {
        let mut watch = Self {
            inotify: Inotify::init().context("cannot open an inotify instance")?,
            root: root.to_owned(),
            watched: BTreeSet::new(),
        };
        watch.rescan()?;
        Ok(watch)
    }

    /// Adds watches for folders that are new; those of removed folders went with them.
    fn rescan(&mut self) -> Result<()> {
        let mut found = BTreeSet::new();
        let mut todo = vec![self.root.clone()];
        while let Some(dir) = todo.pop() {
            for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|t| t.is_dir()) && found.len() + todo.len() < 1024 {
                    todo.push(entry.path());
                }
            }
            found.insert(dir);
        }
        for dir in &found {
            if !self.watched.contains(dir) {
                let mask = WatchMask::CLOSE_WRITE
                    | WatchMask::CREATE
                    | WatchMask::DELETE
                    | WatchMask::MOVED_FROM
                    | WatchMask::MOVED_TO
                    | WatchMask::DELETE_SELF;
                self.inotify.watches().add(dir, mask).with_context(|| format!("cannot watch {}", dir.display()))?;
            }
        }
        self.watched = found;
        Ok(())
    }

    /// Waits until something changed, at most `limit`. Says whether something did.
    pub fn wait(&mut self, limit: Duration) -> Result<bool> {
        if !self.readable(limit)? {
            return Ok(false);
        }
        let start = Instant::now();
        self.drain();
        // A steady stream of changes must not keep us from reading.
        while start.elapsed() < SETTLE * 10 && self.readable(SETTLE)? {
            self.drain();
        }
        self.rescan()?;
        Ok(true)
    }

    fn readable(&self, limit: Duration) -> Result<bool> {
        let mut fds = [PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, limit) {
            Ok(n) => Ok(n > 0),
            Err(nix::errno::Errno::EINTR) => Ok(false),
            Err(e) => Err(e).context("cannot poll inotify"),
        }
    }

    fn drain(&mut self) {
        let mut buffer = [0; 4096];
        while self.inotify.read_events(&mut buffer).is_ok_and(|mut e| e.next().is_some()) {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sees_writes_also_in_new_folders() {
        let dir = tempfile::tempdir().unwrap();
        let mut w = Watch::new(dir.path()).unwrap();
        assert!(!w.wait(Duration::from_millis(10)).unwrap());
        std::fs::write(dir.path().join("a.yaml"), "x").unwrap();
        assert!(w.wait(Duration::from_secs(5)).unwrap());
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        assert!(w.wait(Duration::from_secs(5)).unwrap());
        std::fs::write(dir.path().join("sub/b.yaml"), "x").unwrap();
        assert!(w.wait(Duration::from_secs(5)).unwrap());
        std::fs::remove_file(dir.path().join("sub/b.yaml")).unwrap();
        assert!(w.wait(Duration::from_secs(5)).unwrap());
    }
}
