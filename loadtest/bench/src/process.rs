//! Processes that are measured: pinned, timed by the scheduler, ended by their id.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

/// The CPU of what is measured; everything else runs on [`LOAD_CPU`].
pub const SERVER_CPU: usize = 0;
/// The CPU of generators and backends.
pub const LOAD_CPU: usize = 1;

/// Binds the calling thread, and what it starts, to one CPU.
pub fn pin(cpu: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

/// A child process; ended when dropped, and by the kernel when this process dies.
pub struct Server {
    /// Its name in the tables.
    pub name: &'static str,
    child: Child,
}

impl Server {
    /// Starts a command on a CPU. Its errors go to ours.
    pub fn start(name: &'static str, command: &mut Command, cpu: usize) -> Result<Self> {
        let set_up = move || {
            // Not SIGKILL: a master would leave its workers behind.
            set_pdeathsig(Signal::SIGTERM)?;
            pin(cpu)
        };
        // SAFETY: between fork and exec only two system calls run, on values that were there before.
        unsafe { command.pre_exec(set_up) };
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.spawn().with_context(|| {
            format!("cannot start {name} ({}): `scripts/setup bench` installs it", command.get_program().display())
        })?;
        Ok(Self { name, child })
    }

    /// Waits until `ready` says so, or the process ends.
    pub fn wait(&mut self, mut ready: impl FnMut() -> bool) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if ready() {
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended at once: {status}", self.name);
            }
            if Instant::now() > deadline {
                bail!("{} does not answer", self.name);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// CPU time of all threads of the process and of its children so far.
    pub fn cpu(&self) -> Duration {
        let mut total = Duration::ZERO;
        let mut waiting = vec![self.child.id()];
        while let Some(pid) = waiting.pop() {
            // The process's own clock counts in nanoseconds, threads that have ended included.
            let clock = i32::try_from(pid).ok().and_then(|p| clock_getcpuclockid(Pid::from_raw(p)).ok());
            total += clock.and_then(|c| clock_gettime(c).ok()).map_or(Duration::ZERO, Duration::from);
            let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { continue };
            for task in tasks.flatten() {
                let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
                waiting.extend(children.split_whitespace().filter_map(|p| p.parse::<u32>().ok()));
            }
        }
        total
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let Ok(pid) = i32::try_from(self.child.id()) else { return };
        // A master ends its workers on SIGTERM.
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        let deadline = Instant::now() + Duration::from_secs(2);
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Busy time of the whole machine, and busy plus idle time, in ticks; time that the hypervisor took counts as busy.
fn machine() -> (u64, u64) {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let Some(line) = stat.lines().next() else { return (0, 0) };
    // user nice system idle iowait irq softirq steal
    let n: Vec<u64> = line.split_whitespace().skip(1).take(8).filter_map(|n| n.parse().ok()).collect();
    let all: u64 = n.iter().sum();
    let idle = n.get(3).copied().unwrap_or(0) + n.get(4).copied().unwrap_or(0);
    (all - idle, all)
}

/// How busy others kept the machine while we measured.
pub struct Noise {
    busy: u64,
    all: u64,
    own: Duration,
}

/// CPU time of this process and of the children that have ended.
pub fn own() -> Duration {
    use nix::sys::resource::{UsageWho, getrusage};
    let of = |who| {
        let Ok(u) = getrusage(who) else { return Duration::ZERO };
        let d = |t: nix::sys::time::TimeVal| {
            Duration::from_micros(t.tv_sec().unsigned_abs() * 1_000_000 + t.tv_usec().unsigned_abs())
        };
        d(u.user_time()) + d(u.system_time())
    };
    of(UsageWho::RUSAGE_SELF) + of(UsageWho::RUSAGE_CHILDREN)
}

impl Noise {
    /// Starts counting. No measured process may run yet.
    pub fn start() -> Self {
        let (busy, all) = machine();
        Self { busy, all, own: own() }
    }

    /// The share of the machine (0 to 1) that others used since the start. Every measured process must have ended.
    pub fn others(&self) -> f64 {
        let (busy, all) = machine();
        let hertz = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100) as f64;
        let own = (own() - self.own).as_secs_f64() * hertz;
        (((busy - self.busy) as f64 - own) / (all - self.all).max(1) as f64).max(0.0)
    }
}
