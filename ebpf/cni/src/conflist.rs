//! The plugin's entry in the node's network configuration. Pure: texts in, texts out. What is not ours keeps its octets and
//! its order.

use std::ops::Range;
use std::path::Path;

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::spec::Paths;

/// The plugin's type, which is its file's name in the folder of plugins.
pub const TYPE: &str = "tidegate-cni";
/// The ending of the copy of a configuration that was no list. No runtime reads it.
pub const SAVED: &str = "before-tidegate";

/// Why a configuration cannot be edited.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// It is no JSON.
    #[error("it is no JSON: {0}")]
    Json(String),
    /// Something is not as a runtime needs it.
    #[error("{0}")]
    Form(&'static str),
}

/// The file that runtimes take: the first by name that ends as configurations do.
pub fn choose<'a>(names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let is_config = |name: &&str| {
        let ending = name.rsplit_once('.').map(|(_, ending)| ending);
        matches!(ending, Some("conf" | "conflist" | "json"))
    };
    names.into_iter().filter(is_config).min()
}

/// Whether a file of this name holds a list of plugins.
pub fn is_list(name: &str) -> bool {
    name.ends_with(".conflist")
}

/// The plugin's entry.
pub fn entry(paths: &Paths) -> Value {
    let text = |p: &Path| p.display().to_string();
    json!({"type": TYPE, "folder": text(&paths.folder), "standing": text(&paths.standing), "pins": text(&paths.pins)})
}

/// A list with the entry behind all others, or with ours as it should be. `None` if it is that already.
///
/// # Errors
/// The text is no list that a plugin can be chained to.
pub fn with(text: &str, entry: &Value) -> Result<Option<String>, Problem> {
    let plugins = Plugins::find(text)?;
    let new = entry.to_string();
    let Some((at, ours)) = plugins.ours(text)? else {
        let last = plugins.elements.last().ok_or(Problem::Form("plugins: there is none to be chained to"))?;
        // As the element before is set off.
        let before =
            plugins.elements.len().checked_sub(2).map_or(plugins.array.start + 1, |i| plugins.elements[i].end + 1);
        let gap = &text[before..last.start];
        let gap = if gap.chars().all(char::is_whitespace) { gap } else { " " };
        return Ok(Some(format!("{},{gap}{new}{}", &text[..last.end], &text[last.end..])));
    };
    if ours == *entry && plugins.count(text)? == 1 {
        return Ok(None);
    }
    // Others of ours, of a copy that somebody edited, go.
    let Range { start, end } = plugins.elements[at].clone();
    let one = format!("{}{new}{}", &text[..start], &text[end..]);
    let plugins = Plugins::find(&one)?;
    let more: Vec<usize> = plugins.indices(&one)?.into_iter().filter(|i| *i != at).collect();
    Ok(Some(plugins.cut(&one, &more)))
}

/// A list without the entry. `None` if it has none.
///
/// # Errors
/// The text is no list.
pub fn without(text: &str) -> Result<Option<String>, Problem> {
    let plugins = Plugins::find(text)?;
    let ours = plugins.indices(text)?;
    Ok((!ours.is_empty()).then(|| plugins.cut(text, &ours)))
}

/// A list of one plugin, as runtimes make it of a configuration that is no list.
///
/// # Errors
/// It is no configuration of a plugin.
pub fn list_of(text: &str) -> Result<String, Problem> {
    let value: Value = serde_json::from_str(text).map_err(|e| Problem::Json(e.to_string()))?;
    if !value["type"].is_string() {
        return Err(Problem::Form("type: it is missing"));
    }
    let field = |name: &str| value.get(name).cloned().unwrap_or_else(|| json!(""));
    let (version, name) = (field("cniVersion"), field("name"));
    Ok(format!(
        "{{\n  \"cniVersion\": {version},\n  \"name\": {name},\n  \"plugins\": [\n    {}\n  ]\n}}\n",
        text.trim()
    ))
}

/// A list, as far as it is edited.
#[derive(Deserialize)]
struct List<'a> {
    #[serde(borrow)]
    plugins: &'a RawValue,
}

/// Where a value is in the text that it was read from.
fn place(text: &str, value: &RawValue) -> Range<usize> {
    let start = value.get().as_ptr().addr() - text.as_ptr().addr();
    start..start + value.get().len()
}

/// Where the plugins of a list are in its text.
struct Plugins {
    /// From the bracket that opens to the octet behind the one that closes.
    array: Range<usize>,
    elements: Vec<Range<usize>>,
}

impl Plugins {
    fn find(text: &str) -> Result<Self, Problem> {
        let value: Value = serde_json::from_str(text).map_err(|e| Problem::Json(e.to_string()))?;
        if !value["plugins"].is_array() {
            return Err(Problem::Form("plugins: it is no list"));
        }
        match value["cniVersion"].as_str().unwrap_or_default() {
            "" | "0.1.0" | "0.2.0" => return Err(Problem::Form("cniVersion: plugins are chained from 0.3.0 on")),
            _ => {}
        }
        // It is an object with that list, so that nothing but a second one can be wrong.
        let list: List = serde_json::from_str(text).map_err(|_| Problem::Form("plugins: it is there twice"))?;
        let array = place(text, list.plugins);
        let key = text[..array.start].trim_end().strip_suffix(':').map(str::trim_end);
        if !key.is_some_and(|before| before.ends_with("\"plugins\"")) {
            return Err(Problem::Form("plugins: it is written in an unusual way"));
        }
        let elements: Vec<&RawValue> =
            serde_json::from_str(list.plugins.get()).map_err(|e| Problem::Json(e.to_string()))?;
        Ok(Self { elements: elements.into_iter().map(|e| place(text, e)).collect(), array })
    }

    fn values(&self, text: &str) -> Result<Vec<Value>, Problem> {
        let read = |r: &Range<usize>| serde_json::from_str(&text[r.clone()]).map_err(|e| Problem::Json(e.to_string()));
        self.elements.iter().map(read).collect()
    }

    fn indices(&self, text: &str) -> Result<Vec<usize>, Problem> {
        let all = self.values(text)?;
        Ok(all.iter().enumerate().filter(|(_, v)| v["type"] == TYPE).map(|(i, _)| i).collect())
    }

    fn count(&self, text: &str) -> Result<usize, Problem> {
        self.indices(text).map(|i| i.len())
    }

    /// The first of ours.
    fn ours(&self, text: &str) -> Result<Option<(usize, Value)>, Problem> {
        Ok(self.values(text)?.into_iter().enumerate().find(|(_, v)| v["type"] == TYPE))
    }

    /// The text without some elements, and without the commas before them.
    fn cut(&self, text: &str, which: &[usize]) -> String {
        let mut out = text.to_owned();
        for i in which.iter().rev() {
            let Range { start, end } = self.elements[*i].clone();
            let range = match (i.checked_sub(1), self.elements.get(i + 1)) {
                (Some(before), _) => self.elements[before].end..end,
                (None, Some(next)) => start..next.start,
                (None, None) => start..end,
            };
            out.replace_range(range, "");
        }
        out
    }
}

#[cfg(test)]
#[path = "conflist_tests.rs"]
mod tests;
