//! The four-fact check: this namespace's policy, its own DNS answers, the
//! destination, and the name in the hello, judged together.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tidegate_ledger::{Bindings, Bound};
use tidegate_policy::world::{Answer, Decision, World};
use tidegate_policy::{Name, Proto, Reason};
use tidegate_sni::Live;
use tidegate_sni_core::{Check, Client, Egress, Judgement, Sni};

use crate::core::Shared;
use crate::desired::Desired;

/// The relay's side of policy and ledger.
pub struct RelayCheck {
    /// What the core shares.
    pub shared: Arc<Shared>,
    /// The ledger's read side.
    pub bindings: Arc<Bindings>,
    /// Which pairs are ours.
    pub desired: Arc<Desired>,
    /// Whether the pod's own network has a way out for IPv4 and for IPv6.
    pub families: (bool, bool),
}

fn deny(decision: Decision, reason: Reason) -> Judgement {
    // What a deny rule or a ceiling says is worth more than what the hello lacks.
    let said = matches!(
        decision.reason,
        Reason::DeniedByPolicy | Reason::AboveCeiling | Reason::Metadata | Reason::EncryptedDns
    );
    Judgement::Deny { reason: if said { decision.reason } else { reason }, rule: decision.rule }
}

impl RelayCheck {
    fn named(&self, client: &Client, to: SocketAddr, name: &Name, ech: bool) -> Judgement {
        let world = self.shared.world.load();
        let Some(group) = world.group_by_key(client.group) else {
            return Judgement::Deny { reason: Reason::NoBinding, rule: None };
        };
        let bound = self.bindings.is_bound(client.scope, name.as_str(), to.ip(), self.shared.now());
        let decision = match bound {
            Bound::Bound => group.connection(Some(name), to.ip(), Proto::Tcp, to.port()),
            Bound::Expired | Bound::No => group.connection_unbound(name, to.ip(), Proto::Tcp, to.port()),
        };
        if !decision.allowed() {
            let reason = match bound {
                Bound::Bound => decision.reason,
                Bound::Expired => Reason::BindingExpired,
                Bound::No => Reason::SniMismatch,
            };
            // A name that no rule allows is a mismatch, however it came to be bound.
            let known = matches!(group.name(name.as_str(), 1).answer, Answer::Bind);
            let reason = if reason == Reason::NotAllowed && !known { Reason::SniMismatch } else { reason };
            return deny(decision, reason);
        }
        if ech && !decision.ech_allow {
            return Judgement::Deny { reason: Reason::Ech, rule: decision.rule };
        }
        let mut others = Vec::new();
        if bound == Bound::Bound {
            let all = self.bindings.addresses_of(client.scope, name.as_str(), self.shared.now());
            others.extend(
                all.into_iter()
                    .filter(|ip| *ip != to.ip() && group.connection(Some(name), *ip, Proto::Tcp, to.port()).allowed()),
            );
        }
        Judgement::Allow { name: Some(name.clone()), rule: decision.rule, others }
    }

    /// A hello without a usable name: only a prefix rule can allow it.
    fn nameless(&self, client: &Client, to: SocketAddr, reason: Reason, ech: bool) -> Judgement {
        let world = self.shared.world.load();
        let Some(group) = world.group_by_key(client.group) else {
            return Judgement::Deny { reason: Reason::NoBinding, rule: None };
        };
        let decision = group.connection(None, to.ip(), Proto::Tcp, to.port());
        if !decision.allowed() {
            return deny(decision, reason);
        }
        if ech && !decision.ech_allow {
            return Judgement::Deny { reason: Reason::Ech, rule: decision.rule };
        }
        Judgement::Allow { name: None, rule: decision.rule, others: Vec::new() }
    }
}

impl Check for RelayCheck {
    fn client(&self, ip: IpAddr) -> Option<Client> {
        let world = self.shared.world.load();
        let e = world.endpoint(ip)?;
        let m = e.member?;
        Some(Client { who: e.who.clone(), scope: m.scope, group: m.group, group_index: m.index })
    }

    fn judge(&self, client: &Client, destination: SocketAddr, sni: &Sni, ech: bool) -> Judgement {
        match sni {
            Sni::Name(name) => self.named(client, destination, name, ech),
            Sni::Missing => self.nameless(client, destination, Reason::SniMissing, ech),
            Sni::Ip => self.nameless(client, destination, Reason::SniIsIp, ech),
        }
    }

    fn egress(&self, client: &Client, v6: bool) -> Result<Egress, Reason> {
        let world = self.shared.world.load();
        let scope = world.scope(client.scope).ok_or(Reason::NoGateway)?;
        let way = self.desired.way_out(scope).ok_or(Reason::NoGateway)?;
        let Some(pair) = way.pair else {
            let has = if v6 { self.families.1 } else { self.families.0 };
            return if has { Ok(Egress { source: None, mark: 0 }) } else { Err(Reason::NoEgressFamily) };
        };
        let source = if v6 { pair.ipv6.map(IpAddr::from) } else { pair.ipv4.map(IpAddr::from) };
        let source = source.ok_or(Reason::NoEgressFamily)?;
        Ok(Egress { source: Some(source), mark: u32::from(way.index) << 8 })
    }

    fn forbidden(&self, destination: SocketAddr) -> bool {
        let ip = destination.ip().to_canonical();
        ip.is_loopback()
            || ip.is_unspecified()
            || ip.is_multicast()
            || self.shared.world.load().in_cluster(ip)
            || self.shared.egress.load().contains(&ip)
    }
}

/// Whether a live connection is still allowed after an edit. Facts are not looked at: an edit
/// discards none, and their expiry never cuts what lives.
pub fn still_allowed(world: &World, live: &Live) -> bool {
    let member = world.endpoint(live.client.ip()).and_then(|e| e.member);
    // A pod that moved to another scope starts with nothing.
    let Some(group) = member.filter(|m| m.scope == live.scope).and_then(|m| world.group(m.index)) else {
        return false;
    };
    // Without a hello there is nothing to judge yet; then it is judged as the group that the pod was in when it came.
    if live.hello.is_none() {
        return live.group == group.key();
    }
    let to = live.actual.unwrap_or(live.asked);
    group.connection(live.name.as_ref(), to.ip(), Proto::Tcp, live.asked.port()).allowed()
}
