//! Passes of the reconciler: from what should be to what the kernel holds.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::AsFd;

use tidegate_ebpf::{Error, Interface, Local, OWN_ADDRESSES, Place, Plugged, Program};
use tidegate_policy::state::Touch;

use super::{Gateway, Node, SETTLE, STEPS_PER_SECOND, acknowledge};
use crate::config::{Interfaces, UnknownPods};
use crate::devices::{EGRESS_SIDE, POD_SIDE, TUNNEL};
use crate::events;
use crate::guard::Desired;
use crate::links::{Kind, Link};
use crate::places::Who;

/// The most neighbours to ask for in one second.
const MAX_RESOLVE: usize = 64;
/// The programs of a pod's interface.
const POD_PROGRAMS: [Program; 2] = [Program::PodEgress, Program::PodIngress];

impl Node {
    /// Reads the node's network anew, puts the tunnel device back if it is gone, finds the pods.
    pub(super) async fn refresh(&mut self) {
        let tunnel = self.topology.by_name(TUNNEL).map(|l| (l.kind, l.up));
        let wanted = Kind::Vxlan { port: self.config.tunnel_port, external: true };
        let read = async {
            let mut topology = self.netlink.topology(self.config.interfaces).await?;
            let now = topology.by_name(TUNNEL).map(|l| (l.kind, l.up));
            if now != Some((wanted, true)) {
                if tunnel.is_some() {
                    tracing::warn!("device {TUNNEL} was changed by somebody else; putting it back");
                    events::repaired("device", 1);
                }
                self.netlink.ensure_tunnel(self.config.tunnel_port).await?;
                topology = self.netlink.topology(self.config.interfaces).await?;
            }
            Ok::<_, crate::links::LinkError>(topology)
        };
        match read.await {
            Ok(topology) => {
                self.topology = topology;
                self.problems.remove("links");
            }
            Err(e) => drop(self.problems.insert("links", format!("the node's network cannot be read: {e}"))),
        }
        self.find_pods().await;
    }

    /// Tells the kernel the node's own addresses.
    pub(super) fn own_addresses(&mut self, full: bool) {
        let all = self.topology.own(&self.underlay());
        let told = self.datapath.addresses(&all, full);
        if let Ok(repaired) = told {
            events::repaired("map", repaired);
        }
        let left = all.len().saturating_sub(OWN_ADDRESSES);
        let text = format!("the node has {} addresses: {left} of them are not told to the kernel", all.len());
        self.problem("own addresses", (left > 0).then_some(text));
        self.problem("addresses", told.err().map(|e| format!("the kernel does not hold the node's addresses: {e}")));
    }

    /// Which interface leads to which of this node's pods, and the pods' hardware addresses.
    async fn find_pods(&mut self) {
        let links = &self.topology.links;
        let pods: BTreeSet<IpAddr> = self.local_pods().collect();
        let how = self.config.interfaces;
        // What made the pod's network knows best.
        let told = |ip: IpAddr| self.pods.device(ip).filter(|index| links.contains_key(index));
        let said = |ip: IpAddr| told(ip).or_else(|| self.topology.interface(ip, how).map(|l| l.index));
        if how == Interfaces::HostRoute {
            self.interfaces.retain(|ip, index| pods.contains(ip) && links.contains_key(index));
            self.interfaces.extend(pods.into_iter().filter_map(|ip| Some((ip, said(ip)?))));
        } else if self.settled() {
            // Before that nobody knows which pods there are.
            let who = |ip: IpAddr| {
                let e = self.merged.endpoints.get(&ip)?;
                Some((ip, Who { pod: (&*e.namespace, &*e.pod), touch: e.touch }))
            };
            let pods: BTreeMap<IpAddr, Who<'_>> = pods.into_iter().filter_map(who).collect();
            self.places.follow(&pods, |index| links.contains_key(&index), said);
            self.interfaces = self.places.found();
            let refused = self.places.refused();
            let text = refused.first().map(|ip| {
                format!("{ip} answers behind another pod's interface ({} in all): not believed", refused.len())
            });
            self.problem("neighbours", text);
        }
        let links = &self.topology.links;
        self.pod_macs.retain(|index, _| links.contains_key(index));
        let unknown: BTreeSet<u32> =
            self.interfaces.values().filter(|i| !self.pod_macs.contains_key(i)).copied().collect();
        for index in unknown {
            let Some(link) = self.topology.links.get(&index) else { continue };
            match self.netlink.peer_mac(link).await {
                Ok(mac) => drop(self.pod_macs.insert(index, mac)),
                Err(error) => tracing::debug!(device = link.name, %error, "the pod's hardware address is not known"),
            }
        }
    }

    /// Addresses of this node's pods. Pods in the node's own network have no interface of their own and are not managed.
    fn local_pods(&self) -> impl Iterator<Item = IpAddr> {
        let local = self.merged.endpoints.iter().filter(|(_, e)| e.node == self.config.node);
        local.map(|(ip, _)| *ip).filter(|ip| !self.topology.is_own(*ip))
    }

    /// Asks for pods that are in no neighbour table yet.
    pub(super) async fn resolve(&mut self) {
        if self.config.interfaces != Interfaces::Bridge {
            return;
        }
        let missing: Vec<IpAddr> =
            self.local_pods().filter(|ip| !self.interfaces.contains_key(ip)).take(MAX_RESOLVE).collect();
        for ip in missing {
            let Some(bridge) = self.topology.bridge(ip) else { continue };
            if let Err(error) = self.netlink.resolve(bridge, ip).await {
                tracing::debug!(%ip, %error, "the pod cannot be looked for");
            }
        }
    }

    /// What only this node knows.
    pub(super) fn local(&self) -> Local {
        let index = |name: &str| self.topology.by_name(name).map(|l| l.index);
        let interface = |(ip, index): (&IpAddr, &u32)| {
            (*ip, Interface { ifindex: *index, mac: self.pod_macs.get(index).copied().unwrap_or_default() })
        };
        let plugged = match (index(POD_SIDE), index(EGRESS_SIDE), self.plugged_name()) {
            (Some(tgq), Some(tgh), Some(gateway)) => Some(Plugged { gateway, tgq, tgh }),
            _ => None,
        };
        Local {
            node: self.config.node.clone(),
            tunnel_ifindex: index(TUNNEL).unwrap_or(0),
            interfaces: self.interfaces.iter().map(interface).collect(),
            untouched: BTreeSet::new(),
            inside: self.topology.inside(&self.underlay()),
            tunnels: self.tunnels().map(|l| l.index).collect(),
            plugged,
            uplinks: self.uplinks().iter().map(|l| Interface { ifindex: l.index, mac: l.mac }).collect(),
            silent: self.silent.clone(),
            drop_unknown: self.config.unknown_pods == UnknownPods::Drop,
        }
    }

    fn underlay(&self) -> Vec<&Link> {
        let own = self.merged.nodes.get(&self.config.node).map_or(&[][..], |n| &n.addresses);
        self.topology.underlay(self.config.uplinks.as_deref(), own)
    }

    /// The network plugin's tunnels.
    fn tunnels(&self) -> impl Iterator<Item = &Link> {
        let theirs = |l: &&Link| matches!(l.kind, Kind::Vxlan { .. } | Kind::Tunnel) && l.name != TUNNEL;
        self.topology.links.values().filter(theirs)
    }

    /// The gateway whose devices are on this node: after a restart of the agent, the one that the state places here.
    fn plugged_name(&self) -> Option<String> {
        let placed =
            || self.merged.gateways.iter().find(|(_, g)| g.node == self.config.node).map(|(name, _)| name.clone());
        self.gateway.as_ref().map(|g: &Gateway| g.name.clone()).or_else(placed)
    }

    fn uplinks(&self) -> Vec<&Link> {
        self.topology.uplinks(self.config.uplinks.as_deref())
    }

    /// Whether a snapshot is to be applied. After a restart the other gateways get a moment; nobody knows how many there
    /// are where they are found.
    fn settled(&self) -> bool {
        let all = || self.config.discover.is_none() && self.gateways.iter().all(|g| g.model.live());
        self.ready || self.heard.is_some_and(|at| !self.adopted || at.elapsed() >= SETTLE || all())
    }

    /// Compares everything with what should be there, and puts right what others changed.
    pub(super) async fn full_pass(&mut self) {
        match self.netlink.restore(self.gateway.as_ref().map(|g| g.mtu)).await {
            Ok((devices, sysctls)) => {
                events::repaired("device", devices);
                events::repaired("sysctl", sysctls);
            }
            Err(error) => tracing::warn!(%error, "our devices cannot be put right"),
        }
        if let Some((netns, settings)) = self.gateway.as_ref().and_then(|g| g.inside.as_ref()) {
            match self.netlink.settle(netns.as_fd(), settings.clone()).await {
                Ok(n) => events::repaired("sysctl", n),
                Err(error) => tracing::warn!(%error, "the gateway's namespace cannot be put right"),
            }
        }
        self.pod_macs.clear();
        self.refresh().await;
        self.reconcile(true).await;
        self.sweep();
        self.orphans.look();
    }

    /// Forgets idle flows and old facts, and puts right what others changed of the rest.
    pub(super) fn sweep(&mut self) {
        match self.datapath.sweep() {
            Ok(swept) => events::repaired("map", swept.repaired),
            Err(error) => tracing::warn!(%error, "idle flows and old facts cannot be swept"),
        }
    }

    /// Moves over from the programs and maps of another layout, an earlier or later version's. They enforce until the
    /// new programs run before them, so that no packet meets none, and none meets maps that are empty.
    fn take_over(&mut self) {
        // What remembers flows comes first, then the flows that the old programs saw until that moment.
        let first = self.attached.is_empty();
        let new = self.attach_where(|program| program == Program::PodIngress);
        // All flows are walked: not again with every pass while one device refuses its program.
        if (first || new > 0)
            && let Err(error) = self.datapath.carry_flows()
        {
            tracing::error!(%error, "flows of another layout cannot be taken over");
        }
        self.attach_missing();
        if self.problems.contains_key("attach") {
            // Elsewhere what nobody tells anything any more must not judge behind the new programs.
            let missing: BTreeSet<u32> =
                self.wanted().into_keys().filter(|k| !self.attached.contains_key(k)).map(|(_, index)| index).collect();
            let whole: BTreeSet<u32> = self.attached.keys().map(|(_, index)| *index).collect();
            for index in whole.difference(&missing) {
                if let Err(error) = self.datapath.retire_from(*index) {
                    tracing::error!(index, %error, "programs of another layout are still attached");
                }
            }
            return;
        }
        match self.datapath.retire_others() {
            Ok(pins) => tracing::info!(pins, "moved over from the kernel maps of another layout"),
            Err(error) => tracing::error!(%error, "programs of another layout are still attached"),
        }
    }

    /// Makes the kernel hold what it should. With `full` the kernel's truth is read again.
    pub(super) async fn reconcile(&mut self, full: bool) {
        self.own_addresses(full);
        if !self.datapath.is_upgrade() {
            self.attach_missing();
        }
        if self.settled() {
            self.find_pods().await;
            if !self.ready && self.adopted && self.config.interfaces == Interfaces::Bridge {
                self.find_again().await;
            }
            let local = self.local();
            self.publish();
            let applied = self.datapath.apply(&self.merged, &local, full);
            // Programs after maps: on an interface that the maps do not know they would let everything pass anyway.
            if !self.datapath.is_upgrade() {
                self.attach_missing();
            } else if self.datapath.is_filled() {
                // With errors too: one table that does not fit must not leave the node to maps that are told nothing.
                self.take_over();
            }
            self.detach_left();
            let result = match applied {
                Ok(done) => {
                    if done.repaired + done.pinned > 0 {
                        let (entries, pins) = (done.repaired, done.pinned);
                        tracing::warn!(entries, pins, "kernel maps were changed by somebody else; put right");
                    }
                    events::repaired("map", done.repaired);
                    events::repaired("pin", done.pinned);
                    self.problems.remove("maps");
                    self.held = self.closed();
                    if !std::mem::replace(&mut self.ready, true) {
                        self.gateways.numbers().into_iter().for_each(|index| self.beat(index));
                    }
                    Ok(())
                }
                Err(e) => {
                    self.problems.insert("maps", format!("the kernel does not hold the whole state: {e}"));
                    Err(e.to_string())
                }
            };
            let label = if result.is_ok() { "ok" } else { "error" };
            metrics::counter!(events::PASSES, "result" => label).increment(1);
            self.people.update(&self.merged);
            self.keeper.set(self.guard());
            self.publish();
            self.retire_fixed();
            self.answer_starts();
            self.tell();
            for (ack, applied) in std::mem::take(&mut self.pending).into_values() {
                acknowledge(&ack, applied, result.clone());
            }
        } else {
            self.tell();
        }
    }

    /// After a restart, on bridges: tables may have forgotten pods whose interfaces the kernel's maps still know.
    async fn find_again(&mut self) {
        self.resolve().await;
        tokio::time::sleep(SETTLE / 5).await;
        self.refresh().await;
    }

    /// The netfilter half.
    fn guard(&self) -> Desired {
        let audited = |group| self.merged.groups.get(group).is_some_and(|g| g.audit);
        let isolated = |ip: &IpAddr| {
            self.merged.endpoints.get(ip).is_some_and(|e| {
                e.touch == Touch::Isolated && !e.member.as_ref().is_some_and(|(_, group)| audited(group))
            })
        };
        let pods: BTreeSet<IpAddr> = self.local_pods().collect();
        let names = |links: &[&Link]| links.iter().map(|l| l.name.clone()).collect::<Vec<_>>();
        let underlay = self.underlay();
        let mut foreign = names(&underlay);
        foreign.extend(self.tunnels().map(|l| l.name.clone()));
        foreign.push(EGRESS_SIDE.to_owned());
        let mut uplinks = self.uplinks();
        let by_rule = self.topology.by_rule(&uplinks);
        foreign.extend(names(&by_rule));
        foreign.sort_unstable();
        foreign.dedup();
        uplinks.extend(by_rule);
        // Where the network plugin has bridges, pods' packets are forwarded from theirs.
        let place = |(ip, index): (&IpAddr, &u32)| {
            let links = &self.topology.links;
            let device = links.get(index).map(|l| l.master.and_then(|m| links.get(&m)).unwrap_or(l))?;
            Some((*ip, device.name.clone()))
        };
        Desired {
            isolated: pods.iter().filter(|ip| isolated(ip)).copied().collect(),
            pods,
            places: self.interfaces.iter().filter_map(place).collect(),
            nodes: self.merged.nodes.values().flat_map(|n| n.addresses.iter().copied()).collect(),
            cluster: self.merged.cluster.prefixes.clone(),
            node_ports: self.merged.cluster.node_ports,
            uplinks: names(&[self.topology.above(&uplinks), uplinks].concat()),
            underlay: names(&underlay),
            foreign,
            drop_unknown: self.config.unknown_pods == UnknownPods::Drop && self.ready,
        }
    }

    /// Which programs belong where.
    fn wanted(&self) -> BTreeMap<(Program, u32), String> {
        let mut out = BTreeMap::new();
        let mut want = |link: &Link, programs: &[Program]| {
            for program in programs {
                out.insert((*program, link.index), link.name.clone());
            }
        };
        let uplinks = self.uplinks();
        for link in &uplinks {
            want(link, &[Program::NodeGuard, Program::UplinkIngress]);
        }
        // Of devices without a hardware address the packets are not as the program expects them.
        for link in self.topology.by_rule(&uplinks).into_iter().filter(|l| l.kind == Kind::Other && l.mac != [0; 6]) {
            want(link, &[Program::NodeGuard]);
        }
        for (name, program) in
            [(TUNNEL, Program::TunnelIngress), (POD_SIDE, Program::GatewayReturn), (EGRESS_SIDE, Program::UplinkEgress)]
        {
            if let Some(link) = self.topology.by_name(name) {
                want(link, &[program]);
            }
        }
        for link in self.interfaces.values().filter_map(|i| self.topology.links.get(i)) {
            want(link, &POD_PROGRAMS);
        }
        out
    }

    /// Attaches what is not attached yet.
    pub(super) fn attach_missing(&mut self) {
        self.attach_where(|_| true);
    }

    /// Returns how many programs were attached.
    fn attach_where(&mut self, which: impl Fn(Program) -> bool) -> usize {
        let wanted = self.wanted();
        let before = self.attached.len();
        let mut failed = None;
        for ((program, index), name) in wanted.iter().filter(|((program, _), _)| which(*program)) {
            // A device that was renamed keeps its index, its programs and its pins.
            if let Some(old) = self.attached.get_mut(&(*program, *index)) {
                old.clone_from(name);
                continue;
            }
            match self.datapath.attach(*program, name) {
                Ok(_) => drop(self.attached.insert((*program, *index), name.clone())),
                // It went between the dump and now; a notification is on its way.
                Err(Error::NoDevice(_)) => {}
                Err(e) => failed = Some(format!("program {} is not on {name}: {e}", program.name())),
            }
        }
        self.problem("attach", failed);
        let local = self.local_pods().count();
        let found = self.interfaces.len();
        metrics::gauge!(events::ENDPOINTS, "attached" => "true").set(found as f64);
        metrics::gauge!(events::ENDPOINTS, "attached" => "false").set(local.saturating_sub(found) as f64);
        match local.saturating_sub(found) {
            0 => drop(self.problems.remove("pods")),
            n => drop(
                self.problems.insert("pods", format!("{n} endpoints of this node have no interface that is known")),
            ),
        }
        if self.uplinks().is_empty() {
            self.problems
                .insert("uplinks", "no uplink: there is no default route, or the devices named are not there".into());
        } else {
            self.problems.remove("uplinks");
        }
        self.attached.len() - before
    }

    /// Detaches what belongs nowhere any more. Links of devices that are gone leave their pins behind.
    fn detach_left(&mut self) {
        let wanted = self.wanted();
        let first = !self.ready;
        let mut left: Vec<((Program, u32), String)> = Vec::new();
        if first {
            // An earlier run may have attached to what is no pod's interface any more.
            for link in self.topology.links.values().filter(|l| l.kind == Kind::Veth) {
                for program in POD_PROGRAMS {
                    left.push(((program, link.index), link.name.clone()));
                }
            }
        }
        left.extend(self.attached.iter().map(|(k, v)| (*k, v.clone())));
        let mut gone = first;
        for (key, name) in left.into_iter().filter(|(key, _)| !wanted.contains_key(key)) {
            self.attached.remove(&key);
            if self.topology.links.contains_key(&key.1) {
                match self.datapath.detach(key.0, &name) {
                    Ok(()) | Err(Error::NoDevice(_)) => {}
                    Err(error) => tracing::warn!(program = key.0.name(), device = name, %error, "cannot detach"),
                }
            } else {
                gone = true;
            }
        }
        if gone && let Err(error) = self.datapath.detach_gone() {
            tracing::warn!(%error, "pins of devices that are gone stay");
        }
    }

    /// Verifies the place of a tenth of the attachments, so that each is seen once a second.
    pub(super) fn verify(&mut self) {
        let all: Vec<(Program, String)> =
            self.attached.iter().map(|((program, _), name)| (*program, name.clone())).collect();
        if all.is_empty() {
            return;
        }
        let slice = all.len().div_ceil(STEPS_PER_SECOND as usize);
        for i in 0..slice {
            let (program, name) = &all[(self.verified + i) % all.len()];
            let repaired = match self.datapath.place(*program, name) {
                Ok(Place::First) | Err(Error::NoDevice(_)) => {
                    self.misplaced.remove(&all[(self.verified + i) % all.len()]);
                    continue;
                }
                Ok(Place::Behind(others)) => {
                    let program_name = program.name();
                    tracing::warn!(
                        program = program_name,
                        device = name,
                        ?others,
                        "others ran first; taking the place back"
                    );
                    self.datapath.reclaim(*program, name)
                }
                Ok(Place::Missing) => {
                    tracing::warn!(
                        program = program.name(),
                        device = name,
                        "the program was detached; attaching it again"
                    );
                    self.datapath.attach(*program, name).map(drop)
                }
                Err(e) => Err(e),
            };
            if let Err(error) = repaired {
                tracing::warn!(program = program.name(), device = name, %error, "not at its place");
                self.misplaced.insert((*program, name.clone()));
            } else {
                events::repaired("program", 1);
            }
        }
        let text = self.misplaced.first().map(|(program, name)| {
            format!("program {} is not first on {name} ({} in all)", program.name(), self.misplaced.len())
        });
        self.problem("place", text);
        self.tell();
        self.verified = (self.verified + slice) % all.len();
    }
}
