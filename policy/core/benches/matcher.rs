//! One name against 100,000 patterns.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use tidegate_policy::Name;
use tidegate_policy::matcher::{Matcher, Target};
use tidegate_policy::model::Fqdn;
use tidegate_policy::pattern::Pattern;

fn patterns(n: u32) -> Vec<Fqdn> {
    (0..n)
        .filter_map(|i| match i % 8 {
            0..=3 => Name::parse(&format!("h{i}.d{}.example.com", i % 997)).ok().map(Fqdn::Name),
            4 | 5 => Pattern::parse(&format!("*.s{i}.example.net")).ok().map(Fqdn::Pattern),
            6 => Pattern::parse(&format!("**.t{i}.example.org")).ok().map(Fqdn::Pattern),
            _ => Pattern::parse(&format!("a*-{}.g{}.example.com", i % 16, i / 16)).ok().map(Fqdn::Pattern),
        })
        .collect()
}

fn bench(c: &mut Criterion) {
    for n in [100, 100_000] {
        let list = patterns(n);
        let (m, _) = Matcher::build(list.iter().zip(0..).map(|(f, rule)| (f, Target { rule, policy: 0, opens: true })));
        for name in ["h8.d8.example.com", "x.y.t14.example.org", "nobody.www.example.edu", "ax-7.g0.example.com"] {
            c.bench_function(&format!("match/{n}/{name}"), |b| {
                b.iter(|| {
                    let mut hits = 0u32;
                    m.matches(black_box(name), |h| hits += h.rule);
                    hits
                });
            });
            c.bench_function(&format!("below/{n}/{name}"), |b| {
                b.iter(|| m.below(black_box(name), |_| true));
            });
        }
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
