//! The millisecond clock that the pure half is given.

use std::time::Instant;

/// Milliseconds since the service started.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Clock {
    /// Starts at zero.
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// Now, in milliseconds.
    pub fn now(&self) -> u64 {
        self.at(Instant::now())
    }

    /// A time that was taken since, in milliseconds.
    pub fn at(&self, at: Instant) -> u64 {
        let since = at.saturating_duration_since(self.0);
        since.as_secs().saturating_mul(1000) + u64::from(since.subsec_millis())
    }
}
