//! Programs on hooks: tcx links at the head of the chain, pinned, adopted by atomic update.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use nix::net::if_::if_nametoindex;

use crate::fixed::FIXED;
use crate::load::{Datapath, load_object, lock, program_error};
use crate::{Error, Program, carry};

/// How an attachment came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attached {
    /// A new link at the head of the chain.
    New,
    /// The link of an earlier process, with its program exchanged atomically.
    Adopted,
}

/// Where a program stands on its hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// It runs first.
    First,
    /// These run before it.
    Behind(Vec<String>),
    /// It is not attached.
    Missing,
}

fn attach_type(program: Program) -> TcAttachType {
    if program.is_egress() { TcAttachType::Egress } else { TcAttachType::Ingress }
}

/// The kernel's number of a device's hook.
pub(crate) fn tcx_type(egress: bool) -> u32 {
    /// `BPF_TCX_INGRESS`; egress is the next one.
    const TCX_INGRESS: u32 = 46;
    TCX_INGRESS + u32::from(egress)
}

fn index(interface: &str) -> Result<u32, Error> {
    if_nametoindex(interface).map_err(|_| Error::NoDevice(interface.to_owned()))
}

fn classifier(ebpf: &mut Ebpf, program: Program) -> Result<&mut SchedClassifier, Error> {
    ebpf.program_mut(program.name()).ok_or(Error::NotLoaded(program.name()))?.try_into().map_err(program_error(program))
}

pub(crate) fn link_error(path: &Path) -> impl Fn(LinkError) -> Error {
    let path = path.to_owned();
    move |e| Error::Link { path: path.clone(), message: format!("{e:?}") }
}

/// The ids of the programs on a device's hook, in their order. CAP_NET_ADMIN is enough for it, where aya's query opens each
/// program, which takes CAP_SYS_ADMIN.
pub(crate) fn attached_to(ifindex: u32, egress: bool) -> Result<Vec<u32>, Error> {
    const BPF_PROG_QUERY: libc::c_long = 16;
    /// The kernel's own bound for a hook (`BPF_MPROG_MAX`).
    const MOST: usize = 64;
    /// The part of `union bpf_attr` that the command uses.
    #[repr(C)]
    #[derive(Default)]
    struct Query {
        ifindex: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        ids: u64,
        count: u32,
        padding: u32,
        program_flags: u64,
        links: u64,
        link_flags: u64,
        revision: u64,
    }
    let mut ids = [0u32; MOST];
    let mut query = Query {
        ifindex,
        attach_type: tcx_type(egress),
        ids: ids.as_mut_ptr() as u64,
        count: MOST as u32,
        ..Query::default()
    };
    // SAFETY: the attribute is as long as told; the kernel writes at most `count` ids, which live until the call returns.
    let done = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_QUERY, &raw mut query, size_of::<Query>()) };
    if done < 0 {
        return Err(Error::io(format!("cannot ask for the programs of device {ifindex}"))(io::Error::last_os_error()));
    }
    Ok(ids.into_iter().take(query.count as usize).collect())
}

/// A link at the head of the chain, not pinned yet.
fn attach_first(ebpf: &mut Ebpf, program: Program, interface: &str, pin: &Path) -> Result<FdLink, Error> {
    let loaded = classifier(ebpf, program)?;
    let order = TcAttachOptions::TcxOrder(LinkOrder::first());
    let id = loaded.attach_with_options(interface, attach_type(program), order).map_err(program_error(program))?;
    let link = loaded.take_link(id).map_err(program_error(program))?;
    FdLink::try_from(link).map_err(link_error(pin))
}

/// The pinned link, if there is a pin.
fn pinned(path: &Path) -> Result<Option<FdLink>, Error> {
    if !path.exists() {
        return Ok(None);
    }
    PinnedLink::from_pin(path).map(|l| Some(FdLink::from(l))).map_err(link_error(path))
}

impl Program {
    /// Where its link to a device is pinned.
    pub(crate) fn pin(self, links: &Path, ifindex: u32) -> PathBuf {
        // A dot is not allowed in names of a bpffs.
        links.join(format!("{}-{ifindex}", self.name()))
    }
}

impl Datapath {
    pub(crate) fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    fn pin_of(&self, program: Program, ifindex: u32) -> PathBuf {
        program.pin(&self.links(), ifindex)
    }

    /// Attaches a program to a device of the current network namespace, at the head of the chain; an earlier
    /// process's link is adopted in place. Calling it again is harmless.
    ///
    /// # Errors
    /// [`Error::NoDevice`] if there is no such device; otherwise what the kernel refused.
    pub fn attach(&mut self, program: Program, interface: &str) -> Result<Attached, Error> {
        let pin = self.pin_of(program, index(interface)?);
        if let Some(link) = pinned(&pin)? {
            let link = SchedClassifierLink::try_from(link).map_err(link_error(&pin))?;
            let loaded = classifier(&mut self.ebpf, program)?;
            match loaded.attach_to_link(link) {
                Ok(id) => {
                    // Dropping it closes our descriptor only: the pin holds the link.
                    drop(FdLink::try_from(loaded.take_link(id).map_err(program_error(program))?));
                    return Ok(Attached::Adopted);
                }
                // Its device is gone, and another one has its index now.
                Err(ProgramError::SyscallError(e)) if e.io_error.raw_os_error() == Some(libc::ENOLINK) => {
                    remove(&pin)?;
                }
                Err(e) => return Err(program_error(program)(e)),
            }
        }
        // Others may have removed the folder with its pins.
        let folder = self.links();
        fs::create_dir_all(&folder).map_err(Error::io(format!("cannot make {}", folder.display())))?;
        let link = attach_first(&mut self.ebpf, program, interface, &pin)?;
        link.pin(&pin).map_err(|e| Error::Link { path: pin.clone(), message: e.to_string() })?;
        Ok(Attached::New)
    }

    /// Where the program stands on the device.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn place(&self, program: Program, interface: &str) -> Result<Place, Error> {
        let pin = self.pin_of(program, index(interface)?);
        let Some(link) = pinned(&pin)? else {
            return Ok(Place::Missing);
        };
        let own = link.info().map_err(link_error(&pin))?.program_id();
        let programs = attached_to(index(interface)?, program.is_egress())?;
        let Some(at) = programs.iter().position(|id| *id == own) else {
            return Ok(Place::Missing);
        };
        if at == 0 {
            return Ok(Place::First);
        }
        // Only CAP_SYS_ADMIN sees what others' programs are called, and gateways do not have it.
        let named = SchedClassifier::query_tcx(interface, attach_type(program)).map(|(_, p)| p).unwrap_or_default();
        let name = |id: &u32| {
            let found = named.iter().find(|p| p.id() == *id).and_then(|p| p.name_as_str()).map(str::to_owned);
            found.unwrap_or_else(|| format!("program {id}"))
        };
        Ok(Place::Behind(programs[..at].iter().map(name).collect()))
    }

    /// Takes the first place back: a second copy is attached first, then the old link goes, so that no
    /// packet passes in between.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn reclaim(&mut self, program: Program, interface: &str) -> Result<(), Error> {
        let pin = self.pin_of(program, index(interface)?);
        let Some(old) = pinned(&pin)? else {
            return self.attach(program, interface).map(drop);
        };
        let attached = old.info().map_err(link_error(&pin))?.program_id();
        let own = self.program(program)?.info().map_err(program_error(program))?.id();
        // The kernel refuses the same program twice on one hook.
        let link = if attached == own {
            if self.spare.is_none() {
                self.spare = Some(load_object(&self.options, &self.root)?);
            }
            let Some(spare) = &mut self.spare else {
                return Err(Error::NotLoaded(program.name()));
            };
            attach_first(spare, program, interface, &pin)?
        } else {
            attach_first(&mut self.ebpf, program, interface, &pin)?
        };
        let new = pin.with_extension("").with_file_name(format!("{}-new", file_name(&pin)));
        remove(&new)?;
        link.pin(&new).map_err(|e| Error::Link { path: new.clone(), message: e.to_string() })?;
        drop(old);
        link_detach(&pin)?;
        fs::rename(&new, &pin).map_err(Error::io(format!("cannot move {}", new.display())))
    }

    /// Detaches a program from a device.
    ///
    /// # Errors
    /// [`Error::NoDevice`], or the pin cannot be removed.
    pub fn detach(&mut self, program: Program, interface: &str) -> Result<(), Error> {
        let pin = self.pin_of(program, index(interface)?);
        if pin.exists() {
            link_detach(&pin)?;
        }
        remove(&pin)
    }

    /// Removes the links of devices that are not in the current network namespace any more; returns how many.
    ///
    /// # Errors
    /// A pin cannot be read or removed.
    pub fn detach_gone(&mut self) -> Result<usize, Error> {
        let mut n = 0;
        for path in entries(&self.root.join("links"))? {
            let ifindex = file_name(&path).rsplit('-').next().and_then(|i| i.parse::<u32>().ok());
            // nix gives an empty name, not an error, where there is no device.
            let there = ifindex.is_some_and(|i| nix::net::if_::if_indextoname(i).is_ok_and(|name| !name.is_empty()));
            if !there {
                remove(&path)?;
                n += 1;
            }
        }
        Ok(n)
    }

    /// Whether programs of another layout were here before this one's, an earlier or a later version's. They go on
    /// until a state is applied, this version's are attached and [`Datapath::retire_others`] is called.
    pub fn is_upgrade(&self) -> bool {
        !self.others.is_empty()
    }

    /// Takes over the flows that the programs of another layout remembered since this one was loaded. To be called when
    /// [`Program::PodIngress`] is attached, which remembers them from then on, and before what judges by them is.
    ///
    /// # Errors
    /// A map cannot be read or written.
    pub fn carry_flows(&mut self) -> Result<usize, Error> {
        carry::source(&self.others).map_or(Ok(0), |source| carry::flows(&source, &self.root))
    }

    /// Detaches the programs of other layouts from one device, where this version's are attached. Returns how many.
    ///
    /// # Errors
    /// A pin cannot be removed.
    pub fn retire_from(&mut self, ifindex: u32) -> Result<usize, Error> {
        let ifindex = ifindex.to_string();
        self.detach_others(|pin| pin.rsplit('-').next() == Some(ifindex.as_str()))
    }

    fn detach_others(&self, which: impl Fn(&str) -> bool) -> Result<usize, Error> {
        let mut n = 0;
        for links in self.others.iter().map(|o| o.join("links")).filter(|l| l.exists()) {
            for path in entries(&links)?.iter().filter(|p| which(file_name(p))) {
                link_detach(path)?;
                remove(path)?;
                n += 1;
            }
        }
        Ok(n)
    }

    /// Detaches the programs of other layouts below the same folder and removes their pins, once a state was applied
    /// and this version's programs are attached. What they counted is added to this one's counters. Returns how many pins
    /// went.
    ///
    /// # Errors
    /// A pin cannot be removed.
    pub fn retire_others(&mut self) -> Result<usize, Error> {
        let source = carry::source(&self.others);
        let mut n = self.detach_others(|_| true)?;
        if let Some(source) = source
            && let Err(error) = self.carry_counts(&source)
        {
            tracing::warn!(%error, "what another layout counted meanwhile is lost");
        }
        while let Some(path) = self.others.last() {
            n += remove_all(path)?;
            self.others.pop();
        }
        Ok(n)
    }

    fn carry_counts(&mut self, source: &Path) -> Result<(), Error> {
        carry::counts(source, &self.root)?;
        carry::suppress(&self.root, carry::unread(source)?)?;
        self.before = carry::before(&self.root)?;
        Ok(())
    }

    /// Detaches everything and removes all pins: nothing of Tidegate stays in the kernel.
    ///
    /// # Errors
    /// A pin cannot be removed.
    pub fn cleanup(self) -> Result<(), Error> {
        let pins = self.options.pins.clone();
        drop(self);
        remove_pins(&pins)
    }
}

/// Detaches the programs of every layout below a folder of pins and removes all pins. That there is no such folder is no
/// error.
///
/// # Errors
/// [`Error::Busy`] while a process works with them; a pin cannot be removed.
pub fn remove_pins(pins: &Path) -> Result<(), Error> {
    if !pins.exists() {
        return Ok(());
    }
    let _lock = lock(pins)?;
    for path in carry::others(pins, Path::new("")) {
        remove_all(&path)?;
    }
    let fixed = pins.join(FIXED);
    if fixed.exists() {
        remove_all(&fixed)?;
    }
    // Fails if somebody else keeps something there, and then it shall.
    let _ = fs::remove_dir(pins);
    Ok(())
}

pub(crate) fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|n| n.to_str()).unwrap_or_default()
}

pub(crate) fn entries(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let read = fs::read_dir(folder).map_err(Error::io(format!("cannot read {}", folder.display())))?;
    Ok(read.flatten().map(|e| e.path()).collect())
}

pub(crate) fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io(format!("cannot remove {}", path.display()))(e)),
        _ => Ok(()),
    }
}

/// Removes a folder of pins; links before maps, as they lie in folders of these names.
pub(crate) fn remove_all(folder: &Path) -> Result<usize, Error> {
    let mut n = 0;
    let mut inside = entries(folder)?;
    inside.sort();
    for path in inside {
        if path.is_dir() {
            n += remove_all(&path)?;
        } else {
            if folder.ends_with("links") {
                link_detach(&path)?;
            }
            remove(&path)?;
            n += 1;
        }
    }
    fs::remove_dir(folder).map_err(Error::io(format!("cannot remove {}", folder.display())))?;
    Ok(n)
}

/// Detaches a pinned link at once. Removing its pin alone leaves the program on its hook for a
/// grace period, during which it would see packets twice and could not be attached again.
pub(crate) fn link_detach(pin: &Path) -> Result<(), Error> {
    const BPF_OBJ_GET: libc::c_long = 7;
    const BPF_LINK_DETACH: libc::c_long = 34;
    /// The part of `union bpf_attr` that both commands use.
    #[repr(C)]
    struct ObjGet {
        path: u64,
        fd: u32,
        flags: u32,
    }
    #[repr(C)]
    struct LinkDetach {
        fd: u32,
    }
    let failed =
        |what: &str| Error::io(format!("cannot {what} the link {}", pin.display()))(io::Error::last_os_error());
    let path = CString::new(pin.as_os_str().as_bytes()).map_err(|e| Error::io("a pin's name")(e.into()))?;
    let get = ObjGet { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: the attribute is as long as told, and the path lives until the call returns.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const get, size_of::<ObjGet>()) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(|| failed("open"))?;
    // SAFETY: the kernel just gave this descriptor to us.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let detach = LinkDetach { fd: fd.as_raw_fd().cast_unsigned() };
    // SAFETY: as above.
    let done = unsafe { libc::syscall(libc::SYS_bpf, BPF_LINK_DETACH, &raw const detach, size_of::<LinkDetach>()) };
    if done < 0 { Err(failed("detach")) } else { Ok(()) }
}
