//! What the test found, as a table or as JSON.

use serde::Serialize;

use crate::overview;
use crate::probe::Family;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The promise is kept.
    Kept,
    /// It is not.
    Broken,
    /// It could not be tried here.
    Skipped,
}

impl Outcome {
    const fn text(self) -> &'static str {
        match self {
            Self::Kept => "ok",
            Self::Broken => "FAIL",
            Self::Skipped => "skipped",
        }
    }
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// What was tried.
    pub check: String,
    /// Over which family, if that matters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub family: Option<Family>,
    /// From which node; empty: from all.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub node: String,
    /// How it ended.
    pub outcome: Outcome,
    /// What was seen.
    pub detail: String,
}

impl Row {
    pub fn new(check: &str, family: Option<Family>, node: &str, outcome: Outcome, detail: impl Into<String>) -> Self {
        let detail = tidegate_api::printable(&detail.into());
        Self { check: check.to_owned(), family, node: node.to_owned(), outcome, detail }
    }
}

/// Whether any promise is broken.
pub fn is_broken(rows: &[Row]) -> bool {
    rows.iter().any(|r| r.outcome == Outcome::Broken)
}

/// A table for people, and a line that sums it up.
pub fn render(rows: &[Row]) -> String {
    let head = ["CHECK", "FAMILY", "NODE", "RESULT", "SEEN"].map(str::to_owned).to_vec();
    let line = |r: &Row| {
        let family = r.family.map_or("-", Family::text).to_owned();
        let node = if r.node.is_empty() { "-" } else { &r.node };
        vec![r.check.clone(), family, node.to_owned(), r.outcome.text().to_owned(), r.detail.clone()]
    };
    let mut out = String::new();
    overview::table(&mut out, &[vec![head], rows.iter().map(line).collect()].concat());
    let count = |o| rows.iter().filter(|r| r.outcome == o).count();
    let (kept, broken, skipped) = (count(Outcome::Kept), count(Outcome::Broken), count(Outcome::Skipped));
    let sum = if broken == 0 { "every promise is kept" } else { "PROMISES ARE BROKEN" };
    out + &format!("\n{sum}: {kept} ok, {broken} failed, {skipped} skipped\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_see_what_failed() {
        let rows = [
            Row::new("allowed name", Some(Family::V4), "node-1", Outcome::Kept, "192.0.2.1 in 7 ms"),
            Row::new("policy", None, "", Outcome::Broken, "Pending:\n3 of 4 nodes"),
        ];
        let expected = "\
CHECK         FAMILY  NODE    RESULT  SEEN
allowed name  IPv4    node-1  ok      192.0.2.1 in 7 ms
policy        -       -       FAIL    Pending:\\n3 of 4 nodes

PROMISES ARE BROKEN: 1 ok, 1 failed, 0 skipped
";
        assert_eq!(render(&rows), expected);
        assert!(is_broken(&rows) && !is_broken(&rows[..1]));
    }
}
