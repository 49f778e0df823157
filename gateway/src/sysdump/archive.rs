//! The archive: a tar of texts, compressed, with a bound on what it holds.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use flate2::Compression;
use flate2::write::GzEncoder;

use super::redact::redact;

/// The most that is told of what is missing, in lines.
const MISSING: usize = 1000;

pub struct Archive {
    out: tar::Builder<GzEncoder<File>>,
    /// The folder that everything is in.
    name: String,
    /// Octets that may still come.
    left: u64,
    /// Time of all files, in seconds since 1970.
    time: u64,
    files: Vec<(String, usize)>,
    missing: Vec<String>,
}

impl Archive {
    /// Makes the file, which only its owner may read.
    ///
    /// # Errors
    /// It cannot be made, or is there already.
    pub fn create(file: &Path, name: String, size: u64, time: i64) -> Result<Self> {
        let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file);
        let made = made.with_context(|| format!("cannot make {}", file.display()))?;
        Ok(Self {
            out: tar::Builder::new(GzEncoder::new(made, Compression::default())),
            name,
            left: size,
            time: u64::try_from(time).unwrap_or_default(),
            files: Vec::new(),
            missing: Vec::new(),
        })
    }

    /// Adds a text without what looks like a secret.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn add(&mut self, path: &str, text: &str) -> Result<()> {
        let text = redact(text);
        if text.len() as u64 > self.left {
            self.missing(path, "the archive is full (--size)");
            return Ok(());
        }
        self.left -= text.len() as u64;
        self.write(path, text.as_bytes())?;
        self.files.push((path.to_owned(), text.len()));
        Ok(())
    }

    fn write(&mut self, path: &str, data: &[u8]) -> Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(self.time);
        self.out.append_data(&mut header, format!("{}/{path}", self.name), data).context("cannot write the archive")
    }

    /// Notes what could not be had.
    pub fn missing(&mut self, what: &str, why: &str) {
        if self.missing.len() < MISSING {
            self.missing.push(redact(&format!("{what}: {}", tidegate_api::printable(why))));
        }
    }

    /// Adds the summary and closes the file: what could not be had.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn finish(mut self, time: &str) -> Result<Vec<String>> {
        let mut text = format!("tidegate {} sysdump, {time}\n", env!("CARGO_PKG_VERSION"));
        text += "\nNames, addresses and policies of the cluster are in it; secrets, tokens, keys and values of environment variables are not.\n";
        text += "\nnot in it:\n";
        if self.missing.is_empty() {
            text += "  nothing is missing\n";
        }
        for what in &self.missing {
            text += &format!("  {what}\n");
        }
        text += "\nfiles:\n";
        for (path, size) in &self.files {
            text += &format!("  {size:>10} {path}\n");
        }
        self.write("summary.txt", text.as_bytes())?;
        let file = self.out.into_inner().and_then(GzEncoder::finish).context("cannot write the archive")?;
        file.sync_all().context("cannot write the archive")?;
        (&file).flush().context("cannot write the archive")?;
        Ok(self.missing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::io::Read;

    #[test]
    fn it_holds_no_more_than_it_may_and_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x.tar.gz");
        let mut archive = Archive::create(&file, "dump".into(), 10, 1).unwrap();
        archive.add("a", "12345").unwrap();
        archive.add("b", "123456").unwrap();
        let long = format!("pods/{}/c", "x".repeat(200));
        archive.add(&long, "12345").unwrap();
        archive.missing("d", "refused");
        assert_eq!(archive.finish("now").unwrap(), ["b: the archive is full (--size)", "d: refused"]);
        let mut found = BTreeMap::new();
        let mut tar = tar::Archive::new(flate2::read::GzDecoder::new(File::open(&file).unwrap()));
        for entry in tar.entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            found.insert(entry.path().unwrap().display().to_string(), text);
        }
        let names: Vec<&String> = found.keys().collect();
        assert_eq!(names, ["dump/a", &format!("dump/{long}"), "dump/summary.txt"]);
        assert!(found["dump/summary.txt"].contains("d: refused") && found["dump/a"] == "12345");
        assert!(Archive::create(&file, "dump".into(), 10, 1).is_err(), "it would be overwritten");
    }
}
