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
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use tidegate_lab::family::FAMILIES;
use tidegate_lab::lab::wait_for;
use tidegate_lab::{Lab, Options, Scenario, kubelet, state};

/// What a kubelet would set for the whole machine.
const TUNABLES: &[&str] = &["vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops"];

/// A cluster is up so soon once its programs are built.
const UP: Duration = Duration::from_secs(120);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

fn scenario() -> Scenario {
    Scenario::load(&root().join("loadtest/scenarios/cluster.yaml")).unwrap()
}

fn tunables() -> Vec<String> {
    TUNABLES.iter().map(|t| fs::read_to_string(Path::new("/proc/sys").join(t)).unwrap()).collect()
}

/// A cluster of kubelets, up in time.
#[track_caller]
fn up(scenario: Scenario, name: &str) -> Lab {
    let begun = Instant::now();
    let lab = Lab::up(scenario, &Options::unique(name)).unwrap();
    println!("the cluster is up after {:.1} s", begun.elapsed().as_secs_f32());
    assert!(begun.elapsed() < UP, "it took {:?}", begun.elapsed());
    lab
}

/// A cluster goes down, and nothing of it is left.
#[track_caller]
fn down(lab: Lab) {
    let name = lab.name().to_owned();
    lab.down().unwrap();
    assert_eq!(left(&name), [""; 0]);
}

/// `tidegate-lab cluster` with these arguments, of the cluster of this name.
fn cluster(name: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate-lab"));
    command.args(["cluster", "--name", name]).args(arguments).output().unwrap()
}

/// What it says.
#[track_caller]
fn said(name: &str, arguments: &[&str]) -> String {
    let out = cluster(name, arguments);
    assert!(out.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap().trim().to_owned()
}

/// The commands for people tell of every node, and reach the API server.
fn commands(lab: &Lab) {
    let (status, objects) = (said(lab.name(), &["status"]), said(lab.name(), &["kubectl", "--", "get", "nodes"]));
    let says = |text: &str, words: &[&str]| {
        let line = |l: &str| words.iter().all(|word| l.split_whitespace().any(|w| w == *word));
        assert!(text.lines().any(line), "{words:?}: {text}");
    };
    for node in &lab.scenario().nodes {
        says(&status, &["node", &node.name, "runs"]);
        says(&status, &[&format!("node/{}", node.name), "Ready"]);
        says(&objects, &[&node.name, "Ready"]);
    }
    assert!(status.contains("pod/coredns-"), "{status}");
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
    found.extend(processes(name).into_iter().map(|(process, _, line)| format!("{} {line}", process.display())));
    found
}

/// The processes of a cluster, with their control groups and their arguments.
fn processes(name: &str) -> Vec<(PathBuf, String, String)> {
    let all = fs::read_dir("/proc").unwrap().flatten().map(|e| e.path()).filter(|p| p.join("cgroup").exists());
    let told = all.map(|process| {
        let says = |file: &str| String::from_utf8_lossy(&fs::read(process.join(file)).unwrap_or_default()).into_owned();
        let (groups, line) = (says("cgroup"), says("cmdline"));
        (process, groups, line)
    });
    let own = |(_, groups, line): &(PathBuf, String, String)| {
        groups.contains(&format!("tidegate-lab-{name}/")) || line.contains(&format!("/{name}/"))
    };
    told.filter(own).collect()
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
    let mut lab = up(scenario(), "chart");
    assert_eq!(tunables(), before, "the machine's own settings changed");
    commands(&lab);
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
    tools::without_an_agent(&mut lab);
    nodes::confined(&lab);
    nodes::evictions(&lab);
    nodes::uninstall(&lab, &nodes);
    down(lab);
}

#[test]
fn upgrades_and_faults_under_steady_traffic() {
    let mut lab = up(scenario(), "faults");
    clients(&lab);
    faults::install(&lab);
    story::give(&lab);
    faults::happen(&mut lab);
    down(lab);
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
    // Containers of its first pods, CoreDNS, run.
    let runs = || processes(&name).into_iter().find(|(_, groups, _)| groups.contains("/pod"));
    let begun = wait_for(UP, runs);
    maker.kill().unwrap();
    let ended = maker.wait().unwrap();
    let found = left(&name);
    said(&name, &["down"]);
    assert!(begun.is_some(), "no pod was started: {found:#?}");
    assert!(!ended.success(), "it was up before it was killed");
    for what in ["/sys/fs/cgroup", "/run/netns", "/proc/"] {
        assert!(found.iter().any(|f| f.starts_with(what)), "{what}: {found:#?}");
    }
    assert_eq!(left(&name), [""; 0]);
}
