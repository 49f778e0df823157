//! Whether the image has what the chart and the program ask for, and nothing else. Its root is made by scripts/image, which
//! the Containerfile runs as well.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use crate::common::{documents, root, run, template, tidegate};

/// What is in the image, beside shared libraries.
const FILES: &[&str] =
    &["/bin/sleep", "/etc/protocols", "/etc/ssl/certs/ca-certificates.crt", "/usr/local/bin/tidegate", "/usr/sbin/nft"];

/// The most that the image has beside the program, in octets.
const REST: u64 = 8 << 20;

/// The image's root, of the program that the tests use.
fn image_root() -> TempDir {
    root_with(&tidegate())
}

/// The image's root, with another program in the place of Tidegate's.
fn root_with(program: &Path) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut script = Command::new(root().join("scripts/image"));
    run(script.args(["root".as_ref(), program.as_os_str(), folder.path().as_os_str()]), "").success().unwrap();
    folder
}

/// The libraries that a program needs, by their paths.
fn libraries(program: &str) -> BTreeSet<String> {
    let said = run(Command::new("ldd").arg(program), "").success().unwrap();
    said.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned).collect()
}

/// The paths of all files below a folder, as they are in the image.
fn files(root: &Path, folder: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(root, &path));
        } else {
            found.insert(format!("/{}", path.strip_prefix(root).unwrap().display()));
        }
    }
    found
}

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
    let image = image_root();
    let files = files(image.path(), image.path());
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
fn the_image_has_what_the_program_runs_and_nothing_else() {
    let image = image_root();
    let all = files(image.path(), image.path());
    let library = |f: &&String| f.contains(".so");
    let others: Vec<&str> = all.iter().filter(|f| !library(f)).map(String::as_str).collect();
    assert_eq!(others, FILES);
    // Programs that are run outside of tests.
    for folder in
        ["gateway/src", "gateway/kube/src", "ebpf/agent/src", "ebpf/host/src", "dns/server/src", "sni/relay/src"]
    {
        for text in sources(&root().join(folder)) {
            let text = text.split("#[cfg(test)]").next().unwrap();
            let run = text.split("Command::new(\"").skip(1).map(|part| format!("/usr/sbin/{}", first(part)));
            let named = text.split("\"command\": [\"").skip(1).map(|part| first(part).to_owned());
            for command in run.chain(named) {
                assert!(all.contains(&command), "{folder} runs {command}, which is not in the image");
            }
        }
    }
    // They find their libraries where nothing else is.
    for (program, flag) in
        [("/usr/local/bin/tidegate", "--version"), ("/usr/sbin/nft", "--version"), ("/bin/sleep", "0")]
    {
        let out = run(
            Command::new("chroot")
                .arg(image.path())
                .args([program, flag])
                .env_clear()
                .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            "",
        );
        assert!(out.ok, "{program}: {out}");
    }
    // nft knows the protocols that rules name; in a network namespace of its own, where it is asked and changes nothing.
    let rules = "table inet t { chain c { meta l4proto { icmp, ipv6-icmp, tcp, udp } accept; }; }";
    let mut nft = Command::new("unshare");
    nft.args(["--net", "chroot"]).arg(image.path()).args(["/usr/sbin/nft", "--check", "--file", "-"]);
    run(&mut nft, rules).success().unwrap();
    for file in &all {
        let mode = fs::metadata(image.path().join(&file[1..])).unwrap().permissions().mode() & 0o7777;
        assert!([0o755, 0o644].contains(&mode), "{file} has the mode {mode:o}");
    }
}

/// The image's program is static, as scripts/image holds when it makes it: what remains is `nft`'s and `sleep`'s.
#[test]
fn with_a_program_that_needs_none_all_libraries_are_of_others() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("tidegate");
    fs::write(&program, "#!/bin/sh\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let image = root_with(&program);
    let all = files(image.path(), image.path());
    let found: BTreeSet<String> = all.iter().filter(|f| f.contains(".so")).cloned().collect();
    let nft = all.iter().find(|f| f.ends_with("/nft")).unwrap();
    assert_eq!(found, &libraries(nft) | &libraries("/bin/sleep"));
    let size: u64 = all.iter().map(|f| fs::metadata(image.path().join(&f[1..])).unwrap().len()).sum();
    println!("beside the program the image has {size} octets");
    assert!(size < REST, "{size} octets");
}

#[test]
fn the_archive_is_the_same_every_time_and_container_engines_can_read_it() {
    let folder = tempfile::tempdir().unwrap();
    let archive = |name: &str| {
        let path = folder.path().join(name);
        let mut script = Command::new(root().join("scripts/image"));
        // A small program will do.
        run(script.args(["archive".as_ref(), Path::new("/bin/true").as_os_str(), path.as_os_str()]), "")
            .success()
            .unwrap();
        fs::read(path).unwrap()
    };
    let first = archive("first.tar");
    // Times of files are whole seconds in the archive.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    assert!(first == archive("second.tar"), "the same files gave another archive");
    let tar = |args: &[&str]| run(Command::new("tar").current_dir(folder.path()).args(args), "").success().unwrap();
    tar(&["-xf", "first.tar"]);
    let json = |path: &str| -> Value { serde_json::from_slice(&fs::read(folder.path().join(path)).unwrap()).unwrap() };
    // Every digest is that of the octets, from the index to the layer.
    let blob = |descriptor: &Value| -> String {
        let digest = descriptor["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
        let path = format!("blobs/sha256/{digest}");
        let sum = run(Command::new("sha256sum").arg(folder.path().join(&path)), "").success().unwrap();
        assert!(sum.starts_with(digest), "{sum}");
        assert_eq!(fs::metadata(folder.path().join(&path)).unwrap().len(), descriptor["size"].as_u64().unwrap());
        path
    };
    let entry = &json("index.json")["manifests"][0];
    let name = entry["annotations"]["io.containerd.image.name"].as_str().unwrap();
    let manifest = json(&blob(entry));
    let (config, layer) = (blob(&manifest["config"]), blob(&manifest["layers"][0]));
    let read = json(&config);
    assert_eq!(read["rootfs"]["diff_ids"][0], manifest["layers"][0]["digest"]);
    assert_eq!(read["config"]["User"], "65532:65532");
    assert!(tar(&["-tf", &layer]).contains("./usr/local/bin/tidegate\n"));
    // docker's form says the same, and the name is what the chart asks for.
    let docker = &json("manifest.json")[0];
    assert_eq!(
        (&docker["Config"], &docker["Layers"][0], &docker["RepoTags"][0]),
        (&config.into(), &layer.into(), &name.into())
    );
    assert!(containers().iter().all(|c| c["image"] == name), "the chart asks for another image than {name}");
    // The Containerfile's image has the same settings.
    let stages = stages();
    let last = stages.last().unwrap();
    assert_eq!(all(last, "USER"), [read["config"]["User"].as_str().unwrap()]);
    assert_eq!(all(last, "ENV"), [read["config"]["Env"][0].as_str().unwrap()]);
    assert_eq!(all(last, "ENTRYPOINT"), [read["config"]["Entrypoint"].to_string()]);
}

/// Up to the next quote.
fn first(text: &str) -> &str {
    text.split('"').next().unwrap()
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
    for part in [&format!("bpf-linker@{linker}"), "rustc-web", "libstd-rust-web-dev-bpf"] {
        assert!(run.contains(part), "{part}");
        assert!(part.contains('@') || setup.contains(part), "scripts/setup has no {part}");
    }
    // What is built is what is copied, and nothing else.
    let last = stages.last().unwrap();
    assert!(run.contains("scripts/image program /tidegate && scripts/image root /tidegate /image"), "{run}");
    // The program may not name the folder in which it was built; messages of libraries have `/src/` in them.
    assert_eq!(all(build, "WORKDIR"), ["/tidegate-source"]);
    assert!(!run.contains("cargo build"), "the program is built in another way than by `make image`: {run}");
    // As here without a container engine.
    let makefile = fs::read_to_string(root().join("Makefile")).unwrap();
    let (_, image) = makefile.split_once("\nimage: setup\n").unwrap();
    let image: Vec<&str> = image.lines().take_while(|l| l.starts_with('\t')).map(str::trim).collect();
    let archive = "scripts/image archive target/tidegate-image target/tidegate-image.tar";
    assert_eq!(image, ["scripts/image program target/tidegate-image", archive]);
    assert_eq!((all(last, "FROM"), all(last, "COPY")), (vec!["scratch"], vec!["--from=build /image/ /"]));
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
