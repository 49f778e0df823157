//! What can go wrong between host and kernel.

use std::io;
use std::path::PathBuf;

/// An error of the kernel edge.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The object does not load.
    #[error("the kernel programs do not load: {}", causes(.0))]
    Load(aya::EbpfError),
    /// A program is refused or cannot be attached.
    #[error("program {program}: {source}")]
    Program {
        /// The program.
        program: &'static str,
        /// Why.
        source: Box<aya::programs::ProgramError>,
    },
    /// A link cannot be read, updated or pinned.
    #[error("link {path}: {message}")]
    Link {
        /// Its pin.
        path: PathBuf,
        /// Why.
        message: String,
    },
    /// A map refuses an operation.
    #[error("map {map}: {source}")]
    Map {
        /// The map.
        map: &'static str,
        /// Why.
        source: Box<aya::maps::MapError>,
    },
    /// A pinned map has another layout than this version's.
    #[error("pinned map {map} has another layout: {what}")]
    Layout {
        /// The map.
        map: &'static str,
        /// What differs.
        what: String,
    },
    /// The kernel does not tell where it has something, or has it elsewhere than it should.
    #[error("the kernel's types: {0}")]
    Types(&'static str),
    /// A folder of pins is on some other file system.
    #[error("{0} is not on a BPF file system: mount one there (mount -t bpf bpf /sys/fs/bpf)")]
    NoBpffs(PathBuf),
    /// Another process holds the pins.
    #[error("another process works with the pins in {0}")]
    Busy(PathBuf),
    /// A file or system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// The desired state does not fit.
    #[error("{0}")]
    Capacity(String),
    /// The device is not there.
    #[error("no network device {0}")]
    NoDevice(String),
    /// The program belongs to the other role.
    #[error("program {0} is not loaded in this role")]
    NotLoaded(&'static str),
}

impl From<aya::EbpfError> for Error {
    fn from(error: aya::EbpfError) -> Self {
        Self::Load(error)
    }
}

/// An error with its causes, and what to do about one that says little.
fn causes(error: &aya::EbpfError) -> String {
    let mut text = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        let said = cause.to_string();
        // Some repeat their cause.
        if !text.ends_with(&said) {
            text = format!("{text}: {said}");
        }
        if cause.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::OutOfMemory) {
            text.push_str(": this machine has too little memory for it, or the limit of this container is below what the map takes (`capacities`)");
        }
        next = cause.source();
    }
    text
}

impl Error {
    pub(crate) fn map(map: &'static str) -> impl Fn(aya::maps::MapError) -> Self {
        move |source| Error::Map { map, source: Box::new(source) }
    }

    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Error::Io { what, source }
    }
}
