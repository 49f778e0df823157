//! What must be, beside what happens.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use tidegate_agent::merge::{Source, merge};
use tidegate_ebpf_common::{Action, Code, layout::via, packet::proto};
use tidegate_ledger::Bound;
use tidegate_policy::model::DnsFilter;
use tidegate_policy::{Carry, Proto};

use crate::ask::Asked;
use crate::drive::{Drive, ROUNDING, Scope, gateway_at, node_at};
use crate::gateway::{Gateway, node_id};
use crate::kernel::{frame, ifindex};
use crate::objects::{GATEWAYS, INSIDE, NAMES, NODES, OUTSIDE, PORTS, PRIVATE, name, parsed};
use crate::reference::{Fate, Port, Said, Subject, Touched, in_cluster};

/// One of so many ports is compared when everything is.
const PART: usize = 3;

fn number(p: Proto) -> u8 {
    if p == Proto::Tcp { proto::TCP } else { proto::UDP }
}

impl Drive {
    /// The pod by the policy that a gateway goes by.
    pub fn subject_at(&self, g: usize, pod: IpAddr) -> Option<Subject<'_>> {
        let (objects, wall) = self.seats[g].core.as_ref()?.version.as_ref()?;
        Subject::of(objects, pod, *wall)
    }

    /// To which gateway a node steers a packet that begins something.
    pub fn steered(&self, node: usize, pod: IpAddr, ip: IpAddr, to: Port) -> Option<usize> {
        let kernel = &self.nodes[node].kernel;
        let d = kernel.decide(&frame(pod, ip, number(to.0), to.1, to.0 == Proto::Tcp), ifindex(pod));
        if d.action == Action::Steer { gateway_at(kernel.gateway_name(d.owner)?) } else { None }
    }

    /// What the machines do with a packet: the node, and the gateway to which it goes, `None` if nobody is there.
    pub fn happens(&self, pod: IpAddr, ip: IpAddr, (p, port): Port, syn: bool) -> (Action, Option<Fate>) {
        let frame = frame(pod, ip, number(p), port, syn);
        let Some(s) = self.subject(pod) else { panic!("packets of no pod") };
        let kernel = &self.nodes[node_at(s.node())].kernel;
        let d = kernel.decide(&frame, ifindex(pod));
        match d.action {
            Action::Drop | Action::NoName => return (d.action, Some(Fate::Denied)),
            Action::Pass | Action::Ignore => return (d.action, Some(Fate::Passes)),
            Action::Steer => {}
        }
        let Some(at) = kernel.gateway_name(d.owner).and_then(gateway_at) else { panic!("steered to nobody") };
        let gateway = self.seats[at].up().filter(|g| g.version.is_some());
        (d.action, gateway.map(|g| carried(g, &frame)))
    }

    /// The names that a gateway knows for an address, and the latest of their expiries.
    fn names_at(&self, g: usize, scope: &Scope, ip: IpAddr) -> (BTreeSet<String>, u64) {
        let all = self.seats[g].facts.iter().filter(|(k, _)| k.0 == *scope && k.2 == ip);
        all.fold((BTreeSet::new(), 0), |(mut names, last), (k, f)| {
            names.insert(k.1.clone());
            (names, last.max(f.expires))
        })
    }

    /// The gateway that a node follows for a scope.
    fn follows(&self, node: usize, scope: &Scope) -> Option<usize> {
        let (key, _) = self.scopes.iter().find(|(_, s)| *s == scope)?;
        gateway_at(self.nodes[node].owner(*key)?)
    }

    /// The one fate that policy leaves, given all that machines may know now; `None` if there are several. `least`: names
    /// that the pod's node knows for sure.
    pub fn must(&self, pod: IpAddr, ip: IpAddr, to: Port, least: &BTreeSet<String>, flow: bool) -> Option<Fate> {
        let now = self.subject(pod)?;
        let (scope, node) = (now.scope(), now.node());
        let (mut names, mut last) = (BTreeSet::new(), 0);
        for g in 0..GATEWAYS.len() {
            let (more, at) = self.names_at(g, &scope, ip);
            names.extend(more);
            last = last.max(at);
        }
        let mut sets: Vec<BTreeSet<String>> = vec![least.clone()];
        let here = |k: &&(Scope, String, IpAddr)| k.0 == scope && k.2 == ip;
        let had: Vec<_> = self.had.iter().filter(|(k, _)| here(k)).collect();
        last = had.iter().map(|(_, at)| **at).fold(last, u64::max);
        if self.versions.len() == 1 && self.had.is_empty() {
            let owner = self.follows(node_at(node), &scope);
            let known = owner.map_or(names.clone(), |g| self.names_at(g, &scope, ip).0);
            sets = if least.is_empty() { vec![BTreeSet::new(), known] } else { vec![known] };
        } else {
            let had = had.iter().map(|(k, _)| k.1.clone());
            for extra in names.iter().cloned().chain(had).collect::<BTreeSet<_>>().difference(least) {
                let with = sets.iter().map(|s| s.iter().cloned().chain([extra.clone()]).collect());
                let with: Vec<BTreeSet<String>> = with.collect();
                sets.extend(with);
            }
        }
        let stale = self.stale.keys().any(|k| here(&k) && !names.contains(&k.1));
        let ended: &[bool] = match (flow || !least.is_empty(), last + ROUNDING <= self.now) {
            (true, _) => &[false],
            (_, true) => &[true],
            _ => &[false, true],
        };
        let mut fates = Vec::new();
        let mut edited = false;
        for (objects, wall) in &self.versions {
            let s = Subject::of(objects, pod, *wall)?;
            edited |= !s.same(&now);
            if s.scope() != scope || s.node() != node {
                return None;
            }
            for set in &sets {
                for e in ended {
                    let fate = s.fate(set, *e, ip, to);
                    if !fates.contains(&fate) {
                        fates.push(fate);
                    }
                }
            }
        }
        // While an edit of what concerns the pod is on its way by two streams, the old group may meet the new class or
        // the other way round: then a packet is dropped, and never let through.
        (fates.len() == 1 && (!(edited || stale) || fates[0] == Fate::Denied)).then(|| fates[0])
    }

    /// Compares the fate of a packet that begins something; gives what happens.
    pub fn compare(&mut self, pod: IpAddr, ip: IpAddr, to: Port) -> Option<Fate> {
        let s = self.subject(pod).filter(|_| pod.is_ipv6() == ip.is_ipv6())?;
        let (node, scope, touched) = (node_at(s.node()), s.scope(), s.touched());
        (0..GATEWAYS.len()).for_each(|g| self.compare_at(g, pod, ip, to));
        if self.blank[node] {
            return None;
        }
        let mut least = self.promises(pod, ip);
        // What only a gateway that ended knew is lost.
        least.retain(|n| self.seats.iter().any(|s| s.facts.contains_key(&(scope.clone(), n.clone(), ip))));
        // Answers to pods of a node that has not been heard for long wait for nothing: what an isolated pod's node does not know
        // it steers, what a guarded one's does not know passes.
        if touched == Touched::Guarded && !self.nodes[node].is_well() {
            least.clear();
        }
        let (action, happens) = self.happens(pod, ip, to, to.0 == Proto::Tcp);
        let Some(must) = self.must(pod, ip, to, &least, false) else { return happens };
        self.stats.packets += 1;
        let said = || format!("{pod} to {ip} {to:?}, promised {least:?}, of {} policies", self.versions.len());
        let knows = |g: usize| {
            let knows = |n: &String| self.seats[g].facts.contains_key(&(scope.clone(), n.clone(), ip));
            least.iter().all(knows)
        };
        let follows = self.follows(node, &scope);
        // Its former owner may answer until the node hears who owns the scope now, and that one of the answer; and who
        // stands in may not have heard yet what the owner told.
        let hears = |g: &usize| self.nodes[node].hears(*g);
        let speaks = |g: &usize| follows == Some(*g) || self.told(*g, node, &scope, ip);
        let mut heard = (0..GATEWAYS.len()).filter(hears).filter(speaks);
        let late = heard.any(|g| self.seats[g].core.is_some() && !knows(g));
        match must {
            Fate::Denied => {
                // What two names deny together a gateway that has not heard of one of them lets through, by what it knows.
                let partly = self.steered(node, pod, ip, to).is_some_and(|g| !knows(g));
                let denied = matches!(happens, Some(Fate::Denied) | None);
                assert!(denied || (partly && matches!(happens, Some(Fate::Carried(_)))), "{happens:?}: {}", said());
            }
            // Until then the owner's grants leave out what a name lets through that a prefix denies.
            Fate::Passes if late && action == Action::Drop => {}
            Fate::Passes => assert_eq!(happens, Some(must), "{}", said()),
            Fate::Carried(_) | Fate::Dns => {
                let serves = |g: usize| {
                    let carries = |c: &Gateway| self.scopes.iter().any(|(k, s)| *s == scope && c.carries(*k));
                    self.seats[g].up().is_some_and(carries) && knows(g)
                };
                let cut_off = follows.filter(hears).is_none();
                let code = self.code(node, pod, ip, to);
                let denied = action == Action::Drop && code == Some(Code::DeniedByPolicy);
                if denied && cut_off && self.still_denied(pod, ip, to, &least) {
                    return happens;
                }
                if !late {
                    assert_eq!(action, Action::Steer, "must be {must:?}, not {code:?}: {}", said());
                }
                // Who stands in answers names and knows every pod; who owns the scope carries what it knows.
                if must == Fate::Dns && happens.is_some() || follows.is_some_and(serves) {
                    assert_eq!(happens, Some(must), "{}", said());
                    self.stats.carried += u64::from(!least.is_empty() && matches!(must, Fate::Carried(_)));
                }
            }
        }
        happens
    }

    /// Why a node does what it does with a packet that begins something.
    fn code(&self, node: usize, pod: IpAddr, ip: IpAddr, to: Port) -> Option<Code> {
        let frame = frame(pod, ip, number(to.0), to.1, to.0 == Proto::Tcp);
        Code::from_u8(self.nodes[node].kernel.decide(&frame, ifindex(pod)).code)
    }

    /// Whether a gateway stands by an address on a node.
    fn told(&self, g: usize, node: usize, scope: &Scope, ip: IpAddr) -> bool {
        let key = self.scopes.iter().find(|(_, s)| *s == scope).map(|(k, _)| *k);
        let core = self.seats[g].core.as_ref();
        let stands =
            |(c, k): (&Gateway, _)| c.ledger().bindings().standing(k, ip, node_id(NODES[node]), Duration::ZERO);
        core.zip(key).is_some_and(stands)
    }

    /// Whether a pod's node, which hears nothing new, may deny a packet by what it was told before it was cut off: it does
    /// not know all of `least`, and goes by other names of the address until those have expired, as far as anybody knows,
    /// or by the prefixes alone, as an accepted name may stand above a prefix that is denied.
    fn still_denied(&self, pod: IpAddr, ip: IpAddr, to: Port, least: &BTreeSet<String>) -> bool {
        let Some(scope) = self.subject(pod).map(|s| s.scope()) else { return false };
        let known = self.seats.iter().flat_map(|s| s.facts.iter().map(|(k, f)| (k, f.expires)));
        let known = known.chain(self.had.iter().map(|(k, at)| (k, *at)));
        let known = known.filter(|(k, at)| k.0 == scope && k.2 == ip && at + ROUNDING > self.now);
        let names: BTreeSet<&String> = known.map(|(k, _)| &k.1).collect();
        let mut sets = vec![BTreeSet::new()];
        for name in names {
            let with = sets.iter().map(|s: &BTreeSet<String>| s.iter().chain([name]).cloned().collect());
            let with: Vec<_> = with.collect();
            sets.extend(with);
        }
        let old = || sets.iter().filter(|names| !least.is_subset(names));
        let denied = |s: Subject<'_>| old().any(|names| s.denied(names, ip, to));
        self.versions.iter().filter_map(|(o, wall)| Subject::of(o, pod, *wall)).any(denied)
    }

    /// A gateway alone, by what it knows: nodes that hear nothing send on what they do not know, and it must not lean on
    /// them. Its DNS service answers whoever asks, and denies what has no way out.
    fn compare_at(&self, g: usize, pod: IpAddr, ip: IpAddr, to: Port) {
        let Some(core) = self.seats[g].up().filter(|c| c.version.is_some()) else { return };
        if to.1 == 53 {
            return;
        }
        let happens = carried(core, &frame(pod, ip, number(to.0), to.1, to.0 == Proto::Tcp));
        let member = core.world().endpoint(pod).and_then(|e| e.member);
        let must = match (self.subject_at(g, pod), member) {
            (Some(s), Some(m)) if core.carries(m.scope) && s.touched() != Touched::No => {
                if s.audited() {
                    return;
                }
                let (names, last) = self.names_at(g, &s.scope(), ip);
                if last.abs_diff(self.now) <= ROUNDING {
                    return;
                }
                match s.fate(&names, last <= self.now, ip, to) {
                    carried @ Fate::Carried(_) => carried,
                    _ => Fate::Denied,
                }
            }
            _ => Fate::Denied,
        };
        assert_eq!(happens, must, "{} alone: {pod} to {ip} {to:?}", GATEWAYS[g].0);
    }

    /// Compares every packet.
    pub fn check(&mut self) {
        for seat in &self.seats {
            let Some(core) = &seat.core else { continue };
            let counts = core.ledger().counts();
            assert_eq!(counts.facts, seat.facts.len(), "facts");
            let addresses: BTreeSet<_> = seat.facts.keys().map(|k| (&k.0, k.2)).collect();
            assert_eq!((counts.addresses, core.kernel.held().count()), (addresses.len(), addresses.len()), "addresses");
        }
        self.check_facts();
        // A part of the ports each time: more steps find more than more packets.
        let some = PORTS.iter().skip(self.stats.steps as usize % PART).step_by(PART);
        let ports: Vec<Port> = some.flat_map(|p| [(Proto::Tcp, *p), (Proto::Udp, *p)]).collect();
        for pod in self.pods() {
            for ip in OUTSIDE.iter().chain(&INSIDE).map(|t| parsed::<IpAddr>(t)) {
                for to in ports.iter().copied() {
                    if self.compare(pod, ip, to) == Some(Fate::Carried(Carry::Tls)) {
                        self.check_relay(pod, ip, to);
                    }
                }
            }
        }
    }

    /// Every gateway knows what any of them has learnt and still holds, and each address has the class of its names.
    fn check_facts(&self) {
        for (a, from) in self.seats.iter().enumerate() {
            for (key, f) in from.facts.iter().filter(|(k, f)| f.expires > self.now + 5_000 && !self.doubt.contains(*k))
            {
                for (b, to) in self.seats.iter().enumerate() {
                    let known = to.facts.get(key).is_some_and(|o| o.expires + 5_000 > f.expires);
                    let other = to.facts.get(key).map(|o| o.expires);
                    let (a, b, until) = (GATEWAYS[a].0, GATEWAYS[b].0, f.expires);
                    assert!(known, "{a} knows {key:?} until {until}, and {b} until {other:?}");
                }
            }
            let Some(core) = &from.core else { continue };
            let (world, bindings) = (core.world(), core.ledger().bindings());
            let mut names: BTreeMap<(&Scope, IpAddr), Vec<tidegate_policy::Name>> = BTreeMap::new();
            for k in from.facts.keys() {
                names.entry((&k.0, k.2)).or_default().push(name(&k.1));
            }
            for ((scope, ip), names) in names {
                let found = self.scopes.iter().find(|(_, s)| *s == scope).map(|(k, _)| *k);
                let Some(key) = found else { panic!("a fact of no scope") };
                let class = world.scope(key).map(|s| s.class(ip, names.iter()));
                assert_eq!(bindings.class_of(key, ip), class, "{} gives {ip} an old class", GATEWAYS[a].0);
            }
        }
    }

    /// Nodes hold what gateways would tell a new one, and of the facts those of their pods, with the class that the owner
    /// gives them if it has told this node of the address, and otherwise one of those who have.
    pub fn check_nodes(&mut self) {
        let mut left = BTreeSet::new();
        for (i, node) in self.nodes.iter().enumerate() {
            let states: Vec<_> =
                self.seats.iter().filter_map(|s| s.up()).map(|g| (g.name, g.fresh(NODES[i]))).collect();
            let sources: Vec<_> =
                states.iter().map(|(name, state)| Source { name, live: true, silent: false, state }).collect();
            assert_eq!(*node.merged(), merge(&sources), "{} does not hold what it would be told", NODES[i]);
            for (key, ip, class) in node.kernel.held() {
                let scope = &self.scopes[&key];
                let class_at = |g: usize| {
                    let class = self.seats[g].up()?.ledger().bindings().class_of(key, ip);
                    class.filter(|_| self.told(g, i, scope, ip))
                };
                let owner = node.owner(key).and_then(gateway_at).and_then(class_at);
                let right = match owner {
                    Some(_) => vec![owner],
                    None => (0..GATEWAYS.len()).map(class_at).filter(Option::is_some).collect(),
                };
                let needed = self.seats[0].up().is_some_and(|g| g.placement.has(key, NODES[i]));
                if right.contains(&Some(class)) && needed {
                    continue;
                }
                // Nobody knows it any more. Whoever does tells the node, whoever told it first.
                let known = || {
                    self.seats.iter().filter_map(|s| s.up()).any(|g| g.ledger().bindings().class_of(key, ip).is_some())
                };
                let stale = self.stale.keys().any(|k| k.0 == *scope && k.2 == ip) && !(needed && known());
                assert!(stale, "{} keeps {ip} of {scope:?}: {class:?}, not {right:?}, pods: {needed}", NODES[i]);
                left.insert((scope.clone(), ip));
            }
        }
        self.stale.retain(|k, _| left.contains(&(k.0.clone(), k.2)));
        self.doubt.retain(|k| self.seats.iter().any(|s| s.facts.contains_key(k)));
    }

    /// What the relay says of each name that a client may send.
    fn check_relay(&self, pod: IpAddr, ip: IpAddr, to: Port) {
        let Some(s) = self.subject(pod) else { return };
        let scope = s.scope();
        let Some(g) = self.follows(node_at(s.node()), &scope) else { return };
        let (Some(core), Some(s)) = (self.seats[g].up(), self.subject_at(g, pod)) else { return };
        let world = core.world();
        let Some(member) = world.endpoint(pod).and_then(|e| e.member) else {
            panic!("a pod whose packets are carried is not known")
        };
        let Some(group) = world.group(member.index) else { panic!("a member has no group") };
        let bindings = core.ledger().bindings();
        for said in NAMES {
            let bound = bindings.is_bound(member.scope, said, ip, self.time());
            let fact = self.seats[g].facts.get(&(scope.clone(), said.to_owned(), ip));
            let expected = match fact {
                None => Bound::No,
                Some(f) if f.expires <= self.now => Bound::Expired,
                Some(_) => Bound::Bound,
            };
            assert_eq!(bound, expected, "{said} at {ip}");
            let n = name(said);
            let (decision, may) = if bound == Bound::Bound {
                (group.connection(Some(&n), ip, to.0, to.1), s.may(Said::Bound(said), ip, to))
            } else {
                (group.connection_unbound(&n, ip, to.0, to.1), s.may(Said::Unbound(said), ip, to))
            };
            assert_eq!(decision.allowed(), may, "{said} ({bound:?}) to {ip} {to:?}: {decision:?}");
        }
        let nameless = group.connection(None, ip, to.0, to.1).allowed();
        assert_eq!(nameless, s.may(Said::Nothing, ip, to), "no name to {ip} {to:?}");
    }

    /// Whether an answer is right for the pod.
    pub fn check_answer(&self, g: usize, pod: IpAddr, asked: &str, ips: &[IpAddr], result: &Asked) {
        let Some(core) = self.seats[g].core.as_ref() else { return };
        let (Some(s), Some((objects, _))) = (self.subject_at(g, pod), core.version.as_ref()) else { return };
        if s.touched() == Touched::No || !s.has_way_out() {
            assert!(matches!(result, Asked::Denied(_)), "an answer for a pod that is not served: {result:?}");
            return;
        }
        if s.audited() {
            return;
        }
        let good = |ip: &&IpAddr| {
            let private = **ip == parsed::<IpAddr>(PRIVATE);
            !in_cluster(objects, **ip, (Proto::Tcp, 443))
                && !tidegate_policy::special::is_metadata(**ip)
                && (!private || s.may_be_private(asked, **ip))
        };
        let sent: &[IpAddr] = match result {
            Asked::Binds(_, ips) | Asked::Stands(ips) => ips,
            Asked::Denied(_) | Asked::Open => &[],
        };
        assert!(sent.iter().all(|ip| good(&ip)), "{asked} binds {sent:?}");
        let strict = objects.settings.dns_filter == DnsFilter::Strict;
        // Which of the rules that could accept a private address let the name through is not modelled.
        let public = |ip: &&IpAddr| good(ip) && **ip != parsed::<IpAddr>(PRIVATE);
        match s.touched() {
            Touched::Isolated if !s.wants(asked) => {
                let refused = matches!(result, Asked::Denied(_));
                assert!(refused || (!strict && *result == Asked::Open), "{asked} is not allowed: {result:?}");
            }
            Touched::Isolated => {
                let world = core.world();
                let families = world.group_of(pod).map_or((true, true), |g| g.scope().families());
                let has_family = |ip: &IpAddr| if ip.is_ipv4() { families.0 } else { families.1 };
                for ip in ips.iter().filter(public).filter(|ip| has_family(ip) && s.reaches(asked, **ip)) {
                    assert!(sent.contains(ip), "{asked} at {ip} is left out: {result:?}");
                }
            }
            _ if s.denies(asked) => {
                // Only where it is bound a deny of the name holds in the kernel.
                let held = matches!(result, Asked::Denied(_)) || ips.iter().filter(public).all(|ip| sent.contains(ip));
                assert!(held, "a deny of {asked} cannot hold: {result:?}");
            }
            _ => {}
        }
    }
}

/// What a gateway's kernel does with a frame.
fn carried(g: &Gateway, frame: &[u8]) -> Fate {
    let d = g.kernel.decide(frame, 1);
    match (d.action, d.via) {
        (Action::Drop, _) => Fate::Denied,
        (Action::Steer, via::DNS) => Fate::Dns,
        (Action::Steer, via::FORWARD) => Fate::Carried(Carry::Forward),
        (Action::Steer, via::TLS) => Fate::Carried(Carry::Tls),
        (Action::Steer, via::BLOCK) => Fate::Carried(Carry::Block),
        other => panic!("a gateway neither carries nor drops: {other:?}"),
    }
}
