//! From one document to the objects in it.

use tidegate_policy::model;

use crate::closed::closed;
use crate::convert::{self, Converted};
use crate::core_v1;
use crate::de::{self, Refusal};
use crate::format;
use crate::problem::{Code, FieldPath, ObjectRef, Seg, Severity, printable};
use crate::resource::{API_VERSION, GROUP, Meta, RawMeta};
use crate::tree::{Tree, Value};

/// The most items of a `List`.
const MAX_ITEMS: usize = 100_000;

/// A kind that is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    Namespace,
    Node,
    Pod,
    EgressPool,
    ClusterEgressPolicy,
    EgressPolicy,
}

impl Kind {
    const fn is_namespaced(self) -> bool {
        matches!(self, Kind::Pod | Kind::EgressPolicy)
    }

    fn of(api_version: &str, kind: &str) -> Option<Self> {
        Some(match (api_version, kind) {
            ("v1", "Namespace") => Kind::Namespace,
            ("v1", "Node") => Kind::Node,
            ("v1", "Pod") => Kind::Pod,
            (API_VERSION, "EgressPool") => Kind::EgressPool,
            (API_VERSION, "ClusterEgressPolicy") => Kind::ClusterEgressPolicy,
            (API_VERSION, "EgressPolicy") => Kind::EgressPolicy,
            _ => return None,
        })
    }
}

/// Identity of an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Id {
    pub kind: Kind,
    pub namespace: String,
    pub name: String,
}

/// An object that is good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Object {
    Namespace(model::Namespace),
    Node(model::Node),
    Pod(model::Pod),
    Pool(model::Pool),
    ClusterPolicy(model::ClusterPolicy),
    Policy(model::Policy),
}

/// A problem with its line, before its file is known.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub severity: Severity,
    pub code: Code,
    pub line: Option<u32>,
    pub object: Option<ObjectRef>,
    pub path: FieldPath,
    pub message: String,
}

/// What one object of a document came to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Item {
    /// Who it is; absent when it does not say, or is of a kind that is not read.
    pub id: Option<Id>,
    /// The object; absent when it is bad or not read.
    pub object: Option<Object>,
    /// What holds of a bad one of which no good version is known.
    pub closed: Option<Object>,
    /// Its line.
    pub line: u32,
    /// It is bad and may be any of the objects that the file held.
    pub unknown: bool,
    pub found: Vec<Found>,
}

/// Reads the objects of a document: itself, or the items of a list.
pub(crate) fn objects(tree: &Tree) -> Vec<Item> {
    let kind = tree.get("kind").and_then(Tree::text).unwrap_or_default();
    let api = tree.get("apiVersion").and_then(Tree::text).unwrap_or_default();
    let ours = kind.strip_suffix("List").is_some_and(|k| Kind::of(api, k).is_some());
    if !(ours || kind == "List" && api == "v1") {
        return vec![object(tree, Vec::new())];
    }
    let bad = |code, message: String| {
        let found = Found {
            severity: Severity::Error,
            code,
            line: Some(tree.line),
            object: None,
            path: FieldPath::fields(&["items"]),
            message,
        };
        vec![Item { unknown: true, line: tree.line, found: vec![found], ..Item::default() }]
    };
    match tree.get("items").map(|t| &t.value) {
        Some(Value::List(items)) if items.len() <= MAX_ITEMS => items
            .iter()
            .enumerate()
            .map(|(i, t)| object(t, vec![Seg::Field("items".into()), Seg::Index(i, None)]))
            .collect(),
        Some(Value::List(items)) => {
            bad(Code::TooMany, format!("has {} items; at most {MAX_ITEMS} are read", items.len()))
        }
        Some(Value::Null) => Vec::new(),
        Some(v) => bad(Code::Invalid, format!("must be a list, not {}", v.what())),
        None => bad(Code::Missing, "is required in a List".to_owned()),
    }
}

/// An object while it is read.
struct Reading<'a> {
    tree: &'a Tree,
    /// Where it stands in its document.
    base: Vec<Seg>,
    item: Item,
    object: Option<ObjectRef>,
}

impl Reading<'_> {
    fn push(&mut self, severity: Severity, code: Code, path: FieldPath, line: u32, message: String) {
        let mut full = self.base.clone();
        full.extend(path.0);
        let object = self.object.clone();
        self.item.found.push(Found { severity, code, line: Some(line), object, path: FieldPath(full), message });
    }

    /// Reports at fields of the object.
    fn at(&mut self, severity: Severity, code: Code, fields: &[&str], message: impl Into<String>) {
        let path = FieldPath::fields(fields);
        let line = self.tree.line_of(&path.0);
        self.push(severity, code, path, line, message.into());
    }

    fn refusal(&mut self, r: Refusal, fields: &[&str]) {
        let (path, line) = r.place.unwrap_or_else(|| (FieldPath::fields(fields), self.tree.line));
        self.push(Severity::Error, r.code, path, line, r.message);
    }

    fn text(&mut self, field: &str) -> Option<String> {
        match self.tree.get(field).map(|t| &t.value) {
            Some(Value::Str(s)) => return Some(s.clone()),
            Some(v) => {
                let message = format!("must be a string, not {}", v.what());
                self.at(Severity::Error, Code::Invalid, &[field], message);
            }
            None => self.at(Severity::Error, Code::Missing, &[], format!("`{field}` is required")),
        }
        None
    }

    /// Reads a part of the object by its type.
    fn part<T: serde::de::DeserializeOwned>(&mut self, field: &str, lenient: bool) -> Option<T> {
        let Some(part) = self.tree.get(field) else {
            self.at(Severity::Error, Code::Missing, &[], format!("`{field}` is required"));
            return None;
        };
        de::read(part, &[Seg::Field(field.to_owned())], lenient).map_err(|r| self.refusal(r, &[field])).ok()
    }

    fn take<T>(&mut self, c: Converted<T>, wrap: impl FnOnce(T) -> Object) {
        for p in c.problems {
            let line = self.tree.line_of(&p.path.0);
            self.push(p.severity, p.code, p.path, line, p.message);
        }
        self.item.object = c.value.map(wrap);
    }
}

/// Reads one object.
pub(crate) fn one(tree: &Tree) -> Item {
    object(tree, Vec::new())
}

fn object(tree: &Tree, base: Vec<Seg>) -> Item {
    let item = Item { line: tree.line, ..Item::default() };
    let mut r = Reading { tree, base, item, object: None };
    read(&mut r);
    let bad = r.item.found.iter().any(|f| f.severity == Severity::Error);
    if bad {
        r.item.object = None;
        r.item.unknown = r.item.id.is_none();
        r.item.closed = r.item.id.as_ref().and_then(|id| closed(id.kind, tree));
    }
    r.item
}

fn read(r: &mut Reading<'_>) {
    if !matches!(r.tree.value, Value::Map(_)) {
        let message = format!("an object must be a map, not {}", r.tree.value.what());
        return r.at(Severity::Error, Code::Invalid, &[], message);
    }
    let (api, kind) = (r.text("apiVersion"), r.text("kind"));
    let (Some(api), Some(kind)) = (api, kind) else { return };
    let text = |field: &str| {
        let t = r.tree.get("metadata").and_then(|m| m.get(field)).and_then(Tree::text);
        t.unwrap_or_default().to_owned()
    };
    let (namespace, name) = (text("namespace"), text("name"));
    r.object = Some(ObjectRef { kind: kind.clone(), namespace: namespace.clone(), name: name.clone() });
    let Some(known) = Kind::of(&api, &kind) else {
        return other(r, &api, &kind);
    };
    if !name.is_empty() && known.is_namespaced() != namespace.is_empty() {
        r.item.id = Some(Id { kind: known, namespace, name });
    }
    let Some(raw) = r.part::<RawMeta>("metadata", true) else {
        return;
    };
    let meta = Meta::from(raw);
    names(r, known, &meta);
    match known {
        Kind::Namespace => r.take(crate::annotation::namespace(&meta), Object::Namespace),
        Kind::Pod => match de::read(r.tree, &[], true) {
            Ok(raw) => r.take(core_v1::pod(&meta, raw), Object::Pod),
            Err(e) => r.refusal(e, &[]),
        },
        Kind::Node => match de::read(r.tree, &[], true) {
            Ok(raw) => r.take(core_v1::node(&meta, raw), Object::Node),
            Err(e) => r.refusal(e, &[]),
        },
        Kind::EgressPool => ours(r, &meta, convert::pool, Object::Pool),
        Kind::ClusterEgressPolicy => ours(r, &meta, convert::cluster_policy, Object::ClusterPolicy),
        Kind::EgressPolicy => ours(r, &meta, convert::policy, Object::Policy),
    }
}

fn ours<S: serde::de::DeserializeOwned, T>(
    r: &mut Reading<'_>,
    meta: &Meta,
    convert: impl FnOnce(&Meta, &S) -> Converted<T>,
    wrap: impl FnOnce(T) -> Object,
) {
    if let Value::Map(entries) = &r.tree.value {
        for (key, _) in entries {
            if !matches!(key.text.as_str(), "apiVersion" | "kind" | "metadata" | "spec" | "status") {
                let path = FieldPath(vec![Seg::Field(key.text.clone())]);
                let message = "unknown field; the fields are apiVersion, kind, metadata, spec and status".to_owned();
                r.push(Severity::Error, Code::UnknownField, path, key.line, message);
            }
        }
    }
    if let Some(spec) = r.part::<S>("spec", false) {
        r.take(convert(meta, &spec), wrap);
    }
}

fn names(r: &mut Reading<'_>, kind: Kind, meta: &Meta) {
    let at_name = &["metadata", "name"];
    match kind {
        _ if meta.name.is_empty() => r.at(Severity::Error, Code::Missing, &["metadata"], "`name` is required"),
        Kind::Namespace if !format::is_label(&meta.name) => {
            r.at(Severity::Error, Code::Invalid, at_name, "must be 1 to 63 lower-case letters, digits and '-'");
        }
        _ if !format::is_subdomain(&meta.name) => {
            let m = "must be labels of lower-case letters, digits and '-', separated by dots, at most 253 characters";
            r.at(Severity::Error, Code::Invalid, at_name, m);
        }
        _ => {}
    }
    let at_namespace = &["metadata", "namespace"];
    match (kind.is_namespaced(), meta.namespace.as_str()) {
        (true, "") => r.at(Severity::Error, Code::Missing, &["metadata"], "`namespace` is required"),
        (true, n) if !format::is_label(n) => {
            r.at(Severity::Error, Code::Invalid, at_namespace, "must be 1 to 63 lower-case letters, digits and '-'");
        }
        (false, n) if !n.is_empty() => {
            r.at(Severity::Error, Code::Invalid, at_namespace, "the kind belongs to no namespace; leave it out");
        }
        _ => {}
    }
}

/// A kind that is not read: an error in our own group, else a note.
fn other(r: &mut Reading<'_>, api: &str, kind: &str) {
    let group = api.split_once('/').map_or("", |(g, _)| g);
    if group != GROUP {
        let what = format!("{} {} is not read", printable(api), printable(kind));
        return r.at(Severity::Note, Code::Ignored, &[], what);
    }
    if api != API_VERSION {
        let message = format!("`{}` does not exist; write {API_VERSION}", printable(api));
        return r.at(Severity::Error, Code::UnknownKind, &["apiVersion"], message);
    }
    if kind == "NamespaceEgress" {
        return r.at(Severity::Note, Code::Ignored, &[], "is written by Tidegate and not read");
    }
    let message = format!(
        "`{}` does not exist in {GROUP}; the kinds are EgressPolicy, ClusterEgressPolicy, EgressPool and NamespaceEgress",
        printable(kind)
    );
    r.at(Severity::Error, Code::UnknownKind, &["kind"], message);
}
