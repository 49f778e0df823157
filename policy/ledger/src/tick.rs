//! Time in tenths of a second since boot: four octets, thirteen years.

use std::time::Duration;

const MILLIS: u128 = 100;

/// A point in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Tick(u32);

impl Tick {
    /// Boot; also "never yet".
    pub const ZERO: Tick = Tick(0);
    /// Later than everything: "not armed".
    pub const MAX: Tick = Tick(u32::MAX);

    /// The last tick at or before a time.
    pub fn floor(t: Duration) -> Self {
        Self(u32::try_from(t.as_millis() / MILLIS).unwrap_or(u32::MAX))
    }

    /// The first tick at or after a time.
    pub fn ceil(t: Duration) -> Self {
        Self(u32::try_from(t.as_nanos().div_ceil(MILLIS * 1_000_000)).unwrap_or(u32::MAX))
    }

    /// This much later, rounded down.
    pub fn plus(self, d: Duration) -> Self {
        Self(self.0.saturating_add(Self::floor(d).0))
    }

    /// This much earlier, rounded down.
    pub fn minus(self, d: Duration) -> Self {
        Self(self.0.saturating_sub(Self::ceil(d).0))
    }

    /// Since boot.
    pub fn duration(self) -> Duration {
        Duration::from_millis(u64::from(self.0) * MILLIS as u64)
    }

    /// How long it is until then from `now`; zero if it has passed.
    pub fn left(self, now: Duration) -> Duration {
        self.duration().saturating_sub(now)
    }
}
