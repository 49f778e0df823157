//! Transport protocols, port ranges and how an allowed packet is carried.

/// A transport protocol that rules can name, with its IANA number, or all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Proto {
    /// Any protocol but TCP and UDP, ICMP among them. It has no ports: what holds for one holds for all. Only denies
    /// reach so far.
    Other = 0,
    /// TCP.
    Tcp = 6,
    /// UDP.
    Udp = 17,
}

/// What the gateway does with an allowed packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Carry {
    /// Routed and source-NATed in the kernel, not inspected.
    Forward = 1,
    /// Relayed after the SNI check.
    Tls = 2,
    /// Refused with an answer, so that clients fall back at once (QUIC until it is inspected).
    Block = 3,
}

/// What a port range says of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Via {
    /// Allowed, and carried so.
    Allow(Carry),
    /// A deny decided it; the default does not apply.
    Deny,
    /// A cluster policy accepts it for a guarded endpoint or on the node: it keeps the CNI's path.
    Pass,
}

/// An inclusive range of ports of one protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    /// The protocol.
    pub proto: Proto,
    /// First port.
    pub lo: u16,
    /// Last port, not below `lo`.
    pub hi: u16,
    /// What holds for it.
    pub via: Via,
}

/// Sorted ranges that do not overlap; neighbours with the same meaning are merged.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortSet(Vec<PortRange>);

/// The most ranges that a port set may have: what the kernel's chained entries hold.
pub const MAX_RANGES: usize = 64;

impl PortSet {
    /// Builds the set from ranges in order of precedence: where two overlap, the earlier holds.
    pub fn from_precedence(ranges: impl IntoIterator<Item = PortRange>) -> Self {
        let mut set = Self::default();
        for r in ranges {
            set.add_below(r);
        }
        set
    }

    /// Adds the parts of `new` that the set does not decide yet.
    pub fn add_below(&mut self, new: PortRange) {
        let mut free = vec![(u32::from(new.lo), u32::from(new.hi))];
        for r in self.0.iter().filter(|r| r.proto == new.proto) {
            let (rlo, rhi) = (u32::from(r.lo), u32::from(r.hi));
            free = free
                .into_iter()
                .flat_map(|(lo, hi)| {
                    if hi < rlo || lo > rhi {
                        [Some((lo, hi)), None]
                    } else {
                        [(lo < rlo).then(|| (lo, rlo - 1)), (hi > rhi).then(|| (rhi + 1, hi))]
                    }
                })
                .flatten()
                .collect();
        }
        for (lo, hi) in free {
            // Both came from u16 bounds.
            self.0.push(PortRange { lo: lo as u16, hi: hi as u16, ..new });
        }
        self.normalise();
    }

    fn normalise(&mut self) {
        self.0.sort_unstable();
        let mut out: Vec<PortRange> = Vec::with_capacity(self.0.len());
        for r in self.0.drain(..) {
            match out.last_mut() {
                Some(last)
                    if last.proto == r.proto && last.via == r.via && u32::from(last.hi) + 1 >= u32::from(r.lo) =>
                {
                    last.hi = last.hi.max(r.hi);
                }
                _ => out.push(r),
            }
        }
        self.0 = out;
    }

    /// The ranges, sorted by protocol and port.
    pub fn ranges(&self) -> &[PortRange] {
        &self.0
    }

    /// Whether nothing is decided.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What holds for a port, if anything is decided.
    pub fn get(&self, proto: Proto, port: u16) -> Option<Via> {
        let i = self.0.partition_point(|r| (r.proto, r.hi) < (proto, port));
        self.0.get(i).filter(|r| r.proto == proto && r.lo <= port).map(|r| r.via)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn r(lo: u16, hi: u16, via: Via) -> PortRange {
        PortRange { proto: Proto::Tcp, lo, hi, via }
    }

    #[test]
    fn the_earlier_range_holds() {
        let fwd = Via::Allow(Carry::Forward);
        let s = PortSet::from_precedence([r(100, 200, Via::Deny), r(0, 65535, fwd)]);
        assert_eq!(s.get(Proto::Tcp, 99), Some(fwd));
        assert_eq!(s.get(Proto::Tcp, 100), Some(Via::Deny));
        assert_eq!(s.get(Proto::Tcp, 200), Some(Via::Deny));
        assert_eq!(s.get(Proto::Tcp, 201), Some(fwd));
        assert_eq!(s.get(Proto::Udp, 201), None);
        assert_eq!(s.ranges().len(), 3);
        let t = PortSet::from_precedence([r(1, 5, fwd), r(6, 9, fwd)]);
        assert_eq!(t.ranges(), &[r(1, 9, fwd)]);
    }
}
