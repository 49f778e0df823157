//! How the lab starts, watches and ends the product's processes, held with stand-ins for the product's binary.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use tidegate_lab::lab::is_mount;
use tidegate_lab::{Lab, Options, Scenario};

const BINARY: &str = env!("CARGO_BIN_EXE_tidegate-lab");
const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/demo.yaml");

/// A shell script in the place of the product.
fn stand_in(folder: &Path, script: &str) -> PathBuf {
    let path = folder.join("tidegate");
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn options(tidegate: PathBuf) -> Options {
    Options { lab: Some(BINARY.into()), tidegate: Some(tidegate), ..Options::unique("processes") }
}

#[test]
fn processes_are_started_watched_and_ended() {
    let folder = tempfile::tempdir().unwrap();
    // Answers every path of the admin port with 200.
    let script = format!(
        r#"test "$2" = --config && test -s "$3" || exit 9
           port=9090; test "$1" = agent && port=9091
           file={0}/$$.json
           echo '{{"ready":"/dev/null","listen":{{"http":['$port']}}}}' > $file
           exec {BINARY} serve $file"#,
        folder.path().display()
    );
    let mut lab = Lab::up(Scenario::load(DEMO.as_ref()).unwrap(), &options(stand_in(folder.path(), &script))).unwrap();
    let names = lab.product_names();
    assert_eq!(names, ["node-1", "node-2", "gw-node-a", "gw-node-b", "gw-a", "gw-b"]);
    let bpffs = lab.layout().bpffs();
    assert!(is_mount(&bpffs));
    for name in &names {
        assert_eq!(lab.admin(name, "/healthz").unwrap().0, 200);
        assert!(lab.metrics(name).unwrap().contains("/metrics"));
    }

    let before = lab.process("gw-a").unwrap().clone();
    lab.restart("gw-a").unwrap();
    assert!(!before.is_alive() && lab.process("gw-a").unwrap().is_alive());
    lab.signal("node-2", Signal::SIGKILL, Some(Duration::from_secs(2))).unwrap();
    assert!(lab.wait_ready("node-2", Duration::from_secs(1)).is_err());
    assert!(lab.admin("node-2", "/").is_err());

    let audit = |text: &str| {
        let mut file = fs::File::options().create(true).append(true).open(lab.layout().audit("gw-b")).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    };
    audit("{\"n\":1}\n");
    let mark = lab.mark();
    audit("{\"n\":2}\n{\"n\":3}\n{\"n\":");
    let records = lab.audit("gw-b", &mark).unwrap();
    assert_eq!(records.iter().map(|r| r["n"].as_u64().unwrap()).collect::<Vec<_>>(), [2, 3]);
    assert!(lab.wait_audit(&["gw-a", "gw-b"], &mark, |r| r["n"] == 3).is_some());
    assert!(lab.audit("gw-a", &mark).unwrap().is_empty());

    lab.annotate("shop", &[("tidegate.dev/mode", "audit")]).unwrap();
    assert!(lab.manifest("namespace-shop.yaml").unwrap().contains("tidegate.dev/mode: audit"));
    lab.remove_manifest("shop.yaml").unwrap();
    assert!(lab.manifest("shop.yaml").is_err());

    let processes = lab.processes().to_vec();
    let state = lab.layout().folder.clone();
    lab.down().unwrap();
    assert!(processes.iter().all(|p| !p.is_alive()));
    assert!(!is_mount(&bpffs) && !state.exists());
}

#[test]
fn what_does_not_start_is_named_and_nothing_stays() {
    let folder = tempfile::tempdir().unwrap();
    let script = "echo 'the kernel has no tcx' >&2; exit 1";
    let options = options(stand_in(folder.path(), script));
    let error = format!("{:#}", Lab::up(Scenario::load(DEMO.as_ref()).unwrap(), &options).unwrap_err());
    assert!(error.contains("gw-") && error.contains("the kernel has no tcx"), "{error}");
    assert!(!Path::new("/run/tidegate-lab").join(&options.name).exists());

    let options = Options { tidegate: Some(folder.path().join("nothing")), ..options };
    let error = format!("{:#}", Lab::up(Scenario::load(DEMO.as_ref()).unwrap(), &options).unwrap_err());
    assert!(error.contains("is missing"), "{error}");
}

#[test]
fn a_guard_takes_the_lab_down_when_its_process_is_gone() {
    let options = Options { lab: Some(BINARY.into()), ..Options::unique("guarded") };
    let mut scenario = Scenario::load(DEMO.as_ref()).unwrap();
    scenario.tidegate = None;
    let lab = Lab::up(scenario, &options).unwrap();
    let mut sleeper = std::process::Command::new("sleep").arg("100").spawn().unwrap();
    lab.guard(i32::try_from(sleeper.id()).unwrap()).unwrap();
    let state = lab.layout().folder.clone();
    lab.detach();
    std::thread::sleep(Duration::from_millis(300));
    assert!(state.exists());
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    let gone = tidegate_lab::lab::wait_for(Duration::from_secs(10), || (!state.exists()).then_some(()));
    assert!(gone.is_some());
}
