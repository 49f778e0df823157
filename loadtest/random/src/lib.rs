//! Random numbers for tests that are the same in every run: SplitMix64 (Steele, Lea and Flood, 2014), and what is thrown at servers.
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

/// Octets that look random.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut random = Random(seed);
    (0..length).map(|_| random.below(256) as u8).collect()
}

/// Octets that every server must survive: none, one, noise, much noise, and heads of HTTP and TLS that go wrong after them.
pub fn hostile() -> Vec<Vec<u8>> {
    let mut all = vec![vec![], vec![0], vec![0xff; 3], noise(1, 64), noise(2, 5_000), noise(3, 300_000)];
    all.push([b"GET /".as_slice(), &[b'a'; 100_000]].concat());
    all.push(b"POST /config HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n".to_vec());
    // TLS records: a hello cut short, one longer than any, one of noise, an alert.
    all.push([&[22, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xfc, 3, 3][..], &noise(4, 200)].concat());
    all.push([&[22, 3, 1, 0xff, 0xff, 1, 0xff, 0xff, 0xff][..], &noise(5, 70_000)].concat());
    all.push([&[22, 3, 3, 0, 200][..], &noise(6, 200)].concat());
    all.push(vec![21, 3, 3, 0, 2, 2, 40]);
    all.push([b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice(), &noise(7, 500)].concat());
    all
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

    #[test]
    fn noise_is_the_same_in_every_run() {
        assert_eq!(noise(1, 8), noise(1, 8));
        assert_ne!(noise(1, 8), noise(2, 8));
    }
}
