//! Whether the image that the Containerfile builds has what the chart and the program ask for. Nothing is built here.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use serde_json::Value;

use crate::common::{documents, root, run, template, tidegate};

/// What Debian's slim image has, of what is asked for.
const BASE: &[&str] = &["/bin/sleep"];
/// Which package brings which command.
const PACKAGES: &[(&str, &str)] = &[("nftables", "nft")];
/// Shared libraries of Debian's slim image.
const LIBRARIES: &[&str] =
    &["libc.so.6", "libm.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"];

/// Instructions of a Containerfile's stages, continued lines joined.
fn stages() -> Vec<Vec<(String, String)>> {
    let text = fs::read_to_string(root().join("Containerfile")).unwrap().replace("\\\n", " ");
    let mut stages: Vec<Vec<(String, String)>> = Vec::new();
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
        let (instruction, rest) = line.split_once(' ').unwrap();
        if instruction == "FROM" {
            stages.push(Vec::new());
        }
        stages.last_mut().unwrap().push((instruction.to_owned(), rest.trim().to_owned()));
    }
    stages
}

fn all<'a>(stage: &'a [(String, String)], instruction: &str) -> Vec<&'a str> {
    stage.iter().filter(|(i, _)| i == instruction).map(|(_, rest)| rest.as_str()).collect()
}

/// Every container that the chart can make.
fn containers() -> Vec<Value> {
    let mut found = Vec::new();
    for d in documents(&template("", true).success().unwrap()) {
        for pod in [&d["spec"]["template"]["spec"], &d["spec"]] {
            for key in ["containers", "initContainers"] {
                found.extend(pod[key].as_array().into_iter().flatten().cloned());
            }
        }
    }
    found
}

#[test]
fn the_image_has_what_the_chart_runs() {
    let stages = stages();
    let last = stages.last().unwrap();
    let mut files: BTreeSet<String> = BASE.iter().map(|f| (*f).to_owned()).collect();
    for copy in all(last, "COPY") {
        files.insert(copy.split_whitespace().next_back().unwrap().to_owned());
    }
    let user = all(last, "USER")[0].split(':').map(|n| n.parse::<u64>().unwrap()).collect::<Vec<_>>();
    assert!(user.iter().all(|id| *id != 0), "the image's own user is root");
    let containers = containers();
    assert_eq!(containers.len(), 4, "gateway, agent, uninstall and test");
    for container in &containers {
        let command = container["command"][0].as_str().unwrap();
        assert!(files.contains(command), "{command} is not in the image");
        // The program knows the subcommand and every flag: it stops at the first that it does not know.
        let args = container["args"].as_array().unwrap().iter().map(|a| a.as_str().unwrap());
        let out = run(Command::new(tidegate()).args(args).arg("--help"), "");
        assert!(out.ok, "{}: {out}", container["args"]);
        let rights = &container["securityContext"];
        assert_eq!(rights["readOnlyRootFilesystem"], true, "{container}");
        let id = rights["runAsUser"].as_u64().unwrap();
        assert!(id == 0 || id == user[0], "{id} is not a user of the image");
        // What runs as root needs it: the kernel's programs.
        let component = container["name"].as_str().unwrap();
        assert_eq!(id == 0, ["gateway", "agent"].contains(&component), "{component}");
    }
}

#[test]
fn the_image_has_what_the_program_runs() {
    let stages = stages();
    let last = stages.last().unwrap();
    let packages = all(last, "RUN").join(" ");
    let brings = |command: &str| PACKAGES.iter().any(|(p, c)| *c == command && packages.contains(p));
    // Programs that are run outside of tests.
    for folder in
        ["gateway/src", "gateway/kube/src", "ebpf/agent/src", "ebpf/host/src", "dns/server/src", "sni/relay/src"]
    {
        for text in sources(&root().join(folder)) {
            let text = text.split("#[cfg(test)]").next().unwrap();
            for part in text.split("Command::new(\"").skip(1) {
                let command = part.split('"').next().unwrap();
                assert!(brings(command), "{folder} runs {command}, which is not in the image");
            }
        }
    }
    assert!(packages.contains("ca-certificates"));
    // Its libraries: the same Debian in both stages, and nothing that the slim one lacks.
    let debian = |stage: &[(String, String)]| all(stage, "FROM")[0].contains("bookworm");
    assert!(stages.iter().all(|s| debian(s)));
    let out = run(Command::new("readelf").arg("--dynamic").arg(tidegate()), "").success().unwrap();
    for line in out.lines().filter(|l| l.contains("(NEEDED)")) {
        let library = line.split(['[', ']']).nth(1).unwrap();
        assert!(LIBRARIES.contains(&library), "{library} is not in the image");
    }
}

#[test]
fn the_image_is_built_as_the_tests_build() {
    let stages = stages();
    let build = &stages[0];
    let cargo = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let version = cargo.lines().find_map(|l| l.strip_prefix("rust-version = \"")?.strip_suffix('"')).unwrap();
    assert!(all(build, "FROM")[0].contains(&format!("rust:{version}-")), "the toolchain is not Rust {version}");
    let setup = fs::read_to_string(root().join("scripts/setup")).unwrap();
    let linker = setup.lines().find_map(|l| l.strip_prefix("BPF_LINKER_VERSION=")).unwrap();
    let run = all(build, "RUN").join("\n");
    for part in [&format!("bpf-linker@{linker}"), "rustc-web", "libstd-rust-web-dev-bpf", "--locked --release"] {
        assert!(run.contains(part), "{part}");
        assert!(part.contains('@') || part.contains("--") || setup.contains(part), "scripts/setup has no {part}");
    }
    // What is built is what is copied.
    let copy = all(stages.last().unwrap(), "COPY")[0];
    assert!(copy.contains("--from=build /src/target/release/tidegate ") && all(build, "WORKDIR") == ["/src"]);
    let ignored = fs::read_to_string(root().join(".dockerignore")).unwrap();
    for line in ignored.lines() {
        assert!(["/target", "/.git"].contains(&line), "{line} may be needed to build");
    }
}

fn sources(folder: &std::path::Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if !path.to_string_lossy().contains("_tests") {
            found.push(fs::read_to_string(path).unwrap());
        }
    }
    found
}
