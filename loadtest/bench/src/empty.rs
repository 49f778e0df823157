//! The smallest kernel program, loaded by system call: what running any program costs.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_TEST_RUN: libc::c_long = 10;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;

/// The head of `union bpf_attr` for BPF_PROG_LOAD (linux/bpf.h).
#[repr(C)]
#[derive(Default)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    rest: [u64; 16],
}

/// `union bpf_attr` for BPF_PROG_TEST_RUN.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    rest: [u64; 8],
}

fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a C struct at least as long as what the command reads, zeroed beyond; the pointers in it
    // are of buffers that outlive the call.
    let n = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attr, size_of::<T>()) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n) }
}

/// `r0 = -1; exit`, a classifier that says "next".
pub struct Empty(OwnedFd);

impl Empty {
    /// Loads it.
    pub fn load() -> io::Result<Self> {
        // struct bpf_insn: code, registers, offset, immediate.
        let code: [[u8; 8]; 2] = [[0xb7, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], [0x95, 0, 0, 0, 0, 0, 0, 0]];
        let license = c"Apache-2.0";
        let mut attr = Load {
            kind: BPF_PROG_TYPE_SCHED_CLS,
            count: code.len() as u32,
            instructions: code.as_ptr() as u64,
            license: license.as_ptr() as u64,
            ..Load::default()
        };
        let fd = bpf(BPF_PROG_LOAD, &mut attr)?;
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        // SAFETY: the kernel just returned this descriptor, and nobody else has it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Nanoseconds for one of `repeat` runs on a frame.
    pub fn run(&self, frame: &[u8], repeat: u32) -> io::Result<f64> {
        let mut attr = TestRun {
            fd: self.0.as_raw_fd().unsigned_abs(),
            data_size_in: frame.len() as u32,
            data_in: frame.as_ptr() as u64,
            repeat,
            ..TestRun::default()
        };
        bpf(BPF_PROG_TEST_RUN, &mut attr)?;
        Ok(f64::from(attr.duration))
    }
}
