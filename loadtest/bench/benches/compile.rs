//! Compiling the policy of a cluster, from nothing and after one edit.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::net::IpAddr;

use criterion::{Criterion, criterion_group, criterion_main};
use ipnet::IpNet;
use tidegate_policy::model::{
    Cidr, Fqdn, Namespace, Objects, Pod, Policy, PolicyMode, Ports, Rule, Selector, Touched, UnixSeconds,
};
use tidegate_policy::world::World;
use tidegate_policy::{Name, Proto};

fn rule(fqdns: Vec<Fqdn>, cidrs: Vec<Cidr>) -> Rule {
    Rule { fqdns, cidrs, ..Rule::new("0", vec![Ports { proto: Some(Proto::Tcp), lo: 443, hi: 443 }]) }
}

fn policy(namespace: u32, n: u32) -> Policy {
    let name = |i| Name::parse(&format!("h{i}.p{n}.n{namespace}.example.com")).expect("a name");
    let prefix = IpNet::new([9, namespace as u8, n as u8, 0].into(), 24).expect("a prefix");
    let cidr = Cidr { cidr: prefix, except: Vec::new() };
    Policy {
        created: UnixSeconds(0),
        pod_selector: Selector::default(),
        mode: PolicyMode::Enforce,
        pool: None,
        egress: vec![rule((0..10).map(|i| Fqdn::Name(name(i))).collect(), Vec::new()), rule(Vec::new(), vec![cidr])],
        deny: Vec::new(),
    }
}

fn objects(namespaces: u32) -> Objects {
    let mut o = Objects::default();
    for n in 0..namespaces {
        let name = format!("ns-{n}");
        o.namespaces.insert(name.clone(), Namespace { uid: name.clone(), ..Namespace::default() });
        for p in 0..10 {
            o.policies.insert((name.clone(), format!("p-{p}")), policy(n, p));
            let address = IpAddr::from([10, 1 + p as u8, (n >> 8) as u8, n as u8]);
            let pod = Pod {
                node: format!("n{}", p % 3),
                addresses: vec![address],
                labels: BTreeMap::new(),
                host_network: false,
                ending: false,
                mirror: false,
            };
            o.pods.insert((name.clone(), format!("pod-{p}")), pod);
        }
    }
    o
}

fn bench(c: &mut Criterion) {
    for n in [10, 200] {
        let mut o = objects(n);
        c.bench_function(&format!("compile/{n}"), |b| b.iter(|| World::compile(black_box(&o), UnixSeconds(0), None)));
        let before = World::compile(&o, UnixSeconds(0), None);
        o.policies.insert(("ns-3".into(), "p-3".into()), policy(3, 11));
        c.bench_function(&format!("edit/{n}"), |b| {
            b.iter(|| World::compile(black_box(&o), UnixSeconds(0), Some((&before, Touched::ALL))));
        });
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
