//! The node's own addresses.

use std::net::IpAddr;

use ahash::AHashMap;
use tidegate_ebpf_common::Addr;

use crate::load::Datapath;
use crate::{Error, carry};

/// The most addresses of a node that the kernel is told of.
pub const OWN_ADDRESSES: usize = OWN as usize;
pub(crate) const OWN: u32 = 16_384;

impl Datapath {
    /// Says which addresses the node's devices have, the first [`OWN_ADDRESSES`] of these, for the guard where the kernel's routes do not tell. This needs no
    /// state: a node whose address changed while no agent ran could else not ask for one. With `full` the kernel's truth
    /// is read again first; returns how many entries others had changed.
    ///
    /// # Errors
    /// What the kernel refused; the next call goes on from there.
    pub fn addresses(&mut self, addresses: &[IpAddr], full: bool) -> Result<usize, Error> {
        let repaired = if full { self.tables.own.reload()? } else { 0 };
        let want: AHashMap<Addr, u32> =
            addresses.iter().take(OWN_ADDRESSES).map(|ip| (Addr::from_ip(*ip), 1)).collect();
        // First what is gone: the rest may need its place.
        self.tables.own.prune(&want)?;
        self.tables.own.fill(&want)?;
        if let Some(source) = carry::source(&self.others) {
            carry::addresses(&source, &want)?;
        }
        Ok(repaired)
    }
}
