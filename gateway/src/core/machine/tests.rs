//! Edits told one by one come to what a machine should hold as a whole.
#![allow(clippy::unwrap_used, reason = "a test may fail")]

use tidegate_policy::model::{
    Action, AddressSource, Cidr, ClusterPolicy, Fqdn, Namespace, Objects, Pair, Pod, Policy, PolicyMode, Pool, Ports,
    Rule, Selector, Tier, Touched, UnixSeconds,
};
use tidegate_policy::pattern::Pattern;
use tidegate_policy::state::Named;
use tidegate_policy::{Name, Proto};
use tidegate_random::Random;

use super::*;
use crate::desired::{Compiled, Order};

const TARGETS: [Target<'static>; 4] = [Target::Own, Target::Node("n1"), Target::Node("n2"), Target::Node("n3")];
const SPACES: [&str; 3] = ["a", "b", "c"];

fn desired() -> Desired {
    let text = "{name: gw-a, node: n1, directory: /nowhere, control: '127.0.0.1:1', socket: /nowhere/s, pins: /nowhere/p, \
         tls: {certificate: c, key: k, ca: a}, gateways: [{name: gw-a, node: n1}, {name: gw-b, node: n2}], \
         owners: [{pool: one, ipv4: 203.0.113.1, gateway: gw-a}, {pool: one, ipv4: 203.0.113.2, gateway: gw-b}], \
         cluster: {prefixes: [10.96.0.0/12], dns: ['10.96.0.10:53']}, resolvers: [{servers: ['192.0.2.53:53']}]}";
    Desired::new(Arc::new(serde_saphyr::from_str(text).unwrap()))
}

fn rule(r: &mut Random) -> Rule {
    let names = r.of(&[&["a.example"][..], &["*.b.example"], &["a.example", "b.example"], &[]]);
    let net = r.of(&["192.0.2.0/24", "198.51.100.0/24", "192.0.2.128/25"]).parse().unwrap();
    let port = r.of(&[80, 443, 5432]);
    Rule {
        fqdns: names.iter().map(|n| Fqdn::Pattern(Pattern::parse(n).unwrap())).collect(),
        cidrs: if names.is_empty() { vec![Cidr { cidr: net, except: vec![] }] } else { vec![] },
        ..Rule::new("r", vec![Ports { proto: Some(Proto::Tcp), lo: port, hi: port }])
    }
}

fn app(name: &str) -> Selector {
    Selector { labels: [("app".to_owned(), name.to_owned())].into(), expressions: vec![] }
}

fn edit(o: &mut Objects, r: &mut Random, touched: &mut Touched) {
    let space = r.of(&SPACES).to_owned();
    let key = (space.clone(), format!("x{}", r.below(3)));
    match r.below(13) {
        12 => {
            let name = format!("x{}.{space}.svc", r.below(3));
            match r.below(3) {
                0 => o.names.remove(name.as_str()),
                1 => o.names.insert(name.into(), Named::Outside),
                _ => o.names.insert(name.into(), Named::Inside),
            };
            touched.names = true;
        }
        0..6 => {
            let pod = Pod {
                node: r.of(&["n1", "n2", "n3"]).into(),
                addresses: vec![[10, 0, 0, r.below(8) as u8].into()],
                labels: app(r.of(&["web", "job"])).labels,
                host_network: false,
                ending: false,
                mirror: false,
            };
            if r.below(3) == 0 {
                drop(o.pods.remove(&key))
            } else {
                drop(o.pods.insert(key.clone(), pod))
            }
            touched.pods.insert(key);
        }
        6..9 => {
            let policy = Policy {
                created: UnixSeconds(0),
                pod_selector: if r.below(2) == 0 { Selector::default() } else { app("web") },
                mode: PolicyMode::Enforce,
                pool: (r.below(3) == 0).then(|| "one".to_owned()),
                egress: vec![rule(r), Rule { name: "s".into(), ..rule(r) }],
                deny: vec![],
            };
            if r.below(4) == 0 {
                drop(o.policies.remove(&key))
            } else {
                drop(o.policies.insert(key, policy))
            }
            touched.namespaces.insert(space);
        }
        9 => {
            let ns = Namespace {
                uid: format!("{space}-{}", r.below(2)),
                managed: r.below(2) == 0,
                audit: r.below(3) == 0,
                ..Namespace::default()
            };
            o.namespaces.insert(space.clone(), ns);
            touched.namespaces.insert(space);
        }
        10 => {
            let policy = ClusterPolicy {
                tier: Tier::Admin,
                priority: 1,
                mode: PolicyMode::Enforce,
                namespaces: Selector::default(),
                pods: app("job"),
                subject_lost: false,
                rules: vec![(r.of(&[Action::Accept, Action::Deny]), rule(r))],
                ceiling: None,
            };
            if r.below(2) == 0 {
                o.cluster_policies.clear()
            } else {
                drop(o.cluster_policies.insert("k".into(), policy))
            }
            touched.cluster_policies.insert("k".into());
        }
        _ => {
            let pair = |n| Pair { ipv4: Some([203, 0, 113, n].into()), ipv6: None, draining: false };
            let pairs = r.of(&[&[1][..], &[2], &[1, 2]]).iter().map(|n| pair(*n)).collect();
            let source = AddressSource::Static { interface: None, pairs };
            let pool = Pool { allowed_namespaces: Some(Selector::default()), source, gateway_nodes: None };
            o.pools.insert("one".into(), pool);
            touched.all = true;
        }
    }
}

fn claim(desired: &Desired, compiled: &Compiled) {
    let owned = |(pair, Order { candidates, .. }): (_, Order)| {
        let held = candidates[0] == "gw-a";
        (pair, Ownership { owner: candidates[0].clone(), epoch: 1, held, standbys: candidates[1..].to_vec() })
    };
    desired.set_claims(desired.pairs(compiled).into_iter().map(owned).collect(), None);
}

/// A fact is learnt or ends, and its grants go to a machine that may have no pod of the group.
fn learn(
    world: &World,
    compiled: &Compiled,
    r: &mut Random,
    classes: &mut Classes,
    now: Duration,
    machines: &mut [(NodeState, Uses)],
) {
    let scopes: Vec<_> = world.scopes().values().collect();
    let Some(scope) = (!scopes.is_empty()).then(|| r.of(&scopes)) else { return };
    let ip: IpAddr = [192, 0, 2, r.below(4) as u8].into();
    let names = [Name::parse("a.example").unwrap(), Name::parse("x.b.example").unwrap()];
    let class = (r.below(3) > 0).then(|| scope.class(ip, &names[..r.below(3) as usize]));
    classes.note(scope.key(), ip, class, now);
    let (held, uses) = &mut machines[r.below(4) as usize];
    for (group, ports) in class.into_iter().flat_map(|c| compiled.grants(scope.key(), c)) {
        held.set(Entry::Grant(group, class.unwrap(), ports));
        uses.pushed([(group, class.unwrap())].into_iter());
    }
}

#[test]
fn edit_after_edit_is_told_in_whole() {
    let mut told = 0;
    for seed in 0..60 {
        let r = &mut Random(seed);
        let (desired, mut o, mut classes) = (desired(), Objects::default(), Classes::default());
        let mut world = Arc::new(World::compile(&o, UnixSeconds(0), None));
        let mut compiled = Compiled::new(world.clone(), &o, 1);
        let mut now = Duration::from_secs(100);
        let frame = desired.frame(&compiled);
        let mut machines: Vec<_> = TARGETS.iter().map(|_| (frame.clone(), Uses::default())).collect();
        for step in 0..40 {
            let mut touched = Touched::default();
            (0..=r.below(3)).for_each(|_| edit(&mut o, r, &mut touched));
            let next = Arc::new(World::compile(&o, UnixSeconds(0), Some((&world, &touched))));
            compiled = compiled.next(next.clone(), &o, &touched);
            claim(&desired, &compiled);
            (0..r.below(4)).for_each(|_| learn(&next, &compiled, r, &mut classes, now, &mut machines));
            now += Duration::from_secs(r.below(4));
            let delta = Delta::new(&world, &next, next.changes(&world), classes.news(now));
            let basis = Basis::new(&desired, &next, &classes, now);
            let active: BTreeSet<_> = classes.active(now).collect();
            let ahead = |s| next.scope(s).into_iter().flat_map(|s| s.single_rule_classes());
            let live = |s| active.iter().filter(move |(of, _)| *of == s).map(|(_, c)| *c).chain(ahead(s));
            for (target, (held, uses)) in TARGETS.into_iter().zip(&mut machines) {
                let news = uses.follow(held, &basis, target, &delta);
                let wanted = desired.state(&compiled, target, live);
                // No word too many.
                assert_eq!(news.set.len() + news.delete.len(), {
                    let (set, delete) = held.diff(&wanted);
                    set.len() + delete.len()
                });
                take_news(held, &news.set, &news.delete);
                assert_eq!(*held, wanted, "seed {seed}, step {step}, {target:?}");
                told += news.set.len();
            }
            world = next;
        }
    }
    assert!(told > 10_000, "{told}");
}
