//! What the API server checks, beside the types that it is about.
//!
//! [`crate::convert`] decides; what can be said in a schema is said here once more, so that `kubectl apply` refuses at
//! once what the directory reader refuses. What cannot (a whole list of query types, prefixes inside prefixes: CEL has a
//! budget) is refused when Tidegate reads the object.
//! `loadtest/kube/tests/crds` holds both against one table.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::{Value, json};

use crate::rule::{DNS_TYPES, INSPECTION};

/// Declares the schema of a text. Fields whose Rust type is `String` name it with `schemars(with = …)`.
macro_rules! text {
    ($(#[$doc:meta])* $name:ident, $($schema:tt)+) => {
        $(#[$doc])*
        pub(crate) struct $name;

        impl JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!($($schema)+)
            }
        }
    };
}

text!(
    /// A name of DNS, as `tidegate_policy::Name::from_user` takes it; its last label is not a number.
    ///
    /// The pattern decides. The rules say in words what is written wrong most; more than such a prefix CEL's budget does not
    /// allow to look at in so many names.
    Name,
    {"type": "string", "minLength": 1, "maxLength": 254, "pattern":
        r"^(([-\w]|[^\x00-\x7F]){1,63}\.)*[0-9]*([-A-Z_a-z]|[^\x00-\x7F])([-\w]|[^\x00-\x7F])*\.?$",
        "x-kubernetes-validations": rules(&[
            Cel { rule: "!self.startsWith('*')", message: "is exact and takes no `*`; write `matchPattern`", path: "" },
            ONLY_A_NAME,
        ])}
);
text!(
    /// A pattern of names, as `tidegate_policy::pattern::Pattern::parse` takes it.
    NamePattern,
    {"type": "string", "minLength": 1, "maxLength": 254, "pattern":
        r"^(([-\w*]+|([-\w]|[^\x00-\x7F])+)\.)*([-\w*]+|([-\w]|[^\x00-\x7F])+)\.?$",
        "x-kubernetes-validations": rules(&[ONLY_A_NAME])}
);
text!(
    /// The name of a rule.
    RuleName,
    {"type": "string", "minLength": 1, "maxLength": 63, "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}
);
text!(
    /// The name of an object.
    ObjectName,
    {"type": "string", "minLength": 1, "maxLength": 253,
        "pattern": r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)*$"}
);
text!(
    /// The key of a label.
    LabelKey,
    {"type": "string", "minLength": 1, "maxLength": 317, "pattern":
        r"^([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)*/)?[A-Za-z0-9]([-._A-Za-z0-9]{0,61}[A-Za-z0-9])?$"}
);
text!(
    /// The value of a label.
    LabelValue,
    {"type": "string", "maxLength": 63, "pattern": "^([A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?)?$"}
);
text!(
    /// A prefix inside another: only its form is checked, since the lists are nested too deep for CEL's budget.
    AnyCidr,
    {"type": "string", "format": "cidr", "maxLength": 43}
);
text!(
    /// A prefix without bits behind its length.
    Cidr,
    {"type": "string", "format": "cidr", "maxLength": 43, "x-kubernetes-validations": rules(&[CANONICAL])}
);
text!(
    /// A prefix that private answers may have.
    PrivateCidr,
    {"type": "string", "format": "cidr", "maxLength": 43, "x-kubernetes-validations": rules(&[
        CANONICAL,
        Cel {
            rule: "!isCIDR(self) || !['127.0.0.0/8', '169.254.0.0/16', '224.0.0.0/4', '::1/128', 'fe80::/10', 'ff00::/8']\
                   .exists(n, cidr(n).containsCIDR(self))",
            message: "is loopback, link-local or multicast, which no answer may contain",
            path: "",
        },
    ])}
);
text!(
    /// An IPv4 address.
    Ipv4,
    {"type": "string", "format": "ipv4", "maxLength": 15}
);
text!(
    /// An IPv6 address.
    Ipv6,
    {"type": "string", "format": "ipv6", "maxLength": 45}
);
text!(
    /// An address or a prefix.
    AddressOrCidr,
    {"type": "string", "maxLength": 49, "x-kubernetes-validations": rules(&[
        Cel { rule: "isIP(self) || isCIDR(self)", message: "must be an IP address or a prefix", path: "" },
    ])}
);
text!(
    /// A time, as `crate::format::time` takes it.
    Time,
    {"type": "string", "format": "date-time", "maxLength": 40, "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}T[^ ]*$"}
);
text!(
    /// A reason or a type of conditions, in one word.
    Reason,
    {"type": "string", "minLength": 1, "maxLength": 64, "pattern": "^[A-Za-z][A-Za-z0-9]*$"}
);
text!(
    /// A query type of DNS.
    DnsType,
    {"type": "string", "maxLength": 10, "pattern": dns_types(), "x-kubernetes-validations": rules(&[
        Cel {
            rule: "!self.matches('^TYPE[1-9][0-9]{0,4}$') || !(int(self.substring(4)) in [1, 28, 41, 64, 65]) && \
                   int(self.substring(4)) <= 65535 && (int(self.substring(4)) < 128 || int(self.substring(4)) > 255)",
            message: "is always answered, or is not a type that can be asked for",
            path: "",
        },
    ])}
);
text!(
    /// A field of the API that this version refuses. It is declared, since the API server drops what is not: without its
    /// restriction a rule would grant more than was written.
    Http,
    {"type": "array", "maxItems": 32, "items": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
        "x-kubernetes-list-type": "atomic"}
);

/// The name of a network interface.
pub(crate) const INTERFACE: &str = r"^([!-.0-9;-~]{3,}|[!-\-0-9;-~][!-.0-9;-~]?|\.[!-\-0-9;-~])$";

const ONLY_A_NAME: Cel = Cel {
    rule: "!self.startsWith('https://') && !self.startsWith('http://')",
    message: "is a name alone, without scheme, port and path",
    path: "",
};

const CANONICAL: Cel = Cel {
    rule: "isCIDR(self) && cidr(self) == cidr(self).masked()",
    message: "has bits set behind its length, or is an IPv4-mapped prefix",
    path: "",
};

fn dns_types() -> String {
    let names: Vec<&str> = DNS_TYPES.iter().map(|(name, _)| *name).collect();
    format!("^({}|TYPE[1-9][0-9]{{0,4}})$", names.join("|"))
}

/// A rule in CEL.
pub(crate) struct Cel<'a> {
    /// What must hold of `self`.
    pub rule: &'a str,
    /// What is wrong, and what to write instead.
    pub message: &'a str,
    /// The field that is meant, from `self`; empty for `self`.
    pub path: &'a str,
}

/// The value of `x-kubernetes-validations`.
pub(crate) fn rules(rules: &[Cel<'_>]) -> Value {
    let one = |c: &Cel<'_>| {
        let mut rule = json!({"rule": c.rule, "message": c.message});
        if !c.path.is_empty() {
            rule["fieldPath"] = c.path.into();
        }
        rule
    };
    rules.iter().map(one).collect()
}

/// Says that no name is there twice in all these lists of rules.
pub(crate) fn unique_names(lists: &[&str]) -> Value {
    let names = |list: &&str| format!("(has(self.{list}) ? self.{list}.filter(r, has(r.name)).map(r, r.name) : [])");
    let all = lists.iter().map(names).collect::<Vec<_>>().join(" + ");
    rules(&[Cel {
        rule: &unique(&all),
        message: &format!("two rules of {} have the same `name`", lists.join(" and ")),
        path: "",
    }])
}

/// Says that no text is there twice in a list. The search in the list is the API server's own and fast: comparing each with
/// each in CEL takes seconds for as many rules as a policy may have.
pub(crate) fn unique(list: &str) -> String {
    format!("[{list}].all(l, l.all(x, l.indexOf(x) == l.lastIndexOf(x)))")
}

/// Adds rules to those of a schema.
fn add(schema: &mut Value, more: &[Cel<'_>]) {
    let (Some(schema), Value::Array(more)) = (schema.as_object_mut(), rules(more)) else { return };
    if let Value::Array(all) = schema.entry("x-kubernetes-validations").or_insert_with(|| json!([])) {
        all.extend(more);
    }
}

/// What holds for every rule.
pub(crate) fn rule(schema: &mut Schema) {
    let mut all = vec![
        Cel {
            rule: "has(self.toFQDNs) != has(self.toCIDRs)",
            message: "exactly one of `toFQDNs` and `toCIDRs` is required; for both write two rules",
            path: "",
        },
        Cel {
            rule: "!has(self.http)",
            message: "HTTP is not inspected yet; leave `http` out, and write `sni: Unchecked` to allow plain HTTP unchecked",
            path: ".http",
        },
    ];
    let fields = inspection(|field| format!("!has(self.{field}) || has(self.toFQDNs)"));
    all.extend(fields.iter().map(|(rule, path)| Cel {
        rule,
        message: "belongs to `toFQDNs`; connections to prefixes are not inspected",
        path,
    }));
    add_to(schema, "", &all);
}

/// For each field that steers inspection a rule, with the field's path.
fn inspection(rule: impl Fn(&str) -> String) -> Vec<(String, String)> {
    INSPECTION.iter().map(|field| (rule(field), format!(".{field}"))).collect()
}

fn add_to(schema: &mut Schema, pointer: &str, more: &[Cel<'_>]) {
    if let Some(at) = schema.pointer_mut(pointer) {
        add(at, more);
    }
}

const NO_ACTION: Cel = Cel {
    rule: "!has(self.action)",
    message: "only rules of a ClusterEgressPolicy have an action; `egress` allows, `egressDeny` denies",
    path: ".action",
};

/// What holds for a list of rules that allow.
pub(crate) fn allow_rules(schema: &mut Schema) {
    add_to(schema, "/items", &[NO_ACTION]);
    if let Some(ports) = schema.pointer_mut("/items/properties/toPorts") {
        only_ports(ports);
    }
}

/// What holds for a list of rules that deny.
pub(crate) fn deny_rules(schema: &mut Schema) {
    let fields = inspection(|field| format!("!has(self.{field})"));
    let message = "has no meaning in a deny; leave it out";
    let fields = fields.iter().map(|(rule, path)| Cel { rule, message, path });
    add_to(schema, "/items", &fields.chain([NO_ACTION]).collect::<Vec<_>>());
}

/// What holds for a list of rules of a cluster policy.
pub(crate) fn cluster_rules(schema: &mut Schema) {
    let fields = inspection(|field| format!("!has(self.{field}) || self.action == 'Accept'"));
    let fields = fields.iter().map(|(rule, path)| Cel {
        rule,
        message: "has a meaning only with `action: Accept`; leave it out",
        path,
    });
    let ports = Cel {
        rule: "self.action == 'Deny' || self.toPorts.all(p, has(p.port) && p.protocol != 'Any')",
        message: "`port` can be left out, and `protocol: Any` stands, only in denies",
        path: ".toPorts",
    };
    add_to(schema, "/items", &fields.chain([ports]).collect::<Vec<_>>());
    if let Some(Value::Array(required)) = schema.pointer_mut("/items/required") {
        required.push("action".into());
    }
}

/// What holds for a list of ports that allow.
pub(crate) fn allow_ports(schema: &mut Schema) {
    if let Some(ports) = schema.pointer_mut("") {
        only_ports(ports);
    }
}

/// Neither `Any` nor a missing port.
fn only_ports(ports: &mut Value) {
    if let Some(Value::Array(required)) = ports.pointer_mut("/items/required") {
        required.push("port".into());
    }
    if let Some(Value::Array(protocols)) = ports.pointer_mut("/items/properties/protocol/oneOf") {
        protocols.retain(|p| p["const"] != "Any");
    }
}

/// A list of conditions is merged by their types.
pub(crate) fn conditions(schema: &mut Schema) {
    schema.insert("x-kubernetes-list-type".into(), "map".into());
    schema.insert("x-kubernetes-list-map-keys".into(), json!(["type"]));
}
