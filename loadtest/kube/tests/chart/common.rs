//! helm, the chart, and what it renders.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use tidegate_kube::{Cluster, Output, Tool, tool};

pub const NAMESPACE: &str = "tidegate-system";

pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

pub fn chart() -> PathBuf {
    root().join("helm/tidegate")
}

/// Runs a program with an input.
pub fn run(command: &mut Command, stdin: &str) -> Output {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    let mut pipe = child.stdin.take().unwrap();
    let out = std::thread::scope(|s| {
        s.spawn(move || drop(pipe.write_all(stdin.as_bytes())));
        child.wait_with_output().unwrap()
    });
    Output {
        ok: out.status.success(),
        stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
    }
}

/// helm with values on its standard input, for those commands that take `--values -`. Against a cluster, or none.
pub fn helm(cluster: Option<&Cluster>, args: &[&str], values: &str) -> Output {
    let mut command = Command::new(tool(Tool::Helm).unwrap());
    command.args(args);
    // Nothing of whoever runs the tests.
    let home = tempfile::tempdir().unwrap();
    for key in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
        command.env(key, home.path());
    }
    command.env("KUBECONFIG", cluster.map_or_else(|| "/nonexistent".into(), Cluster::kubeconfig));
    run(&mut command, values)
}

/// `helm template` without hooks or with them.
pub fn template(values: &str, hooks: bool) -> Output {
    let chart = chart();
    let mut args = vec!["template", "tidegate", chart.to_str().unwrap(), "--namespace", NAMESPACE, "--values", "-"];
    if !hooks {
        args.push("--no-hooks");
    }
    helm(None, &args, values)
}

/// The documents of a YAML text.
pub fn documents(text: &str) -> Vec<Value> {
    let all: Vec<Value> = serde_saphyr::from_multiple(text).expect("it is YAML");
    all.into_iter().filter(|d| !d.is_null()).collect()
}

/// The document of a kind and a name.
pub fn find<'a>(documents: &'a [Value], kind: &str, name: &str) -> &'a Value {
    documents
        .iter()
        .find(|d| d["kind"] == kind && d["metadata"]["name"] == name)
        .unwrap_or_else(|| panic!("there is no {kind} {name}"))
}

/// The real program, which `cargo build --bins` put beside the tests.
pub fn tidegate() -> PathBuf {
    if let Some(path) = std::env::var_os("TIDEGATE_BIN") {
        return path.into();
    }
    let path = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join("tidegate");
    assert!(path.exists(), "{} is missing: cargo build -p tidegate --bins", path.display());
    path
}
