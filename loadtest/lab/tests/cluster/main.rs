//! Clusters with kubelets (`make test-cluster`): the chart as people install it, and what stays of a cluster that is gone.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bad;
mod crowd;
mod faults;
mod ground;
mod install;
mod nodes;
mod resources;
mod starts;
mod story;
mod tools;
mod upgrades;
mod variants;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use tidegate_lab::family::FAMILIES;
use tidegate_lab::lab::wait_for;
use tidegate_lab::{Lab, Options, Scenario, kubelet, state};

/// What a kubelet would set for the whole machine.
const TUNABLES: &[&str] = &["vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

fn scenario() -> Scenario {
    Scenario::load(&root().join("loadtest/scenarios/cluster.yaml")).unwrap()
}

fn tunables() -> Vec<String> {
    TUNABLES.iter().map(|t| fs::read_to_string(Path::new("/proc/sys").join(t)).unwrap()).collect()
}

/// What is left of a cluster: folders, network namespaces, mounts, control groups, processes.
fn left(name: &str) -> Vec<String> {
    let mut found = Vec::new();
    for folder in [state::folder(name), kubelet::disk(name)] {
        if folder.exists() {
            found.push(folder.display().to_string());
        }
    }
    let names = |folder: &str| fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path());
    found.extend(names("/run/netns").map(|p| p.display().to_string()).filter(|p| p.contains(&format!("tl-{name}-"))));
    let groups =
        names("/sys/fs/cgroup").chain(["/sys/fs/cgroup".into()]).map(|h| h.join(format!("tidegate-lab-{name}")));
    found.extend(groups.filter(|g| g.exists()).map(|g| g.display().to_string()));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    found.extend(mounts.lines().filter(|l| l.contains(&format!("/{name}/"))).map(str::to_owned));
    for process in names("/proc").filter(|p| p.join("cgroup").exists()) {
        let says = |file: &str| String::from_utf8_lossy(&fs::read(process.join(file)).unwrap_or_default()).into_owned();
        if says("cgroup").contains(&format!("tidegate-lab-{name}/")) || says("cmdline").contains(&format!("/{name}/")) {
            found.push(format!("{} {}", process.display(), says("cmdline")));
        }
    }
    found
}

/// What the cluster has before Tidegate comes: clients, on each node in `shop`.
fn clients(lab: &Lab) {
    for namespace in ["shop", "billing", "annotated", "audited", "untouched"] {
        lab.host_kubectl(&["create", "namespace", namespace], "").unwrap();
    }
    let nodes: Vec<String> = lab.scenario().nodes.iter().map(|n| n.name.clone()).collect();
    let on_each: Vec<String> = nodes.iter().map(|n| format!("shop/{n}")).collect();
    let mut pods: Vec<_> = on_each.iter().zip(&nodes).map(|(key, node)| (key.as_str(), node.as_str())).collect();
    pods.push(("shop/client", "node-1"));
    pods.extend([("billing/client", "node-1"), ("annotated/client", "node-2"), ("audited/client", "gw-node-b")]);
    pods.push(("untouched/client", "node-1"));
    lab.make_clients(&pods).unwrap();
}

#[test]
fn the_chart_as_people_install_it() {
    let before = tunables();
    let lab = Lab::up(scenario(), &Options::unique("chart")).unwrap();
    let name = lab.name().to_owned();
    assert_eq!(tunables(), before, "the machine's own settings changed");
    clients(&lab);
    story::backend(&lab);
    // Nobody is managed: pods go their own way.
    for family in FAMILIES {
        for pod in ["shop/client", "untouched/client"] {
            assert_eq!(
                install::source(&lab, pod, family, "api.example.com"),
                Some(install::node(&lab, "node-1", family))
            );
        }
    }
    let nodes = nodes::look(&lab);
    install::quick_start(&lab);
    install::leaves_by_a_gateway(&lab);
    starts::first_instruction(&lab);
    story::told(&lab);
    // Before agents come and go.
    tools::sysdump(&lab);
    tools::connectivity(&lab);
    nodes::confined(&lab);
    nodes::evictions(&lab);
    nodes::uninstall(&lab, &nodes);
    lab.down().unwrap();
    assert_eq!(left(&name), [""; 0]);
}

#[test]
fn upgrades_and_faults_under_steady_traffic() {
    let mut lab = Lab::up(scenario(), &Options::unique("faults")).unwrap();
    clients(&lab);
    faults::install(&lab);
    story::give(&lab);
    faults::happen(&mut lab);
    lab.down().unwrap();
}

#[test]
fn a_cluster_whose_maker_died_goes_down_too() {
    let name = format!("crash-{}", std::process::id());
    let lab = env!("CARGO_BIN_EXE_tidegate-lab");
    let mut maker = Command::new(lab)
        .args(["cluster", "up", "--name", &name])
        .current_dir(root())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    // Its kubelets start containers.
    let log = kubelet::disk(&name).join("node-1/var/log/kubelet.log");
    let begun = wait_for(Duration::from_secs(120), || log.exists().then_some(()));
    maker.kill().unwrap();
    maker.wait().unwrap();
    let found = left(&name);
    let down = Command::new(lab).args(["cluster", "down", "--name", &name]).output().unwrap();
    assert!(begun.is_some(), "no kubelet was started");
    assert!(
        found.iter().any(|f| f.contains("/sys/fs/cgroup")) && found.iter().any(|f| f.contains("netns")),
        "{found:?}"
    );
    assert!(down.status.success(), "{}", String::from_utf8_lossy(&down.stderr));
    assert_eq!(left(&name), [""; 0]);
}
