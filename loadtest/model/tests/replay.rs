//! What failed once, then random bytes: the same on every machine, in half a minute of one core.

use tidegate_model::{Stats, random, run};

/// Runs, and octets of each.
const RUNS: u64 = 120;
const OCTETS: usize = 1_500;

#[test]
fn what_failed_once_holds_now() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/seeds");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty());
    for file in files {
        eprintln!("{}", file.display());
        run(&std::fs::read(&file).unwrap());
    }
}

#[test]
fn enforcement_equals_policy_after_any_sequence() {
    let mut total = Stats::default();
    for seed in 0..RUNS {
        eprintln!("seed {seed} after {} steps", total.steps);
        total.add(&run(&random(seed, OCTETS)));
    }
    eprintln!("{total:?}");
    // It is worth nothing if nothing happens.
    assert!(total.edits > 100 && total.released > 100 && total.carried > 100, "{total:?}");
    assert!(total.flows > 20 && total.moves > 100 && total.imported > 100, "{total:?}");
}
