//! Looks for disagreements: `tidegate-model STEPS [SEED [OCTETS]]` runs random bytes, so many octets at a time, until
//! that many steps are done, and says every 100 seeds how far it is; `tidegate-model FILE…` runs files and tells each step. A failure is made small and kept in `seeds/`.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use tidegate_model::{Stats, random, run, run_telling};

/// Bytes of one run.
const RUN: usize = 3000;
/// So many seeds after each other it says how far it is.
const TELL: u64 = 100;

thread_local! {
    /// Where the last run failed.
    static PLACE: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Where a run of these fails.
fn place(bytes: &[u8]) -> Option<String> {
    PLACE.take();
    catch_unwind(AssertUnwindSafe(|| run(bytes))).err().and_then(|_| PLACE.take())
}

/// Leaves out what is not needed to fail at the same place, and turns what is needed into zeros where they do as well.
fn smallest(mut bytes: Vec<u8>) -> Vec<u8> {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|info| PLACE.set(info.location().map(ToString::to_string))));
    let first = place(&bytes);
    let fails = |bytes: &[u8]| first.is_some() && place(bytes) == first;
    let mut size = bytes.len() / 2;
    while size > 0 {
        let mut at = 0;
        while at + size <= bytes.len() {
            let shorter = [&bytes[..at], &bytes[at + size..]].concat();
            if fails(&shorter) { bytes = shorter } else { at += size }
        }
        size /= 2;
    }
    for at in 0..bytes.len() {
        let old = std::mem::replace(&mut bytes[at], 0);
        if !fails(&bytes) {
            bytes[at] = old;
        }
    }
    std::panic::set_hook(hook);
    bytes
}

fn keep(bytes: Vec<u8>, label: &str) -> ExitCode {
    let small = smallest(bytes);
    let path = format!("{}/seeds/{label}", env!("CARGO_MANIFEST_DIR"));
    match std::fs::write(&path, &small) {
        Ok(()) => eprintln!("kept {} octets in {path}", small.len()),
        Err(e) => eprintln!("{path}: {e}; the octets are {small:?}"),
    }
    // Once more, for the message.
    let _ = catch_unwind(AssertUnwindSafe(|| run(&small)));
    ExitCode::FAILURE
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let steps: Option<u64> = args.first().and_then(|a| a.parse().ok());
    let Some(steps) = steps else {
        for path in &args {
            match std::fs::read(path) {
                Ok(bytes) => println!("{path}: {:?}", run_telling(&bytes, Some(|s| println!("{s}")))),
                Err(e) => {
                    eprintln!("{path}: {e}");
                    return ExitCode::FAILURE;
                }
            }
        }
        return ExitCode::SUCCESS;
    };
    let first = args.get(1).and_then(|a| a.parse().ok()).unwrap_or(1);
    let octets = args.get(2).and_then(|a| a.parse().ok()).unwrap_or(RUN);
    let mut total = Stats::default();
    let mut seed: u64 = first;
    while total.steps < steps {
        let bytes = random(seed, octets);
        match catch_unwind(AssertUnwindSafe(|| run(&bytes))) {
            Ok(stats) => total.add(&stats),
            Err(_) => {
                eprintln!("seed {seed} fails");
                return keep(bytes, &format!("random-{seed}"));
            }
        }
        seed += 1;
        if (seed - first).is_multiple_of(TELL) {
            println!("seeds {first} to {}: {} steps", seed - 1, total.steps);
        }
    }
    println!("seeds {first} to {}: {total:?}", seed - 1);
    ExitCode::SUCCESS
}
