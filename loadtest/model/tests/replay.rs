//! What failed once, then random bytes for a while: the same every time.

use std::time::{Duration, Instant};

use tidegate_model::{Stats, random, run};

/// Runs at least and at most, octets of each, and how long they may take together.
const LEAST: u64 = 100;
const RUNS: u64 = 600;
const OCTETS: usize = 1_500;
const TIME: Duration = Duration::from_secs(60);

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
    let begun = Instant::now();
    let mut total = Stats::default();
    for seed in 0..RUNS {
        eprintln!("seed {seed} after {} steps", total.steps);
        total.add(&run(&random(seed, OCTETS)));
        if seed >= LEAST && begun.elapsed() > TIME {
            break;
        }
    }
    eprintln!("{total:?}");
    // It is worth nothing if nothing happens.
    assert!(total.edits > 100 && total.released > 100 && total.carried > 100, "{total:?}");
    assert!(total.flows > 20 && total.moves > 100 && total.imported > 100, "{total:?}");
}
