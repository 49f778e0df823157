//! From the desired state to kernel entries, and their reconciliation.

use std::net::IpAddr;

use ahash::AHashMap;
use ipnet::IpNet;
use tidegate_ebpf_common::Addr;
use tidegate_ebpf_common::layout::{
    Config, DnsKey, Endpoint, FactKey, Gateway, GrantKey, Group, Iface, Naming, Node, Prefix, Scope, config, endpoint,
    group, iface, node, prefix_bits, prefix_key,
};
use tidegate_policy::state::{Entry, EntryKey, NodeState, Touch};
use tidegate_policy::{ClassKey, GroupKey, PortSet, ScopeKey};

use crate::ids::Kind;
use crate::load::{Datapath, is_missing, now_ns, now_secs};
use crate::table::Lpm;
use crate::{Applied, Error, Local, names};

/// All entries as they should be.
#[derive(Default)]
struct Desired {
    config: Config,
    endpoints: AHashMap<Addr, Endpoint>,
    ifaces: AHashMap<u32, Iface>,
    groups: AHashMap<u32, Group>,
    scopes: AHashMap<u32, Scope>,
    gateways: AHashMap<u32, Gateway>,
    nodes: AHashMap<Addr, Node>,
    outer: AHashMap<u32, Addr>,
    grants: AHashMap<GrantKey, u32>,
    prefixes: AHashMap<Lpm, Prefix>,
    cluster: AHashMap<Lpm, u32>,
    cluster_dns: AHashMap<DnsKey, u32>,
    naming: Naming,
}

/// The LPM key of a prefix in a set.
fn lpm(set: u32, net: &IpNet) -> Lpm {
    let addr = Addr::from_ip(net.network());
    (prefix_bits(addr.is_v4()) + u32::from(net.prefix_len()), prefix_key(set, addr))
}

impl Datapath {
    /// Brings every map but the facts to the desired state: updates, deletes and prunes.
    ///
    /// Nothing is done when neither argument changed since the last call. With `full` the kernel's
    /// truth is read again first, so that what others changed is put right.
    ///
    /// # Errors
    /// What the kernel refused; entries before that hold, and the next call goes on from there.
    pub fn apply(&mut self, state: &NodeState, local: &Local, full: bool) -> Result<Applied, Error> {
        if !full && self.last.as_ref().is_some_and(|(s, l)| s == state && l == local) {
            return Ok(Applied::default());
        }
        let mut applied = Applied::default();
        let mut pins = Ok(());
        if full {
            // Without its pins only the next start suffers, and the maps must be right now.
            pins = self.restore_pins(&mut applied.pinned);
            applied.repaired = self.reload()?;
        }
        // After an error nobody knows what the kernel holds of them.
        let before = self.last.take().filter(|_| !full);
        let step = before.and_then(|(old, _)| names::step(&self.name_key, &old, state));
        self.tables.portsets.begin();
        let want = self.desired(state, local)?;
        let named = if step.is_none() { names::entries(&self.name_key, state) } else { AHashMap::new() };
        let t = &mut self.tables;
        // A table that is full or refused must not keep the others from being right: one tenant's prefixes would freeze
        // everybody's policy. What fails is tried again with the next call.
        let mut failed = None;
        let mut try_all = |result: Result<usize, Error>| match result {
            Ok(n) => n,
            Err(e) => {
                failed.get_or_insert(e);
                0
            }
        };
        // What is referred to comes first.
        applied.updated += try_all(t.cluster.fill(&want.cluster))
            + try_all(t.cluster_dns.fill(&want.cluster_dns))
            + try_all(match &step {
                Some(step) => t.names.follow(step),
                None => t.names.fill(&named),
            })
            + try_all(t.nodes.fill(&want.nodes))
            + try_all(t.outer.fill(&want.outer))
            + try_all(t.gateways.fill(&want.gateways))
            + try_all(t.prefixes.fill(&want.prefixes))
            + try_all(t.scopes.fill(&want.scopes))
            + try_all(t.groups.fill(&want.groups))
            + try_all(t.grants.fill(&want.grants))
            + try_all(t.endpoints.fill(&want.endpoints))
            + try_all(t.ifaces.fill(&want.ifaces));
        let held = t.config.get(&0, 0).map_err(Error::map("CONFIG"))?;
        // As others left it, not as it is to change.
        applied.repaired += usize::from(full && self.config.is_some_and(|c| c != held));
        if held != want.config {
            t.config.set(0, want.config, 0).map_err(Error::map("CONFIG"))?;
            applied.updated += 1;
        }
        let held = t.naming.get(&0, 0).map_err(Error::map("NAMING"))?;
        if held != want.naming {
            // Under another key the names are no names.
            applied.repaired += usize::from(full && held.key != [0; 2] && held.key != want.naming.key);
            t.naming.set(0, want.naming, 0).map_err(Error::map("NAMING"))?;
            applied.updated += 1;
        }
        self.config = Some(want.config);
        // What refers goes first.
        applied.deleted += try_all(t.ifaces.prune(&want.ifaces))
            + try_all(t.endpoints.prune(&want.endpoints))
            + try_all(t.grants.prune(&want.grants))
            + try_all(t.groups.prune(&want.groups))
            + try_all(t.scopes.prune(&want.scopes))
            + try_all(t.prefixes.prune(&want.prefixes))
            + try_all(t.gateways.prune(&want.gateways))
            + try_all(t.outer.prune(&want.outer))
            + try_all(t.nodes.prune(&want.nodes))
            + try_all(if step.is_none() { t.names.prune(&named) } else { Ok(0) })
            + try_all(t.cluster_dns.prune(&want.cluster_dns))
            + try_all(t.cluster.prune(&want.cluster));
        self.tried = true;
        if let Some(error) = failed {
            return Err(error);
        }
        t.portsets.finish();
        self.last = Some((state.clone(), local.clone()));
        pins.map(|()| applied)
    }

    /// Brings the maps to a state that differs from the last applied one in these entries only, at their cost: a
    /// gateway's, which has no interfaces. Says whether that was possible; if not, [`Datapath::apply`] must do it. Port sets
    /// that nothing refers to any more stay until then.
    ///
    /// # Errors
    /// What the kernel refused; the next [`Datapath::apply`] puts all right.
    pub fn change(&mut self, set: &[Entry], delete: &[EntryKey]) -> Result<bool, Error> {
        let all_alike =
            |e: &Entry| matches!(e, Entry::Cluster(_) | Entry::Node(..) | Entry::Gateway(..) | Entry::Name(..));
        let all_gone = |k: &EntryKey| {
            matches!(k, EntryKey::Cluster | EntryKey::Node(_) | EntryKey::Gateway(_) | EntryKey::Name(_))
        };
        if set.iter().any(all_alike)
            || delete.iter().any(all_gone)
            || self.last.as_ref().is_none_or(|(_, local)| !local.interfaces.is_empty())
        {
            return Ok(false);
        }
        let Some((mut state, local)) = self.last.take() else { return Ok(false) };
        let mut part = NodeState { gateways: state.gateways.clone(), ..NodeState::default() };
        set.iter().for_each(|e| part.set(e.clone()));
        let mut want = Desired::default();
        self.policy(&part, &local, &mut want)?;
        let mut fresh = self.endpoints(&part, &local, &mut want)?;
        let t = &mut self.tables;
        t.prefixes.fill(&want.prefixes)?;
        t.scopes.fill(&want.scopes)?;
        t.groups.fill(&want.groups)?;
        t.grants.fill(&want.grants)?;
        t.endpoints.fill(&want.endpoints)?;
        for key in delete {
            if let EntryKey::Endpoint(ip) = key {
                let addr = Addr::from_ip(*ip);
                t.endpoints.delete(&addr)?;
                fresh.extend(self.incarnations.forget(&addr));
            }
        }
        // Endpoints refer to groups and scopes, groups to prefixes.
        for key in delete {
            match key {
                EntryKey::Grant(g, c) => {
                    let ids = (self.ids.find(Kind::Group, g.0), self.ids.find(Kind::Class, c.0));
                    if let (Some(group), Some(class)) = ids {
                        t.grants.delete(&GrantKey { group, class })?;
                    }
                }
                EntryKey::Group(g) => {
                    if let Some(id) = self.ids.find(Kind::Group, g.0) {
                        t.groups.delete(&id)?;
                    }
                }
                EntryKey::Scope(s) => {
                    if let Some(id) = self.ids.find(Kind::Scope, s.0) {
                        t.scopes.delete(&id)?;
                    }
                }
                _ => {}
            }
        }
        for key in delete {
            let EntryKey::Prefixes(key) = key else { continue };
            let nets = state.prefixes.get(key).into_iter().flat_map(|p| p.keys());
            if let Some(id) = self.ids.find(Kind::Prefixes, key.0) {
                for net in nets {
                    t.prefixes.delete(&lpm(id, net))?;
                }
            }
        }
        self.forget_flows(&fresh)?;
        delete.iter().for_each(|k| state.delete(k));
        set.iter().for_each(|e| state.set(e.clone()));
        self.last = Some((state, local));
        Ok(true)
    }

    /// Whether the maps are as near to a desired state as they get: an `apply` went through all tables, though some may
    /// not have held everything.
    pub fn is_filled(&self) -> bool {
        self.tried
    }

    /// Adds grants between two calls of [`Datapath::apply`], whose next state must have them too.
    ///
    /// # Errors
    /// What the kernel refused; grants before that hold.
    pub fn grants(&mut self, grants: &[(GroupKey, ClassKey, PortSet)]) -> Result<(), Error> {
        for (g, c, ports) in grants {
            let key = GrantKey { group: self.ids.get(Kind::Group, g.0)?, class: self.ids.get(Kind::Class, c.0)? };
            let set = self.tables.portsets.intern(ports)?;
            self.tables.grants.set(key, set)?;
            if let Some((state, _)) = &mut self.last {
                state.grants.insert((*g, *c), ports.clone());
            }
        }
        Ok(())
    }

    /// The facts that the kernel holds, those of an earlier process too, with when they expire in seconds since boot.
    pub fn held_facts(&self) -> impl Iterator<Item = (ScopeKey, IpAddr, u32)> {
        let mut scopes: Option<AHashMap<u32, ScopeKey>> = None;
        self.told.iter().filter_map(move |(key, (_, expires))| {
            let all = || self.ids.all(Kind::Scope).map(|(id, key)| (id, ScopeKey(key))).collect();
            let scope = scopes.get_or_insert_with(all).get(&key.scope)?;
            Some((*scope, key.addr.to_ip(), *expires))
        })
    }

    /// Deletes the facts that `keep` does not name: what an earlier process learnt and this one knows nothing of.
    /// Returns how many.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn retain_facts(&mut self, keep: impl Fn(ScopeKey, IpAddr) -> bool) -> Result<usize, Error> {
        let scopes: AHashMap<u32, ScopeKey> = self.ids.all(Kind::Scope).map(|(id, key)| (id, ScopeKey(key))).collect();
        let gone: Vec<FactKey> = self
            .facts
            .keys()
            .flatten()
            .filter(|k| !scopes.get(&k.scope).is_some_and(|s| keep(*s, k.addr.to_ip())))
            .collect();
        for key in &gone {
            self.told.remove(key);
            match self.facts.remove(key) {
                Ok(()) => {}
                Err(e) if is_missing(&e) => {}
                Err(e) => return Err(Error::map("FACTS")(e)),
            }
        }
        Ok(gone.len())
    }

    /// Pins that others removed: without them an agent that restarts would begin with empty maps. Counts them in `n`.
    fn restore_pins(&mut self, n: &mut usize) -> Result<(), Error> {
        let folder = self.root.join("maps");
        for (name, map) in &self.pinned {
            let path = folder.join(name);
            if path.exists() {
                continue;
            }
            std::fs::create_dir_all(&folder).map_err(Error::io(format!("cannot make {}", folder.display())))?;
            map.pin(&path)
                .map_err(|e| Error::io(format!("cannot pin {}", path.display()))(std::io::Error::other(e)))?;
            *n += 1;
        }
        Ok(())
    }

    fn reload(&mut self) -> Result<usize, Error> {
        let t = &mut self.tables;
        Ok(t.cluster.reload()?
            + t.cluster_dns.reload()?
            + t.names.reload()?
            + t.nodes.reload()?
            + t.outer.reload()?
            + t.gateways.reload()?
            + t.prefixes.reload()?
            + t.scopes.reload()?
            + t.groups.reload()?
            + t.grants.reload()?
            + t.endpoints.reload()?
            + t.ifaces.reload()?
            + t.portsets.repair()?)
    }

    fn desired(&mut self, state: &NodeState, local: &Local) -> Result<Desired, Error> {
        let mut want = Desired::default();
        self.places(state, local, &mut want)?;
        self.policy(state, local, &mut want)?;
        self.pods(state, local, &mut want)?;
        let mut flags = 0;
        if local.drop_unknown {
            flags |= config::DROP_UNKNOWN;
        }
        if state.cluster.ping {
            flags |= config::PING;
        }
        // An empty range where there are no such ports.
        let (node_port_lo, node_port_hi) = state.cluster.node_ports.unwrap_or((1, 0));
        let plugged = local.plugged.as_ref();
        want.config = Config {
            flags,
            node_port_lo,
            node_port_hi,
            tunnel: local.tunnel_ifindex,
            tgq: plugged.map_or(0, |p| p.tgq),
            tgh: plugged.map_or(0, |p| p.tgh),
            node: self.ids.named(Kind::Node, &local.node)?,
        };
        Ok(want)
    }

    /// Nodes, gateways, the cluster set.
    fn places(&mut self, state: &NodeState, local: &Local, want: &mut Desired) -> Result<(), Error> {
        // The tunnel's outer family: IPv4 where both ends have it.
        let own = state.nodes.get(&local.node);
        let prefer_v4 = own.is_none_or(|n| n.addresses.is_empty() || n.addresses.iter().any(|a| a.is_ipv4()));
        for (name, value) in &state.nodes {
            let id = self.ids.named(Kind::Node, name)?;
            let gateway = state.gateways.values().any(|g| g.node == *name);
            let flags = if gateway { node::GATEWAY } else { 0 };
            for address in &value.addresses {
                want.nodes.insert(Addr::from_ip(*address), Node { id, flags });
            }
            let outer = value.addresses.iter().find(|a| a.is_ipv4() == prefer_v4).or(value.addresses.first());
            if let Some(outer) = outer {
                want.outer.insert(id, Addr::from_ip(*outer));
            }
        }
        for (name, value) in &state.gateways {
            let tgq = local.plugged.as_ref().filter(|p| p.gateway == *name).map_or(0, |p| p.tgq);
            let node = self.ids.named(Kind::Node, &value.node)?;
            want.gateways.insert(self.ids.named(Kind::Gateway, name)?, Gateway { node, tgq });
        }
        for net in &state.cluster.prefixes {
            want.cluster.insert(lpm(0, net), 1);
        }
        for server in &state.cluster.dns {
            let key = DnsKey { addr: Addr::from_ip(server.ip()), port: u32::from(server.port()) };
            want.cluster_dns.insert(key, 1);
        }
        want.naming = names::naming(self.name_key, &state.cluster.suffixes);
        Ok(())
    }

    /// Prefix sets, scopes, groups, grants.
    fn policy(&mut self, state: &NodeState, local: &Local, want: &mut Desired) -> Result<(), Error> {
        for (key, prefixes) in &state.prefixes {
            let set = self.ids.get(Kind::Prefixes, key.0)?;
            for (net, ports) in prefixes {
                let value = Prefix { ports: self.tables.portsets.intern(ports)?, len: u32::from(net.prefix_len()) };
                want.prefixes.insert(lpm(set, net), value);
            }
        }
        for (key, scope) in &state.scopes {
            let owner = self.ids.named(Kind::Gateway, &scope.owner)?;
            let pair = u32::from(scope.pair);
            let speaks = |g: &&String| !local.silent.contains(*g) && state.gateways.contains_key(*g);
            let answers = std::iter::once(&scope.owner).chain(&scope.standbys).find(speaks);
            let dns = answers.map_or(Ok(0), |g| self.ids.named(Kind::Gateway, g))?;
            want.scopes.insert(self.ids.get(Kind::Scope, key.0)?, Scope { owner, pair, dns });
        }
        let drain = u32::try_from(self.options.drain.as_secs()).unwrap_or(u32::MAX);
        for (key, value) in &state.groups {
            let id = self.ids.get(Kind::Group, key.0)?;
            let before = self.tables.groups.get(&id).copied().unwrap_or_default();
            let mut flags = 0;
            if value.isolated {
                flags |= group::ISOLATED;
            }
            if value.audit {
                flags |= group::AUDIT;
            }
            let leaves_audit = before.flags & group::AUDIT != 0 && !value.audit;
            let set = |ids: &mut crate::ids::Ids, key: Option<tidegate_policy::PrefixSetKey>| {
                key.map_or(Ok(0), |k| ids.get(Kind::Prefixes, k.0))
            };
            want.groups.insert(
                id,
                Group {
                    flags,
                    admin: set(&mut self.ids, value.admin)?,
                    own: set(&mut self.ids, value.own)?,
                    drain: if leaves_audit { now_secs().saturating_add(drain) } else { before.drain },
                },
            );
        }
        for ((g, c), ports) in &state.grants {
            let key = GrantKey { group: self.ids.get(Kind::Group, g.0)?, class: self.ids.get(Kind::Class, c.0)? };
            want.grants.insert(key, self.tables.portsets.intern(ports)?);
        }
        Ok(())
    }

    /// Endpoints and interfaces.
    fn pods(&mut self, state: &NodeState, local: &Local, want: &mut Desired) -> Result<(), Error> {
        for ifindex in &local.untouched {
            want.ifaces.insert(*ifindex, Iface { kind: iface::UNTOUCHED, mac: [0; 6] });
        }
        let mut fresh = self.endpoints(state, local, want)?;
        for (devices, kind) in [(&local.inside, iface::INSIDE), (&local.tunnels, iface::TUNNEL)] {
            for ifindex in devices {
                want.ifaces.entry(*ifindex).or_insert(Iface { kind, mac: [0; 6] });
            }
        }
        fresh.extend(self.incarnations.retain(|addr| want.endpoints.contains_key(addr)));
        self.forget_flows(&fresh)?;
        for uplink in &local.uplinks {
            want.ifaces.insert(uplink.ifindex, Iface { kind: iface::UPLINK, mac: uplink.mac });
        }
        Ok(())
    }

    /// Other pods have these addresses now, or none.
    fn forget_flows(&mut self, addrs: &[Addr]) -> Result<(), Error> {
        for addr in addrs {
            // The next pod's budget is its own; the sweep removes the flows.
            match self.flow_counts.remove(addr) {
                Err(e) if !is_missing(&e) => return Err(Error::map("FLOW_COUNTS")(e)),
                _ => {}
            }
        }
        Ok(())
    }

    /// The endpoints of a state. Returns the addresses that other pods have now.
    fn endpoints(&mut self, state: &NodeState, local: &Local, want: &mut Desired) -> Result<Vec<Addr>, Error> {
        // Milliseconds; the sweep forgets flows long before they wrap.
        let now = (now_ns() / 1_000_000) as u32;
        let mut fresh = Vec::new();
        for (ip, value) in &state.endpoints {
            let interface = local.interfaces.get(ip).filter(|_| value.node == local.node);
            let flags = match value.touch {
                Touch::Untouched => 0,
                Touch::Guarded => endpoint::TOUCHED,
                Touch::Isolated => endpoint::TOUCHED | endpoint::ISOLATED,
            };
            let (scope, group) = match value.member {
                Some((s, g)) => (self.ids.get(Kind::Scope, s.0)?, self.ids.get(Kind::Group, g.0)?),
                None => (0, 0),
            };
            let addr = Addr::from_ip(*ip);
            let mut endpoint = Endpoint {
                scope,
                group,
                node: self.ids.named(Kind::Node, &value.node)?,
                ifindex: interface.map_or(0, |i| i.ifindex),
                mac: interface.map_or([0; 6], |i| i.mac),
                flags,
                incarnation: 0,
            };
            let (incarnation, new) = self.incarnations.of(addr, &endpoint, (&value.namespace, &value.pod), now);
            endpoint.incarnation = incarnation;
            want.endpoints.insert(addr, endpoint);
            if new {
                fresh.push(addr);
            }
            let Some(interface) = interface else { continue };
            // One touched address makes the whole interface touched.
            let kind = if flags == 0 { iface::UNTOUCHED } else { iface::ENDPOINT };
            let entry = want.ifaces.entry(interface.ifindex).or_insert(Iface { kind, mac: [0; 6] });
            if kind == iface::ENDPOINT {
                entry.kind = kind;
            }
        }
        Ok(fresh)
    }
}
