//! How the tables write manifests, and the manifests that are taken.

pub const FQDN: &str = "toFQDNs: [{matchName: a.example.com}]";
pub const P443: &str = "toPorts: [{protocol: TCP, port: 443}]";

/// A policy with these lines in its spec.
pub fn policy(spec: &str) -> String {
    object("EgressPolicy", "{name: p, namespace: shop}", spec)
}

pub fn object(kind: &str, metadata: &str, spec: &str) -> String {
    let mut out = format!("apiVersion: tidegate.dev/v1alpha1\nkind: {kind}\nmetadata: {metadata}\nspec:\n");
    for l in spec.lines() {
        out += &format!("  {l}\n");
    }
    out
}

/// A policy with one rule that allows, whose fields these are.
pub fn rule(fields: &str) -> String {
    policy(&format!("podSelector: {{}}\negress:\n- {{name: r, {fields}}}"))
}

pub fn deny(fields: &str) -> String {
    policy(&format!("podSelector: {{}}\negressDeny:\n- {{name: r, {fields}}}"))
}

pub fn cluster(more: &str) -> String {
    object(
        "ClusterEgressPolicy",
        "{name: c}",
        &format!("tier: Admin\npriority: 1\nsubject: {{namespaceSelector: {{}}}}\n{more}"),
    )
}

pub fn cluster_rule(fields: &str) -> String {
    cluster(&format!("egress:\n- {{name: r, {fields}}}"))
}

/// A pool with these fields.
pub fn pool(fields: &str) -> String {
    object("EgressPool", "{name: e}", fields)
}

pub fn pairs(pairs: &str) -> String {
    pool(&format!("addressSource: Static\nstatic: {{addresses: [{pairs}]}}"))
}

pub fn names(peers: &str) -> String {
    rule(&format!("toFQDNs: [{peers}], {P443}"))
}

pub fn prefixes(peers: &str) -> String {
    rule(&format!("toCIDRs: [{peers}], {P443}"))
}

pub fn ports(ports: &str) -> String {
    rule(&format!("{FQDN}, toPorts: [{ports}]"))
}

pub fn with(fields: &str) -> String {
    rule(&format!("{FQDN}, {P443}, {fields}"))
}

pub fn many(n: usize, item: &str) -> String {
    vec![item; n].join(", ")
}

fn numbered(n: usize, item: &dyn Fn(usize) -> String) -> String {
    (0..n).map(item).collect::<Vec<_>>().join(", ")
}

/// A policy with as many rules as it may have; each with a name, or none.
pub fn full(named: bool) -> String {
    let rules = |field: &str| {
        let name = |i| if named { format!("name: {}{i}, ", field.to_lowercase()) } else { String::new() };
        numbered(256, &|i| format!("{{{}{FQDN}, {P443}}}", name(i)))
    };
    policy(&format!("podSelector: {{}}\negress: [{}]\negressDeny: [{}]", rules("egress"), rules("egressDeny")))
}

/// Manifests at the limits, which both take.
pub fn good() -> Vec<String> {
    let label = "a".repeat(63);
    let long = format!("{label}.{label}.{label}.{}", "a".repeat(61));
    vec![
        policy("podSelector: {}"),
        policy("podSelector: {}\negress: []\negressDeny: []"),
        policy(
            "podSelector: {matchExpressions: [{key: a/b, operator: In, values: ['', b]}, {key: c, operator: DoesNotExist, values: []}]}",
        ),
        names(&format!(
            "{{matchName: {long}}}, {{matchName: {long}.}}, {{matchName: _a.Example.COM}}, {{matchName: 7.example}}"
        )),
        names(
            "{matchName: b\u{fc}cher.example}, {matchPattern: '**.b\u{fc}cher.example'}, {matchName: com}, {matchName: 1a}",
        ),
        names("{matchPattern: '*'}, {matchPattern: '**'}, {matchPattern: '**.com.'}, {matchPattern: 'a*b*.*.c-*'}"),
        prefixes(
            "{cidr: 0.0.0.0/0, except: [10.0.0.0/8, 203.0.113.7/32]}, {cidr: '2001:DB8::/32'}, {cidr: '::/0', except: ['fe80::/10']}",
        ),
        ports("{protocol: TCP, port: 1, endPort: 65535}, {protocol: UDP, port: 443, endPort: 443}"),
        deny(&format!(
            "{FQDN}, toPorts: [{{protocol: Any}}, {{protocol: TCP}}, {{protocol: Any, port: 5, endPort: 6}}]"
        )),
        deny("toCIDRs: [{cidr: 0.0.0.0/0}], toPorts: [{protocol: Any}], expireTime: '2027-01-31T00:00:00.5+01:00'"),
        with(
            "sni: Unchecked, quic: Block, ech: Allow, dnsTypes: [TXT, CAA, TYPE65280, TYPE127, TYPE256], minBindingSeconds: 86400",
        ),
        with("privateAddresses: [10.0.0.0/8, 'fd00::/8', 0.0.0.0/0, '::/0', 100.64.0.0/10]"),
        cluster("egress: []\nceiling: {}"),
        cluster_rule(&format!("action: Accept, {FQDN}, {P443}, sni: Unchecked, privateAddresses: [10.0.0.0/8]")),
        cluster_rule(&format!("action: Deny, {FQDN}, toPorts: [{{protocol: Any}}]")),
        cluster(
            "ceiling: {toFQDNs: [{matchPattern: '*'}], permits: [PrivateAddresses, SNIUnchecked, ECHAllow, DNSTypes, CIDRs, DNSOpen]}",
        ),
        pool("addressSource: PodNetwork\nexternalAddresses: [198.51.100.20, 198.51.100.0/24, '2001:db8::1']"),
        pool(
            "addressSource: Static\nallowedNamespaces: {}\nstatic: {interface: eth0.100, addresses: [{ipv4: 10.0.0.1}, {ipv6: 'fd00::1', state: Draining}]}",
        ),
        pairs(&numbered(64, &|i| format!("{{ipv4: 203.0.113.{i}, ipv6: '2001:db8::{i}'}}"))),
        // What costs CEL most: every rule, every name, every prefix.
        full(true),
        // 5000 names, and 2048 prefixes with two exceptions each.
        policy(&format!(
            "podSelector: {{}}\negress: [{}]",
            numbered(5, &|i| {
                let name = |n| format!("{{matchName: {}.n{n}.example.com}}", &label[..40]);
                format!("{{name: r{i}, toFQDNs: [{}], {P443}}}", numbered(1000, &name))
            })
        )),
        policy(&format!(
            "podSelector: {{}}\negress: [{}]",
            numbered(8, &|i| {
                let prefix = |n| format!("{{cidr: 10.{i}.{n}.0/24, except: [10.{i}.{n}.0/32, 10.{i}.{n}.128/25]}}");
                format!("{{name: r{i}, toCIDRs: [{}], {P443}}}", numbered(256, &prefix))
            })
        )),
    ]
}
