//! The lab's control plane: a real API server in a place of its own on the underlay, and kubectl.
//!
//! The scenario's namespaces, nodes, pods, services, pools and policies are objects there, made with kubectl from the files
//! of the manifests' folder. There is no kubelet: the lab says in each pod's status where it runs.

mod objects;
mod pods;

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tidegate_kube::{Addresses, Api, Output, Site, Tool, tool};

use crate::kubelet::{self, Kubelets};
use crate::lab::{Lab, wait_for};
use crate::scenario::{SYSTEM_NAMESPACE, Scenario};
use crate::state::{MARKER, Process};
use crate::{family::Family, netns, state};

pub(crate) use objects::{GATEWAY_SERVICE, Id, files};
pub use pods::Guest;

/// The place of the API server.
pub const PLACE: &str = "control";
/// The ConfigMap of whom agents trust, and its key.
const TRUST: (&str, &str) = ("tidegate-trust", "ca.crt");
/// How long gateways may take until they have written it.
const TRUSTED: Duration = Duration::from_secs(60);
/// The audience of the tokens that agents show to gateways.
const AUDIENCE: &str = "tidegate";
/// How long the API server may take until it answers. It is ready in 4 s on an idle machine; others may be busy.
const READY: Duration = Duration::from_secs(120);
/// How long a killed server may take to be gone.
const GONE: Duration = Duration::from_secs(5);
/// How manifests are applied: what one no longer says goes, whoever else wrote meanwhile.
const APPLY: [&str; 3] = ["apply", "--server-side", "--force-conflicts"];
/// How long tokens live, in seconds.
const TOKEN_SECONDS: u32 = 86_400;

/// That the cluster has an API server, which is where the product reads its objects.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Kubernetes {
    /// Controllers of kube-controller-manager that run, by their names.
    #[serde(default)]
    pub controllers: Vec<String>,
    /// Nodes run pods by themselves; the lab makes no pod and no object.
    #[serde(default)]
    pub kubelets: Option<Kubelets>,
}

/// Where the control plane of a scenario is; everything of it lies in `folder`.
pub fn site(scenario: &Scenario, folder: &Path) -> Site {
    let (v4, v6) = scenario.control();
    let of = |family: &Family| family.pick(IpAddr::from(v4), v6.into());
    let clients: Vec<IpAddr> = scenario.families.iter().map(of).collect();
    let here = scenario.has_kubelets().then(|| kubelet::relay::address(folder));
    let any = if scenario.has(Family::V6) { IpAddr::from([0; 16]) } else { IpAddr::from([0; 4]) };
    let addresses = Addresses {
        own: Ipv4Addr::LOCALHOST,
        bind: any,
        advertised: clients.first().copied().unwrap_or(any),
        clients: clients.into_iter().chain(here).collect(),
        services: scenario.service_ranges.iter().flat_map(|ranges| scenario.ranges(ranges)).collect(),
    };
    let site = Site::new(folder, addresses);
    if scenario.has_kubelets() { site.with_kubelets() } else { site }
}

/// The kubeconfig of a gateway, in the control plane's folder.
pub fn gateway_kubeconfig(folder: &Path, gateway: &str) -> PathBuf {
    folder.join(format!("{gateway}.kubeconfig"))
}

/// The token that a node's agent shows to gateways, in the control plane's folder.
pub fn agent_token(folder: &Path, node: &str) -> PathBuf {
    folder.join(format!("{node}.agent.token"))
}

/// The authorities that agents trust, in the control plane's folder.
pub fn trust(folder: &Path) -> PathBuf {
    folder.join("trust.crt")
}

impl Lab {
    /// Whether the product reads its objects from an API server.
    pub fn has_kubernetes(&self) -> bool {
        self.scenario().kubernetes.is_some()
    }

    pub(crate) fn site(&self) -> Result<Site> {
        ensure!(self.has_kubernetes(), "this lab has no API server: its scenario does not say `kubernetes`");
        Ok(site(self.scenario(), &self.layout().control()))
    }

    /// The administrator's kubeconfig; good in the place `control`.
    ///
    /// # Errors
    /// When the lab has no API server.
    pub fn kubeconfig(&self) -> Result<PathBuf> {
        Ok(self.site()?.kubeconfig())
    }

    /// Runs kubectl as the administrator.
    ///
    /// # Errors
    /// With what it said, when it fails.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.kubectl_with(args, "")?.success().with_context(|| format!("kubectl {}", args.join(" ")))
    }

    /// Runs kubectl as the administrator, with an input. `--as USER` makes it somebody else.
    ///
    /// # Errors
    /// When it cannot be run. That it failed is in the output.
    pub fn kubectl_with(&self, args: &[&str], stdin: &str) -> Result<Output> {
        let mut command = self.site()?.kubectl(args)?;
        command.env(MARKER, self.name()).current_dir(self.layout().manifests());
        if self.told().load(Ordering::Relaxed) {
            println!("       $ kubectl {}", args.join(" "));
        }
        Output::of(netns::spawn(self.place(PLACE)?.netns(), None, &mut command)?, stdin)
    }

    /// Whether every kubectl command is printed from now on.
    pub fn tell_kubectl(&self, tell: bool) {
        self.told().store(tell, Ordering::Relaxed);
    }

    /// The administrator's way to the API in milliseconds, where a kubectl takes a good part of a second.
    ///
    /// # Errors
    /// When the lab has no API server.
    pub fn api(&self) -> Result<Api> {
        Ok(Api::at(proxy(self.site()?.folder())))
    }

    /// Sends a request to the API; the object, or whatever it answered.
    ///
    /// # Errors
    /// With what the API server said, when it refused.
    pub fn request(&self, method: &str, path: &str, body: &Value) -> Result<Value> {
        let kind = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let answer = self.api()?.send(method, path, &[("Content-Type", kind)], &body)?;
        let value: Value = serde_json::from_str(&answer.body).unwrap_or_default();
        let said = value["message"].as_str().unwrap_or(&answer.body);
        ensure!(answer.status < 300, "{method} {path}: {} {said}", answer.status);
        Ok(value)
    }

    /// Starts the control plane, and waits until it answers.
    pub(crate) fn start_control(&mut self) -> Result<()> {
        let site = self.site()?;
        if !self.has_kubelets() {
            fs::create_dir_all(site.folder())?;
            site.write_credentials()?;
        }
        self.launch_control("etcd", site.etcd()?)?;
        let socket = proxy(site.folder());
        let server = self.launch_control("kubectl proxy", site.proxy(&socket)?)?;
        self.wait_control(&server, || UnixStream::connect(&socket).map(drop).map_err(Into::into))?;
        self.start_api_server()?;
        let names = self.scenario().kubernetes.clone().unwrap_or_default().controllers;
        if !names.is_empty() {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            self.launch_control("kube-controller-manager", site.controllers(&names)?)?;
        }
        Ok(())
    }

    /// Starts the API server, at the address that it had before, and waits until it answers.
    ///
    /// # Errors
    /// When it does not come up; with the end of its log.
    pub fn start_api_server(&mut self) -> Result<()> {
        let site = self.site()?;
        let server = self.launch_control("kube-apiserver", site.api_server()?)?;
        let api = self.api()?;
        self.wait_control(&server, || api.ready())
    }

    /// Kills the API server, as an outage does. What it stored stays.
    ///
    /// # Errors
    /// When the lab has none, or it does not go.
    pub fn stop_api_server(&self) -> Result<()> {
        self.signal("kube-apiserver", Signal::SIGKILL, Some(GONE))
    }

    /// Kills the API server and etcd, lets `work` do with the folder of what is stored, and starts them again.
    ///
    /// # Errors
    /// When the lab has none, `work` fails, or they do not come up.
    pub fn with_storage(&mut self, work: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let site = self.site()?;
        self.stop_api_server()?;
        self.signal("etcd", Signal::SIGKILL, Some(GONE))?;
        work(&site.folder().join("etcd"))?;
        self.launch_control("etcd", site.etcd()?)?;
        self.start_api_server()
    }

    pub(crate) fn launch_control(&mut self, name: &str, command: Command) -> Result<Process> {
        let netns = self.place(PLACE)?.netns().to_owned();
        self.launch(name, &netns, command)
    }

    fn wait_control(&self, server: &Process, mut ready: impl FnMut() -> Result<()>) -> Result<()> {
        let mut last = String::new();
        let up = wait_for(READY, || {
            if !server.is_alive() {
                return Some(false);
            }
            ready().map_err(|e| last = format!("{e:#}")).ok().map(|()| true)
        });
        ensure!(
            up == Some(true),
            "{} is not ready: {last}; its log ends with: {}",
            server.name,
            self.last_words(&server.name)
        );
        Ok(())
    }

    /// Makes the scenario's objects, the chart's and the gateways' kubeconfigs.
    pub(crate) fn load_objects(&self) -> Result<()> {
        self.kubectl(&["create", "namespace", SYSTEM_NAMESPACE])?;
        self.install_chart()?;
        let files = self.manifests()?;
        // Namespaces before what is in them, and one kubectl for many files.
        for namespaces in [true, false] {
            let plain = files.iter().filter(|(name, text)| {
                name.starts_with("namespace-") == namespaces && objects::statuses(text).is_ok_and(|s| s.is_empty())
            });
            let mut args: Vec<String> = APPLY.map(str::to_owned).to_vec();
            args.extend(plain.map(|(name, _)| format!("-f={name}")));
            if args.len() > APPLY.len() {
                self.kubectl(&args.iter().map(String::as_str).collect::<Vec<_>>())?;
            }
        }
        for (name, text) in &files {
            if !objects::statuses(text)?.is_empty() {
                self.apply_manifest(name, text)?;
            }
        }
        let site = self.site()?;
        for gateway in &self.scenario().gateways {
            self.give_kubeconfig(&gateway.name)?;
        }
        for node in &self.scenario().nodes {
            let file = agent_token(site.folder(), &node.name);
            self.write_token(objects::AGENT_ACCOUNT, &objects::agent_pod(&node.name), Some(AUDIENCE), &file)?;
        }
        Ok(())
    }

    /// Writes the kubeconfig of a gateway, whose pod is there.
    pub(crate) fn give_kubeconfig(&self, gateway: &str) -> Result<()> {
        let site = self.site()?;
        let file = site.folder().join(format!("{gateway}.token"));
        self.write_token(objects::GATEWAY_SERVICE, gateway, None, &file)?;
        site.write_token_kubeconfig(&gateway_kubeconfig(site.folder(), gateway), gateway, &file)
    }

    /// Installs the chart. Nobody makes pods of its Deployment and DaemonSet: those are the scenario's.
    fn install_chart(&self) -> Result<()> {
        let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../helm/tidegate");
        let out = Command::new(tool(Tool::Helm)?)
            .args(["template", "tidegate", "--no-hooks", "--namespace", SYSTEM_NAMESPACE])
            .arg(&chart)
            .output()
            .context("cannot run helm")?;
        ensure!(out.status.success(), "helm template: {}", String::from_utf8_lossy(&out.stderr).trim());
        let text = String::from_utf8(out.stdout)?;
        let args = [&APPLY[..], &["-f", "-"]].concat();
        self.kubectl_with(&args, &text)?.success()?;
        let wait = ["wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"];
        self.kubectl(&wait).map(drop)
    }

    /// Asks for a token that is bound to a pod of the gateways' namespace, and writes it to a file; without an audience it is
    /// for the API server.
    ///
    /// # Errors
    /// What the API server says against it.
    pub fn write_token(&self, account: &str, pod: &str, audience: Option<&str>, file: &Path) -> Result<()> {
        let path = format!("/api/v1/namespaces/{SYSTEM_NAMESPACE}/serviceaccounts/{account}/token");
        let bound = json!({"apiVersion": "v1", "kind": "Pod", "name": pod});
        let audiences: Vec<&str> = audience.into_iter().collect();
        let spec = json!({"expirationSeconds": TOKEN_SECONDS, "boundObjectRef": bound, "audiences": audiences});
        let made = self.request("POST", &path, &json!({"spec": spec}))?;
        let token = made["status"]["token"].as_str().context("the API server gave no token")?;
        state::replace(file, token.as_bytes())
    }

    /// Mounts the ConfigMap of whom agents trust, as a kubelet does: a first time it waits until there is one, and while
    /// the API server is away what was mounted stays.
    ///
    /// # Errors
    /// When nobody writes it.
    pub fn mount_trust(&self) -> Result<()> {
        let file = trust(self.site()?.folder());
        let (map, key) = TRUST;
        let path = format!("/api/v1/namespaces/{SYSTEM_NAMESPACE}/configmaps/{map}");
        let written = |object: &Value| object["data"][key].is_string();
        let limit = if file.exists() { Duration::ZERO } else { TRUSTED };
        match self.wait_object(&path, limit, written) {
            Ok(object) => state::replace(&file, object["data"][key].as_str().unwrap_or_default().as_bytes()),
            Err(_) if file.exists() => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Brings the API to what a manifest now says: applies its objects, deletes those that only the text before had.
    pub(crate) fn sync_manifest(&self, file: &str, before: Option<&str>, now: Option<&str>) -> Result<()> {
        let ids = |text: Option<&str>| -> Result<Vec<Id>> { text.map_or(Ok(Vec::new()), objects::ids) };
        let kept = ids(now)?;
        if let Some(text) = now {
            self.apply_manifest(file, text)?;
        }
        for id in ids(before)?.into_iter().filter(|id| !kept.contains(id)) {
            let target = id.target();
            let mut args = vec!["delete", &target, "--ignore-not-found", "--wait=false"];
            if let Some(namespace) = &id.namespace {
                args.extend(["-n", namespace]);
            }
            if id.kind == "Pod" {
                // There is no kubelet that would say that it has ended.
                args.extend(["--force", "--grace-period=0"]);
            }
            self.kubectl(&args)?;
        }
        Ok(())
    }

    /// Applies a manifest. Statuses are written as a kubelet does: they are no part of what is applied.
    fn apply_manifest(&self, file: &str, text: &str) -> Result<()> {
        let statuses = objects::statuses(text)?;
        if statuses.is_empty() {
            return self.kubectl(&[&APPLY[..], &["-f", file]].concat()).map(drop);
        }
        let args = [&APPLY[..], &["-f", "-"]].concat();
        self.kubectl_with(&args, &objects::without_statuses(text)?)?.success().with_context(|| file.to_owned())?;
        for (path, status) in statuses {
            self.request("PATCH", &path, &json!({"status": status}))?;
        }
        Ok(())
    }

    /// Every manifest: name and text, by name.
    fn manifests(&self) -> Result<Vec<(String, String)>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(self.layout().manifests())? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let text = self.manifest(&name)?;
            files.push((name, text));
        }
        files.sort();
        Ok(files)
    }

    /// Gives a Namespace exactly these annotations.
    pub(crate) fn annotate_object(&self, namespace: &str, annotations: &[(&str, &str)]) -> Result<()> {
        let object = self.request("GET", &format!("/api/v1/namespaces/{namespace}"), &Value::Null)?;
        let now: BTreeMap<String, String> =
            serde_json::from_value(object["metadata"]["annotations"].clone()).unwrap_or_default();
        let mut args: Vec<String> = annotations
            .iter()
            .filter(|(key, value)| now.get(*key).is_none_or(|v| v != value))
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        args.extend(now.keys().filter(|k| !annotations.iter().any(|(key, _)| key == k)).map(|key| format!("{key}-")));
        if args.is_empty() {
            return Ok(());
        }
        let mut all = vec!["annotate", "namespace", namespace, "--overwrite"];
        all.extend(args.iter().map(String::as_str));
        self.kubectl(&all).map(drop)
    }

    /// Waits until an object of the API is as it should be; gives it, or what it was last.
    ///
    /// # Errors
    /// When it is not within the limit.
    pub fn wait_object(&self, path: &str, limit: Duration, fits: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut last = Value::Null;
        let found = wait_for(limit, || {
            last = self.request("GET", path, &Value::Null).unwrap_or_else(|e| json!(format!("{e:#}")));
            fits(&last).then(|| last.clone())
        });
        match found {
            Some(object) => Ok(object),
            None => bail!("{path} is {last:#}"),
        }
    }
}

/// The socket of kubectl's proxy.
fn proxy(folder: &Path) -> PathBuf {
    folder.join("proxy")
}
