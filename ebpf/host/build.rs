//! Builds the kernel programs and leaves the object in `OUT_DIR`.
//!
//! Compilers are tried in this order: a ready object in `$BPF_OBJECT` (with `pod_static` beside it), `$BPF_RUSTC`, rustup's
//! nightly with rust-src, and the system's rustc with a prebuilt core for BPF.

use std::error::Error;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// What the compiler makes, and what it is called here.
const OBJECTS: [(&str, &str); 2] = [("tidegate-ebpf-programs", "programs.o"), ("pod_static", "static.o")];
const TARGET: &str = "bpfel-unknown-none";

fn main() {
    for variable in ["BPF_OBJECT", "BPF_RUSTC", "BPF_LLVM"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    if let Err(error) = run() {
        println!("cargo::error={error}");
        std::process::exit(1);
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let copy = |from: &Path, to: &str| {
        fs::copy(from, out.join(to)).map_err(|e| format!("cannot copy {}: {e}", from.display()))
    };
    if let Some(object) = env::var_os("BPF_OBJECT").map(PathBuf::from) {
        for (from, to) in [(object.clone(), OBJECTS[0].1), (object.with_file_name(OBJECTS[1].0), OBJECTS[1].1)] {
            println!("cargo::rerun-if-changed={}", from.display());
            copy(&from, to)?;
        }
        return Ok(());
    }
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or("CARGO_MANIFEST_DIR is not set")?);
    let root = here.parent().and_then(Path::parent).ok_or("the package has no workspace around it")?;
    for watched in ["ebpf/programs/src", "ebpf/programs/Cargo.toml", "ebpf/common/src", "ebpf/common/Cargo.toml"] {
        println!("cargo::rerun-if-changed={}", root.join(watched).display());
    }
    let compiler = Compiler::find()?;
    let folder = compiler.build(root)?;
    for (from, to) in OBJECTS {
        copy(&folder.join(from), to)?;
    }
    Ok(())
}

struct Compiler {
    rustc: PathBuf,
    sysroot: PathBuf,
    llvm: u32,
    build_core: bool,
}

impl Compiler {
    fn find() -> Result<Self, Box<dyn Error>> {
        if let Some(rustc) = env::var_os("BPF_RUSTC") {
            return Self::new(PathBuf::from(rustc));
        }
        if let Some(nightly) = nightly()
            && let Ok(found) = Self::new(nightly)
            && (!found.build_core || found.sysroot.join("lib/rustlib/src/rust/library").is_dir())
        {
            return Ok(found);
        }
        if let Ok(found) = Self::new(PathBuf::from("/usr/bin/rustc"))
            && !found.build_core
        {
            return Ok(found);
        }
        Err("no compiler for the kernel programs was found: install a rustup nightly with rust-src, or Debian's \
             rustc-web with libstd-rust-web-dev-bpf, or set BPF_RUSTC, or give a built object in BPF_OBJECT"
            .into())
    }

    fn new(rustc: PathBuf) -> Result<Self, Box<dyn Error>> {
        let sysroot = PathBuf::from(output(Command::new(&rustc).args(["--print", "sysroot"]))?.trim());
        let version = output(Command::new(&rustc).arg("-vV"))?;
        let llvm = version
            .lines()
            .find_map(|l| l.strip_prefix("LLVM version: "))
            .and_then(|v| v.split('.').next()?.parse().ok())
            .ok_or_else(|| format!("{} does not tell its LLVM version", rustc.display()))?;
        let build_core = !sysroot.join("lib/rustlib").join(TARGET).join("lib").is_dir();
        Ok(Self { rustc, sysroot, llvm, build_core })
    }

    /// A folder that holds this compiler's LLVM and no other: the linker takes the first that it finds.
    fn llvm_folder(&self, target: &Path) -> Result<PathBuf, Box<dyn Error>> {
        if let Some(folder) = env::var_os("BPF_LLVM") {
            return Ok(folder.into());
        }
        let is_llvm = |name: &str| name.starts_with("libLLVM") && name.contains(".so");
        let own = self.sysroot.join("lib");
        if self.sysroot != Path::new("/usr") && libraries(&own).any(|n| is_llvm(&n)) {
            return Ok(own);
        }
        let versioned = PathBuf::from(format!("/usr/lib/llvm-{}/lib", self.llvm));
        if libraries(&versioned).any(|n| is_llvm(&n)) {
            return Ok(versioned);
        }
        // A library folder with several LLVMs: a folder with a link to the right one.
        let wanted = [format!("libLLVM.so.{}.", self.llvm), format!("libLLVM-{}.so", self.llvm)];
        for folder in ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib"] {
            let folder = Path::new(folder);
            if let Some(name) = libraries(folder).find(|n| wanted.iter().any(|w| n.starts_with(w.as_str()))) {
                let only = target.join(format!("llvm-{}", self.llvm));
                fs::create_dir_all(&only)?;
                let link = only.join(&name);
                if !link.exists() {
                    // A concurrent build may have made it.
                    let _ = std::os::unix::fs::symlink(folder.join(&name), &link);
                }
                return Ok(only);
            }
        }
        Err(format!("no LLVM {} library was found for bpf-linker: set BPF_LLVM to its folder", self.llvm).into())
    }

    fn build(&self, root: &Path) -> Result<PathBuf, Box<dyn Error>> {
        let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
        let target = if target.is_absolute() { target } else { root.join(target) }.join("bpf");
        let home = env::var_os("CARGO_HOME")
            .map(PathBuf::from)
            .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")))
            .ok_or("neither CARGO_HOME nor HOME is set")?;
        let mut path = OsString::from(home.join("bin"));
        if let Some(rest) = env::var_os("PATH") {
            path.push(":");
            path.push(rest);
        }
        if !env::split_paths(&path).any(|p| p.join("bpf-linker").is_file()) {
            return Err("bpf-linker was not found: cargo install bpf-linker@0.10.3".into());
        }
        let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        for (name, _) in env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            let keep = name == "CARGO_HOME"
                || name.starts_with("CARGO_NET")
                || name.starts_with("CARGO_HTTP")
                || name == "RUSTUP_HOME";
            if !keep && (name.starts_with("CARGO") || name.starts_with("RUST") || name == "LD_LIBRARY_PATH") {
                command.env_remove(&name);
            }
        }
        let flags = [
            "-Cdebuginfo=2".to_owned(),
            "-Clink-arg=--btf".to_owned(),
            // Without it, zeroing 40 octets becomes a loop over octets.
            "-Clink-arg=--disable-expand-memcpy-in-order".to_owned(),
            "-Ctarget-cpu=v3".to_owned(),
            format!("--remap-path-prefix={}=/src", root.display()),
            format!("--remap-path-prefix={}=/cargo", home.display()),
        ];
        command
            .current_dir(root)
            .env("RUSTC", &self.rustc)
            // The programs need inline assembly for BPF, which stable compilers gate.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("PATH", &path)
            .env("LD_LIBRARY_PATH", self.llvm_folder(&target)?)
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
            .args(["build", "--release", "--package", "tidegate-ebpf-programs", "--target", TARGET, "--target-dir"])
            .arg(&target);
        if self.build_core {
            command.args(["-Z", "build-std=core"]);
        }
        let result = command.output().map_err(|e| format!("cannot start cargo for the kernel programs: {e}"))?;
        if !result.status.success() {
            let log = String::from_utf8_lossy(&result.stderr);
            for line in log.lines() {
                println!("cargo::warning={line}");
            }
            return Err(format!("the kernel programs do not build with {}", self.rustc.display()).into());
        }
        Ok(target.join(TARGET).join("release"))
    }
}

/// The compiler of rustup's nightly, if rustup and it are there.
fn nightly() -> Option<PathBuf> {
    let path = output(Command::new("rustup").args(["which", "rustc", "--toolchain", "nightly"])).ok()?;
    Some(PathBuf::from(path.trim()))
}

fn libraries(folder: &Path) -> impl Iterator<Item = String> {
    fs::read_dir(folder).into_iter().flatten().flatten().filter_map(|e| e.file_name().into_string().ok())
}

fn output(command: &mut Command) -> Result<String, Box<dyn Error>> {
    for variable in ["RUSTC", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "RUSTUP_TOOLCHAIN", "LD_LIBRARY_PATH"] {
        command.env_remove(variable);
    }
    let done = command.output()?;
    if !done.status.success() {
        return Err(format!("{:?} failed", command.get_program()).into());
    }
    Ok(String::from_utf8(done.stdout)?)
}
