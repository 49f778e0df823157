//! Packets, and the connections that come of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use tidegate_policy::{Carry, Proto};

use super::{Drive, Flow, Scope, node_at};
use crate::bytes::Bytes;
use crate::objects::{GATEWAYS, INSIDE, NODES, OUTSIDE, PORTS, parsed};
use crate::reference::Fate;

impl Drive {
    /// Names that were promised to a pod for an address and still are.
    pub fn promises(&self, pod: IpAddr, ip: IpAddr) -> BTreeSet<String> {
        let Some(s) = self.subject(pod) else { return BTreeSet::new() };
        let key = (s.scope(), NODES[node_at(s.node())], ip);
        let promised = self.promised.get(&key).into_iter().flatten();
        promised.filter(|(_, until)| **until > self.now).map(|(n, _)| n.clone()).collect()
    }

    /// A destination that a pod was promised, if there is one.
    fn promised_to(&self, b: &mut Bytes<'_>) -> Option<(IpAddr, IpAddr)> {
        let live = |(k, names): (&(Scope, &'static str, IpAddr), &BTreeMap<String, u64>)| {
            names.values().any(|until| *until > self.now).then(|| k.clone())
        };
        let all: Vec<_> = self.promised.iter().filter_map(live).collect();
        let (scope, node, ip) = all.get(b.byte() as usize % all.len().max(1))?;
        let pods = self.objects.pods.values().flat_map(|p| &p.addresses);
        let mut fitting = pods.filter(|p| p.is_ipv6() == ip.is_ipv6());
        let pod = fitting.find(|p| self.subject(**p).is_some_and(|s| s.scope() == *scope && s.node() == *node))?;
        Some((*pod, *ip))
    }

    pub(super) fn packet(&mut self, b: &mut Bytes<'_>) {
        let to = match b.one_in(2) {
            true => (Proto::Tcp, b.pick(&[443, 80, 5432])),
            false => (b.pick(&[Proto::Tcp, Proto::Udp]), b.pick(&PORTS)),
        };
        let (pod, ip) = match self.promised_to(b) {
            Some(found) if !b.one_in(4) => found,
            _ => {
                let Some(pod) = self.pod(b) else { return };
                (pod, if b.one_in(8) { parsed(b.pick(&INSIDE)) } else { parsed(b.pick(&OUTSIDE)) })
            }
        };
        let fate = self.compare(pod, ip, to);
        let names = self.promises(pod, ip);
        let Some(s) = self.subject(pod) else { return };
        let (scope, node) = (s.scope(), s.node().to_owned());
        if let (Some(Fate::Carried(Carry::Forward | Carry::Tls)), Proto::Tcp) = (fate, to.0)
            && let Some(gateway) = self.steered(node_at(&node), pod, ip, to)
            && let Some(key) = self.scopes.iter().find(|(_, s)| **s == scope).map(|(k, _)| *k)
            && self.flows.len() < 8
            && !names.is_empty()
        {
            self.tell(|| format!("a connection from {pod} to {ip} {to:?} by {}", GATEWAYS[gateway].0));
            self.flows.push(Flow { pod, scope, key, node, gateway, names, ip, to, since: self.now });
            self.show_flows();
        }
    }

    /// Live flows go on wherever policy did not change for them and their gateway carries them.
    pub(super) fn flows_go_on(&mut self) {
        let mut over = Vec::new();
        for (i, f) in self.flows.iter().enumerate() {
            let seat = &self.seats[f.gateway];
            let node = &self.nodes[node_at(&f.node)];
            let follows = node.owner(f.key) == Some(GATEWAYS[f.gateway].0);
            let known = f.names.iter().all(|n| seat.facts.contains_key(&(f.scope.clone(), n.clone(), f.ip)));
            match (&seat.core, seat.hung) {
                // One that starts has its kernel's programs meanwhile.
                (Some(g), None) if g.version.is_none() && follows => continue,
                (Some(g), None) if follows && known && g.carries(f.key) => {}
                (Some(_), Some(_)) if follows => continue,
                _ => {
                    over.push(i);
                    continue;
                }
            }
            match self.must(f.pod, f.ip, f.to, &f.names, true) {
                Some(Fate::Carried(c)) => {
                    let (_, happens) = self.happens(f.pod, f.ip, f.to, false);
                    assert_eq!(happens, Some(Fate::Carried(c)), "{f:?} is cut");
                    self.stats.flows += 1;
                }
                Some(_) => over.push(i),
                None => {}
            }
        }
        for i in over.into_iter().rev() {
            self.flows.swap_remove(i);
        }
        self.show_flows();
    }
}
