//! The nftables rules that others load on a node: its CNI, kube-proxy, a host firewall. Pure.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::IpAddr;

use anyhow::Result;
use ipnet::IpNet;

use crate::family::Family;
use crate::scenario::{Node, Pod, Scenario, Service};

/// The mark of packets that kube-proxy masquerades.
const MASQUERADE: &str = "0x4000";
/// The mark of packets that kube-proxy drops.
const DROP: &str = "0x8000";

/// All rules of a node, as one text.
///
/// # Errors
/// When a service names a pod that does not exist.
pub fn of(scenario: &Scenario, node: &Node) -> Result<String> {
    let mut text = cni(scenario, node);
    if scenario.hosts.kube_proxy {
        text.push_str(&kube_proxy(scenario)?);
    }
    if scenario.hosts.firewall {
        text.push_str(&firewall(scenario));
    }
    Ok(text)
}

/// nft's word for a family in matches.
fn l3(ip: IpAddr) -> &'static str {
    Family::of(ip).pick("ip", "ip6")
}

/// The pods' ranges of every node, by family.
fn pod_ranges(scenario: &Scenario) -> Vec<(&'static str, String)> {
    let families = scenario.families.iter().map(|family| {
        let ranges = scenario.nodes.iter().map(|n| family.pick(IpNet::from(n.pods.ipv4), n.pods.ipv6.into()));
        (family.pick("ip", "ip6"), ranges.map(|r| r.to_string()).collect::<Vec<_>>().join(", "))
    });
    families.collect()
}

/// What the CNI of such a node loads: masquerading of what leaves the cluster, the drop of what conntrack calls
/// invalid, and source translation by destination.
fn cni(scenario: &Scenario, node: &Node) -> String {
    let mut text = String::from("table inet lab-cni {\n");
    text.push_str("  chain forward {\n    type filter hook forward priority filter; policy accept;\n    ct state invalid drop\n  }\n");
    text.push_str("  chain postrouting {\n    type nat hook postrouting priority srcnat; policy accept;\n");
    // Writing to a String cannot fail.
    if scenario.is_gateway_node(node) {
        for to in &scenario.hosts.gateway_snat {
            let own = scenario.node_addresses(node).into_iter().find(|ip| Family::of(*ip) == Family::of(to.addr()));
            if let Some(own) = own {
                let l3 = l3(own);
                let _ = writeln!(text, "    oifname \"eth0\" {l3} daddr {to} snat {l3} to {own}");
            }
        }
    }
    if scenario.masquerade {
        for own in scenario.ranges(&node.pods) {
            let l3 = l3(own.addr());
            let all = pod_ranges(scenario).into_iter().find(|(family, _)| *family == l3).unwrap_or_default().1;
            let _ = writeln!(text, "    {l3} saddr {own} {l3} daddr != {{ {all} }} masquerade");
        }
    }
    text.push_str("  }\n}\n");
    text
}

/// `dnat` to one of a service's pods: (pod, port).
fn dnat(pods: &[IpAddr], port: u16) -> String {
    let l3 = l3(pods[0]);
    if let [only] = pods {
        return match only {
            IpAddr::V4(ip) => format!("dnat {l3} to {ip}:{port}"),
            IpAddr::V6(ip) => format!("dnat {l3} to [{ip}]:{port}"),
        };
    }
    let all: Vec<String> = pods.iter().enumerate().map(|(i, ip)| format!("{i} : {ip} . {port}")).collect();
    format!("dnat {l3} to numgen random mod {} map {{ {} }}", pods.len(), all.join(", "))
}

/// kube-proxy's chains, as its rules for iptables say them: translation of service addresses and node ports, its two
/// marks, and the forward chain that drops what is invalid.
fn kube_proxy(scenario: &Scenario) -> Result<String> {
    let mut text = String::from("table inet lab-kube-proxy {\n  chain services {\n");
    for service in &scenario.services {
        translations(scenario, service, &mut text)?;
    }
    text.push_str("  }\n");
    for hook in ["prerouting", "output"] {
        // `dstnat`, which nft knows by name in prerouting only.
        let _ = writeln!(
            text,
            "  chain nat-{hook} {{\n    type nat hook {hook} priority -100; policy accept;\n    jump services\n  }}"
        );
    }
    for hook in ["input", "output"] {
        let _ = writeln!(
            text,
            "  chain firewall-{hook} {{\n    type filter hook {hook} priority filter; policy accept;\n    \
             meta mark & {DROP} == {DROP} drop\n  }}"
        );
    }
    let _ = writeln!(
        text,
        "  chain forward {{\n    type filter hook forward priority filter; policy accept;\n    ct state invalid drop\n    \
         meta mark & {MASQUERADE} == {MASQUERADE} accept\n    ct state established,related accept\n  }}"
    );
    let _ = writeln!(
        text,
        "  chain postrouting {{\n    type nat hook postrouting priority srcnat - 5; policy accept;\n    \
         meta mark & {MASQUERADE} != {MASQUERADE} return\n    meta mark set meta mark ^ {MASQUERADE}\n    \
         masquerade fully-random\n  }}\n}}"
    );
    Ok(text)
}

/// The translations of one service.
fn translations(scenario: &Scenario, service: &Service, text: &mut String) -> Result<()> {
    let (tcp, udp) = service.ports(scenario)?;
    let pods: Vec<IpAddr> = scenario.service_pods(service)?.into_iter().flat_map(Pod::addresses).collect();
    for (l3, ranges) in pod_ranges(scenario) {
        let pods: Vec<IpAddr> = pods.iter().filter(|ip| self::l3(**ip) == l3).copied().collect();
        if pods.is_empty() {
            continue;
        }
        for ip in service.cluster_ips.iter().filter(|ip| self::l3(**ip) == l3) {
            for (l4, ports) in [("tcp", &tcp), ("udp", &udp)] {
                for port in ports {
                    let _ = writeln!(
                        text,
                        "    {l3} saddr != {{ {ranges} }} {l3} daddr {ip} {l4} dport {port} meta mark set meta mark | {MASQUERADE}"
                    );
                    let _ = writeln!(text, "    {l3} daddr {ip} {l4} dport {port} {}", dnat(&pods, *port));
                }
            }
        }
        let nfproto = if l3 == "ip" { "ipv4" } else { "ipv6" };
        for node_port in &service.node_ports {
            for l4 in ["tcp", "udp"] {
                let reaches = format!("meta nfproto {nfproto} fib daddr type local {l4} dport {}", node_port.node_port);
                let _ = writeln!(text, "    {reaches} meta mark set meta mark | {MASQUERADE}");
                let _ = writeln!(text, "    {reaches} {}", dnat(&pods, node_port.port));
            }
        }
    }
    Ok(())
}

/// A host firewall as an administrator sets it for Tidegate: closed, but for pods, the link's own protocols and the
/// tunnel's port.
fn firewall(scenario: &Scenario) -> String {
    let mut text = String::from(
        "table inet lab-firewall {\n  chain input {\n    type filter hook input priority filter; policy drop;\n    \
         iifname \"lo\" accept\n    ct state established,related accept\n    meta l4proto { icmp, ipv6-icmp } accept\n    \
         udp dport 8475 accept\n",
    );
    let pods: BTreeSet<(&str, String)> = pod_ranges(scenario).into_iter().collect();
    for (l3, ranges) in &pods {
        let _ = writeln!(text, "    {l3} saddr {{ {ranges} }} accept");
    }
    text.push_str(
        "  }\n  chain forward {\n    type filter hook forward priority filter; policy drop;\n    \
         ct state established,related accept\n",
    );
    for (l3, ranges) in &pods {
        let _ = writeln!(text, "    {l3} saddr {{ {ranges} }} accept\n    {l3} daddr {{ {ranges} }} accept");
    }
    text.push_str("  }\n}\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_translated_to_one_pod_or_to_any_of_them() {
        let ips: Vec<IpAddr> = ["10.0.0.1", "10.0.0.2"].iter().map(|ip| ip.parse().unwrap()).collect();
        assert_eq!(dnat(&ips[..1], 80), "dnat ip to 10.0.0.1:80");
        assert_eq!(dnat(&ips, 80), "dnat ip to numgen random mod 2 map { 0 : 10.0.0.1 . 80, 1 : 10.0.0.2 . 80 }");
        assert_eq!(dnat(&["fd00::1".parse().unwrap()], 80), "dnat ip6 to [fd00::1]:80");
    }
}
