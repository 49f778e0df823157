//! What criterion measured, read from its folder.

use std::fs;
use std::path::Path;

use anyhow::Result;

use crate::table::Table;

fn collect(folder: &Path, out: &mut Vec<(String, f64)>) -> Result<()> {
    for entry in fs::read_dir(folder)?.flatten() {
        let path = entry.path();
        if !path.is_dir() {
            continue;
        }
        let read = |file: &str| -> Option<serde_json::Value> {
            serde_json::from_slice(&fs::read(path.join("new").join(file)).ok()?).ok()
        };
        match (read("benchmark.json"), read("estimates.json")) {
            (Some(what), Some(found)) => {
                let id = what["full_id"].as_str().unwrap_or_default().to_owned();
                out.push((id, found["median"]["point_estimate"].as_f64().unwrap_or(f64::NAN)));
            }
            _ => collect(&path, out)?,
        }
    }
    Ok(())
}

/// Nanoseconds in a unit that reads well.
fn time(ns: f64) -> String {
    match ns {
        n if n < 1e3 => format!("{n:.0} ns"),
        n if n < 1e6 => format!("{:.2} µs", n / 1e3),
        n => format!("{:.2} ms", n / 1e6),
    }
}

/// The medians of every benchmark below `folder`.
pub fn table(folder: &Path) -> Result<Table> {
    let mut all = Vec::new();
    collect(folder, &mut all)?;
    all.sort_by(|a, b| a.0.cmp(&b.0));
    let how = "Medians of criterion, short runs. match/N/NAME: all rules that match a name, of N patterns. \
               below/N/NAME: whether a rule could match below a name, of N patterns. compile/N: all policy of N \
               namespaces with 10 policies of 10 names and one prefix each; edit/N: the same again after one policy changed.";
    let mut table = Table::new("Matching and compile", how.into(), &["benchmark", "time"]);
    for (id, ns) in all {
        table.row(vec![id, time(ns)]);
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_well() {
        assert_eq!((time(12.4).as_str(), time(1234.0).as_str(), time(2.5e6).as_str()), ("12 ns", "1.23 µs", "2.50 ms"));
    }
}
