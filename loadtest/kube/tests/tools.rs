//! Which programs `scripts/kube-tools` takes.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tidegate_kube::{Tool, tool};

/// A folder with a program that says a version.
fn stand_in(name: &str, says: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, format!("#!/bin/sh\necho '{says}'\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    folder
}

/// What the script takes with that folder as `KUBEBUILDER_ASSETS` and in front of `PATH`.
fn taken(name: &str, assets: &Path, path: &Path) -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/kube-tools");
    let path = format!("{}:{}", path.display(), std::env::var("PATH").unwrap());
    let out = Command::new(script).arg(name).env("KUBEBUILDER_ASSETS", assets).env("PATH", path).output().unwrap();
    assert!(out.status.success(), "{out:?}");
    PathBuf::from(String::from_utf8(out.stdout).unwrap().trim())
}

#[test]
fn a_program_that_is_there_is_taken_if_its_version_fits() {
    let none = Path::new("/nonexistent");
    for (which, fits, too_old) in [
        (Tool::ApiServer, "Kubernetes v1.31.2", "Kubernetes v1.29.9"),
        (Tool::Kubectl, "Client Version: v1.30.0", "Client Version: v1.20.0-dispatcher"),
        (Tool::Etcd, "etcd Version: 3.5.21", "etcd Version: 3.4.30"),
        (Tool::Helm, "v3.17.0", "v3.8.1"),
    ] {
        let name = which.name();
        let (fits, too_old) = (stand_in(name, fits), stand_in(name, too_old));
        let (fits, too_old) = (fits.path(), too_old.path());
        assert_eq!(taken(name, fits, none), fits.join(name));
        assert_eq!(taken(name, none, fits), fits.join(name));
        // What was named goes before what happens to be on PATH, if it fits.
        let other = stand_in(name, "never asked");
        assert_eq!(taken(name, fits, other.path()), fits.join(name));
        assert_eq!(taken(name, too_old, fits), fits.join(name));
        // Else the one that was built. (A second kubectl further back on PATH is not looked for, so one would be built here.)
        tool(which).unwrap();
        if which != Tool::Kubectl {
            assert_ne!(taken(name, too_old, too_old), too_old.join(name));
        }
    }
}

#[test]
fn an_unknown_program_is_refused() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/kube-tools");
    for args in [&[][..], &["kube-apiserver", "kubelets"]] {
        let out = Command::new(&script).args(args).output().unwrap();
        assert!(!out.status.success() && out.stdout.is_empty() && !out.stderr.is_empty(), "{out:?}");
    }
}
