//! Public encrypted resolvers: DNS over TLS, HTTPS or QUIC to them would go
//! around the gateway, so they are denied even where a rule allows everything.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The canary by which browsers ask whether they may turn on DNS over HTTPS; NXDOMAIN says no.
pub const CANARY: &str = "use-application-dns.net";

/// Discovery of designated resolvers (RFC 9462): a locally served zone, never forwarded.
pub const DISCOVERY: &str = "resolver.arpa";

/// Names of public encrypted resolvers, sorted; each covers the names below it.
pub const NAMES: &[&str] = &[
    "adguard-dns.com",
    "adguard-dns.io",
    "alidns.com",
    "anycast.dns.nextdns.io",
    "base.dns.mullvad.net",
    "chrome.cloudflare-dns.com",
    "cloudflare-dns.com",
    "dns-family.adguard.com",
    "dns-unfiltered.adguard.com",
    "dns.adguard.com",
    "dns.alidns.com",
    "dns.applied-privacy.net",
    "dns.cloudflare.com",
    "dns.controld.com",
    "dns.digitale-gesellschaft.ch",
    "dns.dnsoverhttps.net",
    "dns.google",
    "dns.google.com",
    "dns.mullvad.net",
    "dns.nextdns.io",
    "dns.quad9.net",
    "dns.sb",
    "dns.switch.ch",
    "dns.twnic.tw",
    "dns0.eu",
    "dns10.quad9.net",
    "dns11.quad9.net",
    "dns12.quad9.net",
    "dns64.dns.google",
    "dns9.quad9.net",
    "doh.cleanbrowsing.org",
    "doh.dns.apple.com",
    "doh.dns.sb",
    "doh.familyshield.opendns.com",
    "doh.libredns.gr",
    "doh.mullvad.net",
    "doh.opendns.com",
    "doh.pub",
    "doh.sandbox.opendns.com",
    "doh.umbrella.com",
    "doh.xfinity.com",
    "dot.pub",
    "dot.sb",
    "family.cloudflare-dns.com",
    "freedns.controld.com",
    "joindns4.eu",
    "mask-h2.icloud.com",
    "mask.icloud.com",
    "mozilla.cloudflare-dns.com",
    "odoh.cloudflare-dns.com",
    "one.one.one.one",
    "ordns.he.net",
    "security-filter-dns.cleanbrowsing.org",
    "security.cloudflare-dns.com",
    "unfiltered.joindns4.eu",
    "wikimedia-dns.org",
];

const fn v4(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(a, b, c, d))
}

const fn v6(s: [u16; 8]) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]))
}

/// Addresses of public encrypted resolvers, sorted, for DNS answers and for prefix rules.
pub const ADDRESSES: &[IpAddr] = &[
    v4(1, 0, 0, 1),
    v4(1, 0, 0, 2),
    v4(1, 0, 0, 3),
    v4(1, 1, 1, 1),
    v4(1, 1, 1, 2),
    v4(1, 1, 1, 3),
    v4(1, 12, 12, 12),
    v4(8, 8, 4, 4),
    v4(8, 8, 8, 8),
    v4(9, 9, 9, 9),
    v4(9, 9, 9, 10),
    v4(9, 9, 9, 11),
    v4(9, 9, 9, 12),
    v4(45, 11, 45, 11),
    v4(45, 90, 28, 0),
    v4(45, 90, 30, 0),
    v4(74, 82, 42, 42),
    v4(76, 76, 2, 0),
    v4(76, 76, 10, 0),
    v4(94, 140, 14, 14),
    v4(94, 140, 14, 15),
    v4(94, 140, 14, 140),
    v4(94, 140, 15, 15),
    v4(94, 140, 15, 16),
    v4(120, 53, 53, 53),
    v4(149, 112, 112, 9),
    v4(149, 112, 112, 10),
    v4(149, 112, 112, 11),
    v4(149, 112, 112, 112),
    v4(185, 222, 222, 222),
    v4(185, 228, 168, 9),
    v4(185, 228, 168, 10),
    v4(185, 228, 168, 168),
    v4(185, 253, 5, 0),
    v4(193, 110, 81, 0),
    v4(194, 242, 2, 2),
    v4(208, 67, 220, 220),
    v4(208, 67, 222, 222),
    v4(223, 5, 5, 5),
    v4(223, 6, 6, 6),
    v6([0x2001, 0x4860, 0x4860, 0, 0, 0, 0, 0x64]),
    v6([0x2001, 0x4860, 0x4860, 0, 0, 0, 0, 0x6464]),
    v6([0x2001, 0x4860, 0x4860, 0, 0, 0, 0, 0x8844]),
    v6([0x2001, 0x4860, 0x4860, 0, 0, 0, 0, 0x8888]),
    v6([0x2606, 0x4700, 0x4700, 0, 0, 0, 0, 0x1001]),
    v6([0x2606, 0x4700, 0x4700, 0, 0, 0, 0, 0x1002]),
    v6([0x2606, 0x4700, 0x4700, 0, 0, 0, 0, 0x1003]),
    v6([0x2606, 0x4700, 0x4700, 0, 0, 0, 0, 0x1111]),
    v6([0x2606, 0x4700, 0x4700, 0, 0, 0, 0, 0x1112]),
    v6([0x2606, 0x4700, 0x4700, 0, 0, 0, 0, 0x1113]),
    v6([0x2620, 0xfe, 0, 0, 0, 0, 0, 0x9]),
    v6([0x2620, 0xfe, 0, 0, 0, 0, 0, 0x10]),
    v6([0x2620, 0xfe, 0, 0, 0, 0, 0, 0x11]),
    v6([0x2620, 0xfe, 0, 0, 0, 0, 0, 0xfe]),
    v6([0x2620, 0x119, 0x35, 0, 0, 0, 0, 0x35]),
    v6([0x2620, 0x119, 0x53, 0, 0, 0, 0, 0x53]),
    v6([0x2a09, 0, 0, 0, 0, 0, 0, 0]),
    v6([0x2a09, 0, 0, 0, 0, 0, 0, 1]),
    v6([0x2a10, 0x50c0, 0, 0, 0, 0, 0xad1, 0xff]),
    v6([0x2a10, 0x50c0, 0, 0, 0, 0, 0xad2, 0xff]),
];

/// Whether `name` (canonical, no final dot) is `suffix` or lies below it, compared by label.
pub fn is_at_or_below(name: &str, suffix: &str) -> bool {
    match name.strip_suffix(suffix) {
        Some("") => true,
        Some(rest) => rest.ends_with('.'),
        None => false,
    }
}

/// A bit of [`LIKELY`] by a name's length and two of its octets.
const fn likely_bit(name: &[u8]) -> usize {
    (name[0] as usize + 37 * name[name.len() / 2] as usize + 101 * name.len()) % 1024
}

/// The bits of [`NAMES`]: nearly every other name is told apart without comparing strings, which showed on the hit path.
const LIKELY: [u64; 16] = {
    let mut bits = [0; 16];
    let mut i = 0;
    while i < NAMES.len() {
        let bit = likely_bit(NAMES[i].as_bytes());
        bits[bit / 64] |= 1 << (bit % 64);
        i += 1;
    }
    bits
};

fn is_listed(name: &str) -> bool {
    if name.is_empty() {
        return false;
    }
    let bit = likely_bit(name.as_bytes());
    LIKELY[bit / 64] >> (bit % 64) & 1 != 0 && NAMES.binary_search(&name).is_ok()
}

/// Whether `name` (canonical) is or lies below a name of [`NAMES`].
pub fn is_resolver_name(name: &str) -> bool {
    let dot = |b: &u8| *b == b'.';
    // A listed name has two labels at least, so the last label is not looked up.
    let Some(last) = name.as_bytes().iter().rposition(dot) else { return false };
    let mut at = 0;
    loop {
        if is_listed(&name[at..]) {
            return true;
        }
        match name.as_bytes()[at..last].iter().position(dot) {
            Some(len) => at += len + 1,
            None => return false,
        }
    }
}

/// A bit of [`LIKELY_ADDRESSES`].
const fn likely_address_bit(ip: IpAddr) -> usize {
    let (high, low) = match ip {
        IpAddr::V4(ip) => {
            let [a, b, c, d] = ip.octets();
            (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
        }
        IpAddr::V6(ip) => (ip.segments()[0], ip.segments()[7]),
    };
    (high as usize * 37 + low as usize) % 1024
}

/// The bits of [`ADDRESSES`], as [`LIKELY`] has those of names.
const LIKELY_ADDRESSES: [u64; 16] = {
    let mut bits = [0; 16];
    let mut i = 0;
    while i < ADDRESSES.len() {
        let bit = likely_address_bit(ADDRESSES[i]);
        bits[bit / 64] |= 1 << (bit % 64);
        i += 1;
    }
    bits
};

/// Whether `ip` is one of [`ADDRESSES`].
pub fn is_resolver_address(ip: IpAddr) -> bool {
    let bit = likely_address_bit(ip);
    LIKELY_ADDRESSES[bit / 64] >> (bit % 64) & 1 != 0 && ADDRESSES.binary_search(&ip).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listed_names_cover_what_is_below() {
        assert!(is_resolver_name("dns.google"));
        assert!(is_resolver_name("abc123.dns.nextdns.io"));
        assert!(!is_resolver_name("google"));
        assert!(!is_resolver_name("nextdns.io"));
        assert!(!is_resolver_name("notdns.google.example"));
        assert!(!is_resolver_name("xdns.google"));
        assert!(!is_resolver_name("") && !is_resolver_name(".") && !is_resolver_name("a..b.."));
    }

    #[test]
    fn the_lists_are_sorted_and_canonical() {
        assert!(NAMES.is_sorted());
        assert!(ADDRESSES.is_sorted());
        for n in NAMES {
            assert_eq!(tidegate_policy::Name::parse(n).unwrap().as_str(), *n);
            assert!(n.contains('.'));
            assert!(is_resolver_name(n));
        }
        assert!(ADDRESSES.iter().all(|a| is_resolver_address(*a)));
        assert!(!is_resolver_address("192.0.2.1".parse().unwrap()));
    }
}
