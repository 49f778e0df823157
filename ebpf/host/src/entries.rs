//! How full the kernel's tables are.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::load::Datapath;

impl Datapath {
    /// The interfaces of this machine's pods by address, as they were last written, also by an earlier process.
    pub fn interfaces(&self) -> BTreeMap<IpAddr, u32> {
        let here = self.tables.endpoints.iter().filter(|(_, e)| e.ifindex != 0);
        here.map(|(addr, e)| (addr.to_ip(), e.ifindex)).collect()
    }

    /// How many entries each table holds: of those that programs change as the kernel has them (they are walked, so this
    /// costs a system call an entry), of the others as they were written.
    pub fn entries(&self) -> BTreeMap<&'static str, usize> {
        let t = &self.tables;
        BTreeMap::from([
            ("ENDPOINTS", t.endpoints.iter().count()),
            ("IFACES", t.ifaces.iter().count()),
            ("GROUPS", t.groups.iter().count()),
            ("SCOPES", t.scopes.iter().count()),
            ("GATEWAYS", t.gateways.iter().count()),
            ("NODES", t.nodes.iter().count()),
            ("OUTER", t.outer.iter().count()),
            ("OWN", t.own.iter().count()),
            ("GRANTS", t.grants.iter().count()),
            ("PORTSETS", t.portsets.taken()),
            ("PREFIXES", t.prefixes.iter().count()),
            ("CLUSTER", t.cluster.iter().count()),
            ("CLUSTER_DNS", t.cluster_dns.iter().count()),
            ("NAMES", t.names.iter().count()),
            ("IDS", self.ids.len()),
            ("FACTS", self.facts.keys().flatten().count()),
            ("HEARTBEATS", self.heartbeats.keys().flatten().count()),
            ("HELD", self.held.keys().flatten().count()),
            ("FLOWS", self.flows.keys().flatten().count()),
            ("FLOW_COUNTS", self.flow_counts.keys().flatten().count()),
        ])
    }
}
