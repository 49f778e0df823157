//! A large cluster: 10,000 namespaces with 50,000 pods on 200 nodes. What the first compile costs, what an edit costs, and
//! how much memory objects, worlds and an index take.

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use serde_json::{Value, json};
use tidegate_api::index::{Feed, Index};
use tidegate_policy::model::{
    Action, AddressSource, Ceiling, Cidr, ClusterPolicy, Fqdn, Labels, Namespace, Node, Objects, Pair, Permit, Pod,
    Policy, PolicyMode, Pool, Ports, Rule, Selector, Settings, Tier, Touched, UnixSeconds,
};
use tidegate_policy::pattern::Pattern;
use tidegate_policy::world::Sight;
use tidegate_policy::{Name, Proto, World};

const NAMESPACES: u32 = 10_000;
const PODS: u32 = 5;
const NODES: u32 = 200;
const NOW: UnixSeconds = UnixSeconds(1000);
/// How often an edit is measured; each time the world is brought back before.
const TIMES: usize = 31;

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged; only a counter is kept beside.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn live() -> usize {
    LIVE.load(Ordering::Relaxed)
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn selector(pairs: &[(&str, &str)]) -> Selector {
    Selector { labels: labels(pairs), expressions: Vec::new() }
}

fn rule(name: &str, fqdns: Vec<Fqdn>, cidrs: &[IpNet]) -> Rule {
    Rule {
        fqdns,
        cidrs: cidrs.iter().map(|cidr| Cidr { cidr: *cidr, except: Vec::new() }).collect(),
        ..Rule::new(name, vec![Ports { proto: Some(Proto::Tcp), lo: 443, hi: 443 }])
    }
}

fn name(text: &str) -> Fqdn {
    Fqdn::Name(Name::parse(text).expect("a name"))
}

fn pattern(text: &str) -> Fqdn {
    Fqdn::Pattern(Pattern::parse(text).expect("a pattern"))
}

fn net(a: u8, b: u8, c: u8, len: u8) -> IpNet {
    IpNet::new(IpAddr::from([a, b, c, 0]), len).expect("a prefix")
}

/// A policy with ten names and a prefix.
fn policy(n: u32, p: u32, selected: Selector) -> Policy {
    let names = (0..10).map(|i| name(&format!("h{i}.p{p}.n{n}.example.com"))).collect();
    Policy {
        created: UnixSeconds(0),
        pod_selector: selected,
        mode: PolicyMode::Enforce,
        pool: n.is_multiple_of(50).then(|| "partner".to_owned()),
        egress: vec![rule("names", names, &[]), rule("net", Vec::new(), &[net(9, (n >> 8) as u8, n as u8, 24)])],
        deny: Vec::new(),
    }
}

fn cluster_policy(says: Action, r: Rule, namespaces: Selector, ceiling: Option<Ceiling>) -> ClusterPolicy {
    ClusterPolicy {
        tier: Tier::Admin,
        priority: 10,
        mode: PolicyMode::Enforce,
        namespaces,
        pods: Selector::default(),
        subject_lost: false,
        rules: vec![(says, r)],
        ceiling,
    }
}

fn address(n: u32, p: u32) -> IpAddr {
    IpAddr::from(Ipv4Addr::from(0x0a00_0000 + n * 8 + p))
}

/// Of ten namespaces two have two policies each, one has an annotation, four more are under a cluster policy.
fn cluster() -> Objects {
    let mut o = Objects::default();
    for n in 0..NODES {
        let node = Node {
            addresses: vec![IpAddr::from([192, 168, 0, n as u8])],
            labels: Labels::new(),
            pod_prefixes: vec![net(10, 128, n as u8, 24)],
        };
        o.nodes.insert(format!("node-{n}"), node);
    }
    let pair = |n| Pair { ipv4: Some([203, 0, 113, n].into()), ipv6: None, draining: false };
    let source = AddressSource::Static { interface: None, pairs: (1..5).map(pair).collect() };
    let partner = Pool { allowed_namespaces: Some(Selector::default()), source, gateway_nodes: None };
    o.pools.insert("partner".into(), partner);
    let deny = rule("bad", vec![pattern("**.bad.example")], &[]);
    o.cluster_policies.insert("deny".into(), cluster_policy(Action::Deny, deny, selector(&[("env", "prod")]), None));
    let bound = Ceiling { fqdns: vec![pattern("**.com")], permits: vec![Permit::Cidrs], ..Ceiling::default() };
    let mirror = rule("mirror", vec![name("mirror.example.org")], &[]);
    let bounded = cluster_policy(Action::Accept, mirror, selector(&[("env", "prod"), ("kind", "7")]), Some(bound));
    o.cluster_policies.insert("bounded".into(), bounded);
    for n in 0..NAMESPACES {
        let space = format!("namespace-{n}");
        let kind = n % 10;
        let env = if kind >= 4 { "test" } else { "prod" };
        o.namespaces.insert(
            space.clone(),
            Namespace {
                uid: format!("6f9619ff-8b86-d011-b42d-{n:012x}"),
                labels: labels(&[("env", env), ("kind", &kind.to_string()), ("kubernetes.io/metadata.name", &space)]),
                has_allow: kind == 9,
                allow: if kind == 9 {
                    vec![rule("api.example.com", vec![name("api.example.com")], &[])]
                } else {
                    vec![]
                },
                ..Namespace::default()
            },
        );
        if kind < 2 {
            o.policies.insert((space.clone(), "all".into()), policy(n, 0, Selector::default()));
            o.policies.insert((space.clone(), "web".into()), policy(n, 1, selector(&[("app", "web")])));
        }
        for p in 0..PODS {
            let app = if p % 2 == 0 { "web" } else { "job" };
            let pod = Pod {
                node: format!("node-{}", (n * PODS + p) % NODES),
                addresses: vec![address(n, p)],
                labels: labels(&[("app", app), ("pod-template-hash", &format!("{n:x}{p}"))]),
                host_network: false,
                ending: false,
                mirror: false,
            };
            o.pods.insert((space.clone(), format!("{app}-7c5ddbdf54-{p}")), pod);
        }
    }
    o
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn show(what: &str, compile: Duration, compare: Option<Duration>, changed: &str) {
    let compare = compare.map_or_else(|| "-".to_owned(), |t| format!("{t:.1?}"));
    println!("| {what} | {compile:.1?} | {compare} | {changed} |");
}

/// The median time of an edit that `there` makes and `back` takes back.
fn edit(what: &str, o: &mut Objects, touched: &Touched, there: impl Fn(&mut Objects), back: impl Fn(&mut Objects)) {
    let before = World::compile(o, NOW, None);
    before.scopes().values().for_each(|s| s.prepare());
    there(o);
    let (mut compiles, mut compares) = (Vec::new(), Vec::new());
    let mut changed = String::new();
    for _ in 0..if touched.all { 3 } else { TIMES } {
        let begun = Instant::now();
        let after = black_box(World::compile(o, NOW, Some((&before, touched))));
        compiles.push(begun.elapsed());
        let begun = Instant::now();
        let c = black_box(after.changes(&before));
        compares.push(begun.elapsed());
        changed = format!("{} endpoints, {} scopes, {} groups", c.endpoints.len(), c.scopes.len(), c.groups.len());
    }
    show(what, median(compiles), Some(median(compares)), &changed);
    back(o);
}

fn namespaces(name: &str) -> Touched {
    Touched { namespaces: [name.to_owned()].into(), ..Touched::default() }
}

/// A pod as the API server says it.
fn said(space: u32, p: u32, app: &str, ready: bool) -> Value {
    let name = format!("{}-7c5ddbdf54-{p}", if p.is_multiple_of(2) { "web" } else { "job" });
    let ip = address(space, p).to_string();
    let meta = json!({
        "name": name, "namespace": format!("namespace-{space}"), "uid": format!("0f9619ff-8b86-d011-b42d-{:012x}", space * PODS + p),
        "resourceVersion": "12345678", "creationTimestamp": "2026-01-01T00:00:00Z",
        "labels": {"app": app, "pod-template-hash": format!("{space:x}{p}")},
        "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-7c5ddbdf54", "uid": "u", "controller": true}],
    });
    let container = json!({"name": "app", "image": "registry.example.com/app:1", "resources": {"requests": {"cpu": "100m"}},
        "env": [{"name": "A", "value": "b"}], "volumeMounts": [{"name": "token", "mountPath": "/var/run/secrets"}]});
    let conditions = ["PodScheduled", "Initialized", "ContainersReady", "Ready"];
    let condition =
        |t: &str| json!({"type": t, "status": ready.to_string(), "lastTransitionTime": "2026-01-01T00:00:00Z"});
    json!({"metadata": meta,
        "spec": {"nodeName": format!("node-{}", (space * PODS + p) % NODES), "containers": [container]},
        "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": conditions.map(condition)}})
}

/// A policy with ten names and a prefix, as the API server says it.
fn said_policy(space: u32, which: u32, port: u32) -> Value {
    let names: Vec<Value> =
        (0..10).map(|i| json!({"matchName": format!("h{i}.p{which}.n{space}.example.com")})).collect();
    let ports = json!([{"protocol": "TCP", "port": port}]);
    json!({"metadata": {"name": format!("policy-{which}"), "namespace": format!("namespace-{space}"), "uid": format!("{space}-{which}"),
        "generation": 1, "resourceVersion": "12345678", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"podSelector": if which == 0 { json!({}) } else { json!({"matchLabels": {"app": "web"}}) }, "egress": [
            {"name": "names", "toFQDNs": names, "toPorts": ports},
            {"name": "net", "toCIDRs": [{"cidr": format!("9.{}.{}.0/24", space >> 8, space & 255)}], "toPorts": ports}]}})
}

fn said_namespace(space: u32, env: &str) -> Value {
    json!({"metadata": {"name": format!("namespace-{space}"), "uid": format!("6f9619ff-8b86-d011-b42d-{space:012x}"),
        "resourceVersion": "12345678", "labels": {"env": env, "kubernetes.io/metadata.name": format!("namespace-{space}")}}})
}

/// As many namespaces, pods and policies as above in a gateway's index: what it keeps of them, and what an event costs, from
/// its JSON on.
fn index() {
    let begun = live();
    let mut index = Index::new(Settings::default());
    let (mut times, mut events) = (Duration::ZERO, 0);
    let mut take = |index: &mut Index, feed, object: Value| {
        let at = Instant::now();
        index.apply(feed, &object);
        times += at.elapsed();
        events += 1;
    };
    for n in 0..NAMESPACES {
        take(&mut index, Feed::Namespaces, said_namespace(n, "prod"));
        if n % 10 < 2 {
            (0..2).for_each(|which| take(&mut index, Feed::EgressPolicies, said_policy(n, which, 443)));
        }
        (0..PODS).for_each(|p| take(&mut index, Feed::Pods, said(n, p, if p % 2 == 0 { "web" } else { "job" }, true)));
    }
    let kept = live() - begun;
    let o = index.objects();
    assert_eq!((o.namespaces.len(), o.pods.len(), o.policies.len()), (10_000, 50_000, 4_000));
    println!(
        "\nAn index takes {events} objects in {times:.1?} and keeps {:.1} MiB of them.\n\n| event | taken | compiled | pods, namespaces touched |",
        kept as f64 / f64::from(1 << 20)
    );
    println!("|---|---|---|---|");
    index.take_touched();
    let cases: [(&str, Feed, [Value; 2]); 4] = [
        ("a pod's readiness", Feed::Pods, [said(4210, 2, "web", false), said(4210, 2, "web", true)]),
        ("a pod's label", Feed::Pods, [said(4210, 2, "job", true), said(4210, 2, "web", true)]),
        ("a policy", Feed::EgressPolicies, [said_policy(4210, 0, 8443), said_policy(4210, 0, 443)]),
        ("a namespace's label", Feed::Namespaces, [said_namespace(4210, "test"), said_namespace(4210, "prod")]),
    ];
    for (what, feed, [there, back]) in cases {
        let before = World::compile(index.objects(), NOW, None);
        let (mut taken, mut compiled, mut counts) = (Vec::new(), Vec::new(), (0, 0));
        for _ in 0..TIMES {
            let at = Instant::now();
            index.apply(feed, &there);
            let touched = index.take_touched();
            taken.push(at.elapsed());
            counts = (touched.pods.len(), touched.namespaces.len());
            assert!(!touched.all);
            let at = Instant::now();
            if touched != Touched::default() {
                black_box(World::compile(index.objects(), NOW, Some((&before, &touched))));
                compiled.push(at.elapsed());
            }
            index.apply(feed, &back);
            index.take_touched();
        }
        let compiled = if compiled.is_empty() { "-".to_owned() } else { format!("{:.1?}", median(compiled)) };
        println!("| {what} | {:.1?} | {compiled} | {}, {} |", median(taken), counts.0, counts.1);
    }
}

fn main() {
    let start = live();
    let mut o = cluster();
    let of_objects = live() - start;
    let begun = live();
    let mut first = Vec::new();
    for _ in 0..3 {
        let at = Instant::now();
        drop(black_box(World::compile(&o, NOW, None)));
        first.push(at.elapsed());
    }
    let world = World::compile(&o, NOW, None);
    let of_world = live() - begun;
    let at = Instant::now();
    world.scopes().values().for_each(|s| s.prepare());
    let ahead = (at.elapsed(), live() - begun - of_world);
    let counts = format!(
        "{} endpoints, {} scopes, {} groups",
        world.endpoints().count(),
        world.scopes().len(),
        world.groups().len()
    );
    println!("| what | compile | compare | changed |\n|---|---|---|---|");
    show("everything, from nothing", median(first), None, &counts);
    show("classes that are pushed ahead, of all scopes", ahead.0, None, "-");
    drop(world);

    let pod = ("namespace-4210".to_owned(), "web-7c5ddbdf54-2".to_owned());
    let one = Touched { pods: [pod.clone()].into(), ..Touched::default() };
    let old = o.pods[&pod].clone();
    let set = |app: &'static str| {
        let pod = pod.clone();
        move |o: &mut Objects| drop(o.pods.get_mut(&pod).expect("the pod").labels.insert("app".into(), app.into()))
    };
    edit("a pod's label", &mut o, &one, set("job"), set("web"));
    let gone = |o: &mut Objects| drop(o.pods.remove(&pod));
    edit("a pod is gone", &mut o, &one, gone, |o| drop(o.pods.insert(pod.clone(), old.clone())));
    let key = ("namespace-4210".to_owned(), "all".to_owned());
    let same = o.policies[&key].clone();
    let other = policy(4210, 7, Selector::default());
    let put = |p: Policy| {
        let key = key.clone();
        move |o: &mut Objects| drop(o.policies.insert(key.clone(), p.clone()))
    };
    edit("a policy", &mut o, &namespaces("namespace-4210"), put(other), put(same));
    let env = |env: &'static str| {
        move |o: &mut Objects| {
            drop(o.namespaces.get_mut("namespace-4210").expect("it").labels.insert("env".into(), env.into()));
        }
    };
    edit("a namespace's label", &mut o, &namespaces("namespace-4210"), env("test"), env("prod"));
    let names = (0..5_000).map(|i| name(&format!("host-{i}.service-{}.example.com", i % 97))).collect();
    let mut many = policy(4210, 0, Selector::default());
    many.egress = vec![rule("many", names, &[])];
    let same = o.policies[&key].clone();
    edit("a policy with 5,000 names", &mut o, &namespaces("namespace-4210"), put(many.clone()), put(same.clone()));
    let bad = |text: &'static str| {
        move |o: &mut Objects| {
            o.cluster_policies.get_mut("deny").expect("it").rules[0].1.fqdns = vec![pattern(text)];
        }
    };
    let cluster = |name: &str| Touched { cluster_policies: [name.to_owned()].into(), ..Touched::default() };
    let deny = cluster("deny");
    edit("a cluster policy of 4,000 namespaces", &mut o, &deny, bad("**.worse.example"), bad("**.bad.example"));
    let only = |o: &mut Objects| {
        let deny = rule("bad", vec![pattern("**.bad.example")], &[]);
        let one = selector(&[("kubernetes.io/metadata.name", "namespace-4210")]);
        drop(o.cluster_policies.insert("one".into(), cluster_policy(Action::Deny, deny, one, None)));
    };
    edit("a cluster policy of one", &mut o, &cluster("one"), only, |o| drop(o.cluster_policies.remove("one")));
    let joins = |o: &mut Objects| {
        drop(o.nodes.insert("node-x".into(), Node { addresses: vec![[192, 168, 1, 1].into()], ..Node::default() }))
    };
    let nodes = Touched { nodes: true, ..Touched::default() };
    edit("a node joins", &mut o, &nodes, joins, |o| drop(o.nodes.remove("node-x")));
    edit("nothing, but all is looked at", &mut o, Touched::ALL, |_| {}, |_| {});

    put(same)(&mut o);
    let begun = live();
    let world = World::compile(&o, NOW, None);
    let one_world = live() - begun;
    put(many)(&mut o);
    let at = Instant::now();
    let next = World::compile(&o, NOW, Some((&world, &namespaces("namespace-4210"))));
    let group = next.group_of(address(4210, 1)).expect("a touched pod").clone();
    group.scope().prepare();
    let of_many = (at.elapsed(), live() - begun - one_world);
    let sizes = BTreeMap::from([
        ("1 the objects", of_objects),
        ("2 a world", of_world),
        ("3 classes that are pushed ahead", ahead.1),
        ("4 one more world, which differs in a policy with 5,000 names", of_many.1),
    ]);
    println!("\n| memory | MiB |\n|---|---|");
    for (what, octets) in sizes {
        println!("| {} | {:.1} |", &what[2..], octets as f64 / f64::from(1 << 20));
    }
    let at = Instant::now();
    let asked = 10_000;
    for i in 0..asked {
        black_box(group.name(&format!("host-{}.service-{}.example.com", i % 5_000, i % 97), 1));
    }
    println!(
        "\nA policy with 5,000 names is there after {:.1?}; a name is decided in {:.1?} (with making its text).",
        of_many.0,
        at.elapsed() / asked
    );
    next.scopes().values().for_each(|s| s.prepare());
    let live = |s| next.scope(s).into_iter().flat_map(|s| s.single_rule_classes());
    for (who, everything, here) in [("a node", false, Some("node-7")), ("a gateway", true, None)] {
        let at = Instant::now();
        let parts = black_box(next.parts(Sight { everything, here }, live));
        let (took, n) = (at.elapsed(), parts.endpoints.len());
        println!("What {who} is told of {n} endpoints is put together in {took:.1?}.");
    }
    let at = Instant::now();
    let mut found = 0;
    for n in 0..NAMESPACES {
        found += usize::from(black_box(next.endpoint(address(n, n % PODS))).is_some());
    }
    println!("An endpoint of {} is found in {:.1?}.", next.endpoints().count(), at.elapsed() / NAMESPACES);
    assert_eq!(found, NAMESPACES as usize);
    drop((next, world, group, o));
    index();
}
