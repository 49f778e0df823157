//! The agent's configuration file (YAML). Unknown keys are refused, so that a
//! misspelt restriction never means "no restriction".

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tidegate_ebpf::{Capacities, OVERLAYS};
use tidegate_identity::is_name;

/// Where the node agent finds its gateways, its pods and its kernel state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Config {
    /// This node's name, as its Node object has it. Absent: the environment's `NODE_NAME`.
    #[serde(default)]
    pub node: String,
    /// Every gateway replica. This or `discover`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gateways: Vec<GatewayAddress>,
    /// Where the gateways are found. This or `gateways`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub discover: Option<Discover>,
    /// The agent's own identity and the authority that signed the gateways', in files. This or `join`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
    /// How the agent gets its identity from a gateway. This or `tls`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub join: Option<Join>,
    /// The Unix socket on which a gateway of this node hands over its network namespace.
    #[serde(default = "default_socket")]
    pub socket: PathBuf,
    /// The chained CNI plugin, which asks this agent before a new pod starts. Absent: none is answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cni: Option<Cni>,
    /// The folder for pinned programs and maps; on a mounted bpffs.
    #[serde(default = "default_pins")]
    pub pins: PathBuf,
    /// UDP port of the tunnel between nodes, the same on all nodes. Not 4789 or 8472, which other overlays use.
    #[serde(default = "default_tunnel_port")]
    pub tunnel_port: u16,
    /// Largest packet inside the tunnel, in bytes, 1280 to 9000. Absent: the smallest uplink MTU less the
    /// encapsulation (50 bytes, 70 where an uplink has a global IPv6 address).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tunnel_mtu: Option<u16>,
    /// The bits of the packet mark that say "the verdict let this pass".
    #[serde(default)]
    pub mark: Mark,
    /// UDP ports at which nodes unpack the network plugin's tunnels. Pods that a policy selects send nothing there.
    #[serde(default = "default_overlay_ports")]
    pub overlay_ports: BTreeSet<u16>,
    /// Devices towards the rest of the network. Absent: the devices of the default routes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uplinks: Option<Vec<String>>,
    /// How a pod's host-side interface is found.
    #[serde(default)]
    pub interfaces: Interfaces,
    /// What happens to packets of pods that no gateway has told of.
    #[serde(default)]
    pub unknown_pods: UnknownPods,
    /// Flows that the kernel remembers per pod address, 16 to 262144: those from outside, audited ones, UDP. All pods
    /// of a node share `capacities.flows`.
    #[serde(default = "default_flows_per_endpoint")]
    pub flows_per_endpoint: u32,
    /// How long connections that passed in audit still pass once their namespace enforces, in seconds, 0 to 3600.
    #[serde(default = "default_drain_seconds")]
    pub drain_seconds: u32,
    /// Sizes of the kernel's maps. A change makes a new set of maps, and the agent moves over to it.
    #[serde(default)]
    pub capacities: Capacities,
    /// How often everything in the kernel is compared with what should be there, in seconds, 1 to 3600.
    #[serde(default = "default_full_pass_seconds")]
    pub full_pass_seconds: u32,
    /// Address of `/metrics`, `/healthz`, `/readyz` and `/config`. Absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admin: Option<SocketAddr>,
    /// Where audit records go. Absent: stdout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audit: Option<Audit>,
}

/// A gateway replica's control endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct GatewayAddress {
    /// Its name; its certificate must be for `NAME.gateway.tidegate`.
    pub name: String,
    /// Its gRPC address and port.
    pub address: SocketAddr,
}

/// A name whose addresses are the gateways'. What they are called is in their certificates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Discover {
    /// A DNS name, such as a headless Service's `tidegate-gateway.tidegate-system.svc.cluster.local`. Asked for with the
    /// system's resolver; the first 64 addresses count.
    pub service: String,
    /// The port of the gateways' control endpoints.
    #[serde(default = "default_control_port")]
    pub port: u16,
    /// A DNS name that leads to any one of them, at the same port: a Service with an address of its own. Tried while none is
    /// connected, since DNS servers remember for a while that a headless Service had no addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrance: Option<String>,
}

/// What the agent has to do with the CNI plugin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Cni {
    /// Folder of the plugin's socket and of its records of pods. The same path on the node, not on a disk.
    #[serde(default = "default_cni_folder")]
    pub folder: PathBuf,
    /// The file that says what holds while no agent runs. The same path on the node, on a disk.
    #[serde(default = "default_standing")]
    pub standing: PathBuf,
    /// Folder of CNI plugins into which the agent puts its own. Absent, as `conf_dir`: somebody else does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bin_dir: Option<PathBuf>,
    /// Folder of network configurations, to whose first the agent adds the plugin.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conf_dir: Option<PathBuf>,
}

/// How a certificate is got: a gateway gives it to whoever shows a ServiceAccount token of a pod on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Join {
    /// The projected token, for the audience that the gateways want (`tidegate`). Read each time that it is shown.
    pub token: PathBuf,
    /// The authorities that sign gateways' certificates, PEM. Read again when it changes.
    pub ca: PathBuf,
    /// Folder of the certificate and its key, which serve until they end when the agent restarts. Not on a disk, and
    /// nobody else's.
    #[serde(default = "default_folder")]
    pub folder: PathBuf,
}

/// PEM files of a mutual TLS identity. They are read again at every connect, so that rotation needs no restart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Tls {
    /// Certificate chain, leaf first; the leaf is for `NODE.node.tidegate`.
    pub certificate: PathBuf,
    /// Private key.
    pub key: PathBuf,
    /// The authority that signed the gateways' certificates.
    pub ca: PathBuf,
}

/// Bits of the packet mark. [`Mark::cluster`] is a second value inside the mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Mark {
    /// The value inside the mask; not zero.
    pub value: u32,
    /// The bits that are ours.
    pub mask: u32,
}

impl Mark {
    /// The value of packets that pass because their destination belongs to the cluster: `value` with another lowest
    /// bit inside the mask, or with another second lowest where that would leave nothing.
    pub fn cluster(self) -> u32 {
        let lowest = self.mask & self.mask.wrapping_neg();
        let rest = self.mask & !lowest;
        let second = rest & rest.wrapping_neg();
        if self.value == lowest { self.value | second } else { self.value ^ lowest }
    }
}

impl Default for Mark {
    fn default() -> Self {
        Self { value: 0x0020_0000, mask: 0x00f0_0000 }
    }
}

/// How a pod's host-side interface is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Interfaces {
    /// By the `/32` or `/128` route to the pod (ptp, Calico, AWS).
    #[default]
    HostRoute,
    /// By the neighbour and forwarding tables of a bridge (bridge, flannel).
    Bridge,
}

/// What happens to packets of pods that no gateway has told of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum UnknownPods {
    /// They take the network plugin's path.
    #[default]
    Pass,
    /// They do not leave the node, once a first complete snapshot has arrived.
    Drop,
}

/// Where audit records go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Audit {
    /// A file of JSON lines.
    pub file: PathBuf,
}

fn default_socket() -> PathBuf {
    PathBuf::from("/run/tidegate/plug/agent.sock")
}

fn default_pins() -> PathBuf {
    PathBuf::from("/sys/fs/bpf/tidegate")
}

fn default_cni_folder() -> PathBuf {
    PathBuf::from(tidegate_cni::files::FOLDER)
}

fn default_standing() -> PathBuf {
    PathBuf::from(tidegate_cni::files::STANDING)
}

fn default_control_port() -> u16 {
    7443
}

fn default_folder() -> PathBuf {
    PathBuf::from("/run/tidegate/identity")
}

fn default_tunnel_port() -> u16 {
    8475
}

fn default_flows_per_endpoint() -> u32 {
    4_096
}

fn default_drain_seconds() -> u32 {
    30
}

fn default_full_pass_seconds() -> u32 {
    30
}

/// VXLAN, flannel's VXLAN, Geneve, WireGuard of Calico and flannel.
fn default_overlay_ports() -> BTreeSet<u16> {
    [4789, 8472, 6081, 51_820, 51_821].into()
}

/// Why a configuration is refused: the key and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct ConfigError {
    /// The key, as in the file.
    pub key: &'static str,
    /// What is wrong, in one sentence.
    pub problem: String,
}

fn refuse(key: &'static str, problem: impl Into<String>) -> Result<(), ConfigError> {
    Err(ConfigError { key, problem: problem.into() })
}

impl Config {
    /// Checks what the types cannot say.
    ///
    /// # Errors
    /// The first key that is wrong.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !is_name(&self.node) {
            return refuse("node", format!("{:?} is not a DNS name", self.node));
        }
        match &self.discover {
            None if self.gateways.is_empty() => {
                return refuse("gateways", "at least one gateway is needed, or `discover`");
            }
            Some(_) if !self.gateways.is_empty() => {
                return refuse("discover", "either `gateways` or `discover`, not both");
            }
            Some(d) if !is_name(d.service.strip_suffix('.').unwrap_or(&d.service)) => {
                return refuse("discover.service", format!("{:?} is not a DNS name", d.service));
            }
            Some(Discover { port: 0, .. }) => return refuse("discover.port", "must not be 0"),
            Some(Discover { entrance: Some(name), .. }) if !is_name(name.strip_suffix('.').unwrap_or(name)) => {
                return refuse("discover.entrance", format!("{name:?} is not a DNS name"));
            }
            _ => {}
        }
        match (&self.tls, &self.join) {
            (None, None) => return refuse("tls", "files, or `join`, are needed"),
            (Some(_), Some(_)) => return refuse("join", "either `tls` or `join`, not both"),
            (None, Some(j)) if !j.folder.is_absolute() => return refuse("join.folder", "must be an absolute path"),
            _ => {}
        }
        if self.gateways.len() > 64 {
            return refuse("gateways", "at most 64 gateways are supported");
        }
        let mut seen = BTreeSet::new();
        for g in &self.gateways {
            if !is_name(&g.name) {
                return refuse("gateways.name", format!("{:?} is not a DNS name", g.name));
            }
            if !seen.insert(&g.name) {
                return refuse("gateways.name", format!("{} is named twice", g.name));
            }
            if g.address.port() == 0 {
                return refuse("gateways.address", format!("{} has no port", g.name));
            }
        }
        if matches!(self.tunnel_port, 0 | 4789 | 8472) {
            return refuse("tunnelPort", format!("{} is not usable: take a port of its own", self.tunnel_port));
        }
        if self.tunnel_mtu.is_some_and(|m| !(1280..=9000).contains(&m)) {
            return refuse("tunnelMtu", "must be from 1280 to 9000");
        }
        if self.mark.value == 0 || self.mark.value & !self.mark.mask != 0 {
            return refuse("mark", "the value must not be zero and must lie inside the mask");
        }
        if self.mark.mask.count_ones() < 2 {
            return refuse("mark", "the mask must have room for two values");
        }
        if self.overlay_ports.len() > OVERLAYS || self.overlay_ports.contains(&0) {
            return refuse("overlayPorts", "at most 8 ports, from 1 to 65535");
        }
        if !(16..=262_144).contains(&self.flows_per_endpoint) {
            return refuse("flowsPerEndpoint", "must be from 16 to 262144");
        }
        if self.drain_seconds > 3600 {
            return refuse("drainSeconds", "must be from 0 to 3600");
        }
        if let Err(problem) = self.capacities.validate() {
            return refuse("capacities", problem);
        }
        if !(1..=3600).contains(&self.full_pass_seconds) {
            return refuse("fullPassSeconds", "must be from 1 to 3600");
        }
        if let Some(uplinks) = &self.uplinks {
            if uplinks.is_empty() {
                return refuse("uplinks", "must name a device, or be absent");
            }
            if let Some(bad) =
                uplinks.iter().find(|u| u.is_empty() || u.len() > 15 || u.bytes().any(|b| b == b'/' || b <= b' '))
            {
                return refuse("uplinks", format!("{bad:?} is not a device name"));
            }
        }
        if !self.pins.is_absolute() {
            return refuse("pins", "must be an absolute path");
        }
        if let Some(cni) = &self.cni {
            // The socket's name is added to it.
            if !cni.folder.is_absolute() || cni.folder.as_os_str().len() > 96 {
                return refuse("cni.folder", "must be an absolute path of at most 96 bytes");
            }
            if !cni.standing.is_absolute() {
                return refuse("cni.standing", "must be an absolute path");
            }
            for (key, path) in [("cni.binDir", &cni.bin_dir), ("cni.confDir", &cni.conf_dir)] {
                if path.as_ref().is_some_and(|p| !p.is_absolute()) {
                    return refuse(key, "must be an absolute path");
                }
            }
            if cni.bin_dir.is_some() != cni.conf_dir.is_some() {
                return refuse("cni.binDir", "is needed with cni.confDir, and the other way around");
            }
        }
        if !self.socket.is_absolute() || self.socket.as_os_str().len() > 107 {
            return refuse("socket", "must be an absolute path of at most 107 bytes");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn minimal() -> serde_json::Value {
        serde_json::json!({
            "node": "node-1",
            "gateways": [{"name": "gw-a", "address": "10.244.3.2:7443"}],
            "tls": {"certificate": "/p/tls.crt", "key": "/p/tls.key", "ca": "/p/ca.crt"},
        })
    }

    fn join() -> Join {
        Join { token: "/t".into(), ca: "/c".into(), folder: "/f".into() }
    }

    #[test]
    fn gateways_can_be_found_and_give_the_identity() {
        let c = parse(serde_json::json!({
            "node": "node-1",
            "discover": {
                "service": "tidegate-gateway.tidegate-system.svc.cluster.local",
                "entrance": "tidegate-entrance.tidegate-system.svc.cluster.local",
            },
            "join": {"token": "/var/run/secrets/tidegate/token", "ca": "/etc/tidegate/ca.crt"},
        }));
        c.validate().unwrap();
        assert_eq!(c.discover.unwrap().port, 7443);
        assert_eq!(c.join.unwrap().folder, PathBuf::from("/run/tidegate/identity"));
    }

    fn parse(v: serde_json::Value) -> Config {
        serde_json::from_value(v).unwrap()
    }

    #[test]
    fn defaults_are_the_documented_ones() {
        let c = parse(minimal());
        c.validate().unwrap();
        assert_eq!(c.tunnel_port, 8475);
        assert_eq!(c.mark, Mark { value: 0x0020_0000, mask: 0x00f0_0000 });
        assert_eq!(c.mark.cluster(), 0x0030_0000);
        assert_eq!(c.overlay_ports, [4789, 8472, 6081, 51_820, 51_821].into());
        assert_eq!(c.interfaces, Interfaces::HostRoute);
        assert_eq!(c.unknown_pods, UnknownPods::Pass);
        assert_eq!(c.socket, PathBuf::from("/run/tidegate/plug/agent.sock"));
        assert_eq!(c.pins, PathBuf::from("/sys/fs/bpf/tidegate"));
        assert_eq!((c.full_pass_seconds, c.drain_seconds, c.capacities), (30, 30, Capacities::default()));
        assert_eq!((c.uplinks, c.admin, c.audit, c.tunnel_mtu), (None, None, None, None));
    }

    #[test]
    fn the_two_marks_differ_whatever_the_mask() {
        for (value, mask) in [(1, 3), (2, 3), (3, 3), (0x8000, 0xc000), (0x10, 0xf0), (0x100, 0x8100)] {
            let second = Mark { value, mask }.cluster();
            assert!(second != value && second != 0 && second & !mask == 0, "{value:#x} {mask:#x} {second:#x}");
        }
    }

    #[test]
    fn unknown_keys_are_refused_at_every_level() {
        for (pointer, key) in [("", "unknownpods"), ("/tls", "cert"), ("/gateways/0", "port")] {
            let mut v = minimal();
            v.pointer_mut(pointer).unwrap().as_object_mut().unwrap().insert(key.into(), 1.into());
            assert!(serde_json::from_value::<Config>(v).is_err(), "{pointer}/{key}");
        }
    }

    #[test]
    fn what_cannot_work_is_refused_with_its_key() {
        type Case = (&'static str, fn(&mut Config));
        let cases: &[Case] = &[
            ("node", |c| c.node = "a b".into()),
            ("gateways", |c| c.gateways.clear()),
            ("discover", |c| c.discover = Some(Discover { service: "gw".into(), port: 1, entrance: None })),
            ("discover.service", |c| {
                c.gateways.clear();
                c.discover = Some(Discover { service: "a b".into(), port: 1, entrance: None });
            }),
            ("discover.port", |c| {
                c.gateways.clear();
                c.discover = Some(Discover { service: "gw.svc.cluster.local.".into(), port: 0, entrance: None });
            }),
            ("discover.entrance", |c| {
                c.gateways.clear();
                c.discover = Some(Discover { service: "gw".into(), port: 1, entrance: Some("a b".into()) });
            }),
            ("tls", |c| c.tls = None),
            ("join", |c| c.join = Some(join())),
            ("join.folder", |c| {
                c.tls = None;
                c.join = Some(Join { folder: "x".into(), ..join() });
            }),
            ("gateways.name", |c| c.gateways.push(c.gateways[0].clone())),
            ("gateways.name", |c| c.gateways[0].name = "-x".into()),
            ("gateways.address", |c| c.gateways[0].address.set_port(0)),
            ("tunnelPort", |c| c.tunnel_port = 4789),
            ("tunnelPort", |c| c.tunnel_port = 0),
            ("tunnelMtu", |c| c.tunnel_mtu = Some(1279)),
            ("mark", |c| c.mark.value = 0),
            ("mark", |c| c.mark.value = 0x0100_0000),
            ("mark", |c| c.mark.mask = 0x0020_0000),
            ("overlayPorts", |c| c.overlay_ports = (1..=9).collect()),
            ("overlayPorts", |c| c.overlay_ports = [0].into()),
            ("flowsPerEndpoint", |c| c.flows_per_endpoint = 0),
            ("drainSeconds", |c| c.drain_seconds = 3601),
            ("capacities", |c| c.capacities.flows = 1023),
            ("capacities", |c| c.capacities.facts = (1 << 24) + 1),
            ("fullPassSeconds", |c| c.full_pass_seconds = 0),
            ("fullPassSeconds", |c| c.full_pass_seconds = 3601),
            ("uplinks", |c| c.uplinks = Some(vec![])),
            ("uplinks", |c| c.uplinks = Some(vec!["a/b".into()])),
            ("pins", |c| c.pins = "pins".into()),
            ("socket", |c| c.socket = "sock".into()),
        ];
        for (key, break_it) in cases {
            let mut c = parse(minimal());
            break_it(&mut c);
            assert_eq!(c.validate().unwrap_err().key, *key);
        }
    }
}
