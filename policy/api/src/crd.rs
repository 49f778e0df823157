//! The CustomResourceDefinitions, generated from [`crate::resource`].
//!
//! Only `schemars` is used for it: the types stay free of a Kubernetes client, and the watch hands objects to the same
//! strict reader as a directory does, so that one object that this version cannot read never stops the others.

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use crate::resource::{
    ClusterEgressPolicySpec, EgressPolicySpec, EgressPoolSpec, EgressPoolStatus, GROUP, NamespaceEgressStatus,
    PolicyStatus, VERSION,
};

/// A column of `kubectl get`.
struct Column {
    name: &'static str,
    kind: &'static str,
    path: &'static str,
    /// Only with `-o wide`.
    wide: bool,
}

/// A definition.
struct Definition {
    kind: &'static str,
    plural: &'static str,
    short: &'static str,
    namespaced: bool,
    description: &'static str,
    columns: Vec<Column>,
    spec: Option<Value>,
    status: Value,
}

/// The definitions of all resources, in the order of their names.
pub fn all() -> Vec<Value> {
    let definitions = [
        Definition {
            kind: "ClusterEgressPolicy",
            plural: "clusteregresspolicies",
            short: "cegp",
            namespaced: false,
            description: "What the platform accepts and denies outside the cluster for the pods of selected namespaces, and what \
                          these namespaces may grant themselves.",
            columns: vec![
                column("Tier", "string", ".spec.tier"),
                column("Priority", "integer", ".spec.priority"),
                column("Mode", "string", ".spec.mode"),
                column("Accepted", "string", ".status.conditions[?(@.type==\"Accepted\")].status"),
                column("Programmed", "string", ".status.conditions[?(@.type==\"Programmed\")].status"),
                wide("Nodes", "integer", ".status.nodes.desired"),
                wide("Message", "string", ".status.conditions[?(@.type==\"Accepted\")].message"),
                AGE,
            ],
            spec: Some(schema_of::<ClusterEgressPolicySpec>()),
            status: schema_of::<PolicyStatus>(),
        },
        Definition {
            kind: "EgressPolicy",
            plural: "egresspolicies",
            short: "egp",
            namespaced: true,
            description: "What pods of a namespace may reach outside the cluster. A pod that it selects is isolated: what no rule \
                          allows is denied.",
            columns: vec![
                column("Mode", "string", ".spec.mode"),
                column("Pool", "string", ".spec.poolRef.name"),
                column("Accepted", "string", ".status.conditions[?(@.type==\"Accepted\")].status"),
                column("Programmed", "string", ".status.conditions[?(@.type==\"Programmed\")].status"),
                wide("Nodes", "integer", ".status.nodes.desired"),
                wide("Message", "string", ".status.conditions[?(@.type==\"Accepted\")].message"),
                AGE,
            ],
            spec: Some(schema_of::<EgressPolicySpec>()),
            status: schema_of::<PolicyStatus>(),
        },
        Definition {
            kind: "EgressPool",
            plural: "egresspools",
            short: "epool",
            namespaced: false,
            description: "Source addresses with which traffic leaves the cluster, and the namespaces that may use them.",
            columns: vec![
                column("Source", "string", ".spec.addressSource"),
                column("IPv4", "string", ".status.addresses[*].ipv4"),
                column("Accepted", "string", ".status.conditions[?(@.type==\"Accepted\")].status"),
                column("Programmed", "string", ".status.conditions[?(@.type==\"Programmed\")].status"),
                wide("IPv6", "string", ".status.addresses[*].ipv6"),
                wide("Owners", "string", ".status.addresses[*].owner"),
                AGE,
            ],
            spec: Some(schema_of::<EgressPoolSpec>()),
            status: schema_of::<EgressPoolStatus>(),
        },
        Definition {
            kind: "NamespaceEgress",
            plural: "namespaceegresses",
            short: "nsegress",
            namespaced: true,
            description: "What Tidegate does with a namespace, and what it denied there lately. Tidegate writes one of the name \
                          `tidegate` in each namespace that it manages, for people to read.",
            columns: vec![
                column("Isolation", "string", ".status.isolation"),
                column("Mode", "string", ".status.mode"),
                column("IPv4", "string", ".status.egress[*].ipv4"),
                column("Last denied", "string", ".status.denials[0].to"),
                column("Reason", "string", ".status.denials[0].reason"),
                wide("IPv6", "string", ".status.egress[*].ipv6"),
                wide("Audit until", "date", ".status.auditUntilTime"),
                AGE,
            ],
            spec: None,
            status: schema_of::<NamespaceEgressStatus>(),
        },
    ];
    definitions.into_iter().map(definition).collect()
}

/// The file's name of a definition.
pub fn file_name(definition: &Value) -> String {
    format!("{}.yaml", definition["metadata"]["name"].as_str().unwrap_or_default())
}

/// A definition as YAML.
///
/// # Errors
/// Never of the definitions that [`all`] gives.
pub fn yaml(definition: &Value) -> Result<String, serde_saphyr::ser::Error> {
    serde_saphyr::to_string(definition)
}

/// All definitions as one manifest, for `kubectl apply --server-side -f -`.
///
/// # Errors
/// As [`yaml`].
pub fn manifest() -> Result<String, serde_saphyr::ser::Error> {
    all().iter().map(|d| Ok(format!("---\n{}", yaml(d)?))).collect()
}

const fn column(name: &'static str, kind: &'static str, path: &'static str) -> Column {
    Column { name, kind, path, wide: false }
}

const fn wide(name: &'static str, kind: &'static str, path: &'static str) -> Column {
    Column { name, kind, path, wide: true }
}

const AGE: Column = column("Age", "date", ".metadata.creationTimestamp");

fn definition(d: Definition) -> Value {
    let columns: Vec<Value> = d
        .columns
        .iter()
        .map(|c| {
            let mut column = json!({"name": c.name, "type": c.kind, "jsonPath": c.path});
            if c.wide {
                column["priority"] = 1.into();
            }
            column
        })
        .collect();
    let mut properties = json!({
        "apiVersion": {"type": "string", "description": "The version of the API: tidegate.dev/v1alpha1."},
        "kind": {"type": "string", "description": format!("The kind of the object: {}.", d.kind)},
        "metadata": {"type": "object"},
        "status": d.status,
    });
    let mut required = vec!["metadata"];
    if let Some(spec) = d.spec {
        properties["spec"] = spec;
        required.push("spec");
    }
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("{}.{GROUP}", d.plural),
            // Without its definitions a cluster loses every policy: `helm uninstall` leaves them.
            "annotations": {"helm.sh/resource-policy": "keep"},
        },
        "spec": {
            "group": GROUP,
            "names": {
                "kind": d.kind,
                "listKind": format!("{}List", d.kind),
                "plural": d.plural,
                "singular": d.kind.to_lowercase(),
                "shortNames": [d.short],
                "categories": ["tidegate"],
            },
            "scope": if d.namespaced { "Namespaced" } else { "Cluster" },
            "versions": [{
                "name": VERSION,
                "served": true,
                "storage": true,
                "subresources": {"status": {}},
                "additionalPrinterColumns": columns,
                "schema": {"openAPIV3Schema": {
                    "type": "object",
                    "description": d.description,
                    "properties": properties,
                    "required": required,
                }},
            }],
        },
    })
}

/// The schema of a type, as a definition takes it: structural, without references.
fn schema_of<T: JsonSchema>() -> Value {
    let settings = SchemaSettings::draft07().with(|s| {
        s.meta_schema = None;
        s.inline_subschemas = true;
    });
    let mut schema = settings.into_generator().into_root_schema_for::<T>().to_value();
    structural(&mut schema);
    schema
}

/// Makes a schema structural: what JSON Schema says in other words is said as Kubernetes wants it.
fn structural(schema: &mut Value) {
    let Value::Object(map) = schema else { return };
    map.remove("title");
    // Lines of doc comments end where the source's do.
    if let Some(Value::String(text)) = map.get_mut("description") {
        *text = text.replace('\n', " ");
    }
    // Unknown fields: the API server refuses or drops them by itself.
    if map.get("additionalProperties").is_some_and(Value::is_boolean) {
        map.remove("additionalProperties");
    }
    // Defaults that say nothing; formats that OpenAPI does not know.
    if map.get("default").is_some_and(|d| d.is_null() || d == &json!([]) || d == &json!({})) {
        map.remove("default");
    }
    if map.get("format").and_then(Value::as_str).is_some_and(|f| f.starts_with("uint")) {
        map.remove("format");
    }
    // An absent field is left out and never null.
    if let Some(Value::Array(types)) = map.get_mut("type") {
        types.retain(|t| t != "null");
        if let [only] = types.as_slice() {
            let only = only.clone();
            map.insert("type".into(), only);
        }
    }
    if let Some(Value::Array(mut any)) = map.remove("anyOf") {
        any.retain(|s| s["type"] != "null");
        if let Some(Value::Object(only)) = any.pop() {
            merge(map, only);
        }
    }
    if let Some(Value::Array(variants)) = map.remove("oneOf") {
        enumeration(map, &variants);
    }
    for key in ["properties", "items", "additionalProperties"] {
        match map.get_mut(key) {
            Some(Value::Object(properties)) if key == "properties" => properties.values_mut().for_each(structural),
            Some(child) => structural(child),
            None => {}
        }
    }
}

/// Fills in what the outer schema does not say by itself.
fn merge(map: &mut Map<String, Value>, inner: Map<String, Value>) {
    for (key, value) in inner {
        map.entry(key).or_insert(value);
    }
}

/// Variants with their descriptions become a list of values, with the descriptions in the field's own.
fn enumeration(map: &mut Map<String, Value>, variants: &[Value]) {
    let mut description = map.get("description").and_then(Value::as_str).unwrap_or_default().to_owned();
    let mut values = Vec::new();
    for v in variants {
        let value = v["const"].as_str().unwrap_or_default();
        description += &format!("\n- {value}: {}", v["description"].as_str().unwrap_or_default());
        values.push(value);
    }
    map.insert("type".into(), "string".into());
    map.insert("enum".into(), json!(values));
    map.insert("description".into(), description.trim_start().into());
}
