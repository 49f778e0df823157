//! The directory reader: quarantine, last good versions, duplicates, deletion.
// Helpers of tests may panic as the tests themselves do.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use tidegate_api::{Code, Loaded, Reader, Severity};

fn policy(name: &str, port: &str) -> String {
    format!(
        "apiVersion: tidegate.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{podSelector: {{}}, egress: [{{toFQDNs: [{{matchName: a.example}}], toPorts: [{{protocol: TCP, port: {port}}}]}}]}}\n"
    )
}

fn write(dir: &Path, name: &str, text: &str) {
    fs::write(dir.join(name), text).unwrap();
}

/// Names of the policies with their first port.
fn held(l: &Loaded) -> Vec<(String, u16)> {
    l.objects.policies.iter().map(|((_, n), p)| (n.clone(), p.egress[0].ports[0].lo)).collect()
}

fn want(list: &[(&str, u16)]) -> Vec<(String, u16)> {
    list.iter().map(|(n, p)| ((*n).to_owned(), *p)).collect()
}

fn codes(l: &Loaded) -> Vec<Code> {
    l.problems.iter().map(|p| p.code).collect()
}

#[test]
fn a_bad_document_keeps_its_last_good_version() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let mut r = Reader::new(d);
    write(d, "a.yaml", &[policy("one", "443"), policy("two", "443"), policy("three", "443")].join("---\n"));
    let l = r.reload();
    assert!(l.changed && l.problems.is_empty());
    assert!(!r.reload().changed);
    // `two` is bad; the others change.
    write(d, "a.yaml", &[policy("one", "444"), policy("two", "0"), policy("three", "444")].join("---\n"));
    let l = r.reload();
    assert!(l.changed);
    assert_eq!(held(&l), want(&[("one", 444), ("three", 444), ("two", 443)]));
    assert_eq!(codes(&l), [Code::Invalid]);
    assert_eq!((l.problems[0].document, l.problems[0].line), (Some(2), Some(9)));
    // It is still bad at the next reload, and still said.
    let l = r.reload();
    assert!(!l.changed);
    assert_eq!(codes(&l), [Code::Invalid]);
    // Good again.
    write(d, "a.yaml", &[policy("one", "444"), policy("two", "445"), policy("three", "444")].join("---\n"));
    assert_eq!(held(&r.reload()), want(&[("one", 444), ("three", 444), ("two", 445)]));
    // A reader that starts on the bad file has no last good version.
    write(d, "a.yaml", &[policy("one", "444"), policy("two", "0")].join("---\n"));
    assert_eq!(held(&Reader::new(d).reload()), want(&[("one", 444)]));
}

#[test]
fn what_cannot_be_told_apart_stays() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let mut r = Reader::new(d);
    write(d, "a.yaml", &[policy("one", "443"), policy("two", "443")].join("---\n"));
    write(d, "b.yaml", &policy("other", "443"));
    r.reload();
    // Broken so that nobody knows that it was `two`.
    write(d, "a.yaml", &[policy("one", "444"), "kind: [".into()].join("---\n"));
    write(d, "b.yaml", "");
    let l = r.reload();
    assert_eq!(held(&l), want(&[("one", 444), ("two", 443)]), "`other` is gone: its file is fine");
    assert_eq!(codes(&l), [Code::Syntax]);
    // A file that is no text at all.
    fs::write(d.join("a.yaml"), [0xff, 0xfe, 0x00]).unwrap();
    let l = r.reload();
    assert_eq!(held(&l), want(&[("one", 444), ("two", 443)]));
    assert_eq!(codes(&l), [Code::Unreadable]);
    // Deleting the file deletes its objects.
    fs::remove_file(d.join("a.yaml")).unwrap();
    let l = r.reload();
    assert!(l.changed && held(&l).is_empty() && l.problems.is_empty());
}

#[test]
fn deleting_removes_and_moving_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let mut r = Reader::new(d);
    write(d, "a.yaml", &[policy("one", "443"), policy("two", "443")].join("---\n"));
    r.reload();
    fs::create_dir(d.join("sub")).unwrap();
    fs::rename(d.join("a.yaml"), d.join("sub/b.yml")).unwrap();
    let l = r.reload();
    assert!(!l.changed, "the same objects from another place");
    assert_eq!(held(&l).len(), 2);
    write(&d.join("sub"), "b.yml", &policy("two", "443"));
    assert_eq!(held(&r.reload()), want(&[("two", 443)]));
    // A root that is away for a moment takes nothing with it.
    let away = d.with_extension("away");
    fs::rename(d, &away).unwrap();
    let l = r.reload();
    fs::rename(&away, d).unwrap();
    assert_eq!(held(&l), want(&[("two", 443)]));
    assert_eq!(codes(&l), [Code::Unreadable]);
}

#[test]
fn the_first_of_two_holds() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    write(d, "b.yaml", &policy("one", "2"));
    write(d, "a.yaml", &[policy("one", "1"), policy("one", "3")].join("---\n"));
    let l = Reader::new(d).reload();
    assert_eq!(held(&l), want(&[("one", 1)]));
    assert_eq!(codes(&l), [Code::Duplicate, Code::Duplicate]);
    let text: Vec<String> = l.problems.iter().map(ToString::to_string).collect();
    let d = d.display();
    assert_eq!(
        text,
        [
            format!(
                "{d}/a.yaml:6: document 2: EgressPolicy shop/one: metadata.name: the object is already at line 1 of this file, and that one holds"
            ),
            format!(
                "{d}/b.yaml:1: document 1: EgressPolicy shop/one: metadata.name: the object is already at line 1 of {d}/a.yaml, and that one holds"
            ),
        ]
    );
}

#[test]
fn a_mounted_config_map_is_read_once() {
    use std::os::unix::fs::symlink;
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    for (n, port) in [("..v1", "443"), ("..v2", "444")] {
        fs::create_dir(d.join(n)).unwrap();
        write(&d.join(n), "p.yaml", &policy("one", port));
    }
    symlink("..v1", d.join("..data")).unwrap();
    symlink("..data/p.yaml", d.join("p.yaml")).unwrap();
    write(d, "notes.txt", "not: [yaml");
    let mut r = Reader::new(d);
    let l = r.reload();
    assert_eq!((held(&l), l.problems.len()), (want(&[("one", 443)]), 0));
    symlink("..v2", d.join("..tmp")).unwrap();
    fs::rename(d.join("..tmp"), d.join("..data")).unwrap();
    let l = r.reload();
    assert!(l.changed);
    assert_eq!(held(&l), want(&[("one", 444)]));
    assert_eq!(tidegate_api::watch_paths(d), [d.to_owned()]);
}

#[test]
fn loops_fifos_and_huge_files_end() {
    use std::os::unix::fs::symlink;
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    write(d, "a.yaml", &policy("one", "443"));
    fs::create_dir(d.join("sub")).unwrap();
    symlink("..", d.join("sub/up")).unwrap();
    let big = fs::File::create(d.join("big.yaml")).unwrap();
    big.set_len(tidegate_api::MAX_FILE + 1).unwrap();
    let l = Reader::new(d).reload();
    assert_eq!(held(&l), want(&[("one", 443)]));
    assert!(l.problems.iter().all(|p| p.severity == Severity::Error));
    assert!(l.problems.iter().any(|p| p.to_string().ends_with("is nested deeper than 8 directories")));
    assert!(l.problems.iter().any(|p| p.to_string().contains("big.yaml: cannot be read: it is larger than")));
}

#[test]
fn pools_that_do_not_fit_are_warned_of() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let pool = |n: &str| {
        format!(
            "apiVersion: tidegate.dev/v1alpha1\nkind: EgressPool\nmetadata: {{name: {n}}}\nspec: {{addressSource: Static, \
             allowedNamespaces: {{matchLabels: {{team: x}}}}, static: {{addresses: [{{ipv4: 203.0.113.1}}]}}}}\n"
        )
    };
    let uses = |n: &str, pool: &str| {
        policy(n, "443").replace("podSelector: {}", &format!("podSelector: {{}}, poolRef: {{name: {pool}}}"))
    };
    write(
        d,
        "a.yaml",
        &[pool("a"), pool("b"), uses("one", "a"), uses("two", "gone"), uses("three", "default")].join("---\n"),
    );
    write(d, "ns.yaml", "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n");
    let l = Reader::new(d).reload();
    let text: Vec<&str> = l.problems.iter().map(|p| p.message.as_str()).collect();
    assert_eq!(
        text,
        [
            "203.0.113.1 is also in the pool `a`, so it does not tell the two apart",
            "`allowedNamespaces` of the EgressPool `a` does not admit this namespace",
            "there is no EgressPool `gone` in these manifests",
        ]
    );
    assert!(l.problems.iter().all(|p| p.severity == Severity::Warning));
    assert_eq!(l.objects.policies.len(), 3);
}

#[test]
fn check_tells_a_missing_path_from_a_bad_one() {
    assert!(tidegate_api::check(Path::new("/nonexistent/x")).is_err());
    let dir = tempfile::tempdir().unwrap();
    assert!(tidegate_api::check(dir.path()).unwrap().is_empty());
    assert!(tidegate_api::check_file(dir.path()).is_err());
}
