//! Servers that end with whoever started them.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{OnceLock, mpsc};

use anyhow::{Context, Result};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

/// The last lines of a log that an error shows.
const TAIL: usize = 20;

/// A running server with its log; killed when dropped, and by the kernel when this process dies.
#[derive(Debug)]
pub(crate) struct Server {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

impl Server {
    /// Starts a command. What it says is appended to `log`.
    pub(crate) fn start(name: &'static str, mut command: Command, log: PathBuf) -> Result<Self> {
        let out = File::options().create(true).append(true).open(&log).context("cannot write the log")?;
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        let set_up = || Ok(set_pdeathsig(Signal::SIGKILL)?);
        // SAFETY: between fork and exec only one system call runs, on a value that was there before.
        unsafe { command.pre_exec(set_up) };
        let child = spawn(command).with_context(|| format!("cannot start {name}"))?;
        Ok(Self { name, child, log })
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its name and the end of its log, for an error.
    pub(crate) fn tail(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        let last = &lines[lines.len().saturating_sub(TAIL)..];
        format!("the end of {}'s log:\n  {}", self.name, last.join("\n  "))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts a command from a thread that lives as long as the process: the kernel sends the death signal when the
/// *thread* that forked ends, and threads of tests end early.
fn spawn(command: Command) -> Result<Child> {
    type Job = (Command, mpsc::Sender<std::io::Result<Child>>);
    static JOBS: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    let jobs = JOBS.get_or_init(|| {
        let (sender, jobs) = mpsc::channel::<Job>();
        std::thread::spawn(move || {
            for (mut command, answer) in jobs {
                // The asker waits for the answer.
                let _ = answer.send(command.spawn());
            }
        });
        sender
    });
    let (answer, answers) = mpsc::channel();
    jobs.send((command, answer)).ok().context("the thread that starts servers is gone")?;
    Ok(answers.recv().context("the thread that starts servers is gone")??)
}
