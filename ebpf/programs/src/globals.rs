//! What the loader tells both objects: it rewrites these in the object.

use tidegate_ebpf_common::layout::{OVERLAYS, SkbOffsets};

/// UDP port of the tunnel.
#[unsafe(no_mangle)]
static TUNNEL_PORT: u16 = 8475;
/// UDP ports at which nodes unpack the network plugin's overlay; 0 is none.
#[unsafe(no_mangle)]
static OVERLAY: [u16; OVERLAYS] = [0; OVERLAYS];
/// Where the kernel has what no helper tells of a packet.
#[unsafe(no_mangle)]
static SKB: SkbOffsets = SkbOffsets { summed: 0, summed_shift: 0, csum: 0, head: 0 };
/// The mark of packets that passed the verdict.
#[unsafe(no_mangle)]
static MARK: u32 = 0x0020_0000;
/// The mark of packets that passed because of the cluster set.
#[unsafe(no_mangle)]
static MARK_CLUSTER: u32 = 0x0030_0000;
/// The bits of both.
#[unsafe(no_mangle)]
static MARK_MASK: u32 = 0x00f0_0000;

/// Reads a value that the loader may have overridden.
macro_rules! global {
    ($name:ident, $static:ident, $t:ty) => {
        #[inline(always)]
        pub fn $name() -> $t {
            // SAFETY: a valid static; volatile, because the loader rewrites it in the object.
            unsafe { core::ptr::read_volatile(&raw const $static) }
        }
    };
}
pub(crate) use global;

global!(tunnel_port, TUNNEL_PORT, u16);
global!(skb, SKB, SkbOffsets);
global!(mark, MARK, u32);
global!(mark_cluster, MARK_CLUSTER, u32);
global!(mark_mask, MARK_MASK, u32);

/// Whether this is one of the overlay's ports.
#[inline(always)]
pub fn overlay(port: u16) -> bool {
    let mut i = 0;
    while i < OVERLAYS {
        // SAFETY: inside a valid static; volatile, because the loader rewrites it in the object.
        let found = unsafe { (&raw const OVERLAY).cast::<u16>().add(i).read_volatile() };
        if found != 0 && found == port {
            return true;
        }
        i += 1;
    }
    false
}
