//! The gateway namespace's nftables rules, as one text for one transaction.
//!
//! Marks come from `gateway_ingress`: the low byte is the carry, the second byte
//! the egress pair (0 is the pod's own way out). The packet's priority is its scope's
//! number. [`REPLY`] marks what the gateway's own sockets send back to pods.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Carry byte: routed and source-NATed.
pub const FORWARD: u32 = 1;
/// Carry byte: to the TLS relay.
pub const TLS: u32 = 2;
/// Carry byte: refused with an answer.
pub const BLOCK: u32 = 3;
/// Carry byte: to the DNS service.
pub const DNS: u32 = 4;
/// Mark of the gateway's own sockets towards pods.
pub const REPLY: u32 = 0x1_0000;

/// Set by our rules on what they let go on: routes and not only rules depend on it, so that nothing is
/// forwarded while another program has removed the table.
pub const CHECKED: u32 = 0x2_0000;

/// Source ports that the kernel's SNAT uses: disjoint from the relay's, so that no clash changes a port on the wire.
pub const SNAT_PORTS: (u16, u16) = (1024, 32767);
/// Source ports that the relay binds.
pub const RELAY_PORTS: (u16, u16) = (32768, 60999);
/// The most connections that one namespace may have, forwarded and relayed each: half of the ports that an egress
/// address has towards one destination. Whoever shares the address finds the other half.
pub const MAX_CONNECTIONS: usize = (RELAY_PORTS.1 - RELAY_PORTS.0) as usize / 2;

/// Our table, of family inet.
pub const TABLE: &str = "tidegate";

/// A set that counts refused packets.
#[derive(Clone, Copy, Debug)]
pub struct RefusedSet {
    /// Its name.
    pub name: &'static str,
    /// The family of its addresses.
    pub v6: bool,
    /// Whether it counts by source, destination, protocol and port, or by source alone.
    pub flow: bool,
}

/// What counts packets of forwarded flows beyond the quota: by flow, and by pod what finds no place there.
pub const REFUSED: [RefusedSet; 4] = [
    RefusedSet { name: "refused4", v6: false, flow: true },
    RefusedSet { name: "refused6", v6: true, flow: true },
    RefusedSet { name: "refused_more4", v6: false, flow: false },
    RefusedSet { name: "refused_more6", v6: true, flow: false },
];

/// An egress pair with its index in the mark, 1 to 255.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HeldPair {
    /// Index in the mark's second byte.
    pub index: u8,
    /// IPv4 egress address.
    pub ipv4: Option<Ipv4Addr>,
    /// IPv6 egress address.
    pub ipv6: Option<Ipv6Addr>,
}

impl HeldPair {
    /// Its addresses.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.ipv4.map(IpAddr::from).into_iter().chain(self.ipv6.map(IpAddr::from))
    }
}

/// What the rules depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// The pod's own device.
    pub device: String,
    /// MTU towards pods, in bytes.
    pub mtu: u16,
    /// Ports of the DNS service's sockets: 53 and those of the cluster's DNS endpoints. A reply leaves
    /// from the port that was asked, so each has a socket of its own.
    pub dns_ports: Vec<u16>,
    /// Port of the TLS relay's sockets.
    pub relay_port: u16,
    /// Pairs that this gateway holds, sorted by index.
    pub pairs: Vec<HeldPair>,
    /// Forwarded flows that one scope may have at the same time. Below the number of [`SNAT_PORTS`]: others that share
    /// the egress address find ports to every destination.
    pub flows_per_scope: u32,
}

impl Rules {
    /// The transaction: our table is made anew as a whole, no other table is touched.
    pub fn render(&self) -> String {
        let mut out = String::with_capacity(4096);
        // Writing to a String cannot fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, o: &mut String) -> std::fmt::Result {
        let dev = &self.device;
        let (slo, shi) = SNAT_PORTS;
        let (mss4, mss6) = (self.mtu - 40, self.mtu - 60);
        writeln!(o, "table inet {TABLE} {{}}\ndelete table inet {TABLE}\ntable inet {TABLE} {{")?;
        self.quota(o)?;

        // Intercepted flows have their state in a socket: conntrack would cost about a tenth of a query.
        writeln!(o, "  chain raw_prerouting {{\n    type filter hook prerouting priority raw; policy accept;")?;
        writeln!(o, "    iifname \"tgp\" meta mark & 0xff == {{ {TLS}, {DNS} }} notrack\n  }}")?;
        writeln!(o, "  chain raw_output {{\n    type filter hook output priority raw; policy accept;")?;
        writeln!(o, "    meta mark & {REPLY:#x} == {REPLY:#x} notrack\n  }}")?;

        writeln!(o, "  chain intercept {{\n    type filter hook prerouting priority mangle; policy accept;")?;
        for (family, l3) in [("ip", "ipv4"), ("ip6", "ipv6")] {
            for port in &self.dns_ports {
                for l4 in ["udp", "tcp"] {
                    writeln!(
                        o,
                        "    iifname \"tgp\" meta mark & 0xff == {DNS} meta nfproto {l3} {l4} dport {port} tproxy {family} to :{port} accept"
                    )?;
                }
            }
            writeln!(
                o,
                "    iifname \"tgp\" meta mark & 0xff == {TLS} meta nfproto {l3} meta l4proto tcp tproxy {family} to :{} accept",
                self.relay_port
            )?;
        }
        // Without a listener tproxy falls through, and the packet would be forwarded.
        writeln!(o, "    iifname \"tgp\" meta mark & 0xff == {{ {TLS}, {DNS} }} counter drop")?;
        // What the kernel program did not decide has no business here.
        writeln!(o, "    iifname \"tgp\" meta mark & 0xff == 0 counter drop")?;
        // A flow is counted with its first packet; later ones find the mark that the forward chain gives it.
        writeln!(
            o,
            "    iifname \"tgp\" meta mark & 0xff == {FORWARD} ct state new ct mark & {CHECKED:#x} == 0 jump new_flow"
        )?;
        // Queues of devices must not read a scope's number as a class of theirs.
        writeln!(o, "    iifname \"tgp\" meta priority set none")?;
        writeln!(o, "    iifname \"tgp\" meta mark set meta mark | {CHECKED:#x}\n  }}")?;

        writeln!(o, "  chain input {{\n    type filter hook input priority filter; policy accept;")?;
        writeln!(o, "    iifname \"tgp\" meta mark & 0xff != {{ {TLS}, {DNS} }} counter drop")?;
        // Who asks is known by the source address, and that was checked only on the way through the tunnel.
        let ports: Vec<String> = self.dns_ports.iter().chain([&self.relay_port]).map(u16::to_string).collect();
        writeln!(
            o,
            "    iifname != {{ \"tgp\", \"lo\" }} meta l4proto {{ tcp, udp }} th dport {{ {} }} ct state new counter drop",
            ports.join(", ")
        )?;
        writeln!(o, "    iifname \"tga\" ct state established,related accept")?;
        writeln!(o, "    iifname \"tga\" icmp type echo-request accept")?;
        writeln!(o, "    iifname \"tga\" icmpv6 type echo-request accept")?;
        writeln!(o, "    iifname \"tga\" counter drop\n  }}")?;

        writeln!(o, "  chain forward {{\n    type filter hook forward priority filter; policy drop;")?;
        writeln!(o, "    iifname \"tgp\" meta mark & 0xff == {BLOCK} meta l4proto tcp reject with tcp reset")?;
        writeln!(o, "    iifname \"tgp\" meta mark & 0xff == {BLOCK} reject with icmpx type port-unreachable")?;
        writeln!(o, "    ct state invalid counter drop")?;
        // A flow that nobody here knows: to the pod it must look dead at once, outside it must not be seen.
        writeln!(o, "    iifname \"tgp\" ct state new tcp flags & (fin|syn|rst|ack) != syn reject with tcp reset")?;
        // For the quota above, and for the errors that this namespace sends back outside, below.
        writeln!(o, "    iifname \"tgp\" ct mark set meta mark & {:#x}", CHECKED | 0xff00)?;
        // Both ends must send segments that fit the tunnel.
        for (l3, mss) in [("ipv4", mss4), ("ipv6", mss6)] {
            writeln!(
                o,
                "    meta nfproto {l3} tcp flags syn tcp option maxseg size > {mss} tcp option maxseg size set {mss}"
            )?;
        }
        // Translated already, whatever pairs are held now.
        writeln!(
            o,
            "    iifname \"tgp\" meta mark & 0xff == {FORWARD} ct state established,related ct status snat accept"
        )?;
        writeln!(o, "    iifname \"tgp\" oifname \"{dev}\" meta mark & 0xffff == {FORWARD:#x} accept")?;
        for p in &self.pairs {
            let mark = FORWARD | u32::from(p.index) << 8;
            for (l3, held) in [("ipv4", p.ipv4.is_some()), ("ipv6", p.ipv6.is_some())] {
                if held {
                    writeln!(
                        o,
                        "    iifname \"tgp\" oifname \"tga\" meta nfproto {l3} meta mark & 0xffff == {mark:#x} accept"
                    )?;
                }
            }
        }
        writeln!(o, "    iifname {{ \"tga\", \"{dev}\" }} oifname \"tgp\" ct state established,related accept")?;
        writeln!(o, "    counter\n  }}")?;

        // An error about what came from outside, as too big for the tunnel, goes back by the flow's uplink. Errors about
        // what pods sent have the packet's mark (fwmark_reflect) and go to them.
        writeln!(o, "  chain errors {{\n    type route hook output priority mangle; policy accept;")?;
        writeln!(
            o,
            "    meta l4proto {{ icmp, ipv6-icmp }} meta mark & 0xff == 0 ct state related ct mark & 0xff00 != 0 meta mark set ct mark & 0xff00"
        )?;
        writeln!(o, "  }}")?;
        writeln!(o, "  chain postrouting {{\n    type nat hook postrouting priority srcnat; policy accept;")?;
        writeln!(
            o,
            "    oifname \"{dev}\" meta mark & 0xffff == {FORWARD:#x} meta l4proto {{ tcp, udp }} masquerade to :{slo}-{shi}"
        )?;
        writeln!(o, "    oifname \"{dev}\" meta mark & 0xffff == {FORWARD:#x} masquerade")?;
        for p in &self.pairs {
            let mark = FORWARD | u32::from(p.index) << 8;
            if let Some(a) = p.ipv4 {
                writeln!(
                    o,
                    "    oifname \"tga\" meta mark & 0xffff == {mark:#x} meta l4proto {{ tcp, udp }} snat ip to {a}:{slo}-{shi}"
                )?;
                writeln!(o, "    oifname \"tga\" meta mark & 0xffff == {mark:#x} snat ip to {a}")?;
            }
            if let Some(a) = p.ipv6 {
                writeln!(
                    o,
                    "    oifname \"tga\" meta mark & 0xffff == {mark:#x} meta l4proto {{ tcp, udp }} snat ip6 to [{a}]:{slo}-{shi}"
                )?;
                writeln!(o, "    oifname \"tga\" meta mark & 0xffff == {mark:#x} snat ip6 to {a}")?;
            }
        }
        writeln!(o, "  }}")?;
        // Whatever NAT did not translate (a dead flow's FIN, an ICMP error, a transparent socket's stray answer)
        // must not leave with a foreign source. The unspecified address is address detection's.
        writeln!(o, "  chain leave {{\n    type filter hook postrouting priority srcnat + 10; policy accept;")?;
        writeln!(o, "    ip6 saddr :: accept")?;
        writeln!(o, "    oifname {{ \"tga\", \"{dev}\" }} fib saddr type != local counter drop")?;
        writeln!(o, "  }}\n}}")
    }

    /// The chain that counts new forwarded flows by scope, and the one that refuses them.
    fn quota(&self, o: &mut String) -> std::fmt::Result {
        let flows = self.flows_per_scope;
        let key = |v6| if v6 { "ip6 saddr . ip6 daddr" } else { "ip saddr . ip daddr" };
        for RefusedSet { name, v6, flow } in REFUSED {
            let (typeof_, size) = match (flow, v6) {
                // Each becomes an event of its own: both families must be far from filling the audit log's queue, or one
                // pod's flood would push out what others did.
                (true, _) => (format!("{} . meta l4proto . th dport", key(v6)), 1024),
                (false, true) => ("ip6 saddr".into(), 65535),
                (false, false) => ("ip saddr".into(), 65535),
            };
            writeln!(o, "  set {name} {{ typeof {typeof_}; flags dynamic,timeout; timeout 30s; size {size}; }}")?;
        }
        writeln!(o, "  set flows {{ typeof meta priority; flags dynamic; size 65535; }}")?;
        writeln!(o, "  set full {{ typeof meta priority; flags dynamic,timeout; timeout 100ms; size 65535; }}")?;

        writeln!(o, "  chain refuse {{")?;
        for RefusedSet { name, v6, flow } in REFUSED {
            // A rule whose set has no room ends there, and the next one counts.
            let l3 = if v6 { "ipv6" } else { "ipv4" };
            if flow {
                writeln!(
                    o,
                    "    meta nfproto {l3} meta l4proto {{ tcp, udp }} update @{name} {{ {} . meta l4proto . th dport counter }} drop",
                    key(v6)
                )?;
            } else {
                let l3 = if v6 { "ip6" } else { "ip" };
                writeln!(o, "    update @{name} {{ {l3} saddr counter }} drop")?;
            }
        }
        writeln!(o, "    counter drop\n  }}")?;

        // Each look of `ct count` leaves the refused packet in its list for a while. A flood must not make that grow:
        // a scope that has used up its quota is looked at again only after a moment.
        writeln!(o, "  chain beyond {{\n    add @full {{ meta priority }}\n    goto refuse\n  }}")?;
        writeln!(o, "  chain new_flow {{")?;
        // What opens no flow is answered in the forward chain.
        writeln!(o, "    tcp flags & (fin|syn|rst|ack) != syn return")?;
        writeln!(o, "    meta priority @full goto refuse")?;
        writeln!(o, "    add @flows {{ meta priority ct count over {flows} }} goto beyond\n  }}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        Rules {
            device: "eth0".into(),
            mtu: 1450,
            dns_ports: vec![53, 5353],
            relay_port: 15001,
            flows_per_scope: 100,
            pairs: vec![
                HeldPair {
                    index: 1,
                    ipv4: Some("203.0.113.10".parse().unwrap()),
                    ipv6: Some("2001:db8::10".parse().unwrap()),
                },
                HeldPair { index: 2, ipv4: Some("203.0.113.11".parse().unwrap()), ipv6: None },
            ],
        }
    }

    #[test]
    fn a_family_that_a_pair_lacks_is_not_forwarded() {
        let text = rules().render();
        assert!(text.contains("meta nfproto ipv6 meta mark & 0xffff == 0x101 accept"));
        assert!(text.contains("meta nfproto ipv4 meta mark & 0xffff == 0x201 accept"));
        assert!(!text.contains("meta nfproto ipv6 meta mark & 0xffff == 0x201 accept"));
    }

    #[test]
    fn the_kernel_takes_the_rules_twice() {
        // In a network namespace of its own: the table must not touch the machine's.
        std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            for _ in 0..2 {
                crate::egress::load_rules(&rules().render()).unwrap();
            }
        })
        .join()
        .unwrap();
    }
}
