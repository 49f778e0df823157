//! Places: commands, closures and background processes in the namespaces of an instance.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::lab::{Lab, wait_for};
use crate::state::MARKER;
use crate::{kube, netns};

/// How long a command in a place may run, and how long it may take to end when it is told so.
const RUN: Duration = Duration::from_secs(60);
const END: Duration = Duration::from_secs(1);
/// The exit status of one that ran too long, as `timeout` has it.
const LATE: i32 = 124;

/// What a command gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Exit status; 128 and more for a signal, 124 when it ran too long.
    pub status: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// A network namespace of the instance.
#[derive(Clone, Debug)]
pub struct Place<'a> {
    pub(crate) lab: &'a Lab,
    pub(crate) name: String,
    pub(crate) netns: String,
    pub(crate) resolv: Option<PathBuf>,
}

/// A command that runs in the background; it ends when it is dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    out: PathBuf,
}

impl Place<'_> {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The network namespace's name under /run/netns.
    pub fn netns(&self) -> &str {
        &self.netns
    }

    /// Runs a command to its end, for at most 60 s.
    ///
    /// # Panics
    /// When it cannot be started: for tests and the demo, whose commands `up` has checked.
    #[expect(clippy::expect_used, reason = "a test that cannot start its client has nothing to go on with")]
    pub fn run<S: AsRef<std::ffi::OsStr>>(&self, command: &[S]) -> Output {
        self.try_run(command).expect("the command starts")
    }

    /// As [`Place::run`].
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn try_run<S: AsRef<std::ffi::OsStr>>(&self, command: &[S]) -> Result<Output> {
        let (program, arguments) = command.split_first().context("the command is empty")?;
        let mut limited = Command::new(program);
        limited.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // With what it starts it ends.
        limited.process_group(0);
        self.environment(&mut limited);
        let child = netns::spawn(&self.netns, self.resolv.as_deref(), &mut limited)?;
        let group = Pid::from_raw(i32::try_from(child.id())?);
        let (ended, end) = mpsc::channel::<()>();
        let watch = thread::spawn(move || {
            let runs = |limit| end.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
            let late = runs(RUN);
            // It may have ended just now: then nobody is told.
            if late && killpg(group, Signal::SIGTERM).is_ok() && runs(END) {
                let _ = killpg(group, Signal::SIGKILL);
            }
            late
        });
        let out = child.wait_with_output()?;
        drop(ended);
        let late = watch.join().unwrap_or_default();
        Ok(Output {
            status: if late { LATE } else { exit_code(out.status) },
            stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
        })
    }

    /// Starts a command in the background.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn<S: AsRef<std::ffi::OsStr>>(&self, command: &[S]) -> Result<Running> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let (program, arguments) = command.split_first().context("the command is empty")?;
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let out = self.lab.layout().folder.join("run").join(format!("{}.{n}.out", std::process::id()));
        let file = File::create(&out)?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::piped()).stdout(file.try_clone()?).stderr(file);
        self.environment(&mut command);
        let mut child = netns::spawn(&self.netns, self.resolv.as_deref(), &mut command)?;
        // The kernel shows a new program's environment a moment after the program has begun, and the mark in it is what
        // the lab finds this process by when it goes down.
        let environment = format!("/proc/{}/environ", child.id());
        wait_for(Duration::from_secs(1), || {
            let ended = child.try_wait().is_ok_and(|status| status.is_some());
            (ended || fs::read(&environment).is_ok_and(|e| !e.is_empty())).then_some(())
        });
        Ok(Running { child, out })
    }

    /// Runs a closure in a thread inside the place's network namespace.
    ///
    /// # Errors
    /// When the namespace is gone.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        netns::within(&self.netns, work)
    }

    /// Turns this process into a command in the place.
    ///
    /// # Errors
    /// Always: it returns only when that fails.
    pub fn exec(&self, command: &[String]) -> Result<std::convert::Infallible> {
        let (program, arguments) = command.split_first().context("what should run there? exec POD -- COMMAND …")?;
        netns::enter_thread(&self.netns).with_context(|| format!("cannot enter {}", self.name))?;
        if let Some(resolv) = &self.resolv {
            netns::own_resolv_conf(resolv).context("cannot mount resolv.conf")?;
        }
        let mut command = Command::new(program);
        command.args(arguments);
        self.environment(&mut command);
        Err(command.exec()).with_context(|| format!("cannot run {program}"))
    }

    /// What every command gets: the mark of the lab, and trust in the internet's authority; beside the API server its
    /// administrator's kubeconfig.
    fn environment(&self, command: &mut Command) {
        let ca = self.lab.internet_ca();
        command.env(MARKER, self.lab.name()).env("CURL_CA_BUNDLE", &ca).env("SSL_CERT_FILE", &ca);
        if let (kube::PLACE, Ok(kubeconfig)) = (self.name.as_str(), self.lab.kubeconfig()) {
            command.env("KUBECONFIG", kubeconfig);
        }
    }
}

impl Running {
    /// What it wrote so far.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.out).unwrap_or_default()).into_owned()
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for its end and gives its exit status; `None` if it still runs then.
    pub fn wait(&mut self, limit: Duration) -> Option<i32> {
        wait_for(limit, || self.child.try_wait().ok().flatten().map(exit_code))
    }

    /// Writes to its standard input.
    ///
    /// # Errors
    /// When it has ended or closed it.
    pub fn send(&mut self, text: &str) -> Result<()> {
        let stdin = self.child.stdin.as_mut().context("it has no standard input")?;
        stdin.write_all(text.as_bytes())?;
        Ok(stdin.flush()?)
    }

    /// Waits until its output holds a text.
    pub fn wait_output(&self, text: &str, limit: Duration) -> bool {
        wait_for(limit, || self.output().contains(text).then_some(())).is_some()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn exit_code(status: std::process::ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}
