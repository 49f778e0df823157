//! Random numbers for tests that are the same in every run: SplitMix64 (Steele, Lea and Flood, 2014).
#![forbid(unsafe_code)]

/// What numbers come from; the field is the seed.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next one, of all 64-bit numbers.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// The next one below `n`, which is not 0. Small ones are as good as equally likely.
    pub const fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// One of these, of which there is at least one.
    pub fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of the reference implementation, for the seed 1234567.
    #[test]
    fn the_numbers_are_the_references() {
        let mut r = Random(1_234_567);
        let first: Vec<u64> = (0..3).map(|_| r.next()).collect();
        assert_eq!(first, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }
}
