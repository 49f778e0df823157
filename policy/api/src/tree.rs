//! A YAML or JSON document as a tree that remembers its lines.
//!
//! Types are what the text says and nothing is coerced: `443` is a number, `yes` a
//! boolean (as the YAML 1.1 readers of Kubernetes have it), `"443"` a string.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;
use serde_saphyr::options::MergeKeyPolicy;

use crate::problem::Seg;

/// The deepest nesting of a document.
const MAX_DEPTH: usize = 32;
/// The most nodes of a document, aliases expanded.
const MAX_NODES: usize = 1_000_000;
/// The most aliases of a document.
const MAX_ALIASES: usize = 1_000;

/// A value with its place.
#[derive(Clone, Debug)]
pub(crate) struct Tree {
    /// Line in the file, from 1.
    pub line: u32,
    /// The value.
    pub value: Value,
}

/// A value.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Int(i128),
    Float,
    Str(String),
    List(Vec<Tree>),
    Map(Vec<(Key, Tree)>),
}

/// A key of a map with its place.
#[derive(Clone, Debug)]
pub(crate) struct Key {
    pub line: u32,
    pub text: String,
}

impl Value {
    /// What it is, for a message.
    pub(crate) const fn what(&self) -> &'static str {
        match self {
            Value::Null => "null",
            Value::Bool(_) => "a boolean",
            Value::Int(_) | Value::Float => "a number",
            Value::Str(_) => "a string",
            Value::List(_) => "a list",
            Value::Map(_) => "a map",
        }
    }
}

impl Tree {
    /// A field of a map.
    pub(crate) fn get(&self, field: &str) -> Option<&Tree> {
        match &self.value {
            Value::Map(entries) => entries.iter().find(|(k, _)| k.text == field).map(|(_, v)| v),
            _ => None,
        }
    }

    /// The text, if it is a string.
    pub(crate) fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Str(s) => Some(s),
            _ => None,
        }
    }

    /// The `name` of an item of a list, if it can stand in a path.
    pub(crate) fn item_name(&self) -> Option<&str> {
        self.get("name").and_then(Tree::text).filter(|n| crate::format::is_label(n))
    }

    /// The line of a path, or of the deepest part of it that exists.
    pub(crate) fn line_of(&self, path: &[Seg]) -> u32 {
        let mut at = self;
        let mut line = self.line;
        for seg in path {
            let next = match (seg, &at.value) {
                (Seg::Field(f), Value::Map(entries)) => {
                    entries.iter().find(|(k, _)| k.text == *f).map(|(k, v)| (k.line, v))
                }
                (Seg::Index(i, _), Value::List(items)) => items.get(*i).map(|v| (v.line, v)),
                _ => None,
            };
            let Some((l, v)) = next else { break };
            (line, at) = (l, v);
        }
        line
    }

    fn shift(&mut self, lines: u32) {
        self.line = self.line.saturating_add(lines);
        match &mut self.value {
            Value::List(items) => items.iter_mut().for_each(|t| t.shift(lines)),
            Value::Map(entries) => {
                for (k, v) in entries {
                    k.line = k.line.saturating_add(lines);
                    v.shift(lines);
                }
            }
            _ => {}
        }
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

fn tree(v: Spanned<Value>) -> Tree {
    Tree { line: line(v.referenced.line()), value: v.value }
}

fn line(n: u64) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, d: D) -> Result<Value, D::Error> {
        d.deserialize_any(self)
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(Value::Int(v.into()))
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(Value::Int(v.into()))
    }

    fn visit_i128<E>(self, v: i128) -> Result<Value, E> {
        Ok(Value::Int(v))
    }

    fn visit_u128<E>(self, v: u128) -> Result<Value, E> {
        Ok(i128::try_from(v).map_or(Value::Float, Value::Int))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Value, E> {
        // No field takes a fraction, so its value is of no use.
        Ok(Value::Float)
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(Value::Str(v.to_owned()))
    }

    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(Value::Str(v))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut out = Vec::new();
        while let Some(v) = seq.next_element::<Spanned<Value>>()? {
            out.push(tree(v));
        }
        Ok(Value::List(out))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut out = Vec::new();
        while let Some(k) = map.next_key::<Spanned<String>>()? {
            let v = map.next_value::<Spanned<Value>>()?;
            out.push((Key { line: line(k.referenced.line()), text: k.value }, tree(v)));
        }
        Ok(Value::Map(out))
    }
}

/// A text that is not YAML.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SyntaxError {
    /// Line in the file, from 1, where it is known.
    pub line: Option<u32>,
    /// What is wrong.
    pub message: String,
}

/// A document's text with the number of lines before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk<'a> {
    pub text: &'a str,
    pub before: u32,
}

/// Cuts a stream at its document markers (YAML 1.2, section 9.1.2), so that one bad document
/// leaves the others alone. A marker is a line that starts with `---` or `...`: inside quoted
/// and block scalars YAML forbids such lines. Documents with nothing in them are left out.
pub(crate) fn documents(text: &str) -> Vec<Chunk<'_>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut out = Vec::new();
    let (mut start, mut start_line) = (0usize, 0u32);
    let mut has_content = false;
    let mut at = 0usize;
    for (n, l) in (0u32..).zip(text.split_inclusive('\n')) {
        let is = |marker: &str| {
            l.strip_prefix(marker).is_some_and(|r| r.is_empty() || r.starts_with([' ', '\t', '\r', '\n']))
        };
        let bare = l.trim();
        if is("---") {
            if has_content {
                out.push(Chunk { text: &text[start..at], before: start_line });
            }
            (start, start_line) = (at, n);
            let rest = bare[3..].trim_start();
            has_content = !rest.is_empty() && !rest.starts_with('#');
        } else if is("...") {
            if has_content {
                out.push(Chunk { text: &text[start..at], before: start_line });
            }
            (start, start_line) = (at + l.len(), n + 1);
            has_content = false;
        } else {
            // Before any content a `%` line is a directive.
            has_content |= !bare.is_empty() && !bare.starts_with('#') && !l.starts_with('%');
        }
        at += l.len();
    }
    if has_content {
        out.push(Chunk { text: &text[start..], before: start_line });
    }
    out
}

/// Reads one document.
pub(crate) fn parse(chunk: Chunk<'_>) -> Result<Tree, SyntaxError> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: MAX_DEPTH,
            max_nodes: MAX_NODES,
            max_aliases: MAX_ALIASES,
            max_documents: 1,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: 100_000,
        },
        emit_comments: false,
        merge_keys: MergeKeyPolicy::Merge,
        reject_unsupported_tags: true,
        with_snippet: false,
    };
    match serde_saphyr::from_str_with_options::<Spanned<Value>>(chunk.text, options) {
        Ok(v) => {
            let mut t = tree(v);
            t.shift(chunk.before);
            Ok(t)
        }
        Err(e) => {
            let at = e.location().map(|l| line(l.line()).saturating_add(chunk.before));
            let text = e.without_snippet().to_string();
            // The parser counts lines from the document's start; the place is said once, by us.
            let text = text.lines().next().unwrap_or_default();
            let text = text.split(" at line ").next().unwrap_or(text);
            let text = match text.strip_prefix("error: ") {
                Some(rest) => rest.split_once(": ").filter(|(l, _)| l.starts_with("line ")).map_or(rest, |(_, m)| m),
                None => text,
            };
            Err(SyntaxError { line: at, message: crate::problem::printable(text) })
        }
    }
}
