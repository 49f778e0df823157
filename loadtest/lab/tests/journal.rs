//! A gateway that starts anew with nobody to ask: its own journal knows what it knew. One that is damaged is refused,
//! said and survived.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "failover/common.rs"]
mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{PODS, READY, egress, facts, facts_hold, kill, learn, log, owner, relayed, status, tcp, up};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tidegate_lab::Lab;
use tidegate_lab::family::FAMILIES;
use tidegate_lab::lab::wait_for;

const NAMES: [&str; 3] = ["tcp.example.com", "www.example.com", "api.example.com"];
const FILES: [&str; 2] = ["facts.snapshot", "facts.log"];
/// The disk is tried again every 5 s.
const RETRY: Duration = Duration::from_secs(15);

#[test]
fn journal() {
    let mut lab = up("journal");
    learn(&lab, &NAMES);
    both_from_their_journals(&mut lab);
    // From here on the other one is away: there is nothing but the own journal.
    kill(&lab, "gw-b");
    let folder = lab.layout().journal("gw-a");
    restart(&mut lab, |_| {});
    println!("alone: facts hold {:?} after it is ready", facts_hold(&lab, Duration::from_secs(3)));
    assert_eq!(said(&lab), (0.0, vec![]));
    damaged(&mut lab);
    full_disk(&mut lab, &folder);
    no_folder(&mut lab, &folder);
    lab.down().unwrap();
}

/// Both die; what they knew comes back, and no epoch is used twice.
fn both_from_their_journals(lab: &mut Lab) {
    // Three names in two families, at both.
    let all = [6, 6];
    let known = |lab: &Lab| wait_for(Duration::from_secs(5), || (both(lab) == all).then_some(()));
    assert!(known(lab).is_some(), "{:?}", both(lab));
    let (_, epoch) = owner(lab, "gw-a");
    for g in ["gw-a", "gw-b"] {
        kill(lab, g);
    }
    for g in ["gw-a", "gw-b"] {
        lab.start(g).unwrap();
    }
    for g in ["gw-a", "gw-b"] {
        lab.wait_ready(g, READY).unwrap();
    }
    higher(lab, epoch);
    assert!(known(lab).is_some(), "{:?}", both(lab));
    println!("both back: facts hold {:?} after they are ready", facts_hold(lab, Duration::from_secs(3)));
}

/// How many facts the gateways know.
fn both(lab: &Lab) -> [u64; 2] {
    [facts(lab, "gw-a"), facts(lab, "gw-b")]
}

/// Waits until somebody serves the pair with an epoch that was never used.
#[track_caller]
fn higher(lab: &Lab, epoch: u64) {
    let found = wait_for(Duration::from_secs(10), || (owner(lab, "gw-a").1 > epoch).then_some(()));
    assert!(found.is_some(), "an epoch is used once: {:?} after {epoch}", owner(lab, "gw-a"));
}

/// Kills the gateway, lets `meanwhile` happen to its journal, and starts it.
#[track_caller]
fn restart(lab: &mut Lab, meanwhile: impl FnOnce(&Path)) {
    let (_, epoch) = owner(lab, "gw-a");
    kill(lab, "gw-a");
    meanwhile(&lab.layout().journal("gw-a"));
    lab.start("gw-a").unwrap();
    lab.wait_ready("gw-a", READY).unwrap();
    // Where the journal is lost no gateway remembers it: the nodes do.
    higher(lab, epoch);
}

/// How many files were refused since the start, and what the status says of the journal.
fn said(lab: &Lab) -> (f64, Vec<String>) {
    let problems = status(lab, "gw-a")["problems"].as_array().cloned().unwrap_or_default();
    let texts = problems.iter().filter_map(|p| p.as_str().map(str::to_owned));
    let journal = texts.filter(|t| t.starts_with("journal: ")).collect();
    (lab.metric("gw-a", "tidegate_journal_refused_total", &[]).unwrap(), journal)
}

/// What happens to a file.
type Damage = fn(&Path);

fn flip(path: &Path, at: impl FnOnce(usize) -> usize) {
    let mut bytes = fs::read(path).unwrap();
    let at = at(bytes.len());
    bytes[at] ^= 0x10;
    fs::write(path, bytes).unwrap();
}

fn a_folder_instead(path: &Path) {
    fs::remove_file(path).unwrap();
    fs::create_dir(path).unwrap();
}

fn damaged(lab: &mut Lab) {
    // The last says whether files are refused; else they are as a crash leaves them.
    let kinds: [(&str, Damage, bool); 8] = [
        ("another version", |p| flip(p, |_| 7), true),
        // 8 octets of magic, 4 of length, 8 of checksum.
        ("a bit of the header", |p| flip(p, |_| 30), true),
        ("a bit in the middle", |p| flip(p, |n| 20 + (n - 20) / 2), true),
        ("the last bit", |p| flip(p, |n| n - 1), true),
        ("garbage", |p| fs::write(p, b"hello, this is no journal").unwrap(), true),
        ("unreadable", a_folder_instead, true),
        ("cut off", |p| fs::write(p, &fs::read(p).unwrap()[..40]).unwrap(), false),
        ("empty", |p| fs::write(p, b"").unwrap(), false),
    ];
    for (kind, damage, refused) in kinds {
        learn(lab, &NAMES);
        // A log with something in it is damaged, too.
        let folder = lab.layout().journal("gw-a");
        let written = || fs::metadata(folder.join("facts.log")).is_ok_and(|m| m.len() > 300).then_some(());
        assert!(wait_for(Duration::from_secs(5), written).is_some(), "{kind}: facts go to the log");
        let lines = log(lab, "gw-a").lines().count();
        restart(lab, |folder| {
            for file in FILES {
                let aside = folder.join(format!("{file}.refused"));
                let _ = fs::remove_file(&aside).or_else(|_| fs::remove_dir(&aside));
                damage(&folder.join(file));
            }
        });
        assert_eq!(facts(lab, "gw-a"), 0, "{kind}: nothing of it is believed");
        let (count, texts) = said(lab);
        let new: Vec<String> = log(lab, "gw-a").lines().skip(lines).map(str::to_owned).collect();
        let in_log = new.iter().filter(|l| l.contains("a journal file is refused")).count();
        println!("{kind}: {count} refused, {texts:?}");
        let files = if refused { 2 } else { 0 };
        assert_eq!((count, texts.len(), in_log), (files as f64, files, files), "{kind}: {texts:?} {new:?}");
        assert!(texts.iter().all(|t| t.contains(" was refused: ")), "{kind}: {texts:?}");
        for file in FILES {
            assert_eq!(folder.join(format!("{file}.refused")).exists(), refused, "{kind}: it is set aside");
        }
        // What is not known is closed, and open again with the next answer.
        let to = tcp(FAMILIES[0]);
        let seen = lab.pod(PODS[0]).within(|| common::connect(to, Duration::from_millis(300))).unwrap();
        assert!(seen.is_err(), "{kind}: {seen:?}");
    }
    learn(lab, &NAMES);
    facts_hold(lab, Duration::from_secs(3));
}

/// A small filesystem on a folder, until it is dropped.
struct Small(PathBuf);

impl Small {
    fn on(folder: &Path) -> Self {
        mount(Some("tmpfs"), folder, Some("tmpfs"), MsFlags::empty(), Some("size=64k,mode=700")).unwrap();
        Self(folder.to_owned())
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // In a drop there is nobody to tell; what stays is unmounted with the machine.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// The disk fills up: that is said, names go on, and when there is room again nothing is missing.
fn full_disk(lab: &mut Lab, folder: &Path) {
    kill(lab, "gw-a");
    let small = Small::on(folder);
    lab.start("gw-a").unwrap();
    lab.wait_ready("gw-a", READY).unwrap();
    learn(lab, &NAMES);
    let failing = |lab: &Lab| lab.metric("gw-a", "tidegate_journal_failing", &[]).unwrap();
    assert_eq!(failing(lab), 0.0);
    let filler = folder.join("filler");
    // As much as there is room for.
    let _ = fs::write(&filler, vec![1; 128 << 10]);
    // More than what is left of the log's last page.
    let names: Vec<String> = (0..60).map(|i| format!("n{i}.one.example.net")).collect();
    let mut ask = vec!["dig", "+short", "+time=3", "+tries=2"];
    ask.extend(names.iter().map(String::as_str));
    let answers = lab.pod(PODS[0]).run(&ask).stdout.lines().filter(|l| !l.starts_with(';')).count();
    assert_eq!(answers, names.len(), "names go on");
    assert!(wait_for(RETRY, || (failing(lab) == 1.0).then_some(())).is_some(), "it is counted");
    let problems = said(lab).1;
    assert!(problems.iter().any(|p| p.contains("cannot be written") && p.contains("No space")), "{problems:?}");
    assert!(log(lab, "gw-a").contains("the journal cannot be written"));
    let seen = relayed(lab, PODS[0], FAMILIES[0], 16, &names[59]);
    assert_eq!(seen.source(), Some(egress(FAMILIES[0])), "{}", seen.text());
    // Somebody makes room; what came meanwhile is written, too.
    fs::remove_file(&filler).unwrap();
    let mended = || (failing(lab) == 0.0).then_some(());
    assert!(wait_for(RETRY, mended).is_some(), "{:?}", said(lab));
    assert_eq!(said(lab).1, Vec::<String>::new());
    let known = facts(lab, "gw-a");
    assert!(known >= 60, "{known}");
    let written = || fs::metadata(folder.join("facts.log")).is_ok_and(|m| m.len() > 4096).then_some(());
    assert!(wait_for(Duration::from_secs(5), written).is_some(), "all is sent again");
    restart(lab, |_| {});
    assert_eq!(facts(lab, "gw-a"), known, "nothing is missing");
    facts_hold(lab, Duration::from_secs(3));
    kill(lab, "gw-a");
    drop(small);
}

/// A folder that cannot be used costs what it would have kept, and nothing else.
fn no_folder(lab: &mut Lab, folder: &Path) {
    fs::remove_dir_all(folder).unwrap();
    fs::write(folder, b"a file").unwrap();
    lab.start("gw-a").unwrap();
    lab.wait_ready("gw-a", READY).unwrap();
    let problems = || Some(said(lab).1).filter(|p| p.iter().any(|p| p.contains("cannot be written")));
    assert!(wait_for(RETRY, problems).is_some(), "it is said");
    learn(lab, &NAMES);
    facts_hold(lab, Duration::from_secs(3));
    fs::remove_file(folder).unwrap();
    let there = || folder.join("facts.snapshot").exists().then_some(());
    assert!(wait_for(RETRY, there).is_some(), "it is made when it can be");
}
