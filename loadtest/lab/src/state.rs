//! What an instance has made, written down before and while it is made, so that `down` works after a crash too.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::netns;
use crate::scenario::Scenario;

/// Where instances keep their state.
pub const ROOT: &str = "/run/tidegate-lab";
/// Set in the environment of every process that the lab starts, to the instance's name.
pub const MARKER: &str = "TIDEGATE_LAB";
/// How long processes get between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_secs(2);

/// One instance.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct State {
    /// The instance's name.
    pub name: String,
    /// What it was made from.
    pub scenario: Scenario,
    /// Namespaces, in the order of their making.
    pub namespaces: Vec<Namespace>,
    /// Processes.
    pub processes: Vec<Process>,
    /// Where a bpffs is mounted.
    pub bpffs: Option<PathBuf>,
    /// Where nodes with kubelets keep their files.
    #[serde(default)]
    pub disk: Option<PathBuf>,
    /// Groups that those nodes' containers are in.
    #[serde(default)]
    pub cgroups: Vec<String>,
}

/// A network namespace that the lab made.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Namespace {
    /// Its name under /run/netns.
    pub netns: String,
    /// Its inode; absent while it is being made.
    pub inode: Option<u64>,
}

/// A process that the lab started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Process {
    /// What it is: a node's or gateway's name for the product's, `serve PLACE` for the lab's servers.
    pub name: String,
    /// Its id.
    pub pid: i32,
    /// Its start time in clock ticks since boot: with the id it names one process for good.
    pub started: u64,
}

/// The state folder of an instance.
pub fn folder(name: &str) -> PathBuf {
    Path::new(ROOT).join(name)
}

/// The names of all instances.
pub fn instances() -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(ROOT)
        .map(|entries| entries.flatten().filter_map(|e| e.file_name().into_string().ok()).collect())
        .unwrap_or_default();
    names.retain(|n| !n.starts_with('.'));
    names.sort();
    names
}

impl State {
    /// Claims a name for a new instance.
    ///
    /// # Errors
    /// When the name is taken or not a DNS label.
    pub fn create(name: &str, scenario: Scenario) -> Result<Self> {
        let ok = !name.is_empty()
            && name.len() <= 32
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        ensure!(ok, "{name:?} is not a name for a lab: use a-z, 0-9 and '-', at most 32");
        let state = Self {
            name: name.into(),
            scenario,
            namespaces: Vec::new(),
            processes: Vec::new(),
            bpffs: None,
            disk: None,
            cgroups: Vec::new(),
        };
        // Made aside and renamed: there is never a folder without a state, whenever this process dies.
        let made = Path::new(ROOT).join(format!(".{name}.{}", std::process::id()));
        fs::create_dir_all(&made).with_context(|| format!("cannot make {}", made.display()))?;
        fs::write(made.join("state.json"), serde_json::to_vec_pretty(&state)?)?;
        if let Err(e) = fs::rename(&made, folder(name)) {
            fs::remove_dir_all(&made)?;
            ensure!(
                !folder(name).exists(),
                "a lab called {name:?} is there already; `tidegate-lab down --name {name}` ends it"
            );
            return Err(e.into());
        }
        Ok(state)
    }

    /// Reads the state of an instance.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn load(name: &str) -> Result<Self> {
        let path = folder(name).join("state.json");
        let text = fs::read_to_string(&path).with_context(|| format!("there is no lab called {name:?}"))?;
        serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display()))
    }

    /// Writes the state in one step.
    pub fn save(&self) -> Result<()> {
        replace(&folder(&self.name).join("state.json"), serde_json::to_string_pretty(self)?.as_bytes())
    }

    /// The network namespace of a place.
    pub fn netns(&self, place: &str) -> String {
        format!("tl-{}-{}", self.name, place.replace('/', "."))
    }

    /// Makes a namespace, and writes it down first.
    pub fn make_namespace(&mut self, place: &str) -> Result<String> {
        let netns = self.netns(place);
        ensure!(netns::inode(&netns).is_none(), "a network namespace {netns} is there already and not this lab's");
        self.namespaces.push(Namespace { netns: netns.clone(), inode: None });
        self.save()?;
        netns::create(&netns)?;
        if let Some(last) = self.namespaces.last_mut() {
            last.inode = netns::inode(&netns);
        }
        self.save()?;
        Ok(netns)
    }

    /// Writes a started process down; another of the same name, if any, has ended.
    pub fn add_process(&mut self, name: &str, pid: u32) -> Result<()> {
        let pid = i32::try_from(pid)?;
        let started = start_time(pid).with_context(|| format!("{name} ended at once"))?;
        self.processes.retain(|p| p.name != name);
        self.processes.push(Process { name: name.into(), pid, started });
        self.save()
    }

    /// Removes everything that the instance made: processes, namespaces, pins, files.
    ///
    /// # Errors
    /// The first thing that could not be removed, after all the others were.
    pub fn tear_down(&self) -> Result<()> {
        let mut errors = Vec::new();
        let mut processes = self.processes.clone();
        // A crash between start and record leaves processes that only their environment betrays.
        processes.extend(marked(&self.name).into_iter().filter(|m| !self.processes.iter().any(|p| p.pid == m.pid)));
        stop(&processes);
        self.processes.iter().for_each(Process::reap);
        for namespace in self.namespaces.iter().rev() {
            match (netns::inode(&namespace.netns), namespace.inode) {
                (Some(now), Some(then)) if now != then => {} // another's by now
                (Some(_), _) => errors.extend(netns::delete(&namespace.netns).err()),
                (None, _) => {}
            }
        }
        if let Some(bpffs) = &self.bpffs
            && crate::lab::is_mount(bpffs)
        {
            let done = nix::mount::umount2(bpffs, nix::mount::MntFlags::MNT_DETACH);
            errors.extend(done.with_context(|| format!("cannot unmount {}", bpffs.display())).err());
        }
        for group in self.cgroups.iter().rev() {
            errors.extend(crate::kubelet::remove_cgroup(group).err());
        }
        if let Some(disk) = self.disk.as_deref().filter(|d| errors.is_empty() && d.exists()) {
            let removed = fs::remove_dir_all(disk).with_context(|| format!("cannot remove {}", disk.display()));
            errors.extend(removed.err());
        }
        if errors.is_empty() {
            fs::remove_dir_all(folder(&self.name)).context("cannot remove the state folder")?;
        }
        errors.into_iter().next().map_or(Ok(()), Err)
    }
}

/// Replaces a file in one step, so that no reader sees half of it.
pub fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let mut hidden = path.file_name().unwrap_or_default().to_os_string();
    hidden.push(".new");
    let temporary = path.with_file_name({
        let mut name = std::ffi::OsString::from(".");
        name.push(hidden);
        name
    });
    fs::write(&temporary, content).with_context(|| format!("cannot write {}", temporary.display()))?;
    fs::rename(&temporary, path).with_context(|| format!("cannot replace {}", path.display()))
}

/// Start time of a live process in clock ticks since boot (proc(5), stat, field 22); `None` if it is gone or a zombie.
pub fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the command in parentheses and may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    // The first thread of a killed process is a zombie while others still hold its sockets.
    let threads = || fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    if state == "X" || state == "Z" && threads() <= 1 {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

impl Process {
    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        start_time(self.pid) == Some(self.started)
    }

    /// Sends a signal, if it still runs.
    pub fn signal(&self, signal: Signal) {
        if self.is_alive() {
            // It may end between the check and the signal; then there is nothing to do.
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }

    /// Takes the status of an ended child; does nothing to a process that is not a child of this one.
    pub fn reap(&self) {
        // An error says that it is no child, or was taken before.
        let _ = waitpid(Pid::from_raw(self.pid), Some(WaitPidFlag::WNOHANG));
    }

    /// Waits until it has ended.
    pub fn wait(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        loop {
            if !self.is_alive() {
                return true;
            }
            if Instant::now() >= end {
                return false;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Ends processes: SIGTERM, then SIGKILL for those that stay.
pub fn stop(processes: &[Process]) {
    for process in processes {
        process.signal(Signal::SIGTERM);
    }
    let end = Instant::now() + GRACE;
    for process in processes {
        if !process.wait(end.saturating_duration_since(Instant::now())) {
            process.signal(Signal::SIGKILL);
            process.wait(GRACE);
        }
    }
}

/// Processes whose environment says that this instance started them.
fn marked(name: &str) -> Vec<Process> {
    let wanted = format!("{MARKER}={name}");
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| *pid != std::process::id() as i32)
        .filter(|pid| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.split(|b| *b == 0).any(|v| v == wanted.as_bytes())
        })
        .filter_map(|pid| Some(Process { name: "marked".into(), pid, started: start_time(pid)? }))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_from_another_with_its_id() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let process = Process { name: "x".into(), pid, started: start_time(pid).unwrap() };
        let other = Process { started: process.started + 1, ..process.clone() };
        assert!(process.is_alive() && !other.is_alive());
        other.signal(Signal::SIGKILL);
        assert!(process.is_alive());
        stop(std::slice::from_ref(&process));
        assert!(!process.is_alive());
        let _ = child.wait();
    }

    #[test]
    fn marked_processes_are_found() {
        let name = format!("mark-{}", std::process::id());
        let mut child = std::process::Command::new("sleep").arg("60").env(MARKER, &name).spawn().unwrap();
        // The environment is the parent's until the child has called exec.
        let end = Instant::now() + Duration::from_secs(5);
        while marked(&name).is_empty() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        let found = marked(&name);
        assert_eq!(found.iter().map(|p| p.pid as u32).collect::<Vec<_>>(), [child.id()]);
        stop(&found);
        let _ = child.wait();
    }
}
