//! JSON schemas for kubeconform, from what the API server itself says about its resources. Nothing is downloaded.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Map, Value, json};
use tidegate_kube::{Api, Output, Tool, tool};

use crate::common::run;

/// A folder with the schemas of everything that a cluster serves, and of the Prometheus operator's resources.
pub struct Schemas(tempfile::TempDir);

impl Schemas {
    pub fn new(api: &Api) -> Self {
        let answer = api.send("GET", "/openapi/v2", &[("Accept", "application/json")], "").unwrap();
        assert_eq!(answer.status, 200, "{}", answer.body);
        let all: Value = serde_json::from_str(&answer.body).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let definitions = all["definitions"].as_object().unwrap();
        for (name, definition) in definitions {
            let Some(kinds) = definition["x-kubernetes-group-version-kind"].as_array() else { continue };
            // `DeleteOptions` and `WatchEvent` belong to every group.
            let [kind] = kinds.as_slice() else { continue };
            let schema = strict(definitions, definition, &mut vec![name]);
            let text = |key: &str| kind[key].as_str().unwrap();
            write(folder.path(), text("group"), text("version"), text("kind"), &schema);
        }
        for (kind, schema) in operator() {
            write(folder.path(), "monitoring.coreos.com", "v1", kind, &schema);
        }
        write(folder.path(), "cert-manager.io", "v1", "Certificate", &certificate());
        Self(folder)
    }

    /// Runs kubeconform over manifests.
    pub fn check(&self, manifests: &str) -> Output {
        let location = self.0.path().join("{{.Group}}_{{.ResourceAPIVersion}}_{{.ResourceKind}}.json");
        let mut command = Command::new(tool(Tool::Kubeconform).unwrap());
        command.args(["-strict", "-summary", "-schema-location"]).arg(location).arg("-");
        run(&mut command, manifests)
    }
}

fn write(folder: &Path, group: &str, version: &str, kind: &str, schema: &Value) {
    // kubeconform takes the version of the core group for its name.
    let group = if group.is_empty() { version } else { group };
    let name = format!("{group}_{version}_{}.json", kind.to_lowercase());
    fs::write(folder.join(name), schema.to_string()).unwrap();
}

/// A schema with everything that it refers to inside, which takes no field that it does not name. `inside` are the definitions
/// that lead here: those of CRDs hold themselves.
fn strict<'a>(definitions: &'a Map<String, Value>, schema: &'a Value, inside: &mut Vec<&'a str>) -> Value {
    if let Some(name) = schema["$ref"].as_str().and_then(|r| r.strip_prefix("#/definitions/")) {
        // What its type does not say: numbers are taken for quantities, too.
        if name.ends_with(".IntOrString") || name.ends_with(".Quantity") {
            return json!({"type": ["string", "number"]});
        }
        if inside.contains(&name) {
            return json!({});
        }
        inside.push(name);
        let found = strict(definitions, &definitions[name], inside);
        inside.pop();
        return found;
    }
    let mut out = Map::new();
    for key in ["type", "enum", "required", "pattern", "minimum", "maximum", "minItems", "maxItems", "maxLength"] {
        if let Some(value) = schema.get(key) {
            out.insert(key.to_owned(), value.clone());
        }
    }
    if let Some(items) = schema.get("items") {
        out.insert("items".into(), strict(definitions, items, inside));
    }
    if let Some(properties) = schema["properties"].as_object() {
        let all = properties.iter().map(|(k, p)| (k.clone(), strict(definitions, p, inside))).collect();
        out.insert("properties".into(), Value::Object(all));
        if schema["x-kubernetes-preserve-unknown-fields"] != true {
            out.insert("additionalProperties".into(), false.into());
        }
    } else if let Some(more @ Value::Object(_)) = schema.get("additionalProperties") {
        out.insert("additionalProperties".into(), strict(definitions, more, inside));
    }
    Value::Object(out)
}

/// The part of cert-manager's Certificate that the chart may use, as its documentation has it.
fn certificate() -> Value {
    let text = || json!({"type": "string", "minLength": 1});
    let closed = |properties: Value| json!({"type": "object", "properties": properties, "additionalProperties": false});
    let texts = || json!({"type": "object", "additionalProperties": {"type": "string"}});
    let spec = closed(json!({
        "secretName": text(), "commonName": text(), "isCA": {"type": "boolean"}, "duration": text(), "renewBefore": text(),
        "privateKey": closed(json!({
            "algorithm": {"enum": ["RSA", "ECDSA", "Ed25519"]}, "size": {"type": "integer"},
            "encoding": {"enum": ["PKCS1", "PKCS8"]}, "rotationPolicy": {"enum": ["Never", "Always"]},
        })),
        "usages": {"type": "array", "items": {"enum": ["cert sign", "crl sign"]}},
        "issuerRef": closed(json!({"name": text(), "kind": text(), "group": text()})),
    }));
    let metadata = closed(json!({"name": text(), "namespace": text(), "labels": texts()}));
    closed(json!({"apiVersion": text(), "kind": text(), "metadata": metadata, "spec": spec}))
}

/// The part of the Prometheus operator's resources that the chart may use, as their documentation has it.
fn operator() -> Vec<(&'static str, Value)> {
    let text = || json!({"type": "string"});
    let texts = || json!({"type": "object", "additionalProperties": {"type": "string"}});
    let closed = |properties: Value| json!({"type": "object", "properties": properties, "additionalProperties": false});
    let list = |items: Value| json!({"type": "array", "items": items, "minItems": 1});
    let object = |spec: Value| {
        let metadata = closed(json!({"name": text(), "namespace": text(), "labels": texts()}));
        closed(json!({"apiVersion": text(), "kind": text(), "metadata": metadata, "spec": spec}))
    };
    let selector = || closed(json!({"matchLabels": texts()}));
    let relabeling =
        closed(json!({"sourceLabels": list(text()), "targetLabel": text(), "replacement": text(), "regex": text()}));
    let endpoint = closed(json!({"port": text(), "path": text(), "interval": text(), "relabelings": list(relabeling)}));
    let rule =
        closed(json!({"alert": text(), "expr": text(), "for": text(), "labels": texts(), "annotations": texts()}));
    let group = closed(json!({"name": text(), "rules": list(rule)}));
    vec![
        ("ServiceMonitor", object(closed(json!({"selector": selector(), "endpoints": list(endpoint.clone())})))),
        ("PodMonitor", object(closed(json!({"selector": selector(), "podMetricsEndpoints": list(endpoint)})))),
        ("PrometheusRule", object(closed(json!({"groups": list(group)})))),
    ]
}
