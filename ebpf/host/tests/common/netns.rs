//! Network namespaces without names: gone when the last descriptor is closed.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::Command;

use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace.
pub struct Ns(File);

fn current() -> File {
    File::open("/proc/thread-self/ns/net").unwrap()
}

impl Ns {
    /// A new namespace with its loopback device up.
    pub fn new() -> Self {
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            current()
        });
        let ns = Self(made.join().unwrap());
        ns.ip("link set lo up");
        ns
    }

    /// Runs `f` inside, in this thread.
    pub fn enter<R>(&self, f: impl FnOnce() -> R) -> R {
        struct Back(File);
        impl Drop for Back {
            fn drop(&mut self) {
                setns(&self.0, CloneFlags::CLONE_NEWNET).unwrap();
            }
        }
        let _back = Back(current());
        setns(&self.0, CloneFlags::CLONE_NEWNET).unwrap();
        f()
    }

    /// A path that `ip` takes for this namespace.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Runs `ip` inside.
    #[track_caller]
    pub fn ip(&self, arguments: &str) {
        let done = self.enter(|| Command::new("ip").args(arguments.split_whitespace()).output().unwrap());
        assert!(done.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&done.stderr));
    }

    /// Writes a value below /proc/sys.
    pub fn sysctl(&self, name: &str, value: &str) {
        self.enter(|| std::fs::write(format!("/proc/sys/{name}"), value).unwrap());
    }

    /// Waits until the device takes IPv6 addresses: until it has a carrier they stay tentative.
    #[track_caller]
    pub fn ready(&self, device: &str) {
        let arguments = ["-6", "-br", "addr", "show", "dev", device, "scope", "link", "-tentative"];
        for _ in 0..500 {
            let shown = self.enter(|| Command::new("ip").args(arguments).output().unwrap());
            if String::from_utf8_lossy(&shown.stdout).contains("fe80:") {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("{device} is not ready");
    }

    /// Index and MAC address of a device.
    pub fn device(&self, name: &str) -> (u32, [u8; 6]) {
        self.enter(|| {
            let index = nix::net::if_::if_nametoindex(name).unwrap();
            let shown = Command::new("ip").args(["-br", "link", "show", name]).output().unwrap();
            let text = String::from_utf8(shown.stdout).unwrap();
            let mut mac = [0; 6];
            let field = text.split_whitespace().nth(2).unwrap();
            for (to, from) in mac.iter_mut().zip(field.split(':')) {
                *to = u8::from_str_radix(from, 16).unwrap();
            }
            (index, mac)
        })
    }
}

/// Joins two namespaces by a veth pair; both ends are up.
pub fn join(a: &Ns, a_name: &str, b: &Ns, b_name: &str) {
    a.ip(&format!("link add name {a_name} type veth peer name {b_name} netns {}", b.path()));
    a.ip(&format!("link set {a_name} up"));
    b.ip(&format!("link set {b_name} up"));
}
