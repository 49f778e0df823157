//! `tidegate sysdump`: one archive for a bug report, of a cluster that may be half broken.
//!
//! What cannot be had is named in `summary.txt`. Secrets are never asked for, and what looks like one is struck out of all that is.

mod archive;
pub mod collect;
mod gather;
mod redact;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use jiff::Timestamp;

use crate::overview::{self, Api};
use archive::Archive;

/// Where it is written, and how much.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// The archive. Absent: tidegate-sysdump-TIME.tar.gz in this folder.
    #[arg(short, long)]
    pub file: Option<PathBuf>,
    /// How long all of it may take, in seconds, 5 to 3600. What is not there by then is left out and named.
    #[arg(long, default_value_t = 120, value_parser = clap::value_parser!(u64).range(5..=3600))]
    pub timeout: u64,
    /// The most that it may hold before it is compressed, in MiB, 1 to 4096.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=4096))]
    pub size: u64,
    /// The most of each log and each other text of a pod, in KiB, 1 to 65536.
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub each: u32,
    /// The most pods that are asked; gateways come first.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub pods: u16,
}

/// Writes the archive. Exit code 0: everything is in it; 1: something could not be had, which it says.
///
/// # Errors
/// There is no way to an API server, or the archive cannot be written.
pub fn run(api: Api, options: &Options) -> Result<u8> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot make a runtime")?;
    runtime.block_on(async {
        let connection = overview::connect(api).await?;
        let now = Timestamp::now();
        let name = format!("tidegate-sysdump-{}", now.strftime("%Y%m%dT%H%M%SZ"));
        let file = options.file.clone().unwrap_or_else(|| format!("{name}.tar.gz").into());
        let mut archive = Archive::create(&file, name, options.size << 20, now.as_second())?;
        let limit = Duration::from_secs(options.timeout);
        let gathered = tokio::time::timeout(limit, gather::gather(&connection, options, &mut archive)).await;
        match gathered {
            Ok(done) => done?,
            Err(_) => archive.missing("the rest", &format!("not there within {} s (--timeout)", options.timeout)),
        }
        let missing = archive.finish(&format!("{now}"))?;
        println!("{}", file.display());
        for what in &missing {
            eprintln!("not in it: {what}");
        }
        Ok(u8::from(!missing.is_empty()))
    })
}
