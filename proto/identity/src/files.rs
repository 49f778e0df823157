//! Credentials in files, as a mounted Secret or cert-manager writes them.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use crate::{Credentials, Error};

/// PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// Certificate chain, leaf first.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The authorities that are trusted.
    pub ca: PathBuf,
}

/// When a file was changed, how long it is, and which one it is: a link may lead to another one now.
type Stamp = Option<(SystemTime, u64, u64)>;

/// Files that are read again when they change.
#[derive(Debug)]
pub struct Files {
    paths: Paths,
    stamps: [Stamp; 3],
    held: Option<Arc<Credentials>>,
}

impl Files {
    /// Nothing is read yet.
    pub fn new(paths: Paths) -> Self {
        Self { paths, stamps: [None; 3], held: None }
    }

    fn stamps(&self) -> [Stamp; 3] {
        [&self.paths.certificate, &self.paths.key, &self.paths.ca].map(|path| {
            let meta = std::fs::metadata(path).ok()?;
            Some((meta.modified().ok()?, meta.len(), meta.ino()))
        })
    }

    /// What holds now. Files that changed are read again; while they do not fit together, as between two writes, what
    /// held before holds.
    ///
    /// # Errors
    /// When they were never usable.
    pub fn now(&mut self) -> Result<Arc<Credentials>, Error> {
        let stamps = self.stamps();
        if let Some(held) = self.held.as_ref().filter(|_| stamps == self.stamps) {
            return Ok(held.clone());
        }
        // Of the time before the reading: what is written meanwhile is read next time.
        self.stamps = stamps;
        match (self.read(), &self.held) {
            (Ok(new), held) => {
                if held.is_some() {
                    tracing::info!(certificate = %self.paths.certificate.display(), "certificates read again");
                }
                Ok(self.held.insert(Arc::new(new)).clone())
            }
            (Err(error), Some(held)) => {
                tracing::error!(%error, "changed certificates are not usable; the old ones hold");
                Ok(held.clone())
            }
            (Err(error), None) => Err(error),
        }
    }

    fn read(&self) -> Result<Credentials, Error> {
        let read = |path: &Path| {
            std::fs::read(path).map_err(|source| Error::File { path: path.display().to_string(), source })
        };
        let Paths { certificate, key, ca } = &self.paths;
        Credentials::from_pem(&read(certificate)?, &read(key)?, &read(ca)?)
    }
}
