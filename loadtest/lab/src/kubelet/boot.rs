//! A node as its own processes see it: `tidegate-lab node FILE` becomes its init.
//!
//! It has network, mounts, processes, hostname and System V objects of its own, so whoever ends its init ends all of it,
//! containers and their mounts too, as pulling the plug does. /etc, /var and /opt are its own over the machine's, /run and the
//! BPF filesystem are empty: two nodes on one machine do not see each other's sockets, pins and network plugins.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::sys::wait::waitpid;
use serde::{Deserialize, Serialize};

use crate::lab::wait_for;

/// Where the node's own programs and images are, on the node.
pub const PROGRAMS: &str = "/opt/node";
/// Where the archives of its images are, on the node.
pub const IMAGES: &str = "/opt/node/images";
/// containerd's socket, on the node.
const CONTAINERD: &str = "/run/containerd/containerd.sock";
/// How long containerd may take to listen.
const LISTEN_LIMIT: Duration = Duration::from_secs(60);
/// How long a service that ended is away.
const RESTART_DELAY: Duration = Duration::from_secs(1);
/// What a kubelet sets for the whole machine: the node's own view of it says that it is set already.
const TUNABLES: &[(&str, &str)] = &[
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// What a node is made of.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Config {
    /// Its name.
    pub name: String,
    /// Its folder on disk, with `etc`, `opt` and `var`.
    pub disk: PathBuf,
    /// Programs, by the names that they get in [`PROGRAMS`].
    pub programs: Vec<(String, PathBuf)>,
    /// Archives of images that it has.
    pub images: PathBuf,
    /// What runs on it: names with their command lines.
    pub services: Vec<(String, Vec<String>)>,
}

/// Makes this process a node, in the network namespace that it is in. It ends when its parent does.
///
/// # Errors
/// When the kernel refuses a namespace, or the node's init ends.
pub fn run(file: &Path) -> Result<()> {
    let flags =
        CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC;
    unshare(flags).context("cannot make the node's namespaces")?;
    let status = Command::new(std::env::current_exe()?).args(["node", "--inside"]).arg(file).status()?;
    bail!("the node ended with {status}");
}

/// The node's init: mounts what is the node's own, starts its services, and starts them again when they end.
///
/// # Errors
/// When a mount or a first start fails.
pub fn init(file: &Path) -> Result<()> {
    // What started this is outside of the node's processes; without it nobody would end the node.
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    ensure!(std::process::id() == 1, "--inside is for a node's first process");
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let config: Config = serde_json::from_str(&text)?;
    mount_all(&config)?;
    // Each UTS namespace has its own.
    fs::write("/proc/sys/kernel/hostname", &config.name).context("cannot set the hostname")?;

    let (first, others) = config.services.split_first().context("the node has no services")?;
    let mut running = vec![(first, start(first)?)];
    let up = wait_for(LISTEN_LIMIT, || UnixStream::connect(CONTAINERD).ok());
    ensure!(up.is_some(), "containerd does not listen");
    import_images()?;
    for service in others {
        running.push((service, start(service)?));
    }
    println!("{} runs", config.name);
    loop {
        // Whatever lost its parent is this process's, too.
        let ended = waitpid(None, None)?.pid().map(nix::unistd::Pid::as_raw);
        for (service, child) in &mut running {
            if ended.is_some_and(|pid| i32::try_from(child.id()) == Ok(pid)) {
                println!("{} ended", service.0);
                std::thread::sleep(RESTART_DELAY);
                *child = start(service)?;
            }
        }
    }
}

fn start((name, command): &(String, Vec<String>)) -> Result<Child> {
    let (program, arguments) = command.split_first().context("a service has no command")?;
    let log = File::options().create(true).append(true).open(format!("/var/log/{name}.log"))?;
    Command::new(program)
        .args(arguments)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start {program}"))
}

/// The command line that gives the node's containerd an archive.
pub fn import(archive: &Path) -> Vec<OsString> {
    let command = ["ctr", "--address", CONTAINERD, "--namespace", "k8s.io", "images", "import"];
    command.iter().map(OsString::from).chain([archive.into()]).collect()
}

fn import_images() -> Result<()> {
    let mut archives: Vec<PathBuf> = fs::read_dir(IMAGES)?.flatten().map(|e| e.path()).collect();
    archives.sort();
    for archive in archives {
        let out = Command::new("env").args(import(&archive)).output().context("cannot run ctr")?;
        ensure!(out.status.success(), "{}: {}", archive.display(), String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(())
}

fn mount_all(config: &Config) -> Result<()> {
    let disk = &config.disk;
    // Nothing of this reaches the machine.
    set_propagation(MsFlags::MS_PRIVATE)?;
    filesystem("proc", Path::new("/proc"), "")?;
    for (key, value) in TUNABLES {
        let file = disk.join(key.replace('/', "."));
        fs::write(&file, value)?;
        bind(&file, &Path::new("/proc/sys").join(key))?;
    }
    let programs = disk.join("opt/node");
    for (name, path) in &config.programs {
        let target = programs.join(name);
        File::create(&target)?;
        bind(path, &target)?;
    }
    bind(&config.images, &programs.join("images"))?;

    // A fresh /sys shows the node's own devices, but not the cgroups.
    let cgroups = disk.join("cgroups");
    fs::create_dir_all(&cgroups)?;
    bind(Path::new("/sys/fs/cgroup"), &cgroups)?;
    filesystem("sysfs", Path::new("/sys"), "")?;
    bind(&cgroups, Path::new("/sys/fs/cgroup"))?;
    umount2(&cgroups, MntFlags::MNT_DETACH)?;
    filesystem("bpf", Path::new("/sys/fs/bpf"), "")?;

    let (upper, work) = (disk.join("etc"), disk.join("etc.work"));
    let options = format!("lowerdir=/etc,upperdir={},workdir={}", upper.display(), work.display());
    filesystem("overlay", Path::new("/etc"), &options)?;
    bind(&disk.join("opt"), Path::new("/opt"))?;
    let var = disk.join("var");
    if !var.join("run").exists() {
        symlink("/run", var.join("run"))?;
    }
    bind(&var, Path::new("/var"))?;
    filesystem("tmpfs", Path::new("/run"), "mode=755")?;
    // Containers' mounts reach the node, and the node's reach them, where they ask for it.
    set_propagation(MsFlags::MS_SHARED)
}

fn set_propagation(flags: MsFlags) -> Result<()> {
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | flags, None::<&str>).context("cannot set propagation")
}

fn filesystem(kind: &str, target: &Path, options: &str) -> Result<()> {
    mount(Some(kind), target, Some(kind), MsFlags::empty(), Some(options))
        .with_context(|| format!("cannot mount {kind} on {}", target.display()))
}

fn bind(source: &Path, target: &Path) -> Result<()> {
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .with_context(|| format!("cannot mount {} on {}", source.display(), target.display()))
}
