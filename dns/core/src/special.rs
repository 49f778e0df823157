//! The rebinding filter: addresses that a public name has no business to point to.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use tidegate_policy::Reason;

/// What kind of address it is to the rebinding filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Special {
    /// An ordinary public address.
    Public,
    /// Filtered unless a rule's `privateAddresses` holds it.
    Private,
    /// Filtered whatever a rule says.
    Never(Reason),
}

/// Metadata and credential services of clouds, wherever they live.
pub const METADATA: &[IpAddr] = &[
    IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)),
    IpAddr::V4(Ipv4Addr::new(169, 254, 169, 253)),
    IpAddr::V4(Ipv4Addr::new(169, 254, 169, 123)),
    IpAddr::V4(Ipv4Addr::new(169, 254, 170, 2)),
    IpAddr::V4(Ipv4Addr::new(169, 254, 170, 23)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x253)),
    IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)),
];

/// Classifies an address.
pub fn classify(ip: IpAddr) -> Special {
    if METADATA.contains(&ip) {
        return Special::Never(Reason::Metadata);
    }
    match ip {
        IpAddr::V4(ip) => classify_v4(ip),
        IpAddr::V6(ip) => classify_v6(ip),
    }
}

fn classify_v4(ip: Ipv4Addr) -> Special {
    match ip.octets() {
        // "This network", loopback, multicast, reserved and broadcast (RFC 6890).
        [0 | 127 | 224..=255, ..] => Special::Never(Reason::Rebinding),
        // RFC 1918.
        [10, ..] | [172, 16..=31, ..] | [192, 168, ..] => Special::Private,
        // Carrier-grade NAT (RFC 6598), link-local (RFC 3927), protocol assignments (RFC 6890), benchmarks (RFC 2544).
        [100, 64..=127, ..] | [169, 254, ..] | [192, 0, 0, _] | [198, 18..=19, ..] => Special::Private,
        // 6to4 relays (RFC 7526).
        [192, 88, 99, _] => Special::Private,
        _ => Special::Public,
    }
}

/// What an IPv6 address that leads to an IPv4 one is: never better than private, whatever is inside.
fn embedded(high: u16, low: u16) -> Special {
    let [a, b] = high.to_be_bytes();
    let [c, d] = low.to_be_bytes();
    match classify(IpAddr::V4(Ipv4Addr::new(a, b, c, d))) {
        never @ Special::Never(_) => never,
        Special::Private | Special::Public => Special::Private,
    }
}

fn classify_v6(ip: Ipv6Addr) -> Special {
    match ip.segments() {
        // v4-mapped, v4-compatible, loopback and unspecified (RFC 4291): a socket would go to the IPv4 address.
        [0, 0, 0, 0, 0, 0 | 0xffff, ..] => Special::Never(Reason::Rebinding),
        // NAT64 (RFC 6052, RFC 8215).
        [0x64, 0xff9b, 0, 0, 0, 0, h, l] => embedded(h, l),
        [0x64, 0xff9b, 1, .., h, l] => embedded(h, l),
        // 6to4 (RFC 3056).
        [0x2002, h, l, ..] => embedded(h, l),
        // Teredo (RFC 4380): the client's address is stored inverted.
        [0x2001, 0, .., h, l] => embedded(!h, !l),
        // Multicast.
        [0xff00..=0xffff, ..] => Special::Never(Reason::Rebinding),
        // Unique local, link-local, site-local, discard (RFC 6666).
        [0xfc00..=0xfdff, ..] | [0xfe80..=0xfeff, ..] | [0x100, 0, 0, 0, ..] => Special::Private,
        _ => Special::Public,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Special {
        classify(text.parse().unwrap())
    }

    #[test]
    fn ranges() {
        let never = Special::Never(Reason::Rebinding);
        let metadata = Special::Never(Reason::Metadata);
        for ip in ["127.0.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "240.0.0.1", "::1", "::", "ff02::1"] {
            assert_eq!(of(ip), never, "{ip}");
        }
        for ip in ["::ffff:192.0.2.1", "::ffff:10.0.0.1", "::192.0.2.1", "2002:7f00:1::", "64:ff9b::127.0.0.1"] {
            assert_eq!(of(ip), never, "{ip}");
        }
        for ip in ["169.254.169.254", "168.63.129.16", "fd00:ec2::254", "64:ff9b::169.254.169.254", "2002:a9fe:a9fe::1"]
        {
            assert_eq!(of(ip), metadata, "{ip}");
        }
        // Teredo stores the client's address inverted: 169.254.169.254 is 5601:5601.
        assert_eq!(of("2001:0:1234::5601:5601"), metadata);
        for ip in [
            "10.0.0.1",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "100.64.0.1",
            "169.254.1.1",
            "198.18.0.1",
            "fd00::1",
            "fe80::1",
            "fec0::1",
            "64:ff9b::192.0.2.1",
            "2002:c000:201::1",
            "2001:0:1::3fff:fdfe",
            "100::1",
            "64:ff9b:1::1.1.1.1",
        ] {
            assert_eq!(of(ip), Special::Private, "{ip}");
        }
        for ip in [
            "192.0.2.1",
            "198.51.100.1",
            "203.0.113.1",
            "172.32.0.1",
            "172.15.0.1",
            "100.128.0.1",
            "2001:db8::1",
            "2606:4700::1",
        ] {
            assert_eq!(of(ip), Special::Public, "{ip}");
        }
    }
}
