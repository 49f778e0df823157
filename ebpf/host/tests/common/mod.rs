//! A datapath with pins of its own, removed when the test ends.
#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

pub mod forge;
pub mod netns;
pub mod packets;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use tidegate_ebpf::{Capacities, Datapath, Options, Role, preflight};

/// A loaded datapath.
pub struct Fixture {
    pub options: Options,
    datapath: Option<Datapath>,
}

/// A folder on the bpffs that no other test uses.
pub fn pins() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    PathBuf::from(format!("/sys/fs/bpf/tidegate-test-{}-{n}", std::process::id()))
}

impl Fixture {
    pub fn new(role: Role) -> Self {
        preflight().expect("the machine can run kernel programs");
        let mut options = Options::new(role, pins());
        options.capacities =
            Capacities { endpoints: 64, facts: 256, grants: 64, portsets: 64, prefixes: 64, flows: 256 };
        options.flows_per_endpoint = 8;
        let mut fixture = Self { options, datapath: None };
        fixture.reload().expect("it loads");
        fixture
    }

    pub fn path(&self) -> &Datapath {
        self.datapath.as_ref().expect("it is loaded")
    }

    pub fn path_mut(&mut self) -> &mut Datapath {
        self.datapath.as_mut().expect("it is loaded")
    }

    /// Where a map is pinned.
    pub fn pin(&self, map: &str) -> PathBuf {
        let mut layouts = std::fs::read_dir(&self.options.pins).unwrap();
        layouts.next().unwrap().unwrap().path().join("maps").join(map)
    }

    /// Ends the process, as it were, and tries to start another one.
    pub fn reload(&mut self) -> Result<(), tidegate_ebpf::Error> {
        self.stop();
        self.datapath = Some(Datapath::load(&self.options)?);
        Ok(())
    }

    /// Ends the process, as it were.
    pub fn stop(&mut self) {
        self.datapath = None;
    }

    /// As when the process ends and another one starts.
    pub fn restart(&mut self) {
        self.reload().expect("it loads again");
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        match self.datapath.take() {
            Some(datapath) => datapath.cleanup().expect("pins are removed"),
            // It did not load, or was stopped; only maps can be pinned.
            None => drop(std::fs::remove_dir_all(&self.options.pins)),
        }
    }
}
