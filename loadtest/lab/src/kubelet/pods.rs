//! Pods that kubelets run: made with kubectl, and commands in them.

use anyhow::Result;
use serde_json::{Value, json};
use tidegate_kube::Tool;

use super::CLIENT_IMAGE;
use crate::lab::Lab;
use crate::place::Output;
use crate::probe::Client;

/// The exit status of what could not even be run.
const NOT_RUN: i32 = 128;
/// How long pods may take to be ready.
const READY: &str = "--timeout=120s";

/// A pod of a cluster with kubelets.
#[derive(Clone, Copy, Debug)]
pub struct Pod<'a> {
    lab: &'a Lab,
    /// `NAMESPACE/NAME`.
    key: &'a str,
}

impl Client for Pod<'_> {
    fn command(&self, command: &[&str]) -> Output {
        let (namespace, name) = self.key.split_once('/').unwrap_or(("default", self.key));
        let args = [&["exec", "--namespace", namespace, name, "--"], command].concat();
        match self.lab.at_host(Tool::Kubectl, &args, "") {
            Ok(out) if out.ok => Output { status: 0, stdout: out.stdout, stderr: out.stderr },
            Ok(out) => {
                let (said, status) = ended(&out.stderr);
                Output { status, stdout: out.stdout, stderr: said.to_owned() }
            }
            Err(error) => Output { status: NOT_RUN, stdout: String::new(), stderr: format!("{error:#}") },
        }
    }
}

/// What a command wrote to standard error, and its exit status, which kubectl adds.
fn ended(stderr: &str) -> (&str, i32) {
    let (said, code) = stderr.trim_end().rsplit_once("command terminated with exit code ").unwrap_or((stderr, ""));
    (said, code.parse().unwrap_or(NOT_RUN))
}

impl Lab {
    /// A pod by `NAMESPACE/NAME`, in a cluster with kubelets.
    pub fn cluster_pod<'a>(&'a self, key: &'a str) -> Pod<'a> {
        Pod { lab: self, key }
    }

    /// Makes pods with the client's image and the label `app: web`, (`NAMESPACE/NAME`, node) each, and waits until they are ready.
    ///
    /// # Errors
    /// When kubectl fails, or one of them is not ready in time.
    pub fn make_clients(&self, pods: &[(&str, &str)]) -> Result<()> {
        let items: Vec<Value> = pods.iter().map(|(key, node)| client(key, node)).collect();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
        self.host_kubectl(&["apply", "-f", "-"], &list.to_string())?;
        for (key, _) in pods {
            let (namespace, name) = key.split_once('/').unwrap_or(("default", key));
            let pod = format!("pod/{name}");
            self.host_kubectl(&["wait", "--namespace", namespace, "--for=condition=Ready", READY, &pod], "")?;
        }
        Ok(())
    }
}

fn client(key: &str, node: &str) -> Value {
    let (namespace, name) = key.split_once('/').unwrap_or(("default", key));
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app": "web"}},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "client", "image": CLIENT_IMAGE, "imagePullPolicy": "Never"}],
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubectl_says_how_a_command_ended() {
        assert_eq!(ended("curl: (6) no\ncommand terminated with exit code 6\n"), ("curl: (6) no\n", 6));
        assert_eq!(
            ended("Error from server (NotFound): pods \"x\" not found"),
            ("Error from server (NotFound): pods \"x\" not found", NOT_RUN)
        );
    }
}
