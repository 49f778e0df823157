//! Network namespaces for tests: without names, so that tests run in parallel
//! and the kernel removes everything with the last descriptor.
#![allow(dead_code, clippy::unwrap_used)]

use std::fs::File;
use std::future::Future;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Command;

use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace; gone when this is dropped.
pub struct Ns(OwnedFd);

impl Ns {
    pub fn new() -> Self {
        let fd = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("tests need root");
            OwnedFd::from(File::open("/proc/thread-self/ns/net").unwrap())
        });
        let ns = Self(fd.join().unwrap());
        ns.ip("link set lo up");
        ns
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Runs inside, on a thread of its own.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|s| {
            let inside = s.spawn(|| {
                setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
                f()
            });
            inside.join().unwrap_or_else(|e| std::panic::resume_unwind(e))
        })
    }

    /// Runs a future inside, on a runtime of its own.
    pub fn block_on<T: Send, F: Future<Output = T>>(&self, f: impl FnOnce() -> F + Send) -> T {
        self.run(|| tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(f()))
    }

    /// Runs a command inside and gives what it prints.
    pub fn sh(&self, command: &str) -> String {
        let out = self.run(|| Command::new("sh").args(["-c", command]).output().unwrap());
        assert!(out.status.success(), "{command}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    }

    pub fn ip(&self, args: &str) -> String {
        self.sh(&format!("ip {args}"))
    }

    /// A veth pair between two namespaces, both ends up.
    pub fn cable(&self, name: &str, other: &Ns, other_name: &str) {
        // By descriptor path: the namespaces have no names.
        let fd = std::os::fd::AsRawFd::as_raw_fd(&other.0);
        let path = format!("/proc/{}/fd/{fd}", std::process::id());
        self.ip(&format!("link add {name} type veth peer name {other_name} netns {path}"));
        self.ip(&format!("link set dev {name} up"));
        other.ip(&format!("link set dev {other_name} up"));
    }
}

/// Runs a future on this thread while another thread of the same namespace drives its runtime, so that what the
/// future blocks does not stop what it has spawned.
pub fn drive<T>(f: impl Future<Output = T>) -> T {
    let (handle_tx, handle) = std::sync::mpsc::channel();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let driver = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        handle_tx.send(runtime.handle().clone()).unwrap();
        let _ = runtime.block_on(stopped);
    });
    let out = handle.recv().unwrap().block_on(f);
    drop(stop);
    driver.join().unwrap();
    out
}
