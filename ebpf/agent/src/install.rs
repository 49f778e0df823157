//! Puts the CNI plugin into its place on the node and its entry into the node's network configuration, and keeps both there:
//! others write that configuration, too.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde_json::Value;
use tidegate_cni::conflist::{self, SAVED, TYPE};
use tidegate_cni::files::replace;
use tidegate_cni::spec::Paths;
use tokio::sync::watch;
use tokio::time::sleep;

use crate::Status;
use crate::config::Cni;

/// How often the folder of configurations is looked at: a pod that starts meanwhile is not judged at once.
const LOOK: Duration = Duration::from_millis(250);
/// How often the plugin's file is.
const LOOKS: u32 = 40;
/// The most octets of a network configuration.
const MAX_CONFIG: u64 = 1 << 20;

/// What a file was like.
type Seen = (PathBuf, Option<SystemTime>, u64);

/// Keeps the plugin installed.
#[derive(Debug)]
pub(crate) struct Installer {
    binary: PathBuf,
    folder: PathBuf,
    standing: PathBuf,
    entry: Value,
    /// The configuration that was right when it was read last.
    right: Option<Seen>,
}

fn error(path: &Path) -> impl FnOnce(io::Error) -> String {
    let path = path.display().to_string();
    move |e| format!("{path}: {e}")
}

impl Installer {
    /// Of a node, if it is this agent's to do.
    pub fn new(cni: &Cni, pins: &Path) -> Option<Self> {
        let (bin, conf) = (cni.bin_dir.as_ref()?, cni.conf_dir.as_ref()?);
        let paths = Paths { folder: cni.folder.clone(), standing: cni.standing.clone(), pins: pins.to_owned() };
        Some(Self {
            binary: bin.join(TYPE),
            folder: conf.clone(),
            standing: cni.standing.clone(),
            entry: conflist::entry(&paths),
            right: None,
        })
    }

    /// Works until nobody listens. Nothing is installed before there is something to go by while no agent runs.
    pub async fn run(mut self, ready: watch::Receiver<Status>, trouble: watch::Sender<Option<String>>) {
        while !(ready.borrow().ready && self.standing.exists()) {
            sleep(LOOK).await;
        }
        let mut looks = 0u32;
        while !trouble.is_closed() {
            let file = looks.is_multiple_of(LOOKS);
            looks = looks.wrapping_add(1);
            let step = tokio::task::spawn_blocking(move || {
                let done = if file { self.place() } else { Ok(()) };
                let done = done.and_then(|()| self.enter());
                (self, done)
            });
            let Ok((this, done)) = step.await else { return };
            self = this;
            let text = done.err().map(|e| format!("the CNI plugin is not installed: {e}"));
            trouble.send_if_modified(|old| {
                let new = *old != text;
                *old = text;
                new
            });
            sleep(LOOK).await;
        }
    }

    /// Puts the file there, if it is not there as it should be.
    fn place(&self) -> Result<(), String> {
        let own = std::env::current_exe().map_err(|e| format!("this program: {e}"))?;
        if same(&own, &self.binary) {
            return Ok(());
        }
        let new = self.binary.with_file_name(format!(".{TYPE}.new"));
        let copy = || {
            // A copy has the permissions of what it is of.
            fs::copy(&own, &new)?;
            File::open(&new)?.sync_all()?;
            fs::rename(&new, &self.binary)
        };
        copy().map_err(error(&self.binary))?;
        tracing::info!(file = %self.binary.display(), "the CNI plugin was put into its place");
        Ok(())
    }

    /// Puts the entry into the configuration that runtimes take.
    fn enter(&mut self) -> Result<(), String> {
        let names: Vec<String> = fs::read_dir(&self.folder)
            .map_err(error(&self.folder))?
            .flatten()
            .filter(|e| e.path().is_file())
            .filter_map(|e| e.file_name().into_string().ok())
            .collect();
        let Some(name) = conflist::choose(names.iter().map(String::as_str)) else {
            return Err(format!("{} has no network configuration yet", self.folder.display()));
        };
        let path = self.folder.join(name);
        let seen = look(&path).map_err(error(&path))?;
        if self.right.as_ref() == Some(&seen) {
            return Ok(());
        }
        let text = read(&path).map_err(error(&path))?;
        let refused = |e: conflist::Problem| format!("{}: {e}", path.display());
        let list = if conflist::is_list(name) { text.clone() } else { conflist::list_of(&text).map_err(refused)? };
        let Some(new) = conflist::with(&list, &self.entry).map_err(refused)? else {
            self.right = Some(seen);
            return Ok(());
        };
        // Somebody may have written meanwhile: then the next look sees it.
        if look(&path).map_err(error(&path))? != seen {
            return Ok(());
        }
        let target = path.with_extension("conflist");
        replace(&target, new.as_bytes(), mode(&path), true).map_err(error(&target))?;
        if target != path {
            fs::rename(&path, saved(&path)).map_err(error(&path))?;
        }
        tracing::info!(file = %target.display(), "the CNI plugin's entry was put into the network configuration");
        self.right = None;
        Ok(())
    }
}

/// Where a configuration that was no list is kept.
fn saved(path: &Path) -> PathBuf {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    path.with_file_name(format!("{name}.{SAVED}"))
}

fn look(path: &Path) -> io::Result<Seen> {
    let meta = fs::metadata(path)?;
    Ok((path.to_owned(), meta.modified().ok(), meta.len()))
}

fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).map_or(0o600, |m| m.permissions().mode() & 0o777)
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MAX_CONFIG + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_CONFIG {
        return Err(io::Error::other(format!("more than {MAX_CONFIG} octets")));
    }
    Ok(text)
}

/// Whether two files have the same content.
fn same(a: &Path, b: &Path) -> bool {
    let compare = || -> io::Result<bool> {
        let (mut a, mut b) = (File::open(a)?, File::open(b)?);
        if a.metadata()?.len() != b.metadata()?.len() {
            return Ok(false);
        }
        let (mut x, mut y) = (vec![0; 1 << 16], vec![0; 1 << 16]);
        loop {
            let n = a.read(&mut x)?;
            b.read_exact(&mut y[..n])?;
            if n == 0 || x[..n] != y[..n] {
                return Ok(n == 0);
            }
        }
    };
    compare().unwrap_or(false)
}

/// Takes the entry out of every configuration, puts back what was no list, and removes the plugin.
///
/// # Errors
/// A file cannot be written or removed.
pub(crate) fn remove(cni: &Cni) -> io::Result<()> {
    let (Some(bin), Some(conf)) = (&cni.bin_dir, &cni.conf_dir) else { return Ok(()) };
    for path in fs::read_dir(conf).into_iter().flatten().flatten().map(|e| e.path()).filter(|p| p.is_file()) {
        if path.extension().is_some_and(|e| e == "conflist") {
            // One that cannot be read has no entry of ours.
            let Ok(Some(rest)) = read(&path).and_then(|t| conflist::without(&t).map_err(io::Error::other)) else {
                continue;
            };
            let before = ["conf", "json"].map(|ending| path.with_extension(ending));
            match before.iter().find(|p| saved(p).is_file()) {
                Some(original) => {
                    fs::rename(saved(original), original)?;
                    fs::remove_file(&path)?;
                }
                None => replace(&path, rest.as_bytes(), mode(&path), true)?,
            }
        }
    }
    match fs::remove_file(bin.join(TYPE)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[path = "install_tests.rs"]
mod tests;
