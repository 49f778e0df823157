//! Tables for people: aligned text and Markdown from the same cells.

use std::fmt::Write;

/// A table with a title, a line of how it was measured, and cells of text.
pub struct Table {
    title: String,
    how: String,
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table.
    pub fn new(title: &str, how: String, head: &[&str]) -> Self {
        Self { title: title.into(), how, head: head.iter().map(|h| (*h).to_owned()).collect(), rows: Vec::new() }
    }

    /// Adds a row; missing cells stay empty.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    fn widths(&self) -> Vec<usize> {
        let all = || std::iter::once(&self.head).chain(&self.rows);
        (0..self.head.len())
            .map(|i| all().filter_map(|r| r.get(i)).map(|c| c.chars().count()).max().unwrap_or(0))
            .collect()
    }

    /// One line of cells: the first column to the left, figures to the right.
    fn line(cells: &[String], widths: &[usize], between: &str) -> String {
        let empty = String::new();
        let padded = widths.iter().enumerate().map(|(i, &w)| {
            let cell = cells.get(i).unwrap_or(&empty);
            if i == 0 { format!("{cell:<w$}") } else { format!("{cell:>w$}") }
        });
        padded.collect::<Vec<_>>().join(between).trim_end().to_owned()
    }

    /// For a terminal.
    pub fn text(&self) -> String {
        let widths = self.widths();
        let mut out = format!("\n{}\n  {}\n\n", self.title, self.how);
        for row in std::iter::once(&self.head).chain(&self.rows) {
            let _ = writeln!(out, "  {}", Self::line(row, &widths, "  "));
        }
        out
    }

    /// For the documentation.
    pub fn markdown(&self) -> String {
        let widths: Vec<usize> = self.widths().iter().map(|w| (*w).max(2)).collect();
        let rule: Vec<String> = widths
            .iter()
            .enumerate()
            .map(|(i, &w)| if i == 0 { "-".repeat(w) } else { format!("{}:", "-".repeat(w - 1)) })
            .collect();
        let mut out = format!("## {}\n\n{}\n\n", self.title, self.how);
        for row in [&self.head, &rule].into_iter().chain(&self.rows) {
            let _ = writeln!(out, "| {} |", Self::line(row, &widths, " | "));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_have_every_cell() {
        let mut t = Table::new("Title", "How.".into(), &["server", "µs"]);
        t.row(vec!["one".into(), "1.5".into()]);
        t.row(vec!["another".into(), "12.25".into()]);
        assert!(t.text().contains("  another  12.25\n"));
        assert!(t.markdown().contains("| server  |    µs |\n| ------- | ----: |\n| one     |   1.5 |\n"));
    }
}
