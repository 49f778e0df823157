//! Gateways and agents in exactly what the chart gives their containers: capabilities, a read-only root, no new privileges,
//! settings of the kernel that cannot be written. Seccomp is left out: its profile is the container runtime's.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tidegate_kube::{Tool, tool};
use tidegate_lab::{Lab, Options, Scenario, story};

const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../helm/tidegate");
/// Capabilities by their numbers (linux/capability.h), of those that the chart may name.
const CAPABILITIES: [(&str, u32); 6] =
    [("NET_BIND_SERVICE", 10), ("NET_ADMIN", 12), ("NET_RAW", 13), ("SYS_ADMIN", 21), ("PERFMON", 38), ("BPF", 39)];

/// What a container may.
struct Confinement {
    /// None: everything, it is privileged.
    capabilities: Option<Vec<String>>,
    read_only: bool,
}

/// That of the first container of a workload that the chart renders.
fn confinement(kind: &str, name: &str) -> Confinement {
    let mut helm = Command::new(tool(Tool::Helm).unwrap());
    helm.args(["template", "tidegate", CHART, "--namespace", "tidegate-system", "--no-hooks"]);
    let out = helm.env("KUBECONFIG", "/nonexistent").output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let all: Vec<Value> = serde_saphyr::from_multiple(&String::from_utf8(out.stdout).unwrap()).unwrap();
    let workload = all.iter().find(|d| d["kind"] == kind && d["metadata"]["name"] == name).unwrap();
    let context = &workload["spec"]["template"]["spec"]["containers"][0]["securityContext"];
    assert_eq!(context["runAsUser"], 0);
    let read_only = context["readOnlyRootFilesystem"] == true;
    if context["privileged"] == true {
        return Confinement { capabilities: None, read_only };
    }
    assert_eq!(
        (&context["allowPrivilegeEscalation"], &context["capabilities"]["drop"][0]),
        (&false.into(), &"ALL".into())
    );
    let added = context["capabilities"]["add"].as_array().unwrap();
    let capabilities = added.iter().map(|c| c.as_str().unwrap().to_owned()).collect();
    Confinement { capabilities: Some(capabilities), read_only }
}

/// A command that takes these away from itself and becomes the product. What the chart mounts into the container, and where the
/// lab wants its audit records, stays writable.
fn confined(out: &mut String, role: &str, c: &Confinement, folder: &Path) {
    let at = |name: &str| folder.join(name).display().to_string();
    let (kept, limits, settings) = match &c.capabilities {
        None => (&["socket", "identity", "bpf", "cni", "audit"][..], String::new(), ""),
        Some(all) => {
            let all: Vec<String> = all.iter().map(|c| format!(",+{}", c.to_lowercase())).collect();
            let limits = format!("setpriv --bounding-set=-all{} --inh-caps=-all --no-new-privs", all.concat());
            (
                &["journal", "bpf", "audit"][..],
                limits,
                "mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys;",
            )
        }
    };
    let kept: Vec<String> = kept.iter().map(|name| at(name)).collect();
    let kept = kept.join(" ");
    let read_only = if c.read_only {
        "for m in $(awk '{print $5}' /proc/self/mountinfo); do case $m in /proc|/proc/*|/dev|/dev/*) ;; *) mount -o remount,bind,ro $m 2>/dev/null || true;; esac; done;"
    } else {
        ""
    };
    *out += &format!(
        "{role})\nexec unshare --mount --propagation private sh -c '\nset -e\nmkdir -p {kept}\n{}\n\
         for k in {kept}; do mount --bind $k $k; mount -o remount,bind,rw $k; done\n{settings}\nexec {limits} \"$@\"' sh PRODUCT \"$@\";;\n",
        read_only.replace('\'', "'\\''"),
    );
}

/// The program that the lab starts in place of the product.
fn wrapper(folder: &Path, state: &Path, product: &Path, gateway: &Confinement, agent: &Confinement) -> PathBuf {
    let mut text = "#!/bin/sh\ncase $1 in\n".to_owned();
    confined(&mut text, "gateway", gateway, state);
    confined(&mut text, "agent", agent, state);
    text += "esac\nexec PRODUCT \"$@\"\n";
    let path = folder.join("tidegate");
    fs::write(&path, text.replace("PRODUCT", &product.display().to_string())).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn line(text: &str, key: &str) -> String {
    text.lines().find_map(|l| l.strip_prefix(key)).unwrap().trim().to_owned()
}

#[test]
fn the_product_works_in_what_the_chart_gives_it() {
    let gateway = confinement("Deployment", "tidegate-gateway");
    let agent = confinement("DaemonSet", "tidegate-agent");
    let folder = tempfile::tempdir().unwrap();
    let lab = PathBuf::from(env!("CARGO_BIN_EXE_tidegate-lab"));
    let product = std::env::var_os("TIDEGATE_BIN").map_or_else(|| lab.with_file_name("tidegate"), PathBuf::from);
    let mut options = Options { lab: Some(lab), ..Options::unique("confined") };
    let state = tidegate_lab::state::folder(&options.name);
    options.tidegate = Some(wrapper(folder.path(), &state, &product, &gateway, &agent));
    let scenario = Scenario::load(concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/demo.yaml").as_ref()).unwrap();
    // Until all are ready.
    let lab = Lab::up(scenario, &options).unwrap();

    let wanted =
        gateway.capabilities.as_ref().unwrap().iter().fold(0u64, |all, name| {
            all | 1 << CAPABILITIES.iter().find(|(n, _)| n == name).expect("a known capability").1
        });
    for process in lab.processes() {
        let of = |file: &str| fs::read_to_string(format!("/proc/{}/{file}", process.pid)).unwrap();
        let is_gateway = lab.scenario().gateways.iter().any(|g| g.name == process.name);
        if !is_gateway && lab.scenario().node(&process.name).is_err() {
            continue;
        }
        let mounts = of("mountinfo");
        let options = |point: &str| {
            let found = mounts
                .lines()
                .rfind(|l| l.split(' ').nth(4) == Some(point))
                .map(|l| l.split(' ').nth(5).unwrap().to_owned());
            found.unwrap_or_default()
        };
        assert!(options("/").starts_with("ro"), "{}: {}", process.name, options("/"));
        if is_gateway {
            let status = of("status");
            for set in ["CapBnd:", "CapEff:", "CapPrm:"] {
                assert_eq!(u64::from_str_radix(&line(&status, set), 16).unwrap(), wanted, "{} {set}", process.name);
            }
            assert_eq!(line(&status, "NoNewPrivs:"), "1");
            assert!(options("/proc/sys").starts_with("ro"));
        }
    }
    // An allowed name at the first try, denied ones, forwarded TCP and UDP.
    for point in [1, 2, 7] {
        story::hold(&lab, point).unwrap();
    }
}
