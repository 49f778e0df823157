//! Where the programs of Kubernetes are.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};

/// A program that `scripts/kube-tools` finds or builds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tool {
    /// `kube-apiserver`
    ApiServer,
    /// `etcd`
    Etcd,
    /// `kubectl`
    Kubectl,
    /// `kube-controller-manager`
    ControllerManager,
    /// `kube-scheduler`
    Scheduler,
    /// `kubelet`
    Kubelet,
    /// `kube-proxy`
    Proxy,
    /// `coredns`
    CoreDns,
    /// `ptp`, the network plugin of a link for each pod
    Ptp,
    /// `bridge`, the network plugin
    Bridge,
    /// `loopback`, the network plugin
    Loopback,
    /// `host-local`, the network plugins' addresses
    HostLocal,
    /// `cert-manager`, its controllers of Certificates; beside it lies `cert-manager.yaml` with its definitions
    CertManager,
    /// `helm`
    Helm,
    /// `kubeconform`
    Kubeconform,
}

impl Tool {
    /// The name of its program.
    pub const fn name(self) -> &'static str {
        match self {
            Tool::ApiServer => "kube-apiserver",
            Tool::Etcd => "etcd",
            Tool::Kubectl => "kubectl",
            Tool::ControllerManager => "kube-controller-manager",
            Tool::Scheduler => "kube-scheduler",
            Tool::Kubelet => "kubelet",
            Tool::Proxy => "kube-proxy",
            Tool::CoreDns => "coredns",
            Tool::Ptp => "ptp",
            Tool::Bridge => "bridge",
            Tool::Loopback => "loopback",
            Tool::HostLocal => "host-local",
            Tool::CertManager => "cert-manager",
            Tool::Helm => "helm",
            Tool::Kubeconform => "kubeconform",
        }
    }
}

/// The path of a program; built if the machine has none, which takes minutes, once.
///
/// # Errors
/// When it can neither be found nor built.
pub fn tool(tool: Tool) -> Result<PathBuf> {
    static FOUND: Mutex<Option<HashMap<Tool, PathBuf>>> = Mutex::new(None);
    // Held while the script runs: tests that start together ask once.
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    let found = found.get_or_insert_default();
    if let Some(path) = found.get(&tool) {
        return Ok(path.clone());
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/kube-tools");
    let out = Command::new(&script)
        .arg(tool.name())
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {}", script.display()))?;
    let path = PathBuf::from(String::from_utf8(out.stdout)?.trim());
    if !out.status.success() || !path.is_absolute() {
        bail!("scripts/kube-tools has no {}; it said why", tool.name());
    }
    found.insert(tool, path.clone());
    Ok(path)
}
