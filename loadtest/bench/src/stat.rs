//! Medians and percentiles.

/// The median; NaN of nothing.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut v: Vec<f64> = values.into_iter().collect();
    v.sort_by(f64::total_cmp);
    match v.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => v[n / 2],
        n => f64::midpoint(v[n / 2 - 1], v[n / 2]),
    }
}

/// The value that `share` (0 to 1) of the sorted values are at or below; NaN of nothing.
pub fn percentile(sorted: &[u64], share: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted[rank.saturating_sub(1).min(last)] as f64
}

/// When events of an even rate are due: the load does not wait for answers.
#[derive(Clone, Copy)]
pub struct Schedule {
    rate: u64,
    total: u64,
}

impl Schedule {
    /// `rate` events a second for `seconds`.
    pub fn new(rate: u64, seconds: f64) -> Self {
        Self { rate, total: (rate as f64 * seconds) as u64 }
    }

    /// How many there are.
    pub fn total(self) -> u64 {
        self.total
    }

    /// When event `i` is due, in nanoseconds since the start.
    pub fn due(self, i: u64) -> u64 {
        (u128::from(i) * 1_000_000_000 / u128::from(self.rate)) as u64
    }

    /// How many events are due at `now`, in nanoseconds since the start.
    pub fn until(self, now: u64) -> u64 {
        let n = u128::from(now) * u128::from(self.rate) / 1_000_000_000 + 1;
        u64::try_from(n).unwrap_or(u64::MAX).min(self.total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_percentiles() {
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median([]).is_nan());
        let v: Vec<u64> = (1..=100).collect();
        assert_eq!((percentile(&v, 0.5), percentile(&v, 0.99), percentile(&v, 1.0)), (50.0, 99.0, 100.0));
        assert_eq!(percentile(&v[..1], 0.99), 1.0);
    }

    #[test]
    fn every_event_is_due_once_and_on_time() {
        let s = Schedule::new(3000, 1.0);
        assert_eq!((s.total(), s.until(0), s.until(u64::MAX)), (3000, 1, 3000));
        for i in 0..s.total() {
            assert!(s.until(s.due(i) + 1) > i, "{i}");
            assert!(i == 0 || s.until(s.due(i) - 1) <= i, "{i}");
        }
    }
}
