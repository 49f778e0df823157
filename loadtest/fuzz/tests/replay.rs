//! Every file of the corpora, and what comes of damaging them a little.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use tidegate_fuzz::TARGETS;

/// Damaged inputs per target, and how long they may take.
const DAMAGED: usize = 4_000;
const TIME: Duration = Duration::from_secs(4);
/// What the corpora may hold.
const MOST_FILES: usize = 60;
const MOST_OCTETS: usize = 4096;

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        // xorshift64*: any generator will do that is the same everywhere.
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n.max(1)
    }
}

/// Flips, overwrites, cuts, repeats, and crosses with another file.
fn damage(all: &[Vec<u8>], r: &mut Random) -> Vec<u8> {
    let mut out = all[r.below(all.len())].clone();
    for _ in 0..=r.below(4) {
        let at = r.below(out.len() + 1);
        match r.below(6) {
            0 if at < out.len() => out[at] ^= 1 << r.below(8),
            1 if at < out.len() => out[at] = [0, 1, 0x7f, 0x80, 0xff, 0xc0][r.below(6)],
            2 => out.truncate(at),
            3 => {
                let end = (at + r.below(8)).min(out.len());
                out.drain(at..end);
            }
            4 => {
                let end = (at + r.below(32)).min(out.len());
                let again = out[at..end].to_vec();
                out.splice(at..at, again);
            }
            _ => {
                let other = &all[r.below(all.len())];
                let from = r.below(other.len() + 1);
                out.truncate(at);
                out.extend_from_slice(&other[from..]);
            }
        }
    }
    out.truncate(MOST_OCTETS);
    out
}

fn corpus(name: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|f| {
            let f = f.expect("an entry of the corpus");
            (f.file_name().to_string_lossy().into_owned(), std::fs::read(f.path()).expect("a file of the corpus"))
        })
        .collect();
    files.sort();
    files
}

fn replay(name: &str) {
    let (_, target) = TARGETS.iter().find(|(n, _)| *n == name).expect("a target of this name");
    let files = corpus(name);
    assert!((1..=MOST_FILES).contains(&files.len()), "{} files", files.len());
    let mut taken = 0;
    for (file, bytes) in &files {
        assert!(bytes.len() <= MOST_OCTETS, "{file} has {} octets", bytes.len());
        taken += usize::from(target(bytes));
    }
    // Where everything is refused, little is held.
    assert!(4 * taken >= files.len(), "{taken} of {} files are taken", files.len());
    let all: Vec<Vec<u8>> = files.into_iter().map(|(_, bytes)| bytes).collect();
    let mut random = Random(0x7469_6465_6761_7465);
    let begun = Instant::now();
    for _ in 0..DAMAGED {
        let bytes = damage(&all, &mut random);
        if catch_unwind(AssertUnwindSafe(|| target(&bytes))).is_err() {
            panic!("{name} fails with {bytes:?}: put it into its corpus");
        }
        if begun.elapsed() > TIME {
            break;
        }
    }
}

macro_rules! replays {
    ($($name:ident),* $(,)?) => {
        $(
            #[test]
            fn $name() {
                replay(stringify!($name));
            }
        )*

        #[test]
        fn every_target_is_replayed() {
            let replayed = [$(stringify!($name)),*];
            assert_eq!(TARGETS.iter().map(|(n, _)| *n).collect::<Vec<_>>(), replayed);
        }
    };
}

replays!(annotation, cni, dns_answer, dns_query, kernel_event, manifest, message, packet, tls, tunnel);
