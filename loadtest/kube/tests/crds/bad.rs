//! Manifests that are refused, by whom, and with which words.

use crate::table::{
    FQDN, P443, cluster, cluster_rule, deny, many, names, object, pairs, policy, pool, ports, prefixes, rule, with,
};

/// A manifest that somebody refuses.
pub struct Bad {
    /// The manifest.
    pub text: String,
    /// A part of what the API server says; empty where it cannot know, and Tidegate says it in a condition later.
    pub api: &'static str,
    /// A part of what the directory reader says; empty where it does not mind.
    pub reader: &'static str,
}

/// All of them.
pub fn bad() -> Vec<Bad> {
    let mut out = Vec::new();
    let mut bad = |text: String, api: &'static str, reader: &'static str| out.push(Bad { text, api, reader });
    what_a_rule_needs(&mut bad);
    names_and_prefixes(&mut bad);
    ports_and_types(&mut bad);
    fields_of_rules(&mut bad);
    selectors(&mut bad);
    cluster_policies(&mut bad);
    pools(&mut bad);
    out
}

type Add<'a> = dyn FnMut(String, &'static str, &'static str) + 'a;

fn what_a_rule_needs(bad: &mut Add<'_>) {
    bad(
        rule(P443),
        "spec.egress[0]: Invalid value: exactly one of `toFQDNs` and `toCIDRs` is required",
        "spec.egress[r]: one of `toFQDNs` and `toCIDRs` is required",
    );
    bad(
        rule(&format!("{FQDN}, toCIDRs: [{{cidr: 10.0.0.0/8}}], {P443}")),
        "spec.egress[0]: Invalid value: exactly one of `toFQDNs` and `toCIDRs`",
        "spec.egress[r]: has both `toFQDNs` and `toCIDRs`",
    );
    bad(rule(FQDN), "spec.egress[0].toPorts: Required value", "spec.egress[r]: `toPorts` is required");
    bad(deny(FQDN), "spec.egressDeny[0].toPorts: Required value", "spec.egressDeny[r]: `toPorts` is required");
    bad(
        names(""),
        "spec.egress[0].toFQDNs in body should have at least 1 items",
        "spec.egress[r].toFQDNs: needs at least one item",
    );
    bad(
        prefixes(""),
        "spec.egress[0].toCIDRs in body should have at least 1 items",
        "spec.egress[r].toCIDRs: needs at least one item",
    );
    bad(
        ports(""),
        "spec.egress[0].toPorts in body should have at least 1 items",
        "spec.egress[r].toPorts: needs at least one item",
    );
    bad(policy("mode: Enforce"), "spec.podSelector: Required value", "spec: `podSelector` is required");
    bad(
        policy(&format!("podSelector: {{}}\negress:\n- {{name: r, {FQDN}, {P443}}}\n- {{name: r, {FQDN}, {P443}}}")),
        "spec: Invalid value: two rules of egress and egressDeny have the same `name`",
        "spec.egress[r].name: another rule of this policy is named `r`",
    );
    bad(
        policy(&format!(
            "podSelector: {{}}\negress:\n- {{name: r, {FQDN}, {P443}}}\negressDeny:\n- {{name: r, {FQDN}, {P443}}}"
        )),
        "spec: Invalid value: two rules of egress and egressDeny have the same `name`",
        "spec.egressDeny[r].name: another rule of this policy is named `r`",
    );
    bad(
        policy(&format!("podSelector: {{}}\negress:\n- {{name: '0', {FQDN}, {P443}}}")),
        "spec.egress[0].name in body should match",
        "spec.egress[0].name: must be 1 to 63",
    );
    bad(
        names(&many(1025, "{matchName: a.example.com}")),
        "spec.egress[0].toFQDNs: Too many: 1025: must have at most 1024 items",
        "spec.egress[r].toFQDNs: has 1025 items",
    );
    bad(
        ports(&many(33, "{protocol: TCP, port: 443}")),
        "spec.egress[0].toPorts: Too many: 33: must have at most 32 items",
        "spec.egress[r].toPorts: has 33 items",
    );
    bad(
        policy(&format!("podSelector: {{}}\negress: [{}]", many(257, &format!("{{{FQDN}, {P443}}}")))),
        "spec.egress: Too many: 257: must have at most 256 items",
        "spec.egress: has 257 items",
    );
}

fn names_and_prefixes(bad: &mut Add<'_>) {
    bad(
        names("{}"),
        "spec.egress[0].toFQDNs[0]: Invalid value: exactly one of `matchName` and `matchPattern` is required",
        "spec.egress[r].toFQDNs[0]: one of",
    );
    bad(
        names("{matchName: a.b, matchPattern: '*.b.c'}"),
        "spec.egress[0].toFQDNs[0]: Invalid value: exactly one of",
        "spec.egress[r].toFQDNs[0]: has both",
    );
    bad(
        names("{matchName: '*.example.com'}"),
        "spec.egress[0].toFQDNs[0].matchName: Invalid value: is exact and takes no `*`; write `matchPattern`",
        "matchName: is exact and takes no `*`",
    );
    bad(
        names("{matchName: 'https://example.com'}"),
        "spec.egress[0].toFQDNs[0].matchName: Invalid value: is a name alone",
        "matchName: the name has a character",
    );
    for name in ["a b", "a/b", "a:443", "a..b", ".a", "a@b", "a,b", "''"] {
        let reader = if name.contains("..") || name == ".a" {
            "matchName: the name has an empty label"
        } else if name == "''" {
            "matchName: the name is empty"
        } else {
            "matchName: the name has a character"
        };
        bad(
            names(&format!("{{matchName: {name}}}").replace("a:443", "'a:443'").replace("a,b", "'a,b'")),
            "spec.egress[0].toFQDNs[0].matchName in body should",
            reader,
        );
    }
    bad(
        names("{matchName: 203.0.113.7}"),
        "spec.egress[0].toFQDNs[0].matchName in body should match",
        "matchName: is an address, not a name",
    );
    bad(
        names("{matchName: '2001:db8::1'}"),
        "spec.egress[0].toFQDNs[0].matchName in body should match",
        "matchName: the name has a character",
    );
    // Labels of 64 octets: in front the pattern counts, at the end only the reader does.
    bad(
        names(&format!("{{matchName: {}.example.com}}", "a".repeat(64))),
        "matchName in body should match",
        "matchName: a label is longer",
    );
    bad(names(&format!("{{matchName: {}}}", "a".repeat(64))), "", "matchName: a label is longer than 63");
    bad(
        names(&format!("{{matchName: {}com}}", "abc.".repeat(63))),
        "matchName: Too long: may not be more than 254",
        "matchName: the name is longer than 253",
    );
    // Only IDNA knows.
    bad(names("{matchName: 'a\u{2028}b.example'}"), "", "matchName: the name is not a valid internationalised name");
    bad(
        names("{matchPattern: 'a..b'}"),
        "spec.egress[0].toFQDNs[0].matchPattern in body should match",
        "matchPattern: the pattern has an empty label",
    );
    bad(
        names("{matchPattern: '*.b c'}"),
        "spec.egress[0].toFQDNs[0].matchPattern in body should match",
        "matchPattern: ",
    );
    bad(names("{matchPattern: 'http://*'}"), "matchPattern: Invalid value: is a name alone", "matchPattern: ");
    bad(names("{matchPattern: 'b\u{fc}*.example'}"), "matchPattern in body should match", "matchPattern: ");

    bad(
        prefixes("{cidr: 203.0.113.7}"),
        "spec.egress[0].toCIDRs[0].cidr in body must be of type cidr",
        "cidr: is an address, not a prefix; write `203.0.113.7/32`",
    );
    bad(
        prefixes("{cidr: 203.0.113.7/24}"),
        "spec.egress[0].toCIDRs[0].cidr: Invalid value: has bits set behind its length",
        "cidr: has bits set behind its length",
    );
    bad(
        prefixes("{cidr: '2001:db8::1/32'}"),
        "cidr: Invalid value: has bits set behind its length",
        "cidr: has bits set behind its length",
    );
    bad(
        prefixes("{cidr: '::ffff:203.0.113.0/120'}"),
        "cidr: Invalid value: has bits set behind its length, or is an IPv4-mapped prefix",
        "cidr: is an IPv4-mapped prefix",
    );
    bad(
        prefixes("{cidr: 203.0.113.0/33}"),
        "cidr in body must be of type cidr",
        "cidr: `203.0.113.0/33` is not a prefix",
    );
    bad(
        prefixes("{cidr: 203.0.113.0/24, except: [x]}"),
        "spec.egress[0].toCIDRs[0].except[0] in body must be of type cidr",
        "except[0]: `x` is not a prefix",
    );
    // Prefixes inside prefixes are nested too deep for CEL's budget.
    bad(
        prefixes("{cidr: 203.0.113.0/24, except: [203.0.114.0/25]}"),
        "",
        "except[0]: 203.0.114.0/25 does not lie inside 203.0.113.0/24",
    );
    bad(prefixes("{cidr: 203.0.113.0/24, except: [203.0.113.1/25]}"), "", "except[0]: has bits set behind its length");
    bad(
        prefixes(&many(257, "{cidr: 10.0.0.0/8}")),
        "spec.egress[0].toCIDRs: Too many: 257: must have at most 256 items",
        "toCIDRs: has 257 items",
    );
}

fn ports_and_types(bad: &mut Add<'_>) {
    bad(
        ports("{protocol: Any}"),
        "spec.egress[0].toPorts[0].protocol: Unsupported value: \"Any\": supported values: \"TCP\", \"UDP\"",
        "protocol: `Any` is valid only in denies",
    );
    bad(
        ports("{protocol: SCTP, port: 1}"),
        "spec.egress[0].toPorts[0].protocol: Unsupported value: \"SCTP\"",
        "protocol: SCTP is not supported",
    );
    bad(
        ports("{protocol: tcp, port: 1}"),
        "spec.egress[0].toPorts[0].protocol: Unsupported value: \"tcp\"",
        "protocol: `tcp` is not a value of this field",
    );
    bad(ports("{port: 1}"), "spec.egress[0].toPorts[0].protocol: Required value", "toPorts[0]: `protocol` is required");
    bad(ports("{protocol: TCP}"), "spec.egress[0].toPorts[0].port: Required value", "toPorts[0]: `port` is required");
    bad(
        ports("{protocol: TCP, port: 443, endPort: 442}"),
        "spec.egress[0].toPorts[0].endPort: Invalid value: needs a `port` that is not above it",
        "endPort: must not be below `port`",
    );
    bad(
        deny(&format!("{FQDN}, toPorts: [{{protocol: Any, endPort: 9}}]")),
        "spec.egressDeny[0].toPorts[0].endPort: Invalid value: needs a `port`",
        "toPorts[0]: `endPort` needs a `port`",
    );
    bad(
        ports("{protocol: TCP, port: 0}"),
        "spec.egress[0].toPorts[0].port in body should be greater than or equal to 1",
        "port: must be between 1 and 65535",
    );
    bad(
        ports("{protocol: TCP, port: 65536}"),
        "spec.egress[0].toPorts[0].port in body should be less than or equal to 65535",
        "port: must be between 1 and 65535",
    );
    bad(
        ports("{protocol: TCP, port: '443'}"),
        "spec.egress[0].toPorts[0].port in body must be of type integer: \"string\"",
        "port: must be an integer, not a string",
    );
    bad(
        ports("{protocol: TCP, port: 443.5}"),
        "spec.egress[0].toPorts[0].port in body must be of type integer",
        "port: must be an integer",
    );
    bad(
        names("{matchName: 7}"),
        "spec.egress[0].toFQDNs[0].matchName in body must be of type string",
        "matchName: must be a string, not a number",
    );
    bad(
        names("{matchName: no}"),
        "spec.egress[0].toFQDNs[0].matchName in body must be of type string: \"boolean\"",
        "matchName: must be a string, not a boolean",
    );
    bad(
        rule(&format!("toFQDNs: ~, {P443}")),
        "spec.egress[0]: Invalid value: exactly one of `toFQDNs`",
        "toFQDNs: must be a value, not null",
    );
    bad(
        policy("podSelector: {}\negress:\n  name: x"),
        "unknown field \"spec.egress.name\"",
        "spec.egress: must be a list, not a map",
    );
    bad(
        policy("podSelector: {}\negress: none"),
        "spec.egress in body must be of type array: \"string\"",
        "spec.egress: must be a list, not a string",
    );
}

fn fields_of_rules(bad: &mut Add<'_>) {
    bad(
        rule(&format!("toFqdns: [], {P443}")),
        "unknown field \"spec.egress[0].toFqdns\"",
        "toFqdns: unknown field; did you mean `toFQDNs`?",
    );
    bad(policy("podSelector: {}\nxyz: 1"), "unknown field \"spec.xyz\"", "spec.xyz: unknown field");
    bad(policy("podSelector: {}") + "extra: 1\n", "unknown field \"extra\"", "extra: unknown field");
    bad(
        policy("podSelector: {}\nmode: enforce"),
        "spec.mode: Unsupported value: \"enforce\": supported values: \"Enforce\", \"Staged\"",
        "spec.mode: `enforce` is not a value",
    );
    bad(
        policy("podSelector: {}\npoolRef: {name: A_b}"),
        "spec.poolRef.name in body should match",
        "spec.poolRef.name: must be labels",
    );
    bad(
        policy("podSelector: {}\npoolRef: {name: ''}"),
        "spec.poolRef.name in body should be at least 1 chars long",
        "spec.poolRef.name: must not be empty",
    );
    bad(
        with("http: [{methods: [GET]}]"),
        "spec.egress[0].http: Invalid value: HTTP is not inspected yet",
        "http: HTTP is not inspected yet",
    );
    bad(
        with("quic: Inspect"),
        "spec.egress[0].quic: Unsupported value: \"Inspect\": supported values: \"Block\"",
        "quic: QUIC is not inspected yet",
    );
    bad(
        policy("podSelector: {}\nonRevoke: Drain"),
        "spec.onRevoke: Unsupported value: \"Drain\": supported values: \"Reset\"",
        "onRevoke: `Drain` is not carried out yet",
    );
    bad(
        with("sni: IfPresent"),
        "spec.egress[0].sni: Unsupported value: \"IfPresent\": supported values: \"Required\", \"Unchecked\"",
        "sni: `IfPresent` is not offered",
    );
    bad(
        with("action: Accept"),
        "spec.egress[0].action: Invalid value: only rules of a ClusterEgressPolicy have an action",
        "action: only rules of a ClusterEgressPolicy",
    );
    bad(
        deny(&format!("{FQDN}, {P443}, action: Deny")),
        "spec.egressDeny[0].action: Invalid value: only rules of",
        "action: only rules of",
    );
    for field in [
        "sni: Required",
        "quic: Block",
        "ech: Allow",
        "dnsTypes: [TXT]",
        "privateAddresses: [10.0.0.0/8]",
        "minBindingSeconds: 1",
    ] {
        bad(
            rule(&format!("toCIDRs: [{{cidr: 203.0.113.0/24}}], {P443}, {field}")),
            "Invalid value: belongs to `toFQDNs`",
            ": belongs to `toFQDNs`",
        );
        bad(
            deny(&format!("{FQDN}, {P443}, {field}")),
            "Invalid value: has no meaning in a deny",
            ": has no meaning in a deny",
        );
        bad(
            cluster_rule(&format!("action: Pass, {FQDN}, {P443}, {field}")),
            "Invalid value: has a meaning only with `action: Accept`",
            ": has no meaning with `action: Pass`",
        );
    }
    bad(
        with("dnsTypes: [TXT, AAAA]"),
        "spec.egress[0].dnsTypes[1] in body should match",
        "dnsTypes[1]: `AAAA` is always answered",
    );
    bad(
        with("dnsTypes: [txt]"),
        "spec.egress[0].dnsTypes[0] in body should match",
        "dnsTypes[0]: `txt` is not a query type",
    );
    for n in ["1", "28", "41", "64", "65", "128", "255", "65536"] {
        bad(
            with(&format!("dnsTypes: [TYPE{n}]")),
            "spec.egress[0].dnsTypes[0]: Invalid value: is always answered, or is not a type",
            "dnsTypes[0]: `TYPE",
        );
    }
    bad(
        with("dnsTypes: []"),
        "spec.egress[0].dnsTypes in body should have at least 1 items",
        "dnsTypes: needs at least one item",
    );
    for prefix in
        ["127.0.0.0/8", "127.1.0.0/16", "169.254.169.254/32", "224.0.0.0/24", "'::1/128'", "'fe80::/64'", "'ff02::/16'"]
    {
        bad(
            with(&format!("privateAddresses: [{prefix}]")),
            "spec.egress[0].privateAddresses[0]: Invalid value: is loopback, link-local or multicast",
            "is loopback, link-local or multicast",
        );
    }
    bad(
        with("privateAddresses: [10.0.0.1/8]"),
        "spec.egress[0].privateAddresses[0]: Invalid value: has bits set behind",
        "privateAddresses[0]: has bits set behind its length",
    );
    bad(
        with("minBindingSeconds: 86401"),
        "spec.egress[0].minBindingSeconds in body should be less than or equal to 86400",
        "minBindingSeconds: must be between 0 and 86400",
    );
    bad(
        with("minBindingSeconds: -1"),
        "spec.egress[0].minBindingSeconds in body should be greater than or equal to 0",
        "minBindingSeconds: must be between 0 and 86400",
    );
    for time in ["2027-01-31", "2027-01-31 00:00:00Z", "2027-01-31T00:00:00", "2027-13-31T00:00:00Z", "tomorrow", ""] {
        bad(with(&format!("expireTime: '{time}'")), "spec.egress[0].expireTime in body", "expireTime: must be a time");
    }
}

fn selectors(bad: &mut Add<'_>) {
    let selector = |s: &str| policy(&format!("podSelector: {{{s}}}"));
    bad(
        selector("matchLabels: {tier: 1}"),
        "spec.podSelector.matchLabels.tier in body must be of type string",
        "spec.podSelector.matchLabels.tier: must be a string",
    );
    bad(
        selector("matchLabels: {a: 'b c'}"),
        "spec.podSelector.matchLabels.a in body should match",
        "spec.podSelector.matchLabels.a: the value is not a label value",
    );
    // Keys of maps have no schema, and no length that CEL's budget could be reckoned with.
    bad(selector("matchLabels: {'a b': c}"), "", "the key is not a label key");
    bad(
        selector("matchExpressions: [{key: a, operator: In}]"),
        "spec.podSelector.matchExpressions[0].values: Invalid value: `In` and `NotIn` need at least one value",
        "values: the operator needs at least one value",
    );
    bad(
        selector("matchExpressions: [{key: a, operator: Exists, values: [b]}]"),
        "spec.podSelector.matchExpressions[0].values: Invalid value",
        "values: the operator takes no values",
    );
    bad(
        selector("matchExpressions: [{key: a, operator: Near}]"),
        "spec.podSelector.matchExpressions[0].operator: Unsupported value: \"Near\"",
        "operator: `Near` is not a value",
    );
    bad(
        selector("matchExpressions: [{key: a/b/c, operator: Exists}]"),
        "spec.podSelector.matchExpressions[0].key in body should match",
        "key: the key is not a label key",
    );
    bad(
        selector("matchExpressions: [{key: a, operator: In, values: ['-']}]"),
        "spec.podSelector.matchExpressions[0].values[0] in body should match",
        "values[0]: the value is not a label value",
    );
    bad(
        selector("matchlabels: {a: b}"),
        "unknown field \"spec.podSelector.matchlabels\"",
        "spec.podSelector.matchlabels: unknown field",
    );
}

fn cluster_policies(bad: &mut Add<'_>) {
    bad(
        cluster(&format!(
            "egress:\n- {{name: r, action: Accept, {FQDN}, {P443}}}\n- {{name: r, action: Deny, {FQDN}, {P443}}}"
        )),
        "spec: Invalid value: two rules of egress have the same `name`",
        "spec.egress[r].name: another rule of this policy is named `r`",
    );
    bad(
        cluster("").replace("priority: 1", "priority: 1001"),
        "spec.priority in body should be less than or equal to 1000",
        "spec.priority: must be between 0 and 1000",
    );
    bad(
        cluster("").replace("priority: 1", "priority: -1"),
        "spec.priority in body should be greater than or equal to 0",
        "spec.priority: must be between 0 and 1000",
    );
    bad(
        cluster("").replace("priority: 1", "mode: Staged"),
        "spec.priority: Required value",
        "spec: `priority` is required",
    );
    bad(
        cluster("").replace("tier: Admin", "tier: admin"),
        "spec.tier: Unsupported value: \"admin\"",
        "spec.tier: `admin` is not a value",
    );
    bad(
        cluster("").replace("{namespaceSelector: {}}", "{}"),
        "spec.subject.namespaceSelector: Required value",
        "spec.subject: `namespaceSelector` is required",
    );
    bad(
        cluster_rule(&format!("{FQDN}, {P443}")),
        "spec.egress[0].action: Required value",
        "spec.egress[r]: `action` is required",
    );
    bad(
        cluster_rule(&format!("action: Allow, {FQDN}, {P443}")),
        "spec.egress[0].action: Unsupported value: \"Allow\"",
        "action: `Allow` is not a value",
    );
    bad(
        cluster_rule(&format!("action: Accept, {FQDN}, toPorts: [{{protocol: Any}}]")),
        "spec.egress[0].toPorts: Invalid value: `port` can be left out",
        "protocol: `Any` is valid only in denies",
    );
    bad(
        cluster_rule(&format!("action: Pass, {FQDN}, toPorts: [{{protocol: TCP}}]")),
        "spec.egress[0].toPorts: Invalid value: `port` can be left out",
        "toPorts[0]: `port` is required",
    );
    bad(
        cluster("override: true"),
        "unknown field \"spec.override\"",
        "spec.override: break-glass is not supported yet",
    );
    bad(
        cluster("ceiling: {toFQDNs: [{matchPattern: '*'}], toPorts: [{protocol: TCP}]}"),
        "spec.ceiling.toPorts[0].port: Required value",
        "spec.ceiling.toPorts[0]: `port` is required",
    );
    bad(
        cluster("ceiling: {toFQDNs: [{matchPattern: '*'}], toPorts: [{protocol: Any, port: 1}]}"),
        "spec.ceiling.toPorts[0].protocol: Unsupported value: \"Any\"",
        "protocol: `Any` is valid only in denies",
    );
    bad(
        cluster("ceiling: {toFQDNs: [{matchPattern: '*'}], toPorts: []}"),
        "spec.ceiling.toPorts in body should have at least 1 items",
        "spec.ceiling.toPorts: needs at least one item",
    );
    bad(
        cluster("ceiling: {permits: [Everything]}"),
        "spec.ceiling.permits[0]: Unsupported value: \"Everything\"",
        "spec.ceiling.permits[0]: `Everything` is not a value",
    );
}

fn pools(bad: &mut Add<'_>) {
    bad(
        pool("addressSource: Static"),
        "spec.static: Invalid value: `static` is required with `addressSource: Static`",
        "spec: `static` is required",
    );
    bad(
        pool("addressSource: PodNetwork\nstatic: {addresses: [{ipv4: 203.0.113.1}]}"),
        "spec.static: Invalid value: belongs to `addressSource: Static`",
        "spec.static: belongs to",
    );
    bad(pool("allowedNamespaces: {}"), "spec.addressSource: Required value", "spec: `addressSource` is required");
    bad(
        pairs(""),
        "spec.static.addresses in body should have at least 1 items",
        "spec.static.addresses: needs at least one pair",
    );
    bad(
        pairs("{}"),
        "spec.static.addresses[0]: Invalid value: needs `ipv4`, `ipv6` or both",
        "addresses[0]: needs `ipv4`, `ipv6` or both",
    );
    bad(pairs("{ipv4: '2001:db8::1'}"), "spec.static.addresses[0].ipv4", "ipv4: must be an IPv4 address");
    bad(
        pairs("{ipv6: 203.0.113.1}"),
        "spec.static.addresses[0].ipv6 in body must be of type ipv6",
        "ipv6: must be an IPv6 address",
    );
    for address in ["0.1.2.3", "127.0.0.1", "169.254.1.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"] {
        bad(
            pairs(&format!("{{ipv4: {address}}}")),
            "spec.static.addresses[0].ipv4: Invalid value: cannot be the source of a connection",
            "cannot be the source of a connection",
        );
    }
    for address in ["::", "::1", "fe80::1", "ff02::1", "::ffff:203.0.113.1"] {
        bad(
            pairs(&format!("{{ipv6: '{address}'}}")),
            "spec.static.addresses[0].ipv6: Invalid value: cannot be the source of a connection",
            "cannot be the source of a connection",
        );
    }
    bad(
        pairs("{ipv4: 203.0.113.1}, {ipv4: 203.0.113.1}"),
        "spec.static.addresses: Invalid value: an `ipv4` is in the pool twice",
        "addresses[1].ipv4: 203.0.113.1 is in the pool twice",
    );
    bad(
        pairs("{ipv6: '2001:db8::1'}, {ipv6: '2001:DB8:0::1'}"),
        "spec.static.addresses: Invalid value: an `ipv6` is in the pool twice",
        "addresses[1].ipv6: 2001:db8::1 is in the pool twice",
    );
    bad(
        pairs("{ipv4: 203.0.113.1, state: Gone}"),
        "spec.static.addresses[0].state: Unsupported value: \"Gone\"",
        "state: `Gone` is not a value",
    );
    for name in ["a/b", "a b", "a:b", "..", "."] {
        let text =
            format!("addressSource: Static\nstatic: {{interface: '{name}', addresses: [{{ipv4: 203.0.113.1}}]}}");
        bad(pool(&text), "spec.static.interface in body should match", "cannot be the name of a network interface");
    }
    bad(
        pool("addressSource: Static\nstatic: {interface: abcdefghijklmnop, addresses: [{ipv4: 203.0.113.1}]}"),
        "spec.static.interface: Too long: may not be more than 15",
        "cannot be the name of a network interface",
    );
    bad(
        pool("addressSource: PodNetwork\nexternalAddresses: [example.com]"),
        "spec.externalAddresses[0]: Invalid value: must be an IP address or a prefix",
        "spec.externalAddresses[0]: must be an IP address or a prefix",
    );
    bad(
        object("EgressPool", "{name: P_x}", "addressSource: PodNetwork"),
        "metadata.name: Invalid value: \"P_x\"",
        "metadata.name: must be labels",
    );
}
