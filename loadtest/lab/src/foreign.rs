//! A program of somebody else on the pods' interfaces: attached first by tcx, it lets every packet through and so
//! hides those behind it.
//!
//! There is no compiler for kernel programs here: the object is two instructions in the smallest ELF file that holds
//! them.

use std::path::Path;

use anyhow::{Context, Result};
use aya::Ebpf;
use aya::programs::links::FdLink;
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType};

use crate::netns;

/// The program's name.
const NAME: &str = "foreign";
/// `r0 = 0` (TCX_PASS: nobody behind is asked), `exit`.
const CODE: [u8; 16] = [0xb7, 0, 0, 0, 0, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0];
/// Octets of an ELF64 header, and of a section header.
const HEADER: u64 = 64;

/// Attaches the program first where devices of a namespace receive, and pins its links in a folder of a bpffs.
///
/// # Errors
/// When the kernel refuses.
pub fn attach(netns: &str, devices: &[String], pins: &Path) -> Result<()> {
    std::fs::create_dir_all(pins).with_context(|| format!("cannot make {}", pins.display()))?;
    netns::within(netns, || {
        let mut object = Ebpf::load(&object()).context("the foreign program does not load")?;
        let program: &mut SchedClassifier = object.program_mut(NAME).context("no foreign program")?.try_into()?;
        program.load().context("the foreign program does not load")?;
        for device in devices {
            let first = TcAttachOptions::TcxOrder(LinkOrder::first());
            let id = program
                .attach_with_options(device, TcAttachType::Ingress, first)
                .with_context(|| format!("cannot attach the foreign program to {device}"))?;
            let link: SchedClassifierLink = program.take_link(id)?;
            FdLink::try_from(link)?.pin(pins.join(device)).context("cannot pin the foreign program's link")?;
        }
        Ok(())
    })?
}

/// The programs on a device of a namespace, by name: of what it receives first to last, then of what it sends.
///
/// # Errors
/// When there is no such device.
pub fn programs(netns: &str, device: &str) -> Result<Vec<String>> {
    netns::within(netns, || {
        let query = |kind| -> Result<Vec<String>> {
            let (_, programs) = SchedClassifier::query_tcx(device, kind).with_context(|| device.to_owned())?;
            Ok(programs.into_iter().map(|p| p.name_as_str().unwrap_or_default().to_owned()).collect())
        };
        Ok([query(TcAttachType::Ingress)?, query(TcAttachType::Egress)?].concat())
    })?
}

/// The ELF file: the program, its licence, names and one symbol.
fn object() -> Vec<u8> {
    /// Name, type, flags, link (a section's number), info, entry size, content.
    type Section<'a> = (u32, u32, u64, u32, u32, u64, &'a [u8]);
    let names = b"\0classifier\0license\0.strtab\0.symtab\0foreign\0";
    let at = |name: &str| names.windows(name.len()).position(|w| w == name.as_bytes()).unwrap_or_default() as u32;
    let mut symbols = vec![0; 24];
    symbols.extend(at(NAME).to_le_bytes());
    // A global function of section 1, as long as the code.
    symbols.extend([0x12, 0, 1, 0]);
    symbols.extend(0u64.to_le_bytes());
    symbols.extend((CODE.len() as u64).to_le_bytes());
    let sections: [Section<'_>; 5] = [
        (0, 0, 0, 0, 0, 0, &[]),
        (at("classifier"), 1, 6, 0, 0, 0, &CODE),
        (at("license"), 1, 2, 0, 0, 0, b"GPL\0"),
        (at(".strtab"), 3, 0, 0, 0, 0, names),
        (at(".symtab"), 2, 0, 3, 1, 24, &symbols),
    ];
    let mut body = Vec::new();
    let mut table = Vec::new();
    for (name, kind, flags, link, info, entry, content) in sections {
        body.resize(body.len().next_multiple_of(8), 0);
        table.extend(name.to_le_bytes());
        table.extend(kind.to_le_bytes());
        for word in [flags, 0, HEADER + body.len() as u64, content.len() as u64] {
            table.extend(word.to_le_bytes());
        }
        table.extend(link.to_le_bytes());
        table.extend(info.to_le_bytes());
        table.extend(8u64.to_le_bytes());
        table.extend(entry.to_le_bytes());
        body.extend(content);
    }
    body.resize(body.len().next_multiple_of(8), 0);
    // 64 bits, little endian, version 1; relocatable, for BPF.
    let mut out = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    out.extend([1, 0, 247, 0, 1, 0, 0, 0]);
    for word in [0, 0, HEADER + body.len() as u64] {
        out.extend(word.to_le_bytes());
    }
    out.extend([0, 0, 0, 0, 64, 0, 0, 0, 0, 0, 64, 0, 5, 0, 3, 0]);
    out.extend(body);
    out.extend(table);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_object_holds_one_program() {
        let object = Ebpf::load(&object()).unwrap();
        let names: Vec<&str> = object.programs().map(|(name, _)| name).collect();
        assert_eq!(names, [NAME]);
    }
}
