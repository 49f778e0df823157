//! A program on a device before the owner of the programs gets to it, who may be at something else.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use aya::programs::ProgramFd;

use crate::attach::{attached_to, tcx_type};
use crate::load::{Datapath, program_error};
use crate::{Error, Program};

/// Attaches one program of a [`Datapath`], on any thread.
#[derive(Debug)]
pub struct Attacher {
    program: Program,
    id: u32,
    file: ProgramFd,
    links: PathBuf,
}

impl Datapath {
    /// What attaches this program beside this value, which adopts its links.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn attacher(&self, program: Program) -> Result<Attacher, Error> {
        let loaded = self.program(program)?;
        let id = loaded.info().map_err(program_error(program))?.id();
        let file = loaded.fd().map_err(program_error(program))?;
        let file = file.try_clone().map_err(Error::io("a program's descriptor"))?;
        Ok(Attacher { program, id, file, links: self.links() })
    }
}

impl Attacher {
    /// Attaches the program to a device of the current network namespace, at the head of the chain. Where it is already,
    /// nothing is done.
    ///
    /// # Errors
    /// What the kernel refused. There is a pin though the program is not there: [`Datapath::attach`] knows what to do.
    pub fn attach(&self, ifindex: u32) -> Result<(), Error> {
        if attached_to(ifindex, self.program.is_egress())?.contains(&self.id) {
            return Ok(());
        }
        let pin = self.program.pin(&self.links, ifindex);
        if pin.exists() {
            return Err(Error::Link { path: pin, message: "it is another device's".into() });
        }
        pin_link(&self.link(ifindex)?, &pin)
    }

    fn link(&self, ifindex: u32) -> Result<OwnedFd, Error> {
        const BPF_LINK_CREATE: libc::c_long = 28;
        /// Before all others, as no other one is named.
        const BPF_F_BEFORE: u32 = 1 << 3;
        /// The part of `union bpf_attr` that the command uses.
        #[repr(C)]
        struct Create {
            program: u32,
            ifindex: u32,
            attach_type: u32,
            flags: u32,
            relative: u32,
            padding: u32,
            revision: u64,
        }
        let create = Create {
            program: self.file.as_fd().as_raw_fd().cast_unsigned(),
            ifindex,
            attach_type: tcx_type(self.program.is_egress()),
            flags: BPF_F_BEFORE,
            relative: 0,
            padding: 0,
            revision: 0,
        };
        // SAFETY: the attribute is as long as told.
        let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_LINK_CREATE, &raw const create, size_of::<Create>()) };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(|| {
            let what = format!("cannot attach {} to device {ifindex}", self.program.name());
            Error::io(what)(io::Error::last_os_error())
        })?;
        // SAFETY: the kernel just gave this descriptor to us.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

fn pin_link(link: &OwnedFd, pin: &Path) -> Result<(), Error> {
    const BPF_OBJ_PIN: libc::c_long = 6;
    /// The part of `union bpf_attr` that the command uses.
    #[repr(C)]
    struct Pin {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let path = CString::new(pin.as_os_str().as_bytes()).map_err(|e| Error::io("a pin's name")(e.into()))?;
    let attr = Pin { path: path.as_ptr() as u64, fd: link.as_raw_fd().cast_unsigned(), flags: 0 };
    // SAFETY: the attribute is as long as told, and the path lives until the call returns.
    let done = unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_PIN, &raw const attr, size_of::<Pin>()) };
    if done < 0 {
        return Err(Error::io(format!("cannot pin {}", pin.display()))(io::Error::last_os_error()));
    }
    Ok(())
}
