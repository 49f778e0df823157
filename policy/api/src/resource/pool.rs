//! Pools of egress addresses.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::LabelSelector;
use crate::convert::{MAX_EXTERNAL, MAX_PAIRS};
use crate::format::MAX_INTERFACE;
use crate::schema;

/// What the pool is.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = schema::rules(&[
    schema::Cel {
        rule: "self.addressSource != 'Static' || has(self.static)",
        message: "`static` is required with `addressSource: Static`",
        path: ".static",
    },
    schema::Cel {
        rule: "self.addressSource == 'Static' || !has(self.static)",
        message: "belongs to `addressSource: Static`; with PodNetwork leave it out",
        path: ".static",
    },
])))]
pub struct EgressPoolSpec {
    /// The nodes whose gateways may hold the pool's addresses. Absent: any node that runs a gateway.
    pub gateway_node_selector: Option<LabelSelector>,
    /// The namespaces that may use the pool, by their labels. Absent: none. Empty ({}): every namespace.
    pub allowed_namespaces: Option<LabelSelector>,
    /// Where traffic of the pool leaves.
    pub address_source: AddressSource,
    /// The addresses. Required with addressSource Static, and only there.
    #[serde(rename = "static")]
    pub fixed: Option<StaticSource>,
    /// What the world sees, as addresses or prefixes: for people, without effect. For PodNetwork, where a cloud NAT
    /// may give the address. At most 64.
    #[serde(default)]
    #[schemars(
        with = "Vec<schema::AddressOrCidr>",
        length(max = MAX_EXTERNAL),
        extend("x-kubernetes-list-type" = "atomic")
    )]
    pub external_addresses: Vec<String>,
}

/// Where a pool's traffic leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
pub enum AddressSource {
    /// With addresses that the gateway's node announces by ARP and neighbour advertisements, and that move to another node within 3 seconds.
    Static,
    /// As the gateway's pod leaves by itself: with its node's address, or through a cloud NAT; a failover may change the address.
    PodNetwork,
}

/// Addresses that the gateway's node announces.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StaticSource {
    /// The uplink of the gateway's node on which the addresses are announced, such as eth1. 1 to 15 characters. Absent: the
    /// interface that the node's routes choose.
    #[schemars(length(min = 1, max = MAX_INTERFACE), regex(pattern = schema::INTERFACE))]
    pub interface: Option<String>,
    /// The pairs of addresses, 1 to 64. Each namespace is given one pair and keeps it, also when pairs are added.
    #[schemars(
        length(min = 1, max = MAX_PAIRS),
        extend(
            "x-kubernetes-list-type" = "atomic",
            "x-kubernetes-validations" = schema::rules(&[
                schema::Cel {
                    rule: &schema::unique("self.filter(a, has(a.ipv4)).map(a, a.ipv4)"),
                    message: "an `ipv4` is in the pool twice",
                    path: "",
                },
                schema::Cel {
                    // Two texts can be the same address, and CEL's budget knows no bound of addresses in a list of its own.
                    rule: "self.all(a, !has(a.ipv6) || !isIP(a.ipv6) || \
                           self.exists_one(b, has(b.ipv6) && isIP(b.ipv6) && ip(b.ipv6) == ip(a.ipv6)))",
                    message: "an `ipv6` is in the pool twice",
                    path: "",
                },
            ])
        )
    )]
    pub addresses: Vec<PairSpec>,
}

/// An IPv4 and an IPv6 address, or one of them, that are held by the same gateway and move together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = schema::rules(&[
    schema::Cel { rule: "has(self.ipv4) || has(self.ipv6)", message: "needs `ipv4`, `ipv6` or both", path: "" },
    schema::Cel {
        rule: "!has(self.ipv4) || !isIP(self.ipv4) || ip(self.ipv4).isGlobalUnicast() && \
               !cidr('0.0.0.0/8').containsIP(self.ipv4) && !cidr('240.0.0.0/4').containsIP(self.ipv4)",
        message: "cannot be the source of a connection",
        path: ".ipv4",
    },
    schema::Cel {
        rule: "!has(self.ipv6) || isIP(self.ipv6) && ip(self.ipv6).isGlobalUnicast()",
        message: "cannot be the source of a connection",
        path: ".ipv6",
    },
])))]
pub struct PairSpec {
    /// The IPv4 address, such as 203.0.113.10. Not loopback, link-local or multicast.
    #[schemars(with = "Option<schema::Ipv4>")]
    pub ipv4: Option<String>,
    /// The IPv6 address, such as 2001:db8::10. Not loopback, link-local or multicast.
    #[schemars(with = "Option<schema::Ipv6>")]
    pub ipv6: Option<String>,
    /// Whether the pair is given to namespaces.
    #[serde(default)]
    pub state: PairState,
}

/// The state of a pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum PairState {
    /// It is.
    #[default]
    Active,
    /// It takes no new connections: namespaces are given another pair that its gateway holds, and those that have none go on
    /// with it. Connections that live go on. Remove it when status says that it has drained: what still leaves with it ends then.
    Draining,
}
