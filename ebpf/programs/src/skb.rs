//! A packet in the kernel, and the few helpers that the programs need.

use aya_ebpf::bindings::{__sk_buff, bpf_tunnel_key};
use aya_ebpf::helpers::generated as bpf;
use aya_ebpf::programs::TcContext;
use tidegate_ebpf_common::checksum;
use tidegate_ebpf_common::layout::Addr;
use tidegate_ebpf_common::packet::parse;
use tidegate_ebpf_common::tunnel::Outer;
use tidegate_ebpf_common::{Bytes, Packet, Parsed};

use crate::globals;

/// `TCX_NEXT`: the next program of the chain decides.
pub const NEXT: i32 = -1;
/// `TC_ACT_OK`: on into the stack.
pub const OK: i32 = 0;
/// `TC_ACT_SHOT`: dropped.
pub const SHOT: i32 = 2;

const PACKET_HOST: u32 = 0;
const F_TUNINFO_IPV6: u64 = 1;
const F_ZERO_CSUM_TX: u64 = 2;

/// The tunnel key up to the outer source, which the kernel chooses (`bpf_tunnel_key`).
#[repr(C)]
struct TunnelKey {
    id: u32,
    remote: [u32; 4],
    tos: u8,
    ttl: u8,
    ext: u16,
    label: u32,
}

/// A received tunnel key, with the outer destination.
#[repr(C)]
struct ReceivedKey {
    key: TunnelKey,
    local: [u32; 4],
}

/// The packet.
pub struct Skb {
    /// The context.
    pub ctx: *mut __sk_buff,
    /// Read once: a pointer into the context that the compiler keeps for a second read is refused.
    ifindex: u32,
}

/// Reads the frame's headers: a [`Parsed`], 4 if what was read will be something else when the frame leaves. A global function
/// in the kernel's sense: it is verified once, has a stack of its own, and what it wrote is unknown to who calls it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn parse_lasting(ctx: *mut __sk_buff, to: *mut Packet) -> u32 {
    // SAFETY: the verifier lets no other pass than null and a whole packet.
    let Some(p) = (unsafe { to.as_mut() }) else { return 4 };
    let skb = Skb::of(ctx);
    let parsed = parse(&skb, skb.ethertype(), p);
    if checksum::stays(parsed, p, unwritten(ctx)) { parsed as u32 } else { 4 }
}

/// `CHECKSUM_PARTIAL` of `ip_summed`.
const PARTIAL: u8 = 3;

/// The checksum that a device is yet to write, as [`checksum::pending`] says it. A global function in the kernel's sense: it
/// is verified once.
///
/// No helper tells, so the kernel's own structure is read: a classifier's context is the address of its `sk_buff`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn unwritten(ctx: *mut __sk_buff) -> u64 {
    // Nothing can be judged whose octet 0 is yet to be written.
    const UNKNOWN: u64 = checksum::pending(0, 0);
    let at = globals::skb();
    let skb = ctx.cast::<u8>();
    let (mut summed, mut sum, mut ends) = (0u8, [0u16; 2], [0u64; 2]);
    if !read(skb.wrapping_add(at.summed as usize), &mut summed) {
        return UNKNOWN;
    }
    if summed >> (at.summed_shift & 7) & 3 != PARTIAL {
        return checksum::NONE;
    }
    if !read(skb.wrapping_add(at.csum as usize), &mut sum) || !read(skb.wrapping_add(at.head as usize), &mut ends) {
        return UNKNOWN;
    }
    // It counts from the buffer's beginning, we from the frame's.
    let start = ends[0].wrapping_add(u64::from(sum[0])).wrapping_sub(ends[1]);
    if start > u64::from(u16::MAX) { UNKNOWN } else { checksum::pending(start as u16, sum[1]) }
}

/// Reads the kernel's memory.
#[inline(always)]
fn read<T: Copy>(from: *const u8, to: &mut T) -> bool {
    // SAFETY: integers of the size told; the helper refuses what is no memory.
    unsafe { bpf::bpf_probe_read_kernel((&raw mut *to).cast(), size_of::<T>() as u32, from.cast()) == 0 }
}

macro_rules! field {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[inline(always)]
        pub fn $name(&self) -> u32 {
            // SAFETY: the context is valid for the run of the program.
            unsafe { (*self.ctx).$name }
        }
    };
}

impl Skb {
    #[inline(always)]
    pub fn new(context: &TcContext) -> Self {
        Self::of(context.skb.skb)
    }

    /// The packet of a context.
    #[inline(always)]
    pub fn of(ctx: *mut __sk_buff) -> Self {
        // SAFETY: the context is valid for the run of the program.
        Self { ctx, ifindex: unsafe { (*ctx).ifindex } }
    }

    /// The device of the hook.
    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        self.ifindex
    }

    field!(/// Length of the frame.
        len);
    field!(/// The device by which it entered.
        ingress_ifindex);
    field!(/// The mark.
        mark);
    field!(/// Size of a segment, 0 if it is not to be segmented.
        gso_size);
    field!(/// Whether a VLAN tag lies in the metadata.
        vlan_present);

    /// Zero, which the verifier cannot know: mixed into values that differ from path to path, it makes
    /// the paths alike, so that what follows is verified once.
    #[inline(always)]
    fn veil(&self) -> u32 {
        // SAFETY: the context is valid; two volatile reads of a field that does not change.
        unsafe {
            let len = &raw const (*self.ctx).len;
            len.read_volatile() ^ len.read_volatile()
        }
    }

    /// Reads the frame's headers.
    #[inline(always)]
    pub fn parse(&self, p: &mut Packet) -> Parsed {
        let parsed = parse(self, self.ethertype(), p);
        let veil = self.veil();
        p.marks ^= veil as u8;
        p.proto ^= veil as u8;
        p.flags ^= veil as u8;
        p.code ^= veil as u8;
        p.l4_length ^= veil as u8;
        p.l4 ^= veil;
        p.length ^= veil;
        p.sport ^= veil as u16;
        p.dport ^= veil as u16;
        let (s, d) = (p.src.0, p.dst.0);
        p.src.0 = [s[0] ^ veil, s[1] ^ veil, s[2] ^ veil, s[3] ^ veil];
        p.dst.0 = [d[0] ^ veil, d[1] ^ veil, d[2] ^ veil, d[3] ^ veil];
        parsed
    }

    /// Reads the frame's headers. `None` if what was read will be something else when the frame leaves.
    #[inline(always)]
    pub fn parse_lasting(&self, p: &mut Packet) -> Option<Parsed> {
        match parse_lasting(self.ctx, p) {
            0 => Some(Parsed::Ip),
            1 => Some(Parsed::Arp),
            2 => Some(Parsed::NotIp),
            3 => Some(Parsed::Malformed),
            _ => None,
        }
    }

    /// The EtherType; a tagged frame has none that we speak.
    #[inline(always)]
    pub fn ethertype(&self) -> u16 {
        if self.vlan_present() != 0 {
            return 0x8100;
        }
        // SAFETY: as above.
        u16::from_be(unsafe { (*self.ctx).protocol } as u16)
    }

    #[inline(always)]
    pub fn set_mark(&self, mark: u32) {
        // SAFETY: as above; the mark is writable.
        unsafe { (*self.ctx).mark = mark }
    }

    #[inline(always)]
    pub fn set_priority(&self, priority: u32) {
        // SAFETY: as above; the priority is writable.
        unsafe { (*self.ctx).priority = priority }
    }

    /// Writes into the frame; false if it is too short.
    #[inline(always)]
    pub fn store<const N: usize>(&self, offset: u32, from: &[u8; N]) -> bool {
        // SAFETY: the buffer holds N octets.
        unsafe { bpf::bpf_skb_store_bytes(self.ctx.cast(), offset, from.as_ptr().cast(), N as u32, 0) == 0 }
    }

    /// Makes the whole frame the kernel's own: the sender may still write into pages that it lent (MSG_ZEROCOPY, packet
    /// sockets' rings).
    #[inline(always)]
    pub fn keep(&self) -> bool {
        // SAFETY: a valid context.
        unsafe { bpf::bpf_skb_pull_data(self.ctx, self.len()) == 0 }
    }

    /// Puts two octets of what a checksum covers in place of others.
    #[inline(always)]
    pub fn replace(&self, offset: u32, from: [u8; 2], to: [u8; 2], checksum: u32) -> bool {
        let word = |o: [u8; 2]| u64::from(u16::from_ne_bytes(o));
        // A checksum of zero says that there is none.
        const MANGLED_0: u64 = 0x20;
        // SAFETY: a valid context.
        let sum = unsafe { bpf::bpf_l4_csum_replace(self.ctx, checksum, word(from), word(to), MANGLED_0 | 2) };
        sum == 0 && self.store(offset, &to)
    }

    /// Cuts or extends the frame.
    #[inline(always)]
    pub fn resize(&self, len: u32) -> bool {
        // SAFETY: a valid context.
        unsafe { bpf::bpf_skb_change_tail(self.ctx, len, 0) == 0 }
    }

    /// Out by the device.
    #[inline(always)]
    pub fn redirect(&self, ifindex: u32) -> i32 {
        // SAFETY: no pointers.
        unsafe { bpf::bpf_redirect(ifindex, 0) as i32 }
    }

    /// Into the other end of the device, which lies in another namespace.
    #[inline(always)]
    pub fn redirect_peer(&self, ifindex: u32) -> i32 {
        // A decapsulated frame, or one for another MAC address, would be refused by the stack.
        // SAFETY: a valid context; no pointers.
        unsafe {
            bpf::bpf_skb_change_type(self.ctx, PACKET_HOST);
            bpf::bpf_redirect_peer(ifindex, 0) as i32
        }
    }

    /// Up this namespace's stack although the frame's MAC address is another's.
    #[inline(always)]
    pub fn to_host(&self) {
        // SAFETY: a valid context.
        unsafe { bpf::bpf_skb_change_type(self.ctx, PACKET_HOST) };
    }

    /// Out by the device, with the neighbour's address filled in by the kernel.
    #[inline(always)]
    pub fn redirect_neigh(&self, ifindex: u32) -> i32 {
        // SAFETY: a null parameter lets the kernel look the next hop up.
        unsafe { bpf::bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) as i32 }
    }

    /// Gives the frame a tunnel key; the addresses' family is that of `remote`.
    #[inline(always)]
    pub fn set_tunnel(&self, vni: u32, remote: &Addr) -> bool {
        let mut key = TunnelKey { id: vni, remote: [0; 4], tos: 0, ttl: 64, ext: 0, label: 0 };
        let flags = if remote.is_v4() {
            key.remote[0] = u32::from_be(remote.0[3]);
            F_ZERO_CSUM_TX
        } else {
            key.remote = remote.0;
            F_TUNINFO_IPV6
        };
        // SAFETY: the kernel takes the structure cut before the outer source since 5.18.
        unsafe {
            bpf::bpf_skb_set_tunnel_key(
                self.ctx,
                (&raw mut key).cast::<bpf_tunnel_key>(),
                size_of::<TunnelKey>() as u32,
                flags,
            ) == 0
        }
    }

    /// What the tunnel said of a decapsulated frame; false if it did not come through it.
    #[inline(always)]
    pub fn tunnel(&self, outer: &mut Outer) -> bool {
        let key = TunnelKey { id: 0, remote: [0; 4], tos: 0, ttl: 0, ext: 0, label: 0 };
        let mut got = ReceivedKey { key, local: [0; 4] };
        let p = (&raw mut got).cast::<bpf_tunnel_key>();
        let size = size_of::<ReceivedKey>() as u32;
        // SAFETY: the whole structure, which the kernel fills since 5.19; it refuses a family that is not the tunnel's.
        unsafe {
            if bpf::bpf_skb_get_tunnel_key(self.ctx, p, size, 0) == 0 {
                outer.vni = got.key.id;
                outer.from = Addr::v4(got.key.remote[0].to_be());
                outer.to = Addr::v4(got.local[0].to_be());
                return true;
            }
            if bpf::bpf_skb_get_tunnel_key(self.ctx, p, size, F_TUNINFO_IPV6) == 0 {
                outer.vni = got.key.id;
                outer.from = Addr(got.key.remote);
                outer.to = Addr(got.local);
                return true;
            }
        }
        false
    }
}

impl Bytes for Skb {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32, to: &mut [u8; N]) -> bool {
        // SAFETY: the buffer holds N octets.
        unsafe { bpf::bpf_skb_load_bytes(self.ctx.cast(), offset, to.as_mut_ptr().cast(), N as u32) == 0 }
    }

    #[inline(always)]
    fn size(&self) -> u32 {
        self.len()
    }
}
