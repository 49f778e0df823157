//! Good and bad manifests, with the texts that people get.
// Helpers of tests may panic as the tests themselves do.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use tidegate_api::{Reader, Severity};
use tidegate_policy::model;

fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, text).unwrap();
    path
}

/// Problems of one manifest, without the file's name.
fn problems(text: &str) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "a.yaml", text);
    let prefix = format!("{}:", path.display());
    let found = tidegate_api::check_file(&path).unwrap();
    found.iter().map(|p| format!("{} {}", p.severity.as_str(), p.to_string().strip_prefix(&prefix).unwrap())).collect()
}

/// A policy with these lines in its spec.
fn policy(spec: &str) -> String {
    let mut out = String::from(
        "apiVersion: tidegate.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {name: p, namespace: shop}\nspec:\n",
    );
    for l in spec.lines() {
        out += &format!("  {l}\n");
    }
    out
}

/// A policy with one rule, whose fields these are.
fn rule(fields: &str) -> String {
    policy(&format!("podSelector: {{}}\negress:\n- {{name: r, {fields}}}"))
}

fn deny(fields: &str) -> String {
    policy(&format!("podSelector: {{}}\negressDeny:\n- {{name: r, {fields}}}"))
}

fn cluster(spec: &str) -> String {
    let mut out =
        String::from("apiVersion: tidegate.dev/v1alpha1\nkind: ClusterEgressPolicy\nmetadata: {name: c}\nspec:\n");
    for l in spec.lines() {
        out += &format!("  {l}\n");
    }
    out
}

fn pool(fields: &str) -> String {
    format!("apiVersion: tidegate.dev/v1alpha1\nkind: EgressPool\nmetadata: {{name: e}}\nspec: {{{fields}}}\n")
}

const FQDN: &str = "toFQDNs: [{matchName: a.example.com}]";
const P443: &str = "toPorts: [{protocol: TCP, port: 443}]";

#[test]
fn bad_manifests_name_the_field() {
    let policy_head = "document 1: EgressPolicy shop/p: ";
    let rule_head = "7: document 1: EgressPolicy shop/p: spec.egress[r]";
    let deny_head = "7: document 1: EgressPolicy shop/p: spec.egressDeny[r]";
    let cases: Vec<(String, String)> = vec![
        // What a rule needs.
        (rule(P443), format!("{rule_head}: one of `toFQDNs` and `toCIDRs` is required")),
        (rule(FQDN), format!("{rule_head}: `toPorts` is required")),
        (deny(FQDN), format!("{deny_head}: `toPorts` is required; for every port write `toPorts: [{{protocol: Any}}]`")),
        (
            rule(&format!("{FQDN}, toCIDRs: [{{cidr: 10.0.0.0/8}}], {P443}")),
            format!("{rule_head}: has both `toFQDNs` and `toCIDRs`; write two rules"),
        ),
        (
            rule(&format!("toFQDNs: [], {P443}")),
            format!("{rule_head}.toFQDNs: needs at least one item; an empty list does not mean everything"),
        ),
        (
            rule(&format!("{FQDN}, toPorts: []")),
            format!("{rule_head}.toPorts: needs at least one item; an empty list does not mean everything"),
        ),
        // Names.
        (
            rule(&format!("toFQDNs: [{{}}], {P443}")),
            format!("{rule_head}.toFQDNs[0]: one of `matchName` and `matchPattern` is required"),
        ),
        (
            rule(&format!("toFQDNs: [{{matchName: a.b, matchPattern: '*.b.c'}}], {P443}")),
            format!("{rule_head}.toFQDNs[0]: has both `matchName` and `matchPattern`; write two items"),
        ),
        (
            rule(&format!("toFQDNs: [{{matchName: '*.example.com'}}], {P443}")),
            format!("{rule_head}.toFQDNs[0].matchName: is exact and takes no `*`; write `matchPattern`"),
        ),
        (
            rule(&format!("toFQDNs: [{{matchName: 'a b'}}], {P443}")),
            format!("{rule_head}.toFQDNs[0].matchName: the name has a character that is not a letter, a digit, '-' or '_'"),
        ),
        (
            rule(&format!("toFQDNs: [{{matchName: 203.0.113.7}}], {P443}")),
            format!("{rule_head}.toFQDNs[0].matchName: is an address, not a name; write `toCIDRs`"),
        ),
        (
            rule(&format!("toFQDNs: [{{matchPattern: 'a..b'}}], {P443}")),
            format!("{rule_head}.toFQDNs[0].matchPattern: the pattern has an empty label"),
        ),
        // Prefixes.
        (
            rule(&format!("toCIDRs: [{{cidr: 203.0.113.7}}], {P443}")),
            format!("{rule_head}.toCIDRs[0].cidr: is an address, not a prefix; write `203.0.113.7/32`"),
        ),
        (
            rule(&format!("toCIDRs: [{{cidr: 203.0.113.7/24}}], {P443}")),
            format!("{rule_head}.toCIDRs[0].cidr: has bits set behind its length; write `203.0.113.0/24`"),
        ),
        (
            rule(&format!("toCIDRs: [{{cidr: '::ffff:203.0.113.0/120'}}], {P443}")),
            format!("{rule_head}.toCIDRs[0].cidr: is an IPv4-mapped prefix; write it as IPv4"),
        ),
        (
            rule(&format!("toCIDRs: [{{cidr: 203.0.113.0/24, except: [203.0.114.0/25]}}], {P443}")),
            format!("{rule_head}.toCIDRs[0].except[0]: 203.0.114.0/25 does not lie inside 203.0.113.0/24"),
        ),
        (
            rule(&format!("toCIDRs: [{{cidr: 203.0.113.0/24, except: [203.0.113.0/24]}}], {P443}")),
            format!("{rule_head}.toCIDRs[0].except[0]: 203.0.113.0/24 does not lie inside 203.0.113.0/24"),
        ),
        // Ports.
        (
            rule(&format!("{FQDN}, toPorts: [{{protocol: Any}}]")),
            format!(
                "{rule_head}.toPorts[0].protocol: `Any` is valid only in denies; write one item for TCP and one for UDP"
            ),
        ),
        (
            rule(&format!("{FQDN}, toPorts: [{{protocol: TCP}}]")),
            format!("{rule_head}.toPorts[0]: `port` is required; it can be left out only in denies"),
        ),
        (
            rule(&format!("{FQDN}, toPorts: [{{protocol: TCP, port: 443, endPort: 442}}]")),
            format!("{rule_head}.toPorts[0].endPort: must not be below `port` (443)"),
        ),
        (
            rule(&format!("{FQDN}, toPorts: [{{protocol: TCP, port: 0}}]")),
            format!("{rule_head}.toPorts[0].port: must be between 1 and 65535"),
        ),
        (
            rule(&format!("{FQDN}, toPorts: [{{protocol: TCP, port: 65536}}]")),
            format!("{rule_head}.toPorts[0].port: must be between 1 and 65535"),
        ),
        (
            deny(&format!("{FQDN}, toPorts: [{{protocol: Any, endPort: 9}}]")),
            format!("{deny_head}.toPorts[0]: `endPort` needs a `port` where the range starts"),
        ),
        (
            rule(&format!("{FQDN}, toPorts: [{{protocol: SCTP, port: 1}}]")),
            format!("{rule_head}.toPorts[0].protocol: SCTP is not supported: it is always refused; write TCP or UDP"),
        ),
        (rule(&format!("{FQDN}, toPorts: [{{port: 1}}]")), format!("{rule_head}.toPorts[0]: `protocol` is required")),
        // Nothing is coerced.
        (
            rule(&format!("{FQDN}, toPorts: [{{protocol: TCP, port: '443'}}]")),
            format!("{rule_head}.toPorts[0].port: must be an integer, not a string; write it without quotes"),
        ),
        (
            rule(&format!("{FQDN}, toPorts: [{{protocol: TCP, port: 443.5}}]")),
            format!("{rule_head}.toPorts[0].port: must be an integer, not a number"),
        ),
        (
            rule(&format!("toFQDNs: [{{matchName: 7}}], {P443}")),
            format!("{rule_head}.toFQDNs[0].matchName: must be a string, not a number; put it in quotes"),
        ),
        (
            rule(&format!("toFQDNs: [{{matchName: no}}], {P443}")),
            format!("{rule_head}.toFQDNs[0].matchName: must be a string, not a boolean; put it in quotes"),
        ),
        (
            rule(&format!("toFQDNs: ~, {P443}")),
            format!("{rule_head}.toFQDNs: must be a value, not null; write a value, or leave the field out"),
        ),
        (
            policy("podSelector: {matchLabels: {tier: 1}}"),
            format!("5: {policy_head}spec.podSelector.matchLabels.tier: must be a string, not a number; put it in quotes"),
        ),
        (
            policy("podSelector: {}\negress:\n  name: x"),
            format!("7: {policy_head}spec.egress: must be a list, not a map"),
        ),
        // Fields that do not exist, or not yet.
        (
            rule(&format!("toFqdns: [], {P443}")),
            format!("{rule_head}.toFqdns: unknown field; did you mean `toFQDNs`?"),
        ),
        (
            policy("podSelector: {}\nxyz: 1"),
            format!(
                "6: {policy_head}spec.xyz: unknown field; the fields are \
                 `podSelector`, `mode`, `poolRef`, `onRevoke`, `egress`, `egressDeny`"
            ),
        ),
        (
            policy("podSelector: {}\nmode: enforce"),
            format!("6: {policy_head}spec.mode: `enforce` is not a value of this field; did you mean `Enforce`?"),
        ),
        (
            policy("podSelector: {}") + "extra: 1\n",
            format!("6: {policy_head}extra: unknown field; the fields are apiVersion, kind, metadata, spec and status"),
        ),
        (policy("mode: Enforce"), format!("5: {policy_head}spec: `podSelector` is required")),
        (
            rule(&format!("{FQDN}, {P443}, http: [{{methods: [GET]}}]")),
            format!(
                "{rule_head}.http: HTTP is not inspected yet; leave `http` out, and write `sni: Unchecked` to allow plain HTTP unchecked"
            ),
        ),
        (
            rule(&format!("{FQDN}, {P443}, quic: Inspect")),
            format!(
                "{rule_head}.quic: QUIC is not inspected yet; write `Block`, the default until then: clients fall back to TCP"
            ),
        ),
        (
            policy("podSelector: {}\nonRevoke: Drain"),
            format!(
                "6: {policy_head}spec.onRevoke: `Drain` is not carried out yet; write `Reset`, the default: connections that an \
                 edit no longer allows are ended"
            ),
        ),
        (
            rule(&format!("{FQDN}, {P443}, sni: IfPresent")),
            format!(
                "{rule_head}.sni: `IfPresent` is not offered, since a hostile client leaves TLS out; write `Required`, \
                 or `Unchecked` for a protocol that does not start with TLS"
            ),
        ),
        (
            rule(&format!("{FQDN}, {P443}, action: Accept")),
            format!(
                "{rule_head}.action: only rules of a ClusterEgressPolicy have an action; `egress` allows, `egressDeny` denies"
            ),
        ),
        // Fields that mean nothing where they stand.
        (
            rule(&format!("toCIDRs: [{{cidr: 203.0.113.0/24}}], {P443}, sni: Unchecked")),
            format!("{rule_head}.sni: belongs to `toFQDNs`; connections to prefixes are not inspected"),
        ),
        (
            deny(&format!("{FQDN}, {P443}, ech: Allow")),
            format!("{deny_head}.ech: has no meaning in a deny; leave it out"),
        ),
        // The rest of a rule.
        (
            rule(&format!("{FQDN}, {P443}, dnsTypes: [TXT, AAAA]")),
            format!("{rule_head}.dnsTypes[1]: `AAAA` is always answered; leave it out"),
        ),
        (
            rule(&format!("{FQDN}, {P443}, dnsTypes: [TYPE41]")),
            format!("{rule_head}.dnsTypes[0]: `TYPE41` is not a query type; write TXT, SRV, MX, … or TYPE with a number"),
        ),
        (
            rule(&format!("{FQDN}, {P443}, privateAddresses: [127.0.0.0/8]")),
            format!(
                "{rule_head}.privateAddresses[0]: 127.0.0.0/8 is loopback, link-local or multicast, which no answer may contain"
            ),
        ),
        (
            rule(&format!("{FQDN}, {P443}, minBindingSeconds: 86401")),
            format!("{rule_head}.minBindingSeconds: must be between 0 and 86400"),
        ),
        (
            rule(&format!("{FQDN}, {P443}, expireTime: '2027-01-31'")),
            format!("{rule_head}.expireTime: must be a time as RFC 3339 has it, such as \"2027-01-31T00:00:00Z\""),
        ),
        (
            policy(&format!("podSelector: {{}}\negress:\n- {{name: '0', {FQDN}, {P443}}}")),
            format!(
                "7: {policy_head}spec.egress[0].name: must be 1 to 63 lower-case letters, digits and '-', \
                 start with a letter and not end with '-'"
            ),
        ),
        (
            policy(&format!(
                "podSelector: {{}}\negress:\n- {{name: r, {FQDN}, {P443}}}\negressDeny:\n- {{name: r, {FQDN}, {P443}}}"
            )),
            format!("9: {policy_head}spec.egressDeny[r].name: another rule of this policy is named `r`"),
        ),
        (
            policy(&format!("podSelector: {{}}\negress:\n- {FQDN}\n  {P443}\n- {FQDN}")),
            format!("9: {policy_head}spec.egress[1]: `toPorts` is required"),
        ),
        // Selectors.
        (
            policy("podSelector: {matchExpressions: [{key: a, operator: In}]}"),
            format!("5: {policy_head}spec.podSelector.matchExpressions[0].values: the operator needs at least one value"),
        ),
        (
            policy("podSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}"),
            format!("5: {policy_head}spec.podSelector.matchExpressions[0].values: the operator takes no values"),
        ),
        (
            policy("podSelector: {matchLabels: {a: 'b c'}}"),
            format!(
                "5: {policy_head}spec.podSelector.matchLabels.a: the value is not a label value \
                 (at most 63 letters, digits, '-', '_' and '.', ends alphanumeric)"
            ),
        ),
        // Cluster policies.
        (
            cluster("tier: Admin\npriority: 1001\nsubject: {namespaceSelector: {}}\nceiling: {toFQDNs: [{matchPattern: '*'}]}"),
            "6: document 1: ClusterEgressPolicy c: spec.priority: must be between 0 and 1000".into(),
        ),
        (
            cluster("tier: Admin\npriority: '1'\nsubject: {namespaceSelector: {}}"),
            "6: document 1: ClusterEgressPolicy c: spec.priority: must be an integer, not a string; write it without quotes".into(),
        ),
        (
            cluster("tier: Admin\npriority: 1\nsubject: {}"),
            "7: document 1: ClusterEgressPolicy c: spec.subject: `namespaceSelector` is required".into(),
        ),
        (
            cluster(&format!("tier: Admin\npriority: 1\nsubject: {{namespaceSelector: {{}}}}\negress:\n- {{name: r, {FQDN}, {P443}}}")),
            "9: document 1: ClusterEgressPolicy c: spec.egress[r]: `action` is required: Accept, Deny or Pass".into(),
        ),
        (
            cluster(&format!(
                "tier: Admin\npriority: 1\nsubject: {{namespaceSelector: {{}}}}\negress:\n- {{name: r, action: Pass, {FQDN}, {P443}, sni: Unchecked}}"
            )),
            "9: document 1: ClusterEgressPolicy c: spec.egress[r].sni: has no meaning with `action: Pass`; leave it out".into(),
        ),
        (
            cluster("tier: Admin\npriority: 1\nsubject: {namespaceSelector: {}}\nceiling: {toFQDNs: [{matchPattern: '*'}], toPorts: [{protocol: TCP}]}"),
            "8: document 1: ClusterEgressPolicy c: spec.ceiling.toPorts[0]: `port` is required; it can be left out only in denies".into(),
        ),
        (
            cluster("tier: Admin\npriority: 1\nsubject: {namespaceSelector: {}}\nceiling: {toFQDNs: [{matchPattern: '*'}]}\noverride: {}"),
            "9: document 1: ClusterEgressPolicy c: spec.override: break-glass is not supported yet; \
             write an Admin policy with `priority: 0` and an `Accept` rule instead".into(),
        ),
        // Pools.
        (pool("addressSource: Static"), "4: document 1: EgressPool e: spec: `static` is required with `addressSource: Static`".into()),
        (
            pool("addressSource: PodNetwork, static: {addresses: [{ipv4: 203.0.113.1}]}"),
            "4: document 1: EgressPool e: spec.static: belongs to `addressSource: Static`; with PodNetwork leave it out".into(),
        ),
        (
            pool("addressSource: Static, static: {addresses: []}"),
            "4: document 1: EgressPool e: spec.static.addresses: needs at least one pair".into(),
        ),
        (
            pool("addressSource: Static, static: {addresses: [{}]}"),
            "4: document 1: EgressPool e: spec.static.addresses[0]: needs `ipv4`, `ipv6` or both".into(),
        ),
        (
            pool("addressSource: Static, static: {addresses: [{ipv4: '2001:db8::1'}]}"),
            "4: document 1: EgressPool e: spec.static.addresses[0].ipv4: must be an IPv4 address".into(),
        ),
        (
            pool("addressSource: Static, static: {addresses: [{ipv6: 'fe80::1'}]}"),
            "4: document 1: EgressPool e: spec.static.addresses[0].ipv6: fe80::1 cannot be the source of a connection".into(),
        ),
        (
            pool("addressSource: Static, static: {addresses: [{ipv4: 203.0.113.1}, {ipv4: 203.0.113.1}]}"),
            "4: document 1: EgressPool e: spec.static.addresses[1].ipv4: 203.0.113.1 is in the pool twice".into(),
        ),
        (
            pool("addressSource: Static, static: {interface: a/b, addresses: [{ipv4: 203.0.113.1}]}"),
            "4: document 1: EgressPool e: spec.static.interface: `a/b` cannot be the name of a network interface".into(),
        ),
        // Who an object is.
        (
            "apiVersion: tidegate.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {name: p}\nspec: {podSelector: {}}\n".into(),
            "3: document 1: EgressPolicy p: metadata: `namespace` is required".into(),
        ),
        (
            "apiVersion: tidegate.dev/v1alpha1\nkind: EgressPool\nmetadata: {name: p, namespace: ns}\nspec: {addressSource: PodNetwork}\n".into(),
            "3: document 1: EgressPool ns/p: metadata.namespace: the kind belongs to no namespace; leave it out".into(),
        ),
        (
            "apiVersion: tidegate.dev/v1alpha1\nkind: EgressPool\nmetadata: {name: P_x}\nspec: {addressSource: PodNetwork}\n".into(),
            "3: document 1: EgressPool P_x: metadata.name: must be labels of lower-case letters, digits and '-', \
             separated by dots, at most 253 characters"
                .into(),
        ),
        (
            "apiVersion: tidegate.dev/v1\nkind: EgressPool\nmetadata: {name: p}\n".into(),
            "1: document 1: EgressPool p: apiVersion: `tidegate.dev/v1` does not exist; write tidegate.dev/v1alpha1".into(),
        ),
        (
            "apiVersion: tidegate.dev/v1alpha1\nkind: EgressPolice\nmetadata: {name: p}\n".into(),
            "2: document 1: EgressPolice p: kind: `EgressPolice` does not exist in tidegate.dev; \
             the kinds are EgressPolicy, ClusterEgressPolicy, EgressPool and NamespaceEgress"
                .into(),
        ),
        ("kind: EgressPolicy\n".into(), "1: document 1: `apiVersion` is required".into()),
        ("- a\n".into(), "1: document 1: an object must be a map, not a list".into()),
        // Core objects.
        (
            "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: ns}\nstatus: {podIP: 10.0.0.300}\n".into(),
            "4: document 1: Pod ns/p: status.podIPs: `10.0.0.300` is not an IP address".into(),
        ),
        (
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: ns, annotations: {tidegate.dev/managed: true}}\n".into(),
            "3: document 1: Namespace ns: metadata.annotations[tidegate.dev/managed]: must be a string, not a boolean; put it in quotes"
                .into(),
        ),
    ];
    for (text, want) in cases {
        let got: Vec<String> = problems(&text).into_iter().filter(|p| p.starts_with("error")).collect();
        assert_eq!(got, [format!("error {want}")], "{text}");
    }
}

#[test]
fn syntax_errors_have_their_line_in_the_file() {
    let text = format!("{}---\na: [1\nb: 2\n", policy("podSelector: {}"));
    let got = problems(&text);
    assert_eq!(got.len(), 1, "{got:?}");
    assert!(got[0].starts_with("error 8: document 2: "), "{got:?}");
    let got = problems("# first\n---\na: 1\na: 2\n");
    assert!(got[0].starts_with("error 4: document 1: ") && got[0].contains("duplicate"), "{got:?}");
}

#[test]
fn limits_are_refused_not_cut() {
    let many = |n: usize, item: &str| vec![item; n].join(", ");
    for (text, want) in [
        (
            rule(&format!("toFQDNs: [{}], {P443}", many(1025, "{matchName: a.example.com}"))),
            "error 7: document 1: EgressPolicy shop/p: spec.egress[r].toFQDNs: has 1025 items; at most 1024 are allowed",
        ),
        (
            rule(&format!("{FQDN}, toPorts: [{}]", many(33, "{protocol: TCP, port: 443}"))),
            "error 7: document 1: EgressPolicy shop/p: spec.egress[r].toPorts: has 33 items; at most 32 are allowed",
        ),
        (
            policy(&format!("podSelector: {{}}\negress: [{}]", many(257, &format!("{{{FQDN}, {P443}}}")))),
            "error 6: document 1: EgressPolicy shop/p: spec.egress: has 257 items; at most 256 are allowed",
        ),
    ] {
        assert_eq!(problems(&text), [want]);
    }
    let deep = format!("a: {}1{}\n", "[".repeat(40), "]".repeat(40));
    let got = problems(&deep);
    assert!(got.len() == 1 && got[0].starts_with("error 1: document 1: "), "{got:?}");
    let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for i in 1..9 {
        bomb += &format!("a{i}: &a{i} [{}]\n", vec![format!("*a{}", i - 1); 10].join(", "));
    }
    let got = problems(&bomb);
    assert!(got.len() == 1 && got[0].starts_with("error "), "{got:?}");
}

#[test]
fn warnings_say_what_is_probably_not_meant() {
    let head = "warning 7: document 1: EgressPolicy shop/p: spec.egress[r]";
    let broad = |p: &str| problems(&rule(&format!("toFQDNs: [{{matchPattern: '{p}'}}], {P443}")));
    assert_eq!(broad("**.example.com"), Vec::<String>::new());
    assert_eq!(broad("*"), [format!("{head}.toFQDNs[0].matchPattern: matches every name")]);
    assert!(broad("*x.com")[0].contains("also matches names of others"), "{:?}", broad("*x.com"));
    assert!(broad("**.co.uk")[0].contains("public suffix"), "{:?}", broad("**.co.uk"));
    assert_eq!(
        broad("*.github.io"),
        [format!(
            "{head}.toFQDNs[0].matchPattern: is a wildcard right below `github.io`, where anyone can have a name"
        )]
    );
    assert_eq!(
        problems(&rule(&format!("{FQDN}, toPorts: [{{protocol: TCP, port: 80}}]"))),
        [format!(
            "{head}.toPorts[0]: port 80 is plain HTTP, which is refused as not-tls until HTTP is inspected; \
             put it into a rule with `sni: Unchecked` (then name, address and port are bound, not the SNI)"
        )]
    );
    let unchecked = rule(&format!("{FQDN}, toPorts: [{{protocol: TCP, port: 80}}], sni: Unchecked"));
    assert_eq!(problems(&unchecked), Vec::<String>::new());
    assert!(problems(&rule(&format!("{FQDN}, toPorts: [{{protocol: UDP, port: 443}}]")))[0].contains("add TCP 443"));
    assert_eq!(
        problems(&rule(&format!("toCIDRs: [{{cidr: 0.0.0.0/0}}], {P443}"))),
        [format!("{head}.toCIDRs[0].cidr: 0.0.0.0/0 is every address of its family")]
    );
    let tenant = cluster(&format!(
        "tier: Admin\npriority: 1\nsubject: {{namespaceSelector: {{}}, podSelector: {{matchLabels: {{a: b}}}}}}\n\
         egress:\n- {{name: r, action: Accept, {FQDN}, {P443}}}"
    ));
    assert!(problems(&tenant)[0].contains("spec.subject.podSelector: the policy accepts by a pod label"));
    assert_eq!(
        problems("apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d, namespace: ns}\n"),
        ["note 1: document 1: Deployment ns/d: apps/v1 Deployment is not read"]
    );
}

#[test]
fn a_whole_policy_arrives() {
    let dir = tempfile::tempdir().unwrap();
    write(
        dir.path(),
        "a.yaml",
        &policy(
            "podSelector: {matchExpressions: [{key: app, operator: In, values: [web]}]}\nmode: Staged\npoolRef: {name: x}\n\
             onRevoke: Reset\negress:\n- toFQDNs: [{matchName: API.example.com.}, {matchPattern: '*.Example.com'}]\n  \
             toPorts: [{protocol: TCP, port: 443, endPort: 445}, {protocol: UDP, port: 443}]\n  sni: Unchecked\n  quic: Block\n  \
             ech: Allow\n  dnsTypes: [TXT, TYPE65280]\n  privateAddresses: [10.0.0.0/8]\n  minBindingSeconds: 60\n  \
             expireTime: 2027-01-31T00:00:00Z\n\
             egressDeny:\n- {name: all, toCIDRs: [{cidr: '::/0', except: ['2001:db8::/32']}], toPorts: [{protocol: Any}]}",
        ),
    );
    let loaded = Reader::new(dir.path()).reload();
    assert_eq!(loaded.problems, []);
    let p = &loaded.objects.policies[&("shop".to_owned(), "p".to_owned())];
    assert_eq!(p.mode, model::PolicyMode::Staged);
    assert_eq!(p.pool.as_deref(), Some("x"));
    let app = |v: &str| model::Labels::from([("app".to_owned(), v.to_owned())]);
    assert!(p.pod_selector.matches(&app("web")) && !p.pod_selector.matches(&app("db")));
    let r = &p.egress[0];
    assert_eq!(&*r.name, "0");
    assert!(matches!(&r.fqdns[0], model::Fqdn::Name(n) if n.as_str() == "api.example.com"));
    assert!(matches!(&r.fqdns[1], model::Fqdn::Pattern(n) if n.as_str() == "*.example.com"));
    assert_eq!((r.ports[0].lo, r.ports[0].hi, r.ports.len()), (443, 445, 2));
    assert_eq!((r.sni, r.ech_allow), (model::SniMode::Unchecked, true));
    assert_eq!(r.dns_types, [16, 65280]);
    assert_eq!(r.private_addresses, ["10.0.0.0/8".parse().unwrap()]);
    assert_eq!(r.min_binding.map(|d| d.as_secs()), Some(60));
    assert_eq!(r.expires, Some(model::UnixSeconds(1_801_353_600)));
    let d = &p.deny[0];
    assert_eq!(d.ports, [model::Ports { proto: None, lo: 0, hi: 65_535 }]);
    assert_eq!(d.cidrs[0].except.len(), 1);
}

#[test]
fn core_objects_arrive_as_the_api_server_writes_them() {
    let dir = tempfile::tempdir().unwrap();
    write(
        dir.path(),
        "a.json",
        "{\n\t\"apiVersion\": \"v1\",\n\t\"kind\": \"List\",\n\t\"metadata\": {\"resourceVersion\": \"\"},\n\t\"items\": [\n\
         \t{\"apiVersion\": \"v1\", \"kind\": \"Node\", \"metadata\": {\"name\": \"n1\", \"labels\": {\"a\": \"b\"}, \"managedFields\": [{\"x\": 1}]},\n\
         \t \"spec\": {\"podCIDR\": \"10.1.0.0/24\", \"podCIDRs\": [\"10.1.0.0/24\", \"fd00::/64\"], \"taints\": null},\n\
         \t \"status\": {\"addresses\": [{\"type\": \"Hostname\", \"address\": \"n1\"}, {\"type\": \"ExternalIP\", \"address\": \"198.51.100.1\"},\n\
         \t {\"type\": \"InternalIP\", \"address\": \"192.0.2.1\"}], \"capacity\": {\"cpu\": \"4\"}}},\n\
         \t{\"apiVersion\": \"v1\", \"kind\": \"Pod\", \"metadata\": {\"name\": \"p\", \"namespace\": \"n\", \"creationTimestamp\": null, \"labels\": null},\n\
         \t \"spec\": {\"nodeName\": \"n1\", \"containers\": []},\n\
         \t \"status\": {\"phase\": \"Running\", \"podIP\": \"10.1.0.5\", \"podIPs\": [{\"ip\": \"10.1.0.5\"}, {\"ip\": \"fd00::5\"}]}},\n\
         \t{\"apiVersion\": \"v1\", \"kind\": \"Pod\", \"metadata\": {\"name\": \"done\", \"namespace\": \"n\"},\n\
         \t \"status\": {\"phase\": \"Succeeded\", \"podIP\": \"10.1.0.5\"}}\n\t]\n}\n",
    );
    let loaded = Reader::new(dir.path()).reload();
    assert_eq!(loaded.problems, []);
    let node = &loaded.objects.nodes["n1"];
    assert_eq!(node.addresses, ["192.0.2.1".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(node.pod_prefixes.len(), 2);
    let pod = &loaded.objects.pods[&("n".to_owned(), "p".to_owned())];
    assert_eq!((pod.node.as_str(), pod.addresses.len(), pod.host_network), ("n1", 2, false));
    assert!(loaded.objects.pods[&("n".to_owned(), "done".to_owned())].addresses.is_empty());
}

/// A node that was stolen says what it likes of itself.
#[test]
fn a_node_does_not_make_the_internet_a_part_of_the_cluster() {
    let dir = tempfile::tempdir().unwrap();
    write(
        dir.path(),
        "a.yaml",
        "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\n\
         spec: {podCIDRs: [0.0.0.0/0, '::/0', 10.0.0.0/15, 10.1.0.0/16, 'fd00::/47', 'fd00:1::/48']}\n\
         status: {addresses: [{type: InternalIP, address: 192.0.2.1}, {type: ExternalIP, address: 198.51.100.1}]}\n",
    );
    let loaded = Reader::new(dir.path()).reload();
    let texts: Vec<String> = loaded.problems.iter().map(ToString::to_string).collect();
    assert_eq!(texts.len(), 4, "{texts:?}");
    assert!(texts[0].contains("0.0.0.0/0` is too much for one node"), "{texts:?}");
    let node = &loaded.objects.nodes["n1"];
    assert_eq!(node.addresses.len(), 1);
    let prefixes: Vec<String> = node.pod_prefixes.iter().map(ToString::to_string).collect();
    assert_eq!(prefixes, ["10.1.0.0/16", "fd00:1::/48"]);
}

/// Octets changed, cut and doubled at random: always an answer, never a panic.
#[test]
fn damaged_manifests_never_panic() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/policy.md");
    let text = std::fs::read_to_string(docs).unwrap();
    let blocks: Vec<&str> = text.split("```yaml\n").skip(1).map(|b| b.split("```").next().unwrap()).collect();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.yaml");
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = |n: usize| {
        // xorshift64: the same damage in every run.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % n as u64) as usize
    };
    let mut good = 0;
    for i in 0..1500 {
        let mut bytes = blocks[i % blocks.len()].as_bytes().to_vec();
        for _ in 0..=random(3) {
            let at = random(bytes.len());
            match random(4) {
                0 => bytes[at] = b" \n:-[]{}*&!|>'\"%@`#,0aZ~\t\xff\x00"[random(27)],
                1 => bytes.truncate(at.max(1)),
                2 => drop(bytes.remove(at)),
                _ => bytes.extend_from_within(at..),
            }
            if bytes.is_empty() {
                bytes.push(b'a');
            }
        }
        std::fs::write(&path, &bytes).unwrap();
        let found = tidegate_api::check(&path).unwrap();
        good += usize::from(found.is_empty());
        for p in found {
            let line = p.to_string();
            assert!(!line.contains(char::is_control), "{line:?}");
        }
    }
    assert!(good > 0, "some damage is harmless");
}

#[test]
fn severities_order_by_weight() {
    assert!(Severity::Error < Severity::Refused && Severity::Refused < Severity::Warning);
}
