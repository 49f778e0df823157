//! What policy means, said a second time and as simply as possible: rules are walked one by one for one
//! pod, one address and one port. Nothing here is compiled, indexed or remembered.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use tidegate_policy::model::{
    Action, AddressSource, Ceiling, ClusterDefault, ClusterPolicy, Fqdn, Namespace, Objects, Permit, Pod, Policy,
    PolicyMode, Ports, Rule, SniMode, Tier, UnixSeconds,
};
use tidegate_policy::special::METADATA;
use tidegate_policy::{Carry, Proto};

use crate::objects::{NODE_PORTS, TUNNEL_PORT};

/// What happens to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It goes its own way, not through a gateway.
    Passes,
    /// It goes through the gateway, carried so.
    Carried(Carry),
    /// To the gateway's DNS service.
    Dns,
    /// It goes nowhere.
    Denied,
}

/// What the client says of the destination.
#[derive(Clone, Copy, Debug)]
pub enum Said<'a> {
    /// Nothing: prefixes alone decide.
    Nothing,
    /// A name that its namespace was told for the address.
    Bound(&'a str),
    /// A name that it was not told: it can only take away.
    Unbound(&'a str),
}

/// What rules come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Say {
    Undecided,
    Deny,
    Pass,
    Allow(Carry),
}

/// A destination's port.
pub type Port = (Proto, u16);

/// A pod's touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touched {
    /// Left alone.
    No,
    /// Only denies hold.
    Guarded,
    /// Default deny.
    Isolated,
}

/// A pod under the policy of one moment.
pub struct Subject<'o> {
    o: &'o Objects,
    namespace: &'o str,
    ns: &'o Namespace,
    pod: &'o Pod,
    now: UnixSeconds,
}

/// Whether a name matches what a rule says, label by label.
pub fn named(f: &Fqdn, name: &str) -> bool {
    let pattern = match f {
        Fqdn::Name(n) => return n.as_str() == name,
        Fqdn::Pattern(p) => p.as_str(),
    };
    let labels: Vec<&str> = name.split('.').collect();
    if pattern == "*" {
        return true;
    }
    let wanted: Vec<&str> = pattern.split('.').collect();
    match wanted.split_first() {
        Some((&"**", rest)) => {
            labels.len() > rest.len() && rest.iter().zip(&labels[labels.len() - rest.len()..]).all(|(w, l)| glob(w, l))
        }
        _ => wanted.len() == labels.len() && wanted.iter().zip(&labels).all(|(w, l)| glob(w, l)),
    }
}

fn glob(pattern: &str, text: &str) -> bool {
    match pattern.split_at_checked(1) {
        None => text.is_empty(),
        Some(("*", rest)) => (0..=text.len()).any(|i| glob(rest, &text[i..])),
        Some((c, rest)) => text.strip_prefix(c).is_some_and(|t| glob(rest, t)),
    }
}

fn has_port(ports: &[Ports], (proto, port): Port) -> bool {
    ports.iter().any(|p| p.proto.is_none_or(|x| x == proto) && (p.lo..=p.hi).contains(&port))
}

fn metadata(ip: IpAddr) -> Option<&'static IpNet> {
    METADATA.iter().find(|m| m.contains(&ip))
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(a) => a.is_link_local(),
        IpAddr::V6(a) => a.is_unicast_link_local(),
    }
}

/// What a rule must hold an address by.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    /// Any prefix.
    Any,
    /// A prefix that is not everything.
    Narrow,
}

impl<'o> Subject<'o> {
    /// The pod that has this address.
    pub fn of(o: &'o Objects, ip: IpAddr, now: UnixSeconds) -> Option<Self> {
        let ((namespace, _), pod) = o.pods.iter().find(|(_, p)| p.addresses.contains(&ip))?;
        Some(Self { o, namespace, ns: o.namespaces.get(namespace)?, pod, now })
    }

    /// Whether an edit that made the one policy into the other was of something else than what concerns this pod.
    pub fn same(&self, other: &Subject<'_>) -> bool {
        let own = |s: &Subject<'_>| {
            let all = s.o.policies.iter().filter(|((n, _), p)| n == s.namespace && p.mode == PolicyMode::Enforce);
            all.map(|(k, p)| (k.clone(), p.clone())).collect::<Vec<_>>()
        };
        let ends = |s: &Subject<'_>| {
            let rules = s.o.policies.values().flat_map(|p| p.egress.iter().chain(&p.deny));
            let rules = rules.chain(s.o.namespaces.values().flat_map(|n| &n.allow));
            let rules = rules.chain(s.o.cluster_policies.values().flat_map(|p| p.rules.iter().map(|(_, r)| r)));
            rules.filter(|r| !s.live(r)).count()
        };
        self.namespace == other.namespace
            && self.ns == other.ns
            && self.pod == other.pod
            && self.audited() == other.audited()
            && own(self) == own(other)
            && self.o.cluster_policies == other.o.cluster_policies
            && self.o.pools == other.o.pools
            && self.touched() == other.touched()
            && ends(self) == ends(other)
    }

    /// Its node.
    pub fn node(&self) -> &'o str {
        &self.pod.node
    }

    fn live(&self, r: &Rule) -> bool {
        r.expires.is_none_or(|e| self.now < e)
    }

    /// Own policies that select it.
    fn policies(&self) -> Vec<(&'o str, &'o Policy)> {
        let all = self.o.policies.iter().filter(|((n, _), p)| {
            n == self.namespace && p.mode == PolicyMode::Enforce && p.pod_selector.matches(&self.pod.labels)
        });
        all.map(|((_, n), p)| (n.as_str(), p)).collect()
    }

    fn cluster(&self) -> impl Iterator<Item = &'o ClusterPolicy> {
        self.o.cluster_policies.values().filter(|p| {
            p.mode == PolicyMode::Enforce && p.namespaces.matches(&self.ns.labels) && p.pods.matches(&self.pod.labels)
        })
    }

    fn has_own(&self) -> bool {
        self.ns.has_allow || !self.policies().is_empty()
    }

    /// What it is.
    pub fn touched(&self) -> Touched {
        if self.o.settings.exempt_namespaces.iter().any(|e| e == self.namespace) {
            return Touched::No;
        }
        let selected = self.cluster().next().is_some();
        let isolated = self.has_own()
            || self.ns.managed
            || match self.o.settings.cluster_default {
                ClusterDefault::Isolated => true,
                ClusterDefault::Audit => !selected,
                ClusterDefault::Untouched => false,
            };
        match (isolated, selected) {
            (true, _) => Touched::Isolated,
            (_, true) => Touched::Guarded,
            _ => Touched::No,
        }
    }

    /// Whether what would be denied passes.
    pub fn audited(&self) -> bool {
        let default = self.o.settings.cluster_default;
        let own = self.has_own() || self.ns.managed;
        let by_default = default == ClusterDefault::Audit && !own && self.cluster().next().is_none();
        by_default || (self.ns.audit && self.ns.audit_until.is_none_or(|end| self.now < end))
    }

    fn admitted(&self, pool: &str) -> bool {
        pool == "default"
            || self
                .o
                .pools
                .get(pool)
                .is_some_and(|p| p.allowed_namespaces.as_ref().is_some_and(|s| s.matches(&self.ns.labels)))
    }

    /// Its pool: of its policies' the oldest, then the first by name; its namespace's; the default.
    pub fn pool(&self) -> &'o str {
        let mut asked: Vec<_> =
            self.policies().into_iter().filter_map(|(n, p)| Some((p.created, n, p.pool.as_deref()?))).collect();
        asked.sort_unstable();
        let wanted = asked.into_iter().map(|(_, _, pool)| pool).chain(self.ns.pool.as_deref());
        wanted.into_iter().find(|p| self.admitted(p)).unwrap_or("default")
    }

    /// What learns together: the namespace, as long as it lives, with the pool.
    pub fn scope(&self) -> (String, String) {
        (self.ns.uid.clone(), self.pool().to_owned())
    }

    /// Whether its pool has a way out now.
    pub fn has_way_out(&self) -> bool {
        match self.o.pools.get(self.pool()).map(|p| &p.source) {
            Some(AddressSource::Static { pairs, .. }) => pairs.iter().any(|p| !p.draining),
            _ => true,
        }
    }

    fn is_node(&self, ip: IpAddr) -> bool {
        self.o.nodes.values().any(|n| n.addresses.contains(&ip))
    }

    fn ceilings(&self) -> impl Iterator<Item = &'o Ceiling> {
        self.cluster().filter_map(|p| p.ceiling.as_ref())
    }

    fn permitted(&self, what: Permit) -> bool {
        self.ceilings().all(|c| c.permits.contains(&what))
    }

    /// Whether a prefix rule holds the address.
    fn holds(&self, r: &Rule, accept: bool, ip: IpAddr, by: By) -> bool {
        let special = metadata(ip).filter(|_| accept && self.touched() == Touched::Isolated);
        r.cidrs.iter().any(|c| {
            c.cidr.contains(&ip)
                && !c.except.iter().any(|e| e.contains(&ip))
                && special.is_none_or(|s| s.contains(&c.cidr))
                && (by == By::Any || c.cidr.prefix_len() > 0)
        })
    }

    fn hits(&self, r: &Rule, accept: bool, gives: bool, said: Said<'_>, ip: IpAddr, by: By) -> bool {
        if r.fqdns.is_empty() {
            return self.holds(r, accept, ip, by);
        }
        match said {
            Said::Nothing => false,
            Said::Bound(n) => r.fqdns.iter().any(|f| named(f, n)),
            Said::Unbound(n) => !gives && r.fqdns.iter().any(|f| named(f, n)),
        }
    }

    /// What a tier says: of the first priority that says anything, Deny before Accept before Pass.
    fn tier(&self, tier: Tier, said: Said<'_>, ip: IpAddr, to: Port, by: By) -> Option<(Action, &'o Rule)> {
        let of_tier: Vec<&ClusterPolicy> = self.cluster().filter(|p| p.tier == tier).collect();
        let priorities: BTreeSet<u16> = of_tier.iter().map(|p| p.priority).collect();
        for priority in priorities {
            let firsts = of_tier.iter().filter(|p| p.priority == priority).filter_map(|p| {
                p.rules.iter().find(|(action, r)| {
                    let accept = *action == Action::Accept;
                    let by = if accept { by } else { By::Any };
                    self.live(r) && has_port(&r.ports, to) && self.hits(r, accept, accept, said, ip, by)
                })
            });
            if let Some((action, rule)) = firsts.min_by_key(|(action, _)| *action) {
                return (*action != Action::Pass).then_some((*action, rule));
            }
        }
        None
    }

    fn above_ceiling(&self, r: &Rule, said: Said<'_>, ip: IpAddr, to: Port) -> bool {
        self.ceilings().any(|c| {
            let inside = if r.fqdns.is_empty() {
                c.permits.contains(&Permit::Cidrs)
                    || c.cidrs.iter().any(|c| c.cidr.contains(&ip) && !c.except.iter().any(|e| e.contains(&ip)))
            } else {
                matches!(said, Said::Bound(n) if c.fqdns.iter().any(|f| named(f, n)))
            };
            !inside || !(c.ports.is_empty() || has_port(&c.ports, to))
        })
    }

    fn carry(&self, rules: &[(&Rule, bool)], (proto, port): Port) -> Carry {
        let inspected = |(r, own): &(&Rule, bool)| {
            let unchecked = r.sni == SniMode::Unchecked && (!own || self.permitted(Permit::SniUnchecked));
            !r.fqdns.is_empty() && if proto == Proto::Tcp { !unchecked } else { port == 443 }
        };
        match (rules.iter().any(inspected), proto) {
            (false, _) | (true, Proto::Other) => Carry::Forward,
            (true, Proto::Tcp) => Carry::Tls,
            (true, Proto::Udp) => Carry::Block,
        }
    }

    fn of_tier(&self, found: (Action, &Rule), to: Port, local: bool) -> Say {
        match found {
            (Action::Deny, _) => Say::Deny,
            _ if self.touched() != Touched::Isolated || local => Say::Pass,
            (_, r) => Say::Allow(self.carry(&[(r, false)], to)),
        }
    }

    fn say(&self, said: Said<'_>, ip: IpAddr, to: Port) -> Say {
        let isolated = self.touched() == Touched::Isolated;
        let local = isolated && metadata(ip).is_some();
        if isolated && (local || to.1 == 853) {
            let accepted = self.tier(Tier::Admin, Said::Nothing, ip, to, By::Narrow);
            if !matches!(accepted, Some((Action::Accept, _))) {
                return Say::Deny;
            }
        }
        if let Some(found) = self.tier(Tier::Admin, said, ip, to, By::Any) {
            return self.of_tier(found, to, local);
        }
        if !self.has_own() {
            return self
                .tier(Tier::Baseline, said, ip, to, By::Any)
                .map_or(Say::Undecided, |f| self.of_tier(f, to, local));
        }
        let policies = self.policies();
        let matching =
            |r: &&Rule, gives| self.live(r) && has_port(&r.ports, to) && self.hits(r, false, gives, said, ip, By::Any);
        if policies.iter().flat_map(|(_, p)| &p.deny).any(|r| matching(&r, false)) {
            return Say::Deny;
        }
        let annotation: &[Rule] = if self.ns.has_allow { &self.ns.allow } else { &[] };
        let allowing: Vec<(&Rule, bool)> = policies
            .iter()
            .flat_map(|(_, p)| &p.egress)
            .chain(annotation)
            .filter(|r| matching(r, true) && !self.above_ceiling(r, said, ip, to))
            .map(|r| (r, true))
            .collect();
        if allowing.is_empty() || local { Say::Undecided } else { Say::Allow(self.carry(&allowing, to)) }
    }

    /// Whether a connection may be made by a client that says this.
    pub fn may(&self, said: Said<'_>, ip: IpAddr, to: Port) -> bool {
        match self.say(said, ip, to) {
            Say::Allow(Carry::Block) | Say::Deny => false,
            Say::Allow(_) | Say::Pass => true,
            Say::Undecided => self.touched() != Touched::Isolated,
        }
    }

    /// Whether some rule lets this name through on some port, by the name alone.
    pub fn wants(&self, name: &str) -> bool {
        let nowhere = IpAddr::from([198, 51, 100, 77]);
        let say = |port| self.say_by_name(name, nowhere, port);
        self.ports().into_iter().any(|p| p.1 != 853 && matches!(say(p), Say::Allow(_)))
    }

    /// Whether a rule denies this name on some port, by the name alone.
    pub fn denies(&self, name: &str) -> bool {
        let nowhere = IpAddr::from([198, 51, 100, 77]);
        self.ports().into_iter().any(|p| p.1 != 0 && self.say_by_name(name, nowhere, p) == Say::Deny)
    }

    /// Whether a rule denies a connection to an address that has these names, or none: then a prefix does.
    pub fn denied(&self, names: &BTreeSet<String>, ip: IpAddr, to: Port) -> bool {
        let one = |n: &String| self.say(Said::Bound(n), ip, to) == Say::Deny;
        (names.is_empty() || names.iter().any(one)) && self.together(names, ip, to) == Say::Deny
    }

    /// Whether a name may lead to this address on some port.
    pub fn reaches(&self, name: &str, ip: IpAddr) -> bool {
        self.ports().into_iter().any(|p| p.1 != 853 && matches!(self.say(Said::Bound(name), ip, p), Say::Allow(_)))
    }

    /// As [`Self::say`] for an address that no prefix holds.
    fn say_by_name(&self, name: &str, ip: IpAddr, to: Port) -> Say {
        let bare = |r: &Rule| Rule { cidrs: vec![], ..r.clone() };
        let mut o = self.o.clone();
        for p in o.policies.values_mut() {
            p.egress = p.egress.iter().map(bare).collect();
            p.deny = p.deny.iter().map(bare).collect();
        }
        for p in o.cluster_policies.values_mut() {
            p.rules.iter_mut().for_each(|(_, r)| *r = bare(r));
        }
        for n in o.namespaces.values_mut() {
            n.allow = n.allow.iter().map(bare).collect();
        }
        let (Some(ns), Some(pod)) =
            (o.namespaces.get(self.namespace), o.pods.values().find(|p| p.addresses == self.pod.addresses))
        else {
            return Say::Undecided;
        };
        let (namespace, now) = (self.namespace, self.now);
        Subject { o: &o, namespace, ns, pod, now }.say(Said::Bound(name), ip, to)
    }

    /// Ports at which any rule may begin to say something else.
    fn ports(&self) -> BTreeSet<Port> {
        let own = self.policies().into_iter().flat_map(|(_, p)| p.egress.iter().chain(&p.deny));
        let cluster = self.cluster().flat_map(|p| p.rules.iter().map(|(_, r)| r));
        let ports = own.chain(&self.ns.allow).chain(cluster).flat_map(|r| &r.ports);
        let all = ports.chain(self.ceilings().flat_map(|c| &c.ports));
        let edges = all.flat_map(|p| [p.lo, p.hi, p.hi.saturating_add(1)]).chain([1, 852, 854, 65535, 443, 444]);
        edges.flat_map(|p| [(Proto::Tcp, p), (Proto::Udp, p)]).collect()
    }

    /// Private addresses that a name may resolve to: some rule that lets it through says so.
    pub fn may_be_private(&self, name: &str, ip: IpAddr) -> bool {
        let own = self.policies().into_iter().flat_map(|(_, p)| &p.egress).chain(&self.ns.allow).map(|r| (r, true));
        let accepts = self.cluster().flat_map(|p| p.rules.iter().filter(|(action, _)| *action == Action::Accept));
        let cluster = accepts.map(|(_, r)| (r, false));
        own.chain(cluster).any(|(r, own)| {
            r.fqdns.iter().any(|f| named(f, name))
                && r.private_addresses.iter().any(|p| p.contains(&ip))
                && (!own || self.permitted(Permit::PrivateAddresses))
        })
    }

    /// What the names of an address come to together, without regard to their expiry.
    fn together(&self, names: &BTreeSet<String>, ip: IpAddr, to: Port) -> Say {
        let each: Vec<Say> = names.iter().map(|n| self.say(Said::Bound(n), ip, to)).collect();
        let any = |s: Say| each.contains(&s);
        let forward = any(Say::Allow(Carry::Forward));
        let mixed = forward && any(Say::Deny);
        match self.touched() {
            _ if each.is_empty() => self.say(Said::Nothing, ip, to),
            Touched::Isolated if any(Say::Allow(Carry::Tls)) => Say::Allow(Carry::Tls),
            Touched::Isolated if any(Say::Allow(Carry::Block)) => Say::Allow(Carry::Block),
            Touched::Isolated if mixed && to.0 == Proto::Tcp => Say::Allow(Carry::Tls),
            Touched::Isolated if forward && !mixed => Say::Allow(Carry::Forward),
            // An accepted destination that never leaves the node.
            Touched::Isolated if any(Say::Pass) => Say::Pass,
            Touched::Isolated => Say::Deny,
            _ if each.iter().all(|s| *s == Say::Deny) => Say::Deny,
            _ => Say::Pass,
        }
    }

    /// What happens to a packet to `ip`, which has these names in the pod's scope. `opens`: it begins something and no
    /// name's answer holds any more.
    pub fn fate(&self, names: &BTreeSet<String>, ended: bool, ip: IpAddr, to: Port) -> Fate {
        let to_tunnel = to == (Proto::Udp, TUNNEL_PORT);
        match self.touched() {
            Touched::No if to_tunnel && (self.is_node(ip) || is_link_local(ip)) => return Fate::Denied,
            Touched::No => return Fate::Passes,
            _ if to_tunnel => return Fate::Denied,
            // Without a gateway there is no DNS, and no way out.
            _ if to.1 == 53 && self.has_way_out() => return Fate::Dns,
            Touched::Isolated if to.1 == 53 && !self.audited() => return Fate::Denied,
            _ if to.1 == 53 => return Fate::Passes,
            _ if in_cluster(self.o, ip, to) => return Fate::Passes,
            _ => {}
        }
        let mut say = self.together(names, ip, to);
        if ended && matches!(say, Say::Allow(_)) {
            say = self.say(Said::Nothing, ip, to);
        }
        let fate = match say {
            Say::Allow(_) if !self.has_way_out() && self.touched() == Touched::Isolated => Fate::Denied,
            Say::Allow(c) => Fate::Carried(c),
            Say::Pass => Fate::Passes,
            Say::Deny => Fate::Denied,
            Say::Undecided if self.touched() == Touched::Isolated => Fate::Denied,
            Say::Undecided => Fate::Passes,
        };
        if self.audited() { Fate::Passes } else { fate }
    }
}

/// Whether an address with this port belongs to the cluster.
pub fn in_cluster(o: &Objects, ip: IpAddr, (_, port): Port) -> bool {
    if o.nodes.values().any(|n| n.addresses.contains(&ip)) {
        return !(NODE_PORTS.0..=NODE_PORTS.1).contains(&port);
    }
    let pods = o.nodes.values().flat_map(|n| &n.pod_prefixes);
    o.settings.cluster_prefixes.iter().chain(pods).any(|p| p.contains(&ip))
}
