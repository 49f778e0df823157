//! Destinations that are denied to isolated pods unless a cluster policy accepts
//! exactly them: link-local, metadata services, and encrypted DNS (RFC 7858, RFC 9250).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// The port of DNS over TLS and over QUIC.
pub const ENCRYPTED_DNS: u16 = 853;

const fn v4(a: u8, b: u8, c: u8, d: u8, len: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), len))
}

const fn v6(s: [u16; 8], len: u8) -> IpNet {
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]), len))
}

/// Link-local ranges (RFC 3927, RFC 4291) and the metadata services that live elsewhere
/// (Alibaba, Azure, AWS and GCP over IPv6).
pub const METADATA: &[IpNet] = &[
    v4(169, 254, 0, 0, 16),
    v4(100, 100, 100, 200, 32),
    v4(168, 63, 129, 16, 32),
    v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10),
    v6([0xff02, 0, 0, 0, 0, 0, 0, 0], 16),
    v6([0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254], 128),
    v6([0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254], 128),
];

/// The special range that holds all of this prefix.
pub fn metadata_range(net: &IpNet) -> Option<&'static IpNet> {
    METADATA.iter().find(|m| m.contains(net))
}

/// Whether this is a metadata or link-local address.
pub fn is_metadata(ip: IpAddr) -> bool {
    metadata_range(&IpNet::from(ip)).is_some()
}
