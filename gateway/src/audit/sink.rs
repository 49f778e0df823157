//! Where lines go: standard output, or a file that others may rename, delete or fill the disk of.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::record::Previous;

/// How much of the end of a file is read for its last record, in octets.
const TAIL: u64 = 64 * 1024;
/// How often it is asked whether the file is still the one at its path.
const LOOK: Duration = Duration::from_millis(500);

pub(super) struct Sink {
    to: To,
    /// The last write left part of a line behind.
    torn: bool,
    /// Writing fails now; said once in the log, and once when it works again.
    failing: bool,
    looked: Instant,
}

enum To {
    Stdout,
    File { path: PathBuf, file: Option<File> },
}

fn open(path: &Path) -> io::Result<File> {
    // Records name pods and hosts: for the owner and its group only.
    OpenOptions::new().append(true).create(true).mode(0o640).open(path)
}

impl Sink {
    fn new(to: To, torn: bool) -> Self {
        Self { to, torn, failing: false, looked: Instant::now() }
    }

    pub(super) fn stdout() -> Self {
        Self::new(To::Stdout, false)
    }

    /// Opens a file, and says where its last run ended.
    pub(super) fn file(path: &Path) -> io::Result<(Self, Option<Previous>)> {
        let (previous, torn) = tail(path).unwrap_or_default();
        let file = Some(open(path)?);
        Ok((Self::new(To::File { path: path.to_owned(), file }, torn), previous))
    }

    /// Opens the file again if it is no longer the one at its path.
    pub(super) fn look_after(&mut self) {
        let To::File { path, file } = &mut self.to else { return };
        self.looked = Instant::now();
        let id = |m: std::fs::Metadata| (m.dev(), m.ino());
        let there = std::fs::metadata(&*path).ok().map(id);
        let ours = file.as_ref().and_then(|f| f.metadata().ok()).map(id);
        if there.is_some() && there == ours {
            return;
        }
        // While it cannot be opened the old one is no help: nobody reads it.
        *file = open(path).ok();
        self.torn = false;
    }

    /// Writes whole lines. Returns how much of `text` is in the sink for good; `whole` cuts a length to whole lines.
    pub(super) fn write(&mut self, text: &[u8], whole: impl Fn(usize) -> usize) -> usize {
        if self.failing || self.looked.elapsed() >= LOOK {
            self.look_after();
        }
        let (n, result) = match &mut self.to {
            To::Stdout => put(&mut io::stdout().lock(), text, &mut self.torn),
            To::File { file: Some(f), .. } => put(f, text, &mut self.torn),
            To::File { file: None, .. } => (0, Err(io::ErrorKind::NotFound.into())),
        };
        let done = whole(n);
        if n > 0 {
            self.torn = done < n;
        }
        if self.torn
            && let To::File { file: Some(f), .. } = &self.to
        {
            // Better no line than half a line; where that fails, the next write ends it.
            self.torn = f.metadata().and_then(|m| f.set_len(m.len().saturating_sub((n - done) as u64))).is_err();
        }
        match result {
            Ok(()) if self.failing => {
                self.failing = false;
                tracing::warn!("the audit log is written again; the next record says what was lost");
            }
            Err(e) if !self.failing => {
                self.failing = true;
                tracing::error!("the audit log cannot be written: {e}; records are lost, and counted");
            }
            _ => {}
        }
        done
    }
}

/// Writes as much as goes, after ending a torn line; returns how much of `text` went.
fn put(to: &mut impl Write, text: &[u8], torn: &mut bool) -> (usize, io::Result<()>) {
    if *torn && let Err(e) = to.write_all(b"\n") {
        return (0, Err(e));
    }
    *torn = false;
    let mut n = 0;
    while n < text.len() {
        match to.write(&text[n..]) {
            Ok(0) => return (n, Err(io::ErrorKind::WriteZero.into())),
            Ok(k) => n += k,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return (n, Err(e)),
        }
    }
    (n, to.flush())
}

/// The last record of a file, and whether its last line has no end.
fn tail(path: &Path) -> io::Result<(Option<Previous>, bool)> {
    let kind = std::fs::metadata(path)?.file_type();
    if kind.is_fifo() || kind.is_char_device() {
        return Ok((None, false));
    }
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(TAIL)))?;
    let mut bytes = Vec::new();
    file.take(TAIL).read_to_end(&mut bytes)?;
    let torn = bytes.last().is_some_and(|b| *b != b'\n');
    let previous = bytes.rsplit(|b| *b == b'\n').find_map(|line| {
        let v: serde_json::Value = serde_json::from_slice(line).ok()?;
        let boot = v.get("boot")?.as_str()?.to_owned();
        Some(Previous { boot, sequence: v.get("sequence")?.as_u64()? })
    });
    Ok((previous, torn))
}
