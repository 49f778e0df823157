//! Reads manifests from a directory, and keeps what was good of what has become bad.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tidegate_policy::key::KeyHasher;
use tidegate_policy::model;

use crate::manifest::{self, Id, Item, Kind, Object};
use crate::problem::{Code, FieldPath, ObjectRef, Problem, Severity};
use crate::tree;

/// The largest manifest file, in octets.
pub const MAX_FILE: u64 = 16 * 1024 * 1024;
/// The most manifest files of a directory.
pub const MAX_FILES: usize = 10_000;
/// The most documents of a file.
pub const MAX_DOCUMENTS: usize = 20_000;
/// How deep directories may be nested below the root.
pub const MAX_DEPTH: usize = 8;

/// What a reload gave.
#[derive(Clone, Debug, Default)]
pub struct Loaded {
    /// All objects that hold now. `settings` is the default: it comes from elsewhere.
    pub objects: model::Objects,
    /// Everything that is wrong or noteworthy now, in order of file and line.
    pub problems: Vec<Problem>,
    /// Whether `objects` differs from the previous reload; true for the first.
    pub changed: bool,
}

/// A directory (or one file) of manifests.
///
/// A bad document is quarantined: it is reported, its last good version stays, and the others
/// go on. An object goes when no file has it any more. Where a document is so broken that it does not say
/// who it is, or a file or directory cannot be read, everything that came from there stays.
/// Two gateways that start on the same files hold the same objects.
#[derive(Debug)]
pub struct Reader {
    root: PathBuf,
    files: BTreeMap<PathBuf, Parsed>,
    live: BTreeMap<Id, Live>,
    started: bool,
}

/// A parsed file, kept while its content stays the same.
#[derive(Clone, Debug)]
struct Parsed {
    content: u128,
    items: Arc<Vec<(usize, Item)>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Live {
    object: Object,
    file: PathBuf,
}

impl Reader {
    /// A reader of a directory, or of one file. Nothing is read yet.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), files: BTreeMap::new(), live: BTreeMap::new(), started: false }
    }

    /// The directories whose changes ask for a reload; see [`watch_paths`].
    pub fn watch_paths(&self) -> Vec<PathBuf> {
        watch_paths(&self.root)
    }

    /// Reads everything again. Files whose content is the same are not parsed again.
    pub fn reload(&mut self) -> Loaded {
        let mut found = Walk::default();
        found.walk(&self.root, 0);
        let mut problems = found.problems;
        // Files and directories of which everything stays.
        let mut held: BTreeSet<PathBuf> = found.unreadable;
        let mut files = BTreeMap::new();
        for path in found.files {
            match self.parse(&path) {
                Ok(p) => drop(files.insert(path, p)),
                Err(e) => {
                    problems.push(problem(&path, Code::Unreadable, format!("cannot be read: {e}")));
                    held.insert(path);
                }
            }
        }
        self.settle(files, held, problems)
    }

    /// Takes parsed files as all that there is now, but for what comes from `held`.
    fn settle(
        &mut self,
        files: BTreeMap<PathBuf, Parsed>,
        mut held: BTreeSet<PathBuf>,
        mut problems: Vec<Problem>,
    ) -> Loaded {
        let mut live: BTreeMap<Id, Live> = BTreeMap::new();
        let mut places: BTreeMap<Id, (PathBuf, u32)> = BTreeMap::new();
        let mut bad: BTreeSet<Id> = BTreeSet::new();
        for (path, parsed) in &files {
            for (document, item) in parsed.items.iter() {
                problems.extend(item.found.iter().map(|f| Problem {
                    severity: f.severity,
                    code: f.code,
                    file: path.clone(),
                    document: (*document > 0).then_some(*document),
                    line: f.line,
                    object: f.object.clone(),
                    path: f.path.clone(),
                    message: f.message.clone(),
                }));
                if item.unknown {
                    held.insert(path.clone());
                }
                let Some(id) = &item.id else { continue };
                if let Some((file, line)) = places.get(id) {
                    let file = if file == path { "this file".to_owned() } else { file.display().to_string() };
                    problems.push(Problem {
                        severity: Severity::Error,
                        code: Code::Duplicate,
                        file: path.clone(),
                        document: Some(*document),
                        line: Some(item.line),
                        object: Some(reference(id)),
                        path: FieldPath::fields(&["metadata", "name"]),
                        message: format!("the object is already at line {line} of {file}, and that one holds"),
                    });
                    continue;
                }
                places.insert(id.clone(), (path.clone(), item.line));
                match &item.object {
                    Some(object) => drop(live.insert(id.clone(), Live { object: object.clone(), file: path.clone() })),
                    None => drop(bad.insert(id.clone())),
                }
            }
        }
        for (id, old) in &self.live {
            let stays = bad.contains(id) || old.file.ancestors().any(|a| held.contains(a));
            if stays && !live.contains_key(id) {
                live.insert(id.clone(), old.clone());
            }
        }
        problems.extend(cross_check(&live, &places));
        problems.sort_by(|a, b| (&a.file, a.line, a.severity).cmp(&(&b.file, b.line, b.severity)));
        let same = self.live.len() == live.len()
            && self.live.iter().zip(&live).all(|((ai, a), (bi, b))| ai == bi && a.object == b.object);
        let changed = !self.started || !same;
        self.started = true;
        self.files = files;
        self.live = live;
        Loaded { objects: self.objects(), problems, changed }
    }

    fn parse(&self, path: &Path) -> io::Result<Parsed> {
        let mut bytes = Vec::new();
        let file = fs::File::open(path)?;
        // A FIFO or device of that name must not block or fill the reader.
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is not a regular file"));
        }
        file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MAX_FILE {
            return Err(io::Error::other(format!("it is larger than {MAX_FILE} octets; split it")));
        }
        self.parse_bytes(path, bytes)
    }

    fn parse_bytes(&self, path: &Path, bytes: Vec<u8>) -> io::Result<Parsed> {
        let content = KeyHasher::new("manifest").field(&bytes).finish();
        if let Some(old) = self.files.get(path).filter(|p| p.content == content) {
            return Ok(old.clone());
        }
        let text = String::from_utf8(bytes).map_err(|_| io::Error::other("it is not UTF-8"))?;
        // Tabs separate tokens in JSON and may not indent in YAML; JSON strings hold none.
        let is_json = path.extension().is_some_and(|e| e == "json");
        let text = if is_json { text.replace('\t', " ") } else { text };
        let chunks = tree::documents(&text);
        if chunks.len() > MAX_DOCUMENTS {
            return Err(io::Error::other(format!("it has more than {MAX_DOCUMENTS} documents; split it")));
        }
        let mut items = Vec::new();
        for (n, chunk) in chunks.into_iter().enumerate() {
            match tree::parse(chunk) {
                Ok(t) => items.extend(manifest::objects(&t).into_iter().map(|i| (n + 1, i))),
                Err(e) => {
                    let found = manifest::Found {
                        severity: Severity::Error,
                        code: Code::Syntax,
                        line: e.line.or(Some(chunk.before.saturating_add(1))),
                        object: None,
                        path: FieldPath::default(),
                        message: e.message,
                    };
                    items.push((n + 1, Item { unknown: true, found: vec![found], ..Item::default() }));
                }
            }
        }
        Ok(Parsed { content, items: Arc::new(items) })
    }

    fn objects(&self) -> model::Objects {
        let mut out = model::Objects::default();
        for (id, live) in &self.live {
            let (namespace, name) = (id.namespace.clone(), id.name.clone());
            match live.object.clone() {
                Object::Namespace(o) => drop(out.namespaces.insert(name, o)),
                Object::Node(o) => drop(out.nodes.insert(name, o)),
                Object::Pod(o) => drop(out.pods.insert((namespace, name), o)),
                Object::Pool(o) => drop(out.pools.insert(name, o)),
                Object::ClusterPolicy(o) => drop(out.cluster_policies.insert(name, o)),
                Object::Policy(o) => drop(out.policies.insert((namespace, name), o)),
            }
        }
        out
    }
}

/// Warns of what only several objects together show: an address in two pools, a pool that is not there.
fn cross_check(live: &BTreeMap<Id, Live>, places: &BTreeMap<Id, (PathBuf, u32)>) -> Vec<Problem> {
    let mut out = Vec::new();
    let mut warn = |id: &Id, code: Code, fields: &[&str], message: String| {
        let Some((file, line)) = places.get(id) else { return };
        out.push(Problem {
            severity: Severity::Warning,
            code,
            file: file.clone(),
            document: None,
            line: Some(*line),
            object: Some(reference(id)),
            path: FieldPath::fields(fields),
            message,
        });
    };
    let mut owners: BTreeMap<std::net::IpAddr, &str> = BTreeMap::new();
    let mut pools: BTreeMap<&str, &model::Pool> = BTreeMap::new();
    for (id, l) in live {
        let Object::Pool(pool) = &l.object else { continue };
        pools.insert(&id.name, pool);
        let model::AddressSource::Static { pairs, .. } = &pool.source else {
            continue;
        };
        for ip in pairs.iter().flat_map(|p| p.ipv4.map(Into::into).into_iter().chain(p.ipv6.map(Into::into))) {
            if let Some(other) = owners.get(&ip) {
                let message = format!("{ip} is also in the pool `{other}`, so it does not tell the two apart");
                warn(id, Code::Duplicate, &["spec", "static", "addresses"], message);
            } else {
                owners.insert(ip, &id.name);
            }
        }
    }
    // Without any pool here, pools may well be kept elsewhere.
    if pools.is_empty() {
        return out;
    }
    for (id, l) in live {
        let Object::Policy(model::Policy { pool: Some(pool), .. }) = &l.object else {
            continue;
        };
        let namespace = Id { kind: Kind::Namespace, namespace: String::new(), name: id.namespace.clone() };
        let labels = match live.get(&namespace).map(|l| &l.object) {
            Some(Object::Namespace(ns)) => Some(&ns.labels),
            _ => None,
        };
        let fields = &["spec", "poolRef", "name"];
        match (pools.get(pool.as_str()), labels) {
            (None, _) if pool != "default" => {
                warn(id, Code::NoEffect, fields, format!("there is no EgressPool `{pool}` in these manifests"));
            }
            (Some(p), Some(labels)) if !p.allowed_namespaces.as_ref().is_some_and(|s| s.matches(labels)) => {
                let message = format!("`allowedNamespaces` of the EgressPool `{pool}` does not admit this namespace");
                warn(id, Code::NoEffect, fields, message);
            }
            _ => {}
        }
    }
    out
}

fn reference(id: &Id) -> ObjectRef {
    ObjectRef { kind: format!("{:?}", id.kind), namespace: id.namespace.clone(), name: id.name.clone() }
}

fn problem(file: &Path, code: Code, message: String) -> Problem {
    Problem {
        severity: Severity::Error,
        code,
        file: file.to_owned(),
        document: None,
        line: None,
        object: None,
        path: FieldPath::default(),
        message,
    }
}

/// Whether a file of this name is read.
fn is_manifest(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json")
}

/// Hidden entries are not read: editors keep drafts there, and mounted ConfigMaps their old versions.
fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."))
}

#[derive(Default)]
struct Walk {
    files: BTreeSet<PathBuf>,
    directories: Vec<PathBuf>,
    unreadable: BTreeSet<PathBuf>,
    problems: Vec<Problem>,
}

impl Walk {
    /// Follows links, since mounted ConfigMaps and Secrets are links; the depth bounds loops of them.
    fn walk(&mut self, path: &Path, depth: usize) {
        let is_dir = match fs::metadata(path) {
            Ok(m) => m.is_dir(),
            Err(e) => return self.fail(path, format!("cannot be read: {e}")),
        };
        if !is_dir {
            if depth == 0 || is_manifest(path) {
                if self.files.len() == MAX_FILES {
                    return self.fail(path, format!("is beyond the {MAX_FILES} files that are read"));
                }
                self.files.insert(path.to_owned());
            }
            return;
        }
        if depth > MAX_DEPTH {
            return self.fail(path, format!("is nested deeper than {MAX_DEPTH} directories"));
        }
        self.directories.push(path.to_owned());
        let entries = fs::read_dir(path).and_then(|d| d.map(|e| e.map(|e| e.path())).collect::<io::Result<Vec<_>>>());
        match entries {
            Ok(mut entries) => {
                entries.sort();
                for e in entries.iter().filter(|e| !is_hidden(e)) {
                    self.walk(e, depth + 1);
                }
            }
            Err(e) => self.fail(path, format!("cannot be listed: {e}")),
        }
    }

    fn fail(&mut self, path: &Path, message: String) {
        self.unreadable.insert(path.to_owned());
        // Beyond the limit of files one line says it.
        let code = if self.files.len() < MAX_FILES { Code::Unreadable } else { Code::TooMany };
        if code == Code::Unreadable || self.problems.last().is_none_or(|p| p.code != code) {
            self.problems.push(problem(path, code, message));
        }
    }
}

/// The directories whose changes (entries created, written, moved, deleted) ask for a reload: the root
/// with all directories below it, or a file's own directory. Ask again after each reload. A root that is not there gives its parent.
pub fn watch_paths(root: &Path) -> Vec<PathBuf> {
    let mut walk = Walk::default();
    walk.walk(root, 0);
    if walk.directories.is_empty() {
        let parent = root.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        walk.directories.push(parent.to_owned());
    }
    walk.directories
}

/// Checks a file or a directory once: everything that is wrong or noteworthy.
///
/// # Errors
/// When the path does not exist or cannot be read at all.
pub fn check(path: &Path) -> io::Result<Vec<Problem>> {
    if fs::metadata(path)?.is_dir() {
        fs::read_dir(path)?;
    } else {
        fs::File::open(path)?;
    }
    Ok(Reader::new(path).reload().problems)
}

/// Checks manifests that come from elsewhere, such as standard input; `name` stands for the file in problems.
///
/// # Errors
/// When they cannot be read, are too large or not UTF-8.
pub fn check_input(name: &str, input: &mut dyn io::Read) -> io::Result<Vec<Problem>> {
    let mut bytes = Vec::new();
    input.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(io::Error::other(format!("it is larger than {MAX_FILE} octets; split it")));
    }
    let path = PathBuf::from(name);
    let mut reader = Reader::new(&path);
    let parsed = reader.parse_bytes(&path, bytes)?;
    Ok(reader.settle(BTreeMap::from([(path, parsed)]), BTreeSet::new(), Vec::new()).problems)
}

/// Checks one file, as [`check`] does; a directory is an error.
///
/// # Errors
/// When the file does not exist, is a directory or cannot be read.
pub fn check_file(path: &Path) -> io::Result<Vec<Problem>> {
    if fs::metadata(path)?.is_dir() {
        return Err(io::Error::new(io::ErrorKind::IsADirectory, "is a directory"));
    }
    check(path)
}
