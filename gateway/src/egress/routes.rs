//! Links, addresses, policy rules and routes inside the gateway's namespace.
//!
//! | table | holds | reached by |
//! |---|---|---|
//! | 100 | everything is local | intercepted packets (carry TLS and DNS) |
//! | 101 | everything goes to pods | answers: the gateway's own (mark), what comes back from outside, refusals |
//! | 102 | everything goes to the uplink | any egress pair in the mark, our egress addresses as source |
//!
//! What came from a pod and did not pass our nftables rules has no [`CHECKED`] bit and is thrown away by routing.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};
use futures_util::TryStreamExt;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags};
use netlink_packet_route::link::{LinkAttribute, LinkFlags};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use rtnetlink::{Handle, IpVersion, LinkUnspec, RouteMessageBuilder};

use super::nft::{BLOCK, CHECKED, DNS, FORWARD, REPLY, TLS};
use super::{TOWARDS_PODS, TOWARDS_UPLINK};

const LOCAL: u32 = 100;
const PODS: u32 = 101;
const UPLINK: u32 = 102;
/// Our rules' priorities begin here; everything in `FIRST..LAST` is ours.
const FIRST: u32 = 20100;
const LAST: u32 = 20899;

/// One rule: what it selects, and the table; no table throws the packet away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Rule<'a> {
    /// Value and mask.
    mark: Option<(u32, u32)>,
    /// Every other mark.
    invert: bool,
    from: Option<&'a str>,
    source: Option<IpAddr>,
    table: Option<u32>,
}

impl<'a> Rule<'a> {
    fn to(table: u32) -> Self {
        Self { table: Some(table), ..Self::default() }
    }

    fn mark(self, value: u32, mask: u32) -> Self {
        Self { mark: Some((value, mask)), ..self }
    }

    fn from(self, device: &'a str) -> Self {
        Self { from: Some(device), ..self }
    }
}

/// The rules in order; the place gives the priority.
fn wanted<'a>(device: &'a str, addresses: &[IpAddr]) -> Vec<Rule<'a>> {
    let mut rules = vec![
        Rule::to(PODS).mark(REPLY, REPLY),
        Rule::to(LOCAL).mark(TLS, 0xff).from(TOWARDS_PODS),
        Rule::to(LOCAL).mark(DNS, 0xff).from(TOWARDS_PODS),
        // What the stack answers by itself reflects the packet's mark: resets of unknown flows go back to the pod.
        Rule::to(PODS).mark(TLS, 0xff),
        Rule::to(PODS).mark(DNS, 0xff),
        Rule { table: None, ..Rule::default() }.mark(0, CHECKED).from(TOWARDS_PODS),
        Rule::to(PODS).mark(BLOCK, 0xff),
        // Resets of unknown forwarded flows, made by our rules.
        Rule::to(PODS).mark(FORWARD, 0xff).from("lo"),
        Rule::to(PODS).from(TOWARDS_UPLINK),
        Rule::to(PODS).from(device),
        Rule { invert: true, ..Rule::to(UPLINK).mark(0, 0xff00) },
    ];
    rules.extend(addresses.iter().map(|a| Rule { source: Some(*a), ..Rule::to(UPLINK) }));
    rules
}

/// What was not as it should be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// Devices that were down or had another MTU.
    pub devices: usize,
    /// Addresses of `tga` that were missing or too many.
    pub addresses: usize,
    /// Policy rules, likewise.
    pub rules: usize,
    /// Routes that were missing.
    pub routes: usize,
}

/// Makes links, addresses, rules and routes so, and says what was otherwise.
pub async fn apply(device: &str, mtu: u16, addresses: &[IpAddr]) -> Result<Changed> {
    let (connection, handle, _) = rtnetlink::new_connection().context("cannot open a netlink socket")?;
    let task = tokio::spawn(connection);
    let result = apply_with(&handle, device, mtu, addresses).await;
    task.abort();
    result
}

async fn apply_with(handle: &Handle, device: &str, mtu: u16, addresses: &[IpAddr]) -> Result<Changed> {
    let mut changed = Changed::default();
    let lo = set_link(handle, "lo", None, &mut changed).await?;
    let tgp = set_link(handle, TOWARDS_PODS, Some(mtu.into()), &mut changed).await?;
    let tga = set_link(handle, TOWARDS_UPLINK, None, &mut changed).await?;
    changed.addresses = set_addresses(handle, tga, addresses).await?;
    let families: &[bool] = if tidegate_agent::sysctl::has_ipv6() { &[false, true] } else { &[false] };
    for &v6 in families {
        changed.rules += set_rules(handle, v6, &wanted(device, addresses)).await?;
        let present = defaults(handle, v6).await?;
        for (table, index, kind) in
            [(LOCAL, lo, RouteType::Local), (PODS, tgp, RouteType::Unicast), (UPLINK, tga, RouteType::Unicast)]
        {
            if present.contains(&(table, index)) {
                continue;
            }
            set_default(handle, v6, table, index, kind)
                .await
                .with_context(|| format!("cannot set the default route of table {table}"))?;
            changed.routes += 1;
        }
    }
    Ok(changed)
}

/// Removes our rules, and our routes except those that went with their device. The addresses go with `tga`.
pub async fn remove() -> Result<()> {
    let (connection, handle, _) = rtnetlink::new_connection().context("cannot open a netlink socket")?;
    let task = tokio::spawn(connection);
    let result = remove_with(&handle).await;
    task.abort();
    result
}

async fn remove_with(handle: &Handle) -> Result<()> {
    let families: &[bool] = if tidegate_agent::sysctl::has_ipv6() { &[false, true] } else { &[false] };
    for &v6 in families {
        set_rules(handle, v6, &[]).await?;
        for route in our_routes(handle, v6).await? {
            handle.route().del(route).execute().await.context("cannot remove a route")?;
        }
    }
    Ok(())
}

/// Brings a device up and gives its index.
async fn set_link(handle: &Handle, name: &str, mtu: Option<u32>, changed: &mut Changed) -> Result<u32> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    let link = links.try_next().await.with_context(|| format!("the device {name} is not there"))?;
    let link = link.with_context(|| format!("the device {name} is not there"))?;
    let index = link.header.index;
    let right = mtu.is_none_or(|mtu| link.attributes.contains(&LinkAttribute::Mtu(mtu)));
    if link.header.flags.contains(LinkFlags::Up) && right {
        return Ok(index);
    }
    let mut m = LinkUnspec::new_with_index(index).up();
    if let Some(mtu) = mtu {
        m = m.mtu(mtu);
    }
    handle.link().set(m.build()).execute().await.with_context(|| format!("cannot set the device {name} up"))?;
    changed.devices += 1;
    Ok(index)
}

/// The routes of our tables.
async fn our_routes(handle: &Handle, v6: bool) -> Result<Vec<RouteMessage>> {
    let mut request = RouteMessage::default();
    request.header.address_family = if v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let mut routes = Box::pin(handle.route().get(request).execute());
    let mut out = Vec::new();
    while let Some(route) = routes.try_next().await.context("cannot list routes")? {
        if (LOCAL..=UPLINK).contains(&table(&route)) {
            out.push(route);
        }
    }
    Ok(out)
}

fn table(route: &RouteMessage) -> u32 {
    let long = route.attributes.iter().find_map(|a| if let RouteAttribute::Table(t) = a { Some(*t) } else { None });
    long.unwrap_or_else(|| route.header.table.into())
}

/// The default routes of our tables: (table, device).
async fn defaults(handle: &Handle, v6: bool) -> Result<BTreeSet<(u32, u32)>> {
    let mut out = BTreeSet::new();
    for route in our_routes(handle, v6).await? {
        let table = table(&route);
        let device = route.attributes.iter().find_map(|a| if let RouteAttribute::Oif(i) = a { Some(*i) } else { None });
        let kind = if table == LOCAL { RouteType::Local } else { RouteType::Unicast };
        if let Some(device) = device
            && route.header.destination_prefix_length == 0
            && route.header.kind == kind
        {
            out.insert((table, device));
        }
    }
    Ok(out)
}

async fn set_addresses(handle: &Handle, index: u32, wanted: &[IpAddr]) -> Result<usize> {
    let mut have = BTreeSet::new();
    let mut changed = 0;
    let mut stream = handle.address().get().set_link_index_filter(index).execute();
    while let Some(m) = stream.try_next().await.context("cannot list addresses")? {
        let address = m.attributes.iter().find_map(|a| match a {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        });
        match address {
            Some(IpAddr::V6(ip)) if ip.is_unicast_link_local() => {}
            Some(ip) if wanted.contains(&ip) => {
                have.insert(ip);
            }
            _ => {
                handle.address().del(m).execute().await.context("cannot remove an address of tga")?;
                changed += 1;
            }
        }
    }
    for ip in wanted.iter().filter(|ip| !have.contains(ip)) {
        let mut add = handle.address().add(index, *ip, if ip.is_ipv4() { 32 } else { 128 });
        // The agent's responder owns the address on the wire: duplicate detection here would only delay it.
        if ip.is_ipv6() {
            add.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        add.execute().await.with_context(|| format!("cannot add {ip} to tga"))?;
        changed += 1;
    }
    Ok(changed)
}

fn matches(m: &RuleMessage, rule: &Rule<'_>) -> bool {
    let has = |a: RuleAttribute| m.attributes.contains(&a);
    let target = match rule.table {
        Some(t) => {
            m.header.action == RuleAction::ToTable && (u32::from(m.header.table) == t || has(RuleAttribute::Table(t)))
        }
        None => m.header.action == RuleAction::Blackhole,
    };
    let mark = match rule.mark {
        // The kernel leaves a zero mark out of its listing.
        Some((value, mask)) => (value == 0 || has(RuleAttribute::FwMark(value))) && has(RuleAttribute::FwMask(mask)),
        None => !m.attributes.iter().any(|a| matches!(a, RuleAttribute::FwMask(_))),
    };
    let from = match rule.from {
        Some(dev) => has(RuleAttribute::Iifname(dev.into())),
        None => !m.attributes.iter().any(|a| matches!(a, RuleAttribute::Iifname(_))),
    };
    let source = rule.source.is_none_or(|s| has(RuleAttribute::Source(s)));
    target && mark && from && source && m.header.flags.contains(RuleFlags::Invert) == rule.invert
}

async fn set_rules(handle: &Handle, v6: bool, rules: &[Rule<'_>]) -> Result<usize> {
    let version = if v6 { IpVersion::V6 } else { IpVersion::V4 };
    let rules: Vec<(u32, &Rule<'_>)> =
        (FIRST..=LAST).zip(rules).filter(|(_, r)| r.source.is_none_or(|s| s.is_ipv6() == v6)).collect();
    let mut present = BTreeSet::new();
    let mut changed = 0;
    let mut stream = handle.rule().get(version).execute();
    while let Some(m) = stream.try_next().await.context("cannot list rules")? {
        let priority = m.attributes.iter().find_map(|a| match a {
            RuleAttribute::Priority(p) => Some(*p),
            _ => None,
        });
        let Some(priority) = priority.filter(|p| (FIRST..=LAST).contains(p)) else { continue };
        let ours = rules.iter().any(|(p, r)| *p == priority && matches(&m, r));
        // Stale ones of an earlier version, and doubles.
        if !ours || !present.insert(priority) {
            handle.rule().del(m).execute().await.context("cannot remove a stale rule")?;
            changed += 1;
        }
    }
    for (priority, rule) in rules.iter().filter(|(p, _)| !present.contains(p)) {
        let action = if rule.table.is_some() { RuleAction::ToTable } else { RuleAction::Blackhole };
        let mut add = handle.rule().add().priority(*priority).action(action);
        add = add.table_id(rule.table.unwrap_or(0));
        let m = add.message_mut();
        if let Some((value, mask)) = rule.mark {
            m.attributes.push(RuleAttribute::FwMark(value));
            m.attributes.push(RuleAttribute::FwMask(mask));
        }
        if let Some(dev) = rule.from {
            m.attributes.push(RuleAttribute::Iifname(dev.into()));
        }
        if let Some(source) = rule.source {
            m.header.src_len = if v6 { 128 } else { 32 };
            m.attributes.push(RuleAttribute::Source(source));
        }
        if rule.invert {
            m.header.flags |= RuleFlags::Invert;
        }
        m.header.family = if v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
        add.execute().await.with_context(|| format!("cannot add the rule with priority {priority}"))?;
        changed += 1;
    }
    Ok(changed)
}

async fn set_default(handle: &Handle, v6: bool, table: u32, index: u32, kind: RouteType) -> Result<()> {
    let scope = if kind == RouteType::Local { RouteScope::Host } else { RouteScope::Link };
    let message = if v6 {
        RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(Ipv6Addr::UNSPECIFIED, 0)
            .output_interface(index)
            .table_id(table)
            .kind(kind)
            .protocol(RouteProtocol::Static)
            .build()
    } else {
        RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(Ipv4Addr::UNSPECIFIED, 0)
            .output_interface(index)
            .table_id(table)
            .kind(kind)
            .scope(scope)
            .protocol(RouteProtocol::Static)
            .build()
    };
    handle.route().add(message).replace().execute().await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn sh(line: &str) -> String {
        let out = Command::new("sh").args(["-c", line]).output().unwrap();
        assert!(out.status.success(), "{line}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    }

    #[test]
    fn applied_twice_and_repaired() {
        std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            sh("ip link add tgp type veth peer name tgq; ip link add tga type veth peer name tgh; ip link add eth0 type veth peer name e1; ip rule add pref 5000 lookup 77");
            let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let a: IpAddr = "203.0.113.10".parse().unwrap();
            let b: IpAddr = "2001:db8::10".parse().unwrap();
            rt.block_on(apply("eth0", 1450, &[a, b])).unwrap();
            let before = sh("ip rule; ip -6 rule; ip route show table all; ip -6 route show table 101; ip addr show tga | grep inet");
            rt.block_on(apply("eth0", 1450, &[a, b])).unwrap();
            let again = sh("ip rule; ip -6 rule; ip route show table all; ip -6 route show table 101; ip addr show tga | grep inet");
            assert_eq!(before, again, "a second run changes nothing");
            assert_eq!(rt.block_on(apply("eth0", 1450, &[a, b])).unwrap(), Changed::default());
            assert!(before.contains("not from all fwmark 0/0xff00 lookup 102"), "{before}");
            assert!(before.contains("203.0.113.10/32") && before.contains("2001:db8::10/128"));
            sh("ip rule del pref 20101; ip route flush table 101; ip addr del 203.0.113.10/32 dev tga; ip addr add 203.0.113.99/32 dev tga");
            sh("ip link set tgp mtu 1400; ip -6 route del default table 100; ip -6 rule del pref 20100");
            let changed = rt.block_on(apply("eth0", 1450, &[a, b])).unwrap();
            // A kernel takes a device's IPv4 routes away with its last IPv4 address.
            assert!(matches!(changed, Changed { devices: 1, addresses: 2, rules: 2, routes: 2..=3 }), "{changed:?}");
            let repaired = sh("ip rule; ip -6 rule; ip route show table all; ip -6 route show table 101");
            assert!(repaired.contains("iif tgp fwmark 0x2/0xff lookup 100") || repaired.contains("fwmark 0x2/0xff iif tgp lookup 100"), "{repaired}");
            assert!(repaired.contains("0/0x20000") && repaired.contains("blackhole"), "{repaired}");
            assert!(repaired.contains("from 203.0.113.10 lookup 102"), "{repaired}");
            assert!(repaired.contains("default dev tgp table 101"), "{repaired}");
            assert!(repaired.contains("lookup 77"), "foreign rules stay");
            let addresses = sh("ip addr show tga");
            assert!(addresses.contains("203.0.113.10/32") && !addresses.contains("203.0.113.99"), "{addresses}");
            for _ in 0..2 {
                rt.block_on(remove()).unwrap();
                let left = sh("ip rule; ip -6 rule; ip route show table all; ip -6 route show table all");
                assert!(!left.contains("lookup 10") && !left.contains("table 10") && !left.contains("blackhole"), "{left}");
                assert!(left.contains("lookup 77"), "foreign rules stay");
            }
        })
        .join()
        .unwrap();
    }
}
