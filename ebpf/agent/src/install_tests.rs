#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;

const LIST: &str = "{\"cniVersion\": \"1.0.0\",\n \"name\": \"k8s\", \"plugins\": [\n  {\"type\": \"ptp\"}\n ]}\n";

struct Node {
    _folder: tempfile::TempDir,
    cni: Cni,
}

fn node() -> Node {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("bin")).unwrap();
    fs::create_dir(at("conf")).unwrap();
    let cni = Cni { folder: at("run"), standing: at("s"), bin_dir: Some(at("bin")), conf_dir: Some(at("conf")) };
    Node { _folder: folder, cni }
}

impl Node {
    fn installer(&self) -> Installer {
        Installer::new(&self.cni, Path::new("/pins")).unwrap()
    }

    fn conf(&self, name: &str) -> PathBuf {
        self.cni.conf_dir.as_ref().unwrap().join(name)
    }

    fn types(&self, name: &str) -> Vec<String> {
        let list: Value = serde_json::from_str(&fs::read_to_string(self.conf(name)).unwrap()).unwrap();
        list["plugins"].as_array().unwrap().iter().map(|p| p["type"].as_str().unwrap().to_owned()).collect()
    }
}

#[test]
fn the_entry_is_put_in_kept_there_and_taken_out() {
    let n = node();
    let mut installer = n.installer();
    assert!(installer.enter().is_err(), "there is no configuration yet");
    fs::write(n.conf("20-later.conflist"), LIST).unwrap();
    fs::write(n.conf("10-first.conflist"), LIST).unwrap();
    installer.enter().unwrap();
    assert_eq!(n.types("10-first.conflist"), ["ptp", TYPE]);
    assert_eq!(fs::read_to_string(n.conf("20-later.conflist")).unwrap(), LIST, "no runtime takes it");
    installer.enter().unwrap();
    // The network plugin writes its own again.
    fs::write(n.conf("10-first.conflist"), LIST.replace("ptp", "bridge")).unwrap();
    installer.enter().unwrap();
    assert_eq!(n.types("10-first.conflist"), ["bridge", TYPE]);
    // And another one comes before it.
    fs::write(n.conf("05-new.conflist"), LIST).unwrap();
    installer.enter().unwrap();
    assert_eq!(n.types("05-new.conflist"), ["ptp", TYPE]);
    remove(&n.cni).unwrap();
    for name in ["05-new.conflist", "20-later.conflist"] {
        assert_eq!(fs::read_to_string(n.conf(name)).unwrap(), LIST);
    }
    assert_eq!(n.types("10-first.conflist"), ["bridge"]);
}

#[test]
fn a_single_plugin_becomes_a_list_and_is_one_again() {
    let n = node();
    let one = "{\"cniVersion\": \"0.4.0\", \"name\": \"net\", \"type\": \"bridge\"}\n";
    fs::write(n.conf("10-net.conf"), one).unwrap();
    let mut installer = n.installer();
    installer.enter().unwrap();
    assert!(!n.conf("10-net.conf").exists(), "it would go first");
    assert_eq!(n.types("10-net.conflist"), ["bridge", TYPE]);
    installer.enter().unwrap();
    remove(&n.cni).unwrap();
    assert_eq!(fs::read_to_string(n.conf("10-net.conf")).unwrap(), one);
    assert_eq!(fs::read_dir(n.conf("")).unwrap().count(), 1, "nothing else is left");
}

#[test]
fn the_plugin_is_replaced_whole_and_what_is_no_configuration_is_said() {
    let n = node();
    let installer = n.installer();
    fs::write(&installer.binary, "an earlier version").unwrap();
    installer.place().unwrap();
    assert!(same(&std::env::current_exe().unwrap(), &installer.binary));
    let before = look(&installer.binary).unwrap();
    installer.place().unwrap();
    assert_eq!(look(&installer.binary).unwrap(), before, "it is there");
    fs::write(n.conf("10-bad.conflist"), "{").unwrap();
    let said = n.installer().enter().unwrap_err();
    assert!(said.contains("10-bad.conflist") && said.contains("no JSON"), "{said}");
    assert_eq!(fs::read_to_string(n.conf("10-bad.conflist")).unwrap(), "{");
    remove(&n.cni).unwrap();
    assert!(!installer.binary.exists());
}
