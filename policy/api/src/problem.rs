//! What is wrong with a manifest, said so that its author can find and mend it.

use std::fmt;
use std::path::PathBuf;

/// One step into an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Seg {
    /// A field, or a key of a map.
    Field(String),
    /// An item of a list: its index from 0, and its `name` where it has one.
    Index(usize, Option<String>),
}

/// Where in an object, from its root.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct FieldPath(pub Vec<Seg>);

impl FieldPath {
    /// The path of a chain of fields.
    pub fn fields(names: &[&str]) -> Self {
        Self(names.iter().map(|n| Seg::Field((*n).to_owned())).collect())
    }
}

impl fmt::Display for FieldPath {
    /// As in `spec.egress[stripe].toPorts[0].port`. Keys that would break the text are put in brackets, escaped.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, seg) in self.0.iter().enumerate() {
            match seg {
                Seg::Field(name) if name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') => {
                    if i > 0 {
                        f.write_str(".")?;
                    }
                    f.write_str(name)?;
                }
                Seg::Field(key) => write!(f, "[{}]", printable(key))?,
                Seg::Index(_, Some(name)) => write!(f, "[{}]", printable(name))?,
                Seg::Index(n, None) => write!(f, "[{n}]")?,
            }
        }
        Ok(())
    }
}

/// A text of a manifest for a message: control characters escaped, and cut at 80 characters.
pub fn printable(text: &str) -> String {
    let mut out = String::new();
    for (i, c) in text.chars().enumerate() {
        if i == 80 {
            out.push('…');
            break;
        }
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// How much a problem matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// The object is not taken; its last good version stays.
    Error,
    /// This part alone has no effect; the rest of the object holds.
    Refused,
    /// It holds, and is probably not what was meant.
    Warning,
    /// Nothing to do.
    Note,
}

impl Severity {
    /// The word that starts a line of `tidegate policy check`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Severity::Error => "error",
            Severity::Refused => "refused",
            Severity::Warning => "warning",
            Severity::Note => "note",
        }
    }
}

/// What kind of problem it is: the `reason` of a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Code {
    /// A file or folder that cannot be read, or is beyond a limit of the reader.
    Unreadable,
    /// Not YAML or JSON.
    Syntax,
    /// A kind or version of `tidegate.dev` that does not exist.
    UnknownKind,
    /// A field that does not exist.
    UnknownField,
    /// A field or value that the API has, and this version does not carry out.
    UnsupportedField,
    /// A field that must be there and is not.
    Missing,
    /// A value that the field does not take.
    Invalid,
    /// More than the limit.
    TooMany,
    /// The same object, rule or address twice.
    Duplicate,
    /// An item of an annotation that cannot be read.
    BadItem,
    /// A name, pattern or prefix that covers more than its author may think.
    Broad,
    /// Connections that this rule allows will be refused by the inspection that it asks for.
    NotTls,
    /// A grant that a tenant can take by setting a label.
    TenantLabel,
    /// Something that has no effect.
    NoEffect,
    /// Not a kind that Tidegate reads.
    Ignored,
}

impl Code {
    /// The published PascalCase text.
    pub const fn as_str(self) -> &'static str {
        match self {
            Code::Unreadable => "Unreadable",
            Code::Syntax => "Syntax",
            Code::UnknownKind => "UnknownKind",
            Code::UnknownField => "UnknownField",
            Code::UnsupportedField => "UnsupportedField",
            Code::Missing => "Missing",
            Code::Invalid => "Invalid",
            Code::TooMany => "TooMany",
            Code::Duplicate => "Duplicate",
            Code::BadItem => "BadItem",
            Code::Broad => "Broad",
            Code::NotTls => "NotTls",
            Code::TenantLabel => "TenantLabel",
            Code::NoEffect => "NoEffect",
            Code::Ignored => "Ignored",
        }
    }
}

/// A problem of one object, before it is known where the object came from.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {message}")]
pub struct FieldProblem {
    /// How much it matters.
    pub severity: Severity,
    /// What kind it is.
    pub code: Code,
    /// The field.
    pub path: FieldPath,
    /// What is wrong, and what to write instead.
    pub message: String,
}

/// The object that a problem is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectRef {
    /// Its kind.
    pub kind: String,
    /// Its namespace; empty for cluster-scoped kinds.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&printable(&self.kind))?;
        match (self.namespace.is_empty(), self.name.is_empty()) {
            (_, true) => Ok(()),
            (true, false) => write!(f, " {}", printable(&self.name)),
            (false, false) => write!(f, " {}/{}", printable(&self.namespace), printable(&self.name)),
        }
    }
}

/// A problem with its place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Problem {
    /// How much it matters.
    pub severity: Severity,
    /// What kind it is.
    pub code: Code,
    /// The file or folder.
    pub file: PathBuf,
    /// The document in the file, from 1; absent when the whole file is meant.
    pub document: Option<usize>,
    /// The line in the file, from 1, where it is known.
    pub line: Option<u32>,
    /// The object, as far as it says who it is.
    pub object: Option<ObjectRef>,
    /// The field; empty when the object as a whole is meant.
    pub path: FieldPath,
    /// What is wrong, and what to write instead.
    pub message: String,
}

impl fmt::Display for Problem {
    /// One line: `a.yaml:12: document 2: EgressPolicy shop/web: spec.egress[x].toPorts: is required`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&printable_path(&self.file))?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        f.write_str(": ")?;
        if let Some(n) = self.document {
            write!(f, "document {n}: ")?;
        }
        if let Some(object) = &self.object {
            write!(f, "{object}: ")?;
        }
        if !self.path.0.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)
    }
}

fn printable_path(path: &std::path::Path) -> String {
    path.to_string_lossy().chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_read_like_the_manifest() {
        let mut path = FieldPath::fields(&["spec", "egress"]);
        path.0.push(Seg::Index(1, Some("stripe".into())));
        path.0.push(Seg::Field("toPorts".into()));
        path.0.push(Seg::Index(0, None));
        path.0.push(Seg::Field("port".into()));
        assert_eq!(path.to_string(), "spec.egress[stripe].toPorts[0].port");
        let mut path = FieldPath::fields(&["metadata", "annotations", "tidegate.dev/allow"]);
        path.0.push(Seg::Index(3, None));
        assert_eq!(path.to_string(), "metadata.annotations[tidegate.dev/allow][3]");
    }

    #[test]
    fn a_manifest_cannot_break_the_line_of_its_problem() {
        let p = Problem {
            severity: Severity::Error,
            code: Code::Invalid,
            file: "a\nb.yaml".into(),
            document: Some(1),
            line: Some(2),
            object: Some(ObjectRef { kind: "X\n".into(), namespace: "a\r".into(), name: "b\u{1b}".into() }),
            path: FieldPath(vec![Seg::Field("k\n".into())]),
            message: "no".into(),
        };
        assert_eq!(p.to_string(), "a\u{fffd}b.yaml:2: document 1: X\\n a\\r/b\\u{1b}: [k\\n]: no");
    }
}
