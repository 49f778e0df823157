//! The images of a cluster without a registry: archives that every node has.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tidegate_kube::{Tool, tool};

use super::{CLIENT_IMAGE, PAUSE_IMAGE, boot, disk};
use crate::lab::Lab;

/// What CoreDNS runs from.
const COREDNS_IMAGE: &str = "localhost/tidegate-lab/coredns:1";
/// What the client's image has, where the machine has it.
const CLIENT_PROGRAMS: &[&str] = &[
    "/bin/cat",
    "/bin/date",
    "/bin/ls",
    "/bin/sh",
    "/bin/sleep",
    "/usr/bin/curl",
    "/usr/bin/dig",
    "/usr/bin/env",
    "/usr/bin/socat",
    "/usr/bin/timeout",
];

/// Where the archives are.
pub fn folder(lab: &str) -> PathBuf {
    disk(lab).join("images")
}

impl Lab {
    /// Makes the images that every node has.
    pub(super) fn write_images(&self) -> Result<PathBuf> {
        let images = folder(self.name());
        fs::create_dir_all(&images)?;
        let root = disk(self.name()).join("image");
        let programs = CLIENT_PROGRAMS.iter().filter(|p| Path::new(p).is_file()).map(|p| (*p).to_owned());
        let ca = format!("{}:/etc/ssl/certs/ca-certificates.crt", self.internet_ca().display());
        let client: Vec<String> = programs.chain([ca]).collect();
        let path = r#""Env":["PATH=/usr/bin:/bin"]"#;
        let archives = [
            (
                "client.tar",
                client,
                format!(r#"{{{path},"Cmd":["/bin/sleep","infinity"]}}"#),
                vec![CLIENT_IMAGE, PAUSE_IMAGE],
            ),
            (
                "coredns.tar",
                vec![format!("{}:/coredns", tool(Tool::CoreDns)?.display())],
                r#"{"Entrypoint":["/coredns"]}"#.to_owned(),
                vec![COREDNS_IMAGE],
            ),
        ];
        for (archive, files, config, names) in archives {
            script("image-root", Command::new("").args([&root]).args(&files))?;
            script("image-archive", Command::new("").args([&root, &images.join(archive)]).arg(config).args(names))?;
            fs::remove_dir_all(&root)?;
        }
        self.write_tidegate(None)?;
        Ok(images)
    }

    /// Makes Tidegate's image, of the version that the chart names, or of another one whose program has one octet more.
    fn write_tidegate(&self, version: Option<&str>) -> Result<PathBuf> {
        let archive = folder(self.name()).join(format!("tidegate{}.tar", version.unwrap_or_default()));
        let program = disk(self.name()).join("tidegate");
        // What a debugger reads is most of a debug build.
        let stripped = Command::new("strip").arg("-o").arg(&program).arg(self.tidegate()).status();
        if !stripped.is_ok_and(|s| s.success()) {
            fs::copy(self.tidegate(), &program)?;
        }
        if version.is_some() {
            // What stands behind its sections no loader reads.
            File::options().append(true).open(&program)?.write_all(b"\n")?;
        }
        script("image", Command::new("").arg("archive").args([&program, &archive]).args(version))?;
        fs::remove_file(&program)?;
        Ok(archive)
    }

    /// Gives every node Tidegate's image once more, under another version and with another program that does the same.
    ///
    /// # Errors
    /// When it cannot be made, or a node does not take it.
    pub fn another_version(&self, version: &str) -> Result<()> {
        let archive = self.write_tidegate(Some(version))?;
        let file = archive.file_name().context("an archive has a name")?;
        for node in &self.scenario().nodes {
            let init = self.node_init(&node.name)?.to_string();
            let mut command = Command::new("nsenter");
            command.args(["--target", &init, "--all", "--"]).args(boot::import(&Path::new(boot::IMAGES).join(file)));
            let out = command.output().context("cannot run nsenter")?;
            ensure!(out.status.success(), "{}: {}", node.name, String::from_utf8_lossy(&out.stderr).trim());
        }
        Ok(())
    }
}

/// Runs a script of the tree.
fn script(name: &str, arguments: &Command) -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts").join(name);
    let out =
        Command::new(path).args(arguments.get_args()).output().with_context(|| format!("cannot run scripts/{name}"))?;
    ensure!(out.status.success(), "scripts/{name}: {}", String::from_utf8_lossy(&out.stderr).trim());
    Ok(())
}
